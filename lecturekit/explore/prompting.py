"""Figures of lab 11: a prompt's label bias under a slider, shots and chains to play with on the real model, and what
the student's code did.

The figures that ask a model are handed functions that do so: nothing here knows a right answer of the lab.
"""

from __future__ import annotations

import textwrap
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from lecturekit.checking.limits import TimeUp, time_limit
from lecturekit.explore import style

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Shot = tuple[str, str]
PATIENCE = 5  # seconds that a student's code may take before the picture is drawn without it
NONE = "(no shot)"
BIASES = ((0.0, 0.0), (2.0, 0.0), (-2.0, 0.0), (2.0, 1.5))

# The idea: twelve invented reviews. What a review itself says for "positive" against "negative", in nats.
POSITIVE = np.array([2.4, 1.7, 1.2, 0.8, 0.4, -0.3])
NEGATIVE = np.array([-2.2, -1.6, -1.1, -0.7, -0.5, 0.2])


# ---------------------------------------------------------------- the idea: one threshold for all queries


def facts(bias: float, off: float = 0.0) -> dict[str, float]:
    """Twelve reviews behind a prompt with this label bias, in nats for "positive", without and with calibration.

    off: how far the content-free query is from saying nothing: it shows bias + off. Returns the fractions "raw" and
    "calibrated" that are labelled rightly, and "raw_positive" and "calibrated_positive" that are called positive.
    Zhao et al. 2021, §3 and §5.
    """
    found = {}
    for name, shift in (("raw", bias), ("calibrated", -off)):
        positive, negative = POSITIVE + shift > 0, NEGATIVE + shift > 0
        found[name] = float((positive.sum() + (~negative).sum()) / 12)
        found[f"{name}_positive"] = float((positive.sum() + negative.sum()) / 12)
    return found


def _dots(axes: Axes, shift: float, title: str, content_free: float | None = None) -> None:
    for values, height, marker, colour, label in (
        (POSITIVE, 1, "o", style.BLUE, "good reviews"),
        (NEGATIVE, 0, "s", style.VERMILION, "bad reviews"),
    ):
        axes.plot(values + shift, np.full(6, height), marker, color=colour, label=label, clip_on=False)
    if content_free is not None:
        axes.plot(content_free, 0.5, "D", color=style.BLACK, label="N/A")
    axes.axvline(0, color=style.BLACK, linewidth=1)
    axes.set(xlim=(-6, 6), ylim=(-0.6, 1.6), yticks=[], title=title)


def bias_figure(bias: float, off: float = 0.0) -> Figure:
    """Twelve reviews and the content-free query on the line of log-odds, as scored and calibrated."""
    here = facts(bias, off)
    fig, (raw, mended) = style.figure(1, 2, width=5.2, height=2.9)
    _dots(raw, bias, f"as scored: {here['raw']:.0%} right", bias + off)
    _dots(mended, -off, f"calibrated: {here['calibrated']:.0%} right", 0)
    for axes in (raw, mended):
        axes.set_xlabel("log p(positive) − log p(negative)")
    raw.legend(loc="center left", bbox_to_anchor=(-0.02, 0.5), fontsize=10)
    return fig


def bias_picture(bias: float, off: float = 0.0) -> style.Picture:
    """`bias_figure` with the text a screen reader reads."""
    here = facts(bias, off)
    return style.alt(
        bias_figure(bias, off),
        f"Twelve reviews on the line of log-odds for positive. The prompt adds {bias:+.1f} nats to all of them: "
        f"{here['raw_positive']:.0%} are called positive and {here['raw']:.0%} are right. The content-free query shows "
        f"{bias + off:+.1f} nats. With that taken off, {here['calibrated_positive']:.0%} are called positive and "
        f"{here['calibrated']:.0%} are right. The order of the reviews on the line never changes.",
    )


def bias_strip(settings: Sequence[tuple[float, float]] = BIASES) -> style.Picture:
    """The static twin of the sliders: several prompts side by side, as scored above and calibrated below."""
    fig, panels = style.figure(2, len(settings), width=2.9, height=2.2)
    told = []
    for above, below, (bias, off) in zip(panels, panels[len(settings) :], settings, strict=False):
        here = facts(bias, off)
        _dots(above, bias, f"bias {bias:+g}: {here['raw']:.0%} right", bias + off)
        _dots(below, -off, f"N/A off by {off:g}: {here['calibrated']:.0%}", 0)
        told.append(
            f"bias {bias:+g} with a content-free query off by {off:g}: {here['raw']:.0%} right as scored, "
            f"{here['calibrated']:.0%} calibrated"
        )
    panels[0].set_ylabel("as scored")
    panels[len(settings)].set_ylabel("calibrated")
    return style.alt(fig, f"Twelve reviews on the line of log-odds behind four prompts. {'; '.join(told)}.")


