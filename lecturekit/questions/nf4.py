"""The NF4 questions of lab 6: the sixteen levels, rounding weights to them, and the way back.

Dettmers et al., "QLoRA: Efficient Finetuning of Quantized LLMs", NeurIPS 2023, section 3 and appendix E.
"""

from __future__ import annotations

import math
import statistics
import warnings
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from lecturekit.checking import Case, Draw, question
from lecturekit.checking.compare import precision

LAB = "lab06_qlora"

# The slide's list, to the digits that float32 keeps. The judge's table is derived; this one draws the cases.
TABLE = torch.tensor(
    [-1.0, -0.6961928, -0.52507305, -0.3949175, -0.28444138, -0.18477343, -0.091050036, 0.0]
    + [0.0795803, 0.1609302, 0.2461123, 0.33791524, 0.44070983, 0.562617, 0.72295684, 1.0]
)
OUTERMOST = 0.9677083  # probability of the outermost level before the division that makes it 1

# How far a right table of levels may be off, in units of float32's epsilon; see the first tolerance below.
LEVEL_ULPS = 16
EPS = torch.finfo(torch.float32).eps


def _symmetric() -> Tensor:
    """Sixteen quantiles in one go: eight on each side, and no zero."""
    levels = torch.special.ndtri(torch.linspace(1 - OUTERMOST, OUTERMOST, 16))
    return levels / levels.max()


def _fp4() -> Tensor:
    """A sign, two bits of exponent, one of mantissa, brought to [-1, 1]; zero is there twice."""
    half = torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0]) / 6
    return torch.cat([-half.flip(0), half])


# nf4.levels ----------------------------------------------------------------------------------------------------------


@question(
    "nf4.levels",
    lab=LAB,
    points=15,
    slide="QLoRA: the exact values of the NF4 data type",
    cases=1,
    returns=("levels",),
)
def levels(draw: Draw) -> Case:
    """Derive the sixteen levels."""
    return Case()


levels.oracle("lecturekit.compression.nf4:normal_float_levels")
levels.tolerance(
    ulps=LEVEL_ULPS,
    magnitude=lambda case, _: 1.0,
    why="at 0.968 the quantile function is 7.5 times as steep as it is high, so a float32 probability that is rounded "
    "twice by up to 0.25 epsilon (linspace, outermost value) moves numerator and denominator by 4 each; that leaves 8 "
    "for the quantile function itself and the division",
)


@levels.driver
def _(function: Any, case: Case) -> Any:
    """There is no input whose device to follow, so the table may be made on any."""
    result = function()
    return result.cpu() if isinstance(result, Tensor) else result


def _levels_law(holds: Any) -> Any:
    return lambda case, parts: bool(holds(parts["levels"]))


levels.law("0 itself is a level, exactly", _levels_law(lambda table: (table == 0).any()))
levels.law("each level lies above the one before it", _levels_law(lambda table: (table.diff() > 0).all()))
levels.law(
    "the levels fill [-1, 1] to both its ends",
    _levels_law(lambda table: max(abs(table.min() + 1), abs(table.max() - 1)) <= LEVEL_ULPS * EPS),
)
levels.law(
    "there is one level more above zero than below it", _levels_law(lambda t: (t > 0).sum() == (t < 0).sum() + 1)
)


def _two_sided(outermost: float, below: int = 7, above: int = 8) -> Tensor:
    """Quantiles for each side of zero by itself; what the misconceptions share."""
    down = -torch.special.ndtri(torch.linspace(outermost, 0.5, below + 1)[:-1])
    up = torch.special.ndtri(torch.linspace(outermost, 0.5, above + 1)[:-1]).flip(0)
    return torch.cat([down, torch.zeros(1), up])


def _normalised(table: Tensor) -> Tensor:
    return table / table.abs().max()


@levels.misconception(
    "a symmetric table without an exact zero",
    hint="Sixteen is even, so a symmetric table has no middle. How would padding or a pruned weight come out?",
)
def _():
    return _symmetric()


@levels.misconception(
    "spaces the levels evenly", hint="Weights crowd around zero. Where should most of the levels lie, then?"
)
def _():
    return torch.linspace(-1, 1, 16)


