"""Figures of lab 1: the loss of each token in a dialogue, dialogues packed into rows, and what a student's code did."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from lecturekit.checking.limits import TimeUp, time_limit
from lecturekit.explore import style

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

PATIENCE = 5  # seconds that a student's code may take before the picture is drawn without it
COLUMNS = 96  # characters in a line of a strip
HOTTEST = 6.0  # nats: a loss from which on the colour does not deepen, a probability of 0.25 %
LENGTHS = (61, 118, 74, 203, 90, 55, 131, 82, 67, 160, 97, 49)  # tokens of twelve dialogues, as in the lab's data
ROW_LENGTHS = (208, 256, 320, 384, 448, 512)
EXAMPLE = (
    {"role": "user", "content": "My kettle leaks."},
    {"role": "assistant", "content": "A leaking kettle is no fun. Where does it drip?"},
    {"role": "user", "content": "At the lid."},
    {"role": "assistant", "content": "Then I will send a new lid."},
)
SEGMENT_COLOURS = (style.BLUE, style.ORANGE, style.GREEN, style.PURPLE, style.SKY, style.YELLOW, style.VERMILION)


@dataclass(frozen=True)
class Strip:
    """A dialogue token by token.

    pieces: the text of each token. learnt: whether it is part of a response. losses: −log P of each token given those
    before it, in nats; the first has none and its entry is not looked at.
    """

    title: str
    pieces: Sequence[str]
    learnt: Sequence[bool]
    losses: Sequence[float]

    def counted(self, with_prompt: bool) -> list[int]:
        """The tokens whose loss is counted: those of the responses, or all; never the first, which nothing predicts."""
        return [place for place in range(1, len(self.pieces)) if with_prompt or self.learnt[place]]

    def mean(self, with_prompt: bool) -> float:
        """The mean loss of the counted tokens, in nats."""
        counted = self.counted(with_prompt)
        return sum(self.losses[place] for place in counted) / len(counted)


def strip_figure(strip: Strip, with_prompt: bool = False) -> Figure:
    """The tokens as text; the darker a counted token, the larger its loss. Tokens that are not counted are grey."""
    counted = set(strip.counted(with_prompt))
    lines = _lines(strip.pieces)
    fig, (axes,) = style.figure(width=11, height=0.34 * len(lines) + 0.9)
    axes.set(xlim=(0, COLUMNS), ylim=(len(lines), -0.2))
    axes.set_axis_off()
    for row, line in enumerate(lines):
        column = 0
        for place in line:
            text = _visible(strip.pieces[place])
            _token(axes, column, row, text, strip.losses[place] if place in counted else None, strip.learnt[place])
            column += len(text)
    count = "all tokens" if with_prompt else "the responses only"
    mean = strip.mean(with_prompt)
    axes.set_title(
        f"{strip.title}: the loss counts {count}, {len(counted)} of {len(strip.pieces)} tokens\n"
        f"mean {mean:.2f} nats, perplexity {math.exp(mean):.1f}",
        loc="left",
    )
    return fig


def strip_picture(strip: Strip, with_prompt: bool = False) -> style.Picture:
    """`strip_figure` with the text that a screen reader reads."""
    counted = strip.counted(with_prompt)
    hardest = sorted(counted, key=lambda place: -strip.losses[place])[:3]
    told = ", ".join(f"{_visible(strip.pieces[place]).strip()!r} {strip.losses[place]:.1f}" for place in hardest)
    return style.alt(
        strip_figure(strip, with_prompt),
        f"The tokens of {strip.title}, coloured by their loss where they count: {len(counted)} of {len(strip.pieces)} "
        f"({'prompt and responses' if with_prompt else 'responses only'}), mean {strip.mean(with_prompt):.2f} nats. "
        f"The least expected: {told}.",
    )


def strip_selector(strips: Sequence[Strip]) -> Any:
    """`strip_picture` under two choices: which dialogue, and whether the prompt is in the loss.

    Returns the widget (children: the choice of a dialogue, the check box, the drawing); works with ipywidgets 7 and 8,
    by keyboard too. Raises ValueError for no strips.
    """
    if not strips:
        raise ValueError("strips must hold at least one dialogue, got none")
    import ipywidgets as widgets

    wide = widgets.Layout(width="min(32em, 95%)")
    choice = widgets.Dropdown(
        options=[(strip.title, number) for number, strip in enumerate(strips)], description="dialogue", layout=wide
    )
    prompt = widgets.Checkbox(value=False, description="the prompt is in the loss too", layout=wide)
    return style.moving(lambda number, with_prompt: strip_picture(strips[number], with_prompt), choice, prompt)


def packing_facts(row_length: int, lengths: Sequence[int] = LENGTHS) -> dict[str, int]:
    """Rows, positions computed and positions wasted, with one dialogue a row and packed into rows of this length.

    Raises ValueError when a dialogue is longer than a row.
    """
    if row_length < max(lengths):
        raise ValueError(f"row_length must be at least {max(lengths)}, the longest dialogue, got {row_length}")
    rows = len(_first_fit(lengths, row_length))
    padded = len(lengths) * max(lengths)
    return {
        "tokens": sum(lengths),
        "padded rows": len(lengths),
        "padded positions": padded,
        "padded waste": padded - sum(lengths),
        "packed rows": rows,
        "packed positions": rows * row_length,
        "packed waste": rows * row_length - sum(lengths),
    }


def packing_figure(row_length: int, lengths: Sequence[int] = LENGTHS) -> Figure:
    """The same dialogues padded and packed, and who may attend to whom in the first packed row."""
    facts = packing_facts(row_length, lengths)
    packed = _first_fit(lengths, row_length)
    fig, (left, middle, right) = style.figure(1, 3, width=4.0, height=3.6)
    _draw_rows(left, [[length] for length in lengths], max(lengths))
    _draw_rows(middle, packed, row_length)
    for axes, name in ((left, "padded"), (middle, "packed")):
        axes.set_title(
            f"{name}: {facts[f'{name} rows']} rows, {facts[f'{name} positions']:,} positions\n"
            f"{facts[f'{name} waste'] / facts[f'{name} positions']:.0%} of them padding"
        )
        axes.set_xlabel("position in the row")
    start = 0
    for number, length in enumerate(packed[0]):
        end = start + length
        right.fill([start, start, end], [start, end, end], color=SEGMENT_COLOURS[number % len(SEGMENT_COLOURS)])
        start = end
    right.set(xlim=(0, row_length), ylim=(row_length, 0), xlabel="is looked at (key)", ylabel="looks (query)", aspect=1)
    right.set_title("first packed row:\nwho sees whom")
    right.grid(False)
    return fig


def packing_picture(row_length: int) -> style.Picture:
    """`packing_figure` with the text that a screen reader reads."""
    facts = packing_facts(row_length)
    return style.alt(
        packing_figure(row_length),
        f"{len(LENGTHS)} dialogues of {min(LENGTHS)} to {max(LENGTHS)} tokens. Padded to the longest they fill "
        f"{facts['padded rows']} rows with {facts['padded positions']:,} positions, "
        f"{facts['padded waste'] / facts['padded positions']:.0%} of them padding; packed into rows of {row_length} "
        f"they fill {facts['packed rows']} rows with {facts['packed positions']:,} positions, "
        f"{facts['packed waste'] / facts['packed positions']:.0%} padding. "
        "The attention mask of a packed row is a chain of triangles, one a dialogue, which do not touch each other.",
    )


def packing_slider(start: int = 256) -> Any:
    """`packing_picture` with the row length under a slider. Returns the widget: its children are slider and drawing."""
    import ipywidgets as widgets

    slider = widgets.SelectionSlider(
        options=list(ROW_LENGTHS),
        value=start,
        description="row length",
        continuous_update=False,
        layout=widgets.Layout(width="min(32em, 95%)"),
    )
    return style.moving(packing_picture, slider)


def packing_strip(row_lengths: Sequence[int] = ROW_LENGTHS) -> style.Picture:
    """The static twin of the slider: how much is padding at each row length, beside padding to the longest."""
    facts = [packing_facts(row_length) for row_length in row_lengths]
    shares = [100 * f["packed waste"] / f["packed positions"] for f in facts]
    padded = 100 * facts[0]["padded waste"] / facts[0]["padded positions"]
    fig, (axes,) = style.figure(width=7.5)
    labels = ["padded", *(f"rows of\n{row_length}" for row_length in row_lengths)]
    style.bars(axes, labels, [padded, *shares], "{:.0f} %", color=[style.GREY] + [style.BLUE] * len(shares))
    axes.set(ylabel="% of the positions", title="how much is padding", ylim=(0, 1.2 * max(padded, *shares)))
    told = ", ".join(f"{share:.0f} % at {row_length}" for row_length, share in zip(row_lengths, shares, strict=True))
    return style.alt(
        fig, f"Share of the positions that are padding: {padded:.0f} % with one dialogue a row; packed, {told}."
    )


def chat_picture(candidate: Callable[..., Any]) -> style.Picture:
    """What a student's encode_dialogue makes of a small dialogue: its tokens, those that are learnt in colour.

    Drawn whatever the answer is: an answer that raises, or gives no ids and mask, is put in words.
    """
    tokenizer = _WordTokenizer()
    answer, trouble = _attempt(lambda: _ids_and_mask(candidate(tokenizer, [dict(m) for m in EXAMPLE])))
    if answer is None:
        fig, (axes,) = style.figure(width=9, height=1.4)
        style.say(axes, f"your encode_dialogue\n{trouble}")
        return style.alt(fig, f"Your encode_dialogue gave nothing to draw: {trouble}.")
    ids, mask = answer
    pieces = [tokenizer.pieces.get(number, f"<{number}?>") for number in ids]
    lines = _lines(pieces)
    fig, (axes,) = style.figure(width=11, height=0.34 * len(lines) + 0.7)
    axes.set(xlim=(0, COLUMNS), ylim=(len(lines), -0.2))
    axes.set_axis_off()
    axes.set_title("what your mask says is learnt", loc="left")
    for row, line in enumerate(lines):
        column = 0
        for place in line:
            text = _visible(pieces[place])
            _token(axes, column, row, text, HOTTEST / 2 if mask[place] else None, mask[place])
            column += len(text)
    learnt = "".join(piece for piece, m in zip(pieces, mask, strict=True) if m)
    return style.alt(
        fig,
        f"The dialogue in {len(pieces)} tokens, {sum(mask)} of them marked as learnt: "
        f"{' '.join(learnt.split()) or 'none'}.",
    )


def gradient_picture(candidate: Callable[..., Any]) -> style.Picture:
    """Which positions a student's response_loss teaches: the size of the gradient at each, in two rows of a batch."""
    generator = torch.Generator().manual_seed(4)
    length, vocab = 14, 20
    logits = torch.randn(2, length, vocab, generator=generator)
    labels = torch.randint(0, vocab, (2, length), generator=generator)
    spans = ((4, 12), (9, 11))
    for row, (start, end) in enumerate(spans):
        labels[row, :start], labels[row, end:] = -100, -100

    def sizes() -> Tensor:
        wanted = logits.clone().requires_grad_()
        (gradient,) = torch.autograd.grad(candidate(wanted, labels.clone()).sum(), wanted)
        return gradient.norm(dim=-1)  # (2, length)

    with torch.enable_grad():
        found, trouble = _attempt(sizes)
    fig, panels = style.figure(1, 2, width=5.2, height=2.9, sharey=True)
    if found is None:
        style.say(panels[0], f"your response_loss\n{trouble}")
        style.say(panels[1], "no gradient to draw")
        return style.alt(fig, f"Your response_loss gave no gradient to draw: {trouble}.")
    told = []
    for row, (axes, (start, end)) in enumerate(zip(panels, spans, strict=True)):
        axes.bar(range(length), found[row].tolist(), color=style.BLUE)
        axes.axvspan(start - 0.5, end - 0.5, color=style.YELLOW, alpha=0.35, zorder=0)
        axes.set(
            title=f"row {row + 1}: labels at {start} to {end - 1}",
            xlabel="position of the logits",
            xlim=(-0.6, length - 0.4),
        )
        places = [str(place) for place in range(length) if found[row, place] > 0]
        told.append(f"row {row + 1} has labels at {start} to {end - 1} and a gradient at {', '.join(places) or 'none'}")
    panels[0].set_ylabel("size of the gradient")
    return style.alt(fig, f"Bars of the gradient at each position of the logits: {'; '.join(told)}.")


