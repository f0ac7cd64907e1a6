"""DualFast as plan data: the zeroth-order term of every row extrapolated away from an earlier prediction."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

from vivace.engine.passes.guidance import rename
from vivace.engine.passes.steps_of import HISTORY, fresh_noise, kept_op, own_form, update_op
from vivace.engine.plan import Affine, Args, Coef, Plan, Step, writes
from vivace.engine.solvers.dc_solver import RAW
from vivace.engine.solvers.rows import require_number
from vivace.engine.timesteps import choose
from vivace.engine.token_rows import focused
from vivace.engine.verify import verify
from vivace.errors import PlanError

NAME = "apply_dualfast"
ANCHORS = ("previous", "first")
SCHEDULES = ("linear", "constant")
FORMS = ("eps", "x0")
ANCHORED = ("p0", "p1")  # slots of the earlier prediction, where no history slot has it


def apply_dualfast(
    plan: Plan,
    strength: float = 0.2,
    *,
    anchor: str = "previous",
    schedule: str = "linear",
    form: str | None = None,
) -> Plan:
    """m <- (1 + c) m - c m_tau in the zeroth-order term of every row behind the first; differences of m stay.

    That term is W m, W the sum of the row's weights. A network errs less at more noise, which is what the extrapolation
    is after; it adds no evaluation.
    Args:
        plan: of a solver of one evaluation a step with history slots (ddim, dpmpp_*, unipc, deis, lms, ipndm, ...),
            guided or not; before masks and token rows.
        strength: of c, from 0 to 2; 0 is the plan itself.
        anchor: tau, "previous" row or "first" row (of the run, or behind fresh noise).
        schedule: c = strength alpha^2 / (alpha^2 + sigma^2) at the row's level ("linear" in the signal's share of the
            variance), or strength ("constant").
        form: what m is, "eps" or "x0"; None: what the solver keeps.
    Returns: the plan; its recipe names this pass. Memory: none for "previous" in the solver's own form where it reads
        history, else one slot of sample size, two in the other form.
    Raises: ArgumentError; PlanError naming the row for solvers without such history, inner stages, masks, token rows.
    Source: Yu et al. 2025 (arXiv 2506.13058): the rule. Its schedule and anchors are not known to us: these are ours.
    """
    scale = require_number(NAME, "strength", strength, 0.0, 2.0)
    choose(f"{NAME}: anchor", anchor, ANCHORS)
    choose(f"{NAME}: schedule", schedule, SCHEDULES)
    own = own_form(plan)
    chosen = own if form is None else choose(f"{NAME}: form", form, FORMS)
    if own is None or chosen is None:
        raise PlanError(f"{NAME}: the plan keeps no history of x0 or eps to change; use ddim, dpmpp_2m, unipc or deis")
    if scale == 0.0:
        return plan
    if plan.recipe is not None and any(name == NAME for name, _ in plan.recipe.passes):
        raise PlanError(f"{NAME}: the plan went through this pass already; start from the plan without")
    for i, step in enumerate(plan.steps):
        _check(i, step)
    rule = _Rule(scale, anchor, schedule, "" if chosen == own else chosen)
    recipe = plan.recipe
    if recipe is not None:
        args = Args.of({"strength": scale, "anchor": anchor, "schedule": schedule, "form": form})
        recipe = replace(recipe, passes=(*recipe.passes, (NAME, args)))
    return verify(replace(plan, steps=rule.rows(_apart(plan.steps)), recipe=recipe))


def _check(i: int, step: Step) -> None:
    """Raise PlanError for a row this pass cannot change."""
    if step.variant is None and fresh_noise(step):
        return
    what = ""
    if step.x != "x" or any(writes(op) == "u" for op in step.ops):
        what = "is one of several evaluations of a step; use a solver of one, such as dpmpp_2m"
    elif step.variant is not None and focused(step.variant):
        what = "computes some tokens; apply_tokens comes after this pass"
    elif (found := update_op(step)) is None:
        what = "writes x more than once or not as a sum; apply_mask comes after this pass"
    elif (kept := kept_op(step)) is not None and step.alpha and not _steps_by(kept[1], found[1]):
        what = (
            "steps by another sum than of its history; apply_momentum comes after this pass, bdia has no such history"
        )
    elif any(HISTORY.match(slot) and not isinstance(coef, float) for slot, coef in found[1].terms):
        what = "has weights that are tensors"
    if what:
        raise PlanError(f"{NAME}: step {i} {what}")


def _steps_by(kept: Affine, update: Affine) -> bool:
    """The update of x reads the row's history slot, or the output that fills it."""
    read = {slot for slot, _ in update.terms}
    return kept.dst in read or bool(read & {slot for slot, _ in kept.terms if slot != "x"})


