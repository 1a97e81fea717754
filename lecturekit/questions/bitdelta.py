"""The questions of lab 7: BitDelta's sign and scale, its bits, its product, its distillation, its size.

Liu et al., "BitDelta: Your Fine-Tune May Only Be Worth One Bit", NeurIPS 2024. What a student writes:

- bitdelta.compress   compress(base, fine) -> (signs, scale): int8 of +1 and -1 in their shape, float32 ();
- bitdelta.pack       pack_signs(signs) -> packed: int8 of +1 and -1, any shape, n elements -> uint8 (ceil(n / 8),);
  element 8k + j in the row-major order is bit j of byte k (the lowest is bit 0), 1 for +1; bits left over are 0;
- bitdelta.product    delta_product(x, weight, packed, scales, rows) -> y: x (batch, in) or (batch, tokens, in),
  weight (out, in), packed uint8 (models, ceil(out * in / 8)), each row as pack_signs makes it, scales (models,),
  rows (batch,) int64: which fine-tune each row of the batch belongs to; y (batch, out) or (batch, tokens, out);
- bitdelta.distill    distill_loss(logits, target, mask) -> loss: logits and target (batch, seq, vocab) of the
  compressed model and of the fine-tune, mask (batch, seq) bool, True for real tokens; a scalar with a gradient,
  the mean over the real tokens of the squared distance summed over the vocabulary;
- bitdelta.size       model_bytes(config) -> (base, delta): whole numbers of bytes of a Llama-like model at 16 bits and
  of one fine-tune of it; config is a dict with hidden_size, intermediate_size, num_hidden_layers, num_attention_heads,
  num_key_value_heads, vocab_size (ints) and tie_word_embeddings (bool).
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from lecturekit.checking import Case, Draw, Unfit, question
from lecturekit.checking.compare import describe, precision

LAB = "lab07_bitdelta"

# bitdelta.compress ---------------------------------------------------------------------------------------------------


@question(
    "bitdelta.compress", lab=LAB, points=20, slide="Bit-Delta: binarized delta", returns=("signs", "scale"), cases=7
)
def compress(draw: Draw) -> Case:
    """Reduce what fine-tuning changed to signs and one scale."""
    edge = draw.edge("some weights unchanged", "nothing changed", "bfloat16", "one row", "one weight")
    out, inp = draw.sizes(2, low=3, high=24)
    shape = {"one row": (1, inp), "one weight": (1, 1)}.get(edge or "", (out, inp))
    dtype = torch.bfloat16 if edge == "bfloat16" else torch.float32
    base = draw.normal(*shape, dtype=dtype)
    # A shift of its own keeps the mean of Delta away from zero and from the mean of its magnitudes.
    fine = (base + draw.normal(*shape, scale=0.3) + draw.choice([-0.1, 0.1])).to(dtype)
    if edge == "some weights unchanged":
        kept = draw.permutation(out * inp)[: 1 + out * inp // 4]
        fine.view(-1)[kept] = base.view(-1)[kept]
    return Case(edge, base=base, fine=base.clone() if edge == "nothing changed" else fine)


def _delta(base: Tensor, fine: Tensor) -> Tensor:
    return fine.float() - base.float()


def _signs(delta: Tensor) -> Tensor:
    return torch.where(delta > 0, 1, -1).to(torch.int8)


compress.oracle("lecturekit.compression.bitdelta:compress")
compress.tolerance(
    ulps=lambda case: 2 + case.base.numel() * torch.finfo(torch.float32).eps / torch.finfo(case.base.dtype).eps,
    why="a subtraction and a result, rounded in the weights' dtype; a sum of n terms of one sign and its division, "
    "which torch does in float32 also for 16-bit numbers; relative to the mean itself, which is the expected value",
    part="scale",
)

compress.law("every sign is +1 or -1", lambda case, parts: bool((parts["signs"].abs() == 1).all()))


def _scale_is_best(case: Case, parts: dict[str, Any]) -> bool:
    """||Delta - scale * signs||² is smallest at the scale; a tenth is far more than rounding, in bfloat16 too."""
    delta, signs, scale = _delta(case.base, case.fine).double(), parts["signs"].double(), float(parts["scale"])

    def error(factor: float) -> float:
        return float((delta - factor * scale * signs).square().sum())

    return error(1.0) <= min(error(0.9), error(1.1))


compress.law("no scale a tenth smaller or larger comes closer to Delta", _scale_is_best)


@compress.misconception(
    "compresses the fine-tuned weight, not what changed",
    hint="The slide writes W_ij inside Sign, but which of its matrices is replaced by one bit an entry?",
)
def _(base, fine):
    return _signs(fine), fine.float().abs().mean()


@compress.misconception(
    "the scale of the fine-tuned weight, not of what changed",
    hint="A fine-tune hardly moves a weight. How large is the step you add, beside the step that was made?",
)
def _(base, fine):
    return _signs(_delta(base, fine)), fine.float().abs().mean()


@compress.misconception(
    "takes an unchanged weight's sign as +1",
    hint="One bit knows two signs. Which one has Sign(0) on the slide? (The authors' public code takes the other.)",
)
def _(base, fine):
    delta = _delta(base, fine)
    return torch.where(delta >= 0, 1, -1).to(torch.int8), delta.abs().mean()


@compress.misconception(
    "leaves an unchanged weight's sign at 0", hint="How many values does torch.sign know, and how many does one bit?"
)
def _(base, fine):
    delta = _delta(base, fine)
    return delta.sign().to(torch.int8), delta.abs().mean()


@compress.misconception(
    "takes the difference the wrong way round", hint="What must be added to the base to come to the fine-tune?"
)
def _(base, fine):
    delta = _delta(fine, base)
    return _signs(delta), delta.abs().mean()


@compress.misconception(
    "takes the mean with its signs",
    hint="Steps up and steps down cancel in your mean. What does the scale measure: a direction, or a size?",
)
def _(base, fine):
    delta = _delta(base, fine)
    return _signs(delta), delta.mean()


@compress.misconception(
    "the root of the mean square, not the mean magnitude",
    hint="Write ||Delta - scale * Sign(Delta)||² out and set its derivative by the scale to zero. What is left?",
)
def _(base, fine):
    delta = _delta(base, fine)
    return _signs(delta), delta.square().mean().sqrt()


@compress.misconception(
    "the largest change, not the mean one",
    hint="That scale would fit rounding to a grid. Here every weight moves by the same step: which size errs least?",
)
def _(base, fine):
    delta = _delta(base, fine)
    return _signs(delta), delta.abs().max()


@compress.misconception(
    "adds the magnitudes up without dividing", hint="What is 1 / (n m) doing on the slide, and what are n and m?"
)
def _(base, fine):
    delta = _delta(base, fine)
    return _signs(delta), delta.abs().sum()


_ROW_HINT = "The slide says per tensor. How many numbers does one matrix need beside its signs?"


@compress.misconception("one scale a row, not one for the matrix", hint=_ROW_HINT)
def _(base, fine):
    delta = _delta(base, fine)
    return _signs(delta), delta.abs().mean(dim=-1)


@compress.misconception("one scale a row, not one for the matrix", hint=_ROW_HINT)
def _(base, fine):
    delta = _delta(base, fine)
    return _signs(delta), delta.abs().mean(dim=-1, keepdim=True)


@compress.misconception(
    "gives bits, 0 and 1, instead of signs",
    hint="A bit is how a sign is stored. What is scale times your 0, and what should it be?",
)
def _(base, fine):
    delta = _delta(base, fine)
    return (delta > 0).to(torch.int8), delta.abs().mean()


@compress.alternative("a mask times two minus one, in the weights' own dtype")
def _(w0, w1):
    change = w1 - w0
    return (change > 0).to(torch.int8) * 2 - 1, change.abs().mean().to(torch.float32)


@compress.alternative("a comparison, and a one-norm, float64 inside")
def _(before, after):
    up = after.double() > before.double()
    size = torch.linalg.vector_norm(after.double() - before.double(), ord=1) / before.numel()
    return [torch.where(up, 1, -1).to(torch.int8), size.float()]


@compress.alternative("loops over Python numbers")
def _(*args):
    base, fine = args
    signs, total = torch.full(base.shape, -1, dtype=torch.int8, device=base.device), 0.0
    for i, (old, new) in enumerate(zip(base.flatten().tolist(), fine.flatten().tolist(), strict=True)):
        total += abs(new - old)
        if new > old:
            signs.view(-1)[i] = 1
    return signs, total / base.numel()


@compress.alternative("the projection of Delta on its signs, by einsum")
def _(base, fine):
    delta = fine.float() - base.float()
    signs = torch.sign(delta)
    signs[signs == 0] = -1
    return signs.to(torch.int8), torch.einsum("ij,ij->", delta, signs) / delta.numel()


# bitdelta.pack -------------------------------------------------------------------------------------------------------


@question("bitdelta.pack", lab=LAB, points=15, slide="Bit-Delta: the weight delta down to 1 bit", cases=7)
def pack(draw: Draw) -> Case:
    """Keep each sign in one bit."""
    edge = draw.edge("a matrix", "one sign", "a multiple of eight", "every sign +1", "a stack of matrices")
    rows, columns = draw.sizes(2, low=3, high=7)
    shape: tuple[int, ...] = (8 * draw.integer(2, 7) + draw.integer(1, 7),)  # the last byte is not full
    if edge == "a matrix":
        shape = (rows, 8 * draw.integer(1, 3) + columns)  # no row ends where a byte ends
    elif edge == "one sign":
        shape = (1,)
    elif edge == "a multiple of eight":
        shape = (8 * draw.integer(2, 7),)
    elif edge == "a stack of matrices":
        shape = (2, rows, columns)
    signs = 2 * draw.integers(0, 1, *shape) - 1
    if edge == "every sign +1":
        signs = signs.abs()
    return Case(edge, signs=signs.to(torch.int8))


pack.oracle("lecturekit.compression.bitdelta:pack")
pack.law(
    "eight signs a byte, the last byte perhaps not full",
    lambda case, parts: parts["result"].numel() == math.ceil(case.signs.numel() / 8),
)
pack.law(
    "as many bits are set as there are signs of +1",
    lambda case, parts: int(_bits_of(parts["result"]).sum()) == int((case.signs == 1).sum()),
)


def _bits_of(packed: Tensor) -> Tensor:
    """uint8 (…, n) -> 0 and 1, int64 (…, 8 n), the lowest bit of each byte first."""
    shifts = torch.arange(8, device=packed.device)
    return ((packed.long().unsqueeze(-1) >> shifts) & 1).flatten(-2)


def _in_eights(bits: Tensor, filler: int = 0) -> Tensor:
    """n bits -> int64 (ceil(n / 8), 8), filled up at the end."""
    flat = bits.reshape(-1).long()
    return F.pad(flat, (0, -len(flat) % 8), value=filler).view(-1, 8)


def _weighed(eights: Tensor, highest_first: bool = False) -> Tensor:
    """(n, 8) bits -> uint8 (n,)."""
    powers = 2 ** torch.arange(8, device=eights.device)
    return (eights * (powers.flip(0) if highest_first else powers)).sum(1).to(torch.uint8)


@pack.misconception(
    "puts the first sign into the highest bit",
    hint="Element 8k + j is bit j of byte k. What is the value of a byte whose only set bit is bit 0?",
)
def _(signs):
    return _weighed(_in_eights(signs > 0), highest_first=True)


@pack.misconception("sets the bit for -1", hint="Which of the two signs is stored as 1?")
def _(signs):
    return _weighed(_in_eights(signs < 0))


@pack.misconception(
    "spends a byte on each sign", hint="uint8 is a byte. How many signs of one bit each find room in one?"
)
def _(signs):
    return (signs > 0).to(torch.uint8).reshape(-1)


@pack.misconception(
    "drops the signs of a last byte that is not full", hint="How many bytes do nine signs need? Is it 9 // 8?"
)
def _(signs):
    flat = (signs > 0).reshape(-1)
    return _weighed(_in_eights(flat[: flat.numel() // 8 * 8]))


@pack.misconception(
    "fills the last byte up with ones", hint="What do the bits behind the last sign hold, and what did you pad with?"
)
def _(signs):
    return _weighed(_in_eights(signs > 0, filler=1))


@pack.misconception(
    "fills the last byte up at the front",
    hint="Which byte is the one that may not be full: the first or the last? On which side do you pad?",
)
def _(signs):
    flat = (signs > 0).reshape(-1)
    return _weighed(_in_eights(F.pad(flat.long(), (-flat.numel() % 8, 0))))


@pack.misconception(
    "lets every row of a matrix begin with a byte of its own",
    hint="The elements are counted through the whole tensor. Where in a byte does the second row of 3 × 5 signs begin?",
)
def _(signs):
    rows = (signs > 0).reshape(-1, signs.shape[-1])
    return torch.cat([_weighed(_in_eights(row)) for row in rows])


@pack.misconception(
    "cuts the signs into eight long pieces, one for each bit",
    hint="Which signs share byte 0: eight neighbours, or eight that lie far apart? Look at the order of your reshape.",
)
def _(signs):
    flat = (signs > 0).reshape(-1).long()
    return _weighed(F.pad(flat, (0, -flat.numel() % 8)).view(8, -1).T)


@pack.misconception(
    "reads a matrix column by column", hint="Row-major order: which index moves fastest, the first or the last?"
)
def _(signs):
    return _weighed(_in_eights(signs.permute(*reversed(range(signs.ndim))) > 0))


@pack.misconception(
    "weighs the signs themselves, not bits",
    hint="What does a sign of -1 add to your byte, and what is it as an unsigned number? A bit is 0 or 1.",
)
def _(signs):
    return _weighed(_in_eights(signs))


@pack.misconception(
    "keeps the shape of the matrix for the bytes", hint="The result is one row of bytes, whatever shape the signs had."
)
def _(signs):
    last = F.pad((signs > 0).long(), (0, -signs.shape[-1] % 8))
    return (last.view(*signs.shape[:-1], -1, 8) * 2 ** torch.arange(8, device=signs.device)).sum(-1).to(torch.uint8)


@pack.alternative("NumPy's packbits")
def _(signs):
    packed = np.packbits(signs.cpu().numpy().ravel() == 1, bitorder="little")
    return torch.from_numpy(packed).to(signs.device)


@pack.alternative("shifts, plane by plane")
def _(directions):
    bits = (directions.flatten() + 1) // 2
    packed = torch.zeros((bits.numel() + 7) // 8, dtype=torch.uint8, device=bits.device)
    for j in range(8):
        plane = bits[j::8].to(torch.uint8)
        packed[: len(plane)] |= plane << j
    return packed


@pack.alternative("loops over Python numbers")
def _(signs):
    values = [0] * math.ceil(signs.numel() / 8)
    for i, sign in enumerate(signs.flatten().tolist()):
        if sign > 0:
            values[i // 8] += 1 << (i % 8)
    return torch.tensor(values, dtype=torch.uint8, device=signs.device)


@pack.alternative("a product with the powers of two, in floating point")
def _(signs):
    flat = torch.clamp(signs, min=0).reshape(-1).float()
    padded = torch.cat([flat, flat.new_zeros(-len(flat) % 8)])
    powers = torch.tensor([2.0**j for j in range(8)], device=signs.device)
    return (padded.reshape(-1, 8) * powers).sum(dim=1).byte()


# bitdelta.product ----------------------------------------------------------------------------------------------------


@question("bitdelta.product", lab=LAB, points=20, slide="Bit-Delta: multi-tenant serving", cases=6)
def product(draw: Draw) -> Case:
    """Multiply a batch whose rows belong to different fine-tunes."""
    edge = draw.edge("several tokens a row", "one fine-tune for all rows", "one row", "only one fine-tune")
    out, inp, tokens = draw.sizes(3, low=5, high=18)
    models, batch = draw.integer(5, 7), 1 if edge == "one row" else draw.integer(3, 4)
    rows = draw.integers(0, models - 1, batch)
    rows[:2] = models - 1  # two rows share a fine-tune, and row 0 does not belong to fine-tune 0
    if edge == "one fine-tune for all rows":
        rows[:] = models - 1
    if edge == "only one fine-tune":
        models, rows = 1, torch.zeros_like(rows)
    bits = draw.integers(0, 1, models, out * inp)
    return Case(
        edge,
        x=draw.normal(*(batch, tokens, inp) if edge == "several tokens a row" else (batch, inp)),
        weight=draw.normal(out, inp),
        packed=torch.stack([_weighed(_in_eights(own)) for own in bits]),
        scales=draw.uniform(models, low=0.1, high=1.0),
        rows=rows,
    )


product.oracle("lecturekit.compression.kernels:delta_product")
product.tolerance(
    ulps=lambda case: case.x.shape[-1] + 4,
    magnitude=lambda case, _: _size_of_product(case),
    why="a sum of in products, a scale and a sum: at most in + 4 roundings of |W| |x| + scale · Σ |x|",
)


def _largest_step(case: Case) -> Tensor:
    """scale · Σ |x| of each row, float64 (batch, 1) or (batch, tokens, 1): no signs could add more."""
    scales = case.scales.double()[case.rows].view(-1, *[1] * (case.x.ndim - 1))
    return scales * case.x.double().abs().sum(-1, keepdim=True)


def _size_of_product(case: Case) -> Tensor:
    return case.x.double().abs() @ case.weight.double().abs().T + _largest_step(case)


def _adds_no_more_than_its_scale(case: Case, parts: dict[str, Any]) -> bool:
    added = (parts["result"].double() - case.x.double() @ case.weight.double().T).abs()
    rounding = (case.x.shape[-1] + 4) * precision(case, case.x) * _size_of_product(case)
    return bool((added <= _largest_step(case) + rounding).all())


product.law("a delta adds at most scale · Σ |x| to what the base gives", _adds_no_more_than_its_scale)


def _unpacked(packed: Tensor, weight: Tensor) -> Tensor:
    """uint8 (models, bytes) -> +1 and -1, float (models, out, in)."""
    out, inp = weight.shape
    return (2 * _bits_of(packed)[..., : out * inp] - 1).view(-1, out, inp).to(weight.dtype)


def _per_row(values: Tensor, x: Tensor) -> Tensor:
    """(batch,) -> (batch, 1) or (batch, 1, 1), as x has dimensions."""
    return values.view(-1, *[1] * (x.ndim - 1))


def _signs_times(x: Tensor, signs: Tensor) -> Tensor:
    """Each row of x by its own signs: (batch, …, in) and (batch, out, in) -> (batch, …, out)."""
    return torch.einsum("boi,b...i->b...o", signs, x)


@product.misconception(
    "computes all rows with the first row's fine-tune",
    hint="rows has an entry for each row of the batch. How many of them do you use?",
)
def _(x, weight, packed, scales, rows):
    signs = _unpacked(packed, weight)[rows[0]]
    return x @ weight.T + scales[rows[0]] * (x @ signs.T)


@product.misconception(
    "takes the row's place in the batch for the number of its fine-tune",
    hint="Row 0 of the batch need not belong to fine-tune 0. What tells you which one it belongs to?",
)
def _(x, weight, packed, scales, rows):
    place = torch.arange(len(x), device=x.device) % len(scales)
    return x @ weight.T + _per_row(scales[place], x) * _signs_times(x, _unpacked(packed, weight)[place])


@product.misconception(
    "takes each row's own signs with another fine-tune's scale",
    hint="Signs and scale belong together. Is the scale looked up with rows as the signs are?",
)
def _(x, weight, packed, scales, rows):
    place = torch.arange(len(x), device=x.device) % len(scales)
    return x @ weight.T + _per_row(scales[place], x) * _signs_times(x, _unpacked(packed, weight)[rows])


@product.misconception("forgets the scales", hint="How large is a step of one sign, without its scale?")
def _(x, weight, packed, scales, rows):
    return x @ weight.T + _signs_times(x, _unpacked(packed, weight)[rows])


@product.misconception(
    "leaves out the base", hint="The delta is what was added. To what? All rows share that part of the product."
)
def _(x, weight, packed, scales, rows):
    return _per_row(scales[rows], x) * _signs_times(x, _unpacked(packed, weight)[rows])


@product.misconception(
    "multiplies by bits, 0 and 1, instead of signs", hint="A bit is how a sign is stored. What must a 0 count as?"
)
def _(x, weight, packed, scales, rows):
    bits = (_unpacked(packed, weight) + 1) / 2
    return x @ weight.T + _per_row(scales[rows], x) * _signs_times(x, bits[rows])


@product.misconception(
    "reads the highest bit of a byte first", hint="Element 8k + j is bit j of byte k. Which bit is j = 0?"
)
def _(x, weight, packed, scales, rows):
    out, inp = weight.shape
    bits = _bits_of(packed).view(len(packed), -1, 8).flip(-1).flatten(1)[:, : out * inp]
    signs = (2 * bits - 1).view(-1, out, inp).to(x.dtype)
    return x @ weight.T + _per_row(scales[rows], x) * _signs_times(x, signs[rows])


@product.misconception(
    "takes a 0 bit for +1 and a 1 bit for -1", hint="Which of the two signs did pack_signs store as 1?"
)
def _(x, weight, packed, scales, rows):
    return x @ weight.T - _per_row(scales[rows], x) * _signs_times(x, _unpacked(packed, weight)[rows])


@product.misconception(
    "adds the deltas of all fine-tunes to every row",
    hint="Whose answers do you give? A row asks for one fine-tune, and not for the sum of them.",
)
def _(x, weight, packed, scales, rows):
    return x @ (weight + torch.einsum("m,moi->oi", scales, _unpacked(packed, weight))).T


@product.misconception(
    "scales the base together with the signs", hint="The scale is the size of a change. Does the base change with it?"
)
def _(x, weight, packed, scales, rows):
    return _per_row(scales[rows], x) * _signs_times(x, weight + _unpacked(packed, weight)[rows])


@product.misconception(
    "unpacks the signs into (in, out)",
    hint="The signs were packed row by row from a matrix of the weight's shape. Which shape is that?",
)
def _(x, weight, packed, scales, rows):
    signs = _unpacked(packed, weight).view(-1, weight.shape[1], weight.shape[0])
    return x @ weight.T + _per_row(scales[rows], x) * torch.einsum("bio,b...i->b...o", signs[rows], x)


@product.misconception(
    "divides each delta by the number of fine-tunes",
    hint="No mean is asked for. Does a row's answer change when one more fine-tune is served?",
)
def _(x, weight, packed, scales, rows):
    scale = _per_row(scales[rows], x) / len(scales)
    return x @ weight.T + scale * _signs_times(x, _unpacked(packed, weight)[rows])


@product.alternative("a loop over the rows")
def _(x, weight, packed, scales, rows):
    results = []
    for i in range(x.shape[0]):
        number = int(rows[i])
        held = packed[number].cpu().numpy()
        bits = np.unpackbits(held, count=weight.numel(), bitorder="little").reshape(tuple(weight.shape))
        delta = scales[number] * torch.from_numpy(bits.astype(np.float32) * 2 - 1).to(x.device)
        results.append(F.linear(x[i], weight + delta))
    return torch.stack(results)


@product.alternative("one product for each fine-tune that is asked for")
def _(x, W, held, scales, which):
    y = F.linear(x, W)
    for model in which.unique().tolist():
        bits = torch.stack([(held[model] >> j) & 1 for j in range(8)], dim=1).flatten()[: W.numel()]
        signs = torch.where(bits.bool(), 1.0, -1.0).view_as(W)
        mine = which == model
        y[mine] = y[mine] + scales[model] * F.linear(x[mine], signs)
    return y


@product.alternative("twice the sum over the set bits, less the sum of all")
def _(x, weight, packed, scales, rows):
    out, inp = weight.shape
    bits = _bits_of(packed[rows])[:, : out * inp].view(len(rows), out, inp).to(x.dtype)
    added = 2 * torch.einsum("boi,b...i->b...o", bits, x) - x.sum(-1, keepdim=True)
    return x @ weight.T + _per_row(scales[rows], x) * added


@product.alternative("batched matrices, float64 inside")
def _(x, weight, packed, scales, rows):
    signs = _unpacked(packed[rows], weight).double()
    whole = weight.double() + scales[rows].double().view(-1, 1, 1) * signs
    columns = x.double().unsqueeze(1) if x.ndim == 2 else x.double()
    return torch.bmm(columns, whole.transpose(1, 2)).view(*x.shape[:-1], -1).to(x.dtype)


# bitdelta.distill ----------------------------------------------------------------------------------------------------


@question("bitdelta.distill", lab=LAB, points=10, slide="Bit-Delta: scales by model distillation", cases=6)
def distill(draw: Draw) -> Case:
    """How far are the compressed model's logits from the fine-tune's?"""
    edge = draw.edge("nothing padded", "padding on the left", "one real token")
    batch, seq, vocab = draw.integer(2, 4), draw.integer(6, 9), draw.integer(11, 17)
    lengths = torch.tensor(draw.sizes(batch, low=1, high=seq - 1))  # all different
    mask = torch.arange(seq) < lengths[:, None]
    if edge == "nothing padded":
        mask = torch.ones_like(mask)
    elif edge == "padding on the left":
        mask = mask.flip(1)
    elif edge == "one real token":
        mask = torch.zeros_like(mask)
        mask[draw.integer(0, batch - 1), draw.integer(1, seq - 2)] = True
    mask = mask.to(draw.device)
    logits, target = draw.normal(batch, seq, vocab), draw.normal(batch, seq, vocab)
    # What a model says behind the end of a text is far from anything: it must not count.
    return Case(edge, logits=torch.where(mask.unsqueeze(-1), logits, 3 * logits), target=target, mask=mask)


distill.oracle("lecturekit.compression.bitdelta:distill_loss")
distill.tolerance(
    ulps=lambda case: int(case.mask.sum()) * case.logits.shape[-1] + 4,
    why="a sum of tokens × vocabulary squares, all of one sign: that many roundings of the sum itself, and a division",
    part="loss",
)
distill.tolerance(
    ulps=8,
    why="a difference, a factor of 2 and a division, in whatever order, relative to the largest",
    part="gradient of the logits",
)


@distill.driver
def _(distill_loss: Any, case: Case) -> dict[str, Any]:
    """The loss, and the gradient with which the scales would be trained."""
    logits = case.logits.clone().requires_grad_()
    loss = distill_loss(logits, case.target, case.mask)
    if not isinstance(loss, Tensor) or loss.ndim:
        raise Unfit(f"distill_loss must return a tensor without dimensions, got {describe(loss)}")
    if not loss.requires_grad:
        raise Unfit("the loss has no gradient; compute it from logits itself, not from .data, .detach() or .item()")
    (gradient,) = torch.autograd.grad(loss, logits, allow_unused=True)
    return {"loss": loss.detach(), "gradient of the logits": torch.zeros_like(logits) if gradient is None else gradient}


distill.law(
    "padding has no gradient",
    lambda case, parts: not bool(parts["gradient of the logits"][~case.mask].any()),
)


def _is_quadratic(case: Case, parts: dict[str, Any]) -> bool:
    """A sum of squares of d = logits - target has d · gradient = 2 loss (Euler); n roundings of a sum of one sign."""
    along = (parts["gradient of the logits"].double() * (case.logits.double() - case.target.double())).sum()
    terms = case.logits.numel()
    return bool((along - 2 * parts["loss"]).abs() <= 2 * (terms + 8) * precision(case, case.logits) * parts["loss"])


distill.law("twice the distance to the fine-tune is four times the loss", _is_quadratic)


def _squares(logits: Tensor, target: Tensor) -> Tensor:
    """||z_fine - z_bin||² of each token: (batch, seq)."""
    return (logits - target).square().sum(-1)


@distill.misconception(
    "averages over the vocabulary as well",
    hint="The slide has the squared length of a vector of logits. Is a length a mean of the vector's entries?",
)
def _(logits, target, mask):
    return F.mse_loss(logits[mask], target[mask])


@distill.misconception(
    "counts the padding as well", hint="Which positions of the batch are no text at all, and who tells you so?"
)
def _(logits, target, mask):
    return _squares(logits, target).mean()


@distill.misconception(
    "divides by all tokens, padding too",
    hint="You leave the padding out of the sum. Is it also left out of what you divide by?",
)
def _(logits, target, mask):
    return (_squares(logits, target) * mask).mean()


@distill.misconception(
    "adds the tokens up without dividing",
    hint="The slide has an expectation over x. Is twice the text twice as bad?",
)
def _(logits, target, mask):
    return _squares(logits, target)[mask].sum()


@distill.misconception("forgets the square", hint="There is a 2 on the slide, behind the norm. What does it undo?")
def _(logits, target, mask):
    return (logits - target)[mask].norm(dim=-1).mean()


@distill.misconception(
    "averages each text first, then the texts",
    hint="In your mean a token of a short text weighs more than one of a long text. Should it?",
)
def _(logits, target, mask):
    return ((_squares(logits, target) * mask).sum(1) / mask.sum(1)).mean()


@distill.misconception("counts the padding and not the text", hint="What does True in the mask stand for?")
def _(logits, target, mask):
    return _squares(logits, target)[~mask].mean()


@distill.misconception(
    "compares probabilities, not logits",
    hint="Z on the slide are the logits: what the model gives before any softmax.",
)
def _(logits, target, mask):
    return _squares(logits.softmax(-1), target.softmax(-1))[mask].mean()


@distill.misconception(
    "takes the Kullback-Leibler divergence",
    hint="That is how other distillations measure. What does the slide measure between the two vectors of logits?",
)
def _(logits, target, mask):
    return F.kl_div(logits.log_softmax(-1)[mask], target.log_softmax(-1)[mask], reduction="batchmean", log_target=True)


@distill.misconception("sums absolute differences", hint="Which norm has the slide? What does it do to each entry?")
def _(logits, target, mask):
    return (logits - target).abs().sum(-1)[mask].mean()


@distill.misconception(
    "compares each position with the next one of the fine-tune",
    hint="Both models read the same tokens. Which of their positions answer the same question?",
)
def _(logits, target, mask):
    return _squares(logits[:, :-1], target[:, 1:])[mask[:, 1:]].mean()


@distill.misconception(
    "cuts the gradient to the compressed model",
    hint="Which of the two sets of logits depends on the scales, and which one is only looked at?",
)
def _(logits, target, mask):
    return _squares(logits.detach(), target)[mask].mean()


@distill.alternative("a weighted sum")
def _(z_bin, z_fine, real):
    weights = real.to(z_bin.dtype)
    return ((z_bin - z_fine) ** 2).sum(dim=2).mul(weights).sum() / weights.sum()


@distill.alternative("mse_loss, summed")
def _(logits, target, mask):
    return F.mse_loss(logits[mask], target[mask].detach(), reduction="sum") / mask.sum()


@distill.alternative("masked_select, float64 inside")
def _(logits, target, mask):
    away = (logits.double() - target.double()).masked_select(mask.unsqueeze(-1))
    return (away.dot(away) / mask.sum()).to(logits.dtype)


@distill.alternative("a loop over the tokens")
def _(logits, target, mask):
    places = mask.nonzero().tolist()
    return sum(torch.linalg.vector_norm(logits[b, t] - target[b, t]) ** 2 for b, t in places) / len(places)


# bitdelta.size -------------------------------------------------------------------------------------------------------


@question("bitdelta.size", lab=LAB, points=15, slide="BitDelta: model and delta sizes", returns=("base", "delta"))
def size(draw: Draw) -> Case:
    """How much does one more fine-tune weigh?"""
    edge = draw.edge("tied embeddings", "no grouped heads", "one layer", "the size of Mistral-7B")
    heads, width = draw.choice([8, 16, 32]), draw.choice([32, 64, 128])
    config: dict[str, Any] = {
        "hidden_size": heads * width,
        "intermediate_size": heads * width * 2 + 64 * draw.integer(1, 9),
        "num_hidden_layers": 1 if edge == "one layer" else draw.integer(2, 40),
        "num_attention_heads": heads,
        "num_key_value_heads": heads if edge == "no grouped heads" else heads // draw.choice([2, 4]),
        "vocab_size": 8 * draw.integer(1000, 6000),
        "tie_word_embeddings": edge == "tied embeddings",
    }
    if edge == "the size of Mistral-7B":
        config |= {"hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "vocab_size": 32000}
        config |= {"num_attention_heads": 32, "num_key_value_heads": 8}
    return Case(edge, config=config)


size.oracle("lecturekit.compression.bitdelta:model_bytes")


@size.driver
def _(model_bytes: Any, case: Case) -> Any:
    """Ask, and take 12.0 for 12: who divides by 8 with / has a float."""
    result = model_bytes(case.config)
    if not isinstance(result, (tuple, list)):
        return result
    return [int(value) if isinstance(value, float) and value.is_integer() else value for value in result]


def _between(case: Case, parts: dict[str, Any]) -> bool:
    """No more than everything at 16 bits, no less than a bit for each of the base's weights."""
    return parts["base"] / 16 < parts["delta"] < parts["base"]


