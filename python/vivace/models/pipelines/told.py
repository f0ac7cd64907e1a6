"""The receipt of a pipeline's call."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from vivace import __version__
from vivace.engine.receipt import KernelUse, Receipt, RowRecord, peak_memory
from vivace.errors import StateError
from vivace.models.pipelines.run import Run


def receipt_of(run: Run, pipeline: Any, reports: Mapping[str, Any], ms: float) -> Receipt:
    """What a finished run did. reports: "fused" (report by network), "prompts" (outcomes), "decode" (report)."""
    effective = run.effective
    if effective is None:
        raise StateError(f"{type(pipeline).__name__} never asked its scheduler for timesteps; it cannot be accelerated")
    plan, device = effective.plan, run.device
    both = effective.silent and run.guided
    branches = [2 if both else len(step.branches) for step in plan.steps if step.variant is not None][run.begin :]
    return Receipt(
        plan_hash=effective.digest,
        executor="pipeline",
        device=str(device),
        dtype=str(next(iter(run.networks.values())).dtype).removeprefix("torch."),
        threads=torch.get_num_threads(),
        n=run.pictures,
        nfe_planned=len(branches),
        nfe=sum(row[0] > 0 for row in run.rows),
        branch_evals_planned=sum(branches),
        branch_evals=sum(row[0] for row in run.rows),
        rows=tuple(RowRecord(i, ("cond", "uncond")[:b], run.pictures, n, s) for i, (b, n, s) in enumerate(run.rows)),
        phases={"network": sum(row[1] for row in run.rows), "solver_step": sum(row[2] for row in run.rows)},
        measured_ms=ms,
        predicted_ms=None,
        peak_memory=peak_memory(device),
        pool=0 if run.driven is None else run.driven.pool_bytes,
        kernels=_kernels(run, reports),
        warnings=(*effective.warnings, *_cut(run, len(branches))),
        versions={"vivace": __version__, "torch": torch.__version__},
        details=_details(run, reports),
    )


def _kernels(run: Run, reports: Mapping[str, Any]) -> tuple[KernelUse, ...]:
    assert run.effective is not None
    who = "plan" if run.driven is not None else "diffusers"
    uses = [KernelUse("solver_step", who, f"{type(run.own_scheduler).__name__}: {run.effective.reason}")]
    for name, report in reports.get("fused", {}).items():
        uses += [KernelUse(f"{name}.{r.op}", r.backend, f"{r.places} places; {r.reason}") for r in report.replaced]
    return (*uses, KernelUse("network", "torch", "the pipeline's own module"))


def _details(run: Run, reports: Mapping[str, Any]) -> dict[str, Any]:
    details: dict[str, Any] = {"prompts": reports["prompts"]} if "prompts" in reports else {}
    details["decode"] = reports["decode"].to_dict() if "decode" in reports else "as the pipeline does"
    if left := {name: report.to_dict()["left"] for name, report in reports.get("fused", {}).items()}:
        details["kernels_left"] = left
    if run.driven is not None and run.driven.restarts:
        details["restarts"] = run.driven.restarts
    return details


def _cut(run: Run, planned: int) -> list[str]:
    """A line when the call ended before its plan did."""
    ran = sum(row[0] > 0 for row in run.rows)
    return [f"{planned - ran} of {planned} evaluations were not run: the call ended early"] if ran < planned else []
