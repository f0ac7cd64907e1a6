"""The ops over rows for isa_worker.py: runs of the kernels and of their definitions in numpy, to be equal in bits."""

from collections.abc import Iterator
from typing import Any

import numpy as np

from vivace import _C

EPS = 1e-6
BATCH = 2
# tokens, width, bytes an element
SHAPES = ((3, 1), (3, 63), (3, 64), (2, 97), (5, 384), (2, 1152), (2, 4097), (4096, 640))


def runs() -> Iterator[tuple[str, list[list[np.ndarray]]]]:
    """(name, results of every run and of the definition), by shape, dtype and norm."""
    for tokens, width in SHAPES:
        for halves in (False, True):
            for centred in (False, True):
                problem = Problem(tokens, width, halves, centred)
                found = [problem.together(1), problem.apart(2), problem.definition()]
                if not halves:
                    yield f"narrow {tokens} x {width}, centred {centred}", [problem.narrow(), [problem.narrowed()]]
                yield f"rows {tokens} x {width}, bfloat16 {halves}, centred {centred}", found


class Problem:
    """One call of the three ops on normals with a few zeros, infinities and NaN, the mean of rows far off."""

    def __init__(self, tokens: int, width: int, halves: bool, centred: bool) -> None:
        rng = np.random.default_rng(tokens + width)
        self.shape, self.halves, self.centred = (BATCH, tokens, width), halves, centred

        def draw(*size: int) -> np.ndarray:
            x = rng.standard_normal(size).astype(np.float32)
            odd = np.array([0.0, -0.0, 1e-41, 1e18, np.inf, np.nan], np.float32)
            where = rng.random(size) < 2e-4
            x[where] = rng.choice(odd, int(where.sum()))
            return store(x, halves)

        self.hidden, self.update = draw(*self.shape), draw(*self.shape)
        self.hidden[:] = store(load(self.hidden) + np.float32(7.5), halves)
        self.gate, self.scale, self.shift = (draw(BATCH, 1, width) for _ in range(3))

    def rows(self, x: np.ndarray) -> tuple[int, int, int, int]:
        """An array as C++ takes it; one row a sample is shared by its tokens."""
        _, tokens, width = x.shape
        halves = int(x.dtype == np.uint16)
        return x.ctypes.data, halves, tokens * width, width if tokens == self.shape[1] else 0

    def together(self, threads: int) -> list[np.ndarray]:
        h, m = np.empty_like(self.hidden), np.empty_like(self.hidden)
        arrays = (h, m, self.hidden, self.update, self.gate, self.scale, self.shift)
        _C.adaln_modulate(*map(self.rows, arrays), None, None, self.shape, self.centred, EPS, threads)
        return [h, m]

    def apart(self, threads: int) -> list[np.ndarray]:
        h, m = np.empty_like(self.hidden), np.empty_like(self.hidden)
        arrays = (h, self.hidden, self.update, self.gate)
        _C.gated_residual(*map(self.rows, arrays), self.shape, threads)
        norm: tuple[Any, ...] = (*map(self.rows, (m, h, self.scale, self.shift)), None, None)
        _C.norm_modulate(*norm, self.shape, self.centred, EPS, threads)
        return [h, m]

    def narrow(self) -> list[np.ndarray]:
        m = np.empty(self.shape, np.uint16)
        norm: tuple[Any, ...] = (*map(self.rows, (m, self.hidden, self.scale, self.shift)), None, None)
        _C.norm_modulate(*norm, self.shape, self.centred, EPS, 2)
        return [m]

    def narrowed(self) -> np.ndarray:
        return store(self.modulated(self.hidden), True)

    def modulated(self, h: np.ndarray) -> np.ndarray:
        y = normalised(load(h), self.centred)
        return y * (np.float32(1.0) + load(self.scale)) + (np.float32(0.0) + load(self.shift))

    def definition(self) -> list[np.ndarray]:
        h = store(load(self.hidden) + load(self.gate) * load(self.update), self.halves)
        return [h, store(self.modulated(h), self.halves)]


def normalised(x: np.ndarray, centred: bool) -> np.ndarray:
    """The sums of csrc/ops/norm_modulate.inl, in its order."""
    count, rest = np.float64(x.shape[-1]), np.zeros((*x.shape[:-1], 1), np.float64)
    if centred:
        x = x - (total(x) / count).astype(np.float32)
        rest = total(x) / count
    variance = total(x * x) / count - rest * rest
    variance = np.where(variance < 0.0, 0.0, variance)
    gain = (1.0 / np.sqrt(variance + EPS)).astype(np.float32)
    return (x - rest.astype(np.float32) if centred else x) * gain


def total(x: np.ndarray) -> np.ndarray:
    """Sum of the last axis: pairs 32 apart, 32 partial sums, a tree; in float32, handed on as float64."""
    padded = np.zeros((*x.shape[:-1], -(-x.shape[-1] // 64) * 64), np.float32)
    padded[..., : x.shape[-1]] = x
    blocks = padded.reshape(*x.shape[:-1], -1, 2, 32)
    sums = np.zeros((*x.shape[:-1], 32), np.float32)
    for block in range(blocks.shape[-3]):
        sums = sums + (blocks[..., block, 0, :] + blocks[..., block, 1, :])
    half = 16
    while half:
        sums = sums[..., :half] + sums[..., half : 2 * half]
        half //= 2
    return sums.astype(np.float64)


def load(x: np.ndarray) -> np.ndarray:
    """float32 of a stored array; uint16 holds bfloat16."""
    return (x.astype(np.uint32) << 16).view(np.float32) if x.dtype == np.uint16 else x


def store(x: np.ndarray, halves: bool) -> np.ndarray:
    """Rounded to nearest even where the dtype is bfloat16."""
    if not halves:
        return x
    bits = x.view(np.uint32).astype(np.uint64)
    rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
    return np.where(np.isnan(x), (bits >> 16) | 0x40, rounded).astype(np.uint16)
