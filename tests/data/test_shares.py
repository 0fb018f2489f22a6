"""The draws that follow the weights: whole, exact in the long run, unbiased."""

import math

import numpy as np
import pytest

from megatron_scalebio.config import SourceConfig, UserError
from megatron_scalebio.data.shares import AdaptiveShares, draw_limits
from tests.configs import resolved


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


@pytest.mark.parametrize("num_sources, batch_size, slack", [(2, 8, 1.0), (5, 100, 1.01), (60, 128, 1.5), (9, 2, 1.2)])
@pytest.mark.parametrize("learns", [True, False])
def test_a_limit_is_never_passed_and_no_batch_is_short(num_sources, batch_size, slack, learns):
    """Also where the limits leave no more draws than the batches need; over a resume, too."""
    steps, rng = 200, np.random.default_rng(1)
    sizes = rng.dirichlet(np.ones(num_sources)) * slack * steps * batch_size
    limits = [math.ceil(size) for size in sizes]
    terms = (num_sources, batch_size, 0.25 if learns else 0.0, learns, limits, steps)
    shares, drawn = AdaptiveShares(*terms), np.zeros(num_sources, dtype=int)
    for step, now in enumerate(walk(num_sources, steps, seed=5)):
        if step == steps // 2:
            state, shares = shares.state_dict(), AdaptiveShares(*terms)
            shares.load_state_dict(state)
        share = shares.next(now)
        assert sum(share.num_examples) == batch_size and min(share.num_examples) >= 0
        assert all(0 <= kept <= 1 for kept in share.kept)
        drawn += share.num_examples
    assert np.all(drawn <= limits)


def test_what_a_limit_takes_goes_to_the_others_in_proportion_and_is_told():
    shares = AdaptiveShares(3, 100, 0.0, at_least_one=True, limits=[500, 10_000, 10_000], num_batches=50)
    weights = [0.6, 0.3, 0.1]
    shares.next(weights)
    share = shares.next(weights)
    assert share.num_examples == [10, 68, 22] or share.num_examples == [10, 67, 23]
    np.testing.assert_allclose(share.kept, [10 / 60, 1, 1], rtol=1e-2)
    assert share.scale == [1.0, 1.0, 1.0]
    free = AdaptiveShares(3, 100, 0.0, at_least_one=True, limits=[10_000] * 3, num_batches=50).next(weights)
    assert free.kept == [1.0, 1.0, 1.0] and free.num_examples == [60, 30, 10]


def test_a_source_that_may_be_drawn_less_than_once_a_batch_takes_turns():
    shares = AdaptiveShares(2, 10, 0.25, at_least_one=True, limits=[25, 10_000], num_batches=100)
    found = [shares.next([0.5, 0.5]) for _ in range(100)]
    assert sum(share.num_examples[0] for share in found) == 25
    assert {share.num_examples[0] for share in found} == {0, 1}
    assert sum(share.scale[0] for share in found if share.num_examples[0]) == pytest.approx(100, rel=0.1)


def limited(*overrides: str):
    config = resolved("data.max_epochs=2", "bilevel.steps=10", "bilevel.global_batch_size=4", *overrides)
    config.data.sources = [SourceConfig(name, name) for name in ("a", "b")]
    return config


def test_limits_are_epochs_times_records_and_too_few_are_refused_before_the_first_step():
    assert draw_limits(limited(), [10, 15]) == [20, 30]
    assert draw_limits(limited("data.max_epochs=null"), [1, 1]) is None
    with pytest.raises(UserError, match=r"allows 38 draws .* are 40: raise data.max_epochs, or lower .* to 9"):
        draw_limits(limited(), [9, 10])
    given = limited("bilevel.mode=fixed", "bilevel.weights={a: 1, b: 0}")
    assert draw_limits(given, [20, 1]) == [40, 2]
    with pytest.raises(UserError, match="allows 38 draws"):
        draw_limits(given, [19, 100])