def bias_slider(bias: float = 2.0, off: float = 0.0) -> Any:
    """`bias_picture` under two sliders: the prompt's bias, and how far off the content-free query is."""
    import ipywidgets as widgets

    sliders = [
        widgets.FloatSlider(
            value=value,
            min=-limit,
            max=limit,
            step=0.25,
            description=label,
            continuous_update=False,
            style={"description_width": "initial"},
            layout=widgets.Layout(width="min(36em, 95%)"),
        )
        for value, limit, label in ((bias, 3.0, "the prompt's bias"), (off, 2.0, "N/A is off by"))
    ]
    return style.moving(bias_picture, *sliders)


# ---------------------------------------------------------------- the real model: shots to pick


def shots_picture(
    shots: Sequence[Shot],
    queries: Sequence[Shot],
    score: Callable[[Sequence[Shot], Sequence[str]], Tensor],
    calibrate: Callable[[Tensor, Tensor], Tensor],
    labels: Sequence[str],
    nothing: str = "N/A",
) -> style.Picture:
    """The label probabilities of some queries behind these shots, as scored and calibrated with a content-free query.

    shots, queries: pairs (text, label).   score(shots, texts) → (texts, labels) log-probabilities of the labels.
    calibrate(scores, content_free) → probabilities of the same shape.   labels: two, of which the first is drawn.
    """
    scores = score(shots, [*(text for text, _ in queries), nothing])
    raw = scores.softmax(1)[:, 0].tolist()
    mended = calibrate(scores[:-1], scores[-1])[:, 0].tolist()
    fig, (shown, bars) = style.figure(1, 2, width=5.4, height=4.2, width_ratios=[1, 1.15])
    lines = [f"{number}. {label.upper()}: {text}" for number, (text, label) in enumerate(shots, 1)] or ["(no shots)"]
    shown.set_axis_off()
    shown.set_title("the shots, in this order", loc="left")
    wrapped = "\n".join(textwrap.fill(line, 46, subsequent_indent="    ") for line in lines)
    shown.text(0, 0.97, wrapped, va="top", fontsize=10, transform=shown.transAxes)
    places = np.arange(len(queries) + 1)
    bars.barh(places + 0.2, raw, 0.4, color=style.GREY, label="as scored")
    bars.barh(places[:-1] - 0.2, mended, 0.4, color=style.BLUE, label="calibrated")
    names = [f"{textwrap.shorten(text, 30, placeholder=' …')}\n(truly {label})" for text, label in queries]
    bars.set_yticks(places, [*names, f"{nothing}\n(content-free)"], fontsize=10)
    bars.axvline(0.5, color=style.BLACK, linewidth=1)
    bars.set(xlim=(0, 1), xlabel=f"p({labels[0]}) of the two labels")
    bars.invert_yaxis()
    bars.legend(loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=2)
    told = "; ".join(
        f"'{textwrap.shorten(text, 40, placeholder=' …')}', truly {label}: {before:.2f} as scored, "
        f"{after:.2f} calibrated"
        for (text, label), before, after in zip(queries, raw, mended, strict=False)
    )
    order = ", ".join(label for _, label in shots) or "none"
    return style.alt(
        fig,
        f"{len(shots)} shots, with the labels {order} in this order. Probability of {labels[0]}: {told}. The "
        f"content-free query has {raw[-1]:.2f}.",
    )