@levels.misconception(
    "does not bring the quantiles to [-1, 1]",
    hint="A block is divided by its largest magnitude. Which interval do its values lie in, and which your levels?",
)
def _():
    return _two_sided(OUTERMOST)


@levels.misconception(
    "asks for the quantile at probability 1, which is infinite",
    hint="Half of a normal distribution's mass lies above zero, but how far out does it end? Stop short of there.",
)
def _():
    return _normalised(_two_sided(1.0))


@levels.misconception(
    "takes 1 - 1/32 for the outermost probability",
    hint="That is right for a table of 16. The two sides have 8 and 7 levels beside zero: between which two lies NF4?",
)
def _():
    return _normalised(_two_sided(1 - 1 / 32))


@levels.misconception(
    "takes 1 - 1/30 for the outermost probability",
    hint="That is right for a table of 15. The two sides have 8 and 7 levels beside zero: between which two lies NF4?",
)
def _():
    return _normalised(_two_sided(1 - 1 / 30))


@levels.misconception(
    "gives the extra level to the negative side", hint="One side has eight levels and one has seven. Look at the slide."
)
def _():
    return _normalised(_two_sided(OUTERMOST, below=8, above=7))


@levels.misconception(
    "lists the levels from the largest to the smallest", hint="Which level belongs to index 0? Look at the slide."
)
def _():
    return _normalised(_two_sided(OUTERMOST)).flip(0)


@levels.misconception(
    "the levels of a 4-bit floating-point number (E2M1)",
    hint="That is another 4-bit type. Which distribution gives NormalFloat its name, and what of it are the levels?",
)
def _():
    return _fp4()


@levels.alternative("typed off the slide")
def _():
    negative = [-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453]
    negative += [-0.28444138169288635, -0.18477343022823334, -0.09105003625154495]
    positive = [0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224]
    positive += [0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0]
    return torch.tensor([*negative, 0.0, *positive])


@levels.alternative("a loop over Python's own normal distribution, float64 inside")
def _():
    outermost = 1 - (1 / 32 + 1 / 30) / 2
    quantile = statistics.NormalDist().inv_cdf
    values = [0.0]
    values += [quantile(0.5 + (outermost - 0.5) * i / 8) for i in range(1, 9)]
    values += [-quantile(0.5 + (outermost - 0.5) * i / 7) for i in range(1, 8)]
    largest = max(values)
    return torch.tensor(sorted(value / largest for value in values), dtype=torch.float32)


@levels.alternative("erfinv")
def _():
    up = torch.erfinv(torch.linspace(0, 2 * OUTERMOST - 1, 9))
    down = -torch.erfinv(torch.linspace(0, 2 * OUTERMOST - 1, 8))
    return torch.cat([up, down]).unique() / up[-1]


@levels.alternative("torch.distributions, sorted")
def _():
    normal = torch.distributions.Normal(0.0, 1.0)
    above = normal.icdf(torch.linspace(OUTERMOST, 0.5, 9)[:-1])
    below = normal.icdf(torch.linspace(1 - OUTERMOST, 0.5, 8))
    table, _order = torch.cat([above, below]).sort()
    return table / table.max()


# nf4.quantize --------------------------------------------------------------------------------------------------------


@question(
    "nf4.quantize", lab=LAB, points=20, slide="QLoRA: NormalFloat (NF4), a new data type", returns=("indices", "absmax")
)
def quantize(draw: Draw) -> Case:
    """Round weights to the nearest level of their block."""
    edge = draw.edge("an all-zero block", "a short last block", "bfloat16", "one value")
    blocksize, shape, _ = _layout(draw, edge)
    x = draw.normal(*shape, scale=draw.choice([0.02, 0.3, 4.0]))
    if edge == "an all-zero block":
        x.view(-1)[blocksize : 2 * blocksize] = 0
    if edge == "bfloat16":
        x = x.bfloat16()
    return Case(edge, x=_off_midpoints(x, blocksize), blocksize=blocksize)


