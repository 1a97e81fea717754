"""The grader beside plain nbgrader: seconds a submission, isolation on and off, workers, a large class, honest answers.

    .venv/bin/python benchmarks/grading.py              # all of it; writes benchmarks/results/grading_*.md
    .venv/bin/python benchmarks/grading.py speed        # one part: speed · workers · honest · large

Plain nbgrader is its own Autograde with its own preprocessors (a fresh kernel for every notebook), on the same
notebooks. Sides take turns, submission by submission, and the ratio is taken pair by pair.
"""

from __future__ import annotations

import argparse
import copy
import json
import os
import random
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import textwrap
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from datetime import date
from pathlib import Path
from typing import Any

import nbformat
from traitlets.config import Config

from lecturekit.checking import questions
from lecturekit.grading.assignment import Assignment
from lecturekit.grading.course import put_environment_on_path, settings
from lecturekit.grading.excerpt import answer_source
from lecturekit.grading.execute import Grader
from lecturekit.grading.options import GradingOptions
from lecturekit.grading.record import Recorder
from lecturekit.grading.release import release
from lecturekit.grading.work import PASSED, WRONG, Graded, Job, Mark
from lecturekit.labs import repository, to_notebook
from lecturekit.results import machine
from lecturekit.runtime import atomic_write, progress

