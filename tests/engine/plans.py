"""Small plans made by hand, for tests of everything that reads plans."""

from dataclasses import replace

from vivace.engine.plan import Affine, InputRef, Plan, Step, Variant

GUIDED = Variant(branches=("cond", "uncond"))


def euler_rows(n=3):
    """Flow Euler from t = 1 to 0."""
    return tuple(Step(1 - i / n, i / n, 1 - i / n, (Affine("x", (("x", 1.0), ("out", -1 / n))),)) for i in range(n))


def plan_of(*steps, prediction="flow", **changes):
    return Plan(tuple(steps), prediction, (Affine("x", (("noise:0", 1.0),)),), **changes)


def euler(n=3):
    return plan_of(*euler_rows(n))


def guided_row(**changes):
    """One eps row with guidance, x0 history and a second-order update that reads m1."""
    ops = (
        Affine("d", (("cond", 1.0), ("uncond", -1.0))),
        Affine("g", (("uncond", 1.0), ("d", InputRef("guidance_scale", 4.0)))),
        Affine("m0", (("x", 2.0), ("g", -1.7320508075688772))),
        Affine("x", (("x", 0.5), ("m0", 0.75))),
    )
    return replace(Step(500.0, 0.5, 0.8660254037844386, ops, GUIDED, outs=("cond", "uncond")), **changes)


def edit(plan, i, **changes):
    """The plan with row i changed."""
    steps = list(plan.steps)
    steps[i] = replace(steps[i], **changes)
    return replace(plan, steps=tuple(steps))
