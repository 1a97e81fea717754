"""The QLoRA lab in a real JupyterLab: run it blank, answer wrongly and rightly, move its sliders, choose a layer."""

import re

import pytest
from opened import MINUTES, opened
from playwright.sync_api import expect

pytestmark = [pytest.mark.browser, pytest.mark.models, pytest.mark.timeout(900)]

LAB = "lab06_qlora"


@pytest.fixture(scope="module")
def lab(chromium, jupyterlab):
    with opened(chromium, jupyterlab(LAB)) as notebook:
        yield notebook


def test_a_blank_lab_runs_from_top_to_bottom(lab):
    lab.run_all()
    assert lab.errors() == []
    card = lab.show(lab.index('check("nf4.quantize"')).locator("section.lecturekit-verdict")
    assert "not attempted yet" in card.inner_text()
    lab.picture("qlora_blank")


def test_a_wrong_answer_is_told_its_mistake(lab):
    lab.type_into(
        lab.index("def pack_nibbles("),
        "def pack_nibbles(indices):\n    flat = F.pad(indices.flatten(), (0, indices.numel() % 2), value=7)\n"
        "    return (flat[1::2] << 4) | flat[::2]",
    )
    lab.run_cell(lab.index("def pack_nibbles("))
    check = lab.index('check("qlora.pack"')
    lab.run_cell(check)
    card = lab.show(check).locator("section.lecturekit-verdict")
    assert "not yet right" in card.get_attribute("aria-label")
    for words in ("Hint", "First difference", "expected", "got"):
        assert words in card.inner_text()
    drawn = lab.index("pack_picture(pack_nibbles)")
    lab.run_cell(drawn)
    picture = lab.show(drawn).locator(".jp-OutputArea-output img").first
    assert "Yours are F1 07 3C A5" in picture.get_attribute("alt")
    lab.picture("qlora_wrong")


def test_a_right_answer_passes(lab):
    lab.type_into(
        lab.index("def pack_nibbles("),
        "def pack_nibbles(indices):\n    flat = F.pad(indices.flatten(), (0, indices.numel() % 2), value=7)\n"
        "    return flat[::2] * 16 + flat[1::2]",
    )
    lab.run_cell(lab.index("def pack_nibbles("))
    check = lab.index('check("qlora.pack"')
    lab.run_cell(check)
    card = lab.show(check).locator("section.lecturekit-verdict")
    assert card.get_attribute("aria-label").startswith("qlora.pack: passed")
    drawn = lab.index("pack_picture(pack_nibbles)")
    lab.run_cell(drawn)
    picture = lab.show(drawn).locator(".jp-OutputArea-output img").first
    assert "all bits as they should be" in picture.get_attribute("alt")
    lab.picture("qlora_right")


def moved(lab, beginning, act):
    """Show a figure with controls, act on them, and wait until its picture is another one."""
    cell = lab.show(lab.index(beginning))
    figure = cell.locator(".jp-OutputArea-output img").first
    figure.wait_for(timeout=1 * MINUTES)
    before, described = figure.get_attribute("src"), figure.get_attribute("alt")
    act(cell)
    expect(figure).not_to_have_attribute("src", before, timeout=1 * MINUTES)
    assert figure.get_attribute("alt") != described
    return figure.get_attribute("alt")


@pytest.mark.parametrize(("slider", "said"), [("first", "blocks of 16"), ("last", "one value is 15")])
def test_the_sliders_change_the_figure(lab, slider, said):
    def act(cell):
        getattr(cell.get_by_role("slider"), slider).focus()
        for _ in range(2 if slider == "first" else 3):
            lab.page.keyboard.press("ArrowLeft" if slider == "first" else "ArrowRight")

    lab.run_cell(lab.index("block_slider("))  # from the start again
    cell = lab.show(lab.index("block_slider("))
    moved(lab, "block_slider(", act)
    expect(cell.locator(".jp-OutputArea-output img").first).to_have_attribute(
        "alt", re.compile(said), timeout=1 * MINUTES
    )
    lab.picture(f"qlora_slider_{slider}")


def test_choosing_another_type_draws_its_levels(lab):
    said = moved(lab, "layer_picker(", lambda cell: cell.locator("select").nth(1).select_option("INT4"))
    assert "in INT4 with blocks of 64" in said
    lab.picture("qlora_layer")
