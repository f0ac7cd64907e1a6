"""`attention` on a GPU: queries in registers, keys and values read where they lie, scores never stored.

Heads that are no power of two wide are taken in two parts, so that 72 costs 80, not 128. float32 is multiplied as such
(no TF32). Blocks follow from dtype and width alone, so a row has the same bits in every batch.
"""
# Kernels are traced by triton, not typed.
# mypy: disable-error-code="no-untyped-def, untyped-decorator, assignment, attr-defined"

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from vivace.kernels.int8_attention.triton_impl import _part, _to_bfloat16, _weighted, _write, common_unit, in_units
from vivace.kernels.linear.triton_impl import shared_bytes, why_not
from vivace.kernels.philox_normal.triton_impl import on_device
from vivace.kernels.spec import interpreted

__all__ = ["attention", "why_not"]

SHARED = 128 << 10  # bytes of shared memory that three loads under way take; with less there are two: the same bits
_LOG2_E = tl.constexpr(1.4426950408889634)


@dataclass(frozen=True, slots=True)
class Blocks:
    """Widths of the two parts of a head (rest 0: none), queries of a program, keys at once, warps, loads under way."""

    first: int
    rest: int
    queries: int
    keys: int
    warps: int
    stages: int


def blocks_of(width: int, dtype: torch.dtype) -> Blocks:
    """The first part is the largest power of two within the width, 16 at least; the rest the least that holds what is
    left.
    """
    first = max(16, 1 << (width.bit_length() - 1))
    rest = max(16, 1 << (width - first - 1).bit_length()) if width > first else 0
    wide = first + rest
    if interpreted():  # by the block, whatever its size
        return Blocks(first, rest, 64, 128, 4, 1)
    if dtype == torch.float32:  # its products take registers for all of a head
        return Blocks(first, rest, *((32, 16, 8, 2) if wide <= 80 else (16, 16, 8, 2)))
    return Blocks(first, rest, *((64, 64, 4, 3) if wide <= 128 else (64, 32, 8, 2)))


def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    scale: float | None = None,
    out: Tensor | None = None,
    lanes: Tensor | None = None,
) -> Tensor:
    """softmax(scale q k^T) v of every head."""
    batch, queries, heads, width = query.shape
    if out is None:
        out = torch.empty_like(query, memory_format=torch.contiguous_format)
    if not query.numel():
        return out
    if not key.shape[1]:
        return out.zero_()
    blocks, unit = blocks_of(width, query.dtype), common_unit(query, key, value, out)
    factor = width**-0.5 if scale is None else scale
    small = (shared_bytes(query.device) or SHARED) < SHARED
    with on_device(query.device):
        _attention[triton.cdiv(queries, blocks.queries), batch * heads](
            out,
            *in_units(out, unit),
            query,
            *in_units(query, unit),
            key,
            *in_units(key, unit),
            value,
            *in_units(value, unit),
            lanes,
            heads,
            queries,
            key.shape[1],
            float(factor),
            WIDTH=width,
            FIRST=blocks.first,
            REST=blocks.rest,
            UNIT=unit,
            WIDEN=interpreted(),
            BLOCK_M=blocks.queries,
            BLOCK_N=blocks.keys,
            num_warps=blocks.warps,
            num_stages=2 if small else blocks.stages,
        )
    return out


