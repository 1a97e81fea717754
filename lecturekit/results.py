"""The results ledger: what a lab measured, kept beside what the paper says.

A lab calls `record(...)` for each number and ends with `table("lab05_lora")`. Nothing is written to disk unless
recording is on (``make labs-full`` sets LECTUREKIT_RECORD=1); then every entry goes to docs/results/<lab>.json with
the machine, the date and the commit, and `lecturekit.results_page` renders docs/results.md from those files.
"""

from __future__ import annotations

import json
import math
import os
import platform
import re
import statistics
import subprocess
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from html import escape
from pathlib import Path
from typing import Any

from lecturekit.claims import CLAIMS
from lecturekit.runtime import atomic_write, profile

Value = int | float | str
Spread = float | tuple[float, float]
Entry = dict[str, Any]

_memory: dict[str, dict[tuple[str, str], Entry]] = {}
_LAB = re.compile(r"[a-z][a-z0-9_]*")


def record(
    claim: str,
    quantity: str,
    paper: Value | None,
    ours: Value,
    unit: str = "",
    spread: Spread | None = None,
    seeds: int | Sequence[int] | None = None,
    note: str = "",
    lab: str | None = None,
    holds: bool | None = None,
) -> Entry:
    """Keep one measurement for the table, and on disk while recording is on.

    claim: "C01" to "C40". quantity: what was measured, in words; measured again it replaces the earlier entry.
    paper: the paper's figure, None where it prints none. ours: a finite number in `unit`; without seeds also a text.
    spread: one number (standard deviation over seeds) or (low, high), in the same unit. seeds: how many, or which.
    note: what a reader must know, above all when the effect does not show. lab: default LECTUREKIT_LAB.
    holds: True or False where the effect was looked for and was or was not found; None where that is no question.

    Returns the entry. Raises ValueError or TypeError for a wrong argument, and ValueError when recording is on in the
    smoke profile, whose few steps are no measurement.
    """
    if claim not in CLAIMS:
        raise ValueError(f"claim must be one of {min(CLAIMS)} to {max(CLAIMS)}, got {claim!r}")
    if not isinstance(quantity, str) or not quantity.strip():
        raise ValueError(f"quantity must say in words what was measured, got {quantity!r}")
    if holds is not None and not isinstance(holds, bool):
        raise TypeError(f"holds must be True, False or None, got {type(holds).__name__}")
    lab = lab or os.environ.get("LECTUREKIT_LAB")
    if not lab or not _LAB.fullmatch(lab):
        raise ValueError(f"lab must be a lab's name such as 'lab05_lora', got {lab!r}")
    entry: Entry = {
        "claim": claim,
        "quantity": quantity.strip(),
        "paper": None if paper is None else _value("paper", paper),
        "ours": _value("ours", ours) if seeds is None else _number("ours", ours),  # runs are combined by their median
        "unit": unit,
        "spread": _spread(spread),
        "seeds": _seeds(seeds),
        "holds": holds,
        "note": note.strip(),
        "profile": profile(),
    }
    if recording():
        if entry["profile"] != "full":
            raise ValueError("the smoke profile is no measurement: set LECTUREKIT_PROFILE=full to record")
        _write(lab, entry)
    _memory.setdefault(lab, {})[claim, entry["quantity"]] = entry
    return entry


def recording() -> bool:
    """Whether measurements are written to disk: LECTUREKIT_RECORD=1, which `lecturekit labs-full` sets."""
    return os.environ.get("LECTUREKIT_RECORD") == "1"


def results_dir() -> Path:
    """Where entries are kept: LECTUREKIT_RESULTS, or docs/results of the checkout this package lies in."""
    named = os.environ.get("LECTUREKIT_RESULTS")
    return Path(named) if named else Path(__file__).resolve().parents[1] / "docs" / "results"


def _value(name: str, value: object) -> Value:
    """A plain finite number or a short text; NumPy and torch scalars become Python's own."""
    if hasattr(value, "item") and not isinstance(value, str):
        value = value.item()
    if isinstance(value, bool) or not isinstance(value, (int, float, str)):
        raise TypeError(f"{name} must be a number or a text, got {type(value).__name__}")
    if isinstance(value, float) and not math.isfinite(value):
        raise ValueError(f"{name} must be finite, got {value}")
    if isinstance(value, str) and not value.strip():
        raise ValueError(f"{name} must not be an empty text")
    return value


