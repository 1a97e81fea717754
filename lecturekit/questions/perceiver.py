"""The question of lab 8: the Perceiver Resampler.

Alayrac et al., "Flamingo: a Visual Language Model for Few-Shot Learning", NeurIPS 2022, section 3.1 and figure 5.

What is asked for: a module ``PerceiverResampler(dim, depth, num_latents, heads, dim_head)`` whose forward takes
features x_f (batch, time, space, dim) to tokens (batch, num_latents, dim), for up to 8 frames and any number of places.
The slide leaves the inside of attention and ffw open; here they are

- attention: a LayerNorm for the features and another for the latents; q from the latents, k and v from
  concat([x_f, latents]), both normalised; heads side by side, head h in rows h · dim_head … of each projection; scores
  scaled by dim_head ** -0.5; one projection out,
- ffw: LayerNorm, a linear layer that widens 4 times, GELU, a linear layer back,
- layers of their own weights, and one last LayerNorm.

How the question finds a student's weights. It fills every parameter with known values and compares what comes out, so
it must know which is which. It goes by shape: all sizes are drawn so that they differ, and the i-th linear layer of a
shape, in the order in which they were registered, is that of layer i. So attributes, classes and nesting are free;
what is fixed is:

- every projection is an nn.Linear for all heads together, with or without a bias (a bias is set to zero),
- keys and values come from one joint layer (keys are its first half) or from two; where three layers have the shape of
  q, their names must say which is q, k and v, as in to_q, k_proj, value,
- num_latents × dim latents and at least 8 × dim time embeddings are nn.Parameters (or in an nn.Embedding), of any
  shape that ends in dim,
- all LayerNorms get the same values, so their names and order make no difference; their number must be right.

The order of features and latents in the concat cannot be seen from outside: softmax does not care.
"""

from __future__ import annotations

import re
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lecturekit.checking import Case, Draw, Unfit, question
from lecturekit.checking.compare import describe

LAB = "lab08_flamingo"
SLIDE = "Perceiver Resampler: from varying-size large feature maps to few fixed-size visual tokens"
FRAMES = 8
"""The most frames that a resampler must have a time embedding for, as in Flamingo's training."""


# perceiver.resampler -------------------------------------------------------------------------------------------------


@question("perceiver.resampler", lab=LAB, points=40, slide=SLIDE, kind="class", cases=5)
def resampler(draw: Draw) -> Case:
    """Write the module that turns any number of visual features into a few visual tokens."""
    edge = draw.edge("one latent", "one feature", "one layer of one head", "27 features and 5 latents, as on the slide")
    frames, places, batch = draw.sizes(3, low=2, high=5)
    latents = draw.integer(2, 6)
    depth, heads = draw.integer(2, 3), draw.integer(2, 3)
    if edge == "one latent":
        latents = 1
    elif edge == "one feature":
        frames, places = 1, 1
    elif edge == "one layer of one head":
        depth, heads = 1, 1
    elif edge is not None:
        frames, places, latents = 3, 9, 5
    dim, dim_head = _widths(draw, heads)
    inner = heads * dim_head
    return Case(
        edge,
        dim=dim,
        depth=depth,
        num_latents=latents,
        heads=heads,
        dim_head=dim_head,
        x_f=draw.normal(batch, frames, places, dim),
        longer=draw.normal(1, frames + 2, places + 1, dim),
        upstream=draw.normal(batch, latents, dim),
        weights={
            "latents": draw.normal(latents, dim),
            "time": draw.normal(FRAMES, dim),
            "gamma": draw.uniform(dim, low=0.5, high=1.5),
            "beta": draw.normal(dim, scale=0.3),
            "q": draw.normal(depth, inner, dim, scale=dim**-0.5),
            "k": draw.normal(depth, inner, dim, scale=dim**-0.5),
            "v": draw.normal(depth, inner, dim, scale=dim**-0.5),
            "out": draw.normal(depth, dim, inner, scale=inner**-0.5),
            "up": draw.normal(depth, 4 * dim, dim, scale=dim**-0.5),
            "down": draw.normal(depth, dim, 4 * dim, scale=(4 * dim) ** -0.5),
        },
    )


