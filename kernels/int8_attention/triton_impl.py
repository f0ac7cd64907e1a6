"""`int8_attention` on a GPU: keys are quantized by a kernel of their own, queries in registers, scores never stored.

Heads that are no power of two wide are taken in two parts, so that 72 costs 96 in the first product and 80 in the
second, not 128 in both. The keys are laid out anew: [B H, M rounded up, both parts], contiguous.
"""
# Kernels are traced by triton, not typed.
# mypy: disable-error-code="no-untyped-def, untyped-decorator, assignment, attr-defined"

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from vivace.kernels.int8_attention.reference import KEYS
from vivace.kernels.int8_attention.tiles import PART, Blocks, Head, blocks_of
from vivace.kernels.linear import triton_impl as product
from vivace.kernels.linear.triton_impl import device_name, shared_bytes
from vivace.kernels.philox_normal.triton_impl import on_device
from vivace.kernels.quantize_tokens.triton_impl import _rounded
from vivace.kernels.spec import interpreted

SUM_WARPS = 4
UNIT = 8  # elements of 16 bytes
_LOG2_E = tl.constexpr(1.4426950408889634)


def why_not(device: str, dtype: str) -> str | None:
    """Why this cannot run on heads of `dtype` on `device`; None when it can."""
    reason = product.why_not(device, dtype)
    return reason if reason or dtype in ("bfloat16", "float16") else f"{dtype} runs on the reference"


def int8_attention(
    query: Tensor, key: Tensor, value: Tensor, *, scale: float | None = None, out: Tensor | None = None
) -> Tensor:
    """softmax(scale a c (q . k)) v of every head."""
    head = Head.of(query.shape[3])
    sizes = query.shape[0] * query.shape[2], query.shape[1], key.shape[1]
    blocks = blocks_of(head, *sizes, device_name(query.device), shared_bytes(query.device))
    return launch(blocks, query, key, value, scale, out)


def launch(
    blocks: Blocks, query: Tensor, key: Tensor, value: Tensor, scale: float | None, out: Tensor | None
) -> Tensor:
    """Run all kernels with these blocks."""
    batch, queries, heads, width = query.shape
    if out is None:
        out = torch.empty_like(query, memory_format=torch.contiguous_format)
    if not key.shape[1] or not query.numel():
        return out.zero_()
    head, factor = Head.of(width), width**-0.5 if scale is None else scale
    unit = common_unit(query, key, value, out)
    with on_device(query.device):
        keys, key_scale = quantized_keys(key, head, blocks.keys, unit)
        _int8_attention[triton.cdiv(queries, blocks.queries), batch * heads](
            out,
            *in_units(out, unit),
            query,
            *in_units(query, unit),
            keys,
            key_scale,
            value,
            *in_units(value, unit),
            heads,
            queries,
            key.shape[1],
            keys.shape[1],
            float(factor),
            WIDTH=width,
            FIRST=head.first,
            REST=head.rest,
            REST_VALUES=head.rest_values,
            KEYS=KEYS,
            UNIT=unit,
            WIDEN=interpreted(),
            BLOCK_M=blocks.queries,
            BLOCK_N=blocks.keys,
            num_warps=blocks.warps,
            num_stages=blocks.stages,
        )
    return out


def common_unit(*tensors: Tensor) -> int:
    """Elements that every stride is a multiple of, as far as loads of 16 bytes ask: 8, else 1."""
    return UNIT if all(stride % UNIT == 0 for tensor in tensors for stride in tensor.stride()[:3]) else 1


