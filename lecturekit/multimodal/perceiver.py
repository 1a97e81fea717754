"""The Perceiver Resampler: from any number of visual features to a few fixed visual tokens.

Slide "Perceiver Resampler"; Alayrac et al. 2022 (Flamingo), section 3.1 and figure 5. R learned latents ask, the
visual features and the latents themselves answer, so the language model reads R tokens whatever the picture's size
and however many frames it has.

The paper's code leaves the inside of ``attention`` and ``ffw`` open. We fill it in as the two public versions do,
flamingo-pytorch and OpenFlamingo: a LayerNorm before each, no biases in the linear layers, exact GELU, and one last
LayerNorm. Given the same weights (see ``from_peer``) the outputs are equal up to rounding. What differs:

- OpenFlamingo adds its ``frame_embs`` and flattens the frames of one clip, as the slide and this module do. It also
  has one more axis, several clips in a row, with an optional embedding of their own. Left out here: fold that axis
  into the batch.
- flamingo-pytorch never flattens time: each time step is one image with R latents of its own. It equals this module
  called with one time step, after adding the embedding of that step.
- Both subtract the row maximum before the softmax. torch.softmax already does so.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from lecturekit.arguments import require_positive_int


class ResamplerAttention(nn.Module):
    """Attention from latents to features and latents: q from the latents, k and v from concat([features, latents]).

    dim: width of both, heads × dim_head: width inside. Eq. 1 of Vaswani et al. 2017, with q, k, v as on the slide.
    """

    def __init__(self, dim: int, heads: int = 8, dim_head: int = 64) -> None:
        super().__init__()
        self.heads = require_positive_int("heads", heads)
        self.dim_head = require_positive_int("dim_head", dim_head)
        inner = heads * dim_head
        self.norm_media = nn.LayerNorm(dim)
        self.norm_latents = nn.LayerNorm(dim)
        self.to_q = nn.Linear(dim, inner, bias=False)
        self.to_kv = nn.Linear(dim, 2 * inner, bias=False)
        self.to_out = nn.Linear(inner, dim, bias=False)

    def _split_heads(self, x: Tensor) -> Tensor:
        """(batch, n, heads · dim_head) → (batch, heads, n, dim_head)."""
        return x.unflatten(-1, (self.heads, self.dim_head)).transpose(1, 2)

    def attend(self, features: Tensor, latents: Tensor) -> tuple[Tensor, Tensor]:
        """As forward, and also return the attention map (batch, heads, R, N + R). Each of its rows sums to 1."""
        features = self.norm_media(features)
        latents = self.norm_latents(latents)
        context = torch.cat([features, latents], dim=1)  # (batch, N + R, dim)
        keys, values = self.to_kv(context).chunk(2, dim=-1)
        q = self._split_heads(self.to_q(latents)) * self.dim_head**-0.5
        k, v = self._split_heads(keys), self._split_heads(values)
        attention_map = (q @ k.transpose(-1, -2)).softmax(dim=-1)  # (batch, heads, R, N + R)
        mixed = (attention_map @ v).transpose(1, 2).flatten(2)  # (batch, R, heads · dim_head)
        return self.to_out(mixed), attention_map

    def forward(self, features: Tensor, latents: Tensor) -> Tensor:
        """features: (batch, N, dim)   latents: (batch, R, dim)   →   (batch, R, dim)."""
        return self.attend(features, latents)[0]


def feed_forward(dim: int, mult: int) -> nn.Sequential:
    """The slide's ``ffw``: LayerNorm, widen ``mult`` times, GELU, narrow again. (…, dim) → (…, dim)."""
    return nn.Sequential(
        nn.LayerNorm(dim),
        nn.Linear(dim, mult * dim, bias=False),
        nn.GELU(),
        nn.Linear(mult * dim, dim, bias=False),
    )


