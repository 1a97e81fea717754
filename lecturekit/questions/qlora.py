"""The QLoRA questions of lab 6: two codes in a byte, scales that are quantized too, the layer that trains beside them.

What the student writes (the NF4 levels, quantize and dequantize are in questions/nf4.py):

    pack_nibbles(indices) -> packed
        indices: uint8 in 0..15, any shape, n elements. packed: uint8 (ceil(n / 2),); the even element in the high half,
        an odd count filled up with 7, the index of the level 0.
    double_quantize(absmax, levels, blocksize) -> (codes, scales, offset)
        absmax: float32 (blocks,). levels: float32 (256,), ascending, -1 < levels <= 1. codes: uint8 (blocks,); scales:
        float32 (ceil(blocks / blocksize),); offset: float32 (). absmax ≈ levels[codes] * scale of the block + offset.
    linear_4bit(x, packed, absmax, levels, blocksize, A, B, scale) -> y
        x: (batch, in). packed: uint8 of W (out, in), as from pack_nibbles. absmax: float32, one a block of W's values.
        levels: float32 (16,). A: (r, in). B: (out, r). scale: alpha / r. y = W x + scale · B A x, (batch, out), with
        gradients for x, A and B, none for absmax and levels, and no dequantized weight kept for the backward pass.

Dettmers et al., "QLoRA: Efficient Finetuning of Quantized LLMs", NeurIPS 2023, section 3.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from lecturekit.checking import Case, Draw, Unfit, question
from lecturekit.checking.compare import describe
from lecturekit.questions.nf4 import LAB, TABLE

# qlora.pack ----------------------------------------------------------------------------------------------------------


@question("qlora.pack", lab=LAB, points=10, slide="QLoRA: NormalFloat (NF4), a new data type")
def pack(draw: Draw) -> Case:
    """Put two 4-bit indices in a byte."""
    edge = draw.edge("an odd count", "rows of odd length", "one value", "all sixteen indices in order")
    rows, half = draw.sizes(2, low=3, high=9)
    columns = 2 * half
    if edge == "an odd count":
        rows, columns = 2 * rows + 1, columns + 1
    elif edge == "rows of odd length":
        rows, columns = 2 * rows, columns + 1
    elif edge == "one value":
        rows, columns = 1, 1
    indices = draw.integers(0, 15, rows, columns)
    if edge == "all sixteen indices in order":
        indices = torch.arange(16, device=draw.device).view(4, 4)
    return Case(edge, indices=indices.to(torch.uint8))


pack.oracle("lecturekit.compression.nf4:pack")


def _halves(packed: Tensor) -> Tensor:
    return torch.stack([packed >> 4, packed & 15], dim=1).flatten()


pack.law(
    "the high and low halves of the bytes, in turn, are the indices",
    lambda case, parts: torch.equal(_halves(parts["result"])[: case.indices.numel()], case.indices.flatten()),
)


def _even(indices: Tensor, filling: int = 7) -> Tensor:
    """Flat, and filled up to an even count."""
    return F.pad(indices.flatten(), (0, indices.numel() % 2), value=filling)


@pack.misconception(
    "puts the even element in the low half",
    hint="Pack the indices 1 and 2 by hand. Is the byte 0x12 or 0x21? bitsandbytes reads the high half first.",
)
def _(indices):
    flat = _even(indices)
    return flat[::2] | (flat[1::2] << 4)


@pack.misconception(
    "takes the indices for signed numbers",
    hint="A half byte can be read as 0 … 15 or as -8 … 7. Which of the two is a place in a table?",
)
def _(indices):
    flat = (_even(indices).int() - 8) & 15
    return ((flat[::2] << 4) | flat[1::2]).to(torch.uint8)


@pack.misconception(
    "fills an odd count up with index 0", hint="The value filled in should be the weight 0. Which index stands for it?"
)
def _(indices):
    flat = _even(indices, filling=0)
    return (flat[::2] << 4) | flat[1::2]


@pack.misconception(
    "fills up in front", hint="Where does the first index end up, and where would the reader look for it?"
)
def _(indices):
    flat = F.pad(indices.flatten(), (indices.numel() % 2, 0), value=7)
    return (flat[::2] << 4) | flat[1::2]


@pack.misconception("drops the last value of an odd count", hint="How many bytes do five half bytes need?")
def _(indices):
    flat = indices.flatten()[: indices.numel() // 2 * 2]
    return (flat[::2] << 4) | flat[1::2]


@pack.misconception(
    "pairs the first half of the values with the second",
    hint="Which two values share a byte: neighbours, or one from each half of the tensor?",
)
def _(indices):
    first, second = _even(indices).chunk(2)
    return (first << 4) | second


@pack.misconception(
    "packs each row by itself",
    hint="What happens at the end of a row of odd length? How many bytes are asked for in all?",
)
def _(indices):
    rows = F.pad(indices, (0, indices.shape[-1] % 2), value=7)
    return ((rows[:, ::2] << 4) | rows[:, 1::2]).flatten()


@pack.misconception(
    "keeps one index a byte", hint="How many bits has a byte, how many an index? How many bytes should come out?"
)
def _(indices):
    return indices.flatten()


@pack.misconception(
    "adds the two indices without making room for one of them",
    hint="1 + 2 and 2 + 1 are the same number. What tells the reader which came first?",
)
def _(indices):
    flat = _even(indices)
    return flat[::2] + flat[1::2]


@pack.misconception(
    "leaves the bytes in a wider type", hint="Ask your result for its element_size(). What was to be saved?"
)
def _(indices):
    flat = _even(indices).long()
    return flat[::2] * 16 + flat[1::2]


@pack.misconception(
    "keeps the rows of the matrix", hint="Which shape is asked for? What of a matrix with an odd number of values?"
)
def _(indices):
    flat = _even(indices)
    return ((flat[::2] << 4) | flat[1::2]).view(len(indices), -1)


@pack.alternative("sixteen times the one plus the other")
def _(codes):
    flat = codes.reshape(-1).int()
    if len(flat) % 2 == 1:
        flat = torch.cat([flat, torch.full((1,), 7, device=flat.device)])
    pairs = flat.view(-1, 2)
    return (16 * pairs[:, 0] + pairs[:, 1]).to(torch.uint8)


@pack.alternative("hexadecimal digits")
def _(indices):
    digits = "".join(f"{index:x}" for index in indices.flatten().tolist())
    packed = bytes.fromhex(digits + "7" * (len(digits) % 2))
    return torch.tensor(list(packed), dtype=torch.uint8, device=indices.device)


@pack.alternative("a loop that fills zeros in place")
def _(*args):
    (indices,) = args
    values = indices.flatten().tolist()
    packed = torch.zeros(math.ceil(len(values) / 2), dtype=torch.uint8, device=indices.device)
    if len(values) % 2:
        packed[-1] = 7
    for place, value in enumerate(values):
        packed[place // 2] += value * (1 if place % 2 else 16)
    return packed


@pack.alternative("a product with (16, 1)")
def _(indices):
    pairs = F.pad(indices.flatten(), (0, indices.numel() % 2), value=7).view(-1, 2).float()
    return torch.einsum("ni,i->n", pairs, torch.tensor([16.0, 1.0], device=pairs.device)).round().to(torch.uint8)


# qlora.double --------------------------------------------------------------------------------------------------------

# In units of a block's largest magnitude. A mean of 70 numbers, rounded at each of its additions, moves a value by less
# than 70 · 6e-8 of the mean; the mean is at most 4 times a block's largest distance from it (see _is_settled).
DOUBLE_MARGIN = 1e-4


def _dynamic_levels() -> Tensor:
    """The 256 levels of bitsandbytes' dynamic type: seven decades, decade i cut into 2^i parts, either sign; 0, 1."""
    levels = [0.0, 1.0]
    for i in range(7):
        edges = torch.linspace(0.1, 1, 2**i + 1)
        middles = ((edges[:-1] + edges[1:]) / 2 * 10.0 ** (i - 6)).tolist()
        levels += [sign * middle for middle in middles for sign in (1, -1)]
    return torch.tensor(sorted(levels))


