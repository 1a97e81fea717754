"""Products with packed weights: the PyTorch twins, the Triton kernels in the interpreter and compiled, and on a GPU."""

import importlib.util
import itertools
import os
import pickle
import re
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest
import torch
from torch import Tensor

import lecturekit.compression
from lecturekit import timing
from lecturekit.compression import bitdelta, kernels, kernels_torch, nf4

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
CAN_COMPILE = shutil.which("g++") is not None and Path(sysconfig.get_path("include"), "Python.h").exists()
needs_triton = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")


class Deltas:
    """A batch over several fine-tunes, and the exact result in float64."""

    def __init__(self, seed, batch, out, width, models, dtype, index=None):
        draw = torch.Generator().manual_seed(seed)
        self.x = torch.randn(batch, width, generator=draw).to(dtype)
        self.weight = torch.randn(out, width, generator=draw).to(dtype)
        signs = torch.randint(0, 2, (models, out, width), generator=draw, dtype=torch.int8) * 2 - 1
        self.packed = torch.stack([bitdelta.pack(one) for one in signs])
        self.scales = torch.rand(models, generator=draw) + 0.1
        drawn = torch.randint(0, models, (batch,), generator=draw)
        self.index = drawn if index is None else torch.tensor(index)
        change = self.scales.double()[:, None, None] * signs.double()
        rows = zip(self.x.double(), self.index.tolist(), strict=True)
        self.exact = torch.stack([(self.weight.double() + change[delta]) @ row for row, delta in rows])
        # what the sum would be if nothing cancelled: roundings are proportional to it
        size = self.weight.double().abs() + self.scales.max().double()
        self.size = self.x.double().abs() @ size.T

    @property
    def arguments(self):
        return self.x, self.weight, self.packed, self.scales, self.index


class NF4:
    """An NF4 weight with a batch, and the exact result in float64."""

    def __init__(self, seed, batch, out, width, dtype, blocksize=64):
        draw = torch.Generator().manual_seed(seed)
        self.x = torch.randn(batch, width, generator=draw).to(dtype)
        codes, self.absmax = nf4.quantize(torch.randn(out, width, generator=draw), blocksize)
        self.packed, self.shape, self.blocksize = nf4.pack(codes), (out, width), blocksize
        self.weight = nf4.dequantize(codes, self.absmax, blocksize)
        self.exact = self.x.double() @ self.weight.double().T
        self.size = self.x.double().abs() @ self.weight.double().abs().T

    @property
    def arguments(self):
        return self.x, self.packed, self.absmax, self.shape, self.blocksize


def assert_close(got: Tensor, case: Deltas | NF4, roundings: float = 0):
    """got is the exact result but for float32 sums and for what rounding to x's dtype may do.

    A float32 sum of n products is off by n + 1 roundings of 2^-24 of its size at most, here with a factor of 2 for
    those of the weights. The result is rounded to x's dtype, or cut off, as Triton's interpreter does with bfloat16.
    roundings: how many more roundings to x's dtype there are, of values up to the sum's size (weights or W x).
    """
    assert (got.shape, got.dtype) == (case.exact.shape, case.x.dtype)
    eps = torch.finfo(case.x.dtype).eps
    allowed = (case.x.shape[-1] + 1) * 2**-23 * case.size + eps * case.exact.abs() + roundings * eps / 2 * case.size
    difference = (got.double().cpu() - case.exact).abs()
    assert (difference <= allowed).all(), f"off by {(difference / allowed).max():.1f} times what is allowed"


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("seed", range(12))
def test_each_row_meets_its_own_delta(seed, dtype):
    draw = torch.Generator().manual_seed(seed)
    batch, models = (int(torch.randint(1, 6, (), generator=draw)) for _ in range(2))
    out, width = (int(torch.randint(1, 200, (), generator=draw)) for _ in range(2))
    case = Deltas(seed, batch, out, width, models, dtype)
    assert_close(kernels.delta_product(*case.arguments), case, roundings=1)


