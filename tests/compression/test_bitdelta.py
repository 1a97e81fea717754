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


@pytest.mark.parametrize("size", [bitdelta.PIECE - 3, bitdelta.PIECE, 2 * bitdelta.PIECE + 5])
def test_packing_in_pieces_loses_nothing_where_they_meet(size):
    signs = torch.randint(0, 2, (size,)).mul_(2).sub_(1).to(torch.int8)
    assert torch.equal(bitdelta.unpack(bitdelta.pack(signs), (size,)), signs)
    signs[-1] = 0
    with pytest.raises(ValueError, match=r"signs must be \+1 or -1"):
        bitdelta.pack(signs)


def test_the_distillation_loss_is_the_mean_squared_distance_of_the_real_tokens():
    logits = torch.tensor([[[1.0, 2.0], [0.0, 0.0]], [[5.0, 5.0], [9.0, 9.0]]], requires_grad=True)
    target = torch.tensor([[[1.0, 4.0], [3.0, 4.0]], [[5.0, 6.0], [0.0, 0.0]]], requires_grad=True)
    mask = torch.tensor([[True, True], [True, False]])
    loss = bitdelta.distill_loss(logits, target, mask)
    assert loss.item() == (4 + 25 + 1) / 3
    loss.backward()
    assert target.grad is None  # the fine-tune is what is aimed at
    expected = 2 / 3 * (logits - target).detach() * mask.unsqueeze(-1)
    torch.testing.assert_close(logits.grad, expected)


def test_the_distillation_loss_is_computed_in_float32():
    logits, target = torch.full((1, 1, 4), 300.0).half(), torch.zeros(1, 1, 4).half()
    loss = bitdelta.distill_loss(logits, target, torch.ones(1, 1, dtype=torch.bool))
    assert loss.item() == 4 * 300.0**2  # in float16 already one square overflows


@pytest.mark.parametrize("seed", range(5))
def test_each_further_bit_is_the_sign_and_scale_of_what_is_left(seed):
    base, fine = weights(20, 30, seed=seed)
    delta = fine - base
    signs, scales = bitdelta.more_bits(delta, 4)
    assert (signs.shape, signs.dtype, scales.shape, scales.dtype) == ((4, 20, 30), torch.int8, (4,), torch.float32)
    left = delta.clone()
    for one, scale in zip(signs, scales, strict=True):
        assert torch.equal(one, torch.where(left > 0, 1, -1).to(torch.int8))
        assert scale.item() == pytest.approx(left.abs().mean().item(), rel=1e-6)
        before = left.square().sum()
        left = left - scale * one
        # each bit takes n scale² off the squared error, Σ (|d| - scale)² = Σ d² - n scale²; n roundings of the sums
        assert left.square().sum().item() == pytest.approx((before - delta.numel() * scale**2).item(), rel=1e-4)


@pytest.mark.parametrize("shape", [(12, 30), (30, 12), (16, 16), (1, 9)])
@pytest.mark.parametrize("rank", [1, 5, 12])
def test_the_low_rank_factors_leave_what_the_smaller_singular_values_hold(shape, rank):
    delta = torch.randn(shape, generator=torch.Generator().manual_seed(rank))
    rank = min(rank, *shape)
    left, right = bitdelta.low_rank(delta, rank)
    assert (left.shape, right.shape) == ((shape[0], rank), (rank, shape[1]))
    singular = torch.linalg.svdvals(delta.double())
    error = (delta - left @ right).square().sum().item()
    # Eckart and Young: no pair of this rank leaves less; factors in float32
    assert error == pytest.approx(singular[rank:].square().sum().item(), rel=1e-4, abs=1e-9)


@pytest.mark.parametrize("shape", [(576, 576), (192, 576), (1536, 576), (576, 1536), (4, 4)])
@pytest.mark.parametrize("bits", [1, 2, 3])
def test_the_rank_of_equal_bytes_is_the_largest_that_fits(shape, bits):
    rank = bitdelta.rank_of_equal_bytes(shape, bits)
    held = math.ceil(shape[0] * shape[1] / 8) * bits + 4 * bits
    assert 2 * rank * sum(shape) <= held < 2 * (rank + 1) * sum(shape)
    signs, scales = bitdelta.more_bits(torch.randn(shape), bits)
    assert bitdelta.delta_bytes(shape, bits) == sum(bitdelta.pack(one).nbytes for one in signs) + scales.nbytes == held


