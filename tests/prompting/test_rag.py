import json
import math
from itertools import pairwise

import numpy as np
import pytest
import torch

from lecturekit.prompting import rag
from lecturekit.prompting.rag import Retriever, chunk, top_k
from lecturekit.timing import measure


def random(*shape, seed=0, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def by_hand(queries, documents, k):
    """Every cosine in exact-sum float64, rounded once to float32, sorted by (-score, index)."""
    scores, indices = [], []
    for query in queries.double().tolist():
        row = []
        for index, document in enumerate(documents.double().tolist()):
            dot = math.fsum(a * b for a, b in zip(query, document, strict=True))
            row.append((-float(np.float32(dot / (math.hypot(*query) * math.hypot(*document)))), index))
        best = sorted(row)[:k]
        scores.append([-score for score, _ in best])
        indices.append([index for _, index in best])
    return torch.tensor(scores), torch.tensor(indices)


@pytest.mark.parametrize(("q", "n", "d", "k"), [(1, 1, 1, 1), (3, 50, 8, 5), (1, 40, 1, 40), (7, 33, 17, 33)])
def test_top_k_equals_every_cosine_sorted(q, n, d, k):
    queries, documents = random(q, d, seed=1), random(n, d, seed=2)
    scores, indices = top_k(queries, documents, k)
    expected_scores, expected_indices = by_hand(queries, documents, k)
    assert indices.dtype == torch.int64 and scores.dtype == torch.float32
    assert torch.equal(indices, expected_indices)
    torch.testing.assert_close(scores, expected_scores, rtol=2e-7, atol=2e-7)  # float64 rounded once to float32


def test_top_k_equals_faiss():
    import faiss

    queries, documents = random(20, 384, seed=3), random(5000, 384, seed=4)
    index = faiss.IndexFlatIP(384)
    index.add(torch.nn.functional.normalize(documents, dim=1).numpy())
    expected_scores, expected_indices = index.search(torch.nn.functional.normalize(queries, dim=1).numpy(), 10)
    scores, indices = top_k(queries, documents, 10)
    # faiss sums 384 products in float32: at worst 384 · 6e-8 · Σ|q_i d_i|, and Σ|q_i d_i| ≤ 1 for unit vectors
    np.testing.assert_allclose(scores.numpy(), expected_scores, rtol=0, atol=2.5e-5)
    # where the order differs, it may only be between scores that close
    swapped = indices.numpy() != expected_indices
    assert np.all(np.abs(scores.numpy() - expected_scores)[swapped] < 2.5e-5)
    assert swapped.mean() < 0.02
    assert all(
        set(ours) == set(theirs) for ours, theirs in zip(indices.tolist(), expected_indices.tolist(), strict=True)
    )


@pytest.mark.parametrize("block", [1, 7, 64, 1000])
def test_the_size_of_a_block_makes_no_difference(block, monkeypatch):
    queries, documents = random(9, 24, seed=5), random(300, 24, seed=6)
    documents[150:] = documents[:150]  # each document twice, in other blocks
    expected = top_k(queries, documents, 11, block=300)
    got = top_k(queries, documents, 11, block=block)
    assert torch.equal(got[1], expected[1])
    assert torch.equal(got[0], expected[0])
    monkeypatch.setattr(rag, "_BLOCK_NUMBERS", 24 * 4)  # now queries go four at a time, and documents too
    got = top_k(queries, documents, 11, block=block)
    assert torch.equal(got[1], expected[1])


def test_ties_go_to_the_lower_index():
    """Copies tie wherever they stand, and so do multiples, whose lengths differ."""
    query, document = (random(1, 37, seed=8), random(1, 37, seed=7).mul(9).round())  # integers: multiples are exact
    documents = document.repeat(4099, 1) * torch.randint(1, 9, (4099, 1), generator=torch.Generator().manual_seed(9))
    for block in (64, 8192):
        assert torch.equal(top_k(query, documents, 50, block=block)[1], torch.arange(50)[None])
    documents[[10, 20, 4000]] = query  # the three best
    assert top_k(query, documents, 6)[1].tolist() == [[10, 20, 4000, 0, 1, 2]]


def test_orthogonal_and_opposite():
    documents = torch.tensor([[-1.0, 0.0], [0.0, 2.0], [3.0, 0.0], [0.0, -1.0]])
    scores, indices = top_k(torch.tensor([[5.0, 0.0]]), documents, 4)
    assert indices.tolist() == [[2, 1, 3, 0]]
    assert scores.tolist() == [[1.0, 0.0, 0.0, -1.0]]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_every_floating_dtype(dtype):
    queries, documents = (random(4, 12, seed=10).to(dtype), random(60, 12, seed=11).to(dtype))
    scores, indices = top_k(queries, documents, 5)
    expected_scores, expected_indices = by_hand(queries, documents, 5)
    assert torch.equal(indices, expected_indices)
    torch.testing.assert_close(scores, expected_scores, rtol=2e-7, atol=2e-7)  # float64 rounded once to float32


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("scale", [2.0**-100, 2.0**100])
def test_lengths_do_not_matter_nor_overflow(dtype, scale):
    """Powers of two change no digit, so the scores are the very same, though the squares overflow in float32."""
    queries, documents = (random(4, 12, seed=10).to(dtype), random(60, 12, seed=11).to(dtype))
    expected = top_k(queries, documents, 5)
    for got in (top_k(queries * scale, documents, 5), top_k(queries, documents * scale, 5)):
        assert torch.equal(got[0], expected[0]) and torch.equal(got[1], expected[1])


def test_memory_does_not_grow_with_the_documents():
    def peak(n):
        queries, documents = random(64, 128), random(n, 128)
        return measure(lambda: top_k(queries, documents, 10), repeats=1, warmup=0, flush_cache=False).peak_bytes

    assert 0 < peak(40_000) <= 1.1 * peak(10_000)
    assert peak(40_000) < 64 * 40_000 * 4  # less than the matrix of all scores alone


def test_top_k_leaves_its_inputs_alone():
    queries, documents = random(3, 8), random(9, 8, seed=1)
    before = queries.clone(), documents.clone()
    top_k(queries.requires_grad_(), documents, 2)
    assert torch.equal(queries, before[0]) and torch.equal(documents, before[1])


GOOD = torch.ones(2, 3)


@pytest.mark.parametrize(
    ("queries", "documents", "k", "error", "message"),
    [
        (torch.ones(3), GOOD, 1, ValueError, "queries"),
        (GOOD, torch.ones(3), 1, ValueError, "documents"),
        (GOOD, torch.ones(2, 4), 1, ValueError, r"documents must be \(n, 3\)"),
        (torch.ones(0, 3), GOOD, 1, ValueError, "queries must not be empty"),
        (GOOD, torch.ones(0, 3), 1, ValueError, "documents must not be empty"),
        (torch.ones(2, 0), torch.ones(2, 0), 1, ValueError, "queries must not be empty"),
        (GOOD, GOOD, 3, ValueError, "k must be at most the number of documents, 2, got 3"),
        (GOOD, GOOD, 0, ValueError, "k must be at least 1"),
        (GOOD, GOOD, True, TypeError, "k must be an int"),
        (GOOD, GOOD, 1.0, TypeError, "k must be an int"),
        (GOOD.int(), GOOD, 1, TypeError, "queries must have a floating"),
        (GOOD, GOOD.numpy(), 1, TypeError, "documents must be a torch.Tensor"),
        (GOOD, torch.tensor([[1.0, 2, 3], [0, 0, 0]]), 1, ValueError, r"documents\[1\] is all zeros"),
        (torch.zeros(1, 3), GOOD, 1, ValueError, r"queries\[0\] is all zeros"),
        (GOOD, torch.tensor([[1.0, 2, 3], [0, math.nan, 0]]), 1, ValueError, r"documents\[1\] holds NaN"),
        (torch.tensor([[1.0, math.inf, 3]]), GOOD, 1, ValueError, r"queries\[0\] holds NaN or inf"),
        (GOOD, GOOD.to("meta"), 1, ValueError, "documents must be on cpu"),
    ],
)
def test_top_k_refuses_by_name(queries, documents, k, error, message):
    with pytest.raises(error, match=message):
        top_k(queries, documents, k)


def test_the_number_of_a_bad_row_counts_over_all_blocks():
    documents = torch.ones(100, 3)
    documents[77] = 0
    with pytest.raises(ValueError, match=r"documents\[77\]"):
        top_k(GOOD, documents, 1, block=8)


@pytest.mark.gpu
def test_top_k_on_a_gpu_equals_the_cpu():
    queries, documents = random(9, 384, seed=12), random(20_000, 384, seed=13)
    documents[10_000:] = documents[:10_000]
    scores, indices = top_k(queries.cuda(), documents.cuda(), 10)
    assert scores.is_cuda and indices.is_cuda
    assert torch.equal(indices.cpu(), top_k(queries, documents, 10)[1])


# chunks


def test_chunks_overlap_and_lose_no_word():
    text = " ".join(str(i) for i in range(10))
    assert chunk(text, 4, 1) == ["0 1 2 3", "3 4 5 6", "6 7 8 9"]
    assert chunk(text, 4, 0) == ["0 1 2 3", "4 5 6 7", "8 9"]
    assert chunk(text, 10, 3) == [text]
    assert chunk("  one\n two ", 5, 4) == ["one two"]


@pytest.mark.parametrize("length", range(1, 30))
@pytest.mark.parametrize(("size", "overlap"), [(1, 0), (5, 0), (5, 2), (5, 4), (7, 3)])
def test_chunks_of_any_length(length, size, overlap):
    everything = [str(i) for i in range(length)]
    pieces = [piece.split() for piece in chunk(" ".join(everything), size, overlap)]
    assert pieces[0] + [word for piece in pieces[1:] for word in piece[overlap:]] == everything
    assert all(len(piece) == size for piece in pieces[:-1])
    assert all(len(piece) > overlap for piece in pieces[1:])  # each says something new
    assert all(a[-overlap:] == b[:overlap] for a, b in pairwise(pieces) if overlap)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ((" \n", 5, 1), ValueError, "text must hold at least one word"),
        ((b"one", 5, 1), TypeError, "text must be a str"),
        (("one", 0, 0), ValueError, "size must be at least 1"),
        (("one", 5, 5), ValueError, "overlap must be .* less than size, 5, got 5"),
        (("one", 5, -1), ValueError, "overlap must be at least 0"),
        (("one", 5, 1.0), TypeError, "overlap must be an int"),
        (("one", True, 0), TypeError, "size must be an int"),
    ],
)
def test_chunk_refuses_by_name(arguments, error, message):
    with pytest.raises(error, match=message):
        chunk(*arguments)


