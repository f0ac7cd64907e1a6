"""gelu and qk_norm_rope for isa_worker.py: runs of the kernels and of the same steps in numpy, to be equal in bits."""

from collections.abc import Iterator

import numpy as np
from isa_rows import load, store

from vivace import _C
from vivace.kernels.gelu.terms import TANH, TERMS

EPS = 1e-6
KINDS = {"none": 0, "rms": 1, "layer": 2}
ODD = np.array([0.0, -0.0, 1e-41, 1e18, 3e38, -3e38, np.inf, -np.inf, np.nan], np.float32)


def runs() -> Iterator[tuple[str, list[list[np.ndarray]]]]:
    """(name, results of every run and of the definition)."""
    for halves in (False, True):
        for tanh in (False, True):
            for gated in (False, True):
                for width in (1, 15, 16, 17, 63, 64, 129, 300_007):
                    yield f"gelu {width} {halves} {tanh} {gated}", gelu_runs(width, halves, tanh, gated)
        for width in (1, 15, 16, 24, 64, 72, 128):
            for kind in KINDS:
                for across in (False, True):
                    for turn in ("none", "neighbours", "halves") if width % 2 == 0 else ("none",):
                        name = f"heads {width} {halves} {kind} {across} {turn}"
                        yield name, head_runs(width, halves, kind, across, turn)


def draw(rng: np.random.Generator, halves: bool, spread: float, *size: int) -> np.ndarray:
    """Normals, one in 200 something odd."""
    x = (spread * rng.standard_normal(size)).astype(np.float32)
    where = rng.random(size) < 5e-3
    x[where] = rng.choice(ODD, int(where.sum()))
    return store(x, halves)


# --- gelu ----------------------------------------------------------------------------------------------------------


def gelu_runs(width: int, halves: bool, tanh: bool, gated: bool) -> list[list[np.ndarray]]:
    x = draw(np.random.default_rng(width), halves, 3.0, 2, 2 if gated else 1, width)
    found = []
    for threads in (1, 2):
        out = np.empty((2, width), x.dtype)
        step = x.strides[0] // x.itemsize
        source = (x.ctypes.data, int(halves), 0, step)
        gate = (x.ctypes.data + width * x.itemsize, int(halves), 0, step) if gated else None
        _C.gelu((out.ctypes.data, int(halves), 0, width), source, gate, (1, 2, width), tanh, threads)
        found.append([out])
    wide = load(x)
    y = by_tanh(wide[:, -1], halves) if tanh else by_erf(wide[:, -1], halves)
    return [*found, [store(wide[:, 0] * y if gated else y, halves)]]


def horner(x: np.ndarray, coefficients: tuple[float, ...]) -> np.ndarray:
    y = x * np.float32(coefficients[-1]) + np.float32(coefficients[-2])
    for c in coefficients[-3::-1]:
        y = y * x + np.float32(c)
    return y


def by_erf(x: np.ndarray, halves: bool) -> np.ndarray:
    terms = TERMS["bfloat16" if halves else "float32"]
    near = np.clip(x, np.float32(-terms.limit), np.float32(terms.limit))
    square = near * near
    return (near * horner(square, terms.p) / horner(square, terms.q) + np.float32(0.5)) * x


def by_tanh(x: np.ndarray, halves: bool) -> np.ndarray:
    terms, magic = TERMS["bfloat16" if halves else "float32"], np.float32(1.5 * 2**23)
    near = np.clip(horner(x * x, TANH) * x, np.float32(-126.0), np.float32(128.0))
    shifted = near + magic
    fraction = horner(near - (shifted - magic), terms.exp2)
    power = (fraction.view(np.uint32) + (shifted.view(np.uint32) << np.uint32(23))).view(np.float32)
    return x / (power + np.float32(1.0))


# --- queries and keys ----------------------------------------------------------------------------------------------

BATCH, TOKENS, HEADS = 2, 3, 18  # more heads than the kernel takes at a time


