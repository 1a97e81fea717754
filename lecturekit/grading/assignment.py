"""One lab of a course as nbgrader has it: its notebooks with their hidden tests, who handed in, and the jobs to run.

nbgrader's gradebook is the truth: which notebooks there are, what their locked cells hold, how many points they are
worth. Works for any nbgrader course, whatever its directories are called and however many notebooks an assignment has.
"""

from __future__ import annotations

import copy
import hashlib
import json
import logging
import re
from collections.abc import Iterable, Sequence
from fnmatch import fnmatchcase
from functools import cached_property
from pathlib import Path
from typing import Any

import nbformat
from nbformat.v4 import new_markdown_cell
from nbgrader import utils
from nbgrader.api import MissingEntry
from nbgrader.coursedir import CourseDirectory
from nbgrader.nbgraderformat import MetadataValidator, SchemaTooNewError, SchemaTooOldError, ValidationError
from nbgrader.preprocessors import OverwriteCells, OverwriteKernelspec
from sqlalchemy.exc import SQLAlchemyError

from lecturekit.grading.clean import is_safe_id
from lecturekit.grading.course import student_seed
from lecturekit.grading.gradebook import course_folder, database_file, is_missing, open_gradebook, reason
from lecturekit.grading.intake import read_submission, read_timestamp, shown
from lecturekit.grading.stage import is_test, stage
from lecturekit.grading.work import WRONG, Graded, Job, Mark

__all__ = ["Assignment", "is_missing", "zero"]
_quiet = logging.getLogger("lecturekit.grading.quiet")  # OverwriteCells warns of each hidden test it puts back
_quiet.addHandler(logging.NullHandler())
_quiet.propagate = False


