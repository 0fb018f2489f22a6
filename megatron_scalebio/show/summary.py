"""What the steps so far say about each source, beside its weight: see the functions."""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

# A weight has settled if its trend over the last quarter of the steps is below TREND of itself (of LEAST of an equal
# share, where it is lower), or within NOISE times its scatter about that trend. Fewer than FEWEST steps say nothing.
TREND, LEAST, NOISE, FEWEST = 0.1, 0.1, 2.0, 5

# The interval of a weight comes from the scatter of this many blocks of steps. A block must be longer than the logits'
# momentum remembers, some ten steps, for its movement to say nothing of the next one's.
BLOCKS, SHORTEST_BLOCK = 10, 10


class Rows:
    """A table that grows by rows, [steps, columns] fp64, None as NaN: a step costs no more late in a run than early."""

    def __init__(self, columns: int):
        self._buffer, self._count = np.empty((64, columns)), 0

    def append(self, row: Sequence[float | None]) -> None:
        if self._count == len(self._buffer):
            self._buffer = np.concatenate([self._buffer, np.empty_like(self._buffer)])
        self._buffer[self._count] = np.array(row, dtype=float)
        self._count += 1

    @property
    def table(self) -> np.ndarray:
        return self._buffer[: self._count]


def weights_summary(names: list[str], table: np.ndarray, learned: bool = True) -> dict[str, Any]:
    """{"weights", "weights_mean", "moved", "settled", "still_moving"} of the weights after each step so far.

    The last quarter is the last ceil(step / 4) steps. The trend is what the line of least squares rises or falls over
    it; a weight whose trend is smaller than the noise about it would not be elsewhere after more such steps. None has
    settled before a first one has moved, and a quarter of the steps have gone by since: until then the gate held them.

    Args:
        table: [steps, sources], a row at least.
        learned: False in mode fixed, whose weights stand still from the first step on.
    """
    quarter = math.ceil(len(table) / 4)
    last, moved = table[-quarter:], bool(np.ptp(table, axis=0).any())
    began = bool((table[: len(table) - quarter + 1] != table[0]).any())
    mean, times = last.mean(axis=0), np.arange(quarter) - (quarter - 1) / 2
    slope = times @ (last - mean) / max(times @ times, 1.0)
    scatter = (last - mean - np.outer(times, slope)).std(axis=0)
    trend = np.abs(slope) * quarter
    small = trend < TREND * np.maximum(mean, LEAST / len(names))
    settled = (small | (trend < NOISE * scatter)) & (quarter >= FEWEST and began) | (not learned)
    return {
        "weights": dict(zip(names, table[-1].tolist(), strict=True)),
        "weights_mean": dict(zip(names, mean.tolist(), strict=True)),
        "moved": moved,
        "settled": dict(zip(names, settled.tolist(), strict=True)),
        "still_moving": moved and not settled.all(),
    }


def weight_intervals(names: list[str], table: np.ndarray) -> dict[str, tuple[float, float]] | None:
    """{source: what holds, in about 19 of 20 runs, the weight that such runs end at on average over their seeds}; None
    where the steps so far are too few to tell, a weight stands at 0 or 1, or none has moved. Another single run strays
    as far again.

    How: the hypergradient's noise moves the log-odds of a weight step by step, so the variance of where they stand is
    the sum over blocks of steps of the variance of a block's movement. That is taken from the differences of
    neighbouring blocks (half their mean square), in which a steady trend cancels; a trend that bends does not, and
    widens the interval. Two standard deviations to each side, and back from log-odds to weights.

    Args:
        table: [steps, sources].
    """
    if len(table) < BLOCKS * SHORTEST_BLOCK or table.min() <= 0 or table.max() >= 1:
        return None
    ends = table[np.linspace(0, len(table) - 1, BLOCKS + 1).round().astype(int)]
    odds = np.log(ends / (1 - ends))
    moved = np.diff(odds, axis=0)  # [blocks, sources]
    if not moved.any():
        return None
    reach = 2 * np.sqrt(BLOCKS * (np.diff(moved, axis=0) ** 2).mean(axis=0) / 2)
    low, high = (1 / (1 + np.exp(-(odds[-1] + side * reach))) for side in (-1, 1))
    return dict(zip(names, zip(low.tolist(), high.tolist(), strict=True), strict=True))


def epochs_summary(drawn: np.ndarray, num_examples: dict[str, int], num_steps: int) -> dict[str, Any]:
    """{"epochs", "epochs_planned"}: how often a source's records have been seen, and will have been after all steps at
    the pace of the last quarter of those so far.

    Args:
        drawn: [steps, sources], training examples of each step so far; 0 where a step's are not known.
    """
    sizes, done, left = np.array(list(num_examples.values())), drawn.sum(axis=0), num_steps - len(drawn)
    planned = done + left * drawn[-math.ceil(len(drawn) / 4) :].mean(axis=0)
    return {
        "epochs": dict(zip(num_examples, (done / sizes).tolist(), strict=True)),
        "epochs_planned": dict(zip(num_examples, (planned / sizes).tolist(), strict=True)),
    }


def overfitting_summary(losses: np.ndarray, epochs: dict[str, float]) -> dict[str, bool]:
    """{source: whether it is being learned by heart}: its records have been seen more than once, its training loss
    falls over the last quarter of the steps so far, and the validation loss does not.

    A loss falls if the slope of its line of least squares lies NOISE standard errors below 0.

    Args:
        losses: [steps, sources + 1], the training loss of each source in each step, NaN where a batch had no example of
            it; in the last column the validation loss, NaN where there is none.
        epochs: passes over each source's records so far.
    """
    quarter = math.ceil(len(losses) / 4)
    table = losses[-quarter:]
    falls = _falls(table) if quarter >= FEWEST else np.zeros(table.shape[1], dtype=bool)
    gains = falls[-1] or np.isnan(table[:, -1]).any()  # without a validation loss nobody can tell
    return {name: bool(fall and not gains and epochs[name] > 1) for name, fall in zip(epochs, falls[:-1], strict=True)}


def _falls(table: np.ndarray) -> np.ndarray:
    """Which columns of [steps, columns] fall; those with fewer than FEWEST numbers do not."""
    seen = ~np.isnan(table)
    count = seen.sum(axis=0)
    times = np.broadcast_to(np.arange(len(table), dtype=float)[:, None], table.shape)

    def centred(values: np.ndarray) -> np.ndarray:
        return np.where(seen, values - np.where(seen, values, 0.0).sum(axis=0) / np.maximum(count, 1), 0.0)

    across, up = centred(times), centred(table)
    spread = np.maximum((across**2).sum(axis=0), 1e-300)
    slope = (across * up).sum(axis=0) / spread
    variance = ((up - slope * across) ** 2).sum(axis=0) / np.maximum(count - 2, 1)
    return (count >= FEWEST) & (slope < -NOISE * np.sqrt(variance / spread))
