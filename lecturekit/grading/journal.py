"""Results on disk, so that a batch that was stopped goes on where it was.

    course/journal/results/<lab>/<first two digits of the key>/<key>-<student>-<notebook>.json.gz

One file a result. <key> is ``Job.key(fingerprint)``: it depends on everything that the result does. <student> and
<notebook> are hashes of the names: from the file names alone one sees which results belong to the same student and
notebook, and the newest of those is the one that counts now. A file holds two lines: a header with the key and the
sha256 of the rest, and the result as JSON; ``zcat`` shows it. It is written beside its place and then renamed, and can
be read by its owner only, for it holds a student's work.

A file that is damaged, cut off or not ours is removed with a line in the log, and its notebook is graded again.
"""

from __future__ import annotations

import functools
import gzip
import hashlib
import json
import logging
import os
import re
import sys
import tempfile
import time
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

from lecturekit.grading.options import GradingOptions
from lecturekit.grading.work import Graded

log = logging.getLogger(__name__)
FORMAT = 1
# the quickest level: files a sixth larger than with gzip's usual 6, written in less time
COMPRESSION = 1
_NAME = re.compile(r"([0-9a-f]{64})-([0-9a-f]{16})-([0-9a-f]{8})\.json\.gz")
_VERSIONED = ("torch", "nbgrader", "transformers")


@dataclass(frozen=True)
class _Entry:
    """What a file's name says. student, notebook: hashes."""

    path: Path
    key: str
    student: str
    notebook: str


class Journal:
    """The results in course/journal. Several processes may read it; one at a time writes the results of a lab."""

    def __init__(self, folder: Path) -> None:
        self.folder = Path(folder) / "results"

    def get(self, key: str) -> Graded | None:
        """The result under this key; None where there is none that can be read."""
        entry = self._find(key)
        return _read(entry) if entry else None

    def put(self, key: str, graded: Graded) -> None:
        """Keep a result, in place of an older one under this key. Raises OSError when it cannot be written."""
        if not re.fullmatch("[0-9a-f]{64}", key):
            raise ValueError(f"a key must be 64 hexadecimal digits, got {key!r}")
        shard = self._lab(graded.lab) / key[:2]
        for folder in (self.folder, shard.parent, shard):
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        body = json.dumps(graded.to_data()).encode()
        header = json.dumps({"format": FORMAT, "key": key, "sha256": hashlib.sha256(body).hexdigest()}).encode()
        # no time in gzip's header: the same result gives the same bytes
        packed = gzip.compress(header + b"\n" + body, COMPRESSION, mtime=0)
        handle, temporary = tempfile.mkstemp(dir=shard, prefix=".")  # mkstemp makes it 0600
        try:
            with os.fdopen(handle, "wb") as file:
                file.write(packed)
            _now(Path(temporary))
            os.replace(temporary, shard / f"{key}-{_hash(graded.student, 16)}-{_hash(graded.notebook, 8)}.json.gz")
        except BaseException:
            Path(temporary).unlink(missing_ok=True)
            raise

    def renew(self, key: str) -> None:
        """Make this result the one that counts now, as when a student hands in an old version again."""
        entry = self._find(key)
        if entry:
            _now(entry.path)

    def results(self, lab: str) -> Iterator[tuple[str, Graded]]:
        """The result that counts now of every student and notebook of a lab, with its key; read one at a time.

        Only file names are held in memory, about 500 bytes a result.
        """
        for entry in self._current(lab):
            graded = _read(entry)
            if graded is not None:
                yield entry.key, graded

    def prune(self, lab: str) -> int:
        """Remove results that a newer one replaced, and what a killed writer left half-written. Returns how many.

        Call it only under the lab's lock.
        """
        current = {entry.path for entry in self._current(lab)}
        old = [entry.path for entry in _entries(self._lab(lab)) if entry.path not in current]
        old += [half for shard in _folders(self._lab(lab)) for half in shard.glob(".*")]
        for path in old:
            path.unlink(missing_ok=True)
        return len(old)

    def _lab(self, lab: str) -> Path:
        if lab in ("", ".", "..") or "/" in lab or os.sep in lab or "\0" in lab:
            raise ValueError(f"a lab's name must be usable as the name of a folder, got {lab!r}")
        return self.folder / lab

    def _find(self, key: str) -> _Entry | None:
        # a few dozen names in each lab's folder of these two digits, even with ten thousand results
        for lab in _folders(self.folder):
            for entry in _entries_in(lab / key[:2]):
                if entry.key == key:
                    return entry
        return None

    def _current(self, lab: str) -> list[_Entry]:
        newest: dict[tuple[str, str], tuple[int, _Entry]] = {}
        for entry in _entries(self._lab(lab)):
            try:
                changed = entry.path.stat().st_mtime_ns
            except OSError:  # removed meanwhile
                continue
            who = (entry.student, entry.notebook)
            if who not in newest or newest[who][0] < changed:
                newest[who] = (changed, entry)
        return [entry for _, entry in newest.values()]


