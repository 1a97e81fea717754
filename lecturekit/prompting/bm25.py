"""BM25: how well the words of a query fit a document, without any model. Robertson and Zaragoza 2009, in Lucene's form.

    score(query, document) = Σ over the query's words   idf(word) · tf / (tf + k1 · (1 − b + b · length / mean length))
    idf(word) = ln(1 + (N − df + ½) / (df + ½))

tf: how often the word is in the document.   df: in how many of the N documents it is.   length: of the document, in
words. The original has a factor k1 + 1 above the fraction line, which is the same for all and changes no order.
``bm25`` is the formula, ``BM25`` the index that makes it fast; both equal the bm25s library's method "lucene".
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from lecturekit.arguments import require_number

K1, B = 1.5, 0.75  # as in bm25s; Lucene itself has k1 = 1.2


def bm25(query: Sequence[str], documents: Sequence[Sequence[str]], k1: float = K1, b: float = B) -> Tensor:
    """The BM25 score of each document for one query, read off the formula above.

    query: a list of words; a word that stands in it twice counts twice.   documents: n lists of words
    →   (n,) float32, 0 where no word is shared. A document without words scores 0.

    Raises TypeError when query or a document is no list of words or k1 or b no number, ValueError when there are no
    documents, k1 is below 0 or b not in 0..1.
    """
    lengths = _lengths(documents, k1, b)
    _require_words("query", query)
    mean = sum(lengths) / len(lengths)
    idf = {word: _idf(len(documents), sum(word in document for document in documents)) for word in query}
    scores = []
    for document, length in zip(documents, lengths, strict=True):
        tf = Counter(document)
        scores.append(
            sum(idf[word] * tf[word] / (tf[word] + k1 * (1 - b + b * length / mean)) for word in query if tf[word])
        )
    return torch.tensor(scores, dtype=torch.float32)


class BM25:
    """An inverted index: for each word the documents that hold it, with what the word adds to their scores.

    documents: n lists of words. A score costs one addition for each word of the query and document that holds it,
    however many documents there are beside these. Memory: 8 bytes for each pair of document and word in it.
    Raises what ``bm25`` raises.
    """

    def __init__(self, documents: Sequence[Sequence[str]], k1: float = K1, b: float = B) -> None:
        lengths = np.array(_lengths(documents, k1, b))
        self._count = count = len(documents)
        self._numbers: dict[str, int] = {}
        numbers = self._numbers
        words = np.fromiter(
            (numbers.setdefault(word, len(numbers)) for document in documents for word in document),
            dtype=np.int64,
            count=int(lengths.sum()),
        )
        # One number for each (word, document); sorted, these are the lists of the index one after the other.
        pairs, tf = np.unique(words * count + np.repeat(np.arange(count), lengths), return_counts=True)
        held, holders = pairs // count, pairs % count
        df = np.bincount(held, minlength=len(numbers))
        self._starts = [0, *df.cumsum().tolist()]
        idf = np.array([_idf(count, int(n)) for n in df])
        norm = k1 * (1 - b + b * lengths / max(lengths.mean(), 1e-9))  # no words at all: then there is no pair either
        self._holders = holders.astype(np.int32)
        self._shares = (idf[held] * tf / (tf + norm[holders])).astype(np.float32)

    def __len__(self) -> int:
        return self._count

    def scores(self, query: Sequence[str]) -> Tensor:
        """What ``bm25`` gives for this query: (n,) float32. Raises TypeError when query is no list of words."""
        _require_words("query", query)
        total = np.zeros(self._count, dtype=np.float32)
        for word, times in Counter(query).items():
            number = self._numbers.get(word)
            if number is not None:
                place = slice(self._starts[number], self._starts[number + 1])
                # fast because both are float32; a document is in the list of a word once
                np.add.at(total, self._holders[place], np.float32(times) * self._shares[place])
        return torch.from_numpy(total)


def _idf(count: int, df: int) -> float:
    """How rare a word is that df of count documents hold; above 0, so that no shared word counts against a document."""
    return math.log(1 + (count - df + 0.5) / (df + 0.5))


def _lengths(documents: Sequence[Sequence[str]], k1: float, b: float) -> list[int]:
    """The lengths of the documents in words, after a look at all that an index is made of."""
    if require_number("k1", k1) < 0:
        raise ValueError(f"k1 must be at least 0, got {k1}")
    if not 0 <= require_number("b", b) <= 1:
        raise ValueError(f"b must be in 0..1, got {b}")
    _require_list("documents", documents, "lists of words")
    if not documents:
        raise ValueError("documents must not be empty")
    for number, document in enumerate(documents):
        _require_words(f"documents[{number}]", document)
    return [len(document) for document in documents]


def _require_words(name: str, value: Sequence[str]) -> None:
    _require_list(name, value, "words")
    for word in value:
        if not isinstance(word, str):
            raise TypeError(f"{name} must be a list of words, got {type(word).__name__} in it")


def _require_list(name: str, value: object, what: str) -> None:
    if not isinstance(value, (list, tuple)):
        raise TypeError(f"{name} must be a list of {what}, got {type(value).__name__}: split texts into words first")