@question(
    "qlora.double",
    lab=LAB,
    points=10,
    slide="QLoRA: Double quantization (scaling factors also quantized) to further reduce",
    returns=("codes", "scales", "offset"),
)
def double(draw: Draw) -> Case:
    """Quantize the scales too."""
    edge = draw.edge("a short last block", "one scale", "all scales equal", "a scale far above", "a scale far below")
    levels, blocksize = _dynamic_levels().to(draw.device), draw.choice([8, 16])
    if edge == "all scales equal":  # sixteen of them, and few digits: every way to take the mean is exact
        return Case(
            edge, absmax=torch.full((16,), draw.integer(1, 63) / 64, device=draw.device), levels=levels, blocksize=8
        )
    if edge == "one scale":
        return Case(edge, absmax=draw.uniform(1, low=0.1, high=3.0), levels=levels, blocksize=blocksize)
    count = blocksize * draw.integer(2, 4) + (draw.integer(3, 5) if edge == "a short last block" else 0)
    size = draw.choice([0.05, 0.4, 3.0])
    while True:
        # Skewed, as the largest magnitudes of blocks are: the mean is not the middle, nor the median.
        absmax = size * (0.8 + draw.uniform(count).square())
        if edge in ("a scale far above", "a scale far below"):
            absmax[draw.integer(0, count - 1)] *= 6 if edge == "a scale far above" else 0.05
        if _is_settled(absmax, levels, blocksize):
            return Case(edge, absmax=absmax, levels=levels, blocksize=blocksize)