def _folders(folder: Path) -> list[Path]:
    try:
        with os.scandir(folder) as found:
            return sorted(folder / item.name for item in found if item.is_dir(follow_symlinks=False))
    except (FileNotFoundError, NotADirectoryError):
        return []


def _entries(lab: Path) -> Iterator[_Entry]:
    for shard in _folders(lab):
        yield from _entries_in(shard)


def _entries_in(shard: Path) -> Iterator[_Entry]:
    try:
        names = sorted(os.listdir(shard))
    except (FileNotFoundError, NotADirectoryError):
        return
    for name in names:
        match = _NAME.fullmatch(name)
        if match:
            yield _Entry(shard / name, *match.groups())


def _hash(text: str, digits: int) -> str:
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()[:digits]


def _now(path: Path) -> None:
    # the clock itself: what a file system sets advances in steps of some milliseconds, too coarse to tell them apart
    now = time.time_ns()
    os.utime(path, ns=(now, now))


def _read(entry: _Entry) -> Graded | None:
    """One file's result. What cannot be one is removed; what cannot be read is left alone."""
    try:
        packed = entry.path.read_bytes()
    except FileNotFoundError:
        return None
    except OSError as error:
        log.warning("the journal's %s cannot be read, its notebook will be graded again: %s", entry.path, error)
        return None
    try:
        head, _, body = gzip.decompress(packed).partition(b"\n")
        if json.loads(head) != {"format": FORMAT, "key": entry.key, "sha256": hashlib.sha256(body).hexdigest()}:
            raise ValueError("the header does not fit")
        graded = Graded.from_data(json.loads(body))
        if (_hash(graded.student, 16), _hash(graded.notebook, 8)) != (entry.student, entry.notebook):
            raise ValueError("it belongs to another student or notebook")
        return graded
    except (OSError, EOFError, zlib.error, ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        log.warning("removed %s from the journal, its notebook will be graded again: %s", entry.path, error)
        entry.path.unlink(missing_ok=True)
        return None


@functools.cache
def _code() -> str:
    """A hash of all of lecturekit's source files, as they are when this is first asked."""
    package = Path(__file__).resolve().parents[1]
    code = hashlib.sha256()
    for path in sorted(package.rglob("*.py")):
        content = hashlib.sha256(path.read_bytes()).hexdigest()
        code.update(f"{path.relative_to(package).as_posix()}\0{content}\n".encode())
    return code.hexdigest()[:16]


def identity(lab: str, options: GradingOptions | None = None) -> dict[str, str]:
    """What of this machine a mark depends on, by name: lecturekit's code, versions, settings.

    Machines that grade a lab together must have the same. A GPU is not part of it: it changes no mark, it only gives
    those that are pending without one.
    """
    settings = {name: value for name, value in (options or GradingOptions()).to_data().items() if name != "gpu"}
    return {
        "lab": lab,
        "lecturekit's code": _code(),
        "python": f"{sys.version_info.major}.{sys.version_info.minor}",
        # without "+cpu" or "+cu130": a GPU worker grades for a coordinator that has none
        **{name: version(name).partition("+")[0] for name in _VERSIONED},
        "settings": json.dumps({"profile": "smoke"} | settings, sort_keys=True),
    }


def fingerprint(lab: str, options: GradingOptions | None = None) -> str:
    """`identity` as 64 hexadecimal digits, for ``Job.key``. The source files are read once in a process."""
    return hashlib.sha256(json.dumps(identity(lab, options)).encode()).hexdigest()
