"""Answers to the LoRA questions that people gave and that the questions once took or misread."""

import copy
import math

import pytest
import torch
from torch import nn

from lecturekit.checking import evaluate
from lecturekit.tuning.lora import LoRALinear, add_lora


class Right(nn.Module):
    def __init__(self, base, r, alpha):
        super().__init__()
        self.base = base.requires_grad_(False)
        self.A = nn.Parameter(torch.randn(r, base.in_features) / math.sqrt(3 * base.in_features))
        self.B = nn.Parameter(torch.zeros(base.out_features, r))
        self.scale = alpha / r

    def forward(self, x):
        return self.base(x) + self.scale * (x @ self.A.T @ self.B.T)


def variant(**methods):
    return type("LoRALinear", (Right,), methods)


def test_the_right_layer_passes():
    assert evaluate("lora.linear", Right).passed


def no_base(self, base, r, alpha):
    Right.__init__(self, base, r, alpha)
    self.linear = self._modules.pop("base")


@pytest.mark.parametrize(
    ("layer", "words"),
    [
        (variant(__init__=no_base, forward=lambda s, x: s.linear(x)), "attribute base"),
        (
            variant(forward=lambda s, x: s.base(x) + s.scale * torch.einsum("bsi,ri,or->bso", x, s.A, s.B)),
            "RuntimeError",
        ),
        (variant(forwrad=Right.forward, forward=nn.Module.forward), "forward"),
    ],
)
def test_a_layer_that_would_break_the_lab_later_is_refused(layer, words):
    verdict = evaluate("lora.linear", layer)
    assert not verdict.passed and words in verdict.message
    assert verdict.kind != "not attempted"


def test_freezing_by_no_grad_is_named():
    def forward(self, x):
        with torch.no_grad():
            kept = self.base(x)
        return kept + self.scale * (x @ self.A.T @ self.B.T)

    assert evaluate("lora.linear", variant(forward=forward)).misconception == "cuts the gradient to the layers below"


def test_a_copy_of_the_model_is_not_the_model():
    verdict = evaluate("lora.inject", lambda model, *rest: add_lora(copy.deepcopy(model), *rest))
    assert not verdict.passed and "the model that it was given" in verdict.message


def test_which_layers_were_replaced_is_told_by_name():
    def all_but_one(model, targets, r, alpha):
        add_lora(model, targets, r, alpha)
        model.q_proj = model.q_proj.base
        return model

    verdict = evaluate("lora.inject", all_but_one)
    assert "q_proj" in verdict.first_difference.expected and "replaced layers" in str(verdict)


def test_a_detached_loss_is_not_said_to_hold_its_graph():
    def step(model, optimizer, input_ids, labels):
        logits = model(input_ids).logits[:, :-1]
        loss = nn.functional.cross_entropy(logits.flatten(0, 1), labels[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        return loss.detach()

    verdict = evaluate("lora.train", step)
    assert not verdict.passed and "graph" not in verdict.message and "loss.item()" in verdict.message


@pytest.mark.parametrize("seed", range(60))
def test_a_whole_number_division_never_passes(seed):
    verdict = evaluate("lora.merge", lambda w, a, b, alpha: w + alpha // len(a) * (b @ a), seed)
    assert verdict.misconception == "divides in whole numbers"


def test_the_reference_layer_is_what_the_lab_asks_for():
    assert evaluate("lora.linear", LoRALinear).passed
