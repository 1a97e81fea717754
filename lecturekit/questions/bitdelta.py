"""The BitDelta question of lab 7: a fine-tune as one sign a weight and one scale a matrix.

Liu et al., "BitDelta: Your Fine-Tune May Only Be Worth One Bit", NeurIPS 2024.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lecturekit.checking import Case, Draw, question

LAB = "lab07_bitdelta"


@question(
    "bitdelta.compress", lab=LAB, points=20, slide="Bit-Delta: binarized delta", returns=("signs", "scale"), cases=7
)
def compress(draw: Draw) -> Case:
    """Reduce what fine-tuning changed to signs and one scale."""
    edge = draw.edge("some weights unchanged", "nothing changed", "bfloat16", "one row", "one weight")
    out, inp = draw.sizes(2, low=3, high=24)
    shape = {"one row": (1, inp), "one weight": (1, 1)}.get(edge or "", (out, inp))
    dtype = torch.bfloat16 if edge == "bfloat16" else torch.float32
    base = draw.normal(*shape, dtype=dtype)
    # A shift of its own keeps the mean of Delta away from zero and from the mean of its magnitudes.
    fine = (base + draw.normal(*shape, scale=0.3) + draw.choice([-0.1, 0.1])).to(dtype)
    if edge == "some weights unchanged":
        kept = draw.permutation(out * inp)[: 1 + out * inp // 4]
        fine.view(-1)[kept] = base.view(-1)[kept]
    return Case(edge, base=base, fine=base.clone() if edge == "nothing changed" else fine)


def _delta(base: Tensor, fine: Tensor) -> Tensor:
    return fine.float() - base.float()


def _signs(delta: Tensor) -> Tensor:
    return torch.where(delta > 0, 1, -1).to(torch.int8)


compress.oracle("lecturekit.compression.bitdelta:compress")
compress.tolerance(
    ulps=lambda case: 2 + case.base.numel() * torch.finfo(torch.float32).eps / torch.finfo(case.base.dtype).eps,
    why="a subtraction and a result, rounded in the weights' dtype; a sum of n terms of one sign and its division, "
    "which torch does in float32 also for 16-bit numbers; relative to the mean itself, which is the expected value",
    part="scale",
)

compress.law("every sign is +1 or -1", lambda case, parts: bool((parts["signs"].abs() == 1).all()))


def _scale_is_best(case: Case, parts: dict[str, Any]) -> bool:
    """||Delta - scale * signs||² is smallest at the scale; a tenth is far more than rounding, in bfloat16 too."""
    delta, signs, scale = _delta(case.base, case.fine).double(), parts["signs"].double(), float(parts["scale"])

    def error(factor: float) -> float:
        return float((delta - factor * scale * signs).square().sum())

    return error(1.0) <= min(error(0.9), error(1.1))


compress.law("no scale a tenth smaller or larger comes closer to Delta", _scale_is_best)


@compress.misconception(
    "compresses the fine-tuned weight, not what changed",
    hint="The slide writes W_ij inside Sign, but which of its matrices is replaced by one bit an entry?",
)
def _(base, fine):
    return _signs(fine), fine.float().abs().mean()


@compress.misconception(
    "the scale of the fine-tuned weight, not of what changed",
    hint="A fine-tune hardly moves a weight. How large is the step you add, beside the step that was made?",
)
def _(base, fine):
    return _signs(_delta(base, fine)), fine.float().abs().mean()


@compress.misconception(
    "takes an unchanged weight's sign as +1",
    hint="One bit knows two signs. Which one has Sign(0) on the slide? (The authors' public code takes the other.)",
)
def _(base, fine):
    delta = _delta(base, fine)
    return torch.where(delta >= 0, 1, -1).to(torch.int8), delta.abs().mean()


@compress.misconception(
    "leaves an unchanged weight's sign at 0", hint="How many values does torch.sign know, and how many does one bit?"
)
def _(base, fine):
    delta = _delta(base, fine)
    return delta.sign().to(torch.int8), delta.abs().mean()


@compress.misconception(
    "takes the difference the wrong way round", hint="What must be added to the base to come to the fine-tune?"
)
def _(base, fine):
    delta = _delta(fine, base)
    return _signs(delta), delta.abs().mean()


@compress.misconception(
    "takes the mean with its signs",
    hint="Steps up and steps down cancel in your mean. What does the scale measure: a direction, or a size?",
)
def _(base, fine):
    delta = _delta(base, fine)
    return _signs(delta), delta.mean()


@compress.misconception(
    "the root of the mean square, not the mean magnitude",
    hint="Write ||Delta - scale * Sign(Delta)||² out and set its derivative by the scale to zero. What is left?",
)
def _(base, fine):
    delta = _delta(base, fine)
    return _signs(delta), delta.square().mean().sqrt()


@compress.misconception(
    "the largest change, not the mean one",
    hint="That scale would fit rounding to a grid. Here every weight moves by the same step: which size errs least?",
)
def _(base, fine):
    delta = _delta(base, fine)
    return _signs(delta), delta.abs().max()


@compress.misconception(
    "adds the magnitudes up without dividing", hint="What is 1 / (n m) doing on the slide, and what are n and m?"
)
def _(base, fine):
    delta = _delta(base, fine)
    return _signs(delta), delta.abs().sum()


_ROW_HINT = "The slide says per tensor. How many numbers does one matrix need beside its signs?"


@compress.misconception("one scale a row, not one for the matrix", hint=_ROW_HINT)
def _(base, fine):
    delta = _delta(base, fine)
    return _signs(delta), delta.abs().mean(dim=-1)


@compress.misconception("one scale a row, not one for the matrix", hint=_ROW_HINT)
def _(base, fine):
    delta = _delta(base, fine)
    return _signs(delta), delta.abs().mean(dim=-1, keepdim=True)


@compress.misconception(
    "gives bits, 0 and 1, instead of signs",
    hint="A bit is how a sign is stored. What is scale times your 0, and what should it be?",
)
def _(base, fine):
    delta = _delta(base, fine)
    return (delta > 0).to(torch.int8), delta.abs().mean()


@compress.alternative("a mask times two minus one, in the weights' own dtype")
def _(w0, w1):
    change = w1 - w0
    return (change > 0).to(torch.int8) * 2 - 1, change.abs().mean().to(torch.float32)


@compress.alternative("a comparison, and a one-norm, float64 inside")
def _(before, after):
    up = after.double() > before.double()
    size = torch.linalg.vector_norm(after.double() - before.double(), ord=1) / before.numel()
    return [torch.where(up, 1, -1).to(torch.int8), size.float()]


@compress.alternative("loops over Python numbers")
def _(*args):
    base, fine = args
    signs, total = torch.full(base.shape, -1, dtype=torch.int8, device=base.device), 0.0
    for i, (old, new) in enumerate(zip(base.flatten().tolist(), fine.flatten().tolist(), strict=True)):
        total += abs(new - old)
        if new > old:
            signs.view(-1)[i] = 1
    return signs, total / base.numel()


@compress.alternative("the projection of Delta on its signs, by einsum")
def _(base, fine):
    delta = fine.float() - base.float()
    signs = torch.sign(delta)
    signs[signs == 0] = -1
    return signs.to(torch.int8), torch.einsum("ij,ij->", delta, signs) / delta.numel()
