"""The RLHF lab in a real JupyterLab: run it blank, answer wrongly and be told why, answer rightly, move β."""

import pytest
from opened import assert_passed, assert_wrong

pytestmark = [pytest.mark.browser, pytest.mark.models, pytest.mark.timeout(900)]

LAB = "lab02_rlhf"


def test_a_blank_lab_runs_from_top_to_bottom(lab):
    lab.run_blank("rlhf.rewards")
    lab.picture("rlhf_blank")


def test_a_wrong_answer_is_told_its_mistake(lab):
    answer = """def token_rewards(score, logprobs, reference, mask, beta):
    return (score[:, None] - beta * (logprobs - reference)) * mask"""
    assert_wrong(lab.answer("rlhf.rewards", answer), "gives the score to every token")
    lab.picture("rlhf_wrong")


def test_a_right_answer_passes(lab):
    answer = """def policy_loss(logprobs, old_logprobs, advantages, mask, epsilon):
    rho = (logprobs - old_logprobs).exp()
    terms = torch.minimum(rho * advantages, rho.clamp(1 - epsilon, 1 + epsilon) * advantages)
    return -(terms * mask).sum() / mask.sum()"""
    assert_passed(lab.answer("rlhf.clip", answer), "rlhf.clip")
    assert lab.drawn("clip_picture(policy_loss)").count("your curve is right") == 2
    lab.picture("rlhf_right")


def test_the_slider_changes_the_figure(lab):
    lab.moved("beta_slider(", lab.press("ArrowLeft", 3))
    lab.picture("rlhf_slider")
