"""The ops over kept planes for isa_worker.py: runs of the kernels and of their definition in numpy, equal in bits."""

from collections.abc import Iterator
from typing import Any

import numpy as np
from isa_rows import load, store

from vivace import _C

BATCH, PLANES, LANES = 2, 3, 4
AT = [3, 1]  # lanes of the rows
NO_IDS = 0, 1, 0  # all tokens
# tokens, width
SHAPES = ((3, 1), (3, 63), (2, 97), (5, 384), (2, 1152), (700, 640))
STORES = {"float32": np.float32, "bfloat16": np.uint16, "float16": np.float16, "int8": np.int8, "float8": np.uint8}
CODES = {name: code for code, name in enumerate(("float32", "bfloat16", "float16", "int8", "float8"))}


def runs() -> Iterator[tuple[str, list[list[np.ndarray]]]]:
    """(name, results of every run and of the definition), by shape, store and dtype of the rows."""
    for tokens, width in SHAPES:
        for name in STORES:
            for halves in (False, True) if width != 640 else (name == "bfloat16",):  # long enough for two threads
                problem = Problem(tokens, width, name, halves)
                found = [problem.kernels(1), problem.kernels(2), problem.definition()]
                yield f"kept {tokens} x {width}, {name}, bfloat16 {halves}", found


class Problem:
    """A range's change kept with two differences and added, then forecast from them and added."""

    def __init__(self, tokens: int, width: int, name: str, halves: bool) -> None:
        rng = np.random.default_rng(tokens + width)
        self.shape, self.name = (BATCH, tokens, width), name

        def draw(*size: int) -> np.ndarray:
            x = rng.standard_normal(size).astype(np.float32) * np.float32(2.0) ** rng.integers(-12, 4, size)
            odd = np.array([0.0, -0.0, 1e-41, 1e6, np.inf, np.nan], np.float32)
            where = rng.random(size) < 2e-4
            x[where] = rng.choice(odd, int(where.sum()))
            return store(x.astype(np.float32), halves)

        self.fresh, self.base, self.hidden = (draw(*self.shape) for _ in range(3))
        self.gate = draw(BATCH, 1, width)
        self.weights = rng.standard_normal((BATCH, PLANES)).astype(np.float32)
        planes = (LANES, PLANES, tokens, width)
        self.scales = rng.random(planes[:-1]).astype(np.float32) / np.float32(50.0)
        self.kept, _ = narrowed(rng.standard_normal(planes).astype(np.float32), name)

    def rows(self, x: np.ndarray) -> tuple[int, int, int, int]:
        """An array as C++ takes it; one row a sample is shared by its tokens."""
        _, tokens, width = x.shape
        return x.ctypes.data, int(x.dtype == np.uint16), tokens * width, width if tokens == self.shape[1] else 0

    def kernels(self, threads: int) -> list[np.ndarray]:
        kept, scales = self.kept.copy(), self.scales.copy()
        h, m = np.empty_like(self.hidden), np.empty_like(self.hidden)
        planes = (kept.ctypes.data, CODES[self.name], LANES, PLANES, scales.ctypes.data)
        hidden, gate = self.rows(self.hidden), self.rows(self.gate)
        into: tuple[Any, ...] = (self.rows(self.fresh), self.rows(self.base), PLANES - 1, hidden, gate, self.rows(h))
        _C.cache_update(planes, AT, *into, NO_IDS, self.shape, threads)
        weights = self.weights.ctypes.data
        _C.cache_apply(planes, AT, weights, PLANES, hidden, gate, self.rows(m), NO_IDS, self.shape, threads)
        return [self.shown(kept), scales, h, m]

    def definition(self) -> list[np.ndarray]:
        kept, scales, at = self.kept.copy(), self.scales.copy(), np.array(AT)
        halves = self.fresh.dtype == np.uint16
        f = load(self.fresh) - load(self.base)
        h = store(load(self.hidden) + load(self.gate) * f, halves)
        for j in range(PLANES):
            old = widened(kept[at, j], scales[at, j], self.name)
            kept[at, j], factor = narrowed(f, self.name)
            if self.name == "int8":
                scales[at, j] = factor
            f = f - old
        v = self.weights[:, 0, None, None] * widened(kept[at, 0], scales[at, 0], self.name)
        for j in range(1, PLANES):
            v = v + self.weights[:, j, None, None] * widened(kept[at, j], scales[at, j], self.name)
        return [self.shown(kept), scales, h, store(load(self.hidden) + load(self.gate) * v, halves)]

    def shown(self, kept: np.ndarray) -> np.ndarray:
        """Numbers of all planes, without their scales."""
        return widened(kept, np.ones(kept.shape[:-1], np.float32), self.name)


def widened(plane: np.ndarray, scales: np.ndarray, name: str) -> np.ndarray:
    """float32 of a plane."""
    if name == "int8":
        return plane.astype(np.float32) * scales[..., None]
    if name == "float8":
        return NUMBERS[plane]
    return load(plane).astype(np.float32)


def narrowed(x: np.ndarray, name: str) -> tuple[np.ndarray, np.ndarray | None]:
    """A plane of float32 as it is stored, and scales of int8."""
    if name == "int8":
        most = np.abs(x).max(-1)
        scale = most / np.float32(127.0)
        scale = np.where(scale == 0.0, np.float32(1.0), scale)
        finite = np.isfinite(most)[..., None]
        q = np.where(finite, np.clip(np.rint(x / scale[..., None]), -127.0, 127.0), 0.0)
        return q.astype(np.int8), np.where(finite[..., 0], scale, np.float32(np.nan))
    if name == "float8":
        return to_float8(x), None
    return (x.astype(np.float16) if name == "float16" else store(x, name == "bfloat16")), None


def to_float8(x: np.ndarray) -> np.ndarray:
    """Codes of e4m3: half to even, cut off at 448."""
    size = np.where(np.isnan(x), 0.0, np.minimum(np.abs(x), 448.0)).astype(np.float64)
    power = np.where(size < 2.0**-6, -6, np.frexp(size)[1] - 1)
    code = np.rint(np.ldexp(size, 3 - power)).astype(np.int64) + 8 * (power + 6)
    return (np.where(np.isnan(x), 127, code) + 128 * np.signbit(x)).astype(np.uint8)


def float8_numbers() -> np.ndarray:
    """The number of each code."""
    codes = np.arange(256)
    exponent, fraction = codes >> 3 & 15, codes & 7
    size = np.ldexp(fraction + 8.0 * (exponent > 0), np.maximum(exponent, 1) - 10)
    size[(codes & 127) == 127] = np.nan
    return np.copysign(size, np.where(codes > 127, -1.0, 1.0)).astype(np.float32)


NUMBERS = float8_numbers()
