"""Coefficients against the definition of the losses, written out example by example."""

from fractions import Fraction

import pytest
import torch

from megatron_scalebio.kernels.loss_sums import sums_by_id
from megatron_scalebio.losses import token_coefs

# Examples of the global batch: (source, the losses of its loss tokens). Source 3 is absent.
EXAMPLES = [(0, [3.0, 1.5, 2.25]), (0, [0.5]), (1, [4.0, 0.125]), (2, [1.0] * 7), (0, [2.0, 5.0])]
NUM_SOURCES = 4
NUM_EXAMPLES = [3, 1, 1, 0]
NUM_LOSS_TOKENS = [6, 2, 7, 0]
WEIGHTS = torch.tensor([0.75, 2.5, 1.25, 0.5], dtype=torch.float64)  # alpha * p


def tokens(examples: list[tuple[int, list[float]]]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(source_ids, example_loss_tokens, losses), token by token."""
    flat = [(source, len(losses), loss) for source, losses in examples for loss in losses]
    sources, counts, losses = zip(*flat, strict=True)
    return torch.tensor(sources), torch.tensor(counts), torch.tensor(losses, dtype=torch.float64)


def mean_loss(source: int, unit: str) -> float:
    own = [losses for of, losses in EXAMPLES if of == source]
    if not own:
        return 0.0
    if unit == "token":
        return float(sum(map(Fraction, sum(own, []))) / sum(map(len, own)))
    return float(sum(sum(map(Fraction, losses)) / len(losses) for losses in own) / len(own))


@pytest.mark.parametrize("unit", ["example", "token"])
@pytest.mark.parametrize("num_parts", [1, 2, 5])
def test_coefficients_give_each_source_its_mean_loss_and_the_model_the_weighted_sum(unit, num_parts):
    """However the batch is cut: the counts are global."""
    means, weighted = torch.zeros(NUM_SOURCES, dtype=torch.float64), 0.0
    for part in range(num_parts):
        sources, counts, losses = tokens(EXAMPLES[part::num_parts])
        coefs = token_coefs(sources, counts, NUM_EXAMPLES, NUM_LOSS_TOKENS, WEIGHTS, unit)
        assert coefs.mean_coef.dtype == coefs.loss_coef.dtype == torch.float64
        means += sums_by_id(losses, coefs.mean_coef, sources, NUM_SOURCES)
        weighted += (coefs.loss_coef * losses).sum().item()
    expected = [mean_loss(source, unit) for source in range(NUM_SOURCES)]
    assert means.tolist() == pytest.approx(expected, rel=1e-15)
    assert weighted == pytest.approx(
        sum(w * mean for w, mean in zip(WEIGHTS.tolist(), expected, strict=True)), rel=1e-15
    )


@pytest.mark.parametrize("unit", ["example", "token"])
def test_evaluation_coefficients_give_the_mean_over_tokens_or_over_examples(unit):
    sources, counts, losses = tokens(EXAMPLES)
    one = torch.ones(1, dtype=torch.float64)
    coefs = token_coefs(torch.zeros_like(sources), counts, [len(EXAMPLES)], [len(losses)], one, unit)
    assert torch.equal(coefs.mean_coef, coefs.loss_coef)
    by_example = sum(sum(map(Fraction, own)) / len(own) for _, own in EXAMPLES) / len(EXAMPLES)
    expected = float(by_example) if unit == "example" else losses.mean().item()
    assert (coefs.mean_coef * losses).sum().item() == pytest.approx(expected, rel=1e-15)


def test_a_micro_batch_without_loss_tokens_adds_nothing():
    none = torch.zeros(0, dtype=torch.int64)
    for unit in ("example", "token"):
        coefs = token_coefs(none, none, NUM_EXAMPLES, NUM_LOSS_TOKENS, WEIGHTS, unit)
        assert torch.equal(sums_by_id(none.float(), coefs.mean_coef, none, NUM_SOURCES), torch.zeros(4).double())
