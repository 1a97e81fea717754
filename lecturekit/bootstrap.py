"""Make the environment .venv beside this package, with everything that pyproject.toml pins, in one command.

    python3 -I lecturekit/bootstrap.py                        what the labs need
    python3 -I lecturekit/bootstrap.py grading development    with these extras of pyproject.toml

Run again it takes a moment: a stamp in .venv remembers what was installed. Whatever goes wrong ends in one sentence
that says what to do, and the same command can simply be run again.

Standard library only, and no syntax newer than Python 3.6, so that an old Python can say that it is too old. -I keeps
the modules beside this file out of the way of Python's own. For Linux and macOS; on Windows use environment.yml.
"""

import argparse
import contextlib
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
SUPPORTED = ((3, 11), (3, 12), (3, 13))
STAMP = "lecturekit.json"
LOG = "install.log"

# Measured on Linux with the CPU build of torch: 2.0 GB with grading, 2.4 GB with development too, and pip unpacks
# wheels beside that. The models need another 0.7 GB. The registry's own torch for Linux brings CUDA, several GB more.
NEEDED_BYTES = 4 * 10**9

# What a failed pip wrote → the one sentence to say. The first that is found counts.
REASONS = (
    (r"No space left on device|Errno 28", "the disk is full: free some space"),
    (r"DO NOT MATCH THE HASHES|HashMismatch", "a downloaded file has the wrong checksum: run it again"),
    (r"CERTIFICATE_VERIFY_FAILED|SSLError", "the registry's certificate is not trusted here: name it in PIP_CERT"),
    (
        r"NewConnectionError|Connection refused|Name or service not known|Temporary failure in name resolution|"
        r"nodename nor servname|Network is unreachable|ConnectTimeout|ReadTimeout|Read timed out|ProxyError|"
        r"Max retries exceeded|Could not fetch URL",
        "the package registry cannot be reached: check the network, the proxy and PIP_INDEX_URL",
    ),
    (r"No matching distribution found", "the registry has no such version for this Python and system"),
)


class SetupError(Exception):
    """One sentence for the person at the terminal."""


