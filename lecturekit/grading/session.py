"""The worker's side of one notebook process in the jail: send it cells and questions, take what comes back with care.

Nothing that arrives is believed beyond being an output of that student's own notebook, or the outputs of their own
answer, which the judge compares. Sizes are limited, every wait has an end.
"""

from __future__ import annotations

import contextlib
import math
import os
import secrets
import select
import socket
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from lecturekit.grading import codec
from lecturekit.grading.options import GradingOptions
from lecturekit.grading.sandbox import Jail

ITEMS = 5000  # pieces of output of one notebook; text that is printed piece by piece arrives in larger ones
GRACE = 5.0  # seconds beyond a limit that the process keeps itself, before it is killed
OUTPUTS = codec.Limits(total=codec.LIMITS.body + codec.HEADER.size, tensors=0)  # what a cell shows is text
CUT = "\n[The rest of what this notebook printed or showed was cut off.]\n"
Requests = Callable[[Mapping[str, Any]], Mapping[str, Any]]


class ProcessDied(Exception):
    """The notebook's process has ended, or sends what no notebook process would send.

    answering: it was the answer to the question that ended, and not the process that it was put to.
    """

    answering = False


class OutOfTime(Exception):
    """The notebook's process does not keep its time limit and has to be killed."""


class Session:
    """One notebook process, from its start to its end. Use it as a context manager.

    requests: answers what the notebook asks while a cell runs (``passing``, references).   ends: when the notebook's
    time is up, in time.monotonic() seconds; to be set once it has begun.
    """

    def __init__(self, jail: Jail, options: GradingOptions, requests: Requests) -> None:
        self._jail, self._options, self._requests, self.ends = jail, options, requests, math.inf
        self._shown = self._items = 0  # characters of output so far, and pieces
        self._snapshots: list[socket.socket] = []
        self.cut = False
        self._socket, self._pipe = jail.start()
        os.set_blocking(self._pipe, False)

    def __enter__(self) -> Session:
        return self

    def __exit__(self, *_: Any) -> None:
        self.close()

    def close(self) -> None:
        """End the process and everything it started."""
        self._jail.stop()
        for end in [self._socket, *self._snapshots]:
            end.close()
        self._snapshots = []
        with contextlib.suppress(OSError):
            os.close(self._pipe)

    def begin(self, seed: int, locked: Sequence[str], environment: Mapping[str, str]) -> None:
        """Prepare the process for one notebook."""
        self._send({"do": "begin", "seed": seed, "locked": sorted(locked), "environment": dict(environment)})
        self._until_done([], self._deadline(30))

    def cell(self, source: str, seconds: float) -> list[dict[str, Any]]:
        """Run one cell. Returns its outputs, in nbformat's form. Raises ProcessDied or OutOfTime.

        What it showed until then is in the exception's ``outputs``.
        """
        outputs: list[dict[str, Any]] = []
        try:
            self._send(
                {"do": "cell", "source": source, "seconds": min(seconds, max(self.ends - time.monotonic(), 1.0))}
            )
            done = self._until_done(outputs, self._deadline(seconds))
        except (ProcessDied, OutOfTime) as error:
            error.outputs = outputs  # type: ignore[union-attr]
            raise
        for output in outputs:
            if output["output_type"] == "execute_result":
                count = done.get("count")
                output["execution_count"] = count if isinstance(count, int) and 0 <= count < 10**6 else None
        return outputs

    def snapshot(self) -> socket.socket | None:
        """Keep the process as it is now, to be asked later. None when it has threads, which a fork would not have."""
        ours, theirs = socket.socketpair()
        try:
            self._send({"do": "snapshot"})
            try:
                socket.send_fds(self._socket, [b"."], [theirs.fileno()])
            except OSError as error:
                raise ProcessDied("the process has ended") from error
            forked = self._until_done([], self._deadline(30)).get("forked") is True
        except BaseException:
            ours.close()
            raise
        finally:
            theirs.close()
        if not forked:
            ours.close()
            return None
        self._snapshots.append(ours)
        return ours

    def ask(self, request: Mapping[str, Any], snapshot: socket.socket | None = None) -> list[Any]:
        """Put a question to a snapshot, or to the process itself. Returns what came back, not yet looked at.

        Raises ProcessDied or OutOfTime.
        """
        nonce = secrets.token_hex(16)  # an answer to another question is not an answer to this one
        end = snapshot or self._socket
        # a question has its own time, also when the notebook's is up
        deadline = time.monotonic() + len(request["cases"]) * float(request["seconds"]) + GRACE
        self._send({"do": "ask", "nonce": nonce, **request}, end, deadline)
        while True:
            message = self._receive(end, deadline)
            if message.get("nonce") == nonce:
                if message.get("died"):
                    error = ProcessDied("the process ended while it answered")
                    error.answering = True
                    raise error
                attempts = message.get("attempts")
                return attempts if isinstance(attempts, list) else []
            if snapshot is not None:
                raise ProcessDied("the process answered another question than it was asked")

    # Inside

    def _deadline(self, seconds: float) -> float:
        return min(time.monotonic() + seconds, self.ends) + GRACE

    def _send(
        self, message: Mapping[str, Any], end: socket.socket | None = None, deadline: float | None = None
    ) -> None:
        end = end or self._socket
        try:  # a process that does not read must not hold the worker up
            codec.send(end, dict(message), strict=True, deadline=deadline or self._deadline(30))
        except TimeoutError as error:
            raise OutOfTime("the process does not read what it is sent") from error
        except (EOFError, OSError) as error:
            raise ProcessDied("the process has ended") from error

    def _receive(self, end: socket.socket, deadline: float, limits: codec.Limits = codec.LIMITS) -> dict[str, Any]:
        try:
            message = codec.receive(end, limits, deadline)
        except TimeoutError as error:
            raise OutOfTime("no answer within the time limit") from error
        except (EOFError, OSError, codec.CodecError) as error:
            raise ProcessDied("the process has ended") from error
        if not isinstance(message, dict):
            raise ProcessDied("the process sent something else than a message")
        return message

    def _until_done(self, outputs: list[dict[str, Any]], deadline: float) -> dict[str, Any]:
        """Take what the process sends until it says that it is done."""
        while True:
            left = deadline - time.monotonic()
            if left <= 0:
                raise OutOfTime("no answer within the time limit")
            ready, _, _ = select.select([self._socket.fileno(), self._pipe], [], [], left)
            if self._pipe in ready:
                self._take_text(outputs)
            if self._socket.fileno() not in ready:
                continue
            message = self._receive(self._socket, deadline, OUTPUTS)
            if "output" in message:
                self._take(message["output"], outputs)
            elif "passing" in message or "reference" in message:
                self._send(self._requests(message))
            elif message.get("done") is True:
                self._take_text(outputs)
                return message
            else:
                raise ProcessDied("the process sent something else than a message")

    def _take_text(self, outputs: list[dict[str, Any]]) -> None:
        """What was written past Python, by a subprocess or a C library; not without end, or nothing else is read."""
        for _ in range(64):
            try:
                text = os.read(self._pipe, 65536)
            except BlockingIOError:
                return
            if not text:  # every writer has gone: the process has ended, and its socket says so too
                time.sleep(0.01)
                return
            self._take({"output_type": "stream", "name": "stdout", "text": text.decode("utf-8", "replace")}, outputs)

    def _take(self, output: Any, outputs: list[dict[str, Any]]) -> None:
        """Add one output to a cell's, as long as the notebook has not shown too much."""
        if isinstance(output, dict) and output.get("output_type") == "clear":
            outputs.clear()
            return
        valid = _valid(output)
        if valid is None or self.cut:
            return
        self._shown += _size(valid)
        self._items += 1
        if self._shown > self._options.output or self._items > ITEMS:
            self.cut = True
            valid = {"output_type": "stream", "name": "stdout", "text": CUT}
        last = outputs[-1] if outputs else None
        if last and valid["output_type"] == last["output_type"] == "stream" and valid["name"] == last["name"]:
            last["text"] += valid["text"]
        else:
            outputs.append(valid)


