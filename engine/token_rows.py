"""What a plan says of image tokens: which rows compute some of them, who chooses, how long one may go without.

A token row computes `keep` of the N image tokens; its variant names a selector. Of each branch the raw prediction of
the other tokens is that of the row that computed them last. Contents are state of a request (`engine.tokens`);
everything here follows from the plan alone.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import TypeAlias

from vivace.engine.plan import Affine, AgeRef, InputRef, Plan, Step, Variant, coefs, reads, writes

MEASURED = ("deviation", "norm", "change", "guidance")  # selectors that read predictions
SELECTORS = (*MEASURED, "attention", "mask", "random", "same")
PARAMETERS = ("bound", "drop_high", "starvation")
ALL = "all"  # the selector of a row that computes every token

Product: TypeAlias = tuple[float, tuple[InputRef, ...]]  # a number and the inputs it is multiplied by
Sums: TypeAlias = dict[str, tuple[Product, ...]]  # by branch
_ONE: Product = (1.0, ())


@dataclass(frozen=True, slots=True)
class TokenRow:
    """A row that computes some tokens.

    keep: how many, a share while unbound; params: of the selector; bound: rows that a token may go without, -1 any
    number; least: fewest that a row computes before all are again; reads: branches whose predictions it is chosen by;
    stale: the row before had no branch "uncond", so "guidance" ranks by the last that had.
    """

    keep: float
    selector: str
    params: tuple[tuple[str, float], ...]
    bound: int
    least: float
    reads: tuple[str, ...] = ()
    stale: bool = False

    @property
    def drop_high(self) -> float:
        """Share of the tokens left out that has the highest scores."""
        return dict(self.params).get("drop_high", drop_high_of(self.selector))

    @property
    def starvation(self) -> float:
        """s of the factor exp(-s age) on a token's distance from those that are computed."""
        return dict(self.params).get("starvation", 0.0)


@dataclass(frozen=True, slots=True)
class TokenPlan:
    """The tokens of a plan. rows: one a step, None where all are computed or nothing is.

    after: branches whose predictions are kept after each row; stages: rows that are a further evaluation of their step;
    classes: rows with coefficients by token age, `depth` and `gaps` of which are rows before and gaps told apart.
    """

    rows: tuple[TokenRow | None, ...]
    after: tuple[tuple[str, ...], ...]
    stages: tuple[bool, ...]
    classes: tuple[bool, ...]
    depth: int = 0
    gaps: int = 0

    def __bool__(self) -> bool:
        return any(row is not None for row in self.rows)


def focused(variant: Variant | None) -> bool:
    """A row of this variant computes the tokens that its selector names."""
    return variant is not None and variant.selector != ALL


def drop_high_of(selector: str) -> float:
    """Which end is left out where nothing is said: noisy background has a high deviation, what moves matters."""
    return 1.0 if selector in ("deviation", "norm", "mask") else 0.0


def tokens_of(plan: Plan) -> TokenPlan:
    """The tokens of a plan, bound or not; verified plans cannot fail here."""
    return plan.once("tokens", lambda: _tokens(plan))


def token_rows(plan: Plan) -> tuple[TokenRow | None, ...]:
    """`TokenPlan.rows` of a plan."""
    return tokens_of(plan).rows


def _tokens(plan: Plan) -> TokenPlan:
    stages = tuple(step.variant is not None and step.x != "x" for step in plan.steps)
    rows: list[TokenRow | None] = []
    last: Step | None = None  # evaluated before
    for step in plan.steps:
        rows.append(_row(step.variant, last))
        last = last if step.variant is None else step
    for segment in segments(plan):
        least = min(row.keep for i in segment if (row := rows[i]) is not None)
        for i in segment:
            row = rows[i]
            rows[i] = None if row is None else replace(row, least=least)
    aged = tuple(any(isinstance(coef, AgeRef) for op in step.ops for coef in coefs(op)) for step in plan.steps)
    lengths = [len(coef.values) for op in plan.ops() for coef in coefs(op) if isinstance(coef, AgeRef)]
    gaps = max(0, max(lengths, default=3) - 3)
    return TokenPlan(tuple(rows), _after(plan, rows), stages, aged, history_depth(plan), gaps)


