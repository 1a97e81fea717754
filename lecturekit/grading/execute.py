"""Grade one notebook: run the student's cells in the jail, put the questions, judge the answers out here.

1. All cells down to the last test are run in one process, which sees no hidden input. At every test cell that asks
   questions it leaves a snapshot of itself behind.
2. When that is done, and all that will be shown has been shown, the snapshots are asked the hidden cases.
3. Tests that are plain asserts run in a process of their own, of which only the tests' results are kept.
A process that dies, or does not keep a time limit, is replaced by a fresh one, which runs the cells above again
without those that ended it.
"""

from __future__ import annotations

import ast
import copy
import hashlib
import socket
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from nbformat import NotebookNode, from_dict
from nbgrader.utils import determine_grade

from lecturekit.checking.notebook import SEED_VARIABLE
from lecturekit.checking.verdict import Verdict
from lecturekit.grading.judge import Ask, Judge, Locked, locked_modules, plan
from lecturekit.grading.options import GradingOptions
from lecturekit.grading.sandbox import Jail, JailDied
from lecturekit.grading.session import OutOfTime, ProcessDied, Session
from lecturekit.grading.stage import is_test
from lecturekit.grading.work import BY_HAND, PASSED, PENDING, WRONG, Graded, Job, Mark

# imported once, before any notebook is run; those that hold what is kept back are passed over
PRELOAD = ["ipywidgets", "tqdm.auto", "lecturekit.checking", "lecturekit.data", "lecturekit.results"]
PRELOAD += ["lecturekit.models", "lecturekit.timing", "lecturekit.explore.style", "lecturekit.explore.lora"]
DIED, NOT_RUN = (
    "Running this cell ended the Python process.",
    "Not run: cells above ended the Python process too often.",
)
OVERRUN = "This cell did not keep its time limit and had to be stopped."
TOO_LONG = "Not run: the notebook's time was up."


class Grader:
    """Grades the notebooks of one lab, one after the other, in one jail. Use it as a context manager.

    Raises sandbox.NoSandbox where student code cannot be run safely.
    """

    def __init__(self, lab: str, options: GradingOptions | None = None, hide: tuple[Any, ...] = ()) -> None:
        self.lab, self.options, self.hide = lab, options or GradingOptions(), hide
        self.jail = self._jail(locked_modules(lab))

    def __enter__(self) -> Grader:
        return self

    def __exit__(self, *_: Any) -> None:
        self.close()

    def close(self) -> None:
        """End the jail."""
        self.jail.close()

    def grade(self, job: Job) -> Graded:
        """Run and judge one notebook. Its own faults never raise; JailDied means that the machine cannot run it."""
        notebook = _Notebook(self, job)
        locked = locked_modules(self.lab, [ask for _, ask in notebook.asks])
        if locked != self.jail.locked:  # this lab puts questions of another one
            self.jail.close()
            self.jail = self._jail(locked)
        return notebook.grade()

    def _jail(self, locked: frozenset[str]) -> Jail:
        return Jail(self.lab, locked=locked, preload=PRELOAD, options=self.options, hide=self.hide)


