"""Wilson's interval against its definition."""

import math

import pytest

from lecturekit.statistics import Z95, wilson


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
