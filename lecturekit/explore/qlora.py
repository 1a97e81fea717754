"""Figures of lab 6: what one outlier does to its block, where sixteen levels lie, and what the student's code did."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from lecturekit.checking.limits import TimeUp, time_limit
from lecturekit.explore import style

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

PATIENCE = 5  # seconds that a student's code may take before the picture is drawn without it

# The slide's list. Pictures compare with it; it is derived in the lab.
NF4 = np.array(
    [-1.0, -0.6961928, -0.5250731, -0.3949175, -0.2844414, -0.1847734, -0.0910500, 0.0]
    + [0.0795803, 0.1609302, 0.2461123, 0.3379152, 0.4407098, 0.5626170, 0.7229568, 1.0]
)
INT4 = np.arange(-7, 8) / 7
E2M1 = np.array([-6, -4, -3, -2, -1.5, -1, -0.5, 0, 0.5, 1, 1.5, 2, 3, 4, 6]) / 6
KINDS = {"NF4": NF4, "INT4": INT4, "FP4 (E2M1)": E2M1}

VALUES = 128  # values in the figure with the outlier
OUTLIER = 41  # where in the row it stands
BLOCKSIZES = (8, 16, 32, 64, 128)
SETTINGS = ((128, 3), (128, 24), (32, 24), (8, 24))  # (blocksize, outlier) of the static twin


# the idea: a block and its outlier ------------------------------------------------------------------------------------


def row(outlier: float) -> np.ndarray:
    """128 values drawn from a standard normal distribution, the 42nd replaced by `outlier`. (128,)"""
    values = np.random.default_rng(6).standard_normal(VALUES).clip(-2.5, 2.5)
    values[OUTLIER] = outlier
    return values


def rounded(values: np.ndarray, blocksize: int, levels: np.ndarray = NF4) -> np.ndarray:
    """Each value as it comes back: the nearest level times the largest magnitude of its block. (n,) → (n,)

    Raises ValueError unless blocksize is a whole number that divides n.
    """
    if isinstance(blocksize, bool) or not isinstance(blocksize, int) or blocksize < 1 or len(values) % blocksize:
        raise ValueError(f"blocksize must be a whole number that divides {len(values)}, got {blocksize!r}")
    blocks = values.reshape(-1, blocksize)
    scales = np.abs(blocks).max(axis=1, keepdims=True)
    scaled = blocks / np.where(scales > 0, scales, 1)
    nearest = np.abs(scaled[:, :, None] - levels).argmin(axis=2)
    return (levels[nearest] * scales).reshape(-1)


def describe(blocksize: int, outlier: float) -> dict[str, float]:
    """The numbers of the figure: bits a value, values in the outlier's block, and root mean square errors.

    `near` is the error of the other values in the outlier's block, `far` that of all values in other blocks (NaN when
    there is only one block), `lost` how many values other than zero came back as zero.
    """
    values = row(outlier)
    back = rounded(values, blocksize)
    own = np.arange(VALUES) // blocksize == OUTLIER // blocksize
    near = own & (np.arange(VALUES) != OUTLIER)
    error = np.square(back - values)
    return {
        "bits": 4 + 32 / blocksize,
        "near": float(np.sqrt(error[near].mean())),
        "far": float(np.sqrt(error[~own].mean())) if not own.all() else math.nan,
        "lost": int(((back == 0) & (values != 0)).sum()),
        "block": int(own.sum()),
    }


def _errors(axes: Axes, blocksize: int, outlier: float) -> None:
    """Each value and what comes back, joined; the outlier's block is shaded."""
    values = row(outlier)
    back = rounded(values, blocksize)
    first = OUTLIER // blocksize * blocksize
    axes.axvspan(first - 0.5, first + blocksize - 0.5, color=style.YELLOW, alpha=0.35, linewidth=0)
    for edge in range(blocksize, VALUES, blocksize):
        axes.axvline(edge - 0.5, color=style.GREY, linewidth=0.5)
    axes.vlines(np.arange(VALUES), np.minimum(values, back), np.maximum(values, back), color=style.VERMILION)
    axes.plot(values, ".", color=style.GREY, markersize=5, label="value")
    axes.plot(back, "_", color=style.BLUE, markersize=6, markeredgewidth=1.6, label="comes back as")
    axes.set_ylim(-3.9, 3.2)  # the outlier itself is above the picture: it is stored well, its neighbours are not
    axes.grid(False)


