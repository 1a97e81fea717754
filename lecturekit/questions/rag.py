"""The questions of lab 12 but for two: chunks, their embeddings, the search by meaning, the prompt made of what was
found, and how good the search was. The search by words, and both rankings in one, are in bm25.py.

Lewis et al., "Retrieval-Augmented Generation for Knowledge-Intensive NLP Tasks", NeurIPS 2020; Karpukhin et al.,
"Dense Passage Retrieval for Open-Domain Question Answering", EMNLP 2020; the source of each step is beside its
reference in lecturekit.prompting.
"""

from __future__ import annotations

import math
import operator
import re
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from lecturekit.checking import Case, Draw, Unfit, question
from lecturekit.checking.compare import describe, precision

LAB = "lab12_rag"
SLIDE = "Retrieval Augmented Generation (RAG)"

WORDS = (
    "ferry harbour lantern orchard salt glass tower meadow copper bridge winter market river stone baker violin "
    "thunder clock garden island wool amber kettle falcon mill pepper canal chapel honey anchor"
).split()


def _texts(draw: Draw, count: int) -> list[str]:
    """So many different words."""
    return [WORDS[place] for place in draw.permutation(len(WORDS))[:count].tolist()]


# rag.chunk -----------------------------------------------------------------------------------------------------------


@question("rag.chunk", lab=LAB, points=10, slide=SLIDE, cases=7)
def chunk(draw: Draw) -> Case:
    """Cut a text into overlapping chunks."""
    edge = draw.edge(
        "the last chunk is full",
        "no more words than the overlap",
        "no overlap",
        "line breaks and double spaces",
        "overlap = size - 1",
    )
    size = draw.integer(6, 8)
    overlap = {"no overlap": 0, "overlap = size - 1": size - 1}.get(edge or "", draw.integer(1, 2))
    step = size - overlap
    behind = 0 if edge == "the last chunk is full" else draw.integer(1, step - 1) if step > 1 else 0
    length = overlap + draw.integer(2, 3) * step + behind
    if edge == "no more words than the overlap":
        overlap = draw.integer(3, 4)
        length = overlap - draw.integer(0, 1)
    words = [word + "." * (place % 5 == 1) for place, word in enumerate(_texts(draw, length))]
    blanks = {
        "line breaks and double spaces": ["\n", "  ", " ", "\n\n", "\t"],
        "no more words than the overlap": ["  \n"],
    }.get(edge or "", [" "])
    text = "".join(word + blanks[place % len(blanks)] for place, word in enumerate(words)).rstrip()
    return Case(
        edge, text=f"\n  {text} \n" if edge == "line breaks and double spaces" else text, size=size, overlap=overlap
    )


chunk.oracle("lecturekit.prompting.rag:chunk")
chunk.law(
    "no word is lost: the first chunk, and what each other one adds to it, are the text",
    lambda case, parts: (
        [
            word
            for number, piece in enumerate(parts["result"])
            for word in piece.split()[case.overlap if number else 0 :]
        ]
        == case.text.split()
    ),
)
chunk.law(
    "every chunk but the last has the full size",
    lambda case, parts: all(len(piece.split()) == case.size for piece in parts["result"][:-1]),
)
chunk.law(
    "each chunk but the first says something new",
    lambda case, parts: all(len(piece.split()) > case.overlap for piece in parts["result"][1:]),
)


def _windows(words: Any, starts: Any, size: int) -> list[str]:
    """One chunk for each start: what answers to this question have in common."""
    return [" ".join(words[start : start + size]) for start in starts]


@chunk.misconception(
    "takes the overlap for the step", hint="From where one chunk starts to where the next one does: how many words?"
)
def _(text, size, overlap):
    words = text.split()
    return _windows(words, range(0, max(1, len(words) - overlap), overlap or size), size)


@chunk.misconception("forgets the overlap", hint="Which words does the second chunk share with the first?")
def _(text, size, overlap):
    words = text.split()
    return _windows(words, range(0, len(words), size), size)


@chunk.misconception(
    "shares one word too few", hint="Count the words that two neighbours share: is it overlap, or one less?"
)
def _(text, size, overlap):
    words = text.split()
    return _windows(words, range(0, max(1, len(words) - overlap), size - overlap + 1), size)


@chunk.misconception(
    "shares one word too many", hint="Count the words that two neighbours share: is it overlap, or one more?"
)
def _(text, size, overlap):
    words = text.split()
    return _windows(words, range(0, max(1, len(words) - overlap), max(1, size - overlap - 1)), size)


@chunk.misconception(
    "adds the overlap to the size", hint="How many words does your longest chunk hold, and how many may it?"
)
def _(text, size, overlap):
    words = text.split()
    return _windows(words, range(0, len(words), size), size + overlap)


@chunk.misconception(
    "drops the last chunk when it is short",
    hint="Put the new words of your chunks one after the other. Is the end of the text there?",
)
def _(text, size, overlap):
    words = text.split()
    return _windows(words, range(0, len(words) - size + 1, size - overlap), size)


@chunk.misconception(
    "ends with a chunk that only repeats",
    hint="Look at your last chunk: does it say anything that the one before it does not?",
)
def _(text, size, overlap):
    words = text.split()
    return _windows(words, range(0, len(words), size - overlap), size)


@chunk.misconception(
    "loses a text that is no longer than the overlap",
    hint="How many chunks do you make of a text of one word? A range may be empty.",
)
def _(text, size, overlap):
    words = text.split()
    return _windows(words, range(0, len(words) - overlap, size - overlap), size)


@chunk.misconception(
    "moves the last chunk back until it is full",
    hint="Each chunk starts with the last words of the one before: how many of them, in your last chunk?",
)
def _(text, size, overlap):
    words = text.split()
    starts = range(0, max(1, len(words) - overlap), size - overlap)
    return _windows(words, [min(start, max(0, len(words) - size)) for start in starts], size)


