"""From the bytes of a notebook file to its cells: what a student wrote, and nothing else that the file holds.

Left out on purpose: outputs (they are made again), metadata (the release's counts), notebook-level widgets and kernels.
A file that breaks off, was merged badly or was saved in another encoding gives the cells that can be read.
"""

from __future__ import annotations

import re
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

import nbformat
from nbformat.v4 import new_notebook

from lecturekit.grading.scan import JSON, BrokenJSON


@dataclass(frozen=True)
class Limits:
    """What is read of one submission, so that no file costs the grader its memory or its day."""

    file_bytes: int = 512 * 2**20
    cells: int = 2000
    cell_characters: int = 200_000  # of source, in one cell
    characters: int = 2_000_000  # of source, in all cells together
    attachment_bytes: int = 2_000_000  # in one cell
    attachments_bytes: int = 20_000_000  # in all cells together
    candidates: int = 20  # notebooks of another name that are looked at
    listed: int = 5  # names told in one note


LIMITS = Limits()
TYPES = ("code", "markdown", "raw")
CELL_START = re.compile(rb'\{\s*+"(?:cell_type|attachments|id|execution_count)"\s*+:')
RESUMED = 20  # times that reading goes on after a broken place; each may cost a walk through the file
UTF16_BYTES = 64 * 2**20  # such a file is held three times while it is brought to UTF-8
ESCAPED = 12  # bytes a character can take in JSON, as two \\uXXXX
ID = re.compile(r"[A-Za-z0-9_-]{1,64}")  # nbformat's rule for cell ids


def shown(name: str, length: int = 60) -> str:
    """A name somebody else chose, fit for a note: printable, without markup or direction marks, and short."""
    text = "".join(
        char if (char.isalnum() and char.isprintable()) or char in " ._-()+,=@~" else f"\\x{ord(char):02x}"
        for char in name[: length + 1]
    )
    return text if len(text) <= length else text[: length - 1] + "…"


def read_notebook(data: bytes, limits: Limits = LIMITS) -> tuple[Any, list[str]]:
    """The notebook in the bytes of a file, and a sentence for all that was dropped or wrong. Raises nothing.

    The notebook is nbformat 4, of plain data; each cell has a source (one string), at most the id and the nbgrader id
    it was known by, and for text the attachments. It has no cells when none can be read.
    """
    reading = _Reading(JSON(_utf8(data)), limits)
    reading.run()
    notebook = new_notebook()
    notebook.cells = [nbformat.from_dict(cell) for cell in reading.cells]
    return notebook, reading.told()