def test_sharing_a_delta_changes_nothing():
    for index in itertools.product(range(3), repeat=3):
        case = Deltas(1, 3, 20, 24, 3, torch.float32, index=index)
        together = kernels.delta_product(*case.arguments)
        x, weight, packed, scales, rows = case.arguments
        alone = [kernels.delta_product(x[[i]], weight, packed, scales, rows[[i]]) for i in range(3)]
        # the same sums, perhaps in another order
        torch.testing.assert_close(together, torch.cat(alone), rtol=1e-5, atol=1e-5)


def test_tokens_of_a_row_share_its_delta():
    case = Deltas(2, 6, 17, 31, 3, torch.float32, index=[2, 2, 0, 0, 1, 1])
    x, weight, packed, scales, index = case.arguments
    got = kernels.delta_product(x.view(3, 2, 31), weight, packed, scales, index[::2])
    assert got.shape == (3, 2, 17)
    assert_close(got.view(6, 17), case, roundings=1)


def test_the_product_is_that_of_the_rebuilt_weight():
    """What this module promises to bitdelta: compress, pack, multiply = multiply by apply(...)."""
    draw = torch.Generator().manual_seed(3)
    base, x = torch.randn(40, 24, generator=draw), torch.randn(2, 24, generator=draw)
    signs, scale = bitdelta.compress(base, base + 0.1 * torch.randn(40, 24, generator=draw))
    got = kernels.delta_product(x, base, bitdelta.pack(signs)[None], scale[None], torch.tensor([0, 0]))
    torch.testing.assert_close(got, x @ bitdelta.apply(base, signs, scale).T, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1, 1, 1), (3, 5, 7), (2, 300, 1001), (11, 65, 513), (20, 40, 24)])
def test_the_one_bit_product_alone(shape, dtype):
    case = Deltas(4, shape[0], *shape[1:], models=1, dtype=dtype)
    case.exact = case.x.double() @ bitdelta.unpack(case.packed[0], shape[1:]).double().T
    assert_close(kernels.sign_product(case.x, case.packed[0], shape[1]), case)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("batch", "out", "width", "blocksize"),
    [(1, 1, 1, 64), (1, 33, 65, 64), (2, 20, 128, 64), (5, 70, 200, 32), (2, 300, 1001, 8), (4, 300, 1000, 4096)],
)
def test_nf4_product_is_that_of_the_dequantized_weight(batch, out, width, blocksize, dtype):
    case = NF4(5, batch, out, width, dtype, blocksize)
    assert_close(kernels.nf4_product(*case.arguments), case, roundings=1)


def test_nf4_product_takes_any_leading_shape_and_bitsandbytes_bytes():
    functional = pytest.importorskip("bitsandbytes").functional
    draw = torch.Generator().manual_seed(6)
    weight, x = torch.randn(48, 64, generator=draw), torch.randn(2, 3, 64, generator=draw)
    packed, state = functional.quantize_4bit(weight, blocksize=64, quant_type="nf4")
    got = kernels.nf4_product(x, packed, state.absmax, (48, 64))
    torch.testing.assert_close(got, x @ functional.dequantize_4bit(packed, state).T, rtol=1e-5, atol=1e-5)
    assert kernels.nf4_product(x[0, 0], packed, state.absmax, (48, 64)).shape == (48,)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("blocksize", [8, 64, 4096])
@pytest.mark.parametrize("shape", [(1,), (7,), (64,), (65,), (130, 257), (3, 4096), (600, 512)])
def test_one_pass_quantizer_gives_the_same_bytes(shape, blocksize, dtype):
    x = (torch.randn(shape, generator=torch.Generator().manual_seed(7)) * 3).to(dtype)
    codes, absmax = nf4.quantize(x, blocksize)
    packed, scales = kernels.nf4_quantize(x, blocksize)
    assert torch.equal(packed, nf4.pack(codes))
    assert torch.equal(scales, absmax)
    for wanted in DTYPES:
        again = kernels.nf4_dequantize(packed, scales, shape, blocksize, wanted)
        assert torch.equal(again, nf4.dequantize(codes, absmax, blocksize, wanted))


