"""Make the prompting tasks from what is written in written/: antonyms, sentiment, mapping and arithmetic.

    python data/prompting_tasks/make.py        # checks what is written, writes the four tasks and SHA256SUMS

Words, reviews and story frames were written for this course; the script draws numbers, names, invented words and splits
with a fixed seed. It refuses what is malformed, written twice or nearly twice. The same seed gives the same bytes.
"""

from __future__ import annotations

import hashlib
import json
import random
import re
from collections import Counter
from itertools import combinations, product
from pathlib import Path
from typing import Any

SEED = 11
WRITTEN = Path(__file__).parent / "written"
Row = dict[str, Any]

TEST_PAIRS = {"adjective": 36, "verb": 20, "noun": 20, "adverb": 7}  # antonyms of each kind held out
LABELS = {"animal": "zorp", "tool": "vump", "food": "blick"}
SWAPPED = {"good": "negative", "bad": "positive"}
ARBITRARY = 120  # invented words, half of them held out
ROWS_OF_A_FRAME = {"bare": 8, "sum": 12, 1: 4, 2: 6, 3: 5}  # sum: stories of SUM; other stories by their steps
SUM = "a + b; r1 + c"  # the easiest two steps, where a small model can be seen to reason: more rows of these
SMALLEST, LARGEST = 1, 200  # every result of every step
DRAWS = 10_000  # of numbers for one problem, before its frame is refused
MOST_ALIKE = 0.20  # no two reviews or frames may share more than this fraction of their word triples (Jaccard)
NAMES = (
    "Amira Bo Carla Daan Elif Farid Greta Hugo Imani Jonas Keiko Luca Marta Nils Olga Pedro Rosa Sami Tomas Uma Wei"
).split()


def triples(text: str) -> set[tuple[str, ...]]:
    """All runs of three words of a text, in lower case and without punctuation."""
    words = re.findall(r"[a-z0-9']+", text.lower())
    return set(zip(words, words[1:], words[2:], strict=False))


def alike(one: set[tuple[str, ...]], other: set[tuple[str, ...]]) -> float:
    """Jaccard similarity of two sets of word triples, from 0 (nothing shared) to 1 (the same)."""
    return len(one & other) / max(1, len(one | other))


def nearest(texts: list[str]) -> tuple[float, str, str]:
    """The two most alike of these texts, and how alike they are."""
    words = [triples(text) for text in texts]
    most, one, other = max((alike(words[i], words[j]), i, j) for i, j in combinations(range(len(texts)), 2))
    return most, texts[one], texts[other]


def refuse_near_duplicates(what: str, texts: list[str]) -> None:
    """Raise ValueError when two of these texts are more alike than MOST_ALIKE."""
    most, one, other = nearest(texts)
    if most > MOST_ALIKE:
        raise ValueError(f"two {what} are {most:.0%} alike: {one!r} and {other!r}")


def sections(path: Path) -> list[tuple[str, list[str]]]:
    """The (heading, lines) of a written file, whose headings begin with '## '."""
    found: list[tuple[str, list[str]]] = []
    for line in path.read_text(encoding="utf-8").splitlines():
        if line.startswith("## "):
            found.append((line.removeprefix("## "), []))
        elif line:
            found[-1][1].append(line)
    return found


def related(one: str, other: str) -> bool:
    """Whether two words look like relatives: a word of four letters or more begins the other, or five letters do."""
    short, long = sorted((one, other), key=len)
    return (len(short) >= 4 and long.startswith(short)) or one[:5] == other[:5]


def antonyms(rng: random.Random, folder: Path = WRITTEN) -> list[Row]:
    """Words with their opposites and four wrong answers each. Raises ValueError for a pair that is none."""
    rows = []
    for kind, lines in sections(folder / "antonyms.txt"):
        for line in lines:
            pair, _, wrong = line.partition(" : ")
            words = [*pair.split(), *wrong.split()]
            if len(words) != 6 or len(set(words)) != 6:
                raise ValueError(f"antonyms.txt: {line!r} must be a word, its opposite and four other words")
            word, opposite, *candidates = words
            rows.append({"kind": kind, "input": word, "output": opposite, "candidates": rng.sample(candidates, 4)})
    # A word of a pair stands in no other row, not even as a wrong answer, and no relative of it in another pair.
    pairs = [word for row in rows for word in (row["input"], row["output"])]
    everywhere = Counter(word for row in rows for word in (row["input"], row["output"], *row["candidates"]))
    twice = [word for word in pairs if everywhere[word] > 1]
    for one, other in combinations(rows, 2):
        for word, second in product((one["input"], one["output"]), (other["input"], other["output"])):
            if related(word, second):
                twice += [word, second]
    if twice:
        raise ValueError(f"antonyms.txt: in more than one row, or with a relative in another pair: {', '.join(twice)}")
    held_out = set()
    for kind, count in TEST_PAIRS.items():
        held_out |= set(rng.sample([row["input"] for row in rows if row["kind"] == kind], count))
    return [{"split": "test" if row["input"] in held_out else "train", **row} for row in rows]


