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
# # Lab 2 · RLHF: a reward, a leash, and what happens without it
#
# | | |
# |---|---|
# | **Slides** | *RLHF: Training the Reward Model*; *RLHF: Fine-tuning with Reinforcement Learning* |
# | **Papers** | Ouyang et al., *Training language models to follow instructions with human feedback*, 2022; Schulman et al., *Proximal Policy Optimization Algorithms*, 2017, and *High-Dimensional Continuous Control Using Generalized Advantage Estimation*, 2016; Shao et al., *DeepSeekMath* (GRPO), 2024; Gao et al., *Scaling Laws for Reward Model Overoptimization*, 2023 |
# | **Reading and writing** | about 90 minutes |
# | **Computing** | about 4 minutes on two CPU cores, less on a GPU; about 4 GB of memory |
# | **You build** | the reward model's loss, three estimators of the KL divergence, the reward of each token, advantages, PPO's clipped objective, GRPO's group advantages |
# | **You measure** | a reward model on pairs it has not seen; the whole frontier of reward against KL on a small language model, and where more reward is less; a 135-million-parameter model moved by a learned reward |
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
        models = ["smollm2-135m-instruct", "all-minilm-l6-v2"]
        subprocess.run([sys.executable, "-m", "lecturekit.models", *models], check=True)
    os.environ["LECTUREKIT_DATA"] = str(course / "data")

# %%
import copy
import math
import re
from collections import Counter

import torch
import torch.nn.functional as F
from torch import nn

from lecturekit import data, results
from lecturekit.checking import check, grade, passing
from lecturekit.explore import rlhf as explore
from lecturekit.explore import style
from lecturekit.models import load_language_model
from lecturekit.runtime import base_seed, device, profile, progress, seed_everything, threads

FULL = profile() == "full"  # LECTUREKIT_PROFILE=smoke runs the same cells in seconds, with numbers that mean nothing
SEED = base_seed()  # 0, unless LECTUREKIT_SEED names another
seed_everything(SEED)

# %% [markdown]
# ## 1 · Predict
# Before any code: write down what you expect. Nothing here is graded. The answers come back beside your measurements
# at the end, and being wrong is how they become interesting.
#
# - **a.** A reward model learns from pairs of replies of a customer service (one better, one worse) in 15 kinds of
#   business. It then judges pairs from six other kinds. How many does it get right, in percent? (A coin: 50.)
# - **b.** A small language model is trained to please *another* reward model, which was fitted to 150 noisy
#   pairs. You loosen the leash: β goes from 3 to 0. What does the fitted reward (the *proxy*) of its samples do:
#   `"rises"`, `"falls"` or `"rises, then falls"`? And the true reward that the pairs were made from (the *gold* reward)?
# - **c.** SmolLM2 is trained on the first reward model for two dozen steps. By how many standard deviations does the
#   reward of its replies to unseen customers rise?
# - **d.** Do its replies to different customers become `"more alike"` or `"less alike"`?

# %%
predicted_accuracy = None  # a, for example 60
predicted_proxy = None  # b, one of "rises", "falls", "rises, then falls"
predicted_gold = None  # b
predicted_rise = None  # c, for example 0.5
predicted_alike = None  # d, "more alike" or "less alike"

# %% [markdown]
# ## 2 · The idea
# Nobody can write down a formula for a good answer, but people can say which of two answers is better. RLHF has two steps.
#
# **A reward model** $r_\theta$ learns from such pairs. Bradley and Terry's model says that the better answer wins with
# probability $\sigma(r(x, y_\text{win}) - r(x, y_\text{lose}))$, so we make what people chose likely:
#
# $$\max_{r_\theta}\; \mathbb{E}_{(x,\,y_\text{win},\,y_\text{lose})}\big[\log \sigma(r_\theta(x, y_\text{win}) - r_\theta(x, y_\text{lose}))\big]$$
#
# **The language model** $\pi$ is then trained, with reinforcement learning, to write what the reward model likes. But on a leash:
#
# $$\max_{\pi}\; \mathbb{E}_{x,\;y \sim \pi(y|x)}\big[r(x, y)\big] \;-\; \beta\, \mathbb{D}_\text{KL}\big[\pi(y|x) \,\|\, \pi_\text{ref}(y|x)\big]$$
#
# The reward model has only seen what the reference model $\pi_\text{ref}$ writes. Far from there it is guessing. The
# divergence measures how far $\pi$ has gone, and β what a step costs. This maximum is known:
# $\pi^*(y) \propto \pi_\text{ref}(y)\, \exp(r(y)/\beta)$. (Lab 3, DPO, starts from there.)
#
# Below are six replies to *My parcel has not arrived*, how likely the reference is to give each, and what the reward model
# thinks of them. **Move β (or tab to it and press the arrow keys): where do people like the optimum best, and
# what happens to the left of that?**

# %%
explore.beta_slider()

# %% [markdown]
# The same without a slider, for print:

# %%
explore.beta_strip()

# %% [markdown]
# With six replies the optimum is a formula. A language model has more answers than there are atoms, so we climb: sample
# answers, see which got more reward than expected, make their tokens likelier, repeat. That is PPO, and you build its
# parts now.

# %% [markdown]
# ## 3 · Build
# ### 3.1 The reward model's loss · 10 points
# Return the *loss* whose minimum is the maximum above, averaged over the pairs: one number.
#
# - `chosen`, `rejected`: (pairs,) rewards of the better and the worse answer → a scalar
# - It must stay finite, with its gradient, for differences of ±10,000.
#
# <details><summary>Hint 1</summary>An optimizer minimises. What changes when a maximum is wanted?</details>
# <details><summary>Hint 2</summary>σ of a very negative number is 0 in floating point, and the logarithm of that is
# −∞. torch has a function that does both steps at once: look for <code>F.logsigmoid</code>.</details>


# %% nbgrader={"grade": false, "grade_id": "rlhf-reward", "locked": false, "schema_version": 3, "solution": true, "task": false}
def reward_loss(chosen, rejected):
    """The Bradley–Terry loss: the mean of −log σ(r_win − r_lose).   chosen, rejected: (pairs,) → a scalar"""
    ### BEGIN SOLUTION
    return -F.logsigmoid(chosen - rejected).mean()
    ### END SOLUTION


# %% nbgrader={"grade": true, "grade_id": "rlhf-reward-test", "locked": true, "points": 10, "schema_version": 3, "solution": false, "task": false}
check("rlhf.reward", reward_loss)
### BEGIN HIDDEN TESTS
grade("rlhf.reward", reward_loss)
### END HIDDEN TESTS

