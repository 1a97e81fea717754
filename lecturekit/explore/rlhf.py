"""Figures of lab 2: the optimum under a KL penalty with β under a slider, what the student's code did, KL a token."""

from __future__ import annotations

import textwrap
from collections.abc import Callable, Mapping, Sequence
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
BETAS = (10.0, 1.0, 0.3, 0.05)

# An invented choice among six replies to "My parcel has not arrived": how likely the reference model is to give each,
# the reward model's opinion, and what a person thinks of it. The reward model has a favourite that no person likes.
REPLIES = (
    "Ok.",
    "Please wait.",
    "Sorry to hear that.",
    "I will check it for you.",
    "I check, and write by noon.",
    "SORRY!!! SORRY!!!",
)
REFERENCE = np.array([0.30, 0.34, 0.20, 0.11, 0.046, 0.004])
REWARD = np.array([-1.5, -0.8, 0.3, 1.1, 1.8, 2.8])
PEOPLE = np.array([-1.5, -0.8, 0.3, 1.1, 1.8, -2.5])


def optimum(beta: float) -> np.ndarray:
    """The policy that maximises E[r] − β KL(π ‖ π_ref) over the six replies: π*(y) = π_ref(y) exp(r(y) / β) / Z.

    Returns its six probabilities. Raises ValueError unless beta > 0. Ziegler et al. 2019; Rafailov et al. 2023, eq. 4.
    """
    if not beta > 0:
        raise ValueError(f"beta must be above 0, got {beta!r}")
    scores = np.log(REFERENCE) + REWARD / beta
    weights = np.exp(scores - scores.max())  # without the maximum, exp overflows for small beta
    return weights / weights.sum()


def facts(beta: float) -> dict[str, float]:
    """What the optimum earns: reward (the model's), people (what they think), kl in nats, and the objective."""
    policy = optimum(beta)
    inside = policy > 0
    kl = float((policy[inside] * np.log(policy[inside] / REFERENCE[inside])).sum())
    reward = float(policy @ REWARD)
    return {"beta": beta, "reward": reward, "people": float(policy @ PEOPLE), "kl": kl, "objective": reward - beta * kl}


def _frontier(axes: Any, betas: Sequence[float]) -> None:
    path = [facts(beta) for beta in np.geomspace(30, 0.02, 160)]
    axes.plot([p["kl"] for p in path], [p["reward"] for p in path], color=style.BLUE, label="reward model")
    axes.plot([p["kl"] for p in path], [p["people"] for p in path], "--", color=style.VERMILION, label="people")
    for beta in betas:
        here = facts(beta)
        axes.plot(here["kl"], here["reward"], "o", color=style.BLUE)
        axes.plot(here["kl"], here["people"], "s", color=style.VERMILION)
        if len(betas) > 1:
            axes.annotate(f"β {beta:g}", (here["kl"], here["reward"]), textcoords="offset points", xytext=(6, -14))
    axes.set(xlabel="KL(π* ‖ π_ref), nats", ylabel="expected reward", title="the frontier")
    axes.legend(loc="lower right")


def _bars(axes: Any, beta: float, words: bool = True) -> None:
    places = np.arange(len(REPLIES))
    axes.barh(places + 0.2, REFERENCE, 0.4, color=style.GREY, label="π_ref")
    axes.barh(places - 0.2, optimum(beta), 0.4, color=style.BLUE, label="π*")
    axes.set_yticks(places, [f"{text}  (r {r:+.1f})" for text, r in zip(REPLIES, REWARD, strict=True)] if words else [])
    axes.set(xlim=(0, 1), xlabel="probability", title=f"β = {beta:.3g}")


def beta_figure(beta: float) -> Figure:
    """The six replies under π_ref and π*, and where this β lies on the frontier of reward against KL."""
    fig, (bars, curve) = style.figure(1, 2, width=5.2, height=3.7, width_ratios=[1.25, 1])
    _bars(bars, beta)
    bars.legend(loc="lower right")
    _frontier(curve, [beta])
    return fig


