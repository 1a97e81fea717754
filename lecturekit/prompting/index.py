"""Exact cosine search in many documents that stay: ``Index`` finds what ``top_k`` finds, several times faster.

``top_k`` computes every cosine in float64, so that the order depends on nothing but the numbers. But nearly all
documents are far from the best, and a cheaper product is enough to see that. So the search has two steps:

1. Shortlist. Score all documents in float32 or int8. Such a score is off by at most an ``error`` that is known
   beforehand. A document whose score + error is below the k-th best score − error cannot be among the k best.
2. Decide. ``top_k`` orders the few dozen that are left.

No document is lost, because the error is a bound and no estimate. A shortlist of fixed length would be simpler, but
what it loses depends on the documents and would have to be measured on each collection. Where the bound leaves many
documents (thousands of copies of one text), ``top_k`` gets them all: slower, and still exact.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lecturekit.arguments import require_positive_int, require_tensor
from lecturekit.prompting.rag import _unit_rows, top_k

_QUERIES = 64  # at a time: enough that arithmetic takes the time, and not the reading of the documents
_GROUP = 64  # documents of which only the best score is compared at first
_SCORES = 2**20  # in one block, 4 MiB: small enough to be compared before they leave the cache
_FOUND = 2**20  # pairs of query and document, and
_GATHERED = 2**24  # numbers in shortlisted rows, 64 MiB: beyond either, a shortlist saves nothing
_NUMBERS = 2**16  # scaled or rounded at a time, 512 KiB as float64
_ULP = 2.0**-23


class Index:
    """Documents (n, d) that can be searched by cosine.

    documents: (n, d), any real floating dtype, any length of vector. They are scaled to length 1 and kept as float32,
    ``rows``: 4 · n · d bytes. Of the tensor given nothing is kept.
    int8: make the shortlists from a copy in 8 bits, which takes n · d bytes more and is faster to read and to
    multiply. The result is the same. On the CPU only; None: if the documents are there.

    Raises TypeError for no tensor or an integer dtype, ValueError when the shape is not 2-D or is empty, or a row is
    all zeros or holds NaN or infinity (its number is named), and with int8=True for another device or d above 131,072.
    """

    def __init__(self, documents: Tensor, *, int8: bool | None = None) -> None:
        require_tensor("documents", documents, ndim=2)
        # torch._int_mm is the one product of int8 that torch has, and asks for certain shapes on a GPU. It sums in 32
        # bits, where the products of more than 131,072 pairs of 127 may not fit.
        fits = documents.device.type == "cpu" and documents.shape[1] <= 2**17
        if int8 and not fits:
            got = f"{tuple(documents.shape)} on {documents.device}"
            raise ValueError(f"int8=True needs documents (n, d) on cpu with d at most {2**17}, got {got}: leave it out")
        self._int8 = fits if int8 is None else int8
        self.rows = _unit_rows_float32(documents)
        self._codes, self._steps, self._lost = self._coded(self.rows, _GROUP)

    def __len__(self) -> int:
        return len(self.rows)

    def add(self, documents: Tensor) -> None:
        """Append documents (m, d), numbered from len(self) on. Copies all that is there, so add many at once.

        All or nothing. Raises what ``Index`` raises, and ValueError when d or the device is another than before.
        """
        require_tensor("documents", documents, ndim=2)
        self._require_alike("documents", documents)
        self.rows = torch.cat([self.rows, _unit_rows_float32(documents)])
        self._codes, self._steps, self._lost = self._coded(self.rows, _GROUP)

    def search(self, queries: Tensor, k: int) -> tuple[Tensor, Tensor]:
        """The k documents with the largest cosine to each query: what ``top_k(queries, index.rows, k)`` returns.

        queries: (q, d)   →   scores (q, k) float32 in [-1, 1], indices (q, k) int64, best first, ties by lower index.
        Memory beyond the index and the result is bounded, whatever n and q: 250 MB or less. No gradient flows.

        Raises TypeError for no tensor or an integer dtype, ValueError when the shape is not (q, d) or is empty, k is
        not in 1..n, the device is another, or a row is all zeros or holds NaN or infinity (its number is named).
        """
        require_tensor("queries", queries, ndim=2)
        self._require_alike("queries", queries)
        if require_positive_int("k", k) > len(self):
            raise ValueError(f"k must be at most the number of documents, {len(self)}, got {k}")
        width = max(1, min(_QUERIES, 2 * _SCORES // (k * _GROUP)))
        parts = []
        for at in range(0, len(queries), width):
            some = queries[at : at + width]
            shortlist = self._shortlist(_unit_rows("queries", some, at).float(), k)
            if shortlist is None:
                parts.append(top_k(some, self.rows, k))
            else:
                scores, places = top_k(some, self.rows[shortlist], k)
                parts.append((scores, shortlist[places]))
        return torch.cat([scores for scores, _ in parts]), torch.cat([indices for _, indices in parts])

    def _require_alike(self, name: str, value: Tensor) -> None:
        d = self.rows.shape[1]
        if value.shape[1] != d:
            raise ValueError(f"{name} must be (.., {d}) as the documents of the index, got {tuple(value.shape)}")
        if value.device != self.rows.device:
            raise ValueError(f"{name} must be on {self.rows.device} as the index is, got {value.device}")

    def _coded(self, rows: Tensor, group: int) -> tuple[Tensor, Tensor, Tensor]:
        """rows (n, d) as they are multiplied: codes (n, d), and for each whole group of rows its step and its loss.

        A row is about codes · step; the length of what is missing is at most the loss. In float32 nothing is.
        """
        groups = len(rows) // group
        steps, lost = rows.new_ones(groups), rows.new_zeros(groups)
        if not self._int8:
            return rows, steps, lost
        codes = rows.new_empty(groups * group, rows.shape[1], dtype=torch.int8)
        block = max(1, _NUMBERS // (group * rows.shape[1]))
        for at in range(0, groups, block):
            here = slice(at, min(at + block, groups))
            some = rows[here.start * group : here.stop * group].view(-1, group, rows.shape[1])
            steps[here] = some.abs().amax(dim=(1, 2)) / 127
            rounded = (some / steps[here, None, None]).round()
            codes[here.start * group : here.stop * group] = rounded.view(-1, rows.shape[1])
            lost[here] = (some - rounded * steps[here, None, None]).norm(dim=2).amax(dim=1)
        return codes, steps, lost

    def _shortlist(self, queries: Tensor, k: int) -> Tensor | None:
        """Numbers, ascending, of all documents that may be among the k best of some query (float32, length 1).

        None where a shortlist would save nothing. One list serves all queries, because then ``top_k`` is one call: the
        documents that other queries brought in cost less than a call for each.

        Most of the work beside the product is to compare, so it is done by groups: only the best score of a group is
        compared, and only where that passed is the group looked into. The groups also give the bound. Each holds
        another document, so the k-th best document is no worse than the k-th best of the groups' best.
        """
        (q, d), n = queries.shape, len(self) // _GROUP * _GROUP  # the few behind the last whole group are listed unseen
        if n < k * _GROUP:
            return None
        codes, query_steps, query_lost = self._coded(queries, 1)
        rounding = (d + 8) * _ULP + _coarse_product()
        block = max(k, _SCORES // (q * _GROUP)) * _GROUP
        room = torch.empty(q * min(block, n), dtype=torch.int32 if self._int8 else torch.float32, device=queries.device)
        best = queries.new_empty(q, 0)
        found: list[tuple[Tensor, Tensor, Tensor]] = []
        for at in range(0, n, block):
            end = min(at + block, n)
            product = room[: q * (end - at)].view(q, end - at)
            (torch._int_mm if self._int8 else torch.mm)(codes, self._codes[at:end].T, out=product)
            product = product.view(q, -1, _GROUP)
            here = slice(at // _GROUP, end // _GROUP)
            step = query_steps[:, None] * self._steps[here]  # (q, groups)
            # q·x − q'·x' = q'·(x − x') + (q − q')·x, where |x| = 1 and |q'| ≤ 1 + |q − q'|
            error = query_lost[:, None] + (1 + query_lost[:, None]) * self._lost[here] + rounding
            score = product.amax(dim=2) * step
            best = torch.cat([best, score - error], dim=1).topk(k).values
            query, group = (score + error >= best[:, -1:]).nonzero(as_tuple=True)
            reach = product[query, group] * step[query, group, None] + error[query, group, None]  # (hits, _GROUP)
            hit, place = (reach >= best[query, -1:]).nonzero(as_tuple=True)
            found.append((query[hit], at + group[hit] * _GROUP + place, reach[hit, place]))
            if sum(len(number) for _, number, _ in found) > _FOUND:
                return None
        query, number, reached = (torch.cat(parts) for parts in zip(*found, strict=True))
        number = number[reached >= best[query, -1]]  # again, by the last and highest bound
        number = torch.cat([number.unique(), torch.arange(n, len(self), device=number.device)])
        if len(number) * d > _GATHERED:
            return None
        if self._int8:  # its errors leave more documents than those of float32: once more in float32, on these few
            score = queries @ self.rows[number].T
            number = number[(score >= score.topk(k).values[:, -1:] - 2 * rounding).any(dim=0)]
        return number


def _unit_rows_float32(documents: Tensor) -> Tensor:
    """documents scaled to length 1 in float64, then rounded to float32; a few at a time."""
    rows = torch.empty(documents.shape, dtype=torch.float32, device=documents.device)
    block = max(1, _NUMBERS // documents.shape[1])
    for at in range(0, len(documents), block):
        rows[at : at + block] = _unit_rows("documents", documents[at : at + block], at)
    return rows


def _coarse_product() -> float:
    """How far a float32 product of vectors of length 1 is off by rounding its factors, where torch was told it may.

    That is off at first; ``torch.set_float32_matmul_precision`` turns it on, to TF32 (10 bits behind the point) with
    "high" and to bfloat16 (7 bits) with "medium". Two factors, each off by half of its last bit.
    """
    try:
        return {"highest": 0.0, "high": 2.0**-10, "medium": 2.0**-7}[torch.get_float32_matmul_precision()]
    except RuntimeError:  # set by other functions of torch, which this one cannot put into a word
        return 2.0**-7
