"""The bias figure shows what a threshold does, menus and boxes work with a keyboard; wrong answers are drawn too."""

import inspect
import re

import numpy as np
import pytest
import torch

from lecturekit.explore import prompting, style


@pytest.mark.parametrize("bias", [-3.0, -1.0, 0.0, 2.5])
def test_calibration_gives_what_no_bias_gives(bias):
    assert prompting.facts(bias)["calibrated"] == prompting.facts(0.0)["raw"]
    assert prompting.facts(bias)["calibrated_positive"] == prompting.facts(0.0)["raw_positive"]


def test_a_strong_bias_calls_everything_by_one_label():
    high, low = prompting.facts(5.0), prompting.facts(-5.0)
    assert high["raw_positive"] == 1 and low["raw_positive"] == 0 and high["raw"] == low["raw"] == 0.5


def test_a_content_free_query_that_says_something_makes_calibration_worse():
    path = [prompting.facts(2.0, off)["calibrated"] for off in (0.0, 1.0, 2.0)]
    assert path[0] > path[1] > path[2]
    assert prompting.facts(2.0, 1.0)["raw"] == prompting.facts(2.0, 0.0)["raw"]


def test_the_static_twin_tells_all_its_settings():
    picture = prompting.bias_strip()
    assert picture.png.startswith(b"\x89PNG")
    for bias, off in prompting.BIASES:
        assert f"bias {bias:+g} with a content-free query off by {off:g}" in picture.text


def test_moving_the_sliders_changes_the_drawing():
    bias, off, drawing = prompting.bias_slider().children
    first = drawing.value
    bias.value = -1.0
    second = drawing.value
    off.value = 1.0
    assert "adds -1.0 nats" in second and len({first, second, drawing.value}) == 3
    bias.value, off.value = 2.0, 0.0
    assert drawing.value == first
    assert all(slider.continuous_update is False and slider.description for slider in (bias, off))


def test_only_widgets_that_both_ipywidgets_7_and_8_have():
    used = set(re.findall(r"widgets\.(\w+)", inspect.getsource(prompting) + inspect.getsource(style.moving)))
    assert used == {"FloatSlider", "Dropdown", "Text", "HTML", "VBox", "Layout"}


ROWS = [("a fine lamp", "positive"), ("it broke", "negative"), ("lovely", "positive"), ("never again", "negative")]
QUERIES = [("works well", "positive"), ("a waste", "negative")]
LABELS = ("positive", "negative")


class Model:
    """Scores that depend on the last shot's label and on the query, and a record of what was asked."""

    def __init__(self):
        self.asked = []

    def __call__(self, shots, texts):
        self.asked.append(tuple(shots))
        lean = {"positive": 1.0, "negative": -1.0}[shots[-1][1]] if shots else 0.0
        own = torch.tensor([2.0 if "well" in text else -2.0 if "waste" in text else 0.0 for text in texts])
        return torch.stack([own + lean, -own - lean], dim=1).log_softmax(1)


def calibrate(scores, content_free):
    return (scores - content_free).softmax(1)


def test_the_shots_picture_tells_probabilities_before_and_after():
    said = prompting.shots_picture(ROWS[:2], QUERIES, Model(), calibrate, LABELS).text
    raw, neutral = (float(torch.sigmoid(torch.tensor(odds))) for odds in (2 * 1.0, -2.0))
    assert said.startswith("2 shots, with the labels positive, negative in this order")
    assert f"'works well', truly positive: {raw:.2f} as scored" in said and f"query has {neutral:.2f}" in said
    mended = float(torch.sigmoid(torch.tensor(4.0)))
    assert f"{mended:.2f} calibrated" in said


def test_picking_changes_shots_their_number_and_order_and_asks_once_each():
    model = Model()
    *menus, drawing = prompting.shot_picker(ROWS, QUERIES, model, calibrate, LABELS, slots=3).children
    assert model.asked[-1] == tuple(ROWS[:3]) and drawing.value.count("<img") == 1
    first = drawing.value
    menus[2].value = prompting.NONE
    assert model.asked[-1] == tuple(ROWS[:2]) and drawing.value != first
    kept = menus[0].value
    menus[0].value = menus[1].value
    menus[1].value = kept
    assert model.asked[-1] == (ROWS[1], ROWS[0])  # the other order
    before = len(model.asked)
    menus[0].value, menus[1].value = kept, menus[0].value
    asked_again = len(model.asked) - before
    menus[2].value = [*menus[2].options][3]
    assert drawing.value == first and asked_again <= 1  # seen before: the model is not asked
    assert all(menu.description == f"shot {number}" for number, menu in enumerate(menus, 1))


