"""What a token that a row leaves out means to the solver: its history holds what was computed of it, and nothing else.

In solvers with history or fresh noise a token moves by what class it is of in a row (`AgeRef`):
- skipped: it is not computed. Its newest value stays, m_i <- m_{i-1}, and x takes the first-order step with it, which
  adds the row's noise: x' = a x + W m + c z, W the sum of the solver's weights.
- steady: computed in this row and in all rows before it that the solver reads: the plan's own coefficients.
- gap k: computed now and k steps ago before that: x' = a (x + C (m_i - m_{i-1})) + (W + s) m_i - s m_{i-1}, with
  s = M / (u_i - u_{i-k}), where u is the variable in which the solver extrapolates and M = sum_j w_j (u_{i-j} - u_i)
  the first moment of its weights: its rule of second order through two values at their own times. C makes good the
  steps between, as correctors do: what they would have added had the value changed linearly in u meanwhile,
  C = sum_r (a_{r+1} .. a_{i-1}) (W_r (u_r - u_{i-k}) + M_r) / (u_i - u_{i-k}), r the steps that left the token out.
  A corrector of the solver's own is left out.
- older: computed now, and longer ago than B steps: taken as gap B + 1, so the last B steps between are made good.
Slot m_{i-1} holds the newest value of a token whatever its age, so gaps need no slots.

A solver of third order and more is of second order around gaps. UniPC's first steady row corrects the step before it,
which was of second order, and leaves it so.
Source: Zhao et al. 2023, eq. 9 (UniP of two values); Lu et al. 2022, eq. 9; sums and moments: algebra only.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from vivace.engine.noise_schedule import NoiseSchedule
from vivace.engine.plan import Affine, AgeRef, Args, Coef, Op, Plan, Step, Transform, reads, writes
from vivace.engine.verify import verify
from vivace.errors import ArgumentError, PlanError

NAME = "apply_tokens"
HISTORY = re.compile(r"m[0-9]+\Z")
VARIABLES = {
    "dpmpp_2m": "lam",
    "dpmpp_3m": "lam",
    "dpmpp_2m_sde": "lam",
    "dpm_solver": "lam",
    "unipc": "lam",
    "lms": "rho",
    "ipndm": "step",
    "gradient_estimation": "step",
    "pndm": "step",
    "DPMSolverMultistepScheduler": "lam",
    "EDMDPMSolverMultistepScheduler": "lam",
    "DEISMultistepScheduler": "lam",
    "UniPCMultistepScheduler": "lam",
    "LMSDiscreteScheduler": "rho",
    "IPNDMScheduler": "step",
    "PNDMScheduler": "step",
}
"""In which variable a solver extrapolates; deis and lagrange say it in their options."""
DEIS = {"tab": "t", "rhoab": "rho", "logrho": "lam"}


@dataclass(frozen=True, slots=True)
class _Row:
    """A row that evaluates, as solvers make it: m <- a conversion, then x <- a sum.

    step: number of its step; slot: that it keeps its value in, "" for none; kept, update: where these ops are;
    reads: (steps back, weight) of values in the update; keep: a, of x in it; before: slot of the step before.
    """

    number: int
    step: int
    slot: str
    kept: int
    update: int
    reads: tuple[tuple[int, float], ...]
    keep: float
    before: str

    @property
    def total(self) -> float:
        """W, the sum of the weights."""
        return math.fsum(weight for _, weight in self.reads)


def token_history(plan: Plan, rows: Sequence[int], ages: int = 3) -> Plan:
    """x' by class of token, in rows that leave tokens out and after them until every token is steady.

    Args:
        plan: with its solver's rows as they were made, guided or not; rows: numbers of those that leave tokens out.
        ages: B, gaps that have coefficients of their own.
    Returns: the plan; unchanged where steps neither read history nor add fresh noise: a prediction given again is all
        there is to such a token then.
    Raises: ArgumentError; PlanError naming the row and the solver for what has no such history: inner stages beside
        history or noise, noise on a history that is not x0, coefficients that are tensors, a Transform that reduces or
        is followed by a conversion.
    """
    if type(ages) is not int or not 0 <= ages <= 32:
        raise ArgumentError(f"{NAME}: ages {ages!r:.40}; an integer from 0 to 32 is needed")
    if not rows:
        return plan
    _check_memory(plan)
    known = _rows(plan)
    later = [row for row in known if row.number >= min(rows)]
    depth = max((age for row in later for age, _ in row.reads), default=0)
    fresh = any(_noise(plan.steps[row.number]) for row in known if row.step >= later[0].step - 1)
    if depth == 0 and not fresh:
        return plan
    _check_reads(plan, later)
    if fresh:
        _check_noise(plan, known)
    base = known if depth == 0 else _rows(_uncorrected(plan))
    places = _places(plan, known) if depth else {}
    by_step = {row.step: row for row in base}
    last = {row.step for row in known if row.number in set(rows)}
    steps = list(plan.steps)
    for row, plain in zip(known, base, strict=True):
        if row.step < later[0].step or not any(step in last for step in range(row.step - depth, row.step + 1)):
            continue
        skips = row.number in rows
        steps[row.number] = _aged(plan, row, plain, _slopes(plain, by_step, places, ages), skips)
    return verify(replace(plan, steps=tuple(steps)))


# --- what the rows do ------------------------------------------------------------------------------------------------
def _rows(plan: Plan) -> list[_Row]:
    """The rows that evaluate."""
    found: list[_Row] = []
    owner: dict[str, int] = {}  # history slot -> step that wrote it
    step, before, latest = -1, "", ""
    for number, row in enumerate(plan.steps):
        if row.variant is None and not any(HISTORY.match(_dst(op)) for op in row.ops):
            continue  # a row without evaluation that fills history is a step as others
        if row.x == "x":
            step, before = step + 1, latest
        kept = next((k for k, op in enumerate(row.ops) if isinstance(op, Affine) and HISTORY.match(op.dst)), -1)
        slot = _dst(row.ops[kept]) if kept >= 0 else ""
        if slot:
            owner[slot] = step
            latest = slot if row.x == "x" else latest
        update = next((k for k, op in enumerate(row.ops) if k > kept and _dst(op) in ("x", "u")), -1)
        op = row.ops[update] if update >= 0 else None
        terms = op.terms if isinstance(op, Affine) else ()
        reads = tuple((step - owner[name], coef) for name, coef in terms if name in owner and isinstance(coef, float))
        keep = sum(coef for name, coef in terms if name == "x" and isinstance(coef, float))
        found.append(_Row(number, step, slot, kept, update, reads, keep, before))
    return found


def _dst(op: Op) -> str:
    return op.dst if isinstance(op, Affine) else ""


def _noise(step: Step) -> bool:
    """The row adds fresh noise."""
    return any(
        slot.startswith("noise:") and slot != "noise:0"
        for op in step.ops
        if isinstance(op, Affine)
        for slot, _ in op.terms
    )


def _check_memory(plan: Plan) -> None:
    """Raise PlanError where tokens left out would lack more than history m<k>: other slots, noise between rows."""
    kept: set[str] = set()  # slots of earlier rows
    for i, step in enumerate(plan.steps):
        mine = {"x", "u", *step.outs}
        if step.variant is None and _noise(step) and any(row.variant is not None for row in plan.steps[:i]):
            raise PlanError(
                f"{NAME}: step {i} adds noise between evaluations (apply_restart), which tokens left out would not "
                "follow; use a plan without restarts"
            )
        for op in step.ops:
            for slot in reads(op):
                if slot in kept and slot not in mine and not HISTORY.match(slot):
                    raise PlanError(
                        f"{NAME}: step {i} reads slot {slot!r} of an earlier row, which tokens left out would lack "
                        "(momentum, ghvb and the like); use a plan without, such as of dpmpp_2m"
                    )
            mine.add(writes(op))
        kept |= mine


def _check_reads(plan: Plan, rows: Sequence[_Row]) -> None:
    """Raise PlanError for rows whose history no token can have."""
    for row in rows:
        step = plan.steps[row.number]
        if row.step == 0:
            raise _refuse(plan, row, "is of the first step", "token rows after it")
        if step.x != "x" or not row.slot or row.update < 0 or _dst(step.ops[row.update]) != "x":
            raise _refuse(
                plan, row, "is one of several evaluations of a step beside history or fresh noise", "dpmpp_2m"
            )
        ages = {age for age, _ in row.reads}
        if ages - {0} != set(range(1, len(ages - {0}) + 1)):
            raise _refuse(plan, row, f"reads values of {sorted(ages)} steps ago and none between", "history='own'")


def _check_noise(plan: Plan, rows: Sequence[_Row]) -> None:
    """Raise PlanError unless history is x0: a kept eps knows nothing of the noise that was added since.

    Of x = alpha x0 + sigma eps a step on x0 keeps the mean alpha' x0 = (a alpha + W) x0.
    """
    for row, following in zip(rows, rows[1:], strict=False):
        step, end = plan.steps[row.number], plan.steps[following.number]
        if not _noise(step):
            continue
        if not row.slot:
            raise _refuse(plan, row, "adds fresh noise and keeps no x0", "ddpm")
        terms = _skipped(plan, row, row.total)
        keep, weight = terms.get("x", 0.0), terms[row.slot]
        if abs(keep * step.alpha + weight - end.alpha) > 0.1 * abs(weight):
            raise _refuse(plan, row, "adds fresh noise to a history of eps", "a solver on x0, such as dpmpp_2m_sde")


def _refuse(plan: Plan, row: _Row, what: str, instead: str) -> PlanError:
    return PlanError(
        f"{NAME}: step {row.number} of {_solver(plan)} {what}; tokens that it leaves out would have no history. "
        f"Use {instead}, or leave no tokens out from there on"
    )


# --- coefficients ----------------------------------------------------------------------------------------------------
def _slopes(row: _Row, base: Mapping[int, _Row], places: Mapping[int, float], ages: int) -> list[float]:
    """s + a C of every gap 1, ..., B + 1; 0 where the other value is at infinity."""
    slopes = []
    for gap in range(1, ages + 2):
        first = row.step - gap
        apart = places[row.step] - places[first] if first in places else 0.0
        if not apart or not math.isfinite(apart):
            slopes.append(0.0)
            continue
        lag = 0.0  # of x, in units of the change of the value over the gap
        for step in range(first + 1, row.step):
            behind = base[step].total * (places[step] - places[first]) + _moment(base[step], places)
            lag = base[step].keep * lag + behind
        slopes.append((_moment(row, places) + row.keep * lag) / apart)
    return slopes


def _moment(row: _Row, places: Mapping[int, float]) -> float:
    """M, the first moment of a row's weights about its own place."""
    return math.fsum(
        weight * (places[row.step - age] - places[row.step]) for age, weight in row.reads if age and weight
    )


