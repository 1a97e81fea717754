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
# # Lab 5 · LoRA: a fine-tune that weighs almost nothing
#
# | | |
# |---|---|
# | **Slides** | *LoRA: Parallel and fusible learnable layers*; storage arithmetic from *Adapter*; context from *Prompt Tuning* and *Prefix-Tuning* |
# | **Papers** | Hu et al., *LoRA: Low-Rank Adaptation of Large Language Models*, ICLR 2022 |
# | **Reading and writing** | about 75 minutes |
# | **Computing** | about 5 minutes on two CPU cores, less on a GPU; about 4 GB of memory |
# | **You build** | the merge, the layer, its place in a model, its storage arithmetic, one training step |
# | **You measure** | a 135-million-parameter language model learning to write kitchen tickets: quality before and after, what it forgets, latency, bytes, rank |
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
import math
import random
import tempfile

import torch
import torch.nn.functional as F
from torch import nn

from lecturekit import data, results, timing
from lecturekit.checking import check, grade, passing
from lecturekit.explore import lora as explore
from lecturekit.explore import style
from lecturekit.models import load_language_model
from lecturekit.runtime import base_seed, device, profile, progress, seed_everything, threads
from lecturekit.statistics import wilson

FULL = profile() == "full"  # LECTUREKIT_PROFILE=smoke runs the same cells in seconds, with numbers that mean nothing
SEED = base_seed()  # 0, unless LECTUREKIT_SEED names another
seed_everything(SEED)

# %% [markdown]
# ## 1 · Predict
# Before any code: write down what you expect. Nothing here is graded. The answers come back beside your measurements
# at the end, and being wrong is how they become interesting.
#
# A café wants each order as one line for the kitchen: *Could I get two large mochas for Grace, to go?* becomes
# `Grace | 2 large mocha | GO`. We fine-tune SmolLM2 (135 million parameters) to write such tickets, with LoRA: a small
# trainable *branch* beside each of four of the seven linear layers in every block. Afterwards the branches can be
# *merged*, folded into the layers.
#
# - **a.** What percentage of the parameters is trained?
# - **b.** The model never saw this notation. After 32 steps of 8 orders, what percentage of held-out orders does
#   it turn into exactly the right ticket?
# - **c.** How many times as long does one decoding step (computing one more token) take with the branches beside the layers, and how many times
#   after they are merged? (1 means as long as the base model.)
# - **d.** We then ask the fine-tuned model: *What is the capital of France?* Does it answer `"as before"`, with
#   `"a ticket"`, or with `"nothing"`?

# %%
predicted_percent = None  # a, for example 10
predicted_tickets = None  # b, for example 50
predicted_unmerged = None  # c, for example 2.0
predicted_merged = None  # c
predicted_france = None  # d, one of "as before", "a ticket", "nothing"

# %% [markdown]
# ## 2 · The idea
# Fine-tuning changes a weight matrix $W$ by some $\Delta W$. LoRA's bet is that a *useful* $\Delta W$ can be found among
# matrices of low rank, so it never stores $\Delta W$ itself, but two thin factors in a branch beside the frozen layer:
#
# $$h = x W + \frac{\alpha}{r}\, x A B \qquad\text{(as on the slide: } x \text{ is a row)}$$
#
# $A$ takes the $d$ inputs down to $r$ numbers, $B$ takes these up again. $A$ starts Gaussian and $B$ starts at zero, so
# at first the branch adds nothing: *the output is not affected*. And since everything in it is linear,
# $xW + \frac{\alpha}{r}xAB = x\,(W + \frac{\alpha}{r}AB) = xW'$: the branch can be folded into the layer afterwards.
#
# <div class="alert alert-info"><b>Mind the transpose.</b> PyTorch's <code>nn.Linear</code> keeps <i>W</i> as
# (out, in) and computes x Wᵀ. In code <code>A</code> is therefore (r, in), <code>B</code> is (out, r), and the branch
# is the product <code>B @ A</code>, of the same shape as <code>weight</code>. The paper and PEFT write it this way.</div>
#
# What can a low rank hold? Below, a picture of 96 × 96 numbers stands for $\Delta W$. Move the slider (or tab to it and
# press the arrow keys) and watch what the best pair of factors of rank $r$ keeps. **Find the rank from which you would
# recognise the house, and the rank at which the factors hold as many numbers as the matrix.**

# %%
explore.rank_slider()

# %% [markdown]
# The same without a slider, for print:

# %%
explore.rank_strip()

# %% [markdown]
# Straight edges along the axes come first, the round sun and the slanted roof last: low rank is not "blurred", it is
# "few patterns of rows times columns". Whether the $\Delta W$ of a real fine-tune is like this picture is not a theorem.
# It is measured, in section 5.

# %% [markdown]
# ## 3 · Build
# ### 3.1 Merge · 15 points
# Fold a branch into its layer: return $W' = W + \frac{\alpha}{r} B A$ as a new tensor, and leave the inputs alone.
#
# - `weight` (out, in), `A` (r, in), `B` (out, r), `alpha` a number → (out, in), in `weight`'s dtype
#
# <details><summary>Hint 1</summary>Write the three shapes side by side. Which order of the two factors gives
# (out, in)?</details>
# <details><summary>Hint 2</summary>The rank is nobody's argument here. It is one of the sizes of A.</details>
# <details><summary>Hint 3</summary>It fits on one line: the weight, plus a scale times a matrix product.</details>


# %% nbgrader={"grade": false, "grade_id": "lora-merge", "locked": false, "schema_version": 3, "solution": true, "task": false}
def merge(weight, A, B, alpha):
    """W' = W + (alpha / r) B A.   weight: (out, in)   A: (r, in)   B: (out, r)   →   (out, in)"""
    ### BEGIN SOLUTION
    r = A.shape[0]
    return weight + (alpha / r) * (B @ A)
    ### END SOLUTION


