"""Results on disk: kept, found again, and never in the way when they are damaged."""

import gzip
import hashlib
import json
import logging
import os
import stat

import pytest

from lecturekit.grading import journal as journal_module
from lecturekit.grading.journal import Journal, fingerprint, identity
from lecturekit.grading.options import GradingOptions
from lecturekit.grading.work import Graded, Job, Mark

LAB = "lab99_tiny"


def result(student="ada", notebook="one", score=3.0, lab=LAB):
    marks = (Mark("double-test", 5, score, "wrong", "tiny.double", "wrong", "adds", "Twice?"),)
    marks += (Mark("explain", 2, None, "by hand"),)
    executed = {"cells": [{"source": "print('é \ud800')"}], "metadata": {}}
    return Graded(lab, notebook, student, executed, marks, ("A note.",), ("It died.",), {"run": 0.5}, "H100")


def key(number):
    return hashlib.sha256(str(number).encode()).hexdigest()


@pytest.fixture
def journal(tmp_path):
    return Journal(tmp_path / "journal")


def only_file(journal):
    (path,) = journal.folder.rglob("*.json.gz")
    return path


def test_what_was_put_is_got_and_nothing_else(journal):
    assert journal.get(key(1)) is None
    journal.put(key(1), result())
    journal.put(key(2), result("bob", score=5.0))
    assert journal.get(key(1)) == result()
    assert Journal(journal.folder.parent).get(key(2)) == result("bob", score=5.0)
    assert journal.get(key(3)) is None
    assert sorted(k for k, _ in journal.results(LAB)) == sorted([key(1), key(2)])


def test_a_second_result_under_a_key_replaces_the_first(journal):
    journal.put(key(1), result(score=1.0))
    journal.put(key(1), result(score=2.0))
    assert journal.get(key(1)).score == 2.0
    assert only_file(journal)


def test_files_are_for_their_owner_only_whatever_the_umask(journal):
    before = os.umask(0)
    try:
        journal.put(key(1), result())
    finally:
        os.umask(before)
    path = only_file(journal)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    folders = [folder for folder in path.parents if journal.folder in (folder, *folder.parents)]
    assert len(folders) == 3 and all(stat.S_IMODE(folder.stat().st_mode) == 0o700 for folder in folders)


def test_names_of_files_do_not_tell_who_handed_in(journal):
    journal.put(key(1), result("ada.lovelace"))
    assert "lovelace" not in str(only_file(journal).relative_to(journal.folder))


def test_only_the_newest_result_of_a_student_and_notebook_counts(journal):
    journal.put(key(1), result("ada", score=1.0))
    journal.put(key(2), result("ada", score=2.0))
    journal.put(key(3), result("ada", "two", score=3.0))
    journal.put(key(4), result("bob", score=4.0))
    journal.put(key(5), result("ada", score=5.0, lab="lab98"))
    assert {(k, graded.score) for k, graded in journal.results(LAB)} == {(key(2), 2.0), (key(3), 3.0), (key(4), 4.0)}
    journal.renew(key(1))
    assert {graded.score for _, graded in journal.results(LAB)} == {1.0, 3.0, 4.0}


def test_prune_removes_what_no_longer_counts_and_half_written_files(journal):
    journal.put(key(1), result("ada", score=1.0))
    journal.put(key(2), result("ada", score=2.0))
    journal.put(key(3), result("ada", lab="lab98"))
    half = only_path(journal, key(2)).parent / ".half"
    half.write_bytes(b"x")
    assert journal.prune(LAB) == 2
    assert journal.get(key(1)) is None and journal.get(key(2)).score == 2.0 and journal.get(key(3))
    assert not half.exists() and journal.prune(LAB) == 0


def only_path(journal, name):
    (path,) = journal.folder.rglob(f"{name}-*.json.gz")
    return path


def forged(journal, change):
    """Replace the file's content by one with a header that is right for a body changed by `change`."""
    path = only_file(journal)
    head, _, body = gzip.decompress(path.read_bytes()).partition(b"\n")
    data = json.loads(body)
    change(data)
    body = json.dumps(data).encode()
    head = json.dumps(json.loads(head) | {"sha256": hashlib.sha256(body).hexdigest()}).encode()
    path.write_bytes(gzip.compress(head + b"\n" + body))


