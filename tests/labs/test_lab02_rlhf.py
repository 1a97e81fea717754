"""Lab 2 as a notebook: its anatomy, and what a smoke run shows with everything answered and with nothing answered."""

import ast
import re

import pytest

from lecturekit import labs
from lecturekit.checking import questions

LAB = "lab02_rlhf"


@pytest.fixture(scope="module")
def notebook():
    return labs.to_notebook(labs.labs()[LAB])


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


def run(notebook):
    return labs.run(notebook, LAB, profile="smoke", quiet=True).notebook


@pytest.fixture(scope="module")
def answered():
    return run(labs.to_notebook(labs.labs()[LAB]))


@pytest.fixture(scope="module")
def unanswered():
    return run(blank(labs.to_notebook(labs.labs()[LAB])))


def outputs(notebook):
    return [output for cell in notebook.cells if cell.cell_type == "code" for output in cell.outputs]


def printed(notebook):
    """All that a reader of plain text sees."""
    return "\n".join(
        output.text if output.output_type == "stream" else output.get("data", {}).get("text/plain", "")
        for output in outputs(notebook)
    )


def test_points_sum_to_100_and_are_those_of_the_questions(notebook):
    points = {marks(cell)["grade_id"]: marks(cell)["points"] for cell in notebook.cells if marks(cell).get("grade")}
    assert sum(points.values()) == 100
    automatic = {asked.id: asked.points for asked in questions() if asked.lab == LAB}
    assert {f"{name.replace('.', '-')}-test": worth for name, worth in automatic.items()}.items() <= points.items()
    assert set(points) - {f"{name.replace('.', '-')}-test" for name in automatic} == {"rlhf-explain", "rlhf-wrong"}


def test_every_question_is_checked_then_graded_in_a_locked_cell(notebook):
    tests = [cell for cell in notebook.cells if marks(cell).get("grade") and not marks(cell)["solution"]]
    assert len(tests) == 6
    for cell in tests:
        assert marks(cell)["locked"]
        asked, given = re.match(r'check\("(rlhf\.\w+)", (\w+)\)\n', cell.source).groups()
        hidden = f'### BEGIN HIDDEN TESTS\ngrade("{asked}", {given})\n### END HIDDEN TESTS'
        assert hidden in cell.source


def test_every_solution_cell_becomes_a_stub_that_parses_and_keeps_its_signature(notebook):
    solutions = [cell for cell in notebook.cells if marks(cell).get("solution") and cell.cell_type == "code"]
    names = [ast.parse(cell.source).body[0].name for cell in solutions]
    stubs = [
        cell.source for cell in blank(labs.to_notebook(labs.labs()[LAB])).cells if cell.id in {c.id for c in solutions}
    ]
    assert [ast.parse(stub).body[0].name for stub in stubs] == names
    assert names == [
        "reward_loss", "kl_estimators", "token_rewards", "advantages_and_returns", "policy_loss", "group_advantages",
    ]  # fmt: skip
    assert all("NotImplementedError" in stub and "SOLUTION" not in stub for stub in stubs)


def test_right_answers_are_imported_below_the_last_test_only(notebook):
    last = max(i for i, cell in enumerate(notebook.cells) if marks(cell).get("grade_id", "").endswith("-test"))
    for cell in notebook.cells[: last + 1]:
        assert cell.cell_type != "code" or "lecturekit.alignment" not in cell.source


def test_the_anatomy_is_complete_and_in_order(notebook):
    text = "\n".join(cell.source for cell in notebook.cells if cell.cell_type == "markdown")
    headings = re.findall(r"^## (?:\d · )?(.+)$", text, flags=re.M)
    assert headings == [
        "Set-up", "Predict", "The idea", "Build",
        "Measure: the whole frontier, on a model small enough to repeat it", "Measure: a real model, a learned reward",
        "The paper and you", "Explain",
    ]  # fmt: skip
    first = notebook.cells[0].source
    assert all(word in first for word in ("Slides", "Papers", "Reading", "Computing", "You build", "You measure"))
    assert text.count("<details>") == text.count("</details>") >= 10


