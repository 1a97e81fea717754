"""Walk over a notebook file's JSON without loading it: find where its values begin and end, and read only small ones.

What a student hands in can hold 500 MB of outputs, a million nested lists, or end in the middle. ``json.loads`` would
need twenty times the file in memory, or give up on all of it. Here nothing is built but what is asked for, nesting is
counted and not recursed into, and all that stands before a mistake can still be read.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from typing import Any

# possessive (*+, ++): no way back is remembered, so a 500 MB string costs no memory and broken input no second try
_STRING = rb'"(?:[^"\\]++|\\.)*+"'
_LEAF = rb"[\[{](?:[^\"\[\]{}]++|" + _STRING + rb")*+[\]}]"  # a list or object with no other one in it
STRING = re.compile(_STRING, re.DOTALL)
SCALAR = re.compile(rb'[^\s,:"\[\]{}]++')
SPACE = re.compile(rb"[ \t\r\n]*+")
TO_BRACKET = re.compile(rb'(?:[^"\[\]{}]++|' + _STRING + rb"|" + _LEAF + rb")*+([\[\]{}])", re.DOTALL)
# lists and objects with others in them are walked over one by one; so many take seconds, and outputs have thousands
BRACKETS = 2_000_000  # in one value
ALL_BRACKETS = 8_000_000  # in a file
ITEMS = 10_000  # of one list or object that is walked through


class BrokenJSON(ValueError):
    """What stands at `position` (bytes from the start of the file) is not JSON."""

    def __init__(self, position: int):
        super().__init__(f"not JSON at byte {position}")
        self.position = position


class JSON:
    """The bytes of a file that should be JSON. A place in it is a number of bytes from its start."""

    def __init__(self, data: bytes):
        self.data = data
        self._brackets = ALL_BRACKETS  # left
        self._ends: dict[int, int] = {}  # where the lists and objects already walked over end: no byte is read twice

    def begins(self, place: int, what: bytes) -> bool:
        """Whether this character stands there."""
        return self.data[place : place + 1] == what

    def skip_space(self, place: int) -> int:
        """The first place from here on that is no white space."""
        found = SPACE.match(self.data, place)
        return found.end() if found else place

    def end_of(self, start: int) -> int:
        """Where the value that begins at `start` ends. Raises BrokenJSON when it does not end."""
        if start in self._ends:
            return self._ends[start]
        if self.data[start : start + 1] in (b"[", b"{"):
            end = self._end_of_nested(start)
        else:
            found = (STRING if self.begins(start, b'"') else SCALAR).match(self.data, start)
            if found is None:
                raise BrokenJSON(start)
            end = found.end()
        if end - start > 1000:
            self._ends[start] = end
        return end

    def members(self, start: int) -> Iterator[tuple[str, int]]:
        """Each key of the object at `start` and where its value begins. Raises BrokenJSON where JSON ends.

        A value is walked over only after it was given out, so one that breaks off can still be looked into. A key that
        is there twice is given twice. Nothing comes out when something else than an object begins at `start`.
        """
        if not self.begins(start, b"{"):
            return
        place = self.skip_space(start + 1)
        for _ in range(ITEMS):
            if self.begins(place, b"}"):
                self._ends[start] = place + 1
                return
            if not self.begins(place, b'"'):
                raise BrokenJSON(place)
            end = self.end_of(place)
            key = self.read(place, end) if end - place < 100 else ""  # no key that matters is longer
            place = self.skip_space(end)
            if not self.begins(place, b":"):
                raise BrokenJSON(place)
            place = self.skip_space(place + 1)
            yield key or "", place
            place = self._next(self.end_of(place), b"}")
        raise BrokenJSON(place)

    def elements(self, start: int, inside: bool = False) -> Iterator[int]:
        """Where each element of the list at `start` begins. Raises BrokenJSON at the first that is not JSON.

        inside: `start` is an element in the middle of a list, to go on from. Like `members`, an element is walked over
        only after it was given out.
        """
        if not inside and not self.begins(start, b"["):
            return
        place = self.skip_space(start if inside else start + 1)
        for _ in range(ITEMS):
            if self.begins(place, b"]"):
                if not inside:
                    self._ends[start] = place + 1
                return
            yield place
            place = self._next(self.end_of(place), b"]")
        raise BrokenJSON(place)

    def read(self, start: int, end: int) -> Any:
        """The value between two places as Python data, None when it cannot be read: nested too deep, or not JSON.

        Bytes that are not UTF-8, and halves of surrogate pairs, become U+FFFD: neither can be written to a file again.
        """
        try:
            # strict=False: a line break or tab inside a string is an editor's slip, and its meaning is plain
            return whole(json.loads(self.data[start:end].decode("utf-8", "replace"), strict=False))
        except (ValueError, RecursionError):
            return None

    def _next(self, place: int, closing: bytes) -> int:
        """From the end of one item to the beginning of the next, or to the closing bracket.

        A comma before the closing bracket is let pass.
        """
        place = self.skip_space(place)
        if self.begins(place, b","):
            return self.skip_space(place + 1)
        if not self.begins(place, closing):
            raise BrokenJSON(place)
        return place

    def _end_of_nested(self, start: int) -> int:
        place, depth = start + 1, 1
        for _ in range(min(BRACKETS, self._brackets)):
            self._brackets -= 1
            found = TO_BRACKET.match(self.data, place)
            if found is None:
                raise BrokenJSON(place)
            place = found.end()
            depth += 1 if found[1] in b"[{" else -1
            if depth == 0:
                return place
        raise BrokenJSON(place)


def whole(value: Any) -> Any:
    """The same data with each lone surrogate replaced. Raises RecursionError where json.loads would."""
    if isinstance(value, str):
        try:
            value.encode()
        except UnicodeEncodeError:
            return value.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    if isinstance(value, list):
        return [whole(item) for item in value]
    if isinstance(value, dict):
        return {whole(key): whole(item) for key, item in value.items()}
    return value
