"""Prompts to a PNG: what `vivace generate` does."""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import typer
from PIL import Image

from vivace.engine.plan import Plan
from vivace.errors import ArgumentError
from vivace.models import pictures
from vivace.models.pipe import Pipe, load
from vivace.models.prompts import Match


def generate_pictures(
    prompts: Sequence[str],
    *,
    model: str,
    solver: str | None,
    steps: int | None,
    plan: Path | None,
    guidance: float | None,
    n: int,
    seed: int,
    out: Path,
    scale: int,
    quantized: Path | None,
    backend: str,
    threads: int | None,
) -> tuple[dict[str, Any], str]:
    """Draw `n` pictures per prompt, all in one batch, and write them to `out` as one picture or a grid.

    Everything that can be wrong is checked before the first evaluation; the file appears whole or not at all.
    Returns: data for JSON, and text for people.
    """
    if guidance is not None and not math.isfinite(guidance):
        raise ArgumentError(f"guidance {guidance}; a finite number is needed")
    pictures.check_writable(out)
    pipe = load(model, quantized=quantized)
    chosen = pipe.choose_plan(plan, solver, steps, guidance)
    if quantized is not None:
        from vivace.models.quantized.given import advised

        chosen = advised(chosen, pipe.quantized)
    results = _run(pipe, chosen, prompts, n=n, seed=seed, guidance=guidance, backend=backend, threads=threads)
    images = [frame for result in results for image in result.images for frame in _frames(image)]
    sheet = images[0] if len(images) == 1 else pictures.grid(images)
    if scale > 1:
        sheet = sheet.resize((sheet.width * scale, sheet.height * scale), Image.Resampling.LANCZOS)
    metadata = {
        "vivace:plan": results[0].receipt.plan_hash,
        "vivace:seed": str(seed),
        "vivace:prompt": "; ".join(prompts),
        "vivace:n": str(n),
        "vivace:model": f"{pipe.spec.name} {pipe.spec.fingerprint}",
    }
    pictures.write_png(sheet, out, metadata)
    return _report(prompts, results, out)


def _run(
    pipe: Any,
    plan: Plan,
    prompts: Sequence[str],
    *,
    n: int,
    seed: int,
    guidance: float | None,
    backend: str,
    threads: int | None,
) -> list[Any]:
    """All prompts row by row in one batch, with a progress bar on a terminal."""
    from vivace.engine.request import Request

    if isinstance(pipe, Pipe):
        for prompt in prompts:
            pipe.model.prompts.find(prompt)
    session = pipe.compile(plan, backend=backend, threads=threads, batch=n * len(prompts))
    guided = any(ref.name == "guidance_scale" for ref in session.plans[0].inputs)
    scale = guidance if guided else None
    states = [session.begin(Request(prompt, n=n, seed=seed, guidance_scale=scale)) for prompt in prompts]
    rows = range(len(session.plans[0].steps))
    terminal = sys.stderr.isatty()
    with typer.progressbar(rows, label="drawing", file=sys.stderr) if terminal else nullcontext(rows) as bar:
        for _ in bar:
            session.step(states)
    return [session.finish(state) for state in states]


def _frames(image: Any) -> list[Image.Image]:
    """A picture, or the frames of a video."""
    return list(image) if isinstance(image, (list, tuple)) else [image]


def _report(prompts: Sequence[str], results: Sequence[Any], out: Path) -> tuple[dict[str, Any], str]:
    found, lines = [], []
    for prompt, result in zip(prompts, results, strict=True):
        match, entry = result.condition, {"prompt": prompt}
        if isinstance(match, Match):
            entry |= {"id": match.id, "name": match.name, "codepoint": match.codepoint, "how": match.how}
            lines.append(f"{prompt!r} -> {match.name!r} {match.codepoint} ({match.how})")
        found.append({**entry, "receipt": result.receipt.to_dict()})
    lines += [str(results[0].receipt), f"wrote {out}"]
    return {"out": str(out), "prompts": found}, "\n".join(lines)
