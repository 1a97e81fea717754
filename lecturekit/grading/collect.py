"""From what an instructor downloads to `submitted/<student>/<lab>/<notebook>.ipynb`, as nbgrader expects it.

Read are Canvas's and Moodle's downloads, nbgrader's own layout, and plain folders or zips with one notebook, folder or
zip a student. Who handed a file in is told by the outermost name only, which the student does not choose; what stands
in a student's own zip can never claim to be somebody else's.

Student ids, where no roster says otherwise:

| download | name in it                                              | id                        |
|----------|---------------------------------------------------------|---------------------------|
| Canvas   | leeann_LATE_1234_56789_lab05_lora-1.ipynb               | leeann_1234               |
| Moodle   | Ann Lee_4321_assignsubmission_file_/lab05_lora.ipynb    | Ann_Lee_4321              |
| others   | ann.ipynb, ann.zip, ann/lab05_lora.ipynb                | ann                       |

Canvas's number belongs to the person. Moodle's belongs to the person in that one assignment: it takes a roster to bring
several labs together. Neither tells in the zip when something was handed in; a timestamp.txt comes along where there is
one, and a file's date only decides which of two attempts is the newer.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from lecturekit.grading.intake import TIMESTAMP, parse_timestamp
from lecturekit.grading.reader import shown
from lecturekit.grading.unpack import CAPS, COLLECTING, Caps, Download, Entry, Refused
from lecturekit.runtime import atomic_write, file_mode

COLLECTED, UNCHANGED, REPLACED, SKIPPED = "collected", "unchanged", "replaced", "skipped"
CANVAS = re.compile(
    r"(?P<name>[^_]+)_(?P<late>LATE_)?(?P<id>\d+|(?<=anon_)[A-Za-z0-9]+|(?<=anon_LATE_)[A-Za-z0-9]+)_"
    r"(?P<attempt>\d{1,30})_(?P<rest>.+)"
)
MOODLE = re.compile(r"(?P<name>.+?)_(?P<id>\d+)_assignsubmission_[a-z]+_?(?P<rest>.*)")
RESERVED = re.compile(r"(con|prn|aux|nul|com\d|lpt\d)(\..*)?", re.IGNORECASE)  # names that Windows keeps for devices
LENGTH = 60  # characters of a student id


@dataclass(frozen=True)
class Collected:
    """What became of one file. what: collected · unchanged · replaced · skipped.   why: for people, "" for nothing."""

    file: str
    what: str
    student: str = ""
    notebook: str = ""
    why: str = ""


@dataclass(frozen=True)
class _Found:
    """A file of a download with whom it belongs to. names: what the roster may know the student by, best first."""

    entry: Entry
    names: tuple[str, ...]
    file: str  # the name the student gave it
    attempt: int = -1  # larger is newer; -1 where the download has no number for it
    late: bool = False


def collect(
    source: Path,
    lab: str,
    submitted: Path,
    roster: Mapping[str, str] | None = None,
    *,
    notebooks: Sequence[str] = (),
    caps: Caps = CAPS,
) -> list[Collected]:
    """Collect the submissions of a lab from a download into the folder `submitted`. Returns what became of each file.

    roster: the download's name for a student → student id; looked up are the whole name (`leeann_1234`,
    `Ann Lee_4321`), the number alone, then the name alone. notebooks: the lab's notebooks, by default one named like
    the lab. Of several attempts the newest is taken. Collecting again changes nothing, and what is older than what was
    collected before is left out. What was taken when is noted in `collected/<lab>/` beside `submitted`.

    Raises FileNotFoundError or ValueError for a source that is none, ValueError for a student id in the roster that
    cannot be a folder's name.
    """
    for name, student in (roster or {}).items():
        if safe_id(student) != student:
            raise ValueError(
                f"the roster gives {name!r} the id {student!r}: an id holds letters, digits and . _ - @ +, at most "
                f"{LENGTH}, and begins with a letter or digit; {safe_id(student)!r} would do"
            )
    notebooks = tuple(notebooks) or (lab,)
    with Download(Path(source), caps) as download:
        results = [Collected(_label(path), SKIPPED, why=why) for path, why in download.refused]
        found, times = _owners(download, lab, notebooks, results)
        groups = _grouped(found, roster or {}, notebooks, results)
        for (student, notebook), attempts in sorted(groups.items()):
            taken = ""
            for one in reversed(attempts):
                if taken:
                    what, why = SKIPPED, f"an older attempt: {taken} counts"
                else:
                    stamp = times.get(one.entry.path[:-1], "") if not one.entry.inner else ""
                    try:
                        what, why = _place(download, one, stamp, submitted, student, lab, notebook)
                        taken = _label((*one.entry.path, *one.entry.inner))
                    except Refused as refused:  # the attempt before it may be readable
                        what, why = SKIPPED, str(refused)
                    except OSError as error:
                        what, why = SKIPPED, f"it could not be written ({error.strerror or type(error).__name__})"
                results.append(_result(one, what, student, notebook, why))
    return results


def safe_id(name: str) -> str:
    """A student id from a name somebody else chose: one folder's name that no glob, shell or other system trips on.

    Spaces become _; anything else that is not a letter, digit or one of . _ - @ + is dropped for a few digits that
    depend on the whole name, so that two names never become one id that way.
    """
    text = re.sub(r"\s+", "_", name.strip())
    kept = re.sub(r"[^\w.@+-]|^[^\w]+|[.]+$", "", text)[:LENGTH]
    if kept != text or not kept[:1].isalnum() or RESERVED.fullmatch(kept):
        digits = hashlib.sha256(name.encode("utf-8", "replace")).hexdigest()[:6]
        kept = f"{kept.lstrip('_')[: LENGTH - 15] or 'student'}-{digits}"
        if RESERVED.fullmatch(kept):
            kept = f"student-{digits}"
    return kept


# --- whose it is ----------------------------------------------------------------------------------------------------
def _owners(
    download: Download, lab: str, notebooks: Sequence[str], results: list[Collected]
) -> tuple[list[_Found], dict[tuple[str, ...], str]]:
    """The notebooks of a download with their owners, and {folder: what the timestamp.txt in it holds}."""
    depth = _depth([entry.path for entry in download.entries], lab, notebooks)
    ours = {entry.path for entry in download.entries if len(entry.path) > depth + 2 and entry.path[depth + 1] == lab}
    found: list[_Found] = []
    times: dict[tuple[str, ...], str] = {}
    for entry in download.entries:
        why = ""
        lms = _from_lms(entry.path[depth]) is not None
        if ours and not lms and len(entry.path) > depth + 2 and entry.path not in ours:
            why = "it is of another lab"
        elif entry.name == TIMESTAMP and (lms or entry.inner or entry.path not in ours):
            why = "a student may have written it: only nbgrader's own layout tells the time"
        elif entry.name == TIMESTAMP:
            try:
                moment, why = parse_timestamp(download.text(entry, 200).strip())
                times |= {entry.path[:-1]: f"{moment:%Y-%m-%d %H:%M:%S.%f} UTC"} if moment else {}
            except Refused as refused:
                why = str(refused)
        elif not entry.name.lower().endswith(".ipynb"):
            why = "it is not a notebook"
        elif (owner := _owner(entry, depth, lab, notebooks)) is None:
            why = "no student can be told from its name"
        else:
            found.append(owner)
        if why:
            results.append(Collected(_label((*entry.path, *entry.inner)), SKIPPED, why=why))
    return found, times


def _depth(paths: Sequence[tuple[str, ...]], lab: str, notebooks: Sequence[str]) -> int:
    """1 where everything lies in one folder around the submissions, else 0."""
    if not paths or any(len(path) < 2 or path[0] != paths[0][0] for path in paths) or _from_lms(paths[0][0]):
        return 0
    below = [path[1:] for path in paths]
    if sum(path[-1].lower().endswith((".ipynb", ".zip")) for path in paths) < 2 and len(below[0]) == 1:
        return 0  # ann/final.ipynb and no other: the folder tells more than the file
    students_folder = any(path[0] == lab or (len(path) == 1 and _notebook(path[0], notebooks)) for path in below)
    return 0 if students_folder else 1


def _from_lms(part: str) -> re.Match[str] | None:
    return MOODLE.fullmatch(part) or CANVAS.fullmatch(part)


def _owner(entry: Entry, depth: int, lab: str, notebooks: Sequence[str]) -> _Found | None:
    path = entry.path[depth:]
    first = path[0]
    if parts := _from_lms(first):
        groups = parts.groupdict()
        names = (f"{groups['name']}_{groups['id']}", groups["id"], groups["name"])
        file = groups["rest"] if len(path) == 1 and not entry.inner else entry.name
        return _Found(entry, names, file, int(groups.get("attempt") or -1), bool(groups.get("late")))
    if first == lab and len(path) > 1:  # lab05_lora/ann.ipynb
        path = path[1:]
    if len(path) > 1:  # ann/lab05_lora.ipynb, ann/lab05_lora/lab05_lora.ipynb
        return _Found(entry, (path[0],), entry.name)
    if _notebook(path[0], notebooks):
        return None
    return _Found(entry, (Path(path[0]).stem,), entry.name if entry.inner else "")  # ann.zip, ann.ipynb


def _notebook(file: str, notebooks: Sequence[str]) -> str | None:
    """Which notebook of the lab a file's name stands for: its own name, or the longest it begins with (`lab(1)`)."""
    stem = re.sub(r"\.ipynb$", "", file, flags=re.IGNORECASE).lower()
    names = [name for name in notebooks if stem.startswith(name.lower())]
    return max(names, key=len, default=None)


