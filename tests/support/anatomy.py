"""What is asked of every lab as a notebook: its anatomy, and a smoke run with everything and with nothing answered.

A lab's own test file subclasses Anatomy, fills in what is particular to it, and adds tests of its own.
"""

import ast
import re
from collections.abc import Collection, Sequence
from typing import ClassVar

import pytest

from lecturekit import labs
from lecturekit.checking import questions
from lecturekit.grading.judge import locked_modules


def marks(cell):
    return cell.metadata.get("nbgrader", {})


def blank(notebook):
    """The notebook as a student gets it: stubs for solutions, no hidden tests."""
    for cell in notebook.cells:
        if cell.cell_type != "code":
            continue
        cell.source = re.sub(
            r"^( *)### BEGIN SOLUTION.*?### END SOLUTION",
            r"\1raise NotImplementedError",
            cell.source,
            flags=re.S | re.M,
        )
        cell.source = re.sub(r"### BEGIN HIDDEN TESTS.*?### END HIDDEN TESTS", "", cell.source, flags=re.S)
    return notebook


def outputs(notebook):
    return [output for cell in notebook.cells if cell.cell_type == "code" for output in cell.outputs]


def printed(notebook):
    """All that a reader of plain text sees."""
    return "\n".join(
        output.text if output.output_type == "stream" else output.get("data", {}).get("text/plain", "")
        for output in outputs(notebook)
    )


