"""The questions of lab 3, in the order in which DPO is derived: the optimum of reward minus KL, the reward that a
policy stands for, the log-probability of an answer, the loss, the weights in its gradient, the cached reference.

Rafailov et al., "Direct Preference Optimization: Your Language Model is Secretly a Reward Model", NeurIPS 2023.
"""

from __future__ import annotations

import copy
import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lecturekit.checking import Case, Draw, Unfit, question
from lecturekit.checking.compare import describe, precision

LAB = "lab03_dpo"
EPS = torch.finfo(torch.float32).eps

# dpo.optimum ---------------------------------------------------------------------------------------------------------


@question("dpo.optimum", lab=LAB, points=10, slide="Direct Preference Optimization (DPO): the optimum behind the loss")
def optimum(draw: Draw) -> Case:
    """The policy that is best at reward minus β · KL, on a space of a few answers."""
    edge = draw.edge("equal rewards", "large rewards", "an answer the reference never gives")
    prompts, answers = draw.sizes(2, low=3, high=7)
    reference = draw.uniform(prompts, answers, low=0.1, high=1.0)
    rewards = draw.normal(prompts, answers, scale=300.0 if edge == "large rewards" else 1.0)
    if edge == "equal rewards":
        rewards = draw.normal(prompts, 1).expand(prompts, answers).clone()
    elif edge == "an answer the reference never gives":
        reference[torch.arange(prompts), draw.integers(0, answers - 1, prompts)] = 0.0
    return Case(
        edge,
        reference=reference / reference.sum(1, keepdim=True),
        rewards=rewards,
        beta=draw.choice([0.3, 0.5, 2.0]),
    )


optimum.oracle("lecturekit.alignment.dpo:optimal_policy")
optimum.tolerance(
    ulps=lambda case: case.rewards.shape[1] + 8,
    magnitude=lambda case, expected: (
        expected.double() * (4 + 2 * case.rewards.double().abs().amax(1, keepdim=True) / case.beta)
        + torch.finfo(torch.float32).tiny / EPS
    ),
    why="each exponent r / beta + log p is off by roundings of its own size, and a probability by that times itself; "
    "then a sum over the answers. Below float32's smallest normal number digits are lost, on some machines all of them",
)


def _objective(case: Case, policy: Tensor) -> Tensor:
    """Expected reward minus beta KL to the reference, prompt by prompt, in float64."""
    gap = torch.where(policy > 0, policy * (policy.log() - case.reference.double().log()), 0.0)
    return (policy * case.rewards.double()).sum(1) - case.beta * gap.sum(1)


def _beats_others(case: Case, parts: dict[str, Any]) -> bool:
    """Compared with the reference, with the most rewarded answer alone and with mixtures; slack for roundings."""
    policy = parts["result"].double()
    policy = policy / policy.sum(1, keepdim=True)
    reference = case.reference.double()
    reference = reference / reference.sum(1, keepdim=True)
    allowed = 64 * EPS * (1 + case.rewards.double().abs().amax(1))
    best = _objective(case, policy)
    greedy = F.one_hot(case.rewards.masked_fill(reference == 0, -math.inf).argmax(1), policy.shape[1]).double()
    others = [reference, greedy, (policy + reference) / 2, (policy + greedy) / 2, 0.9 * policy + 0.1 * reference]
    return all(bool((_objective(case, other) <= best + allowed).all()) for other in others)


def _adds_up(case: Case, parts: dict[str, Any]) -> bool:
    """No probability below 0, and rows that add up to 1 as far as exponents of that size allow."""
    policy = parts["result"].double()
    exponents = 1 + case.rewards.double().abs().amax(1) / case.beta
    allowed = 64 * precision(case, parts["result"]) * exponents
    return bool((policy >= 0).all() and ((policy.sum(1) - 1).abs() <= allowed).all())


optimum.law("each row is a distribution", _adds_up)
optimum.law(
    "what the reference never says stays unsaid",
    lambda case, parts: bool((parts["result"][case.reference == 0] == 0).all()),
)
optimum.law("no other policy has more reward minus β · KL", _beats_others)


def _tilted(reference: Tensor, exponents: Tensor) -> Tensor:
    """Reference times exp(exponents), normalised: what the misconceptions start from."""
    return torch.softmax(reference.log() + exponents, dim=1)


@optimum.misconception(
    "leaves the reference out", hint="What should the best policy be when every answer has the same reward?"
)
def _(reference, rewards, beta):
    return torch.softmax(rewards / beta, dim=1)


@optimum.misconception(
    "multiplies the reward by β", hint="A large β holds the policy near the reference. What does yours do as β grows?"
)
def _(reference, rewards, beta):
    return _tilted(reference, rewards * beta)


@optimum.misconception("forgets β", hint="Who decides how far the policy may go from the reference for a reward?")
def _(reference, rewards, beta):
    return _tilted(reference, rewards)


@optimum.misconception(
    "goes away from the reward", hint="Two answers, the same in the reference. Which of them should become likelier?"
)
def _(reference, rewards, beta):
    return _tilted(reference, -rewards / beta)


@optimum.misconception(
    "does not normalise", hint="The equation has a Z(x). What must the probabilities of a prompt's answers add up to?"
)
def _(reference, rewards, beta):
    return reference * (rewards / beta).exp()


@optimum.misconception(
    "normalises over the prompts", hint="Z(x) belongs to one prompt x. Over which dimension is its sum?"
)
def _(reference, rewards, beta):
    return torch.softmax(reference.log() + rewards / beta, dim=0)


@optimum.misconception(
    "normalises over all prompts together", hint="Z(x) belongs to one prompt x. How many values of Z are there?"
)
def _(reference, rewards, beta):
    exponents = reference.log() + rewards / beta
    return torch.softmax(exponents.flatten(), dim=0).view(exponents.shape)


@optimum.misconception(
    "adds probabilities to exponents",
    hint="A product with exp( … ) becomes a sum inside it. What becomes of the reference's probability there?",
)
def _(reference, rewards, beta):
    return torch.softmax(reference + rewards / beta, dim=1)


@optimum.misconception(
    "scales the reference with the reward",
    hint="What should be left when all rewards are 0?",
)
def _(reference, rewards, beta):
    return torch.softmax((reference.log() + rewards) / beta, dim=1)


