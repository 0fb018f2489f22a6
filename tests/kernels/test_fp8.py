"""FP8 with block scales: the kernels against their references bit for bit, and what the references promise.

Shapes: R rows, C columns.
"""

from dataclasses import replace
from unittest import mock

import pytest
import torch
from torch import Tensor

from megatron_scalebio.kernels import fp8
from megatron_scalebio.kernels.fp8 import SCALE_BLOCK, BlockScaled, dequantize, quantize, transpose
from megatron_scalebio.kernels.frozen_linear import matmul
from tests.distributed import run_distributed
from tests.guarded_memory import guarded, poisoned_memory
from tests.hopper import compiled_for_hopper

TINY = torch.finfo(torch.float32).tiny
FAR = torch.finfo(torch.float32).max
SIZES = [(1, 1), (1, 200), (129, 7), (40, 129), (300, 400)]
BLOCK_ROWS = [1, SCALE_BLOCK]


def test_kernels_give_the_bits_of_their_references():
    run_distributed(1, check_kernels, interpret=True)


def check_kernels() -> None:
    for size in SIZES:
        for dtype in (torch.bfloat16, torch.float32):
            for block_rows in BLOCK_ROWS:
                x = guarded(all_kinds(*size, block_rows).to(dtype))
                with poisoned_memory():
                    found, expected = quantize(x, block_rows), fp8.quantize_reference(x, block_rows)
                    assert_same(found, expected)
                    for wide in (torch.bfloat16, torch.float32):
                        assert_same_bits(dequantize(found, wide), fp8.dequantize_reference(expected, wide))
                    if block_rows == SCALE_BLOCK:
                        assert_same(transpose(found), fp8.transpose_reference(expected))
                        other = quantize(guarded(x.flip(0, 1).contiguous() / 512), block_rows)
                        for wide in (torch.bfloat16, torch.float32):
                            both = replace(found, difference=other)
                            assert_same_bits(dequantize(both, wide), fp8.dequantize_reference(both, wide))
    view = all_kinds(200, 129, 1).T
    assert_same(quantize(view, 1), fp8.quantize_reference(view, 1))
    weight = quantize(all_kinds(200, 129, SCALE_BLOCK), SCALE_BLOCK)
    view = BlockScaled(weight.data.T, weight.scale.T, SCALE_BLOCK)
    assert_same(transpose(view), weight)
    assert_same_bits(dequantize(view, torch.float32), dequantize(weight, torch.float32).T)
    for empty in (quantize(torch.empty(0, 200), 1), fp8.quantize_reference(torch.empty(0, 200), 1)):
        assert empty.data.shape == (0, 200) and empty.scale.shape == (0, 2)
        assert dequantize(empty, torch.bfloat16).shape == (0, 200)


def all_kinds(rows: int, columns: int, block_rows: int) -> Tensor:
    """[rows, columns] fp32: normal numbers from 1e-30 to 1e30, and whole blocks of other kinds, where there are enough.

    Every element of a block has the block's magnitude; -0 and one number 1e-4 of the others are everywhere.
    """
    generator = torch.Generator().manual_seed(rows * columns)
    x = torch.randn(rows, columns, generator=generator)
    x[:, ::3] *= -0.0
    x[::2, ::5] *= 1e-4
    kinds = [1.0, 0.0, TINY / 8, torch.nan, torch.inf, -torch.inf, 1e30, 1e-30, TINY, 1e-36, 3e4]
    block_count = 0
    for row in range(0, rows, block_rows):
        for column in range(0, columns, SCALE_BLOCK):
            block = x[row : row + block_rows, column : column + SCALE_BLOCK]
            kind = kinds[block_count % len(kinds)]
            block_count += 1
            if abs(kind) < torch.inf:
                block *= kind
            else:
                block[-1, -1] = kind
    return x


def assert_same(found: BlockScaled, expected: BlockScaled) -> None:
    assert found.block_rows == expected.block_rows and found.data.is_contiguous()
    assert_same_bits(found.data.view(torch.uint8), expected.data.view(torch.uint8))
    assert_same_bits(found.scale, expected.scale)


def assert_same_bits(found: Tensor, expected: Tensor) -> None:
    """Equal bit for bit, signs of zeros too; one NaN is as good as another."""
    assert found.dtype == expected.dtype
    torch.testing.assert_close(found, expected, rtol=0, atol=0, equal_nan=True)
    if found.is_floating_point():
        numbers = ~expected.isnan()
        assert torch.equal(found[numbers].signbit(), expected[numbers].signbit())


