"""The chain-of-thought questions of lab 11: the answer that a chain ends on, and the vote over several chains.

Wei et al. 2022, "Chain-of-Thought Prompting Elicits Reasoning in Large Language Models"; Wang et al. 2023,
"Self-Consistency Improves Chain of Thought Reasoning in Language Models". What a student writes:
    final_answer(text) → int or None
    self_consistency(sample, parse, n, temperature) → int or None
"""

from __future__ import annotations

import re
import statistics
from collections import Counter
from typing import Any

from lecturekit.checking import Case, Draw, Unfit, question
from lecturekit.checking.compare import describe

LAB = "lab11_prompting"
SLIDE = "Chain of thought"

NAMES = "Ada Ben Cleo Dora Emil Fay Gus Hana Ivo June".split()
THINGS = "apples coins stamps pencils shells marbles tickets buttons".split()

# cot.parse -----------------------------------------------------------------------------------------------------------

EDGES = (
    "something comes behind the answer",
    "the chain mends itself",
    "a thousands comma",
    "a thousand without a comma",
    "below zero",
    "no announced answer",
    "answer with a colon",
    "no number at all",
    "an amount of money",
    "capital letters",
    "a proper minus sign",
    "cut off before the answer",
    "a minus that subtracts",
)


@question("cot.parse", lab=LAB, points=10, slide=SLIDE, cases=len(EDGES) + 1)
def parse(draw: Draw) -> Case:
    """The number that a chain of thought ends on."""
    edge = draw.edge(*EDGES)
    c, a, b = sorted(draw.sizes(3, low=21, high=89))  # so that no result is below 22, nor equal to a number of steps
    total, rest, thing = a + b, a + b - c, draw.choice(THINGS)
    step = f"{total} - {c} = {rest}"
    each, times = 1000 * draw.integer(2, 9) + draw.integer(100, 999), draw.integer(2, 9)
    few = draw.integer(2, 9)
    texts = {  # short enough to be shown whole beside a verdict
        None: f"{a} + {b} = {total}. {step}. The answer is {rest}.",
        "something comes behind the answer": f"{step}. So my answer is now {rest}. That took {few} steps.",
        "the chain mends itself": f"The answer is {total}. No: {step}. Answer: {rest}.",
        "a thousands comma": f"{times} times {each:,}. The answer is {times * each:,}.",
        "a thousand without a comma": f"{times} times {each}. The answer is {times * each}.",
        "below zero": f"{total} - {total + few} = -{few}. The answer is -{few}.",
        "no announced answer": f"To answer this: {step}, so {rest} {thing}, no more.",
        "answer with a colon": f"{step}, answer: {rest} {thing} in {few} steps.",
        "no number at all": f"{draw.choice(NAMES)} counts the {thing} and gives up.",
        "an amount of money": f"{times} times -${each:,}. The answer is -${times * each:,}.",
        "capital letters": f"{step}. THE ANSWER IS {rest}. DONE IN {few} STEPS.",
        "a proper minus sign": f"{total} − {total + few} = −{few}. The answer is −{few}.",
        "cut off before the answer": f"{step}. The answer is",
        "a minus that subtracts": f"{total} - {rest} = {c} {thing}. Check: {rest} = {total}-{c}.",
    }
    return Case(edge, text=texts[edge])


parse.oracle("lecturekit.prompting.cot:final_answer")


@parse.driver
def _(function: Any, case: Case) -> dict[str, Any]:
    """The answer, which may well be None."""
    return {"answer": _number_or_none(function(case.text))}


def _number_or_none(answer: Any) -> int | float | None:
    """An answer as a number of Python's own: numpy's numbers and tensors without dimensions are numbers too."""
    if getattr(answer, "ndim", None) == 0:
        answer = answer.item()
    if isinstance(answer, str):
        raise Unfit(f"the answer must be a number or None, got the text {answer[:40]!r}")
    if answer is not None and (isinstance(answer, bool) or not isinstance(answer, (int, float))):
        raise Unfit(f"the answer must be a number or None, got {describe(answer)}")
    return answer


