"""Figures of lab 12: a shelf to search by words or by meaning, what the student's code did, a question asked aloud."""

from __future__ import annotations

import textwrap
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from html import escape
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from lecturekit.checking.limits import TimeUp, time_limit
from lecturekit.explore import style

if TYPE_CHECKING:
    from matplotlib.axes import Axes

PATIENCE = 5  # seconds that a student's code may take before the picture is drawn without it

# A shelf of seven passages, and questions to it. The scores are those of lecturekit.prompting.bm25 and of MiniLM,
# rounded to two decimals; they are written down here because the figure stands before the lab has built either.
SHELF = (
    "The harbour of Lanten was dug by forty monks in 1453.",
    "The harbour of Lantry was dug by sailors in 1611.",
    "On the flag of Orvika a heron stands in a red field.",
    "Ilse Marn painted the ceiling of the Bell House in nine winters.",
    "In Sorle bread is baked with chestnut flour.",
    "The mayor of Castrel is chosen by the bees of the town hall.",
    "The Tide House was built of driftwood by a retired judge.",
)
ASKED = (
    "In which year was the harbour of Lanten dug?",
    "Which bird is on the banner of Orvika?",
    "What do people eat there that is made of nuts?",
    "Which artist worked overhead for most of a decade?",
    "How tall is the mayor of Orvika?",
)
ANSWERED_BY = (0, 2, 4, 3, None)  # the passage that holds the answer
BY_WORDS = (
    (2.25, 1.64, 0.30, 0.34, 0.17, 0.24, 0.50),
    (0.17, 0.17, 1.45, 0.20, 0.53, 0.67, 0.17),
    (0.08, 0.09, 0.08, 0.08, 0.53, 0.54, 0.08),
    (0.08, 0.09, 0.73, 0.08, 0.00, 0.11, 0.55),
    (0.17, 0.17, 0.80, 0.20, 0.53, 1.29, 0.17),
)
BY_MEANING = (
    (0.67, 0.71, 0.09, 0.12, -0.04, -0.04, 0.15),
    (0.06, 0.18, 0.61, 0.26, 0.10, 0.21, 0.09),
    (0.05, 0.14, 0.11, 0.01, 0.32, 0.17, 0.03),
    (0.02, -0.05, 0.06, 0.33, -0.02, 0.00, 0.04),
    (0.06, 0.13, 0.43, 0.23, 0.12, 0.36, 0.08),
)
WAYS = ("words", "meaning")


def _ranked(question: int, way: str) -> list[int]:
    """The passages of the shelf, best first; a passage that shares no word with the question is not found by words."""
    scores = (BY_WORDS if way == "words" else BY_MEANING)[question]
    order = sorted(range(len(SHELF)), key=lambda place: -scores[place])
    return [place for place in order if way == "meaning" or scores[place] > 0]


def shelf_picture(question: int, way: str, k: int) -> style.Picture:
    """The scores of the seven passages for one question, and the prompt that the best k of them make.

    question: its number in ASKED.   way: "words" or "meaning".   k: how many passages go into the prompt.
    Raises ValueError for another way, and when question or k is out of range.
    """
    if way not in WAYS:
        raise ValueError(f"way must be one of {', '.join(WAYS)}, got {way!r}")
    if not 0 <= question < len(ASKED) or not 1 <= k <= len(SHELF):
        raise ValueError(f"question must be in 0..{len(ASKED) - 1} and k in 1..{len(SHELF)}, got {question} and {k}")
    scores, found = (BY_WORDS if way == "words" else BY_MEANING)[question], _ranked(question, way)[:k]
    fig, (bars, prompt) = style.figure(1, 2, width=6.1, height=3.9, width_ratios=[1.15, 1])
    places = np.arange(len(SHELF))
    bars.barh(places, scores, color=[style.BLUE if place in found else style.SKY for place in places])
    bars.set_yticks(places, [textwrap.fill(text, 36) for text in SHELF], fontsize=9)
    bars.invert_yaxis()
    bars.set(xlabel="BM25 score" if way == "words" else "cosine", xlim=(min(0, *scores), 1.15 * max(0.1, *scores)))
    bars.set_title(f"“{ASKED[question]}”", fontsize=11, loc="right")
    answer = ANSWERED_BY[question]
    if answer is not None:
        bars.plot(max(0, scores[answer]), answer, "*", markersize=15, color=style.VERMILION, label="holds the answer")
        bars.legend(loc="lower right")
    lines = [f"[{number}] {SHELF[place]}" for number, place in enumerate(found, start=1)]
    lines.append(f"Question: {ASKED[question]}\nAnswer:")
    _write(prompt, "the prompt", "\n\n".join(lines))
    held = "no passage holds the answer" if answer is None else f"passage {answer + 1} holds the answer"
    told = "is in the prompt" if answer in found else "is not in the prompt"
    return style.alt(
        fig,
        f"Search by {way} for “{ASKED[question]}” among seven passages. Scores: "
        f"{', '.join(f'{number}: {score:.2f}' for number, score in enumerate(scores, start=1))}. In the prompt stand "
        f"passages {', '.join(str(place + 1) for place in found) or 'none'}; {held}"
        f"{'' if answer is None else f' and {told}'}.",
    )


