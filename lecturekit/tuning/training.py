"""One step of supervised fine-tuning: next-token loss on the labelled tokens, backward, update."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F


def train_step(model: Any, optimizer: torch.optim.Optimizer, input_ids: Tensor, labels: Tensor) -> float:
    """Update the model once on one batch and return the loss before the update.

    model: called as model(input_ids), returns an object with ``.logits`` (batch, seq, vocab)
    input_ids, labels: (batch, seq) int64; a label of -100 is not counted (prompt, padding)
    The loss is the mean of −log P(token t+1 | tokens 0 … t) over the counted tokens, in nats.
    Raises ValueError when the shapes differ or no token is counted. Slide "Supervised Fine-Tuning".
    """
    if input_ids.shape != labels.shape or input_ids.ndim != 2:
        raise ValueError(
            f"input_ids and labels must both be (batch, seq), got {tuple(input_ids.shape)} and {tuple(labels.shape)}"
        )
    targets = labels[:, 1:]  # position t predicts token t + 1
    if not bool((targets != -100).any()):
        raise ValueError("labels must count at least one token after the first; all of them are -100")
    optimizer.zero_grad()
    logits = model(input_ids).logits[:, :-1]  # (batch, seq - 1, vocab)
    loss = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=-100)
    loss.backward()
    optimizer.step()
    return loss.item()