# pooling


def test_pool_is_the_mean_of_the_real_tokens_at_length_one():
    hidden, mask = random(3, 5, 4), torch.tensor([[1, 1, 0, 0, 0], [0, 0, 1, 1, 1], [1, 1, 1, 1, 1]])
    pooled = rag.pool(hidden, mask)
    for row, real, vector in zip(hidden, mask.bool(), pooled, strict=True):
        mean = row[real].double().mean(0)
        torch.testing.assert_close(vector.double(), mean / mean.norm(), rtol=0, atol=1e-6)  # a few float32 roundings
    assert torch.equal(rag.pool(hidden, mask.bool()), pooled)


def test_nothing_at_padding_gets_into_pool():
    hidden, mask = random(2, 4, 3), torch.tensor([[1, 1, 0, 0], [1, 0, 0, 0]])
    spoiled = hidden.masked_fill(mask.unsqueeze(-1) == 0, math.nan)
    assert torch.equal(rag.pool(spoiled, mask), rag.pool(hidden, mask))


def test_pool_sums_half_precision_in_float32():
    hidden, mask = random(2, 300, 8).bfloat16() + 1, torch.ones(2, 300, dtype=torch.int64)
    pooled = rag.pool(hidden, mask)
    assert pooled.dtype == torch.float32
    torch.testing.assert_close(pooled, rag.pool(hidden.float(), mask), rtol=0, atol=0)


