"""The definition of `fp8_quantize_tokens`: plain torch, in float32 or float64."""

from __future__ import annotations

import torch
from torch import Tensor

from vivace.kernels.quantize_tokens.reference import quotients

MOST = 448.0


def fp8_quantize_tokens(
    x: Tensor, *, smooth: Tensor | None = None, scale: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """s = max |x smooth| / 448 or the scale given; q = x smooth / s rounded to e4m3, half to even."""
    quotient, step = quotients(x, smooth, scale, MOST)
    return quotient.to(torch.float8_e4m3fn), step
