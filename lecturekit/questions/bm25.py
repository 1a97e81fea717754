"""Two questions of lab 12: the search by words, and one ranking out of two. The others are in rag.py.

Robertson and Zaragoza, "The Probabilistic Relevance Framework: BM25 and Beyond", 2009; Cormack, Clarke and Büttcher,
"Reciprocal Rank Fusion outperforms Condorcet and individual Rank Learning Methods", SIGIR 2009.
"""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import KeysView, ValuesView
from typing import Any

import numpy as np
import torch

from lecturekit.checking import Case, Draw, Unfit, question
from lecturekit.checking.compare import describe

LAB = "lab12_rag"
SLIDE = "Retrieval Augmented Generation (RAG)"

# rag.bm25 ------------------------------------------------------------------------------------------------------------

COMMON = "the sea season port report sun sunday ship salt old".split()  # some are part of another


@question("rag.bm25", lab=LAB, points=15, slide=SLIDE, cases=7)
def bm25(draw: Draw) -> Case:
    """Score documents by the words that they share with a query."""
    edge = draw.edge(
        "a word that every document holds",
        "a query word twice",
        "a word that no document holds",
        "a document without words",
        "b = 0: lengths do not count",
    )
    lengths = draw.sizes(draw.integer(4, 6), low=4, high=14)
    documents = [[COMMON[place] for place in draw.integers(1, len(COMMON) - 1, length).tolist()] for length in lengths]
    query = [COMMON[place + 1] for place in draw.permutation(len(COMMON) - 1)[: draw.integer(3, 5)].tolist()]
    documents[0][:2] = [query[0], query[0]]  # one word at least is there more than once
    if edge == "a word that every document holds":
        documents, query = [["the", *document] for document in documents], ["the", *query]
    elif edge == "a query word twice":
        query.insert(draw.integer(1, len(query)), query[0])
    elif edge == "a word that no document holds":
        query.insert(1, draw.choice(["lighthouse", "seaman", "reporter"]))
    elif edge == "a document without words":
        documents.insert(draw.integer(0, len(documents)), [])
    return Case(
        edge,
        query=query,
        documents=documents,
        k1=draw.choice([1.2, 1.5, 2.0]),
        b=0.0 if edge == "b = 0: lengths do not count" else draw.choice([0.6, 0.75, 0.9]),
    )


bm25.oracle("lecturekit.prompting.bm25:bm25")


@bm25.driver
def _(function: Any, case: Case) -> dict[str, Any]:
    """An array or a list is as good as a tensor, and then of float32, for NumPy has float64 without being asked."""
    result = function(case.query, case.documents, case.k1, case.b)
    if isinstance(result, (list, tuple)) or hasattr(result, "__array_interface__"):
        try:
            result = torch.as_tensor(result, dtype=torch.float32)
        except (TypeError, ValueError):
            raise Unfit(f"return one score for each document, got {describe(result)}") from None
    if result is None:
        raise Unfit("the result is None: is a return statement missing?")
    return {"result": result}


bm25.tolerance(
    ulps=lambda case: 2 * len(case.query) + 8,
    magnitude=lambda case, expected: expected.double().abs() + len(case.query),
    why="a term is an idf, off by a rounding of 1 + x inside its logarithm, times a ratio below 1; one for each word",
)
bm25.law(
    "a document that shares no word with the query scores 0, every other one more",
    lambda case, parts: all(
        (score > 0) == bool(set(case.query) & set(document))
        for score, document in zip(parts["result"].tolist(), case.documents, strict=True)
    ),
)
bm25.law(
    "a word adds at most its idf, however often a document says it",
    lambda case, parts: bool(
        (parts["result"].double() <= sum(_idf(word, case.documents) for word in case.query) * (1 + 1e-5)).all()
    ),
)


def _idf(word: str, documents: list[list[str]]) -> float:
    """How rare a word is: what answers to this question have in common, with the two below."""
    df = sum(word in document for document in documents)
    return math.log(1 + (len(documents) - df + 0.5) / (df + 0.5))


def _share(tf: float, length: float, mean: float, k1: float, b: float) -> float:
    """What of its idf a word adds to a document's score."""
    return tf / (tf + k1 * (1 - b + b * length / mean)) if tf else 0.0


def _mean(documents: list[list[str]]) -> float:
    """The mean length of the documents, in words."""
    return sum(map(len, documents)) / len(documents)