@chunk.misconception("counts characters, not words", hint="size = 120: what is it 120 of?")
def _(text, size, overlap):
    return [text[start : start + size] for start in range(0, max(1, len(text) - overlap), size - overlap)]


@chunk.misconception(
    "splits at single spaces", hint="What does split(' ') make of two spaces in a row, and of a line break?"
)
def _(text, size, overlap):
    words = text.split(" ")
    return _windows(words, range(0, max(1, len(words) - overlap), size - overlap), size)


@chunk.misconception(
    "makes an empty word of white space at either end",
    hint="What does re.split give for a text that begins with a line break? And split() without an argument?",
)
def _(text, size, overlap):
    words = re.split(r"\s+", text)
    return _windows(words, range(0, max(1, len(words) - overlap), size - overlap), size)


@chunk.misconception(
    "drops the punctuation", hint="A word is what stands between white space. What becomes of a full stop, in yours?"
)
def _(text, size, overlap):
    words = re.findall(r"\w+", text)
    return _windows(words, range(0, max(1, len(words) - overlap), size - overlap), size)


@chunk.misconception(
    "returns a short text as it stands",
    hint="Words are joined by single spaces. Is that so where one chunk holds the whole text, with its line breaks?",
)
def _(text, size, overlap):
    words = text.split()
    if len(words) <= size:
        return [text]
    return _windows(words, range(0, max(1, len(words) - overlap), size - overlap), size)


@chunk.misconception(
    "drops the last chunk, full or not",
    hint="Put the new words of your chunks one after the other. Is the end of the text there, whatever its length?",
)
def _(text, size, overlap):
    words = text.split()
    return _windows(words, range(0, len(words) - size, size - overlap), size)


@chunk.misconception(
    "drops a last chunk that adds a single word",
    hint="How many new words has the last chunk at least? Try a text that is one word longer than the size.",
)
def _(text, size, overlap):
    words = text.split()
    return _windows(words, range(0, max(1, len(words) - overlap - 1), size - overlap), size)


@chunk.misconception(
    "puts the overlap in front of a full size of new words",
    hint="How many words does your second chunk hold? The size counts the shared words too.",
)
def _(text, size, overlap):
    words = text.split()
    return [" ".join(words[max(0, start - overlap) : start + size]) for start in range(0, len(words), size)]


@chunk.misconception("returns lists of words", hint="Of what type is a chunk that you can hand to a tokenizer?")
def _(text, size, overlap):
    words = text.split()
    starts = range(0, max(1, len(words) - overlap), size - overlap)
    return [words[start : start + size] for start in starts]


@chunk.alternative("on until a chunk reaches the end")
def _(text, size, overlap):
    words, start, chunks = text.split(), 0, []
    while True:
        chunks.append(" ".join(words[start : start + size]))
        if start + size >= len(words):
            return chunks
        start += size - overlap


@chunk.alternative("what is left is cut again")
def _(text, size, overlap):
    rest, chunks = re.findall(r"\S+", text), []
    while not chunks or len(rest) > overlap:
        chunks.append(" ".join(rest[:size]))
        rest = rest[size - overlap :]
    return chunks


@chunk.alternative("the number of chunks first")
def _(*args):
    text, size, overlap = args
    words = text.split()
    count = max(1, math.ceil((len(words) - overlap) / (size - overlap)))
    return tuple(" ".join(words[i * (size - overlap) :][:size]) for i in range(count))


@chunk.alternative("every start, the last one taken away when it only repeats")
def _(text, size, overlap):
    words = text.split()
    chunks = [words[i : i + size] for i in range(0, len(words), size - overlap)]
    while len(chunks) > 1 and len(chunks[-1]) <= overlap:
        chunks.pop()
    return list(map(" ".join, chunks))


# rag.pool ------------------------------------------------------------------------------------------------------------


@question("rag.pool", lab=LAB, points=10, slide=SLIDE)
def pool(draw: Draw) -> Case:
    """One vector for each text: the mean over its tokens, scaled to length 1."""
    edge = draw.edge("padding in front", "one token", "no padding", "one text")
    n, seq, d = draw.sizes(3, low=4, high=9)
    n = 1 if edge == "one text" else n
    lengths = draw.integers(2, seq - 1, n)
    if edge == "no padding":
        lengths = torch.full_like(lengths, seq)
    elif edge == "one token":
        lengths[0] = 1
    mask = torch.arange(seq, device=lengths.device) < lengths.unsqueeze(1)
    return Case(
        edge,
        hidden=draw.normal(n, seq, d) + draw.normal(n, 1, d),
        mask=(mask.flip(1) if edge == "padding in front" else mask).long(),
    )


pool.oracle("lecturekit.prompting.rag:pool")


@pool.driver
def _(function: Any, case: Case) -> dict[str, Any]:
    """An array or lists are as good as a tensor, and then of float32, for NumPy has float64 without being asked."""
    result = function(case.hidden, case.mask)
    if isinstance(result, (list, tuple)) or hasattr(result, "__array_interface__"):
        try:
            result = torch.as_tensor(result, dtype=torch.float32, device=case.hidden.device)
        except (TypeError, ValueError):
            raise Unfit(f"return a tensor (n, d), got {describe(result)}") from None
    if result is None:
        raise Unfit("the result is None: is a return statement missing?")
    return {"result": result}


pool.tolerance(
    ulps=lambda case: case.hidden.shape[1] + case.hidden.shape[2] + 6,
    magnitude=lambda case, expected: (
        expected.double().abs()
        + _means(case.hidden.double().abs(), case.mask)
        / (_means(case.hidden.double(), case.mask).norm(dim=1, keepdim=True))
    ),
    why="a sum over the tokens is off by roundings of what it adds up; then a length over d numbers and two divisions",
)
pool.law(
    "every vector has length 1",
    lambda case, parts: bool(
        (
            (parts["result"].double().norm(dim=1) - 1).abs()
            <= (case.hidden.shape[2] + 6) * precision(case, case.hidden)
        ).all()
    ),
)
pool.law(
    "a text of one token has that token's direction",
    lambda case, parts: (
        bool(F.cosine_similarity(parts["result"][0].double(), case.hidden[0, 0].double(), dim=0) > 1 - 1e-5)
        if case.label == "one token"
        else None
    ),
)


