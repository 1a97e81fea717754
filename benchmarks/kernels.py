"""Products with packed weights beside their peers: the kernels on a GPU, the PyTorch formulations on a CPU.

    .venv/bin/python -P benchmarks/kernels.py gpu           # what `make bench-gpu` runs
    .venv/bin/python -P benchmarks/kernels.py cpu
    .venv/bin/python -P benchmarks/kernels.py cpu --small   # prints only: to see that everything runs

-P keeps this folder off the import path: bitsandbytes looks for a package named kernels, which is not this file.

Each part writes its section of benchmarks/results/kernels.md and leaves the other as it is. Beside every time stands
the floor: the bytes that must be read and written, over the bandwidth that copying reaches on this machine.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Callable
from dataclasses import dataclass
from datetime import date
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path

import torch
from torch import Tensor

from lecturekit import timing
from lecturekit.compression import bitdelta, kernels, kernels_torch
from lecturekit.results import machine
from lecturekit.runtime import atomic_write, progress, threads

RESULT = Path(__file__).parent / "results" / "kernels.md"
TITLE = "# Products with packed weights"
SECTIONS = {"gpu": "GPU", "cpu": "CPU"}
LLAMA = ((4096, 4096), (11008, 4096), (4096, 11008))  # Llama-2-7B: attention, gate and up, down
BATCHES = (1, 2, 4, 8, 16)
Run = Callable[[], object]


def bandwidth(device: torch.device, size: int) -> float:
    """Bytes a second when a tensor of size bytes is copied: each byte is read once and written once."""
    source = torch.ones(size, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    found = timing.measure(
        lambda: target.copy_(source), repeats=10, warmup=2, memory=False, flush_cache=False, device=device
    )
    return 2 * size / found.median


# --- CPU ---------------------------------------------------------------------------------------------------------


@dataclass
class Work:
    """Two ways to do one thing on a CPU. moved: the bytes it must read and write. results: bytes of each side's
    result as far as torch allocates it, taken off the peak to leave the working memory. goal: the ratio aimed at."""

    name: str
    peer: str
    ours: Run
    theirs: Run
    moved: int
    results: tuple[int, int]
    goal: float | None


def shift_and_add(mask: Tensor) -> Tensor:
    """The public way to pack signs: 32 rows of a Boolean matrix, shifted as int64 and added up to one int32."""
    shifts = torch.arange(32)[:, None]
    return (mask.view(-1, 32, mask.shape[1]) << shifts).sum(1).int()


def shift_and_mask(words: Tensor) -> Tensor:
    """The public way back: each word shifted by 0 to 31, and the lowest bit kept."""
    return ((words[:, None] >> torch.arange(32)[:, None]) & 1).bool().view(-1, words.shape[1])


def works(size: int) -> list[Work]:
    """Quantizing, packing and the 1-bit product for a (size, size) matrix in float32."""
    from bitsandbytes.functional import dequantize_4bit, quantize_4bit

    draw = torch.Generator().manual_seed(0)
    weight, x = torch.randn(size, size, generator=draw), torch.randn(1, size, generator=draw)
    packed, state = quantize_4bit(weight, blocksize=64, quant_type="nf4")
    signs = torch.randint(0, 2, (size, size), generator=draw, dtype=torch.int8) * 2 - 1
    mask, bits = signs > 0, bitdelta.pack(signs)
    words = shift_and_add(mask)
    count = size * size
    codes = count // 2 + count // 16  # packed codes, and a float32 scale for each 64 of them

    def quantize() -> object:
        return quantize_4bit(weight, blocksize=64, quant_type="nf4")

    def dense() -> object:
        return x @ weight.T

    both, bnb, public = (codes, codes), "bitsandbytes", "public code"
    # The results of nf4_dequantize and of bitdelta come from NumPy, which torch does not count.
    return [
        Work("NF4 quantize", bnb, lambda: kernels.nf4_quantize(weight), quantize, 4 * count + codes, both, 0.4),
        Work(
            "NF4 quantize, compiled", bnb, lambda: kernels.nf4_quantize(weight, backend="compiled"), quantize,
            4 * count + codes, both, 0.1,
        ),
        Work(
            "NF4 dequantize", bnb, lambda: kernels.nf4_dequantize(packed, state.absmax, (size, size)),
            lambda: dequantize_4bit(packed, state), 4 * count + codes, (0, 4 * count), 1.2,
        ),
        Work(
            "BitDelta pack", public, lambda: bitdelta.pack(signs), lambda: shift_and_add(mask),
            count + count // 8, (0, count // 8), 0.05,
        ),
        Work(
            "BitDelta unpack", public, lambda: bitdelta.unpack(bits, (size, size)), lambda: shift_and_mask(words),
            count + count // 8, (0, count), 0.2,
        ),
        Work(
            "1-bit product, batch 1", "dense float32", lambda: kernels.sign_product(x, bits, size), dense,
            count // 8, (4 * size, 4 * size), None,
        ),
        Work(
            "1-bit product, batch 1, compiled", "dense float32",
            lambda: kernels.sign_product(x, bits, size, "compiled"), dense, count // 8, (4 * size, 4 * size), 0.5,
        ),
    ]  # fmt: skip


def lora_merge(small: bool) -> Work:
    """Rank-8 branches folded into all 210 linear layers of SmolLM2's blocks and taken out again, beside PEFT."""
    import copy

    from peft import LoraConfig, get_peft_model
    from torch import nn
    from transformers import LlamaConfig, LlamaForCausalLM

    from lecturekit.models import load_language_model
    from lecturekit.tuning.lora import LoRALinear, add_lora

    if small:
        sizes = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 2}
        base: nn.Module = LlamaForCausalLM(LlamaConfig(**sizes, num_hidden_layers=2))
    else:
        base = load_language_model(device="cpu", dtype=torch.float32)[0]
    names = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    theirs = get_peft_model(copy.deepcopy(base), LoraConfig(r=8, lora_alpha=16, target_modules=names))
    layers = [module for module in add_lora(base, names, r=8, alpha=16).modules() if isinstance(module, LoRALinear)]
    weights = sum(module.base.weight.numel() for module in layers)

    def fold_ours() -> None:
        for layer in layers:
            layer.merge()
        for layer in layers:
            layer.unmerge()

    def fold_theirs() -> None:
        theirs.merge_adapter()
        theirs.unmerge_adapter()

    # each weight is read and written, twice
    name = f"LoRA merge and unmerge, SmolLM2, {len(layers)} layers"
    return Work(name, "PEFT", fold_ours, fold_theirs, 4 * 4 * weights, (0, 0), 0.65)


