"""Linear4bit against the float layer of its weight, against bitsandbytes, and under LoRA; the bill of memory."""

import copy
import gc
import math
import weakref
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from lecturekit.compression import nf4, qlora
from lecturekit.compression.paged import PagedAdamW
from lecturekit.compression.qlora import (
    Linear4bit,
    dequantize_model,
    guanaco_sizes,
    linear_4bit,
    memory_bill,
    quantize_model,
)
from lecturekit.tuning import lora

TARGETS = ["q_proj", "v_proj", "down_proj"]


def random_linear(out, inp, seed=0, bias=True, dtype=torch.float32):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return nn.Linear(inp, out, bias=bias).to(dtype)


def random(*shape, seed=0, dtype=torch.float32):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def tiny_llama(**changes):
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = {"hidden_size": 64, "intermediate_size": 192, "num_hidden_layers": 2, "num_attention_heads": 4}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        config = LlamaConfig(**sizes, num_key_value_heads=2, vocab_size=96, tie_word_embeddings=True, **changes)
        return LlamaForCausalLM(config).eval()


IDS = torch.randint(0, 96, (3, 12), generator=torch.Generator().manual_seed(7))


def train(model, steps=30):
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    for _ in range(steps):
        loss = model(IDS, labels=IDS).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


# The layer


@pytest.mark.parametrize("table", qlora.TABLES)
@pytest.mark.parametrize("double", [True, False])
@pytest.mark.parametrize("blocksize", [64, 12])  # one that kernels.nf4_dequantize takes, and one that it does not
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_it_computes_what_a_float_layer_with_its_weight_computes(table, double, blocksize, dtype):
    linear = random_linear(37, 51, dtype=dtype)  # an odd number of weights, blocks across rows, a short last block
    layer = Linear4bit(linear, blocksize, double, table)
    assert layer.weight.dtype == dtype
    assert 0 < (layer.weight - linear.weight).abs().max() < 0.3 * linear.weight.abs().max()
    for shape in [(51,), (2, 51), (2, 3, 51)]:
        x, twin = (random(*shape, dtype=dtype).requires_grad_() for _ in range(2))
        y, expected = layer(x), F.linear(twin, layer.weight, linear.bias)
        assert torch.equal(y, expected)
        upstream = random(*expected.shape, seed=1, dtype=dtype)
        y.backward(upstream)
        expected.backward(upstream)
        # The same product, which torch may add up in another order for another shape: a few roundings.
        torch.testing.assert_close(
            x.grad, twin.grad, rtol=0, atol=8 * torch.finfo(dtype).eps * float(twin.grad.abs().max())
        )


def test_x_may_have_another_dtype_than_the_layer_had():
    layer = Linear4bit(random_linear(8, 16))
    x = random(3, 16).bfloat16()
    assert torch.equal(layer(x), F.linear(x, layer.weight.bfloat16(), layer.bias.bfloat16()))
    assert layer(x.double()).dtype == torch.float64


@pytest.mark.parametrize("double", [True, False])
def test_codes_and_scales_equal_bitsandbytes(double):
    from bitsandbytes.functional import quantize_4bit

    linear = random_linear(96, 200, seed=3)
    layer = Linear4bit(linear, double=double)
    packed, state = quantize_4bit(linear.weight.detach(), quant_type="nf4", compress_statistics=double)
    assert torch.equal(layer.packed, packed.flatten())
    if double:
        assert torch.equal(layer.scales, state.state2.absmax)
        assert torch.equal(layer.offset, state.offset)
        # bitsandbytes looks the codes up in a coarse table: some are the second nearest, see test_nf4.py
        assert (layer.codes.int() - state.absmax.int()).abs().max() <= 1
    else:
        assert torch.equal(layer.absmax, state.absmax)