def _means(hidden: Tensor, mask: Tensor) -> Tensor:
    """(n, seq, d) and (n, seq) → (n, d), of any length: what answers to this question have in common."""
    return (hidden * mask.unsqueeze(-1)).sum(1) / mask.sum(1, keepdim=True)


@pool.misconception(
    "takes the padding into the mean",
    hint="Put one text into a batch with a longer one: may its vector change by that?",
)
def _(hidden, mask):
    return F.normalize(hidden.mean(1), dim=1)


@pool.misconception("leaves the length as it is", hint="How long is each of your vectors? Print norm(dim=1).")
def _(hidden, mask):
    return _means(hidden, mask)


@pool.misconception(
    "divides by the padded length, and does not scale",
    hint="How many tokens does the mean go over, in a row of the batch that ends in padding? And how long is it then?",
)
def _(hidden, mask):
    return (hidden * mask.unsqueeze(-1)).mean(1)


@pool.misconception(
    "scales the tokens, not their mean",
    hint="The mean of vectors of length 1: has it length 1 too? What comes first, the mean or the scaling?",
)
def _(hidden, mask):
    return _means(F.normalize(hidden, dim=-1), mask)


@pool.misconception(
    "scales the tokens before their mean, and the mean again",
    hint="A token with a long vector says more in the mean than one with a short one. Does it still, in yours?",
)
def _(hidden, mask):
    return F.normalize(_means(F.normalize(hidden, dim=-1), mask), dim=1)


@pool.misconception(
    "scales over the batch",
    hint="normalize has a dim. Over which axis lie the numbers of one vector? One text alone shows it.",
)
def _(hidden, mask):
    return F.normalize(_means(hidden, mask), dim=0)


@pool.misconception(
    "scales the batch as a whole", hint="Each text has a length of its own. How many norms do you divide by?"
)
def _(hidden, mask):
    means = _means(hidden, mask)
    return means / means.norm()


@pool.misconception("takes the first token", hint="BERT's classifier reads [CLS]. What does MiniLM's training pool?")
def _(hidden, mask):
    return F.normalize(hidden[:, 0], dim=1)


@pool.misconception(
    "takes the last token",
    hint="A decoder's last token has read all the others. Is this encoder one, and is its last token a word at all?",
)
def _(hidden, mask):
    return F.normalize(hidden[:, -1], dim=1)


@pool.misconception(
    "takes the largest value over the tokens", hint="That is max pooling. Which pooling was MiniLM trained with?"
)
def _(hidden, mask):
    return F.normalize(hidden.masked_fill(mask.unsqueeze(-1) == 0, -math.inf).amax(1), dim=1)


@pool.misconception("turns the mask round", hint="Where the mask is 1, is there a token or padding?")
def _(hidden, mask):
    return F.normalize((hidden * (1 - mask).unsqueeze(-1)).sum(1), dim=1)


@pool.misconception(
    "takes it for granted that padding stands behind",
    hint="Some tokenizers pad in front. Which positions does the mask mark, and which do you read?",
)
def _(hidden, mask):
    rows = [row[:length].mean(0) for row, length in zip(hidden, mask.sum(1).tolist(), strict=True)]
    return F.normalize(torch.stack(rows), dim=1)


@pool.misconception(
    "divides by the sum of sizes, not by the length", hint="Length is the root of the sum of squares. What is yours?"
)
def _(hidden, mask):
    return F.normalize(_means(hidden, mask), p=1, dim=1)


@pool.misconception(
    "takes the padding into the mean, and does not scale",
    hint="Put one text into a batch with a longer one: may its vector change by that? And how long is it?",
)
def _(hidden, mask):
    return hidden.mean(1)


@pool.misconception(
    "divides by the square of the length", hint="Is the root missing? How long is each of your vectors?"
)
def _(hidden, mask):
    means = _means(hidden, mask)
    return means / means.square().sum(1, keepdim=True)


@pool.misconception(
    "leaves the first token out of the mean",
    hint="[CLS] is a token that the mask marks as any other. Does the mean of MiniLM's training leave it out?",
)
def _(hidden, mask):
    return F.normalize(_means(hidden[:, 1:], mask[:, 1:]), dim=1)


@pool.misconception(
    "takes the last token that is none of the padding",
    hint="A decoder's last token has read all the others. Is this encoder one, and which pooling was it trained with?",
)
def _(hidden, mask):
    return F.normalize(hidden[torch.arange(len(hidden), device=hidden.device), mask.sum(1) - 1], dim=1)


@pool.alternative("the sum alone: what it is divided by goes with its length")
def _(hidden, mask):
    sums = torch.einsum("nsd,ns->nd", hidden, mask.to(hidden.dtype))
    return sums / sums.norm(dim=-1, keepdim=True)


@pool.alternative("as the library writes it, with the smallest count held above 0")
def _(token_embeddings, attention_mask):
    expanded = attention_mask.unsqueeze(-1).expand(token_embeddings.size()).float()
    means = torch.sum(token_embeddings * expanded, 1) / torch.clamp(expanded.sum(1), min=1e-9)
    return F.normalize(means, p=2, dim=1)


@pool.alternative("text by text, with a mask of booleans")
def _(*args):
    hidden, mask = args
    rows = []
    for row, real in zip(hidden, mask.bool(), strict=True):
        mean = row[real].mean(dim=0)
        rows.append(mean / mean.square().sum().sqrt())
    return torch.stack(rows)


@pool.alternative("mean over all places, padding as zeros, float64 inside")
def _(hidden, mask):
    means = torch.where(mask[:, :, None] == 1, hidden.double(), 0.0).mean(1)
    return (means / torch.linalg.vector_norm(means, dim=1)[:, None]).to(hidden.dtype)


# rag.top_k -----------------------------------------------------------------------------------------------------------

