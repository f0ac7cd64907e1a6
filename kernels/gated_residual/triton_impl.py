"""`gated_residual` on a GPU: one program for up to 1024 elements of a row, product and sum rounded one by one."""
# Kernels are traced by triton, not typed.
# mypy: disable-error-code="no-untyped-def, untyped-decorator, assignment"

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from vivace.kernels.norm_modulate.triton_impl import place, read, row_block, rows, vector, warps, why_not, write
from vivace.kernels.philox_normal.triton_impl import on_device

__all__ = ["gated_residual", "why_not"]

BLOCK = 1024  # elements of a row a program handles at most


def gated_residual(hidden: Tensor, update: Tensor, gate: Tensor | None = None, *, out: Tensor | None = None) -> Tensor:
    """hidden + gate * update, one pass."""
    out = hidden.new_empty(hidden.shape) if out is None else out
    batch, tokens, width = hidden.shape
    block = min(BLOCK, row_block(width))
    with on_device(hidden.device):
        _gated_residual[batch * tokens, triton.cdiv(width, block)](
            *rows(out),
            *rows(hidden),
            *rows(update),
            *vector(gate),
            tokens,
            width,
            BLOCK=block,
            num_warps=warps(block),
            enable_fp_fusion=False,
        )
    return out


@triton.jit
def _gated_residual(
    out,
    out_sample,  # strides of samples and of tokens, here and below
    out_token,
    hidden,
    hidden_sample,
    hidden_token,
    update,
    update_sample,
    update_token,
    gate,
    gate_sample,
    gate_token,
    tokens,
    width,
    BLOCK: tl.constexpr,
):
    b, n = place(tokens)
    i = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    here = i < width
    step = read(update + b * update_sample + n * update_token, i, here)
    if gate is not None:
        step = read(gate + b * gate_sample + n * gate_token, i, here) * step
    y = read(hidden + b * hidden_sample + n * hidden_token, i, here) + step
    write(out + b * out_sample + n * out_token, i, here, y)