def hard_values():
    """Midpoints, their neighbours in float32, levels, zeros of both signs, numbers near the smallest: blocks of 64."""
    middles = (nf4.LEVELS[:-1] + nf4.LEVELS[1:]) / 2
    exact = torch.cat([middles, nf4.LEVELS, torch.tensor([0.0, -0.0])])
    exact = torch.cat([exact, *(torch.nextafter(exact, torch.full_like(exact, to)) for to in (9.0, -9.0))])
    blocks = []
    for part in exact.split(62):
        block = torch.zeros(64)
        block[: len(part)] = part
        block[63] = -1  # the block's largest, so that its scale is 1 and nothing is rounded
        blocks.append(block)
    ones = torch.stack(blocks).clamp(-1, 1)
    return torch.cat([ones, ones * 1e-30, ones * 1e-39, ones * 3e38, torch.zeros(1, 64)])


def test_one_pass_quantizer_agrees_at_midpoints_and_extremes():
    x = hard_values()
    codes, absmax = nf4.quantize(x)
    packed, scales = kernels.nf4_quantize(x)
    assert torch.equal(packed, nf4.pack(codes))
    assert torch.equal(scales, absmax)


def test_each_midpoint_has_a_bucket_of_its_own():
    """What codes_by_bucket rests on: one comparison is enough."""
    assert kernels_torch._bucket.unique().numel() == 15


