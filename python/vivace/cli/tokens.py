"""`--tokens key=value,...`: rows that compute some tokens."""

from __future__ import annotations

from vivace.cli.caches import arguments_in
from vivace.engine.passes import apply_tokens
from vivace.engine.plan import Plan
from vivace.errors import ArgumentError


def with_tokens(plan: Plan, text: str | None) -> Plan:
    """The plan with `passes.apply_tokens`: "keep=0.5,selector=deviation,first=4"."""
    if text is None:
        return plan
    arguments = arguments_in("--tokens", text)
    try:
        return apply_tokens(plan, **arguments)
    except TypeError as error:
        raise ArgumentError(f"--tokens {text!r:.80}: {error}") from None


def require_tokens(plan: Plan, option: str) -> None:
    """Raise ArgumentError for a map of a plan, bound or not, of which no row leaves out tokens."""
    tokens = 1.0 if plan.binding is None else float(plan.binding.tokens)
    if all(variant.keep == tokens for variant in plan.variants):
        raise ArgumentError(
            f"{option}: every row of the plan computes all tokens; make one with `vivace plan new --tokens keep=0.5`"
        )
