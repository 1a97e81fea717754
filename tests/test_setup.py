"""Setting up: one place for every version, and a bootstrap that repairs what it finds and says what it needs."""

import ast
import json
import os
import re
import shutil
import subprocess
import sys
import textwrap
import time
import tomllib
from importlib import metadata
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

from lecturekit import bootstrap

ROOT = Path(__file__).resolve().parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
EXTRAS = PROJECT["optional-dependencies"]
PINS = [*PROJECT["dependencies"], *(pin for extra in EXTRAS.values() for pin in extra)]


# ---------------------------------------------------------------- versions


@pytest.mark.parametrize("pin", PINS)
def test_every_dependency_has_exactly_one_version(pin):
    requirement = Requirement(pin)
    (only,) = requirement.specifier
    assert only.operator == "=="
    assert "*" not in only.version
    assert [Requirement(other).name for other in PINS].count(requirement.name) == 1


def test_what_is_installed_is_what_is_pinned():
    for pin in [*PROJECT["dependencies"], *EXTRAS["grading"], *EXTRAS["development"]]:
        requirement = Requirement(pin)
        if requirement.marker and not requirement.marker.evaluate():
            continue
        installed = metadata.version(requirement.name)
        assert requirement.specifier.contains(installed), f"{pin}, but {installed} is installed: run make test"


@pytest.mark.parametrize("where", ["lecturekit", "tests"])
def test_what_is_imported_is_pinned(where):
    """No module counts on a package that came along only because another one needs it."""
    pins = PINS if where == "tests" else [*PROJECT["dependencies"], *EXTRAS["grading"]]
    pinned = {re.sub(r"[-_.]+", "-", Requirement(pin).name).lower() for pin in pins} | {"lecturekit"}
    pinned |= {"triton"}  # comes with torch's CUDA build; kernels.py imports what needs it only where it is
    owners = metadata.packages_distributions()
    unpinned = {}
    for path in sorted((ROOT / where).rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            names = []
            if isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom) and not node.level:
                names = [node.module]
            for top in {name.split(".")[0] for name in names} - set(sys.stdlib_module_names) - {"lecturekit"}:
                owner = {re.sub(r"[-_.]+", "-", dist).lower() for dist in owners.get(top, [])}
                if owner and not owner & pinned:
                    unpinned.setdefault(top, str(path.relative_to(ROOT)))
    assert not unpinned


def test_the_bootstrap_and_the_project_name_the_same_pythons():
    wanted = SpecifierSet(PROJECT["requires-python"])
    minors = {(3, minor) for minor in range(30) if wanted.contains(f"3.{minor}.5")}
    assert minors == set(bootstrap.SUPPORTED)


def test_conda_gets_the_same_versions():
    """environment.yml, parsed as conda parses it, holds the pins of the labs and of grading, and is up to date."""
    text = (ROOT / "environment.yml").read_text()
    assert text == bootstrap.conda_environment((ROOT / "pyproject.toml").read_text()), "run make environment.yml"
    conda = yaml.safe_load(text)
    assert set(conda) == {"name", "channels", "dependencies"}
    assert conda["name"] == PROJECT["name"]
    assert "conda-forge" in conda["channels"]
    specs = [spec for spec in conda["dependencies"] if isinstance(spec, str)]
    (by_pip,) = (spec for spec in conda["dependencies"] if not isinstance(spec, str))
    assert set(by_pip) == {"pip"}
    assert "pip" in specs  # conda installs pip's list with the environment's own pip
    (python,) = (Requirement(spec) for spec in specs if spec.startswith("python"))
    assert python.specifier == SpecifierSet(PROJECT["requires-python"])
    listed = {Requirement(pin) for pin in by_pip["pip"]}
    assert listed == {Requirement(pin) for pin in [*PROJECT["dependencies"], *EXTRAS["grading"]]}


# ---------------------------------------------------------------- the bootstrap, piece by piece


def test_it_starts_on_an_old_python():
    ast.parse((ROOT / "lecturekit" / "bootstrap.py").read_text(), feature_version=(3, 6))


