# ---
# jupyter:
#   jupytext:
#     text_representation:
#       extension: .py
#       format_name: percent
#       format_version: '1.3'
#   kernelspec:
#     display_name: Python 3 (ipykernel)
#     language: python
#     name: python3
# ---

# %% [markdown]
# # Lab 6 · QLoRA: fine-tune a model that is held in 4 bits
#
# | | |
# |---|---|
# | **Slides** | *QLoRA: LoRA, with quantized backbones and paged optimizer states*: NormalFloat (NF4), double quantization, paged optimizers, the Guanaco table |
# | **Papers** | Dettmers et al., *QLoRA: Efficient Finetuning of Quantized LLMs*, NeurIPS 2023; Dettmers et al., *8-bit Optimizers via Block-wise Quantization*, ICLR 2022 |
# | **Reading and writing** | about 90 minutes |
# | **Computing** | about 4 minutes on two CPU cores, less on a GPU; about 5 GB of memory |
# | **You build** | the sixteen levels, rounding weights to them, two codes in a byte, the way back, scales that are quantized too, a 4-bit layer with a branch that learns |
# | **You measure** | a 135-million-parameter language model in 4 bits: error and perplexity by data type and block size, the bill of bytes, LoRA over 4 bits against LoRA over float, memory by category, an optimizer in pages |
#
# Work from top to bottom. Every **Build** cell has a *check* below it, which tells you what is wrong and never takes
# points. A question you leave out does not stop you: later cells then use the course's own version, and say so.

# %% [markdown]
# ## Set-up
# The first cell acts on Colab only. In JupyterLab, started with `make lab`, it does nothing.

# %%
import os
import subprocess
import sys
from pathlib import Path

if "COLAB_RELEASE_TAG" in os.environ:
    course = Path("lecturekit-course").resolve()
    if not course.exists():
        repository = (
            os.environ.get("LECTUREKIT_REPOSITORY") or input("Address of the course's git repository: ").strip()
        )
        subprocess.run(["git", "clone", "--quiet", "--depth", "1", repository, str(course)], check=True)
        pip = [sys.executable, "-m", "pip", "install", "--quiet"]
        subprocess.run([*pip, "--no-deps", str(course)], check=True)  # Colab's own torch and transformers stay
        subprocess.run([*pip, "gguf", "platformdirs"], check=True)
        subprocess.run([sys.executable, "-m", "lecturekit.models", "smollm2-135m-instruct"], check=True)
    os.environ["LECTUREKIT_DATA"] = str(course / "data")

# %%
import copy
import logging
import math
import random
import statistics
import tempfile
import time
import warnings

import torch
import torch.nn.functional as F
from torch import nn

from lecturekit import data, results
from lecturekit.checking import check, grade, passing
from lecturekit.explore import qlora as explore
from lecturekit.explore import style
from lecturekit.models import load_language_model
from lecturekit.runtime import base_seed, device, profile, progress, seed_everything

FULL = profile() == "full"  # LECTUREKIT_PROFILE=smoke runs the same cells in seconds, with numbers that mean nothing
SEED = base_seed()  # 0, unless LECTUREKIT_SEED names another
seed_everything(SEED)

# %% [markdown]
# ## 1 · Predict
# Before any code: write down what you expect. Nothing here is graded. The answers come back beside your measurements
# at the end, and being wrong is how they become interesting.
#
# We round all linear layers of SmolLM2 (135 million parameters) to 4 bits, 64 weights to a *block* with one scale, and
# fine-tune LoRA branches beside them.
#
# - **a.** Sixteen levels take 4 bits a weight. A float32 scale for each block makes how many bits a weight? And how many are they
#   when the scales are quantized to 8 bits too?
# - **b.** Perplexity says among how many words the model hesitates. Rounded to NF4, it is how many times the float
#   model's? And rounded to 15 evenly spaced levels (INT4)?
# - **c.** We train the same branches, once over the float model and once over the 4-bit one. Is the held-out perplexity of the second
#   `"clearly worse"`, `"about the same"` or `"clearly better"`?
# - **d.** Memory of such a training step (weights, gradients, optimizer, activations): over 4 bits it is what percentage of that of a
#   full fine-tune in float32?
# - **e.** The slide gives 41 GB for Guanaco 65B. How many GB are 65 billion weights of 4 bits?

# %%
predicted_bits = None  # a, for example 5.0
predicted_double = None  # a
predicted_nf4 = None  # b, for example 1.5
predicted_int4 = None  # b
predicted_tuned = None  # c, one of "clearly worse", "about the same", "clearly better"
predicted_memory = None  # d, for example 50
predicted_guanaco = None  # e, for example 20

# %% [markdown]
# ## 2 · The idea
# LoRA trains about one percent of the parameters, but it still has to *hold* all the others: 65 billion weights of 16 bits are 130 GB, before
# anything is trained. QLoRA rounds these frozen weights to 4 bits and trains the branch beside them in full precision:
#
# $$y = x\,\mathrm{dequantize}(W_4)^\top + \tfrac{\alpha}{r}\, x A^\top B^\top$$
#
# Each layer's weights are unpacked when they are needed, used for one product, and dropped again. No gradient goes
# into $W_4$, and none could: a weight with 16 possible values cannot move a little. Gradients do go *through* it, to the layers below.
#
# Rounding to 16 levels works **by blocks**. The flattened weight is cut into runs of 64 values. Each is divided by its largest magnitude, the
# *absmax*, so that it lies in $[-1, 1]$; then every value becomes the index of the nearest level. To come back: level × absmax.
#
# Why blocks? Below are 128 values, rounded to NF4. **Make the outlier larger (or tab to the slider and press the arrow keys): what happens to
# its neighbours? Then make the blocks smaller: what does it cost?**

# %%
explore.block_slider()

# %% [markdown]
# The same without sliders, for print:

# %%
explore.block_strip()

# %% [markdown]
# An outlier is stored well, and its whole block pays for it: the levels are stretched until most of the small values fall on the level 0.
# Smaller blocks keep the damage in, but each takes a scale of its own.
#
# **Which sixteen levels?** A trained layer's weights are roughly normal around zero. NF4, the *4-bit NormalFloat*, puts its levels at quantiles of a normal
# distribution, meant to be used about equally often: dense where the weights are dense. INT4 spaces them evenly; FP4 is a floating-point number with a sign, two
# bits of exponent and one of mantissa.

# %%
explore.levels_strip()

# %% [markdown]
# Two more ideas make it QLoRA. **Double quantization**: the scales are numbers too, so quantize them. **Paged optimizers**: keep
# the optimizer's state in slower memory, and bring in the page that the step needs. You build the first, and measure both.

# %% [markdown]
# ## 3 · Build
# ### 3.1 Sixteen levels · 15 points
# Return the levels of NF4, in ascending order, as a float32 tensor (16,) from −1 to 1. The slide prints them; derive them.
#
# - A table of sixteen quantiles has no middle, but an exact 0 is wanted: for padding, and for weights that are zero. So each side is made by
#   itself: **8** levels above zero, **7** below, and the 0.
# - Above: nine probabilities, evenly spaced from 0.5 to $p = 1 - \frac12\left(\frac1{32} + \frac1{30}\right) = 0.9677083$, put through
#   the quantile function of the standard normal distribution. (At 0.5 it gives the 0; at 1 it would give infinity.)
# - Below: *eight* probabilities over the same stretch, and the sign turned round.
# - Last, divide by the largest.
#
# The published table was computed from float32 probabilities that start at 0.9677083. Other ways to the same formula differ in the seventh
# digit, which is right here too.
#
# <details><summary>Hint 1</summary>The quantile function, also known as the inverse of the cumulative distribution function or probit, is
# <code>torch.special.ndtri</code>.</details>
# <details><summary>Hint 2</summary><code>torch.linspace(0.5, p, 9)</code> are the probabilities above. Both sides give a 0. How often may it
# be in the table?</details>
# <details><summary>Hint 3</summary><code>torch.cat</code> three parts: minus the quantiles below, from the farthest in; one zero; the
# quantiles above.</details>


# %% nbgrader={"grade": false, "grade_id": "nf4-levels", "locked": false, "schema_version": 3, "solution": true, "task": false}
def nf4_levels():
    """The 16 levels of NF4, float32, ascending, from −1 to 1, with an exact 0.   → (16,)"""
    ### BEGIN SOLUTION
    outermost = 0.9677083  # 1 - (1 / 32 + 1 / 30) / 2
    above = torch.special.ndtri(torch.linspace(outermost, 0.5, 9)[:-1].double()).float()
    below = -torch.special.ndtri(torch.linspace(outermost, 0.5, 8)[:-1].double()).float()
    levels = torch.cat([below, torch.zeros(1), above.flip(0)])
    return levels / levels.max()
    ### END SOLUTION


# %% nbgrader={"grade": true, "grade_id": "nf4-levels-test", "locked": true, "points": 15, "schema_version": 3, "solution": false, "task": false}
check("nf4.levels", nf4_levels)
### BEGIN HIDDEN TESTS
grade("nf4.levels", nf4_levels)
### END HIDDEN TESTS

# %% [markdown]
# **See what your code did.** Your levels under the bell curve, and as black marks below it the slide's.

# %%
explore.levels_picture(nf4_levels)

# %% [markdown]
# From here on the table is called `LEVELS`: yours if it passed its check.

# %%
LEVELS = passing("nf4.levels", nf4_levels)()
print(LEVELS)

