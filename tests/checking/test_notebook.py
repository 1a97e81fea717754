"""What a notebook calls: the card, the score, and going on with a right version."""

import pytest
import torch

from lecturekit.checking import check, evaluate, grade, passing
from lecturekit.checking.notebook import SEED_VARIABLE
from lecturekit.tuning import lora


def right(weight, A, B, alpha):
    return weight + alpha / A.shape[0] * (B @ A)


def forgets_scale(weight, A, B, alpha):
    return weight + B @ A


def test_check_prints_the_verdict_outside_a_notebook(capsys):
    assert check("lora.merge", forgets_scale) is None
    text = capsys.readouterr().out
    for words in (
        "lora.merge: not yet right",
        "Looks like: forgets the alpha / r scale",
        "First difference: result[",
        "expected",
        "got",
        "Hint: Every paper run",
        "Slide:",
    ):
        assert words in text
    check("lora.merge", right)
    assert "lora.merge: passed, 6 of 6 cases right" in capsys.readouterr().out


@pytest.mark.parametrize("answer", [None, 3, "merge", forgets_scale, lambda: 1, lambda *a: 1 / 0])
def test_check_never_raises_in_the_students_face(answer, capsys):
    check("lora.merge", answer)
    assert "lora.merge" in capsys.readouterr().out


def test_the_card_can_be_read_by_a_screen_reader_and_holds_no_markup_of_the_student():
    def wrong(weight, A, B, alpha):
        raise ValueError("<script>alert(1)</script>")

    html = evaluate("lora.merge", wrong)._repr_html_()
    assert 'role="status"' in html and 'aria-label="lora.merge: not yet right"' in html
    assert "<script>" not in html and "&lt;script&gt;" in html
    passed = evaluate("lora.merge", right)._repr_html_()
    assert 'aria-label="lora.merge: passed, 6 of 6 cases right"' in passed
    assert "<img" not in passed, "what the card says is text, not colour or pictures"


def test_grade_raises_what_nbgrader_scores_and_tells_no_input(monkeypatch):
    monkeypatch.setenv(SEED_VARIABLE, "abc123")
    grade("lora.merge", right)
    with pytest.raises(AssertionError) as caught:
        grade("lora.merge", forgets_scale)
    text = str(caught.value)
    assert "forgets the alpha / r scale" in text and "Hint" in text
    assert "expected" not in text.replace("not the expected one", "") and "tensor" not in text


def test_grade_uses_the_seed_of_the_environment(monkeypatch):
    seen = []

    def spy(weight, A, B, alpha):
        seen.append(weight.flatten()[0].item())
        return right(weight, A, B, alpha)

    for seed in ("one", "one", "two"):
        monkeypatch.setenv(SEED_VARIABLE, seed)
        grade("lora.merge", spy)
    count = len(seen) // 3
    assert seen[:count] == seen[count : 2 * count] != seen[2 * count :]


def test_passing_gives_the_students_own_when_it_is_right(capsys):
    assert passing("lora.merge", right) is right
    assert capsys.readouterr().out == ""
    assert passing("lora.merge", forgets_scale) is lora.merge
    assert "lora.merge has not passed its check yet" in capsys.readouterr().out


def test_passing_judges_again_when_the_function_behaves_otherwise():
    state = {"scaled": False}

    def merge(weight, A, B, alpha):
        return weight + (alpha / A.shape[0] if state["scaled"] else 1) * (B @ A)

    assert passing("lora.merge", merge) is lora.merge
    state["scaled"] = True
    assert passing("lora.merge", merge) is merge


def test_check_draws_a_card_in_ipython():
    from IPython.testing.globalipapp import start_ipython
    from IPython.utils.capture import capture_output

    shell = start_ipython()
    if shell is None:
        from IPython import get_ipython

        shell = get_ipython()
    with capture_output() as captured:
        check("lora.merge", forgets_scale)
    (output,) = captured.outputs
    assert output.data["text/html"].startswith("<section")
    assert output.data["text/plain"].startswith("lora.merge: not yet right")


def test_a_verdict_is_plain_text_first():
    verdict = evaluate("lora.merge", lambda w, a, b, alpha: torch.zeros_like(w))
    assert str(verdict).splitlines()[0] == "lora.merge: not yet right"
