"""Figures of lab 7: the error of one sign and one scale, with the scale under a slider; what the student's code did."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from lecturekit.checking.limits import TimeUp, time_limit
from lecturekit.explore import style

if TYPE_CHECKING:
    from matplotlib.figure import Figure

PATIENCE = 5  # seconds that a student's code may take before the picture is drawn without it
SHAPES = ("all the same size", "uniform", "bell curve", "many small, few large")
WEIGHTS = 4000  # drawn ones; few enough to draw at once, enough for a smooth histogram


def changes(shape: str) -> np.ndarray:
    """WEIGHTS entries of an invented Delta of root mean square 1, symmetric around zero, the same on every call.

    shape: one of SHAPES. The quantiles of the distribution, so that no draw blurs the figures: two spikes, a uniform
    one, a Gaussian one and a Laplace one. Raises ValueError for another shape.
    """
    if shape not in SHAPES:
        raise ValueError(f"shape must be one of {', '.join(SHAPES)}, got {shape!r}")
    quantiles = (np.arange(WEIGHTS // 2) + 0.5) / (WEIGHTS // 2)  # of |Delta|
    if shape == "all the same size":
        size = np.ones(WEIGHTS // 2)
    elif shape == "uniform":
        size = quantiles
    elif shape == "bell curve":
        size = torch.special.ndtri(torch.from_numpy((1 + quantiles) / 2)).numpy()
    else:
        size = -np.log1p(-quantiles)
    size = size / np.sqrt((size**2).mean())
    return np.concatenate([size, -size])


def error(delta: np.ndarray, alpha: float) -> float:
    """The share of ‖Δ‖² that alpha times the signs leave: ‖Δ − α Sign(Δ)‖² ÷ ‖Δ‖², Sign(0) = −1."""
    return float(((delta - alpha * np.where(delta > 0, 1, -1)) ** 2).sum() / (delta**2).sum())


def alpha_figure(alpha: float, shape: str) -> Figure:
    """How large the changes are, the two steps ±α that replace them, and the error over all α."""
    delta = changes(shape)
    fig, (bars, curve) = style.figure(1, 2, width=5.4, height=3.6)
    bars.hist(delta, bins=np.linspace(-3.5, 3.5, 71), color=style.SKY)
    bars.axvline(alpha, color=style.VERMILION)
    bars.axvline(-alpha, color=style.VERMILION, label="±α")
    bars.set(xlabel="Δ, in units of its root mean square", ylabel="weights", title="what fine-tuning changed")
    bars.legend(loc="upper right")
    _error_curve(curve, shape, style.BLUE)
    curve.plot(alpha, error(delta, alpha), "o", color=style.VERMILION, markersize=10)
    curve.set(xlabel="α", ylabel="left of ‖Δ‖²", ylim=(0, 1.6), title=f"error {error(delta, alpha):.0%}")
    return fig


def _error_curve(axes: Any, shape: str, colour: str, **options: Any) -> None:
    delta = changes(shape)
    grid = np.linspace(0, 2.2, 111)
    axes.plot(grid, [error(delta, alpha) for alpha in grid], color=colour, **options)


def alpha_picture(alpha: float, shape: str) -> style.Picture:
    """`alpha_figure` with the text a screen reader reads. It does not tell where the minimum is: that is to find."""
    return style.alt(
        alpha_figure(alpha, shape),
        f"Left, a histogram of the changes of the weights ({shape}) with the two steps plus and minus α = {alpha:.2f} "
        "that replace them. Right, the share of the squared norm that is left, over α: a parabola that starts at 1. "
        f"At this α it is {error(changes(shape), alpha):.1%}.",
    )


def alpha_slider(start: float = 0.4, shape: str = "bell curve") -> Any:
    """The figure with α under a slider and the shape of Δ in a list. Keyboards reach both; ipywidgets 7 and 8."""
    import ipywidgets as widgets

    slider = widgets.FloatSlider(
        value=start,
        min=0.0,
        max=2.2,
        step=0.02,
        description="scale α",
        continuous_update=False,
        layout=widgets.Layout(width="min(32em, 95%)"),
    )
    shapes = widgets.Dropdown(options=list(SHAPES), value=shape, description="shape of Δ")
    return style.moving(alpha_picture, slider, shapes)


def alpha_strip() -> style.Picture:
    """The static twin: the error over α for every shape, the minimum marked."""
    fig, (axes,) = style.figure(width=8.6, height=3.6)
    told = []
    for shape, colour in zip(SHAPES, style.CYCLE, strict=False):
        delta = changes(shape)
        best = float(np.abs(delta).mean())
        _error_curve(axes, shape, colour, label=shape)
        axes.plot(best, error(delta, best), "o", color=colour)
        told.append(f"{shape}: lowest at α = {best:.2f} with {error(delta, best):.0%} left")
    axes.set(xlabel="α, in units of Δ's root mean square", ylabel="left of ‖Δ‖²", ylim=(-0.04, 1.3))
    axes.set_title("error of one sign and one scale")
    axes.legend(loc="center left", bbox_to_anchor=(1, 0.5))
    return style.alt(fig, f"The error over α is a parabola for each shape of Δ. {'; '.join(told)}.")


def _small_pair() -> tuple[Tensor, Tensor]:
    """A base weight and its fine-tune, (16, 24): structure with a mean of its own, so that mistakes look different."""
    rows, columns = torch.arange(16.0).unsqueeze(1), torch.arange(24.0).unsqueeze(0)
    generator = torch.Generator().manual_seed(7)
    base = torch.sin(columns / 2.5) * torch.cos(rows / 3)
    delta = 0.3 * torch.sin(rows / 2 + columns / 3) + 0.1 * torch.randn(16, 24, generator=generator) + 0.05
    return base, base + delta


def compress_picture(candidate: Callable[..., Any]) -> style.Picture:
    """What a student's compress made of a small layer: Δ, its scale times its signs, and what is missing to Δ.

    Drawn whatever the answer is: one that raises, or is no such pair, is put in words.
    """
    base, fine = _small_pair()
    delta = fine - base

    def rebuilt() -> Tensor:
        signs, scale = candidate(base.clone(), fine.clone())
        return torch.as_tensor(scale).detach().float() * torch.as_tensor(signs).detach().float()

    answer, trouble = _attempt(rebuilt, delta.shape)
    fig, panels = style.figure(1, 4, width=3.3, height=3.2)
    limit = float(delta.abs().max())
    style.heat(panels[0], base, "W base")
    style.heat(panels[1], delta, "Δ = W fine − W base", limit)
    if answer is None:
        style.say(panels[2], f"your compress\n{trouble}")
        style.say(panels[3], "nothing to compare")
        seen = f"Your compress gave nothing to draw: {trouble}."
    else:
        missing = delta - answer
        left = float(missing.square().sum() / delta.square().sum())
        least = error(delta.numpy(), float(delta.abs().mean()))
        style.heat(panels[2], answer, "your scale × signs", limit)
        style.heat(panels[3], missing, f"what is missing\n{left:.1%} of ‖Δ‖²", limit)
        # an eighth of a percent is far above float32's roundings and below what any other scale in use would cost
        right = "no scale times signs leaves less" if left < least + 0.00125 else f"{least:.1%} would be possible"
        seen = f"Missing are {left:.1%} of the squared norm of Δ; {right}."
    for axes in panels:
        axes.set_xticks([])
        axes.set_yticks([])
    return style.alt(
        fig, f"Four heat maps: a base weight, the change Δ, your scale times your signs, and their difference. {seen}"
    )


def bit_picture(height: int = 37, width: int = 45) -> np.ndarray:
    """A house under a sun, in black and white: True is +1. Rows of 45 do not end where bytes end, and 37 × 45 = 1665
    signs leave the last byte with one of its eight bits in use."""
    y, x = np.mgrid[0:height, 0:width].astype(float)
    y, x = y / (height - 1), x / (width - 1)
    house = (np.abs(x - 0.36) < 0.2) & (y > 0.5) & (y < 0.92)
    house &= ~((np.abs(x - 0.28) < 0.06) & (np.abs(y - 0.66) < 0.07))
    house &= ~((np.abs(x - 0.45) < 0.05) & (y > 0.68))
    roof = (y > 0.24) & (y <= 0.5) & (np.abs(x - 0.36) < 1.1 * (y - 0.24))
    sun = (x - 0.8) ** 2 + (y - 0.2) ** 2 < 0.012
    return house | roof | sun | (y >= 0.92)


def pack_picture(candidate: Callable[..., Any]) -> style.Picture:
    """A black-and-white picture through a student's pack_signs: read back from the bytes, beside the original.

    Drawn whatever the answer is. Bits in another order show as strips of eight that are turned round.
    """
    original = bit_picture()
    signs = torch.from_numpy(np.where(original, 1, -1).astype(np.int8))
    wanted = math.ceil(original.size / 8)

    def read_back() -> tuple[np.ndarray, int]:
        packed = candidate(signs.clone())
        if not isinstance(packed, Tensor):
            raise _Odd(f"returned {type(packed).__name__}, not a tensor")
        if packed.dtype != torch.uint8:
            raise _Odd(f"returned {str(packed.dtype).removeprefix('torch.')}, not uint8")
        held = packed.detach().cpu().reshape(-1)
        bits = (held[:, None] >> torch.arange(8, dtype=torch.uint8)) & 1  # lowest bit first
        back = torch.full((original.size,), 0.5)  # grey where there are no bytes
        count = min(original.size, bits.numel())
        back[:count] = bits.reshape(-1)[:count].float()
        return back.numpy().reshape(original.shape), held.numel()

    answer, trouble = _attempt(read_back)
    fig, panels = style.figure(1, 3, width=3.6, height=3.9)
    panels[0].imshow(original, cmap="gray_r", vmin=0, vmax=1)
    panels[0].set_title(f"{original.size:,} signs\n{original.size:,} bytes as int8")
    if answer is None:
        style.say(panels[1], f"your pack_signs\n{trouble}")
        style.say(panels[2], "nothing to compare")
        seen = f"Your pack_signs gave nothing to draw: {trouble}."
    else:
        back, count = answer
        wrong = back != original
        panels[1].imshow(back, cmap="gray_r", vmin=0, vmax=1)
        panels[1].set_title(f"read back from\nyour {count:,} bytes")
        panels[2].imshow(wrong, cmap="gray_r", vmin=0, vmax=1)
        panels[2].set_title(f"wrong bits\n{int(wrong.sum()):,}")
        same = "the picture came back whole" if not wrong.any() else f"{int(wrong.sum()):,} bits are wrong"
        length = "" if count == wanted else f" {wanted:,} bytes would do."
        seen = f"From your {count:,} bytes {same}.{length}"
    for axes in panels if answer else panels[:1]:
        axes.set_xticks([])
        axes.set_yticks([])
        axes.grid(False)
        axes.spines[:].set_visible(True)
    return style.alt(fig, f"A house in black and white, the same read back from your bytes, and the wrong bits. {seen}")


def product_picture(candidate: Callable[..., Any]) -> style.Picture:
    """What each row's delta adds in a student's delta_product: four rows, three fine-tunes, rows 0 and 2 the same one.

    Drawn whatever the answer is: one that raises, or gives another shape, is put in words.
    """
    generator = torch.Generator().manual_seed(11)
    out, inp, rows = 16, 24, torch.tensor([2, 0, 2, 1])
    x = torch.randn(4, inp, generator=generator)
    weight = torch.randn(out, inp, generator=generator)
    packed = torch.randint(256, (3, out * inp // 8), generator=generator, dtype=torch.uint8)
    scales = torch.tensor([0.5, 1.0, 0.25])
    adds = torch.stack([scales[one] * (_signs(packed[one], out, inp) @ row) for one, row in zip(rows, x, strict=True)])
    answer, trouble = _attempt(
        lambda: candidate(x.clone(), weight.clone(), packed.clone(), scales.clone(), rows.clone()), adds.shape
    )
    names = [f"row {row}: model {which}" for row, which in enumerate(rows.tolist())]
    fig, panels = style.figure(1, 3, width=4.4, height=2.9)
    limit = float(adds.abs().max())
    style.heat(panels[0], adds, "what each row's own delta adds", limit)
    if answer is None:
        style.say(panels[1], f"your delta_product\n{trouble}")
        style.say(panels[2], "nothing to compare")
        seen = f"Your delta_product gave nothing to draw: {trouble}."
    else:
        found = answer - x @ weight.T
        off = (found - adds).abs().amax(1).nan_to_num(nan=torch.inf)
        # 24 products of order 1 rounded at 6e-8 in two orders; a thousandth is far above, and far below any mistake
        bad = [str(row) for row, size in enumerate(off.tolist()) if size > 1e-3]
        style.heat(panels[1], found, "your y − W x", limit)
        style.heat(panels[2], found - adds, f"difference, largest {float(off.max()):.2g}", limit)
        seen = f"Wrong rows: {', '.join(bad)}." if bad else "All four rows have their own delta."
    for axes in panels if answer is not None else panels[:1]:
        axes.set_yticks(range(4), names if axes is panels[0] else [""] * 4)
    return style.alt(
        fig,
        "Heat maps of what the deltas add to four rows of one batch: the truth, yours, the difference. Rows 0 and 2 "
        f"belong to the same fine-tune. {seen}",
    )


def _signs(held: Tensor, out: int, inp: int) -> Tensor:
    """The signs in these bytes, lowest bit first, as float32 (out, in)."""
    return ((held[:, None] >> torch.arange(8, dtype=torch.uint8)) & 1).view(out, inp) * 2.0 - 1


def distill_picture(candidate: Callable[..., Any]) -> style.Picture:
    """A student's distill_loss over one scale: the logits equal the fine-tune's at scale 1, but not on the padding.

    The padding's logits are such that a loss which counts them is lowest elsewhere. Drawn whatever the answer is.
    """
    generator = torch.Generator().manual_seed(3)
    target = torch.randn(2, 6, 12, generator=generator)
    mask = torch.tensor([[True] * 6, [True] * 2 + [False] * 4])
    direction = torch.randn(2, 6, 12, generator=generator)
    start = target - direction  # at scale 1 a real token has the fine-tune's logits
    start[~mask] += 0.7 * direction[~mask]  # padding would have them at 0.3
    grid = torch.linspace(0, 2, 41)

    def curve() -> tuple[Tensor, float]:
        losses = [_number(candidate((start + scale * direction), target.clone(), mask.clone())) for scale in grid]
        scale = torch.tensor(0.5, requires_grad=True)
        with torch.enable_grad():
            loss = candidate(start + scale * direction, target.clone(), mask.clone())
            (slope,) = torch.autograd.grad(loss, scale)
        return torch.tensor(losses), float(slope)

    length = float(direction[mask].square().sum(1).mean())
    truth = length * (grid - 1).square()
    answer, trouble = _attempt(curve)
    fig, (axes,) = style.figure(width=6.4, height=3.5)
    axes.plot(grid, truth, color=style.BLACK, linestyle="--", linewidth=1.5, zorder=3, label="the slide's loss")
    axes.set(xlabel="scale", ylabel="loss", title="logits that equal the fine-tune's at scale 1")
    if answer is None:
        axes.text(0.5, 0.5, f"your distill_loss\n{trouble}", ha="center", transform=axes.transAxes)
        seen = f"Your distill_loss gave nothing to draw: {trouble}."
    else:
        losses, slope = answer
        best = float(grid[losses.nan_to_num(nan=torch.inf).argmin()])
        axes.plot(grid, losses, color=style.BLUE, label="yours")
        axes.plot(
            0.5, losses[10], "o", zorder=4, color=style.VERMILION, label=f"slope here {slope:.3g}, right {-length:.3g}"
        )
        # two sums of some hundred squares in float32: a ten-thousandth is far above their roundings
        right = torch.allclose(losses, truth, rtol=1e-4, atol=1e-4 * length) and abs(slope + length) < 1e-4 * length
        seen = f"Yours is lowest at {best:.2f}; " + ("it is the slide's loss." if right else "it differs from it.")
    axes.legend(loc="upper center")
    return style.alt(fig, f"The loss over one scale; the slide's is a parabola with its lowest point at 1. {seen}")


def _number(loss: Any) -> float:
    if not isinstance(loss, Tensor) or loss.numel() != 1:
        raise _Odd(f"returned {type(loss).__name__}, not a tensor with one number")
    return float(loss.detach())


def size_picture(
    candidate: Callable[..., Any], models: dict[str, tuple[dict[str, Any], float, float]]
) -> style.Picture:
    """A student's model_bytes beside the figures that the paper prints.

    models: name → (configuration, the model's size as printed, the delta's as printed). The model's bars are in
    10⁹ bytes, the delta's in 2³⁰ bytes, the units in which the paper's figures come out.
    """
    answer, trouble = _attempt(
        lambda: [tuple(float(part) for part in candidate(dict(config))) for config, _, _ in models.values()]
    )
    if answer is not None and any(len(pair) != 2 for pair in answer):
        answer, trouble = None, "returned no pairs (base, delta)"
    fig, panels = style.figure(1, 2, width=5.6, height=3.5)
    told = []
    for axes, place, unit, title in (
        (panels[0], 0, 1e9, "the model, 10⁹ bytes"),
        (panels[1], 1, 2**30, "one fine-tune, 2³⁰ bytes"),
    ):
        if answer is None:
            style.say(axes, f"your model_bytes\n{trouble}")
            continue
        printed = [row[1 + place] for row in models.values()]
        mine = [pair[place] / unit for pair in answer]
        spots = np.arange(len(models))
        drawn = axes.bar(spots, mine, 0.6, color=style.BLUE, label="yours")
        axes.bar_label(drawn, [f"{value:.2f}" for value in mine], padding=8, fontsize=11)
        axes.plot(spots, printed, "_", color=style.VERMILION, markersize=34, markeredgewidth=3, label="the paper")
        axes.set_xticks(spots, [name.replace(" ", "\n", 1) for name in models])
        axes.set(title=title, ylim=(0, 1.25 * max(*mine, *printed)))
        axes.legend(loc="upper left")
        told += [
            f"{name} {value:.2f} (the paper: {wanted:.2f})"
            for name, value, wanted in zip(models, mine, printed, strict=True)
        ]
    seen = f"Your model_bytes gave nothing to draw: {trouble}." if answer is None else f"Yours: {'; '.join(told)}."
    return style.alt(fig, f"Bars of the bytes of four models and of one compressed fine-tune of each. {seen}")


def serving_gigabytes(parameters: float, models: int, bits: float) -> tuple[float, float]:
    """Memory (GB) of `models` fine-tunes: each whole at 16 bits, and one base plus `bits` a weight for each.

    parameters: how many weights one model has. The slide's params × models × 16 bit and params × (models × 1 bit +
    16 bit). Raises ValueError for fewer than one model.
    """
    if isinstance(models, bool) or not isinstance(models, int) or models < 1:
        raise ValueError(f"models must be a whole number of at least 1, got {models!r}")
    return parameters * models * 16 / 8e9, parameters * (models * bits + 16) / 8e9


def serving_picture(models: int, bits: int, parameters: float = 6.74e9) -> style.Picture:
    """The slide's two formulas for a model of this size, over the number of fine-tunes, with one number marked."""
    fig, (axes,) = style.figure(width=7.2, height=3.8)
    counts = np.arange(1, 97)
    pairs = [serving_gigabytes(parameters, int(count), bits) for count in counts]
    whole, shared = serving_gigabytes(parameters, models, bits)
    plural = "1 bit" if bits == 1 else f"{bits} bits"
    axes.plot(counts, [pair[0] for pair in pairs], color=style.GREY, label="every model whole, 16 bits a weight")
    axes.plot(counts, [pair[1] for pair in pairs], color=style.BLUE, label=f"one base, {plural} a weight each")
    axes.axhline(80, color=style.BLACK, linestyle="--", linewidth=1.5, label="80 GB")
    for value, colour in ((whole, style.GREY), (shared, style.BLUE)):
        axes.plot(models, value, "o", color=colour)
        white = {"facecolor": "white", "edgecolor": "none", "pad": 1}  # below the curve, and over the line of 80 GB
        axes.annotate(f"{value:,.0f} GB", (models, value), textcoords="offset points", xytext=(8, -16), bbox=white)
    axes.set(xlabel="fine-tunes served together", ylabel="GB", yscale="log", xlim=(-3, 112), ylim=(10, 4000))
    axes.set_yticks([10, 30, 100, 300, 1000], ["10", "30", "100", "300", "1,000"])
    axes.set_title(f"{parameters / 1e9:.2f} billion weights")
    axes.legend(loc="upper left", ncols=1)
    return style.alt(
        fig,
        f"Memory over the number of fine-tunes of a model of {parameters / 1e9:.2f} billion weights. {models} of them "
        f"take {whole:,.0f} GB whole, and {shared:,.0f} GB as one base with {plural} a weight for each. "
        f"Into 80 GB go {int(80 // serving_gigabytes(parameters, 1, bits)[0])} whole ones, or one base and "
        f"{int((80 - parameters * 2 / 1e9) // (parameters * bits / 8e9))} deltas.",
    )


