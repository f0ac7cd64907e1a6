"""`quantize_tokens` on the CPU: csrc/ops/quantize_tokens.*, one pass over memory with AVX-512, AVX2 or plain C++."""

from __future__ import annotations

import torch
from torch import Tensor

from vivace import _C
from vivace.kernels.norm_modulate.cpu_impl import rows, why_not
from vivace.kernels.quantize_tokens.check import by_sample

__all__ = ["quantize_tokens", "why_not"]


def quantize_tokens(x: Tensor, *, smooth: Tensor | None = None, scale: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """s = max |x smooth| / 127 or the scale given; q = x smooth / s rounded half to even.

    Uses at most `torch.get_num_threads()` threads of the extension's own pool; the bits do not depend on them.
    """
    q, step = x.new_empty(x.shape, dtype=torch.int8), x.new_empty(x.shape[:-1], dtype=torch.float32)
    if x.numel():
        many = scale is not None and scale.numel() > 1
        source = x if x.dim() == 3 else x.reshape(len(x) if many else 1, -1, x.shape[-1])
        given = None if scale is None else by_sample(scale, source).contiguous()
        _C.quantize_tokens(
            q.data_ptr(),
            step.data_ptr(),
            rows(source),
            0 if smooth is None else smooth.data_ptr(),
            0 if given is None else given.data_ptr(),
            source.shape,
            torch.get_num_threads(),
        )
    return q, step