def _grouped(
    found: Sequence[_Found], roster: Mapping[str, str], notebooks: Sequence[str], results: list[Collected]
) -> dict[tuple[str, str], list[_Found]]:
    """(student id, notebook) → its attempts, the newest last."""
    ids = {one.names: _student(one.names, roster) for one in found}
    alike: dict[str, set[str]] = {}  # two students must not share an id, nor a folder on a disk that ignores case
    for names, student in ids.items():
        if not any(name in roster for name in names):
            alike.setdefault(student.casefold(), set()).add(names[0])
    groups: dict[tuple[str, str], list[_Found]] = {}
    for one in found:
        student = ids[one.names]
        others = alike.get(student.casefold(), set()) - {one.names[0]}
        # a file without a name of its own is the notebook, if the lab has only one
        notebook = _notebook(one.file, notebooks) or (notebooks[0] if len(notebooks) == 1 else None)
        if others and one.names[0] in alike[student.casefold()]:
            why = f"{', '.join(sorted(map(shown, others)))} would get the same student id: tell them apart in a roster"
            results.append(_result(one, SKIPPED, student, "", why))
        elif notebook is None:
            results.append(_result(one, SKIPPED, student, "", f"it is none of {', '.join(notebooks)}"))
        else:
            groups.setdefault((student, notebook), []).append(one)
    for (_, notebook), attempts in groups.items():
        # a file called like the notebook goes before any other that came with it
        attempts.sort(key=lambda one: (_notebook(one.file, [notebook]) is not None, one.attempt, one.entry.when))
    return groups