# %% [markdown]
# ### 3.2 Quantize · 20 points
# Round a tensor to NF4: cut it into blocks, scale each by its largest magnitude, and find the nearest level for every value.
#
# - `x` of any shape, float32 or of 16 bits; blocks are runs of `blocksize` values of the *flattened* tensor, whatever its rows are; the last may
#   be shorter → `(indices, absmax)`
# - `indices` uint8 from 0 to 15, of `x`'s shape; `absmax` float32, one for each block
# - A block of zeros has an absmax of 0, and its values get the index of the level 0.
#
# <details><summary>Hint 1</summary>Fill the last block up with zeros (<code>F.pad</code>), so that <code>view(-1, blocksize)</code> works. At the end cut
# them off.</details>
# <details><summary>Hint 2</summary>Nearest: the distance to all sixteen levels and <code>argmin</code> is right and takes sixteen times the memory. Where
# does the nearest level change from one to the next? <code>torch.bucketize</code> finds between which of such points a value lies.</details>
# <details><summary>Hint 3</summary>0 / 0 is not a number. <code>clamp(min=…)</code> the divisor, not the absmax that you return.</details>


# %% nbgrader={"grade": false, "grade_id": "nf4-quantize", "locked": false, "schema_version": 3, "solution": true, "task": false}
def quantize(x, blocksize):
    """x to the nearest of LEVELS, block by block.   → indices, uint8 of x's shape, and absmax, float32 (blocks,)"""
    ### BEGIN SOLUTION
    flat = x.float().flatten()
    blocks = F.pad(flat, (0, -len(flat) % blocksize)).view(-1, blocksize)
    absmax = blocks.abs().amax(dim=1)
    scaled = blocks / absmax.clamp(min=1e-38).unsqueeze(1)
    midpoints = ((LEVELS[:-1] + LEVELS[1:]) / 2).to(x.device)  # the nearest level changes half-way between two
    indices = torch.bucketize(scaled, midpoints, out_int32=True).to(torch.uint8)
    return indices.flatten()[: len(flat)].view(x.shape), absmax
    ### END SOLUTION


# %% nbgrader={"grade": true, "grade_id": "nf4-quantize-test", "locked": true, "points": 20, "schema_version": 3, "solution": false, "task": false}
check("nf4.quantize", quantize)
### BEGIN HIDDEN TESTS
grade("nf4.quantize", quantize)
### END HIDDEN TESTS

# %% [markdown]
# **See what your code did.** Two blocks of 32 in each row, and one outlier of 9 in row 10, far beyond the colours. The last panel shows what is
# lost: **where is it lost?**

# %%
explore.quantize_picture(quantize)

# %% [markdown]
# ### 3.3 Two in a byte · 10 points
# A tensor of indices takes a byte for each, half of it empty. Put two into one.
#
# - `indices` uint8 from 0 to 15, of any shape, $n$ of them → uint8 ($\lceil n/2 \rceil$,)
# - Of each pair the first takes the high half of the byte (the high *nibble*), the second the low half, as bitsandbytes has it.
# - If $n$ is odd, the last byte is filled up with 7, the index of the level 0.
#
# <details><summary>Hint 1</summary><code>x &lt;&lt; 4</code> moves the bits of x up by four places; <code>|</code> lays two numbers' bits over one
# another.</details>
# <details><summary>Hint 2</summary><code>flat[::2]</code> are the elements at even places, <code>flat[1::2]</code> those at odd ones.</details>


# %% nbgrader={"grade": false, "grade_id": "qlora-pack", "locked": false, "schema_version": 3, "solution": true, "task": false}
def pack_nibbles(indices):
    """Two 4-bit indices a byte, the first of each pair in the high half.   uint8, n elements   →   uint8 (⌈n / 2⌉,)"""
    ### BEGIN SOLUTION
    flat = indices.flatten()
    flat = F.pad(flat, (0, len(flat) % 2), value=7)
    return (flat[::2] << 4) | flat[1::2]
    ### END SOLUTION


# %% nbgrader={"grade": true, "grade_id": "qlora-pack-test", "locked": true, "points": 10, "schema_version": 3, "solution": false, "task": false}
check("qlora.pack", pack_nibbles)
### BEGIN HIDDEN TESTS
grade("qlora.pack", pack_nibbles)
### END HIDDEN TESTS

# %% [markdown]
# **See what your code did.** Eight indices and the four bytes that hold them, bit by bit. A thick red edge marks a bit that is wrong.

# %%
explore.pack_picture(pack_nibbles)

# %% [markdown]
# ### 3.4 And back · 10 points
# Look each index up in the table and multiply by the absmax of *its* block.
#
# - `indices` uint8, any shape; `absmax` float32 (blocks,); `blocksize` as it was → float32 of `indices`' shape
#
# <details><summary>Hint 1</summary>torch takes a uint8 tensor in brackets for a mask. <code>.long()</code> makes it places.</details>
# <details><summary>Hint 2</summary>Which scale belongs to value number i of the flattened tensor? <code>repeat</code> and
# <code>repeat_interleave</code> differ in just this.</details>


# %% nbgrader={"grade": false, "grade_id": "nf4-dequantize", "locked": false, "schema_version": 3, "solution": true, "task": false}
def dequantize(indices, absmax, blocksize):
    """LEVELS[index] · absmax of the index's block.   → float32 of indices' shape"""
    ### BEGIN SOLUTION
    scales = absmax.repeat_interleave(blocksize)[: indices.numel()].view(indices.shape)
    return LEVELS.to(indices.device)[indices.long()] * scales
    ### END SOLUTION


# %% nbgrader={"grade": true, "grade_id": "nf4-dequantize-test", "locked": true, "points": 10, "schema_version": 3, "solution": false, "task": false}
check("nf4.dequantize", dequantize)
### BEGIN HIDDEN TESTS
grade("nf4.dequantize", dequantize)
### END HIDDEN TESTS

# %% [markdown]
# **See what your code did.** Indices, your weights, and the difference to the right ones, which should be blank.

# %%
explore.dequantize_picture(dequantize)

# %% [markdown]
# ### 3.5 Quantize the scales · 10 points
# One float32 scale for 64 weights is half a bit a weight. The scales are just another tensor, so quantize them: to 8 bits, in blocks of 256, with one float32 scale
# for each of *these* blocks.
#
# The 8-bit table below is the *dynamic* type of the authors' earlier paper: 256 levels, seven decades of either sign, each cut into twice as many levels as the one below.
# Scales are magnitudes and never negative, so half of the table would be wasted on them. Therefore their mean is taken off first, and kept as one number, the `offset`.
#
# - `absmax` float32 (n,); `levels` float32 (256,), ascending, within $[-1, 1]$; `blocksize` → `(codes, scales, offset)`
# - `codes` uint8 (n,): the nearest level of (absmax − offset) ÷ scale of its block; `scales` float32, one a block, the largest magnitude of absmax − offset in it;
#   `offset` float32, a tensor without dimensions, the mean of all absmax
# - so that absmax ≈ levels[codes] · scale of the block + offset
# - Where nothing is left after the mean is off, the scale of the block is 0, and its codes are the one of the level 0.
#
# <details><summary>Hint 1</summary>After the mean is off, this is 3.2 with another table. The last block may be short here too.</details>
# <details><summary>Hint 2</summary>All scales may be equal; then nothing is left after the mean is off. What is 0 / 0?</details>


# %%
def dynamic_levels():
    """256 levels: 0, 1, and for i = 0 … 6 the middles of 2^i equal parts of the decade below 10^(i − 6), of either sign."""
    levels = [0.0, 1.0]
    for i in range(7):
        edges = torch.linspace(0.1, 1, 2**i + 1)
        middles = (10.0 ** (i - 6) * (edges[:-1] + edges[1:]) / 2).tolist()
        levels += middles + [-middle for middle in middles]
    return torch.tensor(sorted(levels))


# %% nbgrader={"grade": false, "grade_id": "qlora-double", "locked": false, "schema_version": 3, "solution": true, "task": false}
def double_quantize(absmax, levels, blocksize):
    """Scales to 8 bits.   absmax: (n,)   →   codes, uint8 (n,); scales, float32 (⌈n / blocksize⌉,); offset, float32 ()"""
    ### BEGIN SOLUTION
    offset = absmax.mean()
    count = len(absmax)
    blocks = F.pad(absmax - offset, (0, -count % blocksize)).view(-1, blocksize)
    scales = blocks.abs().amax(dim=1)
    scaled = blocks / scales.clamp(min=1e-38).unsqueeze(1)
    codes = torch.bucketize(scaled, (levels[:-1] + levels[1:]) / 2).to(torch.uint8)
    return codes.flatten()[:count], scales, offset
    ### END SOLUTION


# %% nbgrader={"grade": true, "grade_id": "qlora-double-test", "locked": true, "points": 10, "schema_version": 3, "solution": false, "task": false}
check("qlora.double", double_quantize)
### BEGIN HIDDEN TESTS
grade("qlora.double", double_quantize)
### END HIDDEN TESTS

# %% [markdown]
# **See what your code did.** Scales of 512 blocks, how often each of your codes is used, and the error that is left. **Take the offset out of your code and draw it again:
# which half of the codes is never used?**

# %%
explore.double_picture(double_quantize, dynamic_levels())

