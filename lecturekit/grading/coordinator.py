"""Grade a whole class: take the lock, find what is left to do, have it graded, keep the results, write the gradebook.

Every result goes to the journal first and is then recorded, so a batch that was stopped at any point, by whatever, goes
on where it was when it is started again: what is in the journal is not run again, what is recorded is not touched.
"""

from __future__ import annotations

import time
from collections.abc import Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from itertools import chain
from logging import Logger
from pathlib import Path
from typing import Any

from tqdm import tqdm

from lecturekit.grading import cluster
from lecturekit.grading.journal import Journal, fingerprint
from lecturekit.grading.lock import Interrupts, lab_lock
from lecturekit.grading.options import GradingOptions
from lecturekit.grading.reader import shown
from lecturekit.grading.summary import Summary, plain
from lecturekit.grading.work import BY_HAND, PENDING, Graded, Job
from lecturekit.labs import LabError

PENDING_KEY = "-pending"  # ends the recorded key of a submission that still needs a GPU
IN_A_ROW = 3  # recordings that fail one after the other mean that it is the gradebook's fault, not the submission's


def grade(
    config: Any,
    lab: str,
    students: Sequence[str] | None = None,
    notebook: str = "*",
    force: bool = False,
    workers: int = 0,
    scheduler: str | None = None,
    log: Logger | None = None,
    progress: bool = True,
    options: GradingOptions | None = None,
) -> Summary:
    """Grade the submissions of a lab and record them in nbgrader's gradebook.

    config: as `course.settings` reads it.   students: ids or globs, all by default.   notebook: a glob.   force: grade
    again what is graded already.   workers: processes on this machine; 0 or 1 grades in this process.   scheduler: the
    address of a dask cluster, in place of workers.   log: where problems are told, the terminal by default.   progress:
    whether to draw a bar.   options: what nbgrader_config.py sets by default.

    A submission that cannot be graded does not stop the others; Summary.failed lists it. Ctrl-C and SIGTERM end the
    batch early and keep what is done. Raises Busy while another process grades this lab, and LabError when nothing can
    be graded at all.
    """
    from lecturekit.grading.assignment import Assignment
    from lecturekit.grading.record import Recorder, RecordError

    started = time.perf_counter()
    options = options or GradingOptions.from_config(config)
    try:
        assignment = Assignment(config, lab)
    except LookupError as error:
        raise LabError(str(error.args[0])) from error
    summary = Summary(lab)
    with ExitStack() as stack:
        stack.enter_context(lab_lock(assignment.course, lab))
        interrupts = stack.enter_context(Interrupts())
        try:
            submissions = assignment.submissions(students)
            _refuse_unknown(lab, students, [*submissions, *assignment.skipped])
            client = stack.enter_context(cluster.connect(scheduler)) if scheduler else None
            on_gpus = client is not None and cluster.gpus(client) > 0 and cluster.needs_gpu(lab)
            total = len(submissions) + len(assignment.skipped)
            bar = tqdm(total=total, desc=lab, unit=" submissions", disable=not progress, smoothing=0)
            batch = _Batch(
                assignment=assignment,
                recorder=stack.enter_context(Recorder(config, lab)),
                summary=summary,
                journal=Journal(assignment.course / "journal"),
                fingerprint=fingerprint(lab, options),
                interrupts=interrupts,
                bar=stack.enter_context(bar),
                log=log,
                notebook=notebook,
                force=force,
                has_gpu=on_gpus or (client is None and options.gpu),
            )
            for student, why in assignment.skipped.items():
                batch.fail(student, why)
            private = tuple(map(str, assignment.private))
            run = _Run(lab, options, min(workers, len(submissions)), client, on_gpus, private)
            with closing(run.outcomes(batch.needed(submissions))) as outcomes:
                for job, outcome in outcomes:
                    batch.take(job, outcome)
            batch.record_postponed()
            if students is None and notebook == "*" and not summary.failed:
                batch.journal.prune(lab)
        except KeyboardInterrupt:
            summary.interrupted = True
        except RecordError as error:  # not of one submission: the gradebook cannot be read
            raise LabError(str(error)) from error
    summary.elapsed = time.perf_counter() - started
    return summary