def sentiment(_: random.Random, folder: Path = WRITTEN) -> list[Row]:
    """Reviews, split by subject; nothing is drawn. Raises ValueError for a malformed line and for near-duplicates."""
    rows = []
    for heading, lines in sections(folder / "sentiment.txt"):
        subject, split = heading.split(" | ")
        for line in lines:
            mark, _, text = line.partition(" ")
            if mark not in ("+", "-", "+!", "-!") or not 10 <= len(text.split()) <= 30:
                raise ValueError(f"sentiment.txt, {subject}: {line!r} needs a mark (+ - +! -!) and 10 to 30 words")
            label = "positive" if mark[0] == "+" else "negative"
            rows.append(
                {"split": split, "subject": subject, "hard": mark.endswith("!"), "input": text, "output": label}
            )
    refuse_near_duplicates("reviews", [row["input"] for row in rows])
    return rows


def invented_words(rng: random.Random, count: int, taken: set[str]) -> list[str]:
    """Words of two syllables that mean nothing, no two of which share their first four letters."""
    words: dict[str, str] = {}
    while len(words) < count:
        syllables = [rng.choice("bgklmnprtvz") + rng.choice("aeiou") + rng.choice("bdlmnpxz") for _ in range(2)]
        word = "".join(syllables)
        if word not in taken:
            words.setdefault(word[:4], word)
    return list(words.values())


