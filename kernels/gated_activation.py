"""A gated MLP's activation, `activation(gate) * up`, that keeps nothing but its input for the backward pass.

As operations of its own autograd keeps the activation of the gate too, F numbers of a token beside the 2 F of gate and
up. Both gradients can be made from gate and up alone, and cost a second exponential: bound by memory, forward 3 numbers
are moved for each number of the result, backward 5.

Both activations are `x * sigmoid(v)`: silu with v = x, and gelu with tanh as (1 + tanh(u)) / 2 = sigmoid(2 u).

Shapes: R rows (all leading dimensions), F feed-forward of this tensor-parallel rank. A row of the input is the F
numbers of the gate, then the F numbers of up.
"""

import math
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from megatron_scalebio.kernels.dispatch import on_triton

ACTIVATIONS = {"silu": F.silu, "gelu_tanh": partial(F.gelu, approximate="tanh")}
# (gradient of the activation, x) -> gradient of x: what autograd calls.
_BACKWARD = {
    "silu": torch.ops.aten.silu_backward,
    "gelu_tanh": partial(torch.ops.aten.gelu_backward, approximate="tanh"),
}

LOG2E = tl.constexpr(1.4426950408889634)
# gelu's v is LINEAR * x + CUBIC * x^3.
LINEAR = tl.constexpr(2 * math.sqrt(2 / math.pi))
CUBIC = tl.constexpr(2 * math.sqrt(2 / math.pi) * 0.044715)

TILE_BYTES = 4096  # of one row's gate, and of its up: two 16-byte accesses a thread
NUM_WARPS = 4


def gated_activation(gate_and_up: Tensor, activation: str) -> Tensor:
    """`activation(gate) * up`, with the gradient of both.

    Args:
        gate_and_up: [..., 2 F] bf16, fp32 or fp64. All that is kept for the backward pass.
        activation: a key of ACTIVATIONS.

    Returns: [..., F] in the dtype of `gate_and_up`. A kernel computes in fp32 and rounds once; the reference rounds
        the activation too, as PyTorch's own operations do.
    """
    return _GatedActivation.apply(gate_and_up, activation)


class _GatedActivation(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate_and_up: Tensor, activation: str) -> Tensor:
        ctx.save_for_backward(gate_and_up)
        ctx.activation = activation
        operation = _on_triton if on_triton(gate_and_up) else gated_activation_reference
        return operation(gate_and_up, activation)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        (grad,), (gate_and_up,) = grads, ctx.saved_tensors
        operation = _backward_on_triton if on_triton(gate_and_up) else gated_activation_backward_reference
        return operation(gate_and_up, grad, ctx.activation), None


def gated_activation_reference(gate_and_up: Tensor, activation: str) -> Tensor:
    """`gated_activation` in plain PyTorch."""
    gate, up = gate_and_up.chunk(2, dim=-1)
    return ACTIVATIONS[activation](gate) * up


def gated_activation_backward_reference(gate_and_up: Tensor, grad: Tensor, activation: str) -> Tensor:
    """The gradient [..., 2 F] in plain PyTorch, by autograd's own operations in autograd's order: its bits."""
    gate, up = gate_and_up.chunk(2, dim=-1)
    grad_gate = _BACKWARD[activation](grad * up, gate)
    return torch.cat((grad_gate, grad * ACTIVATIONS[activation](gate)), dim=-1)


def _on_triton(gate_and_up: Tensor, activation: str) -> Tensor:
    features = gate_and_up.shape[-1] // 2
    result = torch.empty(*gate_and_up.shape[:-1], features, dtype=gate_and_up.dtype, device=gate_and_up.device)
    grid, settings = _launch(result, activation)
    _forward_kernel[grid](gate_and_up.contiguous(), result, features, **settings)
    return result


def _backward_on_triton(gate_and_up: Tensor, grad: Tensor, activation: str) -> Tensor:
    gate_and_up, grad = gate_and_up.contiguous(), grad.contiguous()
    grad_gate_and_up = torch.empty_like(gate_and_up)
    grid, settings = _launch(grad, activation)
    _backward_kernel[grid](gate_and_up, grad, grad_gate_and_up, grad.shape[-1], **settings)
    return grad_gate_and_up


def _launch(result: Tensor, activation: str) -> tuple[tuple[int], dict[str, int | bool]]:
    """One program per tile of a row of the result, [..., F]: the grid, and the kernels' constants."""
    block, features = TILE_BYTES // result.element_size(), result.shape[-1]
    rows = result.numel() // max(features, 1)
    grid = (rows * triton.cdiv(features, block),)
    return grid, dict(GELU=activation == "gelu_tanh", BLOCK=block, num_warps=NUM_WARPS)


@triton.jit
def _forward_kernel(
    gate_and_up,  # [R, 2 F] bf16 | fp32
    result,  # [R, F], written
    features,  # F
    GELU: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    row, column, inside = _tile(features, BLOCK)
    gate_and_up += row * 2 * features
    gate = tl.load(gate_and_up + column, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(gate_and_up + features + column, mask=inside, other=0.0).to(tl.float32)
    activated, _ = _activate(gate, GELU)
    tl.store(result + row * features + column, (activated * up).to(result.dtype.element_ty), mask=inside)


@triton.jit
def _backward_kernel(
    gate_and_up,  # [R, 2 F] bf16 | fp32
    grad,  # [R, F], of the result
    grad_gate_and_up,  # [R, 2 F], written
    features,  # F
    GELU: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    row, column, inside = _tile(features, BLOCK)
    gate_and_up += row * 2 * features
    grad_gate_and_up += row * 2 * features
    gate = tl.load(gate_and_up + column, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(gate_and_up + features + column, mask=inside, other=0.0).to(tl.float32)
    of_result = tl.load(grad + row * features + column, mask=inside, other=0.0).to(tl.float32)
    activated, slope = _activate(gate, GELU)
    of_gate, of_up = of_result * up * slope, of_result * activated
    tl.store(grad_gate_and_up + column, of_gate.to(grad_gate_and_up.dtype.element_ty), mask=inside)
    tl.store(grad_gate_and_up + features + column, of_up.to(grad_gate_and_up.dtype.element_ty), mask=inside)


@triton.jit
def _tile(features, BLOCK: tl.constexpr) -> tuple[tl.tensor, tl.tensor, tl.tensor]:
    """This program's row, 64-bit, its columns and which of them there are."""
    tiles_per_row = tl.cdiv(features, BLOCK)
    column = tl.program_id(0) % tiles_per_row * BLOCK + tl.arange(0, BLOCK)
    return (tl.program_id(0) // tiles_per_row).to(tl.int64), column, column < features


@triton.jit
def _activate(x, GELU: tl.constexpr) -> tuple[tl.tensor, tl.tensor]:
    """The activation of `x`, x * sigmoid(v), and its derivative."""
    v, slope_of_v = x, 1.0
    if GELU:
        square = x * x
        v, slope_of_v = x * (LINEAR + CUBIC * square), LINEAR + 3.0 * CUBIC * square
    # 1 - sigmoid(v) is sigmoid(-v): both by a division, as the difference loses its digits where v is large.
    exponential = tl.exp2(tl.abs(v) * -LOG2E)
    large = 1.0 / (1.0 + exponential)
    small = exponential * large
    sigmoid, complement = tl.where(v < 0.0, small, large), tl.where(v < 0.0, large, small)
    activated = x * sigmoid
    return activated, sigmoid + activated * complement * slope_of_v