def block_figure(blocksize: int, outlier: float) -> Figure:
    """128 values and what NF4 makes of them, with one outlier among them; the error inside and outside its block."""
    facts = describe(blocksize, outlier)
    fig, (main, side) = style.figure(1, 2, width=6.2, height=3.6, width_ratios=[3, 1])
    _errors(main, blocksize, outlier)
    main.set(xlabel="place in the tensor", ylabel="value", title=f"blocks of {blocksize}, one value is {outlier:g}")
    main.legend(loc="lower right", ncols=2)
    heights = [facts["near"], 0.0 if math.isnan(facts["far"]) else facts["far"]]
    drawn = side.bar(
        ["in its\nblock", "in other\nblocks"], heights, color=[style.YELLOW, style.GREY], edgecolor="black"
    )
    side.bar_label(
        drawn, [f"{facts['near']:.2f}", "none" if math.isnan(facts["far"]) else f"{facts['far']:.2f}"], padding=3
    )
    side.set(title=f"RMS error at {facts['bits']:g} bits a value", ylim=(0, 1.15))
    return fig


def block_picture(blocksize: int, outlier: float) -> style.Picture:
    """`block_figure` with the text that a screen reader reads."""
    facts = describe(blocksize, outlier)
    elsewhere = (
        "there is no other block"
        if math.isnan(facts["far"])
        else f"that of the values in other blocks is {facts['far']:.2f}"
    )
    return style.alt(
        block_figure(blocksize, outlier),
        f"128 values in blocks of {blocksize}, rounded to NF4; one value is {outlier:g}, the others are normal "
        f"with deviation 1. The root mean square error of the {facts['block'] - 1} values that share the outlier's "
        f"block is {facts['near']:.2f}; {elsewhere}. {facts['lost']} values come back as zero. It takes "
        f"{facts['bits']:g} bits a value.",
    )


def block_slider(blocksize: int = 64, outlier: int = 12) -> Any:
    """The figure under two sliders, for the block size and the outlier. Tab to them, then the arrow keys."""
    import ipywidgets as widgets

    layout = widgets.Layout(width="min(32em, 95%)")
    blocks = widgets.SelectionSlider(
        options=BLOCKSIZES, value=blocksize, description="block size", continuous_update=False, layout=layout
    )
    value = widgets.IntSlider(
        value=outlier, min=3, max=40, description="outlier", continuous_update=False, layout=layout
    )
    return style.moving(block_picture, blocks, value)


def block_strip() -> style.Picture:
    """The static twin of the sliders: a tame row, a wild one in one block, and the same in smaller blocks."""
    fig, panels = style.figure(2, 2, width=5.4, height=2.7)
    told = []
    for axes, (blocksize, outlier) in zip(panels, SETTINGS, strict=True):
        facts = describe(blocksize, outlier)
        _errors(axes, blocksize, outlier)
        axes.set(xlabel="place in the row", ylabel="value")
        axes.set_title(
            f"blocks of {blocksize}, outlier {outlier}: {facts['bits']:g} bits, error {facts['near']:.2f} beside it",
            fontsize=11,
        )
        told.append(
            f"With blocks of {blocksize} and an outlier of {outlier} the error beside it is {facts['near']:.2f}"
        )
    panels[0].legend(loc="lower right", ncols=2)
    return style.alt(
        fig, f"The same 128 values four times. {'. '.join(told)}. The shaded block is the one that holds the outlier."
    )


# the idea: where sixteen levels lie -----------------------------------------------------------------------------------


