"""The machine is checked before anything is built: what is short is named, with how much and what to change."""

import shutil
from collections import namedtuple
from pathlib import Path

import pytest

from megatron_scalebio import preflight
from megatron_scalebio.config import Config, UserError, load_config
from megatron_scalebio.estimates import padded_block
from megatron_scalebio.planner import make_plan
from megatron_scalebio.step_memory import GIB
from megatron_scalebio.step_time import H100
from tests.mcore.runs import SMALL_RUN, VOCAB_SIZE

Usage = namedtuple("Usage", "total used free")
LARGE = (
    *("model.shape.num_layers=64", "model.shape.hidden_size=5120", "model.shape.ffn_hidden_size=27648"),
    *("model.shape.num_attention_heads=40", "model.shape.num_query_groups=8", "parallel.pipeline=8"),
    *("precision.compute=bf16", "data.max_length=1024", "bilevel.steps=234", "run.device=auto"),
    *("lisa.num_active_layers=2", "lisa.period=20", "run.save_every=50"),
)


@pytest.fixture
def machine(monkeypatch):
    """A machine of eight H100 where nothing is short; `machine(...)` changes what it has, in GiB."""

    def change(gpu: float = 79.1, host: float = 1000, disk: float = 10_000, shared: float = 8, nccl: bool = True):
        usage = {"shm": Usage(int(shared * GIB), 0, 0)}
        free = Usage(0, 0, int(disk * GIB))
        monkeypatch.setattr(preflight, "find_cuda", lambda: gpu > 0)
        monkeypatch.setattr(preflight, "gpu_memory", lambda: int(gpu * GIB))
        monkeypatch.setattr(preflight, "has_nccl", lambda: nccl)
        monkeypatch.setattr(preflight, "host_memory", lambda: int(host * GIB))
        monkeypatch.setattr(shutil, "disk_usage", lambda path: usage.get(Path(path).name, free))

    change()
    return change


def a_config(tmp_path: Path, *overrides: str) -> Config:
    return load_config(None, [*SMALL_RUN, *LARGE, f"run.output_dir={tmp_path / 'a' / 'run'}", *overrides])


FP8 = ("precision.frozen_weights=fp8", "parallel.recompute=full")


def test_a_machine_that_has_all_passes(machine, tmp_path):
    preflight.check_machine(a_config(tmp_path, *FP8), 152_064, 8, 8)


@pytest.mark.parametrize(
    "change, overrides, words",
    [
        ({"gpu": 40}, FP8, ["does not fit", "stage 7", "of 40.0", "plan"]),
        ({}, ("parallel.pipeline=1",), ["does not fit", "of 79.1", "largest part"]),
        ({"host": 20}, FP8, ["host's memory", "8 ranks", "20.0 GiB are available", "lisa.period"]),
        ({"disk": 30}, FP8, ["5 checkpoints", "30.0 are free", "run.save_every=50", "run.export=false"]),
        ({"shared": 0.0625}, FP8, ["/dev/shm has 0.06 GiB", "--shm-size"]),
        ({"nccl": False}, FP8, ["no NCCL"]),
        ({"gpu": 0, "host": 60}, ("run.device=cpu",), ["host's memory", "weights, gradients", "smaller model"]),
    ],
    ids=["gpu", "one rank for all", "host", "disk", "shared memory", "nccl", "cpu"],
)
def test_what_is_short_is_named(machine, tmp_path, change, overrides, words):
    machine(**change)
    with pytest.raises(UserError) as error:
        preflight.check_machine(a_config(tmp_path, *overrides), 152_064, 8, 8)
    assert all(word in str(error.value) for word in words), str(error.value)


def test_all_that_is_short_is_told_at_once(machine, tmp_path):
    machine(gpu=40, host=20, disk=30, shared=0.0625)
    with pytest.raises(UserError) as error:
        preflight.check_machine(a_config(tmp_path, *FP8), 152_064, 8, 8)
    assert len(str(error.value).splitlines()) == 4


def test_a_tiny_run_on_the_cpu_passes_on_the_machine_at_hand(tmp_path):
    config = load_config(None, [*SMALL_RUN, "run.device=cpu", f"run.output_dir={tmp_path}"])
    preflight.check_machine(config, VOCAB_SIZE, 1, 1)


def test_the_checkpoint_is_what_has_trained_and_its_moments(tmp_path):
    """With FP8 and frozen embeddings: of the final norm and each layer that has trained an fp32 master, and the moments
    of those that train at the end."""
    config = a_config(tmp_path, *FP8, "lisa.always_active=[]", "bilevel.steps=40", "parallel.pipeline=1")
    number, size = preflight.checkpoints(make_plan(config, 152_064, 1, 0, H100))
    layer = padded_block(487_605_248, 1)
    assert number == 1
    assert size == 4 * 2 * (4 * layer + 2 * 2 * layer)
