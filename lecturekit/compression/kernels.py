"""Products with packed weights: one sign bit a weight (BitDelta), or one NF4 code of 4 bits.

Serving is bound by reading weights: at a batch of one each weight is read for a single multiplication. QLoRA's NF4
weights are a quarter of their 16 bits to read; BitDelta serves many fine-tunes from one base, each of them adding one
bit a weight (slides "QLoRA" and "Bit-Delta", "Multi-tenant serving"). These functions compute with the packed bytes as
nf4.pack and bitdelta.pack lay them out; nothing is unpacked into memory.

Each function chooses by the device of x, and `backend` overrules it:

- "triton": a Triton kernel (kernels_triton.py), the default on CUDA. Not measured on a GPU yet.
- "torch": plain PyTorch (kernels_torch.py), on any device: what the kernels are tested against, the default on a CPU,
  and on CUDA where the package triton is missing.
- "compiled": on a CPU the same with the inner loop through torch.compile. The 1-bit product of a few rows becomes about
  four times as fast and the quantizer one and a half times, but the first call takes seconds and needs a C++ compiler:
  good for a program that stays up, so it must be asked for.

Forward only: no result carries a gradient.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from lecturekit.arguments import require_integers, require_positive_int, require_tensor
from lecturekit.compression import kernels_torch

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
# Where a GPU changes its way; guesses, to be measured:
FUSED_ROWS = 2  # up to here the kernel reads W itself; with more rows cuBLAS reads it once for all of them
MANY_ROWS = 64  # from here on arithmetic costs more than reading: unpack W once, then multiply as usual


@torch.no_grad()
def delta_product(
    x: Tensor, weight: Tensor, packed: Tensor, scales: Tensor, index: Tensor, backend: str | None = None
) -> Tensor:
    """y_i = W x_i + scale_d sign(Delta_d) x_i with d = index_i: one batch whose rows use different fine-tunes.

    x: (batch, in) or (batch, tokens, in). weight: the base's W, (out, in), in x's dtype: float32, float16 or bfloat16.
    packed: uint8 (models, ceil(out * in / 8)), a row for each fine-tune as bitdelta.pack makes it. scales: (models,)
    floating point. index: (batch,) integers from 0 to models - 1. Returns (batch, out) or (batch, tokens, out) in x's
    dtype. Liu et al. 2024.
    Sums are float32. With two rows or fewer the GPU's kernel rebuilds W + scale * sign in registers and rounds once.
    Raises TypeError or ValueError naming the argument, RuntimeError when the backend cannot be had. What index holds
    is looked at on a CPU only, where that makes nobody wait; on a GPU a row with a wrong index comes out as NaN.
    """
    _require_values("x", x, (2, 3))
    require_tensor("weight", weight, ndim=2, dtype=x.dtype)
    out, in_features = weight.shape
    _require_width(x, in_features)
    require_tensor("packed", packed, ndim=2, dtype=torch.uint8)
    _require_bytes("packed's rows", packed.shape[1], out, in_features, 8)
    models = packed.shape[0]
    require_tensor("scales", scales, ndim=1)
    if scales.numel() != models:
        raise ValueError(f"scales must hold one for each of packed's {models} rows, got {scales.numel()}")
    require_integers("index", index, ndim=1)
    if index.numel() != x.shape[0]:
        raise ValueError(f"index must hold one delta for each of x's {x.shape[0]} rows, got {index.numel()}")
    if not index.is_cuda and not 0 <= int(index.min()) <= int(index.max()) < models:
        raise ValueError(f"index must lie in 0..{models - 1}, got {int(index.min())}..{int(index.max())}")
    _require_device(x, weight=weight, packed=packed, scales=scales)
    backend = _chosen(backend, x, "triton", "torch", "compiled")

    rows = x.reshape(-1, in_features).contiguous()
    if x.ndim == 3:
        index = index.repeat_interleave(x.shape[1])
    if backend == "triton":
        fused = len(rows) <= FUSED_ROWS
        y = _triton().delta_product(
            rows,
            weight.contiguous() if fused else None,
            None if fused else _float_product(rows, weight),
            packed.contiguous(),
            scales.float().contiguous(),
            index.to(x.device, torch.int32, non_blocking=True),
            out,
        )
    else:
        index = index.to(x.device, torch.int64)
        y = kernels_torch.delta_product(rows, weight, packed.contiguous(), scales, index, backend == "compiled")
    return y.view(*x.shape[:-1], out)


@torch.no_grad()
def sign_product(x: Tensor, packed: Tensor, out_features: int, backend: str | None = None) -> Tensor:
    """The 1-bit product alone, sign(Delta) x, for rows that share one delta.

    x: (batch, in), float32, float16 or bfloat16. packed: uint8 (ceil(out * in / 8),), as bitdelta.pack makes it.
    Returns (batch, out) in x's dtype; sums are float32. Raises as delta_product does.
    """
    _require_values("x", x, (2,))
    require_tensor("packed", packed, ndim=1, dtype=torch.uint8)
    require_positive_int("out_features", out_features)
    _require_bytes("packed", packed.numel(), out_features, x.shape[1], 8)
    _require_device(x, packed=packed)
    backend = _chosen(backend, x, "triton", "torch", "compiled")
    rows, one_delta = x.contiguous(), packed[None].contiguous()
    index = torch.zeros(len(x), dtype=torch.int32, device=x.device)
    if backend == "triton":
        scales = torch.ones(1, device=x.device)
        return _triton().delta_product(rows, None, None, one_delta, scales, index, out_features)
    return kernels_torch.sign_products(rows.float(), one_delta, index, out_features, backend == "compiled").to(x.dtype)


@torch.no_grad()
def nf4_product(
    x: Tensor, packed: Tensor, absmax: Tensor, shape: Sequence[int], blocksize: int = 64, backend: str | None = None
) -> Tensor:
    """y = W x for each row, W in NF4, unpacked on its way into the sum.

    x: (..., in), float32, float16 or bfloat16. packed: uint8 with ceil(out * in / 2) bytes in any shape, as nf4.pack
    or bitsandbytes makes them. absmax: (ceil(out * in / blocksize),); doubly quantized scales are decoded first, with
    nf4.double_dequantize. shape: W's, (out, in). blocksize: a multiple of 8. Returns (..., out) in x's dtype.
    Sums are float32. On a GPU one or two rows are multiplied by unrounded weights; more rows, and all other paths, by
    weights rounded to x's dtype. Dettmers et al. 2023, equation 5.
    Raises as delta_product does.
    """
    _require_values("x", x, None)
    out, in_features = _require_shape(shape, 2)
    _require_width(x, in_features)
    flat, scales = _require_nf4(packed, absmax, out * in_features, blocksize)
    _require_device(x, packed=packed, absmax=absmax)
    backend = _chosen(backend, x, "triton", "torch")
    rows = x.reshape(-1, in_features).contiguous()
    if backend != "triton":
        y = kernels_torch.nf4_product(rows, flat, scales, out, blocksize)
    elif len(rows) >= MANY_ROWS:
        weight = kernels_torch.nf4_dequantize(flat, scales, out * in_features, blocksize, x.dtype)
        y = rows @ weight.view(out, in_features).T
    else:
        y = _triton().nf4_product(rows, flat, scales, out, blocksize)
    return y.view(*x.shape[:-1], out)


@torch.no_grad()
def nf4_quantize(x: Tensor, blocksize: int = 64, backend: str | None = None) -> tuple[Tensor, Tensor]:
    """nf4.pack(nf4.quantize(x)) in one pass, bit for bit: faster, and without the indices in memory.

    x: any shape, float32, float16 or bfloat16, finite. blocksize: a multiple of 8. Returns packed, uint8
    (ceil(n / 2),), and absmax, float32 (ceil(n / blocksize),). backend: "torch" (default) or "compiled".
    Raises as delta_product does.
    """
    _require_values("x", x, None)
    _require_blocksize(blocksize)
    backend = _chosen(backend, x, "torch", "compiled")
    return kernels_torch.nf4_quantize(x.reshape(-1), blocksize, backend == "compiled")


@torch.no_grad()
def nf4_dequantize(
    packed: Tensor, absmax: Tensor, shape: Sequence[int], blocksize: int = 64, dtype: torch.dtype = torch.float32
) -> Tensor:
    """nf4.dequantize(nf4.unpack(packed, shape), absmax) in one pass, bit for bit. Arguments as for nf4_product.

    shape: any. dtype: float32, float16 or bfloat16. Raises as delta_product does.
    """
    size = _require_shape(shape, None)
    if dtype not in DTYPES:
        raise TypeError(f"dtype must be float32, float16 or bfloat16, got {dtype}")
    flat, scales = _require_nf4(packed, absmax, math.prod(size), blocksize)
    _require_device(packed, absmax=absmax)
    return kernels_torch.nf4_dequantize(flat, scales, math.prod(size), blocksize, dtype).view(size)


def _float_product(x: Tensor, weight: Tensor) -> Tensor:
    """W x in float32, without rounding in between, by the vendor's library."""
    if x.is_cuda and x.dtype != torch.float32:
        return torch.mm(x, weight.T, out_dtype=torch.float32)
    return torch.mm(x.float(), weight.T.float())