# %% nbgrader={"grade": true, "grade_id": "lora-merge-test", "locked": true, "points": 15, "schema_version": 3, "solution": false, "task": false}
check("lora.merge", merge)
### BEGIN HIDDEN TESTS
grade("lora.merge", merge)
### END HIDDEN TESTS

# %% [markdown]
# **See what your code did.** One small layer, its branch, your result, and your result minus the right one. The last
# panel should be blank. If it is not: does it look like the branch? Then its scale or its sign is wrong, or it is
# missing.

# %%
explore.merge_picture(merge)

# %% [markdown]
# ### 3.2 The layer · 20 points
# Write `LoRALinear`, an `nn.Module` with the attributes `base` (the given `nn.Linear`, frozen), `A` (r, in) drawn from
# a Gaussian, and `B` (out, r) of zeros, both `nn.Parameter`s. Its `forward` gives the base's output plus the scaled
# branch, for inputs of any number of leading dimensions: (…, in) → (…, out).
#
# Make both on the device of `base.weight`. How wide the Gaussian of `A` is you may choose; a standard deviation of $1/\sqrt{3\,\text{in}}$ keeps its outputs small
# and is what common libraries amount to.
#
# <details><summary>Hint 1</summary>Start with the factors: what must the layer give before any training, and can it
# still learn from there?</details>
# <details><summary>Hint 2</summary>Freezing: <code>requires_grad_(False)</code> works on a whole module, bias
# included.</details>
# <details><summary>Hint 3</summary><code>F.linear(x, M)</code> computes x Mᵀ. Go down with A first, up with B after;
# never build the (out, in) product, it would cost as much as the layer itself.</details>


# %% nbgrader={"grade": false, "grade_id": "lora-linear", "locked": false, "schema_version": 3, "solution": true, "task": false}
class LoRALinear(nn.Module):
    """A frozen linear layer with a trainable branch of rank r: h = base(x) + (alpha / r) B A x."""

    def __init__(self, base, r, alpha):
        super().__init__()
        ### BEGIN SOLUTION
        self.base = base.requires_grad_(False)
        weight = base.weight
        self.A = nn.Parameter(torch.randn(r, base.in_features, device=weight.device) / math.sqrt(3 * base.in_features))
        self.B = nn.Parameter(torch.zeros(base.out_features, r, device=weight.device))
        self.scale = alpha / r
        ### END SOLUTION

    def forward(self, x):
        ### BEGIN SOLUTION
        down = F.linear(x, self.A)  # (…, in) → (…, r)
        return self.base(x) + self.scale * F.linear(down, self.B)  # (…, r) → (…, out)
        ### END SOLUTION


# %% nbgrader={"grade": true, "grade_id": "lora-linear-test", "locked": true, "points": 20, "schema_version": 3, "solution": false, "task": false}
check("lora.linear", LoRALinear)
### BEGIN HIDDEN TESTS
grade("lora.linear", LoRALinear)
### END HIDDEN TESTS

# %% [markdown]
# **See what your code did.** Your layer is trained to turn a small layer into another one, which differs from it by a
# matrix of rank 2. At the start the branch should be blank; at the end it should look like its goal.

# %%
explore.layer_picture(LoRALinear)

# %% [markdown]
# From here on the layer is called `Layer`: yours if it passed its check.

# %%
Layer = passing("lora.linear", LoRALinear)

# %% [markdown]
# ### 3.3 Into the model · 15 points
# Write `add_lora`: freeze all of the model, then put a `Layer(linear, r, alpha)` in the place of every `nn.Linear`
# whose name ends in one of `targets`, wherever in the model it sits, and return the same model. Afterwards only the
# `A`s and `B`s are trainable.
#
# A layer's own name is what stands after the last dot: `model.layers.0.self_attn.q_proj` is a `q_proj`; a layer called
# `eq_proj` is not.
#
# <details><summary>Hint 1</summary><code>model.named_modules()</code> walks everything. You are going to change what you
# walk over, so take a <code>list(…)</code> of it first.</details>
# <details><summary>Hint 2</summary>A layer is replaced in its parent: <code>setattr(parent, child_name, new)</code>. For
# each module, look at its <code>named_children()</code>.</details>
# <details><summary>Hint 3</summary>Freeze first, then insert: what is inserted later is trainable by
# itself.</details>


# %% nbgrader={"grade": false, "grade_id": "lora-inject", "locked": false, "schema_version": 3, "solution": true, "task": false}
def add_lora(model, targets, r, alpha):
    """Freeze the model and put a Layer around every nn.Linear named in targets. Returns the same model."""
    ### BEGIN SOLUTION
    model.requires_grad_(False)
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, nn.Linear) and name in targets:
                parent.add_module(name, Layer(child, r, alpha))
    return model
    ### END SOLUTION


# %% nbgrader={"grade": true, "grade_id": "lora-inject-test", "locked": true, "points": 15, "schema_version": 3, "solution": false, "task": false}
check("lora.inject", add_lora)
### BEGIN HIDDEN TESTS
grade("lora.inject", add_lora)
### END HIDDEN TESTS

# %% [markdown]
# ### 3.4 What does a fine-tune weigh? · 10 points
# Write `storage(shapes, r, bits)` → `(parameters, bytes)`: how many numbers the branches of rank `r` hold beside
# layers of the given `(out, in)` shapes, and how many bytes they take at `bits` bits a number.
#
# <details><summary>Hint</summary>Count A, count B, add over the layers. Nothing of size out × in is stored.</details>


# %% nbgrader={"grade": false, "grade_id": "lora-count", "locked": false, "schema_version": 3, "solution": true, "task": false}
def storage(shapes, r, bits):
    """Parameters and bytes of LoRA branches of rank r beside layers of these (out, in) shapes."""
    ### BEGIN SOLUTION
    parameters = sum(r * (out_features + in_features) for out_features, in_features in shapes)
    return parameters, parameters * bits / 8
    ### END SOLUTION


