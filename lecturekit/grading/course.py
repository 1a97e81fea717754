"""The course folder: nbgrader's settings for this repository, and the secret that hidden cases are drawn from."""

from __future__ import annotations

import hashlib
import hmac
import os
import secrets
import sys
import tempfile
from pathlib import Path
from typing import Any

SECRET = "grading_secret"


def put_environment_on_path() -> None:
    """Let nbgrader find `alembic`, which it starts by its bare name, when this environment is not activated."""
    folder = str(Path(sys.executable).parent)  # not resolved: a virtual environment's python is a link
    path = os.environ.get("PATH", "").split(os.pathsep)
    if folder not in path:
        os.environ["PATH"] = os.pathsep.join([folder, *path])


def settings(root: Path) -> Any:
    """nbgrader's configuration as root/nbgrader_config.py sets it. Raises FileNotFoundError when there is none."""
    from traitlets.config.loader import PyFileConfigLoader

    if not (root / "nbgrader_config.py").exists():
        raise FileNotFoundError(f"no nbgrader_config.py in {root}")
    return PyFileConfigLoader("nbgrader_config.py", path=str(root)).load_config()


def secret(course: Path) -> bytes:
    """The course's secret, 32 random bytes, made on first use and readable by its owner only.

    It is kept as hex in course/grading_secret, a folder that git ignores. Several processes may ask at once: the first
    to finish wins and all get its secret. Raises ValueError when the file does not hold one.
    """
    path = course / SECRET
    if not path.exists():
        course.mkdir(parents=True, exist_ok=True)
        handle, temporary = tempfile.mkstemp(dir=course, prefix=f".{SECRET}.")  # mkstemp makes it 0600
        with os.fdopen(handle, "w") as file:
            file.write(secrets.token_hex(32) + "\n")
        try:
            os.link(temporary, path)  # unlike a rename, this never replaces a secret that another process made
        except FileExistsError:
            pass
        finally:
            os.unlink(temporary)
    text = path.read_text().strip()
    try:
        key = bytes.fromhex(text)
    except ValueError:
        key = b""
    if len(key) != 32:
        raise ValueError(
            f"{path} must hold 64 hexadecimal digits: restore it from a backup, or delete it to make a new one"
        )
    return key


def student_seed(course: Path, student: str, lab: str) -> int:
    """The seed of one student's hidden cases in one lab: the same at every grading, 0 to 2⁶³ − 1, not to be guessed."""
    message = f"{len(student)}:{student}{lab}".encode()  # the length keeps ("ab", "c") apart from ("a", "bc")
    digest = hmac.new(secret(course), message, hashlib.sha256).digest()
    return int.from_bytes(digest[:8], "big") >> 1
