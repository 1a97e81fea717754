"""The questions of lab 5: LoRA's merge, its layer, its place in a model, its size, and a training step.

Hu et al., "LoRA: Low-Rank Adaptation of Large Language Models", ICLR 2022.
"""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lecturekit.checking import Case, Draw, Unfit, question
from lecturekit.checking.compare import describe, precision

LAB = "lab05_lora"
SLIDE = "LoRA: Parallel and fusible learnable layers"


def _alpha(r: int, draw: Draw) -> int:
    """An alpha that is no multiple of r, where r > 1, so that neither a forgotten nor a whole-number division hides."""
    return draw.choice([alpha for alpha in (1, 9, 16, 25, 32) if (alpha % r if r > 1 else alpha != 1)])


# lora.merge ----------------------------------------------------------------------------------------------------------


@question("lora.merge", lab=LAB, points=15, slide=SLIDE)
def merge(draw: Draw) -> Case:
    """Fold the branch into the layer."""
    out, inp = draw.sizes(2, low=6, high=24)
    edge = draw.edge("B = 0", "r = 1", "bfloat16")
    r = 1 if edge == "r = 1" else draw.integer(2, 5)
    dtype = torch.bfloat16 if edge == "bfloat16" else torch.float32
    B = draw.normal(out, r, dtype=dtype)
    return Case(
        edge,
        weight=draw.normal(out, inp, dtype=dtype),
        A=draw.normal(r, inp, dtype=dtype),
        B=torch.zeros_like(B) if edge == "B = 0" else B,
        alpha=_alpha(r, draw),
    )


merge.oracle("lecturekit.tuning.lora:merge")
merge.tolerance(
    ulps=lambda case: case.A.shape[0] + 4,
    magnitude=lambda case, _: _size_of_merge(case),
    why="a dot product of depth r, a scale and a sum: at most r + 4 roundings of |W| + (alpha / r) |B| |A|",
)


def _size_of_merge(case: Case) -> Tensor:
    W, A, B = case.weight.double().abs(), case.A.double().abs(), case.B.double().abs()
    return W + case.alpha / case.A.shape[0] * (B @ A)


merge.law(
    "B = 0 leaves the layer as it was",
    lambda case, parts: torch.equal(parts["result"], case.weight) if case.label == "B = 0" else None,
)


def _fused_equals_parallel(case: Case, parts: dict[str, Any]) -> bool:
    """h = x W' must be x W + (alpha / r) x A B for any x; here for an x of ones, summed by hand in float64."""
    W, A, B = case.weight.double(), case.A.double(), case.B.double()
    parallel = W.sum(1) + case.alpha / A.shape[0] * (B @ A.sum(1))
    allowed = (case.A.shape[0] + 4) * precision(case, case.weight) * _size_of_merge(case).sum(1)
    return bool(((parts["result"].double().sum(1) - parallel).abs() <= allowed).all())


merge.law("the merged layer gives what the layer and its branch give together", _fused_equals_parallel)


@merge.misconception("forgets the alpha / r scale", hint="Every paper run sets alpha. What is it divided by, and why?")
def _(weight, A, B, alpha):
    return weight + B @ A


@merge.misconception(
    "scales by alpha, without dividing by r", hint="Doubling r should not double the branch. What keeps it in place?"
)
def _(weight, A, B, alpha):
    return weight + alpha * (B @ A)


@merge.misconception("scales by r / alpha", hint="Which of the two grows when you want a stronger branch: alpha or r?")
def _(weight, A, B, alpha):
    return weight + A.shape[0] / alpha * (B @ A)


@merge.misconception("divides alpha by the wrong size of A", hint="A has two sizes. Which one is the rank?")
def _(weight, A, B, alpha):
    return weight + alpha / A.shape[1] * (B @ A)


@merge.misconception(
    "scales by alpha / sqrt(r)", hint="That is rank-stabilised LoRA. The lecture's paper divides by r itself."
)
def _(weight, A, B, alpha):
    return weight + alpha / math.sqrt(A.shape[0]) * (B @ A)


@merge.misconception(
    "multiplies A by B in the slide's order",
    hint="The slide has row vectors, h = xW + xAB. What does nn.Linear store, W or its transpose?",
)
def _(weight, A, B, alpha):
    return weight + alpha / A.shape[0] * (A @ B)


@merge.misconception("subtracts the branch", hint="Is this how a branch goes in, or how it is taken out again?")
def _(weight, A, B, alpha):
    return weight - alpha / A.shape[0] * (B @ A)


@merge.misconception(
    "scales the weight together with the branch", hint="Only the branch carries alpha / r. What must happen when B = 0?"
)
def _(weight, A, B, alpha):
    return alpha / A.shape[0] * (weight + B @ A)