def rows_picture(candidate: Callable[..., Any]) -> style.Picture:
    """What a student's pack makes of six small dialogues: rows with the position in each cell, a colour a segment."""
    sequences = [([10 * n + k for k in range(size)], [-100] + [10 * n + k for k in range(1, size)])
                 for n, size in enumerate((7, 9, 5, 3, 6, 2), start=1)]  # fmt: skip
    length = 12

    def rows() -> list[Tensor]:
        parts = [torch.as_tensor(part).long() for part in candidate(sequences, length)]
        if len(parts) != 4 or any(p.ndim != 2 or not p.numel() or p.shape != parts[0].shape for p in parts):
            raise ValueError("four tensors (rows, length) were expected")
        return parts

    found, trouble = _attempt(rows)
    fig, (axes,) = style.figure(width=9, height=2.8)
    if found is None:
        style.say(axes, f"your pack\n{trouble}")
        return style.alt(fig, f"Your pack gave no rows to draw: {trouble}.")
    ids, _, positions, segments = (part.tolist() for part in found)
    for row, numbers in enumerate(segments):
        for place, number in enumerate(numbers):
            colour = "white" if number == 0 else SEGMENT_COLOURS[(number - 1) % len(SEGMENT_COLOURS)]
            axes.fill_between([place, place + 1], row, row + 0.9, facecolor=colour, edgecolor=style.GREY, alpha=0.6)
            axes.text(place + 0.5, row + 0.45, str(positions[row][place]), ha="center", va="center", fontsize=11)
    axes.set(xlim=(0, len(segments[0])), ylim=(len(segments), 0), xlabel="place in the row", yticks=[])
    axes.set_title("your rows: a colour a segment, the number is the position id")
    axes.grid(False)
    kept = sum(any(_within(sequence, row) for row in ids) for sequence, _ in sequences)
    used = sum(number != 0 for row in segments for number in row)
    return style.alt(
        fig,
        f"{len(segments)} rows of {len(segments[0])} places, {used} of them in a segment. "
        f"{kept} of {len(sequences)} dialogues stand whole in one row.",
    )


