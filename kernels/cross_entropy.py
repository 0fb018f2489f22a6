"""Cross-entropy over a tensor-parallel vocabulary, weighted per token, with its gradient: two passes, one exchange.

Every token's coefficient is known before its loss, so the gradient needs no backward pass: the first pass reduces a
row to (max, sum of exponentials, target's logit), one all-gather makes these three the whole vocabulary's, the second
pass writes `loss_coef * (softmax - onehot)` over the logits or beside them. Both passes are bound by memory: what
counts is that each logit is read twice and written once, in 16-byte accesses, with one exponential a pass. (An online
softmax with a maximum per lane would need two and be bound by the exponential unit; a maximum per tile needs one.)

Shapes: N tokens, V vocabulary, V_local this rank's shard of the padded vocabulary, C of its columns that are no
padding, TP tensor-parallel ranks.
"""

import torch
import torch.distributed as dist
import triton
import triton.language as tl
from torch import Tensor
from torch.distributed import ProcessGroup

from megatron_scalebio.kernels.dispatch import on_triton, require_dense

LOG2E = tl.constexpr(1.4426950408889634)


def cross_entropy(
    logits: Tensor,
    targets: Tensor,
    loss_coef: Tensor,
    vocab_size: int,
    group: ProcessGroup,
    softcap: float | None = None,
    grad: Tensor | None = None,
    skip_zero: bool = True,
) -> Tensor:
    """Token losses, and the gradient of `sum(loss_coef * token_losses)` to the logits.

    Args:
        logits: [N, V_local], bf16 or fp32 (fp64 takes the reference); rank r's columns are the vocabulary entries from
            r * V_local on. Overwritten by the reference, and where `grad` is `logits` itself.
        targets: [N] int64, entries of the whole vocabulary.
        loss_coef: [N] fp32.
        vocab_size: columns from here on are padding: no part of the softmax, and their gradient is zero.
        group: the tensor-parallel group.
        softcap: c in `c * tanh(logits / c)`, which the softmax then takes (Gemma-2).
        grad: [N, V_local] where the gradient is written, in its own dtype; `logits` for in place; None: no gradient.
        skip_zero: a token whose coefficient is zero is not read: its loss is reported as 0. False: its loss is wanted
            all the same, as that of a source with weight zero is.

    Returns: token losses [N], unweighted, fp32 or fp64, equal bits on every rank of `group`.
    """
    operation = _on_triton if on_triton(logits) else cross_entropy_reference
    return operation(logits, targets, loss_coef, vocab_size, group, softcap, grad, skip_zero)


def cross_entropy_reference(
    logits: Tensor,
    targets: Tensor,
    loss_coef: Tensor,
    vocab_size: int,
    group: ProcessGroup,
    softcap: float | None = None,
    grad: Tensor | None = None,
    skip_zero: bool = True,
) -> Tensor:
    """`cross_entropy` in plain PyTorch, in as few passes over the logits as it allows."""
    if skip_zero and not loss_coef.all():
        return _only_nonzero(logits, targets, loss_coef, vocab_size, group, softcap, grad)
    first, columns = _columns(logits, vocab_size, group)
    valid = logits[:, :columns].to(torch.promote_types(logits.dtype, torch.float32))  # a view unless it is bf16
    slope = None
    if softcap is not None:
        squashed = torch.tanh(valid / softcap)
        valid, slope = softcap * squashed, 1 - squashed**2
    local = targets - first
    here = (local >= 0) & (local < columns)
    statistics = valid.new_zeros(3, len(targets))
    if columns:
        column = torch.where(here, local, 0).unsqueeze(1)
        own_max = valid.amax(dim=1)
        target_logit = torch.where(here, valid.gather(1, column).squeeze(1), 0.0)
        finite = own_max.clamp(min=torch.finfo(valid.dtype).min)  # -inf - -inf would be NaN
        exp = valid.sub_(finite.unsqueeze(1)).exp_()
        torch.stack([own_max, exp.sum(dim=1), target_logit], out=statistics)
    else:
        statistics[0] = -torch.inf
    shift, total, losses = _whole_vocabulary(statistics, group)
    if grad is not None:
        grad[:, columns:] = 0
        if columns:
            coef = loss_coef.to(exp.dtype)
            exp *= (coef * (own_max - shift).exp() / total).unsqueeze(1)
            exp.scatter_add_(1, column, torch.where(here, -coef, 0.0).unsqueeze(1))
            if slope is not None:
                exp *= slope
            if exp.untyped_storage() is not grad.untyped_storage():
                grad[:, :columns] = exp
    return losses


