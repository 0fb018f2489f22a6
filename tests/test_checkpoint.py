"""A resumed run equals the uninterrupted one bit for bit, and what cannot be continued is refused by name."""

import contextlib
import io
import json
import shutil
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.distributed as dist

from megatron_scalebio.config import Config, UserError
from megatron_scalebio.data import Dataset
from megatron_scalebio.run import Run
from megatron_scalebio.trainer import Trainer
from tests.configs import resolved
from tests.distributed import run_distributed
from tests.mcore.runs import SMALL_RUN, VOCAB_SIZE, random_examples, state_tensors

NEVER = SimpleNamespace(agreed=lambda device, peak: (0, peak))
RUN = (*SMALL_RUN, "run.save_every=1", "bilevel.steps=5", "run.eval_every=0", "precision.compute=bf16")
MID_PERIOD, PERIOD_EDGE = 3, 4  # of periods of two steps
TP2, PP2 = "parallel.tensor=2", "parallel.pipeline=2"
FP8 = "precision.frozen_weights=fp8"
TIED, INDEPENDENT = "model.shape.tied_embeddings=true", "lisa.pairing=independent"

CASES = {
    "one rank, bf16, independent draws": (1, (INDEPENDENT,)),
    "TP2, fp32": (2, (TP2, "precision.compute=fp32")),
    "PP2, bf16, tied": (2, (PP2, TIED)),
    "DP2, bf16": (2, (INDEPENDENT,)),
    "DP2xPP2, bf16": (4, (PP2, INDEPENDENT)),
    "DP2, bf16, adaptive draws": (2, ("data.sampling=adaptive", "bilevel.logits_lr=0.3")),
    "DP2, bf16, moments of frozen layers kept": (2, (INDEPENDENT, "lisa.keep_moments=true")),
    "DP2, fp8 frozen, moments in bf16": (2, (FP8, "optimizer.moments=bf16")),
    "TP2xPP2, fp8 frozen, moments in fp8": (4, (TP2, PP2, FP8, "optimizer.moments=fp8")),
}


@pytest.mark.parametrize("name", CASES)
def test_resuming_in_mid_period_and_at_its_edge_equals_no_interruption_bit_for_bit(name, tmp_path):
    world_size, overrides = CASES[name]
    expected = run_distributed(world_size, train, tmp_path / "whole", overrides)
    for step in (MID_PERIOD, PERIOD_EDGE):
        folder = interrupted_after(step, tmp_path / "whole", tmp_path / f"from_{step}")
        resumed = run_distributed(world_size, train, folder, (*overrides, "run.save_every=0"))
        for rank, (mine, theirs) in enumerate(zip(resumed, expected, strict=True)):
            assert mine["started"] == step
            assert mine["state"] == theirs["state"]
            assert mine["source_weights"] == theirs["source_weights"]
            assert set(mine["tensors"]) == set(theirs["tensors"])
            for key, tensor in mine["tensors"].items():
                assert torch.equal(tensor, theirs["tensors"][key]), f"rank {rank}: {key}"
        for file in ("weights.json", "metrics.jsonl"):
            assert content(folder / file) == content(tmp_path / "whole" / file)


def test_two_runs_with_one_seed_and_layout_write_the_same_bytes_and_auto_starts_anew_without_a_checkpoint(tmp_path):
    for folder in ("first", "second"):
        run_distributed(2, train, tmp_path / folder, (TP2, "run.save_every=0"))
    first, second = ((tmp_path / folder / "weights.json").read_bytes() for folder in ("first", "second"))
    assert first == second
    assert json.loads(first)["step"] == 5


def test_what_an_interrupted_save_left_is_ignored_and_replaced(tmp_path):
    run_distributed(1, train, tmp_path / "whole", ())
    folder = interrupted_after(2, tmp_path / "whole", tmp_path / "resumed")
    partial = folder / "checkpoints" / "step_5.partial"
    partial.mkdir()
    (partial / "state.json").write_text("cut off")
    (resumed,) = run_distributed(1, train, folder, ())
    assert resumed["started"] == 2
    assert not partial.exists()
    assert content(folder / "weights.json") == content(tmp_path / "whole" / "weights.json")


def test_a_damaged_or_foreign_checkpoint_is_refused_by_name_before_training(tmp_path):
    run_distributed(1, train, tmp_path / "whole", ())
    cases = [
        (1, (), 0, flip_a_byte, "step_3 is damaged"),
        (1, (), 0, cut_state, "state.json cannot be read"),
        (1, (), 0, of_an_older_version, "written by another version (format None there, 2 here)"),
        (1, ("optimizer.lr=2e-3",), 0, None, "the settings"),
        (1, (), 1, None, "the examples in the data files"),
        (2, (), 0, None, "the layout"),
    ]
    for number, (ranks, overrides, seed, damage, words) in enumerate(cases):
        folder = interrupted_after(3, tmp_path / "whole", tmp_path / f"refused_{number}")  # messages name it
        if damage:
            damage(folder / "checkpoints" / "step_3")
        before = content(folder / "metrics.jsonl")
        messages = run_distributed(ranks, refusal, folder, overrides, seed)
        assert all(words in message and "step_3" in message for message in messages), messages
        assert content(folder / "metrics.jsonl") == before


