"""FP8 with block scales: quantise, dequantise, transpose.

A number is its e4m3 value times its block's fp32 scale. A scale covers 128x128 numbers of a weight, or 1x128 of an
activation; blocks at the edges are cut off. Quantisation is a pure function of the numbers: equal weights of the two
models have equal FP8, so that what differs between their losses is never the rounding.

A block's scale is the smallest power of two by which its largest magnitude is at most 448, e4m3's largest number, so
that nothing saturates; it is a normal fp32 number, so that zeros and denormal numbers divide by something. A scale
between powers of two would gain nothing, since e4m3 is as fine everywhere. It would lose what the hypergradient lives
on: the weights and activations of the two models differ by little, and a scale that follows the largest number moves
the grid under its whole block, which then rounds anew, in each model for itself. A power of two stays, and nearly equal
numbers round alike. Within 1/16 of the largest fp32 number one may come back as infinity. A block with a NaN or an
infinity in it has the scale NaN and is NaN throughout: bad numbers are never cut to size.

Of two nearly equal matrices the second may be stored as what it differs by from the first (`difference`): alone, each
would round for itself where a number has crossed a step of e4m3, by far more than the two differ by. A sum of e4m3's
number and a difference of bf16 numbers is mostly a bf16 number: the two then differ as they did in bf16.

Every kernel moves a tile of [rows, 128] once: as wide as a block, so that a block's largest magnitude never leaves the
program, with rows of which each is read and written in whole 16-byte vectors.

Shapes: R rows, C columns, M tokens, K and N a linear layer's input and output features.
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from megatron_scalebio.kernels.dispatch import on_triton

SCALE_BLOCK = 128
ROWS_PER_TILE = 32  # where a program needs no whole 128x128 block


@dataclass(frozen=True)
class BlockScaled:
    """The matrix [R, C] whose entry (r, c) is `data[r, c] * scale[r // block_rows, c // 128]`, and the difference's."""

    data: Tensor  # [R, C] e4m3
    scale: Tensor  # [ceil(R / block_rows), ceil(C / 128)] fp32
    block_rows: int  # 128 for weights, 1 for activations
    difference: "BlockScaled | None" = None  # of weights alone, with blocks of the same size


def quantize(x: Tensor, block_rows: int) -> BlockScaled:
    """[R, C] bf16 or fp32 to FP8, `data` row-major.

    A number's error is half a step of e4m3: at most 1/16 of it, or 2^-10 of its block's scale if that is more. To
    divide by a scale is exact.
    """
    if not on_triton(x):
        return quantize_reference(x, block_rows)
    x = x.contiguous()
    rows, columns = x.shape
    data = torch.empty_like(x, dtype=torch.float8_e4m3fn)
    scale = _empty_scale(x, block_rows)
    tile_rows = max(block_rows, ROWS_PER_TILE)
    _quantize_kernel[_grid(rows, columns, tile_rows)](
        *(x, data, scale, rows, columns, *scale.stride()),
        **dict(BLOCK_ROWS=block_rows, TILE_ROWS=tile_rows, BLOCK=SCALE_BLOCK),
        num_warps=tile_rows // 8,
    )
    return BlockScaled(data, scale, block_rows)


def quantize_reference(x: Tensor, block_rows: int) -> BlockScaled:
    """`quantize` in plain PyTorch."""
    rows, columns = x.shape
    scale = _empty_scale(x, block_rows)
    padded = x.new_zeros(scale.shape[0] * block_rows, scale.shape[1] * SCALE_BLOCK, dtype=torch.float32)
    padded[:rows, :columns] = x
    largest = padded.view(scale.shape[0], block_rows, scale.shape[1], SCALE_BLOCK).abs().amax(dim=(1, 3))
    # 448 is 1.75 * 2^8: a mantissa above 1.75 carries into the exponent.
    bits = (((largest.view(torch.int32) + 0x1FFFFF) & 0x7F800000) - (8 << 23)).clamp(min=1 << 23)
    scale.copy_(torch.where(largest.isfinite(), bits.view(torch.float32), torch.nan))
    spread = _spread(scale, block_rows, rows, columns)
    data = torch.where(spread.isnan(), 0.0, x.float() / spread)
    return BlockScaled(data.to(torch.float8_e4m3fn), scale, block_rows)