def _widths(draw: Draw, heads: int) -> tuple[int, int]:
    """dim and dim_head, such that no two projections of different use have one shape.

    dim is 8 at least: a LayerNorm over fewer values now and then meets nearly equal ones, and magnifies roundings.
    """
    while True:
        dim, dim_head = draw.integer(8, 14), draw.integer(4, 7)
        inner = heads * dim_head
        if dim != inner and 4 * dim not in (inner, 2 * inner, 3 * inner):
            return dim, dim_head


resampler.oracle("lecturekit.multimodal.perceiver:PerceiverResampler")


def _uses_tf32(case: Case) -> bool:
    return case.x_f.is_cuda and torch.backends.cuda.matmul.allow_tf32


def _roundings(case: Case) -> float:
    """How many roundings lie on the longest way through the module, each layer's errors passed on by the next.

    float32: as many as the sums have terms. TF32 rounds only the two inputs of each matrix product, and adds in
    float32: six products a layer.
    """
    if _uses_tf32(case):
        return case.depth * 12
    inner = case.heads * case.dim_head
    keys = (case.x_f.shape[1] + 2) * (case.x_f.shape[2] + 1) + case.num_latents
    layer = 3 * case.dim + case.dim_head + keys + inner + case.dim + 4 * case.dim
    return case.depth * layer + case.dim


resampler.tolerance(
    ulps=_roundings,
    why="the sums of each layer one after another: norms over dim, products of depth dim, dim_head, keys, inner and "
    "4 dim; relative to the largest value",
)
resampler.tolerance(
    ulps=lambda case: 3 * _roundings(case),
    part="gradient of the latents",
    why="the way forward once, and the way back, where each product has two of them",
)


@resampler.driver
def _(resampler_class: Any, case: Case) -> dict[str, Any]:
    """Build the module, look at its start, give it known weights, then use it on clips of two sizes."""
    model = resampler_class(case.dim, case.depth, case.num_latents, case.heads, case.dim_head)
    if not isinstance(model, nn.Module):
        raise Unfit("PerceiverResampler must be a subclass of nn.Module, so that its parameters are found")
    model = model.to(case.x_f.device).eval()
    latents, norms = _fill_vectors(model, case)
    start = latents.detach().reshape(case.num_latents, case.dim).clone()
    with torch.no_grad():
        latents.copy_(case.weights["latents"].view(latents.shape))
    _fill_projections(model, case)
    tokens = _tokens(model, case.x_f, case)
    longer = _tokens(model, case.longer, case)
    if not tokens.requires_grad:
        raise Unfit("the tokens have no gradient; use the parameters themselves, not .data or .detach()")
    tokens.backward(case.upstream.to(tokens.dtype))
    if latents.grad is None:
        raise Unfit("the latents get no gradient; use the parameter itself, not .data or .detach()")
    with torch.no_grad():
        alone = _tokens(model, case.x_f[:1].flip(2), case)
    return {
        "tokens": tokens,
        "tokens of a longer clip": longer,
        "gradient of the latents": latents.grad.reshape(case.num_latents, case.dim),
        "the latents start different": case.num_latents == 1 or bool((start != start[0]).any()),
        "number of LayerNorms in use": sum(norm.grad is not None for norm in norms),
        "tokens of the first clip alone, places mirrored": alone,
    }


def _tokens(model: nn.Module, x_f: Tensor, case: Case) -> Tensor:
    tokens = model(x_f)
    if not isinstance(tokens, Tensor):
        raise Unfit(f"forward must return the tokens as one tensor, got {describe(tokens)}")
    wanted = (len(x_f), case.num_latents, case.dim)
    if tokens.shape != wanted:
        raise Unfit(
            f"forward must return (batch, num_latents, dim), which for x_f {tuple(x_f.shape)} is {wanted}, "
            f"got {tuple(tokens.shape)}"
        )
    return tokens


