"""BitDelta on whole models: what is kept, what is rebuilt, distilled scales, many fine-tunes in one batch."""

import copy

import pytest
import torch
from torch import nn

from lecturekit.compression import bitdelta, deltas, kernels

VOCAB = 61
CONFIG = {
    "hidden_size": 24,
    "intermediate_size": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": VOCAB,
    "tie_word_embeddings": False,
}
LINEARS = 14  # q, k, v, o, gate, up, down, twice


def llama(seed=0, **changes):
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    config = LlamaConfig(
        **CONFIG | changes, eos_token_id=None, bos_token_id=None, pad_token_id=0, initializer_range=0.2
    )
    return LlamaForCausalLM(config).eval()


def fine_tune(base, seed=1, size=0.02, only="layers"):
    """A copy whose parameters with `only` in their name have moved, each by normal steps of this size."""
    fine, generator = copy.deepcopy(base), torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in fine.named_parameters():
            if only in name:
                parameter += size * torch.randn(parameter.shape, generator=generator)
    return fine


def tokens(batch, seq, seed=0):
    return torch.randint(1, VOCAB, (batch, seq), generator=torch.Generator().manual_seed(seed))


def state(model):
    return {name: value.clone() for name, value in model.state_dict().items()}


def same(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def test_every_linear_layer_of_the_blocks_is_one_bit_and_the_rest_is_kept_where_it_changed():
    base = llama()
    delta = deltas.compress_model(base, fine_tune(base))
    names = {name for name, module in base.named_modules() if isinstance(module, nn.Linear)} - {"lm_head"}
    assert set(delta.linears) == names
    assert len(names) == LINEARS
    # in the blocks the norms moved too; outside of them nothing did
    assert set(delta.rest) == {name for name, _ in base.named_parameters() if "layernorm" in name}
    everything = deltas.compress_model(base, fine_tune(base, only=""))
    assert {"model.embed_tokens.weight", "lm_head.weight", "model.norm.weight"} <= set(everything.rest)
    nothing = deltas.compress_model(base, base)
    assert not nothing.rest
    assert nothing.scales.tolist() == [0.0] * LINEARS


@pytest.mark.parametrize("tied", [False, True])
def test_the_bytes_held_are_those_computed_from_the_configuration(tied):
    base = llama(tie_word_embeddings=tied).bfloat16()
    delta = deltas.compress_model(base, fine_tune(base, size=0.5, only=""))
    expected = bitdelta.model_bytes(base.config.to_dict())
    assert (sum(p.nbytes for p in base.parameters()), delta.held_bytes()) == expected


def test_the_rebuilt_model_is_the_base_plus_scale_times_signs():
    base = llama()
    fine = fine_tune(base, only="")
    before = state(base), state(fine)
    delta = deltas.compress_model(base, fine)
    rebuilt = deltas.apply_model(base, delta)
    for name, parameter in rebuilt.named_parameters():
        old, new = base.get_parameter(name), fine.get_parameter(name)
        if name.removesuffix(".weight") in delta.linears:
            signs, scale = bitdelta.compress(old, new)
            assert torch.equal(parameter, bitdelta.apply(old, signs, scale)), name
        else:
            assert torch.equal(parameter, new), name
    assert same(state(base), before[0])
    assert same(state(fine), before[1])


def test_other_approximations_take_the_place_of_the_deltas():
    base = llama()
    fine = fine_tune(base, only="")
    exact = deltas.replace_deltas(base, fine, lambda delta: delta)
    none = deltas.replace_deltas(base, fine, torch.zeros_like)
    for name, parameter in none.named_parameters():
        linear = name.removesuffix(".weight") in deltas.linear_layers(base)
        assert torch.equal(parameter, (base if linear else fine).get_parameter(name)), name
        # a difference and a sum in float32: one rounding of each
        torch.testing.assert_close(exact.get_parameter(name), fine.get_parameter(name), rtol=3e-7, atol=3e-7)
    with pytest.raises(ValueError, match="approximate must return the shape"):
        deltas.replace_deltas(base, fine, lambda delta: delta[:1])


@pytest.mark.parametrize(("out", "inp", "bias"), [(5, 7, True), (16, 24, False), (1, 9, True)])
def test_the_scale_gets_the_gradient_that_autograd_finds_on_the_unpacked_weight(out, inp, bias):
    linear = nn.Linear(inp, out, bias=bias).double()
    signs, _ = bitdelta.compress(linear.weight, torch.randn(out, inp).double())
    layer = deltas.DeltaLinear(linear, bitdelta.pack(signs), torch.tensor(0.3))
    x, weights = torch.randn(2, 3, inp).double(), torch.randn(2, 3, out).double()
    ours, theirs = x.clone().requires_grad_(), x.clone().requires_grad_()
    scale = torch.tensor(0.3, requires_grad=True)
    expected = nn.functional.linear(theirs, bitdelta.apply(linear.weight.detach(), signs, scale), linear.bias)
    got = layer(ours)
    torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-12)
    (got * weights).sum().backward()
    (expected * weights).sum().backward()
    torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-12, atol=1e-12)
    # the scale and its gradient are float32; theirs sums in float64 and rounds once
    torch.testing.assert_close(layer.scale.grad, scale.grad, rtol=1e-5, atol=1e-5)
    assert linear.weight.grad is None


