"""A process that has shut itself in: what it may no longer do, tried for real in forked children."""

import ctypes
import errno
import json
import os
import signal
import socket
import subprocess
import sys
import traceback
from pathlib import Path

import pytest

from lecturekit.grading import landlock, seccomp
from lecturekit.grading.landlock import available, restrict

pytestmark = pytest.mark.skipif(
    available() == 0, reason="this machine has no Landlock, or one older than Linux 6.2, or is of another architecture"
)

SYSTEM = [Path(path) for path in ("/usr", "/bin", "/lib", "/lib64") if os.path.exists(path)]


@pytest.fixture
def course(tmp_path):
    """A course with a gradebook, a secret and another student's work, beside the folders that the jail is given."""
    for name in ("inside", "own", "course"):
        (tmp_path / name).mkdir()
    (tmp_path / "inside/data.txt").write_text("data")
    (tmp_path / "inside/link").symlink_to(tmp_path / "course/gradebook.db")
    for name in ("gradebook.db", "secret", "alice.ipynb"):
        (tmp_path / "course" / name).write_text(name)
    return tmp_path


def in_child(function, *arguments, read=(), write=(), execute=None, alone=True):
    """What function returns in a fork that restricts itself first; the name of the error where it raises OSError."""
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            if alone:
                restrict([*SYSTEM, *read], write, execute)
            try:
                result = function(*arguments)
            except OSError as error:
                result = errno.errorcode.get(error.errno, str(error))
            os.write(writing, json.dumps(result).encode())
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(0)
    os.close(writing)
    with os.fdopen(reading, "rb") as stream:
        answer = stream.read()
    os.waitpid(child, 0)
    assert answer, "the child ended without an answer"
    return json.loads(answer)


def read_text(path):
    return Path(path).read_text()


def inside(course):
    return {"read": [course / "inside"], "write": [course / "own"]}


def shell(command):
    done = subprocess.run(["/bin/sh", "-c", command], capture_output=True, text=True)
    return [done.returncode, done.stdout, done.stderr]


def test_what_is_allowed_still_works(course):
    def work():
        own = course / "own"
        (own / "folder").mkdir()
        (own / "folder/a.txt").write_text((course / "inside/data.txt").read_text())
        (own / "folder/a.txt").rename(own / "b.txt")
        (own / "folder").rmdir()
        os.truncate(own / "b.txt", 2)
        return [sorted(os.listdir(course / "inside")), (own / "b.txt").read_text(), shell("echo hello")[:2]]

    assert in_child(work, **inside(course)) == [["data.txt", "link"], "da", [0, "hello\n"]]


@pytest.mark.parametrize("name", ["gradebook.db", "secret", "alice.ipynb"])
def test_files_outside_cannot_be_read(course, name):
    assert in_child(read_text, course / "course" / name, **inside(course)) == "EACCES"
    assert in_child(read_text, course / "inside/../course" / name, **inside(course)) == "EACCES"
    assert in_child(read_text, course / "course" / name, alone=False) == name  # the test can tell the difference


def test_a_symlink_or_a_hard_link_leads_nowhere(course):
    assert in_child(read_text, course / "inside/link", **inside(course)) == "EACCES"

    def link():
        os.link(course / "course/secret", course / "own/secret")

    assert in_child(link, **inside(course)) in ("EACCES", "EXDEV")


@pytest.mark.parametrize("path", ["/etc/shadow", "/etc/passwd", "/proc/1/environ", "/proc/self/maps"])
def test_the_host_cannot_be_read(course, path):
    assert in_child(read_text, path, **inside(course)) == "EACCES"


def test_folders_outside_cannot_be_listed(course):
    assert in_child(lambda: os.listdir(course / "course"), **inside(course)) == "EACCES"
    assert in_child(lambda: os.listdir("/"), **inside(course)) == "EACCES"


CHANGES = {
    "write": lambda folder: (folder / "gradebook.db").write_text("mine"),
    "append": lambda folder: os.open(folder / "gradebook.db", os.O_WRONLY | os.O_APPEND),
    "truncate": lambda folder: os.truncate(folder / "gradebook.db", 0),
    "truncate while opening to read": lambda folder: os.open(folder / "gradebook.db", os.O_RDONLY | os.O_TRUNC),
    "create": lambda folder: (folder / "new").write_text(""),
    "remove": lambda folder: (folder / "gradebook.db").unlink(),
    "rename": lambda folder: (folder / "gradebook.db").rename(folder / "old.db"),
    "make a folder": lambda folder: (folder / "new").mkdir(),
    "make a link": lambda folder: (folder / "new").symlink_to("gradebook.db"),
    "make a pipe": lambda folder: os.mkfifo(folder / "new"),
}


