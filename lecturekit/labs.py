"""The labs: find their sources, turn a source into a notebook, run a notebook from top to bottom.

A lab is one jupytext percent file, solutions/<lab>/<lab>.py. Everything else is made from it.
"""

from __future__ import annotations

import hashlib
import os
import re
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import Any

from lecturekit.runtime import PROFILES

KERNELSPEC = {"display_name": "Python 3 (ipykernel)", "language": "python", "name": "python3"}
KEPT_METADATA = {"nbgrader", "tags", "jupyter", "deletable", "editable"}
# what jupytext adds to a cell so that it can write the same text again; a notebook has no use for it
JUPYTEXT_METADATA = {
    "lines_to_next_cell",
    "lines_to_end_of_cell_marker",
    "cell_marker",
    "title",
    "incorrectly_encoded_metadata",
}
_ANSI = re.compile(r"\x1b\[[0-9;]*m")


class LabError(Exception):
    """A lab that cannot be found, converted or run. The message is for the person at the terminal."""


class UnknownLab(LabError):
    """A lab named that there is none of."""


@dataclass(frozen=True)
class Run:
    """One run of a notebook. seconds: wall time. peak_bytes: most memory the kernel held, None where unknown."""

    notebook: Any
    seconds: float
    peak_bytes: int | None


def repository() -> Path:
    """The checkout this package lies in. Raises LabError when it was installed without one."""
    root = Path(__file__).resolve().parents[1]
    if not (root / "solutions").is_dir():
        raise LabError("no solutions/ folder: run this from a checkout of the course, installed with pip install -e")
    return root


def labs(root: Path | None = None) -> dict[str, Path]:
    """Every lab and its source, in order: {"lab05_lora": …/solutions/lab05_lora/lab05_lora.py}."""
    found = (root or repository()).joinpath("solutions").glob("*/*.py")
    return {path.stem: path for path in sorted(found) if path.stem == path.parent.name}


def chosen(names: Sequence[str], root: Path | None = None) -> dict[str, Path]:
    """The labs named, or all of them when none is. Raises UnknownLab."""
    known = labs(root)
    for name in names:
        if name not in known:
            raise UnknownLab(f"there is no lab {name!r}; labs: {', '.join(known) or 'none yet'}")
    return {name: known[name] for name in names} if names else known


def to_notebook(path: Path) -> Any:
    """Turn a jupytext percent source into a notebook that is the same, byte for byte, on every conversion.

    Cell ids come from the nbgrader id, or else from the cell's content. Raises LabError for cell metadata that is
    neither nbgrader's nor one of tags, jupyter, deletable, editable, and for an nbgrader id malformed or used twice.
    """
    import jupytext
    from nbformat.v4 import new_notebook

    source = jupytext.read(path, fmt="py:percent")
    cells = []
    used: set[str] = set()
    for number, cell in enumerate(source.cells, 1):
        unknown = set(cell.metadata) - KEPT_METADATA - JUPYTEXT_METADATA
        if unknown:
            raise LabError(f"{path.name}, cell {number}: unknown metadata {', '.join(sorted(unknown))}")
        metadata = {key: cell.metadata[key] for key in sorted(cell.metadata) if key in KEPT_METADATA}
        grade_id = metadata.get("nbgrader", {}).get("grade_id")
        if grade_id:
            name = grade_id
            if not re.fullmatch(r"[A-Za-z0-9_-]{1,64}", name):
                wanted = "the nbgrader id must be 1 to 64 letters, digits, - and _"
                raise LabError(f"{path.name}, cell {number}: {wanted}, got {name!r}")
            if name in used:
                raise LabError(f"{path.name}, cell {number}: the nbgrader id {grade_id!r} is used twice")
        else:
            name = _content_id(cell.cell_type, cell.source, used)
        used.add(name)
        fresh = {"id": name, "cell_type": cell.cell_type, "metadata": metadata, "source": cell.source}
        if cell.cell_type == "code":
            fresh |= {"execution_count": None, "outputs": []}
        cells.append(fresh)
    metadata = {"kernelspec": KERNELSPEC, "language_info": {"name": "python"}}
    return _as_nodes(new_notebook(cells=cells, metadata=metadata))


def _as_nodes(notebook: Any) -> Any:
    import nbformat

    return nbformat.from_dict(notebook)


def _content_id(cell_type: str, source: str, used: set[str]) -> str:
    """An id from what the cell says, so that inserting a cell leaves the ids of all others alone."""
    names = (hashlib.sha256(f"{cell_type}\0{source}\0{copy}".encode()).hexdigest()[:12] for copy in count())
    return next(name for name in names if name not in used)


def to_text(notebook: Any) -> str:
    """A notebook's JSON as nbformat writes it, ending in one newline."""
    import nbformat

    return nbformat.writes(notebook).rstrip("\n") + "\n"


