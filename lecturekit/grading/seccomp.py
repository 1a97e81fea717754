"""A filter of system calls for student code in bubblewrap (seccomp): what no notebook needs and no file system hides.

Keys of the kernel's key service belong to a login and not to a namespace: without the filter a notebook could read the
instructor's, and leave some for the next student's. The others are large parts of the kernel that have had many holes.
"""

from __future__ import annotations

import ctypes
import errno
import platform
import struct

SET_SECCOMP, FILTER = 22, 2
# Instructions of a filter (classic BPF) and its answers.
LOAD, EQUAL, AT_LEAST, RETURN = 0x20, 0x15, 0x35, 0x06
ALLOW, FAIL, KILL = 0x7FFF0000, 0x00050000, 0x80000000  # FAIL | errno: the call does nothing and fails with it
REFUSE = FAIL | errno.EPERM
X32 = 0x40000000  # x86's third set of system calls, whose numbers start here

# what the kernel calls the machine, and there add_key, request_key, keyctl, bpf, perf_event_open, userfaultfd
MACHINES = {
    "x86_64": (0xC000003E, (248, 249, 250, 321, 298, 323)),
    "aarch64": (0xC00000B7, (217, 218, 219, 280, 241, 282)),
    "riscv64": (0xC00000F3, (217, 218, 219, 280, 241, 282)),
}
IO_URING = (425, 426, 427)  # the same everywhere


class _Program(ctypes.Structure):
    _fields_ = [("length", ctypes.c_ushort), ("instructions", ctypes.c_char_p)]


def restrict() -> bool:
    """Refuse these system calls to this process and all that it will start. False where this machine cannot.

    The process must have given up new privileges already (prctl PR_SET_NO_NEW_PRIVS).
    """
    if platform.machine() not in MACHINES:
        return False
    machine, numbers = MACHINES[platform.machine()]
    refused = [*numbers, *IO_URING]
    # each line: what to do, how many lines to skip if it is so, how many if not, with what
    lines = [(LOAD, 0, 0, 4), (EQUAL, 1, 0, machine), (RETURN, 0, 0, REFUSE)]  # the calls of another machine: none
    lines += [(LOAD, 0, 0, 0), (AT_LEAST, len(refused) + 1, 0, X32)]
    lines += [(EQUAL, len(refused) - place, 0, number) for place, number in enumerate(refused)]
    lines += [(RETURN, 0, 0, ALLOW), (RETURN, 0, 0, REFUSE)]
    return install(lines)


def install(lines: list[tuple[int, int, int, int]]) -> bool:
    """Put a filter before this process's system calls, for good. False, with ctypes.get_errno, where it is refused."""
    program = _Program(len(lines), b"".join(struct.pack("=HBBI", *line) for line in lines))
    kernel = ctypes.CDLL(None, use_errno=True)
    return kernel.prctl(SET_SECCOMP, ctypes.c_ulong(FILTER), ctypes.byref(program), *(ctypes.c_ulong(0),) * 2) == 0
