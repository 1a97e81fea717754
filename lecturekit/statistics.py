"""What a fraction found in a few trials says about the true one: the interval that labs, rubrics and reports show."""

from __future__ import annotations

import math
from statistics import NormalDist

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
