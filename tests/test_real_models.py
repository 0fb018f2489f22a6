"""A Hugging Face checkpoint through the trainer and out again, under every layout, judged by transformers."""

import contextlib
import os
import subprocess
import sys
from pathlib import Path
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import AutoModelForCausalLM, Qwen2Config

from megatron_scalebio.active_layers import Role
from megatron_scalebio.config import UserError
from megatron_scalebio.data import Dataset, Example
from megatron_scalebio.data.tokenizers import BytesTokenizer
from megatron_scalebio.mcore.export import export_model
from megatron_scalebio.run import Run, open_config
from megatron_scalebio.trainer import Trainer
from tests.distributed import run_distributed
from tests.hf.tiny_models import CONFIGS, random_model
from tests.mcore.runs import random_examples

RUN = (
    *("data.max_length=24", "data.micro_batch_size=2", "bilevel.global_batch_size=9", "bilevel.steps=20"),
    *("lisa.num_active_layers=1", "lisa.period=1", "optimizer.lr=1e-3", "optimizer.warmup=0", "run.device=cpu"),
    *("precision.compute=fp32", "data.validation=synthetic", "run.export_shard_gb=1e-4"),
)
TP2, PP2, BF16 = "parallel.tensor=2", "parallel.pipeline=2", "precision.compute=bf16"
FP8 = "precision.frozen_weights=fp8"
LAYOUTS = {"one rank": (1, ()), "TP2": (2, (TP2,)), "DP2": (2, ()), "TP2xPP2": (4, (TP2, PP2))}
KINDS = ("qwen2", "qwen2-tied", "llama3", "gemma2")


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """(kind, dtype) -> a folder of several shards that transformers wrote: four layers, for two stages."""

    def save(kind: str, dtype: torch.dtype) -> Path:
        folder = tmp_path_factory.mktemp(kind)
        config = CONFIGS[kind]()
        config = type(config)(**{**config.to_dict(), "num_hidden_layers": 4, "layer_types": None})
        random_model(config, dtype).save_pretrained(folder, max_shard_size="60KB")
        return folder

    return save


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("kind", KINDS)
def test_without_training_every_tensor_comes_out_with_its_bits(saved, tmp_path, kind, layout, dtype):
    source = saved(kind, dtype)
    world_size, overrides = LAYOUTS[layout]
    overrides += (BF16,) if dtype == torch.bfloat16 else ()
    run_distributed(world_size, train, source, tmp_path / "hf", overrides, 0)
    before, after = tensors(source), tensors(tmp_path / "hf")
    assert set(before) == set(after)
    for name, tensor in before.items():
        assert tensor.dtype == after[name].dtype == dtype and torch.equal(tensor, after[name]), name
    assert len(list((tmp_path / "hf").glob("*.safetensors"))) > 1


@pytest.mark.parametrize("kind", KINDS)
def test_layers_in_fp8_that_never_trained_come_out_with_their_bits(saved, tmp_path, kind):
    source = saved(kind, torch.bfloat16)
    world_size, overrides = LAYOUTS["TP2xPP2"]
    settings = (*overrides, BF16, FP8, "lisa.always_active=[final_norm]", "run.export_dtype=bf16")
    results = run_distributed(world_size, train, source, tmp_path / "hf", settings, 2)
    ever_active = set().union(*(result["ever_active"] for result in results))
    before, after = tensors(source), tensors(tmp_path / "hf")
    trained = {name for name in after if not torch.equal(before[name], after[name])}
    assert trained and len(trained) < len(after)
    for name in trained:
        assert name == "model.norm.weight" or f"layers.{name.split('.')[2]}" in ever_active


@pytest.mark.parametrize("layout", ["TP2", "TP2xPP2"])
@pytest.mark.parametrize("kind", [*KINDS, "qwen3", "mistral-window"])
def test_after_training_transformers_computes_the_loss_that_the_run_reports(saved, tmp_path, kind, layout):
    source = saved(kind, torch.float32)
    world_size, overrides = LAYOUTS[layout]
    results = run_distributed(world_size, train, source, tmp_path / "hf", overrides, 3)
    reported = results[0]["test_loss"]
    assert all(result["test_loss"] == reported for result in results)
    untrained, trained = mean_loss(source), mean_loss(tmp_path / "hf")
    assert abs(trained - untrained) > 1e-3
    # Sums over some hundred tokens of losses near 10, each within a few fp32 roundings of logits near 10.
    assert reported == pytest.approx(trained, rel=2e-6)


