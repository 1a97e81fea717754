"""Messages between the trusted worker and the jail: plain data and tensors as bytes. Nothing in a message is executed.

A message is a header (magic, length of the body, length of the tensors), a JSON body in ASCII, then the tensors' bytes
(little-endian, C order) one after the other as the body names them: there are no offsets that could overlap. In the
body a JSON list is a list and a JSON object holds one entry whose name says what it stands for:

    {"t": [...]}  a tuple        {"d": [k, v, k, v]}  a dict        {"x": [dtype, [shape], device]}  the next tensor
    {"i": hex}  a large int      {"f": hex}  nan or inf, as IEEE bits      {"u": hex}  a str with lone surrogates
    {"o": text}  something that is not plain data (Opaque)

``decode`` takes nothing on trust: every length is checked before anything of that length is made, and whatever is wrong
is a CodecError. Two things that were the same object arrive as two.
"""

from __future__ import annotations

import contextlib
import json
import math
import re
import socket
import struct
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NoReturn

import torch
from torch import Tensor

from lecturekit.checking.compare import Opaque, describe

MAGIC = b"LKD1"
HEADER = struct.Struct(">4sIQ")
DTYPES = {
    str(dtype).removeprefix("torch."): dtype
    for dtype in (
        *(torch.float64, torch.float32, torch.float16, torch.bfloat16),
        *(torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool),
        *(torch.complex64, torch.complex128),
    )
}
# Python hashes whole numbers below this to themselves; larger ones can be chosen so that all of a dict's keys collide.
KEYS = 1 << 60
DIMENSIONS = 32  # more than any tensor of the course has, fewer than torch allows
OPAQUE_LENGTH = 200
CHUNK = 1 << 20  # bytes asked of a socket at a time

# A whole JSON string, or one that the end of the text cuts off; possessive, so that it runs in linear time.
_STRING = re.compile(rb'"(?:[^"\\]++|\\.)*+(?:"|\\?\Z)', re.DOTALL)
_BRACKET = re.compile(rb"[\[\]{}]")
_HEX = re.compile(r"-?[0-9a-f]+")
_DEVICE = re.compile(r"[a-z]{1,16}(:[0-9]{1,3})?")
_SURROGATE = re.compile("[\ud800-\udfff]")


class CodecError(ValueError):
    """A message that is malformed or over a limit."""


class Closed(EOFError):
    """The other side has closed the connection."""


@dataclass(frozen=True)
class Limits:
    """What one message may hold at most.

    total: bytes of the whole message.   body: bytes of its JSON.   tensors, nodes: how many (a node is a value or a
    key).   depth: of nesting.   text: characters of a str.   digits: hexadecimal digits of an int.
    """

    total: int = 256 << 20
    body: int = 32 << 20
    tensors: int = 10_000
    nodes: int = 500_000
    depth: int = 64
    text: int = 4 << 20
    digits: int = 4096


LIMITS = Limits()


def encode(value: Any, limits: Limits = LIMITS, *, strict: bool = False) -> bytes:
    """A value as a message.

    Plain data are None, bool, int, float, str, list, tuple, dict with keys that are str or int (within ±KEYS), tensors
    of the dtypes in DTYPES, and Opaque. Tensors are detached and copied to the CPU; the name of their device goes along
    (see ``sent_from``).
    strict (for the trusted side, which must send exactly what it means): anything else raises TypeError, which names
    the place. Otherwise a subclass is sent as what it is a subclass of, another sequence as a list, another mapping as
    a dict (as ``compare`` takes them), and anything else as Opaque.
    Raises CodecError when the message would be over a limit.
    """
    return _Encoder(limits, strict).message(value)


def decode(data: bytes | bytearray | memoryview, limits: Limits = LIMITS, *, device: str | None = None) -> Any:
    """The value of a message.

    device: where to put its tensors; None is the CPU.   Raises CodecError for whatever is malformed or over a limit.
    """
    view = memoryview(data).cast("B")
    if len(view) < HEADER.size:
        raise CodecError(f"a message starts with {HEADER.size} bytes of header, but there are only {len(view)} bytes")
    body_length, tensor_length = _lengths(view[: HEADER.size], limits)
    if len(view) != HEADER.size + body_length + tensor_length:
        expected = HEADER.size + body_length + tensor_length
        raise CodecError(f"the header announces a message of {expected} bytes, but there are {len(view)}")
    body = bytes(view[HEADER.size : HEADER.size + body_length])
    decoder = _Decoder(view[HEADER.size + body_length :], limits, device)
    try:
        return decoder.message(body)
    except CodecError:
        raise
    except (ValueError, RecursionError) as error:  # json's own complaints, and text that is not ASCII
        raise CodecError(f"the body is not the JSON expected: {error}") from None


