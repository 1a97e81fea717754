"""The command line: help for every command, one-sentence errors, the right exit status."""

import subprocess
import sys

import pytest

from lecturekit import cli

COMMANDS = ("models", "release", "labs-full", "results", "questions", "prove", "grade", "report")


def test_help_describes_every_command(capsys):
    with pytest.raises(SystemExit) as ended:
        cli.main(["--help"])
    assert ended.value.code == 0
    printed = capsys.readouterr().out
    assert all(command in printed for command in COMMANDS)


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_explains_itself(command, capsys):
    with pytest.raises(SystemExit) as ended:
        cli.main([command, "--help"])
    assert ended.value.code == 0
    description = capsys.readouterr().out.split("\n\n")[1].strip()
    assert description[0].isupper() and description.endswith(".")


@pytest.mark.parametrize("words", [[], ["grade-all"], ["release", "--fast"], ["prove", "--seeds", "0"]])
def test_wrong_usage_exits_with_2(words, capsys):
    with pytest.raises(SystemExit) as ended:
        cli.main(words)
    assert ended.value.code == 2
    assert "usage:" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["release", "lab00_none"], "there is no lab 'lab00_none'"),
        (["labs-full", "lab00_none"], "there is no lab 'lab00_none'"),
        (["prove", "lora.none"], "there is no question 'lora.none'"),
        (["questions", "--lab", "lab00_none"], "there are no questions of lab 'lab00_none'"),
        (["models", "gpt-9"], "there is no model 'gpt-9'"),
    ],
)
def test_unknown_names_are_one_sentence_and_exit_2(words, message, capsys):
    assert cli.main(words) == 2
    captured = capsys.readouterr()
    assert captured.err.startswith(f"lecturekit: {message}") and captured.err.count("\n") == 1


def test_failure_is_one_sentence_and_exits_1(monkeypatch, capsys):
    from lecturekit import labs

    def broken():
        raise labs.LabError("the disk is full")

    monkeypatch.setattr(labs, "repository", broken)
    assert cli.main(["results"]) == 1
    assert capsys.readouterr().err == "lecturekit: the disk is full\n"


def test_a_bug_keeps_its_traceback(monkeypatch):
    from lecturekit import labs

    def broken():
        raise ZeroDivisionError

    monkeypatch.setattr(labs, "repository", broken)
    with pytest.raises(ZeroDivisionError):
        cli.main(["results"])


def test_questions_lists_ids_points_and_labs(capsys):
    assert cli.main(["questions", "--lab", "lab05_lora"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert any(line.startswith("lora.merge ") and "points" in line for line in lines)
    assert all("lab05_lora" in line for line in lines)


def test_prove_reports_failure_as_status(monkeypatch):
    from lecturekit.checking import prove

    asked = []
    monkeypatch.setattr(prove, "main", lambda ids, seeds: asked.append((ids, seeds)) or 3)
    assert cli.main(["prove", "lora.merge", "--seeds", "2"]) == 1
    assert asked == [(["lora.merge"], 2)]


def test_results_writes_the_page(monkeypatch, tmp_path, capsys):
    from lecturekit import labs

    monkeypatch.setattr(labs, "repository", lambda: tmp_path)
    assert cli.main(["results"]) == 0
    assert capsys.readouterr().out == "docs/results.md\n"
    assert "0 of 40 claims" in (tmp_path / "docs" / "results.md").read_text()


def test_help_is_quick_because_imports_are_lazy():
    """Asking for help must not import torch or nbgrader."""
    code = "import sys, lecturekit.cli as cli\ntry: cli.main(['--help'])\nexcept SystemExit: pass\n"
    code += "sys.exit(any(name in sys.modules for name in ('torch', 'nbgrader', 'transformers')))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, check=False).returncode == 0
