"""How good retrieval is, and what an answer says of its sources.

Recall and reciprocal rank as in Manning, Raghavan and Schütze 2008 (chapter 8) and Voorhees 1999 (TREC-8).
"""

from __future__ import annotations

import re
from collections.abc import Collection, Hashable, Sequence

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

    Raises ValueError when the numbers of questions differ or no question has an answer, TypeError when one names its
    passage by a str in place of a list; k is an int of at least 1.
    """
    require_positive_int("k", k)
    if len(ranked) != len(relevant):
        raise ValueError(f"relevant must have one entry for each of the {len(ranked)} questions, got {len(relevant)}")
    for number, wanted in enumerate(relevant):
        if isinstance(wanted, str):
            raise TypeError(f"relevant[{number}] must be a list of ids, got a str")
    asked = [(list(found[:k]), set(wanted)) for found, wanted in zip(ranked, relevant, strict=True) if len(wanted)]
    if not asked:
        raise ValueError("relevant must name a passage for at least one question, got none")
    recalls = [len(wanted.intersection(found)) / len(wanted) for found, wanted in asked]
    reciprocals = [
        next((1 / rank for rank, id in enumerate(found, start=1) if id in wanted), 0.0) for found, wanted in asked
    ]
    return sum(recalls) / len(asked), sum(reciprocals) / len(asked)


def cited(answer: str, used: Sequence[int]) -> list[int]:
    """The passages that an answer cites, in the order in which it first names them.

    answer: text with sources in brackets: [1], or [1, 3], or [1][3].   used: what ``rag.assemble`` gave beside the
    prompt, the passage behind each number. A number that no source had is left out.
    """
    numbers = [int(number) for group in re.findall(r"\[([\d\s,]+)\]", answer) for number in re.findall(r"\d+", group)]
    return list(dict.fromkeys(used[number - 1] for number in numbers if 1 <= number <= len(used)))


def abstains(answer: str) -> bool:
    """Whether an answer says that the sources do not hold it: "not in the documents", in any case and spacing."""
    return ABSTAIN in " ".join(answer.lower().split())
