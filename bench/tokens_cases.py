"""What `bench tokens` draws: settings of region-adaptive rows on plans of the bundled model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from vivace.bench.caching_cases import Base
from vivace.bench.e2e_cases import Case
from vivace.engine.passes import apply_tokens
from vivace.engine.plan import Plan

NEVER = 1000  # rows, more than any plan has
KEEPS = (0.75, 0.5, 0.25, 0.125)
UNIPC, DDIM = Base("unipc", 20), Base("ddim", 50)
BASES = (UNIPC, DDIM)
FIRST, EVERY = 4, 8  # evaluations with all tokens: the first, and each so many
RANDOM = "random"
CONTROL: Mapping[str, Any] = {"starvation": 0.0, "bound": NEVER}  # of random tokens as published: without memory


@dataclass(frozen=True)
class Setting:
    """Tokens kept, who selects them, and further arguments of `passes.apply_tokens`; keep 1: all of them."""

    keep: float = 1.0
    selector: str = "all"
    options: Mapping[str, Any] = field(default_factory=dict, hash=False)

    @property
    def told(self) -> str:
        """The arguments as text."""
        more = ", ".join(f"{name} {value}" for name, value in self.options.items())
        return f"keep {self.keep:g}" + (f", {more}" if more else "")

    def plan(self, plan: Plan) -> Plan:
        """The plan with token rows."""
        if self.keep == 1.0:
            return plan
        given = {"first": FIRST, "last": 1, "every": EVERY, **self.options}
        return apply_tokens(plan, self.keep, selector=self.selector, **given)


ALL = Setting()
# Which end of the ranking is dropped says what the metric takes for the subject: published scripts differ.
SELECTORS: tuple[tuple[str, Mapping[str, Any]], ...] = (
    ("deviation", {"drop_high": 1.0}),
    ("deviation", {"drop_high": 0.0}),
    ("norm", {"drop_high": 0.0}),
    ("change", {}),
    ("guidance", {}),
    ("attention", {}),
    (RANDOM, {}),  # with starvation like the others: whoever waits longest, ties at random
    (RANDOM, CONTROL),
)


def settings(keeps: Sequence[float] = KEEPS) -> tuple[Setting, ...]:
    """Every selector at every share."""
    return tuple(Setting(keep, name, options) for keep in keeps for name, options in SELECTORS)


def planned(case: Case, base: Base, setting: Setting) -> Plan:
    """The base plan with token rows."""
    return setting.plan(case.plan(base.solver, base.steps))


def active_share(plan: Plan, text: int = 0) -> float:
    """Share of a bound plan's work that is computed: linears and queries of active tokens, `text` tokens always run.

    Attention of M queries against all N keys is M / N of the whole, as are linears, so a row is (M + T) / (N + T).
    """
    assert plan.binding is not None
    tokens = plan.binding.tokens
    counted = [(len(s.variant.branches), s.variant.keep) for s in plan.steps if s.variant is not None]
    whole = sum(branches for branches, _ in counted)
    return sum(branches * (keep + text) / (tokens + text) for branches, keep in counted) / whole
