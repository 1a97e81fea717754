"""Checks of arguments, each raising one sentence that names the argument, what was expected and what came."""

from __future__ import annotations

import math
from numbers import Real
from typing import Any

import torch
from torch import Tensor


def require_tensor(
    name: str,
    value: Any,
    ndim: int | None = None,
    floating: bool = True,
    finite: bool = False,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """Return value if it is a non-empty tensor of the asked kind.

    ndim: the number of dimensions, or None for any. floating: whether the dtype must be a real floating-point one.
    finite: whether NaN and infinity are refused (costs one pass over the data). dtype: one exact dtype, which
    overrides floating. Raises TypeError for a wrong type or dtype, ValueError for a wrong shape or value.
    """
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} must be a torch.Tensor, got {type(value).__name__}")
    if dtype is not None and value.dtype != dtype:
        raise TypeError(f"{name} must have dtype {dtype}, got {value.dtype}")
    if dtype is None and floating and not value.is_floating_point():
        raise TypeError(f"{name} must have a floating-point dtype, got {value.dtype}")
    if ndim is not None and value.ndim != ndim:
        raise ValueError(f"{name} must have {ndim} dimension(s), got shape {tuple(value.shape)}")
    if value.numel() == 0:
        raise ValueError(f"{name} must not be empty, got shape {tuple(value.shape)}")
    if finite and not is_finite(value):
        raise ValueError(f"{name} must be finite, got NaN or infinity in it")
    return value


def require_integers(name: str, value: Any, ndim: int | None = None) -> Tensor:
    """Return value if it is a tensor of integers, not empty and with ndim dimensions if that is asked for.

    Raises TypeError for another type or dtype (float, complex and bool are none), ValueError for a wrong shape.
    """
    require_tensor(name, value, ndim=ndim, floating=False)
    if value.is_floating_point() or value.is_complex() or value.dtype == torch.bool:
        raise TypeError(f"{name} must have an integer dtype, got {value.dtype}")
    return value


def widened(value: Tensor) -> Tensor:
    """value in float32, or as it is if that is wider: logarithms and sums are no work for 8 bits of mantissa."""
    return value.to(torch.promote_types(value.dtype, torch.float32))


def is_finite(value: Tensor) -> bool:
    """Whether no element is NaN or infinite."""
    value = value.detach()
    # A finite sum proves that every term is finite and needs no extra memory; only an overflowing sum needs the masks.
    return bool(torch.isfinite(value.sum())) or bool(torch.isfinite(value).all())


def require_positive_int(name: str, value: Any) -> int:
    """Return value if it is an int of at least 1; TypeError for another type (bool too), ValueError for a small one."""
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name} must be an int, got {type(value).__name__}")
    if value < 1:
        raise ValueError(f"{name} must be at least 1, got {value}")
    return value


def require_number(name: str, value: Any) -> float:
    """Return value as a float if it is a finite real number; TypeError for another type, ValueError for NaN or inf."""
    if isinstance(value, bool) or not isinstance(value, Real):
        raise TypeError(f"{name} must be a number, got {type(value).__name__}")
    if not math.isfinite(value):
        raise ValueError(f"{name} must be finite, got {value}")
    return float(value)
