"""The active set's update against torch's AdamW, and the norm that clips it; as references and as kernels."""

from unittest import mock

import pytest
import torch

from megatron_scalebio.kernels import sum_of_squares as module
from megatron_scalebio.kernels.adamw import adamw_update
from megatron_scalebio.kernels.moments import Moment
from megatron_scalebio.kernels.sum_of_squares import sum_of_squares
from tests.distributed import run_distributed


@pytest.mark.parametrize("weights_dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_the_update_is_torchs_adamw_on_the_master(weights_dtype):
    run_distributed(1, check_update, weights_dtype)


@pytest.mark.parametrize("weights_dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_kernels_update_is_torchs_adamw_on_the_master(weights_dtype):
    run_distributed(1, check_update, weights_dtype, interpret=True)


@pytest.mark.parametrize("kind", [None, "bf16", "fp8"])
@pytest.mark.parametrize("interpret", [False, True], ids=["reference", "kernel"])
def test_a_gradient_that_is_not_finite_reaches_its_own_parameter_alone(interpret, kind):
    run_distributed(1, check_non_finite, kind, interpret=interpret)


@pytest.mark.parametrize("interpret", [False, True], ids=["reference", "kernel"])
def test_sum_of_squares_is_accumulated_in_fp64(interpret):
    run_distributed(1, check_sum_of_squares, interpret=interpret)


def check_update(dtype: torch.dtype) -> None:
    """With bf16 weights the master is torch's fp32 parameter, and the weights are its rounding. The first parameters
    are decayed, the others not: two groups for torch."""
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    generator = torch.Generator().manual_seed(0)
    settings = dict(betas=(0.8, 0.95), eps=1e-6)
    for numel, num_decayed in ((1, 0), (50, 20), (1500, 1500), (1500, 1030)):
        values = torch.randn(numel, generator=generator, dtype=wide)
        groups = [values[:num_decayed].clone().requires_grad_(), values[num_decayed:].clone().requires_grad_()]
        adamw = torch.optim.AdamW([{"params": [groups[0]], "weight_decay": 0.1}], **settings)
        adamw.add_param_group({"params": [groups[1]], "weight_decay": 0.0})
        master = values.clone()
        weights = torch.full_like(master, torch.nan, dtype=dtype) if dtype != wide else master
        moments = torch.zeros(2, numel, dtype=wide)
        for step in range(1, 6):
            gradient = torch.randn(numel, generator=generator, dtype=wide) * 10.0 ** (step - 3)
            kept, scale = gradient.clone(), torch.tensor(0.5 if step % 2 else 1.0, dtype=wide)
            for group, part in zip(adamw.param_groups, (slice(num_decayed), slice(num_decayed, None)), strict=True):
                group["lr"] = 0.1 / step
                group["params"][0].grad = gradient[part] * scale
            adamw.step()
            adamw_update(
                *(weights, master, gradient, moments[0], moments[1]),
                **dict(num_decayed=num_decayed, step=step, lr=0.1 / step, weight_decay=0.1, gradient_scale=scale),
                **settings,
            )
            expected = torch.cat([group.detach() for group in groups])
            precision = torch.finfo(wide).eps
            torch.testing.assert_close(master, expected, rtol=10 * precision, atol=10 * precision)
            assert torch.equal(weights, master.to(dtype))
            assert torch.equal(gradient, kept), "the gradient is needed after the update, for the record"


def check_non_finite(kind: str | None) -> None:
    """One more update, with a finite gradient, must not bring the parameter back. A NaN of a GPU has every bit set, to
    which nothing may be added."""
    pair = [Moment.zeros(100, kind, torch.float32, torch.device("cpu")) for _ in range(2)]
    master, weights = torch.ones(100), torch.zeros(100, dtype=torch.bfloat16)
    for step in (1, 2):
        gradient = torch.ones(100)
        if step == 1:
            gradient.view(torch.int32)[17], gradient.view(torch.int32)[18] = 0x7FFFFFFF, -1
            gradient[19], gradient[20] = torch.inf, -torch.inf
        adamw_update(
            *(weights, master, gradient, *pair),
            **dict(num_decayed=50, step=step, lr=0.1, betas=(0.9, 0.99), eps=1e-8, weight_decay=0.1),
            gradient_scale=torch.ones(()),
        )
        for tensor in (weights, master, *(moment.values.float() for moment in pair)):
            assert tensor.isfinite().tolist() == [not 17 <= index <= 20 for index in range(100)]
        assert all(moment.scale is None or moment.scale.isfinite().all() for moment in pair)


def check_sum_of_squares() -> None:
    for numel in (0, 1, 5000, 70_000):
        gradient = torch.full((numel,), 1e-3) + torch.arange(numel) * 1e-9
        expected = (gradient.double() ** 2).sum()
        assert sum_of_squares(gradient).dtype == torch.float64
        for most_programs in (1024, 3):  # the second: each adds up several tiles
            with mock.patch.object(module, "MOST_PROGRAMS", most_programs):
                found = [sum_of_squares(gradient) for _ in range(2)]
            assert found[0].item() == pytest.approx(expected.item(), rel=1e-12)
            assert torch.equal(*found)
    assert sum_of_squares(torch.tensor([1.0, torch.nan, 2.0])).isnan()
