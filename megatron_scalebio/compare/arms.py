"""The arms of a comparison: ways to spend a budget of FLOPs. Each is a function that asks `Runs` to train.

Where weights are given, an adaptive batch is drawn by them, so that a source of weight 0 costs nothing. Weights that
are learned or searched for are paid out of the same budget: about `learning_share` of it goes to that, and what is left
to a fresh model.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, Protocol

import numpy as np

from megatron_scalebio.config import Config, EvaluationSet, SourceConfig, UserError, evaluation_sets

NONE, CHOOSES, TRAINS = "none", "chooses weights by it", "trains on it"  # what an arm does with validation records


@dataclass(frozen=True)
class Result:
    """What a run, or several that an arm needs, came to."""

    test_loss: float
    weights: dict[str, float]  # at the end
    steps: int
    flops: float  # executed, of all ranks
    tokens: int
    seconds: float  # of the steps
    test_loss_lower: float | None = None

    def after(self, *earlier: "Result") -> "Result":
        """This result, with what led to it counted."""
        parts = [self, *earlier]
        return Result(
            test_loss=self.test_loss,
            weights=self.weights,
            steps=sum(part.steps for part in parts),
            flops=sum(part.flops for part in parts),
            tokens=sum(part.tokens for part in parts),
            seconds=sum(part.seconds for part in parts),
        )


class Runs(Protocol):
    """What an arm may ask for, with one seed."""

    config: Config
    seed: int
    num_examples: dict[str, int]  # usable records of each source
    budget_flops: float
    learning_share: float
    mixtures: int

    def train(self, name: str, settings: Mapping[str, Any], flops: float) -> Result:
        """Train from the start for as many steps as `flops` buy, under `settings` over the configuration's."""


@dataclass(frozen=True)
class Arm:
    """`run` gives one result, or several under names of their own."""

    name: str
    run: Callable[[Runs], dict[str, Result]]
    validation: dict[str, str]  # {name of a result: what it does with validation records}

    @property
    def doc(self) -> str:
        return (self.run.__doc__ or "").strip()


ARMS: dict[str, Arm] = {}


def _arm(validation: str | dict[str, str]) -> Callable[[Callable[[Runs], Any]], Callable[[Runs], Any]]:
    def register(function: Callable[[Runs], Any]) -> Callable[[Runs], Any]:
        name = function.__name__
        several = validation if isinstance(validation, dict) else {name: validation}

        def run(runs: Runs) -> dict[str, Result]:
            result = function(runs)
            return result if isinstance(result, dict) else {name: result}

        run.__doc__ = function.__doc__
        ARMS[name] = Arm(name, run, several)
        return function

    return register


def _fixed(weights: dict[str, float] | None) -> dict[str, Any]:
    mode = {"bilevel.mode": "fixed", "bilevel.weights": weights, "bilevel.prior": None, "bilevel.floor": 0.0}
    return mode | {"data.sampling": "adaptive"}


_LEARNS = {"bilevel.mode": "bilevel", "bilevel.weights": None}


@_arm(NONE)
def uniform(runs: Runs) -> Result:
    """every source counts the same"""
    return runs.train("train", _fixed(None), runs.budget_flops)


@_arm(NONE)
def natural(runs: Runs) -> Result:
    """every record counts the same: sources in proportion to their usable records"""
    total = sum(runs.num_examples.values())
    weights = {name: number / total for name, number in runs.num_examples.items()}
    return runs.train("train", _fixed(weights), runs.budget_flops)


@_arm(NONE)
def given(runs: Runs) -> Result:
    """the weights that bilevel.weights gives"""
    weights = runs.config.bilevel.weights
    if weights is None:
        raise UserError("--arms given: bilevel.weights is not set; give a mapping {name: weight} or a weights.json")
    return runs.train("train", _fixed(weights), runs.budget_flops)


@_arm({"one_stage_upper": TRAINS, "one_stage_lower": CHOOSES})
def one_stage(runs: Runs) -> dict[str, Result]:
    """the bilevel run itself: its upper model, and its lower"""
    result = runs.train("learn", _LEARNS | {"run.export_model": "both"}, runs.budget_flops)
    assert result.test_loss_lower is not None  # `run.export_model`
    lower = replace(result, test_loss=result.test_loss_lower)
    return {"one_stage_upper": result, "one_stage_lower": lower}


@_arm(CHOOSES)
def learned(runs: Runs) -> Result:
    """a bilevel run learns the weights, a fresh model is trained with them"""
    learning = runs.train("learn", _LEARNS, runs.learning_share * runs.budget_flops)
    return runs.train("train", _fixed(learning.weights), runs.budget_flops - learning.flops).after(learning)


@_arm(TRAINS)
def validation(runs: Runs) -> Result:
    """the validation records as the only source"""
    sets = _validation_sets(runs)
    weights = {each.name: each.weight for each in sets}
    settings = _fixed(weights) | {"data.sources": _sources(sets), "data.max_epochs": None}
    return runs.train("train", settings, runs.budget_flops)


@_arm(TRAINS)
def validation_added(runs: Runs) -> Result:
    """the validation records as one more source, every source counting the same"""
    sources = list(runs.config.data.sources)
    for source in _sources(_validation_sets(runs)):
        while source.name in {other.name for other in sources}:
            source.name += "_"
        sources.append(source)
    return runs.train("train", _fixed(None) | {"data.sources": sources}, runs.budget_flops)


def _validation_sets(runs: Runs) -> list[EvaluationSet]:
    return evaluation_sets("data.validation", runs.config.data.validation)


def _sources(sets: list[EvaluationSet]) -> list[SourceConfig]:
    return [SourceConfig(each.name, each.path) for each in sets]


@_arm(CHOOSES)
def random(runs: Runs) -> Result:
    """of some random mixtures that with the lowest validation loss in a short run; a fresh model is trained with it"""
    flops = runs.learning_share * runs.budget_flops / runs.mixtures
    on_validation = {"data.test": runs.config.data.validation}
    tries = [
        runs.train(f"mixture_{number}", _fixed(_mixture(runs, number)) | on_validation, flops)
        for number in range(1, runs.mixtures + 1)
    ]
    best = min(tries, key=lambda result: result.test_loss)
    left = runs.budget_flops - sum(result.flops for result in tries)
    return runs.train("train", _fixed(best.weights), left).after(*tries)


def _mixture(runs: Runs, number: int) -> dict[str, float]:
    """Uniform among all mixtures."""
    parts = np.random.default_rng([runs.seed, number]).exponential(size=len(runs.num_examples))
    return dict(zip(runs.num_examples, (parts / parts.sum()).tolist(), strict=True))
