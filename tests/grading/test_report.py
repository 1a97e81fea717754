"""The instructor's page: its numbers are right, it stands alone, and nothing of a student's gets out of its place."""

import math
import os
import random
import re
import stat
from html.parser import HTMLParser

import pytest

from lecturekit.grading.report import QuestionText, build_report, correlation, wilson, write_report
from lecturekit.grading.work import BY_HAND, PASSED, PENDING, WRONG, Graded, Mark

LAB = "lab05_lora"
CELLS = [("lora.merge", 15), ("lora.linear", 20), ("lora.inject", 15), ("lora.count", 10), ("lora.step", 20)]
MISTAKES = {
    "lora.merge": ["forgets the alpha / r scale", "multiplies A by B in the wrong order"],
    "lora.linear": ["B does not start at zero", "trains the base as well"],
    "lora.step": ["keeps the gradients of the step before"],
}
TEXTS = {
    name: QuestionText(f"Title of {name}", {m: f"Hint about “{m}”" for m in MISTAKES.get(name, [])})
    for name, _ in CELLS
}
SOLUTION = """def merge(weight, A, B, alpha):
    rank = A.shape[0]
    scale = alpha / rank
    update = torch.zeros_like(weight)
    for row in range(update.shape[0]):
        for column in range(update.shape[1]):
            update[row, column] = sum(B[row, k] * A[k, column] for k in range(rank))
    if scale != 1:
        update = update * scale
    return weight + update
"""


def made_up(number: int) -> str:
    """A solution that nobody else has."""
    draw = random.Random(number)
    forms = [
        "    {0} = {1} + {2}", "    {0} = {1}[{2}]", "    if {0} < {1}:\n        return {2}", "    {0} = g({1}, {2}.x)",
        "    for {0} in h({1}):\n        k({2})", "    {0} = [{1} * {2}]", "    while not {0}:\n        {1} -= {2}",
    ]  # fmt: skip
    return "def merge(a, b):\n" + "\n".join(draw.choice(forms).format(*draw.choices("abcde", k=3)) for _ in range(12))


def notebook(source, *, missing=False):
    marks = {"nbgrader": {"solution": True, "grade": False, "grade_id": "lora-merge", "schema_version": 3}}
    cell = {"cell_type": "code", "metadata": marks, "source": source, "outputs": [], "id": "a", "execution_count": 1}
    metadata = {"lecturekit": {"missing": True}} if missing else {}
    return {"cells": [cell], "metadata": metadata, "nbformat": 4, "nbformat_minor": 5}


def submission(student, passes, source="x = 1", notes=(), problems=(), written=None, missing=False):
    """passes: for each question True, False, a misconception's name, a kind after a colon, or None: pending."""
    marks = []
    for (name, points), outcome in zip(CELLS, passes, strict=True):
        cell = name.replace(".", "-") + "-test"
        if outcome is None:
            marks.append(Mark(cell, points, None, PENDING, name))
        elif outcome is True:
            marks.append(Mark(cell, points, points, PASSED, name, "passed"))
        else:
            kind = outcome[1:] if isinstance(outcome, str) and outcome[0] == ":" else "value"
            known = outcome if isinstance(outcome, str) and outcome[0] != ":" else None
            marks.append(Mark(cell, points, 0, WRONG, name, kind, known))
    marks.append(Mark("plain-test", 5, 5, PASSED, None, "passed", trusted=False))
    marks.append(Mark("explain", 15, written, BY_HAND))
    seconds = {"start": 0.02, "cells": 1.5, "judge": 0.4}
    return Graded(
        LAB, LAB, student, notebook(source, missing=missing), tuple(marks), tuple(notes), tuple(problems), seconds
    )


def a_class(size, seed=0):
    """A class such as there might be, one result at a time."""
    draw = random.Random(seed)
    for number in range(size):
        skill = draw.gauss(0.6, 1)
        passes = []
        for place, (name, _) in enumerate(CELLS):
            if draw.random() < 1 / (1 + math.exp(-(skill - 0.5 * (place - 2)) * 1.7)):
                passes.append(True)
            else:
                known = MISTAKES.get(name, [])
                passes.append(draw.choice([*known, *known, ":not attempted", ":raised", ":shape"]))
        notes = ["The test cell lora-merge-test was missing and has been put back."] if number % 23 == 7 else []
        problems = ["Cell 14 was stopped after 120 seconds."] if number % 31 == 3 else []
        if number % 17 == 5:
            passes[3] = None
        source = SOLUTION if number in (11, 19) else made_up(number)
        written = draw.choice([5, 10, 15]) if number % 3 else None
        yield submission(f"student{number:05}", passes, source, notes, problems, written)


class Page(HTMLParser):
    def __init__(self, html):
        super().__init__()
        self.tags, self.words, self._skip = [], [], 0
        self.feed(html)

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        self._skip += tag == "style"
        self.words.append(" ")

    def handle_endtag(self, tag):
        self._skip -= tag == "style"

    def handle_data(self, data):
        if not self._skip:
            self.words.append(data)

    @property
    def text(self):
        return re.sub(r"\s+", " ", "".join(self.words))


