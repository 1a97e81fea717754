"""Hidden states to log-probabilities, forward and backward: ours, the full logits, and TRL's chunked function.

    .venv/bin/python benchmarks/logprobs.py              # prints, and writes benchmarks/results/logprobs.md

4 × 256 tokens, 49,152 words, width 576: SmolLM2's head. Each pair runs interleaved in one process. "Trained" asks for
the gradient to the head as well as to the hidden states, "frozen" (as under LoRA) to the hidden states only.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from datetime import date
from pathlib import Path

import torch
from torch import Tensor

from lecturekit import timing
from lecturekit.alignment.logprob import token_logprobs
from lecturekit.results import machine
from lecturekit.runtime import atomic_write, device, progress, threads

RESULT = Path(__file__).parent / "results" / "logprobs.md"


def full(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """The plain way: every logit of every position at once."""
    return (hidden @ weight.T).log_softmax(-1).gather(-1, targets.unsqueeze(-1)).squeeze(-1)


def trl(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """TRL's, at the chunk of the vocabulary that its trainers use."""
    from trl.kernels.chunked_logprob import ChunkedLogProbFunction
    from trl.trainer.utils import _CHUNKED_LOGPROB_CHUNK_SIZE as CHUNK

    return ChunkedLogProbFunction.apply(hidden, weight, None, targets, 1.0, CHUNK, None, 1.0, ())[0]


def step(function: Callable[..., Tensor], tokens: int, vocab: int, dim: int, trained: bool) -> Callable[[], object]:
    """Forward and backward of one way, on the same numbers as the others."""
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(tokens, dim, generator=generator).to(device()).requires_grad_()
    weight = (torch.randn(vocab, dim, generator=generator) / dim**0.5).to(device()).requires_grad_(trained)
    targets = torch.randint(0, vocab, (tokens,), generator=generator).to(device())
    leaves = (hidden, weight) if trained else (hidden,)
    return lambda: torch.autograd.grad(function(hidden, weight, targets).sum(), leaves)


def run(small: bool = False, repeats: int = 15) -> str:
    """Measure both heads against both peers on one thread and return the Markdown table."""
    sizes = (64, 512, 32) if small else (4 * 256, 49_152, 576)
    rows = [
        "| head | peer | ours ÷ peer, time (quartiles) | ours | peer | memory, ours | peer | ours ÷ peer, memory |",
        "|---|---|---|---|---|---|---|---|",
    ]
    pairs = [(trained, name, peer) for trained in (True, False) for name, peer in (("full", full), ("TRL", trl))]
    with threads(1):
        for trained, name, peer in progress(pairs, "benchmarks"):
            found = timing.compare(
                step(token_logprobs, *sizes, trained), step(peer, *sizes, trained), repeats=repeats, warmup=1
            )
            low, high = found.quartiles
            times = " | ".join(f"{1e3 * side.median:.0f} ms" for side in (found.a, found.b))
            bytes_held = [side.peak_bytes or 0 for side in (found.a, found.b)]
            memory = " | ".join(f"{held / 2**20:.0f} MiB" for held in bytes_held)
            share = f"{bytes_held[0] / bytes_held[1]:.2f}" if bytes_held[1] else "–"
            head = "trained" if trained else "frozen"
            rows.append(
                f"| {head} | {name} | {found.ratio:.2f} ({low:.2f}–{high:.2f}) | {times} | {memory} | {share} |"
            )
    about = ", ".join(f"{name} {value}" for name, value in machine().items())
    where = torch.cuda.get_device_name() if device().type == "cuda" else "not measured on a GPU yet"
    text = [
        "# Log-probabilities from hidden states, forward and backward",
        "",
        f"Measured on {date.today().isoformat()}; {about}; {where}. {sizes[0]} tokens, {sizes[1]:,} words, width "
        f"{sizes[2]}, float32, {repeats} interleaved pairs a row, one CPU thread.",
        "Memory is the peak of torch's allocations in one call, beyond the inputs. With a trained head the gradient of",
        f"its weights is in it ({4 * sizes[1] * sizes[2] / 2**20:.0f} MiB) for all three.",
        "",
        *rows,
        "",
    ]
    return "\n".join(text)


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
