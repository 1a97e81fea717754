"""Read what a student handed in, whatever it is: the cells of one notebook file, and a sentence for all that was wrong.

Nothing of a submission is followed out of its folder, is believed about its size, or can stop the batch. Of the
notebook come out its cells: type, source, attached pictures, and the ids by which `stage` knows them. Outputs, metadata
and every other file stay behind.
"""

from __future__ import annotations

import os
import re
import stat
from collections.abc import Collection, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any
from zoneinfo import ZoneInfo

from nbformat.v4 import new_notebook

from lecturekit.grading.reader import LIMITS, Limits, read_notebook, shown

TIMESTAMP = "timestamp.txt"
DATE = re.compile(
    r"(?P<moment>\d{4}-\d\d-\d\d[ T]\d\d:\d\d(:\d\d(\.\d{1,6})?)?) ?"
    r"((?P<offset>[+-]\d\d:?\d\d)|(?P<zone>[A-Za-z][A-Za-z0-9_+/-]*))?"
)


@dataclass(frozen=True)
class Submission:
    """What was handed in.

    notebook: an nbformat 4 notebook of plain data, with no cells when nothing could be read.   notes: for the student
    and for the instructor, a sentence for each thing that was dropped or wrong.   file: the name it was handed in
    under, "" when there was none.
    """

    notebook: Any
    notes: tuple[str, ...] = ()
    file: str = ""


class _NotHandedIn(Exception):
    """Why a file counts as not handed in."""


def read_submission(
    folder: Path,
    notebook: str,
    limits: Limits = LIMITS,
    *,
    grade_ids: frozenset[str] = frozenset(),
    others: Collection[str] = (),
) -> Submission:
    """Read `<notebook>.ipynb` of a submitted folder, …/<student>/<lab>.

    Where it is missing, one notebook of another name is taken: the one with most of `grade_ids` (the nbgrader ids of
    the release) in it, else the only one there is. others: names of the lab's other notebooks, never taken for it.
    Raises nothing because of what lies in the folder.
    """
    wanted = f"{notebook}.ipynb"
    notes: list[str] = []
    try:
        with _opened(folder) as opened:
            names = sorted(os.listdir(opened))
            found: Submission | None = None
            if wanted in names:
                try:
                    found = _read_file(opened, wanted, limits)
                except _NotHandedIn as why:
                    notes.append(f"{wanted} counts as not handed in: {why}.")
            if found is None:
                skip = {wanted, *(f"{name}.ipynb" for name in others)}
                named = [name for name in names if name not in skip and _is_notebook(name)]
                found = _other(opened, named, wanted, grade_ids, limits)
            notes += found.notes
            left = [name for name in names if name not in (wanted, found.file, TIMESTAMP)]
            if left:
                notes.append(_left_behind(left, limits))
            return Submission(found.notebook, tuple(notes), found.file)
    except _NotHandedIn as why:
        return Submission(new_notebook(), (f"Nothing was handed in: {why}.",))
    except OSError as error:
        return Submission(
            new_notebook(), (f"The submission could not be read: {error.strerror or type(error).__name__}.",)
        )


def read_timestamp(folder: Path) -> tuple[datetime | None, str]:
    """When the submission was handed in (UTC, without a time zone, as nbgrader has it), from its timestamp.txt.

    The note says what was wrong with it, "" for nothing. Returns None where there is no such file, or no date in it.
    """
    try:
        with _opened(folder) as opened:
            if TIMESTAMP not in os.listdir(opened):
                return None, ""
            text = _contents(opened, TIMESTAMP, limit=200).decode("ascii", "replace").strip()
    except _NotHandedIn as why:
        return None, f"{TIMESTAMP} was ignored: {why}."
    except OSError as error:
        return None, f"{TIMESTAMP} could not be read: {error.strerror or type(error).__name__}."
    return parse_timestamp(text)


def parse_timestamp(text: str) -> tuple[datetime | None, str]:
    """A date and time as nbgrader writes it, `2026-01-31 23:59:00.0 UTC`, or with another zone's name or offset."""
    expected = f"{TIMESTAMP} was ignored: it should hold a date like 2026-01-31 23:59:00 UTC."
    parts = DATE.fullmatch(text)
    if parts is None:
        return None, expected
    try:
        moment = datetime.fromisoformat(parts["moment"])
        zone, note = parts["zone"] or "UTC", ""
        if parts["offset"]:
            moment = datetime.fromisoformat(parts["moment"] + parts["offset"]).astimezone(UTC)
        elif zone.upper() not in ("UTC", "GMT", "Z"):
            try:
                # ZoneInfo, unlike dateutil, lets no name lead out of its folder of time zones
                moment = moment.replace(tzinfo=ZoneInfo(zone)).astimezone(UTC)
            except (KeyError, OSError):
                note = f"The time zone {shown(zone)} in {TIMESTAMP} is not known; UTC was taken."
        return moment.replace(tzinfo=None), note
    except (ValueError, OverflowError):
        return None, expected


