"""The DPO lab in a real JupyterLab: run it blank, make the slide's slip and be told, answer rightly, move β."""

import pytest
from opened import MINUTES, opened
from playwright.sync_api import expect

pytestmark = [pytest.mark.browser, pytest.mark.models, pytest.mark.timeout(900)]

LAB = "lab03_dpo"
SLIP = """def dpo_loss(policy_chosen, policy_rejected, reference_chosen, reference_rejected, beta):
    chosen, rejected = policy_chosen - reference_chosen, policy_rejected - reference_rejected
    return -(F.logsigmoid(beta * chosen) - beta * rejected).mean()"""
RIGHT = """def dpo_loss(policy_chosen, policy_rejected, reference_chosen, reference_rejected, beta):
    margin = policy_chosen - reference_chosen - policy_rejected + reference_rejected
    return F.softplus(-beta * margin).mean()"""


@pytest.fixture(scope="module")
def lab(chromium, jupyterlab):
    with opened(chromium, jupyterlab(LAB)) as notebook:
        yield notebook


def verdict(lab, answer):
    """Type an answer to the loss, run it and its check; the card."""
    lab.type_into(lab.index("def dpo_loss("), answer)
    lab.run_cell(lab.index("def dpo_loss("))
    check = lab.index('check("dpo.loss"')
    lab.run_cell(check)
    return lab.show(check).locator("section.lecturekit-verdict")


def test_a_blank_lab_runs_from_top_to_bottom(lab):
    lab.run_all()
    assert lab.errors() == []
    card = lab.show(lab.index('check("dpo.loss"')).locator("section.lecturekit-verdict")
    assert "not attempted yet" in card.inner_text()
    lab.picture("dpo_blank")


def test_the_slip_of_the_slide_is_named(lab):
    card = verdict(lab, SLIP)
    assert "not yet right" in card.get_attribute("aria-label")
    for words in ("Looks like", "Hint", "First difference", "expected", "got"):
        assert words in card.inner_text()
    lab.picture("dpo_wrong")


def test_a_right_answer_passes(lab):
    assert verdict(lab, RIGHT).get_attribute("aria-label").startswith("dpo.loss: passed")
    lab.picture("dpo_right")


def test_beta_changes_the_surface(lab):
    cell = lab.show(lab.index("surface_slider("))
    figure = cell.locator(".jp-OutputArea-output img").first
    figure.wait_for(timeout=1 * MINUTES)
    before, described = figure.get_attribute("src"), figure.get_attribute("alt")
    cell.get_by_role("slider").first.focus()
    for _ in range(2):
        lab.page.keyboard.press("ArrowRight")
    expect(figure).not_to_have_attribute("src", before, timeout=1 * MINUTES)
    assert cell.locator(".jp-OutputArea-output img").first.get_attribute("alt") != described
    lab.picture("dpo_surface")
