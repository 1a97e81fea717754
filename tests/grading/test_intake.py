"""Intake: whatever lies in a submitted folder, a notebook comes out, and nothing is followed out of the folder."""

import copy
import json
import os
import random
import socket
from datetime import datetime

import nbformat
import pytest

from lecturekit.grading.intake import Limits, read_submission, read_timestamp
from lecturekit.grading.reader import read_notebook, shown
from lecturekit.grading.stage import is_test, stage

LAB = "lab99_tiny"
DOUBLE = "def double(x):\n    return 2 * x"
SMALL = Limits(file_bytes=300_000, cells=20, cell_characters=500, characters=5000, attachment_bytes=1000)


@pytest.fixture
def folder(tmp_path):
    """…/<student>/<lab>, empty."""
    folder = tmp_path / "submitted" / "anna" / LAB
    folder.mkdir(parents=True)
    return folder


@pytest.fixture
def answered(released, by_id):
    """The released notebook with one answer in it."""
    notebook = copy.deepcopy(released)
    by_id(notebook, "double").source = DOUBLE
    return notebook


@pytest.fixture
def text(answered):
    return json.dumps(answered, indent=1)


def hand_in(folder, content, name=f"{LAB}.ipynb"):
    data = content.encode() if isinstance(content, str) else content
    (folder / name).write_bytes(data)


def sources(notebook):
    return [cell.source for cell in notebook.cells]


def told(submission, *words):
    """Whether one of the notes has all these words."""
    return any(all(word in note for word in words) for note in submission.notes)


# --- a good one -----------------------------------------------------------------------------------------------------
def test_an_honest_notebook_is_read_whole_and_without_a_word(folder, text, answered, released):
    hand_in(folder, text)
    (folder / "timestamp.txt").write_text("2026-01-31 23:59:00 UTC")
    submission = read_submission(folder, LAB)
    assert sources(submission.notebook) == sources(answered)
    assert submission.notes == () and submission.file == f"{LAB}.ipynb"
    nbformat.validate(submission.notebook)
    assert stage(submission.notebook, released) == stage(answered, released)


def test_the_released_labs_are_read_as_nbformat_reads_them():
    from lecturekit.labs import repository

    for path in repository().glob("labs/*/*.ipynb"):
        notebook, notes = read_notebook(path.read_bytes())
        wanted = nbformat.read(path, as_version=4)
        assert notes == [] and sources(notebook) == sources(wanted)
        assert [cell.id for cell in notebook.cells] == [cell.id for cell in wanted.cells]


def test_only_sources_and_ids_are_read(folder, answered):
    for cell in answered.cells:
        cell.metadata["trusted"] = True
        if cell.cell_type == "code":
            cell.outputs = [nbformat.v4.new_output("stream", text="left over")]
    hand_in(folder, json.dumps(answered))
    notebook = read_submission(folder, LAB).notebook
    assert "left over" not in json.dumps(notebook) and "trusted" not in json.dumps(notebook)
    assert {key for cell in notebook.cells for key in cell.metadata} == {"nbgrader"}


@pytest.mark.parametrize("text_first", [True, False])
def test_outputs_do_not_count_towards_memory(folder, answered, text_first):
    """The file is held once; what it holds is never built. Measured here on 30 MB, in bytes that Python allocated."""
    import tracemalloc

    lines = ["a line of é \\ and \n"] * 10**6
    code = next(cell for cell in answered.cells if cell.cell_type == "code")
    code.outputs = [{"output_type": "stream", "name": "stdout", "text": "".join(lines) if text_first else lines}]
    hand_in(folder, json.dumps(answered))
    size = (folder / f"{LAB}.ipynb").stat().st_size
    wanted = sources(answered)
    tracemalloc.start()
    submission = read_submission(folder, LAB)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert size > 20e6 and peak < size + 5e6
    assert sources(submission.notebook) == wanted and submission.notes == ()


