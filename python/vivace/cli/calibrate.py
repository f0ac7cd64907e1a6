"""A model and a plan to a calibration table: what `vivace calibrate` does."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from vivace.cli.progress import progress_bars
from vivace.errors import ArgumentError, OutputError

FOREIGN: Mapping[str, tuple[str, ...]] = {  # options that say nothing for a purpose
    "quantization": ("--quantized", "--option"),
    "cache": ("--recipe", "--groups", "--option"),
    "solver": ("--plan", "--recipe", "--groups", "--quantized"),
}


def purpose_of(quantization: bool, cache: bool, given: Mapping[str, Any]) -> str:
    """What a calibration is for: "quantization", "cache" or "solver". Raises ArgumentError.

    given: values of the options that not every purpose has, by name; None: not given.
    """
    solver = given["--solver"] is not None and not (quantization or cache)
    if quantization + cache + solver != 1:
        raise ArgumentError("calibrate: say what for: --solver METHOD, --quantization or --cache")
    purpose = "solver" if solver else "cache" if cache else "quantization"
    for name in FOREIGN[purpose]:
        if given[name] is not None:
            whose = " or ".join(f"--{other}" for other, foreign in FOREIGN.items() if name not in foreign)
            raise ArgumentError(f"calibrate: {name} says nothing with --{purpose}; drop it ({whose} reads it)")
    return purpose


def calibrate_model(
    model: str,
    *,
    out: Path,
    plan: Path | None,
    solver: str | None,
    steps: int | None,
    guidance: float | None,
    recipe: str,
    samples: int | None,
    groups: int | None,
    prompts: Path | None,
    seed: int,
) -> tuple[dict[str, Any], str]:
    """Measure what the linears of a denoiser read along a plan, and write the table. Returns: data for JSON, and text.

    Everything that can be wrong is checked before the first evaluation; the file appears whole or not at all.
    """
    from vivace.models.pipe import load
    from vivace.models.quantized.calibrate import calibrate_quantization
    from vivace.models.quantized.recipes import recipe_of

    check_folder(out)
    asked = None if prompts is None else read_lines(prompts)
    recipe_of(recipe)
    pipe = load(model, dtype="float32")
    chosen = pipe.choose_plan(plan, solver, steps, guidance)
    start = time.perf_counter()
    with progress_bars() as progress:
        table = calibrate_quantization(
            pipe, chosen, recipe=recipe, samples=samples, groups=groups, seed=seed, prompts=asked, progress=progress
        )
    seconds = time.perf_counter() - start
    table.save(out)
    layers, added = table.metadata["layers"], int(table.arrays["samples.added"].sum())
    data: dict[str, Any] = {"out": str(out), "kind": table.kind, "hash": table.hash, "model": table.metadata["model"]}
    data |= {"fingerprint": table.fingerprint, "plan": table.metadata["plan"]["hash"], "recipe": recipe, "seed": seed}
    data |= {"samples": len(table.metadata["branches"]), "added": added, "groups": len(table.metadata["edges"]) + 1}
    data |= {"edges": table.metadata["edges"], "layers": layers, "kept": table.metadata["kept"], "seconds": seconds}
    data |= {"bytes": sum(array.nbytes for array in table.arrays.values())}
    lines = [
        f"{data['model']}: {len(layers)} layers measured, {len(data['kept'])} stay high",
        f"{data['samples']} samples in {data['groups']} timestep groups, plan {data['plan'][:12]}, recipe {recipe}",
        f"wrote {out}: {data['bytes'] / 1e6:.1f} MB, {table.hash[:12]}, {seconds:.1f} s",
    ]
    if added:
        lines.insert(2, f"{added} of them were added, for groups that the recipe's draw left empty")
    return data, "\n".join(lines)


def calibrate_caches(
    model: str,
    *,
    out: Path,
    plan: Path | None,
    solver: str | None,
    steps: int | None,
    guidance: float | None,
    pictures: int | None,
    prompts: Path | None,
    seed: int,
    quantized: Path | None,
) -> tuple[dict[str, Any], str]:
    """Measure what caches do to pictures along a plan, and write the table. Returns: data for JSON, and text."""
    from vivace.models.caching.calibrate import PICTURES, calibrate_cache
    from vivace.models.pipe import load

    check_folder(out)
    asked = None if prompts is None else read_lines(prompts)
    pipe = load(model, dtype="float32", quantized=quantized)
    chosen = pipe.choose_plan(plan, solver, steps, guidance)
    count, start = PICTURES if pictures is None else pictures, time.perf_counter()
    with progress_bars() as progress:
        table = calibrate_cache(pipe, chosen, pictures=count, seed=seed, prompts=asked, progress=progress)
    seconds = time.perf_counter() - start
    table.save(out)
    told = table.metadata
    data: dict[str, Any] = {"out": str(out), "kind": table.kind, "hash": table.hash, "model": told["model"]}
    data |= {"fingerprint": table.fingerprint, "plan": told["plan_hash"], "seed": seed, "seconds": seconds}
    data |= {name: told[name] for name in ("pictures", "evaluations", "sites", "quantized")}
    data |= {"arrays": sorted(table.arrays), "bytes": sum(array.nbytes for array in table.arrays.values())}
    low = told["quantized"]
    lines = [
        f"{data['model']}: sites {', '.join(data['sites'])} over {data['evaluations']} evaluations of {count} runs",
        f"wrote {out}: {data['bytes'] / 1e6:.1f} MB, {table.hash[:12]}, plan {data['plan'][:12]}, {seconds:.1f} s",
    ]
    if low is not None:
        lines.insert(1, f"what {low['format']} adds was measured, weights {low['digest'][:12]}")
    return data, "\n".join(lines)


def check_folder(path: Path) -> None:
    """Refuse a file that could not be written, before any work. Raises OutputError."""
    if path.is_dir():
        raise OutputError(f"{path}: is a folder; name a file in it")
    try:
        with tempfile.TemporaryFile(dir=path.parent):
            pass
    except OSError as error:
        raise OutputError(f"{path}: folder {path.parent} cannot be written ({error.strerror})") from None


def read_lines(path: Path) -> Sequence[str]:
    """Prompts of a text file, one a line, blank lines left out. Raises ArgumentError."""
    try:
        lines = [line.strip() for line in path.read_text(encoding="utf-8").splitlines()]
    except (OSError, ValueError) as error:
        raise ArgumentError(f"{path}: cannot be read as text ({getattr(error, 'strerror', None) or error})") from None
    prompts = [line for line in lines if line]
    if not prompts:
        raise ArgumentError(f"{path}: has no prompt; write one a line")
    return prompts
