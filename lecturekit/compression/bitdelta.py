"""BitDelta: what fine-tuning changed, kept as one sign bit a weight and one scale a matrix.

Liu et al., "BitDelta: Your Fine-Tune May Only Be Worth One Bit", NeurIPS 2024; slides "Bit-Delta". Delta is
W_fine - W_base, and its approximation is scale * Sign(Delta). The slide writes W_ij inside Sign and the sums; the
entries meant are those of Delta.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from lecturekit.arguments import require_number, require_tensor


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
    _require_signs(signs)
    bits = (signs.reshape(-1) > 0).cpu().numpy()
    return torch.from_numpy(np.packbits(bits, bitorder="little")).to(signs.device)


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


def _wide(dtype: torch.dtype) -> torch.dtype:
    """float32, or the dtype itself if that is wider."""
    return torch.promote_types(dtype, torch.float32)


def _require_signs(signs: Tensor) -> None:
    require_tensor("signs", signs, dtype=torch.int8)
    if not bool((signs.abs() == 1).all()):
        raise ValueError("signs must be +1 or -1 everywhere, got another value")
