"""The throughput tool on the CPU: what it counts, splits, prints, writes and compares."""

import json
import random
import re
import subprocess
import sys
import time
from argparse import Namespace
from collections import Counter
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import torch
from torch.nn import Parameter

from megatron_scalebio import spans
from megatron_scalebio.active_layers import Role
from megatron_scalebio.anatomy import FAMILIES
from megatron_scalebio.config import UserError
from megatron_scalebio.kernels import head_loss
from megatron_scalebio.mcore import active_set, models
from megatron_scalebio.mcore.layers import GatedMLP
from megatron_scalebio.mcore.parameters import NamedParameter
from megatron_scalebio.plan.flops import Work, step_flops
from megatron_scalebio.plan.seconds import H100
from megatron_scalebio.plan.sizes import model_parameters
from megatron_scalebio.plan.utilization import PEAKS
from megatron_scalebio.run import Run
from megatron_scalebio.spans import Span
from tests.configs import resolved
from tests.distributed import run_distributed
from tests.show.records import a_record
from tools import benchmark_throughput
from tools.benchmarks import throughput, throughput_run
from tools.benchmarks.throughput_compare import compare, comparison_lines
from tools.benchmarks.throughput_report import log_line, peak_of, results_of
from tools.benchmarks.throughput_run import Content, Step
from tools.benchmarks.throughput_split import PARTS, seconds_by_part

REPOSITORY = Path(__file__).parents[2]
MODEL = REPOSITORY / "examples" / "models" / "qwen2_7b"
CPU = torch.device("cpu")
TINY = (
    *("model.shape.num_layers=4", "model.shape.hidden_size=32", "model.shape.ffn_hidden_size=48"),
    *("model.shape.num_attention_heads=4", "model.shape.num_query_groups=2"),
    *("data.max_length=32", "bilevel.global_batch_size=8", "bilevel.validation_batch_size=4"),
    *("lisa.num_active_layers=2", "lisa.period=2", "precision.compute=fp32", "run.device=cpu"),
)


def run(folder: Path, *arguments: str) -> dict:
    """On every rank."""
    file = ("--out", str(folder / "run.json"))
    return throughput.benchmark(benchmark_throughput.parse(["--synthetic", *file, *arguments, *TINY]))


def run_on(world_size: int, folder: Path, *arguments: str) -> dict:
    """The file that the tool wrote."""
    run_distributed(world_size, run, folder, *arguments)
    return json.loads((folder / "run.json").read_text())


@pytest.fixture(scope="module")
def one_rank(tmp_path_factory):
    return run_on(1, tmp_path_factory.mktemp("one"), "--steps", "4")


@pytest.fixture(scope="module")
def two_stages(tmp_path_factory):
    return run_on(2, tmp_path_factory.mktemp("two"), "parallel.pipeline=2")


@pytest.mark.parametrize("pipeline", [False, True])
def test_a_run_says_all_that_it_measured(one_rank, two_stages, pipeline):
    content = two_stages if pipeline else one_rank
    size, results = (2 if pipeline else 1), content["results"]
    assert content["environment"]["world_size"] == size and content["environment"]["commit"]
    assert {"python", "torch", "megatron-core", "triton"} <= content["environment"]["versions"].keys()
    assert content["config"]["model"]["shape"]["hidden_size"] == 32
    assert content["run"] | {"weights": "random", "data": "synthetic", "steps": 4, "redraws": 2} == content["run"]
    times, seconds = results["step_seconds"], sorted(step["seconds"] for step in content["steps"])
    assert len(seconds) == 4 and sum(step["redrew"] for step in content["steps"]) == 2
    assert seconds[0] <= times["p10"] <= times["median"] <= times["p90"] <= seconds[-1]
    assert times["mean"] == pytest.approx(sum(seconds) / 4)
    per_second, per_step = results["tokens_per_second_per_gpu"], results["tokens_per_step"]
    for kind, number in per_step.items():
        assert per_second[kind] == pytest.approx(number / times["mean"] / size)
    assert 0 < per_step["train_real"] < per_step["train_padded"]
    assert 4 * per_step["train_padded"] % 32 == 0  # whole rows
    assert 0 < per_step["validation_real"] < per_step["train_real"]
    flops = results["flops_per_step"]
    assert 0 < flops["model"] < flops["executed"]
    for kind, number in flops.items():
        assert results["tflops_per_gpu"][kind] == pytest.approx(number / times["mean"] / size / 1e12)
    assert results["utilization"]["mfu"] is None and "--peak-tflops" in results["utilization"]["reason"]
    assert [rank["rank"] for rank in results["memory"]] == list(range(size))
    for rank in results["memory"]:
        assert rank["resident_bytes"] >= rank["resident_before_bytes"] > 0 and rank["planned_tensor_bytes"] > 0
    assert "comparison" not in content and "error" not in content


