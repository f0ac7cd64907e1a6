"""`qk_norm_rope` on a GPU: one program for some heads of a token, or all of them where a norm covers all.

Fusion is off and the number of warps follows from heads and channels, so a token has the same bits in every batch.
"""
# Kernels are traced by triton, not typed.
# mypy: disable-error-code="no-untyped-def, untyped-decorator, assignment, attr-defined"

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from vivace.kernels.norm_modulate.triton_impl import place, why_not
from vivace.kernels.philox_normal.triton_impl import on_device

__all__ = ["qk_norm_rope", "why_not"]

ELEMENTS = 2048  # a program handles about as many, more only where a norm covers all heads
NONE, INTERLEAVED, HALF = 0, 1, 2
_INTERLEAVED, _HALF = tl.constexpr(INTERLEAVED), tl.constexpr(HALF)


def qk_norm_rope(
    query: Tensor,
    key: Tensor,
    *,
    query_weight: Tensor | None = None,
    key_weight: Tensor | None = None,
    query_bias: Tensor | None = None,
    key_bias: Tensor | None = None,
    cos: Tensor | None = None,
    sin: Tensor | None = None,
    kind: str = "rms",
    pairs: str = "interleaved",
    eps: float = 1e-6,
    rotate_from: int = 0,
    rotate_key: bool = True,
    out: tuple[Tensor, Tensor] | None = None,
) -> tuple[Tensor, Tensor]:
    """norm(x) * weight + bias of query and key, then y * cos + turned(y) * sin; one launch each."""
    if out is None:
        out = (query.new_empty(query.shape), key.new_empty(key.shape))
    way = NONE if cos is None else INTERLEAVED if pairs == "interleaved" else HALF
    rows = 0 if cos is None else cos.shape[-2]
    sides = ((query, query_weight, query_bias, way), (key, key_weight, key_bias, way if rotate_key else NONE))
    for (x, weight, bias, turn), to in zip(sides, out, strict=True):
        batch, tokens, heads, width = x.shape
        vector = weight if weight is not None else bias
        across = vector is not None and len(vector) != width
        sizes = block_sizes(heads, width, across, turn)
        if not x.numel():
            continue
        with on_device(x.device):
            _qk_norm_rope[batch * tokens, triton.cdiv(heads, sizes["HEADS"])](
                to, *to.stride()[:3], x, *x.stride()[:3], weight, bias, *_table(cos, turn), *_table(sin, turn),
                tokens, heads, width, rotate_from, rows, eps,
                KIND=kind, ACROSS=across, TURN=turn, **sizes, num_warps=warps(sizes), enable_fp_fusion=False,
            )  # fmt: skip
    return out


