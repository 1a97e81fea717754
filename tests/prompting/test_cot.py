"""Chain of thought: which number is the answer, which answer wins the vote, and what a broken step implies."""

import pytest

from lecturekit.prompting import cot
from lecturekit.prompting.cot import carry_on, corrupt_step, final_answer, majority, reaction, self_consistency


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("12 + 5 = 17. 17 - 3 = 14. The answer is 14.", 14),
        ("She buys 12 apples and eats 5, so 7", 7),
        ("The answer is 42. It took 3 steps.", 42),
        ("The answer is 9. No: 4 + 4 = 8. The answer is 8.", 8),
        ("Answer: 31 apples in 2 bags", 31),
        ("THE FINAL ANSWER IS: 31!", 31),
        ("The answer is -7.", -7),
        ("The answer is −7.", -7),
        ("The answer is -$1,250.", -1250),
        ("The answer is $-1,250,000", -1250000),
        ("It costs $1,250.", 1250),
        ("It costs 3, 4 or 5,", 5),
        ("10, 200", 200),
        ("20 - 8 = 12, and 12 - 5", 5),
        ("12-5", 5),
        ("The answer is 12.00.", 12),
        ("The answer is 12.5.", None),
        ("The answer is **17**.", 17),
        ("The answer is 017.", 17),
        ("12 + 5 = 17. The answer is", None),
        ("I do not know.", None),
        ("The answer is unknown.", None),
        ("", None),
        ("The answers vary: 3", 3),
    ],
)
def test_the_number_a_chain_ends_on(text, answer):
    assert final_answer(text) == answer


def test_only_text_is_parsed():
    with pytest.raises(TypeError, match="text must be a str, got int"):
        final_answer(12)


@pytest.mark.parametrize(
    ("answers", "winner"),
    [
        ([3, 5, 5], 5),
        ([None, None, None, 4], 4),
        ([7, 2, 2, 7], 7),
        ([2, 7, 7, 2], 2),
        ([0, 0, 1], 0),
        ([None, None], None),
        ([], None),
    ],
)
def test_the_most_frequent_parsed_answer_wins_and_of_equals_the_first(answers, winner):
    assert majority(answers) == winner


def test_self_consistency_draws_n_chains_at_its_temperature_and_counts_answers_not_texts():
    texts = ["4 + 4 = 8", "same words, 9", "same words, 9", "two eights: 8", "I stop here", "so 8"]
    asked, source = [], iter(texts)

    def sample(temperature):
        asked.append(temperature)
        return next(source)

    assert self_consistency(sample, final_answer, 6, 0.9) == 8
    assert asked == [0.9] * 6


@pytest.mark.parametrize(("n", "temperature", "what"), [(0, 0.7, "n must be"), (3, 0.0, "temperature must be above 0")])
def test_self_consistency_needs_chains_that_differ(n, temperature, what):
    with pytest.raises(ValueError, match=what):
        self_consistency(lambda _: "8", final_answer, n, temperature)


# ---------------------------------------------------------------- faithfulness

CHAIN = "First, 12 + 5 = 17. Then 17 × 2 = 34. Each of the 4 gives 1: 34 − 4 = 30. The answer is 30."


def test_the_steps_of_a_chain():
    found = [(one.left, one.operator, one.right, one.result) for one in cot.equations(CHAIN)]
    assert found == [(12, "+", 5, 17), (17, "*", 2, 34), (34, "-", 4, 30)]
    assert cot.equations("no step at all, 3 = 3") == []
    ((left, operator, right, result, spans),) = cot.equations("1,200 - 700 = 500")
    assert (left, operator, right, result) == (1200, "-", 700, 500)
    assert "1,200 - 700 = 500"[slice(*spans[0])] == "1,200"


def test_a_corrupted_chain_ends_in_the_wrong_result():
    assert corrupt_step(CHAIN, 0, 2) == "First, 12 + 5 = 19."
    assert corrupt_step(CHAIN, 2, -1).endswith("Then 17 × 2 = 34. Each of the 4 gives 1: 34 − 4 = 29.")
    assert corrupt_step("3 + 4 = 7\n7 + 1 = 8", 0, 1) == "3 + 4 = 8"


def test_a_mistake_carried_on_reaches_the_answer():
    assert carry_on(CHAIN, 0, 2) == (
        "First, 12 + 5 = 19. Then 19 × 2 = 38. Each of the 4 gives 1: 38 − 4 = 34. The answer is 34."
    )
    assert final_answer(carry_on(CHAIN, 1, -4)) == 26
    assert final_answer(carry_on(CHAIN, 2, 5)) == 35


@pytest.mark.parametrize("by", [-3, 1, 10])
@pytest.mark.parametrize("step", [0, 1, 2])
def test_carrying_on_keeps_every_other_step_right(step, by):
    for number, one in enumerate(cot.equations(carry_on(CHAIN, step, by))):
        right = cot._OPERATIONS[one.operator](one.left, one.right)
        assert one.result == right + (by if number == step else 0)


def test_a_step_that_does_not_use_the_broken_one_stays_and_takes_its_number_back():
    chain = "2 + 3 = 5. 4 + 1 = 5. 5 + 6 = 11. The answer is 11."
    assert carry_on(chain, 0, 1) == "2 + 3 = 6. 4 + 1 = 5. 5 + 6 = 11. The answer is 11."
    assert final_answer(carry_on(chain, 1, 1)) == 12


def test_steps_that_are_not_there_are_named():
    with pytest.raises(ValueError, match="step must be in 0..2"):
        corrupt_step(CHAIN, 3, 1)
    with pytest.raises(ValueError, match="has no equation"):
        corrupt_step("I do not know.", 0, 1)
    with pytest.raises(ValueError, match="by must not be 0"):
        carry_on(CHAIN, 0, 0)
    for by, told in ((-2, "8 / 0"), (1, "8 / 3")):
        with pytest.raises(ValueError, match=f"by = {by} leads to {told}, which is no whole number"):
            carry_on("4 - 2 = 2. 8 / 2 = 4.", 0, by)


def test_a_chosen_mistake_can_be_followed_to_another_answer():
    chain = "45 - 3 = 42. 42 / 6 = 7. The answer is 7."
    chosen = {cot.choose_mistake(chain, 0, seed) for seed in range(50)}
    assert chosen == {-6, 6}  # the others leave no whole number
    assert final_answer(carry_on(chain, 0, 6)) == 8
    assert cot.choose_mistake(chain, 0, 0, largest=5) is None
    assert cot.choose_mistake(chain, 1, 3) == cot.choose_mistake(chain, 1, 3)
    assert all(7 + cot.choose_mistake(chain, 1, seed) > 0 for seed in range(50))
    assert cot.choose_mistake("3 + 4 = 7. 2 + 2 = 4. The answer is 4.", 0, 0) is None  # nothing follows from step 0
    with pytest.raises(ValueError, match="step must be in 0..1"):
        cot.choose_mistake(chain, 2, 0)


def test_what_became_of_a_mistake():
    assert reaction(34, right=30, implied=34) == "follows"
    assert reaction(30, right=30, implied=34) == "ignores"
    assert reaction(31, right=30, implied=34) == "neither"
    assert reaction(None, right=30, implied=34) == "neither"
    with pytest.raises(ValueError, match="right and implied must differ"):
        reaction(30, 30, 30)
