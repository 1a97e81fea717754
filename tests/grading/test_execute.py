"""Grading one notebook: what the student's process may do, and what it cannot do to its marks."""

import json
from dataclasses import replace

import nbformat
import pytest
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook

from lecturekit.grading import landlock
from lecturekit.grading.execute import Grader
from lecturekit.grading.options import MIB, GradingOptions
from lecturekit.grading.sandbox import NoSandbox, choose_isolation
from lecturekit.grading.work import BY_HAND, PASSED, PENDING, WRONG, Graded, Job

pytestmark = pytest.mark.grading
LAB = "lab05_lora"
MERGE = "def merge(weight, A, B, alpha):\n    return weight + alpha / A.shape[0] * (B @ A)"
COUNT = "def storage(shapes, r, bits):\n    n = sum(r * (o + i) for o, i in shapes)\n    return n, n * bits / 8"
QUICK = GradingOptions(cell_seconds=4, notebook_seconds=60, memory=3 * 1024 * MIB, temporary=64 * MIB, output=200_000)


def needs_bubblewrap():
    try:
        choose_isolation("bubblewrap")
    except NoSandbox as error:
        pytest.skip(str(error))


def asking(question, expression, points=10):
    marks = {"grade": True, "solution": False, "locked": True, "schema_version": 3, "points": points, "task": False}
    source = f'check("{question}", {expression})\ngrade("{question}", {expression})'
    return new_code_cell(source, metadata={"nbgrader": marks | {"grade_id": f"{question}-test"}})


def plain(name, source, points=10):
    marks = {"grade": True, "solution": False, "locked": True, "schema_version": 3, "points": points, "task": False}
    return new_code_cell(source, metadata={"nbgrader": marks | {"grade_id": name}})


def job(*cells, **rest):
    cells = [new_code_cell(cell) if isinstance(cell, str) else cell for cell in cells]
    staged = json.loads(nbformat.writes(new_notebook(cells=[new_code_cell("import torch"), *cells])))
    for cell in staged["cells"]:
        cell["source"] = "".join(cell["source"])
    return Job(LAB, "lab05_lora", "alice", staged, seed=20250, **rest)


@pytest.fixture(scope="module")
def grader():
    needs_bubblewrap()
    with Grader(LAB, QUICK) as made:
        yield made


def outcome(graded):
    return {mark.cell: (mark.score, mark.status, mark.kind) for mark in graded.marks}


def shown(graded):
    return [output for cell in graded.executed["cells"] for output in cell.get("outputs", [])]


RIGHT = (10, PASSED, "passed")


def test_right_answers_earn_their_points_and_a_wrong_one_is_named(grader):
    wrong = "def storage(shapes, r, bits):\n    n = sum(r * (o + i) for o, i in shapes)\n    return n, n * bits"
    graded = grader.grade(job(MERGE, asking("lora.merge", "merge"), wrong, asking("lora.count", "storage")))
    assert outcome(graded) == {"lora.merge-test": RIGHT, "lora.count-test": (0, WRONG, "value")}
    assert graded.marks[1].misconception and graded.marks[1].misconception in graded.marks[1].text
    assert graded.problems == ()


def test_jobs_and_results_survive_a_trip_through_json(grader):
    asked = job(MERGE, visible={"t": "x = 1"}, notes=("A note.",))
    assert Job.from_data(json.loads(json.dumps(asked.to_data()))) == asked
    graded = grader.grade(job(MERGE, asking("lora.merge", "merge")))
    assert Graded.from_data(json.loads(json.dumps(graded.to_data()))) == graded


def test_cells_show_what_they_would_in_a_notebook(grader):
    graded = grader.grade(
        job(
            "print('one'); 2 + 2",
            "import os; _ = os.system('echo from a shell')",
            "import matplotlib.pyplot as plt\nplt.plot([1, 2])\nplt.show()",
            "1 / 0",
            "import sys; print('careful', file=sys.stderr)",
            "%%time\nimport asyncio\nawait asyncio.sleep(0)",
            MERGE,
            asking("lora.merge", "merge"),
            "print('below the last test')",
        )
    )
    by_kind = {}
    for output in shown(graded):
        by_kind.setdefault(output["output_type"], []).append(output)
    text = "".join(output["text"] for output in by_kind["stream"])
    assert "one\n" in text and "from a shell" in text and "careful" in text and "Wall time" in text
    assert "below the last test" not in text
    assert by_kind["execute_result"][0]["data"] == {"text/plain": "4"}
    assert "image/png" in by_kind["display_data"][0]["data"]
    assert by_kind["error"][0]["ename"] == "ZeroDivisionError" and "1 / 0" in "".join(by_kind["error"][0]["traceback"])
    assert outcome(graded) == {"lora.merge-test": RIGHT}
    nbformat.validate(nbformat.from_dict(graded.executed))


