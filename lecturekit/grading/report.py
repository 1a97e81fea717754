"""The instructor's report about a lab: one HTML page that stands alone, made from the results one at a time.

What comes from students is never trusted: the template engine escapes all of it, and control characters are shown as
escapes. Kept of each submission are a few numbers, its sentences and its solutions packed, never a notebook.
"""

from __future__ import annotations

import os
import statistics
import tempfile
import zlib
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import lecturekit.statistics
from lecturekit.grading import report_page
from lecturekit.grading.gradebook import is_missing
from lecturekit.grading.similarity import Alike, Similarity
from lecturekit.grading.work import BY_HAND, PASSED, PENDING, WRONG, Graded, Mark

Manual = Mapping[tuple[str, str, str], float]  # (student, notebook, cell) → points a person gave
EXCERPT = 3_000  # characters of a solution that are shown


@dataclass(frozen=True)
class QuestionText:
    """What the page says of a question. hints: the hint of each misconception, by its name."""

    title: str
    hints: Mapping[str, str] = field(default_factory=dict)


@dataclass
class Item:
    """One graded cell over the class. shares: of its points, one for each submission that has a mark, else None."""

    cell: str
    question: str | None
    points: float
    shares: list[float | None] = field(default_factory=list)
    attempted: int = 0
    passed: int = 0
    judged: int = 0
    waiting: int = 0
    pending: int = 0
    low_trust: int = 0
    mistakes: Counter[str] = field(default_factory=Counter)
    kinds: Counter[str] = field(default_factory=Counter)
    discrimination: float | None = None

    @property
    def interval(self) -> tuple[float, float] | None:
        """The 95 % interval of the share who passed; None where nobody was judged."""
        return wilson(self.passed, self.judged) if self.judged else None


def wilson(right: int, n: int) -> tuple[float, float]:
    """Wilson's 95 % interval of the share right / n."""
    if not 0 <= right <= n or n < 1:
        raise ValueError(f"right must lie between 0 and n ≥ 1, got {right} of {n}")
    return lecturekit.statistics.wilson(right / n, n)


def correlation(first: list[float], second: list[float]) -> float | None:
    """Pearson's correlation, for 0/1 values the point-biserial one; None where one of the two does not vary."""
    if len(first) < 3 or max(first) - min(first) < 1e-9 or max(second) - min(second) < 1e-9:
        return None
    return statistics.correlation(first, second)


class Gathered:
    """What is kept of the results while they pass by."""

    def __init__(self, stubs: Mapping[str, str], manual: Manual) -> None:
        self.students: list[str] = []
        self.scores: list[float] = []  # points earned so far, by submission
        self.open: list[float] = []  # points that are not given yet
        self.missing: list[str] = []
        self.items: dict[str, Item] = {}
        self.eyes: dict[str, list[tuple[str, str]]] = {reason: [] for reason in report_page.REASONS}
        self.seconds: dict[str, list[float]] = defaultdict(list)
        self.devices: Counter[str] = Counter()
        self.similarity = Similarity(stubs)
        self._manual = manual
        self._packed: dict[bytes, bytes] = {}  # packed source, so that equal ones are held once
        self._sources: dict[tuple[str, str], bytes] = {}

    def add(self, graded: Graded) -> None:
        """Take in one result."""
        if is_missing(graded.executed):
            self.missing.append(graded.student)
            return
        number = len(self.students)
        self.students.append(graded.student)
        earned = waiting = 0.0
        low: list[str] = []
        by_hand: list[str] = []
        pending: list[str] = []
        for mark in graded.marks:
            score = self._manual.get((graded.student, graded.notebook, mark.cell), mark.score)
            item = self.items.setdefault(mark.cell, Item(mark.cell, mark.question, mark.points))
            item.shares += [None] * (number - len(item.shares))
            item.shares.append(score / mark.points if score is not None and mark.points else None)
            earned += score or 0.0
            waiting += mark.points if score is None else 0.0
            _count(item, mark, score)
            if mark.status == BY_HAND and score is None:
                by_hand.append(mark.cell)
            elif mark.status == PENDING and score is None:
                pending.append(mark.cell)
            elif not mark.trusted and score:
                low.append(f"{mark.cell} ({score:g})")
        self.scores.append(earned)
        self.open.append(waiting)
        found = {
            "problems": list(graded.problems),
            "dropped": list(graded.notes),
            "pending": [", ".join(pending)] if pending else [],
            "low trust": [", ".join(low)] if low else [],
            "by hand": [", ".join(by_hand)] if by_hand else [],
        }
        for reason, sentences in found.items():
            self.eyes[reason] += [(graded.student, sentence[:500]) for sentence in sentences[:20]]
        for step, seconds in graded.seconds.items():
            self.seconds[step].append(seconds)
        self.devices[graded.device or "CPU"] += 1
        self._solutions(graded)

    def _solutions(self, graded: Graded) -> None:
        for cell in graded.executed.get("cells", ()):
            marks = (cell.get("metadata") or {}).get("nbgrader") or {}
            if cell.get("cell_type") == "code" and marks.get("solution"):
                source = cell.get("source") or ""
                source = "".join(source) if isinstance(source, list) else source
                name = str(marks.get("grade_id"))
                self.similarity.add(graded.student, name, source)
                packed = zlib.compress(source[:EXCERPT].encode("utf-8", "replace"), 1)
                self._sources[graded.student, name] = self._packed.setdefault(packed, packed)

    def source(self, student: str, cell: str) -> str:
        """The beginning of a student's solution."""
        packed = self._sources.get((student, cell))
        return zlib.decompress(packed).decode() if packed else ""

    def discriminate(self) -> None:
        """For each graded cell the correlation of its score with that of all the others together."""
        totals = [0.0] * len(self.students)
        for item in self.items.values():
            item.shares += [None] * (len(self.students) - len(item.shares))
            for number, share in enumerate(item.shares):
                totals[number] += (share or 0.0) * item.points
        for item in self.items.values():
            pairs = [(s, t - s * item.points) for s, t in zip(item.shares, totals, strict=True) if s is not None]
            item.discrimination = correlation([share for share, _ in pairs], [rest for _, rest in pairs])