# %% nbgrader={"grade": true, "grade_id": "lora-count-test", "locked": true, "points": 10, "schema_version": 3, "solution": false, "task": false}
check("lora.count", storage)
### BEGIN HIDDEN TESTS
grade("lora.count", storage)
### END HIDDEN TESTS

# %% [markdown]
# ### 3.5 One training step · 20 points
# Write `train_step(model, optimizer, input_ids, labels)`, which improves the model once and returns the loss as a
# Python `float`.
#
# - `model(input_ids).logits` is (batch, seq, vocab). The logits at position $t$ predict the token at $t+1$.
# - `labels` is (batch, seq): the same tokens, but −100 where nothing is to be learnt (prompt and padding). The loss is
#   the mean cross-entropy over all other labels.
# - Each call must use the gradient of its own batch only.
# - Call the model with `input_ids` alone: it computes no loss for you.
#
# <details><summary>Hint 1</summary>Shift first: which logits have no label, and which label has no logits?</details>
# <details><summary>Hint 2</summary><code>F.cross_entropy</code> wants (N, vocab) and (N), takes logits as they are, and
# leaves out labels of −100 by default.</details>
# <details><summary>Hint 3</summary>Then the same three calls as in every PyTorch loop. In which order?</details>


# %% nbgrader={"grade": false, "grade_id": "lora-train", "locked": false, "schema_version": 3, "solution": true, "task": false}
def train_step(model, optimizer, input_ids, labels):
    """One step of next-token training. input_ids, labels: (batch, seq), label −100 = not counted → loss, a float."""
    ### BEGIN SOLUTION
    logits = model(input_ids).logits[:, :-1]  # (batch, seq − 1, vocab): the last position predicts nothing we know
    wanted = labels[:, 1:]  # the first token is predicted by nothing
    loss = F.cross_entropy(logits.flatten(0, 1), wanted.flatten())
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    return loss.item()
    ### END SOLUTION


# %% nbgrader={"grade": true, "grade_id": "lora-train-test", "locked": true, "points": 20, "schema_version": 3, "solution": false, "task": false}
check("lora.train", train_step)
### BEGIN HIDDEN TESTS
grade("lora.train", train_step)
### END HIDDEN TESTS

# %% [markdown]
# ## 4 · Measure: a real model learns a notation
# A café wants each order as one line for the kitchen. The notation is invented, so no model has seen it. Sentence
# frames, guests' names and combinations of items in the test split occur nowhere in the training split.

# %%
merge_used = passing("lora.merge", merge)
add_lora_used = passing("lora.inject", add_lora)
storage_used = passing("lora.count", storage)
train_step_used = passing("lora.train", train_step)

orders = data.load("cafe_orders")
for row in orders["train"].select(range(5)):
    print(row["order"], "\n    →", row["ticket"])

# %%
model, tokenizer = load_language_model(dtype=torch.float32)
model.requires_grad_(False)
base_model = copy.deepcopy(model)  # stays as it is, to compare with
base_parameters = sum(p.numel() for p in model.parameters())
print(f"{base_parameters:,} parameters, {base_parameters * 4 / 1e6:,.0f} MB in float32")

# %% [markdown]
# Plumbing, written out so that nothing is hidden. Prompts are padded on the *left*, so that all tickets of a batch end
# together. The output head over 49,152 words costs more than many layers, so `AfterPrompt` computes it for the last
# positions only, where the tickets are: seen from your `train_step` it is a model like any other.

# %%
PAD = 0  # <|endoftext|>, which occurs in no prompt
STOP = tokenizer.convert_tokens_to_ids("<|im_end|>")


def ask(text, solved=()):
    """The token ids of one question to the model, up to where its answer begins; solved: (question, answer) before it."""
    turns = [(role, said) for pair in solved for role, said in zip(("user", "assistant"), pair)]
    chat = [{"role": role, "content": said} for role, said in [*turns, ("user", text)]]
    return tokenizer(tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)).input_ids


def order_text(row):
    return f"Order: {row['order']}\nTicket:"


def order_prompt(row, shots=()):
    """The order, with already solved orders before it if any are given."""
    return ask(order_text(row), [(order_text(shot), shot["ticket"]) for shot in shots])


def ticket_ids(row):
    return [*tokenizer(row["ticket"]).input_ids, STOP]


TAIL = 1 + max(len(ticket_ids(row)) for split in ("train", "test") for row in orders[split])


def left_padded(sequences):
    """Lists of token ids → (batch, longest), filled with PAD on the left."""
    longest = max(len(sequence) for sequence in sequences)
    return torch.tensor([[PAD] * (longest - len(s)) + list(s) for s in sequences], device=device())


def make_batch(rows):
    """Orders with their tickets → what came before (batch, seq − TAIL), the last TAIL tokens and their labels."""
    tickets = [ticket_ids(row) for row in rows]
    ids = left_padded([order_prompt(row) + ticket for row, ticket in zip(rows, tickets)])
    labels = torch.full((len(rows), TAIL), -100, device=device())
    for label, ticket in zip(labels, tickets):
        label[-len(ticket) :] = torch.tensor(ticket, device=device())
    return ids[:, :-TAIL], ids[:, -TAIL:], labels


class AfterPrompt(nn.Module):
    """A model that has read `before` already: called with the tokens that follow, it gives the logits for these."""

    def __init__(self, model, before):
        super().__init__()
        self.model, self.before = model, before

    def forward(self, input_ids):
        ids = torch.cat([self.before, input_ids], dim=1)
        return self.model(ids, attention_mask=ids != PAD, logits_to_keep=input_ids.shape[1], use_cache=False)


@torch.no_grad()
def perplexity(model, rows, batch_size=16):
    """exp of the mean −log P of a ticket's tokens, given the order. 1 is certainty."""
    total, count = 0.0, 0
    for start in range(0, len(rows), batch_size):
        before, tail, labels = make_batch(rows[start : start + batch_size])
        logits = AfterPrompt(model, before)(tail).logits[:, :-1]
        total += F.cross_entropy(logits.flatten(0, 1), labels[:, 1:].flatten(), reduction="sum").item()
        count += int((labels[:, 1:] != -100).sum())
    return math.exp(total / count)