# --- the folder -----------------------------------------------------------------------------------------------------
def make_link(path, tmp_path):
    secret = tmp_path / "secret.ipynb"
    secret.write_text(json.dumps({"cells": [{"cell_type": "code", "source": "secret"}]}))
    path.symlink_to(secret)


def make_socket(path, tmp_path):
    short = tmp_path / "s"  # a socket's path may have only about a hundred characters
    with socket.socket(socket.AF_UNIX) as made:
        made.bind(str(short))
    short.rename(path)


STRANGE = {
    "link to a notebook": (make_link, "a link"),
    "link to shadow": (lambda path, _: path.symlink_to("/etc/shadow"), "a link"),
    "link to nothing": (lambda path, _: path.symlink_to("nowhere"), "a link"),
    "link to itself": (lambda path, _: path.symlink_to(path.name), "a link"),
    "link to a device": (lambda path, _: path.symlink_to("/dev/zero"), "a link"),
    "pipe": (lambda path, _: os.mkfifo(path), "a pipe"),
    "folder": (lambda path, _: path.mkdir(), "a folder"),
    "socket": (make_socket, "a socket"),
}


@pytest.mark.parametrize("name", STRANGE)
def test_what_is_no_file_counts_as_not_handed_in(folder, tmp_path, name):
    make, kind = STRANGE[name]
    make(folder / f"{LAB}.ipynb", tmp_path)
    make(folder / "timestamp.txt", tmp_path)
    submission = read_submission(folder, LAB)
    assert submission.notebook.cells == [] and submission.file == "" and told(submission, kind, "not handed in")
    moment, note = read_timestamp(folder)
    assert moment is None and kind in note


@pytest.mark.skipif(os.geteuid() != 0, reason="only root may make a device or give a file to somebody else")
def test_devices_and_files_of_somebody_else_count_as_not_handed_in(folder, text):
    try:
        os.mknod(folder / f"{LAB}.ipynb", 0o20600, os.makedev(1, 5))
    except PermissionError:
        pytest.skip("this machine lets nobody make a device")
    assert told(read_submission(folder, LAB), "a device")
    (folder / f"{LAB}.ipynb").unlink()
    hand_in(folder.parent, text, "theirs")
    os.chown(folder.parent / "theirs", 12345, 12345)
    os.link(folder.parent / "theirs", folder / f"{LAB}.ipynb")
    submission = read_submission(folder, LAB)
    assert submission.notebook.cells == [] and told(submission, "hard link")


@pytest.mark.parametrize("depth", [0, 1])
def test_a_folder_that_is_a_link_is_not_followed(tmp_path, folder, text, depth):
    """submitted/<student> or submitted/<student>/<lab> leads somewhere else."""
    hand_in(folder, text)
    (folder / "timestamp.txt").write_text("2026-01-31 23:59:00 UTC")
    other = tmp_path / "others" / "bert"
    link = other / LAB if depth == 0 else other
    link.parent.mkdir(parents=True)
    link.symlink_to(folder if depth == 0 else folder.parent)
    assert len(read_submission(folder, LAB).notebook.cells) > 0
    submission = read_submission(other / LAB, LAB)
    assert submission.notebook.cells == [] and told(submission, "a link")
    assert read_timestamp(other / LAB)[0] is None


def test_a_missing_folder_is_an_empty_submission(tmp_path):
    for folder in (tmp_path / "nobody" / LAB, tmp_path / "a" / "b" / "c" / LAB):
        submission = read_submission(folder, LAB)
        assert submission.notebook.cells == [] and told(submission, "no folder")


def test_other_files_are_left_and_named(folder, text):
    hand_in(folder, text)
    for name in ("torch.py", "<script>alert(1)</script>.png".replace("/", "-"), "a\nb\u202e", "x" * 200, "d", "e", "f"):
        (folder / name).write_text("raise SystemExit")
    (folder / "data").mkdir()
    submission = read_submission(folder, LAB)
    (note,) = submission.notes
    assert "and 3 more" in note and "<" not in note and "\n" not in note and "\u202e" not in note
    assert len(note) < 400


