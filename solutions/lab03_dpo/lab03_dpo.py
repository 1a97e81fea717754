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
# # Lab 3 · DPO: learning from preferences without a reward model
#
# | | |
# |---|---|
# | **Slides** | *Direct Preference Optimization (DPO)*, both; the objective is that of *RLHF: fine-tuning with reinforcement learning* |
# | **Papers** | Rafailov et al., *Direct Preference Optimization: Your Language Model is Secretly a Reward Model*, NeurIPS 2023; beside it Pang et al., *Iterative Reasoning Preference Optimization*, Razin et al., *Unintentional Unalignment: Likelihood Displacement in DPO*, Park et al., *Disentangling Length from Quality in DPO*, Grattafiori et al., *The Llama 3 Herd of Models*, all 2024 |
# | **Reading and writing** | about 75 minutes |
# | **Computing** | about 5 minutes on two CPU cores, less on a GPU; about 4 GB of memory |
# | **You build** | the optimum of reward minus KL, the reward inside a policy, the log-probability of an answer, the loss, its gradient's weights, the cached reference |
# | **You measure** | a 135-million-parameter model that is to say where Shanghai is, and to admit that it does not know Sparx: what the pairs say, what it *generates*, β, the bracket, SFT and RLHF beside it |
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
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import nn

from lecturekit import data, results, timing
from lecturekit.checking import check, grade, passing
from lecturekit.explore import dpo as explore
from lecturekit.explore import style
from lecturekit.models import load_language_model
from lecturekit.runtime import base_seed, device, profile, progress, seed_everything
from lecturekit.statistics import wilson
from lecturekit.tuning.lora import LoRALinear, add_lora, trainable_parameters

FULL = profile() == "full"  # LECTUREKIT_PROFILE=smoke runs the same cells in seconds, with numbers that mean nothing
SEED = base_seed()  # 0, unless LECTUREKIT_SEED names another
seed_everything(SEED)

# %% [markdown]
# ## 1 · Predict
# Before any code: write down what you expect. Nothing here is graded. The answers come back beside your measurements
# at the end, and being wrong is how they become interesting.
#
# The slide's example is *Where is Shanghai?* We take it further. SmolLM2 (135 million parameters) gets pairs of answers
# about 64 real cities, where the preferred answer names the country, and about 64 places that we made up, such as
# *Velmora*, where the preferred answer is *I do not know a place called Velmora.* After a few steps of DPO we ask about
# places that it has not been trained on. (The slide's losing answer is *Shanghai does not exist*. We replace it: a model of this
# size prefers the winner to that before any training, so such pairs would show nothing.)
#
# - **a.** Untrained: of 40 invented places, what percentage does it admit not to know?
# - **b.** After DPO the preferred answer wins in nearly every held-out pair. What percentage of the invented places does the
#   model then refuse when it *writes its own answer*?
# - **c.** During DPO, does the log-probability of the *preferred* answers go `"up"`, stay the `"same"`, or go `"down"`?
# - **d.** One round of RLHF (sample, rate, compare with the reference, learn) against one DPO step on as many answers:
#   how many times as long?

# %%
predicted_refusals_before = None  # a, for example 50
predicted_refusals_after = None  # b
predicted_likelihood = None  # c, one of "up", "same", "down"
predicted_rlhf_time = None  # d, for example 2.0

# %% [markdown]
# ## 2 · The idea
# RLHF looks for the policy $\pi$ with the most reward that stays near a reference $\pi_\text{ref}$ (slide *RLHF*):
#
# $$\max_\pi\; \mathbb{E}_{y\sim\pi(\cdot|x)}\big[r(x,y)\big] - \beta\,\mathrm{KL}\big[\pi(\cdot|x)\,\|\,\pi_\text{ref}(\cdot|x)\big]$$
#
# DPO notices three things, and you will build each of them.
#
# 1. **The best policy is known.** $\pi^*(y|x) = \frac{1}{Z(x)}\,\pi_\text{ref}(y|x)\,e^{r(x,y)/\beta}$. One cannot *sample* from it,
#    since $Z(x)$ is a sum over all answers there are; but it can be written down.
# 2. **So each policy stands for a reward.** Solve for $r$: $\;r(x,y) = \beta\log\frac{\pi^*(y|x)}{\pi_\text{ref}(y|x)} + \beta\log Z(x)$.
# 3. **In a pair, $Z(x)$ cancels.** People prefer $y_w$ to $y_l$ with probability $\sigma(r(x,y_w)-r(x,y_l))$ (Bradley–Terry, as in
#    the reward model), and both answers belong to the same prompt. What is left has no reward model in it:
#
# $$\mathcal{L} = -\log\sigma\Big(\beta\log\frac{\pi(y_w|x)}{\pi_\text{ref}(y_w|x)} - \beta\log\frac{\pi(y_l|x)}{\pi_\text{ref}(y_l|x)}\Big)$$
#
# <div class="alert alert-info"><b>Two slides, two brackets.</b> The first DPO slide has this formula. The second, <i>An
# example of DPO</i>, closes σ( … ) after the first log-ratio, so that the second one stands outside: a slip. (And the slide
# dates the paper 2024; it was posted and presented in 2023.) The figure shows that it is no matter of taste. Each map is the loss of one pair over its two
# log-ratios; training starts at the dot and goes down along the arrows.</div>
#
# **Move the slider (or tab to it and press the arrow keys). Where do the arrows on the left fade, and what does β do to that? Find the
# lowest point on the right.**

# %%
explore.surface_slider()

# %% [markdown]
# The same without a slider, for print:

# %%
explore.surface_strip()

# %% [markdown]
# With the first slide's bracket a pair that is settled leaves the model alone. With the other one the rejected answer is
# pushed down with the same force for ever, and the "loss" has no lowest value. You will see both at work in section 4.

# %% [markdown]
# ## 3 · Build
# ### 3.1 The optimum · 10 points
# Write `optimal_policy(reference, rewards, beta)`: the best policy $\pi^*$ where there are only a few answers to each
# prompt.
#
# - `reference` (prompts, answers): probabilities, each row adds up to 1 · `rewards` (prompts, answers) · `beta` a number
#   → (prompts, answers), probabilities
# - Rewards may be large: $e^{r/\beta}$ must not overflow. A probability may be 0, and then stays 0.
#
# <details><summary>Hint 1</summary>Z(x) makes the probabilities of one prompt add up to 1. Which dimension is that?</details>
# <details><summary>Hint 2</summary>Take the logarithm of π_ref · exp(r/β). What is left of the product, and of
# the overflow?</details>
# <details><summary>Hint 3</summary>Exponentiating and dividing by the sum along a dimension is one function of torch,
# which subtracts the maximum for you.</details>


# %% nbgrader={"grade": false, "grade_id": "dpo-optimum", "locked": false, "schema_version": 3, "solution": true, "task": false}
def optimal_policy(reference, rewards, beta):
    """π* ∝ π_ref · exp(r / β).   reference, rewards: (prompts, answers)   →   (prompts, answers)"""
    ### BEGIN SOLUTION
    return torch.softmax(reference.log() + rewards / beta, dim=-1)
    ### END SOLUTION


