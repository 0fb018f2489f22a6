"""`precision.compute=fp8` on a Hopper GPU: are Transformer Engine's FP8 products right, what do they keep, what do they
cost?

    python tools/benchmarks/te_fp8.py --out FILE.json

Per recipe and linear of Qwen2.5-32B at 4,096 tokens: output and both gradients against fp32, bits of two equal weights,
bytes kept for the backward pass, and the time beside bf16. Then a small model's first step: equal losses of lower and
upper, the active layers alone in Transformer Engine, nothing kept by a frozen one. Exit status 1 if a check fails.
"""

import argparse
import json
import sys
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn import Parameter

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from megatron_scalebio.active_layers import Role  # noqa: E402
from megatron_scalebio.config import PrecisionConfig  # noqa: E402
from megatron_scalebio.mcore.te_linear import FP8Product, check_transformer_engine  # noqa: E402
from tools.benchmarks.step_time import make_trainer  # noqa: E402
from tools.benchmarks.timing import measure  # noqa: E402

TOKENS = 4096
LINEARS = {"qkv": (7168, 5120), "proj": (5120, 5120), "fc1": (55296, 5120), "fc2": (5120, 27648)}  # N, K
RECIPES = ("blockwise", "tensorwise")
# Rounding normal numbers: root mean square of the error over that of the numbers, computed on 2^22 of them.
E4M3, E5M2 = 0.0265, 0.0527
# Of a product of two rounded operands the squares add up. blockwise rounds all to E4M3, tensorwise gradients to E5M2.
EXPECTED = {
    "blockwise": dict.fromkeys(("output", "grad_x", "grad_weight"), (E4M3**2 + E4M3**2) ** 0.5),
    "tensorwise": {"output": (E4M3**2 + E4M3**2) ** 0.5}
    | dict.fromkeys(("grad_x", "grad_weight"), (E4M3**2 + E5M2**2) ** 0.5),
}
MODEL = (
    *("model.shape.hidden_size=2048", "model.shape.ffn_hidden_size=5632", "model.shape.num_attention_heads=16"),
    *("model.shape.num_query_groups=4", "data.max_length=272", "data.micro_batch_size=8", "run.device=cuda"),
)


class Checks:
    """What was checked, by name; prints as it goes."""

    def __init__(self):
        self.rows: list[dict] = []

    def add(self, name: str, value: float, low: float, high: float) -> None:
        """Whether low <= value <= high."""
        passed = low <= value <= high
        self.rows.append({"check": name, "value": value, "low": low, "high": high, "passed": passed})
        verdict = "ok    " if passed else "FAILED"
        print(f"{verdict} {name}: {value:.6g}, must be from {low:.6g} to {high:.6g}", flush=True)

    @property
    def passed(self) -> bool:
        return all(row["passed"] for row in self.rows)


def trainable(weight: Tensor) -> Parameter:
    """A copy with a gradient sum of ones: the gradient must be added to it."""
    parameter = Parameter(weight.clone())
    parameter.main_grad = torch.ones(weight.shape, device=weight.device)
    return parameter


def run_product(product: Callable[[Tensor], Tensor], x: Tensor, grad: Tensor) -> tuple[Tensor, Tensor]:
    """Output and gradient of x; the weight's gradient is where the product puts it."""
    x = x.clone().requires_grad_()
    output = product(x)
    output.backward(grad)
    return output.detach(), x.grad


def check_product(checks: Checks, recipe: str, name: str, device: torch.device) -> dict[str, Tensor]:
    """One linear's products against fp32, and a second, equal weight's against its own. Returns the operands."""
    rows, columns = LINEARS[name]
    generator = torch.Generator(device).manual_seed(0)

    def normal(*size: int, scale: float = 1.0) -> Tensor:
        return (scale * torch.randn(size, generator=generator, device=device)).bfloat16()

    x, grad, weight = normal(TOKENS, 1, columns), normal(TOKENS, 1, rows), normal(rows, columns, scale=0.02)
    lower, upper = trainable(weight), trainable(weight)
    output, grad_x = run_product(FP8Product(lower, recipe), x, grad)
    found = {"output": output, "grad_x": grad_x, "grad_weight": lower.main_grad - 1}
    flat_x, flat_grad = x.float().flatten(0, 1), grad.float().flatten(0, 1)
    exact = {
        "output": flat_x @ weight.float().T,
        "grad_x": flat_grad @ weight.float(),
        "grad_weight": flat_grad.T @ flat_x,
    }
    for part, expected in EXPECTED[recipe].items():
        reference = exact[part].view_as(found[part])
        error = ((found[part].float() - reference).norm() / reference.norm()).item()
        # Below a half it was not FP8; above one and a half something else went wrong.
        checks.add(f"{recipe} {name} {part}: error", error, 0.5 * expected, 1.5 * expected)
    again = dict(zip(("output", "grad_x"), run_product(FP8Product(upper, recipe), x, grad), strict=True))
    again["grad_weight"] = upper.main_grad - 1
    differing = sum((again[part] != found[part]).sum().item() for part in found)
    checks.add(f"{recipe} {name}: numbers that differ between equal weights", differing, 0, 0)
    return {"x": x, "grad": grad, "weight": weight}


