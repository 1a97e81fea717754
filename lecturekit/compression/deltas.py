"""BitDelta on whole models: compress a fine-tune, distil its scales, serve many fine-tunes from one base.

Liu et al., "BitDelta: Your Fine-Tune May Only Be Worth One Bit", NeurIPS 2024; slides "Bit-Delta". One bit a weight
goes to the linear layers inside the decoder's blocks; embeddings, head, norms and biases stay as they are, and are kept
whole where fine-tuning changed them.
"""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from lecturekit.arguments import require_integers, require_number, require_positive_int, require_tensor
from lecturekit.compression import bitdelta, kernels
from lecturekit.runtime import progress

SKIP = ("lm_head",)  # linear layers that stay whole: the head is no layer of the decoder's blocks


@dataclass(frozen=True)
class ModelDelta:
    """What is kept of one fine-tune.

    linears: name of a linear layer -> (packed, scale): uint8 (ceil(out * in / 8),) as bitdelta.pack makes it, and
    float32 (). rest: name of another parameter -> its fine-tuned value, for those that fine-tuning changed.
    """

    linears: dict[str, tuple[Tensor, Tensor]]
    rest: dict[str, Tensor]

    @property
    def scales(self) -> Tensor:
        """The scales of all layers, float32 (layers,), in the order of `linears`."""
        return torch.stack([scale for _, scale in self.linears.values()])

    def with_scales(self, scales: Tensor) -> ModelDelta:
        """The same signs and the same rest with other scales, (layers,), in the order of `linears`."""
        require_tensor("scales", scales, ndim=1, finite=True)
        if len(scales) != len(self.linears):
            raise ValueError(f"scales must hold one for each of {len(self.linears)} layers, got {len(scales)}")
        own = scales.detach().float().clone()
        pairs = zip(self.linears.items(), own, strict=True)
        return replace(self, linears={name: (packed, scale) for (name, (packed, _)), scale in pairs})

    def held_bytes(self) -> int:
        """Bytes of all its tensors, in the dtypes they are held in."""
        pairs = [tensor for pair in self.linears.values() for tensor in pair]
        return sum(tensor.nbytes for tensor in [*pairs, *self.rest.values()])


