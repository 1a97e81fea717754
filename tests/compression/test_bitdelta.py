"""BitDelta: the slide's formulas, the optimum they promise, and one bit a weight."""

import math

import pytest
import torch

from lecturekit.compression import bitdelta


def weights(*shape, seed=0, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    base = torch.randn(*shape, generator=generator)
    fine = base + 0.01 * torch.randn(*shape, generator=generator)
    return base.to(dtype), fine.to(dtype)


def test_signs_and_scale_are_the_slides():
    base = torch.tensor([[1.0, 2.0, -3.0], [0.5, 0.0, 4.0]])
    delta = torch.tensor([[0.5, -0.25, 0.0], [1.0, -1.0, 0.25]])  # exact in binary, and so are the sums
    signs, scale = bitdelta.compress(base, base + delta)
    assert signs.tolist() == [[1, -1, -1], [1, -1, 1]]  # Sign(0) = -1
    assert scale.item() == 3 / 6
    assert (signs.dtype, scale.dtype, scale.shape) == (torch.int8, torch.float32, ())
    assert bitdelta.apply(base, signs, scale).tolist() == [[1.5, 1.5, -3.5], [1.0, -0.5, 4.5]]


@pytest.mark.parametrize("seed", range(5))
def test_the_scale_minimises_the_squared_error(seed):
    base, fine = (w.double() for w in weights(40, 30, seed=seed))
    signs, scale = bitdelta.compress(base, fine)
    delta = fine - base

    def error(alpha):
        return (delta - alpha * signs).square().sum().item()

    best = error(scale.double())
    for factor in [*torch.linspace(0, 3, 61).tolist(), 0.999, 1.001]:
        # The error is a parabola in alpha with the curvature n: this much above its lowest point, and never below.
        # The scale itself is rounded to float32, 6e-8 of it.
        gap = delta.numel() * ((factor - 1) * scale.item()) ** 2
        assert error(factor * scale.double()) - best == pytest.approx(gap, rel=1e-3, abs=1e-6 * best)
    flipped = signs.clone()
    flipped[0, 0] *= -1
    assert (delta - scale * flipped).square().sum() > best


def test_half_precision_weights_are_subtracted_in_float32():
    base, fine = weights(64, 32, dtype=torch.bfloat16)
    signs, scale = bitdelta.compress(base, fine)
    exact = fine.double() - base.double()
    assert torch.equal(signs > 0, exact > 0)
    assert scale.item() == pytest.approx(exact.abs().mean().item(), rel=1e-6)  # a mean of 2048 in float32
    rebuilt = bitdelta.apply(base, signs, scale)
    assert rebuilt.dtype == torch.bfloat16
    assert torch.equal(rebuilt, (base.float() + scale * signs).bfloat16())


def test_inputs_stay_as_they_were():
    base, fine = weights(5, 7)
    copies = base.clone(), fine.clone()
    signs, scale = bitdelta.compress(base, fine)
    kept = signs.clone()
    bitdelta.apply(base, bitdelta.unpack(bitdelta.pack(signs), signs.shape), scale)
    assert torch.equal(base, copies[0])
    assert torch.equal(fine, copies[1])
    assert torch.equal(signs, kept)


def test_a_scale_can_be_distilled():
    base, fine = weights(12, 8)
    signs, scale = bitdelta.compress(base, fine)
    trained = scale.clone().requires_grad_()
    x = torch.randn(5, 8, generator=torch.Generator().manual_seed(1))
    (x @ bitdelta.apply(base, signs, trained).T).sum().backward()
    # d/d scale of the sum of x (base + scale signs)ᵀ; 60 terms of order 1 in float32
    assert trained.grad.item() == pytest.approx((x @ signs.float().T).sum().item(), rel=1e-4, abs=1e-4)


@pytest.mark.parametrize("shape", [(1,), (7,), (8,), (9,), (3, 5), (4, 6, 2), (64, 64)])
def test_one_bit_a_sign_there_and_back(shape):
    signs, _ = bitdelta.compress(*weights(*shape))
    packed = bitdelta.pack(signs)
    assert packed.dtype == torch.uint8
    assert packed.nbytes == math.ceil(signs.numel() / 8)
    flat = signs.flatten().tolist()
    for k, byte in enumerate(packed.tolist()):
        assert byte == sum((sign > 0) << j for j, sign in enumerate(flat[8 * k : 8 * k + 8]))
    again = bitdelta.unpack(packed, shape)
    assert again.dtype == torch.int8
    assert torch.equal(again, signs)


def test_packing_follows_the_shape_and_not_the_memory():
    signs = bitdelta.compress(*weights(6, 10))[0].T  # not contiguous
    assert torch.equal(bitdelta.unpack(bitdelta.pack(signs), (10, 6)), signs)


ONES = torch.ones(2, 3)
SIGNS = torch.ones(2, 3, dtype=torch.int8)


@pytest.mark.parametrize(
    ("call", "error", "words"),
    [
        (lambda: bitdelta.compress([1.0], ONES), TypeError, "base must be a torch.Tensor"),
        (lambda: bitdelta.compress(ONES, ONES.int()), TypeError, "fine must have a floating-point dtype"),
        (lambda: bitdelta.compress(ONES, ONES.T), ValueError, r"fine must have base's shape \(2, 3\), got \(3, 2\)"),
        (lambda: bitdelta.compress(ONES * math.nan, ONES), ValueError, "base must be finite"),
        (lambda: bitdelta.compress(ONES, ONES * math.inf), ValueError, "fine must be finite"),
        (lambda: bitdelta.compress(torch.ones(0), torch.ones(0)), ValueError, "base must not be empty"),
        (lambda: bitdelta.apply(ONES, SIGNS.float(), 1.0), TypeError, "signs must have dtype torch.int8"),
        (lambda: bitdelta.apply(ONES, SIGNS * 0, 1.0), ValueError, r"signs must be \+1 or -1 everywhere"),
        (lambda: bitdelta.apply(ONES, SIGNS.T, 1.0), ValueError, "signs must have base's shape"),
        (lambda: bitdelta.apply(ONES, SIGNS, ONES), ValueError, "scale must have 0 dimension"),
        (lambda: bitdelta.apply(ONES, SIGNS, math.nan), ValueError, "scale must be finite"),
        (lambda: bitdelta.apply(ONES, SIGNS, "1"), TypeError, "scale must be a number"),
        (lambda: bitdelta.apply(ONES * math.nan, SIGNS, 1.0), ValueError, "base must be finite"),
        (lambda: bitdelta.pack(ONES), TypeError, "signs must have dtype torch.int8"),
        (lambda: bitdelta.pack(SIGNS * 2), ValueError, r"signs must be \+1 or -1"),
        (lambda: bitdelta.unpack(SIGNS, (2, 3)), TypeError, "packed must have dtype torch.uint8"),
        (lambda: bitdelta.unpack(bitdelta.pack(SIGNS), (9,)), ValueError, r"packed must have ceil\(9 / 8\) = 2 bytes"),
    ],
)
def test_bad_arguments_are_named(call, error, words):
    with pytest.raises(error, match=words):
        call()