def test_output_and_gradient_equal_those_of_bitsandbytes():
    import bitsandbytes as bnb

    linear = random_linear(96, 128, seed=3, bias=False)
    peer = bnb.nn.Linear4bit(
        128, 96, bias=False, compute_dtype=torch.float32, quant_type="nf4", compress_statistics=False
    )
    peer.weight = bnb.nn.Params4bit(
        linear.weight.detach().clone(), requires_grad=False, quant_type="nf4", compress_statistics=False
    )
    peer.to("cpu")  # packs
    layer = Linear4bit(linear, double=False)
    x, twin = (random(4, 128).requires_grad_() for _ in range(2))
    y, expected = layer(x), peer(twin)
    y.square().sum().backward()
    expected.square().sum().backward()
    for ours, theirs in ((y.detach(), expected.detach()), (x.grad, twin.grad)):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=128 * 1.2e-7 * float(theirs.abs().max()))


def test_the_base_has_no_parameter_and_gets_no_gradient():
    layer = Linear4bit(random_linear(8, 16))
    assert list(layer.parameters()) == []
    assert not any(buffer.requires_grad for buffer in layer.buffers())
    assert not layer(random(2, 16)).requires_grad
    layer.requires_grad_(True)
    assert not layer(random(2, 16)).requires_grad


def test_the_backward_pass_keeps_the_bytes_and_not_the_weight():
    layer = Linear4bit(random_linear(40, 60))
    held = {buffer.untyped_storage().data_ptr() for buffer in layer.buffers()}
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.detach()) or t.detach(), lambda t: t):
        layer(random(2, 60).requires_grad_())
    assert kept
    assert {tensor.untyped_storage().data_ptr() for tensor in kept} <= held


@pytest.mark.parametrize(("double", "bits"), [(True, 8 + 32 / 256), (False, 32)])
def test_held_bytes_are_four_bits_a_weight_the_scales_and_the_bias(double, bits):
    layer = Linear4bit(random_linear(256, 512), double=double)
    weights = 256 * 512
    assert layer.held_bytes() == weights // 2 + weights // 64 * bits / 8 + (4 if double else 0) + 256 * 4
    assert layer.held_bytes() == sum(tensor.nbytes for tensor in layer.state_dict().values())


def test_a_cast_of_the_model_leaves_the_scales_in_float32():
    for double in (True, False):
        layer = Linear4bit(random_linear(40, 60), double=double)
        before = {name: buffer.clone() for name, buffer in layer.named_buffers() if name != "bias"}
        layer = nn.Sequential(layer).bfloat16()[0]
        for name, buffer in before.items():
            assert torch.equal(layer.get_buffer(name), buffer)
            assert layer.get_buffer(name).dtype == buffer.dtype
        assert layer.bias.dtype == torch.bfloat16
    moved = Linear4bit(random_linear(40, 60)).to("meta")
    assert all(buffer.device.type == "meta" for buffer in moved.buffers())


@pytest.mark.parametrize("double", [True, False])
def test_the_state_dict_comes_back(double):
    layer, other = (Linear4bit(random_linear(40, 60, seed=seed), double=double) for seed in (0, 1))
    assert not torch.equal(layer.weight, other.weight)
    other.load_state_dict(layer.state_dict())
    assert torch.equal(layer.weight, other.weight)
    assert torch.equal(layer.bias, other.bias)


def test_the_float_layer_is_not_changed_and_not_held():
    linear = random_linear(8, 16)
    before = copy.deepcopy(linear.state_dict())
    layer = Linear4bit(linear)
    layer.bias.zero_()
    assert all(torch.equal(before[name], value) for name, value in linear.state_dict().items())
    assert linear.weight.requires_grad


# The function that the lab asks for


@pytest.mark.parametrize("shape", [(24, 40), (17, 33)])
def test_linear_4bit_is_the_dense_layer_with_its_branch_but_for_the_bases_gradient(shape):
    out, inp = shape
    indices, absmax = nf4.quantize(random(out, inp), 8)
    absmax = absmax.requires_grad_()
    x, A, B = (random(*s, seed=i).requires_grad_() for i, s in enumerate([(5, inp), (3, inp), (out, 3)]))
    y = linear_4bit(x, nf4.pack(indices), absmax, nf4.LEVELS, 8, A, B, 1.5)
    weight = nf4.dequantize(indices, absmax.detach(), 8)
    expected = x @ weight.T + 1.5 * x @ A.T @ B.T
    torch.testing.assert_close(y, expected, rtol=0, atol=1e-5 * expected.abs().max().item())
    upstream = random(5, out, seed=9)
    got = torch.autograd.grad(y, [x, A, B, absmax], upstream, allow_unused=True)
    assert got[3] is None
    for gradient, wanted in zip(got, torch.autograd.grad(expected, [x, A, B], upstream), strict=False):
        torch.testing.assert_close(gradient, wanted, rtol=0, atol=1e-5 * float(wanted.abs().max()))


