"""Two questions of lab 11: the log-probability of each candidate, and the same with the prompt read once.

Brown et al. 2020 (GPT-3), §2.4: a candidate is scored by its likelihood, of the whole or per token. What a student
writes:
    score_candidates(logits, tokens, prompt_length, lengths) → sums, means
    score_cached(model, prompt, candidates) → sums, means
"""

from __future__ import annotations

import copy
import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.rnn import pad_sequence

from lecturekit.checking import Case, Draw, Unfit, question
from lecturekit.checking.compare import describe

LAB = "lab11_prompting"
SLIDE = "In-context learning: zero-shot and few-shot"
EPS = torch.finfo(torch.float32).eps

# icl.score -----------------------------------------------------------------------------------------------------------


@question("icl.score", lab=LAB, points=20, slide=SLIDE, returns=("sums", "means"))
def score(draw: Draw) -> Case:
    """The log-probability of each candidate: its sum and its mean a token."""
    edge = draw.edge("candidates of one token", "no padding", "a prompt of one token", "large logits", "bfloat16")
    n, vocab = draw.integer(2, 4), draw.integer(11, 17)
    before = 1 if edge == "a prompt of one token" else draw.integer(2, 5)
    own = torch.tensor(draw.sizes(n, low=1, high=5), device=draw.device)  # different lengths
    if edge == "candidates of one token":
        own = torch.ones_like(own)
    elif edge == "no padding":
        own = torch.full_like(own, draw.integer(2, 4))
    seq = before + int(own.max()) + (0 if edge == "no padding" else draw.integer(1, 2))
    lengths = before + own
    tokens = draw.integers(0, vocab - 1, n, seq)
    tokens[:, :before] = tokens[0, :before]
    tokens[0, lengths[0] - 1] = 0  # a word like any other, though padding looks the same
    tokens[torch.arange(seq, device=draw.device) >= lengths.unsqueeze(1)] = 0
    return Case(
        edge,
        logits=draw.normal(
            n,
            seq,
            vocab,
            scale=1000.0 if edge == "large logits" else 2.0,
            dtype=torch.bfloat16 if edge == "bfloat16" else torch.float32,
        ),
        tokens=tokens,
        prompt_length=before,
        lengths=lengths,
    )


score.oracle("lecturekit.prompting.icl:score_candidates")


def _roundings(case: Case) -> float:
    """Those of sums in float32 over the vocabulary and the candidate, counted in roundings of the logits' dtype."""
    return (case.logits.shape[1] + case.logits.shape[2] + 8) * EPS / torch.finfo(case.logits.dtype).eps


def _size_of_sum(case: Case) -> Tensor:
    """For each row the sum over its candidate of the largest logit's size and the logarithm of the vocabulary's."""
    sizes = case.logits.double().abs().amax(-1)[:, :-1] + math.log(case.logits.shape[-1])
    return (sizes * _own(case.tokens, case.prompt_length, case.lengths)[:, 1:]).sum(1)


def _own(tokens: Tensor, prompt_length: int, lengths: Tensor) -> Tensor:
    """(n, seq), true on the candidate's tokens."""
    place = torch.arange(tokens.shape[1], device=tokens.device)
    return (place >= prompt_length) & (place < lengths.unsqueeze(1))


_WHY = (
    "a log-softmax over the vocabulary is off by roundings of the largest logit; these add up over the candidate. All "
    "in float32, into which bfloat16 logits go without a loss"
)
score.tolerance(ulps=_roundings, magnitude=lambda case, _: _size_of_sum(case), why=_WHY, part="sums")
score.tolerance(
    ulps=_roundings,
    magnitude=lambda case, _: _size_of_sum(case) / (case.lengths - case.prompt_length),
    why=_WHY + "; then one division",
    part="means",
)
score.law(
    "a probability is at most 1, so its logarithm is at most 0",
    lambda case, parts: bool((parts["sums"] <= 0).all() and (parts["means"] <= 0).all()),
)
score.law(
    "a candidate of one token has one number for sum and mean",
    lambda case, parts: bool((parts["sums"] == parts["means"])[case.lengths == case.prompt_length + 1].all()),
)


def _looked_up(logits: Tensor, tokens: Tensor) -> Tensor:
    """log p of each token by the logits at its own place."""
    return _picked(logits.float().log_softmax(-1), tokens)


def _picked(scores: Tensor, tokens: Tensor) -> Tensor:
    return scores.gather(-1, tokens.unsqueeze(-1)).squeeze(-1)


