"""How many examples of each source the next batch holds, when the batch follows the weights.

A source's loss is the mean over whatever number n_i of its examples a batch holds, so any n_i >= 1 leaves the gradients
of both models and of the logits unbiased. What n_i decides is their variance. With s_i^2 the variance of source i's
gradient from one example, sum_i p_i L_i has the gradient variance sum_i p_i^2 s_i^2 / n_i, which under sum_i n_i = B is
least at n_i proportional to p_i s_i (Neyman's allocation): at B * p_i, where the sources are about equally noisy. The
same holds for the hypergradient, in which source i's gap comes with the factor p_i, too. But a source that was turned
down must still be measured, or it could not come back: a share of the batch, `exploration`, goes round equally.

    due_i = B * (exploration / K + (1 - exploration) * p_i),    while learning raised to 1 each, where B >= K

A source whose due is below one example takes turns: it is absent from some batches, and where it is present its mean
loss counts n_i / due_i times. Over the batches this is unbiased again, but a source that is due every tenth batch is
seen a tenth as often, at ten times the step: its estimate is as much noisier.

With `data.max_epochs` a source has a number of draws for the whole run, and due_i is at most what is left of them over
the steps that are left, so that none runs dry: what it does not get goes to the others in proportion to theirs. A
source that were drawn less and counted the same would have its few records repeated all the same, in fewer steps of
greater weight; so its weight in the models' loss is cut by the same factor, `kept`, and the others take that, too. What
is learned about it stays.
"""

import math
from dataclasses import dataclass
from typing import Any

import numpy as np

from megatron_scalebio.config import Config, UserError


@dataclass(frozen=True)
class Share:
    """What the next batch holds of K sources."""

    start: list[int]  # [K] where each source's stream is read from: the examples drawn so far
    num_examples: list[int]  # [K] n_i
    scale: list[float]  # [K] what a source's mean loss counts for: 1, or n_i / due_i where it takes turns
    kept: list[float]  # [K] share of its draws that a limit leaves a source: 1 without


