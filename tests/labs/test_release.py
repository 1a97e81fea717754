"""From source to release: the conversion is stable, and every lab in labs/ is in step, clean and runs unanswered."""

import json
import re
import shutil
from pathlib import Path

import nbformat
import pytest

from lecturekit.grading.release import fresh, release
from lecturekit.labs import LabError, UnknownLab, chosen, labs, measure, repository, run, to_notebook, to_text
from lecturekit.results import read

LABS = list(labs())
MARK = '{"grade": false, "grade_id": "%s", "locked": false, "schema_version": 3, "solution": true, "task": false}'
TEST = '{"grade": true, "grade_id": "%s", "locked": true, "points": 3, "schema_version": 3, "solution": false}'
SOURCE = f'''\
# ---
# jupyter:
#   jupytext:
#     text_representation:
#       extension: .py
# ---

# %% [markdown] tags=["intro"]
# # A lab

# %%
import os

# %%
import os

# %% nbgrader={MARK % "part-one"}
def add(a, b):
    """a + b"""
    ### BEGIN SOLUTION
    total = a + b
    return total
    ### END SOLUTION


# %% nbgrader={TEST % "part-one-test"}
assert callable(add)
### BEGIN HIDDEN TESTS
assert add(31, 11) == 42  # the_hidden_case
### END HIDDEN TESTS
'''


@pytest.fixture
def course(tmp_path):
    """A course folder with one small lab."""
    shutil.copy(repository() / "nbgrader_config.py", tmp_path)
    folder = tmp_path / "solutions" / "lab99_small"
    folder.mkdir(parents=True)
    (folder / "lab99_small.py").write_text(SOURCE)
    return tmp_path


def write(course: Path, text: str) -> Path:
    path = course / "solutions" / "lab99_small" / "lab99_small.py"
    path.write_text(text)
    return path


def test_conversion_is_the_same_every_time_and_carries_nothing_stray(course):
    path = labs(course)["lab99_small"]
    notebook = to_notebook(path)
    assert to_text(notebook) == to_text(to_notebook(path))
    nbformat.validate(notebook)
    assert notebook.metadata.keys() == {"kernelspec", "language_info"}
    assert notebook.metadata.language_info == {"name": "python"}
    assert [set(cell.metadata) for cell in notebook.cells] == [{"tags"}, set(), set(), {"nbgrader"}, {"nbgrader"}]


def test_cell_ids_come_from_nbgrader_ids_or_content(course):
    before = [cell.id for cell in to_notebook(labs(course)["lab99_small"]).cells]
    assert before[3:] == ["part-one", "part-one-test"] and len(set(before)) == 5
    path = write(course, SOURCE.replace("# %% [markdown]", "# %%\nprint('new')\n\n# %% [markdown]"))
    assert [cell.id for cell in to_notebook(path).cells][1:] == before  # a new cell leaves the other ids alone


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        ('tags=["intro"]', 'tagz=["intro"]', "cell 1: unknown metadata tagz"),
        ("part-one-test", "part-one", "'part-one' is used twice"),
        ("part-one-test", "part.one", "letters, digits, - and _, got 'part.one'"),
    ],
)
def test_a_slip_in_a_source_is_named(course, old, new, words):
    path = write(course, SOURCE.replace(old, new))
    with pytest.raises(LabError, match=re.escape(words)):
        to_notebook(path)


def test_an_unknown_lab_is_named(course):
    with pytest.raises(UnknownLab, match="there is no lab 'lab00'; labs: lab99_small"):
        chosen(["lab00"], course)


def test_release_is_byte_stable_and_holds_no_answer(course):
    (path,) = release([], course)
    assert path == course / "labs" / "lab99_small" / "lab99_small.ipynb"
    first = path.read_bytes()
    assert release(["lab99_small"], course) == [path] and path.read_bytes() == first
    assert fresh("lab99_small", course) == first
    text = first.decode()
    assert "total" not in text and "the_hidden_case" not in text and "SOLUTION" not in text and "HIDDEN" not in text
    assert "raise NotImplementedError" in text and "assert callable(add)" in text
    assert [p.name for p in path.parent.iterdir()] == [path.name]  # above all not the source
    assert not list(course.glob("course/release-*"))


def test_formgraders_generate_button_writes_the_same_bytes(course):
    from nbgrader.apps import NbGraderAPI

    from lecturekit.grading.course import settings

    (path,) = release([], course)
    first = path.read_bytes()
    result = NbGraderAPI(config=settings(course)).generate_assignment("lab99_small", force=True)
    assert result["success"] and path.read_bytes() == first


def test_a_refusal_gives_nbgraders_reason_and_leaves_the_release_alone(course):
    (path,) = release([], course)
    first = path.read_bytes()
    write(course, SOURCE.replace("    ### END SOLUTION\n", ""))
    with pytest.raises(LabError, match="could not release lab99_small: .*[Nn]o end solution"):
        release([], course)
    assert path.read_bytes() == first and not list(course.glob("course/release-*"))


def test_run_names_the_lab_the_cell_and_the_error(course):
    notebook = to_notebook(labs(course)["lab99_small"])
    notebook.cells[2].source = "import os\n1 / 0"
    with pytest.raises(LabError, match=r"lab99_small, cell 3 of 5 \(\w+\): (.|\n)*ZeroDivisionError"):
        run(notebook, "lab99_small", quiet=True)
    notebook.cells[2].source = "import os\nos._exit(1)"
    with pytest.raises(LabError, match="cell 3 of 5 .*the kernel died"):
        run(notebook, "lab99_small", quiet=True)
    notebook.cells[2].source = "import time\ntime.sleep(60)"
    with pytest.raises(LabError, match="cell 3 of 5 .*no end after 1 s"):
        run(notebook, "lab99_small", timeout=1, quiet=True)


