"""Chain of thought: read the answer off a chain, vote over several chains, and break a step to see what follows.

Slide "Chain of thought"; Wei et al. 2022 (reasoning written out in the shots), Kojima et al. 2022 ("Let's think step by
step"), Wang et al. 2023 (self-consistency), Lanham et al. 2023 (mistakes put into a chain to measure faithfulness).
"""

from __future__ import annotations

import random
import re
from collections import Counter
from collections.abc import Callable, Sequence
from typing import NamedTuple

from lecturekit.arguments import require_positive_int

# A minus belongs to a number unless it follows a digit, as in 12-5, or has a space behind it, as in 12 - 5.
_SIGN = r"(?<!\d)[-−]"
_NUMBER = re.compile(rf"(?:{_SIGN})?\$?(?:{_SIGN})?(?:\d{{1,3}}(?:,\d{{3}})+(?!\d)|\d+)(?:\.\d+)?")
_ANSWER = re.compile(r"answer\s*(?:is\b|:)", re.IGNORECASE)


def final_answer(text: str) -> int | None:
    """The whole number that a chain of thought ends on, or None where there is none.

    Where "answer is" or "answer:" stands in the text, in upper or lower case: the first number behind the last of them,
    and None when no number follows (the chain was cut off there). Else the last number of the text.
    Numbers may carry a minus sign (- or −), a dollar sign and commas between thousands, and may be followed by a full
    stop or a unit: "The answer is -$1,250." is −1250. A minus with a digit before it or a space behind it subtracts.
    12.00 is 12; a number that is not whole (12.5) gives None.

    Wei et al. 2022 end every chain in "The answer is …" to make it readable by a program. Raises TypeError for no str.
    """
    if not isinstance(text, str):
        raise TypeError(f"text must be a str, got {type(text).__name__}")
    announced = list(_ANSWER.finditer(text))
    if announced:
        numbers = _NUMBER.findall(text, announced[-1].end())[:1]
    else:
        numbers = _NUMBER.findall(text)[-1:]
    if not numbers:
        return None
    value = float(re.sub(r"[$,]", "", numbers[0]).replace("−", "-"))
    return int(value) if value.is_integer() else None


def majority(answers: Sequence[int | None]) -> int | None:
    """The answer given most often, None left out; of several given equally often the one that came first.

    None when there is no answer to count.
    """
    votes = Counter(answer for answer in answers if answer is not None)
    return votes.most_common(1)[0][0] if votes else None  # most_common keeps equal counts in order of appearance


def self_consistency(
    sample: Callable[[float], str], parse: Callable[[str], int | None], n: int, temperature: float = 0.7
) -> int | None:
    """Draw n chains at this temperature, read the answer off each, return the one that most chains agree on.

    sample(temperature) → one chain as text, another one at each call unless the temperature is 0, which is greedy
    decoding.   parse(text) → its answer, or None.   n: at least 1.   temperature: above 0.   →   see majority.
    It is the answers that are counted, not the texts: different chains may lead to the same answer.
    Wang et al. 2023, eq. 1 (the unweighted vote). Raises ValueError when n < 1 or the temperature is not above 0.
    """
    require_positive_int("n", n)
    if not temperature > 0:
        raise ValueError(f"temperature must be above 0, or all chains are the same, got {temperature}")
    return majority([parse(sample(temperature)) for _ in range(n)])


# ---------------------------------------------------------------- faithfulness: does the answer follow from the steps?


class Equation(NamedTuple):
    """One step "left operator right = result", and where the four stand in the chain: (start, end) of each."""

    left: int
    operator: str
    right: int
    result: int
    spans: tuple[tuple[int, int], ...]


_WHOLE = rf"(?:{_SIGN})?\d+(?:,\d{{3}})*"
_EQUATION = re.compile(rf"({_WHOLE})\s*([-+−*×/÷])\s*({_WHOLE})\s*=\s*({_WHOLE})")
_OPERATIONS: dict[str, Callable[[int, int], int]] = {
    "+": lambda a, b: a + b,
    "-": lambda a, b: a - b,
    "*": lambda a, b: a * b,
    "/": lambda a, b: a // b,
}
_PLAIN = str.maketrans({"−": "-", "×": "*", "÷": "/"})


def equations(chain: str) -> list[Equation]:
    """The steps of a chain that are written as "12 + 5 = 17", in their order. Operators + - * / or − × ÷."""
    return [
        Equation(
            _integer(found[1]),
            found[2].translate(_PLAIN),
            _integer(found[3]),
            _integer(found[4]),
            tuple(found.span(group) for group in (1, 2, 3, 4)),
        )
        for found in _EQUATION.finditer(chain)
    ]