# %% [markdown]
# ### 3.6 A layer that learns beside 4 bits · 15 points
# Put it together: a frozen layer held in 4 bits with a LoRA branch beside it.
#
# - `x` (batch, in); `packed` uint8, the indices of $W$ (out, in) as `pack_nibbles` packs them; `absmax` float32, one for each block; `levels` (16,), `blocksize`;
#   `A` (r, in), `B` (out, r), `scale` a number → $y = x W^\top + \text{scale} \cdot x A^\top B^\top$, (batch, out)
# - Gradients for `x`, `A` and `B`. None for `absmax` and `levels`, even if these ask for one.
# - The dequantized $W$ must **not be kept for the backward pass**. `F.linear(x, W)` would keep it, since the gradient of `x` needs it: with all layers
#   waiting for their backward pass, that is the float model again. Unpack it a second time instead.
#
# For the last point write a `torch.autograd.Function` whose `forward` and `backward` both unpack. It may stand inside your function:
#
# ```python
# class Product(torch.autograd.Function):
#     @staticmethod
#     def forward(ctx, x): ...        # → y
#     @staticmethod
#     def backward(ctx, grad): ...    # gradient of y → gradient of x
# y = Product.apply(x)
# ```
#
# <details><summary>Hint 1</summary>Unpacking: <code>packed &gt;&gt; 4</code> is the high half, <code>packed &amp; 15</code> the low one. How do you bring them back into
# turns? And what if out · in is odd?</details>
# <details><summary>Hint 2</summary>y = x Wᵀ. So what is the gradient of x, given that of y, in shapes (batch, out) → (batch, in)?</details>
# <details><summary>Hint 3</summary>A function defined inside <code>linear_4bit</code> that returns W can be called from <code>forward</code> and from
# <code>backward</code>. The branch is ordinary torch; leave it to autograd.</details>


# %% nbgrader={"grade": false, "grade_id": "qlora-linear", "locked": false, "schema_version": 3, "solution": true, "task": false}
def linear_4bit(x, packed, absmax, levels, blocksize, A, B, scale):
    """y = x Wᵀ + scale · x Aᵀ Bᵀ with W in 4 bits.   x: (batch, in)   A: (r, in)   B: (out, r)   →   (batch, out)"""

    ### BEGIN SOLUTION
    def weight():
        """W (out, in), unpacked anew at each call."""
        shape = B.shape[0], A.shape[1]
        indices = torch.stack([packed >> 4, packed & 15], dim=1).flatten()[: math.prod(shape)]
        scales = absmax.repeat_interleave(blocksize)[: len(indices)]
        return (levels[indices.long()] * scales).view(shape).to(x.dtype)

    class Product(torch.autograd.Function):
        """x → x Wᵀ; the gradient goes to x alone, and nothing is kept for it."""

        @staticmethod
        def forward(ctx, x):
            return x @ weight().T

        @staticmethod
        def backward(ctx, grad):
            return grad @ weight()

    return Product.apply(x) + scale * (x @ A.T @ B.T)
    ### END SOLUTION


# %% nbgrader={"grade": true, "grade_id": "qlora-linear-test", "locked": true, "points": 15, "schema_version": 3, "solution": false, "task": false}
check("qlora.linear", linear_4bit)
### BEGIN HIDDEN TESTS
grade("qlora.linear", linear_4bit)
### END HIDDEN TESTS

# %% [markdown]
# **See what your code did.** The base is a small layer rounded to 4 bits; the goal is the layer as it was before rounding, plus a change of rank 2. Your branch learns it.
# The dashed line is a branch of zeros. **Why does the loss not reach zero?**

# %%
explore.linear_picture(linear_4bit)

# %% [markdown]
# ## 4 · Measure: sixteen levels on real weights
# From here on the course's own functions stand beside yours: other tables, the file of pages, the bill.

# %%
quantize_used = passing("nf4.quantize", quantize)
dequantize_used = passing("nf4.dequantize", dequantize)
pack_used = passing("qlora.pack", pack_nibbles)
double_used = passing("qlora.double", double_quantize)
linear_used = passing("qlora.linear", linear_4bit)

from lecturekit.compression.nf4 import (
    bits_per_parameter,
    dequantize_with,
    double_dequantize,
    e2m1_levels,
    fp4_levels,
    int4_levels,
    quantize_with,
    unpack,
)
from lecturekit.compression.paged import PagedAdamW
from lecturekit.compression.qlora import Linear4bit, guanaco_sizes, memory_bill, quantize_model
from lecturekit.tuning import lora
from lecturekit.tuning.lora import add_lora

DYNAMIC_LEVELS = dynamic_levels()
BLOCKSIZE, DOUBLE_BLOCKSIZE = 64, 256  # as in the paper

# %%
model, tokenizer = load_language_model(dtype=torch.float32)
model.requires_grad_(False)
linears = {n: m for n, m in model.named_modules() if isinstance(m, nn.Linear) and n != "lm_head"}
all_parameters = sum(p.numel() for p in model.parameters())
linear_parameters = sum(m.weight.numel() for m in linears.values())
print(f"{all_parameters:,} parameters, {linear_parameters:,} of them in {len(linears)} linear layers of the blocks")
if not FULL:  # the first two blocks are enough to walk the path
    linears = dict(list(linears.items())[:14])
    linear_parameters = sum(m.weight.numel() for m in linears.values())

# %% [markdown]
# The embeddings, which are the output head too, and the norms stay as they are, as in the paper. In this small model with its large
# vocabulary they are a fifth of all parameters; in LLaMA-65B, one in a hundred.
#
# <div class="alert alert-info"><b>These weights have been in 4 bits before.</b> The file that this course can fetch without an account holds SmolLM2 as Q4_1: sixteen evenly spaced
# values between the smallest and the largest of each 32 weights. Unpacked, it is <i>the float model</i> here, and everything below is compared with it. Rounding to Q4_1 again
# would find the same grid and look lossless, so it is not in the race: INT4 is symmetric here, with blocks of 64. Expect the figures of an original checkpoint to differ from
# ours.</div>
#
# ### 4.1 Which type?
# The text is ours: the first 128 tokens of twenty pages about islands that do not exist, so that nothing can be recalled. One quantized model after the other reads
# it. All read the same words, so what counts is the difference *on the same text*; the intervals come from drawing the twenty texts again and again, with replacement (a *bootstrap*).

# %%
TOKENS = 128 if FULL else 24
pages = list(data.load("invented_world")["documents"])[: 20 if FULL else 4]
texts = torch.tensor([tokenizer(page["text"]).input_ids[:TOKENS] for page in pages], device=device())
print(tokenizer.decode(texts[0][:40]), "…")


@torch.no_grad()
def nats(model):
    """The mean −log P of a token of each text: (texts,). exp of its mean is the perplexity."""
    found = []
    for ids in texts.split(5):
        logits = model(ids, use_cache=False).logits[:, :-1]
        found.append(F.cross_entropy(logits.transpose(1, 2), ids[:, 1:], reduction="none").mean(1))
    return torch.cat(found).cpu()