class _Notebook:
    """One notebook while it is graded."""

    def __init__(self, grader: Grader, job: Job) -> None:
        self.grader, self.job, self.options = grader, job, grader.options
        self.device = _gpu() if self.options.gpu else ""
        self.cells: list[Any] = from_dict(copy.deepcopy(dict(job.staged))).cells
        self.tests = {index: plan(cell.source) for index, cell in enumerate(self.cells) if is_test(cell)}
        self.last = max(self.tests, default=-1)
        self.asks = [(index, ask) for index, asks in self.tests.items() for ask in asks or ()]
        self.judge = Judge(job.lab, job.seed, "cuda" if self.device else "cpu", [ask for _, ask in self.asks])
        self.verdicts: dict[tuple[int, Ask], Verdict] = {}
        self.plain: dict[int, Mark] = {}
        self.snapshots: dict[int, socket.socket] = {}
        self.session: Session | None = None
        self.deadly: set[int] = set()  # cells that ended their process: not run again
        self.late: set[int] = set()  # those of them that did not keep their time limit
        self.problems: list[str] = []
        self.seconds: dict[str, float] = {}
        self.inside = 0.0  # seconds of steps within the step that is being timed
        self.ends = 0.0  # when the time for this pass over the notebook is up

    def grade(self) -> Graded:
        for index, ask in self.asks:
            if self.judge.is_pending(ask):
                self.verdicts[index, ask] = self.judge.pending(ask)
        try:
            with self._timed("cells"):
                self._run_cells()
            with self._timed("questions"):
                self._ask_snapshots()
            self._end()
            with self._timed("questions"):
                self._ask_again()
            with self._timed("plain tests"):
                self._run_plain_tests()
        finally:
            self._end()
        marks = [self._mark(index, cell) for index, cell in enumerate(self.cells) if _is_graded(cell)]
        executed = copy.deepcopy(dict(self.job.staged)) | {"cells": self.cells}
        return Graded(
            self.job.lab,
            self.job.notebook,
            self.job.student,
            _as_data(executed),
            tuple(marks),
            tuple(self.job.notes),
            tuple(self.problems),
            {step: round(seconds, 4) for step, seconds in self.seconds.items()},
            self.device,
        )

    # 1. Running the cells

    def _run_cells(self) -> None:
        """Run every cell above the last test, and keep what it shows."""
        reached = 0  # cells before this one have run and keep their outputs
        self._set_clock()
        while len(self.deadly) < self.options.deaths:
            self._begin()
            index = 0
            try:
                for index in range(self.last + 1):
                    if self._is_late():
                        return self._leave_out(reached, TOO_LONG)  # the snapshots there are can still be asked
                    fresh = index >= reached
                    outputs = self._step(index, snapshots=True)
                    if fresh and outputs is not None:
                        self.cells[index].outputs = outputs
                    reached = max(reached, index + 1)
                return
            except _StartAgain:
                continue
            except (ProcessDied, OutOfTime) as error:
                self._ended(index, error, show=True)
                reached = max(reached, index + 1)
                if self._is_late():
                    return self._leave_out(reached, TOO_LONG)
        self._leave_out(reached, NOT_RUN)

    def _leave_out(self, start: int, why: str) -> None:
        """Say of the cells from here on that they were not run, and why."""
        self.problems.append(why)
        for cell in self.cells[start : self.last + 1]:
            if cell.cell_type == "code":
                cell.outputs = [_error("NotRun", why)]

    def _step(self, index: int, snapshots: bool = False) -> list[Any] | None:
        """Run one cell of the notebook in the session. Returns its outputs, None where nothing was run."""
        assert self.session is not None
        cell = self.cells[index]
        if cell.cell_type != "code" or index in self.deadly:
            return None
        if self.tests.get(index):
            if snapshots and any((index, ask) not in self.verdicts for ask in self.tests[index] or ()):
                snapshot = self.session.snapshot()
                if snapshot is not None:
                    self.snapshots[index] = snapshot
            return None
        source = cell.source
        if index in self.tests:  # what the student sees of it: later cells may use what it defines
            source = self.job.visible.get(cell.metadata.nbgrader.grade_id, "")
            self.session.cell(source, self.options.cell_seconds)
            return None
        has_full_time = self.ends - time.monotonic() >= self.options.cell_seconds  # else the session gives it less
        outputs = self.session.cell(source, self.options.cell_seconds)
        if self.session.cut and not any("was cut off" in problem for problem in self.problems):
            self.problems.append(f"What it printed and showed was cut off after {self.options.output:,} characters.")
        timed_out = any(output.get("ename") == "CellTimeout" for output in outputs)
        if timed_out and has_full_time:  # else it was the notebook's time that was up
            self.problems.append(f"{_name(cell, index)} did not end within {self.options.cell_seconds:g} seconds.")
            self.deadly.add(index)
        return [from_dict(output) for output in outputs]

    # 2. Asking

    def _ask_snapshots(self) -> None:
        for index, ask in self.asks:
            if (index, ask) in self.verdicts or index not in self.snapshots:
                continue
            try:
                self._ask(index, ask, self.snapshots[index])
            except ProcessDied:
                continue
            if self.session is None:  # it had to be killed, and all snapshots with it
                return

    def _ask(self, index: int, ask: Ask, snapshot: socket.socket | None, public: bool = False) -> Verdict:
        """Put one question and judge what comes back; it is final unless it was asked on public cases."""
        assert self.session is not None
        request = self.judge.request(ask, public=public)
        request["seconds"] = min(request["seconds"], self.options.case_seconds)
        try:
            reply = self.session.ask(request, snapshot)
            with self._timed("judging"):
                verdict = self.judge.verdict(ask, reply, public=public)
        except ProcessDied as error:
            if snapshot is not None and not error.answering:
                raise  # the snapshot had gone, and who ended it is not known: asked again in a fresh process
            verdict = self.judge.died(ask, "died")
        except OutOfTime:
            verdict = self.judge.died(ask, "timeout")
            self._end()
        if not public:
            self.verdicts[index, ask] = verdict
            if verdict.kind == "died":
                self.problems.append(f"The answer to {ask.question} ended its Python process.")
        return verdict

    def _ask_again(self) -> None:
        """Questions that no snapshot could answer: in a fresh process that has run the cells above, by itself."""
        self._set_clock()
        while self._open() and not self._is_late():
            before = len(self.verdicts)
            index = 0
            self._begin()
            try:
                for index in range(max(index for index, _ in self._open()) + 1):
                    self._step(index)
                    for place, ask in self.asks:
                        if place != index or (place, ask) in self.verdicts:
                            continue
                        if self._ask(place, ask, None).kind in ("died", "timeout"):
                            raise _StartAgain
            except _StartAgain:
                continue
            except (ProcessDied, OutOfTime) as error:
                self._ended(index, error)
                if len(self.deadly) >= self.options.deaths or len(self.verdicts) == before and index not in self.deadly:
                    break
            finally:
                self._end()
        for index, ask in self._open():
            kind = "timeout" if self._is_late() else "died"
            self.verdicts[index, ask] = self.judge.died(ask, kind)

    def _open(self) -> list[tuple[int, Ask]]:
        return [(index, ask) for index, ask in self.asks if (index, ask) not in self.verdicts]

    # 3. Plain asserts

    def _run_plain_tests(self) -> None:
        """Run the tests that are plain asserts, in a process of their own, of which nothing else is kept."""
        plain = [index for index, asks in self.tests.items() if asks is None]
        for index in self.deadly.intersection(plain):  # what the student sees of it has ended the process already
            self.plain[index] = _failed_mark(self.cells[index], "timeout" if index in self.late else "died")
        self._set_clock()
        while len(self.plain) < len(plain) and not self._is_late():
            index = 0
            self._begin(plain=True)
            try:
                for index in range(max(plain) + 1):
                    if index not in plain:
                        self._step(index)
                    elif index not in self.deadly:
                        assert self.session is not None
                        outputs = self.session.cell(self.cells[index].source, self.options.cell_seconds)
                        self.plain.setdefault(index, _plain_mark(self.cells[index], outputs))
            except (ProcessDied, OutOfTime) as error:
                self._ended(index, error)
                if index in plain:
                    kind = "timeout" if isinstance(error, OutOfTime) else "died"
                    self.plain.setdefault(index, _failed_mark(self.cells[index], kind))
                if len(self.deadly) >= self.options.deaths + len(plain):
                    break
            finally:
                self._end()
        for index in plain:
            kind = "timeout" if self._is_late() else "died"
            self.plain.setdefault(index, _failed_mark(self.cells[index], kind))

    # What the notebook asks while it runs

    def _requests(self, message: Mapping[str, Any]) -> Mapping[str, Any]:
        with self._timed("requests"):
            if "passing" in message:
                return self._passing(message["passing"])
            wanted = message.get("reference")
            if isinstance(wanted, list) and len(wanted) == 2 and all(isinstance(word, str) for word in wanted):
                try:
                    return {"source": self.judge.reference(wanted[0], wanted[1], self._final())}
                except (Locked, KeyError, ValueError) as error:
                    return {"refused": str(error)}
            return {"refused": "there is no such request"}

    def _passing(self, question: Any) -> Mapping[str, Any]:
        """The student's own answer if it passes its check, judged on the public cases; else the reference.

        Handing the reference out makes the question's verdict final: wrong. Before that, all questions above it are
        judged for good, and the notebook starts again in a process that has seen none of that: what snapshots share
        with this process could carry the reference one way, and hidden inputs the other. A question whose test has not
        been reached or whose verdict waits for a GPU changes nothing.
        """
        place = next(((index, ask) for index, ask in reversed(self.asks) if ask.question == question), None)
        if place is None:
            return {}
        index, ask = place
        if place not in self.verdicts:
            if index not in self.snapshots:
                return {}
            try:
                verdict = self._ask(index, ask, self.snapshots[index], public=True)
            except ProcessDied:  # the snapshot has gone: asked again later, in a fresh process
                return {}
            if verdict.passed:
                return {}
            self.verdicts[place] = verdict
            if self.session is not None:
                self._ask_snapshots()
            raise _StartAgain
        if self.verdicts[place].passed or self.verdicts[place].kind == "pending":
            return {}
        module, name = self.judge.answer_to(ask)
        try:
            return {"source": self.judge.reference(module, name, self._final()), "module": module, "name": name}
        except Locked:
            return {}

    def _final(self) -> set[str]:
        """The questions whose verdict nothing can change any more."""
        still_open = {ask.question for _, ask in self._open()}
        pending = {ask.question for (_, ask), verdict in self.verdicts.items() if verdict.kind == "pending"}
        return {ask.question for _, ask in self.asks} - still_open - pending

    # Marks

    def _mark(self, index: int, cell: Any) -> Mark:
        name, points = cell.metadata.nbgrader.grade_id, float(cell.metadata.nbgrader.points)
        if index in self.plain:
            return self.plain[index]
        if not self.tests.get(index):
            score, _ = determine_grade(cell)
            status = BY_HAND if score is None else WRONG
            return Mark(name, points, score, status, kind="not attempted" if score is not None else "")
        asks = self.tests[index] or []
        verdicts = [self.verdicts[index, ask] for ask in asks]
        text = "\n\n".join(str(verdict.without_inputs()) for verdict in verdicts)
        wrong = next((verdict for verdict in verdicts if not verdict.passed and verdict.kind != "pending"), None)
        if wrong is not None:
            return Mark(name, points, 0.0, WRONG, wrong.question, wrong.kind, wrong.misconception, text)
        pending = next((verdict for verdict in verdicts if verdict.kind == "pending"), None)
        if pending is not None:
            return Mark(name, points, None, PENDING, pending.question, "pending", None, text)
        return Mark(name, points, points, PASSED, asks[0].question, "passed", None, text)

    # Processes and time

    def _set_clock(self) -> None:
        """Each pass has the notebook's time to itself: a slow one must not cost what another could still earn."""
        self.ends = time.monotonic() + self.options.notebook_seconds

    def _is_late(self) -> bool:
        return time.monotonic() >= self.ends

    def _begin(self, plain: bool = False) -> None:
        """Start a process. plain: for plain asserts, which may draw hidden inputs from a seed in the environment.

        Raises JailDied when it does not come up at the second try: that is no fault of the notebook's.
        """
        # the same student gets the same random numbers again; nothing hidden is drawn from them
        seed = _number(f"{self.job.student}|{self.job.notebook}")
        # not the questions' own seed, from which their cases could be drawn
        environment = {SEED_VARIABLE: str(_number(f"plain|{self.job.seed}"))} if plain else {}
        for attempt in (1, 2):
            self._end()
            try:
                started = time.monotonic()
                with self._timed("starting"):
                    self.session = Session(self.grader.jail, self.options, self._requests)
                    self.session.begin(seed, sorted(self.grader.jail.locked), environment)
                self.ends += time.monotonic() - started  # a slow start is the machine's
                self.session.ends = self.ends
                return
            except (ProcessDied, OutOfTime) as error:
                if attempt == 2:
                    raise JailDied(f"a notebook's process does not come up: {error}") from error

    def _end(self) -> None:
        if self.session is not None:
            with self._timed("ending"):
                self.session.close()
        self.session, self.snapshots = None, {}

    def _ended(self, index: int, error: ProcessDied | OutOfTime, show: bool = False) -> None:
        """Take note of the cell that ended its process."""
        self._end()
        if index in self.deadly:
            return
        self.deadly.add(index)
        cell = self.cells[index]
        late = isinstance(error, OutOfTime)
        self.late |= {index} if late else set()
        self.problems.append(f"{_name(cell, index)} {'did not keep its time limit' if late else 'ended its process'}.")
        if show and index not in self.tests:
            outputs = [from_dict(output) for output in getattr(error, "outputs", [])]
            cell.outputs = [*outputs, _error("CellTimeout", OVERRUN) if late else _error("ProcessDied", DIED)]

    @contextmanager
    def _timed(self, step: str) -> Iterator[None]:
        """Add the time that the block takes to a step's, but for what steps inside it take."""
        outside, self.inside = self.inside, 0.0
        started = time.monotonic()
        try:
            yield
        finally:
            seconds = time.monotonic() - started
            self.seconds[step] = self.seconds.get(step, 0.0) + seconds - self.inside
            self.inside = outside + seconds


