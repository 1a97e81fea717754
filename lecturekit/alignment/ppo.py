"""Fine-tuning with reinforcement learning: maximise E[r(x, y)] − β KL(π ‖ π_ref), one token at a time.

Schulman et al. 2016 (generalised advantage estimation, eqs. 11–16), Schulman et al. 2017 (PPO, eq. 7), Ouyang et al.
2022 (the KL penalty on each token), Shao et al. 2024 (GRPO: group advantages), Schulman 2020, "Approximating KL
divergence" (k1, k2, k3). Slide "Fine-tuning with Reinforcement Learning".

In all of these, a row is one sampled response and a column one token. mask (batch, seq) is true on the response's
tokens; everything else is padding, whose values may be anything and must change nothing.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lecturekit.arguments import require_number, require_tensor, widened


def kl_estimators(logprobs: Tensor, reference: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Three estimates of KL(π ‖ π_ref) from each token that π sampled: k1, k2, k3, in nats.

    logprobs, reference: log π(token) and log π_ref(token), of one shape → three tensors of that shape. With
    log r = log π_ref − log π:
    k1 = −log r            unbiased; negative for about half of the tokens
    k2 = ½ (log r)²        biased; its error vanishes as the two models meet
    k3 = (r − 1) − log r   unbiased and never negative: r − 1 has mean 0 under π
    Schulman 2020. The tokens must be samples of π, else none of these estimates KL(π ‖ π_ref).
    Raises TypeError for wrong types, ValueError for shapes that differ.
    """
    _alike(logprobs=logprobs, reference=reference)
    log_ratio = widened(reference) - widened(logprobs)
    return -log_ratio, 0.5 * log_ratio.square(), torch.expm1(log_ratio) - log_ratio


def token_rewards(score: Tensor, logprobs: Tensor, reference: Tensor, mask: Tensor, beta: float) -> Tensor:
    """The reward of every token: −β (log π − log π_ref), and on the response's last token the score besides.

    score: (batch,) reward of each whole response. logprobs, reference: (batch, seq) log-probabilities of its tokens
    under the policy that sampled them and under the reference. beta >= 0 → (batch, seq), 0 outside mask.
    The sum over a row estimates r(x, y) − β KL(π ‖ π_ref). No gradient flows: rewards are data.
    Raises TypeError or ValueError for wrong types, shapes that do not match, beta < 0, or a row without a response.
    Ouyang et al. 2022, eq. 2; slide "Fine-tuning with Reinforcement Learning".
    """
    _check(mask, logprobs=logprobs, reference=reference)
    require_tensor("score", score, ndim=1)
    if len(score) != len(mask):
        raise ValueError(f"score must be (batch,) = ({len(mask)},), got {tuple(score.shape)}")
    if require_number("beta", beta) < 0:
        raise ValueError(f"beta must be at least 0, got {beta}")
    rewards = torch.where(mask, -beta * (widened(logprobs) - widened(reference)), 0.0).detach()
    rows = torch.arange(len(mask), device=mask.device)
    rewards[rows, _last(mask)] += score.detach().to(rewards.dtype)
    return rewards


def gae(rewards: Tensor, values: Tensor, mask: Tensor, gamma: float, lam: float) -> tuple[Tensor, Tensor]:
    """Generalised advantage estimation: A_t = Σ_l (γλ)^l δ_{t+l}, with δ_t = r_t + γ V_{t+1} − V_t.

    rewards, values: (batch, seq); values[:, t] is the value of the state *before* token t. After the last token of
    the response the episode is over: the value there is 0. gamma, lam: in 0 … 1.
    Returns (advantages, returns), both (batch, seq) and 0 outside mask; returns = advantages + values is what the
    value head learns. λ = 1 gives the sum of the discounted rewards to come, minus the value; λ = 0 gives δ alone.
    No gradient flows. Raises as token_rewards does, and for gamma or lam outside 0 … 1. Schulman et al. 2016, eq. 16.
    """
    _check(mask, rewards=rewards, values=values)
    for name, number in (("gamma", gamma), ("lam", lam)):
        if not 0 <= require_number(name, number) <= 1:
            raise ValueError(f"{name} must be in 0 … 1, got {number}")
    rewards = torch.where(mask, widened(rewards), 0.0).detach()  # padding may hold anything, NaN too
    values = torch.where(mask, widened(values), 0.0).detach()
    advantages = torch.zeros_like(values)
    running = torch.zeros_like(values[:, 0])  # (batch,), the advantage of the token after this one
    following = torch.zeros_like(running)  # (batch,), its value
    for t in range(values.shape[1] - 1, -1, -1):
        delta = rewards[:, t] + gamma * following - values[:, t]
        running = torch.where(mask[:, t], delta + gamma * lam * running, 0.0)
        following = values[:, t]
        advantages[:, t] = running
    return advantages, advantages + values


