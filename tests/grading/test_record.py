"""Recording: marks in nbgrader's gradebook and notebooks in its autograded folder, whole or not at all."""

import copy
import errno
import json
import logging
import os
import shutil
import sqlite3
import stat
from pathlib import Path

import nbformat
import pytest
from nbgrader import utils
from nbgrader.api import Gradebook
from nbgrader.plugins import LateSubmissionPlugin
from nbgrader.preprocessors import AssignLatePenalties, SaveAutoGrades

from lecturekit.grading import gradebook as gradebook_module
from lecturekit.grading import record as record_module
from lecturekit.grading.assignment import Assignment, zero
from lecturekit.grading.course import settings
from lecturekit.grading.record import PENDING_TEXT, Recorder, RecordError, to_cells
from lecturekit.grading.work import BY_HAND, PASSED, PENDING, WRONG, Graded, Mark

LAB = "lab99_tiny"
POINTS = {"double-test": 3.0, "root-test": 5.0, "explain": 2.0}
FULL = {"double-test": 3.0, "root-test": 5.0, "explain": None}


class Case:
    """A course folder of its own: one student's submission, graded by hand-made marks."""

    def __init__(self, root: Path, release):
        self.root = root
        self.config = settings(root)
        self.assignment = Assignment(self.config, LAB)
        self.release = release
        self.student = "anna"

    @property
    def folder(self) -> Path:
        return self.root / "course" / "submitted" / self.student / LAB

    @property
    def autograded(self) -> Path:
        return self.root / "course" / "autograded" / self.student / LAB

    def submit(self, explain="Because.", timestamp=None):
        notebook = copy.deepcopy(self.release)
        for cell in notebook.cells:
            if cell.metadata.get("nbgrader", {}).get("grade_id") == "explain" and explain is not None:
                cell.source = explain
        self.folder.mkdir(parents=True, exist_ok=True)
        (self.folder / f"{LAB}.ipynb").write_text(json.dumps(notebook))
        if timestamp:
            (self.folder / "timestamp.txt").write_text(timestamp)
        return self

    def graded(self, scores=FULL, **changes):
        """What the grader would give back: marks with these scores, a word for a status that no score tells."""
        (job,) = self.assignment.jobs(self.student, self.folder)
        marks = []
        for name, points in POINTS.items():
            score = scores[name]
            status = BY_HAND if name == "explain" else PASSED if score == points else WRONG
            if score == PENDING:
                status, score = PENDING, None
            marks.append(Mark(name, points, score, status, text="" if status == PASSED else f"{name} is {status}"))
        return Graded(LAB, LAB, self.student, job.staged, tuple(marks), job.notes, **changes)

    def record(self, scores=FULL, key="k", **options):
        with Recorder(self.config, LAB, **options) as recorder:
            recorder.record(self.student, self.folder, [self.graded(scores)], key)

    def recorded(self):
        with Recorder(self.config, LAB) as recorder:
            return recorder.recorded(self.student)

    def gradebook(self):
        return Gradebook(self.config.CourseDirectory.db_url, "lecturekit")

    def rows(self) -> dict:
        """All that the gradebook has on this student's submission, without its random ids."""
        with self.gradebook() as gradebook:
            submission = gradebook.find_submission(LAB, self.student)
            (notebook,) = submission.notebooks
            return {
                "timestamp": submission.timestamp,
                "score": (submission.score, submission.max_score, notebook.score, notebook.max_score),
                "needs": (submission.needs_manual_grade, notebook.needs_manual_grade),
                "failed": notebook.failed_tests,
                "late": notebook.late_submission_penalty,
                "flagged": notebook.flagged,
                "grades": {
                    g.name: (g.auto_score, g.manual_score, g.extra_credit, g.needs_manual_grade, g.max_score, g.score)
                    for g in notebook.grades
                },
                "comments": {c.name: (c.auto_comment, c.manual_comment) for c in notebook.comments},
            }

    def count(self, table: str) -> int:
        with sqlite3.connect(self.root / "course" / "gradebook.db") as db:
            return db.execute(f"select count(*) from {table}").fetchone()[0]

    def files(self) -> dict[str, bytes]:
        return {str(p.relative_to(self.autograded)): p.read_bytes() for p in self.autograded.rglob("*") if p.is_file()}

    def leftovers(self) -> list[str]:
        """Temporary files and folders."""
        return [p.name for p in (self.root / "course").rglob(".*")]


