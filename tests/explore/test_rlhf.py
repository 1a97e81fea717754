"""The β figure shows the true optimum, its slider works with a keyboard; wrong answers are drawn all the same."""

import inspect
import re

import numpy as np
import pytest
import torch

from lecturekit.explore import rlhf, style


@pytest.mark.parametrize("beta", [0.05, 0.3, 1.0, 10.0])
def test_no_policy_beats_the_optimum(beta):
    best = rlhf.facts(beta)
    assert rlhf.optimum(beta).sum() == pytest.approx(1, abs=1e-12)
    rng = np.random.default_rng(0)
    for scale in (0.01, 0.3, 2.0):
        for _ in range(50):
            other = rlhf.optimum(beta) * np.exp(scale * rng.normal(size=6)) + 1e-300
            other /= other.sum()
            objective = other @ rlhf.REWARD - beta * (other * np.log(other / rlhf.REFERENCE)).sum()
            assert objective <= best["objective"] + 1e-12


def test_the_ends_of_the_slider_are_the_reference_and_the_highest_reward():
    assert np.abs(rlhf.optimum(1e6) - rlhf.REFERENCE).max() < 1e-5
    assert rlhf.optimum(0.01).argmax() == rlhf.REWARD.argmax() and rlhf.optimum(0.01).max() > 0.999
    assert rlhf.REFERENCE.sum() == pytest.approx(1, abs=1e-12)


def test_the_reward_only_rises_with_divergence_and_people_turn_away():
    path = [rlhf.facts(beta) for beta in np.geomspace(30, 0.02, 60)]
    kl, reward, people = ([step[key] for step in path] for key in ("kl", "reward", "people"))
    assert all(a < b + 1e-9 for a, b in zip(kl, kl[1:], strict=False))
    assert all(a < b + 1e-9 for a, b in zip(reward, reward[1:], strict=False))
    top = int(np.argmax(people))
    assert 5 < top < 55 and people[top] > people[0] + 0.5 and people[top] > people[-1] + 1


@pytest.mark.parametrize("beta", [0, -1.0, float("nan")])
def test_a_wrong_beta_is_named(beta):
    with pytest.raises(ValueError, match="beta must be above 0"):
        rlhf.optimum(beta)


def test_the_static_twin_tells_all_its_betas():
    picture = rlhf.beta_strip()
    assert picture.png.startswith(b"\x89PNG") and all(f"β = {beta:g}" in picture.text for beta in rlhf.BETAS)


def test_moving_the_slider_changes_the_drawing():
    slider, drawing = rlhf.beta_slider(start=1.0).children
    first = drawing.value
    assert 'alt="' in first and "β = 1" in first
    slider.value = 0.1
    assert "β = 0.1" in drawing.value and drawing.value != first
    slider.value = 1.0
    assert drawing.value == first


def test_the_slider_is_an_input_that_keyboards_reach():
    slider, drawing = rlhf.beta_slider().children
    assert type(slider).__name__ == "FloatLogSlider" and not slider.disabled
    assert slider.continuous_update is False and slider.description == "β"
    assert 'aria-live="polite"' in drawing.value
    assert re.search(r'<img src="data:image/png;base64,[^"]+" alt="[^"]{40,}"', drawing.value)


def test_only_widgets_that_both_ipywidgets_7_and_8_have():
    used = set(re.findall(r"widgets\.(\w+)", inspect.getsource(rlhf) + inspect.getsource(style.moving)))
    assert used == {"FloatLogSlider", "SelectionSlider", "HTML", "VBox", "Layout"}


RUNS = {
    beta: {"kl": kl, "proxy": proxy, "gold": gold, "shares": shares, "says": [f"an order at {beta:g}", "two teas"]}
    for beta, kl, proxy, gold, shares in (
        (0.5, 2.0, 1.5, 2.17, [0.1, 0.2, 0.4, 0.3]),
        (3.0, 0.1, 0.3, 1.4, [0.1, 0.7, 0.2, 0.0]),
        (0.0, 30.0, 4.9, -1.0, [0.0, 0.0, 0.1, 0.9]),
    )
}


