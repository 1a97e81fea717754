"""Grading on several processes: every job comes back once, whatever happens to the workers."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from pathlib import Path

import pytest

from lecturekit.grading import cluster
from lecturekit.grading.options import GradingOptions
from lecturekit.grading.work import Graded, Job
from lecturekit.labs import LabError

HERE = Path(__file__).parent
LAB = "lab99"


@pytest.fixture(scope="module")
def two():
    """A client of two local workers that can import the fake grader."""
    sys.path.insert(0, str(HERE))
    try:
        with cluster.local(2) as client:
            yield client
    finally:
        sys.path.remove(str(HERE))


@pytest.fixture
def folder(tmp_path):
    return tmp_path


def job(folder, student, does="pass", score=1.0):
    staged = {"score": score, "does": does, "runs": str(folder / "runs"), "metadata": {}, "cells": []}
    return Job(LAB, "one", student, staged, seed=2**62 + 1, notes=("A note.",))


def run(client, jobs, folder, **options):
    """{student: outcome}, each of which must have come exactly once."""
    keywords = {"options": GradingOptions(), "hide": (str(folder),), "grader": "fake_grading:Grader"} | options
    outcomes = list(cluster.run(client, iter(jobs), LAB, keywords.pop("options"), **keywords))
    students = [found.student for found, _ in outcomes]
    assert len(students) == len(set(students)), "a job came back twice"
    return {found.student: outcome for found, outcome in outcomes}


def runs(folder):
    return Counter(line.split()[0] for line in (folder / "runs").read_text().splitlines())


def pids(folder):
    return [int(line.split()[1]) for line in (folder / "runs").read_text().splitlines()]


def test_every_job_comes_back_as_it_would_in_this_process(two, folder, monkeypatch):
    monkeypatch.syspath_prepend(str(HERE))
    jobs = [job(folder, f"s{number}", score=number) for number in range(30)]
    there = run(two, jobs, folder)
    assert {student: graded.score for student, graded in there.items()} == {f"s{n}": n for n in range(30)}
    assert len(set(pids(folder))) == 2, "both workers had work"
    here = cluster.grade_here(iter(jobs), LAB, GradingOptions(), (str(folder),), "fake_grading:Grader")
    assert there == {found.student: outcome for found, outcome in here}


def test_local_workers_can_be_reached_from_this_machine_only_and_have_one_thread(two):
    import psutil

    workers = two.scheduler_info(n_workers=-1)["workers"]
    assert len(workers) == 2 and all(worker["nthreads"] == 1 for worker in workers.values())
    here = psutil.Process()
    sockets = [one for process in [here, *here.children(recursive=True)] for one in process.net_connections("inet")]
    listening = {one.laddr.ip for one in sockets if one.status == psutil.CONN_LISTEN}
    assert listening == {"127.0.0.1"}


def test_jobs_are_taken_only_as_fast_as_they_are_done(two, folder):
    taken, done, ahead = 0, 0, 0

    def jobs():
        nonlocal taken, ahead
        for number in range(60):
            taken += 1
            ahead = max(ahead, taken - done)
            yield job(folder, f"s{number}")

    for _ in cluster.run(two, jobs(), LAB, GradingOptions(), hide=(str(folder),), grader="fake_grading:Grader"):
        done += 1
    assert done == 60 and 2 < ahead <= 2 * cluster.AHEAD + 1


def test_a_raising_notebook_is_tried_twice_and_named(two, folder):
    found = run(two, [job(folder, "ada", "raise"), job(folder, "bob", "raise once"), job(folder, "cyd")], folder)
    assert found["ada"].startswith("ZeroDivisionError: in ada") and isinstance(found["bob"], Graded)
    assert runs(folder) == {"ada": 2, "bob": 2, "cyd": 1}


def test_a_notebook_that_kills_its_workers_is_given_up_and_takes_nobody_along(folder, monkeypatch):
    monkeypatch.syspath_prepend(str(HERE))
    honest = [job(folder, f"s{number}", "sleep 0.05") for number in range(20)]
    jobs = [*honest[:3], job(folder, "bad", "kill"), *honest[3:10], job(folder, "worse", "kill"), *honest[10:]]
    jobs.append(job(folder, "once", "kill once"))
    with cluster.local(2) as client:
        found = run(client, jobs, folder)
    assert found["bad"] == found["worse"] == "the worker that graded it died, 3 times"
    assert all(isinstance(found[one.student], Graded) for one in honest) and isinstance(found["once"], Graded)
    assert runs(folder)["bad"] == runs(folder)["worse"] == cluster.DEATHS


def test_a_worker_killed_in_mid_run_loses_nothing(folder, monkeypatch):
    monkeypatch.syspath_prepend(str(HERE))
    jobs = [job(folder, f"s{number}", "sleep 0.1", score=number) for number in range(40)]

    def kill_two():
        for count in (5, 20):
            while not (folder / "runs").exists() or len(pids(folder)) < count:
                time.sleep(0.02)
            os.kill(pids(folder)[-1], signal.SIGKILL)

    killer = threading.Thread(target=kill_two)
    killer.start()
    with cluster.local(2) as client:
        found = run(client, jobs, folder)
    killer.join()
    assert {student: graded.score for student, graded in found.items()} == {f"s{n}": n for n in range(40)}
    assert len(set(pids(folder))) >= 3, "no worker was replaced"


def test_workers_of_another_version_are_refused_with_both_versions(two, folder, monkeypatch):
    own = cluster.identity(LAB)
    monkeypatch.setattr(cluster, "identity", lambda lab: own | {"torch": "1.0.0"})
    with pytest.raises(LabError, match=rf"worker tcp://.* has torch {own['torch']}, but the coordinator has 1.0.0"):
        run(two, [job(folder, "ada")], folder)
    monkeypatch.setattr(cluster._Batch, "refuse_mismatch", lambda self: None)
    with pytest.raises(LabError, match="use the same checkout and environment on both"):
        run(two, [job(folder, "ada")], folder)
    assert not (folder / "runs").exists()


def test_a_grader_that_cannot_start_stops_the_batch(two, folder):
    (folder / "cannot-start").touch()
    with pytest.raises(LabError, match="bubblewrap is not installed"):
        run(two, [job(folder, f"s{number}") for number in range(9)], folder)
    (folder / "cannot-start").unlink()
    assert len(run(two, [job(folder, "ada")], folder)) == 1


def test_a_grader_is_kept_for_the_next_notebook_and_replaced_after_it_raised(monkeypatch, folder):
    monkeypatch.syspath_prepend(str(HERE))
    import fake_grading

    made = []

    class Counted(fake_grading.Grader):
        def __init__(self, *arguments, **options):
            super().__init__(*arguments, **options)
            made.append(self)

    monkeypatch.setattr(fake_grading, "Grader", Counted)
    jobs = [job(folder, "ada"), job(folder, "bob"), job(folder, "cyd", "raise"), job(folder, "dee")]
    options = GradingOptions()
    assert len(list(cluster.grade_here(iter(jobs), LAB, options, (str(folder),), "fake_grading:Grader"))) == 4
    assert len(made) == 3 and all(grader.closed for grader in made)


def test_a_batch_given_up_half_way_closes_its_grader(monkeypatch, folder):
    monkeypatch.syspath_prepend(str(HERE))
    import fake_grading

    closed = []
    monkeypatch.setattr(fake_grading.Grader, "__exit__", lambda self, *_: closed.append(self))
    jobs = iter([job(folder, "ada"), job(folder, "bob")])
    outcomes = cluster.grade_here(jobs, LAB, GradingOptions(), (str(folder),), "fake_grading:Grader")
    next(outcomes)
    outcomes.close()
    assert len(closed) == 1


def test_no_scheduler_is_one_sentence():
    with (
        pytest.raises(LabError, match="there is no dask scheduler at tcp://127.0.0.1:9"),
        cluster.connect("tcp://127.0.0.1:9", wait=1),
    ):
        pass
    with (
        pytest.raises(LabError, match="there is no dask scheduler at nonsense://x"),
        cluster.connect("nonsense://x", wait=1),
    ):
        pass


class Site:
    """A scheduler and workers started as cluster.py says."""

    def __init__(self, folder):
        self.file = folder / "scheduler.json"
        self.processes = []
        self._start("scheduler", "--host", "127.0.0.1", "--port", "0", "--no-dashboard")
        deadline = time.monotonic() + 60
        while not self.file.exists():
            assert time.monotonic() < deadline
            time.sleep(0.1)

    def worker(self, *words):
        self._start("worker", "--host", "127.0.0.1", "--nworkers", "1", "--nthreads", "1", "--no-dashboard", *words)

    def _start(self, what, *words):
        command = [sys.executable, "-m", "dask", what, "--scheduler-file", str(self.file), *words]
        env = dict(os.environ, PYTHONPATH=os.pathsep.join([str(HERE.parents[1]), str(HERE)]), OMP_NUM_THREADS="1")
        process = subprocess.Popen(
            command, env=env, cwd=self.file.parent, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        self.processes.append(process)

    def close(self):
        for process in reversed(self.processes):
            process.terminate()
        for process in self.processes:
            process.wait(30)


@pytest.fixture
def site(folder):
    site = Site(folder)
    site.address = json.loads(site.file.read_text())["address"]
    yield site
    site.close()


def test_questions_that_need_a_gpu_go_to_workers_tagged_with_one(site, folder):
    with pytest.raises(LabError, match="has no workers: start `dask worker"), cluster.connect(site.address, wait=1):
        pass
    site.worker()
    jobs = [job(folder, f"s{number}", "gpu") for number in range(8)]
    with cluster.connect(site.address, wait=60) as client:
        assert cluster.gpus(client) == 0
        assert {graded.marks[0].status for graded in run(client, jobs, folder).values()} == {"pending"}
        site.worker("--resources", "GPU=1")
        client.wait_for_workers(2, timeout=60)
        assert cluster.gpus(client) == 1
        before = set(pids(folder))
        assert {graded.marks[0].status for graded in run(client, jobs, folder, gpu=True).values()} == {"passed"}
        assert len(set(pids(folder)) - before) == 1, "all of them ran on the one with a GPU"


def test_a_lost_scheduler_is_one_sentence(site, folder):
    site.worker()
    with cluster.connect(site.address, wait=60) as client:
        jobs = (job(folder, f"s{number}", "sleep 0.1") for number in range(200))
        outcomes = cluster.run(client, jobs, LAB, GradingOptions(), hide=(str(folder),), grader="fake_grading:Grader")
        next(outcomes)
        site.processes[0].kill()
        with pytest.raises(LabError, match="the scheduler was lost; what was graded is kept"):
            list(outcomes)


def test_which_labs_need_a_gpu_is_asked_of_their_questions(monkeypatch):
    from lecturekit.checking import questions

    assert not cluster.needs_gpu("lab00_none")
    one = questions()[0]
    monkeypatch.setattr(one, "needs_gpu", True, raising=False)
    assert cluster.needs_gpu(one.lab)


def test_a_job_and_its_result_travel_as_json(folder, monkeypatch):
    """run_job takes and gives text, so nothing that a student made is unpickled in the coordinator."""
    monkeypatch.syspath_prepend(str(HERE))
    sent = job(folder, "ada", score=3.0)
    text = json.dumps(sent.to_data())
    assert Job.from_data(json.loads(text)) == sent
    back = cluster.run_job(
        text, GradingOptions().to_data(), cluster.identity(LAB), (str(folder),), "fake_grading:Grader"
    )
    assert isinstance(back, str) and Graded.from_data(json.loads(back)).score == 3.0
    cluster.close_graders()
    assert not cluster._warm