def test_nothing_large_is_unpacked():
    """Beyond its result each product holds a piece, not the matrix: 16 MiB of float32 here."""
    x, packed = torch.randn(1, 2048), torch.zeros(2048 * 2048 // 8, dtype=torch.uint8)
    once = {"repeats": 1, "warmup": 1, "flush_cache": False, "device": "cpu"}
    piece = 4 * kernels_torch.PIECE
    assert timing.measure(lambda: kernels.sign_product(x, packed, 2048), **once).peak_bytes < 3 * piece
    weight = torch.randn(2048, 2048)
    codes, absmax = kernels.nf4_quantize(weight)
    product = timing.measure(lambda: kernels.nf4_product(x, codes, absmax, (2048, 2048)), **once)
    assert product.peak_bytes < 4 * piece
    made = codes.numel() + 4 * absmax.numel()
    assert timing.measure(lambda: kernels.nf4_quantize(weight), **once).peak_bytes < made + 5 * piece


def test_results_carry_no_gradient_and_inputs_stay():
    case, four = Deltas(8, 3, 16, 24, 2, torch.float32), NF4(8, 3, 16, 64, torch.float32)
    before = [tensor.clone() for tensor in (*case.arguments, *four.arguments[:3])]
    case.x.requires_grad_()
    assert not kernels.delta_product(*case.arguments).requires_grad
    assert not kernels.nf4_product(*four.arguments).requires_grad
    after = (*case.arguments, *four.arguments[:3])
    assert all(torch.equal(old, new) for old, new in zip(before, after, strict=True))


def changed(arguments, **new):
    names = ("x", "weight", "packed", "scales", "index")
    return [new.get(name, value) for name, value in zip(names, arguments, strict=True)]


@pytest.mark.parametrize(
    ("new", "error", "message"),
    [
        ({"x": torch.empty(0, 16)}, ValueError, "x must not be empty"),
        ({"x": torch.ones(16)}, ValueError, "x must have 2 or 3 dimensions"),
        ({"x": torch.ones(2, 15)}, ValueError, "in_features = 16"),
        ({"x": torch.ones(2, 16, dtype=torch.float64)}, TypeError, "x must be float32, float16 or bfloat16"),
        ({"x": [1.0]}, TypeError, "x must be a torch.Tensor"),
        ({"weight": torch.ones(8, 16, dtype=torch.float16)}, TypeError, "weight must have dtype torch.float32"),
        ({"weight": torch.ones(9, 16)}, ValueError, r"ceil\(9 \* 16 / 8\) = 18 bytes"),
        ({"packed": torch.zeros(3, 15, dtype=torch.uint8)}, ValueError, "packed's rows must have"),
        ({"packed": torch.zeros(3, 16)}, TypeError, "packed must have dtype torch.uint8"),
        ({"scales": torch.ones(2)}, ValueError, "scales must hold one for each of packed's 3 rows, got 2"),
        ({"index": torch.tensor([0])}, ValueError, "index must hold one delta for each of x's 2 rows, got 1"),
        ({"index": torch.tensor([0, 3])}, ValueError, r"index must lie in 0..2, got 0..3"),
        ({"index": torch.tensor([-1, 0])}, ValueError, r"index must lie in 0..2, got -1..0"),
        ({"index": torch.tensor([0.0, 1.0])}, TypeError, "index must have an integer dtype"),
    ],
)
def test_delta_product_says_what_is_wrong(new, error, message):
    case = Deltas(9, 2, 8, 16, 3, torch.float32)
    with pytest.raises(error, match=message):
        kernels.delta_product(*changed(case.arguments, **new))


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"x": torch.empty(0, 64)}, ValueError, "x must not be empty"),
        ({"x": torch.ones(2, 63)}, ValueError, "in_features = 64"),
        ({"x": torch.tensor(1.0)}, ValueError, "in_features = 64"),
        ({"packed": torch.zeros(255, dtype=torch.uint8)}, ValueError, r"ceil\(512 / 2\) = 256 bytes, got 255"),
        ({"packed": torch.zeros(256)}, TypeError, "packed must have dtype torch.uint8"),
        ({"absmax": torch.ones(7)}, ValueError, "absmax must hold 8 scales for 512 weights in blocks of 64, got 7"),
        ({"shape": (8, 64, 1)}, ValueError, "shape must be W's"),
        ({"shape": (8, 0)}, ValueError, "shape's lengths must be at least 1"),
        ({"blocksize": 12}, ValueError, "blocksize must be a multiple of 8"),
        ({"blocksize": 0}, ValueError, "blocksize must be at least 1"),
        ({"backend": "cuda"}, ValueError, "backend must be None or one of triton, torch, got 'cuda'"),
        ({"backend": "compiled"}, ValueError, "backend must be None or one of triton, torch"),
    ],
)
def test_nf4_product_says_what_is_wrong(arguments, error, message):
    case = NF4(10, 2, 8, 64, torch.float32)
    named = dict(zip(("x", "packed", "absmax", "shape", "blocksize"), case.arguments, strict=True))
    with pytest.raises(error, match=message):
        kernels.nf4_product(**(named | arguments))


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("place", [0, 70, 129])  # the first block, a later one, the short last one
def test_the_quantizer_refuses_what_is_not_finite(bad, place):
    x = torch.ones(130)
    x[place] = bad
    with pytest.raises(ValueError, match="finite"):
        kernels.nf4_quantize(x)


def test_other_errors_name_the_argument():
    with pytest.raises(TypeError, match="dtype must be"):
        kernels.nf4_dequantize(torch.zeros(32, dtype=torch.uint8), torch.ones(1), (64,), dtype=torch.float64)
    with pytest.raises(TypeError, match="out_features must be an int"):
        kernels.sign_product(torch.ones(1, 8), torch.zeros(4, dtype=torch.uint8), 4.0)
    with pytest.raises(ValueError, match=r"packed must have ceil\(5 \* 8 / 8\) = 5 bytes"):
        kernels.sign_product(torch.ones(1, 8), torch.zeros(4, dtype=torch.uint8), 5)


@needs_triton
def test_the_kernel_refuses_a_cpu():
    case = Deltas(11, 2, 8, 16, 2, torch.float32)
    with pytest.raises(RuntimeError, match="needs tensors on a CUDA device, got cpu"):
        kernels.delta_product(*case.arguments, backend="triton")