def shelf_strip() -> style.Picture:
    """The static twin: at which rank each way finds the passage with the answer, for the questions that have one."""
    fig, panels = style.figure(1, len(WAYS), width=5.6, height=3.4, width_ratios=[1.75, 1])
    told = []
    for axes, way in zip(panels, WAYS, strict=True):
        scores = np.array(BY_WORDS if way == "words" else BY_MEANING)
        axes.imshow(scores, cmap=style.SEQUENTIAL, aspect="auto")
        axes.grid(False)
        axes.set_xticks(range(len(SHELF)), [str(place + 1) for place in range(len(SHELF))])
        axes.set_yticks(range(len(ASKED)), [textwrap.fill(text, 32) for text in ASKED] if way == WAYS[0] else [])
        axes.set(xlabel="passage", title=f"by {way}")
        for row, answer in enumerate(ANSWERED_BY):
            for place, score in enumerate(scores[row]):
                light = score > 0.6 * scores.max()
                words: dict[str, Any] = {"ha": "center", "va": "center", "fontsize": 9}
                axes.text(place, row, f"{score:.2f}", color=style.BLACK if light else "white", **words)
            if answer is None:
                continue
            axes.add_patch(_frame(answer, row))
            found = _ranked(row, way)
            rank = f"as number {found.index(answer) + 1}" if answer in found else "not at all"
            told.append(f"“{ASKED[row]}” by {way}: {rank}")
    return style.alt(
        fig,
        "The scores of seven passages for five questions, by words and by meaning, with a frame around the one that "
        f"holds the answer. It is found: {'; '.join(told)}. For the last question no passage holds the answer.",
    )


def _frame(x: int, y: int) -> Any:
    from matplotlib.patches import Rectangle

    return Rectangle((x - 0.47, y - 0.47), 0.94, 0.94, fill=False, edgecolor=style.ORANGE, linewidth=3)


def shelf_explorer() -> Any:
    """The shelf with a question, a way to search and k to choose. Tab to each, then use the arrow keys.

    Returns the widget, to be left as the last line of a cell; works with ipywidgets 7 and 8.
    """
    import ipywidgets as widgets

    wide = widgets.Layout(width="min(36em, 95%)")
    question = widgets.Dropdown(
        options=[(text, number) for number, text in enumerate(ASKED)], description="question", layout=wide
    )
    way = widgets.Dropdown(options=list(WAYS), description="search by", layout=wide)
    k = widgets.IntSlider(value=2, min=1, max=5, description="k", continuous_update=False, layout=wide)
    return style.moving(shelf_picture, question, way, k)


# what the student's code did

COUNTING = (
    "one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen seventeen "
    "eighteen nineteen twenty twenty-one twenty-two twenty-three twenty-four twenty-five twenty-six twenty-seven "
    "twenty-eight twenty-nine thirty"
)