def in_units(tensor: Tensor, unit: int) -> tuple[int, int, int]:
    """Strides of samples, tokens and heads."""
    sample, token, head = (stride // unit for stride in tensor.stride()[:3])
    return sample, token, head


def quantized_keys(key: Tensor, head: Head, block: int, unit: int) -> tuple[Tensor, Tensor]:
    """Integers [B H, M rounded up to `block`, both parts] of keys less their mean, and scales [B H, M / KEYS]."""
    batch, count, heads, width = key.shape
    padded, parts = triton.cdiv(count, block) * block, triton.cdiv(count, PART)
    sums = key.new_empty(batch * heads, parts, head.wide, dtype=torch.float32)
    integers = key.new_empty(batch * heads, padded, head.first + head.rest, dtype=torch.int8)
    scales = key.new_empty(batch * heads, padded // KEYS, dtype=torch.float32)
    place = (key, *in_units(key, unit), heads, count)
    _sum_keys[parts, batch * heads](
        sums, *place, WIDTH=width, WIDE=head.wide, KEYS=KEYS, UNIT=unit, PART=PART, num_warps=SUM_WARPS
    )
    _quantize_keys[padded // KEYS, batch * heads](
        integers, scales, sums, *place, parts, padded, WIDTH=width, WIDE=head.wide, STORED=head.first + head.rest,
        KEYS=KEYS, UNIT=unit, num_warps=SUM_WARPS, enable_fp_fusion=False,
    )  # fmt: skip
    return integers, scales


@triton.jit
def _sum_keys(
    sums, key, key_sample, key_token, key_head, heads, count, WIDTH: tl.constexpr, WIDE: tl.constexpr,
    KEYS: tl.constexpr, UNIT: tl.constexpr, PART: tl.constexpr,
):  # fmt: skip
    """Sum of PART keys of one head."""
    part, row = tl.program_id(0), tl.program_id(1)
    i, n = tl.arange(0, WIDE), part * PART + tl.arange(0, KEYS)
    at = key + ((row // heads).to(tl.int64) * key_sample + row % heads * key_head) * UNIT
    total = tl.zeros((KEYS, WIDE), tl.float32)
    for _ in range(PART // KEYS):
        total += _keys(at, key_token * UNIT, n, i, count, WIDTH)
        n += KEYS
    tl.store(sums + (row * tl.num_programs(0) + part).to(tl.int64) * WIDE + i, tl.sum(total, axis=0))


@triton.jit
def _quantize_keys(
    integers, scales, sums, key, key_sample, key_token, key_head, heads, count, parts, padded, WIDTH: tl.constexpr,
    WIDE: tl.constexpr, STORED: tl.constexpr, KEYS: tl.constexpr, UNIT: tl.constexpr,
):  # fmt: skip
    """KEYS keys of one head less the mean of all, as integers, and their scale."""
    block, row = tl.program_id(0), tl.program_id(1)
    i, n = tl.arange(0, WIDE), block * KEYS + tl.arange(0, KEYS)
    mean = tl.zeros((WIDE,), tl.float32)
    for part in range(parts):
        mean += tl.load(sums + (row * parts + part).to(tl.int64) * WIDE + i)
    mean = _to_bfloat16(tl.div_rn(mean, tl.zeros_like(mean) + count))
    at = key + ((row // heads).to(tl.int64) * key_sample + row % heads * key_head) * UNIT
    here = (n < count)[:, None] & (i < WIDTH)[None, :]
    rest = tl.where(here, _keys(at, key_token * UNIT, n, i, count, WIDTH) - mean[None, :], 0.0)
    size = tl.abs(rest)
    finite = tl.min(tl.min((size < float("inf")).to(tl.int32), axis=1), axis=0) == 1
    step = tl.div_rn(tl.max(tl.max(size, axis=1), axis=0), tl.full([], 127.0, tl.float32))
    step = tl.where(step == 0.0, 1.0, step)
    q = tl.where(finite, _rounded(tl.div_rn(rest, tl.zeros_like(rest) + step)), 0.0).to(tl.int8)
    to = integers + (row * padded + n).to(tl.int64)[:, None] * STORED + i[None, :]
    tl.store(to, q, mask=(i < STORED)[None, :] & (n < padded)[:, None])
    tl.store(scales + row * tl.num_programs(0) + block, tl.where(finite, step, float("nan")))


@triton.jit
def _keys(at, token, n, i, count, WIDTH: tl.constexpr):
    """Keys n of a head, float32 [n, i]; zeros outside of it."""
    here = (n < count)[:, None] & (i < WIDTH)[None, :]
    return tl.load(at + n.to(tl.int64)[:, None] * token + i[None, :], mask=here, other=0.0).to(tl.float32)


@triton.jit
def _to_bfloat16(x):
    """x rounded to the bits of bfloat16, half to even; NaN stays."""
    bits = x.to(tl.int32, bitcast=True)
    near = ((bits + 0x7FFF + ((bits >> 16) & 1)) & -65536).to(tl.float32, bitcast=True)
    return tl.where(x == x, near, x)


@triton.jit
def _int8_attention(
    out,
    out_sample,  # strides of samples, tokens and heads, here and below
    out_token,
    out_head,
    query,
    query_sample,
    query_token,
    query_head,
    keys,
    key_scale,
    value,
    value_sample,
    value_token,
    value_head,
    heads,
    queries,
    count,  # of keys
    padded,  # keys that are laid out
    factor,
    WIDTH: tl.constexpr,
    FIRST: tl.constexpr,  # width of the first part of a head, of the rest (0: none) as keys and as values
    REST: tl.constexpr,
    REST_VALUES: tl.constexpr,
    KEYS: tl.constexpr,
    UNIT: tl.constexpr,  # of all strides, in elements
    WIDEN: tl.constexpr,  # to float64, for the interpreter: it cannot multiply bfloat16, and its sums vary by row
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    row = tl.program_id(1)
    b, h = (row // heads).to(tl.int64), row % heads
    rows = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    n = tl.minimum(rows, queries - 1).to(tl.int64)
    at = query + (b * query_sample + h * query_head + n * query_token) * UNIT
    first, rest, step = _queries(at, WIDTH, FIRST, REST)
    c = step * factor * _LOG2_E
    keys += row.to(tl.int64) * padded * (FIRST + REST)
    key_scale += row * (padded // KEYS)
    value += (b * value_sample + h * value_head) * UNIT
    value_token *= UNIT
    SUM: tl.constexpr = tl.float64 if WIDEN else tl.float32
    largest, total = tl.full((BLOCK_M,), float("-inf"), tl.float32), tl.zeros((BLOCK_M,), tl.float32)
    y, y_rest = tl.zeros((BLOCK_M, FIRST), SUM), tl.zeros((BLOCK_M, REST_VALUES if REST else 1), SUM)
    whole = count // BLOCK_N * BLOCK_N
    for begin in range(0, whole, BLOCK_N):
        largest, total, y, y_rest = _block(
            begin, first, rest, c, keys, key_scale, value, value_token, count, largest, total, y, y_rest,
            WIDTH, FIRST, REST, KEYS, WIDEN, BLOCK_N, False,
        )  # fmt: skip
    if whole < count:
        largest, total, y, y_rest = _block(
            whole, first, rest, c, keys, key_scale, value, value_token, count, largest, total, y, y_rest,
            WIDTH, FIRST, REST, KEYS, WIDEN, BLOCK_N, True,
        )  # fmt: skip
    to = out + (b * out_sample + h * out_head + n * out_token) * UNIT
    _write(to, y / total[:, None], 0, rows < queries, WIDTH, WIDEN)
    if REST:
        _write(to, y_rest / total[:, None], FIRST, rows < queries, WIDTH, WIDEN)


@triton.jit
def _queries(at, WIDTH: tl.constexpr, FIRST: tl.constexpr, REST: tl.constexpr):
    """Both parts of the queries as integers, and their scales; the rest is the first where there is none."""
    first = _part(at, 0, FIRST, WIDTH)
    size = tl.abs(first)
    most, finite = tl.max(size, axis=1), tl.min((size < float("inf")).to(tl.int32), axis=1)
    if REST:
        rest = _part(at, FIRST, REST, WIDTH)
        size = tl.abs(rest)
        most = tl.maximum(most, tl.max(size, axis=1))
        finite = tl.minimum(finite, tl.min((size < float("inf")).to(tl.int32), axis=1))
    step = tl.div_rn(most, tl.full([], 127.0, tl.float32) + tl.zeros_like(most))
    step = tl.where(step == 0.0, 1.0, step)
    step = tl.where(finite == 1, step, float("nan"))
    first = _integers(first, step)
    rest = _integers(rest, step) if REST else first
    return first, rest, step


@triton.jit
def _part(at, begin: tl.constexpr, PART: tl.constexpr, WIDTH: tl.constexpr):
    i = begin + tl.arange(0, PART)
    if begin + PART <= WIDTH:
        return tl.load(at[:, None] + i[None, :]).to(tl.float32)
    return tl.load(at[:, None] + i[None, :], mask=(i < WIDTH)[None, :], other=0.0).to(tl.float32)


@triton.jit
def _integers(x, step):
    q = _rounded(tl.div_rn(x, tl.zeros_like(x) + step[:, None]))
    return tl.where(step[:, None] == step[:, None], q, 0.0).to(tl.int8)


@triton.jit
def _block(
    begin, first, rest, c, keys, key_scale, value, value_token, count, largest, total, y, y_rest,
    WIDTH: tl.constexpr, FIRST: tl.constexpr, REST: tl.constexpr, KEYS: tl.constexpr, WIDEN: tl.constexpr,
    BLOCK_N: tl.constexpr, LAST: tl.constexpr,
):  # fmt: skip
    """Keys from `begin` on: largest score so far, sum of weights and of weighted values (Dao et al. 2022)."""
    n = begin + tl.arange(0, BLOCK_N)
    at = keys + n[None, :].to(tl.int64) * (FIRST + REST)
    scores = tl.dot(first, tl.load(at + tl.arange(0, FIRST)[:, None]), out_dtype=tl.int32)
    if REST:
        scores = tl.dot(rest, tl.load(at + (FIRST + tl.arange(0, REST))[:, None]), scores, out_dtype=tl.int32)
    s = scores.to(tl.float32) * tl.load(key_scale + n // KEYS)[None, :]
    if LAST:
        s = tl.where((n < count)[None, :], s, float("-inf"))
    now = tl.maximum(largest, tl.max(s, axis=1))
    weights = tl.exp2(s * c[:, None] - (now * c)[:, None])
    before = tl.exp2((largest - now) * c)
    total = total * before + tl.sum(weights, axis=1)
    if WIDEN:
        near = _to_bfloat16(weights) if value.dtype.element_ty == tl.bfloat16 else weights.to(tl.float16)
        weights = near.to(tl.float64)
    else:
        weights = weights.to(value.dtype.element_ty)
    here = n[:, None] < count
    values = value + n[:, None].to(tl.int64) * value_token
    y = _weighted(weights, y * before[:, None], values, 0, here, WIDTH, LAST)
    if REST:
        y_rest = _weighted(weights, y_rest * before[:, None], values, FIRST, here, WIDTH, LAST)
    return now, total, y, y_rest


@triton.jit
def _weighted(weights, y, values, begin: tl.constexpr, here, WIDTH: tl.constexpr, LAST: tl.constexpr):
    """y and the weighted values of channels from `begin` on."""
    i = begin + tl.arange(0, y.shape[1])
    if LAST:
        v = tl.load(values + i[None, :], mask=here & (i < WIDTH)[None, :], other=0.0)
    elif begin + y.shape[1] > WIDTH:
        v = tl.load(values + i[None, :], mask=(i < WIDTH)[None, :], other=0.0)
    else:
        v = tl.load(values + i[None, :])
    if y.dtype == tl.float64:
        return tl.dot(weights, v.to(tl.float32).to(tl.float64), y, out_dtype=tl.float64)
    return tl.dot(weights, v, y, input_precision="ieee", out_dtype=tl.float32)


@triton.jit
def _write(to, y, begin: tl.constexpr, here, WIDTH: tl.constexpr, WIDEN: tl.constexpr):
    i = begin + tl.arange(0, y.shape[1])
    if WIDEN and to.dtype.element_ty == tl.bfloat16:
        y = _to_bfloat16(y.to(tl.float32))
    tl.store(to[:, None] + i[None, :], y.to(to.dtype.element_ty), mask=here[:, None] & (i < WIDTH)[None, :])
