"""The engine, on a question made here: what it says of right, wrong, broken and hostile answers."""

import subprocess
import sys
import threading

import pytest
import torch

from lecturekit.checking import Case, Draw, Question, Unfit, evaluate, questions
from lecturekit.checking.limits import TimeUp, time_limit


def double(values):
    return values * 2


@pytest.fixture
def asked():
    def draw(draw: Draw) -> Case:
        return Case(
            draw.edge("all zero"), values=torch.zeros(3) if draw.index == 1 else draw.normal(draw.integer(2, 5))
        )

    made = Question("test.double", draw, lab="lab00_test", points=5, slide="none", cases=4)
    made.reference = lambda: double
    made.tolerance(1, why="a multiplication by two is exact; one rounding for the sum of two equal numbers")
    made.law("zero stays zero", lambda case, parts: not parts["result"].any() if case.label == "all zero" else None)

    @made.misconception("squares", hint="What is 3 doubled?")
    def _(values):
        return values * values

    @made.misconception("calls a method that is not there", hint="Look the name up.")
    def _(values):
        return values.twice()

    return made


def judge(asked, candidate, seed=0, seconds=1.0):
    cases = [asked.draw(seed, index) for index in range(asked.cases)]
    return asked.judge(cases, [asked.run(candidate, case, seconds) for case in cases])


def test_right_answers_pass_and_score_one(asked):
    for candidate in (double, lambda v: v + v, lambda *args: torch.add(args[0], args[0])):
        verdict = judge(asked, candidate)
        assert verdict and verdict.passed and verdict.score == 1.0 and verdict.right == verdict.cases == 4


def test_a_misconception_is_named_with_its_hint(asked):
    verdict = judge(asked, lambda v: v**2)
    assert (verdict.passed, verdict.score, verdict.misconception, verdict.hint) == (
        False,
        0.0,
        "squares",
        "What is 3 doubled?",
    )


def test_the_first_difference_names_index_expected_and_got(asked):
    def wrong(values):
        result = values * 2
        result[1] += 1
        return result

    case = asked.draw(0, 0)
    difference = judge(asked, wrong).first_difference
    assert difference.where == "result[1]"
    assert float(difference.expected) == pytest.approx(2 * case.values[1].item(), rel=1e-5)
    assert float(difference.got) == pytest.approx(2 * case.values[1].item() + 1, rel=1e-5)
    assert "1 of" in difference.detail


def test_a_partly_right_answer_says_how_many_cases_are_right(asked):
    verdict = judge(asked, lambda v: v * 2 if v.any() else v + 1)
    assert verdict.right == 3 and verdict.case == "case 2 (all zero)"
    assert "Law broken: zero stays zero" in verdict.message


@pytest.mark.parametrize(
    ("candidate", "kind", "words"),
    [
        (lambda v: None, "type", "return statement"),
        (lambda v: v.tolist(), "type", "expected a tensor"),
        (lambda v: v.numpy() * 2, "type", "ndarray"),
        (lambda v: (v * 2)[:-1], "shape", "shape"),
        (lambda v: (v * 2).double(), "dtype", "float64"),
        (lambda v: (v * 2).to("meta"), "device", "meta"),
        (lambda v: v * float("nan"), "nan", "NaN"),
        (lambda v: v.mul_(2), "changed input", "values was changed in place"),
        (lambda v: torch.full_like(v, 3.0), "value", "same number"),
        (lambda v: v * 0, "value", "every value of result is zero"),
        (lambda a, b: a, "raised", "TypeError"),
        (3.0, "unfit", "expected a function, got a float"),
        (None, "unfit", "got None"),
    ],
)
def test_each_kind_of_wrong_has_a_fitting_message(asked, candidate, kind, words):
    verdict = judge(asked, candidate)
    assert (verdict.passed, verdict.kind) == (False, kind)
    assert words in verdict.message


def test_the_blank_stub_is_not_attempted(asked):
    def stub(values):
        raise NotImplementedError

    verdict = judge(asked, stub)
    assert verdict.kind == "not attempted"
    assert "Traceback" not in str(verdict)


def test_an_error_is_told_with_the_students_own_line(asked):
    def wrong(values):
        return values @ values.T @ torch.zeros(77, 1)

    verdict = judge(asked, wrong)
    assert verdict.kind == "raised" and "RuntimeError" in verdict.message and "torch.zeros(77, 1)" in verdict.message
    assert judge(asked, lambda v: v.twice()).misconception == "calls a method that is not there"
    assert judge(asked, lambda v: v.thrice()).misconception is None, "another error is not that misconception"


