"""Comparing answers: what counts as the same, and how far is near enough."""

import pytest
import torch

from lecturekit.checking.case import Case, Draw
from lecturekit.checking.compare import Tolerance, compare, precision

CASE = Case(x=torch.zeros(1))


@pytest.mark.parametrize(
    ("expected", "got"),
    [
        (torch.tensor([1, 2]), torch.tensor([1, 2])),
        (torch.tensor(1.5), 1.5),
        (3, torch.tensor(3)),
        (3, 3.0),
        ((1, "a"), [1, "a"]),
        ({"a": [torch.ones(2)]}, {"a": (torch.ones(2),)}),
        (None, None),
        (torch.tensor([float("inf")]), torch.tensor([float("inf")])),
        (torch.zeros(0), torch.zeros(0)),
    ],
)
def test_equal_things_are_equal(expected, got):
    assert compare(expected, got, CASE) is None


@pytest.mark.parametrize(
    ("expected", "got", "kind", "where"),
    [
        (torch.ones(2, 2), torch.tensor([[1.0, 1], [1, 2]]), "value", "result[1, 1]"),
        (torch.ones(2), torch.ones(2, 1), "shape", "result"),
        (torch.ones(1), torch.ones(1, dtype=torch.int64), "dtype", "result"),
        (torch.ones(2), torch.tensor([1.0, float("nan")]), "nan", "result[1]"),
        (torch.tensor([float("inf")]), torch.tensor([float("-inf")]), "value", "result[0]"),
        ([1, 2], [1], "type", "result"),
        ({"a": 1}, {"b": 1}, "type", "result"),
        ({"a": [1, 2]}, {"a": [1, 3]}, "value", "result['a'][1]"),
        ("a", "b", "value", "result"),
        (True, "True", "type", "result"),
        (2, 3, "value", "result"),
    ],
)
def test_the_first_difference_is_found(expected, got, kind, where):
    difference = compare(expected, got, CASE)
    assert (difference.kind, difference.where) == (kind, where)


def test_nan_equals_nan_only_when_asked():
    nan = torch.tensor([float("nan")])
    assert compare(nan, nan.clone(), CASE).kind == "nan"
    assert compare(nan, nan.clone(), CASE, equal_nan=True) is None


def test_a_tolerance_is_counted_in_roundings_of_the_coarsest_dtype():
    fine, coarse = Case(x=torch.zeros(1)), Case(x=torch.zeros(1, dtype=torch.bfloat16))
    tolerance = Tolerance(2, "two roundings")
    one = torch.tensor([1.0])
    off = torch.tensor([1.0 + 3 * 2**-23])
    assert compare(one, torch.tensor([1.0 + 2 * 2**-23]), fine, tolerance) is None
    assert compare(one, off, fine, tolerance).kind == "value"
    assert compare(one, off, coarse, tolerance) is None
    assert precision(coarse, one) == torch.finfo(torch.bfloat16).eps


def test_a_tolerance_may_have_its_own_magnitude():
    tolerance = Tolerance(1, "of the input", magnitude=lambda case, expected: 1e6)
    assert compare(torch.tensor([0.0]), torch.tensor([0.1]), CASE, tolerance) is None
    assert compare(torch.tensor([0.0]), torch.tensor([0.2]), CASE, tolerance) is not None


def test_infinite_values_do_not_make_the_tolerance_infinite():
    expected = torch.tensor([float("inf"), 1.0])
    assert compare(expected, torch.tensor([float("inf"), 2.0]), CASE, Tolerance(4, "…")).where == "result[1]"


def test_draws_are_seeded_and_sizes_differ():
    first, second = Draw(7, "q", 0), Draw(7, "q", 0)
    assert torch.equal(first.normal(3, 4), second.normal(3, 4))
    assert not torch.equal(Draw(7, "q", 1).normal(3), Draw(7, "q", 0).normal(3))
    assert not torch.equal(Draw(7, "p", 0).normal(3), Draw(7, "q", 0).normal(3))
    assert torch.equal(Draw(b"\x07", "q", 0).normal(3), Draw("07", "q", 0).normal(3))
    for index in range(50):
        sizes = Draw(0, "q", index).sizes(3, 2, 4)
        assert sorted(sizes) == [2, 3, 4]
    with pytest.raises(ValueError, match="not 4 different sizes"):
        first.sizes(4, 2, 4)


def test_draws_stay_in_their_range():
    draw = Draw(1, "q", 0)
    assert {draw.integer(1, 3) for _ in range(200)} == {1, 2, 3}
    assert set(draw.integers(0, 1, 100).tolist()) == {0, 1}
    assert {draw.choice("ab") for _ in range(100)} == {"a", "b"}
    assert all(2 <= draw.number(2, 3) < 3 for _ in range(100))
    uniform = draw.uniform(1000, low=-1, high=1)
    assert uniform.min() >= -1 and uniform.max() < 1
    assert sorted(draw.permutation(5).tolist()) == [0, 1, 2, 3, 4]


def test_edges_come_in_turn():
    assert [Draw(0, "q", index).edge("a", "b") for index in range(4)] == [None, "a", "b", None]


def test_a_case_tells_which_inputs_it_has():
    with pytest.raises(AttributeError, match="no input 'weigth'; it has x"):
        _ = CASE.weigth
    copy = Case(x=[torch.ones(1)]).copy()
    copy.x[0].add_(1)
    assert CASE.copy().x is not CASE.x