# %% [markdown]
# ### 3.2 How far has the policy gone? · 10 points
# The divergence $\text{KL}(\pi\,\|\,\pi_\text{ref}) = \mathbb{E}_{y\sim\pi}[\log \pi(y) - \log \pi_\text{ref}(y)]$ is a mean over
# what $\pi$ samples, so each sampled token gives an estimate. Write $\log r = \log\pi_\text{ref} - \log\pi$ for that token.
# Return three estimators (J. Schulman, *Approximating KL Divergence*, 2020):
#
# $$k_1 = -\log r \qquad k_2 = \tfrac12 (\log r)^2 \qquad k_3 = (r - 1) - \log r$$
#
# - `logprobs`, `reference`: log-probabilities of the sampled tokens under the policy and the reference, of one shape
#   → a tuple `(k1, k2, k3)` of that shape
#
# Before you go on: which of the three can be negative, and whose mean is exactly the divergence?
#
# <details><summary>Hint 1</summary>One line computes log r. Which of your two arguments is subtracted?</details>
# <details><summary>Hint 2</summary>r itself is the exponential of log r. For k3 nothing else is needed.</details>


# %% nbgrader={"grade": false, "grade_id": "rlhf-kl", "locked": false, "schema_version": 3, "solution": true, "task": false}
def kl_estimators(logprobs, reference):
    """k1, k2, k3: three estimates of KL(π ‖ π_ref) for each token that π sampled."""
    ### BEGIN SOLUTION
    log_ratio = reference - logprobs
    return -log_ratio, log_ratio.square() / 2, torch.expm1(log_ratio) - log_ratio
    ### END SOLUTION


# %% nbgrader={"grade": true, "grade_id": "rlhf-kl-test", "locked": true, "points": 10, "schema_version": 3, "solution": false, "task": false}
check("rlhf.kl", kl_estimators)
### BEGIN HIDDEN TESTS
grade("rlhf.kl", kl_estimators)
### END HIDDEN TESTS

# %% [markdown]
# **See what your code did.** Your estimators on 4000 samples of a distribution of 40 words, beside the true divergence.
# $k_1$ and $k_3$ are *unbiased*: $r - 1$ has mean 0 under $\pi$, so adding it changes no mean, takes all negative values away, and here some
# of the noise: compare the three standard deviations. $k_2$ is biased; its bias shrinks as the two models come closer.

# %%
explore.kl_picture(kl_estimators)

# %% [markdown]
# ### 3.3 The reward of each token · 15 points
# The reward model gives *one* number for a whole response, the leash pulls on *every* token. Return a (batch, seq) tensor:
# every token of a response gets $-\beta(\log\pi - \log\pi_\text{ref})$, its last token gets the score in addition, padding
# gets 0. A row then adds up to an estimate of $r - \beta\,\text{KL}$: the slide's objective.
#
# - `score` (batch,), `logprobs` and `reference` (batch, seq), `beta` a number
# - `mask` (batch, seq), bool: true on the tokens of each response. Responses start in column 0; behind their last token
#   comes padding, whose log-probabilities mean nothing.
#
# <details><summary>Hint 1</summary>Begin with the penalty alone, and set it to 0 outside the mask.</details>
# <details><summary>Hint 2</summary>How many tokens has each response? In which column is the last one?</details>
# <details><summary>Hint 3</summary><code>rewards[rows, columns] += score</code> with one index a row puts one number in
# each row.</details>


# %% nbgrader={"grade": false, "grade_id": "rlhf-rewards", "locked": false, "schema_version": 3, "solution": true, "task": false}
def token_rewards(score, logprobs, reference, mask, beta):
    """−β (log π − log π_ref) on every token, plus the score on the response's last one.   → (batch, seq)"""
    ### BEGIN SOLUTION
    rewards = -beta * (logprobs - reference) * mask
    rows = torch.arange(len(score), device=score.device)
    rewards[rows, mask.sum(1) - 1] += score
    return rewards
    ### END SOLUTION


# %% nbgrader={"grade": true, "grade_id": "rlhf-rewards-test", "locked": true, "points": 15, "schema_version": 3, "solution": false, "task": false}
check("rlhf.rewards", token_rewards)
### BEGIN HIDDEN TESTS
grade("rlhf.rewards", token_rewards)
### END HIDDEN TESTS

# %% [markdown]
# **See what your code did.** Three responses of 8, 5 and 3 tokens; a black line marks where padding begins. Where the
# policy likes a token better than the reference (red on the left), its reward should be blue. The scores should
# stand out just before the lines, and behind them all should be blank.

# %%
explore.rewards_picture(token_rewards)

# %% [markdown]
# ### 3.4 Advantages · 20 points
# Which tokens were to thank for the reward? A *value head* predicts for each token what is still to come, $V_t$, before the
# token is chosen. What happened beyond its prediction is $\delta_t = r_t + \gamma V_{t+1} - V_t$, and *generalised advantage
# estimation* adds up what follows from a token, fading:
#
# $$A_t = \delta_t + \gamma\lambda\, A_{t+1}$$
#
# computed from the end. After its last token the episode is over: $V_{t+1} = 0$ and $A_{t+1} = 0$ there.
# Return two tensors (batch, seq), both 0 in the padding:
#
# - the advantages **whitened** over all tokens in the mask: (A − mean) / (std + 1e-8), with the standard deviation
#   that `torch.std` gives, over the whole batch together
# - the **returns**, from the advantages *before* whitening: A + V. They are what the value head is to learn.
#
# `rewards`, `values`, `mask` (batch, seq); `gamma`, `lam` numbers. Padding holds junk: nothing of it may leak.
#
# <details><summary>Hint 1</summary>Set rewards and values to 0 outside the mask first. Does a loop from the last column to
# the first now do the right thing at the end of each response?</details>
# <details><summary>Hint 2</summary>Carry two (batch,) tensors through the loop: the advantage and the value of the
# column to the right.</details>
# <details><summary>Hint 3</summary><code>advantages[mask]</code> is a flat tensor of exactly the tokens that count: take its
# mean and its std.</details>


# %% nbgrader={"grade": false, "grade_id": "rlhf-gae", "locked": false, "schema_version": 3, "solution": true, "task": false}
def advantages_and_returns(rewards, values, mask, gamma, lam):
    """Whitened generalised advantages, and the returns for the value head.   all (batch, seq), 0 in padding"""
    ### BEGIN SOLUTION
    rewards, values = rewards * mask, values * mask
    advantages = torch.zeros_like(values)
    running, following = torch.zeros_like(values[:, 0]), torch.zeros_like(values[:, 0])
    for t in reversed(range(values.shape[1])):
        delta = rewards[:, t] + gamma * following - values[:, t]
        running = (delta + gamma * lam * running) * mask[:, t]
        following = values[:, t]
        advantages[:, t] = running
    inside = advantages[mask]
    white = (advantages - inside.mean()) / (inside.std() + 1e-8) * mask
    return white, advantages + values
    ### END SOLUTION


# %% nbgrader={"grade": true, "grade_id": "rlhf-gae-test", "locked": true, "points": 20, "schema_version": 3, "solution": false, "task": false}
check("rlhf.gae", advantages_and_returns)
### BEGIN HIDDEN TESTS
grade("rlhf.gae", advantages_and_returns)
### END HIDDEN TESTS

# %% [markdown]
# **See what your code did.** Three responses, rewarded at their ends only; the value head says 0.1 everywhere (and something
# silly in the padding). Praise and blame should fade from each end towards the beginning, and the padding stay blank.

# %%
explore.advantage_picture(advantages_and_returns)

