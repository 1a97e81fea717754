"""The timers are judged by stand-ins: a clock that only work moves, and a device that works on after the call."""

import functools
import re

import pytest
import torch

from lecturekit import timing
from lecturekit.timing import Comparison, Timing, compare, measure


class Machine:
    """A host clock and a device with a queue. Launching takes the host 1 µs; the device then works on its own."""

    def __init__(self):
        self.now = 0.0
        self.device_free_at = 0.0
        self.clock_reads = 0

    def clock(self):
        self.clock_reads += 1
        return self.now

    def synchronize(self):
        self.now = max(self.now, self.device_free_at)

    def launch(self, seconds):
        self.now += 1e-6
        self.device_free_at = max(self.now, self.device_free_at) + seconds

    def compute(self, seconds):
        self.now += seconds

    def event(self):
        return Event(self)


class Event:
    """Like torch.cuda.Event: it takes its time when the device gets to it, and has none before."""

    def __init__(self, machine):
        self.machine, self.reached_at = machine, None

    def record(self):
        self.reached_at = max(self.machine.now, self.machine.device_free_at)

    def elapsed_time(self, later):
        assert self.machine.now >= later.reached_at, "read before the device has reached it"
        return (later.reached_at - self.reached_at) * 1e3


class Job:
    """A function that takes the next of these times at each call, the last one from then on."""

    def __init__(self, run, seconds):
        self.run, self.seconds, self.calls = run, list(seconds), 0

    def __call__(self):
        self.run(self.seconds[min(self.calls, len(self.seconds) - 1)])
        self.calls += 1


QUICK = {"flush_cache": False, "memory": False, "device": "cpu"}


def test_warm_up_runs_are_not_counted():
    machine = Machine()
    job = Job(machine.compute, [9, 9, 1, 2, 3])
    found = measure(job, repeats=3, warmup=2, clock=machine.clock, **QUICK)
    assert job.calls == 5
    assert found.seconds == pytest.approx((1, 2, 3))
    assert found.median == pytest.approx(2)


def test_no_warm_up_counts_the_first_run():
    machine = Machine()
    found = measure(Job(machine.compute, [9, 1, 1]), repeats=3, warmup=0, clock=machine.clock, **QUICK)
    assert found.seconds == pytest.approx((9, 1, 1))
    assert found.slowest == pytest.approx(9) and found.fastest == pytest.approx(1)


def test_an_asynchronous_device_is_waited_for():
    machine = Machine()
    job = Job(machine.launch, [5, 1, 2, 3])
    asked = {"clock": machine.clock, "synchronize": machine.synchronize, **QUICK}
    found = measure(job, repeats=3, warmup=1, **asked)
    assert found.seconds == pytest.approx((1, 2, 3), abs=2e-6)  # the launch itself takes 1 µs
    # without waiting only the launches are seen: the mistake that this test would miss otherwise
    blind = measure(Job(Machine().launch, [1]), repeats=3, clock=machine.clock, **QUICK)
    assert blind.median < 1e-3


def test_work_queued_before_is_not_counted():
    machine = Machine()
    machine.launch(100)
    found = measure(
        Job(machine.launch, [1]), repeats=1, warmup=0, clock=machine.clock, synchronize=machine.synchronize, **QUICK
    )
    assert found.median == pytest.approx(1, abs=2e-6)


def test_events_time_the_device_and_are_read_after_waiting():
    machine = Machine()
    machine.launch(100)  # an earlier job, or the cache flush: in the queue before the first event, so not counted
    assert timing.event_seconds(Job(machine.launch, [2]), machine.event, machine.synchronize) == pytest.approx(2)
    with pytest.raises(AssertionError, match="read before"):
        timing.event_seconds(Job(machine.launch, [2]), machine.event, lambda: None)