def measure_cpu(small: bool) -> str:
    """Measure on one thread and return the section."""
    size, repeats = (128, 2) if small else (4096, 15)
    with threads(1):
        speed = bandwidth(torch.device("cpu"), (1 if small else 256) * 2**20)
        rows = [
            "| work | peer | ours ÷ peer (quartiles) | goal | ours | peer | floor | working memory, ours | peer |",
            "|---|---|---|---|---|---|---|---|---|",
        ]
        for work in progress([*works(size), lora_merge(small)], "works"):
            found = timing.compare(work.ours, work.theirs, repeats=repeats, warmup=2, device="cpu")
            low, high = found.quartiles
            goal = "" if work.goal is None else str(work.goal)
            if goal and not small:
                goal += " met" if found.ratio <= work.goal else " **missed**"
            cells = [work.name, work.peer, f"{found.ratio:.2f} ({low:.2f}–{high:.2f})", goal]
            cells += [f"{1e3 * t:.2f} ms" for t in (found.a.median, found.b.median, work.moved / speed)]
            peaks = zip((found.a.peak_bytes or 0, found.b.peak_bytes or 0), work.results, strict=True)
            cells += [f"{max(0, peak - result) / 2**20:.1f} MiB" for peak, result in peaks]
            rows.append(f"| {' | '.join(cells)} |")
        crossing = measure_crossing(size, (1, 2, 4) if small else (1, 2, 4, 8, 16, 32), repeats)
    about = ", ".join(f"{name} {value}" for name, value in machine().items() if name != "gpu")
    head = [
        f"Measured on {date.today().isoformat()}; {about}. {size} × {size} weights, float32, {repeats} interleaved "
        f"pairs a row, one thread. Copying moves {speed / 1e9:.1f} GB/s, which the floor is reckoned with.",
        "Working memory is the peak of torch's allocations in a call, less its result; what NumPy takes is not in it.",
        "",
    ]
    return "\n".join([*head, *rows, "", *crossing])


