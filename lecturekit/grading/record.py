"""Record what a submission earned: marks into nbgrader's gradebook, notebooks into its autograded folder.

The steps are in such an order that a grader killed at any point and started again comes to the same end: the new folder
is made ready beside the old one, the marks are committed in one transaction, the folders change places, and last of all
a small file notes the key of what was recorded.
"""

from __future__ import annotations

import copy
import json
import logging
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from datetime import datetime
from functools import cached_property
from pathlib import Path
from typing import Any

import nbformat
from nbformat.v4 import new_output
from nbformat.v4.nbjson import writes
from nbgrader import utils
from nbgrader.converters.autograde import Autograde as NbgraderAutograde
from nbgrader.coursedir import CourseDirectory

from lecturekit.grading.clean import clean
from lecturekit.grading.gradebook import Marks, RecordError, course_folder
from lecturekit.grading.intake import TIMESTAMP, read_timestamp
from lecturekit.grading.stage import is_test
from lecturekit.grading.work import PENDING, WRONG, Graded, Mark
from lecturekit.runtime import atomic_write

__all__ = ["PENDING_TEXT", "RecordError", "Recorder", "to_cells"]
PENDING_TEXT = "Not graded yet: needs a GPU"
_log = logging.getLogger(__name__)


class Recorder:
    """Records the submissions of one lab. Use it as a context manager: it keeps the gradebook open for a whole batch.

    markers: the folder that notes what has been recorded, course/journal/recorded by default.   wait: seconds to go on
    trying while another program has the gradebook locked.
    """

    def __init__(self, config: Any, lab: str, markers: Path | None = None, wait: float = 60.0):
        self.lab = lab
        self.coursedir = CourseDirectory(config=config)
        self.markers = (markers or course_folder(self.coursedir) / "journal" / "recorded") / lab
        self._nbgrader = NbgraderAutograde(coursedir=self.coursedir, config=config)
        self._marks = Marks(config, lab, wait, self._nbgrader.create_student)
        self._submissions: dict[str, str] | None = None  # student → id of the submission in the gradebook

    def __enter__(self) -> Recorder:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Let go of the gradebook."""
        self._marks.close()

    def recorded(self, student: str) -> str | None:
        """The key that was recorded for a student, None when nothing was or when it is no longer there."""
        if self._submissions is None:
            self._submissions = self._marks.submissions()
        try:
            marker = json.loads(self._marker(student).read_text())
        except (OSError, ValueError):
            return None
        # the id tells a gradebook that came out of a backup, or was made anew, from the one that was written to
        if not isinstance(marker, dict) or marker.get("submission") != self._submissions.get(student, ""):
            return None
        key = marker.get("key")
        return key if isinstance(key, str) and self._folder(student).is_dir() else None

    def record(self, student: str, folder: Path, graded: Sequence[Graded], key: str) -> None:
        """Record one submission: marks, comments, late penalty, and the notebooks with their outputs.

        folder: what the student handed in.   graded: its notebooks, or some of them (the others keep what they have).
        key: what `recorded` will say. A person's scores, extra credit and comments stay. Raises RecordError.
        """
        executed = {one.notebook: to_cells(one) for one in graded}
        final = self._folder(student)
        try:
            timestamp, _ = read_timestamp(folder)
            new = self._prepare(student, executed, timestamp)
            try:
                self._marker(student).unlink(missing_ok=True)  # from here on it is no longer true
                submission = self._marks.write(student, timestamp, graded, executed)
            except BaseException:
                shutil.rmtree(new, ignore_errors=True)
                raise
            self._exchange(student, new)
            if self.coursedir.groupshared:
                self._nbgrader.set_permissions(self.lab, student)
            atomic_write(self._marker(student), json.dumps({"key": key, "submission": submission}) + "\n")
        except OSError as error:
            raise RecordError(
                f"{student}: {error.filename or final} could not be written ({error.strerror or error}): make room or "
                "give write permission there, then grade again"
            ) from error
        if self._submissions is not None:
            self._submissions[student] = submission

    def _marker(self, student: str) -> Path:
        return self.markers / f"{student}.json"

    # --- the autograded folder ----------------------------------------------------------------------------------------
    def _folder(self, student: str) -> Path:
        return Path(self.coursedir.format_path(self.coursedir.autograded_directory, student, self.lab))

    def _sibling(self, student: str, kind: str) -> Path:
        """A folder beside the autograded one: on the same disk, and its dot hides it from nbgrader's globs."""
        final = self._folder(student)
        return final.with_name(f".{final.name}.{kind}")

    def _prepare(self, student: str, executed: Mapping[str, Any], timestamp: datetime | None) -> Path:
        """Make the folder that will become autograded/<student>/<lab>. Nothing of it stays when it cannot be made."""
        new, old, final = self._sibling(student, "new"), self._sibling(student, "old"), self._folder(student)
        if old.exists() and not final.exists():  # a grader was killed between its two renames
            old.rename(final)
        shutil.rmtree(new, ignore_errors=True)
        mode = int(str(self._nbgrader.permissions), 8)
        try:
            new.mkdir(parents=True)
            for name, content in self._files(final, executed, timestamp):
                path = new / name
                path.parent.mkdir(parents=True, exist_ok=True)
                if isinstance(content, Path):
                    shutil.copyfile(content, path)
                else:
                    path.write_text(content, encoding="utf-8")
                path.chmod(mode)
        except BaseException:
            shutil.rmtree(new, ignore_errors=True)
            raise
        return new

    def _files(
        self, final: Path, executed: Mapping[str, Any], timestamp: datetime | None
    ) -> Iterator[tuple[str, str | Path]]:
        """Names and contents (or where to copy from): notebooks, time stamp, and the lab's own files.

        Files that the student handed in beside the notebooks are not copied; nbgrader would.
        """
        for path in self._own_files:
            yield os.path.relpath(path, self._source), path
        for path in sorted(final.glob("*.ipynb")):
            if path.stem not in executed:
                yield path.name, path
        for name, notebook in executed.items():
            cleaned, notes = clean(notebook, self._trusted)
            for note in notes:
                _log.info("%s: %s", final.parent.name, note)
            yield f"{name}.ipynb", writes(cleaned) + "\n"
        if timestamp is not None:
            yield TIMESTAMP, f"{timestamp:%Y-%m-%d %H:%M:%S.%f} UTC\n"

    def _exchange(self, student: str, new: Path) -> None:
        """Put the new folder in the place of the one there is."""
        old, final = self._sibling(student, "old"), self._folder(student)
        shutil.rmtree(old, ignore_errors=True)
        if final.exists():
            final.rename(old)
        new.rename(final)
        shutil.rmtree(old, ignore_errors=True)

    @property
    def _source(self) -> Path:
        return Path(self.coursedir.format_path(self.coursedir.source_directory, ".", self.lab))

    @cached_property
    def _own_files(self) -> list[Path]:
        """Pictures and data that lie beside the instructor's notebooks, which nbgrader puts into autograded too."""
        return sorted(map(Path, utils.find_all_files(str(self._source), [*self.coursedir.ignore, "*.ipynb"])))

    @cached_property
    def _trusted(self) -> frozenset[str]:
        """The sources of the release's Markdown cells, which may hold HTML of any kind."""
        folder = Path(self.coursedir.format_path(self.coursedir.release_directory, ".", self.lab))
        notebooks = [nbformat.read(path, as_version=4) for path in sorted(folder.glob("*.ipynb"))]
        return frozenset(cell.source for nb in notebooks for cell in nb.cells if cell.cell_type == "markdown")


