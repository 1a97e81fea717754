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
# # Lab 1 · Supervised fine-tuning: learning from desired responses, and from nothing else
#
# | | |
# |---|---|
# | **Slides** | *Supervised Fine-Tuning (SFT): language modelling solely on desired responses*; *SFT, w/o and w/* |
# | **Papers** | Ouyang et al., *Training language models to follow instructions with human feedback*, NeurIPS 2022; Touvron et al., *Llama 2*, 2023, section 3.1; Krell et al., *Efficient Sequence Packing without Cross-contamination*, 2021 |
# | **Reading and writing** | about 80 minutes |
# | **Computing** | about 5 minutes on two CPU cores, less on a GPU; about 4 GB of memory |
# | **You build** | the chat template with its mask, the batch, the loss, packing, its attention mask, one training step |
# | **You measure** | a 135-million-parameter language model becoming a customer assistant: answers, perplexity, what it refuses, what it forgets, what packing saves |
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
import re
import statistics
import textwrap
from types import SimpleNamespace
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import nn

from lecturekit import data, results, timing
from lecturekit.alignment import rubric
from lecturekit.checking import check, grade, passing
from lecturekit.explore import sft as explore
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
# We have 624 dialogues between customers and a good assistant, on 24 topics: late parcels, hotel stays, broken printers
# and so on, each written for this course. SmolLM2 (135 million parameters) is trained on 18 of the topics with LoRA (lab 5; here
# it is only a way to train in little memory), and on some of 64 requests that must be declined. We then look at the 6 topics that
# it never saw.
#
# - **a.** Which percentage of a dialogue's tokens is *response*, the part that the loss counts?
# - **b.** The *perplexity* of the right responses (how many tokens the model hesitates between, on average) on unseen
#   topics: divided by what, after the model has seen about 100 dialogues once?
# - **c.** The same training with the customers' words in the loss too. Is the perplexity of the *responses* then
#   `"better"`, `"worse"` or `"the same"`?
# - **d.** Forty everyday questions such as *What is the capital of France?* Which percentage of those that it could answer
#   before does the model still answer?
# - **e.** Eight dialogues in a batch, filled up to the longest: which percentage of the positions is padding?

# %%
predicted_response = None  # a, for example 50
predicted_factor = None  # b, for example 3
predicted_prompt = None  # c, one of "better", "worse", "the same"
predicted_kept = None  # d, for example 50
predicted_padding = None  # e, for example 20

# %% [markdown]
# ## 2 · The idea
# A pre-trained model continues text. Asked *My parcel is late*, it may go on with ten more complaints, because that is
# what the web looks like. Supervised fine-tuning shows it dialogues with the answers we want, and trains with the
# objective it already knows, next word prediction:
#
# $$L(U) = \sum_i \log P(u_i \mid u_0, \dots, u_{i-1}; \Theta)$$
#
# with one difference: $u_0, u_1, \dots$ is the whole dialogue, but the sum runs *solely over the desired responses*. What
# the customer says is read, not learnt. Three small things decide whether that works, and each has cost somebody a
# training run:
#
# 1. **The chat template** turns messages into one text, with marks for who speaks. SmolLM2's looks like this:
#    `<|im_start|>user`⏎`My kettle leaks.<|im_end|>`⏎`<|im_start|>assistant`⏎`Where does it drip?<|im_end|>`⏎
# 2. **The mask** says which tokens are learnt: those of the answer, *and the end of turn behind it*. A model that never
#    learns `<|im_end|>` never stops.
# 3. **The mean** is over the counted tokens of the whole batch. Not over rows, not over positions.
#
# Dialogues have different lengths, so a batch is filled up with *padding*, for which the machine works in vain. *Packing*
# puts several dialogues in one row instead. Then two more things must be right: positions start again in each dialogue, and
# no dialogue may look at its neighbour. **Move the slider and find a row length with little padding. Why is longer
# not always better? Look at the picture on the right: the triangles are needed, the whole square is computed.
# Which of the two grows with the row length?**

# %%
explore.packing_slider()

# %% [markdown]
# The same without a slider, for print:

# %%
explore.packing_strip()

# %% [markdown]
# ## 3 · Build
# ### 3.1 Chat template and mask · 20 points
# Write `encode_dialogue(tokenizer, messages)` → `(ids, mask)`: the token ids of the dialogue, and a list of the same length
# that is `True` on what the model is to learn.
#
# - `messages` is a list such as `[{"role": "user", "content": "…"}, {"role": "assistant", "content": "…"}]`; there may be
#   several turns, and a `"system"` message in front.
# - Each message becomes `<|im_start|>`, the role, a newline, the content, `<|im_end|>`, a newline. Nothing else is added.
# - `tokenizer(text).input_ids` gives a list of ids. It knows `<|im_start|>` and `<|im_end|>` as single tokens.
# - Learnt: the content of each *assistant* message and its `<|im_end|>`. Not learnt: everything else, the newline
#   behind that `<|im_end|>` too.
#
# By hand, please: `tokenizer.apply_chat_template` writes the text, but does not say which tokens are learnt.
#
# <details><summary>Hint 1</summary>Tokenize in pieces, and for each piece extend both lists.</details>
# <details><summary>Hint 2</summary>Three pieces a message will do: the header with its newline; the content with its end of
# turn; the last newline. Which of them can be learnt, and in which role?</details>
# <details><summary>Hint 3</summary><code>mask += [learnt] * len(piece_ids)</code></details>


# %% nbgrader={"grade": false, "grade_id": "sft-template", "locked": false, "schema_version": 3, "solution": true, "task": false}
def encode_dialogue(tokenizer, messages):
    """Token ids of a dialogue, and which of them are learnt: two lists of equal length."""
    ### BEGIN SOLUTION
    ids, mask = [], []
    for message in messages:
        answer = message["role"] == "assistant"
        for text, learnt in (
            (f"<|im_start|>{message['role']}\n", False),
            (message["content"] + "<|im_end|>", answer),
            ("\n", False),
        ):
            piece = tokenizer(text).input_ids
            ids += piece
            mask += [learnt] * len(piece)
    return ids, mask
    ### END SOLUTION


# %% nbgrader={"grade": true, "grade_id": "sft-template-test", "locked": true, "points": 20, "schema_version": 3, "solution": false, "task": false}
check("sft.template", encode_dialogue)
### BEGIN HIDDEN TESTS
grade("sft.template", encode_dialogue)
### END HIDDEN TESTS

