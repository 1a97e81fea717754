"""nbgrader's round trip with a class of real submissions: release, autograde, give feedback, open formgrader."""

import copy
import os
import re
import secrets
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

import pytest
from nbformat.v4 import new_code_cell

pytestmark = [pytest.mark.slow, pytest.mark.grading]
LAB = "lab99_tiny"
RIGHT = {"double": "def double(x):\n    return SCALE * x", "root": "def root(x):\n    return math.sqrt(x)"}
FULL = {"double-test": 3, "root-test": 5}
ROOT = Path(__file__).resolve().parents[2]


def answer(notebook, by_id, **sources):
    for name, source in sources.items():
        by_id(notebook, name).source = source
    return notebook


def place(notebook, by_id, name):
    return notebook.cells.index(by_id(notebook, name))


def perfect(nb, by_id):
    # a person decides what a written answer is worth
    return answer(nb, by_id, **RIGHT, explain="Twice is two times."), FULL | {"explain": None}


def blank(nb, by_id):
    return nb, {"double-test": 0, "root-test": 0, "explain": 0}


def another_way(nb, by_id):
    return answer(
        nb, by_id, double="double = lambda number: number + number", root="def root(x):\n    return x**0.5"
    ), FULL


def one_wrong(nb, by_id):
    return answer(nb, by_id, double="def double(x):\n    return x * x", root=RIGHT["root"]), FULL | {"double-test": 0}


def prints_and_warns(nb, by_id):
    noisy = "def double(x):\n    import sys, warnings\n    warnings.warn('careful')\n    print('input', x)\n"
    noisy += "    print('input', x, file=sys.stderr)\n    display(x)\n    return 2 * x"
    return answer(nb, by_id, double=noisy, root=RIGHT["root"]), FULL


def duplicated_tests(nb, by_id):
    answer(nb, by_id, **RIGHT)
    for name in ("double-test", "double", "explain"):
        index = place(nb, by_id, name)
        nb.cells.insert(index + 1, copy.deepcopy(nb.cells[index]))
        nb.cells[index + 1].id = f"copy-of-{name}"
    return nb, FULL


def deleted_cells(nb, by_id):
    answer(nb, by_id, **RIGHT)
    nb.cells = [cell for cell in nb.cells if cell.metadata.get("nbgrader", {}).get("grade_id") in ("double", "root")]
    return nb, FULL | {"explain": 0}


def moved_answer(nb, by_id):
    """The answer pasted into a cell of the student's own, the answer cell deleted."""
    answer(nb, by_id, root=RIGHT["root"])
    nb.cells[place(nb, by_id, "double")] = new_code_cell(RIGHT["double"])
    return nb, FULL


def reordered(nb, by_id):
    answer(nb, by_id, **RIGHT)
    nb.cells.reverse()
    return nb, FULL


def broken_metadata(nb, by_id):
    answer(nb, by_id, **RIGHT)
    for name in ("double-test", "root"):
        by_id(nb, name).metadata["nbgrader"] = "lost"
    by_id(nb, "root-test").metadata["nbgrader"]["points"] = 1000
    by_id(nb, "explain").metadata["nbgrader"] |= {"schema_version": 1, "grade_id": ["not", "a", "name"]}
    nb.metadata = {"kernelspec": {"name": "no-such-kernel", "display_name": "?"}}
    return nb, FULL


def edited_test(nb, by_id):
    """A test weakened, moved points, and an answer that is wrong: nothing is earned by it."""
    answer(nb, by_id, double="def double(x):\n    return 0", root=RIGHT["root"])
    by_id(nb, "double-test").source = "pass"
    by_id(nb, "double-test").metadata["nbgrader"]["points"] = 100
    return nb, FULL | {"double-test": 0}


def kernel_dies(nb, by_id):
    """The second answer ends the process when tested; the first keeps its points, and so does the helper's user."""
    nb.cells.insert(place(nb, by_id, "double"), new_code_cell("TWO = 2"))
    answer(
        nb,
        by_id,
        double="def double(x):\n    import os\n    os._exit(0)",
        root="def root(x):\n    return x ** (1 / TWO)",
    )
    return nb, FULL | {"double-test": 0}


def endless(nb, by_id):
    return answer(nb, by_id, double="def double(x):\n    while True:\n        pass", root=RIGHT["root"]), FULL | {
        "double-test": 0
    }


def exits_early(nb, by_id):
    nb.cells.insert(1, new_code_cell("import sys\nsys.exit(1)"))
    return answer(nb, by_id, **RIGHT), FULL


SUBMISSIONS = [perfect, blank, another_way, one_wrong, prints_and_warns, duplicated_tests, deleted_cells, moved_answer]
SUBMISSIONS += [reordered, broken_metadata, edited_test, kernel_dies, endless, exits_early]


