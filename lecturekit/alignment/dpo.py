"""Direct Preference Optimization: learn from pairs of answers, with no reward model and no reinforcement learning.

Rafailov et al., "Direct Preference Optimization: Your Language Model is Secretly a Reward Model", NeurIPS 2023,
eq. 7; slides "Direct Preference Optimization (DPO)". The first of the two slides has the brackets right: both
log-ratios belong inside the sigmoid.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from lecturekit.arguments import require_number, require_tensor


def sequence_logprob(logits: Tensor, tokens: Tensor, mask: Tensor) -> Tensor:
    """Log-probability of each response, log pi(y | x): the sum of its tokens' log-probabilities, in nats.

    logits: (batch, seq, vocab), where position t predicts token t + 1. tokens: (batch, seq), integers.
    mask: (batch, seq) bool, true on the tokens of the response. Returns (batch,), float32 or wider.
    Nothing predicts token 0, so mask[:, 0] has no effect (as in TRL); a row without response tokens gives 0. Tokens
    outside the mask are not looked at and may be any padding value. Differentiable in logits.
    Raises TypeError for wrong types or dtypes, ValueError for shapes that do not match, seq < 2, response tokens
    outside the vocabulary, or logits from which no log-probability follows (NaN, +infinity).
    """
    require_tensor("logits", logits, ndim=3)
    require_tensor("tokens", tokens, ndim=2, floating=False)
    require_tensor("mask", mask, ndim=2, dtype=torch.bool)
    batch, seq, vocab = logits.shape
    if tokens.is_floating_point() or tokens.is_complex() or tokens.dtype == torch.bool:
        raise TypeError(f"tokens must have an integer dtype, got {tokens.dtype}")
    for name, tensor in (("tokens", tokens), ("mask", mask)):
        if tensor.shape != (batch, seq):
            raise ValueError(f"{name} must be (batch, seq) = {(batch, seq)} to match logits, got {tuple(tensor.shape)}")
    if seq < 2:
        raise ValueError(f"logits must cover at least 2 positions, the first predicting the second, got seq = {seq}")

    predicted, response = tokens[:, 1:].long(), mask[:, 1:]
    if bool(((predicted < 0) | (predicted >= vocab))[response].any()):
        raise ValueError(f"tokens must be in 0..{vocab - 1} where mask is true, got one outside")
    # One sequence at a time, its response only, and logsumexp instead of log_softmax: the memory needed beside the
    # logits stays that of one response, where log_softmax would keep a second tensor of the size of logits.
    sums = []
    for row, row_predicted, row_response in zip(logits.unbind(), predicted, response, strict=True):
        scores = row[:-1][row_response]  # (response, vocab)
        scores = scores.to(torch.promote_types(scores.dtype, torch.float32))
        chosen = scores.gather(1, row_predicted[row_response].unsqueeze(1)).squeeze(1)  # (response,)
        sums.append((chosen - scores.logsumexp(dim=1)).sum())
    result = torch.stack(sums)
    if bool(result.isnan().any()):
        raise ValueError("logits must be free of NaN and +infinity where they predict the response, got one")
    return result


def dpo_loss(
    policy_chosen: Tensor, policy_rejected: Tensor, reference_chosen: Tensor, reference_rejected: Tensor, beta: float
) -> Tensor:
    """The DPO loss, averaged over pairs: -log sigmoid(beta * [(pi_c - ref_c) - (pi_r - ref_r)]).

    policy_*, reference_*: (batch,) log-probabilities of the chosen and the rejected answers, in nats, from the model
    that is trained and from the frozen one it started as (these can be computed once, beforehand). beta > 0: how
    strongly the policy is held to the reference. Returns a scalar, float32 or wider. Differentiable; loss and
    gradients stay finite however large the margin. Rafailov et al. 2023, eq. 7.
    Raises TypeError for wrong types or dtypes, ValueError for shapes that differ, NaN, infinity or beta <= 0.
    """
    terms = {
        "policy_chosen": policy_chosen,
        "policy_rejected": policy_rejected,
        "reference_chosen": reference_chosen,
        "reference_rejected": reference_rejected,
    }
    for name, term in terms.items():
        require_tensor(name, term, ndim=1, finite=True)
        if term.shape != policy_chosen.shape:
            raise ValueError(f"{name} must be (batch,) = {tuple(policy_chosen.shape)}, got {tuple(term.shape)}")
    beta = require_number("beta", beta)
    if beta <= 0:
        raise ValueError(f"beta must be above 0, got {beta}")
    wide = [term.to(torch.promote_types(term.dtype, torch.float32)) for term in terms.values()]
    chosen_ratio = wide[0] - wide[2]  # log pi(y_win | x) / pi_ref(y_win | x)
    rejected_ratio = wide[1] - wide[3]
    return -F.logsigmoid(beta * (chosen_ratio - rejected_ratio)).mean()
