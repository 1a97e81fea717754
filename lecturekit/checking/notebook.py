"""What a notebook calls: check (explains), grade (scores), passing (go on with a right version)."""

from __future__ import annotations

import os
from typing import Any

from lecturekit.checking.question import evaluate, get
from lecturekit.checking.verdict import Verdict
from lecturekit.runtime import device

SEED_VARIABLE = "LECTUREKIT_GRADING_SEED"


def check(question_id: str, candidate: Any) -> None:
    """Judge an answer and show the verdict as a card. Never raises because of the answer.

    Returns nothing, so that a notebook shows the card once; ``evaluate`` returns the verdict itself.
    """
    _show(evaluate(question_id, candidate, device=device().type))


def grade(question_id: str, candidate: Any) -> None:
    """Judge an answer on hidden cases. Raises AssertionError when it is wrong, which is what nbgrader scores.

    The cases are drawn from the seed in LECTUREKIT_GRADING_SEED, which the instructor's configuration sets from a
    secret. The message names the mistake and the hint, never an input.
    """
    verdict = evaluate(question_id, candidate, seed=os.environ.get(SEED_VARIABLE, "ungraded"), device=device().type)
    if not verdict.passed:
        raise AssertionError(str(verdict.without_inputs()))


def passing(question_id: str, candidate: Any) -> Any:
    """The candidate itself when it passes its check, else the reference, saying so.

    So that a student who got one question wrong can still do the rest of the lab.
    """
    if evaluate(question_id, candidate, device=device().type).passed:
        return candidate
    print(f"{question_id} has not passed its check yet: from here on the course's own version is used in its place.")
    return get(question_id).reference()


def _show(verdict: Verdict) -> None:
    try:
        from IPython import get_ipython
        from IPython.display import display
    except ImportError:
        print(verdict)
        return
    if get_ipython() is None:
        print(verdict)
    else:
        display({"text/plain": str(verdict), "text/html": verdict._repr_html_()}, raw=True)
