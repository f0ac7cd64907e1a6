"""`select_tokens` on a GPU: ranks by counting, in four or five launches, none of which waits for the host.

The rank of a token is how many come before it: every program counts for some tokens over all others, which is exact,
needs no order of programs and costs N^2 comparisons, 17 million at 4,096 tokens. Fusion is off, so scores have the
definition's bits; floats are compared as integers that order alike, NaN last.
"""
# Kernels are traced by triton, not typed.
# mypy: disable-error-code="no-untyped-def, untyped-decorator, assignment, attr-defined"

from __future__ import annotations

from collections.abc import Sequence
from itertools import product as every

import triton
import triton.language as tl
from torch import Tensor

from vivace.kernels.linear.triton_impl import why_not
from vivace.kernels.philox_normal.triton_impl import on_device
from vivace.kernels.select_tokens import lowest
from vivace.kernels.select_tokens.check import grid_of
from vivace.kernels.spec import interpreted

__all__ = ["select_tokens", "why_not"]

BLOCK = 256  # tokens whose score a program makes
MINE, OTHERS = (512, 1024) if interpreted() else (32, 128)  # tokens a program counts for, and over, at a time
LINE = 1024  # tokens at a time where one program goes over all
WARPS = 4

_LAST = tl.constexpr(0x7FFFFFFF)
_DEVIATION, _SIZE, _NORM, _GIVEN = (tl.constexpr(name) for name in ("deviation", "size", "norm", "given"))


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
    """ids of the F oldest tokens and of the keep - F others smallest by (distance of rank * factors[age], p)."""
    batch, tokens = ages.shape
    ids, keys, effective, flags = (ages.new_empty(batch, count) for count in (keep, tokens, tokens, tokens))
    forced, musts = (ages.new_empty(batch, tokens), ages.new_empty(batch)) if bound >= 0 else (None, None)
    grid = triton.cdiv(tokens, MINE), batch
    middle = 2 * lowest(tokens, keep, drop_high) + keep - 1
    with on_device(ages.device):
        _write_scores(keys, planes, weights, patch, metric, scores)
        _effective[grid](
            effective, keys, ages, factors, 0 if factors is None else len(factors) - 1, middle, tokens, MINE=MINE,
            OTHERS=OTHERS, num_warps=WARPS, enable_fp_fusion=False,
        )  # fmt: skip
        if forced is not None:
            _forced[grid](
                forced, musts, effective, ages, bound, keep if least is None else least, keep, tokens,
                BINS=max(2, triton.next_power_of_2(bound + 1)), MINE=MINE, OTHERS=OTHERS, LINE=LINE, num_warps=WARPS,
            )  # fmt: skip
        _chosen[grid](
            flags, forced, musts, effective, keep, tokens, MINE=MINE, OTHERS=OTHERS, num_warps=WARPS
        )  # fmt: skip
        _write[batch,](ids, ages, flags, keep, tokens, LINE=LINE, num_warps=WARPS)
    return ids


def _write_scores(
    keys: Tensor, planes: Sequence[Tensor], weights: Tensor | None, patch: Sequence[int], metric: str,
    scores: Tensor | None,
) -> None:  # fmt: skip
    """Keys of the scores of all tokens."""
    tokens = keys.shape[1]
    if scores is not None:
        told, sources, strides, channels = "given", (scores,), (tokens,), 1
        grid, apart, within = (tokens,), (1,), (0,)
        pixels = tokens
    else:
        sources = tuple(plane if plane[0].is_contiguous() else plane.contiguous() for plane in planes)
        strides, channels = tuple(plane.stride(0) for plane in sources), sources[0].shape[1]
        grid, apart, within, pixels = places(sources[0].shape[2:], patch)
        told = "size" if metric == "deviation" and channels == 1 else metric
    _scores[triton.cdiv(tokens, BLOCK), len(keys)](
        keys, sources, strides, weights, channels, pixels, tokens, grid, apart, within, METRIC=told, BLOCK=BLOCK,
        num_warps=WARPS, enable_fp_fusion=False,
    )  # fmt: skip


def places(
    spatial: Sequence[int], patch: Sequence[int]
) -> tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...], int]:
    """Tokens along every axis, pixels between neighbouring tokens there, places of pixels in a token, and all pixels.

    The last axis comes first; axes of one token are left out.
    """
    strides, stride = [], 1
    for size in reversed(spatial):
        strides.append(stride)
        stride *= size
    strides.reverse()
    within = [sum(map(int.__mul__, at, strides)) for at in every(*map(range, patch))]
    axes = list(zip(grid_of(spatial, patch), (s * edge for s, edge in zip(strides, patch, strict=True)), strict=True))
    kept = [axis for axis in reversed(axes) if axis[0] > 1] or axes[-1:]
    return tuple(count for count, _ in kept), tuple(apart for _, apart in kept), tuple(within), stride