def beta_picture(beta: float) -> style.Picture:
    """`beta_figure` with the text a screen reader reads."""
    here, policy = facts(beta), optimum(beta)
    return style.alt(
        beta_figure(beta),
        f"Six replies with their probability under the reference and under the optimum for β = {beta:.3g}, and the "
        f"frontier of reward against KL. The optimum's most likely reply is '{REPLIES[int(policy.argmax())]}' with "
        f"{policy.max():.0%}. It is {here['kl']:.2f} nats from the reference and earns {here['reward']:.2f} from the "
        f"reward model; people give it {here['people']:.2f}.",
    )


def beta_strip(betas: Sequence[float] = BETAS) -> style.Picture:
    """The static twin of the slider: the optimum at several β side by side, and all of them on the frontier."""
    fig, panels = style.figure(1, len(betas) + 1, width=2.75, height=3.6, width_ratios=[1.15] * len(betas) + [1.5])
    for at, (axes, beta) in enumerate(zip(panels, betas, strict=False)):
        _bars(axes, beta, words=at == 0)
    panels[0].legend(loc="lower right")
    _frontier(panels[-1], betas)
    told = "; ".join(
        f"at β = {beta:g} the reward model gives {facts(beta)['reward']:.1f} and people {facts(beta)['people']:.1f}, "
        f"{facts(beta)['kl']:.1f} nats away"
        for beta in betas
    )
    return style.alt(
        fig,
        "The optimum over six replies moves from the reference to the one with the highest reward as β falls: "
        f"{told}. The reward model's curve only rises with KL; people's rises, then falls.",
    )


def beta_slider(start: float = 1.0) -> Any:
    """The figure under a slider for β, on a logarithmic scale. Tab to it, then use the arrow keys.

    Returns the widget, to be left as the last line of a cell; works with ipywidgets 7 and 8.
    """
    import ipywidgets as widgets

    slider = widgets.FloatLogSlider(
        value=start,
        base=10,
        min=-1.5,
        max=1,
        step=0.1,
        description="β",
        continuous_update=False,
        layout=widgets.Layout(width="min(32em, 95%)"),
    )
    return style.moving(beta_picture, slider)


# the frontier that was measured


def measured_picture(runs: Mapping[float, Mapping[str, Any]], beta: float) -> style.Picture:
    """One run of the measured frontier: where it lies, how many things its orders name, and what it says.

    runs: for each β the means "kl" (nats a response), "proxy" and "gold", "shares" (the share of samples that name
    0, 1, 2 … things) and "says" (a few samples). Raises ValueError when there was no run at this β.
    """
    if beta not in runs:
        raise ValueError(f"beta must be one that was run, {', '.join(f'{b:g}' for b in runs)}, got {beta!r}")
    here = runs[beta]
    fig, (curve, things) = style.figure(1, 2, width=5.2, height=3.7, width_ratios=[1.25, 1])
    for kind, marker, colour in (("proxy", "o", style.BLUE), ("gold", "s", style.VERMILION)):
        curve.plot(
            [r["kl"] for r in runs.values()], [r[kind] for r in runs.values()], marker, color=style.GREY, alpha=0.5
        )
        curve.plot(here["kl"], here[kind], marker, color=colour, markersize=13, label=f"{kind} {here[kind]:.2f}")
    curve.set_xscale("symlog", linthresh=1)
    curve.set_xlim(0, None)
    curve.xaxis.set_major_formatter("{x:g}")
    curve.set(
        xlabel="KL(π ‖ π_ref), nats a response", ylabel="reward", title=f"β = {beta:g}: {here['kl']:.1f} nats away"
    )
    curve.legend(markerscale=0.6)
    things.bar(range(len(here["shares"])), here["shares"], color=style.BLUE)
    things.axvline(3, color=style.BLACK, linewidth=0.8)
    things.set(xlabel="things named in an order (a tray holds 3)", ylabel="share of samples", ylim=(0, 1))
    said = "\n".join(textwrap.shorten(text, 100, placeholder=" …") for text in here["says"])
    fig.supxlabel(said, fontsize=11, x=0.02, ha="left")
    most = int(np.argmax(here["shares"]))
    return style.alt(
        fig,
        f"The measured run at β = {beta:g}: {here['kl']:.1f} nats from the reference, proxy {here['proxy']:.2f}, gold "
        f"{here['gold']:.2f}. It mostly names {most} things, for example: {'; '.join(here['says'])}.",
    )


