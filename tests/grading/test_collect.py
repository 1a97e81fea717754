"""Collecting: the layouts that Canvas and Moodle give, and zips made to do harm. All zips here are real ones."""

import json
import os
import re
import stat
import struct
import warnings
import zipfile
from pathlib import Path

import pytest

from lecturekit.grading.collect import COLLECTED, REPLACED, SKIPPED, UNCHANGED, collect, safe_id
from lecturekit.grading.unpack import CAPS, Caps

LAB = "lab05_lora"


def notebook(text):
    return json.dumps({"cells": [{"cell_type": "code", "source": text}], "nbformat": 4, "nbformat_minor": 5}).encode()


def make_zip(path, entries, compression=zipfile.ZIP_DEFLATED):
    """A zip of (name or ZipInfo, bytes) pairs, in order; names may be there twice."""
    with warnings.catch_warnings(), zipfile.ZipFile(path, "w", compression) as archive:
        warnings.simplefilter("ignore")  # of a duplicate name
        for name, data in entries:
            archive.writestr(name, data)
    return path


@pytest.fixture
def submitted(tmp_path):
    return tmp_path / "course" / "submitted"


@pytest.fixture
def zipped(tmp_path):
    """Makes a download of these entries."""
    return lambda *entries: make_zip(tmp_path / "submissions.zip", entries)


def placed(submitted):
    """{student/lab/file: its text}; nothing else may lie there."""
    return {str(f.relative_to(submitted)): f.read_bytes() for f in sorted(submitted.rglob("*")) if not f.is_dir()}


def by(results, what):
    return [result for result in results if result.what == what]


def why(results, part):
    """Why the file with this in its name was skipped."""
    (result,) = (result for result in results if part in result.file and result.what == SKIPPED)
    return result.why


# --- layouts --------------------------------------------------------------------------------------------------------
LAYOUTS = {
    "Canvas": ({"leeann_1234_56789_lab05_lora.ipynb", "anon_x7Kq2_56790_lab05_lora-1.ipynb"}, "leeann_1234 anon_x7Kq2"),
    "Canvas, late": ({"leeann_LATE_1234_56789_lab05_lora(2).ipynb"}, "leeann_1234"),
    "Moodle": (
        {
            "Ann Lee_4321_assignsubmission_file_/lab05_lora.ipynb",
            "Jürgen Öz-Groß_77_assignsubmission_file/my_lab/lab05_lora.ipynb",
        },
        "Ann_Lee_4321 Jürgen_Öz-Groß_77",
    ),
    "Moodle, flat": ({"Ann Lee_4321_assignsubmission_file_lab05_lora.ipynb"}, "Ann_Lee_4321"),
    "Moodle in a folder": (
        {f"week 5/{name}_assignsubmission_file_/lab05_lora.ipynb" for name in ("Ann Lee_1", "Bo_2")},
        "Ann_Lee_1 Bo_2",
    ),
    "plain": ({"ann.ipynb", "bob@example.org.ipynb", "c.d-e.ipynb"}, "ann bob@example.org c.d-e"),
    "a folder each": ({"ann/lab05_lora.ipynb", "bob/lab05_lora (1).ipynb", "cid/final.ipynb"}, "ann bob cid"),
    "nbgrader": ({f"{name}/lab05_lora/lab05_lora.ipynb" for name in ("ann", "bob")}, "ann bob"),
    "nbgrader with one student": ({"ann/lab05_lora/lab05_lora.ipynb"}, "ann"),
    "nbgrader in a folder": ({f"submitted/{name}/lab05_lora/lab05_lora.ipynb" for name in ("ann", "bob")}, "ann bob"),
    "the lab's folder": ({"lab05_lora/ann.ipynb", "lab05_lora/bob.ipynb"}, "ann bob"),
    "a folder around": ({"download/ann.ipynb", "download/bob.ipynb"}, "ann bob"),
}


