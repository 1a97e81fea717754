"""Messages between worker and jail: exact round trips, and nothing but CodecError for whatever is malformed."""

import collections
import contextlib
import json
import math
import random
import socket
import struct
import subprocess
import sys
import threading
import time
import tracemalloc
from pathlib import Path

import pytest
import torch

from lecturekit.checking.compare import Opaque
from lecturekit.grading import codec
from lecturekit.grading.codec import DTYPES, HEADER, MAGIC, Closed, CodecError, Limits, decode, encode, receive, send

ROOT = Path(__file__).resolve().parents[2]


def same(left, right):
    """Equal in type, value and bits: NaN equals the same NaN, 0.0 is not -0.0, a tuple is not a list."""
    if type(left) is not type(right):
        return False
    if isinstance(left, torch.Tensor):
        return left.shape == right.shape and left.dtype == right.dtype and content(left) == content(right)
    if isinstance(left, float):
        return struct.pack(">d", left) == struct.pack(">d", right)
    if isinstance(left, dict):
        return list(left) == list(right) and all(same(left[key], right[key]) for key in left)
    if isinstance(left, (list, tuple)):
        return len(left) == len(right) and all(map(same, left, right))
    return left == right


def content(tensor):
    return tensor.contiguous().reshape(-1).view(torch.uint8).tolist() if tensor.numel() else []


def framed(body, tensors=b"", body_length=None, tensor_length=None):
    """A message with this body; the lengths are what its header says where that is not true."""
    body = body if isinstance(body, bytes) else json.dumps(body).encode()
    body_length = len(body) if body_length is None else body_length
    tensor_length = len(tensors) if tensor_length is None else tensor_length
    return HEADER.pack(MAGIC, body_length, tensor_length) + body + tensors


# Round trips


def random_tensor(draw):
    dtype = draw.choice(list(DTYPES.values()))
    shape = [draw.randint(0, 4) for _ in range(draw.randint(0, 4))]
    length = math.prod(shape) * dtype.itemsize
    raw = bytearray(draw.randint(0, 1) if dtype is torch.bool else draw.randint(0, 255) for _ in range(length))
    tensor = torch.frombuffer(raw, dtype=dtype).reshape(shape) if raw else torch.empty(shape, dtype=dtype)
    return tensor.permute(draw.sample(range(len(shape)), len(shape)))


def random_value(draw, depth=0):
    text = "".join(draw.choice('aZ9 "\\\n\0é漢\U0001f600\ud800\udc00\udfff{}[],:') for _ in range(draw.randint(0, 6)))
    if depth < 5 and draw.random() < 0.6:
        items = [random_value(draw, depth + 1) for _ in range(draw.randint(0, 4))]
        keys = [draw.choice([text + str(i), i, -(10 ** (3 * i + 3)), (1 << 60) - 1 - i]) for i in range(len(items))]
        return draw.choice([items, tuple(items), dict(zip(keys, items, strict=True))])
    bits = struct.unpack(">d", draw.randbytes(8))[0]
    odd = draw.choice([0.0, -0.0, math.nan, -math.nan, math.inf, -math.inf, 5e-324, 1.7976931348623157e308, 0.1])
    whole = draw.choice([0, -1, 2**63 - 1, 2**63, -(2**63), draw.getrandbits(4000), -draw.getrandbits(500)])
    plain = [None, True, False, bits, odd, whole, text, Opaque(text), random_tensor(draw), random_tensor(draw)]
    return draw.choice(plain)


def test_random_nested_data_comes_back_bit_for_bit():
    for seed in range(1500):
        value = random_value(random.Random(seed))
        for strict in (False, True):
            assert same(decode(encode(value, strict=strict)), value), f"seed {seed}: {value}"


@pytest.mark.parametrize("name", DTYPES)
def test_every_allowed_dtype_comes_back_bit_for_bit_whatever_its_strides(name):
    raw = bytearray(random.Random(0).randbytes(4 * 6 * 5 * DTYPES[name].itemsize))
    if name == "bool":
        raw = bytearray(byte & 1 for byte in raw)
    base = torch.frombuffer(raw, dtype=DTYPES[name]).reshape(4, 6, 5)
    views = [
        base,
        base.transpose(0, 2),
        base[1:, ::2, 3],
        base[:1].expand(3, 6, 5),
        base[2, 3, 4],
        base[:, :0],
        base.flip(0),
    ]
    assert same(decode(encode(views)), views)


