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

from vivace.cli.tokens import require_tokens, with_tokens
from vivace.engine.plan import Plan
from vivace.errors import ArgumentError
from vivace.models import pictures
from vivace.models.heat import frames_of, write_heat
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
    tokens: str | None = None,
    show_tokens: Path | None = None,
) -> tuple[dict[str, Any], str]:
    """Draw `n` pictures per prompt, all in one batch, and write them to `out` as one picture or a grid.

    tokens: arguments of `passes.apply_tokens`; show_tokens: PNG of how often each region was computed.

    Everything that can be wrong is checked before the first evaluation; the file appears whole or not at all.
    Returns: data for JSON, and text for people.
    """
    if guidance is not None and not math.isfinite(guidance):
        raise ArgumentError(f"guidance {guidance}; a finite number is needed")
    for path in filter(None, (out, show_tokens)):
        pictures.check_writable(path)
    pipe = load(model, quantized=quantized)
    chosen = with_tokens(pipe.choose_plan(plan, solver, steps, guidance), tokens)
    if show_tokens is not None:
        require_tokens(chosen, "--show-tokens")
    if quantized is not None:
        from vivace.models.quantized.given import advised

        chosen = advised(chosen, pipe.quantized)
    results = _run(pipe, chosen, prompts, n=n, seed=seed, guidance=guidance, backend=backend, threads=threads)
    images = [frame for result in results for image in result.images for frame in frames_of(image)]
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
    if show_tokens is not None:
        write_heat(results, show_tokens)
    return _report(prompts, results, [path for path in (out, show_tokens) if path is not None])


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


def _report(prompts: Sequence[str], results: Sequence[Any], written: Sequence[Path]) -> tuple[dict[str, Any], str]:
    found, lines = [], []
    for prompt, result in zip(prompts, results, strict=True):
        match, entry = result.condition, {"prompt": prompt}
        if isinstance(match, Match):
            entry |= {"id": match.id, "name": match.name, "codepoint": match.codepoint, "how": match.how}
            lines.append(f"{prompt!r} -> {match.name!r} {match.codepoint} ({match.how})")
        found.append({**entry, "receipt": result.receipt.to_dict()})
    lines += [str(results[0].receipt), *(f"wrote {path}" for path in written)]
    return {"out": str(written[0]), "prompts": found}, "\n".join(lines)