def _student(names: Sequence[str], roster: Mapping[str, str]) -> str:
    return next((roster[name] for name in names if name in roster), safe_id(names[0]))


# --- putting it there -----------------------------------------------------------------------------------------------
def _place(
    download: Download, one: _Found, stamp: str, submitted: Path, student: str, lab: str, notebook: str
) -> tuple[str, str]:
    """Put one notebook where nbgrader looks for it. Returns what became of it and why.

    Raises Refused when it cannot be read, OSError when it cannot be written.
    """
    folder = submitted / student / lab
    for part in (folder.parent, folder):
        if part.is_symlink():
            return SKIPPED, f"{part.relative_to(submitted)} is a link"
    folder.mkdir(parents=True, exist_ok=True)
    target, record = folder / f"{notebook}.ipynb", submitted.parent / "collected" / lab / f"{student}.{notebook}.json"
    for left in folder.glob(f"{COLLECTING}*"):  # by a run that was killed
        left.unlink()
    before = _recorded(record)
    now = {"attempt": one.attempt, "when": one.entry.when, "timestamp": stamp}
    there = _digest(target)
    copy, digest = download.copy(one.entry, folder)
    try:
        if there is not None and digest != there and _older(now, before):
            return SKIPPED, "it is older than what was collected before; to take it, delete that first"
        stamps = folder / TIMESTAMP
        same_time = stamps.read_text() == stamp if stamps.is_file() else not stamp
        if digest != there:
            os.chmod(copy, file_mode())
            os.replace(copy, target)
    finally:
        copy.unlink(missing_ok=True)
    if not same_time:
        atomic_write(stamps, stamp) if stamp else stamps.unlink()
    if before != now:
        atomic_write(record, json.dumps(now) + "\n")  # last: after a crash the files are looked at again
    why = [f"handed in as {shown(one.file)}"] if one.file not in ("", f"{notebook}.ipynb") else []
    why += ["late, says Canvas"] if one.late else []
    what = COLLECTED if there is None else UNCHANGED if digest == there and same_time else REPLACED
    return what, ", ".join(why)


def _older(now: Mapping[str, object], before: Mapping[str, object]) -> bool:
    """Whether an attempt is older than the one before, by the first thing that both tell about themselves."""
    for key, nothing in (("timestamp", ""), ("attempt", -1), ("when", "")):
        new, old = now[key], before.get(key, nothing)
        if nothing not in (new, old) and type(new) is type(old):
            return str(new).zfill(40) < str(old).zfill(40)
    return False


def _recorded(record: Path) -> dict[str, object]:
    try:
        value = json.loads(record.read_text())
    except (OSError, ValueError):
        return {}
    return value if isinstance(value, dict) else {}


def _digest(path: Path) -> str | None:
    """The SHA-256 of a file, None where there is no regular file."""
    if path.is_symlink() or not path.is_file():
        return None
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _result(one: _Found, what: str, student: str, notebook: str, why: str) -> Collected:
    return Collected(_label((*one.entry.path, *one.entry.inner)), what, student, notebook, why)


def _label(path: Sequence[str]) -> str:
    return "/".join(shown(part, 100) for part in path)