def chunk_picture(candidate: Callable[..., Any], size: int = 9, overlap: int = 3) -> style.Picture:
    """The chunks that a student makes of a text of thirty words that count themselves, each as a row of its words."""
    words = COUNTING.split()
    answer, trouble = _attempt(lambda: candidate(COUNTING, size, overlap))
    pieces = answer if isinstance(answer, (list, tuple)) and all(isinstance(piece, str) for piece in answer) else []
    fig, (axes,) = style.figure(width=10, height=0.42 * max(3, len(pieces)) + 1.0)
    if not pieces:
        style.say(axes, f"your chunk\n{trouble or 'is no list of strings with something in it'}")
        return style.alt(fig, f"Your chunk gave nothing to draw: {trouble or 'no list of strings'}.")
    told, before, covered = [], set[int](), set[int]()
    for row, piece in enumerate(pieces):
        numbers = [words.index(word) if word in words else None for word in piece.split()]
        here = {number for number in numbers if number is not None}
        for number in sorted(here):
            colour = style.ORANGE if number in before else style.SKY
            axes.barh(row, 0.94, left=number + 0.03, height=0.8, color=colour)
            axes.text(number + 0.5, row, str(number + 1), ha="center", va="center", fontsize=8)
        strange = len(numbers) - len([number for number in numbers if number is not None])
        told.append(
            f"{_span(here)}{f' and {strange} that are no words of the text' if strange else ''}, "
            f"{len(here & before)} of them in the one before"
        )
        before, covered = here, covered | here
    axes.set(xlim=(0, len(words)), ylim=(len(pieces) - 0.4, -0.6), xlabel="word of the text")
    axes.set_yticks(range(len(pieces)), [f"chunk {number}" for number in range(1, len(pieces) + 1)])
    axes.set_title(f"size {size}, overlap {overlap}; orange: also in the chunk above", loc="left")
    axes.grid(False)
    lost = set(range(len(words))) - covered
    return style.alt(
        fig,
        f"Your {len(pieces)} chunks of a text of {len(words)} words, size {size}, overlap {overlap}: "
        f"{'; '.join(f'chunk {number} holds {what}' for number, what in enumerate(told, start=1))}. "
        f"In no chunk: {_span(lost) if lost else 'nothing'}.",
    )


def _span(numbers: set[int]) -> str:
    if not numbers:
        return "no words"
    first, last = min(numbers) + 1, max(numbers) + 1
    together = len(numbers) == last - first + 1
    return f"words {first} to {last}" if together else f"{len(numbers)} words between {first} and {last}"


def pool_picture(candidate: Callable[..., Any], longest: int = 24) -> style.Picture:
    """What padding does to a student's vectors: the cosine with the vector without padding, and the length."""
    generator = torch.Generator().manual_seed(3)
    lengths = (2, 5, 9)
    texts = [torch.randn(n, 32, generator=generator) + torch.randn(1, 32, generator=generator) for n in lengths]
    junk = torch.randn(longest, 32, generator=generator) + 1.0
    fig, (turned, long) = style.figure(1, 2, width=4.9, height=3.3)
    pads, told = range(0, longest + 1, 2), []
    for tokens, text in zip(lengths, texts, strict=True):
        answer, trouble = _attempt(partial(_padded, candidate, text, junk, pads))
        rows = _numbers(answer, (len(pads), 32))
        if rows is None:
            style.say(turned, f"your pool\n{trouble or 'is no tensor (n, d)'}")
            style.say(long, "nothing to draw yet")
            return style.alt(fig, f"Your pool gave nothing to draw: {trouble or 'no tensor of the right shape'}.")
        cosines = torch.cosine_similarity(rows, rows[:1], dim=1)
        norms = rows.norm(dim=1)
        turned.plot(pads, cosines, "o-", label=f"text of {tokens} tokens")
        long.plot(pads, norms, "o-")
        told.append(f"of the text of {tokens} tokens falls to {cosines.min():.2f}, its length is {norms[-1]:.2f}")
    turned.set(xlabel="tokens of padding", title="cosine with the same text alone")
    turned.set_ylim(min(0.8, turned.get_ylim()[0]), 1.02)
    turned.legend(loc="lower left")
    long.set(xlabel="tokens of padding", title="length of the vector", ylim=(0, None))
    return style.alt(
        fig,
        f"Your vectors of three texts with up to {longest} tokens of padding. The cosine with the vector without "
        f"padding {'; that '.join(told)}. Padding should change nothing: cosine 1 and length 1 throughout.",
    )


