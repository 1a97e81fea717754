"""The course's own data sets: each is made by a script under data/, checked by its checksum, loaded with `datasets`."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from datasets import DatasetDict

CHECKSUMS = "SHA256SUMS"


def data_dir() -> Path:
    """The folder that holds one folder a data set.

    LECTUREKIT_DATA if it is set, else data/ in the checkout that this package lies in.
    Raises FileNotFoundError when it does not exist.
    """
    named = os.environ.get("LECTUREKIT_DATA")
    folder = Path(named).expanduser() if named else Path(__file__).resolve().parents[1] / "data"
    if not folder.is_dir():
        raise FileNotFoundError(f"found no data folder at {folder}; set LECTUREKIT_DATA to the course's data/ folder")
    return folder


def names() -> list[str]:
    """The data sets at hand, in alphabetical order."""
    return sorted(sums.parent.name for sums in data_dir().glob(f"*/{CHECKSUMS}"))


def load(name: str) -> DatasetDict:
    """Load a data set of the course by name, for example ``load("cafe_orders")["train"]``.

    Every file is compared with its SHA-256 in the data set's SHA256SUMS before a row of it is used, so that two people
    who quote a number have trained on the same bytes. Nothing is written to disk and no network is used.

    Raises ValueError for an unknown name and for a file that was altered, FileNotFoundError for one that is missing.
    """
    from datasets import Dataset, DatasetDict

    if not isinstance(name, str):
        raise TypeError(f"name must be a str, got {type(name).__name__}")
    if name not in names():
        raise ValueError(f"name must be one of {', '.join(names())}, got {name!r}")
    folder = data_dir() / name
    splits = {}
    for filename, checksum in checksums(name).items():
        rows = [json.loads(line) for line in _read(folder / filename, checksum).decode().splitlines()]
        splits[filename.removesuffix(".jsonl")] = Dataset.from_list(rows)
    return DatasetDict(splits)


def checksums(name: str) -> dict[str, str]:
    """File name → SHA-256 in hexadecimal, as the data set's SHA256SUMS lists them."""
    lines = (data_dir() / name / CHECKSUMS).read_text(encoding="utf-8").splitlines()
    return {filename: digest for digest, filename in (line.split() for line in lines)}


def _read(path: Path, checksum: str) -> bytes:
    again = f"run `python {path.parent / 'make.py'}` or take the file from the repository again"
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing; {again}")
    data = path.read_bytes()
    found = hashlib.sha256(data).hexdigest()
    if found != checksum:
        raise ValueError(f"{path} was altered: its SHA-256 is {found[:12]}…, expected {checksum[:12]}…; {again}")
    return data


def score_tickets(predicted: Sequence[str], wanted: Sequence[str]) -> dict[str, float]:
    """Score tickets of the café orders: the fraction exactly right, and the fraction of right fields.

    A ticket is ``name | items | place``. ``exact`` compares whole tickets, after stripping the ends; ``fields`` counts
    each of the three fields by itself, so a ticket with one wrong number still earns two thirds. A ticket that does
    not have three fields earns none.

    Raises ValueError when the two lists differ in length or are empty.
    """
    if len(predicted) != len(wanted) or not wanted:
        raise ValueError(
            f"predicted and wanted must be equally long and not empty, got {len(predicted)} and {len(wanted)}"
        )
    exact = fields = 0.0
    for guess, truth in zip(predicted, wanted, strict=True):
        exact += guess.strip() == truth.strip()
        got, right = ([part.strip() for part in ticket.split("|")] for ticket in (guess, truth))
        if len(got) == len(right):
            fields += sum(a == b for a, b in zip(got, right, strict=True)) / len(right)
    return {"exact": exact / len(wanted), "fields": fields / len(wanted)}
