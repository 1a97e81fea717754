"""The questions of lab 2: reward model, KL estimators, token rewards, advantages, the clipped objective, GRPO's groups.

Ouyang et al. 2022 (RLHF), Schulman et al. 2016 (GAE) and 2017 (PPO), Schulman 2020 (KL estimators), Shao et al. 2024
(GRPO).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from lecturekit.checking import Case, Draw, Unfit, question
from lecturekit.checking.compare import describe, precision

LAB = "lab02_rlhf"
REWARD_SLIDE = "RLHF: Training the Reward Model"
TUNING_SLIDE = "RLHF: Fine-tuning with Reinforcement Learning"

# rlhf.reward ---------------------------------------------------------------------------------------------------------


@question("rlhf.reward", lab=LAB, points=10, slide=REWARD_SLIDE)
def reward(draw: Draw) -> Case:
    """The Bradley–Terry loss of a reward model."""
    edge = draw.edge("equal rewards", "one pair", "a difference of +10,000", "a difference of -10,000")
    pairs = 1 if edge == "one pair" else draw.integer(3, 7)
    chosen, rejected = draw.normal(pairs, scale=2.0), draw.normal(pairs, scale=2.0)
    if edge == "equal rewards":
        rejected = chosen.clone()
    elif edge == "a difference of +10,000":
        chosen[0] += 10_000
    elif edge == "a difference of -10,000":
        rejected[0] += 10_000
    return Case(edge, chosen=chosen, rejected=rejected)


reward.oracle("lecturekit.alignment.reward:reward_loss")


def _size_of_difference(case: Case) -> Tensor:
    return 1 + case.chosen.double().abs() + case.rejected.double().abs()


reward.tolerance(
    ulps=lambda case: len(case.chosen) + 6,
    magnitude=lambda case, _: _size_of_difference(case).mean(),
    why="a subtraction rounds once, logsigmoid does not stretch that and rounds about 4 times, then the mean's sum",
    part="loss",
)
for _part in ("gradient of chosen", "gradient of rejected"):
    reward.tolerance(
        ulps=8,
        magnitude=lambda case, _: _size_of_difference(case) / len(case.chosen),
        why="σ(−difference) / pairs: one rounding of the difference at a slope of at most 1/4, about 4 of the factors",
        part=_part,
    )


@reward.driver
def _(function: Any, case: Case) -> dict[str, Any]:
    """The loss and its gradients, which are what trains a reward model."""
    rewards = [case.chosen.requires_grad_(), case.rejected.requires_grad_()]
    value = function(*rewards)
    _require_gradient(value, "the loss", "the rewards")
    chosen, rejected = torch.autograd.grad(value.sum(), rewards, materialize_grads=True)
    return {"loss": value.detach(), "gradient of chosen": chosen, "gradient of rejected": rejected}


def _require_gradient(value: Any, what: str, to: str) -> None:
    if not isinstance(value, Tensor):
        raise Unfit(f"{what} must be a tensor, so that it can be trained on, got {describe(value)}")
    if not value.requires_grad:
        raise Unfit(f"{what} has no gradient to {to}: a .detach(), .item(), .data or no_grad on the way?")


reward.law("the loss is the negative logarithm of a probability, so not below 0", lambda _, p: float(p["loss"]) >= 0)
reward.law(
    "a step against the gradient raises the better answer's reward and lowers the worse one's",
    lambda _, p: bool((p["gradient of chosen"] <= 0).all() and (p["gradient of rejected"] >= 0).all()),
)
reward.law(
    "adding a constant to all rewards changes nothing: the gradients of a pair cancel",
    lambda case, p: bool(
        (
            (p["gradient of chosen"] + p["gradient of rejected"]).double().abs()
            <= 16 * precision(case, case.chosen) * _size_of_difference(case) / len(case.chosen)
        ).all()
    ),
)


@reward.misconception(
    "has the sign of what is maximised",
    hint="The slide says max, an optimizer goes down. What turns one into the other?",
)
def _(chosen, rejected):
    return F.logsigmoid(chosen - rejected).mean()


@reward.misconception(
    "prefers the rejected answer", hint="Raise the reward of the better answer. Which way goes the loss?"
)
def _(chosen, rejected):
    return -F.logsigmoid(rejected - chosen).mean()


@reward.misconception(
    "leaves the logarithm out",
    hint="The slide has σ inside of something. What does the slope look like far out without it?",
)
def _(chosen, rejected):
    return -torch.sigmoid(chosen - rejected).mean()


@reward.misconception(
    "leaves the sigmoid out", hint="Is a pair that is already told apart by a wide margin worth another step?"
)
def _(chosen, rejected):
    return (rejected - chosen).mean()


@reward.misconception(
    "adds pairs up instead of taking their mean",
    hint="Should a batch of twice the pairs make a step of twice the size?",
)
def _(chosen, rejected):
    return -F.logsigmoid(chosen - rejected).sum()


@reward.misconception(
    "takes the mean before the sigmoid",
    hint="Can one pair that is already clear make up for another that is wrong? Which comes first, sigmoid or mean?",
)
def _(chosen, rejected):
    return -F.logsigmoid((chosen - rejected).mean())


@reward.misconception(
    "judges each answer by itself, not against the other",
    hint="Nobody said that the better answer is good. What did they say?",
)
def _(chosen, rejected):
    return -(F.logsigmoid(chosen) + F.logsigmoid(-rejected)).mean()


@reward.misconception(
    "uses a margin of one instead of the sigmoid",
    hint="That is a support vector machine's loss. Which function has the slide?",
)
def _(chosen, rejected):
    return (1 - (chosen - rejected)).clamp(min=0).mean()


_FINITE_HINT = (
    "Try a difference of -10,000: what is exp of it, and the logarithm of that? torch has one function for both."
)


@reward.misconception("takes sigmoid and logarithm in two steps, which ends in infinity", hint=_FINITE_HINT)
def _(chosen, rejected):
    return -torch.sigmoid(chosen - rejected).log().mean()


@reward.misconception("takes sigmoid and logarithm in two steps, which ends in infinity", hint=_FINITE_HINT)
def _(chosen, rejected):
    return (1 + (rejected - chosen).exp()).log().mean()


_HIDDEN_HINT = "The loss is finite now. What is its gradient where the better answer is behind by 10,000?"


@reward.misconception("hides the infinity behind a small constant", hint=_HIDDEN_HINT)
def _(chosen, rejected):
    return -(torch.sigmoid(chosen - rejected) + 1e-8).log().mean()


@reward.misconception("hides the infinity behind a small constant", hint=_HIDDEN_HINT)
def _(chosen, rejected):
    return -torch.sigmoid(chosen - rejected).clamp(min=1e-8).log().mean()


@reward.alternative("softplus of the difference the other way round")
def _(win, lose):
    return F.softplus(lose - win).mean()


@reward.alternative("logaddexp of the two rewards")
def _(chosen, rejected):
    return (torch.logaddexp(chosen, rejected) - chosen).mean()


@reward.alternative("cross-entropy of two classes")
def _(chosen, rejected):
    classes = torch.zeros(len(chosen), dtype=torch.long, device=chosen.device)
    return F.cross_entropy(torch.stack([chosen, rejected], dim=1), classes)


@reward.alternative("a loop over pairs, float64 inside")
def _(chosen, rejected):
    total = sum(-F.logsigmoid(w.double() - b.double()) for w, b in zip(chosen, rejected, strict=True))
    return (total / len(chosen)).float()


# rlhf.kl -------------------------------------------------------------------------------------------------------------


@question("rlhf.kl", lab=LAB, points=10, slide=TUNING_SLIDE, returns=("k1", "k2", "k3"))
def kl(draw: Draw) -> Case:
    """Three estimators of the KL divergence."""
    edge = draw.edge("policy = reference", "every token of a vocabulary", "far apart", "one token")
    if edge == "every token of a vocabulary":
        vocabulary = draw.integer(5, 9)
        logprobs = draw.normal(1, vocabulary, scale=1.5).log_softmax(-1)
        return Case(edge, logprobs=logprobs, reference=draw.normal(1, vocabulary, scale=1.5).log_softmax(-1))
    rows, columns = (1, 1) if edge == "one token" else draw.sizes(2, low=2, high=7)
    logprobs = -draw.uniform(rows, columns, low=0.1, high=6.0)
    reference = -draw.uniform(rows, columns, low=0.1, high=6.0)
    if edge == "policy = reference":
        reference = logprobs.clone()
    elif edge == "far apart":
        reference = reference - 12
    return Case(edge, logprobs=logprobs, reference=reference)


kl.oracle("lecturekit.alignment.ppo:kl_estimators")


def _size_of_log_ratio(case: Case) -> Tensor:
    return case.logprobs.double().abs() + case.reference.double().abs()


def _ratio(case: Case) -> Tensor:
    return (case.reference.double() - case.logprobs.double()).exp()


kl.tolerance(
    ulps=2, magnitude=lambda case, _: _size_of_log_ratio(case), why="one subtraction, rounded once; a sign", part="k1"
)
kl.tolerance(
    ulps=6,
    magnitude=lambda case, _: _size_of_log_ratio(case).square(),
    why="the square of a rounded difference: twice its rounding, its own and that of the half",
    part="k2",
)
kl.tolerance(
    ulps=8,
    magnitude=lambda case, _: (1 + _ratio(case)) * (1 + _size_of_log_ratio(case)),
    why="exp stretches the rounding of the log-ratio by r and rounds itself; then two subtractions",
    part="k3",
)


def _agree_on_average(case: Case, parts: dict[str, Any]) -> bool | None:
    """Over all tokens, weighted with π, k1 and k3 are the KL divergence itself."""
    if case.label != "every token of a vocabulary":
        return None
    weights = case.logprobs.double().exp()
    size = ((1 + _ratio(case)) * (1 + _size_of_log_ratio(case)) * weights).sum()
    k1, k3 = ((weights * parts[name].double()).sum() for name in ("k1", "k3"))
    return bool((k1 - k3).abs() <= 16 * precision(case, case.logprobs) * size)


kl.law("averaged over what the policy samples, k1 and k3 agree: both are unbiased", _agree_on_average)
kl.law(
    "k2 and k3 are never negative",
    lambda case, parts: bool(
        (parts["k2"] >= 0).all()
        and (
            parts["k3"].double()
            >= -8 * precision(case, case.logprobs) * (1 + _ratio(case)) * (1 + _size_of_log_ratio(case))
        ).all()
    ),
)


@kl.misconception(
    "measures the divergence in the wrong direction",
    hint="KL(π ‖ π_ref) asks how the reference does where the policy samples. Which of the two is subtracted?",
)
def _(logprobs, reference):
    log_ratio = logprobs - reference
    return -log_ratio, log_ratio.square() / 2, log_ratio.exp() - 1 - log_ratio


@kl.misconception(
    "has k1 with the wrong sign",
    hint="Where the policy likes a token better than the reference does, it has moved. Is k1 above 0 there?",
)
def _(logprobs, reference):
    log_ratio = reference - logprobs
    return log_ratio, log_ratio.square() / 2, log_ratio.exp() - 1 - log_ratio


@kl.misconception("forgets the half in k2", hint="Expand exp to second order around 0: which factor has the square?")
def _(logprobs, reference):
    log_ratio = reference - logprobs
    return -log_ratio, log_ratio.square(), log_ratio.exp() - 1 - log_ratio


@kl.misconception(
    "forgets the minus one in k3", hint="What should every estimator say of a policy that equals its reference?"
)
def _(logprobs, reference):
    log_ratio = reference - logprobs
    return -log_ratio, log_ratio.square() / 2, log_ratio.exp() - log_ratio


@kl.misconception(
    "takes the logarithm of the ratio for the ratio in k3",
    hint="The ratio of two equal probabilities is 1. What is its logarithm, and which of the two did you put in?",
)
def _(logprobs, reference):
    log_ratio = reference - logprobs
    return -log_ratio, log_ratio.square() / 2, (log_ratio - 1) - log_ratio


@kl.misconception(
    "takes the inverse ratio in k3",
    hint="k3 adds to k1 something whose mean under π is 0. Is that r − 1 with r = π_ref / π, or with its inverse?",
)
def _(logprobs, reference):
    log_ratio = reference - logprobs
    return -log_ratio, log_ratio.square() / 2, (-log_ratio).exp() - 1 + log_ratio


@kl.misconception(
    "adds the logarithm in k3 instead of subtracting it",
    hint="k3 is k1 plus something of mean 0. What is k1 in terms of log r?",
)
def _(logprobs, reference):
    log_ratio = reference - logprobs
    return -log_ratio, log_ratio.square() / 2, log_ratio.exp() - 1 + log_ratio


@kl.misconception("has k3 with the wrong sign", hint="Draw r − 1 and log r: which of the two is on top?")
def _(logprobs, reference):
    log_ratio = reference - logprobs
    return -log_ratio, log_ratio.square() / 2, 1 + log_ratio - log_ratio.exp()


@kl.misconception(
    "weights with the policy's probability once more",
    hint="The tokens were sampled from π: how often does each come already?",
)
def _(logprobs, reference):
    log_ratio, weight = reference - logprobs, logprobs.exp()
    return -weight * log_ratio, weight * log_ratio.square() / 2, weight * (log_ratio.exp() - 1 - log_ratio)


@kl.misconception(
    "makes k1 positive token by token",
    hint="A divergence is not negative, but is each single term of it? What does |·| do to an unbiased estimate?",
)
def _(logprobs, reference):
    log_ratio = reference - logprobs
    return log_ratio.abs(), log_ratio.square() / 2, log_ratio.exp() - 1 - log_ratio


@kl.misconception(
    "returns one number for all tokens", hint="The penalty goes to each token. How many estimates are needed?"
)
def _(logprobs, reference):
    log_ratio = reference - logprobs
    return (-log_ratio).mean(), (log_ratio.square() / 2).mean(), (log_ratio.exp() - 1 - log_ratio).mean()


@kl.alternative("expm1")
def _(policy, ref):
    d = ref - policy
    return -d, 0.5 * d**2, torch.expm1(d) - d


@kl.alternative("from the policy's side, float64 inside")
def _(logprobs, reference):
    k1 = logprobs.double() - reference.double()
    return [k.float() for k in (k1, k1 * k1 / 2, (-k1).exp() - 1 + k1)]


@kl.alternative("a ratio of probabilities")
def _(logprobs, reference):
    r = reference.double().exp() / logprobs.double().exp()
    return tuple(k.float() for k in (-r.log(), r.log() ** 2 / 2, (r - 1) - r.log()))


# rlhf.rewards --------------------------------------------------------------------------------------------------------


@question("rlhf.rewards", lab=LAB, points=15, slide=TUNING_SLIDE)
def rewards(draw: Draw) -> Case:
    """The reward of each token, with the KL penalty."""
    edge = draw.edge("a response of one token", "no padding", "β = 0", "policy = reference")
    batch, seq = draw.sizes(2, low=3, high=7)
    logprobs = -draw.uniform(batch, seq, low=0.1, high=5.0)
    reference = -draw.uniform(batch, seq, low=0.1, high=5.0)
    return Case(
        edge,
        score=draw.normal(batch, scale=2.0),
        logprobs=logprobs,
        reference=logprobs.clone() if edge == "policy = reference" else reference,
        mask=_lengths_to_mask(draw, batch, seq, edge),
        beta=0.0 if edge == "β = 0" else draw.choice([0.05, 0.1, 0.2]),
    )


def _lengths_to_mask(draw: Draw, batch: int, seq: int, edge: str | None) -> Tensor:
    """Responses that start in column 0 and end where they like; (batch, seq) bool. At least one is padded."""
    lengths = draw.integers(2, seq, batch)
    if edge == "no padding":
        lengths[:] = seq
    else:
        lengths[0], lengths[1] = seq, seq - 1
    if edge == "a response of one token":
        lengths[2] = 1
    return torch.arange(seq, device=lengths.device) < lengths[:, None]


rewards.oracle("lecturekit.alignment.ppo:token_rewards")
rewards.tolerance(
    ulps=4,
    magnitude=lambda case, _: (
        case.beta * (case.logprobs.double().abs() + case.reference.double().abs()) + case.score.double().abs()[:, None]
    ),
    why="a subtraction, a product and a sum: three roundings of the numbers that meet in a token",
)


def _adds_up_to_the_score(case: Case, parts: dict[str, Any]) -> bool | None:
    """Up to roundings: whoever adds −β log π and β log π_ref to the score one after the other rounds each time."""
    if case.label != "policy = reference":
        return None
    met = case.beta * (case.logprobs.double().abs() + case.reference.double().abs()) * case.mask
    allowed = 8 * precision(case, parts["result"]) * (case.score.double().abs() + met.sum(1))
    return bool(((parts["result"].double().sum(1) - case.score.double()).abs() <= allowed).all())


rewards.law("where policy and reference agree, a response's rewards add up to its score", _adds_up_to_the_score)
rewards.law("padding has no reward", lambda case, parts: bool((parts["result"][~case.mask] == 0).all()))


def _penalty(logprobs: Tensor, reference: Tensor, mask: Tensor) -> Tensor:
    return torch.where(mask, logprobs - reference, 0.0)


def _at_the_end(score: Tensor, mask: Tensor) -> Tensor:
    """The scores on the last token of each response. (batch, seq)"""
    last = F.one_hot(mask.sum(1) - 1, mask.shape[1])
    return last * score[:, None]


@rewards.misconception(
    "rewards moving away from the reference",
    hint="A token that the policy likes better than the reference: should it be dearer or cheaper? Mind the sign.",
)
def _(score, logprobs, reference, mask, beta):
    return beta * _penalty(logprobs, reference, mask) + _at_the_end(score, mask)


@rewards.misconception("forgets beta", hint="What tells how much a nat of divergence costs?")
def _(score, logprobs, reference, mask, beta):
    return -_penalty(logprobs, reference, mask) + _at_the_end(score, mask)


@rewards.misconception(
    "leaves the KL penalty out", hint="What keeps the policy near the reference while it climbs the reward?"
)
def _(score, logprobs, reference, mask, beta):
    return _at_the_end(score, mask)


@rewards.misconception(
    "gives the score to every token",
    hint="How often was the response scored? Add your row up: what does a long answer get?",
)
def _(score, logprobs, reference, mask, beta):
    return torch.where(mask, score[:, None], 0.0) - beta * _penalty(logprobs, reference, mask)


@rewards.misconception(
    "shares the score out over the tokens",
    hint="The sum is right. But which token completes the response that is scored? GAE does the sharing later.",
)
def _(score, logprobs, reference, mask, beta):
    share = torch.where(mask, (score / mask.sum(1))[:, None], 0.0)
    return share - beta * _penalty(logprobs, reference, mask)


@rewards.misconception(
    "puts the score in the last column, which is padding",
    hint="Where does each response end? Not all are as long as the row.",
)
def _(score, logprobs, reference, mask, beta):
    result = -beta * _penalty(logprobs, reference, mask)
    result[:, -1] += score
    return result


@rewards.misconception(
    "puts the score on the first token", hint="When is the response there to be scored: at its beginning or at its end?"
)
def _(score, logprobs, reference, mask, beta):
    result = -beta * _penalty(logprobs, reference, mask)
    result[:, 0] += score
    return result


@rewards.misconception("charges padding too", hint="Nobody sampled the padding. What should stand there?")
def _(score, logprobs, reference, mask, beta):
    return -beta * (logprobs - reference) + _at_the_end(score, mask)


@rewards.misconception(
    "replaces the last token's penalty by the score", hint="Add up that row: whose penalty is missing?"
)
def _(score, logprobs, reference, mask, beta):
    last = _at_the_end(torch.ones_like(score), mask).bool()
    return torch.where(last, score[:, None], -beta * _penalty(logprobs, reference, mask))


@rewards.misconception(
    "charges the whole divergence at the end",
    hint="The sum is right. But each token knows what it cost: why should the first wait for the last to hear of it?",
)
def _(score, logprobs, reference, mask, beta):
    return _at_the_end(score - beta * _penalty(logprobs, reference, mask).sum(1), mask)


@rewards.misconception(
    "makes every token's penalty a cost",
    hint="Single terms of k1 may be negative, and their mean is right because of that. What does |·| do to it?",
)
def _(score, logprobs, reference, mask, beta):
    return -beta * _penalty(logprobs, reference, mask).abs() + _at_the_end(score, mask)


@rewards.alternative("index assignment")
def _(r, lp, ref, m, b):
    out = -b * (lp - ref) * m
    out[torch.arange(len(out), device=out.device), m.sum(1) - 1] += r
    return out


@rewards.alternative("a loop over responses")
def _(score, logprobs, reference, mask, beta):
    result = torch.zeros_like(logprobs)
    for i, length in enumerate(mask.sum(1).tolist()):
        result[i, :length] = beta * (reference[i, :length] - logprobs[i, :length])
        result[i, length - 1] = result[i, length - 1] + score[i]
    return result


@rewards.alternative("a mask that is shifted, float64 inside")
def _(score, logprobs, reference, mask, beta):
    follows = torch.cat([mask[:, 1:], torch.zeros_like(mask[:, :1])], dim=1)
    end = mask & ~follows
    return (mask * beta * (reference.double() - logprobs.double()) + end * score.double()[:, None]).float()


@rewards.alternative("score, policy and reference added up one after the other")
def _(score, logprobs, reference, mask, beta):
    last = torch.zeros_like(logprobs)
    last[torch.arange(len(mask), device=mask.device), mask.sum(1) - 1] = score
    return torch.where(mask, last + beta * reference - beta * logprobs, 0.0)


# rlhf.gae ------------------------------------------------------------------------------------------------------------


@question("rlhf.gae", lab=LAB, points=20, slide=TUNING_SLIDE, returns=("advantages", "returns"))
def advantages(draw: Draw) -> Case:
    """Generalised advantages, whitened, and the returns."""
    edge = draw.edge("a response of one token", "no padding", "λ = 1", "γ = 1")
    batch, seq = draw.sizes(2, low=3, high=7)
    return Case(
        edge,
        rewards=draw.normal(batch, seq),
        values=draw.normal(batch, seq) + 1,  # a value head is seldom centred
        mask=_lengths_to_mask(draw, batch, seq, edge),
        gamma=1.0 if edge == "γ = 1" else draw.choice([0.8, 0.9, 0.95]),
        lam=1.0 if edge == "λ = 1" else draw.choice([0.5, 0.8, 0.9]),
    )


advantages.oracle("lecturekit.alignment.ppo:advantages_and_returns")


def _sum_of_sizes(case: Case) -> Tensor:
    """Everything that can meet in one response's advantages, in absolute value; the largest response's. ()"""
    terms = case.rewards.double().abs() + 2 * case.values.double().abs()
    return torch.where(case.mask, terms, 0.0).sum(1).max()


def _size_of_whitened(case: Case, expected: Tensor) -> Tensor:
    """How far a rounding of the advantages can move them once they are divided by their standard deviation. ()"""
    raw, _ = _gae(case.rewards.double(), case.values.double(), case.mask, case.gamma, case.lam)
    return _sum_of_sizes(case) / raw[case.mask].std() * (2 + expected.double().abs().max())


advantages.tolerance(
    ulps=lambda case: 4 * case.mask.shape[1] + case.mask.numel() + 8,
    magnitude=_size_of_whitened,
    why="four roundings a token of the backward sum, then the sums of a mean and of a standard deviation over all "
    "tokens; both move a whitened value by their error over the standard deviation, times at most 2 + its size",
    part="advantages",
)
advantages.tolerance(
    ulps=lambda case: 4 * case.mask.shape[1] + 2,
    magnitude=lambda case, _: _sum_of_sizes(case),
    why="four roundings a token of the backward sum, and one more sum with the value",
    part="returns",
)


def _whitened(case: Case, parts: dict[str, Any]) -> bool:
    inside = parts["advantages"].double()[case.mask]
    raw, _ = _gae(case.rewards.double(), case.values.double(), case.mask, case.gamma, case.lam)
    allowed = 16 * case.mask.numel() * precision(case, case.rewards) * _sum_of_sizes(case) / raw[case.mask].std()
    # 1e-8 beside a standard deviation of order 1 is far below float32's own roundings
    return bool(inside.mean().abs() <= allowed and (inside.std() - 1).abs() <= allowed)


advantages.law("over the responses' tokens, the advantages have mean 0 and standard deviation 1", _whitened)
advantages.law(
    "padding has neither advantage nor return",
    lambda case, parts: bool(
        (parts["advantages"][~case.mask] == 0).all() and (parts["returns"][~case.mask] == 0).all()
    ),
)


def _gae(
    rewards: Tensor, values: Tensor, mask: Tensor, gamma: float, lam: float, following: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """A right, simple GAE without whitening, from which the misconceptions depart. following: V_{t+1}, (batch, seq)."""
    rewards, values = rewards * mask, values * mask
    if following is None:
        following = _next(values)
    result = torch.zeros_like(values)
    running = torch.zeros_like(values[:, 0])
    for t in reversed(range(values.shape[1])):
        delta = rewards[:, t] + gamma * following[:, t] - values[:, t]
        running = (delta + gamma * lam * running) * mask[:, t]
        result[:, t] = running
    return result, result + values


def _next(values: Tensor) -> Tensor:
    """Each column's right neighbour; 0 after the last."""
    return torch.cat([values[:, 1:], torch.zeros_like(values[:, :1])], dim=1)