@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize("name", LAYOUTS)
def test_every_layout_is_collected(tmp_path, submitted, name, packed):
    files, students = LAYOUTS[name]
    if packed:
        source = make_zip(tmp_path / "download.zip", [(file, notebook(file)) for file in sorted(files)])
    else:
        source = tmp_path / "download"
        for file in files:
            (source / file).parent.mkdir(parents=True, exist_ok=True)
            (source / file).write_bytes(notebook(file))
    results = collect(source, LAB, submitted)
    assert [result.what for result in results] == [COLLECTED] * len(files)
    assert set(placed(submitted)) == {f"{student}/{LAB}/{LAB}.ipynb" for student in students.split()}
    assert set(placed(submitted).values()) == {notebook(file) for file in files}


@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize(
    ("name", "student"),
    [
        ("leeann_1234_5_my work.zip", "leeann_1234"),
        ("Ann Lee_4_assignsubmission_file_/work.zip", "Ann_Lee_4"),
        ("Ann Lee_4_assignsubmission_file_work.zip", "Ann_Lee_4"),
        ("ann.zip", "ann"),
        ("ann/work.ZIP", "ann"),
    ],
)
def test_a_students_zip_is_opened(tmp_path, submitted, name, student, packed):
    inner = make_zip(tmp_path / "inner.zip", [("work/lab05_lora.ipynb", notebook("x")), ("work/data.csv", b"1")])
    others = {"bob_9_assignsubmission_file_/lab05_lora.ipynb": notebook("bob")}
    if packed:
        source = make_zip(tmp_path / "download.zip", [(name, inner.read_bytes()), *others.items()])
    else:
        source = tmp_path / "download"
        for file, data in {name: inner.read_bytes(), **others}.items():
            (source / file).parent.mkdir(parents=True, exist_ok=True)
            (source / file).write_bytes(data)
    results = collect(source, LAB, submitted)
    assert placed(submitted)[f"{student}/{LAB}/{LAB}.ipynb"] == notebook("x") and len(by(results, COLLECTED)) == 2
    assert why(results, "data.csv") == "it is not a notebook"


def test_a_canvas_download_in_a_folder_is_one(tmp_path, submitted):
    source = tmp_path / "downloads"
    source.mkdir()
    make_zip(source / "submissions.zip", [("leeann_1234_5_lab05_lora.ipynb", notebook("ann"))])
    make_zip(source / "bob.zip", [("lab05_lora.ipynb", notebook("bob"))])
    collect(source, LAB, submitted)
    assert set(placed(submitted)) == {f"leeann_1234/{LAB}/{LAB}.ipynb", f"bob/{LAB}/{LAB}.ipynb"}


@pytest.mark.parametrize("key", ["leeann_1234", "1234", "leeann"])
def test_a_roster_says_who_is_who(zipped, submitted, key):
    source = zipped(("leeann_1234_5_lab05_lora.ipynb", notebook("x")), ("bo_2_6_lab05_lora.ipynb", notebook("y")))
    collect(source, LAB, submitted, {key: "a.lee"})
    assert set(placed(submitted)) == {f"a.lee/{LAB}/{LAB}.ipynb", f"bo_2/{LAB}/{LAB}.ipynb"}


@pytest.mark.parametrize(
    "bad", ["", ".", "..", "a/b", "a\\b", "a*", "[a]", "a?", "../../etc", "-x", ".ssh", "a\0", "a b"]
)
def test_a_roster_with_an_id_that_is_no_folder_is_refused(zipped, submitted, bad):
    with pytest.raises(ValueError, match="roster gives"):
        collect(zipped(("ann.ipynb", notebook("x"))), LAB, submitted, {"ann": bad})
    assert not submitted.exists()


def test_the_notebooks_of_a_lab_are_told_apart(zipped, submitted):
    source = zipped(
        ("ann_1_10_part1.ipynb", notebook("1")),
        ("ann_1_11_part1b-1.ipynb", notebook("1b")),
        ("ann_1_12_other.ipynb", notebook("x")),
    )
    results = collect(source, LAB, submitted, notebooks=["part1", "part1b"])
    assert placed(submitted) == {
        f"ann_1/{LAB}/part1.ipynb": notebook("1"),
        f"ann_1/{LAB}/part1b.ipynb": notebook("1b"),
    }
    assert why(results, "other") == "it is none of part1, part1b"