@pytest.mark.parametrize("frozen", ["bf16", "fp8"])
@pytest.mark.parametrize("layout", ["DP2", "TP2xPP2"])
def test_an_fp32_export_of_bf16_training_has_the_exact_masters_and_the_untouched_weights(
    saved, tmp_path, layout, frozen
):
    """At a learning rate that bf16 and FP8 swallow, what trained differs from the source, by the updates at most."""
    source = saved("qwen2", torch.bfloat16)
    world_size, overrides = LAYOUTS[layout]
    overrides += (BF16, f"precision.frozen_weights={frozen}", "run.export_dtype=fp32")
    overrides += ("optimizer.lr=1e-6", "optimizer.weight_decay=0")
    results = run_distributed(world_size, train, source, tmp_path / "hf", overrides, 2)
    ever_active = set().union(*(result["ever_active"] for result in results))
    before, after = tensors(source), tensors(tmp_path / "hf")
    moved = {name for name in after if not torch.equal(before[name].float(), after[name])}
    assert 0 < len(ever_active - {"embedding", "final_norm", "head"}) < 4
    for name in after:
        block = name.split(".")[2] if name.startswith("model.layers.") else None
        trained = block is None or f"layers.{block}" in ever_active
        assert (name in moved) == trained, name
        assert (after[name] - before[name].float()).abs().max() <= 2.1e-6


def test_a_source_of_another_dtype_is_converted(saved, tmp_path):
    source = saved("llama3", torch.float32)
    run_distributed(1, train, source, tmp_path / "hf", (BF16,), 0)
    after = tensors(tmp_path / "hf")
    for name, tensor in tensors(source).items():
        assert torch.equal(tensor.bfloat16(), after[name]), name


@pytest.mark.parametrize("failing", ["begin_export", "finish_export", "ShardWriter"])
def test_an_export_that_fails_on_one_rank_is_told_on_all(saved, tmp_path, failing):
    messages = run_distributed(2, fail_to_export, saved("qwen2", torch.float32), tmp_path / "hf", failing)
    assert len(set(messages)) == 1 and "could not be exported: rank" in messages[0] and "disk full" in messages[0]
    assert not (tmp_path / "hf").exists()


def fail_to_export(source: Path, target: Path, failing: str) -> str:
    """On every rank: the message of an export during which the last stage's disk, or the first rank's, is full."""

    def full(*_, **__):
        raise OSError("disk full")

    broken = full if failing != "ShardWriter" else mock.Mock(return_value=mock.Mock(add=full))
    name = f"megatron_scalebio.mcore.export.{failing}"
    breaks = dist.get_rank() == (1 if failing == "ShardWriter" else 0)
    with mock.patch(name, broken) if breaks else contextlib.nullcontext():
        with pytest.raises(UserError) as error:
            train(source, target, (PP2,), 0)
    return str(error.value)


def test_weights_that_cannot_be_read_again_are_told_on_all_ranks(saved, tmp_path):
    """Layers in FP8 that never trained are read while the ranks gather tensors: none may be left waiting."""
    messages = run_distributed(2, lose_the_source, saved("qwen2", torch.bfloat16), tmp_path / "hf")
    assert len(set(messages)) == 1 and "could not be exported: rank 1: stale file handle" in messages[0]
    assert not (tmp_path / "hf").exists()


def lose_the_source(source: Path, target: Path) -> str:
    """On every rank: the message of an export during which the last rank's source is gone."""
    trainer = trainer_for(source, (TP2, BF16, FP8))
    trainer.take_step()
    if dist.get_rank() == 1:
        trainer.models.store.initial = mock.Mock(side_effect=OSError("stale file handle"))
    with pytest.raises(UserError) as error:
        export_model(trainer.models, target, end_id=256)
    return str(error.value)


def test_a_run_that_computes_in_fp8_exports_bf16(saved, tmp_path):
    run_distributed(1, export_fp8, saved("llama3", torch.float32), tmp_path / "hf")
    assert {tensor.dtype for tensor in tensors(tmp_path / "hf").values()} == {torch.bfloat16}


