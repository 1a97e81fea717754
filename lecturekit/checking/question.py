"""Questions: seeded cases, an oracle, laws, and the misconceptions that people really have, as code."""

from __future__ import annotations

import importlib
import inspect
import pkgutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lecturekit.checking.attempt import HOPELESS, Attempt, Driver, Unfit, attempt, call
from lecturekit.checking.case import Case, Draw
from lecturekit.checking.compare import EXACT, Difference, Magnitude, Tolerance, compare, describe
from lecturekit.checking.verdict import Verdict
from lecturekit.checking.words import clean, said

__all__ = ["Attempt", "Driver", "Question", "Unfit", "call", "evaluate", "get", "question", "questions"]


@dataclass(frozen=True)
class Misconception:
    """A wrong answer that people really give. ``candidate`` is that answer, as code."""

    name: str
    hint: str
    candidate: Any


@dataclass(frozen=True)
class Law:
    """A property of every right answer. holds(case, parts) → True, False, or None where it does not apply."""

    statement: str
    holds: Callable[[Case, dict[str, Any]], bool | None]


@dataclass(frozen=True)
class _Trial:
    """A case, what the candidate made of it, and what was expected."""

    case: Case
    attempt: Attempt
    expected: dict[str, Any]


@dataclass(frozen=True)
class _Fault:
    """Why one trial is not right."""

    kind: str
    message: str
    difference: Difference | None = None