def _fill_vectors(model: nn.Module, case: Case) -> tuple[nn.Parameter, list[nn.Parameter]]:
    """Give time embeddings and norms their known values. Returns the latents and the norms' scales."""
    in_linears = {id(p) for module in model.modules() if isinstance(module, nn.Linear) for p in module.parameters()}
    latents, time, scales = [], [], []
    for name, parameter in model.named_parameters():
        if id(parameter) in in_linears:
            continue
        rows = parameter.numel() // case.dim if parameter.shape[-1:] == (case.dim,) else 0
        is_vector = parameter.dim() == 1 and rows == 1
        if is_vector and re.search(r"(weight|gamma|scale|gain|\bg|\ba_2)$", name):
            scales.append(parameter)
            _copy(case.weights["gamma"], parameter)
        elif is_vector and re.search(r"(bias|beta|shift|\bb|\bb_2)$", name):
            _copy(case.weights["beta"], parameter)
        elif rows == case.num_latents:  # always fewer than FRAMES
            latents.append(parameter)
        elif rows >= FRAMES:
            time.append(parameter)
            known = parameter.detach().reshape(rows, case.dim).clone()
            known[:FRAMES] = case.weights["time"]
            _copy(known, parameter)
        else:
            raise Unfit(
                f"the parameter {name} {tuple(parameter.shape)} fits none of those asked for: latents "
                f"{(case.num_latents, case.dim)}, time embeddings {(FRAMES, 1, case.dim)}, LayerNorms {(case.dim,)}, "
                "projections as nn.Linear"
            )
    for what, found, shape in (("latents", latents, case.num_latents), ("time embeddings", time, f"{FRAMES}, 1")):
        if len(found) != 1:
            raise Unfit(
                f"expected one nn.Parameter ({shape}, {case.dim}) for the {what}, found {len(found)}; "
                "an optimizer finds nothing else"
            )
    return latents[0], scales


def _fill_projections(model: nn.Module, case: Case) -> None:
    """Give the i-th linear layer of each use the known weights of layer i, and a bias of zero."""
    known = dict(case.weights)
    known["kv"] = torch.cat([known["k"], known["v"]], dim=1)
    known["qkv"] = torch.cat([known["q"], known["k"], known["v"]], dim=1)
    sizes = _sizes(case)
    found: dict[str, list[nn.Linear]] = {use: [] for use in sizes}
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear):
            found[_use(name, module, case)].append(module)
    for uses in (("q", "qkv"), ("k", "kv", "qkv"), ("v", "kv", "qkv"), ("out",), ("up",), ("down",)):
        if not any(found[use] for use in uses):
            needed = " or ".join(f"{use} = nn.Linear{sizes[use]}" for use in uses)
            raise Unfit(
                f"found no {needed} among the modules; is each an nn.Linear, in an nn.ModuleList and no other list?"
            )
    for use, modules in found.items():
        if len(modules) > case.depth:
            raise Unfit(f"found {len(modules)} times {use} = nn.Linear{sizes[use]}, but depth is {case.depth}")
        for weight, module in zip(known[use], modules, strict=False):
            _copy(weight, module.weight)
            if module.bias is not None:
                _copy(torch.zeros_like(module.bias), module.bias)


def _sizes(case: Case) -> dict[str, tuple[int, int]]:
    """In and out of each linear layer, by what it is used for."""
    dim, inner = case.dim, case.heads * case.dim_head
    single = dict.fromkeys(("q", "k", "v"), (dim, inner))
    joint = {"kv": (dim, 2 * inner), "qkv": (dim, 3 * inner)}
    return single | joint | {"out": (inner, dim), "up": (dim, 4 * dim), "down": (4 * dim, dim)}


def _use(name: str, module: nn.Linear, case: Case) -> str:
    """What a linear layer is for: by its size, and among q, k and v by its name."""
    size = (module.in_features, module.out_features)
    uses = [use for use, wanted in _sizes(case).items() if wanted == size]
    if not uses:
        wanted = ", ".join(f"{use} {wanted}" for use, wanted in _sizes(case).items())
        raise Unfit(f"{name} is nn.Linear{size}, which fits none of those asked for: {wanted}")
    if len(uses) == 1:
        return uses[0]
    words = re.findall(r"[a-z]+", next(part for part in reversed(name.lower().split(".")) if not part.isdigit()))
    for word in words:
        stem = re.sub(r"^(to|w)|(projection|proj|linear)$", "", word)
        if stem in ("q", "query", "queries", "k", "key", "keys", "v", "value", "values"):
            return stem[0]
    raise Unfit(
        f"{name} is nn.Linear{size}: is it q, k or v? Name such layers to_q, to_k, to_v, or join k and v in to_kv"
    )


def _copy(value: Tensor, parameter: nn.Parameter) -> None:
    with torch.no_grad():
        parameter.copy_(value.view(parameter.shape))


# What every right answer obeys


def _near(a: Tensor, b: Tensor, case: Case) -> bool:
    """Equal up to what the tolerance allows."""
    eps = 2.0**-10 if _uses_tf32(case) else torch.finfo(torch.float32).eps
    return bool((a - b).abs().max() <= _roundings(case) * eps * b.abs().max())


