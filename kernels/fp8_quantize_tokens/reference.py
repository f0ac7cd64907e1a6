"""The definition of `fp8_quantize_tokens`: plain torch, in float32 or float64."""

from __future__ import annotations

import torch
from torch import Tensor

from vivace.kernels.norm_modulate.reference import working_dtype
from vivace.kernels.quantize_tokens.check import by_sample

MOST = 448.0


def fp8_quantize_tokens(
    x: Tensor, *, smooth: Tensor | None = None, scale: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """s = max |x smooth| / 448 or the scale given; q = x smooth / s rounded to e4m3, half to even."""
    wide = x.to(working_dtype(x))
    if smooth is not None:
        wide = wide * smooth.to(wide.dtype)
    step = wide.abs().amax(-1) / MOST
    step = torch.where(step == 0.0, 1.0, step)
    if scale is not None:
        given = by_sample(scale, x).to(step.dtype).reshape(step.shape[:1] + (1,) * (step.dim() - 1))
        step = torch.where(given > 0.0, given, step)
    finite = wide.isfinite().all(-1)
    q = (wide / step[..., None]).clamp(-MOST, MOST)
    return torch.where(finite[..., None], q, 0.0).to(torch.float8_e4m3fn), torch.where(finite, step, torch.nan)