def measured_slider(runs: Mapping[float, Mapping[str, Any]]) -> Any:
    """`measured_picture` under a slider over the β that were run, from the tightest leash to none."""
    import ipywidgets as widgets

    slider = widgets.SelectionSlider(
        options=[(f"{beta:g}", beta) for beta in sorted(runs, reverse=True)],
        description="β",
        continuous_update=False,
        layout=widgets.Layout(width="min(32em, 95%)"),
    )
    return style.moving(partial(measured_picture, runs), slider)


# what the student's code did


def kl_picture(candidate: Callable[..., Any], samples: int = 4000) -> style.Picture:
    """A student's three estimators on samples of a known pair of distributions: their spread, mean, and the truth."""
    generator = torch.Generator().manual_seed(2)
    policy = (1.2 * torch.randn(40, generator=generator)).log_softmax(0)
    reference = (policy + 0.9 * torch.randn(40, generator=generator)).log_softmax(0)
    truth = float((policy.exp() * (policy - reference)).sum())
    tokens = torch.multinomial(policy.exp(), samples, replacement=True, generator=generator)
    answer, trouble = _attempt(lambda: candidate(policy[tokens][None], reference[tokens][None]))
    made = [_numbers(part, (1, samples)) for part in answer] if isinstance(answer, (tuple, list)) else []
    fig, panels = style.figure(1, 3, width=3.6, height=3.2)
    drawn = [part for part in made if part is not None]
    if len(made) != 3 or len(drawn) != 3:
        style.say(panels[0], f"your kl_estimators\n{trouble or 'did not return three tensors, one value a token'}")
        for axes in panels[1:]:
            style.say(axes, "nothing to draw yet")
        return style.alt(fig, f"Your kl_estimators gave nothing to draw: {trouble or 'not three tensors'}.")
    told = []
    for name, axes, part in zip(("k1", "k2", "k3"), panels, drawn, strict=True):
        values = part.flatten().numpy()
        shown = values[np.isfinite(values)]
        axes.hist(np.clip(shown, -3, 3), bins=40, color=style.SKY)
        mean, spread = float(values.mean()), float(values.std())
        axes.axvline(truth, color=style.BLACK, linewidth=1.5, label=f"KL = {truth:.3f}")
        axes.axvline(float(np.clip(mean, -3, 3)), color=style.VERMILION, linestyle="--", label=f"mean = {mean:.3f}")
        axes.set_title(f"your {name}: std {spread:.2f}")
        axes.set_yticks([])
        axes.legend(loc="upper right")
        told.append(f"{name} has mean {mean:.3f} and standard deviation {spread:.2f}")
    return style.alt(
        fig,
        f"Histograms of your three estimators, {samples} tokens. The true KL is {truth:.3f}; {'; '.join(told)}.",
    )


def rewards_picture(candidate: Callable[..., Any]) -> style.Picture:
    """What a student's token_rewards gives to three responses of different length: each token, and padding."""
    tokens = 8
    generator = torch.Generator().manual_seed(4)
    mask = torch.arange(tokens) < torch.tensor([8, 5, 3])[:, None]
    logprobs = -3 * torch.rand(3, tokens, generator=generator)
    reference = logprobs - 0.6 * torch.randn(3, tokens, generator=generator)
    score, beta = torch.tensor([1.0, -1.0, 0.5]), 0.5
    answer, trouble = _attempt(
        lambda: candidate(score.clone(), logprobs.clone(), reference.clone(), mask.clone(), beta)
    )
    result = _numbers(answer, (3, tokens))
    fig, (given, drawn) = style.figure(1, 2, width=5.0, height=2.8)
    style.heat(given, torch.where(mask, logprobs - reference, 0.0), "log π − log π_ref", 1.5)
    labels = [f"score {s:+.1f}" for s in score.tolist()]
    given.set_yticks(range(3), labels)
    if result is None:
        style.say(drawn, f"your token_rewards\n{trouble or 'is no tensor (batch, seq)'}")
        return style.alt(fig, f"Your token_rewards gave nothing to draw: {trouble or 'no tensor of the right shape'}.")
    style.heat(drawn, result, f"your rewards, β = {beta:g}", 1.5)
    drawn.set_yticks(range(3), labels)
    for axes in (given, drawn):
        for row, length in enumerate((8, 5, 3)):
            axes.plot(
                [length - 0.5] * 2, [row - 0.5, row + 0.5], color=style.BLACK, linewidth=2
            )  # where padding begins
    padding = float(result[~mask].abs().max())
    largest = result.masked_fill(~mask, -torch.inf).argmax(1).tolist()
    return style.alt(
        fig,
        f"Heat maps of three responses of 8, 5 and 3 tokens: the log-ratio of each token, and your rewards. In padding "
        f"the largest is {padding:.2g}. Each row's sum is {', '.join(f'{s:.2f}' for s in result.sum(1).tolist())}; its "
        f"highest token is number {', '.join(str(place + 1) for place in largest)}.",
    )