def test_the_picker_can_show_no_shot_at_all():
    model = Model()
    *menus, drawing = prompting.shot_picker(ROWS, QUERIES, model, calibrate, LABELS, slots=1).children
    menus[0].value = prompting.NONE
    assert model.asked[-1] == () and "0 shots, with the labels none" in drawing.value


def test_the_strip_of_shots_has_a_line_a_query():
    choices = [("none", []), ("+", ROWS[:1]), ("+ −", ROWS[:2])]
    said = prompting.shot_strip(choices, QUERIES, Model(), LABELS).text
    assert "none: 0.98, 0.02, content-free 0.50" in said
    assert all(f"{name}: " in said for name, _ in choices)


STEPS = ["12 + 5 = 17.", "17 + 3 = 20."]


def follow(chain):
    """A model that trusts the last number of the chain."""
    last = int(re.findall(r"\d+", chain)[-1]) if chain else 0
    return f" The answer is {last}.", last


def test_a_chain_as_it_was_and_edited():
    untouched = prompting.chain_picture("How many?", STEPS, STEPS, 20, follow).text
    assert "With 0 of 2 steps edited" in untouched and "Answer read: 20; right: 20." in untouched
    edited = prompting.chain_picture("How many?", STEPS, ["12 + 5 = 18.", ""], 20, follow).text
    assert "With 2 of 2 steps edited: 12 + 5 = 18. The" in edited and "Answer read: 18" in edited
    assert "(empty)" in prompting.chain_picture("How many?", STEPS, ["", " "], 20, follow).text


def test_the_strip_of_chains_tells_every_version():
    said = prompting.chain_strip("How many?", STEPS, [STEPS, ["12 + 5 = 19.", ""]], 20, follow).text
    assert "With 0 of 2 steps edited" in said and "With 2 of 2 steps edited: 12 + 5 = 19. The model goes on" in said
    assert "Answer read: 20" in said and "Answer read: 19" in said


def test_the_editor_has_a_box_a_step_that_waits_for_enter():
    *boxes, drawing = prompting.chain_editor("How many?", STEPS, 20, follow).children
    assert [box.value for box in boxes] == STEPS and all(box.continuous_update is False for box in boxes)
    first = drawing.value
    boxes[1].value = "17 + 3 = 99."
    assert "Answer read: 99; right: 20" in drawing.value and drawing.value != first
    assert 'aria-live="polite"' in drawing.value


def blank(*_):
    raise NotImplementedError


def raises(*_):
    raise RuntimeError("shapes")


PICTURES = [
    prompting.prompt_picture,
    prompting.shots_drawn_picture,
    prompting.score_picture,
    prompting.cache_picture,
    prompting.calibrate_picture,
    prompting.parse_picture,
    prompting.vote_picture,
]


@pytest.mark.parametrize("draw", PICTURES)
@pytest.mark.parametrize(
    ("answer", "said"), [(blank, "is not written yet"), (raises, "raised RuntimeError"), (None, "raised TypeError")]
)
def test_an_answer_that_fails_is_drawn_all_the_same(draw, answer, said):
    picture = draw(answer)
    assert said in picture.text and picture.png


@pytest.mark.parametrize("draw", PICTURES)
@pytest.mark.parametrize("result", [None, 3, "text", torch.ones(1), (1, 2, 3), [], [1]])
def test_an_answer_of_another_form_is_drawn_all_the_same(draw, result):
    assert draw(lambda *_: result).png