def linear_layers(model: nn.Module, skip: Sequence[str] = SKIP) -> dict[str, nn.Linear]:
    """The linear layers that are compressed, by name: every nn.Linear but those whose last name is in skip.

    Raises TypeError when model is no nn.Module, ValueError when it has no such layer.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be an nn.Module, got {type(model).__name__}")
    found = {
        name: module
        for name, module in model.named_modules()
        if type(module) is nn.Linear and name.rpartition(".")[2] not in skip
    }
    if not found:
        raise ValueError(f"model must hold nn.Linear layers other than {', '.join(skip)}, got none")
    return found


def compress_model(base: nn.Module, fine: nn.Module, skip: Sequence[str] = SKIP) -> ModelDelta:
    """Compress a fine-tune of base: one bit a weight and one scale for each linear layer, the rest where it changed.

    base, fine: two models of one structure. Neither is changed. The rest is kept in its own dtype.
    Raises TypeError or ValueError, naming the parameter, when they do not match or hold NaN or infinity.
    """
    linears = linear_layers(base, skip)
    pairs = _parameter_pairs(base, fine)
    compressed, rest = {}, {}
    for name in linears:
        old, new = pairs.pop(f"{name}.weight")
        signs, scale = bitdelta.compress(old, new)
        compressed[name] = (bitdelta.pack(signs), scale)
    for name, (old, new) in pairs.items():
        if not torch.equal(old, new):
            require_tensor(f"fine's {name}", new, finite=True)
            rest[name] = new.detach().clone()
    return ModelDelta(compressed, rest)


@torch.no_grad()
def apply_model(base: nn.Module, delta: ModelDelta) -> nn.Module:
    """The fine-tune rebuilt from base and its delta, as a model of its own: W + scale * signs. base stays as it is.

    Raises ValueError naming the layer or parameter of delta that base does not have in this shape.
    """
    _require_fit(base, delta)
    model = copy.deepcopy(base)
    for name, (packed, scale) in delta.linears.items():
        weight = model.get_parameter(f"{name}.weight")
        weight.copy_(bitdelta.apply(weight, bitdelta.unpack(packed, weight.shape), scale))
    for name, value in delta.rest.items():
        model.get_parameter(name).copy_(value)
    return model


@torch.no_grad()
def replace_deltas(
    base: nn.Module, fine: nn.Module, approximate: Callable[[Tensor], Tensor], skip: Sequence[str] = SKIP
) -> nn.Module:
    """A copy of fine whose linear layers are W_base + approximate(W_fine - W_base): to compare compressions.

    approximate: (out, in), float32 or wider -> the same shape; for two bits, say,
    ``lambda delta: torch.einsum("boi,b->oi", *(part.float() for part in bitdelta.more_bits(delta, 2)))``.
    Raises TypeError or ValueError when the models do not match or approximate gives another shape.
    """
    pairs = _parameter_pairs(base, fine)
    model = copy.deepcopy(fine)
    for name in progress(linear_layers(base, skip), "approximating"):
        old, new = (weight.to(torch.promote_types(weight.dtype, torch.float32)) for weight in pairs[f"{name}.weight"])
        change = approximate(new - old)
        if change.shape != old.shape:
            raise ValueError(f"approximate must return the shape {tuple(old.shape)} that it got for {name}")
        model.get_parameter(f"{name}.weight").copy_(old + change)
    return model


class DeltaLinear(nn.Module):
    """A frozen linear layer and its one-bit delta: y = (W + scale * signs) x + bias. Only the scale gets a gradient.

    linear: the base's layer, used where it is. packed: uint8 (ceil(out * in / 8),). scale: float32 (), copied.
    x: (..., in) -> (..., out). No sign is unpacked for longer than the product takes, forward or backward, and no
    gradient of W's size outlives its sum, so a model of these takes the memory of its base and one bit a weight.
    """

    packed: Tensor

    def __init__(self, linear: nn.Linear, packed: Tensor, scale: Tensor) -> None:
        super().__init__()
        bitdelta.unpack(packed, linear.weight.shape)  # raises where they do not belong together
        self.linear = linear
        self.register_buffer("packed", packed)
        self.scale = nn.Parameter(scale.detach().float().clone())

    def forward(self, x: Tensor) -> Tensor:
        y = _DeltaProduct.apply(x, self.linear.weight, self.packed, self.scale)
        return y if self.linear.bias is None else y + self.linear.bias


class _DeltaProduct(torch.autograd.Function):
    """x (W + scale * signs)ᵀ with gradients for x and scale: d scale = Σ signs · (gradientᵀ x)."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, packed: Tensor, scale: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight, packed, scale)
        return F.linear(x, _rebuilt(weight, _signs(weight, packed), scale))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, packed, scale = ctx.saved_tensors
        signs = _signs(weight, packed)
        of_x = of_scale = None
        if ctx.needs_input_grad[3]:
            outer = gradient.reshape(-1, gradient.shape[-1]).T @ x.reshape(-1, x.shape[-1])  # (out, in)
            of_scale = torch.dot(outer.flatten().to(scale.dtype), signs.flatten().to(scale.dtype))
        if ctx.needs_input_grad[0]:
            of_x = gradient @ _rebuilt(weight, signs, scale)
        return of_x, None, None, of_scale


def _signs(weight: Tensor, packed: Tensor) -> Tensor:
    return bitdelta.unpack(packed, weight.shape).to(torch.promote_types(weight.dtype, torch.float32))


def _rebuilt(weight: Tensor, signs: Tensor, scale: Tensor) -> Tensor:
    return torch.add(weight.to(signs.dtype), scale * signs).to(weight.dtype)


