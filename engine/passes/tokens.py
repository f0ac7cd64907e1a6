"""Region-adaptive tokens as plan data: which evaluations compute some image tokens only, and who chooses them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from vivace.engine.bind import normal_form, token_count
from vivace.engine.caching import READS
from vivace.engine.passes.rules import absolute, evaluations
from vivace.engine.passes.token_history import token_history
from vivace.engine.plan import Action, Args, Plan, Rule, Step, Variant
from vivace.engine.token_rows import SELECTORS, drop_high_of, focused
from vivace.engine.verify import STORES, check_conflicts, verify
from vivace.engine.verify_tokens import MOST_BOUND
from vivace.errors import ArgumentError, PlanError

NAME = "apply_tokens"
CHOOSING = tuple(name for name in SELECTORS if name != "same")


def apply_tokens(
    plan: Plan,
    keep: float | Sequence[float] = 0.5,
    *,
    selector: str = "deviation",
    first: int = 4,
    last: int = 1,
    resets: Sequence[int] = (),
    every: int | None = None,
    slope: float = 0.0,
    drop_high: float | None = None,
    starvation: float = 2.0,
    bound: int | None = None,
    ages: int = 3,
    store: str | None = None,
) -> Plan:
    """Evaluation i computes round(keep_i N) of N image tokens, the others keep their last prediction; some compute all.

    All are computed in the first and last evaluations, in `resets`, in each `every`-th, and where the row before was of
    another model or lacked a branch. Evaluations of one step compute the same tokens. Keys and values of all tokens are
    kept, so that those computed still attend to all. Solvers read of every token's history what was computed.

    Args:
        plan: bound or not, with its guidance, precisions and caches already; without guards.
        keep: share of tokens, 0 < keep <= 1, or one for every evaluation.
        selector: "deviation" (standard deviation of the newest prediction over channels) | "norm" (its norm) | "change"
            (between a token's last two predictions) | "guidance" (cond - uncond) | "attention" (received in the last
            block of the last row with all tokens) | "mask" (input `mask` above 0) | "random".
        first, last: evaluations with all tokens at the noise end and at the clean end.
        resets, every: further ones: their numbers, and each so many.
        slope: keep_j = keep + slope (1/2 - j / (J - 1)) of the J steps that compute some: later ones fewer, same mean.
        drop_high: share of the tokens left out that has the highest scores, the rest has the lowest; None: 1 for
            deviation and norm, where the high end is background, else 0.
        starvation: s of exp(-s age), by which a token's distance from the chosen ones shrinks with every row it waits.
        bound: rows that a token may go without, kept by force; up to 4095; None: 2 ceil(1 / smallest keep).
            Without for "mask".
        ages: gaps that a multistep solver has coefficients for; older values count as one more.
        store: dtype that keys and values are kept in; None: their own.
    Returns: the plan with its keep column filled and a recipe that names this pass; the plan itself where no
        evaluation is left that computes some.
    Raises: ArgumentError; PlanError for a plan with guards, token rows, or a solver that has no such history.
    Source: Liu et al. 2025 (RAS), with one bound on how long a token waits; the reference leaves out high deviations.
    """
    recorded: dict[str, Any] = {"keep": keep, "selector": selector, "first": first, "last": last}
    recorded |= {"resets": tuple(resets), "every": every, "slope": slope, "drop_high": drop_high}
    recorded |= {"starvation": starvation, "bound": bound, "ages": ages, "store": store}
    recorded["keep"] = tuple(map(float, keep)) if isinstance(keep, (list, tuple)) else keep
    _check(recorded)
    for i, step in enumerate(plan.steps):
        if step.guard is not None or focused(step.variant):
            what = "has a guard" if step.guard is not None else "computes some tokens already"
            raise PlanError(f"{NAME}: step {i} {what}; start from the plan without")
    shares = _shares(plan, recorded)
    if all(share == 1.0 for share in shares):
        return plan
    made = _with_tokens(plan, shares, recorded)
    rows = [i for i, step in enumerate(made.steps) if focused(step.variant)]
    made = token_history(made, rows, ages)
    if made.recipe is not None:
        made = replace(made, recipe=replace(made.recipe, passes=(*made.recipe.passes, (NAME, Args.of(recorded)))))
    return verify(made)


def cut_tokens(full: Plan, args: Args, first: int) -> Args:
    """The pass's arguments for the run without its first evaluations: the others compute what the full run did."""
    values = args.to_dict()
    left = _shares(full, values)[first:]
    whole = {"keep": [1.0, *left[1:]], "first": 1, "last": 0, "resets": [], "every": None, "slope": 0.0}
    return Args.of({**values, **whole})