@pytest.fixture
def case(tiny, released, tmp_path):
    """A copy of the released course, so that each test has a gradebook of its own."""
    root = tmp_path / "course copy"
    shutil.copytree(tiny.root, root, ignore=shutil.ignore_patterns("submitted", "autograded", "journal"))
    return Case(root, released).submit()


def by_nbgrader(case: Case, executed) -> None:
    """Let nbgrader itself create the submission and save the grades, as its Autograde does."""
    timestamp = (case.folder / "timestamp.txt").read_text() if (case.folder / "timestamp.txt").exists() else None
    with case.gradebook() as gradebook:
        gradebook.update_or_create_student(case.student)
        kept = {"timestamp": timestamp} if timestamp else {}
        gradebook.update_or_create_submission(LAB, case.student, **kept)
    url = case.config.CourseDirectory.db_url
    resources = {"nbgrader": {"student": case.student, "assignment": LAB, "notebook": LAB, "db_url": url}}
    for preprocessor in (SaveAutoGrades(), AssignLatePenalties(config=case.config)):
        executed, resources = preprocessor.preprocess(copy.deepcopy(executed), resources)


# --- the gradebook --------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("late", ["none", "zero"])
@pytest.mark.parametrize(
    "scores",
    [
        FULL,
        FULL | {"double-test": 0.0},
        FULL | {"root-test": 2.5},
        {"double-test": 0.0, "root-test": 0.0, "explain": 0},
    ],
)
@pytest.mark.parametrize("explain", ["Because.", None])
def test_every_field_is_what_nbgrader_saves_for_the_same_notebook(case, tmp_path, scores, late, explain):
    if explain is None or scores["explain"] is not None:
        scores, explain = scores | {"explain": None}, None
    case.submit(explain, timestamp="2026-02-01 00:10:00 UTC")
    with case.gradebook() as gradebook:
        gradebook.update_or_create_assignment(LAB, duedate="2026-02-01 00:00:00")
    case.config.LateSubmissionPlugin.penalty_method = late
    shutil.copytree(case.root, tmp_path / "theirs")
    theirs = Case(tmp_path / "theirs", case.release)
    theirs.config.LateSubmissionPlugin.penalty_method = late
    by_nbgrader(theirs, to_cells(case.graded(scores)))
    case.record(scores)
    assert case.rows() == theirs.rows()
    assert case.rows()["late"] == (case.rows()["score"][0] if late == "zero" else None)
    for table in ("student", "submitted_assignment", "submitted_notebook", "grade", "comment", "base_cell"):
        assert case.count(table) == theirs.count(table), table


def test_a_pending_question_is_neither_passed_nor_failed(case):
    case.record(FULL | {"double-test": PENDING})
    rows = case.rows()
    assert rows["grades"]["double-test"][:4] == (None, None, None, True)
    assert not rows["failed"] and rows["needs"] == (True, True)
    case.record(FULL | {"double-test": 3.0})
    assert case.rows()["grades"]["double-test"][:4] == (3.0, None, None, False)


def test_a_pending_mark_counts_nothing_even_if_it_has_a_score(case):
    graded = case.graded()
    marks = tuple(Mark(m.cell, m.points, 3.0, PENDING) if m.cell == "double-test" else m for m in graded.marks)
    with Recorder(case.config, LAB) as recorder:
        recorder.record("anna", case.folder, [Graded(LAB, LAB, "anna", graded.executed, marks)], "k")
    assert case.rows()["grades"]["double-test"][:4] == (None, None, None, True)