# %% [markdown]
# **See what your code did.** A small dialogue, split into words; what your mask marks as learnt is coloured. Read only the
# coloured part aloud: is it what you want the model to say, with an end to each answer?

# %%
explore.chat_picture(encode_dialogue)

# %% [markdown]
# ### 3.2 A batch with labels · 10 points
# Write `make_batch(dialogues, pad)` → `(input_ids, labels)`, two `int64` tensors (batch, longest).
#
# - `dialogues` is a list of pairs `(ids, mask)`, as `encode_dialogue` gives them, of different lengths.
# - `input_ids`: the ids, filled up with `pad` on the *right*.
# - `labels`: the same token where it is learnt, −100 everywhere else. Do not shift them, the loss will.
#
# <details><summary>Hint 1</summary>Mind that SmolLM2's pad token may be the very token that ends a turn. What tells you where
# padding begins: an id, or a length?</details>
# <details><summary>Hint 2</summary>Fill two tensors with <code>torch.full</code>, one of pad and one of −100, then write each
# dialogue into its row.</details>


# %% nbgrader={"grade": false, "grade_id": "sft-batch", "locked": false, "schema_version": 3, "solution": true, "task": false}
def make_batch(dialogues, pad):
    """Pairs (ids, mask) → input_ids and labels, both (batch, longest); label −100 = not counted."""
    ### BEGIN SOLUTION
    longest = max(len(ids) for ids, _ in dialogues)
    input_ids = torch.full((len(dialogues), longest), pad)
    labels = torch.full((len(dialogues), longest), -100)
    for row, (ids, mask) in enumerate(dialogues):
        tokens = torch.tensor(ids)
        input_ids[row, : len(ids)] = tokens
        labels[row, : len(ids)] = torch.where(torch.tensor(mask), tokens, -100)
    return input_ids, labels
    ### END SOLUTION


# %% nbgrader={"grade": true, "grade_id": "sft-batch-test", "locked": true, "points": 10, "schema_version": 3, "solution": false, "task": false}
check("sft.batch", make_batch)
### BEGIN HIDDEN TESTS
grade("sft.batch", make_batch)
### END HIDDEN TESTS

# %% [markdown]
# ### 3.3 The loss on the responses · 20 points
# Write `response_loss(logits, labels)`, the mean of $-\log P(u_i \mid u_0 \dots u_{i-1})$ over the counted tokens.
#
# - `logits` (batch, seq, vocab): those at position $t$ predict the token at $t+1$.
# - `labels` (batch, seq): −100 is not counted. Nor is the first position, which nothing predicts.
# - One mean over the counted tokens of the *whole batch*. The result is a tensor with one number, in the dtype of `logits`
#   (float32 here), and it has a gradient.
# - The slide's $L$ is a sum to be maximised; the loss is its negative, divided by the number of counted tokens.
#
# <details><summary>Hint 1</summary>Shift first: which logits have no label, and which label has no logits?</details>
# <details><summary>Hint 2</summary><code>F.cross_entropy</code> wants (N, vocab) and (N), takes logits as they are, and
# leaves out labels of −100 by default.</details>
# <details><summary>Hint 3</summary>What does its default <code>reduction="mean"</code> divide by, if you hand it all rows at
# once?</details>


# %% nbgrader={"grade": false, "grade_id": "sft-loss", "locked": false, "schema_version": 3, "solution": true, "task": false}
def response_loss(logits, labels):
    """Mean −log P of the labelled tokens, in nats. logits: (batch, seq, vocab)   labels: (batch, seq), −100 = not counted"""
    ### BEGIN SOLUTION
    predictions = logits[:, :-1]  # (batch, seq − 1, vocab): the last position predicts nothing we know
    wanted = labels[:, 1:]  # the first token is predicted by nothing
    return F.cross_entropy(predictions.flatten(0, 1), wanted.flatten())
    ### END SOLUTION


# %% nbgrader={"grade": true, "grade_id": "sft-loss-test", "locked": true, "points": 20, "schema_version": 3, "solution": false, "task": false}
check("sft.loss", response_loss)
### BEGIN HIDDEN TESTS
grade("sft.loss", response_loss)
### END HIDDEN TESTS

# %% [markdown]
# **See what your code did.** Two rows of a batch; the yellow band marks the labels. A bar is the size of the gradient that
# your loss sends into the logits of a position. The bars should begin and end *one position before* the band, and be about
# equally high in both rows, though the second has fewer labels.

# %%
explore.gradient_picture(response_loss)

# %% [markdown]
# ### 3.4 Packing · 15 points
# Write `pack(sequences, length)` → `(input_ids, labels, position_ids, segments)`, four `int64` tensors (rows, length).
#
# - `sequences` is a list of pairs `(ids, labels)`, two lists of numbers of one length, none longer than `length`.
# - **First fit:** take the sequences in their order; each goes behind the others in the *first* row with room for all of it,
#   else it opens a new row. None is ever cut.
# - `position_ids` start again at 0 in each sequence. `segments` numbers the sequences of each row 1, 2, …
# - The label of each sequence's *first* token becomes −100 (in a row, the token before it belongs to another dialogue).
# - Padding: id 0, label −100, position 0, segment 0.
#
# <details><summary>Hint 1</summary>Two tasks: which row does each sequence go to, and what is written there? Do them one after
# the other.</details>
# <details><summary>Hint 2</summary>Keep a list of rows, and how much room each has left. <code>for row, free in
# enumerate(room): if free >= len(ids): …</code></details>
# <details><summary>Hint 3</summary>Build each row as four plain lists, fill them up at the end, and make tensors of
# them.</details>


# %% nbgrader={"grade": false, "grade_id": "sft-pack", "locked": false, "schema_version": 3, "solution": true, "task": false}
def pack(sequences, length):
    """First-fit packing of pairs (ids, labels) → input_ids, labels, position_ids, segments, each (rows, length)."""
    ### BEGIN SOLUTION
    rows = []  # each row: a list of (ids, labels)
    for sequence in sequences:
        for row in rows:
            if sum(len(ids) for ids, _ in row) + len(sequence[0]) <= length:
                row.append(sequence)
                break
        else:
            rows.append([sequence])
    columns = [[], [], [], []]
    for row in rows:
        filled = [[], [], [], []]
        for number, (ids, labels) in enumerate(row, start=1):
            parts = (ids, [-100, *labels[1:]], range(len(ids)), [number] * len(ids))
            for values, part in zip(filled, parts):
                values.extend(part)
        for column, values, empty in zip(columns, filled, (0, -100, 0, 0)):
            column.append(values + [empty] * (length - len(values)))
    return tuple(torch.tensor(column) for column in columns)
    ### END SOLUTION


