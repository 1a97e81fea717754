"""Grade on several processes, here or on other machines, with dask.distributed.

On this machine `local` starts the workers. For several machines, each with a checkout of the same version of the course
and the same models, start by hand, in a network that only you use (whoever reaches the scheduler can run code):

    dask scheduler --host 10.0.0.1 --no-dashboard
    dask worker tcp://10.0.0.1:8786 --nworkers 8 --nthreads 1 --no-dashboard
    dask worker tcp://10.0.0.1:8786 --nworkers 1 --nthreads 1 --no-dashboard --resources GPU=1      # one a GPU
    lecturekit grade lab05_lora --scheduler tcp://10.0.0.1:8786

With TLS set up in dask's own configuration, tls:// addresses work too. Workers get jobs and give results back as JSON;
they write nothing. A worker that dies is replaced and its notebooks are graded again elsewhere; a notebook during which
workers keep dying is tried alone, and given up after the third death.
"""

from __future__ import annotations

import atexit
import functools
import importlib
import json
import logging
import signal
import threading
from collections import deque
from collections.abc import Iterator
from concurrent.futures import CancelledError
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from lecturekit.grading.journal import identity
from lecturekit.grading.options import GradingOptions
from lecturekit.grading.work import Graded, Job
from lecturekit.labs import LabError

Outcome = tuple[Job, Graded | str]  # a job and its result, or why there is none
GRADER = "lecturekit.grading.execute:Grader"
ATTEMPTS = 2  # how often a notebook is tried whose grading raises
DEATHS = 3  # how many workers may die over one notebook
AHEAD = 4  # jobs handed out for each worker, so that none waits for the coordinator and memory stays flat
REMEDY = "use the same checkout and environment on both, and restart the worker"
LOST = "the scheduler was lost; what was graded is kept: start again to go on"


class CannotStart(RuntimeError):
    """The grader cannot start at all, as without a sandbox: no matter of one notebook."""


class Mismatch(RuntimeError):
    """Coordinator and worker are not the same version."""


class WarmGrader:
    """One grader that is kept for the next notebook, and started anew after it raised."""

    def __init__(self, lab: str, options: GradingOptions, hide: tuple[str, ...], grader: str) -> None:
        self._make = functools.partial(_attribute(grader), lab, options, hide=tuple(map(Path, hide)))
        self._grader: Any = None
        self._started = False

    def grade(self, job: Job) -> Graded:
        """Grade one notebook. Raises CannotStart when no grader ever started, else what the grader raises."""
        if self._grader is None:
            try:
                self._grader = self._make().__enter__()
            except Exception as error:
                if self._started:
                    raise
                raise CannotStart(str(error) or type(error).__name__) from error
            self._started = True
        try:
            return self._grader.grade(job)
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Stop the grader and its jail."""
        grader, self._grader = self._grader, None
        if grader is not None:
            grader.__exit__(None, None, None)


def _attribute(name: str) -> Any:
    module, _, attribute = name.partition(":")
    return getattr(importlib.import_module(module), attribute)


def grade_here(
    jobs: Iterator[Job], lab: str, options: GradingOptions, hide: tuple[str, ...] = (), grader: str = ""
) -> Iterator[Outcome]:
    """Grade one notebook after another in this process. Raises LabError when no grader can be started.

    hide: folders that student code must not see, wherever they lie.
    """
    warm = WarmGrader(lab, options, hide, grader or GRADER)
    try:
        for job in jobs:
            outcome: Graded | str = ""
            for _ in range(ATTEMPTS):
                try:
                    outcome = warm.grade(job)
                    break
                except CannotStart as error:
                    raise LabError(str(error)) from error
                except Exception as error:
                    outcome = reason(error)
            yield job, outcome
    finally:
        warm.close()


# --- in the worker ----------------------------------------------------------------------------------------------------
_warm: dict[tuple[Any, ...], WarmGrader] = {}
_one_at_a_time = threading.Lock()  # a worker that was started with several threads still grades one notebook at a time


def run_job(
    job_data: str, options_data: dict[str, Any], expected: dict[str, str], hide: tuple[str, ...], grader: str
) -> str:
    """The task: grade one notebook. Job and result are JSON. expected: the coordinator's `identity`."""
    job = Job.from_data(json.loads(job_data))
    if unlike := difference(job.lab, expected):
        from distributed import get_worker

        raise Mismatch(f"worker {get_worker().address} has {unlike}")
    options = GradingOptions(**options_data)
    with _one_at_a_time:
        name = (job.lab, options, tuple(hide), grader)
        warm = _warm.setdefault(name, WarmGrader(*name))
        return json.dumps(warm.grade(job).to_data())