def test_on_cuda_the_events_are_used_unless_a_clock_is_given(monkeypatch):
    """The whole CUDA path with stand-ins for torch.cuda: flush, events, peak memory."""
    machine, log = Machine(), []
    gpu = torch.device("cuda", 0)

    class Here:
        def __init__(self, device):
            assert device == gpu

        def __enter__(self):
            log.append("enter")

        def __exit__(self, *_):
            log.append("exit")

    def flusher(device):
        return lambda: (log.append("flush"), machine.launch(50))

    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "device", Here)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: machine.synchronize())
    monkeypatch.setattr(torch.cuda, "Event", lambda enable_timing: machine.event())
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: 1000)
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda device: log.append("reset"))
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: 5096)
    monkeypatch.setattr(timing, "_flusher", flusher)
    job = Job(machine.launch, [9, 9, 1, 2, 3])
    found = measure(job, repeats=3, warmup=2, device="cuda:0")
    assert found.seconds == pytest.approx((1, 2, 3))
    assert found.peak_bytes == 4096
    assert found.device == "cuda:0"
    assert job.calls == 6 and log.count("flush") == 3 and log.count("reset") == 1
    assert log.count("enter") == log.count("exit") == 6

    by_clock = measure(Job(machine.launch, [4]), repeats=2, device="cuda:0", clock=machine.clock, memory=False)
    assert by_clock.seconds == pytest.approx((4, 4), abs=2e-6)
    assert by_clock.peak_bytes is None


@pytest.mark.parametrize("warmup", [0, 3])
def test_compare_takes_turns_and_swaps_who_is_first(warmup):
    machine, order = Machine(), []

    def a():
        order.append("a")
        machine.compute(3)

    def b():
        order.append("b")
        machine.compute(2)

    found = compare(a, b, repeats=4, warmup=warmup, clock=machine.clock, **QUICK)
    assert "".join(order) == "a" * warmup + "b" * warmup + "abbaabba"
    assert found.ratio == pytest.approx(1.5)
    assert found.a.seconds == pytest.approx((3,) * 4) and found.b.seconds == pytest.approx((2,) * 4)


def test_compare_is_not_fooled_by_a_machine_that_slows_down():
    """Each call takes longer than the last, for both alike. One after the other, b looks 1.8 × slower."""
    machine = Machine()
    calls = iter(range(100, 10_000))

    def drifting():
        machine.compute(next(calls) ** 2)

    fair = compare(drifting, drifting, repeats=40, warmup=0, clock=machine.clock, **QUICK)
    assert fair.ratio == pytest.approx(1, abs=0.02)  # neighbours differ by (n + 1)² / n² ≤ 1.02
    lower, upper = fair.quartiles
    assert 0.98 < lower < 1 < upper < 1.02

    calls = iter(range(100, 10_000))
    first = measure(drifting, repeats=40, warmup=0, clock=machine.clock, **QUICK)
    second = measure(drifting, repeats=40, warmup=0, clock=machine.clock, **QUICK)
    assert second.median / first.median > 1.5


def test_compare_takes_the_median_of_the_ratios():
    machine = Machine()
    a = Job(machine.compute, [1, 2, 3, 4, 500])
    b = Job(machine.compute, [1, 1, 1, 1, 1])
    found = compare(a, b, repeats=5, warmup=0, clock=machine.clock, **QUICK)
    assert found.ratios == pytest.approx((1, 2, 3, 4, 500))
    assert found.ratio == pytest.approx(3)
    assert found.quartiles == pytest.approx((2, 4))


def test_medians_and_quartiles_equal_numpys():
    import numpy

    for count in (1, 2, 3, 4, 7, 20):
        seconds = tuple(torch.rand(count, generator=torch.Generator().manual_seed(count), dtype=torch.float64).tolist())
        found = Timing(seconds, None, "cpu")
        expected = numpy.quantile(seconds, [0.25, 0.5, 0.75])
        assert (found.quartiles[0], found.median, found.quartiles[1]) == pytest.approx(tuple(expected), rel=1e-12)


def test_printed_as_a_person_reads_it():
    found = Timing((0.0031, 0.0032, 0.0034), 12 * 2**20, "cpu")
    assert str(found) == "3.20 ms (3.15–3.30, 3 runs), peak 12.0 MiB"
    assert str(Timing((2.5,), None, "cpu")) == "2.50 s (2.50–2.50, 1 run)"
    assert str(Timing((2.5e-5,), None, "cpu")) == "25.00 µs (25.00–25.00, 1 run)"
    assert str(Timing((0.0,), 0, "cpu")) == "0.00 ns (0.00–0.00, 1 run), peak 0.0 MiB"
    both = Comparison((0.5,), Timing((1.0,), None, "cpu"), Timing((2.0,), None, "cpu"))
    assert str(both).startswith("a ÷ b = 0.50 (0.50–0.50); a: 1.00 s")