def test_what_a_person_gave_survives_a_regrade(case):
    case.record(FULL | {"double-test": 0.0})
    with case.gradebook() as gradebook:
        grade = gradebook.find_grade("explain", LAB, LAB, "anna")
        grade.manual_score, grade.extra_credit, grade.needs_manual_grade = 1.5, 0.5, False
        gradebook.find_comment("explain", LAB, LAB, "anna").manual_comment = "Good."
        gradebook.find_grade("double-test", LAB, LAB, "anna").manual_score = 2.0
        gradebook.find_submission_notebook(LAB, LAB, "anna").flagged = True
        gradebook.db.commit()
    case.record(FULL)
    rows = case.rows()
    assert rows["grades"]["explain"] == (None, 1.5, 0.5, True, 2.0, 2.0)
    assert rows["grades"]["double-test"] == (3.0, 2.0, None, True, 3.0, 2.0)  # True: somebody should look again
    assert rows["comments"]["explain"] == (None, "Good.") and rows["flagged"]


def test_a_notebook_that_was_not_handed_in_is_zero_with_nothing_left_to_grade(case):
    (case.folder / f"{LAB}.ipynb").unlink()
    (job,) = case.assignment.jobs("anna", case.folder)
    with Recorder(case.config, LAB) as recorder:
        recorder.record("anna", case.folder, [zero(job)], "k")
    rows = case.rows()
    assert {name: grade[0] for name, grade in rows["grades"].items()} == {
        "double-test": 0,
        "root-test": 0,
        "explain": 0,
    }
    assert rows["needs"] == (False, False) and rows["score"][0] == 0
    assert "was not handed in" in case.files()[f"{LAB}.ipynb"].decode()


def test_points_over_the_maximum_or_no_number_at_all_are_refused(case):
    for score in (3.5, -1.0, float("nan"), float("inf")):
        graded = case.graded()
        marks = tuple(Mark(m.cell, m.points, score, PASSED) if m.cell == "double-test" else m for m in graded.marks)
        bad = Graded(LAB, LAB, "anna", graded.executed, marks)
        with Recorder(case.config, LAB) as recorder, pytest.raises(RecordError, match="double-test, which is worth 3"):
            recorder.record("anna", case.folder, [bad], "k")
    assert case.count("submitted_assignment") == 0 and not case.autograded.exists() and case.leftovers() == []


def test_marks_that_do_not_fit_the_gradebook_are_refused_by_name(case):
    graded = case.graded()
    short = Graded(LAB, LAB, "anna", graded.executed, graded.marks[1:])
    with Recorder(case.config, LAB) as recorder, pytest.raises(RecordError, match="do not agree on double-test"):
        recorder.record("anna", case.folder, [short], "k")
    assert case.count("student") == 0


def test_students_are_not_added_when_nbgrader_is_told_not_to(case):
    case.config.Autograde.create_student = False
    with pytest.raises(RecordError, match="No student with ID 'anna' exists in the database"):
        case.record()
    with case.gradebook() as gradebook:
        gradebook.add_student("anna", first_name="Anna")
    case.record()
    assert case.rows()["score"][0] == 8


def test_a_late_plugin_of_the_courses_own_is_asked(case):
    class HalfOff(LateSubmissionPlugin):
        def late_submission_penalty(self, student_id, score, total_seconds_late):
            assert (student_id, score, total_seconds_late) == ("anna", 8.0, 600.0)
            return score / 2

    case.submit(timestamp="2026-02-01 00:10:00 UTC")
    with case.gradebook() as gradebook:
        gradebook.update_or_create_assignment(LAB, duedate="2026-02-01 00:00:00")
    case.config.AssignLatePenalties.plugin_class = HalfOff
    case.record()
    assert case.rows()["late"] == 4.0


# --- the autograded folder ------------------------------------------------------------------------------------------
def test_the_autograded_folder_is_what_nbgrader_leaves(case):
    case.submit(timestamp="2026-02-01 00:10:00 UTC")
    (case.folder / "torch.py").write_text("raise SystemExit")
    (case.root / "solutions" / LAB / "picture.png").write_bytes(b"png")
    case.record()
    assert set(case.files()) == {f"{LAB}.ipynb", "timestamp.txt", "picture.png"}
    for path in case.autograded.iterdir():
        assert stat.S_IMODE(path.stat().st_mode) == 0o444
    assert utils.parse_utc((case.autograded / "timestamp.txt").read_text().strip()) == case.rows()["timestamp"]
    notebook = nbformat.read(case.autograded / f"{LAB}.ipynb", as_version=4)
    nbformat.validate(notebook)
    assert case.leftovers() == []


