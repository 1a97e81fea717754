"""The trusted side of judging: what a test cell asks, the request for the jail, the verdict on its reply, references.

A reply comes from a process in which a student's code has run. It is looked at as data of unknown worth: whatever is in
it, a Verdict comes out. Only this side knows the right answers.
"""

from __future__ import annotations

import ast
import importlib.util
from collections.abc import Iterable
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lecturekit.checking.attempt import FAILURES, HOPELESS, Attempt
from lecturekit.checking.case import Case
from lecturekit.checking.compare import Opaque
from lecturekit.checking.question import Question, get, questions
from lecturekit.checking.verdict import Verdict
from lecturekit.checking.words import clean
from lecturekit.grading.codec import sent_from
from lecturekit.grading.excerpt import driver_source, excerpt

MESSAGE_LENGTH = 500
PARTS = 50  # of one result; no question has more than ten
DEPTH = 50  # of lists within lists; no question's answer has more than three
PUBLIC_SEED = 0  # what ``check`` draws its cases from
_DIED = {"died": "the Python process ended while this answer ran", "timeout": "no answer within the time limit"}


class Locked(Exception):
    """A reference was asked for that would give away a question still to be graded. The message is for the student."""


@dataclass(frozen=True)
class Ask:
    """One question put by a test cell. expression: what is judged, source text such as ``merge`` or ``model.head``."""

    question: str
    expression: str


def plan(source: str) -> list[Ask] | None:
    """What a test cell asks, one Ask for each ``grade``; None when it is not made of questions alone.

    Made of questions alone is a cell of ``check("id", name)`` and ``grade("id", name)``, with at least one grade, where
    name may have attributes. The two may be imported from lecturekit.checking. source: the trusted cell's, of the
    instructor. A cell with an id that no question has is none of ours either.
    """
    try:
        statements = ast.parse(source).body
    except (SyntaxError, ValueError):  # an IPython magic
        return None
    known = {asked.id for asked in questions()}
    asks = []
    for statement in statements:
        if _imports_check_or_grade(statement):
            continue
        called = _called(statement)
        if called is None or called[1].question not in known:
            return None
        if called[0] == "grade":
            asks.append(called[1])
    return asks or None


def at_stake(lab: str, asks: Iterable[Ask] = ()) -> list[Question]:
    """The questions whose answers are kept back: the lab's own, and those of other labs that its tests put."""
    own = questions(lab)
    return own + [get(name) for name in sorted({ask.question for ask in asks} - {asked.id for asked in own})]


def locked_modules(lab: str, asks: Iterable[Ask] = ()) -> frozenset[str]:
    """The modules that hold the right answer to a question at stake, for example lecturekit.tuning.lora."""
    return frozenset(_oracle(asked)[0] for asked in at_stake(lab, asks))


