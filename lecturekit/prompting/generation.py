"""Let a model go on behind many prompts at the same time.

transformers' own `generate` does this for prompts that have nothing in common; here the shots that all prompts begin
with are read once, and several samples of one prompt share its reading.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from lecturekit.arguments import require_number, require_positive_int
from lecturekit.prompting.icl import read_shots
from lecturekit.prompting.shared_prefix import shared_prefix

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


def line_ends(tokenizer: PreTrainedTokenizerBase) -> Tensor:
    """The ids of all tokens that hold a line end, and of the special tokens that end a text: (n,) int64."""
    specials = set(tokenizer.all_special_ids)
    return torch.tensor(
        [number for number in range(len(tokenizer)) if number in specials or "\n" in tokenizer.decode([number])]
    )


@torch.no_grad()
def continue_texts(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[str],
    tokens: int,
    ends: Tensor,
    temperature: float = 0.0,
    samples: int = 1,
    rows: int = 96,
) -> list[str]:
    """How the model goes on behind each prompt: `samples` texts for each, those of one prompt one after the other.

    tokens: the most that are written. ends: (n,) ids, such as line_ends gives; a text stops before the first of them.
    temperature: 0 takes the likeliest token (greedy), else tokens are drawn with torch's global generator.
    rows: texts written at the same time. Prompts of one batch are padded on the left, so that all end in the same
    column; the mask hides the padding, and positions count real tokens only.
    Raises ValueError for no prompts, an empty one or a negative temperature; TypeError or ValueError for the numbers.
    """
    for name, number in (("tokens", tokens), ("samples", samples), ("rows", rows)):
        require_positive_int(name, number)
    if require_number("temperature", temperature) < 0:
        raise ValueError(f"temperature must be 0 or more, got {temperature}")
    if isinstance(prompts, str) or not prompts or not all(prompts):
        raise ValueError("prompts must be a list of at least one text, none of them empty")
    ids = [tokenizer(prompt).input_ids for prompt in prompts]
    shared = min(len(os.path.commonprefix(ids)), min(map(len, ids)) - 1)
    with shared_prefix(model, read_shots(model, torch.tensor(ids[0][:shared], dtype=torch.long))):
        texts = _rows(model, [one[shared:] for one in ids], shared, tokens, ends, temperature, samples, rows)
    return tokenizer.batch_decode(texts)


def _rows(
    model: PreTrainedModel,
    ids: list[list[int]],
    shared: int,
    tokens: int,
    ends: Tensor,
    temperature: float,
    samples: int,
    rows: int,
) -> list[list[int]]:
    """The ids written behind each row of ids, whose first token stands behind `shared` others."""
    from transformers import DynamicCache

    ends = ends.to(model.device)
    together = max(1, rows // samples)
    written: list[list[int]] = []
    for start in range(0, len(ids), together):
        own = ids[start : start + together]
        width = max(map(len, own))
        read = torch.tensor([[0] * (width - len(one)) + one for one in own], device=model.device)
        mask = torch.tensor([[0] * (width - len(one)) + [1] * len(one) for one in own], device=model.device)
        place = shared + (mask.cumsum(1) - 1).clamp(min=0)
        cache = DynamicCache(config=model.config)
        logits = model(
            input_ids=read,
            attention_mask=mask,
            position_ids=place,
            past_key_values=cache,
            use_cache=True,
            logits_to_keep=1,
        ).logits[:, -1]
        cache.batch_repeat_interleave(samples)
        logits, mask, place = (part.repeat_interleave(samples, 0) for part in (logits, mask, place[:, -1:]))
        over = torch.zeros(len(logits), 1, dtype=torch.bool, device=model.device)
        columns: list[Tensor] = []
        while True:
            if temperature:
                token = torch.multinomial((logits.float() / temperature).softmax(-1), 1)
            else:
                token = logits.argmax(-1, keepdim=True)
            over = over | torch.isin(token, ends)
            columns.append(token.masked_fill(over, -1))
            if over.all() or len(columns) == tokens:
                break
            mask, place = torch.cat([mask, mask.new_ones(len(mask), 1)], dim=1), place + 1
            logits = model(
                input_ids=token, attention_mask=mask, position_ids=place, past_key_values=cache, use_cache=True
            ).logits[:, -1]
        written += [[number for number in row if number >= 0] for row in torch.cat(columns, dim=1).tolist()]
    return written
