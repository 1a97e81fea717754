"""The fine-tuning lab in a real JupyterLab: run it blank, be told a mistake, answer rightly, choose a dialogue."""

import pytest
from opened import MINUTES, opened
from playwright.sync_api import expect

pytestmark = [pytest.mark.browser, pytest.mark.models, pytest.mark.timeout(900)]

LAB = "lab01_sft"


@pytest.fixture(scope="module")
def lab(chromium, jupyterlab):
    with opened(chromium, jupyterlab(LAB)) as notebook:
        yield notebook


def test_a_blank_lab_runs_from_top_to_bottom(lab):
    lab.run_all()
    assert lab.errors() == []
    card = lab.show(lab.index('check("sft.loss"')).locator("section.lecturekit-verdict")
    assert "not attempted yet" in card.inner_text()
    lab.picture("sft_blank")


def test_a_wrong_answer_is_told_its_mistake(lab):
    lab.type_into(
        lab.index("def response_loss("),
        "def response_loss(logits, labels):\n    return F.cross_entropy(logits.flatten(0, 1), labels.flatten())",
    )
    lab.run_cell(lab.index("def response_loss("))
    check = lab.index('check("sft.loss"')
    lab.run_cell(check)
    card = lab.show(check).locator("section.lecturekit-verdict")
    assert "not yet right" in card.get_attribute("aria-label")
    for words in ("does not shift", "Hint", "First difference", "expected", "got"):
        assert words in card.inner_text()
    drawn = lab.index("gradient_picture(response_loss)")
    lab.run_cell(drawn)
    picture = lab.show(drawn).locator(".jp-OutputArea-output img").first
    assert "row 2 has labels at 9 to 10 and a gradient at 9, 10" in picture.get_attribute("alt")
    lab.picture("sft_wrong")


def test_a_right_answer_passes(lab):
    lab.type_into(
        lab.index("def response_loss("),
        "def response_loss(logits, labels):\n    return F.cross_entropy(logits[:, :-1].transpose(1, 2), labels[:, 1:])",
    )
    lab.run_cell(lab.index("def response_loss("))
    check = lab.index('check("sft.loss"')
    lab.run_cell(check)
    card = lab.show(check).locator("section.lecturekit-verdict")
    assert card.get_attribute("aria-label").startswith("sft.loss: passed")
    lab.picture("sft_right")


def test_the_prompt_can_be_put_into_the_loss_of_the_strip(lab):
    cell = lab.show(lab.index("explore.strip_selector("))
    figure = cell.locator(".jp-OutputArea-output img").first
    figure.wait_for(timeout=1 * MINUTES)
    before = figure.get_attribute("src")
    assert "responses only" in figure.get_attribute("alt")
    cell.get_by_role("checkbox").first.check()
    expect(figure).not_to_have_attribute("src", before, timeout=1 * MINUTES)
    assert "prompt and responses" in cell.locator(".jp-OutputArea-output img").first.get_attribute("alt")
    lab.picture("sft_strip")