def shot_picker(
    rows: Sequence[Shot],
    queries: Sequence[Shot],
    score: Callable[[Sequence[Shot], Sequence[str]], Tensor],
    calibrate: Callable[[Tensor, Tensor], Tensor],
    labels: Sequence[str],
    slots: int = 4,
) -> Any:
    """`shots_picture` under one menu a place: which row is shown there. Tab to a menu, then use the arrow keys.

    rows: what can be picked; the first `slots` of them are picked at first. Picks that were seen before are not asked
    of the model again. Returns the widget, to be left as the last line of a cell.
    """
    import ipywidgets as widgets

    names = {f"{label}: {textwrap.shorten(text, 60, placeholder=' …')}": (text, label) for text, label in rows}
    menus = [
        widgets.Dropdown(
            options=[NONE, *names],
            value=[*names][slot] if slot < len(names) else NONE,
            description=f"shot {slot + 1}",
            layout=widgets.Layout(width="min(44em, 95%)"),
        )
        for slot in range(slots)
    ]
    seen: dict[tuple[str, ...], style.Picture] = {}

    def draw(*picked: str) -> style.Picture:
        if picked not in seen:
            shots = [names[name] for name in picked if name != NONE]
            seen[picked] = shots_picture(shots, queries, score, calibrate, labels)
        return seen[picked]

    return style.moving(draw, *menus)


def shot_strip(
    choices: Sequence[tuple[str, Sequence[Shot]]],
    queries: Sequence[Shot],
    score: Callable[[Sequence[Shot], Sequence[str]], Tensor],
    labels: Sequence[str],
    nothing: str = "N/A",
) -> style.Picture:
    """The static twin of the menus: how the label probabilities move over several choices of shots, one line a query.

    choices: (name, shots), drawn from left to right.
    """
    texts = [text for text, _ in queries]
    found = torch.stack([score(shots, [*texts, nothing]).softmax(1)[:, 0] for _, shots in choices])
    fig, (axes,) = style.figure(width=max(6.0, 1.25 * len(choices)), height=4.0)
    places = range(len(choices))
    for number, (text, label) in enumerate(queries):
        first = label == labels[0]
        axes.plot(
            places,
            found[:, number],
            "o-" if first else "s--",
            color=style.BLUE if first else style.VERMILION,
            label=f"truly {label}: {textwrap.shorten(text, 44, placeholder=' …')}",
        )
    axes.plot(places, found[:, -1], "D:", color=style.BLACK, label=f"content-free: {nothing}")
    axes.axhline(0.5, color=style.GREY, linewidth=1)
    axes.set_xticks(places, [name for name, _ in choices], fontsize=10)
    axes.set(ylim=(0, 1), ylabel=f"p({labels[0]}) of the two labels", xlabel="labels of the shots, in this order")
    axes.legend(loc="lower left", bbox_to_anchor=(0, 1.0), fontsize=10)
    told = "; ".join(
        f"{name}: {', '.join(f'{p:.2f}' for p in row[:-1].tolist())}, content-free {float(row[-1]):.2f}"
        for (name, _), row in zip(choices, found, strict=True)
    )
    kinds = ", ".join(label for _, label in queries)
    return style.alt(fig, f"Probability of {labels[0]} for queries that are truly {kinds}. Behind shots {told}.")


# ---------------------------------------------------------------- the real model: chains to edit


def chain_picture(
    question: str, steps: Sequence[str], edited: Sequence[str], right: int, answer: Callable[[str], tuple[str, Any]]
) -> style.Picture:
    """A chain with some steps edited, and the answer that the model gives behind it.

    steps: as they were.   edited: as they are now, an empty text for a step that was taken out.   right: the right
    answer.   answer(chain) → (how the model goes on, the answer read off it).
    """
    return chain_strip(question, steps, [edited], right, answer)


def chain_strip(
    question: str,
    steps: Sequence[str],
    versions: Sequence[Sequence[str]],
    right: int,
    answer: Callable[[str], tuple[str, Any]],
) -> style.Picture:
    """Several versions of one chain under each other, as `chain_picture` shows one: the static twin of the editor."""
    lines = [(f"Question: {question}", style.BLACK)]
    told = []
    for edited in versions:
        changed = [now.strip() != before.strip() for before, now in zip(steps, edited, strict=True)]
        chain = " ".join(text.strip() for text in edited if text.strip())
        said, found = answer(chain)
        said = " ".join(said.split()) or "(nothing)"
        for number, (now, other) in enumerate(zip(edited, changed, strict=True), 1):
            words = f"Step {number}{' (edited)' if other else ''}: {now.strip() or '(taken out)'}"
            lines.append((words, style.VERMILION if other else style.BLACK))
        lines.append((f"The model goes on: {said}", style.BLUE))
        lines.append((f"Answer read: {found}; right: {right}", style.BLUE))
        lines.append(("", style.BLACK))
        told.append(
            f"With {sum(changed)} of {len(steps)} steps edited: {chain or '(empty)'} The model goes on: {said} Answer "
            f"read: {found}; right: {right}."
        )
    wrapped = [(textwrap.fill(text, 88), colour) for text, colour in lines[:-1]]
    rows = [text.count("\n") + 1.25 if text else 0.7 for text, _ in wrapped]  # heights in lines
    inches = 0.26
    fig, (axes,) = style.figure(width=8.6, height=inches * sum(rows) + 0.2)
    axes.set_axis_off()
    axes.set_ylim(sum(rows), 0)
    place = 0.0
    for (text, colour), height in zip(wrapped, rows, strict=True):
        axes.text(0, place, text, va="top", fontsize=12, color=colour)
        place += height
    return style.alt(fig, f"{question} {' '.join(told)}")