def test_a_refusal_without_words_is_still_a_verdict(asked):
    @asked.misconception("refuses too", hint="…")
    def _(values):
        raise Unfit("in words")

    def silent(values):
        raise Unfit("")

    assert judge(asked, silent).kind == "unfit"


def test_sys_exit_does_not_end_the_notebook(asked):
    assert judge(asked, lambda v: sys.exit(3)).kind == "raised"


@pytest.mark.parametrize("swallow", [False, True])
def test_a_loop_without_an_end_is_stopped(asked, swallow):
    def loop(values):
        while True:
            try:
                sum(range(1000))
            except Exception:
                if not swallow:
                    raise

    verdict = judge(asked, loop, seconds=0.2)
    assert verdict.kind == "timeout" and "0.2 seconds" in verdict.message


def test_the_time_limit_holds_outside_the_main_thread_too():
    seen = []

    def work():
        try:
            with time_limit(0.2):
                while True:
                    pass
        except TimeUp:
            seen.append("stopped")

    thread = threading.Thread(target=work)
    thread.start()
    thread.join(20)
    assert seen == ["stopped"]


def test_the_time_limit_leaves_no_timer_behind():
    import signal

    with time_limit(60):
        pass
    assert signal.getitimer(signal.ITIMER_REAL) == (0.0, 0.0)


def test_a_random_answer_does_not_disturb_the_notebooks_random_numbers(asked):
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    judge(asked, lambda v: torch.rand_like(v))
    assert torch.equal(torch.rand(3), expected)


def test_pythons_and_numpys_random_numbers_go_on_too(asked):
    import random

    import numpy

    def draws(values):
        random.random()
        numpy.random.rand()
        return values * 2

    random.seed(5), numpy.random.seed(5)
    expected = random.random(), numpy.random.rand()
    random.seed(5), numpy.random.seed(5)
    assert judge(asked, draws).passed
    assert (random.random(), numpy.random.rand()) == expected


def test_judging_works_on_a_history_and_inside_no_grad(asked):
    with torch.no_grad():
        assert judge(asked, lambda v: v.clone().requires_grad_() * 2).passed


def test_a_driver_can_refuse_in_its_own_words(asked):
    @asked.driver
    def _(candidate, case):
        raise Unfit("the class needs a parameter named A")

    cases = [asked.draw(0, 0)]
    verdict = asked.judge(cases, [asked.run(double, cases[0])])
    assert (verdict.kind, verdict.message) == ("unfit", "the class needs a parameter named A")


def test_hidden_cases_stay_hidden_in_feedback(asked):
    def leaks(values):
        raise ValueError(str(values.tolist()))

    secret = asked.draw("secret", 0).values.tolist()
    for candidate in (leaks, lambda v: v**2, lambda v: v + 1):
        public = judge(asked, candidate, seed="secret").without_inputs()
        text = str(public) + public._repr_html_()
        assert not any(f"{abs(number):.5g}" in text for number in secret)
        assert public.first_difference is None and not public.inputs
    assert "squares" in str(judge(asked, lambda v: v**2, seed="secret").without_inputs())


def test_evaluate_names_what_was_asked_wrongly():
    with pytest.raises(KeyError, match="there is no question 'lora.merg'; there are .*lora.merge"):
        evaluate("lora.merg", double)
    with pytest.raises(ValueError, match="cases must be at least 1, got 0"):
        evaluate("lora.merge", double, cases=0)
    if not torch.cuda.is_available():
        with pytest.raises(ValueError, match="no CUDA device"):
            evaluate("lora.merge", double, device="cuda")


def test_evaluate_takes_another_number_of_cases():
    assert evaluate("lora.merge", double, cases=2).cases == 2


def test_questions_can_be_listed_by_lab():
    assert {q.id for q in questions("lab05_lora")} == {
        "lora.merge",
        "lora.linear",
        "lora.inject",
        "lora.count",
        "lora.train",
    }
    assert questions("no such lab") == []


def test_importing_the_questions_does_not_import_their_oracles():
    code = (
        "import sys; from lecturekit.checking import questions; questions(); "
        "oracles = {q._oracle.partition(':')[0] for q in questions()}; "
        "print(sorted(name for name in oracles if name in sys.modules and 'questions' not in name))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
