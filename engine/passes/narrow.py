"""Rows that evaluate fewer branches than their ops read: of a branch that does not run, "cond" is read instead."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from vivace.engine.bind import normal_form
from vivace.engine.plan import Coef, Op, Plan, Step, Transform, Variant

Terms = tuple[tuple[str, Coef], ...]
DIFFERENCE = "d"  # slot of cond - uncond in rows of guidance


def without(plan: Plan, variant: Variant, branch: str) -> Variant:
    """A variant that does not run a branch, with what its rules say of the others; in the plan's normal form."""
    branches = tuple(name for name in variant.branches if name != branch)
    rules = []
    for rule in variant.rules:
        spoken = variant.branches if rule.branches is None else rule.branches
        left = tuple(name for name in spoken if name != branch)
        if left:
            rules.append(replace(rule, branches=None if set(left) == set(branches) else left))
    made = tuple(rules) if plan.binding is None else normal_form(tuple(rules), branches)
    return replace(variant, branches=branches, rules=made)


def narrowed(step: Step, variant: Variant) -> Step:
    """The row with a variant that runs some of its branches, its ops rid of what cancels: uncond + s (cond - uncond)
    becomes cond, as a row without guidance has it, and rescaling it to the deviation of cond nothing."""
    if variant.branches == step.branches:
        return replace(step, variant=variant, guard=None)
    place = dict(zip(step.branches, step.outs, strict=True))
    cond = place["cond"]
    gone = {slot: cond for branch, slot in place.items() if branch not in variant.branches}
    outs = tuple(place[branch] for branch in variant.branches)
    return replace(step, variant=variant, guard=None, outs=outs, ops=_simplified(step.ops, gone))


def _simplified(ops: tuple[Op, ...], names: dict[str, str]) -> tuple[Op, ...]:
    """Ops on other slots: terms of sums that vanish are left out, and so is a rescaling of cond to itself."""
    copies: dict[str, str] = {}  # slot -> the one that it is a copy of
    zero: set[str] = set()
    made: list[Op] = []
    for op in ops:
        if isinstance(op, Transform):
            others = tuple(names.get(slot, slot) for slot in op.reads)
            if op.kind == "cfg_rescale" and others == (copies.get(op.slot, op.slot),):
                continue
            copies.pop(op.slot, None)
            made.append(replace(op, reads=others))
            continue
        terms = _summed(op.terms, names, zero)
        zero.discard(op.dst)
        copies.pop(op.dst, None)
        if not terms:
            zero.add(op.dst)
            if op.dst == DIFFERENCE:  # of this row alone
                continue
            terms = ((next(iter(names.values())), 0.0),)
        elif len(terms) == 1 and terms[0][1] == 1.0:
            copies[op.dst] = terms[0][0]
        made.append(replace(op, terms=terms))
    return tuple(made)


def _summed(terms: Terms, names: Mapping[str, str], zero: set[str]) -> Terms:
    """Terms by slot, numbers of one slot added up, those that vanish left out."""
    found: dict[tuple[str, Coef | None], Coef] = {}
    for name, coef in terms:
        slot = names.get(name, name)
        if slot in zero:
            continue
        key = slot, None if isinstance(coef, float) else coef
        before = found.get(key)
        both = isinstance(coef, float) and isinstance(before, float)
        if before is not None and not both:
            return tuple((names.get(n, n), c) for n, c in terms)  # one slot twice by inputs: left as it is
        found[key] = coef + before if isinstance(coef, float) and isinstance(before, float) else coef
    return tuple((slot, coef) for (slot, _), coef in found.items() if coef != 0.0)