@triton.jit
def _scores(
    keys,
    planes,  # tuple of pointers, and of elements between their samples
    plane_strides,
    weights,
    channels,
    pixels,
    tokens,
    grid,  # tuples, last axis first: tokens along an axis, pixels between them; places of pixels in a token
    apart,
    within,
    METRIC: tl.constexpr,
    BLOCK: tl.constexpr,
):
    b = tl.program_id(1).to(tl.int64)
    p = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    here = p < tokens
    rest, place = p, tl.zeros_like(p)
    for axis in tl.static_range(len(grid)):
        place += rest % grid[axis] * apart[axis]
        rest = rest // grid[axis]
    inputs = (planes, plane_strides, weights, b, pixels)
    total = _metric(inputs, place + within[0], here, channels, METRIC)
    for k in tl.static_range(1, len(within)):
        total = total + _metric(inputs, place + within[k], here, channels, METRIC)
    score = tl.div_rn(total, tl.zeros_like(total) + len(within))
    tl.store(keys + b * tokens + p, _key(score), mask=here)


@triton.jit
def _metric(inputs, pixel, here, channels, METRIC: tl.constexpr):
    """Of one pixel of every token: over its channels, in order."""
    first = _value(inputs, pixel, here, 0, METRIC)
    if METRIC == _GIVEN:
        result = first
    elif METRIC == _SIZE:
        result = tl.abs(first)
    elif METRIC == _NORM:
        total = first * first
        for c in range(1, channels):
            v = _value(inputs, pixel, here, c, METRIC)
            total = total + v * v
        result = tl.sqrt_rn(total)
    else:
        count = tl.zeros_like(first) + channels
        total = first
        for c in range(1, channels):
            total = total + _value(inputs, pixel, here, c, METRIC)
        mean = tl.div_rn(total, count)
        total = (first - mean) * (first - mean)
        for c in range(1, channels):
            v = _value(inputs, pixel, here, c, METRIC) - mean
            total = total + v * v
        result = tl.sqrt_rn(tl.div_rn(total, count - 1.0))
    return result


@triton.jit
def _value(inputs, pixel, here, c, METRIC: tl.constexpr):
    """v_c of one pixel of every token."""
    planes, strides, weights, b, pixels = inputs
    at = tl.cast(c, tl.int64) * pixels + pixel
    value = tl.load(planes[0] + b * strides[0] + at, mask=here, other=0.0).to(tl.float32)
    if METRIC != _GIVEN:
        value = tl.load(weights + b * len(planes)) * value
        for j in tl.static_range(1, len(planes)):
            more = tl.load(planes[j] + b * strides[j] + at, mask=here, other=0.0).to(tl.float32)
            value = value + tl.load(weights + b * len(planes) + j) * more
    return value


@triton.jit
def _key(x):
    """An integer that orders as the number does, NaN last; 0 and -0 are one."""
    bits = x.to(tl.int32, bitcast=True)
    bits = tl.where(x == 0.0, 0, tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits))
    return tl.where(x == x, bits, _LAST)


@triton.jit
def _effective(
    effective, keys, ages, factors, oldest, middle, tokens, MINE: tl.constexpr, OTHERS: tl.constexpr
):  # fmt: skip
    """Keys of distance of rank * factors[age]."""
    b = tl.program_id(1).to(tl.int64)
    p = tl.program_id(0) * MINE + tl.arange(0, MINE)
    here = p < tokens
    keys += b * tokens
    rank = _before(keys, None, tl.load(keys + p, mask=here, other=_LAST), p, tokens, MINE, OTHERS)
    value = tl.abs(2 * rank - middle).to(tl.float32)
    if factors is not None:
        age = tl.load(ages + b * tokens + p, mask=here, other=0)
        value = value * tl.load(factors + tl.minimum(tl.maximum(age, 0), oldest))
    tl.store(effective + b * tokens + p, _key(value), mask=here)