@torch.no_grad()
def answers(model, prompts, new_tokens=TAIL, batch_size=40):
    """The model's most probable continuation of each prompt, as text."""
    texts = []
    for start in range(0, len(prompts), batch_size):
        ids = left_padded(prompts[start : start + batch_size])
        out = model.generate(
            input_ids=ids,
            attention_mask=ids != PAD,
            max_new_tokens=new_tokens,
            do_sample=False,
            pad_token_id=PAD,
            eos_token_id=STOP,
        )
        texts += tokenizer.batch_decode(out[:, ids.shape[1] :], skip_special_tokens=True)
    return [text.strip() for text in texts]


def known(texts, rows):
    """The fraction of everyday questions whose answer occurs in the reply."""
    return sum(row["answer"].lower() in text.lower() for text, row in zip(texts, rows)) / len(rows)


def interval(fraction, count):
    """Wilson's 95 % interval, in percent, of a fraction found in `count` trials. Unlike ± z·σ it is right near 0 and 1."""
    return tuple(100 * end for end in wilson(fraction, count))


# %% [markdown]
# ### 4.1 Before
# The untouched model, once with the bare order, once with three solved orders in front of it (a *few-shot* prompt), and
# on everyday questions that have nothing to do with cafés.

# %%
train_rows = list(orders["train"])
test_rows = list(orders["test"])[: None if FULL else 4]
keep_rows = list(orders["keep"])[: None if FULL else 2]
new_tokens = TAIL if FULL else 4
shots = [train_rows[i] for i in (0, 26, 43)]  # one to go, one eaten here, one for a table
prompts = [order_prompt(row) for row in test_rows]
few = 24  # orders for the untrained model, which gets hardly any right: enough to see that
shot_prompts = [order_prompt(row, shots) for row in test_rows[:few]]
questions = [ask(row["question"]) for row in keep_rows]
right = [row["ticket"] for row in test_rows]

before_texts = answers(model, prompts[:few], new_tokens)
shot_texts = answers(model, shot_prompts, new_tokens)
keep_before_texts = answers(model, questions, min(20, new_tokens))
before, few_shot = [data.score_tickets(texts, right[:few]) for texts in (before_texts, shot_texts)]
perplexity_before, keep_before = perplexity(model, test_rows), known(keep_before_texts, keep_rows)
shot_tokens = len(shot_prompts[0]) - len(prompts[0])

print(f"exact tickets {before['exact']:.0%}, perplexity of the right ticket {perplexity_before:.1f}")
print(f"exact tickets with three examples {few_shot['exact']:.0%}, which take {shot_tokens:.0f} tokens of the context")
print(f"everyday questions {keep_before:.0%}")
print(f"for example: {test_rows[0]['order']}\n    right ticket  {right[0]}")
print(f"    bare          {before_texts[0]}\n    three examples {shot_texts[0]}")

# %% [markdown]
# ### 4.2 Add the branches
# Rank 8 on the query, value, up and down projections of all 30 blocks. Is the output really *not affected*? Not "nearly
# the same": bit by bit.

# %%
R, ALPHA = 8, 16
TARGETS = ["q_proj", "v_proj", "up_proj", "down_proj"]


def branches(model):
    """Name → layer with a branch."""
    return {name: m for name, m in model.named_modules() if all(hasattr(m, part) for part in ("base", "A", "B"))}


def plug(model, r, alpha, seed=SEED):
    """Add branches, and draw each A with the same seed and width whoever wrote the layer, so that runs compare."""
    add_lora_used(model, TARGETS, r, alpha)
    generator = torch.Generator().manual_seed(seed)
    for layer in branches(model).values():
        start = torch.randn(layer.A.shape, generator=generator) / math.sqrt(3 * layer.A.shape[1])
        layer.A.data.copy_(start)
    return model


def unplug(model):
    """Take all branches out again."""
    for name, layer in branches(model).items():
        model.set_submodule(name, layer.base)
    return model


before_batch, tail_batch, _ = make_batch(test_rows[:4])
with torch.no_grad():
    logits_base = AfterPrompt(base_model, before_batch)(tail_batch).logits
plug(model, R, ALPHA)
with torch.no_grad():
    logits_start = AfterPrompt(model, before_batch)(tail_batch).logits

trainable = [p for p in model.parameters() if p.requires_grad]
lora_parameters = sum(p.numel() for p in trainable)
percent = 100 * lora_parameters / base_parameters
start_difference = (logits_start - logits_base).abs().max().item()
print(f"{len(branches(model))} branches, {lora_parameters:,} trainable parameters, {percent:.2f} % of the model's")
print(f"largest difference of a logit at the start: {start_difference}")
assert start_difference == 0, "B = 0 must leave every bit of the output as it was"

# %% [markdown]
# ### 4.3 Train
# Thirty-two steps of eight orders with AdamW; the learning rate rises for five steps, then falls to zero in a straight line.


# %%
def batches(rows, size, rng):
    """Batches of orders for ever, in random order, each of orders about equally long: little is wasted on padding."""
    while True:
        shuffled = rng.sample(rows, len(rows))
        for start in range(0, len(rows), 8 * size):
            block = sorted(shuffled[start : start + 8 * size], key=lambda row: len(row["order"]))
            chunks = [block[i : i + size] for i in range(0, len(block), size)]
            yield from rng.sample(chunks, len(chunks))


def fine_tune(model, steps, batch_size=8, lr=4e-3, seed=SEED, desc="training"):
    """Train whatever is trainable in the model on the training orders. Returns the losses and the optimizer."""
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=lr, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda s: min((s + 1) / 5, (steps - s) / max(1, steps - 5)))
    source, losses = batches(train_rows, batch_size, random.Random(seed)), []
    model.train()
    for _ in progress(range(steps), desc):
        before, tail, labels = make_batch(next(source))
        losses.append(train_step_used(AfterPrompt(model, before), optimizer, tail, labels))
        schedule.step()
    model.eval()
    return losses, optimizer


