"""PPO's parts against their equations written out token by token, exact expectations, and TRL's GRPO trainer."""

import itertools
import math
from collections import defaultdict
from types import SimpleNamespace

import pytest
import torch

from lecturekit.alignment import ppo


def batch_of(seed=0, dtype=torch.float64):
    """Three responses of 6, 4 and 1 tokens, with junk in the padding."""
    generator = torch.Generator().manual_seed(seed)
    mask = torch.arange(6) < torch.tensor([6, 4, 1])[:, None]
    draws = [torch.randn(3, 6, generator=generator).to(dtype) for _ in range(4)]
    return mask, draws


# KL estimators


def exact_pair(seed=0, vocab=7):
    generator = torch.Generator().manual_seed(seed)
    policy, reference = (1.5 * torch.randn(2, vocab, generator=generator)).double().log_softmax(-1)
    return policy, reference, (policy.exp() * (policy - reference)).sum()


@pytest.mark.parametrize("seed", range(5))
def test_k1_and_k3_are_unbiased_and_k2_is_not(seed):
    policy, reference, truth = exact_pair(seed)
    k1, k2, k3 = ((policy.exp() * k).sum() for k in ppo.kl_estimators(policy, reference))
    assert k1.item() == pytest.approx(truth.item(), rel=1e-12)
    assert k3.item() == pytest.approx(truth.item(), rel=1e-12)
    assert abs(k2 - truth) > 0.01 * truth


@pytest.mark.parametrize("seed", range(5))
def test_k3_is_never_negative_and_varies_less_than_k1_near_the_reference(seed):
    policy, reference, _ = exact_pair(seed)
    reference = (policy + 0.1 * (reference - policy)).log_softmax(-1)
    truth = (policy.exp() * (policy - reference)).sum()
    k1, k2, k3 = ppo.kl_estimators(policy, reference)
    variance = [(policy.exp() * (k - truth).square()).sum() for k in (k1, k2, k3)]
    assert (k3 >= 0).all() and (k2 >= 0).all() and (k1 < 0).any()
    assert variance[2] < 0.5 * variance[0]


def test_the_bias_of_k2_vanishes_faster_than_the_divergence():
    policy, reference, _ = exact_pair()
    bias = []
    for step in (0.1, 0.01):
        near = (policy + step * (reference - policy)).log_softmax(-1)
        truth = (policy.exp() * (policy - near)).sum()
        bias.append(abs(float((policy.exp() * ppo.kl_estimators(policy, near)[1]).sum() / truth) - 1))
    assert (
        bias[1] < 0.2 * bias[0]
    )  # the bias is of third order and the divergence of second: 0.1 but for the next order


def test_k3_keeps_its_digits_near_zero():
    close = torch.tensor([[1e-4]])
    (k3,) = ppo.kl_estimators(torch.zeros(1, 1), close)[2]
    # exp(1e-4) − 1 − 1e-4 written plainly in float32 is off by 1e-7, twenty times the value itself
    assert k3.item() == pytest.approx(math.expm1(float(close.double())) - float(close.double()), abs=1.2e-11)


# token rewards


def test_a_rows_rewards_add_up_to_the_score_minus_beta_kl():
    mask, (logprobs, reference, *_) = batch_of()
    score = torch.tensor([2.0, -1.0, 0.5]).double()
    rewards = ppo.token_rewards(score, logprobs, reference, mask, 0.3)
    for row, length in enumerate((6, 4, 1)):
        kl = sum(float(logprobs[row, t] - reference[row, t]) for t in range(length))
        assert rewards[row].sum().item() == pytest.approx(float(score[row]) - 0.3 * kl, rel=1e-12)
        assert rewards[row, 0].item() == pytest.approx(
            -0.3 * float(logprobs[row, 0] - reference[row, 0]) + (float(score[row]) if length == 1 else 0), rel=1e-12
        )
    assert (rewards[~mask] == 0).all()


def test_rewards_are_data():
    mask, (logprobs, reference, *_) = batch_of()
    assert not ppo.token_rewards(torch.ones(3), logprobs.requires_grad_(), reference, mask, 0.1).requires_grad