def page(*results, **options):
    return build_report(LAB, iter(results), TEXTS, **options)


YES = [True] * 5


def test_misconceptions_are_counted_among_those_who_attempted():
    forgot = ["forgets the alpha / r scale", *YES[1:]]
    blank = [":not attempted", *YES[1:]]
    results = [submission(f"a{i}", forgot) for i in range(41)] + [submission(f"b{i}", YES) for i in range(69)]
    results += [submission(f"c{i}", blank) for i in range(10)]
    text = Page(page(*results)).text
    assert "37 % (41 of 110) forgets the alpha / r scale" in text
    assert "Hint about “forgets the alpha / r scale”" in text
    assert "lora.merge not attempted 10" in text


def test_pass_rate_has_n_and_an_interval():
    results = [submission(f"a{i}", YES) for i in range(8)] + [submission(f"b{i}", [False, *YES[1:]]) for i in range(2)]
    text = Page(page(*results)).text
    assert "15 10 10 8 (80 %) 49 % – 94 %" in text  # Wilson's interval of 8 of 10: 0.490 to 0.943


def test_wilson_interval_agrees_with_its_definition():
    """Its ends are the shares p for which the observed share lies 1.96 standard errors of p away."""
    for right, n in ((0, 5), (1, 7), (8, 10), (50, 50), (3, 1000)):
        for end in wilson(right, n):
            assert abs(right / n - end) == pytest.approx(1.959964 * math.sqrt(end * (1 - end) / n), abs=1e-6)
    with pytest.raises(ValueError, match="0 and n"):
        wilson(3, 2)


def test_discrimination_leaves_the_question_itself_out():
    """Two questions that have nothing to do with each other: a plain item–total correlation would be 0.7."""
    rows = [(first, second) for first in (True, False) for second in (True, False)] * 5
    results = [submission(f"s{i}", [a, b, True, True, True], written=0) for i, (a, b) in enumerate(rows)]
    cells = re.findall(r"lora\.\w+</th>|<td class=\"n\">\s*(-?\d\.\d\d|not defined)</td>", page(*results))
    defined = [value for value in cells if value]
    assert defined[:3] == ["0.00", "0.00", "not defined"]  # everyone passed the third
    assert correlation([1, 1, 1], [1, 2, 3]) is None and correlation([0, 1], [0, 1]) is None
    assert correlation([0, 0, 1, 1], [0, 0, 1, 1]) == pytest.approx(1)


def test_submissions_for_a_person_are_listed_with_the_reason():
    html = page(
        submission("dropped-one", YES, notes=["A copy of the test cell x was left out."]),
        submission("crashed", YES, problems=["The process died in cell 7."]),
        submission("gpu", [True, None, True, True, True], written=3),
    )
    text = Page(html).text
    for words in (
        "dropped-one A copy of the test cell x was left out.",
        "crashed The process died in cell 7.",
        "gpu lora-linear-test",
        "dropped-one explain",
        "gpu plain-test (5)",
    ):
        assert words in text
    assert "gpu explain" not in text


def test_what_a_person_gave_counts():
    without = Page(page(submission("ann", YES))).text
    given = Page(page(submission("ann", YES), manual={("ann", LAB, "explain"): 12.5})).text
    assert "Mean score 85.0" in without and "Mean score 97.5" in given
    assert "ann explain" in without and "ann explain" not in given


def test_what_was_not_handed_in_is_counted_apart():
    text = Page(page(submission("ann", YES), submission("bob", [False] * 5, missing=True))).text
    assert "Submissions graded 1" in text and "Not handed in 1" in text


def test_similar_solutions_stand_side_by_side_with_a_warning():
    html = page(*a_class(60))
    text = Page(html).text
    assert "Similar is not copied: a person must look." in text
    assert "student00011, student00019: 100 % of the fingerprints in common" in text
    assert html.count("torch.zeros_like(weight)") == 2
    assert Page(page(*(submission(f"s{i}", YES, SOLUTION) for i in range(20)))).text.count("None were found.") == 1


HOSTILE = [
    "<script>window.hacked=1</script>",
    '"><img src=x onerror=alert(1)>',
    "</style></pre></details><svg onload=x()>",
]


def test_everything_of_a_student_is_escaped():
    results = [
        submission(
            bad + str(number),
            [bad, bad, ":" + bad, *YES[3:]],
            "'''" + bad + "'''\n" + SOLUTION,
            [bad],
            [bad + " again"],
        )
        for bad in HOSTILE
        for number in range(2)
    ] + list(a_class(30))
    results = [*results, submission("x", YES)]
    html = page(*results)
    found = Page(html)
    assert {tag for tag, _ in found.tags} <= set(
        """html head meta title style body header h1 p nav ul li a main section h2 dl div dt dd img table caption thead
        tr th tbody td br span strong details summary h3 figure figcaption pre code""".split()
    )
    assert not [name for _, attributes in found.tags for name in attributes if name.startswith("on")]
    assert "<script>window.hacked=1</script>0" in found.text