def _triton() -> Any:
    """The module with the kernels. RuntimeError where the package triton is missing."""
    module = _triton_or_none()
    if module is None:
        raise RuntimeError(
            'backend "triton" needs the package triton, which is not installed here: it comes with torch for CUDA on '
            'Linux; elsewhere leave backend out, or name "torch", to compute with PyTorch'
        )
    return module


def _triton_or_none() -> ModuleType | None:
    try:
        from lecturekit.compression import kernels_triton
    except ModuleNotFoundError as error:
        if error.name != "triton":
            raise
        return None
    return kernels_triton


def _chosen(backend: str | None, x: Tensor, *allowed: str) -> str:
    """The backend that x's device asks for, or the one that was named, if it is allowed and can be had."""
    if backend is None:
        return "triton" if x.is_cuda and "triton" in allowed and _triton_or_none() else "torch"
    if backend not in allowed:
        raise ValueError(f"backend must be None or one of {', '.join(allowed)}, got {backend!r}")
    if backend == "triton" and not _triton().INTERPRETED and not x.is_cuda:
        raise RuntimeError(
            f'backend "triton" needs tensors on a CUDA device, got {x.device}: leave backend out to compute with '
            "PyTorch, or set TRITON_INTERPRET=1 before Python starts to run the kernel in Triton's interpreter"
        )
    if backend == "compiled" and x.device.type != "cpu":
        raise RuntimeError(f'backend "compiled" is for the CPU, got tensors on {x.device}: leave backend out')
    return backend


