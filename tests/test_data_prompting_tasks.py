"""The prompting tasks are what their card says: held out whole, balanced, no near-duplicates, chains that compute."""

import importlib.util
import re
import shutil
from collections import Counter
from itertools import product

import pytest

from lecturekit import data

TASKS = ("antonyms", "sentiment", "mapping", "arithmetic")


@pytest.fixture(scope="module")
def maker():
    """data/prompting_tasks/make.py as a module."""
    path = data.data_dir() / "prompting_tasks" / "make.py"
    spec = importlib.util.spec_from_file_location("prompting_tasks_make", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def tasks():
    """The four tasks as lists of rows."""
    return {task: list(rows) for task, rows in data.load("prompting_tasks").items()}


def part(rows, split, **fields):
    """The rows of one split that have these values."""
    return [row for row in rows if row["split"] == split and all(row[name] == value for name, value in fields.items())]


def numbers(text):
    """The whole numbers in a text, from left to right."""
    return [int(number) for number in re.findall(r"\d+", text)]


@pytest.fixture
def written(tmp_path):
    """A copy of written/ that a test may spoil."""
    return shutil.copytree(data.data_dir() / "prompting_tasks" / "written", tmp_path / "written")


def append(path, text):
    """Add lines to the end of a written file."""
    path.write_text(path.read_text(encoding="utf-8") + text, encoding="utf-8")


def test_sizes_and_columns(tasks):
    assert set(tasks) == set(TASKS)
    columns = {
        "antonyms": {"kind", "candidates"},
        "sentiment": {"subject", "hard"},
        "mapping": {"kind", "category"},
        "arithmetic": {"kind", "frame", "shape", "question", "chain", "short_chain", "steps", "answer"},
    }
    for task, rows in tasks.items():
        assert all(set(row) == {"id", "split", "input", "output"} | columns[task] for row in rows)
        assert len({row["id"] for row in rows}) == len(rows)
    assert {task: len(rows) for task, rows in tasks.items()} == {
        "antonyms": 193,
        "sentiment": 260,
        "mapping": 366,
        "arithmetic": 590,
    }


def test_the_script_makes_the_very_bytes_in_the_repository(maker, tmp_path):
    maker.write(tmp_path)
    for filename in [*data.checksums("prompting_tasks"), data.CHECKSUMS]:
        assert (tmp_path / filename).read_bytes() == (data.data_dir() / "prompting_tasks" / filename).read_bytes()
    assert maker.make(seed=maker.SEED + 1) != maker.make()


def test_the_card_gives_the_checksums(tasks):
    card = (data.data_dir() / "prompting_tasks" / "README.md").read_text(encoding="utf-8")
    for filename, digest in data.checksums("prompting_tasks").items():
        assert f"{digest}  {filename}" in card


@pytest.mark.parametrize("task", TASKS)
def test_no_input_is_there_twice_and_test_is_a_fair_share(tasks, task):
    inputs = [row["input"].lower() for row in tasks[task]]
    assert len(set(inputs)) == len(inputs)
    assert {row["split"] for row in tasks[task]} == {"train", "test"}
    assert 0.4 <= len(part(tasks[task], "test")) / len(inputs) <= 0.6


def test_words_of_held_out_antonyms_occur_nowhere_else(tasks, maker):
    rows = tasks["antonyms"]
    train = {word for row in part(rows, "train") for word in (row["input"], row["output"], *row["candidates"])}
    pairs = [word for row in rows for word in (row["input"], row["output"])]
    assert len(set(pairs)) == len(pairs)
    for row in part(rows, "test"):
        others = {word for other in rows if other is not row for word in other["candidates"]}
        assert not {row["input"], row["output"]} & (train | others), row
        trained = [word for other in part(rows, "train") for word in (other["input"], other["output"])]
        assert not any(maker.related(a, b) for a, b in product((row["input"], row["output"]), trained)), row


def test_antonyms_have_four_wrong_answers_and_every_kind_is_held_out(tasks):
    for row in tasks["antonyms"]:
        assert len({row["input"], row["output"], *row["candidates"]}) == 6
        assert all(re.fullmatch("[a-z]+", word) for word in (row["input"], row["output"], *row["candidates"]))
    for split in ("train", "test"):
        assert {row["kind"] for row in part(tasks["antonyms"], split)} == {"adjective", "verb", "noun", "adverb"}


def test_an_opposite_cannot_be_told_by_its_length(tasks):
    # Taking the longest, or the shortest, of five candidates hits less than twice as often as chance.
    for best in (max, min):
        hits = 0.0
        for row in tasks["antonyms"]:
            lengths = [len(word) for word in (row["output"], *row["candidates"])]
            hits += (lengths[0] == best(lengths)) / lengths.count(best(lengths))
        assert hits / len(tasks["antonyms"]) < 0.4


def test_reviews_are_balanced_and_split_by_subject(tasks):
    rows = tasks["sentiment"]
    assert not {row["subject"] for row in part(rows, "train")} & {row["subject"] for row in part(rows, "test")}
    for split in ("train", "test"):
        for hard in (False, True):
            counts = Counter(row["output"] for row in part(rows, split, hard=hard))
            assert counts["positive"] == counts["negative"] > 0
    assert set(Counter(row["subject"] for row in rows).values()) == {10}
    assert all(10 <= len(row["input"].split()) <= 30 for row in rows)


def test_reviews_do_not_give_their_label_away(tasks):
    for row in tasks["sentiment"]:
        assert not re.search(r"\b(positive|negative)", row["input"].lower()), row
    said = Counter(row["output"] for row in tasks["sentiment"] if re.search(r"\bbut\b", row["input"]))
    assert min(said.values()) / sum(said.values()) > 0.3  # a "but" turns praise and blame alike


def test_no_review_is_nearly_another(tasks, maker):
    most, one, other = maker.nearest([row["input"] for row in tasks["sentiment"]])
    assert most <= maker.MOST_ALIKE, (one, other)


def test_the_near_duplicate_measure_sees_a_changed_noun(maker):
    one, other = (
        f"The {noun} was lovely and the staff could not have been kinder to us." for noun in ("hotel", "café")
    )
    assert maker.alike(maker.triples(one), maker.triples(other)) > maker.MOST_ALIKE


def test_rule_labels_follow_the_category_and_random_ones_are_balanced(tasks, maker):
    rows = tasks["mapping"]
    for row in rows:
        if row["kind"] != "arbitrary":
            assert row["output"] == {**maker.LABELS, **maker.SWAPPED}[row["category"]]
    for split, kind in product(("train", "test"), ("rule", "arbitrary", "swapped")):
        counts = Counter(row["output"] for row in part(rows, split, kind=kind))
        assert len(set(counts.values())) == 1 and len(counts) == (2 if kind == "swapped" else 3)
    kinds = Counter(row["kind"] for row in rows)
    assert kinds["rule"] >= 120 and kinds["arbitrary"] >= 80 and kinds["swapped"] >= 80


def test_the_letters_of_an_invented_word_do_not_tell_its_label(tasks):
    # 1-nearest-neighbour on shared letter pairs, learned from train: its hits on test lie within what chance explains.
    train, test = (part(tasks["mapping"], split, kind="arbitrary") for split in ("train", "test"))

    def pairs(word):
        return {word[i : i + 2] for i in range(len(word) - 1)}

    hits = sum(
        max(train, key=lambda known, row=row: len(pairs(known["input"]) & pairs(row["input"])))["output"]
        == row["output"]
        for row in test
    )
    deviation = (len(test) * (1 / 3) * (2 / 3)) ** 0.5
    assert abs(hits - len(test) / 3) < 4 * deviation


def test_every_step_computes_from_what_is_known(tasks):
    spoken = {"twice": 2, "three times": 3}
    for row in tasks["arithmetic"]:
        known = numbers(row["question"]) + [number for word, number in spoken.items() if word in row["question"]]
        for step in row["steps"]:
            left, operator, right, result = re.search(r": (\d+) ([-+*/]) (\d+) = (\d+)\.$", step["text"]).groups()
            assert int(left) in known and int(right) in known, (row["id"], step)
            value = {"+": int.__add__, "-": int.__sub__, "*": int.__mul__, "/": int.__truediv__}[operator](
                int(left), int(right)
            )
            assert value == int(result) == step["result"] and 1 <= value <= 200, (row["id"], step)
            known.append(step["result"])
        texts = [step["text"] for step in row["steps"]]
        start, end = f"We start with {numbers(texts[0])[-3]}.", f"The answer is {row['answer']}."
        assert row["chain"] == " ".join([start, *texts, end])
        assert row["short_chain"] == " ".join([start, *(text.split(": ")[1] for text in texts), end])
        assert row["answer"] == row["steps"][-1]["result"] == int(row["output"]) and row["input"] == row["question"]
        assert "{" not in row["question"] + row["chain"] and row["question"].endswith("?")


def test_a_bare_expression_is_worth_its_answer(tasks):
    bare = [row for row in tasks["arithmetic"] if row["kind"] == "bare"]
    assert len(bare) >= 100
    asked = set()
    for row in bare:
        expression = re.fullmatch(r"(?:What|How much) is ([-+* 0-9]+)\?", row["question"]).group(1)
        asked.add(expression)
        terms = re.findall(r"([-+]?) ?(\d+)(?: \* (\d+))?", expression)
        total = sum((-1 if sign == "-" else 1) * int(one) * int(other or 1) for sign, one, other in terms)
        assert total == row["answer"], row
    assert len(asked) == len(bare)  # none is asked for again in other words


def test_every_shape_of_a_bare_expression_is_in_both_splits(tasks):
    train, test = (
        {row["shape"] for row in part(tasks["arithmetic"], split, kind="bare")} for split in ("train", "test")
    )
    assert train == test and len(train) == 12


def test_frames_are_held_out_whole_and_different(tasks, maker):
    rows = tasks["arithmetic"]
    train, test = ({row["frame"] for row in part(rows, split)} for split in ("train", "test"))
    assert not train & test
    assert len({row["frame"] for row in rows if row["kind"] == "story"}) >= 40
    asked = [frame["ask"] for frame in maker.frames() if not frame["frame"].startswith("bare")]
    most, one, other = maker.nearest(asked)
    assert most <= maker.MOST_ALIKE, (one, other)
    for split, kind in product(("train", "test"), ("bare", "story")):
        assert {len(row["steps"]) for row in part(rows, split, kind=kind)} == {1, 2, 3}


def test_nothing_copied_from_a_question_is_its_answer(tasks):
    for row in tasks["arithmetic"]:
        told = numbers(row["question"])
        results = [step["result"] for step in row["steps"]]
        assert len({*told, *results}) == len(told) + len(results), row


def test_arithmetic_cannot_be_had_by_one_trick(tasks):
    # No single rule over the numbers of the question, and no constant, gives half of the answers.
    tricks = {
        "add all": sum,
        "the largest less the others": lambda told: 2 * max(told) - sum(told),
        "the first less the others": lambda told: 2 * told[0] - sum(told),
        "add the first two": lambda told: told[0] + told[1],
        "multiply the first two": lambda told: told[0] * told[1],
    }
    rows = tasks["arithmetic"]
    for name, trick in tricks.items():
        assert sum(trick(numbers(row["question"])) == row["answer"] for row in rows) / len(rows) < 0.5, name
    assert Counter(row["answer"] for row in rows).most_common(1)[0][1] / len(rows) < 0.1


def test_small_two_step_problems_are_a_good_share(tasks):
    small = [row for row in tasks["arithmetic"] if len(row["steps"]) == 2 and max(numbers(row["question"])) < 30]
    assert len(small) / len(tasks["arithmetic"]) > 1 / 3
    assert sum(set(re.findall(r"\d ([-+*/]) \d", row["chain"])) <= {"+", "-"} for row in small) / len(small) > 1 / 2


@pytest.mark.parametrize(
    ("name", "line", "words"),
    [
        ("antonyms", "hot icy : a b c d", "more than one row"),
        ("antonyms", "sly frank : cunning crafty", "a word, its opposite and four other words"),
        ("antonyms", "colder warmest : a b c d", "relative in another pair: .*colder"),
        ("sentiment", "* The queue was short and the ice cream was made before our eyes.", "needs a mark"),
        ("sentiment", "+ Good.", "10 to 30 words"),
        ("sentiment", "- So full on a Monday that you could only stand there, like tea bags in a cup.", "% alike"),
        ("mapping", "a broken leg, a lost glove", "written twice: a broken leg"),
        ("frames", "\nframe: odd\nsplit train", "cannot read 'split train'"),
        ("frames", "\nframe: odd\nsplit: train\nask: How many?", "needs frame, split, numbers"),
        ("frames", "\nframe: few\nsplit: train\nnumbers: a 7-7, b 2-3\nask: From {a} take {b}?\nstep: So | a - b",
         "the frame 'few' gives 2 questions, not 4"),
        ("frames", "\nframe: never\nsplit: train\nnumbers: a 2-3, b 7-9\nask: From {a} take {b}?\nstep: So | a - b",
         "found no numbers for the frame 'never'"),
        ("frames", "\nframe: copy\nsplit: train\nnumbers: a 2-9, b 2-9\nask: There are {a} {car} in the car park, and "
         "{b} of them drive away. How many {car} are here?\nwords: car = cars\nstep: Gone | a - b", "two frames are"),
    ],
)  # fmt: skip
def test_what_is_badly_written_is_refused(maker, written, name, line, words):
    append(written / f"{name}.txt", line + "\n")
    with pytest.raises(ValueError, match=words):
        maker.make(folder=written)


@pytest.mark.parametrize(
    ("left", "operator", "right", "result"),
    [(7, "/", 2, None), (8, "/", 2, 4), (5, "-", 5, None), (1, "-", 5, None), (20, "*", 11, None), (20, "*", 10, 200)],
)
def test_steps_outside_the_whole_numbers_to_200_are_drawn_again(maker, left, operator, right, result):
    assert maker.compute(left, operator, right) == result