def test_the_measured_slider_goes_from_the_tightest_leash_to_none():
    slider, drawing = rlhf.measured_slider(RUNS).children
    assert slider.value == 3.0 and "proxy 0.30, gold 1.40" in drawing.value and "mostly names 1 things" in drawing.value
    seen = [drawing.value]
    for beta in (0.5, 0.0):
        slider.value = beta
        seen.append(drawing.value)
        assert f"β = {beta:g}: {RUNS[beta]['kl']:.1f} nats" in drawing.value
        assert f"an order at {beta:g}" in drawing.value
    assert len(set(seen)) == 3 and slider.continuous_update is False


def test_a_beta_that_was_not_run_is_named():
    with pytest.raises(ValueError, match=r"beta must be one that was run, 0.5, 3, 0, got 2"):
        rlhf.measured_picture(RUNS, 2)


def blank(*_):
    raise NotImplementedError


def raises(*_):
    raise RuntimeError("shapes")


PICTURES = [rlhf.kl_picture, rlhf.rewards_picture, rlhf.advantage_picture, rlhf.clip_picture]


@pytest.mark.parametrize("draw", PICTURES)
@pytest.mark.parametrize(
    ("answer", "said"), [(blank, "is not written yet"), (raises, "raised RuntimeError"), (None, "raised TypeError")]
)
def test_an_answer_that_fails_is_drawn_all_the_same(draw, answer, said):
    picture = draw(answer)
    assert said in picture.text and picture.png


@pytest.mark.parametrize("draw", PICTURES[:3])
@pytest.mark.parametrize("answer", [lambda *_: None, lambda *_: 3, lambda *_: torch.ones(1), lambda *_: (1, 2, 3)])
def test_an_answer_of_another_form_is_put_in_words(draw, answer):
    assert "gave nothing to draw" in draw(answer).text


def test_right_answers_are_told_in_numbers():
    from lecturekit.alignment import ppo

    said = rlhf.kl_picture(ppo.kl_estimators).text
    truth, k1, k3 = (
        float(re.search(pattern, said)[1])
        for pattern in (r"KL is ([\d.]+)", r"k1 has mean ([\d.]+)", r"k3 has mean ([\d.]+)")
    )
    spread = float(re.search(r"k1 has mean [\d.]+ and standard deviation ([\d.]+)", said)[1])
    assert abs(k1 - truth) < 4 * spread / 4000**0.5 and abs(k3 - truth) < 4 * spread / 4000**0.5
    assert "padding the largest is 0." in rlhf.rewards_picture(ppo.token_rewards).text
    said = rlhf.advantage_picture(ppo.advantages_and_returns).text
    assert re.search(r"mean -?0\.00 and standard deviation 1\.00", said) and "at most 0 in padding" in said
    assert rlhf.clip_picture(ppo.policy_loss).text.count("your curve is right") == 2


def test_a_wrong_objective_shows():
    def no_minimum(logprobs, old, advantages, mask, epsilon):
        return -((logprobs - old).exp().clamp(1 - epsilon, 1 + epsilon) * advantages)[mask].mean()

    said = rlhf.clip_picture(no_minimum).text
    assert said.count("off by up to") == 2  # flat below 1 − ε for the good token, above 1 + ε for the bad one


def test_leaks_show():
    def everywhere(score, logprobs, reference, mask, beta):
        return -beta * (logprobs - reference) + score[:, None]

    assert "padding the largest is 0." not in rlhf.rewards_picture(everywhere).text


def test_a_strip_of_tokens():
    picture = rlhf.token_strip([["sorry", " for"], ["ok"]], [[0.5, -0.2], [1.0]], "two replies")
    assert "response 1 sums to 0.3, most at 'sorry' (+0.5); response 2 sums to 1.0" in picture.text
    rlhf.token_strip([["a"]], [[0.0]], "no divergence anywhere")


@pytest.mark.parametrize(("rows", "values"), [([], []), ([["a"]], [[1.0, 2.0]]), ([["a"], []], [[1.0], []])])
def test_a_strip_that_does_not_match_is_named(rows, values):
    with pytest.raises(ValueError, match="rows and values must be equally long"):
        rlhf.token_strip(rows, values, "title")


def test_pictures_leave_the_random_state_alone():
    from lecturekit.alignment import ppo

    torch.manual_seed(0)
    wanted = torch.rand(3)
    torch.manual_seed(0)
    rlhf.kl_picture(ppo.kl_estimators)
    rlhf.rewards_picture(ppo.token_rewards)
    assert torch.equal(torch.rand(3), wanted)