class Judge:
    """Judges the answers of one student in one lab.

    seed: that of the student's hidden cases.   device: where the cases are drawn and results must be.   asks: all that
    the notebook's tests ask. Methods raise KeyError for an Ask whose question does not exist.
    """

    def __init__(self, lab: str, seed: int | str | bytes, device: str = "cpu", asks: Iterable[Ask] = ()) -> None:
        self.lab, self.seed, self.device = lab, seed, device
        self.at_stake = at_stake(lab, asks)
        self._drawn: dict[tuple[str, bool], list[Case]] = {}

    def request(self, ask: Ask, public: bool = False) -> dict[str, Any]:
        """What the jail must know to let a candidate work (``lecturekit.checking.attempt.answer``), as plain data.

        public: the cases of ``check`` in place of the hidden ones. The order of ``inputs`` is that of the arguments.
        """
        asked = get(ask.question)
        driver = driver_source(asked)
        return {
            "question": asked.id,
            "expression": ask.expression,
            "kind": asked.kind,
            "seconds": asked.seconds,
            "returns": list(asked.returns),
            "driver": driver[0] if driver else None,
            "cases": [
                {"label": case.label, "index": case.index, "seed": case.seed, "inputs": case.copy().inputs}
                for case in self._cases(asked, public)
            ],
        }

    def verdict(self, ask: Ask, reply: Any, public: bool = False) -> Verdict:
        """Judge a reply to ``request``: a list of {"parts": …, "failure": …, "message": …}, one a case, in their order.

        Its tensors are on the CPU, as ``codec.decode`` leaves them unless told otherwise. The list may end early after
        a failure that would repeat itself (HOPELESS). Whatever else a reply holds fails, and nothing in it raises.
        RuntimeError when the question's own reference fails.
        """
        asked = get(ask.question)
        cases = self._cases(asked, public)
        if type(reply) is not list or not 0 < len(reply) <= len(cases):
            return self._failed(asked, "unfit", "the reply was not one result for each case", len(cases))
        attempts = [self._attempt(item) for item in reply]
        if len(attempts) < len(cases) and attempts[-1].failure not in HOPELESS:
            return self._failed(asked, "unfit", "the reply was not one result for each case", len(cases))
        return asked.judge(cases, attempts)

    def died(self, ask: Ask, kind: str) -> Verdict:
        """The verdict where no reply came. kind: ``died`` or ``timeout``, else ValueError."""
        if kind not in _DIED:
            raise ValueError(f"kind must be one of {', '.join(_DIED)}, got {kind!r}")
        asked = get(ask.question)
        return self._failed(asked, kind, _DIED[kind], asked.cases)

    def is_pending(self, ask: Ask) -> bool:
        """Whether the question needs a GPU, and this judge has none."""
        return get(ask.question).pending_on(self.device)

    def pending(self, ask: Ask) -> Verdict:
        """The verdict for such a question."""
        return get(ask.question).pending()

    def answer_to(self, ask: Ask) -> tuple[str, str]:
        """Where the right answer to a question is: its module, and its name there."""
        return _oracle(get(ask.question))

    def reference(self, module: str, name: str, final: set[str]) -> str:
        """Module text with one reference and what it needs; ``*`` is the whole module, once the lab is through.

        module: one of locked_modules(lab), else ValueError.   final: ids of the questions whose verdict stands.
        Raises Locked when the text would hold the answer to another question of the lab, KeyError for a name that the
        module does not have.
        """
        if module not in {_oracle(asked)[0] for asked in self.at_stake}:
            raise ValueError(f"{module} holds no answer of {self.lab}; import it as it is")
        open_questions = [asked for asked in self.at_stake if asked.id not in final]
        source = _source(module)
        if name == "*":
            if open_questions:
                raise Locked(_locked(open_questions[0].id))
            return source
        cut = excerpt(source, [name])
        # Not only the answer: what it is made of is locked as well, until it has been handed out with another question.
        # From ``unmerge`` to ``merge``, which share their helper, it is one minus sign.
        given = {part for asked in self.at_stake if asked.id in final for part in _made_of(asked, module)}
        for asked in open_questions:
            answer = {_oracle(asked)[1]} if _oracle(asked)[0] == module else set()
            if (answer | (_made_of(asked, module) - given)) & cut.names:
                raise Locked(_locked(asked.id))
        return cut.source

    def _cases(self, asked: Question, public: bool) -> list[Case]:
        if (asked.id, public) not in self._drawn:
            seed = PUBLIC_SEED if public else self.seed
            self._drawn[asked.id, public] = [asked.draw(seed, index, self.device) for index in range(asked.cases)]
        return self._drawn[asked.id, public]

    def _attempt(self, item: Any) -> Attempt:
        """One entry of a reply, or the failure that it is when it is not of the form agreed on."""
        if type(item) is not dict or item.keys() != {"parts", "failure", "message"}:
            return Attempt(failure="type", message="the reply was not of the form agreed on")
        parts, failure, message = item["parts"], item["failure"], item["message"]
        if parts is None and type(failure) is str and failure in FAILURES and type(message) is str:
            return Attempt(failure=failure, message=clean(message, MESSAGE_LENGTH))
        fits = type(parts) is dict and len(parts) <= PARTS and all(type(name) is str for name in parts)
        if not fits or type(failure) is not str or failure:
            return Attempt(failure="type", message="the reply was not of the form agreed on")
        try:
            return Attempt(parts={name: self._data(value) for name, value in parts.items()})
        except TypeError as error:
            return Attempt(failure="type", message=str(error))

    def _data(self, value: Any, depth: int = 0) -> Any:
        """The value, made of exact types only. Raises TypeError for anything that is not plain data."""
        if value is None or type(value) in (bool, int, float, str):
            return value
        if type(value) is Opaque and type(value.text) is str:
            return Opaque(clean(value.text, 100))
        if type(value) is Tensor and value.layout is torch.strided:
            came_from = sent_from(value).partition(":")[0]
            if came_from != torch.device(self.device).type:
                return Opaque(f"a tensor on {came_from}")
            return value.detach().to(self.device)
        if depth < DEPTH and type(value) in (list, tuple):
            return type(value)(self._data(item, depth + 1) for item in value)
        if depth < DEPTH and type(value) is dict and all(type(key) in (bool, int, str) for key in value):
            return {key: self._data(item, depth + 1) for key, item in value.items()}
        raise TypeError("the result is not made of tensors, numbers, strings, lists and dicts")

    def _failed(self, asked: Question, kind: str, message: str, cases: int) -> Verdict:
        return Verdict(asked.id, False, kind, message, asked.points, slide=asked.slide, cases=cases)


def _imports_check_or_grade(statement: ast.stmt) -> bool:
    return (
        isinstance(statement, ast.ImportFrom)
        and statement.module == "lecturekit.checking"
        and statement.level == 0
        and all(alias.name in ("check", "grade") and alias.asname is None for alias in statement.names)
    )


def _called(statement: ast.stmt) -> tuple[str, Ask] | None:
    """("check" or "grade", what it asks) for such a call, else None."""
    call = statement.value if isinstance(statement, ast.Expr) else None
    if not isinstance(call, ast.Call) or call.keywords or len(call.args) != 2 or not isinstance(call.func, ast.Name):
        return None
    question, candidate = call.args
    root = candidate
    while isinstance(root, ast.Attribute):
        root = root.value
    if call.func.id not in ("check", "grade") or not isinstance(root, ast.Name):
        return None
    if not isinstance(question, ast.Constant) or not isinstance(question.value, str):
        return None
    return call.func.id, Ask(question.value, ast.unparse(candidate))


def _locked(question: str) -> str:
    return f"{question} is still to be graded; use passing({question!r}, …) to go on with a right version of it"


def _oracle(asked: Question) -> tuple[str, str]:
    module, _, name = asked._oracle.partition(":")
    return module, name


@lru_cache
def _source(module: str) -> str:
    found = importlib.util.find_spec(module)
    if found is None or found.origin is None:
        raise ModuleNotFoundError(f"the module {module} is missing; is the package whole?", name=module)
    return Path(found.origin).read_text(encoding="utf-8")


@lru_cache
def _made_of(asked: Question, module: str) -> frozenset[str]:
    """The functions and classes of a module that make up the question's right answer, if that is defined there."""
    where, name = _oracle(asked)
    if where != module:
        return frozenset()
    statements = ast.parse(excerpt(_source(module), [name]).source).body
    kinds = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)
    return frozenset(statement.name for statement in statements if isinstance(statement, kinds))