def _require_values(name: str, x: Tensor, ndims: tuple[int, ...] | None) -> None:
    require_tensor(name, x)
    if x.dtype not in DTYPES:
        raise TypeError(f"{name} must be float32, float16 or bfloat16, got {x.dtype}")
    if ndims and x.ndim not in ndims:
        raise ValueError(f"{name} must have {' or '.join(map(str, ndims))} dimensions, got shape {tuple(x.shape)}")


def _require_width(x: Tensor, in_features: int) -> None:
    if x.ndim == 0 or x.shape[-1] != in_features:
        raise ValueError(f"x's last dimension must be W's in_features = {in_features}, got shape {tuple(x.shape)}")


def _require_bytes(name: str, got: int, out: int, in_features: int, per_byte: int) -> None:
    expected = math.ceil(out * in_features / per_byte)
    if got != expected:
        raise ValueError(
            f"{name} must have ceil({out} * {in_features} / {per_byte}) = {expected} bytes for W of shape "
            f"({out}, {in_features}), got {got}"
        )


def _require_shape(shape: Sequence[int], ndim: int | None) -> tuple[int, ...]:
    size = tuple(shape)
    for length in size:
        require_positive_int("shape's lengths", length)
    if not size or (ndim is not None and len(size) != ndim):
        raise ValueError(f"shape must be W's, (out, in), got {size}")
    return size


def _require_blocksize(blocksize: int) -> None:
    if require_positive_int("blocksize", blocksize) % 8:
        raise ValueError(f"blocksize must be a multiple of 8 (eight codes are read at a time), got {blocksize}")


def _require_nf4(packed: Tensor, absmax: Tensor, count: int, blocksize: int) -> tuple[Tensor, Tensor]:
    """packed, flat, and absmax, float32, if they belong to count weights in blocks of blocksize."""
    _require_blocksize(blocksize)
    require_tensor("packed", packed, dtype=torch.uint8)
    require_tensor("absmax", absmax, ndim=1)
    if packed.numel() != math.ceil(count / 2):
        raise ValueError(f"packed must have ceil({count} / 2) = {math.ceil(count / 2)} bytes, got {packed.numel()}")
    blocks = math.ceil(count / blocksize)
    if absmax.numel() != blocks:
        raise ValueError(
            f"absmax must hold {blocks} scales for {count} weights in blocks of {blocksize}, got {absmax.numel()}"
        )
    return packed.reshape(-1).contiguous(), absmax.float().contiguous()


def _require_device(x: Tensor, **others: Tensor) -> None:
    for name, tensor in others.items():
        if tensor.device != x.device:
            raise ValueError(f"{name} must be on the same device as the rest, {x.device}, got {tensor.device}")
