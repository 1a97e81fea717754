"""Lab 1 as a notebook: what every lab must be, and the equalities that supervised fine-tuning rests on."""

import re

import pytest
from anatomy import Anatomy, printed


class TestLab01(Anatomy):
    LAB = "lab01_sft"
    TOPIC = "sft"
    NAMES = ('encode_dialogue', 'make_batch', 'response_loss', 'pack', 'block_diagonal_mask', 'train_step')
    HEADINGS = ('Set-up', 'Predict', 'The idea', 'Build', 'Measure: a language model becomes a customer assistant', 'With the prompt in the loss', 'The time that packing saves', 'The lecture and you', 'Explain')
    CLAIMS = ('C01', 'C02')
    PREDICTION = "predicted_response"
    UNDRAWN = "Your pack gave no rows to draw: is not written yet"
    PICTURES = 8

    @pytest.mark.slow
    @pytest.mark.models
    def test_answered_equalities_hold(self, answered):
        text = printed(answered)
        count, total = map(int, re.search(r"template: (\d+) of (\d+) dialogues", text).groups())
        assert count == total > 600
        assert "predicts no response token: 0.0\n" in text
        packed, leaking = (
            float(re.search(words + r"\s+(\S+)\n", text)[1])
            for words in ("blocks and positions as you made them", "positions running on")
        )
        assert packed < leaking / 100
        padded, rows = map(int, re.search(r"(\d+) % padded, (\d+) % packed into rows of 512", text).groups())
        assert rows < padded
