"""QLoRA: a base model frozen in 4 bits, and LoRA branches beside it that train.

Dettmers et al., "QLoRA: Efficient Finetuning of Quantized LLMs", NeurIPS 2023, section 3; slides "QLoRA". The weights
are NF4 with doubly quantized scales (nf4.py), the optimizer's state may live in a file (paged.py).

    model = quantize_model(add_lora(model, targets, r, alpha))

LoRA goes on first: quantize_model then takes the frozen layer inside each branch too. An adapter is kept with
lecturekit.tuning.lora.save; to use it again, load it into the float model and quantize that.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from lecturekit.arguments import require_number, require_positive_int, require_tensor
from lecturekit.compression import kernels, nf4
from lecturekit.compression.nf4 import e2m1_levels, fp4_levels, int4_levels, normal_float_levels
from lecturekit.compression.paged import PagedAdamW
from lecturekit.tuning.lora import LoRALinear
from lecturekit.tuning.storage import storage

TABLES: dict[str, Tensor] = {
    "nf4": normal_float_levels(),
    "int4": int4_levels(),
    "fp4": fp4_levels(),
    "e2m1": e2m1_levels(),
}
DOUBLE_BLOCKSIZE = 256  # scales that share a scale, as in the paper


class Linear4bit(nn.Module):
    """A frozen linear layer that holds its weight in 4 bits: h = dequantized weight · x + bias.

    linear: the nn.Linear (in -> out) to copy; it is not changed. blocksize: weights that share a scale. double: whether
    the scales are quantized too. table: a name of TABLES.
    Buffers: packed, uint8 (ceil(out * in / 2),); with double the scales as codes, uint8, scales, float32, and offset,
    float32 (); else absmax, float32. bias, in linear's dtype, or None. Nothing is a parameter, so nothing trains.
    x: (..., in) float32, float16 or bfloat16 -> (..., out) in x's dtype. The weight is unpacked to x's dtype for the
    product and dropped again; the backward pass unpacks it anew and gives a gradient to x alone.
    Raises TypeError or ValueError naming linear, blocksize or table. Dettmers et al. 2023, equation 5.
    """

    bias: Tensor | None

    def __init__(self, linear: nn.Linear, blocksize: int = 64, double: bool = True, table: str = "nf4") -> None:
        super().__init__()
        if not isinstance(linear, nn.Linear):
            raise TypeError(f"linear must be an nn.Linear, got {type(linear).__name__}")
        if table not in TABLES:
            raise ValueError(f"table must be one of {', '.join(TABLES)}, got {table!r}")
        weight = require_tensor("linear.weight", linear.weight, ndim=2, finite=True).detach()
        self.out_features, self.in_features = weight.shape
        self.blocksize = require_positive_int("blocksize", blocksize)
        self.has_double, self.table, self.dtype = double, table, weight.dtype  # a Module's .double() casts it

        indices, absmax = nf4.quantize_with(TABLES[table], weight, blocksize)
        self.register_buffer("packed", nf4.pack(indices))
        if double:
            held = nf4.double_quantize(absmax, DOUBLE_BLOCKSIZE)
            for name, buffer in zip(("codes", "scales", "offset"), held, strict=True):
                self.register_buffer(name, buffer)
        else:
            self.register_buffer("absmax", absmax)
        self.register_buffer("bias", None if linear.bias is None else linear.bias.detach().clone())
        self.train(linear.training)

    def forward(self, x: Tensor) -> Tensor:
        bias = None if self.bias is None else self.bias.to(x.dtype)
        return _Product4bit.apply(x, bias, self._layout(), *self._quantized())

    @property
    def weight(self) -> Tensor:
        """The dequantized weight, (out, in) in the dtype of the layer it was made from: a copy, made at each call."""
        return self._layout().dequantize(self.dtype, *self._quantized())

    def held_bytes(self) -> int:
        """Bytes that the layer keeps in memory: weight, scales and bias."""
        return sum(buffer.nbytes for buffer in self.buffers())

    def _layout(self) -> _Layout:
        return _Layout((self.out_features, self.in_features), self.blocksize, TABLES[self.table])

    def _quantized(self) -> tuple[Tensor, ...]:
        """packed and what gives the scales."""
        names = ("codes", "scales", "offset") if self.has_double else ("absmax",)
        return (self.get_buffer("packed"), *(self.get_buffer(name) for name in names))

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Linear4bit:
        """Move to another device, but keep the scales in float32 when a whole model is cast to half precision."""
        before = {name: buffer for name, buffer in self.named_buffers(recurse=False) if name != "bias"}
        super()._apply(fn, recurse)
        for name, buffer in before.items():
            moved = self.get_buffer(name)
            if moved.dtype != buffer.dtype:
                setattr(self, name, buffer.to(moved.device))
        return self

    def extra_repr(self) -> str:
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}, "
            f"table={self.table}, blocksize={self.blocksize}, double={self.has_double}"
        )


def linear_4bit(
    x: Tensor, packed: Tensor, absmax: Tensor, levels: Tensor, blocksize: int, A: Tensor, B: Tensor, scale: float
) -> Tensor:
    """A frozen 4-bit layer with a LoRA branch beside it: h = W x + scale · B A x, with W = levels[index] * absmax.

    x: (..., in). packed: uint8 (ceil(out * in / 2),), two indices a byte as nf4.pack has them, of W (out, in) row by
    row. absmax: (ceil(out * in / blocksize),). levels: (16,). A: (r, in). B: (out, r). Returns (..., out).
    Gradients go to x, A and B. packed, absmax and levels get none, and no dequantized weight is kept for the backward
    pass, which unpacks it again. Dettmers et al. 2023, equation 5.
    Raises TypeError or ValueError naming the argument.
    """
    for name, factor in (("A", A), ("B", B)):
        require_tensor(name, factor, ndim=2)
    if A.shape[0] != B.shape[1]:
        raise ValueError(f"A must be (r, in) and B (out, r), got {tuple(A.shape)} and {tuple(B.shape)}")
    require_tensor("x", x)
    if x.ndim == 0 or x.shape[-1] != A.shape[1]:
        raise ValueError(f"x's last dimension must be in = {A.shape[1]} to match A, got shape {tuple(x.shape)}")
    require_positive_int("blocksize", blocksize)
    base = _Product4bit.apply(x, None, _Layout((B.shape[0], A.shape[1]), blocksize, levels), packed, absmax)
    return base + F.linear(F.linear(x, A) * require_number("scale", scale), B)


class LoRALinear4bit(LoRALinear):
    """A LoRALinear whose base is a Linear4bit: it computes and trains the same, but no branch can be folded into it."""

    def _fold(self, sign: int) -> None:
        raise RuntimeError(
            "a branch cannot be folded into 4-bit weights, which are rounded to 16 levels: make the model a float one "
            "with dequantize_model first, then fold"
        )


def quantize_model(
    model: nn.Module, blocksize: int = 64, double: bool = True, skip: Sequence[str] = ("lm_head",), table: str = "nf4"
) -> nn.Module:
    """Replace every nn.Linear by a Linear4bit in place, the bases of LoRA branches too, and return the same model.

    skip: layers to leave alone, each named as in lora.add_lora: by its qualified name or the end of it. Embeddings and
    norms are no nn.Linear and stay as they are. blocksize, double, table: as for Linear4bit.
    Raises TypeError or ValueError, before anything is changed, when no layer is left to quantize, a branch is folded
    in (its base would be rounded together with it), or a weight is shared with a layer that is not an nn.Linear.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be an nn.Module, got {type(model).__name__}")
    if isinstance(skip, str):
        raise TypeError(f'skip must be a list of names such as ["lm_head"], got {skip!r}')
    if table not in TABLES:
        raise ValueError(f"table must be one of {', '.join(TABLES)}, got {table!r}")
    require_positive_int("blocksize", blocksize)
    names: dict[int, list[str]] = {}  # a layer may stand in several places
    for name, module in model.named_modules(remove_duplicate=False):
        if isinstance(module, LoRALinear) and module.merged:
            raise ValueError(f"{name} has its branch folded in: call its unmerge() first")
        if type(module) is nn.Linear and name and not any(name == s or name.endswith(f".{s}") for s in skip):
            names.setdefault(id(module), []).append(name)
    if not names:
        raise ValueError("model must hold an nn.Linear that is not skipped, got none")
    _refuse_shared_weights(model, [name for places in names.values() for name in places])

    for places in names.values():  # each float weight is let go before the next one is packed
        layer = Linear4bit(model.get_submodule(places[0]), blocksize, double, table)  # type: ignore[arg-type]
        for name in places:
            model.set_submodule(name, layer)
    for module in model.modules():
        if type(module) is LoRALinear and isinstance(module.base, Linear4bit):
            module.__class__ = LoRALinear4bit
    return model


