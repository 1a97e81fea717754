"""The RAG lab in a real JupyterLab: run it blank, answer wrongly and be told why, answer rightly, type a question."""

import pytest
from opened import MINUTES, opened
from playwright.sync_api import expect

pytestmark = [pytest.mark.browser, pytest.mark.models, pytest.mark.timeout(900)]

LAB = "lab12_rag"


@pytest.fixture(scope="module")
def lab(chromium, jupyterlab):
    with opened(chromium, jupyterlab(LAB)) as notebook:
        yield notebook


def test_a_blank_lab_runs_from_top_to_bottom(lab):
    lab.run_all()
    assert lab.errors() == []
    card = lab.show(lab.index('check("rag.bm25"')).locator("section.lecturekit-verdict")
    assert "not attempted yet" in card.inner_text()
    lab.picture("rag_blank")


def test_a_wrong_answer_is_told_its_mistake(lab):
    lab.type_into(
        lab.index("def pool("),
        "def pool(hidden, mask):\n    return F.normalize(hidden.mean(1), dim=1)",
    )
    lab.run_cell(lab.index("def pool("))
    check = lab.index('check("rag.pool"')
    lab.run_cell(check)
    card = lab.show(check).locator("section.lecturekit-verdict")
    assert "not yet right" in card.get_attribute("aria-label")
    for words in ("takes the padding into the mean", "Hint", "First difference", "expected", "got"):
        assert words in card.inner_text()
    lab.picture("rag_wrong")


def test_a_right_answer_passes(lab):
    lab.type_into(
        lab.index("def top_k("),
        "def top_k(queries, documents, k):\n"
        "    q = queries / queries.norm(dim=1, keepdim=True)\n"
        "    z = documents / documents.norm(dim=1, keepdim=True)\n"
        "    return (q @ z.T).topk(k, dim=1)",
    )
    lab.run_cell(lab.index("def top_k("))
    check = lab.index('check("rag.top_k"')
    lab.run_cell(check)
    card = lab.show(check).locator("section.lecturekit-verdict")
    assert card.get_attribute("aria-label").startswith("rag.top_k: passed")
    drawn = lab.index("search_picture(top_k)")
    lab.run_cell(drawn)
    picture = lab.show(drawn).locator(".jp-OutputArea-output img").first
    assert picture.get_attribute("alt").count(", the three nearest by angle") == 2
    lab.picture("rag_right")


def test_the_controls_of_the_shelf_change_the_figure(lab):
    cell = lab.show(lab.index("shelf_explorer("))
    figure = cell.locator(".jp-OutputArea-output img").first
    figure.wait_for(timeout=1 * MINUTES)
    before = figure.get_attribute("alt")
    cell.get_by_role("combobox").nth(1).select_option("meaning")
    expect(figure).not_to_have_attribute("alt", before, timeout=1 * MINUTES)
    before = cell.locator(".jp-OutputArea-output img").first.get_attribute("alt")
    cell.get_by_role("slider").first.focus()
    lab.page.keyboard.press("ArrowRight")
    expect(figure).not_to_have_attribute("alt", before, timeout=1 * MINUTES)
    lab.picture("rag_shelf")


def test_a_typed_question_is_answered(lab):
    cell = lab.show(lab.index("explore.ask_box("))
    card = cell.locator(".jp-OutputArea-output [aria-live]").first
    card.wait_for(timeout=1 * MINUTES)
    field = cell.locator(".jp-OutputArea-output input[type=text]").first
    field.fill("How high is the tower of <Vessary> Light?")
    lab.page.keyboard.press("Enter")
    expect(card).to_contain_text("How high is the tower of <Vessary> Light?", timeout=2 * MINUTES)
    expect(card).to_contain_text("answer:")
    assert card.locator("table caption").inner_text().startswith("the best 1 of")
    card.locator("summary").click()
    expect(card.locator("pre")).to_contain_text("Question: How high is the tower of <Vessary> Light?")
    lab.picture("rag_asked")
