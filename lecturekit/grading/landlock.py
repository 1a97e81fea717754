"""The sandbox where there is no bubblewrap: a process shuts itself in with Landlock and a filter of its system calls.

Landlock is an allow-list of files that the kernel holds against a process and all of its children, and which nothing
takes back, not even root. It needs no privilege. What it leaves open, the filter closes: sockets (Landlock knows only
TCP, and a socket in the file system leads to D-Bus, which starts programs outside), changing the mode, owner or times
of somebody's files, limits and signals of other processes, keyrings, io_uring (which the filter could not watch).

Still open, and closed only by bubblewrap: seeing that a path exists, the list of the host's processes' ids, System V
memory, using up the processor. A folder cannot be hidden inside one that may be read. Linux on x86_64 and aarch64.
"""

from __future__ import annotations

import ctypes
import errno
import os
import platform
import stat
import struct
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

from lecturekit.grading import seccomp
from lecturekit.grading.seccomp import ALLOW, AT_LEAST, EQUAL, FAIL, IO_URING, KILL, LOAD, MACHINES, RETURN, X32

OLDEST = 3  # before it (Linux 6.2) a file that may be read could be cut to nothing
CREATE_RULESET, ADD_RULE, RESTRICT_SELF = 444, 445, 446
SET_NO_NEW_PRIVS = 38

# Rights on files, in the kernel's order: a bit each.
RIGHTS = (
    "execute write_file read_file read_dir remove_dir remove_file make_char make_dir make_reg make_sock make_fifo "
    "make_block make_sym refer truncate ioctl_dev"
).split()
SINCE = {"refer": 2, "truncate": 3, "ioctl_dev": 5}  # the Landlock version that brought it
READ = {"read_file", "read_dir"}
WRITE = set(RIGHTS) - {"execute", "make_char", "make_block"}
OF_A_FILE = {"execute", "write_file", "read_file", "truncate", "ioctl_dev"}

# System calls by what becomes of them: refused, said to have worked without doing anything (so that an honest
# shutil.copy works), or allowed only on the process itself. The numbers from 424 on are the same on both machines.
SYSTEM_CALLS = {
    "x86_64": {
        "refused": [41, *MACHINES["x86_64"][1], *IO_URING],  # socket, and what bubblewrap's filter refuses
        "idle": [90, 92, 94, 260, 268, 132, 235, 261, 280, 188, 189, 197, 198, 452, 463, 466, 469],
        "own limits": [302],  # prlimit64
        "own signals": [62, 200, 234, 129, 297, 424],  # kill tkill tgkill rt_sigqueueinfo rt_tgsigqueueinfo pidfd_…
    },
    "aarch64": {
        "refused": [198, *MACHINES["aarch64"][1], *IO_URING],
        "idle": [53, 54, 88, 5, 6, 14, 15, 452, 463, 466, 469],  # chmod, chown, utime and xattr by path
        "own limits": [261],
        "own signals": [129, 130, 131, 138, 240, 424],
    },
}
NUMBER, MACHINE, FIRST_ARGUMENT = 0, 4, 16  # where the filter finds them


def available() -> int:
    """The version of Landlock's interface that this kernel has; 0 where it has none, or one too old to rely on."""
    if not sys.platform.startswith("linux") or platform.machine() not in SYSTEM_CALLS:
        return 0
    version = _system_call(CREATE_RULESET, None, ctypes.c_size_t(0), ctypes.c_uint32(1))
    return version if version >= OLDEST else 0