def serving_slider(models: int = 8) -> Any:
    """`serving_picture` with the number of fine-tunes and the bits a weight under sliders."""
    import ipywidgets as widgets

    wide = widgets.Layout(width="min(32em, 95%)")
    count = widgets.IntSlider(
        value=models, min=1, max=96, description="fine-tunes", continuous_update=False, layout=wide
    )
    bits = widgets.IntSlider(value=1, min=1, max=16, description="bits each", continuous_update=False, layout=wide)
    return style.moving(serving_picture, count, bits)


def tenants_selector(questions: Sequence[str], answers: dict[str, Sequence[str]]) -> Any:
    """A list of questions above the answers that every fine-tune gave in one batch; answers: name → one a question."""
    import ipywidgets as widgets

    if not questions or any(len(texts) != len(questions) for texts in answers.values()):
        raise ValueError("every fine-tune must have one answer a question, and there must be a question")
    chosen = widgets.Dropdown(
        options=[(text, number) for number, text in enumerate(questions)],
        value=0,
        description="question",
        layout=widgets.Layout(width="min(48em, 95%)"),
    )
    return style.moving(lambda number: tenants_picture(questions, answers, number), chosen)


def tenants_picture(questions: Sequence[str], answers: dict[str, Sequence[str]], number: int) -> style.Picture:
    """One question and what each fine-tune answered, as a picture of text with the same text for screen readers."""
    import textwrap

    lines = {name: textwrap.fill(" / ".join(texts[number].splitlines()), 92) for name, texts in answers.items()}
    heights = [1 + text.count("\n") for text in lines.values()]
    fig, (axes,) = style.figure(width=11, height=0.55 + 0.27 * (sum(heights) + len(heights)))
    axes.set_axis_off()
    axes.set_title(textwrap.shorten(questions[number], 100), loc="left")
    total, place = sum(heights) + len(heights), 0
    for (name, text), height, colour in zip(lines.items(), heights, style.CYCLE * len(lines), strict=False):
        at = 1 - (place + 0.5) / total
        axes.text(0, at, name, color=colour, weight="bold", va="top", transform=axes.transAxes)
        axes.text(0.15, at, text, va="top", transform=axes.transAxes, parse_math=False)
        place += height + 1
    told = "; ".join(f"{name}: {' '.join(texts[number].split())}" for name, texts in answers.items())
    return style.alt(fig, f"The question '{questions[number]}' and the answer of each fine-tune. {told}")


class _Odd(Exception):
    """An answer of the wrong kind; the message is what a student reads."""


def _attempt(answer: Callable[[], Any], shape: torch.Size | None = None) -> tuple[Any, str]:
    """Run a student's code and return (result, ""), or (None, what went wrong in words)."""
    try:
        with time_limit(PATIENCE):
            result = answer()
    except NotImplementedError:
        return None, "is not written yet"
    except TimeUp:
        return None, f"did not end within {PATIENCE} seconds"
    except _Odd as odd:
        return None, str(odd)
    except Exception as error:  # any fault of an answer belongs in the picture
        return None, f"raised {type(error).__name__}"
    if shape is None:
        return result, ""
    if not isinstance(result, Tensor):
        return None, f"returned {type(result).__name__}, not a tensor"
    if result.shape != shape:
        return None, f"returned shape {tuple(result.shape)}, not {tuple(shape)}"
    if not result.is_floating_point():
        return None, f"returned {str(result.dtype).removeprefix('torch.')} numbers"
    return result.detach().float(), ""
