"""Rows of the fused solver step as fixed-width arrays: what a sample reads, with which numbers, where results go.

    y_k = clamp(sum_j coef[k][j] * source_j * scale_j + sum_{l<k} prev[k][l] * y_l, low_k, high_k)

Codes of a row (`ints`, int32 [32]):

    [0]      sources n <= 12        [2:14]   source codes         [26:30]  destination codes
    [1]      outputs m <= 4         [14:26]  scale codes          [30]     adjusted outputs    [31]  kind of the row
    source:       slot c (0..255) | OUT + branch | ONE | TENSOR + i | NOISE + draw
    scale:        NONE | slot c | TENSOR + i
    destination:  slot c | NET (the network-input plane)
    adjusted:     bit k: output k takes (low, high, gain) of the sample from `adjust`: y_k = clamp(.., low, high) * gain
    kind:         0, or what a reduction row computes: it writes nothing (destinations NONE) and yields such a triple

Numbers of a row (`floats`, [72]): [0:48] coef[4][12], [48:64] prev[4][4], [64:68] low, [68:72] high. In a reduction row
the last two hold the parameters: THRESHOLD: ratio in low[0], maximum in high[0]; RESCALE: phi in low[0].

numpy only: rows can be built where torch is absent. `build_row` turns lists of terms into a row.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import DTypeLike, NDArray

from vivace.errors import ArgumentError, DtypeError, ShapeError

SOURCES, OUTPUTS = 12, 4
SLOTS, BRANCHES, TENSORS = 256, 16, 1024  # exclusive upper bounds of a pool slot, a branch, a side-car tensor
OUT, ONE, NET, TENSOR, NOISE, NONE = 256, 512, 768, 1024, 65536, -1
DRAWS = (1 << 31) - NOISE  # exclusive upper bound of a draw: the code is an int32

THRESHOLD, RESCALE = 1, 2  # kinds of reduction rows

INTS, FLOATS = 32, 72  # width of a row
SOURCE_AT, SCALE_AT, DESTINATION_AT, ADJUSTED_AT, KIND_AT = 2, 14, 26, 30, 31
COEF_AT, PREV_AT, LOW_AT, HIGH_AT = 0, 48, 64, 68

# What occurs at a source position in any row of a table: bits of `Facts.kinds`.
FROM_POOL, FROM_TENSOR, FROM_OUT, FROM_NOISE, SCALED_BY_POOL, SCALED_BY_TENSOR = 1, 2, 4, 8, 16, 32


@dataclass(frozen=True, slots=True)
class Facts:
    """What the codes of a table need, read once on the host. Numbers may change later, codes may not.

    kinds: one bit set per source position (its length: most sources of a row); outputs: most outputs of a row;
    slots, branches, tensors: how many of each the codes reach (highest index + 1); net: a row writes the network input;
    adjusted: a row has adjusted outputs; reach: the same by row, int64 [R, 7]: slots, branches, tensors, net, noise,
    adjusted, kind.
    """

    kinds: tuple[int, ...]
    outputs: int
    slots: int
    branches: int
    tensors: int
    net: bool
    adjusted: bool
    reach: NDArray[np.int64] = field(compare=False, repr=False)

    @property
    def noise(self) -> bool:
        """A row reads noise."""
        return any(kind & FROM_NOISE for kind in self.kinds)


@dataclass(frozen=True, slots=True, eq=False)
class StepTable:
    """R rows: `ints` int32 [R, 32], `floats` float32 or float64 [R, 72]; numpy arrays, or torch tensors on one device.

    `facts` is read off `ints` on the host and kept by `to` and `cat`; who makes a table of device tensors says what its
    codes may be. Kernels are compiled for the facts and calls are checked against them, so a row that is later written
    in device memory must stay within them.
    Raises: ShapeError, DtypeError, ArgumentError.
    """

    ints: Any
    floats: Any
    facts: Facts = None  # type: ignore[assignment]

    def __post_init__(self) -> None:
        _check(self.ints, "ints", INTS, ("int32",))
        _check(self.floats, "floats", FLOATS, ("float32", "float64"))
        if self.ints.shape[0] != self.floats.shape[0]:
            rows = f"ints have {self.ints.shape[0]} rows, floats {self.floats.shape[0]}"
            raise ShapeError(f"StepTable: {rows}; give both for every row")
        if self.facts is None:
            if not on_host(self.ints):
                raise ArgumentError(
                    f"StepTable: ints are on {self.ints.device} and no facts are given; build the table on the host "
                    "and move it with .to(device), or give facts"
                )
            object.__setattr__(self, "facts", read_facts(np.asarray(self.ints)))

    def __len__(self) -> int:
        return int(self.ints.shape[0])

    @property
    def dtype(self) -> str:
        """Name of the dtype of the numbers: "float32" or "float64"."""
        return dtype_name(self.floats)

    @property
    def is_torch(self) -> bool:
        """The arrays are torch tensors."""
        return not isinstance(self.ints, np.ndarray)

    def to(self, device: Any = "cpu", dtype: Any = None) -> StepTable:
        """The same rows as torch tensors on `device`; `dtype` (torch.float32 or torch.float64) converts the numbers."""
        import torch

        ints, floats = (torch.from_numpy(a) if isinstance(a, np.ndarray) else a for a in (self.ints, self.floats))
        return StepTable(ints.to(device), floats.to(device, dtype), self.facts)

    @staticmethod
    def cat(tables: Sequence[StepTable]) -> StepTable:
        """Rows of all tables one after another; all numpy, or all torch on one device with one dtype."""
        if not tables:
            raise ArgumentError("StepTable.cat: no tables given; give at least one")
        if len({(t.is_torch, t.dtype) for t in tables}) > 1:
            kinds = sorted({f"{'torch' if t.is_torch else 'numpy'} {t.dtype}" for t in tables})
            raise DtypeError(f"StepTable.cat: tables are {', '.join(kinds)}; convert them to one kind with .to(...)")
        join: Any = np.concatenate
        if tables[0].is_torch:
            import torch

            join = torch.cat
        ints, floats = (join([getattr(t, name) for t in tables]) for name in ("ints", "floats"))
        return StepTable(ints, floats, _join([t.facts for t in tables]))


@dataclass(frozen=True, slots=True)
class Output:
    """One result of a row: destination <- clamp(sum of coef * source * scale + sum of prev[l] * y_l, low, high).

    terms: (source code, scale code, coefficient); prev: coefficients of the row's earlier outputs, in their order.
    adjusted: limits and a factor come from the sample's `adjust` instead of `low` and `high`.
    """

    destination: int
    terms: Sequence[tuple[int, int, float]]
    prev: Sequence[float] = ()
    low: float = -math.inf
    high: float = math.inf
    adjusted: bool = False


@dataclass(frozen=True, slots=True)
class Reduction:
    """A row that writes nothing and yields (low, high, gain) of a sample; `of`: the terms of y_0 (and y_1).

    Raises ArgumentError for parameters out of range or a number of sums that does not fit the kind.
    THRESHOLD: s = min(max(quantile(|y_0|, low), 1), high) gives (-s, s, 1/s).
    RESCALE: (-inf, inf, low * std(y_1) / std(y_0) + 1 - low).
    """

    kind: int
    of: Sequence[Sequence[tuple[int, int, float]]]
    low: float
    high: float = math.inf

    def __post_init__(self) -> None:
        if self.kind not in (THRESHOLD, RESCALE) or len(self.of) != self.kind:  # a kind's number is that of its y
            raise ArgumentError(f"Reduction: kind {self.kind} of {len(self.of)} sums; threshold takes one, rescale two")
        if self.kind == THRESHOLD and not (0.0 <= self.low <= 1.0 and self.high > 0.0):
            raise ArgumentError(f"Reduction: threshold needs 0 <= ratio <= 1 and max > 0, got {self.low}, {self.high}")
        if not math.isfinite(self.low):
            raise ArgumentError(f"Reduction: rescale needs a finite phi, got {self.low}")

    @property
    def outputs(self) -> tuple[Output, ...]:
        """The same as outputs without a destination."""
        return tuple(Output(NONE, terms) for terms in self.of)


Row: TypeAlias = "Sequence[Output] | Reduction"


def build_row(row: Row) -> tuple[NDArray[np.int32], NDArray[np.float64]]:
    """One row from its outputs. Equal (source, scale) pairs share a source; sources keep the order of first mention.

    That order is the order of summation in every output. A pair mentioned twice in one output is an error: add the
    coefficients first. Returns: int32 [32], float64 [72].
    Raises: ArgumentError: too many sources or outputs, an unknown code, a number that is not finite, low above high.
    """
    outputs = row.outputs if isinstance(row, Reduction) else row
    if len(outputs) > OUTPUTS:
        raise ArgumentError(f"build_row: {len(outputs)} outputs, at most {OUTPUTS} fit; split the row")
    ints, floats = np.zeros(INTS, np.int32), np.zeros(FLOATS, np.float64)
    ints[SCALE_AT:DESTINATION_AT] = NONE
    coef, prev = floats[COEF_AT:PREV_AT].reshape(OUTPUTS, SOURCES), floats[PREV_AT:LOW_AT].reshape(OUTPUTS, OUTPUTS)
    floats[LOW_AT:HIGH_AT], floats[HIGH_AT:] = -math.inf, math.inf
    position: dict[tuple[int, int], int] = {}
    for k, output in enumerate(outputs):
        _check_output(k, output)
        for source, scale, number in output.terms:
            j = position.setdefault((source, scale), len(position))
            if j >= SOURCES:
                raise ArgumentError(f"build_row: output {k} brings source {j + 1}, at most {SOURCES} fit; split it")
            ints[SOURCE_AT + j], ints[SCALE_AT + j], coef[k, j] = source, scale, number
        prev[k, : len(output.prev)] = output.prev
        ints[DESTINATION_AT + k] = output.destination
        floats[LOW_AT + k], floats[HIGH_AT + k] = output.low, output.high
        ints[ADJUSTED_AT] |= output.adjusted << k
    ints[0], ints[1] = len(position), len(outputs)
    if isinstance(row, Reduction):
        ints[KIND_AT], floats[LOW_AT], floats[HIGH_AT] = row.kind, row.low, row.high
    elif NONE in ints[DESTINATION_AT : DESTINATION_AT + len(outputs)]:
        raise ArgumentError(f"build_row: an output has the unknown destination code {NONE}; only a Reduction has none")
    elif len({output.destination for output in outputs}) < len(outputs):
        raise ArgumentError("build_row: two outputs have one destination; give each its own slot")
    return ints, floats


def build_table(rows: Sequence[Row], dtype: DTypeLike = np.float32) -> StepTable:
    """A numpy table of `build_row` rows; `dtype` of the numbers: float32 or float64."""
    built = [build_row(row) for row in rows]
    ints = np.stack([pair[0] for pair in built]) if built else np.zeros((0, INTS), np.int32)
    exact = np.stack([pair[1] for pair in built]) if built else np.zeros((0, FLOATS))
    with np.errstate(over="ignore"):
        floats = exact.astype(dtype)
    if not np.isfinite(floats[:, :LOW_AT]).all():
        raise ArgumentError(f"build_table: a coefficient overflows {floats.dtype}; build the table in float64")
    return StepTable(ints, floats)


def read_facts(ints: NDArray[np.int32]) -> Facts:
    """The `Facts` of rows on the host. Raises ArgumentError for a count or a code that has no meaning."""
    n, m = ints[:, 0:1], ints[:, 1:2]
    if ((n < 0) | (n > SOURCES) | (m < 0) | (m > OUTPUTS)).any():
        raise ArgumentError(f"StepTable: a row counts more than {SOURCES} sources or {OUTPUTS} outputs; split the row")
    here = np.arange(SOURCES) < n
    source = np.where(here, ints[:, SOURCE_AT:SCALE_AT], ONE)
    scale = np.where(here, ints[:, SCALE_AT:DESTINATION_AT], NONE)
    kind, adjusted = ints[:, KIND_AT], ints[:, ADJUSTED_AT]
    if ((kind < 0) | (kind > RESCALE) | ((kind != 0) & (m[:, 0] != kind))).any() or (
        (adjusted < 0) | (adjusted >> m[:, 0] != 0)
    ).any():
        raise ArgumentError("StepTable: a row has an unknown kind, or lacks the outputs that it adjusts or reduces")
    written = (np.arange(OUTPUTS) < m) & (kind == 0)[:, None]
    destination = np.where(written, ints[:, DESTINATION_AT : DESTINATION_AT + OUTPUTS], NONE)
    for what, codes, known in (
        ("source", source, _is_source), ("scale", scale, _is_scale), ("destination", destination, _is_destination)
    ):  # fmt: skip
        bad = ~known(codes) & (written if what == "destination" else here)
        if bad.any():
            raise ArgumentError(f"StepTable: row {np.argwhere(bad)[0][0]} has the unknown {what} code {codes[bad][0]}")
    if (destination == NET).sum(axis=1).max(initial=0) > 1:
        raise ArgumentError("StepTable: a row writes the network input twice; one output may")
    slots = np.concatenate([np.where(codes < SLOTS, codes, NONE) for codes in (source, scale, destination)], axis=1)
    tensors = np.concatenate([np.where(codes < NOISE, codes, NONE) - TENSOR for codes in (source, scale)], axis=1)
    outs = np.where(source < ONE, source - OUT, NONE)
    counts = [np.maximum(found.max(axis=1, initial=NONE), NONE) + 1 for found in (slots, outs, tensors)]
    flags = [(destination == NET).any(axis=1), (source >= NOISE).any(axis=1), adjusted != 0, kind]
    reach = np.stack([*counts, *flags], axis=1).astype(np.int64)
    kinds = sum(bit * found.any(axis=0) for bit, found in _kinds(source, scale)) + np.zeros(SOURCES, int)
    return Facts(tuple(int(kind) for kind in kinds[: int(n.max(initial=0))]), int(m.max(initial=0)), *_widest(reach))


def _widest(reach: NDArray[np.int64]) -> tuple[int, int, int, bool, bool, NDArray[np.int64]]:
    """The last fields of `Facts` from what each row reaches."""
    slots, branches, tensors, net, _, adjusted, _ = (int(count) for count in reach.max(axis=0, initial=0))
    return slots, branches, tensors, bool(net), bool(adjusted), reach


def on_host(array: Any) -> bool:
    """A numpy array or a torch tensor in host memory: reading it does not wait for a device."""
    return isinstance(array, np.ndarray) or array.device.type == "cpu"


def dtype_name(array: Any) -> str:
    """Name of a numpy or torch dtype without its library: "float32", "bfloat16", "int64"."""
    return str(array.dtype).removeprefix("torch.")


def _kinds(source: NDArray[np.int32], scale: NDArray[np.int32]) -> list[tuple[int, NDArray[np.bool_]]]:
    """Per bit of `Facts.kinds`, where it occurs [R, 12]."""
    return [
        (FROM_POOL, source < SLOTS),
        (FROM_OUT, (source >= OUT) & (source < ONE)),
        (FROM_TENSOR, (source >= TENSOR) & (source < NOISE)),
        (FROM_NOISE, source >= NOISE),
        (SCALED_BY_POOL, (scale >= 0) & (scale < SLOTS)),
        (SCALED_BY_TENSOR, scale >= TENSOR),
    ]


def _is_source(codes: Any) -> Any:
    codes = np.asarray(codes)
    known = (codes >= 0) & (codes < OUT + BRANCHES) | (codes == ONE)
    return known | (codes >= TENSOR) & (codes < TENSOR + TENSORS) | (codes >= NOISE)


def _is_scale(codes: Any) -> Any:
    codes = np.asarray(codes)
    return (codes >= NONE) & (codes < SLOTS) | (codes >= TENSOR) & (codes < TENSOR + TENSORS)


def _is_destination(codes: Any) -> Any:
    codes = np.asarray(codes)
    return (codes >= 0) & (codes < SLOTS) | (codes == NET)


def _check_output(k: int, output: Output) -> None:
    """Codes and numbers of one output are legal."""
    pairs = [(source, scale) for source, scale, _ in output.terms]
    if len(set(pairs)) < len(pairs):
        raise ArgumentError(f"build_row: output {k} mentions a source twice with one scale; add the coefficients")
    if output.destination != NONE and not _is_destination(output.destination):
        raise ArgumentError(f"build_row: output {k} has the unknown destination code {output.destination}")
    for source, scale in pairs:
        if not (_is_source(source) and _is_scale(scale)) or source >= NOISE + DRAWS:
            raise ArgumentError(f"build_row: output {k} has the unknown source or scale code ({source}, {scale})")
    if len(output.prev) > k:
        raise ArgumentError(f"build_row: output {k} has {len(output.prev)} numbers in `prev`, {k} outputs precede it")
    if not all(math.isfinite(number) for number in (*(term[2] for term in output.terms), *output.prev)):
        raise ArgumentError(f"build_row: output {k} has a coefficient that is not finite; check the row's numbers")
    if not output.low <= output.high:
        limits = f"[{output.low}, {output.high}]"
        raise ArgumentError(f"build_row: output {k} is clamped to {limits}; low must not exceed high")


def _check(array: Any, what: str, width: int, dtypes: tuple[str, ...]) -> None:
    """A table's array has its width and one of its dtypes."""
    if len(array.shape) != 2 or array.shape[1] != width:
        raise ShapeError(f"StepTable: {what} has shape {tuple(array.shape)}, needs [rows, {width}]")
    if dtype_name(array) not in dtypes:
        raise DtypeError(f"StepTable: {what} is {dtype_name(array)}, needs {' or '.join(dtypes)}")


def _join(facts: Sequence[Facts]) -> Facts:
    """Facts of tables put one after another."""
    kinds = [0] * max(len(fact.kinds) for fact in facts)
    for fact in facts:
        for j, kind in enumerate(fact.kinds):
            kinds[j] |= kind
    reach = np.concatenate([fact.reach for fact in facts])
    return Facts(tuple(kinds), max(fact.outputs for fact in facts), *_widest(reach))