losses, optimizer = fine_tune(model, steps=32 if FULL else 2, batch_size=8 if FULL else 2)
fig, (axes,) = style.figure(width=6.5)
axes.plot(range(1, len(losses) + 1), losses)
axes.set(xlabel="step", ylabel="loss (nats a token)", title=f"LoRA, rank {R}: loss on the tickets", ylim=(0, None))
style.alt(fig, f"The training loss falls from {losses[0]:.2f} to {losses[-1]:.2f} in {len(losses)} steps.")

# %% [markdown]
# ### 4.4 After

# %%
after_texts = answers(model, prompts, new_tokens)
keep_after_texts = answers(model, questions, min(20, new_tokens))
after, keep_after = data.score_tickets(after_texts, right), known(keep_after_texts, keep_rows)
perplexity_after = perplexity(model, test_rows)
print(
    f"exact tickets {before['exact']:.0%} → {after['exact']:.0%}; fields {before['fields']:.0%} → {after['fields']:.0%}"
)
print(f"perplexity of the right ticket {perplexity_before:.1f} → {perplexity_after:.2f}\n")
wrong = [(row, text) for row, text in zip(test_rows, after_texts) if text != row["ticket"]]
print(f"{len(wrong)} of {len(test_rows)} are wrong, for example:")
for row, text in wrong[:4]:
    print(f"{row['order']}\n    wanted {row['ticket']}\n    got    {text}")

# %%
fig, (left, right_panel) = style.figure(1, 2, width=5.2)
exact = [s["exact"] for s in (before, few_shot, after)]
bounds = [interval(f, n) for f, n in zip(exact, (len(before_texts), len(shot_texts), len(after_texts)))]
style.bars(
    left,
    ["bare", "three\nexamples", "LoRA"],
    [100 * fraction for fraction in exact],
    "{:.0f} %",
    yerr=[
        [100 * f - low for f, (low, _) in zip(exact, bounds)],
        [high - 100 * f for f, (_, high) in zip(exact, bounds)],
    ],
    capsize=4,
    color=[style.GREY, style.ORANGE, style.BLUE],
)
left.set(title="held-out tickets exactly right", ylim=(0, 105))
style.bars(
    right_panel,
    ["bare", "LoRA"],
    [perplexity_before, perplexity_after],
    "{:.2f}",
    log=True,
    color=[style.GREY, style.BLUE],
)
right_panel.set(title="perplexity of the right ticket (log scale)", ylim=(1, 3 * perplexity_before))
right_panel.yaxis.set_major_formatter("{x:g}")
style.alt(
    fig,
    f"Held-out tickets exactly right: {before['exact']:.0%} bare, {few_shot['exact']:.0%} with three examples, "
    f"{after['exact']:.0%} with LoRA (95 % interval {bounds[2][0]:.0f} to {bounds[2][1]:.0f} %). Perplexity of the right ticket: {perplexity_before:.1f} before, "
    f"{perplexity_after:.2f} after.",
)

# %% [markdown]
# The whiskers are 95 % intervals: with 80 test orders a percentage is known to about ten points either way, and the two
# bars on the left, with fewer orders, less well. Runs that differ by less cannot be told apart here. Look at what went wrong before you blame the rank: which *fields* fail, and which phrasings?

# %% [markdown]
# ### 4.5 What it forgot, and how to get it back
# Nobody told the model to stop being a general assistant. Nobody told it to go on, either.

# %%
for row, first, then in list(zip(keep_rows, keep_before_texts, keep_after_texts))[:6]:
    print(f"{row['question']}\n    before  {first}\n    after   {then}")
print(f"\nanswer present: {keep_before:.0%} before, {keep_after:.0%} after")

# %% [markdown]
# <div class="alert alert-info"><b>LoRA does not prevent forgetting.</b> With the branches plugged in, the model sees
# tickets everywhere. What LoRA does give: the base weights were never touched, so the old model is one
# <i>unplug</i> away, bit by bit. A full fine-tune would have to be reloaded from disk.</div>

# %%
adapter = {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}
unplugged = unplug(copy.deepcopy(model))
with torch.no_grad():
    logits_unplugged = AfterPrompt(unplugged, before_batch)(tail_batch).logits
unplugged_difference = (logits_unplugged - logits_base).abs().max().item()
print(f"largest difference of a logit between the unplugged model and the base: {unplugged_difference}")
assert unplugged_difference == 0, "the base weights must not have been touched"

# %% [markdown]
# ### 4.6 Merge, and measure the latency
# `merge` (yours, if it passed its check) folds all 120 branches. The merged model must say the same as the unmerged one, up to rounding, and it has
# the base model's structure. Then one decoding step (one new token after 64 others) is timed, in turn with the base
# model's so that whatever else this machine does hits both alike. What counts is the ratio.
#
# Prompt tuning and prefix tuning lengthen the input, as examples in the prompt do. LoRA takes no token: the last two
# lines show what that is worth. The line before them is a control: a ratio no further from 1 than that is no difference.

# %%
merged = unplugged
with torch.no_grad():
    for name, layer in branches(model).items():
        weight = merge_used(layer.base.weight, layer.A, layer.B, ALPHA)
        merged.get_submodule(name).weight = nn.Parameter(weight, requires_grad=False)
    logits_unmerged = AfterPrompt(model, before_batch)(tail_batch).logits
    logits_merged = AfterPrompt(merged, before_batch)(tail_batch).logits
merge_difference = (logits_merged - logits_unmerged).abs().max().item()
same_choice = (logits_merged.argmax(-1) == logits_unmerged.argmax(-1)).float().mean().item()
largest_logit = logits_unmerged.abs().max().item()
print(f"largest difference of a logit after merging: {merge_difference:.1e} (the largest logit is {largest_logit:.0f})")
print(f"same most probable token at {same_choice:.1%} of the positions")
# Each of 210 products in a row rounds at 6e-8 of its size; a thousandth of the largest logit is far above what adds up.
assert merge_difference < 1e-3 * largest_logit, "merging must change nothing but roundings"


