"""metrics.jsonl, weights.json and the console: contracts of the outputs folder, also over a resume."""

import io
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rich.console import Console

from megatron_scalebio.config import SourceConfig, UserError, config_sha256, load_config, write_config
from megatron_scalebio.run_folder import check_output_dir
from megatron_scalebio.show.console import RunConsole, duration
from megatron_scalebio.show.metrics import read_metrics
from megatron_scalebio.show.record import StepRecord
from megatron_scalebio.show.summary import epochs_summary, overfitting_summary, weight_intervals, weights_summary
from megatron_scalebio.show.writers import MetricsWriter
from tests.configs import resolved
from tests.show.records import a_record

NUM_EXAMPLES = {"clean": 30, "noisy": 20}
NUM_DUPLICATES = {"clean": 0, "noisy": 3}


@pytest.fixture
def config(tmp_path):
    config = resolved(f"run.output_dir={tmp_path / 'run'}", "bilevel.steps=8", "run.eval_every=20")
    config.data.sources = [SourceConfig(name, f"/data/{name}.jsonl") for name in NUM_EXAMPLES]
    return config


def write_steps(config, first: int, last: int, **changes) -> None:
    with MetricsWriter(config, NUM_EXAMPLES, NUM_DUPLICATES, start_step=first - 1, is_main_rank=True) as metrics:
        for step in range(first, last + 1):
            metrics.record(a_record(step, **changes))


def read(config, name: str) -> str:
    return (Path(config.run.output_dir) / name).read_text()


def test_weights_json_has_exactly_the_keys_of_the_contract(config):
    write_steps(config, 1, 5)
    weights = json.loads(read(config, "weights.json"))
    assert weights == {
        "step": 5,
        "weights": {"clean": 0.75, "noisy": 0.25},
        "weights_mean": {"clean": pytest.approx(0.725), "noisy": pytest.approx(0.275)},  # of steps 4 and 5
        "intervals": None,
        "logits": {"clean": 0.5, "noisy": -0.5},
        "num_examples": NUM_EXAMPLES,
        "num_duplicates": NUM_DUPLICATES,
        "epochs": {"clean": 6 * 5 / 30, "noisy": 2 * 5 / 20},
        "epochs_planned": {"clean": 6 * 8 / 30, "noisy": 2 * 8 / 20},
        "overfitting": {"clean": False, "noisy": False},
        "moved": True,
        "settled": {"clean": False, "noisy": False},
        "still_moving": True,
        "config_sha256": config_sha256(config),
    }


def test_weights_json_exists_from_the_first_step_on(config):
    with MetricsWriter(config, NUM_EXAMPLES, NUM_DUPLICATES, start_step=0, is_main_rank=True) as metrics:
        for step in (1, 2):
            metrics.record(a_record(step))
            assert json.loads(read(config, "weights.json"))["step"] == step
            assert len(read(config, "metrics.jsonl").splitlines()) == step


@pytest.mark.parametrize("checkpoint", [3, 5])
def test_resumed_run_writes_the_bytes_of_the_uninterrupted_one(config, tmp_path, checkpoint):
    write_steps(config, 1, 8)
    uninterrupted = [read(config, name) for name in ("weights.json", "metrics.jsonl", "config.yaml")]
    config.run.output_dir = str(tmp_path / "interrupted")
    write_steps(config, 1, 5)
    with open(tmp_path / "interrupted" / "metrics.jsonl", "a") as file:
        file.write('{"step": 6, "weig')  # killed while writing
    write_steps(config, checkpoint + 1, 8)
    resumed = [read(config, name) for name in ("weights.json", "metrics.jsonl", "config.yaml")]
    assert resumed[:2] == uninterrupted[:2]


def test_records_after_the_checkpoint_are_moved_aside_and_kept(config, tmp_path):
    write_steps(config, 1, 5)
    tail = read(config, "metrics.jsonl").splitlines(keepends=True)[3:]
    write_steps(config, 4, 6)
    assert read(config, "metrics.dropped-1.jsonl") == "".join(tail)
    write_steps(config, 6, 6)
    assert json.loads(read(config, "metrics.dropped-2.jsonl"))["step"] == 6
    assert [record["step"] for record in read_metrics(tmp_path / "run")] == [1, 2, 3, 4, 5, 6]


