"""Let a candidate work on a case: the one step of judging that runs a student's code, and needs no right answer.

It may happen in another process than the rest, so this module imports nothing that holds a question or an oracle.
"""

from __future__ import annotations

import inspect
import random
import traceback
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy
import torch

from lecturekit.checking.case import Case
from lecturekit.checking.compare import EXACT, compare, describe
from lecturekit.checking.limits import TimeUp, time_limit
from lecturekit.checking.words import class_name, said
from lecturekit.runtime import seed_everything

Driver = Callable[[Any, Case], Any]

FAILURES = ("not attempted", "unfit", "raised", "timeout", "changed input", "type")
HOPELESS = ("not attempted", "timeout")
"""Failures after which the other cases would say the same, slowly."""


class Unfit(Exception):
    """Raised by a driver when a candidate cannot be used as the question asks; the message is shown to the student."""


@dataclass(frozen=True)
class Attempt:
    """What one candidate did with one case: the parts of its result, or how it failed (one of FAILURES)."""

    parts: dict[str, Any] | None = None
    failure: str = ""
    message: str = ""

    @property
    def done(self) -> bool:
        return self.parts is not None


def call(candidate: Any, case: Case) -> Any:
    """The driver of a plain function: call it with the inputs, in their order."""
    return candidate(*case.inputs.values())


def attempt(
    candidate: Any,
    case: Case,
    *,
    driver: Driver = call,
    kind: str = "function",
    seconds: float = 10.0,
    returns: tuple[str, ...] = ("result",),
) -> Attempt:
    """Let the candidate work on a copy of the case. Never raises for what the candidate does.

    kind: ``function`` or ``class``.  seconds: the time limit, which also covers what an exception of the candidate's
    says of itself.  returns: the names of the values of a function that returns several.
    """
    own = case.copy()
    try:
        with _own_random_numbers(case.seed), time_limit(seconds), torch.enable_grad():
            return _attempt(candidate, case, own, driver, kind, returns)
    except TimeUp:
        return Attempt(failure="timeout", message=f"no answer within {seconds:g} seconds: a loop without an end?")


def answer(candidate: Any, request: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Work on every case of a request of ``lecturekit.grading.judge``; the reply as it expects it, one dict a case."""
    drive = load_driver(request["driver"]) if request["driver"] else call
    reply: list[dict[str, Any]] = []
    for drawn in request["cases"]:
        case = Case(drawn["label"], **drawn["inputs"])
        case.index, case.seed = drawn["index"], drawn["seed"]
        made = attempt(
            candidate,
            case,
            driver=drive,
            kind=request["kind"],
            seconds=request["seconds"],
            returns=tuple(request["returns"]),
        )
        reply.append({"parts": made.parts, "failure": made.failure, "message": made.message})
        if made.failure in HOPELESS:
            break
    return reply


def load_driver(source: str) -> Driver:
    """The function ``driver`` of a module text, as ``lecturekit.grading.excerpt.driver_source`` makes it."""
    namespace: dict[str, Any] = {"__name__": __name__}
    # the file name keeps the driver's own lines out of what a student is told of an error
    exec(compile(source, "<lecturekit driver>", "exec", dont_inherit=True), namespace)
    return namespace["driver"]


def _attempt(candidate: Any, case: Case, own: Case, driver: Driver, kind: str, returns: tuple[str, ...]) -> Attempt:
    try:
        if kind == "class" and not inspect.isclass(candidate):
            return Attempt(failure="unfit", message=f"expected a class, got {describe(candidate)}")
        if not callable(candidate):
            return Attempt(failure="unfit", message=f"expected a {kind}, got {describe(candidate)}")
        result = driver(candidate, own)
        for name in case.inputs:
            if compare(case.inputs[name], own.inputs[name], case, EXACT, name, equal_nan=True) is not None:
                message = (
                    f"the input {name} was changed in place; work on a copy, or use operations that return a new tensor"
                )
                return Attempt(failure="changed input", message=message)
        return _parts(result, driver, returns)
    except (TimeUp, KeyboardInterrupt):
        raise
    except Unfit as error:
        return Attempt(failure="unfit", message=said(error))
    except NotImplementedError as error:
        if said(error):  # a stub raises it bare; torch says what is not implemented, a missing forward for one
            return Attempt(failure="raised", message=_explain(error))
        return Attempt(
            failure="not attempted",
            message="the stub is still there: replace it by your own code, then run both cells again",
        )
    except BaseException as error:  # SystemExit, and classes of the student's own
        return Attempt(failure="raised", message=_explain(error))


def _parts(result: Any, driver: Driver, returns: tuple[str, ...]) -> Attempt:
    if isinstance(result, dict) and driver is not call:
        return Attempt(parts=result)
    if result is None:
        return Attempt(failure="type", message="the result is None: is a return statement missing?")
    if len(returns) == 1:
        return Attempt(parts={returns[0]: result})
    if not isinstance(result, (tuple, list)) or len(result) != len(returns):
        message = f"expected {len(returns)} values ({', '.join(returns)}), got {describe(result)}"
        return Attempt(failure="type", message=message)
    return Attempt(parts=dict(zip(returns, result, strict=True)))


def _explain(error: BaseException) -> str:
    """The exception and the last line of the student's own code that it came through."""
    text = f"{class_name(error)}: {said(error)}".strip().rstrip(":")
    try:
        frames = [f for f in traceback.extract_tb(error.__traceback__) if "lecturekit" not in f.filename]
        own = [f for f in frames if "ipykernel" in f.filename or f.filename.startswith("<")] or frames
        if own:
            text += f"\nin {own[-1].name}, line {own[-1].lineno}: {said(own[-1].line or '')}".rstrip(": ")
    except Exception:  # the line is looked up through the student's module, which may refuse
        pass
    return text


@contextmanager
def _own_random_numbers(seed: int) -> Iterator[None]:
    """Seeded random numbers inside the block; outside, every generator goes on as if nothing had been drawn."""
    python, numpy_state = random.getstate(), numpy.random.get_state()
    with torch.random.fork_rng():
        seed_everything(seed)
        try:
            yield
        finally:
            random.setstate(python)
            numpy.random.set_state(numpy_state)