def chain_editor(question: str, steps: Sequence[str], right: int, answer: Callable[[str], tuple[str, Any]]) -> Any:
    """`chain_picture` under one text box a step: change a number or empty a box, press Enter, see what follows."""
    import ipywidgets as widgets

    boxes = [
        widgets.Text(
            value=step,
            description=f"step {number}",
            continuous_update=False,
            layout=widgets.Layout(width="min(48em, 95%)"),
        )
        for number, step in enumerate(steps, 1)
    ]
    return style.moving(lambda *edited: chain_picture(question, steps, edited, right, answer), *boxes)


# ---------------------------------------------------------------- what the student's code did

DRAWN = [(f"review {number}", "positive" if number <= 8 else "negative") for number in range(1, 13)]
QUERY = "review 3"
WORDS = ("the", "cat", "dog", "sat", "ran", "on", "mats", "home")
CHAINS = (
    ("12 + 5 = 17. 17 - 3 = 14. The answer is 14.", 14),
    ("20 - 6 = 14. The answer is 14. That took 2 steps.", 14),
    ("9 - 12 = -3. The answer is -3.", -3),
    ("4 * 300 = 1,200. The answer is $1,200.", 1200),
    ("7 + 8 = 15, and 15 apples are left.", 15),
    ("7 + 8 = 15. The answer is", None),
    ("I do not know.", None),
)
VOTES = ((1, 3, 11, 41, 101), 200)  # chains a vote, votes


def prompt_picture(candidate: Callable[..., Any]) -> style.Picture:
    """Two prompts that a student's build_prompt makes, with every line end and every space at an end made visible."""
    shots = [("hot", "cold"), ("big", "small")]
    asked: list[tuple[str, tuple[Any, ...]]] = [
        ("two shots and an instruction", ("Write the opposite.", shots, "early", ("Word", "Opposite"))),
        ("zero-shot, no instruction", ("", [], "early", ("Word", "Opposite"))),
    ]
    fig, panels = style.figure(1, 2, width=4.6, height=3.3)
    told = []
    for axes, (title, arguments) in zip(panels, asked, strict=True):
        text, trouble = _attempt(candidate, *arguments)
        if not isinstance(text, str):
            style.say(axes, f"your build_prompt\n{trouble or 'gave no text'}")
            told.append(f"{title}: your build_prompt {trouble or 'gave no text'}")
            continue
        lines = text.split("\n")
        shown = [_visible(line) + ("↵" if number < len(lines) else "▮") for number, line in enumerate(lines, 1)]
        axes.set_axis_off()
        axes.set_title(title, loc="left")
        words = "\n".join(shown[:16])
        axes.text(0, 0.98, words, va="top", family="monospace", fontsize=11, transform=axes.transAxes)
        told.append(f"{title}: {len(lines)} lines, {lines.count('')} of them empty, the end is {text[-12:]!r}")
    return style.alt(
        fig, f"Your prompts, a mark at every end of a line and a block where the model goes on. {'; '.join(told)}."
    )


def _visible(line: str) -> str:
    """Spaces at both ends as a mark that can be seen."""
    inner = line.strip(" ")
    before = len(line) - len(line.lstrip(" ")) if inner else 0
    return "␣" * before + inner + "␣" * (len(line) - before - len(inner))