def with_interval(values):
    """Mean of the values, and the 95 % interval of it when they are drawn again with replacement: (mean, low, high)."""
    values = values.double()
    drawn = torch.randint(len(values), (4000, len(values)), generator=torch.Generator().manual_seed(0))
    low, high = values[drawn].mean(1).quantile(torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()
    return values.mean().item(), low, high


def ratio(of, to):
    """Perplexity ÷ perplexity on the same texts, with its 95 % interval."""
    return tuple(math.exp(end) for end in with_interval(of - to))


# %% [markdown]
# NF4 is rounded by *your* functions. The others use the course's, which take the table as an argument. "FP4 bnb" is the FP4 of bitsandbytes, which differs from E2M1 in one magnitude: the smallest
# lies almost at zero.

# %%
rounded_model = copy.deepcopy(model)  # its weights are written over by each type in turn
errors, found_nats = {}, {}


def read_with(name, round_trip):
    """Write round_trip(layer's name, weight) into all layers, note the relative errors, let the model read."""
    errors[name] = torch.empty(len(linears))
    for i, (layer, linear) in enumerate(progress(linears.items(), name)):
        back = round_trip(layer, linear.weight)
        errors[name][i] = (back - linear.weight).norm() / linear.weight.norm()
        rounded_model.get_submodule(layer).weight.data.copy_(back)
    found_nats[name] = nats(rounded_model)


indices, scales, packed_bytes = {}, {}, 0


def nf4_round_trip(layer, weight):
    global packed_bytes
    indices[layer], scales[layer] = quantize_used(weight, BLOCKSIZE)
    packed = pack_used(indices[layer])
    assert torch.equal(unpack(packed, weight.shape), indices[layer]), "packing must lose nothing"
    packed_bytes += packed.nbytes
    return dequantize_used(indices[layer], scales[layer], BLOCKSIZE)


def round_trip_with(levels, blocksize):
    """A round trip with another table or block size; None for one scale a tensor."""
    table = levels.to(device())
    return lambda _, weight: dequantize_with(
        table, *quantize_with(table, weight, blocksize or weight.numel()), blocksize or weight.numel()
    )


found_nats["float"] = nats(model)
read_with("NF4", nf4_round_trip)
for name, levels in {"E2M1": e2m1_levels(), "FP4 bnb": fp4_levels(), "INT4": int4_levels()}.items():
    read_with(name, round_trip_with(levels, BLOCKSIZE))

TYPES = ("NF4", "E2M1", "FP4 bnb", "INT4")
perplexity_float = math.exp(found_nats["float"].mean())
print(f"float: perplexity {perplexity_float:.1f}")
worse = {name: ratio(found_nats[name], found_nats["float"]) for name in TYPES}
for name in TYPES:
    middle, low, high = worse[name]
    error = errors[name]
    print(
        f"{name:7} relative error {error.mean():.4f} (layers {error.min():.3f} to {error.max():.3f}), "
        f"perplexity × {middle:.3f} ({low:.3f} to {high:.3f})"
    )
better = {name: ratio(found_nats[name], found_nats["NF4"]) for name in TYPES[1:]}
for name, (middle, low, high) in better.items():
    verdict = "apart" if low > 1 or high < 1 else "not apart on these texts"
    print(f"{name:7} ÷ NF4: perplexity × {middle:.3f} ({low:.3f} to {high:.3f}), {verdict}")
fp4_to_e2m1 = ratio(found_nats["FP4 bnb"], found_nats["E2M1"])
print("FP4 bnb ÷ E2M1: perplexity × {:.3f} ({:.3f} to {:.3f})".format(*fp4_to_e2m1))

# %% [markdown]
# Are these the codes that bitsandbytes, the library of QLoRA's authors, computes? Both read the same weights:

# %%
codes_differ = codes_compared = 0
logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # it tells of a faster kernel that is not installed
try:
    from bitsandbytes.functional import quantize_4bit
except ImportError as missing:  # as on Colab
    print(f"left out here: {missing}")
else:
    for linear in progress(linears.values(), "bitsandbytes"):
        peer_packed, _ = quantize_4bit(linear.weight, blocksize=BLOCKSIZE, quant_type="nf4", compress_statistics=False)
        own, _ = quantize_with(LEVELS.to(device()), linear.weight, BLOCKSIZE)
        codes_differ += (unpack(peer_packed.flatten(), own.shape) != own).sum().item()
        codes_compared += own.numel()
    print(f"{codes_differ} of {codes_compared:,} codes differ")

# %%
fig, (left, right) = style.figure(1, 2, width=5)
colours = [style.BLUE, style.GREEN, style.PURPLE, style.VERMILION]
style.bars(left, TYPES, [100 * errors[name].mean().item() for name in TYPES], "{:.1f} %", color=colours)
left.set(title="error of the weights, relative", ylabel="% of the norm")
for place, (name, colour) in enumerate(zip(TYPES, colours)):
    middle, low, high = worse[name]
    right.errorbar(place, middle, [[middle - low], [high - middle]], fmt="o", color=colour, capsize=5)
    right.annotate(f"{middle:.2f}", (place, middle), textcoords="offset points", xytext=(10, -4))
right.axhline(1, color=style.GREY, linestyle="--", linewidth=1.5)
right.set(title="perplexity ÷ float model", xlim=(-0.5, 3.6))
right.set_xticks(range(4), TYPES)
told = "; ".join(
    f"{name}: error {100 * errors[name].mean():.1f} %, perplexity times {worse[name][0]:.2f}" for name in TYPES
)
style.alt(fig, f"Left the relative error of the weights by type, right the perplexity with 95 % intervals. {told}.")

# %% [markdown]
# The paper (its table 2, mean of many models from 125 million to 13 billion parameters) finds the order Int4 34.3, E2M1 31.1, E3M0 29.5, NF4 with double quantization 27.4. Yours is to be
# read with its intervals: which neighbours are *apart*? And **the error of the weights is not the perplexity**: on these texts bitsandbytes' FP4 has the larger error and not
# the higher perplexity (last line), on news text, tried while this lab was made, it was the worst of the four. Twenty pages of one kind do not settle an order of types.
#
# A fifth and more is a large damage. A small model may have less to spare than a large one, and this one has been rounded before; we did not test which it is. In the paper training makes good for the loss, which is
# what section 5 tests.
#
# ### 4.2 Are the weights normal?
# The levels are made for a normal distribution. Choose a layer, a type and a block size: **which type uses its sixteen indices most evenly? What do larger blocks do to that?**

# %%
SHOWN = [f"model.layers.{block}.{part}" for block in (0, 15, 29) for part in ("self_attn.q_proj", "mlp.down_proj")]
shown_weights = {name.removeprefix("model.layers."): model.get_submodule(name).weight for name in SHOWN}
explore.layer_picker(shown_weights)

# %% [markdown]
# The same without menus, for print:

# %%
explore.layer_picture(shown_weights["15.mlp.down_proj"], "15.mlp.down_proj", "NF4", BLOCKSIZE)

# %%
for kind in explore.KINDS:
    shares, entropy = explore.use_of_levels(shown_weights, BLOCKSIZE, kind)
    print(f"{kind:10} {entropy:.2f} bits of {math.log2(len(shares)):.2f}; the rarest index {shares.min():.1%}")

# %% [markdown]
# NF4's indices carry the most bits, because it has sixteen; E2M1 uses its fifteen at least as evenly, yet its error is larger (4.1). INT4 spends its levels where few weights are. Nor is NF4 near even: its rarest index is used several times less often
# than its commonest. Its levels are quantiles of *one* normal distribution, while each block is scaled by its own largest value. In a block of 64 one value, its largest, is sure to lie on an end; on average about one more comes near
# enough.
#
# ### 4.3 Block size, outliers, and what scales cost
# The error of six layers for blocks of 16 to 4096, and with one scale for the whole tensor.

# %%
SIZES = (16, 32, 64, 128, 256, 1024, 4096, None)


def error_with(blocksize, restored=lambda absmax: absmax):
    """Relative error of NF4 over the six layers together, and bits a weight with float32 scales.

    restored: what becomes of the scales before they are used.
    """
    lost = norm = count = blocks = 0
    for weight in shown_weights.values():
        size = blocksize or weight.numel()
        codes, absmax = quantize_used(weight, size)
        back = dequantize_used(codes, restored(absmax), size)
        lost += (back - weight).square().sum().item()
        norm += weight.square().sum().item()
        count += weight.numel()
        blocks += len(absmax)
    return math.sqrt(lost / norm), 4 + 32 * blocks / count


block_errors = {size: error_with(size) for size in progress(SIZES, "block sizes")}
for size, (error, bits) in block_errors.items():
    print(f"blocks of {size or 'all':>4}: {bits:.3f} bits a weight, relative error {error:.4f}")

# %% [markdown]
# What makes a large block bad is its outliers. Below, the largest magnitude of each block over its root mean square, for all layers, beside what 64 draws from a normal distribution would give; and
# the relative error of the blocks by that ratio.

# %%
ratios, block_losses = [], []
for layer, linear in linears.items():
    blocks = linear.weight.view(-1, BLOCKSIZE)
    norm = blocks.norm(dim=1)
    back = dequantize_used(indices[layer], scales[layer], BLOCKSIZE).view(-1, BLOCKSIZE)
    ratios.append(scales[layer] / norm * math.sqrt(BLOCKSIZE))
    block_losses.append((back - blocks).norm(dim=1) / norm)
ratios, block_losses = torch.cat(ratios).cpu(), torch.cat(block_losses).cpu()
normal = torch.randn(100_000, BLOCKSIZE, generator=torch.Generator().manual_seed(SEED))
normal_ratios = normal.abs().amax(1) / normal.square().mean(1).sqrt()
tensor_ratio, tensor_name = max(
    ((m.weight.abs().max() / m.weight.square().mean().sqrt()).item(), name) for name, m in linears.items()
)
print(f"blocks of 64: the middle ratio is {ratios.median():.2f}, for normal numbers {normal_ratios.median():.2f}")
print(f"blocks beyond 4: {(ratios > 4).float().mean():.2%}, of normal numbers {(normal_ratios > 4).float().mean():.2%}")
print(f"a whole tensor: up to {tensor_ratio:.0f}, in {tensor_name}")

fig, (left, right) = style.figure(1, 2, width=5.2)
edges = torch.linspace(1.5, 6, 46)
for values, colour, label in ((ratios, style.BLUE, "SmolLM2"), (normal_ratios, style.GREY, "normal")):
    share = torch.histogram(values, edges).hist / len(values)
    left.step(edges[:-1], 100 * share, where="post", color=colour, label=label)
left.set(title="blocks by their outlier", xlabel="largest magnitude ÷ RMS of the block", ylabel="% of the blocks")
left.legend()
place = torch.bucketize(ratios, edges)
drawn = [i for i in range(1, len(edges)) if (place == i).sum() >= 50]
means = [100 * block_losses[place == i].mean().item() for i in drawn]
right.plot([(edges[i - 1] + edges[i]).item() / 2 for i in drawn], means, color=style.BLUE)
right.set(title="and their error", xlabel="largest magnitude ÷ RMS of the block", ylabel="relative error, %")
right.set_ylim(0, None)
style.alt(
    fig,
    f"Left, how many blocks have which ratio of largest magnitude to root mean square: the middle is {ratios.median():.2f}, for normal numbers "
    f"{normal_ratios.median():.2f}. Right, the relative error of a block over that ratio, from {means[0]:.1f} to {means[-1]:.1f} %.",
)

# %% [markdown]
# The typical block looks like 64 normal numbers; blocks with a large outlier are rare, but several times as frequent as the normal distribution has it, and their error is larger. The blocks keep that to themselves. Over
# a whole tensor one weight can be many times the RMS, and with one scale it takes the levels away from all others. What does that do to the model? Next, it reads with blocks of 256 too, and with one scale a tensor.
#
# ### 4.4 Double quantization: a bill of bytes
# Scales for blocks of 64 cost half a bit a weight. Larger blocks would save that; so does quantizing the scales. Blocks of 256 with float32 scales and blocks of 64 with 8-bit scales take the same
# memory, to two thousandths of a bit. **Which is the better use of it?**

# %%
double_parts = {"codes": 0, "scales of scales": 0, "offsets": 0}
double_errors = []


def doubly_quantized(absmax):
    return double_used(absmax, DYNAMIC_LEVELS.to(absmax.device), DOUBLE_BLOCKSIZE)


def double_round_trip(layer, weight):
    absmax = scales[layer]
    held = doubly_quantized(absmax)
    for part, tensor in zip(double_parts, held):
        double_parts[part] += tensor.nbytes
    restored = double_dequantize(*held, DOUBLE_BLOCKSIZE)
    double_errors.append(((restored - absmax).norm() / absmax.norm()).item())
    return dequantize_used(indices[layer], restored, BLOCKSIZE)


read_with("NF4, 8-bit scales", double_round_trip)
read_with("NF4, blocks of 256", round_trip_with(LEVELS, 256))
read_with("NF4, one scale a tensor", round_trip_with(LEVELS, None))

scale_bytes = sum(absmax.nbytes for absmax in scales.values())
bits_single = 8 * (packed_bytes + scale_bytes) / linear_parameters
bits_double = 8 * (packed_bytes + sum(double_parts.values())) / linear_parameters
print(f"{linear_parameters:,} weights")
print(f"{'indices, two a byte':34} {packed_bytes:>12,} bytes  {8 * packed_bytes / linear_parameters:.4f} bits a weight")
print(
    f"{'float32 scales':34} {scale_bytes:>12,} bytes  {8 * scale_bytes / linear_parameters:.4f}   sum {bits_single:.4f}"
)
for part, size in double_parts.items():
    print(f"or {part:31} {size:>12,} bytes  {8 * size / linear_parameters:.4f}")
print(f"{'':34} {'':>12}        sum {bits_double:.4f}, by the formula {bits_per_parameter(double=True):.4f}")
print(f"error of the scales {100 * statistics.mean(double_errors):.2f} %\n")
VARIANTS = ("NF4", "NF4, 8-bit scales", "NF4, blocks of 256", "NF4, one scale a tensor")
variants = {name: ratio(found_nats[name], found_nats["float"]) for name in VARIANTS}
for name, (middle, low, high) in variants.items():
    print(f"{name:24} error {errors[name].mean():.4f}, perplexity × {middle:.3f} ({low:.3f} to {high:.3f})")
double_cost = ratio(found_nats["NF4, 8-bit scales"], found_nats["NF4"])
equal_bytes = ratio(found_nats["NF4, blocks of 256"], found_nats["NF4, 8-bit scales"])
print("8-bit scales ÷ float32 scales:     perplexity × {:.4f} ({:.4f} to {:.4f})".format(*double_cost))
print("at equal bytes, blocks of 256 ÷ 64: perplexity × {:.3f} ({:.3f} to {:.3f})".format(*equal_bytes))

# %%
fig, (left, right) = style.figure(1, 2, width=5.4)
bill = {
    "float32\nscales": {"indices": packed_bytes, "scales": scale_bytes},
    "8-bit\nscales": {"indices": packed_bytes, "scales": double_parts["codes"], "scales of scales": sum(double_parts.values()) - double_parts["codes"]},
}  # fmt: skip
for place, parts in enumerate(bill.values()):
    bottom = 0.0
    for part, colour in (("indices", style.BLUE), ("scales", style.VERMILION), ("scales of scales", style.GREEN)):
        height = 8 * parts.get(part, 0) / linear_parameters
        left.bar(place, height, 0.6, bottom=bottom, color=colour, label=part if place == 1 else None)
        bottom += height
    left.text(place, bottom + 0.06, f"{bottom:.3f}", ha="center")
left.set_xticks(range(2), bill)
left.set(title="bits a weight", ylim=(0, 6.2), xlim=(-0.5, 1.5))
left.legend(loc="upper center", ncols=3, fontsize=9, columnspacing=1)
points = [(size, bits, 100 * error) for size, (error, bits) in block_errors.items() if size]
right.plot([bits for _, bits, _ in points], [error for _, _, error in points], "o-", color=style.BLUE)
for size, bits, error in points:
    right.annotate(str(size), (bits, error), textcoords="offset points", xytext=(6, 5), fontsize=10)
double_error, _ = error_with(BLOCKSIZE, lambda absmax: double_dequantize(*doubly_quantized(absmax), DOUBLE_BLOCKSIZE))
right.plot(bits_double, 100 * double_error, "*", color=style.VERMILION, markersize=15, label="64, 8-bit scales")
right.set(title="error over bits, by block size", xlabel="bits a weight", ylabel="relative error, %")
right.legend()
style.alt(
    fig,
    f"Left, bits a weight: {bits_single:.3f} with float32 scales, {bits_double:.3f} with 8-bit scales. Right, error over bits a weight for blocks from 16 "
    f"to 4096: the error rises from {points[0][2]:.1f} to {points[-1][2]:.1f} % as the bits fall. A star marks blocks of 64 with 8-bit scales, well below the curve.",
)

# %% [markdown]
# The formula is $4 + \frac{8}{64} + \frac{32}{64 \cdot 256} = 4.127$; the bill is a ten-thousandth of a bit above it: mostly the offsets, one a layer, which the formula leaves out, and last blocks of scales that are not full. Quantizing the scales costs next to nothing in perplexity, if anything that can be seen
# on these texts; fewer scales cost more. And one scale for a whole tensor, the misconception of 3.2, is not a slightly worse model but no model at all.
#
# ## 5 · Measure: a fine-tune over 4-bit weights
# The café of lab 5: each order becomes one line for the kitchen. *Could I get two large mochas for Grace, to go?* becomes `Grace | 2 large mocha | GO`. The notation is invented.
# We train LoRA branches of rank 8 twice, over the float model and over the 4-bit one.

# %%
orders = data.load("cafe_orders")
train_rows = list(orders["train"])
test_rows = list(orders["test"])[: 48 if FULL else 4]
PAD = 0  # <|endoftext|>, which occurs in no prompt
STOP = tokenizer.convert_tokens_to_ids("<|im_end|>")


def encode(row):
    """The token ids of an order, up to where the answer begins, and those of its ticket."""
    chat = [{"role": "user", "content": f"Order: {row['order']}\nTicket:"}]
    prompt = tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
    return tokenizer(prompt).input_ids, [*tokenizer(row["ticket"]).input_ids, STOP]


TAIL = 1 + max(len(encode(row)[1]) for row in [*train_rows, *orders["test"]])


def make_batch(rows):
    """Orders and tickets, padded on the left, so that all tickets end together: ids (batch, seq), labels (batch, TAIL)."""
    pairs = [encode(row) for row in rows]
    longest = max(len(prompt) + len(ticket) for prompt, ticket in pairs)
    ids = [[PAD] * (longest - len(p) - len(t)) + p + t for p, t in pairs]
    labels = [[-100] * (TAIL - len(ticket)) + ticket for _, ticket in pairs]
    return torch.tensor(ids, device=device()), torch.tensor(labels, device=device())


def ticket_nats(model, ids, labels):
    """−log P of each token of the tickets, 0 where there is none: (batch, TAIL − 1), and how many there are."""
    logits = model(ids, attention_mask=ids != PAD, logits_to_keep=TAIL, use_cache=False).logits[:, :-1]
    losses = F.cross_entropy(logits.transpose(1, 2), labels[:, 1:], reduction="none")  # −100 is left out
    return losses, (labels[:, 1:] != -100).sum(1)


def loss_of(model, rows):
    losses, counts = ticket_nats(model, *make_batch(rows))
    return losses.sum() / counts.sum()


@torch.no_grad()
def held_out(model):
    """The mean −log P of a token of each held-out ticket: (orders,)."""
    found = []
    for start in range(0, len(test_rows), 16):
        losses, counts = ticket_nats(model, *make_batch(test_rows[start : start + 16]))
        found.append(losses.sum(1) / counts)
    return torch.cat(found).cpu()


def shown(found):
    """A perplexity and its interval from one number an order, as a text."""
    return "{:.2f} ({:.2f} to {:.2f})".format(*(math.exp(end) for end in with_interval(found)))


# %% [markdown]
# ### 5.1 Two models with the same branches
# `add_lora` puts the branches in, `quantize_model` then replaces every linear layer of the blocks, those inside the branches too, by a `Linear4bit`: the course's version of your 3.6 (compared below) with the scales of 3.5. All
# branches start alike, so the only difference is what they stand beside.

# %%
R, ALPHA = 8, 16
TARGETS = ["q_proj", "v_proj", "up_proj", "down_proj"]
indices.clear()  # one byte for each weight, no longer needed
rounded_model = None


def branches(model):
    """The parameters that train, by name."""
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def with_branches(model, seed=SEED):
    """A copy of the model with branches that start alike for one seed."""
    copied = add_lora(copy.deepcopy(model), TARGETS, R, ALPHA)
    generator = torch.Generator().manual_seed(seed)
    for name, p in branches(copied).items():
        if name.endswith(".A"):
            p.data.copy_(torch.randn(p.shape, generator=generator) / math.sqrt(3 * p.shape[1]))
    return copied


float_model = with_branches(model)
four_bit_model = quantize_model(with_branches(model), BLOCKSIZE, double=True)
print(four_bit_model.model.layers[0].mlp.up_proj)
lora_parameters = sum(p.numel() for p in branches(four_bit_model).values())
print(f"\n{lora_parameters:,} trainable parameters, {100 * lora_parameters / all_parameters:.2f} % of the model's")


# %% [markdown]
# Does your `linear_4bit` compute what such a layer of the real model computes? And what does it keep for the backward pass, beside the plain product with a dequantized weight?


# %%
def kept_bytes(function):
    """Bytes that autograd keeps for the backward pass of function(), each tensor's memory counted once."""
    kept = {}

    def note(tensor):
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        function().sum()
    return sum(kept.values())


layer = copy.deepcopy(four_bit_model.model.layers[0].mlp.up_proj)
with torch.no_grad():
    layer.B.normal_(std=0.02, generator=torch.Generator(device=layer.B.device).manual_seed(SEED))
base = layer.base
x = torch.randn(32, base.in_features, generator=torch.Generator().manual_seed(SEED)).to(device()).requires_grad_()
absmax = double_dequantize(base.codes, base.scales, base.offset, DOUBLE_BLOCKSIZE)
arguments = (base.packed, absmax, LEVELS.to(device()), BLOCKSIZE, layer.A, layer.B, ALPHA / R)
layer_difference = (linear_used(x, *arguments) - layer(x)).abs().max().item()
kept_yours = kept_bytes(lambda: linear_used(x, *arguments))
kept_plain = kept_bytes(lambda: F.linear(x, base.weight) + ALPHA / R * F.linear(F.linear(x, layer.A), layer.B))
print(f"largest difference to the model's layer: {layer_difference:.1e}, outputs up to {layer(x).abs().max():.1f}")
print(f"kept for the backward pass: {kept_yours:,} bytes; with a plain product {kept_plain:,}")
print(f"the dequantized weight alone: {base.weight.nbytes:,}")

# %% [markdown]
# ### 5.2 The bill of memory
# One training step on the same four orders, three ways. **Weights**, **gradients** and **optimizer** are counted over the tensors that hold them; **activations** are what autograd keeps between the
# forward and the backward pass, counted as it is saved. What comes and goes within one operation (a dequantized weight of at most 3.5 MB) is in none of them.


# %%
def with_state(optimizer):
    """The optimizer after a step with gradients of zero, which makes its state and moves nothing."""
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    for p in parameters:
        p.grad = torch.zeros_like(p)
    optimizer.step()
    optimizer.zero_grad()
    return optimizer


def adamw(model, lr=4e-3):
    # foreach=False: one tensor after the other, the order of operations that a paged optimizer keeps too
    return torch.optim.AdamW(branches(model).values(), lr=lr, weight_decay=0.0, foreach=False)


bill_rows = train_rows[: 4 if FULL else 2]
full_model = copy.deepcopy(model).requires_grad_(True)
bills = {}
for name, tried in (("full fine-tune", full_model), ("LoRA", float_model), ("LoRA over 4 bits", four_bit_model)):
    tried.train()
    bills[name] = memory_bill(tried, lambda tried=tried: loss_of(tried, bill_rows), with_state(adamw(tried, lr=0.0)))
    tried.eval()
del full_model, tried
CATEGORIES = ("weights", "gradients", "optimizer", "activations")
print(f"{'MB':18}" + "".join(f"{category:>13}" for category in CATEGORIES) + f"{'sum':>10}")
for name, found in bills.items():
    print(f"{name:18}" + "".join(f"{found[c] / 1e6:13.1f}" for c in CATEGORIES) + f"{sum(found.values()) / 1e6:10.1f}")
memory_share = 100 * sum(bills["LoRA over 4 bits"].values()) / sum(bills["full fine-tune"].values())
embedding_bytes = model.get_input_embeddings().weight.nbytes
print(
    f"over 4 bits ÷ full fine-tune: {memory_share:.0f} %; {embedding_bytes / 1e6:.0f} MB of its weights are embeddings"
)

# %%
fig, (axes,) = style.figure(width=8, height=3.4)
start = [0.0] * len(bills)
for category, colour in zip(CATEGORIES, (style.BLUE, style.ORANGE, style.GREEN, style.PURPLE)):
    widths = [found[category] / 1e6 for found in bills.values()]
    axes.barh(range(len(bills)), widths, 0.6, left=start, color=colour, label=category)
    start = [a + b for a, b in zip(start, widths)]
for place, total in enumerate(start):
    axes.text(total, place, f" {total:,.0f} MB", va="center")
axes.set_yticks(range(len(bills)), bills)
axes.invert_yaxis()
axes.set(xlabel="MB", xlim=(0, 1.18 * max(start)), title=f"a training step on {len(bill_rows)} orders")
axes.legend(loc="lower right")
told = "; ".join(
    f"{name}: " + ", ".join(f"{c} {found[c] / 1e6:,.0f}" for c in CATEGORIES) for name, found in bills.items()
)
style.alt(fig, f"Memory of a training step in MB by category. {told}.")

# %% [markdown]
# LoRA makes gradients and optimizer all but vanish; quantization makes the weights small, all but the embeddings. What neither changes much are the **activations**: over 4 bits they are the largest part already with four orders. (The sum is an upper bound and not the peak: gradients fill up while activations are let go.)
# They grow with the batch and the width, the weights with the width *squared*, so for 65 billion parameters the weights are what counts. (The paper also recomputes activations, *gradient checkpointing*, which is left out
# here.)
#
# ### 5.3 Train both, one of them with an optimizer in pages
# `PagedAdamW` keeps AdamW's two moments in a file, and at most `budget` bytes of them in memory. To see that this changes *where* the state is and never *what* it is, a plain AdamW runs beside
# it: it gets a copy of the branches and, at each step, the same gradients. After every step all parameters are compared, bit by bit.

# %%
BUDGET = 2_000_000  # bytes of optimizer state in memory at a time
STEPS = 20 if FULL else 2


def batches(rows, size, rng):
    """Batches of orders for ever, in random order, each of orders about equally long: little is wasted on padding."""
    while True:
        shuffled = rng.sample(rows, len(rows))
        for start in range(0, len(rows), 8 * size):
            block = sorted(shuffled[start : start + 8 * size], key=lambda row: len(row["order"]))
            chunks = [block[i : i + size] for i in range(0, len(block), size)]
            yield from rng.sample(chunks, len(chunks))


def rate(step, steps):
    """The share of the learning rate: up over five steps, then down to zero in a straight line."""
    return min((step + 1) / 5, (steps - step) / max(1, steps - 5))


def fine_tune(model, optimizer, desc, after_backward=None):
    """Train the branches on the training orders. Returns the losses and the seconds of each step."""
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: rate(step, STEPS))
    source, losses, seconds = batches(train_rows, 4 if FULL else 2, random.Random(SEED)), [], []
    model.train()
    for _ in progress(range(STEPS), desc):
        begun = time.perf_counter()
        loss = loss_of(model, next(source))
        optimizer.zero_grad()
        loss.backward()
        losses.append(loss.item())
        seconds.append(time.perf_counter() - begun)
        if after_backward is None:
            optimizer.step()
        else:
            after_backward()
        schedule.step()
    model.eval()
    return losses, seconds