def test_run_sets_the_profile_and_reports_memory(course, capsys):
    notebook = to_notebook(labs(course)["lab99_small"])
    held = 200 * 2**20
    notebook.cells[2].source = f"held = bytes(range(256)) * {held // 256}\nimport os\n"
    notebook.cells[2].source += "print(os.environ['LECTUREKIT_PROFILE'], os.environ.get('LECTUREKIT_RECORD'))"
    before = json.dumps(notebook)
    done = run(notebook, "lab99_small", profile="smoke")
    assert json.dumps(notebook) == before
    assert done.notebook.cells[2].outputs[0].text == "smoke None\n"
    assert len(done.notebook.cells) == len(notebook.cells)
    assert done.peak_bytes is not None and done.peak_bytes > held
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 4 and all(line.startswith("lab99_small") for line in lines)
    with pytest.raises(ValueError, match="profile must be one of smoke, full, got 'fast'"):
        run(notebook, "lab99_small", profile="fast")


def test_a_full_run_records_what_it_measures(course, capsys, monkeypatch):
    monkeypatch.delenv("LECTUREKIT_RESULTS", raising=False)
    measuring = "\n# %%\nfrom lecturekit import results\n\nresults.record('C23', 'scale over mean', 1, add(0, 1))\n"
    write(course, SOURCE + measuring)
    ((lab, done),) = measure([], course)
    (entry,) = read(course / "docs" / "results" / "lab99_small.json")
    assert lab == "lab99_small" and done.seconds > 0
    assert (entry["claim"], entry["ours"], entry["profile"]) == ("C23", 1, "full")
    assert "GiB at most" in capsys.readouterr().out.splitlines()[-1]


# the labs of the course ----------------------------------------------------------------------------------------------


def regions(source: str, name: str) -> list[str]:
    """The texts between BEGIN name and END name, the comment signs of markdown cells taken off."""
    found = re.findall(rf"BEGIN {name}[^\n]*\n(.*?)\n[^\n]*END {name}", source, re.DOTALL)
    return [re.sub(r"^# ?", "", text, flags=re.MULTILINE) for text in found]


@pytest.fixture(scope="module")
def released():
    """Each lab's notebook as it is committed, read once."""
    return {lab: repository() / "labs" / lab / f"{lab}.ipynb" for lab in LABS}


@pytest.mark.parametrize("lab", LABS)
def test_labs_are_in_step_with_solutions(lab, released):
    assert released[lab].read_bytes() == fresh(lab), f"run `lecturekit release {lab}` and commit labs/"


@pytest.mark.parametrize("lab", LABS)
def test_no_solution_and_no_hidden_test_is_released(lab, released):
    source = labs()[lab].read_text()
    solutions, hidden = regions(source, "SOLUTION"), regions(source, "HIDDEN TESTS")
    assert solutions and hidden
    notebook = nbformat.read(released[lab], as_version=4)
    text = "\n".join(cell.source for cell in notebook.cells)
    assert "BEGIN SOLUTION" not in text and "HIDDEN TESTS" not in text
    answers = "\n".join(cell.source for cell in notebook.cells if cell.metadata.get("nbgrader", {}).get("solution"))
    for block in solutions:
        assert block.strip() not in text
        for line in filter(None, map(str.strip, block.splitlines())):
            # lines such as "return y" may stand in the given part of an answer cell; telling ones may not
            assert len(line) < 20 or line not in answers, line
    for cell in to_notebook(labs()[lab]).cells:  # answers without markers are replaced as a whole
        if cell.metadata.get("nbgrader", {}).get("solution") and "BEGIN SOLUTION" not in cell.source:
            for line in filter(None, map(str.strip, cell.source.splitlines())):
                assert line not in text, line
    for block in hidden:
        for line in filter(None, map(str.strip, block.splitlines())):
            assert line not in text, line


@pytest.mark.parametrize("lab", LABS)
def test_release_has_no_outputs_and_no_noise(lab, released):
    notebook = nbformat.read(released[lab], as_version=4)
    nbformat.validate(notebook)
    assert set(notebook.metadata) == {"kernelspec", "language_info"}
    assert set(notebook.metadata.language_info) == {"name"}
    for cell in notebook.cells:
        assert set(cell.metadata) <= {"nbgrader", "tags", "jupyter", "deletable", "editable"}
        assert cell.cell_type != "code" or (cell.outputs == [] and cell.execution_count is None)


@pytest.mark.parametrize("lab", LABS)
def test_points_sum_to_100(lab, released):
    notebook = nbformat.read(released[lab], as_version=4)
    marks = [cell.metadata.nbgrader for cell in notebook.cells if "nbgrader" in cell.metadata]
    assert sum(mark.points for mark in marks if mark.grade) == 100


@pytest.mark.slow
@pytest.mark.models
@pytest.mark.parametrize("lab", LABS)
def test_lab_runs_from_top_to_bottom_with_nothing_answered(lab, released):
    run(nbformat.read(released[lab], as_version=4), lab, profile="smoke", timeout=120, quiet=True)
