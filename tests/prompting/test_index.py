import json
import math
import re

import numpy as np
import pytest
import torch
from torch.nn.functional import normalize

from lecturekit.data import data_dir
from lecturekit.prompting import index as module
from lecturekit.prompting.index import Index
from lecturekit.prompting.rag import top_k
from lecturekit.timing import measure

BOTH = pytest.mark.parametrize("int8", [False, True], ids=["float32", "int8"])


def random(*shape, seed=0, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def same(queries, index, k):
    """The search gives, bit for bit, what top_k gives on all rows."""
    scores, indices = index.search(queries, k)
    expected_scores, expected_indices = top_k(queries, index.rows, k)
    assert indices.dtype == torch.int64 and scores.dtype == torch.float32
    assert torch.equal(indices, expected_indices)
    assert torch.equal(scores, expected_scores)
    return scores, indices


@pytest.fixture
def read(monkeypatch):
    """How many documents each call of top_k inside a search was given."""
    sizes = []

    def counted(queries, documents, k):
        sizes.append(len(documents))
        return top_k(queries, documents, k)

    monkeypatch.setattr(module, "top_k", counted)
    return sizes


@pytest.fixture
def small(monkeypatch):
    """Blocks of a few hundred scores and groups of 4, so that a little data makes many of them."""
    monkeypatch.setattr(module, "_GROUP", 4)
    monkeypatch.setattr(module, "_SCORES", 256)
    monkeypatch.setattr(module, "_NUMBERS", 500)


@BOTH
@pytest.mark.parametrize(
    ("q", "n", "d", "k"),
    [
        (1, 1, 1, 1),
        (3, 50, 8, 50),  # k = n
        (5, 64, 8, 1),  # one group
        (5, 127, 17, 1),  # and a rest of 63
        (5, 1280, 3, 20),  # as many groups as k
        (5, 1279, 3, 20),  # one fewer
        (64, 5000, 24, 10),
        (65, 3000, 384, 10),  # queries one by one from the second batch on
        (150, 2000, 5, 7),
        (1, 70_000, 4, 1000),
    ],
)
def test_equals_top_k(q, n, d, k, int8):
    same(random(q, d, seed=1), Index(random(n, d, seed=2), int8=int8), k)


@BOTH
@pytest.mark.parametrize("q", [1, 3, 40])
@pytest.mark.parametrize("n", [255, 256, 257, 260, 1003])
def test_equals_top_k_over_many_blocks(q, n, int8, small, read):
    documents, queries = random(n, 16, seed=3), random(q, 16, seed=4)
    index = Index(documents, int8=int8)
    for k in (1, 2, 9, 33, 63, 64, 65):
        read.clear()
        same(queries, index, k)
        assert sum(read) > 0
    best_last = documents[(documents @ queries[0]).argsort()]
    for ordered in (best_last, best_last.flip(0)):
        same(queries, Index(ordered, int8=int8), 9)


@BOTH
def test_only_a_few_documents_are_read_in_float64(int8, read):
    index = Index(random(20_000, 96, seed=5), int8=int8)
    same(random(64, 96, seed=6), index, 10)
    same(random(1, 96, seed=6), index, 10)
    assert len(read) == 2
    assert 640 <= read[0] + 64 < 20_000 / 10
    assert 10 <= read[1] < 20_000 / 100


@BOTH
def test_close_to_the_search_in_the_documents_as_given(int8):
    """Rounding to float32 moves a row by 2⁻²⁴ of its length, and so its cosine by no more; the score is rounded too."""
    queries, documents = random(20, 384, seed=3) * 7, random(5000, 384, seed=4) * 3
    scores, indices = Index(documents, int8=int8).search(queries, 10)
    expected_scores, expected_indices = top_k(queries, documents, 10)
    torch.testing.assert_close(scores, expected_scores, rtol=0, atol=2.0**-22)
    differ = indices != expected_indices
    assert torch.all((scores - expected_scores).abs()[differ] <= 2.0**-22)
    assert differ.float().mean() < 0.02


@BOTH
def test_equals_faiss(int8):
    import faiss

    queries, documents = random(20, 384, seed=3), random(5000, 384, seed=4)
    theirs = faiss.IndexFlatIP(384)
    theirs.add(normalize(documents, dim=1).numpy())
    expected_scores, expected_indices = theirs.search(normalize(queries, dim=1).numpy(), 10)
    scores, indices = Index(documents, int8=int8).search(queries, 10)
    # faiss sums 384 products in float32: at worst 384 · 6e-8 · Σ|q_i d_i|, and Σ|q_i d_i| ≤ 1 for unit vectors
    np.testing.assert_allclose(scores.numpy(), expected_scores, rtol=0, atol=2.5e-5)
    differ = indices.numpy() != expected_indices
    assert np.all(np.abs(scores.numpy() - expected_scores)[differ] < 2.5e-5)
    assert differ.mean() < 0.02


@pytest.fixture(scope="module")
def sentences():
    """MiniLM's embeddings of 500 different sentences of the course's data."""
    from lecturekit.prompting.rag import sentence_encoder

    texts: dict[str, None] = {}
    for line in (data_dir() / "service_preferences" / "train.jsonl").read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        texts.update(dict.fromkeys(re.split(r"(?<=[.!?]) ", " ".join((row["message"], row["better"])))))
    return sentence_encoder("cpu")(list(texts)[:500])


@BOTH
@pytest.mark.models
def test_real_embeddings(sentences, int8, read):
    import faiss

    queries, documents = sentences[:40], sentences[40:]
    scores, indices = same(queries, Index(documents, int8=int8), 5)
    assert 5 * 40 / 10 < read[0] < len(documents)
    theirs = faiss.IndexFlatIP(384)
    theirs.add(documents.numpy())
    expected_scores, expected_indices = theirs.search(queries.numpy(), 5)
    np.testing.assert_allclose(scores.numpy(), expected_scores, rtol=0, atol=2.5e-5)  # as above
    differ = indices.numpy() != expected_indices
    assert np.all(np.abs(scores.numpy() - expected_scores)[differ] < 2.5e-5)


@BOTH
def test_scores_closer_than_the_cheap_product_can_tell(int8, small):
    """Documents that differ from one another by about the rounding of a float32 product, or by nothing."""
    query = random(1, 300, seed=7)
    documents = query + 1e-4 * random(1000, 300, seed=8)
    documents[500:] = documents[:500]
    documents[::3] = random(334, 300, seed=9)
    scores, _ = same(query, Index(documents, int8=int8), 30)
    assert scores.unique().numel() < 30 and scores[0, 0] - scores[0, -1] < 300 * 2.0**-23


@BOTH
def test_documents_that_int8_renders_badly(int8, small):
    """One large number leaves the others of its row no steps. Some rows of a group, or all, have one."""
    documents, queries = random(600, 40, seed=10), random(9, 40, seed=11)
    documents[::7, 3] = 60
    documents[100:200, 5] = -90
    queries[4, 3] = 50
    same(queries, Index(documents, int8=int8), 12)


def _row(first, mean, others=4000):
    """A row of length 1: ``first``, then numbers of one size whose signs are such that their mean is ``mean`` of it."""
    signs = torch.ones(others)
    signs[: round(others * (1 - mean) / 2)] = -1
    return torch.cat(
        [
            torch.tensor([first]),
            signs[torch.randperm(others, generator=torch.Generator().manual_seed(0))]
            * ((1 - first**2) / others) ** 0.5,
        ]
    )


def _beside_one(steps, others=4000):
    """A row of a large number and small ones, which are ``steps`` of the 127 steps that int8 has for the large one."""
    return normalize(torch.cat([torch.ones(1), torch.full((others,), steps / 127)]), dim=0)


EVEN = _row(0.0, 1.0)  # int8 renders it exactly
WORST = {  # query, the document that is best, and one that the int8 score alone would put far before it
    "the best is rounded down to nothing": (EVEN, _beside_one(0.49), _row(0.0, 0.1)),
    "another is rounded up to the double": (EVEN, _row(0.0, 0.3), _beside_one(0.51)),
    "the query is rounded down to nothing": (_beside_one(0.49), EVEN, _row(0.1, 0.0)),
}


@pytest.mark.parametrize("case", WORST)
@pytest.mark.parametrize("place", [1, 998])
def test_errors_of_int8_that_add_up(case, place, small):
    """The bound is no rule of thumb: here all roundings of a row go the same way, and nearly use it up."""
    query, best, other = WORST[case]
    documents = _row(0.0, 0.0).repeat(1000, 1)
    documents[500] = other
    documents[place] = best
    assert same(query[None], Index(documents, int8=True), 1)[1].item() == place


@BOTH
def test_ties_go_to_the_lower_index(int8, small):
    query, document = random(1, 37, seed=8), random(1, 37, seed=7)
    documents = document.repeat(4099, 1)
    index = Index(documents, int8=int8)
    assert index.search(query, 50)[1].tolist() == [list(range(50))]
    documents[[10, 20, 4000, 4098]] = query
    index = Index(documents, int8=int8)
    assert index.search(query, 7)[1].tolist() == [[10, 20, 4000, 4098, 0, 1, 2]]


@BOTH
def test_thousands_of_copies_are_searched_without_a_shortlist(int8, monkeypatch, read):
    monkeypatch.setattr(module, "_FOUND", 2000)
    index = Index(random(1, 16).repeat(3000, 1), int8=int8)
    assert same(random(2, 16, seed=1), index, 40)[1].tolist() == [list(range(40))] * 2
    monkeypatch.setattr(module, "_FOUND", 2**20)
    monkeypatch.setattr(module, "_GATHERED", 2000 * 16)
    same(random(2, 16, seed=1), index, 40)
    monkeypatch.setattr(module, "_GATHERED", 3000 * 16)
    same(random(2, 16, seed=1), index, 40)
    assert read == [3000, 3000, 3000]


@BOTH
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_every_floating_dtype(dtype, int8):
    queries, documents = random(4, 12, seed=10).to(dtype), random(700, 12, seed=11).to(dtype)
    index = Index(documents, int8=int8)
    assert index.rows.dtype == torch.float32
    same(queries, index, 5)
    torch.testing.assert_close(index.rows, normalize(documents.double()).float(), rtol=2e-7, atol=0)


@BOTH
@pytest.mark.parametrize("scale", [2.0**-100, 2.0**100])
def test_lengths_do_not_matter_nor_overflow(scale, int8):
    queries, documents = random(4, 12, seed=10), random(700, 12, seed=11)
    expected = same(queries, Index(documents, int8=int8), 5)
    for got in (same(queries * scale, Index(documents, int8=int8), 5), same(queries, Index(documents * scale), 5)):
        assert torch.equal(got[0], expected[0]) and torch.equal(got[1], expected[1])


@BOTH
@pytest.mark.parametrize("precision", ["highest", "high", "medium"])
def test_exact_though_torch_may_multiply_coarsely(precision, int8):
    before = torch.get_float32_matmul_precision()
    documents = normalize(random(1, 384)) + 0.01 * random(4000, 384, seed=1)
    index = Index(documents, int8=int8)
    try:
        torch.set_float32_matmul_precision(precision)
        same(random(64, 384, seed=2), index, 10)
    finally:
        torch.set_float32_matmul_precision(before)


@BOTH
@pytest.mark.parametrize("copies", [False, True], ids=["different", "copies"])
def test_memory_does_not_grow_with_the_documents(int8, copies):
    def peak(n):
        queries = random(64, 128)
        index = Index(random(1, 128, seed=1).expand(n, -1) if copies else random(n, 128, seed=1), int8=int8)
        return measure(lambda: index.search(queries, 10), repeats=1, warmup=0, flush_cache=False).peak_bytes

    assert 0 < peak(80_000) <= 1.1 * peak(40_000)
    assert peak(80_000) < 250e6


@BOTH
def test_add(int8, small):
    queries, documents = random(5, 12, seed=1), random(1000, 12, seed=2)
    whole = Index(documents, int8=int8)
    index = Index(documents[:33], int8=int8)
    index.add(documents[33:34])
    index.add(documents[34:])
    assert len(index) == 1000 and torch.equal(index.rows, whole.rows)
    same(queries, index, 9)
    for wrong, message in (
        (torch.ones(2, 11), r"documents must be \(\.\., 12\)"),
        (torch.tensor([[1.0] * 12, [0.0] * 12]), r"documents\[1\] is all zeros"),
        (torch.ones(12), "documents must have 2 dim"),
        (torch.ones(1, 12, device="meta"), "documents must be on cpu"),
    ):
        with pytest.raises(ValueError, match=message):
            index.add(wrong)
    assert len(index) == 1000
    same(queries, index, 9)


def test_the_index_and_its_arguments_share_nothing():
    queries, documents = random(3, 8).requires_grad_(), random(900, 8, seed=1).requires_grad_()
    index = Index(documents)
    before = queries.detach().clone(), documents.detach().clone(), index.search(queries, 2)
    with torch.no_grad():
        documents.zero_()
    scores, indices = index.search(queries, 2)
    assert torch.equal(indices, before[2][1]) and not scores.requires_grad and not index.rows.requires_grad
    assert torch.equal(queries, before[0])


GOOD = torch.ones(2, 3)


@pytest.mark.parametrize(
    ("documents", "error", "message"),
    [
        (torch.ones(3), ValueError, "documents must have 2 dim"),
        (torch.ones(0, 3), ValueError, "documents must not be empty"),
        (torch.ones(2, 0), ValueError, "documents must not be empty"),
        (GOOD.int(), TypeError, "documents must have a floating"),
        (GOOD.numpy(), TypeError, "documents must be a torch.Tensor"),
        (torch.tensor([[1.0, 2, 3], [0, 0, 0]]), ValueError, r"documents\[1\] is all zeros"),
        (torch.tensor([[1.0, 2, 3], [0, math.nan, 0]]), ValueError, r"documents\[1\] holds NaN"),
    ],
)
def test_refuses_documents_by_name(documents, error, message):
    with pytest.raises(error, match=message):
        Index(documents)


@pytest.mark.parametrize(
    ("queries", "k", "error", "message"),
    [
        (torch.ones(3), 1, ValueError, "queries must have 2 dim"),
        (torch.ones(2, 4), 1, ValueError, r"queries must be \(\.\., 3\)"),
        (torch.ones(0, 3), 1, ValueError, "queries must not be empty"),
        (GOOD, 3, ValueError, "k must be at most the number of documents, 2, got 3"),
        (GOOD, 0, ValueError, "k must be at least 1"),
        (GOOD, True, TypeError, "k must be an int"),
        (GOOD, 1.0, TypeError, "k must be an int"),
        (GOOD.int(), 1, TypeError, "queries must have a floating"),
        (GOOD.numpy(), 1, TypeError, "queries must be a torch.Tensor"),
        (torch.zeros(1, 3), 1, ValueError, r"queries\[0\] is all zeros"),
        (torch.tensor([[1.0, math.inf, 3]]), 1, ValueError, r"queries\[0\] holds NaN or inf"),
        (GOOD.to("meta"), 1, ValueError, "queries must be on cpu"),
    ],
)
def test_refuses_queries_by_name(queries, k, error, message):
    with pytest.raises(error, match=message):
        Index(GOOD).search(queries, k)


def test_the_number_of_a_bad_row_counts_over_all_blocks():
    rows = torch.ones(70_000, 3)
    rows[69_999] = 0
    with pytest.raises(ValueError, match=r"documents\[69999\]"):
        Index(rows)
    with pytest.raises(ValueError, match=r"queries\[150\]"):
        Index(GOOD).search(rows[-151:], 1)


def test_int8_where_it_cannot_be():
    long = torch.ones(1, 2**17 + 1)
    with pytest.raises(ValueError, match="d at most 131072"):
        Index(long, int8=True)
    assert Index(long).search(long, 1)[1].tolist() == [[0]]


@pytest.mark.gpu
def test_on_a_gpu_equals_the_cpu():
    queries, documents = random(70, 384, seed=12), random(20_000, 384, seed=13)
    documents[10_000:] = documents[:10_000]
    index = Index(documents.cuda())
    scores, indices = same(queries.cuda(), index, 10)
    assert scores.is_cuda and indices.is_cuda
    assert torch.equal(indices.cpu(), Index(documents).search(queries, 10)[1])
    with pytest.raises(ValueError, match="on cpu"):
        Index(documents.cuda(), int8=True)