@optimum.misconception(
    "gives the most rewarded answer alone",
    hint="That is the best without the KL term. What does the KL to the reference cost there?",
)
def _(reference, rewards, beta):
    return F.one_hot(rewards.argmax(1), rewards.shape[1]).to(reference.dtype)


@optimum.misconception("returns log-probabilities", hint="Should a row add up to 1, or its exp?")
def _(reference, rewards, beta):
    return torch.log_softmax(reference.log() + rewards / beta, dim=1)


@optimum.misconception(
    "takes exp of large rewards, which overflows",
    hint="exp(89) does not fit into float32. Only differences of exponents matter: which one may you subtract?",
)
def _(reference, rewards, beta):
    weights = reference * (rewards / beta).exp()
    return weights / weights.sum(1, keepdim=True)


@optimum.alternative("the largest reward subtracted, then a plain ratio")
def _(p, r, b):
    largest = r.masked_fill(p == 0, -math.inf).amax(dim=-1, keepdim=True)
    weights = torch.where(p > 0, p * ((r - largest) / b).exp(), 0.0)
    return weights / weights.sum(dim=-1, keepdim=True)


@optimum.alternative("logsumexp for log Z")
def _(reference, rewards, beta):
    scores = torch.log(reference) + torch.div(rewards, beta)
    return torch.exp(scores - torch.logsumexp(scores, dim=-1, keepdim=True))


@optimum.alternative("prompt by prompt, float64 inside")
def _(*args):
    reference, rewards, beta = args
    rows = []
    for p, r in zip(reference.double(), rewards.double(), strict=True):
        exponents = p.log() + r / beta
        rows.append(torch.softmax(exponents, 0))
    return torch.stack(rows).to(reference.dtype)


# dpo.reward ----------------------------------------------------------------------------------------------------------


@question("dpo.reward", lab=LAB, points=10, slide="Direct Preference Optimization (DPO): the reward inside the policy")
def reward(draw: Draw) -> Case:
    """The reward that a policy stands for, up to what all answers to a prompt share."""
    edge = draw.edge("policy = reference", "long answers")
    shape = draw.sizes(2, low=3, high=6)
    reference = draw.normal(*shape, scale=4.0) - (1000.0 if edge == "long answers" else 20.0)
    return Case(
        edge,
        policy=reference.clone() if edge == "policy = reference" else reference + draw.normal(*shape, scale=3.0),
        reference=reference,
        beta=draw.choice([0.1, 0.3, 0.5]),
    )


reward.oracle("lecturekit.alignment.dpo:implicit_reward")
reward.tolerance(
    ulps=4,
    magnitude=lambda case, _: case.beta * (case.policy.double().abs() + case.reference.double().abs()),
    why="a difference of two numbers of that size and a product, in either order: at most 3 roundings",
)
reward.law(
    "a policy that equals its reference has learnt no reward",
    lambda case, parts: bool((parts["result"] == 0).all()) if case.label == "policy = reference" else None,
)
reward.law(
    "the reward is above 0 where the policy has become more fond of an answer, below 0 where less",
    # beyond the roundings of two numbers near 1,000
    lambda case, parts: bool((parts["result"] * (case.policy - case.reference) > -1e-3).all()),
)


@reward.misconception("forgets β", hint="A policy far from its reference: is it held loosely, or is its reward large?")
def _(policy, reference, beta):
    return policy - reference


@reward.misconception(
    "divides by β", hint="In the optimum β divides the reward. What happens to it when you solve for the reward?"
)
def _(policy, reference, beta):
    return (policy - reference) / beta


@reward.misconception(
    "leaves the reference out", hint="A policy that has learnt nothing yet: what reward should it stand for?"
)
def _(policy, reference, beta):
    return beta * policy


@reward.misconception(
    "turns policy and reference round", hint="The policy now likes an answer better than before. Is that a high reward?"
)
def _(policy, reference, beta):
    return beta * (reference - policy)


@reward.misconception(
    "divides log-probabilities instead of subtracting them",
    hint="The equation has the logarithm of a ratio. Your inputs are logarithms already: what becomes of a ratio?",
)
def _(policy, reference, beta):
    return beta * policy / reference


@reward.misconception(
    "gives the ratio of probabilities, not its logarithm",
    hint="Solve the optimum for r: what undoes the exp around it?",
)
def _(policy, reference, beta):
    return beta * (policy - reference).exp()


@reward.misconception(
    "weights with the policy's probability, as a KL does",
    hint="A KL is an expectation over all answers. Whose reward is asked for here?",
)
def _(policy, reference, beta):
    return beta * policy.exp() * (policy - reference)


@reward.misconception(
    "takes the mean over the answers off",
    hint="That ranks answers alike, but needs all of them. How many answers to a prompt does a pair show you?",
)
def _(policy, reference, beta):
    rewards = beta * (policy - reference)
    return rewards - rewards.mean(1, keepdim=True)


@reward.misconception(
    "goes through probabilities, which underflow",
    hint="A long answer has a log-probability of -1,000. What is exp of that in float32, and a ratio of two of them?",
)
def _(policy, reference, beta):
    return beta * (policy.exp() / reference.exp()).log()


@reward.alternative("β taken inside")
def _(now, before, strength):
    return strength * now - strength * before


@reward.alternative("torch.sub and torch.mul")
def _(policy, reference, beta):
    return torch.mul(torch.sub(policy, reference), beta)


@reward.alternative("float64 inside")
def _(*args):
    policy, reference, beta = args
    return (beta * (policy.double() - reference.double())).to(policy.dtype)


# dpo.logprob ---------------------------------------------------------------------------------------------------------