parse.law(
    "where there is no number there is no answer",
    lambda case, parts: parts["answer"] is None if not re.search(r"\d", case.text) else None,
)


def _numbers(text: str, pattern: str = r"(?:(?<!\d)[-−])?\$?\d[\d,]*") -> list[int]:
    """The whole numbers of a text: what the misconceptions start from."""
    found = [re.sub(r"[$,]", "", one).replace("−", "-") for one in re.findall(pattern, text)]
    return [int(one) for one in found if one.strip("-")]


def _behind(text: str) -> str | None:
    """What stands behind the last announcement of an answer, or None where there is none."""
    announced = list(re.finditer(r"answer(?: is|:)", text, re.IGNORECASE))
    return text[announced[-1].end() :] if announced else None


def _first_behind(text: str, numbers: Any) -> int | None:
    """The rule of the question, with another way to find the numbers of a text."""
    behind = _behind(text)
    if behind is None:
        return next(iter(numbers(text)[-1:]), None)
    return next(iter(numbers(behind)), None)


@parse.misconception(
    "takes the first number of the text",
    hint="A chain begins with the numbers of the question. Where does its answer stand?",
)
def _(text):
    return next(iter(_numbers(text)), None)


@parse.misconception(
    "takes the last number of the text, whatever was announced",
    hint="“The answer is 12. That took 3 steps.” What is the answer, and what is your last number?",
)
def _(text):
    return next(iter(_numbers(text)[-1:]), None)


@parse.misconception(
    "takes the last number behind the announcement",
    hint="“The answer is 12. That took 3 steps.” Which of the numbers behind “is” is announced?",
)
def _(text):
    behind = _behind(text)
    return next(iter(_numbers(text if behind is None else behind)[-1:]), None)


@parse.misconception(
    "takes the first announcement, not the last",
    hint="“The answer is 9. No, … The answer is 8.” Which of the two does the chain end on?",
)
def _(text):
    found = re.search(r"answer(?: is|:)", text, re.IGNORECASE)
    return next(iter(_numbers(text[found.end() :])), None) if found else next(iter(_numbers(text)[-1:]), None)


@parse.misconception(
    "needs the announcement",
    hint="Some chains just stop at their last number. What does yours make of “So 12 are left.”?",
)
def _(text):
    return next(iter(_numbers(_behind(text) or "")), None)


@parse.misconception(
    "takes any “answer” for the announcement",
    hint="“To answer this: 9 - 2 = 7.” Is the answer announced there? Which two announcements does the question name?",
)
def _(text):
    parts = re.split("answer", text, flags=re.IGNORECASE)
    numbers = _numbers(parts[-1])
    return next(iter(numbers if len(parts) > 1 else numbers[-1:]), None)


@parse.misconception(
    "needs “the” before “answer is”",
    hint="A model may write “my answer is”, or “the final answer is”. Which words of it announce the answer?",
)
def _(text):
    announced = list(re.finditer("the answer is|answer:", text, re.IGNORECASE))
    if not announced:
        return next(iter(_numbers(text)[-1:]), None)
    return next(iter(_numbers(text[announced[-1].end() :])), None)


_NEAR_HINT = (
    "“The answer is then 12.” Between announcement and number stands a word. What may stand there in your pattern?"
)


@parse.misconception("looks right behind the announcement only", hint=_NEAR_HINT)
def _(text):
    behind = _behind(text)
    if behind is None:
        return next(iter(_numbers(text)[-1:]), None)
    found = re.match(r"\s*([-−]?\$?\d[\d,]*)", behind)
    return _numbers(found[1])[0] if found else None


@parse.misconception("looks right behind the announcement only", hint=_NEAR_HINT)  # else anywhere
def _(text):
    found = re.findall(r"answer(?: is|:)\s*([-−]?\$?\d[\d,]*)", text, re.IGNORECASE)
    return next(iter(_numbers(found[-1] if found else text)[-1:]), None)