def dequantize_model(model: nn.Module) -> nn.Module:
    """Replace every Linear4bit by a frozen nn.Linear with its rounded weight, in place, and return the same model.

    LoRA branches stay and can be folded afterwards. Raises ValueError when there is no Linear4bit.
    """
    layers = {name: module for name, module in model.named_modules() if isinstance(module, Linear4bit) and name}
    if not layers:
        raise ValueError("model must hold Linear4bit layers, got one without any")
    for name, layer in layers.items():
        model.set_submodule(name, _float_linear(layer))
    for module in model.modules():
        if isinstance(module, LoRALinear4bit):
            module.__class__ = LoRALinear  # type: ignore[assignment]
    return model


def memory_bill(
    model: nn.Module, loss: Callable[[], Tensor], optimizer: torch.optim.Optimizer | None = None
) -> dict[str, int]:
    """Bytes of a training step by category: weights, gradients, optimizer, activations. Measured, not computed.

    loss: called without arguments; does the forward pass and returns the scalar loss, on which backward is called here.
    Weights are the model's parameters and buffers; gradients what backward leaves at the parameters; optimizer the
    tensors in its state (of a PagedAdamW the most that was resident), so let it do a step before; activations what
    autograd keeps of the forward pass, other than weights. Tensors that share memory count once. What comes and goes
    within one operation, such as a dequantized weight, is in none of them. Gradients are put back as they were.
    Raises TypeError when loss does not return a tensor, ValueError when it is no scalar that has a gradient.
    """
    weights = _storages([*model.parameters(), *model.buffers()])
    kept: dict[tuple[str, int], int] = {}

    def pack(tensor: Tensor) -> Tensor:
        kept.update(_storages([tensor]))
        return tensor.detach()  # shares the memory; the tensor itself would make a reference cycle

    before = [(parameter, parameter.grad) for parameter in model.parameters()]
    for parameter, _ in before:
        parameter.grad = None
    try:
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            value = loss()
        if not isinstance(value, Tensor):
            raise TypeError(f"loss must return a torch.Tensor, got {type(value).__name__}")
        if value.numel() != 1 or not value.requires_grad:
            raise ValueError(f"loss must return a scalar that has a gradient, got shape {tuple(value.shape)}")
        value.backward()
        gradients = _storages(parameter.grad for parameter, _ in before if parameter.grad is not None)
    finally:
        for parameter, gradient in before:
            parameter.grad = gradient
    return {
        "weights": sum(weights.values()),
        "gradients": sum(gradients.values()),
        "optimizer": _optimizer_bytes(optimizer),
        "activations": sum(size for place, size in kept.items() if place not in weights),
    }


