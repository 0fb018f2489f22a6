"""Clip, AdamW and the cast back to the compute dtype, in one pass over one flat range of the active set.

Bound by memory: 30 bytes per parameter with bf16 weights (gradient, master and two moments read, master, moments and
weights written), 28 where the weights are their own master; moments in bf16 save 8 of them, in 8 bits 12. The clip
arrives as a device scalar, so nothing here waits for the host.

Shapes: n parameters.
"""

import triton
import triton.language as tl
from torch import Tensor

from megatron_scalebio.kernels.dispatch import on_triton, require_dense
from megatron_scalebio.kernels.moments import (
    BLOCK,
    FIRST,
    SECOND,
    Moment,
    load_moment,
    load_reference,
    rounding_key,
    store_moment,
    store_reference,
)

ROWS = 8  # blocks of scales in a program


def adamw_update(
    weights: Tensor,
    master: Tensor,
    gradient: Tensor,
    exp_avg: Moment | Tensor,
    exp_avg_sq: Moment | Tensor,
    *,
    num_decayed: int,
    step: int,
    lr: float,
    betas: tuple[float, float],
    eps: float,
    weight_decay: float,
    gradient_scale: Tensor,
    first_index: int = 0,
) -> None:
    """One AdamW step in place (arXiv 1711.05101, with torch.optim.AdamW's order of operations).

    Args:
        weights: [n] in the compute dtype, written from `master`; may be `master` itself.
        master, gradient: [n], fp32 (fp64 under precision.compute=fp64).
        exp_avg, exp_avg_sq: of n parameters; a plain tensor is a moment in the master's dtype. The update takes them
            as they are before they are rounded.
        num_decayed: the first so many parameters are decayed; norms and biases, which are not, come last.
        step: this step's number for these parameters, from 1: the bias correction's exponent.
        gradient_scale: scalar tensor that multiplies the gradient first: the clip, without a host synchronisation.
        first_index: of these parameters in their flat block: with `step`, all that the moments' rounding depends on.
            Shards cut at multiples of 128 give the bits of the whole; in bf16, cut anywhere.
    """
    operation = _on_triton if on_triton(master) else adamw_update_reference
    operation(
        *(weights, master, gradient, exp_avg, exp_avg_sq),
        **dict(num_decayed=num_decayed, step=step, lr=lr, betas=betas, eps=eps),
        **dict(weight_decay=weight_decay, gradient_scale=gradient_scale, first_index=first_index),
    )


def adamw_update_reference(
    weights: Tensor,
    master: Tensor,
    gradient: Tensor,
    exp_avg: Moment | Tensor,
    exp_avg_sq: Moment | Tensor,
    *,
    num_decayed: int,
    step: int,
    lr: float,
    betas: tuple[float, float],
    eps: float,
    weight_decay: float,
    gradient_scale: Tensor,
    first_index: int = 0,
) -> None:
    """`adamw_update` in plain PyTorch."""
    beta1, beta2 = betas
    exp_avg, exp_avg_sq = _as_moment(exp_avg), _as_moment(exp_avg_sq)
    average, square = load_reference(exp_avg, FIRST), load_reference(exp_avg_sq, SECOND)
    gradient = gradient * gradient_scale
    master[:num_decayed].mul_(1 - lr * weight_decay)
    average.lerp_(gradient, 1 - beta1)
    square.mul_(beta2).addcmul_(gradient, gradient, value=1 - beta2)
    denominator = (square / (1 - beta2**step)).sqrt_().add_(eps)
    master.addcdiv_(average, denominator, value=-lr / (1 - beta1**step))
    store_reference(exp_avg, average, FIRST, step, first_index)
    store_reference(exp_avg_sq, square, SECOND, step, first_index)
    if weights is not master:
        weights.copy_(master)


def _as_moment(stored: Moment | Tensor) -> Moment:
    return stored if isinstance(stored, Moment) else Moment(stored)


def _on_triton(
    weights: Tensor,
    master: Tensor,
    gradient: Tensor,
    exp_avg: Moment | Tensor,
    exp_avg_sq: Moment | Tensor,
    *,
    num_decayed: int,
    step: int,
    lr: float,
    betas: tuple[float, float],
    eps: float,
    weight_decay: float,
    gradient_scale: Tensor,
    first_index: int,
) -> None:
    average, square = _as_moment(exp_avg), _as_moment(exp_avg_sq)
    require_dense(weights=weights, master=master, gradient=gradient, exp_avg=average.values, exp_avg_sq=square.values)
    beta1, beta2 = betas
    _update_kernel[(triton.cdiv(len(master), ROWS * BLOCK),)](
        *(weights, master, gradient, average.values, average.scale, square.values, square.scale, gradient_scale),
        *(len(master), num_decayed, first_index, rounding_key(step, FIRST), rounding_key(step, SECOND)),
        # What torch, too, computes in fp64 on the host: in fp32 1 - beta2 would be off by 6e-5.
        *(1 - lr * weight_decay, 1 - beta1, beta2, 1 - beta2, 1 - beta2**step, eps, -lr / (1 - beta1**step)),
        **dict(CAST=weights is not master, ROWS=ROWS, BLOCK=BLOCK, num_warps=4),
    )


@triton.jit(do_not_specialize=["first_key", "second_key"])  # they change at every update
def _update_kernel(
    weights,  # [n] bf16 | fp32, written if CAST
    master,  # [n] fp32, updated
    gradient,  # [n] fp32
    exp_avg,  # [n] fp32 | bf16 | e4m3, updated
    exp_avg_scale,  # [ceil(n / BLOCK)] fp32 with e4m3, else None, updated
    exp_avg_sq,  # as exp_avg
    exp_avg_sq_scale,
    gradient_scale,  # scalar fp32
    numel,
    num_decayed,
    first_index,
    first_key,
    second_key,
    decay,
    one_minus_beta1,
    beta2,
    one_minus_beta2,
    bias_correction2,
    eps,
    negative_step_size,
    CAST: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    local_row = tl.arange(0, ROWS)[:, None]
    index = tl.program_id(0).to(tl.int64) * (ROWS * BLOCK) + (local_row * BLOCK + tl.arange(0, BLOCK)[None, :])
    row = tl.program_id(0) * ROWS + local_row
    inside, row_inside = index < numel, row < tl.cdiv(numel, BLOCK)
    grad = tl.load(gradient + index, mask=inside, other=0.0) * tl.load(gradient_scale)
    weight = tl.load(master + index, mask=inside, other=0.0)
    average = load_moment(exp_avg, exp_avg_scale, index, inside, row, row_inside, False)
    square = load_moment(exp_avg_sq, exp_avg_sq_scale, index, inside, row, row_inside, True)
    weight = tl.where(index < num_decayed, weight * decay, weight)
    average += one_minus_beta1 * (grad - average)
    square = square * beta2 + one_minus_beta2 * (grad * grad)
    denominator = tl.sqrt_rn(tl.div_rn(square, bias_correction2)) + eps
    weight += negative_step_size * tl.div_rn(average, denominator)
    where = (index, inside, row, row_inside, first_index)
    store_moment(exp_avg, exp_avg_scale, average, *where, first_key, False)
    store_moment(exp_avg_sq, exp_avg_sq_scale, square, *where, second_key, True)
    tl.store(master + index, weight, mask=inside)
    if CAST:
        tl.store(weights + index, weight.to(weights.dtype.element_ty), mask=inside)