def test_linear_4bits_gradients_by_finite_differences():
    indices, absmax = nf4.quantize(random(6, 10), 8)
    x, A, B = (random(*s, seed=i).double().requires_grad_() for i, s in enumerate([(2, 10), (3, 10), (6, 3)]))

    def function(x, A, B):
        return linear_4bit(x, nf4.pack(indices), absmax, nf4.LEVELS, 8, A, B, 1.5)

    assert torch.autograd.gradcheck(function, (x, A, B))


# Whole models, with LoRA


def test_the_model_keeps_its_names_and_skips_what_it_is_told():
    model = tiny_llama()
    linears = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    assert quantize_model(model) is model
    assert [name for name, module in model.named_modules() if isinstance(module, Linear4bit)] == linears[:-1]
    assert type(model.lm_head) is nn.Linear
    assert model(IDS).logits.isfinite().all()

    other = quantize_model(tiny_llama(), skip=["lm_head", "down_proj", "model.layers.0.self_attn.q_proj"])
    assert type(other.model.layers[1].mlp.down_proj) is type(other.model.layers[0].self_attn.q_proj) is nn.Linear
    assert isinstance(other.model.layers[1].self_attn.q_proj, Linear4bit)


def test_float_weights_are_let_go_one_after_the_other(monkeypatch):
    model = nn.Sequential(*[random_linear(64, 64, seed=i) for i in range(6)])
    floats = [weakref.ref(linear.weight) for linear in model]
    alive = []
    original = Linear4bit.__init__

    def counted(self, linear, *args):
        gc.collect()
        alive.append(sum(weight() is not None for weight in floats))
        original(self, linear, *args)

    monkeypatch.setattr(Linear4bit, "__init__", counted)
    quantize_model(model)
    assert alive == [6, 5, 4, 3, 2, 1]


def test_a_layer_in_two_places_stays_one_layer():
    linear = random_linear(8, 8)
    model = nn.ModuleDict({"a": linear, "b": nn.Sequential(linear), "c": random_linear(8, 8)})
    quantize_model(model)
    assert isinstance(model["a"], Linear4bit)
    assert model["a"] is model["b"][0]
    assert model["a"] is not model["c"]


def test_lora_trains_over_four_bits_and_the_base_stays():
    model = quantize_model(lora.add_lora(tiny_llama(), TARGETS, r=4, alpha=16))
    base = {name: buffer.clone() for name, buffer in model.named_buffers()}
    losses = train(model)
    assert losses[-1] < losses[0]
    assert all(torch.equal(buffer, base[name]) for name, buffer in model.named_buffers())
    trained = [name for name, p in model.named_parameters() if p.grad is not None]
    assert trained
    assert all(name.endswith((".A", ".B")) for name in trained)
    # a model of floats with the rounded weights takes the same steps
    twin = dequantize_model(quantize_model(lora.add_lora(tiny_llama(), TARGETS, r=4, alpha=16)))
    start = quantize_model(lora.add_lora(tiny_llama(), TARGETS, r=4, alpha=16))
    twin.load_state_dict(
        {name: value for name, value in start.state_dict().items() if name.endswith((".A", ".B"))}, strict=False
    )
    assert train(twin, 5) == pytest.approx(train(start, 5), rel=1e-4)


