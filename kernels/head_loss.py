"""Language-model head and weighted cross-entropy over a tensor-parallel vocabulary, in one operation.

The coefficient of every token is known before the forward pass, so the gradients are made in the forward pass, where
the logits are at hand: two matrix products with a frozen head, three with one that trains, none computed again. Logits
exist for a chunk of tokens at a time, in fp32, as the tensor cores accumulate them: the hypergradient is a difference
of the losses of two nearly equal models, which logits rounded to bf16 would drown in noise. The matrix products are
the library's; between them stand the two passes of `cross_entropy`, which hands over the gradient in the dtype that
the tensor cores take. Tokens without loss are not among the N, so they cost nothing here.

Shapes: N tokens that carry loss, H hidden, V vocabulary, V_local this tensor-parallel rank's padded shard.
"""

from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from megatron_scalebio.kernels.cross_entropy import cross_entropy
from megatron_scalebio.kernels.dispatch import cpu_multiplies_bf16, device_type, on_triton
from megatron_scalebio.spans import Span, span

# The weight's fp32 gradient is read and written once per chunk, so a GPU takes large ones: at V_local 19,008 the logits
# of one and their gradient are 0.5 GB. On a CPU 512 to 1,024 were the fastest of 32 to 1,024, the most that was tried.
TOKENS_PER_CHUNK = {"cuda": 4096, "cpu": 1024}


def head_loss(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    loss_coef: Tensor,
    vocab_size: int,
    group: ProcessGroup,
    softcap: float | None = None,
    main_grad: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Weighted sum of token losses, and the token losses themselves.

    Args:
        hidden: [N, H], equal on every rank of `group`.
        weight: [V_local, H], rank r's rows are the vocabulary entries from r * V_local on.
        targets: [N] int64, entries of the whole vocabulary.
        loss_coef: [N] fp32 (fp64 where hidden is fp64); the loss is `sum(loss_coef * token_losses)`.
        vocab_size: columns from here on are padding and have no part in the softmax.
        group: the tensor-parallel group.
        softcap: c in `c * tanh(logits / c)`, which the softmax then takes (Gemma-2).
        main_grad: [V_local, H] fp32 (fp64) to which the backward pass adds the weight's gradient, unrounded; autograd
            then hands `weight` none. None: autograd hands it over in the weight's dtype.

    Returns:
        The loss: a scalar that carries the gradient to `hidden` (this rank's part: the caller reduces it over `group`)
        and `weight`. The token losses: [N], detached, unweighted, fp32 or fp64, equal on every rank.
    """
    # Inside a Function's forward everything seems to need a gradient: whether one is wanted is known only here.
    wanted = tuple(torch.is_grad_enabled() and tensor.requires_grad for tensor in (hidden, weight))
    with span(Span.LOSS):
        return _HeadLoss.apply(hidden, weight, targets, loss_coef, vocab_size, group, softcap, main_grad, wanted)


class _HeadLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        targets: Tensor,
        loss_coef: Tensor,
        vocab_size: int,
        group: ProcessGroup,
        softcap: float | None,
        main_grad: Tensor | None,
        wanted: tuple[bool, bool],
    ) -> tuple[Tensor, Tensor]:
        wide = torch.promote_types(hidden.dtype, torch.float32)
        # What the products take: the model's dtype, or the accumulator's on a CPU that has no products of bf16.
        operand = hidden.dtype if on_triton(hidden) or cpu_multiplies_bf16() else wide
        head = weight.to(operand)
        token_losses = torch.empty(len(targets), dtype=wide, device=hidden.device)
        grad_hidden = torch.empty_like(hidden) if wanted[0] else None
        grad_weight = torch.empty_like(weight, dtype=wide) if wanted[1] else None
        logits = grad_logits = None
        tokens_per_chunk = TOKENS_PER_CHUNK[device_type(hidden.device)]
        for start in range(0, len(targets), tokens_per_chunk):
            chunk = slice(start, start + tokens_per_chunk)
            rows = hidden[chunk].to(operand)
            if logits is None or len(rows) < len(logits):
                logits = torch.empty(len(rows), len(weight), dtype=wide, device=hidden.device)
                grad_logits = _gradient_buffer(logits, operand) if any(wanted) else None
            _multiply(rows, head.T, out=logits)
            token_losses[chunk] = cross_entropy(
                *(logits, targets[chunk], loss_coef[chunk], vocab_size, group, softcap, grad_logits),
                skip_zero=False,  # a source of weight zero still has a loss to report
            )
            if grad_logits is not None and grad_hidden is not None:
                grad_hidden[chunk] = grad_logits @ head
            if grad_logits is not None and grad_weight is not None:
                (_multiply if start == 0 else _add_product)(grad_logits.T, rows, out=grad_weight)
        if grad_weight is not None and len(targets) == 0:
            grad_weight.zero_()
        ctx.save_for_backward(grad_hidden, grad_weight)
        ctx.main_grad = main_grad
        ctx.mark_non_differentiable(token_losses)
        return (loss_coef.to(wide) * token_losses).sum(), token_losses

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        grad_loss, _ = grads
        grad_hidden, grad_weight = ctx.saved_tensors
        with span(Span.LOSS):
            if grad_hidden is not None:  # the product in fp32: in bf16 the scale alone would be off by 2^-9
                grad_hidden = (grad_hidden.to(grad_loss.dtype) * grad_loss).to(grad_hidden.dtype)
            if grad_weight is not None and ctx.main_grad is not None:
                ctx.main_grad.addcmul_(grad_weight, grad_loss)
                grad_weight = None
            elif grad_weight is not None:
                grad_weight = grad_weight * grad_loss
        return grad_hidden, grad_weight, *(None,) * 7


def _gradient_buffer(logits: Tensor, dtype: torch.dtype) -> Tensor:
    """Where a chunk's gradient is written: over the logits if the products take their dtype."""
    return logits if logits.dtype == dtype else torch.empty_like(logits, dtype=dtype)


def _multiply(a: Tensor, b: Tensor, out: Tensor) -> None:
    """out = a @ b, as accumulated: `out` may be wider than the operands."""
    if a.dtype == out.dtype:
        torch.mm(a, b, out=out)
    elif device_type(a.device) == "cuda":
        torch.mm(a, b, out_dtype=out.dtype, out=out)
    else:
        with _operands_as_bf16():
            torch.mm(a.to(out.dtype), b.to(out.dtype), out=out)


def _add_product(a: Tensor, b: Tensor, out: Tensor) -> None:
    """out += a @ b, accumulated in the dtype of `out`: bf16 sums over chunks would lose what small tokens add."""
    if a.dtype == out.dtype:
        out.addmm_(a, b)
    elif device_type(a.device) == "cuda":
        torch.addmm(out, a, b, out_dtype=out.dtype, out=out)
    else:
        with _operands_as_bf16():
            out.addmm_(a.to(out.dtype), b.to(out.dtype))


def _operands_as_bf16() -> AbstractContextManager[None]:
    """oneDNN multiplies fp32 matrices as bf16 and accumulates in fp32: for what was bf16 before, nothing is rounded."""
    keep = {"deterministic": None, "allow_tf32": None}  # as they are; to set the latter, to anything, warns
    return torch.backends.mkldnn.flags(enabled=True, fp32_precision="bf16", **keep)