GAP = 0.01
"""Least difference between two cosines of one query.

Two right answers may differ in a cosine by a few rounding errors; even with the 10-bit mantissas of TF32 that is
about 0.001. So nobody's rounding can change the order, and there are no ties to be ordered one way or another.
"""


@question("rag.top_k", lab=LAB, points=15, slide=SLIDE, returns=("scores", "indices"))
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


# rag.prompt ----------------------------------------------------------------------------------------------------------

INSTRUCTIONS = (
    "Answer the question from the sources below and cite the source you used, like [1]. If none of them holds the "
    "answer, say: not in the documents.",
    "Use nothing but the sources. Name their numbers in brackets. Where they do not say it, say: not in the documents.",
    "Read the sources, then answer in a few words, with the source, like [2], or with: not in the documents.",
)


@question("rag.prompt", lab=LAB, points=15, slide=SLIDE, cases=10)
def prompt(draw: Draw) -> Case:
    """The prompt that holds as many passages as the budget allows."""
    edge = draw.edge(
        "the budget is met exactly",
        "one token short of another passage",
        "one token to spare",
        "a long question",
        "every passage fits",
        "no passage fits",
        "the best passage is too long",
        "a little short of another passage",
        "the numbers of the sources decide",
    )
    fitting = 0 if edge in ("no passage fits", "the best passage is too long") else draw.integer(2, 3)
    fitting = 3 if edge == "the numbers of the sources decide" else fitting
    number = fitting + 3
    sizes = [draw.integer(5, 7) for _ in range(number)]
    sizes[fitting], sizes[-1] = 24, 3  # the first one that does not fit, and one far behind it that would
    passages = [{"text": _sentence(draw, size, "."), "relevant": False} for size in sizes]
    passages[draw.integer(1 if edge == "every passage fits" else fitting, number - 1)]["relevant"] = True
    asked = _sentence(draw, draw.integer(13, 15) if edge == "a long question" else draw.integer(4, 6), "?")
    instruction = draw.choice(INSTRUCTIONS)

    def tokens(taken: int) -> int:
        return _count(_prompt(instruction, [row["text"] for row in passages[:taken]], asked))

    slack = draw.integer(13, 18)  # more than the short passage takes, less than the long one
    budget = {
        "the budget is met exactly": tokens(fitting),
        "one token short of another passage": tokens(fitting + 1) - 1,
        "one token to spare": tokens(fitting) + 1,
        "a long question": tokens(fitting + 1) - 15,  # more than the numbers of the sources take, less than it
        # Whoever leaves out "Answer:" counts 3 too few, without "Question:" 6, without the numbers 2 for each source.
        "a little short of another passage": tokens(fitting + 1) - 5,
        "the numbers of the sources decide": tokens(fitting + 1) - 7,
        "every passage fits": tokens(number) + slack,
        "no passage fits": tokens(0),
    }.get(edge or "", tokens(fitting) + slack)
    return Case(edge, question=asked, passages=passages, budget=budget, instruction=instruction)


def _sentence(draw: Draw, length: int, end: str) -> str:
    return f"{' '.join(_texts(draw, length)).capitalize()}{end}"


def _count(text: str) -> int:
    """Tokens as many tokenizers cut: pieces of words, and all signs and line breaks in a row.

    The full stop of a block, the blank line and the bracket of the next number are one token, so the parts of a
    prompt have more tokens than the prompt.
    """
    return len(re.findall(r"\w{1,5}|[^\w ]+", text))


def _prompt(instruction: str, texts: list[str], question: str, first: int = 1) -> str:
    """The format that the question asks for: what answers to it have in common."""
    sources = [f"[{place}] {text}" for place, text in enumerate(texts, start=first)]
    return "\n\n".join([instruction, *sources, f"Question: {question}\nAnswer:"])


prompt.oracle("lecturekit.prompting.rag:assemble")

LINES = 40
"""More than any right prompt has here, so that prompts of different lengths are still compared line by line."""


def _places(used: Any) -> list[int]:
    """Positions as a list of int, from whatever holds whole numbers: a list, a range, an array, a tensor."""
    used = used.tolist() if hasattr(used, "tolist") else used
    if not isinstance(used, (tuple, list, range)):
        raise Unfit(f"used must be a list of positions in passages, whole numbers from 0, got {describe(used)}")
    places = []
    for place in used:
        value = place.item() if hasattr(place, "item") else place
        if isinstance(value, bool) or not hasattr(value, "__index__"):
            raise Unfit(f"used must hold whole numbers from 0, positions in passages, got {describe(place)}")
        places.append(operator.index(value))
    return places


@prompt.driver
def _(function: Any, case: Case) -> dict[str, Any]:
    """Hand over a tokenizer's count, which cannot be part of a case, and take the prompt apart into its lines.

    The lines come before the whole, so that the first line that differs is shown and not two long texts.
    """
    result = function(case.question, case.passages, case.budget, _count, case.instruction)
    if not isinstance(result, (tuple, list)) or len(result) != 2:
        raise Unfit(f"return (prompt, used), got {describe(result)}")
    text, used = result[0], _places(result[1])
    if not isinstance(text, str):
        raise Unfit(f"prompt must be one str, got {describe(text)}")
    lines = [*text.split("\n"), *["(no more line)"] * LINES][:LINES]
    return {"number of sources": len(used), "used": used, "line of the prompt": lines, "prompt": text}


prompt.law("the prompt keeps to the budget", lambda case, parts: _count(parts["prompt"]) <= case.budget)
prompt.law(
    "every source is one of the passages, whole",
    lambda case, parts: (
        {row["text"] for row in case.passages}
        >= {line.partition("] ")[2] for line in parts["prompt"].split("\n")[1:] if re.match(r"\[\d+\] ", line)}
    ),
)


