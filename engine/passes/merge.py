"""Merged tokens as plan data: which blocks average near-duplicate tokens, by how many, and which rows map them anew."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

from vivace.engine.caching import RANGES, READS
from vivace.engine.merge_rows import DEFAULTS, MOST_CELL, SITE, SITES
from vivace.engine.passes.rules import absolute, evaluations, with_rules
from vivace.engine.plan import Action, Args, Plan, Rule, Variant
from vivace.errors import ArgumentError, PlanError

NAME = "apply_merge"
IMPORTANCE = (None, "guidance")


def apply_merge(
    plan: Plan,
    share: float = 0.5,
    *,
    blocks: tuple[int, int] = (0, 0),
    every: int = 1,
    importance: str | None = None,
    sites: Sequence[str] = ("attn",),
    cell: int = 2,
    levels: int = 1,
    first: int = 0,
    last: int = 0,
) -> Plan:
    """y = unmerge(f(merge(x))): int(share N) of N tokens are averaged into their best match before f = attention, MLP.

    One destination is drawn per cell x cell (Philox of seed, picture, row: the same for all branches and whatever the
    batch); every other token is matched with its most similar one by the cosine of the block's inputs, and the best
    int(share N) pairs merge. The map is made of branch "cond" and shared by all branches.

    Args:
        plan: bound or not, with its guidance, precisions and caches already; without guards.
        share: of tokens merged away, 0 (nothing is changed) to 1 - 1/cell^2.
        blocks: half-open range; of an unbound plan negative numbers count from the end and a last of 0 is the end.
            Blocks without an attention merge nothing, and neither do those that a row gives again.
        every: the map is made anew in each so many evaluations, and used again between.
        importance: "guidance": destinations are drawn among the tokens with the largest |cond - uncond| of the last
            evaluation with both branches, pooled to the layer's grid; until there is one, per cell. None: per cell.
        sites: what tokens are merged before: "attn", "mlp".
        cell: edge of a cell in tokens.
        levels: of a UNet, how many of the resolutions that have attentions merge, from the highest.
        first, last: evaluations at the noise end and at the clean end that merge nothing; a tail counts its own.
    Returns: the plan with rules of site "merge"; its recipe names this pass.
    Raises: ArgumentError; PlanError for a plan with guards, dropped tokens, merges already, or (importance) without
        guidance.
    Source: Bolya and Hoffman 2023 (ToMe for Stable Diffusion); Wu et al. 2024, arXiv 2411.16720 (importance).
    """
    share = _check(share, blocks, every, importance, sites, cell, levels, first, last)
    for i, step in enumerate(plan.steps):
        if step.guard is not None:
            raise PlanError(f"{NAME}: step {i} has a guard; a plan with guards merges no tokens")
        if step.variant is not None and any(rule.site == SITE for rule in step.variant.rules):
            raise PlanError(f"{NAME}: step {i} merges tokens already; start from the plan without")
    if importance is not None and not any("uncond" in step.branches for step in plan.steps):
        raise PlanError(
            f"{NAME}: importance {importance!r} needs rows with branch 'uncond'; apply_guidance comes first"
        )
    arguments = {"share": share, "blocks": tuple(blocks), "every": every, "importance": importance}
    arguments |= {"sites": tuple(sites), "cell": cell, "levels": levels, "first": first, "last": last}
    rules: list[tuple[Rule, ...]] = []
    made: set[tuple[str, int]] = set()
    where = absolute(plan, (blocks[0], blocks[1]), NAME)
    for number, (_, variant) in enumerate(evaluations(plan)):
        merged = share > 0.0 and first <= number < plan.nfe - last
        anew = (number - first) % every == 0
        rules.append(_rules(plan, variant, where, share, anew, sites, made) if merged else ())
    params = {"merge_cell": cell, "merge_guidance": int(importance is not None), "merge_levels": levels}
    params |= {f"merge_{site}": int(site in sites) for site in SITES}
    said = tuple((name, float(value)) for name, value in sorted(params.items()) if value != DEFAULTS[name])
    return with_rules(_with_params(plan, rules, said), rules, NAME, arguments)


def cut_merge(full: Plan, args: Args, first: int) -> Args:
    """The pass's arguments for the run without its first evaluations: its first merging row makes the map anew."""
    values = args.to_dict()
    return Args.of(values | {"first": max(0, values["first"] - first)})


