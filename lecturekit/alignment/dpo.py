"""Direct Preference Optimization: learn from pairs of answers, with no reward model and no reinforcement learning.

Rafailov et al., "Direct Preference Optimization: Your Language Model is Secretly a Reward Model", NeurIPS 2023;
slides "Direct Preference Optimization (DPO)". The first of the two slides has the brackets right: both log-ratios
belong inside the sigmoid. The functions follow the paper's derivation: the optimum of reward minus KL (eq. 4), the
reward that a policy stands for (eq. 5), log pi(y | x), the loss (eq. 7), and what its gradient weighs pairs by (§4).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lecturekit.arguments import require_integers, require_number, require_tensor, widened


def optimal_policy(reference: Tensor, rewards: Tensor, beta: float) -> Tensor:
    """The policy that no other beats in reward minus beta · KL: pi*(y | x) = pi_ref(y | x) exp(r(x, y) / beta) / Z(x).

    reference: (..., answers) probabilities, each row adding up to 1. rewards: (..., answers). beta > 0, in the rewards'
    unit. Returns (..., answers), float32 or wider. Computed through logarithms, so that no reward overflows; an answer
    that the reference never gives stays impossible. Rafailov et al. 2023, eq. 4 (derivation in appendix A.1).
    Raises TypeError for wrong types or dtypes, ValueError for shapes that differ, NaN, infinity, rows that are no
    probabilities, or beta <= 0.
    """
    require_tensor("reference", reference, finite=True)
    require_tensor("rewards", rewards, finite=True)
    _require_same_shape("rewards", rewards, "reference", reference)
    if reference.ndim == 0:
        raise ValueError("reference must have a dimension of answers, got a single number")
    beta = _positive("beta", beta)
    wide = widened(reference)
    # half-precision probabilities are each off by half a rounding, and so is their sum
    slack = 1e-4 + reference.shape[-1] * torch.finfo(reference.dtype).eps
    if bool((wide < 0).any()) or bool(((wide.sum(-1) - 1).abs() > slack).any()):
        raise ValueError(
            "reference must hold probabilities, each row adding up to 1: apply softmax(-1) to logits first"
        )
    return torch.softmax(wide.log() + rewards.to(wide.dtype) / beta, dim=-1)


def implicit_reward(policy: Tensor, reference: Tensor, beta: float) -> Tensor:
    """The reward that a policy stands for, up to a constant a prompt: beta · [log pi(y | x) - log pi_ref(y | x)].

    policy, reference: log-probabilities of the same answers, in nats, of one shape. beta > 0. Returns that shape,
    float32 or wider. What is left out, beta log Z(x), is the same for all answers to a prompt, so it cancels when two
    of them are compared. Rafailov et al. 2023, eq. 5. Errors as for dpo_loss.
    """
    require_tensor("policy", policy, finite=True)
    require_tensor("reference", reference, finite=True)
    _require_same_shape("reference", reference, "policy", policy)
    beta = _positive("beta", beta)
    return beta * (widened(policy) - widened(reference))


def sequence_logprob(logits: Tensor, tokens: Tensor, mask: Tensor) -> Tensor:
    """Log-probability of each response, log pi(y | x): the sum of its tokens' log-probabilities, in nats.

    logits: (batch, seq, vocab), where position t predicts token t + 1. tokens: (batch, seq), integers.
    mask: (batch, seq) bool, true on the tokens of the response. Returns (batch,), float32 or wider.
    Nothing predicts token 0, so mask[:, 0] has no effect (as in TRL); a row without response tokens gives 0. Tokens
    outside the mask are not looked at and may be any padding value. A logit of -infinity is a word that never comes.
    Differentiable in logits.
    Raises TypeError for wrong types or dtypes, ValueError for shapes that do not match, seq < 2, response tokens
    outside the vocabulary, or logits from which no log-probability follows: NaN, +infinity, nothing but -infinity.
    """
    require_tensor("logits", logits, ndim=3)
    require_integers("tokens", tokens, ndim=2)
    require_tensor("mask", mask, ndim=2, dtype=torch.bool)
    batch, seq, vocab = logits.shape
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
    sums, largest = [], []
    for row, row_predicted, row_response in zip(logits.unbind(), predicted, response, strict=True):
        scores = widened(row[:-1][row_response])  # (response, vocab)
        chosen = scores.gather(1, row_predicted[row_response].unsqueeze(1)).squeeze(1)  # (response,)
        sums.append((chosen - scores.logsumexp(dim=1)).sum())
        largest.append(scores.detach().amax(dim=1))  # finite unless there is NaN, +infinity, or nothing else
    if not bool(torch.cat(largest).isfinite().all()):
        raise ValueError(
            "logits must be free of NaN and +infinity where they predict the response, and not all -infinity there"
        )
    return torch.stack(sums)


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
    return -F.logsigmoid(_margin(policy_chosen, policy_rejected, reference_chosen, reference_rejected, beta)).mean()


def gradient_weight(
    policy_chosen: Tensor, policy_rejected: Tensor, reference_chosen: Tensor, reference_rejected: Tensor, beta: float
) -> Tensor:
    """How strongly the gradient of the loss pulls at each pair, from 0 (settled) to 1 (ranked the wrong way round).

    sigmoid(r_rejected - r_chosen) of the implicit rewards. The gradient of a pair's loss is -beta times this times
    (grad log pi(chosen) - grad log pi(rejected)). Arguments and errors as for dpo_loss. Returns (batch,), float32 or
    wider. Rafailov et al. 2023, §4, "What does the DPO update do?".
    """
    return torch.sigmoid(-_margin(policy_chosen, policy_rejected, reference_chosen, reference_rejected, beta))


def dpo_nll_loss(
    policy_chosen: Tensor,
    policy_rejected: Tensor,
    reference_chosen: Tensor,
    reference_rejected: Tensor,
    chosen_tokens: Tensor,
    beta: float,
    weight: float,
) -> Tensor:
    """The DPO loss plus weight times the winners' negative log-likelihood a token, which keeps the winners likely.

    chosen_tokens: (batch,) integers of at least 1, how many tokens each chosen answer has. weight >= 0. The second term
    is the mean over all tokens of all winners, so it is supervised fine-tuning on them (TRL's loss type "sft").
    The other arguments, result and errors as for dpo_loss. Pang et al., "Iterative Reasoning Preference Optimization",
    2024, eq. 1 (there the weight, α, stands before the DPO term instead, and each answer is averaged by itself);
    Llama 3 (2024), §4.1.4, has it here, before the likelihood, and uses 0.2.
    """
    loss = dpo_loss(policy_chosen, policy_rejected, reference_chosen, reference_rejected, beta)
    require_integers("chosen_tokens", chosen_tokens, ndim=1)
    _require_same_shape("chosen_tokens", chosen_tokens, "policy_chosen", policy_chosen)
    if bool((chosen_tokens < 1).any()):
        raise ValueError("chosen_tokens must be at least 1 for each answer, got a smaller count")
    weight = require_number("weight", weight)
    if weight < 0:
        raise ValueError(f"weight must not be negative, got {weight}")
    return loss - weight * policy_chosen.to(loss.dtype).sum() / chosen_tokens.sum()


@torch.no_grad()
def reference_logprobs(
    reference: Callable[[Any], tuple[Tensor, Tensor]], batches: Iterable[Any]
) -> list[tuple[Tensor, Tensor]]:
    """The reference's log-probabilities of all pairs, computed once, so that training needs no second model.

    reference(batch) -> (chosen, rejected), each (pairs,). batches: whatever reference takes, in the order of training.
    Returns one (chosen, rejected) a batch, without a graph. A reference that is an nn.Module is asked in evaluation
    mode (dropout would make the numbers random) and left in the mode it was in. Slide "Can be pre-computed offline".
    Raises TypeError when reference is not callable.
    """
    if not callable(reference):
        raise TypeError(f"reference must be callable, got {type(reference).__name__}")
    training = isinstance(reference, nn.Module) and reference.training
    if isinstance(reference, nn.Module):
        reference.eval()
    try:
        cached = []
        for batch in batches:
            chosen, rejected = reference(batch)
            cached.append((chosen, rejected))
        return cached
    finally:
        if isinstance(reference, nn.Module):
            reference.train(training)


def _margin(
    policy_chosen: Tensor, policy_rejected: Tensor, reference_chosen: Tensor, reference_rejected: Tensor, beta: float
) -> Tensor:
    """The chosen answer's implicit reward minus the rejected one's, pair by pair: (batch,)."""
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
    beta = _positive("beta", beta)
    wide = [widened(term) for term in terms.values()]
    chosen_ratio = wide[0] - wide[2]  # log pi(y_win | x) / pi_ref(y_win | x)
    rejected_ratio = wide[1] - wide[3]
    return beta * (chosen_ratio - rejected_ratio)


def _positive(name: str, value: Any) -> float:
    value = require_number(name, value)
    if value <= 0:
        raise ValueError(f"{name} must be above 0, got {value}")
    return value


def _require_same_shape(name: str, value: Tensor, other_name: str, other: Tensor) -> None:
    if value.shape != other.shape:
        raise ValueError(f"{name} must have {other_name}'s shape {tuple(other.shape)}, got {tuple(value.shape)}")
