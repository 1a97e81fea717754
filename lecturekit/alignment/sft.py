"""Supervised fine-tuning: next-token prediction on the desired responses only.

Slide "Supervised Fine-Tuning (SFT)": L(U) = Σ log P(u_i | u_0 … u_{i−1}; Θ), summed over the tokens of the response.
Here is everything between a list of messages and that number: the chat template, the mask of what is learnt, batches
with padding, the loss, and packing (several dialogues in one row, with attention that keeps them apart; Krell et al.,
"Efficient Sequence Packing without Cross-contamination", 2021).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from lecturekit.alignment.logprob import IGNORED
from lecturekit.arguments import require_integers, require_positive_int, require_tensor, widened

START, END = "<|im_start|>", "<|im_end|>"
ROLES = ("system", "user", "assistant")

Message = Mapping[str, str]


class Packed(NamedTuple):
    """Several sequences a row; every field is (rows, length), int64.

    segments numbers the sequences of a row 1, 2, … and is 0 on padding. position_ids restart at 0 in each sequence.
    """

    input_ids: Tensor
    labels: Tensor
    position_ids: Tensor
    segments: Tensor


def render_chat(messages: Sequence[Message], add_generation_prompt: bool = False) -> str:
    """A dialogue as the text that SmolLM2 was trained on (ChatML), without a default system prompt.

    messages: [{"role": "user", "content": "…"}, {"role": "assistant", "content": "…"}, …]
    Each message becomes "<|im_start|>role\\ncontent<|im_end|>\\n"; add_generation_prompt opens the assistant's turn.
    Equal to ``tokenizer.apply_chat_template`` with the template of lecturekit.models.
    Raises TypeError or ValueError for no messages, or for one without a known role and a text.
    """
    text = "".join(_header(message) + message["content"] + END + "\n" for message in _checked(messages))
    return text + (f"{START}assistant\n" if add_generation_prompt else "")


def encode_dialogue(tokenizer: Any, messages: Sequence[Message]) -> tuple[list[int], list[bool]]:
    """Token ids of a dialogue, and which of them are learnt: (ids, mask), two lists of equal length.

    tokenizer: tokenizer(text).input_ids is a list of ids that keeps <|im_start|> and <|im_end|> whole.
    The mask is true on the tokens of each assistant's answer and on the <|im_end|> behind it, from which the model
    learns to stop. It is false on the headers, on what the user says, and on the newline after <|im_end|>, which the
    model never has to write. Each answer is tokenized by itself, as in generation, where the prompt ends before it.
    Raises as render_chat does.
    """

    def encode(text: str) -> list[int]:
        return list(tokenizer(text).input_ids)

    ids: list[int] = []
    mask: list[bool] = []
    for message in _checked(messages):
        if message["role"] == "assistant":
            pieces = [(_header(message), False), (message["content"], True), (END, True), ("\n", False)]
        else:
            pieces = [(_header(message) + message["content"] + END + "\n", False)]
        for text, learnt in pieces:
            found = encode(text) if text else []
            ids += found
            mask += [learnt] * len(found)
    return ids, mask


def response_labels(ids: Tensor, mask: Tensor) -> Tensor:
    """The labels of a batch: the token itself where it is learnt, −100 elsewhere. Not shifted: the loss does that.

    ids: integers of any shape. mask: bool of the same shape. Returns int64 of that shape, a new tensor.
    Raises TypeError or ValueError when they are not such a pair.
    """
    require_integers("ids", ids)
    require_tensor("mask", mask, dtype=torch.bool)
    if ids.shape != mask.shape:
        raise ValueError(f"mask must have the shape of ids, {tuple(ids.shape)}, got {tuple(mask.shape)}")
    return ids.long().masked_fill(~mask, IGNORED)


def collate(dialogues: Sequence[tuple[Sequence[int], Sequence[bool]]], pad: int) -> tuple[Tensor, Tensor]:
    """Dialogues of different lengths as one batch, padded on the right: (input_ids, labels), both (batch, longest).

    dialogues: pairs (ids, mask) as encode_dialogue gives them. pad: the token id to fill up with; its label is −100.
    Whether a position is padding follows from the lengths, not from its id: SmolLM2's pad token is its <|im_end|>,
    which is to be learnt at the end of an answer. Raises ValueError for no dialogues or a pair that does not match,
    TypeError for ids that are no integers.
    """
    if not dialogues:
        raise ValueError("dialogues must hold at least one pair (ids, mask), got none")
    for number, (ids, mask) in enumerate(dialogues):
        if len(ids) != len(mask) or not ids:
            raise ValueError(
                f"dialogues[{number}] must be two lists of one length, not empty, "
                f"got {len(ids)} ids and a mask of {len(mask)}"
            )
    longest = max(len(ids) for ids, _ in dialogues)
    input_ids = torch.full((len(dialogues), longest), pad)
    learnt = torch.zeros(len(dialogues), longest, dtype=torch.bool)
    for row, (ids, mask) in enumerate(dialogues):
        input_ids[row, : len(ids)] = require_integers(f"the ids of dialogues[{row}]", torch.tensor(list(ids)))
        learnt[row, : len(ids)] = torch.tensor(list(mask))
    return input_ids, response_labels(input_ids, learnt)


def response_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """Mean of −log P(u_i | u_0 … u_{i−1}) over the labelled tokens of the whole batch, in nats; a scalar.

    logits: (batch, seq, vocab), where position t predicts token t + 1. labels: (batch, seq), −100 is not counted, and
    neither is the first position, which nothing predicts. Every token weighs the same, in a long answer and in a short
    one: the sum over the batch is divided by the count over the batch. Computed in float32 or wider. Equal to the
    ``loss`` of a transformers model given these labels. Slide "Supervised Fine-Tuning (SFT)".
    Raises TypeError for labels that are no integers, ValueError for shapes that do not match, labels outside the
    vocabulary, or when no token is counted.
    """
    total, count = _sum_and_count(logits, labels)
    return total / count


def train_step(model: Any, optimizer: torch.optim.Optimizer, parts: Iterable[tuple[Tensor, Tensor]]) -> float:
    """One update on a batch that comes in parts, because it would not fit into memory at once; returns its loss.

    model: model(input_ids).logits is (batch, seq, vocab). parts: pairs (input_ids, labels), each (batch, seq) of any
    size. The gradient is that of response_loss over all parts together, whatever the sizes of the parts: each part's
    sum is divided by the count of the whole batch. Returns the loss before the update, a float, in nats.
    Raises ValueError for no parts or no labelled token, and as response_loss does.
    """
    parts = list(parts)  # they are walked through twice, and a generator would be empty the second time
    for _, labels in parts:
        require_integers("labels", labels, ndim=2)
    count = sum(int((labels[:, 1:] != IGNORED).sum()) for _, labels in parts)
    if not count:
        raise ValueError("parts must hold at least one labelled token after the first position, got none")
    optimizer.zero_grad()
    loss = 0.0
    for input_ids, labels in parts:
        total, counted = _sum_and_count(model(input_ids).logits, labels, may_be_none=True)
        if counted:
            (total / count).backward()  # frees this part's activations before the next part's are made
        loss += float(total.detach()) / count
    optimizer.step()
    return loss


def pack(sequences: Sequence[tuple[Sequence[int], Sequence[int]]], length: int, pad: int = 0) -> Packed:
    """Put several sequences into each row of `length` tokens: less padding, fewer rows, no sequence cut.

    sequences: pairs (ids, labels). First fit: in their order, each goes behind the others in the first row that has
    room, else it opens a new row. The label of each sequence's first token becomes −100: otherwise the last token of
    the sequence before it would be asked to predict it. Padding: id `pad`, label −100, position 0, segment 0.
    Raises ValueError for no sequences, an empty one, one longer than `length`, or labels that do not match, TypeError
    for ids or labels that are no integers.
    """
    length = require_positive_int("length", length)
    if not sequences:
        raise ValueError("sequences must hold at least one pair (ids, labels), got none")
    rows: list[list[tuple[Sequence[int], Sequence[int]]]] = []
    room: list[int] = []
    for number, (ids, labels) in enumerate(sequences):
        if len(ids) != len(labels) or not len(ids):
            raise ValueError(
                f"sequences[{number}] must be two lists of one length, not empty, "
                f"got {len(ids)} ids and {len(labels)} labels"
            )
        if len(ids) > length:
            raise ValueError(
                f"sequences[{number}] has {len(ids)} tokens, more than a row of {length}; "
                "take longer rows or leave it out (a sequence is never cut)"
            )
        row = next((place for place, free in enumerate(room) if free >= len(ids)), len(rows))
        if row == len(rows):
            rows.append([])
            room.append(length)
        rows[row].append((ids, labels))
        room[row] -= len(ids)

    shape = (len(rows), length)
    packed = Packed(
        torch.full(shape, pad), torch.full(shape, IGNORED), torch.zeros(shape).long(), torch.zeros(shape).long()
    )
    for row, members in enumerate(rows):
        start = 0
        for segment, (ids, labels) in enumerate(members, start=1):
            place = slice(start, start + len(ids))
            packed.input_ids[row, place] = require_integers("the ids of every sequence", torch.tensor(list(ids)))
            packed.labels[row, place] = require_integers(
                "the labels of every sequence", torch.tensor([IGNORED, *list(labels)[1:]])
            )
            packed.position_ids[row, place] = torch.arange(len(ids))
            packed.segments[row, place] = segment
            start += len(ids)
    return packed


def block_diagonal_mask(segments: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """Who may attend to whom in packed rows: (rows, 1, length, length), query positions before key positions.

    segments: (rows, length), as pack gives them. A position sees itself and the earlier ones of its own segment.
    Without dtype the mask is bool, true = may attend (scaled_dot_product_attention, transformers' "sdpa"); with a
    floating dtype it is what is added to the scores: 0, or the lowest finite number (transformers' "eager").
    """
    require_integers("segments", segments, ndim=2)
    length = segments.shape[1]
    same = segments.unsqueeze(2) == segments.unsqueeze(1)  # (rows, query, key)
    causal = torch.ones(length, length, dtype=torch.bool, device=segments.device).tril()
    allowed = (same & causal).unsqueeze(1)  # one mask for all heads
    if dtype is None:
        return allowed
    if not dtype.is_floating_point:
        raise TypeError(f"dtype must be a floating-point dtype or None, got {dtype}")
    return torch.zeros(allowed.shape, dtype=dtype, device=segments.device).masked_fill(~allowed, torch.finfo(dtype).min)


def _header(message: Message) -> str:
    return f"{START}{message['role']}\n"


def _checked(messages: Sequence[Message]) -> Sequence[Message]:
    if isinstance(messages, (str, Mapping)) or not isinstance(messages, Sequence):
        raise TypeError(f"messages must be a list of dicts with role and content, got {type(messages).__name__}")
    if not messages:
        raise ValueError("messages must hold at least one message, got none")
    for number, message in enumerate(messages):
        if not isinstance(message, Mapping) or not isinstance(message.get("content"), str):
            raise TypeError(f"messages[{number}] must be a dict with a role and a text as content, got {message!r}")
        if message.get("role") not in ROLES:
            raise ValueError(f"messages[{number}] must have one of the roles {ROLES}, got {message.get('role')!r}")
    return messages


def _sum_and_count(logits: Tensor, labels: Tensor, may_be_none: bool = False) -> tuple[Tensor, int]:
    """Sum of −log P over the labelled tokens that something predicts, and how many these are."""
    require_tensor("logits", logits, ndim=3)
    require_integers("labels", labels, ndim=2)
    if logits.shape[:2] != labels.shape:
        raise ValueError(f"labels must be (batch, seq) = {tuple(logits.shape[:2])}, got {tuple(labels.shape)}")
    wanted = labels[:, 1:]
    counted = wanted != IGNORED
    count = int(counted.sum())
    if not count and not may_be_none:
        raise ValueError("labels must count at least one token after the first; all of them are -100")
    vocab, chosen = logits.shape[2], wanted[counted].long()
    if bool(((chosen < 0) | (chosen >= vocab)).any()):
        raise ValueError(f"labels must be in 0..{vocab - 1} or {IGNORED}, got one outside")
    # Only the rows that are counted: the (tokens, vocab) copy in float32 is as small as it can be.
    return F.cross_entropy(widened(logits[:, :-1][counted]), chosen, reduction="sum"), count