def _filled(
    question: str, rows: Any, budget: float, count: Any, instruction: str, size: Any = None, order: Any = None
) -> tuple[str, list[int]]:
    """Take rows in an order while size(their texts) is at most the budget, and write the prompt.

    size: the count of the finished prompt by default.   order: that of the rows by default.
    """
    size = size or (lambda texts: count(_prompt(instruction, texts, question)))
    taken: list[int] = []
    for place in range(len(rows)) if order is None else order:
        if size([rows[i]["text"] for i in [*taken, place]]) > budget:
            break
        taken.append(place)
    return _prompt(instruction, [rows[place]["text"] for place in taken], question), taken


@prompt.misconception("counts characters", hint="A budget of 500 tokens: about how many letters is that?")
def _(question, passages, budget, count, instruction):
    return _filled(question, passages, budget, len, instruction)


@prompt.misconception("counts words", hint="Is a word always one token? Who says how many it is?")
def _(question, passages, budget, count, instruction):
    return _filled(question, passages, budget, lambda text: len(text.split()), instruction)


@prompt.misconception(
    "cuts the last passage in two to fill the budget",
    hint="What may the model make of half a sentence? Passages go in whole or not at all.",
)
def _(question, passages, budget, count, instruction):
    _, used = _filled(question, passages, budget, count, instruction)
    texts = [passages[place]["text"] for place in used]
    for row in passages[len(used) : len(used) + 1]:
        words = row["text"].split()
        fits = [
            n for n in range(1, len(words)) if count(_prompt(instruction, [*texts, _start(row, n)], question)) <= budget
        ]
        if fits:
            texts, used = [*texts, _start(row, fits[-1])], [*used, len(used)]
    return _prompt(instruction, texts, question), used


def _start(row: Any, words: int) -> str:
    """The first words of a passage."""
    return " ".join(row["text"].split()[:words])


@prompt.misconception(
    "goes on behind the first passage that does not fit",
    hint="Passages are best first. May a worse one take the place of one that did not fit?",
)
def _(question, passages, budget, count, instruction):
    used: list[int] = []
    for place in range(len(passages)):
        texts = [passages[i]["text"] for i in [*used, place]]
        if count(_prompt(instruction, texts, question)) <= budget:
            used.append(place)
    return _prompt(instruction, [passages[place]["text"] for place in used], question), used


@prompt.misconception(
    "leaves instruction and question out of the budget",
    hint="What else does the model read beside the passages? Count the tokens of the finished prompt.",
)
def _(question, passages, budget, count, instruction):
    def size(texts):
        return count("\n\n".join(f"[{n}] {text}" for n, text in enumerate(texts, start=1)))

    return _filled(question, passages, budget, count, instruction, size)


@prompt.misconception(
    "leaves the question out of the budget",
    hint="Count the tokens of the finished prompt. What is in it that you left out?",
)
def _(question, passages, budget, count, instruction):
    def size(texts):
        return count("\n\n".join([instruction, *(f"[{n}] {text}" for n, text in enumerate(texts, start=1))]))

    return _filled(question, passages, budget, count, instruction, size)


@prompt.misconception(
    "leaves the instruction out of the budget",
    hint="Count the tokens of the finished prompt. What stands at its top?",
)
def _(question, passages, budget, count, instruction):
    def size(texts):
        return count(_prompt(instruction, texts, question).removeprefix(instruction).lstrip("\n"))

    return _filled(question, passages, budget, count, instruction, size)


@prompt.misconception(
    "counts the prompt without its last line",
    hint="Count the tokens of the finished prompt. With which line does it end?",
)
def _(question, passages, budget, count, instruction):
    def size(texts):
        return count(_prompt(instruction, texts, question).removesuffix("\nAnswer:"))

    return _filled(question, passages, budget, count, instruction, size)


@prompt.misconception(
    "counts the bare question",
    hint="What does the format write in front of the question, and on the line behind it? These are tokens too.",
)
def _(question, passages, budget, count, instruction):
    def size(texts):
        return count(_prompt(instruction, texts, question).removesuffix(f"Question: {question}\nAnswer:") + question)

    return _filled(question, passages, budget, count, instruction, size)


@prompt.misconception(
    "counts the passages without their numbers",
    hint="[1] and the blank line are tokens too. Count what the model gets, not what it is made of.",
)
def _(question, passages, budget, count, instruction):
    rest = count(_prompt(instruction, [], question))
    return _filled(question, passages, budget, count, instruction, lambda texts: rest + sum(map(count, texts)))


@prompt.misconception(
    "adds up the counts of the parts",
    hint="A tokenizer may join what stands on both sides of a border. Which text do you have to count?",
)
def _(question, passages, budget, count, instruction):
    def size(texts):
        blocks = _prompt(instruction, texts, question).split("\n\n")
        return sum(map(count, blocks)) + (len(blocks) - 1) * count("\n\n")

    return _filled(question, passages, budget, count, instruction, size)


@prompt.misconception(
    "adds up the counts of the parts",
    hint="A tokenizer may join what stands on both sides of a border. Which text do you have to count?",
)
def _(question, passages, budget, count, instruction):
    def size(texts):
        return sum(map(count, _prompt(instruction, texts, question).split("\n\n")))

    return _filled(question, passages, budget, count, instruction, size)


@prompt.misconception(
    "takes the best passage even where it does not fit",
    hint="A prompt without a source is allowed: what is the model then to say? And a prompt beyond the budget?",
)
def _(question, passages, budget, count, instruction):
    text, used = _filled(question, passages, budget, count, instruction)
    return (text, used) if used else (_prompt(instruction, [passages[0]["text"]], question), [0])


@prompt.misconception(
    "may not meet the budget exactly", hint="At most the budget: is a prompt of just that size allowed?"
)
def _(question, passages, budget, count, instruction):
    return _filled(question, passages, budget - 1, count, instruction)


@prompt.misconception(
    "notices one passage too late", hint="Count your finished prompt. At which moment do you look at the budget?"
)
def _(question, passages, budget, count, instruction):
    taken = 0
    while taken < len(passages):
        texts = [row["text"] for row in passages[:taken]]
        if count(_prompt(instruction, texts, question)) > budget:
            break
        taken += 1
    return _prompt(instruction, [row["text"] for row in passages[:taken]], question), list(range(taken))


