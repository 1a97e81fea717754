"""What lies in a download, zip or folder, as a list of entries. Nothing is written by a name found in it.

A name in a zip is only ever looked at, never used as a path; contents are read as a stream and counted while they are
read, because what a zip says about its own sizes is the word of whoever made it.
"""

from __future__ import annotations

import hashlib
import lzma
import os
import re
import shutil
import stat
import struct
import tempfile
import unicodedata
import zipfile
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import IO

from lecturekit.grading.reader import LIMITS

SYMLINK_OR_SPECIAL = "it is a link or a special file"
COLLECTING = ".collecting-"  # how a file begins that is being written
ERRORS = (OSError, EOFError, ValueError, RuntimeError, zipfile.BadZipFile, zlib.error, lzma.LZMAError, struct.error)


@dataclass(frozen=True)
class Caps:
    """How much one download may hold; all sizes in bytes, unpacked."""

    file: int = LIMITS.file_bytes
    inner_zip: int = 2**30  # a zip inside the download
    total: int = 64 * 2**30
    ratio: int = 1100  # unpacked to packed; deflate reaches 1032, so a page of equal lines passes and no bomb does
    ratio_from: int = 50 * 2**20  # below this much a ratio means nothing
    directory: int = 500 * 2**20  # a zip's list of contents
    inner_directory: int = 10 * 2**20


CAPS = Caps()


class Refused(Exception):
    """Why an entry is not taken."""


@dataclass(frozen=True)
class Entry:
    """One file of a download.

    path: its folders and name.   inner: folders and name inside a zip that lies at `path`, () for other files.
    when: what the download says about its last change, as text that sorts, "" for nothing.   archive: where to read it;
    None for a file of a folder, which lies at `file`.
    """

    path: tuple[str, ...]
    inner: tuple[str, ...] = ()
    when: str = ""
    archive: zipfile.ZipFile | None = None
    info: zipfile.ZipInfo | None = None
    file: Path | None = None

    @property
    def name(self) -> str:
        return (self.inner or self.path)[-1]


@dataclass
class Download:
    """A zip, a notebook, or a folder of zips, notebooks and folders. Use as a context manager.

    entries: what can be read.   refused: (path, why) for what can not.
    """

    source: Path
    caps: Caps = CAPS
    entries: list[Entry] = field(default_factory=list)
    refused: list[tuple[tuple[str, ...], str]] = field(default_factory=list)
    total: int = 0

    def __enter__(self) -> Download:
        """Raises FileNotFoundError when there is no such download, ValueError when it is none."""
        self._folder = Path(tempfile.mkdtemp(prefix="lecturekit-collect-"))
        self._open: list[zipfile.ZipFile] = []
        try:
            if self.source.is_dir():
                self._walk()
            elif zipfile.is_zipfile(self.source):
                self._add_zip(self.source, (), self.caps.directory)
            elif self.source.suffix == ".ipynb" and self.source.is_file():
                self.entries.append(Entry((self.source.name,), file=self.source))
            elif not self.source.exists():
                raise FileNotFoundError(
                    f"{self.source} does not exist: name a downloaded zip, or a folder of submissions"
                )
            else:
                raise ValueError(f"{self.source} is neither a zip, a notebook nor a folder")
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        for archive in self._open:
            archive.close()
        shutil.rmtree(self._folder, ignore_errors=True)

    def copy(self, entry: Entry, folder: Path, cap: int | None = None) -> tuple[Path, str]:
        """Copy an entry to a new file in a folder; its path and SHA-256. Raises Refused, and leaves nothing then."""
        handle, name = tempfile.mkstemp(dir=folder, prefix=COLLECTING)
        try:
            digest = hashlib.sha256()
            with os.fdopen(handle, "wb") as file:
                for block in self._blocks(entry, self.caps.file if cap is None else cap):
                    digest.update(block)
                    file.write(block)
            return Path(name), digest.hexdigest()
        except BaseException:
            Path(name).unlink(missing_ok=True)
            raise

    def text(self, entry: Entry, cap: int) -> str:
        """A short entry's text. Raises Refused."""
        return b"".join(self._blocks(entry, cap)).decode("ascii", "replace")

    def _blocks(self, entry: Entry, cap: int) -> Iterator[bytes]:
        packed = entry.info.compress_size if entry.info else 0
        size = 0
        try:
            with _stream(entry) as stream:
                while block := stream.read(2**20):
                    size += len(block)
                    self.total += len(block)
                    if size > cap:
                        raise Refused(f"it has more than {cap / 1e6:.1f} MB")
                    if entry.info and size > self.caps.ratio_from and size > self.caps.ratio * packed:
                        raise Refused(f"it unpacks to more than {self.caps.ratio} times its size, as a zip bomb does")
                    if self.total > self.caps.total:
                        raise Refused(f"the download unpacks to more than {self.caps.total / 1e9:.0f} GB")
                    yield block
        except ERRORS as error:
            raise Refused(f"it could not be read ({type(error).__name__})") from None

    def _walk(self) -> None:
        for folder, folders, files in os.walk(self.source):
            folders.sort()
            base = Path(folder)
            for name in sorted([*files, *(name for name in folders if (base / name).is_symlink())]):
                file = base / name
                path = file.relative_to(self.source).parts
                info = file.lstat()
                if not stat.S_ISREG(info.st_mode):
                    self.refused.append((path, SYMLINK_OR_SPECIAL))
                elif name.lower().endswith(".zip"):
                    # Canvas's own download may lie among the others; any other zip is one student's
                    whole = re.fullmatch(r"submissions( ?\(\d+\))?\.zip", name) and len(path) == 1
                    self._add_zip(file, () if whole else path, self.caps.directory)
                else:
                    self._add(Entry(path, when=_local(info.st_mtime), file=file))

    def _add(self, entry: Entry) -> None:
        path = (*entry.path, *entry.inner)
        if any(part == "__MACOSX" or part.startswith(".") for part in path):
            self.refused.append((path, "it is a hidden file"))
        else:
            self.entries.append(entry)

    def _add_zip(self, file: Path, path: tuple[str, ...], directory: int) -> None:
        """The entries of a zip. path: where it lies in the download, () for the download itself."""
        try:
            if file.is_symlink():
                raise Refused(SYMLINK_OR_SPECIAL)
            _check_directory(file, directory)
            try:
                archive = zipfile.ZipFile(file)
            except UnicodeDecodeError:  # a name that claims to be UTF-8 and is not would cost all the others
                archive = zipfile.ZipFile(_without_claims(file, self._folder))
        except Refused as why:
            self.refused.append((path or (file.name,), str(why)))
            return
        except ERRORS as error:
            self.refused.append((path or (file.name,), f"it is no readable zip ({type(error).__name__})"))
            return
        self._open.append(archive)
        for info in archive.infolist():
            if info.is_dir():
                continue
            name = _decoded(info)
            try:
                parts = _parts(name)
                _check_entry(info)
            except Refused as why:
                self.refused.append(((*path, name), str(why)))
                continue
            when = "{:04}-{:02}-{:02} {:02}:{:02}:{:02}".format(*info.date_time)
            if not name.lower().endswith(".zip"):
                self._add(Entry(path or parts, parts if path else (), when, archive, info))
            elif path:
                self.refused.append(((*path, *parts), "it is a zip inside a zip inside the download"))
            else:
                self._add_inner(Entry(parts, (), when, archive, info))

    def _add_inner(self, entry: Entry) -> None:
        try:
            file, _ = self.copy(entry, self._folder, self.caps.inner_zip)
        except Refused as why:
            self.refused.append((entry.path, str(why)))
        else:
            self._add_zip(file, entry.path, self.caps.inner_directory)