def _layout(draw: Draw, edge: str | None) -> tuple[int, tuple[int, ...], int]:
    """A blocksize, a shape and the number of blocks. A row is no whole number of blocks, so blocks cross rows."""
    blocksize = draw.choice([8, 16, 32, 64])
    rows, cols = draw.choice([2, 4, 6]), draw.choice([3, 5]) * blocksize // 2
    if edge == "a short last block":
        cols += 1
    shape = (1,) if edge == "one value" else (rows, cols)
    return blocksize, shape, math.ceil(math.prod(shape) / blocksize)


def _off_midpoints(x: Tensor, blocksize: int) -> Tensor:
    """x without the values about which right answers differ: those that lie half-way between two levels.

    There the index depends on how a value was scaled (x / absmax, x * (1 / absmax), with or without a small number
    added) and on the last digits of the levels. Both neighbours would have to be accepted, so such a value tells
    nothing: it becomes 0. In 16 bits the margin is one epsilon, which is 2 roundings of numbers near 1 or 4 near 1/2,
    so that who scales in x's own dtype finds the same level. In 32 bits it is 2^-10, thousands of roundings: an
    answer then passes for every seed or for none.
    """
    scaled = x.double() / _spread(_absmax(x, blocksize).double(), x, blocksize).clamp(min=1e-30)
    midpoints = (TABLE[1:] + TABLE[:-1]).to(x.device).double() / 2
    margin = max(torch.finfo(x.dtype).eps, 2**-10)
    return x.masked_fill((scaled.unsqueeze(-1) - midpoints).abs().amin(-1) <= margin, 0.0)


def _blocks(x: Tensor, blocksize: int) -> Tensor:
    """x as (blocks, blocksize) in float32, zeros added to fill the last one."""
    flat = x.float().reshape(-1)
    return F.pad(flat, (0, -len(flat) % blocksize)).view(-1, blocksize)


def _absmax(x: Tensor, blocksize: int) -> Tensor:
    return _blocks(x, blocksize).abs().amax(dim=1)


def _spread(scales: Tensor, x: Tensor, blocksize: int) -> Tensor:
    """The scale of every value's block, in x's shape."""
    return scales.repeat_interleave(blocksize)[: x.numel()].view(x.shape)


def _scaled(x: Tensor, blocksize: int) -> tuple[Tensor, Tensor]:
    """x divided by its blocks' scales, with 0 for an all-zero block, and the scales."""
    absmax = _absmax(x, blocksize)
    return x.float() / _spread(absmax, x, blocksize).clamp(min=1e-30), absmax


def _nearest(scaled: Tensor, table: Tensor = TABLE) -> Tensor:
    return (scaled.unsqueeze(-1) - table.to(scaled.device)).abs().argmin(-1).to(torch.uint8)


quantize.oracle("lecturekit.compression.nf4:quantize")


def _ends_are_met(case: Case, parts: dict[str, Any]) -> bool:
    flat, indices = _blocks(case.x, case.blocksize), _blocks(parts["indices"], case.blocksize)
    at = flat.abs().argmax(dim=1, keepdim=True)
    largest, index = flat.gather(1, at), indices.gather(1, at)
    return bool((index == torch.where(largest > 0, 15.0, torch.where(largest < 0, 0.0, 7.0))).all())


quantize.law("the value of largest magnitude in a block gets the first level or the last", _ends_are_met)
quantize.law("zero gets the level 0, index 7", lambda case, parts: bool((parts["indices"][case.x == 0] == 7).all()))


def _order_is_kept(case: Case, parts: dict[str, Any]) -> bool:
    flat, indices = case.x.reshape(-1), parts["indices"].reshape(-1)
    for values, chosen in zip(flat.split(case.blocksize), indices.split(case.blocksize), strict=True):
        if bool((chosen[values.argsort()].int().diff() < 0).any()):
            return False
    return True


quantize.law("within a block, the larger of two values never gets the lower index", _order_is_kept)


@quantize.misconception(
    "one scale for the whole tensor",
    hint="What does a single outlier do to the values of all other blocks? How many scales does your answer hold?",
)
def _(x, blocksize):
    absmax = x.float().abs().max()
    return _nearest(x.float() / absmax.clamp(min=1e-30)), absmax