@pytest.mark.parametrize(
    ("hidden", "mask", "message"),
    [
        (torch.ones(2, 3), torch.ones(2, 3), "hidden must have 3 dimension"),
        (torch.ones(2, 3, 4), torch.ones(2, 4), r"mask must be \(2, 3\) to match hidden, got \(2, 4\)"),
        (torch.ones(2, 3, 4), torch.full((2, 3), 2), "mask must hold 0 and 1 only"),
        (torch.ones(2, 3, 4), torch.tensor([[1, 1, 1], [0, 0, 0]]), r"mask\[1\] has no token"),
    ],
)
def test_pool_refuses_by_name(hidden, mask, message):
    with pytest.raises(ValueError, match=message):
        rag.pool(hidden, mask)


@pytest.mark.parametrize("scale", [1e-42, 1e-30, 1e-14, 1e14, 1e30, 3e38])
def test_pool_has_length_one_whatever_the_size_of_its_tokens(scale):
    """Squares of 1e30 overflow in float32, those of 1e-30 vanish, and so does the sum of two tokens of 3e38."""
    pooled = rag.pool(torch.full((1, 2, 4), scale), torch.ones(1, 2))
    torch.testing.assert_close(pooled, torch.full((1, 4), 0.5), rtol=1e-6, atol=0)  # a few float32 roundings


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ([[1.0, -2.0], [-1.0, 2.0]], r"hidden\[1\] has a mean of zeros"),
        ([[0.0, 0.0], [0.0, 0.0]], r"hidden\[1\] has a mean of zeros"),
        ([[1.0, math.nan], [1.0, 1.0]], r"hidden\[1\] holds NaN or infinity"),
        ([[1.0, 1.0], [math.inf, 1.0]], r"hidden\[1\] holds NaN or infinity"),
    ],
)
def test_pool_names_the_text_that_has_no_direction(row, message):
    with pytest.raises(ValueError, match=message):
        rag.pool(torch.tensor([[[1.0, 2.0], [3.0, 4.0]], row]), torch.ones(2, 2))