def test_the_papers_table_comes_out_to_the_printed_digit():
    printed = {  # Liu et al. 2024: size in GB, delta in "GB", factor
        "Llama-2 7B": (13.48, 1.24, 10.87),
        "Llama-2 13B": (26.03, 2.09, 12.45),
        "Llama-2 70B": (137.95, 8.95, 15.41),
        "Mistral-7B": (14.48, 1.30, 11.14),
    }
    rows = {row.name: row for row in bitdelta.size_table()}
    assert rows.keys() == printed.keys()
    for name, (gigabytes, delta, factor) in printed.items():
        row = rows[name]
        assert f"{row.base / 1e9:.2f}" == f"{gigabytes:.2f}"
        assert f"{row.delta / 2**30:.2f}" == f"{delta:.2f}"
        assert f"{row.printed_factor:.2f}" == f"{factor:.2f}"
        assert row.delta == row.one_bit + row.scales + row.rest
        assert row.factor == pytest.approx(factor / (2**30 / 1e9), rel=5e-3)  # the printed sizes have three digits
        assert (row.base, row.delta) == bitdelta.model_bytes(bitdelta.CONFIGURATIONS[name])


@pytest.mark.parametrize("name", list(bitdelta.CONFIGURATIONS))
def test_the_sizes_are_those_of_the_models_that_transformers_builds(name):
    from transformers import LlamaConfig, LlamaForCausalLM

    with torch.device("meta"):
        model = LlamaForCausalLM(LlamaConfig(**bitdelta.CONFIGURATIONS[name]))
    base = delta = 0
    for parameter_name, parameter in model.named_parameters():
        base += 2 * parameter.numel()
        one_bit = parameter_name.endswith("_proj.weight")
        delta += math.ceil(parameter.numel() / 8) + 4 if one_bit else 2 * parameter.numel()
    assert bitdelta.model_bytes(bitdelta.CONFIGURATIONS[name]) == (base, delta)


LOGITS, REAL = torch.zeros(2, 3, 4), torch.ones(2, 3, dtype=torch.bool)
MISTRAL = bitdelta.CONFIGURATIONS["Mistral-7B"]


@pytest.mark.parametrize(
    ("call", "error", "words"),
    [
        (lambda: bitdelta.distill_loss(LOGITS, LOGITS[:, :2], REAL), ValueError, "target must have logits' shape"),
        (lambda: bitdelta.distill_loss(LOGITS, LOGITS, REAL.int()), TypeError, "mask must have dtype torch.bool"),
        (lambda: bitdelta.distill_loss(LOGITS, LOGITS, REAL.T), ValueError, r"mask must be \(batch, seq\) = \(2, 3\)"),
        (lambda: bitdelta.distill_loss(LOGITS, LOGITS, ~REAL), ValueError, "mask must be True for at least one token"),
        (lambda: bitdelta.more_bits(ONES, 0), ValueError, "bits must be at least 1, got 0"),
        (lambda: bitdelta.more_bits(ONES * math.nan, 1), ValueError, "delta must be finite"),
        (lambda: bitdelta.low_rank(ONES, 3), ValueError, "rank must be at most 2, delta's smaller size, got 3"),
        (lambda: bitdelta.low_rank(torch.ones(3), 1), ValueError, "delta must have 2 dimension"),
        (lambda: bitdelta.model_bytes(MISTRAL | {"vocab_size": 0}), ValueError, r"config\['vocab_size'\] must be at"),
        (lambda: bitdelta.model_bytes(MISTRAL | {"num_attention_heads": 48}), ValueError, "multiple of its 48 heads"),
        (lambda: bitdelta.model_bytes({}), KeyError, "hidden_size"),
    ],
)
def test_bad_arguments_of_the_rest_are_named(call, error, words):
    with pytest.raises(error, match=words):
        call()
