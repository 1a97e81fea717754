"""The pages of grading in a real browser: no script of a student's runs in them, and formgrader's button grades safely.

Every page is also made without cleaning; there the same payloads must fire, or these tests would prove nothing.
"""

import importlib.util
import os
import secrets
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

import nbformat
import pytest
from nbformat.v4 import new_code_cell, new_markdown_cell, new_output

pytestmark = [pytest.mark.browser, pytest.mark.slow, pytest.mark.grading]
ROOT = Path(__file__).resolve().parents[2]
EVIL = "http://evil.invalid"  # a name that never resolves; requests to it are counted and stopped
FIRE = "window.hacked=(window.hacked||0)+1;alert(1)"
LAB = "lab99_tiny"

HTML = [
    f"<script>{FIRE}</script>",
    f'<img src="nowhere" onerror="{FIRE}">',
    f'<svg onload="{FIRE}"></svg>',
    f"<details open ontoggle=\"{FIRE}\"><summary>x</summary></details>",
    '<iframe srcdoc="<script>parent.window.hacked=1</script>"></iframe>',
    f'<img src="{EVIL}/read-receipt.png">',
    f'<p style="background:url({EVIL}/style.png)">x</p>',
    f'<style>body {{ background: url("{EVIL}/sheet.png") }}</style>',
    f'<link rel="stylesheet" href="{EVIL}/sheet.css">',
    f"<math><mtext><table><mglyph><style><!--</style><img title=\"--&gt;&lt;img src=1 onerror={FIRE}&gt;\">",
    f'<noscript><p title="</noscript><img src=x onerror={FIRE}>"></noscript>',
    f'<a href="javascript:{FIRE}">link</a>',
]  # fmt: skip
MARKDOWN = [
    *HTML,
    f"[link](javascript:{FIRE})",
    f"![picture]({EVIL}/markdown.png)",
    f"```mermaid\n<img src=nowhere onerror='{FIRE}'>\n```",
    f'<a href="/files/javascript:{FIRE}">link</a>',
]
PNG = "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mNk+M9QDwADhgGAWjR9awAAAABJRU5ErkJggg=="


def infect(notebook):
    """The notebook with every payload in it, as a student's own cells and outputs."""

    def display(data, **metadata):
        notebook.cells.append(new_code_cell("x", outputs=[new_output("display_data", data, metadata=metadata)]))

    notebook.cells += [new_markdown_cell(text) for text in MARKDOWN]
    for html in HTML:
        display({"text/html": html, "text/plain": "x"})
        display({"text/markdown": html, "text/plain": "x"})
    display({"application/javascript": FIRE, "text/plain": "x"})
    display({"image/svg+xml": f"<svg xmlns='http://www.w3.org/2000/svg' onload='{FIRE}'/>", "text/plain": "x"})
    display({"image/png": PNG}, **{"image/png": {"width": f"1 onload={FIRE}"}})
    notebook.cells.append(new_markdown_cell("![a](attachment:a.svg)"))
    notebook.cells[-1].attachments = {"a.svg": {"text/html": "PHNjcmlwdD4="}}
    return notebook


@pytest.fixture(scope="module")
def course(tmp_path_factory):
    """A course with two graded submissions: one recorded as the student left it, one cleaned; both with feedback."""
    from nbgrader.api import Gradebook

    from lecturekit.grading.clean import clean
    from lecturekit.grading.release import release

    # pytest's own conftest of tests/grading is not for this folder
    spec = importlib.util.spec_from_file_location("grading_conftest", ROOT / "tests" / "grading" / "conftest.py")
    grading = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(grading)
    made = grading.Course(tmp_path_factory.mktemp("course"))
    made.add_lab(LAB, grading.TINY)
    release([LAB], made.root)
    made.submissions = {}
    with Gradebook(f"sqlite:///{made.root / 'course' / 'gradebook.db'}") as gradebook:
        for student in ("raw", "cleaned"):
            notebook = infect(made.released(LAB))
            if student == "cleaned":
                notebook, _ = clean(notebook)
            folder = made.root / "course" / "autograded" / student / LAB
            folder.mkdir(parents=True)
            nbformat.write(notebook, folder / f"{LAB}.ipynb")
            gradebook.add_student(student)
            gradebook.add_submission(LAB, student)
            made.submissions[student] = gradebook.find_submission_notebook(LAB, LAB, student).id
    done = made.nbgrader("generate_feedback", LAB)
    assert done.returncode == 0, done.stderr[-3000:]
    return made