@merge.misconception("divides alpha by the wrong size of A", hint="A has two sizes. Which one is the rank?")
def _(weight, A, B, alpha):
    return weight + alpha / B.shape[0] * (B @ A)


@merge.misconception("divides in whole numbers", hint="What is 9 // 2, and what should it be here?")
def _(weight, A, B, alpha):
    return weight + alpha // A.shape[0] * (B @ A)


@merge.misconception("returns the branch alone", hint="What must the merged layer still do when B = 0?")
def _(weight, A, B, alpha):
    return alpha / A.shape[0] * (B @ A)


@merge.misconception(
    "adds the branch transposed", hint="Write the shapes down: which order of the two factors gives (out, in)?"
)
def _(weight, A, B, alpha):
    return weight + alpha / A.shape[0] * (A.T @ B.T)


@merge.alternative("einsum")
def _(w, a, b, scale):
    return w + (scale / a.size(0)) * torch.einsum("or,ri->oi", b, a)


@merge.alternative("a loop over the rank")
def _(weight, A, B, alpha):
    total = weight.clone()
    for k in range(B.shape[1]):
        total = total + alpha / B.shape[1] * torch.outer(B[:, k], A[k])
    return total


@merge.alternative("float64 inside")
def _(*args):
    weight, A, B, alpha = args
    return (weight.double() + alpha / len(A) * (B.double() @ A.double())).to(weight.dtype)


@merge.alternative("addmm")
def _(weight, A, B, alpha):
    return torch.addmm(weight, B, A, alpha=alpha / A.shape[0])


# lora.linear ---------------------------------------------------------------------------------------------------------


@question("lora.linear", lab=LAB, points=20, slide=SLIDE, kind="class", cases=5)
def linear(draw: Draw) -> Case:
    """Write the layer: a frozen nn.Linear with a trainable branch beside it."""
    out, inp, batch = draw.sizes(3, low=6, high=16)
    edge = draw.edge("no bias", "r = 1")
    r = 1 if edge == "r = 1" else draw.integer(2, 5)
    return Case(
        edge,
        weight=draw.normal(out, inp),
        bias=None if edge == "no bias" else draw.normal(out),
        A=draw.normal(r, inp),
        B=draw.normal(out, r),
        alpha=_alpha(r, draw),
        x=draw.normal(*[(batch, 3, inp), (inp,), (batch, inp)][draw.index % 3]),
    )


linear.oracle("lecturekit.tuning.lora:LoRALinear")
linear.tolerance(
    ulps=lambda case: case.weight.shape[0] * case.x.numel() // case.weight.shape[1] + sum(case.A.shape) + 4,
    why="sums of depth in and r forward, and of depth out × rows backward; relative to the largest value",
)


@linear.driver
def _(layer_class: Any, case: Case) -> dict[str, Any]:
    """Build the layer on a known nn.Linear, look at its start, then give it known factors and use it."""
    layer = layer_class(_plain_linear(case), case.A.shape[0], case.alpha)
    if not isinstance(layer, nn.Module):
        raise Unfit("LoRALinear must be a subclass of nn.Module, so that its parameters are found")
    if not isinstance(getattr(layer, "base", None), nn.Linear):
        raise Unfit("LoRALinear needs the nn.Linear that it was given as its attribute base")
    base = _plain_linear(case)
    for name, shape in (("A", case.A.shape), ("B", case.B.shape)):
        factor = getattr(layer, name, None)
        if not isinstance(factor, nn.Parameter):
            raise Unfit(f"LoRALinear needs {name} as an nn.Parameter of shape {tuple(shape)}, got {describe(factor)}")
        if factor.shape != shape:
            raise Unfit(
                f"{name} must have shape {tuple(shape)}, got {tuple(factor.shape)}; A is (r, in), B is (out, r)"
            )
    start = layer(case.x)
    if not isinstance(start, Tensor) or start.shape != base(case.x).shape:
        raise Unfit(f"forward must return a tensor (…, out) for inputs (…, in), got {describe(start)}")
    parts: dict[str, Any] = {
        "the layer is unchanged at the start": _close(start, base(case.x), case),
        "A starts other than zero": bool((layer.A != 0).any()),
        "A starts random": bool(layer.A.detach().std() > 0),
        "B starts at zero": bool((layer.B == 0).all()),
        "trainable parameters": ", ".join(sorted(n for n, p in layer.named_parameters() if p.requires_grad)),
    }
    with torch.no_grad():
        layer.A.copy_(case.A)
        layer.B.copy_(case.B)
    x = case.x.clone().requires_grad_()
    output = layer(x)
    parts["output"] = output
    if not output.requires_grad:
        raise Unfit("the output has no gradient; use the parameters themselves, not .data or .detach()")
    output.square().mean().backward()
    parts["gradient of the input"] = x.grad if x.grad is not None else torch.zeros_like(x)
    for name in ("A", "B"):
        gradient = getattr(layer, name).grad
        if gradient is None:
            raise Unfit(f"{name} gets no gradient; use the parameter itself, not .data or .detach()")
        parts[f"gradient of {name}"] = gradient
    return parts


