"""PagedAdamW against torch.optim.AdamW bit for bit, and its memory against what the system says."""

import copy
import io
import math
import mmap
import os
import re
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from lecturekit.compression.paged import PagedAdamW

GRAIN = mmap.ALLOCATIONGRANULARITY
RAGGED = [(7,), (33, 5), (), (1000, 3), (1,), (257, 129), (64, 64), (0, 3), (5001,), (2, 3, 4, 5)]
LARGEST = 2 * 257 * 129  # moments of the largest of them, in numbers


def parameters(shapes=RAGGED, seed=0, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    return [nn.Parameter(torch.randn(shape, generator=generator).to(dtype)) for shape in shapes]


def gradients(params, step, skip=()):
    generator = torch.Generator().manual_seed(1000 + step)
    for i, p in enumerate(params):
        gradient = torch.randn(p.shape, generator=generator).to(p.dtype) * 0.1
        p.grad = None if i in skip else torch.empty_like(p).copy_(gradient)


def pairs(make, params, **settings):
    """The same parameters twice, under AdamW and under what make gives."""
    twins = [nn.Parameter(p.detach().clone()) for p in params]
    return params, torch.optim.AdamW(params, foreach=False, **settings), twins, make(twins, **settings)


def assert_same_steps(params, theirs, twins, ours, steps=20, skip=lambda step: ()):
    for step in range(steps):
        gradients(params, step, skip(step))
        gradients(twins, step, skip(step))
        theirs.step()
        ours.step()
        assert ours.resident_bytes() <= ours.peak_bytes <= ours.budget
        for p, twin in zip(params, twins, strict=True):
            assert torch.equal(p, twin)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("room", [1.0, 1.4, 3.0, 100.0])
def test_twenty_steps_equal_adamw_to_the_last_bit_under_every_budget(room, dtype):
    least = math.ceil(LARGEST * dtype.itemsize / GRAIN + 1) * GRAIN
    made = pairs(lambda ps, **s: PagedAdamW(ps, budget=int(least * room), **s), parameters(dtype=dtype), lr=0.03)
    assert_same_steps(*made)
    if room < 1.2:
        assert made[3].paged_bytes() > made[3].budget  # so pages did come and go
        assert made[3].moved_bytes > 10 * made[3].paged_bytes()


@pytest.mark.parametrize(
    "settings",
    [
        {"weight_decay": 0.0},
        {"weight_decay": 0.3},
        {"betas": (0.0, 0.5)},
        {"betas": (0.95, 0.999)},
        {"eps": 1e-3},
        {"lr": 0.0},
    ],
)
def test_every_setting_equals_adamw(settings):
    made = pairs(lambda ps, **s: PagedAdamW(ps, budget=300_000, **s), parameters(seed=1), **settings)
    assert_same_steps(*made, steps=8)


@pytest.mark.parametrize("threads", [1, 2])
def test_tensors_that_torch_works_on_in_several_threads_are_equal_too(threads):
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        params = parameters([(333, 301), (100_003,), (70_001,)], seed=2)
        assert_same_steps(*pairs(lambda ps, **s: PagedAdamW(ps, budget=850_000, **s), params), steps=6)
    finally:
        torch.set_num_threads(before)


def test_a_parameter_without_a_gradient_is_left_alone_and_its_steps_are_its_own():
    made = pairs(lambda ps, **s: PagedAdamW(ps, budget=300_000, **s), parameters())
    assert_same_steps(*made, skip=lambda step: {step % 3, 6} if step < 5 else {2})


def test_transposed_and_strided_parameters_equal_adamw():
    def strided():
        generator = torch.Generator().manual_seed(5)
        return [
            nn.Parameter(torch.randn(40, 30, generator=generator).t()),
            nn.Parameter(torch.randn(2, 3, 8, 8, generator=generator).to(memory_format=torch.channels_last)),
            nn.Parameter(torch.randn(50, 20, generator=generator)[:, ::2]),
        ]

    params, twins = strided(), strided()
    assert [p.stride() for p in params] == [p.stride() for p in twins] != [(30, 1), (192, 64, 8, 1), (10, 1)]
    assert_same_steps(params, torch.optim.AdamW(params, foreach=False), twins, PagedAdamW(twins, budget=60_000))


def test_groups_schedules_and_late_groups_equal_adamw():
    def optimizers(make, params):
        groups = [{"params": params[:3], "lr": 0.1}, {"params": params[3:8], "weight_decay": 0.5, "betas": (0.8, 0.9)}]
        optimizer = make(groups)
        return optimizer, torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 10)

    params, twins = parameters(), parameters()
    theirs, their_schedule = optimizers(lambda g: torch.optim.AdamW(g, foreach=False), params)
    ours, our_schedule = optimizers(lambda g: PagedAdamW(g, budget=300_000), twins)
    for step in range(10):
        if step == 4:
            theirs.add_param_group({"params": params[8:], "lr": 0.7})
            ours.add_param_group({"params": twins[8:], "lr": 0.7})
        assert_same_steps(params, theirs, twins, ours, steps=1)
        their_schedule.step()
        our_schedule.step()