def test_the_objective_of_the_slide_is_the_expected_sum_of_token_rewards():
    # Every sequence of two tokens over three words: the expectation is exact.
    generator = torch.Generator().manual_seed(0)
    first, second = torch.randn(2, 3, generator=generator).double(), torch.randn(2, 3, 3, generator=generator).double()
    logs = [first.log_softmax(-1), second.log_softmax(-1)]
    tokens = torch.tensor(list(itertools.product(range(3), repeat=2)))
    score = torch.randn(9, generator=generator).double()
    policy, reference = (
        torch.stack([logs[0][m][tokens[:, 0]], logs[1][m][tokens[:, 0], tokens[:, 1]]], dim=1) for m in (0, 1)
    )
    weights = policy.sum(1).exp()
    rewards = ppo.token_rewards(score, policy, reference, torch.ones(9, 2, dtype=torch.bool), 0.7)
    kl = (weights * (policy - reference).sum(1)).sum()
    assert kl > 0.01
    expected = (weights * score).sum() - 0.7 * kl
    assert (weights * rewards.sum(1)).sum().item() == pytest.approx(expected.item(), rel=1e-12)


# advantages


@pytest.mark.parametrize(("gamma", "lam"), [(1.0, 0.95), (0.9, 0.8), (0.9, 0.0), (1.0, 1.0)])
def test_gae_is_the_papers_double_sum(gamma, lam):
    mask, (rewards, values, *_) = batch_of()
    advantages, returns = ppo.gae(rewards, values, mask, gamma, lam)
    for row, length in enumerate((6, 4, 1)):
        for t in range(length):
            total = 0.0
            for ahead in range(length - t):
                after = float(values[row, t + ahead + 1]) if t + ahead + 1 < length else 0.0
                delta = float(rewards[row, t + ahead]) + gamma * after - float(values[row, t + ahead])
                total += (gamma * lam) ** ahead * delta
            assert advantages[row, t].item() == pytest.approx(total, rel=1e-10, abs=1e-12)
    assert torch.equal(returns[mask], (advantages + values)[mask])


def test_with_lambda_one_the_values_cancel_out_of_the_returns():
    mask, (rewards, values, others, _) = batch_of()
    _, returns = ppo.gae(rewards, values, mask, 0.9, 1.0)
    _, same = ppo.gae(rewards, others, mask, 0.9, 1.0)
    torch.testing.assert_close(returns, same, rtol=1e-10, atol=1e-12)


def test_a_perfect_value_head_leaves_no_advantage():
    mask, (rewards, *_) = batch_of()
    _, values = ppo.gae(rewards, torch.zeros_like(rewards), mask, 0.9, 1.0)
    advantages, returns = ppo.gae(rewards, values, mask, 0.9, 0.7)
    assert advantages.abs().max() < 1e-12 and (returns - values)[mask].abs().max() < 1e-12


@pytest.mark.parametrize("junk", [1e6, math.nan, math.inf])
def test_nothing_leaks_across_padding(junk):
    mask, (rewards, values, logprobs, old) = batch_of(dtype=torch.float32)
    spoil = [torch.where(mask, t, junk) for t in (rewards, values, logprobs, old)]
    for clean, dirty in zip(
        ppo.advantages_and_returns(rewards, values, mask, 0.9, 0.8),
        ppo.advantages_and_returns(spoil[0], spoil[1], mask, 0.9, 0.8),
        strict=True,
    ):
        assert torch.equal(clean, dirty)
        assert (dirty[~mask] == 0).all()
    score = torch.ones(3)
    assert torch.equal(
        ppo.token_rewards(score, spoil[2], spoil[3], mask, 0.1), ppo.token_rewards(score, logprobs, old, mask, 0.1)
    )
    new = spoil[2].clone().requires_grad_()
    loss = ppo.policy_loss(new, spoil[3], spoil[0], mask, 0.2)
    assert torch.equal(loss, ppo.policy_loss(logprobs, old, rewards, mask, 0.2))
    (gradient,) = torch.autograd.grad(loss, new)
    assert (gradient[~mask] == 0).all() and gradient.isfinite().all()
    assert torch.equal(
        ppo.value_loss(spoil[1], spoil[2], spoil[0], mask, 0.2), ppo.value_loss(values, logprobs, rewards, mask, 0.2)
    )


def test_padding_on_the_left_gives_the_same_as_on_the_right():
    mask, (rewards, values, *_) = batch_of()
    right = ppo.advantages_and_returns(rewards, values, mask, 0.9, 0.8)
    lengths = mask.sum(1).tolist()
    rolled = [
        torch.stack([row.roll(6 - n) for row, n in zip(t, lengths, strict=True)]) for t in (rewards, values, mask)
    ]
    left = ppo.advantages_and_returns(*rolled, 0.9, 0.8)
    for a, b in zip(right, left, strict=True):
        torch.testing.assert_close(a[mask], b[rolled[2]], rtol=1e-12, atol=1e-12)