def _row(variant: Variant | None, last: Step | None) -> TokenRow | None:
    if variant is None or not focused(variant):
        return None
    params = dict(variant.selector_params)
    read: tuple[str, ...] = ()
    if last is not None and variant.selector in ("deviation", "norm", "change"):
        found = combination(last)
        read = tuple(branch for branch in last.branches if branch in found)
    elif variant.selector == "guidance":
        read = ("cond", "uncond")
    stale = variant.selector == "guidance" and last is not None and "uncond" not in last.branches
    bound = int(params.get("bound", -1.0))
    return TokenRow(variant.keep, variant.selector, variant.selector_params, bound, variant.keep, read, stale)


def segments(plan: Plan) -> Iterator[tuple[int, ...]]:
    """Numbers of the rows that select tokens, between rows that compute all."""
    mine: list[int] = []
    for i, step in enumerate(plan.steps):
        if step.variant is None or step.variant.selector == "same":
            continue
        if focused(step.variant):
            mine.append(i)
        elif mine:
            yield tuple(mine)
            mine = []
    if mine:
        yield tuple(mine)


def combination(step: Step) -> Sums:
    """What a row makes of its branches before it makes anything else of them, by branch: sums of products.

    The last slot that is a weighted sum of outs alone, such as the guided prediction; "cond" where there is none.
    """
    outs = dict(zip(step.outs, step.branches, strict=False))
    known: dict[str, Sums] = {out: {branch: (_ONE,)} for out, branch in outs.items()}
    found: Sums = {"cond": (_ONE,)}
    for op in step.ops:
        if not isinstance(op, Affine):
            continue
        if not all(slot in known and isinstance(coef, (float, InputRef)) for slot, coef in op.terms):
            known.pop(op.dst, None)
            continue
        total: Sums = {}
        for slot, coef in op.terms:
            for branch, products in known[slot].items():
                total[branch] = total.get(branch, ()) + tuple(_times(product, coef) for product in products)
        known[op.dst] = total
        if len(total) > 1 or "cond" in total:
            found = total
    return found


def _times(product: Product, coef: object) -> Product:
    number, inputs = product
    if isinstance(coef, InputRef):
        return number, (*inputs, coef)
    return (number * coef, inputs) if isinstance(coef, float) else product


def branch_weights(step: Step, values: Mapping[str, float]) -> dict[str, float]:
    """`combination` in numbers. values: of the request's inputs. Raises KeyError for an input that is no number."""
    found = {}
    for branch, products in combination(step).items():
        total = 0.0
        for number, inputs in products:
            for ref in inputs:
                number *= values[ref.name]
            total += number
        found[branch] = total
    return found


def history_depth(plan: Plan) -> int:
    """Most history slots of earlier rows that any row reads from the first on that computes some tokens."""
    most, first = 0, next((i for i, step in enumerate(plan.steps) if focused(step.variant)), len(plan.steps))
    for step in plan.steps[first:]:
        written = set(step.outs) if step.variant is not None else set[str]()
        read = set[str]()
        for op in step.ops:
            read |= {slot for slot in reads(op) if slot not in written and _is_history(slot)}
            written.add(writes(op))
        most = max(most, len(read))
    return most


def _is_history(slot: str) -> bool:
    return slot[:1] == "m" and slot[1:].isdigit()


def _after(plan: Plan, rows: list[TokenRow | None]) -> tuple[tuple[str, ...], ...]:
    """Of every row the branches whose predictions a later row reads before they are all computed again."""
    wanted: set[str] = set()
    after: list[tuple[str, ...]] = []
    both = {"cond", "uncond"}
    compared = False  # a later row ranks by the last row that had both
    changes = False  # a later row ranks by the change between a token's last two values, so every row's are needed
    for step, row in zip(reversed(plan.steps), reversed(rows), strict=True):
        if compared and both <= set(step.branches):
            wanted |= both
            compared = False
        after.append(tuple(branch for branch in step.branches if changes or branch in wanted))
        if step.variant is None:
            continue
        if row is None:
            wanted -= set(step.branches)
        else:
            wanted |= {*step.branches, *row.reads}
            changes |= row.selector == "change"
            compared |= row.stale
    return tuple(reversed(after))