def test_a_closure_runs_with_gradients_and_its_loss_comes_back():
    (p,) = parameters([(5,)])
    optimizer = PagedAdamW([p], budget=GRAIN)

    def closure():
        optimizer.zero_grad()
        loss = p.square().sum()
        loss.backward()
        return loss

    losses = [optimizer.step(closure).item() for _ in range(5)]
    assert losses == sorted(losses, reverse=True)


def test_pages_come_and_go_least_recently_used_first_and_every_second_step_runs_backwards():
    # Six pages, room for two: forwards 0 … 5 leaves 4 and 5, which the way back finds, and so on.
    params = parameters([(GRAIN // 8 // 4 * 4,)] * 6)  # two moments of 4 bytes each fill one page
    optimizer = PagedAdamW(params, budget=2 * GRAIN)
    for step in range(5):
        gradients(params, step)
        before = optimizer.moved_bytes
        optimizer.step()
        brought, put = (6, 4) if step == 0 else (4, 4)
        assert optimizer.moved_bytes - before == (brought + put) * GRAIN
    assert optimizer.resident_bytes() == optimizer.peak_bytes == 2 * GRAIN
    assert optimizer.paged_bytes() == 6 * GRAIN


def mapped_bytes(inode):
    """How many bytes of this file the system holds for this process: (mapped, resident)."""
    mapped = resident = 0
    mine = False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        head = re.match(r"[0-9a-f]+-[0-9a-f]+ \S+ \S+ \S+ (\d+)", line)
        if head:
            mine = int(head[1]) == inode
        elif mine and line.startswith("Size:"):
            mapped += int(line.split()[1]) * 1024
        elif mine and line.startswith("Rss:"):
            resident += int(line.split()[1]) * 1024
    return mapped, resident


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="/proc/self/smaps is Linux's")
def test_the_system_never_holds_more_than_the_budget_of_the_file(monkeypatch):
    params = parameters([(30_000,), (20_000,), (300, 100), (5,), (40_000,), (10_000,), (10_000,)])
    optimizer = PagedAdamW(params, lr=0.1, budget=500_000)
    inode = os.fstat(optimizer._file.fileno()).st_ino
    seen = []
    update = PagedAdamW._update

    def watched(self, p, group):
        update(self, p, group)
        mapped, resident = mapped_bytes(inode)
        seen.append((mapped, resident))
        assert mapped == self.resident_bytes()
        assert resident <= mapped <= self.budget

    monkeypatch.setattr(PagedAdamW, "_update", watched)
    for step in range(4):
        gradients(params, step)
        optimizer.step()
    assert max(resident for _, resident in seen) > 0.5 * optimizer.budget  # the state is where we looked
    assert optimizer.paged_bytes() > 2 * optimizer.budget
    optimizer.state_dict()
    optimizer.load_state_dict(optimizer.state_dict())
    assert mapped_bytes(inode)[0] == optimizer.resident_bytes() <= optimizer.budget
    optimizer.close()
    assert mapped_bytes(inode) == (0, 0)


def test_the_file_lies_in_the_folder_takes_its_room_at_once_and_goes(tmp_path):
    optimizer = PagedAdamW(parameters(), budget=1 << 20, folder=tmp_path)
    status = os.fstat(optimizer._file.fileno())
    assert status.st_dev == tmp_path.stat().st_dev
    assert status.st_size == optimizer.paged_bytes()
    if hasattr(os, "posix_fallocate"):
        assert 512 * status.st_blocks >= status.st_size
    optimizer.close()
    optimizer.close()
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(RuntimeError, match="closed"):
        optimizer.step()
    with pytest.raises(FileNotFoundError):
        PagedAdamW(parameters(), budget=1 << 20, folder=tmp_path / "missing")


@pytest.mark.parametrize("through", ["memory", "a file"])
def test_state_goes_from_adamw_to_paged_and_back(through):
    def carried(state):
        if through == "memory":
            return state
        file = io.BytesIO()
        torch.save(state, file)
        file.seek(0)
        return torch.load(file)

    params, theirs, twins, ours = pairs(lambda ps, **s: PagedAdamW(ps, budget=300_000, **s), parameters(), lr=0.02)
    assert_same_steps(params, theirs, twins, ours, steps=3, skip=lambda _: {1})
    expected, got = theirs.state_dict()["state"], ours.state_dict()["state"]
    assert expected.keys() == got.keys()
    for index, entry in expected.items():
        assert entry.keys() == got[index].keys()
        assert all(torch.equal(value, got[index][name]) for name, value in entry.items())

    next_ours = PagedAdamW(twins, budget=290_000)
    next_ours.load_state_dict(carried(theirs.state_dict()))
    next_theirs = torch.optim.AdamW(params, foreach=False)
    next_theirs.load_state_dict(carried(copy.deepcopy(ours.state_dict())))
    assert next_ours.param_groups[0]["lr"] == 0.02
    assert_same_steps(params, next_theirs, twins, next_ours, steps=5)


def test_loading_zeroes_what_the_saved_state_does_not_have():
    twins, params = parameters(), parameters()
    fresh = PagedAdamW(parameters(), budget=300_000).state_dict()
    ours, theirs = PagedAdamW(twins, budget=300_000), torch.optim.AdamW(params, foreach=False)
    gradients(twins, 99)
    ours.step()
    ours.load_state_dict(fresh)
    for p, twin in zip(params, twins, strict=True):
        p.data.copy_(twin)
    assert_same_steps(params, theirs, twins, ours, steps=3)


def test_saved_state_is_not_changed_by_going_on():
    params = parameters()
    optimizer = PagedAdamW(params, budget=300_000)
    gradients(params, 0)
    optimizer.step()
    state = optimizer.state_dict()
    before = copy.deepcopy(state)
    optimizer.load_state_dict(state)
    optimizer.step()
    for index, entry in before["state"].items():
        assert all(torch.equal(value, state["state"][index][name]) for name, value in entry.items())


SMALL = {"budget": 1 << 20}


@pytest.mark.parametrize(
    ("call", "error", "words"),
    [
        (lambda: PagedAdamW(parameters(), budget=GRAIN), ValueError, r"budget must be at least \d+ bytes.*\(1000, 3\)"),
        (lambda: PagedAdamW(parameters(), budget=0), ValueError, "budget must be at least 1"),
        (lambda: PagedAdamW(parameters(), budget=1e9), TypeError, "budget must be an int"),
        (lambda: PagedAdamW(parameters(), lr=-1.0, **SMALL), ValueError, "lr must be at least 0"),
        (lambda: PagedAdamW(parameters(), lr=math.nan, **SMALL), ValueError, "lr must be finite"),
        (lambda: PagedAdamW(parameters(), lr=torch.tensor(0.1), **SMALL), TypeError, "lr must be a number"),
        (lambda: PagedAdamW(parameters(), betas=(0.9, 1.0), **SMALL), ValueError, r"betas\[1\] must be at least 0"),
        (lambda: PagedAdamW(parameters(), eps=-1.0, **SMALL), ValueError, "eps must be at least 0"),
        (
            lambda: PagedAdamW(parameters(dtype=torch.complex64), **SMALL),
            TypeError,
            "params must have a floating-point",
        ),
        (lambda: PagedAdamW([], **SMALL), ValueError, "empty parameter list"),
    ],
)
def test_bad_arguments_are_named(call, error, words):
    with pytest.raises(error, match=words):
        call()


def test_a_group_that_is_too_large_leaves_the_rest_as_it_was():
    params = parameters([(10,), (GRAIN,)])
    optimizer = PagedAdamW(params[:1], budget=GRAIN)
    with pytest.raises(ValueError, match="budget must be at least"):
        optimizer.add_param_group({"params": params[1:]})
    assert len(optimizer.param_groups) == 1
    gradients(params[:1], 0)
    optimizer.step()


def test_state_that_does_not_fit_is_refused_before_anything_changes():
    params = parameters()
    optimizer = PagedAdamW(params, budget=300_000)
    gradients(params, 0)
    optimizer.step()
    state = optimizer.state_dict()
    wrong = copy.deepcopy(state)
    wrong["state"][3]["exp_avg_sq"] = torch.zeros(3)
    with pytest.raises(ValueError, match=r"exp_avg_sq of parameter 3 must have shape \(1000, 3\), got \(3,\)"):
        optimizer.load_state_dict(wrong)
    with pytest.raises(ValueError, match="amsgrad must be False"):
        optimizer.load_state_dict(torch.optim.AdamW(params, amsgrad=True).state_dict())
    with pytest.raises(ValueError, match="parameter group"):
        PagedAdamW(params[:3], budget=300_000).load_state_dict(state)
    for index, entry in optimizer.state_dict()["state"].items():
        assert all(torch.equal(value, state["state"][index][name]) for name, value in entry.items())


def test_sparse_gradients_are_refused():
    layer = nn.Embedding(10, 3, sparse=True)
    layer(torch.tensor([1])).sum().backward()
    with pytest.raises(RuntimeError, match="sparse"):
        PagedAdamW(layer.parameters(), budget=1 << 20).step()


@pytest.mark.gpu
def test_on_a_gpu_pages_live_in_pinned_memory_and_steps_equal_adamw():
    params = [nn.Parameter(p.detach().cuda()) for p in parameters()]
    made = pairs(lambda ps, **s: PagedAdamW(ps, budget=300_000, **s), params, lr=0.03)
    assert all(page.host.is_pinned() for page in made[3]._pages)
    for step in range(20):
        gradients(params, step)
        for p, twin in zip(params, made[2], strict=True):
            twin.grad = p.grad.clone()
        made[1].step()
        made[3].step()
        assert made[3].resident_bytes() <= made[3].budget
        assert all(torch.equal(p, twin) for p, twin in zip(params, made[2], strict=True))
