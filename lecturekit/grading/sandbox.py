"""The jail that student code runs in: what it can see of the machine, and how much of it it may use.

Bubblewrap builds a file system of its own: the system and this Python read-only, a copy of lecturekit without anything
that tells an answer, the models and data sets read-only, and nothing else. No network, no other processes, no
capabilities. Inside lives the zygote (see zygote.py), from which every notebook gets a fork with namespaces, a /tmp and
limits of its own. Where there is no bubblewrap, Landlock hides the files instead (see landlock.py).
"""

from __future__ import annotations

import contextlib
import functools
import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import psutil

import lecturekit
from lecturekit.data import data_dir
from lecturekit.grading.options import GradingOptions
from lecturekit.runtime import cache_dir

INSIDE = Path("/course")  # where the jail has lecturekit, the data sets and the models
USER = 61000  # whom student code runs as when the grader runs as root; no file on the machine belongs to them
PREFIX = "lecturekit-jail-"  # of folders and control groups, followed by the number of the process that made them
START_SECONDS = 120.0  # for the zygote to import torch, on a busy machine
# the parts of the grader that run inside the jail; they hold no secret and no answer
GRADER_PARTS = {"__init__.py", "codec.py", "kernel.py", "zygote.py", "landlock.py", "seccomp.py"}
# the controllers of cgroups version 1 and the files of their limits; a group of cpu has its own share of the processor,
# however many processes are in it, so that the other notebooks keep theirs
CONTROLLERS = {"memory": ["memory.limit_in_bytes"], "pids": ["pids.max"], "cpu": [], "cpu,cpuacct": []}
# what tells answers, or judges: never in the jail
LEFT_OUT = {"questions", "checking/question.py", "checking/prove.py", "cli.py", "labs.py", "bootstrap.py"}


class NoSandbox(RuntimeError):
    """This machine cannot run student code safely; the message says what is missing."""


class JailDied(RuntimeError):
    """The zygote is gone: the kernel ended it, or it could not start."""


def choose_isolation(wanted: str = "") -> str:
    """The sandbox to use: the one wanted, or the best this machine has. Raises NoSandbox when there is none."""
    if wanted == "none":
        return wanted
    reasons = []
    for name, trouble in (("bubblewrap", _no_bubblewrap), ("landlock", _no_landlock)):
        if wanted in ("", name):
            if not trouble():
                return name
            reasons.append(trouble())
    raise NoSandbox(
        f"student code cannot be run safely here: {'; '.join(reasons)}. Install bubblewrap (a package of "
        "that name in Debian, Ubuntu and Fedora), or, only for notebooks that you trust as your own, use --unsafe"
    )


@functools.cache
def _no_bubblewrap() -> str:
    """Why bubblewrap cannot be used, or nothing when it can."""
    program = shutil.which("bwrap")
    if not program:
        return "bubblewrap (bwrap) is not installed"
    trial = [program, "--unshare-all", "--ro-bind", "/", "/", "--dev", "/dev", "--proc", "/proc", "true"]
    done = subprocess.run(trial, capture_output=True, text=True, timeout=30, check=False)
    return "" if done.returncode == 0 else f"bubblewrap does not work here: {done.stderr.strip()[:200]}"


def _no_landlock() -> str:
    from lecturekit.grading import landlock

    if not sys.platform.startswith("linux") or not landlock.available():
        return "the kernel has no Landlock"
    return ""


