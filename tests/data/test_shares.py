"""The draws that follow the weights: whole, exact in the long run, unbiased."""

import numpy as np
import pytest

from megatron_scalebio.data.shares import AdaptiveShares


def walk(num_sources: int, steps: int, seed: int = 0) -> list[list[float]]:
    """Weights that move from step to step, some of them next to nothing."""
    rng = np.random.default_rng(seed)
    logits = np.cumsum(rng.normal(0, 0.3, (steps, num_sources)), axis=0) + rng.normal(0, 2, num_sources)
    weights = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    return weights.tolist()


@pytest.mark.parametrize("num_sources, batch_size", [(1, 1), (2, 8), (5, 100), (60, 128), (7, 7), (500, 128), (9, 2)])
@pytest.mark.parametrize("exploration", [0.0, 0.25, 1.0])
def test_counts_add_up_and_stay_near_what_is_due(num_sources, batch_size, exploration):
    shares = AdaptiveShares(num_sources, batch_size, exploration, at_least_one=True)
    weights, owed, drawn = walk(num_sources, 300), np.zeros(num_sources), np.zeros(num_sources, dtype=int)
    for step, now in enumerate(weights):
        due = shares.due(np.array(weights[max(0, step - 1)]))
        share = shares.next(now)
        counts = np.array(share.num_examples)
        assert counts.sum() == batch_size and due.sum() == pytest.approx(batch_size)
        assert share.start == drawn.tolist()
        assert counts.min() >= (1 if batch_size >= num_sources else 0)
        assert np.all((counts >= 1) | (due < 1))
        drawn += counts
        owed += due - counts
        assert np.abs(owed).max() < 2  # examples, however long the run


def test_what_is_due_is_the_formula():
    shares = AdaptiveShares(4, 100, 0.2, at_least_one=True)
    np.testing.assert_allclose(shares.due(np.array([0.7, 0.2, 0.1, 0.0])), [61, 21, 13, 5])
    low = AdaptiveShares(4, 10, 0.0, at_least_one=True).due(np.array([0.9, 0.08, 0.02, 0.0]))
    np.testing.assert_allclose(low, [7, 1, 1, 1])
    given = AdaptiveShares(4, 10, 0.0, at_least_one=False).due(np.array([0.9, 0.08, 0.02, 0.0]))
    np.testing.assert_allclose(given, [9, 0.8, 0.2, 0])


def test_the_weights_of_the_call_before_decide():
    shares = AdaptiveShares(2, 10, 0.0, at_least_one=True)
    counts = [shares.next(weights).num_examples for weights in ([0.5, 0.5], [0.8, 0.2], [0.8, 0.2])]
    assert counts == [[5, 5], [5, 5], [8, 2]]


def test_sources_that_take_turns_count_in_the_long_run_what_they_would_in_every_batch():
    weights = np.array(walk(500, 1, seed=3)[0])
    shares = AdaptiveShares(500, 128, 0.25, at_least_one=True)
    due, counted, steps = shares.due(weights), np.zeros(500), 4000
    assert (due < 1).sum() > 400 and (due > 1).any()
    for _ in range(steps):
        share = shares.next(weights.tolist())
        present = np.array(share.num_examples) > 0
        counted += np.where(present, share.scale, 0.0)
    # The sum of what its mean loss counts for, over the steps, is the number of steps: within what is carried over.
    np.testing.assert_allclose(counted, steps, atol=2 / due.min())


def test_a_source_of_weight_zero_is_never_drawn_where_weights_are_given():
    shares = AdaptiveShares(3, 5, 0.0, at_least_one=False)
    assert all(shares.next([0.62, 0.38, 0.0]).num_examples[2] == 0 for _ in range(50))
