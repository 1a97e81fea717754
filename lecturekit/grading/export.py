"""Marks for Canvas and for Moodle, through `nbgrader export`.

    nbgrader export --exporter lecturekit.grading.export.CanvasExport --to marks.csv
    nbgrader export --exporter lecturekit.grading.export.MoodleExport --to marks.csv --assignment '["lab05_lora"]'

A mark is exported only when it is final: where a person or a GPU is still needed, and where nothing was handed in or
graded, the cell stays empty, and the log says how many. A late penalty is taken off, never below zero.
"""

from __future__ import annotations

import csv
import io
import os
import tempfile
from collections.abc import Sequence
from pathlib import Path

from nbgrader.api import Assignment, Grade, Gradebook, Student, SubmittedAssignment, SubmittedNotebook
from nbgrader.plugins import ExportPlugin
from sqlalchemy import Integer, func
from traitlets import Dict, Unicode

FORMULA = ("=", "+", "-", "@", "\t", "\r", "\n", "＝", "＋", "－", "＠")


def harmless(text: str | None) -> str:
    """A text cell that no spreadsheet takes for a formula.

    Control characters become spaces; a text that begins with = + - @ (also the full-width ones), tab or line end gets
    an apostrophe in front, which spreadsheets read as "this is text".
    """
    text = text or ""
    begins = text.lstrip(" \xa0").startswith(FORMULA)
    clean = "".join(character if character.isprintable() else " " for character in text)
    return f"'{clean}" if begins else clean


def number(points: float) -> str:
    """Points as both systems read them: a decimal point, at most four decimals, no exponent."""
    return f"{points:.4f}".rstrip("0").rstrip(".")


def write(path: str, rows: Sequence[Sequence[str]]) -> None:
    """Write a CSV file whole or not at all, readable by its owner only."""
    text = io.StringIO(newline="")
    csv.writer(text).writerows(rows)
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=target.parent, prefix=f".{target.name}.")  # mkstemp makes it 0600
    try:
        with os.fdopen(handle, "w", encoding="utf-8", newline="") as file:
            file.write(text.getvalue())
        os.replace(temporary, target)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


class _Export(ExportPlugin):
    """What both have in common: whose marks, and which of them are final."""

    def _students(self, gradebook: Gradebook) -> list[Student]:
        wanted = {str(student) for student in self.student}
        return [student for student in gradebook.students if not wanted or student.id in wanted]

    def _assignments(self, gradebook: Gradebook) -> list[Assignment]:
        """Those named, or all. Raises ValueError for a name there is not."""
        there = {assignment.name: assignment for assignment in gradebook.assignments}
        names = [str(name) for name in self.assignment] or sorted(there)
        for name in names:
            if name not in there:
                raise ValueError(f"no assignment {name!r} in the gradebook; there are {', '.join(sorted(there))}")
        return [there[name] for name in names]

    def _marks(self, gradebook: Gradebook, assignment: Assignment, students: Sequence[Student]) -> dict[str, str]:
        """{student: final mark}; what is missing is told in the log."""
        rows = gradebook.db.query(
            SubmittedAssignment.student_id,
            SubmittedAssignment.score,
            SubmittedAssignment.late_submission_penalty,
            SubmittedAssignment.needs_manual_grade,
        ).filter(SubmittedAssignment.assignment_id == assignment.id)
        cells = (
            gradebook.db.query(
                SubmittedAssignment.student_id,
                func.count(Grade.id),
                func.sum((Grade.auto_score.is_(None) & Grade.manual_score.is_(None)).cast(Integer)),
            )
            .join(SubmittedNotebook, Grade.notebook_id == SubmittedNotebook.id)
            .join(SubmittedAssignment, SubmittedNotebook.assignment_id == SubmittedAssignment.id)
            .filter(SubmittedAssignment.assignment_id == assignment.id)
            .group_by(SubmittedAssignment.student_id)
        )
        graded = {student for student, count, without in cells if count and not without}
        marks, waiting = {}, set()
        for student, score, penalty, by_hand in rows:
            if by_hand or student not in graded:
                waiting.add(student)
            else:
                marks[student] = number(max(0.0, score - (penalty or 0.0)))
        chosen = {student.id for student in students}
        if waiting & chosen:
            self.log.warning(
                "%s: %d submissions are not fully graded (a person or a GPU is needed): their marks are left empty",
                assignment.name,
                len(waiting & chosen),
            )
        absent = len(chosen - waiting - set(marks))
        if absent:
            self.log.warning("%s: %d students handed nothing in: their marks are left empty", assignment.name, absent)
        return marks

    def _key(self, text: str | None) -> str:
        """A cell that the other system looks students up by; one that had to be changed is told."""
        made = harmless(text)
        if made != (text or ""):
            self.log.warning("the id %r was changed to %r so that no spreadsheet takes it for a formula", text, made)
        return made