class Question:
    """One graded question. Made by the ``question`` decorator; the decorated function draws a case."""

    def __init__(
        self,
        id: str,
        draw: Callable[[Draw], Case],
        *,
        lab: str,
        points: float,
        slide: str,
        kind: str = "function",
        cases: int = 6,
        seconds: float = 10.0,
        returns: tuple[str, ...] = ("result",),
        needs_gpu: bool = False,
    ) -> None:
        self.id, self.lab, self.points, self.slide = id, lab, points, slide
        self.kind, self.cases, self.seconds, self.returns = kind, cases, seconds, returns
        self.needs_gpu = needs_gpu
        self.title = inspect.getdoc(draw) or id
        self.misconceptions: list[Misconception] = []
        self.laws: list[Law] = []
        self.alternatives: dict[str, Any] = {}
        self._draw = draw
        self._driver: Driver = call
        self._oracle = ""
        self._tolerances: dict[str | None, Tolerance] = {}

    def __repr__(self) -> str:
        return f"Question({self.id!r}, lab={self.lab!r}, points={self.points})"

    # Declaring a question

    def oracle(self, name: str) -> None:
        """Name the right answer as ``module:attribute``; it is imported only when somebody judges."""
        self._oracle = name

    def law(self, statement: str, holds: Callable[[Case, dict[str, Any]], bool | None]) -> None:
        """Add a property that every right answer has and that needs no oracle."""
        self.laws.append(Law(statement, holds))

    def tolerance(
        self,
        ulps: float | Callable[[Case], float],
        *,
        why: str,
        magnitude: Magnitude | None = None,
        part: str | None = None,
    ) -> None:
        """How many rounding errors, of what size, a right answer may be off, and why. For one part or for all."""
        self._tolerances[part] = Tolerance(ulps, why, magnitude)

    def driver(self, drive: Driver) -> Driver:
        """Decorator: how to use a class or a training function. drive(candidate, case) → a dict of plain data."""
        self._driver = drive
        return drive

    def misconception(self, name: str, *, hint: str) -> Callable[[Any], Any]:
        """Decorator: a wrong answer, its name in plain words, and a hint that leads without giving the answer."""

        def add(candidate: Any) -> Any:
            self.misconceptions.append(Misconception(name, hint, candidate))
            return candidate

        return add

    def alternative(self, name: str) -> Callable[[Any], Any]:
        """Decorator: a right answer written in another way. It must pass."""

        def add(candidate: Any) -> Any:
            self.alternatives[name] = candidate
            return candidate

        return add

    # Drawing, running, judging: three steps, so that the middle one can happen in another process

    def reference(self) -> Any:
        """The right answer."""
        module, _, attribute = self._oracle.partition(":")
        return getattr(importlib.import_module(module), attribute)

    def draw(self, seed: int | str | bytes, index: int, device: torch.device | str = "cpu") -> Case:
        """The case with this index under this seed."""
        draw = Draw(seed, self.id, index, device)
        case = self._draw(draw)
        case.index, case.seed = index, draw.seed
        return case

    def run(self, candidate: Any, case: Case, seconds: float | None = None) -> Attempt:
        """Let the candidate work on a copy of the case. Never raises for what the candidate does."""
        return attempt(
            candidate,
            case,
            driver=self._driver,
            kind=self.kind,
            seconds=seconds or self.seconds,
            returns=self.returns,
        )

    def judge(self, cases: Sequence[Case], attempts: Sequence[Attempt]) -> Verdict:
        """Compare what came back with the oracle. Only this step knows the right answer."""
        if len(attempts) < len(cases) and all(attempt.done for attempt in attempts):
            raise ValueError(f"{self.id}: {len(cases)} cases but {len(attempts)} attempts")
        trials = [
            _Trial(case, attempt, self._expected(case) if attempt.done else {})
            for case, attempt in zip(cases, attempts, strict=False)
        ]
        faults = [self._fault(trial) for trial in trials]
        right = faults.count(None)
        if right == len(cases):
            return self._verdict(True, "passed", "every case is right", cases, right)
        if attempts[0].failure == "not attempted":
            return self._verdict(False, "not attempted", attempts[0].message, cases, right)
        trial, fault = next((t, f) for t, f in zip(trials, faults, strict=True) if f is not None)
        known = None if fault.kind in ("timeout", "changed input") else self._known_mistake(trials)
        return self._verdict(
            False,
            fault.kind,
            fault.message,
            cases,
            right,
            misconception=known.name if known else None,
            hint=known.hint if known else None,
            case=repr(trial.case),
            first_difference=fault.difference,
            inputs={name: _brief(value) for name, value in trial.case.inputs.items()},
        )

    def pending_on(self, device: torch.device | str) -> bool:
        """Whether this question cannot be judged on this device: it needs a GPU, and there is none."""
        return self.needs_gpu and not (torch.device(device).type == "cuda" and torch.cuda.is_available())

    def pending(self) -> Verdict:
        """The verdict while there is no GPU: neither passed nor failed."""
        return self._verdict(False, "pending", "this question is judged on a machine with a GPU", [], 0)

    # Inside

    def _verdict(
        self, passed: bool, kind: str, message: str, cases: Sequence[Case], right: int, **rest: Any
    ) -> Verdict:
        return Verdict(
            self.id, passed, kind, message, self.points, slide=self.slide, cases=len(cases), right=right, **rest
        )

    def _expected(self, case: Case) -> dict[str, Any]:
        attempt = self.run(self.reference(), case, seconds=60)
        if attempt.parts is None:
            raise RuntimeError(f"the oracle of {self.id} failed on {case}: {attempt.message}")
        return attempt.parts

    def _fault(self, trial: _Trial) -> _Fault | None:
        try:
            return self._look_for_fault(trial)
        except Exception:  # an object of the student's own, which may do anything when it is looked at
            return _Fault("type", "the result cannot be compared with the expected one")

    def _look_for_fault(self, trial: _Trial) -> _Fault | None:
        case, got, expected = trial.case, trial.attempt.parts, trial.expected
        if got is None:
            return _Fault(trial.attempt.failure, trial.attempt.message)
        difference = self._differ(case, expected, got)
        if difference is not None and difference.kind != "value":
            return _Fault(difference.kind, _diagnose(got, difference), difference)
        broken = self._broken_law(case, got)
        law = f"Law broken: {broken}" if broken else ""
        if difference is not None:
            return _Fault("value", "\n".join(filter(None, [_diagnose(got, difference), law])), difference)
        return _Fault("law", law) if law else None

    def _differ(
        self, case: Case, expected: dict[str, Any], got: dict[str, Any], equal_nan: bool = False
    ) -> Difference | None:
        if expected.keys() != got.keys():
            return Difference("type", "result", ", ".join(expected), clean(", ".join(map(said, got))))
        for part, value in expected.items():
            tolerance = self._tolerances.get(part) or self._tolerances.get(None) or EXACT
            difference = compare(value, got[part], case, tolerance, part, equal_nan)
            if difference is not None:
                return difference
        return None

    def _broken_law(self, case: Case, parts: dict[str, Any]) -> str | None:
        for law in self.laws:
            try:
                holds = law.holds(case, parts)
            except Exception:
                holds = False  # the answer is not even of a form that the law can be asked of
            if holds is False:
                return law.statement
        return None

    def _known_mistake(self, trials: Sequence[_Trial]) -> Misconception | None:
        try:
            return next((known for known in self.misconceptions if self._same_mistake(known, trials)), None)
        except Exception:  # as in _fault
            return None

    def _same_mistake(self, known: Misconception, trials: Sequence[_Trial]) -> bool:
        """Does the misconception do exactly what the candidate did, on every case, and is it wrong on one?"""
        wrong_somewhere = False
        for trial in trials:
            case, theirs = trial.case, trial.attempt
            known_attempt = self.run(known.candidate, case)
            if theirs.parts is None or known_attempt.parts is None:
                if theirs.done or known_attempt.done or theirs.failure != known_attempt.failure:
                    return False
                if theirs.message.partition("\n")[0] != known_attempt.message.partition("\n")[0]:
                    return False
                wrong_somewhere = True
                continue
            if self._differ(case, known_attempt.parts, theirs.parts, equal_nan=True) is not None:
                return False
            wrong_somewhere = wrong_somewhere or self._differ(case, trial.expected, known_attempt.parts) is not None
        return wrong_somewhere


