"""A model to a plan that was searched for it: what `vivace plan tune` does."""

from __future__ import annotations

import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from vivace.cli.caches import printed, summary
from vivace.cli.calibrate import check_folder, read_lines
from vivace.cli.progress import progress_bars
from vivace.cli.solver_tables import guidance_of

PROMPTS = 64  # classes drawn where no prompts are given


def tune_plan(
    model: str,
    solver: str,
    *,
    steps: int,
    out: Path,
    options: Mapping[str, Any],
    guidance: float | None,
    prompts: Path | None,
    seed: int,
    anew: bool,
    **budget: int | None,
) -> tuple[dict[str, Any], str]:
    """Search a plan and write it. Returns: data for JSON, and text.

    solver: "usf" decides every row; any other deterministic solver is searched for its timesteps. Work under way is
    kept in OUT.partial: the same command goes on from it, with more trials or rounds too, unless `anew`.
    """
    from vivace.engine.calibrate.problem import Problem
    from vivace.engine.search import TimestepSpace, UsfSpace, search
    from vivace.models.pipe import load
    from vivace.models.quantized.calibrate import default_prompts

    check_folder(out)
    asked = None if prompts is None else read_lines(prompts)
    pipe = load(model, dtype="float32")
    schedule = pipe.spec.schedule
    if solver == "usf":
        space: Any = UsfSpace(schedule, steps, **_space_options(options))
    else:
        space = TimestepSpace(solver, schedule, steps, dict(options))
    scale = guidance_of(pipe.choose_plan(None, None, 2, guidance))
    used = default_prompts(pipe, PROMPTS, seed) if asked is None else asked
    problem = Problem.of_pipe(pipe, used, guidance=scale, seed=seed)
    work, start = out.with_name(f"{out.name}.partial"), time.perf_counter()
    if anew:
        work.unlink(missing_ok=True)
    resumed = work.exists()
    given = {name: value for name, value in budget.items() if value is not None}
    with progress_bars() as progress:
        found = search(problem, space, seed=seed, progress=progress, resume=work, **given)
    seconds = time.perf_counter() - start
    found.plan.save(out)
    data: dict[str, Any] = {"plan": summary(found.plan), "path": str(out), "model": pipe.spec.name, "solver": solver}
    data |= {"guidance": scale, "seed": seed, "error": found.error, "judged": found.judged, "even": found.even}
    data |= {"history": [list(pair) for pair in found.history], "rows": found.rows, "resumed": resumed}
    data["seconds"] = seconds
    lines = [
        printed(found.plan),
        f"{pipe.spec.name}, guidance {scale:g}: error {found.judged:.4g} on samples that only judged, "
        f"{found.error:.4g} on those searched; {found.even:.4g} for {_begun(solver)} on the even grid",
        f"wrote {out}: {found.plan.nfe} evaluations, {found.plan.hash[:12]}; {found.rows} evaluations, {seconds:.0f} s"
        f"{', went on' if resumed else ''}; {work.name} may be removed",
    ]
    return data, "\n".join(lines)


def _begun(solver: str) -> str:
    return "order 2" if solver == "usf" else solver


def _space_options(options: Mapping[str, Any]) -> dict[str, Any]:
    """free=, shift=, highest= of the space of `usf`. Raises ArgumentError."""
    from vivace.engine.timesteps import choose

    return {choose("plan tune: option of usf", name, ("free", "shift", "highest")): v for name, v in options.items()}