def _white(raw: Tensor, mask: Tensor) -> Tensor:
    return torch.where(mask, (raw - raw[mask].mean()) / (raw[mask].std() + 1e-8), 0.0)


@advantages.misconception(
    "does not whiten the advantages",
    hint="What are their mean and standard deviation? The learning rate was chosen for 0 and 1.",
)
def _(rewards, values, mask, gamma, lam):
    return _gae(rewards, values, mask, gamma, lam)


@advantages.misconception(
    "whitens over the padding too", hint="Which tokens belong into the mean and the standard deviation?"
)
def _(rewards, values, mask, gamma, lam):
    raw, returns = _gae(rewards, values, mask, gamma, lam)
    return (raw - raw.mean()) / (raw.std() + 1e-8) * mask, returns


@advantages.misconception(
    "leaves something in the padding",
    hint="You subtracted a mean everywhere. What stands now where nothing was ever sampled?",
)
def _(rewards, values, mask, gamma, lam):
    raw, returns = _gae(rewards, values, mask, gamma, lam)
    return (raw - raw[mask].mean()) / (raw[mask].std() + 1e-8), returns


@advantages.misconception(
    "whitens each response by itself",
    hint="After that every response is as good as every other. Over what should mean and deviation be taken?",
)
def _(rewards, values, mask, gamma, lam):
    raw, returns = _gae(rewards, values, mask, gamma, lam)
    count = mask.sum(1, keepdim=True)
    centred = (raw - raw.sum(1, keepdim=True) / count) * mask
    std = (centred.square().sum(1, keepdim=True) / (count - 1).clamp(min=1)).sqrt()
    return centred / (std + 1e-8), returns


