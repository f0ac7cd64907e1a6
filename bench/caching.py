"""Caches of the bundled model: quality against time and against work, beside the same solver with fewer steps.

A published cache often only ties with fewer steps, so every cached row stands beside the plain plan of as much time:
times of plain plans are a line in their steps, and the plain plan gets the number of steps that takes at least the
cached plan's time. Quality is PSNR to the uncached run (what the cache does), to the converged solution of the same
noise (what the user gets), and the Frechet distance to the data. All times are of the same interleaved rounds.
"""

from __future__ import annotations

import itertools
import math
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from vivace.bench import caching_large, caching_peers
from vivace.bench.caching_cases import (
    BASES,
    BUDGETS,
    DDIM,
    FIXED,
    METHODS,
    NONE,
    RULES,
    UNIPC,
    Base,
    Drawn,
    Method,
    decibels,
    described,
    draw,
    each,
    plain,
    planned,
    session,
)
from vivace.bench.e2e import CLASSES, SOLVERS, emoji_case
from vivace.bench.e2e_cases import Case
from vivace.bench.e2e_int8 import draw as draw_many
from vivace.bench.harness import Candidate, Claim, Timing, in_turn, of_claims, report
from vivace.engine.plan import Plan
from vivace.kernels.spec import missing
from vivace.metrics import Features, frechet
from vivace.metrics.quality import Array

SEED = 7
DTYPE, BACKEND = "float32", "cpu"
SECONDS = {True: 10.0, False: 60.0}  # of timed rounds, quick or not
PICTURES = 340  # behind a Frechet distance
LINE = (5, 10, 16)  # steps of the plain plans whose times make the line; beside them the base's own
GAIN, OPTIMAL = "caching.psnr_gain_over_fewer_steps_db", "caching.dp_psnr_gain_over_best_fixed_rule_db"
BOUND = 0.5  # dB, of both
# Tried in a quick run of the claim on fewer steps.
TRIED: tuple[tuple[Base, Method], ...] = (
    (UNIPC, each("OptimalCache", budget=(0.41,))[0]),
    (UNIPC, each("TaylorSeer", interval=(2,), order=(2,), first=(1,))[0]),
    (DDIM, each("TaylorSeer", interval=(4,), order=(1,), first=(1,))[0]),
)


@dataclass(frozen=True, eq=False)
class Line:
    """Time of a plain plan in ms as a line in its steps."""

    start: float
    step: float

    @classmethod
    def through(cls, times: Mapping[int, float]) -> Line:
        """Least squares through (steps, ms)."""
        step, start = np.polyfit(list(times), list(times.values()), 1)
        return cls(float(start), float(step))

    def steps(self, ms: float) -> int:
        """The fewest steps that take at least `ms`; without limit where the clock was too rough for a rising line."""
        return max(1, math.ceil((ms - self.start) / self.step - 1e-9)) if self.step > 0.0 else sys.maxsize


@dataclass(eq=False)
class Row:
    """A cached or plain plan: its columns, its pictures, its time."""

    base: Base
    columns: dict[str, Any]
    plan: Plan
    drawn: Drawn
    times: Timing | None = None

    @property
    def ms(self) -> float:
        """Median of a whole picture."""
        assert self.times is not None
        return self.times.median