size.law("a fine-tune takes less than the base, and more than one bit for each weight", _between)


def _shapes(config: dict[str, Any]) -> list[tuple[int, int]]:
    """(out, in) of a layer's seven linear matrices: q, k, v, o, gate, up, down."""
    hidden, inner = config["hidden_size"], config["intermediate_size"]
    keys = hidden // config["num_attention_heads"] * config["num_key_value_heads"]
    attention = [(hidden, hidden), (keys, hidden), (keys, hidden), (hidden, hidden)]
    return [*attention, (inner, hidden), (inner, hidden), (hidden, inner)]


def _linears(config: dict[str, Any]) -> int:
    return config["num_hidden_layers"] * sum(out * inp for out, inp in _shapes(config))


def _embeddings(config: dict[str, Any]) -> int:
    return (1 if config["tie_word_embeddings"] else 2) * config["vocab_size"] * config["hidden_size"]


def _norms(config: dict[str, Any]) -> int:
    return (2 * config["num_hidden_layers"] + 1) * config["hidden_size"]


def _bytes(linears: int, rest: int, matrices: int) -> tuple[int, int]:
    """Two bytes a weight of the base; one bit, or two bytes for the rest, and four bytes a scale of the fine-tune."""
    return 2 * (linears + rest), linears // 8 + 4 * matrices + 2 * rest


