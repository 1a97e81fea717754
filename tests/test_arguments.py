"""The argument checks: what passes comes back unchanged, what does not is named."""

import math

import numpy
import pytest
import torch

from lecturekit.arguments import (
    is_finite,
    require_integers,
    require_number,
    require_positive_int,
    require_tensor,
    widened,
)


def test_a_good_tensor_comes_back_itself():
    x = torch.ones(2, 3)
    assert require_tensor("x", x, ndim=2, finite=True) is x
    assert require_tensor("x", x, dtype=torch.float32) is x
    codes = torch.ones(2, dtype=torch.uint8)
    assert require_tensor("codes", codes, dtype=torch.uint8) is codes
    assert require_tensor("codes", codes, floating=False) is codes


@pytest.mark.parametrize(
    ("value", "kind", "error", "words"),
    [
        ([1.0], {}, TypeError, "be a torch.Tensor, got list"),
        (numpy.ones(2), {}, TypeError, "got ndarray"),
        (torch.ones(2, dtype=torch.int64), {}, TypeError, "floating-point dtype, got torch.int64"),
        (torch.ones(2, dtype=torch.complex64), {}, TypeError, "floating-point dtype"),
        (torch.ones(2), {"dtype": torch.uint8}, TypeError, "dtype torch.uint8, got torch.float32"),
        (torch.ones(2, 3), {"ndim": 1}, ValueError, r"have 1 dimension\(s\), got shape \(2, 3\)"),
        (torch.ones(0, 3), {}, ValueError, r"not be empty, got shape \(0, 3\)"),
        (torch.tensor([1.0, math.nan]), {"finite": True}, ValueError, "be finite"),
    ],
)
def test_a_bad_tensor_is_named(value, kind, error, words):
    with pytest.raises(error, match=f"^x must .*{words}"):
        require_tensor("x", value, **kind)


def test_is_finite_looks_at_every_element_and_is_not_fooled_by_a_sum():
    assert is_finite(torch.tensor([1.0, -2.0]))
    assert is_finite(torch.full((4,), 3e38))  # the sum overflows float32, no element does
    assert is_finite(torch.full((9,), 6e4, dtype=torch.float16))
    for bad in (math.nan, math.inf, -math.inf):
        assert not is_finite(torch.tensor([1.0, bad]))
    assert not is_finite(torch.tensor([math.inf, -math.inf]))


def test_integers():
    for dtype in (torch.int64, torch.int32, torch.uint8):
        x = torch.ones(2, 3, dtype=dtype)
        assert require_integers("x", x, ndim=2) is x
    for dtype in (torch.float32, torch.complex64, torch.bool):
        with pytest.raises(TypeError, match=f"x must have an integer dtype, got {dtype}"):
            require_integers("x", torch.ones(2, dtype=dtype))
    with pytest.raises(TypeError, match="x must be a torch.Tensor, got list"):
        require_integers("x", [1])
    with pytest.raises(ValueError, match="x must have 1 dimension"):
        require_integers("x", torch.ones(2, 3).long(), ndim=1)


def test_widened_is_float32_or_wider_and_keeps_what_is_wide_enough():
    for dtype, wide in ((torch.bfloat16, torch.float32), (torch.float16, torch.float32)):
        assert widened(torch.ones(2, dtype=dtype)).dtype == wide
    for dtype in (torch.float32, torch.float64):
        x = torch.ones(2, dtype=dtype)
        assert widened(x) is x


def test_positive_int():
    assert require_positive_int("r", 3) == 3
    for bad in (True, 2.0, "2", None):
        with pytest.raises(TypeError, match="r must be an int"):
            require_positive_int("r", bad)
    for bad in (0, -1):
        with pytest.raises(ValueError, match=f"r must be at least 1, got {bad}"):
            require_positive_int("r", bad)


def test_number():
    assert require_number("alpha", 3) == 3.0
    assert isinstance(require_number("alpha", numpy.float32(0.5)), float)
    for bad in (True, "2", None, torch.tensor(1.0)):
        with pytest.raises(TypeError, match="alpha must be a number"):
            require_number("alpha", bad)
    for bad in (math.nan, math.inf):
        with pytest.raises(ValueError, match="alpha must be finite"):
            require_number("alpha", bad)
