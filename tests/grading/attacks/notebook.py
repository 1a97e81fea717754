"""Attacks on the notebook file and its folder, many by accident. The answers are honest unless said otherwise."""

from __future__ import annotations

import copy
import json
import os
import zipfile
from pathlib import Path
from typing import Any

from grading_attacks.kit import LAB, STUB, WRONG, Attack
from nbformat.v4 import new_code_cell, new_markdown_cell, new_output, new_raw_cell

TESTS = ("merge-test", "count-test", "compress-test", "rows-test", "inject-test")
NOTHING = dict.fromkeys((*TESTS, "explain"), 0)


def _marks(cell: Any) -> Any:
    found = cell.metadata.get("nbgrader")
    return found if isinstance(found, dict) else {}


# --- cells ----------------------------------------------------------------------------------------------------------


def duplicated_tests(nb, by_id):
    for name in ("merge-test", "count", "rows-test", "explain"):
        place = nb.cells.index(by_id(nb, name))
        nb.cells.insert(place + 1, copy.deepcopy(nb.cells[place]))
    return nb


def the_same_cell_ids(nb, by_id):
    for cell in nb.cells:
        cell.id = "same"
    return nb


def weakened_tests(nb, by_id):
    for name in TESTS:
        by_id(nb, name).source = "assert True"
    return nb


def emptied_tests(nb, by_id):
    for name in TESTS:
        by_id(nb, name).source = ""
    return nb


def deleted_tests(nb, by_id):
    nb.cells = [cell for cell in nb.cells if _marks(cell).get("grade_id") not in TESTS]
    return nb


def tests_as_text(nb, by_id):
    for name in TESTS:
        cell = by_id(nb, name)
        nb.cells[nb.cells.index(cell)] = new_markdown_cell(cell.source, metadata=cell.metadata, id=cell.id)
    return nb


def tests_as_raw_cells(nb, by_id):
    for name in TESTS:
        cell = by_id(nb, name)
        nb.cells[nb.cells.index(cell)] = new_raw_cell(cell.source, metadata=cell.metadata, id=cell.id)
    return nb


def reordered(nb, by_id):
    nb.cells.reverse()
    return nb


def more_points(nb, by_id):
    for name in TESTS:
        by_id(nb, name).metadata["nbgrader"]["points"] = 1000
    by_id(nb, "explain").metadata["nbgrader"]["points"] = -5
    return nb


def flags_changed(nb, by_id):
    for name in TESTS:
        by_id(nb, name).metadata["nbgrader"] |= {"grade": False, "solution": True, "locked": False, "task": True}
    by_id(nb, "merge").metadata["nbgrader"] |= {"grade": True, "points": 50, "solution": False}
    return nb


def ids_swapped(nb, by_id):
    """The easy test under the name of the dear one."""
    merge, compress = by_id(nb, "merge-test"), by_id(nb, "compress-test")
    merge.metadata["nbgrader"]["grade_id"], compress.metadata["nbgrader"]["grade_id"] = "compress-test", "merge-test"
    merge.id, compress.id = compress.id, merge.id
    return nb


def foreign_ids(nb, by_id):
    names = ["../../etc/passwd", "", "x" * 100_000, None, 5, ["a"], {"a": 1}, "'; DROP TABLE grade; --"]
    for number, cell in enumerate(nb.cells):
        cell.metadata["nbgrader"] = {"grade_id": names[number % len(names)], "grade": True, "points": "many"}
    return nb


def old_schema(nb, by_id):
    for cell in nb.cells:
        if _marks(cell):
            cell.metadata["nbgrader"]["schema_version"] = 1
    return nb


def future_schema(nb, by_id):
    for cell in nb.cells:
        if _marks(cell):
            cell.metadata["nbgrader"]["schema_version"] = 99
    nb.nbformat_minor = 99
    return nb


def no_kernelspec(nb, by_id):
    nb.metadata = {}
    return nb


def another_kernel(nb, by_id):
    nb.metadata = {"kernelspec": {"name": "no-such", "display_name": "?", "argv": ["rm", "-rf", "/"]}, "language": 7}
    return nb


def forged_outputs(nb, by_id):
    """Outputs that plain nbgrader would score, saved in the notebook, in test cells and everywhere."""
    for cell in nb.cells:
        if cell.cell_type == "code":
            cell.outputs = [new_output("execute_result", {"text/plain": "15"}, execution_count=1)]
            cell.execution_count = 1
    return nb


