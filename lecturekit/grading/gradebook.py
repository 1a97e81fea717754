"""nbgrader's gradebook.db: where it lies, how to open it, and one submission's marks written as one transaction.

Left out on purpose: nbgrader's own ``update_or_create_…`` methods, ``SaveAutoGrades`` and ``AssignLatePenalties.
preprocess``. Each of them commits by itself, and several times a notebook, so a grader that is killed would leave half
of a submission behind. What they write is written here, by the same rules.
"""

from __future__ import annotations

import math
import sqlite3
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any, TypeVar

from nbgrader import utils
from nbgrader.api import (
    BaseCell,
    Comment,
    Grade,
    Gradebook,
    MissingEntry,
    Student,
    SubmittedAssignment,
    SubmittedNotebook,
)
from nbgrader.coursedir import CourseDirectory
from nbgrader.preprocessors import AssignLatePenalties
from sqlalchemy import select, text
from sqlalchemy.engine import make_url
from sqlalchemy.exc import SQLAlchemyError

from lecturekit.grading.course import put_environment_on_path
from lecturekit.grading.work import BY_HAND, PENDING, Graded, Mark

T = TypeVar("T")
GRADED, COMMENTED = ("GradeCell", "TaskCell"), ("SolutionCell", "TaskCell")


class RecordError(RuntimeError):
    """A submission that could not be recorded, why, and what to do. Nothing of it is half-written."""


def database_file(coursedir: CourseDirectory) -> Path | None:
    """The file that an SQLite gradebook lies in, None for other databases."""
    url = make_url(coursedir.db_url)
    return Path(url.database) if url.get_backend_name() == "sqlite" and url.database else None


def course_folder(coursedir: CourseDirectory) -> Path:
    """Where a course keeps what must not get out, its secret and journal: beside the gradebook, or in root/course."""
    root = Path(coursedir.root)
    database = database_file(coursedir)
    if database is None or database.parent.resolve() == root.resolve():
        return root / "course"
    return database.parent


def open_gradebook(coursedir: CourseDirectory) -> Gradebook:
    """nbgrader's gradebook of a course. Use it as a context manager: it holds connections."""
    put_environment_on_path()  # nbgrader starts alembic by its bare name when it makes a new gradebook
    return Gradebook(coursedir.db_url, coursedir.course_id)


def is_missing(notebook: Mapping[str, Any]) -> bool:
    """Whether a job's or a graded notebook stands for one that was not handed in."""
    marks = (notebook.get("metadata") or {}).get("lecturekit")
    return isinstance(marks, Mapping) and bool(marks.get("missing"))


@dataclass
class Rows:
    """One submitted notebook in the gradebook: its row, and its grades and comments by the name of their cell."""

    notebook: SubmittedNotebook
    grades: dict[str, Grade]
    comments: dict[str, Comment]