def measure_crossing(size: int, batches: tuple[int, ...], repeats: int) -> list[str]:
    """The 1-bit product against the dense product as the batch grows: rows of one delta, and each with its own."""
    draw = torch.Generator().manual_seed(1)
    weight = torch.randn(size, size, generator=draw)
    bits = torch.randint(0, 256, (max(batches), size * size // 8), generator=draw, dtype=torch.uint8)
    ways: dict[str, Callable[[Tensor], Run]] = {
        "one delta": lambda x: lambda: kernels.sign_product(x, bits[0], size),
        "one delta, compiled": lambda x: lambda: kernels.sign_product(x, bits[0], size, "compiled"),
        "each row its own, compiled": lambda x: (
            lambda: kernels_torch.sign_products(x, bits, torch.arange(len(x)), size, compiled=True)
        ),
    }
    first_slower: dict[str, int] = {}
    rows = []
    for batch in progress(batches, "batches"):
        x = torch.randn(batch, size, generator=draw)
        cells = [str(batch)]
        for name, way in ways.items():
            found = timing.compare(
                way(x), lambda x=x: x @ weight.T, repeats=repeats, warmup=2, memory=False, device="cpu"
            )
            low, high = found.quartiles
            cells.append(f"{found.ratio:.2f} ({low:.2f}–{high:.2f})")
            if found.ratio > 1:
                first_slower.setdefault(name, batch)
        rows.append(f"| {' | '.join([cells[0], f'{1e3 * found.b.median:.2f} ms', *cells[1:]])} |")
    told = "; ".join(f"{name}: {first_slower.get(name, f'above {max(batches)}')}" for name in ways)
    return [
        "The 1-bit product's time ÷ that of the dense float32 product, by batch size.",
        "",
        f"| batch | dense | {' | '.join(ways)} |",
        "|---|" + "---|" * (1 + len(ways)),
        *rows,
        "",
        f"Smallest batch of these at which the dense product is faster: {told}.",
        "",
    ]


# --- GPU ---------------------------------------------------------------------------------------------------------


def in_a_graph(calls: list[Run]) -> Run:
    """The calls as one CUDA graph: what is timed is the GPU, not the Python that leads up to each launch."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):  # autotuning and the first allocations happen here, before the recording
        for _ in range(3):
            for call in calls:
                call()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    return graph.replay


def one_after_the_other(calls: list[Run]) -> Run:
    """The stand-in for in_a_graph where there is no GPU: to see that everything runs."""
    return lambda: [call() for call in calls]


@dataclass
class Way:
    """One way to compute a product. build: make a call with weights of its own. read: the bytes a call reads."""

    build: Callable[[], Run]
    read: int


class Bench:
    """Where and how the GPU part measures."""

    def __init__(self, device: torch.device, record: Callable[[list[Run]], Run], repeats: int) -> None:
        self.device, self.record, self.repeats = device, record, repeats
        on_gpu = device.type == "cuda"
        self.cache = torch.cuda.get_device_properties(device).L2_cache_size if on_gpu else 2**20
        self.speed = bandwidth(device, 2**30 if on_gpu else 2**20)
        # T4 and V100 have no bfloat16
        native = not on_gpu or torch.cuda.get_device_capability(device) >= (8, 0)
        self.dtype = torch.bfloat16 if native else torch.float16
        self.draw = torch.Generator(device).manual_seed(0)

    def randn(self, *shape: int) -> Tensor:
        return torch.randn(shape, generator=self.draw, device=self.device).to(self.dtype)

    def bytes(self, *shape: int) -> Tensor:
        return torch.randint(0, 256, shape, generator=self.draw, device=self.device, dtype=torch.uint8)

    def prepared(self, way: Way) -> tuple[Run, int]:
        """Calls on as many different weights as it takes to leave nothing in the cache, as in decoding layer by layer.

        Four caches full, so that what a call reads has been driven out since the round before.
        """
        copies = min(64, math.ceil(4 * self.cache / way.read))
        return self.record([way.build() for _ in range(copies)]), copies

    def compare(self, ours: Way, peers: dict[str, Way]) -> tuple[float, list[str]]:
        """Our seconds a call, and for each peer its time and the ratio ours ÷ peer with its quartiles."""
        run, copies = self.prepared(ours)
        seconds, cells = math.inf, []
        for peer in peers.values():
            other, others = self.prepared(peer)
            found = timing.compare(
                run, other, repeats=self.repeats, warmup=3, memory=False, flush_cache=False, device=self.device
            )
            seconds = min(seconds, found.a.median / copies)
            low, ratio, high = (r * others / copies for r in (found.quartiles[0], found.ratio, found.quartiles[1]))
            cells.append(f"{1e6 * found.b.median / others:.1f} µs, {ratio:.2f} ({low:.2f}–{high:.2f})")
        return seconds, cells


def require_right(got: Tensor, exact: Tensor, width: int) -> None:
    """Refuse to time wrong results. The sums are of the size sqrt(width); bfloat16 rounds their terms by 2^-9."""
    torch.testing.assert_close(got.float(), exact, rtol=0.02, atol=0.02 * width**0.5)


def nf4_ways(bench: Bench, out: int, width: int, batch: int) -> tuple[Way, dict[str, Way]]:
    """NF4: our product, bitsandbytes' fused one, cuBLAS on 16-bit weights, dequantize and then multiply."""
    import bitsandbytes
    from bitsandbytes.functional import dequantize_4bit, quantize_4bit

    x = bench.randn(batch, width)
    codes = out * width // 2 + out * width // 16
    full = 2 * out * width

    def build(make: Callable[[Tensor, object], Run]) -> Callable[[], Run]:
        return lambda: make(*quantize_4bit(bench.randn(out, width), blocksize=64, quant_type="nf4"))

    def dense() -> Run:
        weight = bench.randn(out, width)
        return lambda: x @ weight.T

    packed, state = quantize_4bit(bench.randn(out, width), blocksize=64, quant_type="nf4")
    exact = x.float() @ dequantize_4bit(packed, state).float().T
    require_right(kernels.nf4_product(x, packed, state.absmax, (out, width)), exact, width)
    ours = Way(build(lambda p, s: lambda: kernels.nf4_product(x, p, s.absmax, (out, width))), codes)
    return ours, {
        "bitsandbytes": Way(build(lambda p, s: lambda: bitsandbytes.matmul_4bit(x, p, s)), codes),
        "cuBLAS, 16 bit": Way(dense, full),
        "dequantize, multiply": Way(build(lambda p, s: lambda: x @ dequantize_4bit(p, s).T), codes),
    }


def delta_ways(bench: Bench, out: int, width: int, batch: int) -> tuple[Way, dict[str, Way]]:
    """A batch in which every row has its own delta: ours, the base alone, every delta unpacked, every model dense."""
    x, scales = bench.randn(batch, width), torch.ones(batch, device=bench.device)
    index = torch.arange(batch, device=bench.device, dtype=torch.int32)
    full, delta = 2 * out * width, out * width // 8
    shifts = torch.arange(8, device=bench.device, dtype=torch.uint8)

    def unpacked(packed: Tensor) -> Tensor:
        bits = (packed[:, :, None] >> shifts) & 1
        return bits.view(batch, out, width).to(bench.dtype).mul_(2).sub_(1)

    def fused() -> Run:
        weight, packed = bench.randn(out, width), bench.bytes(batch, delta)
        return lambda: kernels.delta_product(x, weight, packed, scales, index)

    def base() -> Run:
        weight = bench.randn(out, width)
        return lambda: x @ weight.T

    def unpacking() -> Run:
        weight, packed = bench.randn(out, width), bench.bytes(batch, delta)
        return lambda: x @ weight.T + torch.bmm(unpacked(packed), x[:, :, None])[:, :, 0]

    def models() -> Run:
        weights = bench.randn(batch, out, width)
        return lambda: torch.bmm(weights, x[:, :, None])

    weight, packed = bench.randn(out, width), bench.bytes(batch, delta)
    change = torch.bmm(unpacked(packed).float(), x.float()[:, :, None])[:, :, 0]
    exact = x.float() @ weight.float().T + change
    require_right(kernels.delta_product(x, weight, packed, scales, index), exact, width)
    return Way(fused, full + batch * delta), {
        "base alone": Way(base, full),
        "unpack, multiply": Way(unpacking, full + batch * delta),
        "a dense model a row": Way(models, batch * full),
    }


def measure_gpu(bench: Bench, shapes: tuple[tuple[int, int], ...], batches: tuple[int, ...]) -> str:
    """Measure every layer shape and batch size and return the section."""
    versions = {name: metadata.version(name) for name in ("triton", "bitsandbytes") if find_spec(name)}
    about = ", ".join(f"{name} {value}" for name, value in (machine() | versions).items())
    lines = [
        f"Measured on {date.today().isoformat()}; {about}. {str(bench.dtype).removeprefix('torch.')}, "
        f"{bench.repeats} interleaved pairs a cell, in CUDA graphs that go through so many different weights that none "
        f"is in the cache. Copying moves {bench.speed / 1e9:.0f} GB/s, which the floor is reckoned with. "
        "A cell: the peer's time, ours ÷ peer (quartiles).",
        "",
    ]
    for title, ways in (("NF4 product", nf4_ways), ("1-bit delta product, each row its own delta", delta_ways)):
        rows: list[str] = []
        names: list[str] = []
        for out, width in shapes:
            for batch in progress(batches, f"{title}, {out} × {width}"):
                ours, peers = ways(bench, out, width, batch)
                names = list(peers)
                floor = (ours.read + 2 * batch * (out + width)) / bench.speed
                seconds, cells = bench.compare(ours, peers)
                shown = [f"{out} × {width}", str(batch), f"{1e6 * seconds:.1f} µs", f"{1e6 * floor:.1f} µs"]
                rows.append(f"| {' | '.join([*shown, f'{100 * floor / seconds:.0f} %', *cells])} |")
        head = f"| W | batch | ours | floor | floor ÷ ours | {' | '.join(names)} |"
        lines += [f"### {title}", "", head, "|" + "---|" * (5 + len(names)), *rows, ""]
    return "\n".join(lines)


def write(part: str, text: str) -> None:
    """Put the text in as the part's section, and leave the other section as it stands."""
    sections = dict.fromkeys(SECTIONS.values(), "Not measured yet.\n")
    if RESULT.exists():
        for piece in RESULT.read_text().split("\n## ")[1:]:
            title, _, body = piece.partition("\n\n")
            sections[title] = body
    sections[SECTIONS[part]] = text
    body = "\n".join(f"## {title}\n\n{section.rstrip()}\n" for title, section in sections.items())
    atomic_write(RESULT, f"{TITLE}\n\n{body}")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("part", choices=SECTIONS, help="what to measure")
    parser.add_argument("--small", action="store_true", help="small sizes, print only: to see that everything runs")
    arguments = parser.parse_args()
    if arguments.part == "cpu":
        text = measure_cpu(arguments.small)
    elif torch.cuda.is_available():
        bench = Bench(torch.device("cuda"), in_a_graph, 5 if arguments.small else 50)
        text = measure_gpu(bench, LLAMA[:1] if arguments.small else LLAMA, (1,) if arguments.small else BATCHES)
    elif arguments.small:
        bench = Bench(torch.device("cpu"), one_after_the_other, 2)
        text = measure_gpu(bench, ((128, 64),), (1, 3))
        print("no CUDA device: run on the CPU, only to see that it runs", file=sys.stderr)
    else:
        print("benchmarks/kernels.py gpu needs a CUDA device, and torch finds none: nothing measured", file=sys.stderr)
        return 1
    print(text)
    if not arguments.small:
        write(arguments.part, text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