def export_fp8(source: Path, target: Path) -> None:
    """On a rank: the weights that compute=fp8 has, which a machine without a GPU refuses."""
    trainer = trainer_for(source, (BF16,))
    trainer.config.precision.compute = "fp8"
    export_model(trainer.models, target, end_id=256)


def test_loading_takes_one_copy_of_the_weights_and_less_than_a_tensor_beside_it(tmp_path):
    """Both models from one read, in a process of its own; by the kernel's count of memory that is no file's."""
    sizes = dict(vocab_size=40_000, hidden_size=256, intermediate_size=4096, num_hidden_layers=4)
    config = Qwen2Config(**sizes, num_attention_heads=4, num_key_value_heads=2)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path, max_shard_size="30MB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 2
    weights = [tensor.nbytes for tensor in tensors(tmp_path).values()]
    environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536"}  # what is freed is given back, and not counted
    command = [sys.executable, "-c", MEASURE, str(tmp_path)]
    here = Path(__file__).parents[1]
    result = subprocess.run(command, capture_output=True, text=True, cwd=here, env=environment, check=True)
    before, peak = map(int, result.stdout.split()[-2:])
    assert sum(weights) <= peak - before <= sum(weights) + max(weights) + 8e6


MEASURE = """
import re, sys, threading, torch
from pathlib import Path
from megatron_scalebio.device import CPU
from megatron_scalebio.mcore.models import MegatronModels
from megatron_scalebio.mcore.process_groups import start_process_groups
from megatron_scalebio.run import open_config

def anonymous():
    return 1024 * int(re.search(r"RssAnon:\\s+(\\d+)", Path("/proc/self/status").read_text())[1])

def watch():
    while not over.wait(0.001):
        seen.append(anonymous())

config = open_config(None, [f"model.hf_path={sys.argv[1]}", "precision.compute=fp32", "data.tokenizer=bytes"])
groups = start_process_groups(config.parallel, CPU)
MegatronModels(open_config(None, ["precision.compute=fp32"]), groups, CPU)  # what is imported and started once
seen, over = [anonymous()], threading.Event()
watcher = threading.Thread(target=watch)
watcher.start()
models = MegatronModels(config, groups, CPU)
over.set()
watcher.join()
print(seen[0], max(*seen, anonymous()))
"""


def train(source: Path, target: Path, overrides: tuple[str, ...], steps: int) -> dict:
    """On every rank: some steps from a checkpoint, the test loss, an export."""
    trainer = trainer_for(source, overrides)
    ever_active: set[str] = set()
    for _ in range(steps):
        trainer.take_step()
        ever_active |= set(trainer.models.active_sets[Role.UPPER].blocks)
    test_loss = trainer.evaluate()
    export_model(trainer.models, target, end_id=256)
    return {"test_loss": test_loss, "ever_active": ever_active}


def trainer_for(source: Path, overrides: tuple[str, ...]) -> Trainer:
    config = open_config(None, [*RUN, f"model.hf_path={source}", "data.tokenizer=bytes", *overrides])
    return Trainer(Run(config, dataset()))


def dataset() -> Dataset:
    train = [random_examples(source, (source,) * 12) for source in range(3)]
    return Dataset(BytesTokenizer(), ["a", "b", "c"], train, random_examples(7, (0,) * 12), held_out())


def held_out() -> list[Example]:
    return random_examples(8, (0,) * 9)


def mean_loss(folder: Path) -> float:
    """Of transformers' model, over the test examples' loss tokens, one example at a time."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager").eval()
    total, count = 0.0, 0
    for example in held_out():
        tokens = torch.from_numpy(example.tokens).long()
        with torch.no_grad():
            logits = model(tokens[:-1].unsqueeze(0)).logits[0]
        losses = cross_entropy(logits.double(), tokens[1:], reduction="none")
        mask = torch.from_numpy(example.loss_mask[1:])
        total, count = total + losses[mask].sum().item(), count + int(mask.sum())
    return total / count


def tensors(folder: Path) -> dict[str, Tensor]:
    return {name: tensor for path in folder.glob("*.safetensors") for name, tensor in load_file(path).items()}
