"""The resampler equals the published equations, written here once more with plain loops over NumPy float64."""

import math

import numpy as np
import pytest
import torch

from lecturekit.multimodal.perceiver import PerceiverResampler, ResamplerAttention, from_peer


def layer_norm(rows, weight, bias):
    """Ba et al. 2016, with PyTorch's epsilon of 1e-5 that both public versions leave as it is."""
    result = []
    for row in rows:
        mean = sum(row) / len(row)
        variance = sum((row - mean) ** 2) / len(row)
        result.append((row - mean) / math.sqrt(variance + 1e-5) * weight + bias)
    return np.array(result)


def gelu(rows):
    """x Φ(x), the exact form (Hendrycks and Gimpel 2016)."""
    return np.vectorize(lambda x: x * 0.5 * (1 + math.erf(x / math.sqrt(2))))(rows)


def attention_by_hand(features, latents, weights, heads):
    """One head and one latent at a time. features (N, d), latents (R, d) → (R, d) and the map (heads, R, N + R)."""
    features = layer_norm(features, weights["norm_media.weight"], weights["norm_media.bias"])
    latents = layer_norm(latents, weights["norm_latents.weight"], weights["norm_latents.bias"])
    context = list(features) + list(latents)
    w_q, w_out = weights["to_q.weight"], weights["to_out.weight"]
    w_k, w_v = np.split(weights["to_kv.weight"], 2)  # keys are the first half of the joint layer
    width = len(w_q) // heads
    out, maps = (np.zeros((len(latents), len(w_q))), np.zeros((heads, len(latents), len(context))))
    for head in range(heads):
        part = slice(head * width, (head + 1) * width)
        for i, latent in enumerate(latents):
            query = w_q[part] @ latent
            logits = [query @ (w_k[part] @ token) / math.sqrt(width) for token in context]
            total = sum(math.exp(logit) for logit in logits)
            for j, token in enumerate(context):
                maps[head, i, j] = math.exp(logits[j]) / total
                out[i, part] += maps[head, i, j] * (w_v[part] @ token)
    return out @ w_out.T, maps


def resample_by_hand(x_f, state, depth, heads):
    """The slide's pseudo-code for one clip. x_f (T, S, d) → tokens (R, d) and maps (depth, heads, R, T·S + R)."""
    x_f = np.array([frame + state["time_embeddings"][t] for t, frame in enumerate(x_f)])
    x_f = x_f.reshape(-1, x_f.shape[-1])
    x, maps = state["latents"], []
    for i in range(depth):
        attention = {name: state[f"layers.{i}.0.{name}"] for name in ATTENTION_WEIGHTS}
        attended, attention_map = attention_by_hand(x_f, x, attention, heads)
        x = x + attended
        ffw = f"layers.{i}.1"
        hidden = layer_norm(x, state[f"{ffw}.0.weight"], state[f"{ffw}.0.bias"])
        x = x + gelu(hidden @ state[f"{ffw}.1.weight"].T) @ state[f"{ffw}.3.weight"].T
        maps.append(attention_map)
    return layer_norm(x, state["norm.weight"], state["norm.bias"]), np.array(maps)


ATTENTION_WEIGHTS = (
    "norm_media.weight",
    "norm_media.bias",
    "norm_latents.weight",
    "norm_latents.bias",
    "to_q.weight",
    "to_kv.weight",
    "to_out.weight",
)


def peer_state(dim, depth, latents, heads, dim_head, seed, **time_embeddings):
    """Random weights under the names and shapes that OpenFlamingo and flamingo-pytorch save."""
    draw = torch.Generator().manual_seed(seed)
    inner = heads * dim_head
    shapes = {"latents": (latents, dim), "norm.weight": (dim,), "norm.bias": (dim,), **time_embeddings}
    for i in range(depth):
        for name in ATTENTION_WEIGHTS[:4]:
            shapes[f"layers.{i}.0.{name}"] = (dim,)
        shapes[f"layers.{i}.0.to_q.weight"] = (inner, dim)
        shapes[f"layers.{i}.0.to_kv.weight"] = (2 * inner, dim)
        shapes[f"layers.{i}.0.to_out.weight"] = (dim, inner)
        shapes |= {f"layers.{i}.1.0.weight": (dim,), f"layers.{i}.1.0.bias": (dim,)}
        shapes |= {f"layers.{i}.1.1.weight": (4 * dim, dim), f"layers.{i}.1.3.weight": (dim, 4 * dim)}
    return {name: torch.randn(shape, generator=draw, dtype=torch.float64) * 0.5 for name, shape in shapes.items()}