def _check(said: dict[str, Any]) -> None:
    """Raise ArgumentError for an argument that is not what the docstring says."""
    shares = said["keep"] if isinstance(said["keep"], (list, tuple)) else (said["keep"],)
    if not all(isinstance(share, (int, float)) and 0.0 < share <= 1.0 for share in shares):
        raise ArgumentError(f"{NAME}: keep {said['keep']!r:.60}; a share of the tokens in (0, 1], or one an evaluation")
    if said["selector"] not in CHOOSING:
        raise ArgumentError(f"{NAME}: selector {said['selector']!r:.40}; use one of {', '.join(CHOOSING)}")
    if said["store"] not in (None, *STORES):
        raise ArgumentError(f"{NAME}: store {said['store']!r:.40}; use one of {', '.join(STORES)}, or None")
    for name, least in (("first", 1), ("last", 0), ("every", 1), ("bound", 0), ("ages", 0)):
        value = said[name]
        if (value is None and name in ("every", "bound")) or (type(value) is int and value >= least):
            continue
        raise ArgumentError(f"{NAME}: {name}={value!r:.40}; an integer of {least} or more is needed")
    if any(type(number) is not int or number < 0 for number in said["resets"]):
        raise ArgumentError(f"{NAME}: resets {said['resets']!r:.60}; numbers of evaluations are needed")
    for name, high in (("slope", math.inf), ("starvation", math.inf), ("drop_high", 1.0)):
        value = said[name]
        if (value is not None or name != "drop_high") and not (isinstance(value, (int, float)) and 0 <= value <= high):
            raise ArgumentError(f"{NAME}: {name}={value!r:.40}; a number from 0 to {high:g} is needed")
    if said["selector"] == "mask" and said["bound"] is not None:
        raise ArgumentError(
            f"{NAME}: bound {said['bound']}: what lies outside of a mask is never computed; leave it out"
        )


def _shares(plan: Plan, said: dict[str, Any]) -> list[float]:
    """Share of tokens that every evaluation computes."""
    rows = [plan.steps[i] for i, _ in evaluations(plan)]
    listed = said["keep"] if isinstance(said["keep"], (list, tuple)) else None
    if listed is not None and (len(listed) != len(rows) or said["slope"]):
        what = f"with slope {said['slope']:g}" if said["slope"] else f"{len(listed)} shares"
        raise ArgumentError(f"{NAME}: keep of every evaluation, {what}; the plan has {len(rows)}, and no slope then")
    whole = _whole(rows, said, listed)
    starts = [i for i, step in enumerate(rows) if step.x == "x" and not whole[i]]
    shares = [1.0] * len(rows)
    for j, i in enumerate(starts):
        share = said["keep"] if listed is None else listed[i]
        if said["slope"] and len(starts) > 1:
            share += said["slope"] * (0.5 - j / (len(starts) - 1))
        if not 0.0 < share <= 1.0:
            raise ArgumentError(f"{NAME}: slope {said['slope']:g} leaves share {share:g} in evaluation {i}; need 0..1")
        shares[i] = float(share)
        for k in range(i + 1, len(rows)):
            if rows[k].x == "x":
                break
            shares[k] = shares[i]
    if plan.binding is None:
        return shares
    tokens, group = plan.binding.tokens, plan.binding.token_group
    return [1.0 if token_count(share, tokens, group) == tokens else share for share in shares]