def _last_norm(case: Case, parts: dict[str, Any]) -> bool:
    """Undo the last LayerNorm's scale and shift: mean 0, variance 1 (a little less, for LayerNorm adds 1e-5 to it)."""
    rows = (parts["tokens"].detach().double() - case.weights["beta"]) / case.weights["gamma"]
    variance = rows.var(dim=-1, correction=0)
    # float32 rounds each row's mean and each value: dim roundings of values of at most sqrt(dim), over a gamma of 0.5.
    rounding = 4 * case.dim**1.5 * torch.finfo(torch.float32).eps
    return bool((rows.mean(dim=-1).abs() <= rounding).all() and ((variance > 0.99) & (variance < 1 + rounding)).all())


resampler.law("each token leaves one last LayerNorm with mean 0 and variance 1, before its scale and shift", _last_norm)
resampler.law(
    "a clip gives the same tokens alone as in a batch, whatever the order of the places within a frame",
    lambda case, parts: _near(parts["tokens of the first clip alone, places mirrored"], parts["tokens"][:1], case),
)


# A right module, from which each misconception departs in one place


def _ffw(dim: int) -> nn.Sequential:
    return nn.Sequential(
        nn.LayerNorm(dim), nn.Linear(dim, 4 * dim, bias=False), nn.GELU(), nn.Linear(4 * dim, dim, bias=False)
    )


class _Attention(nn.Module):
    axis = -1

    def __init__(self, dim, heads, dim_head):
        super().__init__()
        self.heads, self.dim_head = heads, dim_head
        self.scale = dim_head**-0.5
        self.norm_media, self.norm_latents = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.to_q = nn.Linear(dim, heads * dim_head, bias=False)
        self.to_kv = nn.Linear(dim, 2 * heads * dim_head, bias=False)
        self.to_out = nn.Linear(heads * dim_head, dim, bias=False)

    def forward(self, features, latents):
        features, latents = self.norm_media(features), self.norm_latents(latents)
        return self.attend(latents, torch.cat([features, latents], dim=1))

    def attend(self, asking, answering):
        k, v = self.to_kv(answering).chunk(2, dim=-1)
        q, k, v = self.split(self.to_q(asking)), self.split(k), self.split(v)
        weights = (q @ k.transpose(-1, -2) * self.scale).softmax(dim=self.axis)
        return self.to_out((weights @ v).transpose(1, 2).flatten(2))

    def split(self, x):
        return x.unflatten(-1, (self.heads, self.dim_head)).transpose(1, 2)  # (batch, heads, n, dim_head)


class _Resampler(nn.Module):
    attention = _Attention

    def __init__(self, dim, depth, num_latents, heads, dim_head):
        super().__init__()
        self.latents = nn.Parameter(torch.randn(num_latents, dim))
        self.time_embeddings = nn.Parameter(torch.randn(FRAMES, 1, dim))
        self.layers = nn.ModuleList(
            nn.ModuleList([self.attention(dim, heads, dim_head), _ffw(dim)]) for _ in range(depth)
        )
        self.norm = nn.LayerNorm(dim)

    def with_time(self, x_f):
        return x_f + self.time_embeddings[: x_f.shape[1]]

    def forward(self, x_f):
        x_f = self.with_time(x_f).flatten(1, 2)
        return self.norm(self.run(x_f, self.latents.expand(len(x_f), -1, -1)))

    def run(self, x_f, x):
        for attention, ffw in self.layers:
            x = x + attention(x_f, x)
            x = x + ffw(x)
        return x


def _with(attention: type[nn.Module]) -> type[nn.Module]:
    """The right resampler with another attention."""
    return type("Resampler", (_Resampler,), {"attention": attention})


@resampler.misconception(
    "takes keys and values from the features only",
    hint="The slide's attention map is 5 × 32 with 27 features. Where do the other 5 keys come from?",
)
@_with
class _(_Attention):
    def forward(self, features, latents):
        return self.attend(self.norm_latents(latents), self.norm_media(features))


@resampler.misconception(
    "takes keys and values from the latents only",
    hint="Which tensor do the visual features go into, if not into q?",
)
@_with
class _(_Attention):
    def forward(self, features, latents):
        latents = self.norm_latents(latents)
        return self.attend(latents, latents + 0 * self.norm_media(features).sum())


