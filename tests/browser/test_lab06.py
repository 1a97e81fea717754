"""The QLoRA lab in a real JupyterLab: run it blank, answer wrongly and rightly, move its sliders, choose a layer."""

import re

import pytest
from opened import MINUTES, assert_passed, assert_wrong
from playwright.sync_api import expect

pytestmark = [pytest.mark.browser, pytest.mark.models, pytest.mark.timeout(900)]

LAB = "lab06_qlora"
ANSWER = """def pack_nibbles(indices):
    flat = F.pad(indices.flatten(), (0, indices.numel() % 2), value=7)
    return """


def test_a_blank_lab_runs_from_top_to_bottom(lab):
    lab.run_blank("nf4.quantize")
    lab.picture("qlora_blank")


def test_a_wrong_answer_is_told_its_mistake(lab):
    assert_wrong(lab.answer("qlora.pack", ANSWER + "(flat[1::2] << 4) | flat[::2]"))
    assert "Yours are F1 07 3C A5" in lab.drawn("pack_picture(pack_nibbles)")
    lab.picture("qlora_wrong")


def test_a_right_answer_passes(lab):
    assert_passed(lab.answer("qlora.pack", ANSWER + "flat[::2] * 16 + flat[1::2]"), "qlora.pack")
    assert "all bits as they should be" in lab.drawn("pack_picture(pack_nibbles)")
    lab.picture("qlora_right")


@pytest.mark.parametrize(
    ("place", "key", "times", "said"),
    [("first", "ArrowLeft", 2, "blocks of 16"), ("last", "ArrowRight", 3, "one value is 15")],
)
def test_the_sliders_change_the_figure(lab, place, key, times, said):
    def act(cell):
        getattr(cell.get_by_role("slider"), place).focus()
        for _ in range(times):
            lab.page.keyboard.press(key)

    lab.run_cell(lab.index("block_slider("))  # from the start again
    lab.moved("block_slider(", act)
    expect(lab.figure("block_slider(")).to_have_attribute("alt", re.compile(said), timeout=1 * MINUTES)
    lab.picture(f"qlora_slider_{place}")


def test_choosing_another_type_draws_its_levels(lab):
    said = lab.moved("layer_picker(", lambda cell: cell.locator("select").nth(1).select_option("INT4"))
    assert "in INT4 with blocks of 64" in said
    lab.picture("qlora_layer")
