"""One engine that judges answers everywhere: in the notebook it explains, in the grader it scores."""

from lecturekit.checking.case import Case, Draw
from lecturekit.checking.notebook import check, grade, passing
from lecturekit.checking.question import Question, Unfit, evaluate, question, questions
from lecturekit.checking.verdict import Verdict

__all__ = [
    "Case",
    "Draw",
    "Question",
    "Unfit",
    "Verdict",
    "check",
    "evaluate",
    "grade",
    "passing",
    "question",
    "questions",
]
