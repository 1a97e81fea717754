"""Rebuild a submitted notebook from the release before it is run.

From the submission come only the sources of the solution cells, of cells that the release leaves open to edit, and of
the student's own cells. Test cells, points, metadata and ids come from the release. So nothing that happened to the
notebook (a test cell copied, deleted, moved or edited, metadata lost) costs points, earns points or stops the batch.
The hidden tests come back from the gradebook afterwards (assignment.py).
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from nbformat.v4 import new_code_cell, new_markdown_cell

from lecturekit.grading.reader import LIMITS, shown
from lecturekit.grading.scan import whole

MISSING = "# This cell was missing from the submission."
PICTURES = {"image/png", "image/jpeg"}  # what may be attached to a written answer: data, never markup
TOLD = 50  # notes; a notebook of two thousand pasted tests is no reason for more


@dataclass
class Staged:
    """A rebuilt notebook, and one sentence for each thing in the submission that was not taken over as it was."""

    notebook: Any
    notes: list[str] = field(default_factory=list)


def stage(submitted: Any, release: Any, notes: Sequence[str] = ()) -> Staged:
    """Rebuild `submitted` on the frame of `release`. Both are nbformat 4 notebooks and stay as they are.

    What is in the submission may have any type and raises nothing. notes: what reading the file had to say; it is told
    first, above what is found here.

    - A solution cell, or a code cell the release leaves open to edit, takes the student's source. Of several changed
      copies the last one above the next test counts, as it would in a kernel; the others stay, in place, as cells of
      the student's own.
    - A solution cell missing from the submission is left empty where code is asked for, so that an answer moved to a
      cell of the student's own still counts; other missing cells come back as they were.
    - A changed copy of any other cell stays, in place, as a cell of the student's own; the original is used as well.
    - The student's own cells follow the cell of the release that they followed in the submission.
    """
    frame = copy.deepcopy(release)
    notes = list(notes)
    found = submitted.get("cells") if isinstance(submitted, dict) else None
    theirs = [cell for cell in found if isinstance(cell, dict)] if isinstance(found, list) else []
    matches = _match(theirs, release.cells)
    taken = {place: _chosen(place, theirs, matches, release.cells) for place in range(len(release.cells))}

    own: dict[int, list[Any]] = {}  # place in the release, -1 for the top → the student's cells that follow it
    after = -1
    for position, (cell, place) in enumerate(zip(theirs, matches, strict=True)):
        first = place not in matches[:position]
        if place is not None and (taken[place] == position or (taken[place] is None and first)):
            after = place  # other copies of a cell do not move the cells that follow them
        if place is None or (_text(cell) != _text(release.cells[place]) and position != taken[place]):
            _keep(cell, place, own.setdefault(after, []), release.cells, notes)
        elif not first and position != taken[place]:
            notes.append(f"A copy of {_name(release.cells[place])} was left out.")

    cells = list(own.get(-1, []))
    for place, cell in enumerate(frame.cells):
        source = taken[place]
        if source is not None:
            cell.source = _source(theirs[source])
            if cell.cell_type == "markdown" and (pictures := _pictures(theirs[source], _name(cell), notes)):
                cell.attachments = pictures
        elif place not in matches:
            notes.append(f"{_name(cell, capital=True)} was missing and has been put back.")
            if is_solution(cell) and cell.cell_type == "code" and not _nbgrader(cell).get("grade"):
                cell.source = MISSING
        cells += [cell, *own.get(place, [])]
    for number, cell in enumerate((cell for kept in own.values() for cell in kept), 1):
        cell.id = f"own-cell-{number}"
    frame.cells = cells
    if len(notes) > TOLD:
        notes = [*notes[:TOLD], f"And {len(notes) - TOLD} more changes like these."]
    if notes:
        frame.metadata["lecturekit"] = {"staging": notes}
        text = "**About your submission.** It was graded, with these changes:\n\n" + "\n".join(f"- {n}" for n in notes)
        frame.cells.insert(0, new_markdown_cell(text, id="about-your-submission"))
    return Staged(frame, notes)


def is_solution(cell: Any) -> bool:
    """Whether the student's answer goes into this cell."""
    return bool(_nbgrader(cell).get("solution"))


def is_test(cell: Any) -> bool:
    """Whether this cell is graded by running it."""
    return bool(_nbgrader(cell).get("grade")) and not is_solution(cell) and cell.cell_type == "code"


def _is_open(cell: Any) -> bool:
    """Whether the student may change this cell: a solution, or code that is neither a test nor locked."""
    marks = _nbgrader(cell)
    return is_solution(cell) or (cell.cell_type == "code" and not marks.get("grade") and not marks.get("locked"))


