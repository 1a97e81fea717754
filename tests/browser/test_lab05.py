"""The LoRA lab in a real JupyterLab: run it blank, answer wrongly and be told why, answer rightly, move the slider.

Screenshots go to LECTUREKIT_SCREENSHOTS when it is set, so that a person can look at what a student sees.
"""

import os
import re
from pathlib import Path

import pytest

pytestmark = [pytest.mark.browser, pytest.mark.models, pytest.mark.timeout(900)]

LAB = "lab05_lora"
MINUTES = 60_000


class Lab:
    """A notebook open in JupyterLab, used as a student uses it."""

    def __init__(self, page):
        self.page = page

    def js(self, body, *args):
        """Run JavaScript with `app` and `panel` (the open notebook) in scope."""
        return self.page.evaluate(
            "(args) => { const app = window.jupyterapp; const panel = app.shell.currentWidget; " + body + " }",
            list(args),
        )

    def wait_for(self, condition, timeout=2 * MINUTES):
        self.page.wait_for_function(
            "() => { const app = window.jupyterapp; const panel = app && app.shell.currentWidget; "
            f"return !!(panel && panel.content && panel.sessionContext && ({condition})); }}",
            timeout=timeout,
        )

    def wait_until_idle(self, timeout=2 * MINUTES):
        kernel = "panel.sessionContext.session && panel.sessionContext.session.kernel"
        self.wait_for(f"{kernel} && {kernel}.connectionStatus === 'connected' && {kernel}.status === 'idle'", timeout)

    def run_all(self, timeout=10 * MINUTES):
        self.page.get_by_role("menuitem", name="Run", exact=True).click()
        self.page.get_by_role("menuitem", name="Run All Cells", exact=True).click()
        self.wait_for(
            "panel.content.widgets.filter(w => w.model.type === 'code' && w.model.sharedModel.source.trim())"
            ".every(w => w.model.executionCount > 0)",
            timeout,
        )
        self.wait_until_idle()

    def index(self, beginning):
        """Where the first cell stands whose source contains this text."""
        found = self.js(
            "return panel.content.widgets.findIndex(w => w.model.sharedModel.source.includes(args[0]))", beginning
        )
        assert found >= 0, f"no cell holds {beginning!r}"
        return found

    def show(self, index):
        """Scroll to a cell and wait until it is there: JupyterLab draws only the cells in view."""
        cell = self.page.locator(f".jp-Notebook:visible .jp-Cell[data-windowed-list-index='{index}']")
        for _ in range(40):
            self.js(
                "panel.content.activeCellIndex = args[0]; "
                "return panel.content.scrollToCell(panel.content.widgets[args[0]], 'start')",
                index,
            )
            self.page.wait_for_timeout(600)
            if cell.count() and cell.is_visible():
                return cell
        raise AssertionError(f"cell {index} does not come into view")

    def type_into(self, index, source):
        cell = self.show(index)
        cell.locator(".cm-content").click()
        self.page.keyboard.press("Control+A")
        self.page.keyboard.press("Delete")
        self.page.keyboard.insert_text(source)
        typed = self.js("return panel.content.widgets[args[0]].model.sharedModel.source", index)
        assert typed == source, f"the cell holds {typed!r}"

    def run_cell(self, index):
        before = self.js("return panel.content.widgets[args[0]].model.executionCount", index) or 0
        self.show(index)
        self.page.keyboard.press("Escape")
        self.page.keyboard.press("Control+Enter")
        self.wait_for(f"panel.content.widgets[{index}].model.executionCount > {before}", 1 * MINUTES)
        self.wait_until_idle()

    def errors(self):
        """Every error output in the notebook, as 'cell: name'."""
        return self.js(
            "return panel.content.widgets.flatMap((w, i) => w.model.type !== 'code' ? [] : "
            "w.model.outputs.toJSON().filter(o => o.output_type === 'error')"
            ".map(o => i + ': ' + o.ename + ' ' + o.evalue))"
        )

    def picture(self, name):
        folder = os.environ.get("LECTUREKIT_SCREENSHOTS")
        if folder:
            self.page.wait_for_timeout(500)
            self.page.screenshot(path=str(Path(folder, f"{name}.png")))


@pytest.fixture(scope="module")
def lab(chromium, jupyterlab):
    page = chromium.new_page(viewport={"width": 1280, "height": 900})
    page.goto(jupyterlab(LAB))
    opened = Lab(page)
    opened.wait_for("panel.content.widgets.length > 10")
    opened.wait_until_idle()
    yield opened
    page.close()


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
