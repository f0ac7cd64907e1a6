"""What the cache rules of a plan come to: cells, how many planes each keeps, and what every row does with them.

A cell is one kept thing: what a site of a block, or a range of blocks, gave. It holds planes: plane 0 is the newest
computed value, plane j its j-th backward difference, undivided (f0, f0 - f1, f0 - 2 f1 + f2, ...). Differences are
small, so storing them in few bits costs less than storing values. Everything here follows from the plan alone; memory
and what a network does with it are `engine.kept`.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from vivace.engine.plan import Action, Plan, Rule, Step, Variant
from vivace.engine.token_rows import focused
from vivace.errors import PlanError

FEATURES = ("attn", "cross_attn", "mlp", "residual", "block", "layer")
KEYS = ("kv", "received")  # of rows with all image tokens for those with some: keys and values, attention received
SITES = (*FEATURES, *KEYS)
_AROUND = ("attn", "residual", "block")  # where one of these is given again, a block's keys and values are not made
RANGES = ("residual", "block", "layer")  # sites of a range of blocks, or of layers; the others are of one
READS = (Action.REUSE, Action.FORECAST)
BYTES = {None: 4, "fp32": 4, "bf16": 2, "fp16": 2, "fp8": 1, "int8": 1}
# Of the whole forward, where a model does not say: attention a third of a block, nothing outside of blocks.
EVEN: tuple[tuple[str, float], ...] = (("attn", 1 / 3), ("mlp", 2 / 3))


@dataclass(frozen=True, slots=True)
class Use:
    """One site of one block or range in one row, for some branches; part of the key of what runs together.

    action: COMPUTE (and keep), REUSE or FORECAST; branches: in the variant's order; made: differences that a COMPUTE
    makes beside the value; planes: of the cell; terms: planes read, 0 for COMPUTE; store: dtype kept, see `Rule`.
    """

    site: str
    blocks: tuple[int, int]
    action: Action
    branches: tuple[str, ...]
    made: int
    planes: int
    terms: int
    store: str | None

    @property
    def reads(self) -> bool:
        """It gives kept values instead of computing."""
        return self.action in READS


@dataclass(frozen=True, slots=True)
class Cell:
    """One kept thing of a plan: blocks [first, last), one block for sites within a block."""

    model: str
    site: str
    first: int
    last: int
    branch: str


@dataclass(frozen=True, slots=True)
class RowUse:
    """A use with its numbers: the weights on planes, the same for all its branches."""

    use: Use
    weights: tuple[float, ...] = ()


@dataclass(frozen=True, slots=True)
class CachedRow:
    """What a row does with the caches: as its own variant, and as its guard's."""

    uses: tuple[RowUse, ...] = ()
    otherwise: tuple[RowUse, ...] = ()


@dataclass(frozen=True, slots=True)
class CachePlan:
    """The caches of a plan. rows: one a step; planes, stores: of every cell that is kept.

    starts: of a cell of site "block" the first block of the longest run of ranges that is read with it. cells: by
    (model, site, last, branch), which tells a plan's cells apart.
    """

    rows: tuple[CachedRow, ...]
    planes: Mapping[Cell, int] = field(default_factory=dict)
    stores: Mapping[Cell, str | None] = field(default_factory=dict)
    starts: Mapping[Cell, int] = field(default_factory=dict)
    cells: Mapping[tuple[str, str, int, str], Cell] = field(init=False)

    def __post_init__(self) -> None:
        cells = {(cell.model, cell.site, cell.last, cell.branch): cell for cell in self.planes}
        object.__setattr__(self, "cells", cells)

    def bytes(self, tokens: int, width: int, element: int = 4) -> int:
        """Bytes of one picture whose cells hold [tokens, width] each, "kv" [tokens, 2 width], "received" [tokens].

        int8 has a float32 scale a token. element: bytes of a number in the model, which keys and values have where
        nothing is said.
        """
        size = 0
        for cell, planes in self.planes.items():
            store, kv = self.stores[cell], cell.site == "kv"
            each = element if kv and store is None else BYTES[store]
            wide = {"kv": 2 * width, "received": 1}.get(cell.site, width)
            size += planes * tokens * (wide * each + (4 if store == "int8" else 0))
        return size