@question("dpo.logprob", lab=LAB, points=15, slide="Direct Preference Optimization (DPO): log π(y | x)")
def logprob(draw: Draw) -> Case:
    """The log-probability of a response, from logits."""
    edge = draw.edge("one sequence", "a row without a response", "a response of one token", "large logits", "bfloat16")
    batch, seq, vocab = draw.integer(2, 4), draw.integer(7, 10), draw.integer(11, 17)
    batch = 1 if edge == "one sequence" else batch
    place = torch.arange(seq, device=draw.device).expand(batch, seq)
    start = draw.integers(2, 3, batch).unsqueeze(1)
    # Most rows end in padding, which is no more a part of the response than the prompt is.
    end = start + 1 if edge == "a response of one token" else draw.integers(seq - 2, seq, batch).unsqueeze(1)
    mask = (place >= start) & (place < end)
    if edge == "a row without a response":
        mask[0] = False
    return Case(
        edge,
        logits=draw.normal(
            batch,
            seq,
            vocab,
            scale=1000.0 if edge == "large logits" else 2.0,
            dtype=torch.bfloat16 if edge == "bfloat16" else torch.float32,
        ),
        tokens=draw.integers(0, vocab - 1, batch, seq),
        mask=mask,
    )


logprob.oracle("lecturekit.alignment.dpo:sequence_logprob")


def _roundings(case: Case) -> float:
    """Those of sums in float32 over the vocabulary and the response, counted in roundings of the logits' dtype."""
    depth = case.logits.shape[1] + case.logits.shape[2] + 6
    return depth * EPS / torch.finfo(case.logits.dtype).eps


logprob.tolerance(
    ulps=_roundings,
    magnitude=lambda case, _: _size_of_logprob(case),
    why="a log-softmax over the vocabulary is off by roundings of the largest logit; these add up over the response. "
    "All in float32, into which bfloat16 logits go without a loss",
)
logprob.tolerance(
    ulps=lambda case: 2 + _roundings(case),  # a gradient has the logits' dtype and is rounded to it once or twice
    magnitude=lambda case, _: 2 * (1 + case.logits.double().abs().amax(-1, keepdim=True)),
    why="a probability p = exp(logit - logsumexp) is off by p times the error of that difference, a few roundings of "
    "the largest logit; the driver weights the rows with up to 2",
    part="gradient of logits",
)


def _size_of_logprob(case: Case) -> Tensor:
    """For each row the sum over its response of the largest logit's size and the logarithm of the vocabulary's."""
    sizes = case.logits.double().abs().amax(-1) + math.log(case.logits.shape[-1])
    return (sizes[:, :-1] * case.mask[:, 1:]).sum(1)


@logprob.driver
def _(function: Any, case: Case) -> dict[str, Any]:
    """The sums, and their gradient, without which no policy could be trained on them."""
    logits = case.logits.requires_grad_()
    result = function(*case.inputs.values())
    if not isinstance(result, Tensor):
        raise Unfit(f"the result must be a tensor (batch,), got {describe(result)}")
    if not result.requires_grad:
        raise Unfit("the result has no gradient to the logits: a .detach(), .item(), .data or no_grad on the way?")
    weights = torch.linspace(1, 2, result.numel()).to(result).view(result.shape)  # so that no row stands for another
    (gradient,) = torch.autograd.grad((result * weights).sum(), logits, materialize_grads=True)
    return {"result": result.detach(), "gradient of logits": gradient}


def _scored(logits: Tensor, tokens: Tensor) -> Tensor:
    """The log-probability of each token but the first: what the misconceptions start from."""
    return _picked(logits.float().log_softmax(-1)[:, :-1], tokens[:, 1:])


def _picked(scores: Tensor, tokens: Tensor) -> Tensor:
    return scores.gather(-1, tokens.unsqueeze(-1)).squeeze(-1)


logprob.law(
    "a probability is at most 1, so its logarithm is at most 0", lambda case, parts: bool((parts["result"] <= 0).all())
)
logprob.law(
    "a row without a response has probability 1",
    lambda case, parts: bool((parts["result"][~case.mask.any(1)] == 0).all()),
)
logprob.law(
    "only logits that predict a token of the response matter",
    lambda case, parts: bool((parts["gradient of logits"][:, :-1][~case.mask[:, 1:]] == 0).all()),
)


@logprob.misconception(
    "does not shift: asks each position for the token it was given",
    hint="What does position t predict? Compare logits[:, t] with which token?",
)
def _(logits, tokens, mask):
    return (_picked(logits.float().log_softmax(-1), tokens) * mask).sum(1)


@logprob.misconception(
    "shifts the wrong way", hint="Position t sees tokens 0 … t. Is the one you looked up among them?"
)
def _(logits, tokens, mask):
    return (_picked(logits.float().log_softmax(-1)[:, 1:], tokens[:, :-1]) * mask[:, :-1]).sum(1)


@logprob.misconception(
    "shifts the tokens but not their mask",
    hint="The mask is true on the tokens of the response. After the shift, which entry belongs to which token?",
)
def _(logits, tokens, mask):
    return (_scored(logits, tokens) * mask[:, :-1]).sum(1)


@logprob.misconception(
    "counts the prompt and the padding too", hint="log π(y | x) is given x. Whose tokens may it count?"
)
def _(logits, tokens, mask):
    return _scored(logits, tokens).sum(1)


_MEAN_HINT = "The probability of a sequence is a product over its tokens. What is the logarithm of a product?"


@logprob.misconception("takes the mean over the tokens, not their sum", hint=_MEAN_HINT)
def _(logits, tokens, mask):
    return (_scored(logits, tokens) * mask[:, 1:]).sum(1) / mask[:, 1:].sum(1)


@logprob.misconception("takes the mean over the tokens, not their sum", hint=_MEAN_HINT)
def _(logits, tokens, mask):
    return (_scored(logits, tokens) * mask[:, 1:]).sum(1) / mask[:, 1:].sum(1).clamp(min=1)


@logprob.misconception(
    "adds up logits, which are no log-probabilities",
    hint="Add 5 to every logit of a position: the model says the same. Does your result?",
)
def _(logits, tokens, mask):
    return (_picked(logits.float()[:, :-1], tokens[:, 1:]) * mask[:, 1:]).sum(1)


@logprob.misconception(
    "adds up probabilities without their logarithm",
    hint="The probability of an answer is the product of its tokens' probabilities, each given those before. "
    "What adds up?",
)
def _(logits, tokens, mask):
    return (_scored(logits, tokens).exp() * mask[:, 1:]).sum(1)


