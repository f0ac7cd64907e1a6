"""The definition of `cache_update`: plain torch, in float32 or float64."""

from __future__ import annotations

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
) -> Tensor | None:
    """D_0' = fresh - base, D_{j+1}' = D_j' - D_j; hidden + gate * (fresh - base)."""
    wide = working_dtype(fresh)
    f = fresh.to(wide)
    if base is not None:
        f = f - base.to(wide)
    result = None if hidden is None else added(hidden, gate, f, out)
    for j in range(made + 1):
        old = plane(kept, lanes, j, scales, wide) if j < made else None
        put(kept, lanes, j, scales, f)
        if old is not None:
            f = plane(kept, lanes, j, scales, wide) - old
    return result


def added(hidden: Tensor, gate: Tensor | None, step: Tensor, out: Tensor | None) -> Tensor:
    """hidden + gate * step in the dtype of step, rounded to that of hidden."""
    x = hidden.to(step.dtype)
    y = x + (step if gate is None else by_token(gate, x) * step)
    return y.to(hidden.dtype) if out is None else out.copy_(y)


def plane(kept: Tensor, lanes: Tensor, j: int, scales: Tensor | None, wide: torch.dtype) -> Tensor:
    """Plane j of each row [R, N, W], in that dtype."""
    if kept.itemsize > 1:
        return kept[lanes, j].to(wide)
    values = kept.view(torch.uint8)[lanes, j].view(kept.dtype).to(wide)
    return values if scales is None else values * scales[lanes, j].to(wide)[..., None]


def put(kept: Tensor, lanes: Tensor, j: int, scales: Tensor | None, values: Tensor) -> None:
    """Plane j of each row becomes `values`, rounded to the store."""
    if kept.itemsize > 1:
        kept[lanes, j] = values.to(kept.dtype)
    elif scales is None:
        numbers = values.clamp(-MOST_FLOAT8, MOST_FLOAT8).to(kept.dtype)
        kept.view(torch.uint8)[lanes, j] = numbers.view(torch.uint8)
    else:
        quotient, step = quotients(values, None, None, MOST)
        kept[lanes, j], scales[lanes, j] = quotient.round().to(torch.int8), step.to(scales.dtype)