# %% [markdown]
# ### 3.5 The clipped objective · 15 points
# A batch of samples is used for several updates, but after the first the policy is no longer the one that sampled it. The
# ratio $\rho = \pi / \pi_\text{old}$ corrects for that, and PPO allows it to pay only within $1 \pm \varepsilon$:
#
# $$\max\; \mathbb{E}\big[\min\big(\rho A,\; \text{clip}(\rho,\, 1-\varepsilon,\, 1+\varepsilon)\, A\big)\big]$$
#
# Return it as a *loss*: one mean over all tokens in the mask.
#
# - `logprobs` (batch, seq) of the policy now; `old_logprobs` of the policy that sampled, stored then; `advantages`, `mask`
#   (batch, seq); `epsilon` a number → a scalar
#
# <details><summary>Hint 1</summary>A ratio of probabilities from two logarithms: which operation, and then which
# function?</details>
# <details><summary>Hint 2</summary>min, of both terms, token by token: <code>torch.minimum</code>. Try ρ = 2 and A = −1 by
# hand: which of the two should count?</details>
# <details><summary>Hint 3</summary>By how many tokens do you divide? <code>x[mask].mean()</code> counts the right
# ones.</details>


# %% nbgrader={"grade": false, "grade_id": "rlhf-clip", "locked": false, "schema_version": 3, "solution": true, "task": false}
def policy_loss(logprobs, old_logprobs, advantages, mask, epsilon):
    """PPO's clipped objective as a loss, averaged over the tokens in the mask.   → a scalar"""
    ### BEGIN SOLUTION
    ratio = (logprobs - old_logprobs).exp()
    clipped = ratio.clamp(1 - epsilon, 1 + epsilon)
    return -torch.minimum(ratio * advantages, clipped * advantages)[mask].mean()
    ### END SOLUTION


# %% nbgrader={"grade": true, "grade_id": "rlhf-clip-test", "locked": true, "points": 15, "schema_version": 3, "solution": false, "task": false}
check("rlhf.clip", policy_loss)
### BEGIN HIDDEN TESTS
grade("rlhf.clip", policy_loss)
### END HIDDEN TESTS

# %% [markdown]
# **See what your code did.** Your objective for one token, over its ratio. Where a curve is flat the gradient is 0: this token
# has moved as far as it may. **Why is neither curve flat on both sides?**

# %%
explore.clip_picture(policy_loss)

# %% [markdown]
# ### 3.6 Without a value head: GRPO · 10 points
# GRPO asks no value head what to expect. It samples several responses to the *same* prompt and compares them with each
# other. Return $(r - \text{mean}) / (\text{std} + 10^{-4})$ within each group, with the standard deviation that `torch.std`
# gives. All tokens of a response then get its one advantage.
#
# - `rewards` (groups, size) → (groups, size)
#
# <details><summary>Hint</summary>Which dimension runs over the responses to one prompt? <code>keepdim=True</code> lets you
# subtract without thinking about shapes.</details>


# %% nbgrader={"grade": false, "grade_id": "rlhf-group", "locked": false, "schema_version": 3, "solution": true, "task": false}
def group_advantages(rewards):
    """Each response's reward relative to its group: (r − mean) / (std + 1e-4).   (groups, size) → (groups, size)"""
    ### BEGIN SOLUTION
    return (rewards - rewards.mean(1, keepdim=True)) / (rewards.std(1, keepdim=True) + 1e-4)
    ### END SOLUTION


# %% nbgrader={"grade": true, "grade_id": "rlhf-group-test", "locked": true, "points": 10, "schema_version": 3, "solution": false, "task": false}
check("rlhf.group", group_advantages)
### BEGIN HIDDEN TESTS
grade("rlhf.group", group_advantages)
### END HIDDEN TESTS

# %% [markdown]
# From here on each part is yours if it passed its check.

# %%
reward_loss_used = passing("rlhf.reward", reward_loss)
kl_used = passing("rlhf.kl", kl_estimators)
rewards_used = passing("rlhf.rewards", token_rewards)
advantages_used = passing("rlhf.gae", advantages_and_returns)
policy_loss_used = passing("rlhf.clip", policy_loss)
group_used = passing("rlhf.group", group_advantages)

from lecturekit.alignment.ppo import value_loss
from lecturekit.alignment.reward import RewardHead, pair_accuracy

# %% [markdown]
# ## 4 · Measure: the whole frontier, on a model small enough to repeat it
# The real thing is too slow to be run at many β. So first a language model of some 70,000 parameters, a recurrent
# network over words, trained here on the café orders of lab 5. It babbles orders. Everything else is as in RLHF.
#
# And here we can have what nobody has in real life: the **gold** reward itself. A tray holds three things. With $n$ things
# named in an order, the gold reward is $3 - |n - 3|$: more is better up to three, and worse beyond. Nobody tells the reward
# model. It is fitted to 150 pairs of the model's own orders, judged by a noisy person, and becomes the **proxy** that is
# maximised.

# %%
LENGTH = 20  # tokens at most, the end included
PAD, START, END, RARE = range(4)
HEADS = (
    "latte white cappuccino espresso coffee mocha chocolate tea lemonade juice beer croissant bun muffin cookie brownie "
    "cake bread tart scone bagel toastie sandwich roll soup salad"
).split()
THINGS = {word for head in HEADS for word in (head, head + "s", head + "es")}

sentences = [re.findall(r"[a-z']+|\d+|[.,?!:]", row["order"].lower()) for row in data.load("cafe_orders")["train"]]
counts = Counter(word for sentence in sentences for word in sentence)
vocabulary = ["<pad>", "<start>", "<end>", "<rare>", *sorted(word for word, n in counts.items() if n >= 3)]
number = {word: i for i, word in enumerate(vocabulary)}
is_thing = torch.tensor([word in THINGS for word in vocabulary])
corpus = torch.full((len(sentences), LENGTH), PAD)
for row, sentence in zip(corpus, sentences):
    ids = [number.get(word, RARE) for word in sentence][: LENGTH - 1] + [END]
    row[: len(ids)] = torch.tensor(ids)


class WordModel(nn.Module):
    """A language model over words with a value head beside its output head. It is so small that the CPU is faster."""

    def __init__(self, vocab, width=64):
        super().__init__()
        self.embed = nn.Embedding(vocab, width)
        self.gru = nn.GRU(width, width, batch_first=True)
        self.head = nn.Linear(width, vocab)
        self.value = nn.Linear(width, 1)
        nn.init.zeros_(self.value.weight)
        nn.init.zeros_(self.value.bias)

    def forward(self, before, state=None):
        """before: (batch, seq), the token before each position → log-probabilities (batch, seq, vocab), values, state"""
        hidden, state = self.gru(self.embed(before), state)
        return (
            self.head(hidden).log_softmax(-1),
            self.value(hidden.detach()).squeeze(-1),
            state,
        )  # the value head must not bend the policy


def read(model, tokens):
    """What the model makes of whole responses: log-probabilities (batch, seq, vocab) and values (batch, seq)."""
    start = torch.full_like(tokens[:, :1], START)
    logprobs, values, _ = model(torch.cat([start, tokens[:, :-1]], dim=1))
    return logprobs, values


