"""The planner: what it says of a layout is what the parts say, and what it finds fits and keeps the rules."""

import json
import math
import subprocess
import sys
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace

import pytest

from megatron_scalebio import cli, dry_run
from megatron_scalebio.config import Config, SourceConfig, UserError
from megatron_scalebio.data import Dataset
from megatron_scalebio.plan import report
from megatron_scalebio.plan.planner import Plan, num_microbatches, stage_memory
from megatron_scalebio.plan.report import settings_of
from megatron_scalebio.plan.search import ROOM, search_layouts
from megatron_scalebio.plan.seconds import H100, H200, StageLoad, flush_seconds, stage_loads
from megatron_scalebio.plan.sizes import rank_bytes
from megatron_scalebio.rules import check_config
from megatron_scalebio.run import Run, open_config

REPOSITORY = Path(__file__).parents[2]
QWEN_32B = REPOSITORY / "examples" / "models" / "qwen25_32b"
VOCAB_SIZE = 152_064
H100_BYTES, H200_BYTES = H100.memory, H200.memory
FEW_PERIODS = "bilevel.steps=40"  # a search looks at every period of every layout


def qwen_32b(*overrides: str) -> Config:
    return open_config(None, [f"model.hf_path={QWEN_32B}", "bilevel.steps=234", *overrides])


def plan_of(world_size: int, *overrides: str, memory: int = H100_BYTES) -> Plan:
    return Plan.of(qwen_32b(*overrides), world_size, memory, H100)


@pytest.mark.parametrize("num_stages", [1, 2, 3, 8])
@pytest.mark.parametrize("num_microbatches", [1, 2, 5, 12])
def test_equal_stages_take_the_time_of_the_published_formula(num_stages, num_microbatches):
    """(m + P - 1) (f + b): arXiv 2104.04473, section 2.2."""
    seconds = flush_seconds([1.0] * num_stages, [2.5] * num_stages, 0.0, num_microbatches)
    assert seconds == pytest.approx((num_microbatches + num_stages - 1) * 3.5)


def test_one_flush_for_three_passes_saves_two_fillings():
    forward, backward = [1.0] * 4, [2.0] * 4
    assert flush_seconds(forward, backward, 0.0, 24) == pytest.approx(
        3 * flush_seconds(forward, backward, 0.0, 8) - 2 * 3 * 3.0
    )


def test_uneven_stages_wait_for_the_slowest_and_every_hop_delays():
    forward, backward = [1.0, 1.0, 4.0, 1.0], [2.0, 2.0, 6.0, 2.0]
    few, many = (flush_seconds(forward, backward, 0.0, number) for number in (50, 51))
    assert many - few == pytest.approx(10.0)  # the slowest stage's forward and backward
    alone = sum(forward) + sum(backward)
    assert flush_seconds(forward, backward, 0.0, 1) == pytest.approx(alone)
    assert flush_seconds(forward, backward, 0.5, 1) == pytest.approx(alone + 6 * 0.5)


def test_loads_are_the_means_over_the_draws():
    config = qwen_32b("parallel.pipeline=2", "lisa.always_active=[final_norm]")
    draws = [[[3, 40], [3, 40]], [[35, 50], [35, 50]]]
    assert stage_loads(config, draws) == [StageLoad(32, 29 / 2, 1 / 2), StageLoad(32, (32 + 29) / 2, 3 / 2)]