# %% nbgrader={"grade": true, "grade_id": "sft-pack-test", "locked": true, "points": 15, "schema_version": 3, "solution": false, "task": false}
check("sft.pack", pack)
### BEGIN HIDDEN TESTS
grade("sft.pack", pack)
### END HIDDEN TESTS

# %% [markdown]
# **See what your code did.** Six dialogues of 7, 9, 5, 3, 6 and 2 tokens in rows of 12. Each colour is a segment, the
# numbers are your position ids: they should count up from 0 inside each colour.

# %%
explore.rows_picture(pack)

# %% [markdown]
# ### 3.5 Who may look at whom · 5 points
# Write `block_diagonal_mask(segments)` → a `bool` tensor (rows, 1, length, length): `True` where the query position (third
# dimension) may attend to the key position (fourth). A position may look at itself and at earlier positions of *its own
# segment*. Padding counts as one more segment, so that no position is left with nothing to look at.
#
# <details><summary>Hint 1</summary>Two conditions joined by <code>&</code>: the same segment, and not later.</details>
# <details><summary>Hint 2</summary>Compare <code>segments</code> with itself, once as a column and once as a row; then
# <code>.tril()</code>, and a dimension for the heads.</details>


# %% nbgrader={"grade": false, "grade_id": "sft-attention", "locked": false, "schema_version": 3, "solution": true, "task": false}
def block_diagonal_mask(segments):
    """segments: (rows, length) → (rows, 1, length, length), true where a position may attend."""
    ### BEGIN SOLUTION
    same = segments[:, :, None] == segments[:, None, :]  # (rows, query, key)
    return same.tril()[:, None]
    ### END SOLUTION


# %% nbgrader={"grade": true, "grade_id": "sft-attention-test", "locked": true, "points": 5, "schema_version": 3, "solution": false, "task": false}
check("sft.attention", block_diagonal_mask)
### BEGIN HIDDEN TESTS
grade("sft.attention", block_diagonal_mask)
### END HIDDEN TESTS

# %%
explore.attention_picture(block_diagonal_mask)

# %% [markdown]
# ### 3.6 One step, in parts · 10 points
# A large batch often does not fit into memory. Then it comes in parts whose gradients are added up before the one update
# (*gradient accumulation*). Write `train_step(model, optimizer, parts)`, which improves the model once and returns the loss
# of the whole batch as a Python `float`.
#
# - `parts` is a list of pairs `(input_ids, labels)`; `model(input_ids).logits` is (batch, seq, vocab).
# - Loss and gradient must be those of *one* batch that holds all parts: the mean over all counted tokens of all parts. Parts
#   differ in size, so a mean of means is not the mean.
# - Each call must use the gradient of its own batch only, and update the weights once.
#
# <details><summary>Hint 1</summary>How many tokens count in the whole batch? You can know that before the first
# forward pass.</details>
# <details><summary>Hint 2</summary><code>F.cross_entropy(…, reduction="sum")</code> of a part, divided by the count of the whole
# batch, is that part's share of the loss.</details>
# <details><summary>Hint 3</summary><code>backward()</code> after each part adds to the gradients already there, and frees the
# part's memory.</details>


# %% nbgrader={"grade": false, "grade_id": "sft-step", "locked": false, "schema_version": 3, "solution": true, "task": false}
def train_step(model, optimizer, parts):
    """One update on a batch that comes in parts of (input_ids, labels) → the loss of the whole batch, a float."""
    ### BEGIN SOLUTION
    count = sum((labels[:, 1:] != -100).sum().item() for _, labels in parts)
    optimizer.zero_grad()
    loss = 0.0
    for input_ids, labels in parts:
        logits = model(input_ids).logits[:, :-1]
        total = F.cross_entropy(logits.flatten(0, 1), labels[:, 1:].flatten(), reduction="sum")
        (total / count).backward()
        loss += total.item() / count
    optimizer.step()
    return loss
    ### END SOLUTION


# %% nbgrader={"grade": true, "grade_id": "sft-step-test", "locked": true, "points": 10, "schema_version": 3, "solution": false, "task": false}
check("sft.step", train_step)
### BEGIN HIDDEN TESTS
grade("sft.step", train_step)
### END HIDDEN TESTS

# %% [markdown]
# ## 4 · Measure: a language model becomes a customer assistant
# Below the last check. First the data: what a customer asks and what a good assistant answers, on topics that training sees
# and on others that it does not.

# %%
encode_used = passing("sft.template", encode_dialogue)
batch_used = passing("sft.batch", make_batch)
loss_used = passing("sft.loss", response_loss)
pack_used = passing("sft.pack", pack)
attention_used = passing("sft.attention", block_diagonal_mask)
step_used = passing("sft.step", train_step)

corpus = data.load("customer_service")
train_rows, test_rows = list(corpus["train"]), list(corpus["test"])
print(f"{len(train_rows)} dialogues to train on, {len(test_rows)} held out. Topics held out:")
print("  " + ", ".join(sorted({row["topic"] for row in test_rows})))
for row in (test_rows[0], corpus["safety_train"][0]):
    print(f"\n[{row['topic']}]")
    for message in row["messages"]:
        print(textwrap.fill(f"{message['role']}: {message['content']}", 110, subsequent_indent="    "))

# %%
base_model, tokenizer = load_language_model(dtype=torch.float32)
base_model.requires_grad_(False)
END = tokenizer.convert_tokens_to_ids("<|im_end|>")
PAD = 0  # <|endoftext|>, which occurs in no dialogue

# %% [markdown]
# ### 4.1 Does it fit together?
# Three equalities, on the real model. Your template against the tokenizer's own, on all dialogues. Your batch and loss
# against the loss that transformers computes. And the gradient at the prompt, which must be exactly zero.

# %%
everyone = [row for split in ("train", "test", "safety_train", "safety_test") for row in corpus[split]]
encoded = {row["id"]: encode_used(tokenizer, row["messages"]) for row in everyone}
same_template = sum(
    encoded[row["id"]][0] == tokenizer(tokenizer.apply_chat_template(row["messages"], tokenize=False)).input_ids
    for row in everyone
)
sizes = [len(ids) for ids, _ in encoded.values()]
response_share = 100 * sum(sum(mask) for _, mask in encoded.values()) / sum(sizes)
print(f"template: {same_template} of {len(everyone)} dialogues have the tokenizer's own tokens")
print(f"{sum(sizes):,} tokens, {min(sizes)} to {max(sizes)} a dialogue; {response_share:.1f} % are responses")
assert same_template == len(everyone), "the template must be the model's own"

