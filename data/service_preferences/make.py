"""Make the service preferences: a customer's message with a better and a worse reply, split by topic.

    python data/service_preferences/make.py    # writes train.jsonl, test.jsonl and SHA256SUMS

Every pair lies in written.jsonl as it was written, one by one; this script makes no text. It gives each pair
an id, splits by topic, refuses pairs that break what the card claims, and writes the same bytes each time.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import re
from collections import Counter
from pathlib import Path

HERE = Path(__file__).parent
WRITTEN = "written.jsonl"
FIELDS = ("topic", "situation", "message", "better", "worse", "reason")
REASONS = ("empathy", "blame", "vague", "false promise", "off topic", "rude")

# Chosen one by one: no test topic has a near relative in training, as a dentist's desk has in an optician.
TOPICS = {
    "train": (
        "gym membership",
        "library",
        "vet",
        "dentist's desk",
        "cinema",
        "garden centre",
        "taxi",
        "laundry",
        "museum",
        "bike repair",
        "language school",
        "toy shop",
        "bookshop",
        "optician",
        "music school",
    ),
    "test": ("bakery", "energy supplier", "hairdresser", "ferry", "camping site", "city hall desk"),
}

MESSAGE_WORDS = (6, 25)
REPLY_WORDS = (10, 28)
LONGEST_RATIO = 1.3  # words of the longer reply over words of the shorter one
MOST_ALIKE = 0.5  # no two messages may share more than this fraction of the shorter one's word triples
BEST_WORD = 0.65  # no single word's presence may tell better from worse in more than this fraction of the pairs


def words(text: str) -> list[str]:
    """The words of a text in lower case, without punctuation."""
    return re.findall(r"[a-z0-9']+", text.lower())


def triples(text: str) -> set[tuple[str, ...]]:
    """All runs of three words of a text."""
    found = words(text)
    return set(zip(found, found[1:], found[2:], strict=False))


def alike(one: set[tuple[str, ...]], other: set[tuple[str, ...]]) -> float:
    """The fraction of the smaller set of word triples that is in the other set too, from 0 to 1."""
    return len(one & other) / max(1, min(len(one), len(other)))


def best_word(rows: list[dict[str, str]]) -> tuple[str, float]:
    """The word whose presence tells better from worse best, and the fraction of pairs it gets right.

    A pair where both replies have the word, or neither, counts one half, as a tossed coin would.
    """
    lead: Counter[str] = Counter()
    for row in rows:
        better, worse = set(words(row["better"])), set(words(row["worse"]))
        lead.update(better - worse)
        lead.subtract(worse - better)
    word = max(lead, key=lambda word: (abs(lead[word]), word))
    return word, 0.5 + abs(lead[word]) / len(rows) / 2


def check_pair(row: dict[str, str]) -> None:
    """Raise ValueError, naming the pair's message, if a pair breaks the rules for one pair."""
    if tuple(row) != FIELDS:
        raise ValueError(f"a pair must have the fields {', '.join(FIELDS)}, got {', '.join(row)}")
    where = f"pair {row['message']!r}"
    if row["reason"] not in REASONS:
        raise ValueError(f"{where}: reason must be one of {', '.join(REASONS)}, got {row['reason']!r}")
    for field, (low, high) in {"message": MESSAGE_WORDS, "better": REPLY_WORDS, "worse": REPLY_WORDS}.items():
        count = len(words(row[field]))
        if not low <= count <= high:
            raise ValueError(f"{where}: {field} must have {low} to {high} words, got {count}")
    shorter, longer = sorted(len(words(row[field])) for field in ("better", "worse"))
    if longer > LONGEST_RATIO * shorter:
        raise ValueError(f"{where}: replies must be about equally long, got {shorter} and {longer} words")
    for field in ("better", "worse"):
        if len(re.findall(r"[.!?](?=\s|$)", row[field])) > 2:
            raise ValueError(f"{where}: {field} must be one or two sentences, got {row[field]!r}")


def check_all(rows: list[dict[str, str]]) -> None:
    """Raise ValueError for a topic without a split, messages too much alike, or a word that gives the answer away."""
    astray = {row["topic"] for row in rows} ^ set(itertools.chain(*TOPICS.values()))
    if astray:
        raise ValueError(f"each topic must be in {WRITTEN} and in TOPICS, in one only: {', '.join(sorted(astray))}")
    sets = [(row["message"], triples(row["message"])) for row in rows]
    for (message, one), (second, other) in itertools.combinations(sets, 2):
        if alike(one, other) > MOST_ALIKE:
            raise ValueError(f"two messages are too much alike: {message!r} and {second!r}; write one of them anew")
    word, right = best_word(rows)
    if right > BEST_WORD:
        raise ValueError(f"the word {word!r} alone tells better from worse in {right:.0%} of pairs; vary the replies")


def make(folder: Path = HERE) -> dict[str, list[dict[str, str]]]:
    """All splits, from folder/written.jsonl.

    An id is the topic and the pair's place in it, so it does not depend on the split. Rows are dealt in turn, one of
    each topic, so that the first rows of a split are as varied as all of it.
    """
    rows = [json.loads(line) for line in (folder / WRITTEN).read_text(encoding="utf-8").splitlines()]
    for row in rows:
        check_pair(row)
    check_all(rows)
    of_topic: dict[str, list[dict[str, str]]] = {}
    for row in rows:
        mates = of_topic.setdefault(row["topic"], [])
        slug = "-".join(re.findall(r"[a-z]+", row["topic"].replace("'", "")))
        mates.append({"id": f"{slug}-{len(mates):02d}"} | row)
    return {
        split: [row for deal in itertools.zip_longest(*(of_topic[topic] for topic in topics)) for row in deal if row]
        for split, topics in TOPICS.items()
    }


def write(folder: Path) -> None:
    """Write the splits as JSON lines with UNIX line ends, and their checksums as `sha256sum -c` reads them."""
    sums = []
    for split, rows in make().items():
        data = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode()
        (folder / f"{split}.jsonl").write_bytes(data)
        sums.append(f"{hashlib.sha256(data).hexdigest()}  {split}.jsonl\n")
    (folder / "SHA256SUMS").write_bytes("".join(sums).encode())


if __name__ == "__main__":
    write(HERE)
    print((HERE / "SHA256SUMS").read_text(), end="")