@bm25.misconception(
    "an idf that falls below 0",
    hint="Take a word that most documents hold. Is your logarithm positive? What does the formula add to the fraction?",
)
def _(query, documents, k1, b):
    mean, n = _mean(documents), len(documents)
    df = {word: sum(word in document for document in documents) for word in query}
    idf = {word: math.log((n - df[word] + 0.5) / (df[word] + 0.5)) for word in query}
    return torch.tensor([sum(idf[w] * _share(d.count(w), len(d), mean, k1, b) for w in query) for d in documents])


@bm25.misconception(
    "the idf of tf-idf, ln(N / df)", hint="Compare your idf with the formula's, for a word that every document holds."
)
def _(query, documents, k1, b):
    mean = _mean(documents)
    idf = {w: math.log(len(documents) / max(1, sum(w in d for d in documents))) for w in query}
    return torch.tensor([sum(idf[w] * _share(d.count(w), len(d), mean, k1, b) for w in query) for d in documents])


@bm25.misconception(
    "counts occurrences where documents are to be counted",
    hint="df: one document says a word five times, no other says it. Is that 5 or 1?",
)
def _(query, documents, k1, b):
    mean, n = _mean(documents), len(documents)
    df = {w: sum(d.count(w) for d in documents) for w in query}
    idf = {w: math.log(1 + max(0.0, n - df[w] + 0.5) / (df[w] + 0.5)) for w in query}
    return torch.tensor([sum(idf[w] * _share(d.count(w), len(d), mean, k1, b) for w in query) for d in documents])


@bm25.misconception("leaves the idf out", hint="Should a shared “the” count as much as a shared rare word?")
def _(query, documents, k1, b):
    mean = _mean(documents)
    return torch.tensor([sum(_share(d.count(w), len(d), mean, k1, b) for w in query) for d in documents])


@bm25.misconception(
    "turns the ratio of the lengths round",
    hint="A word said once in a long document says less than in a short one. Is it so in your formula?",
)
def _(query, documents, k1, b):
    mean, idf = _mean(documents), {w: _idf(w, documents) for w in query}
    return torch.tensor(
        [sum(idf[w] * _share(d.count(w), mean, len(d) or math.inf, k1, b) for w in query) for d in documents]
    )


@bm25.misconception("swaps b and 1 - b", hint="b = 0 is to switch the lengths off. Does it, in your formula?")
def _(query, documents, k1, b):
    mean, idf = _mean(documents), {w: _idf(w, documents) for w in query}
    return torch.tensor([sum(idf[w] * _share(d.count(w), len(d), mean, k1, 1 - b) for w in query) for d in documents])


@bm25.misconception(
    "multiplies only 1 - b by k1", hint="Which brackets does k1 stand in front of? What does k1 = 0 leave over?"
)
def _(query, documents, k1, b):
    mean, idf = _mean(documents), {w: _idf(w, documents) for w in query}
    rows = []
    for document in documents:
        counts = Counter(document)
        norm = k1 * (1 - b) + b * len(document) / mean
        rows.append(sum((idf[w] * counts[w] / (counts[w] + norm) for w in query if counts[w]), 0.0))
    return torch.tensor(rows)


@bm25.misconception(
    "multiplies by k1 + 1",
    hint="Some textbooks have that factor. It changes no order; is it in the formula that you were given?",
)
def _(query, documents, k1, b):
    mean, idf = _mean(documents), {w: _idf(w, documents) for w in query}
    return torch.tensor(
        [sum(idf[w] * (k1 + 1) * _share(d.count(w), len(d), mean, k1, b) for w in query) for d in documents]
    )


@bm25.misconception(
    "counts a query word once that stands there twice",
    hint="The sum goes over the words of the query. Does a set still have all of them?",
)
def _(query, documents, k1, b):
    mean = _mean(documents)
    return torch.tensor(
        [sum(_idf(w, documents) * _share(d.count(w), len(d), mean, k1, b) for w in set(query)) for d in documents]
    )


@bm25.misconception(
    "asks only whether a word is there", hint="tf is a number. What does a document get that says the word three times?"
)
def _(query, documents, k1, b):
    mean, idf = _mean(documents), {w: _idf(w, documents) for w in query}
    return torch.tensor([sum(idf[w] * _share(w in d, len(d), mean, k1, b) for w in query) for d in documents])