def test_other_notebooks_of_the_submission_stay(case):
    """As with `nbgrader autograde --notebook`."""
    case.record()
    (case.autograded / "another.ipynb").write_text("kept")
    case.record(FULL | {"root-test": 0.0}, key="second")
    assert case.files()["another.ipynb"] == b"kept" and b"root-test is wrong" in case.files()[f"{LAB}.ipynb"]


def test_group_write_permission_is_honoured(case):
    case.config.CourseDirectory.groupshared = True
    case.record()
    assert stat.S_IMODE((case.autograded / f"{LAB}.ipynb").stat().st_mode) == 0o664
    assert case.autograded.stat().st_mode & 0o2070 == 0o2070


def test_nbgraders_feedback_and_export_work_on_it(case):
    from nbgrader.apps import NbGraderAPI

    case.submit(timestamp="2026-02-01 00:10:00 UTC")
    case.record(FULL | {"double-test": 0.0, "root-test": PENDING})
    api = NbGraderAPI(config=case.config)
    done = api.generate_feedback(LAB)
    assert done["success"], done
    page = (case.root / "course" / "feedback" / "anna" / LAB / f"{LAB}.html").read_text()
    assert "double-test is wrong" in page and PENDING_TEXT in page
    assert api.get_autograded_students(LAB) == {"anna"}
    (submission,) = api.get_submissions(LAB)
    assert (submission["score"], submission["needs_manual_grade"], submission["autograded"]) == (0, True, True)


# --- what is recorded -----------------------------------------------------------------------------------------------
def test_the_key_is_known_until_gradebook_or_folder_lose_the_submission(case):
    assert case.recorded() is None
    case.record(key="first")
    assert case.recorded() == "first"
    shutil.copy(case.root / "course" / "gradebook.db", case.root / "backup.db")
    with case.gradebook() as gradebook:
        gradebook.remove_submission(LAB, "anna")
    assert case.recorded() is None
    shutil.copy(case.root / "backup.db", case.root / "course" / "gradebook.db")
    assert case.recorded() == "first"
    shutil.rmtree(case.autograded)
    assert case.recorded() is None


def test_a_damaged_marker_means_not_recorded(case):
    case.record()
    (marker,) = (case.root / "course" / "journal" / "recorded" / LAB).iterdir()
    for text in ("", "[]", '{"key": 5}', "{"):
        marker.write_text(text)
        assert case.recorded() is None


# --- killed, full, locked -------------------------------------------------------------------------------------------
class Killed(BaseException):
    """Stands for a kill: nothing in the code under test may catch it and go on."""


def steps(monkeypatch, fail_at, error):
    """Make the n-th file or database step raise, before it does anything or (odd n) after. Returns the log of steps."""
    done = []

    def wrap(owner, name):
        original = getattr(owner, name)

        def step(*args, **kwargs):
            here = len(done)
            done.append(name)
            if 2 * here == fail_at:
                raise error
            result = original(*args, **kwargs)
            if 2 * here + 1 == fail_at:
                raise error
            return result

        monkeypatch.setattr(owner, name, step)

    wrap(record_module.shutil, "rmtree")
    wrap(record_module, "atomic_write")
    for name in ("mkdir", "write_text", "chmod", "rename", "unlink"):
        wrap(Path, name)
    wrap(gradebook_module, "_save")
    wrap(gradebook_module.Marks, "_penalize")
    wrap(gradebook_module.Marks, "_rows")
    import sqlalchemy.orm

    wrap(sqlalchemy.orm.Session, "commit")
    return done