def _aged(plan: Plan, row: _Row, plain: _Row, slopes: Sequence[float], skips: bool) -> Step:
    """The row with its coefficients by class. skips: it leaves tokens out."""
    step = plan.steps[row.number]
    ops = list(step.ops)
    own = _floats(plan, row)
    total = plain.total
    others = {slot: coef for slot, coef in own.items() if not HISTORY.match(slot)}
    first = {**others, row.slot: total}
    gaps = [{**others, row.slot: total + s, row.before: -s} if s else first for s in slopes]
    classes = [_skipped(plan, row, total) if skips else first, own, *gaps]
    terms = []
    for slot in dict.fromkeys(slot for each in (own, *classes) for slot in each):
        values = tuple(each.get(slot, 0.0) for each in classes)
        if any(values):
            terms.append((slot, _by_class(values)))
    ops[row.update] = Affine("x", tuple(terms))
    if skips:
        ops[row.kept] = _keeping(plan, row, len(classes))
    return replace(step, ops=tuple(ops))


def _by_class(values: tuple[float, ...]) -> Coef:
    """The coefficient, a plain number where all classes have one."""
    return values[0] if len(set(values)) == 1 else AgeRef(values)


def _keeping(plan: Plan, row: _Row, classes: int) -> Affine:
    """The op that fills the history slot, with the value before it where a token is not computed."""
    op = plan.steps[row.number].ops[row.kept]
    assert isinstance(op, Affine), "a history slot is filled by an Affine"
    for other in plan.steps[row.number].ops[row.kept + 1 :]:
        if isinstance(other, Transform) and other.slot == row.slot and other.kind != "clamp":
            raise _refuse(plan, row, f"runs {other.kind} on its history over all tokens", "no such transform")
        if _dst(other) == row.slot:
            raise _refuse(plan, row, "changes x0 and keeps eps", "a solver on x0")
    terms: list[tuple[str, Coef]] = []
    for slot, coef in op.terms:
        if not isinstance(coef, float):
            raise _refuse(plan, row, "fills its history with coefficients that are no numbers", "a solver without")
        terms.append((slot, AgeRef((0.0, *[coef] * (classes - 1)))))
    return Affine(row.slot, (*terms, (row.before, AgeRef((1.0, *[0.0] * (classes - 1))))), op.at)