@advantages.misconception(
    "only subtracts the mean", hint="Whitening has two halves: a mean of 0, and which standard deviation?"
)
def _(rewards, values, mask, gamma, lam):
    raw, returns = _gae(rewards, values, mask, gamma, lam)
    return (raw - raw[mask].mean()) * mask, returns


@advantages.misconception(
    "divides by the standard deviation without subtracting the mean",
    hint="Whitening has two halves: a standard deviation of 1, and which mean?",
)
def _(rewards, values, mask, gamma, lam):
    raw, returns = _gae(rewards, values, mask, gamma, lam)
    return raw / (raw[mask].std() + 1e-8), returns


@advantages.misconception("divides by the variance", hint="Measure the advantages in cents: should the result change?")
def _(rewards, values, mask, gamma, lam):
    raw, returns = _gae(rewards, values, mask, gamma, lam)
    return (raw - raw[mask].mean()) / (raw[mask].var() + 1e-8) * mask, returns


@advantages.misconception(
    "divides the sum of squares by n, not by n − 1",
    hint="The task asks for the standard deviation that torch.std gives. What does it divide by?",
)
def _(rewards, values, mask, gamma, lam):
    raw, returns = _gae(rewards, values, mask, gamma, lam)
    return (raw - raw[mask].mean()) / (raw[mask].std(correction=0) + 1e-8) * mask, returns


