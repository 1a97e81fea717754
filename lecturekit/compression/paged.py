"""AdamW whose state lives in a file and is brought into memory page by page, under a budget.

Slide "QLoRA", "Paged Optimizers with CPU offloading"; Dettmers et al. 2023, section 3: the GPU's driver moves the
optimizer's pages to the computer's memory when its own runs out, and back. Here the two levels are kept apart by hand,
so that both can be counted: a memory-mapped file and memory for parameters on a CPU, pinned host memory and the GPU's
own for those on CUDA (not tried on a GPU yet).
"""

from __future__ import annotations

import math
import mmap
import os
import tempfile
from collections import OrderedDict
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from lecturekit.arguments import require_number, require_positive_int

PAGE_BYTES = 1 << 20  # the state of small tensors is put together up to here
ALIGNMENT = 64  # of each tensor within its page, in bytes: a cache line
MOMENTS = ("exp_avg", "exp_avg_sq")


class PagedAdamW(torch.optim.Optimizer):
    """AdamW that keeps exp_avg and exp_avg_sq in a file, with at most `budget` bytes of them in memory at once.

    params, lr, betas, eps, weight_decay: as for torch.optim.AdamW, whose numbers it gives to the last bit (those of
    foreach=False). budget: bytes. folder: where the file is made, on a disk rather than in memory; the system's
    temporary folder by default. The file is gone after close(), or when the program ends.

    A page holds both moments of one tensor, or of several small ones up to 1 MB. Tensors are not cut, because the last
    bit of an update can depend on where a tensor begins. A page is mapped when it is needed; the one used longest ago
    goes first when the budget is full. Every second step takes the parameters backwards, so that what is still in
    memory is used first. Parameters on CUDA have their pages in pinned host memory instead of a file.
    Not counted: the parameters, their gradients, and a temporary tensor of the size of one parameter.
    Raises TypeError or ValueError for bad arguments, ValueError when the budget is smaller than the largest page,
    OSError when the file finds no room.
    """

    def __init__(
        self,
        params: Iterable[Tensor] | Iterable[dict[str, Any]],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        *,
        budget: int,
        folder: str | Path | None = None,
    ) -> None:
        self.budget = require_positive_int("budget", budget)
        bounds = {"lr": (lr, math.inf), "eps": (eps, math.inf), "weight_decay": (weight_decay, math.inf)}
        bounds |= {f"betas[{i}]": (beta, 1) for i, beta in enumerate(betas)}
        for name, (value, above) in bounds.items():
            if not 0 <= require_number(name, value) < above:
                raise ValueError(f"{name} must be at least 0 and below {above}, got {value}")
        self.peak_bytes = 0
        """The most bytes of state that were in memory at once."""
        self.moved_bytes = 0
        """Bytes of state brought into memory and put out of it since the start, both counted."""
        self._file: BinaryIO | None = tempfile.TemporaryFile(dir=folder, buffering=0)  # noqa: SIM115  close() does
        self._pages: list[_Page] = []
        self._page_of: dict[Tensor, _Page] = {}
        self._resident: OrderedDict[_Page, Tensor] = OrderedDict()  # the one used longest ago first
        self._backwards = False
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay})

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Make room for the moments of more parameters, all zero. Raises as the constructor does."""
        super().add_param_group(param_group)
        try:
            self._add_pages(self.param_groups[-1]["params"])
        except BaseException:
            self.param_groups.pop()
            raise

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Update every parameter that has a gradient. closure, its result and errors as for torch.optim.AdamW."""
        self._require_open()
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        work = [(p, group) for group in self.param_groups for p in group["params"] if p.grad is not None]
        if any(p.grad.is_sparse for p, _ in work):
            raise RuntimeError("PagedAdamW does not take sparse gradients: make the layer with sparse=False")
        for p, group in reversed(work) if self._backwards else work:
            self._update(p, group)
        self._backwards = not self._backwards
        return loss

    def resident_bytes(self) -> int:
        """Bytes of state in memory now, whole pages."""
        return sum(page.nbytes for page in self._resident)

    def paged_bytes(self) -> int:
        """Bytes of state in all, in memory or not, whole pages."""
        return sum(page.nbytes for page in self._pages)

    def state_dict(self) -> dict[str, Any]:
        """As torch.optim.AdamW's, which can load it. All moments are copied into memory, whatever the budget."""
        self._require_open()
        found = super().state_dict()
        state = found["state"]
        for index, p in enumerate(self._parameters()):
            if index in state:
                state[index] = {**state[index], **dict(zip(MOMENTS, self._read(p), strict=True))}
        return found

    @torch.no_grad()
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from a state_dict of this class or of torch.optim.AdamW.

        Raises ValueError, before anything is changed, when it belongs to other parameters or has amsgrad or maximize.
        """
        self._require_open()
        saved, parameters = state_dict["state"], self._parameters()
        for index, p in enumerate(parameters):
            for name in MOMENTS:
                if index in saved and saved[index][name].shape != p.shape:
                    shape = tuple(saved[index][name].shape)
                    raise ValueError(f"{name} of parameter {index} must have shape {tuple(p.shape)}, got {shape}")
        for option in ("amsgrad", "maximize"):
            if any(group.get(option) for group in state_dict["param_groups"]):
                raise ValueError(f"{option} must be False, PagedAdamW does not do it")
        steps = {index: {"step": entry["step"].clone()} for index, entry in saved.items()}
        super().load_state_dict({**state_dict, "state": steps})
        for index, p in enumerate(parameters):
            self._write(p, [saved[index][name] for name in MOMENTS] if index in saved else None)

    def close(self) -> None:
        """Let pages and file go; steps raise RuntimeError from now on. Closing twice does nothing."""
        self._resident.clear()
        if self._file is not None:
            self._file.close()
            self._file = None

    def _update(self, p: Tensor, group: dict[str, Any]) -> None:
        """One step of Loshchilov & Hutter 2019, algorithm 2, in the operations that torch uses, in their order."""
        grad, (beta1, beta2) = p.grad, group["betas"]
        assert grad is not None
        state = self.state[p]
        state["step"] = state.get("step", torch.zeros((), dtype=torch.float32)) + 1
        step = state["step"].item()
        exp_avg, exp_avg_sq = self._moments(p)
        if group["weight_decay"] != 0:
            p.mul_(1 - group["lr"] * group["weight_decay"])
        exp_avg.lerp_(grad, 1 - beta1)
        exp_avg_sq.mul_(beta2).addcmul_(grad, grad, value=1 - beta2)
        denominator = (exp_avg_sq.sqrt() / (1 - beta2**step) ** 0.5).add_(group["eps"])
        p.addcdiv_(exp_avg, denominator, value=-(group["lr"] / (1 - beta1**step)))

    # One tensor at a time and none kept: a tensor that somebody holds keeps its page in memory.

    def _read(self, p: Tensor) -> list[Tensor]:
        return [moment.clone() for moment in self._moments(p)]

    def _write(self, p: Tensor, saved: list[Tensor] | None) -> None:
        for i, moment in enumerate(self._moments(p)):
            moment.zero_() if saved is None else moment.copy_(saved[i])

    def _moments(self, p: Tensor) -> tuple[Tensor, Tensor]:
        """exp_avg and exp_avg_sq of p, in its page's memory and in the layout that zeros_like(p) would have."""
        page = self._page_of[p]
        memory, stride = self._bring_in(page), torch.empty_like(p, device="meta").stride()
        start, size = page.starts[p], p.numel() * p.element_size()
        first, second = (
            memory[at : at + size].view(p.dtype).as_strided(p.shape, stride) for at in (start, start + _aligned(size))
        )
        return first, second

    def _bring_in(self, page: _Page) -> Tensor:
        if page in self._resident:
            self._resident.move_to_end(page)
            return self._resident[page]
        while self.resident_bytes() + page.nbytes > self.budget:
            oldest, memory = self._resident.popitem(last=False)
            oldest.put_out(memory)
            del memory
            self.moved_bytes += oldest.nbytes
        self._resident[page] = page.bring_in()
        self.moved_bytes += page.nbytes
        self.peak_bytes = max(self.peak_bytes, self.resident_bytes())
        return self._resident[page]

    def _add_pages(self, parameters: list[Tensor]) -> None:
        most = min(PAGE_BYTES, self.budget // 4)  # several pages should find room, so that there is something to keep
        drafts: list[list[Tensor]] = []
        filled, device = 0, None
        for p in parameters:
            if not p.is_floating_point():
                raise TypeError(f"params must have a floating-point dtype, got {p.dtype}")
            size = _state_bytes(p)
            if _whole(size) > self.budget:
                raise ValueError(
                    f"budget must be at least {_whole(size)} bytes, the two moments of a parameter of shape "
                    f"{tuple(p.shape)}, got {self.budget}"
                )
            if not drafts or filled + size > most or p.device != device:
                drafts.append([])
                filled, device = 0, p.device
            drafts[-1].append(p)
            filled += size
        assert self._file is not None
        offset = sum(page.nbytes for page in self._pages if isinstance(page, _FilePage))
        for draft in drafts:
            page: _Page
            if draft[0].device.type == "cpu":
                page = _FilePage(draft, self._file, offset)
                offset += page.nbytes
            else:
                page = _HostPage(draft)
            self._pages.append(page)
            self._page_of.update(dict.fromkeys(draft, page))

    def _parameters(self) -> list[Tensor]:
        return [p for group in self.param_groups for p in group["params"]]

    def _require_open(self) -> None:
        if self._file is None:
            raise RuntimeError("this PagedAdamW is closed: its state is gone, make a new one")


class _Page:
    """Where the moments of a few parameters lie while they are not in memory."""

    def __init__(self, parameters: list[Tensor]) -> None:
        self.starts: dict[Tensor, int] = {}
        end = 0
        for p in parameters:
            self.starts[p] = end
            end += _state_bytes(p)
        self.nbytes = _whole(end)

    def bring_in(self) -> Tensor:
        """The page as bytes, uint8 (nbytes,), to be changed in place."""
        raise NotImplementedError

    def put_out(self, memory: Tensor) -> None:
        """Keep what memory, from bring_in, holds now; it is dropped then."""
        raise NotImplementedError


class _FilePage(_Page):
    """A stretch of the file, mapped while it is in memory; dropping the tensor takes the mapping away."""

    def __init__(self, parameters: list[Tensor], file: BinaryIO, offset: int) -> None:
        super().__init__(parameters)
        self.file, self.offset = file, offset
        # Room is taken now: a disk that turns out to be full at a write into a mapping would end the program.
        if hasattr(os, "posix_fallocate"):
            os.posix_fallocate(file.fileno(), offset, self.nbytes)
        else:
            file.seek(offset)
            file.write(bytes(self.nbytes))

    def bring_in(self) -> Tensor:
        return torch.frombuffer(mmap.mmap(self.file.fileno(), self.nbytes, offset=self.offset), dtype=torch.uint8)

    def put_out(self, memory: Tensor) -> None:
        """Nothing to do: what was written into the mapping is the file's."""


class _HostPage(_Page):
    """A stretch of host memory, pinned where CUDA can then copy it directly, for parameters on another device."""

    def __init__(self, parameters: list[Tensor]) -> None:
        super().__init__(parameters)
        self.device = parameters[0].device
        self.host = torch.zeros(self.nbytes, dtype=torch.uint8, pin_memory=self.device.type == "cuda")

    def bring_in(self) -> Tensor:
        return self.host.to(self.device, non_blocking=True)

    def put_out(self, memory: Tensor) -> None:
        self.host.copy_(memory)


def _state_bytes(p: Tensor) -> int:
    """What both moments of a parameter take in a page."""
    return 2 * _aligned(p.numel() * p.element_size())


def _aligned(size: int) -> int:
    return max(1, math.ceil(size / ALIGNMENT)) * ALIGNMENT


def _whole(size: int) -> int:
    """Rounded up to what the system can map."""
    return math.ceil(size / mmap.ALLOCATIONGRANULARITY) * mmap.ALLOCATIONGRANULARITY
