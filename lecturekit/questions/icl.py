"""Three of the in-context learning questions of lab 11: the prompt, its shots, and contextual calibration.

Brown et al. 2020 (GPT-3), §2.1; Zhao et al. 2021, "Calibrate Before Use: Improving Few-Shot Performance of Language
Models". What a student writes:
    build_prompt(instruction, shots, query, labels) → text
    draw_shots(rows, k, query, seed) → list of rows
    calibrate(scores, content_free) → probabilities
"""

from __future__ import annotations

import itertools
import random
from collections import Counter
from typing import Any

import torch

from lecturekit.checking import Case, Draw, Unfit, question
from lecturekit.checking.compare import describe

LAB = "lab11_prompting"
SLIDE = "In-context learning: zero-shot and few-shot"
EPS = torch.finfo(torch.float32).eps

WORDS = (
    "amber badge candle desert engine fabric garden hammer island jacket kitten ladder marble needle orange pencil "
    "quarry ribbon saddle timber urchin violet walnut yellow zipper anchor basket copper donkey embers falcon goblet"
).split()


def _words(draw: Draw, count: int) -> list[str]:
    """Different words in a drawn order."""
    return [WORDS[place] for place in draw.permutation(len(WORDS))[:count].tolist()]


# icl.prompt ----------------------------------------------------------------------------------------------------------


@question("icl.prompt", lab=LAB, points=10, slide=SLIDE, returns=("characters of the prompt",))
def prompt(draw: Draw) -> Case:
    """A zero-shot and a few-shot prompt."""
    edge = draw.edge("no shots", "no instruction", "other labels", "neither instruction nor shots", "one shot")
    count = {"no shots": 0, "neither instruction nor shots": 0, "one shot": 1}.get(edge, draw.integer(2, 4))
    words = _words(draw, 2 * count + 5)
    labels = draw.choice([("Review", "Label"), ("Q", "A"), ("Word", "Opposite")])
    return Case(
        edge,
        instruction="" if edge and "instruction" in edge else f"{words[0].title()} the {words[1]} of each {words[2]}.",
        shots=[(f"the {words[5 + 2 * i]}", words[6 + 2 * i]) for i in range(count)],
        query=f"{words[3]} {words[4]}",
        labels=labels if edge == "other labels" else ("Input", "Output"),
    )


prompt.oracle("lecturekit.prompting.icl:build_prompt")


def _query_last(case: Case, parts: dict[str, Any]) -> bool:
    text = parts["characters of the prompt"]
    return text.count(case.query) == 1 and all(text.index(x) < text.index(case.query) for x, _ in case.shots)


prompt.law(
    "the prompt ends where the answer's space begins",
    lambda case, parts: parts["characters of the prompt"].endswith(f"\n{case.labels[1]}:"),
)
prompt.law("the query stands in the prompt once, behind all shots", _query_last)


def _prompt(instruction, shots, query, labels, gap="\n\n"):
    """The prompt in parts that are joined by a blank line: what the misconceptions start from."""
    first, second = labels
    parts = [f"{first}: {x}\n{second}: {y}" for x, y in shots]
    parts.append(f"{first}: {query}\n{second}:")
    return gap.join(([instruction] if instruction else []) + parts)


@prompt.misconception(
    "ends in a space",
    hint="The model's words carry their space in front: ' cold' is one token. Who should write the space, you or it?",
)
def _(instruction, shots, query, labels=("Input", "Output")):
    return _prompt(instruction, shots, query, labels) + " "


@prompt.misconception("ends in a newline", hint="In the shots, what stands right behind the second label's colon?")
def _(instruction, shots, query, labels=("Input", "Output")):
    return _prompt(instruction, shots, query, labels) + "\n"


@prompt.misconception(
    "does not use the labels it is given", hint="Print your prompt with labels ('Q', 'A'). Which words are in it?"
)
def _(instruction, shots, query, labels=("Input", "Output")):
    return _prompt(instruction, shots, query, ("Input", "Output"))


@prompt.misconception("turns the two labels round", hint="Which of the two labels stands in front of the query?")
def _(instruction, shots, query, labels=("Input", "Output")):
    return _prompt(instruction, shots, query, labels[::-1])