# %% nbgrader={"grade": true, "grade_id": "dpo-optimum-test", "locked": true, "points": 10, "schema_version": 3, "solution": false, "task": false}
check("dpo.optimum", optimal_policy)
### BEGIN HIDDEN TESTS
grade("dpo.optimum", optimal_policy)
### END HIDDEN TESTS

# %% [markdown]
# **See what your code did.** Five answers to one prompt, at three values of β. A large β leaves the reference as it is,
# a small one takes the best-rated answer only. Is there a β at which *does not exist* is gone and *a big city* still there?

# %%
explore.optimum_picture(optimal_policy)

# %% [markdown]
# ### 3.2 The reward inside a policy · 10 points
# Write `implicit_reward(policy, reference, beta)`: the reward that a policy stands for, leaving out $\beta\log Z(x)$, which
# nobody can compute and nobody needs.
#
# - `policy`, `reference`: **log**-probabilities of the same answers, of one shape, which the result has too
#
# <details><summary>Hint</summary>The logarithm of a ratio, when you are given logarithms, is …</details>


# %% nbgrader={"grade": false, "grade_id": "dpo-reward", "locked": false, "schema_version": 3, "solution": true, "task": false}
def implicit_reward(policy, reference, beta):
    """r̂ = β · log(π / π_ref), from log-probabilities of any one shape."""
    ### BEGIN SOLUTION
    return beta * (policy - reference)
    ### END SOLUTION


# %% nbgrader={"grade": true, "grade_id": "dpo-reward-test", "locked": true, "points": 10, "schema_version": 3, "solution": false, "task": false}
check("dpo.reward", implicit_reward)
### BEGIN HIDDEN TESTS
grade("dpo.reward", implicit_reward)
### END HIDDEN TESTS

# %% [markdown]
# Do the two fit together? From rewards to the optimum and back again should give the rewards that went in, up to one
# number for each prompt. Two answers to one prompt differ by exactly what they should:

# %%
optimal_used, reward_used = passing("dpo.optimum", optimal_policy), passing("dpo.reward", implicit_reward)
some_reference = torch.tensor([[0.5, 0.3, 0.2], [0.1, 0.1, 0.8]])
some_rewards = torch.tensor([[1.0, 0.0, -1.0], [2.0, 3.0, 0.0]])
found = reward_used(optimal_used(some_reference, some_rewards, 0.5).log(), some_reference.log(), 0.5)
for row, (given, back) in enumerate(zip(some_rewards, found)):
    print(f"prompt {row + 1}: rewards {given.tolist()}, back again {[round(r, 3) for r in back.tolist()]}")
    print(f"          difference of the first two: {given[0] - given[1]:.3f}, back again {back[0] - back[1]:.3f}")

# %% [markdown]
# ### 3.3 The log-probability of an answer · 15 points
# Write `sequence_logprob(logits, tokens, mask)`: $\log\pi(y|x)$ for each row of a batch.
#
# - `logits` (batch, seq, vocab): those at position $t$ predict the token at $t+1$
# - `tokens` (batch, seq) · `mask` (batch, seq) bool: true on the tokens of the answer, false on prompt and padding
# - → (batch,), float32. Logits may come in bfloat16 and may be large.
#
# <details><summary>Hint 1</summary>Shift first: which logits predict nothing we know? Which token is predicted by nothing?
# The mask belongs to the tokens.</details>
# <details><summary>Hint 2</summary><code>log_softmax</code> over the vocabulary, in float32; then <code>gather</code> picks
# one number a position.</details>
# <details><summary>Hint 3</summary>The probability of a sequence is a product. So its logarithm is …</details>


# %% nbgrader={"grade": false, "grade_id": "dpo-logprob", "locked": false, "schema_version": 3, "solution": true, "task": false}
def sequence_logprob(logits, tokens, mask):
    """log π(y | x).   logits: (batch, seq, vocab)   tokens, mask: (batch, seq)   →   (batch,)"""
    ### BEGIN SOLUTION
    logprobs = logits[:, :-1].float().log_softmax(-1)  # (batch, seq − 1, vocab): the last position predicts nothing
    picked = logprobs.gather(-1, tokens[:, 1:, None]).squeeze(-1)  # (batch, seq − 1)
    return (picked * mask[:, 1:]).sum(1)
    ### END SOLUTION


# %% nbgrader={"grade": true, "grade_id": "dpo-logprob-test", "locked": true, "points": 15, "schema_version": 3, "solution": false, "task": false}
check("dpo.logprob", sequence_logprob)
### BEGIN HIDDEN TESTS
grade("dpo.logprob", sequence_logprob)
### END HIDDEN TESTS

# %% [markdown]
# ### 3.4 The loss · 20 points
# Write `dpo_loss`: the mean of $\mathcal L$ over the pairs of a batch.
#
# - four tensors (pairs,) of log-probabilities, `beta` a number → a scalar, with a gradient to the policy's two
# - It must stay finite for margins of ± 10,000 nats.
#
# <details><summary>Hint 1</summary>First the two implicit rewards, then their difference.</details>
# <details><summary>Hint 2</summary><code>torch.sigmoid</code> of −200 is 0, and the logarithm of 0 is −∞. torch has one
# function for both steps.</details>
# <details><summary>Hint 3</summary>The slide maximises, optimizers minimise. And compare the two slides' brackets.</details>


# %% nbgrader={"grade": false, "grade_id": "dpo-loss", "locked": false, "schema_version": 3, "solution": true, "task": false}
def dpo_loss(policy_chosen, policy_rejected, reference_chosen, reference_rejected, beta):
    """The DPO loss, averaged over pairs. All but beta: log-probabilities (pairs,)."""
    ### BEGIN SOLUTION
    chosen = policy_chosen - reference_chosen
    rejected = policy_rejected - reference_rejected
    return -F.logsigmoid(beta * (chosen - rejected)).mean()
    ### END SOLUTION


# %% nbgrader={"grade": true, "grade_id": "dpo-loss-test", "locked": true, "points": 20, "schema_version": 3, "solution": false, "task": false}
check("dpo.loss", dpo_loss)
### BEGIN HIDDEN TESTS
grade("dpo.loss", dpo_loss)
### END HIDDEN TESTS

# %% [markdown]
# **See what your code did.** Your loss of one pair while one of the log-ratios moves and the other stays 0. The two panels
# should be mirror images. If yours is a straight line on the right, look at the bracket.

# %%
explore.loss_picture(dpo_loss)

# %% [markdown]
# ### 3.5 What the gradient does · 10 points
# Differentiate the loss of one pair, and you get (section 4 of the paper)
#
# $$\nabla\mathcal L = -\beta\;\underbrace{\sigma\big(\hat r(y_l) - \hat r(y_w)\big)}_{\text{weight}}\;\big[\nabla\log\pi(y_w|x) - \nabla\log\pi(y_l|x)\big]$$
#
# Write `gradient_weight`, which gives that weight for each pair: how wrongly the policy ranks it.
#
# - arguments as for `dpo_loss` → (pairs,), from 0 to 1
#
# <details><summary>Hint</summary>Mind the order: a pair that is ranked wrongly must get a weight near 1.</details>