def test_the_parts_of_the_split_are_there_and_are_the_step(one_rank, two_stages):
    for content in (one_rank, two_stages):
        split = content["results"]["split"]
        assert split["steps"] == 2 and split["redraws"] == 1  # one period
        assert split["seconds_per_redraw"] > 0
        for rank in split["ranks"]:
            assert set(rank["seconds"]) == set(PARTS)
            assert sum(rank["seconds"].values()) == pytest.approx(rank["step_seconds"])
            assert min(rank["seconds"].values()) >= 0  # no moment counts twice: the rest would be negative
            for part in ("lower", "upper", "optimizer", "redraw", "communication", "waiting"):
                assert rank["seconds"][part] > 0
    first, last = (rank["seconds"] for rank in two_stages["results"]["split"]["ranks"])
    assert first["loss"] == 0 < last["loss"]


def test_one_flush_against_three_is_measured_and_planned(one_rank, two_stages):
    assert one_rank["results"]["flush"] is None
    flush = two_stages["results"]["flush"]
    train, again, validation = flush["num_microbatches"]
    assert train == again > validation
    stages = 2
    even = (2 * train + validation + stages - 1) / (2 * (train + 1) + validation + 1)
    assert flush["even_stages_ratio"] == pytest.approx(even)
    assert even - 1e-9 <= flush["planned_ratio"] < 1  # uneven stages save less
    assert flush["measured_ratio_least"] <= flush["measured_ratio"] <= flush["measured_ratio_greatest"]


def test_the_measured_ratio_is_one_flush_over_three(monkeypatch):
    config = resolved(*TINY, "parallel.pipeline=2")

    @contextmanager
    def pretend(trainer, seconds):
        trainer.take_step = lambda: seconds.append(1.0 if config.parallel.fused_pipeline else 4.0)
        yield

    monkeypatch.setattr(throughput_run, "_timing_flushes", pretend)
    groups = Namespace(num_stages=2, data=Namespace(size=lambda: 1))
    trainer = Namespace(config=config, groups=groups, models=None)
    draws = [[[0, 2], [0, 2]]]
    flush = throughput_run.one_flush_against_three(trainer, made_step(1.0), H100, draws)
    assert flush["measured_ratio"] == flush["measured_ratio_least"] == flush["measured_ratio_greatest"] == 0.25


def mark(name: str, start: float, end: float, category: str = "user_annotation", correlation: int = 0) -> dict:
    """An event of a Chrome trace; times in seconds."""
    times = {"ts": 1e6 * start, "dur": 1e6 * (end - start)}
    return {"ph": "X", "cat": category, "name": name, **times, "args": {"correlation": correlation}}


def in_any_order(events: list[dict]) -> list[dict]:
    random.Random(0).shuffle(events)
    return events


