"""A course without nbgrader and a grader without a jail, so that batches are tested in milliseconds.

A submission is a file whose words say what happens when it is graded. Imported by name, in worker processes too: put
this folder on sys.path.
"""

import json
import os
import signal
import time
from pathlib import Path

from lecturekit.grading.work import Graded, Mark

GRADER = "fake_grading:Grader"


class Grader:
    """Does what the job's notebook says; every run leaves a line, which also tells who ran it."""

    alive = 0

    def __init__(self, lab, options, hide=()):
        self.lab, self.options, self.hide = lab, options, hide
        self.closed = False
        if (Path(hide[0]) / "cannot-start").exists():
            raise RuntimeError("bubblewrap is not installed")

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.closed = True

    def grade(self, job):
        assert not self.closed
        staged = job.staged
        runs = Path(staged["runs"])
        before = runs.read_text().count(f"{job.student} ") if runs.exists() else 0
        with runs.open("a") as file:
            file.write(f"{job.student} {os.getpid()}\n")
        match staged["does"].split():
            case ["raise"]:
                raise ZeroDivisionError(f"in {job.student}\x1b[31m")
            case ["raise", "once"] if before == 0:
                raise ZeroDivisionError("once")
            case ["kill"]:
                os.kill(os.getpid(), signal.SIGKILL)
            case ["kill", "once"] if before == 0:
                os.kill(os.getpid(), signal.SIGKILL)
            case ["sleep", seconds]:
                time.sleep(float(seconds))
        gpu = staged["does"] == "gpu" and not self.options.gpu
        mark = Mark("a", 10, None, "pending") if gpu else Mark("a", 10, float(staged["score"]), "passed")
        problems = ("ran out of \x1b[2J memory",) if staged["does"] == "problem" else ()
        seconds = {"run": 0.3, "judge": 0.1}
        return Graded(job.lab, job.notebook, job.student, staged, (mark,), problems=problems, seconds=seconds)


class Assignment:
    """The submissions in <root>/course/submitted/<student>/<lab>/<notebook>.txt: score, then what it does."""

    def __init__(self, config, lab):
        self.lab, self.root = lab, Path(config.CourseDirectory.root)
        if not (self.root / "course").exists():
            raise LookupError(f"{lab} is not in the gradebook")
        self.course = self.root / "course"
        self.skipped = {}
        self.private = [self.course, self.root / "solutions"]

    def submissions(self, students=None):
        found = {path.name: path / self.lab for path in sorted((self.course / "submitted").iterdir())}
        return {student: path for student, path in found.items() if students is None or student in students}

    def jobs(self, student, folder):
        from lecturekit.grading.work import Job

        jobs = []
        for path in sorted(folder.glob("*.txt")):
            score, does = path.read_text().split(" ", 1)
            staged = {"score": score, "does": does, "runs": str(self.course / "runs"), "metadata": {}, "cells": []}
            jobs.append(Job(self.lab, path.stem, student, staged, seed=1))
        if not jobs:
            raise ValueError("unreadable")
        return jobs

    def key(self, jobs, folder, grader):
        return "+".join(job.key(grader) for job in jobs)


class Recorder:
    """Marks in <root>/course/recorded/<student>.json, and a line in records for each time one was written."""

    def __init__(self, config, lab):
        self.course = Path(config.CourseDirectory.root) / "course"
        (self.course / "recorded").mkdir(exist_ok=True)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        pass

    def recorded(self, student):
        try:
            return json.loads((self.course / "recorded" / f"{student}.json").read_text())["key"]
        except FileNotFoundError:
            return None

    def record(self, student, folder, graded, key):
        from lecturekit.runtime import atomic_write

        locked = self.course / "locked"
        if locked.exists():
            left = int(locked.read_text()) - 1
            locked.write_text(str(left)) if left else locked.unlink()
            raise RuntimeError("the gradebook is locked")
        with (self.course / "records").open("a") as file:
            file.write(f"{student}\n")
        content = {"key": key, "score": sum(one.score for one in graded)}
        atomic_write(self.course / "recorded" / f"{student}.json", json.dumps(content))


def install(patch):
    """Use these in place of the real ones. patch: (object, name, value) → None, such as monkeypatch.setattr."""
    from lecturekit.grading import assignment, cluster, record

    patch(assignment, "Assignment", Assignment)
    patch(record, "Recorder", Recorder)
    patch(cluster, "GRADER", GRADER)


class Course:
    """A course folder to put submissions in, and to look into afterwards."""

    def __init__(self, root):
        from traitlets.config import Config

        self.root, self.lab = Path(root), "lab99"
        self.course = self.root / "course"
        self.course.mkdir(parents=True, exist_ok=True)
        self.config = Config()
        self.config.CourseDirectory.root = str(self.root)

    def submit(self, student, does="pass", score=7.0, notebook="one"):
        folder = self.course / "submitted" / student / self.lab
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"{notebook}.txt").write_text(f"{score} {does}")

    def grade(self, **options):
        from lecturekit.grading.coordinator import grade

        return grade(self.config, self.lab, **({"progress": False} | options))

    @property
    def scores(self):
        """{student: points in the gradebook}"""
        found = (self.course / "recorded").glob("[!.]*.json")
        return {path.stem: json.loads(path.read_text())["score"] for path in found}

    @property
    def runs(self):
        """Who was run, in order, once for each time."""
        return self._lines("runs")

    @property
    def records(self):
        """Who was recorded, in order, once for each time."""
        return self._lines("records")

    def _lines(self, name):
        path = self.course / name
        return [line.split()[0] for line in path.read_text().splitlines()] if path.exists() else []

    @property
    def workers(self):
        """The processes that ran something."""
        return {int(line.split()[1]) for line in (self.course / "runs").read_text().splitlines()}


def main(arguments):
    """Grade the course in a folder: `python -c "import fake_grading; …main([root, workers])"`."""
    install(setattr)
    root, workers = arguments
    summary = Course(root).grade(workers=int(workers))
    print(summary.table())
    return summary.status