@prompt.misconception("forgets the budget", hint="A model reads so many tokens and no more. Which argument says it?")
def _(question, passages, budget, count, instruction):
    return _filled(question, passages, math.inf, count, instruction)


@prompt.misconception(
    "puts the relevant passage in, found or not",
    hint="Who tells you, outside a test set, which passage holds the answer? Then your score is not retrieval's.",
)
def _(question, passages, budget, count, instruction):
    order = sorted(range(len(passages)), key=lambda place: not passages[place]["relevant"])
    return _filled(question, passages, budget, count, instruction, order=order)


@prompt.misconception(
    "leaves out what is not relevant",
    hint="Who tells you, outside a test set, which passage holds the answer? The model has to cope with the others.",
)
def _(question, passages, budget, count, instruction):
    order = [place for place, row in enumerate(passages) if row["relevant"]]
    return _filled(question, passages, budget, count, instruction, order=order)


@prompt.misconception("puts the worst passage first", hint="Passages are best first. Which of them is your source [1]?")
def _(question, passages, budget, count, instruction):
    _, used = _filled(question, passages, budget, count, instruction)
    used = used[::-1]
    return _prompt(instruction, [passages[place]["text"] for place in used], question), used


@prompt.misconception("numbers the sources from 0", hint="Which number has the first source in the format?")
def _(question, passages, budget, count, instruction):
    used = _filled(question, passages, budget, count, instruction)[1]
    return _prompt(instruction, [passages[place]["text"] for place in used], question, first=0), used


@prompt.misconception(
    "says which numbers were used, not which passages",
    hint="passages[used[0]] is to be the source [1]. At which number does a list start?",
)
def _(question, passages, budget, count, instruction):
    text, used = _filled(question, passages, budget, count, instruction)
    return text, [place + 1 for place in used]


@prompt.misconception(
    "joins the blocks by one line break",
    hint="A blank line stands between two blocks. How many line breaks make a blank line?",
)
def _(question, passages, budget, count, instruction):
    def write(texts):
        return _prompt(instruction, texts, question).replace("\n\n", "\n")

    used = _filled(question, passages, budget, count, instruction, lambda texts: count(write(texts)))[1]
    return write([passages[place]["text"] for place in used]), used


@prompt.misconception(
    "writes another mark than [1] in front of a source",
    hint="An answer cites [1], and that is looked for. Compare your first source with the format, sign by sign.",
)
def _(question, passages, budget, count, instruction):
    def write(texts):
        sources = [f"{place}. {text}" for place, text in enumerate(texts, start=1)]
        return "\n\n".join([instruction, *sources, f"Question: {question}\nAnswer:"])

    used = _filled(question, passages, budget, count, instruction, lambda texts: count(write(texts)))[1]
    return write([passages[place]["text"] for place in used]), used


@prompt.misconception(
    "writes another mark than [1] in front of a source",
    hint="An answer cites [1], and that is looked for. Compare your first source with the format, sign by sign.",
)
def _(question, passages, budget, count, instruction):
    def write(texts):
        sources = [f"[{place}]: {text}" for place, text in enumerate(texts, start=1)]
        return "\n\n".join([instruction, *sources, f"Question: {question}\nAnswer:"])

    used = _filled(question, passages, budget, count, instruction, lambda texts: count(write(texts)))[1]
    return write([passages[place]["text"] for place in used]), used


@prompt.misconception(
    "ends with a space", hint="Most tokens of words bring their own space. What stands behind the last colon?"
)
def _(question, passages, budget, count, instruction):
    text, used = _filled(question, passages, budget, count, instruction)
    return text + " ", used


@prompt.misconception(
    "leaves the instruction out", hint="Who tells the model to cite, and what to say when the answer is not there?"
)
def _(question, passages, budget, count, instruction):
    def write(texts):
        return _prompt(instruction, texts, question).removeprefix(instruction).lstrip("\n")

    used = _filled(question, passages, budget, count, instruction, lambda texts: count(write(texts)))[1]
    return write([passages[place]["text"] for place in used]), used


@prompt.alternative("one passage more as long as it fits")
def _(question, passages, budget, count, instruction):
    head, tail = instruction + "\n\n", f"Question: {question}\nAnswer:"
    body, used = "", []
    for place, passage in enumerate(passages):
        longer = body + f"[{place + 1}] {passage['text']}\n\n"
        if count(head + longer + tail) > budget:
            break
        body = longer
        used.append(place)
    return head + body + tail, used


@prompt.alternative("from all of them down, the last one taken away")
def _(q, rows, most, tokens, how):
    for taken in range(len(rows), -1, -1):
        blocks = [how]
        blocks += [f"[{i}] " + row["text"] for i, row in enumerate(rows[:taken], 1)]
        blocks += ["Question: " + q + "\nAnswer:"]
        text = "\n\n".join(blocks)
        if tokens(text) <= most:
            return text, list(range(taken))
    raise ValueError("not even the question fits")


@prompt.alternative("used as a range")
def _(question, passages, budget, count, instruction):
    texts = [row["text"] for row in passages]
    fits = [n for n in range(len(texts) + 1) if count(_prompt(instruction, texts[:n], question)) <= budget]
    return _prompt(instruction, texts[: fits[-1]], question), range(fits[-1])


@prompt.alternative("used as a tensor")
def _(question, passages, budget, count, instruction):
    text, used = _filled(question, passages, budget, count, instruction)
    return text, torch.tensor(used, dtype=torch.long)


@prompt.alternative("lines")
def _(*args):
    question, passages, budget, count, instruction = args
    lines, used = [instruction, ""], ()
    while len(used) < len(passages):
        more = [*lines, f"[{len(used) + 1}] {passages[len(used)]['text']}", ""]
        if count("\n".join([*more, f"Question: {question}", "Answer:"])) > budget:
            break
        lines, used = more, (*used, len(used))
    return ["\n".join([*lines, f"Question: {question}", "Answer:"]), used]