def test_invisible_characters_are_shown_as_escapes():
    html = page(submission("ann\u202e\u2066\x00\x1b\u200b\ud800\u2028", YES, problems=["a\u202eb"]))
    assert "ann\\u{202E}\\u{2066}\\u{0000}\\u{001B}\\u{200B}\\u{D800}\\u{2028}" in html
    assert not re.search("[\x00-\x08\x0e-\x1f\u202a-\u202e\u2066-\u2069\ud800-\udfff]", html)
    html.encode()


def test_the_page_stands_alone_and_is_accessible():
    html = page(*a_class(40))
    found = Page(html)
    policies = [a["content"] for t, a in found.tags if t == "meta" and a.get("http-equiv")]
    assert policies == ["default-src 'none'; img-src data:; style-src 'unsafe-inline'"]
    assert ("html", {"lang": "en"}) in found.tags and "<title>lab05_lora: report</title>" in html
    pictures = [a for t, a in found.tags if t == "img"]
    assert len(pictures) == 2 and all(len(a["alt"]) > 40 and a["src"].startswith("data:image/png") for a in pictures)
    assert not re.search(r"(?:src|href)=\"(?!data:image/png|#)", html) and "@import" not in html
    tables = html.count("<table")
    assert tables == html.count("<caption") > 3
    assert all("scope" in attributes for tag, attributes in found.tags if tag == "th")
    levels = [int(tag[1]) for tag, _ in found.tags if re.fullmatch(r"h\d", tag)]
    assert levels[0] == 1 and levels.count(1) == 1 and all(b - a <= 1 for a, b in zip(levels, levels[1:], strict=False))
    targets = {a["href"][1:] for t, a in found.tags if t == "a"}
    assert targets <= {a.get("id") for _, a in found.tags}


def test_a_report_of_nothing_still_says_so():
    text = Page(page()).text
    assert "Submissions graded 0" in text and "There are no scores to draw." in text


def test_no_more_than_one_notebook_is_held_at_a_time():
    """Each result is alive only while it is taken in: 200 notebooks never exist together."""
    import weakref

    class Heavy(dict):
        """A dict that can be watched."""

    alive: list[weakref.ref] = []
    most = 0

    def results():
        nonlocal most
        for one in a_class(200):
            heavy = Heavy(one.executed)
            alive.append(weakref.ref(heavy))
            result = Graded(one.lab, one.notebook, one.student, heavy, one.marks)
            del heavy, one
            yield result
            del result
            most = max(most, sum(reference() is not None for reference in alive))

    build_report(LAB, results(), TEXTS)
    assert len(alive) == 200 and most <= 2


def test_written_where_asked_whole_and_for_the_owner_only(tmp_path):
    from traitlets.config import Config

    from lecturekit.grading.journal import Journal

    config = Config()
    config.CourseDirectory.root = str(tmp_path)
    config.CourseDirectory.db_url = f"sqlite:///{tmp_path / 'course' / 'gradebook.db'}"
    with pytest.raises(FileNotFoundError, match="nothing of lab05_lora has been graded yet"):
        write_report(config, LAB)
    journal = Journal(tmp_path / "course" / "journal")
    for number, one in enumerate(a_class(5)):
        journal.put(f"{number:064x}", one)
    path = write_report(config, LAB)
    assert path == tmp_path / "course" / "reports" / f"{LAB}.html"
    assert stat.S_IMODE(path.stat().st_mode) == 0o600 and os.listdir(path.parent) == [path.name]
    assert "Submissions graded 5" in Page(path.read_text()).text
    assert write_report(config, LAB, tmp_path / "mine.html").exists()


def test_points_given_in_formgrader_are_read_from_the_gradebook(tiny):
    from nbgrader.api import Gradebook
    from nbgrader.coursedir import CourseDirectory

    from lecturekit.grading.course import settings
    from lecturekit.grading.report import _manual, _stubs

    lab = "lab99_tiny"
    with Gradebook(f"sqlite:///{tiny.root / 'course' / 'gradebook.db'}") as gradebook:
        for student, waits in (("graded", False), ("waiting", True)):
            gradebook.add_student(student)
            gradebook.add_submission(lab, student)
            grade = gradebook.find_grade("explain", lab, lab, student)
            grade.manual_score, grade.needs_manual_grade = 1.5, waits
        gradebook.db.commit()
    coursedir = CourseDirectory(config=settings(tiny.root))
    assert _manual(coursedir, lab) == {("graded", lab, "explain"): 1.5}
    assert "raise NotImplementedError" in _stubs(coursedir, lab)["double"]


def test_a_gradebook_that_cannot_be_read_is_told_in_a_sentence(tiny):
    from nbgrader.coursedir import CourseDirectory

    from lecturekit.grading.course import settings
    from lecturekit.grading.report import _manual
    from lecturekit.labs import LabError

    (tiny.root / "course" / "gradebook.db").write_bytes(b"no database at all, but long enough to be looked at" * 50)
    with pytest.raises(LabError, match="gradebook.db refused"):
        _manual(CourseDirectory(config=settings(tiny.root)), "lab99_tiny")
