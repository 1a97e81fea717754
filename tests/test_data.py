"""The data sets load offline, are what their checksums say, and the test split is held out in every way it claims."""

import importlib.util
import itertools
import json
import re
import shutil

import pytest

from lecturekit import data


@pytest.fixture(scope="module")
def maker():
    """data/cafe_orders/make.py as a module."""
    spec = importlib.util.spec_from_file_location("cafe_orders_make", data.data_dir() / "cafe_orders" / "make.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def orders():
    return data.load("cafe_orders")


@pytest.fixture
def copy(tmp_path, monkeypatch):
    """A private copy of the data folder that a test may damage."""
    folder = tmp_path / "data"
    shutil.copytree(data.data_dir(), folder)
    monkeypatch.setenv("LECTUREKIT_DATA", str(folder))
    return folder


def frames(maker, split):
    """The words of each frame without its holes."""
    return [re.sub(r"\{\w+\}", " ", frame) for _, frame in maker.FRAMES[split]]


def test_every_data_set_has_a_card_that_quotes_its_checksums():
    assert "cafe_orders" in data.names()
    for name in data.names():
        card = (data.data_dir() / name / "README.md").read_text(encoding="utf-8")
        assert "licence" in card.lower()
        for filename, digest in data.checksums(name).items():
            assert filename in card and digest in card, f"{name}/README.md lacks the checksum of {filename}"


def test_sizes_and_columns(orders):
    assert {split: len(rows) for split, rows in orders.items()} == {"train": 320, "test": 80, "keep": 20}
    assert {"id", "order", "ticket", "name", "items", "place", "combination", "phrasing"} == set(
        orders["train"].column_names
    )
    assert {"id", "question", "answer"} == set(orders["keep"].column_names)


def test_the_script_makes_the_very_bytes_in_the_repository(maker, tmp_path):
    maker.write(tmp_path)
    for filename in [*data.checksums("cafe_orders"), data.CHECKSUMS]:
        assert (tmp_path / filename).read_bytes() == (data.data_dir() / "cafe_orders" / filename).read_bytes()
    assert maker.make(seed=maker.SEED + 1) != maker.make()


def test_every_ticket_follows_the_notation(orders):
    for row in itertools.chain(orders["train"], orders["test"]):
        assert re.fullmatch(r"(\w+|-) \| \d [a-z ]+( \+ \d [a-z ]+)* \| (GO|HERE|T\d+)", row["ticket"]), row
        assert row["ticket"] == f"{row['name']} | {row['items']} | {row['place']}"


def test_every_field_of_a_ticket_can_be_read_from_its_order(orders, maker):
    for row in itertools.chain(orders["train"], orders["test"]):
        said = row["order"].lower()
        assert row["name"] == "-" or row["name"].lower() in said
        assert not row["place"].startswith("T") or f"{row['place'][1:]}" in said
        for part in row["items"].split(" + "):
            count, item = part.split(" ", 1)
            one, several = maker.MENU[item]
            assert (one if count == "1" else several) in said, (row["order"], part)


def test_orders_without_a_name_are_not_marked_by_anything_else(orders):
    nameless = [row for row in orders["train"] if row["name"] == "-"]
    assert 0.1 < len(nameless) / len(orders["train"]) < 0.5
    assert {row["place"][0] for row in nameless} == {"G", "H", "T"}


def test_test_orders_are_held_out_by_phrasing_names_and_combination(orders):
    train, test = orders["train"], orders["test"]
    assert len(set(train["phrasing"])) >= 60 and len(set(test["phrasing"])) == 20
    for column in ("phrasing", "combination", "order", "ticket"):
        assert not set(train[column]) & set(test[column]), column
    assert set(train["name"]) & set(test["name"]) == {"-"}


def test_no_order_is_nearly_another(orders, maker):
    words = [maker.triples(text) for text in [*orders["train"]["order"], *orders["test"]["order"]]]
    pairs = itertools.combinations(words, 2)
    assert max(maker.alike(one, other) for one, other in pairs) <= maker.MOST_ALIKE


def test_held_out_frames_are_not_training_frames_with_a_word_changed(maker):
    # Compared by their words: 0.6 would be four words in common out of a union of seven.
    train = [set(re.findall(r"[a-z']+", frame.lower())) for frame in frames(maker, "train")]
    test = [set(re.findall(r"[a-z']+", frame.lower())) for frame in frames(maker, "test")]
    assert max(maker.alike(one, other) for one in test for other in train) < 0.6


def test_the_near_duplicate_measure_sees_a_changed_noun(maker):
    one, other = (
        "Could I get two lattes and a bagel for Mira, to go?",
        "Could I get two lattes and a bagel for Tom, to go?",
    )
    assert maker.alike(maker.triples(one), maker.triples(other)) > maker.MOST_ALIKE
    assert maker.alike(maker.triples(one), maker.triples("Table 4 would like a brownie.")) == 0


def test_an_altered_file_is_refused(copy):
    path = copy / "cafe_orders" / "test.jsonl"
    path.write_bytes(path.read_bytes().replace(b"latte", b"larte", 1))
    with pytest.raises(ValueError, match=r"test\.jsonl was altered.*expected"):
        data.load("cafe_orders")


def test_a_missing_file_is_named(copy):
    (copy / "cafe_orders" / "train.jsonl").unlink()
    with pytest.raises(FileNotFoundError, match=r"train\.jsonl is missing.*make\.py"):
        data.load("cafe_orders")


def test_an_unknown_name_lists_what_there_is():
    with pytest.raises(ValueError, match=r"one of .*cafe_orders.*'tea'"):
        data.load("tea")
    with pytest.raises(TypeError, match="name must be a str"):
        data.load(3)
    with pytest.raises(ValueError, match="one of"):
        data.load("../data/cafe_orders")


def test_no_data_folder_says_how_to_name_one(monkeypatch, tmp_path):
    monkeypatch.setenv("LECTUREKIT_DATA", str(tmp_path / "none"))
    with pytest.raises(FileNotFoundError, match="LECTUREKIT_DATA"):
        data.load("cafe_orders")


def test_loading_uses_no_network_and_writes_nothing(copy, monkeypatch):
    def refuse(*_):
        raise AssertionError("the loader opened a socket")

    monkeypatch.setattr("socket.socket.connect", refuse)
    before = {path: path.stat().st_mtime_ns for path in copy.rglob("*")}
    row = data.load("cafe_orders")["test"][0]
    assert json.loads((copy / "cafe_orders" / "test.jsonl").read_text().splitlines()[0]) == row
    assert {path: path.stat().st_mtime_ns for path in copy.rglob("*")} == before


def test_scores_count_tickets_and_fields():
    wanted = ["Mira | 1 latte | GO", "- | 2 bagel | T7"]
    assert data.score_tickets(wanted, wanted) == {"exact": 1.0, "fields": 1.0}
    assert data.score_tickets([" Mira | 1 latte | GO\n", "- | 3 bagel | T7"], wanted) == {
        "exact": 0.5,
        "fields": pytest.approx(5 / 6),
    }
    assert data.score_tickets(["", "Mira would like a latte."], wanted) == {"exact": 0.0, "fields": 0.0}
    assert data.score_tickets(["Mira | 1 latte", "- | 2 bagel | T7 | T7"], wanted)["fields"] == 0.0


def test_scores_refuse_lists_that_do_not_pair_up():
    with pytest.raises(ValueError, match="got 1 and 2"):
        data.score_tickets(["a"], ["a", "b"])
    with pytest.raises(ValueError, match="not empty"):
        data.score_tickets([], [])