@resampler.misconception(
    "lets the features ask and the latents answer",
    hint="As many tokens come out as there are queries. How many should come out?",
)
class _(_Resampler):
    def run(self, x_f, x):
        for attention, ffw in self.layers:
            x_f = x_f + attention(x, x_f)
            x_f = x_f + ffw(x_f)
        return x_f


@resampler.misconception(
    "never adds the time embeddings",
    hint="Play the clip backwards: do your tokens change? Which line of the slide would make them?",
)
class _(_Resampler):
    def with_time(self, x_f):
        return x_f


@resampler.misconception(
    "has no time embeddings",
    hint="Which argument of the slide's function, of shape [T, 1, d], have you not made?",
)
class _(_Resampler):
    def __init__(self, *args):
        super().__init__(*args)
        self.time_embeddings = None

    def with_time(self, x_f):
        return x_f


@resampler.misconception(
    "adds the embeddings along space, not along time",
    hint="The slide's embeddings are [T, 1, d] and its features [T, S, d]. Where does the 1 stand?",
)
class _(_Resampler):
    def with_time(self, x_f):
        return x_f + self.time_embeddings.transpose(0, 1)[:, torch.arange(x_f.shape[2]) % FRAMES]


@resampler.misconception(
    "forgets the residual around the attention",
    hint="What is left of the latents after a layer whose attention gives zero?",
)
class _(_Resampler):
    def run(self, x_f, x):
        for attention, ffw in self.layers:
            x = attention(x_f, x)
            x = x + ffw(x)
        return x


@resampler.misconception(
    "forgets the residual around the feed-forward part",
    hint="What is left of x after a layer whose ffw gives zero?",
)
class _(_Resampler):
    def run(self, x_f, x):
        for attention, ffw in self.layers:
            x = x + attention(x_f, x)
            x = ffw(x)
        return x


@resampler.misconception(
    "does not scale the scores",
    hint="What happens to a dot product of random vectors as they get longer, and to its softmax?",
)
@_with
class _(_Attention):
    def __init__(self, dim, heads, dim_head):
        super().__init__(dim, heads, dim_head)
        self.scale = 1.0


@resampler.misconception(
    "scales by the width of the module, not of a head",
    hint="How many products are added up in one score: dim, heads × dim_head, or fewer?",
)
@_with
class _(_Attention):
    def __init__(self, dim, heads, dim_head):
        super().__init__(dim, heads, dim_head)
        self.scale = dim**-0.5


@resampler.misconception(
    "scales by the width of all heads together",
    hint="How many products are added up in one score of one head?",
)
@_with
class _(_Attention):
    def __init__(self, dim, heads, dim_head):
        super().__init__(dim, heads, dim_head)
        self.scale = (heads * dim_head) ** -0.5


@resampler.misconception(
    "takes the softmax over the queries",
    hint="Add up one row of the attention map: one query spreads a weight of 1 over what?",
)
@_with
class _(_Attention):
    axis = -2


@resampler.misconception(
    "splits the heads without moving their axis",
    hint="After view, which numbers of one token does a head hold? Which axis must come before that of the tokens?",
)
@_with
class _(_Attention):
    def split(self, x):
        return x.reshape(len(x), self.heads, -1, self.dim_head)


@resampler.misconception(
    "takes the values for the keys",
    hint="One joint layer gives both. Which half does the text name first?",
)
@_with
class _(_Attention):
    def attend(self, asking, answering):
        v, k = self.to_kv(answering).chunk(2, dim=-1)
        q, k, v = self.split(self.to_q(asking)), self.split(k), self.split(v)
        weights = (q @ k.transpose(-1, -2) * self.scale).softmax(dim=-1)
        return self.to_out((weights @ v).transpose(1, 2).flatten(2))


@resampler.misconception(
    "does not normalise the latents before the attention",
    hint="There is a LayerNorm for the features. What else goes into q, k and v?",
)
@_with
class _(_Attention):
    def forward(self, features, latents):
        return self.attend(latents, torch.cat([self.norm_media(features), latents], dim=1))


@resampler.misconception(
    "does not normalise the features",
    hint="There is a LayerNorm for the latents. What else goes into k and v?",
)
@_with
class _(_Attention):
    def forward(self, features, latents):
        latents = self.norm_latents(latents)
        return self.attend(latents, torch.cat([features, latents], dim=1))


