"""From hidden states to log-probabilities of tokens, without ever holding the logits of all positions.

SFT, PPO and DPO need one number a token, log pi(u_i | u_<i), and its gradient. The plain way, logits → log_softmax →
gather, keeps (tokens × vocabulary) tensors three times over: 4 × 256 tokens of SmolLM2's 49,152 words take 200 MB each.
Here a few rows at a time are turned into logits, used and forgotten.

The gradient of a row to its hidden state, W[target] − p W, is a number times what comes from above, so it is computed
while the row's probabilities p are at hand: with a frozen head, as under LoRA, nothing is computed twice. Only the
gradient to the head's own weights needs the probabilities again, and recomputes them. (Slides "Supervised Fine-Tuning"
and "DPO": both losses are sums of these numbers. Recomputing instead of keeping: Chen et al. 2016, "Training Deep Nets
with Sublinear Memory Cost".) Double backward is left out.

The labs do without it: they write log_softmax and gather out in shorter functions of their own, for reading. This one
is what benchmarks/logprobs.py measures beside the plain way.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lecturekit.arguments import require_integers, require_positive_int, require_tensor, widened

IGNORED = -100
"""The label that takes no part in the loss, as in PyTorch's cross_entropy and in transformers."""


def token_logprobs(hidden: Tensor, weight: Tensor, targets: Tensor, rows: int = 128) -> Tensor:
    """Log-probability of each target token, in nats, from the state of the position that predicts it.

    hidden: (..., dim), after the model's last norm.   weight: (vocab, dim), the output head (in SmolLM2 the embedding).
    targets: (...), integers; −100 means "does not count", costs nothing and gives 0.   rows: how many positions are
    turned into logits at a time.   →   (...), float32 or wider.
    Extra memory: rows × vocab numbers, three times in a dtype below float32 (the logits, then in float32, then the
    probabilities), and where hidden is trained one tensor like hidden for its gradient.
    The caller shifts: hidden[:, t] predicts tokens[:, t + 1]. Differentiable in hidden and weight, once. Equal to
    ``(hidden @ weight.T).log_softmax(-1)`` at the targets up to roundings; in bfloat16 the products are rounded to it.
    Raises TypeError for wrong types or dtypes, ValueError for shapes that do not match or targets outside the
    vocabulary.
    """
    require_tensor("hidden", hidden)
    require_tensor("weight", weight, ndim=2)
    require_integers("targets", targets)
    require_positive_int("rows", rows)
    if hidden.dtype != weight.dtype:
        raise TypeError(f"hidden and weight must have one dtype, got {hidden.dtype} and {weight.dtype}")
    if hidden.ndim < 2 or hidden.shape[-1] != weight.shape[1]:
        raise ValueError(f"hidden must be (..., dim = {weight.shape[1]}) to match weight, got {tuple(hidden.shape)}")
    if targets.shape != hidden.shape[:-1]:
        raise ValueError(f"targets must be {tuple(hidden.shape[:-1])} to match hidden, got {tuple(targets.shape)}")
    counted = targets != IGNORED
    wanted = targets[counted].long()
    if bool(((wanted < 0) | (wanted >= len(weight))).any()):
        raise ValueError(f"targets must be in 0..{len(weight) - 1} or {IGNORED}, got one outside")
    result = torch.zeros(targets.shape, dtype=torch.promote_types(hidden.dtype, torch.float32), device=hidden.device)
    everything = len(wanted) == targets.numel()
    states = hidden.reshape(-1, hidden.shape[-1]) if everything else hidden[counted]  # (counted, dim)
    found = _TokenLogProbs.apply(states, weight, wanted, rows)
    return found.view(targets.shape) if everything else result.masked_scatter(counted, found)


class _TokenLogProbs(torch.autograd.Function):
    """(n, dim), (vocab, dim), (n,) → (n,), a chunk of rows at a time."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, targets: Tensor, rows: int) -> Tensor:
        wide = torch.promote_types(hidden.dtype, torch.float32)
        result = torch.empty(len(hidden), dtype=wide, device=hidden.device)
        log_totals = torch.empty_like(result)
        slope = torch.empty_like(hidden) if ctx.needs_input_grad[0] else None
        # one buffer for all chunks: fresh memory of this size costs more than the product that fills it
        buffer = hidden.new_empty(min(rows, len(hidden)), len(weight))
        for start in range(0, len(hidden), rows):
            part = slice(start, start + rows)
            scores = widened(torch.mm(hidden[part], weight.T, out=buffer[: len(hidden[part])]))  # (rows, vocab)
            at = targets[part].unsqueeze(1)
            top = scores.amax(1, keepdim=True)
            chosen = scores.gather(1, at) - top
            total = scores.sub_(top).exp_().sum(1, keepdim=True)  # scores are now p, up to the total
            result[part] = (chosen - total.log()).squeeze(1)
            log_totals[part] = (top + total.log()).squeeze(1)
            if slope is not None:
                mean = torch.mm(scores.to(weight.dtype), weight)  # sum over the vocabulary of p · W, up to the total
                slope[part] = weight[targets[part]] - mean.div_(total)
        ctx.save_for_backward(hidden, weight, targets, log_totals, slope)
        ctx.rows = rows
        return result

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, above: Tensor) -> tuple[Tensor | None, Tensor | None, None, None]:
        hidden, weight, targets, log_totals, slope = ctx.saved_tensors
        above = above.unsqueeze(1)  # (n, 1)
        to_hidden = None if slope is None else (above * slope).to(hidden.dtype)
        if not ctx.needs_input_grad[1]:
            return to_hidden, None, None, None
        to_weight = torch.zeros_like(weight)
        buffer = hidden.new_empty(min(ctx.rows, len(hidden)), len(weight))
        for start in range(0, len(hidden), ctx.rows):
            part = slice(start, start + ctx.rows)
            scores = torch.mm(hidden[part], weight.T, out=buffer[: len(hidden[part])]).to(log_totals.dtype)
            scores.sub_(log_totals[part].unsqueeze(1)).exp_().mul_(-above[part])  # −g p
            scores.scatter_add_(1, targets[part].unsqueeze(1), above[part])  # + g at the target
            to_weight.addmm_(scores.to(weight.dtype).T, hidden[part])
        return to_hidden, to_weight, None, None