def attention_picture(candidate: Callable[..., Any]) -> style.Picture:
    """What a student's mask allows in one row with three dialogues and padding."""
    segments = torch.tensor([[1] * 5 + [2] * 4 + [3] * 3 + [0] * 2])
    length = segments.shape[1]

    def mask() -> Tensor:
        made = candidate(segments.clone())
        if not isinstance(made, Tensor) or made.shape[-2:] != (length, length):
            raise ValueError("a mask (rows, 1, length, length) was expected")
        return made.reshape(-1, length, length)[0].float()

    found, trouble = _attempt(mask)
    fig, (axes,) = style.figure(width=4.6, height=4.0)
    if found is None:
        style.say(axes, f"your mask\n{trouble}")
        return style.alt(fig, f"Your mask could not be drawn: {trouble}.")
    axes.imshow(found.numpy(), cmap=style.SEQUENTIAL, vmin=0, vmax=1, interpolation="nearest")
    for edge in (5, 9, 12):
        axes.axhline(edge - 0.5, color=style.VERMILION, linewidth=1.5)
        axes.axvline(edge - 0.5, color=style.VERMILION, linewidth=1.5)
    axes.set(xlabel="is looked at (key)", ylabel="looks (query)", title="your mask: yellow may attend")
    axes.grid(False)
    numbers = segments[0].numpy()
    leaks = int(((numbers[:, None] != numbers[None]) & (found.numpy() > 0)).sum())
    ahead = int((np.triu(found.numpy(), 1) > 0).sum())
    return style.alt(
        fig,
        f"The mask of a row with dialogues of 5, 4 and 3 tokens and 2 of padding. {leaks} pairs look across a "
        f"boundary, {ahead} look ahead.",
    )