def dequantize(q: BlockScaled, dtype: torch.dtype) -> Tensor:
    """The numbers, [R, C]: products and sum in fp32, rounded to `dtype`."""
    if not on_triton(q.data):
        return dequantize_reference(q, dtype)
    rows, columns = q.data.shape
    x = torch.empty(rows, columns, dtype=dtype, device=q.data.device)
    other = q if q.difference is None else q.difference
    _dequantize_kernel[_grid(rows, columns, ROWS_PER_TILE)](
        *(q.data.contiguous(), q.scale, other.data.contiguous(), other.scale, x, rows, columns),
        *(*q.scale.stride(), *other.scale.stride()),
        **dict(HAS_DIFFERENCE=q.difference is not None),
        **dict(BLOCK_ROWS=q.block_rows, TILE_ROWS=ROWS_PER_TILE, BLOCK=SCALE_BLOCK),
        num_warps=4,
    )
    return x


def dequantize_reference(q: BlockScaled, dtype: torch.dtype) -> Tensor:
    """`dequantize` in plain PyTorch."""
    x = q.data.float() * _spread(q.scale, q.block_rows, *q.data.shape)
    return (x if q.difference is None else x + dequantize_reference(q.difference, torch.float32)).to(dtype)


def transpose(weight: BlockScaled) -> BlockScaled:
    """A 128x128-scaled weight [N, K] without difference as [K, N], `data` row-major in new memory, `scale` a view."""
    assert weight.difference is None
    if not on_triton(weight.data):
        return transpose_reference(weight)
    rows, columns = weight.data.shape
    data = torch.empty(columns, rows, dtype=weight.data.dtype, device=weight.data.device)
    _transpose_kernel[_grid(rows, columns, SCALE_BLOCK)](
        weight.data.contiguous(), data, rows, columns, BLOCK=SCALE_BLOCK, num_warps=8
    )
    return BlockScaled(data, weight.scale.T, SCALE_BLOCK)


def transpose_reference(weight: BlockScaled) -> BlockScaled:
    """`transpose` in plain PyTorch."""
    return BlockScaled(weight.data.T.contiguous(), weight.scale.T, SCALE_BLOCK)


def _grid(rows: int, columns: int, tile_rows: int) -> tuple[int]:
    return (triton.cdiv(rows, tile_rows) * triton.cdiv(columns, SCALE_BLOCK),)


def _empty_scale(x: Tensor, block_rows: int) -> Tensor:
    """Row-major for a weight; column-major for an activation, of which a matrix product reads a column at a time."""
    rows, columns = triton.cdiv(x.shape[0], block_rows), triton.cdiv(x.shape[1], SCALE_BLOCK)
    if block_rows == 1:
        return torch.empty(columns, rows, dtype=torch.float32, device=x.device).T
    return torch.empty(rows, columns, dtype=torch.float32, device=x.device)


def _spread(scale: Tensor, block_rows: int, rows: int, columns: int) -> Tensor:
    """The scale of every number: [rows, columns]."""
    return scale.repeat_interleave(block_rows, 0)[:rows].repeat_interleave(SCALE_BLOCK, 1)[:, :columns]


@triton.jit
def _tile(
    rows, columns, TILE_ROWS: tl.constexpr, BLOCK: tl.constexpr
) -> tuple[tl.tensor, tl.tensor, tl.tensor, tl.tensor]:
    """This program's tile: first row, column of blocks, offsets [TILE_ROWS, BLOCK] in a row-major matrix, its mask."""
    tiles_across = tl.cdiv(columns, BLOCK)
    first_row = tl.program_id(0) // tiles_across * TILE_ROWS
    block_column = tl.program_id(0) % tiles_across
    row = (first_row + tl.arange(0, TILE_ROWS))[:, None]
    column = (block_column * BLOCK + tl.arange(0, BLOCK))[None, :]
    return first_row, block_column, row.to(tl.int64) * columns + column, (row < rows) & (column < columns)


