"""tools/convert_checkpoint.py: a run's checkpoint as a Hugging Face folder, and the way in."""

import os
import subprocess
import sys
from argparse import Namespace
from pathlib import Path
from unittest import mock

import torch

from megatron_scalebio.active_layers import Role
from megatron_scalebio.config import load_config, write_config
from megatron_scalebio.hf import adopt_checkpoint
from megatron_scalebio.mcore.export import export_model
from megatron_scalebio.trainer import Trainer
from tests.distributed import run_distributed
from tests.hf.tiny_models import CONFIGS, random_model
from tests.test_real_models import RUN, TP2, dataset, tensors
from tools import convert_checkpoint

REPOSITORY = Path(__file__).parents[1]


def test_a_checkpoint_exports_as_the_run_itself_does_and_equals_what_transformers_computes(tmp_path):
    source, run = tmp_path / "source", tmp_path / "run"
    random_model(CONFIGS["llama3"](), torch.float32).save_pretrained(source)
    run_distributed(2, train, source, run, tmp_path / "direct")
    assert run_distributed(2, convert, run / "checkpoints" / "step_3", tmp_path / "converted") == [0, 0]
    direct, converted = tensors(tmp_path / "direct"), tensors(tmp_path / "converted")
    assert set(direct) == set(converted)
    for name, tensor in direct.items():
        assert torch.equal(tensor, converted[name]), name


def test_a_wrong_tensor_is_not_equal(tmp_path):
    source, run = tmp_path / "source", tmp_path / "run"
    random_model(CONFIGS["llama3"](), torch.float32).save_pretrained(source)
    run_distributed(2, train, source, run, tmp_path / "direct")
    assert run_distributed(2, convert, run / "checkpoints" / "step_3", tmp_path / "wrong", True) == [1, 0]


def test_what_cannot_be_converted_is_told_in_one_message(tmp_path):
    (tmp_path / "there").mkdir()
    source, run = tmp_path / "source", tmp_path / "run"
    random_model(CONFIGS["llama3"](), torch.float32).save_pretrained(source)
    run_distributed(2, train, source, run, tmp_path / "direct")
    checkpoint = run / "checkpoints" / "step_3"
    for arguments, words in [
        ((tmp_path, tmp_path / "new"), "not a checkpoint of a run"),
        ((checkpoint, tmp_path / "there"), "exists, and is not overwritten"),
        ((checkpoint, tmp_path / "new"), "1 ranks were started"),
    ]:
        command = [sys.executable, REPOSITORY / "tools" / "convert_checkpoint.py", "export", *arguments]
        result = subprocess.run(command, capture_output=True, text=True)
        assert result.returncode == 2 and words in result.stderr
        assert result.stderr.count("error:") == 1 and "Traceback" not in result.stderr


def test_a_run_begins_at_an_imported_checkpoint_as_at_the_folder(tmp_path):
    source = tmp_path / "source"
    random_model(CONFIGS["llama3"](), torch.float32).save_pretrained(source)
    run_distributed(2, train, source, tmp_path / "from_folder", tmp_path / "first")
    run_distributed(2, import_and_train, source, tmp_path / "imported", tmp_path / "second")
    first, second = tensors(tmp_path / "first"), tensors(tmp_path / "second")
    for name, tensor in first.items():
        assert torch.equal(tensor, second[name]), name


def trainer_for(source: Path, run: Path, *overrides: str) -> Trainer:
    settings = (*RUN, TP2, f"model.hf_path={source}", "data.tokenizer=bytes", f"run.output_dir={run}")
    config = load_config(None, [*settings, *overrides])
    adopt_checkpoint(config, {})
    return Trainer(config, dataset())


def train(source: Path, run: Path, target: Path) -> None:
    """On every rank: three steps, a checkpoint, the run's own export."""
    finish(trainer_for(source, run), target)


def finish(trainer: Trainer, target: Path) -> None:
    for _ in range(3):
        trainer.take_step()
    trainer.save()
    if trainer.groups.rank == 0:
        write_config(trainer.config, Path(trainer.config.run.output_dir) / "config.yaml")
    export_model(trainer.models, target)


def import_and_train(source: Path, run: Path, target: Path) -> None:
    """On every rank: the checkpoint of step 0 alone, then a run that goes on from it without looking at the folder."""
    trainer_for(source, run).save()
    with mock.patch("megatron_scalebio.mcore.host.Checkpoint", side_effect=AssertionError("the folder was read")):
        trainer = trainer_for(source, run, "run.resume=auto")
    assert trainer.step == 0
    finish(trainer, target)


def convert(checkpoint: Path, folder: Path, spoiled: bool = False) -> int:
    """On every rank: the tool's export; spoiled: of a layer whose weights have moved by one."""
    arguments = Namespace(checkpoint=checkpoint, folder=folder, dtype=None, verify=True)

    def spoil(models, target):
        block = models.store.blocks[Role.UPPER]["layers.1"]
        kept = block.weights.clone()
        block.weights.copy_(kept.roll(1))
        export_model(models, target)
        block.weights.copy_(kept)

    with mock.patch.dict(os.environ, WORLD_SIZE="2"):
        if not spoiled:
            return convert_checkpoint.export_checkpoint(arguments)
        with mock.patch("megatron_scalebio.mcore.export.export_model", spoil):
            return convert_checkpoint.export_checkpoint(arguments)