@resampler.misconception(
    "normalises features and latents with one LayerNorm",
    hint="Features come from a picture, latents are learned. Need they have the same scale and shift?",
)
@_with
class _(_Attention):
    def forward(self, features, latents):
        features, latents = self.norm_media(features), self.norm_media(latents)
        return self.attend(latents, torch.cat([features, latents], dim=1))


@resampler.misconception(
    "does not normalise before the feed-forward part",
    hint="x grows with each layer that adds to it. What keeps the input of ffw in bounds?",
)
class _(_Resampler):
    def run(self, x_f, x):
        for attention, ffw in self.layers:
            x = x + attention(x_f, x)
            x = x + ffw[1:](x)
        return x


@resampler.misconception("uses ReLU in place of GELU", hint="Which activation stands between the two layers of ffw?")
class _(_Resampler):
    def run(self, x_f, x):
        for attention, ffw in self.layers:
            x = x + attention(x_f, x)
            x = x + ffw[3](F.relu(ffw[1](ffw[0](x))))
        return x


@resampler.misconception(
    "keeps the layers in a plain Python list",
    hint="Print model.named_parameters(): are your layers there? What does nn.Module register, and what not?",
)
class _(_Resampler):
    def __init__(self, *args):
        super().__init__(*args)
        layers = list(self.layers)
        del self.layers
        self.layers = layers


@resampler.misconception(
    "starts every layer from the first latents",
    hint="What does layer 2 get from layer 1? On the slide x stands on both sides.",
)
class _(_Resampler):
    def run(self, x_f, first):
        for attention, ffw in self.layers:
            x = first + attention(x_f, first)
            x = x + ffw(x)
        return x


@resampler.misconception(
    "shows every layer the first latents as keys and values",
    hint="In which line of the loop is the concat, and which x goes into it?",
)
class _(_Resampler):
    def run(self, x_f, first):
        x = first
        for attention, ffw in self.layers:
            features, latents = attention.norm_media(x_f), attention.norm_latents(first)
            x = x + attention.attend(attention.norm_latents(x), torch.cat([features, latents], dim=1))
            x = x + ffw(x)
        return x


@resampler.misconception(
    "uses one layer's weights for all layers",
    hint="The slide writes attention_i and ffw_i. Does [layer] * depth make new layers?",
)
class _(_Resampler):
    def __init__(self, dim, depth, num_latents, heads, dim_head):
        super().__init__(dim, depth, num_latents, heads, dim_head)
        self.layers = nn.ModuleList([self.layers[0]] * depth)


@resampler.misconception(
    "forgets the last LayerNorm",
    hint="What do both public versions do to x after the loop?",
)
class _(_Resampler):
    def forward(self, x_f):
        x_f = self.with_time(x_f).flatten(1, 2)
        return self.run(x_f, self.latents.expand(len(x_f), -1, -1))


@resampler.misconception(
    "starts the latents at zero",
    hint="Latents that start equal ask the same, so they get the same gradient. How will they ever differ?",
)
class _(_Resampler):
    def __init__(self, *args):
        super().__init__(*args)
        nn.init.zeros_(self.latents)


@resampler.misconception(
    "keeps the latents out of the parameters",
    hint="Is there a latents among the names in model.named_parameters()?",
)
class _(_Resampler):
    def __init__(self, *args):
        super().__init__(*args)
        latents = self.latents.detach()
        del self.latents
        self.register_buffer("latents", latents)


