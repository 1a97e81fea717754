"""Running a candidate on a case: hostile exceptions and results, without questions, and where there are none."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import lecturekit
from lecturekit.checking import Case, NeedsGPU, check, evaluate, grade, notebook, passing, question
from lecturekit.checking.attempt import Attempt, Unfit, answer, attempt, call
from lecturekit.checking.question import _registry

CASE = Case(values=torch.arange(3.0))


def test_a_function_is_called_with_the_inputs_in_their_order():
    made = attempt(lambda a, b: a - b, Case(a=5, b=3))
    assert made == Attempt(parts={"result": 2})


def test_several_values_get_their_names():
    assert attempt(lambda v: (1, 2), CASE, returns=("one", "two")).parts == {"one": 1, "two": 2}
    assert (
        "expected 2 values (one, two), got a list of 3"
        in attempt(lambda v: [1, 2, 3], CASE, returns=("one", "two")).message
    )


def test_a_driver_gives_the_parts_and_may_refuse():
    assert attempt(len, CASE, driver=lambda f, case: {"length": f(case.values)}).parts == {"length": 3}

    def refuses(candidate, case):
        raise Unfit("not like this")

    assert attempt(len, CASE, driver=refuses) == Attempt(failure="unfit", message="not like this")
    assert attempt(len, CASE, kind="class").message.startswith("expected a class, got a builtin")


def test_the_candidate_works_on_a_copy():
    assert attempt(lambda v: v.mul_(2), CASE).failure == "changed input"
    assert torch.equal(CASE.values, torch.arange(3.0))


class Mute(Exception):
    def __str__(self):
        raise ValueError("no words")

    __repr__ = __str__


class Numeric(Exception):
    def __str__(self):
        return 7


class Formatted(str):
    def __format__(self, spec):
        raise ValueError("no format")

    def strip(self, *_):
        raise ValueError("no strip")


class OddText(Exception):
    def __str__(self):
        return Formatted("odd")


class Endless(Exception):
    def __str__(self):
        while True:
            pass


class LastWord(Exception):
    def __str__(self):
        raise SystemExit("ended by its message")


class Meta(type):
    @property
    def __name__(cls):
        raise ValueError("no name")

    def __repr__(cls):
        raise ValueError("no name")

    __str__ = __repr__


class Nameless(Exception, metaclass=Meta):
    pass


class Base(BaseException):
    pass


def mute_stub():
    class Stub(NotImplementedError):
        __str__ = Mute.__str__

    return Stub()


def mute_refusal():
    class Refusal(Unfit):
        __str__ = Mute.__str__

    return Refusal()


HOSTILE = {
    "no words": Mute,
    "words that are a number": Numeric,
    "words with a format of their own": OddText,
    "words that exit": LastWord,
    "a class without a name": Nameless,
    "a class with an empty name": lambda: type("", (Exception,), {})("empty"),
    "a class with half a character for a name": lambda: type("\ud800\x1b", (Exception,), {})("odd"),
    "half a character": lambda: ValueError("\ud800"),
    "a long message": lambda: ValueError("x" * 10**6),
    "a stub without words": mute_stub,
    "not even an Exception": Base,
    "an exit": lambda: SystemExit(3),
}


def raising(make):
    def candidate(*_):
        raise make()

    return candidate


@pytest.mark.parametrize("make", HOSTILE.values(), ids=HOSTILE)
def test_a_hostile_exception_is_told_in_short_plain_words(make):
    made = attempt(raising(make), CASE)
    assert made.failure == "raised"
    assert type(made.message) is str and 0 < len(made.message) < 1000
    made.message.encode("utf-8")
    assert "\x1b" not in made.message


@pytest.mark.parametrize("make", [*HOSTILE.values(), mute_refusal], ids=[*HOSTILE, "a refusal without words"])
def test_a_hostile_exception_never_escapes_from_check(make, capsys):
    verdict = evaluate("lora.merge", raising(make), seconds=2)
    assert not verdict.passed and verdict.kind in ("raised", "unfit")
    check("lora.merge", raising(make))
    assert "lora.merge: not yet right" in capsys.readouterr().out


def test_the_words_for_an_exception_without_any():
    assert "Mute: (its own message cannot be shown)" in attempt(raising(Mute), CASE).message
    assert attempt(raising(lambda: type("", (Exception,), {})("empty")), CASE).message.startswith(
        "nameless class: empty"
    )


def test_an_exception_whose_message_never_ends_is_a_timeout():
    assert attempt(raising(Endless), CASE, seconds=0.2).failure == "timeout"


def test_a_keyboard_interrupt_is_the_users():
    with pytest.raises(KeyboardInterrupt):
        attempt(raising(KeyboardInterrupt), CASE)


class Liar:
    @property
    def __class__(self):
        raise ValueError("no class")


class Incomparable(dict):
    def __len__(self):
        raise ValueError("no length")

    keys = __iter__ = __len__


HOSTILE_RESULTS = {
    "an object without a class": Liar,
    "a dict without a length": Incomparable,
    "a list of such": lambda: [Liar()],
    "a huge number": lambda: 10**400,
    "a complex number": lambda: 3 + 4j,
}


@pytest.mark.parametrize("make", HOSTILE_RESULTS.values(), ids=HOSTILE_RESULTS)
@pytest.mark.parametrize("id", ["lora.merge", "lora.count", "nf4.levels", "lora.train", "timing.measure"])
def test_a_hostile_result_never_escapes_from_evaluate(id, make):
    assert not evaluate(id, lambda *_: make(), seconds=5).passed


def test_keys_that_are_no_words_are_only_another_wrong_result():
    assert evaluate("nf4.levels", lambda: {1: 2, None: 3}).kind == "type"


def test_a_request_is_answered_one_dict_a_case_until_it_is_hopeless():
    request = {
        "kind": "function",
        "seconds": 5.0,
        "returns": ["result"],
        "driver": None,
        "cases": [{"label": None, "index": i, "seed": i, "inputs": {"a": i, "b": 1}} for i in range(2)],
    }
    assert answer(lambda a, b: a - b, request) == [
        {"parts": {"result": -1}, "failure": "", "message": ""},
        {"parts": {"result": 0}, "failure": "", "message": ""},
    ]
    (only,) = answer(raising(NotImplementedError), request)
    assert only["failure"] == "not attempted"
    driven = answer(max, request | {"driver": "def driver(f, case):\n    return {'most': f(case.a, case.b)}"})
    assert [reply["parts"] for reply in driven] == [{"most": 1}, {"most": 1}]


def test_the_step_is_the_same_by_its_old_name():
    from lecturekit import checking
    from lecturekit.checking import question as _  # noqa: F401
    from lecturekit.checking.question import Attempt as old_attempt
    from lecturekit.checking.question import Unfit as old_unfit
    from lecturekit.checking.question import call as old_call

    assert (old_attempt, old_unfit, old_call, checking.Unfit) == (Attempt, Unfit, call, Unfit)
    assert callable(checking.question) and not hasattr(checking.question, "Question"), "the decorator, not the module"


# Questions that need a GPU


@pytest.fixture
def gpu_question():
    @question("test.gpu", lab="lab00_test", points=5, slide="none", needs_gpu=True)
    def asked(draw):
        """Double a number."""
        return Case(value=draw.integer(1, 9))

    asked.reference = lambda: lambda value: value * 2
    yield asked
    del _registry["test.gpu"]


@pytest.fixture
def no_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)


def test_without_a_gpu_the_card_says_pending(gpu_question, no_gpu, capsys):
    for answer_ in (lambda value: value * 2, None, raising(NotImplementedError)):
        verdict = evaluate("test.gpu", answer_)
        assert (verdict.kind, verdict.passed, verdict.score) == ("pending", False, 0.0)
        check("test.gpu", answer_)
        assert "test.gpu: pending, needs a GPU" in capsys.readouterr().out
    assert evaluate("test.gpu", None, device="cuda").kind == "pending", (
        "the device is not there: no error of the user's"
    )
    assert "machine with a GPU" in str(verdict.without_inputs())


def test_without_a_gpu_grade_neither_passes_nor_fails(gpu_question, no_gpu):
    with pytest.raises(NeedsGPU, match="pending, needs a GPU"):
        grade("test.gpu", lambda value: value * 2)


def test_without_a_gpu_one_goes_on_with_ones_own(gpu_question, no_gpu):
    def own(value):
        return value + 1

    assert passing("test.gpu", own) is own


@pytest.mark.gpu
def test_with_a_gpu_the_question_is_judged(gpu_question):
    assert evaluate("test.gpu", lambda value: value * 2, device="cuda").passed
    assert evaluate("test.gpu", lambda value: value, device="cuda").kind == "value"


# Where student code is graded


class Parent:
    def __init__(self):
        self.asked = []

    def passing(self, question_id, candidate):
        self.asked.append((question_id, candidate))
        return "the parent's choice"


def test_a_connected_notebook_leaves_judging_to_the_parent(capsys):
    parent = Parent()
    notebook.connect(parent)
    try:
        assert check("lora.merge", None) is None and grade("lora.merge", None) is None
        assert capsys.readouterr().out == "lora.merge: judged after the run\n" * 2
        assert passing("lora.merge", 3) == "the parent's choice"
        assert parent.asked == [("lora.merge", 3)]
    finally:
        notebook.connect(None)
    with pytest.raises(AssertionError):
        grade("lora.merge", None)


WITHOUT_QUESTIONS = """
import sys
import torch
from lecturekit.checking import Case, Draw, NeedsGPU, Unfit, Verdict, check, grade, notebook, passing
from lecturekit.checking.attempt import answer, attempt
assert not any("question" in name or "prove" in name for name in sys.modules if name.startswith("lecturekit"))
class Parent:
    def passing(self, question_id, candidate):
        return question_id, candidate
notebook.connect(Parent())
check("lora.merge", 1), grade("lora.merge", 1)
print(passing("lora.merge", 2), attempt(abs, Case(value=-1)).parts, Unfit.__module__)
try:
    from lecturekit.checking import evaluate
except ImportError:
    print("no evaluate")
"""


def test_the_filtered_copy_without_questions_still_runs_candidates(tmp_path):
    source = Path(lecturekit.__file__).parent
    left_out = shutil.ignore_patterns("questions", "question.py", "prove.py", "grading", "tuning", "__pycache__")
    shutil.copytree(source, tmp_path / "lecturekit", ignore=left_out)
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT_QUESTIONS],
        cwd=tmp_path,
        env={"PYTHONPATH": str(tmp_path), "PATH": "", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == [
        "lora.merge: judged after the run",
        "lora.merge: judged after the run",
        "('lora.merge', 2) {'result': 1} lecturekit.checking.attempt",
        "no evaluate",
    ]
