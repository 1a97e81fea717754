"""The whole class of attackers, with honest students between them, through `lecturekit grade` with two workers.

No unearned point, no lost honest point, the batch goes on, and nothing of hidden inputs, secrets, other students or the
host is in anything that is written.
"""

import html
import json
import os
import re
import secrets
import shutil
import socket
import subprocess
import sys
import tempfile
import threading
from dataclasses import dataclass, field
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from grading_attacks import answering, comparing, fetching, files, machine, notebook, telling
from grading_attacks.kit import (
    CANARY,
    FULL,
    LAB,
    LEAK,
    RAN,
    SOURCE,
    WORD,
    Attack,
    filler,
    hidden_numbers,
    written_numbers,
)

from lecturekit.grading.course import secret, student_seed
from lecturekit.grading.release import release

ROOT = Path(__file__).resolve().parents[3]
HONEST = [Attack(name) for name in ("aa-honest", "honest-1", "m-honest", "zz-honest")]
KINDS = [comparing, fetching, answering, telling, notebook, files, machine]
CLASS = [*HONEST, *(attack for kind in KINDS for attack in kind.ATTACKS)]
NAMES = [attack.name for attack in CLASS]
LIMITS = """
c.Grader.cell_seconds = 3
c.Grader.case_seconds = 1
c.Grader.notebook_seconds = 30
c.Grader.memory = 2 * 2**30
c.Grader.temporary = 256 * 2**20
c.Grader.processes = 128
c.Grader.output = 2 * 2**20
"""
# starts the grader from a login that holds a key
LAUNCH = """
import ctypes, os, platform, sys
add_key, keyctl = (248, 250) if platform.machine() == "x86_64" else (217, 219)
libc = ctypes.CDLL(None)
libc.syscall(keyctl, 1, b"login")
libc.syscall(add_key, b"user", b"of-the-instructor", b"password", 8, -3)
os.execv(sys.argv[1], sys.argv[1:])
"""


def _no_sandbox() -> str:
    if not shutil.which("bwrap"):
        return "bubblewrap is not installed"
    trial = ["bwrap", "--unshare-all", "--ro-bind", "/", "/", "--dev", "/dev", "--proc", "/proc", "true"]
    done = subprocess.run(trial, capture_output=True, text=True, timeout=30, check=False)
    return "" if done.returncode == 0 else f"bubblewrap does not work here: {done.stderr.strip()}"


pytestmark = [
    pytest.mark.slow,
    pytest.mark.grading,
    pytest.mark.timeout(3000),
    pytest.mark.skipif(bool(_no_sandbox()), reason=_no_sandbox() or "there is a sandbox"),
]


@dataclass
class Host:
    """What lies on the machine for an attack to find, and ears for what gets out of the sandbox."""

    root: Path
    token: str = field(default_factory=lambda: f"outlives-{secrets.token_hex(6)}-")
    heard: list[Any] = field(default_factory=list)
    listeners: list[tuple[str, Any]] = field(default_factory=list)
    sockets: list[socket.socket] = field(default_factory=list)

    @property
    def home(self) -> Path:
        return self.root / "home"

    def private_files(self) -> list[Path]:
        return [self.home / ".ssh" / "id_ed25519", self.home / "notes.txt", self.root / "outside.txt"]

    def prepare(self) -> None:
        for path in self.private_files():
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(f"private {secrets.token_hex(8)}\n")
            path.chmod(0o666)
        for folder in (self.root, self.home, self.home / ".ssh"):
            folder.chmod(0o777)

    def listen(self) -> None:
        unix = str(self.root / "socket")
        name = f"attack-{secrets.token_hex(6)}"
        for family, kind, address, told in (
            (socket.AF_INET, socket.SOCK_STREAM, ("127.0.0.1", 0), "tcp"),
            (socket.AF_INET, socket.SOCK_DGRAM, ("127.0.0.1", 0), "udp"),
            (socket.AF_UNIX, socket.SOCK_STREAM, unix, "unix"),
            (socket.AF_UNIX, socket.SOCK_STREAM, f"\0{name}", "abstract"),
        ):
            ear = socket.socket(family, kind)
            ear.bind(address)
            if kind == socket.SOCK_STREAM:
                ear.listen()
            if told == "unix":
                os.chmod(unix, 0o777)
            self.sockets.append(ear)
            self.listeners.append((told, name if told == "abstract" else ear.getsockname()))
            threading.Thread(target=self._hear, args=(ear, told), daemon=True).start()

    def _hear(self, ear: socket.socket, told: str) -> None:
        while True:
            try:
                self.heard.append((told, ear.accept()[1] if told != "udp" else ear.recv(100)))
            except OSError:
                return

    def close(self) -> None:
        for ear in self.sockets:
            ear.close()

    def outliving(self) -> list[str]:
        """Command lines of processes on this machine that an attack started."""
        found = []
        for path in Path("/proc").glob("[0-9]*/cmdline"):
            try:
                words = path.read_bytes().split(b"\0")
            except OSError:
                continue
            if any(word.startswith(self.token.encode()) for word in words):
                found.append(str(words))
        return found


