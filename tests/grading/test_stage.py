"""Staging: whatever happened to a notebook, it is rebuilt on the release, with the student's own work in its place."""

import copy
import json
import random

import nbformat
import pytest
from nbformat.v4 import new_code_cell, new_markdown_cell, new_raw_cell

from lecturekit.grading.stage import MISSING, stage

LAB = "lab99_tiny"
DOUBLE = "def double(x):\n    return 2 * x"


@pytest.fixture
def submission(released, by_id):
    """The released notebook with one answer in it."""
    notebook = copy.deepcopy(released)
    by_id(notebook, "double").source = DOUBLE
    return notebook


def sources(notebook):
    return [cell.source for cell in notebook.cells]


def index(notebook, by_id, name):
    return notebook.cells.index(by_id(notebook, name))


def test_an_untouched_notebook_comes_back_as_the_release(released):
    staged = stage(copy.deepcopy(released), released)
    assert staged.notebook == released and staged.notes == []


def test_only_the_answer_is_taken_over(submission, released, by_id):
    expected = copy.deepcopy(released)
    by_id(expected, "double").source = DOUBLE
    for cell in submission.cells:
        cell.metadata["tags"] = ["mine"]
        if cell.cell_type == "code":
            cell.outputs = [nbformat.v4.new_output("stream", text="left over")]
            cell.execution_count = 7
    submission.metadata["mine"] = True
    staged = stage(submission, released)
    assert staged.notebook == expected and staged.notes == []


def test_neither_notebook_is_changed(submission, released):
    submission.cells.append(new_code_cell("x = 1"))
    before = copy.deepcopy((submission, released))
    stage(submission, released)
    assert (submission, released) == before


def test_own_cells_stay_where_they_were(submission, released, by_id):
    top, between, end = new_markdown_cell("My notes"), new_code_cell("helper = 1"), new_code_cell("print(helper)")
    submission.cells.insert(0, top)
    submission.cells.insert(index(submission, by_id, "double"), between)
    submission.cells.append(end)
    staged = stage(submission, released).notebook
    assert sources(staged) == sources(submission)
    assert len({cell.id for cell in staged.cells}) == len(staged.cells)
    assert all(cell.metadata == {} for cell in staged.cells if cell.id.startswith("own-cell"))


@pytest.mark.parametrize("name", ["double-test", "explain", "double"])
def test_a_plain_copy_is_left_out(submission, released, by_id, name):
    cell = copy.deepcopy(by_id(submission, name))
    cell.id = "pasted"
    submission.cells.append(cell)
    staged = stage(submission, released)
    places = [c for c in staged.notebook.cells if c.source == cell.source]
    assert len([c for c in places if c.metadata.get("nbgrader")]) == 1
    assert len(places) == (2 if name == "double" else 1)  # a copied answer may as well run again


def test_of_two_answers_the_last_above_the_test_counts(submission, released, by_id):
    old, later = copy.deepcopy(by_id(submission, "double")), copy.deepcopy(by_id(submission, "double"))
    old.source, old.id = "def double(x):\n    return 0  # first try", "old"
    later.source, later.id = "double(4)  # playing", "later"
    submission.cells.insert(index(submission, by_id, "double"), old)
    submission.cells.insert(index(submission, by_id, "double-test") + 1, later)
    staged = stage(submission, released).notebook
    assert by_id(staged, "double").source == DOUBLE
    staged_sources = [source for source in sources(staged) if not source.startswith("**About")]
    assert staged_sources == sources(submission)


def test_a_stub_kept_beside_the_answer_does_not_count(submission, released, by_id):
    stub = copy.deepcopy(by_id(released, "double"))
    stub.id = "kept-stub"
    submission.cells.insert(index(submission, by_id, "double") + 1, stub)
    staged = stage(submission, released).notebook
    assert by_id(staged, "double").source == DOUBLE
    assert stub.source not in sources(staged)


def test_an_answer_split_in_two_runs_in_order(submission, released, by_id):
    """JupyterLab's Split Cell gives both halves the nbgrader id."""
    second = copy.deepcopy(by_id(submission, "double"))
    by_id(submission, "double").source = "def helper(x):\n    return 2 * x"
    second.source, second.id = "def double(x):\n    return helper(x)", "second-half"
    submission.cells.insert(index(submission, by_id, "double") + 1, second)
    staged = stage(submission, released).notebook
    order = sources(staged)
    assert order.index("def helper(x):\n    return 2 * x") < order.index(second.source)
    assert by_id(staged, "double").source == second.source


def test_deleted_cells_come_back(submission, released, by_id):
    for name in ("double-test", "explain", "root"):
        submission.cells.remove(by_id(submission, name))
    staged = stage(submission, released)
    for name in ("double-test", "explain"):
        assert by_id(staged.notebook, name) == by_id(released, name)
    # the stub would hide an answer that was moved to a cell of the student's own
    assert by_id(staged.notebook, "root").source == MISSING
    assert "The answer cell root was missing and has been put back." in staged.notes