def pick(logprobs, tokens):
    """The log-probability of each token.   (batch, seq, vocab), (batch, seq) → (batch, seq)"""
    return logprobs.gather(2, tokens.unsqueeze(2)).squeeze(2)


@torch.no_grad()
def sample(model, count):
    """Responses word by word: tokens, their log-probabilities, values, mask, each (count, LENGTH)."""
    token, state = torch.full((count, 1), START), None
    over = torch.zeros(count, dtype=torch.bool)
    columns = []
    for _ in range(LENGTH):
        logprobs, values, state = model(token, state)
        drawn = torch.multinomial(logprobs[:, 0].exp(), 1)
        token = drawn.masked_fill(over[:, None], PAD)
        columns.append((token[:, 0], pick(logprobs, token)[:, 0], values[:, 0], ~over))
        over = over | (token[:, 0] == END)  # the end belongs to the response, what follows is padding
    return [torch.stack(parts, dim=1) for parts in zip(*columns)]


def say(tokens):
    return " ".join(vocabulary[token] for token in tokens.tolist() if token not in (PAD, START, END))


def gold(tokens):
    """The true reward: 3 − |n − 3| for n things named."""
    named = is_thing[tokens].sum(1).float()
    return 3 - (named - 3).abs()


torch.manual_seed(SEED)
reference = WordModel(len(vocabulary))
steps = 200 if FULL else 5
optimizer = torch.optim.AdamW(reference.parameters(), lr=8e-3)
schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 8e-3, total_steps=steps)
with threads(1):  # small matrices: sharing them between cores takes longer than computing them
    for _ in progress(range(steps), "language model"):
        tokens = corpus[torch.randint(len(corpus), (64,))]
        loss = F.cross_entropy(read(reference, tokens)[0].flatten(0, 1), tokens.flatten(), ignore_index=PAD)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    reference.requires_grad_(False)
    many = 4096 if FULL else 64
    tokens_ref = sample(reference, many)[0]
print(f"{sum(p.numel() for p in reference.parameters()):,} parameters, {len(vocabulary)} words, loss {loss.item():.2f}")
for tokens in tokens_ref[:3]:
    print("   ", say(tokens))
gold_ref = gold(tokens_ref)
print(f"things named in an order: {is_thing[tokens_ref].sum(1).float().mean():.1f}; gold reward {gold_ref.mean():.2f}")

# %% [markdown]
# ### 4.1 The proxy: a reward model from 150 noisy pairs
# The judge prefers an order with probability σ(difference of the gold rewards): clear cases mostly right, close ones by
# chance. The reward model is linear in four counts, so we can read what it believes.

# %%
PAIRS = 150 if FULL else 40
POLITE = {"please", "thanks", "thank", "hi", "hello", "could", "may", "would", "morning"}
COUNTED = ("things", "polite words", "punctuation marks", "words and marks")
counted = torch.tensor(
    [[word in THINGS, word in POLITE, word in set(".,?!:"), i > END] for i, word in enumerate(vocabulary)]
).float()


def counts_of(tokens):
    """The reward model's features: four counts for each order.   (batch, seq) → (batch, 4)"""
    return counted[tokens].sum(1) / 4  # of order 1


def judged(count, noise=True):
    """Pairs of the reference's orders: better and worse, as the judge says (or, without noise, as the gold reward says)."""
    first, second = sample(reference, count)[0], sample(reference, count)[0]
    difference = gold(first) - gold(second)
    if not noise:
        keep = difference != 0
        first, second, difference = first[keep], second[keep], difference[keep]
    wins = torch.rand(len(difference)) < torch.sigmoid(difference) if noise else difference > 0
    return torch.where(wins[:, None], first, second), torch.where(wins[:, None], second, first)


def fit_reward(head, better, worse, steps, lr, weight_decay):
    """Train a head on features of pairs with your loss, then put its rewards at mean 0, standard deviation 1."""
    optimizer = torch.optim.AdamW(head.parameters(), lr=lr, weight_decay=weight_decay)
    losses = []
    for _ in progress(range(steps), "reward model"):
        loss = reward_loss_used(head(better), head(worse))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    head.standardise(torch.cat([better, worse]))
    return losses


with threads(1):
    better, worse = judged(PAIRS)
    proxy_head = RewardHead(len(COUNTED))
    fit_reward(proxy_head, counts_of(better), counts_of(worse), steps=200 if FULL else 10, lr=5e-2, weight_decay=0.05)
    proxy_head.requires_grad_(False)
    better, worse = judged(2000 if FULL else 40, noise=False)


def proxy(tokens):
    return proxy_head(counts_of(tokens))


proxy_accuracy = pair_accuracy(proxy(better), proxy(worse))
proxy_noisy = pair_accuracy(*(proxy(side) for side in judged(2000 if FULL else 40)))
many = (counts_of(tokens_ref)[:, 0] > 3).double().mean().item()
print(f"the proxy ranks fresh pairs as the true reward does: {proxy_accuracy}; as the noisy judge does: {proxy_noisy}")
print(f"orders of the reference with more than three things: {many:.1%}")
for what, weight in zip(COUNTED, (proxy_head.f.weight[0] / 4 / proxy_head.std).tolist()):
    print(f"    one more of {what:18} {weight:+.2f}")
proxy_ref = proxy(tokens_ref)

# %% [markdown]
# Against the true reward it is right nearly always. Against the noisy judge, the only test that one has in real life, it is right less
# often, because the judge contradicts himself. It knows that more things are better. It does not know *until when*: look how
# few orders had more than three.

# %% [markdown]
# ### 4.2 PPO at six values of β
# The loop, with your parts in it. Sample, score, reward each token, work out advantages, then update a few times on the same samples
# while the clip holds. Note what is *stored* at sampling time: tokens, log-probabilities, values.

# %%
ITERATIONS, BATCH, EPOCHS = (100, 64, 2) if FULL else (2, 8, 1)


def ppo(beta, seed=SEED):
    """A copy of the reference, trained to please the proxy with a leash of β. Returns it."""
    torch.manual_seed(1000 + seed)
    policy = copy.deepcopy(reference).requires_grad_(True)
    optimizer = torch.optim.Adam(policy.parameters(), lr=2e-3)
    for _ in range(ITERATIONS):
        tokens, old, old_values, mask = sample(policy, BATCH)
        with torch.no_grad():
            expected = pick(read(reference, tokens)[0], tokens)
        rewards = rewards_used(proxy(tokens), old, expected, mask, beta)
        advantages, returns = advantages_used(rewards, old_values, mask, 1.0, 0.95)
        for _ in range(EPOCHS):
            logprobs, values = read(policy, tokens)
            loss = policy_loss_used(pick(logprobs, tokens), old, advantages, mask, 0.2)
            loss = loss + 0.5 * value_loss(values, old_values, returns, mask, 1.0)
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(policy.parameters(), 1.0)
            optimizer.step()
    return policy.requires_grad_(False)


