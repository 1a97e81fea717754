"""nbgrader's round trip for every lab of the course: right, blank, right by another way, and each misconception.

Submission "wrong_3" gives every question its third known mistake, so one notebook tests a mistake of each question.
"""

import copy
import re

import pytest

from lecturekit.checking import questions
from lecturekit.grading.excerpt import answer_source
from lecturekit.grading.release import release
from lecturekit.grading.stage import is_solution, is_test
from lecturekit.labs import labs, to_notebook

# there is one notebook for each row of the questions' misconceptions, and each takes seconds
pytestmark = [pytest.mark.slow, pytest.mark.grading, pytest.mark.models, pytest.mark.timeout(1800)]
LABS = list(labs())


class Lab:
    """A lab's questions, with the cell each is answered in and the name its test cell calls the answer by."""

    def __init__(self, name):
        self.name = name
        self.source = to_notebook(labs()[name])
        self.questions = questions(name)
        self.tests = {asked.id: self._test(asked.id) for asked in self.questions}
        self.answers = {asked.id: asked.id.replace(".", "-") for asked in self.questions}

    def _test(self, question):
        """(nbgrader id of the test cell, name of the answer in it)"""
        for cell in self.source.cells:
            found = re.search(rf'^grade\("{re.escape(question)}", (\w+)\)', cell.source, re.MULTILINE)
            if found and is_test(cell):
                return cell.metadata.nbgrader.grade_id, found.group(1)
        raise AssertionError(f"{self.name} does not grade {question}")

    def solution(self, question, by_id):
        return re.sub(
            r"^ *### (BEGIN|END) SOLUTION\n?", "", by_id(self.source, self.answers[question]).source, flags=re.M
        )

    def given(self, question, candidate):
        """An answer cell with one of the question's known candidates as its own code."""
        return answer_source(candidate, self.tests[question][1])


def without_measuring(notebook):
    """A student who cleared the long cells below the last question, as the lab allows."""
    last = max(place for place, cell in enumerate(notebook.cells) if is_test(cell))
    for cell in notebook.cells[last + 1 :]:
        if cell.cell_type == "code":
            cell.source = "pass"
    return notebook


def submissions(lab, released, by_id):
    """(student, notebook, question → points expected, question → words expected in the feedback)"""
    points = {asked.id: asked.points for asked in lab.questions}

    def answered(sources, quick=True):
        notebook = copy.deepcopy(released)
        for question, source in sources.items():
            by_id(notebook, lab.answers[question]).source = source
        return without_measuring(notebook) if quick else notebook

    right = {question: lab.solution(question, by_id) for question in points}
    yield "perfect", answered(right, quick=False), points, {}
    yield "blank", answered({}, quick=False), dict.fromkeys(points, 0), dict.fromkeys(points, "not attempted")
    for number in range(max(len(asked.alternatives) for asked in lab.questions)):
        sources = {}
        for asked in lab.questions:
            candidates = list(asked.alternatives.values())
            sources[asked.id] = lab.given(asked.id, candidates[number % len(candidates)])
        yield f"another_way_{number + 1}", answered(sources), points, {}
    for number in range(max(len(asked.misconceptions) for asked in lab.questions)):
        wrong = {
            asked.id: asked.misconceptions[number] for asked in lab.questions if number < len(asked.misconceptions)
        }
        sources = right | {question: lab.given(question, known.candidate) for question, known in wrong.items()}
        expected = points | dict.fromkeys(wrong, 0)
        yield f"wrong_{number + 1}", answered(sources), expected, {q: found.name for q, found in wrong.items()}
    yield "mishaps", mishaps(lab, answered(right), by_id), points, {}


def mishaps(lab, notebook, by_id):
    """A right notebook in which a test cell was copied, one deleted, and the answers warn and print to stderr."""
    first, second, *_ = [test for test, _ in lab.tests.values()]
    place = notebook.cells.index(by_id(notebook, first))
    notebook.cells.insert(place + 1, copy.deepcopy(notebook.cells[place]))
    notebook.cells[place + 1].id = "pasted"
    notebook.cells.remove(by_id(notebook, second))
    noise = "import sys, warnings\nwarnings.warn('careful')\nprint('working', file=sys.stderr)\n"
    for answer in lab.answers.values():
        cell = by_id(notebook, answer)
        cell.source = noise + cell.source
        body = re.search(r'"""\n( +)(?=\w)', cell.source)
        if body:  # and once more each time the answer is called
            cell.source = cell.source[: body.end()] + f"warnings.warn('again')\n{body[1]}" + cell.source[body.end() :]
    return notebook


@pytest.fixture(scope="module", params=LABS)
def graded(request, new_course, tmp_path_factory, by_id):
    lab = Lab(request.param)
    course = new_course(tmp_path_factory.mktemp("course"))
    course.add_lab(lab.name, labs()[lab.name].read_text())
    release([lab.name], course.root)
    expected = {}
    for student, notebook, points, words in submissions(lab, course.released(lab.name), by_id):
        course.submit(student, lab.name, notebook)
        expected[student] = (points, words)
    for command in ("autograde", "generate_feedback"):
        done = course.nbgrader(command, lab.name, timeout=1200)
        assert done.returncode == 0, done.stderr[-3000:]
    return lab, course, expected


def test_every_question_has_its_answer_cell_and_points(graded):
    lab, _, _ = graded
    cells = {cell.metadata.nbgrader.grade_id: cell for cell in lab.source.cells if "nbgrader" in cell.metadata}
    for asked in lab.questions:
        assert is_solution(cells[lab.answers[asked.id]])
        assert cells[lab.tests[asked.id][0]].metadata.nbgrader.points == asked.points


def test_scores_are_as_they_should_be(graded):
    lab, course, expected = graded
    grades = course.grades(lab.name)
    found = {
        student: {asked: grades[student][lab.tests[asked][0]] for asked in points}
        for student, (points, _) in expected.items()
    }
    assert found == {student: points for student, (points, _) in expected.items()}


def test_feedback_names_each_mistake(graded):
    lab, course, expected = graded
    for student, (_, words) in expected.items():
        notebook = course.graded(student, lab.name)
        errors = {
            cell.metadata.nbgrader.grade_id: "".join(output.get("text", "") for output in cell.outputs)
            for cell in notebook.cells
            if is_test(cell) and any(output.output_type == "error" for output in cell.outputs)
        }
        assert set(errors) == {lab.tests[question][0] for question in words}, student
        for question, name in words.items():
            assert name in errors[lab.tests[question][0]], (student, question)
        assert lab.name in course.feedback(student, lab.name)


def test_untouched_written_answers_get_nothing_and_need_nobody(graded):
    lab, course, expected = graded
    written = [
        cell.metadata.nbgrader.grade_id
        for cell in lab.source.cells
        if is_solution(cell) and cell.metadata.nbgrader.grade
    ]
    assert written
    for student in expected:
        assert [course.grades(lab.name)[student][name] for name in written] == [0] * len(written)


def test_every_cell_of_a_right_notebook_ran(graded):
    """No cell of the lab fails when run for grading, whoever's answers it goes on with."""
    lab, course, _ = graded
    for student in ("perfect", "blank"):
        failed = [
            (cell.id, output.evalue)
            for cell in course.graded(student, lab.name).cells
            if cell.cell_type == "code" and not is_test(cell)
            for output in cell.outputs
            if output.output_type == "error"
        ]
        assert failed == []