# --- another name ---------------------------------------------------------------------------------------------------
def test_a_notebook_of_another_name_is_taken_when_it_is_the_only_one(folder, text, answered):
    hand_in(folder, text, "lab99_tiny(1).ipynb")
    submission = read_submission(folder, LAB)
    assert sources(submission.notebook) == sources(answered)
    assert told(submission, f"{LAB}.ipynb was handed in as lab99_tiny(1).ipynb")


def test_of_several_the_one_made_from_the_release_is_taken(folder, text, answered):
    hand_in(folder, text, "mine.ipynb")
    hand_in(folder, json.dumps(nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell("1")])), "a.ipynb")
    assert read_submission(folder, LAB).notebook.cells == []
    assert told(read_submission(folder, LAB), "not clear", "a.ipynb", "mine.ipynb")
    submission = read_submission(folder, LAB, grade_ids=frozenset({"double", "root"}))
    assert sources(submission.notebook) == sources(answered) and submission.file == "mine.ipynb"


def test_another_notebook_of_the_lab_is_not_taken_for_it(folder, text):
    hand_in(folder, text, "part2.ipynb")
    submission = read_submission(folder, "part1", others=["part2"])
    assert submission.notebook.cells == [] and told(submission, "part1.ipynb was not handed in")


def test_links_are_not_taken_under_another_name(folder, tmp_path):
    make_link(folder / "other.ipynb", tmp_path)
    assert read_submission(folder, LAB).notebook.cells == []


# --- the file -------------------------------------------------------------------------------------------------------
NOT_NOTEBOOKS = {
    "empty": b"",
    "blank": b" \n\n ",
    "zeros": bytes(5000),
    "noise": random.Random(1).randbytes(5000),
    "text": b"Dear teacher, my computer is broken.",
    "a list": b"[1, 2]",
    "a number": b"1e9999",
    "null": b"null",
    "an object": b"{}",
    "cells are an object": b'{"cells": {}}',
    "cells are null": b'{"cells": null, "nbformat": 4}',
    "html": b"<!DOCTYPE html><title>Sign in</title>",
    "zip": b"PK\x03\x04" + bytes(50),
    "open string": b'{"cells": "' + b"x" * 1000,
    "open lists": b'{"cells": ' + b"[" * 100_000,
    "open objects": b'{"a":' * 50_000,
}


@pytest.mark.parametrize("name", NOT_NOTEBOOKS)
def test_what_is_no_notebook_is_empty_with_a_note(folder, name):
    hand_in(folder, NOT_NOTEBOOKS[name])
    submission = read_submission(folder, LAB)
    assert submission.notebook.cells == [] and len(submission.notes) >= 1


def test_a_file_that_breaks_off_gives_the_cells_before(folder, text, answered):
    place = text.index("2 * x")
    hand_in(folder, text[:place])
    submission = read_submission(folder, LAB)
    count = [index for index, cell in enumerate(answered.cells) if "2 * x" in cell.source][0]
    assert sources(submission.notebook) == sources(answered)[:count] and told(submission, "damaged")


def test_after_a_merge_conflict_the_other_cells_are_read(folder, answered, released, by_id):
    text = nbformat.writes(answered)  # one line a value, as files on disk are
    place = text.index('"cell_type"', text.index("Write `double`"))
    place = text.rindex("{", 0, place)
    hand_in(folder, text[:place] + "<<<<<<< HEAD\n" + text[place:])
    submission = read_submission(folder, LAB)
    assert sources(submission.notebook) == sources(answered) and told(submission, "damaged")


def rewritten(text, change):
    notebook = json.loads(text)
    change(notebook)
    return json.dumps(notebook)