def _plain_linear(case: Case) -> nn.Linear:
    out, inp = case.weight.shape
    base = nn.Linear(inp, out, bias=case.bias is not None, device=case.weight.device)
    with torch.no_grad():
        base.weight.copy_(case.weight)
        if case.bias is not None:
            base.bias.copy_(case.bias)
    return base


def _close(got: Tensor, expected: Tensor, case: Case) -> bool:
    """Equal up to the order of a few matrix products' sums: 64 roundings of the largest value."""
    if got.shape != expected.shape:
        return False
    return bool((got - expected).abs().max() <= 64 * precision(case, expected) * expected.abs().max())


class _Layer(nn.Module):
    """A right layer, from which each misconception and alternative departs in one place."""

    def __init__(self, base, r, alpha):
        super().__init__()
        self.base = base.requires_grad_(False)
        self.A = nn.Parameter(torch.randn(r, base.in_features, device=base.weight.device) / r)
        self.B = nn.Parameter(torch.zeros(base.out_features, r, device=base.weight.device))
        self.scale = alpha / r

    def forward(self, x):
        return self.base(x) + self.scale * (x @ self.A.T @ self.B.T)


@linear.misconception("starts B at random values too", hint="What must the layer give before its first training step?")
class _(_Layer):
    def __init__(self, base, r, alpha):
        super().__init__(base, r, alpha)
        nn.init.normal_(self.B)


@linear.misconception(
    "starts both A and B at zero", hint="Write down the gradient of B at the start. What is it when A is zero?"
)
class _(_Layer):
    def __init__(self, base, r, alpha):
        super().__init__(base, r, alpha)
        nn.init.zeros_(self.A)


@linear.misconception(
    "starts A at zero and B at random values",
    hint="It would train too, but the lecture has it the other way round: which factor is Gaussian?",
)
class _(_Layer):
    def __init__(self, base, r, alpha):
        super().__init__(base, r, alpha)
        nn.init.zeros_(self.A)
        nn.init.normal_(self.B)


@linear.misconception("forgets the alpha / r scale", hint="Every paper run sets alpha. What is it divided by, and why?")
class _(_Layer):
    def forward(self, x):
        return self.base(x) + x @ self.A.T @ self.B.T


@linear.misconception(
    "scales by alpha, without dividing by r", hint="Doubling r should not double the branch. What keeps it in place?"
)
class _(_Layer):
    def forward(self, x):
        return self.base(x) + self.scale * self.A.shape[0] * (x @ self.A.T @ self.B.T)


@linear.misconception("scales the base layer together with the branch", hint="Only the branch carries alpha / r.")
class _(_Layer):
    def forward(self, x):
        return self.scale * (self.base(x) + x @ self.A.T @ self.B.T)


@linear.misconception(
    "scales by alpha / sqrt(r)", hint="That is rank-stabilised LoRA. The lecture's paper divides by r itself."
)
class _(_Layer):
    def forward(self, x):
        return self.base(x) + self.scale * math.sqrt(self.A.shape[0]) * (x @ self.A.T @ self.B.T)


@linear.misconception(
    "starts A at a constant", hint="If all rows of A are the same, what can r of them do that one cannot?"
)
class _(_Layer):
    def __init__(self, base, r, alpha):
        super().__init__(base, r, alpha)
        nn.init.ones_(self.A)


@linear.misconception(
    "cuts the gradient to the layers below",
    hint="Frozen means that the weights do not move. Must the gradient still pass through the layer?",
)
class _(_Layer):
    def forward(self, x):
        return self.base(x).detach() + self.scale * (x @ self.A.T @ self.B.T)


@linear.misconception("freezes the weight but not the bias", hint="Which parameters does the base layer have?")
class _(_Layer):
    def __init__(self, base, r, alpha):
        super().__init__(base, r, alpha)
        if base.bias is not None:
            base.bias.requires_grad_(True)


@linear.misconception(
    "makes the scale trainable too", hint="alpha / r is a number that you choose, not one that is learnt."
)
class _(_Layer):
    def __init__(self, base, r, alpha):
        super().__init__(base, r, alpha)
        self.scale = nn.Parameter(torch.tensor(alpha / r, device=base.weight.device))