_COMMA_HINT = "“So 7 apples, no more.” Print all that your pattern finds there. What must a number have, beside commas?"


def _pieces(text: str, pattern: str) -> list[int]:
    """As _numbers, but a piece without a digit is none the less read as a number, which fails."""
    return [int(one.replace(",", "")) for one in re.findall(pattern, text.replace("−", "-").replace("$", ""))]


@parse.misconception("takes a lone comma for a number", hint=_COMMA_HINT)
def _(text):
    return _first_behind(text, lambda part: _pieces(part, r"(?:(?<!\d)-)?[\d,]+"))


@parse.misconception("takes a lone comma for a number", hint=_COMMA_HINT)  # and every minus for a sign, as below
def _(text):
    return _first_behind(text, lambda part: _pieces(part, r"-?[\d,]+"))


_DIGITS_HINT = "What do you get for 1250, without a comma? Of how many digits may a number be that has none?"


@parse.misconception("takes three digits only where a number has no comma", hint=_DIGITS_HINT)
def _(text):
    return _first_behind(text, lambda part: _numbers(part, r"(?:(?<!\d)[-−])?\$?\d{1,3}(?:,\d{3})*"))


@parse.misconception("takes three digits only where a number has no comma", hint=_DIGITS_HINT)  # and every minus
def _(text):
    return _first_behind(text, lambda part: _numbers(part, r"[-−]?\$?\d{1,3}(?:,\d{3})*"))


@parse.misconception(
    "reads digits, not numbers", hint="“The answer is 42.” How many numbers are that, and how many digits?"
)
def _(text):
    return _first_behind(text, lambda part: _numbers(part, r"[-−]?\d"))


@parse.misconception(
    "reads the last digit as the answer", hint="“The answer is 42.” How many numbers are that, and how many digits?"
)
def _(text):
    digits = re.findall(r"\d", _behind(text) or text)
    return int(digits[-1]) if digits else None


@parse.misconception(
    "stops at the thousands comma",
    hint="What do you get for 1,250? Does the comma end a number there?",
)
def _(text):
    return _first_behind(text, lambda part: _numbers(part, r"(?:(?<!\d)[-−])?\$?\d+"))


@parse.misconception("loses the minus sign", hint="What do you get for “The answer is -7.”?")
def _(text):
    return _first_behind(text, lambda part: _numbers(part, r"\d[\d,]*"))


_DOLLAR_HINT = "What do you get for “The answer is -$40.”? What stands between the minus and the digits?"


@parse.misconception("loses the minus in front of a dollar sign", hint=_DOLLAR_HINT)
def _(text):
    return _first_behind(text, lambda part: _numbers(part, r"\$?(?:(?<!\d)[-−])?\d[\d,]*"))


@parse.misconception("loses the minus in front of a dollar sign", hint=_DOLLAR_HINT)  # and takes every other one
def _(text):
    return _first_behind(text, lambda part: _numbers(part, r"\$?[-−]?\d[\d,]*"))


@parse.misconception(
    "takes a minus that subtracts for a sign",
    hint="What do you get for “9-2”? What may not stand in front of a minus that belongs to the number behind it?",
)
def _(text):
    return _first_behind(text, lambda part: _numbers(part, r"[-−]?\$?\d[\d,]*"))


@parse.misconception(
    "knows only the keyboard's minus",
    hint="A model also writes “−”, U+2212, which looks like “-”. Print ord() of both. What do you get for “−7”?",
)
def _(text):
    return _first_behind(text, lambda part: _numbers(part, r"(?:(?<!\d)-)?\$?\d[\d,]*"))


@parse.misconception(
    "takes no number with a dollar sign", hint="What do you get for “The answer is $1,250.”, and where is it lost?"
)
def _(text):
    return _first_behind(text, lambda part: _numbers(part, r"(?<![$\d,])(?:(?<!\d)[-−])?\d[\d,]*"))


