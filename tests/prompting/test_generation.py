"""Texts written side by side are those that each prompt gets alone, and sampling is torch's."""

import pytest
import torch

from lecturekit.prompting.generation import continue_texts, line_ends

SHOTS = "Question: 2 + 3?\nAnswer: 5.\n\nQuestion: 1 + 6?\nAnswer: 7.\n\n"
PROMPTS = [f"{SHOTS}Question: {query}?\nAnswer:" for query in ("4 + 4", "10 and 20 and 5", "3 + 1")]


@pytest.fixture(scope="module")
def smollm2():
    from lecturekit.models import load_language_model

    model, tokenizer = load_language_model(dtype=torch.float32)
    return model, tokenizer, line_ends(tokenizer)


def alone(model, tokenizer, prompt, tokens):
    """transformers' own greedy text, up to the line end."""
    ids = tokenizer(prompt, return_tensors="pt").input_ids
    whole = model.generate(ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=tokens)
    return tokenizer.decode(whole[0, ids.shape[1] :]).split("\n")[0].split("<|")[0]


@pytest.mark.models
@pytest.mark.parametrize("rows", [96, 2, 1])
def test_texts_written_side_by_side_are_those_of_each_prompt_alone(smollm2, rows):
    model, tokenizer, ends = smollm2
    others = [PROMPTS[1], "The capital of France is", PROMPTS[0]]  # nothing in common: nothing is read once
    for prompts in (PROMPTS, others):
        want = [alone(model, tokenizer, prompt, 8) for prompt in prompts]
        assert continue_texts(model, tokenizer, prompts, 8, ends, rows=rows) == want
        assert all(want)


@pytest.mark.models
def test_a_text_stops_before_its_end_token_and_at_the_most_tokens(smollm2):
    model, tokenizer, ends = smollm2
    text = continue_texts(model, tokenizer, PROMPTS[:1], 30, ends)[0]
    assert "\n" not in text
    assert len(tokenizer(text).input_ids) < 30  # a line end came first
    assert continue_texts(model, tokenizer, PROMPTS[:1], 1, ends)[0] == tokenizer.decode(tokenizer(text).input_ids[:1])
    beyond = continue_texts(model, tokenizer, PROMPTS[:1], 30, ends[:0])[0]
    assert beyond.startswith(text + "\n")  # without ends it goes on


@pytest.mark.models
def test_samples_stand_in_order_differ_and_repeat_with_the_seed(smollm2):
    model, tokenizer, ends = smollm2

    def sample(temperature, rows):
        torch.manual_seed(3)
        return continue_texts(model, tokenizer, PROMPTS[:2], 6, ends, temperature, samples=5, rows=rows)

    first = sample(1.5, 96)
    assert len(first) == 10
    assert first == sample(1.5, 96)
    assert len(set(first[:5])) > 1
    greedy = continue_texts(model, tokenizer, PROMPTS[:2], 6, ends)
    assert sample(1e-4, 96) == [greedy[0]] * 5 + [greedy[1]] * 5  # a cold sample is greedy, and stands by its prompt
    assert sample(1e-4, 5) == [greedy[0]] * 5 + [greedy[1]] * 5


@pytest.mark.models
def test_line_ends_hold_every_token_with_a_line_end(smollm2):
    _, tokenizer, ends = smollm2
    found = set(ends.tolist())
    for text in ("\n", "\n\n", " \n"):
        assert set(tokenizer(text).input_ids) & found
    assert not set(tokenizer("The answer is 12.").input_ids) & found
    assert tokenizer.eos_token_id in found


def test_bad_arguments_are_named():
    for arguments, message in (
        ({"prompts": []}, "prompts must be a list of at least one text"),
        ({"prompts": "one"}, "prompts must be a list of at least one text"),
        ({"prompts": ["a", ""]}, "none of them empty"),
        ({"tokens": 0}, "tokens must be"),
        ({"samples": 0}, "samples must be"),
        ({"temperature": -1.0}, "temperature must be 0 or more"),
    ):
        given = {"prompts": ["a"], "tokens": 1, "ends": torch.tensor([0]), **arguments}
        with pytest.raises(ValueError, match=message):
            continue_texts(None, None, **given)