@logprob.misconception(
    "returns the loss, the negative of the log-probability",
    hint="Which sign has the logarithm of a probability? And which sign has cross_entropy?",
)
def _(logits, tokens, mask):
    return -(_scored(logits, tokens) * mask[:, 1:]).sum(1)


@logprob.misconception(
    "normalises over positions, not over the vocabulary",
    hint="Over which dimension must the probabilities add up to 1: the positions, or the words to choose from?",
)
def _(logits, tokens, mask):
    return (_picked(logits.float().log_softmax(1)[:, :-1], tokens[:, 1:]) * mask[:, 1:]).sum(1)


_ZERO_HINT = "float32 ends near 1e-45, which is exp(-103). What is the logarithm of 0? torch can do both steps in one."


@logprob.misconception("takes the logarithm of a softmax that has become zero", hint=_ZERO_HINT)
def _(logits, tokens, mask):
    probabilities = _picked(logits.float().softmax(-1)[:, :-1], tokens[:, 1:])
    return torch.where(mask[:, 1:], probabilities.log(), 0).sum(1)


@logprob.misconception("takes the logarithm of a softmax that has become zero", hint=_ZERO_HINT)
def _(logits, tokens, mask):
    return (_picked(logits.float().softmax(-1)[:, :-1], tokens[:, 1:]).log() * mask[:, 1:]).sum(1)


@logprob.misconception(
    "takes exp of large logits, which overflows",
    hint="exp(89) does not fit into float32. Which of torch's functions subtracts the maximum for you?",
)
def _(logits, tokens, mask):
    scores = logits.float()
    logprobs = _picked(scores[:, :-1], tokens[:, 1:]) - scores.exp().sum(-1).log()[:, :-1]
    return torch.where(mask[:, 1:], logprobs, 0).sum(1)


_HALF_HINT = (
    "bfloat16 keeps 8 bits: near -100 its steps are 1/2. In which dtype should a sum be, and what goes into it?"
)


@logprob.misconception("adds up in bfloat16", hint=_HALF_HINT)
def _(logits, tokens, mask):
    return (_picked(logits.log_softmax(-1)[:, :-1], tokens[:, 1:]) * mask[:, 1:]).sum(1)


@logprob.misconception("adds up in bfloat16", hint=_HALF_HINT)
def _(logits, tokens, mask):
    return (_picked(logits.log_softmax(-1)[:, :-1], tokens[:, 1:]) * mask[:, 1:]).sum(1).float()


@logprob.misconception("adds the whole batch up", hint="Each answer of the batch has its own probability.")
def _(logits, tokens, mask):
    return (_scored(logits, tokens) * mask[:, 1:]).sum()


@logprob.alternative("cross_entropy with an ignored label")
def _(scores, ids, is_response):
    labels = ids[:, 1:].masked_fill(~is_response[:, 1:], -100)
    return -F.cross_entropy(scores[:, :-1].float().transpose(1, 2), labels, reduction="none").sum(dim=1)


@logprob.alternative("gather minus logsumexp")
def _(logits, tokens, mask):
    logits = logits[:, :-1].float()
    chosen = torch.take_along_dim(logits, tokens[:, 1:, None], dim=2)[..., 0]
    return ((chosen - logits.logsumexp(dim=2)) * mask[:, 1:].float()).sum(-1)


@logprob.alternative("one-hot and einsum")
def _(logits, tokens, mask):
    wanted = F.one_hot(tokens[:, 1:], logits.shape[-1]).float() * mask[:, 1:, None]
    return torch.einsum("btv,btv->b", logits.float().log_softmax(-1)[:, :-1], wanted)


@logprob.alternative("loops over rows and positions, float64 inside")
def _(*args):
    logits, tokens, mask = args
    sums = []
    for row in range(len(tokens)):
        total = logits.new_zeros((), dtype=torch.float64) + 0 * logits[row].double().sum()
        for t in range(1, tokens.shape[1]):
            if mask[row, t]:
                total = total + torch.log_softmax(logits[row, t - 1].double(), 0)[tokens[row, t]]
        sums.append(total)
    return torch.stack(sums).float()


@logprob.alternative("torch.distributions")
def _(logits, tokens, mask):
    model = torch.distributions.Categorical(logits=logits[:, :-1].float())
    return torch.where(mask[:, 1:], model.log_prob(tokens[:, 1:]), 0.0).sum(1)


# dpo.loss ------------------------------------------------------------------------------------------------------------


@question("dpo.loss", lab=LAB, points=20, slide="Direct Preference Optimization (DPO), the first slide of the two")
def loss(draw: Draw) -> Case:
    """The loss on a batch of pairs."""
    edge = draw.edge("policy = reference", "one pair", "a margin of +10,000", "a margin of -10,000")
    batch = 1 if edge == "one pair" else draw.integer(3, 6)
    reference_chosen, reference_rejected = -draw.uniform(2, batch, low=5.0, high=60.0)
    policy_chosen = reference_chosen + draw.normal(batch, scale=3.0)
    policy_rejected = reference_rejected + draw.normal(batch, scale=3.0)
    if edge == "policy = reference":
        policy_chosen, policy_rejected = reference_chosen.clone(), reference_rejected.clone()
    elif edge == "a margin of +10,000":
        policy_rejected[0] -= 10_000
    elif edge == "a margin of -10,000":
        policy_chosen[0] -= 10_000
    return Case(
        edge,
        policy_chosen=policy_chosen,
        policy_rejected=policy_rejected,
        reference_chosen=reference_chosen,
        reference_rejected=reference_rejected,
        beta=draw.choice([0.1, 0.2, 0.5]),
    )


loss.oracle("lecturekit.alignment.dpo:dpo_loss")


def _size_of_margin(case: Case) -> Tensor:
    """beta times the magnitudes that meet in each pair's margin; its roundings are relative to that."""
    return case.beta * sum(t.double().abs() for t in list(case.inputs.values())[:4])


