"""The `lecturekit` command: models, release, labs-full, results, questions, prove, grade, report.

Exit status: 0 done, 1 it failed (grade: something was not graded), 2 it was called wrongly, 130 interrupted. Errors are
one sentence on standard error.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

# what the extra `grading` installs
GRADING_PACKAGES = (
    *("nbgrader", "jupytext", "nbformat", "nbclient", "nbconvert", "traitlets", "distributed", "dask"),
    *("sqlalchemy", "jinja2", "markupsafe", "bleach", "tinycss2"),
)


class UsageError(ValueError):
    """A name on the command line that there is nothing of."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one subcommand. Returns the exit status; argparse itself exits with 2 on wrong usage."""
    options = _parser().parse_args(arguments)
    from lecturekit.labs import LabError, UnknownLab

    try:
        return options.run(options)
    except KeyboardInterrupt:
        print("lecturekit: interrupted", file=sys.stderr)
        return 130
    except ModuleNotFoundError as error:
        needed = error.name or ""
        if needed.split(".")[0] not in GRADING_PACKAGES:
            raise
        print(
            f"lecturekit: {needed} is not installed: run `make release`, which adds what grading needs", file=sys.stderr
        )
        return 1
    # the message of these is written for the person at the terminal; anything else is a bug and keeps its traceback
    except (LabError, OSError, ValueError) as error:
        print(f"lecturekit: {error}", file=sys.stderr)
        return 2 if isinstance(error, (UsageError, UnknownLab)) else 1


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="lecturekit", description="Tools of the course on LLM post-training.")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)

    def add(name: str, run: object, help: str) -> argparse.ArgumentParser:
        command = commands.add_parser(name, help=help, description=help[0].upper() + help[1:] + ".")
        command.set_defaults(run=run)
        return command

    models = add("models", _models, "fetch the models that the labs use, once; afterwards they load without a network")
    models.add_argument("names", nargs="*", metavar="MODEL", help="which models; all by default")
    models.add_argument("--verify", action="store_true", help="read every cached file and fetch a damaged model again")

    release = add("release", _release, "make the students' notebooks in labs/ from solutions/")
    release.add_argument("labs", nargs="*", metavar="LAB", help="which labs; all by default")

    full = add(
        "labs-full",
        _labs_full,
        "run the labs' solutions at full size, record what they measure, write the results page",
    )
    full.add_argument("labs", nargs="*", metavar="LAB", help="which labs; all by default")
    full.add_argument(
        "--timeout", type=_count, metavar="SECONDS", help="longest time for one cell; no limit by default"
    )
    full.add_argument("--seeds", type=_count, default=1, metavar="N", help="run each under N seeds; 1 by default")

    add("results", _results, "write docs/results.md from what was recorded under docs/results/")

    questions = add("questions", _questions, "list the questions that are graded")
    questions.add_argument("--lab", help="only those of one lab")

    prove = add("prove", _prove, "show that each question accepts right answers and names each known mistake")
    prove.add_argument("questions", nargs="*", metavar="QUESTION", help="which questions; all by default")
    prove.add_argument("--seeds", type=_count, default=1, metavar="N", help="with how many seeds; 1 by default")

    grade = add("grade", _grade, "grade the submissions of a lab and write the marks into nbgrader's gradebook")
    grade.epilog = (
        "Started again, it goes on where it was stopped and does nothing twice. Exit status: 0 all is graded, 1 "
        "something is not graded, or another process is grading this lab, 2 wrong usage, 130 interrupted."
    )
    grade.add_argument("lab", metavar="LAB")
    where = grade.add_mutually_exclusive_group()
    where.add_argument(
        "--workers",
        type=_count,
        metavar="N",
        help="so many at a time, each in a process; one a core by default; 1 grades in this process",
    )
    where.add_argument("--scheduler", metavar="ADDRESS", help="on a dask cluster, such as tcp://10.0.0.1:8786")
    grade.add_argument(
        "--submissions",
        type=Path,
        metavar="PATH",
        help="first collect what was downloaded from Canvas or Moodle: a zip file or a folder",
    )
    grade.add_argument(
        "--roster",
        type=Path,
        metavar="FILE.csv",
        help="with --submissions: a table with the columns name and id, for who goes under which id",
    )
    grade.add_argument("--student", nargs="+", action="extend", metavar="ID", help="only these; all by default")
    grade.add_argument("--force", action="store_true", help="grade again what is graded already")
    grade.add_argument("--gpu", action="store_true", help="let student code use the GPUs of this machine")
    grade.add_argument(
        "--unsafe",
        action="store_true",
        help="run student code without a sandbox, with all your rights: only for notebooks that you trust as your own",
    )

    report = add("report", _report, "write the instructor's page about a lab: scores, misconceptions, what to look at")
    report.add_argument("lab", metavar="LAB")
    report.add_argument("--output", type=Path, metavar="FILE", help="where to; into the course folder by default")
    return parser