def forged_record(nb, by_id):
    """What our own grader and nbgrader keep in the metadata, written by the student."""
    nb.metadata["lecturekit"] = {"staging": ["Full marks."], "marks": {"merge-test": 15}, "passed": True}
    nb.metadata["nbgrader"] = {"score": 75}
    for name in TESTS:
        by_id(nb, name).metadata |= {"lecturekit": {"passed": True, "score": 15}, "nbgrader_score": 15}
    return nb


def scripts_everywhere(nb, by_id):
    """Markup that would run in the instructor's browser."""
    script = "<script>steal(document.cookie)</script><img src=x onerror=steal(1)><svg onload=steal(2)>"
    by_id(nb, "explain").source = f"Because. {script}\n\n[x](javascript:steal(3))\n\n```\n</code></pre>{script}\n```"
    nb.cells.insert(2, new_markdown_cell(script, attachments={"a.svg": {"image/svg+xml": f"<svg>{script}</svg>"}}))
    show = (
        f"display({{'text/html': {script!r}}}, raw=True)\ndisplay({{'application/javascript': 'steal(4)'}}, raw=True)"
    )
    show += f"\ndisplay({{'image/svg+xml': '<svg onload=steal(5)></svg>', 'text/latex': {script!r}}}, raw=True)"
    show += f"\nprint({script!r})\nraise ValueError({script!r})"
    nb.cells.insert(3, new_code_cell(show))
    nb.metadata["title"] = script
    return nb


def widget_state(nb, by_id):
    nb.metadata["widgets"] = {"application/vnd.jupyter.widget-state+json": {"state": {"x": {"state": "y" * 10**6}}}}
    return nb


def outputs_of_200_mb(nb, by_id):
    text = "x" * (20 * 10**6)
    for cell in [cell for cell in nb.cells if cell.cell_type == "code"][:10]:
        cell.outputs = [new_output("stream", name="stdout", text=text)]
    nb.cells[1].outputs.append(new_output("stream", name="stdout", text=text))
    return nb


def source_of_50_mb(nb, by_id):
    nb.cells.insert(2, new_code_cell("# " + "x" * (50 * 10**6)))
    return nb


def answer_of_50_mb(nb, by_id):
    by_id(nb, "merge").source += "\n# " + "x" * (50 * 10**6)
    return nb


def ten_thousand_cells(nb, by_id):
    nb.cells[2:2] = [new_markdown_cell(f"{number}", id=f"n{number}") for number in range(10_000)]
    return nb


def a_deep_expression(nb, by_id):
    by_id(nb, "merge").source = "merge = " + "(" * 5000 + ")" * 5000
    nb.cells.insert(2, new_code_cell("x = " + "-" * 200_000 + "1"))
    return nb


def nul_and_surrogates(nb, by_id):
    nb.cells.insert(2, new_code_cell("text = '\0'"))
    nb.cells.insert(3, new_code_cell("text = '\ud800 \u202e'"))
    return nb


def not_cells(nb, by_id):
    """Cells of every wrong kind among the right ones."""
    data = json.loads(json.dumps(nb))
    data["cells"][2:2] = [None, 5, "cell", [], {}, {"cell_type": "code"}, {"cell_type": 7, "source": 3, "metadata": []}]
    data["metadata"] = []
    return data


def format_3(nb, by_id):
    cells = [
        {"cell_type": cell.cell_type, "metadata": cell.metadata, "language": "python", "outputs": []}
        | {"input" if cell.cell_type == "code" else "source": cell.source}
        for cell in nb.cells
    ]
    return {
        "nbformat": 3,
        "nbformat_minor": 0,
        "metadata": {"name": ""},
        "worksheets": [{"cells": cells, "metadata": {}}],
    }


# --- files ----------------------------------------------------------------------------------------------------------


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
EARNED = dict.fromkeys(TESTS, 0)


def _file(name: str, lay: Any, reported: bool = True) -> Attack:
    return Attack(name, lay=lay, reported=reported, earned=NOTHING if reported else {})


def _cells(change: Any, **rest: Any) -> Attack:
    return Attack(change.__name__, change=change, **rest)


