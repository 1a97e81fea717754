"""The reward model of RLHF: learn from pairs of answers which of two a person likes better.

Bradley and Terry 1952 (the model), Christiano et al. 2017 and Ouyang et al. 2022, eq. 1 (its use); slide "Training
the Reward Model". The reward of a text is a number that only its differences give a meaning to: adding the same
constant to all rewards changes no preference. `fit` therefore puts the rewards of the training texts at mean 0 and
standard deviation 1.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lecturekit.arguments import require_number, require_positive_int, require_tensor
from lecturekit.runtime import progress


def reward_loss(chosen: Tensor, rejected: Tensor) -> Tensor:
    """The Bradley–Terry loss, averaged over pairs: −log σ(r_win − r_lose), in nats.

    chosen, rejected: (pairs,) rewards of the better and of the worse answer → a scalar, float32 or wider.
    ln 2 when the two are equal; loss and gradients stay finite however large the difference.
    Raises TypeError for wrong types, ValueError for shapes that differ, no pairs, NaN or infinity.
    Slide "Training the Reward Model" (which maximises the negative of this); Ouyang et al. 2022, eq. 1.
    """
    chosen, rejected = _pairs(chosen, rejected)
    return -F.logsigmoid(chosen - rejected).mean()


def _pairs(chosen: Tensor, rejected: Tensor) -> tuple[Tensor, Tensor]:
    for name, rewards in (("chosen", chosen), ("rejected", rejected)):
        require_tensor(name, rewards, ndim=1, finite=True)
    if chosen.shape != rejected.shape:
        raise ValueError(f"rejected must be (pairs,) = {tuple(chosen.shape)}, got {tuple(rejected.shape)}")
    wide = torch.promote_types(torch.promote_types(chosen.dtype, rejected.dtype), torch.float32)
    return chosen.to(wide), rejected.to(wide)


@dataclass(frozen=True)
class Accuracy:
    """A fraction of right pairs with its interval. fraction, low, high: in 0 … 1. pairs: how many were judged."""

    fraction: float
    low: float
    high: float
    pairs: int

    def __str__(self) -> str:
        return f"{self.fraction:.0%} of {self.pairs} pairs (95 % interval {self.low:.0%} to {self.high:.0%})"


def pair_accuracy(chosen: Tensor, rejected: Tensor, z: float = 1.96) -> Accuracy:
    """How often the better answer has the higher reward; a tie counts as half right.

    chosen, rejected: (pairs,). The interval is Wilson's, for z standard deviations: 1.96 gives 95 %.
    Raises what reward_loss raises.
    """
    chosen, rejected = _pairs(chosen.detach(), rejected.detach())
    right = float((chosen > rejected).double().sum() + 0.5 * (chosen == rejected).double().sum())
    return Accuracy(right / len(chosen), *wilson(right / len(chosen), len(chosen), z), len(chosen))


def wilson(fraction: float, count: int, z: float = 1.96) -> tuple[float, float]:
    """Wilson's interval (low, high) for a fraction found in `count` independent trials, within 0 … 1.

    Unlike fraction ± z·sqrt(fraction (1 − fraction) / count) it is right near 0 and 1 and for few trials.
    Raises ValueError unless 0 <= fraction <= 1 and count >= 1. Wilson 1927.
    """
    require_positive_int("count", count)
    if not 0 <= require_number("fraction", fraction) <= 1:
        raise ValueError(f"fraction must be in 0 … 1, got {fraction}")
    middle = (fraction + z**2 / (2 * count)) / (1 + z**2 / count)
    half = z / (1 + z**2 / count) * math.sqrt(fraction * (1 - fraction) / count + z**2 / (4 * count**2))
    return max(0.0, middle - half), min(1.0, middle + half)


class RewardHead(nn.Module):
    """A reward for each feature vector: r = (f(x) − mean) / std, with f linear, or an MLP with one hidden layer.

    dim: length of a feature vector, for example 384 from MiniLM. hidden: width of the MLP, 0 for a linear f.
    x: (…, dim) → (…). mean and std are buffers, 0 and 1 until `fit` or `standardise` sets them.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, dim: int, hidden: int = 0) -> None:
        super().__init__()
        require_positive_int("dim", dim)
        self.f: nn.Module = nn.Linear(dim, 1)
        if hidden:
            self.f = nn.Sequential(nn.Linear(dim, hidden), nn.Tanh(), nn.Linear(hidden, 1))
        self.register_buffer("mean", torch.zeros(()))
        self.register_buffer("std", torch.ones(()))

    def forward(self, features: Tensor) -> Tensor:
        return (self.f(features).squeeze(-1) - self.mean) / self.std

    @torch.no_grad()
    def standardise(self, features: Tensor) -> RewardHead:
        """Shift and scale the rewards so that these texts' have mean 0 and standard deviation 1. features: (n, dim)."""
        raw = self.f(features).squeeze(-1)
        if len(raw) < 2 or not float(raw.std()) > 0:
            raise ValueError("features must hold at least two texts with different rewards")
        self.mean.copy_(raw.mean())
        self.std.copy_(raw.std())
        return self


def fit(
    head: RewardHead,
    chosen: Tensor,
    rejected: Tensor,
    steps: int = 300,
    lr: float = 1e-2,
    weight_decay: float = 1e-2,
    batch_size: int = 0,
    seed: int = 0,
) -> list[float]:
    """Train the head on pairs with the Bradley–Terry loss and AdamW, then standardise it on the texts it has seen.

    chosen, rejected: (pairs, dim) features. batch_size: pairs in a step, 0 for all of them. Returns the loss of each
    step, in nats. Raises ValueError when the two are not (pairs, dim) alike.
    """
    require_tensor("chosen", chosen, ndim=2, finite=True)
    require_tensor("rejected", rejected, ndim=2, finite=True)
    if chosen.shape != rejected.shape:
        raise ValueError(f"rejected must be (pairs, dim) = {tuple(chosen.shape)}, got {tuple(rejected.shape)}")
    require_positive_int("steps", steps)
    optimizer = torch.optim.AdamW(head.parameters(), lr=lr, weight_decay=weight_decay)
    generator = torch.Generator().manual_seed(seed)
    losses = []
    # the raw rewards are trained: standardising only makes the numbers readable afterwards
    for _ in progress(range(steps), "reward model"):
        pick = slice(None)
        if 0 < batch_size < len(chosen):
            pick = torch.randperm(len(chosen), generator=generator)[:batch_size].to(chosen.device)  # type: ignore[assignment]
        loss = reward_loss(head.f(chosen[pick]).squeeze(-1), head.f(rejected[pick]).squeeze(-1))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    head.standardise(torch.cat([chosen, rejected]))
    return losses
