"""Log-probabilities from hidden states by chunks: equal to the plain way, in value, gradient and at the edges."""

import pytest
import torch
from torch.nn import functional as F

from lecturekit.alignment.logprob import token_logprobs

EPS = torch.finfo(torch.float32).eps


def inputs(seed, shape=(3, 7), dim=12, vocab=29, dtype=torch.float32, scale=1.0):
    generator = torch.Generator().manual_seed(seed)
    hidden = scale * torch.randn(*shape, dim, generator=generator)
    weight = torch.randn(vocab, dim, generator=generator)
    targets = torch.randint(0, vocab, shape, generator=generator)
    above = torch.randn(shape, generator=generator)
    return hidden.to(dtype).requires_grad_(), weight.to(dtype).requires_grad_(), targets, above.to(torch.float32)


def plain(hidden, weight, targets):
    """The definition, in float64."""
    logprobs = (hidden.double() @ weight.double().T).log_softmax(-1)
    return logprobs.gather(-1, targets.clamp(min=0).unsqueeze(-1)).squeeze(-1) * (targets != -100)


def gradients(result, above, *leaves):
    return torch.autograd.grad((result * above).sum(), leaves, allow_unused=True)


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("rows", [1, 4, 7, 21, 100])
def test_value_and_both_gradients_are_those_of_log_softmax_and_gather(seed, rows):
    hidden, weight, targets, above = inputs(seed)
    ours = token_logprobs(hidden, weight, targets, rows)
    theirs = plain(hidden, weight, targets)
    # a dot product of depth 12, a sum over 29 words; magnitudes up to about 20
    bound = (12 + 29 + 8) * EPS * 20
    assert ours.dtype == torch.float32 and (ours - theirs).abs().max() < bound
    for found, expected in zip(
        gradients(ours, above, hidden, weight), gradients(theirs, above, hidden, weight), strict=True
    ):
        assert (found - expected).abs().max() < bound * max(1, float(expected.abs().max()))


def test_the_numbers_do_not_depend_on_the_chunk_beyond_roundings_and_two_runs_give_the_same_bits():
    hidden, weight, targets, above = inputs(0)
    first, again = (token_logprobs(hidden, weight, targets, 4) for _ in range(2))
    whole = token_logprobs(hidden, weight, targets, 100)
    bound = (12 + 29 + 8) * EPS * 20  # as above
    assert (first - whole).abs().max() < bound
    for a, b in zip(gradients(first, above, hidden, weight), gradients(whole, above, hidden, weight), strict=True):
        assert (a - b).abs().max() < bound * max(1, float(b.abs().max()))
    first, again = (token_logprobs(hidden, weight, targets, 4) for _ in range(2))
    assert torch.equal(first, again)
    assert all(
        torch.equal(a, b)
        for a, b in zip(gradients(first, above, hidden, weight), gradients(again, above, hidden, weight), strict=True)
    )


def test_ignored_positions_give_zero_take_no_part_and_pass_no_gradient():
    hidden, weight, targets, above = inputs(1)
    targets[0] = -100
    targets[2, 3] = -100
    result = token_logprobs(hidden, weight, targets, 4)
    assert bool((result[targets == -100] == 0).all()) and bool((result[targets != -100] < 0).all())
    to_hidden, _ = gradients(result, above, hidden, weight)
    assert bool((to_hidden[targets == -100] == 0).all()) and bool((to_hidden[targets != -100] != 0).any(-1).all())
    hidden.data[0] = float("nan")  # padding may hold anything
    assert bool(token_logprobs(hidden, weight, targets, 4).isfinite().all())


def test_when_nothing_counts_the_result_is_zero_and_so_is_the_gradient():
    hidden, weight, targets, above = inputs(2)
    result = token_logprobs(hidden, weight, torch.full_like(targets, -100))
    assert torch.equal(result, torch.zeros(3, 7))
    assert all(bool((found == 0).all()) for found in gradients(result, above, hidden, weight))


@pytest.mark.parametrize("frozen", ["hidden", "weight"])
def test_only_what_is_trained_gets_a_gradient(frozen):
    hidden, weight, targets, above = inputs(3)
    still, leaf = (weight, hidden) if frozen == "weight" else (hidden, weight)
    still.requires_grad_(False)
    (token_logprobs(hidden, weight, targets, 5) * above).sum().backward()
    (expected,) = gradients(plain(hidden, weight, targets), above, leaf)
    bound = (12 + 29 + 8) * EPS * 20  # as above
    assert still.grad is None
    assert (leaf.grad - expected).abs().max() < bound * max(1, float(expected.abs().max()))


def test_large_logits_stay_finite_and_a_sure_token_has_log_probability_zero():
    hidden, weight, targets, above = inputs(4, scale=1000.0)
    result = token_logprobs(hidden, weight, targets, 5)
    best = (hidden @ weight.T).argmax(-1)
    assert bool(result.isfinite().all()) and float(token_logprobs(hidden, weight, best).detach().max()) == 0
    assert all(bool(found.isfinite().all()) for found in gradients(result, above, hidden, weight))


