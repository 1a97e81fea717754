"""Search in 100,000 passages: our Index beside faiss, our BM25 beside bm25s. Building, searching, memory, exactness.

    .venv/bin/python benchmarks/retrieval.py             # prints, and writes benchmarks/results/retrieval.md

A passage is three sentences of the course's data, drawn at random: real text for BM25. MiniLM embeds the sentences
(once, kept in the cache folder), and a passage's vector is the mean of its sentences' vectors, because to embed
100,000 passages would take longer than all the rest. What is said about exactness is also measured on the sentences
themselves, really embedded. The queries are sentences that are in no passage.
"""

from __future__ import annotations

import argparse
import gc
import hashlib
import json
import os
import re
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import date
from functools import partial
from pathlib import Path
from typing import Any

import faiss
import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import normalize

from lecturekit import data, timing
from lecturekit.prompting.bm25 import BM25
from lecturekit.prompting.index import Index
from lecturekit.prompting.rag import sentence_encoder, top_k, words
from lecturekit.results import machine
from lecturekit.runtime import atomic_write, cache_dir, progress, threads

RESULT = Path(__file__).parent / "results" / "retrieval.md"
K = 10
DEFAULT_THRESHOLD = faiss.cvar.distance_compute_blas_threshold  # faiss multiplies matrices from so many queries on
Search = Callable[[], Any]


@dataclass
class Corpus:
    """sentences: their texts, and vectors (s, d).   queries: theirs.   passages: (n, 3) numbers of sentences."""

    sentences: list[str]
    vectors: Tensor
    queries: list[str]
    query_vectors: Tensor
    passages: Tensor

    def passage_vectors(self) -> Tensor:
        """(n, d): the mean of the sentences' vectors, length 1."""
        return normalize(self.vectors[self.passages].mean(dim=1))

    def passage_words(self) -> list[list[str]]:
        by_sentence = [words(sentence) for sentence in self.sentences]
        return [[word for number in passage for word in by_sentence[number]] for passage in self.passages.tolist()]


def _texts(value: object) -> Iterator[str]:
    """Every text inside a row."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict | list):
        for inner in value.values() if isinstance(value, dict) else value:
            yield from _texts(inner)


def course_sentences() -> list[str]:
    """The different sentences of at least five words in the course's data sets."""
    found: dict[str, None] = {}
    for name in data.names():
        for file in data.checksums(name):
            for line in (data.data_dir() / name / file).read_text(encoding="utf-8").splitlines():
                for text in _texts(json.loads(line)):
                    found.update((s, None) for s in re.split(r"(?<=[.!?])\s+", text.strip()) if len(s.split()) >= 5)
    return list(found)


def embedded(sentences: list[str]) -> Tensor:
    """MiniLM's vectors of the sentences, (n, 384); from the cache folder if they were made before."""
    import safetensors.torch

    name = hashlib.sha256("\n".join(sentences).encode()).hexdigest()[:16]
    file = cache_dir() / "benchmarks" / f"sentences-{name}.safetensors"
    if not file.exists():
        atomic_write(file, safetensors.torch.save({"vectors": sentence_encoder("cpu")(sentences)}))
    return safetensors.torch.load_file(file)["vectors"]


def make_corpus(small: bool) -> Corpus:
    """The same corpus each time, from the same data."""
    passages, sentences, held_out = (2000, 400, 64) if small else (100_000, 8192, 256)
    generator = torch.Generator().manual_seed(0)
    texts = course_sentences()
    order = torch.randperm(len(texts), generator=generator)[:sentences]
    texts = [texts[i] for i in order.tolist()]
    vectors = embedded(texts)
    drawn = torch.randint(len(texts) - held_out, (passages, 3), generator=generator)
    return Corpus(texts[held_out:], vectors[held_out:], texts[:held_out], vectors[:held_out], drawn)


def flat(vectors: Tensor) -> faiss.Index:
    """faiss' exact index of the vectors, which it takes as they are: so they are scaled first, as ours scales them."""
    index = faiss.IndexFlatIP(vectors.shape[1])
    index.add(normalize(vectors).numpy())
    return index


def faiss_search(index: faiss.Index, queries: Tensor, threshold: int) -> tuple[np.ndarray, np.ndarray]:
    faiss.cvar.distance_compute_blas_threshold = threshold
    return index.search(normalize(queries).numpy(), K)


def bm25s_index(documents: list[list[str]]) -> Any:
    import bm25s

    index = bm25s.BM25(k1=1.5, b=0.75, method="lucene")
    index.index(documents, show_progress=False)
    return index


