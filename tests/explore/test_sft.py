"""The figures of lab 1 say true numbers, their choices work by keyboard, and wrong answers are drawn all the same."""

import inspect
import math
import re

import pytest
import torch

from lecturekit.explore import sft, style

PIECES = ["<|im_start|>", "user", "\n", "Hello", "<|im_end|>", "\n"]
PIECES += ["<|im_start|>", "assistant", "\n", "Good", " day", "<|im_end|>", "\n"]
LEARNT = [False] * 9 + [True] * 3 + [False]
LOSSES = [math.nan, 1.0, 0.5, 7.0, 2.0, 0.1, 0.0, 0.2, 0.1, 3.0, 2.0, 1.0, 0.3]
STRIP = sft.Strip("a greeting", PIECES, LEARNT, LOSSES)


def test_a_strip_counts_the_responses_or_everything_but_the_first_token():
    assert STRIP.counted(with_prompt=False) == [9, 10, 11]
    assert STRIP.mean(with_prompt=False) == pytest.approx(2.0)
    assert STRIP.counted(with_prompt=True) == list(range(1, 13))
    assert STRIP.mean(with_prompt=True) == pytest.approx(sum(LOSSES[1:]) / 12)


def test_the_strips_words_carry_its_numbers():
    text = sft.strip_picture(STRIP).text
    assert "3 of 13" in text and "2.00 nats" in text and "'Good' 3.0" in text and "responses only" in text
    both = sft.strip_picture(STRIP, with_prompt=True).text
    assert "12 of 13" in both and "'Hello' 7.0" in both


def test_choosing_a_dialogue_or_the_prompt_changes_the_drawing():
    other = sft.Strip("another", PIECES, LEARNT, [loss + 1 for loss in LOSSES])
    choice, prompt, drawing = sft.strip_selector([STRIP, other]).children
    first = drawing.value
    assert "2.00 nats" in first and 'aria-live="polite"' in first
    choice.value = 1
    assert "another" in drawing.value and "3.00 nats" in drawing.value
    prompt.value = True
    assert "12 of 13" in drawing.value
    choice.value, prompt.value = 0, False
    assert drawing.value == first
    assert "dialogue" in choice.description and "prompt" in prompt.description  # their labels, read by screen readers
    with pytest.raises(ValueError, match="at least one dialogue"):
        sft.strip_selector([])


def test_packing_facts_by_hand():
    facts = sft.packing_facts(10, lengths=(7, 6, 3, 4))
    assert facts == {
        "tokens": 20,
        "padded rows": 4,
        "padded positions": 28,
        "padded waste": 8,
        "packed rows": 2,
        "packed positions": 20,
        "packed waste": 0,
    }
    with pytest.raises(ValueError, match="row_length must be at least 7"):
        sft.packing_facts(6, lengths=(7, 6))


@pytest.mark.parametrize("row_length", sft.ROW_LENGTHS)
def test_the_figure_packs_as_the_reference_does(row_length):
    from lecturekit.alignment.sft import pack

    packed = pack([([1] * length, [1] * length) for length in sft.LENGTHS], row_length)
    assert sft.packing_facts(row_length)["packed rows"] == len(packed.input_ids)


def test_moving_the_slider_changes_the_drawing():
    slider, drawing = sft.packing_slider(start=256).children
    first = drawing.value
    assert "rows of 256" in first and re.search(r'<img src="data:image/png;base64,[^"]+" alt="[^"]{40,}"', first)
    slider.value = 512
    assert "rows of 512" in drawing.value and drawing.value != first
    assert slider.continuous_update is False and not slider.disabled and "row length" in slider.description


def test_the_static_twin_has_every_row_length():
    text = sft.packing_strip().text
    assert all(f"at {row_length}" in text for row_length in sft.ROW_LENGTHS)


def test_only_widgets_that_both_ipywidgets_7_and_8_have():
    used = set(re.findall(r"widgets\.(\w+)", inspect.getsource(sft) + inspect.getsource(style.moving)))
    assert used == {"Dropdown", "Checkbox", "SelectionSlider", "HTML", "VBox", "Layout"}


# what a student's code did -------------------------------------------------------------------------------------------


def blank(*_):
    raise NotImplementedError


def raises(*_):
    raise RuntimeError("shapes")


def forever(*_):
    while True:
        pass


def test_a_right_template_shows_the_answers_with_their_ends():
    from lecturekit.alignment.sft import encode_dialogue

    text = sft.chat_picture(encode_dialogue).text
    assert "A leaking kettle is no fun. Where does it drip?<|im_end|>" in text and "My kettle" not in text


def test_a_mask_of_everything_shows_the_prompt_too():
    from lecturekit.alignment.sft import encode_dialogue

    def everything(tokenizer, messages):
        ids, _ = encode_dialogue(tokenizer, messages)
        return torch.tensor(ids), torch.ones(len(ids)).bool()

    assert "My kettle leaks" in sft.chat_picture(everything).text


def test_the_gradient_lies_one_before_the_labels():
    from lecturekit.alignment.sft import response_loss

    text = sft.gradient_picture(response_loss).text
    assert "row 1 has labels at 4 to 11 and a gradient at 3, 4, 5, 6, 7, 8, 9, 10" in text
    assert "row 2 has labels at 9 to 10 and a gradient at 8, 9" in text


def test_a_loss_without_the_shift_shows_its_gradient_elsewhere():
    def unshifted(logits, labels):
        return torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten())

    assert "row 2 has labels at 9 to 10 and a gradient at 9, 10" in sft.gradient_picture(unshifted).text


def test_rows_and_mask_of_the_reference():
    from lecturekit.alignment.sft import block_diagonal_mask, pack

    assert "3 rows of 12 places, 32 of them in a segment. 6 of 6 dialogues" in sft.rows_picture(pack).text
    assert "0 pairs look across a boundary, 0 look ahead" in sft.attention_picture(block_diagonal_mask).text


def test_a_leaking_mask_is_counted():
    def causal(segments):
        return torch.ones(1, 1, segments.shape[1], segments.shape[1]).bool().tril()

    # 14 · 15 / 2 pairs in all, less those within 5, 4, 3 and 2 places
    assert f"{105 - 15 - 10 - 6 - 3} pairs look across a boundary, 0 look ahead" in sft.attention_picture(causal).text


@pytest.mark.parametrize(
    ("answer", "said"),
    [
        (blank, "is not written yet"),
        (raises, "raised RuntimeError"),
        (lambda *_: None, "raised "),
        (lambda *_: 3, "raised "),
        (None, "raised TypeError"),
    ],
)
@pytest.mark.parametrize("picture", [sft.chat_picture, sft.gradient_picture, sft.rows_picture, sft.attention_picture])
def test_a_wrong_answer_is_drawn_all_the_same(picture, answer, said):
    drawn = picture(answer)
    assert said in drawn.text and drawn.png


def test_an_answer_without_an_end_is_given_up(monkeypatch):
    monkeypatch.setattr(sft, "PATIENCE", 0.2)
    assert "did not end within" in sft.attention_picture(forever).text


def test_pictures_leave_the_random_state_alone():
    from lecturekit.alignment import sft as reference

    torch.manual_seed(0)
    wanted = torch.rand(3)
    torch.manual_seed(0)
    sft.chat_picture(reference.encode_dialogue)
    sft.gradient_picture(reference.response_loss)
    sft.rows_picture(reference.pack)
    sft.attention_picture(reference.block_diagonal_mask)
    assert torch.equal(torch.rand(3), wanted)
