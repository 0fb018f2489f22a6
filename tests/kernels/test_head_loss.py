"""The fused head and loss, with the references and with the kernels, against autograd through plain cross-entropy.

Shapes: N tokens, H hidden, V vocabulary before padding, V_local a rank's padded shard.
"""

from itertools import product
from types import SimpleNamespace
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.functional import cross_entropy

from megatron_scalebio.kernels import head_loss as module
from megatron_scalebio.kernels.dispatch import on_triton
from megatron_scalebio.kernels.head_loss import head_loss
from tests.distributed import run_distributed
from tests.guarded_memory import guarded, poisoned_memory
from tests.rounding import cross_entropy_errors, product_error, rounded_operand_error, unit_roundoff

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


@pytest.mark.parametrize("interpret", [False, True], ids=["references", "kernels"])
@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_low_precision_errs_by_its_roundings(world_size, interpret):
    run_distributed(world_size, check_low_precision, interpret=interpret)


def test_a_frozen_weight_gets_no_gradient_and_the_gradient_of_the_scalar_counts():
    run_distributed(1, check_what_needs_a_gradient)


@pytest.mark.parametrize("interpret", [False, True], ids=["references", "kernels"])
def test_the_weights_gradient_is_added_to_main_grad_unrounded(interpret):
    run_distributed(1, check_main_grad, interpret=interpret)


@pytest.mark.parametrize("interpret", [False, True], ids=["references", "kernels"])
def test_the_difference_of_two_nearly_equal_models_is_not_drowned_in_rounding(interpret):
    run_distributed(2, check_difference, interpret=interpret)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_the_products_that_a_gpu_takes_are_torchs_with_these_dtypes_and_places(dtype):
    """On CUDA tensors without memory, whose operators check what they are given: three chunks, a last one cut."""
    tokens, device = 9000, "cuda"
    kept = []
    context = SimpleNamespace(save_for_backward=lambda *tensors: kept.extend(tensors))
    context.mark_non_differentiable = lambda tensor: None
    no_loss = mock.patch.object(module, "cross_entropy", lambda logits, *_, **__: logits.new_empty(len(logits)))
    with FakeTensorMode(), no_loss, torch.no_grad():
        hidden, weight = (torch.empty(rows, 64, dtype=dtype, device=device) for rows in (tokens, 512))
        targets, coefs = torch.empty(tokens, dtype=torch.int64, device=device), torch.empty(tokens, device=device)
        wanted = (True, True)
        loss, losses = module._HeadLoss.forward(
            context, hidden, weight, targets, coefs, 512, dist.group.WORLD, None, None, wanted
        )
    assert loss.device.type == losses.device.type == device and losses.dtype == torch.float32
    assert [(gradient.dtype, tuple(gradient.shape)) for gradient in kept] == [
        *((dtype, (tokens, 64)), (torch.float32, (512, 64))),
    ]


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


def plain(hidden, weight, targets, coefs, vocab_size, logits_dtype, softcap=None):
    """Losses and gradients by autograd; logits of padding do not exist."""
    hidden, weight = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
    logits = (hidden @ weight[:vocab_size].T).to(logits_dtype)
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    losses = cross_entropy(logits, targets, reduction="none")
    grads = torch.autograd.grad((coefs.to(logits_dtype) * losses).sum(), (hidden, weight))
    return losses.detach(), *grads


def sharded(hidden, weight, targets, coefs, vocab_size, softcap=None, scale=1.0):
    """The operation on this rank's rows of the weight; whole results, with what came out of `torch.empty` poisoned."""
    rank, size = dist.get_rank(), dist.get_world_size()
    hidden, shard = (guarded(tensor).requires_grad_() for tensor in (hidden, weight.chunk(size)[rank]))
    with poisoned_memory():
        loss, losses = head_loss(hidden, shard, targets, coefs, vocab_size, dist.group.WORLD, softcap)
        assert not losses.requires_grad
        (scale * loss).backward()
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


def check_fp64() -> None:
    for size in SIZES:
        vocab_size = size[2]
        hidden, weight, targets, coefs = inputs(size, torch.float64)
        if size[4] > 10:
            assert (hidden @ weight.T).abs().max() > 60
        for softcap, tokens_per_chunk in ((None, 1024), (None, 10), (30.0, 10)):
            expected = plain(hidden, weight, targets, coefs, vocab_size, torch.float64, softcap)
            with mock.patch.dict(module.TOKENS_PER_CHUNK, cpu=tokens_per_chunk):
                found = sharded(hidden, weight, targets, coefs, vocab_size, softcap)
            for mine, truth in zip(found, expected, strict=True):
                torch.testing.assert_close(mine, truth, rtol=1e-12, atol=1e-13)
            assert not found[2][vocab_size:].any(), "padding got a gradient"


