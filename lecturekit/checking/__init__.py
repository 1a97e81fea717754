"""One engine that judges answers everywhere: in the notebook it explains, in the grader it scores."""

from lecturekit.checking.attempt import Unfit
from lecturekit.checking.case import Case, Draw
from lecturekit.checking.notebook import NeedsGPU, check, grade, passing
from lecturekit.checking.verdict import Verdict

try:
    from lecturekit.checking.question import Question, evaluate, question, questions
except ModuleNotFoundError as missing:  # the copy that graded student code sees has no questions
    if missing.name != "lecturekit.checking.question":
        raise

__all__ = [
    "Case",
    "Draw",
    "NeedsGPU",
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
