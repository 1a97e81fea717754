"""The shelf shows true scores and works with a keyboard; wrong answers are drawn all the same; cards are text."""

import inspect
import re

import pytest
import torch

from lecturekit.explore import rag, style
from lecturekit.prompting import bm25 as by_words
from lecturekit.prompting import rag as reference

# the shelf


def test_the_scores_by_words_are_those_of_bm25():
    index = by_words.BM25([reference.words(text) for text in rag.SHELF])
    for question, told in zip(rag.ASKED, rag.BY_WORDS, strict=True):
        assert index.scores(reference.words(question)).tolist() == pytest.approx(told, abs=0.0051)


@pytest.mark.models
def test_the_scores_by_meaning_are_those_of_minilm():
    encode = reference.sentence_encoder("cpu")
    cosines = encode(list(rag.ASKED)) @ encode(list(rag.SHELF)).T
    # half a unit of the last digit written down, and the roundings of another machine's kernels
    assert (cosines - torch.tensor(rag.BY_MEANING)).abs().max() < 0.0051


def test_the_shelf_shows_what_the_text_asks_to_find():
    """A question that words find and meaning does not, one the other way round, and one that nothing answers."""
    first = {way: [rag._ranked(question, way)[0] for question in range(len(rag.ASKED))] for way in rag.WAYS}
    right = {
        way: {question for question, answer in enumerate(rag.ANSWERED_BY) if first[way][question] == answer}
        for way in rag.WAYS
    }
    assert right["words"] - right["meaning"] and right["meaning"] - right["words"]
    assert rag.ANSWERED_BY.count(None) == 1 and all(first[way][rag.ANSWERED_BY.index(None)] >= 0 for way in rag.WAYS)


def test_a_picture_of_the_shelf_tells_the_prompt():
    text = rag.shelf_picture(0, "meaning", 2).text
    assert "In the prompt stand passages 2, 1; passage 1 holds the answer and is in the prompt" in text
    assert "passage 1 holds the answer and is not in the prompt" in rag.shelf_picture(0, "meaning", 1).text
    assert "no passage holds the answer" in rag.shelf_picture(4, "words", 1).text


def test_the_static_twin_tells_every_question_that_has_an_answer():
    text = rag.shelf_strip().text
    for question, answer in zip(rag.ASKED, rag.ANSWERED_BY, strict=True):
        assert text.count(f"“{question}”") == (0 if answer is None else len(rag.WAYS))


@pytest.mark.parametrize("given", [(0, "luck", 1), (9, "words", 1), (-1, "words", 1), (0, "words", 0), (0, "words", 8)])
def test_a_wrong_choice_is_named(given):
    with pytest.raises(ValueError, match=r"way must be one of|question must be in"):
        rag.shelf_picture(*given)


def test_each_control_changes_the_drawing():
    *controls, drawing = rag.shelf_explorer().children
    seen = {drawing.value}
    for control, value in zip(controls, (3, "meaning", 4), strict=True):
        control.value = value
        assert drawing.value not in seen
        seen.add(drawing.value)
    assert 'aria-live="polite"' in drawing.value
    assert re.search(r'<img src="data:image/png;base64,[^"]+" alt="[^"]{40,}"', drawing.value)


def test_only_widgets_that_both_ipywidgets_7_and_8_have():
    used = set(re.findall(r"widgets\.(\w+)", inspect.getsource(rag) + inspect.getsource(style.moving)))
    assert used == {"Dropdown", "HTML", "IntSlider", "Layout", "Text", "VBox"}


# what the student's code did


def blank(*_):
    raise NotImplementedError


def raises(*_):
    raise RuntimeError("shapes")


PICTURES = [
    rag.chunk_picture,
    rag.pool_picture,
    rag.search_picture,
    rag.bm25_picture,
    rag.fuse_picture,
    rag.prompt_picture,
]


@pytest.mark.parametrize("draw", PICTURES)
@pytest.mark.parametrize(
    ("answer", "said"), [(blank, "is not written yet"), (raises, "raised RuntimeError"), (None, "raised TypeError")]
)
def test_an_answer_that_fails_is_drawn_all_the_same(draw, answer, said):
    picture = draw(answer)
    assert f"gave nothing to draw: {said}" in picture.text and picture.png.startswith(b"\x89PNG")


@pytest.mark.parametrize("draw", PICTURES)
@pytest.mark.parametrize(
    "answer",
    [
        lambda *_: None,
        lambda *_: 3,
        lambda *_: torch.ones(1),
        lambda *_: (1, 2, 3),
        lambda *_: [],
        lambda *_: ([99], [1]),
        lambda *_: (torch.zeros(2, 3), torch.full((2, 3), 99)),
    ],
)
def test_an_answer_of_another_form_is_put_in_words(draw, answer):
    assert "gave nothing to draw" in draw(answer).text


def test_right_chunks_are_told():
    text = rag.chunk_picture(reference.chunk).text
    assert "chunk 1 holds words 1 to 9, 0 of them in the one before" in text
    assert text.count("3 of them in the one before") == 4 and "In no chunk: nothing" in text