def _is_settled(absmax: Tensor, levels: Tensor, blocksize: int) -> bool:
    """Whether no rounding of the mean or of a quotient can change a code."""
    centred = absmax.double() - absmax.double().mean()
    scales = torch.stack([block.abs().max() for block in centred.split(blocksize)])
    scaled = centred / scales.repeat_interleave(blocksize)[: len(centred)]
    midpoints = (levels[1:] + levels[:-1]).double() / 2
    far = (scaled.unsqueeze(1) - midpoints).abs().amin() >= DOUBLE_MARGIN
    return bool(far and absmax.mean() <= 4 * scales.min())


double.oracle("lecturekit.compression.nf4:double_quantize_with")
double.tolerance(
    ulps=lambda case: len(case.absmax) + 2,
    magnitude=lambda case, _: case.absmax.double().mean(),
    why="the mean of n positive numbers, added up one by one: n roundings of at most the sum, and a division",
    part="offset",
)
double.tolerance(
    ulps=lambda case: len(case.absmax) + 4,
    magnitude=lambda case, _: case.absmax.double().max(),
    why="a scale less the mean, which brings the mean's n + 2 roundings with it, and the subtraction's own",
    part="scales",
)


def _comes_back(case: Case, parts: dict[str, Any]) -> bool:
    """levels[code] * scale + offset is within half the widest gap between levels of what was quantized."""
    scales = parts["scales"].double().repeat_interleave(case.blocksize)[: len(case.absmax)]
    back = case.levels.double()[parts["codes"].long()] * scales + float(parts["offset"])
    gap = case.levels.double().diff().max() / 2 + 2 * DOUBLE_MARGIN
    return bool(((back - case.absmax.double()).abs() <= gap * scales + 1e-6 * case.absmax.max()).all())


double.law("levels[code] · scale + offset comes back to the scale within half a step", _comes_back)


def _block_scales(values: Tensor, blocksize: int) -> Tensor:
    return torch.stack([block.abs().max() for block in values.split(blocksize)])


def _each(scales: Tensor, blocksize: int, count: int) -> Tensor:
    return scales.repeat_interleave(blocksize)[:count]


def _code(scaled: Tensor, levels: Tensor) -> Tensor:
    return (scaled.unsqueeze(1) - levels).abs().argmin(1).to(torch.uint8)


def _coded(values: Tensor, levels: Tensor, blocksize: int) -> tuple[Tensor, Tensor]:
    scales = _block_scales(values, blocksize)
    return _code(values / _each(scales, blocksize, len(values)).clamp(min=1e-30), levels), scales


_OFFSET_HINT = "All scales are positive. Which half of the 256 levels, which have both signs, do yours ever use?"


@double.misconception("quantizes the scales without taking their mean off first", hint=_OFFSET_HINT)
def _(absmax, levels, blocksize):
    return *_coded(absmax, levels, blocksize), absmax.mean()


@double.misconception("quantizes the scales without taking their mean off first", hint=_OFFSET_HINT)
def _(absmax, levels, blocksize):
    return *_coded(absmax, levels, blocksize), torch.zeros((), device=absmax.device)


@double.misconception(
    "takes the smallest scale off, not the mean",
    hint="After your subtraction no value is negative. Which levels are left without use?",
)
def _(absmax, levels, blocksize):
    return *_coded(absmax - absmax.min(), levels, blocksize), absmax.min()


