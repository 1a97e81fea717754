"""The course's secret and the seeds drawn from it."""

import os
import stat
from concurrent.futures import ThreadPoolExecutor

import pytest

from lecturekit.grading.course import SECRET, put_environment_on_path, secret, settings, student_seed


def test_secret_is_made_once_and_readable_by_its_owner_only(tmp_path):
    course = tmp_path / "course"
    key = secret(course)
    assert len(key) == 32 and secret(course) == key
    assert stat.S_IMODE((course / SECRET).stat().st_mode) == 0o600
    assert [path.name for path in course.iterdir()] == [SECRET]  # no temporary file stays behind


def test_two_courses_have_two_secrets(tmp_path):
    assert secret(tmp_path / "a") != secret(tmp_path / "b")


def test_all_who_ask_at_once_get_the_same_secret(tmp_path):
    with ThreadPoolExecutor(16) as pool:
        keys = set(pool.map(secret, [tmp_path] * 64))
    assert len(keys) == 1


@pytest.mark.parametrize("text", ["", "zz" * 32, "ab" * 16])
def test_a_damaged_secret_is_named_and_not_replaced(tmp_path, text):
    (tmp_path / SECRET).write_text(text)
    with pytest.raises(ValueError, match="must hold 64 hexadecimal digits"):
        secret(tmp_path)
    assert (tmp_path / SECRET).read_text() == text


def test_seeds_are_stable_and_differ_by_student_lab_and_course(tmp_path):
    seed = student_seed(tmp_path / "a", "anna", "lab05_lora")
    assert seed == student_seed(tmp_path / "a", "anna", "lab05_lora") and 0 <= seed < 2**63
    others = {
        student_seed(tmp_path / "a", "ben", "lab05_lora"),
        student_seed(tmp_path / "a", "anna", "lab06"),
        student_seed(tmp_path / "a", "annal", "ab05_lora"),  # the same letters, split elsewhere
        student_seed(tmp_path / "b", "anna", "lab05_lora"),
    }
    assert len(others) == 4 and seed not in others


def test_settings_need_a_course(tmp_path):
    with pytest.raises(FileNotFoundError, match="no nbgrader_config.py"):
        settings(tmp_path)


def test_the_environment_is_put_on_path_once(monkeypatch):
    monkeypatch.setenv("PATH", os.pathsep.join(["/usr/bin", "/bin"]))
    put_environment_on_path()
    put_environment_on_path()
    path = os.environ["PATH"].split(os.pathsep)
    assert path[1:] == ["/usr/bin", "/bin"] and os.path.exists(os.path.join(path[0], "alembic"))
