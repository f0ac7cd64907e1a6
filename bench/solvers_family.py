"""The family of solvers in one table: method x evaluations x trajectory error, PSNR, Frechet distance, by guidance.

    vivace bench solvers --model emoji          vivace bench solvers --oracle gmm

Methods with numbers of their own are tuned on one set of names and seeds and judged on another. Error: where a
trajectory ends against the converged one from the same noise, root mean square over that of the converged state. PSNR:
of the same, in dB; range 2 for pictures, the largest distance between converged coordinates for the oracle. Frechet
distance: to the converged samples of the same noise, so that few samples do; of pictures in the features of
`metrics.features`, of the oracle's states as they are. `frechet_data` of a row is that of pictures to the model's data,
which is biased upwards at this number of pictures (compare with the row "converged"). Nothing is timed.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping, Sequence
from functools import cache
from typing import Any

import numpy as np
from torch import Tensor

from vivace.bench.family_cases import EVALUATIONS, GUIDANCE, SETUPS, Case, Setup, cases, points
from vivace.bench.harness import report
from vivace.bench.published import beside
from vivace.errors import ArgumentError, VivaceError
from vivace.metrics.frechet import frechet, frechet_distance, gaussian_of
from vivace.metrics.quality import psnr

METRICS = (("error", "trajectory error"), ("psnr", "PSNR in dB"), ("frechet", "Frechet distance"))
DONE = "converged"  # the row of the converged states themselves


def run(model: str | None, oracle: str | None, quick: bool, only: Sequence[str] = ()) -> dict[str, Any]:
    """The report of one problem or both, with its table as lines. only: cases by name."""
    for option, value, known in (("--model", model, "emoji"), ("--oracle", oracle, "gmm")):
        if value not in (None, known):
            raise ArgumentError(f"bench solvers: {option} {value!r} is not here; use {known}")
    asked = [SETUPS[name] for name in (model, oracle) if name is not None]
    rows = [row for setup in asked for row in family_rows(setup, quick, only)]
    made = report("solvers", rows, [])
    made["table"] = [line for setup in asked for line in (*text_of(rows, setup, quick), "", *beside(rows, setup.name))]
    return made


def family_rows(setup: Setup, quick: bool, only: Sequence[str] = ()) -> Iterator[dict[str, Any]]:
    """One row per method, guidance and number of evaluations; what cannot be run has a reason."""
    chosen = [*cases(only)]
    for guidance in GUIDANCE:
        done = score(setup, setup.converged(guidance, setup.samples(quick)), guidance)
        yield {"solver": DONE, "on": setup.name, "guidance": guidance, "evaluations": None, **done, "error": None}
    for number, case in enumerate(chosen, 1):
        for guidance, count in points(quick):
            if sys.stderr.isatty():
                print(f"\r{number}/{len(chosen)} {case.name:24.24} {guidance:4g} {count:3}", end="", file=sys.stderr)
            yield measure(setup, case, guidance, count, quick)


def measure(setup: Setup, case: Case, guidance: float, count: int, quick: bool) -> dict[str, Any]:
    """One row."""
    row: dict[str, Any] = {"solver": case.name, "on": setup.name, "guidance": guidance, "evaluations": count}
    try:
        plan = case.within(setup, guidance, count)
        states = setup.run(plan, guidance, setup.samples(quick))
    except VivaceError as error:
        return row | {"nfe": None, "error": None, "reason": str(error)}
    if not bool(states.isfinite().all()):
        return row | {"nfe": plan.nfe, "error": None, "reason": f"diverges at guidance {guidance:g}"}
    found = score(setup, states, guidance)
    return row | {"nfe": plan.nfe} | (found if case.ode else found | {"error": None, "psnr": None})


def score(setup: Setup, states: Tensor, guidance: float) -> dict[str, float | None]:
    """error, psnr (None where equal), frechet and, of pictures, frechet_data of final states."""
    want = setup.converged(guidance, range(len(states)))
    got, wanted = states.double().numpy(), want.double().numpy()
    error = float(np.sqrt(np.square(got - wanted).mean() / np.square(wanted).mean()))
    decibels = _psnr(setup, got, wanted) if error > 0.0 else None
    if setup.name != "emoji":
        distance = frechet_distance(*gaussian_of(got), *gaussian_of(wanted))
        return {"error": error, "psnr": decibels, "frechet": distance}
    distances = {"frechet": frechet(got, _features(), wanted), "frechet_data": frechet(got, _features())}
    return {"error": error, "psnr": decibels, **distances}


def _psnr(setup: Setup, got: Any, wanted: Any) -> float:
    """Mean over pictures for pictures; of all states together for the oracle, whose states are two numbers."""
    if setup.name == "emoji":
        return float(np.mean(psnr(got, wanted)))
    span = wanted.max(axis=0) - wanted.min(axis=0)
    return float(10.0 * np.log10(span.max() ** 2 / np.square(got - wanted).mean()))


@cache
def _features() -> Any:
    from vivace.metrics.features import Features
    from vivace.models.load import open_model

    return Features.load(open_model("emoji").path.parent)


# ---------------------------------------------------------------- text
def text_of(rows: Sequence[Mapping[str, Any]], setup: Setup, quick: bool) -> list[str]:
    """The table as lines: a block per guidance and metric, methods down, evaluations across."""
    counts = [count for count in EVALUATIONS if any(row["evaluations"] == count for row in rows)]
    names = list(dict.fromkeys(row["solver"] for row in rows if row["on"] == setup.name))
    held = len(setup.samples(quick))
    lines = [f"{setup.name}: tuned on {setup.counts[0]} samples, judged on {held} others (other names, other seeds)"]
    for guidance in GUIDANCE:
        mine = {(r["solver"], r["evaluations"]): r for r in rows if (r["on"], r["guidance"]) == (setup.name, guidance)}
        for metric, title in METRICS:
            lines += ["", f"{setup.name}, guidance {guidance:g}: {title}; evaluations across"]
            lines.append(f"{'':26}" + "".join(f"{count:>9}" for count in counts))
            for name in names:
                found = [mine.get((name, None if name == DONE else count), {}).get(metric) for count in counts]
                if any(value is not None for value in found):
                    lines.append(f"{name:26}" + "".join(f"{_cell(value, metric):>9}" for value in found))
    reasons = {(row["solver"], row["reason"]) for row in rows if row["on"] == setup.name and row.get("reason")}
    return [*lines, *(f"{name}: {reason}" for name, reason in sorted(reasons))]


def _cell(value: float | None, metric: str) -> str:
    if value is None:
        return "-"
    if not np.isfinite(value) or value > 1e5:
        return "diverges"
    return f"{value:.2f}" if metric == "psnr" else f"{value:.3g}"