def main(arguments: list) -> int:
    """Make or complete the environment. Returns 0, or 1 after printing one sentence."""
    parser = argparse.ArgumentParser(prog="bootstrap.py", description="Make .venv with everything the labs need.")
    parser.add_argument("extras", nargs="*", metavar="EXTRA", help="extras of pyproject.toml: grading, development …")
    parser.add_argument("--environment", action="store_true", help="write environment.yml from pyproject.toml instead")
    options = parser.parse_args(arguments)
    try:
        if options.environment:
            write_whole(ROOT / "environment.yml", conda_environment((ROOT / "pyproject.toml").read_text("utf-8")))
        else:
            with lock(ROOT / ".venv.lock"):
                prepare(ROOT, set(options.extras))
    except SetupError as error:
        print("lecturekit: {}".format(error), file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("\nlecturekit: interrupted; run the same command again to go on", file=sys.stderr)
        return 130
    return 0


def prepare(root: Path, extras: set) -> None:
    """Bring root/.venv to what root/pyproject.toml asks for. Raises SetupError."""
    venv = root / ".venv"
    python = venv / "bin" / "python"
    pins = hashlib.sha256((root / "pyproject.toml").read_bytes()).hexdigest()
    stamp = read_stamp(venv)
    version = python_version(python)
    fresh = stamp.get("pins") == pins and stamp.get("python") == version != ""
    if fresh and stamp["root"] == str(root) and extras <= set(stamp["extras"]) and as_named(version):
        return
    check_disk(root)
    extras = extras | set(stamp.get("extras", []))  # what somebody asked for before stays
    if venv.exists() and (stamp.get("root", str(root)) != str(root) or not usable(python)):
        remove_venv(venv)
    if not venv.exists():
        base = find_python(venv)
        say("Making .venv with Python {} ({}) …".format(python_version(base), base))
        make_venv(base, venv)
    elif not stamp:
        say(".venv was not finished: installing what is missing …")
    else:
        say("Other versions or extras are asked for than .venv has: installing them …")
    if stamp and (venv / STAMP).exists():
        (venv / STAMP).unlink()
    install(root, venv, extras)
    silence_news(venv)
    made = {"pins": pins, "python": python_version(python), "extras": sorted(extras), "root": str(root)}
    write_whole(venv / STAMP, json.dumps(made))
    say("The environment .venv is ready.")


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


# ---------------------------------------------------------------- which Python


def find_python(venv: Path) -> str:
    """A Python that the project supports: PYTHON if set, else this one, else the first on PATH. Raises SetupError.

    Never the one inside venv, which may be active just now: it cannot be the base of what takes its place.
    """
    folders = os.environ.get("PATH", os.defpath).split(os.pathsep)
    path = os.pathsep.join(folder for folder in folders if Path(folder) != venv / "bin")
    named = os.environ.get("PYTHON")
    names = [named] if named else [sys.executable, "python3", "python3.13", "python3.12", "python3.11"]
    seen = []
    for name in names:
        found = shutil.which(name, path=path)
        if found and Path(found).parent == venv / "bin":
            continue
        version = python_version(found) if found else ""
        if version and parsed(version) in SUPPORTED:
            return str(found)
        seen.append("{} is {}".format(name, version or ("broken" if found else "not there")))
    wanted = ", ".join("{}.{}".format(*pair) for pair in SUPPORTED)
    raise SetupError(
        "one of Python {} is needed ({}). Install one, or name it: make lab PYTHON=/path/to/python3.12".format(
            wanted, "; ".join(dict.fromkeys(seen))
        )
    )


def python_version(python) -> str:
    """What this interpreter says it is ("3.11.7"), or "" when it does not start."""
    program = "import sys; print('.'.join(map(str, sys.version_info[:3])))"
    done = quiet([str(python), "-I", "-c", program])
    return done.stdout.strip() if done and done.returncode == 0 else ""


def parsed(version: str) -> tuple:
    major, minor = version.split(".")[:2]
    return int(major), int(minor)


def quiet(command: list):
    """Run it and keep what it prints. None when it cannot be started or hangs."""
    try:
        return subprocess.run(
            command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            universal_newlines=True,
            timeout=120,
        )
    except (OSError, subprocess.TimeoutExpired):
        return None


# ---------------------------------------------------------------- the environment


def usable(python: Path) -> bool:
    """Whether the environment has the right Python, with a pip that starts."""
    version = python_version(python)
    if not version or parsed(version) not in SUPPORTED or not as_named(version):
        return False
    pip = quiet([str(python), "-I", "-m", "pip", "--version"])
    return pip is not None and pip.returncode == 0


def as_named(version: str) -> bool:
    """Whether this version is the one of the Python named in PYTHON, if one is."""
    path = shutil.which(os.environ.get("PYTHON") or "")
    named = python_version(path) if path else ""
    return not named or parsed(named) == parsed(version)


def remove_venv(venv: Path) -> None:
    """Delete a spoilt environment, but never a folder that is something else."""
    ours = {"bin", "include", "lib", "lib64", "share", "etc", "pyvenv.cfg", ".gitignore", STAMP, LOG}
    if venv.is_symlink() or not venv.is_dir():
        raise SetupError("{} is not a folder: move it away and run this again".format(venv))
    if not (venv / "pyvenv.cfg").exists() and {path.name for path in venv.iterdir()} - ours:
        raise SetupError("{} is no Python environment: move it away and run this again".format(venv))
    say(".venv is broken, of another Python or from another folder: making it anew …")
    # renamed first, so that an interrupted removal leaves no half environment under the name
    doomed = venv.with_name(".venv.old-{}".format(os.getpid()))
    os.replace(str(venv), str(doomed))
    shutil.rmtree(str(doomed), ignore_errors=True)


def make_venv(base: str, venv: Path) -> None:
    done = quiet([base, "-I", "-m", "venv", str(venv)])
    if done is None or done.returncode:
        said = (done.stdout if done else "").strip().splitlines()
        if any("ensurepip" in line or "No module named" in line for line in said):
            raise SetupError(
                "{0} cannot make environments: install its venv module (Debian, Ubuntu: apt install "
                "python{1}.{2}-venv) and run this again".format(base, *parsed(python_version(base)))
            )
        raise SetupError("{} -m venv failed: {}".format(base, said[-1] if said else "no reason given"))


def install(root: Path, venv: Path, extras: set) -> None:
    """One pip call for everything, its progress on the terminal and its log in .venv/install.log."""
    what = "{}[{}]".format(root, ",".join(sorted(extras))) if extras else str(root)
    log = venv / LOG
    if log.exists():
        log.unlink()
    command = [str(venv / "bin" / "python"), "-I", "-m", "pip", "install", "--retries=2", "--log", str(log)]
    command += ["--disable-pip-version-check", "--no-input", "--editable", what]
    say("Installing (the first time some minutes and a few GB) …")
    if subprocess.call(command, stdin=subprocess.DEVNULL):
        said = log.read_text("utf-8", "replace") if log.exists() else ""
        raise SetupError("the installation failed: {}. All that pip said is in {}.".format(reason(said), log))


def reason(said: str) -> str:
    """Why pip failed, in one sentence, from its log."""
    for pattern, sentence in REASONS:
        if re.search(pattern, said):
            return sentence
    errors = re.findall(r"ERROR: (.*)", said)
    return "pip says `{}`".format(errors[-1].strip()) if errors else "pip gave no reason"


def check_disk(root: Path) -> None:
    free = shutil.disk_usage(str(root)).free
    if free < NEEDED_BYTES:
        raise SetupError(
            "{:.0f} GB of free disk space are needed in {}, there are {:.1f} GB".format(
                NEEDED_BYTES / 1e9, root, free / 1e9
            )
        )


def silence_news(venv: Path) -> None:
    """JupyterLab asks at its first start whether to fetch news, and looks for updates: here it does neither."""
    settings = {"@jupyterlab/apputils-extension:notification": {"fetchNews": "false", "checkForUpdates": False}}
    folder = venv / "share" / "jupyter" / "lab" / "settings"
    folder.mkdir(parents=True, exist_ok=True)
    write_whole(folder / "overrides.json", json.dumps(settings, indent=1) + "\n")


def read_stamp(venv: Path) -> dict:
    """What an earlier run installed; {} when none was finished."""
    try:
        stamp = json.loads((venv / STAMP).read_text("utf-8"))
        return stamp if isinstance(stamp["extras"], list) and isinstance(stamp["root"], str) else {}
    except (OSError, ValueError, KeyError, TypeError):
        return {}


def write_whole(path: Path, text: str) -> None:
    """The file has its new content or its old one, never half."""
    temporary = path.with_name("{}.{}".format(path.name, os.getpid()))
    temporary.write_text(text, "utf-8")
    os.replace(str(temporary), str(path))


@contextlib.contextmanager
def lock(path: Path):
    """One bootstrap at a time; the operating system frees the lock when a process ends, however it ends."""
    try:
        import fcntl
    except ImportError:
        raise SetupError("on Windows make the environment with conda: conda env create -f environment.yml") from None
    try:
        file = open(str(path), "w")  # noqa: SIM115 - closed below, after the block
    except OSError as error:
        raise SetupError("cannot write in {}: {}".format(path.parent, error.strerror)) from None
    try:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            say("Another set-up is running: waiting for it …")
            fcntl.flock(file, fcntl.LOCK_EX)
        yield
    finally:
        file.close()


# ---------------------------------------------------------------- conda


def conda_environment(pyproject: str) -> str:
    """environment.yml with the pins of pyproject.toml: the labs' own and those for grading. Needs Python 3.11."""
    import tomllib

    project = tomllib.loads(pyproject)["project"]
    pins = project["dependencies"] + project["optional-dependencies"]["grading"]
    lines = [
        "# Made from pyproject.toml by `make environment.yml`; do not edit. For Windows, macOS and Linux:",
        "#   conda env create -f environment.yml",
        "#   conda activate {}".format(project["name"]),
        "#   pip install --no-deps --editable .",
        "#   python -m lecturekit.models",
        "#   jupyter lab labs",
        "name: {}".format(project["name"]),
        "channels:",
        "  - conda-forge",
        "  - nodefaults",
        "dependencies:",
        '  - "python{}"'.format(project["requires-python"]),
        "  - pip",
        "  - pip:",
    ]
    return "\n".join(lines + ["      - {}".format(pin) for pin in pins]) + "\n"


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
