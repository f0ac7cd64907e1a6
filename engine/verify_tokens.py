"""Legality of rows that compute some image tokens: someone chooses, what others keep is there, none is forgotten."""

from __future__ import annotations

import math

from vivace.engine import plan as p
from vivace.engine.token_rows import MEASURED, PARAMETERS, SELECTORS, focused, token_rows
from vivace.errors import PlanError

MOST_PLANES = 4  # that a selection reads
MOST_BOUND = 4095  # rows that a selection lets a token go without, by force


class TokenWalk:
    """State of the walk over the rows: the last evaluated one, and which branches have a prediction of all tokens."""

    def __init__(self, plan: p.Plan) -> None:
        self.plan = plan
        self.tokens = 1 if plan.binding is None else plan.binding.tokens
        self._last: p.Variant | None = None
        self._rows: dict[str, int] = {}  # branch -> evaluations of it so far, by the last model
        self._both = False  # a row had both cond and uncond

    def check(self, where: str, step: p.Step, variant: p.Variant) -> None:
        """Raise PlanError unless the row, or its guard's variant, can compute what it says."""
        if self._last is None and (focused(variant) or variant.keep != self.tokens):
            raise PlanError(f"{where}: the first evaluated row must be full; keep is {variant.keep:g} of {self.tokens}")
        self._told(where, variant)
        if focused(variant):
            self._token_row(where, step, variant)

    def note(self, variant: p.Variant) -> None:
        """A row of this variant was evaluated."""
        if self._last is not None and self._last.model != variant.model:
            self._rows.clear()
            self._both = False
        for branch in variant.branches:
            self._rows[branch] = self._rows.get(branch, 0) + 1
        self._both |= {"cond", "uncond"} <= set(variant.branches)
        self._last = variant

    def _told(self, where: str, variant: p.Variant) -> None:
        """The selector is known, its parameters too."""
        if not focused(variant):
            if variant.keep != self.tokens:
                raise PlanError(
                    f"{where}: it keeps {variant.keep:g} of {self.tokens} tokens and nobody chooses which; name a "
                    f"selector: {', '.join(SELECTORS)}"
                )
            return
        if variant.selector not in SELECTORS:
            raise PlanError(f"{where}: selector {variant.selector!r:.40}; use one of {', '.join(SELECTORS)}")
        seen = [name for name, _ in variant.selector_params]
        if set(seen) - set(PARAMETERS) or len(set(seen)) < len(seen):
            raise PlanError(
                f"{where}: selector parameters {seen!r:.80}; {variant.selector} takes {', '.join(PARAMETERS)}, once"
            )
        params = dict(variant.selector_params)
        if not 0.0 <= params.get("drop_high", 0.0) <= 1.0 or params.get("starvation", 0.0) < 0.0:
            raise PlanError(f"{where}: selector parameters {params}; need 0 <= drop_high <= 1 and starvation >= 0")
        bound = params.get("bound", -1.0)
        if bound != int(bound) or not -1.0 <= bound <= MOST_BOUND:
            raise PlanError(f"{where}: bound {bound:g}; need a whole number of rows up to {MOST_BOUND}, or -1 for any")

    def _token_row(self, where: str, step: p.Step, variant: p.Variant) -> None:
        if step.guard is not None:
            raise PlanError(f"{where}: a guard and some tokens in one row; guards choose between rows that compute all")
        last = self._last
        assert last is not None, "checked before"
        if last.model != variant.model:
            raise PlanError(
                f"{where}: it computes some tokens, the row before is of model {last.model!r}; the first row of "
                f"{variant.model!r} must be full"
            )
        if missing := [branch for branch in variant.branches if branch not in self._rows]:
            raise PlanError(
                f"{where}: it computes some tokens of branch {missing[0]!r}, which no row computed before; the first "
                "row with it must be full"
            )
        if any(rule.site == "merge" for rule in variant.rules):
            raise PlanError(f"{where}: it merges tokens and computes some of them; leave one of the two")
        self._selector(where, variant, last)

    def _selector(self, where: str, variant: p.Variant, last: p.Variant) -> None:
        """What the selector reads is there."""
        name = variant.selector
        if name == "same" and (not focused(last) or last.keep != variant.keep):
            raise PlanError(f"{where}: selector 'same' takes the tokens of the row before, which keeps {last.keep:g}")
        if name == "guidance" and not self._both:
            raise PlanError(
                f"{where}: selector 'guidance' compares cond and uncond, which no row before had both; apply_guidance "
                "comes first"
            )
        if name == "change" and self._rows.get("cond", 0) < 2:
            raise PlanError(f"{where}: selector 'change' compares two predictions; two full rows come first")
        planes = len(last.branches) * (2 if name == "change" else 1)
        if name in MEASURED and planes > MOST_PLANES:
            raise PlanError(f"{where}: selector {name!r} reads {planes} predictions; at most {MOST_PLANES}")

    def end(self) -> None:
        """Raise PlanError where a bound cannot be kept: least (bound + 1) tokens are fewer than all."""
        for i, row in enumerate(token_rows(self.plan)):
            if row is None or row.bound < 0 or row.selector == "same":
                continue
            if row.least * (row.bound + 1) < self.tokens * (1 - 1e-9):
                enough = math.ceil(min(self.tokens / row.least, 1e18) - 1e-9) - 1
                raise PlanError(
                    f"step {i}: rows that compute {row.least:g} of {self.tokens} tokens cannot reach each within "
                    f"{row.bound} rows; raise the bound to {enough}, or keep more"
                )
