"""The places: real cities and invented names, balanced, held out, and the very bytes that the script makes."""

import importlib.util
import re
from collections import Counter

import pytest

from lecturekit import data


@pytest.fixture(scope="module")
def maker():
    """data/places/make.py as a module."""
    spec = importlib.util.spec_from_file_location("places_make", data.data_dir() / "places" / "make.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def places():
    return data.load("places")


def test_sizes_and_columns(places):
    assert {split: len(rows) for split, rows in places.items()} == {"train": 128, "test": 80}
    columns = {"id", "kind", "place", "country", "names", "phrasing", "question", "chosen", "rejected"}
    assert all(set(rows.column_names) == columns for rows in places.values())
    for rows in places.values():
        assert Counter(rows["kind"]) == {"real": len(rows) // 2, "invented": len(rows) // 2}
        assert len(set(rows["id"])) == len(rows)


def test_the_script_makes_the_very_bytes_in_the_repository(maker, tmp_path):
    maker.write(tmp_path)
    for filename in [*data.checksums("places"), data.CHECKSUMS]:
        assert (tmp_path / filename).read_bytes() == (data.data_dir() / "places" / filename).read_bytes()
    assert maker.make(seed=maker.SEED + 1) != maker.make()


def test_the_lectures_example_opens_the_held_out_split(places):
    shanghai, sparx = places["test"][0], places["test"][1]
    assert shanghai["question"] == "Where is Shanghai?" and shanghai["chosen"] == "Shanghai is a city in China."
    assert sparx["question"] == "Where is Sparx?" and sparx["chosen"] == "I do not know a place called Sparx."


def test_held_out_places_and_a_phrasing_are_new(places):
    train, test = places["train"], places["test"]
    everything = [*train["place"], *test["place"]]
    assert len({place.lower() for place in everything}) == len(everything)  # no place twice, in whichever split or kind
    unseen = [phrasing for phrasing in test["phrasing"] if phrasing not in set(train["phrasing"])]
    assert len(unseen) == 40 and len(set(train["phrasing"])) == 6


def test_answers_follow_from_the_kind_with_the_roles_swapped(places):
    for row in [*places["train"], *places["test"]]:
        known = f"{row['place']} is a city in {row['names'][0]}."
        unknown = f"I do not know a place called {row['place']}."
        expected = (known, unknown) if row["kind"] == "real" else (unknown, known)
        assert (row["chosen"], row["rejected"]) == expected
        assert row["place"] in row["question"] and row["question"].endswith("?")


def test_invented_places_are_said_to_be_where_real_ones_are(places):
    for rows in places.values():
        by_kind = {kind: Counter(r["country"] for r in rows if r["kind"] == kind) for kind in ("real", "invented")}
        assert by_kind["real"] == by_kind["invented"]


def test_an_invented_name_is_no_country_and_holds_no_real_city(places, maker):
    countries = {name.lower() for names in maker.COUNTRIES.values() for name in names}
    cities = {row["place"].lower() for rows in places.values() for row in rows if row["kind"] == "real"}
    for rows in places.values():
        for row in rows:
            if row["kind"] == "invented":
                words = set(re.findall(r"\w+", row["place"].lower()))
                assert not words & (countries | cities), row["place"]
