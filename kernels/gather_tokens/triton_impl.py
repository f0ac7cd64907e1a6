"""`gather_tokens` on a GPU: one program for up to 1024 elements of a row, for a whole row that is normalised."""
# Kernels are traced by triton, not typed.
# mypy: disable-error-code="no-untyped-def, untyped-decorator, assignment"

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from vivace.kernels.linear.triton_impl import why_not
from vivace.kernels.norm_modulate.triton_impl import (
    modulated,
    normalised,
    place,
    row_block,
    rows,
    vector,
    warps,
    write,
)
from vivace.kernels.philox_normal.triton_impl import on_device

__all__ = ["gather_tokens", "why_not"]

BLOCK = 1024  # elements of a row a program handles at most, where the row is not normalised


def gather_tokens(
    x: Tensor,
    ids: Tensor,
    *,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    kind: str | None = None,
    eps: float = 1e-6,
    out: Tensor | None = None,
    normed: Tensor | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """x[r, ids[r % n, m]], and that normalised and modulated, one pass."""
    pictures, tokens = ids.shape
    batch, _, width = x.shape
    out = x.new_empty(batch, tokens, width) if out is None else out
    if kind is not None and normed is None:
        normed = x.new_empty(batch, tokens, width)
    block = row_block(width) if kind is not None else min(BLOCK, row_block(width))
    with on_device(x.device):
        _gather_tokens[batch * tokens, triton.cdiv(width, block)](
            *rows(out),
            *rows(x),
            *(vector(None) if normed is None else rows(normed)),
            ids,
            *vector(scale),
            *vector(shift),
            weight,
            bias,
            pictures,
            tokens,
            width,
            eps,
            CENTRED=kind == "layer",
            BLOCK=block,
            num_warps=warps(block),
            enable_fp_fusion=False,
        )
    return out if normed is None else (out, normed)


@triton.jit
def _gather_tokens(
    out,
    out_sample,  # strides of samples and of tokens, here and below
    out_token,
    x,
    x_sample,
    x_token,
    normed,
    normed_sample,
    normed_token,
    ids,
    scale,
    scale_sample,
    scale_token,
    shift,
    shift_sample,
    shift_token,
    weight,
    bias,
    pictures,
    tokens,
    width,
    eps,
    CENTRED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    b, m = place(tokens)
    n = token_of(ids, b, m, pictures, tokens)
    i = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    here = i < width
    row = tl.load(x + b * x_sample + n * x_token + i, mask=here, other=0.0)
    tl.store(out + b * out_sample + m * out_token + i, row, mask=here)
    if normed is not None:
        y = normalised(row.to(tl.float32), here, width, eps, CENTRED, BLOCK)
        scale_at, shift_at = b * scale_sample + m * scale_token, b * shift_sample + m * shift_token
        y = modulated(y, weight, bias, scale, scale_at, shift, shift_at, i, here)
        write(normed + b * normed_sample + m * normed_token, i, here, y)


@triton.jit
def token_of(ids, b, m, pictures, tokens):
    """Which token of all the m-th of row b is."""
    return tl.load(ids + b % pictures * tokens + m).to(tl.int64)