def sent_from(tensor: Tensor) -> str:
    """The device that a decoded tensor was on when it was sent, for example ``cuda:0``. It is what the sender says."""
    return getattr(tensor, "_sent_from", str(tensor.device))


def send(
    connection: socket.socket,
    value: Any,
    limits: Limits = LIMITS,
    *,
    strict: bool = False,
    deadline: float | None = None,
) -> None:
    """Encode a value and write all of it.

    deadline: on time.monotonic's clock.   Raises what ``encode`` raises, TimeoutError when the other side has not taken
    it all by the deadline (then close the connection: half a message is under way), Closed when it is gone.
    """
    message = encode(value, limits, strict=strict)
    before = connection.gettimeout()
    try:
        connection.settimeout(_remaining(deadline, "sent"))
        connection.sendall(message)  # its timeout is for the whole message
    except TimeoutError:
        raise TimeoutError("the message could not be sent before the deadline") from None
    except ConnectionError:
        raise Closed("the other side closed the connection before it had read the message") from None
    finally:
        _restore_timeout(connection, before)


def receive(
    connection: socket.socket,
    limits: Limits = LIMITS,
    deadline: float | None = None,
    *,
    device: str | None = None,
) -> Any:
    """Read one message and decode it.

    deadline: on time.monotonic's clock, for the whole message however it trickles in; None waits for ever.
    Raises Closed at the end of the stream, TimeoutError at the deadline, CodecError for anything malformed. After any
    of them the connection is of no more use: close it.
    """
    before = connection.gettimeout()
    try:
        message = bytearray()
        _read(connection, message, HEADER.size, deadline)
        body_length, tensor_length = _lengths(message, limits)
        _read(connection, message, HEADER.size + body_length + tensor_length, deadline)
    finally:
        _restore_timeout(connection, before)
    return decode(message, limits, device=device)


def _read(connection: socket.socket, message: bytearray, length: int, deadline: float | None) -> None:
    """Fill message up to length bytes. It grows with what arrives, not with what was announced."""
    while len(message) < length:
        connection.settimeout(_remaining(deadline, "received"))
        try:
            part = connection.recv(min(CHUNK, length - len(message)))
        except TimeoutError:
            continue  # _remaining says so
        except ConnectionError:
            part = b""
        if not part:
            where = "in the middle of a message" if message else "where a message was expected"
            raise Closed(f"the other side closed the connection {where}")
        message += part


def _remaining(deadline: float | None, verb: str) -> float | None:
    if deadline is None:
        return None
    seconds = deadline - time.monotonic()
    if seconds <= 0:
        raise TimeoutError(f"the message was not {verb} before the deadline")
    return seconds


def _restore_timeout(connection: socket.socket, seconds: float | None) -> None:
    with contextlib.suppress(OSError):  # somebody closed it meanwhile
        connection.settimeout(seconds)


def _lengths(header: bytes | bytearray | memoryview, limits: Limits) -> tuple[int, int]:
    """The bytes of the body and of the tensors, as a header says, within the limits."""
    magic, body, tensors = HEADER.unpack(header)
    if magic != MAGIC:
        raise CodecError(f"a message starts with {MAGIC!r}, this one with {magic!r}")
    _within(body, limits.body, "bytes of JSON")
    _within(HEADER.size + body + tensors, limits.total, "bytes")
    return body, tensors


def _within(count: int, limit: int, unit: str) -> None:
    if count > limit:
        raise CodecError(f"a message may have {limit} {unit}, this one has {_short(count)}")


def _short(count: int) -> str:
    """A count for a message; the other side may have claimed one of thousands of digits."""
    return str(count) if count < 1 << 64 else "far more"


