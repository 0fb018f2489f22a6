"""The fused head and loss against autograd through plain cross-entropy, and AdamW against torch's.

Shapes: N tokens, H hidden, V vocabulary before padding, V_local a rank's padded shard.
"""

from unittest import mock

import pytest
import torch
import torch.distributed as dist
from megatron_scalebio.kernels import head_loss as module
from megatron_scalebio.kernels.adamw import adamw_update, sum_of_squares
from megatron_scalebio.kernels.head_loss import head_loss
from torch import Tensor
from torch.nn.functional import cross_entropy

from tests.distributed import run_distributed

# N, H, V, padded V, deviation of the logits. On 4 ranks the padded 128 leave one with padding alone.
SIZES = [
    (0, 5, 37, 64, 1.0),
    (1, 7, 60, 128, 1.0),
    (29, 33, 100, 128, 1.0),
    (64, 12, 90, 128, 3.0),
    (13, 8, 60, 64, 30.0),
]


@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_loss_and_gradients_equal_autograd_through_plain_cross_entropy_in_fp64(world_size):
    run_distributed(world_size, check_fp64)


@pytest.mark.parametrize("world_size", [1, 2])
def test_low_precision_errs_no_more_than_plain_code_of_the_same_precision(world_size):
    run_distributed(world_size, check_low_precision)


def test_a_frozen_weight_gets_no_gradient_and_the_gradient_of_the_scalar_counts():
    run_distributed(1, check_what_needs_a_gradient)