def _padded(candidate: Callable[..., Any], text: Tensor, junk: Tensor, pads: Sequence[int]) -> Tensor:
    """One row for each amount of padding: what the student's pool makes of this text in a batch with a longer one."""
    rows = []
    for pad in pads:
        hidden = torch.cat([text, junk[:pad]])
        mask = (torch.arange(len(hidden)) < len(text)).long()
        rows.append(candidate(hidden[None].clone(), mask[None].clone())[0])
    return torch.stack(rows)


# Twelve documents and two queries in the plane, of different lengths, and which three are nearest by angle.
DOCUMENTS = torch.tensor(
    [
        (2.9, 0.4), (1.1, 0.5), (0.5, 0.3), (2.3, 1.9), (0.9, 0.9), (1.3, 2.6),
        (0.2, 0.6), (-0.5, 1.4), (-1.6, 2.1), (-0.6, 0.4), (-2.2, 0.6), (3.0, 1.1),
    ]
)  # fmt: skip
QUERIES = torch.tensor([(1.0, 0.56), (-0.4, 0.5)])
NEAREST = ((2, 1, 11), (8, 9, 7))


def search_picture(candidate: Callable[..., Any]) -> style.Picture:
    """The three documents that a student's top_k finds for each of two queries, in the plane."""
    answer, trouble = _attempt(lambda: candidate(QUERIES.clone(), DOCUMENTS.clone(), 3))
    indices = answer[1] if isinstance(answer, (tuple, list)) and len(answer) == 2 else None
    whole = isinstance(indices, Tensor) and indices.shape == (2, 3) and not indices.is_floating_point()
    rows: list[list[int]] = indices.tolist() if isinstance(indices, Tensor) and whole else []
    fig, panels = style.figure(1, 2, width=4.9, height=3.7)
    if not rows or any(place not in range(len(DOCUMENTS)) for row in rows for place in row):
        style.say(panels[0], f"your top_k\n{trouble or 'does not give indices (queries, k) of documents'}")
        style.say(panels[1], "nothing to draw yet")
        return style.alt(fig, f"Your top_k gave nothing to draw: {trouble or 'no indices (2, 3) of documents'}.")
    told = []
    for number, (axes, query) in enumerate(zip(panels, QUERIES, strict=True)):
        found = rows[number]
        axes.plot([0, 3.4 * float(query[0])], [0, 3.4 * float(query[1])], color=style.VERMILION, label="query")
        for place, (x, y) in enumerate(DOCUMENTS.tolist()):
            inside = place in found
            axes.plot([0, x], [0, y], color=style.BLUE if inside else style.GREY, linewidth=2 if inside else 0.6)
            axes.plot(x, y, "o", color=style.BLUE if inside else style.GREY, markersize=8 if inside else 5)
            if inside:
                label = str(found.index(place) + 1)
                axes.annotate(label, (x, y), textcoords="offset points", xytext=(6, 5), fontweight="bold")
        axes.set(xlim=(-2.5, 3.3), ylim=(-0.15, 2.9), aspect="equal", title=f"query {number + 1}")
        axes.legend(loc="upper left" if number == 0 else "upper right")
        same = "the three nearest by angle" if found == list(NEAREST[number]) else "not the three nearest by angle"
        told.append(f"for query {number + 1} documents {', '.join(str(place + 1) for place in found)}, {same}")
    return style.alt(
        fig,
        f"Twelve documents as arrows of different lengths, and a ray for each query. Your top_k finds, best first: "
        f"{'; '.join(told)}. Length must not matter.",
    )


