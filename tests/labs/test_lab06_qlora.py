"""Lab 6 as a notebook: what every lab must be, and the figures that do not depend on a measurement."""

import re

import pytest
from anatomy import Anatomy, marks, printed

from lecturekit.checking import questions


class TestLab06(Anatomy):
    LAB = "lab06_qlora"
    TOPIC = "(?:nf4|qlora)"
    NAMES = ("nf4_levels", "quantize", "pack_nibbles", "dequantize", "double_quantize", "linear_4bit")
    HEADINGS = (
        "Set-up",
        "Predict",
        "The idea",
        "Build",
        "Measure: sixteen levels on real weights",
        "Measure: a fine-tune over 4-bit weights",
        "The paper and you",
        "Explain",
    )
    CLAIMS = ("C19", "C20", "C21", "C22")
    PREDICTION = "predicted_bits"
    UNDRAWN = "Your quantize gave nothing to draw: is not written yet"
    PICTURES = 15

    def test_points_sum_to_100_and_are_those_of_the_questions(self, notebook):
        """Two topics make one lab, so that the two questions in words carry the lab's own name."""
        points = {marks(cell)["grade_id"]: marks(cell)["points"] for cell in notebook.cells if marks(cell).get("grade")}
        assert sum(points.values()) == 100
        automatic = {f"{asked.id.replace('.', '-')}-test": asked.points for asked in questions(self.LAB)}
        assert automatic.items() <= points.items() and sum(automatic.values()) == 80
        assert set(points) - set(automatic) == {"qlora-explain", "qlora-wrong"}

    @pytest.mark.slow
    @pytest.mark.models
    def test_answered_what_must_be_exact_is_exact(self, answered):
        text = printed(answered)
        assert "106,168,320 of them in 210 linear layers" in text
        assert re.search(r"bytes  4\.0000 bits a weight\n.* 0\.5000   sum 4\.5000\n", text)
        assert re.search(r"sum 4\.12\d\d, by the formula 4\.1270\n", text)
        assert "steps after which paged and plain AdamW agree in every bit: 2 of 2" in text
        assert "parameters other than A and B that got a gradient: 0\n" in text
        state, most, allowed = re.search(
            r"state in all ([\d,]+) bytes; in memory at most ([\d,]+), allowed ([\d,]+)", text
        ).groups()
        most, allowed, state = (int(number.replace(",", "")) for number in (most, allowed, state))
        assert most <= allowed < state

    @pytest.mark.slow
    @pytest.mark.models
    def test_the_built_layer_keeps_less_than_a_dequantized_weight(self, answered):
        text = printed(answered)
        yours, plain = re.search(
            r"kept for the backward pass: ([\d,]+) bytes; with a plain product ([\d,]+)", text
        ).groups()
        weight = re.search(r"the dequantized weight alone: ([\d,]+)", text)[1]
        yours, plain, weight = (int(number.replace(",", "")) for number in (yours, plain, weight))
        assert yours < weight <= plain