def peak(fn):
    return measure(fn, repeats=1, warmup=0, flush_cache=False, device="cpu").peak_bytes


def test_peak_memory_counts_what_is_alive_at_once():
    mib = 2**20

    def three_at_once():
        a = torch.ones(mib // 4)  # 1 MiB
        b = torch.ones(mib // 2)  # 2 MiB
        del a
        return b, torch.ones(mib // 4)

    def one_after_the_other():
        for _ in range(10):
            torch.ones(mib // 4)

    slack = 4096  # torch makes a few scalars of its own
    assert 3 * mib <= peak(three_at_once) <= 3 * mib + slack
    assert mib <= peak(one_after_the_other) <= mib + slack
    assert peak(lambda: None) == 0


def test_peak_memory_starts_from_what_was_there():
    held = torch.ones(2**20)
    assert peak(held.sin_) < 4096
    assert 2**22 <= peak(held.sin) <= 2**22 + 4096


def test_peak_memory_sees_the_backward_pass():
    weight, x = torch.ones(256, 256, requires_grad=True), torch.ones(64, 256)

    def step():
        weight.grad = None
        ((x @ weight).relu() @ weight).sum().backward()

    forward = peak(lambda: ((x @ weight).relu() @ weight).sum())
    assert peak(step) >= forward + 256 * 256 * 4  # the gradient at least


class Forgetful:
    """torch's profiler, whose first `lost` records come back empty."""

    def __init__(self, lost):
        self.lost, self.used, self.genuine = lost, 0, torch.profiler.profile

    def __call__(self, **options):
        self.used += 1
        return self.genuine(**options | {"profile_memory": self.used > self.lost})


def test_a_profile_without_records_is_not_taken_for_no_memory(monkeypatch):
    forgetful = Forgetful(lost=2)
    monkeypatch.setattr(torch.profiler, "profile", forgetful)
    assert peak(lambda: torch.ones(2**18)) >= 2**20
    assert forgetful.used == 3


def test_a_profiler_that_records_nothing_is_an_error(monkeypatch):
    monkeypatch.setattr(torch.profiler, "profile", Forgetful(lost=timing.MEMORY_TRIES))
    with pytest.raises(RuntimeError, match="no allocations, 5 times.*pass memory=False"):
        peak(lambda: torch.ones(10))


def test_measuring_memory_prints_nothing(capfd):
    peak(lambda: torch.ones(10))
    assert capfd.readouterr() == ("", "")


def test_the_flush_reads_real_memory_beyond_the_cache():
    """A fresh zeroed buffer would share one page of zeros and flush nothing: the buffer must have been written."""
    flush = timing._flusher(torch.device("cpu"))
    lines = flush.__self__
    assert lines.numel() * 64 > timing.cpu_cache_bytes() >= timing.DEFAULT_CACHE_BYTES
    assert lines.stride() == (16,)  # sixteen float32 numbers are 64 bytes, one cache line
    assert flush() == lines.numel()


def test_each_counted_run_starts_from_a_flushed_cache(monkeypatch):
    log = []
    monkeypatch.setattr(timing, "_flusher", lambda device: lambda: log.append("flush"))
    measure(lambda: log.append("run"), repeats=3, warmup=2, memory=False, device="cpu")
    assert log == ["run"] * 2 + ["flush", "run"] * 3
    log.clear()
    compare(lambda: log.append("a"), lambda: log.append("b"), repeats=2, warmup=0, memory=False, device="cpu")
    assert log == ["flush", "a", "flush", "b", "flush", "b", "flush", "a"]
    log.clear()
    measure(lambda: log.append("run"), repeats=2, warmup=0, **QUICK)
    assert log == ["run"] * 2


def test_with_the_real_clock():
    found = measure(lambda: torch.ones(1000).sum(), repeats=5, device="cpu")
    assert len(found.seconds) == 5 and all(seconds > 0 for seconds in found.seconds)
    assert found.fastest <= found.quartiles[0] <= found.median <= found.quartiles[1] <= found.slowest
    assert found.device == "cpu"
    assert 4000 <= found.peak_bytes <= 8192


def divide():
    return 1 / 0


@pytest.mark.parametrize("warmup", [0, 1])
def test_a_function_that_raises_is_named_and_its_error_kept(warmup):
    with pytest.raises(RuntimeError, match=r"^fn \(divide\) raised ZeroDivisionError: division by zero$") as caught:
        measure(divide, warmup=warmup, **QUICK)
    assert isinstance(caught.value.__cause__, ZeroDivisionError)
    with pytest.raises(RuntimeError, match=r"^fn_b \(divide\) raised ZeroDivisionError"):
        compare(lambda: None, divide, warmup=warmup, **QUICK)
    partial = functools.partial(divide)  # has no name of its own
    with pytest.raises(RuntimeError, match=re.escape(f"fn ({partial!r}) raised")):
        measure(partial, warmup=warmup, **QUICK)


def test_an_error_in_the_memory_run_is_named_too():
    def only_twice(left=[1, 1]):  # noqa: B006  # the list is the memory
        left.pop()

    with pytest.raises(RuntimeError, match=r"only_twice\) raised IndexError"):
        measure(only_twice, repeats=2, warmup=0, flush_cache=False, device="cpu")


def test_interrupting_is_not_wrapped():
    def interrupted():
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        measure(interrupted, **QUICK)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"repeats": 0}, ValueError, "repeats must be at least 1, got 0"),
        ({"repeats": 2.0}, TypeError, "repeats must be an int"),
        ({"warmup": -1}, ValueError, "warmup must be at least 0, got -1"),
        ({"warmup": None}, TypeError, "warmup must be an int"),
        ({"device": "tpu!"}, ValueError, "device must be cpu or cuda, got 'tpu!'"),
        ({"device": "meta"}, ValueError, "device must be cpu or cuda, got meta"),
        ({"clock": 3}, TypeError, "clock must be a function"),
        ({"synchronize": 3}, TypeError, "synchronize must be a function"),
    ],
)
def test_wrong_use_is_refused_by_name(arguments, error, message):
    for call in (lambda: measure(divide, **arguments), lambda: compare(divide, divide, **arguments)):
        with pytest.raises(error, match=message):
            call()