@bm25.misconception(
    "lets a word count without bound",
    hint="Say a word a hundred times: is the document a hundred times as good? Which part of the formula prevents it?",
)
def _(query, documents, k1, b):
    mean, idf = _mean(documents), {w: _idf(w, documents) for w in query}
    return torch.tensor(
        [sum(idf[w] * d.count(w) / (k1 * (1 - b + b * len(d) / mean)) for w in query) for d in documents]
    )


@bm25.misconception(
    "divides only tf by tf, for want of brackets",
    hint="What does Python divide by in tf / tf + k1 · (…)? Put in the numbers of one word and look at what comes out.",
)
def _(query, documents, k1, b):
    mean, idf = _mean(documents), {w: _idf(w, documents) for w in query}
    rows = []
    for document in documents:
        counts, ratio = Counter(document), len(document) / mean
        rows.append(sum((idf[w] * (counts[w] / counts[w] + k1 * (1 - b + b * ratio)) for w in query if counts[w]), 0.0))
    return torch.tensor(rows)


@bm25.misconception(
    "leaves the brackets behind k1 out",
    hint="k1 * 1 - b + …: which terms does k1 multiply here, and which in the formula?",
)
def _(query, documents, k1, b):
    mean, idf = _mean(documents), {w: _idf(w, documents) for w in query}
    rows = []
    for document in documents:
        counts, ratio = Counter(document), len(document) / mean
        rows.append(sum((idf[w] * (counts[w] / (counts[w] + k1 * 1 - b + b * ratio)) for w in query if counts[w]), 0.0))
    return torch.tensor(rows)


@bm25.misconception(
    "leaves the mean length out",
    hint="With what is the length of a document compared, to call it long?",
)
def _(query, documents, k1, b):
    idf = {w: _idf(w, documents) for w in query}
    return torch.tensor([sum(idf[w] * _share(d.count(w), len(d), 1.0, k1, b) for w in query) for d in documents])


@bm25.misconception(
    "takes logarithms to base 10",
    hint="ln is the natural logarithm. Which one is yours?",
)
def _(query, documents, k1, b):
    mean, n = _mean(documents), len(documents)
    df = {w: sum(w in d for d in documents) for w in query}
    idf = {w: math.log10(1 + (n - df[w] + 0.5) / (df[w] + 0.5)) for w in query}
    return torch.tensor([sum(idf[w] * _share(d.count(w), len(d), mean, k1, b) for w in query) for d in documents])


@bm25.misconception(
    "adds 1 outside the logarithm",
    hint="Where does the 1 stand in the formula: inside the brackets of ln, or before them?",
)
def _(query, documents, k1, b):
    mean, n = _mean(documents), len(documents)
    df = {w: sum(w in d for d in documents) for w in query}
    idf = {w: 1 + math.log((n - df[w] + 0.5) / (df[w] + 0.5)) for w in query}
    return torch.tensor([sum(idf[w] * _share(d.count(w), len(d), mean, k1, b) for w in query) for d in documents])


@bm25.misconception(
    "cuts a negative idf off at 0",
    hint="May a word that most documents hold count nothing? What does the formula do so that no idf falls below 0?",
)
def _(query, documents, k1, b):
    mean, n = _mean(documents), len(documents)
    df = {w: sum(w in d for d in documents) for w in query}
    idf = {w: max(0.0, math.log((n - df[w] + 0.5) / (df[w] + 0.5))) for w in query}
    return torch.tensor([sum(idf[w] * _share(d.count(w), len(d), mean, k1, b) for w in query) for d in documents])


@bm25.misconception(
    "forgets the logarithm",
    hint="A word in one of a million documents: is it to weigh a million times as much as one in all?",
)
def _(query, documents, k1, b):
    mean, n = _mean(documents), len(documents)
    df = {w: sum(w in d for d in documents) for w in query}
    idf = {w: 1 + (n - df[w] + 0.5) / (df[w] + 0.5) for w in query}
    return torch.tensor([sum(idf[w] * _share(d.count(w), len(d), mean, k1, b) for w in query) for d in documents])


@bm25.alternative("loops, as the formula stands")
def _(query, documents, k1, b):
    average = sum(len(document) for document in documents) / len(documents)
    scores = torch.zeros(len(documents))
    for word in query:
        holders = len([1 for document in documents if word in document])
        idf = math.log(1 + (len(documents) - holders + 0.5) / (holders + 0.5))
        for number, document in enumerate(documents):
            tf = document.count(word)
            scores[number] += idf * tf / (tf + k1 * (1 - b + b * len(document) / average))
    return scores


