"""Benches: what this machine measures now, side by side with peers. `run` is what `vivace bench` calls."""

from __future__ import annotations

import json
from importlib import import_module
from pathlib import Path
from typing import Any

from vivace.engine.plan_io import write_atomic
from vivace.errors import ArgumentError

SUITES = ("caching", "denoiser", "e2e", "export", "gate", "kernels", "solvers", "tokens")


def run(
    suite: str,
    *,
    op: str | None = None,
    claim: str | None = None,
    quick: bool = False,
    out: Path | None = None,
    model: str | None = None,
    oracle: str | None = None,
) -> dict[str, Any]:
    """One suite's report: {"suite", "machine", "versions", "commit", "rows", "claims"}, see `harness.report`.

    Args:
        suite: name in SUITES; op: only this part of it; claim: only this claim and the rows it needs.
        quick: fewer repetitions; one claim then takes less than 50 s on two cores.
        model, oracle: of the suite solvers: the family of solvers on "emoji", on "gmm"; its table alone, no claims.
        out: folder for the report as <suite>.json and <suite>.txt, and the suite's plots; made if missing.
    Raises: ArgumentError for an unknown name; BackendError when a result is wrong, before anything is timed.
    """
    if suite not in SUITES:
        raise ArgumentError(f"bench: suite {suite!r} is not here; use one of {', '.join(SUITES)}")
    if out is not None and out.exists() and not out.is_dir():
        raise ArgumentError(f"bench: {out} is a file; name a folder")
    module = import_module(f"vivace.bench.{suite}")
    if model is None and oracle is None:
        report: dict[str, Any] = module.run(op, claim, quick)
    elif suite != "solvers" or op is not None or claim is not None:
        raise ArgumentError("bench: --model and --oracle are of the suite solvers, without --op and --claim; drop them")
    else:
        from vivace.bench.solvers_family import run as run_family

        report = run_family(model, oracle, quick)
    if out is not None:
        out.mkdir(parents=True, exist_ok=True)
        write_atomic(out / f"{suite}.json", json.dumps(report, indent=1).encode())
        write_atomic(out / f"{suite}.txt", (render(report) + "\n").encode())
        if claim is None and hasattr(module, "plot") and "table" not in report:
            module.plot(report, out)
    return report


def render(report: dict[str, Any]) -> str:
    """The report as text: machine, one line a row, one line a claim."""
    from vivace.bench.harness import render as render_report

    return render_report(report)
