"""The definition of `gelu`: plain torch, in float32 or float64."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional


def gelu(hidden: Tensor, *, gated: bool = False, approximate: str = "none", out: Tensor | None = None) -> Tensor:
    """x * (1 + erf(x / sqrt(2))) / 2; gated: hidden[..., :F] * gelu(hidden[..., F:])."""
    wide = hidden if hidden.dtype == torch.float64 else hidden.float()
    if gated:
        value, gate = wide.chunk(2, dim=-1)
        result = value * functional.gelu(gate, approximate=approximate)
    else:
        result = functional.gelu(wide, approximate=approximate)
    return result.to(hidden.dtype) if out is None else out.copy_(result)