# %%
def decoder(model, batch_size, context=64):
    """A function that decodes one token after `context` others, again and again from the same state."""
    from transformers import DynamicCache

    ids = torch.randint(100, 40_000, (batch_size, context), generator=torch.Generator().manual_seed(1)).to(device())
    cache = DynamicCache(config=model.config)

    @torch.no_grad()
    def step():
        model(ids[:, :1], past_key_values=cache, use_cache=True)
        cache.crop(-1)  # forget the token again

    with torch.no_grad():
        model(ids, past_key_values=cache, use_cache=True, logits_to_keep=1)
    return step


latency = {}
repeats = {1: 40, 16: 20} if FULL else {1: 2}  # pairs of runs at each batch size
with threads(1):  # a single token leaves little to share between cores
    for batch_size, pairs in repeats.items():
        base_step = decoder(base_model, batch_size)
        for label, candidate in (("unmerged", model), ("merged", merged)):
            step = decoder(candidate, batch_size)
            # the weights alone are many times the cache, so there is nothing to flush
            latency[label, batch_size] = timing.compare(
                step, base_step, repeats=pairs, warmup=3 if FULL else 1, flush_cache=False, memory=False
            )
# control: two copies of the very same model need not be equally fast, their weights lie elsewhere in memory
with threads(1):
    control = timing.compare(
        decoder(copy.deepcopy(base_model), 1),
        decoder(base_model, 1),
        repeats=repeats[1],
        warmup=1,
        flush_cache=False,
        memory=False,
    )
# the other way to teach the notation, three examples in the prompt, is paid for again with each request
prefills = [torch.tensor([prompt[0]], device=device()) for prompt in (shot_prompts, prompts)]
with threads(1), torch.no_grad():
    prefill = timing.compare(
        *(lambda ids=ids: base_model(ids, logits_to_keep=1) for ids in prefills),
        repeats=5 if FULL else 1,
        warmup=1,
        flush_cache=False,
        memory=False,
    )
context = base_model.config.max_position_embeddings

for (label, batch_size), found in latency.items():
    low, high = found.quartiles
    print(
        f"batch {batch_size:>2}: {label:8} ÷ base = {found.ratio:.2f} ({low:.2f} to {high:.2f}), "
        f"base step {found.b.median * 1e3:.0f} ms"
    )
low, high = control.quartiles
print(f"control:  an exact copy of the base ÷ base = {control.ratio:.2f} ({low:.2f} to {high:.2f})")
print(f"reading the prompt: with three examples ÷ bare = {prefill.ratio:.1f}, at every request; with LoRA as bare")
print(f"context left of {context:,} tokens: {context - shot_tokens:,} with three examples, {context:,} with LoRA")

# %%
fig, (axes,) = style.figure(width=7.5)
for offset, label, colour in ((-0.18, "unmerged", style.VERMILION), (0.18, "merged", style.BLUE)):
    places = [i for i, b in enumerate((1, 16)) if (label, b) in latency]
    found = [latency[label, (1, 16)[i]] for i in places]
    ratios = [f.ratio for f in found]
    spread = [[f.ratio - f.quartiles[0] for f in found], [f.quartiles[1] - f.ratio for f in found]]
    drawn = axes.bar([i + offset for i in places], ratios, 0.34, yerr=spread, capsize=4, color=colour, label=label)
    axes.bar_label(drawn, [f"{ratio:.2f}" for ratio in ratios], padding=4)
axes.axhline(1, color=style.GREY, linestyle="--", linewidth=1.5)
axes.set_xticks(range(2), ["batch 1", "batch 16"])
top = max(found.quartiles[1] for found in latency.values())
axes.set(ylabel="time ÷ base model", title="one decoding step", ylim=(0, 1.4 * top))
axes.legend(loc="upper right", ncols=2)
told = "; ".join(f"{label} at batch {b} takes {f.ratio:.2f} times the base" for (label, b), f in latency.items())
style.alt(
    fig, f"Bars of the time of one decoding step relative to the base model: {told}. The dashed line is the base."
)

# %% [markdown]
# <div class="alert alert-info"><b>What this does not show.</b> Those are ratios on this machine, in eager PyTorch, where
# an unmerged branch costs two small products, a scaling and a sum a layer. With fused kernels an unmerged branch costs less, and on a
# GPU at batch 1 more of the time is launching operations. Merged needs no such caveat: it is the same computation as the
# base.</div>

# %% [markdown]
# ### 4.7 Parameters and bytes
# What training and storing this fine-tune takes, measured, beside a full fine-tune. AdamW keeps two numbers for each
# trained parameter.

# %%
from safetensors.torch import save_file

with tempfile.TemporaryDirectory() as folder:
    path = Path(folder, "adapter.safetensors")
    save_file(adapter, path)
    adapter_bytes = path.stat().st_size
state_bytes = sum(
    value.numel() * value.element_size()
    for state in optimizer.state.values()
    for key, value in state.items()
    if key.startswith("exp_avg")
)
full_bytes = sum(p.numel() * p.element_size() for p in base_model.parameters())
shapes = [tuple(m.weight.shape) for n, m in base_model.named_modules() if n.split(".")[-1] in TARGETS]
counted, counted_bytes = storage_used(shapes, R, 32)
assert counted == lora_parameters, "storage() must agree with what is in the model"
print(f"adapter file       {adapter_bytes / 1e6:8.1f} MB   (computed {counted_bytes / 1e6:.1f} MB and a header)")
print(f"whole model        {full_bytes / 1e6:8.1f} MB   {full_bytes / adapter_bytes:.0f} times as much")
print(
    f"AdamW's state      {state_bytes / 1e6:8.1f} MB   instead of {2 * full_bytes / 1e6:,.0f} MB for a full fine-tune"
)

