"""The receipt of a pipeline's call."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, replace
from typing import Any

import torch

from vivace import __version__
from vivace.engine.caching import KEYS
from vivace.engine.guards import Decision
from vivace.engine.merge_rows import SITE
from vivace.engine.merging import unmerged
from vivace.engine.receipt import CACHING, KernelUse, Receipt, RowRecord, peak_memory
from vivace.errors import StateError
from vivace.models.pipelines.run import Run


def receipt_of(run: Run, pipeline: Any, reports: Mapping[str, Any], ms: float) -> Receipt:
    """What a finished run did. reports: "fused" (report by network), "prompts" (outcomes), "decode" (report)."""
    effective = run.effective
    if effective is None:
        raise StateError(f"{type(pipeline).__name__} never asked its scheduler for timesteps; it cannot be accelerated")
    plan, device = effective.plan, run.device
    both, caches = effective.silent and run.guided, None if run.driven is None else run.driven.caches
    merged = None if caches is None else caches.merges
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
        rows=tuple(_row(run, i, *row) for i, row in enumerate(run.rows)),
        phases={"network": sum(row[1] for row in run.rows), "solver_step": sum(row[2] for row in run.rows)},
        measured_ms=ms,
        predicted_ms=None,
        peak_memory=peak_memory(device),
        pool=0 if run.driven is None else run.driven.pool_bytes,
        kernels=_kernels(run, reports),
        caches=_caches(run),
        tokens=_tokens(run),
        merges={} if merged is None else merged.told(plan),
        decisions=_decisions(run),
        warnings=(
            *effective.warnings,
            *_cut(run, len(branches)),
            *_unused(run),
            *unmerged(plan, None if caches is None else caches.merges),
        ),
        versions={"vivace": __version__, "torch": torch.__version__},
        details=_details(run, reports),
    )


def _row(run: Run, i: int, branches: int, network_ms: float, step_ms: float) -> RowRecord:
    """One executed evaluation."""
    record = RowRecord(i, ("cond", "uncond")[:branches], run.pictures, network_ms, step_ms)
    return record if run.driven is None else replace(record, **asdict(run.driven.given[i]))


def _decisions(run: Run) -> tuple[Decision, ...]:
    """What guards decided, of blocks or of guidance."""
    if run.driven is None:
        return ()
    watch = None if run.driven.caches is None else run.driven.caches.watch
    return run.driven.adaptive.decisions or (() if watch is None else tuple(watch.decisions))


def _caches(run: Run) -> dict[str, Any]:
    """What the call kept and gave again; empty for a plan that does not cache."""
    if run.driven is None or run.driven.caches is None or not run.driven.caches.rows.keeps:
        return {}
    given = run.driven.given
    counts = {name: sum(getattr(row, name) for row in given) for name in ("reused", "forecast")}
    share = sum(row.share for row in given) / max(1, len(given))
    return run.driven.caches.told() | counts | {"computed_share": share}


def _tokens(run: Run) -> dict[str, Any]:
    """What was computed of the image tokens; empty for a plan that always computes all."""
    caches = None if run.driven is None else run.driven.caches
    if run.driven is None or caches is None or caches.tokens is None or caches.tokens.plan.binding is None:
        return {}
    count, chosen = caches.tokens.plan.binding.tokens, [row.tokens for row in run.driven.given]
    return {
        "of": count,
        "rows": sum(tokens is not None for tokens in chosen),
        "share": sum(count if tokens is None else tokens for tokens in chosen) / max(1, count * len(chosen)),
        "bound": max(-1 if row is None else row.bound for row in caches.tokens.rows),
        "bytes": caches.tokens.nbytes,
    }


def _unused(run: Run) -> tuple[str, ...]:
    """A warning where the plan asks for caching and no row gave a kept value."""
    effective = run.effective
    assert effective is not None, "a run has a plan"
    rules = (rule for variant in effective.plan.variants for rule in variant.rules)
    asked = any(rule.action is not None and rule.site not in (SITE, *KEYS) for rule in rules)
    recipe = effective.plan.recipe
    named = [] if recipe is None else [name for name, _ in recipe.passes if name in CACHING]
    counts = _caches(run)
    if not (asked or named) or counts.get("reused") or counts.get("forecast"):
        return ()
    return (f"caching had no effect: no row gave a kept value ({', '.join(named) or 'rules of the plan'})",)


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