def test_right_answers_are_told_as_right():
    from lecturekit.prompting import cot, icl

    said = prompting.prompt_picture(icl.build_prompt).text
    assert "10 lines, 3 of them empty, the end is 'ly\\nOpposite:'" in said and "2 lines, 0 of them empty" in said
    said = prompting.shots_drawn_picture(icl.draw_shots).text
    assert "was a shot 0 times; 200 draws had 4 shots" in said
    assert prompting.score_picture(icl.score_candidates).text.count(", right") == 2
    said = prompting.cache_picture(icl.score_cached).text
    assert "equal those of whole rows" in said and "Your score_cached: 41, 44, 52, 64, 88" in said
    said = prompting.calibrate_picture(icl.calibrate).text
    assert "58% right before, 83% after" in said and "0.50 after" in said and "Each row adds up to 1" in said
    assert "not read rightly" not in prompting.parse_picture(cot.final_answer).text
    shares = re.search(r"most frequent: ([\d., ]+?);", prompting.vote_picture(cot.self_consistency).text)[1].split(", ")
    assert float(shares[0]) == pytest.approx(0.4, abs=4 * (0.24 / 200) ** 0.5)  # one chain, 200 votes
    assert float(shares[-1]) > float(shares[0]) + 0.2


def test_the_truth_of_the_score_picture_is_that_of_the_table():
    """The picture adds up a table's entries; here the same three candidates are scored from whole rows of logits."""
    table = torch.randn(8, 8, generator=torch.Generator().manual_seed(5)) * 1.5
    wanted = [
        sum(float(table[a].log_softmax(0)[b]) for a, b in zip(row[1:], row[2:], strict=False))
        for row in ([0, 1, 3], [0, 1, 3, 5, 6], [0, 1, 4, 7, 5, 0, 7])
    ]
    assert ", ".join(f"{value:.2f}" for value in wanted) in prompting.score_picture(lambda *_: None).text


def test_mistakes_show():
    from lecturekit.prompting import icl

    def with_a_space(*arguments):
        return icl.build_prompt(*arguments) + " "

    assert "'y\\nOpposite: '" in prompting.prompt_picture(with_a_space).text

    def any_rows(rows, k, query, seed):
        return [rows[place] for place in np.random.default_rng(seed).permutation(len(rows))[:k]]

    said = prompting.shots_drawn_picture(any_rows).text
    assert int(re.search(r"was a shot (\d+) times", said)[1]) > 20 and int(re.search(r"; (\d+) draws", said)[1]) < 150

    def not_shifted(logits, tokens, prompt_length, lengths):
        place = torch.arange(tokens.shape[1])
        own = (place >= prompt_length) & (place < lengths.unsqueeze(1))
        found = logits.log_softmax(-1).gather(2, tokens.unsqueeze(2)).squeeze(2)
        sums = (found * own).sum(1)
        return sums, sums / own.sum(1)

    assert prompting.score_picture(not_shifted).text.count("off by up to") == 2

    def whole(model, prompt, candidates):
        sums = []
        for one in candidates:
            logits = model(torch.cat([prompt, one]).unsqueeze(0)).logits[0, len(prompt) - 1 : -1].log_softmax(-1)
            sums.append(logits.gather(1, one.unsqueeze(1)).sum())
        return torch.stack(sums), torch.stack(sums)

    said = prompting.cache_picture(whole).text
    assert "Your score_cached: 41, 83, " in said and "equal those of whole rows" in said

    def one_cache(model, prompt, candidates):
        read = model(prompt.unsqueeze(0))
        sums = []
        for one in candidates:
            logits = [read.logits[0, -1:], model(one.unsqueeze(0), past_key_values=read.past_key_values).logits[0, :-1]]
            sums.append(torch.cat(logits).log_softmax(-1).gather(1, one.unsqueeze(1)).sum())
        return torch.stack(sums), torch.stack(sums)

    assert "differ from those of whole rows" in prompting.cache_picture(one_cache).text
    said = prompting.calibrate_picture(lambda scores, content_free: (scores + content_free).softmax(1)).text
    assert "50% after" in said
    assert "Not every row adds up to 1" in prompting.calibrate_picture(lambda s, c: (s - c).exp()).text
    first = prompting.parse_picture(lambda text: int((re.findall(r"\d+", text) or ["0"])[0])).text
    assert first.count("not read rightly") == 7
    one = prompting.vote_picture(lambda sample, parse, n, temperature: parse(sample(temperature))).text
    shares = [float(share) for share in re.search(r"most frequent: ([\d., ]+?);", one)[1].split(", ")]
    assert max(shares) < 0.55  # no gain from more chains


def test_pictures_leave_the_random_numbers_alone():
    torch.manual_seed(7)
    expected = torch.rand(3)
    torch.manual_seed(7)
    prompting.cache_picture(lambda *_: torch.rand(2))
    prompting.score_picture(lambda *_: torch.rand(2))
    assert torch.equal(torch.rand(3), expected)