def test_each_moment_counts_once_towards_the_innermost_span():
    spans = [
        *(
            mark("step", 0, 20),
            mark("lower forward", 1, 6),
            mark("loss", 2, 5),
            mark("c10d::allreduce_", 3, 4, "cpu_op"),
        ),
        *(mark("waiting", 7, 10), mark("gloo:all_reduce", 8, 9), mark("lower backward", 11, 12), mark("flush", 13, 14)),
        *(mark("upper backward", 12, 13), mark("optimizer", 15, 15), mark("sending", 16, 17), mark("redraw", 18, 19)),
        *(mark("of others", 4, 5), mark("aten::mm", 25, 30, "cpu_op"), {"ph": "i", "name": "step", "ts": 0}),
    ]
    assert seconds_by_part(in_any_order(spans)) == {
        **{"lower": 3.0, "upper": 1.0, "loss": 2.0, "communication": 2.0, "waiting": 3.0, "redraw": 1.0},
        "other": 8.0,
    }


def test_a_collective_beside_other_work_is_that_works_time():
    spans = [
        *(mark("step", 0, 10), mark("upper backward", 1, 9), mark("XBackward", 1, 8, "cpu_op")),
        *(mark("gloo:all_reduce", 2, 6), mark("aten::mm", 3, 5, "cpu_op")),
    ]
    assert seconds_by_part(in_any_order(spans)) == {"other": 2.0, "upper": 6.0, "communication": 2.0}


def test_on_a_device_a_kernel_counts_where_it_was_launched_with_the_idle_time_before_it():
    """Made up after what torch's profiler writes on CUDA; two streams, the second a collective's."""
    spans = [
        *(mark("step", 0, 20), mark("upper forward", 1, 2), mark("upper backward", 2, 4), mark("optimizer", 4, 5)),
        mark("c10d::allreduce_", 2.5, 3, "cpu_op"),
    ]
    launches = [mark("cudaLaunchKernel", 1 + k, 1.1 + k, "cuda_runtime", correlation=k) for k in range(4)]
    launches[1:2] = [mark("cuLaunchKernelEx", 2.6, 2.7, "cuda_driver", correlation=1)]
    launches[2:3] = [mark("cudaMemcpyAsync", 3.5, 3.6, "cuda_runtime", correlation=2)]
    on_device = [
        *(mark("gemm", 3, 6, "kernel", 0), mark("ncclDevKernel", 6, 9, "kernel", 1)),
        *(mark("Memcpy", 7, 11, "gpu_memcpy", 2), mark("adamw", 12, 14, "kernel", 3)),
    ]
    assert seconds_by_part(in_any_order([*spans, *launches, *on_device])) == {
        "upper": 6.0 + 2.0,  # the first kernel and what the device waited for it; the copy after the collective
        "communication": 3.0,
        "optimizer": 3.0,
    }


def split_with_a_planted_delay(place: str) -> Counter:
    """On a rank: a step's parts where a function of one of them sleeps."""
    config = throughput_run.read_config(None, [*TINY, "parallel.pipeline=2"], synthetic=True)
    trainer = throughput_run.Trainer(Run(config, throughput_run.make_dataset(config, synthetic=True)))
    owner, name = {
        "redraw": (trainer.models.chunk, "redraw"),
        "optimizer": (active_set, "adamw_update"),
        "loss": (head_loss, "cross_entropy"),
        "upper": (GatedMLP, "forward"),
        "waiting": (models, "read_back"),
        "other": (trainer.sampler, "step"),
    }[place]
    original = getattr(owner, name)

    def delayed(*args, **keywords):
        time.sleep(DELAY)
        return original(*args, **keywords)

    with mock.patch.object(owner, name, delayed):
        return throughput_run.traced_step(trainer)[1]


DELAY = 0.05


@pytest.mark.parametrize("place", ["redraw", "optimizer", "loss", "upper", "waiting", "other"])
def test_a_planted_delay_shows_in_its_part(place):
    first, last = run_distributed(2, split_with_a_planted_delay, place)
    assert last[place] >= DELAY and (place == "loss" or first[place] >= DELAY)