def fake_python(folder, name, version):
    folder.mkdir(exist_ok=True)
    path = folder / name
    path.write_text(f"#!/bin/sh\necho {version}\n" if version else "#!/bin/sh\nexit 127\n")
    path.chmod(0o755)
    return str(path)


def only_on_path(monkeypatch, folder):
    monkeypatch.setenv("PATH", str(folder))
    monkeypatch.delenv("PYTHON", raising=False)
    monkeypatch.setattr(bootstrap.sys, "executable", str(folder / "python3"))


def test_an_old_python_is_told_so(tmp_path, monkeypatch):
    fake_python(tmp_path, "python3", "3.8.18")
    fake_python(tmp_path, "python3.12", "")
    only_on_path(monkeypatch, tmp_path)
    with pytest.raises(bootstrap.SetupError) as caught:
        bootstrap.find_python(tmp_path / ".venv")
    for part in ("3.11, 3.12, 3.13 is needed", "python3 is 3.8.18", "python3.12 is broken", "python3.11 is not there"):
        assert part in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_newer_one_beside_it_is_found(tmp_path, monkeypatch):
    fake_python(tmp_path, "python3", "3.14.0")
    good = fake_python(tmp_path, "python3.12", "3.12.4")
    only_on_path(monkeypatch, tmp_path)
    assert bootstrap.find_python(tmp_path / ".venv") == good


def test_the_python_named_by_the_user_is_taken_and_no_other(tmp_path, monkeypatch):
    fake_python(tmp_path, "python3", "3.12.1")
    only_on_path(monkeypatch, tmp_path)
    monkeypatch.setenv("PYTHON", fake_python(tmp_path / "mine", "python3", "3.13.0"))
    assert bootstrap.find_python(tmp_path / ".venv") == str(tmp_path / "mine" / "python3")
    monkeypatch.setenv("PYTHON", fake_python(tmp_path / "old", "python3", "3.9.0"))
    with pytest.raises(bootstrap.SetupError, match="old/python3 is 3.9.0"):
        bootstrap.find_python(tmp_path / ".venv")


def test_the_environment_itself_is_never_the_base_of_a_new_one(tmp_path, monkeypatch):
    inside, outside = tmp_path / ".venv" / "bin", tmp_path / "usr"
    inside.mkdir(parents=True)
    active = fake_python(inside, "python3", "3.12.1")
    good = fake_python(outside, "python3", "3.12.1")
    monkeypatch.setenv("PATH", os.pathsep.join(map(str, (inside, outside))))
    monkeypatch.delenv("PYTHON", raising=False)
    monkeypatch.setattr(bootstrap.sys, "executable", active)
    assert bootstrap.find_python(tmp_path / ".venv") == good


def test_a_full_disk_is_told_before_anything_is_made(tmp_path, monkeypatch):
    (tmp_path / "pyproject.toml").write_text("")
    monkeypatch.setattr(bootstrap.shutil, "disk_usage", lambda path: SimpleNamespace(free=1.25e9))
    with pytest.raises(bootstrap.SetupError, match=r"GB of free disk space are needed in .*, there are 1\.2 GB"):
        bootstrap.prepare(tmp_path, set())
    assert [path.name for path in tmp_path.iterdir()] == ["pyproject.toml"]


@pytest.mark.parametrize(
    "said, sentence",
    [
        ("ERROR: Could not install packages due to an OSError: [Errno 28] No space left on device", "disk is full"),
        ("WARNING: Retrying … NewConnectionError('Connection refused')\nERROR: No matching distribution", "reached"),
        ("ERROR: Could not find a version (from versions: none)\nERROR: No matching distribution found", "no such"),
        ("SSLError(SSLCertVerificationError(1, '[SSL: CERTIFICATE_VERIFY_FAILED]", "certificate"),
        ("ERROR: THESE PACKAGES DO NOT MATCH THE HASHES FROM THE REQUIREMENTS FILE.", "checksum"),
        ("ERROR: something new\n", "something new"),
        ("", "no reason"),
    ],
)
def test_pips_failures_become_one_sentence(said, sentence):
    assert sentence in bootstrap.reason(said)
    assert "\n" not in bootstrap.reason(said)


