"""Counter-based normal noise: Philox4x32-10 words, Box-Muller in float32. This module is the definition.

Layout: element i of a sample (flat index), picture j, draw k of a request with a 64-bit seed:

    counter = (i >> 2 low 32 bits, i >> 2 high 32 bits, j, k)      key = (seed low, seed high)
    word(i) = philox(counter, key)[i & 3]                          u(i) = float32(word) * 2^-32 + 2^-33   in (0, 1]
    elements 4c, 4c+1:  r = sqrt(-2 ln u(4c)),    n = r cos(2 pi u(4c+1)), r sin(2 pi u(4c+1))
    elements 4c+2, 4c+3: the same with words 2 and 3

Any element is found without those before it, so noise does not depend on batch, slot, thread or device. The integers
are exact everywhere. The normals are a fixed sequence of float32 operations, each rounded on its own (no fused
multiply-add, no library log, sin or cos), so the C++ kernels repeat them bit for bit; the largest difference from the
same formula in float64 is below 1e-6.

Sources: J. Salmon, M. Moraes, R. Dror, D. Shaw, "Parallel random numbers: as easy as 1, 2, 3", 2011 (Philox4x32-10);
G. Box and M. Muller, "A note on the generation of random normal deviates", 1958.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

ROUNDS = 10
MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)  # of counter words 0 and 2
KEY_STEPS = (0x9E3779B9, 0xBB67AE85)  # golden ratio and sqrt(3) - 1, added to the key every round
_LOW = 0xFFFFFFFF
_BLOCK = 1 << 15  # counters at a time: temporaries stay in cache

# Coefficients: minimax fits of our own, rounded to float32, written exactly; csrc/ops/philox_normal.inl has the same.
# ln(1 + x) = x - x^2/2 + x^3 P(x) for x in [1/sqrt(2) - 1, sqrt(2) - 1]; relative error 6e-9, lowest degree first.
LOG_POLY = (
    float.fromhex("0x1.555554p-2"), float.fromhex("-0x1.000228p-2"), float.fromhex("0x1.99a008p-3"),
    float.fromhex("-0x1.547244p-3"), float.fromhex("0x1.22da22p-3"), float.fromhex("-0x1.0d8552p-3"),
    float.fromhex("0x1.055b46p-3"), float.fromhex("-0x1.38b4ccp-4"),
)  # fmt: skip
LN2_HIGH = float.fromhex("0x1.63p-1")  # few bits: exponent times this is exact
LN2_LOW = float.fromhex("-0x1.bd0106p-13")  # ln 2 - LN2_HIGH
SQRT_HALF_BITS = 0x3F3504F3  # float32 bits of 1/sqrt(2): mantissas are taken in [1/sqrt(2), sqrt(2))
# sin(pi/2 f) = f S(f^2) and cos(pi/2 f) = 1 + f^2 C(f^2) for f in [-1/2, 1/2]; absolute error 4e-9.
SIN_POLY = tuple(
    float.fromhex(c) for c in ("0x1.921fb6p+0", "-0x1.4abbbap-1", "0x1.465ec6p-4", "-0x1.2d9bb8p-8")
)  # fmt: skip
COS_POLY = tuple(
    float.fromhex(c) for c in ("-0x1.3bd3ccp+0", "0x1.03c1dep-2", "-0x1.55c664p-6", "0x1.d9f7bap-11")
)  # fmt: skip

Words = NDArray[np.uint32]
Floats = NDArray[np.float32]


def philox_words(seed: int, picture: int, draw: int, count: int, *, first: int = 0) -> Words:
    """Words of elements first .. first + count - 1: philox4x32-10(counter(i >> 2, picture, draw), seed)[i & 3].

    Args:
        seed: 64-bit key; a negative number stands for its two's complement bits.
        picture, draw: the two upper counter words; low 32 bits are used.
        count, first: elements wanted and flat index of the first one.
    Returns: uint32 [count]. All-zero arguments begin 6627e8d5 e169c58d bc57ac4c 9b00dbd8.
    """
    start, stop = first >> 2, (first + count + 3) >> 2
    words = np.empty((stop - start, 4), np.uint32)
    for low in range(start, stop, _BLOCK):
        high = min(low + _BLOCK, stop)
        words[low - start : high - start] = _philox(np.arange(low, high, dtype=np.uint64), picture, draw, seed)
    return words.reshape(-1)[first & 3 :][:count]


def normals(shape: int | Sequence[int], seed: int, *, picture: int = 0, draw: int = 0) -> Floats:
    """Unit normals, element i = normal(seed, picture, draw, i): sqrt(-2 ln u0) (cos, sin)(2 pi u1).

    Args:
        shape: of one sample, without a batch axis; filled in row-major order.
        seed: 64-bit key of the request; picture: which picture of it; draw: which draw (`noise:k`).
    Returns: float32 [*shape], the same bits on every machine.
    Source: Box and Muller 1958; float32 polynomials as in this module.
    """
    size = (shape,) if isinstance(shape, int) else tuple(int(n) for n in shape)
    count = math.prod(size)
    out = np.empty(count, np.float32)
    for low in range(0, count, 4 * _BLOCK):
        high = min(low + 4 * _BLOCK, count)
        words = philox_words(seed, picture, draw, -(-(high - low) // 4) * 4, first=low)
        out[low:high] = box_muller(words)[: high - low]
    return out.reshape(size)


def box_muller(words: Words) -> Floats:
    """Pairs of words to pairs of normals: (w0, w1) -> r cos(2 pi u1), r sin(2 pi u1); even count in, same count out."""
    radius = np.sqrt(log_uniform(words[0::2]) * np.float32(-2.0))
    cosine, sine = cos_sin_turns(words[1::2])
    out = np.empty(words.size, np.float32)
    np.multiply(radius, cosine, out=out[0::2])
    np.multiply(radius, sine, out=out[1::2])
    return out


def uniform(words: Words) -> Floats:
    """u = float32(word) * 2^-32 + 2^-33, in (0, 1]: never 0, so that ln u is finite."""
    return words.astype(np.float32) * np.float32(2.0**-32) + np.float32(2.0**-33)


def log_uniform(words: Words) -> Floats:
    """ln u(word) in float32: u = 2^e m with m in [1/sqrt(2), sqrt(2)), then e ln 2 + ln(1 + (m - 1))."""
    bits = uniform(words).view(np.int32)
    shift = (bits - np.int32(SQRT_HALF_BITS)) >> 23
    e: Floats = shift.astype(np.float32)
    x: Floats = (bits - (shift << 23)).view(np.float32) - np.float32(1.0)
    z: Floats = x * x
    y: Floats = (x * z) * _horner(x, LOG_POLY)
    y -= z * np.float32(0.5)
    y += e * np.float32(LN2_LOW)
    y += x
    y += e * np.float32(LN2_HIGH)
    return y


def cos_sin_turns(words: Words) -> tuple[Floats, Floats]:
    """cos and sin of 2 pi u(word): the top bits give the nearest quarter turn k, the rest f = 4u - k is exact."""
    nearest = ((words >> np.uint32(29)) + np.uint32(1)) >> np.uint32(1)  # 0..4
    f = uniform(words) * np.float32(4.0) - nearest.astype(np.float32)
    z = f * f
    s = f * _horner(z, SIN_POLY)
    c = z * _horner(z, COS_POLY) + np.float32(1.0)
    odd = (nearest & np.uint32(1)) != 0
    cosine, sine = np.where(odd, s, c), np.where(odd, c, s)
    # Signs by flipping the top bit: cos is negative in quarters 1 and 2, sin in quarters 2 and 3.
    cosine.view(np.uint32)[...] ^= ((nearest + np.uint32(1)) & np.uint32(2)) << np.uint32(30)
    sine.view(np.uint32)[...] ^= (nearest & np.uint32(2)) << np.uint32(30)
    return cosine, sine


def _horner(x: Floats, coefficients: tuple[float, ...]) -> Floats:
    """Polynomial, lowest coefficient first; one rounded multiplication and one rounded addition a degree."""
    acc: Floats = x * np.float32(coefficients[-1]) + np.float32(coefficients[-2])
    for c in reversed(coefficients[:-2]):
        acc = acc * x + np.float32(c)
    return acc


def _philox(index: NDArray[np.uint64], picture: int, draw: int, seed: int) -> Words:
    """Ten rounds on counters (index low, index high, picture, draw); uint32 [n, 4]."""
    low, half = np.uint64(_LOW), np.uint64(32)
    c0, c1 = index & low, index >> half
    c2, c3 = np.full_like(index, picture & _LOW), np.full_like(index, draw & _LOW)
    key0, key1 = seed & _LOW, (seed >> 32) & _LOW
    for _ in range(ROUNDS):
        p0, p1 = c0 * np.uint64(MULTIPLIERS[0]), c2 * np.uint64(MULTIPLIERS[1])
        c0, c1 = (p1 >> half) ^ c1 ^ np.uint64(key0), p1 & low
        c2, c3 = (p0 >> half) ^ c3 ^ np.uint64(key1), p0 & low
        key0, key1 = (key0 + KEY_STEPS[0]) & _LOW, (key1 + KEY_STEPS[1]) & _LOW
    return np.stack([c0, c1, c2, c3], axis=-1).astype(np.uint32)
