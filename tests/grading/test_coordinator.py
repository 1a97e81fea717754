"""A batch: nothing is graded twice, nothing is lost, one bad submission stops nobody. Without nbgrader and a jail."""

import json
import logging
import os
import random
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

HERE = Path(__file__).parent


@pytest.fixture
def course(tmp_path, monkeypatch):
    """An empty course whose grader, submissions and gradebook are fakes."""
    monkeypatch.syspath_prepend(str(HERE))
    import fake_grading

    fake_grading.install(monkeypatch.setattr)
    return fake_grading.Course(tmp_path / "root")


def start(course, workers=0):
    """Grade in a process of its own, at the head of a process group."""
    code = "import sys; sys.path.insert(0, sys.argv[1]); import fake_grading; sys.exit(fake_grading.main(sys.argv[2:]))"
    command = [sys.executable, "-c", code, str(HERE), str(course.root), str(workers)]
    env = dict(os.environ, PYTHONPATH=str(HERE.parents[1]), OMP_NUM_THREADS="1")
    return subprocess.Popen(
        command, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True
    )


def wait_for(claim, limit=60):
    deadline = time.monotonic() + limit
    while not claim():
        assert time.monotonic() < deadline, "it never came true"
        time.sleep(0.02)


def test_a_class_is_graded_and_counted(course):
    for number in range(5):
        course.submit(f"s{number}", score=number)
    summary = course.grade()
    assert course.scores == {f"s{number}": number for number in range(5)}
    assert (summary.graded, summary.from_journal, summary.skipped, summary.failed) == (5, 0, 0, {})
    assert summary.status == 0
    table = summary.table()
    assert "score, mean · median  2.0 · 2.0" in table and "run 75 % · judge 25 %" in table


def test_a_second_grading_skips_what_has_not_changed(course):
    course.submit("ada")
    course.submit("bob")
    course.grade()
    course.submit("bob", score=9.0)
    summary = course.grade()
    assert (summary.graded, summary.skipped) == (1, 1)
    assert course.runs == ["ada", "bob", "bob"] and course.records == ["ada", "bob", "bob"]
    assert course.scores["bob"] == 9.0


def test_results_in_the_journal_are_recorded_without_being_run_again(course):
    course.submit("ada")
    course.grade()
    (course.course / "recorded" / "ada.json").unlink()
    summary = course.grade()
    assert (summary.graded, summary.from_journal) == (0, 1)
    assert course.runs == ["ada"] and course.scores == {"ada": 7.0}


def test_an_old_version_handed_in_again_counts_again(course):
    from lecturekit.grading.journal import Journal

    course.submit("ada", score=1.0)
    course.submit("bob", "raise")  # so that nothing is pruned
    course.grade()
    course.submit("ada", score=2.0)
    course.grade()
    course.submit("ada", score=1.0)
    summary = course.grade()
    assert summary.from_journal == 1 and course.scores["ada"] == 1.0
    ((_, graded),) = Journal(course.course / "journal").results(course.lab)
    assert graded.score == 1.0


def test_force_runs_everything_again(course):
    course.submit("ada")
    course.grade()
    summary = course.grade(force=True)
    assert summary.graded == 1 and course.runs == ["ada", "ada"]


def test_only_the_students_and_notebooks_named_are_graded(course):
    for student in ("ada", "bob"):
        course.submit(student, notebook="one", score=1.0)
        course.submit(student, notebook="two", score=2.0)
    course.grade(students=["bob"], notebook="tw*")
    assert course.scores == {"bob": 2.0} and course.runs == ["bob"]


def test_all_notebooks_of_a_student_are_recorded_together(course):
    course.submit("ada", notebook="one", score=1.0)
    course.submit("ada", notebook="two", score=2.0)
    summary = course.grade()
    assert course.scores == {"ada": 3.0} and course.records == ["ada"] and summary.graded == 1


@pytest.mark.parametrize("workers", [0, 2])
def test_grading_that_raises_is_tried_twice_and_stops_nobody(course, workers, capsys):
    course.submit("ada")
    course.submit("bob", "raise")
    course.submit("cyd", "raise once")
    (course.course / "submitted" / "dee" / course.lab).mkdir(parents=True)
    course.submit("eve")
    summary = course.grade(workers=workers)
    assert set(course.scores) == {"ada", "cyd", "eve"}
    assert course.runs.count("bob") == 2 and course.runs.count("cyd") == 2
    assert "ZeroDivisionError: in bob" in summary.failed["bob"] and "unreadable" in summary.failed["dee"]
    assert set(summary.failed) == {"bob", "dee"} and summary.status == 1
    printed = capsys.readouterr().out + summary.table()
    assert "bob · not graded: one: ZeroDivisionError" in printed and "\x1b" not in printed