def per_block(x: Tensor, block_rows: int, of_block) -> Tensor:
    """The scalar that `of_block` makes of each block, at each of its entries. [R, C]."""
    result = torch.empty_like(x)
    for row in range(0, x.shape[0], block_rows):
        for column in range(0, x.shape[1], SCALE_BLOCK):
            block = slice(row, row + block_rows), slice(column, column + SCALE_BLOCK)
            result[block] = of_block(x[block])
    return result


@pytest.mark.parametrize("block_rows", BLOCK_ROWS)
@pytest.mark.parametrize("size", SIZES)
def test_a_block_errs_by_half_a_step_of_e4m3_at_its_own_scale_and_bad_blocks_are_nan_throughout(size, block_rows):
    x = all_kinds(*size, block_rows)
    q = quantize(x, block_rows)
    assert not q.data.float().isnan().any()
    found = dequantize(q, torch.float32).double()
    largest = per_block(x, block_rows, lambda block: block.abs().amax()).double()
    bad = ~largest.isfinite()
    assert torch.equal(found.isnan(), bad)

    # e4m3 has steps of 2^-3 of a number's power of two, of 2^-9 below 2^-6. A scale is a power of two: nothing else
    # is rounded.
    scale = torch.exp2((largest / 448).clamp(min=TINY).log2().ceil())
    assert not (q.scale[q.scale.isfinite()].double().log2() % 1).any()
    power = torch.exp2((x.double() / scale).abs().clamp(min=2**-6).log2().floor())
    allowed = scale * power * 2**-4
    assert ((found - x.double()).abs() <= allowed)[~bad].all()
    assert ((found - x.double()).abs() <= largest / 16)[~bad & (largest > 448 * TINY)].all()
    assert not found[largest == 0].any()


@pytest.mark.parametrize("block_rows", BLOCK_ROWS)
@pytest.mark.parametrize("magnitude", [1e-30, 1.0, 1.75, 448.0, 449.0, 1e30, FAR / 2])
def test_the_largest_number_of_a_block_lies_in_the_upper_half_of_e4m3_and_never_above(magnitude, block_rows):
    x = torch.rand(256, 256, generator=torch.Generator().manual_seed(1)) * magnitude
    x[:, 5::SCALE_BLOCK] = magnitude
    q = quantize(x, block_rows)
    found = q.data[:, 5::SCALE_BLOCK].float()
    assert ((found >= 224) & (found <= 448)).all()
    back = dequantize(q, torch.float32)
    torch.testing.assert_close(back[:, 5::SCALE_BLOCK], x[:, 5::SCALE_BLOCK], rtol=2**-4, atol=0)
    assert back.isfinite().all()


@pytest.mark.parametrize("block_rows", BLOCK_ROWS)
def test_nearly_equal_numbers_round_alike_though_the_largest_of_their_block_has_moved(block_rows):
    """Two models a step apart. A grid that followed the largest number would have every number rounded anew."""
    x = torch.randn(256, 256, generator=torch.Generator().manual_seed(1))
    y = x * (1 + 1e-5)
    equal = dequantize(quantize(x, block_rows), torch.float32) == dequantize(quantize(y, block_rows), torch.float32)
    assert equal.float().mean() > 0.99


