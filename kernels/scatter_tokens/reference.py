"""The definition of `scatter_tokens`: plain torch, in float32 or float64."""

from __future__ import annotations

import torch
from torch import Tensor

from vivace.kernels.gather_tokens.reference import of_rows
from vivace.kernels.norm_modulate.reference import by_token, working_dtype


def scatter_tokens(
    full: Tensor,
    ids: Tensor,
    fresh: Tensor,
    *,
    second: Tensor | None = None,
    lanes: Tensor | None = None,
    hidden: Tensor | None = None,
    gate: Tensor | None = None,
) -> Tensor:
    """full[lanes[r], ids[r % n, m]] = fresh, fresh and second side by side, or hidden + gate * fresh."""
    rows = torch.arange(len(fresh), device=full.device) if lanes is None else lanes
    values = fresh if second is None else torch.cat((fresh, second), 2)
    if hidden is not None:
        x, step = hidden.to(working_dtype(hidden)), fresh.to(working_dtype(hidden))
        values = x + (step if gate is None else by_token(gate, x) * step)
    full[rows[:, None], of_rows(ids, len(fresh))] = values.to(full.dtype)
    return full
