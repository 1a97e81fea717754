"""The customer-service dialogues are what their card says: held out by topic, and none is nearly another."""

import importlib.util
import json
import shutil

import pytest

from lecturekit import data


@pytest.fixture(scope="module")
def maker():
    """data/customer_service/make.py as a module."""
    path = data.data_dir() / "customer_service" / "make.py"
    spec = importlib.util.spec_from_file_location("customer_service_make", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def corpus():
    return data.load("customer_service")


def test_sizes_and_columns(corpus):
    sizes = {split: len(rows) for split, rows in corpus.items()}
    assert sizes["train"] + sizes["test"] >= 600 and sizes["test"] >= 120
    assert sizes["safety_train"] + sizes["safety_test"] == 80
    assert (sizes["keep"], sizes["general"]) == (40, 40)
    for split in ("train", "test", "safety_train", "safety_test"):
        assert set(corpus[split].column_names) == {"id", "topic", "messages"}
    assert set(corpus["keep"].column_names) == {"id", "question", "answers"}
    assert set(corpus["general"].column_names) == {"id", "subject", "text"}


def test_the_script_makes_the_very_bytes_in_the_repository(maker, tmp_path):
    maker.write(tmp_path)
    for filename in [*data.checksums("customer_service"), data.CHECKSUMS]:
        assert (tmp_path / filename).read_bytes() == (data.data_dir() / "customer_service" / filename).read_bytes()


def test_topics_are_held_out_whole_and_from_every_group(corpus, maker):
    train, test = set(corpus["train"]["topic"]), set(corpus["test"]["topic"])
    assert test == set(maker.HELD_OUT) and not train & test and len(train) == 18
    for group in maker.GROUPS:
        topics = {row["topic"] for row in maker.read(group)}
        assert topics & test and topics & train, group
    kinds = set(corpus["safety_train"]["topic"]), set(corpus["safety_test"]["topic"])
    assert kinds[1] == set(maker.HELD_OUT_KINDS) and not kinds[0] & kinds[1] and len(kinds[0]) == 8


def test_roles_take_turns_and_answers_have_a_fair_length(corpus):
    for split in ("train", "test", "safety_train", "safety_test"):
        for row in corpus[split]:
            roles = [message["role"] for message in row["messages"]]
            assert roles in (["user", "assistant"], ["user", "assistant"] * 2), row["id"]
            for message in row["messages"][1::2]:
                assert 20 <= len(message["content"].split()) <= 75, (row["id"], message["content"])
    longer = sum(len(row["messages"]) == 4 for row in corpus["train"])
    assert 0.1 < longer / len(corpus["train"]) < 0.3


@pytest.mark.parametrize("role", ["user", "assistant"])
def test_no_text_is_nearly_another_within_and_across_splits(corpus, maker, role):
    rows = [row for split in ("train", "test", "safety_train", "safety_test") for row in corpus[split]]
    most, one, other = maker.nearest(rows, role)
    assert most <= maker.MOST_ALIKE, (one, other)


def test_held_out_answers_cannot_be_copied_from_training(corpus, maker):
    # Even the nearest training answer shares only a small part of a held-out answer's word triples.
    known = [maker.triples(text) for text in maker.texts([*corpus["train"], *corpus["safety_train"]], "assistant")]
    for text in maker.texts([*corpus["test"], *corpus["safety_test"]], "assistant"):
        words = maker.triples(text)
        assert max(len(words & other) / len(words) for other in known) < 0.25, text


def test_the_near_duplicate_measure_sees_a_changed_noun(maker):
    one, other = (
        f"I am sorry that your {noun} has not come; please send me the order number." for noun in ("kettle", "toaster")
    )
    assert maker.alike(maker.triples(one), maker.triples(other)) > maker.MOST_ALIKE
    assert maker.alike(maker.triples(one), maker.triples("Which printer is it, and what does it show?")) == 0


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ({"topic": "refund", "messages": [{"role": "user", "content": "Hello?"}]}, "line 157: the roles are"),
        ({"topic": "refund", "messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": " b"}]},
         "line 157: a text is empty or has space"),
    ],
)  # fmt: skip
def test_a_malformed_dialogue_is_refused(maker, tmp_path, line, words):
    folder = tmp_path / "written"
    shutil.copytree(data.data_dir() / "customer_service" / "written", folder)
    with (folder / "parcels.jsonl").open("a") as file:
        file.write(json.dumps(line) + "\n")
    with pytest.raises(ValueError, match=words):
        maker.make(folder)


def test_a_dialogue_written_twice_is_refused(maker, tmp_path):
    folder = tmp_path / "written"
    shutil.copytree(data.data_dir() / "customer_service" / "written", folder)
    rows = (folder / "travel.jsonl").read_text().splitlines()
    copied = json.loads(rows[3])
    copied["messages"][0]["content"] = "Good evening. " + copied["messages"][0]["content"]
    with (folder / "parcels.jsonl").open("a") as file:
        file.write(json.dumps(copied) + "\n")
    with pytest.raises(ValueError, match=r"two texts of the user are \d+% alike"):
        maker.make(folder)


def test_everyday_questions_do_not_give_their_answer_away(corpus):
    for row in corpus["keep"]:
        assert all(answer.lower() not in row["question"].lower().split() for answer in row["answers"]), row


def test_prose_is_forty_different_paragraphs(corpus, maker):
    texts = corpus["general"]["text"]
    assert all(40 <= len(text.split()) <= 80 for text in texts)
    words = [maker.triples(text) for text in texts]
    assert max(maker.alike(words[i], words[j]) for i in range(40) for j in range(i)) < 0.05