def whiten(advantages: Tensor, mask: Tensor) -> Tensor:
    """(A − mean) / (std + 1e-8) over the tokens in mask, 0 outside. advantages, mask: (batch, seq) → (batch, seq).

    std is the sample's, with n − 1 below the sum as in torch.std. Raises ValueError for fewer than two tokens.
    """
    _check(mask, advantages=advantages)
    inside = widened(advantages)[mask]
    if len(inside) < 2:
        raise ValueError("mask must hold at least two tokens, or there is no standard deviation")
    return torch.where(mask, (widened(advantages) - inside.mean()) / (inside.std() + 1e-8), 0.0)


def advantages_and_returns(
    rewards: Tensor, values: Tensor, mask: Tensor, gamma: float, lam: float
) -> tuple[Tensor, Tensor]:
    """`gae`, then its advantages whitened over the mask; the returns are those of the advantages as they were.

    Arguments, shapes and errors as for gae and whiten.
    """
    advantages, returns = gae(rewards, values, mask, gamma, lam)
    return whiten(advantages, mask), returns


def policy_loss(logprobs: Tensor, old_logprobs: Tensor, advantages: Tensor, mask: Tensor, epsilon: float) -> Tensor:
    """PPO's clipped objective as a loss: −mean over the mask of min(ρ A, clip(ρ, 1 − ε, 1 + ε) A), ρ = π / π_old.

    logprobs: (batch, seq) of the policy now, with gradient. old_logprobs: of the policy that sampled the tokens, stored
    then. advantages: (batch, seq). epsilon: above 0 → a scalar to minimise; its gradient flows to logprobs only.
    Schulman et al. 2017, eq. 7. Raises TypeError or ValueError for wrong types, shapes or epsilon, or an empty mask.
    """
    _check(mask, logprobs=logprobs, old_logprobs=old_logprobs, advantages=advantages)
    if require_number("epsilon", epsilon) <= 0:
        raise ValueError(f"epsilon must be above 0, got {epsilon}")
    ratio = (widened(logprobs)[mask] - widened(old_logprobs)[mask].detach()).exp()  # (tokens,)
    inside = widened(advantages)[mask].detach()
    return -torch.minimum(ratio * inside, ratio.clamp(1 - epsilon, 1 + epsilon) * inside).mean()


def value_loss(values: Tensor, old_values: Tensor, returns: Tensor, mask: Tensor, epsilon: float) -> Tensor:
    """Half the squared error of the value head, the larger of clipped and unclipped, averaged over the mask.

    values: (batch, seq) now, with gradient; old_values: when the responses were sampled; returns: from gae.
    A value may profit from moving at most epsilon away from the old one. Returns a scalar.
    Not in the PPO paper: it is in its authors' code, and in that of Ziegler et al. 2019 (lm-human-preferences).
    Raises as policy_loss does.
    """
    _check(mask, values=values, old_values=old_values, returns=returns)
    if require_number("epsilon", epsilon) <= 0:
        raise ValueError(f"epsilon must be above 0, got {epsilon}")
    now, old, wanted = (widened(t)[mask] for t in (values, old_values.detach(), returns.detach()))
    near = old + (now - old).clamp(-epsilon, epsilon)
    return 0.5 * torch.maximum((now - wanted).square(), (near - wanted).square()).mean()


def group_advantages(rewards: Tensor, epsilon: float = 1e-4) -> Tensor:
    """GRPO: each response's reward relative to its group, (r − mean) / (std + epsilon); there is no value head.

    rewards: (groups, size), the rewards of `size` responses to each of `groups` prompts → the same shape. std is the
    group's own, with size − 1 below the sum. All tokens of a response get its one advantage.
    Raises ValueError for fewer than two responses in a group. Shao et al. 2024, section 4.1.2; epsilon as in TRL.
    """
    require_tensor("rewards", rewards, ndim=2)
    if rewards.shape[1] < 2:
        raise ValueError(f"rewards must be (groups, size) with at least 2 responses, got {tuple(rewards.shape)}")
    wide = widened(rewards)
    return (wide - wide.mean(dim=1, keepdim=True)) / (wide.std(dim=1, keepdim=True) + epsilon)


def _alike(**tensors: Tensor) -> None:
    first: tuple[str, Tensor] | None = None
    for name, tensor in tensors.items():
        require_tensor(name, tensor)
        if first is not None and tensor.shape != first[1].shape:
            raise ValueError(f"{name} must be {tuple(first[1].shape)} as {first[0]} is, got {tuple(tensor.shape)}")
        first = first or (name, tensor)


def _check(mask: Tensor, **tensors: Tensor) -> None:
    require_tensor("mask", mask, ndim=2, dtype=torch.bool)
    if not bool(mask.any(dim=1).all()):
        raise ValueError("mask must be true for at least one token of every response")
    for name, tensor in tensors.items():
        require_tensor(name, tensor, ndim=2)
        if tensor.shape != mask.shape:
            raise ValueError(f"{name} must be (batch, seq) = {tuple(mask.shape)}, got {tuple(tensor.shape)}")


def _last(mask: Tensor) -> Tensor:
    """The place of each row's last true entry. (batch, seq) → (batch,)"""
    positions = torch.arange(mask.shape[1], device=mask.device)
    return torch.where(mask, positions, -1).amax(dim=1)
