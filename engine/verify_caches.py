"""Legality of cache rules: what is read was kept, by the row that is said, once, in a dtype that can hold it."""

from __future__ import annotations

from collections.abc import Iterator

from vivace.engine import plan as p
from vivace.engine.caching import KEYS, RANGES, READS, attends
from vivace.engine.token_rows import focused
from vivace.errors import PlanError

MAX_CELLS = 1 << 20  # (block, site, branch) over all cache rules of a plan
EXACT = (None, "fp32")  # stores that hold differences of differences

Key = tuple[str, object, str, str]  # model, block, site, branch


class CacheWalk:
    """State of the walk over the rows: how many values every cell has, from which row, in which dtype."""

    def __init__(self, blocks: int | None) -> None:
        self.blocks = blocks
        self._kept: dict[Key, int] = {}
        self._rows: dict[Key, int] = {}
        self._stores: dict[Key, str | None] = {}
        self._parts: dict[Key, tuple[str, int]] = {}  # where the last row was that kept some tokens, keeps since
        self._count = 0

    def read(self, where: str, variant: p.Variant, step: p.Step, first: bool) -> None:
        """Raise PlanError unless every REUSE and FORECAST finds what it reads. first: no row was evaluated before."""
        for rule in variant.rules:
            if rule.action in READS:
                if first:
                    name = p.Action(rule.action).name
                    raise PlanError(
                        f"{where}: {name} of blocks {rule.blocks} in the first evaluated row; it must be full"
                    )
                self._read(where, variant, rule, step)
        self._check_inside(where, variant)
        self._check_keys(where, variant)

    def _check_keys(self, where: str, variant: p.Variant) -> None:
        """Raise PlanError unless keys and values are kept by full rows, and read by all attention of token rows."""
        some = focused(variant)
        held = set[Key]()
        if variant.selector == "attention" and not any(rule.site == "received" for rule in variant.rules):
            raise PlanError(f"{where}: selector 'attention' ranks by site 'received'; add REUSE of it in one block")
        for rule in variant.rules:
            if rule.site not in KEYS or rule.action is None:
                continue
            wanted = p.Action.REUSE if some else p.Action.COMPUTE
            if rule.action != wanted or rule.order:
                row = "computes some tokens reads them" if some else "computes all tokens keeps them"
                raise PlanError(
                    f"{where}: {rule.action.name}{f' of order {rule.order}' if rule.order else ''} of site "
                    f"{rule.site!r}; a row that {row} ({wanted.name}, order 0)"
                )
            held.update(_cells(variant, rule))
        if some and self.blocks is None and not held:
            raise PlanError(f"{where}: it computes some tokens and reads no keys and values (site 'kv') of the others")
        for block in range(self.blocks or 0) if some else ():
            for branch in variant.branches:
                if attends(variant, block, branch) and (variant.model, block, "kv", branch) not in held:
                    raise PlanError(
                        f"{where}: it computes some tokens; attention of block {block} branch {branch!r} needs REUSE "
                        "of site 'kv'"
                    )

    def _read(self, where: str, variant: p.Variant, rule: p.Rule, step: p.Step) -> None:
        need = rule.order + 1 if rule.action == p.Action.FORECAST else 1
        for key in self._walked(where, variant, rule):
            if rule.site == "kv" and not _attends(variant, key):  # "received" is read by selections, whatever attends
                continue
            if key in self._parts and 1 < need > self._parts[key][1]:
                raise PlanError(
                    f"{where}: FORECAST of block {key[1]} site {rule.site!r} from values of which "
                    f"{self._parts[key][0]} computed some tokens; forecast from full rows, or reuse"
                )
            have = self._kept.get(key, 0)
            if have < need:
                raise PlanError(
                    f"{where}: {p.Action(rule.action or 0).name} of block {key[1]} site {rule.site!r} branch "
                    f"{key[3]!r} needs {need} kept value(s), has {have}; put a COMPUTE rule with order >= {need - 1} "
                    f"in earlier rows of model {variant.model!r}"
                )
        if rule.action == p.Action.FORECAST and len(step.forecast) < rule.weights + need:
            raise PlanError(
                f"{where}: FORECAST of order {rule.order} needs {need} weights from number {rule.weights} on, got "
                f"{len(step.forecast)} in all"
            )

    def keep(self, where: str, row: int, variant: p.Variant, guarded: bool) -> None:
        """Note what a row keeps; what a guard or some tokens leave out is one value where there was one before."""
        orders: dict[Key, int] = {}  # several rules may speak of a cell; it is kept once
        for rule in variant.rules:
            if rule.action != p.Action.COMPUTE:
                continue
            if rule.order > 1 and rule.store not in EXACT:
                raise PlanError(
                    f"{where}: order {rule.order} kept in {rule.store}; differences of order 2 and more lose their "
                    "bits there, so keep them in fp32 or lower the order"
                )
            if rule.order and focused(variant):
                raise PlanError(
                    f"{where}: order {rule.order} kept of site {rule.site!r} by a row that computes some tokens; its "
                    "differences would be of some rows for some tokens, so keep order 0"
                )
            for key in self._walked(where, variant, rule):
                if rule.site in KEYS and not _attends(variant, key):
                    continue
                orders[key] = max(orders.get(key, 0), rule.order)
                if self._stores.setdefault(key, rule.store) != rule.store:
                    raise PlanError(
                        f"{where}: block {key[1]} site {rule.site!r} is kept in {rule.store or 'float32'}, by an "
                        f"earlier row in {self._stores[key] or 'float32'}; a plan keeps it in one dtype"
                    )
        for key, order in orders.items():
            before = self._kept.get(key, 0)
            part = guarded or focused(variant)  # of what it leaves out the value before stays
            self._kept[key] = min(1, before) if part else min(before, order) + 1
            self._rows[key] = row
            if focused(variant):
                self._parts[key] = where, 0
            elif key in self._parts:
                self._parts[key] = self._parts[key][0], self._parts[key][1] + 1

    def source(self, variant: p.Variant, branch: str, row: int) -> int:
        """The row whose output a branch of this row gives: an earlier one where every block's output is reused."""
        for rule in variant.rules:
            whole = rule.blocks[0] == 0 and rule.blocks[1] in (0, self.blocks)
            mine = rule.branches is None or branch in rule.branches
            plain = rule.action == p.Action.REUSE or (rule.action == p.Action.FORECAST and not rule.order)
            if rule.site == "block" and whole and mine and plain:
                return max((self._rows.get(key, row) for key in _cells(variant, rule) if key[3] == branch), default=row)
        return row

    def _check_inside(self, where: str, variant: p.Variant) -> None:
        """Raise PlanError when a rule speaks of a block that does not run, since a range it is in is reused."""
        ranges = [rule for rule in variant.rules if rule.action in READS and rule.site in RANGES]
        for outer in ranges:
            for rule in variant.rules:
                branches = set(rule.branches or variant.branches) & set(outer.branches or variant.branches)
                if rule.action is None or rule.site in (outer.site, *KEYS) or not branches:
                    continue  # keys and values of a block that does not run are left as they are
                if "layer" in (outer.site, rule.site) or _overlap(rule.blocks, outer.blocks):
                    raise PlanError(
                        f"{where}: {rule.action.name} of site {rule.site!r} in blocks {rule.blocks}, which do not run: "
                        f"site {outer.site!r} of blocks {outer.blocks} is reused; leave one of the two"
                    )

    def _walked(self, where: str, variant: p.Variant, rule: p.Rule) -> Iterator[Key]:
        """Cells of a rule, counted: the time of the walk is theirs."""
        first, last = rule.blocks
        self._count += max(1, last - first) * len(rule.branches or variant.branches)
        if self._count > MAX_CELLS:
            raise PlanError(f"{where}: cache rules name more than {MAX_CELLS} blocks so far; use fewer rows or sites")
        return _cells(variant, rule)


def _cells(variant: p.Variant, rule: p.Rule) -> Iterator[Key]:
    """(model, block, site, branch) cells of a rule; a range counted from the end stands for itself while unbound."""
    first, last = rule.blocks
    blocks: tuple[object, ...] = tuple(range(first, last)) if 0 <= first < last else (rule.blocks,)
    one = ("cond",) if rule.site == "merge" else None  # whose map serves all branches
    for branch in one or rule.branches or variant.branches:
        for block in blocks:
            yield variant.model, block, rule.site, branch


def _attends(variant: p.Variant, key: Key) -> bool:
    """Keys and values of a cell are made in a row, as far as that can be told: unbound ranges are looked at later."""
    return not isinstance(key[1], int) or attends(variant, key[1], key[3])


def _overlap(one: tuple[int, int], two: tuple[int, int]) -> bool:
    """Ranges share a block, as far as that can be told: ranges from the end are compared when the plan is bound."""
    if not all(0 <= first < last for first, last in (one, two)):
        return one == two
    return one[0] < two[1] and two[0] < one[1]