before = {
    "float": held_out(float_model),
    "4 bits": held_out(four_bit_model),
}  # B = 0: these are the models as they were
float_losses, float_seconds = fine_tune(float_model, adamw(float_model), "LoRA")

# %%
mine = list(branches(four_bit_model).values())
paged = PagedAdamW(mine, lr=4e-3, weight_decay=0.0, budget=BUDGET)
beside = [nn.Parameter(p.detach().clone()) for p in mine]
plain = torch.optim.AdamW(beside, lr=4e-3, weight_decay=0.0, foreach=False)
plain_schedule = torch.optim.lr_scheduler.LambdaLR(plain, lambda step: rate(step, STEPS))
equal, paged_seconds, plain_seconds = [], [], []


def step_both():
    """One step of each optimizer with the same gradients; are all parameters still the same?"""
    for p, q in zip(mine, beside):
        q.grad = p.grad.clone()
    turns = [(paged, paged_seconds), (plain, plain_seconds)]
    for optimizer, seconds in turns[:: -1 if len(equal) % 2 else 1]:  # each goes first at every other step
        begun = time.perf_counter()
        optimizer.step()
        seconds.append(time.perf_counter() - begun)
    plain_schedule.step()
    equal.append(all(torch.equal(p, q) for p, q in zip(mine, beside)))