def inputs(size: tuple[int, int, int, int, float], dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """hidden [N, H], weight [V_padded, H], targets, coefficients of both signs, tiny ones and zeros among them."""
    num_tokens, hidden_size, vocab_size, padded, deviation = size
    generator = torch.Generator().manual_seed(num_tokens)
    hidden = torch.randn(num_tokens, hidden_size, generator=generator, dtype=torch.float64)
    weight = torch.randn(padded, hidden_size, generator=generator, dtype=torch.float64) * deviation / hidden_size**0.5
    targets = torch.randint(vocab_size, (num_tokens,), generator=generator)
    if num_tokens:
        targets[0] = vocab_size - 1
    coefs = torch.randn(num_tokens, generator=generator, dtype=torch.float64)
    coefs[::5], coefs[1::7] = 1e-8, 0.0
    return hidden.to(dtype), weight.to(dtype), targets, coefs


def plain(hidden, weight, targets, coefs, vocab_size, logits_dtype):
    """Losses and gradients by autograd; logits of padding do not exist."""
    hidden, weight = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
    logits = (hidden @ weight[:vocab_size].T).to(logits_dtype)
    losses = cross_entropy(logits, targets, reduction="none")
    grads = torch.autograd.grad((coefs.to(logits_dtype) * losses).sum(), (hidden, weight))
    return losses.detach(), *grads


def sharded(hidden, weight, targets, coefs, vocab_size):
    """The operation on this rank's rows of the weight; whole results, with what came out of `torch.empty` poisoned."""
    rank, size = dist.get_rank(), dist.get_world_size()
    hidden, shard = hidden.clone().requires_grad_(), weight.chunk(size)[rank].clone().requires_grad_()
    with poisoned_memory():
        loss, losses = head_loss(hidden, shard, targets, coefs, vocab_size, dist.group.WORLD)
        assert not losses.requires_grad
        loss.backward()
    total = (coefs.to(losses.dtype) * losses).sum()
    torch.testing.assert_close(loss.detach(), total)
    grad_hidden = hidden.grad.clone()
    dist.all_reduce(grad_hidden)
    grads = [torch.empty_like(shard.grad) for _ in range(size)]
    dist.all_gather(grads, shard.grad)
    gathered = [torch.empty_like(losses) for _ in range(size)]
    dist.all_gather(gathered, losses)
    assert all(torch.equal(other, losses) for other in gathered), "ranks hold different token losses"
    return losses, grad_hidden, torch.cat(grads)


def poisoned_memory():
    """Memory that is allocated without being written holds NaN, so that a number that is never computed shows."""
    empty, empty_like = torch.empty, torch.empty_like

    def poison(factory):
        return lambda *args, **kwargs: poisoned(factory(*args, **kwargs))

    def poisoned(tensor: Tensor) -> Tensor:
        return tensor.fill_(float("nan")) if tensor.is_floating_point() else tensor

    return mock.patch.multiple(torch, empty=poison(empty), empty_like=poison(empty_like))


def check_fp64() -> None:
    for size in SIZES:
        vocab_size = size[2]
        hidden, weight, targets, coefs = inputs(size, torch.float64)
        expected = plain(hidden, weight, targets, coefs, vocab_size, torch.float64)
        if size[4] > 10:
            assert (hidden @ weight.T).abs().max() > 60
        for tokens_per_chunk in (1024, 10):
            with mock.patch.object(module, "TOKENS_PER_CHUNK", tokens_per_chunk):
                found = sharded(hidden, weight, targets, coefs, vocab_size)
            for mine, truth in zip(found, expected, strict=True):
                torch.testing.assert_close(mine, truth, rtol=1e-12, atol=1e-13)
        assert not found[2][vocab_size:].any(), "padding got a gradient"


def check_low_precision() -> None:
    for dtype in (torch.float32, torch.bfloat16):
        for size in SIZES[2:]:
            hidden, weight, targets, coefs = inputs(size, dtype)
            truth = plain(hidden.double(), weight.double(), targets, coefs, size[2], torch.float64)
            usual = plain(hidden, weight, targets, coefs.float(), size[2], torch.float32)
            found = sharded(hidden, weight, targets, coefs.float(), size[2])
            for mine, theirs, exact in zip(found, usual, truth, strict=True):
                error, allowed = (mine.double() - exact).norm(), (theirs.double() - exact).norm()
                assert error <= 1.5 * allowed + 1e-7 * exact.norm(), (dtype, size, error, allowed)


def check_what_needs_a_gradient() -> None:
    size = SIZES[2]
    hidden, weight, targets, coefs = inputs(size, torch.float64)
    _, grad_hidden, grad_weight = plain(hidden, weight, targets, coefs, size[2], torch.float64)
    for needs_hidden, needs_weight in [(True, False), (False, True)]:
        x, w = hidden.clone().requires_grad_(needs_hidden), weight.clone().requires_grad_(needs_weight)
        loss, _ = head_loss(x, w, targets, coefs, size[2], dist.group.WORLD)
        (-2.5 * loss).backward()
        for leaf, needed, gradient in ((x, needs_hidden, grad_hidden), (w, needs_weight, grad_weight)):
            assert (leaf.grad is not None) == needed
            if needed:
                torch.testing.assert_close(leaf.grad, -2.5 * gradient, rtol=1e-12, atol=1e-13)
    with torch.no_grad():
        loss, losses = head_loss(hidden, weight, targets, coefs, size[2], dist.group.WORLD)
    assert not loss.requires_grad and losses.isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_adamw_update_is_torchs_adamw_on_the_master(dtype):
    """With bf16 weights the master is torch's fp32 parameter, and the weights are its rounding."""
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    generator = torch.Generator().manual_seed(0)
    parameter = torch.randn(50, generator=generator, dtype=wide).requires_grad_()
    adamw = torch.optim.AdamW([parameter], betas=(0.8, 0.95), eps=1e-6, weight_decay=0.1)
    master = parameter.detach().clone()
    weights = master.to(dtype) if dtype != wide else master
    moments = torch.zeros(2, 50, dtype=wide)
    for step in range(1, 8):
        gradient = torch.randn(50, generator=generator, dtype=wide)
        kept, scale = gradient.clone(), torch.tensor(0.5 if step % 2 else 1.0, dtype=wide)
        adamw.param_groups[0]["lr"] = lr = 0.1 / step
        parameter.grad = gradient * scale
        adamw.step()
        adamw_update(
            *(weights, master, gradient, moments[0], moments[1]),
            **dict(step=step, lr=lr, betas=(0.8, 0.95), eps=1e-6, weight_decay=0.1, gradient_scale=scale),
        )
        precision = torch.finfo(wide).eps
        torch.testing.assert_close(master, parameter.detach(), rtol=10 * precision, atol=10 * precision)
        assert torch.equal(weights, master.to(dtype))
        assert torch.equal(gradient, kept), "the gradient is needed after the update, for the record"


def test_sum_of_squares_is_accumulated_in_fp64():
    gradient = torch.full((10_000,), 1e-3) + torch.arange(10_000) * 1e-9
    assert sum_of_squares(gradient).item() == pytest.approx((gradient.double() ** 2).sum().item(), rel=1e-12)
