"""Numbers that a student's code may show in place of a plain test's partial credit: every one of them is a mark."""

import pytest
from nbformat.v4 import new_code_cell

from lecturekit.grading.execute import _plain_mark
from lecturekit.grading.session import _valid

POINTS = 5.0
SHOWN = {
    "too much": "1000",
    "without end": "inf",
    "larger than any float": "1e999",
    "just too much": "5.01",
    "with a line": "1_0",
    "nothing": "",
    "no text": None,
    "no string": 5,
}


def mark(source, shown):
    marks = {"grade": True, "grade_id": "share", "points": POINTS, "locked": True, "solution": False, "task": False}
    cell = new_code_cell(source, metadata={"nbgrader": marks | {"schema_version": 3}})
    data = {"text/html": "5"} if shown is None else {"text/plain": shown}
    return _plain_mark(cell, [_valid({"output_type": "execute_result", "data": data, "metadata": {}})])


@pytest.mark.parametrize("shown", SHOWN.values(), ids=SHOWN)
def test_what_is_no_partial_credit_earns_nothing_and_stops_nothing(shown):
    assert mark("share()", shown).score == 0
    assert mark("share()", shown).status == "wrong"


def test_a_share_is_earned_with_two_digits():
    assert mark("share()", "2.123456789").score == 2.12
    assert (mark("share()", "5").score, mark("share()", "5").status) == (5, "passed")


def test_a_number_counts_only_where_the_test_ends_with_one():
    assert mark("assert share()", "1").score == POINTS