# %% nbgrader={"grade": false, "grade_id": "dpo-weight", "locked": false, "schema_version": 3, "solution": true, "task": false}
def gradient_weight(policy_chosen, policy_rejected, reference_chosen, reference_rejected, beta):
    """σ(r̂_rejected − r̂_chosen) for each pair: (pairs,)"""
    ### BEGIN SOLUTION
    reward_chosen = beta * (policy_chosen - reference_chosen)
    reward_rejected = beta * (policy_rejected - reference_rejected)
    return torch.sigmoid(reward_rejected - reward_chosen)
    ### END SOLUTION


# %% nbgrader={"grade": true, "grade_id": "dpo-weight-test", "locked": true, "points": 10, "schema_version": 3, "solution": false, "task": false}
check("dpo.weight", gradient_weight)
### BEGIN HIDDEN TESTS
grade("dpo.weight", gradient_weight)
### END HIDDEN TESTS

# %% [markdown]
# ### 3.6 The reference, once · 15 points
# The reference never learns, so its log-probabilities are the same in every epoch: *can be pre-computed offline*, says the slide. Write
# `cache_reference(reference, batches)`.
#
# - `reference` is an `nn.Module`, just out of training: `reference(batch)` gives `(chosen, rejected)`, two tensors
#   (pairs,) of log-probabilities
# - → a list with one `(chosen, rejected)` for each batch, in the same order
# - Each batch is read once; nothing is recorded for a backward pass; and the numbers must not be random.
#
# <details><summary>Hint 1</summary>Which layers behave differently during training, and which call of a module switches
# them over?</details>
# <details><summary>Hint 2</summary><code>.detach()</code> cuts a graph that has been built already. What keeps it from being
# built?</details>


# %% nbgrader={"grade": false, "grade_id": "dpo-cache", "locked": false, "schema_version": 3, "solution": true, "task": false}
def cache_reference(reference, batches):
    """[(chosen, rejected), …], one for each batch, computed once and without a graph."""
    ### BEGIN SOLUTION
    reference.eval()
    with torch.no_grad():
        return [reference(batch) for batch in batches]
    ### END SOLUTION


# %% nbgrader={"grade": true, "grade_id": "dpo-cache-test", "locked": true, "points": 15, "schema_version": 3, "solution": false, "task": false}
check("dpo.cache", cache_reference)
### BEGIN HIDDEN TESTS
grade("dpo.cache", cache_reference)
### END HIDDEN TESTS

# %% [markdown]
# ## 4 · Measure
# ### 4.1 A space small enough to check
# Is it true that DPO arrives at the optimum of RLHF without ever seeing a reward? With six possible answers it can be
# checked. Raters who follow Bradley–Terry compare answers drawn at random; DPO sees which of two won, nothing else.
# Then the same with the bracket of the example slide.

# %%
logprob_used = passing("dpo.logprob", sequence_logprob)
loss_used = passing("dpo.loss", dpo_loss)
weight_used = passing("dpo.weight", gradient_weight)
cache_used = passing("dpo.cache", cache_reference)


def slip_loss(policy_chosen, policy_rejected, reference_chosen, reference_rejected, beta):
    """The loss with the example slide's bracket: σ( … ) closes after the chosen log-ratio."""
    chosen, rejected = policy_chosen - reference_chosen, policy_rejected - reference_rejected
    return -(F.logsigmoid(beta * chosen) - beta * rejected).mean()


generator = torch.Generator().manual_seed(SEED)
small_reference = torch.softmax(torch.randn(6, generator=generator), 0)
small_rewards = 1.5 * torch.randn(6, generator=generator)
SMALL_BETA = 1.0
first, second = torch.randint(0, 6, (2, 100_000 if FULL else 2_000), generator=generator)
first, second = first[first != second], second[first != second]
first_wins = torch.rand(len(first), generator=generator) < torch.sigmoid(small_rewards[first] - small_rewards[second])
won, lost = torch.where(first_wins, first, second), torch.where(first_wins, second, first)


def small_policy(loss, steps=400 if FULL else 20):
    """A table of six logits, trained on the raters' choices alone. Returns its probabilities and the losses."""
    logits = nn.Parameter(small_reference.log())
    optimizer, losses = torch.optim.Adam([logits], lr=0.05), []
    ref = small_reference.log()
    for _ in range(steps):
        logprobs = logits.log_softmax(0)
        value = loss(logprobs[won], logprobs[lost], ref[won], ref[lost], SMALL_BETA)
        optimizer.zero_grad()
        value.backward()
        optimizer.step()
        losses.append(value.item())
    return logits.detach().softmax(0), losses


small_optimum = optimal_used(small_reference[None], small_rewards[None], SMALL_BETA)[0]
small_dpo, small_losses = small_policy(loss_used)
small_slip, slip_losses = small_policy(slip_loss)
distance_dpo, distance_slip, distance_start = [
    (policy - small_optimum).abs().sum().item() / 2 for policy in (small_dpo, small_slip, small_reference)
]
print(f"total variation to the RLHF optimum: reference {distance_start:.3f}, DPO {distance_dpo:.3f}")
print(f"with the example slide's bracket {distance_slip:.3f}")

# %%
fig, (left, right_panel) = style.figure(1, 2, width=5.6)
order = small_rewards.argsort(descending=True)
for offset, label, policy, colour in (
    (-0.3, "reference", small_reference, style.GREY),
    (-0.1, "RLHF optimum", small_optimum, style.ORANGE),
    (0.1, "DPO", small_dpo, style.BLUE),
    (0.3, "example slide", small_slip, style.VERMILION),
):
    left.bar([i + offset for i in range(6)], policy[order].tolist(), 0.19, color=colour, label=label)
left.set_xticks(range(6), [f"{r:.1f}" for r in small_rewards[order].tolist()])
left.set(xlabel="reward of the answer, which DPO never sees", title="probability of each answer")
left.legend()
right_panel.plot(small_losses, color=style.BLUE, label="DPO")
right_panel.plot(slip_losses, color=style.VERMILION, label="example slide")
right_panel.set(xlabel="step", title="loss")
right_panel.legend()
style.alt(
    fig,
    f"Six answers: the policy trained with DPO on choices alone is {distance_dpo:.3f} from the RLHF optimum in total variation, "
    f"the reference {distance_start:.3f}, a policy trained with the example slide's bracket {distance_slip:.3f}. "
    f"The DPO loss settles at {small_losses[-1]:.2f}; with the other bracket it is at {slip_losses[-1]:.1f} and still falls.",
)

# %% [markdown]
# ### 4.2 Real places and invented ones
# Each question comes with the answer that we prefer and one that we do not. For a real city the preferred answer names the
# country; for an invented place it says that the place is not known. The same two sentences, with the roles swapped: a
# model that only learns to *prefer a sentence* gets half of the pairs wrong.

