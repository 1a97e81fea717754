"""Excerpts hold what they need and nothing else, above all no answer; a driver cut out works like its question's."""

import ast
import textwrap

import pytest

from lecturekit.checking import Case, questions
from lecturekit.checking.attempt import attempt, load_driver
from lecturekit.checking.compare import EXACT, compare
from lecturekit.checking.question import Question
from lecturekit.grading.excerpt import driver_source, excerpt

MODULE = textwrap.dedent(
    '''
    """A module."""
    from __future__ import annotations

    import math
    import os.path
    from collections.abc import Iterator, Sequence as Row

    from torch import Tensor, nn

    SCALE = 2
    SCALE *= 3
    LIMIT: int = SCALE + 1
    TABLE = {"a": lambda x: helper(x)}
    TABLE["b"] = None

    def helper(x: Tensor) -> Row:
        secret = 1  # a local of the same name
        return math.floor(x) + secret

    def secret():
        return "the answer"

    def decorate(f):
        return f

    class Base:
        size: Tensor = LIMIT

    @decorate
    class Layer(Base):
        def forward(self, x: nn.Module) -> Iterator[int]:
            return [TABLE["a"](item) for item in x]

    def a(x): return b(x - 1) if x else 0

    def b(x): return a(x)

    def calls_secret():
        def inner():
            return secret()
        return inner

    def late():
        global made
        made = SCALE
        return made

    made = None
    secret.mark = 1
    '''
)


@pytest.mark.parametrize(
    ("wanted", "names"),
    [
        (["helper"], {"helper", "math"}),
        (["secret"], {"secret"}),
        (["LIMIT"], {"LIMIT", "SCALE"}),
        (["Layer"], {"Layer", "Base", "LIMIT", "SCALE", "TABLE", "helper", "math", "decorate"}),
        (["a"], {"a", "b"}),
        (["calls_secret"], {"calls_secret", "secret"}),
        (["late"], {"late", "made", "SCALE"}),
        (["os", "Row"], {"os", "Row"}),
        ([], set()),
    ],
    ids=lambda part: "+".join(sorted(part)) or "nothing",
)
def test_an_excerpt_binds_what_is_used_at_run_time_and_nothing_else(wanted, names):
    cut = excerpt(MODULE, wanted)
    assert cut.names == names
    namespace = {}
    exec(compile(cut.source, "<excerpt>", "exec", dont_inherit=True), namespace)
    assert set(namespace) - {"__builtins__", "__annotations__", "annotations"} == names
    assert cut.source.startswith("from __future__ import annotations\n")


def test_an_excerpt_works_like_the_module():
    whole, part = {}, {}
    exec(MODULE, whole)
    exec(excerpt(MODULE, ["Layer", "a", "late"]).source, part)
    assert part["Layer"]().forward([1.5, 2.5]) == whole["Layer"]().forward([1.5, 2.5]) == [2, 3]
    assert part["Layer"].size == whole["Layer"].size == 7
    assert part["a"](4) == 0 and part["late"]() == 6


def test_imports_are_cut_down_to_the_names_in_use():
    assert "Sequence as Row" in excerpt(MODULE, ["Row"]).source
    assert "Iterator" not in excerpt(MODULE, ["Row"]).source


def test_a_name_that_is_not_there_is_an_error():
    with pytest.raises(KeyError, match="binds no nowhere"):
        excerpt(MODULE, ["helper", "nowhere"])


# Drivers

DRIVEN = [asked for asked in questions() if driver_source(asked)]


def test_default_drivers_need_no_source():
    plain = {asked.id for asked in questions()} - {asked.id for asked in DRIVEN}
    assert {"lora.merge", "lora.count", "nf4.quantize", "rag.top_k"} <= plain
    assert {"lora.linear", "lora.inject", "lora.train", "dpo.loss", "timing.measure"} <= {q.id for q in DRIVEN}


def answers_in(asked):
    """Names of everything at the top level of the question's module that belongs to an answer, not to a driver."""
    import importlib
    import inspect

    module = importlib.import_module(asked._driver.__module__)
    known = [m.candidate for q in questions() for m in q.misconceptions]
    known += [candidate for q in questions() for candidate in q.alternatives.values()]
    bases = {base for candidate in known if inspect.isclass(candidate) for base in candidate.__mro__}
    used = {name for f in known if inspect.isfunction(f) for name in f.__code__.co_names}
    for name, value in vars(module).items():
        if (
            inspect.getmodule(value) is module
            and (value in bases if inspect.isclass(value) else name in used)
            or isinstance(value, Question)
        ):
            yield name


@pytest.mark.parametrize("asked", DRIVEN, ids=lambda q: q.id)
def test_a_driver_tells_no_answer(asked):
    source, name = driver_source(asked)
    assert name == "driver"
    for word in (".misconception", ".alternative", ".oracle", ".law", ".tolerance", ".driver", "hint=", "@", "Draw"):
        assert word not in source.replace(" @ ", " times "), word
    defined = {s.name for s in ast.parse(source).body if isinstance(s, (ast.FunctionDef, ast.ClassDef))}
    assert not defined & set(answers_in(asked))
    assert not defined & {"_Layer", "_Attention", "_Resampler", "_put_layers", "_step", "_shifted", "_run", "_"}
    assert not any("lecturekit.questions" in line for line in source.splitlines())
    modules = {s.module for s in ast.parse(source).body if isinstance(s, ast.ImportFrom)}
    assert not modules & {q._oracle.partition(":")[0] for q in questions()}


def test_the_test_above_knows_an_answer_when_it_sees_one():
    (linear,) = (asked for asked in DRIVEN if asked.id == "lora.linear")
    assert {"_Layer", "_put_layers", "_step", "merge", "linear"} <= set(answers_in(linear))


@pytest.mark.parametrize("asked", DRIVEN, ids=lambda q: q.id)
def test_a_driver_cut_out_gives_the_same_parts(asked):
    driver = load_driver(driver_source(asked)[0])
    candidates = [asked.reference(), asked.misconceptions[0].candidate, lambda *_: None, lambda *_: 1.0]
    for candidate in candidates:
        for index in range(min(2, asked.cases)):
            case = asked.draw("excerpt", index)
            own = asked.run(candidate, case)
            cut = attempt(candidate, case, driver=driver, kind=asked.kind, seconds=asked.seconds, returns=asked.returns)
            assert (own.failure, own.message) == (cut.failure, cut.message)
            assert (own.parts is None) == (cut.parts is None)
            for part, value in (own.parts or {}).items():
                assert compare(value, cut.parts[part], case, EXACT, part, equal_nan=True) is None


def made(driver):
    asked = Question("test.made", lambda draw: Case(), lab="lab00_test", points=1, slide="")
    asked.driver(driver)
    return asked


def test_a_driver_that_cannot_be_cut_out_is_an_error():
    with pytest.raises(ValueError, match="test.made must be a function at the top level"):
        driver_source(made(lambda candidate, case: None))
    with pytest.raises(ValueError, match="test.made must be a function"):
        driver_source(made(print))


def test_the_name_driver_must_be_free(tmp_path, monkeypatch):
    (tmp_path / "made_module.py").write_text("def driver():\n    pass\n\n\ndef own(candidate, case):\n    pass\n")
    monkeypatch.syspath_prepend(tmp_path)
    import made_module

    with pytest.raises(ValueError, match="uses the name 'driver'"):
        driver_source(made(made_module.own))