def test_missing_history_is_refused(config):
    write_steps(config, 1, 3)
    with pytest.raises(UserError, match="steps 1 to 3, but the run continues from step 5"):
        write_steps(config, 6, 6)


def test_non_finite_numbers_become_null(config):
    write_steps(config, 1, 1, val_loss=math.nan, hypergradient={"clean": math.inf, "noisy": [-math.inf]})
    record = json.loads(read(config, "metrics.jsonl"), parse_constant=pytest.fail)
    assert record["val_loss"] is None
    assert record["hypergradient"] == {"clean": None, "noisy": [None]}


def test_other_ranks_write_nothing(config, tmp_path):
    with MetricsWriter(config, NUM_EXAMPLES, NUM_DUPLICATES, start_step=0, is_main_rank=False) as metrics:
        metrics.record(a_record(1))
    assert not (tmp_path / "run").exists()


def constant(steps: int, *weights: float) -> np.ndarray:
    return np.tile(weights, (steps, 1))


def settled(table: np.ndarray) -> list[bool]:
    """Of each column of weights [steps, sources], which a first step has moved by next to nothing."""
    table = table.copy()
    table[0] += 1e-9
    summary = weights_summary([str(k) for k in range(table.shape[1])], table)
    assert summary["moved"] == bool((table != table[0]).any())
    assert summary["still_moving"] == (summary["moved"] and not all(summary["settled"].values()))
    return list(summary["settled"].values())


def test_each_weight_settles_for_itself():
    table = constant(40, 0.6, 0.3, 0.1)
    table[:, 1] += np.linspace(-0.05, 0.05, 40)
    table[:, 0] -= np.linspace(-0.05, 0.05, 40)
    assert settled(table) == [True, True, True]  # .025 in the last quarter: 4% and 8% of them
    table[:, 1] = 0.3 + np.linspace(-0.2, 0.2, 40)
    assert settled(table) == [True, False, True]


def test_few_steps_settle_nothing_however_many_sources_there_are():
    assert settled(constant(16, *[1 / 60] * 60)) == [False] * 60
    assert settled(constant(17, *[1 / 60] * 60)) == [True] * 60


def test_a_source_among_many_moves_by_less_than_an_absolute_rule_sees():
    table = constant(40, *[1 / 60] * 60)
    table[:, 0] += np.linspace(0, 0.016, 40)  # nearly doubles
    assert settled(table) == [False] + [True] * 59


def test_a_weight_that_hardly_counts_may_move_by_a_part_of_an_equal_share():
    table = constant(40, 0.5, 0.499, 0.001)
    table[30:, 2] = np.linspace(0.001, 0.004, 10)  # four times itself, and nothing to the mixture
    assert settled(table) == [True] * 3
    table[30:, 2] = np.linspace(0.001, 0.01, 10)
    assert settled(table) == [True, True, False]


def test_noise_is_no_movement_and_a_drift_within_it_is_seen_when_it_leaves_it():
    noise = np.random.default_rng(0).normal(size=(400, 1)) * 0.03
    table = np.hstack([0.3 + noise, 0.7 - noise])
    assert settled(table) == [True, True]
    drift = np.linspace(0, 0.8, 400)[:, None] - 0.2  # .2 in the last quarter, where the noise scatters by .03
    assert settled(np.hstack([0.3 + noise + drift, np.full((400, 1), 0.7)])) == [False, True]


def test_weights_that_the_gate_has_just_let_go_have_not_settled():
    """Of 46 steps the last 12 are looked at: what left its start in step 35 has stood still since, or not yet."""
    for first, expected in ((35, [True, True]), (36, [False, False]), (46, [False, False])):
        table = constant(46, 0.5, 0.5)
        table[first - 1 :] = 0.505, 0.495
        summary = weights_summary(["a", "b"], table)
        assert list(summary["settled"].values()) == expected and summary["moved"]
        assert summary["still_moving"] == (not expected[0])
    summary = weights_summary(["a", "b"], constant(46, 0.5, 0.5))
    assert not any(summary["settled"].values()) and not summary["moved"] and not summary["still_moving"]


def test_what_moved_before_the_last_quarter_has_settled():
    assert settled(np.vstack([constant(30, 0.5, 0.5), constant(10, 0.8, 0.2)])) == [True, True]
    assert settled(np.vstack([constant(31, 0.5, 0.5), constant(9, 0.8, 0.2)])) == [False, False]