@double.misconception(
    "takes the median off, not the mean", hint="Half of the scales lie above your offset. Which average has the paper?"
)
def _(absmax, levels, blocksize):
    middle = absmax.quantile(0.5)
    return *_coded(absmax - middle, levels, blocksize), middle


@double.misconception(
    "takes the middle between smallest and largest off, not the mean",
    hint="What does a single scale that is far out do to your offset?",
)
def _(absmax, levels, blocksize):
    middle = (absmax.min() + absmax.max()) / 2
    return *_coded(absmax - middle, levels, blocksize), middle


@double.misconception(
    "takes each block's own mean off", hint="How many offsets does a whole tensor have? Count the bits they would take."
)
def _(absmax, levels, blocksize):
    means = torch.stack([block.mean() for block in absmax.split(blocksize)])
    return *_coded(absmax - _each(means, blocksize, len(absmax)), levels, blocksize), means


@double.misconception(
    "one scale for all blocks",
    hint="What does a scale that is far out do to all the others? How many blocks are there?",
)
def _(absmax, levels, blocksize):
    centred = absmax - absmax.mean()
    scale = centred.abs().max()
    return (
        _code(centred / scale.clamp(min=1e-30), levels),
        scale.expand(math.ceil(len(absmax) / blocksize)),
        absmax.mean(),
    )


@double.misconception(
    "scales by the largest value, not the largest magnitude",
    hint="Some values lie below the mean. Is everything in [-1, 1] after your division?",
)
def _(absmax, levels, blocksize):
    centred = absmax - absmax.mean()
    scales = torch.stack([block.max() for block in centred.split(blocksize)])
    return _code(centred / _each(scales, blocksize, len(centred)).clamp(min=1e-30), levels), scales, absmax.mean()


@double.misconception(
    "divides first and takes the mean off after",
    hint="What must be added at the end, and in which units is it: those of the scales, or of the blocks' largest?",
)
def _(absmax, levels, blocksize):
    scales = _block_scales(absmax, blocksize)
    scaled = absmax / _each(scales, blocksize, len(absmax))
    return _code(scaled - scaled.mean(), levels), scales, scaled.mean()


@double.misconception(
    "rounds to an evenly spaced code",
    hint="Your formula takes neighbouring levels to be equally far apart. Look at levels[127:131].",
)
def _(absmax, levels, blocksize):
    centred = absmax - absmax.mean()
    scales = _block_scales(centred, blocksize)
    scaled = centred / _each(scales, blocksize, len(centred)).clamp(min=1e-30)
    return ((scaled + 1) / 2 * 255).round().to(torch.uint8), scales, absmax.mean()


@double.misconception(
    "takes the level below, not the nearest",
    hint="Where does the code change from one to the next: at a level, or between two?",
)
def _(absmax, levels, blocksize):
    centred = absmax - absmax.mean()
    scales = _block_scales(centred, blocksize)
    scaled = centred / _each(scales, blocksize, len(centred)).clamp(min=1e-30)
    below = torch.bucketize(scaled, levels, right=True) - 1
    return below.clamp(min=0).to(torch.uint8), scales, absmax.mean()


_ZERO_HINT = "All scales may be equal, or there is only one. What is 0 / 0? Which code should a distance of 0 get?"


@double.misconception("divides by zero where all scales are equal", hint=_ZERO_HINT)
def _(absmax, levels, blocksize):
    centred = absmax - absmax.mean()
    scales = _block_scales(centred, blocksize)
    return _code(centred / _each(scales, blocksize, len(centred)), levels), scales, absmax.mean()


@double.misconception("divides by zero where all scales are equal", hint=_ZERO_HINT)
def _(absmax, levels, blocksize):
    centred = absmax - absmax.mean()
    scales = _block_scales(centred, blocksize)
    scaled = centred / _each(scales, blocksize, len(centred))
    return torch.bucketize(scaled, (levels[1:] + levels[:-1]) / 2).to(torch.uint8), scales, absmax.mean()


@double.misconception(
    "takes every block for a whole one", hint="What is left at the end when blocksize does not divide their number?"
)
def _(absmax, levels, blocksize):
    blocks = (absmax - absmax.mean()).view(-1, blocksize)
    scales = blocks.abs().amax(1)
    return _code((blocks / scales.clamp(min=1e-30)[:, None]).flatten(), levels), scales, absmax.mean()


