"""`nbgrader autograde LAB` and formgrader's Autograde button, graded by this package's coordinator.

`install` puts the class here in the place of nbgrader's; nbgrader_config.py calls it. Names, options and results stay
nbgrader's: the section in the configuration is still ``Autograde``, a failure is still an NbGraderException.
"""

from __future__ import annotations

import asyncio
import copy
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from datetime import datetime
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from nbgrader.apps import api, autogradeapp
from nbgrader.converters import Autograde as NbgraderAutograde
from nbgrader.converters import NbGraderException
from traitlets import Integer

from lecturekit.grading.intake import read_timestamp

T = TypeVar("T")


class Autograde(NbgraderAutograde):
    """nbgrader's Autograde, except that the notebooks are staged, run and judged by `coordinator.grade`.

    A submission that is already graded is skipped unless it, the release or the grader has changed, or with --force.
    nbgrader's preprocessors of this step are not used, nor is what else lies in the submitted folder.
    """

    workers = Integer(0, min=0, help="How many worker processes grade at the same time; 0 grades in this process.").tag(
        config=True
    )

    def start(self) -> None:
        """Grade what student_id and notebook_id match. Raises NbGraderException naming who could not be graded."""
        from lecturekit.labs import LabError  # brings torch, seconds that nbgrader's other commands do without

        config = self._settings()
        if not config.Execute.get("enabled", True):
            raise self._refused("--no-execute: marks come from running the notebooks, so there are none without it")
        self.run_pre_convert_hook()
        try:
            summary = _outside_event_loop(partial(self._grade, config))
        except (LabError, OSError, ValueError) as error:
            raise self._refused(str(error)) from error
        self.run_post_convert_hook()
        self.log.info(summary.table())
        for student, reason in summary.failed.items():
            self.log.error("%s was not graded: %s", student, reason)
        if summary.failed:
            raise NbGraderException(f"not graded: {', '.join(sorted(summary.failed))}; the reasons are above")
        if summary.interrupted:
            raise self._refused("stopped; what is done is kept: start it again to go on")

    def _grade(self, config: Any) -> Any:
        """The coordinator's Summary."""
        from lecturekit.grading.coordinator import grade

        return grade(
            config,
            self.coursedir.assignment_id,
            students=None if self.coursedir.student_id == "*" else [self.coursedir.student_id],
            notebook=self.coursedir.notebook_id,
            force=self.force,
            workers=self.workers,
            log=self.log,
            progress=sys.stderr.isatty(),
        )

    def _settings(self) -> Any:
        """The configuration with what was set on the command line or by formgrader after it had been read."""
        config = copy.deepcopy(self.config)
        for name in self.coursedir.trait_names(config=True):
            config.CourseDirectory[name] = getattr(self.coursedir, name)
        config.Autograde.create_student = self.create_student
        return config

    def _refused(self, message: str) -> NbGraderException:
        self.log.error(message)
        return NbGraderException(message)


def submitted_timestamp(self: api.NbGraderAPI, assignment_id: str, student_id: str) -> datetime | None:
    """NbGraderAPI.get_submitted_timestamp, except that a damaged timestamp.txt does not take formgrader down."""
    coursedir = self.coursedir
    return read_timestamp(Path(coursedir.format_path(coursedir.submitted_directory, student_id, assignment_id)))[0]


def install() -> None:
    """Let nbgrader's command line and its API, which formgrader uses, grade with the class here. Twice is once."""
    autogradeapp.Autograde = Autograde
    api.Autograde = Autograde
    api.NbGraderAPI.get_submitted_timestamp = submitted_timestamp


def _outside_event_loop(work: Callable[[], T]) -> T:
    """Do it where no event loop runs: formgrader calls us inside Jupyter's, in which asyncio.run is an error."""
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return work()
    with ThreadPoolExecutor(1, thread_name_prefix="autograde") as pool:
        return pool.submit(work).result()