@parse.misconception(
    "knows the announcement in small letters only",
    hint="A model may write “THE ANSWER IS”, or “Answer:”. Do you look for one spelling only?",
)
def _(text):
    place = max(text.rfind("answer is"), text.rfind("answer:"))
    return next(iter(_numbers(text[place + 7 :])), None) if place >= 0 else next(iter(_numbers(text)[-1:]), None)


@parse.misconception(
    "knows no announcement but “answer is”",
    hint="Some chains end in “Answer: 12”. What do you do with the colon?",
)
def _(text):
    place = text.lower().rfind("answer is")
    return next(iter(_numbers(text[place:])), None) if place >= 0 else next(iter(_numbers(text)[-1:]), None)


@parse.misconception(
    "takes an earlier number when the chain was cut off",
    hint="“12 + 5 = 17. The answer is”: has the chain said its answer? What would you count if you guessed it?",
)
def _(text):
    behind = _numbers(_behind(text) or "")
    return next(iter(behind or _numbers(text)[-1:]), None)


@parse.misconception(
    "gives 0 where there is no answer", hint="0 is a number, and would get a vote. What stands for “no answer”?"
)
def _(text):
    return _first_behind(text, _numbers) or 0


@parse.misconception(
    "fails where there is no number", hint="What does your code do with an empty list, or with no match?"
)
def _(text):
    behind = _behind(text)
    return _numbers(text)[-1] if behind is None else _numbers(behind)[0]


@parse.alternative("commas and signs replaced first, then split")
def _(text):
    text = re.sub(r"(?<=\d),(?=\d{3})", "", text.lower().replace("−", "-").replace("$", ""))
    parts = re.split(r"answer is|answer:", text)
    found = re.findall(r"(?<!\d)-?\d+", parts[-1])
    if not found:
        return None
    return int(found[0] if len(parts) > 1 else found[-1])


@parse.alternative("word by word")
def _(text):
    words = re.sub(r"(?<=\d)-", " ", text.replace("−", "-")).split()
    marks = [i for i in range(len(words)) if words[i].lower() == "answer:"]
    marks += [i for i in range(1, len(words)) if words[i].lower() == "is" and words[i - 1].lower() == "answer"]
    numbers = []
    for i, word in enumerate(words):
        bare = word.strip(".,!?").replace("$", "").replace(",", "")
        if bare.lstrip("-").isdigit():
            numbers.append((i, int(bare)))
    if marks:
        return next((value for i, value in numbers if i > max(marks)), None)
    return numbers[-1][1] if numbers else None


@parse.alternative("split at the announcement, float inside")
def _(chain):
    number = re.compile(r"(?<![\d,])([-−]?)\$?(\d{1,3}(?:,\d{3})+|\d+)")
    parts = re.split(r"(?i)answer(?: is|:)", chain)
    matches = number.findall(parts[-1])
    if not matches:
        return None
    sign, digits = matches[-1] if len(parts) == 1 else matches[0]
    value = float(digits.replace(",", ""))
    return -value if sign else value


# cot.vote ------------------------------------------------------------------------------------------------------------


