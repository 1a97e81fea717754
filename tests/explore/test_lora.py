"""The rank figure says true numbers, and its slider works with a keyboard; wrong answers are drawn all the same."""

import re

import numpy as np
import pytest
import torch
from torch import nn

from lecturekit.explore import lora, style


def test_factors_are_the_best_of_their_rank():
    picture = lora.landscape()
    values = np.linalg.svd(picture, compute_uv=False)
    for rank in (1, 3, 10):
        B, A, _ = lora.factors(picture, rank)
        assert B.shape == (96, rank) and A.shape == (rank, 96)
        left = np.linalg.norm(picture - B @ A)
        # Eckart and Young: what is left is the root of the dropped singular values' squares. 1e-10 is float64 noise.
        assert left == pytest.approx(np.sqrt((values[rank:] ** 2).sum()), rel=1e-10)
        rng = np.random.default_rng(rank)
        other_B, other_A = rng.normal(size=B.shape), rng.normal(size=A.shape)
        assert np.linalg.norm(picture - other_B @ other_A) > left


def test_error_falls_with_rank_and_parameters_rise():
    facts = [lora.describe(rank) for rank in range(1, 49)]
    errors = [fact["error"] for fact in facts]
    assert all(before >= after for before, after in zip(errors, errors[1:], strict=False))
    assert errors[0] > 0.15 and errors[-1] < 0.01
    assert [fact["factors"] for fact in facts] == [rank * (96 + 96) for rank in range(1, 49)]


def test_the_picture_needs_many_ranks_but_not_all():
    picture = lora.landscape()
    assert picture.shape == (96, 96) and picture.min() >= 0 and picture.max() <= 1
    assert lora.describe(8)["error"] < 0.1 < lora.describe(2)["error"]


@pytest.mark.parametrize("rank", [0, 97, 2.5, True, "4"])
def test_a_rank_that_cannot_be_is_refused(rank):
    with pytest.raises(ValueError, match="rank must be a whole number from 1 to 96"):
        lora.factors(lora.landscape(), rank)


def test_small_pictures_and_wrong_sizes():
    assert lora.landscape(24).shape == (24, 24)
    with pytest.raises(ValueError, match="size must be"):
        lora.landscape(2)


def test_descriptions_carry_the_figures_numbers():
    picture = lora.rank_picture(5)
    assert "rank 5" in picture.text and "960" in picture.text and "9,216" in picture.text
    strip = lora.rank_strip()
    assert all(f"rank {rank}" in strip.text for rank in lora.RANKS)


def test_moving_the_slider_changes_the_drawing():
    box = lora.rank_slider(start=4)
    slider, drawing = box.children
    first = drawing.value
    assert 'alt="' in first and "rank 4" in first
    slider.value = 12
    assert "rank 12" in drawing.value and drawing.value != first
    slider.value = 4
    assert drawing.value == first


def test_the_slider_is_an_input_that_keyboards_reach():
    slider, drawing = lora.rank_slider().children
    assert type(slider).__name__ == "IntSlider" and not slider.disabled
    assert slider.continuous_update is False  # one drawing when the key is released, not one a pixel
    assert (slider.min, slider.max, slider.step) == (1, 48, 1)
    assert "rank" in slider.description  # its label, which screen readers say
    assert 'aria-live="polite"' in drawing.value
    assert re.search(r'<img src="data:image/png;base64,[^"]+" alt="[^"]{40,}"', drawing.value)


def test_only_widgets_that_both_ipywidgets_7_and_8_have():
    import inspect

    used = set(re.findall(r"widgets\.(\w+)", inspect.getsource(lora) + inspect.getsource(style.moving)))
    assert used == {"IntSlider", "HTML", "VBox", "Layout"}


def forgets_the_scale(weight, A, B, alpha):
    return weight + B @ A


def raises(*_):
    raise RuntimeError("shapes")


def blank(*_):
    raise NotImplementedError


def test_a_right_merge_leaves_a_blank_difference():
    from lecturekit.tuning.lora import merge

    assert "W′ is right" in lora.merge_picture(merge).text
    assert "W′ is right" in lora.merge_picture(lambda w, a, b, s: w + torch.einsum("or,ri->oi", b, a) * s / len(a)).text


@pytest.mark.parametrize(
    ("answer", "said"),
    [
        (forgets_the_scale, "The difference shows: up to 0.9"),
        (raises, "raised RuntimeError"),
        (blank, "is not written yet"),
        (lambda *_: None, "returned NoneType"),
        (lambda weight, *_: weight.T, r"returned shape (32, 24), not (24, 32)"),
        (lambda weight, *_: weight * torch.nan, "The difference shows: up to inf"),
        (lambda weight, *_: weight.to(torch.complex64), "returned complex64 numbers"),
        (None, "raised TypeError"),
    ],
)
def test_a_wrong_merge_is_drawn_all_the_same(answer, said):
    picture = lora.merge_picture(answer)
    assert said in picture.text and picture.png


def test_a_merge_that_works_in_place_does_not_spoil_the_picture():
    assert "The difference shows" in lora.merge_picture(lambda w, a, b, s: w.add_(b @ a)).text


def test_a_right_layer_learns_its_goal():
    from lecturekit.tuning.lora import LoRALinear

    text = lora.layer_picture(LoRALinear).text
    assert "starts at zero" in text
    assert float(re.search(r"loss goes from .* to (\S+?)\.$", text)[1]) < 0.1


class RandomB(nn.Module):
    def __init__(self, base, r, alpha):
        super().__init__()
        self.base, self.A = base, nn.Parameter(torch.randn(r, base.in_features))
        self.B = nn.Parameter(torch.randn(base.out_features, r))

    def forward(self, x):
        return self.base(x) + x @ self.A.T @ self.B.T


@pytest.mark.parametrize(
    ("answer", "said"),
    [
        (RandomB, "starts away from zero"),
        (blank, "is not written yet"),
        (lambda base, r, alpha: base, "raised ValueError"),  # nothing to train
        (lambda *_: 3, "raised TypeError"),
        (None, "raised TypeError"),
    ],
)
def test_a_wrong_layer_is_drawn_all_the_same(answer, said):
    assert said in lora.layer_picture(answer).text


def test_pictures_leave_the_random_state_alone():
    from lecturekit.tuning.lora import LoRALinear, merge

    torch.manual_seed(0)
    wanted = torch.rand(3)
    torch.manual_seed(0)
    lora.merge_picture(merge)
    lora.layer_picture(LoRALinear, steps=3)
    assert torch.equal(torch.rand(3), wanted)