def test_another_labs_submissions_are_left(tmp_path, submitted):
    for lab in (LAB, "lab06"):
        folder = tmp_path / "old" / "ann" / lab
        folder.mkdir(parents=True)
        (folder / f"{lab}.ipynb").write_bytes(notebook(lab))
    results = collect(tmp_path / "old", LAB, submitted)
    assert placed(submitted) == {f"ann/{LAB}/{LAB}.ipynb": notebook(LAB)}
    assert why(results, "lab06") == "it is of another lab"


def test_a_name_that_tells_no_student_is_named(zipped, submitted):
    results = collect(zipped(("lab05_lora.ipynb", notebook("x")), ("ann.ipynb", notebook("y"))), LAB, submitted)
    assert why(results, "lab05_lora") == "no student can be told from its name"
    assert set(placed(submitted)) == {f"ann/{LAB}/{LAB}.ipynb"}


# --- attempts -------------------------------------------------------------------------------------------------------
def test_the_newest_attempt_counts_and_the_others_are_named(zipped, submitted):
    names = [
        "leeann_1234_99_lab05_lora.ipynb",
        "leeann_LATE_1234_101_lab05_lora-1.ipynb",
        "leeann_1234_100_lab05_lora.ipynb",
    ]
    results = collect(zipped(*((name, notebook(name)) for name in names)), LAB, submitted)
    assert list(placed(submitted).values()) == [notebook(names[1])]
    assert "late" in by(results, COLLECTED)[0].why and "lab05_lora-1" in by(results, COLLECTED)[0].why
    assert all(names[1] in result.why for result in by(results, SKIPPED)) and len(by(results, SKIPPED)) == 2


def test_a_file_named_like_the_notebook_goes_before_another(zipped, submitted):
    names = ["leeann_1234_5_lab05_lora.ipynb", "leeann_1234_6_scratch.ipynb"]
    collect(zipped(*((name, notebook(name)) for name in names)), LAB, submitted)
    assert list(placed(submitted).values()) == [notebook(names[0])]


def test_collecting_twice_changes_nothing(zipped, submitted):
    source = zipped(*((f"s{n}_{n}_{n}_lab05_lora.ipynb", notebook(str(n))) for n in range(5)))
    collect(source, LAB, submitted)
    before = {file: file.stat().st_mtime_ns for file in submitted.parent.rglob("*")}
    results = collect(source, LAB, submitted)
    assert [result.what for result in results] == [UNCHANGED] * 5
    assert {file: file.stat().st_mtime_ns for file in submitted.parent.rglob("*") if file.is_file()} == {
        file: time for file, time in before.items() if file.is_file()
    }


def test_a_newer_one_replaces_and_an_older_one_does_not(tmp_path, submitted):
    def download(attempt):
        entry = (f"ann_1_{attempt}_lab05_lora.ipynb", notebook(str(attempt)))
        return collect(make_zip(tmp_path / "d.zip", [entry]), LAB, submitted)

    assert [download(n)[0].what for n in (9, 10, 9, 10)] == [COLLECTED, REPLACED, SKIPPED, UNCHANGED]
    assert list(placed(submitted).values()) == [notebook("10")]


