"""Lab 5 as a notebook: what every lab must be, and that LoRA changes nothing where it should not."""

import pytest
from anatomy import Anatomy, printed


class TestLab05(Anatomy):
    LAB = "lab05_lora"
    TOPIC = "lora"
    NAMES = ('merge', 'LoRALinear', 'add_lora', 'storage', 'train_step')
    HEADINGS = ('Set-up', 'Predict', 'The idea', 'Build', 'Measure: a real model learns a notation', 'How much rank does it take?', 'The paper and you', 'Explain')
    CLAIMS = ('C11', 'C16', 'C17')
    PREDICTION = "predicted_percent"
    UNDRAWN = "Your merge gave no matrix to draw: is not written yet"
    PICTURES = 7

    @pytest.mark.slow
    @pytest.mark.models
    def test_answered_invariants_hold_bit_by_bit(self, answered):
        text = printed(answered)
        assert "largest difference of a logit at the start: 0.0\n" in text
        assert "between the unplugged model and the base: 0.0\n" in text
        assert "120 branches, 1,474,560 trainable parameters, 1.10 % of the model's" in text
        assert "4,194,304 parameters, 8.4 MB" in text and "14 TB" in text