def levels_strip() -> style.Picture:
    """The levels of NF4, INT4 and FP4 below a bell curve, each brought to [-1, 1]."""
    fig, (axes,) = style.figure(width=9, height=3.4)
    x = np.linspace(-1.05, 1.05, 300)
    widest = 1.848  # the normal quantile at 0.9677, which NF4 puts at 1
    axes.fill_between(x, np.exp(-((x * widest) ** 2) / 2), color=style.SKY, alpha=0.35, linewidth=0)
    for height, (name, levels), colour in zip((-0.25, -0.55, -0.85), KINDS.items(), style.CYCLE, strict=False):
        axes.vlines(levels, height - 0.1, height + 0.1, color=colour, linewidth=2.5)
        axes.text(1.09, height, f"{name}, {len(levels)} levels", va="center", color=colour)
    axes.set(xlim=(-1.05, 1.5), ylim=(-1.0, 1.05), yticks=[], xticks=[-1, -0.5, 0, 0.5, 1])
    axes.set_xlabel("weight ÷ largest magnitude of its block")
    axes.spines["left"].set_visible(False)
    axes.grid(False)
    return style.alt(
        fig,
        "A bell curve over the interval from -1 to 1 and below it three rows of ticks. NF4: sixteen levels, dense "
        "around zero, one more above it than below. INT4: fifteen levels, evenly spaced. FP4: fifteen levels, whose "
        "distances double twice from zero outwards.",
    )


# what the student's code did ------------------------------------------------------------------------------------------


def levels_picture(candidate: Callable[[], Any]) -> style.Picture:
    """A student's levels on a bell curve, with black marks where the slide's list has them."""
    answer, trouble = _attempt(candidate)
    if answer is not None and not isinstance(answer, Tensor):
        answer, trouble = None, f"returned {type(answer).__name__}, not a tensor"
    fig, (axes,) = style.figure(width=9, height=3.2)
    x = np.linspace(-1.9, 1.9, 300)
    axes.fill_between(x, np.exp(-((x * 1.848) ** 2) / 2), color=style.SKY, alpha=0.35, linewidth=0)
    axes.vlines(NF4, -0.14, -0.02, color="black", linewidth=2)
    axes.text(-1.88, -0.08, "the slide", va="center")
    axes.text(-1.88, 0.5, "yours", va="center", color=style.BLUE)
    if answer is None:
        axes.text(0, 0.5, f"your levels: {trouble}", ha="center", va="center")
        seen = f"Your levels cannot be drawn: {trouble}."
    else:
        mine = answer.detach().double().cpu().reshape(-1).numpy()
        shown = mine[np.isfinite(mine)]
        axes.vlines(
            shown.clip(-1.9, 1.9), 0, np.exp(-((shown * 1.848) ** 2) / 2).clip(0.12), color=style.BLUE, linewidth=2
        )
        if len(shown) != len(mine):
            seen = f"{len(mine) - len(shown)} of your {len(mine)} levels are not finite."
        elif len(mine) != 16:
            seen = f"You have {len(mine)} levels, the slide has 16."
        else:
            apart = float(np.abs(mine - NF4).max())
            seen = f"The largest distance between one of your sixteen levels and the slide's is {apart:.1g}."
        axes.set_title(seen, fontsize=12)
    axes.set(ylim=(-0.2, 1.05), yticks=[], xlabel="weight ÷ largest magnitude of its block")
    axes.spines["left"].set_visible(False)
    axes.grid(False)
    return style.alt(fig, f"A bell curve with your levels as lines, and the slide's as black marks below. {seen}")


BLOCK = 32  # values a block in the pictures of quantize and dequantize


def _patch() -> Tensor:
    """16 × 64 weights, two blocks a row: waves and noise, rows of different size, one outlier. (16, 64)"""
    generator = torch.Generator().manual_seed(4)
    rows, columns = torch.arange(16).unsqueeze(1), torch.arange(64).unsqueeze(0)
    weight = torch.sin(rows / 2.5 + columns / 6) + 0.4 * torch.randn(16, 64, generator=generator)
    weight = weight * torch.linspace(0.4, 1.0, 16).unsqueeze(1)
    weight[10, 45] = 9.0
    return weight


