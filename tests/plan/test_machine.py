"""The machine is checked before anything is built: what is short is named, with how much and what to change."""

import shutil
from collections import namedtuple
from pathlib import Path

import pytest

from megatron_scalebio.config import Config, UserError
from megatron_scalebio.plan import machine as module
from megatron_scalebio.plan.memory import GIB
from megatron_scalebio.plan.planner import Plan
from megatron_scalebio.plan.seconds import H100
from megatron_scalebio.plan.sizes import padded_block
from tests.configs import resolved
from tests.mcore.runs import SMALL_RUN

Usage = namedtuple("Usage", "total used free")
LARGE = (
    *("model.shape.num_layers=64", "model.shape.hidden_size=5120", "model.shape.ffn_hidden_size=27648"),
    *("model.shape.num_attention_heads=40", "model.shape.num_query_groups=8", "parallel.pipeline=8"),
    *("precision.compute=bf16", "data.max_length=1024", "bilevel.steps=234", "run.device=auto"),
    "model.shape.vocab_size=152064",
    *("lisa.num_active_layers=2", "lisa.period=20", "run.save_every=50"),
)


@pytest.fixture
def machine(monkeypatch):
    """A machine of eight H100 where nothing is short; `machine(...)` changes what it has, in GiB."""

    def change(gpu: float = 79.1, host: float = 1000, disk: float = 10_000, shared: float = 8, nccl: bool = True):
        usage = {"shm": Usage(int(shared * GIB), 0, 0)}
        free = Usage(0, 0, int(disk * GIB))
        monkeypatch.setattr(module, "find_cuda", lambda: gpu > 0)
        monkeypatch.setattr(module, "gpu_memory", lambda ranks_here: int(gpu * GIB))
        monkeypatch.setattr(module, "has_nccl", lambda: nccl)
        monkeypatch.setattr(module, "host_memory", lambda: int(host * GIB))
        monkeypatch.setattr(shutil, "disk_usage", lambda path: usage.get(Path(path).name, free))

    change()
    return change


def a_config(tmp_path: Path, *overrides: str) -> Config:
    return resolved(*SMALL_RUN, *LARGE, f"run.output_dir={tmp_path / 'a' / 'run'}", *overrides)


FP8 = ("precision.frozen_weights=fp8", "parallel.recompute=full")


def test_a_machine_that_has_all_passes(machine, tmp_path):
    module.check_machine(a_config(tmp_path, *FP8), 8, 8)


@pytest.mark.parametrize(
    "change, overrides, words",
    [
        ({"gpu": 40}, FP8, ["does not fit", "stage 7", "of 40.0", "plan"]),
        ({}, ("parallel.pipeline=1",), ["does not fit", "of 79.1", "largest part"]),
        ({"host": 20}, FP8, ["host's memory", "8 ranks", "20.0 GiB are available", "lisa.period"]),
        ({"disk": 30}, FP8, ["5 checkpoints", "30.0 are free", "run.save_every=50", "run.export=false"]),
        ({"shared": 0.0625}, FP8, ["/dev/shm has 0.06 GiB", "--shm-size"]),
        ({"nccl": False}, FP8, ["no NCCL"]),
        ({}, ("precision.compute=fp64",), ["precision.compute=fp64", "run.device=auto", "set run.device=cpu"]),
        ({"gpu": 0, "host": 60}, ("run.device=cpu",), ["host's memory", "weights, gradients", "smaller model"]),
    ],
    ids=["gpu", "one rank for all", "host", "disk", "shared memory", "nccl", "fp64", "cpu"],
)
def test_what_is_short_is_named(machine, tmp_path, change, overrides, words):
    machine(**change)
    with pytest.raises(UserError) as error:
        module.check_machine(a_config(tmp_path, *overrides), 8, 8)
    assert all(word in str(error.value) for word in words), str(error.value)


def test_all_that_is_short_is_told_at_once(machine, tmp_path):
    machine(gpu=40, host=20, disk=30, shared=0.0625)
    with pytest.raises(UserError) as error:
        module.check_machine(a_config(tmp_path, *FP8), 8, 8)
    assert len(str(error.value).splitlines()) == 4


def test_a_tiny_run_on_the_cpu_passes_on_the_machine_at_hand(tmp_path):
    config = resolved(*SMALL_RUN, "run.device=cpu", f"run.output_dir={tmp_path}")
    module.check_machine(config, 1, 1)


def test_the_checkpoint_is_what_has_trained_and_its_moments(tmp_path):
    """With FP8 and all else frozen: of each layer that has trained an fp32 master, the moments of those that train at
    the end, and in bf16 what is no layer."""
    config = a_config(tmp_path, *FP8, "lisa.always_active=[]", "bilevel.steps=40", "parallel.pipeline=1")
    number, size = module.checkpoints(Plan.of(config, 1, 0, H100))
    layer = padded_block(487_605_248, 1)
    assert number == 1
    assert size == 4 * 2 * (4 * layer + 2 * 2 * layer) + 2 * (2 * 152_064 + 1) * 5120