def test_every_span_of_a_step_is_in_a_trace_and_nested_as_the_work_is():
    ((parents, seconds, parts),) = run_distributed(1, parents_of_spans)
    assert sum(parts.values()) == pytest.approx(seconds)
    passes = {f"{role} {way}" for role in ("lower", "upper") for way in ("forward", "backward")}
    assert parents == {
        "step": {None},
        **dict.fromkeys(("batch", "redraw", "flush", "waiting", "optimizer"), {"step"}),
        **dict.fromkeys(passes, {"flush"}),
        "loss": passes,
    }


def parents_of_spans() -> tuple[dict[str, set[str | None]], float, Counter]:
    """On a rank: what each kind of span lies in, the seconds of the step's span, and its parts."""
    config = throughput_run.read_config(None, list(TINY), synthetic=True)
    trainer = throughput_run.Trainer(Run(config, throughput_run.make_dataset(config, synthetic=True)))
    with mock.patch.object(throughput_run, "seconds_by_part", lambda events: events):
        _, events = throughput_run.traced_step(trainer)
    marked = [event for event in events if event.get("cat") == "user_annotation" and event["name"] in Span]
    parents: dict[str, set[str | None]] = {}
    for own in marked:
        around = [each for each in marked if holds(each, own)]
        parent = min(around, key=lambda each: each["dur"])["name"] if around else None
        parents.setdefault(own["name"], set()).add(parent)
    (seconds,) = (event["dur"] / 1e6 for event in marked if event["name"] == "step")
    return parents, seconds, seconds_by_part(events)


def holds(outer: dict, inner: dict) -> bool:
    return (
        outer is not inner and outer["ts"] <= inner["ts"] and inner["ts"] + inner["dur"] <= outer["ts"] + outer["dur"]
    )


def test_without_a_profiler_nothing_is_recorded_and_the_schedule_has_no_timers():
    assert run_distributed(1, timers_after_a_step) == [[True, False]]


def timers_after_a_step() -> list[bool]:
    """On a rank: whether the schedule had none, after a step without a profiler and one with."""
    config = throughput_run.read_config(None, list(TINY), synthetic=True)
    trainer = throughput_run.Trainer(Run(config, throughput_run.make_dataset(config, synthetic=True)))
    found = []
    with mock.patch.object(spans, "record_function", side_effect=AssertionError):
        throughput_run.timed_step(trainer)
        found.append(trainer.models.chunk.config.timers is None)
    throughput_run.traced_step(trainer)
    return [*found, trainer.models.chunk.config.timers is None]


def steps_on_a_rank(settings: tuple[str, ...]) -> tuple[list[Step], list[list[list[int]]], list[tuple[int, int]]]:
    """Steps as the tool takes them, their draws, and the trainer's own count of (tokens, loss tokens)."""
    config = throughput_run.read_config(None, [*TINY, *settings], synthetic=True)
    trainer = throughput_run.Trainer(Run(config, throughput_run.make_dataset(config, synthetic=True)))
    steps, draws = [], []
    for _ in range(3):
        steps.append(throughput_run.timed_step(trainer))
        draws.append([trainer.active_layers[role] for role in Role])
    counts = [(step.record.num_tokens, step.record.num_loss_tokens) for step in steps]
    return steps, draws, counts


@pytest.mark.parametrize("layout", [(), ("parallel.tensor=2",), ("parallel.pipeline=2",)], ids=str)
def test_the_flops_are_those_of_the_whole_batch_under_every_layout(layout):
    """Two data-parallel ranks (no layout) share what two ranks of one replica compute together."""
    settings = ("data.packing=false", *layout)
    config = resolved(*TINY, *settings)
    for steps, draws, counts in run_distributed(2, steps_on_a_rank, settings):
        for step, draw, (num_tokens, num_loss_tokens) in zip(steps, draws, counts, strict=True):
            assert step.train.real + step.validation.real == num_tokens
            assert step.train.work.loss_tokens + step.validation.work.loss_tokens == num_loss_tokens
            assert (step.train.work.positions, step.validation.work.positions) == (8 * 32, 4 * 32)
            assert step.flops == step_flops(config, draw, step.train.work, step.validation.work)
            assert step.positions == 2 * 8 * 32 + 4 * 32
            assert step.record.tflops_per_gpu * step.record.step_seconds * 2e12 == pytest.approx(step.flops.executed)
        assert [step.redrew for step in steps] == [True, False, True]