@prompt.misconception("shows the shots in reverse", hint="Print the shots and the prompt. Do they come in one order?")
def _(instruction, shots, query, labels=("Input", "Output")):
    return _prompt(instruction, shots[::-1], query, labels)


@prompt.misconception(
    "turns input and output of the shots round",
    hint="A shot is (x, y). Which of them is the input that is shown first?",
)
def _(instruction, shots, query, labels=("Input", "Output")):
    return _prompt(instruction, [(y, x) for x, y in shots], query, labels)


@prompt.misconception(
    "leaves no blank line between the shots",
    hint="Where does one example end and the next begin? Count the newlines in front of the second 'Input'.",
)
def _(instruction, shots, query, labels=("Input", "Output")):
    examples = _prompt("", shots, query, labels, gap="\n")
    return f"{instruction}\n\n{examples}" if instruction else examples


@prompt.misconception(
    "leaves no blank line behind the instruction", hint="What separates the instruction from the first example?"
)
def _(instruction, shots, query, labels=("Input", "Output")):
    examples = _prompt("", shots, query, labels)
    return f"{instruction}\n{examples}" if instruction else examples


@prompt.misconception(
    "leaves no blank line anywhere",
    hint="Where does the instruction end, and where each example? Count the newlines between any two of the parts.",
)
def _(instruction, shots, query, labels=("Input", "Output")):
    return _prompt(instruction, shots, query, labels, gap="\n")


@prompt.misconception(
    "leaves the instruction out", hint="Print a prompt and its instruction. With which words does the prompt begin?"
)
def _(instruction, shots, query, labels=("Input", "Output")):
    return _prompt("", shots, query, labels)


@prompt.misconception(
    "leaves a blank line where the instruction would be",
    hint="Print repr() of a prompt without an instruction. With which character does it begin?",
)
def _(instruction, shots, query, labels=("Input", "Output")):
    return f"{instruction}\n\n" + _prompt("", shots, query, labels)


@prompt.misconception(
    "puts the query in front of the shots", hint="The model continues the end of the text. What is it?"
)
def _(instruction, shots, query, labels=("Input", "Output")):
    first, second = labels
    parts = [f"{first}: {query}\n{second}:"] + [f"{first}: {x}\n{second}: {y}" for x, y in shots]
    return "\n\n".join(([instruction] if instruction else []) + parts)


@prompt.misconception("does not ask for the output", hint="After the query's line, how does the model know what comes?")
def _(instruction, shots, query, labels=("Input", "Output")):
    return _prompt(instruction, shots, query, labels).removesuffix(f"\n{labels[1]}:")


@prompt.misconception(
    "leaves the shots' space out", hint="Compare 'Output:cold' with 'Output: cold'. Which of them is asked for?"
)
def _(instruction, shots, query, labels=("Input", "Output")):
    first, second = labels
    parts = [f"{first}:{x}\n{second}:{y}" for x, y in shots] + [f"{first}:{query}\n{second}:"]
    return "\n\n".join(([instruction] if instruction else []) + parts)


@prompt.misconception("leaves the shots out", hint="Few-shot: where in your prompt does the model see an example?")
def _(instruction, shots, query, labels=("Input", "Output")):
    return _prompt(instruction, [], query, labels)


@prompt.alternative("one string, piece by piece")
def _(instruction, shots, query, labels=("Input", "Output")):
    text = ""
    if instruction != "":
        text += instruction + "\n\n"
    for x, y in shots:
        text += labels[0] + ": " + x + "\n" + labels[1] + ": " + y + "\n\n"
    return text + labels[0] + ": " + query + "\n" + labels[1] + ":"


@prompt.alternative("the query as a shot without an output, stripped")
def _(instruction, shots, query, labels=("Input", "Output")):
    a, b = labels
    blocks = [f"{a}: {x}\n{b}: {y}".rstrip() for x, y in [*shots, (query, "")]]
    return "\n\n".join(filter(None, [instruction, *blocks]))