@size.misconception(
    "makes one bit of the embedding, the head and the norms as well",
    hint="One bit goes to the linear layers inside the blocks. Which tensors of the model are not among them?",
)
def _(config):
    linears, rest = _linears(config), _embeddings(config) + _norms(config)
    return 2 * (linears + rest), (linears + rest) // 8 + 4 * 7 * config["num_hidden_layers"]


@size.misconception(
    "leaves what is not compressed out of the fine-tune",
    hint="A full fine-tune moves the embedding and the norms as well. Where do you keep what they became?",
)
def _(config):
    linears, rest = _linears(config), _embeddings(config) + _norms(config)
    return 2 * (linears + rest), linears // 8 + 4 * 7 * config["num_hidden_layers"]


@size.misconception("forgets the scales", hint="What else than signs is kept of a matrix?")
def _(config):
    return _bytes(_linears(config), _embeddings(config) + _norms(config), 0)


@size.misconception(
    "has one scale for a whole layer of the model",
    hint="The slide says per tensor. How many matrices of one layer are compressed, each by itself?",
)
def _(config):
    return _bytes(_linears(config), _embeddings(config) + _norms(config), config["num_hidden_layers"])


@size.misconception(
    "keeps the scales in 16 bits", hint="How many bytes has the scale that your compress returns? It is float32."
)
def _(config):
    base, delta = _bytes(_linears(config), _embeddings(config) + _norms(config), 0)
    return base, delta + 2 * 7 * config["num_hidden_layers"]