def _best(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Indices of the nearest levels, (16, 64) int64, and the largest magnitude of each block, (32,)."""
    blocks = weight.reshape(-1, BLOCK)
    scales = blocks.abs().amax(1)
    nearest = (blocks / scales.unsqueeze(1)).unsqueeze(2).sub(torch.tensor(NF4).float()).abs().argmin(2)
    return nearest.view(weight.shape), scales


def _restored(indices: Tensor, scales: Tensor) -> Tensor:
    levels = torch.tensor(NF4).float()[indices.long()]
    return (levels.view(-1, BLOCK) * scales.float().unsqueeze(1)).view(indices.shape)


def quantize_picture(candidate: Callable[..., Any]) -> style.Picture:
    """What a student's quantize did to 16 × 64 weights with one outlier: its indices, what comes back, what is lost."""
    weight = _patch()
    best = _rms(_restored(*_best(weight)) - weight)
    answer, trouble = _attempt(lambda: candidate(weight.clone(), BLOCK))
    if answer is not None:
        answer, trouble = _codes_and_scales(answer, weight.shape, weight.numel() // BLOCK, 15)
    fig, panels = style.figure(1, 4, width=3.3, height=3.2)
    _heat(panels[0], weight, "W, 16 × 64", 2.5)
    if answer is None:
        style.say(panels[1], f"your quantize\n{trouble}")
        style.say(panels[2], "nothing to scale back")
        style.say(panels[3], "nothing to compare")
        seen = f"Your quantize gave nothing to draw: {trouble}."
    else:
        indices, scales = answer
        _show_indices(panels[1], indices, "your indices, 0 … 15")
        back = _restored(indices, scales)
        lost = _rms(back - weight)
        _heat(panels[2], back, "level × your scale", 2.5)
        _heat(panels[3], back - weight, f"minus W\nRMS {lost:.3f}, best {best:.3f}", 1.0)
        # an index on either side of a midpoint changes the error by far less than a hundredth
        seen = f"The root mean square error is {lost:.3f}, " + (
            "as small as it can be." if lost < 1.01 * best else f"where {best:.3f} is possible."
        )
    return style.alt(
        fig,
        f"Heat maps of weights with one outlier in row 10, your indices, the weights that come back, and the "
        f"difference. {seen}",
    )


def dequantize_picture(candidate: Callable[..., Any]) -> style.Picture:
    """What a student's dequantize made of known indices and scales: the indices, the answer, the difference."""
    indices, scales = _best(_patch())
    truth = _restored(indices, scales)
    answer, trouble = _attempt(lambda: candidate(indices.to(torch.uint8), scales.clone(), BLOCK))
    if answer is not None:
        answer, trouble = _matrix(answer, truth.shape)
    fig, panels = style.figure(1, 3, width=3.6, height=3.2)
    _show_indices(panels[0], indices, "indices, 0 … 15")
    if answer is None:
        style.say(panels[1], f"your dequantize\n{trouble}")
        style.say(panels[2], "nothing to compare")
        seen = f"Your dequantize gave nothing to draw: {trouble}."
    else:
        _heat(panels[1], answer, "your weights", 2.5)
        largest = float((answer - truth).abs().nan_to_num(nan=torch.inf).max())
        _heat(panels[2], answer - truth, f"minus the truth\nlargest {largest:.2g}", 1.0)
        # the slide's list has seven digits here, and the largest weight is 9
        seen = "The difference is blank: right." if largest < 9e-6 else f"The difference shows: up to {largest:.2g}."
    return style.alt(fig, f"Heat maps of indices, your weights, and these minus the truth. {seen}")


NIBBLES = (1, 15, 7, 0, 12, 3, 5, 10)


def pack_picture(candidate: Callable[..., Any]) -> style.Picture:
    """The bits of four bytes into which a student packed eight indices, below the right ones."""
    indices = torch.tensor(NIBBLES, dtype=torch.uint8)
    right = [16 * high + low for high, low in zip(NIBBLES[::2], NIBBLES[1::2], strict=True)]
    answer, trouble = _attempt(lambda: candidate(indices.clone()))
    if answer is not None:
        answer, trouble = _as_bytes(answer, len(right))
    fig, (axes,) = style.figure(width=9, height=2.9)
    _bytes(axes, right, 1.7, "right", style.GREY)
    for place, index in enumerate(NIBBLES):
        axes.text(4.5 * place + 1.5, 3.1, str(index), ha="center", va="center", fontsize=12)
    axes.text(-0.8, 3.1, "index", ha="right", va="center")
    if answer is None:
        axes.text(17, 0.5, f"your bytes: {trouble}", ha="center", va="center")
        seen = f"Your bytes cannot be drawn: {trouble}."
    else:
        mine = answer.tolist()
        _bytes(axes, mine, 0.0, "yours", style.BLUE, right)
        wrong = sum((a ^ b).bit_count() for a, b in zip(mine, right, strict=True))
        seen = f"Yours are {_hex(mine)}, " + (
            "all bits as they should be." if not wrong else f"{wrong} of 32 bits wrong."
        )
    axes.set(xlim=(-5, 36), ylim=(-0.4, 3.6))
    axes.set_axis_off()
    return style.alt(fig, f"Eight indices as the bits of four bytes. The right bytes are {_hex(right)}. {seen}")


def _bytes(
    axes: Axes, values: list[int], bottom: float, name: str, colour: str, right: list[int] | None = None
) -> None:
    """A row of bits as squares, filled for 1, a gap between nibbles; those unlike `right` get a thick red edge."""
    from matplotlib.patches import Rectangle

    axes.text(-0.8, bottom + 0.5, name, ha="right", va="center", color=colour)
    for place, value in enumerate(values):
        for bit in range(8):
            on = bool(value >> (7 - bit) & 1)
            wrong = right is not None and on != bool(right[place] >> (7 - bit) & 1)
            left = 9 * place + bit * 0.8 + (1.3 if bit > 3 else 0)
            edge = style.VERMILION if wrong else "black"
            axes.add_patch(
                Rectangle(
                    (left, bottom),
                    0.7,
                    1,
                    facecolor=colour if on else "white",
                    edgecolor=edge,
                    linewidth=3 if wrong else 0.8,
                )
            )


def _hex(values: list[int]) -> str:
    return " ".join(f"{value:02X}" for value in values)


def double_picture(candidate: Callable[..., Any], levels: Tensor) -> style.Picture:
    """What a student's double_quantize did to 512 scales: their histogram, what comes back, and the error.

    levels: the 256 levels of the 8-bit type, from the lab.
    """
    scales = torch.randn(512, generator=torch.Generator().manual_seed(8)).mul(0.25).exp() * 0.09
    blocksize = 256

    def best(offset: float) -> Tensor:
        blocks = (scales - offset).view(-1, blocksize)
        largest = blocks.abs().amax(1, keepdim=True)
        nearest = (blocks / largest).unsqueeze(2).sub(levels).abs().argmin(2)
        return (levels[nearest] * largest).view(-1) + offset - scales

    possible, without = _rms(best(float(scales.mean()))), _rms(best(0.0))
    answer, trouble = _attempt(lambda: candidate(scales.clone(), levels.clone(), blocksize))
    if answer is not None:
        answer, trouble = _three_parts(answer, len(scales), blocksize)
    fig, panels = style.figure(1, 3, width=4.2, height=3.3)
    panels[0].hist(scales.numpy(), bins=40, color=style.SKY)
    panels[0].axvline(float(scales.mean()), color=style.BLUE, label="mean")
    panels[0].set(title="512 scales, none below zero", xlim=(0, None))
    panels[0].legend()
    if answer is None:
        style.say(panels[1], f"your double_quantize\n{trouble}")
        style.say(panels[2], "nothing to compare")
        seen = f"Your double_quantize gave nothing to draw: {trouble}."
    else:
        codes, seconds, offset = answer
        back = levels[codes.long()] * seconds.float().repeat_interleave(blocksize) + offset
        lost = _rms(back - scales)
        panels[1].hist(codes.numpy(), bins=np.arange(257) - 0.5, color=style.BLUE)
        panels[1].set(title="how often each code is used", xlabel="code", xlim=(-1, 256))
        panels[2].plot(scales.numpy(), (100 * (back - scales) / scales).numpy(), ".", color=style.BLUE, markersize=4)
        panels[2].axhline(0, color=style.GREY, linewidth=1)
        panels[2].set(title="error of the scale, %", xlabel="scale")
        seen = (
            f"The root mean square error of the scales is {lost:.2g}; with the mean taken off {possible:.2g} is "
            f"possible, without it {without:.2g}."
        )
    return style.alt(
        fig, f"A histogram of 512 scales, how often each of your codes is used, and the scales' errors. {seen}"
    )


def linear_picture(candidate: Callable[..., Any], steps: int = 150) -> style.Picture:
    """What a branch learns beside a student's 4-bit layer: to become the float layer plus a change of rank 2.

    Shows what the rounding changed, the branch after training, what it should be, and the loss beside that of a branch
    of zeros. The rounding error has full rank, so a branch of rank 2 cannot undo it all.
    """
    out, inp, scale = 24, 32, 2.0
    generator = torch.Generator().manual_seed(2)
    weight = 0.3 * torch.randn(out, inp, generator=generator)
    indices, absmax = _best(weight)
    pairs = indices.reshape(-1, 2)
    packed = (16 * pairs[:, 0] + pairs[:, 1]).to(torch.uint8)
    levels = torch.tensor(NF4).float()
    delta = torch.outer(torch.sin(torch.arange(out) / 3), torch.cos(torch.arange(inp) / 4))
    delta += torch.outer((torch.arange(out) > 15).float(), (torch.arange(inp) < 10).float())
    x = torch.randn(256, inp, generator=generator)
    target = x @ (weight + delta).T
    A = nn.Parameter(torch.randn(2, inp, generator=generator) / math.sqrt(3 * inp))
    B = nn.Parameter(torch.zeros(out, 2))
    without = float((x @ _restored(indices, absmax).T - target).square().mean())

    def learn() -> Tensor:
        optimizer = torch.optim.Adam([A, B], lr=0.03)
        losses = []
        for _ in range(steps):
            y = candidate(x.clone(), packed.clone(), absmax.clone(), levels.clone(), BLOCK, A, B, scale)
            loss = (y - target).square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.detach())
        return torch.stack(losses)

    with torch.enable_grad():
        losses, trouble = _attempt(learn)
    fig, panels = style.figure(1, 4, width=3.3, height=3.2)
    _heat(panels[0], _restored(indices, absmax) - weight, "what rounding changed", 0.3)
    _heat(panels[2], delta, "what it should become", 2)
    if losses is None:
        style.say(panels[1], f"your linear_4bit\n{trouble}")
        style.say(panels[3], "no loss to draw")
        seen = f"Nothing could be trained beside your linear_4bit: {trouble}."
    else:
        _heat(panels[1], scale * (B @ A).detach(), f"the branch after {steps} steps", 2)
        panels[3].semilogy(np.arange(1, steps + 1), losses.clamp(min=1e-12))
        panels[3].axhline(without, color=style.GREY, linestyle="--", linewidth=1.5)
        panels[3].set_title("loss")
        panels[3].set_xlabel("step")
        first, last = float(losses[0]), float(losses[-1])
        seen = f"The loss goes from {first:.2g} to {last:.2g}; a branch of zeros has {without:.2g}."
    return style.alt(
        fig, f"Heat maps of the rounding error, the branch learnt beside your layer and its goal, and the loss. {seen}"
    )


# real weights ---------------------------------------------------------------------------------------------------------


def use_of_levels(weights: Mapping[str, Tensor], blocksize: int = 64, kind: str = "NF4") -> tuple[np.ndarray, float]:
    """How often each level is used over these weights, and the entropy of that in bits: (levels,), number."""
    levels = torch.tensor(KINDS[kind]).float()
    middles = (levels[1:] + levels[:-1]) / 2
    counts = torch.zeros(len(levels))
    for weight in weights.values():
        blocks = weight.detach().float().cpu().reshape(-1, blocksize)
        scaled = blocks / blocks.abs().amax(1, keepdim=True).clamp(min=1e-30)
        counts += torch.bucketize(scaled, middles).view(-1).bincount(minlength=len(levels))
    shares = (counts / counts.sum()).double().numpy()
    used = shares[shares > 0]
    return shares, float((used * np.log2(1 / used)).sum())


def layer_picture(weight: Tensor, name: str, kind: str, blocksize: int) -> style.Picture:
    """One layer's scaled weights and how often each level of a 4-bit type is used for them.

    weight: (out, in), its number of elements a multiple of blocksize. kind: one of KINDS.
    """
    levels = KINDS[kind]
    shares, entropy = use_of_levels({name: weight}, blocksize, kind)
    blocks = weight.detach().float().cpu().reshape(-1, blocksize)
    scaled = (blocks / blocks.abs().amax(1, keepdim=True).clamp(min=1e-30)).reshape(-1).numpy()
    part = blocks.reshape(-1).double().numpy()[: 64 * 1024 // blocksize * blocksize]  # as many as a menu has time for
    error = float(np.linalg.norm(rounded(part, blocksize, levels) - part) / max(float(np.linalg.norm(part)), 1e-30))
    fig, (left, right) = style.figure(1, 2, width=5.2, height=3.2)
    left.hist(scaled, bins=201, range=(-1, 1), color=style.SKY, density=True)
    left.vlines(levels, 0, 0.25, color="black", linewidth=1.8)
    left.set(title=f"{name}, scaled; ticks are levels", xlabel="weight ÷ block's largest", yticks=[])
    right.bar(np.arange(len(levels)), 100 * shares, color=style.BLUE)
    right.axhline(100 / 16, color=style.GREY, linestyle="--", linewidth=1.5)
    right.set(title=f"use of each level, % ({entropy:.2f} bits)", xlabel="index")
    return style.alt(
        fig,
        f"{name} in {kind} with blocks of {blocksize}: a histogram of the scaled weights, and how often each level is "
        f"used, from {100 * shares.min():.1f} to {100 * shares.max():.1f} %. The indices carry {entropy:.2f} of 4 "
        f"bits; the relative error is {100 * error:.1f} %.",
    )


def layer_picker(weights: Mapping[str, Tensor]) -> Any:
    """`layer_picture` under three menus: which layer, which type, which block size."""
    import ipywidgets as widgets

    layout = widgets.Layout(width="min(32em, 95%)")
    names = list(weights)
    layer = widgets.Dropdown(options=names, value=names[0], description="layer", layout=layout)
    kind = widgets.Dropdown(options=list(KINDS), value="NF4", description="type", layout=layout)
    size = widgets.Dropdown(options=(16, 64, 256), value=64, description="block size", layout=layout)
    return style.moving(
        lambda name, what, blocksize: layer_picture(weights[name], name, what, blocksize), layer, kind, size
    )


# what comes back from a student's code --------------------------------------------------------------------------------


def _attempt(answer: Callable[[], Any]) -> tuple[Any, str]:
    """Run a student's code and return (result, ""), or (None, what went wrong in words)."""
    try:
        with time_limit(PATIENCE):
            result = answer()
    except NotImplementedError:
        return None, "is not written yet"
    except TimeUp:
        return None, f"did not end within {PATIENCE} seconds"
    except Exception as error:  # any fault of an answer belongs in the picture
        return None, f"raised {type(error).__name__}"
    return (None, "returned nothing") if result is None else (result, "")


def _matrix(answer: Any, shape: torch.Size) -> tuple[Tensor | None, str]:
    if not isinstance(answer, Tensor):
        return None, f"returned {type(answer).__name__}, not a tensor"
    if answer.shape != shape:
        return None, f"returned shape {tuple(answer.shape)}, not {tuple(shape)}"
    if not answer.is_floating_point():
        return None, f"returned {str(answer.dtype).removeprefix('torch.')} numbers"
    return answer.detach().float().cpu(), ""


def _as_bytes(answer: Any, count: int) -> tuple[Tensor | None, str]:
    if not isinstance(answer, Tensor):
        return None, f"returned {type(answer).__name__}, not a tensor"
    if answer.dtype != torch.uint8 or answer.shape != (count,):
        dtype = str(answer.dtype).removeprefix("torch.")
        return None, f"returned {dtype} of shape {tuple(answer.shape)}, not {count} bytes"
    return answer, ""


def _parts(answer: Any, count: int) -> tuple[list[Tensor] | None, str]:
    """The parts of an answer as tensors on the CPU, or what is wrong with them."""
    if not isinstance(answer, (tuple, list)) or len(answer) != count:
        got = f"{len(answer)} parts" if isinstance(answer, (tuple, list)) else type(answer).__name__
        return None, f"returned {got}, not {count} tensors"
    if not all(isinstance(part, Tensor) for part in answer):
        return None, "returned parts that are no tensors"
    return [part.detach().cpu() for part in answer], ""


def _whole(codes: Tensor, largest: int) -> str:
    """What keeps these numbers from being indices up to `largest`, in words; "" when nothing does."""
    if codes.is_floating_point() or codes.is_complex() or codes.dtype == torch.bool:
        return f"returned indices that are {str(codes.dtype).removeprefix('torch.')}"
    low, high = int(codes.min()), int(codes.max())
    return "" if min(low, largest - high) >= 0 else f"returned indices from {low} to {high}, not within 0 … {largest}"


def _codes_and_scales(answer: Any, shape: torch.Size, blocks: int, largest: int) -> tuple[Any, str]:
    parts, trouble = _parts(answer, 2)
    if parts is None:
        return None, trouble
    codes, scales = parts
    if codes.shape != shape:
        return None, f"returned indices of shape {tuple(codes.shape)}, not {tuple(shape)}"
    if scales.numel() != blocks:
        return None, f"returned {scales.numel()} scales for {blocks} blocks"
    trouble = _whole(codes, largest)
    return (None, trouble) if trouble else ((codes, scales.reshape(-1)), "")


def _three_parts(answer: Any, count: int, blocksize: int) -> tuple[Any, str]:
    parts, trouble = _parts(answer, 3)
    if parts is None:
        return None, trouble
    codes, scales, offset = parts
    if offset.numel() != 1:
        return None, f"returned an offset of shape {tuple(offset.shape)}"
    found, trouble = _codes_and_scales((codes, scales), torch.Size([count]), math.ceil(count / blocksize), 255)
    return (None, trouble) if found is None else ((*found, offset.reshape(())), "")


def _heat(axes: Axes, values: Tensor, title: str, limit: float) -> None:
    style.heat(axes, values, title, limit)
    _whole_ticks(axes)


def _show_indices(axes: Axes, indices: Tensor, title: str) -> None:
    axes.imshow(indices.numpy(), cmap=style.SEQUENTIAL, vmin=0, vmax=15, aspect="auto", interpolation="nearest")
    axes.set_title(title)
    axes.grid(False)
    _whole_ticks(axes)


def _whole_ticks(axes: Axes) -> None:
    """Rows and columns are counted, there is no row 2.5."""
    axes.locator_params(integer=True)


def _rms(error: Tensor) -> float:
    return float(error.double().square().mean().sqrt())
