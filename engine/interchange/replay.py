"""Passes by the names that recipes record them under."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from vivace.engine import passes
from vivace.engine.interchange.smoothcache import apply_smoothcache, cut_schedule
from vivace.engine.interchange.step_mask import apply_step_mask, cut_mask
from vivace.engine.interchange.step_policy import apply_step_policy
from vivace.engine.passes.block_cache import cut
from vivace.engine.passes.freeze import cut_decisions
from vivace.engine.passes.guards import cut_guards
from vivace.engine.passes.linear_ag import cut_linear_ag
from vivace.engine.passes.merge import cut_merge
from vivace.engine.passes.time_alignment import cut_alignment
from vivace.engine.passes.tokens import cut_tokens
from vivace.engine.plan import Args, Plan
from vivace.errors import PlanError

PASSES: Mapping[str, Callable[..., Plan]] = {
    **{name: getattr(passes, name) for name in passes.__all__},
    **{made.__name__: made for made in (apply_step_policy, apply_smoothcache, apply_step_mask)},
}

# Passes that write caches -> their arguments for the rows of a run behind its first ones.
CACHES: Mapping[str, Callable[[Plan, Args, int], Args]] = {
    "apply_block_cache": cut,
    "apply_smoothcache": cut_schedule,
    "apply_step_mask": cut_mask,
    "apply_guards": cut_guards,
    "apply_linear_ag": cut_linear_ag,
    "apply_merge": cut_merge,
    "apply_time_alignment": cut_alignment,
    "apply_tokens": cut_tokens,
    "freeze": cut_decisions,
}


def replay(plan: Plan, made: Sequence[tuple[str, Args]]) -> Plan:
    """The passes `made` of a recipe, in order, on `plan`. Raises PlanError for an unknown one, and what they raise."""
    for name, args in made:
        if name not in PASSES:
            raise PlanError(f"recipe: unknown pass {name!r}; known: {', '.join(PASSES)}")
        plan = PASSES[name](plan, **args.to_dict())
    return plan