def test_a_run_may_end_by_its_weights_after_a_quarter_of_its_steps(config):
    config.bilevel.steps = 100
    still = {"weights": {"clean": 0.5, "noisy": 0.5}}
    with MetricsWriter(config, NUM_EXAMPLES, NUM_DUPLICATES, start_step=0, is_main_rank=True) as metrics:
        metrics.record(a_record(1))
        for step in range(2, 25):
            metrics.record(a_record(step, **still))
        assert not metrics.settled()
        assert metrics.settled(still["weights"]) and not metrics.settled({"clean": 0.6, "noisy": 0.4})
        metrics.record(a_record(25, **still))
        assert metrics.settled()


def test_weights_that_have_never_left_their_start_end_no_run(config, capsys):
    config.bilevel.steps = 100
    with MetricsWriter(config, NUM_EXAMPLES, NUM_DUPLICATES, start_step=0, is_main_rank=True) as metrics:
        for step in range(1, 101):
            metrics.record(a_record(step, weights={"clean": 0.5, "noisy": 0.5}))
            assert not metrics.settled()
    assert "No weight has moved" in capsys.readouterr().out
    found = json.loads(read(config, "weights.json"))
    assert (found["moved"], found["still_moving"], found["intervals"]) == (False, False, None)


def test_fixed_weights_have_settled_from_the_first_step_on(config, capsys):
    config.bilevel.mode = "fixed"
    with MetricsWriter(config, NUM_EXAMPLES, NUM_DUPLICATES, start_step=0, is_main_rank=True) as metrics:
        metrics.record(a_record(1))
    found = json.loads(read(config, "weights.json"))
    assert all(found["settled"].values()) and not found["still_moving"]
    assert "The weights are fixed." in capsys.readouterr().out


def test_epochs_are_of_what_was_drawn_and_planned_at_the_pace_of_the_last_quarter():
    drawn = np.array([[10, 0]] * 6 + [[4, 6]] * 2)
    summary = epochs_summary(drawn, {"a": 20, "b": 6}, 10)
    assert summary == {"epochs": {"a": 68 / 20, "b": 2.0}, "epochs_planned": {"a": 76 / 20, "b": 4.0}}


def test_a_folder_with_another_run_is_refused_and_left_alone(config, tmp_path):
    check_output_dir(config)
    write_steps(config, 1, 2)
    before = {path.name: path.read_bytes() for path in (tmp_path / "run").iterdir()}
    with pytest.raises(UserError, match="holds another run .*run.resume=auto"):
        check_output_dir(config)
    assert {path.name: path.read_bytes() for path in (tmp_path / "run").iterdir()} == before


def test_resume_continues_only_a_run_with_equal_settings(config):
    write_steps(config, 1, 2)
    config.run.resume, config.run.save_every = "auto", 7
    check_output_dir(config)
    config.optimizer.lr, config.run.seed = 0.5, 3
    with pytest.raises(UserError) as refusal:
        check_output_dir(config)
    lines = str(refusal.value).splitlines()[1:]
    assert lines == ["  optimizer.lr: 2e-06 there, 0.5 here", "  run.seed: 1 there, 3 here"]


def test_a_folder_with_strange_outputs_is_refused_under_resume(config, tmp_path):
    config.run.resume = "auto"
    (tmp_path / "run" / "checkpoints").mkdir(parents=True)
    with pytest.raises(UserError, match="no config.yaml"):
        check_output_dir(config)


def test_a_file_or_a_folder_of_others_is_refused(config, tmp_path):
    (tmp_path / "run").write_text("mine")
    with pytest.raises(UserError, match="is not a folder"):
        check_output_dir(config)
    (tmp_path / "run").unlink()
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "notes.txt").write_text("mine")
    check_output_dir(config)


def test_config_yaml_reads_back_equal(config, tmp_path):
    write_config(config, tmp_path / "config.yaml")
    assert load_config(str(tmp_path / "config.yaml"), []) == config


def summary_of(record: StepRecord) -> dict[str, Any]:
    return weights_summary(list(record.weights), np.array([list(record.weights.values())]))


