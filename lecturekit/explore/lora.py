"""Figures of lab 5: what a low rank can hold, with the rank under a slider, and what the student's own code did."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from lecturekit.checking.limits import TimeUp, time_limit
from lecturekit.explore import style

if TYPE_CHECKING:
    from matplotlib.figure import Figure

SIZE = 96
PATIENCE = 5  # seconds that a student's code may take before the picture is drawn without it
RANKS = (1, 2, 4, 8, 16, 48)


def landscape(size: int = SIZE) -> np.ndarray:
    """A grey picture drawn with arithmetic: sky, sun, hills, a house and a fence. (size, size), values in 0 … 1.

    It has something for every rank: the sky is nearly rank 1, the house a few rectangles, the round sun and the
    slanted hills need many.
    """
    if not isinstance(size, int) or size < 8:
        raise ValueError(f"size must be a whole number of at least 8, got {size!r}")
    y, x = np.mgrid[0:size, 0:size] / (size - 1)
    picture = 0.95 - 0.35 * y
    picture[(x - 0.76) ** 2 + (y - 0.2) ** 2 < 0.11**2] = 1.0
    picture[y > 0.52 + 0.09 * np.sin(7 * x + 0.6)] = 0.55
    picture[y > 0.66 + 0.06 * np.sin(5 * x + 2.5)] = 0.35
    house = (np.abs(x - 0.3) < 0.14) & (np.abs(y - 0.68) < 0.14)
    picture[house] = 0.8
    picture[(y > 0.36) & (y < 0.54) & (np.abs(x - 0.3) < 0.95 * (y - 0.36))] = 0.15
    picture[(np.abs(x - 0.24) < 0.03) & (np.abs(y - 0.66) < 0.04)] = 0.1
    picture[(np.abs(x - 0.36) < 0.035) & (y > 0.64) & (y < 0.82)] = 0.2
    fence = (y > 0.86) & (y < 0.96) & ((np.mod(x, 0.08) < 0.03) | (np.abs(y - 0.91) < 0.012))
    picture[fence] = 0.9
    return picture


def factors(matrix: np.ndarray, rank: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The best factors of a given rank: B (out, rank), A (rank, in), and all singular values of the matrix.

    No other pair of that rank comes closer to the matrix in the sum of squares (Eckart and Young, 1936). The singular
    values are split evenly between B and A. Raises ValueError unless 1 <= rank <= min(out, in).
    """
    largest = min(matrix.shape)
    if isinstance(rank, bool) or not isinstance(rank, (int, np.integer)) or not 1 <= rank <= largest:
        raise ValueError(f"rank must be a whole number from 1 to {largest}, got {rank!r}")
    left, values, right = np.linalg.svd(matrix, full_matrices=False)
    root = np.sqrt(values[:rank])
    return left[:, :rank] * root, root[:, None] * right[:rank], values


def describe(rank: int, size: int = SIZE) -> dict[str, float]:
    """The numbers of the figure: parameters of the factors and of the matrix, and the relative error that is left."""
    picture = landscape(size)
    B, A, values = factors(picture, rank)
    return {
        "rank": rank,
        "factors": B.size + A.size,
        "matrix": picture.size,
        "error": float(np.sqrt((values[rank:] ** 2).sum() / (values**2).sum())),
    }


def rank_figure(rank: int, size: int = SIZE) -> Figure:
    """The picture, its two factors' product B A at this rank, what is missing, and the singular values."""
    picture = landscape(size)
    B, A, values = factors(picture, rank)
    rebuilt = B @ A
    facts = describe(rank, size)
    fig, (whole, product, missing, curve) = style.figure(1, 4, width=3.3, height=3.5)
    whole.imshow(picture, cmap="gray", vmin=0, vmax=1)
    whole.set_title(f"the matrix\n{size} × {size} = {facts['matrix']:,} numbers")
    product.imshow(rebuilt, cmap="gray", vmin=0, vmax=1)
    product.set_title(f"B·A at rank {rank}\n{rank} × ({size} + {size}) = {facts['factors']:,} numbers")
    missing.imshow(picture - rebuilt, cmap=style.DIVERGING, vmin=-0.5, vmax=0.5)
    missing.set_title(f"what is missing\n{facts['error']:.1%} of the norm")
    for axes in (whole, product, missing):
        _bare(axes)
    steps = np.arange(1, len(values) + 1)
    curve.semilogy(steps, values, color=style.GREY, linewidth=1.5)
    curve.semilogy(steps[:rank], values[:rank], "o", color=style.BLUE, markersize=5, label="kept")
    curve.set_ylim(values[0] * 1e-4, values[0] * 2)
    curve.set_title("singular values")
    curve.set_xlabel("number")
    curve.legend(loc="upper right")
    return fig


