"""NF4, the 4-bit NormalFloat of QLoRA: 16 levels where a normal distribution has its quantiles, one scale a block.

Dettmers et al., "QLoRA: Efficient Finetuning of Quantized LLMs", NeurIPS 2023, section 3; slides "QLoRA". Codes,
scales and packed bytes are those of bitsandbytes, bit for bit.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from lecturekit.arguments import require_positive_int, require_tensor

LARGEST_TABLE = 256  # levels; an index is one byte
SMALLEST_SCALE = 1e-38  # bitsandbytes divides by no less, so that an all-zero block gives the code of zero
CHUNK = 1 << 18  # elements worked on at a time, so that no temporary tensor grows with the input


def normal_float_levels() -> Tensor:
    """Derive the 16 NF4 levels: float32, ascending, from -1 to 1, with an exact 0.

    Evenly spaced probabilities are put through the normal quantile function, once for each side so that 0 is a level:
    8 levels above zero, 7 below. The outermost probability is 1 - (1/32 + 1/30) / 2 = 0.9677083, half-way between
    what 16 and 15 levels would take; 1 itself lies at infinity. Division by the largest quantile brings all to
    [-1, 1]. QLoRA, section 3 and appendix E.
    """

    def quantiles(count: int) -> Tensor:
        # The published table was computed from float32 probabilities; others would move the last digit.
        probabilities = torch.linspace(0.9677083, 0.5, count + 1)[:-1]
        return torch.special.ndtri(probabilities.double()).float()

    levels = torch.cat([-quantiles(7), torch.zeros(1), quantiles(8).flip(0)])
    return levels / levels.max()


def dynamic_levels() -> Tensor:
    """The 256 signed levels of the 8-bit dynamic type, used for the scales of scales: float32, ascending.

    Seven decades from 1e-6 to 1; decade i is cut into 2^i equal parts and a level put in the middle of each, with
    either sign; 0 and 1 make it 256. Dettmers et al., "8-bit Optimizers via Block-wise Quantization", ICLR 2022.
    """
    levels = [0.0, 1.0]
    for i in range(7):
        edges = torch.linspace(0.1, 1, 2**i + 1)
        middles = (10.0 ** (i - 6) * (edges[:-1] + edges[1:]) / 2).tolist()
        levels += middles + [-middle for middle in middles]
    return torch.tensor(sorted(levels))


def int4_levels() -> Tensor:
    """The 15 levels of symmetric 4-bit integers, -7 to 7, brought to [-1, 1]: float32, ascending, index 7 is 0.

    The sixteenth code, -8, is left out, as in bitsandbytes' table: with it the two ends would not be alike.
    """
    return torch.arange(-7, 8) / 7


def e2m1_levels() -> Tensor:
    """The 15 levels of the 4-bit floating-point number E2M1, brought to [-1, 1]: float32, ascending, index 7 is 0.

    A sign, two bits of exponent, one of mantissa: 0, 0.5, 1, 1.5, 2, 3, 4, 6 with either sign; zero counts once. OCP
    Microscaling Formats specification, 2023.
    """
    return _both_signs([0.5, 1, 1.5, 2, 3, 4, 6])


def fp4_levels() -> Tensor:
    """The 15 levels of bitsandbytes' FP4, brought to [-1, 1]: float32, ascending, index 7 is 0.

    E2M1 but for its smallest number, which is 1/192 of the largest here and 1/12 there.
    """
    return _both_signs([0.0625, 2, 3, 4, 6, 8, 12])


def _both_signs(positive: Sequence[float]) -> Tensor:
    half = torch.tensor(positive, dtype=torch.float32)
    return torch.cat([-half.flip(0), torch.zeros(1), half]) / half[-1]


LEVELS = normal_float_levels()
DYNAMIC_LEVELS = dynamic_levels()


def quantize(x: Tensor, blocksize: int = 64) -> tuple[Tensor, Tensor]:
    """Round each value to the nearest NF4 level, after dividing its block by the block's largest magnitude.

    x: any shape, float16, bfloat16 or float32 (computed in float32). Blocks are runs of blocksize values of the
    flattened x; the last one may be shorter.
    Returns indices, uint8 in 0..15 of x's shape, and absmax, float32 (number of blocks,). A value half-way between
    two levels takes the lower one; an all-zero block has indices 7 and absmax 0.
    Raises TypeError for a wrong type or dtype, ValueError for NaN, infinity or empty input, or blocksize < 1.
    """
    return quantize_with(LEVELS, x, blocksize)


def dequantize(indices: Tensor, absmax: Tensor, blocksize: int = 64, dtype: torch.dtype = torch.float32) -> Tensor:
    """Look the levels up and scale them back: LEVELS[index] * absmax of the block.

    indices: uint8 in 0..15, any shape. absmax: (number of blocks,). Returns indices' shape, multiplied in float32 and
    rounded once to dtype.
    Raises TypeError for wrong types or dtypes, ValueError for an index above 15, a wrong number of blocks, or NaN.
    """
    return dequantize_with(LEVELS, indices, absmax, blocksize, dtype)


def quantize_with(levels: Tensor, x: Tensor, blocksize: int = 64) -> tuple[Tensor, Tensor]:
    """quantize with another table, to compare it with NF4.

    levels: (2 to 256,) floating point, ascending, in [-1, 1]. x, blocksize, results and errors as for quantize.
    """
    require_tensor("x", x, finite=True)
    if x.dtype not in (torch.float16, torch.bfloat16, torch.float32):
        raise TypeError(f"x must be float16, bfloat16 or float32, got {x.dtype}")
    return _nearest(x, _require_levels(levels), require_positive_int("blocksize", blocksize))


def dequantize_with(
    levels: Tensor, indices: Tensor, absmax: Tensor, blocksize: int = 64, dtype: torch.dtype = torch.float32
) -> Tensor:
    """dequantize with another table: levels[index] * absmax of the block.

    levels: as for quantize_with. indices: uint8 below the number of levels. The rest as for dequantize.
    """
    table = _require_levels(levels)
    _require_indices(indices, len(table))
    return _look_up(indices, absmax, table, require_positive_int("blocksize", blocksize), dtype)


def pack(indices: Tensor) -> Tensor:
    """Put two 4-bit indices in a byte: the even element in the high half, the odd one in the low half.

    indices: uint8 in 0..15, any shape, n elements -> uint8 (ceil(n / 2),). An odd count is filled up with the
    index 7, the level 0, as in bitsandbytes. Raises TypeError or ValueError naming indices.
    """
    _require_indices(indices)
    flat = indices.reshape(-1)
    if flat.numel() % 2:
        flat = torch.cat([flat, flat.new_tensor([7])])
    return (flat[::2] << 4) | flat[1::2]


def unpack(packed: Tensor, shape: Sequence[int] | None = None) -> Tensor:
    """Undo pack: uint8 bytes -> uint8 indices of the given shape, or flat, two a byte, when no shape is given.

    Raises TypeError for a wrong dtype, ValueError when the shape does not belong to this many bytes.
    """
    flat = require_tensor("packed", packed, dtype=torch.uint8).reshape(-1)
    indices = torch.stack([flat >> 4, flat & 15], dim=1).reshape(-1)
    if shape is None:
        return indices
    count = math.prod(shape)
    if (count + 1) // 2 != flat.numel():
        raise ValueError(f"shape must have {2 * flat.numel() - 1} or {2 * flat.numel()} elements, got {tuple(shape)}")
    return indices[:count].reshape(tuple(shape))


def double_quantize(absmax: Tensor, blocksize: int = 256) -> tuple[Tensor, Tensor, Tensor]:
    """Quantize the scales too: subtract their mean, then 8-bit dynamic levels with one float32 scale a block of 256.

    absmax: (number of blocks,) floating point. Returns codes, uint8 (number of blocks,); scales, float32
    (ceil(number of blocks / blocksize),); offset, the mean, float32 (). QLoRA, section 3, "Double Quantization".
    Each code is the nearest level; bitsandbytes on a CPU looks it up in a coarser table and misses some by one.
    Raises TypeError or ValueError naming absmax or blocksize.
    """
    return double_quantize_with(absmax, DYNAMIC_LEVELS, blocksize)


def double_quantize_with(absmax: Tensor, levels: Tensor, blocksize: int) -> tuple[Tensor, Tensor, Tensor]:
    """double_quantize with any table. levels: as for quantize_with; all else as for double_quantize."""
    require_tensor("absmax", absmax, ndim=1, finite=True)
    require_positive_int("blocksize", blocksize)
    offset = absmax.float().mean()
    codes, scales = _nearest(absmax.float() - offset, _require_levels(levels), blocksize)
    return codes, scales, offset


def double_dequantize(codes: Tensor, scales: Tensor, offset: Tensor, blocksize: int = 256) -> Tensor:
    """Undo double_quantize: absmax = DYNAMIC_LEVELS[code] * scale of the block + offset, float32.

    Raises TypeError or ValueError naming codes, scales, offset or blocksize.
    """
    require_tensor("codes", codes, ndim=1, dtype=torch.uint8)
    require_tensor("offset", offset, ndim=0, finite=True)
    require_positive_int("blocksize", blocksize)
    return _look_up(codes, scales, DYNAMIC_LEVELS, blocksize, torch.float32, scales_name="scales") + offset


def bits_per_parameter(blocksize: int = 64, double: bool = False, double_blocksize: int = 256) -> float:
    """Storage in bits: 4 and a share of the scales. 4.5 at blocksize 64; 4.127 with double quantization.

    A plain scale is 32 bits a block. A doubly quantized one is 8 bits a block and 32 bits for each double_blocksize
    blocks; the one offset of a whole tensor is not counted. Raises TypeError or ValueError naming the argument.
    """
    require_positive_int("blocksize", blocksize)
    require_positive_int("double_blocksize", double_blocksize)
    scale_bits = 8 + 32 / double_blocksize if double else 32
    return 4 + scale_bits / blocksize


def _nearest(x: Tensor, levels: Tensor, blocksize: int) -> tuple[Tensor, Tensor]:
    flat = x.detach().reshape(-1)
    levels = levels.to(x.device)
    midpoints = (levels[:-1] + levels[1:]) / 2
    indices = torch.empty(flat.numel(), dtype=torch.uint8, device=x.device)
    absmax = torch.empty(math.ceil(flat.numel() / blocksize), device=x.device)
    for elements, blocks, width in _chunks(flat.numel(), blocksize):
        values = flat[elements].float().view(-1, width)
        absmax[blocks] = values.abs().amax(dim=1)
        scale = absmax[blocks].clamp(min=SMALLEST_SCALE)[:, None]
        # bitsandbytes multiplies whole blocks by the reciprocal and divides a short last one: the last bit can differ.
        values = values * (1 / scale) if width == blocksize else values / scale
        indices[elements] = _count_below(values.clamp_(-1, 1).view(-1), midpoints)
    return indices.view(x.shape), absmax


def _count_below(values: Tensor, midpoints: Tensor) -> Tensor:
    """How many midpoints lie below each value, which is the index of the nearest level."""
    if len(midpoints) > 15:
        return torch.bucketize(values, midpoints).to(torch.uint8)
    count = torch.zeros_like(values, dtype=torch.uint8)
    for midpoint in midpoints:  # 15 comparisons over a chunk in cache are faster than a search for each value
        count += values > midpoint
    return count


def _look_up(
    indices: Tensor, absmax: Tensor, levels: Tensor, blocksize: int, dtype: torch.dtype, scales_name: str = "absmax"
) -> Tensor:
    require_tensor(scales_name, absmax, ndim=1, finite=True)
    if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
        raise TypeError(f"dtype must be a floating-point torch.dtype, got {dtype}")
    flat = indices.reshape(-1)
    count = math.ceil(flat.numel() / blocksize)
    if absmax.numel() != count:
        raise ValueError(
            f"{scales_name} must hold {count} for {flat.numel()} values in blocks of {blocksize}, got {absmax.numel()}"
        )
    levels, scales = levels.to(indices.device), absmax.float()
    values = torch.empty(flat.numel(), dtype=dtype, device=indices.device)
    for elements, blocks, width in _chunks(flat.numel(), blocksize):
        found = levels[flat[elements].int()].view(-1, width)
        values[elements] = (found * scales[blocks, None]).view(-1)
    return values.view(indices.shape)


def _chunks(count: int, blocksize: int) -> Iterator[tuple[slice, slice, int]]:
    """Cut count elements into stretches of whole blocks, about CHUNK elements each, and the short last block.

    Yields the slice of elements, the slice of their blocks, and the width of these blocks.
    """
    whole = count // blocksize
    step = max(1, CHUNK // blocksize)
    for first in range(0, whole, step):
        last = min(first + step, whole)
        yield slice(first * blocksize, last * blocksize), slice(first, last), blocksize
    if count % blocksize:
        yield slice(whole * blocksize, count), slice(whole, whole + 1), count % blocksize


def _require_indices(indices: Tensor, levels: int = 16) -> None:
    require_tensor("indices", indices, dtype=torch.uint8)
    largest = int(indices.max())
    if largest >= levels:
        raise ValueError(f"indices must be in 0..{levels - 1}, got {largest}")


def _require_levels(levels: Tensor) -> Tensor:
    """levels in float32, if they are a table that can be searched."""
    table = require_tensor("levels", levels, ndim=1, finite=True).float()
    if not 2 <= len(table) <= LARGEST_TABLE:
        raise ValueError(f"levels must be 2 to {LARGEST_TABLE}, got {len(table)}")
    if not bool((table.diff() > 0).all()) or float(table.abs().max()) > 1:
        raise ValueError("levels must ascend and lie in [-1, 1]: sort them and divide by the largest magnitude")
    return table
