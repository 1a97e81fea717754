"""LoRA: a low-rank branch beside each frozen linear layer, which can be folded into it afterwards.

Hu et al., "LoRA: Low-Rank Adaptation of Large Language Models", ICLR 2022; slides "LoRA", "Parallel and fusible
learnable layers". The slide writes h = xW + xAB with row vectors x and W (in, out). nn.Linear keeps Wᵀ, (out, in),
so here A is (r, in), B is (out, r) and the branch is (alpha / r) B A, the convention of the paper and of PEFT.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lecturekit.arguments import require_number, require_positive_int, require_tensor
from lecturekit.tuning import peft_format


def merge(weight: Tensor, A: Tensor, B: Tensor, alpha: float) -> Tensor:
    """Fold a LoRA branch into its layer: W' = W + (alpha / r) B A.

    weight: (out, in)   A: (r, in)   B: (out, r)   ->   (out, in), a new tensor in weight's dtype.
    Half-precision weights are added up in float32 and rounded once. Differentiable in all three tensors.
    Raises TypeError for a wrong type or dtype, ValueError for shapes that do not chain, NaN, infinity or empty input.
    Hu et al. 2022, eq. 3; slide "A / B can be fused later".
    """
    return _add_branch(weight, A, B, alpha, sign=1)


def unmerge(weight: Tensor, A: Tensor, B: Tensor, alpha: float) -> Tensor:
    """Take the branch out again: W = W' - (alpha / r) B A.

    Arguments, result and errors as for merge. The inverse up to one rounding each way, in weight's dtype.
    """
    return _add_branch(weight, A, B, alpha, sign=-1)


class LoRALinear(nn.Module):
    """A frozen linear layer with a trainable low-rank branch: h = base(x) + (alpha / r) B A x.

    base: the nn.Linear (in -> out), frozen here and kept. A: (r, in), Gaussian. B: (out, r), zeros, so the layer
    computes exactly what base computed until B is trained (slide "The output is not affected").
    x: (..., in) -> (..., out) in base's dtype. dropout acts on the branch's input while training.

    The slide says that A is Gaussian and not how wide. Its variance here is 1 / (3 in), that of PEFT's default
    (uniform in ±1/sqrt(in)), so that learning rates found with PEFT carry over. Beside a half-precision base
    A and B are float32, as in PEFT: small updates would be lost in the rounding otherwise.
    Raises TypeError or ValueError naming base, r, alpha or dropout.
    """

    A: nn.Parameter
    B: nn.Parameter

    def __init__(self, base: nn.Linear, r: int, alpha: float, dropout: float = 0.0) -> None:
        super().__init__()
        if not isinstance(base, nn.Linear):
            raise TypeError(f"base must be an nn.Linear, got {type(base).__name__}")
        require_tensor("base.weight", base.weight, ndim=2)
        self.r = require_positive_int("r", r)
        self.alpha = require_number("alpha", alpha)
        dropout = require_number("dropout", dropout)
        if not 0 <= dropout < 1:
            raise ValueError(f"dropout must be in [0, 1), got {dropout}")
        self.scale = self.alpha / r
        self.merged = False
        self.base = base.requires_grad_(False)
        self.dropout = nn.Dropout(dropout)

        out_features, in_features = base.weight.shape
        dtype = torch.promote_types(base.weight.dtype, torch.float32)
        self.A = nn.Parameter(torch.empty(r, in_features, device=base.weight.device, dtype=dtype))
        self.B = nn.Parameter(torch.zeros(out_features, r, device=base.weight.device, dtype=dtype))
        nn.init.normal_(self.A, std=1 / math.sqrt(3 * in_features))
        self.train(base.training)

    def forward(self, x: Tensor) -> Tensor:
        h = self.base(x)
        if self.merged:  # no branch, so no extra latency
            return h
        # (..., in) -> (..., r) -> (..., out), scaled where it is narrowest
        branch = F.linear(F.linear(self.dropout(x.to(self.A.dtype)), self.A) * self.scale, self.B)
        return (h + branch).to(h.dtype)

    @torch.no_grad()
    def merge(self) -> LoRALinear:
        """Fold the branch into base.weight in place. Does nothing when it is folded already."""
        if not self.merged:
            self._fold(sign=1)
        return self

    @torch.no_grad()
    def unmerge(self) -> LoRALinear:
        """Take the branch out of base.weight in place. Does nothing when it is not folded in."""
        if self.merged:
            self._fold(sign=-1)
        return self

    def _fold(self, sign: int) -> None:
        weight = self.base.weight
        # One NaN here would spoil a whole column of a weight that is kept nowhere else.
        require_tensor("A", self.A, finite=True)
        require_tensor("B", self.B, finite=True)
        if weight.dtype == self.A.dtype == self.B.dtype:
            weight.addmm_(self.B, self.A, alpha=sign * self.scale)  # no second copy of the weight
        else:
            weight.copy_(_branch_sum(weight, self.A, self.B, sign * self.scale))
        self.merged = sign > 0

    def extra_repr(self) -> str:
        return f"r={self.r}, alpha={self.alpha:g}, merged={self.merged}"


def add_lora(model: nn.Module, targets: Sequence[str], r: int, alpha: float, dropout: float = 0.0) -> nn.Module:
    """Put a LoRALinear around every nn.Linear named by targets, freeze all else, and return the same model.

    A layer is named by a target when its qualified name is the target or ends in "." + target (PEFT's rule):
    ["q_proj", "v_proj"] takes these two of every block, ["layers.0.self_attn.q_proj"] one layer.
    Raises TypeError or ValueError, before anything is changed, when a target matches no nn.Linear, when the model
    holds LoRA already, or when a matched weight is shared with another layer (folding would change both).
    """
    _require_module(model)
    if isinstance(targets, str) or not all(isinstance(target, str) for target in targets):
        raise TypeError(f'targets must be a list of names such as ["q_proj", "v_proj"], got {targets!r}')
    if not targets:
        raise ValueError("targets must name at least one layer, got none")
    linears = _plain_linears(model)
    chosen = [name for name in linears if any(_names(target, name) for target in targets)]
    for target in targets:
        if not any(_names(target, name) for name in chosen):
            endings = ", ".join(sorted({name.rpartition(".")[2] for name in linears})) or "none"
            raise ValueError(
                f"targets: {target!r} matches no nn.Linear of the model, whose linear layers are: {endings}"
            )
    _refuse_shared_weights(model, chosen)
    return _insert(model, {name: LoRALinear(linears[name], r, alpha, dropout) for name in chosen})


def merge_all(model: nn.Module) -> nn.Module:
    """Fold every branch and put the plain nn.Linear layers back: the model has its old structure and speed.

    Returns the model (the base layer if the model is itself a LoRALinear). Its parameters stay frozen.
    Raises ValueError when it holds no LoRA.
    """
    layers = _lora_layers(model)
    for name, layer in layers.items():
        layer.merge()
        if name:
            _replace(model, name, layer.base)
    return layers[""].base if "" in layers else model


def trainable_parameters(model: nn.Module) -> tuple[int, int]:
    """How many parameters train, and the bytes that they take: (count, bytes)."""
    _require_module(model)
    trainable = [p for p in model.parameters() if p.requires_grad]
    return sum(p.numel() for p in trainable), sum(p.numel() * p.element_size() for p in trainable)


def save(model: nn.Module, directory: str | Path) -> Path:
    """Write the branches, and nothing of the base model, as a PEFT adapter; return the directory.

    PEFT reads it with PeftModel.from_pretrained(model, directory). Works on a folded model too. A save that is cut
    off never leaves a directory that loads. Raises ValueError when the model holds no LoRA, is a bare LoRALinear,
    or has layers that differ in r, alpha or dropout.
    """
    layers = _lora_layers(model)
    if "" in layers:
        raise ValueError("model must contain its LoRA layers, got a bare LoRALinear, which has no name to save under")
    settings = {(layer.r, layer.alpha, layer.dropout.p) for layer in layers.values()}
    if len(settings) > 1:
        raise ValueError(f"model must have one (r, alpha, dropout) in all its LoRA layers, got {sorted(settings)}")
    branches = {name: (layer.A, layer.B) for name, layer in layers.items()}
    peft_format.write(Path(directory), branches, *settings.pop(), _targets_of(model, list(layers)))
    return Path(directory)


def load(model: nn.Module, directory: str | Path) -> nn.Module:
    """Add the LoRA branches saved in directory, by save or by PEFT, to a model without LoRA; return the model.

    All else is frozen, A and B are trainable. Raises FileNotFoundError when a file is missing, and ValueError when
    a file is damaged, is not plain LoRA (DoRA, rank-stabilised scaling, trained biases ...), or does not fit the
    model. The model is changed only after everything has been checked.
    """
    _require_module(model)
    config, branches = peft_format.read(Path(directory))
    linears = _plain_linears(model)
    for name, (A, B) in branches.items():
        if name not in linears:
            raise ValueError(f"the adapter in {directory} has a branch for {name!r}, no nn.Linear of the model")
        out_features, in_features = linears[name].weight.shape
        if (B.shape[0], A.shape[1]) != (out_features, in_features):
            raise ValueError(
                f"the adapter in {directory} must fit {name} (out, in) = {(out_features, in_features)}, "
                f"got A {tuple(A.shape)} and B {tuple(B.shape)}"
            )
        require_tensor(f"A of {name}", A, finite=True)
        require_tensor(f"B of {name}", B, finite=True)
    _refuse_shared_weights(model, list(branches))
    layers = {}
    for name, (A, B) in branches.items():
        layer = LoRALinear(linears[name], config["r"], config["lora_alpha"], config.get("lora_dropout", 0.0))
        layer.A.data.copy_(A)
        layer.B.data.copy_(B)
        layers[name] = layer
    return _insert(model, layers)


def _add_branch(weight: Tensor, A: Tensor, B: Tensor, alpha: float, sign: int) -> Tensor:
    for name, tensor in (("weight", weight), ("A", A), ("B", B)):
        require_tensor(name, tensor, ndim=2, finite=True)
        if tensor.device != weight.device:
            raise ValueError(f"{name} must be on weight's device {weight.device}, got {tensor.device}")
    out_features, in_features = weight.shape
    if A.shape[1] != in_features:
        raise ValueError(
            f"A must be (r, in) = (*, {in_features}) to match weight {tuple(weight.shape)}, got {tuple(A.shape)}"
        )
    r = A.shape[0]
    if B.shape != (out_features, r):
        raise ValueError(
            f"B must be (out, r) = ({out_features}, {r}) to match weight {tuple(weight.shape)} and A {tuple(A.shape)}, "
            f"got {tuple(B.shape)}"
        )
    return _branch_sum(weight, A, B, sign * require_number("alpha", alpha) / r)


def _branch_sum(weight: Tensor, A: Tensor, B: Tensor, scale: float) -> Tensor:
    dtype = torch.float32
    for tensor in (weight, A, B):
        dtype = torch.promote_types(dtype, tensor.dtype)
    return torch.addmm(weight.to(dtype), B.to(dtype), A.to(dtype), alpha=scale).to(weight.dtype)


def _names(target: str, name: str) -> bool:
    return name == target or name.endswith(f".{target}")


def _require_module(model: Any) -> None:
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be an nn.Module, got {type(model).__name__}")


def _lora_layers(model: nn.Module) -> dict[str, LoRALinear]:
    _require_module(model)
    layers = {name: module for name, module in model.named_modules() if isinstance(module, LoRALinear)}
    if not layers:
        raise ValueError("model must hold LoRA layers, got one without any: call add_lora or load first")
    return layers


def _plain_linears(model: nn.Module) -> dict[str, nn.Linear]:
    """The layers that may get a branch, by name. Subclasses of nn.Linear are left out: they compute something else
    or, like the out_proj of nn.MultiheadAttention, are never called."""
    if any(isinstance(module, LoRALinear) for module in model.modules()):
        raise ValueError(
            "model must not hold LoRA layers already: fold them with merge_all or start from a fresh model"
        )
    return {name: module for name, module in model.named_modules() if name and type(module) is nn.Linear}


def _refuse_shared_weights(model: nn.Module, names: list[str]) -> None:
    owners: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        owners.setdefault(id(parameter), []).append(name)
    for name in names:
        shared = owners[id(model.get_submodule(name).weight)]
        if len(shared) > 1:
            raise ValueError(f"{name} shares its weight with another layer ({', '.join(shared)}): untie it first")


def _insert(model: nn.Module, layers: dict[str, LoRALinear]) -> nn.Module:
    model.requires_grad_(False)  # the branches are not in the model yet, so they stay trainable
    for name, layer in layers.items():
        _replace(model, name, layer)
    return model


def _replace(model: nn.Module, name: str, module: nn.Module) -> None:
    parent, _, child = name.rpartition(".")
    setattr(model.get_submodule(parent), child, module)


def _targets_of(model: nn.Module, lora_names: list[str]) -> list[str]:
    """The shortest targets that name exactly these layers: their last names, or else their full names."""
    endings = sorted({name.rpartition(".")[2] for name in lora_names})
    inside = tuple(f"{name}." for name in lora_names)  # base and dropout, gone once the model is plain again
    others = [name for name, _ in model.named_modules() if name not in lora_names and not name.startswith(inside)]
    return lora_names if any(_names(ending, name) for ending in endings for name in others) else endings
