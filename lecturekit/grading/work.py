"""What travels between coordinator and workers: a job goes out, a graded notebook comes back. Plain data only."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

PASSED, WRONG, PENDING, BY_HAND = "passed", "wrong", "pending", "by hand"


@dataclass(frozen=True)
class Job:
    """One student's staged notebook, to be run and judged.

    notebook: nbgrader's name of it, the file name without .ipynb.   staged: an nbformat 4 notebook as a dict, the
    hidden tests put back.   seed: that of this student's hidden cases.   notes: what staging left out or put back, a
    sentence each.   visible: nbgrader id → what the student sees of a test cell that has hidden tests.
    """

    lab: str
    notebook: str
    student: str
    staged: Mapping[str, Any]
    seed: int
    notes: tuple[str, ...] = ()
    visible: Mapping[str, str] = field(default_factory=dict)

    def to_data(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_data(cls, data: Mapping[str, Any]) -> Job:
        """The opposite of to_data, also after a trip through JSON."""
        return cls(**(dict(data) | {"notes": tuple(data["notes"])}))

    def key(self, grader: str) -> str:
        """What the result depends on, as 64 hexadecimal digits. grader: the fingerprint of the code that grades."""
        parts = [self.lab, self.notebook, self.student, self.staged, self.visible, self.seed, grader]
        return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


@dataclass(frozen=True)
class Mark:
    """What one graded cell earned.

    cell: its nbgrader id.   points: the most it can earn.   score: earned, None while it is pending or for a person
    to give.   status: passed · wrong · pending · by hand (partial credit of a plain test is ``passed`` when all of the
    points were earned, else ``wrong``).   question: the lecturekit question it asks, None for plain asserts.   kind:
    the verdict's kind (``Verdict.kind``; for plain asserts passed · raised · timeout · died).   trusted: judged outside
    the student's process; False for plain asserts, which ran beside the student's code.   text: for the feedback; it
    never holds a hidden input.
    """

    cell: str
    points: float
    score: float | None
    status: str
    question: str | None = None
    kind: str = ""
    misconception: str | None = None
    text: str = ""
    trusted: bool = True


@dataclass(frozen=True)
class Graded:
    """A graded notebook: the staged one with its outputs, a mark for every graded cell, and what a person should see.

    notes: what staging left out or put back.   problems: what went wrong while it ran (a crash, a time limit, output
    cut off), a sentence each, without anything hidden.   seconds: where the time went, by step.   device: the name of
    the GPU it ran on, "" for the CPU.
    """

    lab: str
    notebook: str
    student: str
    executed: Mapping[str, Any]
    marks: tuple[Mark, ...]
    notes: tuple[str, ...] = ()
    problems: tuple[str, ...] = ()
    seconds: Mapping[str, float] = field(default_factory=dict)
    device: str = ""

    @property
    def score(self) -> float:
        """Points earned so far; what is pending or for a person to give counts nothing yet."""
        return sum(mark.score or 0.0 for mark in self.marks)

    def to_data(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_data(cls, data: Mapping[str, Any]) -> Graded:
        """The opposite of to_data, also after a trip through JSON."""
        rest = {name: value for name, value in data.items() if name not in ("marks", "notes", "problems")}
        marks = tuple(Mark(**mark) for mark in data["marks"])
        return cls(**rest, marks=marks, notes=tuple(data["notes"]), problems=tuple(data["problems"]))
