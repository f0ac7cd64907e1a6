"""The definition of `quantize_tokens`: plain torch, in float32 or float64."""

from __future__ import annotations

import torch
from torch import Tensor

from vivace.kernels.norm_modulate.reference import working_dtype

MOST = 127.0


def quantize_tokens(x: Tensor) -> tuple[Tensor, Tensor]:
    """scale = max |x| / 127, q = x / scale rounded half to even."""
    wide = x.to(working_dtype(x))
    scale = wide.abs().amax(-1) / MOST
    scale = torch.where(scale == 0.0, 1.0, scale)
    finite = wide.isfinite().all(-1)
    q = (wide / scale[..., None]).round().clamp(-MOST, MOST)
    return torch.where(finite[..., None], q, 0.0).to(torch.int8), torch.where(finite, scale, torch.nan)