@question("cot.vote", lab=LAB, points=10, slide=SLIDE, cases=10)
def vote(draw: Draw) -> Case:
    """Self-consistency: draw several chains, let their answers vote."""
    edge = draw.edge(
        "a tie, the smaller number first",
        "a tie, the larger number first",
        "a tie, reached later by the one that came first",
        "most chains end without an answer",
        "no chain has an answer",
        "one chain",
        "nearly all chains agree",
        "an answer of 0",
    )
    low, middle, high = sorted(draw.choice([-1, 1]) * size for size in draw.sizes(3, low=11, high=99))
    # the winner is the smallest or the largest of the three, so that it is neither their mean nor their median
    best, second, other = draw.choice([(low, middle, high), (low, high, middle), (high, low, middle)])
    if edge == "an answer of 0":
        best, second, other = 0, abs(second), abs(other)
    if edge and edge.startswith("a tie"):
        late = "later" in edge  # the first one has its third vote at the very end, when the other has had three
        if not late:
            best, second = sorted([best, second], reverse="larger" in edge)
        between = [best, second if late else best, second, second, other, None]
        between = [between[place] for place in draw.permutation(len(between)).tolist()]
        answers = [best, *between, best if late else second]
    else:
        answers = {
            "most chains end without an answer": [best, best, second, None, None, None, None],
            "no chain has an answer": [None] * draw.integer(3, 5),
            "one chain": [best],
            "nearly all chains agree": [best] * 6 + [second],
        }.get(edge, [best, best, best, second, other, None])
        answers = [answers[place] for place in draw.permutation(len(answers)).tolist()]
        if edge in (None, "an answer of 0"):
            answers = [second, *answers, other]  # neither the first nor the last one wins
    return Case(
        edge,
        chains=_chains(draw, answers, second),
        greedy=_chain(draw, other),
        n=len(answers),
        temperature=draw.choice([0.5, 0.7, 0.9]),
    )


def _chains(draw: Draw, answers: list[int | None], repeated: int) -> list[str]:
    """A text for each answer, all in other words, but for one answer whose chains are the same word by word."""
    same = _chain(draw, repeated)
    return [same if answer == repeated else _chain(draw, answer) for answer in answers]


def _chain(draw: Draw, answer: int | None) -> str:
    """A chain in drawn words, which are hardly ever drawn twice."""
    first, second = draw.integers(100, 999, 2).tolist()
    start = f"{draw.choice(NAMES)} has {first} {draw.choice(THINGS)}, {draw.choice(NAMES)} {second}."
    return f"{start} I do not know." if answer is None else f"{start} The answer is {answer}."


vote.oracle("lecturekit.prompting.cot:self_consistency")


SHIFTS = range(1, 9)
"""What is added to all answers for another vote. A set of a few whole numbers keeps them by their remainder after a
division by 8: under some of these shifts either of two answers comes first, so that no luck lets a set break a tie."""


@vote.driver
def _(function: Any, case: Case) -> dict[str, Any]:
    """Hand over a model that draws chains, and look at the answer and at how it was asked."""
    answer, asked = _voted(function, case, 0)
    others = [_voted(function, case, shift)[0] for shift in SHIFTS]
    return {
        "answer": answer,
        "chains drawn": len(asked),
        "temperatures": sorted(set(asked)),
        "numbers larger by 1 to 8 give an answer larger by 1 to 8": others
        == [None if answer is None else answer + shift for shift in SHIFTS],
    }


def _voted(function: Any, case: Case, shift: int) -> tuple[int | float | None, list[float]]:
    """The answer where every chain's own is larger by shift, and the temperatures at which chains were drawn."""
    asked: list[float] = []

    def sample(temperature: float) -> str:
        if isinstance(temperature, bool) or not isinstance(temperature, (int, float)):
            raise Unfit(f"sample takes a temperature, a number, got {describe(temperature)}")
        asked.append(float(temperature))
        drawn = sum(one > 0 for one in asked) - 1
        return case.chains[drawn % len(case.chains)] if temperature > 0 else case.greedy

    def parse(text: str) -> int | None:
        if not isinstance(text, str):
            raise Unfit(f"parse takes the text of one chain, got {describe(text)}")
        found = re.search(r"The answer is (-?\d+)\.", text)
        return int(found[1]) + shift if found else None

    return _number_or_none(function(sample, parse, case.n, case.temperature)), asked


vote.law(
    "the winner is the answer of a chain that was drawn",
    lambda case, parts: (
        None
        if parts["answer"] is None
        else any(f"The answer is {parts['answer']:.0f}." in chain for chain in case.chains)
    ),
)


def _answers(sample: Any, parse: Any, n: int, temperature: float) -> list[int]:
    """The answers of n chains, None left out: what the misconceptions start from."""
    answers = [parse(sample(temperature)) for _ in range(n)]
    return [answer for answer in answers if answer is not None]


