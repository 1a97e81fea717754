"""Make the release: solutions/<lab>/<lab>.py → labs/<lab>/<lab>.ipynb, without solutions or hidden tests.

nbgrader's generate_assignment does the removing and notes the hidden tests in the gradebook. The source notebook it
needs is written beside the .py (git ignores it), so that formgrader's Generate button gives the very same bytes.
"""

from __future__ import annotations

import re
import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path

from lecturekit.grading.course import settings
from lecturekit.labs import LabError, chosen, repository, to_notebook, to_text
from lecturekit.runtime import atomic_write


def release(names: Sequence[str] = (), root: Path | None = None, output: Path | None = None) -> list[Path]:
    """Release the labs named, all by default, of the course at root. Returns the files written.

    output: the folder to release to, labs/ by default. Nothing is replaced there until the whole lab has been made;
    releasing twice writes the same bytes. Raises LabError when nbgrader refuses, with its reason.
    """
    root = (root or repository()).resolve()
    written = []
    for lab, source in chosen(names, root).items():
        atomic_write(source.with_suffix(".ipynb"), to_text(to_notebook(source)))
        target = (output or root / "labs") / lab
        (root / "course").mkdir(exist_ok=True)
        with tempfile.TemporaryDirectory(dir=root / "course", prefix="release-") as folder:
            _generate(lab, root, str(Path(folder).relative_to(root)))
            made = Path(folder) / lab
            for path in sorted(made.rglob("*")):
                if path.is_file():
                    written.append(atomic_write(target / path.relative_to(made), path.read_bytes()))
    return written


def fresh(lab: str, root: Path | None = None) -> bytes:
    """The bytes a release of the lab would write now, made in a course folder of its own that is thrown away."""
    root = (root or repository()).resolve()
    source = chosen([lab], root)[lab]
    with tempfile.TemporaryDirectory(prefix="lecturekit-release-") as folder:
        course = Path(folder)
        shutil.copy(root / "nbgrader_config.py", course)
        (course / "solutions" / lab).mkdir(parents=True)
        shutil.copy(source, course / "solutions" / lab)
        (made,) = release([lab], course)
        return made.read_bytes()


def _generate(lab: str, root: Path, release_directory: str) -> None:
    """nbgrader's generate_assignment with this course's settings, but to another release folder."""
    from nbgrader.apps import NbGraderAPI

    config = settings(root)
    config.CourseDirectory.release_directory = release_directory
    result = NbGraderAPI(config=config).generate_assignment(lab, force=True)
    if not result["success"]:
        log = f"{result.get('log') or ''}\n{result.get('error') or ''}"
        # the first exception is the cause; those after it only say that there was one
        causes = re.findall(r"^\s*[\w.]*(?:Error|Exception): (.+)$", log, re.MULTILINE) or ["it gave no reason"]
        raise LabError(f"nbgrader could not release {lab}: {causes[0]}")