RESULTS = Path(__file__).parent / "results"
LAB = "lab05_lora"
# the student's code for these questions runs in both graders; the pictures between them are no part of the comparison
QUESTIONS = {"lora-merge": "lora.merge", "lora-linear": "lora.linear", "lora-inject": "lora.inject"}
QUESTIONS |= {"lora-count": "lora.count", "lora-train": "lora.train"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", help="speed, workers, honest, large; all by default")
    parser.add_argument("--pairs", type=int, default=12, help="submissions a side for speed")
    parser.add_argument("--class-size", type=int, default=40, help="submissions for workers")
    parser.add_argument("--honest", type=int, default=1000, help="honest submissions")
    parser.add_argument("--large", type=int, default=10_000, help="submissions of the large class")
    options = parser.parse_args()
    put_environment_on_path()
    parts: dict[str, Callable[[], list[str]]] = {
        "speed": lambda: speed(options.pairs),
        "workers": lambda: workers(options.class_size),
        "honest": lambda: honest(options.honest),
        "large": lambda: large(options.large),
    }
    for name in options.parts or parts:
        title = f"# The grader: {name}"
        lines = [title, "", f"Measured on {date.today()}; {_machine()}.", "", *parts[name]()]
        atomic_write(RESULTS / f"grading_{name}.md", "\n".join(lines) + "\n")
        print("\n".join(lines))


# Courses --------------------------------------------------------------------------------------------------------------


class Course:
    """A throw-away course with the LoRA lab, or the part of it that holds the questions."""

    def __init__(self, folder: Path, questions_only: bool) -> None:
        self.root = folder
        shutil.copy(repository() / "nbgrader_config.py", folder)
        source = folder / "solutions" / LAB
        source.mkdir(parents=True)
        text = (repository() / "solutions" / LAB / f"{LAB}.py").read_text()
        (source / f"{LAB}.py").write_text(_questions_only(text) if questions_only else text)
        release([LAB], folder)
        self.config = settings(folder)
        notebook = to_notebook(source / f"{LAB}.py")
        self.solutions = {
            cell.metadata.nbgrader.grade_id: cell.source
            for cell in notebook.cells
            if cell.metadata.get("nbgrader", {}).get("solution")
        }
        self.released = nbformat.read(folder / "labs" / LAB / f"{LAB}.ipynb", as_version=4)

    def submit(self, student: str, answers: dict[str, str] | None = None) -> None:
        notebook = copy.deepcopy(self.released)
        for cell in notebook.cells:
            name = cell.metadata.get("nbgrader", {}).get("grade_id")
            if name in self.solutions:
                cell.source = (answers or {}).get(name, self.solutions[name])
        folder = self.root / "course" / "submitted" / student / LAB
        folder.mkdir(parents=True, exist_ok=True)
        nbformat.write(notebook, folder / f"{LAB}.ipynb")

    def command(self, *words: str) -> float:
        """Run lecturekit in the course; seconds."""
        started = time.perf_counter()
        subprocess.run([sys.executable, "-m", "lecturekit.cli", *words], cwd=self.root, check=True, capture_output=True)
        return time.perf_counter() - started


def _questions_only(text: str) -> str:
    """The lab's source without what is not needed for its questions: no pictures, no model, nothing below the tests."""
    cells = text.split("\n# %%")
    kept = [cells[0]]
    for cell in cells[1:]:
        body = cell.partition("\n")[2]
        graded = any(f'"{name}' in cell.partition("\n")[0] for name in QUESTIONS)
        if graded or body.lstrip().startswith("import copy") or "passing(" in body.partition("\n")[0]:
            kept.append(cell)
    return "\n# %%".join(kept) + "\n"


# Parts ----------------------------------------------------------------------------------------------------------------


def speed(pairs: int) -> list[str]:
    """Seconds a submission: plain nbgrader, ours in the sandbox, ours without one."""
    with tempfile.TemporaryDirectory() as folder, ExitStack() as stack:
        course = Course(Path(folder), questions_only=True)
        students = [f"student{number:03d}" for number in range(pairs + 1)]
        for student in students:
            course.submit(student)
        assignment = Assignment(course.config, LAB)
        recorder = stack.enter_context(Recorder(course.config, LAB))
        graders = {
            name: stack.enter_context(Grader(LAB, GradingOptions.from_config(course.config, isolation=name)))
            for name in ("bubblewrap", "none")
        }
        steps: dict[str, list[float]] = {}

        def ours(student: str, isolation: str) -> None:
            folder = course.root / "course" / "submitted" / student / LAB
            started = time.perf_counter()
            (job,) = assignment.jobs(student, folder)
            steps.setdefault("reading and staging", []).append(time.perf_counter() - started)
            graded = graders[isolation].grade(job)
            assert all(mark.status == PASSED for mark in graded.marks), graded
            started = time.perf_counter()
            recorder.record(student, folder, [graded], job.key(isolation))
            steps.setdefault("recording", []).append(time.perf_counter() - started)
            for step, seconds in graded.seconds.items():
                steps.setdefault(step, []).append(seconds)

        sides: dict[str, Callable[[str], None]] = {
            "plain nbgrader": lambda student: _plain_nbgrader(course, student),
            "ours": lambda student: ours(student, "bubblewrap"),
            "ours without isolation": lambda student: ours(student, "none"),
        }
        for side in sides.values():  # once unmeasured: imports, the first fork
            side(students[-1])
        steps.clear()
        seconds: dict[str, list[float]] = {name: [] for name in sides}
        for number, student in enumerate(progress(students[:-1], "speed")):
            for name in random.Random(number).sample(list(sides), len(sides)):
                started = time.perf_counter()
                sides[name](student)
                seconds[name].append(time.perf_counter() - started)
    lines = [f"Five function questions of {LAB}, one worker, {pairs} submissions a side, in turn.", ""]
    lines += ["| side | seconds a submission (quartiles) |", "|---|---|"]
    lines += [f"| {name} | {_spread(taken)} |" for name, taken in seconds.items()]
    faster = [plain / own for plain, own in zip(seconds["plain nbgrader"], seconds["ours"], strict=True)]
    overhead = [own / bare for own, bare in zip(seconds["ours"], seconds["ours without isolation"], strict=True)]
    lines += ["", f"Plain nbgrader ÷ ours: {_spread(faster)}. Isolation on ÷ off: {_spread(overhead)}."]
    lines += ["", "Where our time goes (mean milliseconds a submission, both of ours):", ""]
    lines += [f"- {name}: {1000 * statistics.mean(taken):.0f}" for name, taken in steps.items()]
    return lines


def _plain_nbgrader(course: Course, student: str) -> None:
    """nbgrader's own Autograde, with its own preprocessors, on one student; its kernel gets the same environment."""
    from nbgrader.converters import Autograde
    from nbgrader.coursedir import CourseDirectory

    config = Config(copy.deepcopy(dict(course.config)))
    config.CourseDirectory.autograded_directory = "course/plain"
    config.CourseDirectory.assignment_id, config.CourseDirectory.student_id = LAB, student
    config.Execute.timeout = 120
    os.environ["LECTUREKIT_PROFILE"] = "smoke"
    coursedir = CourseDirectory(config=config)
    grader = Autograde(coursedir=coursedir, config=config, force=True)
    grader.log.setLevel("ERROR")
    grader.start()


def workers(size: int) -> list[str]:
    """The whole command with one worker and with two, in turn."""
    times: dict[int, list[float]] = {1: [], 2: []}
    with tempfile.TemporaryDirectory() as folder:
        course = Course(Path(folder), questions_only=False)
        for number in range(size):
            course.submit(f"student{number:03d}")
        for _ in progress(range(3), "workers"):
            for count in (1, 2):
                times[count].append(course.command("grade", LAB, "--force", "--workers", str(count)))
    ratios = [one / two for one, two in zip(times[1], times[2], strict=True)]
    return [
        f"`lecturekit grade {LAB} --workers N` on {size} submissions of the whole lab, start-up included, thrice.",
        "",
        f"One worker: {_spread(times[1])} s. Two workers: {_spread(times[2])} s. One ÷ two: {_spread(ratios)}.",
    ]


def honest(size: int) -> list[str]:
    """Honest answers in every right variant that the course knows: none may lose a point."""
    variants = right_variants()
    lost: list[str] = []
    with tempfile.TemporaryDirectory() as folder:
        course = Course(Path(folder), questions_only=True)
        draw = random.Random(0)
        for number in range(size):
            answers = {name: draw.choice(variants[name]) for name in QUESTIONS}
            course.submit(f"student{number:04d}", answers)
        seconds = course.command("grade", LAB, "--workers", "2")
        for graded in _results(course):
            lost += [f"{graded.student}: {mark.cell} {mark.text}" for mark in graded.marks if mark.score != mark.points]
        count = sum(1 for _ in _results(course))
    counts = ", ".join(f"{QUESTIONS[name]} {len(found)}" for name, found in variants.items())
    return [
        f"{count} honest submissions, each question answered in a right variant drawn at random ({counts}).",
        "",
        f"Lost points: {len(lost)}. {seconds / size:.2f} s a submission.",
        *lost[:20],
    ]


def right_variants() -> dict[str, list[str]]:
    """Answer cell → the sources of all right answers: the lab's own solution, and the registered alternatives."""
    notebook = to_notebook(repository() / "solutions" / LAB / f"{LAB}.py")
    own = {
        cell.metadata.nbgrader.grade_id: cell.source
        for cell in notebook.cells
        if cell.metadata.get("nbgrader", {}).get("grade_id") in QUESTIONS
    }
    asked = {question.id: question for question in questions(LAB)}
    found = {}
    for cell, name in QUESTIONS.items():
        test = next(c for c in notebook.cells if c.metadata.get("nbgrader", {}).get("grade_id") == f"{cell}-test")
        answer = test.source.partition(", ")[2].partition(")")[0]
        found[cell] = [own[cell], *(answer_source(a, answer) for a in asked[name].alternatives.values())]
    return found


def _results(course: Course) -> Iterator[Any]:
    from lecturekit.grading.journal import Journal

    return (graded for _, graded in Journal(course.root / "course" / "journal").results(LAB))


class Simulated:
    """Stands in for the Grader in the large class: every job comes back at once, one question in three wrong."""

    def __init__(self, lab: str, *_: Any, **__: Any) -> None:
        self.lab = lab

    def __enter__(self) -> Simulated:
        return self

    def __exit__(self, *_: Any) -> None:
        pass

    def grade(self, job: Job) -> Graded:
        draw = random.Random(job.student)
        marks = []
        for cell in job.staged["cells"]:
            marked = cell["metadata"].get("nbgrader", {})
            if marked.get("grade"):
                points, right = float(marked["points"]), draw.random() < 2 / 3
                verdict = (points, PASSED, None) if right else (0.0, WRONG, "a simulated mistake")
                marks.append(Mark(marked["grade_id"], points, *verdict[:2], misconception=verdict[2]))
        return Graded(job.lab, job.notebook, job.student, job.staged, tuple(marks), job.notes)


def large(size: int) -> list[str]:
    """A large class on the local cluster with the students' processes simulated: time, memory, journal, report."""
    script = textwrap.dedent(
        """
        import json, sys, threading, time
        from pathlib import Path
        import psutil
        from lecturekit.grading import cluster, coordinator
        from lecturekit.grading.course import settings
        if __name__ == '__main__':
            cluster.GRADER = 'grading:Simulated'
            samples = []
            def watch():
                while True:
                    samples.append(psutil.Process().memory_info().rss)
                    time.sleep(1)
            threading.Thread(target=watch, daemon=True).start()
            started = time.perf_counter()
            summary = coordinator.grade(settings(Path('.')), sys.argv[1], workers=2, progress=False)
            print(json.dumps({'seconds': time.perf_counter() - started, 'rss': samples, 'failed': len(summary.failed)}))
        """
    )
    with tempfile.TemporaryDirectory() as folder:
        course = Course(Path(folder), questions_only=True)
        course.submit("student00000")
        first = course.root / "course" / "submitted" / "student00000"
        for number in range(1, size):
            shutil.copytree(first, first.with_name(f"student{number:05d}"))
        env = os.environ | {"PYTHONPATH": str(Path(__file__).parent)}
        (course.root / "run.py").write_text(script)
        done = subprocess.run(
            [sys.executable, "run.py", LAB], cwd=course.root, env=env, check=True, capture_output=True, text=True
        )
        measured = json.loads(done.stdout.splitlines()[-1])
        again = course.command("grade", LAB, "--workers", "2", "--student", "student0000*")
        report = course.command("report", LAB)
        journal = sum(path.stat().st_size for path in (course.root / "course" / "journal").rglob("*") if path.is_file())
    rss = measured["rss"]
    tenths = [max(rss[len(rss) * i // 10 : len(rss) * (i + 1) // 10] or [0]) / 2**20 for i in range(10)]
    return [
        f"{size} submissions of {LAB}'s questions, two workers on this machine. Students' processes are simulated:",
        "reading, staging, dask, journal, gradebook and report are real.",
        "",
        f"- graded and recorded in {measured['seconds']:.0f} s, {1000 * measured['seconds'] / size:.0f} ms each; "
        f"not graded: {measured['failed']}",
        f"- memory of the coordinator, MiB, highest in each tenth of the run: {', '.join(f'{m:.0f}' for m in tenths)}",
        f"- journal: {journal / 2**20:.0f} MiB; report: {report:.0f} s; ten students asked for again: {again:.0f} s",
    ]


def _spread(values: Sequence[float]) -> str:
    low, middle, high = statistics.quantiles(values, n=4) if len(values) > 1 else [values[0]] * 3
    return f"{middle:.2f} ({low:.2f}–{high:.2f})"


def _machine() -> str:
    return ", ".join(f"{name} {value}" for name, value in machine().items())


if __name__ == "__main__":
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    main()
