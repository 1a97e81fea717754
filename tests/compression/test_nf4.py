"""NF4 against the lecture's list, against its definition, and against bitsandbytes bit for bit."""

import math

import pytest
import torch

from lecturekit.compression import nf4

SLIDE = [
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
    -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
]  # fmt: skip


def normal(count, seed, dtype=torch.float32):
    return torch.randn(count, generator=torch.Generator().manual_seed(seed)).to(dtype)


def peer_quantize(x, blocksize):
    """bitsandbytes' packed codes, flat, and its state."""
    from bitsandbytes.functional import quantize_4bit

    packed, state = quantize_4bit(x, blocksize=blocksize, quant_type="nf4")
    return packed.flatten(), state


def assert_same_codes(x, blocksize):
    indices, absmax = nf4.quantize(x, blocksize)
    packed, state = peer_quantize(x, blocksize)
    assert torch.equal(nf4.pack(indices), packed)
    return indices, absmax, packed, state


def test_levels_are_the_slides_list():
    assert nf4.LEVELS.dtype == torch.float32
    for derived, printed in zip(nf4.LEVELS.tolist(), SLIDE, strict=True):
        assert derived == pytest.approx(printed, abs=1e-7)


def test_levels_are_bitsandbytes_table_to_the_last_bit():
    from bitsandbytes.functional import create_dynamic_map, get_4bit_type

    assert torch.equal(nf4.LEVELS, get_4bit_type("nf4", device="cpu"))
    assert torch.equal(nf4.DYNAMIC_LEVELS, create_dynamic_map())


def test_levels_are_evenly_spaced_quantiles_on_each_side():
    # A level times the largest quantile, through the normal distribution function, gives its probability back.
    largest = torch.special.ndtri(torch.tensor(0.9677083, dtype=torch.float64))
    probabilities = torch.special.ndtr(nf4.LEVELS.double() * largest)
    assert nf4.LEVELS[7] == 0
    for side in (probabilities[:8], probabilities[7:]):
        # The levels are rounded to float32: 6e-8 of at most 1, at a slope below 1.
        torch.testing.assert_close(side.diff(), side.diff().mean().expand(len(side) - 1), rtol=0, atol=2e-7)


def test_the_other_tables_are_bitsandbytes_and_the_formats_own():
    from bitsandbytes.functional import get_4bit_type

    assert torch.equal(nf4.fp4_levels(), get_4bit_type("fp4", device="cpu").unique())  # ascending; zero is there twice
    assert nf4.int4_levels().tolist() == pytest.approx([number / 7 for number in range(-7, 8)], rel=1e-7)
    assert all(levels()[7] == 0 for levels in (nf4.int4_levels, nf4.fp4_levels, nf4.e2m1_levels))
    # E2M1 from its bits: sign, two of exponent with a bias of 1 (subnormal at 0), one of mantissa
    numbers = set()
    for bits in range(16):
        exponent, mantissa = (bits >> 1) & 3, bits & 1
        size = mantissa / 2 if exponent == 0 else 2.0 ** (exponent - 1) * (1 + mantissa / 2)
        numbers.add(-size if bits & 8 else size)
    assert nf4.e2m1_levels().tolist() == pytest.approx([number / 6 for number in sorted(numbers)], rel=1e-7)


def test_fp4_goes_there_and_back_as_in_bitsandbytes():
    from bitsandbytes.functional import dequantize_4bit, quantize_4bit

    x = normal(64 * 300 + 10, 4)
    got = nf4.dequantize_with(nf4.fp4_levels(), *nf4.quantize_with(nf4.fp4_levels(), x))
    assert torch.equal(got, dequantize_4bit(*quantize_4bit(x, blocksize=64, quant_type="fp4")).flatten())


@pytest.mark.parametrize("blocksize", [64, 50])
@pytest.mark.parametrize("levels", [nf4.int4_levels(), nf4.e2m1_levels(), nf4.fp4_levels(), nf4.DYNAMIC_LEVELS])
def test_any_table_gives_each_value_its_nearest_level(levels, blocksize):
    x = normal(6410, 0)
    indices, absmax = nf4.quantize_with(levels, x, blocksize)
    assert indices.dtype == torch.uint8
    scales = absmax.repeat_interleave(blocksize)[: len(x)]
    distance = ((x / scales).double()[:, None] - levels.double()).abs()
    chosen = distance.gather(1, indices.long()[:, None]).squeeze(1)
    assert bool((chosen <= distance.min(1).values + 1.2e-7).all())  # two may be equally near within a rounding
    assert torch.equal(nf4.dequantize_with(levels, indices, absmax, blocksize), levels[indices.long()] * scales)


