"""Guidance as plan data: a second branch, and two Affines in front of the row's own."""

from __future__ import annotations

import math
from dataclasses import replace

from vivace.engine.plan import Affine, Args, InputRef, Op, Plan, Step, Transform
from vivace.engine.verify import verify
from vivace.errors import ArgumentError, PlanError

KINDS = ("cfg", "embedded")
EMBEDDED = "guidance"  # network input of guidance-distilled models


def apply_guidance(
    plan: Plan,
    scale: float = 4.0,
    *,
    kind: str = "cfg",
    interval: tuple[float, float] = (0.0, 1.0),
    rescale: float = 0.0,
) -> Plan:
    """Classifier-free guidance: g = uncond + scale * (cond - uncond); the solver's history holds g.

    Of "embedded" kind the network is distilled from a guided one and is fed the scale: net input "guidance" = scale,
    one branch, no further op.

    Args:
        plan: a plan without guidance, bound or not.
        scale: guidance scale, unitless; a default that each request may override (input `guidance_scale`).
        kind: "cfg" or "embedded", which takes no interval and no rescale.
        interval: (a, b) with 0 = noise end: rows i of n evaluations with int(a*n) <= i < int(b*n) are guided, the
            others evaluate and read `cond` alone.
        rescale: phi of CFG rescale (0: off): g <- phi * g * std(cond)/std(g) + (1 - phi) * g.
    Returns: the guided plan; its recipe names this pass.
    Raises: ArgumentError, PlanError (guided already).
    Source: Ho and Salimans 2022, eq. 6; Kynkaanniemi et al. 2024 (interval); Lin et al. 2023, eq. 16 (rescale);
        Meng et al. 2023, section 3.1 (embedded).
    """
    if kind not in KINDS:
        raise ArgumentError(f"apply_guidance: kind {kind!r} is unknown; use {', '.join(KINDS)}")
    low, high = interval
    if not 0.0 <= low < high <= 1.0:
        raise ArgumentError(f"apply_guidance: interval {interval}; need 0 <= a < b <= 1 (0 = noise end)")
    if not math.isfinite(scale) or not 0.0 <= rescale <= 1.0:
        raise ArgumentError(f"apply_guidance: scale {scale}, rescale {rescale}; need a finite scale, 0 <= rescale <= 1")
    if kind == "embedded" and (tuple(interval) != (0.0, 1.0) or rescale):
        raise ArgumentError(f"apply_guidance: interval {interval}, rescale {rescale}; an embedded scale takes neither")
    taken = {"uncond"} if kind == "embedded" else {"uncond", "perturbed"}
    if any(taken & set(step.branches) or EMBEDDED in dict(step.net_inputs) for step in plan.steps):
        raise PlanError("apply_guidance: the plan is guided already; start from the plan without guidance")
    first, last = int(low * plan.nfe), int(high * plan.nfe)
    steps, evaluation = [], 0
    for step in plan.steps:
        if step.variant is not None:
            if kind == "embedded":
                fed = (EMBEDDED, InputRef("guidance_scale", float(scale)))
                step = replace(step, net_inputs=(*step.net_inputs, fed))
            elif first <= evaluation < last:
                step = _guided(step, float(scale), float(rescale))
            evaluation += 1
        steps.append(step)
    recipe = plan.recipe
    if recipe is not None:
        span = (float(low), float(high))
        args = {"scale": float(scale), "kind": kind, "interval": span, "rescale": float(rescale)}
        recipe = replace(recipe, passes=(*recipe.passes, ("apply_guidance", Args.of(args))))
    return verify(replace(plan, steps=tuple(steps), recipe=recipe))


def _guided(step: Step, scale: float, rescale: float) -> Step:
    assert step.variant is not None
    (out,) = step.outs
    combine: list[Op] = [
        Affine("d", (("cond", 1.0), ("uncond", -1.0))),
        Affine("g", (("uncond", 1.0), ("d", InputRef("guidance_scale", scale)))),
    ]
    if rescale:
        combine.append(Transform("cfg_rescale", "g", ("cond",), (("phi", rescale),)))
    ops = tuple(rename(op, {out: "g"}) for op in step.ops)
    variant = replace(step.variant, branches=("cond", "uncond"))
    return replace(step, variant=variant, outs=("cond", "uncond"), ops=(*combine, *ops))


def rename(op: Op, names: dict[str, str]) -> Op:
    """The same op on other slots."""
    if isinstance(op, Affine):
        terms = tuple((names.get(slot, slot), coef) for slot, coef in op.terms)
        return replace(op, dst=names.get(op.dst, op.dst), terms=terms)
    return replace(op, slot=names.get(op.slot, op.slot), reads=tuple(names.get(slot, slot) for slot in op.reads))