def run(
    notebook: Any,
    lab: str,
    profile: str = "smoke",
    timeout: int | None = 600,
    record: bool = False,
    results: Path | None = None,
    quiet: bool = False,
    seed: int = 0,
) -> Run:
    """Run a notebook from top to bottom in a fresh kernel, in an empty folder, with a line of progress a cell.

    profile: "smoke" or "full". timeout: seconds a cell may take, None for no limit. record: let
    `lecturekit.results.record` write, to `results` if given. seed: what the lab starts from. The notebook passed in is
    left as it was; the executed copy is in the Run. Raises LabError naming lab, cell and error when a cell fails or
    the kernel dies.
    """
    import copy

    from nbclient.exceptions import CellControlSignal, CellExecutionError, DeadKernelError

    if profile not in PROFILES:
        raise ValueError(f"profile must be one of {', '.join(PROFILES)}, got {profile!r}")
    executed = copy.deepcopy(notebook)
    env = dict(os.environ, LECTUREKIT_PROFILE=profile, LECTUREKIT_LAB=lab, OMP_WAIT_POLICY="passive")
    env["LECTUREKIT_SEED"] = str(seed)
    env.pop("LECTUREKIT_RECORD", None)
    if record:
        env["LECTUREKIT_RECORD"] = "1"
    if results is not None:
        env["LECTUREKIT_RESULTS"] = str(results.resolve())
    with tempfile.TemporaryDirectory(prefix="lecturekit-") as folder:
        client = _client(executed, lab, timeout, folder, quiet)
        started = time.perf_counter()
        with client.setup_kernel(env=env):
            for index, cell in enumerate(executed.cells):
                try:
                    client.execute_cell(cell, index, store_history=True)
                except CellExecutionError as error:
                    raise LabError(f"{_place(lab, executed, index)}: {_ANSI.sub('', str(error.traceback))}") from error
                except CellControlSignal as error:
                    raise LabError(f"{_place(lab, executed, index)}: no end after {timeout} s") from error
                except DeadKernelError as error:
                    raise LabError(f"{_place(lab, executed, index)}: the kernel died (out of memory?)") from error
            seconds = time.perf_counter() - started
            peak = _peak(client)
    return Run(executed, seconds, peak)


def _client(notebook: Any, lab: str, timeout: int | None, folder: str, quiet: bool) -> Any:
    """An nbclient that prints one line a code cell: place, seconds, first line of the source."""
    from nbclient import NotebookClient

    width = len(str(len(notebook.cells)))
    begun = time.perf_counter()

    def start(cell: Any, cell_index: int) -> None:
        nonlocal begun
        begun = time.perf_counter()

    def report(cell: Any, cell_index: int, execute_reply: Any) -> None:
        if not quiet:
            place = f"{cell_index + 1:{width}}/{len(notebook.cells)}"
            first = next((line for line in cell.source.splitlines() if line.strip()), "")
            print(f"{lab}  {place}  {time.perf_counter() - begun:7.1f} s  {first[:70]}", flush=True)

    return NotebookClient(
        notebook,
        timeout=timeout,
        kernel_name="python3",
        resources={"metadata": {"path": folder}},
        on_cell_execute=start,
        on_cell_executed=report,
    )


def _place(lab: str, notebook: Any, index: int) -> str:
    return f"{lab}, cell {index + 1} of {len(notebook.cells)} ({notebook.cells[index].id})"


# VmHWM first: on Linux ru_maxrss also counts what the parent held when it forked the kernel
_PEAK = """
import pathlib as _pathlib, re as _re, sys as _sys
_status = _pathlib.Path("/proc/self/status")
_hwm = _re.search(r"VmHWM:\\s+(\\d+) kB", _status.read_text()) if _status.exists() else None
if _hwm:
    print(int(_hwm.group(1)) * 1024)
elif _sys.platform == "win32":
    import psutil as _psutil
    print(_psutil.Process().memory_info().peak_wset)
else:
    import resource as _resource
    print(_resource.getrusage(_resource.RUSAGE_SELF).ru_maxrss * (1 if _sys.platform == "darwin" else 1024))
"""


def _peak(client: Any) -> int | None:
    """The most memory the kernel ever held, in bytes, asked of the kernel itself before it ends."""
    from nbformat.v4 import new_code_cell

    probe = new_code_cell(_PEAK)
    client.nb.cells.append(probe)
    client.on_cell_executed = None
    try:
        client.execute_cell(probe, len(client.nb.cells) - 1)
    finally:
        client.nb.cells.pop()
    printed = "".join(output.get("text", "") for output in probe.outputs)
    return int(printed) if printed.strip().isdigit() else None


def measure(
    names: Sequence[str] = (), root: Path | None = None, timeout: int | None = None, seeds: int = 1
) -> list[tuple[str, Run]]:
    """Run the solution of each lab named (all by default) at full size, under seeds 0 … seeds − 1, and record.

    A lab's results file is replaced once all of its runs are through, so an interrupted run changes nothing.
    """
    from lecturekit import results

    root = root or repository()
    runs = []
    for lab, path in chosen(names, root).items():
        recorded = []
        notebook = to_notebook(path)  # once, so that all seeds run the same version
        for seed in range(seeds):
            with tempfile.TemporaryDirectory(prefix="lecturekit-results-") as folder:
                done = run(notebook, lab, "full", timeout, record=True, results=Path(folder), seed=seed)
                found = Path(folder, f"{lab}.json")
                recorded.append(results.read(found) if found.exists() else [])
            combined = results.combine(recorded)  # after each run, so that what does not fit together is told early
            memory = "" if done.peak_bytes is None else f", {done.peak_bytes / 2**30:.2f} GiB at most"
            print(f"{lab}, seed {seed}: {done.seconds:.0f} s{memory}", flush=True)
            runs.append((lab, done))
        results.write(root / "docs" / "results" / f"{lab}.json", combined)
    return runs