def head_runs(width: int, halves: bool, kind: str, across: bool, turn: str) -> list[list[np.ndarray]]:
    rng = np.random.default_rng(width)
    x = draw(rng, halves, 1.0, BATCH, TOKENS, HEADS, width)
    x[:, 0] = store(load(x[:, 0]) + np.float32(50.0), halves)
    size = width * (HEADS if across else 1)
    weight, bias = rng.standard_normal((2, size)).astype(np.float32)
    cos, sin = rng.standard_normal((2, TOKENS - 1, width)).astype(np.float32)
    vectors = [] if kind == "none" else [weight, store(bias, halves)]
    found = []
    for threads in (1, 2):
        outs = [np.empty_like(x), np.empty_like(x)]
        numbers = [side(x, out, vectors) for out in outs]
        rotation = (cos.ctypes.data, 0, width, sin.ctypes.data, 0, width, 1, TOKENS - 1)
        _C.qk_norm_rope(
            *numbers, None if turn == "none" else rotation, False, turn == "halves", BATCH, width, int(halves),
            KINDS[kind], EPS, threads,
        )  # fmt: skip
        found.append(outs)
    y = normalised(load(x), kind, across)
    for vector, step in zip(map(load, vectors), (np.multiply, np.add), strict=False):
        y = step(y, vector.reshape(-1, width))
    turned = y.copy()
    if turn != "none":
        turned[:, 1:] = y[:, 1:] * cos[:, None] + partner(y[:, 1:], turn) * sin[:, None]
    return [*found, [store(turned, halves), store(y, halves)]]


def side(x: np.ndarray, out: np.ndarray, vectors: list[np.ndarray]) -> tuple[int, ...]:
    """Queries or keys as C++ takes them; float32 weight, bias of the dtype of x."""
    _, tokens, heads, width = x.shape
    strides = (tokens * heads * width, heads * width, width)
    places = [(v.ctypes.data, int(v.dtype == np.uint16), v.size) for v in vectors] or [(0, 0, 0)] * 2
    return (x.ctypes.data, *strides, out.ctypes.data, *strides, *places[0], *places[1], tokens, heads)


def normalised(x: np.ndarray, kind: str, across: bool) -> np.ndarray:
    """The sums of csrc/ops/qk_norm_rope.inl, in its order."""
    if kind == "none":
        return x
    part = 1.0 / (x.shape[-1] * (x.shape[-2] if across else 1))
    rest = np.zeros((*x.shape[:2], 1 if across else x.shape[2], 1))
    if kind == "layer":
        x = x - (total(x, across) * part).astype(np.float32)
        rest = total(x, across) * part
    variance = total(x * x, across) * part - rest * rest
    variance = np.where(variance < 0.0, 0.0, variance)
    return (x - rest.astype(np.float32)) * (1.0 / np.sqrt(variance + EPS)).astype(np.float32)


def total(x: np.ndarray, across: bool) -> np.ndarray:
    """Sum of a head, or of all heads: element i in lane i mod 16, a tree of lanes; in float32, handed on as float64."""
    padded = np.zeros((*x.shape[:-1], -(-x.shape[-1] // 16) * 16), np.float32)
    padded[..., : x.shape[-1]] = x
    groups = padded.reshape(*x.shape[:2], 1 if across else x.shape[2], -1, 16)
    lanes = np.zeros((*groups.shape[:-2], 16), np.float32)
    for g in range(groups.shape[-2]):
        lanes = lanes + groups[..., g, :]
    half = 8
    while half:
        lanes = lanes[..., :half] + lanes[..., half : 2 * half]
        half //= 2
    return lanes.astype(np.float64)


def partner(y: np.ndarray, turn: str) -> np.ndarray:
    if turn == "neighbours":
        return np.stack((-y[..., 1::2], y[..., ::2]), axis=-1).reshape(y.shape)
    half = y.shape[-1] // 2
    return np.concatenate((-y[..., half:], y[..., :half]), axis=-1)