def test_cells_that_are_none_are_dropped_and_named(folder, text, answered):
    hand_in(folder, rewritten(text, lambda n: n["cells"].__setitem__(slice(2, 2), [None, 5, "x", [], {}])))
    submission = read_submission(folder, LAB)
    assert [s for s in sources(submission.notebook) if s] == sources(answered)
    assert told(submission, "Not a cell, left out: cell 3, cell 4, cell 5, cell 6.")


READABLE = {
    "byte order mark": lambda text: b"\xef\xbb\xbf" + text.encode(),
    "UTF-16": lambda text: text.encode("utf-16"),
    "NaN": lambda text: text.replace('"cells"', '"a": NaN, "b": -Infinity, "cells"').encode(),
    "deep nesting": lambda text: text.replace('"cells"', f'"deep": {"[" * 99_999}{"]" * 99_999}, "cells"').encode(),
    "deep metadata": lambda text: (
        text.replace('"metadata": {', '"metadata": {"deep":' + "[" * 9999 + "]" * 9999 + ",", 1)
        .replace(",}", "}")
        .encode()
    ),
    "a comma too many": lambda text: text.replace("\n ],", "\n ,],").encode(),
    "trailing text": lambda text: text.encode() + b"\n}}garbage",
    "no nbformat": lambda text: text.replace('"nbformat"', '"nbfrmat"').encode(),
    "minor of the future": lambda text: text.replace('"nbformat_minor": 5', '"nbformat_minor": 999').encode(),
    "lines": lambda text: rewritten(
        text, lambda n: [c.__setitem__("source", c["source"].splitlines(True)) for c in n["cells"]]
    ).encode(),
}


@pytest.mark.parametrize("name", READABLE)
def test_what_can_be_read_is_read(folder, text, answered, name):
    changed = READABLE[name](text)
    assert changed != text.encode()
    hand_in(folder, changed)
    assert sources(read_submission(folder, LAB).notebook) == sources(answered)


def test_a_newer_format_is_read_and_named(folder, text, answered):
    hand_in(folder, text.replace('"nbformat": 4', '"nbformat": 7'))
    submission = read_submission(folder, LAB)
    assert sources(submission.notebook) == sources(answered) and told(submission, "format 7")


def test_of_a_key_that_is_there_twice_the_last_counts(folder):
    cell = '{"cell_type": "code", "source": "old", "source": "new"}'
    hand_in(folder, f'{{"cells": [{cell}, {cell}], "cells": [{cell}]}}')
    submission = read_submission(folder, LAB)
    assert sources(submission.notebook) == ["new"]
    assert told(submission, "twice") and told(submission, "two lists of cells")


def test_halves_of_characters_are_replaced(folder):
    cells = (
        '{"cell_type": "code", "source": "a = \'\\ud800\' # \\ud83d\\ude00"}, {"cell_type":"code","source":"b\\u0000"}'
    )
    hand_in(folder, f'{{"cells": [{cells}]}}')
    submission = read_submission(folder, LAB)
    assert sources(submission.notebook) == ["a = '\ufffd' # \U0001f600", "b\ufffd"]
    nbformat.writes(submission.notebook).encode()
    assert told(submission, "NUL", "cell 2")


def test_what_is_not_utf8_is_read_with_a_note(folder):
    hand_in(folder, '{"cells": [{"cell_type": "markdown", "source": "größer"}]}'.encode("latin-1"))
    submission = read_submission(folder, LAB)
    assert sources(submission.notebook) == ["gr\ufffd\ufffder"] and told(submission, "UTF-8", "cell 1")


