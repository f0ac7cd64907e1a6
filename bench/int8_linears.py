"""INT8 linears of DiT-XL/2, all they do in one call, against bare products of oneDNN and its float32 linears.

Ours takes bfloat16 rows: it quantizes them by token, multiplies, and adds bias, GELU, gate and residual. The bare INT8
products get integers and give sums (`torch._int_mm`) or sums times scales (`qlinear_pointwise`, on unsigned integers
with zero point 128: signed ones run in a loop of its reference); nothing else. The float32 ones (`F.linear`, and
oneDNN's with a weight in its own order) leave out all but the product too.

Floor: the operations at the rate of dot products of 8-bit integers from registers and the first-level cache, measured
in the same rounds on the same threads.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from vivace.bench.harness import Candidate, Claim, Timing, interleave, ratio_of_medians
from vivace.errors import BackendError
from vivace.kernels.int8_linear import SPEC, int8_linear
from vivace.kernels.linear import pack_weight
from vivace.kernels.spec import CPU, REFERENCE, error_of, missing, within_tolerance

SEED = 7
OURS, FLOOR = "vivace", "products"
BARE = ("torch._int_mm", "onednn qlinear")
FLOAT32 = ("torch float32", "onednn float32")
ROWS = (256, 512, 1024)
# name -> (K, N, activation, gate and residual)
LINEARS: dict[str, tuple[int, int, str, bool]] = {
    "qkv": (1152, 3456, "none", False),
    "out": (1152, 1152, "none", True),
    "up": (1152, 4608, "gelu_tanh", False),
    "down": (4608, 1152, "none", True),
}
INT8 = 3  # code of run_products
STEPS = 50  # of products a timed call of the floor does
SECONDS = {True: 0.8, False: 2.5}  # of timed rounds a shape, quick or not
FUSED, WIDE = "denoiser.int8_fused_vs_bare_onednn", "denoiser.int8_linear_vs_fp32"
BOUNDS = {FUSED: 0.92, WIDE: 3.6}


@dataclass(frozen=True, eq=False)
class Problem:
    """One linear: float32 numbers and their integers, what the epilogue takes, and where results in place go."""

    x: Tensor  # bfloat16 [rows, K]
    q: Tensor  # int8 [rows, K], any integers: times do not depend on them
    weight: Tensor  # int8 [N, K]
    weight_scale: Tensor
    bias: Tensor
    activation: str
    gate: Tensor | None
    hidden: Tensor | None  # float32 [rows, N], the residual and the result

    @property
    def operations(self) -> int:
        return 2 * self.x.numel() * len(self.weight)

    def ours(self, weight: Any, backend: str, *, double: bool = False, out: Tensor | None = None) -> Tensor:
        """The whole linear; double: in float64."""

        def wide(tensor: Tensor | None) -> Any:
            return tensor.double() if double and tensor is not None else tensor

        dtype = torch.float64 if double else torch.bfloat16 if self.hidden is None else torch.float32
        return int8_linear(
            wide(self.x), weight, None, wide(self.weight_scale), wide(self.bias), activation=self.activation,
            gate=wide(self.gate), residual=wide(self.hidden), out=out, out_dtype=dtype, backend=backend,
        )  # fmt: skip


def problem(rows: int, linear: str) -> Problem:
    """Unit normals and results of about unit size."""
    generator = torch.Generator().manual_seed(SEED)
    depth, columns, activation, ends = LINEARS[linear]

    def normals(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    def integers(*shape: int) -> Tensor:
        return torch.randint(-127, 128, shape, generator=generator, dtype=torch.int8)

    scale = (torch.rand(columns, generator=generator) + 0.5) / (73.0 * depth**0.5)
    gate, hidden = (normals(columns), normals(rows, columns)) if ends else (None, None)
    x = normals(rows, depth).bfloat16()
    q, weight = integers(rows, depth), integers(columns, depth)
    return Problem(x, q, weight, scale, normals(columns), activation, gate, hidden)


def check(one: Problem, packed: Any) -> float:
    """Error of ours against float64. Raises BackendError beyond the tolerance rule."""
    ours, eager = one.ours(packed, CPU), one.ours(one.weight, REFERENCE)
    exact = one.ours(one.weight, REFERENCE, double=True)
    holds, error, bound = within_tolerance(ours, eager, exact)
    if not holds:
        raise BackendError(f"bench {SPEC.name}: error {error:.3g} exceeds {bound:.3g}; nothing was timed")
    return error


def candidates(one: Problem, packed: Any) -> dict[str, Candidate]:
    """Everything that is timed. Raises BackendError when a peer computes something else."""
    from vivace import _C

    own, threads = one.hidden, torch.get_num_threads()
    found = {
        OURS: Candidate(lambda: one.ours(packed, CPU, out=own)),
        FLOOR: Candidate(lambda: _C.run_products(INT8, STEPS, threads)),
        BARE[0]: Candidate(lambda: torch._int_mm(one.q, one.weight.T)),
    }
    wide, weight = one.x.float(), one.weight.float()
    found[FLOAT32[0]] = Candidate(lambda: functional.linear(wide, weight))
    if torch.backends.mkldnn.is_available():
        product = qlinear(one)
        if error_of(product(), torch._int_mm(one.q, one.weight.T).float() * one.weight_scale) > 1e-5:
            raise BackendError(f"bench {SPEC.name}: qlinear_pointwise computes something else; nothing was timed")
        found[BARE[1]] = Candidate(product)
        mkldnn: Any = torch.ops.mkldnn
        ordered = mkldnn._reorder_linear_weight(weight)
        found[FLOAT32[1]] = Candidate(lambda: mkldnn._linear_pointwise(wide, ordered, None, "none", [], ""))
    return found


def qlinear(one: Problem) -> Callable[[], Tensor]:
    """oneDNN's product of unsigned integers with a weight in its own order."""
    onednn: Any = torch.ops.onednn
    packed = onednn.qlinear_prepack(one.weight, list(one.q.shape))
    unsigned, zeros = (one.q.short() + 128).to(torch.uint8), torch.zeros(len(one.weight), dtype=torch.int64)
    options = (None, 1.0, 0, torch.float32, "none", [], "")  # bias, scale and zero point of the result, its dtype
    return lambda: onednn.qlinear_pointwise(unsigned, 1.0, 128, packed, one.weight_scale, zeros, *options)


