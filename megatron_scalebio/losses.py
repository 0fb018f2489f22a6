"""All normalisation of the project: the coefficient of every loss token.

With p the source weights, t_e the loss tokens of example e, n_s the examples of its source in the global batch:

    loss_coef = alpha * p_s / (n_s * t_e)     unit "example": L_s is the mean over examples of token means
    loss_coef = alpha * p_s / t_s             unit "token":   t_s loss tokens of source s in the batch

Validation and test sets take the place of sources there, and the sets' weights that of alpha * p.

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

    mean_coef: Tensor  # [N] 1 / count: sums token losses to the mean loss of a source, or of a set
    loss_coef: Tensor  # [N] what the token counts for in the model's loss


def token_coefs(
    source_ids: Tensor,
    example_loss_tokens: Tensor,
    num_examples: list[int],
    num_loss_tokens: list[int],
    weights: Tensor,
    unit: str,
) -> TokenCoefs:
    """Coefficients of a micro-batch's loss tokens.

    Args:
        source_ids, example_loss_tokens: [N] the source of each token, and t_e of its example.
        num_examples, num_loss_tokens: [K] counts per source in the global batch.
        weights: [K] fp64, `alpha * p`, or those of sets.
        unit: "example" or "token".
    """
    if unit == "example":
        mean_coef = 1.0 / (torch.tensor(num_examples, dtype=torch.float64)[source_ids] * example_loss_tokens)
    else:
        mean_coef = 1.0 / torch.tensor(num_loss_tokens, dtype=torch.float64)[source_ids]
    return TokenCoefs(mean_coef, weights[source_ids] * mean_coef)