@pytest.mark.parametrize("step", [1, 4, 5], ids=["first step", "mid-period", "first step of a period"])
def test_a_non_finite_loss_ends_the_run_and_keeps_the_checkpoints_before_it(step, tmp_path):
    world_size, overrides = 2, ("run.save_every=2",)
    expected = run_distributed(world_size, train, tmp_path / "whole", overrides, 0, step)
    for rank, result in enumerate(expected):
        assert result["status"] == 1
        assert result["ended"] == step - 1
        assert result["errors"].count("error:") == (rank == 0)
    assert f"error: step {step}, before any update: not finite on rank 1: " in expected[0]["errors"]
    assert "loss inf of" in expected[0]["errors"] and "in the lower model" in expected[0]["errors"]
    saved = {path.name for path in (tmp_path / "whole").glob("checkpoints/*")}
    assert saved == {f"step_{number}" for number in range(2, step, 2)}
    if not saved:
        return

    run_distributed(world_size, train, tmp_path / "plain", overrides)
    run_distributed(world_size, train, tmp_path / "whole", overrides)
    assert content(tmp_path / "whole" / "weights.json") == content(tmp_path / "plain" / "weights.json")


def train(folder: Path, overrides: tuple[str, ...], seed: int = 0, poisoned_step: int = 0) -> dict:
    """On every rank: run or resume to the end; rank 1 meets an infinite loss at `poisoned_step`."""
    trainer = Trainer(Run(config_of(folder, overrides), small_dataset(seed)))
    started, sample = trainer.step, trainer.sampler.step

    def sample_with_poison(step: int, weights: list[float]):
        batch = sample(step, weights)
        if step != poisoned_step or dist.get_rank() != 1:
            return batch
        first, *rest = batch.train
        return replace(batch, train=[replace(first, example_loss_tokens=0 * first.example_loss_tokens), *rest])

    trainer.sampler.step = sample_with_poison
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()) as errors:
        status = trainer.train(NEVER)
    return {
        "status": status,
        "errors": errors.getvalue(),
        "started": started,
        "ended": trainer.step,
        "state": trainer.models.persistence.state(),
        "source_weights": trainer.source_weights.state_dict(),
        "tensors": state_tensors(trainer.models),
    }


def refusal(folder: Path, overrides: tuple[str, ...], seed: int) -> str:
    with pytest.raises(UserError) as error:
        Trainer(Run(config_of(folder, overrides), small_dataset(seed)))
    return str(error.value)


def config_of(folder: Path, overrides: tuple[str, ...]) -> Config:
    return resolved(*RUN, f"run.output_dir={folder}", "run.resume=auto", *overrides)


def small_dataset(seed: int) -> Dataset:
    tokenizer = SimpleNamespace(vocab_size=VOCAB_SIZE, end_id=0, pad_id=0)
    names = ["clean", "mixed", "wrong"]
    train = [random_examples(10 * seed + source, (source,) * 7) for source in range(len(names))]
    return Dataset(tokenizer, names, train, validation=random_examples(99, (0,) * 8))


def interrupted_after(step: int, whole: Path, folder: Path) -> Path:
    """The folder of a run that stopped some time after `step`: its records go on, its checkpoints do not."""
    shutil.copytree(whole, folder)
    for path in (folder / "checkpoints").iterdir():
        if int(path.name.removeprefix("step_")) > step:
            shutil.rmtree(path)
    return folder


def flip_a_byte(checkpoint: Path) -> None:
    file = max(checkpoint.glob("*.distcp"), key=lambda path: path.stat().st_size)
    data = np.fromfile(file, dtype=np.uint8)
    data[len(data) // 2] ^= 1
    data.tofile(file)


def of_an_older_version(checkpoint: Path) -> None:
    file = checkpoint / "state.json"
    state = json.loads(file.read_text())
    del state["format"]
    file.write_text(json.dumps(state))


def cut_state(checkpoint: Path) -> None:
    file = checkpoint / "state.json"
    file.write_text(file.read_text()[:100])


def content(path: Path) -> list[dict] | bytes:
    """A file's bytes; of metrics.jsonl the records without what the machine decides."""
    if path.suffix != ".jsonl":
        return path.read_bytes()
    records = [json.loads(line) for line in path.read_text().splitlines()]
    measured = {"step_seconds", "tokens_per_second", "tflops_per_gpu", "mfu", "peak_memory_bytes"}
    return [{key: value for key, value in record.items() if key not in measured} for record in records]