@double.alternative("midpoints and bucketize, last block filled up")
def _(scales, table, size):
    offset = scales.mean()
    blocks = F.pad(scales - offset, (0, -len(scales) % size)).view(-1, size)
    largest = blocks.abs().amax(dim=1)
    scaled = blocks / torch.where(largest > 0, largest, 1.0).unsqueeze(1)
    codes = torch.bucketize(scaled, (table[1:] + table[:-1]) / 2)
    return codes.flatten()[: len(scales)].to(torch.uint8), largest, offset


@double.alternative("a loop over blocks, float64 inside")
def _(absmax, levels, blocksize):
    offset, codes, scales = absmax.double().mean(), [], []
    for block in (absmax.double() - offset).split(blocksize):
        scale = block.abs().max()
        scaled = block / scale if scale > 0 else block
        codes.append(torch.cdist(scaled.unsqueeze(1), levels.double().unsqueeze(1)).argmin(1))
        scales.append(scale)
    return [torch.cat(codes).byte(), torch.stack(scales).float(), offset.float()]


@double.alternative("the nearer of two neighbours, a Python number as the offset")
def _(*args):
    absmax, levels, blocksize = args
    offset = sum(absmax.tolist()) / len(absmax)
    centred = (absmax.double() - offset).float()
    scales = torch.stack([torch.linalg.vector_norm(block, float("inf")) for block in centred.split(blocksize)])
    scaled = torch.nan_to_num(centred / scales.repeat_interleave(blocksize)[: len(centred)])
    above = torch.searchsorted(levels, scaled).clamp(1, len(levels) - 1)
    nearer_below = (scaled - levels[above - 1]) <= (levels[above] - scaled)
    return (above - nearer_below.long()).to(torch.uint8), scales, offset


@double.alternative("levels scaled up instead of scales scaled down")
def _(absmax, levels, blocksize):
    offset = absmax.sum() / absmax.numel()
    scales, codes = [], []
    for block in (absmax - offset).split(blocksize):
        scales.append(torch.maximum(block.max(), -block.min()))
        distance = (block[:, None] - levels[None] * scales[-1]).abs()
        codes.append(distance.argmin(1) if scales[-1] > 0 else torch.full_like(block, 127))
    return torch.cat(codes).to(torch.uint8), torch.stack(scales), offset


# qlora.linear --------------------------------------------------------------------------------------------------------


@question("qlora.linear", lab=LAB, points=15, slide="QLoRA: LoRA, with quantized backbones", cases=5)
def linear(draw: Draw) -> Case:
    """Put a LoRA branch beside a layer that is held in 4 bits."""
    edge = draw.edge("r = 1", "an odd number of weights", "B = 0")
    out, inp = draw.sizes(2, low=17, high=32)
    if edge == "an odd number of weights":
        out, inp = out | 1, inp | 1
    blocksize, r, batch = draw.choice([8, 16]), 1 if edge == "r = 1" else draw.integer(2, 4), draw.integer(2, 4)
    indices = draw.integers(0, 15, out * inp)
    if out * inp % 2:
        indices = torch.cat([indices, indices.new_tensor([7])])
    B = draw.normal(out, r)
    return Case(
        edge,
        x=draw.normal(batch, inp),
        packed=(16 * indices[::2] + indices[1::2]).to(torch.uint8),
        absmax=draw.uniform(math.ceil(out * inp / blocksize), low=0.2, high=2.0),
        levels=TABLE.to(draw.device),
        blocksize=blocksize,
        A=draw.normal(r, inp),
        B=torch.zeros_like(B) if edge == "B = 0" else B,
        scale=draw.choice([0.5, 2.0, 4.0]),
        upstream=draw.normal(batch, out),
    )


linear.oracle("lecturekit.compression.qlora:linear_4bit")


