"""Language-model head and weighted cross-entropy over a tensor-parallel vocabulary, in one operation.

The coefficient of every token is known before the forward pass, so the gradients are made in the forward pass, where
the logits are at hand: they are neither kept nor recomputed. Logits exist for `TOKENS_PER_CHUNK` tokens at a time.

Shapes: N tokens that carry loss, H hidden, V vocabulary, V_local this tensor-parallel rank's padded shard.
"""

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup

TOKENS_PER_CHUNK = 1024


def head_loss(
    hidden: Tensor, weight: Tensor, targets: Tensor, loss_coef: Tensor, vocab_size: int, group: ProcessGroup
) -> tuple[Tensor, Tensor]:
    """Weighted sum of token losses, and the token losses themselves.

    Args:
        hidden: [N, H], equal on every rank of `group`.
        weight: [V_local, H], rank r's rows are the vocabulary entries from r * V_local on.
        targets: [N] int64, entries of the whole vocabulary.
        loss_coef: [N] fp32 (fp64 where hidden is fp64); the loss is `sum(loss_coef * token_losses)`.
        vocab_size: columns from here on are padding and have no part in the softmax.
        group: the tensor-parallel group.

    Returns:
        The loss: a scalar that carries the gradient to `hidden` (this rank's part: the caller reduces it over `group`)
        and `weight`. The token losses: [N], detached, unweighted, fp32 or fp64, equal on every rank.
    """
    # Inside a Function's forward everything seems to need a gradient: whether one is wanted is known only here.
    wanted = tuple(torch.is_grad_enabled() and tensor.requires_grad for tensor in (hidden, weight))
    return _HeadLoss.apply(hidden, weight, targets, loss_coef, vocab_size, group, wanted)


class _HeadLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, weight, targets, loss_coef, vocab_size, group, wanted):
        wide = torch.float64 if hidden.dtype == torch.float64 else torch.float32
        head = weight.to(wide)
        token_losses = torch.empty(len(targets), dtype=wide, device=hidden.device)
        grad_hidden = torch.empty_like(hidden) if wanted[0] else None
        grad_weight = torch.zeros_like(head) if wanted[1] else None
        for start in range(0, len(targets), TOKENS_PER_CHUNK):
            chunk = slice(start, start + TOKENS_PER_CHUNK)
            rows = hidden[chunk].to(wide)
            losses, grad_logits = _cross_entropy(rows @ head.T, targets[chunk], loss_coef[chunk], vocab_size, group)
            token_losses[chunk] = losses
            if grad_hidden is not None:
                grad_hidden[chunk] = (grad_logits @ head).to(hidden.dtype)
            if grad_weight is not None:
                grad_weight.addmm_(grad_logits.T, rows)
        ctx.save_for_backward(grad_hidden, grad_weight)
        ctx.mark_non_differentiable(token_losses)
        return (loss_coef.to(wide) * token_losses).sum(), token_losses

    @staticmethod
    def backward(ctx, grad_loss, _):
        grad_hidden, grad_weight = (
            None if grad is None else grad * grad_loss.to(grad.dtype) for grad in ctx.saved_tensors
        )
        return grad_hidden, grad_weight, None, None, None, None, None


def _cross_entropy(
    logits: Tensor, targets: Tensor, loss_coef: Tensor, vocab_size: int, group: ProcessGroup
) -> tuple[Tensor, Tensor]:
    """Losses [n] and `loss_coef * (softmax - onehot)` [n, V_local]; `logits` [n, V_local] is overwritten."""
    first = dist.get_rank(group) * logits.shape[1]
    logits[:, max(0, vocab_size - first) :] = -torch.inf
    shift = logits.amax(dim=1)
    dist.all_reduce(shift, op=dist.ReduceOp.MAX, group=group)

    local = targets - first
    here = (local >= 0) & (local < logits.shape[1])
    column = torch.where(here, local, 0).unsqueeze(1)
    logits -= shift.unsqueeze(1)
    target_logit = torch.where(here, logits.gather(1, column).squeeze(1), 0.0)
    exp = logits.exp_()
    sums = torch.stack([exp.sum(dim=1), target_logit])
    dist.all_reduce(sums, group=group)
    total, target_logit = sums

    grad = exp.mul_((loss_coef.to(exp.dtype) / total).unsqueeze(1))
    grad.scatter_add_(1, column, torch.where(here, -loss_coef.to(grad.dtype), 0.0).unsqueeze(1))
    return total.log() - target_logit, grad
