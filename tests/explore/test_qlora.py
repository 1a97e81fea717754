"""The block figure says true numbers, sliders and menus work with a keyboard; wrong answers are drawn all the same."""

import inspect
import math
import re

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from lecturekit.compression import nf4
from lecturekit.compression.qlora import linear_4bit
from lecturekit.explore import qlora, style


def blank(*_):
    raise NotImplementedError


def raises(*_):
    raise RuntimeError("shapes")


def test_the_tables_are_those_of_the_course():
    assert np.abs(qlora.NF4 - nf4.LEVELS.double().numpy()).max() < 1e-7  # the slide's list cut after seven digits
    assert np.allclose(qlora.INT4, nf4.int4_levels().numpy(), atol=1e-7)
    assert np.allclose(qlora.E2M1, nf4.e2m1_levels().numpy(), atol=1e-7)


@pytest.mark.parametrize("blocksize", qlora.BLOCKSIZES)
@pytest.mark.parametrize("outlier", [3, 24])
def test_the_figure_rounds_as_the_course_does(blocksize, outlier):
    values = qlora.row(outlier)
    x = torch.tensor(values).float()
    back = nf4.dequantize(*nf4.quantize(x, blocksize), blocksize)
    # float32 with a table of seven digits against float64: a millionth of the largest value
    assert np.abs(qlora.rounded(values, blocksize) - back.numpy()).max() < 1e-6 * outlier


def test_a_larger_outlier_hurts_its_block_alone():
    errors = [qlora.describe(32, outlier) for outlier in (3, 12, 24, 40)]
    assert all(a["near"] < b["near"] for a, b in zip(errors, errors[1:], strict=False))
    assert len({found["far"] for found in errors}) == 1
    assert all(a["lost"] <= b["lost"] for a, b in zip(errors, errors[1:], strict=False))


def test_smaller_blocks_have_fewer_neighbours_and_cost_more_bits():
    found = [qlora.describe(size, 24) for size in qlora.BLOCKSIZES]
    assert [facts["block"] for facts in found] == list(qlora.BLOCKSIZES)
    assert [facts["bits"] for facts in found] == [8, 6, 5, 4.5, 4.25]
    assert math.isnan(found[-1]["far"]) and not math.isnan(found[0]["far"])


@pytest.mark.parametrize("blocksize", [0, 7, 256, True, 8.0])
def test_a_block_size_that_cannot_be_is_refused(blocksize):
    with pytest.raises(ValueError, match="blocksize must be a whole number that divides 128"):
        qlora.rounded(qlora.row(3), blocksize)


def test_a_row_of_zeros_comes_back_as_zeros():
    assert not qlora.rounded(np.zeros(16), 8).any()


def test_descriptions_carry_the_figures_numbers():
    facts = qlora.describe(32, 24)
    text = qlora.block_picture(32, 24).text
    assert f"is {facts['near']:.2f}" in text and f"other blocks is {facts['far']:.2f}" in text and "5 bits" in text
    assert "there is no other block" in qlora.block_picture(128, 24).text
    strip = qlora.block_strip().text
    assert all(f"With blocks of {size} and an outlier of {outlier}" in strip for size, outlier in qlora.SETTINGS)
    assert "sixteen levels" in qlora.levels_strip().text


def test_moving_the_sliders_changes_the_drawing():
    blocks, outlier, drawing = qlora.block_slider().children
    first = drawing.value
    assert 'alt="' in first and 'aria-live="polite"' in first and "blocks of 64" in first
    blocks.value = 8
    second = drawing.value
    outlier.value = 30
    assert "blocks of 8" in second and "one value is 30" in drawing.value
    blocks.value, outlier.value = 64, 12
    assert drawing.value == first
    assert all(control.continuous_update is False and control.description for control in (blocks, outlier))


def test_only_widgets_that_both_ipywidgets_7_and_8_have():
    used = set(re.findall(r"widgets\.(\w+)", inspect.getsource(qlora) + inspect.getsource(style.moving)))
    assert used == {"SelectionSlider", "IntSlider", "Dropdown", "HTML", "VBox", "Layout"}


def test_right_levels_lie_on_the_slides():
    said = qlora.levels_picture(nf4.normal_float_levels).text
    apart = float(re.search(r"sixteen levels and the slide's is (\S+)\.$", said)[1])
    assert apart < 1e-6  # seven digits of the slide's list, and a few roundings


