"""A linear layer whose weight is frozen, stored once in FP8: forward, and the gradient of the input.

Both are one product: with inputs in the compute dtype the library's, of the weight widened into scratch memory; with
inputs rounded to FP8 ours, of FP8 matrices, which the rest is about. On Hopper the tensor cores take FP8 operands only
with the summed dimension innermost. The stored weight [N, K] is that for the forward pass; for the gradient of the
input, which sums over N, it is first transposed into scratch memory. That moves 2 bytes per number, by arithmetic 3 to
5% of the product's time at 8,192 tokens, and costs one layer's memory instead of every layer's.

The matrix product, `_matmul_kernel`:
- One step of its loop takes the 128 summed numbers that share their scales. Their sum in the tensor cores is scaled and
  added to sums in fp32 registers. Hopper's tensor cores keep about 14 bits of a running sum of FP8 products; left in
  them over all of K, sums were seen to err by up to 2% at K = 4,096 (DeepSeek-V3, arXiv 2412.19437, section 3.3).
- A tile is cut in two halves of columns, and a half's sum of a step is added up before the other half's is begun: 64 +
  32 accumulators per thread instead of 64 + 64. So two programs of 128 registers per thread and 96 KB of shared memory
  fit a multiprocessor, and one's additions can run while the other's tensor cores do.
- Programs with neighbouring numbers work on neighbouring tiles, GROUP rows of tiles at a time, and find one another's
  operands in the L2 cache.

Shapes: M tokens, K input features, N output features; K and N of this tensor-parallel rank.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.nn.functional import pad

from megatron_scalebio.kernels.dispatch import on_triton
from megatron_scalebio.kernels.fp8 import (
    SCALE_BLOCK,
    BlockScaled,
    dequantize,
    dequantize_reference,
    quantize,
    transpose,
)

ALIGNMENT = 16  # bytes: what one thread copies to shared memory at a time
GROUP = 8
NUM_STAGES = 3
NUM_WARPS = 8
REGISTERS = 128  # per thread: two programs of 8 warps share the 65,536 of a multiprocessor


def frozen_linear(x: Tensor, weight: BlockScaled, rounds_inputs: bool = True) -> Tensor:
    """`x @ weight.T`, with the gradient of `x` alone.

    Args:
        x: [..., K] bf16 or fp32.
        weight: [N, K] in blocks of 128x128, row-major. Nothing else is kept for the backward pass.
        rounds_inputs: the weight has no difference, and both products round their left operand to FP8 first, in blocks
            of 1x128 numbers: `x`, and the output's gradient. Without, they are products in the dtype of `x`, to which
            the weight is widened each time into scratch memory, its difference added.

    Returns: [..., N] in the dtype of `x`.
    """
    return (_FrozenLinear if rounds_inputs else _WideFrozenLinear).apply(x, weight)


class _FrozenLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: BlockScaled) -> Tensor:
        ctx.save_for_backward(weight.data, weight.scale)
        return _times(x, weight)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        # The transposed weight is gone when this returns: the allocator hands the same memory to the next layer, in
        # the order of the stream, so all layers share one scratch buffer.
        (grad,), (data, scale) = grads, ctx.saved_tensors
        return _times(grad, transpose(BlockScaled(data, scale, SCALE_BLOCK))), None


class _WideFrozenLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: BlockScaled) -> Tensor:
        other = weight.difference
        ctx.save_for_backward(weight.data, weight.scale, *(() if other is None else (other.data, other.scale)))
        return x @ dequantize(weight, x.dtype).T

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        (grad,), (data, scale, *other) = grads, ctx.saved_tensors
        difference = BlockScaled(other[0], other[1], SCALE_BLOCK) if other else None
        return grad @ dequantize(BlockScaled(data, scale, SCALE_BLOCK, difference), grad.dtype), None


def _times(x: Tensor, w: BlockScaled) -> Tensor:
    """[..., K] times [N, K] transposed: [..., N]."""
    rows = quantize(x.reshape(-1, x.shape[-1]), block_rows=1)
    return matmul(rows, w, x.dtype).view(*x.shape[:-1], w.data.shape[0])


def matmul(x: BlockScaled, w: BlockScaled, dtype: torch.dtype) -> Tensor:
    """`x @ w.T`, summed in fp32 and rounded once.

    Args:
        x: [M, K] in blocks of 1x128.
        w: [N, K] in blocks of 128x128. As a view of a row-major [K, N] it is transposed on its way through the
            registers, in every program anew: no scratch memory, more work.
        dtype: of the result, bf16 or fp32.

    Returns: [M, N].
    """
    assert w.difference is None
    if not on_triton(x.data):
        return matmul_reference(x, w, dtype)
    if x.data.shape[1] % ALIGNMENT:
        x, w = _align(x), _align(w)
    (rows, inner), columns = x.data.shape, w.data.shape[0]
    y = torch.empty(rows, columns, dtype=dtype, device=x.data.device)
    half, registers = (64, REGISTERS) if w.data.stride(1) == 1 else (32, None)  # a transposition needs registers
    _matmul_kernel[(triton.cdiv(rows, SCALE_BLOCK) * triton.cdiv(columns, 2 * half),)](
        *(x.data, x.scale, w.data, w.scale, y, rows, columns, inner),
        *(*x.scale.stride(), *w.data.stride(), *w.scale.stride()),
        **dict(BLOCK=SCALE_BLOCK, HALF=half, GROUP=GROUP),
        **dict(num_warps=NUM_WARPS, num_stages=NUM_STAGES, maxnreg=registers),
    )
    return y


def matmul_reference(x: BlockScaled, w: BlockScaled, dtype: torch.dtype) -> Tensor:
    """`matmul` in plain PyTorch, of the dequantised operands."""
    return (dequantize_reference(x, torch.float32) @ dequantize_reference(w, torch.float32).T).to(dtype)


def _align(q: BlockScaled) -> BlockScaled:
    """A copy with zeros at the ends of the rows, so that every row begins at a multiple of ALIGNMENT."""
    data = pad(q.data.view(torch.uint8), (0, -q.data.shape[1] % ALIGNMENT)).view(q.data.dtype)
    return BlockScaled(data, q.scale, q.block_rows)


@triton.jit
def _matmul_kernel(
    x_ptr,  # [M, K] e4m3, row-major
    x_scale_ptr,  # [M, ceil(K / BLOCK)] fp32
    w_ptr,  # [N, K] e4m3
    w_scale_ptr,  # [ceil(N / BLOCK), ceil(K / BLOCK)] fp32
    y_ptr,  # [M, N] bf16 or fp32, row-major
    rows,
    columns,
    inner,
    x_scale_stride_m,
    x_scale_stride_k,
    w_stride_n,
    w_stride_k,
    w_scale_stride_n,
    w_scale_stride_k,
    BLOCK: tl.constexpr,
    HALF: tl.constexpr,  # of a tile's columns; a tile has the same block of w's scales throughout
    GROUP: tl.constexpr,
) -> None:
    tile_row, tile_column = _tile_of_program(tl.cdiv(rows, BLOCK), tl.cdiv(columns, 2 * HALF), GROUP)
    m, n, k = tile_row * BLOCK, tile_column * 2 * HALF, tl.arange(0, BLOCK)
    # Tiles begin at 64-bit offsets. Inside one 32 bits do for strides up to 2^24, as for scales, 1/128 of the numbers.
    # Rows beyond the last one are read as the last one, and their results are not stored: no masks for rows.
    row = tl.minimum(tl.arange(0, BLOCK), rows - 1 - m)
    left = tl.minimum(tl.arange(0, HALF), columns - 1 - n)
    right = tl.minimum(tl.arange(HALF, 2 * HALF), columns - 1 - n)
    x_ptr += m.to(tl.int64) * inner
    x_scale_ptr += m * x_scale_stride_m
    w_ptr += n.to(tl.int64) * w_stride_n
    w_scale_ptr += n // BLOCK * w_scale_stride_n
    left_sum = tl.zeros((BLOCK, HALF), tl.float32)
    right_sum = tl.zeros((BLOCK, HALF), tl.float32)
    for step in range(tl.cdiv(inner, BLOCK)):
        inside = k < inner - step * BLOCK
        x = tl.load(x_ptr + row[:, None] * inner + k[None, :], mask=inside[None, :], other=0.0)
        w_at = w_ptr + k[:, None] * w_stride_k
        w_left = tl.load(w_at + left[None, :] * w_stride_n, mask=inside[:, None], other=0.0)
        w_right = tl.load(w_at + right[None, :] * w_stride_n, mask=inside[:, None], other=0.0)
        x_scale = tl.load(x_scale_ptr + step * x_scale_stride_k + row * x_scale_stride_m)
        scale = (x_scale * tl.load(w_scale_ptr + step * w_scale_stride_k))[:, None]
        left_sum += tl.dot(x, w_left) * scale
        right_sum += tl.dot(x, w_right) * scale
        x_ptr += BLOCK
        w_ptr += BLOCK * w_stride_k
    _store(y_ptr, left_sum, m, n, rows, columns)
    _store(y_ptr, right_sum, m, n + HALF, rows, columns)


@triton.jit
def _tile_of_program(tile_rows, tile_columns, GROUP: tl.constexpr) -> tuple[tl.tensor, tl.tensor]:
    """Down GROUP rows of tiles, then the next column; the last group may have fewer rows."""
    group = tl.program_id(0) // (GROUP * tile_columns)
    within = tl.program_id(0) % (GROUP * tile_columns)
    height = tl.minimum(tile_rows - group * GROUP, GROUP)
    return group * GROUP + within % height, within // height


@triton.jit
def _store(y_ptr, tile, m, n, rows, columns) -> None:
    """Round `tile` to the dtype of y [rows, columns] and store what of it lies inside, its first entry at (m, n)."""
    row, column = tl.arange(0, tile.shape[0])[:, None], tl.arange(0, tile.shape[1])[None, :]
    y_ptr += m.to(tl.int64) * columns + n
    tl.store(
        y_ptr + row * columns + column,
        tile.to(y_ptr.dtype.element_ty),
        mask=(row < rows - m) & (column < columns - n),
    )