def test_without_triton_pytorch_serves_and_asking_for_the_kernel_is_one_error(monkeypatch):
    monkeypatch.setitem(sys.modules, "triton", None)
    monkeypatch.delitem(sys.modules, "lecturekit.compression.kernels_triton", raising=False)
    monkeypatch.delattr(lecturekit.compression, "kernels_triton", raising=False)
    case = Deltas(12, 2, 8, 16, 2, torch.float32)
    assert_close(kernels.delta_product(*case.arguments), case, roundings=1)
    with pytest.raises(RuntimeError, match="needs the package triton, which is not installed here"):
        kernels.delta_product(*case.arguments, backend="triton")


def test_a_compiler_that_fails_is_one_error(monkeypatch):
    def fails(*arguments):
        raise OSError("no compiler found")

    monkeypatch.setattr(kernels_torch, "_compiled", lambda function: fails)
    with pytest.raises(RuntimeError, match="no compiler found; leave backend out"):
        kernels.sign_product(torch.ones(1, 8), torch.zeros(4, dtype=torch.uint8), 4, backend="compiled")


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="torch.compile finds its compiler by itself on Linux only")
@pytest.mark.skipif(not CAN_COMPILE, reason="torch.compile needs g++ and Python's headers (g++ and python3-dev)")
def test_compiled_gives_the_same():
    for batch, out, width in ((1, 40, 64), (3, 33, 128), (20, 16, 64), (2, 9, 31)):
        case = Deltas(13, batch, out, width, 2, torch.float32)
        assert_close(kernels.delta_product(*case.arguments, backend="compiled"), case, roundings=1)
    for x in (hard_values(), torch.randn(300, 4096), torch.randn(130).bfloat16()):
        codes, absmax = nf4.quantize(x)
        packed, scales = kernels.nf4_quantize(x, backend="compiled")
        assert torch.equal(packed, nf4.pack(codes))
        assert torch.equal(scales, absmax)


# Triton's interpreter: a process of its own, because TRITON_INTERPRET must be set before triton is imported.
INTERPRETER = """
import importlib, pickle, sys
while True:
    try:
        module, function, arguments, options = pickle.load(sys.stdin.buffer)
    except EOFError:
        break
    try:
        answer = getattr(importlib.import_module(module), function)(*arguments, **options)
    except Exception as error:
        answer = error
    pickle.dump(answer, sys.stdout.buffer)
    sys.stdout.buffer.flush()
"""


@pytest.fixture(scope="module")
def interpreted():
    """interpreted(function, *arguments): the function of lecturekit.compression.kernels with its kernel interpreted."""
    if importlib.util.find_spec("triton") is None:
        pytest.skip("triton is not installed")
    environment = os.environ | {"TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""}
    process = subprocess.Popen(
        [sys.executable, "-c", INTERPRETER], stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment
    )

    def call(function, *arguments, module="kernels", **options):
        pickle.dump((f"lecturekit.compression.{module}", function, arguments, options), process.stdin)
        process.stdin.flush()
        answer = pickle.load(process.stdout)
        if isinstance(answer, Exception):
            raise answer
        return answer

    yield call
    process.stdin.close()
    process.wait(timeout=60)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("batch", "out", "width", "index"),
    [
        (1, 1, 1, [0]),
        (1, 40, 131, [2]),  # more outputs and bytes than a block has, and rows that begin inside a byte
        (2, 40, 127, [0, 2]),  # some rows reach into one byte more than others
        (2, 33, 136, [1, 1]),  # rows that begin on a byte; W read by the kernel
        (3, 37, 129, [0, 1, 2]),  # W multiplied beforehand
        (4, 20, 264, [2, 0, 2, 0]),
        (5, 7, 20, [1, 1, 1, 1, 1]),
    ],
)
def test_interpreted_delta_kernel(interpreted, batch, out, width, index, dtype):
    case = Deltas(batch, batch, out, width, 3, dtype, index=index)
    assert_close(interpreted("delta_product", *case.arguments, backend="triton"), case)