@resampler.alternative("keys and values apart, latents before the features, einsum")
class _(nn.Module):
    class Attend(nn.Module):
        def __init__(self, dim, heads, width):
            super().__init__()
            self.heads = heads
            self.norms = nn.ModuleDict({"seen": nn.LayerNorm(dim), "asking": nn.LayerNorm(dim)})
            self.q_proj, self.k_proj, self.v_proj = (nn.Linear(dim, heads * width, bias=False) for _ in range(3))
            self.o_proj = nn.Linear(heads * width, dim, bias=False)

        def forward(self, x, seen):
            x = self.norms["asking"](x)
            both = torch.cat([x, self.norms["seen"](seen)], dim=1)
            q, k, v = (
                layer(of).view(*of.shape[:2], self.heads, -1)
                for layer, of in ((self.q_proj, x), (self.k_proj, both), (self.v_proj, both))
            )
            scores = torch.einsum("brhd,bnhd->bhrn", q, k) / q.shape[-1] ** 0.5
            return self.o_proj(torch.einsum("bhrn,bnhd->brhd", torch.softmax(scores, dim=3), v).flatten(2))

    def __init__(self, width, layers, queries, heads, head_width):
        super().__init__()
        self.attentions = nn.ModuleList(self.Attend(width, heads, head_width) for _ in range(layers))
        self.feed_forwards = nn.ModuleList(_ffw(width) for _ in range(layers))
        self.queries = nn.Embedding(queries, width)
        self.frame_embs = nn.Embedding(16, width)
        self.last = nn.LayerNorm(width)

    def forward(self, features):
        batch, time, space, width = features.shape
        frames = self.frame_embs(torch.arange(time, device=features.device))
        features = (features + frames.view(1, time, 1, width)).reshape(batch, time * space, width)
        x = self.queries.weight.repeat(batch, 1, 1)
        for attend, feed in zip(self.attentions, self.feed_forwards, strict=True):
            x = attend(x, features) + x
            x = feed(x) + x
        return self.last(x)


@resampler.alternative("one joint projection, scaled_dot_product_attention, biases")
class _(nn.Module):
    def __init__(self, dim, depth, num_latents, heads, dim_head):
        super().__init__()
        inner = heads * dim_head
        self.heads = heads
        self.latents = nn.Parameter(0.02 * torch.randn(1, num_latents, dim))
        self.pos = nn.Parameter(torch.zeros(1, 8, 1, dim))
        self.blocks = nn.ModuleList(
            nn.ModuleDict(
                {
                    "norm1": nn.LayerNorm(dim),
                    "norm2": nn.LayerNorm(dim),
                    "norm3": nn.LayerNorm(dim),
                    "qkv": nn.Linear(dim, 3 * inner),
                    "proj": nn.Linear(inner, dim),
                    "fc1": nn.Linear(dim, 4 * dim),
                    "fc2": nn.Linear(4 * dim, dim),
                }
            )
            for _ in range(depth)
        )
        self.norm = nn.LayerNorm(dim)

    def forward(self, x_f):
        batch, count = len(x_f), self.latents.shape[1]
        x_f = (x_f + self.pos[:, : x_f.shape[1]]).flatten(1, 2)
        x = self.latents.repeat(batch, 1, 1)
        for block in self.blocks:
            joined = torch.cat((block["norm1"](x_f), block["norm2"](x)), 1)
            parts = block["qkv"](joined).view(batch, joined.shape[1], 3, self.heads, -1).permute(2, 0, 3, 1, 4)
            q, k, v = parts
            mixed = F.scaled_dot_product_attention(q[:, :, -count:], k, v)
            x = x + block["proj"](mixed.permute(0, 2, 1, 3).reshape(batch, count, -1))
            x = x + block["fc2"](F.gelu(block["fc1"](block["norm3"](x))))
        return self.norm(x)


@resampler.alternative("loops over clips and heads, float64 inside")
class _(_Resampler):
    def forward(self, x_f):
        def linear(x, weight):
            return x @ weight.double().T

        def norm(x, layer):
            centred = x - x.mean(-1, keepdim=True)
            variance = centred.square().mean(-1, keepdim=True)
            return centred / (variance + layer.eps).sqrt() * layer.weight.double() + layer.bias.double()

        results = []
        for clip in x_f.double():
            frames = [frame + self.time_embeddings[t].double() for t, frame in enumerate(clip)]
            features, x = torch.cat(frames), self.latents.double()
            for attention, ffw in self.layers:
                latents = norm(x, attention.norm_latents)
                context = torch.cat([norm(features, attention.norm_media), latents])
                q, kv = linear(latents, attention.to_q.weight), linear(context, attention.to_kv.weight)
                heads = []
                for h in range(attention.heads):
                    part = slice(h * attention.dim_head, (h + 1) * attention.dim_head)
                    scores = q[:, part] @ kv[:, : q.shape[1]][:, part].T / attention.dim_head**0.5
                    heads.append(scores.softmax(-1) @ kv[:, q.shape[1] :][:, part])
                x = x + linear(torch.cat(heads, dim=1), attention.to_out.weight)
                x = x + linear(F.gelu(linear(norm(x, ffw[0]), ffw[1].weight)), ffw[3].weight)
            results.append(norm(x, self.norm))
        return torch.stack(results).to(x_f.dtype)