@triton.jit
def _before(keys, without, mine, p, tokens, MINE: tl.constexpr, OTHERS: tl.constexpr):
    """How many tokens come before each of p, whose keys are `mine`; those that `without` marks are not counted."""
    found = tl.zeros((OTHERS, MINE), tl.int32)
    for first in range(0, tokens, OTHERS):
        q = first + tl.arange(0, OTHERS)
        key = tl.load(keys + q, mask=q < tokens, other=_LAST)
        less = _comes_before(key, q, mine, p)
        if without is not None:
            less = less & (tl.load(without + q, mask=q < tokens, other=1) == 0)[:, None]
        found += less.to(tl.int32)
    return tl.sum(found, axis=0)


@triton.jit
def _comes_before(key, q, mine, p):
    """[q, p]: by (key, number)."""
    same = (key[:, None] == mine[None, :]) & (q[:, None] < p[None, :])
    return (key[:, None] < mine[None, :]) | same


@triton.jit
def _forced(
    forced,
    musts,
    effective,
    ages,
    bound,
    least,
    keep,
    tokens,
    BINS: tl.constexpr,
    MINE: tl.constexpr,
    OTHERS: tl.constexpr,
    LINE: tl.constexpr,
):
    """F of the picture, and which tokens are its F oldest."""
    b = tl.program_id(1).to(tl.int64)
    p = tl.program_id(0) * MINE + tl.arange(0, MINE)
    here = p < tokens
    effective += b * tokens
    ages += b * tokens
    must = tl.minimum(_must(ages, bound, least, tokens, BINS, LINE), keep)
    tl.store(musts + b, must)  # all programs of a picture store the same
    mine, age = tl.load(effective + p, mask=here, other=_LAST), tl.load(ages + p, mask=here, other=0)
    found = tl.zeros((OTHERS, MINE), tl.int32)
    for first in range(0, tokens, OTHERS):
        q = first + tl.arange(0, OTHERS)
        inside = q < tokens
        other = tl.load(ages + q, mask=inside, other=0)
        key = tl.load(effective + q, mask=inside, other=_LAST)
        older = (other[:, None] > age[None, :]) & inside[:, None]
        same = (other[:, None] == age[None, :]) & inside[:, None]
        found += (older | (same & _comes_before(key, q, mine, p))).to(tl.int32)
    tl.store(forced + b * tokens + p, (tl.sum(found, axis=0) < must).to(tl.int32), mask=here)


@triton.jit
def _must(ages, bound, least, tokens, BINS: tl.constexpr, LINE: tl.constexpr):
    """max over s = 0 .. bound of (number of tokens with bound - age <= s) - least s, 0 at least."""
    counts = tl.zeros((BINS,), tl.int32)
    for first in range(0, tokens, LINE):
        q = first + tl.arange(0, LINE)
        age = tl.load(ages + q, mask=q < tokens, other=-1)
        counts += tl.histogram(bound - tl.minimum(tl.maximum(age, 0), bound), BINS, mask=age >= 0)
    s = tl.arange(0, BINS)
    due = tl.cumsum(counts) - least * s
    return tl.maximum(tl.max(tl.where(s <= bound, due, 0)), 0)


@triton.jit
def _chosen(
    flags, forced, musts, effective, keep, tokens, MINE: tl.constexpr, OTHERS: tl.constexpr
):  # fmt: skip
    """1 for the tokens selected: those forced, and the first of the others."""
    b = tl.program_id(1).to(tl.int64)
    p = tl.program_id(0) * MINE + tl.arange(0, MINE)
    here = p < tokens
    effective += b * tokens
    mine = tl.load(effective + p, mask=here, other=_LAST)
    if forced is None:
        chosen = _before(effective, None, mine, p, tokens, MINE, OTHERS) < keep
    else:
        forced += b * tokens
        left = keep - tl.load(musts + b)
        chosen = _before(effective, forced, mine, p, tokens, MINE, OTHERS) < left
        chosen = chosen | (tl.load(forced + p, mask=here, other=0) != 0)
    tl.store(flags + b * tokens + p, chosen.to(tl.int32), mask=here)


@triton.jit
def _write(ids, ages, flags, keep, tokens, LINE: tl.constexpr):
    """The numbers of the tokens selected, ascending; ages of all."""
    b = tl.program_id(0).to(tl.int64)
    ids += b * keep
    ages += b * tokens
    flags += b * tokens
    done = tl.zeros((), tl.int32)
    for first in range(0, tokens, LINE):
        p = first + tl.arange(0, LINE)
        here = p < tokens
        now = tl.load(flags + p, mask=here, other=0)
        at = done + tl.cumsum(now) - 1
        tl.store(ids + at, p, mask=now == 1)
        age = tl.load(ages + p, mask=here, other=0)
        tl.store(ages + p, tl.where(now == 1, 0, age + 1), mask=here)
        done += tl.sum(now)