@dataclass(frozen=True)
class _Run:
    """Where and how jobs are run. hide: folders that student code must not see."""

    lab: str
    options: GradingOptions
    workers: int
    client: Any
    on_gpus: bool
    hide: tuple[str, ...]

    def outcomes(self, jobs: Iterator[Job]) -> Generator[cluster.Outcome, None, None]:
        """Have the jobs graded. No process is started when there are none."""
        first = next(jobs, None)
        if first is None:
            return
        jobs = chain([first], jobs)
        if self.client is not None:
            yield from cluster.run(self.client, jobs, self.lab, self.options, gpu=self.on_gpus, hide=self.hide)
        elif self.workers > 1:
            with cluster.local(self.workers) as client:
                yield from cluster.run(client, jobs, self.lab, self.options, hide=self.hide)
        else:
            yield from cluster.grade_here(jobs, self.lab, self.options, hide=self.hide)


def _refuse_unknown(lab: str, students: Sequence[str] | None, found: Iterable[str]) -> None:
    names = list(found)
    if not names and students is None:
        raise LabError(f"there are no submissions of {lab}")
    for pattern in students or ():
        if not any(fnmatchcase(name, pattern) for name in names):
            raise LabError(f"there is no submission of {lab} by {shown(pattern)}")


@dataclass
class _Submission:
    """One student's submission on its way. keys: of each notebook's result. left: how many are still to come."""

    student: str
    folder: Path
    key: str
    keys: dict[str, str]
    left: int
    results: dict[str, Graded] = field(default_factory=dict)
    ran: bool = False


