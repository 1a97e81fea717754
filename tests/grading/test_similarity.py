"""Alike are those who share what few others wrote; short, common or given code is never evidence."""

import random

import pytest

from lecturekit.grading.similarity import MIN_TOKENS, Similarity, fingerprints, tokens

LONG = '''
def train(model, batches, steps):
    """Train."""
    state = {name: torch.zeros_like(p) for name, p in model.named_parameters() if p.requires_grad}
    for step, batch in zip(range(steps), batches):
        loss = model(batch["input"]).sum() / batch["weight"]
        loss.backward()
        with torch.no_grad():
            for name, p in model.named_parameters():
                if p.grad is not None:
                    state[name] = 0.9 * state[name] + p.grad
                    p -= 0.01 * state[name]
                    p.grad = None
    return model, state
'''
RENAMED = (
    LONG.replace("state", "momentum").replace("batch", "item").replace("0.01", "1e-2").replace('"""Train."""', "# mine")
)
OTHERWISE = """
def train(m, data, n):
    opt = torch.optim.SGD([p for p in m.parameters() if p.requires_grad], lr=0.01, momentum=0.9)
    it = iter(data)
    while n > 0:
        n -= 1
        try:
            x = next(it)
        except StopIteration:
            break
        opt.zero_grad(set_to_none=True)
        (m(x["input"]).sum() / x["weight"]).backward()
        opt.step()
    return m, opt.state_dict()
"""


def made_up(seed: int) -> str:
    """A program of about 100 tokens, different for each seed."""
    draw = random.Random(seed)
    lines = ["def f(a, b):"]
    forms = [
        "    {} = {} + {}", "    {} = {}[{}]", "    if {} < {}:\n        return {}", "    {} = g({}, {}.x)",
        "    for {} in h({}):\n        k({})", "    {} = [{} * {}]", "    while not {}:\n        {} -= {}",
        "    {}.append({} ** {})", "    assert {} is not {}, {}", "    {} = lambda q: q({}) or {}",
    ]  # fmt: skip
    for _ in range(14):
        lines.append(draw.choice(forms).format(*(draw.choice("abcde") for _ in range(3))))
    return "\n".join([*lines, "    return a"])


def varied(seed: int) -> str:
    """A program of about 130 tokens whose structure, not only its names, is its own: nested expressions at random."""
    draw = random.Random(seed)

    def expression(depth: int) -> str:
        if depth == 0:
            return draw.choice(["a", "b.x", "1", "'s'", "c[0]"])
        form = draw.choice(["({} {op} {})", "f({}, {})", "[{}, {}]", "({} if {} else d)", "({}, -{})", "g({})[{}]"])
        operator = draw.choice("+ - * / @ ** // % & | ^ < > == !=".split())
        return form.format(expression(depth - 1), expression(depth - 1), op=operator)

    starts = ["x = ", "return ", "assert ", "y += ", "del ", "yield ", "await ", "z: int = "]
    return "def f(a, b, c):\n" + "\n".join(f"    {draw.choice(starts)}{expression(2)}" for _ in range(8))


def a_class(size=40, **others):
    found = Similarity({"train": "def train(model, batches, steps):\n    raise NotImplementedError"})
    for number in range(size):
        found.add(f"s{number:05}", "train", made_up(number))
    for student, source in others.items():
        found.add(student, "train", source)
    return found.alike()


def test_a_renamed_copy_is_found_with_its_cell():
    (alike,) = a_class(ann=LONG, bob=RENAMED)
    assert alike.students == ("ann", "bob") and alike.share > 0.9 and [cell for cell, _ in alike.cells] == ["train"]


def test_the_same_task_solved_in_another_way_is_not_reported():
    assert a_class(ann=LONG, bob=OTHERWISE) == []


def test_independent_solutions_are_not_reported():
    assert a_class(size=200) == []


def test_a_copy_with_a_part_rewritten_is_still_found():
    changed = LONG.replace(
        "    return model, state\n", "    print(len(state))\n    result = (model, state)\n    return result\n"
    )
    (alike,) = a_class(ann=LONG, bob=changed)
    assert 0.6 <= alike.share <= 1


def test_several_who_share_a_solution_are_one_group():
    (alike,) = a_class(ann=LONG, bob=RENAMED, cyd=LONG)
    assert alike.students == ("ann", "bob", "cyd")


def test_what_half_the_class_writes_is_never_suspicious():
    half = {f"t{number}": LONG for number in range(40)}
    assert a_class(size=40, **half) == []
    assert a_class(size=3, **{f"t{number}": LONG for number in range(3)}) == []


def test_a_short_answer_is_never_reported():
    short = "def merge(weight, A, B, alpha):\n    r = A.shape[0]\n    return weight + (alpha / r) * (B @ A)"
    assert len(tokens(short)) < MIN_TOKENS
    assert a_class(ann=short, bob=short) == []


def test_what_the_release_gives_is_no_evidence():
    found = Similarity({"train": LONG})
    for number in range(40):
        found.add(f"s{number}", "train", made_up(number))
    found.add("ann", "train", LONG)
    found.add("bob", "train", LONG)
    assert found.alike() == []


def test_too_small_a_class_says_nothing():
    found = Similarity()
    for student in "ab":
        found.add(student, "train", LONG)
    assert found.alike() == []


def test_names_numbers_strings_comments_and_layout_do_not_matter():
    assert tokens("x = f(1, 'a')  # c") == tokens('other=g( 2.5 ,\n "b" )')
    assert tokens('y = f"{x:>3} of {z}"') == tokens("y = 'plain'")
    assert tokens("x.y") != tokens("x + y")


@pytest.mark.parametrize(
    "source",
    ["", "\x00" * 50, "def f(:\n  ((((" * 50, "'" * 999, "\ud800 = 1\n" * 20, "if x:\n\ty\n        z\n" * 20,
     "(" * 300_000, "\\" * 1000, '"""' + "a\n" * 200_000, "%%bash\nrm -rf x\n!ls", "١٢٣ = ٤", "\u202e" * 1000],
)  # fmt: skip
def test_hostile_source_never_raises(source):
    assert isinstance(fingerprints(tokens(source)), frozenset)
    a_class(size=6, ann=source, bob=source)


def test_the_work_grows_with_the_class_not_with_its_square():
    """Counted as pairs that are looked at, not as time: 3,000 solutions have 4.5 million pairs."""
    from lecturekit.grading.similarity import _common

    found = Similarity()
    for number in range(3000):
        found.add(f"s{number:05}", "train", varied(number))
    distinctive = found._distinctive("train")
    assert len(distinctive) > 2900  # else there would be nothing to compare, and this would show nothing
    assert sum(map(len, distinctive.values())) / len(distinctive) > 10
    assert len(_common(distinctive)) < 100_000


def test_one_copy_is_found_among_many_varied_solutions():
    found = Similarity()
    for number in range(1000):
        found.add(f"s{number:05}", "train", varied(number))
    found.add("ann", "train", LONG)
    found.add("bob", "train", RENAMED)
    (alike,) = found.alike()
    assert alike.students == ("ann", "bob")


def test_a_usual_way_to_write_it_makes_no_thousands_of_pairs():
    """4 % of a class of 1,000 wrote the same: more than 30 people, so it is no evidence."""
    assert a_class(size=960, **{f"t{number:02}": LONG for number in range(40)}) == []
    (alike,) = a_class(size=960, **{f"t{number:02}": LONG for number in range(25)})
    assert len(alike.students) == 25
