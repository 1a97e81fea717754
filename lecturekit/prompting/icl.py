"""In-context learning: examples in the prompt, candidates scored by their likelihood, label bias calibrated away.

Slide "In-context learning: zero-shot, few-shot"; Brown et al. 2020 (GPT-3), §2.1 and §2.4, and Zhao et al. 2021
("Calibrate Before Use"). Nothing is trained: the shots are text in front of the query.

    prompt → candidate scores → (calibrated) probabilities
    build_prompt, draw_shots   score_candidates, score_cached, score_prompts   calibrate

A prompt ends without a space ("Output:") and a candidate begins with one (" positive"), because SmolLM2's words carry
the space in front of them: " positive" is one token, "positive" behind a lone space are others, which the model has
hardly ever seen there. ``encode`` keeps to that.
"""

from __future__ import annotations

import copy
import random
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from lecturekit.arguments import require_integers, require_positive_int, require_tensor, widened
from lecturekit.prompting.shared_prefix import shared_prefix

if TYPE_CHECKING:
    from transformers import Cache, PreTrainedModel, PreTrainedTokenizerBase

Row = TypeVar("Row", bound=Sequence[Any])
"""(x, label): an input and its output. Anything indexable with these two in front."""


def build_prompt(
    instruction: str, shots: Sequence[Sequence[str]], query: str, labels: Sequence[str] = ("Input", "Output")
) -> str:
    """A zero-shot or few-shot prompt: the instruction, the shots in their order, then the query without its output.

    instruction: "" for none; else it stands first, followed by a blank line.   shots: pairs (x, y), none for zero-shot;
    each gives "Input: x\\nOutput: y" and a blank line.   query: the x to answer.   labels: the two words in front of
    the colons. The prompt ends in "Output:", with no space and no newline behind it: the space belongs to the answer.

    >>> build_prompt("Say the opposite.", [("hot", "cold")], "big")
    'Say the opposite.\\n\\nInput: hot\\nOutput: cold\\n\\nInput: big\\nOutput:'

    Brown et al. 2020, figure 2.1. Raises TypeError when instruction or query is no str, ValueError when a shot or
    labels is not two texts.
    """
    for name, text in (("instruction", instruction), ("query", query)):
        if not isinstance(text, str):
            raise TypeError(f"{name} must be a str, got {type(text).__name__}")
    for name, pair in [("labels", labels), *((f"shots[{i}]", shot) for i, shot in enumerate(shots))]:
        if isinstance(pair, str) or len(pair) != 2 or not all(isinstance(part, str) for part in pair):
            raise ValueError(f"{name} must be two texts, got {pair!r}")
    first, second = labels
    parts = [instruction] if instruction else []
    parts += [f"{first}: {x}\n{second}: {y}" for x, y in shots]
    return "\n\n".join([*parts, f"{first}: {query}\n{second}:"])


def draw_shots(rows: Sequence[Row], k: int, query: str, seed: int) -> list[Row]:
    """k of the rows to show before a query: not the query itself, labels balanced, in random order.

    rows: pairs (x, label), left as they are.   k: 0 or more.   query: the x that will be asked; rows with the same x
    are never drawn, whatever their label.   seed: the same seed draws the same shots in the same order, another seed
    others. The counts of the labels differ by at most 1, unless a label has too few rows; then all of its rows are
    drawn and the others share the rest. Labels that are all different (antonyms, capitals) make it a plain draw.
    Python's global random state is neither used nor changed.

    Raises ValueError when k is negative or larger than the number of rows left without the query.
    """
    if isinstance(k, bool) or not isinstance(k, int):
        raise TypeError(f"k must be an int, got {type(k).__name__}")
    source = random.Random(seed)
    by_label: dict[Any, list[Row]] = {}
    for row in rows:
        if row[0] != query:
            by_label.setdefault(row[1], []).append(row)
    left = sum(map(len, by_label.values()))
    if not 0 <= k <= left:
        raise ValueError(f"k must be between 0 and {left}, the number of rows that are not the query, got {k}")
    piles = list(by_label.values())
    for pile in piles:
        source.shuffle(pile)
    source.shuffle(piles)  # which label has one row more than the others is left to chance too
    shots: list[Row] = []
    while len(shots) < k:
        shots += [pile.pop() for pile in piles if pile][: k - len(shots)]
    source.shuffle(shots)
    return shots