class AdaptiveShares:
    """The draws of one run, batch after batch; equal on every rank, since the weights are.

    Fractions of examples are carried over, so that in the long run a source has had its due exactly. The weights of the
    call before decide, so that a batch can be prepared while the step before it runs.

    Args:
        num_sources: K.
        batch_size: B.
        exploration: share of the batch that goes to the sources equally, from 0 to 1.
        at_least_one: of each source, where B >= K.
        limits: [K] draws of each source in all batches; None: any number.
        num_batches: of the whole run; counts with `limits` alone.
    """

    def __init__(
        self,
        num_sources: int,
        batch_size: int,
        exploration: float,
        at_least_one: bool,
        limits: list[int] | None = None,
        num_batches: int = 0,
    ) -> None:
        self.batch_size, self.exploration = batch_size, exploration
        self.at_least_one = at_least_one and batch_size >= num_sources
        self.limits, self.last_batch = limits, num_batches
        self.num_batches = 0
        self.drawn = np.zeros(num_sources, dtype=np.int64)
        self.carry = np.zeros(num_sources)  # of an example, what a source is owed; adds up to 0
        self.weights: np.ndarray | None = None  # of the call before

    def due(self, weights: np.ndarray, most: np.ndarray | float = math.inf) -> np.ndarray:
        """[K] examples per batch, at most `most` [K] each, adding up to B."""
        share = self.exploration / len(weights) + (1 - self.exploration) * weights
        most = np.broadcast_to(most, share.shape)
        least = np.minimum(1.0 if self.at_least_one else 0.0, most)
        return _in_proportion(share, least, most, self.batch_size)

    def next(self, weights: list[float]) -> Share:
        """The next batch's, when the weights stand at `weights` [K]."""
        now = np.array(weights)
        before = now if self.weights is None else self.weights
        wanted, left = self.due(before), self._left()
        due = self.due(before, left / max(1, self.last_batch - self.num_batches))
        always = due > 1 - 1e-9
        counts = _whole(due + self.carry, np.minimum(always, left).astype(np.int64), left, self.batch_size)
        share = Share(
            start=self.drawn.tolist(),
            num_examples=counts.tolist(),
            scale=[1.0 if sure or not d else n / d for n, d, sure in zip(counts.tolist(), due, always, strict=True)],
            kept=[min(1.0, d / w) if w else 1.0 for d, w in zip(due.tolist(), wanted.tolist(), strict=True)],
        )
        self.carry += due - counts
        self.drawn += counts
        self.weights, self.num_batches = now, self.num_batches + 1
        return share

    def _left(self) -> np.ndarray:
        """[K] draws."""
        return np.full(len(self.drawn), np.inf) if self.limits is None else np.array(self.limits) - self.drawn

    def state_dict(self) -> dict[str, Any]:
        """Plain numbers that JSON keeps exactly."""
        return {
            "num_batches": self.num_batches,
            "drawn": self.drawn.tolist(),
            "carry": self.carry.tolist(),
            "weights": None if self.weights is None else self.weights.tolist(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.num_batches = state["num_batches"]
        self.drawn, self.carry = np.array(state["drawn"], dtype=np.int64), np.array(state["carry"])
        self.weights = None if state["weights"] is None else np.array(state["weights"])


def shares_of_sets(weights: list[float], total: int) -> list[int]:
    """How many of `total` examples each validation set has in every step: by weight, at least one each."""
    return _whole(total * np.array(weights), np.ones(len(weights)), np.full(len(weights), np.inf), total).tolist()


def draw_limits(config: Config, num_examples: list[int]) -> list[int] | None:
    """[K] draws of each source that `data.max_epochs` allows in the whole run; None: any number.

    Args:
        num_examples: [K] usable records.

    Raises: UserError, where they are too few for the run's batches.
    """
    epochs, bilevel, names = config.data.max_epochs, config.bilevel, [source.name for source in config.data.sources]
    if epochs is None:
        return None
    limits = [math.floor(epochs * size) for size in num_examples]
    fixed = bilevel.weights or {} if bilevel.mode == "fixed" else {}  # there a source of weight 0 is never drawn
    total = sum(limit for name, limit in zip(names, limits, strict=True) if fixed.get(name, 1.0) > 0)
    needed = bilevel.steps * bilevel.global_batch_size
    if total < needed:
        raise UserError(
            f"data.max_epochs={epochs:g} allows {total} draws of training examples from all sources, but"
            f" bilevel.steps={bilevel.steps} times bilevel.global_batch_size={bilevel.global_batch_size} are {needed}:"
            f" raise data.max_epochs, or lower bilevel.steps to {total // bilevel.global_batch_size}"
        )
    return limits


def _in_proportion(share: np.ndarray, least: np.ndarray, most: np.ndarray, total: float) -> np.ndarray:
    """Numbers in proportion to `share`, from `least` to `most` each, that add up to `total`.

    What would break a bound is set to it and the others share what is left, until none does; of the two kinds of bounds
    first the one that is broken by more (the order in which CSS lays out flexible boxes).
    """
    result, free = np.zeros(len(share)), np.ones(len(share), dtype=bool)
    while free.any():
        left, weight = total - result[~free].sum(), share[free].sum()
        result[free] = share[free] * left / weight if weight > 0 else left / free.sum()
        bounded = np.where(free, result.clip(least, most), result)
        excess = (bounded - result).sum()
        broken = bounded != result if excess == 0 else (bounded > result if excess > 0 else bounded < result)
        if not broken.any():
            break
        result[broken] = bounded[broken]
        free &= ~broken
    return result


def _whole(credit: np.ndarray, least: np.ndarray, most: np.ndarray, total: int) -> np.ndarray:
    """Whole numbers near `credit`, from `least` to `most`, adding up to `total`; of equal claims the first goes
    first."""
    counts = np.minimum(np.maximum(np.floor(credit + 1e-9), least), most).astype(np.int64)
    while (surplus := counts.sum() - total) != 0:
        owed = credit - counts
        if surplus < 0:
            counts[np.argmax(np.where(counts < most, owed, -np.inf))] += 1
        else:
            counts[np.argmin(np.where(counts > least, owed, np.inf))] -= 1
    return counts
