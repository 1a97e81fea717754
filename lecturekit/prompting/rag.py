"""Retrieval for retrieval-augmented generation: find the passages a language model should read before it answers.

Slide "Retrieval Augmented Generation (RAG)"; Lewis et al. 2020 (RAG) and Karpukhin et al. 2020 (dense retrieval).
``top_k`` is the search itself. ``Retriever`` cuts texts into chunks, embeds them and searches by meaning, by words
(BM25) or by both, ``assemble`` writes what was found into a prompt.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from numbers import Integral
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import Tensor

from lecturekit.arguments import require_number, require_positive_int, require_tensor, widened
from lecturekit.prompting.bm25 import BM25
from lecturekit.prompting.evaluation import ABSTAIN
from lecturekit.runtime import atomic_write, progress

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

Encoder = Callable[[list[str]], Tensor]
"""Texts to embeddings: a list of n strings → (n, d), any length of vector, no zero vectors."""

Id = TypeVar("Id", int, str)
"""What names a passage: its number or a word."""

METHODS = ("embedding", "bm25", "fusion")
MAX_TOKENS = 256  # as many as all-MiniLM-L6-v2 reads, trained on 128; what follows in a longer text is not read
RANK_CONSTANT = 60  # of reciprocal rank fusion, as in Cormack, Clarke and Büttcher 2009
DEPTH = 1000  # how far down the Retriever reads the rankings that it fuses: deep enough, for a rank adds less and less
INSTRUCTION = (
    "Answer the question from the sources below, in a few words, and cite the source you used, like [1]. "
    f"If the answer is in none of them, say: {ABSTAIN}."
)
_BLOCK_NUMBERS = 2**21  # in one working block of top_k: 16 MiB as float64, and a few blocks are alive at a time


def _unit_rows(name: str, rows: Tensor, first: int) -> Tensor:
    """rows (n, d) as float64 rows of length 1. ``first`` is the number of the first one, for the message."""
    rows = rows.detach().double()
    largest = rows.abs().amax(dim=1, keepdim=True)  # a NaN anywhere in a row makes its maximum NaN
    for wrong, what in (
        (~largest.isfinite(), "holds NaN or infinity"),
        (largest == 0, "is all zeros, so has no angle"),
    ):
        if wrong.any():
            raise ValueError(f"{name}[{first + int(wrong[:, 0].nonzero()[0])}] {what}")
    rows = rows / largest  # so that no square overflows or vanishes
    return rows / rows.norm(dim=1, keepdim=True)


def _best(scores: Tensor, indices: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k best of each row, best first, ties by lower index. Both (q, m), indices ascending among equal scores.

    torch.topk alone may return any of several equal scores. So it only finds the k-th best value; everything above
    it stays, and of those equal to it the first ones, until there are exactly k.
    """
    kth = scores.topk(k, dim=1).values[:, -1:]
    above, equal = scores > kth, scores == kth
    keep = above | (equal & (equal.cumsum(dim=1) <= k - above.sum(dim=1, keepdim=True)))
    scores, indices = scores[keep].view(-1, k), indices[keep].view(-1, k)
    order = scores.argsort(dim=1, descending=True, stable=True)
    return scores.gather(1, order), indices.gather(1, order)