def bm25s_search(index: Any, queries: list[list[str]]) -> Any:
    return index.retrieve(queries, k=K, show_progress=False)


def bm25_search(index: BM25, queries: list[list[str]]) -> list[Any]:
    return [index.scores(query).topk(K) for query in queries]


# time


def ratio(found: timing.Comparison) -> str:
    low, high = found.quartiles
    return f"{found.ratio:.2f} ({low:.2f}–{high:.2f})"


def ms(seconds: float) -> str:
    return f"{1e3 * seconds:.1f} ms" if seconds < 1 else f"{seconds:.2f} s"


def reading_seconds(bytes_: int) -> float:
    """How long reading so many bytes takes at the speed at which this machine sums 150 MB, on the threads it has."""
    numbers = torch.ones(38 * 2**20)
    return timing.measure(numbers.sum, repeats=5, warmup=1, memory=False).median * bytes_ / (4 * len(numbers))


def product_seconds(index: Index, queries: Tensor) -> float:
    """The matrix product alone, all documents with all queries, a block at a time as the search does it."""
    codes = index._codes
    int8 = codes.dtype == torch.int8
    factor = (queries * 127).round().to(torch.int8) if int8 else queries
    block = max(64, 2**20 // len(queries))
    room = torch.empty(len(queries), min(block, len(codes)), dtype=torch.int32 if int8 else torch.float32)

    def run() -> None:
        for at in range(0, len(codes), block):
            some = codes[at : at + block].T
            out = room if some.shape[1] == room.shape[1] else None
            (torch._int_mm if int8 else torch.mm)(factor, some, out=out)

    return timing.measure(run, repeats=5, warmup=1, memory=False).median


def search_rows(index: Index, theirs: faiss.Index, queries: Tensor, count: int, repeats: int) -> list[str]:
    """The search on ``count`` threads, beside faiss with each of two thresholds."""
    int8 = index._codes.dtype == torch.int8
    rows = []
    faiss.omp_set_num_threads(count)
    with threads(count):
        floor = max(reading_seconds(index._codes.nbytes), product_seconds(index, queries))
        for threshold in (DEFAULT_THRESHOLD, 1):
            found = timing.compare(
                partial(index.search, queries, K),
                partial(faiss_search, theirs, queries, threshold),
                repeats=repeats,
                warmup=1,
                memory=False,
            )
            rows.append(
                f"| {count} | {len(queries)} | {'int8' if int8 else 'float32'} | {threshold:,} | {ratio(found)} "
                f"| {ms(found.a.median)} | {ms(found.b.median)} | {ms(floor)} |"
            )
    return rows


def pair_row(work: str, ours: Search, theirs: Search, repeats: int, floor_bytes: int = 0) -> list[str]:
    with threads(1):
        found = timing.compare(ours, theirs, repeats=repeats, warmup=0, memory=False)
        floor = ms(reading_seconds(floor_bytes)) if floor_bytes else "–"
    return [f"| {work} | {ratio(found)} | {ms(found.a.median)} | {ms(found.b.median)} | {floor} |"]


def bm25_bytes(documents: list[list[str]], queries: list[list[str]]) -> int:
    """What must be read: 8 bytes (number, share) for each word of a query and document with it, and all scores."""
    df = Counter(word for document in documents for word in set(document))
    return 8 * sum(df[word] for query in queries for word in set(query)) + 4 * len(documents) * len(queries)


# memory: each library in a process of its own, because torch's counter sees neither NumPy's memory nor faiss'

BUILDS: dict[str, tuple[Callable[..., Any], Callable[..., Any]]] = {
    "Index, int8": (Index, lambda index, queries: index.search(queries, K)),
    "Index, float32": (partial(Index, int8=False), lambda index, queries: index.search(queries, K)),
    "faiss": (flat, lambda index, queries: faiss_search(index, queries, 1)),
    "BM25": (BM25, bm25_search),
    "bm25s": (bm25s_index, bm25s_search),
}


def _resident(field: str) -> int:
    """VmRSS (now) or VmHWM (the highest since it was reset) of this process, in bytes."""
    found = re.search(rf"^{field}:\s+(\d+)", Path("/proc/self/status").read_text(), re.MULTILINE)
    assert found is not None
    return int(found[1]) * 1024


def memory_child(name: str, corpus: Corpus) -> None:
    """Print as JSON what an index holds, and what is held beyond it for a time while it is built and searched."""
    build, search = BUILDS[name]
    by_words = name in ("BM25", "bm25s")
    documents: Any = corpus.passage_words() if by_words else corpus.passage_vectors()
    queries: Any = [words(query) for query in corpus.queries[:64]] if by_words else corpus.query_vectors[:64]
    torch.set_num_threads(1)
    faiss.omp_set_num_threads(1)
    search(build(documents[:1000]), queries)  # what a library allocates for itself at its first use is not counted
    gc.collect()
    highest = Path("/proc/self/clear_refs")
    before = _resident("VmRSS")
    highest.write_text("5")
    index = build(documents)
    gc.collect()
    held, build_peak = _resident("VmRSS"), _resident("VmHWM")
    highest.write_text("5")
    search(index, queries)
    print(json.dumps([held - before, build_peak - held, _resident("VmHWM") - held]))


def memory_row(name: str, small: bool) -> list[str]:
    # freed memory is to go back to the system at once, else it would be counted as held
    environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
    command = [sys.executable, __file__, "--memory", name, *(["--small"] if small else [])]
    found = subprocess.run(command, env=environment, check=True, capture_output=True, text=True)
    return [f"| {name} | " + " | ".join(f"{held / 2**20:.0f} MiB" for held in json.loads(found.stdout)) + " |"]


# exactness


def share(found: Tensor, expected: Tensor) -> float:
    """Recall: the share of the expected documents that were found. Both (q, k)."""
    return (found[:, :, None] == expected[:, None, :]).any(dim=1).float().mean().item()


def int8_alone(vectors: Tensor, queries: Tensor, length: int) -> Tensor:
    """The ``length`` best by a plain int8 product, (q, length): a shortlist of fixed length, without a bound."""
    codes, factors = ((rows / rows.abs().amax(dim=1, keepdim=True) * 127).round() for rows in (vectors, queries))
    steps = vectors.abs().amax(dim=1)
    return ((factors @ codes.T) * steps).topk(length).indices  # whole numbers below 2²⁴: exact in float32 too


def exactness(what: str, vectors: Tensor, queries: Tensor) -> list[str]:
    indexes = {"int8": Index(vectors), "float32": Index(vectors, int8=False)}
    expected = top_k(queries, indexes["int8"].rows, K)
    rows = []
    for name, index in indexes.items():
        scores, numbers = index.search(queries, K)
        same = int(((numbers == expected[1]) & (scores == expected[0])).all(dim=1).sum())
        rows.append(f"| {what} | Index, {name} | {share(numbers, expected[1]):.4f} | {same} of {len(queries)} |")
    numbers = torch.from_numpy(faiss_search(flat(vectors), queries, 1)[1])
    same = int((numbers == expected[1]).all(dim=1).sum())
    rows.append(f"| {what} | faiss | {share(numbers, expected[1]):.4f} | {same} of {len(queries)} in the same order |")
    for length in (K, 2 * K, 4 * K):
        found = int8_alone(vectors, queries, length)
        rows.append(f"| {what} | the {length} best by int8 alone | {share(found, expected[1]):.4f} | – |")
    return rows


def agreement(ours: BM25, theirs: Any, queries: list[list[str]]) -> str:
    """Both libraries' ten best for each query."""
    same, off = 0, 0.0
    for query, numbers, scores in zip(queries, *bm25s_search(theirs, queries), strict=True):
        mine, expected = ours.scores(query), torch.from_numpy(scores)
        numbers = torch.from_numpy(numbers.astype("int64"))
        best = mine.topk(K)
        off = max(off, float((best.values - expected).abs().max()), float((mine[numbers] - expected).abs().max()))
        same += set(best.indices.tolist()) == set(numbers.tolist())
    return (
        f"The ten best of both are the same documents for {same} of {len(queries)} queries. The scores of the ten,\n"
        f"rank by rank and document by document, differ by at most {off:.1e}: where the documents differ, they tie."
    )


def run(small: bool = False) -> str:
    """Measure everything and return the text of the result."""
    corpus = make_corpus(small)
    some, few, many = (2, 2, 2) if small else (3, 5, 11)
    vectors, documents = corpus.passage_vectors(), corpus.passage_words()
    queries, asked = corpus.query_vectors, [words(query) for query in corpus.queries[:64]]
    ours, theirs = (Index(vectors), Index(vectors, int8=False)), flat(vectors)
    by_words, bm25s = BM25(documents), bm25s_index(documents)

    steps: list[tuple[str, Callable[[], list[str]]]] = [
        ("search", partial(search_rows, index, theirs, queries[:number], count, many))
        for count in (1, 2)
        for number in (1, 64)
        for index in ours
    ]
    build, both = partial(flat, vectors), vectors.nbytes * 2  # read once and written once
    steps += [
        ("build", partial(pair_row, "build, int8", partial(Index, vectors), build, few, both + vectors.numel())),
        ("build", partial(pair_row, "build, float32", partial(Index, vectors, int8=False), build, few, both)),
        ("words", partial(pair_row, "build", partial(BM25, documents), partial(bm25s_index, documents), some)),
    ]
    for number in (1, 64):
        search = partial(bm25_search, by_words, asked[:number])
        peer = partial(bm25s_search, bm25s, asked[:number])
        floor = bm25_bytes(documents, asked[:number])
        steps.append(("words", partial(pair_row, f"search, queries: {number}", search, peer, many, floor)))
    plain = partial(top_k, queries[:64], vectors, K)
    steps.append(
        ("top_k", partial(pair_row, "search, int8, queries: 64", partial(ours[0].search, queries[:64], K), plain, few))
    )
    steps += [
        ("agreement", lambda: [agreement(by_words, bm25s, asked)]),
        ("exact", partial(exactness, f"{len(corpus.vectors):,} sentences, embedded", corpus.vectors, queries)),
        ("exact", partial(exactness, f"{len(vectors):,} passages, mixed", vectors, queries[:64])),
    ]
    steps += [("memory", partial(memory_row, name, small)) for name in BUILDS]
    found: dict[str, list[str]] = {}
    for section, step in progress(steps, "benchmarks"):
        found.setdefault(section, []).extend(step())

    about = ", ".join(f"{name} {value}" for name, value in machine().items())
    length = sum(len(document) for document in documents) / len(documents)
    return f"""\
# Search in {len(vectors):,} passages

Measured on {date.today().isoformat()}; {about}; faiss {faiss.__version__}.
The ten best each time; interleaved pairs ({many} for a search, {few} for a build, {some} for a build by words), the
cache flushed before each run. A ratio below 1 means that ours is faster. Not measured on a GPU.

A passage is three of {len(corpus.sentences):,} different sentences of the course's data, {length:.0f} words.
Its text is real. **Its vector is not MiniLM's vector of the passage** but the mean of MiniLM's vectors of the three
sentences ({vectors.shape[1]} numbers). Queries are sentences that are in no passage.

## By embeddings, beside faiss' exact index (IndexFlatIP)

faiss multiplies matrices from `distance_compute_blas_threshold` queries on: {DEFAULT_THRESHOLD:,} unless it is set, and
with 1 at any number. The floor is to read once what must be read (for a build also what is written), as fast as this
machine adds up numbers, or for a search the bare matrix product, if that takes longer.

| threads | queries | ours | faiss' threshold | ours ÷ faiss (quartiles) | ours | faiss | floor, ours |
|---|---|---|---|---|---|---|---|
{_lines(found, "search")}

| work, one thread | ours ÷ faiss (quartiles) | ours | faiss | floor, ours |
|---|---|---|---|---|
{_lines(found, "build")}

| work, one thread | ours ÷ `top_k`, which has no index (quartiles) | ours | `top_k` | |
|---|---|---|---|---|
{_lines(found, "top_k")}

## By words, beside bm25s

| work, one thread | ours ÷ bm25s (quartiles) | ours | bm25s | floor, ours |
|---|---|---|---|---|
{_lines(found, "words")}

{_lines(found, "agreement")}

## Exactness

Against `top_k`, which computes every cosine in float64. Recall is the share of its ten that were found. For comparison
a shortlist by int8 scores alone, of a fixed length and with no bound on what it may lose: the recall is the list's.

| documents | search | recall | same documents, order and scores |
|---|---|---|---|
{_lines(found, "exact")}

## Memory

Resident memory of a process of its own, beyond the documents given to it: what the index holds, and what is held for a
time beyond that, while the index is built and while 64 queries are searched.

| index | holds | to build | to search |
|---|---|---|---|
{_lines(found, "memory")}
"""


def _lines(found: dict[str, list[str]], section: str) -> str:
    return "\n".join(found[section])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--small", action="store_true", help="small sizes, print only: to see that everything runs")
    parser.add_argument("--memory", choices=list(BUILDS), help="measure the memory of one index in this process")
    options = parser.parse_args()
    if options.memory:
        memory_child(options.memory, make_corpus(options.small))
        return
    text = run(options.small)
    print(text)
    if not options.small:
        atomic_write(RESULT, text)


if __name__ == "__main__":
    main()
