"""The DPO questions of lab 3: the log-probability of an answer, and the loss on a pair of them.

Rafailov et al., "Direct Preference Optimization: Your Language Model is Secretly a Reward Model", NeurIPS 2023, eq. 7.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from lecturekit.checking import Case, Draw, Unfit, question
from lecturekit.checking.compare import describe, precision

LAB = "lab03_dpo"
EPS = torch.finfo(torch.float32).eps

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
    """Two in the logits' dtype (a softmax and its gradient, rounded), the sums in float32 at least, as torch does."""
    depth = case.logits.shape[1] + case.logits.shape[2] + 6
    return 2 + depth * EPS / torch.finfo(case.logits.dtype).eps


logprob.tolerance(
    ulps=_roundings,
    magnitude=lambda case, _: _size_of_logprob(case),
    why="a log-softmax over the vocabulary is off by roundings of the largest logit; these add up over the response",
)
logprob.tolerance(
    ulps=_roundings,
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
    "adds up probabilities without their logarithm", hint="Probabilities of independent steps multiply. What adds up?"
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


@logprob.misconception(
    "takes the logarithm of a softmax that has become zero",
    hint="float32 ends near 1e-45, which is exp(-103). What is the logarithm of 0? torch can do both steps in one.",
)
def _(logits, tokens, mask):
    probabilities = _picked(logits.float().softmax(-1)[:, :-1], tokens[:, 1:])
    return torch.where(mask[:, 1:], probabilities.log(), 0).sum(1)


@logprob.misconception(
    "takes exp of large logits, which overflows",
    hint="exp(89) does not fit into float32. Which of torch's functions subtracts the maximum for you?",
)
def _(logits, tokens, mask):
    scores = logits.float()
    logprobs = _picked(scores[:, :-1], tokens[:, 1:]) - scores.exp().sum(-1).log()[:, :-1]
    return torch.where(mask[:, 1:], logprobs, 0).sum(1)


@logprob.misconception(
    "adds up in bfloat16", hint="bfloat16 keeps 8 bits: near -100 its steps are 1/2. In which dtype should a sum be?"
)
def _(logits, tokens, mask):
    return (_picked(logits.log_softmax(-1)[:, :-1], tokens[:, 1:]) * mask[:, 1:]).sum(1)


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
