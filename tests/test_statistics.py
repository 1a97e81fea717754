"""Intervals of fractions and means against their definitions and the printed tables."""

import math

import pytest

from lecturekit.statistics import Z95, mean_interval, wilson


def test_the_interval_is_that_of_95_percent():
    assert math.erf(Z95 / math.sqrt(2)) == pytest.approx(0.95, abs=1e-12)


@pytest.mark.parametrize(("right", "count"), [(0, 10), (5, 10), (10, 10), (83, 100), (1, 1)])
def test_wilson_ends_are_where_the_score_test_just_rejects(right, count):
    # Wilson's interval holds every p whose score test does not reject: |f − p| = 1.96 sqrt(p (1 − p) / n) at its ends.
    fraction = right / count
    low, high = wilson(fraction, count)
    assert 0 <= low <= fraction <= high <= 1 and low < high
    for end in (low, high):
        if 0 < end < 1:
            assert abs(fraction - end) == pytest.approx(Z95 * math.sqrt(end * (1 - end) / count), rel=1e-9)


@pytest.mark.parametrize(
    ("fraction", "count", "words"),
    [(1.2, 3, "fraction must be in 0"), (math.nan, 3, "fraction"), (0.5, 0, "count must be")],
)
def test_bad_arguments_are_named(fraction, count, words):
    with pytest.raises(ValueError, match=words):
        wilson(fraction, count)


@pytest.mark.parametrize(("count", "quantile"), [(5, 2.776), (10, 2.262), (20, 2.093), (41, 2.021)])
def test_the_interval_of_a_mean_is_students(count, quantile):
    """quantile: of Student's t at 97.5 % with count − 1 degrees of freedom, as tables print it."""
    values = [(-1.0) ** i * i for i in range(count)]
    middle, low, high = mean_interval(values)
    assert middle == pytest.approx(sum(values) / count)
    half = quantile * math.sqrt(sum((value - middle) ** 2 for value in values) / (count - 1) / count)
    assert (low, high) == pytest.approx((middle - half, middle + half), rel=3e-3)


def test_the_mean_of_one_value_has_no_interval():
    with pytest.raises(ValueError, match="at least 2, got 1"):
        mean_interval([0.5])
