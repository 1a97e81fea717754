"""`nbgrader autograde` and formgrader's button: our coordinator behind nbgrader's names, options and results."""

import asyncio
import json
import logging
import shutil
import sys
from types import ModuleType

import pytest
from nbgrader.apps import NbGraderAPI, api, autogradeapp
from nbgrader.apps.autogradeapp import AutogradeApp
from nbgrader.converters import Autograde as NbgraderAutograde
from nbgrader.converters import NbGraderException
from nbgrader.coursedir import CourseDirectory

from lecturekit.grading import autograde
from lecturekit.grading.course import settings
from lecturekit.labs import LabError

LAB = "lab99_tiny"


class Summary:
    """As much of the coordinator's as is looked at here."""

    def __init__(self, failed=(), interrupted=False):
        self.failed, self.interrupted = dict(failed), interrupted

    def table(self):
        return "the summary table"


@pytest.fixture
def coordinator(monkeypatch):
    """A stand-in for coordinator.grade: it keeps what it was called with, and gives back or raises `.result`."""
    module = ModuleType("lecturekit.grading.coordinator")
    module.calls, module.result = [], Summary()

    def grade(
        config, lab, students=None, notebook="*", force=False, workers=0, scheduler=None, log=None, progress=True
    ):
        given = {"students": students, "notebook": notebook, "force": force, "workers": workers}
        module.calls.append((config, lab, given))
        if log is not None:
            log.warning("told by the grader")
        if isinstance(module.result, BaseException):
            raise module.result
        return module.result() if callable(module.result) else module.result

    module.grade = grade
    monkeypatch.setitem(sys.modules, "lecturekit.grading.coordinator", module)
    return module


@pytest.fixture
def installed(monkeypatch):
    """nbgrader with our class in it, put back afterwards."""
    for owner, name in ((autogradeapp, "Autograde"), (api, "Autograde"), (NbGraderAPI, "get_submitted_timestamp")):
        monkeypatch.setattr(owner, name, getattr(owner, name))
    autograde.install()


@pytest.fixture
def submitted(tiny, released):
    """The course with a submission of anna's; what is submitted is gone afterwards."""
    folder = tiny.root / "course" / "submitted"
    shutil.rmtree(folder, ignore_errors=True)
    tiny.submit("anna", LAB, released)
    yield tiny
    shutil.rmtree(folder)


def started(course, **traits):
    config = settings(course.root)
    converter = autograde.Autograde(coursedir=CourseDirectory(config=config, assignment_id=LAB), config=config)
    for name, value in traits.items():
        setattr(converter.coursedir if converter.coursedir.has_trait(name) else converter, name, value)
    converter.start()


def command(course, monkeypatch, *words):
    """`nbgrader autograde WORDS` in this process, so that the stand-in is used."""
    monkeypatch.chdir(course.root)
    app = AutogradeApp()
    app.initialize(list(words))
    app.start()


# --- the class ------------------------------------------------------------------------------------------------------
def test_it_is_still_nbgraders_autograde_by_name_and_options():
    assert autograde.Autograde.__name__ == NbgraderAutograde.__name__
    assert issubclass(autograde.Autograde, NbgraderAutograde)
    own = set(autograde.Autograde.class_trait_names(config=True)) - set(
        NbgraderAutograde.class_trait_names(config=True)
    )
    assert own == {"workers"}


def test_all_students_by_default_and_those_that_are_named_else(tiny, coordinator):
    started(tiny)
    started(tiny, student_id="b*", notebook_id="problem1", force=True, workers=3)
    assert [lab for _, lab, _ in coordinator.calls] == [LAB, LAB]
    assert coordinator.calls[0][2] == {"students": None, "notebook": "*", "force": False, "workers": 0}
    assert coordinator.calls[1][2] == {"students": ["b*"], "notebook": "problem1", "force": True, "workers": 3}


def test_what_was_set_after_the_configuration_was_read_reaches_the_coordinator(tiny, coordinator):
    started(tiny, create_student=False, student_id_exclude="ben", submitted_directory="elsewhere")
    config = coordinator.calls[0][0]
    assert config.Autograde.create_student is False
    assert config.CourseDirectory.student_id_exclude == "ben"
    assert CourseDirectory(config=config).submitted_directory == "elsewhere"
    assert CourseDirectory(config=config).root == str(tiny.root)


def test_who_could_not_be_graded_is_named_at_the_end_with_the_reason(tiny, coordinator, caplog):
    coordinator.result = Summary({"zoe": "the disk is full", "ben": "a worker died"})
    with caplog.at_level(logging.ERROR), pytest.raises(NbGraderException, match="not graded: ben, zoe"):
        started(tiny)
    assert "ben was not graded: a worker died" in caplog.text and "the disk is full" in caplog.text


