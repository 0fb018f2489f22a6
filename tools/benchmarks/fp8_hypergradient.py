"""What FP8 in frozen layers does to the hypergradient of a real model, against bf16 and fp32 weights.

    python tools/benchmarks/fp8_hypergradient.py --model FOLDER --task DIR --steps 10 --batches 4 --out FILE.json

Both models train in fp32 for some steps, so that they differ. Then their exact weights are put into hosts of several
precisions, which compute the gaps g = L(upper) - L(lower) per source on the same batches, none of which was trained on.
Reported per precision: the error of g and of the hypergradient p_i (g_i - p . g) at uniform weights p, both relative to
fp32's, beside how much fp32's own differ from batch to batch. DIR holds train/*.jsonl and val.jsonl; further arguments
are settings.
"""

import argparse
import sys
from dataclasses import replace
from pathlib import Path
from typing import NoReturn

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch

from megatron_scalebio.active_layers import Role
from megatron_scalebio.bilevel import Bilevel, Pass
from megatron_scalebio.data import StepBatch
from megatron_scalebio.mcore.models import MegatronModels
from megatron_scalebio.run import open_run
from megatron_scalebio.trainer import Trainer
from tools.benchmarks.environment import environment, write_results
from tools.benchmarks.tasks import settings_of

# precision.compute, frozen_weights and frozen_inputs; the first is what the others are held against.
PRECISIONS = {
    "fp32": ("fp32", None, "compute"),
    "fp32, frozen weights fp8": ("fp32", "fp8", "compute"),
    "fp32, frozen weights and inputs fp8": ("fp32", "fp8", "fp8"),
    "bf16": ("bf16", None, "compute"),
    "bf16, frozen weights fp8": ("bf16", "fp8", "compute"),
}

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


def gaps(models: MegatronModels, bilevel: Bilevel, batch: StepBatch, active_layers: Layers) -> torch.Tensor:
    """g of a batch, [K] fp64; nothing is updated."""
    taken = {}

    class Watched:
        """The models, which report the losses of a step and refuse its updates."""

        def forward_backward(self, passes: list[Pass], fingerprint: int) -> NoReturn:
            losses = models.forward_backward(passes, fingerprint)
            taken.update({(part.role, part.split): loss for part, loss in zip(passes, losses, strict=True)})
            raise StopIteration

        def step(self, role: Role, lr: float, max_norm: float | None) -> NoReturn:
            raise AssertionError

    try:
        bilevel.step(Watched(), 1, batch, active_layers)
    except StopIteration:
        pass
    return taken[Role.UPPER, "train"] - taken[Role.LOWER, "train"]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--task", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--batches", type=int, default=4)
    parser.add_argument("--out", type=Path)
    parser.add_argument("settings", nargs="*", metavar="section.key=value")
    args = parser.parse_intermixed_args()

    settings = [f"model.hf_path={args.model}", "data.template=plain", "precision.compute=fp32"]
    run = open_run(None, [*settings, *settings_of(args.task), "data.test=null", *args.settings], writes=False)
    trainer, ever_active = Trainer(run), {}
    for _ in range(args.steps):
        trainer.take_step()
        for role, layers in trainer.active_layers.items():
            ever_active.setdefault(role, set()).update(layers)
    weights = trainer.source_weights.weights.tolist()
    batches = [trainer.sampler.step(args.steps + 1 + index, weights) for index in range(args.batches)]
    found = {}
    for name, (compute, frozen, inputs) in PRECISIONS.items():
        precision = replace(run.config.precision, compute=compute, frozen_weights=frozen, frozen_inputs=inputs)
        variant = replace(run.config, precision=precision)
        models = MegatronModels(variant, trainer.groups, trainer.device)
        copy_weights(trainer.models, models, trainer.active_layers, ever_active)
        found[name] = torch.stack([gaps(models, trainer.bilevel, batch, trainer.active_layers) for batch in batches])
        print(f"{name}: {[[round(value, 5) for value in row] for row in found[name].tolist()]}", flush=True)
    rows = [summary(name, gap, found["fp32"]) for name, gap in found.items()]
    for row in rows:
        print("  ".join(f"{key} {value if isinstance(value, str) else f'{value:.3g}'}" for key, value in row.items()))
    content = {
        "environment": environment(trainer.device, args.settings),
        "sources": run.dataset.source_names,
        "rows": rows,
        "gaps": {name: gap.tolist() for name, gap in found.items()},
    }
    write_results(args.out, content)
    return 0


def summary(name: str, gap: torch.Tensor, exact: torch.Tensor) -> dict[str, str | float]:
    """Errors over batches [B, K], as root mean squares."""
    p = 1 / gap.shape[1]

    def hypergradient(gap: torch.Tensor) -> torch.Tensor:
        return p * (gap - gap.mean(1, keepdim=True))

    def rms(values: torch.Tensor) -> float:
        return values.square().mean().sqrt().item()

    ours, theirs = hypergradient(gap), hypergradient(exact)
    return {
        "precision": name,
        "gap_rms": rms(gap),
        "gap_error": rms(gap - exact) / rms(exact),
        "hypergradient_rms": rms(ours),
        "hypergradient_error": rms(ours - theirs) / rms(theirs),
        "hypergradient_batch_to_batch": rms(theirs - theirs.mean(0)) / rms(theirs),
    }


if __name__ == "__main__":
    sys.exit(main())
