"""The prompting lab in a real JupyterLab: run it blank, answer wrongly and rightly, pick shots, edit a chain."""

import pytest
from opened import MINUTES, opened
from playwright.sync_api import expect

pytestmark = [pytest.mark.browser, pytest.mark.models, pytest.mark.timeout(900)]

LAB = "lab11_prompting"


@pytest.fixture(scope="module")
def lab(chromium, jupyterlab):
    with opened(chromium, jupyterlab(LAB)) as notebook:
        yield notebook


def test_a_blank_lab_runs_from_top_to_bottom(lab):
    lab.run_all()
    assert lab.errors() == []
    card = lab.show(lab.index('check("icl.score"')).locator("section.lecturekit-verdict")
    assert "not attempted yet" in card.inner_text()
    lab.picture("prompting_blank")


def test_a_wrong_answer_is_told_its_mistake(lab):
    lab.type_into(
        lab.index("def calibrate("),
        "def calibrate(scores, content_free):\n    return (scores + content_free).softmax(dim=1)",
    )
    lab.run_cell(lab.index("def calibrate("))
    check = lab.index('check("icl.calibrate"')
    lab.run_cell(check)
    card = lab.show(check).locator("section.lecturekit-verdict")
    assert "not yet right" in card.get_attribute("aria-label")
    for words in ("Hint", "First difference", "expected", "got"):
        assert words in card.inner_text()
    lab.picture("prompting_wrong")


def test_a_right_answer_passes(lab):
    lab.type_into(
        lab.index("def calibrate("),
        "def calibrate(scores, content_free):\n"
        "    ratio = (scores - content_free - (scores - content_free).amax(1, keepdim=True)).exp()\n"
        "    return ratio / ratio.sum(1, keepdim=True)",
    )
    lab.run_cell(lab.index("def calibrate("))
    check = lab.index('check("icl.calibrate"')
    lab.run_cell(check)
    card = lab.show(check).locator("section.lecturekit-verdict")
    assert card.get_attribute("aria-label").startswith("icl.calibrate: passed")
    drawn = lab.index("calibrate_picture(calibrate)")
    lab.run_cell(drawn)
    picture = lab.show(drawn).locator(".jp-OutputArea-output img").first
    assert "0.88 before and 0.50 after" in picture.get_attribute("alt")
    lab.picture("prompting_right")


def moved(lab, beginning, act):
    """Show a figure with controls, act on them, and wait until its picture is another one."""
    cell = lab.show(lab.index(beginning))
    figure = cell.locator(".jp-OutputArea-output img").first
    figure.wait_for(timeout=1 * MINUTES)
    before, described = figure.get_attribute("src"), figure.get_attribute("alt")
    act(cell)
    expect(figure).not_to_have_attribute("src", before, timeout=1 * MINUTES)
    assert figure.get_attribute("alt") != described
    return figure.get_attribute("alt")


def test_the_slider_changes_the_figure(lab):
    def act(cell):
        cell.get_by_role("slider").first.focus()
        for _ in range(3):
            lab.page.keyboard.press("ArrowLeft")

    moved(lab, "bias_slider(", act)
    lab.picture("prompting_slider")


def test_picking_a_shot_asks_the_model_again(lab):
    said = moved(lab, "shot_picker(", lambda cell: cell.locator("select").first.select_option("(no shot)"))
    assert said.startswith("3 shots")
    lab.picture("prompting_shots")


def test_editing_a_step_changes_what_follows(lab):
    def act(cell):
        box = cell.locator("input[type=text]").first
        box.fill("1 + 1 = 50.")
        box.press("Enter")

    said = moved(lab, "chain_editor(", act)
    assert "With 1 of" in said and "1 + 1 = 50." in said
    lab.picture("prompting_chain")
