"""The BitDelta lab in a real JupyterLab: run it blank, answer wrongly and be told why, answer rightly, move α."""

import pytest
from opened import MINUTES, opened
from playwright.sync_api import expect

pytestmark = [pytest.mark.browser, pytest.mark.models, pytest.mark.timeout(900)]

LAB = "lab07_bitdelta"


@pytest.fixture(scope="module")
def lab(chromium, jupyterlab):
    with opened(chromium, jupyterlab(LAB)) as notebook:
        yield notebook


def test_a_blank_lab_runs_from_top_to_bottom(lab):
    lab.run_all()
    assert lab.errors() == []
    card = lab.show(lab.index('check("bitdelta.compress"')).locator("section.lecturekit-verdict")
    assert "not attempted yet" in card.inner_text()
    lab.picture("bitdelta_blank")


def test_a_wrong_answer_is_told_its_mistake(lab):
    lab.type_into(
        lab.index("def compress("),
        "def compress(base, fine):\n"
        "    signs = (fine > 0).to(torch.int8) * 2 - 1\n"
        "    return signs, fine.float().abs().mean()",
    )
    lab.run_cell(lab.index("def compress("))
    check = lab.index('check("bitdelta.compress"')
    lab.run_cell(check)
    card = lab.show(check).locator("section.lecturekit-verdict")
    assert "not yet right" in card.get_attribute("aria-label")
    for words in ("compresses the fine-tuned weight, not what changed", "Hint", "First difference", "expected", "got"):
        assert words in card.inner_text()
    lab.picture("bitdelta_wrong")


def test_a_right_answer_passes(lab):
    lab.type_into(
        lab.index("def compress("),
        "def compress(base, fine):\n"
        "    delta = fine.float() - base.float()\n"
        "    return torch.where(delta > 0, 1, -1).to(torch.int8), delta.abs().mean()",
    )
    lab.run_cell(lab.index("def compress("))
    check = lab.index('check("bitdelta.compress"')
    lab.run_cell(check)
    card = lab.show(check).locator("section.lecturekit-verdict")
    assert card.get_attribute("aria-label").startswith("bitdelta.compress: passed")
    drawn = lab.index("compress_picture(compress)")
    lab.run_cell(drawn)
    picture = lab.show(drawn).locator(".jp-OutputArea-output img").first
    assert "no scale times signs leaves less" in picture.get_attribute("alt")
    lab.picture("bitdelta_right")


def test_the_controls_change_the_figure(lab):
    cell = lab.show(lab.index("alpha_slider("))
    figure = cell.locator(".jp-OutputArea-output img").first
    figure.wait_for(timeout=1 * MINUTES)
    before, described = figure.get_attribute("src"), figure.get_attribute("alt")
    cell.get_by_role("slider").first.focus()
    for _ in range(3):
        lab.page.keyboard.press("ArrowRight")
    expect(figure).not_to_have_attribute("src", before, timeout=1 * MINUTES)
    assert figure.get_attribute("alt") != described
    before = figure.get_attribute("src")
    cell.locator("select").first.select_option("uniform")
    expect(figure).not_to_have_attribute("src", before, timeout=1 * MINUTES)
    assert "(uniform)" in figure.get_attribute("alt")
    lab.picture("bitdelta_slider")