def _spread(spread: object) -> float | list[float] | None:
    if spread is None:
        return None
    if isinstance(spread, (tuple, list)):
        if len(spread) != 2:
            raise ValueError(f"spread must be one number or (low, high), got {len(spread)} numbers")
        low, high = (_number("spread", end) for end in spread)
        if low > high:
            raise ValueError(f"spread must be (low, high) with low <= high, got ({low}, {high})")
        return [low, high]
    width = _number("spread", spread)
    if width < 0:
        raise ValueError(f"spread must not be negative, got {width}")
    return width


def _number(name: str, value: object) -> float:
    number = _value(name, value)
    if isinstance(number, str):
        raise TypeError(f"{name} must be a number, got {number!r}")
    return float(number)


def _seeds(seeds: int | Sequence[int] | None) -> int | None:
    """How many seeds: given as a count or as the seeds themselves."""
    if seeds is None:
        return None
    count = seeds if isinstance(seeds, int) else len(seeds)
    if isinstance(seeds, bool) or count < 1:
        raise ValueError(f"seeds must be a count of at least 1 or the seeds themselves, got {seeds!r}")
    return count


def machine() -> dict[str, Any]:
    """The machine in the words a reader needs to judge a timing: no host name, no user, no path."""
    import torch

    model = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        named = re.search(r"^model name\s*:\s*(.+)$", cpuinfo.read_text(), re.MULTILINE)
        model = named.group(1).strip() if named else model
    found: dict[str, Any] = {
        "cpu": model,
        "cores": os.cpu_count(),
        "torch": torch.__version__,
    }
    if hasattr(os, "sysconf") and "SC_PHYS_PAGES" in os.sysconf_names:
        found["ram_gib"] = round(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 2**30, 1)
    if torch.cuda.is_available():
        found["gpu"] = torch.cuda.get_device_name()
    return found


def _commit() -> str | None:
    """The checked-out commit, with "+changes" if tracked files differ from it; None outside a git checkout."""
    root = Path(__file__).resolve().parents[1]

    def git(*words: str) -> str:
        return subprocess.run(["git", *words], cwd=root, check=True, capture_output=True, text=True).stdout.strip()

    try:
        head = git("rev-parse", "--short=12", "HEAD")
        # the results themselves change while a run records, and say nothing about the code that measured
        changed = git(
            "status",
            "--porcelain",
            "--untracked-files=no",
            "--",
            ".",
            ":!docs/results",
            ":!docs/results.md",
        )
    except (OSError, subprocess.CalledProcessError):
        return None
    return f"{head}+changes" if changed else head


def _write(lab: str, entry: Entry) -> None:
    path = results_dir() / f"{lab}.json"
    entries = read(path) if path.exists() else []
    key = (entry["claim"], entry["quantity"])
    stamped = entry | {
        "date": datetime.now(UTC).date().isoformat(),
        "commit": _commit(),
        "machine": machine(),
    }
    kept = [old for old in entries if (old["claim"], old["quantity"]) != key] + [stamped]
    kept.sort(key=lambda item: item["claim"])  # stable: a claim's quantities stay in the order they were measured
    write(path, kept)


def combine(runs: Sequence[Sequence[Entry]]) -> list[Entry]:
    """One list of entries from the runs of a lab under several seeds.

    What was recorded with ``seeds`` becomes the median of the runs, with the lowest and the highest as its spread, and
    holds only if it held in every run. What does not depend on the seed is taken from the first run.
    Raises ValueError when the runs did not measure the same quantities, or recorded a text under ``seeds``.
    """
    by_key = [{(entry["claim"], entry["quantity"]): entry for entry in run} for run in runs]
    if any(run.keys() != by_key[0].keys() for run in by_key):
        raise ValueError("the runs did not measure the same quantities: run them again from one version of the lab")
    combined = []
    for key, first in by_key[0].items():
        found = [run[key] for run in by_key]
        if not first["seeds"] or len(runs) == 1:
            combined.append(first)
            continue
        values = [_number(f"ours of {key[1]!r}", entry["ours"]) for entry in found]
        judged = [entry["holds"] for entry in found]
        combined.append(
            first
            | {
                "ours": statistics.median(values),
                "spread": [min(values), max(values)],
                "seeds": len(values),
                "holds": None if None in judged else all(judged),
                "note": "; ".join(filter(None, ["median and range", first["note"]])),
            }
        )
    return combined


def write(path: Path, entries: Sequence[Entry]) -> Path:
    """Write a results file, named <lab>.json, whole."""
    text = json.dumps({"lab": path.stem, "entries": list(entries)}, indent=1, ensure_ascii=False)
    return atomic_write(path, text + "\n")


