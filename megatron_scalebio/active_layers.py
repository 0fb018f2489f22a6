"""LISA (arXiv 2403.17919): which decoder layers are active in a period.

A draw is a function of (seed, period, num_layers) and the settings alone, hence equal on every rank and under every
layout. Of embedding, final norm and head, which no draw is about, those of `lisa.always_active` are active in every
period. What is not active is frozen: it neither moves nor decays, and its optimizer states are dropped.
"""

import random
from enum import StrEnum

from megatron_scalebio.config import LisaConfig


class Role(StrEnum):
    """Which of the two models: the paper's u is `lower`, its w is `upper`. `upper` is the one that is exported."""

    LOWER = "lower"
    UPPER = "upper"


def period_of(step: int, lisa: LisaConfig) -> int:
    """The period, from 0, of a step, from 1. Without LISA there is one period only."""
    return (step - 1) // lisa.period if lisa.enabled else 0


def draw_active_layers(lisa: LisaConfig, num_layers: int, seed: int, period: int) -> dict[Role, list[int]]:
    """Active decoder layers of both models in a period, ascending, from 0.

    pairing "shared": one draw for both models, one layer from each of `num_active_layers` contiguous depth strata, and
    every layer of a stratum once before any twice. pairing "independent": the paper's, uniform without replacement,
    each model for itself.
    """
    if not lisa.enabled:
        return {role: list(range(num_layers)) for role in Role}
    if lisa.pairing == "shared":
        layers = [_from_stratum(stratum, seed, period) for stratum in strata(num_layers, lisa.num_active_layers)]
        return {role: layers for role in Role}
    return {
        role: sorted(_generator(seed, role, period).sample(range(num_layers), lisa.num_active_layers)) for role in Role
    }


def strata(num_layers: int, num_strata: int) -> list[range]:
    """`num_strata` contiguous ranges that cover the layers, their sizes equal or differing by one."""
    edges = [index * num_layers // num_strata for index in range(num_strata + 1)]
    return [range(start, stop) for start, stop in zip(edges, edges[1:], strict=False)]


def _from_stratum(stratum: range, seed: int, period: int) -> int:
    cycle, place = divmod(period, len(stratum))
    order = list(stratum)
    _generator(seed, stratum.start, cycle).shuffle(order)
    return order[place]


def _generator(*key: object) -> random.Random:
    return random.Random("/".join(str(part) for part in key))  # a str seeds through SHA-512: stable across processes
