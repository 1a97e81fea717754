"""Lab 2 as a notebook: what every lab must be, and the example that its model answer works by hand."""

from math import log

from anatomy import Anatomy


class TestLab02(Anatomy):
    LAB = "lab02_rlhf"
    TOPIC = "rlhf"
    NAMES = ('reward_loss', 'kl_estimators', 'token_rewards', 'advantages_and_returns', 'policy_loss', 'group_advantages')
    HEADINGS = ('Set-up', 'Predict', 'The idea', 'Build', 'Measure: the whole frontier, on a model small enough to repeat it', 'Measure: a real model, a learned reward', 'The paper and you', 'Explain')
    CLAIMS = ('C03', 'C04')
    PREDICTION = "predicted_accuracy"
    UNDRAWN = "Your kl_estimators gave nothing to draw: is not written yet"
    PICTURES = 9

    def test_the_example_of_the_model_answer_is_right(self):
        """Section 7.2 works one example by hand."""
        policy, reference = (0.5, 0.5), (0.6, 0.4)
        k1 = [log(p / r) for p, r in zip(policy, reference, strict=True)]
        assert [round(k, 2) for k in k1] == [-0.18, 0.22]
        assert round(sum(p * k for p, k in zip(policy, k1, strict=True)), 3) == 0.020
        assert round(sum(p * abs(k) for p, k in zip(policy, k1, strict=True)), 2) == 0.20