@pytest.mark.parametrize(
    "device, hf_path, made", [("cuda", None, True), ("cuda", "folder", False), ("cpu", None, False)]
)
def test_random_weights_are_made_on_a_gpu_alone(device, hf_path, made):
    config = resolved(*TINY)
    config.model.hf_path = hf_path
    assert (throughput_run.initial_weights(config, torch.device(device)) is not None) == made


def test_random_weights_are_a_function_of_the_name():
    def made(name: str, shape: tuple[int, ...], **attributes) -> torch.Tensor:
        tensor = Parameter(torch.empty(shape, dtype=torch.bfloat16, device="meta"))
        vars(tensor).update(attributes)
        parameter = NamedParameter(name, *FAMILIES["qwen2"].find(name), tensor, shape, False)
        return throughput_run.random_weights(CPU, parameter)

    matrix = made("decoder.layers.1.mlp.linear_fc1.weight", (301, 99))
    assert matrix.dtype == torch.bfloat16 and matrix.float().std().item() == pytest.approx(0.02, rel=0.02)
    assert torch.equal(matrix, made("decoder.layers.1.mlp.linear_fc1.weight", (301, 99)))
    assert not torch.equal(matrix, made("decoder.layers.2.mlp.linear_fc1.weight", (301, 99)))
    assert made("decoder.final_layernorm.weight", (5,)).tolist() == [1] * 5
    assert made("decoder.final_layernorm.weight", (5,), neutral=0.0).tolist() == [0] * 5
    assert made("decoder.layers.1.self_attention.linear_qkv.bias", (5,)).tolist() == [0] * 5


def test_the_tool_begins_at_the_weights_it_makes(tmp_path):
    names = run_distributed(1, run_from_made_weights, tmp_path)[0]
    assert len(names) == len(set(names)) and {"embedding.word_embeddings.weight", "output_layer.weight"} < set(names)


def run_from_made_weights(folder: Path) -> list[str]:
    """On a rank: the parameters that were made."""
    make = mock.Mock(side_effect=partial(throughput_run.random_weights, CPU))
    with mock.patch.object(throughput, "initial_weights", return_value=make):
        run(folder, "--steps", "1")
    return [call.args[0].name for call in make.call_args_list]


def made_step(seconds: float) -> Step:
    work = Work(1000, 500, 8000, 8000)
    losses = {"a": 2.0, "b": None, "c": 4.0}
    record = a_record(5, lr=2e-6, grad_norm_upper=1.25, train_loss_upper=losses, step_seconds=seconds)
    flops = throughput_run.Flops(3e12, 2e12, 1e12, 4e12)
    return Step(seconds, Content(work, 800, 1), Content(work, 600, 1), flops, False, record)


def test_rates_are_totals_over_total_time():
    config = throughput_run.read_config(None, list(TINY), synthetic=True)
    peak = peak_of(CPU, "any", given=2.0)
    results = results_of([made_step(1.0), made_step(1.0), made_step(4.0)], config, 2, peak)
    assert results["tokens_per_second_per_gpu"]["train_real"] == 3 * 800 / 6.0 / 2
    assert results["tokens_per_second_per_gpu"]["validation_padded"] == 3 * 1000 / 6.0 / 2
    assert results["tflops_per_gpu"]["executed"] == pytest.approx(3 * 10 / 6.0 / 2)
    assert results["tflops_per_gpu"]["model"] == pytest.approx(3 * 6 / 6.0 / 2)
    assert results["utilization"]["mfu"]["given"] == pytest.approx(0.75)
    assert results["utilization"]["hfu"]["given"] == pytest.approx(1.25)
    positions = 3 * (2 * 1000 + 1000)  # lower and upper on the training positions, upper on the validation ones
    six_n = 6 * model_parameters(config.model) * positions
    assert results["tflops_per_gpu"]["six_n_equivalent"] == pytest.approx(six_n / 6.0 / 2 / 1e12)