@size.misconception(
    "gives every query head a key and a value of its own",
    hint="Two numbers of heads stand in the configuration. How long is a key, over all of its heads?",
)
def _(config):
    config = {**config, "num_key_value_heads": config["num_attention_heads"]}
    return _bytes(_linears(config), _embeddings(config) + _norms(config), 7 * config["num_hidden_layers"])


@size.misconception(
    "forgets the gate of the feed-forward part",
    hint="Llama's feed-forward part has a gated unit. How many matrices are that?",
)
def _(config):
    layers, gate = config["num_hidden_layers"], config["intermediate_size"] * config["hidden_size"]
    return _bytes(_linears(config) - layers * gate, _embeddings(config) + _norms(config), 6 * layers)


@size.misconception("counts the attention's matrices only", hint="Which part of a block holds most of its weights?")
def _(config):
    layers = config["num_hidden_layers"]
    attention = layers * sum(out * inp for out, inp in _shapes(config)[:4])
    return _bytes(attention, _embeddings(config) + _norms(config), 4 * layers)


@size.misconception(
    "counts the embedding once though the head has a matrix of its own",
    hint="What does tie_word_embeddings say, and what is there when it is False?",
)
def _(config):
    rest = config["vocab_size"] * config["hidden_size"] + _norms(config)
    return _bytes(_linears(config), rest, 7 * config["num_hidden_layers"])


