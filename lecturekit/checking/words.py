"""What a student's objects say of themselves, made safe to show: whatever they do, a short plain text comes out."""

from __future__ import annotations

from typing import Any

from lecturekit.checking.limits import TimeUp

SAID = 400
"""The most characters of a message. With the name of its class it stays below 500, what a grader's reply may hold."""


def clean(text: str, limit: int = SAID) -> str:
    """The text as an exact str that can be printed anywhere: no lone surrogates or control characters, cut to limit."""
    exact = str.__str__(text)  # a subclass may have a __format__ of its own
    cut = exact if len(exact) <= limit else exact[: limit - 2] + " …"
    return "".join(letter if letter.isprintable() or letter in "\n\t" else "�" for letter in cut)


def said(value: Any, limit: int = SAID) -> str:
    """str(value), or a sentence in its place where the value's own __str__ fails in any way.

    Call it inside a time limit when the value is a student's: its __str__ may never return. Only TimeUp and
    KeyboardInterrupt come through.
    """
    try:
        return clean(str(value), limit)
    except (TimeUp, KeyboardInterrupt):
        raise
    except BaseException:  # even a SystemExit
        return "(its own message cannot be shown)"


def class_name(value: Any) -> str:
    """The name of the value's class, read past any metaclass, in at most 80 characters."""
    return clean(type.__dict__["__name__"].__get__(type(value)), 80).strip() or "nameless class"