@linear.misconception("leaves the base layer trainable", hint="How many numbers would the optimizer update now?")
class _(_Layer):
    def __init__(self, base, r, alpha):
        super().__init__(base, r, alpha)
        self.base.requires_grad_(True)


@linear.misconception("drops the base layer's bias", hint="What else than its weight does the base layer add?")
class _(_Layer):
    def forward(self, x):
        return F.linear(x, self.base.weight) + self.scale * (x @ self.A.T @ self.B.T)


@linear.misconception("leaves out the base layer", hint="The branch runs in parallel. With what?")
class _(_Layer):
    def forward(self, x):
        return self.scale * (x @ self.A.T @ self.B.T)


@linear.misconception(
    "builds the branch from .data, so nothing is learned", hint="What does autograd see of a tensor's .data?"
)
class _(_Layer):
    def forward(self, x):
        return self.base(x) + self.scale * (x @ self.A.data.T @ self.B.data.T)


@linear.alternative("two F.linear calls")
class _(_Layer):
    def forward(self, inputs):
        return self.base(inputs) + self.scale * F.linear(F.linear(inputs, self.A), self.B)


@linear.alternative("einsum")
class _(_Layer):
    def forward(self, x):
        return self.base(x) + torch.einsum("...i,ri,or->...o", x, self.A, self.B) * self.scale


@linear.alternative("folded on the fly, kaiming start")
class _(nn.Module):
    def __init__(self, layer, rank, alpha):
        super().__init__()
        self.base, self.ratio = layer, alpha / rank
        for parameter in layer.parameters():
            parameter.requires_grad = False
        self.A = nn.Parameter(torch.empty(rank, layer.in_features, device=layer.weight.device))
        nn.init.kaiming_uniform_(self.A, a=math.sqrt(5))
        self.B = nn.Parameter(torch.zeros(layer.out_features, rank, device=layer.weight.device))

    def forward(self, x):
        return F.linear(x, self.base.weight + self.ratio * (self.B @ self.A), self.base.bias)


@linear.alternative("float64 inside")
class _(_Layer):
    def forward(self, x):
        branch = x.double() @ self.A.double().T @ self.B.double().T
        return (self.base(x).double() + self.scale * branch).to(x.dtype)


# lora.inject ---------------------------------------------------------------------------------------------------------


@question("lora.inject", lab=LAB, points=15, slide=SLIDE, cases=4)
def inject(draw: Draw) -> Case:
    """Put the layer into a model, and freeze all the rest."""
    dim, hidden, r = draw.sizes(3, low=3, high=10)
    return Case(
        draw.edge("r = 1"),
        dim=dim,
        hidden=hidden,
        blocks=draw.integer(1, 3),
        targets=[["q_proj", "v_proj"], ["q_proj"], ["v_proj", "q_proj", "up"]][draw.index % 3],
        r=1 if draw.index == 1 else r,
        alpha=draw.choice([12, 16, 24, 32]),
        x=draw.normal(5, dim),
    )


inject.oracle("lecturekit.tuning.lora:add_lora")
inject.tolerance(
    ulps=lambda case: 40 * case.blocks * (case.dim + case.hidden + case.r),
    why="each block is five products of depth dim, hidden or r, and a step of training takes them forth and back; "
    "relative to the largest value, with room for growth",
)


class _Block(nn.Module):
    """A block of the model that the question builds. ``eq_proj`` only looks like a target."""

    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        self.q_proj, self.v_proj, self.eq_proj = (nn.Linear(dim, dim) for _ in range(3))
        self.mlp = nn.ModuleDict({"up": nn.Linear(dim, hidden), "down": nn.Linear(hidden, dim)})
        self.norm = nn.LayerNorm(dim)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.eq_proj(torch.tanh(self.q_proj(x)) * self.v_proj(x))
        return self.norm(x + self.mlp["down"](torch.relu(self.mlp["up"](x))))