@triton.jit
def _attention(
    out,
    out_sample,  # strides of samples, tokens and heads, here and below
    out_token,
    out_head,
    query,
    query_sample,
    query_token,
    query_head,
    key,
    key_sample,
    key_token,
    key_head,
    value,
    value_sample,
    value_token,
    value_head,
    lanes,
    heads,
    queries,
    count,  # of keys
    factor,
    WIDTH: tl.constexpr,
    FIRST: tl.constexpr,  # width of the first part of a head, of the rest (0: none)
    REST: tl.constexpr,
    UNIT: tl.constexpr,  # of all strides, in elements
    WIDEN: tl.constexpr,  # to float64, for the interpreter: it cannot multiply bfloat16, and its sums vary by row
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    row = tl.program_id(1)
    b, h = (row // heads).to(tl.int64), row % heads
    lane = b
    if lanes is not None:
        lane = tl.load(lanes + b)
    rows = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    n = tl.minimum(rows, queries - 1).to(tl.int64)
    at = query + (b * query_sample + h * query_head + n * query_token) * UNIT
    first = _queries(at, 0, FIRST, WIDTH, WIDEN)
    rest = _queries(at, FIRST, REST, WIDTH, WIDEN) if REST else first
    key += (lane * key_sample + h * key_head) * UNIT
    value += (lane * value_sample + h * value_head) * UNIT
    heads_at = (first, rest, factor * _LOG2_E, key, key_token * UNIT, value, value_token * UNIT, count)
    SUM: tl.constexpr = tl.float64 if WIDEN else tl.float32
    largest, total = tl.full((BLOCK_M,), float("-inf"), tl.float32), tl.zeros((BLOCK_M,), tl.float32)
    y, y_rest = tl.zeros((BLOCK_M, FIRST), SUM), tl.zeros((BLOCK_M, REST if REST else 1), SUM)
    whole = count // BLOCK_N * BLOCK_N
    for begin in range(0, whole, BLOCK_N):
        largest, total, y, y_rest = _block(
            begin, heads_at, largest, total, y, y_rest, WIDTH, FIRST, REST, WIDEN, BLOCK_N, False
        )
    if whole < count:
        largest, total, y, y_rest = _block(
            whole, heads_at, largest, total, y, y_rest, WIDTH, FIRST, REST, WIDEN, BLOCK_N, True
        )
    to = out + (b * out_sample + h * out_head + n * out_token) * UNIT
    _write(to, y / total[:, None], 0, rows < queries, WIDTH, WIDEN)
    if REST:
        _write(to, y_rest / total[:, None], FIRST, rows < queries, WIDTH, WIDEN)


@triton.jit
def _queries(at, begin: tl.constexpr, PART: tl.constexpr, WIDTH: tl.constexpr, WIDEN: tl.constexpr):
    """A part of the queries, as it is multiplied."""
    part = _part(at, begin, PART, WIDTH)
    return part.to(tl.float64) if WIDEN else part.to(at.dtype.element_ty)


@triton.jit
def _block(
    begin, heads_at, largest, total, y, y_rest, WIDTH: tl.constexpr, FIRST: tl.constexpr, REST: tl.constexpr,
    WIDEN: tl.constexpr, BLOCK_N: tl.constexpr, LAST: tl.constexpr,
):  # fmt: skip
    """Keys from `begin` on: largest score so far, sum of weights and of weighted values (Dao et al. 2022)."""
    first, rest, factor, key, key_token, value, value_token, count = heads_at
    n = begin + tl.arange(0, BLOCK_N)
    at = key + n[None, :].to(tl.int64) * key_token
    inside = n[None, :] < count
    s = _product(first, _keys(at, 0, FIRST, inside, WIDTH, LAST), WIDEN)
    if REST:
        s = s + _product(rest, _keys(at, FIRST, REST, inside, WIDTH, LAST), WIDEN)
    s = s.to(tl.float32) * factor
    if LAST:
        s = tl.where(inside, s, float("-inf"))
    now = tl.maximum(largest, tl.max(s, axis=1))
    near = tl.where(now == float("-inf"), 0.0, now)  # nothing but -infinity so far
    weights = tl.exp2(s - near[:, None])
    before = tl.exp2(largest - near)
    total = total * before + tl.sum(weights, axis=1)
    if WIDEN:
        weights = _to_bfloat16(weights) if value.dtype.element_ty == tl.bfloat16 else weights
        weights = weights.to(tl.float16) if value.dtype.element_ty == tl.float16 else weights
        weights = weights.to(tl.float64)
    else:
        weights = weights.to(value.dtype.element_ty)
    here = n[:, None] < count
    values = value + n[:, None].to(tl.int64) * value_token
    y = _weighted(weights, y * before[:, None], values, 0, here, WIDTH, LAST)
    if REST:
        y_rest = _weighted(weights, y_rest * before[:, None], values, FIRST, here, WIDTH, LAST)
    return now, total, y, y_rest


@triton.jit
def _keys(at, begin: tl.constexpr, PART: tl.constexpr, inside, WIDTH: tl.constexpr, LAST: tl.constexpr):
    """A part of the keys, turned: [PART, keys]."""
    i = begin + tl.arange(0, PART)[:, None]
    if LAST:
        return tl.load(at + i, mask=inside & (i < WIDTH), other=0.0)
    if begin + PART <= WIDTH:
        return tl.load(at + i)
    return tl.load(at + i, mask=i < WIDTH, other=0.0)


@triton.jit
def _product(queries, keys, WIDEN: tl.constexpr):
    if WIDEN:
        return tl.dot(queries, keys.to(tl.float32).to(tl.float64), out_dtype=tl.float64)
    return tl.dot(queries, keys, input_precision="ieee", out_dtype=tl.float32)
