"""A sandbox whose grader is not root: there the student's code is the user who made the sandbox's folders."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from grading_attacks.kit import GUARD, LEAK, PRELUDE, RAN, filler
from grading_attacks.machine import LEAVE

ROOT = Path(__file__).resolve().parents[3]
TWO_NOTEBOOKS = """
import os, sys
from lecturekit.grading.options import GradingOptions
from lecturekit.grading.sandbox import Jail
from lecturekit.grading.session import Session

assert os.getuid() != 0
options = GradingOptions(isolation="bubblewrap")
attack = sys.stdin.read()
with Jail("lab05_lora", locked=(), preload=[], options=options, hide=()) as jail:
    for _ in range(2):
        with Session(jail, options, lambda message: {}) as session:
            session.begin(1, [], {})
            for output in session.cell(attack, 20):
                print(output.get("text") or output)
"""
NOT_ROOT = ["bwrap", "--unshare-user", "--uid", "1000", "--gid", "1000", "--dev-bind", "/", "/"]


def _trouble() -> str:
    if not shutil.which("bwrap"):
        return "bubblewrap is not installed"
    nested = [*NOT_ROOT, "bwrap", "--unshare-all", "--ro-bind", "/", "/", "--dev", "/dev", "--proc", "/proc", "true"]
    done = subprocess.run(nested, capture_output=True, text=True, timeout=30, check=False)
    return "" if done.returncode == 0 else f"bubblewrap does not work here without root: {done.stderr.strip()}"


@pytest.mark.skipif(bool(_trouble()), reason=_trouble() or "there is a sandbox")
@pytest.mark.timeout(120)
def test_what_one_notebook_leaves_is_not_there_for_the_next(tmp_path):
    attack = filler(tmp_path)(PRELUDE + GUARD + LEAVE, "leaves_files")
    command = [*(NOT_ROOT if os.getuid() == 0 else []), sys.executable, "-c", TWO_NOTEBOOKS]
    env = dict(os.environ, PYTHONPATH=str(ROOT), OMP_NUM_THREADS="1", TMPDIR=str(tmp_path))
    done = subprocess.run(command, input=attack, env=env, capture_output=True, text=True, timeout=110, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.count(f"{RAN} leaves_files") == 2
    assert LEAK not in done.stdout