class Assignment:
    """A released lab of the course that `config` describes (traitlets' Config, as `course.settings` reads it).

    Where the config names no root, the course is the current folder, as for nbgrader itself. Raises LookupError when
    the lab is not in the gradebook or not released.
    """

    def __init__(self, config: Any, lab: str):
        self.lab = lab
        self.coursedir = CourseDirectory(config=config)
        self.root = Path(self.coursedir.root)
        self.course = course_folder(self.coursedir)
        self.skipped: dict[str, str] = {}  # folder name → why it is none of the submissions
        self._releases, self.frames = self._read()

    @property
    def notebooks(self) -> list[str]:
        """The names of the lab's notebooks, sorted."""
        return list(self.frames)

    @cached_property
    def grade_ids(self) -> dict[str, frozenset[str]]:
        """For each notebook the nbgrader ids in it."""
        return {
            name: frozenset(cell.metadata.nbgrader.grade_id for cell in frame.cells if _named(cell))
            for name, frame in self.frames.items()
        }

    @property
    def private(self) -> list[Path]:
        """What no student's code may see: this course's gradebook, secret, sources, submissions, marks and feedback."""
        steps = ("source", "source_with_tests", "solution", "submitted", "autograded", "feedback")
        folders = [getattr(self.coursedir, f"{step}_directory") for step in steps]
        database = database_file(self.coursedir)
        paths = [self.course, *([database] if database else []), *(self.root / folder for folder in folders)]
        return sorted({path.absolute() for path in paths})

    # --- submissions -------------------------------------------------------------------------------------------------
    def submissions(self, students: Iterable[str] | None = None) -> dict[str, Path]:
        """{student: the folder handed in}, sorted, for the students named (ids, or globs such as ``b*``) or for all.

        Folders count, whatever is in them, but for students whom nbgrader's student_id_exclude names. Links are not
        followed. `skipped` then says which folders were left out: links, and ids that a student cannot have.
        """
        wanted = None if students is None else list(students)
        found: dict[str, Path] = {}
        self.skipped = {}
        excluded = self.coursedir.student_id_exclude.split(",")
        for student, top in self._candidates():
            if student in excluded or not _matches(student, wanted):
                continue
            path = Path(self.coursedir.format_path(self.coursedir.submitted_directory, student, self.lab))
            if not is_safe_id(student):
                self.skipped[student] = (
                    f"{shown(student)}: no student's id: letters, digits and . _ @ + -, at most 128; rename the folder"
                )
            elif _has_link(top, path):
                self.skipped[student] = f"{shown(student)}: the submission is reached through a link, which is refused"
            elif path.is_dir():
                found[student] = path
        return dict(sorted(found.items()))

    def jobs(self, student: str, folder: Path) -> list[Job]:
        """What there is to grade in one submission: a job for each notebook of the lab.

        A notebook that was not handed in gives a job of the untouched release, for which `is_missing` is true: it
        earns nothing, whatever its tests would say, so `zero` is enough to grade it.
        """
        seed = student_seed(self.course, student, self.lab)
        _, late_note = read_timestamp(folder)
        jobs: list[Job] = []
        for name, release in self._releases.items():
            others = [other for other in self.notebooks if other != name]
            submission = read_submission(folder, name, grade_ids=self.grade_ids[name], others=others)
            notes = [*submission.notes, *([late_note] if late_note and not jobs else [])]
            if submission.file:
                staged = stage(submission.notebook, release, notes)
                notebook, notes = staged.notebook, staged.notes
            else:
                notebook = _not_handed_in(release, notes)
            visible = {cell.metadata.nbgrader.grade_id: cell.source for cell in release.cells if is_test(cell)}
            self._put_back(notebook, self.frames[name])
            jobs.append(Job(self.lab, name, student, notebook, seed, tuple(notes), visible))
        return jobs

    def key(self, jobs: Sequence[Job], folder: Path, grader: str) -> str:
        """What one submission's marks depend on: its jobs, when it was handed in, and the code that grades."""
        parts = [*(job.key(grader) for job in jobs), str(read_timestamp(folder)[0])]
        return hashlib.sha256(json.dumps(parts).encode()).hexdigest()

    # --- how it is found ---------------------------------------------------------------------------------------------
    def _read(self) -> tuple[dict[str, Any], dict[str, Any]]:
        """The notebooks as released, and the same with all that nbgrader puts back before it grades."""
        remedy = f"run `lecturekit release {self.lab}` (or nbgrader generate_assignment) first"
        database = database_file(self.coursedir)
        if database is not None and not database.exists():
            raise LookupError(f"there is no gradebook at {database}: {remedy}")
        try:
            with open_gradebook(self.coursedir) as gradebook:
                cells = {
                    notebook.name: {cell.name for cell in [*notebook.grade_cells, *notebook.task_cells]}
                    for notebook in gradebook.find_assignment(self.lab).notebooks
                }
        except MissingEntry:
            raise LookupError(f"{self.lab} is not in the gradebook: {remedy}") from None
        except SQLAlchemyError as error:
            said = str(getattr(error, "orig", None) or error).splitlines()[0]
            raise LookupError(reason(self.coursedir.db_url, said)) from error
        if not cells:
            raise LookupError(f"{self.lab} has no notebooks in the gradebook: {remedy}")
        folder = Path(self.coursedir.format_path(self.coursedir.release_directory, ".", self.lab))
        releases, frames = {}, {}
        for name in sorted(cells):
            path = folder / f"{name}.ipynb"
            if not path.exists():
                raise LookupError(f"{path} is missing: {remedy}")
            releases[name] = nbformat.read(path, as_version=4)
            frames[name] = self._frame(releases[name], name, cells[name], f"{path} is not what the gradebook holds")
        return releases, frames

    def _frame(self, release: Any, name: str, graded: set[str], trouble: str) -> Any:
        """The release with nbgrader's own corrections. Raises LookupError when gradebook and release do not match."""
        remedy = f"run `lecturekit release {self.lab}` (or nbgrader generate_assignment --force) again"
        resources = {"nbgrader": {"notebook": name, "assignment": self.lab, "db_url": self.coursedir.db_url}}
        before = {cell.metadata.nbgrader.grade_id for cell in release.cells if _named(cell)}
        frame = copy.deepcopy(release)
        try:
            for overwrite in (OverwriteKernelspec, OverwriteCells):
                frame, _ = overwrite(log=_quiet).preprocess(frame, resources)
            MetadataValidator().validate_nb(frame)
        except (SchemaTooOldError, SchemaTooNewError, ValidationError, KeyError, RuntimeError) as error:
            raise LookupError(f"{trouble} ({error}): {remedy}") from error
        after = {cell.metadata.nbgrader.grade_id for cell in frame.cells if _named(cell)}
        if before != after or not graded <= after:
            odd = ", ".join(sorted((before - after) | (graded - after)))
            raise LookupError(f"{trouble} (cells {odd}): {remedy}")
        return frame

    def _candidates(self) -> list[tuple[str, Path]]:
        """Every name that stands where nbgrader's directory structure has a student's, and the folder it stands in."""
        parts = Path(self.coursedir.format_path(self.coursedir.submitted_directory, "\0", self.lab)).parts
        place = next(index for index, part in enumerate(parts) if "\0" in part)
        top = Path(*parts[:place])
        pattern = re.compile(re.escape(parts[place]).replace(re.escape("\0"), "(.+)", 1), re.DOTALL)
        try:
            names = sorted(entry.name for entry in top.iterdir())
        except (FileNotFoundError, NotADirectoryError):
            return []
        return [(found[1], top) for found in map(pattern.fullmatch, names) if found and not found[1].startswith(".")]

    @staticmethod
    def _put_back(notebook: Any, frame: Any) -> None:
        """Give each cell of the release nbgrader's metadata, and if it is locked its source with the hidden tests."""
        trusted = {cell.metadata.nbgrader.grade_id: cell for cell in frame.cells if _named(cell)}
        for cell in notebook.cells:
            if _named(cell):
                original = trusted[cell.metadata.nbgrader.grade_id]
                cell.metadata = copy.deepcopy(original.metadata)
                if utils.is_locked(original):
                    cell.source = original.source
        if "kernelspec" in frame.metadata:
            notebook.metadata["kernelspec"] = copy.deepcopy(frame.metadata["kernelspec"])


