import numpy as np
import pytest
import torch

from lecturekit.prompting.evaluation import ABSTAIN, abstains, cited, recall_and_mrr
from lecturekit.prompting.rag import INSTRUCTION


def test_recall_is_a_share_and_the_rank_is_that_of_the_first():
    ranked = [[3, 1, 2, 9], [5, 6, 7, 8], [4, 2, 0, 1]]
    relevant = [[1, 2], [8], [4, 11]]
    # within 3: both; none, for 8 has rank 4; one of two
    recall, mrr = recall_and_mrr(ranked, relevant, 3)
    assert recall == pytest.approx((1 + 0 + 1 / 2) / 3)
    assert mrr == pytest.approx((1 / 2 + 0 + 1) / 3)
    assert recall_and_mrr(ranked, relevant, 4) == (pytest.approx(2.5 / 3), pytest.approx((1 / 2 + 1 / 4 + 1) / 3))


def test_a_question_without_an_answer_changes_nothing():
    ranked, relevant = [[1, 2], [2, 1]], [{1}, {1}]
    assert recall_and_mrr([*ranked, [7, 8]], [*relevant, set()], 1) == recall_and_mrr(ranked, relevant, 1) == (0.5, 0.5)


def test_ids_may_be_words():
    assert recall_and_mrr([["b", "a"]], [["a"]], 2) == (1.0, 0.5)


def test_a_short_ranking_and_one_with_the_same_passage_twice():
    assert recall_and_mrr([[4]], [[4, 5]], 10) == (0.5, 1.0)
    assert recall_and_mrr([[7, 4, 4]], [[4, 5]], 10) == (0.5, 0.5)
    assert recall_and_mrr([[]], [[4]], 10) == (0.0, 0.0)


def test_a_passage_counts_once_however_often_it_is_named():
    assert recall_and_mrr([[4, 4]], [[4]], 2) == recall_and_mrr([[4]], [[4, 4]], 2) == (1.0, 1.0)


def test_rankings_may_be_tensors_and_arrays():
    ranked, relevant = [[3, 1, 2], [5, 6, 7]], [[1, 2], [5]]
    expected = recall_and_mrr(ranked, relevant, 2)
    assert recall_and_mrr(torch.tensor(ranked), [torch.tensor(row) for row in relevant], 2) == expected
    assert recall_and_mrr(np.array(ranked), [np.array(row) for row in relevant], 2) == expected
    assert recall_and_mrr([*torch.tensor(ranked), []], [*relevant, torch.tensor([])], 2) == expected


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (([[1]], [[1], [2]], 1), ValueError, "one entry for each of the 1 questions, got 2"),
        (([[1]], [[]], 1), ValueError, "relevant must name a passage for at least one question"),
        (([["a"]], ["a"], 1), TypeError, r"relevant\[0\] must be a list of ids, got str"),
        (([[1]], [1], 1), TypeError, r"relevant\[0\] must be a list of ids, got int"),
        ((["ab"], [["a"]], 1), TypeError, r"ranked\[0\] must be a list of ids, got str"),
        (([[1], None], [[1], [1]], 1), TypeError, r"ranked\[1\] must be a list of ids, got NoneType"),
        (([[1]], [[1]], 0), ValueError, "k must be at least 1"),
        (([[1]], [[1]], 1.0), TypeError, "k must be an int"),
    ],
)
def test_refuses_by_name(arguments, error, message):
    with pytest.raises(error, match=message):
        recall_and_mrr(*arguments)


@pytest.mark.parametrize(
    ("answer", "passages"),
    [
        ("The ferry leaves at nine [2].", [40]),
        ("[3][1] and again [3]", [50, 30]),
        ("nine [1, 3]", [30, 50]),
        ("nine [1-3]", [30, 40, 50]),
        ("nine [2\u20133], then [1]", [40, 50, 30]),
        ("nine [1; 2]", [30, 40]),
        ("nine [2 - 99]", [40, 50]),
        ("nine [3-1] and [source 2] and [²]", []),
        ("nine", []),
        ("nine [4] [0] [-1] [x] (2)", []),
    ],
)
def test_cited_passages(answer, passages):
    assert cited(answer, [30, 40, 50]) == passages


def test_abstains_as_the_instruction_asks():
    assert ABSTAIN in INSTRUCTION
    assert abstains("Not in the\n documents.") and abstains(f"Sorry: {ABSTAIN}")
    assert not abstains("It is in the documents.") and not abstains("")