@pytest.mark.parametrize("what", ["folder", "file", "link"])
def test_a_venv_that_is_something_else_is_never_deleted(tmp_path, what):
    venv = tmp_path / ".venv"
    if what == "folder":
        venv.mkdir()
        (venv / "thesis.txt").write_text("mine")
    elif what == "file":
        venv.write_text("mine")
    else:
        (tmp_path / "elsewhere").mkdir()
        venv.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(bootstrap.SetupError, match="move it away"):
        bootstrap.remove_venv(venv)
    assert os.path.lexists(venv)
    assert what != "folder" or (venv / "thesis.txt").exists()


# ---------------------------------------------------------------- the bootstrap, whole, without a network

# A project that pip can install with nothing but itself: its own build back-end, no dependencies.
BACKEND = """
import zipfile

METADATA = "Metadata-Version: 2.1\\nName: tiny\\nVersion: 1\\nProvides-Extra: grading\\n"
WHEEL = "Wheel-Version: 1.0\\nGenerator: tiny\\nRoot-Is-Purelib: true\\nTag: py3-none-any\\n"

def build_editable(folder, settings=None, metadata=None):
    info = "tiny-1.dist-info/"
    with zipfile.ZipFile(folder + "/tiny-1-py3-none-any.whl", "w") as wheel:
        wheel.writestr(info + "METADATA", METADATA)
        wheel.writestr(info + "WHEEL", WHEEL)
        wheel.writestr(info + "RECORD", "")
        wheel.writestr("tiny.py", "")
    return "tiny-1-py3-none-any.whl"

build_wheel = build_editable
"""
OFFLINE = {"PIP_CONFIG_FILE": os.devnull, "PIP_NO_INDEX": "1"}


@pytest.fixture
def checkout(tmp_path):
    root = tmp_path / "checkout"
    (root / "lecturekit").mkdir(parents=True)
    shutil.copy(ROOT / "lecturekit" / "bootstrap.py", root / "lecturekit")
    (root / "backend.py").write_text(BACKEND)
    (root / "pyproject.toml").write_text(
        '[build-system]\nrequires = []\nbuild-backend = "backend"\nbackend-path = ["."]\n[project]\nname = "tiny"\n'
    )
    return root