@size.misconception(
    "counts the embedding twice though the head shares it",
    hint="What does tie_word_embeddings say, and how many matrices are there when it is True?",
)
def _(config):
    rest = 2 * config["vocab_size"] * config["hidden_size"] + _norms(config)
    return _bytes(_linears(config), rest, 7 * config["num_hidden_layers"])


@size.misconception("forgets the norms", hint="Print the names of a block's parameters: which of them are vectors?")
def _(config):
    return _bytes(_linears(config), _embeddings(config), 7 * config["num_hidden_layers"])


@size.misconception("forgets the norm behind the last layer", hint="Which norm belongs to no layer?")
def _(config):
    rest = _embeddings(config) + _norms(config) - config["hidden_size"]
    return _bytes(_linears(config), rest, 7 * config["num_hidden_layers"])


@size.misconception("takes bits for bytes", hint="How many bits make a byte?")
def _(config):
    base, delta = _bytes(_linears(config), _embeddings(config) + _norms(config), 7 * config["num_hidden_layers"])
    return 8 * base, 8 * delta


@size.misconception("spends a byte on each sign", hint="How many bits does a sign need, once it is packed?")
def _(config):
    linears, rest = _linears(config), _embeddings(config) + _norms(config)
    return 2 * (linears + rest), linears + 4 * 7 * config["num_hidden_layers"] + 2 * rest