@advantages.misconception(
    "takes the value of padding for the future of the last token",
    hint="After its last token an episode is over. What is the value there, and what stands in the next column?",
)
def _(rewards, values, mask, gamma, lam):
    raw, returns = _gae(rewards, values, mask, gamma, lam, following=_next(values))
    return _white(raw, mask), returns


@advantages.misconception(
    "lets rewards and values of padding flow back into the response",
    hint="The sum runs from the end of the row. Where does the response end? Masking afterwards is too late.",
)
def _(rewards, values, mask, gamma, lam):
    raw, returns = _gae(rewards, values, torch.ones_like(mask), gamma, lam)
    return _white(raw, mask), returns * mask


@advantages.misconception(
    "takes the last token's own value for its future",
    hint="After its last token an episode is over. Is there anything left to be won?",
)
def _(rewards, values, mask, gamma, lam):
    inside = values * mask
    following = torch.where(_next(mask.float()) > 0, _next(inside), inside)
    raw, returns = _gae(rewards, values, mask, gamma, lam, following=following)
    return _white(raw, mask), returns


@advantages.misconception("forgets lambda", hint="Which two numbers fade a later δ in the sum?")
def _(rewards, values, mask, gamma, lam):
    raw, returns = _gae(rewards, values, mask, gamma, 1.0)
    return _white(raw, mask), returns


