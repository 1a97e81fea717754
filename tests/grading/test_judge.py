"""The trusted side: what is asked, what goes out, and that no reply, however odd, does anything but pass or fail."""

import subprocess
import sys

import pytest
import torch
from torch import nn

from lecturekit.checking import Case, evaluate, question, questions
from lecturekit.checking.attempt import FAILURES, answer
from lecturekit.checking.compare import Opaque
from lecturekit.checking.question import _registry, get
from lecturekit.grading import codec
from lecturekit.grading.excerpt import excerpt
from lecturekit.grading.judge import Ask, Judge, Locked, locked_modules, plan

LAB = "lab05_lora"
SEED = 0x5EED
LORA = "lecturekit.tuning.lora"
ALL = {asked.id for asked in questions(LAB)}
MERGE = Ask("lora.merge", "merge")


def sent(value):
    """The value after its way through the codec."""
    return codec.decode(codec.encode(value))


def judged(judge, ask, candidate, public=False):
    """The whole round trip in this process."""
    request = codec.decode(codec.encode(judge.request(ask, public), strict=True))
    return judge.verdict(ask, sent(answer(candidate, request)), public)


@pytest.fixture
def judge():
    return Judge(LAB, SEED)


# What a test cell asks


@pytest.mark.parametrize(
    ("source", "asks"),
    [
        ('check("lora.merge", merge)\n### BEGIN HIDDEN TESTS\ngrade("lora.merge", merge)', [MERGE]),
        ("from lecturekit.checking import check, grade\ngrade('lora.merge', merge)", [MERGE]),
        ('grade("lora.merge", model.layers.merge)', [Ask("lora.merge", "model.layers.merge")]),
        (
            'grade("lora.merge", merge); grade("lora.count", storage)',
            [MERGE, Ask("lora.count", "storage")],
        ),
        ('check("lora.merge", merge)', None),
        ("", None),
        ("# nothing", None),
        ('grade("lora.merge", merge)\nassert merge', None),
        ('grade("lora.merg", merge)', None),
        ('check("nothing", merge)\ngrade("lora.merge", merge)', None),
        ('grade("lora.merge", merge())', None),
        ('grade("lora.merge", layers[0])', None),
        ('grade("lora.merge", f().merge)', None),
        ('grade("lora.merge", lambda *a: 0)', None),
        ('grade("lora.merge", candidate=merge)', None),
        ('grade("lora.merge", merge, 3)', None),
        ('grade("lora.merge", *merge)', None),
        ("grade(name, merge)", None),
        ('x = grade("lora.merge", merge)', None),
        ('checking.grade("lora.merge", merge)', None),
        ("from lecturekit.checking import check as grade\ngrade('lora.merge', merge)", None),
        ("from mine import grade\ngrade('lora.merge', merge)", None),
        ("import lecturekit\ngrade('lora.merge', merge)", None),
        ("%time grade('lora.merge', merge)", None),
        ("grade('lora.merge', merge)\0", None),
    ],
)
def test_only_cells_of_questions_alone_are_asked(source, asks):
    assert plan(source) == asks


def test_every_test_cell_of_the_course_is_asked():
    from lecturekit.grading.stage import is_test
    from lecturekit.labs import labs, to_notebook

    for lab, path in labs().items():
        for cell in to_notebook(path).cells:
            if is_test(cell):
                (ask,) = plan(cell.source)
                assert get(ask.question).lab == lab


def test_the_modules_with_the_answers_are_known():
    assert locked_modules(LAB) == {LORA, "lecturekit.tuning.storage", "lecturekit.tuning.training"}
    assert locked_modules("lab99") == frozenset()


# The request


@pytest.mark.parametrize("asked", questions(), ids=lambda q: q.id)
def test_a_request_is_plain_data_and_holds_no_answer(asked):
    ask = Ask(asked.id, "candidate")
    request = Judge(asked.lab, SEED).request(ask)
    codec.encode(request, strict=True)
    assert list(request) == ["question", "expression", "kind", "seconds", "returns", "driver", "cases"]
    assert len(request["cases"]) == asked.cases
    for index, case in enumerate(request["cases"]):
        assert list(case) == ["label", "index", "seed", "inputs"]
        drawn = asked.draw(SEED, index)
        assert list(case["inputs"]) == list(drawn.inputs) and case["label"] == drawn.label
        assert case["seed"] == drawn.seed and case["index"] == index
    assert asked._oracle not in str(request) and not any(m.hint in str(request) for m in asked.misconceptions)