@pytest.mark.parametrize("dtype", [torch.uint16, torch.uint32, torch.uint64, torch.float8_e4m3fn])
def test_other_dtypes_arrive_as_opaque(dtype):
    name = str(dtype).removeprefix("torch.")
    assert decode(encode([torch.zeros(2, dtype=dtype)])) == [Opaque(f"a tensor of {name}")]


def test_the_tensor_that_arrives_has_no_history_and_memory_of_its_own():
    class Loud(torch.Tensor):
        @classmethod
        def __torch_function__(cls, *arguments, **options):
            raise AssertionError("a method of the subclass was used")

    data = torch.randn(3, 3)
    parameter = torch.nn.Parameter(data)
    kept = [data, parameter, parameter * 1, data.as_subclass(Loud), torch.ones(2, dtype=torch.complex64).conj()]
    message = encode(kept)
    got = decode(message)
    assert all(type(tensor) is torch.Tensor and not tensor.requires_grad for tensor in got)
    assert torch.equal(got[3], data)
    got[0].zero_()
    assert torch.equal(got[1], data) and torch.equal(decode(message)[0], data)


def left_behind():
    """A tensor that a student kept from inside vmap, where it stands for one row of another."""
    kept = []
    torch.vmap(lambda row: kept.append(row) or row)(torch.ones(2, 3))
    return kept[0]


@pytest.mark.parametrize("tensor", [torch.eye(2).to_sparse(), torch.zeros(2, device="meta"), left_behind()])
def test_tensors_without_readable_numbers_arrive_as_opaque(tensor):
    assert decode(encode([1, tensor])) == [1, Opaque("a tensor whose numbers cannot be read")]


def test_the_name_of_the_device_goes_along():
    on_gpu = framed({"x": ["float32", [1], "cuda:0"]}, b"\0\0\x80\x3f")
    tensor = decode(on_gpu)
    assert (tensor.device.type, tensor.item(), codec.sent_from(tensor)) == ("cpu", 1.0, "cuda:0")
    assert codec.sent_from(decode(encode(torch.ones(1)))) == "cpu"
    assert decode(on_gpu, device="meta").device.type == "meta"


@pytest.mark.gpu
def test_a_tensor_on_the_gpu_is_copied_and_can_be_put_back():
    tensor = torch.randn(3, 4, device="cuda").t()
    got = decode(encode(tensor, strict=True))
    assert got.device.type == "cpu" and torch.equal(got, tensor.cpu()) and codec.sent_from(got) == "cuda:0"
    assert decode(encode(tensor), device="cuda").device.type == "cuda"


def test_defaults_that_a_notebook_sets_do_not_reach_the_codec():
    value = [torch.ones(2), torch.empty(0, 3), torch.tensor(True)]
    torch.set_default_device("meta")
    torch.set_default_dtype(torch.float64)
    try:
        got = decode(encode(value))
    finally:
        torch.set_default_device(None)
        torch.set_default_dtype(torch.float32)
    assert same(got, value)


def test_what_compare_takes_for_data_arrives_as_data():
    class Point(collections.namedtuple("Point", "x y")):
        pass

    class Text(str):
        def __str__(self):
            return "another"

    value = [range(3), collections.deque([1]), collections.OrderedDict(a=1), Point(1, 2), torch.Size([4]), Text("own")]
    assert decode(encode(value)) == [[0, 1, 2], [1], {"a": 1}, (1, 2), (4,), "own"]


def test_anything_else_arrives_as_opaque_and_the_rest_unharmed():
    class Broken(collections.UserDict):
        def __iter__(self):
            raise KeyboardInterrupt if False else RuntimeError("no")

    class Posing:
        __class__ = torch.Tensor

    value = [
        {torch.ones(1)},
        {"first": torch.zeros(3), 1.5: 2},
        Broken(),
        Posing(),
        print,
        torch.ones(2),
        type("", (), {})(),
    ]
    *opaque, tensor, nameless = decode(encode(value))
    assert all(isinstance(item, Opaque) for item in [*opaque, nameless])
    assert [item.text for item in opaque][:2] == ["a set", "a dict"]
    assert torch.equal(tensor, torch.ones(2))


