"""Inside the jail: a process with torch imported, from which every notebook is forked with namespaces of its own.

It reads one word at a time from the worker's socket and runs none of the student's code itself. ``start`` (with the
notebook's socket and output pipe) forks a guard, the first process of a new PID namespace, and the guard forks the
notebook's kernel; ``stop`` kills the guard, and Linux ends all else in the namespace with it. Importing torch and
shutting a kernel down are most of the time that a plain autograder takes for a short notebook.
"""

from __future__ import annotations

import array
import ctypes
import importlib
import os
import resource
import shutil
import signal
import socket
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

USER = 61000  # whom root becomes; the same number as in sandbox.py, which cannot be imported in here
NEW_MOUNTS, NEW_UTS, NEW_IPC, NEW_USER, NEW_PIDS, NEW_NET = (
    0x20000,
    0x4000000,
    0x8000000,
    0x10000000,
    0x20000000,
    0x40000000,
)
NO_SUID, NO_DEVICES, PRIVATE, BIND = 2, 4, 0x4000 | 0x40000, 0x1000 | 0x4000
SET_DEATH_SIGNAL, SET_DUMPABLE, SET_SUBREAPER, SET_NO_NEW_PRIVILEGES = 1, 4, 36, 38
# torch.optim imports torch._dynamo at its first use, which takes longer than most notebooks
ALWAYS = [
    "torch",
    "torch._dynamo",
    "numpy",
    "IPython.core.interactiveshell",
    "matplotlib_inline.backend_inline",
    "matplotlib.pyplot",
]
libc = ctypes.CDLL(None, use_errno=True)


def main(arguments: list[str]) -> None:
    """Serve until the worker's socket closes. arguments: the socket's fd, the isolation, then name=value limits."""
    control = socket.socket(fileno=int(arguments[0]))
    isolation = arguments[1]
    settings = dict(argument.split("=", 1) for argument in arguments[2:])
    if isolation == "bubblewrap" and os.getuid() == 0:
        os.setgroups([])
        os.setresgid(USER, USER, USER)
        os.setresuid(USER, USER, USER)
    _system("prctl", libc.prctl(SET_NO_NEW_PRIVILEGES, 1, 0, 0, 0))
    _system("prctl", libc.prctl(SET_DEATH_SIGNAL, signal.SIGKILL, 0, 0, 0))
    os.makedirs(os.environ["HOME"], exist_ok=True)
    from lecturekit.grading import kernel  # imports torch

    shell = kernel.make_shell()
    for name in ALWAYS + [name for name in settings["preload"].split(",") if name]:
        # a module that holds a reference is not there, and what imports one fails: the notebook will say so itself
        with suppress(Exception):
            importlib.import_module(name)
    kernel.draw_something()
    # no notebook may trace this process or read its memory: the next student's notebook is forked from it
    _system("prctl", libc.prctl(SET_DUMPABLE, 0, 0, 0, 0))
    control.sendall(f"threads={len(os.listdir('/proc/self/task'))}".encode())
    guard, separate = 0, False
    while True:
        word, fds, _, _ = socket.recv_fds(control, 64, 2)
        if not word:
            break
        if word == b"start" and len(fds) == 2:
            guard, separate = _start(control, shell, isolation, settings, fds)
            for fd in fds:
                os.close(fd)
            # without namespaces, what one notebook leaves behind could meet the next one
            control.sendall(f"single_use={int(isolation != 'none' and not separate)}".encode())
        else:
            _end(guard, separate)
            guard = 0
            control.sendall(b"stopped=1")
    _end(guard, separate)


def _start(
    control: socket.socket, shell: object, isolation: str, settings: dict[str, str], fds: list[int]
) -> tuple[int, bool]:
    """Fork a notebook. Returns its guard's process number, and whether it has namespaces of its own."""
    ours, theirs = os.pipe()
    middle = os.fork()
    if middle == 0:
        control.close()
        os.close(ours)
        with _never_returns():
            _isolate(shell, isolation, settings, fds, theirs)
    os.close(theirs)
    with os.fdopen(ours, "rb") as pipe:
        words = pipe.read().split()  # the guard's number, as seen from here, and whether it has namespaces
    os.waitpid(middle, 0)
    if len(words) != 2:
        raise RuntimeError("a notebook's process could not be made")
    return int(words[0]), words[1] == b"1"


def _isolate(shell: object, isolation: str, settings: dict[str, str], fds: list[int], report: int) -> None:
    """In the process between: enter new namespaces, then fork the guard, the first process in them."""
    _system("prctl", libc.prctl(SET_DUMPABLE, 1, 0, 0, 0))  # for /proc/self/uid_map to be ours to write
    separate = isolation != "none" and _new_namespaces()
    guard = os.fork()
    if guard:
        os.write(report, f"{guard} {int(separate)}".encode())
        os._exit(0)
    os.close(report)
    if not separate:
        os.setsid()
        _system(
            "prctl", libc.prctl(SET_SUBREAPER, 1, 0, 0, 0)
        )  # orphans come to the guard, as they would in a namespace
    temporary = _own_files(isolation, separate, settings)
    _drop_capabilities()
    if isolation == "bubblewrap":  # Landlock's has a filter of its own
        from lecturekit.grading import seccomp

        seccomp.restrict()
    if os.fork():
        _system("prctl", libc.prctl(SET_DUMPABLE, 0, 0, 0, 0))
        for fd in fds:
            os.close(fd)
        _reap()
    _limit(settings, separate)
    if isolation == "landlock":
        from lecturekit.grading import landlock

        landlock.restrict([Path(part) for part in settings["read"].split(":")], [Path(temporary), Path("/dev/null")])
    os.chdir(os.path.join(temporary, "work"))
    from lecturekit.grading import kernel

    kernel.serve(socket.socket(fileno=fds[0]), fds[1], shell)