def test_a_branch_is_not_folded_into_four_bits_but_into_the_dequantized_model():
    model = quantize_model(lora.add_lora(tiny_llama(), TARGETS, r=4, alpha=16))
    train(model, 5)
    model.eval()
    before = model(IDS).logits
    with pytest.raises(RuntimeError, match="dequantize_model first"):
        lora.merge_all(model)
    assert torch.equal(model(IDS).logits, before)
    assert dequantize_model(model) is model
    torch.testing.assert_close(model(IDS).logits, before, rtol=0, atol=1e-5)
    lora.merge_all(model)
    assert not any(isinstance(module, (lora.LoRALinear, Linear4bit)) for module in model.modules())
    torch.testing.assert_close(model(IDS).logits, before, rtol=0, atol=1e-5)


def test_an_adapter_is_saved_and_used_again(tmp_path):
    model = quantize_model(lora.add_lora(tiny_llama(), TARGETS, r=4, alpha=16))
    train(model, 5)
    lora.save(model, tmp_path / "adapter")
    again = quantize_model(lora.load(tiny_llama(), tmp_path / "adapter"))
    assert torch.equal(again.eval()(IDS).logits, model.eval()(IDS).logits)


@pytest.mark.parametrize("double", [True, False])
def test_an_adapter_trained_here_works_in_peft_over_a_bitsandbytes_model(tmp_path, double):
    from peft import PeftModel
    from transformers import BitsAndBytesConfig, LlamaForCausalLM

    tiny_llama().save_pretrained(tmp_path / "model")
    ours = quantize_model(lora.add_lora(tiny_llama(), TARGETS, r=4, alpha=16), double=double)
    train(ours)
    lora.save(ours, tmp_path / "adapter")

    config = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=double,
        bnb_4bit_compute_dtype=torch.float32,
    )
    peer = LlamaForCausalLM.from_pretrained(
        tmp_path / "model", quantization_config=config, device_map="cpu", dtype=torch.float32
    )
    for name, layer in peer.named_modules():
        if type(layer).__name__ == "Linear4bit":
            mine = ours.get_submodule(name)
            mine = mine.base if isinstance(mine, lora.LoRALinear) else mine
            assert torch.equal(layer.weight.flatten(), mine.packed)
    # Not eval(): on some CPUs bitsandbytes then rounds its scales to bfloat16. There is no dropout.
    peer.train()
    with torch.no_grad():
        bare = peer(IDS).logits
        adapted = PeftModel.from_pretrained(peer, tmp_path / "adapter").train()(IDS).logits
        expected = ours(IDS).logits
        floats = lora.load(tiny_llama(), tmp_path / "adapter")(IDS).logits
    distance = float((adapted - expected).abs().max())
    assert distance < 0.1 * float((floats - expected).abs().max())  # much nearer than over the model's own floats
    assert distance < 0.1 * float((bare - expected).abs().max())  # or without the adapter
    if not double:  # nothing is rounded in two ways, so that only the order of sums is left
        assert distance <= 1e-5 * float(expected.abs().max())


# The bill


def test_the_bill_is_what_can_be_counted_by_hand():
    model = nn.Sequential(random_linear(20, 10, bias=False), nn.Tanh(), random_linear(5, 20, bias=False))
    x = random(7, 10)
    optimizer = torch.optim.AdamW(model.parameters())
    model(x).sum().backward()
    optimizer.step()
    optimizer.zero_grad()
    kept_gradient = model[0].weight.grad = torch.ones(20, 10)
    bill = memory_bill(model, lambda: model(x).square().mean(), optimizer)
    weights = 4 * (200 + 100)
    # autograd keeps the input, tanh's result, and what is squared
    assert bill == {
        "weights": weights,
        "gradients": weights,
        "optimizer": 2 * weights + 2 * 4,  # two moments, and a counter for each of the two parameters
        "activations": 4 * (70 + 140 + 35),
    }
    assert model[0].weight.grad is kept_gradient
    assert model[1:] and model[2].weight.grad is None


def test_a_frozen_model_has_gradients_for_its_branches_alone():
    model = lora.add_lora(tiny_llama(), TARGETS, r=4, alpha=16)
    count, size = lora.trainable_parameters(model)
    bill = memory_bill(model, lambda: model(IDS, labels=IDS).loss)
    assert bill["gradients"] == size == 4 * count
    assert bill["optimizer"] == 0
    quantized = quantize_model(copy.deepcopy(model))
    held = sum(module.held_bytes() for module in quantized.modules() if isinstance(module, Linear4bit))
    float_bytes = sum(p.nbytes for n, p in model.named_parameters() if "proj" in n and n.endswith("weight"))
    got = memory_bill(quantized, lambda: quantized(IDS, labels=IDS).loss)
    assert got["weights"] == bill["weights"] - float_bytes + held
    assert got["gradients"] == bill["gradients"]
    assert got["activations"] == bill["activations"]  # no dequantized weight among them


