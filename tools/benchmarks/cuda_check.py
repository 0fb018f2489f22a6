"""The first steps on CUDA: correctness before speed.

    python tools/benchmarks/cuda_check.py fp32      scaled_dot_product_attention, NCCL, the Triton kernels
    python tools/benchmarks/cuda_check.py bf16      torch's variable-length flash attention, tensor-core products
    python tools/benchmarks/cuda_check.py fp8       active layers, and they alone, in Transformer Engine

fp32 and bf16 are held against the golden run of tests/golden (fp64, CPU); fp8 against bf16, on a model whose shapes FP8
takes. Exits with status 1 if a check fails.
"""

import argparse
import json
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch

from megatron_scalebio.active_layers import Role
from tools.benchmarks.environment import environment, write_results
from tools.benchmarks.golden_run import golden_run
from tools.benchmarks.kernel_cases_te import ROUNDING, kept_bytes, why_not
from tools.benchmarks.kernel_checks import probe_in_words, probe_row
from tools.benchmarks.step_ratios import make_trainer
from tools.benchmarks.tasks import ROOT

GOLDEN = ROOT / "tests" / "golden" / "arithmetic.json"
# Mean losses near 5.5, absolute: some ten times what the CPU's own fp32 (2e-8 in sums of another order: 1e-7) and
# bf16 (1.3e-4) are off by at the first step.
TOLERANCE = {"fp32": 1e-6, "bf16": 2e-3}

MODEL = (
    *("model.shape.hidden_size=2048", "model.shape.ffn_hidden_size=5632", "model.shape.num_attention_heads=16"),
    *("model.shape.num_query_groups=4", "data.max_length=272", "data.micro_batch_size=8", "run.device=cuda"),
)
FROZEN_TOKENS = 4096


class Checks:
    """What was checked; prints as it goes."""

    def __init__(self):
        self.rows: list[dict[str, Any]] = []

    def add(self, name: str, value: float, least: float, most: float) -> None:
        self.rows.append(probe_row(name, value, least, most))
        print(probe_in_words(self.rows[-1]), flush=True)


def check_golden_run(checks: Checks, compute: str, device: str = "cuda") -> None:
    """The first step's losses and hypergradient; how the later steps drift apart is only printed."""
    records = golden_run(f"precision.compute={compute}", f"run.device={device}")
    golden = json.loads(GOLDEN.read_text(encoding="utf-8"))
    errors = [
        {
            key: max(abs(record[key][name] - value) for name, value in expected[key].items())
            for key in ("train_loss_lower", "train_loss_upper", "hypergradient", "weights")
        }
        for record, expected in zip(records, golden, strict=True)
    ]
    for step, error in enumerate(errors, start=1):
        print(f"step {step}", "  ".join(f"{key} off by {value:.2e}" for key, value in error.items()))
    for key in ("train_loss_lower", "train_loss_upper"):
        checks.add(f"{compute}, step 1, {key}: off by", errors[0][key], 0, TOLERANCE[compute])
    largest = max(map(abs, records[0]["hypergradient"].values()))
    checks.add(f"{compute}, step 1: largest hypergradient of two equal models", largest, 0, 0)


def check_fp8_model(checks: Checks, recipe: str) -> None:
    """The first step of a small model."""
    losses = {}
    for compute in ("bf16", "fp8"):
        trainer = make_trainer(2, [*MODEL, f"precision.compute={compute}", f"precision.fp8_recipe={recipe}"])
        _, result = trainer.take_step()
        losses[compute] = result.train_loss[Role.UPPER]
        differing = (result.train_loss[Role.LOWER] != losses[compute]).sum().item()
        checks.add(f"{recipe} model in {compute}: losses that differ between lower and upper", differing, 0, 0)
    off = (losses["fp8"] - losses["bf16"]).abs().max().item()
    checks.add(f"{recipe} model: largest difference of a source's loss from bf16, in nats", off, 1e-9, 0.05)
    active = trainer.active_layers[Role.UPPER]
    layers = trainer.models.chunk.model(Role.UPPER).decoder.layers
    in_te = [index for index, layer in enumerate(layers) if "_trained_product" in vars(layer.mlp.linear_fc1)]
    checks.add(f"{recipe} model: layers {in_te} in Transformer Engine, {active} active", in_te == sorted(active), 1, 1)
    frozen = next(layer for index, layer in enumerate(layers) if index not in active).mlp.linear_fc1
    x = torch.randn(
        FROZEN_TOKENS, 1, frozen.weight.shape[1], dtype=torch.bfloat16, device=trainer.device, requires_grad=True
    )
    kept = kept_bytes(lambda: frozen(x)[0]) / frozen.weight.numel()  # but for what the allocator rounds up
    checks.add(f"{recipe} model: bytes kept by a frozen linear, per number of its weight", kept, -0.1, 0.1)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("compute", choices=(*TOLERANCE, "fp8"))
    parser.add_argument("--out", type=Path, metavar="FILE", help="JSON file for the checks")
    args = parser.parse_args()
    checks = Checks()
    if args.compute in TOLERANCE:
        check_golden_run(checks, args.compute)
    elif reason := why_not(torch.device("cuda")):
        print(f"error: {reason}", file=sys.stderr)
        return 2
    else:
        for recipe in ROUNDING:
            check_fp8_model(checks, recipe)
    write_results(args.out, {"environment": environment(torch.device("cuda")), "checks": checks.rows})
    passed = all(row["passed"] for row in checks.rows)
    print("ok" if passed else "FAILED: see above")
    return 0 if passed else 1


if __name__ == "__main__":
    sys.exit(main())