def _apart(steps: Sequence[Step]) -> tuple[Step, ...]:
    """The rows with history in two slots at least, so that a row's value outlives the next one's."""
    slots = {kept[1].dst for step in steps if (kept := kept_op(step)) is not None}
    if len(slots) > 1:
        return tuple(steps)
    (slot,) = slots
    made, number = [], 0
    for step in steps:
        names = {slot: f"m{number % 2}"}
        made.append(replace(step, ops=tuple(rename(op, names) for op in step.ops)))
        number += kept_op(step) is not None
    return tuple(made)


@dataclass(frozen=True, slots=True)
class _Rule:
    """other: the form of the anchor where it is not the solver's own."""

    strength: float
    anchor: str
    schedule: str
    other: str

    def rows(self, steps: Sequence[Step]) -> tuple[Step, ...]:
        """The rows with their zeroth-order terms changed."""
        made: list[Step] = []
        before = ""  # slot of the anchor
        for step in steps:
            kept = kept_op(step)
            if kept is None:
                before = "" if fresh_noise(step) else before
                made.append(step)
                continue
            slot = kept[1].dst
            share = self.strength * (1.0 if self.schedule == "constant" else _signal(step))
            changed = self._changed(step, slot, before, share) if before else step
            if self.anchor == "previous" and not self.other:
                before = slot
            elif self.anchor == "previous" or not before:
                fresh = ANCHORED[before == ANCHORED[0]]
                pinned = self._pinned(changed, slot, fresh)
                before, changed = (before, changed) if pinned is None else (fresh, pinned)
            made.append(changed)
        return tuple(made)

    def _changed(self, step: Step, slot: str, before: str, share: float) -> Step:
        found = update_op(step)
        assert found is not None, "checked before"
        place, update = found
        weights = [
            coef for name, coef in update.terms if (HISTORY.match(name) or name == RAW) and isinstance(coef, float)
        ]
        unit = share * math.fsum(weights)
        if unit == 0.0 or (self.other and 0.0 in (step.alpha, step.sigma)):
            return step
        # c (m - m_tau), or in the other form its image: m - x/alpha + (sigma/alpha) eps_tau, m - x/sigma + ...
        gap = {slot: unit, before: -unit}
        if self.other:
            level, rest = (step.alpha, step.sigma) if self.other == "eps" else (step.sigma, step.alpha)
            gap = {slot: unit, "x": -unit / level, before: unit * rest / level}
        terms: list[tuple[str, Coef]] = []
        for name, coef in update.terms:
            terms.append((name, coef + gap.pop(name) if name in gap and isinstance(coef, float) else coef))
        new = Affine("x", (*terms, *gap.items()), update.at)
        return replace(step, ops=(*step.ops[:place], new, *step.ops[place + 1 :]))

    def _pinned(self, step: Step, slot: str, anchor: str) -> Step | None:
        """The row that keeps its own value as the anchor; None where its level does not tell it."""
        found = update_op(step)
        assert found is not None, "checked before"
        place = found[0]
        terms: tuple[tuple[str, Coef], ...] = ((slot, 1.0),)
        if self.other:
            level, rest = (step.alpha, step.sigma) if self.other == "x0" else (step.sigma, step.alpha)
            if level == 0.0:
                return None
            terms = (("x", 1.0 / level), (slot, -rest / level))
        return replace(step, ops=(*step.ops[:place], Affine(anchor, terms), *step.ops[place:]))


def _signal(step: Step) -> float:
    """alpha^2 / (alpha^2 + sigma^2)."""
    return step.alpha**2 / (step.alpha**2 + step.sigma**2)