def to_cells(graded: Graded) -> Any:
    """The executed notebook with each verdict as the output of its test cell, so that both say the same.

    nbgrader's own ``determine_grade`` gets the marks back out of the outputs: an error is no points, a number is that
    many, anything else is all of them. A pending test has text on stderr, which counts as none.
    """
    notebook = nbformat.from_dict(copy.deepcopy(dict(graded.executed)))
    marks = {mark.cell: mark for mark in graded.marks}
    for cell in notebook.cells:
        mark = marks.get(cell.metadata.get("nbgrader", {}).get("grade_id"))
        if mark is not None and is_test(cell):
            cell.outputs = _outputs(mark)
            cell.execution_count = None
    return notebook


def _outputs(mark: Mark) -> list[Any]:
    if mark.status == PENDING:
        rest = "" if mark.text in ("", PENDING_TEXT) else f"\n{mark.text}"
        return [new_output("stream", name="stderr", text=f"{PENDING_TEXT}{rest}\n")]
    score = mark.score or 0.0
    text = mark.text.strip()
    if score > 0 or mark.status != WRONG:
        said = [new_output("stream", name="stdout", text=f"{text}\n")] if text else []
        if score >= mark.points:
            return said
        return [*said, new_output("execute_result", data={"text/plain": repr(float(score))})]
    first, _, rest = (text or "Wrong").partition("\n")
    name = mark.kind if mark.kind.isidentifier() else "Wrong"
    error = new_output("error", ename=name, evalue=first, traceback=[first])
    return [error, *([new_output("stream", name="stdout", text=f"{rest}\n")] if rest.strip() else [])]
