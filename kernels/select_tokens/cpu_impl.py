"""`select_tokens` on the CPU: csrc/ops/select_tokens.*, metrics by vectors and orders by radix sort."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from vivace import _C
from vivace.kernels.norm_modulate import cpu_impl as over_rows
from vivace.kernels.select_tokens import lowest
from vivace.kernels.select_tokens.check import grid_of

__all__ = ["select_tokens", "why_not"]

CODES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}


def why_not(device: str, dtype: str) -> str | None:
    """Why this cannot run on planes of `dtype` on `device`; None when it can."""
    return over_rows.why_not(device, "float32" if dtype == "float16" else dtype)


def select_tokens(
    planes: Sequence[Tensor],
    weights: Tensor | None,
    ages: Tensor,
    keep: int,
    *,
    patch: Sequence[int] = (),
    metric: str = "deviation",
    scores: Tensor | None = None,
    drop_high: float = 1.0,
    factors: Tensor | None = None,
    bound: int = -1,
    least: int | None = None,
) -> Tensor:
    """ids of the F oldest tokens and of the keep - F others smallest by (distance of rank * factors[age], p).

    A picture is one task of at most `torch.get_num_threads()` threads of the extension's own pool.
    """
    batch, tokens = ages.shape
    ids = ages.new_empty(batch, keep)
    pieces = [in_pieces(plane) for plane in planes]
    _C.select_tokens(
        [(plane.data_ptr(), plane.stride(0)) for plane in pieces],
        CODES[planes[0].dtype] if planes else 0,
        0 if weights is None else weights.data_ptr(),
        planes[0].shape[1] if planes else 0,
        grid_of(planes[0].shape[2:], patch) if planes else (),
        tuple(patch) if planes else (),
        metric == "deviation",
        0 if scores is None else scores.data_ptr(),
        ages.data_ptr(),
        ids.data_ptr(),
        (batch, tokens, keep),
        lowest(tokens, keep, drop_high),
        0 if factors is None else factors.data_ptr(),
        0 if factors is None else len(factors),
        bound,
        keep if least is None else least,
        torch.get_num_threads(),
    )
    return ids


def in_pieces(plane: Tensor) -> Tensor:
    """The same with every sample in one piece; samples may lie anywhere."""
    return plane if not len(plane) or plane[0].is_contiguous() else plane.contiguous()
