"""Figures of lab 3: the DPO loss as a surface with both bracket placements, and what the student's own code did."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from lecturekit.checking.limits import TimeUp, time_limit
from lecturekit.explore import style

if TYPE_CHECKING:
    from matplotlib.figure import Figure

PATIENCE = 5  # seconds that a student's code may take before the picture is drawn without it
REACH = 30.0  # nats: how far the log-ratios of the surface go either way
BETAS = (0.02, 0.05, 0.1, 0.2, 0.5, 1.0)
PLACEMENTS = ("first slide", "example slide")


def surface(beta: float, placement: str, count: int = 61) -> tuple[np.ndarray, np.ndarray]:
    """The loss of one pair over its two log-ratios: (count,) positions on both axes, and (count, count) losses.

    Rows are rising log-ratios of the rejected answer, columns those of the chosen one, from -REACH to REACH.
    placement: "first slide" closes the sigmoid after the difference of the two, "example slide" after the chosen
    log-ratio already. Raises ValueError for another placement or beta <= 0.
    """
    if placement not in PLACEMENTS:
        raise ValueError(f"placement must be one of {', '.join(PLACEMENTS)}, got {placement!r}")
    if not beta > 0:
        raise ValueError(f"beta must be above 0, got {beta!r}")
    ratios = np.linspace(-REACH, REACH, count)
    chosen, rejected = np.meshgrid(ratios, ratios)
    if placement == "first slide":
        return ratios, np.logaddexp(0, -beta * (chosen - rejected))
    return ratios, np.logaddexp(0, -beta * chosen) + beta * rejected


def describe(beta: float) -> dict[str, float]:
    """The numbers of the figure: for a pair that is settled, and one ranked wrongly, the pull on the rejected answer.

    A pull is the derivative of the loss in the rejected log-ratio. Settled: chosen +20, rejected -20 nats.
    """
    facts = {}
    for name, chosen, rejected in (("settled", 20.0, -20.0), ("start", 0.0, 0.0), ("wrong", -20.0, 20.0)):
        facts[f"{name} first slide"] = float(beta / (1 + np.exp(beta * (chosen - rejected))))
        facts[f"{name} example slide"] = beta
    facts["lowest first slide"] = float(surface(beta, "first slide")[1].min())
    facts["lowest example slide"] = float(surface(beta, "example slide")[1].min())
    return facts


def surface_figure(beta: float) -> Figure:
    """Both surfaces side by side, with arrows down the slope and a mark where training starts."""
    fig, panels = style.figure(1, 2, width=5.2, height=4.4)
    shown = {placement: surface(beta, placement) for placement in PLACEMENTS}
    low, high = (choose(values[1].min() if choose is min else values[1].max() for values in shown.values())
                 for choose in (min, max))  # fmt: skip
    for axes, (placement, (ratios, losses)) in zip(panels, shown.items(), strict=True):
        levels = np.linspace(low, high, 22)
        filled = axes.contourf(ratios, ratios, losses, levels=levels, cmap=style.SEQUENTIAL)
        down, right = (-slope for slope in np.gradient(losses, ratios, ratios))
        every = slice(5, None, 10)
        axes.quiver(
            ratios[every], ratios[every], right[every, every], down[every, every],
            color="white", angles="xy", scale_units="xy", scale=beta / 8, width=0.006,
        )  # fmt: skip
        axes.plot(0, 0, "o", color=style.VERMILION, markeredgecolor="white", markersize=9)
        axes.set(xlabel="chosen log-ratio (nats)", ylabel="rejected log-ratio (nats)")
        formula = "log σ(β·c − β·r)" if placement == "first slide" else "[ log σ(β·c) − β·r ]"
        axes.set_title(f"{placement}: −{formula}\nlowest here {losses.min():.2f}")
        axes.grid(False)
    fig.colorbar(filled, ax=list(panels), label="loss", shrink=0.85, format="%.1f")
    return fig


def surface_picture(beta: float) -> style.Picture:
    """`surface_figure` with the text a screen reader reads."""
    facts = describe(beta)
    return style.alt(
        surface_figure(beta),
        f"Two maps of the loss at beta {beta:g} over the chosen and the rejected log-ratio. With the first slide's "
        "bracket the loss depends on their difference only and flattens once the pair is settled: there the rejected "
        f"answer is pushed with {facts['settled first slide']:.2g} a nat, at the start with "
        f"{facts['start first slide']:.2g}, and the loss stays above 0. With the example slide's bracket it is pushed "
        f"with {beta:g} everywhere, and the loss falls without end, here to {facts['lowest example slide']:.2f}.",
    )


def surface_strip(betas: tuple[float, ...] = (0.05, 0.1, 0.5)) -> style.Picture:
    """The static twin of the slider: the push on the rejected answer along the path of training, for several betas."""
    fig, panels = style.figure(1, 2, width=5.2, height=3.6)
    margins = np.linspace(-40, 80, 241)
    told = []
    for beta, colour in zip(betas, style.CYCLE, strict=False):
        panels[0].plot(margins, np.logaddexp(0, -beta * margins), color=colour, label=f"β = {beta:g}")
        # the example slide's loss where chosen and rejected move equally far apart
        panels[0].plot(
            margins, np.logaddexp(0, -beta * margins / 2) - beta * margins / 2, color=colour, linestyle=":", linewidth=2
        )
        panels[1].plot(margins, 1 / (1 + np.exp(beta * margins)), color=colour)
        panels[1].axhline(1, color=style.GREY, linestyle=":", linewidth=2)
        told.append(f"beta {beta:g}: {1 / (1 + np.exp(beta * 40)):.2g}")
    panels[0].set(xlabel="chosen − rejected log-ratio (nats)", title="loss (dotted: example slide)")
    panels[0].legend(loc="upper right")
    panels[1].set(xlabel="chosen − rejected log-ratio (nats)", title="push on the rejected answer, ÷ β", ylim=(0, 1.1))
    return style.alt(
        fig,
        "Left, the loss over the difference of the log-ratios: it flattens out above 0 with the first slide's bracket "
        "and falls below 0 without end, dotted, with the example slide's. Right, the push on the rejected answer "
        f"divided by beta: it fades as the pair is settled (at 40 nats {'; '.join(told)}); with the example slide's "
        "bracket, dotted, it stays 1.",
    )


def surface_slider(start: float = 0.1) -> Any:
    """The surfaces under a slider for beta. Tab to it, then the arrow keys; works with ipywidgets 7 and 8.

    Returns the widget (its children are the slider and the drawing), to be left as the last line of a cell.
    """
    import ipywidgets as widgets

    slider = widgets.SelectionSlider(
        value=start,
        options=[(f"{beta:g}", beta) for beta in BETAS],
        description="β",
        continuous_update=False,
        layout=widgets.Layout(width="min(32em, 95%)"),
    )
    return style.moving(surface_picture, slider)


# one prompt with five answers: what the reference says, and how people rate it
ANSWERS = ("a city in China", "a big city", "a city in Japan", "a brand of car", "does not exist")
REFERENCE = (0.30, 0.30, 0.15, 0.05, 0.20)
REWARDS = (2.0, 0.5, -1.0, -2.0, -1.5)


def optimum_picture(candidate: Callable[..., Any], betas: tuple[float, ...] = (10.0, 1.0, 0.2)) -> style.Picture:
    """What a student's optimal policy says to one prompt at a large, a middle and a small beta, beside the reference.

    Drawn whatever the answer is: one that raises, or is no tensor of the right shape, is put in words.
    """
    reference, rewards = torch.tensor([REFERENCE]), torch.tensor([REWARDS])
    fig, panels = style.figure(1, len(betas), width=4.4, height=3.6, sharex=True, sharey=True)
    places, seen = np.arange(len(ANSWERS)), []
    for axes, beta in zip(panels, betas, strict=True):
        tilted = reference[0].double().log() + rewards[0].double() / beta
        right = torch.softmax(tilted, 0)
        inputs = (reference.clone(), rewards.clone(), beta)
        given, trouble = _attempt(partial(_call, candidate, *inputs), (1, len(ANSWERS)))
        axes.set_title(f"β = {beta:g}")
        if given is None:
            style.say(axes, f"your policy\n{trouble}")
            seen.append(f"at beta {beta:g} it {trouble}")
            continue
        axes.barh(places - 0.2, REFERENCE, 0.38, color=style.GREY, label="reference")
        axes.barh(
            places + 0.2, given[0].double().nan_to_num().clamp(-1, 2).numpy(), 0.38, color=style.BLUE, label="yours"
        )
        axes.plot(right.numpy(), places + 0.2, "d", color=style.ORANGE, markeredgecolor="black", label="right")
        error = float((given[0].double() - right).abs().nan_to_num(nan=torch.inf).max())
        # a few roundings of float32; anything larger is a difference in the formula
        seen.append(f"at beta {beta:g} yours is {'right' if error < 1e-5 else f'off by up to {error:.2g}'}")
    panels[0].set_yticks(places, [f"{text}\nreward {r:g}" for text, r in zip(ANSWERS, REWARDS, strict=True)])
    panels[0].invert_yaxis()
    if panels[-1].get_legend_handles_labels()[0]:
        panels[-1].legend(loc="lower right")
    return style.alt(
        fig,
        "Probabilities of five answers to “Where is Shanghai?” under the reference and under your policy: "
        f"{'; '.join(seen)}. The smaller beta, the more the best-rewarded answer takes.",
    )


def loss_picture(candidate: Callable[..., Any], beta: float = 0.1) -> style.Picture:
    """A student's loss over the chosen log-ratio, then over the rejected one, beside the right curve."""
    ratios = torch.linspace(-60, 60, 61)
    zero = torch.zeros(1)

    def curve(which: int) -> Tensor:
        points = []
        for ratio in ratios:
            terms = [zero.clone() for _ in range(4)]
            terms[which] = ratio.view(1).clone()
            value = candidate(*terms, beta)
            points.append(torch.as_tensor(value, dtype=torch.float32).reshape(()).detach())
        return torch.stack(points)

    fig, panels = style.figure(1, 2, width=4.8, height=3.4, sharey=True)
    seen = []
    for axes, which, name in zip(panels, (0, 1), ("chosen", "rejected"), strict=True):
        right = torch.nn.functional.softplus((-1 if which == 0 else 1) * beta * ratios)
        given, trouble = _attempt(partial(curve, which), tuple(ratios.shape))
        if given is None:
            style.say(axes, f"your loss\n{trouble}")
            seen.append(f"over the {name} log-ratio it {trouble}")
            continue
        axes.plot(ratios.numpy(), right.numpy(), color=style.ORANGE, linewidth=6, alpha=0.6, label="right")
        axes.plot(ratios.numpy(), given.clamp(-20, 20).numpy(), color=style.BLUE, label="yours")
        axes.set(xlabel=f"{name} log-ratio (nats), the other 0", title=f"{name} answer")
        axes.legend(loc="upper center")
        error = float((given - right).abs().nan_to_num(nan=torch.inf).max())
        same = "follows the right curve" if error < 1e-4 else f"is off by up to {error:.2g}"
        seen.append(f"over the {name} log-ratio it {same}")
    return style.alt(fig, f"Your loss of one pair at beta {beta:g}: {'; '.join(seen)}.")