def test_bfloat16_gives_float32_within_the_roundings_of_its_products():
    hidden, weight, targets, above = inputs(5, dtype=torch.bfloat16)
    result = token_logprobs(hidden, weight, targets, 5)
    exact = plain(hidden, weight, targets)
    unit = 2**-8  # one rounding to bfloat16, relative
    h, w = hidden.detach().double().flatten(0, 1), weight.detach().double()  # (21, 12), (29, 12)
    logits, at, g = h @ w.T, targets.flatten(), above.double().flatten().unsqueeze(1)
    largest = logits.abs().amax(1, keepdim=True)
    # each logit is rounded once; the target's and, in the worst case, all others the other way
    assert result.dtype == torch.float32 and (result - exact).abs().max() <= 2 * unit * largest.max()

    found = gradients(result, above, hidden, weight)
    assert all(one.dtype == torch.bfloat16 for one in found)
    expected = gradients(exact, above, hidden, weight)
    p = logits.softmax(1)
    off = torch.expm1(2 * unit * largest)  # of each probability, relative, when its logits are off like that
    # to a state, g (W[target] − Σ p W): besides, p, the sum, its quotient, the difference and the product are rounded
    to_hidden = g.abs() * ((p * (off + 5 * unit)) @ w.abs() + 5 * unit * w[at].abs())
    assert ((found[0] - expected[0]).flatten(0, 1).abs() <= to_hidden).all()
    # to the head, Σ g (1[target] − p) h: besides, the factor is rounded, and the sum after each of the 5 chunks
    factor = (F.one_hot(at, len(w)) - p).abs()
    to_weight = (g.abs() * (p * off + 6 * unit * factor)).T @ h.abs()
    assert ((found[1] - expected[1]).abs() <= to_weight).all()
    # and these bounds say something: most gradients are beyond them, so zeros would not pass
    assert (expected[0].flatten(0, 1).abs() > to_hidden).double().mean() > 0.5
    assert (expected[1].abs() > to_weight).double().mean() > 0.5


def test_no_tensor_of_tokens_times_vocabulary_is_ever_made():
    class Largest(torch.utils._python_dispatch.TorchDispatchMode):
        seen = 0

        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            result = function(*args, **(kwargs or {}))
            for tensor in result if isinstance(result, tuple | list) else (result,):
                if isinstance(tensor, torch.Tensor):
                    self.seen = max(self.seen, tensor.numel())
            return result

    hidden, weight, targets, above = inputs(6, shape=(4, 64), dim=8, vocab=500)
    with Largest() as largest:
        gradients(token_logprobs(hidden, weight, targets, 16), above, hidden, weight)
    assert largest.seen == 16 * 500  # 256 × 500 the plain way
    with Largest() as largest:
        gradients(plain(hidden, weight, targets), above, hidden, weight)
    assert largest.seen == 256 * 500


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"hidden": [[1.0]]}, TypeError, "hidden must be a torch.Tensor"),
        ({"hidden": torch.zeros(3, 7, 11)}, ValueError, r"hidden must be \(..., dim = 12\)"),
        ({"hidden": torch.zeros(3, 7, 12, dtype=torch.float64)}, TypeError, "must have one dtype"),
        ({"targets": torch.zeros(3, 6, dtype=torch.long)}, ValueError, r"targets must be \(3, 7\)"),
        ({"targets": torch.zeros(3, 7)}, TypeError, "integer dtype"),
        ({"targets": torch.full((3, 7), 29)}, ValueError, r"targets must be in 0..28 or -100"),
        ({"targets": torch.full((3, 7), -1)}, ValueError, r"targets must be in 0..28 or -100"),
        ({"rows": 0}, ValueError, "rows must be at least 1"),
    ],
)
def test_bad_input_is_named(change, error, message):
    hidden, weight, targets, _ = inputs(0)
    arguments = {"hidden": hidden, "weight": weight, "targets": targets, "rows": 4} | change
    with pytest.raises(error, match=message):
        token_logprobs(**arguments)


def test_value_and_gradients_equal_trl_s_chunked_function():
    from trl.kernels.chunked_logprob import ChunkedLogProbFunction

    hidden, weight, targets, above = inputs(7, shape=(40,), dim=16, vocab=300)
    ours = token_logprobs(hidden, weight, targets, 16)
    theirs, *_ = ChunkedLogProbFunction.apply(hidden, weight, None, targets, 1.0, 128, None, 1.0, ())
    assert torch.allclose(ours, theirs, rtol=1e-5, atol=1e-5)
    for found, expected in zip(
        gradients(ours, above, hidden, weight), gradients(theirs, above, hidden, weight), strict=True
    ):
        assert torch.allclose(found, expected, rtol=1e-4, atol=1e-5)