def test_one_failed_notebook_leaves_a_student_unrecorded_and_the_rest_in_the_journal(course):
    course.submit("ada", notebook="one")
    course.submit("ada", "raise", notebook="two")
    assert set(course.grade().failed) == {"ada"} and course.scores == {}
    course.submit("ada", notebook="two")
    assert course.grade().graded == 1 and course.scores == {"ada": 14.0}
    assert course.runs == ["ada"] * 4, "the first notebook once, the second twice and then once more"


def test_a_grader_that_cannot_start_is_one_error_and_not_one_a_student(course):
    from lecturekit.labs import LabError

    course.submit("ada")
    course.submit("bob")
    (course.course / "cannot-start").touch()
    for workers in (0, 2):
        with pytest.raises(LabError, match="bubblewrap is not installed"):
            course.grade(workers=workers)
    (course.course / "cannot-start").unlink()
    assert course.grade().graded == 2, "and the lock is free again"


def test_problems_are_told_a_line_each_without_control_characters(course, capsys, caplog):
    course.submit("ada", "problem")
    summary = course.grade()
    assert summary.problems == 1 and summary.status == 0
    printed = capsys.readouterr().out
    assert "ada · one · ran out of" in printed and "\x1b" not in printed
    with caplog.at_level(logging.WARNING):
        course.grade(force=True, log=logging.getLogger("nbgrader"))
    assert "ada · one · ran out of" in caplog.text and capsys.readouterr().out == ""


def test_what_needs_a_gpu_is_pending_until_there_is_one(course):
    from lecturekit.grading.options import GradingOptions

    course.submit("ada", "gpu", score=4.0)
    summary = course.grade()
    assert summary.pending == 1 and summary.status == 0 and course.scores == {"ada": 0}
    again = course.grade()
    assert (again.skipped, again.pending) == (1, 1) and course.runs == ["ada"]
    with_gpu = course.grade(options=GradingOptions(gpu=True))
    assert (with_gpu.graded, with_gpu.pending) == (1, 0) and course.scores == {"ada": 4.0}
    assert course.grade().skipped == 1, "and a machine without one does not take it back"


def test_a_gradebook_that_is_locked_for_a_while_costs_nothing(course):
    for number in range(6):
        course.submit(f"s{number}")
    (course.course / "locked").write_text("4")
    summary = course.grade()
    # three fail in a row, the others are put off without another try, and at the end the first fails once more
    assert course.runs == [f"s{number}" for number in range(6)]
    assert summary.failed == {"s0": "graded, but not recorded: the gradebook is locked"}
    assert len(course.scores) == 5 and summary.status == 1
    assert course.grade().from_journal == 1 and len(course.scores) == 6 and len(course.runs) == 6


def test_a_gradebook_that_stays_locked_is_not_waited_for_by_every_student(course):
    for number in range(20):
        course.submit(f"s{number:02}")
    (course.course / "locked").write_text("1000")
    summary = course.grade()
    assert len(summary.failed) == 20 and all("locked" in why for why in summary.failed.values())
    assert (course.course / "locked").read_text() == "994"
    (course.course / "locked").unlink()
    assert course.grade().from_journal == 20 and sorted(course.runs) == sorted(set(course.runs))


def test_a_full_disk_under_the_journal_fails_those_and_goes_on(course, monkeypatch):
    from lecturekit.grading.journal import Journal

    put = Journal.put

    def full(self, key, graded):
        if graded.student == "bob":
            raise OSError(28, "No space left on device")
        put(self, key, graded)

    monkeypatch.setattr(Journal, "put", full)
    for student in ("ada", "bob", "cyd"):
        course.submit(student)
    summary = course.grade()
    assert set(course.scores) == {"ada", "cyd"} and "No space left on device" in summary.failed["bob"]
    monkeypatch.undo()


def test_a_second_grader_is_told_who_the_first_is(course):
    from lecturekit.grading.lock import Busy, lab_lock

    course.submit("ada", "sleep 30")
    first = start(course)
    try:
        wait_for(lambda: course.runs == ["ada"])
        with pytest.raises(Busy, match=rf"process {first.pid}, which began at \d{{4}}-"):
            course.grade()
        with lab_lock(course.course, "lab98"):
            pass  # another lab of the course is free
    finally:
        first.kill()
        first.communicate()
    course.submit("ada")
    assert course.grade().graded == 1, "a killed grader does not keep the lock"