class CanvasExport(_Export):
    """A CSV file for Canvas's Gradebook → Import: one column a lab.

    Canvas finds a student by ID (nbgrader's lms_user_id) or by SIS Login ID (nbgrader's student id). It finds an
    assignment by the number in brackets after its name, which is in the assignment's address; without one it asks.
    """

    assignment_ids = Dict(help="Canvas's number of each lab, for example {'lab05_lora': 1234}").tag(config=True)
    section = Unicode("", help="the section that all students are in").tag(config=True)

    def export(self, gradebook: Gradebook) -> None:
        """Write the file. Raises ValueError for an unknown assignment."""
        students, assignments = self._students(gradebook), self._assignments(gradebook)
        marks = [self._marks(gradebook, assignment, students) for assignment in assignments]
        titles = [
            f"{assignment.name} ({self.assignment_ids[assignment.name]})"
            if assignment.name in self.assignment_ids
            else assignment.name
            for assignment in assignments
        ]
        rows = [["Student", "ID", "SIS User ID", "SIS Login ID", "Section", *map(harmless, titles)]]
        rows.append(["    Points Possible", "", "", "", "", *(number(a.max_score) for a in assignments)])
        for student in students:
            name = ", ".join(filter(None, (student.last_name, student.first_name))) or student.id
            known = [harmless(name), self._key(student.lms_user_id), "", self._key(student.id)]
            rows.append([*known, harmless(self.section), *(column.get(student.id, "") for column in marks)])
        target = self.to or "canvas.csv"
        write(target, rows)
        self.log.info("Wrote %d students and %d assignments to %s", len(students), len(assignments), target)


class MoodleExport(_Export):
    """A CSV file for one Moodle assignment, as its offline grading worksheet.

    Moodle finds a student by Identifier, "Participant 123": 123 is taken from nbgrader's lms_user_id; without one the
    student's id stands there, and the file can be imported under Grades → Import, mapped by id or email address.
    """

    def export(self, gradebook: Gradebook) -> None:
        """Write the file. Raises ValueError for an unknown assignment, or when it is not clear which one."""
        assignments = self._assignments(gradebook)
        if len(assignments) != 1:
            names = ", ".join(assignment.name for assignment in assignments) or "none"
            raise ValueError(
                f"a Moodle worksheet holds one assignment: name it with --assignment '[\"NAME\"]' ({names})"
            )
        (assignment,) = assignments
        students = self._students(gradebook)
        marks = self._marks(gradebook, assignment, students)
        rows = [["Identifier", "Full name", "Email address", "Grade", "Maximum grade", "Feedback comments"]]
        for student in students:
            participant = student.lms_user_id or ""
            key = f"Participant {participant}" if participant.isdecimal() else participant or student.id
            name = " ".join(filter(None, (student.first_name, student.last_name))) or student.id
            mark = marks.get(student.id, "")
            known = [self._key(key), harmless(name), harmless(student.email)]
            rows.append([*known, mark, number(assignment.max_score), ""])
        target = self.to or "moodle.csv"
        write(target, rows)
        self.log.info("Wrote %d students to %s", len(students), target)