@advantages.misconception(
    "forgets gamma in δ", hint="δ compares a reward and the value after it with the value before. Which is discounted?"
)
def _(rewards, values, mask, gamma, lam):
    raw, returns = _gae(rewards, values, mask, gamma, lam, following=_next(values * mask) / gamma)
    return _white(raw, mask), returns


@advantages.misconception(
    "fades by λ alone, without γ", hint="A δ that lies l tokens ahead counts (γλ)^l. Which factor is missing?"
)
def _(rewards, values, mask, gamma, lam):
    raw, returns = _gae(rewards, values, mask, gamma, lam / gamma)
    return _white(raw, mask), returns


@advantages.misconception(
    "looks one token ahead only", hint="Which later δ does your advantage hear of? A_t is a sum over all of them."
)
def _(rewards, values, mask, gamma, lam):
    raw, returns = _gae(rewards, values, mask, gamma, 0.0)
    return _white(raw, mask), returns


@advantages.misconception(
    "builds the returns from whitened advantages",
    hint="The value head learns rewards in their own unit. Which advantages are in that unit?",
)
def _(rewards, values, mask, gamma, lam):
    white = _white(_gae(rewards, values, mask, gamma, lam)[0], mask)
    return white, (white + values) * mask


@advantages.misconception(
    "gives the sum of later rewards as returns",
    hint="The task defines returns = advantages + values. For which λ are the two the same?",
)
def _(rewards, values, mask, gamma, lam):
    raw, _ = _gae(rewards, values, mask, gamma, lam)
    return _white(raw, mask), _gae(rewards, torch.zeros_like(values), mask, gamma, 1.0)[0]


