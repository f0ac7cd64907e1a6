"""Run by test_isa.py in a process of its own, with VIVACE_CPU_ISA set: prints one digest a case, as JSON.

Each case goes through vivace._C directly (no torch) and, in numpy float32, through the definition of the solver step.
NaNs count as equal: instruction sets may carry different payloads.
"""

import hashlib
import json
import sys
from dataclasses import dataclass, field
from typing import Any

import isa_heads
import isa_kept
import isa_rows
import numpy as np

from vivace import _C
from vivace.engine import noise

SOURCES, OUTPUTS = 12, 4
OUT, ONE, NET, TENSOR, NOISE = 256, 512, 768, 1024, 65536
ALWAYS, NEVER = 0, 1 << 62  # bytes above which stores go around the cache
HALVES = {"float32": np.float32, "float16": np.float16, "bfloat16": np.uint16}


@dataclass
class Row:
    """One row: source codes, scale codes, destinations, coef[k][j], prev[k][l], clamps."""

    sources: list[int]
    to: list[int]
    coef: Any
    scales: list[int] = field(default_factory=list)
    prev: dict[tuple[int, int], float] = field(default_factory=dict)
    clamp: dict[int, tuple[float, float]] = field(default_factory=dict)

    def arrays(self) -> tuple[np.ndarray, np.ndarray]:
        ints, floats = np.zeros(32, np.int32), np.zeros(72, np.float32)
        ints[:2] = len(self.sources), len(self.to)
        ints[2 : 2 + len(self.sources)], ints[14:26] = self.sources, -1
        ints[14 : 14 + len(self.scales)] = self.scales
        ints[26 : 26 + len(self.to)] = self.to
        coef = np.zeros((OUTPUTS, SOURCES), np.float32)
        coef[: len(self.to), : len(self.sources)] = self.coef
        floats[:48], floats[64:68], floats[68:] = coef.ravel(), -np.inf, np.inf
        for (k, j), value in self.prev.items():
            floats[48 + 4 * k + j] = value
        for k, (low, high) in self.clamp.items():
            floats[64 + k], floats[68 + k] = low, high
        return ints, floats


def to_bf16(x: np.ndarray) -> np.ndarray:
    """Round to nearest even; NaN stays NaN."""
    bits = x.astype(np.float32).view(np.uint32).astype(np.uint64)
    rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
    return np.where(np.isnan(x), (bits >> 16) | 0x40, rounded).astype(np.uint16)


def widen(x: np.ndarray) -> np.ndarray:
    """float32 of a stored array; uint16 holds bfloat16."""
    return (x.astype(np.uint32) << 16).view(np.float32) if x.dtype == np.uint16 else x.astype(np.float32)


def narrow(x: np.ndarray, dtype: str) -> np.ndarray:
    """Stored form of float32 values."""
    return to_bf16(x) if dtype == "bfloat16" else x.astype(HALVES[dtype])


def values(rng: np.random.Generator, *shape: int) -> np.ndarray:
    """Normals with some zeros, subnormals, infinities and NaN among them."""
    x = rng.standard_normal(shape).astype(np.float32)
    odd = np.array([0.0, -0.0, 1e-41, -3e-39, 6e-8, 65519.9, 65520.0, 3e38, np.inf, -np.inf, np.nan], np.float32)
    where = rng.random(shape) < 0.02
    x[where] = rng.choice(odd, int(where.sum()))
    return x