@pytest.mark.parametrize("seed", range(5))
def test_a_million_codes_equal_bitsandbytes(seed):
    indices, absmax, _, state = assert_same_codes(normal(1_000_000, seed), 64)
    assert torch.equal(absmax, state.absmax)
    assert set(indices.unique().tolist()) == set(range(16))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("blocksize", [32, 64, 128, 256, 1024])
def test_every_dtype_and_blocksize_equal_bitsandbytes_there_and_back(dtype, blocksize):
    from bitsandbytes.functional import dequantize_4bit

    x = (normal(40_000, blocksize, dtype) * 0.02).view(200, 200)
    indices, absmax, packed, state = assert_same_codes(x, blocksize)
    assert indices.shape == x.shape
    assert torch.equal(absmax, state.absmax)
    assert torch.equal(nf4.dequantize(indices, absmax, blocksize, dtype), dequantize_4bit(packed, state))


@pytest.mark.parametrize("blocksize", [2048, 4096])
def test_the_largest_blocks_have_bitsandbytes_codes(blocksize):
    # Codes only: bitsandbytes compiles its way back for these, which needs a C++ compiler.
    _, absmax, _, state = assert_same_codes(normal(100_000, blocksize), blocksize)
    assert torch.equal(absmax, state.absmax)


@pytest.mark.parametrize("scale", [1.0, 0.3, 7e-5, 1e30])
def test_ties_go_to_the_lower_level_as_in_bitsandbytes(scale):
    midpoints = (nf4.LEVELS[:-1] + nf4.LEVELS[1:]) / 2
    edges = torch.cat([midpoints, midpoints.nextafter(torch.tensor(2.0)), midpoints.nextafter(torch.tensor(-2.0))])
    block = torch.cat([torch.tensor([1.0]), edges, torch.zeros(64 - 1 - len(edges))])
    indices, *_ = assert_same_codes(block.repeat(50) * scale, 64)
    if scale == 1:
        assert indices[1:16].tolist() == list(range(15))  # exactly half-way: the lower one
        assert indices[16:31].tolist() == list(range(1, 16))  # the next number up: the upper one


@pytest.mark.parametrize("count", [1, 2, 63, 64, 65, 101, 127, 128, 1000, 64 * 4096 + 3, 2 * 64 * 4096 + 32])
def test_short_last_blocks_and_odd_counts_equal_bitsandbytes(count):
    for seed in range(20 if count < 2000 else 2):
        _, absmax, _, state = assert_same_codes(normal(count, seed), 64)
        assert torch.equal(absmax, state.absmax)
        assert len(absmax) == math.ceil(count / 64)


def test_the_short_last_block_divides_where_whole_blocks_multiply():
    # For these two numbers x * (1 / m) and x / m round to different sides of the midpoint between codes 0 and 1.
    found = 0
    midpoint = (nf4.LEVELS[14] + nf4.LEVELS[15]) / 2
    for m in torch.rand(2000, generator=torch.Generator().manual_seed(0)) + 0.5:
        x = m * midpoint
        x = torch.stack([x, x.nextafter(torch.tensor(0.0)), x.nextafter(torch.tensor(9.0))])
        found += int(((x * (1 / m) > midpoint) != (x / m > midpoint)).any())
        assert_same_codes(torch.cat([m[None], x]), 64)
        assert_same_codes(torch.cat([m[None], x, torch.zeros(60)]), 64)
    assert found > 0  # the case in question did come up


@pytest.mark.parametrize("count", [64, 100, 129])
def test_all_zero_blocks(count):
    x = torch.zeros(count)
    indices, absmax, *_ = assert_same_codes(x, 64)
    assert indices.eq(7).all()
    assert absmax.eq(0).all()
    assert torch.equal(nf4.dequantize(indices, absmax), x)
    x[-1] = -3.0  # the last block alone is not zero
    indices, absmax, *_ = assert_same_codes(x, 64)
    assert indices[-1] == 0
    assert absmax[-1] == 3


def test_tiny_and_huge_values_equal_bitsandbytes():
    for scale in (1e-45, 1e-40, 1e-38, 1e-30, 3e38 / 5):
        x = normal(640, 3).clamp(-4, 4) * scale
        _, absmax, _, state = assert_same_codes(x, 64)
        assert torch.equal(absmax, state.absmax)