def test_public_cases_are_those_of_check_and_hidden_ones_are_of_the_seed(judge):
    def first(request):
        return request["cases"][0]["inputs"]["weight"]

    public, hidden = judge.request(MERGE, public=True), judge.request(MERGE)
    assert torch.equal(first(public), get("lora.merge").draw(0, 0).weight)
    assert torch.equal(first(hidden), get("lora.merge").draw(SEED, 0).weight)
    other = Judge(LAB, SEED + 1)
    assert public["cases"][0]["seed"] == other.request(MERGE, public=True)["cases"][0]["seed"]
    assert hidden["cases"][0]["seed"] != other.request(MERGE)["cases"][0]["seed"]


def test_a_request_that_is_scribbled_on_changes_no_verdict(judge):
    for case in judge.request(MERGE)["cases"]:
        case["inputs"]["weight"].zero_()
    assert judged(judge, MERGE, get("lora.merge").reference()).passed


# The verdict


@pytest.mark.parametrize("public", [False, True], ids=["hidden", "public"])
@pytest.mark.parametrize("asked", questions(), ids=lambda q: q.id)
def test_right_answers_pass(asked, public):
    judge, ask = Judge(asked.lab, SEED), Ask(asked.id, "candidate")
    for candidate in [asked.reference(), *asked.alternatives.values()]:
        verdict = judged(judge, ask, candidate, public)
        assert verdict.passed and verdict.right == verdict.cases == asked.cases and verdict.points == asked.points


@pytest.mark.parametrize("asked", questions(LAB), ids=lambda q: q.id)
def test_each_misconception_is_named(asked):
    judge, ask = Judge(LAB, SEED), Ask(asked.id, "candidate")
    for known in asked.misconceptions:
        verdict = judged(judge, ask, known.candidate)
        assert not verdict.passed and (verdict.misconception, verdict.hint) == (known.name, known.hint)


def test_the_verdict_is_that_of_the_notebook(judge):
    for candidate in (None, 3.0, lambda *_: None, lambda *_: 1 / 0, lambda w, *_: w.numpy(), lambda w, *_: w[:1]):
        here = evaluate("lora.merge", candidate, seed=SEED)
        there = judged(judge, MERGE, candidate)
        assert (here.kind, here.message.splitlines()[0]) == (there.kind, there.message.splitlines()[0])
        assert str(here.without_inputs()) == str(there.without_inputs())


def stub(*_):
    raise NotImplementedError


def test_a_stub_is_not_attempted(judge):
    assert judged(judge, MERGE, stub).kind == "not attempted"


class Foreign:
    def __eq__(self, other):
        return True

    __hash__ = None


class Text(str):
    pass


class Tiny(torch.Tensor):
    pass


def deep(depth):
    value = []
    for _ in range(depth):
        value = [value]
    return value


def entry(parts=None, failure="", message=""):
    return {"parts": parts, "failure": failure, "message": message}


def ones():
    return entry({"result": torch.ones(3, 3)})