def test_a_peak_is_named_or_its_absence_explained():
    cuda = torch.device("cuda")
    assert peak_of(cuda, "NVIDIA H100 80GB HBM3", None).tflops == {"bf16": 989, "fp8": 1979}
    assert peak_of(cuda, "NVIDIA H200", 500.0).tflops == {"given": 500.0}
    for device, name in ((cuda, "NVIDIA Unknown"), (CPU, "CPU")):
        peak = peak_of(device, name, None)
        assert peak.tflops == {} and "--peak-tflops" in peak.reason
    assert all(
        peak.get("fp8", 2 * peak["bf16"]) == pytest.approx(2 * peak["bf16"], rel=2e-3) for peak in PEAKS.values()
    )


# As written in Megatron-LM's training_log: every field of its format strings, in its order.
MEGATRON_LINE = re.compile(
    r" \[\d{4}-\d\d-\d\d \d\d:\d\d:\d\d\.\d{6}\] iteration (?P<iteration>[ \d]{8})/(?P<last>[ \d]{8}) \|"
    r" consumed samples: (?P<samples>[ \d]{12}) \| elapsed time per iteration \(ms\): (?P<ms>\d+\.\d) \|"
    r" throughput per GPU \(TFLOP/s/GPU\): (?P<tflops>\d+\.\d) \| learning rate: (?P<lr>\d\.\d{6}E[+-]\d\d) \|"
    r" global batch size: (?P<batch>[ \d]{5}) \| lm loss: (?P<loss>\d\.\d{6}E[+-]\d\d) \|"
    r" loss scale: (?P<scale>\d+\.\d) \| grad norm: (?P<norm>\d+\.\d{3}) \|"
    r" number of skipped iterations: (?P<skipped>[ \d]{3}) \| number of nan iterations: (?P<nan>[ \d]{3}) \|"
)


def test_the_log_line_is_megatrons():
    found = MEGATRON_LINE.fullmatch(log_line(made_step(1.5), num_steps=10, batch_size=128, world_size=2))
    fields = {name: float(text) for name, text in found.groupdict().items()}
    assert fields == {
        **{"iteration": 5, "last": 10, "samples": 640, "ms": 1500.0, "tflops": 2.0, "lr": 2e-6, "batch": 128},
        **{"loss": 3.0, "scale": 1.0, "norm": 1.25, "skipped": 0, "nan": 0},
    }


def test_a_comparison_has_every_ratio_and_names_what_differs(one_rank):
    other = json.loads(json.dumps(one_rank))
    assert compare(one_rank, other)["differs"] == []
    assert set(compare(one_rank, other)["ratios"].values()) == {1.0}
    other["results"]["step_seconds"]["median"] *= 4
    other["environment"]["device"], other["environment"]["versions"]["torch"] = "another", "9.9"
    other["environment"]["world_size"], other["config"]["lisa"]["period"] = 8, 77
    comparison = compare(one_rank, other)
    assert comparison["ratios"]["step_seconds.median"] == 0.25
    assert comparison["ratios"]["memory.0.planned_tensor_bytes"] == 1.0
    assert comparison["ratios"]["split.ranks.0.seconds.lower"] == 1.0
    assert [line.split(":")[0] for line in comparison["differs"]] == [
        *("device", "world_size", "versions.torch", "lisa.period"),
    ]
    printed = "\n".join(comparison_lines(comparison, "OTHER.json"))
    assert "WARNING" in printed and "lisa.period: 2 here, 77 there" in printed
    assert "WARNING" not in "\n".join(comparison_lines(compare(one_rank, one_rank), "OTHER.json"))