def test_pool_refuses_other_types():
    with pytest.raises(TypeError, match="hidden must be a torch.Tensor, got list"):
        rag.pool([[[1.0]]], torch.ones(1, 1))
    with pytest.raises(TypeError, match="hidden must have a floating-point dtype"):
        rag.pool(torch.ones(1, 2, 3, dtype=torch.int64), torch.ones(1, 2))


def test_the_gradient_goes_through_pool():
    hidden, mask = random(2, 3, 4, dtype=torch.float64).requires_grad_(), torch.tensor([[1, 1, 0], [1, 1, 1]])
    assert torch.autograd.gradcheck(lambda tokens: rag.pool(tokens, mask), (hidden,))


@pytest.mark.parametrize(
    ("texts", "error", "message"),
    [
        ("one text", TypeError, "texts must be a list of str, got one str"),
        (["good", None], TypeError, r"texts\[1\] must be a str, got NoneType"),
        ([], ValueError, "texts must not be empty"),
    ],
)
def test_embed_refuses_by_name(texts, error, message):
    with pytest.raises(error, match=message):
        rag.embed(texts, None, None)


# fusion


def test_fuse_adds_reciprocal_ranks():
    ids, scores = rag.fuse([[7, 3, 9], [3, 5]])
    assert ids == [3, 7, 5, 9]
    np.testing.assert_allclose(scores, [1 / 62 + 1 / 61, 1 / 61, 1 / 62, 1 / 63], rtol=1e-15)
    assert rag.fuse([[1], [2, 1]], constant=0) == ([1, 2], [1.5, 1.0])
    assert rag.fuse([["a"], ["b", "a"]], constant=0) == (["a", "b"], [1.5, 1.0])


def test_fuse_orders_ties_by_id_whichever_ranking_comes_first():
    rankings = [[4, 1, 8], [8, 4, 1], [1, 8, 4]]
    for order in ([0, 1, 2], [1, 2, 0], [2, 0, 1], [2, 1, 0]):
        ids, scores = rag.fuse([rankings[i] for i in order])
        assert ids == [1, 4, 8] and len(set(scores)) == 1


