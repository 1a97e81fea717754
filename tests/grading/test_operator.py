"""The grader killed, doubled, locked out and out of space, with the real sandbox: no mark lost, none doubled."""

import os
import shutil
import signal
import sqlite3
import subprocess
import sys
import time
import zipfile
from pathlib import Path

import psutil
import pytest
from nbgrader.api import Gradebook

from lecturekit.grading.release import release
from lecturekit.grading.sandbox import NoSandbox, choose_isolation

pytestmark = [pytest.mark.slow, pytest.mark.grading]
LAB = "lab99_tiny"
ROOT = Path(__file__).resolve().parents[2]
KINDS = {
    "right": ("def double(x):\n    return 2 * x", {"double-test": 3, "root-test": 5}),
    "half": ("def double(x):\n    return 3 * x", {"double-test": 0, "root-test": 5}),
    "dies": ("def double(x):\n    import os\n    os._exit(0)", {"double-test": 0, "root-test": 5}),
}


@pytest.fixture
def course(tmp_path, new_course, tiny_source, by_id):
    """A fresh course with twelve submissions; ``expected`` has their marks."""
    try:
        choose_isolation()
    except NoSandbox as error:
        pytest.skip(str(error))
    made = new_course(tmp_path / "course")
    made.add_lab(LAB, tiny_source)
    release([LAB], made.root)
    made.expected = {}
    for number in range(12):
        kind = list(KINDS)[number % 3]
        notebook = made.released(LAB)
        by_id(notebook, "double").source = KINDS[kind][0]
        by_id(notebook, "root").source = "def root(x):\n    return math.sqrt(x)"
        student = f"{kind}{number}"
        made.submit(student, LAB, notebook)
        made.expected[student] = KINDS[kind][1]
    return made


def start(course, *words, program="lecturekit.cli", **rest):
    env = dict(os.environ, PATH="/usr/local/bin:/usr/bin:/bin", PYTHONPATH=str(ROOT), OMP_NUM_THREADS="1")
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True, "start_new_session": True}
    return subprocess.Popen([sys.executable, "-m", program, *words], cwd=course.root, env=env, **(pipes | rest))


def grade(course, *words):
    process = start(course, "grade", LAB, *words)
    text, _ = process.communicate(timeout=300)
    return process.returncode, text


def marks(course):
    found = course.grades(LAB)
    return {student: {cell: found[student][cell] for cell in wanted} for student, wanted in course.expected.items()}


def rows(course):
    with Gradebook(f"sqlite:///{course.root / 'course' / 'gradebook.db'}") as gradebook:
        grades = [
            (submission.student.id, grade.name)
            for submission in gradebook.assignment_submissions(LAB)
            for notebook in submission.notebooks
            for grade in notebook.grades
        ]
    return sorted(grades)


def zygotes():
    found = []
    for process in psutil.process_iter(["cmdline"]):
        if "lecturekit.grading.zygote" in (process.info["cmdline"] or []):
            found.append(process.pid)
    return set(found)


@pytest.mark.timeout(900)
def test_killed_twenty_times_and_started_again_no_mark_is_lost_and_none_doubled(course, monkeypatch):
    monkeypatch.syspath_prepend(str(Path(__file__).parent))
    from killing import kill_at_random

    before = zygotes()
    met = kill_at_random(lambda: start(course, "grade", LAB, "--workers", "1", "--force"), 9.0, kills=13, seed=1)
    met += kill_at_random(lambda: start(course, "grade", LAB, "--workers", "2", "--force"), 12.0, kills=7, seed=2)
    assert met >= 15, "hardly any kill met a running batch: the test shows nothing"
    assert marks(course) == course.expected
    assert rows(course) == sorted(
        (student, cell) for student in course.expected for cell in (*KINDS["right"][1], "explain")
    )
    deadline = time.monotonic() + 20
    while zygotes() - before and time.monotonic() < deadline:
        time.sleep(0.2)
    assert zygotes() <= before, "a killed grader leaves student processes behind"