class GuanacoSize(NamedTuple):
    """One row of the QLoRA table. Sizes in GB of 1e9 bytes; parts: what ours_gb is made of, by name."""

    name: str
    paper_gb: float
    ours_gb: float
    parts: dict[str, float]


class _Llama(NamedTuple):
    """What a LLaMA's configuration says of its size. Touvron et al. 2023, table 2, and the models' config.json."""

    name: str
    paper_gb: float
    hidden: int
    intermediate: int
    layers: int


_LLAMAS = (
    _Llama("Guanaco 65B", 41, 8192, 22016, 80),
    _Llama("Guanaco 33B", 21, 6656, 17920, 60),
    _Llama("Guanaco 13B", 10, 5120, 13824, 40),
    _Llama("Guanaco 7B", 6, 4096, 11008, 32),
)
_VOCABULARY = 32_000
_GUANACO_RANK = 64  # branches on all linear layers; Dettmers et al. 2023, appendix B.2


def guanaco_sizes(context: int = 2048) -> list[GuanacoSize]:
    """The sizes in the QLoRA table from the configurations of LLaMA alone, in the slide's order.

    parts: the weights of the linear layers in 4 bits; their doubly quantized scales; embeddings and head, norms, and
    the adapter of rank 64, in 16 bits; and the keys and values of `context` tokens in 16 bits (2048 is all that LLaMA
    reads). ours_gb is their sum. The paper does not say what its figure counts: without keys and values the sum is
    short of every row, most of all of the largest. Slide "QLoRA", Guanaco's table; Dettmers et al. 2023, table 1.
    Raises TypeError or ValueError naming context.
    """
    require_positive_int("context", context)
    return [_guanaco_size(llama, context) for llama in _LLAMAS]


