"""The native DiT compiled for the CPU: a row is one call into C++, or a fixed sequence of torch linears and our ops.

Which of the two is measured on one block, once per number of tokens and precision, and kept on disk: either rounds in
its own way. In C++ (csrc/runtime/dit.*) a row is packed linears, attention and fused ops over one arena.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from vivace.engine.bind import ModelSpec
from vivace.engine.compiled import Bucket, Evaluation, Hoisted
from vivace.engine.kept import Seen, split
from vivace.engine.machine import machine
from vivace.engine.plan import Variant
from vivace.engine.precision import BlockPrecision
from vivace.engine.token_rows import focused
from vivace.errors import StateError, UnsupportedError
from vivace.kernels import store
from vivace.kernels.spec import CPU, missing
from vivace.models.caching.events import SITES
from vivace.models.caching.looks import METRICS, going_on, look_blocks, states_of
from vivace.models.compiled.cpp_row import CppRow, Memory, Picks
from vivace.models.compiled.hoist import modulation_table
from vivace.models.compiled.packed import bytes_by_dtype
from vivace.models.compiled.packs import refresh
from vivace.models.compiled.parts import Part
from vivace.models.compiled.precisions import Kinds, counted, kinds_of, nearest, plain, told, why_not
from vivace.models.compiled.sequence_row import SequenceRow
from vivace.models.dit import DiT
from vivace.models.quantized import honoured
from vivace.models.quantized.layers import debugging, odd_numbers
from vivace.models.quantized.weights import QuantizedWeights

CPP, SEQUENCE = "C++ row", "torch sequence"
WAYS: dict[str, type[CppRow] | type[SequenceRow]] = {CPP: CppRow, SEQUENCE: SequenceRow}
ROUNDS = 7  # of a measurement
CLEARLY = 1.1  # times as fast as the C++ row is what makes the sequence run
DTYPES = {torch.float32: "float32", torch.bfloat16: "bfloat16"}


def native_compiler(
    model: DiT,
    spec: ModelSpec,
    label: Callable[[Any, str], int],
    fed: Callable[[Sequence[float]], Sequence[float]] = tuple,
    sign: float = 1.0,
    quantized: QuantizedWeights | None = None,
) -> NativeCompiler:
    """The compiler of a DiT on the CPU. Raises UnsupportedError with the reason.

    Args:
        label: the class id of a condition in a branch; fed: what the network is fed at timesteps of a plan; sign: of
            its output in the prediction; quantized: weights of this model, for rows in their format.
    """
    if model.dtype not in DTYPES:
        name = str(model.dtype).removeprefix("torch.")
        raise UnsupportedError(f"the model is {name}; {' and '.join(DTYPES.values())} are compiled")
    if (reason := missing(CPU)) is not None:
        raise UnsupportedError(reason)
    refresh(model)
    return NativeCompiler(model, spec, label, fed, sign, quantized)


class NativeCompiler:
    """Compiles variants of one model. Packed weights are shared with every other session of the model."""

    sites, metrics = SITES, METRICS

    def __init__(
        self,
        model: DiT,
        spec: ModelSpec,
        label: Callable[[Any, str], int],
        fed: Callable[[Sequence[float]], Sequence[float]],
        sign: float,
        quantized: QuantizedWeights | None = None,
    ) -> None:
        self.model, self.spec, self.label, self.fed, self.sign = model, spec, label, fed, sign
        self.quantized = quantized
        self.measured: dict[tuple[int, BlockPrecision], dict[str, Any]] = {}
        self._rows: dict[tuple[str, Kinds], CppRow | SequenceRow] = {}
        self._memory = Memory()

    @property
    def precisions(self) -> frozenset[str]:
        """In which rows run, where a plan names precisions."""
        return honoured(self.quantized)

    def why_not(self, variant: Variant) -> str | None:
        """Whatever needs more than whole forwards was refused before; what is left are merges and precisions."""
        if any(rule.site == "merge" for rule in variant.rules):
            return "its rows merge no tokens"
        return why_not(self.model, variant, self.quantized)

    def compile(self, variant: Variant, bucket: Bucket, shape: Sequence[int]) -> NativeNetwork:
        kinds = kinds_of(self.model, variant)
        way = self._way(kinds, bucket.tokens, shape)
        row = self.row(way, kinds)
        row.reserve(len(variant.branches), bucket, focused(variant))
        return NativeNetwork(self, variant, row, f"{way}, {told(kinds, DTYPES[self.model.dtype])}")

    def hoist(self, timesteps: Sequence[float], branches: Sequence[str], condition: Any) -> Hoisted:
        """Modulation vectors [S, B, 6L + 2, D] float32 of rows at `timesteps`, for each branch of a class."""
        table = self.table(timesteps, branches, condition)
        return Hoisted((table, tuple(branches)), {"modulation": table.nbytes})

    def table(self, timesteps: Sequence[float], branches: Sequence[str], condition: Any, keep: bool = True) -> Tensor:
        """The modulation alone; see `modulation_table`."""
        labels = [self.label(condition, branch) for branch in branches]
        return modulation_table(self.model, self.fed(timesteps), labels, keep=keep)

    def report(self) -> dict[str, Any]:
        """By number of tokens and precision how rows run and what decided it, ms a block; bytes of prepared weights."""
        own = DTYPES[self.model.dtype]
        measured = [
            f"{tokens} tokens{'' if kind == (None, None) else ', ' + told((kind,), own)}: {_told(found)}"
            for (tokens, kind), found in self.measured.items()
        ]
        rows = {way: [row for (name, _), row in self._rows.items() if name == way] for way in WAYS}
        packs = bytes_by_dtype(row.weights for row in rows[CPP] if isinstance(row, CppRow))
        weights = {f"{CPP}, {dtype}": size for dtype, size in packs.items()}
        if rows[SEQUENCE]:
            weights[SEQUENCE] = sum(parameter.nbytes for parameter in self.model.parameters())
        return {"measured": measured, "weights": weights, "arena": self._memory.bytes.nbytes}

    def row(self, way: str, kinds: Kinds | None = None) -> CppRow | SequenceRow:
        """Rows run that way in these precisions, None is the model's own, with all weights; made once."""
        key = way, kinds or plain(self.model)
        if key not in self._rows:
            self._rows[key] = WAYS[way](self.model, key[1], self.quantized, self._memory)
        return self._rows[key]

    def _way(self, kinds: Kinds, tokens: int, shape: Sequence[int]) -> str:
        """The way of a row of these precisions: the faster one by what its blocks take each."""
        found = {kind: self._measured(kind, tokens, shape) for kind in counted(kinds)}
        if len(ways := {each["way"] for each in found.values()}) == 1:
            return str(ways.pop())
        ms = {way: sum(count * found[kind]["ms"][way] for kind, count in counted(kinds).items()) for way in WAYS}
        return CPP if ms[CPP] < CLEARLY * ms[SEQUENCE] else SEQUENCE

    def _measured(self, kind: BlockPrecision, tokens: int, shape: Sequence[int]) -> dict[str, Any]:
        """The faster way of such a block for that many tokens, measured now or earlier under the same circumstances."""
        if (tokens, kind) not in self.measured:
            key: dict[str, Any] = {"what": "way of a DiT's row", "model": self.spec.fingerprint, "tokens": tokens}
            key |= {"dtype": DTYPES[self.model.dtype], "machine": machine(self.model.device) | {"threads": "any"}}
            if kind != (None, None):
                key["precision"] = list(kind)
            kept = store.get(key).value
            if not isinstance(kept, dict) or kept.get("way") not in WAYS:
                kept = _measure(self.model, shape, tokens, kind)
                store.put(key, kept)
            self.measured[tokens, kind] = kept
        return self.measured[tokens, kind]


