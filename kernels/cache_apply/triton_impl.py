"""`cache_apply` on a GPU: one program for up to 1024 elements of a row, products and sums rounded one by one."""
# Kernels are traced by triton, not typed.
# mypy: disable-error-code="no-untyped-def, untyped-decorator, assignment, attr-defined"

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from vivace.kernels.cache_update.triton_impl import BLOCK, as_bytes, kept_at, kept_row, kept_token, some, why_not
from vivace.kernels.norm_modulate.triton_impl import place, read, row_block, rows, vector, warps, write
from vivace.kernels.philox_normal.triton_impl import on_device

__all__ = ["cache_apply", "why_not"]


def cache_apply(
    kept: Tensor,
    lanes: Tensor,
    weights: Tensor,
    *,
    hidden: Tensor | None = None,
    gate: Tensor | None = None,
    out: Tensor | None = None,
    scales: Tensor | None = None,
    dtype: torch.dtype | None = None,
    ids: Tensor | None = None,
) -> Tensor:
    """v = sum_j weights[r, j] * plane j; hidden + gate * v, or v; one pass."""
    if out is None:
        count = kept.shape[2] if ids is None else ids.shape[1]
        out = kept.new_empty((lanes.shape[0], count, kept.shape[3]), dtype=dtype)
    batch, tokens, width = out.shape
    block = min(BLOCK, row_block(width))
    with on_device(kept.device):
        _cache_apply[batch * tokens, triton.cdiv(width, block)](
            as_bytes(kept),
            scales,
            lanes,
            weights.contiguous(),
            *(vector(None) if hidden is None else rows(hidden)),
            *vector(gate),
            *rows(out),
            ids,
            *some(ids, kept),
            tokens,
            width,
            kept.shape[1],
            TERMS=weights.shape[1],
            BLOCK=block,
            num_warps=warps(block),
            enable_fp_fusion=False,
        )
    return out


@triton.jit
def _cache_apply(
    kept,
    scales,
    lanes,
    weights,
    hidden,
    hidden_sample,  # strides of samples and of tokens, here and below
    hidden_token,
    gate,
    gate_sample,
    gate_token,
    out,
    out_sample,
    out_token,
    ids,
    samples,
    all_tokens,  # that are kept
    tokens,
    width,
    planes,
    TERMS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    b, n = place(tokens)
    i = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    here = i < width
    row = kept_row(lanes, b, kept_token(ids, samples, tokens, b, n), planes, all_tokens)
    value = tl.load(weights + b * TERMS) * kept_at(kept, scales, row, width, i, here)
    for j in tl.static_range(1, TERMS):
        value = value + tl.load(weights + b * TERMS + j) * kept_at(kept, scales, row + j * all_tokens, width, i, here)
    if hidden is not None:
        if gate is not None:
            value = read(gate + b * gate_sample + n * gate_token, i, here) * value
        value = read(hidden + b * hidden_sample + n * hidden_token, i, here) + value
    write(out + b * out_sample + n * out_token, i, here, value)