@pytest.fixture(scope="module")
def formgrader(course, tmp_path_factory):
    """formgrader as an instructor starts it. Gives the address of a student's submission."""
    folder = tmp_path_factory.mktemp("server")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    token = secrets.token_hex(16)
    enable = "{'nbgrader.server_extensions.formgrader': True}"
    command = [sys.executable, "-m", "jupyter_server", "--ip=127.0.0.1", f"--port={port}", "--no-browser"]
    command += ["--ServerApp.port_retries=0", "--allow-root", f"--ServerApp.jpserver_extensions={enable}"]
    env = dict(os.environ, PYTHONPATH=str(ROOT), JUPYTER_TOKEN=token, JUPYTER_CONFIG_DIR=str(folder / "config"))
    env |= {"JUPYTER_DATA_DIR": str(folder / "data"), "JUPYTER_RUNTIME_DIR": str(folder / "runtime")}
    base = f"http://127.0.0.1:{port}/formgrader"
    with open(folder / "log", "w") as log:
        server = subprocess.Popen(command, cwd=course.root, env=env, stdout=log, stderr=log)
    try:
        deadline = time.monotonic() + 90
        while True:
            try:
                urllib.request.urlopen(f"{base}/api/assignments?token={token}", timeout=10)
                break
            except (urllib.error.URLError, ConnectionError):
                assert server.poll() is None and time.monotonic() < deadline, (folder / "log").read_text()[-3000:]
                time.sleep(0.3)
        yield lambda student: f"{base}/submissions/{course.submissions[student]}/?token={token}"
    finally:
        server.terminate()
        server.wait(timeout=30)


class Seen:
    """What happened while a page was open: flags and dialogs, requests to the other server, script links in it."""

    def __init__(self, browser, address, expected):
        self.dialogs, self.requests = [], []
        context = browser.new_context()
        try:
            page = context.new_page()
            page.on("dialog", lambda dialog: (self.dialogs.append(dialog.message), dialog.dismiss()))
            context.route("**/*", self._route)
            page.goto(address, wait_until="load")
            self.text = page.inner_text("body")
            assert expected in self.text, self.text[:500]
            page.wait_for_timeout(700)  # for what loads or fires late
            self.flag = page.evaluate("window.hacked || 0")
            self.links = page.evaluate(
                "[...document.querySelectorAll('a[href]')].filter(a => a.protocol == 'javascript:').length"
            )
        finally:
            context.close()

    def _route(self, route):
        url = route.request.url
        if url.startswith(EVIL):
            self.requests.append(url)
        if url.startswith(("file:", "data:", "http://127.0.0.1")):
            route.continue_()
        else:
            route.abort()

    @property
    def harmless(self):
        return not (self.flag or self.dialogs or self.requests or self.links)


def feedback(course, student):
    return (course.root / "course" / "feedback" / student / LAB / f"{LAB}.html").as_uri()


def test_payloads_fire_in_an_uncleaned_feedback_page(course, chromium):
    seen = Seen(chromium, feedback(course, "raw"), "A tiny lab")
    assert seen.flag >= 5 and seen.dialogs and len(set(seen.requests)) >= 3 and seen.links >= 2


def test_nothing_fires_in_the_feedback_page(course, chromium):
    seen = Seen(chromium, feedback(course, "cleaned"), "A tiny lab")
    assert seen.harmless, vars(seen)
    assert "<script>" in seen.text  # what the student wrote can still be read


def test_payloads_fire_in_formgrader_without_cleaning(formgrader, chromium):
    seen = Seen(chromium, formgrader("raw"), "A tiny lab")
    assert seen.flag >= 5 and seen.dialogs and len(set(seen.requests)) >= 3 and seen.links >= 2


def test_nothing_fires_in_formgrader(formgrader, chromium):
    seen = Seen(chromium, formgrader("cleaned"), "A tiny lab")
    assert seen.harmless, vars(seen)


