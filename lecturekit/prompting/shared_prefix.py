"""Attention of many rows to one beginning that they share, whose keys and values are held once and never copied.

A cache of n equal rows holds the shots n times, and each decoding step reads all n copies: on a CPU that takes longer
than the model itself. Here the queries of all rows meet the shared keys in one matrix product, as in Juravsky et al.,
"Hydragen: High-Throughput LLM Inference with Shared Prefixes", 2024, and only what follows is kept for each row.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from transformers import Cache, PreTrainedModel

NAME = "lecturekit_shared_prefix"
_shared: list[tuple[Tensor, Tensor]] = []  # of each layer: keys and values (kv heads, prefix, d) of the prefix in use


def attend(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor,
    scaling: float,
    **_: Any,
) -> tuple[Tensor, None]:
    """The attention function that transformers calls: every query sees the whole prefix, and its own row by the mask.

    query (n, heads, q, d); key, value (n, kv heads, t, d), the rows' own; attention_mask (n or 1, 1, q, t), added to
    the scores. Returns (n, q, heads, d).
    """
    before, content = _shared[module.layer_idx]
    n, heads, length, d = query.shape
    groups, prefix = len(before), before.shape[1]
    folded = query.reshape(n, groups, -1, d) * scaling  # heads that share keys: (n, kv heads, heads/kv heads · q, d)
    far = (folded.transpose(0, 1).reshape(groups, -1, d) @ before.mT).view(groups, n, -1, prefix).transpose(0, 1)
    near = (folded @ key.mT).view(n, groups, -1, length, key.shape[2]) + attention_mask[:, :, None]
    weights = torch.cat([far, near.flatten(2, 3)], dim=-1).softmax(
        dim=-1, dtype=torch.promote_types(query.dtype, torch.float32)
    )
    weights = weights.to(query.dtype)
    far, near = weights[..., :prefix], weights[..., prefix:]
    seen = (far.transpose(0, 1).reshape(groups, -1, prefix) @ content).view(groups, n, -1, d).transpose(0, 1)
    found = (seen + near @ value).reshape(n, heads, length, d)
    return found.transpose(1, 2), None


@contextmanager
def shared_prefix(model: PreTrainedModel, cache: Cache) -> Iterator[None]:
    """Within it, every row of every pass of the model sees the text in this cache (one row) before its own tokens.

    An empty cache changes nothing.
    Positions must be given: they begin behind the prefix. Caches and masks are those of the rows' own tokens alone.
    For one thread at a time, and models whose attention transformers can exchange (Llama, Qwen, Mistral, …).
    """
    from transformers.masking_utils import AttentionMaskInterface, eager_mask
    from transformers.modeling_utils import AttentionInterface

    if not cache.get_seq_length():
        yield
        return
    if _shared:
        raise RuntimeError("shared_prefix is in use already: leave the first one before you enter another")
    AttentionInterface.register(NAME, attend)
    AttentionMaskInterface.register(NAME, eager_mask)
    before = model.config._attn_implementation
    layers: Any = cache.layers
    _shared.extend((layer.keys[0], layer.values[0]) for layer in layers)
    model.set_attn_implementation(NAME)
    try:
        yield
    finally:
        model.set_attn_implementation(before)
        _shared.clear()