@prompt.alternative("a list of lines")
def _(task, examples, question_text, names):
    lines = [task, ""] if task else []
    for example in examples:
        lines += [names[0] + ": " + example[0], names[1] + ": " + example[1], ""]
    lines += [names[0] + ": " + question_text, names[1] + ":"]
    return "\n".join(lines)


# icl.shots -----------------------------------------------------------------------------------------------------------

DRAWS = 60
"""How many seeds a draw is tried with. The rarest of what should happen under some seed is that a row comes which
stands among 4 of one label, of which one is shown: that it does not, 60 times over, has 3 chances in 100 million."""


@question("icl.shots", lab=LAB, points=10, slide=SLIDE, cases=8)
def shots(draw: Draw) -> Case:
    """Shots for a query: drawn, balanced, in random order, never the query itself."""
    edge = draw.edge(
        "three labels",
        "a label with one row",
        "the query stands there twice",
        "every row has its own label",
        "k = 0",
        "the query is not among the rows",
    )
    words = _words(draw, 16)
    names = ["positive", "negative", "neutral"] if edge == "three labels" else ["positive", "negative"]
    labels = [names[place] for place in draw.permutation(len(names)).tolist()] * 6
    k = {"three labels": 5, "k = 0": 0}.get(edge, draw.choice([4, 5, 6]))
    if edge == "a label with one row":
        labels = [labels[0], *[labels[1]] * 9]
    elif edge == "every row has its own label":
        labels = words[12:] + [word.title() for word in words[:8]]
    else:
        labels = labels[:12]
    rows = [(words[place], label) for place, label in enumerate(labels)]
    query = words[draw.integer(2, len(rows) - 1)]
    if edge == "the query is not among the rows":
        query = labels[0]  # though it is among the labels
    elif edge == "the query stands there twice":
        rows.append((query, labels[words.index(query) - 1]))  # with the other label
    rows = [rows[place] for place in draw.permutation(len(rows)).tolist()]
    return Case(edge, rows=rows, k=k, query=query, seeds=draw.integers(0, 10**6, DRAWS).tolist())


shots.oracle("lecturekit.prompting.icl:draw_shots")


def _is_pair(row: Any) -> bool:
    return isinstance(row, tuple) and all(isinstance(part, str) for part in row)


def _drawn(function: Any, case: Case, seed: int) -> Any:
    rows = list(case.rows)
    found = function(rows, case.k, case.query, seed)
    if rows != case.rows:
        raise Unfit(
            "the input rows was changed in place; work on a copy: the next draw needs all of them, as they stood"
        )
    return found


@shots.driver
def _(function: Any, case: Case) -> dict[str, Any]:
    """Many seeds, and of the shots only what does not depend on whose random numbers they are."""
    draws = []
    for seed in case.seeds:
        found = _drawn(function, case, seed)
        if not isinstance(found, (list, tuple)):
            raise Unfit(f"the result must be a list of rows (x, label), got {describe(found)}")
        drawn = [tuple(row) if isinstance(row, list) else row for row in found]
        strange = next((row for row in drawn if not _is_pair(row) or row not in case.rows), None)
        if strange is not None:
            raise Unfit(f"every shot must be one of the rows, (x, label) as it stands there, got {describe(strange)}")
        draws.append(drawn)
    again = [_drawn(function, case, seed) for seed in case.seeds[:5]]
    sizes = {len(drawn) for drawn in draws}
    counts = {tuple(sorted(Counter(label for _, label in drawn).values())) for drawn in draws}
    neighbours = [[(a[1], b[1]) for a, b in itertools.pairwise(drawn)] for drawn in draws]
    # a label comes in one block if the shots change label as often as there are further labels
    blocks = [sum(a != b for a, b in pairs) for pairs in neighbours]
    further = [len({label for _, label in drawn}) - 1 for drawn in draws]
    twice = any(count > 1 for one in counts for count in one)
    orders = {pair for drawn in draws for pair in itertools.combinations(drawn, 2)}
    return {
        "numbers of shots": str(*sizes) if len(sizes) == 1 else "not the same for all seeds",
        "shots of each label": " + ".join(map(str, *counts)) if len(counts) == 1 else "not the same for all seeds",
        "the query is never a shot": all(x != case.query for drawn in draws for x, _ in drawn),
        "no row is shown twice": all(len(set(drawn)) == len(drawn) for drawn in draws),
        "one seed draws the same shots each time": [[tuple(row) for row in drawn] for drawn in again] == draws[:5],
        "another seed draws others": len(set(map(tuple, draws))) > 1,
        "every row comes under some seed": {row for drawn in draws for row in drawn}
        >= {row for row in case.rows if row[0] != case.query},
        "labels come mixed, not in blocks": not twice or any(a > b for a, b in zip(blocks, further, strict=True)),
        "labels come mixed, not in turns": not twice or any(a == b for pairs in neighbours for a, b in pairs),
        "the order of the shots is drawn too": any((b, a) in orders for a, b in orders if a != b),
    }