@pytest.mark.parametrize("again", [False, True], ids=["first grading", "regrading"])
def test_killed_at_any_step_and_run_again_it_ends_the_same(case, tmp_path, again):
    """Each step in turn raises, before or after it is done; then the batch is started again as a coordinator would."""
    case.submit(timestamp="2026-02-01 00:10:00 UTC")
    case.config.LateSubmissionPlugin.penalty_method = "zero"
    with case.gradebook() as gradebook:
        gradebook.update_or_create_assignment(LAB, duedate="2026-02-01 00:00:00")
    pristine = tmp_path / "pristine"
    if again:
        case.record(FULL | {"root-test": 0.0}, key="old")
    shutil.copytree(case.root, pristine)
    old = case.rows() if again else None
    case.record(key="new")
    want = (case.rows(), case.files(), case.recorded())
    sizes = {table: case.count(table) for table in ("grade", "comment", "submitted_notebook")}
    number = 0
    while True:
        shutil.rmtree(case.root)
        shutil.copytree(pristine, case.root)
        with pytest.MonkeyPatch.context() as patch:
            done = steps(patch, number, Killed())
            try:
                case.record(key="new")
                killed = False
            except Killed:
                killed = True
        assert killed == (number < 2 * len(done))
        # in the gradebook is all of the old submission or all of the new one; its key, if there is one, says which
        now = case.rows() if case.count("submitted_assignment") else None
        assert now in (old, want[0]) and case.count("student") == (now is not None), (number, done)
        seen = case.recorded()
        assert seen is None or now == (old if seen == "old" else want[0])
        if seen != "new":
            case.record(key="new")
        assert (case.rows(), case.files(), case.recorded()) == want, (number, done)
        assert {table: case.count(table) for table in sizes} == sizes and case.leftovers() == [], (number, done)
        if not killed and number >= 2 * len(done):
            break
        number += 1
    assert number > 30


def test_a_kill_between_the_two_renames_loses_no_other_notebook(case):
    case.record()
    (case.autograded / "another.ipynb").write_text("kept")
    original = Path.rename

    def rename(path, target):
        if path.name.endswith(".new"):
            raise Killed
        return original(path, target)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Path, "rename", rename)
        with pytest.raises(Killed):
            case.record(key="second")
    assert not case.autograded.exists() and case.recorded() is None
    case.record(key="second")
    assert case.files()["another.ipynb"] == b"kept" and case.recorded() == "second" and case.leftovers() == []


def test_a_full_disk_leaves_the_former_marks_and_says_what_to_do(case):
    case.record(FULL | {"root-test": 0.0}, key="old")
    before = (case.rows(), case.files())
    full = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "notebook")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Path, "write_text", lambda *args, **kwargs: (_ for _ in ()).throw(full))
        with pytest.raises(RecordError, match=r"No space left on device\): make room"):
            case.record(key="new")
    assert (case.rows(), case.files()) == before and case.recorded() == "old" and case.leftovers() == []


def test_a_gradebook_that_cannot_grow_keeps_the_former_marks(case):
    """sqlite's own limit stands for the full disk: the error is the same one."""
    case.record(FULL | {"root-test": 0.0}, key="old")
    before = (case.rows(), case.files())
    with Recorder(case.config, LAB) as recorder:
        from sqlalchemy import event, text

        engine = recorder._marks.gradebook.engine
        event.listen(engine, "connect", lambda raw, _: raw.execute("PRAGMA max_page_count = 1"))
        engine.dispose()
        recorder._marks.gradebook.db.execute(text("select 1"))
        graded = [case.graded()]
        case.student = "ben"
        case.submit()
        with pytest.raises(RecordError, match="full.*make room"):
            for number in range(200):  # there is room on pages that are partly used
                ben = Graded(LAB, LAB, f"ben{number}", graded[0].executed, graded[0].marks)
                recorder.record(f"ben{number}", case.folder, [ben], "k")
    case.student = "anna"
    assert (case.rows(), case.files()) == before
    assert case.count("submitted_assignment") == case.count("submitted_notebook") == case.count("student")


