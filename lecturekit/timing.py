"""How long a function takes, and how much memory: CUDA events on a GPU, and a CPU twin of the same interface.

What makes a timing wrong, and what is done here about it:

- The first calls are slow (memory is allocated, kernels are chosen): warm-up calls are not counted.
- A GPU works on after the call has returned: CUDA events take the time on the device itself, and reading them waits.
- Inputs left in the cache by the run before make the next too fast: the cache is flushed before each run.
- One run says little, and a mean is pulled up by whatever else the machine did: many runs, their median and quartiles.
- Two functions timed one after the other meet a different machine: ``compare`` runs them in turn.

The CUDA side has not been measured on a GPU yet; its logic is tested with stand-in events.
"""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any

import torch

from lecturekit.arguments import require_positive_int
from lecturekit.runtime import device as default_device

Function = Callable[[], Any]

DEFAULT_CACHE_BYTES = 64 * 2**20  # taken where the machine does not say how large its cache is
PROBE_BYTES = 1021  # an odd size, so that the probes are told from what the function allocates
MEMORY_TRIES = 5


def _quartiles(values: tuple[float, ...]) -> tuple[float, float, float]:
    """Lower quartile, median and upper quartile, between neighbours by linear interpolation."""
    if len(values) == 1:
        return values[0], values[0], values[0]
    lower, median, upper = statistics.quantiles(values, n=4, method="inclusive")
    return lower, median, upper


def _with_unit(seconds: float) -> tuple[float, str]:
    """The factor and the unit in which seconds reads as a number of at least 1, if any."""
    for factor, unit in ((1.0, "s"), (1e3, "ms"), (1e6, "µs")):
        if seconds * factor >= 1:
            return factor, unit
    return 1e9, "ns"


@dataclass(frozen=True)
class Timing:
    """What ``measure`` found. All times in seconds, memory in bytes.

    seconds: each timed run, in order.   peak_bytes: the most memory the function held at one time beyond what was
    allocated before it (None: not measured).   device: where it ran.
    """

    seconds: tuple[float, ...]
    peak_bytes: int | None
    device: str

    @property
    def median(self) -> float:
        return _quartiles(self.seconds)[1]

    @property
    def quartiles(self) -> tuple[float, float]:
        """Half of the runs took from the first to the second."""
        return _quartiles(self.seconds)[0], _quartiles(self.seconds)[2]

    @property
    def fastest(self) -> float:
        return min(self.seconds)

    @property
    def slowest(self) -> float:
        return max(self.seconds)

    def __str__(self) -> str:
        """For example "3.21 ms (3.10–3.40, 20 runs), peak 12.0 MiB": median, quartiles, runs, memory."""
        factor, unit = _with_unit(self.median)
        lower, upper = self.quartiles
        runs = "1 run" if len(self.seconds) == 1 else f"{len(self.seconds)} runs"
        text = f"{self.median * factor:.2f} {unit} ({lower * factor:.2f}–{upper * factor:.2f}, {runs})"
        return text if self.peak_bytes is None else f"{text}, peak {self.peak_bytes / 2**20:.1f} MiB"


@dataclass(frozen=True)
class Comparison:
    """What ``compare`` found. ratios: time of a ÷ time of b, one for each pair of runs. Below 1: a is faster."""

    ratios: tuple[float, ...]
    a: Timing
    b: Timing

    @property
    def ratio(self) -> float:
        """The median of the ratios."""
        return _quartiles(self.ratios)[1]

    @property
    def quartiles(self) -> tuple[float, float]:
        return _quartiles(self.ratios)[0], _quartiles(self.ratios)[2]

    def __str__(self) -> str:
        lower, upper = self.quartiles
        return f"a ÷ b = {self.ratio:.2f} ({lower:.2f}–{upper:.2f}); a: {self.a}; b: {self.b}"


def measure(
    fn: Function,
    *,
    repeats: int = 20,
    warmup: int = 3,
    flush_cache: bool = True,
    memory: bool = True,
    device: torch.device | str | None = None,
    clock: Callable[[], float] | None = None,
    synchronize: Callable[[], None] | None = None,
) -> Timing:
    """Time fn(), called ``warmup`` times uncounted and then ``repeats`` times counted.

    device: "cpu" or "cuda", by default the one the labs use. On CUDA the time is taken by events on the current
    stream, on the CPU by ``time.perf_counter``.
    flush_cache: before each counted run overwrite (CUDA) or read through (CPU) a buffer larger than the last cache.
    memory: call fn once more, untimed, for its peak memory: tensors that torch allocates on the device. On the CPU
    neither NumPy's memory nor that of other Python threads is seen; resident-set size would show both, but it also
    counts freed memory that the process keeps.
    clock, synchronize: a clock in seconds, and what waits for the device, to be used in place of the above. The
    clock is read after synchronize(), both before and after the run.

    Raises TypeError or ValueError for a wrong argument, "cuda" without CUDA among them, and RuntimeError, with the
    cause, when fn raises.
    """
    session = _Session(repeats, warmup, flush_cache, memory, device, clock, synchronize)
    session.warm_up(fn, "fn")
    seconds = tuple(session.time_once(fn, "fn") for _ in range(repeats))
    return Timing(seconds, session.peak_bytes(fn, "fn"), str(session.device))


