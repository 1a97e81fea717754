"""How good retrieval is, and what an answer says of its sources.

Recall and reciprocal rank as in Manning, Raghavan and Schütze 2008 (chapter 8) and Voorhees 1999 (TREC-8).
"""

from __future__ import annotations

import re
from collections.abc import Collection, Hashable, Sequence
from typing import Any

from lecturekit.arguments import require_positive_int

ABSTAIN = "not in the documents"


def recall_and_mrr(
    ranked: Sequence[Sequence[Hashable]], relevant: Sequence[Collection[Hashable]], k: int
) -> tuple[float, float]:
    """Recall@k and MRR@k, each the mean over the questions that have an answer.

    ranked: for each question the ids that were found, best first, at least k of them or all there are.
    relevant: for each question the ids of the passages that hold its answer; empty where no passage does. Such a
    question is left out: nothing could have been found for it.
    recall: the share of the relevant passages that are among the first k.
    mrr: 1 / rank of the first relevant one, the best rank being 1; 0 where none is among the first k.

    Rankings and relevant ids may be tensors or arrays. A passage counts once, however often either of them names it.

    Raises TypeError when a ranking or the relevant ids of a question are no list of ids or k is no int, ValueError when
    the numbers of questions differ, no question has an answer or k is below 1.
    """
    require_positive_int("k", k)
    ranked = [_ids(f"ranked[{number}]", found) for number, found in enumerate(ranked)]
    relevant = [_ids(f"relevant[{number}]", wanted) for number, wanted in enumerate(relevant)]
    if len(ranked) != len(relevant):
        raise ValueError(f"relevant must have one entry for each of the {len(ranked)} questions, got {len(relevant)}")
    asked = [(found[:k], set(wanted)) for found, wanted in zip(ranked, relevant, strict=True) if wanted]
    if not asked:
        raise ValueError("relevant must name a passage for at least one question, got none")
    recalls = [len(wanted.intersection(found)) / len(wanted) for found, wanted in asked]
    reciprocals = [
        next((1 / rank for rank, id in enumerate(found, start=1) if id in wanted), 0.0) for found, wanted in asked
    ]
    return sum(recalls) / len(asked), sum(reciprocals) / len(asked)


def _ids(name: str, value: Any) -> list[Hashable]:
    """The ids of one question as a list. A str is none: it would be read letter by letter."""
    value = value.tolist() if hasattr(value, "tolist") else value
    if isinstance(value, (str, bytes)) or not isinstance(value, Collection):
        raise TypeError(f"{name} must be a list of ids, got {type(value).__name__}")
    return list(value)


def cited(answer: str, used: Sequence[int]) -> list[int]:
    """The passages that an answer cites, in the order in which it first names them.

    answer: text with sources in brackets: [1], [1, 3], [1; 3], [1][3], or [1-3] for all from 1 to 3.
    used: what ``rag.assemble`` gave beside the prompt, the passage behind each number. A number that no source had is
    left out.
    """
    numbers: list[int] = []
    for group in re.findall(r"\[([0-9\s,;\u2013-]+)\]", answer):
        for first, last in re.findall(r"(?<![-\u2013])\b([0-9]+)(?:\s*[-\u2013]\s*([0-9]+))?", group):
            numbers += range(int(first), min(int(last or first), len(used)) + 1)
    return list(dict.fromkeys(used[number - 1] for number in numbers if 1 <= number <= len(used)))


def abstains(answer: str) -> bool:
    """Whether an answer says that the sources do not hold it: "not in the documents", in any case and spacing."""
    return ABSTAIN in " ".join(answer.lower().split())
