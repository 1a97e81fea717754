"""The Bradley–Terry loss against its equation, the accuracy's interval, and a head that learns."""

import math

import pytest
import torch

from lecturekit.alignment import reward


def test_loss_is_the_slides_equation():
    chosen, rejected = torch.randn(2, 6, generator=torch.Generator().manual_seed(0)).double()
    pairs = zip(chosen.tolist(), rejected.tolist(), strict=True)
    expected = sum(-math.log(1 / (1 + math.exp(-(w - b)))) for w, b in pairs) / 6
    assert reward.reward_loss(chosen, rejected).item() == pytest.approx(expected, rel=1e-12)


def test_only_differences_count():
    chosen, rejected = torch.randn(2, 6, generator=torch.Generator().manual_seed(0)).double()
    moved = reward.reward_loss(chosen + 7, rejected + 7)
    assert moved.item() == pytest.approx(reward.reward_loss(chosen, rejected).item(), rel=1e-12)
    assert reward.reward_loss(chosen, chosen).item() == pytest.approx(math.log(2), rel=1e-12)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("difference", [1e4, -1e4])
def test_loss_and_gradient_stay_finite(dtype, difference):
    chosen = torch.full((1,), difference, dtype=dtype).requires_grad_()
    loss = reward.reward_loss(chosen, torch.zeros(1, dtype=dtype))
    loss.backward()
    came = float(chosen.detach())
    assert loss.item() == pytest.approx(max(0.0, -came), rel=1e-6)
    assert chosen.grad.item() == (-1 if difference < 0 else 0)
    assert loss.dtype in (torch.float32, torch.float64)


def test_loss_gradients():
    pairs = [t.double().requires_grad_() for t in torch.randn(2, 5, generator=torch.Generator().manual_seed(1))]
    assert torch.autograd.gradcheck(reward.reward_loss, pairs)


def test_accuracy_counts_ties_as_half():
    found = reward.pair_accuracy(torch.tensor([1.0, 2.0, 0.0, 5.0]), torch.tensor([0.0, 2.0, 3.0, 4.0]))
    assert found.fraction == 2.5 / 4 and found.pairs == 4
    assert found.low < found.fraction < found.high
    assert "62% of 4 pairs" in str(found) and "95 %" in str(found)


def separable(pairs, dim=12, seed=0):
    """Pairs whose better half lies further along one direction."""
    generator = torch.Generator().manual_seed(seed)
    direction = torch.randn(dim, generator=torch.Generator().manual_seed(99))
    a, b = torch.randn(2, pairs, dim, generator=generator)
    swap = (a @ direction < b @ direction)[:, None]
    return torch.where(swap, b, a), torch.where(swap, a, b)


@pytest.mark.parametrize("hidden", [0, 16])
def test_a_head_learns_what_decides(hidden):
    torch.manual_seed(0)
    head = reward.RewardHead(12, hidden)
    optimizer = torch.optim.AdamW(head.parameters(), lr=1e-2)
    pairs = separable(200)
    for _ in range(200):
        loss = reward.reward_loss(*(head(side) for side in pairs))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    with torch.no_grad():
        found = reward.pair_accuracy(*(head(side) for side in separable(200, seed=1)))
    # new pairs, which a line separates: a head that had learned nothing would be right about half of them
    assert found.low > 0.5


@pytest.mark.parametrize("hidden", [0, 16])
def test_a_standardised_head_has_mean_0_and_deviation_1_on_what_it_was_given(hidden):
    features = torch.cat(separable(60))
    head = reward.RewardHead(12, hidden).standardise(features)
    rewards = head(features).detach()
    # float32 sums over 120 rewards of order 1
    assert abs(rewards.mean().item()) < 120 * 1.2e-7 and rewards.std().item() == pytest.approx(1, rel=120 * 1.2e-7)
    assert {"mean", "std"} <= set(head.state_dict())


def test_standardising_changes_no_preference():
    chosen, rejected = separable(60)
    head = reward.RewardHead(12)
    before = (head(chosen) > head(rejected)).tolist()
    head.standardise(torch.cat([chosen, rejected]))
    assert (head(chosen) > head(rejected)).tolist() == before


@pytest.mark.parametrize(
    ("call", "error", "words"),
    [
        (lambda: reward.reward_loss([1.0], torch.ones(1)), TypeError, "chosen must be a torch.Tensor"),
        (lambda: reward.reward_loss(torch.ones(3), torch.ones(1)), ValueError, r"rejected must be \(pairs,\) = \(3,\)"),
        (lambda: reward.reward_loss(torch.ones(0), torch.ones(0)), ValueError, "chosen must not be empty"),
        (lambda: reward.reward_loss(torch.ones(2, 1), torch.ones(2, 1)), ValueError, "chosen must have 1 dimension"),
        (lambda: reward.reward_loss(torch.tensor([math.nan]), torch.ones(1)), ValueError, "chosen must be finite"),
        (lambda: reward.RewardHead(0), ValueError, "dim must be at least 1"),
        (lambda: reward.RewardHead(2, -1), ValueError, "hidden must be the width of the MLP, or 0 .*, got -1"),
        (lambda: reward.RewardHead(2, 2.5), TypeError, "hidden must be an int, got float"),
        (lambda: reward.RewardHead(2, True), TypeError, "hidden must be an int, got bool"),
        (
            lambda: reward.RewardHead(2).standardise(torch.ones(1, 2)),
            ValueError,
            "features must hold at least two texts",
        ),
    ],
)
def test_bad_arguments_are_named(call, error, words):
    with pytest.raises(error, match=words):
        call()
