"""Make the customer-service data set from the dialogues in written/, each of which was written for it.

    python data/customer_service/make.py       # checks what is written, writes the splits and SHA256SUMS

Nothing is generated: this script checks the form of every row, refuses near-duplicates, assigns whole topics to a
split, and numbers the rows. The same files always give the same bytes.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator
from itertools import combinations
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
GROUPS = ("parcels", "accounts", "travel", "technology")

# At least one topic of each group, and none that is a twin of a training topic.
HELD_OUT = ("damaged item", "double charge", "phone plan", "hotel stay", "event tickets", "home appliance")
HELD_OUT_KINDS = ("harassment", "false documents")

MOST_ALIKE = 0.20  # no two texts of one role may share more than this fraction of their word triples (Jaccard)


def triples(text: str) -> set[tuple[str, ...]]:
    """All runs of three words of a text, in lower case and without punctuation."""
    words = re.findall(r"[a-z0-9']+", text.lower())
    return set(zip(words, words[1:], words[2:], strict=False))


def alike(one: set[tuple[str, ...]], other: set[tuple[str, ...]]) -> float:
    """Jaccard similarity of two sets of word triples, from 0 (nothing shared) to 1 (the same)."""
    return len(one & other) / max(1, len(one | other))


def read(name: str, folder: Path = HERE / "written") -> list[dict[str, Any]]:
    """The rows of one written file. Raises ValueError for a dialogue that is none."""
    rows = [json.loads(line) for line in (folder / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()]
    for number, row in enumerate(rows, start=1):
        if "messages" in row:
            roles = [message["role"] for message in row["messages"]]
            texts = [message["content"] for message in row["messages"]]
            if roles not in (["user", "assistant"], ["user", "assistant"] * 2):
                raise ValueError(f"{name}.jsonl, line {number}: the roles are {roles}")
            if any(text != text.strip() or not text for text in texts):
                raise ValueError(f"{name}.jsonl, line {number}: a text is empty or has space at its ends")
    return rows


def texts(rows: list[dict[str, Any]], role: str) -> Iterator[str]:
    """What one role says in these dialogues."""
    for row in rows:
        yield from (message["content"] for message in row["messages"] if message["role"] == role)


def nearest(rows: list[dict[str, Any]], role: str) -> tuple[float, str, str]:
    """The two most alike texts of a role, and how alike they are. Texts of under six words may well be the same."""
    long = [text for text in texts(rows, role) if len(text.split()) >= 6]
    words = [triples(text) for text in long]
    pairs = combinations(range(len(long)), 2)
    most, one, other = max((alike(words[i], words[j]), i, j) for i, j in pairs)
    return most, long[one], long[other]


def make(folder: Path = HERE / "written") -> dict[str, list[dict[str, Any]]]:
    """All splits. Raises ValueError for a malformed row, a near-duplicate, or a held-out topic that is not there."""
    dialogues = [row for group in GROUPS for row in read(group, folder)]
    safety = read("safety", folder)
    for role in ("user", "assistant"):
        most, one, other = nearest(dialogues + safety, role)
        if most > MOST_ALIKE:
            raise ValueError(f"two texts of the {role} are {most:.0%} alike: {one!r} and {other!r}")
    for held_out, rows in ((HELD_OUT, dialogues), (HELD_OUT_KINDS, safety)):
        missing = set(held_out) - {row["topic"] for row in rows}
        if missing:
            raise ValueError(f"no dialogue has the held-out topic {', '.join(sorted(missing))}")

    chosen = {
        "train": [row for row in dialogues if row["topic"] not in HELD_OUT],
        "test": [row for row in dialogues if row["topic"] in HELD_OUT],
        "safety_train": [row for row in safety if row["topic"] not in HELD_OUT_KINDS],
        "safety_test": [row for row in safety if row["topic"] in HELD_OUT_KINDS],
        "keep": read("keep", folder),
        "general": read("general", folder),
    }
    return {
        split: [{"id": f"{split}-{number:03d}", **row} for number, row in enumerate(rows)]
        for split, rows in chosen.items()
    }


def write(target: Path, folder: Path = HERE / "written") -> None:
    """Write the splits as JSON lines with UNIX line ends, and their checksums as `sha256sum -c` reads them."""
    sums = []
    for split, rows in make(folder).items():
        data = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode()
        (target / f"{split}.jsonl").write_bytes(data)
        sums.append(f"{hashlib.sha256(data).hexdigest()}  {split}.jsonl\n")
    (target / "SHA256SUMS").write_bytes("".join(sums).encode())


if __name__ == "__main__":
    write(HERE)
    print((HERE / "SHA256SUMS").read_text(), end="")
