"""Lab 11 as a notebook: what every lab must be, and the examples that its texts work by hand."""

from anatomy import Anatomy, marks

from lecturekit.checking import questions


class TestLab11(Anatomy):
    LAB = "lab11_prompting"
    TOPIC = "(?:icl|cot)"
    NAMES = (
        "build_prompt",
        "draw_shots",
        "score_candidates",
        "score_cached",
        "calibrate",
        "final_answer",
        "self_consistency",
    )
    HEADINGS = (
        "Set-up",
        "Predict",
        "The idea",
        "Build",
        "Measure: examples in the prompt",
        "Measure: chain of thought",
        "The paper and you",
        "Explain",
    )
    CLAIMS = ("C34", "C35")
    PREDICTION = "predicted_zero_shot"
    UNDRAWN = "Your draw_shots gave nothing to draw: is not written yet"
    PICTURES = 14

    def test_points_sum_to_100_and_are_those_of_the_questions(self, notebook):
        """Two topics make one lab, so that the two questions in words carry the lab's own name."""
        points = {marks(cell)["grade_id"]: marks(cell)["points"] for cell in notebook.cells if marks(cell).get("grade")}
        assert sum(points.values()) == 100
        automatic = {f"{asked.id.replace('.', '-')}-test": asked.points for asked in questions(self.LAB)}
        assert automatic.items() <= points.items() and sum(automatic.values()) == 80
        assert set(points) - set(automatic) == {"prompting-explain", "prompting-wrong"}