def difference(lab: str, expected: dict[str, str]) -> str:
    """In what this process is not like the coordinator, whose `identity` is given, "" for nothing."""
    found = identity(lab)
    for name, value in expected.items():
        if found.get(name) != value:
            return f"{name} {found.get(name)}, but the coordinator has {value}: {REMEDY}"
    return ""


@atexit.register
def close_graders() -> None:
    """Stop the graders that this process keeps, and with them their jails."""
    while _warm:
        _warm.popitem()[1].close()


def dask_setup(_worker: Any) -> None:
    """Run in each worker of `local` at its start: Ctrl-C reaches all processes of a terminal, but only one is meant."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)


# --- in the coordinator -----------------------------------------------------------------------------------------------
@contextmanager
def local(workers: int) -> Iterator[Any]:
    """A client of this many worker processes on this machine, reachable from this machine only."""
    import dask
    from distributed import Client, LocalCluster

    settings: dict[str, Any] = {
        # the first death makes its jobs suspects, which `run` then tries alone
        "distributed.scheduler.allowed-failures": 0,
        # a result that a worker died with is fetched in vain for so long, then graded again; by default half a minute
        "distributed.comm.timeouts.connect": "3s",
        "distributed.scheduler.http.routes": [],
        "distributed.worker.http.routes": [],
        "distributed.worker.profile.enabled": False,  # it samples our stack a hundred times a second
    }
    with (
        _quiet(),
        dask.config.set(settings),
        LocalCluster(
            n_workers=workers,
            threads_per_worker=1,
            processes=True,
            host="127.0.0.1",
            dashboard_address="127.0.0.1:0",
            worker_dashboard_address="127.0.0.1:0",
            scheduler_kwargs={"dashboard": False},
            silence_logs=logging.CRITICAL,
            memory_limit=0,  # the jails have limits of their own
            preload=[__name__],
        ) as cluster,
        Client(cluster, set_as_default=False) as client,
    ):
        yield client


@contextmanager
def connect(scheduler: str, wait: float = 30.0) -> Iterator[Any]:
    """A client of a cluster that is already running, with at least one worker. Raises LabError."""
    from distributed import Client

    with _quiet():
        try:
            client = Client(scheduler, timeout=wait, set_as_default=False)
        except (OSError, ValueError) as error:
            raise LabError(f"there is no dask scheduler at {scheduler} that can be used: {reason(error)}") from error
        with client:
            try:
                client.wait_for_workers(1, timeout=wait)
            except TimeoutError as error:
                raise LabError(
                    f"the scheduler at {scheduler} has no workers: start `dask worker {scheduler}`"
                ) from error
            yield client


def gpus(client: Any) -> int:
    """How many of the cluster's workers are tagged with a GPU."""
    workers = client.scheduler_info(n_workers=-1)["workers"].values()
    return sum(worker["resources"].get("GPU", 0) > 0 for worker in workers)


def needs_gpu(lab: str) -> bool:
    """Whether any question of a lab can be judged on a GPU only."""
    from lecturekit.checking import questions

    return any(question.needs_gpu for question in questions(lab))


@dataclass
class _Flight:
    """A job that was handed out. tries: how often its grading raised. deaths: of workers that had it."""

    job: Job
    tries: int = 0
    deaths: int = 0
    alone: bool = False


def run(
    client: Any,
    jobs: Iterator[Job],
    lab: str,
    options: GradingOptions,
    gpu: bool = False,
    hide: tuple[str, ...] = (),
    grader: str = "",
) -> Iterator[Outcome]:
    """Grade jobs on a cluster, each exactly once, in the order in which they are done.

    gpu: give them to the workers tagged with a GPU.   hide: folders that student code must not see, wherever they lie.
    Jobs are taken from `jobs` only as fast as they are done. Raises LabError when a worker is another version or cannot
    grade, or when the scheduler is lost.
    """
    from distributed.comm import CommClosedError

    options = replace(options, gpu=options.gpu or gpu)
    resources = {"GPU": 1} if gpu else None
    batch = _Batch(client, lab, options, resources, hide, grader or GRADER, identity(lab))
    try:
        batch.refuse_mismatch()
        yield from batch.outcomes(jobs)
    except CommClosedError as error:
        raise LabError(LOST) from error
    finally:
        batch.close()


