"""An assignment as nbgrader has it: notebooks, hidden tests, submissions, jobs."""

import json
import os
import shutil
import sqlite3
from pathlib import Path

import nbformat
import nbgrader
import pytest
from nbgrader import utils
from nbgrader.preprocessors import ClearOutput, DeduplicateIds, OverwriteCells, OverwriteKernelspec
from traitlets.config import Config

from lecturekit.grading.assignment import Assignment, is_missing, zero
from lecturekit.grading.course import settings, student_seed

LAB = "lab99_tiny"
GUIDE = Path(nbgrader.__file__).parent / "docs" / "source" / "user_guide"


def cells_of(notebook):
    """{nbgrader id: cell} of a notebook that is well formed."""
    return {cell.metadata.nbgrader.grade_id: cell for cell in notebook.cells if "nbgrader" in cell.metadata}


def facts(cell):
    """nbgrader's metadata, but for the cell type that nbgrader's tool-bar notes and its grader never reads."""
    return {key: value for key, value in cell.metadata.nbgrader.items() if key != "cell_type"}


@pytest.fixture
def assignment(tiny):
    return Assignment(settings(tiny.root), LAB)


@pytest.fixture
def folder(tiny):
    """course/submitted, empty before and after."""
    path = tiny.root / "course" / "submitted"
    shutil.rmtree(path, ignore_errors=True)
    path.mkdir(parents=True)
    yield path
    shutil.rmtree(path)


@pytest.fixture(scope="module")
def quickstart(tmp_path_factory):
    """nbgrader's example course with its own directory names and two notebooks, released: its configuration."""
    from nbgrader.apps import NbGraderAPI

    root = tmp_path_factory.mktemp("quickstart")
    shutil.copytree(GUIDE / "source" / "ps1", root / "source" / "ps1")
    shutil.copytree(GUIDE / "submitted", root / "submitted")
    config = Config()
    config.CourseDirectory.root = str(root)
    config.CourseDirectory.course_id = "course101"
    done = NbGraderAPI(config=config).generate_assignment("ps1")
    assert done["success"], done
    return config


# --- notebooks and frames -------------------------------------------------------------------------------------------
def test_the_frame_holds_the_hidden_tests_that_the_release_does_not(assignment, released):
    assert assignment.notebooks == [LAB]
    frame, visible = cells_of(assignment.frames[LAB]), cells_of(released)
    assert "double is not twice" in frame["double-test"].source
    assert "double is not twice" not in visible["double-test"].source
    for name in ("double-test", "root-test"):
        marks = frame[name].metadata.nbgrader
        assert marks.checksum == utils.compute_checksum(frame[name])
    assert [frame[name].metadata.nbgrader.points for name in ("double-test", "root-test", "explain")] == [3, 5, 2]
    assert frame["double"].source == visible["double"].source


def test_points_come_from_the_gradebook_and_not_from_the_released_file(tiny, assignment):
    path = tiny.root / "labs" / LAB / f"{LAB}.ipynb"
    before = path.read_bytes()
    notebook = json.loads(before)
    for cell in notebook["cells"]:
        if cell["metadata"].get("nbgrader", {}).get("grade_id") == "double-test":
            cell["metadata"]["nbgrader"]["points"] = 99
    try:
        path.write_text(json.dumps(notebook))
        again = Assignment(settings(tiny.root), LAB)
    finally:
        path.write_bytes(before)
    assert cells_of(again.frames[LAB])["double-test"].metadata.nbgrader.points == 3


def test_a_lab_that_is_not_in_the_gradebook_is_said_to_need_a_release(tiny):
    with pytest.raises(LookupError, match="run `lecturekit release lab98_none`"):
        Assignment(settings(tiny.root), "lab98_none")


def test_a_course_without_gradebook_gets_none_by_asking(tmp_path):
    config = Config()
    config.CourseDirectory.root = str(tmp_path)
    with pytest.raises(LookupError, match=r"run `lecturekit release ps1`"):
        Assignment(config, "ps1")
    assert list(tmp_path.iterdir()) == []


def test_a_lab_whose_released_notebook_is_gone_is_said_to_need_a_release(tiny):
    path = tiny.root / "labs" / LAB / f"{LAB}.ipynb"
    hidden = path.with_suffix(".away")
    path.rename(hidden)
    try:
        with pytest.raises(LookupError, match=r"\.ipynb is missing: run `lecturekit release lab99_tiny`"):
            Assignment(settings(tiny.root), LAB)
    finally:
        hidden.rename(path)