def _valid(output: Any) -> dict[str, Any] | None:
    """An output in nbformat's form with nothing else in it, or None."""
    if not isinstance(output, dict):
        return None
    kind = output.get("output_type")
    if kind == "stream":
        name = "stderr" if output.get("name") == "stderr" else "stdout"
        return {"output_type": "stream", "name": name, "text": _string(output.get("text"))}
    if kind in ("display_data", "execute_result"):
        data = output.get("data")
        if not isinstance(data, dict):
            return None
        bundle = {
            mime: _string(text)
            for mime, text in data.items()
            if isinstance(mime, str) and isinstance(text, str) and len(mime) < 100
        }
        valid = {"output_type": kind, "data": bundle, "metadata": {}}
        return valid | ({"execution_count": None} if kind == "execute_result" else {})
    if kind == "error":
        lines = output.get("traceback")
        traceback = [_string(line)[:5000] for line in lines[:200]] if isinstance(lines, list) else []
        name, value = _string(output.get("ename"))[:200], _string(output.get("evalue"))[:2000]
        return {"output_type": "error", "ename": name, "evalue": value, "traceback": traceback}
    return None


def _string(value: Any) -> str:
    """Text that can be written to a file: a lone surrogate cannot."""
    return value.encode("utf-8", "replace").decode() if isinstance(value, str) else ""


def _size(output: Mapping[str, Any]) -> int:
    if output["output_type"] == "stream":
        return len(output["text"]) + 50
    if output["output_type"] == "error":
        return sum(map(len, output["traceback"])) + 50
    return sum(map(len, output["data"].values())) + 50