four_bit_losses, four_bit_seconds = fine_tune(four_bit_model, paged, "LoRA over 4 bits", step_both)
state_bytes = sum(v.nbytes for s in plain.state.values() for k, v in s.items() if k.startswith("exp_avg"))
base_gradients = [
    n for n, p in four_bit_model.named_parameters() if p.grad is not None and not n.endswith((".A", ".B"))
]
print(f"steps after which paged and plain AdamW agree in every bit: {sum(equal)} of {len(equal)}")
print(f"state in all {state_bytes:,} bytes; in memory at most {paged.peak_bytes:,}, allowed {BUDGET:,}")
print(f"moved in and out: {paged.moved_bytes / len(equal) / 1e6:.1f} MB a step")
print(
    f"a step of the optimizer: paged {1e3 * statistics.median(paged_seconds):.0f} ms, plain {1e3 * statistics.median(plain_seconds):.0f} ms"
)
print(f"parameters other than A and B that got a gradient: {len(base_gradients)}")
slower = statistics.median(four_bit_seconds) / statistics.median(float_seconds)
print(f"forward and backward over 4 bits ÷ over float: {slower:.2f} (one after the other, a rough figure)")
try:
    PagedAdamW(mine, budget=4096)
except ValueError as error:
    print(f"a budget that is too small: {error}")
paged.close()
assert all(equal), "where the state lies must not change a bit of it"
assert not base_gradients and all(
    not p.requires_grad for m in four_bit_model.modules() if isinstance(m, Linear4bit) for p in m.parameters()
)

# %% [markdown]
# The state of these branches is small, and a mere 12 MB would not need a file: what is shown is that it *can* lie there. A full fine-tune of this model has a hundred times as much, and that of LLaMA-65B hundreds of
# GB. Paging is not free: each page that does not stay in memory is moved twice a step, and a disk or the bus to the host is slower than memory. (A file as small as this probably stays in the system's cache, so do not take the milliseconds above for a disk's.) In the paper it is a safety net for the peaks that long sequences bring, not the normal case.
#
# ### 5.4 What came of it
# Besides both results, a third: the branches that were trained over 4 bits, put beside the *float* layers. They learnt with the rounding errors around them. Do they miss them?

# %%
after = {"float": held_out(float_model), "4 bits": held_out(four_bit_model)}
moved_model = with_branches(model)
moved_model.load_state_dict({n: p.detach() for n, p in branches(four_bit_model).items()}, strict=False)
after["moved"] = held_out(moved_model)
rounding_cost = ratio(before["4 bits"], before["float"])
tuned_cost = ratio(after["4 bits"], after["float"])
moved_cost = ratio(after["moved"], after["4 bits"])
print(f"before: float {shown(before['float'])}, 4 bits {shown(before['4 bits'])}")
print(f"after:  float {shown(after['float'])}, 4 bits {shown(after['4 bits'])}")
print(f"branches of 4 bits beside float layers: {shown(after['moved'])}\n")
print("4 bits ÷ float, before: × {:.3f} ({:.3f} to {:.3f})".format(*rounding_cost))
print("4 bits ÷ float, after:  × {:.3f} ({:.3f} to {:.3f})".format(*tuned_cost))
print("moved ÷ 4 bits:         × {:.3f} ({:.3f} to {:.3f})".format(*moved_cost))

