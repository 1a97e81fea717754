"""Inside the jail: the kernel of one notebook, driven by the worker over a socket.

It runs cells in an IPython shell and sends back what they show. At a test cell it forks a snapshot of itself, which
waits until the worker asks it a question: it then runs the student's answer on inputs that come as data and sends the
outputs back as data. Nothing in this process is trusted: what it sends is limited, checked and compared by the worker.
"""

from __future__ import annotations

import builtins
import fcntl
import importlib
import importlib.abc
import importlib.machinery
import io
import os
import signal
import socket
import sys
import types
from collections.abc import Sequence
from typing import Any

from IPython.core.displayhook import DisplayHook
from IPython.core.displaypub import DisplayPublisher
from IPython.core.interactiveshell import InteractiveShell
from traitlets.config import Config

from lecturekit.checking.attempt import answer
from lecturekit.checking.limits import TimeUp, time_limit
from lecturekit.grading import codec
from lecturekit.runtime import seed_everything

ANSWERED = 77  # exit status of a process that has sent its answer: a status that code seldom ends with
PIECE = 100_000  # characters of printed text sent at once


class Kernel:
    """The student's shell and the socket to the worker."""

    def __init__(self, sock: socket.socket, shell: Shell) -> None:
        self.sock, self.shell, self.process = sock, shell, os.getpid()
        shell.channel = self
        sys.stdout, sys.stderr = _Stream(self, "stdout"), _Stream(self, "stderr")

    def run(self) -> None:
        """Do what the worker says until it hangs up."""
        while True:
            try:
                message = codec.receive(self.sock)
            except EOFError:
                os._exit(0)
            if message["do"] == "begin":
                _begin(self, message)
                self.send({"done": True})
            elif message["do"] == "cell":
                self.send({"done": True} | self.cell(message["source"], message["seconds"]))
            elif message["do"] == "snapshot":
                self.snapshot()
            elif message["do"] == "ask":
                _send_reply(self.sock, message, self.shell.user_ns)

    def send(self, message: dict[str, Any]) -> None:
        if os.getpid() == self.process:  # what a cell forked must not speak in between
            codec.send(self.sock, message)

    def cell(self, source: str, seconds: float) -> dict[str, Any]:
        """Run one cell. Its outputs are sent as they come."""
        # whatever the last cell put there
        sys.stdout, sys.stderr = streams = _Stream(self, "stdout"), _Stream(self, "stderr")
        self.shell.late = self.shell.told = False
        try:
            with time_limit(seconds):
                result = self.shell.run_cell(source, store_history=True)
            error = result.error_before_exec or result.error_in_exec
            self.shell.late = self.shell.late or isinstance(error, TimeUp)
            if error is not None and not (self.shell.told or self.shell.late):  # no memory left to show it, perhaps
                self.output(_error(type(error).__name__, _text(error)))
        except TimeUp:
            self.shell.late = True
        if self.shell.late:
            self.output(_error("CellTimeout", f"This cell did not end within {seconds:g} seconds."))
        for stream in streams:
            stream.flush()
        if os.getpid() != self.process:  # forked by the cell and not ended there: one kernel is enough
            os._exit(0)
        return {"count": self.shell.execution_count - 1}

    def output(self, output: dict[str, Any]) -> None:
        self.send({"output": output})

    def snapshot(self) -> None:
        """Fork a process that stays as it is now and answers questions on a socket of its own."""
        _, fds, _, _ = socket.recv_fds(self.sock, 1, 1)
        end = fcntl.fcntl(fds[0], fcntl.F_DUPFD_CLOEXEC, 10)  # a notebook that closed its standard output gets that
        os.close(fds[0])
        threads = len(os.listdir("/proc/self/task"))
        if threads > 1 or _cuda_in_use():  # a fork would have the locks of threads that it does not have
            os.close(end)
            self.send({"done": True, "forked": False})
            return
        sys.stdout.flush()
        sys.stderr.flush()
        if os.fork():
            os.close(end)
            self.send({"done": True, "forked": True})
            return
        try:
            self.sock.close()
            _wait_for_questions(socket.socket(fileno=end), self.shell.user_ns)
        finally:
            os._exit(0)

    # What lecturekit.checking asks for in a notebook that is being graded

    def passing(self, question: str, candidate: Any) -> Any:
        """The candidate if it passes its check, else the course's own version; the worker decides."""
        reply = self._request({"passing": str(question)})
        if not reply.get("source"):
            return candidate
        print(f"{question} has not passed its check yet: from here on the course's own version is used in its place.")
        return _from_source(reply["source"], reply["module"], reply["name"])

    def reference(self, module: str, name: str) -> Any:
        """One name of a module that is kept back. Raises ImportError while a question about it is open."""
        reply = self._request({"reference": [module, name]})
        if not reply.get("source"):
            raise ImportError(str(reply.get("refused") or f"{module}.{name} is not to be had while this lab is graded"))
        return _from_source(reply["source"], module, name)

    def _request(self, message: dict[str, Any]) -> dict[str, Any]:
        if os.getpid() != self.process:
            raise RuntimeError("only the notebook's own process can ask for this")
        self.send(message)
        return codec.receive(self.sock)