@advantages.alternative("a loop over responses without their padding")
def _(r, v, m, g, fade):
    adv = torch.zeros_like(r)
    for i, n in enumerate(m.sum(1).tolist()):
        last = 0.0
        for t in range(n - 1, -1, -1):
            ahead = v[i, t + 1] if t + 1 < n else 0.0
            last = r[i, t] + g * ahead - v[i, t] + g * fade * last
            adv[i, t] = last
    returns = (adv + v) * m
    return ((adv - adv[m].mean()) / (adv[m].std() + 1e-8)).masked_fill(~m, 0), returns


@advantages.alternative("the sum written as a matrix product, float64 inside")
def _(rewards, values, mask, gamma, lam):
    inside = values.double() * mask
    delta = (rewards.double() + gamma * _next(inside)) * mask - inside
    steps = torch.arange(mask.shape[1], device=mask.device)
    ahead = steps[None, :] - steps[:, None]
    fade = torch.where(ahead >= 0, (gamma * lam) ** ahead.double().clamp(min=0), 0.0)
    raw = torch.einsum("bs,ts->bt", delta, fade) * mask
    return _white(raw, mask).float(), (raw + inside).float()


@advantages.alternative("λ-returns first, advantages from them")
def _(rewards, values, mask, gamma, lam):
    inside = values * mask
    returns = torch.zeros_like(values)
    ahead = torch.zeros_like(values[:, 0])
    after = torch.zeros_like(ahead)
    for t in range(mask.shape[1] - 1, -1, -1):
        ahead = torch.where(mask[:, t], rewards[:, t] + gamma * ((1 - lam) * after + lam * ahead), 0.0)
        after = inside[:, t]
        returns[:, t] = ahead
    raw = returns - inside
    mean = raw.sum() / mask.sum()
    std = (((raw - mean) * mask).square().sum() / (mask.sum() - 1)).sqrt()
    return (raw - mean) / (std + 1e-8) * mask, returns


# rlhf.clip -----------------------------------------------------------------------------------------------------------


@question("rlhf.clip", lab=LAB, points=15, slide=TUNING_SLIDE)
def clip(draw: Draw) -> Case:
    """PPO's clipped objective, as a loss."""
    edge = draw.edge("the policy has not moved yet", "no padding", "a response of one token", "a large step")
    batch, seq = draw.sizes(2, low=3, high=7)
    old = -draw.uniform(batch, seq, low=0.1, high=5.0)
    moved = draw.normal(batch, seq, scale=1.5 if edge == "a large step" else 0.4)
    return Case(
        edge,
        logprobs=old.clone() if edge == "the policy has not moved yet" else old + moved,
        old_logprobs=old,
        advantages=draw.normal(batch, seq) + 0.2,
        mask=_lengths_to_mask(draw, batch, seq, edge),
        epsilon=draw.choice([0.1, 0.2, 0.3]),
    )


clip.oracle("lecturekit.alignment.ppo:policy_loss")


def _size_of_terms(case: Case) -> Tensor:
    """ρ |A| for each token, and how much exp stretches the roundings of a log-ratio. (batch, seq), 0 in padding."""
    new, old = case.logprobs.double(), case.old_logprobs.double()
    terms = (new - old).exp().clamp(min=1) * case.advantages.double().abs() * (1 + new.abs() + old.abs())
    return torch.where(case.mask, terms, 0.0)


clip.tolerance(
    ulps=lambda case: int(case.mask.sum()) + 8,
    magnitude=lambda case, _: _size_of_terms(case).sum() / case.mask.sum(),
    why="each ρ A carries the rounding of its log-ratio, stretched by exp, and two of its own; then the mean's sum",
    part="loss",
)
clip.tolerance(
    ulps=8,
    magnitude=lambda case, _: _size_of_terms(case) / case.mask.sum(),
    why="ρ A / tokens: the rounding of its log-ratio, stretched by exp, and about four of its own",
    part="gradient of logprobs",
)


@clip.driver
def _(function: Any, case: Case) -> dict[str, Any]:
    """The loss and its gradient to the policy's log-probabilities."""
    new = case.logprobs.requires_grad_()
    value = function(new, case.old_logprobs, case.advantages, case.mask, case.epsilon)
    _require_gradient(value, "the loss", "the log-probabilities")
    (gradient,) = torch.autograd.grad(value.sum(), [new], materialize_grads=True)
    return {"loss": value.detach(), "gradient of logprobs": gradient}


clip.law("padding has no gradient", lambda case, parts: bool((parts["gradient of logprobs"][~case.mask] == 0).all()))