def top_k(queries: Tensor, documents: Tensor, k: int, *, block: int = 1024) -> tuple[Tensor, Tensor]:
    """The k documents with the largest cosine to each query, by exact search.

    queries: (q, d)   documents: (n, d)   →   scores (q, k) float32 in [-1, 1], indices (q, k) int64, best first.
    Cosines are computed in float64 and rounded once to float32. Documents whose rounded cosines are equal are ordered
    by index, lower first. So copies of a document tie wherever they stand, while a float32 matrix product would give
    them different last digits and an order that depends on the machine and on ``block``.
    Memory beyond inputs and result is bounded: about ``block`` documents at a time, merged into a running best, and
    fewer queries or documents at a time when d, q or k is large; 150 MB or less.
    Both on one device, any real floating dtype. No gradient flows.

    Raises TypeError for no tensor or an integer dtype, ValueError when a shape is not 2-D, empty or does not match,
    k is not in 1..n, the devices differ, or a row is all zeros or holds NaN or infinity (its number is named).
    """
    require_tensor("queries", queries, ndim=2)
    require_tensor("documents", documents, ndim=2)
    require_positive_int("k", k)
    require_positive_int("block", block)
    (q, d), n = queries.shape, len(documents)
    if documents.shape[1] != d:
        raise ValueError(f"documents must be (n, {d}) to match queries {(q, d)}, got {tuple(documents.shape)}")
    if k > n:
        raise ValueError(f"k must be at most the number of documents, {n}, got {k}")
    if queries.device != documents.device:
        raise ValueError(f"documents must be on {queries.device} as queries are, got {documents.device}")

    block = max(1, min(max(block, k), _BLOCK_NUMBERS // d))  # at least k, or merging would take most of the time
    width = max(1, min(_BLOCK_NUMBERS // d, _BLOCK_NUMBERS // (block + k)))  # queries at a time
    parts = [_top_k(queries[at : at + width], at, documents, k, block) for at in range(0, q, width)]
    return torch.cat([scores for scores, _ in parts]), torch.cat([indices for _, indices in parts])


def _top_k(queries: Tensor, first: int, documents: Tensor, k: int, block: int) -> tuple[Tensor, Tensor]:
    """top_k for queries few enough to be scored against one block of documents at once."""
    unit_queries = _unit_rows("queries", queries, first)
    scores = torch.empty(len(queries), 0, device=queries.device)
    indices = torch.empty(len(queries), 0, dtype=torch.int64, device=queries.device)
    for at in range(0, len(documents), block):
        unit_documents = _unit_rows("documents", documents[at : at + block], at)
        cosines = (unit_queries @ unit_documents.T).float().clamp(-1, 1)  # (q, block)
        numbers = torch.arange(at, at + len(unit_documents), device=queries.device).expand_as(cosines)
        # The best so far stand in front: their indices are lower than any in this block, so ties stay in order.
        scores, indices = torch.cat([scores, cosines], dim=1), torch.cat([indices, numbers], dim=1)
        scores, indices = _best(scores, indices, min(k, scores.shape[1]))
    return scores, indices


def chunk(text: str, size: int = 120, overlap: int = 20) -> list[str]:
    """Cut a text into pieces of ``size`` words, each starting with the last ``overlap`` words of the one before.

    Words, not tokens, so that a reader can count them: whatever stands between white space, joined again by single
    spaces. The last piece may be shorter. 120 English words are about 160 tokens, within what MiniLM reads.

    Raises TypeError when text is no str or size or overlap no int, ValueError when text has no words, size is below 1
    or overlap is not in 0..size-1.
    """
    if not isinstance(text, str):
        raise TypeError(f"text must be a str, got {type(text).__name__}")
    require_positive_int("size", size)
    if isinstance(overlap, bool) or not isinstance(overlap, int):
        raise TypeError(f"overlap must be an int, got {type(overlap).__name__}")
    if not 0 <= overlap < size:
        raise ValueError(f"overlap must be at least 0 and less than size, {size}, got {overlap}")
    words = text.split()
    if not words:
        raise ValueError("text must hold at least one word, got only white space")
    # A piece that starts within the last `overlap` words would repeat words only, hence the shorter range.
    starts = range(0, max(1, len(words) - overlap), size - overlap)
    return [" ".join(words[start : start + size]) for start in starts]


def pool(hidden: Tensor, mask: Tensor) -> Tensor:
    """One vector for each text: the mean of its tokens' hidden states without the padding, scaled to length 1.

    hidden: (n, seq, d) floating   mask: (n, seq), 1 at the tokens of the text and 0 at padding, on either side, as a
    tokenizer's attention_mask   →   (n, d) in hidden's dtype, float32 at least. Reimers and Gurevych 2019
    (Sentence-BERT), "mean pooling".

    Raises TypeError for no tensor or hidden of an integer dtype, ValueError when the shapes do not match, the mask
    holds anything but 0 and 1, a text has no token, one of its tokens holds NaN or infinity, or its tokens add up to
    zeros, which have no direction (the number of the text is named).
    """
    require_tensor("hidden", hidden, ndim=3)
    require_tensor("mask", mask, ndim=2, floating=False)
    if mask.shape != hidden.shape[:2]:
        raise ValueError(f"mask must be {tuple(hidden.shape[:2])} to match hidden, got {tuple(mask.shape)}")
    if not ((mask == 0) | (mask == 1)).all():
        raise ValueError("mask must hold 0 and 1 only")
    real = mask.bool()
    if not real.any(dim=1).all():
        raise ValueError(f"mask[{int((~real.any(dim=1)).nonzero()[0])}] has no token: an empty text has no meaning")
    tokens = widened(hidden).masked_fill(~real.unsqueeze(-1), 0)
    largest = tokens.detach().abs().amax(dim=(1, 2), keepdim=True)  # NaN anywhere in a text makes its maximum NaN
    if not largest.isfinite().all():
        raise ValueError(f"hidden[{int((~largest.isfinite()).nonzero()[0, 0])}] holds NaN or infinity")
    # Divided by the largest value first, no sum and no square overflows or vanishes. What the mean divides the sum by
    # goes with the length.
    sums = (tokens / largest.clamp(min=torch.finfo(tokens.dtype).tiny)).sum(dim=1)  # (n, d)
    size = sums.detach().abs().amax(dim=1, keepdim=True)
    if (size == 0).any():
        raise ValueError(f"hidden[{int((size == 0).nonzero()[0, 0])}] has a mean of zeros, which has no direction")
    sums = sums / size
    return sums / sums.norm(dim=1, keepdim=True)


def embed(texts: list[str], model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, batch_size: int = 32) -> Tensor:
    """Sentence embeddings: the model's last hidden states, put together by ``pool``.

    n texts → (n, hidden) float32 on the model's device. Texts are cut at 256 tokens.
    Raises TypeError when texts is one str or holds anything but str or batch_size is no int, ValueError when there are
    no texts or batch_size is below 1.
    """
    if isinstance(texts, str):
        raise TypeError("texts must be a list of str, got one str")
    for number, text in enumerate(texts):
        if not isinstance(text, str):
            raise TypeError(f"texts[{number}] must be a str, got {type(text).__name__}")
    if not texts:
        raise ValueError("texts must not be empty")
    require_positive_int("batch_size", batch_size)
    by_length = sorted(range(len(texts)), key=lambda i: len(texts[i]))  # like lengths together: little padding
    batches = [by_length[at : at + batch_size] for at in range(0, len(texts), batch_size)]
    result = torch.empty(len(texts), model.config.hidden_size, device=model.device)
    was_training = model.training
    model.eval()
    try:
        with torch.no_grad():
            for batch in progress(batches, "Embedding") if len(batches) > 1 else batches:
                tokens = tokenizer(
                    [texts[i] for i in batch], padding=True, truncation=True, max_length=MAX_TOKENS, return_tensors="pt"
                ).to(model.device)
                hidden = model(**tokens).last_hidden_state  # (batch, seq, hidden)
                result[batch] = pool(hidden, tokens["attention_mask"]).to(result.dtype)
    finally:
        model.train(was_training)
    return result


def sentence_encoder(device: torch.device | str | None = None) -> Encoder:
    """all-MiniLM-L6-v2 as an encoder: list of n strings → (n, 384). Raises what load_sentence_encoder raises."""
    from lecturekit.models import load_sentence_encoder

    model, tokenizer = load_sentence_encoder(device)
    return lambda texts: embed(texts, model, tokenizer)


def words(text: str) -> list[str]:
    """The words BM25 counts: runs of letters and digits in lower case. No stop words and no stemming."""
    return re.findall(r"\w+", text.lower())


def _is_list(value: Any) -> bool:
    """Whether value is a sequence of things, which a text is not."""
    return isinstance(value, Sequence) and not isinstance(value, (str, bytes))


def _require_ids(rankings: Sequence[Sequence[Id]]) -> None:
    """Refuse what cannot be ranked: no lists, or ids that cannot be ordered where two scores are equal."""
    kinds: set[bool] = set()
    for number, ranking in enumerate(rankings):
        if not _is_list(ranking):
            raise TypeError(f"rankings[{number}] must be a list of ids, got {type(ranking).__name__}")
        for id in ranking:
            if isinstance(id, bool) or not isinstance(id, (Integral, str)):
                raise TypeError(f"rankings[{number}] must hold ids, int or str, got {type(id).__name__}")
            kinds.add(isinstance(id, str))
    if len(kinds) > 1:
        raise TypeError("rankings must hold ids of one kind, all int or all str, got both")


def fuse(rankings: Sequence[Sequence[Id]], constant: float = RANK_CONSTANT) -> tuple[list[Id], list[float]]:
    """Reciprocal rank fusion: one ranking out of several, whose scores may be of kinds that cannot be compared.

    rankings: lists of ids, each best first, of any lengths   →   every id that is in one of them, best first, and its
    score: the sum over the rankings that hold it of 1 / (constant + rank), where the best has rank 1. A ranking adds
    nothing to an id that it lacks. Equal scores are ordered by id, lower first.
    Cormack, Clarke and Büttcher 2009, with constant = 60.

    Raises TypeError when rankings or one of them is no list, an id is neither an int nor a str, both kinds are there,
    or constant is no number; ValueError when there is no ranking, one holds an id twice, or constant is below 0.
    """
    if not _is_list(rankings):
        raise TypeError(f"rankings must be a list of lists of ids, got {type(rankings).__name__}")
    if not rankings:
        raise ValueError("rankings must not be empty")
    _require_ids(rankings)
    if require_number("constant", constant) < 0:
        raise ValueError(f"constant must be at least 0, got {constant}")
    shares: dict[Id, list[float]] = defaultdict(list)
    for number, ranking in enumerate(rankings):
        if len(set(ranking)) < len(ranking):
            raise ValueError(f"rankings[{number}] must hold each id once")
        for rank, id in enumerate(ranking, start=1):
            shares[id].append(1 / (constant + rank))
    scores = {id: math.fsum(parts) for id, parts in shares.items()}  # fsum: the same whichever ranking comes first
    ids = sorted(scores, key=lambda id: (-scores[id], id))
    return ids, [scores[id] for id in ids]


def assemble(
    question: str,
    passages: Sequence[Mapping[str, Any]],
    budget: int,
    count: Callable[[str], int],
    instruction: str = INSTRUCTION,
) -> tuple[str, list[int]]:
    """The prompt that gives a model the passages to answer from, and the passages that are in it.

    passages: rows with a "text", best first. What else a row holds is not for the model: a labelled test set may say
    which passages are relevant, and nothing of that is looked at.   budget: the most tokens that the prompt may have.
    count: the tokens of a text.
    The prompt is blocks with one blank line between any two:

        <instruction>

        [1] <text of the best passage>

        [2] <text of the next>

        Question: <question>
        Answer:

    Nothing stands behind the last colon. Passages are taken in their order, whole, as long as count(the finished
    prompt) is at most the budget; the first that does not fit ends it, and a worse one behind it is not taken in its
    place. Count the prompt and not its parts: a tokenizer joins letters across their borders.
    →   (prompt, used): used[n − 1] is the position in passages, from 0, of the source numbered [n].

    Raises TypeError when question or instruction is no str, a passage no row with a "text" that is a str, budget no int
    or count cannot be called; ValueError when a row lacks its "text", the question is blank or does not fit into the
    budget even without a passage.
    """
    require_positive_int("budget", budget)
    for name, value in (("question", question), ("instruction", instruction)):
        if not isinstance(value, str):
            raise TypeError(f"{name} must be a str, got {type(value).__name__}")
    if not question.strip():
        raise ValueError("question must hold at least one word, got only white space")
    if not callable(count):
        raise TypeError(f"count must be a function from a text to its tokens, got {type(count).__name__}")
    if not _is_list(passages):
        raise TypeError(f'passages must be a list of rows with a "text", got {type(passages).__name__}')
    for number, row in enumerate(passages):
        if not isinstance(row, Mapping):
            raise TypeError(f'passages[{number}] must be a row with a "text", got {type(row).__name__}')
        if "text" not in row:
            raise ValueError(f'passages[{number}] must have a "text", got only {", ".join(map(str, row)) or "nothing"}')
        if not isinstance(row["text"], str):
            raise TypeError(f'passages[{number}]["text"] must be a str, got {type(row["text"]).__name__}')

    def written(number: int) -> str:
        sources = [f"[{place}] {passage['text']}" for place, passage in enumerate(passages[:number], start=1)]
        return "\n\n".join([instruction, *sources, f"Question: {question}\nAnswer:"])

    if (least := count(written(0))) > budget:
        raise ValueError(f"budget must be at least {least}, what the prompt takes without a passage, got {budget}")
    fitting = 0
    while fitting < len(passages) and count(written(fitting + 1)) <= budget:
        fitting += 1
    return written(fitting), list(range(fitting))


@dataclass(frozen=True)
class Hit:
    """One retrieved chunk: its text, its score, its number, and the number of the added text it was cut from."""

    text: str
    score: float
    index: int
    source: int


class Retriever:
    """Chunks of texts that can be searched.

    encoder: any function from a list of n strings to an (n, d) tensor. None: MiniLM, loaded when first needed.
    size, overlap: words in a chunk and words shared by neighbours, see ``chunk``.
    """

    def __init__(self, encoder: Encoder | None = None, *, size: int = 120, overlap: int = 20) -> None:
        chunk("a", size, overlap)  # raises when size and overlap do not fit
        self.size, self.overlap = size, overlap
        self.chunks: list[str] = []
        self.sources: list[int] = []
        self.embeddings: Tensor | None = None  # (chunks, d)
        self._encoder = encoder
        self._bm25: BM25 | None = None

    def __len__(self) -> int:
        return len(self.chunks)

    def _encode(self, texts: list[str]) -> Tensor:
        if self._encoder is None:
            self._encoder = sentence_encoder()
        result = self._encoder(texts)
        if not isinstance(result, Tensor) or result.dim() != 2 or len(result) != len(texts):
            got = tuple(result.shape) if isinstance(result, Tensor) else type(result).__name__
            raise ValueError(f"encoder must return a tensor ({len(texts)}, d) for {len(texts)} texts, got {got}")
        return result.detach()

    def add(self, texts: Iterable[str]) -> None:
        """Cut texts into chunks, embed these and keep them.

        All or nothing: raises TypeError or ValueError, naming the text, when one is no str or has no words, and
        ValueError when there are none or the encoder returns another shape than before.
        """
        if isinstance(texts, str):
            raise TypeError("texts must be a list of str, got one str")
        chunks: list[str] = []
        sources: list[int] = []
        first = self.sources[-1] + 1 if self.sources else 0
        for number, text in enumerate(texts):
            try:
                pieces = chunk(text, self.size, self.overlap)
            except (TypeError, ValueError) as error:
                raise type(error)(f"texts[{number}]: {error}") from error
            chunks += pieces
            sources += [first + number] * len(pieces)
        if not chunks:
            raise ValueError("texts must not be empty")
        new = self._encode(chunks)
        if self.embeddings is not None:
            if new.shape[1] != self.embeddings.shape[1]:
                raise ValueError(
                    f"encoder must return (n, {self.embeddings.shape[1]}) as before, got {tuple(new.shape)}"
                )
            new = torch.cat([self.embeddings, new.to(self.embeddings)])
        self.embeddings = new
        self.chunks += chunks
        self.sources += sources
        self._bm25 = None

    def search(self, query: str, k: int = 3, method: str = "embedding") -> list[Hit]:
        """The k best chunks for a question, best first, ties by lower chunk number.

        method: "embedding" scores by cosine, "bm25" by ``BM25`` over words (k1 = 1.5, b = 0.75; 0 where no word is
        shared), "fusion" by ``fuse`` of the 1,000 best of either; chunks that share no word are not in BM25's ranking.

        Raises TypeError when query is no str, ValueError when it is blank, k is not in 1..number of chunks, or the
        method is unknown.
        """
        if not isinstance(query, str):
            raise TypeError(f"query must be a str, got {type(query).__name__}")
        if not query.strip():
            raise ValueError("query must hold at least one word, got only white space")
        if method not in METHODS:
            raise ValueError(f"method must be one of {', '.join(METHODS)}, got {method!r}")
        if require_positive_int("k", k) > len(self):
            raise ValueError(f"k must be at most the number of chunks, {len(self)}, got {k}")
        if method == "embedding":
            indices, scores = self._by_embedding(query, k)
        elif method == "bm25":
            indices, scores = self._by_words(query, k)
        else:
            depth = min(max(k, DEPTH), len(self))
            by_words = [index for index, score in zip(*self._by_words(query, depth), strict=True) if score > 0]
            indices, scores = fuse([self._by_embedding(query, depth)[0], by_words])
        return [
            Hit(self.chunks[index], score, index, self.sources[index])
            for index, score in zip(indices[:k], scores[:k], strict=True)
        ]

    def _by_embedding(self, query: str, k: int) -> tuple[list[int], list[float]]:
        """The k chunks of the largest cosine, best first, and their scores."""
        assert self.embeddings is not None  # k ≤ len(self) was checked, so there are chunks
        scores, indices = top_k(self._encode([query]).to(self.embeddings.device), self.embeddings, k)
        return indices[0].tolist(), scores[0].tolist()

    def _by_words(self, query: str, k: int) -> tuple[list[int], list[float]]:
        """The k chunks of the largest BM25 score, best first, and their scores, 0 where no word is shared."""
        if self._bm25 is None:
            self._bm25 = BM25([words(text) for text in self.chunks])
        scores, indices = _best(self._bm25.scores(words(query)).unsqueeze(0), torch.arange(len(self)).unsqueeze(0), k)
        return indices[0].tolist(), scores[0].tolist()

    def save(self, directory: Path | str) -> Path:
        """Write the chunks (index.json) and their embeddings (safetensors) to a directory. No encoder is saved.

        Killed at any moment it leaves the old index or the new one: the embeddings go to a file named by their
        content, then index.json, which names that file, is replaced in one step. Raises ValueError when empty.
        """
        import safetensors.torch

        if self.embeddings is None:
            raise ValueError("the retriever is empty: add texts before saving")
        directory = Path(directory)
        data = safetensors.torch.save({"embeddings": self.embeddings.cpu().contiguous()})
        checksum = hashlib.sha256(data).hexdigest()
        file = atomic_write(directory / f"embeddings-{checksum[:16]}.safetensors", data)
        index = {
            "format": 1,
            "size": self.size,
            "overlap": self.overlap,
            "embeddings": file.name,
            "sha256": checksum,
            "chunks": self.chunks,
            "sources": self.sources,
        }
        atomic_write(directory / "index.json", json.dumps(index, ensure_ascii=False, indent=1))
        for old in directory.glob("embeddings-*.safetensors"):
            if old != file:
                old.unlink(missing_ok=True)
        return directory

    @classmethod
    def load(cls, directory: Path | str, encoder: Encoder | None = None) -> Retriever:
        """Read what ``save`` wrote. Give the encoder that was used then (None: MiniLM).

        Raises FileNotFoundError when a file is missing, ValueError when one is damaged or of another format.
        """
        import safetensors.torch

        directory = Path(directory)
        index = directory / "index.json"
        if not index.is_file():
            raise FileNotFoundError(f"directory must hold an index.json as Retriever.save writes it, got {directory}")
        try:
            fields = json.loads(index.read_text(encoding="utf-8"))
            if fields["format"] != 1:
                raise ValueError(f"{index} has format {fields['format']}, this version reads format 1")
            retriever = cls(encoder, size=fields["size"], overlap=fields["overlap"])
            retriever.chunks, retriever.sources = list(fields["chunks"]), list(fields["sources"])
            name, checksum = Path(fields["embeddings"]).name, fields["sha256"]  # .name: never out of the directory
        except (KeyError, TypeError, json.JSONDecodeError) as error:
            raise ValueError(f"{index} is damaged: {error!r}") from error
        data = (directory / name).read_bytes()
        if hashlib.sha256(data).hexdigest() != checksum:
            raise ValueError(f"{directory / name} is damaged: its checksum is not the one in index.json")
        retriever.embeddings = safetensors.torch.load(data)["embeddings"]
        if not len(retriever.embeddings) == len(retriever.chunks) == len(retriever.sources):
            raise ValueError(f"{index} is damaged: its numbers of chunks, sources and embeddings differ")
        return retriever
