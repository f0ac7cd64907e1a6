"""The ops of a plan's rows as few matrix products: coefficients composed in float64, run by one graph for every row.

A row's affine ops are walked with symbolic formulas over slots as they were before it; what a later row reads becomes
an output. The network's next input is one more. Transforms (clamp, threshold, rescale, low-rank) cut a row: what they
read is computed first, they run in numpy, and what follows reads their result. Tensors among coefficients, and classes
of tokens, are fields that a source is multiplied by.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from vivace.engine.liveness import live_after
from vivace.engine.low_rank import KIND as LOW_RANK
from vivace.engine.low_rank import keys_of
from vivace.engine.plan import Affine, AgeRef, Coef, InputRef, Op, Plan, TensorRef, Transform, coefs, writes
from vivace.errors import UnsupportedError

NET = "#net"  # what the network is fed next
INPUT, TENSOR, CLASS = "input:", "tensor:", "class:"  # fields; slots of tensors of the request have the first too

Floats: TypeAlias = NDArray[np.float64]
Formula: TypeAlias = dict[tuple[str, tuple[str, ...]], Floats]  # (source, fields) -> coefficient by class of token


@dataclass(frozen=True, slots=True)
class Given:
    """What a request gives: numbers by name, names of its tensors."""

    values: Mapping[str, float]
    tensors: frozenset[str] = frozenset()


@dataclass(frozen=True, slots=True)
class Combine:
    """outs[o] <- sum_t coefficients[o, t] * source_t * fields_t.

    terms: (slot, fields), which are "input:<name>", "tensor:<key>" or "class:<k>", 1 at elements of tokens of that
    class; coefficients: float32 [O, T].
    """

    outs: tuple[str, ...]
    terms: tuple[tuple[str, tuple[str, ...]], ...]
    coefficients: NDArray[np.float32]


@dataclass(frozen=True, slots=True)
class Adjust:
    """A transform of a slot in place. numbers: its parameters; keys: of its side-car tensors; reads: further slots."""

    kind: str
    slot: str
    reads: tuple[str, ...] = ()
    numbers: tuple[float, ...] = ()
    keys: tuple[str, ...] = ()


Stage: TypeAlias = Combine | Adjust


@dataclass(frozen=True, slots=True)
class Program:
    """A plan for one request. start: fills the first slots; rows: what follows the network of every row."""

    start: tuple[Stage, ...]
    rows: tuple[tuple[Stage, ...], ...]


def program_of(plan: Plan, given: Given) -> Program:
    """All rows of a verified plan, composed for the numbers that a request gives.

    Raises UnsupportedError naming the row for a parameter of a transform that is a tensor.
    """
    live = live_after(plan)
    start: tuple[Op, ...] = plan.init
    if "x_init" in given.tensors:
        start = (*start, Affine("x", (("input:x_init", 1.0),)))
    rows = []
    for i, ops in enumerate((start, *(step.ops for step in plan.steps))):
        wanted = {slot for slot in live[i] if slot in set(map(writes, ops))}
        last: tuple[Op, ...] = ()
        if i < len(plan.steps) and plan.steps[i].variant is not None:
            following = plan.steps[i]
            last = (Affine(NET, ((following.x, following.x_scale),)),)
            wanted |= {NET}
        try:
            rows.append(_Row(given).stages((*ops, *last), wanted))
        except UnsupportedError as error:
            raise UnsupportedError(f"{f'step {i - 1}' if i else 'init'}: {error}") from None
    return Program(rows[0], tuple(rows[1:]))


class _Row:
    """The ops of one row in the making: formulas of slots over what is in memory."""

    def __init__(self, given: Given) -> None:
        self.given, self.env = given, dict[str, Formula]()
        self.made: list[Stage] = []
        self.count = 0  # of slots for what transforms read and write

    def stages(self, ops: Sequence[Op], wanted: set[str]) -> tuple[Stage, ...]:
        for op in ops:
            if isinstance(op, Affine):
                self.env[op.dst] = self._sum(op.terms)
            else:
                self._transform(op)
        self._combine({slot: slot for slot in sorted(wanted)})
        return tuple(self.made)

    def _of(self, slot: str) -> Formula:
        return self.env.get(slot) or {(slot, ()): np.ones(1)}

    def _sum(self, terms: Sequence[tuple[str, Coef]]) -> Formula:
        total: Formula = {}
        for slot, coef in terms:
            number, field = self._coef(coef)
            for (source, fields), weight in self._of(slot).items():
                key = source, tuple(sorted((*fields, *field)))
                total[key] = total.get(key, np.zeros(1)) + number * weight
        return {key: weight for key, weight in total.items() if weight.any()} or {("one", ()): np.zeros(1)}

    def _coef(self, coef: Coef) -> tuple[Any, tuple[str, ...]]:
        """(number, or numbers by class; fields) of a coefficient."""
        if isinstance(coef, TensorRef):
            return 1.0, (TENSOR + coef.key,)
        if isinstance(coef, AgeRef):
            return np.array(coef.values), ()
        if isinstance(coef, InputRef):
            value = self.given.values.get(coef.name)
            return (1.0, (INPUT + coef.name,)) if value is None else (value, ())
        return coef, ()

    def _transform(self, op: Transform) -> None:
        keys: tuple[str, ...] = keys_of(op) if op.kind == LOW_RANK else ()
        found = [] if keys else [self._coef(coef) for coef in coefs(op)]
        if any(field or np.ndim(number) for number, field in found):
            raise UnsupportedError(f"{op.kind} of {op.slot!r} takes numbers, not tensors")
        names = {slot: f"#{self.count + k}" for k, slot in enumerate((op.slot, *op.reads))}
        self.count += len(names)
        self._combine({name: slot for slot, name in names.items()})
        read = tuple(names[slot] for slot in op.reads)
        self.made.append(Adjust(op.kind, names[op.slot], read, tuple(float(number) for number, _ in found), keys))
        self.env[op.slot] = {(names[op.slot], ()): np.ones(1)}

    def _combine(self, outs: Mapping[str, str]) -> None:
        """A product that writes outs[name] into slot `name`; nothing for none."""
        columns: dict[tuple[str, tuple[str, ...]], list[float]] = {}
        for row, slot in enumerate(outs.values()):
            for (source, fields), weight in self._of(slot).items():
                for field, number in _by_class(weight):
                    column = columns.setdefault((source, (*fields, *field)), [0.0] * len(outs))
                    column[row] += number
        if outs:
            matrix = np.array(list(columns.values()), np.float64).T.astype(np.float32)
            self.made.append(Combine(tuple(outs), tuple(columns), matrix))


def _by_class(weight: Floats) -> list[tuple[tuple[str, ...], float]]:
    """A coefficient as numbers, each for tokens of one class, or for all."""
    if (weight == weight[0]).all():
        return [((), float(weight[0]))]
    return [((f"{CLASS}{k}",), float(number)) for k, number in enumerate(weight) if number]