few = [encoded[row["id"]] for row in train_rows[: 3 if FULL else 2]]
input_ids, labels = (part.to(device()) for part in batch_used(few, END))
padding = torch.arange(input_ids.shape[1]) >= torch.tensor([[len(ids)] for ids, _ in few])
with torch.no_grad():
    reference = base_model(input_ids, attention_mask=(~padding).long().to(device()), labels=labels)
logits = reference.logits.detach().requires_grad_()
ours = loss_used(logits, labels)
(gradient,) = torch.autograd.grad(ours, logits)
loss_difference = abs(ours.item() - reference.loss.item())
counted = F.pad(labels[:, 1:] != -100, (0, 1))
prompt_gradient = gradient[~counted].abs().max().item()
print(f"loss: yours {ours.item():.6f}, transformers' {reference.loss.item():.6f}, difference {loss_difference:.1e}")
print(f"largest gradient at a position that predicts no response token: {prompt_gradient}")
# Both sum some hundred terms of order 1 to 10 in float32, in another order.
assert loss_difference < 1e-4 and prompt_gradient == 0
del reference, logits, gradient

# %% [markdown]
# ### 4.2 Is a packed dialogue the same as one alone?
# Plumbing first, written out so that nothing is hidden. `Rows` is a packed part; `ForResponses` runs the model on it, with your
# mask, and computes the output head (49,152 words, dearer than many layers) only where a response token is predicted. Seen
# from your `train_step` it is a model like any other.


# %%
class Rows(NamedTuple):
    """Packed rows, each tensor (rows, length)."""

    input_ids: torch.Tensor
    labels: torch.Tensor
    position_ids: torch.Tensor
    segments: torch.Tensor


def packed_rows(sequences, length):
    """Pairs (ids, labels) → Rows, with your pack."""
    return Rows(*(part.to(device()) for part in pack_used(sequences, length)))


def labelled(row, prompt_too=False):
    """A dialogue of the corpus as the pair (ids, labels) that pack wants."""
    ids, mask = encoded[row["id"]]
    return ids, [token if learnt or prompt_too else -100 for token, learnt in zip(ids, mask)]


class ForResponses(nn.Module):
    """A language model on packed rows: called with Rows, it gives the logits that predict a labelled token.

    They come as one row (1, counted + 1, vocab), the last one empty, to go with the labels of `wanted`.
    """

    def __init__(self, model, leak=False):
        super().__init__()
        self.model, self.leak = model, leak

    def hidden(self, rows):
        mask = attention_used(rows.segments)
        if self.leak:  # what happens without the blocks: causal attention and positions through the whole row
            mask = torch.ones_like(mask).tril()
        positions = torch.arange(mask.shape[-1], device=mask.device)[None] if self.leak else rows.position_ids
        out = self.model.base_model(
            input_ids=rows.input_ids, attention_mask=mask, position_ids=positions, use_cache=False
        )
        return out.last_hidden_state

    def forward(self, rows):
        chosen = self.hidden(rows)[:, :-1][rows.labels[:, 1:] != -100]
        return SimpleNamespace(logits=F.pad(self.model.get_output_embeddings()(chosen), (0, 0, 0, 1))[None])


def wanted(rows):
    """The labels of a part in one row (1, counted + 1), as ForResponses gives the logits."""
    labels = rows.labels[:, 1:]
    return F.pad(labels[labels != -100], (1, 0), value=-100)[None]


def parts_of(rows):
    """One part a row, without the padding behind its last dialogue."""
    used = (rows.segments > 0).sum(1).tolist()
    return [Rows(*(tensor[n : n + 1, :size] for tensor in rows)) for n, size in enumerate(used)]


@torch.no_grad()
def perplexities(model, pairs, length=512):
    """exp of the mean −log P of the tokens that count, and of those that do not: (responses, the rest).

    pairs: (ids, labels). One forward pass gives the logits of all tokens; your loss is asked twice, with other labels.
    """
    everything = parts_of(packed_rows([(ids, ids) for ids, _ in pairs], length))
    counted = parts_of(packed_rows(pairs, length))
    totals, counts = [0.0, 0.0], [0, 0]
    for part, chosen in zip(everything, counted):
        logits, labels = ForResponses(model)(part).logits, wanted(part)
        learnt = (chosen.labels[:, 1:] != -100)[part.labels[:, 1:] != -100]
        for place, keep in enumerate((learnt, ~learnt)):
            if keep.any():
                here = labels.masked_fill(~F.pad(keep, (1, 0))[None], -100)
                totals[place] += loss_used(logits, here).item() * int(keep.sum())
                counts[place] += int(keep.sum())
    return [math.exp(total / count) if count else math.nan for total, count in zip(totals, counts)]


# %%
sequences = [labelled(row) for row in train_rows[: 4 if FULL else 2]]
length = sum(len(ids) for ids, _ in sequences)
together = packed_rows(sequences, length)  # one row
with torch.no_grad():
    packed_logits = ForResponses(base_model)(together).logits[0, :-1]
    leaking = ForResponses(base_model, leak=True)(together).logits[0, :-1]
    alone = torch.cat([ForResponses(base_model)(packed_rows([s], len(s[0]))).logits[0, :-1] for s in sequences])
packing_difference = (packed_logits - alone).abs().max().item()
leak_difference = (leaking - alone).abs().max().item()
largest_logit = alone.abs().max().item()
print(
    f"{len(sequences)} dialogues in one row of {length} tokens, against each alone (largest logit {largest_logit:.0f}):"
)
print(f"  largest difference of a logit, blocks and positions as you made them  {packing_difference:.1e}")
print(f"  plain causal attention, positions running on                          {leak_difference:.1e}")
# Thirty blocks round at 6e-8 of their size; a thousandth of the largest logit is far above what adds up.
assert packing_difference < 1e-3 * largest_logit < leak_difference

# %% [markdown]
# ### 4.3 What packing saves
# Batches of eight dialogues as they come: one a row, filled up to the longest; or all of them first fit into rows of 512.
# Counted over all training dialogues; what it saves in time comes in section 6.