@dataclass
class _Batch:
    """The jobs that are out at the workers, and those that workers died over."""

    client: Any
    lab: str
    options: GradingOptions
    resources: dict[str, int] | None
    hide: tuple[str, ...]
    grader: str
    expected: dict[str, str]
    flying: dict[str, tuple[Any, _Flight]] = field(default_factory=dict)
    suspects: deque[_Flight] = field(default_factory=deque)
    count: int = 0
    any_done: bool = False

    def refuse_mismatch(self) -> None:
        """Ask every worker before work is lost; those that come later are asked with each job."""
        try:
            answers = self.client.run(difference, self.lab, self.expected)
        except (ImportError, AttributeError, TypeError) as error:
            raise LabError(f"a worker has no grader like this one ({reason(error)}): {REMEDY}") from error
        for address, unlike in answers.items():
            if unlike:
                raise LabError(f"worker {address} has {unlike}")

    def outcomes(self, jobs: Iterator[Job]) -> Iterator[Outcome]:
        from distributed import as_completed

        done = as_completed(loop=self.client.loop)
        more = True
        while more or self.flying or self.suspects:
            while more and len(self.flying) < AHEAD * max(1, sum(self.client.nthreads().values())):
                job = next(jobs, None)
                more = job is not None
                if job is not None:
                    done.add(self._submit(_Flight(job)))
            if not self.flying:
                if not self.suspects:
                    break
                done.add(self._submit(replace(self.suspects.popleft(), alone=True)))
            future = next(done)
            _, flight = self.flying.pop(future.key)
            outcome = self._outcome(future, flight)
            if isinstance(outcome, _Flight):
                if outcome.deaths:
                    self.suspects.append(outcome)
                else:
                    done.add(self._submit(outcome))
            else:
                self.any_done = True
                yield flight.job, outcome

    def _submit(self, flight: _Flight) -> Any:
        self.count += 1  # a new name each time: dask answers a known one with what it had before
        key = f"grade-{flight.job.key('')}-{self.count}"
        future = self.client.submit(
            run_job,
            json.dumps(flight.job.to_data()),
            self.options.to_data(),
            self.expected,
            self.hide,
            self.grader,
            key=key,
            pure=False,
            resources=self.resources,
        )
        self.flying[key] = (future, flight)
        return future

    def _outcome(self, future: Any, flight: _Flight) -> Graded | str | _Flight:
        """A result, or why there is none, or the job to try again."""
        from distributed import KilledWorker

        try:
            return Graded.from_data(json.loads(future.result()))
        except CancelledError:  # we cancel nothing ourselves before the end
            raise LabError(LOST) from None
        except Exception as raised:
            error = raised
        if isinstance(error, KilledWorker):
            # who was merely waiting at a worker that died is blamed as well, so only deaths while alone are sure
            deaths = error.allowed_failures + 1
            again = replace(flight, deaths=flight.deaths + deaths, alone=False)
            if flight.alone and again.deaths >= DEATHS:
                return f"the worker that graded it died, {again.deaths} times"
            return again
        if isinstance(error, Mismatch) or (isinstance(error, CannotStart) and not self.any_done):
            raise LabError(str(error)) from error
        again = replace(flight, tries=flight.tries + 1)
        return again if again.tries < ATTEMPTS else reason(error)

    def close(self) -> None:
        """Take back what is not done, and let the workers stop their jails."""
        if self.client.status != "running":
            return
        futures = [future for future, _ in self.flying.values()]
        if futures:
            self.client.cancel(futures, force=True)
        else:
            self.client.run(close_graders, on_error="ignore")


def reason(error: BaseException) -> str:
    """An exception as one line."""
    return " ".join(f"{type(error).__name__}: {error}".split())[:500]


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep dask from telling of lost connections and restarted workers: what matters of it is in the summary."""
    loggers = [logging.getLogger(name) for name in ("distributed", "tornado")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