def test_format_3_is_brought_up_to_date(folder, answered, released, by_id):
    for cell in answered.cells:
        cell.metadata = {k: v for k, v in cell.metadata.items() if k == "nbgrader"}
    old = nbformat.convert(answered, 3)
    old.worksheets[0].cells.append({"cell_type": "heading", "level": "x", "source": "Title", "metadata": {}})
    old.worksheets[0].cells.append({"cell_type": "heading", "level": 2, "source": "Title"})
    hand_in(folder, json.dumps(old))
    submission = read_submission(folder, LAB)
    assert by_id(submission.notebook, "double").source == DOUBLE
    assert sources(submission.notebook)[-2:] == ["# Title", "## Title"] and told(submission, "old format")
    assert by_id(stage(submission.notebook, released).notebook, "double").source == DOUBLE
    nbformat.validate(submission.notebook)
    text = json.dumps(old)
    hand_in(folder, text[: text.index("# Title") if "# Title" in text else text.rindex("Title")])
    broken_off = read_submission(folder, LAB)
    assert told(broken_off, "damaged") and by_id(broken_off.notebook, "double").source == DOUBLE
    nbformat.validate(broken_off.notebook)


def test_an_empty_second_list_of_cells_takes_nothing_away(folder):
    hand_in(folder, '{"cells": [{"cell_type": "code", "source": "a"}], "worksheets": []}')
    submission = read_submission(folder, LAB)
    assert sources(submission.notebook) == ["a"] and not told(submission, "two lists")


def test_a_cell_with_an_answer_survives_endless_nesting_in_its_outputs(folder):
    cell = '{"cell_type": "code", "source": "a", "outputs": ' + "[" * 300_000
    hand_in(folder, f'{{"cells": [{{"cell_type": "code", "source": "b"}}, {cell}')
    submission = read_submission(folder, LAB)
    assert sources(submission.notebook) == ["b", "a"] and told(submission, "damaged")


def test_pictures_come_along_within_their_limit(folder):
    picture = {"a.png": {"image/png": "aGk=", "x": 3}, "b": 5}
    cells = [
        {"cell_type": "markdown", "source": "a", "attachments": picture},
        {"cell_type": "markdown", "source": "b", "attachments": {"b.png": {"image/png": "a" * 2000}}},
        {"cell_type": "markdown", "source": "c", "attachments": ["x"]},
    ]
    hand_in(folder, json.dumps({"cells": cells}))
    submission = read_submission(folder, LAB, SMALL)
    assert [cell.attachments for cell in submission.notebook.cells] == [{"a.png": {"image/png": "aGk="}}, {}, {}]
    assert told(submission, "too large", "cell 2")


# --- size -----------------------------------------------------------------------------------------------------------
def test_a_file_over_the_limit_is_not_read(folder):
    hand_in(folder, " " * (SMALL.file_bytes + 1))
    submission = read_submission(folder, LAB, SMALL)
    assert submission.notebook.cells == [] and told(submission, "0.3 MB")


@pytest.mark.parametrize("source", ["x" * 501, ["x"] * 501, "x" * 50_000])
def test_a_cell_too_long_is_left_out_and_the_others_kept(folder, source):
    marks = {"nbgrader": {"grade_id": "double"}}
    cells = [
        {"cell_type": "code", "source": "a"},
        {"cell_type": "code", "source": source, "metadata": marks},
        {"cell_type": "code", "source": "x" * 500},
    ]
    hand_in(folder, json.dumps({"cells": cells}))
    submission = read_submission(folder, LAB, SMALL)
    assert sources(submission.notebook) == ["a", "x" * 500] and told(submission, "cell 2 (double)", "500 characters")


def test_what_is_over_the_whole_is_left_out(folder):
    hand_in(folder, json.dumps({"cells": [{"cell_type": "code", "source": "x" * 499}] * 11}))
    submission = read_submission(folder, LAB, SMALL)
    assert len(submission.notebook.cells) == 10 and told(submission, "cell 11", "5,000 characters")


def test_cells_over_the_limit_are_not_read(folder):
    hand_in(folder, json.dumps({"cells": [{"cell_type": "code", "source": "x"}] * 21}))
    submission = read_submission(folder, LAB, SMALL)
    assert len(submission.notebook.cells) == 20 and told(submission, "first 20 cells")


