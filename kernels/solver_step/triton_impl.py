"""`solver_step` on a GPU: one kernel, one program per (block of elements, sample).

A program reads its row's codes and numbers as scalars, then loads every source it needs, sums, and writes. A load is
masked by "element < limit" with a limit of 0 for what the row does not read: no branch, no traffic. What never occurs
in a table is left out when the kernel is compiled (`Facts.kinds`). Fusion is off, so float32 has the reference's bits.

Side-car tensors come as an array of addresses, made once for a set of tensors and kept; network outputs change every
call and come as pointers of their own. Neither copies a tensor nor waits for the device.
"""
# Kernels are traced by triton, not typed.
# mypy: disable-error-code="no-untyped-def, untyped-decorator, assignment"

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from vivace.kernels.philox_normal import triton_impl as philox
from vivace.kernels.philox_normal.triton_impl import normal_block, on_device
from vivace.kernels.solver_step import table as codes
from vivace.kernels.solver_step.check import token_axes
from vivace.kernels.solver_step.table import StepTable

BLOCK = 512  # elements a program handles: four a thread, 16 bytes of float32; a multiple of 4
WARPS = 4

_OUT, _NET, _TENSOR, _NOISE = (tl.constexpr(c) for c in (codes.OUT, codes.NET, codes.TENSOR, codes.NOISE))
_INTS, _FLOATS, _SOURCES = (tl.constexpr(c) for c in (codes.INTS, codes.FLOATS, codes.SOURCES))
_SOURCE_AT, _SCALE_AT, _TO_AT = (tl.constexpr(c) for c in (codes.SOURCE_AT, codes.SCALE_AT, codes.DESTINATION_AT))
_PREV_AT, _LOW_AT, _HIGH_AT = (tl.constexpr(c) for c in (codes.PREV_AT, codes.LOW_AT, codes.HIGH_AT))
_ADJUSTED_AT = tl.constexpr(codes.ADJUSTED_AT)
_ROW_OUTPUTS = tl.constexpr(codes.OUTPUTS)
_FROM_POOL, _FROM_TENSOR = tl.constexpr(codes.FROM_POOL), tl.constexpr(codes.FROM_TENSOR)
_FROM_OUT, _FROM_NOISE = tl.constexpr(codes.FROM_OUT), tl.constexpr(codes.FROM_NOISE)
_MINUS_ZERO_BITS = tl.constexpr(-(1 << 31))  # triton before 3.9 reads the literal -0.0 as 0.0


def why_not(device: str, dtype: str) -> str | None:
    """Why this cannot run on tensors of `device` with a pool of `dtype`; None when it can."""
    reason = philox.why_not(device, dtype)
    return reason if reason or dtype == "float32" else f"its pool is float32, this one is {dtype}"


def solver_step(
    pool: Tensor,
    outs: Sequence[Tensor],
    table: StepTable,
    rows: Tensor,
    index: Tensor,
    *,
    net: Tensor | None = None,
    tensors: Sequence[Tensor] = (),
    seeds: Tensor | None = None,
    pictures: Tensor | None = None,
    adjust: Tensor | None = None,
    classes: Tensor | None = None,
    patch: Sequence[int] = (),
) -> None:
    """y_k = clamp(sum_j coef[k][j] * source_j * scale_j + sum_{l<k} prev[k][l] * y_l, low_k, high_k), one pass."""
    size, facts = math.prod(pool.shape[2:]), table.facts
    if not facts.outputs:
        return
    inputs, constants = launch_arguments(pool, outs, table, rows, index, tensors, seeds, pictures)
    by_token = () if classes is None else (classes, token_axes(pool.shape, patch), tuple(patch))
    with on_device(pool.device):
        (_solver_step if classes is None else _solver_step_by_class)[triton.cdiv(size, BLOCK), len(rows)](
            *inputs,
            net if facts.net else None,
            adjust if facts.adjusted else None,
            *by_token,
            **constants,
            OUTPUTS=facts.outputs,
            BLOCK=BLOCK,
            num_warps=WARPS,
            enable_fp_fusion=False,
        )


