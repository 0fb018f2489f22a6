"""Student's t, and what a comparison concludes from it."""

from itertools import combinations

import pytest

from megatron_scalebio.compare.arms import ARMS
from megatron_scalebio.compare.statistics import interval_of_mean, student_quantile
from megatron_scalebio.compare.verdict import SIMPLEST, verdict

# Printed tables: probability .975 and .995, by degrees of freedom.
TABLE = {1: (12.7062, 63.6567), 2: (4.3027, 9.9248), 4: (2.7764, 4.6041), 9: (2.2622, 3.2498), 29: (2.0452, 2.7564)}


@pytest.mark.parametrize("freedom", TABLE)
def test_quantiles_are_those_of_the_tables(freedom):
    for probability, expected in zip((0.975, 0.995), TABLE[freedom], strict=True):
        assert student_quantile(probability, freedom) == pytest.approx(expected, abs=6e-5)
    assert student_quantile(0.5, freedom) == pytest.approx(0.0, abs=1e-9)


def test_the_interval_of_a_mean_is_that_of_hand():
    low, high = interval_of_mean([1.0, 2.0, 4.0])  # mean 7/3, deviation 1.527525, over sqrt(3): .881917
    assert (low, high) == (
        pytest.approx(7 / 3 - 4.3027 * 0.881917, abs=1e-4),
        pytest.approx(7 / 3 + 4.3027 * 0.881917, abs=1e-4),
    )
    assert interval_of_mean([1.0]) is None
    assert interval_of_mean([2.0, 2.0]) == (2.0, 2.0)


def content(paired: dict[tuple[str, str], tuple[float, float]], seeds: int = 3) -> dict:
    """Arms in the order in which they are first named, their differences with these intervals, others within .1."""
    names = list(dict.fromkeys(name for pair in paired for name in pair))
    paired = {pair: (-0.1, 0.1) for pair in combinations(names, 2)} | paired
    rows = [
        {"arm": a, "against": b, "difference_mean": sum(interval) / 2, "interval": interval}
        for (a, b), interval in paired.items()
    ]
    arms = [{"name": name, "seeds": [{"flops": 1e9}] * seeds} for name in names]
    return {"budget_flops": 1e9, "arms": arms, "paired": rows}


def test_only_a_difference_without_zero_makes_an_arm_the_better_one():
    clear = content({("learned", "uniform"): (-0.3, -0.1), ("learned", "random"): (-0.5, -0.2)})
    assert verdict(clear) == (
        "Learn the weights and train a fresh model with them: at equal cost its test loss is lower than that of every"
        " other arm, than uniform's by 0.2 (95% interval 0.1 to 0.3, 3 seeds)."
    )
    tied = content({("learned", "uniform"): (-0.3, 0.1), ("learned", "random"): (-0.5, -0.2)})
    assert "cannot be told from uniform: use uniform, the simplest" in verdict(tied)
    assert "cannot be told from random: use learned" in verdict(
        content({("learned", "uniform"): (-0.3, -0.1), ("learned", "random"): (-0.5, 0.0)})
    )


def test_an_arm_that_is_clearly_higher_is_no_tie():
    """The first is the lowest over the seeds that all arms have; over those of a pair it may be the higher."""
    assert verdict(content({("learned", "uniform"): (0.1, 0.3), ("uniform", "random"): (-0.2, -0.1)})) == (
        "Weigh all sources the same: at equal cost its test loss is lower than that of every other arm, than random's"
        " by 0.15 (95% interval 0.1 to 0.2, 3 seeds)."
    )


def test_arms_that_spent_more_or_less_than_the_budget_are_named():
    dear = content({("learned", "uniform"): (-0.3, -0.1)})
    dear["arms"][0]["seeds"] = [{"flops": 1.04e9}, {"flops": 1.5e9}, {"flops": 1.2e9}]
    assert verdict(dear) == (
        "Learn the weights and train a fresh model with them: its test loss is lower than that of every other arm, than"
        " uniform's by 0.2 (95% interval 0.1 to 0.3, 3 seeds). Not at equal cost: executed FLOPs beside the budget,"
        " learned +25%."
    )


def test_arms_of_other_seeds_conclude_nothing():
    one = content({("learned", "uniform"): (-0.3, -0.1), ("learned", "random"): (-0.5, -0.2)})
    one["paired"][0]["interval"] = None
    assert "some arms have less than two seeds in common" in verdict(one)
    assert "less than two seeds in common" in verdict(one | {"paired": one["paired"][1:]})


def test_one_seed_one_arm_and_none_conclude_nothing():
    pair = {("learned", "uniform"): (-0.3, -0.1)}
    assert "one seed says nothing" in verdict(content(pair, seeds=1))
    one = content(pair) | {"arms": [{"name": "uniform", "seeds": [{}]}]}
    assert verdict(one) == "Only uniform has been run: there is nothing to compare it with."
    assert verdict({"arms": [], "paired": []}) == "Nothing has been run yet."


def test_every_result_has_a_place_among_the_simplest():
    assert {name for arm in ARMS.values() for name in arm.validation} == set(SIMPLEST)
