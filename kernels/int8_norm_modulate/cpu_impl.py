"""`int8_norm_modulate` on the CPU: csrc/ops/int8_norm_modulate.*, one pass over memory, AVX-512, AVX2 or plain C++."""

from __future__ import annotations

import torch
from torch import Tensor

from vivace import _C
from vivace.kernels.norm_modulate.cpu_impl import rows, vector, why_not
from vivace.kernels.quantize_tokens.check import by_sample

__all__ = ["int8_norm_modulate", "why_not"]


def int8_norm_modulate(
    hidden: Tensor,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
    *,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    kind: str = "layer",
    eps: float = 1e-6,
    smooth: Tensor | None = None,
    x_scale: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """quantize_tokens((norm(hidden) * weight + bias) * (1 + scale) + shift).

    Uses at most `torch.get_num_threads()` threads of the extension's own pool; the bits do not depend on them.
    """
    q = hidden.new_empty(hidden.shape, dtype=torch.int8)
    step = hidden.new_empty(hidden.shape[:-1], dtype=torch.float32)
    given = None if x_scale is None else by_sample(x_scale, hidden).contiguous()
    _C.int8_norm_modulate(
        q.data_ptr(),
        step.data_ptr(),
        rows(hidden),
        None if scale is None else vector(scale),
        None if shift is None else vector(shift),
        None if weight is None else vector(weight),
        None if bias is None else vector(bias),
        0 if smooth is None else smooth.data_ptr(),
        0 if given is None else given.data_ptr(),
        hidden.shape,
        kind == "layer",
        eps,
        torch.get_num_threads(),
    )
    return q, step