def test_two_locks_in_one_process_exclude_each_other(tmp_path):
    from lecturekit.grading.lock import Busy, lab_lock

    with lab_lock(tmp_path, "lab"), pytest.raises(Busy, match=f"process {os.getpid()}"), lab_lock(tmp_path, "lab"):
        pass
    with lab_lock(tmp_path, "lab"):
        pass


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupt_keeps_what_is_done_and_exits_130(course, number, workers):
    for student in ("ada", "bob", "cyd"):
        course.submit(student)
    for student in ("dee", "eve"):
        course.submit(student, "sleep 60")
    process = start(course, workers)
    wait_for(lambda: len(course.scores) == 3 and "dee" in course.runs)
    # Ctrl-C in a terminal reaches the workers as well
    os.killpg(process.pid, number) if number == signal.SIGINT else process.send_signal(number)
    printed, _ = process.communicate(timeout=60)
    assert process.returncode == 130, printed
    assert "stopped; what is done is kept" in printed and "Traceback" not in printed
    for student in ("dee", "eve"):
        course.submit(student)
    again = course.grade()
    assert (again.skipped, again.graded) == (3, 2) and len(course.scores) == 5


def test_an_interrupt_waits_until_a_result_is_written_down():
    from lecturekit.grading.lock import Interrupts

    done = []
    before = signal.getsignal(signal.SIGTERM)
    with Interrupts() as interrupts:
        with pytest.raises(KeyboardInterrupt), interrupts.held(), interrupts.held():
            os.kill(os.getpid(), signal.SIGTERM)
            done.append("written")
        with pytest.raises(KeyboardInterrupt), interrupts.held():
            os.kill(os.getpid(), signal.SIGINT)
            os.kill(os.getpid(), signal.SIGINT)
            done.append("the second comes through")
    assert done == ["written"]
    assert signal.getsignal(signal.SIGTERM) is before


def test_outside_the_main_thread_signals_are_left_alone(course):
    course.submit("ada")
    before = signal.getsignal(signal.SIGTERM)
    found = []
    thread = threading.Thread(target=lambda: found.append(course.grade().graded))
    thread.start()
    thread.join()
    assert found == [1] and signal.getsignal(signal.SIGTERM) is before


def test_jobs_are_made_only_as_they_are_graded(course, monkeypatch):
    import fake_grading

    made = []
    jobs = fake_grading.Assignment.jobs

    def counted(self, student, folder):
        made.append(len(course.runs))
        return jobs(self, student, folder)

    monkeypatch.setattr(fake_grading.Assignment, "jobs", counted)
    for number in range(10):
        course.submit(f"s{number}")
    course.grade()
    assert all(ahead - run <= 1 for ahead, run in enumerate(made))


def test_unknown_students_labs_and_empty_classes_are_one_sentence(course):
    from lecturekit.labs import LabError

    (course.course / "submitted").mkdir()
    with pytest.raises(LabError, match="there are no submissions of lab99"):
        course.grade()
    course.submit("ada")
    with pytest.raises(LabError, match="there is no submission of lab99 by bob"):
        course.grade(students=["ada", "bob"])
    with pytest.raises(LabError, match="no notebook three"):
        course.grade(notebook="three")
    course.course.rename(course.root / "elsewhere")
    with pytest.raises(LabError, match="lab99 is not in the gradebook"):
        course.grade()


@pytest.mark.parametrize("workers", [0, pytest.param(2, marks=pytest.mark.slow)])
def test_killed_at_any_point_and_started_again_nothing_is_lost_or_doubled(course, workers):
    import killing

    draw = random.Random(1)
    wanted = {f"s{number:02}": float(draw.randint(0, 10)) for number in range(40)}
    for student, score in wanted.items():
        course.submit(student, "sleep 0.1", score=score)
    kills = 6
    met = killing.kill_at_random(lambda: start(course, workers), seconds=4.0 if workers else 3.0, kills=kills, seed=2)
    assert met >= 3, "the kills came too late to show anything"
    assert course.scores == wanted
    in_flight = max(1, workers)
    assert len(course.runs) <= len(wanted) + met * in_flight, "what was in the journal was run again"
    assert len(course.records) <= len(wanted) + met, "what was recorded was recorded again"
    assert course.grade().skipped == len(wanted)
    journal = course.course / "journal" / "results"
    assert not list(journal.rglob(".*")), "half-written files are swept away"


def test_the_owner_file_tells_a_process_and_a_time(course):
    from lecturekit.grading.lock import lab_lock

    with lab_lock(course.course, course.lab):
        owner = json.loads((course.course / "locks" / f"{course.lab}.owner").read_text())
        assert owner["pid"] == os.getpid() and abs(owner["since"] - time.time()) < 600
    assert not (course.course / "locks" / f"{course.lab}.owner").exists()
