"""`lecturekit grade` and `lecturekit report`: what the words on the command line come to."""

from pathlib import Path

import pytest

from lecturekit import cli
from lecturekit.grading import coordinator
from lecturekit.grading.lock import lab_lock
from lecturekit.grading.summary import Summary

CONFIG = """
from pathlib import Path
c = get_config()
c.CourseDirectory.root = str(Path(__file__).resolve().parent)
c.CourseDirectory.release_directory = "labs"
c.CourseDirectory.submitted_directory = "course/submitted"
c.Grader.cell_seconds = 7
"""


@pytest.fixture
def course(tmp_path, monkeypatch):
    """The current folder is a course with one released lab."""
    (tmp_path / "nbgrader_config.py").write_text(CONFIG)
    (tmp_path / "labs" / "lab99").mkdir(parents=True)
    (tmp_path / "labs" / "lab99" / "first.ipynb").touch()
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def asked(course, monkeypatch):
    """What the coordinator was asked to do; it answers with `asked["summary"]`."""
    seen = {"summary": Summary("lab99", graded=3)}

    def grade(config, lab, **options):
        seen.update(options, root=Path(config.CourseDirectory.root), lab=lab)
        return seen["summary"]

    monkeypatch.setattr(coordinator, "grade", grade)
    return seen


def test_the_course_is_that_of_the_current_folder_and_its_settings_count(asked, course, capsys):
    assert cli.main(["grade", "lab99"]) == 0
    assert asked["root"] == course and asked["lab"] == "lab99" and asked["students"] is None
    assert asked["options"].cell_seconds == 7 and asked["options"].isolation == "" and not asked["options"].gpu
    assert asked["workers"] >= 1 and asked["scheduler"] is None and not asked["force"]
    assert capsys.readouterr().out.startswith("lab99\n  graded                3\n")


def test_every_option_reaches_the_coordinator(asked):
    words = ["--workers", "3", "--student", "ada", "bob", "--student", "cyd", "--force", "--gpu", "--unsafe"]
    assert cli.main(["grade", "lab99", *words]) == 0
    assert (asked["workers"], asked["students"], asked["force"]) == (3, ["ada", "bob", "cyd"], True)
    assert asked["options"].gpu and asked["options"].isolation == "none" and asked["options"].cell_seconds == 7
    assert cli.main(["grade", "lab99", "--scheduler", "tcp://127.0.0.1:1"]) == 0
    assert asked["scheduler"] == "tcp://127.0.0.1:1"


def test_by_default_there_is_a_worker_for_each_core(asked, monkeypatch):
    import psutil

    for cores, workers in ((6, 6), (None, 1)):
        monkeypatch.setattr(psutil, "cpu_count", lambda logical, cores=cores: cores)
        cli.main(["grade", "lab99"])
        assert asked["workers"] == workers


@pytest.mark.parametrize(("change", "status"), [({"failed": {"ada": "why"}}, 1), ({"interrupted": True}, 130), ({}, 0)])
def test_the_status_says_whether_all_is_graded(asked, change, status):
    asked["summary"] = Summary("lab99", graded=3, problems=2, pending=1, **change)
    assert cli.main(["grade", "lab99"]) == status


@pytest.mark.parametrize(
    "words",
    [
        ["grade"],
        ["grade", "lab99", "--workers", "0"],
        ["grade", "lab99", "--workers", "2", "--scheduler", "tcp://127.0.0.1:1"],
    ],
)
def test_wrong_usage_exits_with_2(words, course):
    with pytest.raises(SystemExit) as ended:
        cli.main(words)
    assert ended.value.code == 2


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["grade", "lab98"], "there is no released lab 'lab98'; labs: lab99"),
        (["report", "../labs/lab99"], "there is no released lab '../labs/lab99'"),
        (["grade", "lab99", "--roster", "r.csv"], "--roster goes with --submissions"),
        (["grade", "lab99", "--submissions", ".", "--roster", "r.csv"], "r.csv must be a CSV file with a first line"),
    ],
)
def test_what_there_is_not_is_one_sentence_and_exits_2(words, message, course, capsys):
    (course / "r.csv").write_text("student;id\nada;1\n")
    assert cli.main(words) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"lecturekit: {message}") and error.count("\n") == 1


def test_submissions_are_collected_first_with_the_roster(asked, course, monkeypatch, capsys):
    from lecturekit.grading import collect

    seen = []

    def fake(source, lab, submitted, roster=None, *, notebooks=()):
        assert "lab" not in asked, "grading began before collecting"
        seen.append((source, lab, submitted, roster, list(notebooks)))
        return [
            collect.Collected("a.ipynb", collect.COLLECTED, "ada", "first"),
            collect.Collected("b.txt", collect.SKIPPED, why="not a notebook"),
        ]

    monkeypatch.setattr(collect, "collect", fake)
    (course / "roster.csv").write_text("\ufeffname,id\nAnn Lee,ada\n", encoding="utf-8")
    assert cli.main(["grade", "lab99", "--submissions", "all.zip", "--roster", "roster.csv"]) == 0
    assert seen == [(Path("all.zip"), "lab99", course / "course" / "submitted", {"Ann Lee": "ada"}, ["first"])]
    printed = capsys.readouterr().out
    assert "b.txt · skipped: not a notebook\n1 of 2 files collected\n" in printed


def test_a_lab_that_is_being_graded_is_one_sentence_and_exits_1(course, monkeypatch, capsys):
    def grade(*_, **__):
        with lab_lock(course / "course", "lab99"):
            raise AssertionError("the lock was free")

    monkeypatch.setattr(coordinator, "grade", grade)
    with lab_lock(course / "course", "lab99"):
        assert cli.main(["grade", "lab99"]) == 1
    error = capsys.readouterr().err
    assert error.startswith("lecturekit: lab99 is being graded by process") and error.count("\n") == 1


def test_report_prints_where_the_page_is(course, monkeypatch, capsys):
    from lecturekit.grading import report

    monkeypatch.setattr(report, "write_report", lambda config, lab, output: output or Path("default.html"))
    assert cli.main(["report", "lab99"]) == 0
    assert cli.main(["report", "lab99", "--output", "page.html"]) == 0
    assert capsys.readouterr().out == "default.html\npage.html\n"
