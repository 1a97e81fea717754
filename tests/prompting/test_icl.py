"""In-context learning against its definitions, on a random Llama, and with the tokenizer and weights of SmolLM2."""

import copy
import math
from collections import Counter

import pytest
import torch
from torch.nn.functional import log_softmax

from lecturekit.checking import evaluate
from lecturekit.checking.question import get
from lecturekit.prompting import icl
from lecturekit.prompting.icl import build_prompt, calibrate, draw_shots, score_cached, score_candidates

SHOTS = [("hot", "cold"), ("up", "down")]
ROWS = [(f"word {i}", "ABC"[i % 3]) for i in range(12)]


# ---------------------------------------------------------------- prompts


def test_a_few_shot_prompt_character_by_character():
    assert build_prompt("Say the opposite.", SHOTS, "big") == (
        "Say the opposite.\n\nInput: hot\nOutput: cold\n\nInput: up\nOutput: down\n\nInput: big\nOutput:"
    )


def test_without_shots_and_without_instruction_nothing_is_left_of_them():
    assert build_prompt("", [], "big") == "Input: big\nOutput:"
    assert build_prompt("Say the opposite.", [], "big") == "Say the opposite.\n\nInput: big\nOutput:"
    assert build_prompt("", SHOTS[:1], "big", ("Q", "A")) == "Q: hot\nA: cold\n\nQ: big\nA:"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((None, [], "big"), "instruction must be a str, got NoneType"),
        (("", [], 3), "query must be a str, got int"),
        (("", ["ab"], "big"), r"shots\[0\] must be two texts, got 'ab'"),
        (("", [("hot", 1)], "big"), r"shots\[0\] must be two texts"),
        (("", [], "big", ("Q",)), "labels must be two texts"),
    ],
)
def test_a_prompt_is_made_of_texts(arguments, message):
    with pytest.raises((TypeError, ValueError), match=message):
        build_prompt(*arguments)


# ---------------------------------------------------------------- shots


@pytest.mark.parametrize("k", range(12))
def test_shots_are_different_rows_with_labels_as_even_as_they_can_be(k):
    shots = draw_shots(ROWS, k, "word 0", seed=3)
    assert len(shots) == len(set(shots)) == k
    assert set(shots) <= set(ROWS[1:])
    counts = Counter(label for _, label in shots)
    spread = [counts[label] for label in "ABC"]
    assert max(spread) - min(spread) <= 1 or counts["A"] == 3  # the query is one of the four rows labelled A


def test_a_label_with_few_rows_gives_all_it_has():
    rows = [("a", "rare"), *[(f"b{i}", "common") for i in range(9)]]
    assert Counter(label for _, label in draw_shots(rows, 6, "", 0)) == {"common": 5, "rare": 1}


def test_the_query_is_never_a_shot_whatever_its_label():
    rows = [("same", "A"), ("same", "B"), *ROWS]
    for seed in range(50):
        assert "same" not in [x for x, _ in draw_shots(rows, 12, "same", seed)]
    with pytest.raises(ValueError, match="k must be between 0 and 12, the number of rows that are not the query"):
        draw_shots(rows, 13, "same", 0)


def test_one_seed_draws_the_same_shots_and_leaves_everything_else_alone():
    import random

    rows = copy.deepcopy(ROWS)
    state = random.getstate()
    first = draw_shots(rows, 6, "", 1)
    random.random()
    assert first == draw_shots(rows, 6, "", 1)
    assert rows == ROWS
    random.setstate(state)
    draw_shots(rows, 6, "", 1)
    assert random.getstate() == state


def test_over_many_seeds_every_row_every_order_and_every_odd_label_comes():
    drawn = [draw_shots(ROWS, 4, "word 0", seed) for seed in range(300)]
    assert set().union(*drawn) == set(ROWS[1:])
    # the label that comes twice, and the place where it comes first
    odd = Counter(Counter(label for _, label in shots).most_common(1)[0][0] for shots in drawn)
    assert set(odd) == set("ABC")
    # 36 orders of labels with one of the three twice; the probability that one of them never comes is below 1 %
    assert len({tuple(label for _, label in shots) for shots in drawn}) == 36


# ---------------------------------------------------------------- scores


