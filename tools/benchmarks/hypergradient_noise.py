"""How much rounding noise the hypergradient of a real model carries, where it comes from, and what would remove it.

    python tools/benchmarks/hypergradient_noise.py --model FOLDER --task DIR --at 1,3,10,30 --batches 3 --out FILE.json

Both models train in fp32, so that they come to differ. After each of the steps `--at` their exact weights are put into
hosts of several precisions, which compute the gaps g = L(upper) - L(lower) per source on the same batches, none of
which was trained on. Some of the hosts are fp32 with chosen parts rounded to bf16 (PARTS), alone or all but one: the
first says where noise comes from, the second what would be left if that part were kept in fp32. Reported per step and
precision: the error of g and of the hypergradient p_i (g_i - p . g) at uniform weights p, both relative to fp32's and
as root mean squares, the same by source, and how much fp32's own differ from batch to batch. DIR holds train/*.jsonl
and val.jsonl; further arguments are settings. The file is written after every step.
"""

import argparse
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch
from torch import Tensor

from megatron_scalebio.active_layers import Role
from megatron_scalebio.bilevel import evaluation_pass
from megatron_scalebio.data import StepBatch
from megatron_scalebio.mcore.models import MegatronModels
from megatron_scalebio.run import Run, open_run
from megatron_scalebio.trainer import Trainer
from tools.benchmarks.environment import environment, write_results
from tools.benchmarks.tasks import settings_of

# precision.compute, frozen_weights and frozen_inputs of the hosts that round as the product does.
PRECISIONS = {
    "bf16": ("bf16", None, "compute"),
    "bf16, frozen weights fp8": ("bf16", "fp8", "compute"),
    "fp32, frozen weights fp8": ("fp32", "fp8", "compute"),
    "fp32, frozen weights and inputs fp8": ("fp32", "fp8", "fp8"),
}

# What bf16 rounds: every weight; inside the layers what goes in and out of norms, products and attention; the residual
# stream after the embedding and after each addition; what the head multiplies.
PARTS = ("weights", "branches", "residual", "head")
BRANCH_MODULES = ("layernorm", "linear_qkv", "linear_proj", "linear_fc1", "linear_fc2", "core_attention")

Layers = dict[Role, list[int]]


def copy_weights(
    trained: MegatronModels, models: MegatronModels, active_layers: Layers, ever_active: dict[Role, set[int]]
) -> None:
    """Make `models`, freshly built in another precision, hold the exact weights of `trained`."""
    models.redraw({role: sorted(layers) for role, layers in ever_active.items()})
    for role, active_set in models.active_sets.items():
        for name, active in active_set.blocks.items():
            exact = trained.persistence.exact(role, name)
            assert exact is not None  # as of all that trains
            active.master.copy_(exact)
            active.block.flat[active.shard] = active.master
    models.redraw(active_layers)


def rounded(value: Any) -> Any:
    """To bf16 and back, of every tensor of numbers in a module's inputs or outputs."""
    if isinstance(value, tuple):
        return tuple(rounded(part) for part in value)
    return value.bfloat16().to(value.dtype) if isinstance(value, Tensor) and value.is_floating_point() else value


@contextmanager
def rounding(models: MegatronModels, parts: frozenset[str]) -> Iterator[None]:
    """Round these parts of fp32 models, weights aside, in every forward pass."""
    handles, wrapped = [], []
    for name, module in models.chunk.named_modules():
        last = name.rpartition(".")[2]
        in_layer = ".layers." in name and any(last.endswith(kind) for kind in BRANCH_MODULES)
        ends_residual = last == "word_embeddings" or name.rpartition(".")[0].endswith("layers")
        ends_head = last == "final_layernorm"
        if in_layer and "branches" in parts:
            handles.append(module.register_forward_pre_hook(lambda _, inputs: rounded(inputs)))
        if in_layer and "branches" in parts or ends_residual and "residual" in parts or ends_head and "head" in parts:
            handles.append(module.register_forward_hook(lambda _, inputs, output: rounded(output)))
        if ends_residual and "residual" in parts and hasattr(module, "self_attn_bda"):
            wrapped.append((module, module.self_attn_bda))
            module.self_attn_bda = _rounding_addition(module.self_attn_bda)
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
        for module, addition in wrapped:
            module.self_attn_bda = addition


def _rounding_addition(make: Any) -> Any:
    """Of Megatron-Core's get_bias_dropout_add, whose result adds attention's output to the residual stream."""
    return lambda *options: lambda *inputs: rounded(make(*options)(*inputs))


