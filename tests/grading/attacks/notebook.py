"""Attacks on the notebook file and its folder, many by accident. The answers are honest unless said otherwise."""

from __future__ import annotations

import copy
import json
from typing import Any

from grading_attacks.kit import NOTHING, STUB, TESTS, WRONG, Attack
from nbformat.v4 import new_code_cell, new_markdown_cell, new_output, new_raw_cell


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


def _cells(change: Any, **rest: Any) -> Attack:
    return Attack(change.__name__, change=change, **rest)


EARNED = dict.fromkeys(TESTS, 0)
ATTACKS = [
    _cells(duplicated_tests, plain="is not graded at all, and nbgrader ends with an error"),
    _cells(the_same_cell_ids),
    *[
        Attack(f"wrong_{change.__name__}", change=change, answers=WRONG, earned=EARNED)
        for change in (weakened_tests, deleted_tests, more_points, flags_changed)
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
    _cells(ten_thousand_cells, earned=NOTHING, noted="Only the first 2000 cells were read."),
    _cells(a_deep_expression, earned={"merge-test": 0}),
    _cells(nul_and_surrogates),
    _cells(not_cells),
    _cells(format_3),
]
