"""A course in a temporary folder with one tiny lab, so that grading is tested without a model or torch."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import nbformat
import pytest

from lecturekit.grading.course import put_environment_on_path

ROOT = Path(__file__).resolve().parents[2]
put_environment_on_path()  # these tests open the gradebook themselves


def answer(grade_id, points=None):
    """nbgrader's metadata of an answer cell; one with points is graded by a person."""
    marks = {"grade": points is not None, "grade_id": grade_id, "locked": False, "schema_version": 3}
    return json.dumps(marks | {"solution": True, "task": False} | ({} if points is None else {"points": points}))


def tests(grade_id, points):
    """nbgrader's metadata of a test cell."""
    marks = {"grade": True, "grade_id": grade_id, "locked": True, "points": points, "schema_version": 3}
    return json.dumps(marks | {"solution": False, "task": False})


TINY = f'''\
# %% [markdown]
# # A tiny lab

# %%
import math

SCALE = 2

# %% [markdown]
# Write `double`.

# %% nbgrader={answer("double")}
def double(x):
    """Twice x."""
    ### BEGIN SOLUTION
    return SCALE * x
    ### END SOLUTION


# %% nbgrader={tests("double-test", 3)}
assert callable(double), "double must be a function"
### BEGIN HIDDEN TESTS
import os, random

draw = random.Random(int(os.environ["LECTUREKIT_GRADING_SEED"]))
for _ in range(5):
    hidden = draw.randint(10**12, 10**13)
    assert double(hidden) == 2 * hidden, "double is not twice its argument"
assert os.environ["LECTUREKIT_PROFILE"] == "smoke" and os.environ["OMP_NUM_THREADS"] == "1"
### END HIDDEN TESTS

# %% nbgrader={answer("root")}
def root(x):
    """The square root of x."""
    ### BEGIN SOLUTION
    return math.sqrt(x)
    ### END SOLUTION


# %% nbgrader={tests("root-test", 5)}
assert callable(root), "root must be a function"
### BEGIN HIDDEN TESTS
assert abs(root(1234321) - 1111) < 1e-9, "root is not the square root"
### END HIDDEN TESTS

# %% [markdown] nbgrader={answer("explain", 2)}
# ### BEGIN SOLUTION
# Because twice is two times.
# ### END SOLUTION
'''
LAB = "lab99_tiny"


class Course:
    """A course folder: releases labs, takes submissions, runs nbgrader as an instructor would, reads the gradebook."""

    def __init__(self, root: Path):
        self.root = root
        root.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / "nbgrader_config.py", root)

    def add_lab(self, lab: str, source: str) -> None:
        folder = self.root / "solutions" / lab
        folder.mkdir(parents=True)
        (folder / f"{lab}.py").write_text(source)

    def released(self, lab: str):
        """A fresh copy of the released notebook."""
        return nbformat.read(self.root / "labs" / lab / f"{lab}.ipynb", as_version=4)

    def submit(self, student: str, lab: str, notebook) -> None:
        folder = self.root / "course" / "submitted" / student / lab
        folder.mkdir(parents=True)
        # json and not nbformat.write: what students hand in need not be valid
        (folder / f"{lab}.ipynb").write_text(json.dumps(notebook))

    def nbgrader(self, *words: str, timeout: float = 240) -> subprocess.CompletedProcess:
        """Run nbgrader with a PATH that lacks this environment, as a service or a cron job would."""
        env = dict(os.environ, PATH="/usr/local/bin:/usr/bin:/bin", PYTHONPATH=str(ROOT), OMP_NUM_THREADS="1")
        command = [sys.executable, "-m", "nbgrader", *words]
        return subprocess.run(
            command, cwd=self.root, env=env, capture_output=True, text=True, timeout=timeout, check=False
        )

    def grades(self, lab: str) -> dict[str, dict[str, float | None]]:
        """{student: {grade_id: automatic score, None where a person must grade}}"""
        from nbgrader.api import Gradebook

        with Gradebook(f"sqlite:///{self.root / 'course' / 'gradebook.db'}") as gradebook:
            return {
                submission.student.id: {
                    grade.name: grade.auto_score for notebook in submission.notebooks for grade in notebook.grades
                }
                for submission in gradebook.assignment_submissions(lab)
            }

    def graded(self, student: str, lab: str):
        """The notebook as it was graded."""
        path = self.root / "course" / "autograded" / student / lab / f"{lab}.ipynb"
        return nbformat.read(path, as_version=4)

    def feedback(self, student: str, lab: str) -> str:
        return (self.root / "course" / "feedback" / student / lab / f"{lab}.html").read_text()


@pytest.fixture(scope="module")
def new_course():
    """The class, for tests that fill a course of their own."""
    return Course


@pytest.fixture(scope="session")
def tiny_source():
    """The source of the tiny lab."""
    return TINY


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """A course whose tiny lab is released."""
    from lecturekit.grading.release import release

    course = Course(tmp_path_factory.mktemp("course"))
    course.add_lab(LAB, TINY)
    release([LAB], course.root)
    return course


@pytest.fixture
def released(tiny):
    return tiny.released(LAB)


@pytest.fixture(scope="session")
def by_id():
    """Find the first cell with an nbgrader id, in a notebook whose metadata may be broken."""

    def find(notebook, name):
        for cell in notebook.cells:
            marks = cell.metadata.get("nbgrader")
            if isinstance(marks, dict) and marks.get("grade_id") == name:
                return cell
        raise KeyError(name)

    return find