def shown(every: int, terminal: bool, records: list[StepRecord]) -> str:
    config = load_config(None, [f"bilevel.steps={records[-1].step}", f"run.eval_every={10 * every}"])
    stream = io.StringIO()
    console = Console(file=stream, force_terminal=terminal, width=200, highlight=False, soft_wrap=not terminal)
    writer = RunConsole(config, NUM_EXAMPLES, console)
    writer.open()
    for record in records:
        writer.record(record, summary_of(record))
    writer.close(None)
    return stream.getvalue()


def test_plain_console_has_first_last_every_nth_and_evaluated_steps():
    records = [a_record(step) for step in range(1, 9)]
    records[4] = a_record(5, test_loss=1.25)
    lines = [line for line in shown(3, False, records).splitlines() if line.startswith("step")]
    assert [line.split()[1] for line in lines] == ["1/8", "3/8", "5/8", "6/8", "8/8"]
    assert "test 1.2500" in lines[2]
    assert "ETA 2s" in lines[0] and "clean=.550 noisy=.450" in lines[0]
    assert all("\x1b" not in line for line in lines)


def test_terminal_shows_a_bar_for_each_source():
    text = shown(1, True, [a_record(1), a_record(2)])
    assert "step 2/2" in text and "clean" in text and "noisy" in text and "█" in text


def test_the_pace_is_of_the_latest_steps_as_one():
    """Totals over total time: a slow step counts for as long as it took."""
    slow = a_record(1, step_seconds=3.0, tokens_per_second=1000.0, tflops_per_gpu=100.0, mfu=0.1)
    fast = a_record(2, step_seconds=1.0, tokens_per_second=5000.0, tflops_per_gpu=500.0, mfu=0.5)
    last = shown(1, False, [slow, fast]).splitlines()[-1]
    assert "2.00 s/step  2,000 tokens/s  200 TFLOP/s per rank  MFU 20%  ETA 0s" in last
    assert "MFU" not in shown(1, False, [a_record(1)])


def test_a_line_has_the_keys_of_the_contract_in_their_order(config):
    """What came later stands at the end, before a loss that few lines have."""
    write_steps(config, 1, 1)
    write_steps(config, 2, 2, test_loss=0.5)
    first, second = (list(json.loads(line)) for line in read(config, "metrics.jsonl").splitlines())
    keys = "step weights logits train_loss_lower train_loss_upper val_loss penalty_gap penalty_alpha hypergradient"
    keys += " grad_norm_lower grad_norm_upper lr logits_lr active_layers num_tokens num_loss_tokens step_seconds"
    keys += " tokens_per_second tflops_per_gpu mfu num_examples flops peak_memory_bytes signal_to_noise kept val_losses"
    assert first == keys.split() and second == [*first, "test_loss"]


def test_the_interval_of_a_weight_holds_where_such_runs_end_on_average():
    """Log-odds that walk by autocorrelated noise, as momentum makes it, beside a steady trend: of 200 walks about 19 in
    20 have the end that is true of all within their interval."""
    rng, steps, inside, trend = np.random.default_rng(0), 400, 0, np.linspace(0, 3, 400)
    for _ in range(200):
        noise = rng.normal(0, 0.01, steps + 50)
        moves = np.convolve(noise, 0.9 ** np.arange(50))[50 : steps + 50]
        share = 1 / (1 + np.exp(-(trend + np.cumsum(moves))))
        history = np.stack([share, 1 - share], axis=1)
        (low, high), (other_low, other_high) = weight_intervals(["a", "b"], history).values()
        assert low < share[-1] < high and other_low == pytest.approx(1 - high) and other_high == pytest.approx(1 - low)
        inside += low < 1 / (1 + np.exp(-3)) < high
    assert 0.85 <= inside / 200 <= 0.99
    assert weight_intervals(["a", "b"], history[:99]) is None
    assert weight_intervals(["a", "b"], constant(400, 1.0, 0.0)) is None
    assert weight_intervals(["a", "b"], constant(400, 0.5, 0.5)) is None, "no movement says nothing of noise"


