"""The prompting lab in a real JupyterLab: run it blank, answer wrongly and rightly, pick shots, edit a chain."""

import pytest
from opened import assert_passed, assert_wrong

pytestmark = [pytest.mark.browser, pytest.mark.models, pytest.mark.timeout(900)]

LAB = "lab11_prompting"


def test_a_blank_lab_runs_from_top_to_bottom(lab):
    lab.run_blank("icl.score")
    lab.picture("prompting_blank")


def test_a_wrong_answer_is_told_its_mistake(lab):
    answer = "def calibrate(scores, content_free):\n    return (scores + content_free).softmax(dim=1)"
    assert_wrong(lab.answer("icl.calibrate", answer))
    lab.picture("prompting_wrong")


def test_a_right_answer_passes(lab):
    answer = """def calibrate(scores, content_free):
    ratio = (scores - content_free - (scores - content_free).amax(1, keepdim=True)).exp()
    return ratio / ratio.sum(1, keepdim=True)"""
    assert_passed(lab.answer("icl.calibrate", answer), "icl.calibrate")
    assert "0.88 before and 0.50 after" in lab.drawn("calibrate_picture(calibrate)")
    lab.picture("prompting_right")


def test_the_slider_changes_the_figure(lab):
    lab.moved("bias_slider(", lab.press("ArrowLeft", 3))
    lab.picture("prompting_slider")


def test_picking_a_shot_asks_the_model_again(lab):
    said = lab.moved("shot_picker(", lambda cell: cell.locator("select").first.select_option("(no shot)"))
    assert said.startswith("3 shots")
    lab.picture("prompting_shots")


def test_editing_a_step_changes_what_follows(lab):
    def act(cell):
        box = cell.locator("input[type=text]").first
        box.fill("1 + 1 = 50.")
        box.press("Enter")

    said = lab.moved("chain_editor(", act)
    assert "With 1 of" in said and "1 + 1 = 50." in said
    lab.picture("prompting_chain")