def test_whitening():
    mask, (advantages, *_) = batch_of()
    white = ppo.whiten(5 * advantages + 3, mask)
    assert white[mask].mean().item() == pytest.approx(0, abs=1e-12)
    assert white[mask].std().item() == pytest.approx(1, rel=1e-7)  # 1e-8 in the denominator
    assert (white[~mask] == 0).all()


# the clipped objective


@pytest.mark.parametrize("seed", range(3))
def test_policy_loss_token_by_token(seed):
    mask, (logprobs, moved, advantages, _) = batch_of(seed)
    old = logprobs + 0.4 * moved
    total = 0.0
    for row, t in mask.nonzero().tolist():
        ratio = math.exp(logprobs[row, t] - old[row, t])
        total += min(ratio * advantages[row, t], max(0.8, min(1.2, ratio)) * advantages[row, t])
    loss = ppo.policy_loss(logprobs, old, advantages, mask, 0.2)
    assert loss.item() == pytest.approx(-float(total) / 11, rel=1e-12)


def test_policy_loss_gradients():
    mask, (logprobs, moved, advantages, _) = batch_of()
    old = logprobs + 0.5 * moved
    assert torch.autograd.gradcheck(lambda x: ppo.policy_loss(x, old, advantages, mask, 0.2), logprobs.requires_grad_())


def test_before_the_first_update_the_gradient_is_the_policy_gradient():
    mask, (logprobs, _, advantages, _) = batch_of()
    loss = ppo.policy_loss(logprobs.requires_grad_(), logprobs.detach(), advantages, mask, 0.2)
    (gradient,) = torch.autograd.grad(loss, logprobs)
    torch.testing.assert_close(gradient, -advantages * mask / 11)


def test_value_loss_token_by_token():
    mask, (values, old, returns, _) = batch_of()
    total = 0.0
    for row, t in mask.nonzero().tolist():
        near = old[row, t] + max(-0.2, min(0.2, float(values[row, t] - old[row, t])))
        total += 0.5 * max((values[row, t] - returns[row, t]) ** 2, (near - returns[row, t]) ** 2)
    assert ppo.value_loss(values, old, returns, mask, 0.2).item() == pytest.approx(float(total) / 11, rel=1e-12)


def test_the_whole_update_climbs_the_objective_on_a_bandit():
    """A policy over five words, its exact optimum π_ref exp(r / β): PPO's pieces together must come close to it."""
    torch.manual_seed(0)
    reward, beta = torch.tensor([0.0, 0.5, 1.0, -1.0, 0.2]), 0.5
    reference = torch.tensor([0.3, 0.3, 0.1, 0.2, 0.1]).log()
    best, *others = [(reference + reward / b).softmax(0) for b in (beta, 0.9 * beta, 1.1 * beta)]
    logits = reference.clone().requires_grad_()
    optimizer = torch.optim.Adam([logits], lr=0.05)
    for step in range(200):
        optimizer.param_groups[0]["lr"] = 0.05 * (1 - step / 200)
        old = logits.detach().log_softmax(0)
        tokens = torch.multinomial(old.exp(), 512, replacement=True)[:, None]
        mask = torch.ones_like(tokens, dtype=torch.bool)
        rewards = ppo.token_rewards(reward[tokens[:, 0]], old[tokens], reference[tokens], mask, beta)
        advantages, _ = ppo.advantages_and_returns(rewards, torch.zeros_like(rewards), mask, 1.0, 0.95)
        loss = ppo.policy_loss(logits.log_softmax(0)[tokens], old[tokens], advantages, mask, 0.2)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    def distance(policy):
        return (best * (best.log() - policy.log())).sum()

    # so near that a β one tenth off would be told from the right one
    assert distance(logits.detach().softmax(0)) < min(map(distance, others))


# groups, and TRL


def test_group_advantages_row_by_row():
    rewards = torch.randn(3, 5, generator=torch.Generator().manual_seed(0)).double()
    result = ppo.group_advantages(rewards)
    for row, made in zip(rewards.tolist(), result.tolist(), strict=True):
        mean = sum(row) / 5
        std = math.sqrt(sum((r - mean) ** 2 for r in row) / 4)
        assert made == pytest.approx([(r - mean) / (std + 1e-4) for r in row], rel=1e-12)
    assert (ppo.group_advantages(torch.full((2, 4), 0.75)) == 0).all()