class _StartAgain(Exception):
    """A question ended the process it was put to; the others are put to a fresh one."""


def _plain_mark(cell: Any, outputs: list[dict[str, Any]]) -> Mark:
    """What a test of plain asserts earned, as nbgrader reckons it from what the cell showed.

    Warnings cost nothing. A number counts as partial credit only where the test's own last line is an expression, so
    that a patched displayhook earns nothing. Of an error's text only what the test itself says is kept: a student's
    code could raise an error that tells the hidden inputs.
    """
    test = copy.deepcopy(cell)
    kept = [output for output in outputs if output["output_type"] == "error"][:1]
    if not kept and _ends_in_expression(cell.source):
        kept = [output for output in outputs if output["output_type"] == "execute_result"][:1]
    test.outputs = [from_dict(output) for output in kept]
    name, points = cell.metadata.nbgrader.grade_id, float(cell.metadata.nbgrader.points)
    try:
        score = round(determine_grade(test, _Silent())[0], 2)  # more digits could tell a hidden input
    except (ValueError, KeyError):  # more points than there are, or no text: the student's code may show anything
        score = 0.0
    passed = score == points
    if not kept or kept[0]["output_type"] != "error":
        text = "" if passed else f"{score:g} of {points:g} points"
        return Mark(
            name,
            points,
            score,
            PASSED if passed else WRONG,
            kind="passed" if passed else "value",
            text=text,
            trusted=False,
        )
    timeout = kept[0]["ename"] == "CellTimeout"
    text = "The test did not end within its time limit." if timeout else _said(cell.source, kept[0])
    return Mark(name, points, score, WRONG, kind="timeout" if timeout else "raised", text=text, trusted=False)