class _Model(nn.Module):
    def __init__(self, dim: int, hidden: int, blocks: int) -> None:
        super().__init__()
        self.q_proj = nn.Linear(dim, dim)  # one target at the top, where no search can miss it
        self.blocks = nn.ModuleList(_Block(dim, hidden) for _ in range(blocks))
        self.head = nn.Linear(dim, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.q_proj(x)
        for block in self.blocks:
            x = block(x)
        return self.head(x)


@inject.driver
def _(add_lora: Any, case: Case) -> dict[str, Any]:
    """Let the candidate work on a small model, then look at what it replaced, froze and kept.

    Names and shapes are what the model says of itself. The two outputs are not: they are right only where branches of
    the right scale were added at the right places, and where a step of training moves these and nothing else.
    """
    model = _Model(case.dim, case.hidden, case.blocks).to(case.x.device)
    before = model(case.x).detach()
    plain = {name: m.weight.detach().clone() for name, m in model.named_modules() if type(m) is nn.Linear}
    result = add_lora(model, list(case.targets), case.r, case.alpha)
    if not isinstance(result, nn.Module):
        raise Unfit(f"add_lora must return the model, got {describe(result)}")
    if result is not model:
        raise Unfit("add_lora must change the model that it was given and return that one, not another")
    modules = dict(result.named_modules())
    after = result(case.x)
    if after.shape != before.shape:
        raise Unfit("the model's output has another shape after add_lora")
    trainable = {name: p for name, p in result.named_parameters() if p.requires_grad}
    kept = all(
        any(p.shape == weight.shape and torch.equal(p, weight) for p in modules[name].parameters())
        for name, weight in plain.items()
        if name in modules
    )
    parts: dict[str, Any] = {
        "replaced layers": ", ".join(sorted(name for name in plain if type(modules.get(name)) is not nn.Linear)),
        "trainable parameters": ", ".join(sorted(trainable)),
        "their shapes": ", ".join(str(tuple(trainable[name].shape)) for name in sorted(trainable)),
        "the trained weights are kept": kept,
        "the model is unchanged at the start": _close(after, before, case),
    }
    if not kept:  # whatever weights are there instead, they are not the candidate's answer
        nothing = torch.zeros_like(after)
        return parts | {"output with known factors": nothing, "output after a step of training": nothing}
    with torch.no_grad():
        for name in sorted(trainable):
            steps = torch.arange(trainable[name].numel(), device=case.x.device).view_as(trainable[name])
            trainable[name].copy_(torch.cos(steps + 1.0) / 4)
    output = result(case.x)
    parts["output with known factors"] = output.detach()
    _descend(output)
    parts["output after a step of training"] = result(case.x).detach()
    return parts


def _descend(output: Tensor) -> None:
    """One step of gradient descent on the mean square of an output, for all that it depends on and is not frozen.

    Found in the graph that autograd made: what a model says of its parameters does not count here.
    """
    leaves, seen, waiting = [], set(), [output.grad_fn]
    while waiting:
        node = waiting.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if hasattr(node, "variable"):
            leaves.append(node.variable)
        waiting += [follower for follower, _ in node.next_functions]
    if not leaves:
        return
    gradients = torch.autograd.grad(output.square().mean(), leaves)
    with torch.no_grad():
        for leaf, gradient in zip(leaves, gradients, strict=True):
            leaf -= gradient / 4


def _put_layers(model: nn.Module, wanted: Any, r: int, alpha: float, copy: bool = False) -> nn.Module:
    """Replace every nn.Linear whose name is wanted by a LoRA layer; what the misconceptions have in common."""
    for name, module in list(model.named_modules()):
        if isinstance(module, nn.Linear) and wanted(name):
            parent, _, child = name.rpartition(".")
            base = nn.Linear(module.in_features, module.out_features).to(module.weight.device) if copy else module
            setattr(model.get_submodule(parent), child, _Layer(base, r, alpha))
    return model


def _ends(targets: list[str]) -> Any:
    return lambda name: name.split(".")[-1] in targets


@inject.misconception(
    "freezes the branches as well",
    hint="In which order do you freeze and inject? What should still be trainable at the end?",
)
def _(model, targets, r, alpha):
    return _put_layers(model, _ends(targets), r, alpha).requires_grad_(False)


@inject.misconception(
    "does not freeze the layers that got no branch",
    hint="Count the trainable parameters. What else than A and B is among them?",
)
def _(model, targets, r, alpha):
    return _put_layers(model, _ends(targets), r, alpha)


@inject.misconception(
    "freezes the weights but not the biases and norms", hint="Print the names of what is still trainable."
)
def _(model, targets, r, alpha):
    for name, parameter in model.named_parameters():
        if name.endswith("weight") and "norm" not in name:
            parameter.requires_grad = False
    return _put_layers(model, _ends(targets), r, alpha)


@inject.misconception(
    "matches a part of a name, not the name", hint="Is eq_proj a q_proj? Compare what stands after the last dot."
)
def _(model, targets, r, alpha):
    model.requires_grad_(False)
    return _put_layers(model, lambda name: any(target in name for target in targets), r, alpha)


@inject.misconception(
    "looks only at the model's direct children",
    hint="Where in the module tree do the projections live? named_modules walks all of it.",
)
def _(model, targets, r, alpha):
    model.requires_grad_(False)
    return _put_layers(model, lambda name: "." not in name and name in targets, r, alpha)


@inject.misconception(
    "replaces nothing: a variable is bound to the new layer, the model is not",
    hint="Which line changes the model itself?",
)
def _(model, targets, r, alpha):
    model.requires_grad_(False)
    for name, module in list(model.named_modules()):
        if name.split(".")[-1] in targets:
            module = _Layer(module, r, alpha)
    return model


@inject.misconception(
    "puts the layers at the model, not in their parents",
    hint="A dotted name is a path. Which module, at the end of that path, holds the layer?",
)
def _(model, targets, r, alpha):
    model.requires_grad_(False)
    for name, module in list(model.named_modules()):
        if name.split(".")[-1] in targets:
            setattr(model, name, _Layer(module, r, alpha))
    return model


@inject.misconception("replaces every linear layer", hint="Which names were you given, and which did you look at?")
def _(model, targets, r, alpha):
    model.requires_grad_(False)
    return _put_layers(model, lambda name: True, r, alpha)


@inject.misconception(
    "replaces only the first of the targets", hint="targets is a list. How many of it do you compare with?"
)
def _(model, targets, r, alpha):
    model.requires_grad_(False)
    return _put_layers(model, _ends(targets[:1]), r, alpha)


@inject.misconception("swaps r and alpha", hint="Look at the shapes of A and B in your model: which size is the rank?")
def _(model, targets, r, alpha):
    model.requires_grad_(False)
    return _put_layers(model, _ends(targets), alpha, r)


@inject.misconception(
    "replaces the trained layer by a new one",
    hint="The branch stands beside the trained layer. Where did its weights go?",
)
def _(model, targets, r, alpha):
    model.requires_grad_(False)
    return _put_layers(model, _ends(targets), r, alpha, copy=True)


@inject.alternative("freeze first, then replace")
def _(model, targets, r, alpha):
    model.requires_grad_(False)
    return _put_layers(model, _ends(targets), r, alpha)


@inject.alternative("recursion over children")
def _(network, names, rank, alpha):
    def visit(module):
        for child_name, child in module.named_children():
            if isinstance(child, nn.Linear) and child_name in names:
                module._modules[child_name] = _Layer(child, rank, alpha)
            else:
                visit(child)

    for parameter in network.parameters():
        parameter.requires_grad = False
    visit(network)
    return network


@inject.alternative("replace first, then freeze all but A and B")
def _(model, targets, r, alpha):
    _put_layers(model, lambda name: any(name == t or name.endswith("." + t) for t in targets), r, alpha)
    for name, parameter in model.named_parameters():
        parameter.requires_grad = name.endswith((".A", ".B"))
    return model


# lora.count ----------------------------------------------------------------------------------------------------------


@question("lora.count", lab=LAB, points=10, slide="Adapter: storage of 1000 tasks", returns=("parameters", "bytes"))
def count(draw: Draw) -> Case:
    """How much does a fine-tune weigh?"""
    edge = draw.edge("one layer", "r = 1")
    layers = 1 if edge == "one layer" else draw.integer(2, 6)
    return Case(
        edge,
        shapes=[draw.sizes(2, low=16, high=4096) for _ in range(layers)],
        r=1 if edge == "r = 1" else draw.choice([2, 4, 8, 16]),
        bits=[16, 32, 8][draw.index % 3],  # each in turn: some mistakes show at one width only
    )


count.oracle("lecturekit.tuning.storage:storage")
count.law(
    "bytes × 8 = parameters × bits",
    lambda case, parts: parts["bytes"] * 8 == parts["parameters"] * case.bits,
)


@count.misconception(
    "counts the whole layers, not their branches",
    hint="Which numbers does a LoRA file hold? Neither of them has out × in entries.",
)
def _(shapes, r, bits):
    total = sum(out * inp for out, inp in shapes)
    return total, total * bits // 8


@count.misconception("counts only A", hint="How many matrices does a branch have?")
def _(shapes, r, bits):
    total = sum(r * inp for _, inp in shapes)
    return total, total * bits // 8


@count.misconception("takes every layer for square", hint="A is (r, in), B is (out, r). When are in and out the same?")
def _(shapes, r, bits):
    total = sum(2 * r * out for out, _ in shapes)
    return total, total * bits // 8


@count.misconception("multiplies out × in × r", hint="Write the shapes of A and B down, count each, then add.")
def _(shapes, r, bits):
    total = sum(r * out * inp for out, inp in shapes)
    return total, total * bits // 8


@count.misconception("takes bits for bytes", hint="How many bits make a byte?")
def _(shapes, r, bits):
    total = sum(r * (out + inp) for out, inp in shapes)
    return total, total * bits


@count.misconception("takes every number for two bytes", hint="How many bytes does a number of `bits` bits take?")
def _(shapes, r, bits):
    total = sum(r * (out + inp) for out, inp in shapes)
    return total, total * 2


@count.misconception("counts only B", hint="How many matrices does a branch have?")
def _(shapes, r, bits):
    total = sum(r * out for out, _ in shapes)
    return total, total * bits // 8


@count.misconception("gives bytes first, then parameters", hint="In which order are the two asked for?")
def _(shapes, r, bits):
    total = sum(r * (out + inp) for out, inp in shapes)
    return total * bits // 8, total


@count.misconception(
    "counts the layers as well as their branches", hint="Is the base layer stored with each fine-tune?"
)
def _(shapes, r, bits):
    total = sum(r * (out + inp) + out * inp for out, inp in shapes)
    return total, total * bits // 8


@count.misconception(
    "multiplies only one of the two sizes by r", hint="r × out + r × in: where do the brackets belong?"
)
def _(shapes, r, bits):
    total = sum(r * out + inp for out, inp in shapes)
    return total, total * bits // 8


@count.misconception("counts only the first layer", hint="shapes is a list. Did you add up all of it?")
def _(shapes, r, bits):
    total = r * sum(shapes[0])
    return total, total * bits // 8


@count.alternative("a loop")
def _(layer_shapes, rank, width):
    parameters = 0
    for shape in layer_shapes:
        parameters += rank * shape[0] + rank * shape[1]
    return parameters, parameters * width / 8


@count.alternative("tensors")
def _(shapes, r, bits):
    parameters = int(torch.tensor(shapes).sum() * r)
    return [parameters, parameters * (bits // 8)]


@count.alternative("real matrices")
def _(*args):
    shapes, r, bits = args
    parameters = sum(
        torch.empty(r, i, device="meta").numel() + torch.empty(o, r, device="meta").numel() for o, i in shapes
    )
    return parameters, parameters * bits // 8


# lora.train ----------------------------------------------------------------------------------------------------------


@question("lora.train", lab=LAB, points=20, slide="Supervised Fine-Tuning: next word prediction; LoRA", cases=4)
def train(draw: Draw) -> Case:
    """One training step on the response tokens."""
    vocab, dim, length, r = draw.integer(9, 14), draw.integer(5, 8), draw.integer(6, 9), draw.integer(1, 3)
    edge = draw.edge("one padded row", "a prompt of one token")
    input_ids = draw.integers(0, vocab - 1, 3, 2, length)  # (steps, batch, seq)
    labels = input_ids.clone()
    labels[:, :, : 1 if edge == "a prompt of one token" else 3] = -100
    if edge == "one padded row":
        labels[:, 0, -2:] = -100
    return Case(
        edge,
        input_ids=input_ids,
        labels=labels,
        embedding=draw.normal(vocab, dim),
        weight=draw.normal(dim, dim, scale=dim**-0.5),
        A=draw.normal(r, dim, scale=dim**-0.5),
        B=draw.normal(dim, r, scale=0.5),
        head=draw.normal(vocab, dim, scale=dim**-0.5),
        lr=draw.choice([0.1, 0.2, 0.3]),
    )


train.oracle("lecturekit.tuning.training:train_step")
train.tolerance(
    ulps=lambda case: 3 * 3 * case.embedding.numel(),
    why="three steps, each with sums over the vocabulary, the model's width and the tokens, forward and backward",
)


class _TinyLM(nn.Module):
    """Embedding → layer with a branch → head, with the output object of a Hugging Face model."""

    def __init__(self, case: Case) -> None:
        super().__init__()
        self.embedding = nn.Parameter(case.embedding.clone(), requires_grad=False)
        self.weight = nn.Parameter(case.weight.clone(), requires_grad=False)
        self.head = nn.Parameter(case.head.clone(), requires_grad=False)
        self.A, self.B = nn.Parameter(case.A.clone()), nn.Parameter(case.B.clone())

    def forward(self, input_ids: Tensor) -> SimpleNamespace:
        x = self.embedding[input_ids]  # (batch, seq, dim)
        hidden = torch.tanh(x @ self.weight.T + x @ self.A.T @ self.B.T)
        return SimpleNamespace(logits=hidden @ self.head.T)


@train.driver
def _(train_step: Any, case: Case) -> dict[str, Any]:
    """Three steps of a tiny language model under plain SGD, whose steps show every fault of the gradient."""
    model = _TinyLM(case)
    optimizer = torch.optim.SGD([model.A, model.B], lr=case.lr)
    losses = []
    for input_ids, labels in zip(case.input_ids, case.labels, strict=True):
        loss = train_step(model, optimizer, input_ids, labels)
        if isinstance(loss, Tensor):
            graph = " with its graph, which stays in memory" if loss.grad_fn is not None else ""
            raise Unfit(f"the loss came back as a tensor{graph}; return a Python number, loss.item()")
        if not isinstance(loss, (int, float)):
            raise Unfit(f"train_step must return the loss as a float, got {type(loss).__name__}")
        losses.append(loss)
    return {"losses": losses, "A after three steps": model.A.detach(), "B after three steps": model.B.detach()}


train.law(
    "losses are negative log-probabilities, so none is below zero",
    lambda case, parts: all(loss >= 0 for loss in parts["losses"]),
)


def _step(model: Any, optimizer: Any, loss: Tensor) -> float:
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    return loss.item()


def _shifted(model: Any, input_ids: Tensor, labels: Tensor, **options: Any) -> Tensor:
    logits = model(input_ids).logits
    return F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), **options)


@train.misconception(
    "does not shift: asks each position for the token it was given",
    hint="What does position t predict? Compare logits[:, t] with which label?",
)
def _(model, optimizer, input_ids, labels):
    return _step(model, optimizer, F.cross_entropy(model(input_ids).logits.flatten(0, 1), labels.flatten()))


@train.misconception("shifts the wrong way", hint="Position t sees tokens 0 … t. Is the label you gave it among them?")
def _(model, optimizer, input_ids, labels):
    logits = model(input_ids).logits
    return _step(model, optimizer, F.cross_entropy(logits[:, 1:].flatten(0, 1), labels[:, :-1].flatten()))


@train.misconception(
    "never clears the gradients", hint="backward adds to .grad. What does the second step still hold of the first?"
)
def _(model, optimizer, input_ids, labels):
    loss = _shifted(model, input_ids, labels)
    loss.backward()
    optimizer.step()
    return loss.item()


@train.misconception(
    "the step never reaches the weights",
    hint="Are the weights changed afterwards? Look at zero_grad, backward and step: is each there, in which order?",
)
def _(model, optimizer, input_ids, labels):
    loss = _shifted(model, input_ids, labels)
    loss.backward()
    optimizer.zero_grad()
    optimizer.step()
    return loss.item()


@train.misconception(
    "trains on the prompt and the padding too",
    hint="Which tokens carry the label -100, and what should they add to the loss?",
)
def _(model, optimizer, input_ids, labels):
    return _step(model, optimizer, _shifted(model, input_ids, input_ids))


@train.misconception(
    "takes the mean over all positions, ignored ones too",
    hint="Divide by how many tokens? What did an ignored one add to the sum?",
)
def _(model, optimizer, input_ids, labels):
    total = _shifted(model, input_ids, labels, reduction="sum")
    return _step(model, optimizer, total / labels[:, 1:].numel())


@train.misconception("sums the loss instead of taking its mean", hint="Should a longer answer give a larger step?")
def _(model, optimizer, input_ids, labels):
    return _step(model, optimizer, _shifted(model, input_ids, labels, reduction="sum"))


@train.misconception(
    "applies softmax before cross_entropy", hint="cross_entropy takes logits: what does it do with them first?"
)
def _(model, optimizer, input_ids, labels):
    probabilities = model(input_ids).logits.softmax(-1)
    return _step(model, optimizer, F.cross_entropy(probabilities[:, :-1].flatten(0, 1), labels[:, 1:].flatten()))


@train.misconception(
    "returns the loss as a tensor with its graph",
    hint="Keep a list of such losses for a thousand steps: what stays in memory?",
)
def _(model, optimizer, input_ids, labels):
    loss = _shifted(model, input_ids, labels)
    _step(model, optimizer, loss)
    return loss


@train.alternative("log-probabilities gathered by hand")
def _(network, opt, tokens, targets):
    opt.zero_grad()
    logprobs = network(tokens).logits[:, :-1].log_softmax(-1)
    wanted = targets[:, 1:]
    counts = wanted != -100
    picked = logprobs.gather(-1, wanted.clamp(min=0).unsqueeze(-1)).squeeze(-1)
    loss = -(picked * counts).sum() / counts.sum()
    loss.backward()
    opt.step()
    return float(loss.detach())


@train.alternative("boolean indexing, gradients cleared at the end")
def _(model, optimizer, input_ids, labels):
    logits, wanted = model(input_ids).logits[:, :-1], labels[:, 1:]
    loss = F.cross_entropy(logits[wanted != -100], wanted[wanted != -100])
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    return loss.item()


@train.alternative("float64 inside")
def _(model, optimizer, input_ids, labels):
    logits = model(input_ids).logits.double().transpose(1, 2)[:, :, :-1]
    return _step(model, optimizer, F.cross_entropy(logits, labels[:, 1:], ignore_index=-100))
