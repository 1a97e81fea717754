"""What a fine-tune weighs: the storage arithmetic of the Adapter slide, for LoRA.

Slide "Adapter": 1000 tasks × 7B parameters at 16 bits. The slide's 14 PB is 14 TB (7e9 × 2 bytes × 1000 = 1.4e13).
"""

from __future__ import annotations

from collections.abc import Sequence


def storage(shapes: Sequence[tuple[int, int]], r: int, bits: int = 16) -> tuple[int, float]:
    """Parameters and bytes of LoRA branches of rank r beside layers of these shapes.

    shapes: (out, in) of every adapted layer   r: rank   bits: of one stored number   →   (parameters, bytes).
    A is (r, in) and B is (out, r), so a layer costs r · (in + out). Hu et al. 2022, section 4.2.
    Raises ValueError for sizes, r or bits below 1.
    """
    if r < 1 or bits < 1:
        raise ValueError(f"r and bits must be at least 1, got r={r}, bits={bits}")
    for out, inp in shapes:
        if out < 1 or inp < 1:
            raise ValueError(f"shapes must hold (out, in) sizes of at least 1, got ({out}, {inp})")
    parameters = sum(r * (out + inp) for out, inp in shapes)
    return parameters, parameters * bits / 8