@bm25.alternative("a table of counts, in float32")
def _(question, texts, k1, b):
    table = torch.tensor([[text.count(word) for word in question] for text in texts], dtype=torch.float32)
    lengths = torch.tensor([len(text) for text in texts], dtype=torch.float32)
    df = (table > 0).sum(0)
    idf = torch.log1p((len(texts) - df + 0.5) / (df + 0.5))
    norm = k1 * ((1 - b) + b * lengths / lengths.mean())
    return (idf * table / (table + norm[:, None])).sum(1)


@bm25.alternative("the logarithm of one fraction, the share as 1 / (1 + …)")
def _(query, documents, k1, b):
    counters = [Counter(document) for document in documents]
    n, words = len(documents), sum(map(len, documents))
    scores = []
    for counter in counters:
        norm = k1 * (1 - b + b * sum(counter.values()) * n / words)
        score = 0.0
        for word in filter(counter.__contains__, query):
            df = sum(word in other for other in counters)
            score += math.log((n + 1) / (df + 0.5)) / (1 + norm / counter[word])
        scores.append(score)
    return torch.tensor(scores)


@bm25.alternative("an array of NumPy")
def _(query, documents, k1, b):
    lengths = np.array([len(document) for document in documents])
    tf = np.array([[document.count(word) for word in query] for document in documents])
    df = (tf > 0).sum(0)
    idf = np.log(1 + (len(documents) - df + 0.5) / (df + 0.5))
    return (idf * tf / (tf + k1 * (1 - b + b * lengths / lengths.mean())[:, None])).sum(1)


@bm25.alternative("an index from words to documents")
def _(*args):
    query, documents, k1, b = args
    postings: Any = defaultdict(dict)
    for number, document in enumerate(documents):
        for word in document:
            postings[word][number] = postings[word].get(number, 0) + 1
    mean = sum(len(document) for document in documents) / len(documents)
    scores = torch.zeros(len(documents), dtype=torch.float64)
    for word in query:
        found = postings.get(word, {})
        idf = math.log(1 + (len(documents) - len(found) + 0.5) / (len(found) + 0.5))
        for number, tf in found.items():
            scores[number] += idf * tf / (tf + k1 * (1 - b + b * len(documents[number]) / mean))
    return scores.float()


# rag.fuse ------------------------------------------------------------------------------------------------------------

TIE = 1e-6
"""Least difference between two fused scores: far above any rounding, float32's included, so the order is one only."""


@question("rag.fuse", lab=LAB, points=10, slide=SLIDE)
def fuse(draw: Draw) -> Case:
    """Make one ranking out of several."""
    edge = draw.edge("three rankings", "a small constant", "one ranking", "an empty ranking")
    constant = 1 if edge == "a small constant" else draw.choice([10, 30, 60])
    count = {"three rankings": 3, "one ranking": 1}.get(edge or "", 2)
    while True:
        lengths = draw.sizes(count, low=3, high=6)
        ids = [place * 3 + 5 for place in draw.permutation(8).tolist()]
        rankings = [[ids[place] for place in draw.permutation(8)[:length].tolist()] for length in lengths]
        if edge == "an empty ranking":
            rankings[0] = []
        if count == 1 or edge == "an empty ranking" or _shows_all(rankings, constant):
            return Case(edge, rankings=rankings, constant=constant)


def _shows_all(rankings: list[list[int]], constant: float) -> bool:
    """No two fused scores tie, not even when ranks start at 0; some ids are in several rankings, some in one."""
    times = Counter(id for ranking in rankings for id in ranking)
    for first in (0, 1):
        scores = sorted(_fused(rankings, lambda rank, first=first: 1 / (constant + rank + first)).values())
        if any(b - a < TIE for a, b in zip(scores, scores[1:], strict=False)):
            return False
    return 1 in times.values() and max(times.values()) > 1


def _fused(rankings: Any, share: Any) -> dict[int, float]:
    """Every id and the sum of share(rank) over the rankings that hold it, the best rank being 0."""
    scores: dict[int, float] = defaultdict(float)
    for ranking in rankings:
        for rank, id in enumerate(ranking):
            scores[id] += share(rank)
    return dict(scores)


def _best_first(scores: dict[int, float]) -> tuple[list[int], list[float]]:
    """Ids and scores by descending score: what answers to this question have in common."""
    ids = sorted(scores, key=lambda id: -scores[id])
    return ids, [scores[id] for id in ids]