def _whole(rows: Sequence[Step], said: dict[str, Any], listed: Sequence[float] | None) -> list[bool]:
    """Which evaluations compute all tokens: all of a step's, or none."""
    count, every = len(rows), said["every"]
    full = []
    for i, step in enumerate(rows):
        mine = i < said["first"] or i >= count - said["last"] or i in said["resets"] or bool(every and i % every == 0)
        mine |= listed is not None and listed[i] == 1.0
        mine |= i > 0 and not _follows(rows[i - 1].variant, step.variant)
        mine |= said["selector"] == "change" and i < 2
        full.append(mine)
    starts = [i for i, step in enumerate(rows) if step.x == "x" or not i]
    for first, end in zip(starts, [*starts[1:], count], strict=True):
        full[first:end] = [any(full[first:end])] * (end - first)
    return full


def _follows(before: Variant | None, variant: Variant | None) -> bool:
    """What a row leaves out the row before it has: of the same model, in all its branches."""
    assert before is not None and variant is not None, "both are evaluated"
    return before.model == variant.model and set(variant.branches) <= set(before.branches)


def _with_tokens(plan: Plan, shares: Sequence[float], said: dict[str, Any]) -> Plan:
    """The plan with its keep column, and rules on keys and values."""
    params = _parameters(shares, said)
    blocks = absolute(plan, (0, 0), NAME)
    lasts = [i for i, share in enumerate(shares) if share < 1.0]
    reused = any(rule.action in READS for variant in plan.variants for rule in variant.rules)
    listens = said["selector"] == "attention"
    listener = absolute(plan, (-1, 0), NAME)
    steps, number = [], 0
    for i, step in enumerate(plan.steps):
        variant = step.variant
        if variant is not None:
            share, after = shares[number], shares[number + 1 : number + 2]
            if share < 1.0:
                chosen: tuple[str, Any] = (said["selector"], params) if step.x == "x" else ("same", ())
                variant = replace(variant, keep=_kept(plan, share), selector=chosen[0], selector_params=chosen[1])
                variant = _ruled(plan, i, variant, Rule(blocks, "kv", action=Action.REUSE))
                if chosen[0] == "attention":
                    variant = _ruled(plan, i, variant, Rule(listener, "received", action=Action.REUSE))
            elif (reused and number < lasts[-1]) or (after and after[0] < 1.0):
                variant = _ruled(plan, i, variant, Rule(blocks, "kv", action=Action.COMPUTE, store=said["store"]))
                if listens:
                    variant = _ruled(plan, i, variant, Rule(listener, "received", action=Action.COMPUTE))
            number += 1
        steps.append(replace(step, variant=variant))
    return verify(replace(plan, steps=tuple(steps)))


def _parameters(shares: Sequence[float], said: dict[str, Any]) -> tuple[tuple[str, float], ...]:
    """Parameters of the selector, by name."""
    if said["selector"] == "mask":
        return ()
    least = min(shares)
    wait = min(2 * math.ceil(min(1.0 / least, MOST_BOUND)), MOST_BOUND)
    bound = wait if said["bound"] is None else said["bound"]
    high = drop_high_of(said["selector"]) if said["drop_high"] is None else said["drop_high"]
    return ("bound", float(bound)), ("drop_high", float(high)), ("starvation", float(said["starvation"]))


def _kept(plan: Plan, share: float) -> float:
    """A variant's `keep`: of a bound plan a count."""
    binding = plan.binding
    return share if binding is None else float(token_count(share, binding.tokens, binding.token_group))


def _ruled(plan: Plan, row: int, variant: Variant, rule: Rule) -> Variant:
    """A variant with one rule more, in the plan's normal form."""
    made = replace(variant, rules=(*variant.rules, rule))
    if plan.binding is None:
        return made
    check_conflicts(f"{NAME}: step {row}", made)
    return replace(made, rules=normal_form(made.rules, made.branches))