@quantize.misconception(
    "one scale for the whole tensor",
    hint="What does a single outlier do to the values of all other blocks? How many scales does your answer hold?",
)
def _(x, blocksize):
    absmax = x.float().abs().max()
    return _nearest(x.float() / absmax.clamp(min=1e-30)), absmax.expand(math.ceil(x.numel() / blocksize))


@quantize.misconception(
    "one scale a row instead of one a block", hint="A block is a run of the flattened tensor. Where does a row come in?"
)
def _(x, blocksize):
    absmax = x.float().abs().amax(dim=-1, keepdim=True)
    return _nearest(x.float() / absmax.clamp(min=1e-30)), absmax.view(-1)


@quantize.misconception(
    "scales by the largest value, not the largest magnitude",
    hint="What if the value farthest from zero is negative? Is everything in [-1, 1] after your division?",
)
def _(x, blocksize):
    largest = _blocks(x, blocksize).amax(dim=1)
    return _nearest(x.float() / _spread(largest, x, blocksize).clamp(min=1e-30)), largest


@quantize.misconception(
    "looks for the nearest level before it scales",
    hint="The levels lie in [-1, 1]. Do the weights you compare with them?",
)
def _(x, blocksize):
    return _nearest(x.float()), _absmax(x, blocksize)


@quantize.misconception(
    "rounds to an evenly spaced index",
    hint="Your formula takes neighbouring levels to be equally far apart. Are they? Measure how far each level is.",
)
def _(x, blocksize):
    scaled, absmax = _scaled(x, blocksize)
    return ((scaled + 1) / 2 * 15).round().to(torch.uint8), absmax


@quantize.misconception(
    "takes the level below, not the nearest",
    hint="Where does the answer change from one index to the next: at a level, or between two?",
)
def _(x, blocksize):
    scaled, absmax = _scaled(x, blocksize)
    return (torch.bucketize(scaled, TABLE.to(x.device), right=True) - 1).to(torch.uint8), absmax


@quantize.misconception(
    "takes the level above, not the nearest",
    hint="What do searchsorted and bucketize compare with? Where does the answer change from one index to the next?",
)
def _(x, blocksize):
    scaled, absmax = _scaled(x, blocksize)
    return torch.bucketize(scaled, TABLE.to(x.device)).to(torch.uint8), absmax


@quantize.misconception(
    "a symmetric table without an exact zero", hint="Quantize a zero and take it back. Does it come back as zero?"
)
def _(x, blocksize):
    scaled, absmax = _scaled(x, blocksize)
    return _nearest(scaled, _symmetric()), absmax


@quantize.misconception(
    "divides by zero in an all-zero block", hint="What is 0 / 0? Look at the scaled values of a block of zeros."
)
def _(x, blocksize):
    absmax = _absmax(x, blocksize)
    return _nearest(x.float() / _spread(absmax, x, blocksize)), absmax


@quantize.misconception(
    "divides by zero in an all-zero block", hint="What is 0 / 0? Look at the scaled values of a block of zeros."
)
def _(x, blocksize):
    absmax = _absmax(x, blocksize)
    midpoints = ((TABLE[1:] + TABLE[:-1]) / 2).to(x.device)
    return torch.bucketize(x.float() / _spread(absmax, x, blocksize), midpoints).to(torch.uint8), absmax


@quantize.misconception(
    "takes every block for a whole one",
    hint="What is left at the end when blocksize does not divide the number of values?",
)
def _(x, blocksize):
    blocks = x.float().view(-1, blocksize)
    scaled, absmax = _scaled(blocks, blocksize)
    return _nearest(scaled).view(x.shape), absmax


@quantize.misconception(
    "returns the levels, not their indices", hint="What takes 4 bits to store: a level, or its place in the table?"
)
def _(x, blocksize):
    scaled, absmax = _scaled(x, blocksize)
    return TABLE.to(x.device)[_nearest(scaled).long()], absmax


@quantize.alternative("midpoints and bucketize, multiplied by the reciprocal")
def _(weights, size):
    flat = F.pad(weights.float().flatten(), (0, -weights.numel() % size)).view(-1, size)
    scale = flat.abs().max(dim=1).values
    table = TABLE.to(weights.device)
    found = torch.bucketize(flat * (1 / scale.clamp(min=1e-38)).unsqueeze(1), (table[1:] + table[:-1]) / 2)
    return found.flatten()[: weights.numel()].view_as(weights).to(torch.uint8), scale


