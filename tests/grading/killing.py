"""Kill a batch again and again, then let it end. For any grader: say how to start it."""

import random
import signal
import time
from collections.abc import Callable
from subprocess import Popen, TimeoutExpired


def kill_at_random(start: Callable[[], Popen], seconds: float, kills: int, seed: int = 0, limit: float = 600) -> int:
    """Start it, SIGKILL it after a random time, `kills` times over; then start it once more and let it end.

    start: begins the batch, as the leader of a process group of its own.   seconds: about how long a batch takes from
    beginning to end, so that the kills fall anywhere in it.   Returns how many of the kills met a batch that was still
    running. Raises AssertionError when the last one does not end with status 0 within `limit` seconds.
    """
    draw = random.Random(seed)
    met = 0
    for _ in range(kills):
        process = start()
        try:
            process.wait(draw.uniform(0.0, seconds))
        except TimeoutExpired:
            process.send_signal(signal.SIGKILL)  # the coordinator alone: what it started must end by itself
            met += 1
        process.communicate()
    process = start()
    began = time.monotonic()
    printed, _ = process.communicate(timeout=limit)
    assert process.returncode == 0, f"status {process.returncode} after {time.monotonic() - began:.0f} s: {printed}"
    return met
