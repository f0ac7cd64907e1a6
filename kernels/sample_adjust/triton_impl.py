"""`sample_adjust` on a GPU: one program a sample, which computes y anew in every pass and stores nothing of its size.

Threshold: three passes of radix selection, 11, 10 and 10 bits of the key (the bits of |y|). Rescale: means, then
squares about them, in float64. The order of all sums depends on the sample's size alone.
"""
# Kernels are traced by triton, not typed.
# mypy: disable-error-code="no-untyped-def, untyped-decorator, assignment, attr-defined"

from __future__ import annotations

from collections.abc import Sequence

import triton
import triton.language as tl
from torch import Tensor

from vivace.kernels.philox_normal.triton_impl import on_device
from vivace.kernels.solver_step import table as codes
from vivace.kernels.solver_step.table import StepTable
from vivace.kernels.solver_step.triton_impl import launch_arguments, minus_zero, read_value, why_not

__all__ = ["sample_adjust", "why_not"]

BLOCK = 1024  # elements a program handles at a time
WARPS = 8
BINS = 2048

_INTS, _FLOATS, _KIND_AT = (tl.constexpr(c) for c in (codes.INTS, codes.FLOATS, codes.KIND_AT))
_LOW_AT, _HIGH_AT, _THRESHOLD = (tl.constexpr(c) for c in (codes.LOW_AT, codes.HIGH_AT, codes.THRESHOLD))
_PREV_AT = tl.constexpr(codes.PREV_AT + codes.OUTPUTS)  # of y_1: its coefficient of y_0
_BINS, _SOURCES = tl.constexpr(BINS), tl.constexpr(codes.SOURCES)
_SOURCE_AT, _SCALE_AT = tl.constexpr(codes.SOURCE_AT), tl.constexpr(codes.SCALE_AT)
_KEY_MASK, _INFINITY_KEY = tl.constexpr(0x7FFFFFFF), tl.constexpr(0x7F800000)


def sample_adjust(
    pool: Tensor,
    outs: Sequence[Tensor],
    table: StepTable,
    rows: Tensor,
    index: Tensor,
    *,
    tensors: Sequence[Tensor] = (),
    seeds: Tensor | None = None,
    pictures: Tensor | None = None,
) -> Tensor:
    """(-s, s, 1/s), s = min(max(quantile(|y_0|, ratio), 1), max), or (-inf, inf, phi std(y_1) / std(y_0) + 1 - phi)."""
    inputs, constants = launch_arguments(pool, outs, table, rows, index, tensors, seeds, pictures)
    adjust = pool.new_empty(len(rows), 3)
    with on_device(pool.device):
        _sample_adjust[len(rows),](*inputs, adjust, **constants, BLOCK=BLOCK, num_warps=WARPS, enable_fp_fusion=False)
    return adjust