# %% [markdown]
# Now your `storage` on the models of the papers, from their configurations alone.
#
# - The *Adapter* slide: 1000 tasks, 7 billion parameters, 16 bits. **Compute it before you believe it**: the slide says
#   14 PB.
# - Llama-2-7B: 32 blocks, width 4096, rank 8 on query and value.
# - GPT-3: 96 blocks, width 12,288, rank 4 on query and value. The paper reports a checkpoint of 35 MB instead of 350 GB,
#   "roughly 10,000 times" less. Count it: how much is that rounded?

# %%
full_7b = 1000 * 7e9 * 16 / 8
adapters_7b = 1000 * 14e6
llama_parameters, llama_bytes = storage_used([(4096, 4096)] * 2 * 32, 8, 16)
gpt3_parameters, gpt3_bytes = storage_used([(12288, 12288)] * 2 * 96, 4, 16)
print(f"1000 full fine-tunes of 7B: {full_7b / 1e12:.0f} TB (the slide's 14 PB is a slip: PB is a thousand times more)")
print(f"1000 adapters of 14 MB:     {adapters_7b / 1e9:.0f} GB, a thousandth")
print(f"Llama-2-7B, q and v, r 8:   {llama_parameters:,} parameters, {llama_bytes / 1e6:.1f} MB at 16 bits")
print(
    f"GPT-3 175B, q and v, r 4:   {gpt3_parameters:,} parameters, {gpt3_bytes / 1e6:.1f} MB = {gpt3_bytes / 2**20:.0f} MiB"
)

# %% [markdown]
# ## 5 · How much rank does it take?
# The same short training at several ranks, judged by the perplexity of held-out tickets. Each run starts from the same
# base and sees the same orders in the same order. `alpha` stays at 16 for every rank, since the paper too sets it once and
# does not tune it again: the branch's scale is 16 / r.

# %%
ranks = (1, 2, 4, 8, 16) if FULL else (1, 8)
sweep_rows = test_rows[:32]
unplug(model)
sweep, sweep_losses = {}, {}
for rank in ranks:
    plug(model, rank, ALPHA)
    sweep_losses[rank], _ = fine_tune(model, steps=14 if FULL else 1, batch_size=4 if FULL else 2, desc=f"rank {rank}")
    sweep[rank] = perplexity(model, sweep_rows)
    unplug(model)
for rank, found in sweep.items():
    count, _ = storage_used(shapes, rank, 32)
    print(f"rank {rank:>2}: {count:>9,} parameters, held-out perplexity {found:.3f}")

# %%
fig, (axes,) = style.figure(width=6.5)
axes.plot([str(rank) for rank in sweep], list(sweep.values()), "o-")
axes.set(xlabel="rank", ylabel="perplexity", title="held-out tickets after a short training", ylim=(1, None))
axes.set_ylim(1, 1.25 * max(sweep.values()))
told = ", ".join(f"{found:.2f} at rank {rank}" for rank, found in sweep.items())
style.alt(fig, f"Held-out perplexity over the rank of the branches after a short training: {told}.")

# %% [markdown]
# <div class="alert alert-info"><b>Read it honestly.</b> One seed and 14 steps of four orders a rank: small differences
# between neighbours are noise. Set the range of your curve beside the distance to the untrained model (section 4.1), and
# beside the paper's own table (GPT-3, query and value, WikiSQL), which is flat: 73.4, 73.3, 73.7, 73.8 % at rank 1, 2, 4,
# 8. A notation is an easy thing to learn: from this alone you may <i>not</i> conclude that rank 1 suffices for, say, a new
# language. And try <code>plug(model, rank, 2 * rank)</code>: with the same scale for all, small ranks take more steps to
# get there, which is easily mistaken for a lack of capacity.</div>

# %% [markdown]
# ## 6 · The paper and you

# %%
lab = "lab05_lora"
wide = f"{len(test_rows)} held-out orders; seed {SEED} alone: 95 % interval {bounds[2][0]:.0f} to {bounds[2][1]:.0f} %"
keep_note = f"{len(keep_rows)} questions; LoRA does not prevent forgetting, it makes it reversible"


def record(claim, quantity, paper, ours, unit="", **more):
    results.record(claim, quantity, paper, ours, unit, lab=lab, **more)


record(
    "C17", "change of logits by adding branches with B = 0, largest", 0, start_difference, holds=start_difference == 0
)
record(
    "C17",
    "change of logits by merging, largest",
    0,
    merge_difference,
    holds=merge_difference < 1e-3 * largest_logit,
    note=f"float32 rounding; the largest logit is {largest_logit:.0f}",
)
for (label, batch_size), found in latency.items():
    expected = 1 if label == "merged" else None
    low, high = found.quartiles
    holds = abs(found.ratio - 1) < 0.1 if label == "merged" else None
    record(
        "C17",
        f"decoding step, batch {batch_size}, {label} ÷ base",
        expected,
        found.ratio,
        spread=(low, high),
        holds=holds,
        note="median and quartiles of interleaved pairs",
    )
record(
    "C17",
    "decoding step, batch 1, an exact copy ÷ base",
    1,
    control.ratio,
    spread=control.quartiles,
    note="control: closer than this, no two models can be told apart here",
)
record("C17", "trained parameters", None, percent, "%", note=f"{lora_parameters:,} of {base_parameters:,}")
record(
    "C17",
    "held-out tickets exactly right, before",
    None,
    100 * before["exact"],
    "%",
    spread=bounds[0],
    note=f"95 % interval from {len(before_texts)} held-out orders",
)
record(
    "C17",
    "held-out tickets exactly right, LoRA",
    None,
    100 * after["exact"],
    "%",
    spread=bounds[2],
    seeds=[SEED],
    note=wide,
    holds=after["exact"] > before["exact"],
)
record("C17", "perplexity of held-out tickets, before", None, perplexity_before)
record(
    "C17",
    "perplexity of held-out tickets, LoRA",
    None,
    perplexity_after,
    seeds=[SEED],
    holds=perplexity_after < perplexity_before,
)
record("C17", "everyday questions answered, before", None, 100 * keep_before, "%")
record("C17", "everyday questions answered, LoRA plugged in", None, 100 * keep_after, "%", seeds=[SEED], note=keep_note)
record(
    "C17",
    "change of logits by training and unplugging, largest",
    0,
    unplugged_difference,
    holds=unplugged_difference == 0,
)
for rank, found in sweep.items():
    record(
        "C17",
        f"perplexity of held-out tickets, rank {rank}, short training",
        None,
        found,
        seeds=[SEED],
        holds=found < 1.5 * min(sweep.values()),
        note="flat means within 1.5 times the best rank; the paper's WikiSQL column: 73.4 to 73.8 %",
    )