class NativeNetwork:
    """One variant for one bucket: picks each sample's modulation and hands the row over."""

    def __init__(self, compiler: NativeCompiler, variant: Variant, row: CppRow | SequenceRow, how: str) -> None:
        self.compiler, self.branches, self.row, self.how = compiler, variant.branches, row, how
        weights = compiler.quantized
        self.group_of = weights.group_of if weights is not None and weights.static else None

    def run(self, call: Evaluation) -> tuple[Tensor, ...]:
        """One prediction [n, C, H, W] per branch, in memory of the row.

        Raises: StateError for activations with NaN or infinity where VIVACE_DEBUG is 1 or more, naming step and layer.
        """
        seen = going_on(call.resume, call.turns)
        alike = all(turn.use.branches == self.branches for turn in call.turns)
        parts = [(self.branches, call.turns)] if alike else split(self.branches, call.turns)
        made: dict[str, Tensor] = {}
        for names, turns in parts:
            start = (None, 0) if seen is None else (states_of(seen, names).contiguous(), seen.block)
            outs = self._part(call, Part(names, turns, *start, call.focus))
            if len(parts) == 1:
                return outs
            made.update((name, out.clone()) for name, out in zip(names, outs, strict=True))
        return tuple(made[branch] for branch in self.branches)

    def look(self, call: Evaluation, metric: str, params: Sequence[float]) -> Seen:
        """The first blocks alone, and what a guard measures there."""
        blocks = look_blocks(metric, params, self.compiler.spec.blocks)
        signal, states = self.row.look(*self._inputs(call, self.branches), blocks, check=debugging())
        self._check(call)
        return Seen(signal, self.branches, blocks, states, tuple(range(len(call.lanes))))

    def _part(self, call: Evaluation, part: Part) -> tuple[Tensor, ...]:
        """Predictions of some of the branches."""
        outs = self.row.run(*self._inputs(call, part.branches), part=part, check=debugging())
        self._check(call)
        return outs if self.compiler.sign == 1.0 else tuple(out.neg_() for out in outs)

    def _inputs(
        self, call: Evaluation, branches: Sequence[str]
    ) -> tuple[Tensor, tuple[int, ...], list[Tensor], Picks, list[int] | None]:
        """x, lanes, modulation tables, what of them is read, and timestep groups: what rows take first."""
        tables, picks = [], []
        for j, hoisted in enumerate(call.hoisted):
            row, known = call.rows[j], branches
            if hoisted is None:  # nothing left the loop: this row's modulation is computed in it
                row, table = 0, self.compiler.table(call.timesteps[j : j + 1], branches, call.conditions[j], keep=False)
            else:
                table, known = hoisted.data
            tables.append(table)
            picks.append([(row, known.index(branch)) for branch in branches])
        groups = None if self.group_of is None else [self.group_of(time) for time in call.timesteps]
        return call.x, call.lanes, tables, picks, groups

    def _check(self, call: Evaluation) -> None:
        """Raise StateError when the row met numbers that are not finite."""
        if (fault := self.row.fault) is not None:
            layer, sample = fault
            raise StateError(f"step {call.rows[sample]}: {odd_numbers(layer, call.timesteps[sample : sample + 1])}")


@torch.inference_mode()
def _measure(model: DiT, shape: Sequence[int], tokens: int, kind: BlockPrecision = (None, None)) -> dict[str, Any]:
    """Milliseconds of one block each way, the least of several in turn, and which is faster."""
    short = DiT.of(replace(model.config, layers=1), model.state_dict())
    x, table = torch.zeros((1, *shape), dtype=model.dtype), modulation_table(short, [1.0], [0])
    quantized = nearest(short) if "int8" in kind else None
    rows = {name: make(short, (kind,), quantized) for name, make in WAYS.items()}
    ms = dict.fromkeys(rows, math.inf)
    for name, row in [*rows.items()] * ROUNDS:
        row.reserve(1, Bucket(tokens, 1))
        start = time.perf_counter()
        row.run(x, (0,), (table,), (((0, 0),),))
        ms[name] = min(ms[name], (time.perf_counter() - start) * 1e3)
    return {"way": CPP if ms[CPP] < CLEARLY * ms[SEQUENCE] else SEQUENCE, "ms": ms}


def _told(found: Mapping[str, Any]) -> str:
    return f"{found['way']}, a block takes " + ", ".join(f"{ms:.2f} ms as {way}" for way, ms in found["ms"].items())