@quantize.alternative("a loop over blocks, float64 inside, divided")
def _(x, blocksize):
    table, indices, scales = TABLE.to(x.device).double(), [], []
    for block in x.flatten().double().split(blocksize):
        scale = block.abs().max()
        scaled = block / scale if scale > 0 else block
        indices.append(torch.cdist(scaled.unsqueeze(1), table.unsqueeze(1)).argmin(dim=1))
        scales.append(scale)
    return [torch.cat(indices).view(x.shape).byte(), torch.stack(scales).float()]


@quantize.alternative("levels scaled up instead of values scaled down")
def _(x, blocksize):
    blocks = _blocks(x, blocksize)
    absmax = blocks.abs().amax(1)
    mine = torch.einsum("b,l->bl", absmax, TABLE.to(x.device))  # every block's own sixteen values
    found = (blocks.unsqueeze(2) - mine.unsqueeze(1)).abs().argmin(2)
    found = found.masked_fill((absmax == 0).unsqueeze(1), 7)
    return found.reshape(-1)[: x.numel()].reshape(x.shape).to(torch.uint8), absmax


@quantize.alternative("comparisons counted, in x's own dtype")
def _(*args):
    x, size = args
    flat = torch.nn.functional.pad(x.reshape(-1), (0, -x.numel() % size)).view(-1, size)
    absmax = flat.abs().amax(1, keepdim=True)
    scaled = torch.nan_to_num(flat / absmax)
    table = TABLE.to(x)
    index = sum((scaled > (low + high) / 2).byte() for low, high in zip(table[:-1], table[1:], strict=True))
    return index.view(-1)[: x.numel()].view(x.shape), absmax.view(-1).float()


# nf4.dequantize ------------------------------------------------------------------------------------------------------


@question("nf4.dequantize", lab=LAB, points=10, slide="QLoRA: NormalFloat (NF4), a new data type")
def dequantize(draw: Draw) -> Case:
    """Turn indices and scales back into weights."""
    edge = draw.edge("an all-zero block", "a short last block", "one value")
    blocksize, shape, blocks = _layout(draw, edge)
    absmax = draw.uniform(blocks, low=0.1, high=3.0)
    indices = draw.integers(0, 15, *shape).to(torch.uint8)
    if edge == "an all-zero block":
        absmax[1] = 0
        indices.view(-1)[blocksize : 2 * blocksize] = 7
    return Case(edge, indices=indices, absmax=absmax, blocksize=blocksize)


dequantize.oracle("lecturekit.compression.nf4:dequantize")
dequantize.tolerance(
    ulps=LEVEL_ULPS + 1,
    magnitude=lambda case, _: _spread(case.absmax, case.indices, case.blocksize).double(),
    why="what a right table of levels may be off, times the block's scale, and the rounding of that product",
)
dequantize.law("index 7 gives 0, exactly", lambda case, parts: bool((parts["result"][case.indices == 7] == 0).all()))


def _last_level_gives_absmax(case: Case, parts: dict[str, Any]) -> bool:
    scales, last = _spread(case.absmax, case.indices, case.blocksize), case.indices == 15
    allowed = (LEVEL_ULPS + 1) * precision(case, parts["result"]) * scales
    return bool(((parts["result"] - scales).abs() <= allowed)[last].all())


dequantize.law("index 15 gives the block's absmax", _last_level_gives_absmax)


def _found(indices: Tensor, table: Tensor = TABLE) -> Tensor:
    return table.to(indices.device)[indices.long()]


@dequantize.misconception(
    "one scale for the whole tensor", hint="absmax holds one number a block. Which of them belongs to the last value?"
)
def _(indices, absmax, blocksize):
    return _found(indices) * absmax.max()


@dequantize.misconception(
    "one scale for the whole tensor", hint="absmax holds one number a block. Which of them belongs to the last value?"
)
def _(indices, absmax, blocksize):
    return _found(indices) * absmax[0]


