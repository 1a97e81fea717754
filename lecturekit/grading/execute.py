"""Run a staged notebook for grading: nbgrader's Execute, with what an honest student needs added.

- The kernel gets the grading environment: the smoke profile, one thread, and the seed of this student's hidden cases.
- A kernel that dies (os._exit, out of memory) is started again and brought back to where it was, so that all other
  answers still earn their points.
- What a test cell prints, a warning on stderr above all, costs nothing, and is not shown: it may hold hidden inputs.
"""

from __future__ import annotations

import copy
import os
from pathlib import Path
from typing import Any

from nbclient.exceptions import DeadKernelError
from nbconvert.preprocessors.execute import NotebookClient
from nbformat.v4 import new_output
from nbgrader.preprocessors import Execute as NbgraderExecute
from traitlets import Bool, Integer

from lecturekit.checking.notebook import SEED_VARIABLE
from lecturekit.grading.course import student_seed
from lecturekit.grading.stage import course_directory, is_test

NOT_SHOWN = "(What the hidden test printed is not shown.)\n"


class Execute(NbgraderExecute):
    """nbgrader's Execute for `Autograde.autograde_preprocessors`; it is configured as `c.Execute`."""

    # output that comes too late is lost, not the whole submission; an error still counts, since the reply carries it
    raise_on_iopub_timeout = Bool(False).tag(config=True)
    max_deaths = Integer(5, help="How many cells may kill their kernel before the rest is no longer run.").tag(
        config=True
    )

    def preprocess(self, nb: Any, resources: Any, km: Any = None) -> tuple[Any, Any]:
        """Run all cells, then clean the outputs of the test cells."""
        NotebookClient.__init__(self, nb, km)
        self.reset_execution_trackers()
        self._check_assign_resources(resources)
        names = resources["nbgrader"]
        env = grading_environment(Path(course_directory(self).root), names["student"], names["assignment"])
        self._run(nb, env)
        for cell in nb.cells:
            if is_test(cell):
                cell.outputs = graded_outputs(cell.outputs)
        return nb, resources

    def _run(self, nb: Any, env: dict[str, str]) -> None:
        """Execute every cell, each death of the kernel followed by a fresh one and a replay."""
        deadly: set[int] = set()
        reached = 0  # cells before this one have run and keep their outputs
        while reached < len(nb.cells) and len(deadly) < self.max_deaths:
            with self.setup_kernel(env=env):
                for index, cell in enumerate(nb.cells):
                    replayed = index < reached
                    if index in deadly or (replayed and is_test(cell)):
                        continue
                    try:
                        self.execute_cell(copy.deepcopy(cell) if replayed else cell, index, store_history=True)
                    except DeadKernelError:
                        deadly.add(index)
                        if not replayed:
                            cell.outputs = [_error("KernelDied", "Running this cell ended the Python process.")]
                            reached = index + 1
                        break
                    finally:
                        nb.cells[index] = cell  # nbclient puts what it ran there, here the throw-away copy
                    reached = max(reached, index + 1)
        for cell in nb.cells[reached:]:
            if cell.cell_type == "code":
                cell.outputs = [_error("NotRun", "Not run: cells above ended the Python process too often.")]


def grading_environment(root: Path, student: str, lab: str) -> dict[str, str]:
    """The environment of the kernel that runs a student's notebook."""
    env = {key: value for key, value in os.environ.items() if key not in ("LECTUREKIT_RECORD", "LECTUREKIT_RESULTS")}
    return env | {
        "LECTUREKIT_PROFILE": "smoke",
        "LECTUREKIT_LAB": lab,
        SEED_VARIABLE: str(student_seed(root / "course", student, lab)),
        "OMP_NUM_THREADS": "1",
        "OMP_WAIT_POLICY": "passive",
    }


def graded_outputs(outputs: list[Any]) -> list[Any]:
    """What is kept of a test cell's outputs: its result and its error, the error as one line.

    Printed text goes: on stderr it would cost the points of the cell, and the student's own print would show hidden
    inputs in the feedback. So would the frames of a traceback.
    """
    kept = [copy.copy(output) for output in outputs if output.output_type in ("execute_result", "error")]
    for output in kept:
        if output.output_type == "error":
            output.traceback = [f"{output.ename}: {output.evalue}" if output.evalue else output.ename]
    if len(kept) < len(outputs):
        kept.insert(0, new_output("stream", name="stdout", text=NOT_SHOWN))
    return kept


def _error(name: str, value: str) -> Any:
    return new_output("error", ename=name, evalue=value, traceback=[f"{name}: {value}"])