def test_a_locked_gradebook_is_waited_for(case):
    import threading

    case.record(FULL | {"root-test": 0.0})
    other = sqlite3.connect(case.root / "course" / "gradebook.db", check_same_thread=False)
    other.execute("BEGIN EXCLUSIVE")
    release_it = threading.Timer(0.5, other.rollback)
    release_it.start()
    case.record(key="after", wait=30)
    release_it.join()
    other.close()
    assert case.recorded() == "after" and case.rows()["score"][0] == 8


def test_a_gradebook_that_stays_locked_is_named_and_nothing_is_written(case):
    case.record(FULL | {"root-test": 0.0}, key="old")
    before = (case.rows(), case.files())
    with sqlite3.connect(case.root / "course" / "gradebook.db") as other:
        other.execute("BEGIN IMMEDIATE")
        with pytest.raises(RecordError, match=r"gradebook\.db is locked .*formgrader.* close it"):
            case.record(key="new", wait=0.2)
        other.rollback()
    assert (case.rows(), case.files()) == before and case.recorded() in (None, "old") and case.leftovers() == []
    case.record(key="new")
    assert case.recorded() == "new"


# --- outputs --------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("text", ["", "one line", "two\nlines <b>x</b>"])
@pytest.mark.parametrize(
    ("score", "status"), [(3.0, PASSED), (0.0, WRONG), (1.25, WRONG), (0.0, "raised"), (3.0, WRONG)]
)
def test_nbgrader_gets_the_marks_back_out_of_the_outputs(case, score, status, text):
    kind, status = ("raised", WRONG) if status == "raised" else ("", status)
    graded = case.graded()
    mark = Mark("double-test", 3.0, score, status, kind=kind, text=text)
    notebook = to_cells(Graded(LAB, LAB, "anna", graded.executed, (mark, *graded.marks[1:])))
    (cell,) = [c for c in notebook.cells if c.metadata.get("nbgrader", {}).get("grade_id") == "double-test"]
    assert utils.determine_grade(cell, logging.getLogger("test")) == (score, 3.0)
    shown = "".join(o.get("text", "") + "\n".join(o.get("traceback", [])) for o in cell.outputs)
    assert all(line in shown for line in text.splitlines())
    assert all(len(o.traceback) == 1 for o in cell.outputs if o.output_type == "error")
    nbformat.validate(notebook)


def test_a_pending_test_would_not_be_taken_for_passed_by_its_outputs(case):
    notebook = to_cells(case.graded(FULL | {"double-test": PENDING}))
    (cell,) = [c for c in notebook.cells if c.metadata.get("nbgrader", {}).get("grade_id") == "double-test"]
    assert PENDING_TEXT in cell.outputs[0].text and utils.determine_grade(cell)[0] == 0


def test_only_outputs_of_tests_are_replaced_and_the_result_itself_stays(case):
    graded = case.graded()
    for cell in graded.executed["cells"]:
        if cell["cell_type"] == "code":
            cell["outputs"] = [nbformat.v4.new_output("stream", text="printed")]
    before = copy.deepcopy(graded.executed)
    notebook = to_cells(graded)
    assert graded.executed == before
    kept = {
        c.metadata.nbgrader.grade_id if "nbgrader" in c.metadata else "": c.outputs
        for c in notebook.cells
        if "outputs" in c
    }
    assert kept["double"] and kept[""] and kept["double-test"] == []


# --- safety of what is shown ----------------------------------------------------------------------------------------
def test_scripts_in_outputs_and_answers_do_not_reach_the_autograded_notebook(case):
    case.submit("<script>alert(1)</script> Because.")
    graded = case.graded()
    for cell in graded.executed["cells"]:
        if cell["cell_type"] == "code":
            html = {"text/html": "<img src=x onerror=alert(2)>", "application/javascript": "alert(3)"}
            cell["outputs"] = [nbformat.v4.new_output("display_data", data=html)]
    with Recorder(case.config, LAB) as recorder:
        recorder.record("anna", case.folder, [graded], "k")
    text = case.files()[f"{LAB}.ipynb"].decode()
    assert "<script" not in text and "onerror" not in text and "alert(3)" not in text
    assert case.rows()["comments"]["explain"] == (None, None)
