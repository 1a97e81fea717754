"""Lab 7 as a notebook: what every lab must be, and the formulas that its model answers quote."""

import numpy as np
import pytest
from anatomy import Anatomy


class TestLab07(Anatomy):
    LAB = "lab07_bitdelta"
    TOPIC = "bitdelta"
    NAMES = ("compress", "pack_signs", "delta_product", "distill_loss", "model_bytes")
    HEADINGS = (
        "Set-up",
        "Predict",
        "The idea",
        "Build",
        "Measure: one fine-tune, one bit a weight",
        "The paper's table, from configurations alone",
        "Measure: eight fine-tunes, one base, one batch",
        "The paper and you",
        "Explain",
    )
    CLAIMS = ("C23", "C24", "C25", "C26", "C27")
    PREDICTION = "predicted_one_bit"
    UNDRAWN = "Your compress gave nothing to draw: is not written yet"
    PICTURES = 11

    def test_the_parabola_of_the_model_answers_is_right(self):
        """Sections 8.1 and 8.2: Σ(|Δ| − α)² = Σ(|Δ| − m)² + N(α − m)², and 1 − m² / mean Δ² is left at m."""
        delta = np.random.default_rng(0).laplace(size=1000)
        size = np.abs(delta)
        m = size.mean()
        for alpha in (0.0, 0.5, 1.7):
            parabola = ((size - m) ** 2).sum() + size.size * (alpha - m) ** 2
            assert ((size - alpha) ** 2).sum() == pytest.approx(parabola, rel=1e-12)
        left = ((delta - m * np.sign(delta)) ** 2).sum() / (delta**2).sum()
        assert left == pytest.approx(1 - m**2 / (delta**2).mean(), rel=1e-12)

    def test_the_styles_and_their_rules_agree(self, notebook):
        """An answer rewritten in a style is found by the rule of that style, on the training answers themselves."""
        import re

        from lecturekit import data

        source = next(cell.source for cell in notebook.cells if "STYLES = {" in cell.source)
        scope = {"re": re}
        exec(source.split("single = [")[0], scope)  # the rules alone, without the rest of the cell
        rows = [row for row in data.load("customer_service")["train"] if len(row["messages"]) == 2]
        missed = [
            (name, row["id"])
            for row in rows
            for name, rewrite in scope["STYLES"].items()
            if scope["style_of"](rewrite(row["messages"][1]["content"], row["topic"])) != name
        ]
        # an answer that exclaims throughout, or has no full stop, cannot be told from its own rewriting
        assert len(missed) < 0.01 * len(rows) * len(scope["STYLES"]), missed[:5]