@torch.no_grad()
def measure(policy, count):
    """Samples of a policy: their tokens and mask, and the means of proxy, gold and KL (nats a response)."""
    tokens, _, _, mask = sample(policy, count)
    ours, theirs = read(policy, tokens)[0], read(reference, tokens)[0]
    # the divergence at each state that was reached, over all words: the same mean as k1's with much less noise
    kl = ((ours.exp() * (ours - theirs)).sum(-1) * mask).sum(1)
    return {
        "tokens": tokens,
        "mask": mask,
        "proxy": proxy(tokens).mean().item(),
        "gold": gold(tokens).mean().item(),
        "kl": kl.mean().item(),
        "k1": pick(ours - theirs, tokens),
    }


BETAS = (3.0, 1.0, 0.5, 0.2, 0.1, 0.0) if FULL else (1.0, 0.0)
with threads(1):
    runs = {beta: measure(ppo(beta), 1000 if FULL else 16) for beta in progress(BETAS, "β")}
start = {"proxy": proxy_ref.mean().item(), "gold": gold_ref.mean().item(), "kl": 0.0, "tokens": tokens_ref}
print(f"{'β':>9} {'KL':>7} {'proxy':>7} {'gold':>7} {'distinct':>9}   a sample")
for label, run in {"reference": start, **runs}.items():
    distinct = len({tuple(row) for row in run["tokens"].tolist()}) / len(run["tokens"])  # the share of orders said once
    print(
        f"{label!s:>9} {run['kl']:7.2f} {run['proxy']:7.2f} {run['gold']:7.2f} {distinct:9.1%}   {say(run['tokens'][0])}"
    )

# %% [markdown]
# The optimum for each β is known, $\pi^* \propto \pi_\text{ref}\exp(r/\beta)$, and while it is not too far away the reference's
# own samples tell its reward and divergence: weigh each by $\exp(r/\beta)$. That is the dashed line, which no policy can be
# above. **How close does PPO come?**


# %%
def exact(beta):
    """KL, proxy and gold of the optimum at β, from the reference's samples, and how many of them really count."""
    weights = (proxy_ref / beta).softmax(0)
    kl = (weights * (weights * len(weights)).clamp(min=1e-30).log()).sum()
    return kl.item(), (weights @ proxy_ref).item(), (weights @ gold_ref).item(), (1 / weights.square().sum()).item()


path = [exact(beta) for beta in torch.logspace(1, -1.5, 60).tolist()]
path = [point for point in path if point[3] >= 50] or path[:2]  # fewer samples than that are no measurement

fig, (frontier, trays) = style.figure(1, 2, width=6.0, height=4.0, width_ratios=[1.3, 1])
order = [start, *runs.values()]
frontier.plot([run["kl"] for run in order], [run["proxy"] for run in order], "o-", label="proxy (maximised)")
frontier.plot([run["kl"] for run in order], [run["gold"] for run in order], "s-", label="gold (true)")
frontier.plot([p[0] for p in path], [p[1] for p in path], "--", color=style.BLACK, label="best possible proxy")
for beta, run in runs.items():
    frontier.annotate(f"{beta:g}", (run["kl"], run["proxy"]), textcoords="offset points", xytext=(-4, 8), fontsize=10)
frontier.set_xscale("symlog", linthresh=1)
frontier.set_xlim(0, None)
frontier.xaxis.set_major_formatter("{x:g}")
frontier.set(xlabel="KL(π ‖ π_ref), nats a response", ylabel="reward", title="the frontier, β at each point")
frontier.legend(loc="upper left")
best_beta = max(runs, key=lambda beta: runs[beta]["gold"])
shown = {"reference": start, f"β = {best_beta:g}, best gold": runs[best_beta], "β = 0": runs[0.0]}
for (label, run), colour in zip(shown.items(), (style.GREY, style.BLUE, style.VERMILION)):
    named = is_thing[run["tokens"]].sum(1)
    share = torch.bincount(named, minlength=LENGTH + 1) / len(named)
    trays.plot(range(LENGTH + 1), share, "o-", color=colour, markersize=4, label=label)
trays.axvline(3, color=style.BLACK, linewidth=0.8)
trays.set(xlabel="things named in an order (a tray holds 3)", ylabel="share of samples", title="what is ordered")
trays.set_xticks(range(0, LENGTH + 1, 4))
trays.legend(loc="upper right")
told = "; ".join(f"β {b:g}: KL {r['kl']:.1f}, proxy {r['proxy']:.1f}, gold {r['gold']:.1f}" for b, r in runs.items())
style.alt(
    fig,
    f"Left: reward against divergence. Reference: proxy {start['proxy']:.1f}, gold {start['gold']:.1f}. {told}. The "
    f"gold reward is highest at β = {best_beta:g}. Right: how many things an order holds, for the reference and three β.",
)

# %% [markdown]
# <div class="alert alert-info"><b>Read it.</b> To the left the two curves rise together: a nat spent is well spent. Then the
# gold curve turns while the proxy goes on. Neither the proxy nor the pair accuracy of 4.1
# says so. This is <i>over-optimisation</i> (Gao et al., 2023; Goodhart's law), and β is what one
# has against it. In real life there is no gold curve to choose β by, only new judgements by people.<br>
# PPO stays below the dashed line: a hundred small steps on noisy samples do not reach the optimum. And with hardly a leash
# the points need not be in order: look at the share of distinct orders in the table. A policy that says few different things
# finds nothing new, also where higher rewards are still there.</div>
#
# Run by run: **loosen the leash and read what is ordered.** (The figure above is its twin for print.)

# %%
explore.measured_slider(
    {
        beta: {
            **{kind: run[kind] for kind in ("kl", "proxy", "gold")},
            "shares": (
                torch.bincount(is_thing[run["tokens"]].sum(1), minlength=LENGTH + 1) / len(run["tokens"])
            ).tolist(),
            "says": [say(tokens) for tokens in run["tokens"][:3]],
        }
        for beta, run in runs.items()
    }
)

# %% [markdown]
# Where does the divergence go? Below, $k_1$ of each token, for orders at the best β and without a leash.

# %%
strips = [runs[best_beta], runs[0.0]]
rows = [(run["tokens"][i], run["k1"][i], run["mask"][i]) for run in strips for i in (1, 2)]
explore.token_strip(
    [[vocabulary[t].strip("<>") for t in tokens[mask].tolist()] for tokens, _, mask in rows],
    [k1[mask].tolist() for _, k1, mask in rows],
    f"log π − log π_ref of each token, nats: two orders at β = {best_beta:g}, two at β = 0",
    limit=5,
)

# %% [markdown]
# ## 5 · Measure: a real model, a learned reward
# ### 5.1 The reward model
# 300 pairs of replies to customers in 15 kinds of business were written for this course, one better and one worse, and more from six other
# kinds to test with. The texts are read by MiniLM, a frozen sentence encoder; what is learned is a linear head on its embeddings.
# A reply is judged together with what the customer said: the features are the reply's embedding and its product with
# the message's, number by number.

# %%
from lecturekit.prompting.rag import sentence_encoder