def _tensor_bytes(shape: Sequence[int], dtype: torch.dtype, limits: Limits) -> int:
    """The bytes of a tensor.

    Also the other sizes of an empty tensor must be reasonable: torch computes strides from them, which may overflow.
    """
    if len(shape) > DIMENSIONS:
        raise CodecError(f"a tensor may have {DIMENSIONS} dimensions, this one has {len(shape)}")
    _within(math.prod(max(size, 1) for size in shape) * dtype.itemsize, limits.total, "bytes in a tensor")
    return math.prod(shape) * dtype.itemsize


class _Encoder:
    """One message in the making: a tree for json, and the bytes of the tensors met so far."""

    def __init__(self, limits: Limits, strict: bool) -> None:
        self.limits = limits
        self.strict = strict
        self.nodes = 0
        self.tensor_length = 0
        self.parts: list[memoryview] = []
        self.path: list[Any] = []  # the keys and indices that lead to the value in hand

    def message(self, value: Any) -> bytes:
        tree = self.node(value)
        body = json.dumps(tree, allow_nan=False, check_circular=False, separators=(",", ":")).encode("ascii")
        header = HEADER.pack(MAGIC, min(len(body), 0xFFFFFFFF), self.tensor_length)
        _lengths(header, self.limits)
        _check_structure(body, self.limits)
        return b"".join([header, body, *self.parts])

    def node(self, value: Any) -> Any:
        self.nodes += 1
        _within(self.nodes, self.limits.nodes, "values")
        _within(len(self.path), self.limits.depth, "levels of nesting")
        if value is None or value is True or value is False:
            return value
        kind = type(value)
        if issubclass(kind, Tensor):
            return self.tensor(value)
        if kind is Opaque:
            return self.opaque(value.text)
        if self.strict and kind not in (int, float, str, list, tuple, dict):
            self.refuse(value)
        before = len(self.parts), self.tensor_length, len(self.path)
        try:
            if issubclass(kind, (int, float, str)):
                return self.scalar(value)
            if issubclass(kind, Mapping):
                return self.mapping(value)
            if issubclass(kind, Sequence):
                items = [self.inner(i, item) for i, item in enumerate(value)]
                return {"t": items} if issubclass(kind, tuple) else items
        except CodecError:
            raise
        except Exception:  # a key that is not plain, or a class of the student's that cannot be walked through
            if self.strict:
                raise
        self.tensor_length = before[1]
        del self.parts[before[0] :], self.path[before[2] :]  # the body will not name these tensors
        return self.opaque(_described(value))

    def inner(self, key: Any, value: Any) -> Any:
        self.path.append(key)
        tree = self.node(value)
        self.path.pop()
        return tree

    def scalar(self, value: int | float | str) -> Any:
        """A number or a string, also of a subclass: what the base class's own methods say it is."""
        if isinstance(value, str):
            text = str.__str__(value)
            _within(len(text), self.limits.text, "characters in a string")
            return {"u": text.encode("utf-8", "surrogatepass").hex()} if _SURROGATE.search(text) else text
        if isinstance(value, float):
            number = float.__float__(value)
            return number if math.isfinite(number) else {"f": struct.pack(">d", number).hex()}
        whole = int.__int__(value)
        if abs(whole) < 1 << 63:
            return whole
        _within((whole.bit_length() + 3) // 4, self.limits.digits, "hexadecimal digits in a number")
        return {"i": format(whole, "x")}

    def mapping(self, value: Mapping[Any, Any]) -> Any:
        entries: list[Any] = []
        for key in value:
            plain = type(key) in (str, int) if self.strict else isinstance(key, (str, int))
            if not plain or (isinstance(key, int) and abs(key) >= KEYS):
                self.refuse(key, "a key of ")
            self.nodes += 1
            entries += [self.scalar(key), self.inner(key, value[key])]
        return {"d": entries}

    def tensor(self, value: Tensor) -> Any:
        """The description of a tensor; its bytes are kept. Torch's own methods are used, not a subclass's."""
        problem = "a tensor whose numbers cannot be read"  # sparse, on meta, or a wrapper that vmap left behind
        with torch._C.DisableTorchFunction():
            try:
                plain = Tensor.as_subclass(Tensor.detach(value), Tensor)
                name = str(plain.dtype).removeprefix("torch.")
                if name not in DTYPES:
                    problem = f"a tensor of {name}"
                    raise TypeError(problem)
                length = _tensor_bytes(plain.shape, plain.dtype, self.limits)
                _within(len(self.parts) + 1, self.limits.tensors, "tensors")
                _within(self.tensor_length + length, self.limits.total, "bytes")
                flat = plain.cpu().resolve_conj().resolve_neg().clone(memory_format=torch.contiguous_format).reshape(-1)
                part = memoryview(flat.view(torch.uint8).numpy().data if length else b"")
                description = [name, list(plain.shape), str(plain.device)]
            except CodecError:
                raise
            except Exception:
                if self.strict:
                    self.refuse(value)
                return self.opaque(problem)
        self.parts.append(part)
        self.tensor_length += length
        return {"x": description}

    def opaque(self, text: str) -> Any:
        return {"o": self.scalar(str(text)[:OPAQUE_LENGTH])}

    def refuse(self, value: Any, prefix: str = "") -> NoReturn:
        where = prefix + "value" + "".join(f"[{key!r}]" for key in self.path)
        allowed = (
            f"only plain data, with keys that are strings or modest whole numbers, and tensors of {', '.join(DTYPES)}"
        )
        raise TypeError(f"{where} is {_described(value)}: {allowed} can be sent")


def _described(value: Any) -> str:
    try:
        return describe(value)
    except Exception:
        return "an object"


def _check_structure(body: bytes, limits: Limits) -> None:
    """Count the nodes and the depth of a JSON text before it is parsed, so that parsing it takes bounded memory."""
    skeleton = _STRING.sub(b"", body)
    parts = sum(skeleton.count(mark) for mark in (b",", b"[", b"{"))
    _within(parts, 4 * limits.nodes + (DIMENSIONS + 8) * limits.tensors, "brackets and commas")
    depth = 0
    for bracket in _BRACKET.finditer(skeleton):
        depth += 1 if bracket[0] in (b"[", b"{") else -1
        if depth > 2 * limits.depth + 4:  # a tuple or a dict takes two levels of JSON, a tensor's shape three
            raise CodecError(f"a message may have {limits.depth} levels of nesting, this one has more")


class _Decoder:
    """One message being read: the bytes of its tensors are handed out in order, and all must be used."""

    def __init__(self, data: memoryview, limits: Limits, device: str | None) -> None:
        self.data = data
        self.limits = limits
        self.device = device
        self.nodes = 0
        self.tensors = 0
        self.position = 0

    def message(self, body: bytes) -> Any:
        _check_structure(body, self.limits)
        tree = _JSON.decode(body.decode("ascii"))
        value = self.node(tree, 0)
        if self.position != len(self.data):
            raise CodecError(f"the tensors take {self.position} bytes, but there are {len(self.data)}")
        return value

    def node(self, tree: Any, depth: int) -> Any:
        self.nodes += 1
        _within(self.nodes, self.limits.nodes, "values")
        _within(depth, self.limits.depth, "levels of nesting")
        if isinstance(tree, list):
            return [self.node(item, depth + 1) for item in tree]
        if isinstance(tree, str):
            return self.text(tree)
        if not isinstance(tree, _Tagged):
            return tree  # None, bool, int, float
        tag, content = tree.tag, tree.content
        if tag == "t" and isinstance(content, list):
            return tuple([self.node(item, depth + 1) for item in content])
        if tag == "d" and isinstance(content, list):
            return self.mapping(content, depth)
        if tag == "x" and isinstance(content, list):
            return self.tensor(content)
        if tag == "o" and isinstance(content, (str, _Tagged)):
            text = self.node(content, depth)
            if isinstance(text, str) and len(text) <= OPAQUE_LENGTH:
                return Opaque(text)
        if tag in ("i", "f", "u") and isinstance(content, str):
            return self.scalar(tag, content)
        raise CodecError(f"a message holds an entry {tag[:20]!r} with {describe(content)}, which stands for nothing")

    def scalar(self, tag: str, digits: str) -> int | float | str:
        """What JSON cannot write exactly, from its hexadecimal digits."""
        allowed = {"i": self.limits.digits, "f": 16, "u": 8 * self.limits.text}[tag]
        _within(len(digits.removeprefix("-")), allowed, "hexadecimal digits here")
        if tag == "u":
            return self.text(bytes.fromhex(digits).decode("utf-8", "surrogatepass"))
        if not _HEX.fullmatch(digits) or (tag == "f" and len(digits) != 16):
            raise CodecError("a number in a message is not written in hexadecimal digits")
        if tag == "i":
            return int(digits, 16)  # base 16 takes linear time
        number: float = struct.unpack(">d", bytes.fromhex(digits))[0]
        return number

    def text(self, text: str) -> str:
        _within(len(text), self.limits.text, "characters in a string")
        return text

    def mapping(self, entries: list[Any], depth: int) -> dict[str | int, Any]:
        if len(entries) % 2:
            raise CodecError("a dict in a message has a key without a value")
        result: dict[str | int, Any] = {}
        for tree, item in zip(entries[::2], entries[1::2], strict=True):
            key = self.node(tree, depth)
            if type(key) not in (str, int):
                raise CodecError(f"the keys of a dict in a message are strings or whole numbers, not {describe(key)}")
            if isinstance(key, int) and abs(key) >= KEYS:
                raise CodecError(f"a whole number that is a key in a message is below {KEYS} in size")
            if key in result:
                raise CodecError("a dict in a message has the same key twice")
            result[key] = self.node(item, depth + 1)
        return result

    def tensor(self, description: list[Any]) -> Tensor:
        self.tensors += 1
        _within(self.tensors, self.limits.tensors, "tensors")
        if [type(part) for part in description] != [str, list, str]:
            raise CodecError("a tensor in a message is described by its dtype, its shape and its device")
        name, shape, device = description
        if name not in DTYPES:
            raise CodecError(f"a tensor in a message is of one of {', '.join(DTYPES)}, not {name[:20]!r}")
        if not _DEVICE.fullmatch(device):
            raise CodecError("the device of a tensor in a message is not a name like cpu or cuda:0")
        if any(type(size) is not int or size < 0 for size in shape):
            raise CodecError("the shape of a tensor in a message is a list of whole numbers that are not negative")
        length = _tensor_bytes(shape, DTYPES[name], self.limits)
        if length > len(self.data) - self.position:
            raise CodecError(f"a tensor needs {length} bytes, but {len(self.data) - self.position} are left")
        with torch._C.DisableTorchFunction():  # a default device that a notebook has set is not meant here
            tensor = self.read(DTYPES[name], length).reshape(shape)
            if self.device is not None:
                tensor = tensor.to(self.device)
        if device != "cpu":
            tensor._sent_from = device  # type: ignore[attr-defined]
        return tensor

    def read(self, dtype: torch.dtype, length: int) -> Tensor:
        """The next tensor, one-dimensional, with memory of its own."""
        if not length:
            return torch.empty(0, dtype=dtype, device="cpu")
        content = bytearray(self.data[self.position : self.position + length])
        self.position += length
        if dtype is torch.bool and bool((torch.frombuffer(content, dtype=torch.uint8) > 1).any()):
            raise CodecError("a tensor of bool in a message has bytes other than 0 and 1")
        return torch.frombuffer(content, dtype=dtype)


@dataclass(frozen=True, slots=True)
class _Tagged:
    """A JSON object of a message: one entry."""

    tag: str
    content: Any


def _tagged(pairs: list[tuple[str, Any]]) -> _Tagged:
    if len(pairs) != 1:
        raise CodecError(f"an object in a message has one entry, this one has {len(pairs)}")
    return _Tagged(*pairs[0])


def _whole(digits: str) -> int:
    if len(digits) > 20:
        raise CodecError("a whole number in a message is too long to be written in decimal digits")
    return int(digits)


def _decimal(digits: str) -> float:
    number = float(digits) if len(digits) <= 40 else math.inf
    if not math.isfinite(number):
        raise CodecError("a number in a message is too long or too large")
    return number


def _no_constant(name: str) -> NoReturn:
    raise CodecError(f"a message holds {name}, which is not JSON")


_JSON = json.JSONDecoder(object_pairs_hook=_tagged, parse_int=_whole, parse_float=_decimal, parse_constant=_no_constant)