# rag.recall ----------------------------------------------------------------------------------------------------------


@question("rag.recall", lab=LAB, points=5, slide=SLIDE, returns=("recall", "mrr"), cases=7)
def recall(draw: Draw) -> Case:
    """How much of what is relevant is found, and how far up."""
    edge = draw.edge(
        "every question has an answer", "k = 1", "nothing is found", "fewer found than k", "one passage answers each"
    )
    k = 1 if edge == "k = 1" else draw.integer(3, 4)
    # For each question the ranks, from 0, of the passages that answer it; the thirteenth of any is never found.
    places = [[0], [1, k + 1], [k + 2], [1, 2, 12], [0, draw.integer(3, 6)], []]
    if edge == "nothing is found":
        places = [[min(13, k + place) for place in row] for row in places]
    elif edge == "one passage answers each":
        places = [row[:1] for row in places]
    if edge == "every question has an answer":
        places.remove([])
    else:
        places += [[] for _ in range(draw.integer(0, 2))]
    ranked, relevant = [], []
    for row in draw.permutation(len(places)).tolist():
        ids = [place * 2 + 7 for place in draw.permutation(14).tolist()]
        ranked.append(ids[: k - 1 if edge == "fewer found than k" else k + 4])
        relevant.append([ids[place] for place in reversed(places[row])])  # not in the order in which they are found
    return Case(edge, ranked=ranked, relevant=relevant, k=k)


recall.oracle("lecturekit.prompting.evaluation:recall_and_mrr")


@recall.driver
def _(function: Any, case: Case) -> dict[str, Any]:
    """Two numbers of any kind, or one tensor or array that holds both."""
    result = function(case.ranked, case.relevant, case.k)
    result = result.tolist() if hasattr(result, "tolist") else result
    if not isinstance(result, (tuple, list)) or len(result) != 2:
        raise Unfit(f"return two numbers, (recall, mrr), got {describe(result)}")
    numbers = [part.item() if hasattr(part, "item") else part for part in result]
    for name, number in zip(("recall", "mrr"), numbers, strict=True):
        if isinstance(number, bool) or not isinstance(number, (int, float)):
            raise Unfit(f"{name} must be one number, got {describe(number)}")
    return {"recall": float(numbers[0]), "mrr": float(numbers[1])}


recall.tolerance(
    ulps=lambda case: len(case.ranked) + 4,
    magnitude=lambda case, _: 1.0,
    why="a mean over the questions of shares that are at most 1, in float32 or wider",
)
recall.law("both lie between 0 and 1", lambda _, parts: all(-1e-6 <= float(x) <= 1 + 1e-6 for x in parts.values()))
recall.law(
    "where nothing is found, both are 0",
    lambda case, parts: all(float(x) == 0 for x in parts.values()) if case.label == "nothing is found" else None,
)
recall.law(
    "recall and reciprocal rank are above 0 together: both ask whether anything relevant is found",
    lambda case, parts: (float(parts["recall"]) > 0) == (float(parts["mrr"]) > 0),
)


def _answered(ranked: Any, relevant: Any) -> list[tuple[list[int], list[int]]]:
    """The questions that have an answer: what answers to this question have in common, with the two below."""
    return [(found, wanted) for found, wanted in zip(ranked, relevant, strict=True) if wanted]


def _recall(found: list[int], wanted: list[int], k: int) -> float:
    """The share of the relevant that is among the first k."""
    return len(set(found[:k]) & set(wanted)) / len(wanted)


def _reciprocal(found: list[int], wanted: list[int], k: int) -> float:
    """1 / rank of the first relevant one among the first k, or 0."""
    return next((1 / rank for rank, id in enumerate(found[:k], start=1) if id in wanted), 0.0)


@recall.misconception(
    "counts a question without an answer as not found",
    hint="What could retrieval have found for a question that no passage answers? Over how many questions is the mean?",
)
def _(ranked, relevant, k):
    asked = _answered(ranked, relevant)
    return (
        sum(_recall(found, wanted, k) for found, wanted in asked) / len(ranked),
        sum(_reciprocal(found, wanted, k) for found, wanted in asked) / len(ranked),
    )


@recall.misconception(
    "counts a question without an answer as found",
    hint="Nothing was missed where there is nothing. But was anything found? Over how many questions is the mean?",
)
def _(ranked, relevant, k):
    asked = _answered(ranked, relevant)
    free = len(ranked) - len(asked)
    return (
        (free + sum(_recall(found, wanted, k) for found, wanted in asked)) / len(ranked),
        (free + sum(_reciprocal(found, wanted, k) for found, wanted in asked)) / len(ranked),
    )


@recall.misconception(
    "asks whether any relevant passage is found",
    hint="A question needs two passages, and one is found. Is that all of what is relevant? (Yours is the hit rate.)",
)
def _(ranked, relevant, k):
    asked = _answered(ranked, relevant)
    return (
        sum(_recall(found, wanted, k) > 0 for found, wanted in asked) / len(asked),
        sum(_reciprocal(found, wanted, k) for found, wanted in asked) / len(asked),
    )


@recall.misconception(
    "divides by k: that is precision", hint="Recall is a share of what is relevant. Of how many is yours a share?"
)
def _(ranked, relevant, k):
    asked = _answered(ranked, relevant)
    return (
        sum(len(set(found[:k]) & set(wanted)) / k for found, wanted in asked) / len(asked),
        sum(_reciprocal(found, wanted, k) for found, wanted in asked) / len(asked),
    )


@recall.misconception(
    "divides by k where more passages are relevant than that",
    hint="With k = 1 and two relevant passages, how much of what is relevant can be found?",
)
def _(ranked, relevant, k):
    asked = _answered(ranked, relevant)
    return (
        sum(len(set(found[:k]) & set(wanted)) / min(k, len(wanted)) for found, wanted in asked) / len(asked),
        sum(_reciprocal(found, wanted, k) for found, wanted in asked) / len(asked),
    )


