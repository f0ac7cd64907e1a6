"""Plans run backwards: from a picture, or from what a run left, to the noise it comes from; and the way back to it.

A row that steps by x' = a x + b f(x) + c before (f: the network's output, guided or not) can be taken back:
    c = 0, DDIM   x = (x' - b f(u)) / a, u an estimate of x, at first x' itself; several evaluations iterate u <- x
    c != 0, BDIA  before = (x' - a x - b f(x)) / c, with x known: the same evaluation, so nothing is approximated
Sources: Song, Meng and Ermon 2020 (DDIM), section 4.3, as Mokady et al. 2022: the network reads the state it has at the
timestep it goes to. Pan et al. 2023 (AIDI): iterations. Zhang, Lewis and Kleijn 2023 (BDIA).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from vivace.engine.plan import Affine, Args, Op, Plan, Step, reads, writes
from vivace.engine.prediction import to_x0
from vivace.engine.solvers.bdia import BEFORE
from vivace.engine.solvers.rows import affine, first_order, require_number
from vivace.engine.timesteps import choose
from vivace.engine.verify import verify
from vivace.errors import ArgumentError, PlanError

STARTS = ("picture", "pair")
_NEXT = "ahead"  # scratch, as in bdia
_SMALLEST = 1e-9  # of a coefficient that is divided by
Form = dict[str, float]  # slot -> coefficient


def invert(plan: Plan, *, start: str = "picture", evaluations: int = 1) -> Plan:
    """The plan that goes the steps of `plan` backwards, last row first, and ends in the state that it started from.

    Args:
        plan: of one-step rows without noise (ddim, euler, flow_euler, ...) or of `bdia`; guided or not. Passes that
            write caches come after this one.
        start: "picture": `input:start` (a request's `image`) is what the plan would end in. Of `bdia` the state next to
            it is then estimated as for DDIM. "pair", `bdia` only: `input:start` and `input:before` are the result and
            slot "before" of its run, and nothing is estimated.
        evaluations: of an estimated step: 1 as published for DDIM, more iterate towards the exact solution.
    Returns: a plan whose result is the first state (of `bdia`, the pair of the first two): what `retrace(plan)` starts
        from. Its recipe names this pass; a tail of it goes as far as the tail goes.
    Raises: ArgumentError; PlanError naming the row that cannot be taken back.
    """
    choose("invert: start", start, STARTS)
    if type(evaluations) is not int or not 1 <= evaluations <= 100:
        raise ArgumentError(f"invert: evaluations must be an integer in 1..100, got {evaluations!r}")
    rows, pair = _rows(plan), _pair(plan)
    if start == "pair" and not pair:
        raise PlanError("invert: start 'pair' is of plans with two states (bdia, gamma above 0); use 'picture'")
    guessed = [] if start == "pair" else [rows[-1].alone(rows)] if pair else list(reversed(rows))
    steps = [step for row in guessed for step in _estimated(row, evaluations, pair)]
    if pair:
        steps += [_exact(row) for row in reversed(rows) if row.before]
    init = _two_states() if start == "pair" else (Affine("x", (("input:start", 1.0),)),)
    made = replace(plan, steps=_rising(steps), init=init, results=("x", BEFORE) if pair else ("x",))
    return _recorded(made, "invert", {"start": start, "evaluations": evaluations})


def retrace(plan: Plan) -> Plan:
    """`plan` from the state that its inversion ends in: the same rows, without the noise that it started from.

    Of `bdia` it starts from the pair, `input:start` and `input:before` (result and slot "before" of the inversion), and
    leaves out the first row, which only made the second of the two. What it ends in is what the inversion started from:
    to rounding for `bdia`, to the error of the estimates for others.
    Raises: PlanError as `invert`.
    """
    pair = bool(_rows(plan)) and _pair(plan)
    cut = 1 if pair and not _rows(plan)[0].before else 0
    init = _two_states() if pair else (Affine("x", (("input:start", 1.0),)),)
    return _recorded(replace(plan, steps=plan.steps[cut:], init=init), "retrace", {})


def _two_states() -> tuple[Affine, ...]:
    """The rule is evaluated at the neighbour of the last state."""
    return Affine("x", (("input:before", 1.0),)), Affine(BEFORE, (("input:start", 1.0),))


def _pair(plan: Plan) -> bool:
    return BEFORE in plan.results


def _recorded(plan: Plan, name: str, args: dict[str, str | int]) -> Plan:
    recipe = plan.recipe
    if recipe is not None:
        recipe = replace(recipe, passes=(*recipe.passes, (name, Args.of(args))))
    return verify(replace(plan, recipe=recipe))


# --- rows as they step -----------------------------------------------------------------------------------------------
@dataclass(frozen=True, slots=True)
class _Row:
    """x' = x * keep + before * (slot before) + sum of weights, after the ops `kept`, which read no state."""

    number: int
    step: Step
    prediction: str
    kept: tuple[Op, ...]
    keep: float
    before: float
    weights: Form

    def alone(self, rows: Sequence[_Row]) -> _Row:
        """The row without its part of symmetry: DDIM's step, where it is BDIA's from the row before."""
        if not self.before:
            return self
        if len(self.weights) != 1 or self.number == 0:
            raise PlanError(f"invert: step {self.number}: the row before it is not in the plan; use start='pair'")
        level, last = (self.step.alpha, self.step.sigma), rows[self.number - 1].step
        p, q = to_x0(self.prediction, *level)
        keep, weight = first_order(level, (last.alpha, last.sigma))
        weights = {slot: b + self.before * weight * q for slot, b in self.weights.items()}
        return replace(self, keep=self.keep + self.before * (keep + weight * p), before=0.0, weights=weights)


def _rows(plan: Plan) -> list[_Row]:
    """What every row of the plan does to the state. Raises PlanError."""
    pair, rows = _pair(plan), []
    for i, step in enumerate(plan.steps):
        row = _row(i, step, plan.prediction, pair)
        rows.append(row)
        if pair and (row.before == 0.0) != (i == 0 and BEFORE not in {writes(op) for op in plan.init}):
            raise PlanError(f"invert: step {i} does not step from two states as the others do")
    return rows


def _row(i: int, step: Step, prediction: str, pair: bool) -> _Row:
    where = f"invert: step {i}"
    if step.guard is not None:
        raise PlanError(f"{where} has a guard, which decides by the rows before it; `freeze` its decisions first")
    if step.restart:
        raise PlanError(f"{where} goes to more noise; only plans that go from noise to data are inverted")
    if step.variant is None or step.x != "x":
        what = "has no evaluation" if step.variant is None else f"evaluates {step.x!r}, a stage"
        raise PlanError(f"{where} {what}; only steps of one evaluation are taken back (ddim, euler, bdia)")
    state: dict[str, Form] = {"x": {"x": 1.0}} | ({BEFORE: {BEFORE: 1.0}} if pair else {})
    free, kept = set(step.outs), []
    for op in step.ops:
        dst = writes(op)
        if set(reads(op)) <= free and dst not in ("x", BEFORE):
            kept.append(op)
            free.add(dst)
            state.pop(dst, None)
            continue
        state[dst] = _folded(where, op, state, free)
        free.discard(dst)
    if pair and state[BEFORE] != {"x": 1.0}:
        raise PlanError(f"{where} does not keep the state before x in slot {BEFORE!r}")
    form = state["x"]
    weights = {slot: coef for slot, coef in form.items() if slot not in ("x", BEFORE)}
    return _Row(i, step, prediction, tuple(kept), form.get("x", 0.0), form.get(BEFORE, 0.0), weights)


def _folded(where: str, op: Op, state: dict[str, Form], free: set[str]) -> Form:
    """A sum over states and free slots. Raises PlanError for what else an op may do or read."""
    if not isinstance(op, Affine):
        raise PlanError(f"{where}: {op.kind} of {op.slot!r} cannot be taken back; make the plan without it")
    total: Form = {}
    for slot, coef in op.terms:
        if not isinstance(coef, float):
            raise PlanError(f"{where}: {op.dst!r} takes a coefficient that is no number; make the plan without it")
        if slot not in state and slot not in free:
            raise PlanError(
                f"{where} reads {slot!r}; noise and history cannot be taken back (ddim with eta=0 and bdia can)"
            )
        for name, inner in (state.get(slot) or {slot: 1.0}).items():
            total[name] = total.get(name, 0.0) + coef * inner
    return total


# --- rows back -------------------------------------------------------------------------------------------------------
def _exact(row: _Row) -> Step:
    """x is the state at this row, `before` the one after it: they become the one before and this one."""
    c = _divisor(row, row.before)
    terms = (BEFORE, 1.0 / c), ("x", -row.keep / c), *((slot, -b / c) for slot, b in row.weights.items())
    back = affine(_NEXT, *terms), affine(BEFORE, ("x", 1.0)), affine("x", (_NEXT, 1.0))
    return replace(row.step, ops=(*row.kept, *back))


def _estimated(row: _Row, evaluations: int, pair: bool) -> list[Step]:
    """Rows that find x from the state after it, which goes to `before` where it is read again.

    A network that predicts x0 says at no noise nothing that could be divided by: there eps is held, b f - b x / alpha.
    """
    held = -sum(row.weights.values()) / row.step.alpha if row.prediction == "x0" and row.step.alpha else 0.0
    a = _divisor(row, row.keep - held)
    outputs = [(slot, -b / a) for slot, b in row.weights.items()]
    first: list[Op] = [affine(_NEXT, ("x", (1.0 - held) / a), *outputs)]
    if pair or evaluations > 1:
        first.append(affine(BEFORE, ("x", 1.0)))
    first.append(affine("x", (_NEXT, 1.0)))
    again = (affine("x", (BEFORE, 1.0 / a), ("x", -held / a), *outputs),)
    steps = [replace(row.step, ops=(*row.kept, *first))]
    return steps + [replace(row.step, ops=(*row.kept, *again))] * (evaluations - 1)


def _divisor(row: _Row, value: float) -> float:
    if abs(require_number("invert", "coefficient", abs(value))) < _SMALLEST:
        raise PlanError(f"invert: step {row.number}: the state it starts from does not show in what it makes")
    return value


def _rising(steps: Sequence[Step]) -> tuple[Step, ...]:
    """The rows with those marked that evaluate at more noise than the one before."""
    levels = [(step.alpha, step.sigma) for step in steps]
    return tuple(
        replace(step, restart=n > 0 and level != levels[n - 1])
        for n, (step, level) in enumerate(zip(steps, levels, strict=True))
    )