class Table:
    """Rows of one model on one session; converged solution and plain pictures are drawn once."""

    def __init__(self, case: Case) -> None:
        self.case, self.run = case, session(case.model.name, DTYPE, BACKEND)
        self.reference = case.converged()
        self._plain: dict[Base, Drawn] = {}

    def plain(self, base: Base) -> Drawn:
        """Pictures of an uncached plan."""
        if base not in self._plain:
            self._plain[base] = draw(self.case, self.run, plain(self.case, base))
        return self._plain[base]

    def row(self, base: Base, method: Method) -> Row:
        """A plan drawn and judged."""
        plan = planned(self.case, base, method)
        drawn = self.plain(base) if method == NONE else draw(self.case, self.run, plan)
        columns = described(self.case.model, base, method, drawn) | {
            "guidance": self.case.guidance, "seed": SEED,
            "psnr": float(decibels(drawn.latents, self.reference).mean()),
            "psnr_uncached": float(decibels(drawn.latents, self.plain(base).latents).mean()),
        }  # fmt: skip
        return Row(base, columns, plan, drawn)

    def time(self, rows: Sequence[Row], bases: Sequence[Base], seconds: float) -> dict[Base, Line]:
        """Fills in the rows' times; returns the lines of the plain plans, all from the same rounds."""
        labels = itertools.cycle(CLASSES)

        def candidate(plan: Plan) -> Candidate:
            noise = self.case.noise[:1]
            return Candidate(lambda: self.run(next(labels) % self.case.null, plan=plan, latents=noise))

        candidates = {f"row {i}": candidate(row.plan) for i, row in enumerate(rows)}
        for base in bases:
            for steps in (*LINE, base.steps):
                candidates[f"{base.solver} {steps}"] = candidate(self.case.plan(base.solver, steps))
        times = in_turn(candidates, seconds=seconds)
        for i, row in enumerate(rows):
            row.times = times[f"row {i}"]
            whole = times[f"{row.base.solver} {row.base.steps}"].median
            row.columns |= {"ms": row.times.to_dict(), "time_ratio": row.ms / whole}
        return {
            base: Line.through({n: times[f"{base.solver} {n}"].median for n in (*LINE, base.steps)}) for base in bases
        }

    def beside(self, row: Row, line: Line) -> Array:
        """Adds the plain plan of as much time; returns the gain of every picture over the best solver of that time."""
        steps = min(line.steps(row.ms), 2 * row.base.steps)
        judged = {
            solver: decibels(self.plain(Base(solver, steps)).latents, self.reference)
            for solver in dict.fromkeys((row.base.solver, *SOLVERS))
        }
        best = max(judged, key=lambda solver: float(judged[solver].mean()))
        gains = decibels(row.drawn.latents, self.reference) - judged[best]
        row.columns |= {
            "fewer_steps": steps, "fewer_psnr": float(judged[row.base.solver].mean()), "fewer_best_solver": best,
            "fewer_best_psnr": float(judged[best].mean()), "gain_db": float(gains.mean()),
        }  # fmt: skip
        return np.asarray(gains)


def emoji_table(quick: bool) -> list[dict[str, Any]]:
    """All methods on all base plans."""
    table = Table(emoji_case())
    rows = [table.row(base, method) for base in BASES for method in (NONE, *METHODS)]
    lines = table.time(rows, BASES, SECONDS[quick])
    for row in rows:
        table.beside(row, lines[row.base])
    if not quick:
        features = Features.load(table.case.model.folder)
        for row in rows:
            row.columns["frechet"] = float(frechet(draw_many(table.run, row.plan, PICTURES), features))
    return [row.columns for row in rows]


def interval_of(gains: Array) -> tuple[float, float]:
    """95 % bootstrap interval of the mean over pictures."""
    rng = np.random.default_rng(SEED)
    means = [gains[rng.integers(0, len(gains), len(gains))].mean() for _ in range(2000)]
    return float(np.percentile(means, 2.5)), float(np.percentile(means, 97.5))