def test_after_a_crash_before_the_note_the_next_run_completes(tmp_path, submitted, monkeypatch):
    """Killed between the notebook and its timestamp: collecting again puts both right."""
    source = tmp_path / "old" / "ann" / LAB
    source.mkdir(parents=True)

    def state(text, time):
        (source / f"{LAB}.ipynb").write_bytes(notebook(text))
        (source / "timestamp.txt").write_text(time)

    state("1", "2026-01-01 10:00:00 UTC")
    collect(tmp_path / "old", LAB, submitted)
    (submitted / "ann" / LAB / ".collecting-abc").write_text("half a notebook, left by a run that was killed")
    state("2", "2026-01-02 10:00:00 UTC")

    def killed(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr("lecturekit.grading.collect.atomic_write", killed)
        collect(tmp_path / "old", LAB, submitted)
    assert by(collect(tmp_path / "old", LAB, submitted), REPLACED)
    assert placed(submitted) == {
        f"ann/{LAB}/{LAB}.ipynb": notebook("2"),
        f"ann/{LAB}/timestamp.txt": b"2026-01-02 10:00:00.000000 UTC",
    }


def test_a_killed_copy_leaves_the_old_one_whole(tmp_path, submitted, monkeypatch):
    def download(attempt):
        return make_zip(tmp_path / "d.zip", [(f"ann_1_{attempt}_lab05_lora.ipynb", notebook(str(attempt)))])

    collect(download(1), LAB, submitted)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(os, "replace", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        collect(download(2), LAB, submitted)
    assert placed(submitted) == {f"ann_1/{LAB}/{LAB}.ipynb": notebook("1")}


def test_the_time_comes_along_from_nbgraders_layout_only(zipped, tmp_path, submitted):
    forged = make_zip(
        tmp_path / "i.zip", [(f"{LAB}.ipynb", notebook("x")), ("timestamp.txt", b"2020-01-01 00:00:00 UTC")]
    )
    source = zipped(
        (f"ann/{LAB}/{LAB}.ipynb", notebook("a")),
        (f"ann/{LAB}/timestamp.txt", b"2026-01-31T23:59:00+01:00"),
        (f"bob/{LAB}/{LAB}.ipynb", notebook("b")),
        (f"bob/{LAB}/timestamp.txt", b"soon"),
        ("cid.zip", forged.read_bytes()),
        ("Di_4_assignsubmission_file_/lab05_lora.ipynb", notebook("d")),
        ("Di_4_assignsubmission_file_/timestamp.txt", b"2020-01-01 00:00:00 UTC"),
    )
    results = collect(source, LAB, submitted)
    times = {name: data for name, data in placed(submitted).items() if name.endswith(".txt")}
    assert times == {f"ann/{LAB}/timestamp.txt": b"2026-01-31 22:59:00.000000 UTC"}
    assert len(by(results, COLLECTED)) == 4 and len(by(results, SKIPPED)) == 3


# --- whose it is ----------------------------------------------------------------------------------------------------
def test_nobody_can_hand_in_for_somebody_else(zipped, tmp_path, submitted):
    """Names that the student chose (inside a zip, after the download's own part) never tell who it is."""
    claims = [
        ("bob_2_assignsubmission_file_/lab05_lora.ipynb", notebook("1")),
        (f"bob/{LAB}/{LAB}.ipynb", notebook("2")),
        ("bob_2_3_lab05_lora.ipynb", notebook("3")),
    ]
    inner = make_zip(tmp_path / "inner.zip", claims).read_bytes()
    source = zipped(
        ("bob_2_3_lab05_lora.ipynb", notebook("bob")),
        ("eve_6_7_work.zip", inner),
        ("mallory.zip", inner),
        ("trudy_8_9_bob_2_999_lab05_lora.ipynb", notebook("trudy")),
        ("Oscar_5_assignsubmission_file_bob_2_assignsubmission_file_lab05_lora.ipynb", notebook("oscar")),
        ("Oskar_7_assignsubmission_file_/bob_2_assignsubmission_file_/lab05_lora.ipynb", notebook("oskar")),
    )
    collect(source, LAB, submitted)
    assert placed(submitted)[f"bob_2/{LAB}/{LAB}.ipynb"] == notebook("bob")
    assert {name.split("/")[0] for name in placed(submitted)} == {
        *("bob_2", "eve_6", "mallory", "trudy_8", "Oscar_5", "Oskar_7")
    }


def test_students_who_would_share_a_folder_are_both_named(zipped, submitted):
    source = zipped(("Ann.ipynb", notebook("1")), ("ann.ipynb", notebook("2")), ("bob.ipynb", notebook("3")))
    results = collect(source, LAB, submitted)
    assert set(placed(submitted)) == {f"bob/{LAB}/{LAB}.ipynb"}
    assert "Ann" in why(results, "ann.ipynb") and "roster" in why(results, "Ann.ipynb")
    collect(source, LAB, submitted, {"Ann": "ann1", "ann": "ann2"})
    assert placed(submitted)[f"ann1/{LAB}/{LAB}.ipynb"] == notebook("1")


NAMES = ["", ".", "..", "...", "-rf", ".ssh", "~", "a/b", "a\\b", "a:b", "[a]", "a*b", "a?b", "{a}", "a\0b", "a\nb"]
NAMES += [
    "con",
    "NUL.txt",
    "com1",
    "x" * 300,
    "\udc80",
    "a\u202eb",
    "$HOME",
    "`id`",
    "a|b",
    "a;b",
    "a.",
    " a ",
    "_a",
    "é" * 99,
]


@pytest.mark.parametrize("name", NAMES)
def test_an_id_is_one_harmless_name(name):
    made = safe_id(name)
    assert re.fullmatch(r"[^\W_][\w.@+-]*", made) and not made.endswith(".") and len(made.encode()) <= 200
    assert safe_id(made) == made and made.split(".")[0].lower() not in ("con", "nul", "com1")


def test_two_names_do_not_become_one_id():
    assert len({safe_id(name) for name in NAMES}) == len(NAMES)
    assert safe_id("Ann Lee") == "Ann_Lee" and safe_id("ann.lee@example.org") == "ann.lee@example.org"


def test_nbgrader_finds_the_student_again(submitted, zipped):
    """Its glob and its regular expression give back the id that was made."""
    from nbgrader.coursedir import CourseDirectory

    collect(zipped(*((f"{name}.ipynb", notebook(name)) for name in ("a+b", "[x]", "ü", "c.d@e.org"))), LAB, submitted)
    course = CourseDirectory(root=str(submitted.parent))
    pattern = course.format_path("submitted", "(?P<student>[^/]*)", LAB, escape=True)
    folders = [Path(path) for path in submitted.glob("*")]
    assert len(folders) == 4
    for folder in folders:
        assert re.match(pattern, str(folder / LAB))["student"] == folder.name
        assert list(submitted.glob(folder.name)) == [folder]


# --- zips made to do harm -------------------------------------------------------------------------------------------
def special(name, kind):
    info = zipfile.ZipInfo(name)
    info.create_system, info.external_attr = 3, (kind | 0o777) << 16
    return info


GOOD = ("good.ipynb", notebook("good"))
LEADING_OUT = [
    "../x.ipynb",
    "a/../../x.ipynb",
    "/etc/x.ipynb",
    "C:\\x.ipynb",
    "c:x.ipynb",
    "..\\..\\x.ipynb",
    "\\\\host\\x.ipynb",
]


def everything_below(folder):
    return {str(path.relative_to(folder)) for path in folder.rglob("*")}


@pytest.mark.parametrize("name", LEADING_OUT)
def test_names_that_lead_out_are_skipped_and_named(zipped, tmp_path, submitted, name):
    source = zipped((name, notebook("bad")), GOOD)
    before = everything_below(tmp_path)
    results = collect(source, LAB, submitted)
    assert set(placed(submitted)) == {f"good/{LAB}/{LAB}.ipynb"} and len(by(results, SKIPPED)) == 1
    assert by(results, SKIPPED)[0].why in ("its name is an absolute path", "its name leads out of the folder")
    assert all(new.startswith("course") for new in everything_below(tmp_path) - before)


BAD = {
    "a link": (special("bad.ipynb", stat.S_IFLNK), b"/etc/shadow", "a link"),
    "a device": (special("bad.ipynb", stat.S_IFCHR), b"", "special file"),
    "a pipe": (special("bad.ipynb", stat.S_IFIFO), b"", "special file"),
    "a long name": ("x" * 300 + "bad.ipynb", b"", "too long"),
    "a long path": ("d/" * 600 + "bad.ipynb", b"", "too long"),
    "hidden": (".bad.ipynb", b"", "hidden"),
    "a Mac's shadow": ("__MACOSX/._bad.ipynb", b"", "hidden"),
    "a checkpoint": (".ipynb_checkpoints/bad.ipynb", b"", "hidden"),
    "no zip": ("bad.zip", b"PK\x03\x04 not a zip", "zip"),
    "an empty zip file": ("bad.zip", b"", "zip"),
}


@pytest.mark.parametrize("name", BAD)
def test_a_bad_entry_is_skipped_and_the_rest_collected(zipped, submitted, name):
    entry, data, reason = BAD[name]
    results = collect(zipped((entry, data), GOOD), LAB, submitted)
    assert set(placed(submitted)) == {f"good/{LAB}/{LAB}.ipynb"}
    assert reason in by(results, SKIPPED)[0].why


def patched(path, change):
    """A zip with its bytes changed behind its back."""
    data = bytearray(path.read_bytes())
    change(data)
    path.write_bytes(data)
    return path


def test_an_encrypted_entry_is_skipped(zipped, submitted):
    def encrypt(data):
        directory = data.index(b"PK\1\2")
        for place in (6, directory + 8):
            data[place] |= 1

    results = collect(patched(zipped(("bad.ipynb", b"x"), GOOD), encrypt), LAB, submitted)
    assert why(results, "bad") == "it is encrypted" and len(placed(submitted)) == 1


def test_a_name_with_nul_is_skipped(zipped, submitted):
    source = patched(
        zipped(("ba#d.ipynb", b"x"), GOOD), lambda data: data.__setitem__(slice(None), data.replace(b"#", b"\0"))
    )
    results = collect(source, LAB, submitted)
    assert "NUL" in by(results, SKIPPED)[0].why and len(placed(submitted)) == 1


def test_a_name_that_only_claims_to_be_utf8_costs_no_other(zipped, submitted):
    """zipfile alone refuses the whole archive."""
    source = zipped(("bäd.ipynb", notebook("x")), GOOD)
    patched(source, lambda data: data.__setitem__(slice(None), data.replace("ä".encode(), b"\xff\xfe")))
    with pytest.raises(UnicodeDecodeError):
        zipfile.ZipFile(source)
    results = collect(source, LAB, submitted)
    assert f"good/{LAB}/{LAB}.ipynb" in placed(submitted) and len(results) == 2


def test_a_utf8_name_that_does_not_say_so_is_understood(zipped, submitted):
    source = zipped(("jürgen.ipynb", notebook("x")))

    def forget(data):
        for place in (6, data.index(b"PK\1\2") + 8):
            struct.pack_into("<H", data, place, struct.unpack_from("<H", data, place)[0] & ~0x800)

    collect(patched(source, forget), LAB, submitted)
    assert set(placed(submitted)) == {f"jürgen/{LAB}/{LAB}.ipynb"}


def test_of_a_name_that_is_there_twice_one_is_collected_and_both_told(zipped, submitted):
    results = collect(zipped(("ann.ipynb", notebook("1")), ("ann.ipynb", notebook("2"))), LAB, submitted)
    assert list(placed(submitted).values()) == [notebook("2")]
    assert [result.what for result in results] == [COLLECTED, SKIPPED]


def test_a_damaged_attempt_gives_way_to_the_one_before(zipped, submitted):
    source = zipped(("ann_1_5_lab05_lora.ipynb", notebook("old")), ("ann_1_6_lab05_lora.ipynb", os.urandom(5000)))
    patched(source, lambda data: data.__setitem__(slice(1500, 1600), bytes(100)))
    results = collect(source, LAB, submitted)
    assert list(placed(submitted).values()) == [notebook("old")]
    assert why(results, "ann_1_6") == "it could not be read (BadZipFile)"


SMALL = Caps(file=100_000, inner_zip=50_000, total=250_000, ratio=100, ratio_from=20_000)


def test_a_file_over_the_limit_is_skipped_whatever_it_says(zipped, submitted):
    source = zipped(("bad.ipynb", os.urandom(100_001)), GOOD)

    def lie(data):
        struct.pack_into("<I", data, data.index(b"PK\1\2") + 24, 10)  # unpacked: 10 bytes

    for archive in (source, patched(source, lie)):
        results = collect(archive, LAB, submitted, caps=SMALL)
        assert by(results, SKIPPED)[0].why and set(placed(submitted)) == {f"good/{LAB}/{LAB}.ipynb"}


def test_a_bomb_is_stopped_while_it_unpacks(zipped, submitted):
    results = collect(zipped(("bad.ipynb", b" " * 90_000), GOOD), LAB, submitted, caps=SMALL)
    assert "zip bomb" in why(results, "bad") and len(placed(submitted)) == 1


def test_a_page_of_equal_lines_is_no_bomb(zipped, submitted):
    collect(zipped(("ann.ipynb", notebook("loss: nan\n" * 7_000_000))), LAB, submitted)
    assert len(placed(submitted)) == 1 and CAPS.ratio > 1032


def test_all_together_are_limited_too(zipped, submitted):
    results = collect(zipped(*((f"s{n}.ipynb", os.urandom(90_000)) for n in range(4))), LAB, submitted, caps=SMALL)
    assert len(placed(submitted)) == 2 and "the download unpacks to more" in by(results, SKIPPED)[0].why


def test_a_zip_in_a_zip_in_a_zip_is_not_opened(zipped, tmp_path, submitted):
    inner = make_zip(tmp_path / "1.zip", [("lab05_lora.ipynb", notebook("x"))]).read_bytes()
    outer = make_zip(tmp_path / "2.zip", [("deep.zip", inner)]).read_bytes()
    results = collect(zipped(("ann.zip", outer), GOOD), LAB, submitted)
    assert "zip inside a zip" in why(results, "deep.zip") and len(placed(submitted)) == 1


def test_an_inner_zip_over_the_limit_or_with_too_many_files_is_not_opened(zipped, tmp_path, submitted):
    large = make_zip(tmp_path / "1.zip", [("x.ipynb", os.urandom(60_000))]).read_bytes()
    many = make_zip(tmp_path / "2.zip", [(str(n), b"") for n in range(200)], zipfile.ZIP_STORED).read_bytes()
    caps = Caps(inner_zip=50_000, inner_directory=5_000)
    results = collect(zipped(("ann.zip", large), ("bob.zip", many), GOOD), LAB, submitted, caps=caps)
    assert "MB" in why(results, "ann.zip") and "too many" in why(results, "bob.zip") and len(placed(submitted)) == 1


def test_links_in_a_folder_are_not_followed(tmp_path, submitted):
    source, secret = tmp_path / "download", tmp_path / "secret"
    source.mkdir()
    secret.mkdir()
    (secret / "lab05_lora.ipynb").write_bytes(notebook("secret"))
    (source / "good.ipynb").write_bytes(notebook("good"))
    (source / "ann.ipynb").symlink_to(secret / "lab05_lora.ipynb")
    (source / "bob").symlink_to(secret)
    (source / "cid.zip").symlink_to(secret / "lab05_lora.ipynb")
    os.mkfifo(source / "di.ipynb")
    results = collect(source, LAB, submitted)
    assert placed(submitted) == {f"good/{LAB}/{LAB}.ipynb": notebook("good")} and len(by(results, SKIPPED)) == 4


def test_nothing_is_written_through_a_link(zipped, tmp_path, submitted):
    (tmp_path / "elsewhere").mkdir()
    submitted.mkdir(parents=True)
    (submitted / "good").symlink_to(tmp_path / "elsewhere")
    results = collect(zipped(GOOD), LAB, submitted)
    assert "is a link" in by(results, SKIPPED)[0].why and not list((tmp_path / "elsewhere").iterdir())


def test_a_file_that_cannot_be_written_costs_no_other(zipped, submitted):
    submitted.mkdir(parents=True)
    (submitted / "bad").write_text("a file where a folder should be")
    results = collect(zipped(("bad.ipynb", notebook("x")), GOOD), LAB, submitted)
    assert "could not be written" in why(results, "bad") and f"good/{LAB}/{LAB}.ipynb" in placed(submitted)


def test_no_source_says_what_is_expected(tmp_path, submitted):
    with pytest.raises(FileNotFoundError, match="name a downloaded zip"):
        collect(tmp_path / "nowhere.zip", LAB, submitted)
    (tmp_path / "broken.zip").write_bytes(b"PK")
    with pytest.raises(ValueError, match="neither a zip"):
        collect(tmp_path / "broken.zip", LAB, submitted)


def test_the_ways_a_name_is_shown_are_harmless(zipped, submitted):
    results = collect(zipped(("<img src=x>\x1b[2J/a.ipynb", notebook("x")), ("<b>.txt", b"")), LAB, submitted)
    assert not any(char in result.file + result.student for result in results for char in "<>\x1b[")