loss.tolerance(
    ulps=lambda case: len(case.policy_chosen) + 8,
    magnitude=lambda case, _: 1 + _size_of_margin(case).mean(),
    why="three subtractions and a product, at most 4 roundings of the margin's terms, which logsigmoid does not "
    "stretch, 4 of its own and the mean's",
    part="loss",
)
for _part in ("gradient of policy_chosen", "gradient of policy_rejected"):
    loss.tolerance(
        ulps=8,
        magnitude=lambda case, _: case.beta / len(case.policy_chosen) * (1 + _size_of_margin(case)),
        why="beta / batch × sigmoid(-margin): 4 roundings of the margin's terms, times a slope of at most 1/4, and "
        "about 4 of the factors, each at most beta / batch",
        part=_part,
    )


@loss.driver
def _(function: Any, case: Case) -> dict[str, Any]:
    """The loss, and what training would see of it: the gradients to the policy's log-probabilities."""
    policy = [case.policy_chosen.requires_grad_(), case.policy_rejected.requires_grad_()]
    value = function(*case.inputs.values())
    if not isinstance(value, Tensor):
        raise Unfit(f"the loss must be a tensor, so that a policy can be trained on it, got {describe(value)}")
    if not value.requires_grad:
        raise Unfit("the loss has no gradient to the policy: a .detach(), .item(), .data or no_grad on the way?")
    chosen, rejected = torch.autograd.grad(value.sum(), policy, materialize_grads=True)
    return {"loss": value.detach(), "gradient of policy_chosen": chosen, "gradient of policy_rejected": rejected}


loss.law(
    "the loss is the negative logarithm of a probability, so not below 0", lambda _, parts: float(parts["loss"]) >= 0
)


def _starts_at_log_two(case: Case, parts: dict[str, Any]) -> bool | None:
    if case.label != "policy = reference":
        return None
    allowed = 4 * precision(case, parts["loss"]) * float(1 + _size_of_margin(case).mean())
    return abs(float(parts["loss"]) - math.log(2)) <= allowed


loss.law("where policy and reference agree the loss is log 2", _starts_at_log_two)
loss.law(
    "a step against the gradient makes the chosen answer likelier and the rejected one less likely",
    lambda case, parts: bool(
        (parts["gradient of policy_chosen"] <= 0).all() and (parts["gradient of policy_rejected"] >= 0).all()
    ),
)


@loss.misconception(
    "closes the sigmoid after the chosen log-ratio, as the second DPO slide does",
    hint="The two DPO slides place a bracket differently. Which of them rewards the difference of the two log-ratios?",
)
def _(policy_chosen, policy_rejected, reference_chosen, reference_rejected, beta):
    chosen, rejected = policy_chosen - reference_chosen, policy_rejected - reference_rejected
    return -(F.logsigmoid(beta * chosen) - beta * rejected).mean()


@loss.misconception(
    "leaves the reference out",
    hint="What keeps the policy near where it started? What is the loss when policy and reference agree?",
)
def _(policy_chosen, policy_rejected, reference_chosen, reference_rejected, beta):
    return -F.logsigmoid(beta * (policy_chosen - policy_rejected)).mean()


@loss.misconception(
    "prefers the rejected answer", hint="Raise the log-probability of the chosen answer. Should the loss rise or fall?"
)
def _(policy_chosen, policy_rejected, reference_chosen, reference_rejected, beta):
    margin = (policy_rejected - reference_rejected) - (policy_chosen - reference_chosen)
    return -F.logsigmoid(beta * margin).mean()


@loss.misconception("forgets beta", hint="What tells how strongly the policy is held to the reference?")
def _(policy_chosen, policy_rejected, reference_chosen, reference_rejected, beta):
    margin = (policy_chosen - reference_chosen) - (policy_rejected - reference_rejected)
    return -F.logsigmoid(margin).mean()


@loss.misconception(
    "puts beta outside the sigmoid",
    hint="Outside, beta only changes the learning rate. What does it stand in front of on the slide?",
)
def _(policy_chosen, policy_rejected, reference_chosen, reference_rejected, beta):
    margin = (policy_chosen - reference_chosen) - (policy_rejected - reference_rejected)
    return -beta * F.logsigmoid(margin).mean()


@loss.misconception(
    "has the sign of what is maximised",
    hint="The slide says max, an optimizer goes down. What turns one into the other?",
)
def _(policy_chosen, policy_rejected, reference_chosen, reference_rejected, beta):
    margin = (policy_chosen - reference_chosen) - (policy_rejected - reference_rejected)
    return F.logsigmoid(beta * margin).mean()


@loss.misconception(
    "adds pairs up instead of taking their mean",
    hint="Should a batch of twice the pairs make a step of twice the size?",
)
def _(policy_chosen, policy_rejected, reference_chosen, reference_rejected, beta):
    margin = (policy_chosen - reference_chosen) - (policy_rejected - reference_rejected)
    return -F.logsigmoid(beta * margin).sum()


@loss.misconception(
    "returns one loss a pair, not their mean",
    hint="backward wants a single number. What does the E on the slide ask for?",
)
def _(policy_chosen, policy_rejected, reference_chosen, reference_rejected, beta):
    margin = (policy_chosen - reference_chosen) - (policy_rejected - reference_rejected)
    return -F.logsigmoid(beta * margin)


@loss.misconception(
    "takes the mean before the sigmoid",
    hint="Can one pair that is already clear make up for another that is wrong? Which comes first, sigmoid or mean?",
)
def _(policy_chosen, policy_rejected, reference_chosen, reference_rejected, beta):
    margin = (policy_chosen - reference_chosen) - (policy_rejected - reference_rejected)
    return -F.logsigmoid(beta * margin.mean())


@loss.misconception(
    "forgets the logarithm",
    hint="What is the gradient of your loss for a pair that is badly wrong? And of its logarithm?",
)
def _(policy_chosen, policy_rejected, reference_chosen, reference_rejected, beta):
    margin = (policy_chosen - reference_chosen) - (policy_rejected - reference_rejected)
    return -(beta * margin).sigmoid().mean()


@loss.misconception(
    "divides log-probabilities instead of subtracting them",
    hint="The slide has the logarithm of a ratio. Your inputs are logarithms already: what becomes of a ratio?",
)
def _(policy_chosen, policy_rejected, reference_chosen, reference_rejected, beta):
    margin = policy_chosen / reference_chosen - policy_rejected / reference_rejected
    return -F.logsigmoid(beta * margin).mean()