@dataclass
class Problem:
    """Arguments of one call, built from a seed: pool, branch outputs, net, side-car tensors, rows of a table."""

    numel: int
    rows: list[Row]
    out_dtypes: tuple[str, ...] = ("float32", "float32")
    net_dtype: str = "float32"
    capacity: int = 3
    slots: int = 6
    offset: int = 0  # elements by which pool and net are moved off their alignment
    seed: int = 0

    def build(self) -> dict[str, Any]:
        rng = np.random.default_rng(self.seed + self.numel)
        batch = len(self.rows)
        pool = values(rng, self.slots * self.capacity * self.numel + self.offset)[self.offset :]
        net = narrow(values(rng, self.capacity * self.numel + self.offset), self.net_dtype)[self.offset :]
        arrays = [row.arrays() for row in self.rows]
        return {
            "pool": pool.reshape(self.slots, self.capacity, self.numel),
            "net": net.reshape(self.capacity, self.numel),
            # Two spare elements after each sample: a stride that is not the sample's size.
            "outs": [narrow(values(rng, batch, self.numel + 2), dtype) for dtype in self.out_dtypes],
            "tensors": [values(rng, self.numel) for _ in range(2)],
            "ints": np.stack([a[0] for a in arrays]),
            "floats": np.stack([a[1] for a in arrays]),
            "rows": list(range(batch)),
            "index": [(2 * b + 1) % self.capacity for b in range(batch)],
            "seeds": [12345 + b if b % 2 else -7 - b for b in range(batch)],
            "pictures": [b * 3 for b in range(batch)],
        }

    def kernel(self, threads: int, stream_above: int) -> list[np.ndarray]:
        a = self.build()
        _C.solver_step(
            pool=a["pool"].ctypes.data, slots=self.slots, capacity=self.capacity, numel=self.numel,
            outs=[(x.ctypes.data, self.numel + 2, d) for x, d in zip(a["outs"], self.out_dtypes, strict=True)],
            net=a["net"].ctypes.data, net_dtype=self.net_dtype, tensors=[t.ctypes.data for t in a["tensors"]],
            ints=a["ints"].ctypes.data, floats=a["floats"].ctypes.data, table_rows=len(self.rows),
            rows=a["rows"], index=a["index"], seeds=a["seeds"], pictures=a["pictures"],
            threads=threads, stream_above=stream_above,
        )  # fmt: skip
        return [a["pool"], a["net"]]

    def definition(self) -> list[np.ndarray]:
        a = self.build()
        pool, net = a["pool"], a["net"]
        for b, row in enumerate(self.rows):
            lane = a["index"][b]

            def read(code: int, b: int = b, lane: int = lane) -> np.ndarray:
                if code < OUT:
                    return pool[code, lane].copy()
                if code < ONE:
                    return widen(a["outs"][code - OUT][b, : self.numel])
                if code == ONE:
                    return np.ones(self.numel, np.float32)
                if code < NOISE:
                    return a["tensors"][code - TENSOR]
                return noise.normals(self.numel, a["seeds"][b], picture=a["pictures"][b], draw=code - NOISE)

            for to, y in zip(row.to, outputs(row, a["floats"][b], read), strict=True):
                if to == NET:
                    net[lane] = narrow(y, self.net_dtype)
                else:
                    pool[to, lane] = y
        return [pool, net]


def outputs(row: Row, floats: np.ndarray, read: Any) -> list[np.ndarray]:
    """y_k of one sample; every source is read before anything is written."""
    coef = floats[:48].reshape(OUTPUTS, SOURCES)
    scales = row.scales + [-1] * (len(row.sources) - len(row.scales))
    used = [bool((coef[: len(row.to), j] != 0).any()) for j in range(len(row.sources))]
    sources = [read(c) if u else None for c, u in zip(row.sources, used, strict=True)]
    sources = [v * read(s) if u and s != -1 else v for v, s, u in zip(sources, scales, used, strict=True)]
    results: list[np.ndarray] = []
    for k in range(len(row.to)):
        terms = [coef[k, j] * v for j, v in enumerate(sources) if coef[k, j] != 0]
        terms += [floats[48 + 4 * k + j] * y for j, y in enumerate(results) if floats[48 + 4 * k + j] != 0]
        total = terms[0] if terms else np.zeros(read(ONE).shape, np.float32)
        for term in terms[1:]:
            total = total + term
        low, high = floats[64 + k], floats[68 + k]
        total = np.where(total < low, low, total)
        results.append(np.where(total > high, high, total))
    return results


