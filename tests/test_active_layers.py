"""The draws: which layers train when."""

from collections import Counter

import pytest

from megatron_scalebio.active_layers import Role, draw_active_layers, period_of, strata
from megatron_scalebio.config import LisaConfig

PINNED_SHARED = [[2, 6], [0, 4], [3, 7], [1, 5]]
PINNED_INDEPENDENT = [[[4, 5], [0, 3]], [[3, 5], [3, 7]]]
SIZES = [(4, 2), (7, 3), (64, 2), (5, 5), (6, 1), (10, 4)]


def shared(num_active: int) -> LisaConfig:
    return LisaConfig(num_active_layers=num_active, pairing="shared")


def independent(num_active: int) -> LisaConfig:
    return LisaConfig(num_active_layers=num_active, pairing="independent")


@pytest.mark.parametrize("num_layers, num_active", SIZES)
def test_strata_cover_the_layers_and_differ_by_one_at_most(num_layers, num_active):
    ranges = strata(num_layers, num_active)
    assert [layer for stratum in ranges for layer in stratum] == list(range(num_layers))
    sizes = {len(stratum) for stratum in ranges}
    assert len(ranges) == num_active and max(sizes) - min(sizes) <= 1 and min(sizes) >= 1


@pytest.mark.parametrize("num_layers, num_active", SIZES)
@pytest.mark.parametrize("seed", [0, 1])
def test_shared_draws_take_one_layer_of_each_stratum_and_every_layer_once_per_cycle(num_layers, num_active, seed):
    lisa, ranges = shared(num_active), strata(num_layers, num_active)
    longest = max(map(len, ranges))
    draws = [draw_active_layers(lisa, num_layers, seed, period) for period in range(4 * longest)]
    for draw in draws:
        assert draw[Role.LOWER] == draw[Role.UPPER] == sorted(draw[Role.UPPER])
        assert [sum(layer in stratum for layer in draw[Role.UPPER]) for stratum in ranges] == [1] * num_active
    for stratum in ranges:
        drawn = [next(layer for layer in draw[Role.UPPER] if layer in stratum) for draw in draws]
        for start in range(0, len(drawn) - len(stratum) + 1, len(stratum)):
            assert sorted(drawn[start : start + len(stratum)]) == list(stratum)
    in_time = {layer for draw in draws[:longest] for layer in draw[Role.UPPER]}
    assert in_time == set(range(num_layers))


def test_cycles_and_seeds_and_strata_have_orders_of_their_own():
    def order(seed: int, cycle: int, stratum: int) -> list[int]:
        draws = [draw_active_layers(shared(2), 16, seed, 8 * cycle + place)[Role.UPPER] for place in range(8)]
        return [draw[stratum] - 8 * stratum for draw in draws]

    assert len({tuple(order(*key)) for key in [(0, 0, 0), (0, 1, 0), (1, 0, 0), (0, 0, 1)]}) == 4


def test_independent_draws_are_uniform_without_replacement_and_each_models_own():
    draws = [draw_active_layers(independent(2), 6, 5, period) for period in range(600)]
    for role in Role:
        assert all(len(set(draw[role])) == 2 and draw[role] == sorted(draw[role]) for draw in draws)
        counts = Counter(layer for draw in draws for layer in draw[role])
        assert set(counts) == set(range(6))
        assert all(abs(count - 200) < 60 for count in counts.values())  # 5 standard deviations
    agreeing = sum(draw[Role.LOWER] == draw[Role.UPPER] for draw in draws)
    assert 10 < agreeing < 80  # one pair in 15


def test_a_draw_depends_on_seed_period_and_layers_alone_and_never_changes():
    """Pinned: another Python or another release must draw the same, or no checkpoint could be continued."""
    assert [draw_active_layers(shared(2), 8, 1, period)[Role.UPPER] for period in range(4)] == PINNED_SHARED
    assert [
        list(draw_active_layers(independent(2), 8, 1, period).values()) for period in range(2)
    ] == PINNED_INDEPENDENT


def test_without_lisa_every_layer_is_active_in_one_period():
    lisa = LisaConfig(enabled=False)
    assert {period_of(step, lisa) for step in (1, 20, 21, 1000)} == {0}
    assert draw_active_layers(lisa, 3, 0, 0) == {role: [0, 1, 2] for role in Role}


def test_a_period_starts_every_so_many_steps_from_step_one():
    assert [period_of(step, LisaConfig(period=3)) for step in range(1, 8)] == [0, 0, 0, 1, 1, 1, 2]