def _clipped_tokens_rest(case: Case, parts: dict[str, Any]) -> bool:
    """Where the policy already went further than the clip allows, in the direction that pays, nothing pulls."""
    ratio, good = (case.logprobs.double() - case.old_logprobs.double()).exp(), case.advantages > 0
    beyond = torch.where(good, ratio > 1 + case.epsilon + 1e-4, ratio < 1 - case.epsilon - 1e-4)
    return bool((parts["gradient of logprobs"][beyond & case.mask] == 0).all())


clip.law("a token beyond the clip, on the side that pays, has no gradient", _clipped_tokens_rest)


def _clipped(logprobs, old_logprobs, advantages, epsilon):
    """ρ A and clip(ρ) A, from which each misconception departs."""
    ratio = (logprobs - old_logprobs).exp()
    return ratio * advantages, ratio.clamp(1 - epsilon, 1 + epsilon) * advantages


@clip.misconception(
    "takes the larger of the two terms",
    hint="The clipped term is there to take profit away, never to add some. Which of two bounds is the pessimist's?",
)
def _(logprobs, old_logprobs, advantages, mask, epsilon):
    return -torch.maximum(*_clipped(logprobs, old_logprobs, advantages, epsilon))[mask].mean()


@clip.misconception(
    "has the sign of what is maximised", hint="The paper maximises this. Which way does an optimizer go?"
)
def _(logprobs, old_logprobs, advantages, mask, epsilon):
    return torch.minimum(*_clipped(logprobs, old_logprobs, advantages, epsilon))[mask].mean()


@clip.misconception(
    "computes the old log-probabilities anew, so that the ratio is always 1",
    hint="Which policy sampled the tokens, and which is trained? After one update they differ: what was stored?",
)
def _(logprobs, old_logprobs, advantages, mask, epsilon):
    return -torch.minimum(*_clipped(logprobs, logprobs.detach(), advantages, epsilon))[mask].mean()


@clip.misconception(
    "clips without taking the minimum",
    hint="A bad token that has become likelier must still be pulled back. What does the clipped term alone do there?",
)
def _(logprobs, old_logprobs, advantages, mask, epsilon):
    return -_clipped(logprobs, old_logprobs, advantages, epsilon)[1][mask].mean()


@clip.misconception(
    "clips the product instead of the ratio",
    hint="The bounds 1 − ε and 1 + ε are those of a ratio near 1. Is ratio times advantage near 1?",
)
def _(logprobs, old_logprobs, advantages, mask, epsilon):
    product = _clipped(logprobs, old_logprobs, advantages, epsilon)[0]
    return -torch.minimum(product, product.clamp(1 - epsilon, 1 + epsilon))[mask].mean()


@clip.misconception("does not clip", hint="What stops the policy from going too far on one batch of samples?")
def _(logprobs, old_logprobs, advantages, mask, epsilon):
    return -_clipped(logprobs, old_logprobs, advantages, epsilon)[0][mask].mean()


@clip.misconception(
    "takes the mean over the padding too", hint="By how many tokens do you divide? Padding was never sampled."
)
def _(logprobs, old_logprobs, advantages, mask, epsilon):
    return -(torch.minimum(*_clipped(logprobs, old_logprobs, advantages, epsilon)) * mask).mean()


@clip.misconception("lets padding into the mean", hint="Padding was never sampled. Which argument says where it is?")
def _(logprobs, old_logprobs, advantages, mask, epsilon):
    return -torch.minimum(*_clipped(logprobs, old_logprobs, advantages, epsilon)).mean()


@clip.misconception(
    "averages each response before averaging them",
    hint="Then a token of a short response weighs more than one of a long response. The task has one mean over all.",
)
def _(logprobs, old_logprobs, advantages, mask, epsilon):
    terms = torch.minimum(*_clipped(logprobs, old_logprobs, advantages, epsilon)) * mask
    return -(terms.sum(1) / mask.sum(1)).mean()


@clip.misconception("adds tokens up instead of taking their mean", hint="Should a larger batch make a larger step?")
def _(logprobs, old_logprobs, advantages, mask, epsilon):
    return -torch.minimum(*_clipped(logprobs, old_logprobs, advantages, epsilon))[mask].sum()


@clip.misconception(
    "divides log-probabilities instead of subtracting them",
    hint="The ratio is one of probabilities. You have their logarithms: what becomes of a division?",
)
def _(logprobs, old_logprobs, advantages, mask, epsilon):
    ratio = logprobs / old_logprobs
    terms = torch.minimum(ratio * advantages, ratio.clamp(1 - epsilon, 1 + epsilon) * advantages)
    return -terms[mask].mean()


@clip.misconception(
    "forgets exp", hint="What is the difference of two log-probabilities when nothing has moved? And ρ?"
)
def _(logprobs, old_logprobs, advantages, mask, epsilon):
    ratio = logprobs - old_logprobs
    terms = torch.minimum(ratio * advantages, ratio.clamp(1 - epsilon, 1 + epsilon) * advantages)
    return -terms[mask].mean()


@clip.misconception(
    "turns the ratio upside down",
    hint="Follow the gradient of one token with a positive advantage: does it become likelier?",
)
def _(logprobs, old_logprobs, advantages, mask, epsilon):
    return -torch.minimum(*_clipped(old_logprobs, logprobs, advantages, epsilon))[mask].mean()


@clip.misconception(
    "clips on one side only", hint="A token may also become too unlikely. What are the two ends of the interval?"
)
def _(logprobs, old_logprobs, advantages, mask, epsilon):
    ratio = (logprobs - old_logprobs).exp()
    return -torch.minimum(ratio * advantages, ratio.clamp(max=1 + epsilon) * advantages)[mask].mean()


@clip.alternative("the larger of two losses, divided by the mask's sum")
def _(new, old, adv, keep, eps):
    rho = torch.exp(new - old)
    losses = torch.max(-adv * rho, -adv * torch.clamp(rho, 1.0 - eps, 1.0 + eps))
    return (losses * keep).sum() / keep.sum()