@linear.driver
def _(function: Any, case: Case) -> dict[str, Any]:
    """The output, its gradients, and what is kept between the two passes."""
    trained, frozen = (case.x, case.A, case.B), (case.absmax, case.levels)
    for tensor in (*trained, *frozen):
        tensor.requires_grad_()
    kept: list[Tensor] = []

    def keep(tensor: Tensor) -> Tensor:
        kept.append(tensor.detach())
        return kept[-1]

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        y = function(case.x, case.packed, *frozen, case.blocksize, case.A, case.B, case.scale)
    if not isinstance(y, Tensor) or y.shape != case.upstream.shape:
        raise Unfit(f"linear_4bit must return a tensor (batch, out) = {tuple(case.upstream.shape)}, got {describe(y)}")
    if not y.requires_grad:
        raise Unfit("the output has no gradient, not even to A and B: a .detach(), .data or no_grad around all of it?")
    weights = len(case.B) * case.A.shape[1]
    kept += _kept_by_hand(y)
    parts: dict[str, Any] = {
        "output": y.detach(),
        "no dequantized weight is kept for the backward pass": not any(
            tensor.is_floating_point() and tensor.numel() >= weights for tensor in kept
        ),
    }
    gradients = torch.autograd.grad((y * case.upstream).sum(), [*trained, *frozen], allow_unused=True)
    for name, tensor, gradient in zip(("x", "A", "B"), trained, gradients, strict=False):
        parts[f"gradient of {name}"] = torch.zeros_like(tensor) if gradient is None else gradient
    parts["absmax and levels get no gradient"] = all(gradient is None for gradient in gradients[3:])
    return parts


def _kept_by_hand(y: Tensor) -> list[Tensor]:
    """Tensors that autograd Functions hold as attributes of their ctx, past save_for_backward."""
    nodes, seen, kept = [y.grad_fn], set(), []
    while nodes:
        node = nodes.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        for value in getattr(node, "__dict__", {}).values():
            kept += [
                item for item in (value if isinstance(value, (list, tuple)) else [value]) if isinstance(item, Tensor)
            ]
        nodes += [below for below, _ in node.next_functions]
    return kept


def _weight_of(case: Case) -> Tensor:
    """|W| in float64."""
    out, inp = len(case.B), case.A.shape[1]
    levels = case.levels.double()[_halves(case.packed)[: out * inp].long()]
    return (levels * case.absmax.double().repeat_interleave(case.blocksize)[: out * inp]).abs().view(out, inp)


def _sizes(case: Case) -> dict[str, Tensor]:
    """What the terms of each result add up to, all taken positive."""
    x, A, B, up = (tensor.double().abs() for tensor in (case.x, case.A, case.B, case.upstream))
    W = _weight_of(case)
    return {
        "output": x @ W.T + case.scale * (x @ A.T @ B.T),
        "gradient of x": up @ W + case.scale * (up @ B @ A),
        "gradient of A": case.scale * (up @ B).T @ x,
        "gradient of B": case.scale * up.T @ (x @ A.T),
    }


for _part in ("output", "gradient of x", "gradient of A", "gradient of B"):
    linear.tolerance(
        ulps=lambda case: sum(case.B.shape) + case.A.shape[1] + len(case.x) + 6,
        magnitude=lambda case, _, part=_part: _sizes(case)[part],
        why="chains of at most two sums, over in, out, r or the batch, each as many roundings as it has terms; the "
        "dequantized weight's product, the scale and the last addition",
        part=_part,
    )
linear.law(
    "B = 0 switches the branch off: A gets a gradient of zero",
    lambda case, parts: bool((parts["gradient of A"] == 0).all()) if case.label == "B = 0" else None,
)


class _Frozen(torch.autograd.Function):
    """x -> W x for a W that `unpack` makes anew in each pass."""

    @staticmethod
    def forward(ctx, x, unpack):
        ctx.unpack = unpack
        return x @ unpack().T

    @staticmethod
    def backward(ctx, grad):
        return grad @ ctx.unpack(), None


class _Keeping(torch.autograd.Function):
    """x -> W x that keeps W."""

    @staticmethod
    def forward(ctx, x, unpack):
        ctx.weight = unpack()
        return x @ ctx.weight.T

    @staticmethod
    def backward(ctx, grad):
        return grad @ ctx.weight, None


def _branch(x: Tensor, A: Tensor, B: Tensor, scale: float) -> Tensor:
    return scale * (x @ A.T @ B.T)


def _unpacked(packed: Tensor, absmax: Tensor, levels: Tensor, blocksize: int, shape: tuple[int, int]) -> Tensor:
    count = shape[0] * shape[1]
    return (levels[_halves(packed)[:count].long()] * absmax.repeat_interleave(blocksize)[:count]).view(shape)


@linear.misconception(
    "lets the gradient into the base",
    hint="The base is frozen. Which tensors of it would an optimizer find a gradient at, after your backward pass?",
)
def _(x, packed, absmax, levels, blocksize, A, B, scale):
    return x @ _unpacked(packed, absmax, levels, blocksize, (len(B), A.shape[1])).T + _branch(x, A, B, scale)


