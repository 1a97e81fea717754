"""The RLHF lab in a real JupyterLab: run it blank, answer wrongly and be told why, answer rightly, move β."""

import pytest
from opened import MINUTES, opened
from playwright.sync_api import expect

pytestmark = [pytest.mark.browser, pytest.mark.models, pytest.mark.timeout(900)]

LAB = "lab02_rlhf"


@pytest.fixture(scope="module")
def lab(chromium, jupyterlab):
    with opened(chromium, jupyterlab(LAB)) as notebook:
        yield notebook


def test_a_blank_lab_runs_from_top_to_bottom(lab):
    lab.run_all()
    assert lab.errors() == []
    card = lab.show(lab.index('check("rlhf.rewards"')).locator("section.lecturekit-verdict")
    assert "not attempted yet" in card.inner_text()
    lab.picture("rlhf_blank")


def test_a_wrong_answer_is_told_its_mistake(lab):
    lab.type_into(
        lab.index("def token_rewards("),
        "def token_rewards(score, logprobs, reference, mask, beta):\n"
        "    return (score[:, None] - beta * (logprobs - reference)) * mask",
    )
    lab.run_cell(lab.index("def token_rewards("))
    check = lab.index('check("rlhf.rewards"')
    lab.run_cell(check)
    card = lab.show(check).locator("section.lecturekit-verdict")
    assert "not yet right" in card.get_attribute("aria-label")
    for words in ("gives the score to every token", "Hint", "First difference", "expected", "got"):
        assert words in card.inner_text()
    lab.picture("rlhf_wrong")


def test_a_right_answer_passes(lab):
    lab.type_into(
        lab.index("def policy_loss("),
        "def policy_loss(logprobs, old_logprobs, advantages, mask, epsilon):\n"
        "    rho = (logprobs - old_logprobs).exp()\n"
        "    terms = torch.minimum(rho * advantages, rho.clamp(1 - epsilon, 1 + epsilon) * advantages)\n"
        "    return -(terms * mask).sum() / mask.sum()",
    )
    lab.run_cell(lab.index("def policy_loss("))
    check = lab.index('check("rlhf.clip"')
    lab.run_cell(check)
    card = lab.show(check).locator("section.lecturekit-verdict")
    assert card.get_attribute("aria-label").startswith("rlhf.clip: passed")
    drawn = lab.index("clip_picture(policy_loss)")
    lab.run_cell(drawn)
    picture = lab.show(drawn).locator(".jp-OutputArea-output img").first
    assert picture.get_attribute("alt").count("your curve is right") == 2
    lab.picture("rlhf_right")


def test_the_slider_changes_the_figure(lab):
    cell = lab.show(lab.index("beta_slider("))
    figure = cell.locator(".jp-OutputArea-output img").first
    figure.wait_for(timeout=1 * MINUTES)
    before, described = figure.get_attribute("src"), figure.get_attribute("alt")
    cell.get_by_role("slider").first.focus()
    for _ in range(3):
        lab.page.keyboard.press("ArrowLeft")
    expect(figure).not_to_have_attribute("src", before, timeout=1 * MINUTES)
    assert cell.locator(".jp-OutputArea-output img").first.get_attribute("alt") != described
    lab.picture("rlhf_slider")
