"""Step masks of cache-dit (SCM): evaluations that run whole, and those that give the middle blocks' residual again.

`steps_computation_mask` of a cache-dit `cache_config` is a list of 0 and 1, one a step: 1 runs every block and keeps
r = h_out - h_in of the blocks [Fn, L - Bn), for every token stream and branch; 0 runs the first Fn =
`Fn_compute_blocks` blocks, adds the kept r, and runs the last Bn = `Bn_compute_blocks`. That holds with
`steps_computation_policy: "static"`; with "dynamic" (default) a 0 only permits it, and a threshold decides at run
time. With "static" the warm-up, the limits of cached steps and the threshold are not consulted. Here: site "residual"
of the middle blocks, COMPUTE for 1 and REUSE for 0.

Source: cache-dit 1.5.3 (vipshop, Apache-2.0), `DBCacheConfig`, `steps_mask`, and the blocks that read them; the same
mask is `--scm-mask` of stable-diffusion.cpp, comma-separated.
"""

from __future__ import annotations

from typing import Any

from vivace.engine.interchange.cells import (
    block_count,
    read_json,
    recorded,
    require_plain,
    require_zeros_and_ones,
    timelines,
)
from vivace.engine.passes.rules import span, with_rules
from vivace.engine.plan import Action, Args, Plan, Rule
from vivace.errors import ArgumentError, UnsupportedError

SITE = "residual"
FIRST, LAST = "Fn_compute_blocks", "Bn_compute_blocks"
MASK, POLICY = "steps_computation_mask", "steps_computation_policy"
DEFAULTS = {FIRST: 8, LAST: 0}
# What "static" does not consult, and what is given to both branches alike.
IGNORED = (
    "residual_diff_threshold",
    "max_accumulated_residual_diff_threshold",
    "max_warmup_steps",
    "warmup_interval",
    "max_cached_steps",
    "max_continuous_cached_steps",
    "enable_separate_cfg",
    "cfg_compute_first",
    "cfg_diff_compute_separate",
)
FIELDS = ("cache_type", FIRST, LAST, MASK, POLICY, "num_inference_steps", *IGNORED)


def apply_step_mask(plan: Plan, mask: Any, *, first: int | None = None, last: int | None = None) -> Plan:
    """action(evaluation i, blocks [first, L - last), "residual") = COMPUTE where the mask says 1, REUSE where 0.

    Args:
        plan: bound or not.
        mask: list of 0 and 1, one an evaluation; or a `cache_config` with a mask and the "static" policy; or the path
            of its JSON file.
        first, last: blocks at both ends that always run; default: the config's, else 8 and 0 as in cache-dit.
    Returns: the plan with one rule more in every evaluated row; its recipe names this pass.
    Raises: ArgumentError naming file and field; UnsupportedError for a mask whose zeros a threshold decides; PlanError.
    """
    bare = isinstance(mask, (list, tuple))
    config, where = ({MASK: mask}, "mask") if bare else _config(mask)
    first, last = _end(config, where, FIRST, first), _end(config, where, LAST, last)
    values = require_zeros_and_ones(config.get(MASK), where if bare else f"{where}: {MASK}", plan.nfe)
    require_plain(plan, "apply_step_mask")
    middle = span(plan, first, last)
    rules = [(Rule(middle, SITE, action=Action.COMPUTE if value else Action.REUSE),) for value in values]
    return with_rules(plan, rules, "apply_step_mask", {"mask": values, "first": first, "last": last})


def cut_mask(full: Plan, args: Args, first: int) -> Args:
    """The pass's arguments for a run without its first evaluations: the new first one runs everything."""
    values = args.to_dict()
    return Args.of(values | {"mask": [1, *values["mask"][first + 1 :]]})


def to_step_mask(plan: Plan) -> dict[str, Any]:
    """The `cache_config` of the plan's caching; everything else of the plan it cannot hold.

    Returns: mask, Fn, Bn, number of steps and the "static" policy; a plan that reuses nothing gives a mask of ones.
    Raises: UnsupportedError naming the first row that a mask cannot express.
    """
    line = timelines(plan, (SITE,), "to_step_mask")[SITE]
    blocks, generic = block_count(plan)
    spoken = [block for block, values in enumerate(line) if values is not None and 0 in values]
    args = recorded(plan, "apply_step_mask") or {"first": DEFAULTS[FIRST], "last": DEFAULTS[LAST]}
    first, last, mask = args["first"], args["last"], [1] * plan.nfe
    if spoken:
        first, last, mask = spoken[0], blocks - 1 - spoken[-1], line[spoken[0]] or []
        if generic is not None and generic not in spoken:
            raise UnsupportedError(
                f"to_step_mask: only blocks {first} to {spoken[-1]} reuse; a mask speaks of all blocks between the "
                "first and the last few, so bind the plan to its model first"
            )
        for block in range(first, blocks - last):
            if line[block] != mask:
                other = line[block] or [1] * plan.nfe
                row = next(k for k, (one, two) in enumerate(zip(mask, other, strict=True)) if one != two)
                raise UnsupportedError(
                    f"to_step_mask: evaluation {row} treats block {block} unlike block {first}; a mask has one range "
                    "of blocks that reuse together"
                )
    fixed = {"num_inference_steps": plan.nfe, POLICY: "static"}
    return {FIRST: first, LAST: last, MASK: mask, **fixed}


def _end(config: dict[str, Any], where: str, name: str, given: int | None) -> int:
    """Blocks at one end that always run: `given`, else the config's, else the default. Raises ArgumentError."""
    value = config.get(name, DEFAULTS[name]) if given is None else given
    if type(value) is not int or value < 0:
        raise ArgumentError(f"{where}: {name}: got {value!r:.60}; an integer >= 0 is needed")
    return value


def _config(source: Any) -> tuple[dict[str, Any], str]:
    """(cache_config, where it stands). Raises ArgumentError and UnsupportedError naming the field."""
    data, where = read_json(source, "mask")
    if "cache_config" in data:
        data, where = data["cache_config"], f"{where}: cache_config"
        if not isinstance(data, dict):
            raise ArgumentError(f"{where}: got {data!r:.60}; an object is needed")
    if isinstance(data.get(MASK), str):
        raise ArgumentError(f"{where}: {MASK}: got the name {data[MASK]!r:.60}; the list it stands for is needed")
    for name, value in data.items():
        if name not in FIELDS and value not in (None, False):
            raise UnsupportedError(f"{where}: field {name!r:.60} is not covered; covered: {', '.join(FIELDS)}")
    if data.get("cache_type", "DBCache") != "DBCache":
        raise UnsupportedError(f"{where}: cache_type: got {data['cache_type']!r:.60}; 'DBCache' is covered")
    if data.get(POLICY, "dynamic") != "static":
        raise UnsupportedError(
            f"{where}: {POLICY}: got {data.get(POLICY, 'dynamic')!r:.60}, under which a threshold decides at run time; "
            "'static' is needed"
        )
    return data, where