@pytest.mark.parametrize("name", CHANGES)
def test_nothing_outside_can_be_changed(course, name):
    folder = course / "course"
    before = {path.name: path.read_text() for path in folder.iterdir()}
    for also_read in ([], [folder]):
        answer = in_child(CHANGES[name], folder, read=[course / "inside", *also_read], write=[course / "own"])
        assert answer == "EACCES"
    assert {path.name: path.read_text() for path in folder.iterdir()} == before


def test_the_mode_times_and_attributes_of_a_file_stay_as_they_are(course):
    path = course / "course/gradebook.db"
    before = path.stat()

    def change():
        os.chmod(path, 0o777)
        os.chown(path, 12345, 12345)
        os.utime(path, (0, 0))
        os.setxattr(path, "user.mine", b"x")
        return "said to have worked"

    assert in_child(change, **inside(course)) == "said to have worked"
    after = path.stat()
    assert (after.st_mode, after.st_uid, after.st_mtime) == (before.st_mode, before.st_uid, before.st_mtime)
    assert os.listxattr(path) == []


def test_honest_copies_with_their_mode_work(course):
    import shutil

    target = course / "own/copy.txt"
    assert in_child(lambda: str(shutil.copy2(course / "inside/data.txt", target)), **inside(course)) == str(target)
    assert target.read_text() == "data"


def test_no_socket_can_be_opened_so_neither_tcp_nor_udp_nor_the_host_s_services(course):
    with socket.create_server(("127.0.0.1", 0)) as server:
        address = server.getsockname()
        unix = socket.socket(socket.AF_UNIX)
        unix.bind(str(course / "own/service"))
        unix.listen()
        attempts = {
            "tcp": lambda: socket.create_connection(address, timeout=5).close(),
            "listen": lambda: socket.create_server(("127.0.0.1", 0)).close(),
            "udp": lambda: socket.socket(socket.AF_INET, socket.SOCK_DGRAM).sendto(b"x", address) and None,
            "unix": lambda: socket.socket(socket.AF_UNIX).connect(str(course / "own/service")),
            "netlink": lambda: socket.socket(socket.AF_NETLINK, socket.SOCK_RAW).close(),
        }
        with unix:
            for name, attempt in attempts.items():
                assert in_child(attempt, **inside(course)) == "EACCES", name
                assert in_child(attempt, alone=False) is None, name

    def pair():
        left, right = socket.socketpair()
        left.sendall(b"hello")
        return right.recv(5).decode()

    assert in_child(pair, **inside(course)) == "hello"  # asyncio and multiprocessing need it


@pytest.mark.skipif(available() < 4, reason="Landlock knows TCP from Linux 6.7 on")
def test_landlock_refuses_tcp_also_without_the_filter(course, monkeypatch):
    monkeypatch.setattr(seccomp, "install", lambda program: True)
    with socket.create_server(("127.0.0.1", 0)) as server:
        address = server.getsockname()
        assert in_child(lambda: socket.create_connection(address, timeout=5).close(), **inside(course)) == "EACCES"
        assert in_child(lambda: socket.create_server(("127.0.0.1", 0)).close(), **inside(course)) == "EACCES"


def test_programs_and_forks_that_it_starts_are_shut_in_too(course):
    secret = course / "course/secret"
    code, out, _ = in_child(shell, f"cat {secret}", **inside(course))
    assert (code != 0, out) == (True, "")

    def grandchild():
        return in_child(read_text, secret, alone=False)

    assert in_child(grandchild, **inside(course)) == "EACCES"
    program = f"import ctypes; ctypes.CDLL(None).prctl(38, 0, 0, 0, 0); print(open({str(secret)!r}).read())"
    prefixes = [Path(sys.prefix), Path(sys.base_prefix)]
    folders = {"read": [course / "inside", *prefixes], "write": [course / "own"]}
    done = in_child(lambda: subprocess.run([sys.executable, "-c", program], capture_output=True).returncode, **folders)
    assert done == 1


def test_programs_are_started_only_from_where_it_is_allowed(course):
    tool = course / "own/tool"
    tool.write_text("#!/bin/sh\necho ran\n")
    tool.chmod(0o755)
    assert in_child(lambda: subprocess.run([tool]).returncode, **inside(course)) == "EACCES"
    assert in_child(lambda: subprocess.run(["/bin/true"]).returncode, **inside(course), execute=[]) == "EACCES"
    assert in_child(lambda: subprocess.run([tool]).returncode, **inside(course), execute=[*SYSTEM, tool]) == 0