shots.law(
    "labels differ by at most one shot",
    lambda case, parts: (
        None
        if case.label in ("a label with one row", "k = 0")
        else max(map(int, parts["shots of each label"].split(" + ")))
        - min(map(int, parts["shots of each label"].split(" + ")))
        <= 1
    ),
)


def _without(rows, query):
    return [row for row in rows if row[0] != query]


def _in_turns(rows, k, source):
    """Balanced, the labels in turn: what the misconceptions start from. source: seeded random numbers, or None."""
    piles = {}
    for row in rows:
        piles.setdefault(row[1], []).append(row)
    piles = list(piles.values())
    for pile in [*piles, piles] if source else []:
        source.shuffle(pile)
    turns = [row for turn in itertools.zip_longest(*piles) for row in turn if row is not None]
    return turns[:k]


def _mixed(rows, source):
    return source.sample(rows, len(rows))


@shots.misconception(
    "may show the query itself, with its answer",
    hint="If the query is among the rows, what can the model do instead of solving the task?",
)
def _(rows, k, query, seed):
    source = random.Random(seed)
    return _mixed(_in_turns(rows, k, source), source)


@shots.misconception(
    "takes the query out after drawing, and has a shot too few",
    hint="Count the shots under many seeds. In which of the two orders do you draw and leave out?",
)
def _(rows, k, query, seed):
    source = random.Random(seed)
    return _without(_mixed(_in_turns(rows, k, source), source), query)


@shots.misconception(
    "takes out only one of the rows with the query",
    hint="A text may stand in the rows twice. How many of its rows have you taken out?",
)
def _(rows, k, query, seed):
    source = random.Random(seed)
    first = next((row for row in rows if row[0] == query), None)
    return _mixed(_in_turns([row for row in rows if row is not first], k, source), source)


@shots.misconception(
    "leaves out rows whose label is the query too",
    hint="The query is “cold”. May (“hot”, “cold”) be shown before it? Which part of a row do you compare?",
)
def _(rows, k, query, seed):
    source = random.Random(seed)
    return _mixed(_in_turns([row for row in rows if query not in row], k, source), source)


@shots.misconception(
    "does not balance the labels",
    hint="Six shots, five of them positive: what does the model learn from that, beside the task?",
)
def _(rows, k, query, seed):
    return random.Random(seed).sample(_without(rows, query), k)


@shots.misconception(
    "draws k shots of every label", hint="How many shots are in your prompt altogether, and how many in k?"
)
def _(rows, k, query, seed):
    source = random.Random(seed)
    rows = _without(rows, query)
    chosen = []
    for label in sorted({row[1] for row in rows}):
        pile = [row for row in rows if row[1] == label]
        chosen += source.sample(pile, min(k, len(pile)))
    return _mixed(chosen, source)