def kept_bytes(call: Callable[[], Tensor]) -> int:
    """What stays allocated after a forward pass, apart from its output."""
    call()  # workspaces of the libraries
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    output = call()
    torch.cuda.synchronize()
    return torch.cuda.memory_allocated() - before - output.untyped_storage().nbytes()


def check_kept(checks: Checks, recipe: str, name: str, x: Tensor, weight: Tensor) -> None:
    """For its backward pass a product keeps x in FP8, a byte and at most 1/32 of scales a number, and no weight.

    The allocator counts whole blocks, up to 1 MiB more than was asked for: 0.05 of the smallest x. Two FP8 copies of a
    weight would add 2.5 or more.
    """
    product, x = FP8Product(trainable(weight), recipe), x.clone().requires_grad_()
    kept = kept_bytes(lambda: product(x))
    checks.add(f"{recipe} {name}: bytes kept per number of x", kept / x.numel(), 0.9, 1.13)


def times(recipe: str, x: Tensor, grad: Tensor, weight: Tensor, seconds: float) -> dict[str, float]:
    """Milliseconds of forward and backward with the weight's gradient added up in fp32, in FP8 and in bf16."""
    parameter = trainable(weight)
    product = FP8Product(parameter, recipe)

    def bf16() -> None:
        run_product(lambda x: F.linear(x, parameter), x, grad)
        parameter.main_grad.add_(parameter.grad)
        parameter.grad = None

    found = {"fp8": measure(lambda: run_product(product, x, grad), x.device, seconds).median}
    found["bf16"] = measure(bf16, x.device, seconds).median
    return found


def check_model(checks: Checks, recipe: str) -> None:
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
    layers = trainer.models.chunk.models[Role.UPPER.value].decoder.layers
    in_te = [index for index, layer in enumerate(layers) if "_trained_product" in vars(layer.mlp.linear_fc1)]
    checks.add(f"{recipe} model: layers {in_te} in Transformer Engine, {active} active", in_te == sorted(active), 1, 1)
    frozen = next(layer for index, layer in enumerate(layers) if index not in active).mlp.linear_fc1
    x = torch.randn(TOKENS, 1, frozen.weight.shape[1], device="cuda", dtype=torch.bfloat16, requires_grad=True)
    kept = kept_bytes(lambda: frozen(x)[0]) / frozen.weight.numel()  # but for what the allocator rounds up
    checks.add(f"{recipe} model: bytes kept by a frozen linear, per number of its weight", kept, -0.1, 0.1)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, metavar="FILE")
    parser.add_argument("--seconds", type=float, default=0.5, help="of timed runs for each product")
    args = parser.parse_args()
    device, checks, milliseconds = torch.device("cuda"), Checks(), {}
    torch.set_float32_matmul_precision("highest")
    for recipe in RECIPES:
        check_transformer_engine(PrecisionConfig(compute="fp8", fp8_recipe=recipe))
        for name in LINEARS:
            operands = check_product(checks, recipe, name, device)
            check_kept(checks, recipe, name, operands["x"], operands["weight"])
            row = milliseconds[f"{recipe} {name}"] = times(recipe, **operands, seconds=args.seconds)
            print(f"       {recipe} {name}: FP8 {row['fp8']:.3f} ms, bf16 {row['bf16']:.3f} ms", flush=True)
        check_model(checks, recipe)
    import transformer_engine

    about = {"device": torch.cuda.get_device_name(), "torch": torch.__version__, "tokens": TOKENS}
    about["transformer_engine"] = transformer_engine.__version__
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps(about | {"checks": checks.rows, "milliseconds": milliseconds}, indent=1) + "\n")
    print("all checks passed" if checks.passed else "FAILED: see above")
    return 0 if checks.passed else 1


if __name__ == "__main__":
    sys.exit(main())