def check_low_precision() -> None:
    """Errors in the 2-norm: losses by the roundings of fp32, the products of bf16 by those of their operands, too."""
    for dtype, softcap, bf16_cpu in product((torch.float32, torch.bfloat16), (None, 30.0), (True, False)):
        for size in SIZES[1:]:
            hidden, weight, targets, coefs = inputs(size, dtype)
            scale = 1 / 3  # no bf16 number
            exact = hidden.double(), weight.double(), targets, coefs * scale, size[2]
            truth = plain(*exact, torch.float64, softcap)
            with mock.patch.dict(module.TOKENS_PER_CHUNK, cpu=10), a_cpu(bf16_cpu):
                found = sharded(hidden, weight, targets, coefs.float(), size[2], softcap, scale)
            names = ("losses", "hidden", "weight")
            for name, mine, true, allowed in zip(names, found, truth, errors(*exact, softcap, dtype), strict=True):
                error = (mine.double() - true).norm()
                assert error <= allowed.norm(), (name, dtype, softcap, size, error / allowed.norm())


def errors(hidden, weight, targets, coefs, vocab_size, softcap, dtype) -> tuple[Tensor, Tensor, Tensor]:
    """Of losses and both gradients; the gradient of the logits is rounded to `dtype` for its products."""
    weight, fp32 = weight[:vocab_size], torch.float32
    logits = (hidden @ weight.T).requires_grad_()
    of_logits = product_error(hidden, weight.T, fp32)
    of_losses, of_grad = cross_entropy_errors(logits.detach(), targets, coefs, softcap, of_logits)
    capped = logits if softcap is None else softcap * torch.tanh(logits / softcap)
    loss = (coefs * cross_entropy(capped, targets, reduction="none")).sum()
    (grad,) = torch.autograd.grad(loss, logits)
    # Each rank's part is rounded as a product's result, after the scale, and as it is added to the others.
    ranks = zip(*(x.chunk(dist.get_world_size(), dim) for x, dim in ((grad, 1), (weight, 0))), strict=True)
    of_parts = 3 * unit_roundoff(dtype) * sum((part @ rows).abs() for part, rows in ranks)
    of_hidden = of_grad @ weight.abs() + rounded_operand_error(grad, weight, dtype) + product_error(grad, weight, fp32)
    of_weight = of_grad.T @ hidden.abs() + rounded_operand_error(grad.T, hidden, dtype)
    of_weight += product_error(grad.T, hidden, fp32) + 3 * unit_roundoff(dtype) * (grad.T @ hidden).abs()
    return of_losses, of_hidden + of_parts, of_weight


def a_cpu(multiplies_bf16: bool):
    """One that has, or has not, instructions for products of bf16."""
    return mock.patch.object(module, "cpu_multiplies_bf16", lambda: multiplies_bf16)


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


def check_main_grad() -> None:
    """Two chunks and two calls, as micro-batches make them: what bf16 would have swallowed is there."""
    for bf16_cpu in (True, False):
        with a_cpu(bf16_cpu):
            check_main_grad_here()


def check_main_grad_here() -> None:
    size = SIZES[3]
    hidden, weight, targets, coefs = inputs(size, torch.bfloat16)
    weight.requires_grad_()
    kept = torch.randn(weight.shape, generator=torch.Generator().manual_seed(1))
    main_grad = kept.clone()
    for _ in range(2):
        with mock.patch.dict(module.TOKENS_PER_CHUNK, cpu=40):
            loss, _ = head_loss(hidden, weight, targets, coefs.float(), size[2], dist.group.WORLD, main_grad=main_grad)
        (-0.5 * loss).backward()
    assert weight.grad is None
    gradient = plain(hidden.double(), weight.detach().double(), targets, coefs, size[2], torch.float64)[2]
    error = (main_grad - kept + gradient).norm() / gradient.norm()
    # Products of bf16 take the logits' gradient in bf16, as plain code of that precision does; its sum is fp32.
    assert error <= 2**-9 if on_triton(hidden) or module.cpu_multiplies_bf16() else error <= 1e-6, error
    assert torch.backends.mkldnn.matmul.fp32_precision == "none"


def check_difference() -> None:
    """Token losses of upper minus lower, as the hypergradient takes them: the models are as close as AdamW leaves them
    after a period. Logits rounded to bf16 give an error of the size of the difference itself."""
    size = (200, 64, 500, 512, 3.0)
    hidden, weight, targets, coefs = inputs(size, torch.bfloat16)
    generator = torch.Generator().manual_seed(2)
    moved = (hidden.float() * (1 + 4e-3 * torch.randn(hidden.shape, generator=generator))).bfloat16()
    exact, found, rounded = [], [], []
    for states in (hidden, moved):
        exact.append(plain(states.double(), weight.double(), targets, coefs, size[2], torch.float64)[0])
        found.append(sharded(states, weight, targets, coefs.float(), size[2])[0].double())
        logits = (states @ weight[: size[2]].T).float()
        rounded.append(cross_entropy(logits, targets, reduction="none").double())
    truth, ours, bf16 = (upper - lower for lower, upper in (exact, found, rounded))
    noise, usual, signal = (ours - truth).norm(), (bf16 - truth).norm(), truth.norm()
    assert 1e-3 < truth.square().mean().sqrt() < 1e-1
    assert noise <= 1e-4 * signal, (noise, signal)
    assert usual >= 0.2 * signal, "the test's models are too far apart to show anything"