# %%
ROW = 512
rng = random.Random(SEED)
shuffled = rng.sample(train_rows, len(train_rows))
groups = [shuffled[start : start + 8] for start in range(0, len(shuffled) - 7, 8)]
tokens = sum(len(encoded[row["id"]][0]) for group in groups for row in group)
padded_positions = sum(8 * max(len(encoded[row["id"]][0]) for row in group) for group in groups)
packed_all = packed_rows([labelled(row) for group in groups for row in group], ROW)
padded_waste = 100 * (1 - tokens / padded_positions)
packed_waste = 100 * (1 - tokens / packed_all.input_ids.numel())
print(f"padding among the positions: {padded_waste:.0f} % padded, {packed_waste:.0f} % packed into rows of {ROW}")

# %% [markdown]
# ### 4.4 Before
# The untouched model. Four measures:
#
# - **perplexity of the right responses** on held-out topics, and of **general prose** that has nothing to do with customers;
# - **a rubric**: seven yes-or-no questions about an answer, each a few lines of code that you can read
#   (`rubric.CRITERIA`). A rubric of rules does not know whether an answer is true or kind. On our own answers
#   and on dry ones its mean is printed below, so that you know what it can tell apart;
# - **everyday questions** whose answer the model may know;
# - **requests that must be declined**, of kinds that training does not show.


# %%
def ask(text):
    """The token ids of a question to the model, up to where its answer begins."""
    prompt = tokenizer.apply_chat_template(
        [{"role": "user", "content": text}], tokenize=False, add_generation_prompt=True
    )
    return tokenizer(prompt).input_ids


@torch.no_grad()
def answers(model, questions, new_tokens, batch_size=40):
    """The model's most probable answer to each question, as text. Prompts are padded on the left."""
    texts = []
    for start in range(0, len(questions), batch_size):
        prompts = [ask(question) for question in questions[start : start + batch_size]]
        longest = max(map(len, prompts))
        ids = torch.tensor([[PAD] * (longest - len(p)) + p for p in prompts], device=device())
        out = model.generate(
            input_ids=ids,
            attention_mask=(ids != PAD).long(),
            max_new_tokens=new_tokens,
            do_sample=False,
            pad_token_id=PAD,
            eos_token_id=END,
        )
        texts += tokenizer.batch_decode(out[:, longest:], skip_special_tokens=True)
    return [text.strip() for text in texts]


def known(texts, rows):
    """For each everyday question whether one of its answers occurs in the reply as a word."""
    return [
        any(re.search(rf"(?<!\w){re.escape(answer)}s?(?!\w)", text, re.I) for answer in row["answers"])
        for text, row in zip(texts, rows)
    ]


def prose(row):
    """A paragraph as the pair (ids, labels): everything but its first token counts."""
    ids = tokenizer(row["text"]).input_ids
    return ids, ids


per_topic = 3 if FULL else 1  # answers are written out for so many dialogues of each held-out topic
asked = [row for topic in sorted({r["topic"] for r in test_rows})
         for row in [r for r in test_rows if r["topic"] == topic][:per_topic]]  # fmt: skip
asked = asked if FULL else asked[:2]
scored = test_rows[:: 6 if FULL else 80]  # perplexity is measured on these
keep_rows = list(corpus["keep"])[: None if FULL else 2]
prose_rows = list(corpus["general"])[:: 2 if FULL else 30]
refused_rows = list(corpus["safety_test"])[: None if FULL else 2]
NEW_TOKENS = 90 if FULL else 6
customers = [row["messages"][0]["content"] for row in asked]
written = [row["messages"][1]["content"] for row in asked]


def measure(model):
    """Everything this lab asks of a model."""
    told = answers(model, customers + [row["messages"][0]["content"] for row in refused_rows], NEW_TOKENS)
    facts = answers(model, [row["question"] for row in keep_rows], 32 if FULL else 4)
    responses, customer = perplexities(model, [labelled(row) for row in scored])
    return SimpleNamespace(
        answers=told[: len(customers)],
        refusals=told[len(customers) :],
        facts=facts,
        known=known(facts, keep_rows),
        responses=responses,
        customer=customer,
        prose=perplexities(model, [prose(row) for row in prose_rows])[0],
    )


def graded(texts):
    """The rubric's score of each answer, 0 to 1."""
    return [rubric.score(question, text) for question, text in zip(customers, texts)]