def _totals(scores: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """Sums and means of scores (n, t) where the mask is true: how most of the misconceptions end."""
    sums = torch.where(mask, scores, 0.0).sum(1)
    return sums, sums / mask.sum(1)


@score.misconception(
    "does not shift: asks each position for the token it was given",
    hint="What does position t predict? Compare logits[:, t] with which token?",
)
def _(logits, tokens, prompt_length, lengths):
    return _totals(_looked_up(logits, tokens), _own(tokens, prompt_length, lengths))


@score.misconception("shifts the wrong way", hint="Position t sees tokens 0 … t. Is the one you looked up among them?")
def _(logits, tokens, prompt_length, lengths):
    return _totals(_looked_up(logits[:, 1:], tokens[:, :-1]), _own(tokens, prompt_length, lengths)[:, :-1])


@score.misconception(
    "scores the prompt too",
    hint="All candidates share the prompt. log p(candidate | prompt): on which side of the bar does the prompt stand?",
)
def _(logits, tokens, prompt_length, lengths):
    return _totals(_looked_up(logits[:, :-1], tokens[:, 1:]), _own(tokens, 1, lengths)[:, 1:])


@score.misconception(
    "counts the padding",
    hint="The rows end at different places. Up to which position do you add up, and what says where a row ends?",
)
def _(logits, tokens, prompt_length, lengths):
    scores = _looked_up(logits[:, :-1], tokens[:, 1:])[:, prompt_length - 1 :]
    return _totals(scores, torch.ones_like(scores, dtype=torch.bool))


_LENGTHS_HINT = (
    "lengths counts the tokens of a whole row. Print one row and its length: which tokens of it are the prompt's?"
)


@score.misconception("takes lengths for those of the candidates", hint=_LENGTHS_HINT)
def _(logits, tokens, prompt_length, lengths):
    mask = _own(tokens, prompt_length, prompt_length + lengths)[:, 1:]
    sums, _ = _totals(_looked_up(logits[:, :-1], tokens[:, 1:]), mask)
    return sums, sums / lengths


@score.misconception("takes lengths for those of the candidates", hint=_LENGTHS_HINT)  # as far as a row goes
def _(logits, tokens, prompt_length, lengths):
    mask = _own(tokens, prompt_length, prompt_length + lengths)[:, 1:]
    return _totals(_looked_up(logits[:, :-1], tokens[:, 1:]), mask)


@score.misconception(
    "takes every token 0 for padding",
    hint="0 is a word of the vocabulary too. What else tells you where a candidate ends?",
)
def _(logits, tokens, prompt_length, lengths):
    scores = _looked_up(logits[:, :-1], tokens[:, 1:])[:, prompt_length - 1 :]
    return _totals(scores, tokens[:, prompt_length:] != 0)


@score.misconception(
    "leaves out the candidate's first token",
    hint="The first token of a candidate is predicted too. By which position, and is that one still in the prompt?",
)
def _(logits, tokens, prompt_length, lengths):
    sums, _ = _totals(_looked_up(logits[:, :-1], tokens[:, 1:]), _own(tokens, prompt_length + 1, lengths)[:, 1:])
    return sums, sums / (lengths - prompt_length)


@score.misconception(
    "leaves out the candidate's first token, in the count too",
    hint="The first token of a candidate is predicted too. By which position, and is that one still in the prompt?",
)
def _(logits, tokens, prompt_length, lengths):
    return _totals(_looked_up(logits[:, :-1], tokens[:, 1:]), _own(tokens, prompt_length + 1, lengths)[:, 1:])


@score.misconception(
    "leaves out the candidate's last token", hint="A row of length 7 holds tokens 0 … 6. Which is the last you count?"
)
def _(logits, tokens, prompt_length, lengths):
    sums, _ = _totals(_looked_up(logits[:, :-1], tokens[:, 1:]), _own(tokens, prompt_length, lengths - 1)[:, 1:])
    return sums, sums / (lengths - prompt_length)


@score.misconception(
    "counts the prompt's last token as the candidate's",
    hint="With a prompt of 3 tokens, the candidate's first is token 3. Which logits predict that one, and not token 2?",
)
def _(logits, tokens, prompt_length, lengths):
    return _totals(_looked_up(logits[:, :-1], tokens[:, 1:]), _own(tokens, prompt_length - 1, lengths)[:, 1:])


_MEAN_HINT = (
    "The mean is for one token of the candidate. Over how many tokens did you add up, and by what do you divide?"
)


@score.misconception("divides by the length of the whole row", hint=_MEAN_HINT)
def _(logits, tokens, prompt_length, lengths):
    sums, _ = _totals(_looked_up(logits[:, :-1], tokens[:, 1:]), _own(tokens, prompt_length, lengths)[:, 1:])
    return sums, sums / lengths


@score.misconception("divides by the longest candidate's length", hint=_MEAN_HINT)
def _(logits, tokens, prompt_length, lengths):
    sums, _ = _totals(_looked_up(logits[:, :-1], tokens[:, 1:]), _own(tokens, prompt_length, lengths)[:, 1:])
    return sums, sums / (tokens.shape[1] - prompt_length)


@score.misconception("counts places outside the candidate in the mean", hint=_MEAN_HINT)
def _(logits, tokens, prompt_length, lengths):
    scores = _looked_up(logits[:, :-1], tokens[:, 1:]) * _own(tokens, prompt_length, lengths)[:, 1:]
    return scores.sum(1), scores.mean(1)


@score.misconception(
    "gives the sum for the mean: candidates of different length are not comparable",
    hint="A long candidate has more factors below 1. What makes it comparable with a short one?",
)
def _(logits, tokens, prompt_length, lengths):
    sums, _ = _totals(_looked_up(logits[:, :-1], tokens[:, 1:]), _own(tokens, prompt_length, lengths)[:, 1:])
    return sums, sums


@score.misconception("returns the means before the sums", hint="Which of the two does the signature name first?")
def _(logits, tokens, prompt_length, lengths):
    sums, means = _totals(_looked_up(logits[:, :-1], tokens[:, 1:]), _own(tokens, prompt_length, lengths)[:, 1:])
    return means, sums


@score.misconception(
    "adds up logits, not log-probabilities",
    hint="A logit says how a word compares with others. What turns a position's logits into log-probabilities?",
)
def _(logits, tokens, prompt_length, lengths):
    return _totals(_picked(logits.float()[:, :-1], tokens[:, 1:]), _own(tokens, prompt_length, lengths)[:, 1:])


@score.misconception(
    "gives the loss, which is the negative of what is asked",
    hint="A probability is at most 1: which sign has its logarithm? Which sign have your numbers?",
)
def _(logits, tokens, prompt_length, lengths):
    sums, means = _totals(_looked_up(logits[:, :-1], tokens[:, 1:]), _own(tokens, prompt_length, lengths)[:, 1:])
    return -sums, -means


@score.misconception(
    "gives probabilities, not their logarithms",
    hint="A long candidate's probability may be 10⁻⁵⁰, which float32 rounds to 0. What is asked for instead?",
)
def _(logits, tokens, prompt_length, lengths):
    sums, means = _totals(_looked_up(logits[:, :-1], tokens[:, 1:]), _own(tokens, prompt_length, lengths)[:, 1:])
    return sums.exp(), means.exp()


@score.misconception(
    "rounds to bfloat16 before adding up",
    hint="bfloat16 keeps 8 bits of a number. In which dtype is your log-softmax, when the logits are bfloat16?",
)
def _(logits, tokens, prompt_length, lengths):
    scores = _picked(logits[:, :-1].log_softmax(-1).float(), tokens[:, 1:])
    return _totals(scores, _own(tokens, prompt_length, lengths)[:, 1:])


@score.misconception(
    "adds up probabilities", hint="Tokens come one after the other: are their probabilities added or multiplied?"
)
def _(logits, tokens, prompt_length, lengths):
    probabilities = _looked_up(logits[:, :-1], tokens[:, 1:]).exp()
    return _totals(probabilities, _own(tokens, prompt_length, lengths)[:, 1:])


@score.misconception(
    "normalises over the positions, not over the words",
    hint="At one position the probabilities of all words add up to 1. Which dimension is that?",
)
def _(logits, tokens, prompt_length, lengths):
    scores = _picked(logits.float()[:, :-1].log_softmax(1), tokens[:, 1:])
    return _totals(scores, _own(tokens, prompt_length, lengths)[:, 1:])


@score.misconception(
    "takes the logarithm of a softmax, which underflows",
    hint="A word can have probability 10⁻⁵⁰, which float32 rounds to 0. Which function never leaves the logarithms?",
)
def _(logits, tokens, prompt_length, lengths):
    scores = _picked(logits.float()[:, :-1].softmax(-1).log(), tokens[:, 1:])
    return _totals(scores, _own(tokens, prompt_length, lengths)[:, 1:])


@score.alternative("row by row")
def _(logits, tokens, prompt_length, lengths):
    sums = []
    for row in range(len(logits)):
        end = int(lengths[row])
        scores = torch.log_softmax(logits[row, prompt_length - 1 : end - 1].float(), dim=-1)
        sums.append(scores.gather(1, tokens[row, prompt_length:end].unsqueeze(1)).sum())
    sums = torch.stack(sums)
    return sums, sums / (lengths - prompt_length)


@score.alternative("cross-entropy with ignored labels")
def _(logits, tokens, prompt_length, lengths):
    labels = tokens.clone()
    labels[:, :prompt_length] = -100
    for row, length in enumerate(lengths):
        labels[row, length:] = -100
    losses = F.cross_entropy(logits[:, :-1].float().transpose(1, 2), labels[:, 1:], reduction="none", ignore_index=-100)
    total = -losses.sum(dim=1)
    return total, total / (labels != -100).sum(dim=1)


@score.alternative("a mask times gathered log-probabilities")
def _(logits, tokens, p, lengths):
    logp = logits[:, p - 1 : -1].float().log_softmax(dim=2)
    picked = torch.gather(logp, 2, tokens[:, p:, None])[..., 0]
    mask = (torch.arange(picked.shape[1], device=tokens.device)[None] < (lengths - p)[:, None]).float()
    return [(picked * mask).sum(1), (picked * mask).sum(1) / mask.sum(1)]


@score.alternative("logsumexp")
def _(*inputs):
    logits, tokens, start, lengths = inputs
    logits = logits.float()
    chosen = torch.take_along_dim(logits[:, :-1], tokens[:, 1:].unsqueeze(2), dim=2).squeeze(2)
    scores = chosen - logits[:, :-1].logsumexp(dim=2)
    place = torch.arange(1, tokens.shape[1], device=tokens.device).expand_as(scores)
    outside = (place < start) | (place >= lengths.view(-1, 1))
    sums = scores.masked_fill(outside, 0).sum(dim=1)
    return sums, sums.div(lengths.sub(start))


# icl.cache -----------------------------------------------------------------------------------------------------------

WIDTH = 8


@question("icl.cache", lab=LAB, points=10, slide=SLIDE)
def cache(draw: Draw) -> Case:
    """The same scores with the prompt read once."""
    edge = draw.edge("one candidate", "candidates of one token", "a candidate comes twice", "a long prompt")
    vocab = draw.integer(11, 17)
    n = 1 if edge == "one candidate" else draw.integer(3, 4)
    lengths = [1] * n if edge == "candidates of one token" else draw.sizes(n, low=1, high=5)
    candidates = [draw.integers(0, vocab - 1, length) for length in lengths]
    if edge == "one candidate":
        candidates = [draw.integers(0, vocab - 1, 3)]
    elif edge == "a candidate comes twice":
        candidates.append(candidates[0].clone())
    return Case(
        edge,
        words=draw.normal(vocab, WIDTH),
        positions=draw.normal(32, WIDTH),
        layers=draw.normal(2, 4, WIDTH, WIDTH, scale=WIDTH**-0.5),
        prompt=draw.integers(0, vocab - 1, 20 if edge == "a long prompt" else draw.integer(4, 7)),
        candidates=candidates,
    )


cache.oracle("lecturekit.prompting.icl:score_cached")
cache.tolerance(
    ulps=lambda case: len(case.words) + max(map(len, case.candidates)) + 8,
    magnitude=lambda case, _: _size_of_logits(case) * max(map(len, case.candidates)),
    why="the model itself works in float64; its logits are rounded to float32 once, a log-softmax over the vocabulary "
    "is off by roundings of the largest of them, and these add up over the candidate",
)


def _size_of_logits(case: Case) -> float:
    """The size of the largest logit, with the logarithm of the vocabulary's."""
    model = _Reader(case.words, case.positions, case.layers, len(case.prompt))
    with torch.no_grad():
        largest = max(
            float(model(torch.cat([case.prompt, one]).unsqueeze(0)).logits.abs().max()) for one in case.candidates
        )
    return largest + math.log(len(case.words))


class _Kept:
    """The keys and values of one layer, each (rows, heads, tokens, width)."""

    def __init__(self, keys: Tensor, values: Tensor) -> None:
        self.keys, self.values = keys, values


class _Cache:
    """What a model has read, with the interface of transformers' DynamicCache as far as it is of use here."""

    def __init__(self) -> None:
        self.layers: list[_Kept] = []

    def update(self, keys: Tensor, values: Tensor, layer_idx: int, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        held = len(self.layers[layer_idx].keys) if layer_idx < len(self.layers) else len(keys)
        if held != len(keys):
            raise Unfit(f"past_key_values holds {held} rows, but input_ids has {len(keys)}: row i is read behind row i")
        if layer_idx == len(self.layers):
            self.layers.append(_Kept(keys, values))
        else:
            layer = self.layers[layer_idx]
            layer.keys, layer.values = torch.cat([layer.keys, keys], -2), torch.cat([layer.values, values], -2)
        return self.layers[layer_idx].keys, self.layers[layer_idx].values

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return self.layers[layer_idx].keys.shape[-2] if self.layers else 0

    def crop(self, length: int) -> None:
        """Take −length tokens off the end; a length above 0, as in older versions, is how many to keep."""
        self._each(lambda kept: kept[..., : length or None, :])

    def batch_repeat_interleave(self, repeats: int) -> None:
        self._each(lambda kept: kept.repeat_interleave(repeats, dim=0))

    def batch_select_indices(self, indices: Tensor) -> None:
        self._each(lambda kept: kept[indices])

    def _each(self, change: Any) -> None:
        for layer in self.layers:
            layer.keys, layer.values = change(layer.keys), change(layer.values)

    def __len__(self) -> int:
        return len(self.layers)

    def __iter__(self) -> Any:
        return iter([(layer.keys, layer.values) for layer in self.layers])


class _Output(dict):
    """What calling a model gives: logits and past_key_values as attributes, as entries and by their number."""

    def __init__(self, logits: Tensor, past_key_values: Any) -> None:
        super().__init__(logits=logits, past_key_values=past_key_values)
        self.logits, self.past_key_values = logits, past_key_values

    def __getitem__(self, key: Any) -> Any:
        return list(self.values())[key] if isinstance(key, int) else super().__getitem__(key)


class _Reader(nn.Module):
    """A causal language model of two small layers that is called as those of transformers are.

    It works in float64 and gives float32 logits, so that it hardly matters in what portions it reads.
    prompt_reads counts how often a position of the prompt was read, in any row; the prompt's last is left out, since
    reading that one again in front of a candidate is a right way to get its first logits.
    """

    def __init__(self, words: Tensor, positions: Tensor, layers: Tensor, prompt_length: int) -> None:
        super().__init__()
        self.words, self.positions = nn.Parameter(words.double()), nn.Parameter(positions.double())
        self.layers = nn.Parameter(layers.double())
        self.device = words.device
        self.prompt_length, self.prompt_reads = prompt_length, [0]  # a list: copies of the model share it

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Any = None,
        use_cache: bool = True,
        logits_to_keep: int = 0,
        **_: Any,
    ) -> _Output:
        if not isinstance(input_ids, Tensor) or input_ids.ndim != 2:
            raise Unfit(f"the model reads input_ids of shape (rows, tokens), got {describe(input_ids)}")
        if past_key_values is None:
            past_key_values = _Cache()
        elif not hasattr(past_key_values, "update"):
            raise Unfit(
                f"past_key_values must be what the model returned, or a copy of it, got {describe(past_key_values)}"
            )
        rows, new = input_ids.shape
        past = past_key_values.get_seq_length()
        place = torch.arange(past, past + new, device=input_ids.device)
        self.prompt_reads[0] += rows * int((place < self.prompt_length - 1).sum())
        everywhere = torch.arange(past + new, device=input_ids.device)
        visible = everywhere <= place.unsqueeze(1)  # (new, past + new)
        if attention_mask is not None:
            if attention_mask.shape != (rows, past + new):
                raise Unfit(
                    f"attention_mask must cover what was read before too, {(rows, past + new)}, "
                    f"got {tuple(attention_mask.shape)}"
                )
            visible = visible & (attention_mask.bool().unsqueeze(1) | (everywhere == place.unsqueeze(1)))
        state = self.words[input_ids] + self.positions[place if position_ids is None else position_ids]
        for number, (query, key, value, out) in enumerate(self.layers):
            keys, values = past_key_values.update(
                (state @ key).unsqueeze(1), (state @ value).unsqueeze(1), number
            )  # (rows, 1, past + new, width)
            weights = (state @ query) @ keys[:, 0].mT / WIDTH**0.5  # (rows, new, past + new)
            weights = weights.masked_fill(~visible, -math.inf).softmax(-1)
            state = state + weights @ values[:, 0] @ out
        return _Output((state[:, -logits_to_keep:] @ self.words.T).float(), past_key_values if use_cache else None)


@cache.driver
def _(function: Any, case: Case) -> dict[str, Any]:
    """Hand over a small model, look at the scores and at how often it read the prompt."""
    model = _Reader(case.words, case.positions, case.layers, len(case.prompt)).eval()
    result = function(model, case.prompt, case.candidates)
    n = len(case.candidates)
    if not isinstance(result, (tuple, list)) or len(result) != 2:
        raise Unfit(f"return two tensors, (sums, means), each ({n},), got {describe(result)}")
    for name, part in zip(("sums", "means"), result, strict=True):
        if not isinstance(part, Tensor):
            raise Unfit(f"{name} must be a tensor ({n},), got {describe(part)}; torch.stack joins a list of tensors")
    return {
        "sums": result[0].detach(),
        "means": result[1].detach(),
        "prompt tokens read, but for the last": model.prompt_reads[0],
    }


cache.law(
    "the same candidate has the same score, wherever it stands in the list",
    lambda case, parts: (
        bool((parts["sums"][0] - parts["sums"][-1]).abs() < 1e-2)  # above all roundings
        if case.label == "a candidate comes twice"
        else None
    ),
)
cache.law(
    "the prompt is read once, whatever the number of candidates",
    lambda case, parts: parts["prompt tokens read, but for the last"] == len(case.prompt) - 1,
)


def _score_of(first: Tensor, behind: Tensor, candidate: Tensor) -> tuple[Tensor, Tensor]:
    """Sum and mean, from the logits (vocab,) in front of a candidate and those (m, vocab) behind each of its tokens."""
    scores = torch.cat([first.unsqueeze(0), behind[:-1]]).log_softmax(-1)
    chosen = _picked(scores, candidate)
    return chosen.sum(), chosen.mean()


def _read(model: Any, tokens: Tensor, **rest: Any) -> Any:
    with torch.no_grad():
        return model(tokens, **rest)


def _gathered(pairs: Any) -> tuple[Tensor, Tensor]:
    sums, means = zip(*pairs, strict=True)
    return torch.stack(sums), torch.stack(means)


@cache.misconception(
    "gives one cache to all candidates, so that each sees those before it",
    hint="Print get_seq_length() before each candidate. The model writes into the cache that it is given: into whose?",
)
def _(model, prompt, candidates):
    read = _read(model, prompt.unsqueeze(0), use_cache=True)
    first, kept = read.logits[0, -1], read.past_key_values
    return _gathered(
        _score_of(first, _read(model, one.unsqueeze(0), past_key_values=kept).logits[0], one) for one in candidates
    )


@cache.misconception(
    "starts the positions again behind the prompt",
    hint="Counted from the prompt's start, at which position does the first token of a candidate stand?",
)
def _(model, prompt, candidates):
    read = _read(model, prompt.unsqueeze(0), use_cache=True)
    pairs = []
    for one in candidates:
        behind = _read(
            model,
            one.unsqueeze(0),
            past_key_values=copy.deepcopy(read.past_key_values),
            position_ids=torch.arange(len(one), device=one.device).unsqueeze(0),
        )
        pairs.append(_score_of(read.logits[0, -1], behind.logits[0], one))
    return _gathered(pairs)


_AGAIN = "reads the prompt again for every candidate"
_AGAIN_HINT = (
    "The scores are right, but how many tokens of the prompt were read, in all rows? What is the cache there for?"
)


@cache.misconception(_AGAIN, hint=_AGAIN_HINT)
def _(model, prompt, candidates):
    pairs = []
    for one in candidates:
        logits = _read(model, torch.cat([prompt, one]).unsqueeze(0)).logits[0]
        pairs.append(_score_of(logits[len(prompt) - 1], logits[len(prompt) :], one))
    return _gathered(pairs)


@cache.misconception(_AGAIN, hint=_AGAIN_HINT)  # in the rows of one batch
def _(model, prompt, candidates):
    padded = pad_sequence(candidates, batch_first=True)
    read = _read(model, prompt.expand(len(candidates), -1), use_cache=True)
    behind = _read(model, padded, past_key_values=read.past_key_values).logits
    return _gathered(
        _score_of(first, after[: len(one)], one)
        for first, after, one in zip(read.logits[:, -1], behind, candidates, strict=True)
    )


@cache.misconception(
    "leaves out the candidate's first token",
    hint="The first token is predicted before any of the candidate is read. By which logits, and did you keep them?",
)
def _(model, prompt, candidates):
    sums = []
    kept = _read(model, prompt.unsqueeze(0), use_cache=True).past_key_values
    for one in candidates:
        behind = _read(model, one.unsqueeze(0), past_key_values=copy.deepcopy(kept)).logits[0]
        sums.append(_picked(behind[:-1].log_softmax(-1), one[1:]).sum())
    sums = torch.stack(sums)
    return sums, sums / torch.tensor([len(one) for one in candidates], device=sums.device)


@cache.misconception(
    "does not shift: asks each position for the token it was given",
    hint="The logits behind a token predict the next one. Which logits predict the candidate's first token?",
)
def _(model, prompt, candidates):
    pairs = []
    kept = _read(model, prompt.unsqueeze(0), use_cache=True).past_key_values
    for one in candidates:
        chosen = _picked(
            _read(model, one.unsqueeze(0), past_key_values=copy.deepcopy(kept)).logits[0].log_softmax(-1), one
        )
        pairs.append((chosen.sum(), chosen.mean()))
    return _gathered(pairs)


_WITHOUT = "reads the candidates without the prompt behind them"
_WITHOUT_HINT = (
    "The first token's score knows the prompt. Do the later ones? Print what the model gets as past_key_values."
)


@cache.misconception(_WITHOUT, hint=_WITHOUT_HINT)
def _(model, prompt, candidates):
    first = _read(model, prompt.unsqueeze(0)).logits[0, -1]
    return _gathered(_score_of(first, _read(model, one.unsqueeze(0)).logits[0], one) for one in candidates)


@cache.misconception(_WITHOUT, hint=_WITHOUT_HINT)  # batch_repeat_interleave returns None
def _(model, prompt, candidates):
    read = _read(model, prompt.unsqueeze(0), use_cache=True)
    kept = read.past_key_values.batch_repeat_interleave(len(candidates))
    behind = _read(model, pad_sequence(candidates, batch_first=True), past_key_values=kept).logits
    return _gathered(_score_of(read.logits[0, -1], after, one) for after, one in _cut(behind, candidates))


def _cut(behind: Tensor, candidates: list[Tensor]) -> list[tuple[Tensor, Tensor]]:
    """The logits behind each candidate without those behind its padding, and the candidate."""
    return [(after[: len(one)], one) for after, one in zip(behind, candidates, strict=True)]


@cache.misconception(
    "gives a cache of one row to a batch",
    hint="You read the prompt as one row. What did the statement offer for a batch of candidates behind it?",
)
def _(model, prompt, candidates):
    read = _read(model, prompt.unsqueeze(0), use_cache=True)
    padded = pad_sequence(candidates, batch_first=True)
    behind = _read(model, padded, past_key_values=read.past_key_values).logits
    return _gathered(_score_of(read.logits[0, -1], after, one) for after, one in _cut(behind, candidates))


@cache.misconception(
    "copies a cache that gradients hang on",
    hint="torch recorded how the cache was made, and copies no such tensor. Nothing is trained here: which context "
    "keeps torch from recording what a gradient needs?",
)
def _(model, prompt, candidates):
    read = model(prompt.unsqueeze(0), use_cache=True)
    return _gathered(
        _score_of(
            read.logits[0, -1],
            model(one.unsqueeze(0), past_key_values=copy.deepcopy(read.past_key_values)).logits[0],
            one,
        )
        for one in candidates
    )


@cache.misconception(
    "adds up logits, not log-probabilities",
    hint="A logit says how a word compares with others. What turns a position's logits into log-probabilities?",
)
def _(model, prompt, candidates):
    read = _read(model, prompt.unsqueeze(0), use_cache=True)
    pairs = []
    for one in candidates:
        behind = _read(model, one.unsqueeze(0), past_key_values=copy.deepcopy(read.past_key_values)).logits[0]
        chosen = _picked(torch.cat([read.logits[0, -1:], behind[:-1]]), one)
        pairs.append((chosen.sum(), chosen.mean()))
    return _gathered(pairs)


@cache.misconception(
    "counts the padding of a batch",
    hint="The candidates were filled up to one length. Up to where does each of them count?",
)
def _(model, prompt, candidates):
    read = _read(model, prompt.unsqueeze(0), use_cache=True)
    read.past_key_values.batch_repeat_interleave(len(candidates))
    padded = pad_sequence(candidates, batch_first=True)
    behind = _read(model, padded, past_key_values=read.past_key_values).logits
    return _gathered(_score_of(read.logits[0, -1], after, one) for after, one in zip(behind, padded, strict=True))


@cache.misconception(
    "fills up on the left, between prompt and candidate",
    hint="A candidate's tokens see all that stands before them. What stands between the prompt and a short candidate?",
)
def _(model, prompt, candidates):
    read = _read(model, prompt.unsqueeze(0), use_cache=True)
    read.past_key_values.batch_repeat_interleave(len(candidates))
    longest = max(map(len, candidates))
    padded = torch.stack([F.pad(one, (longest - len(one), 0)) for one in candidates])
    behind = _read(model, padded, past_key_values=read.past_key_values).logits
    return _gathered(
        _score_of(read.logits[0, -1], after[-len(one) :], one) for after, one in zip(behind, candidates, strict=True)
    )


@cache.misconception(
    "crops one token too few, so that the next candidate sees it",
    hint="Print get_seq_length() before each candidate. By how many tokens had the cache grown, how many did you take?",
)
def _(model, prompt, candidates):
    read = _read(model, prompt.unsqueeze(0), use_cache=True)
    kept, pairs = read.past_key_values, []
    for one in candidates:
        pairs.append(_score_of(read.logits[0, -1], _read(model, one.unsqueeze(0), past_key_values=kept).logits[0], one))
        kept.crop(1 - len(one))
    return _gathered(pairs)


@cache.misconception(
    "reads the prompt's last token twice",
    hint="get_seq_length() says how much of the prompt was read. Which token should come next?",
)
def _(model, prompt, candidates):
    kept = _read(model, prompt.unsqueeze(0), use_cache=True).past_key_values
    pairs = []
    for one in candidates:
        whole = torch.cat([prompt[-1:], one]).unsqueeze(0)
        logits = _read(model, whole, past_key_values=copy.deepcopy(kept)).logits[0]
        pairs.append(_score_of(logits[0], logits[1:], one))
    return _gathered(pairs)


@cache.misconception(
    "gives the sum for the mean", hint="A long candidate has more factors below 1. What makes it comparable?"
)
def _(model, prompt, candidates):
    read = _read(model, prompt.unsqueeze(0), use_cache=True)
    sums = []
    for one in candidates:
        behind = _read(model, one.unsqueeze(0), past_key_values=copy.deepcopy(read.past_key_values)).logits[0]
        sums.append(_score_of(read.logits[0, -1], behind, one)[0])
    return torch.stack(sums), torch.stack(sums)


@cache.alternative("a copy of the cache for each candidate")
def _(model, prompt, candidates):
    sums, means = [], []
    with torch.no_grad():
        read = model(input_ids=prompt.unsqueeze(0), use_cache=True)
        for candidate in candidates:
            own = copy.deepcopy(read.past_key_values)
            out = model(input_ids=candidate[None], past_key_values=own, use_cache=True)
            logits = torch.cat([read.logits[0, -1:], out.logits[0, :-1]])
            picked = logits.log_softmax(-1)[range(len(candidate)), candidate]
            sums.append(picked.sum())
            means.append(picked.mean())
    return torch.stack(sums), torch.stack(means)


@cache.alternative("one cache, cropped behind each candidate, whose last token is not read")
def _(model, prompt, candidates):
    sums = torch.zeros(len(candidates), device=prompt.device)
    with torch.inference_mode():
        read = model(input_ids=prompt.view(1, -1))
        kept, first = read["past_key_values"], read["logits"][:, -1:]
        for row, candidate in enumerate(candidates):
            logits = first
            if len(candidate) > 1:
                more = model(input_ids=candidate[:-1].view(1, -1), past_key_values=kept).logits
                logits = torch.cat([first, more], dim=1)
                kept.crop(1 - len(candidate))
            sums[row] = -F.cross_entropy(logits[0], candidate, reduction="sum")
    return sums, sums / torch.tensor([len(candidate) for candidate in candidates], device=prompt.device)


@cache.alternative("all but the prompt's last token read, then a batch with positions and a mask")
def _(model, prompt, candidates):
    before = len(prompt) - 1
    with torch.no_grad():
        kept = model(input_ids=prompt[:-1].unsqueeze(0), use_cache=True, logits_to_keep=1).past_key_values
        kept.batch_repeat_interleave(len(candidates))
        tokens = pad_sequence([torch.cat([prompt[-1:], one]) for one in candidates], batch_first=True)
        lengths = torch.tensor([len(one) for one in candidates], device=prompt.device)
        place = torch.arange(tokens.shape[1], device=prompt.device).expand_as(tokens)
        real = place <= lengths[:, None]
        mask = torch.cat([real.new_ones(len(tokens), before), real], dim=1).long()
        logits = model(tokens, attention_mask=mask, position_ids=before + place, past_key_values=kept).logits
    scores = logits[:, :-1].log_softmax(-1).gather(-1, tokens[:, 1:, None])[..., 0]
    sums = (scores * real[:, 1:]).sum(1)
    return sums, sums / lengths


@cache.alternative("token by token")
def _(model, prompt, candidates):
    sums = []
    with torch.no_grad():
        read = model(prompt[None])
        for candidate in candidates:
            own, logits, total = copy.deepcopy(read[1]), read[0][0, -1], 0.0
            for token in candidate:
                total = total + logits.log_softmax(0)[token]
                out = model(token.view(1, 1), past_key_values=own)
                own, logits = out.past_key_values, out.logits[0, -1]
            sums.append(total)
    return torch.stack(sums), torch.stack([total / len(one) for total, one in zip(sums, candidates, strict=True)])