def attends(variant: Variant, block: int, branch: str) -> bool:
    """A block's attention runs in a row of a bound plan, so that its keys and values are made."""
    return not any(
        rule.action in READS
        and rule.site in _AROUND
        and rule.blocks[0] <= block < rule.blocks[1]
        and branch in (rule.branches or variant.branches)
        for rule in variant.rules
    )


def plane_weights(values: Sequence[float]) -> tuple[float, ...]:
    """Weights on planes of weights on values, newest first: c_j = (-1)^j sum_i C(i, j) w_i."""
    return tuple(
        (-1) ** j * math.fsum(math.comb(i, j) * values[i] for i in range(j, len(values))) for j in range(len(values))
    )


def caches(plan: Plan) -> CachePlan:
    """The caches of a bound plan; verified plans cannot fail here. Raises PlanError for one that is not bound."""
    return plan.once("caches", lambda: _caches(plan))


def _caches(plan: Plan) -> CachePlan:
    if not any(rule.action is not None for variant in plan.variants for rule in variant.rules):
        return CachePlan((CachedRow(),) * len(plan.steps))
    if plan.binding is None:
        raise PlanError("caches: the plan is not bound; plan.bind(pipe.spec) resolves its blocks")
    return _Lowering(plan).lowered()


def cache_bytes(plan: Plan, element: int = 4) -> int | None:
    """Bytes that the caches of a bound plan take for one picture; None where the model does not tell its width.

    element: as of `CachePlan.bytes`; heads of keys that are fewer than those of queries take less.
    """
    found = caches(plan)
    if not found.planes:
        return 0
    binding = plan.binding
    if binding is None or not binding.width:
        return None
    return found.bytes(binding.tokens, binding.width, element)


def free_of_x(variant: Variant, uses: Sequence[RowUse]) -> bool:
    """A row reads nothing of its latent: what leaves the first blocks is given again, in every branch, and none keeps.

    Then its prediction follows from its timestep alone, and rows in a row can be evaluated together (Li et al. 2023,
    Faster Diffusion, section 3.2).
    """
    first = [item.use for item in uses if item.use.reads and item.use.site == "block" and item.use.blocks[0] == 0]
    given = {branch for use in first for branch in use.branches}
    return not focused(variant) and given >= set(variant.branches) and all(item.use.reads for item in uses)


def computed_share(plan: Plan, costs: Sequence[tuple[str, float]] = ()) -> float:
    """Share of the plan's work that is computed, by the cost of sites; 1 without caches.

    costs: of one block's sites and of what is outside of blocks ("outside"), in any unit; () is a third attention, two
    thirds MLP. Rows without reuse count whole, branches as often as they run; guards count as if they never fired. Of
    rows that compute some image tokens their share of them counts, as if no text ran beside.
    """
    if plan.binding is None:
        raise PlanError("computed_share: the plan is not bound; plan.bind(pipe.spec) resolves its blocks")
    done = total = 0.0
    for step, row in zip(plan.steps, caches(plan).rows, strict=True):
        if step.variant is not None:
            branches = len(step.variant.branches)
            of = plan.binding.tokens, plan.binding.layers
            done += branches * share_of(step.variant, row.uses, plan.binding.blocks, costs, *of)
            total += branches
    return done / total if total else 1.0


def share_of(
    variant: Variant,
    uses: Sequence[RowUse],
    blocks: int,
    costs: Sequence[tuple[str, float]] = (),
    tokens: int = 1,
    layers: int = 0,
) -> float:
    """Share of one row's work that is computed; arguments as of `computed_share`. tokens: of a bound plan's image;
    layers: of all blocks together, taken for alike."""
    known = dict(costs or EVEN)
    outside = known.pop("outside", 0.0)
    whole = len(variant.branches) * (outside + blocks * math.fsum(known.values()))
    each = blocks / layers if layers else 1.0
    spared = math.fsum(len(item.use.branches) * _spared(item.use, known, each) for item in uses)
    part = variant.keep / tokens if focused(variant) else 1.0
    return part * (1.0 - spared / whole) if whole else part


