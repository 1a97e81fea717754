"""What a question is asked about: seeded draws and the cases made of them."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor

T = TypeVar("T")


class Case:
    """One set of inputs. ``Case(weight=w, alpha=8)``: the order of the names is the order of the arguments.

    label names an edge case in the student's words ("r = 1"); None for an ordinary one. Values are data: tensors,
    numbers, strings, None, and lists, tuples and dicts of these.
    """

    def __init__(self, label: str | None = None, /, **inputs: Any) -> None:
        self.label = label
        self.inputs = inputs
        self.index = 0
        self.seed = 0

    def __getattr__(self, name: str) -> Any:
        try:
            return self.__dict__["inputs"][name]
        except KeyError:
            raise AttributeError(
                f"this case has no input {name!r}; it has {', '.join(self.__dict__['inputs'])}"
            ) from None

    def copy(self) -> Case:
        """A case with the same values in memory of its own, so that whoever gets it cannot harm this one."""
        twin = Case(self.label, **{name: copy_data(value) for name, value in self.inputs.items()})
        twin.index, twin.seed = self.index, self.seed
        return twin

    def __repr__(self) -> str:
        return f"case {self.index + 1}" + (f" ({self.label})" if self.label else "")


class Draw:
    """A seeded source of values. The same (seed, question, index) draws the same values on every device.

    seed may be an int, or a string or bytes where it is a secret. Values are drawn on the CPU and then moved.
    """

    def __init__(self, seed: int | str | bytes, question: str, index: int, device: torch.device | str = "cpu") -> None:
        word = seed.hex() if isinstance(seed, bytes) else str(seed)
        digest = hashlib.sha256(f"{word}|{question}|{index}".encode()).digest()
        self.index = index
        self.device = torch.device(device)
        self.seed = int.from_bytes(digest[:8], "big") >> 1
        self._generator = torch.Generator().manual_seed(self.seed)

    def edge(self, *labels: str) -> str | None:
        """The edge this case must show: the first case shows none, the next ones each label in turn, then none."""
        return labels[self.index - 1] if 1 <= self.index <= len(labels) else None

    def normal(self, *shape: int, scale: float = 1.0, dtype: torch.dtype = torch.float32) -> Tensor:
        """Independent normal values, mean 0, standard deviation ``scale``."""
        return (torch.randn(shape, generator=self._generator) * scale).to(self.device, dtype)

    def uniform(self, *shape: int, low: float = 0.0, high: float = 1.0) -> Tensor:
        """Independent uniform values in [low, high)."""
        return (torch.rand(shape, generator=self._generator) * (high - low) + low).to(self.device)

    def integers(self, low: int, high: int, *shape: int) -> Tensor:
        """Independent whole numbers low … high, both included, as int64."""
        return torch.randint(low, high + 1, shape, generator=self._generator).to(self.device)

    def integer(self, low: int, high: int) -> int:
        """One whole number low … high, both included."""
        return int(torch.randint(low, high + 1, (), generator=self._generator))

    def number(self, low: float, high: float) -> float:
        """One real number in [low, high)."""
        return float(torch.rand((), generator=self._generator, dtype=torch.float64)) * (high - low) + low

    def choice(self, options: Sequence[T]) -> T:
        """One of the options."""
        return options[self.integer(0, len(options) - 1)]

    def sizes(self, count: int, low: int, high: int) -> tuple[int, ...]:
        """Different sizes, so that no shape is square by accident and a transposed product cannot hide."""
        if high - low + 1 < count:
            raise ValueError(f"there are not {count} different sizes in {low} … {high}")
        order = torch.randperm(high - low + 1, generator=self._generator)[:count]
        return tuple(int(offset) + low for offset in order)

    def permutation(self, count: int) -> Tensor:
        """The numbers 0 … count − 1 in a drawn order, as int64."""
        return torch.randperm(count, generator=self._generator).to(self.device)


def copy_data(value: Any) -> Any:
    """A deep copy of plain data; tensors keep their device and lose their history."""
    if isinstance(value, Tensor):
        return value.detach().clone()
    if isinstance(value, Mapping):
        return {key: copy_data(item) for key, item in value.items()}
    if isinstance(value, tuple):
        return tuple(copy_data(item) for item in value)
    if isinstance(value, list):
        return [copy_data(item) for item in value]
    return value


def tensors(value: Any) -> Iterator[Tensor]:
    """Every tensor inside plain data."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, Mapping):
        for item in value.values():
            yield from tensors(item)
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from tensors(item)