@pytest.mark.parametrize(
    ("value", "place"),
    [
        ({"a": [1, {2}]}, "value['a'][1]"),
        ({"a": (0, range(3))}, "value['a'][1]"),
        ({"a": {1.5: 0}}, "a key of value['a']"),
        ({True: 0}, "a key of value"),
        ({"a": {1 << 60: 0}}, "a key of value['a']"),
        ([torch.zeros(1, dtype=torch.uint16)], "value[0]"),
        ([torch.zeros(1, device="meta")], "value[0]"),
    ],
)
def test_the_strict_side_refuses_what_is_not_plain_data_and_says_where(value, place):
    with pytest.raises(TypeError) as caught:
        encode(value, strict=True)
    assert str(caught.value).startswith(f"{place} is ")


def test_encoding_under_a_long_key_is_linear():
    """Were the place of each value written out as it is met, this would copy a terabyte."""
    value = {"k" * 4_000_000: [0] * 300_000}
    assert decode(encode(value)) == value


# Limits


def nested(depth, wrap):
    value = wrap()
    for _ in range(depth):
        value = wrap(value)
    return value


LIMITED = Limits(total=4096, body=2048, tensors=3, nodes=50, depth=6, text=100, digits=20)
WRAPS = [lambda *v: list(v), lambda *v: tuple(v), lambda *v: dict(enumerate(v))]
WITHIN = [
    torch.zeros(500),
    [torch.zeros(1)] * 3,
    [0] * 49,
    [()] * 49,
    [{}] * 49,
    [math.nan] * 49,
    {i: i for i in range(24)},
    "é" * 100,
    "\ud800" * 100,
    16**20 - 1,
    torch.zeros([1] * 32),
    *(nested(6, wrap) for wrap in WRAPS),
]
BEYOND = [
    torch.zeros(1100),
    torch.zeros(1).expand(10**15),
    torch.zeros(0, 10**12),
    [torch.zeros(300), torch.zeros(300), torch.zeros(500)],
    [torch.zeros(1)] * 4,
    [0] * 50,
    {i: i for i in range(25)},
    "a" * 101,
    "\ud800" * 101,
    {"a" * 101: 1},
    16**20,
    -(16**20),
    ["é" * 100] * 5,
    torch.zeros([1] * 33),
    *(nested(7, wrap) for wrap in WRAPS),
]


@pytest.mark.parametrize("value", WITHIN, ids=range(len(WITHIN)))
def test_what_is_just_within_the_limits_passes(value):
    assert same(decode(encode(value, LIMITED), LIMITED), value)


@pytest.mark.parametrize("value", BEYOND, ids=range(len(BEYOND)))
def test_what_is_just_beyond_a_limit_is_refused_on_either_side(value):
    with pytest.raises(CodecError, match="may have"):
        encode(value, LIMITED)
    if not isinstance(value, torch.Tensor) or value.numel() < 10**6 and 10**12 not in value.shape:
        with pytest.raises(CodecError, match="may have"):
            decode(encode(value), LIMITED)


def test_data_that_holds_itself_and_data_that_unfolds_without_end_are_refused():
    circle = []
    circle.append(circle)
    doubling = [0]
    for _ in range(50):
        doubling = [doubling, doubling]

    class Endless(collections.UserList):
        def __iter__(self):
            while True:
                yield 0

    for value in (circle, doubling, Endless()):
        with pytest.raises(CodecError, match="may have"):
            encode(value)


# What somebody else may send