def batch_of(prompt=3, lengths=(1, 4, 2), vocab=11, dtype=torch.float32):
    lengths = torch.tensor(lengths) + prompt
    seq = int(lengths.max()) + 2
    tokens = torch.randint(0, vocab, (len(lengths), seq))
    tokens[:, :prompt] = tokens[0, :prompt]
    return (3 * torch.randn(len(lengths), seq, vocab)).to(dtype), tokens, prompt, lengths


def test_scores_token_by_token():
    logits, tokens, prompt, lengths = batch_of()
    sums, means = score_candidates(logits, tokens, prompt, lengths)
    for row, length in enumerate(lengths.tolist()):
        total = 0.0
        for place in range(prompt, length):
            scores = logits[row, place - 1].tolist()  # position place - 1 predicts the token at place
            total += scores[tokens[row, place]] - math.log(sum(map(math.exp, scores)))
        assert sums[row].item() == pytest.approx(total, abs=1e-5)  # at most 4 float32 terms of order 10
        assert means[row].item() == pytest.approx(total / (length - prompt), abs=1e-5)


def test_neither_prompt_nor_padding_counts():
    logits, tokens, prompt, lengths = batch_of()
    expected = score_candidates(logits, tokens, prompt, lengths)
    noise, others = logits.clone(), tokens.clone()
    noise[:, : prompt - 1] = math.nan
    others[:, :prompt] = -5
    for row, length in enumerate(lengths.tolist()):
        noise[row, length - 1 :] = math.nan  # what the last token predicts, and padding
        others[row, length:] = -100
    for got, want in zip(score_candidates(noise, others, prompt, lengths), expected, strict=True):
        assert torch.equal(got, want)


def test_the_probabilities_of_all_candidates_of_two_tokens_add_up_to_one():
    vocab = 4
    tokens = torch.cartesian_prod(torch.zeros(1, dtype=torch.long), torch.arange(vocab), torch.arange(vocab))
    table = torch.randn(vocab, vocab, dtype=torch.float64)  # a model of pairs
    sums, _ = score_candidates(table[tokens], tokens, 1, torch.full((len(tokens),), 3))
    assert sums.exp().sum().item() == pytest.approx(1, abs=1e-12)


def test_half_precision_is_added_up_in_float32():
    logits, tokens, prompt, lengths = batch_of(dtype=torch.bfloat16)
    for got, want in zip(
        score_candidates(logits, tokens, prompt, lengths),
        score_candidates(logits.float(), tokens, prompt, lengths),
        strict=True,
    ):
        assert got.dtype == torch.float32
        assert torch.equal(got, want)


def test_what_cannot_be_scored_is_said():
    logits, tokens, prompt, lengths = batch_of()
    with pytest.raises(ValueError, match="lengths must be in prompt_length \\+ 1 … seq = 4 … 9"):
        score_candidates(logits, tokens, prompt, lengths.clamp(max=3))
    with pytest.raises(ValueError, match="lengths must be \\(n,\\)"):
        score_candidates(logits, tokens, prompt, lengths[:2])
    with pytest.raises(ValueError, match="tokens must be \\(n, seq\\)"):
        score_candidates(logits, tokens[:, :-1], prompt, lengths)
    with pytest.raises(ValueError, match="tokens must be in 0..10 where a candidate stands"):
        score_candidates(logits, tokens + 11, prompt, lengths)
    with pytest.raises(ValueError, match="logits must be free of NaN"):
        score_candidates(logits * math.nan, tokens, prompt, lengths)
    with pytest.raises(TypeError, match="tokens must have an integer dtype"):
        score_candidates(logits, tokens.float(), prompt, lengths)


# ---------------------------------------------------------------- the cache

VOCAB = 40


