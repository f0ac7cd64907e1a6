"""Rows of which a branch has the identity in place of attention maps: which blocks, and running such branches apart."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING

from vivace.engine.plan import Action, Variant

if TYPE_CHECKING:
    from torch import Tensor

    from vivace.engine.compiled import Evaluation

SITE = "identity"  # what a model that has it is asked of blocks, by `why_not_kept`
APART = "eager: branches whose attention maps are the identity are not compiled"


def identity_blocks(variant: Variant, branch: str) -> frozenset[int]:
    """Blocks of a bound variant whose attention map is the identity in a branch."""
    rules = [rule for rule in variant.rules if rule.action == Action.IDENTITY]
    mine = [rule for rule in rules if branch in (rule.branches or variant.branches)]
    return frozenset(block for rule in mine for block in range(*rule.blocks))


def perturbs(variant: Variant) -> bool:
    """Some branch has the identity somewhere."""
    return any(rule.action == Action.IDENTITY for rule in variant.rules)


def parted(variant: Variant) -> tuple[tuple[Variant, frozenset[int]], ...]:
    """The variant by branches that have the identity in the same blocks, without those rules, in order."""
    found: dict[frozenset[int], list[str]] = {}
    for branch in variant.branches:
        found.setdefault(identity_blocks(variant, branch), []).append(branch)
    return tuple((_narrower(variant, tuple(branches)), blocks) for blocks, branches in found.items())


def _narrower(variant: Variant, branches: tuple[str, ...]) -> Variant:
    rules = []
    for rule in variant.rules:
        spoken = tuple(branch for branch in rule.branches or variant.branches if branch in branches)
        if spoken and rule.action != Action.IDENTITY:
            rules.append(replace(rule, branches=None if spoken == branches else spoken))
    return replace(variant, branches=branches, rules=tuple(rules))


def run_parted(
    call: Evaluation,
    variant: Variant,
    run: Callable[[Evaluation, Variant], tuple[Tensor, ...]],
    eagerly: Callable[[Evaluation, Variant], tuple[Tensor, ...]],
) -> tuple[Tensor, ...]:
    """Predictions by branch: by `run` of branches as they are, by `eagerly` of those with the identity somewhere.

    run: its results may be overwritten by its next call.
    """
    found: dict[str, Tensor] = {}
    for part, blocks in parted(variant):
        if not blocks:
            found |= zip(part.branches, [out.clone() for out in run(call, part)], strict=True)
            continue
        rules = tuple(r for r in variant.rules if r.branches is None or set(r.branches) & set(part.branches))
        own = tuple(replace(rule, branches=None) for rule in rules)
        found |= zip(part.branches, eagerly(call, replace(part, rules=own)), strict=True)
    return tuple(found[branch] for branch in variant.branches)


def why_not_perturbed(variant: Variant) -> str:
    """What else a variant says that such rows do not do; empty when there is nothing."""
    if not perturbs(variant):
        return ""
    others = [rule for rule in variant.rules if rule.action not in (None, Action.IDENTITY)]
    if others or variant.selector != "all":
        return "IDENTITY of attention beside caches, merged or left-out tokens"
    odd = [rule for rule in variant.rules if rule.action == Action.IDENTITY and rule.site != "attn"]
    return f"IDENTITY of site {odd[0].site!r}; it is for site 'attn'" if odd else ""
