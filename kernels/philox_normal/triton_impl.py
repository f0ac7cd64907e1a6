"""`philox_normal` on a GPU, and the device functions that other kernels make noise with.

The float32 operations of `vivace.engine.noise`, one by one. Kernels that use `normal_block` must be launched with
`enable_fp_fusion=False`: a fused multiply-add would round once where the definition rounds twice.
"""
# Kernels are traced by triton, not typed.
# mypy: disable-error-code="no-untyped-def, untyped-decorator, assignment"

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from vivace.engine import noise
from vivace.kernels.spec import interpreted

BLOCK = 1024  # elements a program writes; a multiple of 4
WARPS = 4

_ROUNDS = tl.constexpr(noise.ROUNDS)
_MULTIPLIER0, _MULTIPLIER1 = (tl.constexpr(m) for m in noise.MULTIPLIERS)
_KEY_STEP0, _KEY_STEP1 = (tl.constexpr(k) for k in noise.KEY_STEPS)
_LOG_POLY, _SIN_POLY, _COS_POLY = (tl.constexpr(p) for p in (noise.LOG_POLY, noise.SIN_POLY, noise.COS_POLY))
_LOG_DEGREE, _TURN_DEGREE = tl.constexpr(len(noise.LOG_POLY) - 1), tl.constexpr(len(noise.SIN_POLY) - 1)
_LN2_HIGH, _LN2_LOW = tl.constexpr(noise.LN2_HIGH), tl.constexpr(noise.LN2_LOW)
_SQRT_HALF_BITS = tl.constexpr(noise.SQRT_HALF_BITS)


def why_not(device: str, dtype: str) -> str | None:
    """Why this cannot run on tensors of `device`; None when it can."""
    return None if device == ("cpu" if interpreted() else "cuda") else f"it runs on CUDA tensors, these are on {device}"


def philox_normal(
    shape: Sequence[int], seeds: Tensor, pictures: Tensor, draw: int = 0, *, device: torch.device | str = "cuda"
) -> Tensor:
    """n[b, i] = Box-Muller of philox4x32-10(counter (i >> 2, pictures[b], draw), key seeds[b]), word i & 3."""
    out = torch.empty(len(seeds), *shape, device=device)
    size = math.prod(shape)
    if out.numel():
        seeds, pictures = (t.to(out.device, non_blocking=True) for t in (seeds, pictures))
        draw = draw - (1 << 32) if draw >= 1 << 31 else draw  # the low 32 bits, as an int32 argument
        with on_device(out.device):
            _philox_normal[triton.cdiv(size, BLOCK), len(seeds)](
                out, seeds, pictures, draw, size, BLOCK=BLOCK, num_warps=WARPS, enable_fp_fusion=False
            )
    return out


def on_device(device: torch.device) -> Any:
    """Makes `device` the current one for a launch."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


@triton.jit
def _philox_normal(out, seeds, pictures, draw, size, BLOCK: tl.constexpr):
    sample = tl.program_id(1).to(tl.int64)
    first = tl.program_id(0).to(tl.int64) * BLOCK
    normals = normal_block(tl.load(seeds + sample), tl.load(pictures + sample), draw, first, BLOCK)
    element = first + tl.arange(0, BLOCK)
    tl.store(out + sample * size + element, normals, mask=element < size)


@triton.jit
def normal_block(seed, picture, draw, first, BLOCK: tl.constexpr):
    """Normals of elements first .. first + BLOCK - 1; first and BLOCK are multiples of 4, a counter makes four."""
    word0, word1, word2, word3 = philox_block(seed, picture, draw, first, BLOCK)
    n0, n1 = _box_muller(word0, word1)
    n2, n3 = _box_muller(word2, word3)
    return tl.interleave(tl.interleave(n0, n2), tl.interleave(n1, n3))


@triton.jit
def philox_block(seed, picture, draw, first, BLOCK: tl.constexpr):
    """Words 0..3, uint32 [BLOCK // 4] each, of the counters of `normal_block`."""
    counter = first // 4 + tl.arange(0, BLOCK // 4)
    c0, c1 = counter.to(tl.uint32), (counter >> 32).to(tl.uint32)
    c2 = tl.zeros_like(c0) + picture.to(tl.uint32)
    c3 = tl.zeros_like(c0) + draw.to(tl.uint32)
    key0, key1 = seed.to(tl.uint32), (seed >> 32).to(tl.uint32)
    for _ in tl.static_range(_ROUNDS):
        high0, low0 = _multiply(c0, _MULTIPLIER0)
        high1, low1 = _multiply(c2, _MULTIPLIER1)
        c0, c1, c2, c3 = high1 ^ c1 ^ key0, low1, high0 ^ c3 ^ key1, low0
        key0 = _wrapping_add(key0, _KEY_STEP0)
        key1 = _wrapping_add(key1, _KEY_STEP1)
    return c0, c1, c2, c3


@triton.jit
def _multiply(word, MULTIPLIER: tl.constexpr):
    """High and low 32 bits of the product."""
    product = word.to(tl.uint64) * MULTIPLIER
    return (product >> 32).to(tl.uint32), product.to(tl.uint32)


@triton.jit
def _wrapping_add(word, STEP: tl.constexpr):
    return (word.to(tl.uint64) + STEP).to(tl.uint32)


@triton.jit
def _uniform(word):
    """float32(word) * 2^-32 + 2^-33."""
    return word.to(tl.float32) * 2.3283064365386963e-10 + 1.1641532182693481e-10


@triton.jit
def _horner(x, COEFFICIENTS: tl.constexpr, DEGREE: tl.constexpr):
    """Polynomial, lowest coefficient first."""
    acc = x * COEFFICIENTS[DEGREE] + COEFFICIENTS[DEGREE - 1]
    for i in tl.static_range(2, DEGREE + 1):
        acc = acc * x + COEFFICIENTS[DEGREE - i]
    return acc


@triton.jit
def _log_uniform(word):
    """ln u: u = 2^e m with m in [1/sqrt(2), sqrt(2)), then e ln 2 + ln(1 + (m - 1))."""
    bits = _uniform(word).to(tl.int32, bitcast=True)
    shift = (bits - _SQRT_HALF_BITS) >> 23
    e = shift.to(tl.float32)
    x = (bits - (shift << 23)).to(tl.float32, bitcast=True) - 1.0
    z = x * x
    y = (x * z) * _horner(x, _LOG_POLY, _LOG_DEGREE)
    y = y - z * 0.5
    y = y + e * _LN2_LOW
    y = y + x
    return y + e * _LN2_HIGH


@triton.jit
def _box_muller(word0, word1):
    """r cos(2 pi u1), r sin(2 pi u1) with r = sqrt(-2 ln u0)."""
    radius = tl.sqrt_rn(_log_uniform(word0) * -2.0)
    nearest = ((word1 >> 29) + 1) >> 1  # quarter turn, 0..4
    f = _uniform(word1) * 4.0 - nearest.to(tl.float32)
    z = f * f
    s = f * _horner(z, _SIN_POLY, _TURN_DEGREE)
    c = z * _horner(z, _COS_POLY, _TURN_DEGREE) + 1.0
    odd = (nearest & 1) != 0
    cosine = _flip(tl.where(odd, s, c), (nearest + 1) & 2)
    sine = _flip(tl.where(odd, c, s), nearest & 2)
    return radius * cosine, radius * sine


@triton.jit
def _flip(value, two):
    """The sign changes where `two` is 2 and stays where it is 0."""
    return (value.to(tl.uint32, bitcast=True) ^ (two << 30)).to(tl.float32, bitcast=True)
