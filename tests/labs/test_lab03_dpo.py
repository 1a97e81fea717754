"""Lab 3 as a notebook: what every lab must be, and what is kept of the reference model."""

import pytest
from anatomy import Anatomy, printed


class TestLab03(Anatomy):
    LAB = "lab03_dpo"
    TOPIC = "dpo"
    NAMES = ('optimal_policy', 'implicit_reward', 'sequence_logprob', 'dpo_loss', 'gradient_weight', 'cache_reference')
    HEADINGS = ('Set-up', 'Predict', 'The idea', 'Build', 'Measure', 'Two more questions', 'The paper and you', 'Explain')
    CLAIMS = ('C05', 'C06')
    PREDICTION = "predicted_likelihood"
    UNDRAWN = "over the chosen log-ratio it is not written yet"
    PICTURES = 7

    @pytest.mark.slow
    @pytest.mark.models
    def test_answered_the_reference_is_two_numbers_a_pair_and_differences_come_back(self, answered):
        text = printed(answered)
        assert "difference of the first two: 1.000, back again 1.000" in text and "-1.000, back again -1.000" in text
        assert "4 pairs: 32 bytes" in text
