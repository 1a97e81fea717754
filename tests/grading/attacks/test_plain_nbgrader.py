"""What plain nbgrader, with the settings it comes with, does with some of the attacks: the holes that ours must close.

The damage stays in the test's own folder: no bombs, no loops without an end.
"""

import html
import os
import subprocess
import sys
from pathlib import Path

import nbformat
import pytest
from grading_attacks import answering, comparing, fetching, files, notebook, telling
from grading_attacks.kit import FULL, LAB, LEAK, SOURCE, Attack, filler, hidden_numbers, written_numbers

from lecturekit.grading.course import put_environment_on_path
from lecturekit.labs import to_notebook, to_text

pytestmark = [pytest.mark.slow, pytest.mark.grading]
ROOT = Path(__file__).resolve().parents[3]

# These three go for the gradebook that lies three folders above the kernel's own, as nbgrader lays a course out.
READ_GRADEBOOK = """
import sqlite3
base = sqlite3.connect("../../../gradebook.db")
for source, in base.execute("SELECT source FROM source_cell WHERE source LIKE '%HIDDEN TESTS%'"):
    leak("a hidden test", source)
for row in base.execute("SELECT student.id, auto_score FROM grade, submitted_notebook, submitted_assignment, student "
    "WHERE grade.notebook_id = submitted_notebook.id AND submitted_notebook.assignment_id = submitted_assignment.id "
    "AND submitted_assignment.student_id = student.id"):
    leak("a mark of another student", row)
"""
CHANGE_GRADEBOOK = """
import sqlite3
base = sqlite3.connect("../../../gradebook.db", timeout=5)
base.execute("UPDATE grade SET manual_score = 99 WHERE notebook_id IN (SELECT submitted_notebook.id "
    "FROM submitted_notebook JOIN submitted_assignment ON submitted_notebook.assignment_id = submitted_assignment.id "
    "WHERE student_id = 'aa_victim')")
base.commit()
base.close()
"""
BY_HAND = [
    Attack("aa_victim"),
    Attack("reads_the_gradebook", READ_GRADEBOOK, plain="prints hidden tests and marks of others"),
    Attack("changes_the_gradebook", CHANGE_GRADEBOOK, plain="changes the marks of others"),
    Attack(
        "dies_when_tested",
        "pass",
        {"inject": "def add_lora(*a):\n    os._exit(0)"},
        plain="loses the marks for all that was right",
    ),
    Attack("many_links", lay=files.linked("../../../private.txt", "data.txt"), plain="has private.txt copied for it"),
    Attack("brings_its_own_torch", lay=files.beside(torch_py="raise ImportError('not torch')"), plain="loses all"),
]
# the last to come, in a batch of their own
LATE = [Attack("duplicated_tests", change=notebook.duplicated_tests, plain="stops the batch"), Attack("zz_after_it")]
FORGING = [attack for kind in (comparing, fetching, answering, telling) for attack in kind.ATTACKS]
TRIED = [attack for attack in [*FORGING, *BY_HAND] if attack.plain] + BY_HAND[:1]


@pytest.fixture(scope="module")
def course(tmp_path_factory, by_id):
    """A course with nbgrader's own settings in which the whole class has been graded once."""
    root = tmp_path_factory.mktemp("plain")
    (root / "nbgrader_config.py").write_text("c = get_config()\nc.CourseDirectory.course_id = 'plain'\n")
    (root / "private.txt").write_text("private")
    (root / "source" / LAB).mkdir(parents=True)
    (root / "lecture.py").write_text(SOURCE)
    (root / "source" / LAB / f"{LAB}.ipynb").write_text(to_text(to_notebook(root / "lecture.py")))
    made = nbgrader(root, "generate_assignment", LAB, "--create")
    assert made.returncode == 0, made.stderr[-3000:]
    fill = filler(root, **{"friends seed": 1})

    def hand_in(attack):
        released = nbformat.read(root / "release" / LAB / f"{LAB}.ipynb", as_version=4)
        folder = root / "submitted" / attack.name / LAB
        (attack.lay or files.write)(folder, attack.notebook(released, by_id, fill))

    for attack in TRIED:
        hand_in(attack)
    first = nbgrader(root, "autograde", LAB, "--student", "aa_victim")
    assert first.returncode == 0, first.stderr[-3000:]
    graded = nbgrader(root, "autograde", LAB)  # all others: aa_victim is graded already
    nbgrader(root, "generate_feedback", LAB)
    for attack in LATE:
        hand_in(attack)
    stopped = nbgrader(root, "autograde", LAB)
    return root, graded, stopped


