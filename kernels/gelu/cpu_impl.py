"""`gelu` on the CPU: csrc/ops/gelu.*, one pass over memory with AVX-512, AVX2 or plain C++."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from vivace import _C
from vivace.kernels.norm_modulate.cpu_impl import rows, why_not

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["gelu", "why_not"]


def gelu(hidden: Tensor, *, gated: bool = False, approximate: str = "none", out: Tensor | None = None) -> Tensor:
    """x * (1 + erf(x / sqrt(2))) / 2; gated: hidden[..., :F] * gelu(hidden[..., F:]).

    Uses at most `torch.get_num_threads()` threads of the extension's own pool; the bits do not depend on them.
    """
    width = hidden.shape[-1] // 2 if gated else hidden.shape[-1]
    if out is None:
        out = hidden.new_empty((*hidden.shape[:-1], width)) if gated else torch.empty_like(hidden)
    source, target = by_rows(hidden), by_rows(out)
    address, code, samples, tokens = rows(source)
    _C.gelu(
        rows(target),
        (address, code, samples, tokens),
        (address + width * source.element_size(), code, samples, tokens) if gated else None,
        (source.shape[0], source.shape[1], width),
        approximate == "tanh",
        torch.get_num_threads(),
    )
    if target.data_ptr() != out.data_ptr():
        out.copy_(target.view(out.shape))
    return out


def by_rows(tensor: Tensor) -> Tensor:
    """[B, N, F] of any rank; copied where such a view does not exist."""
    if tensor.dim() == 3:
        return tensor
    return tensor.reshape(tensor.shape[0] if tensor.dim() > 1 else 1, -1, tensor.shape[-1])