def test_changed_tests_and_points_are_replaced(submission, released, by_id):
    by_id(submission, "double-test").source = "assert True"
    by_id(submission, "root-test").metadata.nbgrader.points = 99
    staged = stage(submission, released)
    assert by_id(staged.notebook, "double-test") == by_id(released, "double-test")
    assert by_id(staged.notebook, "root-test") == by_id(released, "root-test")
    kept = next(cell for cell in staged.notebook.cells if cell.source == "assert True")
    assert kept.metadata == {} and any("earns no points" in note for note in staged.notes)


def test_set_up_code_may_be_edited(submission, released):
    cell = next(cell for cell in submission.cells if cell.source.startswith("import math"))
    cell.source += "\nimport itertools"
    staged = stage(submission, released)
    assert sources(staged.notebook) == sources(submission) and staged.notes == []


def test_cells_are_known_when_their_metadata_is_lost(submission, released, by_id):
    for cell in submission.cells:
        cell.metadata = {}
    staged = stage(submission, released).notebook
    assert by_id(staged, "double").source == DOUBLE and len(staged.cells) == len(released.cells)


def test_cells_are_known_by_the_id_that_colab_keeps(submission, released, by_id):
    for number, cell in enumerate(submission.cells):
        cell.metadata = {"id": cell.id}
        cell.id = f"colab-{number}"
    assert by_id(stage(submission, released).notebook, "double").source == DOUBLE


def test_windows_line_ends_are_no_change(submission, released):
    for cell in submission.cells:
        cell.source = cell.source.replace("\n", "  \r\n") + "\r\n"
    staged = stage(submission, released)
    assert staged.notes == [] and len(staged.notebook.cells) == len(released.cells)


def test_pictures_come_with_a_written_answer_and_markup_does_not(submission, released, by_id):
    cell = by_id(submission, "explain")
    cell.source = "See ![sketch](attachment:sketch.png)"
    png, svg = {"sketch.png": {"image/png": "aGk="}}, {"evil.svg": {"image/svg+xml": "<svg onload='x()'/>"}}
    cell.attachments = png | svg
    assert by_id(stage(submission, released).notebook, "explain").attachments == png


def test_raw_cells_are_left_out_and_named(submission, released):
    submission.cells.append(new_raw_cell("<script>alert(1)</script>"))
    staged = stage(submission, released)
    assert "<script>" not in json.dumps(staged.notebook) and "raw cell was left out" in staged.notes[0]


def test_a_changed_cell_type_is_put_right(submission, released, by_id):
    by_id(submission, "double").cell_type = "markdown"
    assert by_id(stage(submission, released).notebook, "double").cell_type == "code"


BROKEN = [None, "text", 5, [], ["double"], {"grade_id": None}, {"grade_id": ["x"]}, {"grade_id": "double-test"}, {}]


@pytest.mark.parametrize("seed", range(20))
def test_any_mess_gives_a_notebook_that_nbgrader_accepts(submission, released, seed):
    """Cells shuffled, copied, dropped and with random metadata: every nbgrader cell is there once, as released."""
    from nbgrader.nbgraderformat import MetadataValidator

    random_mess = random.Random(seed)
    cells = random_mess.choices(submission.cells, k=random_mess.randint(0, 15))
    submission.cells = copy.deepcopy(cells)
    for cell in submission.cells:
        if random_mess.random() < 0.4:
            cell.metadata = random_mess.choice([{"nbgrader": random_mess.choice(BROKEN)}, {"id": 3}, {}, None])
        if random_mess.random() < 0.3:
            cell.source = random_mess.choice(["", "x = 1", ["a = 1\n", "b = 2"], None])
        if random_mess.random() < 0.2:
            cell.pop(random_mess.choice(["id", "metadata", "source"]), None)
    staged = stage(submission, released).notebook
    nbformat.validate(staged)
    MetadataValidator().validate_nb(staged)

    def frame(notebook):
        """What must be as released: every nbgrader mark, in order, and the source of what may not be edited."""
        marked = [cell for cell in notebook.cells if "nbgrader" in cell.metadata]
        return [(c.id, c.metadata, None if c.metadata.nbgrader.solution else c.source) for c in marked]

    assert frame(staged) == frame(released)


def test_without_a_release_the_error_says_what_to_do(new_course, tmp_path):
    course = new_course(tmp_path / "course")
    from nbgrader.api import Gradebook

    (course.root / "course").mkdir()
    with Gradebook(f"sqlite:///{course.root / 'course' / 'gradebook.db'}") as gradebook:
        gradebook.add_assignment(LAB)
        gradebook.add_notebook(LAB, LAB)
    course.submit("anna", LAB, nbformat.v4.new_notebook())
    done = course.nbgrader("autograde", LAB)
    assert done.returncode != 0 and f"run `lecturekit release {LAB}`" in done.stderr
