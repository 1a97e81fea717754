"""Find solutions that are more alike than chance and the task explain. Similar is not copied: a person must look.

Winnowing (Schleimer, Wilkerson and Aiken, "Winnowing: local algorithms for document fingerprinting", SIGMOD 2003) on
the token stream: names become their kind and literals theirs, so that renaming changes nothing; comments and layout
are gone. What the released stub holds, or many in the class wrote, is not evidence and is taken out first.
Left out: comparing across cells, with earlier years, and with the web.
"""

from __future__ import annotations

import io
import keyword
import re
import tokenize
import zlib
from array import array
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from itertools import combinations

GRAM, WINDOW = 8, 4  # any run of GRAM + WINDOW − 1 = 11 equal tokens shares a fingerprint
MIN_TOKENS = 40  # an answer shorter than this is never reported: too few ways to write it
MIN_COMMON = 12  # fingerprints that two submissions must share, in all cells together: 30 tokens or more
MIN_SHARE = 0.6  # of the fingerprints of the one that has fewer
MIN_CLASS = 5  # below this nobody can say what "most of the class" writes
MAX_SHARED = 30  # people who may hold one fingerprint, in any class: what more of them write is a usual way to write it
MAX_SOURCE = 100_000  # characters of a cell that are looked at

LIMITS = (
    f"Answers of fewer than {MIN_TOKENS} tokens are never compared. What the release holds does not count, nor what "
    f"more than a twentieth of the class wrote (at least 4 people, at most {MAX_SHARED} or a third): a text that went "
    f"round among more than that is not seen here. Reported are those that share at least {MIN_COMMON} of the "
    f"remaining fingerprints and {MIN_SHARE:.0%} of those of the smaller one."
)
_ROUGH = re.compile(r"[^\W\d]\w*|\d[\w.]*|\"[^\"\n]*\"|'[^'\n]*'|[^\s\w]")


@dataclass(frozen=True)
class Alike:
    """Submissions that resemble each other.

    students: two or more.   pair: the two most alike of them.   share: of the pair's fingerprints, 0 to 1.   common:
    how many the pair shares.   cells: the cells in which the pair is alike, most alike first, each with its share.
    """

    students: tuple[str, ...]
    pair: tuple[str, str]
    share: float
    common: int
    cells: tuple[tuple[str, float], ...]


def tokens(source: str) -> list[str]:
    """The normalised tokens of a cell: v, call, attribute and def for names, N and S for literals. Never raises."""
    source = source[:MAX_SOURCE]
    try:
        return _tokens(source)
    except Exception:  # not Python: unbalanced brackets, NUL, mixed indentation; what is there is still compared
        return [_normal(word) for word in _ROUGH.findall(source)]


def _tokens(source: str) -> list[str]:
    found: list[str] = []
    strings = 0  # depth of f-strings, which Python 3.12 cuts into pieces and 3.11 does not
    before = ""
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        kind, text = tokenize.tok_name[token.type], token.string
        if kind in ("FSTRING_START", "TSTRING_START"):
            strings += 1
            if strings == 1:
                found.append("S")
        elif kind in ("FSTRING_END", "TSTRING_END"):
            strings -= 1
        elif strings or kind in ("COMMENT", "NL", "NEWLINE", "INDENT", "DEDENT", "ENCODING", "ENDMARKER"):
            continue
        elif kind == "NAME" and not keyword.iskeyword(text):
            found.append({".": "attribute", "def": "def", "class": "def"}.get(before, "v"))
        elif kind in ("NUMBER", "STRING"):
            found.append(kind[0])
        else:
            if text == "(" and found and found[-1] == "v":
                found[-1] = "call"
            found.append(text)
        before = text
    return found


def _normal(word: str) -> str:
    if word[0] in "\"'":
        return "S"
    if word[0].isdigit():
        return "N"
    return word if keyword.iskeyword(word) or not (word[0].isalpha() or word[0] == "_") else "v"


def fingerprints(stream: list[str]) -> frozenset[int]:
    """The winnowed fingerprints of a token stream: of each window of hashes the smallest, the rightmost of equals."""
    hashes = [
        zlib.crc32("\0".join(stream[i : i + GRAM]).encode("utf-8", "replace")) for i in range(len(stream) - GRAM + 1)
    ]
    if len(hashes) <= WINDOW:
        return frozenset({min(hashes)} if hashes else ())
    return frozenset(min(hashes[i : i + WINDOW]) for i in range(len(hashes) - WINDOW + 1))