def rank_picture(rank: int) -> style.Picture:
    """`rank_figure` with the text a screen reader reads."""
    facts = describe(rank)
    saving = facts["factors"] / facts["matrix"]
    return style.alt(
        rank_figure(rank),
        f"A drawn landscape with a house, a sun and a fence, rebuilt from two thin matrices of rank {rank}. "
        f"The factors hold {facts['factors']:,} numbers, {saving:.0%} of the {facts['matrix']:,} in the picture; "
        f"{facts['error']:.1%} of its norm is missing. The singular values fall steeply at first, then slowly.",
    )


def rank_strip(ranks: tuple[int, ...] = RANKS) -> style.Picture:
    """The static twin of the slider: the picture at several ranks side by side, for print and for reading only."""
    picture = landscape()
    fig, panels = style.figure(1, len(ranks), width=2.15, height=3.2)
    told = []
    for axes, rank in zip(panels, ranks, strict=True):
        B, A, _ = factors(picture, rank)
        facts = describe(rank)
        axes.imshow(B @ A, cmap="gray", vmin=0, vmax=1)
        axes.set_title(f"rank {rank}\n{facts['factors']:,} numbers\n{facts['error']:.1%} missing")
        _bare(axes)
        told.append(f"rank {rank} leaves {facts['error']:.1%}")
    return style.alt(
        fig,
        "The same landscape rebuilt at rising rank, from crossing stripes to a sharp picture. Missing part of "
        f"the norm: {'; '.join(told)}. At rank {SIZE // 2} the two factors hold as many numbers as the matrix itself.",
    )


def rank_slider(start: int = 4) -> Any:
    """The figure under a slider. Tab to it, then the arrow keys change the rank; works with ipywidgets 7 and 8.

    Returns the widget (its children are the slider and the drawing), to be left as the last line of a cell. The drawing
    is an HTML widget with an <img alt="…">, so nothing but ipywidgets is needed and a screen reader reads each change.
    """
    import ipywidgets as widgets

    slider = widgets.IntSlider(
        value=start,
        min=1,
        max=SIZE // 2,
        description="rank r",
        continuous_update=False,
        layout=widgets.Layout(width="min(32em, 95%)"),
    )
    return style.moving(rank_picture, slider)