def _guanaco_size(llama: _Llama, context: int) -> GuanacoSize:
    hidden, wide = llama.hidden, llama.intermediate
    # q, k, v, o; gate and up; down
    shapes = [*[(hidden, hidden)] * 4, *[(wide, hidden)] * 2, (hidden, wide)] * llama.layers
    linear = sum(out * inp for out, inp in shapes)
    parts = {
        "4-bit weights": linear * 4 / 8,
        "scales": linear * (nf4.bits_per_parameter(double=True) - 4) / 8,
        "embeddings and head": 2 * _VOCABULARY * hidden * 2,
        "norms": (2 * llama.layers + 1) * hidden * 2,
        "adapter": storage(shapes, _GUANACO_RANK)[1],
        "keys and values": 2 * llama.layers * context * hidden * 2,
    }
    parts = {name: size / 1e9 for name, size in parts.items()}
    return GuanacoSize(llama.name, llama.paper_gb, sum(parts.values()), parts)


class _Layout(NamedTuple):
    """What the bytes of a 4-bit weight mean."""

    shape: tuple[int, int]
    blocksize: int
    levels: Tensor

    def dequantize(self, dtype: torch.dtype, packed: Tensor, *scales: Tensor) -> Tensor:
        """The weight in dtype. scales: absmax, or codes, scales and offset."""
        if len(scales) == 1:
            (absmax,) = scales
        else:
            codes, second, offset = scales
            absmax = nf4.double_dequantize(codes, second, offset, DOUBLE_BLOCKSIZE)
        if self.levels is TABLES["nf4"] and self.blocksize % 8 == 0 and dtype in kernels.DTYPES:
            return kernels.nf4_dequantize(packed, absmax, self.shape, self.blocksize, dtype)
        return nf4.dequantize_with(self.levels, nf4.unpack(packed, self.shape), absmax, self.blocksize, dtype)


class _Product4bit(torch.autograd.Function):
    """x -> W x + bias for a W in 4 bits. Of W only what is held anyway is kept for the backward pass.

    F.linear would keep the dequantized W of every layer until then: the float model that was to be saved.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, bias: Tensor | None, layout: _Layout, *held: Tensor) -> Tensor:
        ctx.layout = layout
        ctx.save_for_backward(*held)
        return F.linear(x, layout.dequantize(x.dtype, *held), bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        held = ctx.saved_tensors
        grad_x = grad @ ctx.layout.dequantize(grad.dtype, *held) if ctx.needs_input_grad[0] else None
        return (grad_x, None, None, *[None] * len(held))


def _float_linear(layer: Linear4bit) -> nn.Linear:
    linear = nn.Linear(layer.in_features, layer.out_features, bias=False, device="meta")
    linear.weight = nn.Parameter(layer.weight, requires_grad=False)
    if layer.bias is not None:
        linear.bias = nn.Parameter(layer.bias, requires_grad=False)
    return linear.train(layer.training)


def _refuse_shared_weights(model: nn.Module, names: list[str]) -> None:
    owners: dict[int, set[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        owners.setdefault(id(parameter), set()).add(name)
    own = {f"{name}.weight" for name in names}
    for name in names:
        others = owners[id(model.get_submodule(name).weight)] - own
        if others:
            raise ValueError(f"{name} shares its weight with {', '.join(sorted(others))}: add it to skip")


def _storages(tensors: Iterable[Tensor]) -> dict[tuple[str, int], int]:
    """Where the memory of these tensors lies, and how many bytes are there."""
    found = {}
    for tensor in tensors:
        memory = tensor.untyped_storage()
        if memory.nbytes():
            found[str(tensor.device), memory.data_ptr()] = memory.nbytes()
    return found


def _optimizer_bytes(optimizer: torch.optim.Optimizer | None) -> int:
    if optimizer is None:
        return 0
    if isinstance(optimizer, PagedAdamW):
        return optimizer.peak_bytes
    states = [value for state in optimizer.state.values() for value in state.values()]
    return sum(_storages(value for value in states if isinstance(value, Tensor)).values())