@dataclass
class _Reading:
    """One notebook file while it is read. problems: what is wrong → the cells it is wrong with."""

    json: JSON
    limits: Limits
    cells: list[dict[str, Any]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    problems: dict[str, list[str]] = field(default_factory=dict)
    characters: int = 0
    attached: int = 0
    number: int = 0  # of the cell being read, from 1; cells that are dropped count too
    damaged: bool = False

    def run(self) -> None:
        start = self.json.skip_space(0)
        if start == len(self.json.data):
            self.notes.append("The notebook file is empty.")
            return
        lists = 0
        try:
            for key, value in self.json.members(start):
                if key == "nbformat":
                    self._version(value)
                elif key in ("cells", "worksheets") and self.json.begins(value, b"["):
                    lists += 1
                    before, self.cells = self.cells, []
                    self.number, self.characters, self.attached = 0, 0, 0
                    self._old_cells(value) if key == "worksheets" else self._cells(value)
                    if before and self.cells:
                        self.notes.append("The notebook holds two lists of cells; the last one counts.")
                    self.cells = self.cells or before
                if self.damaged or lists == 2:
                    break
        except BrokenJSON as broken:
            if not lists:
                self.notes.append(f"The notebook file is not readable: it stops being JSON at byte {broken.position}.")
            return
        if not lists:
            self.notes.append("The file is not a notebook: it has no list of cells.")

    def told(self) -> list[str]:
        """All notes, those about cells together, one sentence for each thing that was wrong."""
        listed = self.limits.listed
        for problem, cells in self.problems.items():
            more = f" and {len(cells) - listed} more" if len(cells) > listed else ""
            self.notes.append(f"{problem}: {', '.join(cells[:listed])}{more}.")
        return self.notes

    def _problem(self, problem: str, cell: str) -> None:
        cells = self.problems.setdefault(problem, [])
        if cell not in cells:
            cells.append(cell)

    def _version(self, value: int) -> None:
        end = self.json.end_of(value)
        version = self.json.read(value, end) if end - value < 10 else None
        if isinstance(version, int) and version > nbformat.current_nbformat:
            self.notes.append(
                f"The notebook is of format {version}, newer than this grader knows; its cells were read."
            )

    def _cells(self, start: int, old: bool = False) -> None:
        """Read a list of cells; after a broken place go on with the next thing that begins like a cell."""
        for attempt in range(RESUMED):
            try:
                for position in self.json.elements(start, inside=attempt > 0):
                    if self.number >= self.limits.cells:
                        self.notes.append(f"Only the first {self.limits.cells} cells were read.")
                        return
                    self.number += 1
                    self._cell(position, old)
                return
            except BrokenJSON as broken:
                if not self.damaged:
                    self.damaged = True
                    self.notes.append(
                        f"The notebook file is damaged after cell {self.number} (byte {broken.position}); "
                        "what could be read was kept."
                    )
                again = CELL_START.search(self.json.data, broken.position)
                if again is None:
                    return
                start = again.start()

    def _old_cells(self, start: int) -> None:
        """The cells of format 3 and before, which lie in work sheets, brought up to format 4."""
        with suppress(BrokenJSON):  # what was read until then is brought up to date all the same
            for sheet in self.json.elements(start):
                for key, value in self.json.members(sheet):
                    if key == "cells" and not self.damaged:
                        self._cells(value, old=True)
        notebook = nbformat.from_dict(
            {"metadata": {}, "nbformat": 3, "nbformat_minor": 0, "worksheets": [{"cells": self.cells, "metadata": {}}]}
        )
        names = ("cell_type", "source", "metadata")
        self.cells = [
            {name: cell[name] for name in names} | {"id": f"handed-in-{number}"}
            for number, cell in enumerate(nbformat.convert(notebook, 4).cells, 1)
        ]
        for cell in self.cells:
            if cell["cell_type"] == "code":
                cell |= {"outputs": [], "execution_count": None}
        self.notes.append("The notebook is of an old format (3) and was brought up to date.")

    def _cell(self, start: int, old: bool) -> None:
        """Read one cell. One that breaks off is kept when its source is whole; then too BrokenJSON is raised."""
        if not self.json.begins(start, b"{"):
            self._problem("Not a cell, left out", f"cell {self.number}")
            return
        found: dict[str, tuple[int, int]] = {}
        repeated = False
        try:
            for key, value in self.json.members(start):
                if key in ("cell_type", "id", "metadata", "source", "input", "attachments", "level"):
                    repeated = repeated or key in found
                    found[key] = (value, self.json.end_of(value))
        except BrokenJSON:
            if "source" in found or "input" in found:
                self._keep(found, repeated, old)
            raise
        self._keep(found, repeated, old)

    def _keep(self, found: dict[str, tuple[int, int]], repeated: bool, old: bool) -> None:
        """Make a cell of what was found of it: key → where its value begins and ends."""
        metadata = self._metadata(found)
        grade_id = metadata.get("nbgrader", {}).get("grade_id")
        name = f"cell {self.number}" + (f" ({shown(grade_id)})" if grade_id else "")
        if repeated:
            self._problem("The same thing twice in a cell, the last one counts", name)
        kind = self._short(found, "cell_type", 20)
        if kind not in (*TYPES, "heading") if old else kind not in TYPES:
            self._problem("Cells of an unknown type", name)
            kind = "raw"
        source = self._source(found.get("input" if old and kind == "code" else "source"), name)
        if source is None:
            return
        cell: dict[str, Any] = {"cell_type": kind, "metadata": metadata, "source": source}
        if kind == "code":
            cell |= {"outputs": [], "execution_count": None}
        elif "attachments" in found:
            cell["attachments"] = self._attachments(found["attachments"], name)
        if old:
            cell |= self._as_old(kind, source, found)
        else:
            identity = self._short(found, "id", 100)
            cell["id"] = identity if ID.fullmatch(identity) else f"handed-in-{self.number}"
        self.cells.append(cell)

    def _as_old(self, kind: str, source: str, found: dict[str, tuple[int, int]]) -> dict[str, Any]:
        """What format 3 calls the same things."""
        if kind == "code":
            return {"input": source, "language": "python", "collapsed": False, "prompt_number": None}
        level = self.json.read(*found["level"]) if kind == "heading" and "level" in found else 1
        return {"level": level if level in range(1, 7) else 1} if kind == "heading" else {}

    def _source(self, span: tuple[int, int] | None, name: str) -> str | None:
        """The source as one string, None when the cell is to be left out."""
        if span is None:
            self._problem("Without a source", name)
            return ""
        too_long = f"Left out, longer than {self.limits.cell_characters:,} characters"
        # white space between the lines of a source counts here too, hence twice
        if span[1] - span[0] > 2 * ESCAPED * self.limits.cell_characters + 1000:
            self._problem(too_long, name)
            return None
        value = self.json.read(*span)
        if isinstance(value, list):
            value = "".join(line for line in value if isinstance(line, str))
        if not isinstance(value, str):
            self._problem("The source could not be read", name)
            return ""
        if len(value) > self.limits.cell_characters:
            self._problem(too_long, name)
            return None
        if self.characters + len(value) > self.limits.characters:
            self._problem(f"Left out, the notebook has more than {self.limits.characters:,} characters", name)
            return None
        self.characters += len(value)
        if "\0" in value:
            self._problem("NUL characters were replaced", name)
            value = value.replace("\0", "\ufffd")
        elif "\ufffd" in value and not _is_utf8(self.json.data[span[0] : span[1]]):
            self._problem("Not UTF-8, some characters were lost", name)
        return value

    def _metadata(self, found: dict[str, tuple[int, int]]) -> dict[str, Any]:
        """What a cell may be known by: its nbgrader id, and the cell id that Colab keeps in the metadata."""
        metadata: dict[str, Any] = {}
        if "metadata" in found:
            for key, value in self.json.members(found["metadata"][0]):
                if key == "id" and (identity := self._string(value, 100)):
                    metadata["id"] = identity
                elif key == "nbgrader":
                    for inner, place in self.json.members(value):
                        if inner == "grade_id" and (identity := self._string(place, 200)):
                            metadata["nbgrader"] = {"grade_id": identity}
        return metadata

    def _attachments(self, span: tuple[int, int], name: str) -> dict[str, dict[str, str]]:
        size = span[1] - span[0]
        if size > self.limits.attachment_bytes or self.attached + size > self.limits.attachments_bytes:
            self._problem("Pictures left out, too large", name)
            return {}
        self.attached += size
        value = self.json.read(*span)
        return {
            file: {kind: text for kind, text in bundle.items() if isinstance(text, str)}
            for file, bundle in (value.items() if isinstance(value, dict) else ())
            if isinstance(bundle, dict)
        }

    def _short(self, found: dict[str, tuple[int, int]], key: str, length: int) -> str:
        return self._string(found[key][0], length) if key in found else ""

    def _string(self, start: int, length: int) -> str:
        """A short string, "" for anything else."""
        end = self.json.end_of(start)
        value = self.json.read(start, end) if end - start <= ESCAPED * length else None
        return value if isinstance(value, str) and len(value) <= length else ""


def _utf8(data: bytes) -> bytes:
    """The same text without a byte order mark, and brought from UTF-16, as some editors save it, to UTF-8."""
    for mark, encoding in ((b"\xff\xfe", "utf-16-le"), (b"\xfe\xff", "utf-16-be")):
        if data.startswith(mark) and len(data) <= UTF16_BYTES:
            return data[2:].decode(encoding, "replace").encode("utf-8", "replace")
    return data.removeprefix(b"\xef\xbb\xbf")


def _is_utf8(data: bytes) -> bool:
    try:
        data.decode()
    except UnicodeDecodeError:
        return False
    return True
