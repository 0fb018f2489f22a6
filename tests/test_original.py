"""On the authors' own batches and draws our run is theirs, step by step in fp64.

What they computed was recorded from github.com/research4pan/scalebio at b9ccce8: five sources of sums, batches of 20
and 20 examples, of which tests/golden/original.json has those of the small Llama. In fp64_lr they decay norms, too; in
the other recorded runs norms are not decayed. Both sides add in another order, and AdamW turns a difference of 1e-16 of
a small gradient into more: 1e-9.
"""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from megatron_scalebio import open_config
from megatron_scalebio.active_layers import Role
from megatron_scalebio.bilevel import Bilevel
from megatron_scalebio.config import DataConfig
from megatron_scalebio.data import StepBatch
from megatron_scalebio.data.dataset import Example
from megatron_scalebio.device import CPU
from megatron_scalebio.mcore.models import MegatronModels
from megatron_scalebio.mcore.process_groups import start_process_groups
from megatron_scalebio.resolution import resolve
from megatron_scalebio.trainer import make_source_weights
from tests.distributed import run_distributed
from tests.mcore.runs import batch_of

THEIRS = (
    *("bilevel.preset=paper", "bilevel.global_batch_size=20", "optimizer.lr=1e-3", "run.device=cpu"),
    *("precision.compute=fp64", "data.max_length=64", "data.micro_batch_size=5"),
)
NO_LISA = "lisa.enabled=false"
LISA = ("lisa.num_active_layers=2", "lisa.period=3")
SCALE = {"logits_gradient": 100.0}  # alpha times a difference of losses, which are equal to 1e-11
CASES = {
    "fp64_lr": (NO_LISA,),
    "fp64_lr_nd": (NO_LISA, "optimizer.decayed=matrices"),
    "warm": (NO_LISA, "optimizer.warmup=0.3", "optimizer.decayed=matrices"),
    "lisa": (*LISA, "optimizer.decayed=matrices"),
    "lisa_drop": (*LISA, "lisa.keep_moments=false", "optimizer.decayed=matrices"),
}
GOLDEN = Path(__file__).with_name("golden") / "original.json"


@pytest.mark.parametrize("name", CASES)
def test_a_run_of_theirs_is_ours(name, tmp_path):
    golden = json.loads(GOLDEN.read_text(encoding="utf-8"))
    write_model(golden["model"], tmp_path)
    recorded = golden["runs"][name] | {"sources": golden["sources"]}
    for step, drawn in zip(recorded["steps"], golden["batches"], strict=False):  # all runs drew the same, one fewer
        step |= {split: [unpacked(*example) for example in examples] for split, examples in drawn.items()}
    check(tmp_path, recorded, CASES[name])


def test_a_run_of_theirs_is_ours_at_their_rate_with_qwen2(shared):
    folder = shared / "data" / "authors_runs"
    recorded = json.loads((folder / "qwen.json").read_text())
    check(folder / "qwen2_w64", recorded, (NO_LISA, "optimizer.lr=2e-6", "optimizer.decayed=matrices"))


def write_model(config: dict, folder: Path) -> None:
    """Where they began: numbers of one generator, one tensor after another as the model has them."""
    generator = torch.Generator().manual_seed(1)
    hidden, ffn, rows = config["hidden_size"], config["intermediate_size"], config["vocab_size"]
    pairs = hidden * config["num_key_value_heads"] // config["num_attention_heads"]

    def matrix(rows: int, columns: int) -> Tensor:
        return torch.randn(rows, columns, generator=generator) * columns**-0.5

    def norm() -> Tensor:
        return 1 + 0.1 * torch.randn(hidden, generator=generator)

    weights = {"model.embed_tokens": matrix(rows, hidden)}
    for layer in range(config["num_hidden_layers"]):
        of_layer = {
            **{
                f"self_attn.{name}_proj": matrix(size, hidden)
                for name, size in zip("qkvo", (hidden, pairs, pairs, hidden), strict=True)
            },
            **{f"mlp.{name}_proj": matrix(ffn, hidden) for name in ("gate", "up")},
            "mlp.down_proj": matrix(hidden, ffn),
            "input_layernorm": norm(),
            "post_attention_layernorm": norm(),
        }
        weights |= {f"model.layers.{layer}.{name}": tensor for name, tensor in of_layer.items()}
    weights |= {"model.norm": norm(), "lm_head": matrix(rows, hidden)}
    save_file({f"{name}.weight": tensor for name, tensor in weights.items()}, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")


def unpacked(source: int, without_loss: int, ids: list[int]) -> dict:
    return {"source": source, "ids": ids, "labels": [-100] * without_loss + ids[without_loss:]}


def check(model: Path, recorded: dict, settings: tuple[str, ...]) -> None:
    settings = (*THEIRS, f"model.hf_path={model}", f"bilevel.steps={len(recorded['steps'])}", *settings)
    (found,) = run_distributed(1, run, settings, recorded)
    for number, (mine, theirs) in enumerate(zip(found, recorded["steps"], strict=True), start=1):
        for key, value in mine.items():
            expected = torch.tensor(theirs[key], dtype=torch.float64) / SCALE.get(key, 1.0)
            context = f"{key}, step {number}: "
            torch.testing.assert_close(value, expected, rtol=1e-9, atol=1e-9, msg=context.__add__)


def run(settings: tuple[str, ...], recorded: dict) -> list[dict[str, torch.Tensor]]:
    """On a rank: what the record of each step holds, computed here."""
    config = resolve(open_config(None, list(settings)), vocab_size=300)
    groups = start_process_groups(config.parallel, CPU)
    models, weights = MegatronModels(config, groups, CPU), make_source_weights(config, recorded["sources"])
    bilevel, draws = Bilevel(config, weights), recorded.get("draws_lower_then_upper", [])
    everything = list(range(config.model.shape.num_layers))
    found = []
    for index, step in enumerate(recorded["steps"]):
        drawn = [draw["layers"] for draw in draws if draw["step"] == index // 3 * 3] or [everything, everything]
        active = dict(zip((Role.LOWER, Role.UPPER), drawn, strict=True))
        models.redraw(active)
        before = weights.weights
        result = bilevel.step(models, index + 1, batch(config.data, step), active)
        found.append(
            {
                "weights_before": before,
                "loss_lower": result.train_loss[Role.LOWER],
                "loss_upper": result.train_loss[Role.UPPER],
                "validation_loss": torch.tensor(result.validation_loss, dtype=torch.float64),
                "grad_norm_lower_over_alpha": result.grad_norm[Role.LOWER].double() / 100,
                "grad_norm_upper_over_alpha": result.grad_norm[Role.UPPER].double() / 100,
                "logits_gradient": result.hypergradient / SCALE["logits_gradient"],
            }
        )
    return found


def batch(data: DataConfig, step: dict) -> StepBatch:
    """What they drew. A label at j says that token j is predicted from those before it, as our mask does."""

    def examples(records: list[dict]) -> list[Example]:
        return [
            Example(
                np.array(record["ids"], dtype=np.int32), np.array(record["labels"]) != -100, record.get("source", 0)
            )
            for record in records
        ]

    return batch_of(examples(step["train"]), examples(step["validation"]), len(step["weights_before"]), data)
