"""The question of lab 0: the student's own timer.

``measure(fn, clock, synchronize, repeats, warmup)`` returns the median of the seconds that one call of fn takes: first
``warmup`` calls that are not counted, then ``repeats`` calls that are, and no others. clock() gives the host's time in
seconds, synchronize() waits until the device has finished. Both are handed in, so that the question can bring a device
of its own: one that works on after the call has returned, as a GPU does, and whose time is known exactly. No GPU is
needed, and nothing depends on how fast the machine is.
"""

from __future__ import annotations

import statistics
import time
from numbers import Real
from typing import Any

import numpy
import torch

from lecturekit.checking import Case, Draw, Unfit, question

LAB = "lab00_timing"
SLIDE = "Adapter: inference latency, averaged over 100 trials"
TICK = 2.0**-20
"""About a microsecond. All times are whole ticks, so float64 adds and subtracts them without rounding."""


# timing.measure ------------------------------------------------------------------------------------------------------


@question("timing.measure", lab=LAB, points=30, slide=SLIDE, returns=("seconds",))
def measure(draw: Draw) -> Case:
    """Write the timer: warm up, wait for the device, take the median."""
    edge = draw.edge("one repeat", "no warm-up calls")
    repeats = 1 if edge == "one repeat" else draw.choice([7, 9, 11])  # odd, so that there is one middle value
    warmup = 0 if edge == "no warm-up calls" else draw.integer(2, 4)
    calls = warmup + repeats
    work = _spread(draw, repeats, ordered=draw.index == 0)
    slow = [draw.integer(30_000, 90_000) for _ in range(warmup)]
    return Case(
        edge,
        start=draw.integer(10**6, 10**9) * TICK,
        busy=draw.integer(20_000, 90_000) * TICK,
        launch=[draw.integer(20, 90) * TICK * (50 if call < warmup else 1) for call in range(calls)],
        work=[ticks * TICK for ticks in [*slow, *work]],
        repeats=repeats,
        warmup=warmup,
    )