@clip.alternative("only the tokens of the responses, float64 inside")
def _(logprobs, old_logprobs, advantages, mask, epsilon):
    ratio = (logprobs[mask].double() - old_logprobs[mask].double()).exp()
    a = advantages[mask].double()
    return -torch.stack([ratio * a, ratio.clamp(1 - epsilon, 1 + epsilon) * a]).amin(0).mean().float()


@clip.alternative("by cases of the advantage's sign")
def _(logprobs, old_logprobs, advantages, mask, epsilon):
    ratio = (logprobs - old_logprobs).exp()
    bounded = torch.where(advantages > 0, ratio.clamp(max=1 + epsilon), ratio.clamp(min=1 - epsilon))
    return -(bounded * advantages).masked_select(mask).mean()


# rlhf.group ----------------------------------------------------------------------------------------------------------


@question("rlhf.group", lab=LAB, points=10, slide=TUNING_SLIDE)
def group(draw: Draw) -> Case:
    """GRPO: advantages from a group of responses, without a value head."""
    edge = draw.edge("a group with equal rewards", "two in a group", "rewards far from zero")
    groups, size = draw.sizes(2, low=2, high=6)
    if edge == "two in a group":
        groups, size = 3, 2
    else:
        size = max(size, 3)
    rewards = draw.normal(groups, size, scale=draw.choice([0.5, 2.0, 3.0])) + draw.normal(groups, 1)
    if edge == "a group with equal rewards":
        rewards[0] = draw.integer(1, 8) / 4  # a mean of these is exact in float32
    elif edge == "rewards far from zero":
        rewards = rewards + 50
    return Case(edge, rewards=rewards)


group.oracle("lecturekit.alignment.ppo:group_advantages")
group.tolerance(
    ulps=lambda case: 4 * case.rewards.shape[1] + 8,
    magnitude=lambda case, expected: (
        case.rewards.double().abs().amax(1, keepdim=True)
        / (case.rewards.double().std(1, keepdim=True) + 1e-4)
        * (2 + expected.double().abs())
    ),
    why="a group's mean rounds once a reward, relative to the largest; its standard deviation likewise; both move the "
    "result by their error over the standard deviation, times at most 2 + its size",
)


def _equal_rewards_count_for_nothing(case: Case, parts: dict[str, Any]) -> bool | None:
    """Up to the rounding of a mean, which the 1e-4 below the fraction enlarges; NaN is no small number."""
    if case.label != "a group with equal rewards":
        return None
    rounding = precision(case, parts["result"]) * float(case.rewards[0].double().abs().max())
    allowed = (4 * case.rewards.shape[1] + 8) * rounding / 1e-4
    return bool((parts["result"][0].double().abs() <= allowed).all())


group.law("equal rewards are neither good nor bad", _equal_rewards_count_for_nothing)


@group.misconception(
    "compares with the whole batch, not with the group",
    hint="A hard prompt gives low rewards whatever is answered. Whom should an answer be compared with?",
)
def _(rewards):
    return (rewards - rewards.mean()) / (rewards.std() + 1e-4)


@group.misconception(
    "compares the first answers of all groups", hint="Which dimension runs over the answers to one prompt?"
)
def _(rewards):
    return (rewards - rewards.mean(0)) / (rewards.std(0) + 1e-4)


@group.misconception(
    "does not divide by the standard deviation", hint="Two halves: a mean of 0, and which standard deviation?"
)
def _(rewards):
    return rewards - rewards.mean(1, keepdim=True)


@group.misconception(
    "does not subtract the mean", hint="An answer below its group's average should become less likely. Does it?"
)
def _(rewards):
    return rewards / (rewards.std(1, keepdim=True) + 1e-4)


@group.misconception("swaps mean and standard deviation", hint="Which of the two is subtracted, and which divides?")
def _(rewards):
    return (rewards - rewards.std(1, keepdim=True)) / (rewards.mean(1, keepdim=True) + 1e-4)


@group.misconception("divides by the variance", hint="Measure the rewards in cents: should the result change?")
def _(rewards):
    return (rewards - rewards.mean(1, keepdim=True)) / (rewards.var(1, keepdim=True) + 1e-4)


@group.misconception(
    "divides the sum of squares by n, not by n − 1",
    hint="The task asks for the standard deviation that torch.std gives. What does it divide by?",
)
def _(rewards):
    return (rewards - rewards.mean(1, keepdim=True)) / (rewards.std(1, keepdim=True, correction=0) + 1e-4)


@group.misconception(
    "divides by zero where all rewards are equal", hint="What is the deviation of a group of equal rewards?"
)
def _(rewards):
    return (rewards - rewards.mean(1, keepdim=True)) / rewards.std(1, keepdim=True)


@group.misconception(
    "leaves each answer out of its own mean",
    hint="That is another method's baseline (RLOO). Which mean does GRPO take?",
)
def _(rewards):
    size = rewards.shape[1]
    others = (rewards.sum(1, keepdim=True) - rewards) / (size - 1)
    return (rewards - others) / (rewards.std(1, keepdim=True) + 1e-4)


@group.alternative("a loop over groups")
def _(scores):
    return torch.stack([(row - row.mean()) / (row.std() + 0.0001) for row in scores])


@group.alternative("einsum and a written-out deviation")
def _(rewards):
    n = rewards.shape[1]
    centred = rewards - torch.einsum("gn->g", rewards)[:, None] / n
    return centred / ((centred**2).sum(1, keepdim=True) / (n - 1)).sqrt().add(1e-4)


@group.alternative("torch.std_mean, float64 inside")
def _(rewards):
    std, mean = torch.std_mean(rewards.double(), dim=1, keepdim=True)
    return ((rewards - mean) / (std + 1e-4)).float()


@group.alternative("a product with the centring matrix")
def _(rewards):
    n = rewards.shape[1]
    centring = torch.eye(n, dtype=rewards.dtype, device=rewards.device) - 1 / n
    centred = torch.einsum("gn,nm->gm", rewards, centring)
    return centred / (rewards.std(dim=1, keepdim=True) + 1e-4)