@dataclass
class Outcome:
    """The class, graded."""

    course: Any
    host: Host
    done: subprocess.CompletedProcess
    fed_back: subprocess.CompletedProcess
    before: dict[Path, str]
    jails: set[Path]

    def written(self, student: str) -> dict[str, str]:
        """All text that was written for a student: the graded notebook, the feedback, the gradebook's comments."""
        folder = self.course.root / "course"
        texts = {}
        for kind in ("autograded", "feedback"):
            for path in (folder / kind / student).rglob("*"):
                if path.is_file():
                    texts[f"{kind}/{path.name}"] = html.unescape(path.read_text(errors="replace"))
        return texts

    def outputs(self, student: str) -> str:
        """What the student's notebook showed, as it was graded."""
        path = self.course.root / "course" / "autograded" / student / LAB / f"{LAB}.ipynb"
        cells = json.loads(path.read_text())["cells"] if path.exists() else []
        return "\n".join(json.dumps(cell.get("outputs", [])) for cell in cells)


def _left_jails() -> set[Path]:
    """Folders and control groups of sandboxes whose grader has ended; its process number is in their names."""
    places = [Path(tempfile.gettempdir()), *Path("/sys/fs/cgroup").glob("**/")]
    jails = {path for place in places for path in place.glob("lecturekit-jail-*")}
    return {path for path in jails if not Path("/proc", path.name.split("-")[2]).exists()}


@pytest.fixture(scope="module")
def outcome(new_course, tmp_path_factory, by_id):
    host = Host(tmp_path_factory.mktemp("attacked"))
    host.prepare()
    host.listen()
    course = new_course(host.root / "attack-course")
    course.add_lab(LAB, SOURCE)
    release([LAB], course.root)
    with (course.root / "nbgrader_config.py").open("a") as config:
        config.write(LIMITS)
    submitted = course.root / "course" / "submitted"
    secret(course.root / "course")
    fill = filler(
        course.root,
        **{
            "private files": [str(path) for path in host.private_files()],
            "secret variable": "COURSE_PASSWORD",
            "hostname": socket.gethostname(),
            "listeners": host.listeners,
            "token": host.token,
            "home": str(host.home),
            "cache": str(host.root / "cache"),
            "friends seed": student_seed(course.root / "course", "honest-1", LAB),
        },
    )
    for attack in CLASS:
        submission = attack.notebook(course.released(LAB), by_id, fill)
        (attack.lay or files.write)(submitted / attack.name / LAB, submission)
    before, jails = {path: path.read_text() for path in host.private_files()}, _left_jails()
    env = dict(
        os.environ, PYTHONPATH=str(ROOT), OMP_NUM_THREADS="1", HOME=str(host.home), COURSE_PASSWORD="open sesame"
    )
    command = [sys.executable, "-c", LAUNCH, sys.executable, "-m", "lecturekit.cli", "grade", LAB, "--workers", "2"]
    done = subprocess.run(
        command, cwd=course.root, env=env, capture_output=True, text=True, errors="replace", timeout=2700, check=False
    )
    fed_back = course.nbgrader("generate_feedback", LAB, timeout=900)
    yield Outcome(course, host, done, fed_back, before, jails)
    host.close()


@pytest.fixture(scope="module")
def grades(outcome):
    return outcome.course.grades(LAB)


def test_the_batch_reaches_its_end(outcome):
    assert outcome.done.returncode in (0, 1), outcome.done.stderr[-5000:]
    assert "Traceback" not in outcome.done.stderr + outcome.done.stdout
    assert outcome.fed_back.returncode == 0, outcome.fed_back.stderr[-3000:]


@pytest.mark.parametrize("attack", CLASS, ids=NAMES)
def test_marks_are_those_honestly_earned(outcome, grades, attack):
    found = grades.get(attack.name)
    if attack.refused:
        assert found is None or set(found.values()) <= {0, None}
        assert attack.name in outcome.done.stdout + outcome.done.stderr
        return
    assert found is not None, outcome.done.stdout[-3000:]
    expected = dict(attack.marks)
    if attack.weak:  # the cell that was attacked is no more than lost
        (cell,) = (cell for cell, earned in attack.earned.items() if earned == 0)
        del expected[cell]
        assert 0 <= found.pop(cell) <= FULL[cell]
    if attack.sabotage:
        assert all(found[cell] in (earned, 0) for cell, earned in expected.items())
    else:
        assert found == expected