def bm25_picture(candidate: Callable[..., Any]) -> style.Picture:
    """How a student's score grows with the times that a document says a word, and falls with the document's length."""
    times = [["heron"] * n + ["reed"] * (24 - n) for n in range(13)]
    lengths = range(4, 81, 4)
    sized = [["heron"] + ["reed"] * (length - 1) for length in lengths]
    fig, (often, long) = style.figure(1, 2, width=4.9, height=3.3)
    told = []
    for k1 in (0.5, 1.5, 5.0):
        answer, trouble = _attempt(partial(_call, candidate, ["heron"], times, k1, 0.0))
        scores = _numbers(answer, (len(times),))
        if scores is None:
            style.say(often, f"your bm25\n{trouble or 'is no tensor (documents,)'}")
            style.say(long, "nothing to draw yet")
            return style.alt(fig, f"Your bm25 gave nothing to draw: {trouble or 'no tensor of the right shape'}.")
        often.plot(range(len(times)), scores, "o-", label=f"k1 = {k1:g}")
        ratio = float(scores[-1] / scores[1]) if scores[1] else float("nan")
        told.append(f"with k1 = {k1:g} saying the word 12 times is worth {ratio:.1f} times as much as saying it once")
    for b in (0.0, 0.75, 1.0):
        answer, trouble = _attempt(partial(_call, candidate, ["heron"], sized, 1.5, b))
        scores = _numbers(answer, (len(sized),))
        if scores is not None:
            long.plot(lengths, scores, label=f"b = {b:g}")
            ratio = float(scores[0] / scores[-1]) if scores[-1] else float("nan")
            told.append(f"with b = {b:g} a document of 4 words gets {ratio:.1f} times as much as one of 80")
    often.set(xlabel="times that the document says the word", title="score, b = 0")
    often.legend(loc="lower right")
    long.set(xlabel="length of a document that says it once", title="score, k1 = 1.5", ylim=(0, None))
    long.legend(loc="upper right")
    return style.alt(fig, f"Your BM25 scores of documents that hold one word of the query: {'; '.join(told)}.")


RANKINGS = ([3, 0, 5, 1], [0, 4, 3, 2, 5])
LETTERS = "ABCDEF"


def fuse_picture(candidate: Callable[..., Any]) -> style.Picture:
    """Two rankings of six passages and what a student's fuse makes of them, joined by lines."""
    answer, trouble = _attempt(lambda: candidate([list(ranking) for ranking in RANKINGS]))
    given = answer[0] if isinstance(answer, (tuple, list)) and len(answer) == 2 else None
    given = given.tolist() if isinstance(given, Tensor) else given
    ids = list(given) if isinstance(given, (tuple, list)) else []
    fig, (axes,) = style.figure(width=6.4, height=3.5)
    if not ids or not all(isinstance(id, int) and 0 <= id < len(LETTERS) for id in ids):
        style.say(axes, f"your fuse\n{trouble or 'does not give (ids, scores)'}")
        return style.alt(fig, f"Your fuse gave nothing to draw: {trouble or 'no pair of ids and scores'}.")
    columns = [RANKINGS[0], ids, RANKINGS[1]]
    for id in range(len(LETTERS)):
        marks = {"color": style.CYCLE[id], "marker": "o", "markersize": 20}
        for left, right in ((0, 1), (1, 2)):
            if id in columns[left] and id in columns[right]:
                at = [columns[left].index(id) + 1, columns[right].index(id) + 1]
                axes.plot([left, right], at, color=style.CYCLE[id])
        for column, ranking in enumerate(columns):
            if id in ranking:
                axes.plot(column, ranking.index(id) + 1, **marks)
                words: dict[str, Any] = {"ha": "center", "va": "center", "fontweight": "bold", "color": "white"}
                axes.text(column, ranking.index(id) + 1, LETTERS[id], **words)
    axes.set_xticks(range(3), ["by words", "fused", "by meaning"])
    axes.set(ylabel="rank", xlim=(-0.4, 2.4), ylim=(len(LETTERS) + 0.6, 0.4))
    return style.alt(
        fig,
        f"Two rankings of six passages, {_letters(RANKINGS[0])} by words and {_letters(RANKINGS[1])} by meaning. Your "
        f"fused ranking is {_letters(ids)}.",
    )