class _WordTokenizer:
    """Words and the three marks of the chat template as tokens: enough to draw with, no model needed."""

    def __init__(self) -> None:
        self.numbers: dict[str, int] = {"<|endoftext|>": 0, "<|im_start|>": 1, "<|im_end|>": 2}
        self.pieces = {number: piece for piece, number in self.numbers.items()}

    def __call__(self, text: str, **_: Any) -> Any:
        ids = []
        for piece in re.findall(r"<\|\w+\|>| ?\w+|\s|[^\w\s]", text):
            number = self.numbers.setdefault(piece, len(self.numbers))
            self.pieces[number] = piece
            ids.append(number)
        return SimpleNamespace(input_ids=ids)

    def encode(self, text: str, **_: Any) -> list[int]:
        return self(text).input_ids

    def convert_tokens_to_ids(self, token: str) -> int:
        return self(token).input_ids[0]


def _ids_and_mask(result: Any) -> tuple[list[int], list[bool]]:
    ids, mask = (part.tolist() if isinstance(part, Tensor) else list(part) for part in result)
    if len(ids) != len(mask) or not ids:
        raise ValueError("ids and mask must be equally long")
    return [int(i) for i in ids], [bool(m) for m in mask]


def _visible(piece: str) -> str:
    return piece.replace("\n", "↵")


