"""The reference implementations beside their peers: both sides in one process, in turn, the ratio with its spread.

    .venv/bin/python benchmarks/references.py            # prints, and writes benchmarks/results/references.md

Times depend on the machine and on what else it does; the ratio of interleaved pairs depends on it least. A ratio
below 1 means that ours is faster. Peak memory is what torch allocates in one call, beyond
the inputs. Packed weights and LoRA have a benchmark of their own: kernels.py.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from datetime import date
from pathlib import Path

import torch
from torch import nn

from lecturekit import timing
from lecturekit.results import machine
from lecturekit.runtime import atomic_write, progress, threads

Pair = tuple[Callable[[], object], Callable[[], object]]
RESULT = Path(__file__).parent / "results" / "references.md"


def top_k(documents: int, queries: int) -> Pair:
    """Exact cosine search, beside faiss (its matrix-product path allowed at every number of queries)."""
    import faiss

    from lecturekit.prompting.rag import top_k as ours

    generator = torch.Generator().manual_seed(0)
    d, q = torch.randn(documents, 384, generator=generator), torch.randn(queries, 384, generator=generator)
    faiss.cvar.distance_compute_blas_threshold = 1
    faiss.omp_set_num_threads(1)
    index = faiss.IndexFlatIP(384)
    index.add(nn.functional.normalize(d).numpy())
    return lambda: ours(q, d, 10), lambda: index.search(nn.functional.normalize(q).numpy(), 10)


def dpo_logprob(vocabulary: int) -> Pair:
    """Summed response log-probabilities with their gradient, beside log_softmax and gather over everything."""
    from lecturekit.alignment.dpo import sequence_logprob

    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(4, 128, vocabulary, generator=generator, requires_grad=True)
    tokens = torch.randint(0, vocabulary, (4, 128), generator=generator)
    mask = torch.arange(128).expand(4, 128) >= 64

    def ours() -> None:
        torch.autograd.grad(sequence_logprob(logits, tokens, mask).sum(), logits)

    def full() -> None:
        logprobs = logits[:, :-1].log_softmax(-1).gather(-1, tokens[:, 1:, None]).squeeze(-1)
        torch.autograd.grad((logprobs * mask[:, 1:]).sum(), logits)

    return ours, full


MANY, FEW = {"documents": 100_000}, {"documents": 500}
CASES: list[tuple[str, str, Callable[..., Pair], dict[str, int], dict[str, int]]] = [
    ("top 10 of 100,000 × 384, 1 query", "faiss", top_k, MANY | {"queries": 1}, FEW | {"queries": 1}),
    ("top 10 of 100,000 × 384, 64 queries", "faiss", top_k, MANY | {"queries": 64}, FEW | {"queries": 8}),
    ("log-probs and gradient, 4 × 128 × 49,152", "log_softmax + gather", dpo_logprob, {"vocabulary": 49_152},
     {"vocabulary": 128}),
]  # fmt: skip


def run(small: bool = False, repeats: int = 15) -> str:
    """Measure every case on one thread and return the Markdown table."""
    rows = [
        "| work | peer | ours ÷ peer (quartiles) | ours | peer | torch memory, ours | peer |",
        "|---|---|---|---|---|---|---|",
    ]
    with threads(1):
        for work, peer, build, full_size, small_size in progress(CASES, "benchmarks"):
            ours, theirs = build(**(small_size if small else full_size))
            found = timing.compare(ours, theirs, repeats=repeats, warmup=1)
            low, high = found.quartiles
            times = " | ".join(f"{1e3 * side.median:.2f} ms" for side in (found.a, found.b))
            memory = " | ".join(f"{(side.peak_bytes or 0) / 2**20:.1f} MiB" for side in (found.a, found.b))
            rows.append(f"| {work} | {peer} | {found.ratio:.2f} ({low:.2f}–{high:.2f}) | {times} | {memory} |")
    about = ", ".join(f"{name} {value}" for name, value in machine().items())
    head = [
        "# Reference implementations beside their peers",
        "",
        f"Measured on {date.today().isoformat()}; {about}. One thread, {repeats} interleaved pairs a row.",
        "Memory counts torch's own allocations in one call: what faiss and NumPy take is not in it.",
        "Not measured on a GPU yet.",
        "",
    ]
    return "\n".join([*head, *rows, ""])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--small", action="store_true", help="small sizes, print only: to see that everything runs")
    small = parser.parse_args().small
    table = run(small, repeats=2 if small else 15)
    print(table)
    if not small:
        atomic_write(RESULT, table)


if __name__ == "__main__":
    main()
