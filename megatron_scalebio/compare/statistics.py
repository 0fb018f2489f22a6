"""Means over seeds, how far they can be trusted, and differences that are taken seed by seed."""

import math
import statistics
from collections.abc import Sequence

Interval = tuple[float, float]


def interval_of_mean(values: Sequence[float], confidence: float = 0.95) -> Interval | None:
    """Student's interval of the mean of what `values` were drawn from; None of a single value, which says nothing."""
    if len(values) < 2:
        return None
    mean = statistics.fmean(values)
    reach = student_quantile((1 + confidence) / 2, len(values) - 1) * statistics.stdev(values) / math.sqrt(len(values))
    return mean - reach, mean + reach


def student_quantile(probability: float, freedom: int) -> float:
    """Below which Student's t with so many degrees of freedom falls with a probability of 1/2 or more, below 1.

    By bisection on the distribution's integral; within 1e-6 up to a probability of .999.
    """
    low, high = 0.0, 1.0
    while _student_cdf(high, freedom) < probability:
        low, high = high, 2 * high
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if _student_cdf(middle, freedom) < probability else (low, middle)
    return (low + high) / 2


def _student_cdf(t: float, freedom: int) -> float:
    """Its density, with x = tan(angle) * sqrt(freedom), is a power of the cosine: Simpson's rule does well on it."""
    parts, last = 400, math.atan(t / math.sqrt(freedom))
    step = last / parts
    heights = [math.cos(index * step) ** (freedom - 1) for index in range(parts + 1)]
    area = step / 3 * (heights[0] + 4 * sum(heights[1:-1:2]) + 2 * sum(heights[2:-1:2]) + heights[-1])
    log_scale = math.lgamma((freedom + 1) / 2) - math.lgamma(freedom / 2) - math.log(math.pi) / 2
    return 0.5 + math.exp(log_scale) * area
