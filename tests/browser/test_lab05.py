"""The LoRA lab in a real JupyterLab: run it blank, answer wrongly and be told why, answer rightly, move the slider."""

import re

import pytest
from opened import assert_passed, assert_wrong

pytestmark = [pytest.mark.browser, pytest.mark.models, pytest.mark.timeout(900)]

LAB = "lab05_lora"


def test_a_blank_lab_runs_from_top_to_bottom(lab):
    lab.run_blank("lora.merge")
    lab.picture("lora_blank")


def test_a_wrong_answer_is_told_its_mistake(lab):
    answer = "def merge(weight, A, B, alpha):\n    return weight + B @ A"
    assert_wrong(lab.answer("lora.merge", answer), "forgets the alpha / r scale")
    assert "The difference shows" in lab.drawn("merge_picture(merge)")
    lab.show(lab.index("def merge("))
    lab.picture("lora_wrong")


def test_the_named_card_is_found_by_its_role(lab):
    lab.show(lab.index('check("lora.merge"'))
    card = lab.page.get_by_role("status", name=re.compile("lora.merge: not yet right"))
    assert card.count() == 1, "a screen reader announces the verdict by this role and name"


def test_a_right_answer_passes(lab):
    answer = "def merge(weight, A, B, alpha):\n    return weight + alpha / len(A) * B @ A"
    assert_passed(lab.answer("lora.merge", answer), "lora.merge")
    lab.picture("lora_right")


def test_the_slider_changes_the_figure(lab):
    lab.moved("rank_slider(", lab.press("ArrowRight", 3))
    lab.picture("lora_slider")