def compare(
    fn_a: Function,
    fn_b: Function,
    *,
    repeats: int = 20,
    warmup: int = 3,
    flush_cache: bool = True,
    memory: bool = True,
    device: torch.device | str | None = None,
    clock: Callable[[], float] | None = None,
    synchronize: Callable[[], None] | None = None,
) -> Comparison:
    """Time two functions in turn, in the order A B, B A, A B …, so that a machine slowing down harms both alike.

    Each pair of neighbouring runs gives one ratio a ÷ b. Arguments and errors as in ``measure``; RuntimeError also
    when a run of fn_b takes no time by the clock.
    """
    session = _Session(repeats, warmup, flush_cache, memory, device, clock, synchronize)
    session.warm_up(fn_a, "fn_a")
    session.warm_up(fn_b, "fn_b")
    pairs: list[tuple[float, float]] = []
    for i in range(repeats):
        if i % 2 == 0:
            a = session.time_once(fn_a, "fn_a")
            b = session.time_once(fn_b, "fn_b")
        else:
            b = session.time_once(fn_b, "fn_b")
            a = session.time_once(fn_a, "fn_a")
        if b <= 0:
            raise RuntimeError(f"fn_b took {b} s by the clock, too short to compare with: let it do more in one call")
        pairs.append((a, b))
    where = str(session.device)
    return Comparison(
        ratios=tuple(a / b for a, b in pairs),
        a=Timing(tuple(a for a, _ in pairs), session.peak_bytes(fn_a, "fn_a"), where),
        b=Timing(tuple(b for _, b in pairs), session.peak_bytes(fn_b, "fn_b"), where),
    )


def median_seconds(
    fn: Function, clock: Callable[[], float], synchronize: Callable[[], None], repeats: int, warmup: int
) -> float:
    """The median of ``repeats`` timed calls after ``warmup`` uncounted ones, in seconds, and nothing else.

    ``measure`` without its flushing and its memory, for a device that the caller brings along: clock and synchronize
    as there. Exactly warmup + repeats calls of fn. Errors as in ``measure``.
    """
    timing = measure(
        fn,
        repeats=repeats,
        warmup=warmup,
        flush_cache=False,
        memory=False,
        device="cpu",
        clock=clock,
        synchronize=synchronize,
    )
    return timing.median


class _Session:
    """What ``measure`` and ``compare`` share: checked arguments, the flush buffer and the way to time one run."""

    def __init__(
        self,
        repeats: int,
        warmup: int,
        flush_cache: bool,
        memory: bool,
        device: torch.device | str | None,
        clock: Callable[[], float] | None,
        synchronize: Callable[[], None] | None,
    ) -> None:
        require_positive_int("repeats", repeats)
        if isinstance(warmup, bool) or not isinstance(warmup, int):
            raise TypeError(f"warmup must be an int, got {type(warmup).__name__}")
        if warmup < 0:
            raise ValueError(f"warmup must be at least 0, got {warmup}")
        for name, value in (("clock", clock), ("synchronize", synchronize)):
            if value is not None and not callable(value):
                raise TypeError(f"{name} must be a function without arguments, got {type(value).__name__}")
        self.device = _checked_device(device)
        self.warmup, self.memory = warmup, memory
        on_gpu = self.device.type == "cuda"
        self.clock = clock or time.perf_counter
        self.synchronize = synchronize or (_cuda_synchronize(self.device) if on_gpu else _nothing)
        self.by_events = on_gpu and clock is None
        self.flush: Callable[[], object] = _flusher(self.device) if flush_cache else _nothing

    def warm_up(self, fn: Function, name: str) -> None:
        if not callable(fn):
            raise TypeError(f"{name} must be a function without arguments, got {type(fn).__name__}")
        for _ in range(self.warmup):
            self._guarded(lambda: (fn(), self.synchronize()), fn, name)

    def time_once(self, fn: Function, name: str) -> float:
        self.flush()
        if self.by_events:
            return self._guarded(lambda: event_seconds(fn, _cuda_event, self.synchronize), fn, name)
        return self._guarded(lambda: clock_seconds(fn, self.clock, self.synchronize), fn, name)

    def peak_bytes(self, fn: Function, name: str) -> int | None:
        if not self.memory:
            return None
        if self.device.type == "cuda":
            return self._guarded(lambda: _cuda_peak_bytes(fn, self.device), fn, name)
        return self._guarded(lambda: _cpu_peak_bytes(fn), fn, name)

    def _guarded(self, step: Callable[[], Any], fn: Function, name: str) -> Any:
        """step(), with any error of the timed function named after it. A GPU's errors show only at synchronize."""
        try:
            if self.device.type == "cuda":
                with torch.cuda.device(self.device):
                    return step()
            return step()
        except Exception as error:
            called = getattr(fn, "__qualname__", repr(fn))
            raise RuntimeError(f"{name} ({called}) raised {type(error).__name__}: {error}") from error