DAMAGE = {
    "empty": lambda path: path.write_bytes(b""),
    "no gzip": lambda path: path.write_bytes(b"marks"),
    "gzip of nothing": lambda path: path.write_bytes(gzip.compress(b"")),
    "another JSON": lambda path: path.write_bytes(gzip.compress(b'{"format": 1}\n{}')),
    "no JSON": lambda path: path.write_bytes(gzip.compress(b"\xff\n\xff")),
    "deep JSON": lambda path: path.write_bytes(gzip.compress(b"[" * 100_000)),
    "a list": lambda path: path.write_bytes(gzip.compress(b"[]\n[]")),
    "cut off": lambda path: path.write_bytes(path.read_bytes()[:-9]),
    "a byte changed": lambda path: path.write_bytes(flipped(path.read_bytes(), len(path.read_bytes()) // 2)),
    "the body changed": lambda path: path.write_bytes(
        gzip.compress(gzip.decompress(path.read_bytes()).replace(b"3.0", b"5.0"))
    ),
}


def flipped(data, place):
    return data[:place] + bytes([data[place] ^ 1]) + data[place + 1 :]


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_file_is_absent_removed_and_told(damage, journal, caplog):
    journal.put(key(1), result())
    journal.put(key(2), result("bob"))
    DAMAGE[damage](only_path(journal, key(1)))
    with caplog.at_level(logging.WARNING):
        assert journal.get(key(1)) is None
    assert len(caplog.records) == 1 and "removed" in caplog.text and key(1) in caplog.text
    assert [k for k, _ in journal.results(LAB)] == [key(2)]


def test_every_single_byte_of_a_file_is_covered(journal):
    journal.put(key(1), result())
    path = only_file(journal)
    good = path.read_bytes()
    for place in range(len(good)):
        path.write_bytes(flipped(good, place))
        got = journal.get(key(1))
        # gzip's header has bytes that mean nothing (time, system); whatever is returned must be the result itself
        assert got is None or got == result()
        path.unlink(missing_ok=True)
        if place >= 10:
            assert got is None


@pytest.mark.parametrize(
    "change",
    [
        lambda data: data.update(student="bob"),
        lambda data: data.update(notebook="two"),
        lambda data: data.pop("marks"),
        lambda data: data.update(marks=3),
        lambda data: data.update(marks=[{"cell": "a"}]),
        lambda data: data.update(extra=1),
        lambda data: data.update(student=3),
    ],
)
def test_a_file_with_a_right_checksum_but_the_wrong_content_is_absent(change, journal):
    journal.put(key(1), result())
    forged(journal, change)
    assert journal.get(key(1)) is None
    assert not list(journal.results(LAB))


def test_a_result_renamed_to_another_key_is_absent(journal):
    journal.put(key(1), result())
    path = only_file(journal)
    other = journal.folder / LAB / key(2)[:2] / path.name.replace(key(1), key(2))
    other.parent.mkdir(exist_ok=True)
    path.rename(other)
    assert journal.get(key(2)) is None and not other.exists()


def test_other_files_are_left_alone(journal):
    journal.put(key(1), result())
    stray = only_file(journal).parent / "notes.txt"
    stray.write_text("mine")
    (journal.folder / "README").write_text("mine")
    assert len(list(journal.results(LAB))) == 1
    journal.prune(LAB)
    assert stray.read_text() == "mine"


def test_a_write_that_fails_leaves_the_old_result_and_no_litter(journal, monkeypatch):
    journal.put(key(1), result(score=1.0))

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(journal_module.os, "replace", full)
    with pytest.raises(OSError, match="No space left"):
        journal.put(key(1), result(score=2.0))
    monkeypatch.undo()
    assert journal.get(key(1)).score == 1.0
    assert len(list(only_file(journal).parent.iterdir())) == 1


@pytest.mark.parametrize("lab", ["", "..", "a/b", "/etc"])
def test_a_lab_that_is_no_folder_name_is_refused(lab, journal):
    with pytest.raises(ValueError, match="lab's name"):
        journal.put(key(1), result(lab=lab))
    with pytest.raises(ValueError, match="64 hexadecimal"):
        journal.put("../../x", result())


def test_ten_thousand_names_are_not_read_to_find_one(journal, monkeypatch):
    for number in range(300):
        journal.put(key(number), result(f"s{number}"))
    listed = []
    listdir = os.listdir
    monkeypatch.setattr(journal_module.os, "listdir", lambda path: listed.append(path) or listdir(path))
    assert journal.get(key(7)) == result("s7")
    assert len(listed) == 1


def test_the_fingerprint_depends_on_code_versions_and_settings(monkeypatch):
    assert fingerprint(LAB) == fingerprint(LAB, GradingOptions()) and len(fingerprint(LAB)) == 64
    assert fingerprint(LAB) != fingerprint("lab98")
    assert fingerprint(LAB) != fingerprint(LAB, GradingOptions(cell_seconds=7))
    assert fingerprint(LAB) != fingerprint(LAB, GradingOptions(isolation="none"))
    assert fingerprint(LAB) == fingerprint(LAB, GradingOptions(gpu=True)), "a GPU adds to marks, it changes none"
    before = identity(LAB)
    monkeypatch.setattr(journal_module, "version", lambda name: "2.0.0+cu130")
    changed = {name for name, value in identity(LAB).items() if value != before[name]}
    assert changed == {"torch", "nbgrader", "transformers"} and identity(LAB)["torch"] == "2.0.0"


def test_the_fingerprint_changes_with_any_file_of_the_package(monkeypatch, tmp_path):
    package = tmp_path / "lecturekit"
    (package / "grading").mkdir(parents=True)
    (package / "one.py").write_text("1")
    monkeypatch.setattr(journal_module, "__file__", str(package / "grading" / "journal.py"))
    found = []
    for change in (None, ("one.py", "2"), ("two.py", ""), ("two.txt", "")):
        if change:
            (package / change[0]).write_text(change[1])
        journal_module._code.cache_clear()
        found.append(fingerprint(LAB))
    journal_module._code.cache_clear()
    assert len(set(found[:3])) == 3 and found[3] == found[2]


def test_a_job_s_key_is_one_that_the_journal_takes(journal):
    job = Job(LAB, "one", "ada", {"cells": []}, seed=1)
    journal.put(job.key(fingerprint(LAB)), result())
    assert journal.get(job.key(fingerprint(LAB))) == result()