def test_predictions_are_left_to_the_student(notebook):
    (cell,) = [cell for cell in notebook.cells if "predicted_accuracy =" in cell.source]
    assert all(
        isinstance(line.value, ast.Constant) and line.value.value is None for line in ast.parse(cell.source).body
    )


def test_the_example_of_the_model_answer_is_right():
    """Section 7.2 works one example by hand."""
    from math import log

    policy, reference = (0.5, 0.5), (0.6, 0.4)
    k1 = [log(p / r) for p, r in zip(policy, reference, strict=True)]
    assert [round(k, 2) for k in k1] == [-0.18, 0.22]
    assert round(sum(p * k for p, k in zip(policy, k1, strict=True)), 3) == 0.020
    assert round(sum(p * abs(k) for p, k in zip(policy, k1, strict=True)), 2) == 0.20


def test_the_colab_cell_does_nothing_elsewhere(notebook, monkeypatch):
    cell = next(cell for cell in notebook.cells if cell.cell_type == "code")
    assert "COLAB_RELEASE_TAG" in cell.source and "--no-deps" in cell.source
    monkeypatch.delenv("COLAB_RELEASE_TAG", raising=False)
    monkeypatch.setattr("subprocess.run", lambda *_, **__: pytest.fail("the set-up cell ran a command outside Colab"))
    exec(cell.source, {})


def test_nothing_that_notebooks_lose(notebook):
    code = [cell.source for cell in notebook.cells if cell.cell_type == "code"]
    assert not any(source.rstrip().endswith(";") for source in code)  # jupytext drops it
    assert not any("plt.show" in source or "%matplotlib" in source for source in code)  # figures without alt text
    assert "widgets" not in notebook.metadata  # no saved widget state


@pytest.mark.slow
@pytest.mark.models
def test_answered_every_check_passes(answered):
    assert len(re.findall(r"rlhf\.\w+: passed", printed(answered))) == 6
    assert "course's own version" not in printed(answered)


@pytest.mark.slow
@pytest.mark.models
def test_answered_table_has_the_claims_of_this_lab(answered):
    table = next(o.data for o in outputs(answered) if "the paper and you" in o.get("data", {}).get("text/plain", ""))
    assert set(re.findall(r"^(C\d\d) ", table["text/plain"], flags=re.M)) == {"C03", "C04"}
    assert "smoke profile" in table["text/plain"]  # nobody takes these few steps for a measurement


@pytest.mark.slow
@pytest.mark.models
@pytest.mark.parametrize("which", ["answered", "unanswered"])
def test_every_picture_has_an_alt_text(which, request):
    found = outputs(request.getfixturevalue(which))
    images = [image for o in found for image in re.findall(r"<img[^>]*>", o.get("data", {}).get("text/html", ""))]
    assert len(images) >= 9 and all(re.search(r'alt="[^"]{30,}"', image) for image in images)
    assert not any("image/png" in o.get("data", {}) for o in found)


@pytest.mark.slow
@pytest.mark.models
@pytest.mark.parametrize("which", ["answered", "unanswered"])
def test_nothing_is_written_to_stderr(which, request):
    errors = [o.text for o in outputs(request.getfixturevalue(which)) if o.get("name") == "stderr"]
    assert not errors


@pytest.mark.slow
@pytest.mark.models
def test_unanswered_it_runs_to_the_end_and_says_what_is_missing(unanswered):
    text = printed(unanswered)
    assert len(re.findall(r"rlhf\.\w+: not attempted", text)) == 6
    assert len(re.findall(r"rlhf\.\w+ has not passed its check yet", text)) == 6
    assert "Your kl_estimators gave nothing to draw: is not written yet" in text
    assert "the paper and you" in text and "Traceback" not in text