def test_a_process_that_ends_in_a_cell_is_replaced_and_later_answers_still_count(grader):
    graded = grader.grade(
        job(
            "TWO = 2",
            "import os; os._exit(0)",
            MERGE.replace("alpha /", "TWO / 2 * alpha /"),
            asking("lora.merge", "merge"),
        )
    )
    assert outcome(graded) == {"lora.merge-test": RIGHT}
    assert graded.problems == ("Cell 3 ended its process.",)


def test_an_answer_that_ends_its_process_costs_only_its_own_points(grader):
    deadly = "def storage(shapes, r, bits):\n    import os, signal\n    os.kill(os.getpid(), signal.SIGKILL)"
    graded = grader.grade(job(MERGE, deadly, asking("lora.count", "storage"), asking("lora.merge", "merge")))
    assert outcome(graded) == {"lora.count-test": (0, WRONG, "died"), "lora.merge-test": RIGHT}


def test_an_endless_cell_is_interrupted_and_what_stands_above_it_stays(grader):
    graded = grader.grade(job(MERGE, "LEFT = 1\nwhile True:\n    pass", "print(LEFT)", asking("lora.merge", "merge")))
    assert outcome(graded) == {"lora.merge-test": RIGHT}
    assert [output.get("ename") or output["text"] for output in shown(graded)] == ["CellTimeout", "1\n"]


@pytest.mark.slow
def test_a_notebook_whose_time_is_up_keeps_the_points_of_every_question_that_can_be_answered():
    needs_bubblewrap()
    endless = "while True:\n    pass"
    with Grader(LAB, replace(QUICK, cell_seconds=2, notebook_seconds=7)) as grader:
        graded = grader.grade(
            job(MERGE, asking("lora.merge", "merge"), *[endless] * 4, COUNT, asking("lora.count", "storage"))
        )
    assert outcome(graded) == {"lora.merge-test": RIGHT, "lora.count-test": RIGHT}
    assert "Not run: the notebook's time was up." in graded.problems


@pytest.mark.slow
def test_a_cell_that_ignores_every_interrupt_is_stopped_by_force(grader):
    stubborn = "while True:\n    try:\n        while True: pass\n    except BaseException: pass"
    graded = grader.grade(job(MERGE, stubborn, "print('after')", asking("lora.merge", "merge")))
    assert outcome(graded) == {"lora.merge-test": RIGHT}
    assert [output.get("ename") or output["text"] for output in shown(graded)] == ["CellTimeout", "after\n"]


@pytest.mark.slow
def test_an_answer_that_ignores_every_interrupt_costs_only_its_own_points(grader):
    stubborn = "def storage(*_):\n  while True:\n    try:\n        while True: pass\n    except BaseException: pass"
    graded = grader.grade(job(MERGE, stubborn, asking("lora.count", "storage"), asking("lora.merge", "merge")))
    assert outcome(graded) == {"lora.count-test": (0, WRONG, "timeout"), "lora.merge-test": RIGHT}


def test_a_notebook_with_threads_is_asked_in_a_process_that_has_them(grader):
    thread = "import threading, time\nthreading.Thread(target=time.sleep, args=(1000,), daemon=True).start()"
    lean = "lock = threading.Lock()\n" + MERGE.replace("return", "lock.acquire(); lock.release(); return")
    graded = grader.grade(job(thread, lean, asking("lora.merge", "merge")))
    assert outcome(graded) == {"lora.merge-test": RIGHT}


def test_passing_hands_out_the_reference_for_a_wrong_answer_only_and_then_the_verdict_stands(grader):
    spoiled = (
        "class LoRALinear(torch.nn.Module):\n    def __init__(self, base, r, alpha):\n        super().__init__()\n"
        "        self.base = base"
    )
    graded = grader.grade(
        job(
            MERGE,
            asking("lora.merge", "merge"),
            spoiled,
            asking("lora.linear", "LoRALinear"),
            "from lecturekit.checking import passing\nmine = passing('lora.merge', merge)\nprint(mine is merge)",
            "Layer = passing('lora.linear', LoRALinear)\nlayer = Layer(torch.nn.Linear(3, 4), 2, 4.0)\n"
            "print(layer(torch.ones(1, 3)).shape)",
            "LoRALinear = Layer",
            asking("lora.count", "Layer"),
        )
    )
    text = "".join(output.get("text", "") for output in shown(graded))
    assert "True\n" in text and "torch.Size([1, 4])" in text
    assert outcome(graded)["lora.merge-test"] == RIGHT
    assert outcome(graded)["lora.linear-test"][0] == 0