def advantage_picture(candidate: Callable[..., Any]) -> style.Picture:
    """What a student's advantages say when only the last token is rewarded and the value head knows nothing yet."""
    tokens, gamma, lam = 10, 1.0, 0.8
    mask = torch.arange(tokens) < torch.tensor([10, 6, 4])[:, None]
    rewards = torch.zeros(3, tokens)
    rewards[0, 9], rewards[1, 5], rewards[2, 3] = 1.0, -1.0, 0.5
    values = torch.where(mask, 0.1, 2.0)  # padding holds what a value head happens to say there
    answer, trouble = _attempt(lambda: candidate(rewards.clone(), values.clone(), mask.clone(), gamma, lam))
    result = _numbers(answer[0], (3, tokens)) if isinstance(answer, (tuple, list)) and answer else None
    fig, (given, drawn) = style.figure(1, 2, width=5.0, height=2.8)
    style.heat(given, rewards, "rewards: only at the end", 1.5)
    if result is None:
        style.say(drawn, f"your advantages\n{trouble or 'are no tensor (batch, seq)'}")
        return style.alt(fig, f"Your advantages gave nothing to draw: {trouble or 'no tensor of the right shape'}.")
    style.heat(drawn, result, f"your advantages, λ = {lam:g}", 2.5)
    for axes in (given, drawn):
        axes.set_yticks(range(3), ["+1.0", "−1.0", "+0.5"])
    inside, padding = result[mask], float(result[~mask].abs().max())
    return style.alt(
        fig,
        "Heat maps of three responses that are rewarded at their last token with 1, −1 and 0.5, and your advantages: "
        f"mean {float(inside.mean()):.2f} and standard deviation {float(inside.std()):.2f} over the tokens, at most "
        f"{padding:.2g} in padding. The colour should fade from each end backwards, and padding stay blank.",
    )


def clip_picture(candidate: Callable[..., Any], epsilon: float = 0.2) -> style.Picture:
    """The objective that a student's policy_loss makes of one token, over its ratio, for a good and a bad token."""
    ratios = torch.linspace(0.4, 1.8, 71)
    fig, panels = style.figure(1, 2, width=4.6, height=3.3)
    told = []
    for axes, advantage, kind in zip(panels, (1.0, -1.0), ("good", "bad"), strict=True):
        wanted = torch.minimum(ratios * advantage, ratios.clamp(1 - epsilon, 1 + epsilon) * advantage)
        answer, trouble = _attempt(partial(_objective, candidate, ratios, advantage, epsilon))
        axes.plot(ratios, ratios * advantage, ":", color=style.GREY, label="ρ A, not clipped")
        axes.set(xlabel="ratio ρ = π / π_old", title=f"a {kind} token, A = {advantage:+.0f}")
        for edge in (1 - epsilon, 1 + epsilon):
            axes.axvline(edge, color=style.GREY, linewidth=0.8)
        if answer is None:
            axes.text(0.5, 0.5, textwrap.fill(f"your policy_loss {trouble}", 24), transform=axes.transAxes, ha="center")
            told.append(f"your policy_loss {trouble}")
            continue
        axes.plot(ratios, answer, color=style.BLUE, label="− your loss")
        axes.legend(loc="best")
        far = float((answer - wanted).abs().nan_to_num(nan=torch.inf).max())
        told.append(f"for the {kind} token your curve is {'right' if far < 1e-5 else f'off by up to {far:.2g}'}")
    return style.alt(
        fig,
        f"Your objective over the ratio, for a good and a bad token, ε = {epsilon:g}: {'; '.join(told)}. "
        "A good token's curve is flat above 1 + ε, a bad token's below 1 − ε.",
    )