@triton.jit
def _quantize_kernel(
    x_ptr,  # [R, C] bf16 or fp32
    data_ptr,  # [R, C] e4m3
    scale_ptr,  # [ceil(R / BLOCK_ROWS), ceil(C / BLOCK)] fp32, any strides
    rows,
    columns,
    scale_stride_row,
    scale_stride_column,
    BLOCK_ROWS: tl.constexpr,  # 1, or TILE_ROWS
    TILE_ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    first_row, block_column, offset, inside = _tile(rows, columns, TILE_ROWS, BLOCK)
    x = tl.load(x_ptr + offset, mask=inside, other=0.0).to(tl.float32)
    # Magnitudes order as their bits do, infinity above numbers and NaN above infinity; tl.max of floats ignores NaN.
    largest = tl.max(x.to(tl.int32, bitcast=True) & 0x7FFFFFFF, axis=1, keep_dims=True)
    if BLOCK_ROWS > 1:
        largest = tl.max(largest, axis=0, keep_dims=True)
    finite = largest < 0x7F800000
    scale_bits = tl.maximum(((largest + 0x1FFFFF) & 0x7F800000) - (8 << 23), 1 << 23)
    scale = scale_bits.to(tl.float32, bitcast=True)
    inverse = ((254 << 23) - scale_bits).to(tl.float32, bitcast=True)  # a power of two's has the negative exponent
    data = tl.where(finite, x * inverse, 0.0)
    tl.store(data_ptr + offset, data.to(tl.float8e4nv), mask=inside)

    block_row = first_row // BLOCK_ROWS + tl.arange(0, TILE_ROWS // BLOCK_ROWS)[:, None]
    at = block_row.to(tl.int64) * scale_stride_row + block_column.to(tl.int64) * scale_stride_column
    tl.store(scale_ptr + at, tl.where(finite, scale, float("nan")), mask=block_row * BLOCK_ROWS < rows)


@triton.jit
def _dequantize_kernel(
    data_ptr,  # [R, C] e4m3
    scale_ptr,  # [ceil(R / BLOCK_ROWS), ceil(C / BLOCK)] fp32, any strides
    other_data_ptr,  # as `data_ptr` and `scale_ptr`, to be added: HAS_DIFFERENCE
    other_scale_ptr,
    x_ptr,  # [R, C] bf16 or fp32
    rows,
    columns,
    scale_stride_row,
    scale_stride_column,
    other_stride_row,
    other_stride_column,
    HAS_DIFFERENCE: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    TILE_ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    first_row, block_column, offset, inside = _tile(rows, columns, TILE_ROWS, BLOCK)
    row = first_row + tl.arange(0, TILE_ROWS)[:, None]
    down, across = (row // BLOCK_ROWS).to(tl.int64), block_column.to(tl.int64)
    scale = tl.load(scale_ptr + down * scale_stride_row + across * scale_stride_column, mask=row < rows, other=0.0)
    x = tl.load(data_ptr + offset, mask=inside, other=0.0).to(tl.float32) * scale
    if HAS_DIFFERENCE:
        at = down * other_stride_row + across * other_stride_column
        other = tl.load(other_scale_ptr + at, mask=row < rows, other=0.0)
        x += tl.load(other_data_ptr + offset, mask=inside, other=0.0).to(tl.float32) * other
    tl.store(x_ptr + offset, x.to(x_ptr.dtype.element_ty), mask=inside)


@triton.jit
def _transpose_kernel(
    data_ptr,  # [R, C], one byte each
    transposed_ptr,  # [C, R]
    rows,
    columns,
    BLOCK: tl.constexpr,
) -> None:
    first_row, block_column, offset, inside = _tile(rows, columns, BLOCK, BLOCK)
    tile = tl.load(data_ptr + offset, mask=inside, other=0.0)
    row = (first_row + tl.arange(0, BLOCK))[None, :]
    column = (block_column * BLOCK + tl.arange(0, BLOCK))[:, None]
    tl.store(transposed_ptr + column.to(tl.int64) * rows + row, tl.trans(tile), mask=(column < columns) & (row < rows))