def launch_arguments(
    pool: Tensor,
    outs: Sequence[Tensor],
    table: StepTable,
    rows: Tensor,
    index: Tensor,
    tensors: Sequence[Tensor],
    seeds: Tensor | None,
    pictures: Tensor | None,
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """What kernels over rows share: arguments up to `slot_stride`, and the constants they are compiled for."""
    facts = table.facts
    rows, index = (t.to(pool.device, non_blocking=True) for t in (rows, index))
    if facts.noise and seeds is not None and pictures is not None:
        seeds, pictures = (t.to(pool.device, non_blocking=True) for t in (seeds, pictures))
    else:
        seeds = pictures = None
    addresses = tuple(tensor.data_ptr() for tensor in tensors[: facts.tensors])
    outs = tuple(outs[: facts.branches])
    kinds = _kinds_given(facts.kinds, bool(outs), bool(addresses), seeds is not None)
    outs = outs or (pool[0],)
    strides = tuple(out.stride(0) for out in outs)
    side_car = _on_device(addresses, pool.device) if addresses else None
    size = math.prod(pool.shape[2:])
    arrays = (table.ints, table.floats, rows, index, seeds, pictures)
    scales = tuple(kind // codes.SCALED_BY_POOL for kind in kinds)
    aligned = all(address % 16 == 0 for address in addresses)
    constants = {"KINDS": kinds, "SCALES": scales, "ALIGNED": aligned}
    return (pool, outs, strides, side_car, *arrays, size, pool.stride(0)), constants


def _kinds_given(kinds: tuple[int, ...], outs: bool, tensors: bool, noise: bool) -> tuple[int, ...]:
    """`Facts.kinds` less what this call does not give: other rows of the table may need it, those run here do not."""
    absent = 0 if outs else codes.FROM_OUT
    absent |= 0 if tensors else codes.FROM_TENSOR | codes.SCALED_BY_TENSOR
    absent |= 0 if noise else codes.FROM_NOISE
    return tuple(kind & ~absent for kind in kinds)


@lru_cache(maxsize=256)
def _on_device(addresses: tuple[int, ...], device: torch.device) -> Tensor:
    """The addresses as int64 in device memory. Copied once per set of tensors: run a step before capturing a graph."""
    return torch.tensor(addresses, dtype=torch.int64).to(device)


@triton.jit
def _solver_step(
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
    net,
    adjust,
    KINDS: tl.constexpr,  # where sources come from, bits by position
    SCALES: tl.constexpr,  # where their scales come from, the same bits
    ALIGNED: tl.constexpr,
    OUTPUTS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    sample = tl.program_id(1).to(tl.int64)
    first = tl.program_id(0).to(tl.int64) * BLOCK
    row = tl.load(rows + sample).to(tl.int64)
    _run_row(
        row, first + tl.arange(0, BLOCK), sample, first, pool, outs, out_strides, tensors, ints, floats, index, seeds,
        pictures, size, slot_stride, net, adjust, KINDS, SCALES, ALIGNED, OUTPUTS, BLOCK,
    )  # fmt: skip


@triton.jit
def _solver_step_by_class(
    pool,
    outs,
    out_strides,
    tensors,
    ints,
    floats,
    rows,
    index,
    seeds,
    pictures,
    size,
    slot_stride,
    net,
    adjust,
    classes,  # of every token of every sample
    sizes,  # of the axes behind the first one
    edges,  # of a token, by axis
    KINDS: tl.constexpr,
    SCALES: tl.constexpr,
    ALIGNED: tl.constexpr,
    OUTPUTS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """The same, row by row of the classes that occur in a block: elements of other classes are beyond every limit."""
    sample = tl.program_id(1).to(tl.int64)
    first = tl.program_id(0).to(tl.int64) * BLOCK
    element = first + tl.arange(0, BLOCK)
    row = tl.load(rows + sample).to(tl.int64)
    channel, tokens = 1, 1
    for axis in tl.static_range(len(sizes)):
        channel *= sizes[axis]
        tokens *= sizes[axis] // edges[axis]
    place = (element % channel).to(tl.int32)
    token = tl.zeros([BLOCK], tl.int64)
    stride = 1
    for behind in tl.static_range(len(sizes)):
        length, edge = sizes[len(sizes) - 1 - behind], edges[len(sizes) - 1 - behind]
        token += (place % length // edge) * stride
        place = place // length
        stride *= length // edge
    own = tl.load(classes + sample * tokens + token, mask=element < size, other=0).to(tl.int32)
    for number in range(0, tl.max(own, axis=0) + 1):
        here = (own == number) & (element < size)
        if tl.max(here.to(tl.int32), axis=0) > 0:
            _run_row(
                row + number, tl.where(here, element, size), sample, first, pool, outs, out_strides, tensors, ints,
                floats, index, seeds, pictures, size, slot_stride, net, adjust, KINDS, SCALES, ALIGNED, OUTPUTS, BLOCK,
            )  # fmt: skip


@triton.jit
def _run_row(
    row, element, sample, first, pool, outs, out_strides, tensors, ints, floats, index, seeds, pictures, size,
    slot_stride, net, adjust, KINDS: tl.constexpr, SCALES: tl.constexpr, ALIGNED: tl.constexpr, OUTPUTS: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """One row on elements of a sample, those of the block from `first` on or `size` where one is left out."""
    lane = tl.load(index + sample).to(tl.int64)
    ints += row * _INTS
    floats += row * _FLOATS
    state = pool + lane * size  # slot 0 of this sample
    m = tl.load(ints + 1)
    source, scale, limit, coef = read_row(ints, floats, size, len(KINDS), OUTPUTS)
    values = ()
    for j in tl.static_range(len(KINDS)):
        value = read_value(
            source[j], scale[j], limit[j], state, slot_stride, outs, out_strides, tensors, seeds, pictures, sample,
            first, element, KINDS[j], SCALES[j], ALIGNED, BLOCK,
        )  # fmt: skip
        values = values + (value,)
    results = ()
    for k in tl.static_range(OUTPUTS):
        total = minus_zero(BLOCK)
        empty = m >= 0
        for j in tl.static_range(len(KINDS)):
            c = coef[j * OUTPUTS + k]
            total = tl.where(c != 0.0, total + c * values[j], total)
            empty = empty & (c == 0.0)
        for earlier in tl.static_range(k):
            p = tl.load(floats + _PREV_AT + k * _ROW_OUTPUTS + earlier, mask=k < m, other=0.0)
            total = tl.where(p != 0.0, total + p * results[earlier], total)
            empty = empty & (p == 0.0)
        total = tl.where(empty, 0.0, total)
        low, high = tl.load(floats + _LOW_AT + k), tl.load(floats + _HIGH_AT + k)
        gain = 1.0
        if adjust is not None:
            adjusted = (tl.load(ints + _ADJUSTED_AT) >> k & 1) != 0
            low = tl.where(adjusted, tl.load(adjust + 3 * sample, mask=adjusted, other=0.0), low)
            high = tl.where(adjusted, tl.load(adjust + 3 * sample + 1, mask=adjusted, other=0.0), high)
            gain = tl.load(adjust + 3 * sample + 2, mask=adjusted, other=1.0)
        total = tl.where(total < low, low, total)  # false for NaN, which passes
        total = tl.where(total > high, high, total)
        results = results + (total * gain,)

    tl.debug_barrier()  # loads and stores may spread elements over threads differently: all reads come before any write
    for k in tl.static_range(OUTPUTS):
        to = tl.load(ints + _TO_AT + k)
        here = tl.where((k < m) & (to >= 0) & (to < _OUT), size, 0)
        tl.store(state + to.to(tl.int64) * slot_stride + element, results[k], mask=element < here)
        if net is not None:
            here = tl.where((k < m) & (to == _NET), size, 0)
            tl.store(net + lane * size + element, results[k].to(net.dtype.element_ty), mask=element < here)


@triton.jit
def minus_zero(BLOCK: tl.constexpr):
    """-0 [BLOCK]: -0 + x is x, bit for bit."""
    return tl.full([BLOCK], _MINUS_ZERO_BITS, tl.int32).to(tl.float32, bitcast=True)


@triton.jit
def read_row(ints, floats, size, N: tl.constexpr, OUTPUTS: tl.constexpr):
    """Codes of sources and scales, how many elements of each are read (all or none), coefficients [N * OUTPUTS]."""
    n, m = tl.load(ints), tl.load(ints + 1)
    source, scale, limit, coef = (), (), (), ()
    for j in tl.static_range(N):
        source = source + (tl.load(ints + _SOURCE_AT + j),)
        scale = scale + (tl.load(ints + _SCALE_AT + j),)
        used = n < 0
        for k in tl.static_range(OUTPUTS):
            c = tl.load(floats + k * _SOURCES + j, mask=(j < n) & (k < m), other=0.0)
            used = used | (c != 0.0)
            coef = coef + (c,)
        limit = limit + (tl.where(used, size, 0),)
    return source, scale, limit, coef


@triton.jit
def read_value(
    source,
    scale,
    limit,
    state,
    slot_stride,
    outs,
    out_strides,
    tensors,
    seeds,
    pictures,
    sample,
    first,
    element,
    KIND: tl.constexpr,
    SCALE: tl.constexpr,
    ALIGNED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """source * scale of `element`, those from `first` on or beyond `limit` (not read), for one source of a row."""
    value = _read(source, limit, state, slot_stride, tensors, element, KIND, ALIGNED, BLOCK)
    if _FROM_OUT & KIND:
        for b in tl.static_range(len(outs)):
            here = tl.where(source == _OUT + b, limit, 0)
            out = tl.load(outs[b] + sample * out_strides[b] + element, mask=element < here, other=0.0)
            value = tl.where(here > 0, out.to(tl.float32), value)
    if _FROM_NOISE & KIND:
        if (source >= _NOISE) & (limit > 0):
            value = normal_block(tl.load(seeds + sample), tl.load(pictures + sample), source - _NOISE, first, BLOCK)
    if SCALE > 0:
        value *= _read(scale, limit, state, slot_stride, tensors, element, SCALE, ALIGNED, BLOCK)
    return value


@triton.jit
def _read(
    code, limit, state, slot_stride, tensors, element, KIND: tl.constexpr, ALIGNED: tl.constexpr, BLOCK: tl.constexpr
):
    """A pool slot or a side-car tensor, whichever `code` names; ones where it names neither or nothing is read."""
    value = tl.full([BLOCK], 1.0, tl.float32)
    if _FROM_POOL & KIND:
        here = tl.where((code >= 0) & (code < _OUT), limit, 0)
        value = tl.load(state + code.to(tl.int64) * slot_stride + element, mask=element < here, other=value)
    if _FROM_TENSOR & KIND:
        here = tl.where((code >= _TENSOR) & (code < _NOISE), limit, 0)
        base = tl.load(tensors + (code - _TENSOR), mask=here > 0, other=0).to(tl.pointer_type(tl.float32))
        if ALIGNED:
            base = tl.multiple_of(base, 16)
        value = tl.load(base + element, mask=element < here, other=value)
    return value
