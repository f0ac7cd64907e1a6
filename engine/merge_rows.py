"""Merged tokens: what a plan says of them, row by row.

Near-duplicate tokens are averaged before an attention (or an MLP) and take its result together afterwards. Which ones,
a map says: made in a row with a COMPUTE rule of site "merge", used again in rows with REUSE. A map is made of branch
"cond" and shared by all branches of its picture. What all merge rules of a row have in common stands in the variant's
`selector_params`, under the names of `DEFAULTS`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache

from vivace.engine.plan import Action, Plan, Rule, Variant
from vivace.errors import PlanError

SITE = "merge"
SITES = ("attn", "mlp")  # what tokens are merged before
# merge_cell: edge of a cell; merge_attn, merge_mlp: 1 where tokens are merged before it; merge_guidance: 1 where
# destinations are drawn by importance; merge_levels: how many resolutions of a UNet merge, from the highest.
DEFAULTS = {"merge_cell": 2, "merge_attn": 1, "merge_mlp": 0, "merge_guidance": 0, "merge_levels": 1}
MOST_CELL = 64


@dataclass(frozen=True, slots=True)
class MergeRow:
    """What a row merges. spans: (blocks, share, a new map) in order; sites: before what; others as of `DEFAULTS`."""

    spans: tuple[tuple[tuple[int, int], float, bool], ...]
    cell: int
    sites: tuple[str, ...]
    guided: bool
    levels: int

    def of(self, block: int) -> tuple[float, bool] | None:
        """(share, a new map) of a block; None: it merges nothing."""
        return next(((share, fresh) for (a, b), share, fresh in self.spans if a <= block < b), None)


@lru_cache(1024)
def merge_row(variant: Variant) -> MergeRow | None:
    """What a variant merges; None for nothing."""
    rules = [rule for rule in variant.rules if rule.site == SITE]
    if not rules:
        return None
    said = _said(variant)
    spans = tuple((rule.blocks, rule.share, rule.action == Action.COMPUTE) for rule in rules)
    sites = tuple(site for site in SITES if said[f"merge_{site}"])
    return MergeRow(spans, int(said["merge_cell"]), sites, bool(said["merge_guidance"]), int(said["merge_levels"]))


def merges(plan: Plan) -> bool:
    """Some row merges tokens."""
    return any(merge_row(variant) is not None for variant in plan.variants)


def guided(plan: Plan) -> bool:
    """Some row draws destinations by importance."""
    return any(row.guided for variant in plan.variants if (row := merge_row(variant)) is not None)


def merge_bytes(plan: Plan) -> int | None:
    """Bytes that one picture's maps and importance take, of a bound plan of a network whose blocks have one width.

    int32: of every block the merged token of each token, and the token that each merged one stands for. None where
    tokens are not known for every block.
    """
    binding = plan.binding
    if binding is None or not binding.width:
        return None
    shares: dict[tuple[str, int], float] = {}
    for variant in plan.variants:
        for (first, last), share, fresh in () if (row := merge_row(variant)) is None else row.spans:
            shares |= {(variant.model, block): share for block in range(first, last) if fresh}
    maps = sum(4 * (2 * binding.tokens - merged_count(binding.tokens, share)) for share in shares.values())
    return maps + (4 * math.prod(binding.latent_shape[1:]) if guided(plan) else 0)


def merged_count(tokens: int, share: float) -> int:
    """How many of `tokens` are merged away, where there are as many outside of the destinations."""
    return int(tokens * share)


class MergeWalk:
    """Legality of merge rules, row by row: one map for all branches, reused as it was made."""

    def __init__(self, guarded: bool) -> None:
        self.guarded = guarded  # some row has a guard
        self._made: dict[tuple[str, object], tuple[float, dict[str, float]]] = {}

    def check(self, where: str, variant: Variant, tokens: int) -> None:
        """Raise PlanError naming the rule that cannot be. tokens: of the image, 1 while unbound."""
        said, rules = _said(variant, where), [rule for rule in variant.rules if rule.site == SITE]
        if not rules:
            return
        if self.guarded:
            raise PlanError(f"{where}: merges tokens in a plan with guards, whose looks do not; drop one of the two")
        if any(rule.site == "kv" and rule.action is not None for rule in variant.rules):
            raise PlanError(f"{where}: merges tokens and keeps keys and values of all of them; leave one of the two")
        if variant.keep != tokens:
            raise PlanError(f"{where}: merges tokens and computes {variant.keep:g} of {tokens}; a row does one of them")
        if variant.branches[0] != "cond":
            raise PlanError(f"{where}: merges tokens; branch 'cond', whose map all share, comes first")
        for rule in rules:
            self._rule(where, variant, rule, said)

    def _rule(self, where: str, variant: Variant, rule: Rule, said: dict[str, float]) -> None:
        what = f"{where}: merge rule on blocks {rule.blocks}"
        if rule.action not in (Action.COMPUTE, Action.REUSE) or rule.order or rule.store or rule.precision:
            raise PlanError(f"{what}: action COMPUTE (a new map) or REUSE and a share are all it says")
        if rule.branches is not None and set(rule.branches) != set(variant.branches):
            raise PlanError(f"{what}: speaks of branches {rule.branches}; one map serves all branches")
        most = 1.0 - said["merge_cell"] ** -2
        if rule.share > most:
            raise PlanError(f"{what}: share {rule.share:g}; cells of {said['merge_cell']:g} allow {most:g} at most")
        first, last = rule.blocks
        for block in range(first, last) if 0 <= first < last else (rule.blocks,):
            key, now = (variant.model, block), (rule.share, said["merge_cell"])
            if rule.action == Action.COMPUTE:
                self._made[key] = rule.share, said
            elif key in self._made and (self._made[key][0], self._made[key][1]["merge_cell"]) != now:
                raise PlanError(f"{what}: REUSE of a map of another share or cell; say the same as when it was made")


def _said(variant: Variant, where: str = "") -> dict[str, float]:
    """The variant's numbers by the names of `DEFAULTS`. Raises PlanError for one that cannot be."""
    given = {name: value for name, value in variant.selector_params if name.startswith("merge_")}
    whole = DEFAULTS | given
    limits = {"merge_cell": (2, MOST_CELL), "merge_levels": (1, 64)}
    for name, value in given.items():
        low, high = limits.get(name, (0, 1))
        if name not in DEFAULTS or value != int(value) or not low <= value <= high:
            raise PlanError(f"{where}: {name}={value:g}; integers {', '.join(DEFAULTS)} are known")
    if not whole["merge_attn"] and not whole["merge_mlp"]:
        raise PlanError(f"{where}: merges before nothing; one of merge_attn and merge_mlp is 1")
    return whole