_FINITE_HINT = "Try a margin of -10,000: what is exp of it, and the logarithm of that? torch has one function for both."


@loss.misconception("takes sigmoid and logarithm in two steps, which ends in infinity", hint=_FINITE_HINT)
def _(policy_chosen, policy_rejected, reference_chosen, reference_rejected, beta):
    margin = (policy_chosen - reference_chosen) - (policy_rejected - reference_rejected)
    return -torch.sigmoid(beta * margin).log().mean()


@loss.misconception("takes sigmoid and logarithm in two steps, which ends in infinity", hint=_FINITE_HINT)
def _(policy_chosen, policy_rejected, reference_chosen, reference_rejected, beta):
    margin = (policy_chosen - reference_chosen) - (policy_rejected - reference_rejected)
    return (1 + (-beta * margin).exp()).log().mean()


_HIDDEN_HINT = "The loss is finite now. What is its gradient where the better answer is behind by 10,000?"


@loss.misconception("hides the infinity behind a small constant", hint=_HIDDEN_HINT)
def _(policy_chosen, policy_rejected, reference_chosen, reference_rejected, beta):
    margin = (policy_chosen - reference_chosen) - (policy_rejected - reference_rejected)
    return -(torch.sigmoid(beta * margin) + 1e-8).log().mean()


@loss.misconception("hides the infinity behind a small constant", hint=_HIDDEN_HINT)
def _(policy_chosen, policy_rejected, reference_chosen, reference_rejected, beta):
    margin = (policy_chosen - reference_chosen) - (policy_rejected - reference_rejected)
    return -torch.sigmoid(beta * margin).clamp(min=1e-8).log().mean()


_KINK_HINT = (
    "Training starts where policy and reference agree, at a margin of 0. Which slope does autograd give clamp, "
    "relu and abs there? torch has a function without such corners."
)


@loss.misconception("the right loss, but a wrong slope where the margin is 0", hint=_KINK_HINT)
def _(policy_chosen, policy_rejected, reference_chosen, reference_rejected, beta):
    z = beta * ((policy_chosen - reference_chosen) - (policy_rejected - reference_rejected))
    return ((-z).clamp(min=0) + (-z.abs()).exp().log1p()).mean()


@loss.misconception("the right loss, but a wrong slope where the margin is 0", hint=_KINK_HINT)
def _(policy_chosen, policy_rejected, reference_chosen, reference_rejected, beta):
    z = beta * ((policy_chosen - reference_chosen) - (policy_rejected - reference_rejected))
    return (torch.relu(-z) + (-z.abs()).exp().log1p()).mean()


@loss.alternative("softplus of the other order, as policy minus reference")
def _(pc, pr, rc, rr, strength):
    return F.softplus(-strength * ((pc - pr) - (rc - rr))).mean()


@loss.alternative("implicit rewards and logaddexp")
def _(policy_win, policy_lose, reference_win, reference_lose, beta):
    win, lose = beta * (policy_win - reference_win), beta * (policy_lose - reference_lose)
    return -(win - torch.logaddexp(win, lose)).mean()


@loss.alternative("a loop over pairs, float64 inside")
def _(*args):
    *terms, beta = args
    total = terms[0].new_zeros((), dtype=torch.float64)
    for pc, pr, rc, rr in zip(*(t.double() for t in terms), strict=True):
        total = total - F.logsigmoid(beta * (pc - rc) - beta * (pr - rr))
    return (total / len(terms[0])).float()


@loss.alternative("cross-entropy of two classes")
def _(policy_chosen, policy_rejected, reference_chosen, reference_rejected, beta):
    rewards = beta * torch.stack([policy_chosen - reference_chosen, policy_rejected - reference_rejected], dim=1)
    return F.cross_entropy(rewards, torch.zeros(len(rewards), dtype=torch.long, device=rewards.device))


@loss.alternative("einsum over stacked terms, binary cross-entropy")
def _(policy_chosen, policy_rejected, reference_chosen, reference_rejected, beta):
    terms = torch.stack([policy_chosen, policy_rejected, reference_chosen, reference_rejected])
    margin = torch.einsum("tb,t->b", terms, terms.new_tensor([1.0, -1.0, -1.0, 1.0]))
    return F.binary_cross_entropy_with_logits(beta * margin, torch.ones_like(margin))


# dpo.weight ----------------------------------------------------------------------------------------------------------


@question("dpo.weight", lab=LAB, points=10, slide="Direct Preference Optimization (DPO): what its gradient does")
def weight(draw: Draw) -> Case:
    """How strongly the gradient pulls at each pair."""
    edge = draw.edge("policy = reference", "a margin of +10,000", "a margin of -10,000")
    batch = draw.integer(4, 7)
    reference_chosen, reference_rejected = -draw.uniform(2, batch, low=5.0, high=60.0)
    policy_chosen = reference_chosen + draw.normal(batch, scale=4.0)
    policy_rejected = reference_rejected + draw.normal(batch, scale=4.0)
    if edge == "policy = reference":
        policy_chosen, policy_rejected = reference_chosen.clone(), reference_rejected.clone()
    elif edge == "a margin of +10,000":
        policy_rejected[0] -= 10_000
    elif edge == "a margin of -10,000":
        policy_chosen[0] -= 10_000
    return Case(
        edge,
        policy_chosen=policy_chosen,
        policy_rejected=policy_rejected,
        reference_chosen=reference_chosen,
        reference_rejected=reference_rejected,
        beta=draw.choice([0.1, 0.2, 0.5]),
    )


weight.oracle("lecturekit.alignment.dpo:gradient_weight")
weight.tolerance(
    ulps=8,
    magnitude=lambda case, _: 1 + _size_of_margin(case),
    why="4 roundings of the margin's terms, times the sigmoid's slope of at most 1/4, and a few of the result",
)
weight.law(
    "a weight is between 0 and 1", lambda _, parts: bool(((parts["result"] >= 0) & (parts["result"] <= 1)).all())
)


def _starts_at_one_half(case: Case, parts: dict[str, Any]) -> bool | None:
    if case.label != "policy = reference":
        return None
    allowed = 4 * precision(case, parts["result"]) * (1 + _size_of_margin(case))
    return bool(((parts["result"].double() - 0.5).abs() <= allowed).all())


