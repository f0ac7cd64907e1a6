"""What our attention processors share: streams of tokens, their projections, and rotary tables made once."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from vivace.models.pipelines.fused.ops import Ops

Table = tuple[Tensor, Tensor]


class Tables:
    """Rotary tables in the form our op takes, made once of a table that the model hands to every block."""

    KEPT = 4

    def __init__(self) -> None:
        self.kept: tuple[tuple[Tensor, Table], ...] = ()

    def of(self, source: Tensor, make: Callable[[], Table]) -> Table:
        """The table that `make` gives for the tensor `source`."""
        for known, table in self.kept:
            if known is source:
                return table
        cos, sin = make()
        made = cos.float().contiguous(), sin.float().contiguous()
        self.kept = ((source, made), *self.kept)[: self.KEPT]
        return made


class Stream(NamedTuple):
    """Tokens, their projections to query, key and value, the norms of the first two, and the rotation (cos, sin)."""

    hidden: Tensor
    projections: tuple[Any, Any, Any]
    norms: tuple[Any, Any]
    table: Any = None


class Processor:
    """Base of the processors: `plain` is the one it stands for, which takes the calls that ours cannot."""

    def __init__(self, plain: Any, ops: Ops, tables: Tables) -> None:
        self.plain, self.ops, self.tables = plain, ops, tables

    def attend(self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None = None) -> Tensor:
        """Attention over [B, N, H, K] by the backend that the plain processor is set to; [B, N, H K]."""
        from diffusers.models.attention_dispatch import dispatch_attention_fn

        chosen = {"backend": self.plain._attention_backend, "parallel_config": self.plain._parallel_config}
        hidden = dispatch_attention_fn(query, key, value, attn_mask=mask, dropout_p=0.0, is_causal=False, **chosen)
        return hidden.flatten(2, 3).to(query.dtype)

    def project(self, width: int, *streams: Stream) -> tuple[Tensor, Tensor, Tensor]:
        """Query, key, value [B, N, H, K] of all streams in one sequence, normed and rotated in place of a copy."""
        parts = [[to(s.hidden).unflatten(-1, (-1, width)) for to in s.projections] for s in streams]
        if len(streams) == 1:
            query, key, value = parts[0]
            return *self.ops.heads(query, key, streams[0].norms, streams[0].table), value
        tokens = [stream.hidden.shape[1] for stream in streams]
        query, key = (like.new_empty((like.shape[0], sum(tokens), *like.shape[2:])) for like in parts[0][:2])
        places = zip(query.split(tokens, dim=1), key.split(tokens, dim=1), strict=True)
        for stream, part, out in zip(streams, parts, places, strict=True):
            self.ops.heads(part[0], part[1], stream.norms, stream.table, out=out)
        return query, key, torch.cat([part[2] for part in parts], dim=1)


def own_stream(attn: Any, hidden: Tensor, table: Any = None) -> Stream:
    """The stream by the attention's first projections."""
    return Stream(hidden, (attn.to_q, attn.to_k, attn.to_v), (attn.norm_q, attn.norm_k), table)


def added_stream(attn: Any, text: Tensor, table: Any = None) -> Stream:
    """The text stream by projections of its own."""
    projections = attn.add_q_proj, attn.add_k_proj, attn.add_v_proj
    return Stream(text, projections, (attn.norm_added_q, attn.norm_added_k), table)


def scaled_attention(heads: Sequence[Tensor], mask: Tensor | None = None, scale: float | None = None) -> Tensor:
    """Attention of torch over query, key, value [B, N, H, K]; [B, N, H K]."""
    query, key, value = (part.transpose(1, 2) for part in heads)
    hidden = scaled_dot_product_attention(query, key, value, attn_mask=mask, scale=scale)
    return hidden.transpose(1, 2).flatten(2)


def project_out(attn: Any, hidden: Tensor) -> Tensor:
    """The output projection and its dropout."""
    for part in attn.to_out:
        hidden = part(hidden)
    return hidden


def head_width(attn: Any) -> int:
    """Width of a head."""
    return int(attn.inner_dim // attn.heads)


def key_mask(attn: Any, mask: Tensor | None, tokens: Tensor) -> Tensor | None:
    """A mask of keys as the attention takes it, [B, H, 1, M]."""
    if mask is None:
        return None
    batch, length = tokens.shape[:2]
    mask = attn.prepare_attention_mask(mask, length, batch)
    return mask.view(batch, attn.heads, -1, mask.shape[-1])
