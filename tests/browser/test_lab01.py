"""The fine-tuning lab in a real JupyterLab: run it blank, be told a mistake, answer rightly, choose a dialogue."""

import pytest
from opened import MINUTES, assert_passed, assert_wrong
from playwright.sync_api import expect

pytestmark = [pytest.mark.browser, pytest.mark.models, pytest.mark.timeout(900)]

LAB = "lab01_sft"


def test_a_blank_lab_runs_from_top_to_bottom(lab):
    lab.run_blank("sft.loss")
    lab.picture("sft_blank")


def test_a_wrong_answer_is_told_its_mistake(lab):
    answer = "def response_loss(logits, labels):\n    return F.cross_entropy(logits.flatten(0, 1), labels.flatten())"
    assert_wrong(lab.answer("sft.loss", answer), "does not shift")
    assert "row 2 has labels at 9 to 10 and a gradient at 9, 10" in lab.drawn("gradient_picture(response_loss)")
    lab.picture("sft_wrong")


def test_a_right_answer_passes(lab):
    answer = """def response_loss(logits, labels):
    return F.cross_entropy(logits[:, :-1].transpose(1, 2), labels[:, 1:])"""
    assert_passed(lab.answer("sft.loss", answer), "sft.loss")
    lab.picture("sft_right")


def test_the_prompt_can_be_put_into_the_loss_of_the_strip(lab):
    figure = lab.figure("explore.strip_selector(")
    before = figure.get_attribute("src")
    assert "responses only" in figure.get_attribute("alt")
    lab.show(lab.index("explore.strip_selector(")).get_by_role("checkbox").first.check()
    expect(figure).not_to_have_attribute("src", before, timeout=1 * MINUTES)
    assert "prompt and responses" in lab.figure("explore.strip_selector(").get_attribute("alt")
    lab.picture("sft_strip")