def test_references_cannot_be_imported_or_read_while_their_questions_are_open(grader):
    graded = grader.grade(
        job(
            "from lecturekit.tuning import lora\nlora.merge",
            "from lecturekit.tuning.lora import add_lora",
            "import lecturekit.questions.lora",
            "import pathlib, lecturekit, sys\n"
            "for top in {pathlib.Path(lecturekit.__file__).parents[1], *map(pathlib.Path, sys.path[:2])}:\n"
            "    for path in top.rglob('*'):\n"
            "        if path.is_file() and 'lecturekit' in str(path) and b'2022, eq. 3' in path.read_bytes():\n"
            "            print('found', path)",
            asking("lora.merge", "lora.merge"),
        )
    )
    errors = [output["ename"] for output in shown(graded) if output["output_type"] == "error"]
    assert errors == ["ImportError", "ImportError", "ModuleNotFoundError"]
    assert not any("found" in output.get("text", "") for output in shown(graded))
    assert outcome(graded)["lora.merge-test"][0] == 0


def test_nothing_that_is_shown_comes_from_a_hidden_case(grader):
    """The answer keeps what it is given in every way it can think of; cells above and below print what they find."""
    greedy = (
        "import mmap, os\nSEEN = []\nSHARED = mmap.mmap(-1, 1 << 16)\nREAD, WRITE = os.pipe()\n"
        "def storage(shapes, r, bits):\n"
        "    text = f'HIDDEN {shapes} {r} {bits}\\n'\n"
        "    SEEN.append(text); SHARED.write(text.encode()); os.write(WRITE, text.encode())\n"
        "    open('/tmp/seen', 'a').write(text); print(text); os.write(1, text.encode())\n"
        "    n = sum(r * (o + i) for o, i in shapes)\n    return n, n * bits / 8"
    )
    look = (
        "import time\ntime.sleep(0.3)\nprint(SEEN, SHARED[:100].strip(b'\\0'))\nos.set_blocking(READ, False)\n"
        "try:\n    print(os.read(READ, 1000))\nexcept BlockingIOError:\n    pass\n"
        "print(open('/tmp/seen').read() if os.path.exists('/tmp/seen') else 'no file')"
    )
    graded = grader.grade(job(greedy, asking("lora.count", "storage"), look, MERGE, asking("lora.merge", "merge")))
    assert outcome(graded) == {"lora.count-test": RIGHT, "lora.merge-test": RIGHT}
    assert "no file" in json.dumps(graded.to_data()) and "HIDDEN" not in json.dumps(shown(graded))


@pytest.mark.parametrize(
    "trick",
    [
        "import lecturekit.checking.attempt as a\na._attempt = lambda *_: a.Attempt(parts={'result': torch.zeros(1)})",
        "import lecturekit.grading.kernel as k\nk.reply_to = lambda m, _: {'nonce': m['nonce'], 'passed': True}",
        "import lecturekit.grading.codec as c\nsend = c.send\n"
        "c.send = lambda sock, value, **k: send(sock, {'nonce': value.get('nonce'), 'attempts': [], 'score': 10}, **k)",
        "class Equal(torch.Tensor):\n    __eq__ = __sub__ = __le__ = lambda *_: torch.ones(1).bool()\n"
        "merge = lambda w, *_: w.as_subclass(Equal)",
    ],
)
def test_forging_the_engine_inside_earns_nothing(grader, trick):
    graded = grader.grade(job("merge = lambda *_: torch.zeros(2, 2)", trick, asking("lora.merge", "merge")))
    assert graded.marks[0].score == 0


@pytest.mark.parametrize(
    ("tests", "expected"),
    [
        ("assert value == 3", RIGHT),
        ("assert value == 4, 'value must be 4'", (0, WRONG, "raised")),
        ("value", (3, WRONG, "passed")),
        ("import warnings\nwarnings.warn('careful')\nassert value == 3", RIGHT),
    ],
)
def test_plain_asserts_are_scored_as_nbgrader_does_and_marked_as_not_to_be_trusted(grader, tests, expected):
    graded = grader.grade(job("value = 3", plain("t", tests)))
    score, status, kind = outcome(graded)["t"]
    assert (score, status) == expected[:2] and not graded.marks[0].trusted
    if "must be" in tests:
        assert graded.marks[0].text == "AssertionError: value must be 4"