fuse.oracle("lecturekit.prompting.rag:fuse")
fuse.tolerance(
    ulps=lambda case: len(case.rankings) + 4,
    part="scores",
    why="a division and an addition for each ranking, in float32 or wider",
)


@fuse.driver
def _(function: Any, case: Case) -> dict[str, Any]:
    """Lists, tensors, arrays or the keys and values of a dict, whichever came back."""
    result = function(case.rankings, case.constant)
    if not isinstance(result, (tuple, list)) or len(result) != 2:
        raise Unfit(f"return two lists, (ids, scores), got {describe(result)}")
    parts = {}
    for name, part in zip(("ids", "scores"), result, strict=True):
        part = part.tolist() if hasattr(part, "tolist") else part
        if not isinstance(part, (tuple, list, KeysView, ValuesView)):
            raise Unfit(f"{name} must be a list, got {describe(part)}")
        parts[name] = [value.item() if hasattr(value, "item") else value for value in part]
    return parts


fuse.law(
    "every id of any ranking is there, once",
    lambda case, parts: sorted(parts["ids"]) == sorted({id for ranking in case.rankings for id in ranking}),
)
fuse.law(
    "the best id comes first",
    lambda _, parts: all(a >= b for a, b in zip(parts["scores"], parts["scores"][1:], strict=False)),
)
fuse.law(
    "one ranking stays in its order",
    lambda case, parts: list(parts["ids"]) == case.rankings[0] if case.label == "one ranking" else None,
)


@fuse.misconception("counts ranks from 0", hint="enumerate starts at 0. Which rank has the best document of a ranking?")
def _(rankings, constant):
    return _best_first(_fused(rankings, lambda rank: 1 / (constant + rank)))


@fuse.misconception("forgets the constant", hint="What keeps the first rank from counting twice as much as the second?")
def _(rankings, constant):
    return _best_first(_fused(rankings, lambda rank: 1 / (rank + 1)))


@fuse.misconception("writes 60 into the code", hint="60 is a default. What if somebody asks for another constant?")
def _(rankings, constant):
    return _best_first(_fused(rankings, lambda rank: 1 / (60 + rank + 1)))


@fuse.misconception(
    "gives the worst rank most", hint="Rank 1 is the best. Does 1 / (constant + rank) grow or fall with the rank?"
)
def _(rankings, constant):
    return _best_first(_fused(rankings, lambda rank: constant + rank + 1))


@fuse.misconception(
    "keeps only what every ranking holds",
    hint="BM25 finds nothing where no word is shared. Is a document lost then that means the same?",
)
def _(rankings, constant):
    scores = _fused(rankings, lambda rank: 1 / (constant + rank + 1))
    return _best_first({id: score for id, score in scores.items() if all(id in ranking for ranking in rankings)})


@fuse.misconception(
    "takes the mean over the rankings that hold an id",
    hint="Two rankings agree on a document, one alone likes another as well: which of them should lead?",
)
def _(rankings, constant):
    scores = _fused(rankings, lambda rank: 1 / (constant + rank + 1))
    return _best_first({id: score / sum(id in ranking for ranking in rankings) for id, score in scores.items()})


@fuse.misconception(
    "divides by the number of rankings", hint="The order is right. Is the score a sum or a mean in the formula?"
)
def _(rankings, constant):
    return _best_first(_fused(rankings, lambda rank: 1 / (constant + rank + 1) / len(rankings)))


@fuse.misconception(
    "takes the best rank alone", hint="Two rankings hold the same document. What does the second one add to it?"
)
def _(rankings, constant):
    scores: dict[int, float] = {}
    for ranking in rankings:
        for rank, id in enumerate(ranking, start=1):
            scores[id] = max(scores.get(id, 0.0), 1 / (constant + rank))
    return _best_first(scores)


@fuse.misconception(
    "lets the last ranking overwrite the ones before",
    hint="What happens in your dict to an id that has a share already?",
)
def _(rankings, constant):
    return _best_first({id: 1 / (constant + r) for ranking in rankings for r, id in enumerate(ranking, start=1)})


@fuse.misconception(
    "gives a missing id the rank behind the last",
    hint="A ranking that lacks an id: does it add anything to that one's score, in the formula?",
)
def _(rankings, constant):
    ids = dict.fromkeys(id for ranking in rankings for id in ranking)
    ranks = [{id: rank for rank, id in enumerate(ranking, start=1)} for ranking in rankings]
    return _best_first({id: sum(1 / (constant + rank.get(id, len(rank) + 1)) for rank in ranks) for id in ids})