preferences = data.load("service_preferences")
train_rows = list(preferences["train"])[: None if FULL else 16]
test_rows = list(preferences["test"])[: None if FULL else 16]
encoder = sentence_encoder()


def features(messages, replies):
    """(n, 768): the embedding of each reply, and its product with that of the message it answers."""
    known = list(dict.fromkeys(messages))
    vectors = encoder([*known, *replies])
    asked = vectors[[known.index(message) for message in messages]]
    said = vectors[len(known) :]
    return torch.cat([said, said * asked], dim=1) * math.sqrt(said.shape[1])  # numbers of order 1


def pair_features(rows):
    messages = [row["message"] for row in rows]
    return [features(messages, [row[side] for row in rows]) for side in ("better", "worse")]


train_pairs, test_pairs = pair_features(train_rows), pair_features(test_rows)
torch.manual_seed(SEED)
judge = RewardHead(train_pairs[0].shape[1]).to(device())
fit_reward(judge, *train_pairs, steps=150 if FULL else 5, lr=3e-3, weight_decay=3.0)
judge.requires_grad_(False)
accuracy_train = pair_accuracy(*(judge(side) for side in train_pairs))
accuracy = pair_accuracy(*(judge(side) for side in test_pairs))
print(f"pairs it was trained on: {accuracy_train}\npairs from other kinds of business: {accuracy}")
by_reason = {}
for row, right in zip(test_rows, (judge(test_pairs[0]) > judge(test_pairs[1])).tolist()):
    by_reason.setdefault(row["reason"], []).append(right)
for reason, right in sorted(by_reason.items(), key=lambda item: -sum(item[1]) / len(item[1])):
    print(f"    what is wrong with the worse one: {reason:14} {sum(right)} of {len(right)} right")

# %% [markdown]
# Look at the last rows: what does this judge miss most often? Whatever is trained on its reward will not be punished for that.
#
# ### 5.2 The policy
# SmolLM2 with LoRA (lab 5) on query and value. The reference is the same model with its branches switched off, so no second
# copy is kept. There is no value head: the advantages are those of GRPO, 24 replies to the same customer compared
# with each other. The leash is $\beta\,k_3$ in the loss, a choice of the GRPO paper. Mind the difference: the *value* of $k_3$
# estimates KL(π ‖ π_ref), but its *gradient* on given samples is that of KL(π_ref ‖ π). The two agree while the models are
# close. Section 4 puts $k_1$ into the rewards, which is the slide's objective. The prompt is read once for all its replies.

# %%
from contextlib import contextmanager

from transformers import DynamicCache

from lecturekit.tuning.lora import LoRALinear, add_lora

model, tokenizer = load_language_model(dtype=torch.float32)
torch.manual_seed(SEED)
add_lora(model, ["q_proj", "v_proj"], r=8, alpha=16)
branches = [module for module in model.modules() if isinstance(module, LoRALinear)]
STOP, FILL = tokenizer.convert_tokens_to_ids("<|im_end|>"), 0
REPLY = 14 if FULL else 4  # tokens of a reply
SIZE = 24 if FULL else 2  # replies in a group
TEMPERATURE = 0.7  # the policy is the model with its logits divided by this, wherever a probability is meant


@contextmanager
def without_branches():
    """Inside the block the model is the reference."""
    scales = [branch.scale for branch in branches]
    for branch in branches:
        branch.scale = 0.0
    try:
        yield
    finally:
        for branch, scale in zip(branches, scales):
            branch.scale = scale


def prompt_of(row):
    """The customer's message as a chat, up to where the reply begins.   → (1, seq)"""
    chat = [{"role": "user", "content": row["message"]}]
    text = tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
    return tokenizer(text, return_tensors="pt").input_ids.to(device())


def read_prompt(prompt, count):
    """What the model keeps of a prompt, without its last token, for `count` replies to it."""
    cache = DynamicCache(config=model.config)
    model(prompt[:, :-1], past_key_values=cache, use_cache=True, logits_to_keep=1)
    cache.batch_repeat_interleave(count)
    return cache


@torch.no_grad()
def reply(row, count):
    """Replies to one customer: tokens (count, REPLY), the log-probability of each as it was sampled, and the mask."""
    prompt = prompt_of(row)
    cache, token = read_prompt(prompt, count), prompt[:, -1:].expand(count, 1)
    over = torch.zeros(count, 1, dtype=torch.bool, device=token.device)
    columns = []
    for _ in range(REPLY):
        logits = model(token, past_key_values=cache, use_cache=True).logits[:, -1]
        logprobs = (logits / TEMPERATURE).log_softmax(-1)
        token = torch.multinomial(logprobs.exp(), 1).masked_fill(over, FILL)
        columns.append((token, logprobs.gather(1, token), ~over))
        over = over | (token == STOP)
    return [torch.cat(parts, dim=1) for parts in zip(*columns)]


def reply_logprobs(row, tokens):
    """The log-probability of each token of replies to one customer.   (count, seq) → (count, seq)"""
    prompt = prompt_of(row)
    cache = read_prompt(prompt, len(tokens))
    before = torch.cat([prompt[:, -1:].expand(len(tokens), 1), tokens[:, :-1]], dim=1)
    logits = model(before, past_key_values=cache, use_cache=True).logits / TEMPERATURE
    return logits.gather(2, tokens.unsqueeze(2)).squeeze(2) - logits.logsumexp(-1)


def texts_of(tokens):
    return [" ".join(tokenizer.decode(row, skip_special_tokens=True).split()) or "." for row in tokens]


def rewards_of(row, texts):
    return judge(features([row["message"]] * len(texts), texts))


def varied(texts):
    """The share of all word pairs in the replies that occur only once among them: 1 when no two words are said twice."""
    pairs = Counter(pair for text in texts for pair in zip(text.lower().split(), text.lower().split()[1:]))
    return sum(1 for n in pairs.values() if n == 1) / max(1, sum(pairs.values()))


def echo(row, texts):
    """The share of a reply's words that stand in the customer's message, averaged over replies."""
    said = set(re.findall(r"\w+", row["message"].lower()))
    words = [re.findall(r"\w+", text.lower()) or ["-"] for text in texts]
    return sum(sum(word in said for word in line) / len(line) for line in words) / len(words)


def look(rows, count):
    """Replies to each customer: for each row the texts, rewards, k1 of each token, and the tokens in words."""
    found = []
    for row in progress(rows, "looking"):
        tokens, ours, mask = reply(row, count)
        with torch.no_grad(), without_branches():
            k1, _, _ = kl_used(ours, reply_logprobs(row, tokens))
        texts = texts_of(tokens)
        words = [[tokenizer.decode(t) for t in line[m]] for line, m in zip(tokens, mask)]
        found.append(
            {
                "texts": texts,
                "rewards": rewards_of(row, texts),
                "k1": [line[m].tolist() for line, m in zip(k1, mask)],
                "words": words,
            }
        )
    return found


def mean_reward(found):
    return sum(one["rewards"].mean().item() for one in found) / len(found)


asked = test_rows[: 12 if FULL else 2]  # two of each of the six kinds of business
EACH = 6 if FULL else 2  # replies to each of these customers
torch.manual_seed(SEED)
before = look(asked, EACH)
print(f"reward of the untrained model's replies: {mean_reward(before):.2f}")