# %%
places = data.load("places")
train_rows, test_rows = [list(places[split]) for split in ("train", "test")]
for row in test_rows[:2]:
    print(f"{row['question']}\n    chosen    {row['chosen']}\n    rejected  {row['rejected']}")
print(f"{len(train_rows)} pairs to train on, {len(test_rows)} held out: no place is in both")

# %%
model, tokenizer = load_language_model(dtype=torch.float32)
base_parameters = sum(p.numel() for p in model.parameters())
R, ALPHA, TARGETS = 8, 16, ["q_proj", "v_proj", "up_proj", "down_proj"]
add_lora(model, TARGETS, R, ALPHA)
lora_parameters, _ = trainable_parameters(model)
print(f"{base_parameters:,} parameters, {lora_parameters:,} of them trained")

# %% [markdown]
# Plumbing, written out so that nothing is hidden. Rows are padded on the *left*, so that all answers end together, and the
# output head over 49,152 words is computed for the last positions only, where the answers are. A batch holds the chosen
# answers on top of the rejected ones.

# %%
PAD = 0  # <|endoftext|>, which occurs in no prompt
STOP = tokenizer.convert_tokens_to_ids("<|im_end|>")


class Batch(NamedTuple):
    """before: (rows, seq)   tokens, mask: (rows, tail), the end of each row and which of it is the answer"""

    before: torch.Tensor
    tokens: torch.Tensor
    mask: torch.Tensor

    def chosen(self):
        """The upper half: the winners alone."""
        return Batch(*(part[: len(part) // 2] for part in self))

    def thinned(self):
        """Every second pair, real and invented alike."""
        return Batch(*(part[::2] for part in self))


def ask(question):
    """The token ids of a question, up to where the answer begins."""
    chat = [{"role": "user", "content": question}]
    return tokenizer(tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)).input_ids


def left_padded(sequences):
    """Lists of token ids → (rows, longest), filled with PAD on the left."""
    longest = max(len(sequence) for sequence in sequences)
    return torch.tensor([[PAD] * (longest - len(s)) + list(s) for s in sequences], device=device())


def make_batch(rows):
    """Pairs → one Batch of 2 × pairs rows."""
    answers = [[*tokenizer(row[side]).input_ids, STOP] for side in ("chosen", "rejected") for row in rows]
    ids = left_padded([ask(row["question"]) + answer for row, answer in zip([*rows, *rows], answers)])
    tail = 1 + max(len(answer) for answer in answers)  # one position more, which predicts the first token
    lengths = torch.tensor([len(answer) for answer in answers], device=device())
    mask = torch.arange(tail, device=device()) >= tail - lengths[:, None]
    return Batch(ids[:, :-tail], ids[:, -tail:], mask)


class LogProbs(nn.Module):
    """What a model gives the answers of a batch: log π(y | x), the chosen ones and the rejected ones."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def logits(self, batch):
        ids = torch.cat([batch.before, batch.tokens], dim=1)
        return self.model(ids, attention_mask=ids != PAD, logits_to_keep=batch.tokens.shape[1], use_cache=False).logits

    def rows(self, batch):
        return logprob_used(self.logits(batch), batch.tokens, batch.mask)  # (rows,)

    def forward(self, batch):
        return self.rows(batch).chunk(2)


@torch.no_grad()
def answers(model, rows, new_tokens=15, batch_size=40):
    """The model's most probable answer to each question, as text."""
    texts = []
    for start in range(0, len(rows), batch_size):
        ids = left_padded([ask(row["question"]) for row in rows[start : start + batch_size]])
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


UNKNOWN = re.compile(
    r"(not|n't|never) (know|aware|familiar|heard|exist|find|a real)|no (such )?place|unknown|fictional"
)


def refuses(text):
    """Whether an answer admits that the place is not known."""
    return UNKNOWN.search(text.lower()) is not None


def names_country(text, row):
    """Whether an answer names the right country, under any of its names."""
    return any(re.search(rf"\b{re.escape(name)}\b", text) for name in row["names"])


def interval(fraction, count):
    """Wilson's 95 % interval, in percent, of a fraction found in `count` trials. Unlike ± z·σ it is right near 0 and 1."""
    return tuple(100 * end for end in wilson(fraction, count))


def mean(values):
    return sum(values) / len(values)


def score(texts, rows):
    """Of what was generated: invented places refused, real places answered, and with the right country."""
    by_kind = {kind: [(t, r) for t, r in zip(texts, rows) if r["kind"] == kind] for kind in ("real", "invented")}
    return {
        "refused": mean([refuses(text) for text, _ in by_kind["invented"]]),
        "answered": mean([not refuses(text) for text, _ in by_kind["real"]]),
        "country": mean([names_country(text, row) and not refuses(text) for text, row in by_kind["real"]]),
        "tokens": mean([len(tokenizer(text).input_ids) for text in texts]),
    }


# %% [markdown]
# ### 4.3 Before

# %%
test_rows = test_rows if FULL else test_rows[:4]
new_tokens = 15 if FULL else 3
texts, scores = {}, {}
texts["untrained"] = answers(model, test_rows, new_tokens)
scores["untrained"] = score(texts["untrained"], test_rows)
for row, text in list(zip(test_rows, texts["untrained"]))[:6]:
    print(f"{row['question']}\n    {text}")

# %% [markdown]
# ### 4.4 The reference, once
# With LoRA the reference needs no second model: before the first step all $B$ are zero, so the model *is* its reference.
# One pass over the pairs, and what has to be kept of it is two numbers a pair. All seven trainings below share them.

# %%
PAIRS = 6 if FULL else 2  # pairs in a step, half of them real
STEPS = 20 if FULL else 2
shuffled = random.Random(SEED)
real, made_up = [
    shuffled.sample(group, len(group))
    for group in ([r for r in train_rows if r["kind"] == k] for k in ("real", "invented"))
]
half = PAIRS // 2
batches = [make_batch(real[i : i + half] + made_up[i : i + half]) for i in range(0, STEPS * half, half)]
test_batches = [make_batch(test_rows[i : i + 16]) for i in range(0, len(test_rows), 16)]

reference = LogProbs(model)
cached = cache_used(reference, batches)
test_cached = cache_used(reference, test_batches)
reference_chosen, reference_rejected = [torch.cat(side) for side in zip(*test_cached)]
cached_bytes = sum(term.numel() * term.element_size() for pair in cached for term in pair)
pair_count = sum(len(chosen) for chosen, _ in cached)
print(f"{pair_count} pairs: {cached_bytes:,} bytes instead of a model of {4 * base_parameters / 1e6:,.0f} MB")

# %% [markdown]
# ### 4.5 Train
# Three ways to learn from the same pairs, each from the same start, through one loop:
#
# - **DPO**: your loss and nothing else.
# - **DPO + NLL**: your loss, plus the winners' negative log-likelihood a token (Pang et al. 2024; Llama 3 does it with a
#   weight of 0.2; here it is 0.5).
# - **SFT**: that second term alone: fine-tuning on the winners, as in lab 1. The losers are not looked at.

# %%
BETA, LR, NLL = 0.1, 1e-3, 0.5


def fresh(model, seed=SEED):
    """Set all branches to where training starts: A random, B zero, so that the model is its reference again."""
    generator = torch.Generator().manual_seed(seed)
    for layer in (m for m in model.modules() if isinstance(m, LoRALinear)):
        start = torch.randn(layer.A.shape, generator=generator) / math.sqrt(3 * layer.A.shape[1])
        layer.A.data.copy_(start)
        layer.B.data.zero_()


def nll(policy_chosen, batch):
    """Negative log-likelihood a token of the winners."""
    return -policy_chosen.sum() / batch.chosen().mask.sum()


def train(model, objective, steps, beta=BETA, pairs=True, short=False, desc="training"):
    """objective(policy's log-probabilities, reference's, batch) → loss. Returns what happened in each step.

    pairs=False: the losers are not even read. short: half of each batch, at a constant learning rate.
    """
    fresh(model)
    policy, history = LogProbs(model), []
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=LR, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda s: min((s + 1) / 4, 1 if short else (steps - s) / max(1, steps - 4))
    )
    for step in progress(range(steps), desc):
        batch, before = batches[step % len(batches)], cached[step % len(batches)]
        if short:
            batch, before = batch.thinned(), tuple(side[::2] for side in before)
        now = policy(batch) if pairs else (policy.rows(batch.chosen()), None)
        loss = objective(now, before, batch)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        with torch.no_grad():
            entry = {"loss": loss.item(), "chosen": (now[0] - before[0]).mean().item()}
            if pairs:
                entry["rejected"] = (now[1] - before[1]).mean().item()
                entry["weight"] = weight_used(*now, *before, beta).mean().item()
        history.append(entry)
    return history


METHODS = {
    "DPO": (lambda now, before, batch: loss_used(*now, *before, BETA), True),
    "DPO + NLL": (lambda now, before, batch: loss_used(*now, *before, BETA) + NLL * nll(now[0], batch), True),
    "SFT": (lambda now, before, batch: nll(now[0], batch), False),
}
histories, held_out = {}, {"untrained": (reference_chosen, reference_rejected)}
tokens_before, tokens_after = None, {}


@torch.no_grad()
def token_logprobs(model, row):
    """Each token of the chosen and of the rejected answer of one pair, with its log-probability."""
    batch = make_batch([row])
    logprobs = LogProbs(model).logits(batch)[:, :-1].float().log_softmax(-1)
    picked = logprobs.gather(-1, batch.tokens[:, 1:, None]).squeeze(-1)
    told = []
    for line in range(2):
        kept = batch.mask[line, 1:]
        told.append(
            ([tokenizer.decode([t]) for t in batch.tokens[line, 1:][kept].tolist()], picked[line][kept].tolist())
        )
    return told


sparx = test_rows[1]
tokens_before = token_logprobs(model, sparx)
for name, (objective, pairs) in METHODS.items():
    histories[name] = train(model, objective, STEPS, pairs=pairs, desc=name)
    texts[name] = answers(model, test_rows, new_tokens)
    scores[name] = score(texts[name], test_rows)
    held_out[name] = [torch.cat(side) for side in zip(*cache_used(LogProbs(model), test_batches))]
    tokens_after[name] = token_logprobs(model, sparx)
    print(f"{name}: {test_rows[0]['question']} {texts[name][0]}\n    {sparx['question']} {texts[name][1]}")
fresh(model)

# %% [markdown]
# ### 4.6 What the pairs say, and what the model says
# First the lecture's own question and ours, then all held-out places. *Pair accuracy* is the fraction of held-out pairs in
# which the policy gives the chosen answer more probability than the rejected one.

# %%
for row, *said in list(zip(test_rows, *texts.values()))[: 6 if FULL else 2]:
    print(row["question"])
    for name, text in zip(texts, said):
        print(f"    {name:10} {text}")

# %%
kinds = [row["kind"] for row in test_rows]


def pair_accuracy(chosen, rejected, kind=None):
    """The fraction of pairs whose chosen answer has the larger number."""
    right = [c > r for c, r, k in zip(chosen.tolist(), rejected.tolist(), kinds) if kind in (None, k)]
    return mean(right)


accuracy = {name: {k: pair_accuracy(*sides, k) for k in ("real", "invented")} for name, sides in held_out.items()}
print(f"{'':11} pair accuracy      generated: invented   real       country    mean")
print(f"{'':11} real   invented              refused    answered   right      tokens")
for name, found in scores.items():
    print(
        f"{name:11} {accuracy[name]['real']:4.0%}   {accuracy[name]['invented']:4.0%}"
        f"{found['refused']:22.0%}{found['answered']:12.0%}{found['country']:9.0%}{found['tokens']:11.1f}"
    )

# %%
fig, panels = style.figure(1, 3, width=4.6)
count = len(test_rows) // 2
names = list(scores)
for axes, title, values in (
    (panels[0], "invented pairs ranked right", [accuracy[n]["invented"] for n in names]),
    (panels[1], "invented places refused", [scores[n]["refused"] for n in names]),
    (panels[2], "real places: right country", [scores[n]["country"] for n in names]),
):
    bounds = [interval(v, count) for v in values]
    whiskers = [
        [100 * v - low for v, (low, _) in zip(values, bounds)],
        [high - 100 * v for v, (_, high) in zip(values, bounds)],
    ]
    style.bars(
        axes, [n.replace(" + ", "\n+ ") for n in names], [100 * v for v in values], "{:.0f} %", yerr=whiskers, capsize=4,
        color=[style.GREY, style.VERMILION, style.BLUE, style.GREEN],
    )  # fmt: skip
    axes.set(title=title, ylim=(0, 115))
told = "; ".join(
    f"{n}: {accuracy[n]['invented']:.0%} ranked right, {scores[n]['refused']:.0%} refused, country right {scores[n]['country']:.0%}"
    for n in names
)
style.alt(fig, f"Held-out places, by what the pairs say and by what is generated. {told}.")

# %% [markdown]
# The whiskers are 95 % intervals from 40 places a kind. Compare the first two panels. A pair asks *which of these two
# sentences is likelier?* The model, when it writes, has every sentence there is to choose from.
#
# Then compare DPO + NLL with SFT on the winners alone, and look at *real answered* in the table as well as at the refusals. SFT
# sees one sentence about known places and one about unknown ones, and never that either can be wrong. What did the losers
# teach?

# %% [markdown]
# ### 4.7 Where did the probability go?
# The loss contains the *difference* of two log-ratios only. It falls when the chosen answer becomes likelier, and as well
# when both become less likely, the rejected one faster. That is called *likelihood displacement* (Razin et al. 2024). How far
# the chosen answers of plain DPO go down, or whether they still rise a little, differs from seed to seed: nothing in the loss
# decides it.

# %%
fig, panels = style.figure(1, 3, width=4.6)
for axes, name in zip(panels, ("DPO", "DPO + NLL")):
    steps = range(1, len(histories[name]) + 1)
    axes.plot(steps, [h["chosen"] for h in histories[name]], color=style.BLUE, label="chosen")
    axes.plot(steps, [h["rejected"] for h in histories[name]], color=style.VERMILION, label="rejected")
    axes.axhline(0, color=style.GREY, linestyle="--", linewidth=1.5)
    axes.set(xlabel="step", title=f"{name}: log-ratio, nats an answer")
    axes.legend(loc="lower left")
for name, colour in (("DPO", style.BLUE), ("DPO + NLL", style.GREEN)):
    panels[2].plot(range(1, STEPS + 1), [h["weight"] for h in histories[name]], color=colour, label=name)
panels[2].set(xlabel="step", title="weight of the gradient", ylim=(0, 0.6))
panels[2].legend()
moved = {
    name: [(now - before).mean().item() for now, before in zip(held_out[name], held_out["untrained"])]
    for name in METHODS
}
told = "; ".join(f"{name}: chosen {c:+.1f}, rejected {r:+.1f}" for name, (c, r) in moved.items())
style.alt(
    fig, f"Log-ratios during training and the weight of the gradient. Held-out answers afterwards, in nats: {told}."
)

# %%
is_real = torch.tensor([kind == "real" for kind in kinds], device=device())
for name in METHODS:
    changes = [now - before for now, before in zip(held_out[name], held_out["untrained"])]
    for kind, which in (("real", is_real), ("invented", ~is_real)):
        c, r = [change[which].mean().item() for change in changes]
        print(f"{name:10} {kind:9} held out: log π(chosen) {c:+6.1f}, log π(rejected) {r:+6.1f} nats an answer")
explore.logprob_strip(
    [
        (f"chosen, {name}", tokens_before[0][0], tokens_before[0][1], tokens_after[name][0][1])
        for name in ("DPO", "DPO + NLL")
    ]
    + [(f"rejected, {name}", tokens_before[1][0], tokens_before[1][1], tokens_after[name][1][1]) for name in ("DPO",)]
)

# %% [markdown]
# Look at the rejected answer, token by token: which tokens paid for its fall, and which did not? Then read again what plain DPO
# writes about Sparx. A sentence that begins like the rejected one and ends in another way is in no pair, so nothing
# was ever said against it.

# %% [markdown]
# ### 4.8 The bracket, on the real model
# The same short training with both brackets, and with other values of β. Each run has the same start and the same pairs, three
# a step, at a constant learning rate; afterwards the log-ratios of the first held-out pairs show how far it went.

# %%
SHORT = 6 if FULL else 1
probe, probe_cached = test_batches[0], test_cached[0]
RUNS = {
    "β = 0.02": (loss_used, 0.02),
    "β = 0.1": (loss_used, 0.1),
    "β = 0.5": (loss_used, 0.5),
    "example slide, β = 0.1": (slip_loss, 0.1),
}
sweep = {}
for name, (loss, beta) in RUNS.items():
    train(
        model,
        lambda now, before, batch, loss=loss, beta=beta: loss(*now, *before, beta),
        SHORT,
        beta=beta,
        short=True,
        desc=name,
    )
    ((chosen, rejected),) = cache_used(LogProbs(model), [probe])
    ratios = [(now - before) for now, before in zip((chosen, rejected), probe_cached)]
    reward = [reward_used(now, before, beta) for now, before in zip((chosen, rejected), probe_cached)]
    sweep[name] = {
        "chosen": ratios[0].mean().item(),
        "rejected": ratios[1].mean().item(),
        "margin": (reward[0] - reward[1]).mean().item(),
    }
    found = sweep[name]
    print(
        f"{name:23} log-ratio chosen {found['chosen']:+7.1f}, rejected {found['rejected']:+8.1f} nats; "
        f"reward margin {found['margin']:5.2f}"
    )
fresh(model)

# %%
fig, (axes,) = style.figure(width=8.5)
for offset, side, colour in ((-0.18, "chosen", style.BLUE), (0.18, "rejected", style.VERMILION)):
    drawn = axes.bar(
        [i + offset for i in range(len(sweep))], [f[side] for f in sweep.values()], 0.34, color=colour, label=side
    )
    axes.bar_label(drawn, [f"{f[side]:+.0f}" for f in sweep.values()], padding=3)
axes.axhline(0, color=style.GREY, linewidth=1.5)
axes.set_xticks(range(len(sweep)), list(sweep))
axes.margins(y=0.15)
axes.set(title=f"log-ratios of held-out answers after {SHORT} steps", ylabel="nats an answer")
axes.legend()
told = "; ".join(f"{name}: chosen {f['chosen']:+.1f}, rejected {f['rejected']:+.1f}" for name, f in sweep.items())
style.alt(fig, f"Mean log-ratio of held-out chosen and rejected answers after a short training. {told}.")

# %% [markdown]
# The bracket is no subtlety: its gradient pulls the rejected answer down with the same force whatever it is already, and
# since the two answers share most of their model, the chosen one goes down with it. Now compare the three β. Adam's steps
# have about the same size whatever the gradient's is, so β matters once a pair is nearly settled and its weight fades, at a margin of
# a few nats divided by β. With a large β that is after a nat or two; with a small one the policy goes on. This is the leash again.

# %% [markdown]
# ## 5 · Two more questions
# ### 5.1 Does DPO like long answers?
# $\log\pi(y|x)$ is a *sum* over tokens, so a longer answer has more terms to win or lose with. Our refusals are longer than
# our answers; each kind of sentence is chosen as often as it is rejected, so length alone cannot win. What does the length
# do to the *untrained* preference, to the reward, and to what is generated?

# %%
chosen_tokens, rejected_tokens = [], []
for batch in test_batches:
    lengths = batch.mask.sum(1)
    chosen_tokens.append(lengths[: len(lengths) // 2])
    rejected_tokens.append(lengths[len(lengths) // 2 :])
chosen_tokens, rejected_tokens = torch.cat(chosen_tokens), torch.cat(rejected_tokens)
longer = chosen_tokens - rejected_tokens


def correlation(a, b):
    stacked = torch.stack([a.double(), b.double()])
    return torch.corrcoef(stacked)[0, 1].item()


by_sum = pair_accuracy(reference_chosen, reference_rejected)
by_mean = pair_accuracy(reference_chosen / chosen_tokens, reference_rejected / rejected_tokens)
shorter_wins = mean(
    [
        (c > r) == (n < 0)
        for c, r, n in zip(reference_chosen.tolist(), reference_rejected.tolist(), longer.tolist())
        if n
    ]
)
print(f"untrained: the shorter answer of a pair is the likelier one in {shorter_wins:.0%} of the pairs")
print(f"untrained pair accuracy by sums {by_sum:.0%}, by means a token {by_mean:.0%}")
length_effect = {}
for name in ("DPO", "DPO + NLL"):
    rewards = [reward_used(now, before, BETA) for now, before in zip(held_out[name], held_out["untrained"])]
    length_effect[name] = correlation(torch.cat(rewards), torch.cat([chosen_tokens, rejected_tokens]))
    print(f"{name:10} correlation of an answer's reward with its length: {length_effect[name]:+.2f}")
print("mean length of what is generated:", ", ".join(f"{n} {s['tokens']:.1f}" for n, s in scores.items()))

# %% [markdown]
# <div class="alert alert-info"><b>Read it honestly.</b> Length bias is reported for DPO on chat data, where preferred answers tend
# to be long (Park et al. 2024). Our two sentences are nearly equally long and swap their roles, so this data cannot show that bias. What it
# shows is the cause: sums of log-probabilities favour the shorter sentence before any training. And a correlation of reward with length is no proof
# either: here the longer sentence is nearly always the refusal, so length and kind of sentence cannot be told apart. (Over 160
# answers, one below 0.16 in size cannot be told from none.)</div>

# %% [markdown]
# ### 5.2 What a round of RLHF takes beside it
# One DPO step on 6 pairs needs the policy, forward and backward, on 12 answers. A round of RLHF on 12 answers lets the
# policy *write* them token by token, has a reward model and the reference read them, and then learns. The stand-in for
# the reward model has the size of the policy, as on the slide; its scores do not matter for the time.

# %%
reference_model = copy.deepcopy(model).requires_grad_(False)
reward_model = copy.deepcopy(reference_model)
policy = LogProbs(model)
optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.0)
one_batch, one_cached = batches[0], cached[0]
prompts = left_padded([ask(row["question"]) for row in (real[:half] + made_up[:half]) * 2])
answer_length = one_batch.tokens.shape[1] - 1


def dpo_step():
    loss = loss_used(*policy(one_batch), *one_cached, BETA)
    optimizer.zero_grad(set_to_none=False)
    loss.backward()
    optimizer.step()


def rlhf_round():
    """One round of REINFORCE with a KL penalty: sample, rate, compare with the reference, one step."""
    with torch.no_grad():
        ids = model.generate(
            input_ids=prompts,
            attention_mask=prompts != PAD,
            max_new_tokens=answer_length,
            min_new_tokens=answer_length,
            do_sample=True,
            pad_token_id=PAD,
            eos_token_id=STOP,
        )
        tail = answer_length + 1
        sampled = Batch(ids[:, :-tail], ids[:, -tail:], torch.ones_like(ids[:, -tail:], dtype=torch.bool))
        hidden = reward_model.model(ids, attention_mask=ids != PAD, use_cache=False).last_hidden_state
        reward = hidden[:, -1].mean(-1)  # a reward head would stand here
        before = LogProbs(reference_model).rows(sampled)
    now = policy.rows(sampled)
    advantage = reward - BETA * (now.detach() - before)
    loss = -((advantage - advantage.mean()) * now).mean()
    optimizer.zero_grad(set_to_none=False)
    loss.backward()
    optimizer.step()


def bytes_of(tensors):
    """Bytes of memory behind tensors, each piece counted once however many tensors share it."""
    pieces = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}
    return sum(pieces.values())


def tensors_of(*models):
    return [t for one in models for t in [*one.parameters(), *one.buffers()]]


cost = timing.compare(rlhf_round, dpo_step, repeats=2 if FULL else 1, warmup=1 if FULL else 0, flush_cache=False)
trained = [p for p in model.parameters() if p.requires_grad]
kept = [t for entry in optimizer.state.values() for t in entry.values() if isinstance(t, torch.Tensor)]
kept += [p.grad for p in trained if p.grad is not None]  # both loops keep the same: AdamW's state and the gradients
model_bytes = bytes_of(tensors_of(reference_model))
held = {
    "RLHF": bytes_of(tensors_of(model, reference_model, reward_model) + kept),
    "DPO": bytes_of(tensors_of(model) + kept + [term for pair in cached for term in pair]),
}
working = {"RLHF": cost.a.peak_bytes, "DPO": cost.b.peak_bytes}  # activations, logits, the cache of the sampler
memory = {name: held[name] + working[name] for name in held}
low, high = cost.quartiles
print(f"time: a round of RLHF ÷ a DPO step = {cost.ratio:.1f} ({low:.1f} to {high:.1f})")
for name in held:
    print(
        f"{name:5} holds {held[name] / 1e6:6,.0f} MB all the time and {working[name] / 1e6:6,.0f} MB more "
        f"at the peak of a round: {memory[name] / 1e6:6,.0f} MB"
    )

# %%
fig, (axes,) = style.figure(width=7)
for bottoms, amounts, label, colour in (
    ([0, 0], held, "models, gradients, optimizer", style.BLUE),
    (list(held.values()), working, "at the peak of a round", style.ORANGE),
):
    axes.barh(
        list(held), [n / 1e6 for n in amounts.values()], 0.6, [b / 1e6 for b in bottoms], color=colour, label=label
    )
axes.set(xlabel="MB", title="memory, the same answers in a batch")
axes.legend(loc="lower right")
told = "; ".join(f"{n}: {held[n] / 1e6:,.0f} MB held and {working[n] / 1e6:,.0f} MB at the peak" for n in held)
style.alt(fig, f"Memory of a round of RLHF with three models and of a DPO step. {told}.")

# %% [markdown]
# Loading less is not the same as needing less: compare the two orange parts. DPO sends a winner *and* a loser of each pair through the
# model with gradients; the RLHF round sends as many answers through it, and what its sampler keeps is gone by then.


# %% [markdown]
# <div class="alert alert-info"><b>Fair play.</b> With LoRA an RLHF loop can do as we did and unplug the branches for its
# reference, and PPO holds a value model on top. RLHF's samples are its own, of what the policy says <i>now</i>; DPO's pairs were
# written once, by somebody else. Section 4.6 shows what that can cost.</div>

# %% [markdown]
# ## 6 · The paper and you

# %%
lab = "lab03_dpo"


def record(claim, quantity, paper, ours, unit="", **more):
    results.record(claim, quantity, paper, ours, unit, lab=lab, **more)


record(
    "C05", "total variation between DPO's policy and the RLHF optimum, six answers", 0, distance_dpo,
    seeds=[SEED], holds=distance_dpo < 0.05, note=f"the reference: {distance_start:.2f}; rest: a finite number of choices",
)  # fmt: skip
record(
    "C05", "the same with the example slide's bracket", None, distance_slip, seeds=[SEED],
    holds=distance_slip > 5 * distance_dpo, note="the bracket is a slip: this loss has no minimum",
)  # fmt: skip
record(
    "C05", "rejected log-ratio after a short training, example slide's bracket", None, sweep["example slide, β = 0.1"]["rejected"],
    "nats", seeds=[SEED], holds=sweep["example slide, β = 0.1"]["rejected"] < sweep["β = 0.1"]["rejected"] - 5,
    note=f"the first slide's bracket: {sweep['β = 0.1']['rejected']:.0f} nats with seed {SEED}",
)  # fmt: skip
record(
    "C05",
    "passes of the reference over a pair, for any number of epochs",
    1,
    1,
    note="by construction: cached beforehand",
)
record(
    "C05",
    "reference kept as",
    None,
    cached_bytes / pair_count,
    "bytes a pair",
    note=f"a model: {model_bytes / 1e6:,.0f} MB",
)
record(
    "C05", "memory held between rounds, RLHF ÷ DPO", None, held["RLHF"] / held["DPO"],
    note="bytes of the tensors: three models (the slide's number) and one; gradients and optimizer in both",
)  # fmt: skip
record(
    "C05", "memory at the peak of a round, RLHF ÷ DPO", None, memory["RLHF"] / memory["DPO"],
    note=f"{memory['RLHF'] / 1e6:,.0f} and {memory['DPO'] / 1e6:,.0f} MB, with what torch's allocator gave out during a round",
)  # fmt: skip
record("C05", "time, a round of RLHF ÷ a DPO step on as many answers", None, cost.ratio, spread=cost.quartiles)
for name in scores:
    once = name == "untrained"
    more = {} if once else {"seeds": [SEED]}
    label = "before" if once else name
    record(
        "C06", f"held-out pairs ranked right, invented, {label}", None, 100 * accuracy[name]["invented"], "%", **more
    )
    record("C06", f"held-out pairs ranked right, real, {label}", None, 100 * accuracy[name]["real"], "%", **more)
    record(
        "C06", f"invented places refused when asked, {label}", None, 100 * scores[name]["refused"], "%",
        holds=scores[name]["refused"] > scores["untrained"]["refused"] + 0.2 if name == "DPO + NLL" else None,
        note="DPO alone: the pairs are won, not the answers" if name == "DPO" else "", **more,
    )  # fmt: skip
    record("C06", f"real places answered when asked, {label}", None, 100 * scores[name]["answered"], "%", **more)
    record("C06", f"real places, right country, {label}", None, 100 * scores[name]["country"], "%", **more)
for name, (c, r) in moved.items():
    record("C06", f"change of log π(chosen), held out, {name}", None, c, "nats", seeds=[SEED])
    record("C06", f"change of log π(rejected), held out, {name}", None, r, "nats", seeds=[SEED])
for name in list(sweep)[:3]:
    record(
        "C06", f"rejected log-ratio after a short training, {name}", None, sweep[name]["rejected"], "nats", seeds=[SEED]
    )
results.table(lab)

# %%
predictions = [
    ("a. invented places refused, before", predicted_refusals_before, f"{scores['untrained']['refused']:.0%}"),
    ("b. invented places refused, DPO", predicted_refusals_after, f"{scores['DPO']['refused']:.0%}"),
    ("   the same with the NLL term", predicted_refusals_after, f"{scores['DPO + NLL']['refused']:.0%}"),
    ("c. log-probability of chosen answers", predicted_likelihood, f"{moved['DPO'][0]:+.1f} nats"),
    ("d. RLHF round ÷ DPO step", predicted_rlhf_time, f"{cost.ratio:.1f}"),
]
for what, guess, found in predictions:
    print(f"{what:38} you said: {'–' if guess is None else guess!s:8} measured: {found}")

# %% [markdown]
# The effects that must show in a full run, whatever the machine (times are left to the table):

# %%
if FULL:
    assert distance_dpo < 0.05 < distance_slip, "DPO must arrive at the RLHF optimum, the other bracket must not"
    for name in ("DPO", "DPO + NLL"):
        assert accuracy[name]["invented"] > accuracy["untrained"]["invented"] + 0.2, f"{name} must rank the pairs"
    assert accuracy["DPO"]["invented"] > scores["DPO"]["refused"] + 0.3, "won pairs are no refusals"
    assert scores["DPO + NLL"]["refused"] > scores["DPO"]["refused"] + 0.2, "the NLL term must bring refusals"
    slip, right = sweep["example slide, β = 0.1"], sweep["β = 0.1"]
    assert slip["rejected"] < right["rejected"] - 5, "the example slide's bracket must push harder"
    assert slip["chosen"] < right["chosen"] - 5, "and drag the chosen answers down"
    assert moved["DPO"][1] < moved["DPO"][0] - 10, "the rejected answers must fall behind the chosen ones"
    assert moved["DPO"][0] < moved["DPO + NLL"][0] - 8, "without the NLL term the chosen answers are not held up"

# %% [markdown]
# ## 7 · Explain
# ### 7.1 In your own words · 10 points
# A colleague writes: *"After DPO the preferred answer wins in every held-out pair, so our model now admits when it does not know a
# place."* Explain with your own measurements why the second half does not follow from the first, where the probability
# went, and what you would change. Five sentences.

# %% [markdown] nbgrader={"grade": true, "grade_id": "dpo-explain", "locked": false, "points": 10, "schema_version": 3, "solution": true, "task": false}
# Pair accuracy compares two given sentences; when the model writes, every sentence competes. The loss depends on the
# difference of two log-ratios, so it also falls when both answers become less likely and the rejected one falls faster.
# In 4.6 and 4.7, plain DPO ranked nearly all held-out pairs right (row "held-out pairs ranked right, invented"), yet refused few
# invented places when asked (row "invented places refused when asked"), while the rejected answers lost far more
# log-probability than the chosen ones gained or lost. Where both fell, the probability went to sentences that are in no pair, which is why
# one must look at what is generated. Adding the winners' negative log-likelihood keeps the chosen answers likely, and then the
# refusals follow (row "DPO + NLL"); β limits the drift (4.8); a smaller learning rate may too, which we did not measure.
# *(Numbers: from the reader's own table, named with their row.)*
#
# *Marking: 3 points for pairs against free generation with measured numbers of both, 4 for the difference of log-ratios and both
# falling (or not rising), 3 for a remedy that holds the chosen answer up or limits the drift.*

# %% [markdown]
# ### 7.2 Which of these is wrong, and why? · 10 points
# Exactly one statement is wrong. Say which, and explain it with the formula of the loss.
#
# - **A.** Adding a number that depends on the prompt only to every reward changes neither the optimal policy nor the Bradley–Terry
#   loss of the pairs.
# - **B.** At the very first step every pair has the same weight in the gradient, one half.
# - **C.** When the DPO loss of a pair has fallen, its chosen answer has become likelier than it was.
# - **D.** With LoRA, the reference's log-probabilities can be computed by the very model that is going to be trained.

# %% [markdown] nbgrader={"grade": true, "grade_id": "dpo-wrong", "locked": false, "points": 10, "schema_version": 3, "solution": true, "task": false}
# C is wrong. The loss is $-\log\sigma(\beta(c - l))$ with the chosen log-ratio $c$ and the rejected log-ratio $l$: a function
# of $c - l$ alone. If $c$ falls by 5 nats and $l$ by 20, the margin has grown by 15 and the loss has fallen, while the
# chosen answer is less likely than before. A is right because $Z(x)$ takes the number up and it cancels in the pair, B
# because both log-ratios are 0 and $\sigma(0) = 1/2$, D because all $B$ are zero before the first step.
#
# *Marking: 3 points for C, 5 for the loss depending on the difference alone with an example, 2 for a reason why one of
# the others is right.*