def _letters(ids: Sequence[int]) -> str:
    return " ".join(LETTERS[id] for id in ids)


BUDGETS = range(30, 131, 5)


def prompt_picture(candidate: Callable[..., Any], shown: int = 75) -> style.Picture:
    """The length of the prompts that a student's assemble writes under budgets from small to large, and one of them."""
    passages = [{"text": text} for text in SHELF]
    instruction = "Answer from the sources below, in a few words."
    tokens, taken, example, trouble = [], [], "", ""
    for budget in BUDGETS:
        answer, trouble = _attempt(
            partial(_call, candidate, ASKED[0], [dict(row) for row in passages], budget, _words, instruction)
        )
        if not isinstance(answer, (tuple, list)) or len(answer) != 2 or not isinstance(answer[0], str):
            trouble = trouble or "does not give (prompt, used)"
            break
        tokens.append(_words(answer[0]))
        taken.append(len(answer[1]) if hasattr(answer[1], "__len__") else 0)
        example = answer[0] if budget == shown else example
    fig, (stairs, prompt) = style.figure(1, 2, width=5.4, height=3.7, width_ratios=[1, 1.1])
    if len(tokens) < len(BUDGETS):
        style.say(stairs, f"your assemble\n{trouble}")
        style.say(prompt, "nothing to draw yet")
        return style.alt(fig, f"Your assemble gave nothing to draw: {trouble}.")
    stairs.plot(BUDGETS, BUDGETS, ":", color=style.GREY, label="the budget")
    stairs.step(BUDGETS, tokens, where="post", color=style.BLUE, label="your prompt")
    stairs.set(xlabel="budget, tokens", ylabel="tokens in the prompt")
    stairs.legend(loc="upper left")
    _write(prompt, f"your prompt for a budget of {shown}", example)
    over = [budget for budget, used in zip(BUDGETS, tokens, strict=True) if used > budget]
    return style.alt(
        fig,
        f"Tokens in your prompt for budgets from {BUDGETS[0]} to {BUDGETS[-1]}: a staircase from {tokens[0]} tokens "
        f"with {taken[0]} passages to {tokens[-1]} tokens with {taken[-1]}. "
        f"Over the budget: {f'{len(over)} of {len(tokens)} prompts' if over else 'none'}.",
    )


def _words(text: str) -> int:
    """A count of tokens for pictures: words, numbers and marks."""
    import re

    return len(re.findall(r"\w+|[^\w\s]", text))


# what was measured


def bars_with_intervals(
    axes: Axes, labels: Sequence[str], groups: Mapping[str, Sequence[tuple[float, float, float]]]
) -> None:
    """Groups of bars side by side, each bar with its interval: for each name (value, low, high), one for each label."""
    width = 0.8 / len(groups)
    places = np.arange(len(labels))
    for number, (name, values) in enumerate(groups.items()):
        middle, low, high = (np.array(part, dtype=float) for part in zip(*values, strict=True))
        at = places + (number - (len(groups) - 1) / 2) * width
        axes.bar(at, middle, width * 0.92, color=style.CYCLE[number], label=name)
        whiskers: dict[str, Any] = {"fmt": "none", "ecolor": style.BLACK, "elinewidth": 1.2, "capsize": 3}
        axes.errorbar(at, middle, [np.maximum(0, middle - low), np.maximum(0, high - middle)], **whiskers)
    axes.set_xticks(places, labels)
    axes.set_ylim(0, 1.05)