# %%
fig, (left, right) = style.figure(1, 2, width=5.2)
left.plot(range(1, STEPS + 1), float_losses, color=style.GREY, label="over float")
left.plot(range(1, STEPS + 1), four_bit_losses, color=style.BLUE, label="over 4 bits")
left.set(xlabel="step", ylabel="loss (nats a token)", title="training", ylim=(0, None))
left.xaxis.get_major_locator().set_params(integer=True)
left.legend()
labels = ("float", "4 bits", "float\n+ LoRA", "4 bits\n+ LoRA", "moved")
middles = [with_interval(found) for found in (*before.values(), *after.values())]
for place, (middle, low, high) in enumerate(middles):
    top, colour = math.exp(middle), style.GREY if place in (0, 2) else style.BLUE if place < 4 else style.GREEN
    right.errorbar(place, top, [[top - math.exp(low)], [math.exp(high) - top]], fmt="o", color=colour, capsize=5)
    right.annotate(f"{top:.3g}", (place, top), textcoords="offset points", xytext=(9, 3), fontsize=10)
right.set_yscale("log")
right.yaxis.set_major_formatter("{x:g}")
right.set_xticks(range(len(labels)), labels, fontsize=10)
right.set(title="perplexity of held-out tickets", xlim=(-0.4, 4.7))
told = ", ".join(f"{label} {math.exp(m[0]):.2f}".replace("\n", " ") for label, m in zip(labels, middles))
style.alt(
    fig,
    f"Left, both training losses fall, over float from {float_losses[0]:.2f} to {float_losses[-1]:.2f}, over 4 bits from {four_bit_losses[0]:.2f} to "
    f"{four_bit_losses[-1]:.2f}. Right, perplexity of held-out tickets with 95 % intervals: {told}.",
)

# %% [markdown]
# <div class="alert alert-info"><b>Read it honestly.</b> The intervals speak of other <i>orders</i>, not of another <i>training</i>: over our five seeds the ratio after training was anything from 0.98 to 1.07, with 1.05 in the median. If rounding still costs anything after the training, it is a few
# percent, and this lab cannot tell it from nothing. What is beyond doubt is the distance to where both started. And a notation is an easy thing to
# learn; the paper tests this on GLUE, Super-NaturalInstructions and MMLU, with many models, and finds no loss either.</div>
#
# And the third point: branches that were trained over 4 bits have learnt to work around *these* rounding errors. Beside the float layers, which have none, they may do worse: look at "moved ÷ 4 bits" and at whether its
# interval holds 1 (over our five seeds it was 1.02 to 1.07, never below 1). Whoever folds such branches into the 16-bit model should measure it again. Or fold them into the
# *rounded* weights, unpacked to 16 bits (`dequantize_model`, then merge): that is the model as it was trained, but for rounding to 16 bits.
#
# The file of the branches is PEFT's format, so they can be loaded over bitsandbytes' 4-bit layers too, whose 4-bit codes are ours bit by bit (of the 8-bit codes of the scales about 2 in 1000
# differ by one). Does PEFT make the same model of them?


# %%
def over_bitsandbytes():
    """The model with bitsandbytes' 4-bit layers, and how many of them hold our bytes."""
    import bitsandbytes

    peer, same = copy.deepcopy(model), 0
    for name, linear in linears.items():
        layer = bitsandbytes.nn.Linear4bit(
            linear.in_features, linear.out_features, bias=False, compute_dtype=torch.float32, quant_type="nf4"
        )
        layer.weight = bitsandbytes.nn.Params4bit(
            linear.weight.detach().clone(), requires_grad=False, quant_type="nf4", compress_statistics=True
        )
        peer.set_submodule(name, layer.to(device()))
        own = four_bit_model.get_submodule(name)
        own = getattr(own, "base", own)
        same += torch.equal(peer.get_submodule(name).weight.flatten(), own.packed.flatten())
    return peer.train(), same  # in eval() bitsandbytes would repack its weights for some processors


@torch.no_grad()
def distance(theirs, ours):
    return ((theirs - ours).norm() / ours.norm()).item()


try:
    peer, same_bytes = over_bitsandbytes()
    from peft import PeftModel
except ImportError as missing:  # as on Colab, whose own packages the course leaves alone
    print(f"left out here: {missing}")
    bare_distance = peft_distance = None
else:
    ids, _ = make_batch(test_rows[:4])
    # PEFT tells of a name that will change
    with tempfile.TemporaryDirectory() as folder, torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        lora.save(four_bit_model, folder)
        ours = four_bit_model(ids, attention_mask=ids != PAD, logits_to_keep=1).logits
        bare_distance = distance(peer(ids, attention_mask=ids != PAD, logits_to_keep=1).logits, ours)
        loaded = PeftModel.from_pretrained(peer, folder).train()
        peft_distance = distance(loaded(ids, attention_mask=ids != PAD, logits_to_keep=1).logits, ours)
    print(f"layers of bitsandbytes that hold the same bytes as ours: {same_bytes} of {len(linears)}")
    print(f"logits beside ours: without the branches {bare_distance:.2%} off, with PEFT's {peft_distance:.2%}")
    del peer, loaded

# %% [markdown]
# ### 5.5 The slide's table, from configurations alone
# How large must Guanaco be? Nothing is loaded here: the sizes of LLaMA's matrices follow from width, depth and vocabulary.

# %%
sizes = guanaco_sizes()
parts = list(sizes[0].parts)
print(f"{'GB':14}" + "".join(f"{part:>22}" for part in parts) + f"{'sum':>8}{'slide':>7}")
for row in sizes:
    print(f"{row.name:14}" + "".join(f"{row.parts[p]:22.2f}" for p in parts) + f"{row.ours_gb:8.1f}{row.paper_gb:7.0f}")
weights_65b = sizes[0].parts["4-bit weights"]
full_65b = 12 * (2 * sizes[0].parts["4-bit weights"] + sizes[0].parts["embeddings and head"] / 2)
print(f"\n65B: the 4-bit weights alone are {weights_65b:.1f} GB")
print(f"a full fine-tune of 65B, 12 bytes a parameter: {full_65b:,.0f} GB; the paper says more than 780")

# %%
fig, (axes,) = style.figure(width=8.5, height=3.6)
start = [0.0] * len(sizes)
for part, colour in zip(parts, (style.BLUE, style.VERMILION, style.ORANGE, style.BLACK, style.GREEN, style.PURPLE)):
    widths = [row.parts[part] for row in sizes]
    axes.barh(range(len(sizes)), widths, 0.6, left=start, color=colour, label=part)
    start = [a + b for a, b in zip(start, widths)]
axes.plot(
    [row.paper_gb for row in sizes], range(len(sizes)), "D", color="black", markerfacecolor="white", label="the slide"
)
axes.set_yticks(range(len(sizes)), [row.name for row in sizes])
axes.invert_yaxis()
axes.set(xlabel="GB of 10⁹ bytes", title="Guanaco from configurations alone", xlim=(0, 1.1 * max(start)))
axes.legend(loc="lower right")
told = "; ".join(f"{row.name} {row.ours_gb:.1f} GB, the slide {row.paper_gb:g}" for row in sizes)
style.alt(fig, f"Stacked bars of the sizes computed from configurations, diamonds for the slide's figures. {told}.")

# %% [markdown]
# The 4-bit weights are what the slide's figure is mostly made of, but it is always more. What is missing: 8-bit scales, embeddings and head (kept in 16 bits), the adapter, and, as far as we can tell, the memory of
# *running* the model: keys and values of 2048 tokens, for 65B another 5 GB. With them all four sums come within 1 GB of the slide, but only that of 65B rounds to its figure: 33B is a little above it, 13B and 7B are below,
# so no single part that we left out or put in explains all four. (In its table 6 the same paper gives 5 GB for 7B.) It does not say what its figures count, so keys and values are our
# reading and not a fact. The table's point stands without them: 65B fits on one GPU of 48 GB, and 7B on one that is for games. (A full fine-tune is counted with 12 bytes a parameter: 2 for the weight, 2 for its gradient, 8 for two moments in float32.)
#
# ## 6 · The paper and you

# %%
lab = "lab06_qlora"


def record(claim, quantity, paper, ours, unit="", **more):
    results.record(claim, quantity, paper, ours, unit, lab=lab, **more)


SLIDE = [-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
         -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
         0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0]  # fmt: skip
level_difference = (LEVELS.cpu().double() - torch.tensor(SLIDE, dtype=torch.float64)).abs().max().item()
record(
    "C19",
    "levels derived from normal quantiles, largest difference to the slide's",
    0,
    level_difference,
    # rounding of probabilities to float32 moves a level by up to 16 epsilons; see the check of 3.1
    holds=level_difference <= 16 * torch.finfo(torch.float32).eps,
)
paper_order = {"NF4": "27.41, with 8-bit scales", "E2M1": 31.07, "INT4": 34.34}
read = f"{len(pages)} texts of {TOKENS} tokens; float model {perplexity_float:.1f}"
for name in TYPES:
    middle, low, high = worse[name]
    record(
        "C19",
        f"relative error of the weights, {name}",
        None,
        100 * errors[name].mean().item(),
        "%",
        note="blocks of 64, mean of 210 layers",
    )
    record(
        "C19",
        f"perplexity ÷ float model, {name}",
        None,
        middle,
        spread=(low, high),
        note=f"{read}; the paper's mean perplexity: {paper_order[name]}"
        if name in paper_order
        else f"{read}; FP4 of bitsandbytes",
    )
for name, (middle, low, high) in better.items():
    record(
        "C19",
        f"perplexity, {name} ÷ NF4",
        None if name == "FP4 bnb" else round(paper_order[name] / 27.41, 3),
        middle,
        spread=(low, high),
        holds=low > 1,
        note="same texts, paired; holds when the interval is above 1",
    )