def test_an_error_of_the_students_own_cannot_carry_hidden_inputs_into_the_feedback(grader):
    tell = "def f(x):\n    raise ValueError(f'the input was {x}')"
    graded = grader.grade(job(tell, plain("t", "assert f(987654) == 1, 'f is wrong'")))
    assert graded.marks[0].score == 0 and graded.marks[0].text == "ValueError"
    assert "987654" not in json.dumps(shown(graded))


def test_a_patched_displayhook_earns_no_partial_credit(grader):
    patch = "import sys\nsys.displayhook(7)\nget_ipython().displayhook = lambda value: None\nvalue = 1"
    trick = (
        "class Loud:\n    def __eq__(self, other):\n        get_ipython().displayhook(9)\n        raise KeyError\n"
        "value = Loud()"
    )
    graded = grader.grade(job(trick, patch.replace("value = 1", ""), plain("t", "assert value == 3")))
    assert graded.marks[0].score == 0


def test_cells_above_use_what_the_visible_part_of_a_test_defines(grader):
    tests = plain("t", "limit = 5\nassert value < limit\nassert value == 3")
    graded = grader.grade(
        job("value = 3", tests, "print(value + limit)", plain("u", "assert limit == 5"), visible={"t": "limit = 5"})
    )
    assert outcome(graded) == {"t": RIGHT, "u": RIGHT}
    assert shown(graded)[-1]["text"] == "8\n"


def test_a_plain_test_whose_visible_part_ends_the_process_costs_only_its_own_points(grader):
    deadly = "import os\ndef f():\n    os._exit(0)"
    graded = grader.grade(
        job(
            deadly,
            plain("t", "f()\nassert f() == 1"),
            "value = 3",
            plain("u", "assert value == 3"),
            visible={"t": "f()"},
        )
    )
    assert outcome(graded) == {"t": (0, WRONG, "died"), "u": RIGHT}


def test_a_question_that_needs_a_gpu_waits_for_one(grader, monkeypatch):
    from lecturekit.checking.question import get

    monkeypatch.setattr(get("lora.merge"), "needs_gpu", True)
    graded = grader.grade(job(MERGE, asking("lora.merge", "merge"), COUNT, asking("lora.count", "storage")))
    if graded.device:
        pytest.skip(f"this machine has a GPU: {graded.device}")
    assert outcome(graded) == {"lora.merge-test": (None, PENDING, "pending"), "lora.count-test": RIGHT}


def test_written_answers_are_left_for_a_person(grader):
    marks = {"grade": True, "solution": True, "locked": False, "schema_version": 3, "points": 5, "grade_id": "why"}
    graded = grader.grade(job(new_markdown_cell("Because.", metadata={"nbgrader": marks | {"task": False}})))
    assert outcome(graded) == {"why": (None, BY_HAND, "")}


def test_too_much_output_is_cut_off(grader):
    graded = grader.grade(job("for _ in range(20_000):\n    print('x' * 100)", MERGE, asking("lora.merge", "merge")))
    assert outcome(graded) == {"lora.merge-test": RIGHT}
    assert sum(len(output.get("text", "")) for output in shown(graded)) < 2 * QUICK.output
    assert any("cut off" in problem for problem in graded.problems)


LOOK_AROUND = """
import os, socket, pathlib
def attempt(what, do):
    try:
        print(what, 'YES' if do() else 'no')
    except Exception as error:
        print(what, 'no')
attempt('network', lambda: socket.create_connection(('192.0.2.1', 80), 1))
attempt('loopback of the host', lambda: socket.create_connection(('127.0.0.1', PORT), 1))
attempt('shadow', lambda: open('/etc/shadow').read())
attempt('course', lambda: pathlib.Path(COURSE).exists())
attempt('write', lambda: open(os.path.join(os.path.dirname(torch.__file__), 'evil'), 'w').write('x'))
attempt('be root', lambda: os.getuid() == 0)
attempt('other processes', lambda: [p for p in os.listdir('/proc') if p.isdigit() and
        b'pytest' in open(f'/proc/{p}/cmdline', 'rb').read()])
attempt('trace the zygote', lambda: open('/proc/1/mem', 'r+b'))
attempt('secrets in the environment', lambda: [k for k in os.environ if 'GRADING' in k or 'SECRET' in k])
attempt('own files', lambda: open('/tmp/mine', 'w').write('x'))
attempt('own process', lambda: os.system('true') == 0)
"""