@contextmanager
def with_threads(threads: int) -> Iterator[None]:
    """So many threads of torch, and of ours."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@dataclass(frozen=True, eq=False)
class Measured:
    """Times of one shape by candidate, and the row of each."""

    times: Mapping[str, Timing]
    rows: list[dict[str, Any]]

    def best(self, names: tuple[str, ...]) -> Timing:
        """The fastest of these that was there."""
        return min((self.times[name] for name in names if name in self.times), key=lambda timing: timing.median)


@cache
def measured(rows: int, linear: str, threads: int, quick: bool) -> Measured:
    """One shape: checked first, then everything timed together."""
    one = problem(rows, linear)
    packed = pack_weight(one.weight)
    with torch.inference_mode(), with_threads(threads):
        error = check(one, packed)
        times = interleave(candidates(one, packed), seconds=SECONDS[quick])
        floor = times[FLOOR].median * one.operations / operations(threads)
    shape, case = [*one.x.shape, len(one.weight)], f"DiT-XL/2 {linear}, {rows} rows, {threads} threads"
    described = []
    for name in (name for name in times if name != FLOOR):
        ms = times[name].median
        described.append({
            "op": SPEC.name, "backend": name, "case": case, "shape": shape,
            "dtype": "float32" if name in FLOAT32 else "int8", "ms": times[name].to_dict(),
            "gflop_per_s": one.operations / ms / 1e6, "floor_ms": floor, "percent_of_roofline": 100 * floor / ms,
            "over_onednn": min(times[peer].median for peer in BARE if peer in times) / ms,
            "threads": threads, "seed": SEED,
        } | ({"error": error} if name == OURS else {}))  # fmt: skip
    return Measured(times, described)


def operations(threads: int) -> int:
    """Done by one timed call of the floor."""
    from vivace import _C

    return _C.run_products(INT8, STEPS, threads)


def all_shapes(quick: bool, threads: int, counts: tuple[int, ...] = ()) -> dict[str, Measured]:
    """Every linear at these numbers of rows, or at all."""
    return {f"{linear} {rows}": measured(rows, linear, threads, quick) for linear in LINEARS for rows in counts or ROWS}


# ---------------------------------------------------------------- claims
def fused_vs_bare(quick: bool) -> tuple[list[dict[str, Any]], Claim]:
    """Time of the faster bare INT8 product of oneDNN over ours with everything in it, geometric mean of the shapes."""
    if (reason := missing(CPU)) is not None:
        return [], Claim(FUSED, ">=", BOUNDS[FUSED], reason)
    shapes = all_shapes(quick, torch.get_num_threads())
    own, bare = [one.times[OURS] for one in shapes.values()], [one.best(BARE) for one in shapes.values()]
    value, interval = ratio_of_medians(bare, own, SEED)
    each = {name: one.best(BARE).median / one.times[OURS].median for name, one in shapes.items()}
    how = (
        "bfloat16 in, quantized by token, bias, GELU, gate and residual inside, against the faster of torch._int_mm "
        "and onednn.qlinear_pointwise (uint8, zero point 128), neither with any of that; "
        f"{_machine(shapes)}; by shape: {_listed(each)}"
    )
    return _rows(shapes), Claim(FUSED, ">=", BOUNDS[FUSED], how, value, (interval[0], interval[1]), len(own[0].ms))


def vs_float32(quick: bool) -> tuple[list[dict[str, Any]], Claim]:
    """Time of oneDNN's float32 linear over ours with everything in it, the lowest of the shapes."""
    if (reason := missing(CPU)) is not None:
        return [], Claim(WIDE, ">=", BOUNDS[WIDE], reason)
    shapes = all_shapes(quick, torch.get_num_threads())
    each = {name: one.best(FLOAT32).median / one.times[OURS].median for name, one in shapes.items()}
    lowest = shapes[min(each, key=lambda name: each[name])]
    value, interval = ratio_of_medians([lowest.best(FLOAT32)], [lowest.times[OURS]], SEED)
    how = (
        "bfloat16 in, quantized by token, bias, GELU, gate and residual inside, against the faster of F.linear and "
        f"oneDNN's packed float32 linear, without them; the lowest of {_listed(each)}; {_machine(shapes)}"
    )
    rounds = len(lowest.times[OURS].ms)
    return _rows(shapes), Claim(WIDE, ">=", BOUNDS[WIDE], how, value, (interval[0], interval[1]), rounds)


def _rows(shapes: Mapping[str, Measured]) -> list[dict[str, Any]]:
    return [row for one in shapes.values() for row in one.rows]


def _listed(each: Mapping[str, float]) -> str:
    return ", ".join(f"{name} {value:.2f}" for name, value in each.items())


def _machine(shapes: Mapping[str, Measured]) -> str:
    share = [row["percent_of_roofline"] for row in _rows(shapes) if row["backend"] == OURS]
    return (
        f"{torch.get_num_threads()} threads, {min(share):.0f} to {max(share):.0f} % of the rate of dot products; "
        "medians of interleaved rounds"
    )


CLAIMS: Mapping[str, Callable[[bool], tuple[list[dict[str, Any]], Claim]]] = {FUSED: fused_vs_bare, WIDE: vs_float32}


def full_rows() -> list[dict[str, Any]]:
    """Every shape on one thread and on all."""
    if missing(CPU) is not None:
        return []
    every = sorted({1, torch.get_num_threads()})
    return [row for threads in every for row in _rows(all_shapes(False, threads))]