def serve(sock: socket.socket, output: int, shell: Any) -> None:
    """Be the kernel of one notebook. output: where what is written past Python (fds 1 and 2) goes."""
    os.dup2(output, 1)
    os.dup2(output, 2)
    os.close(output)
    Kernel(sock, shell).run()


def reply_to(message: dict[str, Any], namespace: dict[str, Any]) -> dict[str, Any]:
    """Run the student's answer to one question on the cases of the message. Returns plain data."""
    try:
        candidate = eval(message["expression"], namespace)  # a name, or names with dots
    except BaseException as error:
        text = f"{message['expression']} cannot be used: {type(error).__name__}"
        return {"nonce": message["nonce"], "attempts": [{"parts": None, "failure": "unfit", "message": text}]}
    return {"nonce": message["nonce"], "attempts": answer(candidate, message)}


def _send_reply(sock: socket.socket, message: dict[str, Any], namespace: dict[str, Any]) -> None:
    try:
        codec.send(sock, reply_to(message, namespace))
    except codec.CodecError as error:
        attempt = {"parts": None, "failure": "unfit", "message": f"the result cannot be sent: {error}"}
        codec.send(sock, {"nonce": message["nonce"], "attempts": [attempt]})


def make_shell() -> Shell:
    """An IPython shell that behaves as a notebook's, without history files, threads or a terminal."""
    config = Config()
    config.HistoryManager.enabled = False  # it would start a thread and write a database
    config.InteractiveShell.colors = "nocolor"
    config.InteractiveShell.logstart = False
    return Shell.instance(config=config)


def draw_something() -> None:
    """Draw a figure that nobody sees: the first one loads fonts, which every notebook would do again."""
    from matplotlib.figure import Figure

    figure = Figure()
    figure.subplots().set_title("α")
    figure.savefig(io.BytesIO(), format="png")


class Shell(InteractiveShell):
    """InteractiveShell whose displays, results and errors go to the worker."""

    channel: Kernel | None = None
    late = False  # whether the cell ran into its time limit
    told = False  # whether its error has been shown

    def __init__(self, **rest: Any) -> None:
        super().__init__(display_pub_class=_Publisher, displayhook_class=_Hook, **rest)

    def init_display_pub(self) -> None:
        self.display_pub = _Publisher(parent=self, shell=self)

    def init_displayhook(self) -> None:
        self.displayhook = _Hook(parent=self, shell=self)
        from IPython.core.display_trap import DisplayTrap

        self.display_trap = DisplayTrap(hook=self.displayhook)

    def enable_gui(self, gui: str | None = None) -> None:
        """There is no window to open here."""

    def ask_exit(self) -> None:
        """exit() ends nothing: the cells below are run and graded."""

    def _showtraceback(self, etype: Any, evalue: Any, stb: Sequence[str]) -> None:
        sys.stdout.flush()
        sys.stderr.flush()
        if issubclass(etype, TimeUp):
            self.late = True
        elif self.channel is not None:
            self.told = True
            self.channel.output(_error(etype.__name__, _text(evalue), [str(line) for line in stb]))


class _Publisher(DisplayPublisher):
    """What display(…) shows becomes an output of the cell."""

    def publish(self, data: Any, metadata: Any = None, source: Any = None, **rest: Any) -> None:
        sys.stdout.flush()
        sys.stderr.flush()
        channel = getattr(self.shell, "channel", None)
        if channel is not None and not rest.get("update"):
            channel.output({"output_type": "display_data", "data": _bundle(data), "metadata": {}})

    def clear_output(self, wait: bool = False) -> None:
        channel = getattr(self.shell, "channel", None)
        if channel is not None:
            channel.output({"output_type": "clear"})


class _Hook(DisplayHook):
    """The value of a cell's last line becomes its result."""

    def write_output_prompt(self) -> None:
        pass

    def write_format_data(self, format_dict: Any, md_dict: Any = None) -> None:
        sys.stdout.flush()
        channel = getattr(self.shell, "channel", None)
        if channel is not None:
            channel.output({"output_type": "execute_result", "data": _bundle(format_dict), "metadata": {}})

    def finish_displayhook(self) -> None:
        self._is_active = False