def test_a_lab_that_cannot_be_graded_at_all_is_an_nbgrader_error(tiny, coordinator):
    coordinator.result = LabError("another process grades this lab")
    with pytest.raises(NbGraderException, match="another process grades this lab"):
        started(tiny)


def test_a_batch_that_was_stopped_is_no_success(tiny, coordinator):
    coordinator.result = Summary(interrupted=True)
    with pytest.raises(NbGraderException, match="stopped; what is done is kept"):
        started(tiny)


def test_marks_without_running_are_refused(tiny, coordinator):
    config = settings(tiny.root)
    config.Execute.enabled = False
    converter = autograde.Autograde(coursedir=CourseDirectory(config=config, assignment_id=LAB), config=config)
    with pytest.raises(NbGraderException, match="--no-execute"):
        converter.start()
    assert coordinator.calls == []


def test_nbgraders_hooks_are_called_once(tiny, coordinator):
    seen = []
    hooks = {f"{when}_convert_hook": lambda when=when, **given: seen.append((when, given)) for when in ("pre", "post")}
    started(tiny, **hooks)
    assert [when for when, _ in seen] == ["pre", "post"]
    assert seen[0][1]["assignment"] == LAB and seen[0][1]["student"] == "*"


def test_it_works_inside_a_running_event_loop_as_formgraders_server_is(tiny, coordinator):
    """The coordinator may use asyncio.run or a synchronous dask client; neither works in a loop's own thread."""

    def with_a_loop():
        async def nothing():
            return Summary()

        return asyncio.run(nothing())

    coordinator.result = with_a_loop

    async def handler():
        started(tiny)

    asyncio.run(handler())
    assert len(coordinator.calls) == 1


# --- in nbgrader's place --------------------------------------------------------------------------------------------
def test_install_puts_it_where_nbgrader_looks_and_twice_is_once(installed):
    before = (autogradeapp.Autograde, api.Autograde, NbGraderAPI.get_submitted_timestamp)
    autograde.install()
    assert before == (autogradeapp.Autograde, api.Autograde, NbGraderAPI.get_submitted_timestamp)
    assert before[:2] == (autograde.Autograde, autograde.Autograde)


def test_the_api_answers_formgrader_as_before(tiny, coordinator, installed):
    nbgrader = NbGraderAPI(config=settings(tiny.root))
    done = nbgrader.autograde(LAB, "anna")
    assert done["success"] is True and "told by the grader" in done["log"] and "error" not in done
    assert coordinator.calls[0][2]["students"] == ["anna"] and coordinator.calls[0][2]["force"] is True
    coordinator.result = Summary({"anna": "the sandbox could not be started"})
    done = nbgrader.autograde(LAB, "anna", force=False, create=False)
    assert done["success"] is False and "NbGraderException: not graded: anna" in done["error"]
    assert "the sandbox could not be started" in done["log"]
    assert coordinator.calls[1][2]["force"] is False and coordinator.calls[1][0].Autograde.create_student is False
    json.dumps(done)  # what the handler does with it


def test_the_command_line_takes_nbgraders_options(tiny, coordinator, installed, monkeypatch):
    command(tiny, monkeypatch, LAB, "--student", "anna", "--force", "--notebook", "lab*", "--Autograde.workers=2")
    command(tiny, monkeypatch, LAB, "--create", "--CourseDirectory.student_id_exclude=ben")
    assert coordinator.calls[0][2] == {"students": ["anna"], "notebook": "lab*", "force": True, "workers": 2}
    assert coordinator.calls[1][0].CourseDirectory.student_id_exclude == "ben"


def test_the_command_line_ends_with_1_when_somebody_was_not_graded(tiny, coordinator, installed, monkeypatch):
    coordinator.result = Summary({"anna": "no"})
    with pytest.raises(SystemExit) as ended:
        command(tiny, monkeypatch, LAB)
    assert ended.value.code == 1


def test_help_lists_nbgraders_options_and_ours(tiny, installed, monkeypatch, capsys):
    with pytest.raises(SystemExit) as ended:
        command(tiny, monkeypatch, "--help-all")
    text = capsys.readouterr().out
    assert not ended.value.code
    assert "--Autograde.create_student" in text and "--Autograde.workers" in text and "--force" in text


@pytest.mark.parametrize("text", ["", "yesterday", "9999999999999999999", "2026-02-01 00:10:00 UTC"])
def test_a_damaged_timestamp_does_not_take_formgraders_list_down(submitted, installed, text):
    (submitted.root / "course" / "submitted" / "anna" / LAB / "timestamp.txt").write_text(text)
    nbgrader = NbGraderAPI(config=settings(submitted.root))
    (submission,) = [s for s in nbgrader.get_submissions(LAB) if s["student"] == "anna"]
    assert (submission["timestamp"] is not None) == text.startswith("2026")
    assert submission["autograded"] is False
