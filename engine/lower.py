"""Rows -> descriptors: the ops of a row become one pass over memory, with all coefficients folded in float64.

A kernel row computes up to `OUTPUTS` linear combinations of up to `SOURCES` slots. A slot that nothing reads later is
never written: its formula is folded into the ones that read it. Ops that do not fit one kernel row become several.
The network's next input, `x_scale * x`, is one more output of the row before it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence, Set
from dataclasses import dataclass, replace

from vivace.engine.plan import Affine, Coef, InputRef, Op, Plan, TensorRef, Transform, reads, writes
from vivace.errors import UnsupportedError
from vivace.kernels.solver_step.table import (
    NET,
    NOISE,
    NONE,
    ONE,
    OUT,
    OUTPUTS,
    SOURCES,
    TENSOR,
    Output,
    StepTable,
    build_table,
)

PREV = 1 << 31  # source code of output l of the same kernel row: PREV + k
Formula = dict[tuple[int, int], float]  # (source code, scale code) -> coefficient
_ACC = "acc_"  # scratch slot of a sum with too many terms
_FEED = "net_"  # stands for the network-input plane among the slots of a row


@dataclass(frozen=True, slots=True)
class Lowered:
    """A plan as kernel rows for one request.

    spans[i]: (first, last) kernel rows of plan row i, half-open; start: those that fill the first slots; slots: pool
    slot by name; noisy: whether any row draws noise.
    """

    table: StepTable
    spans: tuple[tuple[int, int], ...]
    start: tuple[int, int]
    slots: Mapping[str, int]
    noisy: bool


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
    return {name: number for number, name in enumerate((*names, _ACC))}


def lower_plan(plan: Plan, given: Given, side_car: Mapping[str, int] | None = None) -> Lowered:
    """Lower every row of `plan`; `side_car`: number of each plan tensor in the list the executor is handed.

    Raises: UnsupportedError naming the row, when an op is beyond the fused step.
    """
    codes = _Codes(slot_names(plan, given), given, side_car or {})
    live = _live_after(plan)
    kernel_rows: list[list[Output]] = []
    spans = []
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
        except UnsupportedError as error:
            raise UnsupportedError(f"{'init' if step is None else f'step {i - 1}'}: {error}") from None
        spans.append((len(kernel_rows), len(kernel_rows) + len(made)))
        kernel_rows.extend(made)
    noisy = any(term[0] >= NOISE for row in kernel_rows for output in row for term in output.terms)
    return Lowered(build_table(kernel_rows, "float64"), tuple(spans[1:]), spans[0], codes.slots, noisy)


# --- liveness --------------------------------------------------------------------------------------------------------
def _live_after(plan: Plan) -> list[set[str]]:
    """Slots read later, before they are written again: entry 0 after `init`, entry i + 1 after row i."""
    live = {"x"}  # the result
    after = [live]
    for step in reversed(plan.steps):
        live = _live_before(step.ops, live)
        if step.variant is not None:
            live = (live - set(step.outs)) | {step.x}
        after.append(live)
    return after[::-1]


def _live_before(ops: Sequence[Op], live: Set[str]) -> set[str]:
    out = set(live)
    for op in reversed(ops):
        out.discard(writes(op))
        out.update(reads(op))
    return out


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
        raise UnsupportedError("a coefficient per token age needs a row that recomputes a part of the tokens")


class _TooMuch(Exception):
    """The ops do not fit one kernel row."""


def _rows(codes: _Codes, branches: Mapping[str, int], ops: Sequence[Op], live: Set[str]) -> list[list[Output]]:
    """Kernel rows of `ops`: as few as possible; what a later one reads is kept in slots."""
    ops = [part for op in ops for part in _narrow(op)]
    done = []
    while ops:
        for count in range(len(ops), 0, -1):
            try:
                row = _fold(codes, branches, ops[:count], _live_before(ops[count:], live))
                break
            except _TooMuch:
                continue
        else:
            raise UnsupportedError(f"{ops[0]} does not fit the fused step")
        if row:
            done.append(row)
        ops = ops[count:]
    return done


def _narrow(op: Op) -> list[Op]:
    """An Affine of more terms than a kernel row has sources, as a chain through a scratch slot."""
    if not isinstance(op, Affine) or len(op.terms) <= SOURCES:
        return [op]
    rest = replace(op, terms=((_ACC, 1.0), *op.terms[SOURCES:]))
    return [Affine(_ACC, op.terms[:SOURCES]), *_narrow(rest)]


def _fold(codes: _Codes, branches: Mapping[str, int], ops: Sequence[Op], live: Set[str]) -> list[Output]:
    """One kernel row that does `ops` and leaves `live` in the pool. Raises _TooMuch when it does not fit."""
    env: dict[str, Formula] = {out: {(code, NONE): 1.0} for out, code in branches.items()}
    outputs: list[Output] = []
    last = {writes(op): n for n, op in enumerate(ops)}

    def formula(terms: Sequence[tuple[str, Coef]]) -> Formula:
        total: Formula = {}
        for slot, coef in terms:
            number, scale = codes.coef(coef)
            base = env[slot] if slot in env else {(codes.source(slot), NONE): 1.0}
            for (source, inner), weight in (base if scale == NONE else _expanded(base, outputs)).items():
                if scale != NONE and inner != NONE:
                    raise _TooMuch  # a product of two tensors: keep the inner one in a slot
                key = (source, max(scale, inner))
                total[key] = total.get(key, 0.0) + number * weight
        return {key: weight for key, weight in total.items() if weight != 0.0}

    for n, op in enumerate(ops):
        slot = writes(op)
        if isinstance(op, Affine):
            env[slot] = formula(op.terms)
            if last[slot] != n or slot not in live:
                continue
            low, high = -float("inf"), float("inf")
        else:
            low, high = _clamp(codes, op)
            env[slot] = formula(((slot, 1.0),))
        terms = [(*key, weight) for key, weight in env[slot].items() if key[0] < PREV]
        prev = [env[slot].get((PREV + k, NONE), 0.0) for k in range(len(outputs))]
        outputs.append(Output(NET if slot == _FEED else codes.slots[slot], terms, prev, low, high))
        env[slot] = {(PREV + len(outputs) - 1, NONE): 1.0}
    sources = {term[:2] for output in outputs for term in output.terms}
    if len(outputs) > min(OUTPUTS, len({output.destination for output in outputs})) or len(sources) > SOURCES:
        raise _TooMuch
    return outputs


def _expanded(base: Formula, outputs: Sequence[Output]) -> Formula:
    """`base` without references to outputs of the same row, which cannot carry a scale tensor."""
    total: Formula = {}
    for key, weight in base.items():
        if key[0] < PREV:
            total[key] = total.get(key, 0.0) + weight
            continue
        output = outputs[key[0] - PREV]
        if output.low > -float("inf") or output.high < float("inf"):
            raise _TooMuch
        inner = {(source, scale): w for source, scale, w in output.terms}
        inner |= {(PREV + k, NONE): w for k, w in enumerate(output.prev) if w}
        for inner_key, inner_weight in _expanded(inner, outputs).items():
            total[inner_key] = total.get(inner_key, 0.0) + weight * inner_weight
    return total


def _clamp(codes: _Codes, op: Transform) -> tuple[float, float]:
    if op.kind != "clamp":
        raise UnsupportedError(f"transform {op.kind!r} needs a reduction over the sample; the step runs clamp only")
    (low, low_scale), (high, high_scale) = (codes.coef(coef) for _, coef in op.params)
    if max(low_scale, high_scale) != NONE:
        raise UnsupportedError("a clamp takes numbers as bounds, not tensors")
    return low, high