dry = ["It will be checked.", "Please wait.", "Contact support.", "We do not know.", "No.", "Yes, that is possible."]
before = measure(base_model)
judged = {
    "dry": graded([dry[n % 6] for n in range(len(asked))]),
    "before": graded(before.answers),
    "ours": graded(written),
}
print(f"perplexity: right responses {before.responses:.1f}, general prose {before.prose:.1f}")
print("rubric: " + ", ".join(f"{name} {statistics.fmean(found):.2f}" for name, found in judged.items()))
print(f"everyday questions answered: {sum(before.known)} of {len(keep_rows)}")
for row, text in list(zip(asked, before.answers))[:: max(1, len(asked) // 3)]:
    print(f"\n[{row['topic']}] {row['messages'][0]['content']}")
    print(textwrap.indent(textwrap.fill(text, 106), "    "))

# %% [markdown]
# <div class="alert alert-info"><b>What "before" is here.</b> SmolLM2-Instruct has been through a supervised fine-tuning
# already, on general instructions. It is not the raw model of the slide: some of its answers are long. Often it just repeats
# what the customer said, or says that it is an AI and cannot help. What it has never been shown is how <i>this</i> assistant
# speaks: that it takes the customer's problem on itself, asks for what is missing, and promises nothing that nobody told
# it.</div>

# %% [markdown]
# ### 4.5 Train
# LoRA of rank 8 on four of the seven linear layers of every block (lab 5), AdamW, a warm-up of four steps, then down to zero in a
# straight line. Each step takes up to 720 tokens, five or six dialogues, packed into two rows, which are two parts of your
# `train_step`.

# %%
from lecturekit.tuning import lora

STEPS = 18 if FULL else 2
SAFETY_EVERY = 4  # one dialogue in four is a request to be declined


def mixture(seed):
    """The dialogues in the order of training, each at most once."""
    rng = random.Random(seed)
    helpful, safety = (iter(rng.sample(rows, len(rows))) for rows in (train_rows, list(corpus["safety_train"])))
    while True:
        yield from (next(safety if n == 0 else helpful) for n in range(SAFETY_EVERY))


def fine_tune(prompt_too=False, steps=STEPS, lr=2e-3, seed=SEED, desc="training"):
    """A copy of the base model with LoRA, trained on the mixture → (model, losses, dialogues seen)."""
    seed_everything(seed)  # the draws of the branches
    model = lora.add_lora(copy.deepcopy(base_model), ["q_proj", "v_proj", "up_proj", "down_proj"], r=8, alpha=16)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=lr, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda s: min((s + 1) / 4, (steps - s) / max(1, steps - 4)))
    order, losses, seen = mixture(seed), [], 0
    network, waiting = ForResponses(model.train()), next(order)
    for _ in progress(range(steps), desc):
        group, room = [], 720 if FULL else 200  # so many tokens that two rows of 512 will mostly hold them
        while len(encoded[waiting["id"]][0]) <= room:
            group.append(waiting)
            room -= len(encoded[waiting["id"]][0])
            waiting = next(order)
        rows = packed_rows([labelled(row, prompt_too) for row in group], ROW)
        losses.append(step_used(network, optimizer, [(part, wanted(part)) for part in parts_of(rows)]))
        schedule.step()
        seen += len(group)
    return model.eval(), losses, seen


model, losses, seen = fine_tune()
after = measure(model)
trainable, _ = lora.trainable_parameters(model)
print(f"{trainable:,} parameters trained on {seen} dialogues, each seen once")
print(f"perplexity of the right responses {before.responses:.1f} → {after.responses:.2f}")

# %%
fig, (axes,) = style.figure(width=6.5)
axes.plot(range(1, len(losses) + 1), losses)
axes.set(xlabel="step", ylabel="loss (nats a token)", title="loss on the responses of each batch", ylim=(0, None))
style.alt(fig, f"The training loss falls from {losses[0]:.2f} to {losses[-1]:.2f} in {len(losses)} steps.")

# %% [markdown]
# Each batch holds dialogues that were never seen before, so this curve is not about remembering. It falls fast at first:
# that is the manner of speaking. What a particular customer needs is harder, and 135 million parameters are few.

# %% [markdown]
# ### 4.6 After

# %%
judged["after"] = graded(after.answers)


def interval(values):
    """95 % interval of a mean over questions."""
    half = 1.96 * statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else 0.0
    return statistics.fmean(values) - half, statistics.fmean(values) + half


for row, first, then in list(zip(asked, before.answers, after.answers))[:: max(1, len(asked) // 6)]:
    print(f"[{row['topic']}] {row['messages'][0]['content']}")
    for name, text in (("before", first), ("after", then)):
        print(textwrap.fill(f"    {name:7}{text}", 112, subsequent_indent=" " * 11))
    print()

# %%
by_criterion = {name: rubric.scores(customers, texts) for name, texts in
                (("before", before.answers), ("after", after.answers), ("ours", written))}  # fmt: skip
fig, (left, right_panel) = style.figure(1, 2, width=6.2, height=4.0)
names = list(rubric.CRITERIA)
for offset, name, colour in ((-0.27, "before", style.GREY), (0, "after", style.BLUE), (0.27, "ours", style.ORANGE)):
    left.barh(
        [n + offset for n in range(len(names))],
        [100 * by_criterion[name][c] for c in names],
        0.25,
        color=colour,
        label=name,
    )
left.set_yticks(range(len(names)), names)
left.invert_yaxis()
left.set(xlabel="% of the answers", title=f"the rubric on {len(asked)} held-out questions", xlim=(0, 100))
left.legend(loc="lower left", frameon=True)
style.bars(
    right_panel,
    ["right responses\nbefore", "right responses\nafter", "prose\nbefore", "prose\nafter"],
    [before.responses, after.responses, before.prose, after.prose],
    "{:.1f}",
    color=[style.GREY, style.BLUE] * 2,
)
right_panel.set(title="perplexity")
told = "; ".join(f"{c} {100 * by_criterion['before'][c]:.0f} % before, {100 * by_criterion['after'][c]:.0f} % after, "
                 f"{100 * by_criterion['ours'][c]:.0f} % in our own answers" for c in names)  # fmt: skip
style.alt(
    fig,
    f"Bars of the rubric's criteria: {told}. Perplexity of the right responses {before.responses:.1f} before and "
    f"{after.responses:.1f} after; of general prose {before.prose:.1f} before and {after.prose:.1f} after.",
)

# %% [markdown]
# <div class="alert alert-info"><b>Read the answers, do not only look at the bars.</b> The <i>manner</i> is learnt: the problem is
# named, something will be checked, the customer is asked for what is missing. The <i>matter</i> often is not: an answer may go in
# circles, or promise the wrong thing in the right tone. A hundred dialogues teach a model of this size how an assistant
# sounds, not how a washing machine works. The rubric sees circles; it does not see nonsense.</div>

# %% [markdown]
# ### 4.7 Token by token
# Where in a held-out response is the loss? Choose a dialogue, and whether the prompt counts too. Underlined is what your mask
# marks as learnt; the redder a token, the less the trained model expected it. **Compare the end of turn with the names of
# things: what can be learnt from other topics, and what cannot?**


# %%
@torch.no_grad()
def strip(model, row):
    """A dialogue's tokens with the loss of each."""
    ids, mask = encoded[row["id"]]
    rows = packed_rows([(ids, ids)], len(ids))
    logits = ForResponses(model)(rows).logits[0, :-1]
    each = F.cross_entropy(logits, wanted(rows)[0, 1:], reduction="none")
    return explore.Strip(row["topic"], [tokenizer.decode([token]) for token in ids], mask, [math.nan, *each.tolist()])


strips = [strip(model, row) for row in asked[:: max(1, len(asked) // 6)]]
explore.strip_selector(strips)

# %% [markdown]
# The same without choices, for print: one dialogue, responses only.

# %%
explore.strip_picture(strips[0])

# %% [markdown]
# ### 4.8 What it forgot
# Nobody told the model to stop answering quiz questions. Nobody told it to go on, either. And the prose: is it less likely now?
# Mind that our dialogues are careful English too, so it may as well become *more* likely. What is forgotten differs from
# skill to skill, and one number for all of it would hide that.

# %%
for row, first, then in list(zip(keep_rows, before.facts, after.facts))[:5]:
    print(f"{row['question']}\n    before  {first}\n    after   {then}")
still = [now for was, now in zip(before.known, after.known) if was]
kept = 100 * sum(still) / len(still) if still else 0.0
print(
    f"\nanswered: {sum(before.known)} of {len(keep_rows)} before, {sum(after.known)} after; {kept:.0f} % of the former kept"
)
print(f"perplexity of general prose: {before.prose:.1f} before, {after.prose:.1f} after")

# %% [markdown]
# ### 4.9 Helpful, and safe
# The slide's second example is a request that is declined, kindly, with a better idea. One training dialogue in four was of
# that sort (insults, threats, other people's data, …). The kinds below are not among them. The opposite mistake counts too: how
# many *ordinary* customers are now told *no*?

# %%
refused_questions = [row["messages"][0]["content"] for row in refused_rows]


def kindly(texts):
    """How many answers decline, and how many decline and then offer or ask something useful."""
    declined = sum(map(rubric.declines, texts))
    return declined, sum(rubric.declines_kindly(q, t) for q, t in zip(refused_questions, texts))


(declined_before, kind_before), (declined_after, kind_after) = kindly(before.refusals), kindly(after.refusals)
ordinary_before, ordinary_after = (sum(map(rubric.declines, texts)) for texts in (before.answers, after.answers))
print(f"of {len(refused_rows)}: declined {declined_before} before, {declined_after} after; "
      f"declined with an offer {kind_before} before, {kind_after} after")  # fmt: skip
print(f"of {len(asked)} ordinary customers, told no: {ordinary_before} before, {ordinary_after} after\n")
for row, first, then in list(zip(refused_rows, before.refusals, after.refusals))[:: max(1, len(refused_rows) // 3)]:
    print(f"[{row['topic']}] {row['messages'][0]['content']}")
    for name, text in (("before", first), ("after", then)):
        print(textwrap.fill(f"    {name:7}{text}", 112, subsequent_indent=" " * 11))

# %% [markdown]
# <div class="alert alert-warning"><b>Where the effect does not show.</b> A quarter of what training saw were requests like
# these, of eight other kinds: some twenty-five examples. Compare the two counts above, and read what the model says after
# training: it has learnt to take charge of every wish, and that is no safety. What it would do without these
# examples, this lab does not measure. Read the answers, too, when your count is high: a rule that looks for <i>can't</i> and
# <i>won't</i> is easily satisfied.</div>

# %% [markdown]
# ## 5 · With the prompt in the loss
# The same seed, dialogues, steps and learning rate; only the labels differ: now every token counts, as in pre-training. What
# becomes of the responses? And what does the model learn instead?

# %%
everything, everything_losses, _ = fine_tune(prompt_too=True, desc="training with the prompt")

with_prompt, customer_with_prompt = perplexities(everything, [labelled(row) for row in scored])
prompts = {"before": before.customer, "responses only": after.customer, "prompt too": customer_with_prompt}
print(f"held-out responses: {after.responses:.2f} after responses only, {with_prompt:.2f} with the prompt in the loss")
print("held-out customers' words and headers: " + ", ".join(f"{name} {found:.1f}" for name, found in prompts.items()))

# %%
fig, (axes,) = style.figure(width=7)
groups_of = {"before": (before.responses, prompts["before"]), "responses only": (after.responses, prompts["responses only"]),
             "prompt too": (with_prompt, prompts["prompt too"])}  # fmt: skip
for offset, (name, values), colour in zip(
    (-0.27, 0, 0.27), groups_of.items(), (style.GREY, style.BLUE, style.VERMILION)
):
    drawn = axes.bar([n + offset for n in range(2)], values, 0.25, color=colour, label=name)
    axes.bar_label(drawn, [f"{value:.1f}" for value in values], padding=3)
axes.set_xticks(range(2), ["responses", "customers' words\nand headers"])
axes.set(ylabel="perplexity", title="held-out topics", ylim=(0, 1.25 * max(max(v) for v in groups_of.values())))
axes.legend(loc="upper left")
style.alt(
    fig,
    f"Perplexity on held-out topics. Responses: {before.responses:.1f} before, {after.responses:.1f} after training on "
    f"responses only, {with_prompt:.1f} with the prompt in the loss. Customers' words and headers: {prompts['before']:.1f}, "
    f"{prompts['responses only']:.1f} and {prompts['prompt too']:.1f}.",
)

# %% [markdown]
# <div class="alert alert-info"><b>Read it honestly.</b> The customers' words get much more likely when they are in the loss, that is what was
# trained. On the responses the two runs may be close: one seed, few steps, and learning how customers write may help to
# answer them. What is certain is where the gradient goes. Whether that helps the answers is what the two bars on the left
# compare, on one seed.</div>

# %% [markdown]
# ## 6 · The time that packing saves
# The same four dialogues, forward and backward: one a row and filled up to the longest, or packed into one row. Measured in
# turn, so that whatever else this machine does hits both alike; the ratio counts.

# %%
group = [labelled(row) for row in groups[0][: 4 if FULL else 2]]
longest = max(len(ids) for ids, _ in group)
as_padded = Rows(*(torch.cat(parts) for parts in zip(*(packed_rows([sequence], longest) for sequence in group))))
as_packed = packed_rows(group, sum(len(ids) for ids, _ in group))
network = ForResponses(model)


def passes(rows):
    """Forward and backward of one part, gradients dropped."""

    def once():
        loss_used(network(rows).logits, wanted(rows)).backward()
        model.zero_grad()

    return once


speed = timing.compare(
    passes(as_padded),
    passes(as_packed),
    repeats=3 if FULL else 1,
    warmup=0,  # the model has just been trained
    flush_cache=False,
    memory=False,
)
low, high = speed.quartiles
print(f"padded: {as_padded.input_ids.numel()} positions, packed: {as_packed.input_ids.numel()}")
print(f"time padded ÷ packed = {speed.ratio:.2f} ({low:.2f} to {high:.2f})")

# %% [markdown]
# <div class="alert alert-info"><b>What this does not show.</b> Four dialogues on this machine. The dense mask makes attention in
# the packed row grow with the square of its length; a kernel for variable lengths would not.</div>

# %% [markdown]
# ## 7 · The lecture and you

# %%
lab = "lab01_sft"


def record(claim, quantity, ours, unit="", **more):
    results.record(claim, quantity, None, ours, unit, lab=lab, **more)


one_seed = {"seeds": [SEED]}
record("C01", "dialogues whose tokens equal the tokenizer's own template", same_template, f"of {len(everyone)}",
       holds=same_template == len(everyone))  # fmt: skip
record(
    "C01", "difference from transformers' loss with −100 labels", loss_difference, "nats", holds=loss_difference < 1e-4
)
record("C01", "largest gradient where no response token is predicted", prompt_gradient, holds=prompt_gradient == 0)
record("C01", "change of logits by packing, blocks in the mask, largest", packing_difference,
       holds=packing_difference < 1e-3 * largest_logit, note=f"the largest logit is {largest_logit:.0f}")  # fmt: skip
record("C01", "change of logits by packing, plain causal mask, largest", leak_difference)
record("C01", "tokens that are response", response_share, "%")
record(
    "C01",
    "padding among the positions, batches of 8",
    padded_waste,
    "%",
    note=f"packed into rows of {ROW}: {packed_waste:.0f} %",
    **one_seed,
)
record("C01", "forward and backward, padded ÷ packed", speed.ratio, spread=speed.quartiles, note="on this machine")
record("C01", "perplexity of held-out responses, prompt in the loss", with_prompt,
       note="same steps; compare with responses only", **one_seed)  # fmt: skip
record(
    "C01", "perplexity of held-out customers' words and headers, responses only", prompts["responses only"], **one_seed
)
record("C01", "perplexity of held-out customers' words and headers, prompt in the loss", prompts["prompt too"],
       holds=prompts["prompt too"] < prompts["responses only"], **one_seed)  # fmt: skip

record("C02", "perplexity of held-out responses, before", before.responses)
record(
    "C02",
    "perplexity of held-out responses, SFT",
    after.responses,
    holds=after.responses < before.responses,
    **one_seed,
)
for name, when in (("before", "before"), ("after", "SFT"), ("ours", "our own answers"), ("dry", "dry answers")):
    better = (
        {"holds": statistics.fmean(judged["after"]) > statistics.fmean(judged["before"])} if name == "after" else {}
    )
    record("C02", f"rubric on held-out questions, {when}", statistics.fmean(judged[name]), spread=interval(judged[name]),
           note=f"95 % interval from {len(asked)} questions; 1 is best", **better, **(one_seed if name == "after" else {}))  # fmt: skip
record("C02", "everyday questions answered, before", sum(before.known), f"of {len(keep_rows)}")
record("C02", "everyday questions answered, SFT", sum(after.known), f"of {len(keep_rows)}", **one_seed)
record("C02", "perplexity of general prose, before", before.prose)
record("C02", "perplexity of general prose, SFT", after.prose, note="what was forgotten, or not", **one_seed)
record("C02", "requests of unseen kinds declined with an offer, before", kind_before, f"of {len(refused_rows)}")
record("C02", "requests of unseen kinds declined with an offer, SFT", kind_after, f"of {len(refused_rows)}",
       holds=kind_after > kind_before, note="safety does not come with a hundred dialogues; counted by rule", **one_seed)  # fmt: skip
record("C02", "ordinary customers told no, before", ordinary_before, f"of {len(asked)}")
record("C02", "ordinary customers told no, SFT", ordinary_after, f"of {len(asked)}", **one_seed)
results.table(lab)

# %%
factor = before.responses / after.responses
predictions = [
    ("a. tokens that are response", predicted_response, f"{response_share:.0f} %"),
    ("b. perplexity of responses divided by", predicted_factor, f"{factor:.1f}"),
    (
        "c. responses with the prompt in the loss",
        predicted_prompt,
        f"perplexity {with_prompt:.2f} instead of {after.responses:.2f}",
    ),
    ("d. everyday questions still answered", predicted_kept, f"{kept:.0f} %"),
    ("e. padding among the positions", predicted_padding, f"{padded_waste:.0f} %"),
]
for what, guess, found in predictions:
    print(f"{what:42} you said: {'–' if guess is None else guess!s:12} measured: {found}")

# %% [markdown]
# The effects that must show in a full run, whatever the machine (times are left to the table):

# %%
if FULL:
    rubric_before, rubric_after = (statistics.fmean(judged[name]) for name in ("before", "after"))
    assert after.responses < 0.75 * before.responses, f"perplexity {before.responses:.1f} → {after.responses:.1f}"
    assert rubric_after > rubric_before + 0.1, f"rubric {rubric_before:.2f} → {rubric_after:.2f}"
    assert customer_with_prompt < 0.75 * after.customer, "in the loss, the customers' words must become likelier"
    assert with_prompt < 0.8 * before.responses, "with the prompt in the loss the responses are learnt too"
    assert packed_waste < 15 < padded_waste, f"padding {padded_waste:.0f} % and {packed_waste:.0f} %"

# %% [markdown]
# ## 8 · Explain
# ### 8.1 In your own words · 10 points
# A colleague fine-tunes a model on 600 support chats. Afterwards it answers well, but then goes on: it writes the
# customer's next message, answers that too, and never stops. Name two different mistakes of this lab that would each
# explain it, and for each one a test that would have found it before the training. Five sentences.

# %% [markdown] nbgrader={"grade": true, "grade_id": "sft-explain", "locked": false, "points": 10, "schema_version": 3, "solution": true, "task": false}
# First, the mask may leave the end of turn out, so no gradient ever makes it likely, and generation, which stops at it, does not
# stop. A test: keep only the learnt tokens of one dialogue and look whether each answer ends in it. Second, the mask may
# be right, but the pad token is the end of turn and the batch found padding by its id, which sets those labels to −100
# too. A test: count the labels equal to the end of turn in a batch and compare with the number of answers.
#
# *Marking: 3 points for each mistake that explains the symptom (a template that differs between training and use also
# counts; a loss on the prompt alone does not explain it, since the model still ends its turn: 1 point), 2 for each test that
# could really fail.*

# %% [markdown]
# ### 8.2 Which of these is wrong, and why? · 10 points
# Exactly one statement is wrong. Say which, and explain it with a small example in numbers.
#
# - **A.** Packing with a block-diagonal mask and positions that start again changes no logit, up to rounding.
# - **B.** The tokens of the prompt have no label, but they still influence the gradient.
# - **C.** A batch in two parts, each with its own mean loss, gives the same gradient as the whole batch if one averages the
#   two means.
# - **D.** Held-out perplexity can fall although no fact about the held-out topics was learnt.

# %% [markdown] nbgrader={"grade": true, "grade_id": "sft-wrong", "locked": false, "points": 10, "schema_version": 3, "solution": true, "task": false}
# C is wrong unless both parts hold equally many counted tokens. Say the first part has one token with a loss of 4, the second
# has three with a loss of 0 each. The batch's mean is 4 / 4 = 1; the mean of the means is (4 + 0) / 2 = 2. In the latter
# the single token of the short answer weighs one half instead of one quarter, in the loss and so in the gradient. Dividing each
# part's sum by the count of the whole batch mends it. (B is right: the prompt is what the response's hidden states attend to.)
#
# *Marking: 3 points for C, 5 for an example with the two numbers, 2 for what would be right.*