def test_fuse_of_one_ranking_or_an_empty_one_keeps_the_order():
    assert rag.fuse([[5, 2, 9]])[0] == rag.fuse([[5, 2, 9], []])[0] == [5, 2, 9]
    assert rag.fuse([[], []]) == ([], [])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (([],), "rankings must not be empty"),
        (([[1], [2, 2]],), r"rankings\[1\] must hold each id once"),
        (([[1]], -1), "constant must be at least 0, got -1"),
    ],
)
def test_fuse_refuses_by_name(arguments, message):
    with pytest.raises(ValueError, match=message):
        rag.fuse(*arguments)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((None,), "rankings must be a list of lists of ids, got NoneType"),
        (({1: 2},), "rankings must be a list of lists of ids, got dict"),
        (("ab",), "rankings must be a list of lists of ids, got str"),
        ((["ab", "ba"],), r"rankings\[0\] must be a list of ids, got str"),
        (([[1], None],), r"rankings\[1\] must be a list of ids, got NoneType"),
        (([[1], [None]],), r"rankings\[1\] must hold ids, int or str, got NoneType"),
        (([[[1]]],), r"rankings\[0\] must hold ids, int or str, got list"),
        (([[1], ["a"]],), "rankings must hold ids of one kind, all int or all str, got both"),
        (([[1]], "60"), "constant must be a number, got str"),
    ],
)
def test_fuse_refuses_other_types(arguments, message):
    with pytest.raises(TypeError, match=message):
        rag.fuse(*arguments)


def test_fuse_takes_ranges_and_whole_numbers_of_numpy():
    assert rag.fuse([range(2), [np.int64(1)]], constant=0)[0] == [1, 0]


# the prompt


def rows(*texts):
    return [{"text": text} for text in texts]


def spaces(text):
    return len(text.split())


def test_the_prompt_is_blocks_with_a_blank_line_between_them():
    prompt, used = rag.assemble("When?", rows("At nine.", "It is blue."), 100, spaces, "Answer.")
    assert prompt == "Answer.\n\n[1] At nine.\n\n[2] It is blue.\n\nQuestion: When?\nAnswer:"
    assert used == [0, 1]
    assert rag.assemble("When?", [], 100, spaces, "Answer.") == ("Answer.\n\nQuestion: When?\nAnswer:", [])
    assert rag.assemble("When?", [], 100, spaces)[0].startswith(rag.INSTRUCTION + "\n\n")


def test_passages_go_in_whole_while_the_finished_prompt_fits():
    passages = rows("a b c d", "e f g h i j k l", "m")
    sizes = [spaces(rag.assemble("Q?", passages[:number], 10**6, spaces)[0]) for number in range(4)]
    for budget in range(sizes[0], sizes[3] + 3):
        prompt, used = rag.assemble("Q?", passages, budget, spaces)
        assert len(used) == sum(size <= budget for size in sizes[1:])
        assert used == list(range(len(used))) and spaces(prompt) == sizes[len(used)] <= budget
    # the third would fit where the second does not, and is worse
    assert rag.assemble("Q?", passages, sizes[1] + 2, spaces)[1] == [0]


def test_the_count_is_that_of_the_whole_prompt():
    """A counter that joins across borders: what it says of parts is no help."""
    asked = []

    def count(text):
        asked.append(text)
        return 1

    prompt, used = rag.assemble("Q?", rows("a", "b"), 1, count)
    assert used == [0, 1] and prompt == asked[-1]
    assert all(text.endswith("\n\nQuestion: Q?\nAnswer:") for text in asked)