# ---------------------------------------------------------------- claims
def fewer_steps_claim(quick: bool) -> tuple[list[dict[str, Any]], Claim]:
    """PSNR of the best cached plan above that of the best plain plan of as much time."""
    if (reason := missing("cpu")) is not None:
        return [], Claim(GAIN, ">=", BOUND, reason)
    table = Table(emoji_case())
    tried = TRIED if quick else tuple((base, method) for base in BASES for method in METHODS)
    rows = [table.row(base, method) for base, method in tried]
    bases = tuple(dict.fromkeys(base for base, _ in tried))
    lines = table.time(rows, bases, SECONDS[quick])
    gains = [table.beside(row, lines[row.base]) for row in rows]
    best = max(range(len(rows)), key=lambda i: float(gains[i].mean()))
    told = rows[best].columns
    how = (
        f"emoji, {told['method']} ({told['setting']}) on {told['solver']} with {told['steps']} steps, "
        f"{told['time_ratio']:.2f} of its time, {told['psnr']:.1f} dB; without a cache as much time is "
        f"{told['fewer_steps']} steps: {told['fewer_best_solver']}, the best of {', '.join(SOLVERS)}, reaches "
        f"{told['fewer_best_psnr']:.1f} dB; PSNR to the converged solution of the same noise, mean of "
        f"{told['pictures']}; float32, medians of interleaved pictures; interval over pictures"
    )
    found = Claim(GAIN, ">=", BOUND, how, float(gains[best].mean()), interval_of(gains[best]), len(gains[best]))
    return [row.columns for row in rows], found


def optimal_claim(quick: bool) -> tuple[list[dict[str, Any]], Claim]:
    """PSNR to the uncached run: the optimal schedule above the best fixed rule of as much work, the least gain."""
    if (reason := missing("cpu")) is not None:
        return [], Claim(OPTIMAL, ">=", BOUND, reason)
    table, rows, found = Table(emoji_case()), list[dict[str, Any]](), list[tuple[Array, dict[str, Any]]]()
    for base in (UNIPC,) if quick else BASES:
        uncached = table.plain(base).latents
        fixed = [table.row(base, method) for method in RULES]
        rows += [row.columns for row in fixed]
        rivals = [rival for budget in BUDGETS if (rival := best_within(fixed, budget)) is not None]
        for rival in {id(rival): rival for rival in rivals}.values():
            ours = table.row(base, Method("OptimalCache", {"budget": rival.drawn.share}))
            gains = decibels(ours.drawn.latents, uncached) - decibels(rival.drawn.latents, uncached)
            ours.columns |= {"rival": f"{rival.columns['method']}, {rival.columns['setting']}"}
            ours.columns |= {"rival_share": rival.drawn.share, "rival_psnr": rival.columns["psnr_uncached"]}
            ours.columns |= {"gain_db": float(gains.mean())}
            rows.append(ours.columns)
            found.append((np.asarray(gains), ours.columns))
    gains, _ = min(found, key=lambda item: float(item[0].mean()))
    how = "emoji, PSNR to the uncached run, the least gain of: " + "; ".join(
        f"{told['solver']} {told['steps']}, share {told['share']:.2f}: {told['psnr_uncached']:.1f} dB, {told['rival']} "
        f"(share {told['rival_share']:.2f}) {told['rival_psnr']:.1f} dB"
        for _, told in found
    )
    how += f"; best of {', '.join(FIXED)} at every share; {len(gains)} pictures that no table was made from"
    return rows, Claim(OPTIMAL, ">=", BOUND, how, float(gains.mean()), interval_of(np.asarray(gains)), len(gains))


def best_within(rows: Sequence[Row], budget: float) -> Row | None:
    """The row nearest to the uncached run among those that compute at most a share, and something less than all."""
    within = [row for row in rows if row.drawn.share <= min(budget + 0.01, 0.99)]
    return max(within, key=lambda row: float(row.columns["psnr_uncached"]), default=None)


CLAIMS: Mapping[str, Callable[[bool], tuple[list[dict[str, Any]], Claim]]] = {
    GAIN: fewer_steps_claim,
    OPTIMAL: optimal_claim,
    **caching_large.CLAIMS,
    **caching_peers.CLAIMS,
}


def run(op: str | None = None, claim: str | None = None, quick: bool = False) -> dict[str, Any]:
    """All rows and claims; with `claim`, that one and the rows behind it."""
    rows, claims = of_claims("caching", CLAIMS, op, claim, quick)
    if claim is None and missing("cpu") is None:
        rows += emoji_table(quick)
    return report("caching", rows, claims)