TENSOR = ["float32", [2], "cpu"]
HOSTILE = {
    "nothing": b"",
    "half a header": HEADER.pack(MAGIC, 0, 0)[:9],
    "another magic": b"PK\3\4" + framed(1)[4:],
    "no body": framed(b""),
    "a body longer than it is": framed(1, body_length=2),
    "a body of gigabytes": framed(1, body_length=2**32 - 1),
    "tensors of exabytes": framed(1, tensor_length=2**64 - 1),
    "bytes left over behind": framed(1) + b"\0",
    "tensor bytes that nobody asks for": framed(1, b"\0" * 8),
    "too few tensor bytes": framed({"x": TENSOR}, b"\0" * 7),
    "too many tensor bytes": framed({"x": TENSOR}, b"\0" * 9),
    "the same bytes for two tensors": framed([{"x": TENSOR}, {"x": TENSOR}], b"\0" * 8),
    "a negative size": framed({"x": ["float32", [-2], "cpu"]}, b"\0" * 8),
    "two negative sizes": framed({"x": ["float32", [-2, -1], "cpu"]}, b"\0" * 8),
    "a huge size": framed({"x": ["float32", [2**62], "cpu"]}),
    "sizes that overflow 64 bits to 8 bytes": framed({"x": ["float32", [2**32, 2**32, 2], "cpu"]}, b"\0" * 8),
    "an empty tensor with strides that overflow": framed({"x": ["float32", [0, 2**62, 2**62], "cpu"]}),
    "a thousand dimensions": framed({"x": ["float32", [1] * 1000, "cpu"]}, b"\0" * 4),
    "a size of text": framed({"x": ["float32", ["2"], "cpu"]}, b"\0" * 8),
    "a size of 2.0": framed({"x": ["float32", [2.0], "cpu"]}, b"\0" * 8),
    "a size of true": framed({"x": ["float32", [True], "cpu"]}, b"\0" * 4),
    "a dtype off the list": framed({"x": ["uint16", [2], "cpu"]}, b"\0" * 4),
    "an attribute of torch for a dtype": framed({"x": ["load", [2], "cpu"]}, b"\0" * 8),
    "a list for a dtype": framed({"x": [["float32"], [2], "cpu"]}, b"\0" * 8),
    "a device that is not a name": framed({"x": ["float32", [2], "<script>"]}, b"\0" * 8),
    "a tensor without a device": framed({"x": ["float32", [2]]}, b"\0" * 8),
    "a tensor for a tensor": framed({"x": {"x": TENSOR}}, b"\0" * 8),
    "a bool that is 2": framed({"x": ["bool", [2], "cpu"]}, b"\1\2"),
    "an unknown entry": framed({"py/object": "os.system"}),
    "an object with two entries": framed({"t": [], "d": []}),
    "an object with the same entry twice": framed(b'{"t": [1], "t": [2]}'),
    "an empty object": framed({}),
    "the same key twice": framed({"d": ["a", 1, "a", 2]}),
    "the same key in two spellings": framed({"d": ["a", 1, {"u": "61"}, 2]}),
    "a key without a value": framed({"d": ["a"]}),
    "a list for a key": framed({"d": [[], 1]}),
    "a tensor for a key": framed({"d": [{"x": TENSOR}, 1]}, b"\0" * 8),
    "true for a key": framed({"d": [True, 1]}),
    "a key that is too large": framed({"d": [1 << 60, 1]}),
    "a key that is too small": framed({"d": [{"i": "-1000000000000000"}, 1]}),
    "a hundred thousand keys with one hash": framed({"d": [{"i": f"{i * (2**61 - 1):x}"} for i in range(200_000)]}),
    "invalid UTF-8": framed(b'"\xff\xfe"'),
    "UTF-8 where ASCII is due": framed('"é"'.encode()),
    "invalid UTF-8 in hexadecimal": framed({"u": "ff"}),
    "half a byte in hexadecimal": framed({"u": "6"}),
    "a string cut off": framed(b'"abc'),
    "a string cut off behind a backslash": framed(b'"abc\\'),
    "a raw line feed in a string": framed(b'"a\nb"'),
    "NaN": framed(b"NaN"),
    "-Infinity": framed(b"[-Infinity]"),
    "a float that is infinite": framed(b"1e999"),
    "a float of a million digits": framed(b"0." + b"1" * 10**6),
    "an int of 21 digits": framed(b"9" * 21),
    "an int of a million digits": framed(b"1" * 10**6),
    "an int of a million hexadecimal digits": framed({"i": "f" * 10**6}),
    "an int in Python's spelling": framed({"i": "0x_f"}),
    "an int without digits": framed({"i": ""}),
    "a float of 4 bytes": framed({"f": "7fc00000"}),
    "a float with a sign": framed({"f": "-ff8000000000000"}),
    "an int of a list": framed({"i": [1]}),
    "a million brackets": framed(b"[" * 10**6),
    "a million objects": framed(b'{"t":' * 10**6),
    "a million brackets that close": framed(b"[" * 10**6 + b"]" * 10**6),
    "closing brackets first": framed(b"]" * 10**6 + b"[" * 10**6),
    "a million lists": framed(b"[" + b"[]," * 10**6 + b"[]]"),
    "a long Opaque": framed({"o": "a" * 10_000}),
    "an Opaque of a list": framed({"o": ["a"]}),
    "an Opaque of an Opaque": framed({"o": {"o": "a"}}),
    "two values": framed(b"1 2"),
    "a byte order mark": framed(b"\xef\xbb\xbf1"),
    "UTF-16": framed("[1]".encode("utf-16")),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_message_is_refused_in_one_sentence(name):
    with pytest.raises(CodecError) as caught:
        decode(HOSTILE[name])
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 300


RICH = {
    "name": 'x"\\\ud800',
    3: (1, -2.5, math.nan, 2**70, None, True),
    "nested": [[{"deep": [torch.arange(4, dtype=torch.int16)]}], Opaque("a set")],
    "mask": torch.tensor([True, False, True]),
    "empty": [torch.empty(0, 2), {}, (), [], ""],
}


def test_a_message_cut_off_anywhere_is_refused():
    message = encode(RICH)
    for length in range(len(message)):
        with pytest.raises(CodecError):
            decode(message[:length])


def test_forty_thousand_mutations_raise_nothing_but_codec_errors():
    """Flipped, inserted, removed and copied bytes, with the header put right so that most get past it."""
    draw = random.Random(0)
    original = encode(RICH)
    header, body_length = HEADER.size, HEADER.unpack(original[: HEADER.size])[1]
    tokens = [
        b"[",
        b"]",
        b"{",
        b"}",
        b'"',
        b",",
        b":",
        b"\\",
        b"-",
        b"9999999999",
        b"1e9",
        b"null",
        b"true",
        b"\xff",
        b"x",
    ]
    refused = 0
    for round in range(40_000):
        body, tensors = bytearray(original[header : header + body_length]), original[header + body_length :]
        message = bytearray(original)
        for _ in range(draw.randint(1, 3)):
            if round % 4 == 0:
                message[draw.randrange(len(message))] ^= 1 << draw.randrange(8)
            start = draw.randrange(len(body))
            end = min(len(body), start + draw.choice([0, 1, 1, 8]))
            body[start:end] = draw.choice([b"", draw.choice(tokens), body[end : end + 6], draw.randbytes(1)])
        try:
            value = decode(bytes(message) if round % 4 == 0 else framed(bytes(body), tensors))
        except CodecError:
            refused += 1
        else:
            assert same(decode(encode(value)), value)  # what passes is plain data
    assert 20_000 < refused < 40_000


def test_random_bytes_are_refused():
    draw = random.Random(1)
    for _ in range(5_000):
        noise = draw.randbytes(draw.randint(0, 60))
        for message in (noise, MAGIC + noise, framed(noise)):
            try:
                decode(message)
            except CodecError:
                continue
            assert len(noise) < 4  # a digit or two are JSON


# Time and memory


GROWING = {
    "brackets": lambda n: framed(b"[" * n),
    "lists": lambda n: framed(b"[" + b"[]," * n + b"[]]"),
    "quotes cut off": lambda n: framed(b'"' + b'\\"' * n),
    "backslashes": lambda n: framed(b'"' + b"\\" * n),
    "many strings": lambda n: framed(b"[" + b'"",' * n + b'""]'),
    "quotes": lambda n: framed(b'"' * n),
    "digits": lambda n: framed(b"1" * n),
    "decimals": lambda n: framed(b"0." + b"3" * n),
    "keys": lambda n: framed(b'{"d":[' + b",".join(b'"%d",0' % i for i in range(n // 4)) + b"]}"),
    "keys with equal low bits": lambda n: framed(
        b'{"d":[' + b",".join(b"%d,0" % (i << 40) for i in range(n // 16)) + b"]}"
    ),
    "tensors": lambda n: framed([{"x": ["uint8", [1], "cpu"]}] * (n // 50), b"\0" * (n // 50)),
    "spaces": lambda n: framed(b" " * n + b"1"),
    "surrogates": lambda n: framed(b'"' + b"\\ud800" * n + b'"'),
}


@pytest.mark.parametrize("name", GROWING)
def test_the_work_of_decoding_is_linear(name):
    """Were it quadratic, two million bytes would take far longer than the time that pytest allows a test."""
    with contextlib.suppress(CodecError):
        decode(GROWING[name](2_000_000))


BOMBS = """
import resource, sys
from lecturekit.grading.codec import CodecError, HEADER, MAGIC, decode
base = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
def framed(body, length=0):
    return HEADER.pack(MAGIC, len(body), length) + body
million = 1_000_000
bombs = [
    b"[" + b"{}," * 10 * million + b"{}]", b"[" + b"[]," * 10 * million + b"[]]", b"[" * 30 * million,
    b'[' + b'{"t":[]},' * 600_000 + b'0]', b'[' + b'{"x":["uint8",[0],"cpu"]},' * 200_000 + b'0]',
    b'{"i":"' + b"f" * 30 * million + b'"}', b"9" * 30 * million, b'"' + b"\\\\u6f22" * 5 * million + b'"',
    b'{"d":[' + b",".join(b'"%d",0' % i for i in range(million)) + b"]}",
]
resource.setrlimit(resource.RLIMIT_AS, (base + (512 << 20),) * 2)
for bomb in bombs:
    try:
        decode(framed(bomb))
    except CodecError:
        continue
    sys.exit(f"accepted: {bomb[:20]}")
for claim in (b'{"x":["float64",[33554432],"cpu"]}', b'{"x":["uint8",[268435456,1],"cpu"]}'):
    try:
        decode(framed(claim, 0))
    except CodecError:
        continue
    sys.exit(f"accepted: {claim}")
print("refused")
"""


def test_messages_that_would_unfold_are_refused_within_bounded_memory():
    """Under a limit of 512 MiB more than the imports take, bodies of 30 MB that would unfold to gigabytes."""
    done = subprocess.run([sys.executable, "-c", BOMBS], cwd=ROOT, capture_output=True, text=True)
    assert (done.stdout, done.returncode) == ("refused\n", 0), done.stderr[-2000:]


def test_decoding_takes_little_more_than_the_message_itself():
    message = encode([torch.zeros(1 << 20) for _ in range(8)])
    tracemalloc.start()
    try:
        decode(message)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 1.1 * len(message)


# Sockets


@pytest.fixture
def pair():
    left, right = socket.socketpair()
    with left, right:
        yield left, right


def test_messages_go_both_ways_one_after_the_other(pair):
    left, right = pair
    values = [None, RICH, [torch.arange(1000)], "x"]

    def answer():
        for _ in values:
            send(right, receive(right))

    thread = threading.Thread(target=answer)
    thread.start()
    for value in values:
        send(left, value, strict=True, deadline=time.monotonic() + 60)
        assert same(receive(left, deadline=time.monotonic() + 60), value)
    thread.join()
    assert left.gettimeout() is None


def test_a_message_larger_than_the_sockets_buffers_arrives(pair):
    left, right = pair
    value = torch.randn(3 << 20)
    thread = threading.Thread(target=send, args=(left, value))
    thread.start()
    assert same(receive(right), value)
    thread.join()


@pytest.mark.parametrize("part", [b"", encode(RICH)[:5], encode(RICH)[:-1]])
def test_the_end_of_the_stream_raises_closed(pair, part):
    left, right = pair
    left.sendall(part)
    left.close()
    with pytest.raises(Closed):
        receive(right, deadline=time.monotonic() + 60)
    with pytest.raises(Closed):
        send(right, torch.zeros(1 << 20))


def test_a_peer_that_trickles_cannot_stretch_the_deadline(pair):
    """A byte every 10 ms, then the end: each recv succeeds, so only a deadline for the whole can be what stops it."""
    left, right = pair
    stop = threading.Event()

    def trickle():
        for byte in encode("a" * 1000)[:-1]:
            if stop.wait(0.01):
                return
            left.sendall(bytes([byte]))
        left.close()

    thread = threading.Thread(target=trickle)
    thread.start()
    try:
        with pytest.raises(TimeoutError, match="deadline"):
            receive(right, deadline=time.monotonic() + 0.3)
    finally:
        stop.set()
        thread.join()
    assert right.gettimeout() is None


def test_a_silent_peer_and_one_that_never_reads_end_at_the_deadline(pair):
    left, right = pair
    with pytest.raises(TimeoutError, match="received before the deadline"):
        receive(left, deadline=time.monotonic() + 0.05)
    with pytest.raises(TimeoutError, match="sent before the deadline"):
        send(left, torch.zeros(4 << 20), deadline=time.monotonic() + 0.05)
    with pytest.raises(TimeoutError):
        receive(right, deadline=time.monotonic() - 1)


@pytest.mark.parametrize(
    "header", [HEADER.pack(MAGIC, 2**32 - 1, 0), HEADER.pack(MAGIC, 10, 2**60), b"GET / HTTP/1.1\r\n"]
)
def test_an_oversized_or_foreign_frame_is_refused_by_its_header_alone(pair, header):
    left, right = pair
    left.sendall(header)
    with pytest.raises(CodecError):
        receive(right, deadline=time.monotonic() + 60)


def test_an_announced_length_costs_no_memory_before_the_bytes_arrive(pair):
    left, right = pair
    left.sendall(HEADER.pack(MAGIC, 10, 200 << 20) + b"1234567890" + b"\0" * 1000)
    tracemalloc.start()
    try:
        with pytest.raises(TimeoutError):
            receive(right, deadline=time.monotonic() + 0.2)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 8 << 20
