"""What a fraction or a mean found in a few trials says about the true one: its 95 % interval."""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import NormalDist, fmean, stdev

Z95 = NormalDist().inv_cdf(0.975)
"""How many standard deviations the middle 95 % of a normal distribution reach to either side: 1.96."""


def wilson(fraction: float, count: int) -> tuple[float, float]:
    """Wilson's 95 % interval (low, high) for a fraction found in `count` independent trials, within 0 … 1.

    Unlike fraction ± 1.96 · sqrt(fraction (1 − fraction) / count) it is right near 0 and 1 and for few trials.
    Raises ValueError unless 0 <= fraction <= 1 and count >= 1. Wilson 1927.
    """
    if not 0 <= fraction <= 1:
        raise ValueError(f"fraction must be in 0 … 1, got {fraction}")
    if count < 1:
        raise ValueError(f"count must be at least 1, got {count}")
    middle = (fraction + Z95**2 / (2 * count)) / (1 + Z95**2 / count)
    half = Z95 / (1 + Z95**2 / count) * math.sqrt(fraction * (1 - fraction) / count + Z95**2 / (4 * count**2))
    # a rounding must not push an end past the fraction itself, which the interval always holds
    return max(0.0, min(fraction, middle - half)), min(1.0, max(fraction, middle + half))


def mean_interval(values: Sequence[float]) -> tuple[float, float, float]:
    """The mean of independent values and its 95 % interval by Student's t: (mean, low, high).

    Of paired differences this is the paired t interval. The quantile of t is expanded around the normal one
    (Abramowitz & Stegun, 26.7.5), within 0.2 % from 5 values on. Raises ValueError for fewer than 2 values.
    """
    count = len(values)
    if count < 2:
        raise ValueError(f"values must be at least 2, got {count}: one value says nothing of the spread")
    freedom = count - 1
    quantile = (
        Z95
        + (Z95**3 + Z95) / (4 * freedom)
        + (5 * Z95**5 + 16 * Z95**3 + 3 * Z95) / (96 * freedom**2)
        + (3 * Z95**7 + 19 * Z95**5 + 17 * Z95**3 - 15 * Z95) / (384 * freedom**3)
    )
    middle = fmean(values)
    half = quantile * stdev(values) / math.sqrt(count)
    return middle, middle - half, middle + half
