"""A notebook open in a real JupyterLab, used as a student uses it.

Screenshots go to LECTUREKIT_SCREENSHOTS when it is set, so that a person can look at what a student sees.
"""

import os
from contextlib import contextmanager
from pathlib import Path

from playwright.sync_api import expect

MINUTES = 60_000
IMAGE = ".jp-OutputArea-output img"


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

    def pictures_without_words(self):
        """The cells with a picture that a screen reader could not read."""
        return self.js(
            "const missing = []; panel.content.widgets.forEach((w, i) => { if (w.model.type !== 'code') return; "
            "w.model.outputs.toJSON().forEach(o => { const d = o.data || {}; "
            "const html = [].concat(d['text/html'] || []).join(''); "
            "if (d['image/png'] && !html) missing.push(i); "
            "(html.match(/<img[^>]*>/g) || []).forEach(t => { if (!/alt=.[^'\"]/.test(t)) missing.push(i); }); }); }); "
            "return missing"
        )

    def run_blank(self, question):
        """Run the untouched lab from top to bottom and look that nothing is amiss; end at this question's card."""
        self.run_all()
        assert self.errors() == []
        assert self.pictures_without_words() == []
        assert "not attempted yet" in self.card(question).inner_text()

    def card(self, question):
        """The verdict below a question."""
        return self.show(self.index(f'check("{question}"')).locator("section.lecturekit-verdict")

    def answer(self, question, source):
        """Type a function in the place of the lab's own, run it and the question's check; the verdict."""
        cell = self.index(source[: source.index("(") + 1])
        self.type_into(cell, source)
        self.run_cell(cell)
        self.run_cell(self.index(f'check("{question}"'))
        return self.card(question)

    def figure(self, beginning):
        """The first picture below a cell, once it is there."""
        figure = self.show(self.index(beginning)).locator(IMAGE).first
        figure.wait_for(timeout=1 * MINUTES)
        return figure

    def drawn(self, beginning):
        """Run a cell that draws; what its picture says of itself."""
        self.run_cell(self.index(beginning))
        return self.figure(beginning).get_attribute("alt")

    def moved(self, beginning, act):
        """Act on the controls of a cell and wait until its picture is another one; what it says of itself then."""
        figure = self.figure(beginning)
        before, described = figure.get_attribute("src"), figure.get_attribute("alt")
        act(self.show(self.index(beginning)))
        expect(figure).not_to_have_attribute("src", before, timeout=1 * MINUTES)
        assert figure.get_attribute("alt") != described
        return figure.get_attribute("alt")

    def press(self, key, times):
        """A step for `moved`: press a key on the cell's first slider."""

        def act(cell):
            cell.get_by_role("slider").first.focus()
            for _ in range(times):
                self.page.keyboard.press(key)

        return act

    def picture(self, name):
        folder = os.environ.get("LECTUREKIT_SCREENSHOTS")
        if folder:
            self.page.wait_for_timeout(500)
            self.page.screenshot(path=str(Path(folder, f"{name}.png")))


def assert_wrong(card, *words):
    """The verdict says no, shows where the answer differs, and holds these words."""
    assert "not yet right" in card.get_attribute("aria-label")
    for expected in (*words, "Hint", "First difference", "expected", "got"):
        assert expected in card.inner_text()


def assert_passed(card, question):
    assert card.get_attribute("aria-label").startswith(f"{question}: passed")


@contextmanager
def opened(chromium, address):
    """The notebook at this address in a page of its own, connected and idle."""
    page = chromium.new_page(viewport={"width": 1280, "height": 900})
    page.goto(address)
    lab = Lab(page)
    name = address.partition("?")[0].rpartition("/")[2]
    lab.wait_for(f"panel.context.path.endsWith('/{name}') && panel.content.widgets.length > 10")
    lab.wait_until_idle()
    yield lab
    page.close()
