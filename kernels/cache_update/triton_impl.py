"""`cache_update` on a GPU: one program for up to 1024 elements of a row, for a whole row of int8.

Differences, products and sums are rounded one by one. e4m3 is read and written by integers, so any GPU does it.
"""
# Kernels are traced by triton, not typed.
# mypy: disable-error-code="no-untyped-def, untyped-decorator, assignment, attr-defined"

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from vivace.kernels.cache_update.check import KEPT_AS
from vivace.kernels.linear import triton_impl as product
from vivace.kernels.norm_modulate.triton_impl import place, read, row_block, rows, vector, warps, write
from vivace.kernels.philox_normal.triton_impl import on_device
from vivace.kernels.quantize_tokens.triton_impl import _rounded, quotients

BLOCK = 1024  # elements of a row a program handles at most, where no maximum of the row is needed


def why_not(device: str, dtype: str) -> str | None:
    """Why this cannot run on rows and a store of these dtypes on `device`; None when it can."""
    return product.why_not(device, dtype.partition(KEPT_AS)[0])


def cache_update(
    kept: Tensor,
    lanes: Tensor,
    fresh: Tensor,
    *,
    base: Tensor | None = None,
    made: int = 0,
    hidden: Tensor | None = None,
    gate: Tensor | None = None,
    out: Tensor | None = None,
    scales: Tensor | None = None,
    ids: Tensor | None = None,
) -> Tensor | None:
    """D_0' = fresh - base, D_{j+1}' = D_j' - D_j; hidden + gate * (fresh - base); one pass."""
    if hidden is not None and out is None:
        out = hidden.new_empty(hidden.shape)
    batch, tokens, width = fresh.shape
    block = row_block(width) if kept.dtype == torch.int8 else min(BLOCK, row_block(width))
    with on_device(fresh.device):
        _cache_update[batch * tokens, triton.cdiv(width, block)](
            as_bytes(kept),
            scales,
            lanes,
            *rows(fresh),
            *(vector(None) if base is None else rows(base)),
            *(vector(None) if hidden is None else rows(hidden)),
            *vector(gate),
            *(vector(None) if out is None else rows(out)),
            ids,
            *some(ids, kept),
            tokens,
            width,
            kept.shape[1],
            MADE=made,
            BLOCK=block,
            num_warps=warps(block),
            enable_fp_fusion=False,
        )
    return out


def some(ids: Tensor | None, kept: Tensor) -> tuple[int, int]:
    """How many samples ids has, and of how many kept tokens it speaks."""
    return 1 if ids is None else ids.shape[0], kept.shape[2]


def as_bytes(kept: Tensor) -> Tensor:
    """e4m3 as bytes, others as they are."""
    return kept.view(torch.uint8) if kept.dtype == torch.float8_e4m3fn else kept


@triton.jit
def _cache_update(
    kept,
    scales,
    lanes,
    fresh,
    fresh_sample,  # strides of samples and of tokens, here and below
    fresh_token,
    base,
    base_sample,
    base_token,
    hidden,
    hidden_sample,
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
    MADE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    b, n = place(tokens)
    i = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    here = i < width
    value = read(fresh + b * fresh_sample + n * fresh_token, i, here)
    if base is not None:
        value = value - read(base + b * base_sample + n * base_token, i, here)
    if hidden is not None:
        step = value
        if gate is not None:
            step = read(gate + b * gate_sample + n * gate_token, i, here) * step
        y = read(hidden + b * hidden_sample + n * hidden_token, i, here) + step
        write(out + b * out_sample + n * out_token, i, here, y)
    row = kept_row(lanes, b, kept_token(ids, samples, tokens, b, n), planes, all_tokens)
    for _ in tl.static_range(MADE):
        old = kept_at(kept, scales, row, width, i, here)
        keep(kept, scales, row, width, i, here, value)
        value = value - old
        row += all_tokens
    keep(kept, scales, row, width, i, here, value)


@triton.jit
def kept_token(ids, samples, tokens, b, n):
    """Which kept token is token n of row b of a call."""
    if ids is not None:
        n = tl.load(ids + (b % samples) * tokens + n)
    return n


@triton.jit
def kept_row(lanes, b, n, planes, tokens):
    """Which row of memory holds token n of plane 0 of sample b; those of later planes follow `tokens` apart."""
    return tl.load(lanes + b) * (planes * tokens) + n


@triton.jit
def kept_at(kept, scales, row, width, i, here):
    """Elements of a row of a plane."""
    if kept.dtype.element_ty == tl.uint8:
        value = _of_float8(tl.load(kept + row * width + i, mask=here, other=0).to(tl.int32))
    else:
        value = read(kept + row * width, i, here)
        if scales is not None:
            value = value * tl.load(scales + row)
    return value


@triton.jit
def keep(kept, scales, row, width, i, here, value):
    """Elements become those of a row of a plane."""
    at = kept + row * width + i
    if scales is not None:
        quotient, step, finite = quotients(value, None, None, 0, i, here, 127.0)
        step = tl.where(finite, step, float("nan"))
        tl.store(at, _rounded(quotient).to(tl.int8), mask=here)
        tl.store(scales + row, step)
    elif kept.dtype.element_ty == tl.uint8:
        tl.store(at, _to_float8(value).to(tl.uint8), mask=here)
    else:
        tl.store(at, value.to(kept.dtype.element_ty), mask=here)


@triton.jit
def _of_float8(code):
    """The number of a code of e4m3. An exponent of 0 is one of 1 without the leading one, which is taken off again."""
    body = code & 0x7F
    tiny = body < 8
    whole = (tl.where(tiny, body + 8, body) << 20) + (120 << 23)
    size = whole.to(tl.float32, bitcast=True) - tl.where(tiny, 0.015625, 0.0)
    size = tl.where(body == 0x7F, float("nan"), size)
    return (size.to(tl.int32, bitcast=True) | ((code & 0x80) << 24)).to(tl.float32, bitcast=True)


@triton.jit
def _to_float8(x):
    """The code of the nearest number of e4m3, half to even, cut off at 448: of |x| plus 2^20 times its power of two,
    that of 2^-6 at least, only the places remain that are kept.
    """
    bits = x.to(tl.int32, bitcast=True)
    body = bits & 0x7FFFFFFF
    size = tl.minimum(body, 0x43E00000)  # 448
    power = tl.maximum(size & 0x7F800000, 0x3C800000)  # 2^-6
    large = power + (20 << 23)
    sum = size.to(tl.float32, bitcast=True) + large.to(tl.float32, bitcast=True)
    code = sum.to(tl.int32, bitcast=True) - large + ((power - 0x3C800000) >> 20)
    return tl.where(body > 0x7F800000, 0x7F, code) | ((bits >> 24) & 0x80)