@pytest.mark.parametrize(
    ("answer", "said"),
    [
        (blank, "is not written yet"),
        (lambda: [0.0], "returned list, not a tensor"),
        (lambda: torch.linspace(-1, 1, 15), "You have 15 levels"),
        (lambda: torch.linspace(-1, 1, 16), "and the slide's is 0."),
        (lambda: torch.full((16,), math.inf), "16 of your 16 levels are not finite"),
        (None, "raised TypeError"),
    ],
)
def test_wrong_levels_are_drawn_all_the_same(answer, said):
    picture = qlora.levels_picture(answer)
    assert said in picture.text and picture.png


def one_scale(x, blocksize):
    scale = x.abs().max()
    indices, _ = nf4.quantize((x / scale).reshape(-1), 1 << 30)
    return indices.view(x.shape), scale.expand(x.numel() // blocksize)


def test_right_indices_lose_as_little_as_can_be():
    assert "as small as it can be" in qlora.quantize_picture(nf4.quantize).text


@pytest.mark.parametrize(
    ("answer", "said"),
    [
        (one_scale, "is possible"),
        (blank, "is not written yet"),
        (raises, "raised RuntimeError"),
        (lambda *_: None, "returned nothing"),
        (lambda x, size: nf4.quantize(x, size)[0], "returned Tensor, not 2 tensors"),
        (lambda x, size: (*nf4.quantize(x, size), 0), "returned 3 parts, not 2 tensors"),
        (lambda x, size: (nf4.quantize(x, size)[0], 3.0), "returned parts that are no tensors"),
        (
            lambda x, size: (nf4.quantize(x, size)[0].view(-1), nf4.quantize(x, size)[1]),
            "returned indices of shape (1024,)",
        ),
        (lambda x, size: (nf4.quantize(x, size)[0], x.abs().max()), "returned 1 scales for 32 blocks"),
        (lambda x, size: (x, nf4.quantize(x, size)[1]), "returned indices that are float32"),
        (lambda x, size: (nf4.quantize(x, size)[0].int() + 9, nf4.quantize(x, size)[1]), "to 24, not within 0 … 15"),
    ],
)
def test_wrong_indices_are_drawn_all_the_same(answer, said):
    picture = qlora.quantize_picture(answer)
    assert said in picture.text and picture.png


def test_a_right_way_back_leaves_a_blank_difference():
    assert "The difference is blank" in qlora.dequantize_picture(nf4.dequantize).text


@pytest.mark.parametrize(
    ("answer", "said"),
    [
        (lambda i, a, size: nf4.LEVELS[i.long()] * a.repeat(size).view(i.shape), "The difference shows"),
        (lambda i, a, size: nf4.dequantize(i, a, size) * torch.nan, "up to inf"),
        (lambda i, a, size: i, "returned uint8 numbers"),
        (lambda i, a, size: nf4.dequantize(i, a, size).T, "returned shape (64, 16)"),
        (lambda i, a, size: 3, "returned int, not a tensor"),
        (blank, "is not written yet"),
    ],
)
def test_a_wrong_way_back_is_drawn_all_the_same(answer, said):
    picture = qlora.dequantize_picture(answer)
    assert said in picture.text and picture.png


def test_right_bytes_have_all_bits_as_they_should_be():
    text = qlora.pack_picture(nf4.pack).text
    assert "The right bytes are 1F 70 C3 5A. Yours are 1F 70 C3 5A, all bits" in text


@pytest.mark.parametrize(
    ("answer", "said"),
    [
        (lambda i: (i[1::2] << 4) | i[::2], "Yours are F1 07 3C A5, 28 of 32 bits wrong"),
        (lambda i: i, "returned uint8 of shape (8,), not 4 bytes"),
        (lambda i: i[::2].int(), "returned int32 of shape (4,), not 4 bytes"),
        (lambda i: b"1234", "returned bytes, not a tensor"),
        (blank, "is not written yet"),
    ],
)
def test_wrong_bytes_are_drawn_all_the_same(answer, said):
    picture = qlora.pack_picture(answer)
    assert said in picture.text and picture.png


def test_right_scales_lose_as_little_as_can_be_and_less_than_without_the_offset():
    text = qlora.double_picture(nf4.double_quantize_with, nf4.DYNAMIC_LEVELS).text
    lost, possible, without = re.search(
        r"scales is (\S+); .* off (\S+) is possible, without it (\S+)\.$", text
    ).groups()
    assert lost == possible and float(possible) < float(without)


def without_offset(absmax, levels, blocksize):
    codes, scales = nf4.quantize_with(levels, absmax, blocksize)
    return codes, scales, torch.zeros(())


@pytest.mark.parametrize(
    ("answer", "said"),
    [
        (without_offset, "The root mean square error of the scales is"),
        (lambda *a: nf4.double_quantize_with(*a)[:2], "returned 2 parts, not 3 tensors"),
        (lambda *a: (*nf4.double_quantize_with(*a)[:2], torch.zeros(2)), "returned an offset of shape (2,)"),
        (lambda *a: (*nf4.double_quantize_with(*a)[:2], 0.1), "returned parts that are no tensors"),
        (blank, "is not written yet"),
    ],
)
def test_wrong_scales_are_drawn_all_the_same(answer, said):
    picture = qlora.double_picture(answer, nf4.DYNAMIC_LEVELS)
    assert said in picture.text and picture.png


def test_the_error_without_an_offset_is_what_the_picture_foretells():
    text = qlora.double_picture(without_offset, nf4.DYNAMIC_LEVELS).text
    lost, without = re.search(r"scales is (\S+); .* without it (\S+)\.$", text).groups()
    assert lost == without


def losses(text):
    return [
        float(number) for number in re.search(r"from (\S+) to (\S+); a branch of zeros has (\S+)\.$", text).groups()
    ]


def test_a_branch_learns_beside_a_right_layer_but_not_the_rounding_error():
    first, last, zeros = losses(qlora.linear_picture(linear_4bit).text)
    assert first == zeros and 0 < last < zeros / 10


def test_no_branch_learns_when_nothing_of_it_is_used():
    def frozen(x, packed, absmax, levels, blocksize, A, B, scale):
        return linear_4bit(x, packed, absmax, levels, blocksize, A, B, 0.0)

    first, last, zeros = losses(qlora.linear_picture(frozen).text)
    assert first == last == zeros


@pytest.mark.parametrize(
    ("answer", "said"),
    [
        (blank, "is not written yet"),
        (lambda x, *_: x, "raised RuntimeError"),  # (256, 32) is not (256, 24)
        (lambda x, *rest: linear_4bit(x, *rest).detach(), "raised RuntimeError"),  # nothing to train
        (None, "raised TypeError"),
    ],
)
def test_a_wrong_layer_is_drawn_all_the_same(answer, said):
    picture = qlora.linear_picture(answer)
    assert said in picture.text and picture.png


WEIGHTS = {"wide": torch.randn(64, 256, generator=torch.Generator().manual_seed(0)), "zero": torch.zeros(4, 256)}


@pytest.mark.parametrize("kind", qlora.KINDS)
def test_the_use_of_levels_is_counted(kind):
    shares, entropy = qlora.use_of_levels({"wide": WEIGHTS["wide"]}, 64, kind)
    indices, _ = nf4.quantize_with(torch.tensor(qlora.KINDS[kind]).float(), WEIGHTS["wide"], 64)
    counted = indices.flatten().bincount(minlength=len(shares)).double() / indices.numel()
    assert np.allclose(shares, counted.numpy(), atol=2 / indices.numel())  # a value on a midpoint may go either way
    assert entropy == pytest.approx(-(counted * counted.clamp(min=1e-300).log2()).sum().item(), abs=1e-3)


def test_zeros_use_one_level_and_carry_no_bits():
    shares, entropy = qlora.use_of_levels({"zero": WEIGHTS["zero"]})
    assert shares[7] == 1 and entropy == 0


def test_the_layer_menus_change_the_picture():
    layer, kind, size, drawing = qlora.layer_picker(WEIGHTS).children
    first = drawing.value
    kind.value = "INT4"
    assert "wide in INT4 with blocks of 64" in drawing.value
    size.value = 256
    assert "blocks of 256" in drawing.value
    layer.value = "zero"
    assert "zero in INT4" in drawing.value and "carry 0.00 of 4 bits" in drawing.value
    layer.value, kind.value, size.value = "wide", "NF4", 64
    assert drawing.value == first


def test_pictures_leave_the_random_state_alone():
    torch.manual_seed(0)
    wanted = torch.rand(3)
    torch.manual_seed(0)
    qlora.block_strip()
    qlora.quantize_picture(nf4.quantize)
    qlora.linear_picture(lambda x, p, a, v, b, A, B, s: F.linear(x, s * B @ A), steps=3)
    assert torch.equal(torch.rand(3), wanted)