def _objective(candidate: Callable[..., Any], ratios: Tensor, advantage: float, epsilon: float) -> Tensor:
    values = []
    for ratio in ratios:
        new = torch.log(ratio).reshape(1, 1) - 1
        loss = candidate(
            new.requires_grad_(),
            torch.full((1, 1), -1.0),
            torch.full((1, 1), advantage),
            torch.ones(1, 1).bool(),
            epsilon,
        )
        values.append(-float(loss.detach()))
    return torch.tensor(values)


# what a model's samples look like


def token_strip(
    rows: Sequence[Sequence[str]], values: Sequence[Sequence[float]], title: str, limit: float | None = None
) -> style.Picture:
    """Tokens in a row each, every token on a patch coloured by its value: blue negative, red positive.

    rows: the tokens of each response as text. values: one number a token, for example k1 in nats. limit: where the
    colours end, the largest absolute value by default. Raises ValueError when the two do not match or are empty.
    """
    from matplotlib import colormaps

    if not rows or [len(row) for row in rows] != [len(row) for row in values] or not all(rows):
        raise ValueError("rows and values must be equally long, row by row, and not empty")
    limit = limit or max(abs(value) for row in values for value in row) or 1.0
    longest = max(len(row) for row in rows)
    fig, (axes,) = style.figure(width=min(14.0, 0.85 * longest + 1.2), height=0.55 * len(rows) + 0.9)
    colours = colormaps[style.DIVERGING]
    for y, (tokens, numbers) in enumerate(zip(rows, values, strict=True)):
        for x, (token, value) in enumerate(zip(tokens, numbers, strict=True)):
            colour = colours(0.5 + 0.5 * max(-1.0, min(1.0, value / limit)))
            light = 0.3 * colour[0] + 0.6 * colour[1] + 0.1 * colour[2] > 0.5
            axes.fill_between([x, x + 0.97], y - 0.42, y + 0.42, color=colour, linewidth=0)
            words: dict[str, Any] = {"ha": "center", "color": style.BLACK if light else "white"}
            axes.text(x + 0.48, y - 0.1, token.strip()[:9] or "␣", va="center", fontsize=10, **words)
            axes.text(x + 0.48, y + 0.27, f"{value:+.1f}", va="center", fontsize=8, **words)
    axes.set(xlim=(0, longest), ylim=(len(rows) - 0.5, -0.5))
    axes.set_axis_off()
    axes.set_title(title, loc="left")
    told = []
    for number, (tokens, numbers) in enumerate(zip(rows, values, strict=True), 1):
        most = max(range(len(tokens)), key=lambda i: numbers[i])
        told.append(
            f"response {number} sums to {sum(numbers):.1f}, most at '{tokens[most].strip()}' ({numbers[most]:+.1f})"
        )
    return style.alt(fig, f"{title}. Each token is coloured by its value: {'; '.join(told)}.")


def _numbers(answer: Any, shape: tuple[int, ...]) -> Tensor | None:
    """The answer as a float32 tensor if it is one of this shape, else None."""
    if not isinstance(answer, Tensor) or answer.shape != shape or not answer.is_floating_point():
        return None
    return answer.detach().float()


def _attempt(answer: Callable[[], Any]) -> tuple[Any, str]:
    """Run a student's code and return (result, ""), or (None, what went wrong in words)."""
    try:
        with torch.random.fork_rng(devices=[]), torch.enable_grad(), time_limit(PATIENCE):
            return answer(), ""
    except NotImplementedError:
        return None, "is not written yet"
    except TimeUp:
        return None, f"did not end within {PATIENCE} seconds"
    except Exception as error:  # any fault of an answer belongs in the picture
        return None, f"raised {type(error).__name__}"