@pytest.mark.parametrize("seed", range(4))
def test_no_damage_to_the_bytes_raises(text, seed):
    """Bytes replaced, dropped, copied, cut: what comes out is a notebook that can be written and staged."""
    damage = random.Random(seed)
    start = text.encode()
    pieces = [
        b'"',
        b"{",
        b"}",
        b"[",
        b"]",
        b",",
        b":",
        b"\\",
        b"null",
        b"1e999",
        b"\xff",
        b"\x00",
        b'"cells":',
        b'\\ud800"',
    ]
    for _ in range(250):
        data = bytearray(start)
        for _ in range(damage.randint(1, 8)):
            place = damage.randrange(len(data))
            data[place : place + damage.choice([0, 1, 1, 30])] = damage.choice([*pieces, bytes(data[place:][:300])])
        notebook, notes = read_notebook(bytes(data[: damage.choice([len(data), damage.randrange(len(data))])]))
        json.dumps(notebook, ensure_ascii=False).encode()
        assert all(isinstance(cell.source, str) for cell in notebook.cells) and all(len(note) < 400 for note in notes)


# --- timestamp ------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    "text",
    [
        "2026-01-31 23:59:00 UTC",
        "2026-01-31 23:59:00.000000 UTC\n",
        "2026-01-31 23:59",
        "2026-02-01T00:59:00+01:00",
        "2026-01-31 15:59:00.000 America/Los_Angeles",
    ],
)
def test_the_time_is_read_as_utc(folder, text):
    (folder / "timestamp.txt").write_text(text)
    assert read_timestamp(folder) == (datetime(2026, 1, 31, 23, 59), "")


BAD_TIMES = [
    "",
    "now",
    "12",
    "2026-13-01 00:00",
    "0001-01-01 00:00:00+14:00",
    "2026-01-31 23:59 /etc/passwd",
    "9" * 500,
]


@pytest.mark.parametrize("text", [*BAD_TIMES, "2026-01-31 23:59 ../../../etc/passwd", "\0"])
def test_a_bad_time_is_none_with_a_note(folder, text):
    (folder / "timestamp.txt").write_text(text)
    moment, note = read_timestamp(folder)
    assert moment is None and "timestamp.txt was ignored" in note


def test_an_unknown_time_zone_is_told(folder):
    (folder / "timestamp.txt").write_text("2026-01-31 23:59:00 Mars/Olympus")
    moment, note = read_timestamp(folder)
    assert moment == datetime(2026, 1, 31, 23, 59) and "Mars" in note


def test_no_timestamp_is_nothing_wrong(folder):
    assert read_timestamp(folder) == (None, "")


def test_names_are_shown_without_markup():
    assert shown("lab05 (1).ipynb") == "lab05 (1).ipynb"
    assert shown("<b>\n*\u202e`[x](y)") == "\\x3cb\\x3e\\x0a\\x2a\\x202e\\x60\\x5bx\\x5d(y)"
    assert len(shown("x" * 500)) <= 60 and len(shown("\udc80" * 500)) <= 60


# --- staging what was read ------------------------------------------------------------------------------------------
VALUES = [None, True, 5, 1.5, "", "double", "double-test", "x" * 100_000, "\ud800", [], ["a", 3, None, ["b"]], {}]
VALUES += [{"nbgrader": {"grade_id": "double-test", "solution": True, "points": 99}}, {"nbgrader": ["grade_id"]}]
VALUES += [{"a.png": {"image/png": "x" * 3_000_000}}, {"a": {"image/png": 3}}, {"nbgrader": {"grade_id": ["x"]}}]