def _failed_mark(cell: Any, kind: str) -> Mark:
    text = "The test did not end within its time limit." if kind == "timeout" else "The test ended its Python process."
    nbgrader = cell.metadata.nbgrader
    return Mark(nbgrader.grade_id, float(nbgrader.points), 0.0, WRONG, kind=kind, text=text, trusted=False)


def _said(source: str, error: Mapping[str, Any]) -> str:
    """An error of a plain test: its name where Python has such an error, its text where the test itself says that."""
    import builtins

    known = getattr(builtins, str(error["ename"]), None)
    name = error["ename"] if isinstance(known, type) and issubclass(known, BaseException) else "an error"
    said: list[ast.expr | None] = []
    for node in ast.walk(_parsed(source)):
        if isinstance(node, ast.Assert):
            said.append(node.msg)
        elif isinstance(node, ast.Raise) and isinstance(node.exc, ast.Call):
            said += node.exc.args
    texts = {part.value for part in said if isinstance(part, ast.Constant) and isinstance(part.value, str)}
    value = str(error["evalue"])
    return f"{name}: {value}" if value in texts else str(name)


def _ends_in_expression(source: str) -> bool:
    body = _parsed(source).body
    return bool(body) and isinstance(body[-1], ast.Expr) and not source.rstrip().endswith(";")


