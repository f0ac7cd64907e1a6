"""Benches: what this machine measures now, side by side with peers. `run` is what `vivace bench` calls."""

from __future__ import annotations

from importlib import import_module
from typing import Any

from vivace.errors import ArgumentError

SUITES = ("kernels",)


def run(suite: str, *, op: str | None = None, claim: str | None = None, quick: bool = False) -> dict[str, Any]:
    """One suite's report: {"suite", "machine", "versions", "commit", "rows", "claims"}, see `harness.report`.

    Args:
        suite: name in SUITES; op: only this part of it; claim: only this claim and the rows it needs.
        quick: fewer repetitions; one claim then takes less than 50 s on two cores.
    Raises: ArgumentError for an unknown name; BackendError when a result is wrong, before anything is timed.
    """
    if suite not in SUITES:
        raise ArgumentError(f"bench: suite {suite!r} is not here; use one of {', '.join(SUITES)}")
    report: dict[str, Any] = import_module(f"vivace.bench.{suite}").run(op, claim, quick)
    return report


def render(report: dict[str, Any]) -> str:
    """The report as text: machine, one line a row, one line a claim."""
    from vivace.bench.harness import render as render_report

    return render_report(report)