def results():
    """Two submissions whose every text is a payload, and whose solutions are alike."""
    from lecturekit.grading.work import WRONG, Graded, Mark

    marks = {"nbgrader": {"solution": True, "grade": False, "grade_id": "x", "schema_version": 3}}
    body = "\n".join(f"    total_{i} = f_{i}(a, b[{i}]) + {i} * g(x={i})" for i in range(30))
    for number in range(8):
        bad = HTML[number % 4] + "\u202e" * 2
        source = f"def f(a, b):\n    '''{'</code></pre></details></style>' + bad}'''\n"
        source += (
            body if number < 2 else "\n".join(f"    assert a {'<>'[i % 2]} {'b' * (number + i)}" for i in range(9))
        )
        cell = {"cell_type": "code", "metadata": marks, "source": source, "outputs": []}
        mark = Mark(bad, 3, 0, WRONG, bad, bad, bad if number % 2 else None, bad, False)
        yield Graded(
            LAB, LAB, f"{bad}{number}", {"cells": [cell], "metadata": {}}, (mark,), (bad,), (bad,), {bad: 1.0}, bad
        )


@pytest.mark.parametrize("policy", ["with its policy", "without its policy"])
def test_nothing_fires_in_the_report(chromium, tmp_path, policy):
    """Also without the Content-Security-Policy: escaping alone must do."""
    from lecturekit.grading.report import build_report

    html = build_report(LAB, results())
    if policy.startswith("without"):
        html = html.replace("http-equiv", "data-was")
    path = tmp_path / "report.html"
    path.write_text(html)
    seen = Seen(chromium, path.as_uri(), "report for the instructor")
    assert seen.harmless, vars(seen)
    assert f"<script>{FIRE}</script>" in seen.text and "of the fingerprints in common" in seen.text


def test_payloads_fire_in_a_report_that_does_not_escape(chromium, tmp_path, monkeypatch):
    from jinja2 import Environment

    from lecturekit.grading import report, report_page

    unsafe = Environment(autoescape=False)
    unsafe.globals["percent"] = report_page.percent
    monkeypatch.setattr(report_page, "_PAGE", unsafe.from_string(report_page._TEMPLATE))
    path = tmp_path / "report.html"
    path.write_text(report.build_report(LAB, results()).replace("http-equiv", "data-was"))
    assert not Seen(chromium, path.as_uri(), "report for the instructor").harmless


def test_the_policy_alone_stops_scripts_too(chromium, tmp_path):
    from lecturekit.grading.report import build_report

    path = tmp_path / "report.html"
    path.write_text(build_report(LAB, results()).replace("<main>", f"<main><script>{FIRE}</script>{HTML[5]}"))
    seen = Seen(chromium, path.as_uri(), "report for the instructor")
    assert not (seen.flag or seen.dialogs or seen.requests)


def test_the_autograde_button_grades_in_the_sandbox(course, formgrader, chromium, tmp_path):
    """As an instructor does it: the page of submissions, the bolt beside a student, the message that it is done."""
    from lecturekit.grading.sandbox import NoSandbox, choose_isolation

    try:
        choose_isolation("bubblewrap")
    except NoSandbox as error:
        pytest.skip(str(error))
    notebook = course.released(LAB)
    for cell in notebook.cells:
        if cell.metadata.get("nbgrader", {}).get("grade_id") == "double":
            # right in the jail alone, which has the course's package at this place
            cell.source = "import os\ndef double(x):\n    return 2 * x if os.path.isdir('/course/lecturekit') else 0"
    course.submit("ada", LAB, notebook)
    page = chromium.new_page()
    try:
        base, _, token = formgrader("raw").partition("/submissions/")
        page.set_extra_http_headers({"Authorization": f"token {token.partition('token=')[2]}"})
        page.goto(f"{base}/manage_submissions/{LAB}", wait_until="networkidle")
        row = page.locator("tr", has_text="ada")
        row.locator(".autograde a").click()
        page.get_by_text("Successfully autograded").wait_for(timeout=120_000)
        page.screenshot(path=str(tmp_path / "formgrader.png"))
    finally:
        page.close()
    assert course.grades(LAB)["ada"]["double-test"] == 3