def read(path: Path) -> list[Entry]:
    """The entries of one results file. Raises ValueError, naming the file, when it is not a results file."""
    try:
        entries = json.loads(path.read_text())["entries"]
        for entry in entries:
            if entry["claim"] not in CLAIMS or "quantity" not in entry or "ours" not in entry:
                raise KeyError("claim")
    except (json.JSONDecodeError, KeyError, TypeError) as error:
        raise ValueError(f"{path.name} is not a results file: delete it and run `lecturekit labs-full`") from error
    return entries


def figure(value: Value | None, unit: str = "") -> str:
    """A value as a reader wants it: four significant figures, thousands separated, its unit behind."""
    if value is None:
        return "–"
    if isinstance(value, str):
        return value
    if isinstance(value, int) or (float(value).is_integer() and abs(value) < 1e15):
        text = f"{int(value):,}"
    elif abs(value) >= 1e4:
        text = f"{value:,.0f}"
    else:
        text = f"{value:.4g}"
    return f"{text} {unit}".strip()


def ours_with_spread(entry: Mapping[str, Any]) -> str:
    """Our value, its spread, and over how many seeds: "0.81 ± 0.02 (5 seeds)"."""
    spread, unit = entry["spread"], entry["unit"]
    text = figure(entry["ours"], "" if isinstance(spread, (int, float)) else unit)
    if isinstance(spread, (list, tuple)):
        text += f" ({figure(spread[0])} to {figure(spread[1])})"
    elif spread is not None:
        text += f" ± {figure(spread, unit)}"
    if entry["seeds"]:
        text += f" ({entry['seeds']} {'seed' if entry['seeds'] == 1 else 'seeds'})"
    return text


def verdict(entry: Mapping[str, Any]) -> str:
    """Whether the effect shows, in one word."""
    return {True: "yes", False: "no", None: "–"}[entry.get("holds")]


class Table:
    """ "paper | you" for one lab: an HTML table in JupyterLab, aligned text everywhere else."""

    HEADER = ("claim", "quantity", "paper", "you", "shows?", "note")

    def __init__(self, lab: str, entries: Sequence[Entry]):
        self.lab = lab
        self.entries = list(entries)

    @property
    def caption(self) -> str:
        if not self.entries:
            return f"{self.lab}: nothing measured yet. Run the cells above."
        smoke = any(entry["profile"] == "smoke" for entry in self.entries)
        return f"{self.lab}: the paper and you" + (" (smoke profile: too short to be a measurement)" if smoke else "")

    def rows(self) -> list[tuple[str, ...]]:
        """One tuple of texts an entry, in the order of HEADER."""
        return [
            (
                entry["claim"],
                entry["quantity"],
                figure(entry["paper"], entry["unit"]),
                ours_with_spread(entry),
                verdict(entry),
                entry["note"],
            )
            for entry in self.entries
        ]

    def __repr__(self) -> str:
        if not self.entries:
            return self.caption
        lines = [self.HEADER, *self.rows()]
        widths = [max(len(line[column]) for line in lines) for column in range(len(self.HEADER))]
        texts = ["  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)) for line in lines]
        texts.insert(1, "  ".join("-" * width for width in widths))
        return "\n".join([self.caption, *(text.rstrip() for text in texts)])

    def _repr_html_(self) -> str:
        if not self.entries:
            return f"<p>{escape(self.caption)}</p>"
        head = "".join(f'<th scope="col" style="text-align:left">{escape(title)}</th>' for title in self.HEADER)
        body = ""
        for claim, *cells in self.rows():
            title = escape(CLAIMS[claim].text, quote=True)
            body += f'<tr><th scope="row" title="{title}">{claim}</th>'
            body += "".join(f'<td style="text-align:left">{escape(cell)}</td>' for cell in cells) + "</tr>"
        return (
            f"<table><caption>{escape(self.caption)}</caption>"
            f"<thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"
        )

    def _repr_mimebundle_(self, include: object = None, exclude: object = None) -> dict[str, str]:
        return {"text/html": self._repr_html_(), "text/plain": repr(self)}


def table(lab: str | None = None) -> Table:
    """What this session measured for a lab (default LECTUREKIT_LAB, or the only lab that measured anything)."""
    lab = lab or os.environ.get("LECTUREKIT_LAB") or (next(iter(_memory)) if len(_memory) == 1 else None)
    if lab is None:
        raise ValueError(f"lab must be named, for example table('lab05_lora'); measured so far: {sorted(_memory)}")
    return Table(lab, list(_memory.get(lab, {}).values()))


def show(lab: str | None = None) -> None:
    """Display `table(lab)` from the middle of a cell."""
    from IPython.display import display

    display(table(lab))
