"""Lab 12 as a notebook: what every lab must be, and the example that its model answer works by hand."""

import re
from math import log

import pytest
from anatomy import Anatomy, printed


class TestLab12(Anatomy):
    LAB = "lab12_rag"
    TOPIC = "rag"
    NAMES = ("chunk", "pool", "top_k", "bm25", "fuse", "assemble", "recall_and_mrr")
    HEADINGS = (
        "Set-up",
        "Predict",
        "The idea",
        "Build",
        "Measure: what is found",
        "Measure: what is read",
        "The paper and you",
        "Explain",
    )
    CLAIMS = ("C36",)
    PREDICTION = "predicted_closed"
    UNDRAWN = "Your chunk gave nothing to draw: is not written yet"
    PICTURES = 10

    def test_the_example_of_the_model_answer_is_right(self):
        """Section 7.2 works one example by hand: two documents that both hold the only word of the query."""
        idf = log(1 + (2 - 2 + 0.5) / (2 + 0.5))
        scores = [idf * tf / (tf + 1.5) for tf in (2, 1)]
        assert round(idf, 3) == 0.182 and [round(score, 3) for score in scores] == [0.104, 0.073]

    @pytest.mark.slow
    @pytest.mark.models
    def test_answered_the_search_agrees_with_the_libraries(self, answered):
        pytest.importorskip("faiss")
        text = printed(answered)
        assert "faiss finds the same ten passages in the same order for 100.0% of the questions" in text
        apart = float(re.search(r"bm25s gives scores that differ from yours by at most (\S+)", text)[1])
        assert apart < 1e-4  # scores of about 20 in float32, from sums in another order

    @pytest.mark.slow
    @pytest.mark.models
    def test_answered_a_question_is_shown_as_text(self, answered):
        text = printed(answered)
        assert re.search(r"the best 2 of \d+ passages, search by both fused", text)
        assert re.search(r"^answer: \S", text, flags=re.M)