@pytest.mark.parametrize("block_rows", BLOCK_ROWS)
def test_quantisation_depends_on_the_numbers_alone(block_rows):
    """Not on memory, layout, dtype, or what lies outside the block: equal weights have equal FP8 in both models."""
    x = all_kinds(300, 400, block_rows).bfloat16()
    q = quantize(x, block_rows)
    inside = torch.full((301, 411), 7.0, dtype=torch.bfloat16)
    inside[1:, 11:] = x
    for other in (x.clone(), x.T.contiguous().T, inside[1:, 11:], x.float()):
        assert_same(quantize(other, block_rows), q)
    part = quantize(x[128:256, 256:].contiguous(), block_rows)
    first_block = 128 // block_rows
    assert_same_bits(part.data.view(torch.uint8), q.data[128:256, 256:].view(torch.uint8))
    assert_same_bits(part.scale, q.scale[first_block : first_block + 128 // block_rows, 2:])


@pytest.mark.parametrize("block_rows", BLOCK_ROWS)
def test_numbers_that_have_been_through_fp8_come_through_it_again_as_they_are(block_rows):
    """As a stored checkpoint's may have."""
    generator = torch.Generator().manual_seed(2)
    x = torch.randn(300, 400, generator=generator) * torch.exp2(torch.randint(-80, 80, (300, 1), generator=generator))
    once = quantize(x, block_rows)
    for dtype in (torch.float32, torch.bfloat16):
        numbers = dequantize(once, dtype)
        assert torch.equal(numbers, dequantize(once, torch.float32).to(dtype))
        assert torch.equal(dequantize(quantize(numbers, block_rows), dtype), numbers)


def test_a_weight_beside_another_differs_from_it_as_it_did_in_bf16():
    """Updates far below a step of e4m3, and of bf16: rounded alone, a few numbers come to differ by whole steps of
    e4m3; beside the other they differ as those that bf16 moves."""
    generator = torch.Generator().manual_seed(0)
    exact = torch.randn(300, 400, generator=generator)
    lower, upper = exact.bfloat16(), (exact * (1 + 3e-4 * torch.randn(exact.shape, generator=generator))).bfloat16()
    base = quantize(lower, SCALE_BLOCK)
    beside = replace(base, difference=quantize(upper - lower, SCALE_BLOCK))
    wanted = upper.float() - lower.float()
    found = dequantize(beside, torch.bfloat16).float() - dequantize(base, torch.bfloat16).float()
    alone = dequantize(quantize(upper, SCALE_BLOCK), torch.float32) - dequantize(base, torch.float32)
    nothing = replace(base, difference=quantize(lower - lower, SCALE_BLOCK))
    assert torch.equal(dequantize(nothing, torch.float32), dequantize(base, torch.float32))
    assert 0.01 < (wanted != 0).float().mean() < 0.2, "some numbers ought to move in bf16, and most not"
    assert (found - wanted).norm() < 0.15 * wanted.norm() < 0.15 * (alone - wanted).norm()
    assert (alone - wanted).norm() > 3 * wanted.norm()


def test_products_of_fp8_have_no_place_for_a_difference():
    weight = quantize(torch.ones(128, 128), SCALE_BLOCK)
    both = replace(weight, difference=weight)
    for refused in (lambda: transpose(both), lambda: matmul(quantize(torch.ones(1, 128), 1), both, torch.float32)):
        with pytest.raises(AssertionError):
            refused()


# The 32B shapes, whole and one of 8 tensor-parallel shards, and a ragged one. Registers per thread, shared bytes per
# program, and how many 16-byte loads and stores there must be at least.
WIDE, RAGGED = [(8192, 27648), (640, 5120)], [(201, 129)]
BUDGETS = [
    # operation, block_rows, sizes, registers, shared bytes, 16-byte loads, 16-byte stores
    ("quantize", 1, WIDE, 64, 512, 4, 2),
    ("quantize", SCALE_BLOCK, WIDE, 64, 512, 4, 2),
    ("quantize", 1, RAGGED, 255, 2048, 0, 0),
    ("quantize", SCALE_BLOCK, RAGGED, 128, 2048, 0, 0),
    ("dequantize", 1, WIDE, 48, 8192, 2, 4),
    ("dequantize", SCALE_BLOCK, WIDE, 48, 8192, 2, 4),
    ("dequantize", SCALE_BLOCK, RAGGED, 184, 8192, 0, 0),
    ("dequantize with a difference", SCALE_BLOCK, WIDE, 64, 8192, 4, 4),
    ("dequantize with a difference", SCALE_BLOCK, RAGGED, 255, 8192, 0, 0),
    ("transpose", SCALE_BLOCK, WIDE, 40, 16384, 4, 4),
    ("transpose", SCALE_BLOCK, RAGGED, 255, 16384, 0, 0),
]


@pytest.mark.parametrize("operation, block_rows, sizes, registers, shared_bytes, loads, stores", BUDGETS)
def test_hopper_kernels_keep_their_budget(operation, block_rows, sizes, registers, shared_bytes, loads, stores):
    with mock.patch.object(fp8, "on_triton", return_value=True), compiled_for_hopper() as kernels:
        for size in sizes:
            for dtype in (torch.bfloat16, torch.float32):
                if operation == "quantize":
                    quantize(torch.empty(size, dtype=dtype, device="meta"), block_rows)
                elif operation.startswith("dequantize"):
                    weight = unallocated(*size, block_rows)
                    both = replace(weight, difference=unallocated(*size, block_rows))
                    dequantize(weight if operation == "dequantize" else both, dtype)
                else:
                    transpose(unallocated(*size, block_rows))
    assert len(kernels) == 2 * len(sizes)
    for kernel in kernels:
        assert kernel.name == f"_{operation.partition(' ')[0]}_kernel"
        assert kernel.spills == kernel.stack_bytes == 0
        assert kernel.registers <= registers and kernel.shared_bytes <= shared_bytes
        assert kernel.count("LDG.E.128") >= loads and kernel.count("STG.E.128") >= stores


def unallocated(rows: int, columns: int, block_rows: int) -> BlockScaled:
    """Shapes and strides as `quantize` makes them, without memory: all that compilation looks at."""
    data = torch.empty(rows, columns, dtype=torch.float8_e4m3fn, device="meta")
    return BlockScaled(data, fp8._empty_scale(data, block_rows), block_rows)