def _skipped(plan: Plan, row: _Row, total: float) -> dict[str, float]:
    """The update of a token that is not computed: `total` times its kept value; outputs of the network through it."""
    step = plan.steps[row.number]
    op = step.ops[row.kept]
    assert isinstance(op, Affine), "a history slot is filled by an Affine"
    made: dict[str, float] = {"x": 0.0, row.slot: total}
    conversion = dict(op.terms)
    for slot, coef in _floats(plan, row).items():
        if HISTORY.match(slot):
            continue
        if slot == "x" or slot == "one" or slot.startswith(("noise:", "input:")):
            made[slot] = made.get(slot, 0.0) + coef
            continue
        p, q = conversion.get("x", 0.0), conversion.get(slot)
        if set(conversion) - {"x", slot} or not isinstance(p, float) or not isinstance(q, float) or q == 0.0:
            raise _refuse(plan, row, f"reads {slot!r}, which its history does not tell", "another solver")
        made["x"] -= coef * p / q
        made[row.slot] += coef / q
    return {slot: coef for slot, coef in made.items() if coef != 0.0}


def _floats(plan: Plan, row: _Row) -> dict[str, float]:
    """The terms of a row's update."""
    op = plan.steps[row.number].ops[row.update]
    assert isinstance(op, Affine), "an update is an Affine"
    found: dict[str, float] = {}
    for slot, coef in op.terms:
        if not isinstance(coef, float):
            raise _refuse(plan, row, f"has a coefficient of {slot!r} that is no number", "a solver without")
        found[slot] = found.get(slot, 0.0) + coef
    return found


