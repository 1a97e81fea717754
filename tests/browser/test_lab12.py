"""The RAG lab in a real JupyterLab: run it blank, answer wrongly and be told why, answer rightly, type a question."""

import pytest
from opened import MINUTES, assert_passed, assert_wrong
from playwright.sync_api import expect

pytestmark = [pytest.mark.browser, pytest.mark.models, pytest.mark.timeout(900)]

LAB = "lab12_rag"


def test_a_blank_lab_runs_from_top_to_bottom(lab):
    lab.run_blank("rag.bm25")
    lab.picture("rag_blank")


def test_a_wrong_answer_is_told_its_mistake(lab):
    answer = "def pool(hidden, mask):\n    return F.normalize(hidden.mean(1), dim=1)"
    assert_wrong(lab.answer("rag.pool", answer), "takes the padding into the mean")
    lab.picture("rag_wrong")


def test_a_right_answer_passes(lab):
    answer = """def top_k(queries, documents, k):
    q = queries / queries.norm(dim=1, keepdim=True)
    z = documents / documents.norm(dim=1, keepdim=True)
    return (q @ z.T).topk(k, dim=1)"""
    assert_passed(lab.answer("rag.top_k", answer), "rag.top_k")
    assert lab.drawn("search_picture(top_k)").count(", the three nearest by angle") == 2
    lab.picture("rag_right")


def test_the_controls_of_the_shelf_change_the_figure(lab):
    lab.moved("shelf_explorer(", lambda cell: cell.get_by_role("combobox").nth(1).select_option("meaning"))
    lab.moved("shelf_explorer(", lab.press("ArrowRight", 1))
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