def nbgrader(root: Path, *words: str) -> subprocess.CompletedProcess:
    put_environment_on_path()
    env = dict(os.environ, PYTHONPATH=str(ROOT), OMP_NUM_THREADS="1", HOME=str(root / "home"), PYTHONWARNINGS="ignore")
    for name in ("JUPYTER_CONFIG_DIR", "IPYTHONDIR", "LECTUREKIT_GRADING_SEED"):
        env.pop(name, None)
    command = [sys.executable, "-m", "nbgrader", *words]
    return subprocess.run(command, cwd=root, env=env, capture_output=True, text=True, timeout=500, check=False)


def marks(root: Path, student: str) -> dict[str, tuple[float | None, float | None]]:
    """{graded cell: (automatic score, score by hand)}"""
    from nbgrader.api import Gradebook, MissingEntry

    with Gradebook(f"sqlite:///{root / 'gradebook.db'}") as gradebook:
        try:
            submission = gradebook.find_submission(LAB, student)
        except MissingEntry:
            return {}
        return {g.name: (g.auto_score, g.manual_score) for nb in submission.notebooks for g in nb.grades}


def text(root: Path, student: str) -> str:
    path = root / "feedback" / student / LAB / f"{LAB}.html"
    return path.read_text() if path.exists() else ""


@pytest.mark.parametrize("attack", [a for a in TRIED if a.plain_marks], ids=lambda attack: attack.name)
def test_marks_that_were_not_earned_or_are_lost(course, attack):
    root, _, _ = course
    found = marks(root, attack.name)
    assert {cell: found[cell][0] for cell in attack.plain_marks} == dict(attack.plain_marks)


def test_a_tested_answer_that_ends_the_process_loses_all_marks(course):
    root, graded, _ = course
    assert marks(root, "dies_when_tested") == dict.fromkeys(FULL, (None, None))
    assert graded.returncode != 0 and "dies_when_tested" in graded.stderr


def test_a_duplicated_test_cell_stops_the_batch(course):
    root, _, stopped = course
    assert stopped.returncode != 0
    assert {automatic for automatic, _ in marks(root, "duplicated_tests").values()} == {None}
    assert marks(root, "zz_after_it") == {}


def test_a_file_called_torch_loses_all_marks(course):
    root, _, _ = course
    found = marks(root, "brings_its_own_torch")
    assert {found[cell][0] for cell in FULL if cell != "explain"} == {0}


def test_hidden_inputs_are_printed(course):
    root, _, _ = course
    page = html.unescape(text(root, "stashes_hidden_inputs"))
    assert written_numbers(page) & hidden_numbers("ungraded")  # the seed where nbgrader_config.py sets none
    assert not written_numbers(html.unescape(text(root, "aa_victim"))) & hidden_numbers("ungraded")


def test_the_gradebook_is_read(course):
    root, _, _ = course
    page = html.unescape(text(root, "reads_the_gradebook"))
    assert f"{LEAK} a hidden test" in page and '### BEGIN HIDDEN TESTS\\ngrade("lora.merge", merge)' in page
    assert f"{LEAK} a mark of another student" in page


def test_the_gradebook_is_changed(course):
    root, _, _ = course
    assert {by_hand for _, by_hand in marks(root, "aa_victim").values()} == {99}


def test_a_link_is_followed(course):
    root, _, _ = course
    copy = root / "autograded" / "many_links" / LAB / "data.txt"
    assert not copy.is_symlink() and copy.read_text() == "private"