def _count(item: Item, mark: Mark, score: float | None) -> None:
    item.waiting += mark.status == BY_HAND and score is None
    item.pending += mark.status == PENDING and score is None
    item.low_trust += not mark.trusted
    if mark.status in (PASSED, WRONG):
        item.judged += 1
        item.passed += mark.status == PASSED
        item.attempted += mark.kind != "not attempted"
        if mark.misconception:
            item.mistakes[mark.misconception] += 1
        elif mark.status == WRONG:
            item.kinds[mark.kind or "wrong"] += 1


def build_report(
    lab: str,
    graded: Iterable[Graded],
    questions: Mapping[str, QuestionText] | None = None,
    stubs: Mapping[str, str] | None = None,
    manual: Manual | None = None,
) -> str:
    """The page about one lab.

    graded: the results, read once and not kept.   questions: by id, for titles and hints.   stubs: the released source
    of each solution cell, which is no evidence of copying.   manual: what a person gave, in points.
    """
    gathered = Gathered(stubs or {}, manual or {})
    for result in graded:
        gathered.add(result)
    gathered.discriminate()
    alike = gathered.similarity.alike()
    return report_page.render(
        lab, gathered, questions or {}, [(one, _excerpts(gathered, one)) for one in alike[:100]], len(alike)
    )


def _excerpts(gathered: Gathered, alike: Alike) -> list[tuple[str, float, str, str]]:
    """(cell, share, the one's solution, the other's) for each cell in which the pair is alike."""
    one, other = alike.pair
    return [(cell, share, gathered.source(one, cell), gathered.source(other, cell)) for cell, share in alike.cells]


def write_report(config: Any, lab: str, output: Path | None = None) -> Path:
    """Write the report of a lab from the journal and return its path, course/reports/<lab>.html by default.

    config: the course's settings, as `course.settings` reads them. The file is readable by its owner only, and is
    replaced whole or not at all. Raises FileNotFoundError when nothing of the lab has been graded.
    """
    from nbgrader.coursedir import CourseDirectory

    from lecturekit.grading.gradebook import course_folder
    from lecturekit.grading.journal import Journal

    coursedir = CourseDirectory(config=config)
    folder = course_folder(coursedir)
    results = (graded for _, graded in Journal(folder / "journal").results(lab))
    first = next(results, None)
    if first is None:
        raise FileNotFoundError(f"nothing of {lab} has been graded yet: run `lecturekit grade {lab}` first")

    def everything() -> Iterable[Graded]:
        yield first
        yield from results

    page = build_report(lab, everything(), _questions(lab), _stubs(coursedir, lab), _manual(coursedir, lab))
    path = Path(output) if output else folder / "reports" / f"{lab}.html"
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")  # mkstemp makes it 0600
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            file.write(page)
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise
    return path


def _questions(lab: str) -> dict[str, QuestionText]:
    from lecturekit.checking import questions

    return {
        asked.id: QuestionText(asked.title.splitlines()[0], {m.name: m.hint for m in asked.misconceptions})
        for asked in questions(lab)
    }


def _stubs(coursedir: Any, lab: str) -> dict[str, str]:
    """The released source of every cell that nbgrader knows, by its id."""
    import nbformat

    folder = Path(coursedir.format_path(coursedir.release_directory, ".", lab))
    cells = [cell for path in sorted(folder.glob("*.ipynb")) for cell in nbformat.read(path, as_version=4).cells]
    return {c.metadata.nbgrader.grade_id: c.source for c in cells if "nbgrader" in c.metadata}


def _manual(coursedir: Any, lab: str) -> dict[tuple[str, str, str], float]:
    """What people gave in formgrader. Empty without a gradebook. Raises LabError when it cannot be read."""
    from sqlalchemy.exc import SQLAlchemyError

    from lecturekit.grading.gradebook import database_file, open_gradebook, reason
    from lecturekit.labs import LabError

    file = database_file(coursedir)
    if file is not None and not file.exists():
        return {}
    try:
        with open_gradebook(coursedir) as gradebook:
            return _given(gradebook, lab)
    except SQLAlchemyError as error:
        said = str(getattr(error, "orig", None) or error).splitlines()[0]
        raise LabError(reason(coursedir.db_url, said)) from error


def _given(gradebook: Any, lab: str) -> dict[tuple[str, str, str], float]:
    from nbgrader.api import Assignment, BaseCell, Grade, Notebook, SubmittedAssignment, SubmittedNotebook

    rows = (
        gradebook.db.query(SubmittedAssignment.student_id, Notebook.name, BaseCell.name, Grade.score)
        .select_from(Grade)
        .join(BaseCell, Grade.cell_id == BaseCell.id)
        .join(SubmittedNotebook, Grade.notebook_id == SubmittedNotebook.id)
        .join(Notebook, SubmittedNotebook.notebook_id == Notebook.id)
        .join(SubmittedAssignment, SubmittedNotebook.assignment_id == SubmittedAssignment.id)
        .join(Assignment, SubmittedAssignment.assignment_id == Assignment.id)
        .filter(Assignment.name == lab, Grade.manual_score.isnot(None), Grade.needs_manual_grade.is_(False))
    )
    return {(student, notebook, cell): score for student, notebook, cell, score in rows}