def test_a_plan_in_json_keeps_the_contract(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    arguments = ["plan", f"model.hf_path={QWEN_32B}", "parallel.tensor=2", "parallel.pipeline=4", "--gpus", "16"]
    arguments.append(FEW_PERIODS)
    assert cli.main([*arguments, "--gpu-memory", "79.1", "--json", "plan.json", "data.micro_batch_size=2"]) == 0
    plan = json.loads((tmp_path / "plan.json").read_text())
    assert plan["fits"] is True and plan["gpu_memory_bytes"] == H100_BYTES
    assert plan["layout"]["tensor"] == 2 and plan["layout"]["pipeline"] == 4 and plan["layout"]["data"] == 2
    assert [(rank["rank"], rank["stage"]) for rank in plan["ranks"]] == [(rank, rank // 4) for rank in range(16)]
    for rank in plan["ranks"]:
        on_device = {part: size for part, size in rank["parts"].items() if part != "host masters"}
        assert rank["total_bytes"] == sum(on_device.values()) <= H100_BYTES
        assert all(isinstance(size, int) for size in rank["parts"].values())
    assert plan["step"]["flops"] > plan["step"]["model_flops"] > 1e15
    assert 0 < plan["step"]["bubble"] < plan["step"]["bubble_of_separate_flushes"] < 1
    assert plan["step"]["predicted_seconds"] == pytest.approx(sum(plan["step"]["seconds_by_part"].values()))
    printed = capsys.readouterr().out
    assert "nothing of it is measured" in printed and "assumed shares" in printed
    assert printed.count("fits: the fullest, rank 0 (stage 0)") == 1


def test_one_gpu_without_fp8_does_not_fit_and_the_breaking_part_is_named(capsys):
    arguments = ["plan", f"model.hf_path={QWEN_32B}", "--gpus", "1", "--gpu-memory", "80"]
    assert cli.main(arguments) == 1
    printed = capsys.readouterr().out
    assert "does not fit: rank 0 (stage 0) needs " in printed
    assert "GiB of 80.0; largest part: frozen weights, " in printed
    assert "no layout fits" in printed


def test_a_layout_for_another_number_of_gpus_is_told_and_others_are_searched(tmp_path, capsys):
    file = tmp_path / "plan.json"
    arguments = ["plan", f"model.hf_path={QWEN_32B}", "parallel.tensor=2", "parallel.pipeline=4", "--gpus", "12"]
    arguments.append(FEW_PERIODS)
    assert cli.main([*arguments, "--json", str(file)]) == 1
    assert "own layout does not run on 12 GPUs: parallel.tensor=2 times parallel.pipeline=4" in capsys.readouterr().out
    plan = json.loads(file.read_text())
    assert plan["fits"] is False and plan["ranks"] == [] and plan["best"]


@pytest.mark.parametrize(
    "arguments",
    [
        *(["--gpus", "0"], ["parallel.tensor=3"], ["x=1"]),
        *(["--gpu-memory", memory] for memory in ("-1", "0", "nan", "inf")),
    ],
)
def test_mistakes_are_refused(arguments, capsys):
    assert cli.main(["plan", f"model.hf_path={QWEN_32B}", *arguments]) == 2
    assert capsys.readouterr().err.startswith("error: ")


@pytest.mark.parametrize("gib", [-1.0, 0.0, math.nan, math.inf])
def test_a_dry_run_refuses_memory_that_no_gpu_has(gib):
    with pytest.raises(UserError, match="--gpu-memory .* positive and finite"):
        dry_run.dry_run(Run(qwen_32b(), None), 1, gib)


@pytest.mark.parametrize("gib, status, verdict", [("1", 0, "\nfits: "), ("0.5", 1, "\ndoes not fit: rank 0 (stage 0)")])
def test_a_dry_runs_verdict_is_its_exit_status(tmp_path, monkeypatch, capsys, gib, status, verdict):
    monkeypatch.chdir(tmp_path)
    Path("a.jsonl").write_text('{"prompt": "1", "response": "2"}\n' * 8)
    settings = ["data.sources=[{name: a, path: a.jsonl}]", "data.validation=a.jsonl", "bilevel.global_batch_size=4"]
    settings += ["model.shape.num_layers=2", "model.shape.hidden_size=64", "lisa.num_active_layers=1"]
    assert cli.main(["train", "--dry-run", "--gpu-memory", gib, *settings]) == status
    assert verdict in capsys.readouterr().out


@pytest.mark.parametrize("compute, told", [("bf16", False), ("fp8", True)])
def test_fp8_that_is_planned_as_bf16_is_told(compute, told):
    plan = plan_of(8, "parallel.pipeline=8", "bilevel.steps=20", f"precision.compute={compute}")
    dataset = Dataset(SimpleNamespace(), [])
    for lines in (report.plan_lines(plan), dry_run._lines(plan, dataset)):
        assert ("precision.compute=fp8 is planned as bf16" in "\n".join(lines)) == told


def test_masters_on_the_host_are_those_of_the_period_that_has_most():
    """The device of this stage is fullest in a period where fewer layers have trained: the host goes on to fill."""
    config = qwen_32b("parallel.pipeline=8", "precision.frozen_weights=fp8", "bilevel.steps=20")
    draws = [[[0], [0]], [[1, 2], [1, 2]], [[3], [3]]]
    first, second, third = (
        rank_bytes(config, 1, 0, draw, [{layer for past in draws[: period + 1] for layer in past[0]}] * 2)
        for period, draw in enumerate(draws)
    )
    found = stage_memory(config, 1, 0, draws)
    assert found.period == 1
    assert found.parts["active weights"] == second["active weights"] > third["active weights"]
    assert found.parts["host masters"] == third["host masters"] > second["host masters"] > first["host masters"]
    plan = Plan.of(config, 8, H100_BYTES, H100, draws)
    assert dry_run.rehearsed(plan, 0).parts["host masters"] == third["host masters"]


def test_planning_starts_no_process_group_and_reads_no_data(tmp_path):
    """As a user types it, on a configuration whose data do not exist."""
    command = [sys.executable, str(REPOSITORY / "tools" / "plan_memory.py"), "--config"]
    command += [str(REPOSITORY / "examples" / "qwen25_32b_8xh100.yaml"), "--gpus", "8", FEW_PERIODS]
    result = subprocess.run(
        command, cwd=tmp_path, env={"MODEL": str(QWEN_32B), "DATA_DIR": "absent"}, capture_output=True, text=True
    )
    assert result.returncode in (0, 1) and not result.stderr
    assert "their settings, to copy:" in result.stdout and not list(tmp_path.iterdir())


@pytest.mark.parametrize("overrides", [[], ["data.max_length=4096"], ["lisa.always_active=[final_norm]"]], ids=str)
def test_layouts_found_fit_keep_the_rules_and_are_sorted(overrides):
    config = qwen_32b(FEW_PERIODS, *overrides)
    plans = search_layouts(config, 8, H100_BYTES, H100)
    assert len(plans) > 3
    for plan in plans:
        chosen = qwen_32b(FEW_PERIODS, *overrides, *(setting.strip("'") for setting in settings_of(plan.config)))
        check_config(chosen, 8, VOCAB_SIZE)
        again = Plan.of(chosen, 8, H100_BYTES, H100)
        assert again.fits and again.fullest.total <= ROOM * H100_BYTES
        assert again.time.seconds == pytest.approx(plan.time.seconds)
        assert sum(plan.data_parallel * number for number in plan.num_microbatches) > 0
    assert all(first.time.seconds < 1.011 * second.time.seconds for first, second in pairwise(plans))


def test_the_search_finds_what_a_look_at_every_layout_finds():
    """A model of 6 layers on 2 GPUs, small enough to try all splits of the layers."""
    shape = ("model.shape.num_layers=6", "model.shape.hidden_size=1024", "model.shape.vocab_size=50000")
    config = open_config(None, [*shape, "data.max_length=512"])
    config = replace(config, data=replace(config.data, sources=[SourceConfig("any", "any")], validation="any"))
    best = search_layouts(config, 2, H100_BYTES, H100)
    pipelined = next(plan for plan in best if plan.config.parallel.pipeline == 2)
    every = [
        Plan.of(
            replace(pipelined.config, parallel=replace(pipelined.config.parallel, layers_per_stage=[first, 6 - first])),
            *(2, H100_BYTES, H100),
        )
        for first in range(1, 6)
    ]
    assert pipelined.time.seconds == min(plan.time.seconds for plan in every)


def test_tighter_memory_finds_layouts_that_keep_less():
    config = qwen_32b(FEW_PERIODS)
    roomy, tight = (search_layouts(config, 8, memory, H100)[0] for memory in (H100_BYTES, H100_BYTES // 2))
    assert tight.fullest.total <= ROOM * H100_BYTES // 2 < roomy.fullest.total
    assert tight.time.seconds > roomy.time.seconds


def test_more_of_a_thing_takes_more_of_its_part():
    base = plan_of(8, "parallel.tensor=2", "parallel.pipeline=4")

    def parts(*overrides: str) -> dict[str, int]:
        return plan_of(8, "parallel.tensor=2", "parallel.pipeline=4", *overrides).stages[0].parts

    assert parts("data.micro_batch_size=2")["activations"] > 1.9 * base.stages[0].parts["activations"]
    kept = [parts(f"parallel.recompute={kind}")["activations"] for kind in ("none", "selective", "full")]
    assert kept == sorted(kept, reverse=True)
    assert parts("lisa.num_active_layers=8")["gradients"] > base.stages[0].parts["gradients"]
    in_flight = [stage.parts["activations"] for stage in base.stages]
    assert in_flight == sorted(in_flight, reverse=True)  # 1F1B: 4, 3, 2, 1 micro-batches
    assert plan_of(16, "parallel.tensor=2", "parallel.pipeline=4").stages[0].parts["moments"] == pytest.approx(
        base.stages[0].parts["moments"] / 2, rel=1e-4
    )


def test_micro_batches_are_those_of_full_rows():
    config = qwen_32b("bilevel.global_batch_size=10", "bilevel.validation_batch_size=3", "data.micro_batch_size=2")
    assert num_microbatches(config, 2) == [3, 3, 1]
    assert num_microbatches(qwen_32b("bilevel.mode=fixed", "bilevel.global_batch_size=9"), 1) == [9]


def test_the_memory_of_a_step_does_not_depend_on_how_many_periods_follow():
    few, many = (plan_of(8, "parallel.pipeline=8", f"bilevel.steps={steps}") for steps in (2_000, 20_000))
    assert [stage.total for stage in few.stages] == [stage.total for stage in many.stages]
    assert math.isfinite(many.time.seconds)