def small(**changes):
    torch.manual_seed(0)
    return PerceiverResampler(**({"dim": 16, "depth": 2, "num_latents": 5, "heads": 2, "dim_head": 8} | changes))


@pytest.mark.parametrize(
    "embeddings", [{"frame_embs": (4, 12)}, {"media_pos_emb": (4, 1, 12)}], ids=["OpenFlamingo", "flamingo-pytorch"]
)
@pytest.mark.parametrize("seed", range(3))
def test_equals_the_published_equations_given_a_peers_weights(embeddings, seed):
    state = from_peer(peer_state(12, 2, 5, heads=3, dim_head=4, seed=seed, **embeddings))
    model = PerceiverResampler(12, 2, 5, heads=3, dim_head=4, max_time=4).double()
    model.load_state_dict(state)  # strict: the names and shapes are the peer's, none missing, none left over
    x_f = torch.randn(2, 3, 7, 12, generator=torch.Generator().manual_seed(seed + 100), dtype=torch.float64)
    tokens, maps = model.attend(x_f)
    weights = {name: value.numpy() for name, value in state.items()}
    for clip in range(2):
        by_hand, maps_by_hand = resample_by_hand(x_f[clip].numpy(), weights, depth=2, heads=3)
        # float64: sums of at most 48 terms of size up to about 10, twice over, stay within some 1e3 · 2.2e-16 · 10
        np.testing.assert_allclose(tokens[clip].detach().numpy(), by_hand, rtol=0, atol=1e-11)
        np.testing.assert_allclose(maps[:, clip].detach().numpy(), maps_by_hand, rtol=0, atol=1e-11)


def test_float32_agrees_with_float64_up_to_rounding():
    model, x_f = (small(), torch.randn(3, 4, 9, 16, generator=torch.Generator().manual_seed(1)))
    single = model(x_f)
    # outputs of a LayerNorm, so of size 1; a hundred or so roundings of 6e-8, magnified by at most ten on the way
    torch.testing.assert_close(single.double(), model.double()(x_f.double()), rtol=0, atol=1e-4)


def test_the_slides_shapes():
    """27 visual tokens and 5 queries: 32 keys and values, an attention map of 5×32, 5 tokens out."""
    model = small(heads=1, depth=1)
    tokens, maps = model.attend(torch.randn(3, 9, 16))
    assert maps.shape == (1, 1, 5, 27 + 5)
    assert maps[0, 0].shape == (5, 32)
    assert tokens.shape == (5, 16)


def test_a_single_attention_shows_its_map():
    torch.manual_seed(0)
    attention = ResamplerAttention(16, heads=4, dim_head=8)
    features, latents = torch.randn(2, 27, 16), torch.randn(2, 5, 16)
    out, attention_map = attention.attend(features, latents)
    assert attention_map.shape == (2, 4, 5, 32) and out.shape == (2, 5, 16)
    assert (attention_map > 0).all()
    # softmax rows of 32 float32 numbers: their sum is off by at most 32 roundings of 6e-8
    torch.testing.assert_close(attention_map.sum(-1), torch.ones(2, 4, 5), rtol=0, atol=2e-6)
    assert torch.equal(attention(features, latents), out)


@pytest.mark.parametrize(("time", "space"), [(1, 1), (1, 49), (8, 3), (5, 100)])
def test_many_features_in_the_same_few_tokens_out(time, space):
    assert small()(torch.randn(2, time, space, 16)).shape == (2, 5, 16)


def test_without_a_batch_it_is_a_batch_of_one():
    model, x_f = small(), torch.randn(3, 9, 16)
    tokens, maps = model.attend(x_f)
    batched, batched_maps = model.attend(x_f[None])
    assert torch.equal(tokens, batched[0])
    assert torch.equal(maps, batched_maps[:, 0])


def test_clips_of_a_batch_do_not_see_each_other():
    model, x_f = small().double(), torch.randn(2, 3, 9, 16, dtype=torch.float64)
    changed = x_f.clone()
    changed[1] *= torch.linspace(-1, 1, 16)  # not by adding a number to all: LayerNorm takes that out
    before, after = model(x_f), model(changed)
    torch.testing.assert_close(before[0], after[0], rtol=0, atol=1e-12)  # float64 rounding
    assert (before[1] - after[1]).abs().max() > 1e-3