def test_a_layer_that_keeps_its_dequantized_weight_shows_on_the_bill():
    layer = Linear4bit(random_linear(40, 60, bias=False))
    x = random(2, 60).requires_grad_()
    careful = memory_bill(layer, lambda: layer(x).sum())
    careless = memory_bill(layer, lambda: F.linear(x, layer.weight).sum())
    assert careful["activations"] == 0
    assert careless["activations"] == 40 * 60 * 4


def test_a_paged_optimizer_counts_with_what_was_resident():
    model = nn.Sequential(*[random_linear(64, 64, seed=i) for i in range(6)])
    optimizer = PagedAdamW(model.parameters(), budget=80_000)
    model(random(2, 64)).sum().backward()
    optimizer.step()
    bill = memory_bill(model, lambda: model(random(2, 64)).sum(), optimizer)
    assert bill["optimizer"] == optimizer.peak_bytes <= 80_000 < optimizer.paged_bytes()


# The table of the paper


def test_guanaco_sizes_are_those_of_the_configurations():
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = guanaco_sizes()
    assert [(row.name, row.paper_gb) for row in sizes] == [
        ("Guanaco 65B", 41), ("Guanaco 33B", 21), ("Guanaco 13B", 10), ("Guanaco 7B", 6)
    ]  # fmt: skip
    for row, (hidden, wide, layers, heads) in zip(
        sizes, [(8192, 22016, 80, 64), (6656, 17920, 60, 52), (5120, 13824, 40, 40), (4096, 11008, 32, 32)], strict=True
    ):
        config = LlamaConfig(
            hidden_size=hidden, intermediate_size=wide, num_hidden_layers=1, num_attention_heads=heads, vocab_size=32000
        )
        with torch.device("meta"):
            model = LlamaForCausalLM(config)  # one layer; the others are like it
        block = [module for module in model.model.layers[0].modules() if isinstance(module, nn.Linear)]
        linear = layers * sum(module.weight.numel() for module in block)
        branches = layers * sum(64 * (module.in_features + module.out_features) for module in block)
        outside = model.lm_head.weight.numel() + model.model.embed_tokens.weight.numel()
        norms = layers * 2 * hidden + hidden
        assert row.parts == pytest.approx(
            {
                "4-bit weights": linear / 2 / 1e9,
                "scales": linear / 64 * (1 + 4 / 256) / 1e9,
                "embeddings and head": 2 * outside / 1e9,
                "norms": 2 * norms / 1e9,
                "adapter": 2 * branches / 1e9,
                "keys and values": 2 * 2 * layers * hidden * 2048 / 1e9,
            }
        )
        assert row.ours_gb == pytest.approx(sum(row.parts.values()))


def test_guanaco_sizes_are_near_the_papers_with_keys_and_values_and_short_without():
    for row in guanaco_sizes():
        assert abs(row.ours_gb - row.paper_gb) < 1  # the paper prints whole GB
        assert row.ours_gb - row.parts["keys and values"] < row.paper_gb - 1
    assert guanaco_sizes(1024)[0].parts["keys and values"] == guanaco_sizes()[0].parts["keys and values"] / 2


# Errors


def folded():
    model = lora.add_lora(nn.Sequential(random_linear(4, 4)), ["0"], 2, 4)
    model[0].merge()
    return model


def tied():
    model = nn.ModuleDict({"embedding": nn.Embedding(6, 4), "head": nn.Linear(4, 6, bias=False)})
    model["head"].weight = model["embedding"].weight
    return model


GOOD = SimpleNamespace(
    x=torch.ones(2, 8),
    packed=torch.zeros(16, dtype=torch.uint8),
    absmax=torch.ones(4),
    A=torch.ones(2, 8),
    B=torch.ones(4, 2),
)