def _lines(pieces: Sequence[str]) -> list[list[int]]:
    """Which tokens go on which line: a new line after each end of turn's newline, and where a line is full."""
    lines: list[list[int]] = [[]]
    column = 0
    for place, piece in enumerate(pieces):
        width = len(_visible(piece))
        if lines[-1] and (column + width > COLUMNS or (piece == "<|im_start|>")):
            lines.append([])
            column = 0
        lines[-1].append(place)
        column += width
    return lines


def _token(axes: Axes, column: int, row: int, text: str, loss: float | None, learnt: bool) -> None:
    """One token: behind it the colour of its loss (none if it is not counted), below it a line if it is learnt."""
    width = len(text)
    if loss is not None:
        strength = 0.08 + 0.72 * min(max(loss, 0.0) / HOTTEST, 1.0)
        axes.fill_between([column, column + width], row, row + 0.82, color=style.VERMILION, alpha=strength, linewidth=0)
    if learnt:
        axes.plot([column + 0.1, column + width - 0.1], [row + 0.86] * 2, color=style.BLUE, linewidth=1.6)
    colour = style.BLACK if loss is not None else style.GREY
    for offset, letter in enumerate(text):  # letter by letter, so that every token is as wide as its colour
        axes.text(column + offset + 0.5, row + 0.62, letter, family="monospace", fontsize=11, color=colour,
                  ha="center", va="baseline")  # fmt: skip


def _first_fit(lengths: Sequence[int], row_length: int) -> list[list[int]]:
    """Lengths row by row, each in the first row with room for it."""
    rows: list[list[int]] = []
    for length in lengths:
        fitting = [row for row in rows if sum(row) + length <= row_length]
        if fitting:
            fitting[0].append(length)
        else:
            rows.append([length])
    return rows


def _draw_rows(axes: Axes, rows: Sequence[Sequence[int]], row_length: int) -> None:
    for number, row in enumerate(rows):
        start = 0
        for place, length in enumerate(row):
            axes.barh(number, length, left=start, height=0.8, color=SEGMENT_COLOURS[place % len(SEGMENT_COLOURS)])
            start += length
        axes.barh(
            number, row_length - start, left=start, height=0.8, facecolor="white", edgecolor=style.GREY, hatch="///"
        )
    axes.set(ylim=(len(rows) - 0.4, -0.6), xlim=(0, row_length), yticks=[])
    axes.grid(False)


def _within(sequence: Sequence[int], row: Sequence[int]) -> bool:
    """Whether the sequence stands in the row, unbroken."""
    return any(list(row[start : start + len(sequence)]) == list(sequence) for start in range(len(row)))


def _attempt(answer: Callable[[], Any]) -> tuple[Any, str]:
    """Run a student's code and return (result, ""), or (None, what went wrong in words)."""
    try:
        with time_limit(PATIENCE):
            return answer(), ""
    except NotImplementedError:
        return None, "is not written yet"
    except TimeUp:
        return None, f"did not end within {PATIENCE} seconds"
    except Exception as error:  # any fault of an answer belongs in the picture
        return None, f"raised {type(error).__name__}"
