"""Values of one thing at each prompt, compared with those of another: interpolation, intervals."""

from collections.abc import Sequence
from itertools import pairwise
from math import log, sqrt
from statistics import fmean, stdev

from scipy.stats import t as student


def read_at(
    line: Sequence[tuple[float, float]], place: float, *, slack: float = 0.0
) -> float | None:
    """Read a line of points (x, y) at a place, linearly in the logarithm of x.

    Args:
        line: Points by rising x.
        place: Where to read.
        slack: How far outside the ends, in logarithms, the nearest end still counts.

    Returns:
        The value; None outside.
    """
    points, at = [(log(x), y) for x, y in line], log(place)
    if not points or not points[0][0] - slack <= at <= points[-1][0] + slack:
        return None
    if len(points) == 1:
        return points[0][1]
    for (left, low), (right, high) in pairwise(points):
        if at <= right or right == points[-1][0]:
            share = (at - left) / (right - left) if right > left else 0.0
            return low + min(max(share, 0.0), 1.0) * (high - low)
    return None


def interval(values: Sequence[float]) -> tuple[float, float] | None:
    """Return the 95 % interval of a mean by Student's t; None of fewer than two values."""
    if len(values) < 2:
        return None
    half = student.ppf(0.975, len(values) - 1) * stdev(values) / sqrt(len(values))
    return fmean(values) - half, fmean(values) + half


def as_good_as(best: str, values: dict[str, list[float]]) -> list[str]:
    """Return the others whose paired difference to the best has an interval around 0."""
    found = []
    for name, mine in values.items():
        apart = interval([b - a for a, b in zip(values[best], mine, strict=True)])
        if name != best and (apart is None or apart[0] <= 0):
            found.append(name)
    return found