def test_policy_loss_and_k3_equal_trls_grpo_trainer():
    """TRL 1.16 has no PPO trainer any more; its GRPO trainer has the same clip, and k3 for the KL divergence."""
    from trl import GRPOTrainer

    mask, (logprobs, moved, shift, _) = batch_of(dtype=torch.float32)
    logprobs, beta = logprobs - 3, 0.07
    old, reference = logprobs + 0.4 * moved, logprobs + 0.5 * shift
    advantages = torch.tensor([1.3, -0.4, -0.9])
    new = logprobs.clone().requires_grad_()

    # the trainer's own method, on a stand-in that holds its settings and the log-probabilities a model would give
    trainer = SimpleNamespace(
        beta=beta, epsilon_low=0.2, epsilon_high=0.2, loss_type="bnpo", importance_sampling_level="token",
        top_entropy_quantile=1.0, off_policy_mask_threshold=None, use_vllm=False, aux_loss_enabled=False,
        current_gradient_accumulation_steps=1, _entropy_bonus_enabled=False, model=SimpleNamespace(training=False),
        accelerator=SimpleNamespace(gather=lambda t: t, num_processes=1, reduce=lambda t, reduction: t),
        args=SimpleNamespace(delta=None, use_bias_correction_kl=False), _metrics={"eval": defaultdict(list)},
        _get_per_token_logps_and_entropies=lambda *_, **__: (new, torch.zeros_like(new), None),
    )  # fmt: skip
    tokens = torch.zeros(3, 6, dtype=torch.long)
    inputs = {
        "prompt_ids": tokens[:, :1], "prompt_mask": torch.ones(3, 1, dtype=torch.long), "completion_ids": tokens,
        "completion_mask": mask.long(), "advantages": advantages, "old_per_token_logps": old,
        "ref_per_token_logps": reference, "num_items_in_batch": mask.sum(),
    }  # fmt: skip
    theirs = GRPOTrainer._compute_loss(trainer, None, inputs)
    (their_gradient,) = torch.autograd.grad(theirs, new)

    ours = ppo.policy_loss(new, old, advantages[:, None].expand(3, 6), mask, 0.2)
    ours = ours + beta * ppo.kl_estimators(new, reference)[2][mask].mean()
    (our_gradient,) = torch.autograd.grad(ours, new)
    # Means of 11 float32 terms of order 1, each through one exp.
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(our_gradient, their_gradient, rtol=1e-5, atol=1e-6)
    assert their_gradient.abs().max() > 0.01


# bad arguments

MASK = torch.ones(2, 3, dtype=torch.bool)
ONES = torch.ones(2, 3)


@pytest.mark.parametrize(
    ("call", "error", "words"),
    [
        (lambda: ppo.kl_estimators(ONES, ONES[:1]), ValueError, r"reference must be \(2, 3\) as logprobs is"),
        (lambda: ppo.kl_estimators(ONES.long(), ONES), TypeError, "logprobs must have a floating-point dtype"),
        (lambda: ppo.token_rewards(torch.ones(2), ONES, ONES, ONES, 0.1), TypeError, "mask must have dtype torch.bool"),
        (
            lambda: ppo.token_rewards(torch.ones(3), ONES, ONES, MASK, 0.1),
            ValueError,
            r"score must be \(batch,\) = \(2,\)",
        ),
        (lambda: ppo.token_rewards(torch.ones(2), ONES, ONES, MASK, -1), ValueError, "beta must be at least 0"),
        (lambda: ppo.gae(ONES, ONES[:, :2], MASK, 1, 1), ValueError, r"values must be \(batch, seq\) = \(2, 3\)"),
        (lambda: ppo.gae(ONES, ONES, MASK, 1.1, 1), ValueError, "gamma must be in 0"),
        (lambda: ppo.gae(ONES, ONES, MASK, 1, -0.1), ValueError, "lam must be in 0"),
        (lambda: ppo.gae(ONES, ONES, MASK & False, 1, 1), ValueError, "at least one token of every response"),
        (lambda: ppo.whiten(ONES[:1, :1], MASK[:1, :1]), ValueError, "at least two tokens"),
        (lambda: ppo.policy_loss(ONES, ONES, ONES, MASK, 0), ValueError, "epsilon must be above 0"),
        (lambda: ppo.value_loss(ONES, ONES, ONES, MASK, 0), ValueError, "epsilon must be above 0"),
        (lambda: ppo.group_advantages(torch.ones(3, 1)), ValueError, "at least 2 responses"),
        (lambda: ppo.group_advantages(torch.ones(3)), ValueError, "rewards must have 2 dimension"),
    ],
)
def test_bad_arguments_are_named(call, error, words):
    with pytest.raises(error, match=words):
        call()