@pytest.fixture(scope="module")
def graded(tiny, by_id):
    """The tiny lab with every submission graded in one batch and feedback given: (course, expected scores)."""
    expected = {}
    for make in SUBMISSIONS:
        notebook, expected[make.__name__] = make(tiny.released(LAB), by_id)
        tiny.submit(make.__name__, LAB, notebook)
    for command in (["autograde", "--Grader.cell_seconds=10"], ["generate_feedback"]):
        done = tiny.nbgrader(*command, LAB)
        assert done.returncode == 0, done.stderr[-3000:]
    return tiny, expected


@pytest.mark.parametrize("student", [make.__name__ for make in SUBMISSIONS])
def test_scores_are_as_they_should_be(graded, student):
    course, expected = graded
    scores = course.grades(LAB)[student]
    assert {name: scores[name] for name in expected[student]} == expected[student]


def test_maximum_points_stay_those_of_the_lab(graded):
    from nbgrader.api import Gradebook

    course, _ = graded
    with Gradebook(f"sqlite:///{course.root / 'course' / 'gradebook.db'}") as gradebook:
        assert gradebook.find_assignment(LAB).max_score == 10


def test_every_student_gets_feedback(graded):
    course, expected = graded
    for student in expected:
        assert "A tiny lab" in course.feedback(student, LAB), student


def test_feedback_names_the_mistake_but_shows_no_hidden_input(graded):
    course, _ = graded
    assert "double is not twice its argument" in course.feedback("one_wrong", LAB)
    for student in ("one_wrong", "prints_and_warns", "kernel_dies"):
        # hidden inputs have 13 digits; a seed has up to 19
        text = re.sub(r"<(style|script).*?</\1>", "", course.feedback(student, LAB), flags=re.DOTALL)
        assert not re.search(r"\b[1-9]\d{12,18}\b", text), student


def test_students_are_told_what_was_changed(graded):
    course, _ = graded
    assert "lecturekit" not in course.graded("perfect", LAB).metadata
    for student, words in {
        "duplicated_tests": "A copy of the test cell double-test was left out.",
        "deleted_cells": "The test cell root-test was missing and has been put back.",
        "edited_test": "A changed copy of the test cell double-test was kept as a cell of your own; "
        "it earns no points.",
    }.items():
        assert words in course.graded(student, LAB).metadata["lecturekit"]["staging"]
        assert words in course.feedback(student, LAB)


def test_submission_stays_as_it_was(graded):
    course, _ = graded
    submitted = course.root / "course" / "submitted" / "broken_metadata" / LAB / f"{LAB}.ipynb"
    assert '"points": 1000' in submitted.read_text()


def test_grading_again_gives_the_same_scores(graded):
    course, _ = graded
    before = course.grades(LAB)["one_wrong"]
    done = course.nbgrader("autograde", LAB, "--student", "one_wrong", "--force")
    assert done.returncode == 0, done.stderr[-3000:]
    assert course.grades(LAB)["one_wrong"] == before


def get(url: str, token: str) -> tuple[int, str]:
    request = urllib.request.Request(url, headers={"Authorization": f"token {token}"})
    with urllib.request.urlopen(request, timeout=20) as reply:
        return reply.status, reply.read().decode()


def test_formgrader_opens(graded, tmp_path):
    """The server an instructor starts in the course folder shows the lab and its submissions."""
    course, _ = graded
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    token = secrets.token_hex(16)
    enable = "{'nbgrader.server_extensions.formgrader': True}"
    command = [sys.executable, "-m", "jupyter_server", "--ip=127.0.0.1", f"--port={port}", "--no-browser"]
    command += ["--ServerApp.port_retries=0", "--allow-root", f"--ServerApp.jpserver_extensions={enable}"]
    # the token goes by the environment and settings of the person running the tests stay out
    env = dict(os.environ, PYTHONPATH=str(ROOT), JUPYTER_TOKEN=token, JUPYTER_CONFIG_DIR=str(tmp_path / "config"))
    env |= {"JUPYTER_DATA_DIR": str(tmp_path / "data"), "JUPYTER_RUNTIME_DIR": str(tmp_path / "runtime")}
    with open(tmp_path / "log", "w") as log:
        server = subprocess.Popen(command, cwd=course.root, env=env, stdout=log, stderr=log)
    base = f"http://127.0.0.1:{port}/formgrader"
    try:
        deadline = time.monotonic() + 60
        while True:
            try:
                status, page = get(f"{base}/", token)
                break
            except (urllib.error.URLError, ConnectionError):
                assert server.poll() is None and time.monotonic() < deadline, (tmp_path / "log").read_text()[-3000:]
                time.sleep(0.3)
        assert status == 200 and "formgrader" in page.lower()
        status, listing = get(f"{base}/api/assignments", token)
        assert status == 200 and LAB in listing
        status, page = get(f"{base}/gradebook/{LAB}", token)
        assert status == 200 and LAB in page
        status, submissions = get(f"{base}/api/submissions/{LAB}", token)
        assert status == 200 and "duplicated_tests" in submissions
        assert LAB not in get(f"{base}/api/assignments", "wrong")[1]  # the page that asks for the token
    finally:
        server.terminate()
        server.wait(timeout=30)
