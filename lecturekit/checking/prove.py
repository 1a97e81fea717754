"""Prove a question: its oracle and every alternative pass; every misconception and every kind of nonsense is caught.

The questions are themselves tested with this: ``lecturekit prove`` prints the kill matrix, the tests assert it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lecturekit.checking.case import tensors
from lecturekit.checking.question import Question, evaluate, get, questions
from lecturekit.checking.verdict import Verdict

STUCK_SECONDS = 0.3


@dataclass(frozen=True)
class Trial:
    """One answer put to one question, and what should have come of it."""

    question: str
    answer: str
    expected: str
    verdict: Verdict
    holds: bool

    def __str__(self) -> str:
        got = self.verdict.misconception or self.verdict.kind
        return f"{'ok  ' if self.holds else 'FAIL'} {self.question:22} {self.answer:60} {got}"


def prove(question_id: str, seed: int | str = 0, device: str = "cpu", with_nonsense: bool = True) -> list[Trial]:
    """Every trial of one question under one seed. Nothing is raised for a failing trial: look at ``holds``."""
    asked = get(question_id)
    trials = [*_right(asked, seed, device), *_misconceptions(asked, seed, device)]
    return [*trials, *_nonsense(asked, seed, device)] if with_nonsense else trials


def _right(asked: Question, seed: int | str, device: str) -> Iterable[Trial]:
    for name, candidate in {"the oracle": asked.reference(), **asked.alternatives}.items():
        verdict = evaluate(asked.id, candidate, seed, device=device)
        yield Trial(asked.id, name, "passed", verdict, verdict.passed and verdict.score == 1.0)


def _misconceptions(asked: Question, seed: int | str, device: str) -> Iterable[Trial]:
    for known in asked.misconceptions:
        verdict = evaluate(asked.id, known.candidate, seed, device=device)
        named = not verdict.passed and verdict.misconception == known.name and verdict.hint == known.hint
        yield Trial(asked.id, known.name, known.name, verdict, named)


def _nonsense(asked: Question, seed: int | str, device: str) -> Iterable[Trial]:
    """Stub, constants, NaN, wrong shapes and dtypes, damage to the inputs, errors, loops without an end."""
    for name, (candidate, kinds) in nonsense(asked).items():
        seconds = STUCK_SECONDS if kinds == {"timeout"} else None
        verdict = evaluate(asked.id, candidate, seed, device=device, seconds=seconds)
        rejected = not verdict.passed and verdict.score == 0.0 and bool(verdict.message)
        yield Trial(asked.id, name, " or ".join(sorted(kinds)), verdict, rejected and verdict.kind in kinds)


def nonsense(asked: Question) -> dict[str, tuple[Any, set[str]]]:
    """Answers that no student should get a point for, each with the kinds of verdict that fit it."""
    wrong = {"value", "law", "unfit", "shape", "type", "dtype", "nan"}
    answers: dict[str, tuple[Any, set[str]]] = {
        "a blank stub": (_answer(asked, _stub), {"not attempted"}),
        "returns nothing": (_answer(asked, lambda *_: None), {"type", "unfit", "raised"}),
        "a constant": (_answer(asked, lambda *_: 1.0), wrong | {"raised"}),
        "not even callable": (1.0, {"unfit"}),
        "zeros": (_spoiled(asked, torch.zeros_like), wrong | {"raised"}),
        "ones": (_spoiled(asked, torch.ones_like), wrong | {"raised"}),
        "NaN": (_spoiled(asked, _to_nan), wrong | {"raised"}),
        "another shape": (_spoiled(asked, lambda t: t.unsqueeze(0)), {"shape", "type", "unfit", "raised"}),
        "another dtype": (_spoiled(asked, _other_dtype), {"dtype", "unfit", "type", "raised"}),
        "raises an error": (_answer(asked, _raises), {"raised"}),
        "never returns": (_answer(asked, _stuck), {"timeout"}),
    }
    if any(True for _ in tensors(asked.draw(0, 0).inputs)):
        answers["damages its inputs"] = (_damaging(asked), {"changed input", "raised"})
    return answers


def _stub(*_: Any) -> Any:
    raise NotImplementedError


def _raises(*_: Any) -> Any:
    raise KeyError("no such thing")


def _stuck(*_: Any) -> Any:
    while True:
        pass


def _to_nan(value: Tensor) -> Tensor:
    return value * float("nan") if value.is_floating_point() else torch.zeros_like(value)


def _other_dtype(value: Tensor) -> Tensor:
    return value.to(torch.float32 if value.dtype == torch.float64 else torch.float64)


def _answer(asked: Question, function: Callable[..., Any]) -> Any:
    """A function as it is; for a class question, the reference with that function as its forward."""
    if asked.kind == "function":
        return function
    return type("Candidate", (asked.reference(),), {"forward": lambda self, *args, **kwargs: function(*args)})


def _spoiled(asked: Question, spoil: Callable[[Tensor], Tensor]) -> Any:
    """The right answer with every tensor (and number and text) of its result spoiled."""

    def walk(value: Any) -> Any:
        if isinstance(value, Tensor):
            return spoil(value)
        if isinstance(value, (tuple, list)):
            return type(value)(walk(item) for item in value)
        if isinstance(value, (int, float)) and not isinstance(value, bool):
            spoiled = spoil(torch.tensor(value, dtype=torch.float32))
            if spoiled.ndim:
                return [value]
            return spoiled.item() if spoiled.dtype == torch.float32 else str(value)
        if isinstance(value, str):  # another text; in a list; of another type
            spoiled = spoil(torch.ones(()))
            if spoiled.ndim:
                return [value]
            return f"{value} {spoiled.item()}" if spoiled.dtype == torch.float32 else value.encode()
        if isinstance(value, nn.Module):  # a function that returns a model: spoil what the model gives
            value.register_forward_hook(lambda _module, _args, output: walk(output))
        return value

    reference = asked.reference()
    if asked.kind == "function":
        return lambda *args: walk(reference(*args))

    class Candidate(reference):  # type: ignore[misc, valid-type]
        def forward(self, *args: Any, **kwargs: Any) -> Any:
            return walk(super().forward(*args, **kwargs))

    return Candidate


def _damaging(asked: Question) -> Any:
    """The right answer, which also scribbles on the tensors that it was given."""

    def scribble(args: Any) -> None:
        for tensor in tensors(list(args)):
            with torch.no_grad():
                tensor.logical_not_() if tensor.dtype == torch.bool else tensor.add_(1)

    reference = asked.reference()
    if asked.kind == "function":

        def candidate(*args: Any) -> Any:
            result = reference(*args)
            scribble(args)
            if isinstance(result, nn.Module):
                result.register_forward_pre_hook(lambda _module, inputs: scribble(inputs))
            return result

        return candidate

    class Candidate(reference):  # type: ignore[misc, valid-type]
        def forward(self, *args: Any, **kwargs: Any) -> Any:
            result = super().forward(*args, **kwargs)
            scribble(args)
            return result

    return Candidate


def main(question_ids: list[str] | None = None, seeds: int = 1) -> int:
    """Print the kill matrix of these questions (all by default). Returns the number of trials that do not hold."""
    failures = 0
    for asked in [get(name) for name in question_ids] if question_ids else questions():
        for seed in range(seeds):
            for trial in prove(asked.id, seed):
                failures += not trial.holds
                if seed == 0 or not trial.holds:
                    print(trial)
    print(f"{failures} trials failed" if failures else "every trial holds")
    return failures