def distill_scales(
    base: nn.Module,
    fine: nn.Module,
    delta: ModelDelta,
    batches: Sequence[tuple[Tensor, Tensor]],
    lr: float = 5e-5,
    steps: int | None = None,
    loss: Callable[[Tensor, Tensor, Tensor], Tensor] = bitdelta.distill_loss,
) -> tuple[ModelDelta, list[float]]:
    """Train the scales, and nothing else, to bring the compressed model's logits to those of the fine-tune.

    base, fine: models called as model(input_ids=…, attention_mask=…).logits; base computes with delta meanwhile and is
    as it was afterwards, so there are two models in memory and never a third. batches: pairs (input_ids, mask), both
    (batch, seq), mask bool, True for real tokens; one for each step, from the start again when they run out. steps: as
    many as batches by default. loss: as bitdelta.distill_loss. Adam with a learning rate lr, no weight decay.
    Returns the delta with its new scales, and the loss before each step.
    Slide "we further optimize the scales by performing model distillation": 800 samples of length 128.
    Raises TypeError or ValueError naming lr, steps, batches or the part of delta that does not fit base.
    """
    if require_number("lr", lr) <= 0:
        raise ValueError(f"lr must be above 0, got {lr}")
    if not batches:
        raise ValueError("batches must hold at least one pair (input_ids, mask), got none")
    steps = len(batches) if steps is None else require_positive_int("steps", steps)
    with attached(base, delta) as layers:
        scales = [layer.scale for layer in layers.values()]
        optimizer = torch.optim.Adam(scales, lr=lr)
        losses = []
        for ids, mask in progress(itertools.islice(itertools.cycle(batches), steps), "distilling", steps):
            require_tensor("mask", mask, ndim=2, dtype=torch.bool)
            with torch.no_grad():
                target = fine(input_ids=ids, attention_mask=mask.long()).logits
            distance = loss(base(input_ids=ids, attention_mask=mask.long()).logits, target, mask)
            gradients = torch.autograd.grad(distance, scales)  # nobody else's .grad is touched
            for scale, gradient in zip(scales, gradients, strict=True):
                scale.grad = gradient
            optimizer.step()
            losses.append(float(distance.detach()))
    return delta.with_scales(torch.stack([scale.detach() for scale in scales])), losses


@contextmanager
def attached(base: nn.Module, delta: ModelDelta) -> Iterator[dict[str, DeltaLinear]]:
    """Within the block base computes as the compressed fine-tune; afterwards it is as it was. Yields its DeltaLinears.

    Raises ValueError as apply_model does.
    """
    linears = _require_fit(base, delta)
    layers = {name: DeltaLinear(linears[name], *pair) for name, pair in delta.linears.items()}
    own = {name: base.get_parameter(name).data for name in delta.rest}
    try:
        for name, value in delta.rest.items():
            base.get_parameter(name).data = value
        with _replaced(base, layers):
            yield layers
    finally:
        for name, value in own.items():
            base.get_parameter(name).data = value


