"""Is this answer the right one? Types, shapes, dtypes and devices first, then values within a derived tolerance."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lecturekit.checking.case import Case, tensors
from lecturekit.checking.words import class_name, clean

Magnitude = Callable[[Case, Tensor], Tensor | float]


@dataclass(frozen=True)
class Opaque:
    """Stands for a value that is not plain data and so did not come over from another process; text says what it was.

    text: as ``describe`` puts it, for example "an ndarray".
    """

    text: str


@dataclass(frozen=True)
class Difference:
    """The first place where an answer is not the expected one.

    kind: type · shape · dtype · device · nan · value     where: for example ``absmax[3]``
    """

    kind: str
    where: str
    expected: str
    got: str
    detail: str = ""

    def __str__(self) -> str:
        text = f"{self.where}: expected {self.expected}, got {self.got}"
        return f"{text} ({self.detail})" if self.detail else text


@dataclass(frozen=True)
class Tolerance:
    """How far a right answer may be from the oracle's: ``ulps`` rounding errors of ``magnitude``.

    A rounding error is the spacing of the coarsest floating dtype in play (see ``precision``), so the same question
    holds in float32, in bfloat16 and under TF32. magnitude defaults to the largest expected absolute value.
    """

    ulps: float | Callable[[Case], float]
    why: str
    magnitude: Magnitude | None = None

    def allowed(self, case: Case, expected: Tensor) -> Tensor:
        """The permitted absolute error, float64, broadcastable to expected."""
        ulps = self.ulps(case) if callable(self.ulps) else self.ulps
        reference = expected.detach().double()
        finite = torch.where(reference.isfinite(), reference, torch.zeros_like(reference)).abs()
        if self.magnitude is not None:
            size = torch.as_tensor(self.magnitude(case, expected), dtype=torch.float64, device=expected.device)
        else:
            size = finite.max() if finite.numel() else finite.sum()
        return ulps * precision(case, expected) * size


def precision(case: Case, expected: Tensor) -> float:
    """The machine epsilon that a right answer may have worked with.

    Matrix products of float32 on a GPU may run in TF32 (10 bits of mantissa) when torch is told so.
    """
    dtypes = {t.dtype for t in [*tensors(case.inputs), expected] if t.is_floating_point()} or {torch.float32}
    eps = max(torch.finfo(dtype).eps for dtype in dtypes)
    if expected.device.type == "cuda" and torch.backends.cuda.matmul.allow_tf32:
        eps = max(eps, 2.0**-10)
    return eps


EXACT = Tolerance(0.0, "no arithmetic is left to rounding")


def compare(
    expected: Any, got: Any, case: Case, tolerance: Tolerance = EXACT, where: str = "result", equal_nan: bool = False
) -> Difference | None:
    """The first difference between two pieces of plain data, or None.

    A 0-dimensional tensor and a Python number are the same thing; a tuple and a list are the same thing.
    equal_nan: NaN in both places counts as equal (used to recognise a misconception that produces NaN).
    """
    if isinstance(expected, Tensor) and isinstance(got, Tensor):
        return _compare_tensors(expected, got, case, tolerance, where, equal_nan)
    if _is_number(expected) and _is_number(got):
        device = next((v.device for v in (expected, got) if isinstance(v, Tensor)), torch.device("cpu"))
        left, right = (_scalar(v, device) for v in (expected, got))
        return _compare_values(left, right, case, tolerance, where, equal_nan)
    if isinstance(expected, Mapping):
        if not isinstance(got, Mapping) or set(got) != set(expected):
            return Difference("type", where, f"a dict with {', '.join(map(repr, expected))}", describe(got))
        pairs = [(f"{where}[{key!r}]", expected[key], got[key]) for key in expected]
    elif isinstance(expected, Sequence) and not isinstance(expected, str):
        if not isinstance(got, Sequence) or isinstance(got, str) or len(got) != len(expected):
            return Difference("type", where, describe(expected), describe(got))
        pairs = [(f"{where}[{i}]", e, g) for i, (e, g) in enumerate(zip(expected, got, strict=True))]
    elif type(expected) is type(got):
        same = expected == got
        return None if same else Difference("value", where, repr(expected), clean(repr(got), 1000))
    else:
        return Difference("type", where, describe(expected), describe(got))
    for place, e, g in pairs:
        difference = compare(e, g, case, tolerance, place, equal_nan)
        if difference is not None:
            return difference
    return None


def describe(value: Any) -> str:
    """A value's kind in a few words, without its numbers."""
    if value is None:
        return "None"
    if isinstance(value, Opaque):
        return value.text
    if isinstance(value, Tensor):
        return f"a tensor {tuple(value.shape)} of {_dtype(value)}"
    if isinstance(value, (list, tuple)):
        return f"a {class_name(value)} of {len(value)}"
    name = class_name(value)
    return f"{'an' if name[0] in 'aeiou' else 'a'} {name}"


def _compare_tensors(
    expected: Tensor, got: Tensor, case: Case, tolerance: Tolerance, where: str, equal_nan: bool
) -> Difference | None:
    if expected.shape != got.shape:
        return Difference("shape", where, f"shape {tuple(expected.shape)}", f"shape {tuple(got.shape)}")
    if expected.dtype != got.dtype:
        return Difference("dtype", where, _dtype(expected), _dtype(got))
    if expected.device != got.device:
        return Difference("device", where, f"a tensor on {expected.device}", f"one on {got.device}")
    return _compare_values(expected.detach(), got.detach(), case, tolerance, where, equal_nan)


def _compare_values(
    expected: Tensor, got: Tensor, case: Case, tolerance: Tolerance, where: str, equal_nan: bool
) -> Difference | None:
    inexact = expected.is_floating_point() or expected.is_complex() or got.is_floating_point()
    if inexact:
        left, right = expected.double(), got.double()
        same = (left == right) | ((left - right).abs() <= tolerance.allowed(case, expected))
        if equal_nan:
            same |= left.isnan() & right.isnan()
    else:
        same = expected == got
    if bool(same.all()):
        return None
    wrong = ~same
    index = tuple(int(i) for i in wrong.nonzero()[0])
    place = f"{where}[{', '.join(map(str, index))}]" if index else where
    expected_value, got_value = expected[index].item(), got[index].item()
    kind = "nan" if isinstance(got_value, float) and math.isnan(got_value) else "value"
    count = int(wrong.sum())
    detail = f"{count} of {wrong.numel()} values differ" if wrong.numel() > 1 else ""
    return Difference(kind, place, _show(expected_value), _show(got_value), detail)


def _is_number(value: Any) -> bool:
    if isinstance(value, Tensor):
        return value.ndim == 0 and not value.is_complex()
    return isinstance(value, (bool, int, float))


def _scalar(value: Any, device: torch.device) -> Tensor:
    """A number as a tensor without dimensions; a whole number beyond int64 becomes an infinity."""
    if isinstance(value, Tensor):
        return value.detach().to(device)
    if isinstance(value, int) and not -(2**63) <= value < 2**63:
        value = math.copysign(math.inf, value > 0 or -1)
    return torch.as_tensor(value, device=device)


def _dtype(tensor: Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")


def _show(value: Any) -> str:
    return f"{value:.7g}" if isinstance(value, float) else str(value)