def test_each_value_gets_its_nearest_level():
    x = normal(6400, 0)
    indices, absmax = nf4.quantize(x)
    scaled = (x.view(-1, 64) / absmax[:, None]).double()
    distance = (scaled[..., None] - nf4.LEVELS.double()).abs()
    chosen = distance.gather(-1, indices.view(-1, 64, 1).long()).squeeze(-1)
    # Two levels may be equally near within the rounding of the division, 6e-8.
    assert bool((chosen <= distance.min(-1).values + 1.2e-7).all())
    error = (nf4.dequantize(indices, absmax) - x).abs().view(-1, 64)
    widest = nf4.LEVELS.diff().max() / 2
    assert bool((error <= absmax[:, None] * (widest + 1e-6)).all())


def test_the_shape_stays_and_the_input_too():
    x = normal(2 * 3 * 40, 0).view(2, 3, 40).transpose(0, 2)  # not contiguous
    before = x.clone()
    indices, absmax = nf4.quantize(x, 16)
    assert indices.shape == x.shape
    assert (indices.dtype, absmax.dtype, absmax.shape) == (torch.uint8, torch.float32, (15,))
    flat, flat_absmax = nf4.quantize(x.flatten(), 16)
    assert torch.equal(flat, indices.flatten())
    assert torch.equal(flat_absmax, absmax)
    assert torch.equal(x, before)
    again = nf4.quantize(nf4.dequantize(indices, absmax, 16), 16)
    assert torch.equal(again[0], indices)  # what has been rounded once stays where it is


@pytest.mark.parametrize("count", [1, 2, 7, 64])
def test_pack_puts_the_even_element_in_the_high_half(count):
    indices = torch.randint(0, 16, (count,), dtype=torch.uint8, generator=torch.Generator().manual_seed(count))
    packed = nf4.pack(indices)
    padded = [*indices.tolist(), 7]
    assert packed.tolist() == [16 * padded[k] + padded[k + 1] for k in range(0, count, 2)]
    assert torch.equal(nf4.unpack(packed, (count,)), indices)
    assert nf4.unpack(packed).numel() == 2 * len(packed)
    assert nf4.unpack(packed, (1, count)).shape == (1, count)


def test_double_quantization_is_nearer_than_bitsandbytes_table_and_mostly_equal():
    from bitsandbytes.functional import quantize_4bit

    x = normal(20_000 * 64, 0) * 0.02
    _, absmax = nf4.quantize(x)
    codes, scales, offset = nf4.double_quantize(absmax)
    state = quantize_4bit(x, blocksize=64, quant_type="nf4", compress_statistics=True)[1]
    assert torch.equal(scales, state.state2.absmax)
    assert torch.equal(offset, state.offset)
    # Its CPU kernel rounds through a table of 65,536 entries: about 2 in 1000 codes are the second nearest.
    assert (codes != state.absmax).float().mean() < 0.004
    assert (codes.int() - state.absmax.int()).abs().max() <= 1
    ours, theirs = (nf4.double_dequantize(c, scales, offset) for c in (codes, state.absmax))
    # 6e-8 is one rounding of an absmax below 0.5: where the two are equally near, either may win.
    assert bool(((ours - absmax).abs() <= (theirs - absmax).abs() + 6e-8).all())


def test_double_quantization_with_another_table_is_the_same_but_for_the_table():
    absmax = normal(300, 3).abs() + 1
    levels = nf4.LEVELS
    codes, scales, offset = nf4.double_quantize_with(absmax, levels, 32)
    indices, absmax_of_rest = nf4.quantize_with(levels, absmax - absmax.mean(), 32)
    assert offset == absmax.mean()
    assert torch.equal(codes, indices)
    assert torch.equal(scales, absmax_of_rest)
    ours = nf4.double_quantize_with(absmax, nf4.DYNAMIC_LEVELS, 256)
    assert all(torch.equal(a, b) for a, b in zip(ours, nf4.double_quantize(absmax), strict=True))


@pytest.mark.parametrize("count", [1, 255, 256, 257, 1000])
def test_double_dequantize_comes_back_within_half_a_step(count):
    absmax = normal(count, count).abs() + 0.1
    codes, scales, offset = nf4.double_quantize(absmax)
    assert (codes.dtype, len(codes), len(scales), offset.shape) == (torch.uint8, count, math.ceil(count / 256), ())
    error = (nf4.double_dequantize(codes, scales, offset) - absmax).abs()
    widest = nf4.DYNAMIC_LEVELS.diff().max() / 2
    assert bool((error <= scales.repeat_interleave(256)[:count] * widest + 1e-6).all())