def call_linear(**changed):
    got = SimpleNamespace(**{**vars(GOOD), "levels": nf4.LEVELS, "blocksize": 8, "scale": 1.0, **changed})
    return linear_4bit(got.x, got.packed, got.absmax, got.levels, got.blocksize, got.A, got.B, got.scale)


@pytest.mark.parametrize(
    ("call", "error", "words"),
    [
        (lambda: Linear4bit(nn.Conv1d(2, 2, 1)), TypeError, "linear must be an nn.Linear, got Conv1d"),
        (lambda: Linear4bit(nn.Linear(4, 4), 0), ValueError, "blocksize must be at least 1"),
        (lambda: Linear4bit(nn.Linear(4, 4), table="nf5"), ValueError, "table must be one of nf4, int4, fp4, e2m1"),
        (lambda: quantize_model("model"), TypeError, "model must be an nn.Module"),
        (lambda: quantize_model(nn.Sequential(nn.Linear(2, 2)), skip="0"), TypeError, "skip must be a list"),
        (lambda: quantize_model(nn.Sequential(nn.Linear(2, 2)), skip=["0"]), ValueError, "that is not skipped"),
        (lambda: quantize_model(nn.Linear(2, 2)), ValueError, "model must hold an nn.Linear"),
        (lambda: quantize_model(nn.Sequential(nn.Linear(2, 2)), table="x"), ValueError, "table must be one of"),
        (
            lambda: quantize_model(nn.Sequential(nn.Linear(2, 2)), blocksize=-1),
            ValueError,
            "blocksize must be at least",
        ),
        (lambda: quantize_model(folded()), ValueError, "0 has its branch folded in"),
        (lambda: quantize_model(tied()), ValueError, "head shares its weight with embedding.weight: add it to skip"),
        (lambda: dequantize_model(nn.Sequential(nn.Linear(2, 2))), ValueError, "model must hold Linear4bit"),
        (lambda: memory_bill(nn.Linear(2, 2), lambda: 1.0), TypeError, "loss must return a torch.Tensor"),
        (lambda: memory_bill(nn.Linear(2, 2), lambda: torch.ones(())), ValueError, "loss must return a scalar"),
        (lambda: guanaco_sizes(0), ValueError, "context must be at least 1"),
        (lambda: call_linear(x=torch.ones(2, 7)), ValueError, "x's last dimension must be in = 8"),
        (lambda: call_linear(B=torch.ones(4, 3)), ValueError, r"A must be \(r, in\) and B \(out, r\)"),
        (lambda: call_linear(scale=math.inf), ValueError, "scale must be finite"),
        (lambda: call_linear(packed=torch.zeros(15, dtype=torch.uint8)), ValueError, "shape must have 29 or 30"),
        (lambda: call_linear(absmax=torch.ones(3)), ValueError, "absmax must hold 4"),
        (lambda: call_linear(levels=nf4.LEVELS.flip(0)), ValueError, "levels must ascend"),
    ],
)
def test_bad_arguments_are_named(call, error, words):
    with pytest.raises(error, match=words):
        call()


def test_a_model_that_is_refused_is_not_changed():
    model = nn.Sequential(random_linear(4, 4), folded())
    with pytest.raises(ValueError, match="folded"):
        quantize_model(model)
    assert type(model[0]) is nn.Linear


@pytest.mark.gpu
def test_on_a_gpu_codes_equal_bitsandbytes_and_a_step_trains():
    from bitsandbytes.functional import quantize_4bit

    linear = random_linear(256, 512, dtype=torch.bfloat16).cuda()
    layer = Linear4bit(linear, double=False)
    packed, state = quantize_4bit(linear.weight.detach(), quant_type="nf4")
    assert torch.equal(layer.packed, packed.flatten())
    assert torch.equal(layer.absmax, state.absmax)
    model = quantize_model(lora.add_lora(tiny_llama().cuda(), TARGETS, r=4, alpha=16))
    loss = model(IDS.cuda(), labels=IDS.cuda()).loss
    loss.backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)