def start(root, *extras, **environment):
    command = [sys.executable, "-I", "lecturekit/bootstrap.py", *extras]
    env = {name: value for name, value in os.environ.items() if not name.startswith(("PIP_", "PYTHON"))}
    env |= OFFLINE | environment
    return subprocess.Popen(command, cwd=root, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def run(root, *extras, **environment):
    process = start(root, *extras, **environment)
    out, said = process.communicate(timeout=300)
    return process.returncode, said, out


def stamp(root):
    return json.loads((root / ".venv" / bootstrap.STAMP).read_text())


def works(root):
    python = root / ".venv" / "bin" / "python"
    return subprocess.run([python, "-I", "-c", "import tiny"]).returncode == 0


@pytest.mark.slow
def test_made_once_then_left_alone_then_repaired(checkout):
    code, said, _ = run(checkout)
    assert code == 0, said
    assert works(checkout)
    assert stamp(checkout)["extras"] == []
    news = json.loads((checkout / ".venv/share/jupyter/lab/settings/overrides.json").read_text())
    assert news["@jupyterlab/apputils-extension:notification"]["fetchNews"] == "false"

    assert run(checkout) == (0, "", "")  # nothing to do, nothing to say

    code, said, _ = run(checkout, "grading")
    assert (code, stamp(checkout)["extras"]) == (0, ["grading"])
    assert run(checkout) == (0, "", "")  # what was asked for before stays

    with open(checkout / "pyproject.toml", "a") as file:
        file.write('version = "2"\n')
    code, said, _ = run(checkout)
    assert (code, stamp(checkout)["extras"]) == (0, ["grading"])
    assert "Other versions" in said

    (checkout / ".venv" / bootstrap.STAMP).unlink()  # as if the last installation had been interrupted
    code, said, _ = run(checkout)
    assert code == 0
    assert "was not finished" in said

    for link in (checkout / ".venv" / "bin").glob("python*"):  # the Python beneath was removed
        link.unlink()
        link.symlink_to("/nonexistent/python")
    code, said, _ = run(checkout)
    assert code == 0
    assert "making it anew" in said
    assert works(checkout)


@pytest.mark.slow
def test_a_moved_checkout_gets_a_new_environment(checkout):
    assert run(checkout)[0] == 0
    moved = checkout.with_name("moved")
    checkout.rename(moved)
    code, said, _ = run(moved)
    assert code == 0
    assert "another folder" in said
    assert stamp(moved)["root"] == str(moved)


@pytest.mark.slow
def test_an_environment_killed_while_it_was_made_is_completed(checkout):
    process = start(checkout)
    while not (checkout / ".venv" / "pyvenv.cfg").exists() and process.poll() is None:
        time.sleep(0.01)
    process.kill()
    process.communicate()
    assert not (checkout / ".venv" / bootstrap.STAMP).exists()
    code, said, _ = run(checkout)
    assert code == 0, said
    assert works(checkout)


@pytest.mark.slow
def test_two_at_once_make_one_environment(checkout):
    both = [start(checkout), start(checkout)]
    ended = [(process.communicate(timeout=300)[1], process.returncode) for process in both]
    assert [code for _, code in ended] == [0, 0], ended
    said = "".join(said for said, _ in ended)
    assert said.count("Making .venv") == 1
    assert "waiting for it" in said
    assert works(checkout)


@pytest.mark.slow
def test_an_unreachable_registry_is_one_sentence_and_can_be_tried_again(checkout):
    text = (checkout / "pyproject.toml").read_text()
    (checkout / "pyproject.toml").write_text(text + 'version = "1"\ndependencies = ["torch"]\n')
    backend = (checkout / "backend.py").read_text()
    (checkout / "backend.py").write_text(
        backend.replace("Version: 1\\n", "Version: 1\\nRequires-Dist: torch==2.13.0\\n")
    )
    code, said, _ = run(checkout, PIP_NO_INDEX="", PIP_INDEX_URL="http://127.0.0.1:9/simple")  # nobody listens there
    last = said.strip().splitlines()[-1]
    assert code == 1
    assert last.startswith("lecturekit: the installation failed: the package registry cannot be reached")
    assert str(checkout / ".venv" / bootstrap.LOG) in last
    (checkout / "pyproject.toml").write_text(text)
    (checkout / "backend.py").write_text(backend)
    code, said, _ = run(checkout)
    assert code == 0, said


# ---------------------------------------------------------------- make


@pytest.mark.skipif(not shutil.which("make"), reason="no make")
@pytest.mark.parametrize("target", ["lab", "test"])
def test_make_without_a_python_says_so(tmp_path, target):
    (tmp_path / "Makefile").write_text((ROOT / "Makefile").read_text())
    (tmp_path / "bin").mkdir()
    for tool in ("make", "sh", "id"):
        (tmp_path / "bin" / tool).symlink_to(shutil.which(tool))
    environment = {"PATH": str(tmp_path / "bin")}
    done = subprocess.run(["make", target], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=60)
    assert done.returncode != 0
    assert "there is no python3: install Python 3.11, 3.12 or 3.13" in done.stderr


def test_labs_listen_on_this_machine_only_and_ask_for_a_token():
    recipe = (ROOT / "Makefile").read_text()
    assert "--ip=127.0.0.1" in recipe
    assert "token=" not in recipe
    assert "password" not in recipe


def test_the_hooks_run_the_pinned_ruff():
    hooks = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())["repos"]
    assert [repo["repo"] for repo in hooks] == ["local"]  # nothing to fetch
    for hook in hooks[0]["hooks"]:
        assert hook["entry"].startswith(".venv/bin/ruff ")
        assert {"python", "jupyter"} <= set(hook["types_or"])


def test_importing_the_package_is_cheap():
    """The heavy libraries are imported when a function needs them, so that every command starts at once."""
    program = textwrap.dedent("""
        import sys
        import lecturekit, lecturekit.bootstrap, lecturekit.cli, lecturekit.models
        print([name for name in ("transformers", "datasets", "peft", "nbgrader", "matplotlib") if name in sys.modules])
    """)
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120)
    assert done.stdout.strip() == "[]", done.stderr
