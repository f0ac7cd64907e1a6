"""Region-adaptive tokens of the bundled model: quality against time, beside random tokens and beside fewer steps.

Published tables suggest that selecting tokens beats a random choice by little, and fewer steps only in places. So every
row stands beside random tokens of the same schedule, and beside the plain plan of as much time. Quality is PSNR to the
plan that computes all tokens (what the pass does), to the converged solution of the same noise (what the user gets),
and the Frechet distance to the data. All times are of the same interleaved rounds.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from vivace.bench import tokens_large
from vivace.bench.caching import DTYPE, SECONDS, SEED, Row, Table, interval_of
from vivace.bench.caching_cases import Base, Method, decibels, described, draw
from vivace.bench.e2e import emoji_case
from vivace.bench.e2e_int8 import draw as draw_many
from vivace.bench.harness import Claim, of_claims, report
from vivace.bench.tokens_cases import ALL, BASES, CONTROL, KEEPS, RANDOM, UNIPC, Setting, planned, settings
from vivace.kernels.spec import missing
from vivace.metrics import Features, frechet
from vivace.metrics.quality import Array

PICTURES = 340  # behind a Frechet distance
DRAWN = (ALL.selector, "deviation", RANDOM)  # selectors with one, on the first base plan
NAME, BOUND = "tokens.selector_vs_random_db", 0.5


class TokenTable(Table):
    """Rows of settings of tokens."""

    def setting(self, base: Base, setting: Setting) -> Row:
        """A plan drawn and judged."""
        plan = planned(self.case, base, setting)
        drawn = self.plain(base) if setting == ALL else draw(self.case, self.run, plan)
        columns = described(self.case.model, base, Method(setting.selector, {"keep": setting.keep}), drawn) | {
            "op": "tokens", "setting": setting.told, "keep": setting.keep,
            "guidance": self.case.guidance, "seed": SEED,
            "psnr": float(decibels(drawn.latents, self.reference).mean()),
            "psnr_uncached": float(decibels(drawn.latents, self.plain(base).latents).mean()),
        }  # fmt: skip
        return Row(base, columns, plan, drawn)


def emoji_table(quick: bool) -> list[dict[str, Any]]:
    """All settings on all base plans."""
    table = TokenTable(emoji_case())
    rows = [table.setting(base, setting) for base in BASES for setting in (ALL, *settings())]
    lines = table.time(rows, BASES, SECONDS[quick])
    for row in rows:
        table.beside(row, lines[row.base])
    if not quick:
        features = Features.load(table.case.model.folder)
        for row in rows:
            if row.base != BASES[0] or row.columns["method"] not in DRAWN:
                continue
            row.columns["frechet"] = float(frechet(draw_many(table.run, row.plan, PICTURES), features))
    return [row.columns for row in rows]


# ---------------------------------------------------------------- claim
def selector_claim(quick: bool) -> tuple[list[dict[str, Any]], Claim]:
    """PSNR to the run with all tokens: the best selector above random tokens, the least gain of all shares kept."""
    if (reason := missing("cpu")) is not None:
        return [], Claim(NAME, ">=", BOUND, reason)
    table, found, rows = TokenTable(emoji_case()), list[tuple[Array, str]](), list[dict[str, Any]]()
    for base in (UNIPC,) if quick else BASES:
        exact = table.plain(base).latents
        for keep in KEEPS:
            tried = {setting: table.setting(base, setting) for setting in settings((keep,))}
            rows += [row.columns for row in tried.values()]
            judged = {setting: decibels(row.drawn.latents, exact) for setting, row in tried.items()}
            random, control = (
                next(judged[each] for each in tried if each.selector == RANDOM and (each.options == CONTROL) == alone)
                for alone in (False, True)
            )
            best = max((each for each in tried if each.selector != RANDOM), key=lambda each: judged[each].mean())
            gains = np.asarray(judged[best] - control)
            told = f"{base.solver} {base.steps}, keep {keep:g}: {best.selector} ({best.told}) "
            told += f"{judged[best].mean():.1f} dB, random {control.mean():.1f} dB, random among those that wait "
            told += f"longest {random.mean():.1f} dB"
            found.append((gains, told))
    gains, _ = min(found, key=lambda item: float(item[0].mean()))
    how = "emoji, PSNR to the run with all tokens, the least gain of: " + "; ".join(told for _, told in found)
    how += f"; {len(gains)} pictures, {DTYPE}; interval over pictures"
    return rows, Claim(NAME, ">=", BOUND, how, float(gains.mean()), interval_of(gains), len(gains))


CLAIMS: Mapping[str, Callable[[bool], tuple[list[dict[str, Any]], Claim]]] = {
    NAME: selector_claim,
    **tokens_large.CLAIMS,
}


def run(op: str | None = None, claim: str | None = None, quick: bool = False) -> dict[str, Any]:
    """All rows and claims; with `claim`, that one and the rows behind it."""
    rows, claims = of_claims("tokens", CLAIMS, op, claim, quick)
    if claim is None and missing("cpu") is None:
        rows += emoji_table(quick)
    return report("tokens", rows, claims)