record("C11", "1000 full fine-tunes of 7B at 16 bits", "14 PB", f"{full_7b / 1e12:.0f} TB", note="a slip on the slide")
record("C11", "1000 adapters of 14 MB", "14 GB", f"{adapters_7b / 1e9:.0f} GB")
record("C11", "our adapter, on disk", None, adapter_bytes / 1e6, "MB", note=f"the model: {full_bytes / 1e6:.0f} MB")
record("C11", "AdamW state", None, state_bytes / 1e6, "MB", note=f"full fine-tune: {2 * full_bytes / 1e6:,.0f} MB")
record(
    "C11",
    "LoRA for Llama-2-7B, q and v, rank 8, 16 bits",
    None,
    llama_bytes / 1e6,
    "MB",
    note=f"{llama_parameters:,} parameters",
)
record("C11", "LoRA for GPT-3, q and v, rank 4, 16 bits", 35, gpt3_bytes / 2**20, "MiB", note="the paper prints MB")
record(
    "C16",
    "context taken by three examples in the prompt",
    None,
    shot_tokens,
    "tokens",
    note=f"of {context:,}; {few_shot['exact']:.0%} of the tickets exactly right",
)
record("C16", "context taken by LoRA", 0, 0, "tokens", note="by construction: no token is added")
record("C16", "reading the prompt, three examples ÷ bare", None, prefill.ratio, spread=prefill.quartiles)
results.table(lab)

# %%
predictions = [
    ("a. parameters trained", predicted_percent, f"{percent:.2f} %"),
    ("b. tickets exactly right", predicted_tickets, f"{after['exact']:.0%}"),
    ("c. decoding step, unmerged ÷ base", predicted_unmerged, f"{latency['unmerged', 1].ratio:.2f}"),
    ("c. decoding step, merged ÷ base", predicted_merged, f"{latency['merged', 1].ratio:.2f}"),
    ("d. What is the capital of France?", predicted_france, keep_after_texts[0]),
]
for what, guess, found in predictions:
    print(f"{what:36} you said: {'–' if guess is None else guess!s:12} measured: {found}")

# %% [markdown]
# The effects that must show in a full run, whatever the machine (times are left to the table):

# %%
if FULL:
    assert before["exact"] <= 0.05, "the notation must be new to the base model"
    assert after["exact"] >= 0.35, f"only {after['exact']:.0%} of the held-out tickets are right"
    assert perplexity_after < 1.5 < 10 < perplexity_before
    assert keep_after < keep_before, "this training is narrow enough to make the model forget"
    assert all(found < perplexity_before / 4 for found in sweep.values()), "every rank must learn"

# %% [markdown]
# ## 7 · Explain
# ### 7.1 In your own words · 10 points
# A company serves one base model to 200 customers, each with a LoRA of their own. Requests arrive mixed. Should it merge?
# Argue with what you measured: latency, bytes, and what merging does to a batch that mixes customers. Five sentences.

# %% [markdown] nbgrader={"grade": true, "grade_id": "lora-explain", "locked": false, "points": 10, "schema_version": 3, "solution": true, "task": false}
# Merging makes a customer's model exactly as fast as the base, but then it is a full copy: 200 copies of the weights in
# memory, or a slow swap before each request. A batch could only hold requests of one customer, so with mixed arrivals the
# batches become small and the weights are read again for each, which costs more than the branches do. Unmerged, one
# base and 200 small files fit easily (ours is about a hundredth of the model), and one batch can serve everybody: the
# base product is shared and each row adds its own branch. The price is the measured overhead of the branch, for example
# 1.08 times the base at batch 1 and 1.05 at batch 16 in one run. So: unmerged for many customers with mixed traffic; merged for one customer with so much
# traffic that a copy of the model pays for itself.
#
# *Marking: 3 points for latency with a measured ratio, 3 for bytes of 200 copies against 200 adapters, 4 for seeing that
# a merged model can serve only its own customer's requests.*

# %% [markdown]
# ### 7.2 Which of these is wrong, and why? · 10 points
# Exactly one statement is wrong. Say which, and explain it with a gradient.
#
# - **A.** With $B = 0$ the output of the model is not affected, whatever $A$ is.
# - **B.** If $A$ and $B$ both started at zero, training would still work; it would only start a little more slowly.
# - **C.** After merging, a decoding step costs what it costs in the base model.
# - **D.** LoRA still runs the backward pass through the frozen layers; what it saves is their weight gradients and the
#   optimizer's state.

# %% [markdown] nbgrader={"grade": true, "grade_id": "lora-wrong", "locked": false, "points": 10, "schema_version": 3, "solution": true, "task": false}
# B is wrong. With $h = Wx + s\,BAx$ and $g = \partial L / \partial h$, the gradients are $\partial L/\partial B = s\,g\,(Ax)^\top$
# and $\partial L/\partial A = s\,B^\top g\,x^\top$. If both factors are zero, both gradients are zero, and they stay zero
# for ever: no step of gradient descent or Adam leaves this point. With $A$ random and $B = 0$ the gradient of $B$ is not
# zero, so the first step moves $B$, and from the second step on $A$ moves too.
#
# *Marking: 3 points for B, 5 for both gradients vanishing, 2 for saying that they vanish at every later step as well.*
