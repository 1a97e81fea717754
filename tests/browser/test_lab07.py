"""The BitDelta lab in a real JupyterLab: run it blank, answer wrongly and be told why, answer rightly, move α."""

import pytest
from opened import assert_passed, assert_wrong

pytestmark = [pytest.mark.browser, pytest.mark.models, pytest.mark.timeout(900)]

LAB = "lab07_bitdelta"


def test_a_blank_lab_runs_from_top_to_bottom(lab):
    lab.run_blank("bitdelta.compress")
    lab.picture("bitdelta_blank")


def test_a_wrong_answer_is_told_its_mistake(lab):
    answer = """def compress(base, fine):
    signs = (fine > 0).to(torch.int8) * 2 - 1
    return signs, fine.float().abs().mean()"""
    assert_wrong(lab.answer("bitdelta.compress", answer), "compresses the fine-tuned weight, not what changed")
    lab.picture("bitdelta_wrong")


def test_a_right_answer_passes(lab):
    answer = """def compress(base, fine):
    delta = fine.float() - base.float()
    return torch.where(delta > 0, 1, -1).to(torch.int8), delta.abs().mean()"""
    assert_passed(lab.answer("bitdelta.compress", answer), "bitdelta.compress")
    assert "no scale times signs leaves less" in lab.drawn("compress_picture(compress)")
    lab.picture("bitdelta_right")


def test_the_controls_change_the_figure(lab):
    lab.moved("alpha_slider(", lab.press("ArrowRight", 3))
    said = lab.moved("alpha_slider(", lambda cell: cell.locator("select").first.select_option("uniform"))
    assert "(uniform)" in said
    lab.picture("bitdelta_slider")