@dequantize.misconception(
    "forgets the scales", hint="The levels lie in [-1, 1]. What did quantize divide the block by?"
)
def _(indices, absmax, blocksize):
    return _found(indices)


@dequantize.misconception(
    "divides by the scale again", hint="quantize divided. What undoes a division? What comes of a block of zeros?"
)
def _(indices, absmax, blocksize):
    return _found(indices) / _spread(absmax, indices, blocksize)


@dequantize.misconception(
    "repeats the list of scales instead of each scale",
    hint="For scales a, b and blocks of two: is it a b a b, or a a b b? Compare repeat and repeat_interleave.",
)
def _(indices, absmax, blocksize):
    return _found(indices) * absmax.repeat(blocksize)[: indices.numel()].view(indices.shape)


@dequantize.misconception(
    "one scale a row instead of one a block", hint="A block is a run of the flattened tensor. Where does a row come in?"
)
def _(indices, absmax, blocksize):
    return _found(indices) * absmax[: len(indices)].view(-1, *[1] * (indices.ndim - 1))


@dequantize.misconception(
    "takes the levels to be evenly spaced", hint="An index is a place in the table. Which table did quantize use?"
)
def _(indices, absmax, blocksize):
    return (indices.float() / 15 * 2 - 1) * _spread(absmax, indices, blocksize)


@dequantize.misconception(
    "scales the index, not its level", hint="What does index 7 stand for? And what does your code make of it?"
)
def _(indices, absmax, blocksize):
    return indices.float() * _spread(absmax, indices, blocksize)


@dequantize.misconception(
    "a symmetric table without an exact zero", hint="A weight of zero was given index 7. What comes back?"
)
def _(indices, absmax, blocksize):
    return _found(indices, _symmetric()) * _spread(absmax, indices, blocksize)


@dequantize.misconception(
    "takes every block for a whole one",
    hint="What is left at the end when blocksize does not divide the number of values?",
)
def _(indices, absmax, blocksize):
    return (_found(indices).view(-1, blocksize) * absmax.unsqueeze(1)).view(indices.shape)


_BYTES_HINT = "torch reads an index of dtype uint8 as a mask of true and false. Which dtype does it read as places?"


@dequantize.misconception("indexes the table with bytes, which torch takes for a mask", hint=_BYTES_HINT)
def _(indices, absmax, blocksize):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch warns of it, and then fails
        return TABLE.to(indices.device)[indices] * _spread(absmax, indices, blocksize)


@dequantize.misconception("indexes the table with bytes, which torch takes for a mask", hint=_BYTES_HINT)
def _(indices, absmax, blocksize):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return (TABLE.to(indices.device)[indices.flatten()] * absmax.repeat_interleave(blocksize)).view(indices.shape)


@dequantize.alternative("blocks filled up, scaled by broadcasting, cut off")
def _(codes, scales, size):
    count = codes.numel()
    blocks = F.pad(codes.reshape(-1), (0, -count % size)).reshape(-1, size)
    values = TABLE.to(codes.device).index_select(0, blocks.reshape(-1).int()).view_as(blocks)
    return (values * scales[:, None]).reshape(-1)[:count].reshape(codes.shape)


@dequantize.alternative("a loop over blocks, float64 inside")
def _(indices, absmax, blocksize):
    pieces = indices.flatten().split(blocksize)
    values = [TABLE.double()[piece.cpu().long()] * scale.item() for piece, scale in zip(pieces, absmax, strict=True)]
    return torch.cat(values).float().to(indices.device).view(indices.shape)


@dequantize.alternative("one-hot and einsum")
def _(*args):
    indices, absmax, blocksize = args
    flat = indices.reshape(-1).long()
    levels_of = torch.einsum("nl,l->n", F.one_hot(flat, 16).float(), TABLE.to(indices.device))
    block = torch.arange(flat.numel(), device=indices.device) // blocksize
    return (levels_of * absmax[block]).reshape_as(indices)


@dequantize.alternative("gather and take")
def _(indices, absmax, blocksize):
    out = torch.take(TABLE.to(indices.device), indices.to(torch.int64))
    for k, scale in enumerate(absmax):
        out.view(-1)[k * blocksize : (k + 1) * blocksize] *= scale
    return out
