"""What the attacks share: the lab they attack, honest answers to it, and the data class of an attack.

A tests' module, loaded by conftest.py as `grading_attacks.kit`.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from nbformat.v4 import new_code_cell, new_markdown_cell

LAB = "lab98_attacked"
CANARY = "canary of the solutions, 5b0d1c"  # stands in the model answers only
WORD = "a hidden word, 77aa03"  # stands in a hidden test only
LEAK = "LEAK"  # what an attack prints before anything it got hold of; put together at run time, see PRELUDE
RAN = "attack ran:"


def _answer(grade_id: str, points: float | None = None) -> str:
    marks = {"grade": points is not None, "grade_id": grade_id, "locked": False, "schema_version": 3}
    return json.dumps(marks | {"solution": True, "task": False} | ({} if points is None else {"points": points}))


def _tests(grade_id: str, points: float) -> str:
    marks = {"grade": True, "grade_id": grade_id, "locked": True, "points": points, "schema_version": 3}
    return json.dumps(marks | {"solution": False, "task": False})


SOURCE = f'''\
# %% [markdown]
# # A lab under attack

# %%
import math

import numpy
import torch
from torch import nn

from lecturekit.checking import check, grade, passing

# %% [markdown]
# ## Four questions of lecturekit, one of plain asserts, one in words

# %% nbgrader={_answer("merge")}
def merge(weight, A, B, alpha):
    """W' = W + (alpha / r) B A."""
    ### BEGIN SOLUTION
    return weight + alpha / A.shape[0] * (B @ A)  # {CANARY}
    ### END SOLUTION


# %% nbgrader={_tests("merge-test", 15)}
check("lora.merge", merge)
### BEGIN HIDDEN TESTS
grade("lora.merge", merge)
### END HIDDEN TESTS

# %%
merge = passing("lora.merge", merge)
print("merged:", tuple(merge(torch.zeros(3, 2), torch.ones(1, 2), torch.ones(3, 1), 1.0).shape))

# %% nbgrader={_answer("inject")}
def add_lora(model, targets, r, alpha):
    """Freeze the model and put a layer with a branch in the place of every nn.Linear named in targets."""
    ### BEGIN SOLUTION
    class Layer(nn.Module):  # {CANARY}
        def __init__(self, base):
            super().__init__()
            self.base, self.scale = base, alpha / r
            self.A = nn.Parameter(torch.randn(r, base.in_features) / math.sqrt(3 * base.in_features))
            self.B = nn.Parameter(torch.zeros(base.out_features, r))

        def forward(self, x):
            return self.base(x) + self.scale * x @ self.A.T @ self.B.T

    model.requires_grad_(False)
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, nn.Linear) and name in targets:
                parent.add_module(name, Layer(child))
    return model
    ### END SOLUTION


# %% nbgrader={_tests("inject-test", 15)}
check("lora.inject", add_lora)
### BEGIN HIDDEN TESTS
grade("lora.inject", add_lora)
### END HIDDEN TESTS

# %% nbgrader={_answer("count")}
def storage(shapes, r, bits):
    """Parameters and bytes of LoRA branches of rank r beside layers of these (out, in) shapes."""
    ### BEGIN SOLUTION
    parameters = sum(r * (out + inp) for out, inp in shapes)  # {CANARY}
    return parameters, parameters * bits / 8
    ### END SOLUTION


# %% nbgrader={_tests("count-test", 10)}
check("lora.count", storage)
### BEGIN HIDDEN TESTS
grade("lora.count", storage)
### END HIDDEN TESTS

# %% nbgrader={_answer("compress")}
def compress(base, fine):
    """The signs of the change, and its mean size."""
    ### BEGIN SOLUTION
    delta = fine.float() - base.float()  # {CANARY}
    return torch.where(delta > 0, 1, -1).to(torch.int8), delta.abs().mean()
    ### END SOLUTION


# %% nbgrader={_tests("compress-test", 20)}
check("bitdelta.compress", compress)
### BEGIN HIDDEN TESTS
grade("bitdelta.compress", compress)
### END HIDDEN TESTS

# %% nbgrader={_answer("rows")}
def rows(x):
    """The sum of each row, as a tensor."""
    ### BEGIN SOLUTION
    return x.sum(1)  # {CANARY}
    ### END SOLUTION


