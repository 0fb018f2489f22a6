"""Clip, AdamW and the cast back to the compute dtype, in one pass over one flat range of the active set.

Bound by memory: 30 bytes per parameter with bf16 weights (gradient, master and two moments read, master, moments and
weights written), 28 where the weights are their own master. The clip arrives as a device scalar, so nothing here waits
for the host.

Shapes: n parameters.
"""

import triton
import triton.language as tl
from megatron_scalebio.kernels.dispatch import on_triton, require_dense
from torch import Tensor


def adamw_update(
    weights: Tensor,
    master: Tensor,
    gradient: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    *,
    num_decayed: int,
    step: int,
    lr: float,
    betas: tuple[float, float],
    eps: float,
    weight_decay: float,
    gradient_scale: Tensor,
) -> None:
    """One AdamW step in place (arXiv 1711.05101, with torch.optim.AdamW's order of operations).

    Args:
        weights: [n] in the compute dtype, written from `master`; may be `master` itself.
        master, gradient, exp_avg, exp_avg_sq: [n], fp32 (fp64 under precision.compute=fp64).
        num_decayed: the first so many parameters are decayed; norms and biases, which are not, come last.
        step: this step's number for these parameters, from 1: the bias correction's exponent.
        gradient_scale: scalar tensor that multiplies the gradient first: the clip, without a host synchronisation.
    """
    operation = _on_triton if on_triton(master) else adamw_update_reference
    operation(
        *(weights, master, gradient, exp_avg, exp_avg_sq),
        **dict(num_decayed=num_decayed, step=step, lr=lr, betas=betas, eps=eps),
        **dict(weight_decay=weight_decay, gradient_scale=gradient_scale),
    )


def adamw_update_reference(
    weights, master, gradient, exp_avg, exp_avg_sq, *, num_decayed, step, lr, betas, eps, weight_decay, gradient_scale
):
    """`adamw_update` in plain PyTorch."""
    beta1, beta2 = betas
    gradient = gradient * gradient_scale
    master[:num_decayed].mul_(1 - lr * weight_decay)
    exp_avg.lerp_(gradient, 1 - beta1)
    exp_avg_sq.mul_(beta2).addcmul_(gradient, gradient, value=1 - beta2)
    denominator = (exp_avg_sq / (1 - beta2**step)).sqrt_().add_(eps)
    master.addcdiv_(exp_avg, denominator, value=-lr / (1 - beta1**step))
    if weights is not master:
        weights.copy_(master)


def _on_triton(
    weights, master, gradient, exp_avg, exp_avg_sq, *, num_decayed, step, lr, betas, eps, weight_decay, gradient_scale
):
    require_dense(weights=weights, master=master, gradient=gradient, exp_avg=exp_avg, exp_avg_sq=exp_avg_sq)
    beta1, beta2 = betas
    block = 1024
    _update_kernel[(triton.cdiv(len(master), block),)](
        *(weights, master, gradient, exp_avg, exp_avg_sq, gradient_scale, len(master), num_decayed),
        # What torch, too, computes in fp64 on the host: in fp32 1 - beta2 would be off by 6e-5.
        *(1 - lr * weight_decay, 1 - beta1, beta2, 1 - beta2, 1 - beta2**step, eps, -lr / (1 - beta1**step)),
        **dict(CAST=weights is not master, BLOCK=block, num_warps=4),
    )


@triton.jit
def _update_kernel(
    weights,  # [n] bf16 | fp32, written if CAST
    master,  # [n] fp32, updated
    gradient,  # [n] fp32
    exp_avg,  # [n] fp32, updated
    exp_avg_sq,  # [n] fp32, updated
    gradient_scale,  # scalar fp32
    numel,
    num_decayed,
    decay,
    one_minus_beta1,
    beta2,
    one_minus_beta2,
    bias_correction2,
    eps,
    negative_step_size,
    CAST: tl.constexpr,
    BLOCK: tl.constexpr,
):
    index = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = index < numel
    grad = tl.load(gradient + index, mask=inside, other=0.0) * tl.load(gradient_scale)
    weight = tl.load(master + index, mask=inside, other=0.0)
    average = tl.load(exp_avg + index, mask=inside, other=0.0)
    square = tl.load(exp_avg_sq + index, mask=inside, other=0.0)
    weight = tl.where(index < num_decayed, weight * decay, weight)
    average += one_minus_beta1 * (grad - average)
    square = square * beta2 + one_minus_beta2 * (grad * grad)
    denominator = tl.sqrt_rn(tl.div_rn(square, bias_correction2)) + eps
    weight += negative_step_size * tl.div_rn(average, denominator)
    tl.store(exp_avg + index, average, mask=inside)
    tl.store(exp_avg_sq + index, square, mask=inside)
    tl.store(master + index, weight, mask=inside)
    if CAST:
        tl.store(weights + index, weight.to(weights.dtype.element_ty), mask=inside)
