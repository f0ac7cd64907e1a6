"""`scatter_tokens` on a GPU: one program for up to 1024 elements of a row, product and sum rounded one by one."""
# Kernels are traced by triton, not typed.
# mypy: disable-error-code="no-untyped-def, untyped-decorator, assignment"

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from vivace.kernels.gather_tokens.triton_impl import token_of
from vivace.kernels.linear.triton_impl import why_not
from vivace.kernels.norm_modulate.triton_impl import place, read, row_block, rows, vector, warps, write
from vivace.kernels.philox_normal.triton_impl import on_device

__all__ = ["scatter_tokens", "why_not"]

BLOCK = 1024  # elements of a row a program handles at most


def scatter_tokens(
    full: Tensor,
    ids: Tensor,
    fresh: Tensor,
    *,
    second: Tensor | None = None,
    lanes: Tensor | None = None,
    hidden: Tensor | None = None,
    gate: Tensor | None = None,
) -> Tensor:
    """full[lanes[r], ids[r % n, m]] = fresh, fresh and second side by side, or hidden + gate * fresh, one pass."""
    batch, tokens, first = fresh.shape
    width = full.shape[2]
    block = min(BLOCK, row_block(width))
    with on_device(full.device):
        _scatter_tokens[batch * tokens, triton.cdiv(width, block)](
            *rows(full),
            *rows(fresh),
            *(vector(None) if second is None else rows(second)),
            *(vector(None) if hidden is None else rows(hidden)),
            *vector(gate),
            ids,
            lanes,
            ids.shape[0],
            tokens,
            first,
            width,
            BLOCK=block,
            num_warps=warps(block),
            enable_fp_fusion=False,
        )
    return full


@triton.jit
def _scatter_tokens(
    full,
    full_sample,  # strides of samples and of tokens, here and below
    full_token,
    fresh,
    fresh_sample,
    fresh_token,
    second,
    second_sample,
    second_token,
    hidden,
    hidden_sample,
    hidden_token,
    gate,
    gate_sample,
    gate_token,
    ids,
    lanes,
    pictures,
    tokens,
    first,  # width of fresh, of all
    width,
    BLOCK: tl.constexpr,
):
    b, m = place(tokens)
    n = token_of(ids, b, m, pictures, tokens)
    i = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    here = i < width
    value = read(fresh + b * fresh_sample + m * fresh_token, i, i < first)
    if second is not None:
        behind = read(second + b * second_sample + m * second_token, i - first, here & (i >= first))
        value = tl.where(i < first, value, behind)
    if hidden is not None:
        if gate is not None:
            value = read(gate + b * gate_sample + m * gate_token, i, here) * value
        value = read(hidden + b * hidden_sample + m * hidden_token, i, here) + value
    lane = b
    if lanes is not None:
        lane = tl.load(lanes + b)
    write(full + lane * full_sample + n * full_token, i, here, value)