class Card:
    """A question, what was found for it, the prompt and the answer: real text in a page, and in plain text too."""

    def __init__(self, found: Mapping[str, Any]):
        self.found = found

    def _repr_html_(self) -> str:
        found = self.found
        if "trouble" in found:
            return f"<p>{escape(found['trouble'])}</p>"
        head = "".join(f'<th scope="col" style="text-align:left">{escape(name)}</th>' for name in found["columns"])
        rows = "".join(
            "<tr>" + "".join(f'<td style="text-align:left">{escape(cell)}</td>' for cell in row) + "</tr>"
            for row in found["rows"]
        )
        return (
            f"<p><b>{escape(found['question'])}</b></p>"
            f"<table><caption>{escape(found['caption'])}</caption><thead><tr>{head}</tr></thead>"
            f"<tbody>{rows}</tbody></table>"
            f'<details><summary>the prompt, {found["tokens"]} tokens</summary><pre style="white-space:pre-wrap">'
            f"{escape(found['prompt'])}</pre></details>"
            f"<p>answer: <b>{escape(found['answer'] or '(nothing)')}</b></p>"
        )

    def __repr__(self) -> str:
        found = self.found
        if "trouble" in found:
            return str(found["trouble"])
        rows = [" | ".join(row) for row in (found["columns"], *found["rows"])]
        prompt = f"the prompt, {found['tokens']} tokens:\n{textwrap.indent(found['prompt'], '    ')}"
        return "\n".join(
            [found["question"], found["caption"], *rows, prompt, f"answer: {found['answer'] or '(nothing)'}"]
        )

    def _repr_mimebundle_(self, include: object = None, exclude: object = None) -> dict[str, str]:
        return {"text/html": self._repr_html_(), "text/plain": repr(self)}


def asked(ask: Callable[[str, str, int], Mapping[str, Any]], question: str, method: str, k: int) -> Card:
    """What ask(question, method, k) found, as a card.

    ask returns "columns" and "rows" (texts, one row a passage), "caption", "prompt", "tokens" and "answer". A blank
    question, and an error of ask, become a sentence on the card: a widget has nowhere else to show them.
    """
    if not question.strip():
        return Card({"trouble": "Type a question and press Enter."})
    try:
        return Card({"question": question.strip(), **ask(question.strip(), method, k)})
    except Exception as error:  # whatever goes wrong belongs on the card
        return Card({"trouble": f"{type(error).__name__}: {error}"})


def ask_box(
    ask: Callable[[str, str, int], Mapping[str, Any]], question: str, methods: Sequence[str], most: int = 5
) -> Any:
    """A field for a question with a method and k to choose, above what was found. Press Enter to ask.

    Returns the widget, to be left as the last line of a cell; works with ipywidgets 7 and 8.
    """
    import ipywidgets as widgets

    wide = widgets.Layout(width="min(44em, 95%)")
    typed = widgets.Text(value=question, description="question", continuous_update=False, layout=wide)
    method = widgets.Dropdown(options=list(methods), value=methods[-1], description="search by", layout=wide)
    k = widgets.IntSlider(value=1, min=1, max=most, description="k", continuous_update=False, layout=wide)
    draw: Any = partial(asked, ask)  # a Card is shown as a Picture is
    return style.moving(draw, typed, method, k)


def _write(axes: Axes, title: str, text: str, width: int = 52) -> None:
    """A text in a panel, in lines that fit."""
    lines = [line for part in text.split("\n") for line in (textwrap.wrap(part, width) or [""])]
    axes.set_axis_off()
    axes.set_title(title, loc="left")
    words: dict[str, Any] = {"va": "top", "family": "monospace", "transform": axes.transAxes}
    axes.text(0, 0.98, "\n".join(lines), fontsize=9 if len(lines) <= 20 else 7, **words)


def _numbers(answer: Any, shape: tuple[int, ...]) -> Tensor | None:
    """The answer as a float32 tensor if it is one of this shape, else None."""
    if not isinstance(answer, Tensor) or answer.shape != shape or not answer.is_floating_point():
        return None
    return answer.detach().float()


def _call(candidate: Callable[..., Any], *arguments: Any) -> Any:
    return candidate(*arguments)


def _attempt(answer: Callable[[], Any]) -> tuple[Any, str]:
    """Run a student's code and return (result, ""), or (None, what went wrong in words)."""
    try:
        with torch.random.fork_rng(devices=[]), time_limit(PATIENCE):
            return answer(), ""
    except NotImplementedError:
        return None, "is not written yet"
    except TimeUp:
        return None, f"did not end within {PATIENCE} seconds"
    except Exception as error:  # any fault of an answer belongs in the picture
        return None, f"raised {type(error).__name__}"