class Jail:
    """A running zygote in its sandbox. ``start`` gives a fresh notebook process, ``stop`` ends it and all it started.

    lab: whose references are left out.   locked: the modules that hold them.   preload: modules that the zygote
    imports once.   Raises NoSandbox, or JailDied when the zygote does not come up.
    """

    def __init__(
        self, lab: str, *, locked: Iterable[str], preload: Sequence[str], options: GradingOptions, hide: Sequence[Path]
    ) -> None:
        self.lab, self.locked, self.preload, self.options = lab, frozenset(locked), list(preload), options
        self.isolation = choose_isolation(options.isolation)
        self.hide = [path.resolve() for path in hide]
        _sweep()
        self._folder = Path(tempfile.mkdtemp(prefix=f"{PREFIX}{os.getpid()}-"))
        self._folder.chmod(0o755)  # the jail's user reads the copy of lecturekit in it
        self._process: subprocess.Popen[bytes] | None = None
        self._control: socket.socket | None = None
        self._cgroup = Cgroup(options)
        self._single_use = False
        _copy_package(self._folder / "lecturekit", self.locked)

    def __enter__(self) -> Jail:
        return self

    def __exit__(self, *_: Any) -> None:
        self.close()

    def start(self) -> tuple[socket.socket, int]:
        """A notebook process of its own: the socket to it, and the read end of what it writes to fds 1 and 2."""
        for attempt in (1, 2):
            if self._process is None or self._process.poll() is not None:
                self._boot()
            ours, theirs = socket.socketpair()
            read, write = os.pipe()
            try:
                answer = self._ask("start", [theirs.fileno(), write])
                self._single_use = bool(answer.get("single_use"))
                return ours, read
            except (OSError, JailDied) as error:
                ours.close()
                os.close(read)
                self._kill()
                if attempt == 2:
                    raise JailDied(f"the sandbox cannot start a process: {error}") from error
            finally:
                theirs.close()
                os.close(write)
        raise AssertionError("unreachable")

    def stop(self) -> None:
        """End the notebook process, and everything it started."""
        try:
            self._ask("stop", [])
        except (OSError, JailDied):
            self._kill()
        if self._single_use or self._cgroup.crowded():
            self._kill()

    def close(self) -> None:
        """End everything and remove the copy of lecturekit."""
        self._kill()
        self._cgroup.remove()
        shutil.rmtree(self._folder, ignore_errors=True)

    def _boot(self) -> None:
        self._kill()
        ours, theirs = socket.socketpair()
        arguments = self._command(theirs.fileno())
        self._process = subprocess.Popen(
            self._cgroup.enter(arguments),
            pass_fds=[theirs.fileno()],
            env=self._environment(),
            cwd="/",
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=(log := open(self._folder / "log", "wb")),  # noqa: SIM115 (closed two lines below)
            start_new_session=True,
        )
        log.close()
        theirs.close()
        self._control = ours
        ours.settimeout(START_SECONDS)
        answer = self._receive()
        if answer.get("threads", 1) > 1:
            # a fork of a process with threads may hang: do without the modules that start some
            self._kill()
            if not self.preload:
                raise JailDied("the zygote has more than one thread before any notebook has run")
            self.preload = []
            self._boot()

    def _ask(self, what: str, fds: Sequence[int]) -> dict[str, Any]:
        if self._control is None:
            raise JailDied("the zygote is not running")
        socket.send_fds(self._control, [what.encode()], list(fds))
        return self._receive()

    def _receive(self) -> dict[str, Any]:
        """One short line from the zygote, which is our own code and has run none of the student's."""
        assert self._control is not None
        try:
            line = self._control.recv(4096)
        except TimeoutError as error:
            raise JailDied("the zygote does not answer") from error
        if not line:
            raise JailDied(self._last_words() or "the zygote has ended")
        words = dict(word.split("=", 1) for word in line.decode().split())
        return {name: int(value) for name, value in words.items()}

    def _last_words(self) -> str:
        with contextlib.suppress(OSError):
            return (self._folder / "log").read_text(errors="replace").strip()[-500:]
        return ""

    def _kill(self) -> None:
        if self._control is not None:
            self._control.close()  # the zygote ends, and with it its namespace, when this goes
            self._control = None
        if self._process is not None:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()
            self._process = None
            self._cgroup.empty()

    # What the jail is made of

    def _environment(self) -> dict[str, str]:
        root = INSIDE if self.isolation == "bubblewrap" else self._folder
        places = {
            "LECTUREKIT_DATA": str(INSIDE / "data" if self.isolation == "bubblewrap" else data_dir()),
            "LECTUREKIT_CACHE": str(INSIDE / "models" if self.isolation == "bubblewrap" else cache_dir()),
        }
        temporary = "/tmp" if self.isolation == "bubblewrap" else str(self._folder / "tmp")
        return places | {
            "PATH": f"{Path(sys.executable).parent}:/usr/bin:/bin",
            "LANG": "C.UTF-8",
            "HOME": f"{temporary}/home",
            "TMPDIR": temporary,
            "USER": "student",
            "LOGNAME": "student",
            "PYTHONPATH": str(root),
            "PYTHONDONTWRITEBYTECODE": "1",
            "PYTHONHASHSEED": "0",
            "MPLBACKEND": "module://matplotlib_inline.backend_inline",
            "MPLCONFIGDIR": f"{temporary}/home/matplotlib",
            "IPYTHONDIR": f"{temporary}/home/ipython",
            "HF_HUB_OFFLINE": "1",
            "TRANSFORMERS_VERBOSITY": "error",
            # one thread: a fork of a process with a pool of threads hangs, and the other cores have notebooks too
            "OMP_NUM_THREADS": "1",
            "OPENBLAS_NUM_THREADS": "1",
            "MKL_NUM_THREADS": "1",
            "OMP_WAIT_POLICY": "passive",
            "LECTUREKIT_PROFILE": "smoke",
            "LECTUREKIT_LAB": self.lab,
            **({} if self.options.gpu else {"CUDA_VISIBLE_DEVICES": ""}),
        }

    def _command(self, control: int) -> list[str]:
        """The command that starts the zygote, inside bubblewrap where that is the sandbox."""
        limits = [f"{name}={getattr(self.options, name)}" for name in ("memory", "processes", "temporary")]
        zygote = [sys.executable, "-s", "-P", "-m", "lecturekit.grading.zygote", str(control), self.isolation]
        zygote += [*limits, "preload=" + ",".join(self.preload), "read=" + ":".join(map(str, self._landlock_reads()))]
        zygote.append("again=" + ":".join(map(str, self._in_tmp() if self.isolation == "bubblewrap" else [])))
        if self.isolation != "bubblewrap":
            (self._folder / "tmp").mkdir(exist_ok=True)
            return zygote
        root = os.getuid() == 0
        words = ["bwrap", "--die-with-parent", "--as-pid-1", "--unshare-pid", "--unshare-net", "--unshare-ipc"]
        words += ["--unshare-uts", "--unshare-cgroup-try", "--hostname", "grader", "--cap-drop", "ALL"]
        # root becomes the jail's user for good (setuid); anybody else gets a user namespace
        words += ["--cap-add", "CAP_SETUID", "--cap-add", "CAP_SETGID"] if root else ["--unshare-user"]
        words += ["--dev", "/dev", "--proc", "/proc"]
        for place in ("/tmp", "/dev/shm"):  # before the folders to show, some of which may lie in /tmp
            words += ["--perms", "1777", "--size", str(self.options.temporary), "--tmpfs", place]
        # made by hand, since those that bubblewrap makes are for root alone
        shown = [*self._readable(), INSIDE / "lecturekit", *(INSIDE / "again" / path.name for path in self._in_tmp())]
        for folder in sorted({parent for path in shown for parent in path.parents if parent != Path("/")}):
            words += ["--perms", "0755", "--dir", str(folder)]
        for path in self._readable():
            words += (
                ["--symlink", os.readlink(path), str(path)] if path.is_symlink() else ["--ro-bind", *[str(path)] * 2]
            )
        for path in _inside(self.hide, self._readable()):
            words += ["--tmpfs", str(path)]
        for number, path in enumerate(self._in_tmp()):
            words += ["--ro-bind", str(path), str(INSIDE / "again" / str(number))]
        words += ["--ro-bind", str(self._folder / "lecturekit"), str(INSIDE / "lecturekit")]
        words += ["--ro-bind-try", str(data_dir()), str(INSIDE / "data")]
        words += ["--ro-bind-try", str(cache_dir()), str(INSIDE / "models")]
        if self.options.gpu:
            for device in sorted(Path("/dev").glob("nvidia*")):
                words += ["--dev-bind", str(device), str(device)]
        # the folders made above belong to whoever runs this: without root that is the student's code as well, which
        # could leave a module in one of them for the next student's notebook to import
        words += ["--remount-ro", "/", "--remount-ro", "/dev"]
        return [*words, "--", *zygote]

    def _in_tmp(self) -> list[Path]:
        """What is shown and lies in /tmp, where each notebook gets an empty folder: it is shown there again."""
        return [path for path in self._readable() if Path("/tmp") in path.parents]

    def _landlock_reads(self) -> list[Path]:
        """What student code may read where Landlock is the sandbox. It cannot hide a folder in one that is shown."""
        shown = self._readable()
        if self.isolation == "landlock":
            covered = _inside(self.hide, shown)
            if covered:
                raise NoSandbox(
                    f"Landlock cannot hide {covered[0]}, which lies inside {sys.prefix}: install bubblewrap, or keep "
                    "the course and the environment apart"
                )
            shown += [self._folder / "lecturekit", data_dir(), cache_dir(), Path("/proc")]
            shown += [Path("/dev") / name for name in ("null", "zero", "full", "random", "urandom", "shm")]
        return [path for path in shown if path.exists()]

    def _readable(self) -> list[Path]:
        """What the jail sees of the machine, read-only: the system's programs and libraries, and this Python."""
        system = [Path(name) for name in ("/usr", "/bin", "/sbin", "/lib", "/lib32", "/lib64", "/libx32")]
        settings = ["ld.so.cache", "ld.so.conf", "ld.so.conf.d", "alternatives", "localtime", "nsswitch.conf"]
        paths = [path for path in system if path.exists()]
        paths += [path for name in settings if (path := Path("/etc") / name).exists() and not path.is_symlink()]
        python = [Path(sys.prefix), Path(sys.base_prefix), Path(os.path.realpath(sys.executable)).parents[1]]
        for path in python:
            if not any(path == seen or seen in path.parents for seen in paths):
                paths.append(path)
        return paths


