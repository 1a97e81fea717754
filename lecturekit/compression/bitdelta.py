"""BitDelta: what fine-tuning changed, kept as one sign bit a weight and one scale a matrix.

Liu et al., "BitDelta: Your Fine-Tune May Only Be Worth One Bit", NeurIPS 2024; slides "Bit-Delta". Delta is
W_fine - W_base, and its approximation is scale * Sign(Delta). The slide writes W_ij inside Sign and the sums; the
entries meant are those of Delta.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from lecturekit.arguments import require_number, require_positive_int, require_tensor

PIECE = 1 << 18  # signs packed at a time: what stays in the processor's cache
SCALE_BYTES = 4  # a scale is kept in float32


def compress(base: Tensor, fine: Tensor) -> tuple[Tensor, Tensor]:
    """Reduce a fine-tuned weight to the signs of its change and the mean size of its change.

    base, fine: two weights of one shape, floating point; the difference is taken in float32 at least.
    Returns signs, int8 of +1 and -1 in their shape, and scale, float32 (), the mean of |Delta|, which minimises
    ||Delta - scale * signs||². Sign(0) = -1 as on the slide; the authors' public code takes +1 there.
    Raises TypeError for a wrong type or dtype, ValueError for shapes that differ, NaN, infinity or empty input.
    """
    require_tensor("base", base, finite=True)
    require_tensor("fine", fine, finite=True)
    if fine.shape != base.shape:
        raise ValueError(f"fine must have base's shape {tuple(base.shape)}, got {tuple(fine.shape)}")
    delta = fine.detach().to(_wide(fine.dtype)) - base.detach().to(_wide(base.dtype))
    signs = (delta > 0).to(torch.int8).mul_(2).sub_(1)
    return signs, delta.abs_().mean().float()


def apply(base: Tensor, signs: Tensor, scale: Tensor | float) -> Tensor:
    """Rebuild the weight: base + scale * signs, a new tensor of base's shape and dtype.

    Differentiable in scale, so that scales can be distilled (slide: "we further optimize the scales").
    base: floating point. signs: int8 of +1 and -1. scale: a number or a tensor ().
    Raises TypeError for a wrong type or dtype, ValueError for shapes that differ, NaN or a sign that is no sign.
    """
    require_tensor("base", base, finite=True)
    _require_signs(signs)
    if signs.shape != base.shape:
        raise ValueError(f"signs must have base's shape {tuple(base.shape)}, got {tuple(signs.shape)}")
    if isinstance(scale, Tensor):
        require_tensor("scale", scale, ndim=0, finite=True)
    else:
        scale = require_number("scale", scale)
    dtype = _wide(base.dtype)
    return (base.to(dtype) + scale * signs.to(dtype)).to(base.dtype)


def pack(signs: Tensor) -> Tensor:
    """Keep each sign in one bit: int8 of +1 and -1, n elements -> uint8 (ceil(n / 8),), on the same device.

    Element 8k + j is bit j of byte k, 1 for +1; the bits after the last element are 0.
    Raises TypeError or ValueError naming signs.
    """
    require_tensor("signs", signs, dtype=torch.int8)
    flat = signs.detach().reshape(-1).cpu().numpy().view(np.uint8)
    packed = np.empty(math.ceil(flat.size / 8), np.uint8)
    buffer = np.empty(min(PIECE, flat.size), np.uint8)
    seen = 0
    for first in range(0, flat.size, PIECE):
        piece = flat[first : first + PIECE]
        bits = np.add(piece, 1, out=buffer[: piece.size])  # +1 becomes 2, -1 = 255 becomes 0, and nothing else does
        seen |= int(np.bitwise_or.reduce(bits))
        packed[first // 8 : first // 8 + math.ceil(piece.size / 8)] = np.packbits(bits, bitorder="little")
    if seen & ~2:
        raise ValueError("signs must be +1 or -1 everywhere, got another value")
    return torch.from_numpy(packed).to(signs.device)


def unpack(packed: Tensor, shape: Sequence[int]) -> Tensor:
    """Undo pack: uint8 (ceil(n / 8),) -> int8 of +1 and -1 in the given shape of n elements.

    Raises TypeError for a wrong dtype, ValueError when the shape does not belong to this many bytes.
    """
    require_tensor("packed", packed, ndim=1, dtype=torch.uint8)
    count = math.prod(shape)
    if (count + 7) // 8 != packed.numel():
        raise ValueError(
            f"packed must have ceil({count} / 8) = {(count + 7) // 8} bytes for shape {tuple(shape)}, "
            f"got {packed.numel()}"
        )
    bits = np.unpackbits(packed.cpu().numpy(), count=count, bitorder="little")
    return torch.from_numpy(bits.view(np.int8)).to(packed.device).mul_(2).sub_(1).view(tuple(shape))


def distill_loss(logits: Tensor, target: Tensor, mask: Tensor) -> Tensor:
    """What the scales are distilled on: the mean over the real tokens of ||z_fine - z_bin||², a scalar.

    logits: (batch, seq, vocab) of the compressed model. target: the same of the fine-tune, not differentiated.
    mask: (batch, seq) bool, True for a real token, False for padding. The square is summed over the vocabulary, and
    every real token of the batch weighs the same. Computed in float32 at least.
    Slide "we further optimize the scales by performing model distillation"; Liu et al. 2024.
    Raises TypeError for a wrong dtype, ValueError for shapes that differ, or when no token is real.
    """
    require_tensor("logits", logits, ndim=3)
    require_tensor("target", target, ndim=3)
    if target.shape != logits.shape:
        raise ValueError(f"target must have logits' shape {tuple(logits.shape)}, got {tuple(target.shape)}")
    require_tensor("mask", mask, ndim=2, dtype=torch.bool)
    if mask.shape != logits.shape[:2]:
        raise ValueError(f"mask must be (batch, seq) = {tuple(logits.shape[:2])}, got {tuple(mask.shape)}")
    if not bool(mask.any()):
        raise ValueError("mask must be True for at least one token; all of them are padding")
    real, wanted = logits[mask], target[mask].detach()  # (tokens, vocab)
    return (real.to(_wide(real.dtype)) - wanted.to(_wide(wanted.dtype))).square().sum(dim=1).mean()


def more_bits(delta: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """Sign and scale again and again, each time of what is left: `bits` one-bit matrices in place of one.

    delta: W_fine - W_base, floating point, any shape. Returns signs, int8 (bits, *shape), and scales, float32 (bits,);
    ``torch.einsum("b...,b->...", signs.float(), scales)`` is the approximation. The first bit is compress's.
    Liu et al. 2024, ablation over the fidelity of Delta: BitDelta again, with the compressed model as the base.
    Raises TypeError or ValueError naming delta or bits.
    """
    require_tensor("delta", delta, finite=True)
    require_positive_int("bits", bits)
    left = delta.detach().to(_wide(delta.dtype))
    zero, signs, scales = torch.zeros_like(left), [], []
    for _ in range(bits):
        one, scale = compress(zero, left)
        signs.append(one)
        scales.append(scale)
        left = left - scale * one
    return torch.stack(signs), torch.stack(scales)


def low_rank(delta: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """The product of two thin matrices that comes closest to delta: (out, rank) and (rank, in), their product ~ delta.

    delta: (out, in), floating point. No other pair of this rank has a smaller squared error (Eckart and Young 1936);
    the first factor's columns are orthonormal, up to rounding. Returned in float32 or wider.
    Raises TypeError or ValueError naming delta or rank, which is at most the smaller of out and in.
    """
    require_tensor("delta", delta, ndim=2, finite=True)
    if require_positive_int("rank", rank) > min(delta.shape):
        raise ValueError(f"rank must be at most {min(delta.shape)}, delta's smaller size, got {rank}")
    wide = delta.detach().to(_wide(delta.dtype))
    tall = wide if wide.shape[0] <= wide.shape[1] else wide.T
    # The eigenvectors of the smaller Gram matrix span what the singular value decomposition keeps, in less time.
    exact = tall.double()
    vectors = torch.linalg.eigh(exact @ exact.T).eigenvectors[:, -rank:].flip(1)  # the largest first
    along = (vectors.T @ exact).to(wide.dtype)  # (rank, larger size): the projection
    vectors = vectors.to(wide.dtype)
    return (vectors, along) if tall is wide else (along.T.contiguous(), vectors.T.contiguous())


def delta_bytes(shape: Sequence[int], bits: int = 1) -> int:
    """Bytes of a compressed matrix of this shape: `bits` bits a weight, each plane in whole bytes, and its scales."""
    return require_positive_int("bits", bits) * (math.ceil(math.prod(shape) / 8) + SCALE_BYTES)


def rank_of_equal_bytes(shape: Sequence[int], bits: int = 1, width: int = 2) -> int:
    """The largest rank whose two factors take no more bytes than `bits` bits a weight and their scales.

    shape: (out, in). width: bytes of a number in the factors, 2 for float16. 0 where not even rank 1 fits.
    """
    out, in_features = shape
    return delta_bytes(shape, bits) // (require_positive_int("width", width) * (out + in_features))


class Size(NamedTuple):
    """What the paper's table says of one model, computed. Bytes of the model at 16 bits, and of one compressed
    fine-tune of it: `one_bit` for the layers' linear weights, `scales` for these matrices' scales, `rest` at 16 bits.
    """

    name: str
    base: int
    one_bit: int
    scales: int
    rest: int

    @property
    def delta(self) -> int:
        """Bytes of one fine-tune."""
        return self.one_bit + self.scales + self.rest

    @property
    def factor(self) -> float:
        """How many times smaller a fine-tune became, bytes over bytes."""
        return self.base / self.delta

    @property
    def printed_factor(self) -> float:
        """The factor as the paper prints it: decimal GB of the model over GiB of the delta, each of two decimals."""
        return round(self.base / 1e9, 2) / round(self.delta / 2**30, 2)


def model_bytes(config: Mapping[str, Any]) -> tuple[int, int]:
    """Bytes of a Llama-like model, and of one of its fine-tunes after BitDelta: (base, delta), from its configuration.

    config: with the names of a transformers LlamaConfig: hidden_size, intermediate_size, num_hidden_layers,
    num_attention_heads, num_key_value_heads, vocab_size and tie_word_embeddings (the head is the embedding's matrix).
    All weights of the base have 16 bits. Of a fine-tune the seven linear matrices of each layer (q, k, v, o, gate, up,
    down) keep one bit a weight, in whole bytes, and a float32 scale each; the embedding, the head and the norms (two
    vectors a layer and one at the end) stay at 16 bits. Liu et al. 2024, the table of model sizes.
    Raises KeyError for a name that is missing, TypeError or ValueError for a value that is no positive int.
    """
    size = _size("", config)
    return size.base, size.delta


def size_table() -> list[Size]:
    """The rows of the paper's table of model sizes: Llama-2 7B, 13B, 70B and Mistral-7B, from their configurations."""
    return [_size(name, config) for name, config in CONFIGURATIONS.items()]


def _size(name: str, config: Mapping[str, Any]) -> Size:
    def get(key: str) -> int:
        return require_positive_int(f"config[{key!r}]", config[key])

    hidden, inner, layers, vocab = map(get, ("hidden_size", "intermediate_size", "num_hidden_layers", "vocab_size"))
    heads, key_heads = get("num_attention_heads"), get("num_key_value_heads")
    if hidden % heads:
        raise ValueError(f"config['hidden_size'] must be a multiple of its {heads} heads, got {hidden}")
    keys = hidden // heads * key_heads  # grouped-query attention: several query heads share a key and a value head
    shapes = [(hidden, hidden), (keys, hidden), (keys, hidden), (hidden, hidden)]
    shapes += [(inner, hidden), (inner, hidden), (hidden, inner)]
    embeddings = (1 if config["tie_word_embeddings"] else 2) * vocab * hidden
    rest = 2 * (embeddings + (2 * layers + 1) * hidden)
    linears = layers * sum(map(math.prod, shapes))
    scales = layers * len(shapes) * SCALE_BYTES
    return Size(name, 2 * linears + rest, layers * sum(map(delta_bytes, shapes)) - scales, scales, rest)


def _configuration(hidden: int, inner: int, layers: int, heads: int, key_heads: int) -> dict[str, Any]:
    return {
        "hidden_size": hidden,
        "intermediate_size": inner,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": key_heads,
        "vocab_size": 32000,
        "tie_word_embeddings": False,
    }


CONFIGURATIONS = {
    "Llama-2 7B": _configuration(4096, 11008, 32, 32, 32),
    "Llama-2 13B": _configuration(5120, 13824, 40, 40, 40),
    "Llama-2 70B": _configuration(8192, 28672, 80, 64, 8),
    "Mistral-7B": _configuration(4096, 14336, 32, 32, 8),
}
"""The models of the paper's table, as their makers published them."""


def _wide(dtype: torch.dtype) -> torch.dtype:
    """float32, or the dtype itself if that is wider."""
    return torch.promote_types(dtype, torch.float32)


def _require_signs(signs: Tensor) -> None:
    require_tensor("signs", signs, dtype=torch.int8)
    if not bool((signs.abs() == 1).all()):
        raise ValueError("signs must be +1 or -1 everywhere, got another value")