@pytest.mark.parametrize("seed", range(8))
def test_interpreted_delta_kernel_at_random(interpreted, seed):
    draw = torch.Generator().manual_seed(100 + seed)
    batch, models = (int(torch.randint(1, 6, (), generator=draw)) for _ in range(2))
    out, width = (int(torch.randint(1, high, (), generator=draw)) for high in (50, 160))
    case = Deltas(seed, batch, out, width, models, DTYPES[seed % 3])
    assert_close(interpreted("delta_product", *case.arguments, backend="triton"), case)


def test_interpreted_kernel_with_signs_alone_and_with_a_wrong_index(interpreted):
    case = Deltas(14, 2, 9, 24, 3, torch.float32)
    got = interpreted("sign_product", case.x, case.packed[1], 9, backend="triton")
    exact = case.x.double() @ bitdelta.unpack(case.packed[1], (9, 24)).double().T
    torch.testing.assert_close(got, exact.float(), rtol=1e-5, atol=1e-5)
    # what a GPU does with an index that no one checked: no memory of others is read, and the row is seen to be wrong
    x, weight, packed, scales, _ = case.arguments
    for wrong in (-1, 3, 2**31 - 1):
        index = torch.tensor([wrong, 1], dtype=torch.int32)
        got = interpreted("delta_product", x, weight, None, packed, scales, index, 9, module="kernels_triton")
        assert got[0].isnan().all() and got[1].isfinite().all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("batch", "out", "width", "blocksize"),
    [
        (1, 1, 1, 64),
        (1, 35, 200, 64),  # rows begin on a word, but inside a block
        (2, 8, 256, 32),
        (2, 5, 131, 8),  # rows begin inside a word, even inside a byte
        (3, 20, 136, 64),  # from here on the kernel for matrices, where 8 divides the width
        (5, 17, 72, 16),
        (4, 3, 21, 64),
        (40, 9, 64, 64),
    ],
)
def test_interpreted_nf4_kernels(interpreted, batch, out, width, blocksize, dtype):
    case = NF4(batch, batch, out, width, dtype, blocksize)
    assert_close(interpreted("nf4_product", *case.arguments, backend="triton"), case)


def test_interpreted_nf4_kernel_with_double_quantized_scales(interpreted):
    case = NF4(15, 2, 16, 64, torch.float32)
    absmax = nf4.double_dequantize(*nf4.double_quantize(case.absmax))
    got = interpreted("nf4_product", case.x, case.packed, absmax, case.shape, backend="triton")
    weight = nf4.dequantize(nf4.unpack(case.packed, case.shape), absmax)
    torch.testing.assert_close(got, case.x @ weight.T, rtol=1e-5, atol=1e-5)


# Triton's compiler needs no GPU: it shows that the kernels are legal for one, and what becomes of them.
POINTERS = {
    "x": "*bf16", "weight": "*bf16", "start": "*fp32", "packed": "*u8", "scales": "*fp32", "index": "*i32",
    "y": "*bf16", "words": "*i32", "absmax": "*fp32", "levels": "*fp32",
}  # fmt: skip
ONE_BY_ONE = ("batch", "models")  # every other number is a multiple of 16 for the layers of a language model


