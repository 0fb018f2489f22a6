"""Transformer Engine's FP8 products, `precision.compute=fp8`, as benchmark cases: errors, and what they keep.

Shapes: T tokens, K input and N output features.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn import Parameter

from megatron_scalebio.config import PrecisionConfig, UserError
from megatron_scalebio.mcore import te_linear
from tools.benchmarks.kernel_cases_weights import CUBLAS, LINEARS
from tools.benchmarks.kernel_checks import Case, Contender, Outputs, Probe

TOKENS = {"cuda": 4096, "cpu": 48}
# Rounding normal numbers: root mean square of the error over that of the numbers, computed on 2^22 of them.
E4M3, E5M2 = 0.0265, 0.0527
# Of a product of two rounded operands the squares add up. blockwise rounds all to E4M3, tensorwise gradients to E5M2.
OF_ACTIVATIONS, OF_GRADIENTS = (E4M3**2 + E4M3**2) ** 0.5, (E4M3**2 + E5M2**2) ** 0.5
ROUNDING = {
    "blockwise": dict.fromkeys(("y", "grad_x", "grad_weight"), OF_ACTIVATIONS),
    "tensorwise": {"y": OF_ACTIVATIONS, "grad_x": OF_GRADIENTS, "grad_weight": OF_GRADIENTS},
}


class TrainedInputs(NamedTuple):
    x: Tensor  # [T, 1, K] bf16, requires a gradient
    grad: Tensor  # [T, 1, N] bf16, of the output
    weight: Any  # a Parameter, [N, K] bf16, with main_grad [N, K] fp32, to which its gradient is added
    product: te_linear.FP8Product  # with that weight


def why_not(device: torch.device) -> str | None:
    """Why the products cannot run there; None: they can."""
    if device.type != "cuda":
        return "its products need a GPU"
    for recipe in ROUNDING:
        try:
            te_linear.check_transformer_engine(PrecisionConfig(compute="fp8", fp8_recipe=recipe))
        except UserError as error:
            return str(error)
    return None


def te_linear_cases(device: torch.device, quick: bool) -> list[Case]:
    """Forward and both gradients, the weight's added up in fp32; against the truth of operands that are not rounded."""
    tokens = TOKENS[device.type]
    return [
        Case(
            operation="te_linear",
            shape=dict(T=tokens, N=outputs, K=features, recipe=recipe),
            make_inputs=partial(_inputs, tokens, outputs, features, recipe, device),
            reference=_exact,
            ours=(Contender("ours", lambda inputs: _run(inputs, inputs.product)),),
            floors=(Contender(CUBLAS, _run_in_bf16),),
            flops=6 * tokens * features * outputs,
            rounding=ROUNDING[recipe],
            probes=(
                # lower and upper begin with equal weights, and their losses must be equal bit for bit.
                Probe("numbers that differ between equal weights", partial(_differing, recipe), 0, 0),
                # x in FP8, a byte and at most 1/32 of scales a number, and no weight. The allocator counts whole
                # blocks, up to 1 MiB more than was asked for: 0.05 of the smallest x. Two FP8 copies of a weight would
                # add 2.5 or more.
                Probe("bytes kept for the backward pass per number of x", _kept, 0.9, 1.13),
            ),
        )
        for recipe in ROUNDING
        for outputs, features in LINEARS[device.type]
    ]


def _inputs(tokens: int, outputs: int, features: int, recipe: str, device: torch.device) -> TrainedInputs:
    torch.manual_seed(0)
    random = partial(torch.randn, dtype=torch.bfloat16, device=device)
    weight: Any = Parameter(random(outputs, features).mul_(0.02))
    # A quarter of the gradient: little beside its rounding, but were it overwritten, three times the error allowed.
    weight.main_grad = torch.randn(outputs, features, device=device).mul_(tokens**0.5 / 4)
    product = te_linear.FP8Product(weight, recipe)
    return TrainedInputs(random(tokens, 1, features).requires_grad_(), random(tokens, 1, outputs), weight, product)


def _run(inputs: TrainedInputs, product: Callable[[Tensor], Tensor]) -> Outputs:
    """By a product that adds to the weight's main_grad."""
    x = inputs.x.detach().requires_grad_()
    y = product(x)
    y.backward(inputs.grad)
    assert x.grad is not None
    return {"y": y, "grad_x": x.grad, "grad_weight": inputs.weight.main_grad}


def _run_in_bf16(inputs: TrainedInputs) -> Outputs:
    outputs = _run(inputs, lambda x: F.linear(x, inputs.weight))
    inputs.weight.main_grad.add_(inputs.weight.grad)
    inputs.weight.grad = None
    return outputs


def _exact(inputs: TrainedInputs, exact: bool) -> Outputs:
    x, grad, weight = (tensor.detach().double() for tensor in inputs[:3])
    grad_weight = grad.flatten(0, 1).T @ x.flatten(0, 1) + inputs.weight.main_grad
    return {"y": x @ weight.T, "grad_x": grad @ weight, "grad_weight": grad_weight}


def _differing(recipe: str, inputs: TrainedInputs) -> float:
    """How many numbers another, equal weight's products have that are not the weight's own."""
    weight: Any = Parameter(inputs.weight.detach().clone())
    weight.main_grad = inputs.weight.main_grad.clone()
    other = inputs._replace(weight=weight, product=te_linear.FP8Product(weight, recipe))
    first, second = (_run(each, each.product) for each in (inputs, other))
    return sum((first[name] != second[name]).sum().item() for name in first)


def _kept(inputs: TrainedInputs) -> float:
    return kept_bytes(lambda: inputs.product(inputs.x)) / inputs.x.numel()


def kept_bytes(call: Callable[[], Tensor]) -> int:
    """What stays allocated on the GPU after a forward pass, apart from its output."""
    call()  # workspaces of the libraries
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    output = call()
    torch.cuda.synchronize()
    return torch.cuda.memory_allocated() - before - output.untyped_storage().nbytes()
