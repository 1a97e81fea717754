"""The preference pairs: their bytes, their split by topic, and that nothing but the meaning tells better from worse."""

import importlib.util

import pytest

from lecturekit import data

NAME = "service_preferences"


@pytest.fixture(scope="module")
def maker():
    """data/service_preferences/make.py as a module."""
    spec = importlib.util.spec_from_file_location(f"{NAME}_make", data.data_dir() / NAME / "make.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def pairs():
    return data.load(NAME)


def test_the_script_makes_the_very_bytes_in_the_repository(maker, tmp_path):
    maker.write(tmp_path)
    for filename in [*data.checksums(NAME), data.CHECKSUMS]:
        assert (tmp_path / filename).read_bytes() == (data.data_dir() / NAME / filename).read_bytes()


def test_sizes_columns_and_a_split_by_topic(pairs, maker):
    assert {split: len(rows) for split, rows in pairs.items()} == {"train": 300, "test": 120}
    assert set(pairs["train"].column_names) == {"id", *maker.FIELDS}
    assert not set(pairs["train"]["topic"]) & set(pairs["test"]["topic"])
    assert len(set(pairs["train"]["id"]) | set(pairs["test"]["id"])) == 420
    assert set(pairs["train"]["reason"]) == set(pairs["test"]["reason"]) == set(maker.REASONS)


def test_length_alone_tells_nothing(pairs):
    for rows in pairs.values():
        lengths = [(len(row["better"].split()), len(row["worse"].split())) for row in rows]
        longer = [better > worse for better, worse in lengths if better != worse]
        assert 0.4 < sum(longer) / len(longer) < 0.6


def test_no_single_word_gives_the_answer_away_on_either_side_of_the_split(pairs, maker):
    for rows in pairs.values():
        word, right = maker.best_word(list(rows))
        assert right <= maker.BEST_WORD, word


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"reason": "style"}, "reason must be one of"),
        ({"worse": "No."}, "worse must have 10 to 28 words"),
        ({"message": "Hello?"}, "message must have 6 to 25 words"),
        ({"better": "One two three. Four five six. Seven eight nine. Ten."}, "one or two sentences"),
    ],
)
def test_a_pair_that_breaks_the_card_is_refused(change, message, maker, pairs):
    row = {field: pairs["train"][0][field] for field in maker.FIELDS}
    maker.check_pair(row)
    if "better" in change:  # of the same length, so that only the sentences are wrong
        row["worse"] = "one two three four five six seven eight nine ten"
    with pytest.raises(ValueError, match=message):
        maker.check_pair(row | change)


def test_near_duplicates_and_a_give_away_word_are_refused(maker, pairs):
    rows = [{field: row[field] for field in maker.FIELDS} for split in pairs.values() for row in split]
    maker.check_all(rows)
    twice = [*rows, rows[0] | {"message": rows[0]["message"].replace("!", ", and why?")}]
    with pytest.raises(ValueError, match="too much alike"):
        maker.check_all(twice)
    with pytest.raises(ValueError, match="'gladly' alone tells better from worse"):
        maker.check_all([row | {"better": row["better"] + " Gladly."} for row in rows])
    with pytest.raises(ValueError, match="each topic must be in"):
        maker.check_all([row | {"topic": "zoo"} for row in rows])
