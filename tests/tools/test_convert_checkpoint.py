"""tools/convert_checkpoint.py: a run's checkpoint as a Hugging Face folder, and the way in."""

import json
import os
import subprocess
import sys
from argparse import Namespace
from pathlib import Path
from unittest import mock

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from megatron_scalebio.active_layers import Role
from megatron_scalebio.config import write_config
from megatron_scalebio.mcore.export import export_model
from megatron_scalebio.run import Run, open_config
from megatron_scalebio.trainer import Trainer
from tests.distributed import run_distributed
from tests.hf.tiny_models import CONFIGS, random_model
from tests.test_real_models import FP8, RUN, TP2, dataset, tensors
from tools import convert_checkpoint

REPOSITORY = Path(__file__).parents[2]


@pytest.mark.parametrize("overrides", [(), (FP8,)], ids=str)
def test_a_checkpoint_exports_as_the_run_itself_does_and_equals_what_transformers_computes(tmp_path, overrides):
    source, run = tmp_path / "source", tmp_path / "run"
    random_model(CONFIGS["llama3"](), torch.float32).save_pretrained(source)
    run_distributed(2, train, source, run, tmp_path / "direct", *overrides)
    assert run_distributed(2, convert, run / "checkpoints" / "step_3", tmp_path / "converted") == [0, 0]
    direct, converted = tensors(tmp_path / "direct"), tensors(tmp_path / "converted")
    assert set(direct) == set(converted)
    for name, tensor in direct.items():
        assert torch.equal(tensor, converted[name]), name


@pytest.mark.parametrize("overrides", [(), (FP8,)], ids=str)
def test_a_wrong_tensor_is_not_equal(tmp_path, overrides):
    source, run = tmp_path / "source", tmp_path / "run"
    random_model(CONFIGS["llama3"](), torch.float32).save_pretrained(source)
    run_distributed(2, train, source, run, tmp_path / "direct", *overrides)
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
    source, runs = model_with_tokenizer(tmp_path / "source"), {name: tmp_path / name for name in ("direct", "imported")}
    config = tmp_path / "config.yaml"
    config.write_text(
        f"model: {{hf_path: {source}}}\n"
        f"data: {{sources: [{{name: a, path: {tmp_path}/a.jsonl}}, {{name: b, path: {tmp_path}/b.jsonl}}],"
        f" validation: {tmp_path}/a.jsonl, template: plain, max_length: 16}}\n"
        "bilevel: {steps: 3, global_batch_size: 4}\nlisa: {num_active_layers: 1, period: 1}\n"
        "optimizer: {lr: 1.0e-3}\nprecision: {compute: fp32}\n"
    )
    for name in ("a", "b"):
        lines = [json.dumps({"prompt": f"{name} {i}", "response": f"{i} {name}"}) for i in range(9)]
        (tmp_path / f"{name}.jsonl").write_text("\n".join(lines))

    def told(*command: str) -> str:
        result = subprocess.run([sys.executable, *command], cwd=REPOSITORY, capture_output=True, text=True)
        assert "Traceback" not in result.stderr and result.returncode in (0, 2), result.stderr
        return result.stdout if result.returncode == 0 else result.stderr

    train = ("-m", "megatron_scalebio", "train", "--config", str(config))
    tool = "tools/convert_checkpoint.py"
    told(*train, f"run.output_dir={runs['direct']}")
    into = (tool, "import", "--config", str(config), f"run.output_dir={runs['imported']}")
    assert f"{runs['imported']}/checkpoints/step_0" in told(*into)
    assert "error: run.output_dir=" in told(*into)
    assert "resumed after step 0" in told(*train, f"run.output_dir={runs['imported']}", "run.resume=auto")
    direct, imported = (tensors(run / "hf") for run in runs.values())
    for name, tensor in direct.items():
        assert torch.equal(tensor, imported[name]), name
    told(tool, "export", str(runs["imported"] / "checkpoints" / "step_0"), str(tmp_path / "back"))
    before, back = tensors(source), tensors(tmp_path / "back")
    assert all(torch.equal(before[name], back[name]) for name in before)


def model_with_tokenizer(folder: Path) -> Path:
    random_model(CONFIGS["llama3"](), torch.float32).save_pretrained(folder)
    letters = {letter: index for index, letter in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    tokenizer = Tokenizer(models.BPE(letters, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<end>").save_pretrained(folder)
    return folder


def trainer_for(source: Path, run: Path, *overrides: str) -> Trainer:
    settings = (*RUN, TP2, f"model.hf_path={source}", "data.tokenizer=bytes", f"run.output_dir={run}")
    return Trainer(Run(open_config(None, [*settings, *overrides]), dataset()))


def train(source: Path, run: Path, target: Path, *overrides: str) -> None:
    """On every rank: three steps, a checkpoint, the run's own export."""
    finish(trainer_for(source, run, *overrides), target)


def finish(trainer: Trainer, target: Path) -> None:
    for _ in range(3):
        trainer.take_step()
    trainer.save()
    if trainer.groups.rank == 0:
        write_config(trainer.config, Path(trainer.config.run.output_dir) / "config.yaml")
    export_model(trainer.models, target, end_id=256)


def convert(checkpoint: Path, folder: Path, spoiled: bool = False) -> int:
    """On every rank: the tool's export; spoiled: of an embedding whose weights have moved by one."""
    arguments = Namespace(checkpoint=checkpoint, folder=folder, dtype=None, verify=True)

    def spoil(models, target, end_id):
        block = models.store.blocks[Role.UPPER]["embedding"]
        kept = block.weights.clone()
        block.weights.copy_(kept.roll(1))
        export_model(models, target, end_id)
        block.weights.copy_(kept)

    with mock.patch.dict(os.environ, WORLD_SIZE="2"):
        if not spoiled:
            return convert_checkpoint.export_checkpoint(arguments)
        with mock.patch("megatron_scalebio.mcore.export.export_model", spoil):
            return convert_checkpoint.export_checkpoint(arguments)