@pytest.mark.parametrize("attack", [attack for attack in CLASS if attack.noted], ids=lambda attack: attack.name)
def test_what_was_wrong_with_a_file_is_told(outcome, attack):
    written = outcome.written(attack.name)
    assert attack.noted in written[f"autograded/{LAB}.ipynb"] and attack.noted in written[f"feedback/{LAB}.html"]


@pytest.mark.parametrize("attack", CLASS, ids=NAMES)
def test_nothing_comes_out(outcome, attack):
    for name, text in outcome.written(attack.name).items():
        assert LEAK not in text, (name, text[text.index(LEAK) :][:500])


@pytest.mark.parametrize("attack", [a for a in CLASS if a.top and not a.silent], ids=lambda attack: attack.name)
def test_the_attack_was_made(outcome, attack):
    assert f"{RAN} {attack.name}" in outcome.outputs(attack.name)


def test_no_hidden_input_is_written(outcome):
    course = outcome.course.root / "course"
    public = hidden_numbers(0)  # those of `check`, which an answer may show; some are drawn again by chance
    for attack in CLASS:
        seed = student_seed(course, attack.name, LAB)
        text = "\n".join(outcome.written(attack.name).values())
        assert not (written_numbers(text) - public) & hidden_numbers(seed), attack.name
        assert str(seed) not in text


def test_no_secret_is_written(outcome):
    course = outcome.course.root / "course"
    words = {secret(course).hex(), CANARY, "open sesame", str(outcome.course.root), *outcome.before.values()}
    for attack in CLASS:
        for name, text in outcome.written(attack.name).items():
            told = words if name.startswith("autograded/") else words | {WORD}  # the instructor sees the hidden tests
            assert not [word for word in told if word.strip() in text], (attack.name, name)
        assert WORD not in outcome.outputs(attack.name)
    log = outcome.done.stdout + outcome.done.stderr
    assert not [word for word in (secret(course).hex(), CANARY, WORD, "open sesame") if word in log]


def test_no_name_of_the_host_is_written(outcome):
    for attack in CLASS:
        assert not re.search(rf"\b{re.escape(socket.gethostname())}\b", outcome.outputs(attack.name)), attack.name


def test_nobody_reads_what_another_student_wrote(outcome):
    for attack in CLASS:
        for name, text in outcome.written(attack.name).items():
            others = set(re.findall(r"watermark of ([\w-]+)", text)) - {attack.name}
            assert not others, (attack.name, name)


def test_the_comments_in_the_gradebook_tell_nothing(outcome):
    from nbgrader.api import Gradebook

    with Gradebook(f"sqlite:///{outcome.course.root / 'course' / 'gradebook.db'}") as gradebook:
        for submission in gradebook.assignment_submissions(LAB):
            for part in submission.notebooks:
                said = " ".join(str(comment.auto_comment) + str(comment.manual_comment) for comment in part.comments)
                assert LEAK not in said and WORD not in said
                assert {grade.manual_score for grade in part.grades} == {None}
                # a mark is no way to carry a number out
                assert all(grade.auto_score in (None, *range(21)) for grade in part.grades)
        assert gradebook.find_assignment(LAB).max_score == 75


def test_private_files_are_as_they_were(outcome):
    assert {path: path.read_text() for path in outcome.before} == outcome.before


def test_nothing_is_written_outside(outcome):
    marks = re.compile(r"written-by-|left-by-|stashed-|filling-|owned-by|evil\.|usercustomize|sitecustomize")
    places = [outcome.host.root, Path("/dev/shm"), Path("/var/tmp"), Path(sys.prefix) / "lib"]
    found = [path for place in places for path in place.rglob("*") if marks.search(path.name)]
    found += [path for path in Path("/tmp").iterdir() if marks.search(path.name)]
    submitted = outcome.course.root / "course" / "submitted"
    packages = {path for path in found if "site-packages" in path.parts and "evil" not in path.name}
    assert [path for path in found if submitted not in path.parents and path not in packages] == []


def test_no_process_outlives_grading(outcome):
    assert outcome.host.outliving() == []


def test_no_folder_of_the_sandbox_is_left(outcome):
    assert _left_jails() - outcome.jails == set()


def test_nothing_was_heard_from_inside(outcome):
    assert outcome.host.heard == []


class _Active(HTMLParser):
    """Collects what in a page would run a student's script."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []
        self._script = False

    def handle_starttag(self, tag: str, attrs: Any) -> None:
        self._script = tag == "script"
        self.found += [f"{tag} {name}={value}" for name, value in attrs if "steal(" in (value or "")]

    def handle_endtag(self, tag: str) -> None:
        self._script = False

    def handle_data(self, data: str) -> None:
        if self._script and "steal(" in data:
            self.found.append(data)


def test_no_script_of_a_student_is_in_the_feedback(outcome):
    page = _Active()
    page.feed(outcome.course.feedback("scripts_everywhere", LAB))
    assert page.found == []
