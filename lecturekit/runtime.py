"""The few choices every lab shares: which device, which seed, how long to run, where to keep files."""

from __future__ import annotations

import os
import random
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TypeVar

import torch

T = TypeVar("T")
PROFILES = ("smoke", "full")


def device() -> torch.device:
    """The device the labs compute on: the first CUDA device if there is one, else the CPU.

    LECTUREKIT_DEVICE overrides it (for example ``cpu`` or ``cuda:1``).
    """
    named = os.environ.get("LECTUREKIT_DEVICE")
    if named:
        return torch.device(named)
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def seed_everything(seed: int) -> None:
    """Seed Python's, NumPy's and torch's generators, so that a notebook gives the same numbers when run again.

    Raises TypeError unless seed is an int.
    """
    if isinstance(seed, bool) or not isinstance(seed, int):
        raise TypeError(f"seed must be an int, got {type(seed).__name__}")
    import numpy

    random.seed(seed)
    numpy.random.seed(seed % 2**32)
    torch.manual_seed(seed)


def base_seed() -> int:
    """The seed a lab starts from: 0, or what LECTUREKIT_SEED names (``labs-full --seeds`` runs a lab under several).

    Raises ValueError when LECTUREKIT_SEED is not a whole number.
    """
    named = os.environ.get("LECTUREKIT_SEED", "0")
    if not named.isdecimal():
        raise ValueError(f"LECTUREKIT_SEED must be a whole number from 0 on, got {named!r}")
    return int(named)


def profile() -> str:
    """How much to compute: ``full`` (the real measurement, the default) or ``smoke`` (the same path in seconds).

    Read from LECTUREKIT_PROFILE. Raises ValueError for any other word.
    """
    name = os.environ.get("LECTUREKIT_PROFILE", "full")
    if name not in PROFILES:
        raise ValueError(f"LECTUREKIT_PROFILE must be one of {', '.join(PROFILES)}, got {name!r}")
    return name


def cache_dir() -> Path:
    """Where converted models are kept: LECTUREKIT_CACHE, or the user's cache folder."""
    from platformdirs import user_cache_path

    named = os.environ.get("LECTUREKIT_CACHE")
    return Path(named).expanduser() if named else user_cache_path("lecturekit", appauthor=False)


def progress(items: Iterable[T], desc: str, total: int | None = None) -> Iterator[T]:
    """Walk over items under the course's one progress bar (a widget in a notebook, plain text elsewhere)."""
    from tqdm.auto import tqdm

    return iter(tqdm(items, desc=desc, total=total, leave=False))


@contextmanager
def threads(count: int) -> Iterator[None]:
    """Compute with this many CPU threads inside the block. Token-by-token decoding is fastest with one."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def file_mode() -> int:
    """The mode of a file that is made in the ordinary way: read and write for all whom the umask lets."""
    umask = os.umask(0)
    os.umask(umask)
    return 0o666 & ~umask


def atomic_write(path: Path | str, content: str | bytes) -> Path:
    """Write a file whole or not at all: to a temporary file beside it, then renamed over it."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    data = content.encode() if isinstance(content, str) else content
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(data)
        os.chmod(temporary, file_mode())  # mkstemp makes 0600; a shared course folder must stay readable
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise
    return path
