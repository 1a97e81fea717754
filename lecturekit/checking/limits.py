"""A time limit for code that may never return."""

from __future__ import annotations

import ctypes
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager


class TimeUp(BaseException):
    """The limit has passed. Not an Exception, so that an ``except Exception`` in the candidate cannot swallow it."""


@contextmanager
def time_limit(seconds: float) -> Iterator[None]:
    """Raise TimeUp in this thread when the block runs longer than this many seconds of wall-clock time.

    On POSIX in the main thread a timer signal does it; elsewhere (Windows, worker threads) a watchdog thread raises it
    at the next Python instruction. Code that stays inside one C call is stopped when that call returns.
    """
    if hasattr(signal, "setitimer") and threading.current_thread() is threading.main_thread():
        yield from _by_signal(seconds)
    else:
        yield from _by_watchdog(seconds)


def _by_signal(seconds: float) -> Iterator[None]:
    def stop(_signum: int, _frame: object) -> None:
        raise TimeUp

    before = signal.signal(signal.SIGALRM, stop)
    # Again every quarter of a second: a bare ``except:`` may swallow the first.
    signal.setitimer(signal.ITIMER_REAL, seconds, 0.25)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def _by_watchdog(seconds: float) -> Iterator[None]:
    thread = ctypes.c_ulong(threading.get_ident())
    done = threading.Event()
    lock = threading.Lock()

    def watch() -> None:
        if not done.wait(seconds):
            with lock:
                if not done.is_set():
                    ctypes.pythonapi.PyThreadState_SetAsyncExc(thread, ctypes.py_object(TimeUp))

    watchdog = threading.Thread(target=watch, daemon=True)
    watchdog.start()
    try:
        yield
    finally:
        with lock:
            done.set()