def _parsed(source: str) -> ast.Module:
    from IPython.core.inputtransformer2 import TransformerManager

    try:
        return ast.parse(TransformerManager().transform_cell(source))
    except SyntaxError:
        return ast.Module(body=[], type_ignores=[])


class _Silent:
    """nbgrader's determine_grade warns of odd results through a logger."""

    def warning(self, *_: Any) -> None:
        pass


def _is_graded(cell: Any) -> bool:
    return bool(cell.metadata.get("nbgrader", {}).get("grade"))


def _name(cell: Any, index: int) -> str:
    grade_id = cell.metadata.get("nbgrader", {}).get("grade_id")
    return f"The cell {grade_id}" if grade_id else f"Cell {index + 1}"


def _error(name: str, value: str) -> NotebookNode:
    return from_dict({"output_type": "error", "ename": name, "evalue": value, "traceback": [f"{name}: {value}"]})


def _as_data(value: Any) -> Any:
    """NotebookNodes as plain dicts, which pickle and JSON know."""
    if isinstance(value, Mapping):
        return {key: _as_data(item) for key, item in value.items()}
    return [_as_data(item) for item in value] if isinstance(value, list) else value


def _number(word: str) -> int:
    return int.from_bytes(hashlib.sha256(word.encode()).digest()[:4], "big")


def _gpu() -> str:
    """The name of the GPU, "" when there is none."""
    import torch

    return torch.cuda.get_device_name() if torch.cuda.is_available() else ""