def test_mode_fixed_has_one_model_and_no_validation(tmp_path):
    content = run_on(1, tmp_path, "--steps", "2", "bilevel.mode=fixed")
    results = content["results"]
    assert results["tokens_per_step"]["validation_padded"] == 0
    assert results["split"]["ranks"][0]["seconds"]["lower"] == 0 < results["split"]["ranks"][0]["seconds"]["upper"]


def test_a_folder_with_only_a_config_json_gives_its_shape_and_settings_may_change_it():
    given = [f"model.hf_path={MODEL}", "model.shape.num_layers=3"]
    config = throughput_run.read_config(None, given, synthetic=True)
    assert config.model.hf_path is None
    assert (config.model.shape.num_layers, config.model.shape.hidden_size) == (3, 3584)
    dataset = throughput_run.make_dataset(config, synthetic=True)
    tokens = np.concatenate([each.tokens for each in dataset.train[0]])
    assert 100_000 < tokens.max() < config.model.shape.vocab_size
    lengths = [len(each.tokens) for each in dataset.validation]
    assert min(lengths) >= 128 and max(lengths) <= 384


def as_user(*arguments: str) -> subprocess.CompletedProcess:
    command = [sys.executable, str(REPOSITORY / "tools" / "benchmark_throughput.py"), *arguments]
    return subprocess.run(command, capture_output=True, text=True, cwd="/")


def test_a_user_compares_two_runs(tmp_path, one_rank):
    (tmp_path / "other.json").write_text(json.dumps(one_rank))
    result = as_user("--synthetic", "--compare", str(tmp_path / "other.json"), "--steps", "1", *TINY)
    assert result.returncode == 0 and "UserWarning" not in result.stderr
    lines = result.stdout.splitlines()
    assert [bool(MEGATRON_LINE.fullmatch(line)) for line in lines].count(True) == 1
    assert "WARNING: --steps 1 is less than two periods of lisa.period=2 (4 steps)" in result.stdout
    assert any(line.split()[0] == "step_seconds.median" for line in lines if line.strip())
    assert "  run.steps: 1 here, 4 there" in lines


@pytest.mark.parametrize(
    "arguments, message",
    [
        (("--steps", "0", "--synthetic"), "--steps 0: must be at least 1"),
        (("--synthetic", "--compare", "absent.json"), "--compare absent.json"),
        (("--synthetic", "--out", "/no/such/folder/x.json"), "--out /no/such/folder/x.json: no such folder"),
        (("--synthetic", "lisa.perod=3"), "lisa.perod"),
        (("data.sources=[{name: a, path: absent.jsonl}]", "data.validation=absent.jsonl"), "--synthetic measures"),
    ],
)
def test_mistakes_are_told_in_one_message(arguments, message, capsys, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    assert benchmark_throughput.main(list(arguments)) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and message in error and "Traceback" not in error


def test_a_file_of_another_tool_is_refused(tmp_path):
    (tmp_path / "other.json").write_text("[1]")
    with pytest.raises(UserError, match="holds no results"):
        throughput._read_other(str(tmp_path / "other.json"))


def test_out_of_memory_is_a_result_too(tmp_path, monkeypatch, capsys):
    def full(*_):
        raise torch.OutOfMemoryError("tried to allocate 1 GiB")

    monkeypatch.setattr(throughput, "Trainer", full)
    file = tmp_path / "run.json"
    assert benchmark_throughput.main(["--synthetic", "--out", str(file), *TINY]) == 1
    assert "error: rank 0 is out of memory: tried to allocate 1 GiB" in capsys.readouterr().out
    content = json.loads(file.read_text())
    assert "1 GiB" in content["error"] and content["results"] is None and content["config"]
    assert benchmark_throughput.main(["--synthetic", "--compare", str(file), *TINY]) == 2