def _leaders(answers: list[int]) -> list[int]:
    """The answers given most often, in the order in which they first came."""
    counts = Counter(answers)
    return [answer for answer, count in counts.items() if count == max(counts.values())]


@vote.misconception(
    "counts texts, not answers",
    hint="Two chains in other words may reach the same number. Do they vote for the same thing in your count?",
)
def _(sample, parse, n, temperature):
    texts = [sample(temperature) for _ in range(n)]
    parsed = [text for text in texts if parse(text) is not None]
    return parse(Counter(parsed).most_common(1)[0][0]) if parsed else None


@vote.misconception(
    "lets chains without an answer vote",
    hint="parse gives None for a chain without an answer. Can “no answer” win the vote?",
)
def _(sample, parse, n, temperature):
    return Counter(parse(sample(temperature)) for _ in range(n)).most_common(1)[0][0]


@vote.misconception(
    "takes an answer of 0 for no answer", hint="if answer: …; for which numbers is that false? Which test means None?"
)
def _(sample, parse, n, temperature):
    answers = [answer for answer in _answers(sample, parse, n, temperature) if answer]
    return _leaders(answers)[0] if answers else None


@vote.misconception("counts no answer as 0", hint="0 is a number. Which chain said it?")
def _(sample, parse, n, temperature):
    return _leaders([parse(sample(temperature)) or 0 for _ in range(n)])[0]


@vote.misconception(
    "gives a tie to the one that came last", hint="Two answers, three votes each: which one does the question ask for?"
)
def _(sample, parse, n, temperature):
    answers = _answers(sample, parse, n, temperature)
    return next((answer for answer in reversed(answers) if answer in _leaders(answers)), None)


@vote.misconception(
    "gives a tie to the smallest number",
    hint="Two answers, three votes each: which of them came first? Does something in your code sort?",
)
def _(sample, parse, n, temperature):
    return min(_leaders(_answers(sample, parse, n, temperature)), default=None)


@vote.misconception(
    "gives a tie to the largest number",
    hint="Two answers, three votes each: which of them came first? By what does your max compare?",
)
def _(sample, parse, n, temperature):
    return max(_leaders(_answers(sample, parse, n, temperature)), default=None)


@vote.misconception(
    "gives a tie to the one that reached its votes first",
    hint="Print the votes after each chain of 4, 9, 9, 4. Which of the two came first, and which had two votes first?",
)
def _(sample, parse, n, temperature):
    answers = _answers(sample, parse, n, temperature)
    counts, winner = Counter(), None
    for answer in answers:
        counts[answer] += 1
        if counts[answer] > counts[winner]:
            winner = answer
    return winner


@vote.misconception(
    "leaves a tie to the order of a set",
    hint="A set keeps its numbers in an order of its own: print set([1, 8]). Which of two answers came first?",
)
def _(sample, parse, n, temperature):
    answers = _answers(sample, parse, n, temperature)
    return max(set(answers), key=answers.count, default=None)


_HALF_HINT = "Of six chains three say 12, and 15, 18 and 20 have one each. Is any answer given more often than 12?"


@vote.misconception("asks for more than half", hint=_HALF_HINT)
def _(sample, parse, n, temperature):
    counts = Counter(_answers(sample, parse, n, temperature))
    return next((answer for answer, count in counts.items() if count > n / 2), None)


@vote.misconception("asks for more than half", hint=_HALF_HINT)  # of the chains that have an answer
def _(sample, parse, n, temperature):
    answers = _answers(sample, parse, n, temperature)
    return next((answer for answer in _leaders(answers) if answers.count(answer) > len(answers) / 2), None)


@vote.misconception(
    "stops once more than half agree",
    hint="The winner is certain by then, but how many chains did you draw, and how many are asked for?",
)
def _(sample, parse, n, temperature):
    counts = Counter()
    for _ in range(n):
        counts.update(_answers(sample, parse, 1, temperature))
        if max(counts.values(), default=0) > n / 2:
            break
    return next(iter(_leaders(counts.elements())), None)