@shots.misconception(
    "rounds down, and has a shot too few",
    hint="k = 5 and two labels: 5 // 2 is 2 of each. How many shots are that?",
)
def _(rows, k, query, seed):
    source = random.Random(seed)
    rows = _without(rows, query)
    labels = sorted({row[1] for row in rows})
    chosen = []
    for label in labels:
        pile = [row for row in rows if row[1] == label]
        chosen += source.sample(pile, min(k // len(labels), len(pile)))
    return _mixed(chosen, source)


@shots.misconception(
    "fails where a label has too few rows",
    hint="Give it ten rows of one label and one of the other. How many of the other do you ask for?",
)
def _(rows, k, query, seed):
    source = random.Random(seed)
    rows = _without(rows, query)
    labels = sorted({row[1] for row in rows})
    chosen = []
    for label in labels:
        chosen += source.sample([row for row in rows if row[1] == label], -(-k // len(labels)))
    return _mixed(chosen, source)[:k]


@shots.misconception(
    "does not let the other labels share the rest",
    hint="k = 6, two labels, but only one row of the first. How many of the second are needed, how many taken?",
)
def _(rows, k, query, seed):
    source = random.Random(seed)
    rows = _without(rows, query)
    labels = sorted({row[1] for row in rows})
    chosen = []
    for label in labels:
        pile = [row for row in rows if row[1] == label]
        chosen += source.sample(pile, min(len(pile), -(-k // len(labels))))
    return _mixed(chosen, source)[:k]


@shots.misconception(
    "gives the same labels one shot more, under every seed",
    hint="k = 5 and two labels: one of them is shown three times. Count under ten seeds: which one?",
)
def _(rows, k, query, seed):
    source = random.Random(seed)
    by_label = sorted(_mixed(_without(rows, query), source), key=lambda row: row[1])
    return _mixed(_in_turns(by_label, k, None), source)


@shots.misconception(
    "draws the remainder without looking at its labels",
    hint="k = 5 and three labels: one of each, and two more. May both of these have the same label?",
)
def _(rows, k, query, seed):
    source = random.Random(seed)
    rows = _without(rows, query)
    labels = sorted({row[1] for row in rows})
    chosen = []
    for label in labels:
        pile = [row for row in rows if row[1] == label]
        chosen += source.sample(pile, min(k // len(labels), len(pile)))
    left = [row for row in rows if row not in chosen]
    return _mixed(chosen + source.sample(left, k - len(chosen)), source)


@shots.misconception(
    "shows the shots sorted by label",
    hint="The last shots weigh most. What does the model see last, under every seed?",
)
def _(rows, k, query, seed):
    return sorted(_in_turns(_without(rows, query), k, random.Random(seed)), key=lambda row: row[1])


@shots.misconception(
    "shows the labels in turns",
    hint="positive, negative, positive, …: can the model guess the next label without reading the query?",
)
def _(rows, k, query, seed):
    return _in_turns(_without(rows, query), k, random.Random(seed))


@shots.misconception(
    "shows the shots in the order of the rows",
    hint="Which rows are shown is drawn. What about their order: by what is it decided?",
)
def _(rows, k, query, seed):
    return sorted(_in_turns(_without(rows, query), k, random.Random(seed)), key=rows.index)


@shots.misconception(
    "takes the first rows of each label, and draws only their order",
    hint="Collect the shots of a hundred seeds. Which rows are never among them?",
)
def _(rows, k, query, seed):
    return _mixed(_in_turns(_without(rows, query), k, None), random.Random(seed))


@shots.misconception(
    "does not use the seed", hint="Call it twice with one seed. Where do your random numbers come from?"
)
def _(rows, k, query, seed):
    return _mixed(_in_turns(_without(rows, query), k, random), random)


@shots.misconception(
    "draws the same whatever the seed", hint="Call it with seeds 1 and 2. Which seed do your random numbers start from?"
)
def _(rows, k, query, seed):
    source = random.Random(0)
    return _mixed(_in_turns(_without(rows, query), k, source), source)


@shots.misconception("may draw one row twice", hint="With replacement or without: which of the two does your draw do?")
def _(rows, k, query, seed):
    source = random.Random(seed)
    chosen = _in_turns(_without(rows, query), k, source)
    same_label = {label: [row for row in _without(rows, query) if row[1] == label] for _, label in chosen}
    return _mixed([source.choice(same_label[label]) for _, label in chosen], source)


@shots.alternative("piles of a shuffled pool, one row from each in turn")
def _(rows, k, query, seed):
    source = random.Random(seed)
    pool = [row for row in rows if row[0] != query]
    source.shuffle(pool)
    piles = {}
    for row in pool:
        piles.setdefault(row[1], []).append(row)
    chosen = []
    while len(chosen) < k:
        for label in list(piles):
            if piles[label] and len(chosen) < k:
                chosen.append(piles[label].pop())
    source.shuffle(chosen)
    return chosen


@shots.alternative("always the label that has the fewest shots so far, with torch's random numbers")
def _(rows, k, query, seed):
    generator = torch.Generator().manual_seed(seed)
    pool = [rows[i] for i in torch.randperm(len(rows), generator=generator).tolist() if rows[i][0] != query]
    chosen = []
    for _ in range(k):
        count = Counter(label for _, label in chosen)
        best = min(pool, key=lambda row: count[row[1]])
        pool.remove(best)
        chosen.append(best)
    return [chosen[i] for i in torch.randperm(k, generator=generator).tolist()]


@shots.alternative("ranks within the labels, seeding Python's own random numbers")
def _(rows, k, query, seed):
    random.seed(seed)
    pool = random.sample(rows, len(rows))
    seen, ranked = Counter(), []
    for row in pool:
        if row[0] == query:
            continue
        ranked.append((seen[row[1]], row))
        seen[row[1]] += 1
    ranked.sort(key=lambda pair: pair[0])
    picked = [row for _, row in ranked[:k]]
    random.shuffle(picked)
    return tuple(picked)


# icl.calibrate -------------------------------------------------------------------------------------------------------


@question("icl.calibrate", lab=LAB, points=10, slide=SLIDE)
def calibrate(draw: Draw) -> Case:
    """The labels' probabilities without the prompt's own bias."""
    edge = draw.edge(
        "a prompt without a bias", "a query that says nothing", "long labels", "one query", "the same up to a constant"
    )
    n, labels = draw.sizes(2, low=3, high=6)
    n = 1 if edge == "one query" else n
    content_free = draw.normal(labels, scale=2.0) - 3
    scores = content_free + draw.normal(n, labels, scale=1.5) - draw.uniform(n, 1)
    if edge == "a prompt without a bias":
        content_free = torch.full_like(content_free, draw.number(-4, -1))
    elif edge == "a query that says nothing":
        scores[0] = content_free
    elif edge == "long labels":
        scores, content_free = scores - 150, content_free - 150
    elif edge == "the same up to a constant":
        scores[1] = scores[0] - draw.number(1, 3)
    return Case(edge, scores=scores, content_free=content_free)


calibrate.oracle("lecturekit.prompting.icl:calibrate")
calibrate.tolerance(
    ulps=lambda case: 2 * case.scores.shape[1] + 12,
    magnitude=lambda case, expected: (
        expected.double()
        * (1 + case.scores.double().abs().amax(1, keepdim=True) + case.content_free.double().abs().amax())
    ),
    why="an exponent is off by roundings of the scores it was taken from, a probability by that times itself; then a "
    "sum over the labels and a division",
)


def _rows_add_up(case: Case, parts: dict[str, Any]) -> bool:
    sizes = 1 + case.scores.double().abs().amax(1) + case.content_free.double().abs().amax()
    return bool(((parts["result"].double().sum(1) - 1).abs() <= (2 * case.scores.shape[1] + 12) * EPS * sizes).all())


calibrate.law("the probabilities of a query's labels add up to 1", _rows_add_up)
calibrate.law(
    "a query that says nothing leaves all labels equally probable",
    lambda case, parts: (
        bool((parts["result"][0] * len(case.content_free) - 1).abs().max() < 1e-3)  # 24 roundings of numbers below 20
        if case.label == "a query that says nothing"
        else None
    ),
)
calibrate.law(
    "what is added to all scores of a query changes nothing",
    lambda case, parts: (
        bool((parts["result"][0] - parts["result"][1]).abs().max() < 1e-3)
        if case.label == "the same up to a constant"
        else None
    ),
)


@calibrate.misconception(
    "does not calibrate",
    hint="What does the model say when the query says nothing? Where is that used, and for each label by itself? One "
    "number taken off all scores of a query changes no probability.",
)
def _(scores, content_free):
    return scores.softmax(1)


@calibrate.misconception(
    "calibrates in the wrong direction: multiplies instead of dividing",
    hint="The prompt likes one label before any query. Should that label now become more probable, or less?",
)
def _(scores, content_free):
    return (scores + content_free).softmax(1)


@calibrate.misconception(
    "turns scores and bias round", hint="Look for the label with the highest score. Is its probability high or low?"
)
def _(scores, content_free):
    return (content_free - scores).softmax(1)


_SUM_HINT = "What do the probabilities of one query's labels add up to?"


@calibrate.misconception("does not normalise after dividing", hint=_SUM_HINT)
def _(scores, content_free):
    return (scores - content_free).exp()


@calibrate.misconception("does not normalise after dividing", hint=_SUM_HINT)  # of probabilities, which underflow
def _(scores, content_free):
    return scores.exp() / content_free.exp()


@calibrate.misconception("normalises before dividing, not after", hint=_SUM_HINT)
def _(scores, content_free):
    return scores.softmax(1) / content_free.softmax(0)


@calibrate.misconception(
    "divides log-probabilities",
    hint="You are to divide probabilities. Your inputs are logarithms: what does a division become there?",
)
def _(scores, content_free):
    return (scores / content_free).softmax(1)


@calibrate.misconception(
    "takes probabilities from log-probabilities", hint="Of what are the two inputs: of one kind? And what you subtract?"
)
def _(scores, content_free):
    return (scores - content_free.softmax(0)).softmax(1)


_RATIOS_HINT = "The ratios are probabilities up to a factor already. What makes them add up to 1 without another exp?"


@calibrate.misconception("takes another softmax of the ratios", hint=_RATIOS_HINT)
def _(scores, content_free):
    return (scores - content_free).exp().softmax(1)


@calibrate.misconception("takes another softmax of the ratios", hint=_RATIOS_HINT)  # as in the paper
def _(scores, content_free):
    return (scores.softmax(1) / content_free.softmax(0)).softmax(1)


@calibrate.misconception(
    "calibrates with the average of the batch instead of the content-free query",
    hint="Give it a single query. What is left of its answer, and whose bias did you take out?",
)
def _(scores, content_free):
    return (scores - scores.mean(0)).softmax(1)


@calibrate.misconception(
    "normalises over the queries", hint="Which dimension holds the labels of one query? Over which is your sum?"
)
def _(scores, content_free):
    return (scores - content_free).softmax(0)


@calibrate.misconception(
    "normalises over all queries together",
    hint="Print what you return, and its sum. How many queries share it? What should a row add up to?",
)
def _(scores, content_free):
    ratios = (scores - content_free).exp()
    return ratios / ratios.sum()


@calibrate.misconception(
    "returns logarithms of ratios",
    hint="A difference of logarithms is the logarithm of something. Can a probability be below 0?",
)
def _(scores, content_free):
    return scores - content_free


@calibrate.misconception("returns log-probabilities", hint="Should a row add up to 1, or its exp?")
def _(scores, content_free):
    return (scores - content_free).log_softmax(1)


@calibrate.misconception(
    "goes through probabilities, which underflow",
    hint="A long label has a log-probability of −150. What is its exp in float32, and a ratio of two of them?",
)
def _(scores, content_free):
    ratios = scores.exp() / content_free.exp()
    return ratios / ratios.sum(1, keepdim=True)


@calibrate.alternative("the largest difference subtracted, then a plain ratio")
def _(scores, bias):
    difference = scores - bias.unsqueeze(0)
    weights = (difference - difference.max(dim=1, keepdim=True).values).exp()
    return weights / weights.sum(dim=1, keepdim=True)


@calibrate.alternative("logsumexp")
def _(scores, content_free):
    difference = scores - content_free
    return torch.exp(difference - torch.logsumexp(difference, dim=-1, keepdim=True))


@calibrate.alternative("both normalised over the labels first, as in the paper, then divided and normalised")
def _(scores, content_free):
    p, bias = scores.softmax(dim=-1), content_free.softmax(dim=-1)
    ratios = p @ torch.diag(1 / bias)
    return ratios / ratios.sum(dim=-1, keepdim=True)


@calibrate.alternative("query by query, float64 inside")
def _(scores, content_free):
    rows = [torch.softmax(row.double() - content_free.double(), 0) for row in scores]
    return torch.stack(rows).to(scores.dtype)