_KEPT_HINT = (
    "x @ W.T keeps W, in floating point, until the backward pass, and so does every layer of the model. How could the "
    "backward pass get W without anybody keeping it?"
)


@linear.misconception("keeps the dequantized weight for the backward pass", hint=_KEPT_HINT)
def _(x, packed, absmax, levels, blocksize, A, B, scale):
    weight = _unpacked(packed, absmax.detach(), levels.detach(), blocksize, (len(B), A.shape[1]))
    return x @ weight.T + _branch(x, A, B, scale)


@linear.misconception("keeps the dequantized weight for the backward pass", hint=_KEPT_HINT)
def _(x, packed, absmax, levels, blocksize, A, B, scale):
    base = _Keeping.apply(x, lambda: _unpacked(packed, absmax, levels, blocksize, (len(B), A.shape[1])))
    return base + _branch(x, A, B, scale)


@linear.misconception(
    "cuts the gradient to the layers below",
    hint="Frozen means that W does not move. Must the gradient still pass through W to what came before?",
)
def _(x, packed, absmax, levels, blocksize, A, B, scale):
    with torch.no_grad():
        base = x @ _unpacked(packed, absmax, levels, blocksize, (len(B), A.shape[1])).T
    return base + _branch(x, A, B, scale)


@linear.misconception(
    "swaps the halves of a byte", hint="Unpack the byte 0x12 by hand. Which half is the first of its two indices?"
)
def _(x, packed, absmax, levels, blocksize, A, B, scale):
    swapped = (packed << 4) | (packed >> 4)
    base = _Frozen.apply(x, lambda: _unpacked(swapped, absmax, levels, blocksize, (len(B), A.shape[1])))
    return base + _branch(x, A, B, scale)


@linear.misconception(
    "takes the half bytes for signed numbers",
    hint="Does the index 15 stand for the largest level in your code, or for the one below the middle?",
)
def _(x, packed, absmax, levels, blocksize, A, B, scale):
    turned = levels.roll(8)
    base = _Frozen.apply(x, lambda: _unpacked(packed, absmax, turned, blocksize, (len(B), A.shape[1])))
    return base + _branch(x, A, B, scale)


@linear.misconception(
    "multiplies before it scales: one scale for each row of the product",
    hint="A block is a run of the flattened W. Do all terms of one sum lie in one block, so that a scale can wait?",
)
def _(x, packed, absmax, levels, blocksize, A, B, scale):
    def unpack():
        indices = _halves(packed)[: len(B) * A.shape[1]].long()
        return levels[indices].view(len(B), -1) * absmax[: len(B), None]

    return _Frozen.apply(x, unpack) + _branch(x, A, B, scale)


@linear.misconception(
    "forgets the blocks' scales", hint="The levels lie in [-1, 1]. What was each block of W divided by?"
)
def _(x, packed, absmax, levels, blocksize, A, B, scale):
    ones = torch.ones_like(absmax)
    base = _Frozen.apply(x, lambda: _unpacked(packed, ones, levels, blocksize, (len(B), A.shape[1])))
    return base + _branch(x, A, B, scale)


@linear.misconception(
    "repeats the list of scales instead of each scale",
    hint="For scales a, b and blocks of two: is it a b a b, or a a b b? Compare repeat and repeat_interleave.",
)
def _(x, packed, absmax, levels, blocksize, A, B, scale):
    spread = absmax.repeat(blocksize)
    base = _Frozen.apply(x, lambda: _unpacked(packed, spread, levels, 1, (len(B), A.shape[1])))
    return base + _branch(x, A, B, scale)


@linear.misconception("forgets the branch's scale", hint="What does alpha / r multiply, and where is it in your sum?")
def _(x, packed, absmax, levels, blocksize, A, B, scale):
    base = _Frozen.apply(x, lambda: _unpacked(packed, absmax, levels, blocksize, (len(B), A.shape[1])))
    return base + _branch(x, A, B, 1.0)


@linear.misconception(
    "scales the base together with the branch", hint="Only the branch carries alpha / r. What must come out when B = 0?"
)
def _(x, packed, absmax, levels, blocksize, A, B, scale):
    base = _Frozen.apply(x, lambda: _unpacked(packed, absmax, levels, blocksize, (len(B), A.shape[1])))
    return scale * base + _branch(x, A, B, scale)