def test_a_lost_chunk_and_strange_words_show():
    def drops(text, size, overlap):
        return reference.chunk(text, size, overlap)[:-1]

    def letters(text, size, overlap):
        return [text[at : at + size] for at in range(0, len(text), size - overlap)]

    assert "In no chunk: words 28 to 30" in rag.chunk_picture(drops).text
    assert "that are no words of the text" in rag.chunk_picture(letters).text


def test_padding_in_the_mean_shows():
    def over_padding(hidden, mask):
        return torch.nn.functional.normalize(hidden.mean(1), dim=1)

    right = rag.pool_picture(reference.pool).text
    assert right.count("falls to 1.00, its length is 1.00") == 3
    assert "falls to 1.00" not in rag.pool_picture(over_padding).text
    assert "its length is 1.00" not in rag.pool_picture(lambda hidden, mask: hidden.sum(1)).text


def test_a_search_that_prefers_long_vectors_shows():
    cosines = torch.nn.functional.normalize(rag.QUERIES, dim=1) @ torch.nn.functional.normalize(rag.DOCUMENTS, dim=1).T
    assert cosines.topk(3, dim=1).indices.tolist() == [list(row) for row in rag.NEAREST]

    def dot(queries, documents, k):
        return torch.topk(queries @ documents.T, k, dim=1)

    assert rag.search_picture(reference.top_k).text.count(", the three nearest by angle") == 2
    assert rag.search_picture(dot).text.count("not the three nearest by angle") == 2


def test_bm25_is_told_in_ratios():
    text = rag.bm25_picture(by_words.bm25).text
    # tf / (tf + k1) with tf = 12, against tf = 1: 12 (1 + k1) / (12 + k1)
    for k1 in (0.5, 1.5, 5.0):
        assert f"with k1 = {k1:g} saying the word 12 times is worth {12 * (1 + k1) / (12 + k1):.1f} times" in text
    assert "with b = 0 a document of 4 words gets 1.0 times" in text


def test_a_fusion_is_told_in_letters():
    ids, _ = reference.fuse([list(ranking) for ranking in rag.RANKINGS])
    text = rag.fuse_picture(reference.fuse).text
    assert f"Your fused ranking is {' '.join('ABCDEF'[id] for id in ids)}." in text
    assert ids[0] == 0 and rag.RANKINGS[0][0] == 3  # the lab asks why D, first on the left, is not first of all


def test_a_prompt_over_the_budget_shows():
    def everything(question, passages, budget, count, instruction):
        return reference.assemble(question, passages, 10_000, count, instruction)

    assert "Over the budget: none" in rag.prompt_picture(reference.assemble).text
    assert re.search(r"Over the budget: [1-9]\d* of 21 prompts", rag.prompt_picture(everything).text)


def test_pictures_leave_the_random_state_alone():
    torch.manual_seed(0)
    wanted = torch.rand(3)
    torch.manual_seed(0)
    rag.pool_picture(reference.pool)
    rag.search_picture(reference.top_k)
    assert torch.equal(torch.rand(3), wanted)


# what was measured, and a question asked


def test_bars_carry_their_intervals():
    _, (axes,) = style.figure()
    rag.bars_with_intervals(axes, ["a", "b"], {"one": [(0.5, 0.4, 0.6), (1.0, 0.8, 1.0)], "two": [(0, 0, 0.1)] * 2})
    assert sorted(round(float(bar.get_height()), 3) for bar in axes.patches) == [0, 0, 0.5, 1.0]
    assert [label.get_text() for label in axes.get_xticklabels()] == ["a", "b"]


FOUND = {
    "columns": ("source", "text"),
    "rows": [("[1]", "1 < 2 & <b>bold</b>")],
    "caption": "the best of 3",
    "prompt": "[1] 1 < 2\n\nQuestion: <script>?\nAnswer:",
    "tokens": 12,
    "answer": "<i>no</i>",
}


def test_a_card_is_text_and_nothing_that_it_shows_is_markup():
    card = rag.asked(lambda *_: FOUND, "is 1 < 2?", "words", 1)
    page, plain = card._repr_html_(), repr(card)
    assert "<script>" not in page and "<i>" not in page and "<b>bold" not in page
    assert "is 1 &lt; 2?" in page and "<caption>the best of 3</caption>" in page and 'scope="col"' in page
    assert plain.startswith("is 1 < 2?") and "answer: <i>no</i>" in plain and "12 tokens" in plain


def test_a_blank_question_and_an_error_are_sentences():
    def broken(*_):
        raise ValueError("no such method")

    assert repr(rag.asked(broken, "  ", "words", 1)) == "Type a question and press Enter."
    assert repr(rag.asked(broken, "who?", "words", 1)) == "ValueError: no such method"
    assert "(nothing)" in repr(rag.asked(lambda *_: {**FOUND, "answer": ""}, "who?", "words", 1))


def test_a_question_typed_changes_the_card():
    heard = []

    def ask(question, method, k):
        heard.append((question, method, k))
        return {**FOUND, "answer": f"{question} {method} {k}"}

    typed, method, k, drawing = rag.ask_box(ask, "first?", ("words", "both fused")).children
    assert heard == [("first?", "both fused", 1)] and "first? both fused 1" in drawing.value
    typed.value = "second?"
    method.value = "words"
    k.value = 3
    assert heard[-1] == ("second?", "words", 3) and "second? words 3" in drawing.value
    assert typed.continuous_update is False and k.continuous_update is False  # no answer for half a question