def restrict(read: Sequence[Path], write: Sequence[Path], execute: Sequence[Path] | None = None) -> None:
    """Shut this process in, and all that it starts from now on. There is no way back.

    read: files, and folders with all below them, that may be read and listed.   write: those that may also be changed.
    execute: those whose programs may be started, by default the same as read. Files that are already open stay open;
    close what the process should not have. Call it in a fork that has a single thread: the kernel restricts threads one
    by one. Capabilities are given up too.
    Raises OSError when a path is missing, the process has other threads, or the kernel refuses; then the process may
    be restricted in part and must not go on.
    """
    version = available()
    if not version:
        raise OSError(errno.ENOSYS, f"this needs Landlock {OLDEST} (Linux 6.2) on {' or '.join(SYSTEM_CALLS)}")
    handled = {right for right in RIGHTS if SINCE.get(right, 1) <= version}
    network = 0b11 if version >= 4 else 0  # binding and connecting TCP sockets
    scope = 0b11 if version >= 6 else 0  # abstract Unix sockets and signals, to processes outside
    attributes = struct.pack("=QQQ", _bits(handled), network, scope)
    rules = _system_call(CREATE_RULESET, attributes, ctypes.c_size_t(len(attributes)), ctypes.c_uint32(0))
    if rules < 0:
        _fail("the kernel refuses a Landlock ruleset")
    try:
        for rights, paths in ((READ, read), (WRITE, write), ({"execute"}, read if execute is None else execute)):
            for path in paths:
                _allow(rules, path, rights & handled)
        threads = len(os.listdir("/proc/self/task"))
        if threads > 1:
            raise OSError(
                errno.EBUSY, f"this process has {threads} threads; restrict it in a fork, before it starts any"
            )
        if _libc().prctl(SET_NO_NEW_PRIVS, *map(ctypes.c_ulong, (1, 0, 0, 0))):
            _fail("the kernel refuses to rule out new privileges")
        if _system_call(RESTRICT_SELF, ctypes.c_int(rules), ctypes.c_uint32(0)):
            _fail("the kernel refuses to enforce a Landlock ruleset")
    finally:
        os.close(rules)
    _drop_capabilities()
    if not seccomp.install(_filter(platform.machine(), os.getpid(), signals=version >= 6)):
        _fail("the kernel refuses a filter of system calls")


def _allow(rules: int, path: Path, rights: set[str]) -> None:
    try:
        place = os.open(path, os.O_PATH | os.O_CLOEXEC)
    except OSError as error:
        raise OSError(
            error.errno, f"{path} cannot be allowed in the sandbox: {os.strerror(error.errno or 0)}"
        ) from None
    try:
        if not stat.S_ISDIR(os.fstat(place).st_mode):
            rights = rights & OF_A_FILE
        rule = struct.pack("=Qi", _bits(rights), place)
        if _system_call(ADD_RULE, ctypes.c_int(rules), ctypes.c_int(1), rule, ctypes.c_uint32(0)):
            _fail(f"the kernel refuses a Landlock rule for {path}")
    finally:
        os.close(place)


def _bits(rights: set[str]) -> int:
    return sum(1 << RIGHTS.index(right) for right in rights)


def _drop_capabilities() -> None:
    """Root keeps its name but none of its powers; to anybody else nothing changes."""
    header = struct.pack("=Ii", 0x20080522, 0)  # version 3 of the interface, this thread
    if _libc().capset(header, bytes(24)):
        _fail("the kernel refuses to give up capabilities")


def _filter(machine: str, process: int, signals: bool) -> list[tuple[int, int, int, int]]:
    """The filter of system calls as a program. signals: whether Landlock already keeps signals inside."""
    calls = SYSTEM_CALLS[machine]
    refused = FAIL | errno.EACCES
    program = [
        (LOAD, 0, 0, MACHINE),
        (EQUAL, 1, 0, MACHINES[machine][0]),
        (RETURN, 0, 0, KILL),  # calls by the numbers of another machine, 32-bit ones
        (LOAD, 0, 0, NUMBER),
    ]
    if machine == "x86_64":
        program += [(AT_LEAST, 0, 1, X32), (RETURN, 0, 0, refused)]
    for number in calls["refused"]:
        program += [(EQUAL, 0, 1, number), (RETURN, 0, 0, refused)]
    for number in calls["idle"]:
        program += [(EQUAL, 0, 1, number), (RETURN, 0, 0, FAIL)]
    for number in calls["own limits"] + ([] if signals else calls["own signals"]):
        me = 0 if number in calls["own limits"] else process
        program += [
            (EQUAL, 0, 5, number),
            (LOAD, 0, 0, FIRST_ARGUMENT),
            (EQUAL, 1, 0, me),
            (EQUAL, 0, 1, process),
            (RETURN, 0, 0, ALLOW),
            (RETURN, 0, 0, refused),
        ]
    program.append((RETURN, 0, 0, ALLOW))
    return program


def _libc() -> ctypes.CDLL:
    return ctypes.CDLL(None, use_errno=True)


def _system_call(number: int, *arguments: object) -> int:
    """-1 on failure, with ctypes.get_errno saying why."""
    return int(_libc().syscall(ctypes.c_long(number), *arguments))


def _fail(message: str) -> NoReturn:
    number = ctypes.get_errno()
    raise OSError(number, f"{message}: {os.strerror(number)}")