# --- files ----------------------------------------------------------------------------------------------------------
@contextmanager
def _opened(folder: Path) -> Iterator[int]:
    """A descriptor of …/<student>/<lab>, neither of which may be a link. Raises _NotHandedIn."""
    path = Path(os.path.abspath(folder))
    descriptors: list[int] = []
    try:
        descriptors.append(os.open(path.parent.parent, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC))
        for part in (path.parent.name, path.name):
            try:
                info = os.stat(part, dir_fd=descriptors[-1], follow_symlinks=False)
                if not stat.S_ISDIR(info.st_mode):
                    raise _NotHandedIn(f"{shown(part)} is {_kind(info)}, not a folder")
                flags = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
                descriptors.append(os.open(part, flags, dir_fd=descriptors[-1]))
            except FileNotFoundError:
                raise _NotHandedIn("there is no folder for it") from None
        yield descriptors[-1]
    except FileNotFoundError:
        raise _NotHandedIn("there is no folder for it") from None
    finally:
        for descriptor in descriptors:
            os.close(descriptor)


def _contents(folder: int, name: str, limit: int) -> bytes:
    """The bytes of a regular file in an open folder. Raises _NotHandedIn for anything else, or over the limit."""
    try:
        # looked at before it is opened: opening a device can already do something
        _check(folder, os.stat(name, dir_fd=folder, follow_symlinks=False), limit)
        # NONBLOCK: if a fifo took its place since then, opening it must not wait for a writer
        flags = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC
        with os.fdopen(os.open(name, flags, dir_fd=folder), "rb") as file:
            info = os.fstat(file.fileno())
            _check(folder, info, limit)
            return file.read(info.st_size)
    except FileNotFoundError:
        raise _NotHandedIn("it is missing") from None
    except OSError as error:
        raise _NotHandedIn(f"it could not be read ({error.strerror or type(error).__name__})") from None


def _check(folder: int, info: os.stat_result, limit: int) -> None:
    if not stat.S_ISREG(info.st_mode):
        raise _NotHandedIn(f"it is {_kind(info)}, not a file")
    if info.st_nlink > 1 and info.st_uid != os.fstat(folder).st_uid:
        raise _NotHandedIn("it is a hard link to somebody else's file")
    if info.st_size > limit:
        raise _NotHandedIn(f"it has {info.st_size / 1e6:.1f} MB and at most {limit / 1e6:.1f} MB are read")


def _kind(info: os.stat_result) -> str:
    kinds = {
        stat.S_IFLNK: "a link",
        stat.S_IFDIR: "a folder",
        stat.S_IFIFO: "a pipe",
        stat.S_IFSOCK: "a socket",
        stat.S_IFREG: "a file",
    }
    return kinds.get(stat.S_IFMT(info.st_mode), "a device")


def _is_notebook(name: str) -> bool:
    return name.lower().endswith(".ipynb") and not name.startswith(".")


def _left_behind(names: list[str], limits: Limits) -> str:
    first = ", ".join(shown(name) for name in names[: limits.listed])
    rest = f" and {len(names) - limits.listed} more" if len(names) > limits.listed else ""
    return f"Other files in the folder were not used: {first}{rest}."


def _read_file(folder: int, name: str, limits: Limits) -> Submission:
    notebook, notes = read_notebook(_contents(folder, name, limits.file_bytes), limits)
    return Submission(notebook, tuple(notes), name)


def _other(folder: int, names: list[str], wanted: str, grade_ids: frozenset[str], limits: Limits) -> Submission:
    """The notebook that was handed in under another name, or an empty one."""
    read_ones: list[tuple[int, Submission]] = []
    for name in names[: limits.candidates]:
        with suppress(_NotHandedIn):
            submission = _read_file(folder, name, limits)
            read_ones.append((len(grade_ids & _grade_ids(submission.notebook)), submission))
    best = max((count for count, _ in read_ones), default=0)
    chosen = [submission for count, submission in read_ones if count == best]
    if len(chosen) == 1:
        note = f"{wanted} was handed in as {shown(chosen[0].file)}."
        return Submission(chosen[0].notebook, (note, *chosen[0].notes), chosen[0].file)
    if chosen:
        choice = ", ".join(shown(submission.file) for submission in chosen[: limits.listed])
        return Submission(
            new_notebook(), (f"{wanted} is missing, and it is not clear which of {choice} stands for it.",)
        )
    return Submission(new_notebook(), (f"{wanted} was not handed in.",))


def _grade_ids(notebook: Any) -> set[str]:
    return {cell.metadata["nbgrader"]["grade_id"] for cell in notebook.cells if "nbgrader" in cell.metadata}
