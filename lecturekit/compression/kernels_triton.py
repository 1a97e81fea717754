"""The Triton kernels behind lecturekit.compression.kernels: weights are read packed and unpacked in registers.

For a batch of a few rows a linear layer takes as long as reading its weights takes; the arithmetic hides behind it. So
a kernel that reads 1 or 4 bits a weight instead of 16 gains what it leaves unread, as long as the unpacked weights
never go back to memory. One plan serves the products with a vector:

- A program computes BLOCK_OUT outputs of one batch row. It walks along its rows of W eight weights at a time, which
  are one byte of signs or one 32-bit word of NF4 codes; neighbouring threads read neighbouring bytes or words.
- The batch is the fastest index of the grid, so that programs that read the same weights start together, and all but
  the first find them in the L2 cache.
- Weights are packed as one flat stream: row r begins at element r * in_features, perhaps in the middle of a byte or
  word. Where 8 divides in_features no row does, and the compiler is told so (ALIGNED).
- Sums are float32, one for each place of the tile; the threads add theirs together once, at the end.

Launch parameters are tried out on the GPU (autotune), once for each shape. What they balance: a tile of many outputs
reads x fewer times, a small one makes more programs, and memory is busy only while enough loads are under way. For
3 TB/s at 700 ns of latency that is 2 MB, or 16 kB on each of 132 multiprocessors. 4096 outputs in blocks of 4 make 1024
programs, about eight on each multiprocessor, each with 4 * 1024 bfloat16 weights, 8 kB, on their way.

Compiled for an H100 (triton 3.7.1, sm_90), the inner loops come to 8 to 9 instructions a weight for W and its delta, 5
to 6 for the delta alone, 8.5 to 10 for NF4 with a vector and 10 to 14 with a matrix. That GPU starts 528 of them a
clock for 32 threads each. To read bfloat16 weights takes longer than that, to read 4-bit ones does not: there the
look-ups will show.

Left out: splitting one row of W over several programs, which needs atomic additions in an order that changes from run
to run; tensor cores for the 1-bit product, where every batch row has its own matrix.

Not measured on a GPU yet: the configurations are reasoned, not chosen by time.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from lecturekit.compression.nf4 import LEVELS

INTERPRETED = bool(triton.knobs.runtime.interpret)  # TRITON_INTERPRET=1: run as NumPy on the CPU, to test and to debug

VECTOR_ROWS = 2  # with more, unpacking once for each row costs more than idle tensor cores; a guess, to be measured


def _configurations(inner: str, *rows: tuple[int, ...]) -> list[triton.Config]:
    """(outputs, bytes or words, warps, stages): what autotune tries. Pipelining (stages) is for tensor cores only."""
    return [triton.Config({"BLOCK_OUT": o, inner: i}, num_warps=w, num_stages=s) for o, i, w, s in rows]


@triton.autotune(
    _configurations("BLOCK_BYTES", (4, 128, 4, 1), (8, 128, 4, 1), (2, 256, 4, 1), (8, 64, 2, 1), (4, 256, 8, 1)),
    key=["out_features", "in_features", "HAS_WEIGHT"],
)
@triton.jit
def delta_kernel(
    x, weight, start, packed, scales, index, y, batch, out_features, in_features, row_bytes, delta_bytes, models,
    HAS_WEIGHT: tl.constexpr, HAS_START: tl.constexpr, ALIGNED: tl.constexpr,
    BLOCK_OUT: tl.constexpr, BLOCK_BYTES: tl.constexpr,
):  # fmt: skip
    """y[i] = start[i] + (W + scale * signs) x[i], with the scale and the signs of delta index[i].

    Pointers, all to contiguous tensors: x (batch, in), weight (out, in), start (batch, out) float32, packed
    (models, delta_bytes) uint8, scales (models,) float32, index (batch,) int32, y (batch, out). row_bytes: the bytes
    that cover a row of W. HAS_WEIGHT, HAS_START: whether W and start are there; else nothing is read for them. An
    index that names no delta gives a row of NaN. Grid: (batch * ceil(out / BLOCK_OUT),).
    """
    row = (tl.program_id(0) % batch).to(tl.int64)
    outputs = tl.program_id(0) // batch * BLOCK_OUT + tl.arange(0, BLOCK_OUT)
    is_output = outputs < out_features
    delta = tl.load(index + row)
    known = (delta >= 0) & (delta < models)
    scale = tl.load(scales + delta, mask=known, other=float("nan"))
    packed += tl.where(known, delta, 0).to(tl.int64) * delta_bytes
    x += row * in_features

    first = outputs.to(tl.int64) * in_features  # where a row of W begins in the flat stream
    bit = tl.arange(0, 8)
    sums = tl.zeros((BLOCK_OUT, BLOCK_BYTES), tl.float32)
    for offset in range(0, row_bytes, BLOCK_BYTES):
        byte = offset + tl.arange(0, BLOCK_BYTES)
        place = (first // 8)[:, None] + byte[None, :]
        held = tl.load(packed + place, mask=is_output[:, None] & (place < delta_bytes), other=0)
        column = byte[None, :, None] * 8 + bit[None, None, :]  # (1, BLOCK_BYTES, 8), the same for all outputs
        if not ALIGNED:
            column -= (first % 8).to(tl.int32)[:, None, None]  # (BLOCK_OUT, BLOCK_BYTES, 8)
        is_column = (column >= 0) & (column < in_features)
        change = tl.where(((held[:, :, None] >> bit[None, None, :]) & 1) != 0, scale, -scale)
        if HAS_WEIGHT:  # the fine-tuned weights exist here, in registers, and nowhere else
            where = weight + first[:, None, None] + column
            change += tl.load(where, mask=is_output[:, None, None] & is_column, other=0.0).to(tl.float32)
        sums += tl.sum(change * tl.load(x + column, mask=is_column, other=0.0).to(tl.float32), axis=2)

    total = tl.sum(sums, axis=1)
    y += row * out_features + outputs
    if HAS_START:
        total += tl.load(start + row * out_features + outputs, mask=is_output, other=0.0)
    tl.store(y, total.to(y.dtype.element_ty), mask=is_output)


@triton.autotune(
    _configurations("BLOCK_WORDS", (4, 64, 2, 1), (8, 64, 4, 1), (16, 32, 2, 1), (16, 64, 4, 1), (8, 128, 8, 1)),
    key=["out_features", "in_features"],
)
@triton.jit
def nf4_vector_kernel(
    x, words, absmax, levels, y, batch, out_features, in_features, row_words, all_words,
    ALIGNED: tl.constexpr, WORDS_A_SCALE: tl.constexpr, BLOCK_OUT: tl.constexpr, BLOCK_WORDS: tl.constexpr,
):  # fmt: skip
    """y[i] = W x[i] with W in NF4, for one batch row and BLOCK_OUT outputs a program.

    Pointers, all to contiguous tensors: x (batch, in), words (all_words,) int32 with eight codes each, absmax
    (blocks,) float32, levels (16,) float32, y (batch, out). row_words: the words that cover a row of W.
    WORDS_A_SCALE: blocksize / 8. Grid: (batch * ceil(out / BLOCK_OUT),).

    The table of levels lies in the L1 cache. The eight codes of a word are taken out one after the other, because a
    tile with a third axis for them would be spread over other threads than the words, and shuffled at every step.
    """
    row = (tl.program_id(0) % batch).to(tl.int64)
    outputs = tl.program_id(0) // batch * BLOCK_OUT + tl.arange(0, BLOCK_OUT)
    is_output = outputs < out_features
    x += row * in_features
    first = outputs.to(tl.int64) * in_features
    sums = tl.zeros((BLOCK_OUT, BLOCK_WORDS), tl.float32)
    for offset in range(0, row_words, BLOCK_WORDS):
        word = offset + tl.arange(0, BLOCK_WORDS)
        place = (first // 8)[:, None] + word[None, :]
        is_word = is_output[:, None] & (word < row_words)[None, :] & (place < all_words)
        held = tl.load(words + place, mask=is_word, other=0)
        scale = tl.load(absmax + place // WORDS_A_SCALE, mask=is_word, other=0.0)
        column = word[None, :] * 8  # (1, BLOCK_WORDS), the same for all outputs
        if not ALIGNED:
            column -= (first % 8).to(tl.int32)[:, None]  # (BLOCK_OUT, BLOCK_WORDS)
        part = tl.zeros((BLOCK_OUT, BLOCK_WORDS), tl.float32)
        for element in tl.static_range(8):
            # The first byte is the lowest of a word (little-endian), and its high half is the even element.
            code = (held >> (element // 2 * 8 + (1 - element % 2) * 4)) & 15
            is_column = (column + element >= 0) & (column + element < in_features)
            values = tl.load(x + column + element, mask=is_column, other=0.0).to(tl.float32)
            part += tl.load(levels + code) * values
        sums += part * scale  # a word lies in one block: one multiplication by the scale for eight weights
    total = tl.sum(sums, axis=1)
    y += row * out_features + outputs
    tl.store(y, total.to(y.dtype.element_ty), mask=is_output)


@triton.autotune(
    _configurations("BLOCK_WORDS", (32, 16, 4, 1), (32, 16, 4, 3), (64, 16, 4, 1), (64, 16, 8, 1), (64, 32, 8, 1)),
    key=["out_features", "in_features", "BLOCK_BATCH"],
)
@triton.jit
def nf4_matrix_kernel(
    x, words, absmax, levels, y, batch, out_features, in_features, row_words,
    DTYPE: tl.constexpr, WORDS_A_SCALE: tl.constexpr, BLOCK_BATCH: tl.constexpr,
    BLOCK_OUT: tl.constexpr, BLOCK_WORDS: tl.constexpr,
):  # fmt: skip
    """The same for BLOCK_BATCH rows a program, on tensor cores: each code is looked up once for all the rows.

    8 must divide in_features. DTYPE: what the tiles are rounded to for the tensor cores; their sums are float32. They
    take at least 16 rows, of which a smaller batch leaves some idle: the weights are what takes the time.
    Grid: (ceil(out / BLOCK_OUT), ceil(batch / BLOCK_BATCH)).
    """
    outputs = tl.program_id(0) * BLOCK_OUT + tl.arange(0, BLOCK_OUT)
    is_output = outputs < out_features
    rows = tl.program_id(1) * BLOCK_BATCH + tl.arange(0, BLOCK_BATCH)
    is_row = rows < batch
    x += rows.to(tl.int64)[None, :] * in_features
    first = outputs.to(tl.int64) * row_words
    element = tl.arange(0, 8)
    shift = element // 2 * 8 + (1 - element % 2) * 4
    sums = tl.zeros((BLOCK_OUT, BLOCK_BATCH), tl.float32)
    for offset in range(0, row_words, BLOCK_WORDS):
        word = offset + tl.arange(0, BLOCK_WORDS)
        place = first[:, None] + word[None, :]
        is_word = is_output[:, None] & (word < row_words)[None, :]
        held = tl.load(words + place, mask=is_word, other=0)
        scale = tl.load(absmax + place // WORDS_A_SCALE, mask=is_word, other=0.0)
        codes = (held[:, :, None] >> shift[None, None, :]) & 15
        weights = tl.load(levels + codes) * scale[:, :, None]
        weights = tl.reshape(weights, (BLOCK_OUT, BLOCK_WORDS * 8)).to(DTYPE)
        column = offset * 8 + tl.arange(0, BLOCK_WORDS * 8)
        is_value = (column < in_features)[:, None] & is_row[None, :]
        values = tl.load(x + column[:, None], mask=is_value, other=0.0).to(DTYPE)  # (BLOCK_WORDS * 8, BLOCK_BATCH)
        sums = tl.dot(weights, values, sums, input_precision="ieee")
    y += rows.to(tl.int64)[None, :] * out_features + outputs[:, None]
    tl.store(y, sums.to(y.dtype.element_ty), mask=is_output[:, None] & is_row[None, :])


def delta_product(
    x: Tensor, weight: Tensor | None, start: Tensor | None, packed: Tensor, scales: Tensor, index: Tensor, out: int
) -> Tensor:
    """Launch delta_kernel. Arguments as there, contiguous and on one device; weight and start may be None."""
    batch, in_features = x.shape
    aligned = in_features % 8 == 0
    y = torch.empty(batch, out, dtype=x.dtype, device=x.device)
    _launch(
        delta_kernel,
        lambda meta: (batch * triton.cdiv(out, meta["BLOCK_OUT"]),),
        {"BLOCK_OUT": 32, "BLOCK_BYTES": 16},
        (x, x if weight is None else weight, y if start is None else start, packed, scales, index, y, batch, out),
        in_features=in_features,
        row_bytes=in_features // 8 if aligned else triton.cdiv(in_features + 7, 8),
        delta_bytes=packed.shape[1],
        models=packed.shape[0],
        HAS_WEIGHT=weight is not None,
        HAS_START=start is not None,
        ALIGNED=aligned,
    )
    return y


def nf4_product(x: Tensor, packed: Tensor, absmax: Tensor, out: int, blocksize: int) -> Tensor:
    """Launch nf4_vector_kernel, or nf4_matrix_kernel for more than VECTOR_ROWS rows.

    x: (batch, in), packed: (ceil(out * in / 2),) uint8, absmax: float32 (blocks,); contiguous, on one device.
    blocksize: a multiple of 8.
    """
    batch, in_features = x.shape
    aligned = in_features % 8 == 0
    y = torch.empty(batch, out, dtype=x.dtype, device=x.device)
    if packed.numel() % 4 or packed.data_ptr() % 4:
        packed = torch.nn.functional.pad(packed, (0, -packed.numel() % 4))  # a copy, for odd shapes only
    words = packed.view(torch.int32)
    operands = (x, words, absmax, _levels(x.device), y, batch, out)
    row_words = in_features // 8 if aligned else triton.cdiv(in_features + 7, 8)
    shape = {"in_features": in_features, "row_words": row_words, "WORDS_A_SCALE": blocksize // 8}
    if batch <= VECTOR_ROWS or not aligned:
        _launch(
            nf4_vector_kernel,
            lambda meta: (batch * triton.cdiv(out, meta["BLOCK_OUT"]),),
            {"BLOCK_OUT": 32, "BLOCK_WORDS": 16},
            operands,
            **shape,
            all_words=words.numel(),
            ALIGNED=aligned,
        )
    else:
        block = max(16, min(64, triton.next_power_of_2(batch)))
        _launch(
            nf4_matrix_kernel,
            lambda meta: (triton.cdiv(out, meta["BLOCK_OUT"]), triton.cdiv(batch, block)),
            {"BLOCK_OUT": 16, "BLOCK_WORDS": 16},
            operands,
            **shape,
            DTYPE=_dot_dtype(x.dtype),
            BLOCK_BATCH=block,
        )
    return y


def _launch(kernel: Any, grid: Any, interpreted: dict[str, int], operands: tuple[Any, ...], **constants: Any) -> None:
    """Run a kernel on its operands' GPU with the tuned blocks; in the interpreter with the given ones."""
    on: AbstractContextManager[Any] = torch.cuda.device(operands[0].device) if operands[0].is_cuda else nullcontext()
    with on:  # Triton launches on the current device, whatever the device of the tensors
        if INTERPRETED:  # choosing blocks by time needs a GPU
            kernel.fn[grid](*operands, **constants, **interpreted)
        else:
            kernel[grid](*operands, **constants)


def _dot_dtype(dtype: torch.dtype) -> tl.dtype:
    """What tiles are rounded to for tensor cores: x's dtype; in the interpreter, wrong with bfloat16, float32."""
    if INTERPRETED:
        return tl.float32
    return {torch.float32: tl.float32, torch.float16: tl.float16, torch.bfloat16: tl.bfloat16}[dtype]


_levels_of: dict[torch.device, Tensor] = {}


def _levels(device: torch.device) -> Tensor:
    """LEVELS on the device, copied there once."""
    if device not in _levels_of:
        _levels_of[device] = LEVELS.to(device)
    return _levels_of[device]