def zero(job: Job) -> Graded:
    """The result of a job whose notebook was not handed in, without running it: no points, nothing left to grade."""
    marks = tuple(
        Mark(name, float(cell["metadata"]["nbgrader"]["points"]), 0.0, WRONG, kind="missing", text="Not handed in.")
        for cell in job.staged["cells"]
        if (name := cell["metadata"].get("nbgrader", {}).get("grade_id"))
        and (cell["metadata"]["nbgrader"].get("grade") or cell["metadata"]["nbgrader"].get("task"))
    )
    return Graded(job.lab, job.notebook, job.student, job.staged, marks, job.notes)


def _matches(student: str, wanted: list[str] | None) -> bool:
    return wanted is None or any(fnmatchcase(student, pattern) for pattern in wanted)


def _named(cell: Any) -> bool:
    return "nbgrader" in cell.metadata and "grade_id" in cell.metadata.nbgrader


def _has_link(top: Path, path: Path) -> bool:
    """Whether any folder of `path` below `top` is a link."""
    here = top
    for part in path.relative_to(top).parts:
        here = here / part
        if here.is_symlink():
            return True
    return False


def _not_handed_in(release: Any, notes: list[str]) -> Any:
    """The untouched release, marked as one that earns nothing, with the reasons on top for the student."""
    notebook = copy.deepcopy(release)
    notebook.metadata["lecturekit"] = {"staging": list(notes), "missing": True}
    reasons = "\n".join(f"- {note}" for note in notes)
    text = f"**About your submission.** It could not be graded, and earns no points:\n\n{reasons}"
    notebook.cells.insert(0, new_markdown_cell(text, id="about-your-submission"))
    return notebook
