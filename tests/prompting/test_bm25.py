import math
import random

import bm25s
import pytest
import torch

from lecturekit.prompting.bm25 import BM25, bm25

DOCUMENTS = [text.split() for text in ("the cat sat", "the cat and the cat ran far", "", "a dog")]


def drawn(seed, documents=60, vocabulary=40, longest=30):
    """Documents and a query of invented words, some far more frequent than others."""
    source = random.Random(seed)
    words = [f"w{number}" for number in range(vocabulary)]
    weights = [1 / (number + 1) for number in range(vocabulary)]
    texts = [source.choices(words, weights, k=source.randint(1, longest)) for _ in range(documents)]
    return texts, source.choices([*words, "unknown"], k=6)


def test_bm25_is_its_formula():
    """By hand: "cat" is in 2 of 4 documents, "the" too; the lengths are 3, 7, 0 and 2, their mean is 3."""
    idf = math.log(1 + 2.5 / 2.5)
    short, long = 1.5 * (0.25 + 0.75 * 3 / 3), 1.5 * (0.25 + 0.75 * 7 / 3)
    expected = torch.tensor([2 * idf / (1 + short), 2 * idf * 2 / (2 + long), 0, 0])
    torch.testing.assert_close(bm25(["the", "cat", "xyzzy"], DOCUMENTS), expected, rtol=2e-7, atol=0)  # one rounding


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize(("k1", "b"), [(1.5, 0.75), (1.2, 0.0), (2.0, 1.0), (0.0, 0.5)])
def test_bm25_and_its_index_equal_bm25s(seed, k1, b):
    documents, query = drawn(seed)
    peer = bm25s.BM25(method="lucene", k1=k1, b=b, dtype="float64")
    peer.index(documents, show_progress=False)
    expected = torch.from_numpy(peer.get_scores([word for word in query if word in peer.vocab_dict])).float()
    # each is rounded to float32 once, the shares of the six words once before
    torch.testing.assert_close(bm25(query, documents, k1, b), expected, rtol=2e-7, atol=0)
    torch.testing.assert_close(BM25(documents, k1, b).scores(query), expected, rtol=2e-6, atol=0)


@pytest.mark.parametrize("seed", range(5))
def test_the_index_ranks_as_the_formula_does(seed):
    documents, query = drawn(seed, documents=300)
    index = BM25(documents)
    assert len(index) == 300
    best = index.scores(query).argsort(descending=True, stable=True)
    by_formula = bm25(query, documents)
    ranked = by_formula[best]
    assert bool(
        (ranked.diff() <= 2e-6 * ranked[:-1]).all()
    )  # as far as two roundings of float32 let them be told apart


def test_a_word_said_twice_counts_twice_and_an_unknown_one_nothing():
    for scores in (lambda query: bm25(query, DOCUMENTS), BM25(DOCUMENTS).scores):
        assert torch.equal(scores(["cat", "cat"]), 2 * scores(["cat"]))
        assert torch.equal(scores(["cat", "xyzzy"]), scores(["cat"]))
        assert torch.equal(scores([]), torch.zeros(4)) and scores([]).dtype == torch.float32


def test_the_idf_of_a_word_in_every_document_stays_above_zero():
    assert bool((bm25(["the"], [["the"], ["the", "cat"]]) > 0).all())


def test_copies_of_a_document_score_the_same():
    documents, query = drawn(3)
    scores = BM25(documents * 3).scores(query).view(3, -1)
    assert torch.equal(scores[0], scores[1]) and torch.equal(scores[0], scores[2])


def test_documents_without_words():
    assert torch.equal(BM25([[], []]).scores(["cat"]), torch.zeros(2))
    assert torch.equal(bm25(["cat"], [[], []]), torch.zeros(2))
    assert bm25(["cat"], [["cat"], []], b=1.0)[1] == 0  # where length, b and tf make 0 / 0


@pytest.mark.parametrize("function", [bm25, lambda query, *rest: BM25(*rest).scores(query)], ids=["bm25", "BM25"])
@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (("the cat", DOCUMENTS), TypeError, "query must be a list of words, got str: split texts"),
        (([["the"]], DOCUMENTS), TypeError, "query must be a list of words, got list in it"),
        ((["the"], "the cat"), TypeError, "documents must be a list of lists of words, got str"),
        ((["the"], [["the"], "the cat"]), TypeError, r"documents\[1\] must be a list of words, got str"),
        ((["the"], [["the"], ["a", 1]]), TypeError, r"documents\[1\] must be a list of words, got int in it"),
        ((["the"], [["the"], None]), TypeError, r"documents\[1\] must be a list of words, got NoneType"),
        ((["the"], []), ValueError, "documents must not be empty"),
        ((["the"], DOCUMENTS, -1.0), ValueError, "k1 must be at least 0, got -1.0"),
        ((["the"], DOCUMENTS, 1.5, 1.5), ValueError, r"b must be in 0..1, got 1.5"),
        ((["the"], DOCUMENTS, "1"), TypeError, "k1 must be a number"),
    ],
)
def test_refuses_by_name(function, arguments, error, message):
    with pytest.raises(error, match=message):
        function(*arguments)
