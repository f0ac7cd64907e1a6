"""Rows -> descriptors: the ops of a row become one pass over memory, with all coefficients folded in float64.

A kernel row computes up to `OUTPUTS` linear combinations of up to `SOURCES` slots. A slot that nothing reads later is
never written: its formula is folded into the ones that read it. Ops that do not fit one kernel row become several.
The network's next input, `x_scale * x`, is one more output of the row before it. A Transform that reduces over the
sample becomes a reduction row, which has the formula of its slot, and a mark on the slot's output in the row after it.
What goes by the age of tokens (`AgeRef`) becomes as many kernel rows as there are classes, one after another: a launch
is given the first of them and the class of every token.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence, Set
from dataclasses import dataclass, field, replace

from vivace.engine.liveness import live_after, live_before
from vivace.engine.low_rank import KIND, keys_of
from vivace.engine.plan import Affine, AgeRef, Coef, InputRef, Op, Plan, TensorRef, Transform, coefs, reads, writes
from vivace.errors import ArgumentError, UnsupportedError
from vivace.kernels.solver_step.table import (
    KIND_AT,
    NET,
    NOISE,
    NONE,
    ONE,
    OUT,
    OUTPUTS,
    RESCALE,
    SLOTS,
    SOURCES,
    TENSOR,
    THRESHOLD,
    Output,
    Reduction,
    Row,
    StepTable,
    build_table,
)

PREV = 1 << 31  # source code of output l of the same kernel row: PREV + k
Formula = dict[tuple[int, int], float]  # (source code, scale code) -> coefficient
_ACC = "acc_"  # scratch slot of a sum with too many terms
_FEED = "net_"  # stands for the network-input plane among the slots of a row
_INFINITE = float("inf")


@dataclass(frozen=True, slots=True)
class Lowered:
    """A plan as kernel rows for one request.

    spans[i]: (first, last) kernel rows of plan row i, half-open; start: those that fill the first slots; slots: pool
    slot by name; fans: first kernel rows of the launches by class, with the number of their classes; maps: what
    kernel rows stand for that hold nothing and are not launched.
    """

    table: StepTable
    spans: tuple[tuple[int, int], ...]
    start: tuple[int, int]
    slots: Mapping[str, int]
    fans: Mapping[int, int]
    maps: Mapping[int, LowRank] = field(default_factory=dict)

    def launches(self, span: tuple[int, int]) -> Sequence[int]:
        """The kernel rows of a span that begin a launch."""
        if not self.fans:
            return range(*span)
        row, last = span
        first = []
        while row < last:
            first.append(row)
            row += self.fans.get(row, 1)
        return first

    def reduces(self, row: int) -> bool:
        """Kernel row `row` is a reduction row."""
        return bool(self.table.ints[row, KIND_AT])


@dataclass(frozen=True, slots=True)
class LowRank:
    """A low-rank map of a pool slot; numbers of its gains and basis in the list of matrices."""

    slot: int
    gains: int
    basis: int


@dataclass(frozen=True, slots=True)
class Given:
    """What a request gives: numbers by name, names of its tensors (`noise` replaces draw 0, `x_init` the start)."""

    values: Mapping[str, float]
    tensors: frozenset[str] = frozenset()


def slot_names(plan: Plan, given: Given) -> dict[str, int]:
    """Pool slot of every name the plan may keep in memory, `x` first, tensors of the request included."""
    names: dict[str, None] = {"x": None}
    for op in plan.ops():
        for slot in (writes(op), *reads(op)):
            if slot != "one" and not slot.startswith("noise:"):
                names.setdefault(slot)
    for name in (*(ref.name for ref in plan.inputs if ref.name not in given.values), *sorted(given.tensors)):
        names.setdefault(f"input:{name}")
    if len(names) >= SLOTS:
        raise UnsupportedError(f"the plan and its inputs name {len(names)} slots; at most {SLOTS - 1} fit the pool")
    return {name: number for number, name in enumerate((*names, _ACC))}


def lower_plan(plan: Plan, given: Given, side_car: Mapping[str, int] | None = None) -> Lowered:
    """Lower every row of `plan`; `side_car`: number of each plan tensor in the list the executor is handed.

    Raises: UnsupportedError naming the row, when an op is beyond the fused step; ArgumentError for a parameter.
    """
    codes = _Codes(slot_names(plan, given), given, side_car or {})
    live = live_after(plan)
    kernel_rows: list[Row] = []
    spans = []
    fans: dict[int, int] = {}
    maps: dict[int, LowRank] = {}
    start: tuple[Op, ...] = plan.init
    if "x_init" in given.tensors:
        start = (*start, Affine("x", (("input:x_init", 1.0),)))
    for i, step in enumerate((None, *plan.steps)):
        ops = start if step is None else step.ops
        branches: dict[str, int] = {}
        if step is not None and step.variant is not None:
            branches = {out: OUT + n for n, out in enumerate(step.outs)}
            written = {writes(op) for op in ops}
            ops = (*ops, *(Affine(o, ((o, 1.0),)) for o in step.outs if o in live[i] and o not in written))
        if i < len(plan.steps) and plan.steps[i].variant is not None:
            following = plan.steps[i]
            ops = (*ops, Affine(_FEED, ((following.x, following.x_scale),)))
        try:
            made = _rows(codes, branches, ops, live[i] | {_FEED})
        except (ArgumentError, UnsupportedError) as error:
            raise type(error)(f"{'init' if step is None else f'step {i - 1}'}: {error}") from None
        first = len(kernel_rows)
        for rows in made:
            if isinstance(rows, LowRank):
                maps[len(kernel_rows)] = rows
                kernel_rows.append(())
                continue
            if len(rows) > 1:
                fans[len(kernel_rows)] = len(rows)
            kernel_rows.extend(rows)
        spans.append((first, len(kernel_rows)))
    table = build_table(kernel_rows, "float64")
    return Lowered(table, tuple(spans[1:]), spans[0], codes.slots, fans, maps)


# --- one plan row ----------------------------------------------------------------------------------------------------
@dataclass(frozen=True, slots=True)
class _Codes:
    """Names -> codes of one request."""

    slots: Mapping[str, int]
    given: Given
    side_car: Mapping[str, int]

    def source(self, slot: str) -> int:
        if slot == "one":
            return ONE
        if slot == "noise:0" and "noise" in self.given.tensors:
            return self.slots["input:noise"]
        return NOISE + int(slot.removeprefix("noise:")) if slot.startswith("noise:") else self.slots[slot]

    def coef(self, coef: Coef) -> tuple[float, int]:
        """(number, scale code) of a coefficient."""
        if isinstance(coef, float):
            return coef, NONE
        if isinstance(coef, TensorRef):
            return 1.0, TENSOR + self.side_car[coef.key]
        if isinstance(coef, InputRef):
            value = self.given.values.get(coef.name)
            return (1.0, self.slots[f"input:{coef.name}"]) if value is None else (float(value), NONE)
        raise UnsupportedError(f"a coefficient by token age has no one number: {coef}")

    def number(self, what: str, coef: Coef) -> float:
        """A coefficient that may not be a tensor."""
        value, scale = self.coef(coef)
        if scale != NONE:
            raise UnsupportedError(f"{what} takes a number, not a tensor")
        return value


class _TooMuch(Exception):
    """The ops do not fit one kernel row."""


def _rows(codes: _Codes, branches: Mapping[str, int], ops: Sequence[Op], live: Set[str]) -> list[list[Row] | LowRank]:
    """Launches of `ops`, as few as possible, each a kernel row or one a class; what a later one reads is in slots."""
    ops = [part for op in ops for part in _narrow(op)]
    classes = _classes(ops)
    done: list[list[Row] | LowRank] = []
    while ops:
        if isinstance(ops[0], Transform) and ops[0].kind == KIND:
            gains, basis = (codes.side_car[key] for key in keys_of(ops[0]))
            done.append(LowRank(codes.slots[ops[0].slot], gains, basis))
            ops = ops[1:]
            continue
        most = next((n for n, op in enumerate(ops) if isinstance(op, Transform) and op.kind == KIND), len(ops))
        for count in range(most, 0, -1):
            after = live_before(ops[count:], live)
            try:
                folded = [_fold(codes, branches, _of_class(ops[:count], number), after) for number in range(classes)]
                break
            except _TooMuch:
                continue
        else:
            raise UnsupportedError(f"{ops[0]} does not fit the fused step")
        for rows in zip(*folded, strict=True):
            done.append([rows[0]] if all(row == rows[0] for row in rows[1:]) else list(rows))
        ops = ops[count:]
    return done


def _classes(ops: Sequence[Op]) -> int:
    """Classes of tokens that `ops` tell apart; 1: none. Raises UnsupportedError where they meet in a reduction."""
    count = 1
    aged: set[str] = set()  # slots whose formula in this row goes by class
    for op in ops:
        counts = [len(coef.values) for coef in coefs(op) if isinstance(coef, AgeRef)]
        count = max([count, *counts])
        by_class = bool(counts) or bool(aged & set(reads(op)))
        if by_class and isinstance(op, Transform) and op.kind in (*_REDUCES, KIND):
            raise UnsupportedError(
                f"{op.kind} of {op.slot!r} reduces over the sample, but what it reads goes by the age of tokens; "
                "compute all tokens in this row, or use another solver"
            )
        aged = aged | {writes(op)} if by_class else aged - {writes(op)}
    return count


def _of_class(ops: Sequence[Op], number: int) -> list[Op]:
    """The ops as tokens of one class run them; terms that are 0 for them are left out."""

    def of(coef: Coef) -> Coef:
        return coef.values[number] if isinstance(coef, AgeRef) else coef

    made: list[Op] = []
    for op in ops:
        if isinstance(op, Affine):
            terms = [(slot, of(coef)) for slot, coef in op.terms if not isinstance(coef, AgeRef) or of(coef) != 0.0]
            made.append(replace(op, terms=tuple(terms)))
        else:
            made.append(replace(op, params=tuple((name, of(coef)) for name, coef in op.params)))
    return made


def _narrow(op: Op) -> list[Op]:
    """An Affine of more terms than a kernel row has sources, as a chain through a scratch slot."""
    if not isinstance(op, Affine) or len(op.terms) <= SOURCES:
        return [op]
    rest = replace(op, terms=((_ACC, 1.0), *op.terms[SOURCES:]))
    return [Affine(_ACC, op.terms[:SOURCES]), *_narrow(rest)]


def _fold(codes: _Codes, branches: Mapping[str, int], ops: Sequence[Op], live: Set[str]) -> list[Row]:
    """The kernel row that does `ops` and leaves `live` in the pool, after a reduction row if an op needs one.

    Raises: _TooMuch when they do not fit.
    """
    row = _Folded(codes, {out: {(code, NONE): 1.0} for out, code in branches.items()})
    last = {writes(op): n for n, op in enumerate(ops)}
    for n, op in enumerate(ops):
        if isinstance(op, Transform):
            row.transform(op)
            continue
        row.env[op.dst] = row.formula(op.terms)
        if last[op.dst] == n and op.dst in live:
            row.keep(op.dst)
    row.check()
    return [part for part in (row.reduction, row.outputs) if part]


class _Folded:
    """A kernel row in the making: formulas of slots, outputs so far, the reduction that goes before it."""

    def __init__(self, codes: _Codes, env: dict[str, Formula]) -> None:
        self.codes, self.env = codes, env
        self.outputs: list[Output] = []
        self.reduction: Reduction | None = None

    def formula(self, terms: Sequence[tuple[str, Coef]]) -> Formula:
        """Sum of coefficient * slot over the slots as they were before the row."""
        total: Formula = {}
        for slot, coef in terms:
            number, scale = self.codes.coef(coef)
            base = self.env[slot] if slot in self.env else {(self.codes.source(slot), NONE): 1.0}
            for (source, inner), weight in (base if scale == NONE else self.expanded(base)).items():
                if scale != NONE and inner != NONE:
                    raise _TooMuch  # a product of two tensors: keep the inner one in a slot
                key = (source, max(scale, inner))
                total[key] = total.get(key, 0.0) + number * weight
        return {key: weight for key, weight in total.items() if weight != 0.0}

    def expanded(self, base: Formula) -> Formula:
        """`base` without references to outputs of the same row: they take no scale, and a reduction sees none."""
        total: Formula = {}
        for key, weight in base.items():
            if key[0] < PREV:
                total[key] = total.get(key, 0.0) + weight
                continue
            output = self.outputs[key[0] - PREV]
            if output.adjusted or output.low > -_INFINITE or output.high < _INFINITE:
                raise _TooMuch
            inner = {(source, scale): w for source, scale, w in output.terms}
            inner |= {(PREV + k, NONE): w for k, w in enumerate(output.prev) if w}
            for inner_key, inner_weight in self.expanded(inner).items():
                total[inner_key] = total.get(inner_key, 0.0) + weight * inner_weight
        return total

    def keep(self, slot: str, low: float = -_INFINITE, high: float = _INFINITE, adjusted: bool = False) -> None:
        """The slot becomes an output; who reads it from now on reads that."""
        formula = self.env[slot]
        terms = [(*key, weight) for key, weight in formula.items() if key[0] < PREV]
        prev = [formula.get((PREV + k, NONE), 0.0) for k in range(len(self.outputs))]
        destination = NET if slot == _FEED else self.codes.slots[slot]
        self.outputs.append(Output(destination, terms, prev, low, high, adjusted))
        self.env[slot] = {(PREV + len(self.outputs) - 1, NONE): 1.0}

    def transform(self, op: Transform) -> None:
        """Clamp while writing; or reduce first, and let the output take what comes of it."""
        self.env[op.slot] = self.formula(((op.slot, 1.0),))
        numbers = [self.codes.number(f"{op.kind} of {op.slot!r}: {name}", coef) for name, coef in op.params]
        if op.kind == "clamp":
            low, high = numbers
            self.keep(op.slot, low, high)
            return
        if self.reduction is not None:
            raise _TooMuch  # one a row: a sample has one (low, high, gain)
        reduced = [self.expanded(self.formula(((slot, 1.0),))) for slot in (op.slot, *op.reads)]
        terms = [[(*key, weight) for key, weight in formula.items() if weight != 0.0] for formula in reduced]
        self.reduction = Reduction(_REDUCES[op.kind], terms, *numbers)
        self.keep(op.slot, adjusted=True)

    def check(self) -> None:
        """The outputs and the sources of both rows fit."""
        destinations = {output.destination for output in self.outputs}
        if len(self.outputs) > min(OUTPUTS, len(destinations)):
            raise _TooMuch
        for outputs in (self.outputs, () if self.reduction is None else self.reduction.outputs):
            if len({term[:2] for output in outputs for term in output.terms}) > SOURCES:
                raise _TooMuch


_REDUCES = {"dynamic_threshold": THRESHOLD, "cfg_rescale": RESCALE}