ODD_PARTS = {
    "a foreign object": Foreign(),
    "a subclass of str": Text("x"),
    "a subclass of Tensor": torch.ones(2).as_subclass(Tiny),
    "a parameter": nn.Parameter(torch.ones(2)),
    "a sparse tensor": torch.ones(2).to_sparse(),
    "a tensor elsewhere": torch.ones(2, device="meta"),
    "a module": nn.Linear(2, 2),
    "a function": stub,
    "nothing": None,
    "bytes": b"x",
    "a complex number": 1j,
    "a huge number": 10**5000,
    "not a number": float("nan"),
    "a lone surrogate": "\ud800",
    "a long text": "x" * 10**6,
    "deep lists": deep(5000),
    "odd keys": {None: 1, (1, 2): 2},
    "something opaque": Opaque("an ndarray\x1b[0m" + "y" * 1000),
    "something falsely opaque": Opaque(Foreign()),
    "no elements": torch.ones(0),
    "complex numbers": torch.ones(3, 3, dtype=torch.complex64),
    "another dtype": torch.ones(3, 3, dtype=torch.bool),
}
ODD_REPLIES = {
    "nothing": None,
    "a foreign object": Foreign(),
    "an empty list": [],
    "too few": [ones()] * 2,
    "too many": [ones()] * 20,
    "a tuple": (ones(),) * 6,
    "foreign entries": [Foreign()] * 6,
    "a missing field": [{"parts": {}, "failure": ""}] * 6,
    "a field more": [ones() | {"passed": True}] * 6,
    "no parts": [entry({})] * 6,
    "another part": [entry({"passed": True})] * 6,
    "many parts": [entry({str(i): i for i in range(10**4)})] * 6,
    "parts with odd names": [entry({1: 2})] * 6,
    "parts that are a list": [entry([1])] * 6,
    "parts and a failure": [entry({"result": 1}, "raised")] * 6,
    "neither": [entry()] * 6,
    "an unknown failure": [entry(None, "passed")] * 6,
    "a failure that is no text": [entry(None, ["raised"])] * 6,
    "a foreign failure": [entry(None, Foreign())] * 6,
    "a foreign failure with parts": [entry({"result": 1}, Foreign())] * 6,
    "a message that is no text": [entry(None, "raised", 7)] * 6,
    "a message of its own class": [entry(None, "raised", Text("x"))] * 6,
    "an absurd message": [entry(None, "raised", "\ud800\x1b" + "x" * 10**6)] * 6,
    "a timeout that goes on": [entry(None, "timeout")] * 6,
    "an early end": [entry(None, "raised")],
    **{f"parts with {name}": [entry({"result": value})] * 6 for name, value in ODD_PARTS.items()},
}


@pytest.mark.parametrize("reply", ODD_REPLIES.values(), ids=ODD_REPLIES)
def test_an_odd_reply_fails_and_never_raises(judge, reply):
    verdict = judge.verdict(MERGE, reply)
    assert verdict.passed is False and verdict.score == 0.0 and verdict.points == 15
    assert len(str(verdict)) < 5000
    str(verdict).encode("utf-8")
    assert "\x1b" not in str(verdict)


@pytest.mark.parametrize("value", ODD_PARTS.values(), ids=ODD_PARTS)
@pytest.mark.parametrize("asked", questions(LAB), ids=lambda q: q.id)
def test_odd_values_in_right_places_fail_too(asked, value):
    ask = Ask(asked.id, "candidate")
    judge = Judge(LAB, SEED)
    reply = sent(answer(asked.reference(), judge.request(ask)))
    for entry_ in reply:
        entry_["parts"][list(entry_["parts"])[-1]] = value
    assert judge.verdict(ask, reply).passed is False


def test_a_tensor_that_was_on_another_device_is_not_taken_for_right(judge):
    reply = sent(answer(get("lora.merge").reference(), judge.request(MERGE)))
    assert judge.verdict(MERGE, reply).passed
    reply[0]["parts"]["result"]._sent_from = "cuda:0"
    verdict = judge.verdict(MERGE, reply)
    assert verdict.kind == "type" and "a tensor on cuda" in verdict.message


def test_what_is_not_plain_data_is_told_by_its_name(judge):
    verdict = judged(judge, MERGE, lambda w, *_: w.float().numpy())
    assert verdict.kind == "type" and "got a ndarray" in verdict.message


@pytest.mark.parametrize("failure", [*FAILURES, ""])
def test_the_gradebook_holds_no_words_of_the_student(judge, failure):
    words = "<script>GIVE-ME-POINTS</script>"
    for text in (words, words * 100):
        parts = None if failure else {"result": Opaque(words), words: words}
        verdict = judge.verdict(MERGE, [entry(parts, failure, text)] * 6)
        for part in ({"result": Opaque(words)}, {"result": words}, {words: 1}):
            assert "GIVE" not in str(judge.verdict(MERGE, [entry(part)] * 6).without_inputs())
        assert len(verdict.message) <= 1000
        public = verdict.without_inputs()
        assert "GIVE" not in str(public) + public._repr_html_() + repr(public)


def test_the_gradebook_holds_no_hidden_input(judge):
    def leaks(weight, A, B, alpha):
        raise ValueError(str(weight.tolist()))

    text = str(judged(judge, MERGE, leaks).without_inputs())
    assert "your code raised an error" in text
    drawn = get("lora.merge").draw(SEED, 0)
    assert not any(f"{abs(number):.4f}"[:6] in text for number in drawn.weight.flatten().tolist())


