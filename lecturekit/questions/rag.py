"""The question of lab 12: exact cosine search, the retrieval step of retrieval-augmented generation.

Lewis et al., "Retrieval-Augmented Generation for Knowledge-Intensive NLP Tasks", NeurIPS 2020; Karpukhin et al.,
"Dense Passage Retrieval for Open-Domain Question Answering", EMNLP 2020.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from lecturekit.checking import Case, Draw, question

LAB = "lab12_rag"
SLIDE = "Retrieval Augmented Generation (RAG)"

GAP = 0.01
"""Least difference between two cosines of one query.

Two right answers may differ in a cosine by a few rounding errors; even with the 10-bit mantissas of TF32 that is
about 0.001. So nobody's rounding can change the order, and there are no ties to be ordered one way or another.
"""


# rag.top_k -----------------------------------------------------------------------------------------------------------


@question("rag.top_k", lab=LAB, points=25, slide=SLIDE, returns=("scores", "indices"))
def top_k(draw: Draw) -> Case:
    """Find the k documents nearest in meaning to each query."""
    k, q = sorted(draw.sizes(2, low=2, high=5))  # at least as many queries as k: topk over the wrong axis is no error
    d, n = draw.sizes(2, low=6, high=13)
    edge = draw.edge("k = 1", "every document, best first", "one query", "a document that is a query, made longer")
    q = 1 if edge == "one query" else q
    queries = draw.normal(q, d) * draw.uniform(q, 1, low=0.5, high=4)
    documents = _documents(draw, queries, n, with_copy=edge == "a document that is a query, made longer")
    return Case(
        edge,
        queries=queries,
        documents=documents,
        k={"k = 1": 1, "every document, best first": n}.get(edge or "", k),
    )


def _documents(draw: Draw, queries: Tensor, count: int, with_copy: bool) -> Tensor:
    """Documents of different lengths whose cosines to each query lie at least GAP apart. (count, d)."""
    directions = F.normalize(queries.double(), dim=1)
    chosen = [directions[-1]] if with_copy else []
    while len(chosen) < count:
        one = F.normalize(draw.normal(queries.shape[1]).double(), dim=0)
        if not chosen or bool((directions @ (torch.stack(chosen) - one).T).abs().min() > GAP):
            chosen.append(one)
    order = draw.permutation(count)
    return (torch.stack(chosen)[order] * draw.uniform(count, 1, low=0.5, high=4)).float()


top_k.oracle("lecturekit.prompting.rag:top_k")
top_k.tolerance(
    ulps=lambda case: 2 * case.queries.shape[1] + 8,
    magnitude=lambda case, _: 1.0,
    why="a dot product of depth d, two lengths (d / 2 each under the root), the divisions; terms sum to at most |q||d|",
)


def _rounding(case: Case) -> float:
    """What the tolerance allows, for the laws, in float32 or TF32."""
    tf32 = case.queries.is_cuda and torch.backends.cuda.matmul.allow_tf32
    return (2 * case.queries.shape[1] + 8) * (2.0**-10 if tf32 else torch.finfo(torch.float32).eps)


def _indices_lead_to_scores(case: Case, parts: dict[str, Any]) -> bool:
    """Each score must be the cosine of the document that its index names, here of one pair of vectors at a time."""
    for query, scores, indices in zip(case.queries.double(), parts["scores"], parts["indices"], strict=True):
        for score, index in zip(scores, indices, strict=True):
            document = case.documents[int(index)].double()
            cosine = query @ document / (query @ query * (document @ document)).sqrt()
            if not abs(float(score) - float(cosine)) <= _rounding(case):
                return False
    return True


top_k.law("each score is the cosine between the query and the document that the index names", _indices_lead_to_scores)
top_k.law(
    "the best document comes first", lambda case, parts: bool((parts["scores"].diff(dim=1) <= _rounding(case)).all())
)
top_k.law(
    "no document is found twice",
    lambda case, parts: all(len(set(row)) == len(row) for row in parts["indices"].tolist()),
)
top_k.law(
    "a cosine lies between -1 and 1", lambda case, parts: bool((parts["scores"].abs() <= 1 + _rounding(case)).all())
)


def _cosines(queries: Tensor, documents: Tensor) -> Tensor:
    """(q, d) and (n, d) → (q, n)."""
    return F.normalize(queries, dim=1) @ F.normalize(documents, dim=1).T


@top_k.misconception(
    "compares by dot product, lengths and all",
    hint="Make one document ten times as long: should it be found more often?",
)
def _(queries, documents, k):
    return (queries @ documents.T).topk(k, dim=1)


@top_k.misconception("normalises only the queries", hint="A cosine has two lengths below its fraction line. Whose?")
def _(queries, documents, k):
    return (F.normalize(queries, dim=1) @ documents.T).topk(k, dim=1)


@top_k.misconception(
    "normalises only the documents",
    hint="The order is right, but can a cosine be larger than 1? Which length is still in it?",
)
def _(queries, documents, k):
    return (queries @ F.normalize(documents, dim=1).T).topk(k, dim=1)


@top_k.misconception(
    "normalises along the wrong axis",
    hint="Print the length of one document after normalising. Which axis holds the numbers of one vector?",
)
def _(queries, documents, k):
    return (F.normalize(queries, dim=0) @ F.normalize(documents, dim=0).T).topk(k, dim=1)


@top_k.misconception("divides by the squared lengths", hint="Is x · x the length of x?")
def _(queries, documents, k):
    squares = queries.square().sum(1, keepdim=True) * documents.square().sum(1)
    return (queries @ documents.T / squares).topk(k, dim=1)


@top_k.misconception("finds the worst documents", hint="Does a large cosine mean near or far?")
def _(queries, documents, k):
    return _cosines(queries, documents).topk(k, dim=1, largest=False)


@top_k.misconception(
    "has the best k, but worst first", hint="Right documents, wrong order: in which direction does sort go by default?"
)
def _(queries, documents, k):
    scores, indices = _cosines(queries, documents).sort(dim=1)
    return scores[:, -k:], indices[:, -k:]


@top_k.misconception(
    "has the best k, but in the order of their indices",
    hint="The first passage is the one a reader trusts most. By what is your result ordered?",
)
def _(queries, documents, k):
    scores = _cosines(queries, documents)
    indices = scores.topk(k, dim=1).indices.sort(dim=1).values
    return scores.gather(1, indices), indices


@top_k.misconception(
    "takes the best queries of each document, not the best documents of each query",
    hint="Which axis of the score matrix runs over the documents? The result has one row for each query.",
)
def _(queries, documents, k):
    return _cosines(queries, documents).topk(k, dim=0)


@top_k.misconception(
    "leaves out the best one", hint="Ranks start at 0. Is the query itself among the documents, to be skipped?"
)
def _(queries, documents, k):
    scores, indices = _cosines(queries, documents).sort(dim=1, descending=True)
    return scores[:, 1 : k + 1], indices[:, 1 : k + 1]


@top_k.misconception(
    "measures Euclidean distance",
    hint="Two vectors of one direction but different lengths: how alike should they be called here?",
)
def _(queries, documents, k):
    return torch.cdist(queries, documents).topk(k, dim=1, largest=False)


@top_k.misconception(
    "returns distances, 1 - cosine, for similarities", hint="What score should a document get that equals the query?"
)
def _(queries, documents, k):
    return (1 - _cosines(queries, documents)).topk(k, dim=1, largest=False)


@top_k.misconception("returns the indices before the scores", hint="Which of the two does the signature name first?")
def _(queries, documents, k):
    scores, indices = _cosines(queries, documents).topk(k, dim=1)
    return indices, scores


@top_k.alternative("normalise, multiply, topk")
def _(queries, documents, k):
    queries = queries / queries.norm(dim=-1, keepdim=True)
    documents = documents / documents.norm(dim=-1, keepdim=True)
    return torch.topk(queries @ documents.T, k)


@top_k.alternative("cosine_similarity and argsort")
def _(asked, texts, count):
    scores = F.cosine_similarity(asked[:, None], texts[None], dim=-1)
    best = scores.argsort(dim=-1, descending=True)[:, :count]
    return torch.take_along_dim(scores, best, dim=-1), best


@top_k.alternative("einsum, divided by the outer product of the lengths")
def _(queries, documents, k):
    products = torch.einsum("qd,nd->qn", queries, documents)
    lengths = torch.outer(queries.pow(2).sum(1).sqrt(), documents.pow(2).sum(1).sqrt())
    scores, order = (products / (lengths + 1e-8)).sort(dim=1, descending=True)
    return scores[:, :k], order[:, :k]


@top_k.alternative("loops, float64 inside")
def _(*args):
    queries, documents, k = args
    scores = torch.empty(len(queries), k, device=queries.device)
    indices = torch.empty(len(queries), k, dtype=torch.long, device=queries.device)
    for row, query in enumerate(queries.double()):
        found = []
        for number, document in enumerate(documents.double()):
            found.append((float(query @ document / (query.norm() * document.norm())), number))
        found.sort(reverse=True)
        for rank, (score, number) in enumerate(found[:k]):
            scores[row, rank], indices[row, rank] = score, number
    return scores, indices


@top_k.alternative("documents first, then transposed")
def _(q, d, k):
    similarity = (F.normalize(d, dim=1) @ F.normalize(q, dim=1).T).T
    values, places = similarity.topk(k, dim=1)
    return [values, places]