def clock_seconds(fn: Function, clock: Callable[[], float], synchronize: Callable[[], None]) -> float:
    """One run by a clock outside the device: wait until the device is idle, start, run, wait again, stop."""
    synchronize()
    start = clock()
    result = fn()
    synchronize()
    seconds = clock() - start
    del result  # kept until here, so that freeing it is not timed
    return seconds


def event_seconds(fn: Function, event: Callable[[], Any], synchronize: Callable[[], None]) -> float:
    """One run by the device's own clock: events queued before and after the work, read when all is done.

    event: makes a new event with record() and elapsed_time(later) in milliseconds, as torch.cuda.Event has.
    """
    start, end = event(), event()
    start.record()
    result = fn()
    end.record()
    synchronize()  # an event has no time before the device has reached it
    del result
    return start.elapsed_time(end) / 1e3


def _nothing() -> None:
    """A CPU has finished when the call returns: nothing to wait for."""


def _cuda_event() -> torch.cuda.Event:
    return torch.cuda.Event(enable_timing=True)


def _cuda_synchronize(device: torch.device) -> Callable[[], None]:
    return lambda: torch.cuda.synchronize(device)


def _checked_device(device: torch.device | str | None) -> torch.device:
    try:
        chosen = default_device() if device is None else torch.device(device)
    except RuntimeError as error:
        raise ValueError(f"device must be cpu or cuda, got {device!r}") from error
    if chosen.type not in ("cpu", "cuda"):
        raise ValueError(f"device must be cpu or cuda, got {chosen}")
    if chosen.type == "cuda" and (chosen.index or 0) >= torch.cuda.device_count():
        raise ValueError(
            f"device must be one torch can use: {chosen} asked, {torch.cuda.device_count()} CUDA GPUs found"
        )
    return chosen


def _flusher(device: torch.device) -> Callable[[], object]:
    """A function that drives everything else out of the device's last cache."""
    if device.type == "cuda":
        size = 2 * torch.cuda.get_device_properties(device).L2_cache_size
        written = torch.empty(max(size, DEFAULT_CACHE_BYTES), dtype=torch.int8, device=device)
        return written.zero_  # queued on the stream before the first event, so not timed
    # Written once, because a fresh zero page is no memory of its own; then only read, because written lines would
    # be copied back to memory during the timed run.
    buffer = torch.ones(cpu_cache_bytes() * 5 // 4 // 4, dtype=torch.float32)
    line = buffer[::16]  # one number of each line of 64 bytes
    return line.sum


def cpu_cache_bytes() -> int:
    """The size of the largest CPU cache as Linux reports it; 64 MiB where nothing is reported."""
    units = {"K": 2**10, "M": 2**20, "G": 2**30}
    sizes = [DEFAULT_CACHE_BYTES]
    found = [file.read_text().strip() for file in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size")]
    sizes += [int(text[:-1]) * units[text[-1]] for text in found if text[-1:] in units]
    return max(sizes)


def _cuda_peak_bytes(fn: Function, device: torch.device) -> int:
    """The peak of torch's CUDA allocator during fn(), beyond what was allocated before."""
    torch.cuda.synchronize(device)
    before = torch.cuda.memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    fn()
    torch.cuda.synchronize(device)
    return torch.cuda.max_memory_allocated(device) - before


def _cpu_peak_bytes(fn: Function) -> int:
    """The peak of torch's CPU allocator during fn(), beyond what was allocated before.

    torch keeps no counter for the CPU, but its profiler records each allocation and release: their running sum.
    The profiler can come back without its records (seen once, on a busy machine), which would read as "no memory at
    all". So an allocation of a known size before fn and one after it must be among the records, else fn runs again.

    Raises RuntimeError if the profiler loses its records MEMORY_TRIES times.
    """
    for _ in range(MEMORY_TRIES):
        sizes = _recorded_allocations(fn)
        probes = [place for place, size in enumerate(sizes) if size == PROBE_BYTES]
        if len(probes) >= 2:
            held = list(accumulate(sizes[probes[0] : probes[-1]]))
            return max(0, *held[1:])
    raise RuntimeError(
        f"torch's profiler recorded no allocations, {MEMORY_TRIES} times: peak memory cannot be measured in this "
        "process. Expected: no other profiler running. Close it, or pass memory=False."
    )


def _recorded_allocations(fn: Function) -> list[int]:
    """Bytes of each allocation (+) and release (-) in fn(), as the profiler saw them, between two of PROBE_BYTES."""
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # else the profiler prints its start and stop to stderr
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        torch.empty(PROBE_BYTES, dtype=torch.uint8)
        result = fn()
        del result
        torch.empty(PROBE_BYTES, dtype=torch.uint8)
    recorded = profiler.profiler.kineto_results.events()
    changes = [event for event in recorded if event.name() == "[memory]" and event.device_type().name == "CPU"]
    return [change.nbytes() for change in sorted(changes, key=lambda event: event.start_ns())]
