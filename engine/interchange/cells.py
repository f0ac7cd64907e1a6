"""What the rules of a plan say, block by block and row by row; foreign JSON read.

Rows without an evaluation are no calls of the network: foreign formats count evaluations, and so does everything here.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from os import PathLike, fspath
from pathlib import Path
from typing import Any

from vivace.engine.passes.rules import evaluations
from vivace.engine.plan import Action, Plan, Variant
from vivace.engine.plan_codec import parse
from vivace.engine.verify import said
from vivace.errors import ArgumentError, PlanFileError, UnsupportedError

MAX_BYTES = 8 << 20

# Per block: one 1 (computes) or 0 (reuses) an evaluation; None: no row says anything of the block.
Timeline = Sequence[list[int] | None]


# ---------------------------------------------------------------- files
def read_json(source: Any, what: str) -> tuple[dict[str, Any], str]:
    """(object, where it stands) of a mapping, or of the JSON file at a path. Raises ArgumentError naming the path."""
    if isinstance(source, Mapping):
        return dict(source), what
    if not isinstance(source, (str, PathLike)):
        raise ArgumentError(f"{what}: got {type(source).__name__}; a mapping, or the path of a JSON file, is needed")
    path = Path(fspath(source))
    try:
        if path.stat().st_size > MAX_BYTES:
            raise ArgumentError(f"{path}: {path.stat().st_size} bytes; at most {MAX_BYTES} are read")
        data = parse(path.read_bytes())
    except OSError as error:
        raise ArgumentError(f"{path}: cannot be read ({error.strerror}); the path of a JSON file is needed") from None
    except PlanFileError as error:
        raise ArgumentError(f"{path}: {error}; a JSON object is needed") from None
    if not isinstance(data, dict):
        raise ArgumentError(f"{path}: the file holds a {type(data).__name__}; a JSON object is needed")
    return data, str(path)


def require_zeros_and_ones(values: Any, where: str, rows: int) -> list[int]:
    """A list of `rows` integers 0 or 1 that begins with 1. Raises ArgumentError."""
    if not isinstance(values, (list, tuple)):
        raise ArgumentError(f"{where}: got {values!r:.60}; a list of 0 and 1 is needed, one an evaluation")
    for i, value in enumerate(values):
        if type(value) is not int or value not in (0, 1):
            raise ArgumentError(f"{where}[{i}]: got {value!r:.60}; 0 (reuse) or 1 (compute) is needed")
    if len(values) != rows:
        raise ArgumentError(
            f"{where}: {len(values)} entries, but the plan evaluates the network {rows} times; one each is needed"
        )
    if values[0] == 0:
        raise ArgumentError(f"{where}[0]: got 0; the first evaluation has nothing to reuse, so 1 is needed")
    return list(values)


# ---------------------------------------------------------------- rules out of rows
def recorded(plan: Plan, name: str) -> dict[str, Any] | None:
    """The arguments of the last pass `name` in the recipe, None without one."""
    passes = () if plan.recipe is None else plan.recipe.passes
    return next((args.to_dict() for pass_name, args in reversed(passes) if pass_name == name), None)


def block_count(plan: Plan) -> tuple[int, int | None]:
    """(blocks, index of the block that stands for all that no rule names singly); unbound: the smallest such model."""
    if plan.binding is not None:
        return plan.binding.blocks, None
    ends = [end for _, variant in evaluations(plan) for rule in variant.rules for end in rule.blocks]
    named = max((end for end in ends if end > 0), default=0)
    return named + 1 - min(0, min(ends, default=0)), named


def cells(variant: Variant, name: str, blocks: int) -> dict[tuple[str, str], list[Any]]:
    """(site, branch) -> what its rules say of field `name`, a value or None a block."""
    out: dict[tuple[str, str], list[Any]] = {}
    for rule in variant.rules:
        value = said(rule).get(name)
        if value is not None:
            first, last = rule.blocks
            first, last = first + blocks * (first < 0), last + blocks * (last <= 0)
            for branch in rule.branches or variant.branches:
                out.setdefault((rule.site, branch), [None] * blocks)[first:last] = [value] * (last - first)
    return out


def require_plain(plan: Plan, what: str) -> None:
    """One model and no guard: what every format here presumes. Raises UnsupportedError naming the row."""
    for i, variant in evaluations(plan):
        if variant.model != "main":
            raise UnsupportedError(f"{what}: row {i} evaluates model {variant.model!r}; this format knows one model")
        if plan.steps[i].guard is not None:
            raise UnsupportedError(f"{what}: row {i} has a guard; this format holds decisions taken beforehand")


def timelines(plan: Plan, sites: Sequence[str], what: str) -> dict[str, Timeline]:
    """Which blocks compute (1) and which reuse (0) at each site. Raises UnsupportedError naming the first row."""
    require_plain(plan, what)
    blocks, _ = block_count(plan)
    out: dict[str, list[list[int] | None]] = {site: [None] * blocks for site in sites}
    stale = {site: [False] * blocks for site in sites}  # computed since, without keeping
    for k, (row, variant) in enumerate(evaluations(plan)):
        actions = _agreed(variant, blocks, sites, f"{what}: row {row}")
        for site, values in actions.items():
            for block, action in enumerate(values):
                if action is None:
                    stale[site][block] = True
                elif action == Action.COMPUTE:
                    stale[site][block] = False
                elif stale[site][block]:
                    raise UnsupportedError(
                        f"{what}: row {row} reuses {site} of block {block} from before the last row that computed it; "
                        "this format always reuses the last one"
                    )
                line = out[site][block]
                if line is None and action is not None:
                    line = out[site][block] = [1] * k
                if line is not None:
                    line.append(0 if action == Action.REUSE else 1)
    return dict(out)


def _agreed(variant: Variant, blocks: int, sites: Sequence[str], where: str) -> dict[str, list[Any]]:
    """site -> action a block, where all branches agree and nothing but COMPUTE and REUSE of `sites` is said."""
    said_of = cells(variant, "action", blocks)
    for (site, branch), values in said_of.items():
        for block, action in enumerate(values):
            wanted = (Action.COMPUTE, Action.REUSE) if site in sites else (Action.COMPUTE,)
            if action is not None and action not in wanted:
                raise UnsupportedError(
                    f"{where} says {action.name} of site {site!r}, block {block}, branch {branch!r}; this format has "
                    f"COMPUTE and REUSE of {' and '.join(sites)}"
                )
    out = {}
    for site in sites:
        lines = [said_of.get((site, branch)) for branch in variant.branches]
        if any(line != lines[0] for line in lines):
            raise UnsupportedError(f"{where} treats {site} differently by branch; this format knows no branches")
        out[site] = lines[0] or [None] * blocks
    return out
