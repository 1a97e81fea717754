"""The DPO lab in a real JupyterLab: run it blank, make the slide's slip and be told, answer rightly, move β."""

import pytest
from opened import assert_passed, assert_wrong

pytestmark = [pytest.mark.browser, pytest.mark.models, pytest.mark.timeout(900)]

LAB = "lab03_dpo"
SLIP = """def dpo_loss(policy_chosen, policy_rejected, reference_chosen, reference_rejected, beta):
    chosen, rejected = policy_chosen - reference_chosen, policy_rejected - reference_rejected
    return -(F.logsigmoid(beta * chosen) - beta * rejected).mean()"""
RIGHT = """def dpo_loss(policy_chosen, policy_rejected, reference_chosen, reference_rejected, beta):
    margin = policy_chosen - reference_chosen - policy_rejected + reference_rejected
    return F.softplus(-beta * margin).mean()"""


def test_a_blank_lab_runs_from_top_to_bottom(lab):
    lab.run_blank("dpo.loss")
    lab.picture("dpo_blank")


def test_the_slip_of_the_slide_is_named(lab):
    assert_wrong(lab.answer("dpo.loss", SLIP), "Looks like")
    lab.picture("dpo_wrong")


def test_a_right_answer_passes(lab):
    assert_passed(lab.answer("dpo.loss", RIGHT), "dpo.loss")
    lab.picture("dpo_right")


def test_beta_changes_the_surface(lab):
    lab.moved("surface_slider(", lab.press("ArrowRight", 2))
    lab.picture("dpo_surface")
