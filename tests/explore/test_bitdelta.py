"""The α figure says true numbers, its controls work with a keyboard; wrong answers are drawn all the same."""

import inspect
import re

import numpy as np
import pytest
import torch

from lecturekit.explore import bitdelta, style


@pytest.mark.parametrize("shape", bitdelta.SHAPES)
def test_every_shape_is_symmetric_and_of_size_one(shape):
    delta = bitdelta.changes(shape)
    assert delta.size == bitdelta.WEIGHTS and abs(delta.mean()) < 1e-12
    assert (delta**2).mean() == pytest.approx(1, abs=1e-9)
    assert np.array_equal(delta, bitdelta.changes(shape))


@pytest.mark.parametrize(
    ("shape", "mean"),
    # E|Δ| for a root mean square of 1: two spikes 1, uniform √3/2, Gaussian √(2/π), Laplace 1/√2
    [
        ("all the same size", 1.0),
        ("uniform", np.sqrt(3) / 2),
        ("bell curve", np.sqrt(2 / np.pi)),
        ("many small, few large", np.sqrt(0.5)),
    ],
)
def test_the_shapes_are_what_their_names_say(shape, mean):
    delta = np.abs(bitdelta.changes(shape))
    assert delta.mean() == pytest.approx(mean, abs=2e-3)  # 2,000 quantiles miss the last of the Laplace tail
    # the least error is 1 − (E|Δ|)² / E Δ², at α = E|Δ|: no α of a fine grid does better
    errors = [bitdelta.error(bitdelta.changes(shape), alpha) for alpha in np.linspace(0, 2.2, 441)]
    least = bitdelta.error(bitdelta.changes(shape), delta.mean())
    assert least == pytest.approx(1 - delta.mean() ** 2, abs=1e-9) and least <= min(errors) + 1e-12


def test_no_scale_leaves_everything_and_a_wrong_shape_is_named():
    assert bitdelta.error(bitdelta.changes("uniform"), 0.0) == pytest.approx(1, abs=1e-12)
    with pytest.raises(ValueError, match="shape must be one of all the same size, uniform"):
        bitdelta.changes("round")


def test_the_slider_does_not_give_the_minimum_away():
    best = np.abs(bitdelta.changes("bell curve")).mean()
    text = bitdelta.alpha_picture(0.4, "bell curve").text
    assert f"{best:.2f}" not in text and "α = 0.40" in text
    assert f"{best:.2f}" in bitdelta.alpha_strip().text


def test_moving_the_controls_changes_the_drawing():
    slider, shapes, drawing = bitdelta.alpha_slider().children
    first = drawing.value
    slider.value = 0.8
    second = drawing.value
    assert "α = 0.80" in second and second != first
    shapes.value = "uniform"
    assert "uniform" in drawing.value and drawing.value != second
    slider.value, shapes.value = 0.4, "bell curve"
    assert drawing.value == first
    count, bits, drawing = bitdelta.serving_slider().children
    first = drawing.value
    count.value, bits.value = 16, 2
    assert "16 of them" in drawing.value and "2 bits" in drawing.value and drawing.value != first


def test_the_controls_are_inputs_that_keyboards_reach():
    for box in (bitdelta.alpha_slider(), bitdelta.serving_slider()):
        *controls, drawing = box.children
        for control in controls:
            assert not control.disabled and control.description
            assert getattr(control, "continuous_update", False) is False  # one drawing when the key is released
        assert re.search(r'<img src="data:image/png;base64,[^"]+" alt="[^"]{40,}"', drawing.value)


def test_only_widgets_that_both_ipywidgets_7_and_8_have():
    used = set(re.findall(r"widgets\.(\w+)", inspect.getsource(bitdelta) + inspect.getsource(style.moving)))
    assert used <= {"IntSlider", "FloatSlider", "Dropdown", "HTML", "VBox", "Layout"}


def test_serving_is_the_slides_formula():
    # params × models × 16 bit against params × (models × 1 bit + 16 bit), in bytes of 8 bits
    whole, shared = bitdelta.serving_gigabytes(8e9, 8, 1)
    assert (whole, shared) == (8 * 16.0, 8 * 1.0 + 16.0)
    assert bitdelta.serving_gigabytes(8e9, 1, 1)[1] > bitdelta.serving_gigabytes(8e9, 1, 1)[0]
    picture = bitdelta.serving_picture(8, 1, parameters=8e9)
    assert "128 GB whole" in picture.text and "24 GB as one base" in picture.text
    assert "80 GB go 5 whole ones, or one base and 64 deltas" in picture.text
    for models in (0, 2.5, True):
        with pytest.raises(ValueError, match="models must be a whole number of at least 1"):
            bitdelta.serving_gigabytes(1e9, models, 1)