def _inside(hide: Iterable[Path], shown: Sequence[Path]) -> list[Path]:
    """Those of the folders to hide that lie in a folder shown, and any installed copy of lecturekit there."""
    package = Path(lecturekit.__file__).resolve().parent
    return [path for path in [*hide, package] if path.is_dir() and any(top in path.parents for top in shown)]


def _copy_package(target: Path, locked: frozenset[str]) -> None:
    """A copy of lecturekit without questions, judges, and the modules that hold the references under grading."""
    package = Path(lecturekit.__file__).resolve().parent
    gone = {name.removeprefix("lecturekit.").replace(".", "/") + ".py" for name in locked}

    def leave_out(folder: str, names: list[str]) -> set[str]:
        place = Path(folder).resolve().relative_to(package)
        paths = {name: (place / name).as_posix() for name in names}
        out = {name for name, path in paths.items() if name == "__pycache__" or path in LEFT_OUT | gone}
        return out | ({name for name in names if name not in GRADER_PARTS} if place == Path("grading") else set())

    shutil.copytree(package, target, ignore=leave_out)
    for path in [target, *target.rglob("*")]:
        path.chmod(0o755 if path.is_dir() else 0o644)


def _sweep() -> None:
    """Remove what graders that were killed left behind."""
    places = [Path(tempfile.gettempdir()), *(parent for parent, _ in _controllers())]
    for path in (path for place in places for path in place.glob(f"{PREFIX}*")):
        process = path.name.removeprefix(PREFIX).partition("-")[0]
        if process.isdecimal() and not psutil.pid_exists(int(process)):
            shutil.rmtree(path, ignore_errors=True)
            with contextlib.suppress(OSError):
                path.rmdir()  # a control group is removed so, not file by file


