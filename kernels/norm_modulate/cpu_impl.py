"""`norm_modulate` on the CPU: csrc/ops/norm_modulate.*, one pass over memory with AVX-512, AVX2 or plain C++."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from vivace import _C
from vivace.kernels.norm_modulate.check import vector_strides
from vivace.kernels.philox_normal.cpu_impl import chosen_isa

if TYPE_CHECKING:
    from torch import Tensor

CODES = {torch.float32: 0, torch.bfloat16: 1}
Rows = tuple[int, int, int, int]  # address, dtype, stride of samples, stride of tokens


def why_not(device: str, dtype: str) -> str | None:
    """Why this cannot run on hidden states of `dtype` on `device`; None when it can."""
    chosen_isa()
    if device != "cpu":
        return f"it runs CPU tensors, these are on {device}"
    return None if dtype in ("float32", "bfloat16") else f"{dtype} runs on the reference"


def norm_modulate(
    hidden: Tensor,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
    *,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    kind: str = "layer",
    eps: float = 1e-6,
    out: Tensor | None = None,
) -> Tensor:
    """(norm(hidden) * weight + bias) * (1 + scale) + shift.

    Uses at most `torch.get_num_threads()` threads of the extension's own pool; the bits do not depend on them.
    """
    if out is None:
        out = torch.empty_like(hidden)
    _C.norm_modulate(
        rows(out),
        rows(hidden),
        None if scale is None else vector(scale),
        None if shift is None else vector(shift),
        None if weight is None else vector(weight),
        None if bias is None else vector(bias),
        hidden.shape,
        kind == "layer",
        eps,
        torch.get_num_threads(),
    )
    return out


def rows(tensor: Tensor) -> Rows:
    """[B, N, D] as C++ takes it."""
    samples, tokens, _ = tensor.stride()
    return tensor.data_ptr(), CODES[tensor.dtype], samples, tokens


def vector(tensor: Tensor) -> Rows:
    """[D], [B, D] or [B, N, D] as C++ takes it."""
    return tensor.data_ptr(), CODES[tensor.dtype], *vector_strides(tensor)