def test_a_label_in_a_row_is_not_looked_at():
    passages = [{"text": "a", "relevant": False}, {"text": "b", "relevant": True}]
    assert rag.assemble("Q?", passages, 100, spaces) == rag.assemble("Q?", rows("a", "b"), 100, spaces)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((" ", [], 100, spaces), "question must hold at least one word"),
        (("Q?", [], 3, lambda text: 7), "budget must be at least 7, what the prompt takes without a passage, got 3"),
        (("Q?", [], 0, spaces), "budget must be at least 1"),
    ],
)
def test_assemble_refuses_by_name(arguments, message):
    with pytest.raises(ValueError, match=message):
        rag.assemble(*arguments)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ((None, [], 9, spaces), TypeError, "question must be a str, got NoneType"),
        (("Q?", [], 9, spaces, None), TypeError, "instruction must be a str, got NoneType"),
        (("Q?", [], 9.0, spaces), TypeError, "budget must be an int, got float"),
        (("Q?", [], 9, 7), TypeError, "count must be a function .*, got int"),
        (("Q?", "a passage", 9, spaces), TypeError, 'passages must be a list of rows with a "text", got str'),
        (("Q?", ["a passage"], 99, spaces), TypeError, r'passages\[0\] must be a row with a "text", got str'),
        (
            ("Q?", [{"text": "a"}, {"title": "b"}], 99, spaces),
            ValueError,
            r'passages\[1\] must have a "text", got only',
        ),
        (("Q?", [{}], 99, spaces), ValueError, r'passages\[0\] must have a "text", got only nothing'),
        (("Q?", [{"text": None}], 99, spaces), TypeError, r'passages\[0\]\["text"\] must be a str, got NoneType'),
    ],
)
def test_assemble_refuses_what_is_no_passage(arguments, error, message):
    with pytest.raises(error, match=message):
        rag.assemble(*arguments)


# the retriever, with an encoder that counts letters

FACTS = [
    "The ferry to Lindau leaves at nine.",
    "Bread is baked with flour, water and salt.",
    "A quokka is a small animal.",
    "The ferry is painted blue.",
]


def letters(texts):
    return torch.tensor([[float(text.lower().count(c)) for c in "abcdefghijklmnopqrstuvwxyz"] for text in texts])


def retriever(texts=FACTS, **options):
    made = Retriever(letters, **options)
    made.add(texts)
    return made


def test_search_by_embedding_is_top_k_over_the_chunks():
    hits = retriever().search("ferry to lindau", k=4)
    scores, indices = top_k(letters(["ferry to lindau"]), letters(FACTS), 4)
    assert [hit.index for hit in hits] == indices[0].tolist()
    assert [hit.score for hit in hits] == scores[0].tolist()
    assert [hit.text for hit in hits] == [FACTS[i] for i in indices[0].tolist()]


def test_chunks_know_the_text_they_come_from():
    made = retriever(["one two three four five", "six"], size=2, overlap=0)
    made.add(["seven eight nine"])
    assert made.chunks == ["one two", "three four", "five", "six", "seven eight", "nine"]
    assert made.sources == [0, 0, 0, 1, 2, 2]
    assert len(made) == 6
    hit = made.search("seven eight", k=1)[0]
    assert (hit.text, hit.index, hit.source) == ("seven eight", 4, 2)


def bm25_by_hand(query, texts, k1=1.5, b=0.75):
    """Robertson and Zaragoza 2009 in Lucene's form: idf = ln(1 + (N − n + ½)/(n + ½)), no (k1 + 1) above."""
    documents = [rag.words(text) for text in texts]
    mean = sum(map(len, documents)) / len(documents)
    scores = []
    for document in documents:
        score = 0.0
        for word in rag.words(query):
            n = sum(word in other for other in documents)
            tf = document.count(word)
            idf = math.log(1 + (len(documents) - n + 0.5) / (n + 0.5))
            score += idf * tf / (tf + k1 * (1 - b + b * len(document) / mean))
        scores.append(score)
    return scores


def test_bm25_equals_its_formula():
    query = "when does the blue ferry leave, the FERRY to Lindau? xyzzy"
    hits = retriever().search(query, k=4, method="bm25")
    expected = bm25_by_hand(query, FACTS)
    assert [hit.index for hit in hits] == sorted(range(4), key=lambda i: (-expected[i], i))
    # a handful of terms that the index keeps in float32, hence 1e-6
    np.testing.assert_allclose([hit.score for hit in hits], sorted(expected, reverse=True), rtol=1e-6)


def test_bm25_sees_texts_added_later():
    made = retriever()
    assert made.search("zeppelin", k=1, method="bm25")[0].score == 0
    made.add(["The zeppelin flies on Mondays."])
    assert made.search("zeppelin", k=1, method="bm25")[0].index == 4


