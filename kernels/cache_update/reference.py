"""The definition of `cache_update`: plain torch, in float32 or float64."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from vivace.kernels.norm_modulate.reference import by_token, working_dtype
from vivace.kernels.quantize_tokens.reference import MOST, quotients

MOST_FLOAT8 = 448.0


def cache_update(
    kept: Tensor,
    lanes: Tensor,
    fresh: Tensor,
    *,
    base: Tensor | None = None,
    made: int = 0,
    hidden: Tensor | None = None,
    gate: Tensor | None = None,
    out: Tensor | None = None,
    scales: Tensor | None = None,
    ids: Tensor | None = None,
) -> Tensor | None:
    """D_0' = fresh - base, D_{j+1}' = D_j' - D_j; hidden + gate * (fresh - base)."""
    wide = working_dtype(fresh)
    f = fresh.to(wide)
    if base is not None:
        f = f - base.to(wide)
    result = None if hidden is None else added(hidden, gate, f, out)
    for j in range(made + 1):
        old = plane(kept, lanes, j, scales, wide, ids) if j < made else None
        put(kept, lanes, j, scales, f, ids)
        if old is not None:
            f = f - old
    return result


def added(hidden: Tensor, gate: Tensor | None, step: Tensor, out: Tensor | None) -> Tensor:
    """hidden + gate * step in the dtype of step, rounded to that of hidden."""
    x = hidden.to(step.dtype)
    y = x + (step if gate is None else by_token(gate, x) * step)
    return y.to(hidden.dtype) if out is None else out.copy_(y)


def plane(
    kept: Tensor, lanes: Tensor, j: int, scales: Tensor | None, wide: torch.dtype, ids: Tensor | None = None
) -> Tensor:
    """Plane j of each row [R, N, W], in that dtype; with ids of those tokens alone, [R, M, W]."""
    at = _at(lanes, j, ids)
    if kept.itemsize > 1:
        return kept[at].to(wide)
    values = kept.view(torch.uint8)[at].view(kept.dtype).to(wide)
    return values if scales is None else values * scales[at].to(wide)[..., None]


def put(kept: Tensor, lanes: Tensor, j: int, scales: Tensor | None, values: Tensor, ids: Tensor | None = None) -> None:
    """Plane j of each row becomes `values`, rounded to the store; with ids of those tokens alone."""
    at = _at(lanes, j, ids)
    if kept.itemsize > 1:
        kept[at] = values.to(kept.dtype)
    elif scales is None:
        numbers = values.clamp(-MOST_FLOAT8, MOST_FLOAT8).to(kept.dtype)
        kept.view(torch.uint8)[at] = numbers.view(torch.uint8)
    else:
        quotient, step = quotients(values, None, None, MOST)
        kept[at], scales[at] = quotient.round().to(torch.int8), step.to(scales.dtype)


def _at(lanes: Tensor, j: int, ids: Tensor | None) -> tuple[Any, ...]:
    """The index of plane j of each row; row r has the ids of sample r mod n."""
    return (lanes, j) if ids is None else (lanes[:, None], j, ids.repeat(len(lanes) // len(ids), 1).long())
