"""All normalisation of the project: the coefficient of every loss token.

With p the source weights, t_e the loss tokens of example e, n_s the examples of its source in the global batch:

    train:       loss_coef = alpha * p_s / (n_s * t_e)     unit "example": L_s is the mean over examples of token means
                 loss_coef = alpha * p_s / t_s             unit "token":   t_s loss tokens of source s in the batch
    validation:  loss_coef = 1 / t                         unit "token":   t loss tokens of the validation batch
                 loss_coef = 1 / (n * t_e)                 unit "example"

The counts are global and known before the forward pass, so sums over micro-batches and ranks are exact means: with
`mean_coef`, loss_coef without alpha * p, `kernels.loss_sums` adds token losses up to the mean loss of each source.

Shapes: N positions of a micro-batch that carry loss, K sources.
"""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class TokenCoefs:
    """Coefficients of one micro-batch's loss tokens, fp64."""

    mean_coef: Tensor  # [N] 1 / count: sums token losses to the mean loss of a source, or of the validation batch
    loss_coef: Tensor  # [N] what the token counts for in the model's loss


def train_coefs(
    source_ids: Tensor,
    example_loss_tokens: Tensor,
    num_examples: list[int],
    num_loss_tokens: list[int],
    weights: Tensor,
    unit: str,
) -> TokenCoefs:
    """Coefficients of a training micro-batch's loss tokens.

    Args:
        source_ids, example_loss_tokens: [N] the source of each token, and t_e of its example.
        num_examples, num_loss_tokens: [K] counts per source in the global batch.
        weights: [K] fp64, `alpha * p`.
        unit: bilevel.train_loss_unit, "example" or "token".
    """
    if unit == "example":
        mean_coef = 1.0 / (torch.tensor(num_examples, dtype=torch.float64)[source_ids] * example_loss_tokens)
    else:
        mean_coef = 1.0 / torch.tensor(num_loss_tokens, dtype=torch.float64)[source_ids]
    return TokenCoefs(mean_coef, weights[source_ids] * mean_coef)


def evaluation_coefs(example_loss_tokens: Tensor, num_examples: int, num_loss_tokens: int, unit: str) -> TokenCoefs:
    """Coefficients of a validation or test micro-batch's loss tokens; the counts are those of the whole batch."""
    if unit == "token":
        mean_coef = torch.full(example_loss_tokens.shape, 1.0 / num_loss_tokens, dtype=torch.float64)
    else:
        mean_coef = 1.0 / (num_examples * example_loss_tokens.double())
    return TokenCoefs(mean_coef, mean_coef)