def _only_nonzero(
    logits: Tensor,
    targets: Tensor,
    loss_coef: Tensor,
    vocab_size: int,
    group: ProcessGroup,
    softcap: float | None,
    grad: Tensor | None,
) -> Tensor:
    """The reference on the tokens whose coefficient is not zero; zeros for the others."""
    kept = loss_coef.nonzero().squeeze(1)
    rows = logits[kept]
    losses = torch.zeros(len(targets), dtype=torch.promote_types(logits.dtype, torch.float32), device=logits.device)
    rows_grad = None if grad is None else torch.empty_like(rows, dtype=grad.dtype)
    losses[kept] = cross_entropy_reference(
        rows, targets[kept], loss_coef[kept], vocab_size, group, softcap, rows_grad, skip_zero=False
    )
    if grad is not None and rows_grad is not None:
        grad.zero_()
        grad[kept] = rows_grad
    return losses


def _columns(logits: Tensor, vocab_size: int, group: ProcessGroup) -> tuple[int, int]:
    """First vocabulary entry of this rank, and how many of its columns are no padding."""
    first = group.rank() * logits.shape[1]
    return first, min(max(vocab_size - first, 0), logits.shape[1])


def _whole_vocabulary(statistics: Tensor, group: ProcessGroup) -> tuple[Tensor, Tensor, Tensor]:
    """This rank's (max, sum of exponentials, target's logit) [3, N] -> the vocabulary's max and sum, the losses; [N].

    One exchange. Every rank adds up the same numbers in the same order, so the results are equal bits. The loss is
    `log(sum) - (target - max)`, not `logsumexp - target`: at logits near 100 that difference of two large numbers
    would cost 1e-5.
    """
    every = statistics
    if group.size() > 1:
        every = statistics.new_empty(group.size() * 3, statistics.shape[1])
        dist.all_gather_into_tensor(every, statistics, group=group)
    maxima, sums, targets = every.view(group.size(), *statistics.shape).unbind(1)
    shift = maxima.amax(dim=0)
    total = (sums * (maxima - shift).exp()).sum(dim=0)
    return shift, total, total.log() - (targets.sum(dim=0) - shift)


def _on_triton(
    logits: Tensor,
    targets: Tensor,
    loss_coef: Tensor,
    vocab_size: int,
    group: ProcessGroup,
    softcap: float | None,
    grad: Tensor | None,
    skip_zero: bool,
) -> Tensor:
    require_dense(logits=logits, targets=targets, loss_coef=loss_coef)
    num_tokens, width = logits.shape
    first, columns = _columns(logits, vocab_size, group)
    statistics = torch.empty(3, num_tokens, dtype=torch.float32, device=logits.device)
    cap = dict(softcap=softcap or 0.0, SOFTCAP=softcap is not None)
    block = 16 * 1024 // logits.element_size()  # one row's tile: 16 KB, four 16-byte loads a thread
    if num_tokens:
        _statistics_kernel[(num_tokens,)](
            *(logits, logits.stride(0), targets, loss_coef, statistics, num_tokens, first, columns),
            **dict(**cap, SKIP_ZERO=skip_zero, BLOCK=block, num_warps=8),
        )
    shift, total, losses = _whole_vocabulary(statistics, group)
    if grad is not None and num_tokens:
        require_dense(grad=grad)
        blocks_per_row = triton.cdiv(width, block)
        _gradient_kernel[(num_tokens * blocks_per_row,)](
            *(logits, logits.stride(0), targets, loss_coef, shift, total, grad, grad.stride(0)),
            *(first, columns, width, blocks_per_row),
            **dict(**cap, BLOCK=block, num_warps=8),
        )
    return torch.where(loss_coef == 0, 0.0, losses) if skip_zero else losses