@fuse.misconception(
    "adds the ranks and then divides",
    hint="1 / a + 1 / b is not 1 / (a + b). For how many numbers do you take the reciprocal?",
)
def _(rankings, constant):
    sums = _fused(rankings, lambda rank: constant + rank + 1)
    return _best_first({id: 1 / total for id, total in sums.items()})


@fuse.misconception("puts the worst first", hint="In which direction does sorted go by default?")
def _(rankings, constant):
    ids, scores = _best_first(_fused(rankings, lambda rank: 1 / (constant + rank + 1)))
    return ids[::-1], scores[::-1]


@fuse.misconception(
    "leaves the ids in the order in which they come",
    hint="The scores are right. What does the first id of the result have to be?",
)
def _(rankings, constant):
    scores = _fused(rankings, lambda rank: 1 / (constant + rank + 1))
    return list(scores), list(scores.values())


@fuse.misconception(
    "sorts the ids but not the scores",
    hint="The first score belongs to the first id. Is it that id's, in your result?",
)
def _(rankings, constant):
    scores = _fused(rankings, lambda rank: 1 / (constant + rank + 1))
    return _best_first(scores)[0], list(scores.values())


@fuse.misconception(
    "keeps only the ids of the first ranking",
    hint="What becomes of a document that the first ranking lacks and the second one holds?",
)
def _(rankings, constant):
    scores = _fused(rankings, lambda rank: 1 / (constant + rank + 1))
    return _best_first({id: scores[id] for id in rankings[0]})


@fuse.misconception(
    "goes on counting ranks from one ranking to the next",
    hint="Which rank has the first document of the second ranking? Where do you set your counter?",
)
def _(rankings, constant):
    return _best_first(_fused([sum(rankings, [])], lambda rank: 1 / (constant + rank + 1)))


@fuse.misconception(
    "cuts every ranking to the length of the shortest",
    hint="What does zip do with lists of different lengths? And what of an empty one?",
)
def _(rankings, constant):
    shortest = min(map(len, rankings))
    return _best_first(_fused([ranking[:shortest] for ranking in rankings], lambda rank: 1 / (constant + rank + 1)))


@fuse.misconception("returns the scores before the ids", hint="Which of the two does the signature name first?")
def _(rankings, constant):
    return _best_first(_fused(rankings, lambda rank: 1 / (constant + rank + 1)))[::-1]


@fuse.alternative("a dict, then its items sorted")
def _(lists, c):
    total: dict[int, float] = {}
    for ranking in lists:
        for place in range(len(ranking)):
            total[ranking[place]] = total.get(ranking[place], 0) + 1 / (c + place + 1)
    pairs = sorted(total.items(), key=lambda pair: pair[1], reverse=True)
    return [id for id, _ in pairs], [score for _, score in pairs]


@fuse.alternative("keys and values of a dict")
def _(rankings, constant):
    scores = _fused(rankings, lambda rank: 1 / (constant + rank + 1))
    best = dict(sorted(scores.items(), key=lambda pair: pair[1], reverse=True))
    return best.keys(), best.values()


@fuse.alternative("arrays of NumPy")
def _(rankings, constant):
    scores = _fused(rankings, lambda rank: 1 / (constant + rank + 1))
    ids, sums = np.array(list(scores)), np.array(list(scores.values()))
    return ids[np.argsort(-sums)], np.sort(sums)[::-1]


@fuse.alternative("id by id, with index")
def _(rankings, constant):
    scored = []
    for id in {id for ranking in rankings for id in ranking}:
        score = sum(1.0 / (constant + ranking.index(id) + 1) for ranking in rankings if id in ranking)
        scored.append((score, id))
    scored.sort(reverse=True)
    return tuple(id for _, id in scored), tuple(score for score, _ in scored)


@fuse.alternative("tensors, float32")
def _(*args):
    rankings, constant = args
    size = max(id for ranking in rankings for id in ranking) + 1
    scores = torch.zeros(size)
    for ranking in rankings:
        scores[torch.tensor(ranking, dtype=torch.long)] += 1 / (constant + 1 + torch.arange(len(ranking)))
    order = scores.argsort(descending=True)[: int((scores > 0).sum())]
    return order, scores[order]