@needs_triton
@pytest.mark.skipif(sys.platform != "linux", reason="Triton's compiler for CUDA is for Linux")
@pytest.mark.parametrize("capability", [80, 90])
@pytest.mark.parametrize(
    ("name", "constants"),
    [
        ("delta_kernel", {"HAS_WEIGHT": True, "HAS_START": False, "ALIGNED": True}),
        ("delta_kernel", {"HAS_WEIGHT": False, "HAS_START": True, "ALIGNED": False}),
        ("nf4_vector_kernel", {"ALIGNED": True, "WORDS_A_SCALE": 8}),
        ("nf4_matrix_kernel", {"WORDS_A_SCALE": 8, "BLOCK_BATCH": 16}),
    ],
)
def test_the_kernels_compile_for_a_gpu(name, constants, capability, tmp_path, monkeypatch):
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from lecturekit.compression import kernels_triton

    kernel = getattr(kernels_triton, name)
    tried = kernel.configs[0]
    constants = constants | tried.kwargs | ({"DTYPE": triton.language.bfloat16} if "matrix" in name else {})
    names = kernel.fn.arg_names
    source = ASTSource(
        fn=kernel.fn,
        signature={n: "constexpr" if n in constants else POINTERS.get(n, "i32") for n in names},
        constexprs={(names.index(n),): value for n, value in constants.items()},
        attrs={
            (i,): [["tt.divisibility", 16]] for i, n in enumerate(names) if n not in constants and n not in ONE_BY_ONE
        },
    )
    options = {"num_warps": tried.num_warps, "num_stages": tried.num_stages}
    made = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
    if constants.get("HAS_WEIGHT"):  # eight bfloat16 weights a load
        assert re.search(r"ld\.global.*\.v4\.b32", made.asm["ptx"])
    code = tmp_path / "kernel.cubin"
    code.write_bytes(made.asm["cubin"])
    used = subprocess.run(
        [triton.knobs.nvidia.cuobjdump.path, "-res-usage", str(code)], capture_output=True, text=True, check=True
    )
    # no register is spilled to memory
    assert re.findall(r"STACK:(\d+).*LOCAL:(\d+)", used.stdout + used.stderr) == [("0", "0")]


def on_gpu(arguments):
    return [value.cuda() if isinstance(value, Tensor) else value for value in arguments]


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("batch", "out", "width"), [(1, 1, 1), (1, 4096, 4096), (2, 333, 777), (3, 130, 257), (5, 576, 1536), (16, 64, 128)]
)
def test_delta_kernel_on_a_gpu(batch, out, width, dtype):
    case = Deltas(batch, batch, out, width, 4, dtype)
    assert_close(kernels.delta_product(*on_gpu(case.arguments), backend="triton"), case)
    # the index may stay on the CPU, where it is looked at
    assert_close(kernels.delta_product(*on_gpu(case.arguments[:4]), case.index), case)


@pytest.mark.gpu
def test_a_wrong_index_on_a_gpu_gives_nan():
    case = Deltas(16, 3, 64, 64, 4, torch.float32)
    x, weight, packed, scales, _ = on_gpu(case.arguments)
    got = kernels.delta_product(x, weight, packed, scales, torch.tensor([0, 4, -1], device="cuda"))
    assert got[0].isfinite().all() and got[1:].isnan().all()


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("batch", "out", "width", "blocksize"),
    [
        (1, 1, 1, 64), (1, 4096, 4096, 64), (2, 333, 777, 64), (2, 128, 64, 8), (3, 130, 257, 32),
        (5, 576, 1536, 64), (16, 4096, 4096, 64), (33, 96, 128, 64), (200, 64, 128, 64),
    ],
)  # fmt: skip
def test_nf4_kernels_on_a_gpu(batch, out, width, blocksize, dtype):
    case = NF4(batch, batch, out, width, dtype, blocksize)
    assert_close(kernels.nf4_product(*on_gpu(case.arguments)), case, roundings=1)


@pytest.mark.gpu
def test_nf4_codes_on_a_gpu_are_those_of_bitsandbytes_there():
    functional = pytest.importorskip("bitsandbytes").functional
    x = torch.randn(512, 1024, generator=torch.Generator().manual_seed(17)).cuda()
    theirs, state = functional.quantize_4bit(x, blocksize=64, quant_type="nf4")
    packed, absmax = kernels.nf4_quantize(x)
    assert torch.equal(absmax, state.absmax)
    assert torch.equal(packed, theirs.view(-1))
    again = kernels.nf4_dequantize(packed, absmax, x.shape)
    assert torch.equal(again, functional.dequantize_4bit(theirs, state))