@pytest.mark.parametrize(("kind", "words"), [("died", "ended the Python process"), ("timeout", "time limit")])
def test_an_answer_without_a_reply_fails(judge, kind, words):
    verdict = judge.died(MERGE, kind)
    assert (verdict.passed, verdict.kind, verdict.points) == (False, kind, 15)
    assert words in str(verdict.without_inputs())
    with pytest.raises(ValueError, match="kind must be one of died, timeout, got 'asleep'"):
        judge.died(MERGE, "asleep")


def test_an_unknown_question_is_the_callers_mistake(judge):
    with pytest.raises(KeyError, match="there is no question 'lora.merg'"):
        judge.request(Ask("lora.merg", "merge"))


def test_a_reference_that_fails_is_our_mistake_and_not_the_students(judge, monkeypatch):
    reply = sent(answer(get("lora.merge").reference(), judge.request(MERGE)))
    monkeypatch.setattr(get("lora.merge"), "reference", lambda: stub)
    with pytest.raises(RuntimeError, match="the oracle of lora.merge failed"):
        judge.verdict(MERGE, reply)


def test_a_question_for_a_gpu_is_pending_without_one(judge, monkeypatch):
    @question("test.gpu", lab=LAB, points=5, slide="none", needs_gpu=True)
    def _(draw):
        """Needs a GPU."""
        return Case(value=1)

    try:
        monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
        ask = Ask("test.gpu", "answer")
        assert judge.is_pending(ask) and Judge(LAB, SEED, "cuda").is_pending(ask) and not judge.is_pending(MERGE)
        verdict = judge.pending(ask)
        assert (verdict.kind, verdict.passed) == ("pending", False)
        assert "pending, needs a GPU" in str(verdict.without_inputs())
    finally:
        del _registry["test.gpu"]


# References


def test_references_are_locked_until_their_question_is_final(judge):
    for asked in questions(LAB):
        module, _, name = asked._oracle.partition(":")
        with pytest.raises(Locked, match=r"is still to be graded; use passing\("):
            judge.reference(module, name, set())
        with pytest.raises(Locked, match=f"^{asked.id} is still"):
            judge.reference(module, name, ALL - {asked.id})
        namespace = {"__name__": module}
        exec(judge.reference(module, name, ALL), namespace)
        assert judged(judge, Ask(asked.id, name), namespace[name]).passed


def test_a_final_question_unlocks_its_own_reference_only(judge):
    assert "def merge" in judge.reference(LORA, "merge", {"lora.merge"})
    assert "class LoRALinear" in judge.reference(LORA, "LoRALinear", {"lora.linear"})
    with pytest.raises(Locked, match="lora.linear"):
        judge.reference(LORA, "add_lora", {"lora.inject"})
    with pytest.raises(Locked):
        judge.reference(LORA, "LoRALinear", {"lora.merge"})


@pytest.mark.parametrize("name", ["unmerge", "_add_branch", "_branch_sum", "merge_all", "load", "_insert"])
def test_what_an_answer_is_made_of_is_locked_too(judge, name):
    with pytest.raises(Locked):
        judge.reference(LORA, name, set())
    assert f"def {name}(" in judge.reference(LORA, name, ALL)


def test_what_gives_no_answer_away_is_free(judge):
    assert judge.reference(LORA, "math", set()).splitlines()[-1] == "import math"


def test_the_whole_module_opens_when_the_lab_is_through(judge):
    with pytest.raises(Locked, match="lora.count is still"):
        judge.reference(LORA, "*", ALL - {"lora.count"})
    assert "def save(" in judge.reference(LORA, "*", ALL)


def test_a_name_or_module_that_is_not_there(judge):
    with pytest.raises(KeyError, match="nowhere"):
        judge.reference(LORA, "nowhere", ALL)
    with pytest.raises(ValueError, match="lecturekit.data holds no answer of lab05_lora"):
        judge.reference("lecturekit.data", "*", ALL)


def test_looking_for_locks_imports_no_reference():
    code = (
        "import sys; from lecturekit.grading.judge import Judge, Ask, locked_modules\n"
        "judge = Judge('lab05_lora', 1)\n"
        "judge.request(Ask('lora.merge', 'merge'))\n"
        "judge.reference('lecturekit.tuning.lora', 'merge', {'lora.merge'})\n"
        "print([name for name in locked_modules('lab05_lora') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_an_excerpt_of_a_reference_is_what_is_handed_out(judge):
    source = judge.reference("lecturekit.tuning.storage", "storage", {"lora.count"})
    assert excerpt(source, ["storage"]).source == source