def read_by(uses: Sequence[RowUse]) -> tuple[int, int]:
    """(sites reused, sites forecast) of a row, a range counted as one, every branch once; `KEYS` are neither."""
    mine = [item.use for item in uses if item.use.site not in KEYS]
    reused = sum(len(use.branches) for use in mine if use.action == Action.REUSE)
    return reused, sum(len(use.branches) for use in mine if use.action == Action.FORECAST)


def _spared(use: Use, costs: Mapping[str, float], layer: float) -> float:
    """Cost of what a use does not compute, for one branch. layer: what one is of a block."""
    if not use.reads:
        return 0.0
    per_block = math.fsum(costs.values()) if use.site in RANGES else costs.get(use.site, 0.0)
    return (use.blocks[1] - use.blocks[0]) * (layer * per_block if use.site == "layer" else per_block)


@dataclass(slots=True)
class _Said:
    """What a row says of one cell."""

    action: Action
    order: int
    store: str | None
    weights: tuple[float, ...]  # on values


class _Lowering:
    """Forward over the rows: how many values each cell has; backward: how many of them are still read."""

    def __init__(self, plan: Plan) -> None:
        self.plan = plan
        self.cuts = self._cuts()
        said = [self._of(step, step.variant) for step in plan.steps]
        other = [self._of(step, None if step.guard is None else step.guard.otherwise) for step in plan.steps]
        self.said, self.other = said, other
        self.made = self._forward()
        self.planes: dict[Cell, int] = {}
        self.starts: dict[Cell, int] = {}
        self.needed = self._backward()
        self.stores = {cell: what.store for row in said for cell, what in row.items() if what.action == Action.COMPUTE}

    def lowered(self) -> CachePlan:
        """The rows as executors read them."""
        rows = []
        for i, step in enumerate(self.plan.steps):
            own = self._uses(i, step.variant, self.said[i])
            otherwise = () if step.guard is None else self._uses(i, step.guard.otherwise, self.other[i])
            rows.append(CachedRow(own, otherwise))
        stores = {cell: self.stores.get(cell) for cell in self.planes}
        return CachePlan(tuple(rows), self.planes, stores, self.starts)

    def _cuts(self) -> dict[tuple[str, str], list[int]]:
        """Where ranges of a (model, site) begin or end in any row."""
        cuts: dict[tuple[str, str], set[int]] = {}
        for variant in self.plan.variants:
            for rule in variant.rules:
                if rule.action is not None and rule.site in RANGES:
                    cuts.setdefault((variant.model, rule.site), set()).update(rule.blocks)
        return {key: sorted(places) for key, places in cuts.items()}

    def _pieces(self, model: str, rule: Rule) -> Iterator[tuple[int, int]]:
        """The cells' ranges that a rule speaks of."""
        first, last = rule.blocks
        if rule.site not in RANGES:
            yield from ((block, block + 1) for block in range(first, last))
            return
        places = [place for place in self.cuts[model, rule.site] if first <= place <= last]
        yield from zip(places, places[1:], strict=False)

    def _of(self, step: Step, variant: Variant | None) -> dict[Cell, _Said]:
        """What a row says, by cell."""
        out: dict[Cell, _Said] = {}
        for rule in () if variant is None else variant.rules:
            if rule.action is None or variant is None or rule.site not in SITES:
                continue
            end = rule.weights + rule.order + 1
            weights = {Action.REUSE: (1.0,), Action.FORECAST: step.forecast[rule.weights : end]}.get(rule.action, ())
            for first, last in self._pieces(variant.model, rule):
                for branch in rule.branches or variant.branches:
                    chosen = rule.site == "received" and rule.action in READS  # by selections, whatever attends
                    if rule.site in KEYS and not chosen and not attends(variant, first, branch):
                        continue
                    cell = Cell(variant.model, rule.site, first, last, branch)
                    out[cell] = _Said(rule.action, rule.order, rule.store, weights)
        return out

    def _forward(self) -> list[dict[Cell, int]]:
        """By row and cell that it computes: the differences that can be made. What a guard may leave out makes none."""
        have: dict[Cell, int] = {}
        rows = []
        for step, row in zip(self.plan.steps, self.said, strict=True):
            made = {}
            for cell, what in row.items():
                if what.action == Action.COMPUTE:
                    made[cell] = 0 if step.guard is not None else min(have.get(cell, 0), what.order)
                    have[cell] = made[cell] + 1
            rows.append(made)
        return rows

    def _backward(self) -> list[dict[Cell, int]]:
        """By row and cell that it computes: the planes of the outcome that a later row reads."""
        wanted: dict[Cell, int] = {}
        rows: list[dict[Cell, int]] = []
        for step, own, other, made in reversed(
            list(zip(self.plan.steps, self.said, self.other, self.made, strict=True))
        ):
            needed = {}
            for cell in made:
                after = needed[cell] = wanted.get(cell, 0)
                before = min(made[cell], max(after - 1, 0))
                part = step.guard is not None or focused(step.variant)  # else all of it is new
                wanted[cell] = max(before, after) if part else before
                if after:
                    self.planes[cell] = max(self.planes.get(cell, 0), after)
            for said in (own, other):
                for cell in self._read(said):
                    wanted[cell] = max(wanted.get(cell, 0), len(said[cell].weights))
            rows.append(needed)
        return rows[::-1]

    def _read(self, row: Mapping[Cell, _Said]) -> dict[Cell, int]:
        """Cells that a row reads, and the first block given with each: of adjoining ranges of site "block" the last."""
        read = [cell for cell, what in row.items() if what.action in READS]
        before = {(cell.model, cell.branch, cell.last): cell for cell in read if cell.site == "block"}
        within = {(cell.model, cell.branch, cell.first) for cell in before.values()}
        found = {}
        for cell in read:
            if cell.site == "block" and (cell.model, cell.branch, cell.last) in within:
                continue
            first = cell
            while cell.site == "block" and (cell.model, cell.branch, first.first) in before:
                first = before[cell.model, cell.branch, first.first]
            found[cell] = first.first
        return found

    def _uses(self, i: int, variant: Variant | None, row: Mapping[Cell, _Said]) -> tuple[RowUse, ...]:
        """The uses of a row in the order of blocks, branches that do the same in one."""
        found: dict[RowUse, list[str]] = {}
        read = self._read(row)
        for cell, what in row.items():
            if what.action == Action.COMPUTE:
                planes = self.needed[i].get(cell, 0)
                if not planes:
                    continue
                blocks, made = (cell.first, cell.last), min(self.made[i][cell], planes - 1)
                use = Use(cell.site, blocks, what.action, (), made, self.planes[cell], 0, self.stores.get(cell))
                found.setdefault(RowUse(use), []).append(cell.branch)
            elif cell in read:
                start = read[cell]
                self.starts[cell] = min(start, self.starts.get(cell, cell.first))
                use = Use(
                    cell.site,
                    (start, cell.last),
                    what.action,
                    (),
                    0,
                    self.planes[cell],
                    len(what.weights),
                    self.stores.get(cell),
                )
                found.setdefault(RowUse(use, plane_weights(what.weights)), []).append(cell.branch)
        uses = [RowUse(_with_branches(item.use, variant, branches), item.weights) for item, branches in found.items()]
        return tuple(sorted(uses, key=lambda item: (item.use.blocks, item.use.site, item.use.branches)))


def _with_branches(use: Use, variant: Variant | None, branches: Sequence[str]) -> Use:
    """The use, for these branches in the order of the variant."""
    ordered = tuple(branch for branch in (() if variant is None else variant.branches) if branch in branches)
    return Use(use.site, use.blocks, use.action, ordered, use.made, use.planes, use.terms, use.store)