def test_only_one_bit_a_weight_is_saved_for_backward_beside_the_base_and_the_inputs():
    linear = nn.Linear(64, 48, bias=False).requires_grad_(False)
    signs, scale = bitdelta.compress(linear.weight, torch.randn(48, 64))
    layer = deltas.DeltaLinear(linear, bitdelta.pack(signs), scale)
    saved = []
    x = torch.randn(4, 64, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        layer(x)
    own = {x.data_ptr(), linear.weight.data_ptr(), layer.scale.data_ptr()}
    assert sum(t.nbytes for t in saved if t.data_ptr() not in own) == 48 * 64 / 8


def batches(count=2, seed=5):
    mask = torch.ones(3, 9, dtype=torch.bool)
    mask[1, 6:] = False
    return [(tokens(3, 9, seed + number), mask) for number in range(count)]


def loss_of(model, fine, ids, mask):
    with torch.no_grad():
        got, wanted = (m(input_ids=ids, attention_mask=mask.long()).logits for m in (model, fine))
    return float(bitdelta.distill_loss(got, wanted, mask))


def test_distillation_starts_at_the_compressed_model_and_comes_closer_to_the_fine_tune():
    base = llama()
    fine = fine_tune(base, size=0.05, only="")
    before = state(base), state(fine)
    delta = deltas.compress_model(base, fine)
    ((ids, mask),) = data = batches(1)
    better, losses = deltas.distill_scales(base, fine, delta, data, lr=1e-4, steps=12)
    # a model of 2 layers in float32, computed as W + scale * signs both times
    start = loss_of(deltas.apply_model(base, delta), fine, ids, mask)
    assert losses[0] == pytest.approx(start, rel=1e-4)
    assert len(losses) == 12
    # steps of 1e-4 on scales near 0.04, always on this batch: descent, and nothing to do with luck
    assert loss_of(deltas.apply_model(base, better), fine, ids, mask) < start
    for name, (packed, scale) in better.linears.items():
        assert torch.equal(packed, delta.linears[name][0])
        assert scale != delta.linears[name][1]
    assert same(better.rest, delta.rest)
    assert same(state(base), before[0])
    assert same(state(fine), before[1])
    assert all(p.grad is None for model in (base, fine) for p in model.parameters())


def test_one_step_moves_every_scale_against_its_own_gradient():
    base = llama()
    fine = fine_tune(base, size=0.05)
    delta = deltas.compress_model(base, fine)
    data = batches(1)
    better, _ = deltas.distill_scales(base, fine, delta, data, lr=1e-5)
    rebuilt = {
        name: bitdelta.unpack(delta.linears[name][0], w.weight.shape)
        for name, w in base.named_modules()
        if name in delta.linears
    }
    scales = delta.scales.requires_grad_()
    weights = {
        f"{name}.weight": bitdelta.apply(base.get_parameter(f"{name}.weight").detach(), signs, scale)
        for (name, signs), scale in zip(rebuilt.items(), scales, strict=True)
    }
    ids, mask = data[0]
    logits = torch.func.functional_call(base, weights | delta.rest, (ids,), {"attention_mask": mask.long()}).logits
    target = fine(input_ids=ids, attention_mask=mask.long()).logits
    (gradient,) = torch.autograd.grad(bitdelta.distill_loss(logits, target, mask), scales)
    # Adam's first step is lr long, whatever the gradient's size; the step is 1e-5 of a number near 0.04
    torch.testing.assert_close(better.scales - delta.scales, -1e-5 * gradient.sign(), rtol=1e-2, atol=0)


def test_distillation_uses_the_loss_that_it_is_given():
    base = llama()
    fine = fine_tune(base)
    seen = []

    def loss(logits, target, mask):
        seen.append((logits.requires_grad, target.requires_grad, mask.dtype))
        return 0 * bitdelta.distill_loss(logits, target, mask) + 7

    _, losses = deltas.distill_scales(base, fine, deltas.compress_model(base, fine), batches(1), steps=2, loss=loss)
    assert losses == [7.0, 7.0]
    assert seen == [(True, False, torch.bool)] * 2


def test_the_base_is_whole_again_after_an_error():
    base = llama()
    before = state(base)
    modules = dict(base.named_modules())
    fine = fine_tune(base, only="")

    def fails(*_):
        raise KeyError("broken")

    with pytest.raises(KeyError, match="broken"):
        deltas.distill_scales(base, fine, deltas.compress_model(base, fine), batches(), loss=fails)
    assert same(state(base), before)
    assert dict(base.named_modules()) == modules


def tenants(count=8, size=0.1, **options):
    base = llama()
    fines = {f"style {number}": fine_tune(base, seed=number, size=size) for number in range(1, count + 1)}
    compressed = {name: deltas.compress_model(base, fine) for name, fine in fines.items()}
    return base, compressed, deltas.Tenants(base, compressed, **options)


def test_every_row_of_a_batch_is_computed_by_its_own_fine_tune():
    base, compressed, served = tenants()
    before = state(base)
    rows = ["style 8", "style 1", "style 8", "style 3", "style 5", "style 2", "style 7", "style 4", "style 6"]
    ids = tokens(len(rows), 6)
    logits = served(ids, rows).logits
    assert torch.equal(logits, served(ids, [served.names.index(name) for name in rows]).logits)
    assert torch.equal(logits, served(ids, torch.tensor([served.names.index(name) for name in rows])).logits)
    plain = base(ids).logits
    for row, name in enumerate(rows):
        with torch.no_grad():
            alone = deltas.apply_model(base, compressed[name])(ids[row : row + 1]).logits[0]
        # the same sums in another order, in float32; two layers of depth 24 and 40
        torch.testing.assert_close(logits[row], alone, rtol=1e-4, atol=1e-4)
        assert not torch.allclose(logits[row], plain[row], rtol=1e-2, atol=1e-2)
    assert same(state(base), before)
    assert torch.equal(base(ids).logits, plain)


def test_each_tenant_writes_what_it_writes_alone():
    base, compressed, served = tenants()
    rows = list(served.names)
    ids = tokens(len(rows), 5)
    mask = torch.ones_like(ids)
    ids[2, :2] = mask[2, :2] = 0  # a shorter prompt, padded on the left
    written = served.generate(ids, rows, max_new_tokens=7, attention_mask=mask)
    assert written.shape == (len(rows), 12)
    for row, name in enumerate(rows):
        model = deltas.apply_model(base, compressed[name])
        prompt = ids[row : row + 1, 2 if row == 2 else 0 :]
        alone = model.generate(prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=7, do_sample=False)
        assert torch.equal(written[row, 5:], alone[0, prompt.shape[1] :]), name


@pytest.mark.parametrize("tied", [False, True])
def test_a_fine_tune_with_an_embedding_and_a_head_of_its_own_is_served_with_them(tied):
    base = llama(tie_word_embeddings=tied)
    fines = {"all": fine_tune(base, size=0.1, only=""), "blocks": fine_tune(base, seed=2, size=0.1)}
    compressed = {name: deltas.compress_model(base, fine) for name, fine in fines.items()}
    served = deltas.Tenants(base, compressed)
    rows, ids = ["blocks", "all", "blocks"], tokens(3, 5)
    logits = served(ids, rows).logits
    for row, name in enumerate(rows):
        with torch.no_grad():
            alone = deltas.apply_model(base, compressed[name])(ids[row : row + 1]).logits[0]
        torch.testing.assert_close(logits[row], alone, rtol=1e-4, atol=1e-4)
    # shared by "blocks" and the base, so not held once more
    assert served.delta_bytes() == sum(delta.held_bytes() for delta in compressed.values())


def test_biases_and_norms_of_its_own_follow_each_row():
    base = nn.Sequential(nn.Linear(6, 5), nn.LayerNorm(5), nn.Linear(5, 4))
    fines = {name: fine_tune(base, seed=seed, size=0.5, only="") for seed, name in enumerate("ab")}
    fines["b"][1] = copy.deepcopy(base[1])  # only one of them has a norm of its own
    compressed = {name: deltas.compress_model(base, fine) for name, fine in fines.items()}
    served = deltas.Tenants(_Named(base), {name: _named(delta) for name, delta in compressed.items()})
    x = torch.randn(3, 2, 6)
    got = served(x, ["b", "a", "b"])
    for row, name in enumerate("bab"):
        expected = deltas.apply_model(base, compressed[name])(x[row])
        torch.testing.assert_close(got[row], expected, rtol=1e-5, atol=1e-5)


class _Named(nn.Module):
    """A model that is called as a language model is: model(input_ids=…)."""

    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, input_ids):
        return self.inner(input_ids)


