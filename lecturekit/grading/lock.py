"""One grader a lab at a time, and no interrupt in the middle of writing a result down."""

from __future__ import annotations

import json
import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from lecturekit.labs import LabError
from lecturekit.runtime import atomic_write


class Busy(LabError):
    """Another process grades this lab."""


class Interrupts:
    """Ctrl-C and SIGTERM as KeyboardInterrupt, but never while a result is being written down.

    The second one comes through at once. Outside the main thread signals are left as they are.
    """

    def __init__(self) -> None:
        self._before: dict[int, Any] = {}
        self._depth = 0
        self._waiting = False

    def __enter__(self) -> Interrupts:
        if threading.current_thread() is threading.main_thread():
            self._before = {number: signal.signal(number, self._signal) for number in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _signal(self, _number: int, _frame: object) -> None:
        if self._depth and not self._waiting:
            self._waiting = True
        else:
            raise KeyboardInterrupt

    @contextmanager
    def held(self) -> Iterator[None]:
        """A block that is not to be interrupted; the interrupt follows at its end."""
        self._depth += 1
        try:
            yield
        finally:
            self._depth -= 1
        if self._waiting and not self._depth:
            self._waiting = False
            raise KeyboardInterrupt


@contextmanager
def lab_lock(course: Path, lab: str) -> Iterator[None]:
    """Be the only one who grades a lab of this course, in course/locks/<lab>.lock. Raises Busy, naming who does.

    The operating system lets go of the lock when its holder ends, whatever ended it.
    """
    folder = course / "locks"
    folder.mkdir(parents=True, exist_ok=True)
    lock, owner = FileLock(folder / f"{lab}.lock"), folder / f"{lab}.owner"
    try:
        lock.acquire(timeout=0)
    except Timeout:
        raise Busy(f"{lab} is being graded by {_owner(owner)}: wait until it is done, or stop it") from None
    try:
        atomic_write(owner, json.dumps({"pid": os.getpid(), "since": time.time()}))
        yield
    finally:
        owner.unlink(missing_ok=True)
        lock.release()


def _owner(path: Path) -> str:
    try:
        owner = json.loads(path.read_text())
        since = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(owner["since"]))
        return f"process {int(owner['pid'])}, which began at {since}"
    except (OSError, ValueError, KeyError, TypeError):
        return "another process"