def score_candidates(logits: Tensor, tokens: Tensor, prompt_length: int, lengths: Tensor) -> tuple[Tensor, Tensor]:
    """Log-probability of each candidate given the prompt, in nats: the sum over its tokens, and the mean of one token.

    logits: (n, seq, vocab), where position t predicts token t + 1.   tokens: (n, seq) integers, in each row the prompt,
    one candidate and padding on the right (any value).   prompt_length: tokens of the prompt, the same in all rows.
    lengths: (n,) integers, tokens of each row without its padding.   →   sums (n,) and means (n,), float32 or wider.
    Only the candidate's own tokens count: positions prompt_length … lengths − 1, predicted one position earlier.
    The sum is log p(candidate | prompt); it falls with every token, so candidates of different length are compared by
    the mean, sum / (lengths − prompt_length). Brown et al. 2020, §2.4.

    Raises TypeError for wrong types or dtypes, ValueError for shapes that do not match, a row without a candidate,
    candidate tokens outside the vocabulary, and logits from which no log-probability follows.
    """
    require_tensor("logits", logits, ndim=3)
    require_integers("tokens", tokens, ndim=2)
    require_integers("lengths", lengths, ndim=1)
    require_positive_int("prompt_length", prompt_length)
    n, seq, vocab = logits.shape
    if tokens.shape != (n, seq):
        raise ValueError(f"tokens must be (n, seq) = {(n, seq)} to match logits, got {tuple(tokens.shape)}")
    if lengths.shape != (n,):
        raise ValueError(f"lengths must be (n,) = ({n},) to match logits, got {tuple(lengths.shape)}")
    if bool(((lengths <= prompt_length) | (lengths > seq)).any()):
        raise ValueError(
            f"lengths must be in prompt_length + 1 … seq = {prompt_length + 1} … {seq}, so that every row holds at "
            f"least one token of its candidate, got {lengths.tolist()}"
        )
    place = torch.arange(prompt_length, seq, device=tokens.device)
    mask = place < lengths.unsqueeze(1)  # (n, seq − prompt_length): the candidate's tokens
    candidate = tokens[:, prompt_length:].long().masked_fill(~mask, 0)
    if bool(((candidate < 0) | (candidate >= vocab)).any()):
        raise ValueError(f"tokens must be in 0..{vocab - 1} where a candidate stands, got one outside")
    sums = _sum_where(mask, logits[:, prompt_length - 1 : -1], candidate)
    if bool(sums.isnan().any()):
        raise ValueError("logits must be free of NaN and +infinity where they predict a candidate")
    return sums, sums / (lengths - prompt_length)