def shots_drawn_picture(candidate: Callable[..., Any], k: int = 4, seeds: int = 200) -> style.Picture:
    """How often each of twelve rows is a shot under many seeds, and what label stands at each place."""
    answer, trouble = _attempt(lambda: [candidate(list(DRAWN), k, QUERY, seed) for seed in range(seeds)])
    fig, (often, places) = style.figure(1, 2, width=5.0, height=3.3, width_ratios=[1.5, 1])
    draws = []
    for shots in answer or []:
        try:
            draws.append([(str(x), str(label)) for x, label in shots])
        except (TypeError, ValueError):
            trouble = "gave no list of pairs"
    if trouble or not draws:
        for axes in (often, places):
            style.say(axes, f"your draw_shots\n{trouble or 'drew nothing'}")
        return style.alt(fig, f"Your draw_shots gave nothing to draw: {trouble or 'it drew nothing'}.")
    counts = [sum(shot == row for shots in draws for shot in shots) for row in DRAWN]
    colours = [style.BLUE if label == "positive" else style.VERMILION for _, label in DRAWN]
    often.bar(range(12), counts, color=colours)
    at = [x for x, _ in DRAWN].index(QUERY)
    often.text(at, counts[at] + 0.02 * max(counts), " the query", rotation=90, ha="center", va="bottom", fontsize=11)
    often.set(xlabel="row: 8 positive, then 4 negative", ylabel=f"times drawn in {seeds}", title="which rows")
    often.set_xticks(range(12), [str(number) for number in range(1, 13)])
    length = max(map(len, draws))
    share = [
        sum(shots[place][1] == "positive" for shots in draws if place < len(shots))
        / sum(place < len(shots) for shots in draws)
        for place in range(length)
    ]
    style.bars(places, [str(place + 1) for place in range(length)], share, "{:.2f}", color=style.BLUE)
    places.axhline(0.5, color=style.GREY, linewidth=1)
    places.set(xlabel="place in the prompt", title="share of positive", ylim=(0, 1.15))
    balanced = sum(2 * sum(label == "positive" for _, label in shots) == k == len(shots) for shots in draws)
    different = len({tuple(shots) for shots in draws})
    return style.alt(
        fig,
        f"Your shots under {seeds} seeds, {different} different draws. The query itself was a shot {counts[at]} times; "
        f"{balanced} draws had {k} shots with both labels equally often. Share of positive at each place: "
        f"{', '.join(f'{one:.2f}' for one in share)}.",
    )


def score_picture(candidate: Callable[..., Any]) -> style.Picture:
    """A student's scores in a language of eight words, where each word depends on the one before it alone."""
    table = torch.randn(8, 8, generator=torch.Generator().manual_seed(5)) * 1.5
    logprobs = table - table.logsumexp(1, keepdim=True)
    rows = [[0, 1, 3], [0, 1, 3, 5, 6], [0, 1, 4, 7, 5, 0, 7]]  # the prompt is "the cat"
    lengths = torch.tensor([len(row) for row in rows])
    tokens = torch.zeros(3, 8, dtype=torch.long)
    for number, row in enumerate(rows):
        tokens[number, : len(row)] = torch.tensor(row)
    logits = table[tokens] + 3.0  # a constant changes no probability
    own = [[float(logprobs[a, b]) for a, b in zip(row[1:], row[2:], strict=False)] for row in rows]
    answer, trouble = _attempt(lambda: candidate(logits.clone(), tokens.clone(), 2, lengths.clone()))
    pair = answer if isinstance(answer, (tuple, list)) and len(answer) == 2 else (None, None)
    yours = [_numbers(part, (3,)) for part in pair]
    fig, panels = style.figure(1, 3, width=3.9, height=3.0, width_ratios=[1.7, 1, 1])
    strip = np.full((3, 7), np.nan)
    for number, values in enumerate(own):
        strip[number, 2 : 2 + len(values)] = values
    panels[0].imshow(strip, cmap=style.SEQUENTIAL, vmin=-5, vmax=0, aspect="auto")
    for y, row in enumerate(rows):
        for x, word in enumerate(row):
            value = strip[y, x]
            dark = not np.isnan(value) and value < -2.5  # the middle of the colours
            label = WORDS[word] if np.isnan(value) else f"{WORDS[word]}\n{value:.1f}"
            panels[0].text(x, y, label, ha="center", va="center", fontsize=10, color="white" if dark else "black")
    panels[0].set(title="log p of each token of a candidate", xticks=[], yticks=[])
    panels[0].grid(False)
    told = []
    truths = [[sum(values) for values in own], [sum(values) / len(values) for values in own]]
    for axes, name, found, truth in zip(panels[1:], ("sums", "means"), yours, truths, strict=True):
        if found is None:
            style.say(axes, f"your {name}:\n{trouble or 'no tensor (3,)'}")
            told.append(f"your score_candidates {trouble or 'gave no tensor (3,)'} for the {name}")
            continue
        axes.barh(range(3), found.tolist(), 0.6, color=style.BLUE)
        axes.plot(truth, range(3), "|", color=style.BLACK, markersize=28, markeredgewidth=2.5)
        axes.invert_yaxis()
        axes.set(title=f"your {name}", yticks=[], xlabel="nats; black: from the table")
        far = float((found - torch.tensor(truth)).abs().nan_to_num(nan=torch.inf).max())
        told.append(f"your {name} are {', '.join(f'{value:.2f}' for value in found.tolist())}, ")
        told[-1] += "right" if far < 1e-4 else f"off by up to {far:.2g}"
    return style.alt(
        fig,
        f"Three candidates of 1, 3 and 5 tokens behind the prompt 'the cat'. Their log-probabilities add up to "
        f"{', '.join(f'{value:.2f}' for value in truths[0])}; a token has on average "
        f"{', '.join(f'{value:.2f}' for value in truths[1])}. {'; '.join(told)}.",
    )