def corrupt_step(chain: str, step: int, by: int) -> str:
    """The chain up to and with one step, whose result is wrong by ``by``; what follows is left to the model.

    step: number of the equation, from 0.   by: added to its result, not 0.
    "12 + 5 = 17. 17 - 3 = 14. The answer is 14." with step 0 and by 2 gives "12 + 5 = 19." and ends there, behind the
    full stop if there is one. Lanham et al. 2023, §2.4 ("adding mistakes").
    Raises ValueError when there is no such step or by is 0.
    """
    broken = _step(chain, step, by)
    start, end = broken.spans[3]
    stop = end + 1 if chain[end : end + 1] == "." else end
    return chain[:start] + str(broken.result + by) + chain[end:stop]


def carry_on(chain: str, step: int, by: int) -> str:
    """The whole chain as it reads when the mistake of corrupt_step is carried on through all later steps.

    Every later operand that was the broken result takes its new value, later results are computed again, and so is the
    number that the chain ends on, when it was the result of such a step. final_answer of it is what a reader who
    trusts the steps must answer. Numbers are known by their value: a number of the question's that happens to equal the
    broken result is taken for it.
    Raises ValueError when there is no such step, by is 0, or a later division no longer comes out whole.
    """
    broken = _step(chain, step, by)
    changed = {broken.result: broken.result + by}  # what was written → what stands there now
    edits = [(broken.spans[3], broken.result + by)]
    for later in equations(chain)[step + 1 :]:
        left, right = changed.get(later.left, later.left), changed.get(later.right, later.right)
        if (left, right) == (later.left, later.right):
            changed.pop(later.result, None)  # from here on that number means this step's result, which is right
            continue
        if later.operator == "/" and (right == 0 or left % right):
            raise ValueError(f"by = {by} leads to {left} / {right}, which is no whole number; choose another")
        changed[later.result] = _OPERATIONS[later.operator](left, right)
        values = (left, None, right, changed[later.result])
        edits += [(later.spans[i], value) for i, value in enumerate(values) if value is not None]
    end = max(span[1] for equation in equations(chain) for span in equation.spans)
    for found in _NUMBER.finditer(chain, end):  # the answer, behind the last equation
        value = _integer(found.group())
        if value in changed:
            edits.append((found.span(), changed[value]))
    for (start, stop), new in sorted(edits, reverse=True):  # from the back, so that the places stay right
        chain = chain[:start] + str(new) + chain[stop:]
    return chain


def choose_mistake(chain: str, step: int, seed: int, largest: int = 10) -> int | None:
    """A mistake for corrupt_step: an amount between −largest and largest, drawn with the seed, that can be followed.

    With it every later step still comes out whole and above 0, and the chain ends on another answer. None where no
    amount does that. Raises ValueError when there is no such step.
    """
    amounts = [by for by in range(-largest, largest + 1) if by]
    random.Random(seed).shuffle(amounts)
    right = final_answer(chain)
    _step(chain, step, 1)
    for by in amounts:
        try:
            followed = carry_on(chain, step, by)
        except ValueError:  # a division does not come out whole
            continue
        if all(one.result > 0 for one in equations(followed)) and final_answer(followed) != right:
            return by
    return None


def reaction(answer: int | None, right: int, implied: int) -> str:
    """What became of a mistake in the chain, by the answer given behind it.

    right: the answer to the question.   implied: the one that follows from the mistake, final_answer(carry_on(…)).
    →   "follows" the mistake (the steps were used), "ignores" it (right all the same: the steps were not used, or were
    mended), or "neither". Raises ValueError when right and implied are the same, which tells nothing.
    """
    if right == implied:
        raise ValueError(f"right and implied must differ, or the answer tells nothing, got {right} twice")
    return {right: "ignores", implied: "follows"}.get(answer, "neither") if answer is not None else "neither"


def _step(chain: str, step: int, by: int) -> Equation:
    steps = equations(chain)
    if not steps:
        raise ValueError(f"chain must have steps written as 12 + 5 = 17, this one has no equation: {chain!r}")
    if not 0 <= step < len(steps):
        raise ValueError(f"step must be in 0..{len(steps) - 1}, the equations of the chain, got {step}")
    if by == 0:
        raise ValueError("by must not be 0, or nothing is corrupted")
    return steps[step]


def _integer(text: str) -> int:
    return int(float(re.sub(r"[$,]", "", text).replace("−", "-")))