@triton.jit
def _statistics_kernel(
    logits,  # [N, V_local] bf16 | fp32
    row_stride,
    targets,  # [N] int64
    loss_coef,  # [N] fp32
    statistics,  # [3, N] fp32, written: max, sum of exponentials, target's logit or 0
    num_tokens,
    first,
    columns,  # C
    softcap,
    SOFTCAP: tl.constexpr,
    SKIP_ZERO: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    """One program per token. The running sum stays in BLOCK lanes: a tile costs one reduction, its maximum's."""
    row = tl.program_id(0).to(tl.int64)
    if SKIP_ZERO:
        if tl.load(loss_coef + row) == 0.0:
            for index in tl.static_range(3):
                tl.store(statistics + index * num_tokens + row, 0.0)
            return
    logits += row * row_stride
    lanes = tl.arange(0, BLOCK)
    largest = float("-inf")
    sums = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, columns, BLOCK):
        inside = start + lanes < columns
        tile = tl.load(logits + start + lanes, mask=inside, other=float("-inf")).to(tl.float32)
        if SOFTCAP:
            tile = tl.where(inside, softcap * _tanh(tile / softcap), float("-inf"))
        new_largest = tl.maximum(largest, tl.max(tile, 0))
        shift = tl.where(new_largest == float("-inf"), 0.0, new_largest)  # -inf - -inf would be NaN
        sums = sums * tl.exp2((largest - shift) * LOG2E) + tl.exp2((tile - shift) * LOG2E)
        largest = new_largest
    local = tl.load(targets + row) - first
    here = (local >= 0) & (local < columns)
    target_logit = tl.load(logits + local, mask=here, other=0.0).to(tl.float32)
    if SOFTCAP:
        target_logit = softcap * _tanh(target_logit / softcap)
    tl.store(statistics + row, largest)
    tl.store(statistics + num_tokens + row, tl.sum(sums, 0))
    tl.store(statistics + 2 * num_tokens + row, target_logit)


@triton.jit
def _gradient_kernel(
    logits,  # [N, V_local] bf16 | fp32
    row_stride,
    targets,  # [N] int64
    loss_coef,  # [N] fp32
    shift,  # [N] fp32, the row's largest logit
    total,  # [N] fp32, the sum of exponentials after the shift
    grad,  # [N, V_local], written; may be the logits
    grad_stride,
    first,
    columns,  # C
    width,  # V_local
    blocks_per_row,
    softcap,
    SOFTCAP: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    """One program per tile of a row; a row that counts nothing is zeroed without being read."""
    program = tl.program_id(0)
    row = (program // blocks_per_row).to(tl.int64)
    column = (program % blocks_per_row) * BLOCK + tl.arange(0, BLOCK)
    coef = tl.load(loss_coef + row)
    inside = column < tl.where(coef == 0.0, 0, columns)
    tile = tl.load(logits + row * row_stride + column, mask=inside, other=0.0).to(tl.float32)
    slope = 1.0
    if SOFTCAP:
        squashed = _tanh(tile / softcap)
        tile, slope = softcap * squashed, 1.0 - squashed * squashed
    weighted = tl.exp2((tile - tl.load(shift + row)) * LOG2E) * (coef / tl.load(total + row))
    local = tl.load(targets + row) - first
    # The target's one is subtracted before anything is rounded: near a probability of one the rest is small.
    result = tl.where(column == local, weighted - coef, weighted) * slope
    result = tl.where(inside, result, 0.0)
    tl.store(grad + row * grad_stride + column, result.to(grad.dtype.element_ty), mask=column < width)


@triton.jit
def _tanh(x) -> tl.tensor:
    """tanh as in Cephes, to 2 units in the last place: a polynomial near zero, where 1 - 2 / (e + 1) would cancel."""
    z = x * x
    series = (((-5.70498872745e-3 * z + 2.06390887954e-2) * z - 5.37397155531e-2) * z + 1.33314422036e-1) * z
    near_zero = (series - 3.33332819422e-1) * z * x + x
    magnitude = 1.0 - 2.0 / (tl.exp2(tl.abs(x) * (2.0 * LOG2E)) + 1.0)
    return tl.where(tl.abs(x) < 0.625, near_zero, tl.where(x < 0.0, -magnitude, magnitude))