_registry: dict[str, Question] = {}


def question(
    id: str,
    *,
    lab: str,
    points: float,
    slide: str,
    kind: str = "function",
    cases: int = 6,
    seconds: float = 10.0,
    returns: tuple[str, ...] = ("result",),
    needs_gpu: bool = False,
) -> Callable[[Callable[[Draw], Case]], Question]:
    """Decorator that turns a case-drawing function into a question and registers it.

    kind: ``function`` or ``class``.  cases: how many are drawn.  seconds: for one case.  returns: the names of the
    values of a function that returns several.  needs_gpu: it is judged on a CUDA device only, and pending elsewhere.
    """

    def make(draw: Callable[[Draw], Case]) -> Question:
        if id in _registry:
            raise ValueError(f"there is already a question {id!r}")
        _registry[id] = Question(
            id,
            draw,
            lab=lab,
            points=points,
            slide=slide,
            kind=kind,
            cases=cases,
            seconds=seconds,
            returns=returns,
            needs_gpu=needs_gpu,
        )
        return _registry[id]

    return make


def questions(lab: str | None = None) -> list[Question]:
    """Every question, or those of one lab, in the order of their ids."""
    package = importlib.import_module("lecturekit.questions")
    for module in pkgutil.iter_modules(package.__path__):
        importlib.import_module(f"lecturekit.questions.{module.name}")
    return [_registry[id] for id in sorted(_registry) if lab in (None, _registry[id].lab)]


def get(question_id: str) -> Question:
    """The question with this id. Raises KeyError that names the ids there are."""
    known = {q.id: q for q in questions()}
    if question_id not in known:
        raise KeyError(f"there is no question {question_id!r}; there are {', '.join(known)}")
    return known[question_id]


def evaluate(
    question_id: str,
    candidate: Any,
    seed: int | str | bytes = 0,
    cases: int | None = None,
    device: torch.device | str = "cpu",
    seconds: float | None = None,
) -> Verdict:
    """Judge a candidate's answer to a question on freshly drawn cases.

    candidate: the function (called positionally) or class.  seed: which cases.  cases: how many, the question's own
    number by default.  device: where the cases are drawn and the results must be; a question that needs a GPU is
    pending on any other than ``cuda``.  seconds: limit for one case.
    Raises KeyError for an unknown question, ValueError for cases < 1 or a CUDA device that is not there; never for
    what the candidate does.
    """
    asked = get(question_id)
    count = asked.cases if cases is None else cases
    if count < 1:
        raise ValueError(f"cases must be at least 1, got {count}")
    if asked.pending_on(device):
        return asked.pending()
    if torch.device(device).type == "cuda" and not torch.cuda.is_available():
        raise ValueError("device is cuda, but torch sees no CUDA device; use device='cpu'")
    drawn = [asked.draw(seed, index, device) for index in range(count)]
    attempts: list[Attempt] = []
    for case in drawn:
        attempts.append(asked.run(candidate, case, seconds))
        if attempts[-1].failure in HOPELESS:
            break
    return asked.judge(drawn, attempts)


def _diagnose(got: dict[str, Any], difference: Difference) -> str:
    """One sentence on what kind of wrong this is."""
    part = difference.where.split("[")[0]
    if isinstance(got.get(part), (bool, str)):
        return f"not so: {part}" if isinstance(got[part], bool) else f"{part} are not the expected ones"
    if difference.kind in ("type", "shape", "dtype", "device"):
        return f"{part} has the wrong {difference.kind}: expected {difference.expected}, got {difference.got}"
    value = got.get(part)
    if isinstance(value, Tensor) and value.numel() > 1:
        flat = value.detach().double().flatten()
        if bool(flat.isnan().all()):
            return f"every value of {part} is NaN"
        if bool((flat == 0).all()):
            return f"every value of {part} is zero"
        if bool((flat == flat[0]).all()):
            return f"every value of {part} is the same number"
    if difference.kind == "nan":
        return f"{part} holds NaN: a division by zero, a logarithm of zero, or an overflow?"
    return f"{part} has wrong values"


def _brief(value: Any) -> str:
    """An input in a few words: its numbers when it is small, else its shape."""
    if isinstance(value, Tensor) and value.numel() > 6:
        return describe(value).removeprefix("a ")
    if isinstance(value, Tensor):
        return (
            f"[{', '.join(f'{number:.5g}' for number in value.flatten().tolist())}]" if value.ndim else f"{value:.5g}"
        )
    text = repr(value)
    return text if len(text) <= 60 else describe(value)