def _named(delta):
    return deltas.ModelDelta(
        *({f"inner.{name}": value for name, value in part.items()} for part in (delta.linears, delta.rest))
    )


def test_serving_n_fine_tunes_holds_one_base_and_n_deltas():
    base = llama()
    whole = sum(p.nbytes for p in base.parameters()) + sum(b.nbytes for b in base.buffers())
    held, one = {}, None
    for count in (1, 4, 8):
        _, compressed, served = tenants(count)
        one = next(iter(compressed.values())).held_bytes()
        held[count] = served.held_bytes()
        assert served.delta_bytes() == count * one
        assert held[count] == whole + count * one
    linears = sum(module.weight.numel() for module in deltas.linear_layers(base).values())
    norms = 4 * 2 * 2 * CONFIG["hidden_size"]
    assert one == linears / 8 + 4 * LINEARS + norms  # every matrix here fills whole bytes
    # float32 weights: 32 bits a weight and model when each is whole, 32 bits once and 1 bit a model together
    assert held[8] - held[1] == 7 * one < 7 * whole / 16


def test_all_layers_go_through_the_packed_product(monkeypatch):
    calls = []
    product = kernels.delta_product

    def counted(*arguments):
        calls.append(arguments[-1])
        return product(*arguments)

    monkeypatch.setattr(kernels, "delta_product", counted)
    _, _, served = tenants(2, backend="torch")
    served(tokens(2, 3), [0, 1])
    assert calls == ["torch"] * LINEARS


