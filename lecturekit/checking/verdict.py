"""What the engine says of an answer, in words, as a card, and for the gradebook."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from html import escape

from lecturekit.checking.compare import Difference


@dataclass(frozen=True)
class Verdict:
    """The judgement of one answer to one question.

    passed: every case was right.   score: 1.0 when passed, else 0.0, to be multiplied by the question's points.
    kind: passed · not attempted · unfit · raised · timeout · changed input · type · shape · dtype · device · nan ·
    value · law · died (the process ended) · pending (it needs a GPU: neither passed nor failed).
    misconception: the name of the known mistake, if the answer is one.   cases: how many were judged,
    right: how many of them were right.
    """

    question: str
    passed: bool
    kind: str
    message: str
    points: float = 0.0
    misconception: str | None = None
    hint: str | None = None
    slide: str = ""
    case: str = ""
    cases: int = 0
    right: int = 0
    first_difference: Difference | None = None
    inputs: dict[str, str] = field(default_factory=dict)

    @property
    def score(self) -> float:
        return 1.0 if self.passed else 0.0

    def __bool__(self) -> bool:
        return self.passed

    def without_inputs(self) -> Verdict:
        """The same verdict with nothing that tells the inputs it was judged on: for feedback on hidden cases."""
        message = _PUBLIC.get(self.kind, "the result is not the expected one")
        return replace(self, message=message, case="", first_difference=None, inputs={})

    def __str__(self) -> str:
        rows = [f"  {label}: {text}".replace("\n", "\n    ") for label, text in self._rows()]
        return "\n".join([f"{self.question}: {self._headline()}", *rows])

    def _repr_html_(self) -> str:
        colour = {"passed": "#0072B2", "not attempted": "#767676", "pending": "#767676"}.get(self.kind, "#D55E00")
        rows = "".join(
            f'<div style="margin:.15em 0"><dt style="display:inline;font-weight:600">{escape(label)}: </dt>'
            f'<dd style="display:inline;margin:0;white-space:pre-wrap">{escape(text)}</dd></div>'
            for label, text in self._rows()
        )
        title = f"{self.question}: {self._headline()}"
        return (
            f'<section role="status" aria-label="{escape(title, quote=True)}" class="lecturekit-verdict" '
            f'style="border:1px solid {colour};border-left:.5em solid {colour};padding:.5em .9em;max-width:48em">'
            f'<p style="margin:0 0 .3em 0;font-weight:700">{escape(title)}</p>'
            f'<dl style="margin:0">{rows}</dl></section>'
        )

    def _headline(self) -> str:
        if self.passed:
            return f"passed, {self.right} of {self.cases} cases right"
        if self.kind == "not attempted":
            return "not attempted yet"
        if self.kind == "pending":
            return "pending, needs a GPU"
        return "not yet right"

    def _rows(self) -> list[tuple[str, str]]:
        rows = [("What happened", self.message)] if not self.passed else []
        if self.misconception:
            rows.insert(0, ("Looks like", self.misconception))
        if self.case:
            rows.append(("Where", f"{self.case}, {self.right} of {self.cases} cases right"))
        if self.first_difference is not None:
            rows.append(("First difference", str(self.first_difference)))
        if self.inputs:
            rows.append(("Inputs", ", ".join(f"{name} = {text}" for name, text in self.inputs.items())))
        if self.hint:
            rows.append(("Hint", self.hint))
        if self.slide:
            rows.append(("Slide", self.slide))
        return rows


_PUBLIC = {
    "passed": "every case is right",
    "not attempted": "this question was not attempted",
    "raised": "your code raised an error",
    "timeout": "your code did not finish within the time limit",
    "changed input": "your code changes one of its inputs in place",
    "type": "the result is not of the expected type",
    "shape": "the result has the wrong shape",
    "dtype": "the result has the wrong dtype",
    "device": "the result is on the wrong device",
    "nan": "the result holds NaN",
    "unfit": "what was handed in cannot be used as the question asks",
    "died": "your code ended the Python process",
    "pending": "this question is judged on a machine with a GPU",
    "law": "the result breaks a law that every right answer obeys",
}