class PerceiverResampler(nn.Module):
    """Turn visual features x_f into ``num_latents`` visual tokens. Slide "Perceiver Resampler".

    dim: width of a feature and of a token.   depth: number of layers.   num_latents: R, the tokens that come out.
    heads, dim_head: attention heads and the width of each.   ff_mult: how much the feed-forward part widens.
    max_time: the most frames that have a time embedding (Flamingo trains with 8). None: no time embeddings, and any
    number of frames, whose order then makes no difference.

    Raises TypeError or ValueError when an argument is not a positive integer.
    """

    def __init__(
        self,
        dim: int,
        depth: int,
        num_latents: int,
        heads: int = 8,
        dim_head: int = 64,
        max_time: int | None = 8,
        ff_mult: int = 4,
    ) -> None:
        super().__init__()
        self.dim = require_positive_int("dim", dim)
        require_positive_int("depth", depth)
        require_positive_int("num_latents", num_latents)
        require_positive_int("ff_mult", ff_mult)
        self.latents = nn.Parameter(torch.randn(num_latents, dim))
        self.time_embeddings: nn.Parameter | None = None
        if max_time is not None:
            require_positive_int("max_time", max_time)
            self.time_embeddings = nn.Parameter(torch.randn(max_time, 1, dim))
        self.layers = nn.ModuleList(
            nn.ModuleList([ResamplerAttention(dim, heads, dim_head), feed_forward(dim, ff_mult)]) for _ in range(depth)
        )
        self.norm = nn.LayerNorm(dim)

    def attend(self, x_f: Tensor) -> tuple[Tensor, Tensor]:
        """As forward, and also return the maps (depth, batch, heads, R, T·S + R), without batch if x_f has none.

        A map's columns are the T·S features, frame by frame, then the R latents.
        """
        self._check(x_f)
        batched = x_f.dim() == 4
        if not batched:
            x_f = x_f.unsqueeze(0)  # (1, T, S, dim)
        if self.time_embeddings is not None:
            x_f = x_f + self.time_embeddings[: x_f.shape[1]]  # (T, 1, dim) reaches every place of its frame
        x_f = x_f.flatten(1, 2)  # (batch, T · S, dim)
        x = self.latents.expand(x_f.shape[0], -1, -1)  # (batch, R, dim)
        maps = []
        attention: ResamplerAttention
        ffw: nn.Sequential
        for attention, ffw in self.layers:  # type: ignore[misc]  # torch knows its items as Module only
            attended, attention_map = attention.attend(x_f, x)
            x = x + attended
            x = x + ffw(x)
            maps.append(attention_map)
        tokens, stacked = self.norm(x), torch.stack(maps)
        return (tokens, stacked) if batched else (tokens[0], stacked[:, 0])

    def forward(self, x_f: Tensor) -> Tensor:
        """x_f: (batch, time, space, dim) → (batch, R, dim), or (time, space, dim) → (R, dim).

        Raises ValueError when x_f has another shape, no frames, no places, or more frames than time embeddings, and
        TypeError when it is no tensor or of another dtype than the weights (outside autocast).
        """
        return self.attend(x_f)[0]

    def _check(self, x_f: Tensor) -> None:
        if not isinstance(x_f, Tensor):
            raise TypeError(f"x_f must be a tensor, got {type(x_f).__name__}")
        shape = tuple(x_f.shape)
        if x_f.dim() not in (3, 4) or shape[-1] != self.dim:
            raise ValueError(f"x_f must be (batch, time, space, {self.dim}) or (time, space, {self.dim}), got {shape}")
        if 0 in shape:
            raise ValueError(f"x_f must hold at least one feature, got shape {shape}")
        if self.time_embeddings is not None and shape[-3] > len(self.time_embeddings):
            raise ValueError(f"x_f has {shape[-3]} frames, but max_time is {len(self.time_embeddings)}")
        if x_f.dtype != self.latents.dtype and not torch.is_autocast_enabled(x_f.device.type):
            raise TypeError(f"x_f must be {self.latents.dtype} as the weights are, got {x_f.dtype}")


def from_peer(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Rename the weights of an OpenFlamingo or flamingo-pytorch resampler for ``PerceiverResampler.load_state_dict``.

    Theirs call the time embeddings ``frame_embs`` (max_time, dim) and ``media_pos_emb`` (max_time, 1, dim); all other
    names and shapes are the same. Without either, load into a resampler made with max_time=None.

    Raises ValueError when there are ``media_time_embs``, OpenFlamingo's embeddings for several clips (see above).
    """
    if "media_time_embs" in state:
        raise ValueError("state must not hold media_time_embs: embeddings for several clips in a row are left out here")
    renamed = dict(state)
    if "frame_embs" in renamed:
        renamed["time_embeddings"] = renamed.pop("frame_embs").unsqueeze(1)
    if "media_pos_emb" in renamed:
        renamed["time_embeddings"] = renamed.pop("media_pos_emb")
    return renamed