class Marks:
    """Writes the marks of one lab. It keeps the gradebook open until `close`.

    wait: seconds to go on trying while another program has the gradebook locked.   create_student: whether students who
    are not in the gradebook are added.
    """

    def __init__(self, config: Any, lab: str, wait: float, create_student: bool):
        self.lab = lab
        self.coursedir = CourseDirectory(config=config)
        self.wait = wait
        self.create_student = create_student
        self._penalties = AssignLatePenalties(config=config)
        self._penalties.init_plugin()
        self._gradebook: Gradebook | None = None

    @property
    def gradebook(self) -> Gradebook:
        if self._gradebook is None:
            self._gradebook = open_gradebook(self.coursedir)
        return self._gradebook

    def close(self) -> None:
        if self._gradebook is not None:
            self._gradebook.close()
            self._gradebook = None

    def submissions(self) -> dict[str, str]:
        """{student: id of the submission} of all who have one. Raises RecordError."""

        def read() -> dict[str, str]:
            assignment = self.gradebook.find_assignment(self.lab)
            query = select(SubmittedAssignment.student_id, SubmittedAssignment.id)
            found = self.gradebook.db.execute(query.filter_by(assignment_id=assignment.id)).all()
            self.gradebook.db.remove()
            return {row.student_id: row.id for row in found}

        return self._retried(read)

    def write(
        self, student: str, timestamp: datetime | None, graded: Sequence[Graded], executed: Mapping[str, Any]
    ) -> str:
        """Write all marks of one submission, or none. Returns the id of the submission. Raises RecordError.

        executed: {notebook: what was run}, its cells with nbgrader's metadata and checksums.
        """
        return self._retried(lambda: self._transaction(student, timestamp, graded, executed))

    def _retried(self, step: Callable[[], T]) -> T:
        """Do a step, again and again while another program has the gradebook locked."""
        deadline = time.monotonic() + self.wait
        pause = 0.02
        while True:
            try:
                return step()
            except MissingEntry as error:
                raise RecordError(f"{error}: run `lecturekit release {self.lab}` first") from error
            except (SQLAlchemyError, sqlite3.Error) as error:
                said = str(getattr(error, "orig", None) or error).splitlines()[0]
                if "locked" not in said or time.monotonic() >= deadline:
                    raise RecordError(reason(self.coursedir.db_url, said)) from error
                time.sleep(min(pause, max(0.0, deadline - time.monotonic())))
                pause = min(2 * pause, 1.0)

    def _transaction(
        self, student: str, timestamp: datetime | None, graded: Sequence[Graded], executed: Mapping[str, Any]
    ) -> str:
        db = self.gradebook.db
        try:
            if db.get_bind().dialect.name == "sqlite":
                # the lock is taken now and not at the first change, so that nobody writes between our reading and it
                db.execute(text(f"PRAGMA busy_timeout = {int(1000 * min(self.wait, 5.0))}"))
                db.execute(text("BEGIN IMMEDIATE"))
            submission, rows = self._rows(student)
            if timestamp is not None:
                submission.timestamp = timestamp
            for one in graded:
                if one.notebook not in rows:
                    raise RecordError(f"{student}: notebook {one.notebook} is not in the gradebook: release it first")
                _save(one, executed[one.notebook], rows[one.notebook])
            db.flush()
            for one in graded:
                self._penalize(submission, rows[one.notebook].notebook)
            identity = str(submission.id)
            db.commit()
            return identity
        except BaseException:
            db.rollback()
            raise
        finally:
            db.remove()  # nothing is kept between students, so memory stays flat

    def _rows(self, student: str) -> tuple[SubmittedAssignment, dict[str, Rows]]:
        """A student's submission and the rows of its notebooks; those that are not there are made.

        As nbgrader's add_submission does, and also for what was added to the lab after the student's first grading.
        """
        db = self.gradebook.db
        assignment = self.gradebook.find_assignment(self.lab)
        if db.get(Student, student) is None:
            if not self.create_student:
                raise RecordError(f"No student with ID '{student}' exists in the database")
            db.add(Student(id=student))
        query = select(SubmittedAssignment).filter_by(assignment_id=assignment.id, student_id=student)
        submission = db.scalars(query).one_or_none()
        if submission is None:
            submission = SubmittedAssignment(assignment_id=assignment.id, student_id=student)
            db.add(submission)
            db.flush()  # gives it its id
        rows = {}
        for notebook in assignment.notebooks:
            # both columns at once, here and in _completed: that is the index there is, else the whole class is read
            query = select(SubmittedNotebook).filter_by(notebook_id=notebook.id, assignment_id=submission.id)
            row = db.scalars(query).one_or_none()
            if row is None:
                row = SubmittedNotebook(notebook_id=notebook.id, assignment_id=submission.id)
                db.add(row)
                db.flush()
            # columns only: as objects, each cell would be a query of its own
            query = select(BaseCell.id, BaseCell.name, BaseCell.type).where(BaseCell.notebook_id == notebook.id)
            cells = db.execute(query).all()
            rows[notebook.name] = Rows(
                row,
                _completed(db, Grade, row, {cell: name for cell, name, kind in cells if kind in GRADED}),
                _completed(db, Comment, row, {cell: name for cell, name, kind in cells if kind in COMMENTED}),
            )
        return submission, rows

    def _penalize(self, submission: SubmittedAssignment, row: SubmittedNotebook) -> None:
        """Let nbgrader's late submission plugin decide, as its AssignLatePenalties does after a notebook is graded."""
        if not self._penalties.enabled:
            return
        penalty = None
        late = submission.total_seconds_late
        if late > 0:
            self.gradebook.db.refresh(row, ["score"])
            penalty = self._penalties.plugin_inst.late_submission_penalty(submission.student_id, row.score, late)
            if penalty is not None:
                penalty = self._penalties._check_late_penalty(row, penalty)
        row.late_submission_penalty = penalty


