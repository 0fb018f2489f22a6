"""The gated activation: the reference against PyTorch's own operations, the kernels, interpreted, against fp64.

Shapes: R rows, F feed-forward.
"""

import itertools
from unittest import mock

import pytest
import torch
from torch import Tensor

from megatron_scalebio.kernels import gated_activation as module
from megatron_scalebio.kernels.gated_activation import ACTIVATIONS, gated_activation
from tests.distributed import run_distributed
from tests.guarded_memory import guarded, poisoned_memory
from tests.hopper import compiled_for_hopper

EPS = torch.finfo(torch.float32).eps
# Leading dimensions and F: one number, odd ones, rows of several tiles whose last is cut off, whole 16-byte accesses.
SIZES = [((1,), 1), ((3,), 7), ((2, 1, 3), 333), ((2, 2), 2049), ((3,), 2064)]

EACH = pytest.mark.parametrize("activation", ACTIVATIONS)


def numbers(*shape: int, seed: int) -> Tensor:
    """fp32, from tails where a sigmoid is 1e-9 to where it is a half."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator) * 4 * torch.rand(shape, generator=generator)


def as_megatron_core(gate_and_up: Tensor, activation: str) -> Tensor:
    """`glu` of MLP.forward in Megatron-Core 0.19.2."""
    gate, up = torch.chunk(gate_and_up, 2, dim=-1)
    return ACTIVATIONS[activation](gate) * (up + 0.0)


@EACH
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_the_reference_has_the_bits_of_megatron_cores_operations(dtype, activation):
    for leading, features in SIZES:
        x = numbers(*leading, 2 * features, seed=0).to(dtype).requires_grad_()
        grad = numbers(*leading, features, seed=1).to(dtype)
        expected = as_megatron_core(x, activation)
        (expected_grad,) = torch.autograd.grad(expected, x, grad)
        found = gated_activation(x, activation)
        (found_grad,) = torch.autograd.grad(found, x, grad)
        assert found.dtype == found_grad.dtype == dtype
        assert torch.equal(found, expected) and torch.equal(found_grad, expected_grad)


@EACH
def test_the_gradient_is_that_of_the_value(activation):
    x = (3 * numbers(2, 3, 10, seed=2).double()).requires_grad_()
    torch.autograd.gradcheck(lambda x: gated_activation(x, activation), x, rtol=1e-7, atol=1e-9)


@EACH
def test_the_kernels_compute_in_fp32_and_round_once(activation):
    run_distributed(1, check_kernels, activation, interpret=True)


def check_kernels(activation: str) -> None:
    for leading, features in SIZES:
        for dtype in (torch.float32, torch.bfloat16):
            x = guarded(numbers(*leading, 2 * features, seed=3).to(dtype)).requires_grad_()
            grad = guarded(numbers(*leading, features, seed=4).to(dtype))
            with poisoned_memory():
                found = gated_activation(x, activation)
                (found_grad,) = torch.autograd.grad(found, x, grad)
            assert found.shape == (*leading, features) and found_grad.shape == x.shape
            assert_close_to_truth(found, found_grad, x.detach(), grad, activation)


def assert_close_to_truth(found: Tensor, found_grad: Tensor, x: Tensor, grad: Tensor, activation: str) -> None:
    """Half a unit in the last place of the dtype, and for the steps in fp32 some of its units in the last place of what
    is multiplied with a sigmoid or a slope, which are about 1 at most. 1.6 were seen."""
    wide = x.double().requires_grad_()
    truth = as_megatron_core(wide, activation)
    (truth_grad,) = torch.autograd.grad(truth, wide, grad.double())
    gate, up = wide.detach().chunk(2, dim=-1)
    magnitudes = {
        "value": (found, truth.detach(), gate * up),
        "gradient": (found_grad, truth_grad, torch.cat((grad * up, grad * gate), dim=-1)),
    }
    for name, (one, exact, scale) in magnitudes.items():
        allowed = torch.finfo(x.dtype).eps / 2 * exact.abs() + 4 * EPS * scale.abs() + torch.finfo(torch.float32).tiny
        excess = ((one.double() - exact).abs() / allowed).max()
        assert one.dtype == x.dtype and excess <= 1, (name, x.dtype, excess)


SPECIAL = [0.0, -0.0, 1e-30, -1e-30, 20.0, -20.0, 100.0, -100.0, 1e4, -1e4, 1e10, -1e10]
BAD = [torch.nan, torch.inf, -torch.inf]


@EACH
@pytest.mark.parametrize("interpret", [False, True], ids=["reference", "kernel"])
def test_large_numbers_have_finite_results_and_bad_ones_spoil_their_own(interpret, activation):
    run_distributed(1, check_special_numbers, activation, interpret=interpret)


def check_special_numbers(activation: str) -> None:
    """Every gate with every up and every gradient: one row."""
    values = torch.tensor([*SPECIAL, *BAD])
    gate, up, grad = torch.tensor(list(itertools.product(values.tolist(), repeat=3))).T.contiguous()
    x = torch.cat((gate, up)).requires_grad_()
    found = gated_activation(x, activation)
    (found_grad,) = torch.autograd.grad(found, x, grad)
    expected = as_megatron_core(x, activation)
    (expected_grad,) = torch.autograd.grad(expected, x, grad)
    assert torch.equal(found.isfinite(), expected.isfinite())
    assert torch.equal(found_grad.isfinite(), expected_grad.isfinite())
    good = gate.isfinite() & up.isfinite()
    assert found[good].isfinite().all() and not found[~good & ~((gate <= -20) | (gate == 0))].isfinite().any()
    good &= grad.isfinite()
    both = torch.cat((good, good))
    assert found_grad[both].isfinite().all()
    assert_close_to_truth(found[good], found_grad[both], x.detach()[both], grad[good], activation)


@pytest.mark.parametrize("interpret", [False, True], ids=["reference", "kernel"])
def test_any_layout_and_no_rows_at_all(interpret):
    run_distributed(1, check_layouts, interpret=interpret)


def check_layouts() -> None:
    whole = numbers(4, 3, 20, seed=5)
    grad = numbers(4, 3, 10, seed=6)
    expected = values_and_gradient(whole, grad)
    turned = whole.permute(2, 1, 0).contiguous().permute(2, 1, 0)
    for x, gradient in [
        (whole, grad.permute(2, 0, 1).contiguous().permute(1, 2, 0)),
        (whole, torch.stack((grad, grad), dim=-1)[..., 0]),
        (turned, grad),
        (torch.cat((whole, whole), dim=-1)[..., :20], grad),
    ]:
        assert not (x.is_contiguous() and gradient.is_contiguous())
        torch.testing.assert_close(values_and_gradient(x, gradient), expected, rtol=4 * EPS, atol=0)
    expanded = torch.tensor(7.0).expand(4, 3, 10)
    expected = values_and_gradient(whole, expanded.clone())
    torch.testing.assert_close(values_and_gradient(whole, expanded), expected, rtol=4 * EPS, atol=0)
    for shape in ((0, 20), (3, 0, 20)):
        found, gradient = values_and_gradient(torch.empty(shape), torch.empty(*shape[:-1], 10))
        assert found.shape == (*shape[:-1], 10) and gradient.shape == shape


def values_and_gradient(x: Tensor, grad: Tensor) -> tuple[Tensor, Tensor]:
    x = x.detach().requires_grad_()
    found = gated_activation(x, "silu")
    return found.detach(), torch.autograd.grad(found, x, grad)[0]


def test_rows_may_begin_beyond_2_to_the_31():
    run_distributed(1, check_far_rows, interpret=True)


def check_far_rows() -> None:
    """Of 8 GB but the pages of the last tile come to exist: it alone is computed."""
    from triton.runtime.interpreter import interpreter_builder

    rows, features, tile = 1025, 2**20, slice(-2048, None)
    x = torch.empty(rows, 2, features, dtype=torch.bfloat16)
    grad = torch.empty(rows, features, dtype=torch.bfloat16)
    x[-1, :, tile], grad[-1, tile] = numbers(2, 2048, seed=7), numbers(2048, seed=8)
    last = rows * features // 2048 - 1
    launch = module._launch

    def one_program(*arguments):
        (programs,), settings = launch(*arguments)
        assert programs == last + 1
        return (1,), settings

    def begin(*_):
        interpreter_builder.grid_idx = (last, 0, 0)

    with mock.patch.object(module, "_launch", one_program):
        with mock.patch.object(interpreter_builder, "set_grid_idx", begin):
            found = module._on_triton(x.view(rows, -1), "silu")
            found_grad = module._backward_on_triton(x.view(rows, -1), grad, "silu")
    near, near_grad = x[-1, :, tile].flatten(), grad[-1, tile]
    expected = values_and_gradient(near, near_grad)
    assert torch.equal(found[-1, tile], expected[0])
    assert torch.equal(found_grad.view_as(x)[-1, :, tile].flatten(), expected[1])


@EACH
def test_nothing_but_the_input_is_kept(activation):
    kept = []
    x = numbers(5, 20, seed=9).requires_grad_()
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor) or tensor, lambda tensor: tensor):
        found = gated_activation(x, activation)
    assert [tensor.data_ptr() for tensor in kept] == [x.data_ptr()] and kept[0].shape == x.shape
    assert found.requires_grad and not gated_activation(x.detach(), activation).requires_grad


# F of Qwen-2.5-32B whole and on 8 tensor-parallel ranks, and of Gemma-2-9B; ragged ones. Registers of forward and
# backward: the budget of Triton 3.7, rounded up to the unit of allocation. At most 64 of them leave 32 warps a
# multiprocessor, each with its 4 or 6 loads of 512 bytes in flight. One exponential a number, of which the assembler
# repeats a few.
LARGE, RAGGED = [27648, 3456, 14336], [333, 24]
BUDGETS = [
    (LARGE, torch.bfloat16, (40, 56), 18, True),
    (LARGE, torch.float32, (32, 40), 10, True),
    (RAGGED, torch.bfloat16, (48, 80), 18, False),
    (RAGGED, torch.float32, (32, 48), 12, False),
]


@EACH
@pytest.mark.parametrize("sizes, dtype, registers, exponentials, wide", BUDGETS)
def test_hopper_kernels_keep_their_budget(sizes, dtype, registers, exponentials, wide, activation):
    with mock.patch.object(module, "on_triton", return_value=True), compiled_for_hopper() as kernels:
        for features in sizes:
            x = torch.empty(4096, 1, 2 * features, dtype=dtype, device="meta", requires_grad=True)
            y = gated_activation(x, activation)
            y.backward(torch.empty_like(y))
    assert [kernel.name for kernel in kernels] == ["_forward_kernel", "_backward_kernel"] * len(sizes)
    accesses = {"_forward_kernel": (4, 2), "_backward_kernel": (6, 4)}
    for kernel, most in zip(kernels, registers * len(sizes), strict=True):
        assert kernel.spills == kernel.stack_bytes == 0
        assert kernel.registers <= most and kernel.count("MUFU.EX2") <= exponentials
        if wide:
            assert (kernel.count("LDG.E.128"), kernel.count("STG.E.128")) == accesses[kernel.name]
            assert (kernel.count("LDG"), kernel.count("STG"), kernel.shared_bytes) == (*accesses[kernel.name], 0)