def logprob_strip(
    answers: Sequence[tuple[str, Sequence[str], Sequence[float], Sequence[float]]], lowest: float = -12.0
) -> style.Picture:
    """Log-probabilities of the tokens of some answers before and after training, token by token.

    answers: (title, tokens as text, log-probabilities before, after), the three lists equally long. Colours end at
    `lowest` nats. Raises ValueError for lists that differ in length or are empty.
    """
    for title, tokens, before, after in answers:
        if not len(tokens) == len(before) == len(after) or not tokens:
            raise ValueError(
                f"{title!r} must have as many tokens as log-probabilities before and after, "
                f"got {len(tokens)}, {len(before)} and {len(after)}"
            )
    if not answers:
        raise ValueError("answers must hold at least one answer, got none")
    widest = max(len(tokens) for _, tokens, _, _ in answers)
    fig, panels = style.figure(len(answers), 1, width=max(6.0, 0.95 * widest), height=1.9)
    told = []
    for axes, (title, tokens, before, after) in zip(panels, answers, strict=True):
        values = np.full((2, widest), np.nan)
        values[0, : len(tokens)], values[1, : len(tokens)] = before, after
        drawn = axes.imshow(values, cmap=style.SEQUENTIAL, vmin=lowest, vmax=0, aspect="auto")
        for line in range(2):
            for place in range(len(tokens)):
                dark = values[line, place] < lowest / 2
                axes.text(
                    place, line, f"{values[line, place]:.1f}", ha="center", va="center", fontsize=10,
                    color="white" if dark else "black",
                )  # fmt: skip
        axes.set_xticks(range(len(tokens)), [token.replace(" ", "·").replace("$", r"\$") for token in tokens])
        axes.set_yticks(range(2), [f"before, Σ {sum(before):.0f}", f"after, Σ {sum(after):.0f}"])
        axes.set_title(title, loc="left")
        axes.grid(False)
        axes.spines[:].set_visible(False)
        told.append(f"{title}: the sum goes from {sum(before):.1f} to {sum(after):.1f} nats")
    fig.colorbar(drawn, ax=list(panels), label="log-probability", shrink=0.9)
    return style.alt(fig, f"Token by token log-probabilities before and after training. {'; '.join(told)}.")


def _call(candidate: Callable[..., Any], *inputs: Any) -> Any:
    """candidate(*inputs): what a student left in the place of a function fails only here, inside `_attempt`."""
    return candidate(*inputs)


def _attempt(answer: Callable[[], Any], shape: tuple[int, ...]) -> tuple[Tensor | None, str]:
    """Run a student's code and return (tensor, ""), or (None, what went wrong in words)."""
    try:
        with time_limit(PATIENCE):
            result = answer()
    except NotImplementedError:
        return None, "is not written yet"
    except TimeUp:
        return None, f"did not end within {PATIENCE} seconds"
    except Exception as error:  # any fault of an answer belongs in the picture
        return None, f"raised {type(error).__name__}"
    if not isinstance(result, Tensor):
        return None, f"returned {type(result).__name__}, not a tensor"
    if tuple(result.shape) != shape:
        return None, f"returned shape {tuple(result.shape)}, not {shape}"
    if not result.is_floating_point():
        return None, f"returned {str(result.dtype).removeprefix('torch.')} numbers"
    return result.detach().float(), ""