def mutated(notebook, rand):
    """The same notebook with a few cells, types, ids, places or values changed at random."""
    notebook = copy.deepcopy(notebook)
    cells = notebook["cells"]
    for _ in range(rand.randint(1, 6)):
        place = rand.randrange(len(cells) + 1)
        cell = cells[place] if place < len(cells) else None
        change = rand.randrange(7)
        if change == 0 or not isinstance(cell, dict):
            cells.insert(place, copy.deepcopy(rand.choice([*cells, *VALUES[:12]])))
        elif change == 1:
            del cells[place]
        elif change == 2:
            rand.shuffle(cells)
        elif change == 3:
            cell[rand.choice(["id", "metadata", "source", "cell_type", "attachments", "outputs"])] = rand.choice(VALUES)
        elif change == 4:
            cell.pop(rand.choice(list(cell) or ["x"]), None)
        elif change == 5:
            cell["source"] = rand.choice(["assert True", "double = lambda x: 2 * x", "raise SystemExit", ["a\n", "b"]])
        else:
            marks = cell.get("metadata")
            if isinstance(marks, dict) and isinstance(marks.get("nbgrader"), dict):
                marks["nbgrader"][rand.choice(["grade_id", "points", "grade", "solution", "locked", "x"])] = (
                    rand.choice(VALUES)
                )
    return notebook


def nbgrader_cells(notebook):
    """What must be as released, cell by cell: ids, metadata, and the whole of what is graded by running it."""
    marked = [cell for cell in notebook.cells if "nbgrader" in cell.metadata]
    return [(cell.id, cell.cell_type, cell.metadata, dict(cell) if is_test(cell) else None) for cell in marked]


@pytest.mark.parametrize("seed", range(10))
def test_no_mutation_changes_what_the_release_asks(released, answered, seed):
    """2,500 random mutations: staging raises nothing; test cells, points and ids are the release's."""
    rand = random.Random(seed)
    start = json.loads(json.dumps(answered))
    ids = {cell.id for cell in released.cells}
    own = {"id", "cell_type", "metadata", "source", "outputs", "execution_count", "attachments"}
    for number in range(250):
        submitted = nbformat.from_dict(mutated(start, rand))
        staged = stage(submitted, released).notebook
        assert nbgrader_cells(staged) == nbgrader_cells(released)
        for cell in staged.cells:
            assert cell.id in ids or cell.id == "about-your-submission" or cell.id.startswith("own-cell-")
            assert set(cell) <= own and (cell.id in ids or cell.metadata == {})
        if number % 25 == 0:
            nbformat.validate(staged)
        nbformat.writes(staged).encode()


@pytest.mark.parametrize("submitted", [None, {}, {"cells": None}, {"cells": 5}, {"cells": [1, None, "x"]}, [], "x"])
def test_a_notebook_without_cells_is_staged_as_one_where_all_is_missing(released, submitted):
    staged = stage(submitted, released)
    assert nbgrader_cells(staged.notebook) == nbgrader_cells(released) and staged.notes


def test_notes_of_the_intake_are_told_first(released):
    staged = stage(copy.deepcopy(released), released, ["It was handed in as x.ipynb."])
    assert staged.notes == ["It was handed in as x.ipynb."]
    assert "handed in as x.ipynb" in staged.notebook.cells[0].source


def test_notes_do_not_grow_without_end(released, by_id):
    submitted = copy.deepcopy(released)
    submitted.cells += [copy.deepcopy(by_id(released, "double-test")) for _ in range(200)]
    notes = stage(submitted, released).notes
    assert len(notes) == 51 and "150 more" in notes[-1]


def test_a_source_nested_without_end_is_empty_with_a_note(folder):
    deep = "[" * 50_000 + "]" * 50_000
    hand_in(folder, f'{{"cells": [{{"cell_type": "code", "source": {deep}}}]}}')
    submission = read_submission(folder, LAB)
    assert sources(submission.notebook) == [""] and told(submission, "could not be read", "cell 1")


def test_pictures_of_absurd_size_are_left_out_when_staging(released, by_id):
    submitted = copy.deepcopy(released)
    by_id(submitted, "explain").source = "See ![it](attachment:a.png)"
    by_id(submitted, "explain").attachments = {"a.png": {"image/png": "x" * 2_000_001}}
    staged = stage(submitted, released)
    assert "attachments" not in by_id(staged.notebook, "explain") and "2,000,000 bytes" in staged.notes[0]