@vote.misconception(
    "calls one greedy chain self-consistency",
    hint="How many chains did you draw? With whom should a single one be consistent?",
)
def _(sample, parse, n, temperature):
    return parse(sample(0.0))


@vote.misconception(
    "draws all chains greedily, so that they are all the same",
    hint="Print the chains. What does temperature 0 do to a model that is asked n times?",
)
def _(sample, parse, n, temperature):
    return next(iter(_leaders(_answers(sample, parse, n, 0.0))), None)


_ONE_HINT = "Print the chains. How many different ones are there, and how many does n ask for?"


@vote.misconception("draws one chain only", hint=_ONE_HINT)
def _(sample, parse, n, temperature):
    return parse(sample(temperature))


@vote.misconception("draws one chain only", hint=_ONE_HINT)  # and counts it n times
def _(sample, parse, n, temperature):
    answer = parse(sample(temperature))
    return Counter(answer for _ in range(n)).most_common(1)[0][0]


@vote.misconception(
    "goes on drawing until n chains have an answer",
    hint="n is how many chains are paid for. What becomes of those without an answer?",
)
def _(sample, parse, n, temperature):
    answers, tries = [], 0
    while len(answers) < n and tries < 10 * n:
        tries += 1
        answers += _answers(sample, parse, 1, temperature)
    return next(iter(_leaders(answers)), None)


@vote.misconception(
    "does not use the temperature", hint="At which temperature were your chains drawn, and who decides that?"
)
def _(sample, parse, n, temperature):
    return next(iter(_leaders(_answers(sample, parse, n, 1.0))), None)


@vote.misconception("takes the mean of the answers", hint="Is the mean of 10 and 20 an answer that any chain gave?")
def _(sample, parse, n, temperature):
    answers = _answers(sample, parse, n, temperature)
    return round(statistics.mean(answers)) if answers else None


@vote.misconception("takes the median of the answers", hint="The middle one by size: is that the one with most votes?")
def _(sample, parse, n, temperature):
    answers = _answers(sample, parse, n, temperature)
    return statistics.median_low(answers) if answers else None


@vote.misconception("takes the last answer", hint="What did the chains before the last one contribute?")
def _(sample, parse, n, temperature):
    return next(iter(_answers(sample, parse, n, temperature)[-1:]), None)


@vote.misconception(
    "returns the number of votes", hint="Counter.most_common gives pairs. Which of the two is the answer?"
)
def _(sample, parse, n, temperature):
    answers = _answers(sample, parse, n, temperature)
    return Counter(answers).most_common(1)[0][1] if answers else None


@vote.misconception(
    "fails when no chain has an answer",
    hint="What does your code do with an empty list of answers? And what should it?",
)
def _(sample, parse, n, temperature):
    return Counter(_answers(sample, parse, n, temperature)).most_common(1)[0][0]


@vote.alternative("statistics.mode, which gives a tie to the first")
def _(sample, parse, n, temperature):
    answers = [parse(sample(temperature)) for _ in range(n)]
    answers = [answer for answer in answers if answer is not None]
    return statistics.mode(answers) if answers else None


@vote.alternative("a dict of counts")
def _(draw_chain, read, count, heat):
    votes, winner = {}, None
    for _ in range(count):
        answer = read(draw_chain(heat))
        if answer is not None:
            votes[answer] = votes.get(answer, 0) + 1
    for answer in votes:
        if winner is None or votes[answer] > votes[winner]:
            winner = answer
    return winner


@vote.alternative("max by count")
def _(sample, parse, n, temperature):
    texts = [sample(temperature) for _ in range(n)]
    answers = [a for a in map(parse, texts) if a is not None]
    return max(answers, key=answers.count, default=None)


@vote.alternative("Counter, the None entry deleted")
def _(sample, parse, n, temperature):
    votes = Counter()
    while votes.total() < n:
        votes[parse(sample(temperature))] += 1
    del votes[None]
    return votes.most_common(1)[0][0] if votes else None