@recall.misconception(
    "puts the passages of all questions together",
    hint="A question with three passages, one with one: does the first count three times as much?",
)
def _(ranked, relevant, k):
    asked = _answered(ranked, relevant)
    return (
        sum(len(set(found[:k]) & set(wanted)) for found, wanted in asked) / sum(len(wanted) for _, wanted in asked),
        sum(_reciprocal(found, wanted, k) for found, wanted in asked) / len(asked),
    )


@recall.misconception(
    "looks for the rank beyond k", hint="MRR@k: what does a question get whose first relevant passage is the k + 1st?"
)
def _(ranked, relevant, k):
    asked = _answered(ranked, relevant)
    return (
        sum(_recall(found, wanted, k) for found, wanted in asked) / len(asked),
        sum(_reciprocal(found, wanted, len(found)) for found, wanted in asked) / len(asked),
    )


@recall.misconception(
    "looks for recall beyond k", hint="Recall@k: how far down the ranking may you look for what is relevant?"
)
def _(ranked, relevant, k):
    asked = _answered(ranked, relevant)
    return (
        sum(_recall(found, wanted, len(found)) for found, wanted in asked) / len(asked),
        sum(_reciprocal(found, wanted, k) for found, wanted in asked) / len(asked),
    )


@recall.misconception(
    "takes the rank of the first one listed",
    hint="The list of relevant passages has no order. Which of them does a reader of the ranking meet first?",
)
def _(ranked, relevant, k):
    asked = _answered(ranked, relevant)
    return (
        sum(_recall(found, wanted, k) for found, wanted in asked) / len(asked),
        sum(1 / (found.index(wanted[0]) + 1) if wanted[0] in found[:k] else 0 for found, wanted in asked) / len(asked),
    )


@recall.misconception("counts ranks from 0", hint="What is the rank of the best one? And 1 / rank?")
def _(ranked, relevant, k):
    asked = _answered(ranked, relevant)
    ranks = [[rank for rank, id in enumerate(found[:k]) if id in wanted] for found, wanted in asked]
    return (
        sum(_recall(found, wanted, k) for found, wanted in asked) / len(asked),
        sum(1 / row[0] if row else 0.0 for row in ranks) / len(asked),
    )


@recall.misconception(
    "adds up the reciprocal ranks of all that is relevant",
    hint="The reader stops at the first passage that helps. How many ranks of a question count?",
)
def _(ranked, relevant, k):
    asked = _answered(ranked, relevant)
    return (
        sum(_recall(found, wanted, k) for found, wanted in asked) / len(asked),
        sum(1 / rank for found, wanted in asked for rank, id in enumerate(found[:k], start=1) if id in wanted)
        / len(asked),
    )


@recall.misconception(
    "leaves a question out for which nothing was found",
    hint="What is its reciprocal rank? Over how many questions is the mean?",
)
def _(ranked, relevant, k):
    asked = _answered(ranked, relevant)
    ranks = [_reciprocal(found, wanted, k) for found, wanted in asked]
    return (
        sum(_recall(found, wanted, k) for found, wanted in asked) / len(asked),
        sum(ranks) / max(1, sum(rank > 0 for rank in ranks)),
    )


@recall.misconception(
    "takes the reciprocal of the mean rank", hint="The mean of 1 / rank, or 1 / the mean of the ranks? Try 1 and 10."
)
def _(ranked, relevant, k):
    asked = _answered(ranked, relevant)
    ranks = [1 / rank for found, wanted in asked if (rank := _reciprocal(found, wanted, k))]
    return (
        sum(_recall(found, wanted, k) for found, wanted in asked) / len(asked),
        len(ranks) / sum(ranks) if ranks else 0.0,
    )


@recall.misconception("returns MRR before recall", hint="Which of the two does the signature name first?")
def _(ranked, relevant, k):
    asked = _answered(ranked, relevant)
    return (
        sum(_reciprocal(found, wanted, k) for found, wanted in asked) / len(asked),
        sum(_recall(found, wanted, k) for found, wanted in asked) / len(asked),
    )


@recall.alternative("loops")
def _(ranked, relevant, k):
    recalls, reciprocals = [], []
    for i in range(len(ranked)):
        if not relevant[i]:
            continue
        hits = 0
        reciprocal = 0
        for rank, id in enumerate(ranked[i][:k]):
            if id in relevant[i]:
                hits += 1
                if reciprocal == 0:
                    reciprocal = 1 / (rank + 1)
        recalls.append(hits / len(relevant[i]))
        reciprocals.append(reciprocal)
    return sum(recalls) / len(recalls), sum(reciprocals) / len(reciprocals)


@recall.alternative("tensors of hits, float32")
def _(found, wanted, k):
    shares, ranks = [], []
    for ids, answers in zip(found, wanted, strict=True):
        if len(answers) == 0:
            continue
        hits = torch.isin(torch.tensor(ids[:k]), torch.tensor(answers)).float()
        shares.append(hits.sum() / len(answers))
        ranks.append((hits / torch.arange(1, len(hits) + 1)).max())
    return torch.stack(shares).mean(), torch.stack(ranks).mean()


@recall.alternative("both in one tensor")
def _(ranked, relevant, k):
    rows = [(_recall(found, wanted, k), _reciprocal(found, wanted, k)) for found, wanted in _answered(ranked, relevant)]
    return torch.tensor(rows).mean(0)


@recall.alternative("positions by index")
def _(*args):
    ranked, relevant, k = args
    asked = [i for i, wanted in enumerate(relevant) if len(wanted) > 0]
    share = best = 0.0
    for i in asked:
        ranks = [ranked[i].index(id) + 1 for id in relevant[i] if id in ranked[i]]
        ranks = [rank for rank in ranks if rank <= k]
        share += len(ranks) / len(relevant[i]) / len(asked)
        best += (1 / min(ranks) if ranks else 0) / len(asked)
    return [share, best]
