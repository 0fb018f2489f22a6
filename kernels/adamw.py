"""Clip, AdamW and the cast back to the compute dtype, over one flat range of the active set."""

import torch
from torch import Tensor


def adamw_update(
    weights: Tensor,
    master: Tensor,
    gradient: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    *,
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
        step: this step's number for these parameters, from 1: the bias correction's exponent.
        gradient_scale: scalar tensor that multiplies the gradient first: the clip, without a host synchronisation.
    """
    beta1, beta2 = betas
    gradient = gradient * gradient_scale
    master.mul_(1 - lr * weight_decay)
    exp_avg.lerp_(gradient, 1 - beta1)
    exp_avg_sq.mul_(beta2).addcmul_(gradient, gradient, value=1 - beta2)
    denominator = (exp_avg_sq / (1 - beta2**step)).sqrt_().add_(eps)
    master.addcdiv_(exp_avg, denominator, value=-lr / (1 - beta1**step))
    if weights is not master:
        weights.copy_(master)


def sum_of_squares(gradient: Tensor) -> Tensor:
    """Sum of the squares of [n] numbers, accumulated in fp64, as a scalar tensor."""
    return torch.linalg.vector_norm(gradient, dtype=torch.float64) ** 2
