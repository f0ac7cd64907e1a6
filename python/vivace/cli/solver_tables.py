"""A model and a method to the method's calibration table: what `vivace calibrate --solver` does."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from vivace.cli.calibrate import check_folder, read_lines
from vivace.cli.progress import progress_bars
from vivace.errors import ArgumentError

PROMPTS = 64  # classes drawn where no prompts are given


def calibrate_solver(
    model: str,
    method: str,
    *,
    out: Path,
    samples: int | None,
    options: Mapping[str, Any],
    steps: int | None,
    guidance: float | None,
    prompts: Path | None,
    seed: int,
) -> tuple[dict[str, Any], str]:
    """Calibrate a method on a model and write the table. Returns: data for JSON, and text.

    Everything that can be wrong is checked before the first evaluation; the table appears whole or not at all. Work
    under way is kept in OUT.partial: the same command goes on from it, and it goes when the table is there.
    """
    from vivace.engine.calibrate.methods import METHODS, calibrate, check_options, method_options
    from vivace.engine.calibrate.problem import Problem
    from vivace.models.pipe import load
    from vivace.models.quantized.calibrate import default_prompts

    check_folder(out)
    given = {name: value for name, value in (("steps", steps), ("samples", samples)) if value is not None}
    if both := sorted(given.keys() & options.keys()):
        raise ArgumentError(f"calibrate: --{both[0]} and --option {both[0]}=...; give one of them")
    given |= dict(options)
    given |= {"seed": seed} if "seed" in method_options(method) else {}
    check_options(method, given)
    asked = None if prompts is None else read_lines(prompts)
    pipe = load(model, dtype="float32")
    scale = pipe.choose_plan(None, None, 2, guidance)
    used = default_prompts(pipe, PROMPTS, seed) if asked is None else asked
    problem = Problem.of_pipe(pipe, used, guidance=guidance_of(scale), seed=seed)
    partial, start = out.with_name(f"{out.name}.partial"), time.perf_counter()
    resumed = partial.exists()
    with progress_bars() as progress:
        table = calibrate(method, problem, progress=progress, resume=partial, **given)
    seconds = time.perf_counter() - start
    table.save(out)
    partial.unlink(missing_ok=True)
    data: dict[str, Any] = {"out": str(out), "kind": table.kind, "method": method, "hash": table.hash}
    data |= {"model": pipe.spec.name, "fingerprint": table.fingerprint, "guidance": problem.guidance, "seed": seed}
    data |= {
        "options": given,
        "resumed": resumed,
        "seconds": seconds,
        "use": use_of(model, method, out, problem.guidance, method_options(method) | given),
    }
    data |= {"arrays": {name: list(array.shape) for name, array in table.arrays.items()}}
    data |= {"bytes": sum(array.nbytes for array in table.arrays.values())}
    lines = [
        f"{data['model']}: {method}, {METHODS[method].about}",
        f"{len(data['arrays'])} arrays, guidance {problem.guidance:g}, seed {seed}{', went on' if resumed else ''}",
        f"wrote {out}: {data['bytes'] / 1e6:.3g} MB, {table.hash[:12]}, {seconds:.1f} s",
        f"use it: {data['use']}",
    ]
    return data, "\n".join(lines)


def guidance_of(plan: Any) -> float:
    """Scale of classifier-free guidance of a plan; 1: none."""
    return next((float(ref.default) for ref in plan.inputs if ref.name == "guidance_scale"), 1.0)


def use_of(model: str, method: str, out: Path, guidance: float, options: Mapping[str, Any]) -> str:
    """The command that makes a plan with the table; options: of the calibrator, all of them."""
    from vivace.engine.calibrate.methods import METHODS

    taken = METHODS[method].taken
    solver = method if taken == "solver" else options.get("solver")
    words = ["vivace plan new", f"--model {model}", f"--guidance {guidance:g}"]
    steps = options.get("steps")
    steps = steps[0] if isinstance(steps, (list, tuple)) else steps
    words += [f"--{name} {value}" for name, value in (("solver", solver), ("steps", steps)) if value]
    words += [f"--{name} {options[name]}" for name in ("grid", "final") if options.get(name) not in (None, "zero")]
    if options.get("timesteps"):
        words.append("--timesteps " + ",".join(map(str, options["timesteps"])))
    words += [f"--option '{name}={json.dumps(value)}'" for name, value in (options.get("options") or {}).items()]
    if options.get("guidances"):
        words.append(f"--option guidance={guidance:g}")
    if taken == "solver":
        words.append(f"--option table={out}")
    else:
        words.append(f"--apply {taken.removeprefix('apply_')}:table={out}")
    return " ".join([*words, "--out plan.json"])