def mapping(rng: random.Random, folder: Path = WRITTEN) -> list[Row]:
    """Inputs whose labels no model can know: by a rule, at random, and exchanged. Half of each is held out."""
    rows = []
    for heading, lines in sections(folder / "mapping.txt"):
        kind, category = heading.split()
        inputs = ", ".join(lines).split(", ")
        held_out = set(rng.sample(inputs, len(inputs) // 2))
        label = {**LABELS, **SWAPPED}[category]
        for text in inputs:
            split = "test" if text in held_out else "train"
            rows.append({"split": split, "kind": kind, "category": category, "input": text, "output": label})
    words = invented_words(rng, ARBITRARY, {row["input"] for row in rows})
    labels = list(LABELS.values())
    for number, word in enumerate(words):  # drawn in random order, so the label says nothing about the word
        split = "train" if number < ARBITRARY // 2 else "test"
        label = labels[number % len(labels)]
        rows.append({"split": split, "kind": "arbitrary", "category": "none", "input": word, "output": label})
    twice = [text for text, count in Counter(row["input"] for row in rows).items() if count > 1]
    if twice:
        raise ValueError(f"mapping.txt: written twice: {', '.join(twice)}")
    return rows


def compute(left: int, operator: str, right: int) -> int | None:
    """One step of arithmetic; None when the result is no whole number from SMALLEST to LARGEST."""
    if operator == "/" and left % right:
        return None
    result = {"+": left + right, "-": left - right, "*": left * right, "/": left // right}[operator]
    return result if SMALLEST <= result <= LARGEST else None


def frames(folder: Path = WRITTEN) -> list[Row]:
    """The story frames. Raises ValueError for a line that is none and for two frames that are nearly the same."""
    found = []
    for block in (folder / "frames.txt").read_text(encoding="utf-8").strip().split("\n\n"):
        frame: Row = {"numbers": {}, "derived": {}, "words": {}, "steps": []}
        for line in block.splitlines():
            key, separator, value = line.partition(": ")
            if not separator or key not in ("frame", "split", "numbers", "derived", "words", "ask", "step"):
                raise ValueError(f"frames.txt: cannot read {line!r}")
            if key == "numbers":
                for name, low, high in re.findall(r"(\w) (\d+)-(\d+)", value):
                    frame["numbers"][name] = (int(low), int(high))
            elif key == "derived":
                name, _, frame["derived"][name[0]] = value.partition(" = ")
            elif key == "words":
                name, _, choices = value.partition(" = ")
                frame["words"][name] = choices.split(" / ")
            elif key == "step":
                frame["steps"].append(tuple(value.split(" | ")))
            else:
                frame[key] = value
        if not {"frame", "split", "ask"} <= set(frame) or not frame["steps"] or not frame["numbers"]:
            raise ValueError(f"frames.txt: a frame needs frame, split, numbers, ask and step, this one has\n{block}")
        found.append(frame)
    refuse_near_duplicates("frames", [f["ask"] for f in found if not f["frame"].startswith("bare")])
    return found


def shape(frame: Row) -> str:
    """The expressions of a frame's steps, such as "a + b; r1 - c"; r1 is the result of the first."""
    return "; ".join(expression for _, expression in frame["steps"])


def problem(frame: Row, rng: random.Random) -> Row:
    """One problem of a frame, with numbers drawn until they do. Raises ValueError when no drawn ones ever do."""
    names = rng.sample(NAMES, 2)
    words = {"name": names[0], "other": names[1]}
    words |= {name: rng.choice(choices) for name, choices in frame["words"].items()}
    for _ in range(DRAWS):
        values: dict[str, int] = {name: rng.randint(*limits) for name, limits in frame["numbers"].items()}
        for name, expression in frame["derived"].items():  # k * b + c - d, from left to right
            first, *rest = expression.split()
            values[name] = values[first]
            for operator, operand in zip(rest[::2], rest[1::2], strict=True):
                term = values[operand]
                values[name] = {"+": values[name] + term, "-": values[name] - term, "*": values[name] * term}[operator]
        steps = []
        for number, (text, expression) in enumerate(frame["steps"], start=1):
            left, operator, right = expression.split()
            operands = [int(part) if part.isdigit() else values[part] for part in (left, right)]
            result = compute(operands[0], operator, operands[1])
            if result is None:
                break
            values[f"r{number}"] = result
            written = f"{text.format(**words, **values)}: {operands[0]} {operator} {operands[1]} = {result}."
            steps.append({"text": written, "result": result})
        question = frame["ask"].format(**words, **values)
        told = [int(number) for number in re.findall(r"\d+", question)]
        results = [step["result"] for step in steps]
        # No number is there twice, and no step's result stands in the question: what is copied is never right.
        if len(steps) == len(frame["steps"]) and len({*told, *results}) == len(told) + len(results):
            break
    else:
        raise ValueError(f"frames.txt: found no numbers for the frame {frame['frame']!r} in {DRAWS} draws")
    answer = results[-1]
    texts = [step["text"] for step in steps]
    # Shown chains that name the first number first, a small model less often adds all numbers in one step.
    start = f"We start with {values[frame['steps'][0][1].split()[0]]}."
    return {
        "split": frame["split"],
        "kind": "bare" if frame["frame"].startswith("bare") else "story",
        "frame": frame["frame"],
        "shape": shape(frame),
        "input": question,
        "output": str(answer),
        "question": question,
        "chain": " ".join([start, *texts, f"The answer is {answer}."]),
        "short_chain": " ".join([start, *(text.split(": ")[1] for text in texts), f"The answer is {answer}."]),
        "steps": steps,
        "answer": answer,
    }


def arithmetic(rng: random.Random, folder: Path = WRITTEN) -> list[Row]:
    """Problems of every frame, no question twice."""
    rows: list[Row] = []
    asked: set[str] = set()
    for frame in frames(folder):
        bare = frame["frame"].startswith("bare")
        count = ROWS_OF_A_FRAME["bare" if bare else "sum" if shape(frame) == SUM else len(frame["steps"])]
        different: list[Row] = []
        for row in (problem(frame, rng) for _ in range(20 * count)):
            # an expression is the same in whatever words it is asked for
            key = re.sub("[a-z ?]", "", row["question"].lower()) if bare else row["question"]
            if key not in asked:
                asked.add(key)
                different.append(row)
        if len(different) < count:
            raise ValueError(f"frames.txt: the frame {frame['frame']!r} gives {len(different)} questions, not {count}")
        rows += different[:count]
    return rows


def make(seed: int = SEED, folder: Path = WRITTEN) -> dict[str, list[Row]]:
    """All four tasks, each with its train rows first, in random order within a split."""
    makers = {"antonyms": antonyms, "sentiment": sentiment, "mapping": mapping, "arithmetic": arithmetic}
    made: dict[str, list[Row]] = {}
    for task, maker in makers.items():
        rng = random.Random(f"{seed} {task}")  # one each: a change of one task leaves the others as they are
        rows = maker(rng, folder)
        made[task] = []
        for split in ("train", "test"):
            chosen = [row for row in rows if row["split"] == split]
            chosen = rng.sample(chosen, len(chosen))
            made[task] += [{"id": f"{task}-{split}-{number:03d}", **row} for number, row in enumerate(chosen)]
    return made


def write(target: Path, seed: int = SEED) -> None:
    """Write the tasks as JSON lines with UNIX line ends, and their checksums as `sha256sum -c` reads them."""
    sums = []
    for task, rows in make(seed).items():
        data = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode()
        (target / f"{task}.jsonl").write_bytes(data)
        sums.append(f"{hashlib.sha256(data).hexdigest()}  {task}.jsonl\n")
    (target / "SHA256SUMS").write_bytes("".join(sums).encode())


if __name__ == "__main__":
    here = Path(__file__).parent
    write(here)
    print((here / "SHA256SUMS").read_text(), end="")
