"""The reward model of RLHF: learn from pairs of answers which of two a person likes better.

Bradley and Terry 1952 (the model), Christiano et al. 2017 and Ouyang et al. 2022, eq. 1 (its use); slide "Training
the Reward Model". The reward of a text is a number that only its differences give a meaning to: adding the same
constant to all rewards changes no preference. `RewardHead.standardise` therefore puts the rewards of the texts it is
given, for example those of the training pairs, at mean 0 and standard deviation 1.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lecturekit.arguments import require_positive_int, require_tensor, widened
from lecturekit.statistics import wilson


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
    return widened(chosen), widened(rejected)


@dataclass(frozen=True)
class Accuracy:
    """A fraction of right pairs with its interval. fraction, low, high: in 0 … 1. pairs: how many were judged."""

    fraction: float
    low: float
    high: float
    pairs: int

    def __str__(self) -> str:
        return f"{self.fraction:.0%} of {self.pairs} pairs (95 % interval {self.low:.0%} to {self.high:.0%})"


def pair_accuracy(chosen: Tensor, rejected: Tensor) -> Accuracy:
    """How often the better answer has the higher reward; a tie counts as half right.

    chosen, rejected: (pairs,). The interval is Wilson's of 95 %.
    Raises what reward_loss raises.
    """
    chosen, rejected = _pairs(chosen.detach(), rejected.detach())
    right = float((chosen > rejected).double().sum() + 0.5 * (chosen == rejected).double().sum())
    return Accuracy(right / len(chosen), *wilson(right / len(chosen), len(chosen)), len(chosen))


class RewardHead(nn.Module):
    """A reward for each feature vector: r = (f(x) − mean) / std, with f linear, or an MLP with one hidden layer.

    dim: length of a feature vector, for example 384 from MiniLM. hidden: width of the MLP, 0 for a linear f.
    x: (…, dim) → (…). mean and std are buffers, 0 and 1 until `standardise` sets them.
    Raises TypeError unless both are ints, ValueError for dim < 1 or hidden < 0.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, dim: int, hidden: int = 0) -> None:
        super().__init__()
        require_positive_int("dim", dim)
        if isinstance(hidden, bool) or not isinstance(hidden, int):
            raise TypeError(f"hidden must be an int, got {type(hidden).__name__}")
        if hidden < 0:
            raise ValueError(f"hidden must be the width of the MLP, or 0 for a linear function, got {hidden}")
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