weight.law("where policy and reference agree nothing is known yet: one half", _starts_at_one_half)


@weight.misconception(
    "weighs the pairs that are already right",
    hint="A pair whose order is badly wrong: should it pull hard, or hardly at all?",
)
def _(policy_chosen, policy_rejected, reference_chosen, reference_rejected, beta):
    return torch.sigmoid(beta * ((policy_chosen - reference_chosen) - (policy_rejected - reference_rejected)))


@weight.misconception("forgets β", hint="The weight compares two rewards. What makes a log-ratio a reward?")
def _(policy_chosen, policy_rejected, reference_chosen, reference_rejected, beta):
    return torch.sigmoid((policy_rejected - reference_rejected) - (policy_chosen - reference_chosen))


@weight.misconception(
    "leaves the reference out",
    hint="Before the first step policy and reference agree. What is known about a pair then?",
)
def _(policy_chosen, policy_rejected, reference_chosen, reference_rejected, beta):
    return torch.sigmoid(beta * (policy_rejected - policy_chosen))


@weight.misconception(
    "takes the slope of the sigmoid, not of its logarithm",
    hint="The loss has a logarithm. d log f = f′ / f: what is left of the slope σ(1 - σ)?",
)
def _(policy_chosen, policy_rejected, reference_chosen, reference_rejected, beta):
    p = torch.sigmoid(beta * ((policy_chosen - reference_chosen) - (policy_rejected - reference_rejected)))
    return p * (1 - p)


@weight.misconception(
    "multiplies by β as well",
    hint="β stands before the whole gradient, the same for all pairs. Which factor differs from pair to pair?",
)
def _(policy_chosen, policy_rejected, reference_chosen, reference_rejected, beta):
    return beta * torch.sigmoid(beta * ((policy_rejected - reference_rejected) - (policy_chosen - reference_chosen)))


@weight.misconception("gives the loss of each pair", hint="A weight lies between 0 and 1. How large can -log σ become?")
def _(policy_chosen, policy_rejected, reference_chosen, reference_rejected, beta):
    return -F.logsigmoid(beta * ((policy_chosen - reference_chosen) - (policy_rejected - reference_rejected)))


@weight.misconception(
    "counts a pair as right or wrong, with nothing between",
    hint="Two pairs are right, one by a hair, one clearly. Should they pull alike?",
)
def _(policy_chosen, policy_rejected, reference_chosen, reference_rejected, beta):
    margin = (policy_chosen - reference_chosen) - (policy_rejected - reference_rejected)
    return (margin < 0).float()


@weight.misconception(
    "shares the weight out over the batch", hint="Is a pair's weight less because another pair is wrong too?"
)
def _(policy_chosen, policy_rejected, reference_chosen, reference_rejected, beta):
    margin = (policy_chosen - reference_chosen) - (policy_rejected - reference_rejected)
    return torch.softmax(-beta * margin, dim=0)


@weight.misconception(
    "takes exp of a large margin, which overflows",
    hint="exp(89) does not fit into float32, and infinity ÷ infinity is no number. torch has the whole function.",
)
def _(policy_chosen, policy_rejected, reference_chosen, reference_rejected, beta):
    pull = (beta * ((policy_rejected - reference_rejected) - (policy_chosen - reference_chosen))).exp()
    return pull / (1 + pull)


@weight.alternative("one minus the probability that the order is right")
def _(pc, pr, rc, rr, strength):
    return 1 - torch.sigmoid(strength * ((pc - rc) - (pr - rr)))


@weight.alternative("a softmax over the two implicit rewards")
def _(policy_win, policy_lose, reference_win, reference_lose, beta):
    rewards = beta * torch.stack([policy_win - reference_win, policy_lose - reference_lose])
    return rewards.softmax(dim=0)[1]


@weight.alternative("minus the gradient of the summed loss, over β")
def _(policy_chosen, policy_rejected, reference_chosen, reference_rejected, beta):
    with torch.enable_grad():
        chosen = policy_chosen.detach().clone().requires_grad_()
        margin = (chosen - reference_chosen) - (policy_rejected - reference_rejected)
        (slope,) = torch.autograd.grad(F.logsigmoid(beta * margin).sum(), chosen)
    return slope / beta


@weight.alternative("four terms in a row, the reference between the answers")
def _(pc, pr, rc, rr, beta):
    return torch.sigmoid(beta * (pr + rc - pc - rr))


@weight.alternative("tanh, float64 inside")
def _(*args):
    pc, pr, rc, rr = (t.double() for t in args[:4])
    return (0.5 * (1 + torch.tanh(args[4] / 2 * ((pr - rr) - (pc - rc))))).float()


# dpo.cache -----------------------------------------------------------------------------------------------------------


@question("dpo.cache", lab=LAB, points=15, slide="Direct Preference Optimization (DPO): “can be pre-computed offline”")
def cache(draw: Draw) -> Case:
    """The reference's log-probabilities, computed once."""
    edge = draw.edge("one batch", "batches of different sizes", "a batch comes twice")
    width = draw.integer(5, 8)
    count = 1 if edge == "one batch" else draw.integer(3, 5)
    rows = draw.integer(3, 5)
    batches = [draw.normal(rows + (i if edge == "batches of different sizes" else 0), width) for i in range(count)]
    if edge == "a batch comes twice":
        batches.append(batches[0].clone())
    return Case(edge, batches=batches, weight=draw.normal(2, width))


cache.oracle("lecturekit.alignment.dpo:reference_logprobs")
cache.tolerance(
    ulps=lambda case: 4 * case.weight.shape[1] + 8,
    why="one dot product and a logsigmoid a pair; relative to the largest value",
)


