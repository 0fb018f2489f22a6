"""Sum of squares of a flat gradient, in fp64, without a host synchronisation: 4 bytes read per parameter.

Programs add up interleaved tiles, then one sum adds up the programs: a fixed number of them, so that the order of
additions, and with it the norm that clips, is the same on every GPU.

Shapes: n numbers.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from megatron_scalebio.kernels.dispatch import on_triton, require_dense

MOST_PROGRAMS = 1024


def sum_of_squares(gradient: Tensor) -> Tensor:
    """Sum of the squares of [n] numbers, accumulated in fp64, as a scalar tensor."""
    return (_on_triton if on_triton(gradient) else sum_of_squares_reference)(gradient)


def sum_of_squares_reference(gradient: Tensor) -> Tensor:
    """`sum_of_squares` in plain PyTorch."""
    return torch.linalg.vector_norm(gradient, dtype=torch.float64) ** 2


def _on_triton(gradient: Tensor) -> Tensor:
    require_dense(gradient=gradient)
    block = 4096
    programs = min(triton.cdiv(len(gradient), block), MOST_PROGRAMS)
    partial = torch.empty(programs, dtype=torch.float64, device=gradient.device)
    if programs:
        _squares_kernel[(programs,)](gradient, partial, len(gradient), programs * block, BLOCK=block, num_warps=8)
    return partial.sum()


@triton.jit
def _squares_kernel(
    gradient,  # [n] fp32
    partial,  # [programs] fp64, written
    numel,
    step,  # programs * BLOCK
    BLOCK: tl.constexpr,
) -> None:
    lanes = tl.arange(0, BLOCK)
    total = tl.zeros((BLOCK,), tl.float64)
    for start in range(tl.program_id(0).to(tl.int64) * BLOCK, numel, step):
        number = tl.load(gradient + start + lanes, mask=start + lanes < numel, other=0.0).to(tl.float64)
        total += number * number
    tl.store(partial + tl.program_id(0), tl.sum(total, 0))
