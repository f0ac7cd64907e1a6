"""Precision as plan data: what every evaluation multiplies in, block by block."""

from __future__ import annotations

from vivace.engine.passes.rules import absolute, evaluations, with_rules
from vivace.engine.plan import PRECISIONS, Plan, Rule
from vivace.errors import ArgumentError, PlanError

SITES = ("block", "attn", "mlp")


def apply_precision(
    plan: Plan,
    precision: str = "int8",
    *,
    first: int = 0,
    last: int = 0,
    high: str | None = None,
    blocks: tuple[int, int] = (0, 0),
    site: str = "block",
) -> Plan:
    """precision(evaluation i of n) = `high` if i < first or i >= n - last, else `precision`, of `blocks`.

    Errors of the first evaluations move the whole picture, those of the last ones stay in it: where a calibration says
    so, these run high. Apply the pass again for other blocks or sites.

    Args:
        plan: bound or not; says nothing yet of the precision of these blocks.
        precision: "fp32" | "bf16" | "int8" | "fp8": of the linear layers in the blocks.
        first, last: evaluations at the noise end and at the clean end that run in `high`; a tail counts its own.
        high: a precision; None says nothing, so these rows run in the precision the model is loaded in.
        blocks: half-open range; of an unbound plan negative numbers count from the end and a last of 0 is the end.
        site: "block" | "attn" | "mlp": all linears of a block, those of its attention, those of its MLP.
    Returns: the plan with its precision column filled; its recipe names this pass.
    Raises: ArgumentError; PlanError for blocks that have another precision already, or a plan with guards.
    Source: per-step precision as in `diffusion_step_policy` (see `engine.interchange`), by blocks and sites.
    """
    for name, value in (("precision", precision), ("high", high)):
        if value not in PRECISIONS and not (name == "high" and value is None):
            raise ArgumentError(f"apply_precision: {name} {value!r}; use one of {', '.join(PRECISIONS)}")
    if site not in SITES:
        raise ArgumentError(f"apply_precision: site {site!r}; use one of {', '.join(SITES)}")
    for name, count in (("first", first), ("last", last)):
        if type(count) is not int or count < 0:
            raise ArgumentError(f"apply_precision: {name}={count!r}; a number of evaluations, 0 or more, is needed")
    if not (isinstance(blocks, (tuple, list)) and len(blocks) == 2 and all(type(b) is int for b in blocks)):
        raise ArgumentError(f"apply_precision: blocks {blocks!r}; a pair of integers (first, last) is needed")
    for i, step in enumerate(plan.steps):
        if step.guard is not None:
            raise PlanError(f"apply_precision: step {i} has a guard; precisions come before guards")
    where = absolute(plan, (blocks[0], blocks[1]), "apply_precision")
    rules = []
    for i, _ in enumerate(evaluations(plan)):
        said = high if i < first or i >= plan.nfe - last else precision
        rules.append(() if said is None else (Rule(where, site, precision=said),))
    arguments = {"precision": precision, "first": first, "last": last, "high": high}
    return with_rules(plan, rules, "apply_precision", arguments | {"blocks": tuple(blocks), "site": site})