def right_compress(base, fine):
    delta = fine - base
    return torch.where(delta > 0, 1, -1).to(torch.int8), delta.abs().mean()


def blank(*_):
    raise NotImplementedError


def raises(*_):
    raise RuntimeError("shapes")


def test_a_right_compress_leaves_the_least():
    assert "no scale times signs leaves less" in bitdelta.compress_picture(right_compress).text


@pytest.mark.parametrize(
    ("answer", "said"),
    [
        (lambda b, f: (right_compress(b, f)[0], (f - b).abs().max()), "would be possible"),
        (lambda b, f: right_compress(torch.zeros_like(b), f), "would be possible"),
        (lambda b, f: ((f - b).sign().to(torch.int8), (f - b).square().mean().sqrt()), "would be possible"),
        (lambda b, f: (right_compress(f, b)[0], (f - b).abs().mean()), "would be possible"),
        (lambda b, f: (f - b).T, "raised ValueError"),
        (lambda b, f: (torch.ones(3, dtype=torch.int8), torch.tensor(1.0)), "returned shape (3,), not (16, 24)"),
        (raises, "raised RuntimeError"),
        (blank, "is not written yet"),
        (None, "raised TypeError"),
    ],
)
def test_a_wrong_compress_is_drawn_all_the_same(answer, said):
    picture = bitdelta.compress_picture(answer)
    assert said in picture.text and picture.png


def bits_low_first(signs):
    bits = (signs.reshape(-1) > 0).to(torch.uint8)
    bits = torch.nn.functional.pad(bits, (0, -len(bits) % 8)).view(-1, 8)
    return (bits << torch.arange(8, dtype=torch.uint8)).sum(1).to(torch.uint8)


def bits_high_first(signs):
    bits = (signs.reshape(-1) > 0).to(torch.uint8)
    bits = torch.nn.functional.pad(bits, (0, -len(bits) % 8)).view(-1, 8)
    return (bits << torch.arange(7, -1, -1, dtype=torch.uint8)).sum(1).to(torch.uint8)


def test_the_picture_comes_back_whole():
    from lecturekit.compression.bitdelta import pack

    for answer in (bits_low_first, pack):
        assert "From your 209 bytes the picture came back whole." in bitdelta.pack_picture(answer).text


@pytest.mark.parametrize(
    ("answer", "said"),
    [
        (bits_high_first, "bits are wrong"),
        (lambda signs: bits_low_first(-signs), "1,665 bits are wrong"),
        (lambda signs: bits_low_first(signs)[:-1], "From your 208 bytes 1 bits are wrong. 209 bytes would do."),
        (lambda signs: (signs.reshape(-1) > 0).to(torch.uint8), "209 bytes would do"),
        (lambda signs: bits_low_first(signs).long(), "returned int64, not uint8"),
        (lambda signs: bytes(209), "returned bytes, not a tensor"),
        (raises, "raised RuntimeError"),
        (blank, "is not written yet"),
        (None, "raised TypeError"),
    ],
)
def test_a_wrong_pack_is_drawn_all_the_same(answer, said):
    picture = bitdelta.pack_picture(answer)
    assert said in picture.text and picture.png


def right_product(x, weight, packed, scales, rows):
    out, inp = weight.shape
    bits = (packed[:, :, None] >> torch.arange(8, dtype=torch.uint8)) & 1
    signs = bits.flatten(1)[:, : out * inp].view(-1, out, inp) * 2.0 - 1
    return x @ weight.T + scales[rows, None] * torch.einsum("boi,bi->bo", signs[rows], x)


def first_delta_for_all(x, weight, packed, scales, rows):
    return right_product(x, weight, packed, scales, torch.zeros_like(rows))


def test_right_products_have_their_own_delta_in_every_row():
    from lecturekit.compression.kernels import delta_product

    for answer in (right_product, delta_product):
        assert "All four rows have their own delta." in bitdelta.product_picture(answer).text


