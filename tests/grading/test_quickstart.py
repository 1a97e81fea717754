"""nbgrader's own example course, graded by plain nbgrader and through our path: the marks are the same."""

import copy
import os
import shutil
import subprocess
import sys
from pathlib import Path

import nbformat
import pytest
from nbgrader.api import Gradebook

from lecturekit.grading.sandbox import NoSandbox, choose_isolation

pytestmark = [pytest.mark.slow, pytest.mark.grading]
ROOT = Path(__file__).resolve().parents[2]
SQUARES = "def squares(n):\n    if n < 1:\n        raise ValueError\n    return [i ** 2 for i in range(1, n + 1)]"
SUM = "def sum_of_squares(n):\n    return sum(squares(n))"
WRITTEN = {"sum_of_squares_equation": "$1$", "part-a": "Recursion.", "part-b": "It does not end."}
STUDENTS = {
    "right": {"squares": SQUARES, "sum_of_squares": SUM, **WRITTEN},
    "blank": {},
    "no_check": {"squares": SQUARES.replace("if n < 1", "if False"), "sum_of_squares": SUM},
    "own_loop": {"squares": SQUARES, "sum_of_squares": "def sum_of_squares(n):\n    return n*(n+1)*(2*n+1)//6"},
    "off_by_one": {"squares": SQUARES.replace("n + 1", "n"), "sum_of_squares": SUM, "part-a": WRITTEN["part-a"]},
    "syntax": {"squares": "def squares(n)\n    return", "sum_of_squares": SUM},
    "first_notebook_only": {"squares": SQUARES, "sum_of_squares": SUM},
}


def nbgrader(course, *words):
    path = os.pathsep.join([str(Path(sys.executable).parent), "/usr/bin", "/bin"])
    env = dict(os.environ, PATH=path, PYTHONPATH=str(ROOT), OMP_NUM_THREADS="1")
    command = [sys.executable, "-m", "nbgrader", *words]
    done = subprocess.run(command, cwd=course, env=env, capture_output=True, text=True, timeout=500, check=False)
    assert done.returncode == 0, done.stderr[-3000:]


def submit(course):
    for student, answers in STUDENTS.items():
        folder = course / "submitted" / student / "ps1"
        folder.mkdir(parents=True)
        for release in sorted((course / "release" / "ps1").glob("*.ipynb")):
            if student == "first_notebook_only" and release.stem != "problem1":
                continue
            notebook = copy.deepcopy(nbformat.read(release, as_version=4))
            for cell in notebook.cells:
                answer = answers.get(cell.metadata.get("nbgrader", {}).get("grade_id"))
                cell.source = answer or cell.source
            nbformat.write(notebook, folder / release.name)


def marks(course):
    with Gradebook(f"sqlite:///{course / 'gradebook.db'}") as gradebook:
        return {
            (submission.student.id, notebook.name, grade.name): (
                grade.auto_score,
                grade.max_score,
                grade.needs_manual_grade,
            )
            for submission in gradebook.assignment_submissions("ps1")
            for notebook in submission.notebooks
            for grade in notebook.grades
        }


@pytest.fixture(scope="module")
def courses(tmp_path_factory):
    try:
        choose_isolation()
    except NoSandbox as error:
        pytest.skip(str(error))
    plain = tmp_path_factory.mktemp("quickstart") / "plain"
    nbgrader(plain.parent, "quickstart", plain.name)
    nbgrader(plain, "generate_assignment", "ps1")
    submit(plain)
    ours = plain.with_name("ours")
    shutil.copytree(plain, ours)
    with (ours / "nbgrader_config.py").open("a") as config:
        config.write("\nfrom lecturekit.grading.autograde import install\ninstall()\n")
    for course in (plain, ours):
        nbgrader(course, "autograde", "ps1")
        nbgrader(course, "generate_feedback", "ps1")
    return plain, ours


def test_every_mark_is_the_same(courses):
    plain, ours = courses
    expected = marks(plain)
    assert len(expected) == len(STUDENTS) * 9
    assert {score for score, _, _ in expected.values()} == {0.0, 0.5, 1.0, None}
    assert marks(ours) == expected


def test_every_student_gets_the_same_feedback_files(courses):
    plain, ours = courses
    files = [
        {path.relative_to(course / "feedback") for path in (course / "feedback").rglob("*.html")}
        for course in (plain, ours)
    ]
    # the notebook that was not handed in comes back too, saying so
    assert files[1] - files[0] == {Path("first_notebook_only/ps1/problem2.html")} and files[0] < files[1]
