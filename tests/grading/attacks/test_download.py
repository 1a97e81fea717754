"""A hostile download from Canvas, collected for grading."""

import json
from dataclasses import replace

from grading_attacks import files
from grading_attacks.kit import LAB

from lecturekit.grading.collect import SKIPPED, collect
from lecturekit.grading.unpack import CAPS


def test_of_a_hostile_download_only_the_honest_notebook_is_taken(tmp_path):
    honest = json.dumps({"cells": [], "metadata": {}, "nbformat": 4, "nbformat_minor": 5}).encode()
    course = tmp_path / "deep" / "down" / "course"
    course.mkdir(parents=True)
    kept = {course / "gradebook.db": "marks", course.parent / "nbgrader_config.py": "c = get_config()"}
    for path, text in kept.items():
        path.write_text(text)
    download = files.hostile_zip(tmp_path / "download.zip", honest, bomb=20 * 2**20)
    caps = replace(CAPS, file=10 * 2**20)
    collected = collect(download, LAB, course / "submitted", {"honest-1_1234": "honest-1"}, caps=caps)

    taken = [one.file for one in collected if one.what != SKIPPED]
    assert taken == [f"honest-1_1234_5678_{LAB}.ipynb"]
    assert len(collected) > 8 and all(one.why for one in collected if one.what == SKIPPED)
    submitted = course / "submitted"
    assert list(submitted.rglob("*.ipynb")) == [submitted / "honest-1" / LAB / f"{LAB}.ipynb"]
    assert (submitted / "honest-1" / LAB / f"{LAB}.ipynb").read_bytes() == honest
    assert {path: path.read_text() for path in kept} == kept
    outside = [path for path in tmp_path.rglob("*") if path.is_file() and course not in path.parents]
    assert set(outside) == {download, course.parent / "nbgrader_config.py"}
    assert not [path for path in tmp_path.parent.glob("*") if "escaped" in path.name or "windows" in path.name]