def _new_namespaces() -> bool:
    """Users, processes, mounts, network and System V memory of its own. False where the machine does not allow it."""
    user, group = os.getuid(), os.getgid()
    if libc.unshare(NEW_USER | NEW_PIDS | NEW_MOUNTS | NEW_IPC | NEW_NET | NEW_UTS) != 0:
        return False
    for file, text in (("setgroups", "deny"), ("uid_map", f"{user} {user} 1"), ("gid_map", f"{group} {group} 1")):
        with open(f"/proc/self/{file}", "w") as mapping:
            mapping.write(text)
    return True


def _own_files(isolation: str, separate: bool, settings: dict[str, str]) -> str:
    """An empty /tmp (and /dev/shm) of limited size, with HOME and a working folder in it. Returns its path."""
    temporary = os.environ["TMPDIR"]
    if separate:
        _system("make mounts private", libc.mount(b"none", b"/", None, PRIVATE, None))
        size = f"size={settings['temporary']},nr_inodes=100000,mode=0700".encode()
        for place in (temporary, "/dev/shm"):
            if os.path.isdir(place):
                _system(f"mount {place}", libc.mount(b"tmpfs", place.encode(), b"tmpfs", NO_SUID | NO_DEVICES, size))
        for number, path in enumerate(filter(None, settings["again"].split(":"))):  # a Python that lies in /tmp
            os.makedirs(path)
            kept = f"/course/again/{number}".encode()
            _system(f"show {path}", libc.mount(kept, path.encode(), None, BIND, None))
        # no further namespaces: they open parts of the kernel that a notebook has no use for
        with suppress(OSError), open("/proc/sys/user/max_user_namespaces", "w") as file:
            file.write("0")
    else:
        for name in os.listdir(temporary):
            shutil.rmtree(os.path.join(temporary, name), ignore_errors=True)
    for folder in (os.environ["HOME"], os.path.join(temporary, "work")):
        os.makedirs(folder, exist_ok=True)
    return temporary


def _drop_capabilities() -> None:
    """Give up what the new user namespace granted. An execve would do it; this process never calls one."""
    for number in range(64):
        libc.prctl(24, number, 0, 0, 0)  # PR_CAPBSET_DROP; fails for numbers that this kernel lacks
    header = array.array("I", [0x20080522, 0])
    nothing = array.array("I", [0] * 6)
    _system("capset", libc.capset(ctypes.c_void_p(header.buffer_info()[0]), ctypes.c_void_p(nothing.buffer_info()[0])))


def _limit(settings: dict[str, str], separate: bool) -> None:
    """Limits of the kernel's process and of all that it starts."""
    _system("prctl", libc.prctl(SET_DUMPABLE, 1, 0, 0, 0))
    # private memory that can be written; an address-space limit would count what torch maps and never touches
    _bound(resource.RLIMIT_DATA, int(settings["memory"]))
    _bound(resource.RLIMIT_CORE, 0)
    _bound(resource.RLIMIT_NOFILE, 1024)
    _bound(resource.RLIMIT_FSIZE, int(settings["temporary"]))
    if separate:  # counted in the new user namespace alone (Linux 5.14); elsewhere it would count the grader's own
        _bound(resource.RLIMIT_NPROC, int(settings["processes"]))
    with suppress(OSError), open("/proc/self/oom_score_adj", "w") as file:
        file.write("1000")  # when memory runs out, this one goes, and not the zygote or the grader


def _bound(which: int, most: int) -> None:
    _, hard = resource.getrlimit(which)
    value = most if hard == resource.RLIM_INFINITY else min(most, hard)
    resource.setrlimit(which, (value, value))


def _reap() -> None:
    """The guard: take note of ended processes until none is left, or until it is killed."""
    while True:
        try:
            os.wait()
        except ChildProcessError:
            os._exit(0)
        except InterruptedError:
            continue


def _end(guard: int, separate: bool) -> None:
    """Kill the guard, and with it everything in its namespace; without a namespace, all that descend from it."""
    if not guard:
        return
    if not separate:
        _kill_descendants(guard)
    with suppress(ProcessLookupError):
        os.kill(guard, signal.SIGKILL)
    with suppress(ChildProcessError):
        os.waitpid(guard, 0)


def _kill_descendants(guard: int) -> None:
    """The guard adopts orphans (see _isolate), so that all that a notebook started descends from it."""
    import psutil

    with suppress(psutil.Error):
        for _ in range(20):  # a process may fork while the list is made
            family = psutil.Process(guard).children(recursive=True)
            for process in family:
                with suppress(psutil.Error):
                    process.kill()
            if not [process for process in family if process.is_running() and process.status() != "zombie"]:
                break


@contextmanager
def _never_returns() -> Iterator[None]:
    """Whatever happens in a forked process: it must not go on as if it were the zygote."""
    try:
        yield
    except BaseException as error:
        sys.stderr.write(f"{type(error).__name__}: {error}\n")
        sys.stderr.flush()
    finally:
        os._exit(1)


def _system(what: str, result: int) -> None:
    if result != 0:
        number = ctypes.get_errno()
        raise OSError(number, f"{what}: {os.strerror(number)}")


if __name__ == "__main__":
    main(sys.argv[1:])