class Tenants:
    """Several fine-tunes of one base served together: one batch, every row with the delta of its own fine-tune.

    base: the shared model; outside of calls it is as it was. deltas: name -> ModelDelta of this base. backend: as for
    kernels.delta_product ("compiled" for a server on a CPU that stays up). What a fine-tune has of its own besides (the
    rest: norms, embeddings, a head) is used for its rows; it is held whole, and costs a call for each fine-tune.
    Slide "# params × # models × 16 bits => # params × (# models × 1 bit + 16 bits)".
    Raises TypeError or ValueError naming the delta or parameter that does not fit.
    """

    def __init__(self, base: nn.Module, deltas: Mapping[str, ModelDelta], backend: str | None = None) -> None:
        if not deltas:
            raise ValueError("deltas must hold at least one fine-tune, got none")
        for delta in deltas.values():
            linears = _require_fit(base, delta)
            if list(delta.linears) != list(next(iter(deltas.values())).linears):
                raise ValueError("deltas must all compress the same linear layers")
        self.base, self.names, self.backend = base, tuple(deltas), backend
        self._batch = _Batch()
        everyone = list(deltas.values())
        rest = dict.fromkeys(itertools.chain(*(delta.rest for delta in everyone)))
        whole: dict[str, list[dict[str, Tensor]]] = {}  # module -> for each fine-tune: parameter -> its value
        for name in rest:
            shared = base.get_parameter(name)
            # an embedding may be the head's matrix too
            for owner, parameter in base.named_parameters(remove_duplicate=False):
                if parameter is shared:
                    module, _, own = owner.rpartition(".")
                    for values, delta in zip(whole.setdefault(module, [{} for _ in everyone]), everyone, strict=True):
                        values[own] = delta.rest.get(name, shared.detach())
        self._modules: dict[str, nn.Module] = {}
        for name in everyone[0].linears:
            packed = torch.stack([delta.linears[name][0] for delta in everyone])
            scales = torch.stack([delta.linears[name][1] for delta in everyone])
            bias = torch.stack([own["bias"] for own in whole.pop(name)]) if name in whole else None
            self._modules[name] = _TenantLinear(linears[name], packed, scales, bias, self._batch, backend)
        for name, own_values in whole.items():
            self._modules[name] = _TenantModule(base.get_submodule(name), own_values, self._batch)

    @torch.no_grad()
    def __call__(self, input_ids: Tensor, rows: Sequence[str | int] | Tensor, **inputs: Any) -> Any:
        """What base(input_ids, **inputs) returns, row i computed by the fine-tune rows[i].

        input_ids: (batch, seq). rows: for each row of the batch a name or its number in `names`.
        Raises ValueError for an unknown name or number, or for another count than the batch has rows.
        """
        with self._serving(rows, len(input_ids)):
            return self.base(input_ids=input_ids, **inputs)

    @torch.no_grad()
    def generate(
        self, input_ids: Tensor, rows: Sequence[str | int] | Tensor, max_new_tokens: int, **inputs: Any
    ) -> Tensor:
        """Greedy decoding with a key-value cache: prompts (batch, seq), padded on the left -> (batch, seq + new).

        rows: as in a call. inputs: for transformers' generate, attention_mask among them. Raises as a call does.
        """
        with self._serving(rows, len(input_ids)):
            return self.base.generate(  # type: ignore[operator]
                input_ids, max_new_tokens=max_new_tokens, do_sample=False, num_beams=1, **inputs
            )

    def held_bytes(self) -> int:
        """Bytes that base and all deltas hold together: each storage counted once."""
        return sum(_storages([*self.base.parameters(), *self.base.buffers(), *self._own()]).values())

    def delta_bytes(self) -> int:
        """Bytes of the deltas alone: what is not the base's."""
        base = _storages([*self.base.parameters(), *self.base.buffers()])
        return sum(nbytes for place, nbytes in _storages(self._own()).items() if place not in base)

    def _own(self) -> Iterator[Tensor]:
        for module in self._modules.values():
            yield from module.buffers(recurse=False)
            if isinstance(module, _TenantModule):
                for values in module.own:
                    yield from values.values()

    @contextmanager
    def _serving(self, rows: Sequence[str | int] | Tensor, batch: int) -> Iterator[None]:
        index = self._index(rows)
        if len(index) != batch:
            raise ValueError(f"rows must name a fine-tune for each of the batch's {batch} rows, got {len(index)}")
        self._batch.set(index.to(next(self.base.parameters()).device))
        with _replaced(self.base, self._modules):
            yield

    def _index(self, rows: Sequence[str | int] | Tensor) -> Tensor:
        if isinstance(rows, Tensor):
            rows = require_integers("rows", rows, ndim=1).tolist()
        if isinstance(rows, str):
            raise TypeError("rows must be a list with a fine-tune for each row of the batch, got one text")
        numbers = []
        for row in rows:
            if isinstance(row, str) and row not in self.names:
                raise ValueError(f"rows must be among {', '.join(self.names)}, got {row!r}")
            number = self.names.index(row) if isinstance(row, str) else row
            if isinstance(number, bool) or not isinstance(number, int) or not 0 <= number < len(self.names):
                raise ValueError(f"rows must be names or numbers from 0 to {len(self.names) - 1}, got {row!r}")
            numbers.append(number)
        return torch.tensor(numbers, dtype=torch.int64)


class _Batch:
    """Which fine-tune each row of the batch under way belongs to, the same for every layer.

    rows: (batch,). groups: for each fine-tune in the batch its number and the places of its rows.
    """

    rows: Tensor
    groups: list[tuple[int, Tensor]]

    def set(self, rows: Tensor) -> None:
        self.rows = rows
        self.groups = [(number, (rows == number).nonzero().view(-1)) for number in rows.unique().tolist()]