def test_a_source_learned_by_heart_is_named():
    """Its loss falls, it has been seen more than once, and the validation loss rises or stays: nothing else is."""
    rng, steps = np.random.default_rng(0), 80
    noise = rng.normal(0, 0.01, (steps, 6))
    fall, flat = np.linspace(2, 1, steps), np.ones(steps)

    def found(validation, **losses):
        table = np.array([*losses.values(), validation], dtype=float).T
        epochs = {name: 0.9 if name == "once" else 3.0 for name in losses}
        return [name for name, true in overfitting_summary(table, epochs).items() if true]

    seldom = [value if index % 8 == 0 else None for index, value in enumerate(fall.tolist())]
    few = [value if index == 79 else None for index, value in enumerate(fall.tolist())]
    losses = {"learned": fall, "flat": flat, "once": fall}
    losses = {name: values + noise[:, column] for column, (name, values) in enumerate(losses.items())}
    assert found(flat + noise[:, 4], **losses) == ["learned"]
    assert found(3 - fall + noise[:, 4], **losses) == ["learned"]
    assert found(fall + noise[:, 4], **losses) == []
    assert found([None] * steps, **losses) == []
    assert found(flat + noise[:, 4], seldom=seldom, few=few) == []
    assert found((flat + noise[:, 4])[:8], **{name: values[:8] for name, values in losses.items()}) == []


def test_what_a_user_should_know_of_the_records_is_said_at_the_end_and_a_source_held_back_when_it_is(config):
    config.data.max_epochs = 1.5
    stream = io.StringIO()
    writer = RunConsole(config, NUM_EXAMPLES, Console(file=stream, width=200, highlight=False, soft_wrap=True))
    writer.open()
    for step, kept in ((1, 1.0), (2, 0.5), (3, 0.4)):
        record = a_record(step, kept={"clean": kept, "noisy": 1.0})
        writer.record(record, {})
    summary = summary_of(record) | {"epochs": {"clean": 4.25, "noisy": 0.5}}
    summary |= {"intervals": {"clean": (0.6, 0.7), "noisy": (0.3, 0.4)}}
    summary |= {"num_duplicates": NUM_DUPLICATES, "overfitting": {"clean": True, "noisy": False}}
    writer.close(summary)
    text = stream.getvalue()
    assert text.count("holds clean back; the others take that share") == 1
    assert ".600-.700" in text and ".300-.400" in text
    assert "step 2: data.max_epochs=1.5 holds clean back" in text
    assert "noisy: 3 of its examples are exact duplicates of others in it" in text and "clean: 0" not in text
    assert "clean is overfitting: its records have been seen 4.2 times" in text and "noisy is" not in text


class Listening:
    """A writer that notes what it hears."""

    def __init__(self):
        self.heard = []

    def open(self) -> None:
        self.heard.append("open")

    def record(self, record: StepRecord, summary: dict) -> None:
        self.heard.append((record.step, summary["weights"] == record.weights))

    def close(self, summary: dict | None) -> None:
        self.heard.append(summary and summary["weights"])


def test_every_writer_hears_each_record_and_the_end(config):
    metrics = MetricsWriter(config, NUM_EXAMPLES, NUM_DUPLICATES, start_step=0, is_main_rank=True)
    metrics.writers = [Listening(), Listening()]
    with metrics:
        metrics.record(a_record(1))
        metrics.record(a_record(2))
    assert [writer.heard for writer in metrics.writers] == [["open", (1, True), (2, True), a_record(2).weights]] * 2


def test_writers_are_closed_without_a_summary_when_the_run_or_another_writer_fails(config):
    class Failing(Listening):
        def open(self) -> None:
            raise OSError("no such service")

    metrics = MetricsWriter(config, NUM_EXAMPLES, NUM_DUPLICATES, start_step=0, is_main_rank=True)
    metrics.writers = [Listening()]
    with pytest.raises(RuntimeError, match="planted"), metrics:
        metrics.record(a_record(1))
        raise RuntimeError("planted")
    assert metrics.writers[0].heard == ["open", (1, True), None]
    metrics = MetricsWriter(config, NUM_EXAMPLES, NUM_DUPLICATES, start_step=1, is_main_rank=True)
    metrics.writers, config.run.resume = [Listening(), Failing()], "auto"
    (Path(config.run.output_dir) / "metrics.jsonl").write_text(json.dumps(a_record(1).to_dict()) + "\n")
    with pytest.raises(OSError, match="no such service"), metrics:
        pass
    assert metrics.writers[0].heard == ["open", None]


@pytest.mark.parametrize("seconds, text", [(4, "4s"), (187, "3:07"), (7387, "2:03:07")])
def test_duration_is_short(seconds, text):
    assert duration(seconds) == text
