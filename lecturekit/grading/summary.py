"""What a batch came to, as the instructor sees it at its end."""

from __future__ import annotations

import re
import statistics
from dataclasses import dataclass, field

from lecturekit.grading.reader import shown


@dataclass
class Summary:
    """What became of a class. Counts are of submissions; failed says of each that was not graded why."""

    lab: str
    graded: int = 0
    from_journal: int = 0
    skipped: int = 0  # recorded before, and nothing has changed since
    pending: int = 0  # need a GPU
    by_hand: int = 0  # wait for a person
    problems: int = 0
    failed: dict[str, str] = field(default_factory=dict)
    scores: list[float] = field(default_factory=list)  # of those graded or taken from the journal, in points
    seconds: dict[str, float] = field(default_factory=dict)  # where the time of those graded went, by step
    elapsed: float = 0.0  # wall-clock seconds, all in all
    interrupted: bool = False

    @property
    def status(self) -> int:
        """The exit status: 0 when everything is graded, 1 when something is not, 130 when it was stopped."""
        return 130 if self.interrupted else 1 if self.failed else 0

    def table(self) -> str:
        """The summary for the terminal."""
        rows = [
            ("graded", str(self.graded)),
            ("from the journal", str(self.from_journal)),
            ("skipped, unchanged", str(self.skipped)),
            ("pending, need a GPU", str(self.pending)),
            ("to be graded by hand", str(self.by_hand)),
            ("with problems", str(self.problems)),
            ("not graded", str(len(self.failed))),
        ]
        if self.scores:
            mean, median = statistics.fmean(self.scores), statistics.median(self.scores)
            rows.append(("score, mean · median", f"{mean:.1f} · {median:.1f}"))
        if self.graded:
            rows.append(("seconds a submission", f"{self.elapsed / self.graded:.2f}"))
        total = sum(self.seconds.values())
        if total > 0:
            steps = sorted(self.seconds.items(), key=lambda item: -item[1])
            rows.append(("where the time went", " · ".join(f"{name} {100 * s / total:.0f} %" for name, s in steps)))
        width = max(len(name) for name, _ in rows)
        lines = [f"{self.lab}", *(f"  {name:{width}}  {value}" for name, value in rows)]
        lines += [f"  not graded: {shown(student)} · {plain(why)}" for student, why in self.failed.items()]
        if self.interrupted:
            lines.append("  stopped; what is done is kept: start it again to go on")
        return "\n".join(lines)


def plain(text: str) -> str:
    """Text that may have come from a notebook as one short line that cannot steer the terminal."""
    return re.sub(r"[^\x20-\x7e\xa1-\u024f\u2010-\u2027]+", "\N{REPLACEMENT CHARACTER}", " ".join(text.split()))[:300]