def test_two_graders_at_once_the_second_is_told_who_the_first_is(course):
    first = start(course, "grade", LAB, "--workers", "1")
    while not list((course.root / "course" / "locks").glob(f"{LAB}.owner")):
        assert first.poll() is None
        time.sleep(0.02)
    second = start(course, "autograde", LAB, program="nbgrader")
    told, _ = second.communicate(timeout=120)
    text, _ = first.communicate(timeout=300)
    assert first.returncode == 0, text
    assert second.returncode != 0 and str(first.pid) in told
    assert marks(course) == course.expected


def test_a_gradebook_that_another_program_writes_to_is_waited_for(course):
    database = sqlite3.connect(course.root / "course" / "gradebook.db", isolation_level=None)
    database.execute("BEGIN IMMEDIATE")
    process = start(course, "grade", LAB, "--student", "right0", "half1", "--workers", "1")
    time.sleep(20)
    assert process.poll() is None
    database.rollback()
    database.close()
    text, _ = process.communicate(timeout=120)
    assert process.returncode == 0, text
    assert course.grades(LAB).keys() == {"right0", "half1"}


def test_a_gradebook_that_cannot_be_read_is_one_clear_error(course):
    database = sqlite3.connect(course.root / "course" / "gradebook.db", isolation_level=None)
    database.execute("BEGIN EXCLUSIVE")
    try:
        status, text = grade(course, "--workers", "1")
    finally:
        database.close()
    assert status == 1 and "locked" in text and "close it" in text and "Traceback" not in text
    assert grade(course)[0] == 0 and marks(course) == course.expected


def test_a_full_disk_loses_nothing_and_says_so(course):
    if os.getuid() != 0 or subprocess.run(["mount", "-t", "tmpfs", "none", "/mnt"], check=False).returncode:
        pytest.skip("a small file system can only be mounted by root")
    subprocess.run(["umount", "/mnt"], check=True)
    small = course.root / "course" / "journal"
    small.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=24k", "none", str(small)], check=True)
    try:
        status, text = grade(course, "--workers", "1")
    finally:
        subprocess.run(["umount", str(small)], check=True)
    assert status == 1 and "No space left" in text and "Traceback" not in text
    assert grade(course, "--workers", "1")[0] == 0
    assert marks(course) == course.expected


def test_from_a_canvas_download_to_marks_for_canvas(course):
    """What the instructor's guide says, in its order."""
    folder = course.root / "course" / "submitted"
    renamed = {"right3": "jürgen"}
    with zipfile.ZipFile(course.root / "submissions.zip", "w") as archive:
        for number, student in enumerate(course.expected):
            late = "LATE_" if number == 1 else ""
            name = f"{renamed.get(student, student)}_{late}{100 + number}_{5000 + number}_{LAB}-1.ipynb"
            archive.write(folder / student / LAB / f"{LAB}.ipynb", name)
    shutil.rmtree(folder)
    status, text = grade(course, "--submissions", str(course.root / "submissions.zip"))
    assert status == 0, text
    course.expected = {
        f"{renamed.get(s, s)}_{100 + n}": wanted for n, (s, wanted) in enumerate(course.expected.items())
    }
    assert marks(course) == course.expected
    page = start(course, "report", LAB)
    text, _ = page.communicate(timeout=120)
    assert page.returncode == 0, text
    assert LAB in (course.root / "course" / "reports" / f"{LAB}.html").read_text()
    for words in (
        ["generate_feedback", LAB],
        ["export", "--exporter", "lecturekit.grading.export.CanvasExport", "--to", "marks.csv"],
    ):
        done = course.nbgrader(*words)
        assert done.returncode == 0, done.stderr[-2000:]
    assert "right0_100" in (course.root / "marks.csv").read_text()
    assert "double is not twice its argument" in course.feedback("half1_101", LAB)


def test_ctrl_c_keeps_what_is_done(course):
    process = start(course, "grade", LAB, "--workers", "1")
    journal = course.root / "course" / "journal"
    while not list(journal.rglob("*.gz")):
        assert process.poll() is None
        time.sleep(0.02)
    os.killpg(process.pid, signal.SIGINT)
    text, _ = process.communicate(timeout=60)
    assert process.returncode == 130 and "Traceback" not in text, text
    status, text = grade(course)
    assert status == 0 and marks(course) == course.expected