@dataclass
class _Batch:
    """Which submissions are needed, and the way of their results into journal, gradebook and summary."""

    assignment: Any
    recorder: Any
    summary: Summary
    journal: Journal
    fingerprint: str
    interrupts: Interrupts
    bar: Any
    log: Logger | None
    notebook: str
    force: bool
    has_gpu: bool
    waiting: dict[str, _Submission] = field(default_factory=dict)
    postponed: list[_Submission] = field(default_factory=list)
    failures: int = 0  # recordings that failed, one after the other

    def needed(self, submissions: Mapping[str, Path]) -> Iterator[Job]:
        """The jobs that have to be run. Submissions that need none are finished on the way."""
        from lecturekit.grading.assignment import is_missing, zero

        for student, folder in submissions.items():
            try:
                jobs = [
                    job for job in self.assignment.jobs(student, folder) if fnmatchcase(job.notebook, self.notebook)
                ]
                key = self.assignment.key(jobs, folder, self.fingerprint)
            except Exception as error:
                self.fail(student, cluster.reason(error))
                continue
            if not jobs:
                raise LabError(f"{self.summary.lab} has no notebook {shown(self.notebook)}")
            if self._is_recorded(student, key):
                continue
            keys = {job.notebook: job.key(self.fingerprint) for job in jobs}
            self.waiting[student] = _Submission(student, folder, key, keys, left=len(jobs))
            for job in jobs:
                known = None if self.force else self._known(keys[job.notebook])
                if known is not None:
                    self._arrived(job, known)
                elif is_missing(job.staged):
                    self.take(job, zero(job))
                else:
                    yield job

    def take(self, job: Job, outcome: Graded | str) -> None:
        """Keep the result of a notebook that was run, or why there is none."""
        found = self.waiting[job.student]
        with self.interrupts.held():
            if isinstance(outcome, Graded):
                try:
                    self.journal.put(found.keys[job.notebook], outcome)
                    found.ran = True
                    for step, seconds in outcome.seconds.items():
                        self.summary.seconds[step] = self.summary.seconds.get(step, 0.0) + seconds
                except OSError as error:
                    outcome = f"its result could not be kept in {self.journal.folder}: {error.strerror or error}"
            self._arrived(job, outcome)

    def fail(self, student: str, why: str) -> None:
        """List a student as not graded."""
        if student not in self.summary.failed:
            self.bar.update()
            self.summary.failed[student] = why
            self._say(f"{shown(student)} · not graded: {plain(why)}")

    def record_postponed(self) -> None:
        """Try again to record what could not be: by now another program may have let go of the gradebook."""
        postponed, self.postponed, self.failures = self.postponed, [], 0
        why = ""
        for found in postponed:
            if self.failures < IN_A_ROW:
                kept = {name: self.journal.get(key) for name, key in found.keys.items()}
                found.results = {name: graded for name, graded in kept.items() if graded is not None}
                why = self._record(found) if len(found.results) == len(found.keys) else "its result is gone"
                found.results = {}
            if why:
                self.fail(found.student, f"graded, but not recorded: {why.removeprefix(f'{found.student}: ')}")

    def _is_recorded(self, student: str, key: str) -> bool:
        recorded = None if self.force else self.recorder.recorded(student)
        pending = recorded == key + PENDING_KEY
        if recorded != key and not (pending and not self.has_gpu):
            return False
        self.summary.skipped += 1
        self.summary.pending += pending
        self.bar.update()
        return True

    def _known(self, key: str) -> Graded | None:
        """What the journal has, if it is of use: what is pending can be graded where there is a GPU."""
        graded = self.journal.get(key)
        if graded is None or (self.has_gpu and _has(graded, PENDING)):
            return None
        self.journal.renew(key)
        return graded

    def _arrived(self, job: Job, outcome: Graded | str) -> None:
        found = self.waiting[job.student]
        found.left -= 1
        if isinstance(outcome, str):
            self.fail(job.student, f"{job.notebook}: {outcome}")
        else:
            found.results[job.notebook] = outcome
            for problem in outcome.problems:
                self._say(f"{shown(job.student)} · {shown(job.notebook)} · {plain(problem)}")
            if outcome.notes and not outcome.score:
                self._say(f"{shown(job.student)} · {shown(job.notebook)} · no points; {plain(outcome.notes[0])}")
        if found.left == 0:
            del self.waiting[job.student]
            if job.student not in self.summary.failed:
                self._finish(found)

    def _finish(self, found: _Submission) -> None:
        """Record a submission whose notebooks are all there; if that fails, once more at the end of the batch."""
        if self.failures >= IN_A_ROW or self._record(found):
            found.results = {}  # the journal has them; memory stays flat
            self.postponed.append(found)

    def _record(self, found: _Submission) -> str:
        """Write a submission into the gradebook. Returns why that failed, "" when it did not."""
        results = list(found.results.values())
        pending = any(_has(graded, PENDING) for graded in results)
        try:
            with self.interrupts.held():
                self.recorder.record(found.student, found.folder, results, found.key + PENDING_KEY * pending)
                self.failures = 0
                self._count(found, results, pending)
        except Exception as error:
            self.failures += 1
            return str(error) or type(error).__name__
        return ""

    def _count(self, found: _Submission, results: Sequence[Graded], pending: bool) -> None:
        summary = self.summary
        summary.graded += found.ran
        summary.from_journal += not found.ran
        summary.pending += pending
        summary.by_hand += any(_has(graded, BY_HAND) for graded in results)
        summary.problems += any(graded.problems for graded in results)
        summary.scores.append(sum(graded.score for graded in results))
        self.bar.update()

    def _say(self, line: str) -> None:
        if self.log is not None:
            self.log.warning(line)
        else:
            tqdm.write(line)


def _has(graded: Graded, status: str) -> bool:
    return any(mark.status == status for mark in graded.marks)