ATTACKS = [
    _cells(duplicated_tests, plain="is not graded at all, and nbgrader ends with an error"),
    _cells(the_same_cell_ids),
    *[
        Attack(f"wrong_{change.__name__}", change=change, answers=WRONG, earned=EARNED)
        for change in (weakened_tests, emptied_tests, deleted_tests, tests_as_text, more_points, flags_changed)
    ],
    Attack("wrong_forged_outputs", change=forged_outputs, answers=WRONG, earned=EARNED),
    Attack("wrong_forged_record", change=forged_record, answers=WRONG, earned=EARNED),
    Attack(
        "wrong_ids_swapped",
        change=ids_swapped,
        answers={"compress": STUB},
        earned={"compress-test": 0},
    ),
    _cells(emptied_tests),
    _cells(deleted_tests, plain="loses the points of every deleted test"),
    _cells(tests_as_text),
    _cells(tests_as_raw_cells),
    _cells(reordered),
    _cells(more_points),
    _cells(flags_changed),
    _cells(foreign_ids),
    _cells(old_schema),
    _cells(future_schema),
    _cells(no_kernelspec),
    _cells(another_kernel),
    _cells(scripts_everywhere),
    _cells(widget_state),
    _cells(outputs_of_200_mb),
    _cells(source_of_50_mb),
    _cells(answer_of_50_mb, earned={"merge-test": 0}),
    _cells(ten_thousand_cells),
    _cells(a_deep_expression, earned={"merge-test": 0}),
    _cells(nul_and_surrogates),
    _cells(not_cells),
    _cells(format_3),
    _file("corrupt", holding(b'{"cells": [{"cell_type": "code", "sour')),
    _file("empty", holding(b"")),
    _file("only_zeros", holding(bytes(5000))),
    _file("a_list", holding(b"[]")),
    _file("a_number", holding(b"1e999")),
    _file("no_cells", holding(b'{"nbformat": 4, "nbformat_minor": 5, "metadata": {}}')),
    _file("deep_json", holding(b'{"cells":' + b"[" * 200_000 + b"]" * 200_000 + b"}")),
    _file("a_long_number", holding(b'{"nbformat": ' + b"9" * 100_000 + b"}")),
    _file("a_picture", holding(b"\x89PNG\r\n\x1a\n" + bytes(range(256)))),
    _file("a_web_page", holding(b"<!doctype html><title>Sign in</title>")),
    _file("with_a_mark", encoded("utf-8-sig"), reported=False),
    _file("in_utf_16", encoded("utf-16"), reported=False),
    _file("missing", missing),
    _file("wrong_name", named(f"{LAB}(1).ipynb"), reported=False),
    _file("wrong_case", named(f"{LAB.upper()}.IPYNB"), reported=False),
    _file("a_folder_instead", a_folder_instead),
    _file("a_pipe", a_pipe),
    _file("linked_folder", linked_folder),
    _file("linked_to_shadow", linked("/etc/shadow")),
    _file("linked_to_zeros", linked("/dev/zero")),
    _file("linked_to_a_friend", linked(f"../../honest-1/{LAB}/{LAB}.ipynb")),
    _file("linked_to_the_gradebook", linked("../../../gradebook.db")),
    Attack("many_links", lay=many_links, plain="has the file behind a link copied beside its notebook"),
    _file("bad_timestamp", beside(timestamp_txt="the day before yesterday, at noon"), reported=False),
    _file("timestamp_of_year_99999", beside(timestamp_txt="99999-01-01 00:00:00.000000 UTC"), reported=False),
    Attack(
        "a_file_called_torch",
        lay=beside(torch_py=EVIL, lecturekit_py=EVIL, sitecustomize_py=EVIL, numpy____init___py=EVIL, random_py=EVIL),
        plain="its own torch.py is imported in place of torch, and all honest points are lost",
    ),
    Attack("a_notebook_more", lay=beside(other_ipynb='{"cells": [], "metadata": {}, "nbformat": 4}')),
    Attack("settings_beside", lay=beside(nbgrader_config_py=EVIL, gradebook_db="x", **{"__ipython____x_py": EVIL})),
]


# --- what comes from Canvas and Moodle ------------------------------------------------------------------------------


def hostile_zip(path: Path, honest: bytes) -> Path:
    """A download with one honest notebook and members that point elsewhere, are links, or never end."""
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
        archive.writestr(f"bomb_1_2_{LAB}.ipynb", bytes(300 * 10**6))
    return path
