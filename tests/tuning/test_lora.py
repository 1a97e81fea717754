"""LoRA against its equations and against PEFT: the same numbers, and files that go both ways."""

import copy
import json
import math
import os

import pytest
import torch
from torch import nn

from lecturekit.tuning import lora, peft_format

# float32 rounds at 6e-8; a branch or a tiny network adds up some tens of terms of order 1.
ROUNDING = {"rtol": 1e-5, "atol": 1e-5}
TARGETS = ["q_proj", "v_proj", "down_proj"]


def normal(*shape, seed=0, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def tiny_llama(seed=0, **changes):
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    sizes = {
        "vocab_size": 31,
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "initializer_range": 0.2,
    }
    return LlamaForCausalLM(LlamaConfig(**{**sizes, **changes})).eval()


def train_B(model, seed=1):
    """Give every B random values, as training would, so that the branches count."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        if name.endswith((".B", "lora_B.default.weight")):
            parameter.data.normal_(std=0.5, generator=generator)
    return model


@torch.no_grad()
def logits(model):
    return model(torch.arange(20).view(2, 10)).logits


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.q = nn.Linear(6, 8)
        self.mlp = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 5))
        self.norm = nn.LayerNorm(8)

    def forward(self, x):
        return self.mlp(self.norm(self.q(x)))


# merge and unmerge


@pytest.mark.parametrize(("out", "inp", "r", "alpha"), [(7, 5, 2, 8), (5, 7, 1, 0.5), (3, 3, 6, 16), (1, 4, 3, -2)])
def test_merge_is_the_papers_equation(out, inp, r, alpha):
    weight, A, B = normal(out, inp), normal(r, inp, seed=1), normal(out, r, seed=2)
    merged = lora.merge(weight, A, B, alpha)
    for o in range(out):
        for i in range(inp):
            branch = sum(float(B[o, k]) * float(A[k, i]) for k in range(r))
            assert merged[o, i].item() == pytest.approx(float(weight[o, i]) + alpha / r * branch, rel=1e-5, abs=1e-5)


def test_merge_leaves_its_inputs_alone_and_keeps_the_dtype():
    for dtype in (torch.float16, torch.bfloat16, torch.float32, torch.float64):
        weight, A, B = normal(6, 4, dtype=dtype), normal(2, 4, seed=1, dtype=dtype), normal(6, 2, seed=2, dtype=dtype)
        before = [t.clone() for t in (weight, A, B)]
        merged = lora.merge(weight, A, B, 4)
        assert merged.dtype == dtype
        assert merged.data_ptr() != weight.data_ptr()
        assert all(torch.equal(a, b) for a, b in zip(before, (weight, A, B), strict=True))


def test_half_precision_is_added_up_in_float32_and_rounded_once():
    weight, A, B = (normal(32, 48), normal(16, 48, seed=1), normal(32, 16, seed=2))
    half = [t.bfloat16() for t in (weight, A, B)]
    exact = half[0].double() + 2 / 16 * half[2].double() @ half[1].double()
    error = (lora.merge(*half, 2).double() - exact).abs()
    # One rounding to bfloat16 (8 significant bits) is at most 2^-8 of the value; 1e-6 is for the float32 sum before.
    assert bool((error <= exact.abs() * 2**-8 + 1e-6).all())
    rounded_twice = half[0] + 2 / 16 * (half[2] @ half[1])
    assert not bool(((rounded_twice.double() - exact).abs() <= exact.abs() * 2**-8 + 1e-6).all())


def test_unmerge_undoes_merge():
    weight, A, B = normal(9, 6), normal(3, 6, seed=1), normal(9, 3, seed=2)
    torch.testing.assert_close(lora.unmerge(lora.merge(weight, A, B, 5), A, B, 5), weight, **ROUNDING)


def test_merge_passes_gradients_to_all_three():
    tensors = [
        t.requires_grad_()
        for t in (normal(3, 4).double(), normal(2, 4, seed=1).double(), normal(3, 2, seed=2).double())
    ]
    assert torch.autograd.gradcheck(lambda w, a, b: lora.merge(w, a, b, 3), tensors)


@pytest.mark.parametrize("function", [lora.merge, lora.unmerge])
@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"weight": torch.ones(4)}, ValueError, "weight must have 2 dimension"),
        ({"weight": torch.ones(4, 3, dtype=torch.int32)}, TypeError, "weight must have a floating-point dtype"),
        ({"weight": [[1.0]]}, TypeError, "weight must be a torch.Tensor"),
        ({"weight": torch.full((4, 3), math.nan)}, ValueError, "weight must be finite"),
        (
            {"A": torch.ones(2, 5)},
            ValueError,
            r"A must be \(r, in\) = \(\*, 3\) to match weight \(4, 3\), got \(2, 5\)",
        ),
        ({"A": torch.ones(0, 3)}, ValueError, "A must not be empty"),
        ({"A": torch.full((2, 3), math.inf)}, ValueError, "A must be finite"),
        ({"B": torch.ones(2, 4)}, ValueError, r"B must be \(out, r\) = \(4, 2\)"),
        ({"B": torch.full((4, 2), math.nan)}, ValueError, "B must be finite"),
        ({"alpha": "8"}, TypeError, "alpha must be a number, got str"),
        ({"alpha": math.nan}, ValueError, "alpha must be finite"),
        ({"alpha": torch.tensor(8.0)}, TypeError, "alpha must be a number, got Tensor"),
    ],
)
def test_bad_arguments_are_named(function, change, error, words):
    arguments = {"weight": torch.ones(4, 3), "A": torch.ones(2, 3), "B": torch.ones(4, 2), "alpha": 8, **change}
    with pytest.raises(error, match=words):
        function(**arguments)


# LoRALinear


def test_at_the_start_the_layer_computes_exactly_what_its_base_did():
    base, x = nn.Linear(6, 9), normal(2, 3, 6)
    before = base(x)
    layer = lora.LoRALinear(base, r=4, alpha=8)
    assert torch.equal(layer(x), before)
    assert layer.A.shape == (4, 6)
    assert layer.B.shape == (9, 4)
    assert layer.scale == 2
    assert not layer.B.any()
    assert [name for name, p in layer.named_parameters() if p.requires_grad] == ["A", "B"]


def test_A_is_gaussian_with_the_variance_of_pefts_default():
    torch.manual_seed(0)
    A = lora.LoRALinear(nn.Linear(1000, 3), r=64, alpha=1).A.detach() * math.sqrt(3 * 1000)  # 64,000 draws
    # Standard errors: mean 1/sqrt(n) = .004, variance sqrt(2/n) = .0056, kurtosis sqrt(24/n) = .019; five of each.
    assert abs(A.mean().item()) < 0.02
    assert abs(A.var().item() - 1) < 0.028
    assert abs(A.pow(4).mean().item() / A.var().item() ** 2 - 3) < 0.1  # a uniform A would have 1.8


def test_forward_is_the_base_plus_the_branch_and_folding_changes_nothing():
    base, x = nn.Linear(6, 9), normal(5, 6)
    layer = train_B(nn.Sequential(lora.LoRALinear(base, r=3, alpha=6)))[0]
    expected = x @ base.weight.T + base.bias + 6 / 3 * x @ layer.A.T @ layer.B.T
    torch.testing.assert_close(layer(x), expected, **ROUNDING)
    plain, folded_weight = base.weight.clone(), lora.merge(base.weight, layer.A, layer.B, 6)
    assert layer.merge() is layer
    torch.testing.assert_close(base.weight, folded_weight, **ROUNDING)
    torch.testing.assert_close(layer(x), expected, **ROUNDING)
    once = base.weight.clone()
    layer.merge()
    assert torch.equal(base.weight, once)  # folding twice folds once
    layer.unmerge()
    layer.unmerge()
    torch.testing.assert_close(base.weight, plain, **ROUNDING)
    torch.testing.assert_close(layer(x), expected, **ROUNDING)


def test_a_folded_layer_runs_its_base_alone():
    layer = lora.LoRALinear(nn.Linear(4, 4), r=2, alpha=2).merge()
    x = normal(3, 4)
    layer.A.data.fill_(math.nan)  # would show at once if the branch were still computed
    assert torch.equal(layer(x), layer.base(x))


def test_a_half_precision_base_keeps_its_dtype_and_gets_a_float32_branch():
    base = nn.Linear(8, 5).bfloat16()
    layer = train_B(nn.Sequential(lora.LoRALinear(base, r=2, alpha=4)))[0]
    assert (layer.A.dtype, layer.B.dtype) == (torch.float32, torch.float32)
    x = normal(3, 8).bfloat16()
    h = layer(x)
    assert h.dtype == torch.bfloat16
    folded = lora.merge(base.weight, layer.A, layer.B, 4)
    layer.merge()
    assert base.weight.dtype == torch.bfloat16
    assert torch.equal(base.weight, folded)


def test_dropout_acts_on_the_branch_alone_and_only_in_training():
    torch.manual_seed(0)
    layer = train_B(nn.Sequential(lora.LoRALinear(nn.Linear(50, 4), r=2, alpha=2, dropout=0.5)))[0]
    x = normal(1, 50)
    assert not torch.equal(layer(x), layer(x))
    layer.eval()
    assert torch.equal(layer(x), layer(x))
    assert not lora.LoRALinear(nn.Linear(4, 4).eval(), r=2, alpha=2).training


def test_a_training_step_moves_the_branch_and_not_the_base():
    torch.manual_seed(0)
    layer = lora.LoRALinear(nn.Linear(6, 3), r=2, alpha=2)
    base = copy.deepcopy(layer.base.state_dict())
    optimizer = torch.optim.SGD([p for p in layer.parameters() if p.requires_grad], lr=0.1)
    for _ in range(2):  # B = 0 keeps A still in the first step: dL/dA = Bᵀ (...)
        optimizer.zero_grad()
        layer(normal(4, 6)).pow(2).sum().backward()
        optimizer.step()
    assert bool(layer.B.any())
    assert layer.A.grad is not None
    assert bool(layer.A.grad.any())
    assert all(torch.equal(base[name], value) for name, value in layer.base.state_dict().items())


@pytest.mark.parametrize(
    ("arguments", "error", "words"),
    [
        ((nn.Conv1d(2, 2, 1), 2, 2), TypeError, "base must be an nn.Linear, got Conv1d"),
        ((nn.Linear(2, 2), 0, 2), ValueError, "r must be at least 1, got 0"),
        ((nn.Linear(2, 2), 1.5, 2), TypeError, "r must be an int"),
        ((nn.Linear(2, 2), 2, None), TypeError, "alpha must be a number"),
        ((nn.Linear(2, 2), 2, 2, 1.0), ValueError, r"dropout must be in \[0, 1\), got 1.0"),
    ],
)
def test_bad_layers_are_named(arguments, error, words):
    with pytest.raises(error, match=words):
        lora.LoRALinear(*arguments)


def test_a_branch_gone_nan_is_not_folded():
    layer = lora.LoRALinear(nn.Linear(3, 3), r=1, alpha=1)
    layer.B.data.fill_(math.nan)
    before = layer.base.weight.clone()
    with pytest.raises(ValueError, match="B must be finite"):
        layer.merge()
    assert torch.equal(layer.base.weight, before)
    assert not layer.merged


# add_lora, merge_all, trainable_parameters


def test_add_lora_takes_the_named_layers_and_freezes_the_rest():
    model = Block()
    assert lora.add_lora(model, ["q", "2"], r=2, alpha=4) is model
    assert isinstance(model.q, lora.LoRALinear)
    assert isinstance(model.mlp[2], lora.LoRALinear)
    assert type(model.mlp[0]) is nn.Linear
    trainable = {name for name, p in model.named_parameters() if p.requires_grad}
    assert trainable == {"q.A", "q.B", "mlp.2.A", "mlp.2.B"}
    count = 2 * (6 + 8) + 2 * (8 + 5)
    assert lora.trainable_parameters(model) == (count, 4 * count)


def test_a_target_is_a_whole_last_part_of_a_name():
    model = lora.add_lora(tiny_llama(), ["layers.1.self_attn.q_proj"], r=2, alpha=2)
    kinds = [type(layer.self_attn.q_proj) for layer in model.model.layers]
    assert kinds == [nn.Linear, lora.LoRALinear]
    with pytest.raises(ValueError, match="'proj' matches no nn.Linear"):
        lora.add_lora(tiny_llama(), ["proj"], r=2, alpha=2)


def test_targets_match_as_in_peft():
    from peft import LoraConfig, get_peft_model

    peft_model = get_peft_model(tiny_llama(), LoraConfig(r=2, target_modules=TARGETS))
    ours = lora.add_lora(tiny_llama(), TARGETS, r=2, alpha=2)
    theirs = {name.removeprefix("base_model.model.") for name in peft_model.targeted_module_names}
    assert {name for name, module in ours.named_modules() if isinstance(module, lora.LoRALinear)} == theirs


def test_merge_all_gives_the_plain_model_back_with_the_same_answers():
    model = tiny_llama()
    names, before = set(model.state_dict()), logits(model)
    assert torch.equal(logits(lora.add_lora(model, TARGETS, r=3, alpha=6)), before)
    unmerged = logits(train_B(model))
    assert (unmerged - before).abs().max() > 0.1  # the branches do something
    assert lora.merge_all(model) is model
    assert set(model.state_dict()) == names
    assert not any(isinstance(module, lora.LoRALinear) for module in model.modules())
    torch.testing.assert_close(logits(model), unmerged, **ROUNDING)


def test_merge_all_equals_pefts_merge_and_unload():
    from peft import LoraConfig, get_peft_model

    model = train_B(lora.add_lora(tiny_llama(), TARGETS, r=3, alpha=5))
    merged = lora.merge_all(copy.deepcopy(model)).state_dict()
    theirs = get_peft_model(tiny_llama(), LoraConfig(r=3, lora_alpha=5, target_modules=TARGETS))
    for name, layer in model.named_modules():
        if isinstance(layer, lora.LoRALinear):
            twin = theirs.base_model.model.get_submodule(name)
            twin.lora_A["default"].weight.data.copy_(layer.A)
            twin.lora_B["default"].weight.data.copy_(layer.B)
    for name, value in theirs.merge_and_unload().state_dict().items():
        torch.testing.assert_close(merged[name], value, **ROUNDING)


def test_merge_all_of_a_bare_layer_is_its_base():
    layer = lora.LoRALinear(nn.Linear(3, 3), r=1, alpha=1)
    assert lora.merge_all(layer) is layer.base


@pytest.mark.parametrize(
    ("targets", "r", "error", "words"),
    [
        ("q", 2, TypeError, "targets must be a list of names"),
        ([1], 2, TypeError, "targets must be a list of names"),
        ([], 2, ValueError, "targets must name at least one layer"),
        (
            ["q", "k_proj"],
            2,
            ValueError,
            "'k_proj' matches no nn.Linear of the model, whose linear layers are: 0, 2, q",
        ),
        (["norm"], 2, ValueError, "'norm' matches no nn.Linear"),
        (["q"], 0, ValueError, "r must be at least 1"),
    ],
)
def test_a_refused_add_lora_changes_nothing(targets, r, error, words):
    model = Block()
    with pytest.raises(error, match=words):
        lora.add_lora(model, targets, r=r, alpha=2)
    assert all(p.requires_grad for p in model.parameters())
    assert type(model.q) is nn.Linear


def test_lora_on_lora_on_shared_weights_and_on_no_model_are_refused():
    model = lora.add_lora(Block(), ["q"], r=2, alpha=2)
    with pytest.raises(ValueError, match="must not hold LoRA layers already"):
        lora.add_lora(model, ["0"], r=2, alpha=2)
    tied = tiny_llama(tie_word_embeddings=True)
    with pytest.raises(ValueError, match="lm_head shares its weight with another layer .*embed_tokens"):
        lora.add_lora(tied, ["lm_head"], r=2, alpha=2)
    assert tied.lm_head.weight.requires_grad
    with pytest.raises(TypeError, match="model must be an nn.Module, got dict"):
        lora.add_lora({}, ["q"], r=2, alpha=2)
    with pytest.raises(ValueError, match="model must hold LoRA layers"):
        lora.merge_all(Block())


# save and load


def test_peft_loads_what_we_save(tmp_path):
    from peft import PeftModel

    model = train_B(lora.add_lora(tiny_llama(), TARGETS, r=3, alpha=6.0, dropout=0.1))
    assert lora.save(model, tmp_path / "adapter") == tmp_path / "adapter"
    assert sorted(os.listdir(tmp_path / "adapter")) == [peft_format.CONFIG_FILE, peft_format.WEIGHTS_FILE]
    theirs = PeftModel.from_pretrained(tiny_llama(), tmp_path / "adapter").eval()
    assert (logits(model) - logits(tiny_llama())).abs().max() > 0.1
    torch.testing.assert_close(logits(theirs), logits(model), **ROUNDING)
    assert theirs.peft_config["default"].lora_alpha == 6
    assert theirs.peft_config["default"].target_modules == set(TARGETS)


@pytest.mark.parametrize("init", [True, "gaussian"])
def test_we_load_what_peft_saves(tmp_path, init):
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(r=4, lora_alpha=6, target_modules=TARGETS, lora_dropout=0.05, init_lora_weights=init)
    theirs = train_B(get_peft_model(tiny_llama(), config)).eval()
    theirs.save_pretrained(tmp_path)
    ours = lora.load(tiny_llama(), tmp_path)
    assert (logits(ours) - logits(tiny_llama())).abs().max() > 0.1
    torch.testing.assert_close(logits(ours), logits(theirs), **ROUNDING)
    layer = ours.model.layers[0].self_attn.q_proj
    assert (layer.r, layer.alpha, layer.dropout.p) == (4, 6.0, 0.05)
    assert lora.trainable_parameters(ours)[0] == sum(p.numel() for p in theirs.parameters() if p.requires_grad)


def test_save_and_load_return_the_same_numbers_folded_or_not(tmp_path):
    model = train_B(lora.add_lora(tiny_llama(), ["layers.0.self_attn.q_proj"], r=2, alpha=3.5))
    lora.save(model, tmp_path / "open")
    for module in model.modules():
        if isinstance(module, lora.LoRALinear):
            module.merge()
    lora.save(model, tmp_path / "folded")
    for folder in ("open", "folded"):
        config = json.loads((tmp_path / folder / peft_format.CONFIG_FILE).read_text())
        assert config["target_modules"] == ["model.layers.0.self_attn.q_proj"]  # "q_proj" would take layer 1 as well
        again = lora.load(tiny_llama(), tmp_path / folder)
        torch.testing.assert_close(logits(again), logits(model), **ROUNDING)
        assert type(again.model.layers[1].self_attn.q_proj) is nn.Linear


def test_a_save_that_is_cut_off_never_loads(tmp_path, monkeypatch):
    model = train_B(lora.add_lora(Block(), ["q"], r=2, alpha=2))
    lora.save(model, tmp_path)
    assert len({(tmp_path / file).stat().st_mode for file in os.listdir(tmp_path)}) == 1  # both as readable
    saved = (tmp_path / peft_format.WEIGHTS_FILE).read_bytes()

    def no_space(*args, **kwargs):
        raise OSError("no space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("pathlib.Path.write_text", no_space)
        with pytest.raises(OSError, match="no space"):
            lora.save(train_B(model, seed=2), tmp_path)
    assert (tmp_path / peft_format.WEIGHTS_FILE).read_bytes() == saved  # cut off while writing: the old save stands
    lora.load(Block(), tmp_path)

    replace = os.replace

    def only_weights(source, target):
        return replace(source, target) if str(target).endswith(peft_format.WEIGHTS_FILE) else no_space()

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", only_weights)
        with pytest.raises(OSError, match="no space"):
            lora.save(model, tmp_path)
    with pytest.raises(FileNotFoundError, match="adapter_config.json is missing"):  # cut off between the files
        lora.load(Block(), tmp_path)
    assert os.listdir(tmp_path) == [peft_format.WEIGHTS_FILE]


def test_what_cannot_be_saved(tmp_path):
    with pytest.raises(ValueError, match="model must hold LoRA layers"):
        lora.save(Block(), tmp_path)
    with pytest.raises(ValueError, match="bare LoRALinear"):
        lora.save(lora.LoRALinear(nn.Linear(2, 2), 1, 1), tmp_path)
    mixed = lora.add_lora(Block(), ["q"], r=2, alpha=2)
    mixed.mlp[0] = lora.LoRALinear(mixed.mlp[0], r=3, alpha=2)
    with pytest.raises(ValueError, match=r"one \(r, alpha, dropout\)"):
        lora.save(mixed, tmp_path)
    assert not os.listdir(tmp_path)


def refused(directory, error, words):
    """Loading fails with this error and leaves the model as it was."""
    model = Block()
    with pytest.raises(error, match=words):
        lora.load(model, directory)
    assert type(model.q) is nn.Linear
    assert all(p.requires_grad for p in model.parameters())


@pytest.mark.parametrize(
    ("file", "content", "error", "words"),
    [
        ("adapter_config.json", None, FileNotFoundError, "adapter_config.json is missing"),
        ("adapter_model.safetensors", None, FileNotFoundError, "adapter_model.safetensors is missing"),
        ("adapter_config.json", b"{oops", ValueError, "is not valid JSON"),
        ("adapter_config.json", b"\xff\xfe\x00", ValueError, "is not valid JSON"),
        ("adapter_config.json", b"[1]", ValueError, "must describe a LoRA adapter"),
        ("adapter_model.safetensors", b"torn", ValueError, "is damaged or no safetensors file"),
    ],
)
def test_a_missing_or_damaged_file_gives_one_clear_error(tmp_path, file, content, error, words):
    lora.save(lora.add_lora(Block(), ["q"], r=2, alpha=2), tmp_path)
    if content is None:
        (tmp_path / file).unlink()
    else:
        (tmp_path / file).write_bytes(content)
    refused(tmp_path, error, words)


A_KEY, B_KEY = "base_model.model.q.lora_A.weight", "base_model.model.q.lora_B.weight"


@pytest.mark.parametrize(
    ("settings", "tensors", "words"),
    [
        ({"peft_type": "IA3"}, {}, "must describe a LoRA adapter"),
        ({"use_dora": True}, {}, "sets use_dora to True"),
        ({"use_rslora": True}, {}, "sets use_rslora to True"),
        ({"alpha_pattern": {"q": 4}}, {}, "sets alpha_pattern"),
        ({"init_lora_weights": "pissa"}, {}, "changes the base model"),
        ({"lora_alpha": None}, {}, "must set lora_alpha"),
        ({"r": 3}, {}, "with r = 3"),
        ({}, {A_KEY: None}, "got only one of them"),
        ({}, {A_KEY: torch.ones(2, 7)}, r"must fit q \(out, in\) = \(8, 6\), got A \(2, 7\)"),
        ({}, {A_KEY: torch.full((2, 6), math.nan)}, "A of q must be finite"),
        ({}, {"other": torch.ones(1)}, "must hold only lora_A and lora_B weights, got 'other'"),
        ({}, {A_KEY: None, B_KEY: None}, "got no tensor at all"),
        ({}, {A_KEY.replace("q", "k"): torch.ones(2, 6), B_KEY.replace("q", "k"): torch.ones(8, 2)}, "branch for 'k'"),
    ],
)
def test_a_foreign_adapter_gives_one_clear_error(tmp_path, settings, tensors, words):
    from safetensors.torch import load_file, save_file

    lora.save(lora.add_lora(Block(), ["q"], r=2, alpha=2), tmp_path)
    config, weights = tmp_path / peft_format.CONFIG_FILE, tmp_path / peft_format.WEIGHTS_FILE
    config.write_text(json.dumps({**json.loads(config.read_text()), **settings}))
    changed = {**load_file(weights), **tensors}
    save_file({key: value for key, value in changed.items() if value is not None}, weights)
    refused(tmp_path, ValueError, words)


def test_loading_onto_lora_is_refused(tmp_path):
    model = lora.add_lora(Block(), ["q"], r=2, alpha=2)
    lora.save(model, tmp_path)
    with pytest.raises(ValueError, match="must not hold LoRA layers already"):
        lora.load(model, tmp_path)