def test_a_release_that_lacks_a_graded_cell_is_refused_by_its_name(tiny):
    path = tiny.root / "labs" / LAB / f"{LAB}.ipynb"
    before = path.read_bytes()
    notebook = json.loads(before)
    notebook["cells"] = [
        c for c in notebook["cells"] if c["metadata"].get("nbgrader", {}).get("grade_id") != "root-test"
    ]
    try:
        path.write_text(json.dumps(notebook))
        with pytest.raises(LookupError, match="root-test"):
            Assignment(settings(tiny.root), LAB)
    finally:
        path.write_bytes(before)


def test_a_locked_gradebook_is_named_with_what_to_do(tiny):
    with sqlite3.connect(tiny.root / "course" / "gradebook.db") as other:
        other.execute("BEGIN EXCLUSIVE")
        with pytest.raises(LookupError, match="is locked .* close it"):
            Assignment(settings(tiny.root), LAB)
        other.rollback()


def test_what_must_stay_private_holds_gradebook_secret_sources_and_submissions(tiny, assignment, quickstart):
    private = [str(path) for path in assignment.private]
    for name in ("course", "course/gradebook.db", "course/submitted", "course/autograded", "solutions"):
        assert str(tiny.root / name) in private
    assert str(tiny.root / "labs") not in private and str(tiny.root) not in private
    plain = [path.name for path in Assignment(quickstart, "ps1").private]
    assert {"gradebook.db", "course", "source", "submitted", "autograded", "feedback", "solution"} <= set(plain)


# --- submissions ----------------------------------------------------------------------------------------------------
def test_submissions_are_folders_sorted_whatever_is_in_them(tiny, assignment, folder, released):
    tiny.submit("zoe", LAB, released)
    (folder / "anna" / LAB).mkdir(parents=True)
    (folder / "ben" / "another_lab").mkdir(parents=True)
    (folder / "a_file").write_text("")
    found = assignment.submissions()
    assert list(found) == ["anna", "zoe"] and found["anna"] == folder / "anna" / LAB
    assert assignment.skipped == {}


def test_students_are_chosen_by_id_or_glob_and_left_out_by_nbgraders_setting(tiny, folder):
    for student in ("anna", "ben", "bert"):
        (folder / student / LAB).mkdir(parents=True)
    config = settings(tiny.root)
    assert list(Assignment(config, LAB).submissions(["b*"])) == ["ben", "bert"]
    assert list(Assignment(config, LAB).submissions(["ben", "nobody"])) == ["ben"]
    config.CourseDirectory.student_id_exclude = "anna,bert"
    assert list(Assignment(config, LAB).submissions()) == ["ben"]


def test_links_are_not_followed_and_are_told(tiny, assignment, folder, tmp_path):
    (tmp_path / LAB).mkdir()
    (folder / "linked").symlink_to(tmp_path)
    (folder / "half").mkdir()
    (folder / "half" / LAB).symlink_to(tmp_path / LAB)
    assert assignment.submissions() == {}
    assert set(assignment.skipped) == {"linked", "half"} and "link" in assignment.skipped["half"]


@pytest.mark.parametrize("student", ["<b>x", "a,b", "two words", "gl*b", "x" * 129, "semi;colon", "new\nline"])
def test_ids_that_could_break_pages_or_paths_are_skipped_with_a_reason(assignment, folder, student):
    (folder / student / LAB).mkdir(parents=True)
    assert assignment.submissions() == {}
    assert "rename the folder" in assignment.skipped[student] and "<" not in assignment.skipped[student]


def test_another_directory_structure_is_honoured(tiny, tmp_path):
    config = settings(tiny.root)
    config.CourseDirectory.directory_structure = os.path.join("{nbgrader_step}", "{assignment_id}", "of-{student_id}")
    config.CourseDirectory.submitted_directory = str(tmp_path)
    (tmp_path / LAB / "of-anna").mkdir(parents=True)
    (tmp_path / LAB / "ben").mkdir(parents=True)
    (tiny.root / "labs" / LAB / "of-.").symlink_to(tiny.root / "labs" / LAB)  # where that structure has the release
    try:
        assert Assignment(config, LAB).submissions() == {"anna": tmp_path / LAB / "of-anna"}
    finally:
        (tiny.root / "labs" / LAB / "of-.").unlink()