# --- the solver ------------------------------------------------------------------------------------------------------
def _arguments(plan: Plan) -> dict[str, object]:
    return {} if plan.recipe is None else plan.recipe.arguments.to_dict()


def _solver(plan: Plan) -> str:
    """Name of the solver, or of the scheduler of `diffusers`."""
    arguments = _arguments(plan)
    scheduler = arguments.get("scheduler")
    return str(scheduler.get("_class_name") if isinstance(scheduler, dict) else arguments.get("solver", "the plan"))


def _uncorrected(plan: Plan) -> Plan:
    """The plan with its predictors alone."""
    arguments, solver = _arguments(plan), _solver(plan)
    if solver == "unipc" and arguments.get("corrector", True):
        made = plan.again(corrector=False)
    elif isinstance(scheduler := arguments.get("scheduler"), dict) and solver.startswith("UniPC"):
        made = plan.again(scheduler=scheduler | {"disable_corrector": list(range(int(str(arguments["steps"]))))})
    else:
        return plan
    if [_level(step) for step in made.steps] != [_level(step) for step in plan.steps]:
        raise PlanError(f"{NAME}: the plan's rows are not those of its recipe, so its predictor is not known")
    return made


def _level(step: Step) -> tuple[float, float, float]:
    return step.timestep, step.alpha, step.sigma


def _places(plan: Plan, rows: Sequence[_Row]) -> dict[int, float]:
    """u of every step, in the variable of the solver."""
    arguments, solver = _arguments(plan), _solver(plan)
    variable = VARIABLES.get(solver)
    if solver == "deis":
        variable = DEIS[str(arguments.get("variant", "tab"))]
    if solver == "lagrange":
        variable = str(arguments.get("variable", "lam"))
    if variable is None:
        raise PlanError(
            f"{NAME}: {solver} reads history, and in which variable it extrapolates is not known; make the plan with "
            f"make_plan or Plan.from_diffusers and one of {', '.join((*VARIABLES, 'deis', 'lagrange'))}"
        )
    found: dict[int, float] = {}
    for row in rows:
        step = plan.steps[row.number]
        found.setdefault(row.step, float(row.step) if variable == "step" else _place(step, variable, arguments))
    return found


def _place(step: Step, variable: str, arguments: dict[str, object]) -> float:
    if variable == "t":
        schedule = NoiseSchedule.restore(Args.of(arguments["schedule"]))
        return float(schedule.t_of_lam(step.lam)) if math.isfinite(step.lam) else math.inf
    return step.lam if variable == "lam" else math.exp(-step.lam)
