"""The weighted cross-entropy, as reference and as kernels, against fp64 autograd through torch's own.

What the kernels must not read is NaN: padding columns, rows that count nothing, the memory that results go to.

Shapes: N tokens, V vocabulary before padding, V_local a rank's padded shard.
"""

from dataclasses import dataclass
from unittest import mock

import pytest
import torch
import torch.distributed as dist
import triton
import triton.language as tl
from torch import Tensor
from torch.nn.functional import cross_entropy as torchs_cross_entropy

from megatron_scalebio.kernels import cross_entropy as module
from megatron_scalebio.kernels.cross_entropy import _tanh, cross_entropy
from tests.distributed import run_distributed
from tests.guarded_memory import guarded, poisoned_memory
from tests.rounding import cross_entropy_errors, unit_roundoff


@dataclass(frozen=True)
class Case:
    num_tokens: int
    vocab_size: int
    padded: int  # columns of all ranks together
    scale: float = 1.0  # of the logits
    softcap: float | None = None
    confident: bool = False  # the target is the likeliest entry: small losses of large logits

    def inputs(self, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
        """Logits [N, V padded], NaN in the padding; targets; coefficients of both signs, tiny ones and zeros."""
        generator = torch.Generator().manual_seed(self.num_tokens)
        logits = torch.randn(self.num_tokens, self.padded, generator=generator, dtype=torch.float64) * self.scale
        logits[:, self.vocab_size :] = torch.nan
        targets = torch.randint(self.vocab_size, (self.num_tokens,), generator=generator)
        targets[:1] = self.vocab_size - 1
        if self.confident:
            targets = logits[:, : self.vocab_size].argmax(dim=1)
        coefs = torch.randn(self.num_tokens, generator=generator, dtype=torch.float64)
        coefs[2::5], coefs[1::4] = 1e-8, 0.0
        return logits.to(dtype), targets, coefs.to(torch.promote_types(dtype, torch.float32))

    def truth(self, logits: Tensor, targets: Tensor, coefs: Tensor) -> tuple[Tensor, Tensor]:
        """Losses [N] and the gradient [N, V padded] by autograd, in the precision of the arguments; as usual, bf16
        logits are made fp32 for the loss, and their gradient comes out in bf16."""
        leaf = logits[:, : self.vocab_size].clone().requires_grad_()
        capped = leaf.to(coefs.dtype)
        if self.softcap is not None:
            capped = self.softcap * torch.tanh(capped / self.softcap)
        losses = torchs_cross_entropy(capped, targets, reduction="none")
        (grad,) = torch.autograd.grad((coefs * losses).sum(), leaf)
        padding = grad.new_zeros(self.num_tokens, self.padded - self.vocab_size)
        return losses.detach(), torch.cat([grad, padding], dim=1)


CASES = [
    Case(1, 37, 64),
    Case(29, 100, 128),
    Case(6, 60, 128),  # four ranks: two of them hold padding alone
    Case(13, 60, 64, scale=30.0),  # logits up to 100
    Case(13, 60, 64, scale=30.0, confident=True),
    Case(29, 100, 128, softcap=30.0),
    Case(13, 60, 64, scale=30.0, softcap=30.0),
    Case(7, 90, 128, scale=0.1, softcap=2.0),
    Case(4, 20_000, 20_480, scale=5.0),  # several tiles of a row, the last one cut
    Case(3, 20_000, 20_480, scale=5.0, softcap=30.0),
]


@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_the_reference_equals_autograd_in_fp64(world_size):
    run_distributed(world_size, check_fp64)


@pytest.mark.parametrize("interpret", [False, True], ids=["reference", "kernels"])
@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_low_precision_errs_by_its_roundings(world_size, interpret):
    run_distributed(world_size, check_low_precision, interpret, interpret=interpret)


@pytest.mark.parametrize("interpret", [False, True], ids=["reference", "kernels"])
@pytest.mark.parametrize("world_size", [1, 2])
def test_a_token_that_counts_nothing_is_not_read(world_size, interpret):
    run_distributed(world_size, check_masked, interpret=interpret)


@pytest.mark.parametrize("interpret", [False, True], ids=["reference", "kernels"])
def test_a_non_finite_logit_makes_its_own_loss_non_finite_and_no_other(interpret):
    run_distributed(2, check_non_finite, interpret=interpret)


def test_rows_past_two_to_the_31_are_found():
    run_distributed(1, check_large_offsets, interpret=True)


def test_memory_that_the_kernels_would_misread_is_refused():
    run_distributed(1, check_strides, interpret=True)


def run(case: Case, dtype: torch.dtype, grad_dtype: torch.dtype | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """Losses and gradient of this rank's columns, and the logits afterwards. No `grad_dtype`: in place."""
    logits, targets, coefs = case.inputs(dtype)
    shard, targets, coefs = map(guarded, (logits.chunk(dist.get_world_size(), dim=1)[dist.get_rank()], targets, coefs))
    with poisoned_memory():
        grad = shard if grad_dtype is None else torch.empty_like(shard, dtype=grad_dtype)
        losses = cross_entropy(
            *(shard, targets, coefs, case.vocab_size, dist.group.WORLD, case.softcap, grad), skip_zero=False
        )
    every = [torch.empty_like(losses) for _ in range(dist.get_world_size())]
    dist.all_gather(every, losses)
    assert all(torch.equal(other, losses) for other in every), "ranks hold different token losses"
    return losses, whole(grad), whole(shard)


def whole(shard: Tensor) -> Tensor:
    shards = [torch.empty_like(shard) for _ in range(dist.get_world_size())]
    dist.all_gather(shards, shard.contiguous())
    return torch.cat(shards, dim=1)


def check_fp64() -> None:
    for case in CASES:
        losses, grad, _ = run(case, torch.float64)
        true_losses, true_grad = case.truth(*case.inputs(torch.float64))
        torch.testing.assert_close(losses, true_losses, rtol=1e-12, atol=1e-13)
        torch.testing.assert_close(grad, true_grad, rtol=1e-12, atol=1e-14)


def check_low_precision(kernels: bool) -> None:
    """Of fp32, and where the gradient is stored."""
    for case in CASES:
        for dtype, grad_dtype in [
            *((torch.float32, None), (torch.float32, torch.bfloat16), (torch.bfloat16, None)),
            (torch.bfloat16, torch.float32),
        ]:
            logits, targets, coefs = case.inputs(dtype)
            true_losses, true_grad = case.truth(logits.double(), targets, coefs.double())
            allowed = cross_entropy_errors(logits[:, : case.vocab_size].double(), targets, coefs, case.softcap)
            losses, grad, after = run(case, dtype, grad_dtype)
            if kernels and grad_dtype is not None:
                assert torch.equal(after.nan_to_num(0), logits.nan_to_num(0)), "the logits are not the gradient's place"
            excess = (losses.double() - true_losses).abs() / allowed.losses
            assert excess.max() <= 1, (case, dtype, excess.max())
            columns = slice(case.vocab_size)
            error = (grad.double() - true_grad).abs()[:, columns]
            bound = allowed.grad + unit_roundoff(grad.dtype) * true_grad.abs()[:, columns]
            smallest = torch.finfo(torch.float32).tiny
            assert (error <= bound + smallest).all(), (case, dtype, grad_dtype, (error / bound).max())
            assert not grad[:, case.vocab_size :].any(), "padding got a gradient"


def check_masked() -> None:
    for case in CASES[1], CASES[5], CASES[8]:
        logits, targets, coefs = case.inputs(torch.float32)
        masked = coefs == 0
        assert 0 < masked.sum() < len(masked)
        for none_counts in (False, True):
            if none_counts:
                coefs = torch.zeros_like(coefs)
                masked = coefs == 0
            shard = logits.chunk(dist.get_world_size(), dim=1)[dist.get_rank()].clone()
            shard[masked] = torch.nan
            with mock.patch.object(module, "_whole_vocabulary", wraps=module._whole_vocabulary) as exchange:
                losses = cross_entropy(shard, targets, coefs, case.vocab_size, dist.group.WORLD, case.softcap, shard)
            assert exchange.call_args.args[0].isfinite().all(), "a row of NaN was read"
            true_losses, true_grad = case.truth(logits, targets, coefs)
            torch.testing.assert_close(losses, torch.where(masked, 0.0, true_losses), rtol=2e-6, atol=2e-6)
            torch.testing.assert_close(whole(shard), true_grad, rtol=2e-6, atol=1e-7)
            assert not whole(shard)[masked].any() and not losses[masked].any()


def check_non_finite() -> None:
    case = CASES[1]
    for bad in (torch.nan, torch.inf):
        logits, targets, coefs = case.inputs(torch.float32)
        coefs[:] = 1.0
        logits[5, 70], logits[9, :64] = bad, -torch.inf  # the second leaves entries to choose from, on the other rank
        targets[9] = 80
        shard = logits.chunk(2, dim=1)[dist.get_rank()].clone()
        losses = cross_entropy(shard, targets, coefs, case.vocab_size, dist.group.WORLD, None, shard)
        assert losses.isfinite().tolist() == [row != 5 for row in range(case.num_tokens)]
        assert whole(shard).isfinite().all(dim=1).tolist() == [row != 5 for row in range(case.num_tokens)]


def test_the_polynomial_and_the_formula_of_tanh_meet():
    run_distributed(1, check_tanh, interpret=True)


def check_large_offsets() -> None:
    """Three short rows, far apart in memory of which only they are touched."""
    case = Case(3, 250, 256)
    values, targets, coefs = case.inputs(torch.bfloat16)
    stride = 2**30 + 64
    logits = torch.empty(2 * stride + 256, dtype=torch.bfloat16).as_strided((3, 256), (stride, 1)).copy_(values)
    losses = [cross_entropy(x, targets, coefs, 250, dist.group.WORLD, grad=x) for x in (logits, values)]
    assert torch.equal(*losses) and torch.equal(logits, values)


def check_strides() -> None:
    logits, targets, coefs = CASES[1].inputs(torch.float32)
    for name, wrong in {
        "logits": dict(logits=logits.T.contiguous().T),
        "grad": dict(grad=logits.T.contiguous().T),
        "targets": dict(targets=targets.repeat_interleave(2)[::2]),
        "loss_coef": dict(loss_coef=torch.ones(1).expand(len(coefs))),
    }.items():
        arguments = dict(logits=logits, targets=targets, loss_coef=coefs, vocab_size=100, group=dist.group.WORLD)
        with pytest.raises(ValueError, match=f"{name}: the last dimension must have stride 1"):
            cross_entropy(**(arguments | wrong))


@triton.jit
def evaluate_tanh(x, y, BLOCK: tl.constexpr):
    lanes = tl.arange(0, BLOCK)
    tl.store(y + lanes, _tanh(tl.load(x + lanes)))


def check_tanh() -> None:
    """The kernels' tanh in units in the last place of the result."""
    x = torch.cat([torch.linspace(-12, 12, 8000), torch.tensor([0.0, 0.625, -0.625, 1e-20, 100.0, -3e38])])
    x = torch.cat([x, torch.linspace(-0.7, 0.7, 8192 - len(x))])
    y = torch.full_like(x, torch.nan)
    evaluate_tanh[(1,)](x, y, BLOCK=8192)
    exact = torch.tanh(x.double())
    ulp = torch.where(exact == 0, 1.0, 2.0 ** (exact.abs().log2().floor() - 23))
    assert ((y.double() - exact).abs() / ulp).max() <= 2.5
