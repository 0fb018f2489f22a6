"""The frozen FP8 linear layer and its matrix product: the kernels in Triton's interpreter, and the references.

Numbers that FP8 holds exactly have products that fp32 holds exactly, in any order of summation: there every path gives
the same bits. For other numbers the bound follows from the roundings.

Shapes: M tokens, K input features, N output features.
"""

import math
import weakref
from dataclasses import replace
from functools import partial
from unittest import mock

import pytest
import torch
from torch import Tensor

from megatron_scalebio.kernels import fp8
from megatron_scalebio.kernels import frozen_linear as module
from megatron_scalebio.kernels.fp8 import SCALE_BLOCK, BlockScaled, dequantize_reference, quantize, quantize_reference
from megatron_scalebio.kernels.frozen_linear import frozen_linear, matmul
from tests.distributed import run_distributed
from tests.guarded_memory import poisoned_memory
from tests.hopper import compiled_for_hopper
from tests.kernels.test_fp8 import all_kinds, unallocated
from tests.rounding import product_error, unit_roundoff

# M, N, K. The last has more rows of tiles than go in a group, and a last group that is cut off.
SIZES = [(1, 1, 1), (7, 129, 200), (130, 200, 384), (129, 7, 129), (1153, 257, 16)]


def whole_numbers(*shape: int, seed: int = 0) -> Tensor:
    """fp32, -7 to 7 times 1, 2, 4 or 8, the same along 4 neighbours of a row, of which one is a 7 or a -7 times that.

    So the largest of any block is 7 times a power of two, as 448 is; scales are powers of two, FP8 holds all exactly.
    """
    x = torch.randint(-7, 8, shape, generator=torch.Generator().manual_seed(seed)).float()
    x[..., ::4] = torch.where(x[..., ::4] < 0, -7.0, 7.0)
    row = torch.arange(math.prod(shape[:-1])).view(*shape[:-1], 1)
    return x * 2.0 ** ((row // 100 + torch.arange(shape[-1]) // SCALE_BLOCK) % 4)


def test_the_product_of_what_fp8_holds_exactly_is_exact():
    check_exact_products()
    run_distributed(1, check_exact_products, interpret=True)


def check_exact_products() -> None:
    for rows, columns, inner in SIZES:
        x, w = whole_numbers(rows, inner), whole_numbers(columns, inner, seed=1)
        expected = x.double() @ w.double().T
        with poisoned_memory():
            x_q, w_q, turned = quantize(x, 1), quantize(w, SCALE_BLOCK), quantize(w.T, SCALE_BLOCK)
        view = BlockScaled(turned.data.T, turned.scale.T, SCALE_BLOCK)
        for weight in (w_q, view):
            for dtype in (torch.float32, torch.bfloat16):
                with poisoned_memory():
                    found = matmul(x_q, weight, dtype)
                assert torch.equal(found, expected.to(dtype)), (rows, columns, inner, dtype)


def test_rows_of_the_weight_may_begin_beyond_2_to_the_31():
    run_distributed(1, check_far_rows, interpret=True)


def check_far_rows() -> None:
    x, w = whole_numbers(3, 16), whole_numbers(130, 16, seed=1)
    stored = quantize(w, SCALE_BLOCK)
    far = torch.empty(130 * 2**24, dtype=torch.uint8).view(stored.data.dtype)  # of which but 130 pages come to exist
    rows = far.as_strided((130, 16), (2**24, 1)).copy_(stored.data)
    found = matmul(quantize(x, 1), BlockScaled(rows, stored.scale, SCALE_BLOCK), torch.float32)
    assert torch.equal(found, x @ w.T)


def test_the_product_errs_by_the_roundings_of_its_sum_and_of_its_result():
    check_errors()
    run_distributed(1, check_errors, interpret=True)


def check_errors() -> None:
    """Against the exact product of the FP8 operands. Scales are powers of two, so that products are exact in fp32."""
    generator = torch.Generator().manual_seed(3)
    wide = partial(dequantize_reference, dtype=torch.float64)
    for rows, columns, inner in [(5, 130, 2100), (130, 40, 1024)]:
        x = quantize(torch.randn(rows, inner, generator=generator) * 30, 1)
        w = quantize(torch.randn(columns, inner, generator=generator) / 50, SCALE_BLOCK)
        exact = exact_product(x, w)
        of_sum = product_error(wide(x), wide(w).T, torch.float32)
        for dtype in (torch.float32, torch.bfloat16):
            error = (matmul(x, w, dtype).double() - exact).abs()
            assert (error <= of_sum + unit_roundoff(dtype) * exact.abs()).all(), (dtype, (error / of_sum).max())


def exact_product(x: BlockScaled, w: BlockScaled) -> Tensor:
    def exact(q: BlockScaled) -> Tensor:
        ones = torch.ones_like(q.data, dtype=torch.float32)
        scale = dequantize_reference(BlockScaled(ones.to(q.data.dtype), q.scale, q.block_rows), torch.float32)
        return q.data.double() * scale.double()

    return exact(x) @ exact(w).T


def test_bad_numbers_spread_as_their_blocks_do_and_no_further():
    check_bad_numbers()
    run_distributed(1, check_bad_numbers, interpret=True)


def check_bad_numbers() -> None:
    """NaN, infinities, zeros, denormals and 1e30: a block with a bad number makes its row of x NaN, or its 128 rows of
    w; every other result is a number."""
    x, w = all_kinds(23, 300, 1), torch.randn(300, 300, generator=torch.Generator().manual_seed(4))
    x[3, 200], w[140, 7] = torch.nan, torch.inf
    x_q, w_q = quantize(x, 1), quantize(w, SCALE_BLOCK)
    with poisoned_memory():
        found = matmul(x_q, w_q, torch.float32).double()
    bad = ~x.isfinite().all(dim=1, keepdim=True) | torch.zeros(1, 300, dtype=torch.bool)
    bad[:, 128:256] = True
    assert torch.equal(~found.isfinite(), bad) and torch.equal(found.isnan(), bad)
    exact = exact_product(x_q, w_q)
    magnitudes = (BlockScaled(q.data.float().abs().to(q.data.dtype), q.scale, q.block_rows) for q in (x_q, w_q))
    allowed = 300 * torch.finfo(torch.float32).eps * exact_product(*magnitudes) + torch.finfo(torch.float32).tiny
    assert ((found - exact).abs() <= allowed)[~bad].all()


def test_forward_and_gradient_are_those_of_a_linear_layer_bit_for_bit_where_fp8_is_exact():
    check_layer()
    run_distributed(1, check_layer, interpret=True)


def check_layer() -> None:
    for (batch, tokens), (columns, inner) in [((1, 1), (129, 200)), ((3, 50), (7, 1)), ((2, 65), (264, 129))]:
        weight = whole_numbers(columns, inner)
        for dtype in (torch.float32, torch.bfloat16):
            x = whole_numbers(batch, tokens, inner, seed=1).to(dtype).requires_grad_()
            grad = whole_numbers(tokens, batch, columns, seed=2).transpose(0, 1).to(dtype)
            stored = quantize(weight, SCALE_BLOCK)
            before = stored.data.view(torch.uint8).clone()
            with poisoned_memory():
                y = frozen_linear(x, stored)
                y.backward(grad)
            assert y.dtype == x.grad.dtype == dtype
            assert torch.equal(y, (x.double() @ weight.double().T).to(dtype))
            assert torch.equal(x.grad, (grad.double() @ weight.double()).to(dtype))
            assert torch.equal(stored.data.view(torch.uint8), before)
    x = whole_numbers(2, 7, 200).requires_grad_()
    frozen_linear(x, quantize(whole_numbers(128, 200), SCALE_BLOCK)).backward(torch.tensor(7.0).expand(2, 7, 128))
    assert torch.equal(x.grad, 7 * whole_numbers(128, 200).sum(dim=0).expand(2, 7, 200))
    for empty in (torch.empty(0, 200, requires_grad=True), torch.empty(3, 0, 200, requires_grad=True)):
        y = frozen_linear(empty, quantize(whole_numbers(129, 200), SCALE_BLOCK))
        y.sum().backward()
        assert y.shape == (*empty.shape[:-1], 129) and empty.grad.shape == empty.shape


def test_a_difference_counts_in_forward_and_gradient():
    check_difference()
    run_distributed(1, check_difference, interpret=True)


def check_difference() -> None:
    """Whole numbers of which fp32 holds every product and sum exactly."""
    for tokens, columns, inner in [(1, 129, 200), (50, 7, 1), (65, 264, 129)]:
        base, difference = whole_numbers(columns, inner), whole_numbers(columns, inner, seed=3) / 64
        stored = replace(quantize(base, SCALE_BLOCK), difference=quantize(difference, SCALE_BLOCK))
        x, grad = whole_numbers(tokens, inner, seed=1).requires_grad_(), whole_numbers(tokens, columns, seed=2)
        with poisoned_memory():
            y = frozen_linear(x, stored, rounds_inputs=False)
            y.backward(grad)
        weight = base.double() + difference.double()
        assert torch.equal(y.double(), x.double() @ weight.T)
        assert torch.equal(x.grad.double(), grad.double() @ weight)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_layer_errs_by_the_rounding_of_its_operands(dtype):
    """The relative error of x @ w.T is that of x and that of w, independent of one another, and the result's rounding:
    1.00 times their root sum of squares. So it is with the gradient. FP8 costs 2.6% per operand, 3.7% together; bf16's
    own rounding of the result, 0.17%, drowns in it.
    """
    generator = torch.Generator().manual_seed(5)
    x = torch.randn(300, 1000, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()
    grad = torch.randn(300, 700, generator=generator, dtype=torch.float64).to(dtype)
    weight = torch.randn(700, 1000, generator=generator, dtype=torch.float64).to(dtype)
    stored = quantize(weight, SCALE_BLOCK)
    y = frozen_linear(x, stored)
    y.backward(grad)

    def error(found: Tensor, truth: Tensor) -> float:
        return ((found.double() - truth).norm() / truth.norm()).item()

    def rounding(operand: Tensor, block_rows: int) -> float:
        return error(dequantize_reference(quantize_reference(operand, block_rows), torch.float64), operand.double())

    for found, left, right in [(y, x.detach(), weight.T), (x.grad, grad, weight)]:
        truth = left.double() @ right.double()
        operands = (rounding(left, 1) ** 2 + rounding(weight, SCALE_BLOCK) ** 2) ** 0.5
        assert 0.98 * operands <= error(found, truth) <= 1.02 * operands
        assert 0.025 < operands < 0.05 and error((left @ right).to(dtype), truth) < operands / 10


def test_a_layer_keeps_nothing_but_its_weight_and_one_scratch_copy_while_its_gradient_is_made():
    kept, scratch = [], []
    transpose = module.transpose

    def watched(weight: BlockScaled) -> BlockScaled:
        turned = transpose(weight)
        scratch.append(weakref.ref(turned.data))
        return turned

    stored = quantize(whole_numbers(130, 200), SCALE_BLOCK)
    x = whole_numbers(5, 200).requires_grad_()
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor) or tensor, lambda tensor: tensor):
        y = frozen_linear(x, stored)
    assert {tensor.data_ptr() for tensor in kept} == {stored.data.data_ptr(), stored.scale.data_ptr()}
    with mock.patch.object(module, "transpose", watched):
        y.sum().backward()
    assert len(scratch) == 1 and scratch[0]() is None
    assert not frozen_linear(x.detach(), stored).requires_grad


def test_a_weight_that_changes_before_the_backward_pass_is_refused():
    stored = quantize(whole_numbers(130, 200), SCALE_BLOCK)
    y = frozen_linear(whole_numbers(5, 200).requires_grad_(), stored)
    stored.scale.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


# M, N, K of the 32B layers at 8,192 tokens, whole and on 8 tensor-parallel ranks; ragged ones. With whether the weight
# is a transposed view, the dtype, registers per thread, shared bytes, and instructions that must be there.
LARGE = [(8192, 27648, 5120), (8192, 5120, 27648), (8192, 3456, 5120), (8192, 5120, 640)]
ODD = [(8191, 333, 144), (1000, 333, 129), (1, 7, 1)]
FAST, SLOW = ("QGMMA", "LDGSTS.E.BYPASS", "STG.E.128"), ("QGMMA", "LDGSTS.E.BYPASS")
BUDGETS = [
    (LARGE, False, torch.bfloat16, 128, 98304, FAST),
    (LARGE[:1], False, torch.float32, 128, 98304, FAST),
    (ODD, False, torch.bfloat16, 128, 98304, SLOW),
    (ODD[1:2], False, torch.float32, 128, 98304, SLOW),
    (LARGE[:2], True, torch.bfloat16, 192, 65536, FAST),
]


@pytest.mark.parametrize("sizes, transposed, dtype, registers, shared_bytes, instructions", BUDGETS)
def test_hopper_kernels_keep_their_budget(sizes, transposed, dtype, registers, shared_bytes, instructions):
    with mock.patch.object(module, "on_triton", return_value=True), compiled_for_hopper() as kernels:
        for rows, columns, inner in sizes:
            weight = unallocated(columns, inner, SCALE_BLOCK)
            if transposed:
                row_major = unallocated(inner, columns, SCALE_BLOCK)
                weight = BlockScaled(row_major.data.T, row_major.scale.T, SCALE_BLOCK)
            matmul(unallocated(rows, inner, 1), weight, dtype)
    assert len(kernels) == len(sizes)
    for kernel in kernels:
        assert kernel.spills == kernel.stack_bytes == 0
        assert kernel.registers <= registers and kernel.shared_bytes <= shared_bytes
        assert all(kernel.count(instruction) for instruction in instructions)
        if not transposed:
            # Two programs fit a multiprocessor: 65,536 registers, and 227 KB with 1 KB per program reserved.
            assert 2 * 32 * kernel.num_warps * kernel.registers <= 65536
            assert 2 * (kernel.shared_bytes + 1024) <= 227 * 1024


def test_both_products_of_the_layer_run_on_hoppers_fp8_tensor_cores():
    """The backward pass of the product path: quantise, transpose, and the same matrix product as the forward's."""
    with mock.patch.object(fp8, "on_triton", return_value=True), compiled_for_hopper() as kernels:
        with mock.patch.object(module, "on_triton", return_value=True):
            x = torch.empty(8192, 1, 5120, dtype=torch.bfloat16, device="meta", requires_grad=True)
            y = frozen_linear(x, unallocated(27648, 5120, SCALE_BLOCK))
            y.backward(torch.empty_like(y))
    quantized, product, transposed = "_quantize_kernel", "_matmul_kernel", "_transpose_kernel"
    backward = [quantized, transposed, product]
    assert sorted(kernel.name for kernel in kernels) == sorted([quantized, product, *backward])
    assert all(kernel.count("QGMMA") for kernel in kernels if kernel.name == product)
    assert x.grad.shape == x.shape