class Similarity:
    """Take in solutions one at a time, then say which submissions are alike.

    stubs: the released source of each solution cell, by nbgrader id. Held in memory are fingerprints, not sources.
    """

    def __init__(self, stubs: Mapping[str, str] | None = None) -> None:
        self._stubs = {cell: self._prints(source) for cell, source in (stubs or {}).items()}
        self._kept: dict[int, array[int]] = {}  # checksum of a source → fingerprints: many hand in the same text
        self._cells: dict[str, dict[str, array[int]]] = defaultdict(dict)  # four bytes a fingerprint

    @staticmethod
    def _prints(source: str) -> frozenset[int]:
        return fingerprints(tokens(source))

    def add(self, student: str, cell: str, source: str) -> None:
        """Take in one solution cell of one student."""
        key = hash(source)
        prints = self._kept.get(key)
        if prints is None:
            stream = tokens(source)
            prints = array("I", sorted(fingerprints(stream)) if len(stream) >= MIN_TOKENS else ())
            self._kept[key] = prints
        self._cells[cell][student] = prints

    def alike(self) -> list[Alike]:
        """Groups of submissions that are alike, the most alike first."""
        shared: Counter[tuple[str, str]] = Counter()
        by_cell: dict[tuple[str, str], list[tuple[str, int]]] = defaultdict(list)
        own: Counter[str] = Counter()
        left: dict[str, dict[str, int]] = {}
        for cell in self._cells:
            distinctive = self._distinctive(cell)
            left[cell] = {student: len(prints) for student, prints in distinctive.items()}
            own.update(left[cell])
            for pair, common in _common(distinctive).items():
                shared[pair] += common
                by_cell[pair].append((cell, common))
        found = []
        for (one, other), common in shared.items():
            share = common / min(own[one], own[other])
            if common >= MIN_COMMON and share >= MIN_SHARE:
                cells = [(cell, count / min(left[cell][one], left[cell][other])) for cell, count in by_cell[one, other]]
                cells = sorted((c for c in cells if c[1] >= MIN_SHARE), key=lambda c: (-c[1], c[0]))
                if cells:
                    found.append(Alike((one, other), (one, other), share, common, tuple(cells)))
        return _groups(found)

    def _distinctive(self, cell: str) -> dict[str, frozenset[int]]:
        """Each student's fingerprints in a cell, less those of the stub and those that many share."""
        solutions = {student: frozenset(prints) for student, prints in self._cells[cell].items()}
        size = len(solutions)
        if size < MIN_CLASS:
            return {}
        limit = min(size // 3, max(4, size // 20), MAX_SHARED)
        spread = Counter(fingerprint for prints in solutions.values() for fingerprint in prints)
        stub = self._stubs.get(cell, frozenset())
        rare = {fingerprint for fingerprint, count in spread.items() if count <= limit} - stub
        distinctive = {student: prints & rare for student, prints in solutions.items()}
        return {student: prints for student, prints in distinctive.items() if prints}


def _common(solutions: Mapping[str, frozenset[int]]) -> Counter[tuple[str, str]]:
    """How many fingerprints each pair of students shares, through an index from fingerprint to those who hold it."""
    same: dict[frozenset[int], list[str]] = defaultdict(list)
    for student, prints in solutions.items():
        same[prints].append(student)
    distinct = list(same)
    holders: dict[int, list[int]] = defaultdict(list)
    for number, prints in enumerate(distinct):
        for fingerprint in prints:
            holders[fingerprint].append(number)
    between: Counter[tuple[int, int]] = Counter()
    for numbers in holders.values():
        if len(numbers) > 1:
            between.update(combinations(numbers, 2))
    common: Counter[tuple[str, str]] = Counter()
    for (one, other), count in between.items():
        smaller = min(len(distinct[one]), len(distinct[other]))
        if count >= MIN_SHARE * smaller / 2:  # a hopeless cell is not multiplied by all who hold it
            for first in same[distinct[one]]:
                for second in same[distinct[other]]:
                    common[_ordered(first, second)] += count
    for prints, students in same.items():
        for first, second in combinations(students, 2):
            common[_ordered(first, second)] += len(prints)
    return common


def _ordered(one: str, other: str) -> tuple[str, str]:
    return (one, other) if one <= other else (other, one)


def _groups(pairs: Iterable[Alike]) -> list[Alike]:
    """Pairs that have a student in common become one group, told by its most alike pair."""
    ordered = sorted(pairs, key=lambda alike: (-alike.share, -alike.common, alike.pair))
    leader: dict[str, str] = {}

    def find(student: str) -> str:
        while leader.setdefault(student, student) != student:
            leader[student] = leader[leader[student]]
            student = leader[student]
        return student

    for alike in ordered:
        leader[find(alike.pair[1])] = find(alike.pair[0])
    members: dict[str, set[str]] = defaultdict(set)
    for student in list(leader):
        members[find(student)].add(student)
    seen: set[str] = set()
    groups = []
    for alike in ordered:
        root = find(alike.pair[0])
        if root not in seen:
            seen.add(root)
            groups.append(Alike(tuple(sorted(members[root])), alike.pair, alike.share, alike.common, alike.cells))
    return groups
