"""What a notebook calls: check (explains), grade (scores), passing (go on with a right version)."""

from __future__ import annotations

import os
from typing import Any, Protocol

from lecturekit.checking.verdict import Verdict
from lecturekit.runtime import device

# evaluate and get are imported where they are used: where student code is graded, the questions are not there

SEED_VARIABLE = "LECTUREKIT_GRADING_SEED"


class NeedsGPU(RuntimeError):
    """The question cannot be judged on this machine; its points are neither given nor refused."""


class Channel(Protocol):
    """The way from a notebook that is being graded to whoever judges it."""

    def passing(self, question_id: str, candidate: Any) -> Any:
        """The candidate if it passes its check, else the reference."""


_channel: Channel | None = None


def connect(channel: Channel | None) -> None:
    """From now on leave the judging to the other end of this channel; None: judge here again."""
    global _channel
    _channel = channel


def check(question_id: str, candidate: Any) -> None:
    """Judge an answer and show the verdict as a card. Never raises because of the answer.

    Returns nothing, so that a notebook shows the card once; ``evaluate`` returns the verdict itself.
    """
    if _channel is not None:
        return _say_later(question_id)
    from lecturekit.checking.question import evaluate

    _show(evaluate(question_id, candidate, device=device().type))


def grade(question_id: str, candidate: Any) -> None:
    """Judge an answer on hidden cases. Raises AssertionError when it is wrong, which is what nbgrader scores.

    This is what a plain autograder runs; `lecturekit grade` judges outside the notebook instead. The cases are drawn
    from the seed in LECTUREKIT_GRADING_SEED. The message names the mistake and the hint, never an input. Raises
    NeedsGPU where that is pending.
    """
    if _channel is not None:
        return _say_later(question_id)
    from lecturekit.checking.question import evaluate

    verdict = evaluate(question_id, candidate, seed=os.environ.get(SEED_VARIABLE, "ungraded"), device=device().type)
    if verdict.kind == "pending":
        raise NeedsGPU(str(verdict.without_inputs()))
    if not verdict.passed:
        raise AssertionError(str(verdict.without_inputs()))


def passing(question_id: str, candidate: Any) -> Any:
    """The candidate itself when it passes its check or cannot be judged here, else the reference, saying so.

    So that a student who got one question wrong can still do the rest of the lab.
    """
    if _channel is not None:
        return _channel.passing(question_id, candidate)
    from lecturekit.checking.question import evaluate, get

    verdict = evaluate(question_id, candidate, device=device().type)
    if verdict.passed or verdict.kind == "pending":
        return candidate
    print(f"{question_id} has not passed its check yet: from here on the course's own version is used in its place.")
    return get(question_id).reference()


def _say_later(question_id: str) -> None:
    print(f"{question_id}: judged after the run")


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
