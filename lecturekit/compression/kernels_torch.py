"""The work of lecturekit.compression.kernels in plain PyTorch: the twin of each kernel, and what a CPU runs.

Nothing large is ever unpacked: each function walks over its weights in pieces that stay in the processor's cache, turns
a piece into numbers by looking its bytes up in a table (eight signs, or two NF4 levels, a byte), and uses it at once.

What was tried for the 1-bit product of one vector with 4096 x 4096 signs, on one thread, against W x in float32:
unpacking everything takes 13 times as long, pieces by table 1.8 times, and `sign_sums` compiled 0.4 times; all hold
one bit a weight. A matrix of -1 and 1 in bfloat16 takes 0.9 times and in int8 0.24 times, but holds 16 and 8 bits, and
int8 rounds x too. benchmarks/kernels.py measures those that are kept.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lecturekit.arguments import is_finite
from lecturekit.compression import nf4

PIECE = 1 << 17  # weights unpacked at a time on a CPU: 512 kB of float32
FEW_ROWS = 8  # up to here sign_sums, which takes each row by itself, beats a piece of matrix used for all rows

_BYTES = torch.arange(256)
# byte -> its eight signs, lowest bit first, as bitdelta.pack has them: float32 (256, 8)
SIGNS = ((_BYTES[:, None] >> torch.arange(8)) & 1).mul(2).sub(1).float()
# byte -> the levels of its high and its low half, as nf4.pack has them: two float32 moved as one int64 (256,)
LEVEL_PAIRS = nf4.LEVELS[torch.stack([_BYTES >> 4, _BYTES & 15], dim=1)].view(torch.int64).view(-1)

MIDPOINTS = (nf4.LEVELS[:-1] + nf4.LEVELS[1:]) / 2
MIDPOINT_NUMBERS = MIDPOINTS.tolist()  # for the compiler, which takes numbers but no tensors from outside
# [-1, 1] is cut into 32 buckets, so narrow that none holds two midpoints. Which bucket a value lies in tells its code
# but for one comparison with the midpoint in there, if there is one.
BUCKETS = 16  # for each unit; a power of two, so that the multiplication is exact
_bucket = (MIDPOINTS * BUCKETS + BUCKETS).int()
CODE_BELOW = (_bucket < torch.arange(2 * BUCKETS + 1)[:, None]).sum(1).to(torch.uint8)  # midpoints in lower buckets
THRESHOLD = torch.full((2 * BUCKETS + 1,), math.inf).index_put((_bucket,), MIDPOINTS * BUCKETS)


def _piece(device: torch.device) -> int:
    """How many weights to unpack at a time. On a GPU launches cost more than caches save: 100 MB of buffers."""
    return PIECE if device.type == "cpu" else 128 * PIECE


def _large_empty(count: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """torch.empty; on a CPU from NumPy, which asks Linux for pages of 2 MB.

    Filling 64 MB of torch's own pages of 4 kB takes more than twice as long, nearly all of it in page faults.
    """
    if device.type != "cpu":
        return torch.empty(count, dtype=dtype, device=device)
    return torch.from_numpy(np.empty(count * dtype.itemsize, np.uint8)).view(dtype)


class _TableReader:
    """Looks bytes up in a table, always into the same memory: fresh pages for each piece would double its time."""

    def __init__(self, table: Tensor, count: int, device: torch.device) -> None:
        self.table = table.to(device)
        self.indices = torch.empty(count, dtype=torch.int32, device=device)
        self.found = torch.empty(count, *table.shape[1:], dtype=table.dtype, device=device)

    def __call__(self, held: Tensor) -> Tensor:
        """held: uint8 (n,), n at most count -> the table's rows (n, ...), overwritten by the next call."""
        indices = self.indices[: len(held)].copy_(held)
        return torch.index_select(self.table, 0, indices, out=self.found[: len(held)])


