"""Attacks by the folder and the file handed in, many by accident, and by what is downloaded. All answers are honest."""

from __future__ import annotations

import json
import os
import zipfile
from pathlib import Path
from typing import Any

from grading_attacks.kit import LAB, NOTHING, Attack


def write(folder: Path, notebook: Any) -> Path:
    """The ordinary way: the notebook alone, in its folder."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{LAB}.ipynb"
    path.write_text(json.dumps(notebook))
    return path


def holding(data: bytes):
    def lay(folder: Path, notebook: Any) -> None:
        write(folder, notebook).write_bytes(data)

    return lay


def encoded(encoding: str):
    def lay(folder: Path, notebook: Any) -> None:
        write(folder, notebook).write_bytes(json.dumps(notebook, ensure_ascii=False).encode(encoding))

    return lay


def named(name: str):
    def lay(folder: Path, notebook: Any) -> None:
        write(folder, notebook).rename(folder / name)

    return lay


def beside(**files: str):
    """The notebook with other files beside it; an underscore stands for a dot in their names, two for a slash."""

    def lay(folder: Path, notebook: Any) -> None:
        write(folder, notebook)
        for name, text in files.items():
            path = folder / name.replace("__", "/").replace("_", ".")
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)

    return lay


def linked(target: str, name: str = f"{LAB}.ipynb"):
    """A symbolic link in the folder. target may be relative to the student's course/submitted/<student>/<lab>."""

    def lay(folder: Path, notebook: Any) -> None:
        write(folder, notebook)
        (folder / name).unlink(missing_ok=True)
        (folder / name).symlink_to(target)

    return lay


def missing(folder: Path, notebook: Any) -> None:
    folder.mkdir(parents=True)
    (folder / "answers.txt").write_text("my answers")


def a_folder_instead(folder: Path, notebook: Any) -> None:
    (folder / f"{LAB}.ipynb").mkdir(parents=True)


def a_pipe(folder: Path, notebook: Any) -> None:
    folder.mkdir(parents=True)
    os.mkfifo(folder / f"{LAB}.ipynb")


def linked_folder(folder: Path, notebook: Any) -> None:
    folder.parent.mkdir(parents=True)
    folder.symlink_to("../honest-1/" + LAB)


def unreadable(folder: Path, notebook: Any) -> None:
    write(folder, notebook).chmod(0)


def many_links(folder: Path, notebook: Any) -> None:
    """The notebook is right; what lies beside it must neither be read nor copied."""
    write(folder, notebook)
    course = Path(*[".."] * 3)
    for name, target in {
        "shadow.txt": "/etc/shadow",
        "gradebook.db": str(course / "gradebook.db"),
        "secret": str(course / "grading_secret"),
        "solutions": str(course.parent / "solutions"),
        "friend.ipynb": f"../../honest-1/{LAB}/{LAB}.ipynb",
        "loop": "loop",
        "root": "/",
    }.items():
        (folder / name).symlink_to(target)


EVIL = "print('LE' + 'AK a file beside the notebook was imported')\n"


def _file(name: str, lay: Any, noted: str = "", refused: bool = False) -> Attack:
    """noted: what must be told where the notebook counts for nothing."""
    return Attack(name, lay=lay, noted=noted, refused=refused, earned=NOTHING if noted else {})


DAMAGED, NO_NOTEBOOK, LINK = "is damaged", "is not a notebook", "counts as not handed in: it is a link"


ATTACKS = [
    _file("corrupt", holding(b'{"cells": [{"cell_type": "code", "sour'), DAMAGED),
    _file("empty", holding(b""), "is empty"),
    _file("only_zeros", holding(bytes(5000)), NO_NOTEBOOK),
    _file("a_list", holding(b"[]"), NO_NOTEBOOK),
    _file("a_number", holding(b"1e999"), NO_NOTEBOOK),
    _file("no_cells", holding(b'{"nbformat": 4, "nbformat_minor": 5, "metadata": {}}'), NO_NOTEBOOK),
    _file("deep_json", holding(b'{"cells":' + b"[" * 200_000 + b"]" * 200_000 + b"}"), "left out: cell 1"),
    _file("a_long_number", holding(b'{"nbformat": ' + b"9" * 100_000 + b"}"), NO_NOTEBOOK),
    _file("a_picture", holding(b"\x89PNG\r\n\x1a\n" + bytes(range(256))), NO_NOTEBOOK),
    _file("a_web_page", holding(b"<!doctype html><title>Sign in</title>"), NO_NOTEBOOK),
    _file("with_a_mark", encoded("utf-8-sig")),
    _file("in_utf_16", encoded("utf-16")),
    _file("missing", missing, "was not handed in"),
    _file("wrong_name", named(f"{LAB}(1).ipynb")),
    _file("wrong_case", named(f"{LAB.upper()}.IPYNB")),
    _file("a_folder_instead", a_folder_instead, "it is a folder, not a file"),
    _file("a_pipe", a_pipe, "it is a pipe, not a file"),
    _file("linked_folder", linked_folder, refused=True),
    _file("linked_to_shadow", linked("/etc/shadow"), LINK),
    _file("linked_to_zeros", linked("/dev/zero"), LINK),
    _file("linked_to_a_friend", linked(f"../../honest-1/{LAB}/{LAB}.ipynb"), LINK),
    _file("linked_to_the_gradebook", linked("../../../gradebook.db"), LINK),
    Attack("many_links", lay=many_links, plain="has the file behind a link copied beside its notebook"),
    _file("bad_timestamp", beside(timestamp_txt="the day before yesterday, at noon")),
    _file("timestamp_of_year_99999", beside(timestamp_txt="99999-01-01 00:00:00.000000 UTC")),
    Attack(
        "a_file_called_torch",
        lay=beside(torch_py=EVIL, lecturekit_py=EVIL, sitecustomize_py=EVIL, numpy____init___py=EVIL, random_py=EVIL),
        plain="its own torch.py is imported in place of torch, and all honest points are lost",
    ),
    Attack("a_notebook_more", lay=beside(other_ipynb='{"cells": [], "metadata": {}, "nbformat": 4}')),
    Attack("settings_beside", lay=beside(nbgrader_config_py=EVIL, gradebook_db="x", **{"__ipython____x_py": EVIL})),
]


def hostile_zip(path: Path, honest: bytes, bomb: int) -> Path:
    """A download with one honest notebook and members that point elsewhere, are links, or unpack to `bomb` bytes."""
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr(f"honest-1_1234_5678_{LAB}.ipynb", honest)
        for name in (
            f"../../escaped_1_2_{LAB}.ipynb",
            f"/tmp/absolute_1_2_{LAB}.ipynb",
            f"..\\..\\windows_1_2_{LAB}.ipynb",
            f"C:\\drive_1_2_{LAB}.ipynb",
            "../../../gradebook.db",
            "../../../../nbgrader_config.py",
            "a/../../../b.ipynb",
        ):
            archive.writestr(name, b"{}")
        link = zipfile.ZipInfo(f"linked_1_2_{LAB}.ipynb")
        link.external_attr = 0o120777 << 16
        archive.writestr(link, "/etc/shadow")
        archive.writestr(f"bomb_1_2_{LAB}.ipynb", bytes(bomb))
    return path