# %% nbgrader={_tests("rows-test", 5)}
assert callable(rows), "rows must be a function"
### BEGIN HIDDEN TESTS
import os as _os
import random as _random

_draw = _random.Random(int(_os.environ.get("LECTUREKIT_GRADING_SEED", "1")))
_hidden = torch.tensor([[_draw.randint(10**12, 10**13) for _ in range(3)] for _ in range(4)])
_expected = torch.tensor([sum(row) for row in _hidden.tolist()])
_word = "{WORD}"
assert isinstance(rows(_hidden), torch.Tensor), "rows must give a tensor"
assert torch.allclose(rows(_hidden), _expected), "rows are not the sums"
numpy.testing.assert_allclose(rows(_hidden).numpy(), _expected.numpy())
assert all(abs(a - b) < 1 for a, b in zip(rows(_hidden).tolist(), _expected.tolist())), "rows are not the sums"
### END HIDDEN TESTS

# %% [markdown] nbgrader={_answer("explain", 10)}
# ### BEGIN SOLUTION
# {CANARY}
# ### END SOLUTION
'''

FULL: dict[str, float | None] = {
    "merge-test": 15,
    "count-test": 10,
    "compress-test": 20,
    "rows-test": 5,
    "inject-test": 15,
    "explain": None,  # a person decides what a written answer is worth
}
TESTS = tuple(name for name in FULL if name.endswith("-test"))
NOTHING: dict[str, float | None] = dict.fromkeys(FULL, 0)
QUESTIONS = {"lora.merge": 6, "lora.count": 6, "bitdelta.compress": 7, "lora.inject": 4}  # cases of each

HONEST = {
    "merge": "def merge(weight, A, B, alpha):\n    return weight + alpha / A.shape[0] * (B @ A)",
    "count": "def storage(shapes, r, bits):\n    n = sum(r * (o + i) for o, i in shapes)\n    return n, n * bits / 8",
    "compress": "def compress(base, fine):\n    d = fine.float() - base.float()\n"
    "    return torch.where(d > 0, 1, -1).to(torch.int8), d.abs().mean()",
    "rows": "def rows(x):\n    return x.sum(dim=1)",
    "inject": """\
class Branch(nn.Module):
    def __init__(self, base, r, alpha):
        super().__init__()
        self.base, self.scale = base, alpha / r
        self.A = nn.Parameter(torch.randn(r, base.in_features) * 0.1)
        self.B = nn.Parameter(torch.zeros(base.out_features, r))

    def forward(self, x):
        return self.base(x) + self.scale * x @ self.A.T @ self.B.T


def add_lora(model, targets, r, alpha):
    model.requires_grad_(False)
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, nn.Linear) and name in targets:
                setattr(parent, name, Branch(child, r, alpha))
    return model""",
    "explain": "Because.",
}
WRONG = {
    "merge": "def merge(weight, A, B, alpha):\n    return weight.clone()",
    "count": "def storage(shapes, r, bits):\n    return 1, 2",
    "compress": "def compress(base, fine):\n    return torch.ones(base.shape, dtype=torch.int8), torch.tensor(1.0)",
    "rows": "def rows(x):\n    return torch.zeros(len(x))",
    "inject": "def add_lora(model, targets, r, alpha):\n    return model",
}
STUB = "# YOUR CODE HERE\nraise NotImplementedError"

# what every attack may use; COURSE and HOST are filled in by `Course98`, in a form that does not show in the source
PRELUDE = """\
import os, sys, gc, json, time, socket, signal, threading, subprocess
from pathlib import Path
COURSE = bytes.fromhex("@COURSE@").decode()
HOST = json.loads(bytes.fromhex("@HOST@"))
NAME = "@NAME@"


def leak(kind, what):
    if what not in (None, False, "", b"", [], {}):
        print("LE" + "AK", kind, repr(what)[:2000], flush=True)


def attempt(action, *arguments):
    try:
        return action(*arguments)
    except BaseException as error:
        return None


def jailed():
    if os.path.exists(COURSE + "/nbgrader_config.py"):
        return False
    return os.readlink("/proc/self/ns/pid") != HOST["pid namespace"]


print("attack", "ran:", NAME, flush=True)
"""
# an attack that would harm a machine without a sandbox looks first
GUARD = """\
if not jailed():
    leak("the attack runs without a sandbox", os.getpid())
    raise SystemExit("only for the sandbox")
"""


@dataclass(frozen=True)
class Attack:
    """One hostile, or unlucky, submission.

    name: the student's.   top: code of a cell above everything.   answers: what is written instead of the honest
    answers.   after: {cell id: code of a cell that follows it}.   earned: how the marks depart from full ones.
    plain: what plain nbgrader does with it, None where it is not tried there.   plain_marks: its marks there.
    dangerous: the attack looks for the sandbox first, so that a developer without one comes to no harm.
    silent: nothing of what the notebook printed survives, so `RAN` cannot be looked for.
    change: what happens to the notebook besides.   lay: how the folder differs from one that holds the notebook.
    weak: it may earn what it should not, and why: plain asserts and drivers run beside the student's code.
    sabotage: it breaks its own process for good, which may cost its other points, and never earns one.
    refused: nothing of it is read, and the log must name the student.
    noted: what the student and the instructor must be told of it, in the graded notebook.
    """

    name: str
    top: str = ""
    answers: Mapping[str, str] = field(default_factory=dict)
    after: Mapping[str, str] = field(default_factory=dict)
    earned: Mapping[str, float | None] = field(default_factory=dict)
    plain: str | None = None
    plain_marks: Mapping[str, float | None] = field(default_factory=dict)
    dangerous: bool = False
    silent: bool = False
    change: Callable[[Any, Callable[..., Any]], Any] | None = None
    lay: Callable[[Path, Any], None] | None = None
    weak: str = ""
    sabotage: bool = False
    refused: bool = False
    noted: str = ""

    @property
    def marks(self) -> dict[str, float | None]:
        """The marks honestly earned."""
        return FULL | dict(self.earned)

    def notebook(self, released: Any, by_id: Callable[..., Any], fill: Callable[[str, str], str]) -> Any:
        """The submission. fill(source, name) puts in what the prelude needs to know."""
        for cell, source in (HONEST | dict(self.answers)).items():
            by_id(released, cell).source = fill(source, self.name)
        for cell, source in self.after.items():
            place = released.cells.index(by_id(released, cell))
            released.cells.insert(place + 1, new_code_cell(fill(source, self.name)))
        if self.top:
            source = PRELUDE + (GUARD if self.dangerous else "") + self.top
            released.cells.insert(2, new_code_cell(fill(source, self.name)))
        released.cells.append(new_markdown_cell(f"watermark of {self.name}"))
        return self.change(released, by_id) if self.change else released


def hidden_numbers(seed: int | str) -> set[str]:
    """Numbers of the hidden cases that a seed draws, as Python writes them, those that cannot be there by chance."""
    from lecturekit.checking.case import tensors
    from lecturekit.checking.question import get

    drawn = [get(question).draw(seed, index) for question, cases in QUESTIONS.items() for index in range(cases)]
    numbers = (n for case in drawn for tensor in tensors(case.inputs) for n in tensor.flatten()[:300].tolist())
    return {text for text in map(repr, numbers) if len(text) > 9}


def written_numbers(text: str) -> set[str]:
    """The long numbers in a text."""
    return set(re.findall(r"-?\d+\.\d{6,}(?:e-?\d+)?", text))


def stealing(name: str, top: str, merge: str = WRONG["merge"], earned: Any = None, **rest: Any) -> Attack:
    """An attack that wants the 15 points of `merge` without a right answer; the other answers are honest."""
    return Attack(name, top, {"merge": merge} | rest.pop("answers", {}), earned=earned or {"merge-test": 0}, **rest)


RIGHT_VALUE = "return weight + alpha / A.shape[0] * (B @ A)"


def inside(action: str, then: str = "return weight.clone()") -> str:
    """An answer to merge that does something when it is called."""
    body = "\n".join("    " + line for line in action.strip().splitlines())
    return f"def merge(weight, A, B, alpha):\n{body}\n    {then}"


def filler(course: Path, **host: Any) -> Callable[[str, str], str]:
    """Fills in where the course lies and what is to be known of the host, neither readable in the source."""
    facts = {"pid namespace": os.readlink("/proc/self/ns/pid")} | host

    def fill(source: str, name: str) -> str:
        source = source.replace("@COURSE@", str(course).encode().hex()).replace("@NAME@", name)
        return source.replace("@HOST@", json.dumps(facts).encode().hex())

    return fill
