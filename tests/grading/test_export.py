"""Marks for Canvas and Moodle through the real `nbgrader export`: right, final, and no formula among them."""

import csv
import stat

import pytest
from nbgrader.api import Gradebook

from lecturekit.grading.export import harmless, number

LAB = "lab99_tiny"


@pytest.fixture(scope="module")
def marked(tiny):
    """The tiny lab (10 points) with a gradebook in which each student is in another state."""
    with Gradebook(f"sqlite:///{tiny.root / 'course' / 'gradebook.db'}") as gradebook:

        def student(name, scores, manual=None, waiting=False, penalty=None, **person):
            gradebook.add_student(name, **person)
            if scores is None:
                return
            gradebook.add_submission(LAB, name)
            submission = gradebook.find_submission_notebook(LAB, LAB, name)
            submission.late_submission_penalty = penalty
            for cell, score in zip(("double-test", "root-test", "explain"), scores, strict=True):
                grade = gradebook.find_grade(cell, LAB, LAB, name)
                grade.auto_score, grade.needs_manual_grade = score, waiting and cell == "explain"
                if cell == "explain":
                    grade.manual_score = manual
            gradebook.db.commit()

        student("ada", (3, 5, None), 1.5, first_name="Ada", last_name="Lovelace", email="ada@x.org", lms_user_id="42")
        student("late", (3, 5, None), 2, penalty=3.25)
        student("very-late", (3, 0, None), 0, penalty=100)
        student("waiting", (3, 5, None), waiting=True, first_name="Wai", last_name="Ting")
        student("not-run", (None, None, None))
        student("absent", None)
        student("evil", (0, 0, None), 0, first_name='=HYPERLINK("http://evil.example")', last_name="@SUM(A1)\r\n=1")
        student("-minus", (0, 5, None), 1, first_name='Quo"te', last_name="O'Brien, Zoë", email="\t=1+1")
    return tiny


def export(course, exporter, *words):
    path = course.root / f"{exporter}.csv"
    done = course.nbgrader("export", "--exporter", f"lecturekit.grading.export.{exporter}", "--to", str(path), *words)
    assert done.returncode == 0, done.stderr[-2000:]
    with open(path, newline="", encoding="utf-8") as file:
        return list(csv.reader(file)), done.stderr, path


@pytest.fixture(scope="module")
def canvas(marked):
    return export(marked, "CanvasExport")


@pytest.fixture(scope="module")
def moodle(marked):
    return export(marked, "MoodleExport", "--assignment", f'["{LAB}"]')


MARKS = {
    "ada": "9.5",
    "late": "6.75",
    "very-late": "0",
    "waiting": "",
    "not-run": "",
    "absent": "",
    "evil": "0",
    "'-minus": "6",
}


def test_canvas_file_has_canvas_columns_and_the_right_marks(canvas):
    rows, _, _ = canvas
    assert rows[0] == ["Student", "ID", "SIS User ID", "SIS Login ID", "Section", LAB]
    assert rows[1] == ["    Points Possible", "", "", "", "", "10"]
    assert {row[3]: row[5] for row in rows[2:]} == MARKS
    assert next(row for row in rows if row[3] == "ada")[:2] == ["Lovelace, Ada", "42"]
    assert {len(row) for row in rows} == {6}


def test_canvas_number_of_the_assignment_stands_in_brackets(marked):
    rows, _, _ = export(marked, "CanvasExport", f"--CanvasExport.assignment_ids={LAB}=1234", "--student", '["ada"]')
    assert rows[0][5] == f"{LAB} (1234)" and [row[3] for row in rows[2:]] == ["ada"]


def test_moodle_file_has_the_worksheets_columns_and_the_right_marks(moodle):
    rows, _, _ = moodle
    assert rows[0] == ["Identifier", "Full name", "Email address", "Grade", "Maximum grade", "Feedback comments"]
    assert ["Participant 42", "Ada Lovelace", "ada@x.org", "9.5", "10", ""] in rows
    marks = {row[0]: row[3] for row in rows[1:]}
    assert marks.pop("Participant 42") == MARKS["ada"]
    assert marks == {name: mark for name, mark in MARKS.items() if name != "ada"}


def test_what_is_not_final_is_left_empty_and_counted(canvas, moodle):
    for _, log, _ in (canvas, moodle):
        assert "2 submissions are not fully graded" in log
        assert "1 students handed nothing in" in log


def test_no_cell_is_a_formula(canvas, moodle):
    for rows, _, _ in (canvas, moodle):
        cells = [cell for row in rows for cell in row]
        assert not [cell for cell in cells if cell.startswith(("=", "+", "-", "@", "\t", "\r", "\n"))]
        assert any("HYPERLINK" in cell for cell in cells)  # it was there to be neutralised


def test_the_file_is_its_owners_only(canvas):
    assert stat.S_IMODE(canvas[2].stat().st_mode) == 0o600


def test_an_unknown_assignment_is_refused(marked):
    done = marked.nbgrader("export", "--exporter", "lecturekit.grading.export.MoodleExport", "--assignment", '["none"]')
    assert done.returncode != 0 and "no assignment 'none'" in done.stderr


@pytest.mark.parametrize("text", ["=1", "+1", "-1", "@a", "\t=1", "\r=1", "\n=1", "  =1", "＝1"])
def test_a_text_that_looks_like_a_formula_gets_an_apostrophe(text):
    assert harmless(text).startswith("'")


def test_ordinary_text_and_numbers_stay():
    assert harmless("O'Brien, Zoë") == "O'Brien, Zoë" and harmless(None) == ""
    assert [number(x) for x in (0, 10, 9.5, 1 / 3, 1e-9, 100000)] == ["0", "10", "9.5", "0.3333", "0", "100000"]
