"""The DPO figures say true numbers, the slider works with a keyboard, and wrong answers are drawn all the same."""

import inspect
import math
import re

import numpy as np
import pytest
import torch

from lecturekit.alignment.dpo import dpo_loss, gradient_weight, optimal_policy
from lecturekit.explore import dpo, style


@pytest.mark.parametrize("beta", [0.05, 0.5])
def test_the_first_slides_surface_is_the_loss(beta):
    ratios, losses = dpo.surface(beta, "first slide", count=7)
    zero = torch.zeros(1, dtype=torch.float64)
    for row, rejected in enumerate(ratios):
        for column, chosen in enumerate(ratios):
            expected = dpo_loss(zero + chosen, zero + rejected, zero, zero, beta)
            assert losses[row, column] == pytest.approx(expected.item(), rel=1e-12)


def test_the_example_slides_surface_is_not_and_has_no_floor():
    ratios, right = dpo.surface(0.1, "first slide")
    _, slip = dpo.surface(0.1, "example slide")
    middle = len(ratios) // 2
    np.testing.assert_allclose(right[middle], slip[middle])  # they agree where the rejected log-ratio is 0
    assert right.min() > 0 > slip.min()
    slopes = np.gradient(slip, ratios, axis=0)
    np.testing.assert_allclose(slopes, 0.1)  # the same push on the rejected answer everywhere


def test_described_pushes_are_the_gradient():
    facts = dpo.describe(0.2)
    for name, chosen, rejected in (("settled", 20.0, -20.0), ("start", 0.0, 0.0), ("wrong", -20.0, 20.0)):
        zero = torch.zeros(1)
        weight = gradient_weight(zero + chosen, zero + rejected, zero, zero, 0.2).item()
        assert facts[f"{name} first slide"] == pytest.approx(0.2 * weight, rel=1e-5)
        assert facts[f"{name} example slide"] == 0.2


@pytest.mark.parametrize(("beta", "placement"), [(0, "first slide"), (-1, "first slide"), (0.1, "second slide")])
def test_what_cannot_be_is_refused(beta, placement):
    with pytest.raises(ValueError, match="beta must be above 0|placement must be one of"):
        dpo.surface(beta, placement)


def test_descriptions_carry_the_figures_numbers():
    text = dpo.surface_picture(0.5).text
    assert "beta 0.5" in text and f"{dpo.describe(0.5)['lowest example slide']:.2f}" in text
    assert all(f"beta {beta:g}" in dpo.surface_strip().text for beta in (0.05, 0.1, 0.5))


def test_moving_the_slider_changes_the_drawing():
    slider, drawing = dpo.surface_slider(start=0.1).children
    first = drawing.value
    assert "beta 0.1" in first
    slider.value = 0.5
    assert "beta 0.5" in drawing.value and drawing.value != first
    slider.value = 0.1
    assert drawing.value == first


def test_the_slider_is_an_input_that_keyboards_reach():
    slider, drawing = dpo.surface_slider().children
    assert type(slider).__name__ == "SelectionSlider" and not slider.disabled and slider.description == "β"
    assert slider.continuous_update is False
    assert [value for _, value in slider.options] == list(dpo.BETAS)
    assert 'aria-live="polite"' in drawing.value
    assert re.search(r'<img src="data:image/png;base64,[^"]+" alt="[^"]{40,}"', drawing.value)


def test_only_widgets_that_both_ipywidgets_7_and_8_have():
    used = set(re.findall(r"widgets\.(\w+)", inspect.getsource(dpo) + inspect.getsource(style.moving)))
    assert used == {"SelectionSlider", "HTML", "VBox", "Layout"}


def blank(*_):
    raise NotImplementedError


def broken(*_):
    raise RuntimeError("shapes")


def test_a_right_optimum_and_a_right_loss_are_called_right():
    assert dpo.optimum_picture(optimal_policy).text.count("yours is right") == 3
    assert dpo.loss_picture(dpo_loss).text.count("follows the right curve") == 2


@pytest.mark.parametrize(
    ("answer", "said"),
    [
        (blank, "is not written yet"),
        (broken, "raised RuntimeError"),
        (lambda reference, *_: reference, "yours is off by"),
        (lambda reference, *_: reference[0], "returned shape (5,), not (1, 5)"),
        (lambda reference, *_: reference * math.nan, "off by up to inf"),
        (lambda *_: 3, "returned int, not a tensor"),
        (lambda reference, *_: reference.long(), "returned int64 numbers"),
        (None, "raised TypeError"),
    ],
)
def test_a_wrong_optimum_is_drawn_all_the_same(answer, said):
    picture = dpo.optimum_picture(answer)
    assert said in picture.text and picture.png


def slip(pc, pr, rc, rr, beta):
    return -(torch.nn.functional.logsigmoid(beta * (pc - rc)) - beta * (pr - rr)).mean()


@pytest.mark.parametrize(
    ("answer", "said"),
    [
        (blank, "is not written yet"),
        (broken, "raised RuntimeError"),
        (slip, "over the chosen log-ratio it follows the right curve; over the rejected log-ratio it is off by up to"),
        (lambda pc, *_: pc * math.nan, "off by up to inf"),
        (lambda *_: "low", "raised"),
    ],
)
def test_a_wrong_loss_is_drawn_all_the_same(answer, said):
    picture = dpo.loss_picture(answer)
    assert said in picture.text and picture.png


def test_a_loss_without_an_end_is_given_up(monkeypatch):
    def stuck(*_):
        while True:
            pass

    monkeypatch.setattr(dpo, "PATIENCE", 0.2)
    assert "did not end" in dpo.loss_picture(stuck).text


def test_the_strip_says_the_sums_and_refuses_lists_that_do_not_pair_up():
    text = dpo.logprob_strip([("chosen", ["I", " do", " not"], [-1.0, -2.0, -3.0], [-0.5, -0.5, -0.5])]).text
    assert "chosen: the sum goes from -6.0 to -1.5 nats" in text
    with pytest.raises(ValueError, match="got 2, 2 and 1"):
        dpo.logprob_strip([("chosen", ["I", " do"], [-1.0, -2.0], [-1.0])])
    with pytest.raises(ValueError, match="at least one answer"):
        dpo.logprob_strip([])