def merge_picture(candidate: Callable[..., Any]) -> style.Picture:
    """What a student's merge did to one small layer: W, the branch, the answer, and the answer minus the truth.

    Drawn whatever the answer is: an answer that raises, or is no matrix of the right shape, is put in words.
    """
    generator = torch.Generator().manual_seed(5)
    out, inp, r, alpha = 24, 32, 2, 6.0
    rows, columns = torch.arange(out).unsqueeze(1), torch.arange(inp).unsqueeze(0)
    weight = torch.sin(rows / 4) * torch.cos(columns / 5) + 0.2 * torch.randn(out, inp, generator=generator)
    A = torch.stack([torch.sin(columns[0] / 3), (columns[0] > inp // 2).float()])  # (r, in)
    B = torch.stack([(rows[:, 0] < out // 2).float(), torch.cos(rows[:, 0] / 3)], dim=1)  # (out, r)
    B = B / 4
    branch = alpha / r * (B @ A)
    truth = weight + branch
    answer, trouble = _attempt(lambda: candidate(weight.clone(), A.clone(), B.clone(), alpha), truth.shape)

    fig, panels = style.figure(1, 4, width=3.3, height=3.2)
    limit = float(truth.abs().max())
    style.heat(panels[0], weight, f"W, {out} × {inp}", limit)
    style.heat(panels[1], branch, f"(α / r)·B·A, rank {r}", limit)
    if answer is None:
        style.say(panels[2], f"your merge\n{trouble}")
        style.say(panels[3], "nothing to compare")
        seen = f"Your merge gave no matrix to draw: {trouble}."
    else:
        error = answer - truth
        largest = float(error.abs().nan_to_num(nan=torch.inf).max())
        # six roundings of float32 at the size of these numbers; anything larger is a difference in the formula
        right = largest < 6 * torch.finfo(torch.float32).eps * limit
        style.heat(panels[2], answer, "your W′", limit)
        style.heat(panels[3], error, f"your W′ minus the truth\nlargest {largest:.2g}", limit)
        seen = "The difference is blank: W′ is right." if right else f"The difference shows: up to {largest:.2g}."
    return style.alt(
        fig, f"Four heat maps: the weight W, the rank-{r} branch, your merged W′, and W′ minus the truth. {seen}"
    )


def layer_picture(layer_class: Callable[..., Any], steps: int = 150) -> style.Picture:
    """What a student's LoRALinear learns: a small layer is to become another that differs from it by a rank-2 matrix.

    Shows the branch before training (blank if B starts at zero), after it, what it should be, and the loss.
    """
    out, inp, r, alpha = 24, 32, 2, 4.0
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        base = nn.Linear(inp, out)
        delta = torch.outer(torch.sin(torch.arange(out) / 3), torch.cos(torch.arange(inp) / 4))
        delta += torch.outer((torch.arange(out) > 15).float(), (torch.arange(inp) < 10).float())
        x = torch.randn(256, inp)
        target = base(x).detach() + x @ delta.T
        base.requires_grad_(False)

        def learn() -> tuple[Tensor, Tensor, Tensor]:
            layer = layer_class(base, r, alpha)
            start = _branch(layer, base, inp)
            optimizer = torch.optim.Adam([p for p in layer.parameters() if p.requires_grad], lr=0.05)
            losses = []
            for _ in range(steps):
                loss = (layer(x) - target).square().mean()
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                losses.append(loss.detach())
            return start, _branch(layer, base, inp), torch.stack(losses)

        with torch.enable_grad():
            learnt, trouble = _attempt(learn)

    fig, panels = style.figure(1, 4, width=3.3, height=3.2)
    if learnt is None:
        style.say(panels[0], f"your LoRALinear\n{trouble}")
        style.say(panels[1], "nothing to draw yet")
        style.say(panels[3], "no loss to draw")
        seen = f"Your LoRALinear could not be trained: {trouble}."
    else:
        start, end, losses = learnt
        style.heat(panels[0], start, "your branch at the start", 2)
        style.heat(panels[1], end, f"your branch after {steps} steps", 2)
        panels[3].semilogy(np.arange(1, steps + 1), losses.clamp(min=1e-12))
        panels[3].set_title("loss")
        panels[3].set_xlabel("step")
        blank = bool((start == 0).all())
        seen = (
            f"The branch starts {'at zero' if blank else 'away from zero'}; the loss goes from {float(losses[0]):.2g} "
            f"to {float(losses[-1]):.2g}."
        )
    style.heat(panels[2], delta, "what it should become", 2)
    return style.alt(fig, f"Heat maps of your layer's branch before and after training, its goal, and the loss. {seen}")


def _branch(layer: Any, base: nn.Linear, inp: int) -> Tensor:
    """The matrix that the branch amounts to, read off the layer's outputs for the unit vectors. (out, in)"""
    with torch.no_grad():
        unit = torch.eye(inp)
        return (layer(unit) - base(unit)).T.clone()


def _attempt(answer: Callable[[], Any], shape: torch.Size | None = None) -> tuple[Any, str]:
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
    if shape is None:
        return result, ""
    if not isinstance(result, Tensor):
        return None, f"returned {type(result).__name__}, not a tensor"
    if result.shape != shape:
        return None, f"returned shape {tuple(result.shape)}, not {tuple(shape)}"
    if not result.is_floating_point():
        return None, f"returned {str(result.dtype).removeprefix('torch.')} numbers"
    return result.detach().float(), ""


def _bare(axes: Any) -> None:
    """No ticks, grid or frame: the panel is a picture, not a plot."""
    axes.set_xticks([])
    axes.set_yticks([])
    axes.grid(False)
    axes.spines[:].set_visible(False)