@pytest.mark.parametrize("version", [0, 5])
def test_other_processes_get_neither_signals_nor_limits_from_it(course, monkeypatch, version):
    """version 5: as a kernel without scoped signals, where the filter has to do it."""
    if version:
        monkeypatch.setattr(landlock, "available", lambda: version)
    import resource

    other = subprocess.Popen(["sleep", "60"])
    try:
        refused = ("EPERM", "EACCES")
        assert in_child(lambda: os.kill(other.pid, signal.SIGTERM), **inside(course)) in refused
        limit = lambda: resource.prlimit(other.pid, resource.RLIMIT_CPU, (1, 1))  # noqa: E731
        assert in_child(limit, **inside(course)) in refused
        assert in_child(lambda: resource.prlimit(0, resource.RLIMIT_CORE, (0, 0)) and None, **inside(course)) is None
        assert other.poll() is None
        assert in_child(lambda: os.kill(os.getpid(), 0), **inside(course)) is None
    finally:
        other.kill()
        other.wait()


def test_other_processes_cannot_be_inspected(course):
    other = subprocess.Popen(["sleep", "60"])
    try:

        def attach():
            libc = ctypes.CDLL(None, use_errno=True)
            if libc.ptrace(16, other.pid, None, None):
                raise OSError(ctypes.get_errno(), "")

        assert in_child(attach, **inside(course)) == "EPERM"
        assert in_child(read_text, f"/proc/{other.pid}/environ", read=["/proc"]) == "EACCES"
    finally:
        other.kill()
        other.wait()


def test_keyrings_io_uring_and_other_numberings_of_the_calls_are_refused(course):
    def call(number):
        libc = ctypes.CDLL(None, use_errno=True)
        libc.syscall(ctypes.c_long(number), ctypes.c_long(0), ctypes.c_long(0), ctypes.c_long(0))
        return errno.errorcode[ctypes.get_errno()]

    calls = landlock.SYSTEM_CALLS[os.uname().machine]["refused"]
    numbers = calls + ([landlock.X32 | 41] if os.uname().machine == "x86_64" else [])
    assert [in_child(call, number, **inside(course)) for number in numbers] == ["EACCES"] * len(numbers)


def test_root_gives_up_its_powers(course):
    def capabilities():
        return [line.split()[1] for line in status.splitlines() if line.startswith(("CapEff", "CapPrm", "NoNewPrivs"))]

    def read_status():
        nonlocal status
        status = read_text("/proc/self/status")
        return capabilities()

    status = ""
    assert in_child(read_status, read=["/proc"]) == ["0" * 16, "0" * 16, "1"]


def test_what_was_given_cannot_be_widened(course):
    def again():
        restrict([*SYSTEM, Path("/"), Path("/proc")], [Path("/")])
        return read_text(course / "course/secret")

    assert in_child(again, read=[course / "inside", Path("/proc")], write=[course / "own"]) == "EACCES"


def test_a_missing_path_a_second_thread_and_an_old_kernel_are_refused_in_a_clear_sentence(course, monkeypatch):
    with pytest.raises(FileNotFoundError, match="nowhere cannot be allowed in the sandbox"):
        restrict([course / "nowhere"], [])
    import threading

    stop = threading.Event()
    thread = threading.Thread(target=stop.wait)
    thread.start()
    try:
        with pytest.raises(OSError, match="threads; restrict it in a fork"):
            restrict([course], [])
    finally:
        stop.set()
        thread.join()
    monkeypatch.setattr(landlock, "available", lambda: 0)
    with pytest.raises(OSError, match="this needs Landlock"):
        restrict([course], [])


@pytest.mark.parametrize("machine", landlock.SYSTEM_CALLS)
@pytest.mark.parametrize("signals", [True, False])
def test_the_filter_decides_each_call_as_the_table_says(machine, signals):
    """The program is interpreted here, for the architecture that this machine is not as well."""
    program = landlock._filter(machine, 77, signals)

    def decide(number, argument=0, arch=seccomp.MACHINES[machine][0]):
        data = {landlock.NUMBER: number, landlock.MACHINE: arch, landlock.FIRST_ARGUMENT: argument}
        at = value = 0
        while True:
            code, if_true, if_false, operand = program[at]
            if code == landlock.RETURN:
                return operand
            if code == landlock.LOAD:
                value = data[operand]
            else:
                at += if_true if (value == operand if code == landlock.EQUAL else value >= operand) else if_false
            at += 1

    calls = landlock.SYSTEM_CALLS[machine]
    refused = landlock.FAIL | errno.EACCES
    assert decide(calls["refused"][0], arch=0x40000003) == landlock.KILL
    assert {decide(number) for number in calls["refused"]} == {refused}
    assert {decide(number) for number in calls["idle"]} == {landlock.FAIL}
    limits = calls["own limits"][0]
    assert [decide(limits, who) for who in (0, 77, 78)] == [landlock.ALLOW, landlock.ALLOW, refused]
    for number in calls["own signals"]:
        answers = [landlock.ALLOW] * 4 if signals else [refused, landlock.ALLOW, refused, refused]
        assert [decide(number, who) for who in (0, 77, 78, 2**32 - 1)] == answers  # -1 is everybody
    named = {number for numbers in calls.values() for number in numbers}
    assert {decide(number) for number in set(range(470)) - named} == {landlock.ALLOW}