def problems() -> dict[str, Problem]:
    rng = np.random.default_rng(1)
    unipc = Row([0, OUT, OUT + 1, 1, 2, 3], [3, 0], [[1.02, -0.8, 0.3, 0, 0, 0], [0.9, 0.1, -0.2, 0.05, 0.03, -0.01]])
    fresh = Row([0, OUT, OUT + 1, 1, 2, 3], [4, 0], unipc.coef)
    full = Row(
        [0, 1, 2, 3, OUT, OUT + 1, ONE, TENSOR, NOISE + 2, NOISE + 70000, TENSOR + 1, 5],
        [0, NET, 4, 1],
        rng.standard_normal((4, 12)) * (rng.random((4, 12)) < 0.8),
        scales=[TENSOR, -1, 2, -1, TENSOR + 1, -1, 3, -1, 0, -1, -1, -1],
        prev={(1, 0): 0.5, (2, 1): -1.25, (3, 0): 2.0, (3, 2): 0.125},
        clamp={0: (-1.0, 1.0), 2: (-np.inf, 0.5), 3: (-0.25, np.inf)},
    )
    one = Row([OUT], [NET], [[1.0]])
    empty = Row([], [2], np.zeros((1, 0)))
    noisy = Row([0, NOISE], [5, 0], [[0.0, 1.0], [0.7, 0.3]])
    mixed = [unipc, full, one]
    found = {}
    for numel in (1, 2, 3, 4, 5, 15, 16, 17, 31, 33, 63, 64, 65, 123, 257, 4097):
        found[f"mixed {numel}"] = Problem(numel, mixed)
        found[f"noisy {numel}"] = Problem(numel, [noisy, empty])
    for offset in (1, 3, 4, 8):
        found[f"fresh offset {offset}"] = Problem(40_003, [fresh, full, noisy], offset=offset)
    for dtype in ("bfloat16", "float16"):
        found[f"mixed {dtype}"] = Problem(1237, mixed, (dtype, dtype), dtype)
    found["dtypes side by side"] = Problem(1237, mixed, ("float16", "bfloat16"), "bfloat16", offset=2)
    found["several chunks and threads"] = Problem(200_001, [fresh, full, unipc])
    return found


def adjust_problem(numel: int, seed: int, odd: bool) -> dict[str, Any]:
    """Rows of both kinds over a slot, a branch and noise; `odd`: among the values are NaN and infinities."""
    rng = np.random.default_rng(seed)
    row = Row([0, OUT, NOISE + 3], [-1, -1], [[1.5, -0.7, 0.25], [0.0, 1.0, 0.0]])
    threshold = Row([0, OUT, NOISE + 3], [-1], [[1.5, -0.7, 0.25]], clamp={0: (0.97, 1e6)})
    arrays = [threshold.arrays(), row.arrays()]
    arrays[0][0][31], arrays[1][0][31], arrays[1][1][64] = 1, 2, 0.7
    pool = 2.0 * rng.standard_normal((1, 2, numel)).astype(np.float32)
    pool = values(rng, 1, 2, numel) if odd else np.round(pool, 2)  # rounded: ties
    out = rng.standard_normal((2, numel)).astype(np.float32)
    return {
        "pool": pool, "out": out, "ints": np.stack([a[0] for a in arrays]), "floats": np.stack([a[1] for a in arrays]),
    }  # fmt: skip


def adjusts(numel: int, seed: int, odd: bool, threads: int) -> list[np.ndarray]:
    a = adjust_problem(numel, seed, odd)
    adjust = np.empty((2, 3), np.float32)
    _C.sample_adjust(
        adjust=adjust.ctypes.data, pool=a["pool"].ctypes.data, slots=1, capacity=2, numel=numel,
        outs=[(a["out"].ctypes.data, numel, "float32")], tensors=[], ints=a["ints"].ctypes.data,
        floats=a["floats"].ctypes.data, table_rows=2, rows=[0, 1], index=[1, 0], seeds=[5, 6], pictures=[0, 2],
        threads=threads,
    )  # fmt: skip
    return [adjust]


def defined_adjusts(numel: int, seed: int, odd: bool) -> list[np.ndarray]:
    """Quantile by sorting, interpolated in float64 (one rounding); deviations by numpy in float64."""
    a = adjust_problem(numel, seed, odd)
    y = []
    for b in range(2):
        draw = noise.normals(numel, 5 + b, picture=2 * b, draw=3)
        y.append(np.float32(1.5) * a["pool"][0, 1 - b] + np.float32(-0.7) * a["out"][b] + np.float32(0.25) * draw)
    ordered = np.sort(np.abs(y[0]))
    rank = np.float32(0.97) * np.float32(numel - 1)
    low, high = ordered[int(np.floor(rank))], ordered[int(np.ceil(rank))]
    weight, step = np.float32(rank - np.floor(rank)), high - low
    factor, base = (weight, low) if weight < 0.5 else (weight - np.float32(1), high)
    s = np.float32(float(factor) * float(step) + float(base))
    s = np.float32(np.nan) if np.isnan(ordered[-1]) else min(max(s, np.float32(1)), np.float32(1e6))
    spread = [v.astype(np.float64).std(ddof=1) for v in (y[1], a["out"][1])]
    phi = float(np.float32(0.7))
    gain = phi * (spread[1] / spread[0]) + (1.0 - phi)
    return [np.array([[-s, s, np.float32(1) / s], [-np.inf, np.inf, gain]], np.float32)]