def test_bm25_without_any_known_word_keeps_the_order():
    hits = retriever().search("???", k=4, method="bm25")
    assert [(hit.index, hit.score) for hit in hits] == [(0, 0.0), (1, 0.0), (2, 0.0), (3, 0.0)]
    made = Retriever(lambda texts: torch.ones(len(texts), 2))
    made.add(["!!!", "..."])  # chunks without a word
    assert [hit.score for hit in made.search("word", k=2, method="bm25")] == [0.0, 0.0]


def test_fusion_adds_the_two_reciprocal_ranks():
    made = retriever()
    query = "quokka on the ferry"
    by_embedding = [hit.index for hit in made.search(query, k=4)]
    by_words = [hit.index for hit in made.search(query, k=4, method="bm25") if hit.score > 0]
    expected = [
        1 / (61 + by_embedding.index(i)) + (1 / (61 + by_words.index(i)) if i in by_words else 0) for i in range(4)
    ]
    hits = made.search(query, k=4, method="fusion")
    assert [hit.index for hit in hits] == sorted(range(4), key=lambda i: (-expected[i], i))
    np.testing.assert_allclose([hit.score for hit in hits], sorted(expected, reverse=True), rtol=1e-12)  # float64


def test_fusion_reads_both_rankings_down_to_a_depth(monkeypatch):
    made, query = retriever(), "quokka on the ferry"
    by_embedding = [hit.index for hit in made.search(query, k=4)][:2]
    by_words = [hit.index for hit in made.search(query, k=4, method="bm25")][:2]
    monkeypatch.setattr(rag, "DEPTH", 2)
    hits = made.search(query, k=2, method="fusion")
    ids, scores = rag.fuse([by_embedding, by_words])
    assert [(hit.index, hit.score) for hit in hits] == list(zip(ids, scores, strict=True))[:2]


@pytest.mark.parametrize("method", rag.METHODS)
def test_saved_and_loaded_it_finds_the_same(tmp_path, method):
    made = retriever(["Grüße aus Lindau am Bodensee, 東京 too", *FACTS], size=4, overlap=1)
    made.save(tmp_path / "new" / "index")
    loaded = Retriever.load(tmp_path / "new" / "index", letters)
    assert loaded.search("ferry", k=5, method=method) == made.search("ferry", k=5, method=method)
    assert (loaded.size, loaded.overlap, loaded.chunks, loaded.sources) == (4, 1, made.chunks, made.sources)
    assert torch.equal(loaded.embeddings, made.embeddings)
    loaded.add(["one more"])
    assert loaded.sources[-1] == 5


def test_saving_again_replaces_and_leaves_nothing_behind(tmp_path):
    made = retriever()
    made.save(tmp_path)
    made.add(["another fact"])
    made.save(tmp_path)
    made.save(tmp_path)
    assert sorted(path.suffix for path in tmp_path.iterdir()) == [".json", ".safetensors"]
    assert len(Retriever.load(tmp_path, letters)) == 5


def test_a_save_cut_short_leaves_the_old_index(tmp_path, monkeypatch):
    made = retriever()
    made.save(tmp_path)
    made.add(["another fact"])
    write, calls = rag.atomic_write, []

    def cut_short(path, content):
        if calls:
            raise OSError("no space left")
        calls.append(path)
        return write(path, content)

    monkeypatch.setattr(rag, "atomic_write", cut_short)
    with pytest.raises(OSError, match="no space left"):
        made.save(tmp_path)
    assert len(Retriever.load(tmp_path, letters)) == 4