def test_what_cannot_be_called_is_refused():
    with pytest.raises(TypeError, match="fn must be a function without arguments, got int"):
        measure(3, **QUICK)
    with pytest.raises(TypeError, match="fn_b must be a function without arguments, got Tensor"):
        compare(lambda: None, torch.ones(1), **QUICK)


def test_cuda_without_a_gpu_is_refused(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    with pytest.raises(ValueError, match="cuda asked, 0 CUDA GPUs found"):
        measure(divide, device="cuda")


def test_too_short_to_compare():
    machine = Machine()
    with pytest.raises(RuntimeError, match="fn_b took 0"):
        compare(Job(machine.compute, [1]), lambda: None, clock=machine.clock, **QUICK)


@pytest.mark.gpu
def test_on_a_gpu():
    a = torch.ones(2048, 2048, device="cuda")
    found = measure(lambda: a @ a, device="cuda", repeats=5)
    assert all(seconds > 0 for seconds in found.seconds)
    assert found.peak_bytes >= 2048 * 2048 * 4
    # more work takes longer by the device's clock, though both launches return at once
    both = compare(lambda: [a @ a for _ in range(8)], lambda: a @ a, device="cuda", repeats=9)
    assert both.ratio > 2


@pytest.mark.gpu
def test_a_gpus_error_is_named():
    def too_large():
        torch.empty(2**50, device="cuda")

    with pytest.raises(RuntimeError, match="too_large"):
        measure(too_large, device="cuda")


def test_median_seconds_is_measures_median_and_calls_no_more_than_it_says():
    machine = Machine()
    job = Job(machine.launch, [9.0, 9.0, 1.0, 3.0, 2.0])
    found = timing.median_seconds(job, machine.clock, machine.synchronize, repeats=3, warmup=2)
    assert found == pytest.approx(2.0 + 1e-6)  # the launch is the host's own microsecond
    assert job.calls == 5