def _watched_reference(weight: Tensor) -> tuple[nn.Module, dict[str, Any]]:
    """A reference of one layer, whose dropout is still on, and the record of how it and its copies are used.

    The record is not an attribute: a copy of the reference would have a record of its own.
    """
    used = {"pairs": 0, "recorded": False}

    class Reference(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(weight.clone())
            self.dropout = nn.Dropout(0.5)

        def forward(self, batch: Tensor) -> tuple[Tensor, Tensor]:
            used["pairs"] += len(batch)
            used["recorded"] |= torch.is_grad_enabled() and self.weight.requires_grad
            scores = self.dropout(batch) @ self.weight.T  # (pairs, 2)
            chosen, rejected = F.logsigmoid(scores).unbind(1)
            return chosen, rejected

    return Reference(), used


@cache.driver
def _(function: Any, case: Case) -> dict[str, Any]:
    """Hand over a reference as it comes from training, look at what came back, and at how the reference was used."""
    reference, used = _watched_reference(case.weight)
    found = function(reference, case.batches)
    wanted = len(case.batches)
    if not isinstance(found, (list, tuple)):
        raise Unfit(f"the result must be a list with one (chosen, rejected) a batch, got {describe(found)}")
    if len(found) != wanted:
        raise Unfit(f"the result must have one (chosen, rejected) a batch: {wanted} of them, got {len(found)}")
    values = []
    for place, (pair, batch) in enumerate(zip(found, case.batches, strict=True)):
        if not isinstance(pair, (list, tuple)) or len(pair) != 2:
            raise Unfit(f"entry {place} of the result must be (chosen, rejected), got {describe(pair)}")
        for name, term in zip(("chosen", "rejected"), pair, strict=True):
            if not isinstance(term, Tensor):
                raise Unfit(
                    f"{name} of entry {place} must be a tensor (pairs,) = ({len(batch)},), got {describe(term)}"
                )
        values.append([term.detach() for term in pair])
    return {
        "log-probabilities": values,
        "the cached numbers carry no graph": not any(term.requires_grad for pair in found for term in pair),
        "no graph was recorded while the reference ran": not used["recorded"],
        "pairs that the reference read": used["pairs"],
        "the reference's weights are as they were": torch.equal(reference.weight.detach(), case.weight),
    }


cache.law(
    "log-probabilities are at most 0",
    lambda _, parts: all(bool((term <= 0).all()) for pair in parts["log-probabilities"] for term in pair),
)
cache.law(
    "the same batch has the same log-probabilities",
    lambda case, parts: (
        all(
            torch.equal(*pair)
            for pair in zip(parts["log-probabilities"][0], parts["log-probabilities"][-1], strict=True)
        )
        if case.label == "a batch comes twice"
        else None
    ),
)


@cache.misconception(
    "records a graph for the reference",
    hint="The reference is never trained. What does autograd keep of each batch, and for how long?",
)
def _(reference, batches):
    reference.eval()
    return [reference(batch) for batch in batches]


@cache.misconception(
    "detaches afterwards: the graph was built all the same",
    hint="detach cuts a graph that is there already. What keeps it from being recorded?",
)
def _(reference, batches):
    reference.eval()
    cached = []
    for batch in batches:
        chosen, rejected = reference(batch)
        cached.append((chosen.detach(), rejected.detach()))
    return cached


@cache.misconception(
    "leaves dropout on",
    hint="Ask the reference twice for the same batch. Does it say the same? Which of its two modes is it in?",
)
def _(reference, batches):
    with torch.no_grad():
        return [reference(batch) for batch in batches]


@cache.misconception(
    "only calls the reference: dropout is on and a graph is recorded",
    hint="The reference comes as training left it. Two things have to be switched off before it is asked.",
)
def _(reference, batches):
    return [reference(batch) for batch in batches]


@cache.misconception(
    "asks the reference twice a batch",
    hint="One call gives both log-probabilities. How many passes do you pay for?",
)
def _(reference, batches):
    reference.eval()
    with torch.no_grad():
        return [(reference(batch)[0], reference(batch)[1]) for batch in batches]


@cache.misconception(
    "keeps the last batch for all", hint="Print the cache after three batches. Are there three different entries?"
)
def _(reference, batches):
    reference.eval()
    with torch.no_grad():
        for batch in batches:
            chosen, rejected = reference(batch)
    return [(chosen, rejected) for _ in batches]


@cache.misconception("swaps chosen and rejected", hint="Which of the two does the reference return first?")
def _(reference, batches):
    reference.eval()
    with torch.no_grad():
        return [reference(batch)[::-1] for batch in batches]


@cache.misconception(
    "keeps one number a batch", hint="The loss compares each pair with its own reference. How many numbers is that?"
)
def _(reference, batches):
    reference.eval()
    with torch.no_grad():
        return [tuple(term.mean() for term in reference(batch)) for batch in batches]


@cache.misconception("keeps probabilities", hint="The loss subtracts logarithms. Does exp belong into the cache?")
def _(reference, batches):
    reference.eval()
    with torch.no_grad():
        return [tuple(term.exp() for term in reference(batch)) for batch in batches]


@cache.misconception(
    "is lazy: asks the reference again whenever it is read",
    hint="A generator computes when it is read, and can be read once. What should stay when the reference is gone?",
)
def _(reference, batches):
    reference.eval()
    return (reference(batch) for batch in batches)


@cache.alternative("a list comprehension under no_grad")
def _(model, data):
    model.eval()
    with torch.no_grad():
        return [model(batch) for batch in data]


@cache.alternative("inference mode, then copies that autograd may use")
def _(reference, batches):
    cached = []
    with torch.inference_mode():
        for batch in batches:
            chosen, rejected = reference.train(False)(batch)
            cached.append([chosen, rejected])
    return [[term.clone() for term in pair] for pair in cached]


@cache.alternative("the reference frozen, so that nothing is recorded")
def _(reference, batches):
    frozen = reference.eval().requires_grad_(False)
    return [tuple(frozen(batch)) for batch in batches]


@cache.alternative("a copy in evaluation mode is asked, the reference itself is left alone")
def _(reference, batches):
    frozen = copy.deepcopy(reference).eval()
    with torch.no_grad():
        return [frozen(batch) for batch in batches]


@cache.alternative("set_grad_enabled, a dict on the way")
def _(*args):
    reference, batches = args
    reference.eval()
    kept = {}
    before = torch.is_grad_enabled()
    torch.set_grad_enabled(False)
    try:
        for place, batch in enumerate(batches):
            kept[place] = reference(batch)
    finally:
        torch.set_grad_enabled(before)
    return [kept[place] for place in range(len(batches))]