def _nbgrader(cell: Any) -> dict[str, Any]:
    metadata = cell.get("metadata")
    found = metadata.get("nbgrader") if isinstance(metadata, dict) else None
    return found if isinstance(found, dict) else {}


def _ids(cell: Any) -> list[tuple[str, str]]:
    """What a cell can be known by, best first: its nbgrader id, its cell id (Colab moves that into the metadata)."""
    metadata = cell.get("metadata")
    named = [
        ("nbgrader", _nbgrader(cell).get("grade_id")),
        ("cell", cell.get("id")),
        ("cell", metadata.get("id") if isinstance(metadata, dict) else None),
    ]
    return [(kind, name) for kind, name in named if isinstance(name, str) and name]


def _source(cell: Any) -> str:
    """A cell's source as one string that can be written to a file; other tools leave a list of lines, or none."""
    source = cell.get("source")
    lines = source if isinstance(source, list) else [source]
    return whole("".join(line for line in lines if isinstance(line, str)))


def _text(cell: Any) -> str:
    """A cell's source without what editors change by themselves: line ends and white space around it."""
    return "\n".join(line.rstrip() for line in _source(cell).splitlines()).strip()


def _name(cell: Any, capital: bool = False) -> str:
    kind = "test cell" if is_test(cell) else "answer cell" if is_solution(cell) else "cell"
    name = dict(_ids(cell)).get("nbgrader") or f"“{(_text(cell).splitlines() or [''])[0][:50]}”"
    return f"{'The' if capital else 'the'} {kind} {name}"


def _match(submitted: list[Any], release: list[Any]) -> list[int | None]:
    """For each submitted cell the place in the release of the cell it came from, None for the student's own.

    By nbgrader id, else by cell id, else by the same text where only one cell of the release has it.
    """
    by_id = {key: place for place, cell in enumerate(release) for key in _ids(cell)}
    texts: dict[str, list[int]] = {}
    for place, cell in enumerate(release):
        texts.setdefault(_text(cell), []).append(place)
    found: list[int | None] = []
    for cell in submitted:
        same = texts.get(_text(cell), [])
        alike = same[0] if len(same) == 1 and _text(cell) else None
        found.append(next((by_id[key] for key in _ids(cell) if key in by_id), alike))
    return found


def _chosen(place: int, submitted: list[Any], matches: list[int | None], release: list[Any]) -> int | None:
    """Which submitted cell an open cell of the release takes its source from; None for the release's own source."""
    if not _is_open(release[place]):
        return None
    changed = [
        position
        for position, match in enumerate(matches)
        if match == place and _text(submitted[position]) != _text(release[place])
    ]
    test = next((later for later in range(place + 1, len(release)) if is_test(release[later])), None)
    end = matches.index(test) if test is not None and test in matches else len(submitted)
    above = [position for position in changed if position < end] or changed
    return above[-1] if above else None


def _keep(cell: Any, place: int | None, kept: list[Any], release: list[Any], notes: list[str]) -> None:
    """Take a cell over as one of the student's own: its source, nothing else."""
    source = _source(cell)
    if not source.strip():
        return
    kind = cell.get("cell_type")
    if kind == "code":
        kept.append(new_code_cell(source))
    elif kind == "markdown":
        kept.append(new_markdown_cell(source))
        if pictures := _pictures(cell, "a cell of your own", notes):
            kept[-1].attachments = pictures
    else:
        named = f"{shown(kind, 20)} cell" if isinstance(kind, str) and kind else "cell without a type"
        notes.append(f"A {named} was left out: only code and Markdown cells are taken over.")
        return
    if place is not None:
        notes.append(f"A changed copy of {_name(release[place])} was kept as a cell of your own; it earns no points.")


def _pictures(cell: Any, name: str, notes: list[str]) -> dict[str, dict[str, str]]:
    """The PNG and JPEG pictures attached to a cell, as base64; anything else attached is left behind."""
    attached = cell.get("attachments")
    pictures: dict[str, dict[str, str]] = {}
    size = 0
    for file, bundle in attached.items() if isinstance(attached, dict) else ():
        if not isinstance(file, str) or not isinstance(bundle, dict):
            continue
        data = {kind: text for kind, text in bundle.items() if kind in PICTURES}
        if data and all(isinstance(text, str) and text.isascii() for text in data.values()):
            size += len(file) + sum(map(len, data.values()))
            pictures[whole(file)] = data
    if size > LIMITS.attachment_bytes:
        notes.append(f"The pictures in {name} were left out: they have more than {LIMITS.attachment_bytes:,} bytes.")
        return {}
    return pictures