@pytest.fixture(scope="module")
def llama():
    """A Llama of two layers with random weights, in float64, so that equal means equal."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(1)
    config = LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        initializer_range=0.4,
    )
    return LlamaForCausalLM(config).double().eval()


class Reading:
    """The model, and how many tokens it was given, padding and copies included."""

    def __init__(self, model):
        self.model, self.config, self.device, self.tokens = model, model.config, model.device, 0
        self.set_attn_implementation = model.set_attn_implementation

    def __call__(self, input_ids, **rest):
        self.tokens += input_ids.numel()
        return self.model(input_ids=input_ids, **rest)


def ids(*lengths):
    return [torch.randint(0, VOCAB, (length,)) for length in lengths]


@torch.no_grad()
def by_itself(model, prompt, candidate):
    """Sum and mean of one candidate, its whole text read without any cache."""
    whole = torch.cat([prompt, candidate]).unsqueeze(0)
    scores = log_softmax(model(input_ids=whole, use_cache=False).logits[0].double(), dim=-1)
    places = range(len(prompt), whole.shape[1])
    terms = torch.stack([scores[place - 1, whole[0, place]] for place in places])
    return terms.sum(), terms.mean()


def test_reading_the_prompt_once_changes_no_score(llama):
    (prompt,), candidates = ids(17), ids(1, 3, 2, 5)
    sums, means = score_cached(llama, prompt, candidates)
    for row, candidate in enumerate(candidates):
        total, mean = by_itself(llama, prompt, candidate)
        torch.testing.assert_close(sums[row], total, rtol=0, atol=1e-10)
        torch.testing.assert_close(means[row], mean, rtol=0, atol=1e-10)


def test_the_prompt_is_read_once_however_many_candidates_there_are(llama):
    (prompt,), candidates = ids(17), ids(1, 3, 2, 5)
    reading = Reading(llama)
    score_cached(reading, prompt, candidates)
    assert reading.tokens == 17 + 4 * 5


def test_many_queries_behind_one_block_of_shots_score_as_each_by_itself(llama):
    (shots,), queries, candidates = ids(23), ids(3, 5, 3, 1, 5, 3), ids(2, 1, 4, 1, 3)
    cache = icl.read_shots(llama, shots)
    before = [(layer.keys.clone(), layer.values.clone()) for layer in cache.layers]
    for rows in (1, 4, 100):
        sums, means = icl.score_behind(llama, cache, queries, candidates, rows)
        for i, query in enumerate(queries):
            for j, candidate in enumerate(candidates):
                total, mean = by_itself(llama, torch.cat([shots, query]), candidate)
                torch.testing.assert_close(sums[i, j].double(), total, rtol=1e-6, atol=0)  # the sums are float32
                torch.testing.assert_close(means[i, j].double(), mean, rtol=1e-6, atol=0)
    for layer, (keys, values) in zip(cache.layers, before, strict=True):
        assert torch.equal(layer.keys, keys)
        assert torch.equal(layer.values, values)


def test_each_query_may_have_candidates_of_its_own(llama):
    (shots,), queries = ids(23), ids(3, 5, 3)
    own = [ids(2, 1, 3), ids(1, 1, 1), ids(4, 2, 2)]
    sums, means = icl.score_behind(llama, icl.read_shots(llama, shots), queries, own, rows=2)
    for i, query in enumerate(queries):
        for j, candidate in enumerate(own[i]):
            total, mean = by_itself(llama, torch.cat([shots, query]), candidate)
            torch.testing.assert_close(sums[i, j].double(), total, rtol=1e-6, atol=0)
            torch.testing.assert_close(means[i, j].double(), mean, rtol=1e-6, atol=0)
    for wrong in (own[:2], [*own[:2], own[2][:2]]):
        with pytest.raises(ValueError, match="candidates must be one list for all, or 3 lists of one length"):
            icl.score_behind(llama, icl.read_shots(llama, shots), queries, wrong)


def test_shots_and_queries_are_read_once_and_candidates_of_one_token_not_at_all(llama):
    (shots,), queries = ids(23), ids(3, 5, 3)
    reading = Reading(llama)
    cache = icl.read_shots(reading, shots)
    icl.score_behind(reading, cache, queries, ids(1, 1, 1))
    assert reading.tokens == 23 + 3 * 5  # three queries, padded to the longest
    icl.score_behind(reading, cache, queries, ids(1, 3))
    assert reading.tokens == 23 + 2 * 3 * 5 + 3 * 2


def test_no_shots_are_an_empty_cache(llama):
    queries, candidates = ids(3, 4), ids(2, 1)
    sums, _ = icl.score_behind(llama, icl.read_shots(llama, queries[0][:0]), queries, candidates)
    for i, query in enumerate(queries):
        for j, candidate in enumerate(candidates):
            total, _ = by_itself(llama, query, candidate)
            torch.testing.assert_close(sums[i, j].double(), total, rtol=1e-6, atol=0)


def test_no_candidates_no_queries_and_empty_ones_are_refused(llama):
    (prompt,) = ids(4)
    cache = icl.read_shots(llama, prompt)
    with pytest.raises(ValueError, match="candidates must not be empty, nor one text"):
        icl.score_behind(llama, cache, ids(1), "text")
    for call in (
        lambda: score_cached(llama, prompt, []),
        lambda: score_cached(llama, prompt[:0], ids(1)),
        lambda: score_cached(llama, prompt, ids(2, 0)),
        lambda: icl.score_behind(llama, cache, [], ids(1)),
        lambda: icl.score_behind(llama, cache, ids(0), ids(1)),
        lambda: icl.score_behind(llama, cache, ids(1), []),
    ):
        with pytest.raises(ValueError, match="must not be empty"):
            call()


CACHE = get("icl.cache")
RIGHT = {"the oracle": CACHE.reference(), **CACHE.alternatives}


@pytest.mark.parametrize("name", RIGHT)
def test_every_right_answer_of_the_question_is_right_on_a_model_of_transformers_too(llama, name):
    (prompt,), candidates = ids(17), ids(1, 3, 2, 5)
    sums, means = RIGHT[name](llama, prompt, candidates)
    for row, candidate in enumerate(candidates):
        total, mean = by_itself(llama, prompt, candidate)
        # some answers collect in float32; sums are of the order of 20
        torch.testing.assert_close(sums[row].double(), total, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(means[row].double(), mean, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("wrong", CACHE.misconceptions, ids=lambda known: known.name[:40])
def test_what_is_wrong_in_the_question_is_wrong_or_slow_on_a_model_of_transformers_too(llama, wrong):
    (prompt,), candidates = ids(17), ids(1, 3, 2, 5)
    reading = Reading(llama)
    if wrong.name in ("gives a cache of one row to a batch", "copies a cache that gradients hang on"):
        with pytest.raises(RuntimeError):
            wrong.candidate(lambda tokens, **rest: reading(tokens, **rest), prompt, candidates)
        return
    sums, means = wrong.candidate(lambda tokens, **rest: reading(tokens, **rest), prompt, candidates)
    expected = score_cached(llama, prompt, candidates)
    same = torch.allclose(sums, expected[0], atol=1e-3) and torch.allclose(means, expected[1], atol=1e-3)
    assert same == wrong.name.startswith("reads the prompt again")
    if same:
        assert reading.tokens >= len(candidates) * len(prompt)


def test_a_cache_of_transformers_own_works_in_the_question():
    from transformers import DynamicCache

    @torch.no_grad()
    def answer(model, prompt, candidates):
        kept = DynamicCache()
        first = model(prompt[None], past_key_values=kept, use_cache=True).logits[:, -1:]
        sums = []
        for candidate in candidates:
            logits = model(candidate[None], past_key_values=copy.deepcopy(kept), use_cache=True).logits
            scores = log_softmax(torch.cat([first, logits[:, :-1]], 1)[0], -1)
            sums.append(scores.gather(1, candidate[:, None]).sum())
        return torch.stack(sums), torch.stack(sums) / torch.tensor([len(candidate) for candidate in candidates])

    assert evaluate("icl.cache", answer, seed=1).passed


# ---------------------------------------------------------------- calibration


def test_calibration_divides_by_what_the_prompt_says_of_itself():
    scores = torch.tensor([[0.7, 0.3], [0.9, 0.1]]).log()
    result = calibrate(scores, torch.tensor([0.8, 0.2]).log())
    ratios = torch.tensor([[0.7 / 0.8, 0.3 / 0.2], [0.9 / 0.8, 0.1 / 0.2]])
    torch.testing.assert_close(result, ratios / ratios.sum(1, keepdim=True))
    assert result.argmax(1).tolist() == [1, 0]  # .7 against a bias of .8 speaks for the other label


def test_a_query_that_says_nothing_comes_out_uniform_and_a_prompt_without_bias_changes_nothing():
    scores = torch.randn(4, 3)
    torch.testing.assert_close(calibrate(scores, scores[0])[0], torch.full((3,), 1 / 3))
    torch.testing.assert_close(calibrate(scores, torch.full((3,), -7.0)), scores.softmax(1))
    torch.testing.assert_close(calibrate(scores - 200, scores[0]), calibrate(scores, scores[0]), rtol=1e-4, atol=0)


def test_calibration_refuses_what_does_not_fit():
    with pytest.raises(ValueError, match="content_free must be \\(labels,\\) = \\(3,\\)"):
        calibrate(torch.randn(4, 3), torch.randn(4))
    with pytest.raises(ValueError, match="scores must be finite"):
        calibrate(torch.full((4, 3), -math.inf), torch.randn(3))


# ---------------------------------------------------------------- the real model


@pytest.fixture(scope="module")
def smollm2():
    from lecturekit.models import load_language_model

    return load_language_model()


PROMPTS = [build_prompt("Is the review positive or negative?", SHOTS, text) for text in ("great fun", "so dull", "N/A")]


@pytest.mark.models
def test_the_space_belongs_to_the_candidate(smollm2):
    _, tokenizer = smollm2
    prompt, (one,) = icl.encode(tokenizer, "Review: great\nLabel:", ["positive"])
    assert tokenizer.decode(prompt) == "Review: great\nLabel:"
    assert tokenizer.convert_ids_to_tokens(one) == ["Ġpositive"]  # Ġ is GPT-2's sign for a space
    # a prompt that ends in a space has another token there, and what follows it is another word
    assert tokenizer("Label: positive").input_ids == tokenizer("Label:").input_ids + one.tolist()
    assert tokenizer("Label: ").input_ids + tokenizer("positive").input_ids != tokenizer("Label: positive").input_ids
    for bad_prompt, bad_candidate in (("Label: ", "positive"), ("Label:\n", "positive"), ("", "positive")):
        with pytest.raises(ValueError, match="prompt must end in a visible character"):
            icl.encode(tokenizer, bad_prompt, [bad_candidate])
    for bad in (" positive", ""):
        with pytest.raises(ValueError, match="a candidate must begin with a visible character"):
            icl.encode(tokenizer, "Label:", [bad])
    with pytest.raises(ValueError, match="candidates must be a list"):
        icl.encode(tokenizer, "Label:", "positive")


@pytest.mark.models
def test_the_shots_text_alone_ends_in_another_token_than_in_the_prompt(smollm2):
    """Why score_prompts looks for what is shared among ids, not in the text."""
    _, tokenizer = smollm2
    block = PROMPTS[0][: PROMPTS[0].rindex("Input:")]
    alone, whole = tokenizer(block).input_ids, tokenizer(PROMPTS[0]).input_ids
    assert whole[: len(alone)] != alone


@pytest.mark.models
def test_on_smollm2_the_cache_changes_no_score(smollm2):
    model, tokenizer = smollm2
    words = ["positive", "negative", "extraordinarily uninteresting"]
    sums, means = icl.score_prompts(model, tokenizer, PROMPTS, words)
    turned = icl.score_prompts(model, tokenizer, PROMPTS, [words, words[::-1], words])[0]
    torch.testing.assert_close(turned[1], sums[1].flip(0), rtol=1e-4, atol=1e-3)
    # float32 through 30 layers: logits near 30 have steps of 2e-6, and other batch shapes add up in another order
    close = {"rtol": 1e-4, "atol": 1e-3}
    for i, prompt in enumerate(PROMPTS):
        front, candidates = icl.encode(tokenizer, prompt, words)
        alone = [by_itself(model, front, candidate) for candidate in candidates]
        cached = score_cached(model, front, candidates)
        for got, want in zip((sums[i], means[i]), zip(*alone, strict=True), strict=True):
            torch.testing.assert_close(got.double(), torch.stack(want), **close)
        for got, want in zip(cached, zip(*alone, strict=True), strict=True):
            torch.testing.assert_close(got.double(), torch.stack(want), **close)
    assert len(candidates[2]) > len(candidates[0]) == 1


@pytest.mark.models
def test_prompts_that_end_differently_are_refused(smollm2):
    model, tokenizer = smollm2
    for other in ("Input: a\nAnswer", PROMPTS[0] + " ", ""):
        with pytest.raises(ValueError, match="all prompts must end in the same word"):
            icl.score_prompts(model, tokenizer, [PROMPTS[0], other], ["a"])
    with pytest.raises(ValueError, match="prompts must be a list"):
        icl.score_prompts(model, tokenizer, PROMPTS[0], ["a"])