def reason(url: str, said: str) -> str:
    """Why a gradebook could not be used, from what the database said, and what to do about it."""
    if "locked" in said:
        return (
            f"{url} is locked ({said}): another program is writing to it, such as a second grader, formgrader or a "
            "database browser; close it, then try again"
        )
    if "full" in said or "I/O" in said or "readonly" in said:
        return f"{url} could not be written ({said}): make room or give write permission there, then try again"
    return f"{url} refused ({said}): if nbgrader was upgraded, back it up and run `nbgrader db upgrade`"


def _completed(db: Any, kind: Any, row: SubmittedNotebook, cells: dict[str, str]) -> dict[str, Any]:
    """{cell name: its Grade or Comment}, made where there is none yet. cells: {id: name}."""
    query = select(kind).where(kind.cell_id.in_(cells), kind.notebook_id == row.id)
    found = {one.cell_id: one for one in db.scalars(query)}
    for cell in cells.keys() - found.keys():
        found[cell] = kind(cell_id=cell, notebook_id=row.id)
        db.add(found[cell])
    return {name: found[cell] for cell, name in cells.items()}


def _save(graded: Graded, notebook: Any, rows: Rows) -> None:
    """Put marks and comments into the rows, by the rules of nbgrader's SaveAutoGrades."""
    missing = is_missing(notebook)
    marks = {mark.cell: mark for mark in graded.marks}
    cells = {cell.metadata.nbgrader.grade_id: cell for cell in notebook.cells if "nbgrader" in cell.metadata}
    tasks = {name for name, cell in cells.items() if utils.is_task(cell)}  # a person grades them; no mark is needed
    if odd := (rows.grades.keys() - tasks) ^ (marks.keys() - tasks):
        raise RecordError(
            f"{graded.student}: marks and gradebook do not agree on {', '.join(sorted(odd))} of {graded.notebook}: "
            "was the lab released again meanwhile? Then grade again"
        )
    for name, grade in rows.grades.items():
        if missing:
            grade.auto_score, grade.needs_manual_grade = 0.0, False
        elif name in marks:
            grade.auto_score = _score(graded, marks[name], cells[name])
            grade.needs_manual_grade = grade.manual_score is not None or grade.auto_score is None
    for name, comment in rows.comments.items():
        cell = cells.get(name)
        if not missing and cell is not None:
            same = cell.metadata.nbgrader.get("checksum") == utils.compute_checksum(cell)
            comment.auto_comment = "No response." if same and not utils.is_task(cell) else None


def _score(graded: Graded, mark: Mark, cell: Any) -> float | None:
    """nbgrader's auto_score, None where a person is to look at it. Raises RecordError for a score that cannot be."""
    if mark.status == PENDING:
        return None
    if mark.score is None:
        # an answer nobody wrote is worth nothing, so that nobody has to look at it
        return utils.determine_grade(cell)[0] if mark.status == BY_HAND and utils.is_grade(cell) else None
    points = float(cell.metadata.nbgrader["points"])
    if not (math.isfinite(mark.score) and 0 <= mark.score <= points):
        raise RecordError(f"{graded.student}: {mark.score} points for {mark.cell}, which is worth {points:g}")
    return float(mark.score)