@size.misconception(
    "counts the base into every fine-tune", hint="The base is shared. Is it stored again for each fine-tune?"
)
def _(config):
    base, delta = _bytes(_linears(config), _embeddings(config) + _norms(config), 7 * config["num_hidden_layers"])
    return base, base + delta


@size.misconception("gives the fine-tune first, then the base", hint="In which order are the two asked for?")
def _(config):
    base, delta = _bytes(_linears(config), _embeddings(config) + _norms(config), 7 * config["num_hidden_layers"])
    return delta, base


@size.alternative("a sum over the layers, dividing at the end")
def _(c):
    d, f, kv = c["hidden_size"], c["intermediate_size"], c["hidden_size"] * c["num_key_value_heads"]
    kv = kv / c["num_attention_heads"]
    linear = c["num_hidden_layers"] * (2 * d * d + 2 * d * kv + 3 * d * f)
    whole = c["vocab_size"] * d * (2 - c["tie_word_embeddings"]) + d + c["num_hidden_layers"] * 2 * d
    return 16 * (linear + whole) / 8, (linear + 16 * whole + 32 * 7 * c["num_hidden_layers"]) / 8


@size.alternative("walks over named shapes")
def _(config):
    hidden, inner, vocab = config["hidden_size"], config["intermediate_size"], config["vocab_size"]
    head = hidden // config["num_attention_heads"]
    tensors = {"embed": (vocab, hidden), "norm": (hidden,)}
    if not config["tie_word_embeddings"]:
        tensors["head"] = (vocab, hidden)
    for layer in range(config["num_hidden_layers"]):
        for name in ("q_proj", "o_proj"):
            tensors[f"{layer}.{name}"] = (hidden, hidden)
        for name in ("k_proj", "v_proj"):
            tensors[f"{layer}.{name}"] = (head * config["num_key_value_heads"], hidden)
        for name in ("gate_proj", "up_proj"):
            tensors[f"{layer}.{name}"] = (inner, hidden)
        tensors[f"{layer}.down_proj"] = (hidden, inner)
        tensors[f"{layer}.input_norm"] = tensors[f"{layer}.post_norm"] = (hidden,)
    base = sum(2 * math.prod(shape) for shape in tensors.values())
    delta = 0
    for name, shape in tensors.items():
        delta += math.ceil(math.prod(shape) / 8) + 4 if name.endswith("_proj") else 2 * math.prod(shape)
    return base, delta


@size.alternative("parameter counts of modules without memory")
def _(config):
    hidden, keys = config["hidden_size"], config["hidden_size"] // config["num_attention_heads"]
    keys *= config["num_key_value_heads"]
    with torch.device("meta"):
        pairs = [(hidden, hidden), (hidden, keys), (hidden, keys), (hidden, hidden)]
        pairs += [(hidden, config["intermediate_size"])] * 2 + [(config["intermediate_size"], hidden)]
        layer = [torch.nn.Linear(inp, out, bias=False) for inp, out in pairs]
        table = torch.nn.Embedding(config["vocab_size"], hidden)
    layers, tables = config["num_hidden_layers"], 1 if config["tie_word_embeddings"] else 2
    ones = layers * sum(linear.weight.numel() for linear in layer)
    whole = tables * table.weight.numel() + (2 * layers + 1) * hidden
    return [2 * (ones + whole), ones // 8 + layers * len(layer) * 4 + 2 * whole]