middle, low, high = variants["NF4, one scale a tensor"]
record(
    "C19",
    "perplexity ÷ float model, NF4 with one scale a tensor",
    None,
    middle,
    spread=(low, high),
    note="why there are blocks",
)
if codes_compared:
    record(
        "C19",
        "NF4 codes that differ from bitsandbytes'",
        0,
        codes_differ,
        holds=codes_differ == 0,
        note=f"of {codes_compared:,}, the course's quantizer",
    )
record("C20", "bits a weight, float32 scales", 4.5, bits_single, "bits", note="counted over the tensors")
record(
    "C20",
    "bits a weight, 8-bit scales",
    4.127,
    bits_double,
    "bits",
    # the last block of scales of a layer may be short: at most one more scale of 32 bits a layer, and one offset
    holds=0 <= bits_double - bits_per_parameter(double=True) <= 64 * len(linears) / linear_parameters,
    note="counted over the tensors; the formula leaves out the offsets, and last blocks of scales are not full",
)
record(
    "C20",
    "perplexity, 8-bit scales ÷ float32 scales",
    1,
    double_cost[0],
    spread=double_cost[1:],
    holds=double_cost[2] < 1.01,
    note="the paper: no loss; holds when the whole interval is below 1.01",
)
record(
    "C20",
    "perplexity at equal bytes, blocks of 256 with float32 scales ÷ blocks of 64 with 8-bit scales",
    None,
    equal_bytes[0],
    spread=equal_bytes[1:],
    holds=equal_bytes[1] > 1,
)
record("C21", "steps after which paged and plain AdamW agree in every bit", len(equal), sum(equal), holds=all(equal))
record(
    "C21",
    "optimizer state in memory, most",
    None,
    paged.peak_bytes / 1e6,
    "MB",
    holds=paged.peak_bytes <= BUDGET < state_bytes,
    note=f"{state_bytes / 1e6:.1f} MB in all, allowed {BUDGET / 1e6:.1f} MB",
)
record(
    "C21",
    "a step of the optimizer, paged ÷ plain AdamW",
    None,
    statistics.median(paged_seconds) / statistics.median(plain_seconds),
    seeds=[SEED],
    note="in turns, on the same gradients; the file is small enough to stay in the system's cache",
)
for name, found in bills.items():
    told = ", ".join(f"{category} {found[category] / 1e6:,.0f}" for category in CATEGORIES)
    record(
        "C22",
        f"memory of a training step, {name}",
        None,
        sum(found.values()) / 1e6,
        "MB",
        note=f"{told}; SmolLM2, {len(bill_rows)} orders",
    )
record(
    "C22",
    "held-out perplexity before training, 4 bits ÷ float",
    None,
    rounding_cost[0],
    spread=rounding_cost[1:],
    note=f"{len(test_rows)} orders, paired",
)
record(
    "C22",
    "held-out perplexity after training, 4 bits ÷ float",
    1,
    tuned_cost[0],
    spread=tuned_cost[1:],
    seeds=[SEED],
    holds=tuned_cost[2] < 1.1,
    note="the paper: no loss after fine-tuning; holds when the whole interval is below 1.1, our choice",
)
record(
    "C22",
    "branches trained over 4 bits put beside float layers ÷ as trained",
    None,
    moved_cost[0],
    spread=moved_cost[1:],
    seeds=[SEED],
)
record(
    "C22",
    "forward and backward, LoRA over 4 bits ÷ over float",
    None,
    slower,
    seeds=[SEED],
    note="medians of two runs one after the other",
)
if peft_distance is not None:
    record(
        "C22",
        "logits of the branches in PEFT over bitsandbytes' layers, distance to ours",
        0,
        100 * peft_distance,
        "%",
        holds=peft_distance < bare_distance / 10,
        note=f"without the branches {100 * bare_distance:.0f} %; the 8-bit codes of the scales differ in a few places",
    )
for row in sizes:
    told = ", ".join(f"{part} {size:.2f}" for part, size in row.parts.items())
    record(
        "C22",
        f"size of {row.name}",
        row.paper_gb,
        row.ours_gb,
        "GB",
        holds=round(row.ours_gb) == row.paper_gb,
        note=f"holds when it rounds to the slide's figure; {told}",
    )
record("C22", "full fine-tune of 65B at 12 bytes a parameter", "> 780", full_65b, "GB", holds=full_65b > 780)
results.table(lab)

# %%
if tuned_cost[1] > 1.1:
    words = "clearly worse"
elif tuned_cost[2] < 1 / 1.1:
    words = "clearly better"
elif tuned_cost[1] > 1 / 1.1 and tuned_cost[2] < 1.1:  # 10 % is our choice of what counts
    words = "about the same"
else:
    words = "not decided"
predictions = [
    ("a. bits a weight", predicted_bits, f"{bits_single:.2f}"),
    ("a. with 8-bit scales", predicted_double, f"{bits_double:.3f}"),
    ("b. perplexity, NF4 ÷ float", predicted_nf4, f"{worse['NF4'][0]:.2f}"),
    ("b. perplexity, INT4 ÷ float", predicted_int4, f"{worse['INT4'][0]:.2f}"),
    ("c. trained over 4 bits", predicted_tuned, f"{words}, × {tuned_cost[0]:.2f}"),
    ("d. memory, 4 bits ÷ full", predicted_memory, f"{memory_share:.0f} %"),
    ("e. 65B, 4-bit weights", predicted_guanaco, f"{weights_65b:.1f} GB"),
]
for what, guess, found in predictions:
    print(f"{what:30} you said: {'–' if guess is None else guess!s:16} measured: {found}")

# %% [markdown]
# The effects that must show in a full run, whatever the machine:

# %%
if FULL:
    assert errors["NF4"].mean() < errors["E2M1"].mean() < errors["INT4"].mean(), "quantiles must lose least"
    assert 1 < worse["NF4"][0] < worse["INT4"][0] < variants["NF4, one scale a tensor"][0]
    assert equal_bytes[0] > 1, "at equal bytes small blocks with 8-bit scales must be better"
    sums = [sum(found.values()) for found in bills.values()]
    assert sums == sorted(sums, reverse=True), "each of the two steps must save memory"
    assert all(found.mean() < min(b.mean() for b in before.values()) / 2 for found in after.values()), "all must learn"

# %% [markdown]
# ## 7 · Explain
# ### 7.1 In your own words · 10 points
# A colleague wants to fine-tune a model of 13 billion parameters on a GPU of 24 GB, and asks whether QLoRA makes it fit, what it costs in quality and speed, and whether to merge the branches afterwards. Answer in five or
# six sentences, with a bill by category and with what you measured.

# %% [markdown] nbgrader={"grade": true, "grade_id": "qlora-explain", "locked": false, "points": 10, "schema_version": 3, "solution": true, "task": false}
# In 16 bits the weights alone are 26 GB, so neither a full fine-tune (12 bytes a parameter: 156 GB) nor LoRA over 16 bits fits. At 4.127 bits the linear layers take 6.5 GB, embeddings and head 0.7 GB, branches of rank 64 half a GB, their gradients
# another half and their two moments about 2 GB: together about 10 GB, which leaves about 14 GB for activations. These quantization does not touch; they grow with batch and length, and a paged optimizer helps with their peaks without changing a bit. Quality:
# rounding alone raised the perplexity of SmolLM2 by about a fifth; after the training 4 bits were between 2 % better and 7 % worse than float over five seeds (5 % worse in the median), so on this easy task rounding cost little, if anything; measure it on yours. Speed: each weight is unpacked twice a
# step, so a step was about 1.7 times as long on two cores. Merging: folded into the 16-bit weights the branch misses the rounding errors it was trained with (2 to 7 % more perplexity over five seeds); folded into the
# rounded weights, unpacked to 16 bits, it is the model as it was trained.
#
# *Marking: 4 points for a bill by category that adds up (bits times parameters, not forgetting embeddings, optimizer of the branch and activations), 3 for quality before and after training with measured figures and a caveat, 3 for
# the cost in time or for what becomes of a branch that is merged.*

# %% [markdown]
# ### 7.2 Which of these is wrong, and why? · 10 points
# Exactly one statement is wrong. Say which, and explain it with numbers.
#
# - **A.** In a block of 64 values of which one is 20 times as large as the others, most of the others come back as zero or as the level next to it.
# - **B.** Double quantization makes the weights less exact in the same way as larger blocks do: what it saves in bytes, it loses in perplexity.
# - **C.** The gradient of the loss with respect to the input of a 4-bit layer is exact for the rounded weights, although the weights themselves get no gradient.
# - **D.** A paged optimizer computes the same parameters as an ordinary one, bit by bit, with any budget that it accepts.

# %% [markdown] nbgrader={"grade": true, "grade_id": "qlora-wrong", "locked": false, "points": 10, "schema_version": 3, "solution": true, "task": false}
# B is wrong. Both save on the scales, but they err in different places. With larger blocks each weight is measured with a yardstick that is too long, because it belongs to the largest of 256 values instead of 64: the error of a
# weight grows on average (from 9.4 to 10.4 % on SmolLM2). With quantized scales the yardstick stays that of the 64 values, and only its length is off, by a fraction of a percent, which changes the levels
# of a block all by the same small factor. At equal bytes (4.125 bits for blocks of 256 with float32 scales, 4.127 for blocks of 64 with 8-bit scales) the perplexity was lower with quantized scales, on our 20 texts by 5 % (interval 0.5 to 10 %), and it
# was within 0.3 % of that with float32 scales at 4.5 bits.
#
# *Marking: 3 points for B, 3 for where each of the two errs, 4 for the comparison at equal bytes with numbers.*