@triton.jit
def _sample_adjust(
    pool,
    outs,  # tuple of pointers, one a branch
    out_strides,  # elements between samples, one a branch
    tensors,  # addresses of side-car tensors
    ints,
    floats,
    rows,
    index,
    seeds,
    pictures,
    size,
    slot_stride,
    adjust,
    KINDS: tl.constexpr,  # as in solver_step
    SCALES: tl.constexpr,
    ALIGNED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    sample = tl.program_id(0).to(tl.int64)
    row = tl.load(rows + sample).to(tl.int64)
    ints += row * _INTS
    floats += row * _FLOATS
    state = pool + tl.load(index + sample).to(tl.int64) * size
    inputs = (ints, floats, state, slot_stride, outs, out_strides, tensors, seeds, pictures, sample)
    to = adjust + 3 * sample
    if tl.load(ints + _KIND_AT) == _THRESHOLD:
        s = _threshold(inputs, floats, size, KINDS, SCALES, ALIGNED, BLOCK)
        tl.store(to, -s)
        tl.store(to + 1, s)
        tl.store(to + 2, tl.div_rn(1.0, s))
    else:
        gain = _rescale(inputs, floats, size, KINDS, SCALES, ALIGNED, BLOCK)
        tl.store(to, float("-inf"))
        tl.store(to + 1, float("inf"))
        tl.store(to + 2 + tl.arange(0, 1), gain)


@triton.jit
def _threshold(
    inputs, floats, size, KINDS: tl.constexpr, SCALES: tl.constexpr, ALIGNED: tl.constexpr, BLOCK: tl.constexpr
):
    """min(max(quantile(|y_0|, ratio), 1), max)."""
    last = tl.full([], size, tl.int32) - 1  # a size of 1 comes as a constant
    lower, weight = _rank(tl.load(floats + _LOW_AT), last)
    start, below, bin, high = 0, 0, 0, 31
    above, largest = _KEY_MASK, 0
    counts = tl.zeros([_BINS], tl.int32)
    bins = tl.arange(0, _BINS)
    for round in range(3):
        low = 20 - 10 * round
        counts = tl.zeros([_BINS], tl.int32)
        above = _KEY_MASK
        for first in range(0, size, BLOCK):
            y, _ = _combine(inputs, size, tl.cast(first, tl.int64), KINDS, SCALES, ALIGNED, BLOCK)
            key = y.to(tl.int32, bitcast=True) & _KEY_MASK
            there = first + tl.arange(0, BLOCK) < size
            part = (key >> high) - (start >> high)
            counts += tl.histogram((key - start) >> low, _BINS, mask=there & (part == 0))
            above = tl.minimum(above, tl.min(tl.where(there & (part > 0), key, _KEY_MASK)))
            largest = tl.maximum(largest, tl.max(tl.where(there, key, 0)))
        bin = tl.sum((below + tl.cumsum(counts) <= lower).to(tl.int32))
        below += tl.sum(tl.where(bins < bin, counts, 0))
        start += bin << low
        high = low
    through = below + tl.sum(tl.where(bins == bin, counts, 0))  # keys up to the lower neighbour's last twin
    next_bin = tl.min(tl.where((bins > bin) & (counts > 0), bins, _BINS))
    upper = tl.where(next_bin < _BINS, start + (next_bin - bin), above)
    upper = tl.where((weight > 0.0) & (lower + 1 >= through), upper, start)
    s = _lerp(start.to(tl.float32, bitcast=True), upper.to(tl.float32, bitcast=True), weight)
    s = tl.where(s < 1.0, 1.0, s)
    limit = tl.load(floats + _HIGH_AT)
    s = tl.where(s > limit, limit, s)
    return tl.where(largest > _INFINITY_KEY, float("nan"), s)


@triton.jit
def _rescale(
    inputs, floats, size, KINDS: tl.constexpr, SCALES: tl.constexpr, ALIGNED: tl.constexpr, BLOCK: tl.constexpr
):
    """phi * std(y_1) / std(y_0) + 1 - phi, [1]."""
    mean0 = tl.zeros([1], tl.float64)
    mean1, square0, square1 = mean0, mean0, mean0
    for _round in range(2):
        sum0, sum1, square0, square1 = mean0 * 0.0, mean0 * 0.0, mean0 * 0.0, mean0 * 0.0
        for first in range(0, size, BLOCK):
            y0, y1 = _combine(inputs, size, tl.cast(first, tl.int64), KINDS, SCALES, ALIGNED, BLOCK)
            there = first + tl.arange(0, BLOCK) < size
            d0 = tl.where(there, y0.to(tl.float64) - mean0, 0.0)
            d1 = tl.where(there, y1.to(tl.float64) - mean1, 0.0)
            sum0, sum1 = sum0 + tl.sum(d0), sum1 + tl.sum(d1)
            square0, square1 = square0 + tl.sum(d0 * d0), square1 + tl.sum(d1 * d1)
        mean0, mean1 = mean0 + sum0 / size, mean1 + sum1 / size
    last = tl.full([], size, tl.int32) - 1
    ratio = tl.sqrt(square1 / last) / tl.sqrt(square0 / last)
    phi = tl.load(floats + _LOW_AT).to(tl.float64)
    return (phi * ratio + (1.0 - phi)).to(tl.float32)


@triton.jit
def _combine(
    inputs, size, first, KINDS: tl.constexpr, SCALES: tl.constexpr, ALIGNED: tl.constexpr, BLOCK: tl.constexpr
):
    """y_0 and y_1 of the elements from `first` on: the sums of solver_step.

    Source by source, its codes read again in every block: if they left the loops, so would all addresses, and spill.
    """
    ints, floats, state, slot_stride, outs, out_strides, tensors, seeds, pictures, sample = inputs
    n, m = tl.load(ints), tl.load(ints + 1)
    y0, y1 = minus_zero(BLOCK), minus_zero(BLOCK)
    empty0, empty1 = first >= 0, first >= 0
    for j in tl.static_range(len(KINDS)):
        c0 = tl.load(floats + j, mask=(j < n) & (m > 0), other=0.0)
        c1 = tl.load(floats + _SOURCES + j, mask=(j < n) & (m > 1), other=0.0)
        limit = tl.where((c0 != 0.0) | (c1 != 0.0), size, 0)
        source = tl.load(ints + _SOURCE_AT + j, volatile=True)
        scale = tl.load(ints + _SCALE_AT + j, volatile=True)
        value = read_value(
            source, scale, limit, state, slot_stride, outs, out_strides, tensors, seeds, pictures, sample, first,
            first + tl.arange(0, BLOCK), KINDS[j], SCALES[j], ALIGNED, BLOCK,
        )  # fmt: skip
        y0 = tl.where(c0 != 0.0, y0 + c0 * value, y0)
        y1 = tl.where(c1 != 0.0, y1 + c1 * value, y1)
        empty0, empty1 = empty0 & (c0 == 0.0), empty1 & (c1 == 0.0)
    y0 = tl.where(empty0, 0.0, y0)
    p = tl.load(floats + _PREV_AT)
    y1 = tl.where(p != 0.0, y1 + p * y0, y1)
    return y0, tl.where(empty1 & (p == 0.0), 0.0, y1)


@triton.jit
def _rank(ratio, last):
    """Index of the lower neighbour and weight of the upper one: ratio * last, rounded as torch.quantile does."""
    narrow = (ratio * last.to(tl.float32)).to(tl.float64)
    rank = tl.where(last < 1 << 24, narrow, ratio.to(tl.float64) * last.to(tl.float64))
    lower = rank.to(tl.int32)
    return lower, (rank - lower.to(tl.float64)).to(tl.float32)


@triton.jit
def _lerp(start, end, weight):
    """From the nearer end, with one rounding, as torch; in float64, where the product is exact."""
    near = weight < 0.5
    factor, base = tl.where(near, weight, weight - 1.0), tl.where(near, start, end)
    return (factor.to(tl.float64) * (end - start).to(tl.float64) + base.to(tl.float64)).to(tl.float32)