@linear.misconception("leaves out the branch", hint="What of this layer is to be trained?")
def _(x, packed, absmax, levels, blocksize, A, B, scale):
    return _Frozen.apply(x, lambda: _unpacked(packed, absmax, levels, blocksize, (len(B), A.shape[1])))


@linear.misconception(
    "stops the branch's gradient at its input",
    hint="x reaches the output by two ways. Through which of them does its gradient come back in your code?",
)
def _(x, packed, absmax, levels, blocksize, A, B, scale):
    base = _Frozen.apply(x, lambda: _unpacked(packed, absmax, levels, blocksize, (len(B), A.shape[1])))
    return base + _branch(x.detach(), A, B, scale)


class _Bytes(torch.autograd.Function):
    """An autograd Function as its documentation has it: tensors through save_for_backward, the rest on ctx."""

    @staticmethod
    def forward(ctx, x, packed, absmax, levels, blocksize, shape):
        ctx.save_for_backward(packed, absmax, levels)
        ctx.blocksize, ctx.shape = blocksize, shape
        return F.linear(x, _unpacked(packed, absmax, levels, blocksize, shape))

    @staticmethod
    def backward(ctx, grad):
        weight = _unpacked(*ctx.saved_tensors, ctx.blocksize, ctx.shape)
        return torch.mm(grad, weight), None, None, None, None, None


@linear.alternative("an autograd Function that keeps the bytes")
def _(x, packed, absmax, levels, blocksize, A, B, scale):
    base = _Bytes.apply(x, packed, absmax, levels, blocksize, (len(B), A.shape[1]))
    return torch.addmm(base, x @ A.T, B.T, alpha=scale)


@linear.alternative("activation checkpointing around the base layer")
def _(x, packed, absmax, levels, blocksize, A, B, scale):
    def base(x):
        with torch.no_grad():
            weight = _unpacked(packed, absmax, levels, blocksize, (len(B), A.shape[1]))
        return F.linear(x, weight)

    return checkpoint(base, x, use_reentrant=False) + F.linear(F.linear(x, A), scale * B)


class _Whole(torch.autograd.Function):
    """Base and branch in one, all gradients by hand, float64 inside."""

    @staticmethod
    def forward(ctx, x, A, B, scale, packed, absmax, levels, blocksize):
        ctx.save_for_backward(x, A, B, packed, absmax, levels)
        ctx.blocksize, ctx.scale = blocksize, scale
        weight = _unpacked(packed, absmax, levels, blocksize, (len(B), A.shape[1])).double()
        return (x.double() @ (weight + scale * B.double() @ A.double()).T).float()

    @staticmethod
    def backward(ctx, grad):
        x, A, B, packed, absmax, levels = ctx.saved_tensors
        g, a, b = grad.double(), A.double(), B.double()
        weight = _unpacked(packed, absmax, levels, ctx.blocksize, (len(B), A.shape[1])).double()
        to_x = g @ (weight + ctx.scale * b @ a)
        to_A, to_B = ctx.scale * b.T @ g.T @ x.double(), ctx.scale * g.T @ (x.double() @ a.T)
        return to_x.float(), to_A.float(), to_B.float(), None, None, None, None, None


@linear.alternative("base and branch in one Function, gradients by hand")
def _(x, packed, absmax, levels, blocksize, A, B, scale):
    return _Whole.apply(x, A, B, scale, packed, absmax, levels, blocksize)


class _RowByRow(torch.autograd.Function):
    """One row of W at a time, so that not even the forward pass holds all of it."""

    @staticmethod
    def forward(ctx, x, row, rows):
        ctx.row, ctx.rows = row, rows
        return torch.stack([x @ row(i) for i in range(rows)], dim=1)

    @staticmethod
    def backward(ctx, grad):
        return sum(torch.outer(grad[:, i], ctx.row(i)) for i in range(ctx.rows)), None, None


@linear.alternative("row by row, gathered from the bytes")
def _(x, packed, absmax, levels, blocksize, A, B, scale):
    def row(i):
        place = torch.arange(i * x.shape[1], (i + 1) * x.shape[1], device=x.device)
        index = (packed[place // 2] >> (4 - 4 * (place % 2)).to(torch.uint8)) & 15
        return (levels[index.long()] * absmax[place // blocksize]).detach()

    return _RowByRow.apply(x, row, len(B)) + torch.einsum("bi,ri,or->bo", x, A, B).mul(scale)