@torch.no_grad()
def score_cached(model: PreTrainedModel, prompt: Tensor, candidates: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """As score_candidates, but the prompt is read once: its keys and values are kept, each candidate is read behind.

    model: a causal language model with transformers' interface: model(input_ids=…, past_key_values=…, use_cache=True)
    returns .logits and .past_key_values.   prompt: (p,) token ids.   candidates: n of (m_i,) token ids.   →   sums
    (n,), means (n,), as by score_candidates.
    A cache is changed by every pass that it is given to: it has then read those tokens too. So the candidates are the
    rows of one batch, each behind a copy of the prompt's keys and values. Their positions go on where the prompt ends,
    which transformers counts from the cache. Padding on the right needs no attention mask: no real token looks ahead.
    Tokens read: p + n · (longest candidate), where reading every row whole takes n · (p + longest). With p = 200 and
    n = 2 that is half; the gain grows with n.
    Raises ValueError when the prompt or a candidate is empty or there are no candidates.
    """
    require_integers("prompt", prompt, ndim=1)
    lengths = _lengths("candidates", candidates)
    n = len(candidates)
    read = model(input_ids=prompt.unsqueeze(0), use_cache=True)
    cache = read.past_key_values
    cache.batch_repeat_interleave(n)
    padded = pad_sequence(list(candidates), batch_first=True)  # (n, longest)
    behind = model(input_ids=padded, past_key_values=cache, use_cache=True).logits  # (n, longest, vocab)
    # The prompt's last token predicts the first one of every candidate: a prompt of length 1 is all that is left.
    logits = torch.cat([read.logits[:, -1:].expand(n, -1, -1), behind], dim=1)
    tokens = torch.cat([prompt[-1:].expand(n, 1), padded], dim=1)
    return score_candidates(logits, tokens, 1, 1 + lengths)


def calibrate(scores: Tensor, content_free: Tensor) -> Tensor:
    """Contextual calibration: take out of the labels' scores what the prompt says before any query is put to it.

    scores: (n, labels) log-probabilities of the labels for n queries.   content_free: (labels,) log-probabilities of
    the same labels, behind the same shots, for a query that says nothing ("N/A").   →   (n, labels) probabilities,
    each row adding up to 1: p(label) / p_cf(label), normalised, which is softmax(scores − content_free). The
    content-free query itself comes out uniform. Adding a constant to all scores of a query changes nothing, so they
    need not be normalised over the labels before.
    Zhao et al. 2021, §5, with W = diag(p_cf)⁻¹ and b = 0. There a softmax stands around W p; it makes the
    probabilities flatter and leaves their order, and so the answer, as it is. Here the ratios are normalised instead.
    Float32 or wider. Raises TypeError for wrong types, ValueError for shapes that do not match, NaN or infinity.
    """
    require_tensor("scores", scores, ndim=2, finite=True)
    require_tensor("content_free", content_free, ndim=1, finite=True)
    if scores.shape[1] != len(content_free):
        raise ValueError(
            f"content_free must be (labels,) = ({scores.shape[1]},) to match scores, got {tuple(content_free.shape)}"
        )
    return torch.softmax(widened(scores) - widened(content_free), dim=1)


# ---------------------------------------------------------------- the same with text, for many queries behind few shots


def encode(tokenizer: PreTrainedTokenizerBase, prompt: str, candidates: Sequence[str]) -> tuple[Tensor, list[Tensor]]:
    """The token ids of a prompt (p,), and of each candidate (m_i,) as it stands behind it, with its space in front.

    The candidate's ids are what prompt + " " + candidate has beyond the prompt's own, so both together are the ids of
    the whole text. A tokenizer that merges across the boundary makes that impossible; then the error says so.
    Raises ValueError when the prompt or a candidate is empty, the prompt ends or a candidate begins in white space
    (the space would be a token of its own, or stand there twice), or the boundary falls inside a token.
    """
    if not candidates or isinstance(candidates, str):
        raise ValueError(f"candidates must be a list of at least one text, got {candidates!r}")
    if not prompt or prompt[-1].isspace():
        raise ValueError(f"prompt must end in a visible character; the space belongs to the candidate, got {prompt!r}")
    front = list(tokenizer(prompt).input_ids)
    parts = []
    for candidate in candidates:
        if not candidate or candidate[0].isspace():
            raise ValueError(f"a candidate must begin with a visible character, its space is added, got {candidate!r}")
        whole = list(tokenizer(f"{prompt} {candidate}").input_ids)
        if whole[: len(front)] != front or len(whole) == len(front):
            raise ValueError(
                f"this tokenizer joins the end of the prompt, {prompt[-10:]!r}, and {candidate!r} in one token; end "
                "the prompt otherwise, for example in a colon"
            )
        parts.append(torch.tensor(whole[len(front) :]))
    return torch.tensor(front), parts


@torch.no_grad()
def read_shots(model: PreTrainedModel, ids: Tensor) -> Cache:
    """The keys and values of a text that many queries will stand behind: read once, (tokens,) ids → a cache of one row.

    No ids give an empty cache. Give it to score_behind, which leaves it as it is.
    """
    from transformers import DynamicCache

    cache = DynamicCache(config=model.config)
    if len(ids):
        model(input_ids=ids.to(model.device).unsqueeze(0), past_key_values=cache, use_cache=True, logits_to_keep=1)
    return cache


@torch.no_grad()
def score_behind(
    model: PreTrainedModel,
    cache: Cache,
    queries: Sequence[Tensor],
    candidates: Sequence[Tensor] | Sequence[Sequence[Tensor]],
    rows: int = 16,
) -> tuple[Tensor, Tensor]:
    """Every candidate behind every query behind the cached shots → sums and means, both (queries, candidates).

    cache: of read_shots, one row; it is held once and never changed.   queries: (q_i,) token ids, at least one each.
    candidates: (m_j,) token ids, the same for all queries, or such a list for each query, all with as many candidates.
    rows: how many queries, or queries with a candidate, are read at a time.
    Sums and means as by score_candidates, in float32, on the model's device.
    A query is read once; its last position scores the first tokens of all its candidates. Of a candidate only the
    tokens but the last are read, since nothing is asked of the last one's prediction: one of one token costs nothing.
    Queries are padded on the right; a mask hides the padding from the candidates, whose positions go on where their
    query ends. Queries of like length go together.
    Raises ValueError when a query or candidate is empty, there are none, or their numbers do not match.
    """
    from transformers import DynamicCache

    require_positive_int("rows", rows)
    asked = _lengths("queries", queries).to(model.device)
    own: list[Sequence[Tensor]] = _for_each(queries, candidates)
    lengths = torch.stack([_lengths("candidates", some) for some in own]).to(model.device)  # (queries, candidates)
    firsts = torch.stack([torch.stack([one[0] for one in some]) for some in own]).to(model.device)
    sums = torch.zeros(lengths.shape, device=model.device)
    begin = cache.get_seq_length()
    with shared_prefix(model, cache):
        for batch in asked.argsort(stable=True).split(rows):
            numbers = batch.tolist()
            ids = pad_sequence([queries[number] for number in numbers], batch_first=True).to(model.device)
            place = torch.arange(ids.shape[1], device=model.device)
            seen = (place < asked[batch].unsqueeze(1)).long()
            read = DynamicCache(config=model.config)
            ends, which_end = torch.unique(asked[batch] - 1, return_inverse=True)
            logits = model(
                input_ids=ids,
                attention_mask=seen,
                position_ids=begin + place.expand_as(ids),
                past_key_values=read,
                use_cache=True,
                logits_to_keep=ends,
            ).logits
            last = logits[torch.arange(len(batch), device=model.device), which_end]
            found = widened(last).log_softmax(dim=-1).gather(1, firsts[batch])  # (batch, candidates)
            pairs = (lengths[batch] > 1).nonzero()  # (which of the batch, which candidate)
            pairs = pairs[lengths[batch][*pairs.unbind(1)].argsort(stable=True)]  # like lengths: little padding
            for which, what in (part.unbind(1) for part in pairs.split(rows) if len(part)):
                texts = [own[numbers[i]][j] for i, j in zip(which.tolist(), what.tolist(), strict=True)]
                tokens = pad_sequence(texts, batch_first=True).to(model.device)  # (rows, longest)
                behind = torch.arange(1, tokens.shape[1], device=model.device)
                logits = model(
                    input_ids=tokens[:, :-1],
                    attention_mask=torch.cat([seen[which], seen.new_ones(len(which), len(behind))], dim=1),
                    position_ids=begin + asked[batch][which].unsqueeze(1) + behind - 1,
                    past_key_values=_rows(read, which),
                    use_cache=True,
                ).logits
                mask = behind < lengths[batch][which, what].unsqueeze(1)
                found[which, what] += _sum_where(mask, logits, tokens[:, 1:])
            sums[batch] = found.to(sums.dtype)
    return sums, sums / lengths


def score_prompts(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[str],
    candidates: Sequence[str] | Sequence[Sequence[str]],
    rows: int = 16,
) -> tuple[Tensor, Tensor]:
    """Every candidate behind every prompt, in text → sums and means, both (prompts, candidates).

    candidates: the same for all prompts, or a list for each. What the prompts have in common at their beginning,
    instruction and shots, is read once for all of them. It is looked for among the token ids of the whole prompts: the
    shots' text alone may end in other tokens ("\\n\\n" is one token at the end of a text and two in front of a word).
    Arguments and errors as for encode and score_behind.
    """
    if isinstance(prompts, str) or not prompts:
        raise ValueError("prompts must be a list of at least one text")
    texts = _for_each(prompts, candidates)
    words = list(dict.fromkeys(text for some in texts for text in some))
    # A candidate's tokens depend on what stands right before them, so looking once serves all prompts that end alike.
    first, endings = encode(tokenizer, prompts[0], words)
    ids = [first, *(torch.tensor(tokenizer(prompt).input_ids, dtype=torch.long) for prompt in prompts[1:])]
    if any(not len(one) or one[-1] != first[-1] for one in ids) or any(prompt[-1:].isspace() for prompt in prompts):
        raise ValueError("all prompts must end in the same word and no white space, such as 'Output:'")
    shared = _common_prefix(ids)
    cache = read_shots(model, first[:shared])
    tokens = dict(zip(words, endings, strict=True))
    return score_behind(
        model, cache, [one[shared:] for one in ids], [[tokens[text] for text in some] for some in texts], rows
    )


def _for_each(queries: Sequence[Any], candidates: Sequence[Any]) -> list[Any]:
    """A list of candidates for each query, also where one list was given for all."""
    if isinstance(candidates, str) or not len(candidates):
        raise ValueError("candidates must not be empty, nor one text")
    if isinstance(candidates[0], (str, Tensor)):
        return [candidates] * len(queries)
    if len(candidates) != len(queries) or len({len(some) for some in candidates}) > 1:
        raise ValueError(
            f"candidates must be one list for all, or {len(queries)} lists of one length, one for each query; got "
            f"{len(candidates)} lists of {sorted({len(some) for some in candidates})}"
        )
    return list(candidates)


def _sum_where(mask: Tensor, logits: Tensor, tokens: Tensor) -> Tensor:
    """logits (n, t, vocab) that predict tokens (n, t) → (n,): their log-probabilities, added up where mask is true."""
    scores = widened(logits).log_softmax(dim=-1)
    return torch.where(mask, scores.gather(-1, tokens.unsqueeze(-1)).squeeze(-1), 0.0).sum(dim=1)


def _common_prefix(ids: Sequence[Tensor]) -> int:
    """How many tokens all begin with, leaving at least one of each."""
    shortest = min(map(len, ids)) - 1
    table = torch.stack([one[:shortest] for one in ids])  # (n, shortest)
    differs = (table != table[0]).any(dim=0).nonzero()
    return int(differs[0]) if len(differs) else shortest


def _rows(cache: Cache, which: Tensor) -> Cache:
    """A new cache of these rows of another one, which stays as it is."""
    chosen = copy.deepcopy(cache)
    chosen.batch_select_indices(which)
    return chosen


def _lengths(name: str, texts: Sequence[Tensor]) -> Tensor:
    """How many tokens each has, on their device. Raises what require_integers raises, and ValueError for no texts."""
    if not len(texts):
        raise ValueError(f"{name} must not be empty")
    for number, ids in enumerate(texts):
        require_integers(f"{name}[{number}]", ids, ndim=1)
    return torch.tensor([len(ids) for ids in texts], device=texts[0].device)
