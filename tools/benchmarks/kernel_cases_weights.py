"""The operations on weights as benchmark cases: the update, the norm that clips it, FP8 and the frozen linear layer.

Shapes: n parameters; M tokens, K input and N output features.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from megatron_scalebio.kernels.adamw import adamw_update, adamw_update_reference
from megatron_scalebio.kernels.fp8 import (
    SCALE_BLOCK,
    BlockScaled,
    dequantize,
    dequantize_reference,
    quantize,
    quantize_reference,
    transpose,
    transpose_reference,
)
from megatron_scalebio.kernels.frozen_linear import frozen_linear, matmul
from megatron_scalebio.kernels.moments import FIRST, SECOND, Moment, load_reference, store_reference
from megatron_scalebio.kernels.sum_of_squares import sum_of_squares
from tools.benchmarks import kernel_peers
from tools.benchmarks.kernel_checks import NEAR_BANDWIDTH, Case, Contender, Outputs, Target

# The second is no multiple of 16 bytes: its last parameters need a mask.
NUM_PARAMETERS = {"cuda": [2**28, 2**28 + 3], "cpu": [5000]}
QUICK_NUM_PARAMETERS = {"cuda": [2**27, 2**27 + 3], "cpu": [5000]}

# (N, K) of Qwen2.5-32B's linear layers: query, key and value; attention output; gate and up; down.
LINEARS = {"cuda": [(7168, 5120), (5120, 5120), (55296, 5120), (5120, 27648)], "cpu": [(256, 384)]}
NUM_TOKENS = {"cuda": 8192, "cpu": 48}

BYTES_PER_PARAMETER = {"fp32": 30, "bf16": 22, "fp8": 18}  # of an update, by how moments are stored

CUBLAS = "cuBLAS in bf16"


@dataclass(frozen=True)
class UpdateInputs:
    """Of the AdamW update; [n] each."""

    weights: Tensor  # bf16
    master: Tensor  # fp32, as small as its update, so that an error of the update shows
    gradient: Tensor  # fp32
    exp_avg: Tensor | Moment  # fp32, or as it is stored
    exp_avg_sq: Tensor | Moment
    gradient_scale: Tensor  # scalar fp32
    num_decayed: int


@dataclass(frozen=True)
class LinearInputs:
    """Of the frozen linear layer."""

    x: Tensor  # [M, K] bf16, requires a gradient
    grad: Tensor  # [M, N] bf16, of the output
    original: Tensor  # [N, K] bf16, before it was quantised
    weight: BlockScaled  # [N, K]
    weight_bf16: Tensor  # [N, K], its values


def adamw_update_cases(device: torch.device, quick: bool) -> list[Case]:
    """Scale the gradient, AdamW, cast to bf16. Stored moments are rounded by draws: what they feed is checked."""

    def case(size: int, moments: str) -> Case:
        outputs = ("weights", "master") if moments != "fp32" else kernel_peers.UPDATED

        def update(operation: Callable[..., None], inputs: UpdateInputs) -> Outputs:
            updated = kernel_peers.update(operation, inputs)
            return {name: updated[name] for name in outputs}

        def reference(inputs: UpdateInputs, exact: bool) -> Outputs:
            return update(adamw_update_reference, _in_fp64(inputs) if exact else inputs)

        num_bytes = BYTES_PER_PARAMETER[moments] * size
        return Case(
            operation="adamw_update",
            shape=dict(n=size, moments=moments),
            make_inputs=lambda: _with_moments(_update_inputs(size, device), moments),
            reference=reference,
            ours=(Contender("ours", partial(update, adamw_update), num_bytes=num_bytes),),
            peers=kernel_peers.ADAMW if moments == "fp32" else (),
            targets=NEAR_BANDWIDTH,
        )

    sizes = _num_parameters(device, quick)
    return [*(case(size, "fp32") for size in sizes), *(case(sizes[0], moments) for moments in ("bf16", "fp8"))]


def _num_parameters(device: torch.device, quick: bool) -> list[int]:
    return (QUICK_NUM_PARAMETERS if quick else NUM_PARAMETERS)[device.type]


def _update_inputs(size: int, device: torch.device) -> UpdateInputs:
    torch.manual_seed(0)
    random = partial(torch.randn, device=device)
    return UpdateInputs(
        weights=torch.full((size,), torch.nan, dtype=torch.bfloat16, device=device),
        master=random(size).mul_(1e-3),
        gradient=random(size),
        exp_avg=random(size).mul_(0.1),
        exp_avg_sq=random(size).square_().mul_(0.1),
        gradient_scale=torch.tensor(0.75, device=device),
        num_decayed=size - size // 8,
    )


def _with_moments(inputs: UpdateInputs, moments: str) -> UpdateInputs:
    if moments == "fp32":
        return inputs
    stored: dict[str, Any] = {}
    for which, name in ((FIRST, "exp_avg"), (SECOND, "exp_avg_sq")):
        numbers = getattr(inputs, name)
        stored[name] = Moment.zeros(len(numbers), moments, numbers.dtype, numbers.device)
        store_reference(stored[name], numbers, which, 1, 0)
    return replace(inputs, **stored)


def _in_fp64(inputs: UpdateInputs) -> UpdateInputs:
    """The same numbers; moments as they are stored become plain tensors."""
    values: dict[str, Any] = vars(inputs) | {
        name: load_reference(getattr(inputs, name), which)
        for which, name in ((FIRST, "exp_avg"), (SECOND, "exp_avg_sq"))
        if isinstance(getattr(inputs, name), Moment)
    }
    return UpdateInputs(**{name: value.double() if name != "num_decayed" else value for name, value in values.items()})


def sum_of_squares_cases(device: torch.device, quick: bool) -> list[Case]:
    def make_inputs(size: int) -> Tensor:
        torch.manual_seed(0)
        return torch.randn(size, device=device)

    return [
        Case(
            operation="sum_of_squares",
            shape=dict(n=size),
            make_inputs=partial(make_inputs, size),
            reference=lambda gradient, exact: {"sum": gradient.double().square().sum()},
            ours=(Contender("ours", lambda gradient: {"sum": sum_of_squares(gradient)}, num_bytes=4 * size),),
            peers=kernel_peers.SUM_OF_SQUARES,
            targets=NEAR_BANDWIDTH,
        )
        for size in _num_parameters(device, quick)
    ]


def fp8_cases(device: torch.device, quick: bool) -> list[Case]:
    """To FP8, back, back with a difference, and turned: 2 + 1, 1 + 2, 2 + 2, 1 + 1 bytes a number; scales are few."""
    outputs, features = LINEARS[device.type][-1]

    def numbers() -> Tensor:
        torch.manual_seed(0)
        return torch.randn(outputs, features, dtype=torch.bfloat16, device=device)

    def weight() -> BlockScaled:
        return quantize_reference(numbers(), SCALE_BLOCK)

    def beside() -> BlockScaled:
        return replace(weight(), difference=quantize_reference(numbers().flip(0) / 512, SCALE_BLOCK))

    def parts(q: BlockScaled) -> Outputs:
        return {"data": q.data, "scale": q.scale}

    def case(
        what: str,
        num_bytes: int,
        make_inputs: Callable[[], Any],
        run: Callable[[Any], Outputs],
        reference: Callable[[Any], Outputs],
    ) -> Case:
        return Case(
            operation="fp8",
            shape=dict(what=what, R=outputs, C=features),
            make_inputs=make_inputs,
            reference=lambda x, exact: {name: output.double() for name, output in reference(x).items()},
            ours=(Contender("ours", run, num_bytes=num_bytes * outputs * features),),
        )

    def quantize_case(rows: int) -> Case:
        return case(
            *(f"quantize {rows}x{SCALE_BLOCK}", 3, numbers),
            *(lambda x: parts(quantize(x, rows)), lambda x: parts(quantize_reference(x, rows))),
        )

    return [
        quantize_case(1),
        quantize_case(SCALE_BLOCK),
        case(
            *("dequantize", 3, weight),
            lambda q: {"numbers": dequantize(q, torch.bfloat16)},
            lambda q: {"numbers": dequantize_reference(q, torch.bfloat16)},
        ),
        case(
            *("dequantize with a difference", 4, beside),
            lambda q: {"numbers": dequantize(q, torch.bfloat16)},
            lambda q: {"numbers": dequantize_reference(q, torch.bfloat16)},
        ),
        case("transpose", 2, weight, lambda q: parts(transpose(q)), lambda q: parts(transpose_reference(q))),
    ]


def frozen_linear_cases(device: torch.device, quick: bool) -> list[Case]:
    """Forward and gradient of the input, rounding of both left operands to FP8 included."""

    def run(inputs: LinearInputs) -> Outputs:
        y = frozen_linear(inputs.x, inputs.weight)
        (grad_x,) = torch.autograd.grad(y, inputs.x, inputs.grad)
        return {"y": y, "grad_x": grad_x}

    def cublas(inputs: LinearInputs) -> Outputs:
        return {"y": inputs.x.detach() @ inputs.weight_bf16.T, "grad_x": inputs.grad @ inputs.weight_bf16}

    return _at_all_linears(
        device,
        "frozen_linear",
        products=2,
        reference=_plain_linear,
        ours=(Contender("ours", run),),
        floors=(Contender(CUBLAS, cublas),),
        peers=kernel_peers.FROZEN_LINEAR,
        targets=(Target(CUBLAS, 1 / 1.5),),
    )


def frozen_linear_dgrad_cases(device: torch.device, quick: bool) -> list[Case]:
    """Ways to the gradient of the input from a weight that is stored row-major for the forward pass."""

    def transposed(inputs: LinearInputs) -> Outputs:
        return {"grad_x": matmul(quantize(inputs.grad, 1), transpose(inputs.weight), inputs.grad.dtype)}

    def as_view(inputs: LinearInputs) -> Outputs:
        view = BlockScaled(inputs.weight.data.T, inputs.weight.scale.T, SCALE_BLOCK)
        return {"grad_x": matmul(quantize(inputs.grad, 1), view, inputs.grad.dtype)}

    def dequantized(inputs: LinearInputs) -> Outputs:
        return {"grad_x": inputs.grad @ dequantize(inputs.weight, inputs.grad.dtype)}

    return _at_all_linears(
        device,
        "frozen_linear_dgrad",
        products=1,
        reference=lambda inputs, exact: {"grad_x": _plain_linear(inputs, exact)["grad_x"]},
        ours=(Contender("transpose, then multiply", transposed), Contender("transpose in the registers", as_view)),
        floors=(Contender(CUBLAS, lambda inputs: {"grad_x": inputs.grad @ inputs.weight_bf16}),),
        peers=(Contender("dequantise, cuBLAS in bf16", dequantized),),  # does not round the gradient to FP8
    )


def _at_all_linears(device: torch.device, operation: str, products: int, **parts: Any) -> list[Case]:
    """Args: products: matrix products of M x N x K in the operation."""
    tokens = NUM_TOKENS[device.type]
    return [
        Case(
            operation=operation,
            shape=dict(M=tokens, N=outputs, K=features),
            make_inputs=partial(_linear_inputs, tokens, outputs, features, device),
            flops=products * 2 * tokens * features * outputs,
            **parts,
        )
        for outputs, features in LINEARS[device.type]
    ]


def _linear_inputs(tokens: int, outputs: int, features: int, device: torch.device) -> LinearInputs:
    torch.manual_seed(0)
    random = partial(torch.randn, dtype=torch.bfloat16, device=device)
    original = random(outputs, features).mul_(features**-0.5)
    weight = quantize(original, SCALE_BLOCK)
    return LinearInputs(
        x=random(tokens, features).requires_grad_(),
        grad=random(tokens, outputs),
        original=original,
        weight=weight,
        weight_bf16=dequantize(weight, torch.bfloat16),
    )


def _plain_linear(inputs: LinearInputs, exact: bool) -> Outputs:
    """On the operands as rounded to FP8, in plain PyTorch in fp64 or fp32; fp32 results are rounded as ours are."""
    dtype = torch.float64 if exact else torch.float32
    x, grad = (dequantize_reference(quantize_reference(t.detach(), 1), dtype) for t in (inputs.x, inputs.grad))
    weight = dequantize_reference(quantize_reference(inputs.original, SCALE_BLOCK), dtype)
    result = torch.float64 if exact else inputs.x.dtype
    return {"y": (x @ weight.T).to(result), "grad_x": (grad @ weight).to(result)}