class _Stream:
    """sys.stdout or sys.stderr of a notebook: text goes to the worker in order with everything else shown."""

    encoding, errors, closed, name = "utf-8", "strict", False, "<notebook>"

    def __init__(self, channel: Kernel, name: str) -> None:
        self._channel, self.name, self._size = channel, name, 0
        self._waiting: list[str] = []
        self._process = os.getpid()

    def write(self, text: str) -> int:
        if not isinstance(text, str):
            raise TypeError(f"write() argument must be str, not {type(text).__name__}")
        self._waiting.append(text)
        self._size += len(text)
        if self._size > PIECE:
            self.flush()
        return len(text)

    def writelines(self, lines: Any) -> None:
        for line in lines:
            self.write(line)

    def flush(self) -> None:
        text, self._waiting, self._size = "".join(self._waiting), [], 0
        if not text:
            return
        if os.getpid() != self._process:  # in a process the student forked: two writers would garble the socket
            os.write(1, text.encode("utf-8", "replace"))
            return
        for start in range(0, len(text), PIECE):
            self._channel.output({"output_type": "stream", "name": self.name, "text": text[start : start + PIECE]})

    def isatty(self) -> bool:
        return False

    def readable(self) -> bool:
        return False

    def writable(self) -> bool:
        return True

    def fileno(self) -> int:
        return 1 if self.name == "stdout" else 2


class Locked(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Stands in for the modules that hold the references under grading: each name is asked of the worker."""

    def __init__(self, names: Sequence[str], channel: Kernel) -> None:
        self.names, self.channel = frozenset(names), channel

    def find_spec(self, fullname: str, path: Any = None, target: Any = None) -> importlib.machinery.ModuleSpec | None:
        return importlib.machinery.ModuleSpec(fullname, self) if fullname in self.names else None

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> types.ModuleType:
        return types.ModuleType(spec.name, "Kept back while this lab is graded.")

    def exec_module(self, module: types.ModuleType) -> None:
        def lookup(name: str) -> Any:
            if name.startswith("__"):
                raise AttributeError(name)
            value = self.channel.reference(module.__name__, name)
            setattr(module, name, value)
            return value

        module.__getattr__ = lookup  # type: ignore[method-assign]


def _begin(kernel: Kernel, message: dict[str, Any]) -> None:
    """Make the shell ready for one notebook: seeds, what is kept back, and how lecturekit reaches the worker."""
    from lecturekit.checking import notebook

    os.environ.update(message["environment"])
    seed_everything(message["seed"])
    sys.meta_path.insert(0, Locked(message["locked"], kernel))
    sys.path.insert(0, "")  # the working folder, empty now: what a notebook writes there it may import
    notebook.connect(kernel)

    def no_input(prompt: object = "") -> str:
        raise EOFError("there is nobody to answer input() while a notebook is graded")

    builtins.input = no_input
    kernel.shell.user_ns["input"] = no_input


def _wait_for_questions(sock: socket.socket, namespace: dict[str, Any]) -> None:
    """A snapshot: each question is answered by a fork of its own, so that none sees what another one did."""
    nothing = os.open(os.devnull, os.O_RDWR)
    for fd in (0, 1, 2):
        os.dup2(nothing, fd)
    sys.stdout = sys.stderr = open(os.devnull, "w")  # noqa: SIM115 (for the rest of this process)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    while True:
        message = codec.receive(sock)
        process = os.fork()
        if process == 0:
            try:
                _send_reply(sock, message, namespace)
                os._exit(ANSWERED)
            finally:
                os._exit(1)
        _, status = os.waitpid(process, 0)
        if not os.WIFEXITED(status) or os.WEXITSTATUS(status) != ANSWERED:
            codec.send(sock, {"nonce": message["nonce"], "died": True})


def _from_source(source: str, module: str, name: str) -> Any:
    """A name of a module that the worker sent as source."""
    importlib.import_module(module)  # the stand-in: classes look for their module among those imported
    made = types.ModuleType(module)
    made.__package__ = module.rpartition(".")[0]
    exec(compile(source, f"<{module}>", "exec"), made.__dict__)
    return getattr(made, name)


def _cuda_in_use() -> bool:
    import torch

    return torch.cuda.is_initialized()


def _bundle(data: Any) -> dict[str, Any]:
    """A mime bundle as data: bytes become base64 text, what is neither text nor data is left out."""
    import base64

    bundle: dict[str, Any] = {}
    for kind, value in dict(data).items():
        if isinstance(value, bytes):
            bundle[str(kind)] = base64.b64encode(value).decode()
        elif isinstance(value, str):
            bundle[str(kind)] = value
    return bundle


def _error(name: str, value: str, traceback: Sequence[str] = ()) -> dict[str, Any]:
    lines = list(traceback) or [f"{name}: {value}"]
    return {"output_type": "error", "ename": name, "evalue": value, "traceback": lines}


def _text(value: object) -> str:
    try:
        return str(value)
    except Exception:
        return "an error that cannot be printed"