def _rules(
    plan: Plan,
    variant: Variant,
    where: tuple[int, int],
    share: float,
    anew: bool,
    sites: Sequence[str],
    made: set[tuple[str, int]],
) -> tuple[Rule, ...]:
    """The merge rules of one row: blocks that run, those without a map yet with a new one. made: blocks with a map."""
    if plan.binding is None:
        if any(rule.action in READS for rule in variant.rules):
            raise PlanError(f"{NAME}: the plan gives blocks again and is not bound; bind it first")
        key = variant.model, where[0]
        fresh = anew or key not in made
        made.add(key)
        return (Rule(where, SITE, action=Action.COMPUTE if fresh else Action.REUSE, share=share),)
    idle = _idle(variant, sites)
    spans: list[tuple[list[int], bool]] = []
    for block in range(*where):
        if block in idle:
            continue
        fresh = anew or (variant.model, block) not in made
        made.add((variant.model, block))
        if spans and spans[-1][1] == fresh and spans[-1][0][1] == block:
            spans[-1][0][1] = block + 1
        else:
            spans.append(([block, block + 1], fresh))
    return tuple(
        Rule((a, b), SITE, action=Action.COMPUTE if fresh else Action.REUSE, share=share) for (a, b), fresh in spans
    )


def _idle(variant: Variant, sites: Sequence[str]) -> set[int]:
    """Blocks of a row that do not run in some branch, or of whose merged sites none is computed in any."""
    out: set[int] = set()
    given: dict[int, set[tuple[str, str]]] = {}
    for rule in variant.rules:
        if rule.action not in READS:
            continue
        for block in range(*rule.blocks):
            if rule.site in RANGES:
                out.add(block)
            given.setdefault(block, set()).update((rule.site, b) for b in rule.branches or variant.branches)
    all_of = {(site, branch) for site in sites for branch in variant.branches}
    return out | {block for block, said in given.items() if all_of <= said}


def _with_params(plan: Plan, rules: Sequence[tuple[Rule, ...]], said: tuple[tuple[str, float], ...]) -> Plan:
    """The plan whose merging rows say how. It is verified with its rules."""
    added, steps = iter(rules), []
    for step in plan.steps:
        if step.variant is not None and next(added) and said:
            params = tuple(sorted((*step.variant.selector_params, *said)))
            step = replace(step, variant=replace(step.variant, selector_params=params))
        steps.append(step)
    return replace(plan, steps=tuple(steps))


def _check(
    share: float,
    blocks: tuple[int, int],
    every: int,
    importance: str | None,
    sites: Sequence[str],
    cell: int,
    levels: int,
    first: int,
    last: int,
) -> float:
    """The share as a float. Raises ArgumentError for what cannot be."""
    counts = {"every": (every, 1, math.inf), "cell": (cell, 2, MOST_CELL), "levels": (levels, 1, 64)}
    counts |= {"first": (first, 0, math.inf), "last": (last, 0, math.inf)}
    for name, (value, low, high) in counts.items():
        if type(value) is not int or not low <= value <= high:
            raise ArgumentError(f"{NAME}: {name}={value!r}; an integer from {low} to {high} is needed")
    if not isinstance(share, (int, float)) or isinstance(share, bool) or not 0.0 <= share <= 1.0 - cell**-2:
        raise ArgumentError(f"{NAME}: share {share!r}; cells of {cell} need one from 0 to {1.0 - cell**-2:g}")
    if not (isinstance(blocks, (tuple, list)) and len(blocks) == 2 and all(type(b) is int for b in blocks)):
        raise ArgumentError(f"{NAME}: blocks {blocks!r}; a pair of integers (first, last) is needed")
    if importance not in IMPORTANCE:
        raise ArgumentError(f"{NAME}: importance {importance!r}; use None or 'guidance'")
    known = isinstance(sites, (tuple, list)) and sites and len(set(sites)) == len(sites) and set(sites) <= set(SITES)
    if not known:
        raise ArgumentError(f"{NAME}: sites {sites!r}; some of {', '.join(SITES)} are needed, each once")
    return float(share)