def test_damaged_files_are_told(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"index\.json"):
        Retriever.load(tmp_path, letters)
    retriever().save(tmp_path)
    index, embeddings = tmp_path / "index.json", next(tmp_path.glob("*.safetensors"))
    good_index, good_data = index.read_text(), embeddings.read_bytes()

    embeddings.write_bytes(good_data[:-1] + bytes([good_data[-1] ^ 1]))
    with pytest.raises(ValueError, match="damaged: its checksum"):
        Retriever.load(tmp_path, letters)
    embeddings.write_bytes(good_data)
    for changes in ({"format": 2}, {"chunks": ["one"]}, {"size": None}):
        index.write_text(json.dumps(json.loads(good_index) | changes))
        with pytest.raises(ValueError, match=r"index\.json"):
            Retriever.load(tmp_path, letters)
    index.write_text("{")
    with pytest.raises(ValueError, match=r"index\.json is damaged"):
        Retriever.load(tmp_path, letters)
    index.write_text(good_index)
    embeddings.unlink()
    with pytest.raises(FileNotFoundError, match="embeddings-"):
        Retriever.load(tmp_path, letters)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: Retriever(letters, size=5, overlap=5), ValueError, "overlap"),
        (lambda: Retriever(letters).add([]), ValueError, "texts must not be empty"),
        (lambda: Retriever(letters).add("one text"), TypeError, "texts must be a list"),
        (lambda: Retriever(letters).add(["good", " "]), ValueError, r"texts\[1\]: text must hold"),
        (lambda: Retriever(letters).add(["good", None]), TypeError, r"texts\[1\]: text must be a str"),
        (lambda: Retriever(lambda texts: [1.0]).add(["good"]), ValueError, r"encoder must return .* got list"),
        (lambda: Retriever(lambda texts: torch.ones(3, 2)).add(["a"]), ValueError, r"encoder must .* got \(3, 2\)"),
        (lambda: Retriever(letters).search("a", 1), ValueError, "k must be at most the number of chunks, 0"),
        (lambda: Retriever(letters).save("nowhere"), ValueError, "retriever is empty"),
        (lambda: retriever().search("a", 5), ValueError, "k must be at most the number of chunks, 4, got 5"),
        (lambda: retriever().search("a", 0), ValueError, "k must be at least 1"),
        (lambda: retriever().search("", 1), ValueError, "query must hold"),
        (lambda: retriever().search(["a"], 1), TypeError, "query must be a str"),
        (lambda: retriever().search("a", 1, method="dense"), ValueError, "method must be one of embedding, bm25"),
    ],
)
def test_retriever_refuses_by_name(call, error, message):
    with pytest.raises(error, match=message):
        call()


def test_a_failed_add_changes_nothing():
    made = retriever()
    with pytest.raises(ValueError, match=r"texts\[1\]"):
        made.add(["good", ""])
    made._encoder = lambda texts: torch.ones(len(texts), 3)
    with pytest.raises(ValueError, match=r"encoder must return \(n, 26\) as before, got \(1, 3\)"):
        made.add(["good"])
    assert len(made) == 4 and len(made.embeddings) == 4


# MiniLM


@pytest.fixture(scope="module")
def minilm():
    from lecturekit.models import load_sentence_encoder

    return load_sentence_encoder("cpu")


@pytest.mark.models
def test_embed_is_the_masked_mean_of_each_text_alone(minilm):
    model, tokenizer = minilm
    texts = [*FACTS, "word " * 400]  # the last is cut
    together = rag.embed(texts, model, tokenizer, batch_size=3)
    assert together.shape == (5, 384) and not together.requires_grad
    for text, vector in zip(texts, together, strict=True):
        tokens = tokenizer(text, return_tensors="pt", truncation=True, max_length=256)
        with torch.no_grad():
            mean = model(**tokens).last_hidden_state[0].mean(0)  # alone there is no padding to mask
        # float32 sums in another order through six layers, on a vector of length 1
        torch.testing.assert_close(vector, mean / mean.norm(), rtol=0, atol=1e-5)
    with pytest.raises(ValueError, match="texts must not be empty"):
        rag.embed([], model, tokenizer)


@pytest.mark.models
def test_minilm_finds_by_meaning_where_no_word_is_shared():
    made = Retriever()
    made.add(FACTS)
    query = "Which ingredients make a loaf?"
    assert made.search(query, k=1)[0].text == FACTS[1]
    assert made.search("Which colour does the boat have?", k=1)[0].text == FACTS[3]
    # only the word "a" is shared, and with the wrong fact
    assert made.search(query, k=1, method="bm25")[0].text == FACTS[2]