class _TenantLinear(nn.Module):
    """A linear layer of the base with the signs and scales of every fine-tune: packed (models, bytes), (models,)."""

    packed: Tensor
    scales: Tensor
    bias: Tensor | None

    def __init__(
        self,
        linear: nn.Linear,
        packed: Tensor,
        scales: Tensor,
        bias: Tensor | None,
        batch: _Batch,
        backend: str | None,
    ) -> None:
        super().__init__()
        self.linear, self.batch, self.backend = linear, batch, backend
        self.register_buffer("packed", packed)
        self.register_buffer("scales", scales)
        self.register_buffer("bias", bias)  # (models, out) where a fine-tune has one of its own

    def forward(self, x: Tensor) -> Tensor:
        rows = self.batch.rows
        y = kernels.delta_product(x, self.linear.weight.detach(), self.packed, self.scales, rows, self.backend)
        if self.bias is not None:
            return y + self.bias[rows].view(len(rows), *[1] * (y.ndim - 2), -1)
        return y if self.linear.bias is None else y + self.linear.bias


class _TenantModule(nn.Module):
    """A norm, embedding or head of the base: each row is computed with the parameters of its own fine-tune."""

    def __init__(self, module: nn.Module, own: list[dict[str, Tensor]], batch: _Batch) -> None:
        super().__init__()
        self.module, self.own, self.batch = module, own, batch

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor | None = None
        for number, places in self.batch.groups:
            some = torch.func.functional_call(self.module, self.own[number], (x[places],))
            y = some.new_empty(len(x), *some.shape[1:]) if y is None else y
            y[places] = some
        assert y is not None, "a batch has rows"
        return y


@contextmanager
def _replaced(model: nn.Module, modules: Mapping[str, nn.Module]) -> Iterator[None]:
    """Within the block `modules` stand in the model under their names; afterwards its own do again."""
    own = {name: model.get_submodule(name) for name in modules}
    try:
        for name, module in modules.items():
            _put(model, name, module)
        yield
    finally:
        for name, module in own.items():
            _put(model, name, module)


def _put(model: nn.Module, name: str, module: nn.Module) -> None:
    parent, _, child = name.rpartition(".")
    setattr(model.get_submodule(parent), child, module)


def _parameter_pairs(base: nn.Module, fine: nn.Module) -> dict[str, tuple[Tensor, Tensor]]:
    """Name -> (base's parameter, fine's), if the two models have the same ones."""
    for name, model in (("base", base), ("fine", fine)):
        if not isinstance(model, nn.Module):
            raise TypeError(f"{name} must be an nn.Module, got {type(model).__name__}")
    theirs = dict(fine.named_parameters())
    pairs = {}
    for name, old in base.named_parameters():
        if name not in theirs or theirs[name].shape != old.shape:
            got = f"shape {tuple(theirs[name].shape)}" if name in theirs else "none"
            raise ValueError(f"fine must have base's parameter {name} of shape {tuple(old.shape)}, got {got}")
        pairs[name] = (old.detach(), theirs.pop(name).detach())
    if theirs:
        raise ValueError(f"fine must have base's parameters and no others, got {', '.join(theirs)} too")
    return pairs


def _require_fit(base: nn.Module, delta: ModelDelta) -> dict[str, nn.Linear]:
    """The base's linear layers by name, if every part of delta belongs to one of its parameters."""
    linears = linear_layers(base, skip=())
    parameters = dict(base.named_parameters())
    for name, (packed, _) in delta.linears.items():
        if name not in linears:
            raise ValueError(f"delta has a layer {name}, which is no nn.Linear of the base")
        count = linears[name].weight.numel()
        if packed.numel() != (count + 7) // 8:
            raise ValueError(f"delta must have {(count + 7) // 8} bytes for {name}, got {packed.numel()}")
    for name, value in delta.rest.items():
        if name not in parameters or parameters[name].shape != value.shape:
            raise ValueError(f"delta keeps {name} of shape {tuple(value.shape)}, which is no parameter of the base")
    return linears


def _storages(tensors: Iterable[Tensor]) -> dict[int, int]:
    """Where in memory the tensors are -> how many bytes are held there."""
    return {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in tensors}