# %% [markdown]
# One update for each batch of samples: the log-probabilities *stored* at sampling and those of the update are then the same
# up to rounding, and the clip has nothing to do. With a second update on the same samples it would.

# %%
BETA, STEPS, GROUPS = 0.05, 24 if FULL else 1, 1
trained = [p for p in model.parameters() if p.requires_grad]
optimizer = torch.optim.AdamW(trained, lr=1.5e-3, weight_decay=0.0)
schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda s: min(1, (s + 1) / 3) * (1 - s / STEPS))
generator = torch.Generator().manual_seed(SEED)
curve, leash = [], []
for _ in progress(range(STEPS), "GRPO"):
    some = [train_rows[i] for i in torch.randperm(len(train_rows), generator=generator)[:GROUPS].tolist()]
    optimizer.zero_grad()
    scores, divergences = [], []
    for row in some:
        tokens, old, mask = reply(row, SIZE)
        scores.append(rewards_of(row, texts_of(tokens)))
        advantages = group_used(scores[-1].unsqueeze(0)).squeeze(0).unsqueeze(1).expand_as(old)
        with torch.no_grad(), without_branches():
            expected = reply_logprobs(row, tokens)
        logprobs = reply_logprobs(row, tokens)
        _, _, k3 = kl_used(logprobs, expected)
        loss = policy_loss_used(logprobs, old, advantages, mask, 0.2) + BETA * k3[mask].mean()
        (loss / GROUPS).backward()
        divergences.append((k3.detach() * mask).sum(1).mean())
    nn.utils.clip_grad_norm_(trained, 1.0)
    optimizer.step()
    schedule.step()
    curve.append(torch.cat(scores).mean().item())
    leash.append(torch.stack(divergences).mean().item())

# %% [markdown]
# ### 5.3 Before and after, on customers of kinds of business that it was not trained on
# Replies are cut after 14 tokens, so most are no finished answer, while our own replies are whole. Where ours are drawn
# beside the model's, they are for orientation, not a fair rival.

# %%
torch.manual_seed(SEED)
after = look(asked, EACH)
reward_before, reward_after = mean_reward(before), mean_reward(after)
kl_after = sum(sum(map(sum, one["k1"])) / EACH for one in after) / len(after)
gains = torch.stack([b["rewards"].mean() - a["rewards"].mean() for a, b in zip(before, after)])  # one a customer
gain_error = 1.96 * gains.std().item() / math.sqrt(len(gains))
varied_before, varied_after = (
    varied([one["texts"][0] for one in found]) for found in (before, after)
)  # one a customer
written = torch.cat([rewards_of(row, [row["better"]]) for row in asked]).mean().item()
echo_before, echo_after = (
    sum(echo(row, one["texts"]) for row, one in zip(asked, found)) / len(asked) for found in (before, after)
)
echo_people = sum(echo(row, [row["better"]]) for row in asked) / len(asked)
print(f"reward {reward_before:.2f} → {reward_after:.2f}; our own better replies get {written:.2f}")
print(f"rise {reward_after - reward_before:.2f} ± {gain_error:.2f} (95 %), at {kl_after:.1f} nats a reply")
print(f"word pairs that occur once only: {varied_before:.0%} → {varied_after:.0%}")
print(
    f"echo, words taken from the customer's message: {echo_before:.0%} → {echo_after:.0%}; people {echo_people:.0%}\n"
)
for row, first, then in zip(asked, before, after):
    print(f"{row['topic']}: {row['message']}")
    for label, one in (("before", first), ("after ", then)):
        print(f"    {label} {one['rewards'][0].item():+.1f}  {one['texts'][0]}")

# %%
fig, (left, right) = style.figure(1, 2, width=4.8)
left.plot(range(1, len(curve) + 1), curve, "o-", label="reward of the batch")
left.plot(range(1, len(curve) + 1), leash, "s--", label="k3, nats a reply")
left.set(xlabel="step", title="training")
left.legend(loc="upper left")
right.hist(
    [torch.cat([one["rewards"] for one in found]).cpu().numpy() for found in (before, after)],
    bins=10,
    color=[style.GREY, style.BLUE],
    label=["before", "after"],
)
right.axvline(written, color=style.BLACK, linestyle="--", linewidth=1.5, label="our better replies")
right.set(xlabel="reward of a reply to an unseen customer", ylabel="replies")
right.legend(loc="upper left")
style.alt(
    fig,
    f"Left: reward and divergence over {len(curve)} steps of training. Right: the rewards of {EACH} replies to each of {len(asked)} customers before "
    f"(mean {reward_before:.2f}) and after (mean {reward_after:.2f}); our own better replies have {written:.2f}.",
)

# %% [markdown]
# Where did the policy leave the reference? Red tokens it now likes better than the reference does. **Are these the
# tokens that help the customer, or those that please the judge?**

# %%
explore.token_strip(
    [one["words"][0] for one in after[:4]],
    [one["k1"][0] for one in after[:4]],
    "log π − log π_ref of each token, nats: replies after training",
    limit=3,
)

# %% [markdown]
# <div class="alert alert-info"><b>What got worse although the reward rose.</b> Read the replies, not the number. The two lines
# above the samples put it in figures, one how alike the replies to different customers are, one the echo. If the echo has risen, the policy has found out that
# this judge likes to hear the customer's own words: a reply that says the complaint back <i>is</i> on topic, calm and
# free of insults. No customer is helped by it. Nobody told the judge, for no pair that it learned from had a parrot in it.
# This is over-optimisation again, after two dozen steps, with a judge that is right on most held-out pairs and a leash in place.
# Look also for promises that nobody can know to be kept, before and after.
# What would help: a larger β, fewer steps, pairs made from <i>these</i> replies, a better start (in the paper the policy is fine-tuned on
# good replies first, as in lab 1; ours was not). Try <code>BETA = 0.5</code>.</div>

# %% [markdown]
# ## 6 · The paper and you
# The slides print no figures for RLHF. Ouyang et al. train their reward model on comparisons for some 33,000 prompts. It agrees with
# people whose judgements it was not trained on in 69.6 ± 0.9 % of the cases; their own labelers agree with each other in
# 72.6 ± 1.5 %. Their answers were written by large models; ours are short, and each was made worse on purpose.

# %%
lab = "lab02_rlhf"


def record(claim, quantity, paper, ours, unit="", **more):
    results.record(claim, quantity, paper, ours, unit, lab=lab, **more)


