"""Keys and values of the native DiT's attentions, kept for rows that compute some of the image tokens.

A full row puts K, V of all tokens into the planes of site "kv", row t = [K_t | V_t]. A token row writes those of its
active tokens over them and attends to all that lies there, so the queries of M tokens see N keys, of which N - M are as
old as their tokens.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from vivace.engine.kept import Turn
from vivace.engine.tokens import Focus
from vivace.models.caching.planes import Place, keep, kept_whole


def attended(
    turn: Turn, branches: Sequence[str], focus: Focus | None, key: Tensor, value: Tensor
) -> tuple[Tensor, Tensor]:
    """What the queries of a row attend to, after its own keys and values were kept.

    Args:
        turn: of site "kv"; key, value: [R, H, N, K], rows by branch; of a token row [R, H, M, K], of active tokens.
    Returns: key and value themselves, of a token row [R, H, N, K] in their dtype as they are kept.
    """
    check_row(turn, focus)
    rows, heads, _, width = key.shape
    own = torch.cat([each.transpose(1, 2).flatten(2) for each in (key, value)], dim=2)
    keep(turn, branches, own, focus=focus)
    if focus is None:
        return key, value
    kept = kept_whole(turn, branches, own, focus).view(rows, focus.tokens, 2, heads, width).transpose(1, 3)
    return kept[:, :, 0].contiguous(), kept[:, :, 1].contiguous()


def listen(turn: Turn, branches: Sequence[str], query: Tensor, key: Tensor) -> None:
    """Keep what attention every token receives in a row with all tokens: r_t = mean_h sum_q softmax_t(q k_t / sqrt K).

    Args:
        turn: of site "received"; query, key: [R, H, N, K], rows by branch. Each row by itself, in float32: [H, N, N].
    """
    tokens = key.shape[2]
    found = []
    for one, other in zip(query.float(), key.float(), strict=True):
        weights = torch.softmax(one @ other.transpose(1, 2) / one.shape[2] ** 0.5, dim=2)
        found.append(weights.sum(dim=1).mean(dim=0))
    places = [place for branch in branches for place in _lanes(turn, branch, tokens, found[0])]
    slab = turn.places(branches[0], (tokens,), like=found[0])[0]
    for lane, received in zip(places, found, strict=True):
        slab.values[lane, 0].copy_(received)


def _lanes(turn: Turn, branch: str, tokens: int, like: Tensor) -> tuple[int, ...]:
    return turn.places(branch, (tokens,), like=like)[1]


def check_row(turn: Turn | Place, focus: Focus | None) -> None:
    """Raise RuntimeError, our bug, unless a token row reads keys and values and another one does not."""
    if turn.use.reads == (focus is None):
        row = "a row with all tokens" if focus is None else "a token row"
        raise RuntimeError(f"keys and values of block {turn.use.blocks[0]}: {turn.use.action.name} in {row}")