def _spread(draw: Draw, count: int, ordered: bool) -> list[int]:
    """How many ticks each counted call works: most about the same, some several times as long, all different.

    ordered: the fastest call first and the slowest in the middle, so that whatever spoils the first run shows in the
    median, and the middle of an unsorted list is not the median.
    """
    typical, step = draw.integer(2_000, 8_000), draw.integer(110, 200)
    ticks = [typical + step * place for place in range(count)]
    for late in range(count - count // 4, count):
        ticks[late] *= draw.integer(3, 9)  # something else was running on the machine
    if ordered:
        ticks.insert(count // 2, ticks.pop())
        return ticks
    return [ticks[place] for place in draw.permutation(count).tolist()]


measure.oracle("lecturekit.timing:median_seconds")
measure.tolerance(
    ulps=1,
    why="the times are exact in float64; gathering them in a float32 tensor or array rounds each once",
)


class _Device:
    """A machine whose host and whose device each have their own course of time, ``slowness`` times that of the case.

    A call of fn keeps the host busy for its launch only; the work is queued and done while the host goes on.
    """

    def __init__(self, case: Case, slowness: int = 1) -> None:
        self.launch = [seconds * slowness for seconds in case.launch]
        self.work = [seconds * slowness for seconds in case.work]
        self.now = case.start
        self.idle_from = case.start + case.busy * slowness
        self.calls = 0
        self.readings = 0

    def fn(self) -> None:
        which = min(self.calls, len(self.work) - 1)
        self.calls += 1
        self.now += self.launch[which]
        self.idle_from = max(self.now, self.idle_from) + self.work[which]

    def synchronize(self) -> None:
        self.now = max(self.now, self.idle_from)

    def clock(self) -> float:
        self.readings += 1
        return self.now


@measure.driver
def _(timer: Any, case: Case) -> dict[str, Any]:
    """Let the timer time a device whose times are known, and another that takes exactly twice as long."""
    seconds, calls = [], []
    for slowness in (1, 2):
        device = _Device(case, slowness)
        result = timer(device.fn, device.clock, device.synchronize, case.repeats, case.warmup)
        if result is None:
            raise Unfit("measure returned None: is a return statement missing?")
        if device.readings == 0:
            raise Unfit("measure never read the clock that it was given: call clock() before and after fn()")
        # NumPy's and torch's single numbers are as good as Python's.
        is_number = isinstance(result, Real) and not isinstance(result, bool)
        seconds.append(float(result) if is_number else result)
        calls.append(device.calls)
    return {"calls of fn": calls[0], "seconds": seconds[0], "seconds on a device half as fast": seconds[1]}


def _counted(case: Case) -> list[float]:
    return [a + b for a, b in zip(case.launch[case.warmup :], case.work[case.warmup :], strict=True)]


def _within(case: Case, parts: dict[str, Any]) -> bool:
    rounding = torch.finfo(torch.float32).eps
    counted = _counted(case)
    return min(counted) * (1 - rounding) <= parts["seconds"] <= max(counted) * (1 + rounding)


measure.law("the median lies between the fastest and the slowest of the counted calls", _within)
measure.law(
    "a device half as fast takes twice as long",
    lambda case, parts: (
        abs(parts["seconds on a device half as fast"] - 2 * parts["seconds"])
        <= 2 * torch.finfo(torch.float32).eps * abs(parts["seconds"])
    ),
)


def _all_at_once(fn, clock, synchronize, repeats, warmup):
    """Seconds that all repeats take together, which is what two of the misconceptions divide."""
    _warm(fn, synchronize, warmup)
    start = clock()
    for _ in range(repeats):
        fn()
    synchronize()
    return clock() - start


def _run(fn: Any, clock: Any, synchronize: Any) -> float:
    """One run, timed as it should be."""
    synchronize()
    start = clock()
    fn()
    synchronize()
    return clock() - start


def _warm(fn: Any, synchronize: Any, warmup: int) -> None:
    for _ in range(warmup):
        fn()
    synchronize()


@measure.misconception(
    "does not warm up", hint="What does the very first call of a kernel do that no later call does? Should it count?"
)
def _(fn, clock, synchronize, repeats, warmup):
    return statistics.median(_run(fn, clock, synchronize) for _ in range(repeats))


@measure.misconception(
    "counts the warm-up calls too",
    hint="How many times are in the list that you take the median of? How many should be?",
)
def _(fn, clock, synchronize, repeats, warmup):
    return statistics.median(_run(fn, clock, synchronize) for _ in range(warmup + repeats))


@measure.misconception(
    "takes the warm-up calls out of the repeats", hint="Of how many calls is the median? Of as many as repeats says?"
)
def _(fn, clock, synchronize, repeats, warmup):
    times = [_run(fn, clock, synchronize) for _ in range(repeats)]
    return statistics.median(times[warmup:] or times)


@measure.misconception("warms up before every single run", hint="Count the calls of fn. How often is the device cold?")
def _(fn, clock, synchronize, repeats, warmup):
    times = []
    for _ in range(repeats):
        _warm(fn, synchronize, warmup)
        times.append(_run(fn, clock, synchronize))
    return statistics.median(times)


@measure.misconception(
    "stops the clock while the device is still working",
    hint="fn() returns as soon as its work is queued. What have you measured if you read the clock right then?",
)
def _(fn, clock, synchronize, repeats, warmup):
    _warm(fn, synchronize, warmup)
    times = []
    for _ in range(repeats):
        synchronize()
        start = clock()
        fn()
        times.append(clock() - start)
    return statistics.median(times)


@measure.misconception(
    "starts the clock while the device is still busy",
    hint="What is the device doing when the first counted run starts? Whose time is that?",
)
def _(fn, clock, synchronize, repeats, warmup):
    for _ in range(warmup):
        fn()
    times = []
    for _ in range(repeats):
        start = clock()
        fn()
        synchronize()
        times.append(clock() - start)
    return statistics.median(times)


@measure.misconception(
    "takes the mean", hint="One run in ten met another program on the machine. How far does it move a mean, a median?"
)
def _(fn, clock, synchronize, repeats, warmup):
    _warm(fn, synchronize, warmup)
    return statistics.mean(_run(fn, clock, synchronize) for _ in range(repeats))


@measure.misconception(
    "takes the minimum",
    hint="The fastest run answers another question. Which value has as many runs below it as above?",
)
def _(fn, clock, synchronize, repeats, warmup):
    _warm(fn, synchronize, warmup)
    return min(_run(fn, clock, synchronize) for _ in range(repeats))


@measure.misconception("takes the middle of the unsorted times", hint="The middle one in which order?")
def _(fn, clock, synchronize, repeats, warmup):
    _warm(fn, synchronize, warmup)
    return [_run(fn, clock, synchronize) for _ in range(repeats)][repeats // 2]


@measure.misconception(
    "times all repeats at once",
    hint="One number for all runs: can you take its median? And does launching overlap with working now?",
)
def _(fn, clock, synchronize, repeats, warmup):
    return _all_at_once(fn, clock, synchronize, repeats, warmup) / repeats


@measure.misconception(
    "times all calls at once and divides by the wrong number",
    hint="How many calls lie between your two readings of the clock, and by how many do you divide?",
)
def _(fn, clock, synchronize, repeats, warmup):
    return _all_at_once(fn, clock, synchronize, repeats, warmup) / (warmup + repeats)


@measure.misconception(
    "divides the median by the number of repeats", hint="Does each of your times cover one call, or all of them?"
)
def _(fn, clock, synchronize, repeats, warmup):
    _warm(fn, synchronize, warmup)
    return statistics.median(_run(fn, clock, synchronize) for _ in range(repeats)) / repeats


@measure.misconception("returns milliseconds", hint="In which unit does the clock count, and in which do you answer?")
def _(fn, clock, synchronize, repeats, warmup):
    _warm(fn, synchronize, warmup)
    return 1e3 * statistics.median(_run(fn, clock, synchronize) for _ in range(repeats))


@measure.misconception(
    "never reads the clock it is given", hint="Which of the arguments tells the time? Tests can only bring their own."
)
def _(fn, clock, synchronize, repeats, warmup):
    _warm(fn, synchronize, warmup)
    return statistics.median(_run(fn, time.perf_counter, synchronize) for _ in range(repeats))


@measure.alternative("sorted by hand")
def _(function, now, wait, n, ignored):
    for _ in range(ignored):
        function()
    times = []
    for _ in range(n):
        wait()
        before = now()
        function()
        wait()
        times.append(now() - before)
    return sorted(times)[n // 2]


@measure.alternative("numpy.median, waiting once before the loop")
def _(*args):
    fn, clock, synchronize, repeats, warmup = args
    for _ in range(warmup):
        fn()
        synchronize()
    synchronize()
    laps = [clock()]
    for _ in range(repeats):
        fn()
        synchronize()
        laps.append(clock())
    return numpy.median(numpy.diff(laps))


@measure.alternative("a float32 tensor")
def _(fn, clock, synchronize, repeats, warmup):
    times = torch.zeros(repeats)
    for call in range(warmup + repeats):
        synchronize()
        start = clock()
        fn()
        synchronize()
        if call >= warmup:
            times[call - warmup] = clock() - start
    return times.median()


@measure.alternative("times every call, drops the first ones")
def _(fn, clock, synchronize, repeats, warmup):
    times = [_run(fn, clock, synchronize) for _ in range(warmup + repeats)]
    return statistics.median(times[warmup:])