peak = runs[best_beta]
loose = runs[0.0]
record(
    "C03",
    "held-out pairs ordered rightly by the learned reward, service replies",
    69.6,
    100 * accuracy.fraction,
    "%",
    spread=(100 * accuracy.low, 100 * accuracy.high),
    seeds=[SEED],
    holds=accuracy.low > 0.5,
    note=f"{accuracy.pairs} pairs of kinds of business not trained on, {len(train_rows)} pairs trained on; the paper: people whose judgements it was not trained on",
)
record(
    "C03",
    "held-out pairs ordered rightly by the proxy, café orders",
    None,
    100 * proxy_accuracy.fraction,
    "%",
    seeds=[SEED],
    holds=proxy_accuracy.low > 0.5,
    note=f"{PAIRS} noisy pairs trained on; the test pairs are judged without noise",
)
for beta, run in runs.items():
    for kind in ("kl", "proxy", "gold"):
        record(
            "C04",
            f"frontier at β = {beta:g}: {'KL(π ‖ π_ref)' if kind == 'kl' else kind + ' reward'}",
            None,
            run[kind],
            "nats" if kind == "kl" else "",
            seeds=[SEED],
        )
record(
    "C04",
    "proxy reward gained from the reference to β = 0",
    None,
    loose["proxy"] - start["proxy"],
    seeds=[SEED],
    holds=loose["proxy"] > start["proxy"] and loose["proxy"] > peak["proxy"] - 0.1,
    note="standard deviations of the training pairs' rewards",
)
record(
    "C04",
    "gold reward gained from the reference to the best β",
    None,
    peak["gold"] - start["gold"],
    seeds=[SEED],
    holds=peak["gold"] > start["gold"],
)
record(
    "C04",
    "gold reward lost from the best β to β = 0: over-optimisation",
    None,
    peak["gold"] - loose["gold"],
    seeds=[SEED],
    holds=peak["gold"] > loose["gold"],
)
record(
    "C04",
    "reward of SmolLM2's replies to unseen customers, rise",
    None,
    reward_after - reward_before,
    spread=(reward_after - reward_before - gain_error, reward_after - reward_before + gain_error),
    seeds=[SEED],
    holds=reward_after - reward_before > gain_error,
    note=f"GRPO with LoRA, {STEPS} steps of {GROUPS} × {SIZE} replies of {REPLY} tokens, β = {BETA}; standard deviations of the training replies' rewards",
)
record("C04", "divergence of SmolLM2 from its reference after that", None, kl_after, "nats a reply", seeds=[SEED])
record(
    "C04",
    "word pairs that occur once only in SmolLM2's replies, change",
    None,
    100 * (varied_after - varied_before),
    "points",
    seeds=[SEED],
    note="negative: the replies have become more alike",
)
record(
    "C04",
    "words of SmolLM2's replies taken from the customer's message, change",
    None,
    100 * (echo_after - echo_before),
    "points",
    seeds=[SEED],
    note="positive: the policy pleases the judge by saying the message back",
)
results.table(lab)

# %%
predictions = [
    ("a. reward model, held-out pairs", predicted_accuracy, f"{accuracy.fraction:.0%}"),
    ("b. proxy as β falls", predicted_proxy, f"{start['proxy']:.1f} → {peak['proxy']:.1f} → {loose['proxy']:.1f}"),
    ("b. gold as β falls", predicted_gold, f"{start['gold']:.1f} → {peak['gold']:.1f} → {loose['gold']:.1f}"),
    ("c. rise of SmolLM2's reward", predicted_rise, f"{reward_after - reward_before:.2f}"),
    ("d. its replies become", predicted_alike, "more alike" if varied_after < varied_before else "less alike"),
]
for what, guess, found in predictions:
    print(f"{what:34} you said: {'–' if guess is None else guess!s:20} measured: {found}")

# %% [markdown]
# The effects that must show in a full run, whatever the machine:

# %%
if FULL:
    assert accuracy.low > 0.5, f"the reward model has learned nothing that carries over: {accuracy}"
    assert proxy_accuracy.fraction > 0.7
    assert peak["gold"] > start["gold"] + 0.2, "with a leash, the true reward must rise too"
    assert loose["proxy"] > start["proxy"] + 2, "without one, the proxy must rise"
    assert loose["gold"] < start["gold"] - 0.5, (
        "and the gold reward must fall below where it started: over-optimisation"
    )
    assert runs[3.0]["kl"] < runs[1.0]["kl"] < runs[0.5]["kl"] < runs[0.2]["kl"], "KL must rise as β falls"
    assert reward_after - reward_before > 0.2, "the learned reward must move SmolLM2's replies"

# %% [markdown]
# ## 7 · Explain
# ### 7.1 In your own words · 10 points
# A colleague says: "Our policy's reward rose from 0 to 4 and is still rising, our reward model is right on 80 % of held-out
# pairs, so let us train on with β = 0." What would you answer, and what would you measure first? Five sentences, with numbers from section 4.

# %% [markdown] nbgrader={"grade": true, "grade_id": "rlhf-explain", "locked": false, "points": 10, "schema_version": 3, "solution": true, "task": false}
# The rising number is the proxy, the very thing that is maximised, so it would rise whether the answers get better or not.
# Held-out pairs come from the reference model: they say how good the reward model is *there*, not where the policy has gone since.
# In section 4 the proxy was right on most held-out pairs too and ended far higher at β = 0 than at the reference, while the gold
# reward rose at first, and at β = 0 was far below where it had started (the rows "gold" and "proxy" of the table there). So I would look at the divergence from the reference, read
# samples, and have people judge fresh pairs of the new policy against the old one; with these, the reward model can be fitted again.
# Until then, keep a β (or an early checkpoint) at which such judgements still improve.
#
# *Marking: 3 points for telling proxy from true reward, 3 for seeing that held-out accuracy is measured where the reference
# writes, 2 for numbers from section 4, 2 for new judgements on the new policy's samples (or an equally independent measure).*

# %% [markdown]
# ### 7.2 Which of these is wrong, and why? · 10 points
# Exactly one statement is wrong. Say which, and explain it with a formula or a small example.
#
# - **A.** Adding 100 to every reward of the reward model changes neither its Bradley–Terry loss nor the optimal policy.
# - **B.** $k_1$ of a single token can be negative although the divergence cannot, and replacing it by $|k_1|$ makes the
#   estimate better.
# - **C.** If old log-probabilities are computed anew with the current policy at each update, the ratio is always 1, nothing is ever clipped, and
#   the clip does not limit how far several updates on one batch go.
# - **D.** As β grows, the optimal policy approaches the reference; as β approaches 0, it puts all its probability on the
#   answers with the highest reward among those that the reference can give.

# %% [markdown] nbgrader={"grade": true, "grade_id": "rlhf-wrong", "locked": false, "points": 10, "schema_version": 3, "solution": true, "task": false}
# B is wrong. $\mathbb{E}_\pi[\log\pi - \log\pi_\text{ref}]$ *is* the divergence: $k_1$ is unbiased just because its negative terms are
# there. With absolute values the mean is too large, and tokens that the policy likes *less* than the reference would be
# charged as if it had moved away in their favour. Example: two words, $\pi = (0.5, 0.5)$, $\pi_\text{ref} = (0.6, 0.4)$. $k_1$ is
# $-0.18$ and $+0.22$, with mean 0.020, the divergence; $|k_1|$ has mean 0.20, ten times too much. An estimator that is never
# negative *and* unbiased is $k_3$.
#
# *Marking: 3 points for B, 5 for the bias, shown with a formula or an example, 2 for naming k3 or for saying why the negative terms are needed.*
