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
"""

from dataclasses import dataclass
from typing import Any

import numpy as np


@dataclass(frozen=True)
class Share:
    """What the next batch holds of K sources."""

    start: list[int]  # [K] where each source's stream is read from: the examples drawn so far
    num_examples: list[int]  # [K] n_i
    scale: list[float]  # [K] what a source's mean loss counts for: 1, or n_i / due_i where it takes turns


class AdaptiveShares:
    """The draws of one run, batch after batch; equal on every rank, since the weights are.

    Fractions of examples are carried over, so that in the long run a source has had its due exactly. The weights of the
    call before decide, so that a batch can be prepared while the step before it runs.

    Args:
        num_sources: K.
        batch_size: B.
        exploration: share of the batch that goes to the sources equally, from 0 to 1.
        at_least_one: of each source, where B >= K.
    """

    def __init__(self, num_sources: int, batch_size: int, exploration: float, at_least_one: bool) -> None:
        self.batch_size, self.exploration = batch_size, exploration
        self.at_least_one = at_least_one and batch_size >= num_sources
        self.num_batches = 0
        self.drawn = np.zeros(num_sources, dtype=np.int64)
        self.carry = np.zeros(num_sources)  # of an example, what a source is owed; adds up to 0
        self.weights: np.ndarray | None = None  # of the call before

    def due(self, weights: np.ndarray) -> np.ndarray:
        """[K] examples per batch, adding up to B."""
        share = self.exploration / len(weights) + (1 - self.exploration) * weights
        due = self.batch_size * share
        raised = np.zeros(len(due), dtype=bool)
        while self.at_least_one and (due[~raised] < 1).any():  # those that one example is too much for give to it
            raised |= due < 1
            left = share[~raised].sum()
            due = np.where(raised, 1.0, share * (self.batch_size - raised.sum()) / (left or 1.0))
        return due

    def next(self, weights: list[float]) -> Share:
        """The next batch's, when the weights stand at `weights` [K]."""
        now = np.array(weights)
        due = self.due(now if self.weights is None else self.weights)
        always = due > 1 - 1e-9
        counts = _whole(due + self.carry, always.astype(np.int64), self.batch_size)
        share = Share(
            start=self.drawn.tolist(),
            num_examples=counts.tolist(),
            scale=[1.0 if sure or not d else n / d for n, d, sure in zip(counts.tolist(), due, always, strict=True)],
        )
        self.carry += due - counts
        self.drawn += counts
        self.weights, self.num_batches = now, self.num_batches + 1
        return share

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


def _whole(credit: np.ndarray, least: np.ndarray, total: int) -> np.ndarray:
    """Whole numbers near `credit`, at least `least`, adding up to `total`; of equal claims the first goes first."""
    counts = np.maximum(np.floor(credit + 1e-9).astype(np.int64), least)
    while (surplus := counts.sum() - total) != 0:
        owed = credit - counts
        index = np.argmax(owed) if surplus < 0 else np.argmin(np.where(counts > least, owed, np.inf))
        counts[index] += -1 if surplus > 0 else 1
    return counts