@pytest.mark.parametrize(
    "overrides, steps, number",
    [
        ([], [], 5),  # after 50, 100, 150, 200 and 234 steps
        (["run.resume=auto"], [], 5),
        (["run.resume=auto"], ["step_50", "step_117", "step_150.partial"], 3),  # stopped by a signal after step 117
        (["run.resume=auto"], ["step_50", "step_234"], 0),
        (["run.resume=auto", "run.save_every=0"], ["step_117"], 1),
        (["run.resume=auto", "run.save_every=0"], ["step_234"], 0),
        (["run.save_last=false"], [], 4),
        (["run.save_last=false", "run.save_every=117"], [], 2),
        (["run.save_last=false", "run.save_every=0"], [], 0),
    ],
)
def test_checkpoints_that_are_written_are_not_counted_again(tmp_path, overrides, steps, number):
    config = a_config(tmp_path, *FP8, *overrides)
    for step in steps:
        (Path(config.run.output_dir) / "checkpoints" / step).mkdir(parents=True)
    assert module.checkpoints(Plan.of(config, 8, 0, H100))[0] == number


def test_a_run_that_goes_on_needs_the_disk_of_what_it_has_yet_to_write(machine, tmp_path):
    config = a_config(tmp_path, *FP8, "run.resume=auto")
    folder = Path(config.run.output_dir)
    (folder / "checkpoints" / "step_200").mkdir(parents=True)
    machine(disk=0)
    with pytest.raises(UserError, match="1 checkpoint of up to .*free: set run.export=false, or write elsewhere"):
        module.check_machine(config, 8, 8)
    (folder / "checkpoints" / "step_234").mkdir()
    with pytest.raises(UserError, match="0 checkpoints .* an export of 61.0 GiB"):
        module.check_machine(config, 8, 8)
    (folder / "hf").mkdir()
    module.check_machine(config, 8, 8)


def test_a_run_that_may_fit_is_warned_of_and_let_go_on(machine, tmp_path, capsys):
    config = a_config(tmp_path, *FP8)
    stages = Plan.of(config, 8, 0, H100).stages
    without_reserve = max(stage.total - stage.parts["allocator reserve"] for stage in stages) / GIB
    machine(gpu=without_reserve + 0.01)
    module.check_machine(config, 8, 8)
    assert capsys.readouterr().err.startswith("warning: on this machine's GPUs the run does not fit: rank 7 (stage 7)")
    machine(gpu=without_reserve - 0.01)
    with pytest.raises(UserError, match="does not fit"):
        module.check_machine(config, 8, 8)
    assert not capsys.readouterr().err


def test_masters_on_the_host_take_powers_of_two(machine, tmp_path):
    """A layer's master, 1.82 GiB, takes 2 GiB page-locked."""
    config = a_config(tmp_path, *FP8, "parallel.pipeline=1", "bilevel.steps=40")
    masters = Plan.of(config, 1, 0, H100).stages[0].parts["host masters"]
    assert masters == 4 * 4 * padded_block(487_605_248, 1)
    machine(gpu=500, host=8.01)
    module.check_machine(config, 1, 1)
    machine(gpu=500, host=7.99)
    with pytest.raises(UserError, match="1 ranks need 8.0 GiB"):
        module.check_machine(config, 1, 1)


@pytest.mark.parametrize("limit, room", [("max", 900), ("1000", 1000 - 700 + 200 + 150), ("5000", 900)])
def test_the_files_that_a_container_has_cached_are_room(tmp_path, monkeypatch, limit, room):
    monkeypatch.setattr(module, "MEMORY_INFO", tmp_path / "meminfo")
    monkeypatch.setattr(module, "CONTROL_GROUP", tmp_path)
    kib = 1024
    (tmp_path / "meminfo").write_text("MemTotal: 4000 kB\nMemAvailable: 900 kB\n")
    (tmp_path / "memory.max").write_text(limit if limit == "max" else str(int(limit) * kib))
    (tmp_path / "memory.current").write_text(f"{700 * kib}\n")
    stat = {"anon": 300, "file": 400, "active_file": 200, "inactive_file": 150}
    (tmp_path / "memory.stat").write_text("".join(f"{name} {size * kib}\n" for name, size in stat.items()))
    assert module.host_memory() == room * kib
    (tmp_path / "memory.stat").unlink()
    assert module.host_memory() == 900 * kib


def test_fp8_is_exported_in_bf16(tmp_path):
    sizes = [
        module.export_bytes(a_config(tmp_path, f"precision.compute={compute}"))
        for compute in ("bf16", "fp8", "fp32", "fp64")
    ]
    assert sizes[0] == sizes[1] == sizes[2] // 2 == sizes[3] // 2


@pytest.mark.parametrize(
    "overrides, there, number",
    [
        ([], [], 1),
        (["run.export=false"], [], 0),
        (["run.export_model=both"], [], 2),
        (["run.export_model=both", "run.resume=auto"], ["hf"], 1),
        (["run.export_model=lower", "run.resume=auto"], ["hf"], 1),
        (["run.export_model=lower", "run.resume=auto"], ["hf_lower"], 0),
    ],
)
def test_a_model_that_is_there_is_not_exported_again(tmp_path, overrides, there, number):
    config = a_config(tmp_path, *overrides)
    for name in there:
        (Path(config.run.output_dir) / name).mkdir(parents=True)
    assert module.export_bytes(config) == number * module.export_bytes(a_config(tmp_path))