def sign_products(x: Tensor, packed: Tensor, index: Tensor, out: int, compiled: bool) -> Tensor:
    """sign(Delta_d) x_i with d = index[i]. x: float32 (n, in), packed: (models, bytes), index: (n,) -> (n, out)."""
    count, in_features = x.shape
    deltas = index.unique().tolist() if len(packed) > 1 else [0]
    if compiled and in_features % 8 == 0 and count <= FEW_ROWS * len(deltas):
        planes = x.view(count, -1, 8).transpose(1, 2).contiguous()  # all that meets bit 0, all that meets bit 1, …
        if len(deltas) == 1:
            sums = _run_compiled(sign_sums, packed[deltas[0]].view(1, out, -1), planes)
        else:
            sums = _run_compiled(sign_sums_by_index, packed.view(len(packed), out, -1), index, planes)
        return 2 * sums - x.sum(1, keepdim=True)
    y = x.new_empty(count, out)
    step = max(8, _piece(x.device) // in_features // 8 * 8)  # 8 rows fill whole bytes, whatever in_features is
    look_up = _TableReader(SIGNS, step * in_features // 8, x.device)
    for delta in deltas:
        rows = (index == delta).nonzero().view(-1)
        values, found = x[rows], x.new_empty(len(rows), out)
        for first in range(0, out, step):
            last = min(first + step, out)
            signs = look_up(packed[delta, first * in_features // 8 : math.ceil(last * in_features / 8)])
            signs = signs.view(-1)[: (last - first) * in_features].view(-1, in_features)
            found[:, first:last] = values @ signs.T
        y[rows] = found
    return y


def sign_sums(packed: Tensor, planes: Tensor) -> Tensor:
    """The sum of x over the set bits of each row; sign(Delta) x is twice that less the sum of all x.

    packed: (n, out, in / 8), or (1, out, in / 8) for all. planes: (n, 8, in / 8), where planes[:, j, k] is
    x[:, 8 k + j] -> (n, out). Made to be compiled: one pass over the bytes, each shifted through its eight bits in a
    register.
    """
    held = packed.to(torch.int32)
    sums = torch.zeros((), device=packed.device)
    for bit in range(8):
        sums = sums + ((held >> bit) & 1).float() * planes[:, bit, None, :]
    return sums.sum(-1)


def sign_sums_by_index(packed: Tensor, index: Tensor, planes: Tensor) -> Tensor:
    """sign_sums with packed[index], (models, out, in / 8): compiled, the bytes are read where they lie."""
    return sign_sums(packed[index], planes)


def delta_product(x: Tensor, weight: Tensor, packed: Tensor, scales: Tensor, index: Tensor, compiled: bool) -> Tensor:
    """W x for all rows at once, then what each row's delta adds. Shapes as in kernels.delta_product.

    W x is rounded to x's dtype as nn.Linear rounds it, the delta's part is float32, their sum is rounded again.
    """
    base = torch.nn.functional.linear(x, weight)
    change = sign_products(x.float(), packed, index, len(weight), compiled)
    return change.mul_(scales.float()[index, None]).add_(base).to(x.dtype)


def nf4_product(x: Tensor, packed: Tensor, absmax: Tensor, out: int, blocksize: int) -> Tensor:
    """x Wᵀ, W unpacked a few rows at a time. x: (n, in), packed: flat, absmax: (blocks,) -> (n, out) in x's dtype.

    The levels times the scales are rounded to x's dtype first, as dequantizing everything would do.
    """
    in_features = x.shape[1]
    y = x.new_empty(x.shape[0], out)
    whole = blocksize // math.gcd(in_features, blocksize)  # so many rows begin on a block
    step = min(out, max(1, _piece(x.device) // in_features // whole) * whole)
    look_up = _TableReader(LEVEL_PAIRS, math.ceil(step * in_features / 2), x.device)
    weights = x.new_empty(step * in_features)
    for first in range(0, out, step):
        last = min(first + step, out)
        some = weights[: (last - first) * in_features]
        _dequantize_into(some, packed, absmax, first * in_features, blocksize, look_up)
        y[:, first:last] = x @ some.view(-1, in_features).T
    return y


def nf4_dequantize(packed: Tensor, absmax: Tensor, count: int, blocksize: int, dtype: torch.dtype) -> Tensor:
    """nf4.dequantize(nf4.unpack(packed)) in one pass, bit for bit. packed: flat bytes -> (count,) in dtype."""
    values = _large_empty(count, dtype, packed.device)
    step = max(1, _piece(packed.device) // blocksize) * blocksize
    look_up = _TableReader(LEVEL_PAIRS, math.ceil(min(step, count) / 2), packed.device)
    for first in range(0, count, step):
        _dequantize_into(values[first : first + step], packed, absmax, first, blocksize, look_up)
    return values


def _dequantize_into(
    values: Tensor, packed: Tensor, absmax: Tensor, first: int, blocksize: int, look_up: _TableReader
) -> None:
    """Fill values, flat, with the weights from number first on, which begins a block. A byte brings two of them."""
    last = first + len(values)
    levels = look_up(packed[first // 2 : math.ceil(last / 2)]).view(torch.float32)[: len(values)]
    scales = absmax[first // blocksize : math.ceil(last / blocksize), None]
    if len(values) % blocksize:  # the last block is short
        torch.mul(levels, scales.expand(-1, blocksize).reshape(-1)[: len(values)], out=values)
    else:
        torch.mul(levels.view(-1, blocksize), scales, out=values.view(-1, blocksize))


def nf4_quantize(x: Tensor, blocksize: int, compiled: bool) -> tuple[Tensor, Tensor]:
    """nf4.pack(nf4.quantize(x)) in one pass, bit for bit. x: flat -> bytes (ceil(n / 2),), absmax (blocks,)."""
    count = x.numel()
    packed = torch.empty(math.ceil(count / 2), dtype=torch.uint8, device=x.device)
    absmax = torch.empty(math.ceil(count / blocksize), device=x.device)
    piece = 8 * PIECE if compiled else _piece(x.device) // 2  # a compiled function takes longer to call
    step = max(1, piece // blocksize) * blocksize
    whole = count // blocksize * blocksize
    for first in range(0, whole, step):
        last = min(first + step, whole)
        values = x[first:last].float().view(-1, blocksize)
        codes, scales = _run_compiled(codes_by_comparing, values) if compiled else codes_by_bucket(values)
        _require_finite(scales)
        absmax[first // blocksize : last // blocksize] = scales
        both = codes.view(-1).view(torch.int16)  # the even element is the low byte (little-endian), and goes high
        packed[first // 2 : last // 2] = (both << 4).bitwise_or_(both >> 8)
    if whole < count:
        codes, absmax[-1:] = nf4.quantize(x[whole:], blocksize)
        packed[whole // 2 :] = nf4.pack(codes)
    return packed, absmax


def codes_by_bucket(values: Tensor) -> tuple[Tensor, Tensor]:
    """The nearest level's index by two look-ups and one comparison. values: float32 (blocks, blocksize).

    Returns codes, uint8 in values' shape, and absmax (blocks,). The bucket grows with the value, so a midpoint in a
    lower bucket is smaller, one in a higher bucket is larger, and the one in the same bucket is compared.
    """
    absmax = values.abs().amax(dim=1)
    _require_finite(absmax)  # NaN has no bucket
    scaled = (values * (1 / absmax.clamp(min=nf4.SMALLEST_SCALE))[:, None]).mul_(BUCKETS).view(-1)
    bucket = (scaled + BUCKETS).int()
    codes = CODE_BELOW.to(values.device).index_select(0, bucket)
    codes += scaled > THRESHOLD.to(values.device).index_select(0, bucket)
    return codes, absmax


def codes_by_comparing(values: Tensor) -> tuple[Tensor, Tensor]:
    """The same by 15 comparisons: made to be compiled, where they all happen in registers."""
    absmax = values.abs().amax(dim=1)
    scaled = values * (1 / absmax.clamp(min=nf4.SMALLEST_SCALE))[:, None]
    count = torch.zeros_like(scaled)
    for midpoint in MIDPOINT_NUMBERS:
        count = count + (scaled > midpoint).float()
    return count.to(torch.uint8), absmax


def _require_finite(absmax: Tensor) -> None:
    """A block's largest magnitude is finite only if all of the block is, and there are far fewer of them to check."""
    if not is_finite(absmax):
        raise ValueError("x must be finite, got NaN or infinity in it")


def _run_compiled(function: Callable[..., Any], *arguments: Tensor) -> Any:
    """function(*arguments), compiled by torch at its first call, which takes seconds."""
    try:
        return _compiled(function)(*arguments)
    except Exception as error:  # no compiler, no folder to write to, …: what torch raises has no common type
        raise RuntimeError(
            f'backend "compiled" needs a C++ compiler that torch.compile can use, and it failed here: {error}; '
            'leave backend out, or name "torch", to do without'
        ) from error


@functools.cache
def _compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    options: dict[str, Any] = {
        "assert_indirect_indexing": False,  # kernels.py has looked at the index
        "cpp.dynamic_threads": True,  # else the number of threads at the first call is there for good
        "realize_opcount_threshold": 500,  # else the 15 comparisons are cut in two, with a result in memory between
    }
    return torch.compile(function, dynamic=True, options=options)
