"""How far an operation may be off: bounds from what it rounds, the same on every processor.

u is the unit roundoff of a precision, half its epsilon. Of a sum of n terms each meets at most n roundings, in any
order of summation, and their errors are independent of each other: sqrt(n) * u times the sum of magnitudes (Higham and
Mary, A new approach to probabilistic rounding error analysis, 2019).

Shapes: N tokens, H hidden, V vocabulary.
"""

from typing import NamedTuple

import torch
from torch import Tensor


def unit_roundoff(dtype: torch.dtype) -> float:
    return torch.finfo(dtype).eps / 2


def product_error(a: Tensor, b: Tensor, dtype: torch.dtype) -> Tensor:
    """Of `a @ b`, summed in `dtype`; the operands are exact."""
    return max(a.shape[-1], 1) ** 0.5 * unit_roundoff(dtype) * (a.double().abs() @ b.double().abs())


def rounded_operand_error(a: Tensor, b: Tensor, dtype: torch.dtype) -> Tensor:
    """Of `a @ b` where `a` was rounded to `dtype`: independent errors, whose squares add up."""
    return unit_roundoff(dtype) * (a.double().square() @ b.double().square()).sqrt()


class CrossEntropyErrors(NamedTuple):
    losses: Tensor  # [N]
    grad: Tensor  # [N, V], before it is rounded to the dtype that it is stored in


def cross_entropy_errors(
    logits: Tensor, targets: Tensor, coefs: Tensor, softcap: float | None, logit_errors: Tensor | float = 0.0
) -> CrossEntropyErrors:
    """Of the weighted cross-entropy computed in fp32. The counts of roundings are those of the formulas in
    kernels/cross_entropy.py; exp, log and tanh are taken to err by 3 units in the last place at most.

    Args:
        logits: [N, V] fp64, exact, without padding.
        logit_errors: [N, V], of what was computed before.
    """
    u = unit_roundoff(torch.float32)
    rows = torch.arange(len(targets))
    if softcap is None:
        capped, slope, slope_errors = logits, torch.ones_like(logits), torch.zeros_like(logits)
        errors = torch.zeros_like(logits) + logit_errors
    else:
        squashed = torch.tanh(logits / softcap)
        capped, slope = softcap * squashed, 1 - squashed**2
        errors = slope * (logit_errors + 2 * u * logits.abs()) + 7 * u * capped.abs()
        slope_errors = 2 * squashed.abs() * errors / softcap + 2 * u
    shifted = capped - capped.amax(dim=1, keepdim=True)
    p = torch.softmax(capped, dim=1)
    exp_errors = errors + 2 * u * shifted.abs() + 6 * u  # relative
    sum_errors = (p * exp_errors).sum(dim=1) + logits.shape[1] ** 0.5 * u  # relative
    log_total = shifted.exp().sum(dim=1).log()
    target = shifted[rows, targets]
    loss_errors = sum_errors + errors[rows, targets] + 7 * u * log_total + 2 * u * target.abs()
    onehot = torch.zeros_like(p)
    onehot[rows, targets] = 1
    of_difference = p * (exp_errors + sum_errors.unsqueeze(1) + 4 * u) + u * onehot
    difference = (p - onehot).abs()
    grad_errors = coefs.double().abs().unsqueeze(1) * (
        slope * of_difference + difference * slope_errors + 3 * u * slope * difference
    )
    return CrossEntropyErrors(loss_errors, grad_errors)
