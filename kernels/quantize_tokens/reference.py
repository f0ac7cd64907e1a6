"""The definition of `quantize_tokens`: plain torch, in float32 or float64."""

from __future__ import annotations

import torch
from torch import Tensor

from vivace.kernels.norm_modulate.reference import working_dtype
from vivace.kernels.quantize_tokens.check import by_sample

MOST = 127.0


def quantize_tokens(x: Tensor, *, smooth: Tensor | None = None, scale: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """s = max |x smooth| / 127 or the scale given; q = x smooth / s rounded half to even."""
    quotient, step = quotients(x, smooth, scale, MOST)
    return quotient.round().to(torch.int8), step


def quotients(x: Tensor, smooth: Tensor | None, scale: Tensor | None, most: float) -> tuple[Tensor, Tensor]:
    """x smooth / s within [-most, most], 0 in rows that are not finite, and s: max |x smooth| / most, or as given."""
    wide = x.to(working_dtype(x))
    if smooth is not None:
        wide = wide * smooth.to(wide.dtype)
    step = wide.abs().amax(-1) / most
    step = torch.where(step == 0.0, 1.0, step)
    if scale is not None:
        given = by_sample(scale, x).to(step.dtype).reshape(step.shape[:1] + (1,) * (step.dim() - 1))
        step = torch.where(given > 0.0, given, step)
    finite = wide.isfinite().all(-1)
    quotient = (wide / step[..., None]).clamp(-most, most)
    return torch.where(finite[..., None], quotient, 0.0), torch.where(finite, step, torch.nan)