def _count(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"expected a whole number of at least 1, got {text!r}")
    return int(text)


def _models(options: argparse.Namespace) -> int:
    from lecturekit import models

    for name in options.names:
        if name not in models.ASSETS:
            raise UsageError(f"there is no model {name!r}; models: {', '.join(models.ASSETS)}")
    return models.main([*options.names, *(["--verify"] if options.verify else [])])


def _release(options: argparse.Namespace) -> int:
    from lecturekit.grading.release import release
    from lecturekit.labs import repository

    for path in release(options.labs):
        print(path.relative_to(repository()))
    return 0


def _labs_full(options: argparse.Namespace) -> int:
    from lecturekit.labs import measure

    measure(options.labs, timeout=options.timeout, seeds=options.seeds)
    return _results(options)


def _results(options: argparse.Namespace) -> int:
    from lecturekit.labs import repository
    from lecturekit.results_page import write_page

    root = repository()
    print(write_page(root / "docs" / "results").relative_to(root))
    return 0


def _questions(options: argparse.Namespace) -> int:
    from lecturekit.checking import questions

    listed = questions(options.lab)
    if not listed:
        raise UsageError(f"there are no questions of lab {options.lab!r}")
    width = max(len(asked.id) for asked in listed)
    for asked in listed:
        print(f"{asked.id:{width}}  {asked.points:4g} points  {asked.lab}  {asked.slide}")
    return 0


def _prove(options: argparse.Namespace) -> int:
    from lecturekit.checking import questions
    from lecturekit.checking.prove import main as prove

    known = {asked.id for asked in questions()}
    for name in options.questions:
        if name not in known:
            raise UsageError(f"there is no question {name!r}; `lecturekit questions` lists them")
    return 1 if prove(options.questions or None, seeds=options.seeds) else 0


def _course_settings(lab: str) -> Any:
    """The configuration of the course in the current folder, else of this checkout. Raises UsageError."""
    from lecturekit.grading.course import settings
    from lecturekit.labs import repository

    here = Path.cwd()
    config = settings(here if (here / "nbgrader_config.py").exists() else repository())
    released = Path(config.CourseDirectory.root) / config.CourseDirectory.release_directory
    if not (released / lab).is_dir() or Path(lab).name != lab:
        labs = ", ".join(sorted(path.name for path in released.glob("*") if path.is_dir()))
        raise UsageError(f"there is no released lab {lab!r}; labs: {labs or 'none yet'}")
    return config


def _grade(options: argparse.Namespace) -> int:
    if options.roster and not options.submissions:
        raise UsageError("--roster goes with --submissions")
    config = _course_settings(options.lab)

    import psutil

    from lecturekit.grading.coordinator import grade
    from lecturekit.grading.options import GradingOptions

    chosen: dict[str, Any] = {"gpu": True} if options.gpu else {}
    if options.unsafe:
        chosen["isolation"] = "none"
    if options.submissions:
        _collect(options, config)
    summary = grade(
        config,
        options.lab,
        students=options.student,
        force=options.force,
        workers=options.workers or psutil.cpu_count(logical=False) or 1,
        scheduler=options.scheduler,
        options=GradingOptions.from_config(config, **chosen),
    )
    print(summary.table())
    return summary.status


def _collect(options: argparse.Namespace, config: Any) -> None:
    """Bring a download into submitted/, and say of each file that was left out why."""
    from lecturekit.grading.collect import SKIPPED, collect

    root = Path(config.CourseDirectory.root)
    released = (root / config.CourseDirectory.release_directory / options.lab).glob("*.ipynb")
    collected = collect(
        options.submissions,
        options.lab,
        root / config.CourseDirectory.submitted_directory,
        _roster(options.roster) if options.roster else None,
        notebooks=sorted(path.stem for path in released),
    )
    for one in collected:
        if one.why:
            print(f"{one.file} · {one.what}: {one.why}")
    taken = sum(one.what != SKIPPED for one in collected)
    print(f"{taken} of {len(collected)} files collected")


def _roster(path: Path) -> dict[str, str]:
    """{name in the download: student id} from a CSV file with the columns name and id."""
    import csv

    wanted = f"{path} must be a CSV file with a first line `name,id` and a line for each student"
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            rows = list(csv.DictReader(file))
    except (csv.Error, UnicodeDecodeError) as error:
        raise UsageError(f"{wanted}: {error}") from error
    if not rows or not {"name", "id"} <= rows[0].keys():
        raise UsageError(wanted)
    for number, row in enumerate(rows, 2):
        if not row["name"] or not row["id"]:
            raise UsageError(f"{wanted}; line {number} lacks one of the two")
    return {row["name"]: row["id"] for row in rows}


def _report(options: argparse.Namespace) -> int:
    config = _course_settings(options.lab)
    from lecturekit.grading.report import write_report

    print(write_report(config, options.lab, options.output))
    return 0


if __name__ == "__main__":
    sys.exit(main())