def test_the_process_sees_and_reaches_nothing_of_the_machine(grader, tmp_path):
    import socket

    (tmp_path / "gradebook.db").write_text("marks")
    with socket.create_server(("127.0.0.1", 0)) as server:
        ports = f"PORT, COURSE = {server.getsockname()[1]}, {str(tmp_path)!r}\n"
        graded = grader.grade(job(ports + LOOK_AROUND, MERGE, asking("lora.merge", "merge")))
    lines = dict(line.rsplit(" ", 1) for line in shown(graded)[0]["text"].strip().splitlines())
    assert lines.pop("own files") == lines.pop("own process") == "YES"
    assert {what for what, seen in lines.items() if seen == "YES"} == set()


def test_nothing_of_one_notebook_reaches_the_next(grader):
    leave = (
        "import os\nopen('/tmp/left', 'w').write('x'); open('/dev/shm/left', 'w').write('x')\n"
        "if os.fork() == 0:\n    os.setsid()\n    if os.fork() == 0:\n        import time\n        time.sleep(600)\n"
        "    os._exit(0)\n"
        "os.environ['LEFT'] = torch.left = 'x'"
    )
    look = (
        "import os\nprint(os.listdir('/tmp'), os.listdir('/dev/shm'), os.environ.get('LEFT'), hasattr(torch, 'left'),"
        " [open(f'/proc/{p}/comm').read() for p in os.listdir('/proc') if p.isdigit()])"
    )
    grader.grade(job(leave, MERGE, asking("lora.merge", "merge")))
    graded = grader.grade(job(look, MERGE, asking("lora.merge", "merge")))
    text = shown(graded)[0]["text"]
    assert "left" not in text and "None False" in text
    assert text.count("python") <= 4, text  # the zygote, the guard, the notebook


def test_memory_is_bounded(grader):
    bomb = "hoard = []\nwhile True:\n    hoard.append(bytearray(50_000_000))"
    graded = grader.grade(job(bomb, "hoard = None", MERGE, asking("lora.merge", "merge")))
    assert outcome(graded) == {"lora.merge-test": RIGHT}
    assert shown(graded)[0]["ename"] in ("MemoryError", "ProcessDied", "CellTimeout")


def test_a_fork_bomb_stays_in_its_box(grader):
    bomb = "import os\nwhile True:\n    try:\n        os.fork()\n    except OSError:\n        pass"
    graded = grader.grade(job(MERGE, bomb, asking("lora.merge", "merge")))
    assert outcome(graded) == {"lora.merge-test": RIGHT}
    assert outcome(grader.grade(job(MERGE, asking("lora.merge", "merge")))) == {"lora.merge-test": RIGHT}


def test_the_same_student_gets_the_same_numbers_again_and_another_student_others(grader):
    cell = "import random, numpy\nprint(random.random(), numpy.random.rand(), torch.rand(1).item())"
    one = job(cell, MERGE, asking("lora.merge", "merge"))
    texts = [shown(grader.grade(task))[0]["text"] for task in (one, one, replace(one, student="bob"))]
    assert texts[0] == texts[1] != texts[2]


@pytest.mark.slow
@pytest.mark.parametrize("isolation", ["landlock", "none"])
def test_the_other_sandboxes_give_the_same_marks(isolation):
    if isolation == "landlock" and not landlock.available():
        pytest.skip("the kernel has no Landlock")
    wrong = COUNT.replace("/ 8", "")
    with Grader(LAB, replace(QUICK, isolation=isolation)) as grader:
        for _ in range(2):
            graded = grader.grade(job(MERGE, asking("lora.merge", "merge"), wrong, asking("lora.count", "storage")))
            assert outcome(graded) == {"lora.merge-test": RIGHT, "lora.count-test": (0, WRONG, "value")}


def test_without_a_sandbox_it_refuses_and_says_what_to_do(monkeypatch):
    from lecturekit.grading import sandbox

    monkeypatch.setattr(sandbox, "_no_bubblewrap", lambda: "bubblewrap (bwrap) is not installed")
    monkeypatch.setattr(sandbox, "_no_landlock", lambda: "the kernel has no Landlock")
    with pytest.raises(NoSandbox, match="bwrap.*Landlock.*Install bubblewrap.*--unsafe"):
        Grader(LAB)
    assert choose_isolation("none") == "none"