@pytest.mark.parametrize(
    ("answer", "said"),
    [
        (first_delta_for_all, "Wrong rows: 0, 2, 3."),
        (lambda x, w, p, s, r: right_product(x, w, p, s.flip(0), r), "Wrong rows: 0, 1, 2."),  # 2 of 3 scales swapped
        (lambda x, w, p, s, r: right_product(x, w, p, torch.ones(3), r), "Wrong rows: 0, 1, 2."),
        (lambda x, w, p, s, r: right_product(x, w, 255 - p, s, r), "Wrong rows: 0, 1, 2, 3."),
        (lambda x, w, p, s, r: right_product(x, w, p, s, r) * torch.nan, "Wrong rows: 0, 1, 2, 3."),
        (lambda x, *_: x, "returned shape (4, 24), not (4, 16)"),
        (raises, "raised RuntimeError"),
        (blank, "is not written yet"),
        (None, "raised TypeError"),
    ],
)
def test_a_wrong_product_is_drawn_all_the_same(answer, said):
    picture = bitdelta.product_picture(answer)
    assert said in picture.text and picture.png


def right_loss(logits, target, mask):
    return (logits - target.detach())[mask].square().sum(-1).mean()


def test_right_losses_are_the_slides():
    from lecturekit.compression.bitdelta import distill_loss

    for answer in (right_loss, distill_loss):
        assert "lowest at 1.00; it is the slide's loss." in bitdelta.distill_picture(answer).text


@pytest.mark.parametrize(
    ("answer", "said"),
    [
        (lambda z, t, m: (z - t).square().sum(-1).mean(), "it differs from it"),  # the padding counts
        (lambda z, t, m: (z - t)[m].square().mean(), "lowest at 1.00; it differs from it"),
        (lambda z, t, m: (z - t)[m].square().sum(-1).mean().detach(), "raised RuntimeError"),  # no gradient
        (lambda z, t, m: (z - t)[m].square().sum(-1), "returned Tensor, not a tensor with one number"),
        (lambda z, t, m: 3.0, "returned float, not a tensor with one number"),
        (blank, "is not written yet"),
        (None, "raised TypeError"),
    ],
)
def test_a_wrong_loss_is_drawn_all_the_same(answer, said):
    picture = bitdelta.distill_picture(answer)
    assert said in picture.text and picture.png


def test_padding_that_counts_moves_the_minimum():
    text = bitdelta.distill_picture(lambda z, t, m: (z - t).square().sum(-1).mean()).text
    assert float(re.search(r"lowest at ([\d.]+);", text)[1]) < 1


MODELS = {"A 1": ({"hidden_size": 2}, 2.0, 1.0), "B 2": ({"hidden_size": 3}, 3.0, 1.5)}


def test_sizes_are_drawn_in_the_units_of_the_paper():
    text = bitdelta.size_picture(lambda c: (c["hidden_size"] * 10**9, c["hidden_size"] * 2**29), MODELS).text
    assert "A 1 2.00 (the paper: 2.00); B 2 3.00 (the paper: 3.00); A 1 1.00 (the paper: 1.00); B 2 1.50" in text


@pytest.mark.parametrize(
    ("answer", "said"),
    [
        (lambda config: 5, "raised TypeError"),
        (lambda config: (1, 2, 3), "returned no pairs (base, delta)"),
        (lambda config: (config["vocab_size"], 1), "raised KeyError"),
        (blank, "is not written yet"),
        (None, "raised TypeError"),
    ],
)
def test_wrong_sizes_are_drawn_all_the_same(answer, said):
    picture = bitdelta.size_picture(answer, MODELS)
    assert said in picture.text and picture.png


def test_the_tenants_are_told_in_full():
    answers = {"a list": ["- Sure.\n- Which order?"], "a pirate": ["Ahoy, $5 matey! _x_"]}
    questions = ["Where is my parcel?"]
    picture = bitdelta.tenants_picture(questions, answers, 0)
    assert "a list: - Sure. - Which order?; a pirate: Ahoy, $5 matey!" in picture.text
    chosen, drawing = bitdelta.tenants_selector(questions, answers).children
    assert chosen.value == 0 and "Where is my parcel?" in drawing.value
    with pytest.raises(ValueError, match="one answer a question"):
        bitdelta.tenants_selector(["a", "b"], answers)


def test_pictures_leave_the_random_state_alone():
    torch.manual_seed(0)
    wanted = torch.rand(3)
    torch.manual_seed(0)
    bitdelta.compress_picture(right_compress)
    bitdelta.pack_picture(bits_low_first)
    bitdelta.product_picture(right_product)
    bitdelta.distill_picture(right_loss)
    assert torch.equal(torch.rand(3), wanted)