class Cgroup:
    """A control group for one jail, where this process may make one: it bounds memory and processes for all in it.

    Where it may not, the limits of each process (see zygote.py) are all there is.
    """

    def __init__(self, options: GradingOptions) -> None:
        self.folders: list[Path] = []
        name = f"{PREFIX}{os.getpid()}-{secrets.token_hex(4)}"
        # torch itself, and a snapshot for each question, come on top of what the student may use
        memory, processes = options.memory + 2**30, options.processes + 16
        for parent, files in _controllers():
            limits = {"memory.limit_in_bytes": memory, "memory.max": memory, "pids.max": processes}
            limits |= {"memory.memsw.limit_in_bytes": memory, "memory.swap.max": 0}
            folder = parent / name
            try:
                folder.mkdir()
                self.folders.append(folder)
                for file in files:
                    (folder / file).write_text(str(limits[file]))
            except OSError:
                self.remove()
                self.folders = []
                return
            for file in ("memory.memsw.limit_in_bytes", "memory.swap.max"):
                with contextlib.suppress(OSError):  # not every kernel counts swap
                    if (folder / file).exists():
                        (folder / file).write_text(str(limits[file]))

    def enter(self, command: list[str]) -> list[str]:
        """The command, started so that it and all its children are in the group."""
        if not self.folders:
            return command
        joins = "".join(f'echo 0 > "${number}"; ' for number in range(1, len(self.folders) + 1))
        script = f'{joins}shift {len(self.folders)}; exec "$@"'
        return ["/bin/sh", "-c", script, "sh", *(f"{folder}/cgroup.procs" for folder in self.folders), *command]

    def crowded(self) -> bool:
        """Whether memory is still held that ended processes left behind (files in memory, for one)."""
        for folder in self.folders:
            for now, most in (("memory.usage_in_bytes", "memory.limit_in_bytes"), ("memory.current", "memory.max")):
                with contextlib.suppress(OSError, ValueError):
                    if int((folder / now).read_text()) > int((folder / most).read_text()) * 0.8:
                        return True
        return False

    def empty(self) -> None:
        """End whatever is still in the group."""
        deadline = time.monotonic() + 10
        for folder in self.folders:
            while time.monotonic() < deadline:
                try:
                    pids = [int(pid) for pid in (folder / "cgroup.procs").read_text().split()]
                except OSError:
                    break
                if not pids:
                    break
                for pid in pids:
                    with contextlib.suppress(ProcessLookupError, PermissionError):
                        os.kill(pid, signal.SIGKILL)
                time.sleep(0.01)

    def remove(self) -> None:
        self.empty()
        for folder in self.folders:
            with contextlib.suppress(OSError):
                folder.rmdir()


def _controllers() -> list[tuple[Path, list[str]]]:
    """Folders of the control group file systems that groups may be made in, with the limits to set there."""
    found: list[tuple[Path, list[str]]] = []
    with contextlib.suppress(OSError):
        mounts = [line.split() for line in Path("/proc/self/mountinfo").read_text().splitlines()]
        own = [line.split(":", 2) for line in Path("/proc/self/cgroup").read_text().splitlines()]
        for words in mounts:
            kind, options = words[words.index("-") + 1], words[-1].split(",")
            for number, names, path in own:
                top = Path(words[4])
                folder = top / path.lstrip("/")
                folder = folder if folder.is_dir() else top
                if kind == "cgroup" and names in CONTROLLERS and set(names.split(",")) <= set(options):
                    found.append((folder, CONTROLLERS[names]))
                elif kind == "cgroup2" and number == "0" and (folder / "cgroup.subtree_control").is_file():
                    enabled = (folder / "cgroup.subtree_control").read_text().split()
                    files = [file for name, file in (("memory", "memory.max"), ("pids", "pids.max")) if name in enabled]
                    if files:
                        found.append((folder, files))
    return [(folder, files) for folder, files in found if os.access(folder, os.W_OK)]