def test_places_in_a_frame_have_no_order_but_frames_have():
    model, x_f = small().double(), torch.randn(1, 3, 9, 16, dtype=torch.float64)
    same = model(x_f.flip(2))
    torch.testing.assert_close(model(x_f), same, rtol=0, atol=1e-12)  # float64 sums in another order
    assert (model(x_f) - model(x_f.flip(1))).abs().max() > 1e-3


def test_without_time_embeddings_frames_have_no_order_and_no_limit():
    model, x_f = (small(max_time=None).double(), torch.randn(1, 30, 4, 16, dtype=torch.float64))
    assert "time_embeddings" not in model.state_dict()
    torch.testing.assert_close(model(x_f), model(x_f.flip(1)), rtol=0, atol=1e-12)  # float64 sums in another order


def test_every_weight_gets_a_gradient():
    model = small(max_time=3)
    model(torch.randn(2, 3, 9, 16)).pow(3).sum().backward()
    without = [name for name, p in model.named_parameters() if p.grad is None or not p.grad.abs().max() > 0]
    assert without == []


def test_half_precision_and_autocast():
    x_f = torch.randn(2, 3, 9, 16, generator=torch.Generator().manual_seed(2))
    exact = small()(x_f)
    half = small().bfloat16()(x_f.bfloat16())
    assert half.dtype == torch.bfloat16
    # bfloat16 keeps 8 bits: 0.4 % a rounding, some ten in a row, on tokens of size up to 3
    torch.testing.assert_close(half.float(), exact, rtol=0, atol=0.15)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        torch.testing.assert_close(small()(x_f.bfloat16()).float(), exact, rtol=0, atol=0.15)


@pytest.mark.parametrize("name", ["dim", "depth", "num_latents", "heads", "dim_head", "max_time", "ff_mult"])
def test_sizes_must_be_positive_integers(name):
    with pytest.raises(ValueError, match=f"{name} must be at least 1, got 0"):
        small(**{name: 0})
    with pytest.raises(TypeError, match=f"{name} must be an int, got float"):
        small(**{name: 2.0})


@pytest.mark.parametrize(
    ("x_f", "error", "message"),
    [
        (torch.zeros(2, 3, 9, 15), ValueError, r"x_f must be .*16\), got \(2, 3, 9, 15\)"),
        (torch.zeros(27, 16), ValueError, r"x_f must be .*got \(27, 16\)"),
        (torch.zeros(1, 2, 3, 9, 16), ValueError, r"x_f must be .*got \(1, 2, 3, 9, 16\)"),
        (torch.zeros(2, 0, 9, 16), ValueError, r"x_f must hold at least one feature"),
        (torch.zeros(2, 3, 0, 16), ValueError, r"x_f must hold at least one feature"),
        (torch.zeros(0, 3, 9, 16), ValueError, r"x_f must hold at least one feature"),
        (torch.zeros(2, 9, 3, 16), ValueError, r"x_f has 9 frames, but max_time is 8"),
        (torch.zeros(9, 3, 16), ValueError, r"x_f has 9 frames, but max_time is 8"),
        (torch.zeros(3, 9, 16, dtype=torch.float64), TypeError, r"x_f must be torch.float32 .*got torch.float64"),
        (torch.zeros(3, 9, 16, dtype=torch.int64), TypeError, r"x_f must be torch.float32 .*got torch.int64"),
        (np.zeros((3, 9, 16)), TypeError, r"x_f must be a tensor, got ndarray"),
    ],
)
def test_bad_features_are_refused_by_name(x_f, error, message):
    with pytest.raises(error, match=message):
        small()(x_f)


def test_embeddings_for_several_clips_are_refused():
    with pytest.raises(ValueError, match="media_time_embs"):
        from_peer(peer_state(12, 1, 5, 2, 4, seed=0, media_time_embs=(3, 1, 12)))


@pytest.mark.gpu
def test_same_on_a_gpu():
    model, x_f = small().double(), torch.randn(2, 3, 9, 16, dtype=torch.float64)
    on_cpu = model(x_f)
    on_gpu = model.cuda()(x_f.cuda())
    assert on_gpu.is_cuda
    torch.testing.assert_close(on_gpu.cpu(), on_cpu, rtol=0, atol=1e-11)  # float64 sums in another order