def digest(arrays: list[np.ndarray]) -> str:
    """SHA-256 of the bits, with one NaN for all NaNs."""
    state = hashlib.sha256()
    for x in arrays:
        bits = x.view(np.uint32 if x.dtype == np.float32 else np.uint16).copy()
        bits[np.isnan(widen(x))] = 0x7FC0
        state.update(bits.tobytes())
    return state.hexdigest()


def halves() -> dict[str, list[str]]:
    """Every bfloat16 and float16 through a load; every boundary of rounding through a store."""
    found = {}
    bits = np.arange(1 << 16, dtype=np.uint16)
    edges = (bits.astype(np.uint32) << 16)[:, None] + np.array([0, 1, 0x7FFF, 0x8000, 0x8001, 0xFFFF], np.uint32)
    low = np.abs(bits.view(np.float16).astype(np.float64))
    middle = ((low[:-1] + low[1:]) / 2).astype(np.float32)  # between float16 neighbours: ties
    wide = np.concatenate([edges.ravel().view(np.float32), middle, np.nextafter(middle, np.float32(np.inf))])
    for dtype in ("bfloat16", "float16"):
        stored = bits if dtype == "bfloat16" else bits.view(np.float16)
        found[f"load {dtype}"] = [digest([copy_through(stored, dtype, "float32")]), digest([widen(stored)])]
        found[f"store {dtype}"] = [digest([copy_through(wide, "float32", dtype)]), digest([narrow(wide, dtype)])]
    return found


def copy_through(x: np.ndarray, source: str, target: str) -> np.ndarray:
    """net <- 1 * out: conversions alone."""
    ints, floats = Row([OUT], [NET], [[1.0]]).arrays()
    net = np.empty(x.size, HALVES[target])
    _C.solver_step(
        pool=x.ctypes.data, slots=0, capacity=1, numel=x.size, outs=[(x.ctypes.data, x.size, source)],
        net=net.ctypes.data, net_dtype=target, tensors=[], ints=ints.ctypes.data, floats=floats.ctypes.data,
        table_rows=1, rows=[0], index=[0], seeds=None, pictures=None, threads=1,
    )  # fmt: skip
    return net


def normals(threads: int) -> list[np.ndarray]:
    """Over a million draws: sizes with every remainder, seeds with both signs."""
    found = []
    for numel, seed, picture, draw in (
        (400_003, 7, 0, 0),
        (400_002, -1, 5, 3),
        (300_001, 1 << 40, 2, 70000),
        (2, 3, 1, 9),
    ):
        out = np.empty((2, numel), np.float32)
        _C.philox_normal(out.ctypes.data, numel, [seed, seed], [picture, picture + 1], draw, threads)
        found.append(out)
    return found


def defined_normals() -> list[np.ndarray]:
    """The same numbers from engine/noise.py."""
    wanted = ((400_003, 7, 0, 0), (400_002, -1, 5, 3), (300_001, 1 << 40, 2, 70000), (2, 3, 1, 9))
    return [np.stack([noise.normals(n, s, picture=p + i, draw=d) for i in (0, 1)]) for n, s, p, d in wanted]


def main() -> None:
    report: dict[str, list[str]] = {}  # case -> digests that must all be equal
    with np.errstate(all="ignore"):
        for name, problem in problems().items():
            runs = [(1, NEVER), (1, ALWAYS), (2, ALWAYS), (2, NEVER)]
            report[name] = [digest(problem.kernel(*run)) for run in runs] + [digest(problem.definition())]
        report["normals"] = [digest(normals(1)), digest(normals(2)), digest(defined_normals())]
        for numel in (2, 3, 15, 16, 17, 63, 64, 65, 2047, 2048, 2049, 70_001):
            for odd in (False, True):
                call = (numel, numel, odd)
                found = [digest(adjusts(*call, threads)) for threads in (1, 2)]
                report[f"adjust {numel} {odd}"] = [*found, digest(defined_adjusts(*call))]
        report |= halves()
        report |= {name: [digest(found) for found in results] for name, results in isa_rows.runs()}
        report |= {name: [digest(found) for found in results] for name, results in isa_heads.runs()}
        report |= {name: [digest(found) for found in results] for name, results in isa_kept.runs()}
    json.dump({"isa": _C.isa(), "digests": report}, sys.stdout)


if __name__ == "__main__":
    main()
