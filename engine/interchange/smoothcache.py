"""SmoothCache schedules: which layers run and which give their last output again, evaluation by evaluation.

A JSON object, component name -> list of 0 and 1, one an evaluation: 1 runs the component and keeps its output, 0 gives
the output kept last. The key "attn" speaks of that component of every block, "attn-3" of block 3 alone and before
"attn"; a component without a key always runs. Names are those of the model's modules: "attn", "mlp" in DiT, "attn1",
"attn2", "ff" in `diffusers`. Lists that are shorter or longer than the run are legal there and not noticed; here they
are an error. Branches advance as one batch; block numbers count the one list of blocks of the models it knows.

Source: dit-smoothcache 0.1.1 (Roblox, Apache-2.0), `SmoothCacheHelper`; published schedules: smoothcache_schedules/ in
github.com/Roblox/SmoothCache; Liu et al. 2024, arXiv 2411.10510.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from vivace.engine.interchange.cells import (
    Timeline,
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

SITES = ("attn", "cross_attn", "mlp")
COMPONENTS = {
    "attn": "attn",
    "attn1": "attn",
    "self_attn": "attn",
    "attn2": "cross_attn",
    "cross_attn": "cross_attn",
    "mlp": "mlp",
    "ff": "mlp",
    "ffn": "mlp",
}


def apply_smoothcache(plan: Plan, schedule: Any, *, components: Mapping[str, str] | None = None) -> Plan:
    """action(evaluation i, block, site) = COMPUTE where the schedule says 1, REUSE where it says 0.

    Args:
        plan: bound or not; bound if the schedule has a key for the last block beside one for all.
        schedule: the mapping, or the path of its JSON file.
        components: component name -> "attn" | "cross_attn" | "mlp", for names besides those of `COMPONENTS`.
    Returns: the plan with one rule more per run of equal blocks, site and row; its recipe names this pass.
    Raises: ArgumentError naming file, key and entry; PlanError (the first row reuses, two values for one block).
    """
    data, where = read_json(schedule, "schedule")
    names = {**COMPONENTS, **(components or {})}
    require_plain(plan, "apply_smoothcache")
    lists = _read(data, where, names, plan.nfe)
    blocks = None if plan.binding is None else plan.binding.blocks
    for site, by_block in lists.items():
        last = max((block for block in by_block if block is not None), default=0)
        if blocks is not None and last >= blocks:
            raise ArgumentError(f"{where}: block {last} of site {site!r}; the model has {blocks} blocks")
    rules = [tuple(rule for site in lists for rule in _rules(plan, site, lists[site], i)) for i in range(plan.nfe)]
    used = {name: names[name] for name in dict.fromkeys(key.split("-")[0] for key in data)}
    return with_rules(plan, rules, "apply_smoothcache", {"schedule": data, "components": used})


def cut_schedule(full: Plan, args: Args, first: int) -> Args:
    """The pass's arguments for a run without its first evaluations: the new first one runs everything."""
    values = args.to_dict()
    values["schedule"] = {name: [1, *line[first + 1 :]] for name, line in values["schedule"].items()}
    return Args.of(values)


def to_smoothcache(plan: Plan, *, names: Mapping[str, str] | None = None) -> dict[str, list[int]]:
    """The schedule of the plan's caching; everything else of the plan (solver, guidance, precision) it cannot hold.

    Args:
        names: site -> component name of the target model; default: those of the recorded schedule, else the sites'.
    Returns: one list a site when all blocks agree, else a list a block; the recorded schedule itself while rows agree.
    Raises: UnsupportedError naming the first row that a schedule cannot express.
    """
    lines = timelines(plan, SITES, "to_smoothcache")
    args = recorded(plan, "apply_smoothcache")
    called = {site: site for site in SITES}
    if args is not None:
        called |= {site: name for name, site in reversed(args["components"].items())}
        count = len(next(iter(args["schedule"].values())))  # of the full run, where the plan is its tail
        lists = _read(args["schedule"], "schedule", args["components"], count)
        blocks, _ = block_count(plan)
        if names is None and all(lines[site] == _expanded(lists.get(site, {}), blocks) for site in SITES):
            return dict(args["schedule"])
    called |= names or {}
    out: dict[str, list[int]] = {}
    for site in SITES:
        out |= _keys(plan, lines[site], called[site])
    return out


def _read(data: Mapping[str, Any], where: str, names: Mapping[str, str], rows: int) -> dict[str, dict[Any, list[int]]]:
    """site -> {block or None for all others -> list}. Raises ArgumentError naming the key."""
    lists: dict[str, dict[Any, list[int]]] = {}
    if not data:
        raise ArgumentError(f"{where}: no component in it; at least one key such as 'attn' is needed")
    for key, values in data.items():
        name, dash, index = str(key).partition("-")
        if name not in names or names[name] not in SITES:
            raise ArgumentError(
                f"{where}: component {name!r:.60} is unknown; known: {', '.join(names)}; say its site with components="
            )
        if dash and not (index.isascii() and index.isdigit() and len(index) < 5):
            raise ArgumentError(f"{where}: key {key!r:.60}; a component, or component-block as 'attn-3', is needed")
        by_block = lists.setdefault(names[name], {})
        block = int(index) if dash else None
        if block in by_block:
            raise ArgumentError(f"{where}: key {key!r:.60} speaks of the same layers as another key; leave one")
        by_block[block] = require_zeros_and_ones(values, f"{where}: {key}", rows)
    return lists


def _rules(plan: Plan, site: str, by_block: dict[Any, list[int]], i: int) -> list[Rule]:
    """The rules of one site in evaluation `i`: runs of equal blocks, then all blocks beyond those named."""
    named = 1 + max((block for block in by_block if block is not None), default=-1)
    rules: list[Rule] = []
    for block in range(named):
        line = by_block.get(block, by_block.get(None))
        if line is not None:
            action = Action.COMPUTE if line[i] else Action.REUSE
            if rules and rules[-1].blocks[1] == block and rules[-1].action == action:
                rules[-1] = Rule((rules[-1].blocks[0], block + 1), site, action=action)
            else:
                rules.append(Rule((block, block + 1), site, action=action))
    if None in by_block and (plan.binding is None or named < plan.binding.blocks):
        rules.append(Rule(span(plan, named, 0), site, action=Action.COMPUTE if by_block[None][i] else Action.REUSE))
    return rules


def _expanded(by_block: dict[Any, list[int]], blocks: int) -> Timeline:
    """The list of each of `blocks` blocks."""
    return [by_block.get(block, by_block.get(None)) for block in range(blocks)]


def _keys(plan: Plan, line: Timeline, name: str) -> dict[str, list[int]]:
    """The keys of one site: one for all blocks when they agree, else one a block that anything is said of."""
    blocks, generic = block_count(plan)
    if all(values == line[0] for values in line):
        return {} if line[0] is None else {name: line[0]}
    out: dict[str, list[int]] = {}
    common = None if generic is None else line[generic]
    if common is not None:
        out[name] = common
    for block, values in enumerate(line):
        if generic is not None and block > generic and values != common:
            raise UnsupportedError(
                f"to_smoothcache: {name} of block {block - blocks} from the end has a list of its own; schedules count "
                "blocks from the beginning, so bind the plan to its model first"
            )
        if values != common:
            out[f"{name}-{block}"] = [1] * plan.nfe if values is None else values
    return out