class Anatomy:
    """The tests. Subclasses are called Test… and set the attributes below."""

    LAB: ClassVar[str]
    TOPIC: ClassVar[str]  # what stands before the dot of its questions' ids
    NAMES: ClassVar[Sequence[str]]  # what the answer cells define, in order
    HEADINGS: ClassVar[Sequence[str]]
    CLAIMS: ClassVar[Collection[str]]
    PREDICTION: ClassVar[str]  # one of the names in the cell of predictions
    UNDRAWN: ClassVar[str]  # what a picture says of a question that is not answered
    PICTURES = 7  # at least

    @classmethod
    def source(cls):
        return labs.to_notebook(labs.labs()[cls.LAB])

    @pytest.fixture(scope="class")
    @classmethod
    def notebook(cls):
        return cls.source()

    @pytest.fixture(scope="class")
    @classmethod
    def answered(cls):
        return labs.run(cls.source(), cls.LAB, profile="smoke", quiet=True).notebook

    @pytest.fixture(scope="class")
    @classmethod
    def unanswered(cls):
        return labs.run(blank(cls.source()), cls.LAB, profile="smoke", quiet=True).notebook

    def test_points_sum_to_100_and_are_those_of_the_questions(self, notebook):
        points = {marks(cell)["grade_id"]: marks(cell)["points"] for cell in notebook.cells if marks(cell).get("grade")}
        assert sum(points.values()) == 100
        automatic = {f"{asked.id.replace('.', '-')}-test": asked.points for asked in questions(self.LAB)}
        assert automatic.items() <= points.items()
        assert set(points) - set(automatic) == {f"{self.TOPIC}-explain", f"{self.TOPIC}-wrong"}

    def test_every_question_is_checked_then_graded_in_a_locked_cell(self, notebook):
        tests = [cell for cell in notebook.cells if marks(cell).get("grade") and not marks(cell)["solution"]]
        assert len(tests) == len(self.NAMES)
        for cell in tests:
            assert marks(cell)["locked"]
            asked, given = re.match(rf'check\("({self.TOPIC}\.\w+)", (\w+)\)\n', cell.source).groups()
            hidden = f'### BEGIN HIDDEN TESTS\ngrade("{asked}", {given})\n### END HIDDEN TESTS'
            assert hidden in cell.source

    def test_every_solution_cell_becomes_a_stub_that_parses_and_keeps_its_signature(self, notebook):
        solutions = [cell for cell in notebook.cells if marks(cell).get("solution") and cell.cell_type == "code"]
        names = [ast.parse(cell.source).body[0].name for cell in solutions]
        places = {cell.id for cell in solutions}
        stubs = [cell.source for cell in blank(self.source()).cells if cell.id in places]
        assert [ast.parse(stub).body[0].name for stub in stubs] == names == list(self.NAMES)
        assert all("NotImplementedError" in stub and "SOLUTION" not in stub for stub in stubs)

    def test_right_answers_are_imported_below_the_last_test_only(self, notebook):
        last = max(i for i, cell in enumerate(notebook.cells) if marks(cell).get("grade_id", "").endswith("-test"))
        locked = locked_modules(self.LAB)
        for cell in notebook.cells[: last + 1]:
            imported = {
                name
                for line in (ast.walk(ast.parse(cell.source)) if cell.cell_type == "code" else ())
                if isinstance(line, ast.Import | ast.ImportFrom)
                for name in ([line.module] if isinstance(line, ast.ImportFrom) else [a.name for a in line.names])
            }
            assert not imported & locked

    def test_the_anatomy_is_complete_and_in_order(self, notebook):
        text = "\n".join(cell.source for cell in notebook.cells if cell.cell_type == "markdown")
        assert re.findall(r"^## (?:\d · )?(.+)$", text, flags=re.M) == list(self.HEADINGS)
        first = notebook.cells[0].source
        assert all(word in first for word in ("Slides", "Papers", "Reading", "Computing", "You build", "You measure"))
        assert text.count("<details>") == text.count("</details>") >= 10

    def test_predictions_are_left_to_the_student(self, notebook):
        (cell,) = [cell for cell in notebook.cells if f"{self.PREDICTION} =" in cell.source]
        assert all(
            isinstance(line.value, ast.Constant) and line.value.value is None for line in ast.parse(cell.source).body
        )

    def test_the_colab_cell_does_nothing_elsewhere(self, notebook, monkeypatch):
        cell = next(cell for cell in notebook.cells if cell.cell_type == "code")
        assert "COLAB_RELEASE_TAG" in cell.source and "--no-deps" in cell.source
        monkeypatch.delenv("COLAB_RELEASE_TAG", raising=False)
        monkeypatch.setattr("subprocess.run", lambda *_, **__: pytest.fail("the set-up cell ran a command at home"))
        exec(cell.source, {})

    def test_nothing_that_notebooks_lose(self, notebook):
        code = [cell.source for cell in notebook.cells if cell.cell_type == "code"]
        assert not any(source.rstrip().endswith(";") for source in code)  # jupytext drops it
        assert not any("plt.show" in source or "%matplotlib" in source for source in code)  # figures without alt text
        assert "widgets" not in notebook.metadata  # no saved widget state

    @pytest.mark.slow
    @pytest.mark.models
    def test_answered_every_check_passes(self, answered):
        assert len(re.findall(rf"{self.TOPIC}\.\w+: passed", printed(answered))) == len(self.NAMES)
        assert "course's own version" not in printed(answered)

    @pytest.mark.slow
    @pytest.mark.models
    def test_answered_table_has_the_claims_of_this_lab(self, answered):
        tables = [o.data["text/plain"] for o in outputs(answered) if "text/plain" in o.get("data", {})]
        (table,) = [table for table in tables if f"{self.LAB}: the paper and you" in table]
        assert set(re.findall(r"^(C\d\d) ", table, flags=re.M)) == set(self.CLAIMS)
        assert "smoke profile" in table  # nobody takes these few steps for a measurement

    @pytest.mark.slow
    @pytest.mark.models
    @pytest.mark.parametrize("which", ["answered", "unanswered"])
    def test_every_picture_has_an_alt_text(self, which, request):
        found = outputs(request.getfixturevalue(which))
        images = [image for o in found for image in re.findall(r"<img[^>]*>", o.get("data", {}).get("text/html", ""))]
        assert len(images) >= self.PICTURES and all(re.search(r'alt="[^"]{30,}"', image) for image in images)
        assert not any("image/png" in o.get("data", {}) for o in found)

    @pytest.mark.slow
    @pytest.mark.models
    @pytest.mark.parametrize("which", ["answered", "unanswered"])
    def test_nothing_is_written_to_stderr(self, which, request):
        errors = [o.text for o in outputs(request.getfixturevalue(which)) if o.get("name") == "stderr"]
        assert not errors

    @pytest.mark.slow
    @pytest.mark.models
    def test_unanswered_it_runs_to_the_end_and_says_what_is_missing(self, unanswered):
        text = printed(unanswered)
        assert len(re.findall(rf"{self.TOPIC}\.\w+: not attempted", text)) == len(self.NAMES)
        assert len(re.findall(rf"{self.TOPIC}\.\w+ has not passed its check yet", text)) == len(self.NAMES)
        assert self.UNDRAWN in text
        assert "the paper and you" in text and "Traceback" not in text