def _local(seconds: float) -> str:
    """A file's time as zips have theirs: on the clock of the place, without a zone."""
    try:
        return f"{datetime.fromtimestamp(seconds):%Y-%m-%d %H:%M:%S}"
    except (ValueError, OverflowError, OSError):
        return ""


def _stream(entry: Entry) -> IO[bytes]:
    if entry.archive is not None and entry.info is not None:
        return entry.archive.open(entry.info)
    assert entry.file is not None
    descriptor = os.open(entry.file, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise Refused(SYMLINK_OR_SPECIAL)
    return os.fdopen(descriptor, "rb")


def _decoded(info: zipfile.ZipInfo) -> str:
    """The name of an entry. Many programs write UTF-8 and do not say so; zipfile then reads it as cp437."""
    name = info.orig_filename
    if not info.flag_bits & 0x800:
        try:
            name = name.encode("cp437").decode()
        except UnicodeError:
            return name
    return unicodedata.normalize("NFC", name)


def _parts(name: str) -> tuple[str, ...]:
    """Folders and name of an entry. Raises Refused for a name that leads elsewhere or is none."""
    parts = tuple(re.split(r"[/\\]", name))
    if "\0" in name:
        raise Refused("its name has a NUL character")
    if parts[0] == "" or re.match(r"[A-Za-z]:", name):
        raise Refused("its name is an absolute path")
    if ".." in parts:
        raise Refused("its name leads out of the folder")
    parts = tuple(part for part in parts if part not in ("", "."))
    if not parts or len(name) > 1000 or max(map(len, parts)) > 255:
        raise Refused("its name is empty or too long")
    return parts


def _check_entry(info: zipfile.ZipInfo) -> None:
    kind = stat.S_IFMT(info.external_attr >> 16)
    if kind not in (0, stat.S_IFREG):
        raise Refused(SYMLINK_OR_SPECIAL)
    if info.flag_bits & 0x1:
        raise Refused("it is encrypted")


def _check_directory(file: Path, cap: int) -> None:
    """Refuse a zip with a huge list of contents before zipfile loads it, which takes ten times the memory."""
    size = file.stat().st_size
    with file.open("rb") as stream:
        stream.seek(max(0, size - 65_557))  # the end record and the longest comment that may follow it
        tail = stream.read()
    end = tail.rfind(b"PK\5\6")
    if end < 0 or len(tail) - end < 22:
        raise Refused("it is no zip, or breaks off")
    listed = struct.unpack_from("<I", tail, end + 12)[0]
    if tail[max(0, end - 20) : end].startswith(b"PK\6\7"):
        listed = 0 if cap == CAPS.directory else size  # zip64 tells it elsewhere: a class's download may be that big
    if listed > cap:
        raise Refused("it lists too many files")


def _without_claims(file: Path, folder: Path) -> Path:
    """A copy of a zip whose names no longer claim to be UTF-8, so that zipfile reads them as cp437 and goes on."""
    data = bytearray(file.read_bytes())
    end = data.rfind(b"PK\5\6")
    position, entries = struct.unpack_from("<I", data, end + 16)[0], struct.unpack_from("<H", data, end + 10)[0]
    for _ in range(entries):
        if data[position : position + 4] != b"PK\1\2":
            raise Refused("its list of contents is damaged")
        flags = struct.unpack_from("<H", data, position + 8)[0]
        struct.pack_into("<H", data, position + 8, flags & ~0x800)
        position += 46 + sum(struct.unpack_from("<HHH", data, position + 28))
    handle, name = tempfile.mkstemp(dir=folder)
    with os.fdopen(handle, "wb") as copy:
        copy.write(data)
    return Path(name)