def test_bits_per_parameter_are_the_papers():
    assert nf4.bits_per_parameter() == 4.5
    assert nf4.bits_per_parameter(double=True) == pytest.approx(4.127, abs=5e-4)  # QLoRA: 0.5 -> 0.127 bits
    x = normal(64 * 256, 0)
    indices, absmax = nf4.quantize(x)
    codes, scales, _ = nf4.double_quantize(absmax)
    stored = nf4.pack(indices).nbytes + codes.nbytes + scales.nbytes
    assert 8 * stored / x.numel() == nf4.bits_per_parameter(double=True)


GOOD = (torch.zeros(65, dtype=torch.uint8), torch.ones(2))


@pytest.mark.parametrize(
    ("call", "error", "words"),
    [
        (lambda: nf4.quantize([1.0]), TypeError, "x must be a torch.Tensor"),
        (lambda: nf4.quantize(torch.ones(3, dtype=torch.int8)), TypeError, "x must have a floating-point dtype"),
        (lambda: nf4.quantize(torch.ones(3, dtype=torch.float64)), TypeError, "x must be float16, bfloat16 or float32"),
        (lambda: nf4.quantize(torch.ones(0)), ValueError, "x must not be empty"),
        (lambda: nf4.quantize(torch.tensor([1.0, math.nan])), ValueError, "x must be finite"),
        (lambda: nf4.quantize(torch.tensor([1.0, math.inf])), ValueError, "x must be finite"),
        (lambda: nf4.quantize(torch.ones(3), 0), ValueError, "blocksize must be at least 1"),
        (lambda: nf4.quantize(torch.ones(3), 64.0), TypeError, "blocksize must be an int"),
        (lambda: nf4.dequantize(GOOD[0].int(), GOOD[1]), TypeError, "indices must have dtype torch.uint8"),
        (lambda: nf4.dequantize(GOOD[0] + 16, GOOD[1]), ValueError, r"indices must be in 0\.\.15, got 16"),
        (lambda: nf4.dequantize(GOOD[0], torch.ones(3)), ValueError, "absmax must hold 2 for 65 values"),
        (lambda: nf4.dequantize(GOOD[0], torch.ones(2, 1)), ValueError, "absmax must have 1 dimension"),
        (lambda: nf4.dequantize(GOOD[0], GOOD[1] * math.nan), ValueError, "absmax must be finite"),
        (lambda: nf4.dequantize(*GOOD, dtype=torch.int8), TypeError, "dtype must be a floating-point"),
        (lambda: nf4.dequantize(*GOOD, blocksize=-1), ValueError, "blocksize must be at least 1"),
        (lambda: nf4.pack(GOOD[1]), TypeError, "indices must have dtype torch.uint8"),
        (lambda: nf4.pack(GOOD[0] + 200), ValueError, r"indices must be in 0\.\.15, got 200"),
        (lambda: nf4.unpack(GOOD[1]), TypeError, "packed must have dtype torch.uint8"),
        (lambda: nf4.unpack(GOOD[0], (128,)), ValueError, "shape must have 129 or 130 elements"),
        (lambda: nf4.double_quantize(torch.ones(2, 2)), ValueError, "absmax must have 1 dimension"),
        (lambda: nf4.double_quantize(torch.tensor([math.nan])), ValueError, "absmax must be finite"),
        (lambda: nf4.double_dequantize(*GOOD, torch.tensor(0.0)), ValueError, "scales must hold 1 for 65 values"),
        (lambda: nf4.double_dequantize(GOOD[0], GOOD[1][:1], 0.0), TypeError, "offset must be a torch.Tensor"),
        (lambda: nf4.quantize_with(torch.ones(1), GOOD[1]), ValueError, "levels must be 2 to 256, got 1"),
        (lambda: nf4.quantize_with(torch.ones(2), GOOD[1]), ValueError, "levels must ascend"),
        (lambda: nf4.quantize_with(torch.arange(4.0), GOOD[1]), ValueError, r"lie in \[-1, 1\]"),
        (lambda: nf4.quantize_with([0, 1], GOOD[1]), TypeError, "levels must be a torch.Tensor"),
        (lambda: nf4.dequantize_with(torch.arange(2.0), GOOD[0] + 2, GOOD[1]), ValueError, r"must be in 0\.\.1, got 2"),
        (lambda: nf4.double_quantize_with(GOOD[1], torch.ones(2), 8), ValueError, "levels must ascend"),
        (lambda: nf4.bits_per_parameter(0), ValueError, "blocksize must be at least 1"),
    ],
)
def test_bad_arguments_are_named(call, error, words):
    with pytest.raises(error, match=words):
        call()
