"""The LoRA lab in a real JupyterLab: run it blank, answer wrongly and be told why, answer rightly, move the slider."""

import re

import pytest
from opened import MINUTES, opened

pytestmark = [pytest.mark.browser, pytest.mark.models, pytest.mark.timeout(900)]

LAB = "lab05_lora"


@pytest.fixture(scope="module")
def lab(chromium, jupyterlab):
    with opened(chromium, jupyterlab(LAB)) as notebook:
        yield notebook


def test_a_blank_lab_runs_from_top_to_bottom(lab):
    lab.run_all()
    assert lab.errors() == []
    card = lab.show(lab.index('check("lora.merge"')).locator("section.lecturekit-verdict")
    assert "not attempted yet" in card.inner_text()
    lab.picture("blank")


def test_a_wrong_answer_is_told_its_mistake(lab):
    lab.type_into(lab.index("def merge("), "def merge(weight, A, B, alpha):\n    return weight + B @ A")
    lab.run_cell(lab.index("def merge("))
    check = lab.index('check("lora.merge"')
    lab.run_cell(check)
    card = lab.show(check).locator("section.lecturekit-verdict")
    assert "not yet right" in card.get_attribute("aria-label")
    for words in ("forgets the alpha / r scale", "Hint", "First difference", "expected", "got"):
        assert words in card.inner_text()


def test_the_picture_shows_what_the_wrong_answer_did(lab):
    picture = lab.index("merge_picture(merge)")
    lab.run_cell(picture)
    drawn = lab.show(picture).locator(".jp-OutputArea-output img").first
    assert "The difference shows" in drawn.get_attribute("alt")
    lab.show(lab.index("def merge("))
    lab.picture("wrong")


def test_the_named_card_is_found_by_its_role(lab):
    lab.show(lab.index('check("lora.merge"'))
    card = lab.page.get_by_role("status", name=re.compile("lora.merge: not yet right"))
    assert card.count() == 1, "a screen reader announces the verdict by this role and name"


def test_a_right_answer_passes(lab):
    lab.type_into(
        lab.index("def merge("), "def merge(weight, A, B, alpha):\n    return weight + alpha / len(A) * B @ A"
    )
    lab.run_cell(lab.index("def merge("))
    check = lab.index('check("lora.merge"')
    lab.run_cell(check)
    card = lab.show(check).locator("section.lecturekit-verdict")
    assert card.get_attribute("aria-label").startswith("lora.merge: passed")
    lab.picture("right")


def test_the_slider_changes_the_figure(lab):
    cell = lab.show(lab.index("rank_slider("))
    figure = cell.locator(".jp-OutputArea-output img").first
    figure.wait_for(timeout=1 * MINUTES)
    before, described = figure.get_attribute("src"), figure.get_attribute("alt")
    assert described, "the figure has an alternative text"
    lab.picture("slider_before")
    handle = cell.get_by_role("slider").first
    handle.focus()
    for _ in range(3):
        lab.page.keyboard.press("ArrowRight")
    lab.page.wait_for_function(
        "([src]) => [...document.querySelectorAll('.jp-OutputArea-output img')].some(i => i.alt && i.src !== src) && "
        "![...document.querySelectorAll('.jp-OutputArea-output img')].some(i => i.src === src)",
        arg=[before],
        timeout=1 * MINUTES,
    )
    figure = cell.locator(".jp-OutputArea-output img").first
    assert figure.get_attribute("src") != before
    assert figure.get_attribute("alt") != described, "the text alternative follows the slider"
    lab.picture("slider_after")


def test_every_picture_in_the_lab_has_an_alternative_text(lab):
    missing = lab.js(
        "const missing = []; panel.content.widgets.forEach((w, i) => { if (w.model.type !== 'code') return; "
        "w.model.outputs.toJSON().forEach(o => { const d = o.data || {}; "
        "const html = [].concat(d['text/html'] || []).join(''); "
        "if (d['image/png'] && !html) missing.push(i); "
        "(html.match(/<img[^>]*>/g) || []).forEach(t => { if (!/alt=.[^'\"]/.test(t)) missing.push(i); }); }); }); "
        "return missing"
    )
    assert missing == []