class _Layer:
    """What a model keeps of one layer, each (rows, 1, tokens, width)."""

    def __init__(self, keys: Tensor, values: Tensor) -> None:
        self.keys, self.values = keys, values


class _Kept:
    """A cache with the methods of transformers' DynamicCache that one may want here."""

    def __init__(self) -> None:
        self.layers: list[_Layer] = []

    def update(self, keys: Tensor, values: Tensor, layer_idx: int, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        if not self.layers:
            self.layers.append(_Layer(keys, values))
        else:
            layer = self.layers[0]
            layer.keys, layer.values = torch.cat([layer.keys, keys], -2), torch.cat([layer.values, values], -2)
        return self.layers[0].keys, self.layers[0].values

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return self.layers[0].keys.shape[-2] if self.layers else 0

    def batch_repeat_interleave(self, repeats: int) -> None:
        self._each(lambda kept: kept.repeat_interleave(repeats, dim=0))

    def batch_select_indices(self, indices: Tensor) -> None:
        self._each(lambda kept: kept[indices])

    def crop(self, length: int) -> None:
        self._each(lambda kept: kept[..., :length, :])

    def _each(self, change: Callable[[Tensor], Tensor]) -> None:
        for layer in self.layers:
            layer.keys, layer.values = change(layer.keys), change(layer.values)


class _Read:
    """What calling the model gives."""

    def __init__(self, logits: Tensor, past_key_values: _Kept) -> None:
        self.logits, self.past_key_values = logits, past_key_values


class _Counter(torch.nn.Module):
    """A causal model that is called as those of transformers are, and counts the tokens that it reads.

    Behind a token its logits are those of the mean of all words so far: enough to tell right scores from wrong ones.
    """

    words: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("words", torch.randn(50, 16, generator=torch.Generator().manual_seed(3)))
        self.read = 0

    @property
    def device(self) -> torch.device:
        return self.words.device

    def forward(self, input_ids: Tensor, past_key_values: _Kept | None = None, **_: Any) -> _Read:
        self.read += input_ids.numel()
        new = self.words[input_ids].unsqueeze(1)
        kept = _Kept() if past_key_values is None else past_key_values
        values = kept.update(new, new, 0)[1]
        means = values[:, 0].cumsum(1) / torch.arange(1, values.shape[2] + 1).unsqueeze(1)
        return _Read(means[:, -input_ids.shape[1] :] @ self.words.T, kept)


def cache_picture(candidate: Callable[..., Any], prompt_length: int = 40) -> style.Picture:
    """How many tokens a model reads when a student's score_cached scores more and more candidates behind one prompt."""
    generator = torch.Generator().manual_seed(1)
    prompt = torch.randint(50, (prompt_length,), generator=generator)
    candidates = [torch.randint(50, (1 + number % 3,), generator=generator) for number in range(16)]
    model = _Counter()
    whole = []  # log p of each candidate, each row read whole
    for one in candidates:
        logits = model(torch.cat([prompt, one]).unsqueeze(0)).logits[0, prompt_length - 1 : -1]
        whole.append(float((logits.gather(1, one.unsqueeze(1)).squeeze(1) - logits.logsumexp(1)).sum()))
    counts, read, trouble, far = [1, 2, 4, 8, 16], [], "", 0.0
    for count in counts:
        model.read = 0
        answer, trouble = _attempt(candidate, model, prompt.clone(), [one.clone() for one in candidates[:count]])
        sums = _numbers(answer[0], (count,)) if isinstance(answer, (tuple, list)) and answer else None
        if sums is None:
            trouble = trouble or "gave no tensor of sums"
            break
        read.append(model.read)
        far = max(far, float((sums - torch.tensor(whole[:count])).abs().nan_to_num(nan=torch.inf).max()))
    fig, (axes,) = style.figure(width=6.0, height=3.4)
    longest = [max(map(len, candidates[:count])) for count in counts]
    rows = [count * (prompt_length + most) for count, most in zip(counts, longest, strict=True)]
    if trouble:
        style.say(axes, f"your score_cached\n{trouble}")
        return style.alt(fig, f"Your score_cached gave nothing to draw: {trouble}.")
    axes.plot(counts, rows, "s--", color=style.GREY, label="every row whole")
    axes.plot(counts, read, "o-", color=style.BLUE, label="your score_cached")
    axes.set(xlabel="candidates", ylabel="tokens read", title=f"behind a prompt of {prompt_length} tokens")
    axes.set_xticks(counts)
    axes.set_ylim(0, None)
    axes.legend(loc="upper left")
    verdict = "equal those of whole rows" if far < 1e-3 else f"differ from those of whole rows by up to {far:.2g}"
    axes.text(0.03, 0.62, f"your sums\n{verdict}", transform=axes.transAxes, fontsize=11)
    return style.alt(
        fig,
        f"Tokens read over the number of candidates, {', '.join(map(str, counts))}. Every row whole: "
        f"{', '.join(map(str, rows))}. Your score_cached: {', '.join(map(str, read))}; your sums {verdict}.",
    )


def calibrate_picture(candidate: Callable[..., Any], bias: float = 2.0) -> style.Picture:
    """The twelve reviews of the idea's figure before and after a student's calibrate, and the content-free query."""
    odds = torch.tensor(np.concatenate([POSITIVE, NEGATIVE, [0.0]]) + bias, dtype=torch.float32)
    scores = torch.stack([torch.nn.functional.logsigmoid(odds), torch.nn.functional.logsigmoid(-odds)], dim=1) - 1.5
    answer, trouble = _attempt(lambda: candidate(scores.clone(), scores[-1].clone()))
    result = _numbers(answer, (13, 2))
    fig, (axes,) = style.figure(width=6.4, height=3.6)
    if result is None:
        style.say(axes, f"your calibrate\n{trouble or 'is no tensor (queries, labels)'}")
        return style.alt(fig, f"Your calibrate gave nothing to draw: {trouble or 'no tensor of the right shape'}.")
    before, after = torch.sigmoid(odds), result[:, 0]
    for start, stop, marker, colour, label in (
        (0, 6, "o", style.BLUE, "good reviews"),
        (6, 12, "s", style.VERMILION, "bad reviews"),
        (12, 13, "D", style.BLACK, "N/A"),
    ):
        axes.plot(before[start:stop], after[start:stop], marker, color=colour, label=label)
    axes.axhline(0.5, color=style.GREY, linewidth=1)
    axes.axvline(0.5, color=style.GREY, linewidth=1)
    axes.set(xlabel="p(positive) as scored", ylabel="your p(positive)", title=f"a prompt with a bias of {bias:+g} nats")
    axes.legend(loc="upper left")
    right = [
        float(torch.cat([values[:6] > 0.5, values[6:12] <= 0.5]).float().mean()) for values in (before, after)
    ]  # fractions
    adds = float((result.sum(1) - 1).abs().nan_to_num(nan=torch.inf).max())
    return style.alt(
        fig,
        f"p(positive) of twelve reviews as scored and after your calibrate: {right[0]:.0%} right before, "
        f"{right[1]:.0%} after. The content-free query has {float(before[-1]):.2f} before and {float(after[-1]):.2f} "
        f"after, where one half says nothing. {'Each row adds' if adds < 1e-4 else 'Not every row adds'} up to 1.",
    )


def parse_picture(candidate: Callable[..., Any]) -> style.Picture:
    """What a student's final_answer reads off seven chains."""
    fig, (axes,) = style.figure(width=8.4, height=0.42 * len(CHAINS) + 0.3)
    axes.set_axis_off()
    told = []
    for number, (chain, wanted) in enumerate(CHAINS):
        found, trouble = _attempt(candidate, chain)
        said = trouble or repr(found)
        right = not trouble and type(found) is type(wanted) and found == wanted
        place = 1 - (number + 0.5) / len(CHAINS)
        axes.text(0, place, f"“{chain}”", va="center", fontsize=12, transform=axes.transAxes)
        colour = style.BLUE if right else style.VERMILION
        axes.text(0.72, place, textwrap.shorten(said, 40), va="center", color=colour, transform=axes.transAxes)
        told.append(f"“{chain}” {'gives' if right else 'is not read rightly: it gives'} {said}")
    return style.alt(fig, f"Chains and what your final_answer makes of them. {'; '.join(told)}.")


def vote_picture(candidate: Callable[..., Any]) -> style.Picture:
    """How often a student's self_consistency is right over the number of chains, for two imagined questions."""
    counts = VOTES[0]
    kinds: tuple[tuple[str, dict[int | None, float], str, str], ...] = (
        ("the right answer is the most frequent", {14: 0.40, 12: 0.25, 15: 0.20, None: 0.15}, "o-", style.BLUE),
        ("a wrong answer is more frequent", {14: 0.25, 12: 0.40, 15: 0.20, None: 0.15}, "s--", style.VERMILION),
    )
    fig, (axes,) = style.figure(width=6.4, height=3.6)
    told = []
    for title, chances, line, colour in kinds:
        found, trouble = _attempt(_right_votes, candidate, chances)
        if trouble:
            style.say(axes, f"your self_consistency\n{trouble}")
            return style.alt(fig, f"Your self_consistency gave nothing to draw: {trouble}.")
        axes.plot(counts, found, line, color=colour, label=title)
        told.append(f"where {title}: {', '.join(f'{share:.2f}' for share in found)}")
    axes.set(xlabel="chains a vote", ylabel="votes that are right", ylim=(0, 1), xscale="log")
    axes.set_xticks(counts, [str(count) for count in counts])
    axes.minorticks_off()
    axes.legend(loc="lower left", bbox_to_anchor=(0, 1.0))
    return style.alt(
        fig,
        f"Share of right votes of your self_consistency with {', '.join(map(str, counts))} chains, {'; '.join(told)}. "
        "A single chain is right in 0.40 and 0.25 of the cases.",
    )


def _right_votes(candidate: Callable[..., Any], chances: dict[int | None, float], right: int = 14) -> list[float]:
    """The share of right votes for each number of chains, when answers come with these chances."""
    counts, votes = VOTES
    answers = list(chances)
    drawn = np.random.default_rng(0).choice(len(answers), size=votes * sum(counts), p=list(chances.values()))
    pool = iter(drawn.tolist())
    texts = ["I do not know." if one is None else f"So the answer is {one}." for one in answers]
    known = dict(zip(texts, answers, strict=True))

    def sample(temperature: float) -> str:
        return texts[next(pool)] if temperature > 0 else texts[0]

    return [
        sum(bool(candidate(sample, known.__getitem__, n, 0.7) == right) for _ in range(votes)) / votes for n in counts
    ]


def _numbers(answer: Any, shape: tuple[int, ...]) -> Tensor | None:
    """The answer as a float32 tensor if it is one of this shape, else None."""
    if not isinstance(answer, Tensor) or answer.shape != shape or not answer.is_floating_point():
        return None
    return answer.detach().float()


def _attempt(answer: Callable[..., Any], *arguments: Any) -> tuple[Any, str]:
    """Run a student's code and return (result, ""), or (None, what went wrong in words)."""
    try:
        with torch.random.fork_rng(devices=[]), torch.no_grad(), time_limit(PATIENCE):
            return answer(*arguments), ""
    except NotImplementedError:
        return None, "is not written yet"
    except TimeUp:
        return None, f"did not end within {PATIENCE} seconds"
    except Exception as error:  # any fault of an answer belongs in the picture
        return None, f"raised {type(error).__name__}"