BASE = llama()
DELTA = deltas.compress_model(BASE, fine_tune(BASE))
PART = deltas.ModelDelta(dict(list(DELTA.linears.items())[1:]), DELTA.rest)
OTHER = llama(intermediate_size=32)
SERVED = deltas.Tenants(BASE, {"a": DELTA, "b": DELTA})
IDS = tokens(2, 4)
MASK = torch.ones(2, 4, dtype=torch.bool)


@pytest.mark.parametrize(
    ("call", "error", "words"),
    [
        (lambda: deltas.linear_layers(3), TypeError, "model must be an nn.Module, got int"),
        (lambda: deltas.linear_layers(nn.Embedding(3, 4)), ValueError, "model must hold nn.Linear layers"),
        (lambda: deltas.compress_model(BASE, 3), TypeError, "fine must be an nn.Module, got int"),
        (lambda: deltas.compress_model(BASE, OTHER), ValueError, r"fine must have base's parameter .*gate_proj.weight"),
        (lambda: deltas.compress_model(BASE.model, BASE), ValueError, "fine must have base's parameter embed_tokens"),
        (lambda: deltas.apply_model(OTHER, DELTA), ValueError, "delta must have 96 bytes for .*gate_proj, got 120"),
        (lambda: deltas.apply_model(BASE.model, DELTA), ValueError, "delta has a layer model.layers.0.*no nn.Linear"),
        (lambda: DELTA.with_scales(torch.ones(3)), ValueError, "scales must hold one for each of 14 layers, got 3"),
        (lambda: deltas.distill_scales(BASE, BASE, DELTA, []), ValueError, "batches must hold at least one pair"),
        (lambda: deltas.distill_scales(BASE, BASE, DELTA, [(IDS, MASK)], lr=0), ValueError, "lr must be above 0"),
        (lambda: deltas.distill_scales(BASE, BASE, DELTA, [(IDS, MASK)], steps=0), ValueError, "steps must be at"),
        (lambda: deltas.distill_scales(BASE, BASE, DELTA, [(IDS, IDS)]), TypeError, "mask must have dtype torch.bool"),
        (lambda: deltas.Tenants(BASE, {}), ValueError, "deltas must hold at least one fine-tune"),
        (lambda: deltas.Tenants(BASE, {"a": DELTA, "b": PART}), ValueError, "deltas must all compress the same"),
        (lambda: SERVED(IDS, ["a"]), ValueError, "rows must name a fine-tune for each of the batch's 2 rows, got 1"),
        (lambda: SERVED(IDS, ["a", "c"]), ValueError, "rows must be among a, b, got 'c'"),
        (lambda: SERVED(IDS, [0, 2]), ValueError, "rows must be names or numbers from 0 to 1, got 2"),
        (lambda: SERVED(IDS, "ab"), TypeError, "rows must be a list"),
        (lambda: SERVED(IDS, torch.ones(2)), TypeError, "rows must have an integer dtype"),
    ],
)
def test_bad_arguments_are_named(call, error, words):
    with pytest.raises(error, match=words):
        call()
