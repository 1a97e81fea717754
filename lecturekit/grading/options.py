"""How notebooks are run for grading: which sandbox, which limits. Set in nbgrader_config.py as c.Grader.<name>."""

from __future__ import annotations

from dataclasses import asdict, dataclass, fields
from typing import Any

ISOLATIONS = ("bubblewrap", "landlock", "none")
MIB = 2**20


@dataclass(frozen=True)
class GradingOptions:
    """The sandbox and the limits of one student's notebook. Seconds are wall-clock seconds, sizes are bytes.

    isolation: bubblewrap · landlock · none; "" takes bubblewrap, else Landlock, else refuses.   gpu: let the student's
    code use this machine's GPUs.   cell_seconds: for one cell.   notebook_seconds: for one pass over a notebook's
    cells.   case_seconds: for one case of a question, where the question itself allows more.   memory: for each
    process, and where the machine lets us (cgroups) for all of them together.   processes: processes and threads.
    temporary: for /tmp and /dev/shm each.   output: for what a notebook prints and shows; the rest is cut off.
    deaths: how many cells may end their process before the rest is no longer run.
    """

    isolation: str = ""
    gpu: bool = False
    cell_seconds: float = 120.0
    notebook_seconds: float = 900.0
    case_seconds: float = 10.0
    memory: int = 6 * 1024 * MIB
    processes: int = 256
    temporary: int = 1024 * MIB
    output: int = 10 * MIB
    deaths: int = 5

    def __post_init__(self) -> None:
        if self.isolation not in ("", *ISOLATIONS):
            raise ValueError(f"isolation must be one of {', '.join(ISOLATIONS)}, or empty, got {self.isolation!r}")
        for name in (field.name for field in fields(self) if field.name not in ("isolation", "gpu")):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, (int, float)) or value <= 0:
                raise ValueError(f"{name} must be a positive number, got {value!r}")

    @classmethod
    def from_config(cls, config: Any, **overrides: Any) -> GradingOptions:
        """The options that nbgrader_config.py, or nbgrader's command line, sets as c.Grader.<name>.

        Keyword arguments come before those. Raises ValueError for a name that there is not, so that a misspelt limit
        is not silently ignored.
        """
        names = {field.name for field in fields(cls)}
        section = dict(config.get("Grader", {}))
        for name, value in section.items():
            if name not in names:
                raise ValueError(f"c.Grader.{name}: there is no such setting; there are {', '.join(sorted(names))}")
            if isinstance(value, str) and name != "isolation":  # so it comes from the command line
                section[name] = _from_text(name, value)
        return cls(**(section | overrides))

    def to_data(self) -> dict[str, Any]:
        return asdict(self)


def _from_text(name: str, text: str) -> bool | float:
    if name == "gpu" and text in ("True", "False"):
        return text == "True"
    try:
        return float(text) if name.endswith("seconds") else int(text)
    except ValueError:
        kind = "True or False" if name == "gpu" else "a number"
        raise ValueError(f"c.Grader.{name} must be {kind}, got {text!r}") from None
