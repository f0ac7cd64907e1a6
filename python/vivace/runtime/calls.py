"""What a plan asks of a network, row by row, as calls of graphs: the one reading that export and runtime share.

A call is one forward of the network for some branches of a row, which are rows of its batch. Its `Structure` is all
that decides code, and so the graph it runs; two rows of equal structure run the same graph. What is kept between calls
are inputs and outputs of graphs. Follows from the bound plan alone.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from vivace.engine.caching import RANGES, RowUse, Use, caches
from vivace.engine.looking import watched
from vivace.engine.merge_rows import merge_row
from vivace.engine.plan import Action, Plan, Variant
from vivace.engine.token_rows import focused
from vivace.errors import UnsupportedError


@dataclass(frozen=True, slots=True)
class Kept:
    """One kept thing of a call: a site of block `first`, or of the range of blocks [first, last).

    gives: kept values stand in for what is not run, else what runs is kept; made: differences kept beside the value;
    terms: planes that are read; store: dtype kept, "fp32" | "bf16" | "fp16" | "int8" | "fp8", None: as a number of the
    network ("kv"), float32 else. A keep of `made` differences reads planes 0 .. made - 1 as they were and writes planes
    0 .. made: new_0 = f, new_j = new_(j-1) - old_(j-1).
    """

    site: str
    first: int
    last: int
    gives: bool
    made: int = 0
    terms: int = 0
    store: str | None = None

    @property
    def name(self) -> str:
        """What tells the kept thing apart within a model and branch: "attn.3", for ranges by their end "block..12"."""
        return f"{self.site}..{self.last}" if self.site in RANGES else f"{self.site}.{self.first}"


@dataclass(frozen=True, slots=True)
class Structure:
    """What one forward of a network computes: the key of a graph.

    kept: in the order of blocks; precisions: (first block, last, site, precision) of rows that name some; identity:
    blocks whose attention map is the identity; tokens: image tokens that its input `token_ids` names are computed, the
    others are not; begin: blocks [0, begin) ran in a look, whose hidden states come in; look: metric of a guard, "" for
    a prediction: the graph runs blocks [0, begin) and gives what is measured and the hidden states.
    """

    model: str = "main"
    kept: tuple[Kept, ...] = ()
    precisions: tuple[tuple[int, int, str, str], ...] = ()
    identity: tuple[int, ...] = ()
    tokens: bool = False
    begin: int = 0
    look: str = ""

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON data."""
        return {**asdict(self), "kept": [asdict(kept) for kept in self.kept]}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Structure:
        """The inverse; TypeError or ValueError for fields of another release."""
        rest = {name: value for name, value in data.items() if name not in ("kept", "precisions", "identity")}
        kept = tuple(Kept(**each) for each in data["kept"])
        precisions = tuple((int(a), int(b), str(c), str(d)) for a, b, c, d in data["precisions"])
        return cls(kept=kept, precisions=precisions, identity=tuple(map(int, data["identity"])), **rest)


@dataclass(frozen=True, slots=True)
class Call:
    """One forward for some branches of a row, in the variant's order. weights: of each kept thing, on its planes; of
    those that give by one plane as it is (1.0,), of those that keep ()."""

    structure: Structure
    branches: tuple[str, ...]
    weights: tuple[tuple[float, ...], ...] = ()


@dataclass(frozen=True, slots=True)
class RowCalls:
    """A row: its calls, its guard's calls, and the look that goes before both (None: nobody looks).

    Where a look of blocks [0, b) went before, a call of all tokens whose kept things all begin at b or later has
    `begin` = b and goes on from the look's hidden states; another one begins anew. A look is at all tokens.
    """

    own: tuple[Call, ...] = ()
    otherwise: tuple[Call, ...] = ()
    look: Call | None = None


def calls_of(plan: Plan) -> tuple[RowCalls, ...]:
    """The calls of every row of a bound plan. Raises UnsupportedError, naming the row, for what no pack can hold."""
    return plan.once("calls", lambda: _calls(plan))


def structures_of(plan: Plan) -> tuple[Structure, ...]:
    """The distinct structures of a bound plan, in order of first use."""
    found: dict[Structure, None] = {}
    for row in calls_of(plan):
        looks = () if row.look is None else (row.look,)
        found |= dict.fromkeys(call.structure for call in (*looks, *row.own, *row.otherwise))
    return tuple(found)


def _calls(plan: Plan) -> tuple[RowCalls, ...]:
    rows = []
    for i, (step, cached) in enumerate(zip(plan.steps, caches(plan).rows, strict=True)):
        guard = watched(plan, i)
        look = None
        if guard is not None and step.variant is not None:
            begin = int(guard.params[0]) if guard.metric == "first_block" else 0
            model, branches = step.variant.model, step.variant.branches
            look = Call(
                Structure(model, precisions=_precisions(step.variant), begin=begin, look=guard.metric), branches
            )
        begin = 0 if look is None else look.structure.begin
        own = _of_variant(i, step.variant, cached.uses, begin)
        other = () if step.guard is None else _of_variant(i, step.guard.otherwise, cached.otherwise, begin)
        rows.append(RowCalls(own, other, look))
    return tuple(rows)


def _of_variant(row: int, variant: Variant | None, uses: Sequence[RowUse], begin: int) -> tuple[Call, ...]:
    """The forwards of a row: branches that do the same with caches and identities in one."""
    if variant is None:
        return ()
    if merge_row(variant) is not None:
        raise UnsupportedError(f"step {row}: a pack holds no rows with merged tokens; drop apply_merge from the plan")
    groups: dict[tuple[tuple[RowUse, ...], tuple[int, ...]], list[str]] = {}
    for branch in variant.branches:
        mine = tuple(item for item in uses if branch in item.use.branches)
        groups.setdefault((mine, _identity(variant, branch)), []).append(branch)
    calls = []
    for (mine, identity), branches in groups.items():
        kept = tuple(_kept(item.use) for item in mine)
        start = 0 if focused(variant) or any(each.first < begin for each in kept) else begin
        made = Structure(variant.model, kept, _precisions(variant), identity, focused(variant), start)
        calls.append(Call(made, tuple(branches), tuple(item.weights for item in mine)))
    return tuple(calls)


def _kept(use: Use) -> Kept:
    return Kept(use.site, *use.blocks, use.reads, use.made, use.terms, use.store)


def _identity(variant: Variant, branch: str) -> tuple[int, ...]:
    rules = [rule for rule in variant.rules if rule.action == Action.IDENTITY]
    mine = [rule for rule in rules if branch in (rule.branches or variant.branches)]
    return tuple(sorted({block for rule in mine for block in range(*rule.blocks)}))


def _precisions(variant: Variant) -> tuple[tuple[int, int, str, str], ...]:
    return tuple((*rule.blocks, rule.site, rule.precision) for rule in variant.rules if rule.precision is not None)