def gaps(models: MegatronModels, batch: StepBatch, unit: str) -> Tensor:
    """g of a batch, [K] fp64; nothing is updated."""
    counts = batch.num_examples, batch.num_loss_tokens
    weights = torch.ones(len(batch.num_examples), dtype=torch.float64)  # of each source its own mean
    lower, upper = (
        models.evaluate(evaluation_pass("train", batch.train, counts, weights, unit, role))
        for role in (Role.LOWER, Role.UPPER)
    )
    return upper - lower


def gaps_by_precision(
    run: Run, trainer: Trainer, ever_active: dict[Role, set[int]], batches: list[StepBatch]
) -> Iterator[tuple[str, Tensor]]:
    """(precision, [batches, K]) of the trainer's models as they stand, fp32 first."""
    unit = run.config.bilevel.train_loss_unit

    def host(compute: str = "fp32", frozen: str | None = None, inputs: str = "compute") -> MegatronModels:
        precision = replace(run.config.precision, compute=compute, frozen_weights=frozen, frozen_inputs=inputs)
        models = MegatronModels(replace(run.config, precision=precision), trainer.groups, trainer.device)
        copy_weights(trainer.models, models, trainer.active_layers, ever_active)
        return models

    def of(models: MegatronModels) -> Tensor:
        return torch.stack([gaps(models, batch, unit) for batch in batches])

    every = frozenset(PARTS)
    for weights in (False, True):
        models = host()
        if weights:
            for parameter in models.chunk.parameters():
                parameter.data.copy_(rounded(parameter.data))
        chosen = [frozenset(), every - {"weights"}, *(frozenset({part}) for part in PARTS[1:])]
        if weights:
            chosen = [frozenset(), every, *(every - {part} for part in PARTS[1:])]
        for parts in chosen:
            here = parts | {"weights"} if weights else parts
            with rounding(models, parts):
                yield described(here), of(models)
        del models  # before the next is built
    for name, precision in PRECISIONS.items():
        yield name, of(host(*precision))


def described(parts: frozenset[str]) -> str:
    if not parts:
        return "fp32"
    left = [part for part in PARTS if part not in parts]
    if not left:
        return "rounded: all"
    return f"rounded: all but {left[0]}" if len(left) == 1 else f"rounded: {', '.join(sorted(parts))}"


def summary(step: int, name: str, gap: Tensor, exact: Tensor) -> dict[str, Any]:
    """Errors over batches [B, K]."""

    def hypergradient(gap: Tensor) -> Tensor:
        return (gap - gap.mean(1, keepdim=True)) / gap.shape[1]

    def rms(values: Tensor) -> float:
        return values.square().mean().sqrt().item()

    ours, theirs = hypergradient(gap), hypergradient(exact)
    return {
        "step": step,
        "precision": name,
        "gap_rms": rms(exact),
        "gap_noise": rms(gap - exact),
        "gap_error": rms(gap - exact) / rms(exact),
        "hypergradient_error": rms(ours - theirs) / rms(theirs),
        "hypergradient_batch_to_batch": rms(theirs - theirs.mean(0)) / rms(theirs),
        "gap_noise_by_source": (gap - exact).square().mean(0).sqrt().tolist(),
        "gap_by_source": exact.mean(0).tolist(),
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--task", type=Path, required=True)
    parser.add_argument("--at", default="1,3,10", help="steps, rising; default: %(default)s")
    parser.add_argument("--batches", type=int, default=4)
    parser.add_argument("--out", type=Path)
    parser.add_argument("settings", nargs="*", metavar="section.key=value")
    args = parser.parse_intermixed_args()

    settings = [f"model.hf_path={args.model}", f"data.tokenizer={args.model}", "data.template=plain"]
    settings += ["precision.compute=fp32", "data.sampling=stratified"]  # of each source as many
    run = open_run(None, [*settings, *settings_of(args.task), "data.test=null", *args.settings], writes=False)
    trainer, ever_active, rows = Trainer(run), {}, []
    at = [int(step) for step in args.at.split(",")]
    weights = trainer.source_weights.weights.tolist()
    batches = [trainer.sampler.step(at[-1] + 1 + index, weights) for index in range(args.batches)]
    for step in range(1, at[-1] + 1):
        trainer.take_step()
        for role, layers in trainer.active_layers.items():
            ever_active.setdefault(role, set()).update(layers)
        if step not in at:
            continue
        exact = None
        for name, gap in gaps_by_precision(run, trainer, ever_active, batches):
            exact = gap if exact is None else exact
            rows.append(summary(step, name, gap, exact))
            told = {key: value for key, value in rows[-1].items() if not isinstance(value, list)}
            texts = (f"{key} {value:.3g}" if isinstance(value, float) else f"{value}" for key, value in told.items())
            print("  ".join(texts), flush=True)
        names = run.dataset.source_names
        write_results(
            args.out, {"environment": environment(trainer.device, args.settings), "sources": names, "rows": rows}
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())