def block_sizes(heads: int, width: int, across: bool, turn: int) -> dict[str, int]:
    """Heads and channels of a program's tile; where halves turn, channels of one half."""
    block = int(triton.next_power_of_2(triton.cdiv(width, 2) if turn == HALF else width))
    most = int(triton.next_power_of_2(heads))
    channels = 2 * block if turn == HALF else block
    return {"HEADS": most if across else min(most, max(1, ELEMENTS // channels)), "BLOCK": block}


def warps(sizes: dict[str, int]) -> int:
    """Some sixteen elements a thread, up to the most warps there are."""
    return min(16, max(1, sizes["HEADS"] * sizes["BLOCK"] // 512))


def _table(table: Tensor | None, turn: int) -> tuple[Any, int, int]:
    """cos or sin and its strides of samples and rows."""
    if table is None or turn == NONE:
        return None, 0, 0
    return table, table.stride(0) if table.dim() == 3 and len(table) > 1 else 0, table.stride(-2)


@triton.jit
def _qk_norm_rope(
    out,
    out_sample,  # strides of samples, tokens and heads, here and below
    out_token,
    out_head,
    x,
    x_sample,
    x_token,
    x_head,
    weight,
    bias,
    cos,
    cos_sample,  # strides of samples and rows, here and below
    cos_row,
    sin,
    sin_sample,
    sin_row,
    tokens,
    heads,
    width,
    first,
    rows,
    eps,
    KIND: tl.constexpr,
    ACROSS: tl.constexpr,
    TURN: tl.constexpr,
    HEADS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    b, n = place(tokens)
    h = tl.program_id(1) * HEADS + tl.arange(0, HEADS)[:, None]
    i = tl.arange(0, BLOCK)[None, :]
    half = width // 2 if TURN == _HALF else width
    here = (h < heads) & (i < half)
    source = x + b * x_sample + n * x_token + h.to(tl.int64) * x_head
    target = out + b * out_sample + n * out_token + h.to(tl.int64) * out_head
    vector = h * width if ACROSS else h * 0
    y = tl.load(source + i, mask=here, other=0.0).to(tl.float32)
    z = y
    if TURN == _HALF:
        z = tl.load(source + half + i, mask=here, other=0.0).to(tl.float32)
    y, z = _normalised(y, z, here, heads, width, eps, KIND, ACROSS, TURN == _HALF)
    y = _affine(y, weight, bias, vector + i, here)
    if TURN == _HALF:
        z = _affine(z, weight, bias, vector + half + i, here)
    if TURN:
        r = n - first
        limit = tl.where((r >= 0) & (r < rows), half, 0)
        there = (h < heads) & (i < limit)
        cos_at, sin_at = cos + b * cos_sample + r * cos_row + i, sin + b * sin_sample + r * sin_row + i
        y, z = _rotated(y, z, cos_at, sin_at, half, there, TURN, HEADS, BLOCK)
    tl.store(target + i, y.to(out.dtype.element_ty), mask=here)
    if TURN == _HALF:
        tl.store(target + half + i, z.to(out.dtype.element_ty), mask=here)


@triton.jit
def _normalised(y, z, here, heads, width, eps, KIND: tl.constexpr, ACROSS: tl.constexpr, TWO: tl.constexpr):
    """Norm over the channels of y, and of z where TWO, by head or over all heads; corrects the mean's rounding."""
    if KIND != "none":
        count = (heads * width if ACROSS else width) * tl.full([], 1.0, tl.float32)
        offset = 0.0
        if KIND == "layer":
            mean = tl.div_rn(_total(y, z, ACROSS, TWO), count)
            y, z = tl.where(here, y - mean, 0.0), tl.where(here, z - mean, 0.0)
            rest = tl.div_rn(_total(y, z, ACROSS, TWO), count)
            offset = rest * rest
        squares = tl.div_rn(_total(y * y, z * z, ACROSS, TWO), count) - offset
        if KIND == "layer":
            squares = tl.where(squares < 0.0, 0.0, squares)  # a constant head; NaN stays
            y, z = y - rest, z - rest
        gain = tl.div_rn(1.0, tl.sqrt_rn(squares + eps))
        y, z = y * gain, z * gain
    return y, z


@triton.jit
def _total(y, z, ACROSS: tl.constexpr, TWO: tl.constexpr):
    """Sum of a head, or of all heads, [HEADS, 1] or [1, 1]."""
    total = tl.sum(y, axis=1, keep_dims=True)
    if TWO:
        total += tl.sum(z, axis=1, keep_dims=True)
    if ACROSS:
        total = tl.sum(total, axis=0, keep_dims=True)
    return total


@triton.jit
def _affine(y, weight, bias, at, here):
    if weight is not None:
        y = y * tl.load(weight + at, mask=here, other=0.0).to(tl.float32)
    if bias is not None:
        y = y + tl.load(bias + at, mask=here, other=0.0).to(tl.float32)
    return y


@triton.jit
def _rotated(y, z, cos, sin, half, there, TURN: tl.constexpr, HEADS: tl.constexpr, BLOCK: tl.constexpr):
    """y, and z where halves turn, by the tables at the same places; only where `there`."""
    c, s = tl.load(cos, mask=there, other=0.0), tl.load(sin, mask=there, other=0.0)
    if TURN == _INTERLEAVED:
        turned = y * c + _turned(y, HEADS, BLOCK) * s
    else:
        c2, s2 = tl.load(cos + half, mask=there, other=0.0), tl.load(sin + half, mask=there, other=0.0)
        turned = y * c - z * s
        z = tl.where(there, z * c2 + y * s2, z)
    return tl.where(there, turned, y), z


@triton.jit
def _turned(y, HEADS: tl.constexpr, BLOCK: tl.constexpr):
    """(y0, y1) -> (-y1, y0) for neighbours."""
    even, odd = tl.split(tl.reshape(y, [HEADS, BLOCK // 2, 2]))
    return tl.reshape(tl.join(-odd, even), [HEADS, BLOCK])