# --- jobs -----------------------------------------------------------------------------------------------------------
def test_a_job_has_the_students_answers_and_the_hidden_tests(tiny, assignment, folder, released, by_id):
    by_id(released, "double").source = "def double(x):\n    return x + x"
    test = by_id(released, "double-test")
    test.source, test.metadata["nbgrader"]["points"] = "pass", 100
    tiny.submit("anna", LAB, released)
    (job,) = assignment.jobs("anna", folder / "anna" / LAB)
    staged, frame = cells_of(job.staged), cells_of(assignment.frames[LAB])
    assert staged["double"].source == "def double(x):\n    return x + x"
    assert {name: cell.source for name, cell in staged.items() if utils.is_locked(cell)} == {
        name: cell.source for name, cell in frame.items() if utils.is_locked(cell)
    }
    assert {name: cell.metadata for name, cell in staged.items()} == {n: c.metadata for n, c in frame.items()}
    assert job.seed == student_seed(tiny.root / "course", "anna", LAB)
    assert any("double-test was kept as a cell of your own" in note for note in job.notes)
    assert job.staged.cells[0].source.startswith("**About your submission.**") and not is_missing(job.staged)


def test_jobs_are_the_same_each_time_so_that_nothing_is_graded_twice(tiny, assignment, folder, released):
    tiny.submit("anna", LAB, released)
    path = folder / "anna" / LAB
    keys = {job.key("grader") for _ in range(2) for job in assignment.jobs("anna", path)}
    keys |= {job.key("grader") for job in Assignment(settings(tiny.root), LAB).jobs("anna", path)}
    assert len(keys) == 1


def test_the_key_changes_with_submission_timestamp_and_grader_and_else_not(tiny, assignment, folder, released, by_id):
    tiny.submit("anna", LAB, released)
    path = folder / "anna" / LAB
    keys = [assignment.key(assignment.jobs("anna", path), path, "g")]
    (path / "beside.txt").write_text("not used")
    jobs = assignment.jobs("anna", path)
    keys.append(assignment.key(jobs, path, "another grader"))
    (path / "timestamp.txt").write_text("2026-01-31 23:59:00 UTC")
    keys.append(assignment.key(jobs, path, "g"))
    by_id(released, "double").source = "double = abs"
    (path / f"{LAB}.ipynb").write_text(json.dumps(released))
    keys.append(assignment.key(assignment.jobs("anna", path), path, "g"))
    assert len(set(keys)) == 4
    assert assignment.key(assignment.jobs("anna", path), path, "g") == keys[-1]


def test_a_notebook_that_was_not_handed_in_earns_nothing_and_is_told(assignment, folder):
    (folder / "anna" / LAB).mkdir(parents=True)
    (job,) = assignment.jobs("anna", folder / "anna" / LAB)
    assert is_missing(job.staged) and any("was not handed in" in note for note in job.notes)
    assert "could not be graded" in job.staged.cells[0].source
    graded = zero(job)
    assert {mark.cell: mark.score for mark in graded.marks} == {"double-test": 0, "root-test": 0, "explain": 0}


def test_a_damaged_timestamp_is_told_once_and_stops_nothing(tiny, assignment, folder, released):
    tiny.submit("anna", LAB, released)
    (folder / "anna" / LAB / "timestamp.txt").write_text("yesterday")
    (job,) = assignment.jobs("anna", folder / "anna" / LAB)
    assert sum("timestamp.txt was ignored" in note for note in job.notes) == 1


# --- nbgrader's own example course ----------------------------------------------------------------------------------
def test_nbgraders_example_course_has_two_notebooks_and_both_students(quickstart):
    assignment = Assignment(quickstart, "ps1")
    root = Path(quickstart.CourseDirectory.root)
    assert assignment.notebooks == ["problem1", "problem2"]
    assert list(assignment.submissions()) == ["bitdiddle", "hacker"]
    assert assignment.course == root / "course"


@pytest.mark.parametrize("student", ["bitdiddle", "hacker"])
def test_what_is_graded_is_what_nbgrader_would_grade(quickstart, student):
    """Sources and nbgrader's metadata of every cell it knows are those that its own sanitizing gives."""
    assignment = Assignment(quickstart, "ps1")
    path = assignment.submissions()[student]
    for job in assignment.jobs(student, path):
        theirs = nbformat.read(path / f"{job.notebook}.ipynb", as_version=4)
        names = {"notebook": job.notebook, "assignment": "ps1", "db_url": assignment.coursedir.db_url}
        for preprocessor in (ClearOutput, DeduplicateIds, OverwriteKernelspec, OverwriteCells):
            theirs, _ = preprocessor().preprocess(theirs, {"nbgrader": names})
        theirs, ours = cells_of(theirs), cells_of(job.staged)
        assert {name: cell.source for name, cell in ours.items()} == {n: c.source for n, c in theirs.items()}
        assert {name: facts(cell) for name, cell in ours.items()} == {name: facts(c) for name, c in theirs.items()}
