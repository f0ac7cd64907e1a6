"""Prompts through a pack to a PNG: what `vivace run` does, without torch."""

from __future__ import annotations

import math
import sys
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import typer
from PIL import Image

from vivace.errors import ArgumentError
from vivace.models import pictures
from vivace.runtime import PackResult, PackSession, open_pack
from vivace.runtime.session import write_latents


def run_prompts(
    pack: Path,
    prompts: Sequence[str],
    *,
    n: int,
    seed: int,
    guidance: float | None,
    out: Path | None,
    scale: int,
    backend: str,
    threads: int | None,
    check: bool = True,
    image: Path | None = None,
) -> tuple[dict[str, Any], str]:
    """Draw `n` pictures per prompt and write them to `out` as one picture or a grid.

    out: None: "vivace.png"; latents go to a `.npy` file, which is the only choice for a pack that decodes none. check:
    hashes of the pack's files; image: the picture that a plan starts at. Everything that can be wrong is checked before
    the first evaluation.
    Returns: data for JSON, and text for people.
    """
    if guidance is not None and not math.isfinite(guidance):
        raise ArgumentError(f"guidance {guidance}; a finite number is needed")
    target = Path("vivace.png") if out is None else out
    pictures.check_writable(target)
    session = open_pack(pack, check=check).session(backend=backend, threads=threads)
    raw = target.suffix.lower() == ".npy"
    if session.graphs.decode is None and not raw:
        raise ArgumentError(f"{pack}: this pack decodes no pictures; --out latents.npy writes latents")
    for prompt in prompts:
        session.prompts(prompt)
    results = _drawn(session, prompts, {"n": n, "seed": seed, "guidance_scale": guidance, "image": image})
    if raw:
        write_latents(results, target)
    else:
        _write_sheet(results, target, scale, prompts)
    receipts = [result.receipt for result in results]
    data = {"out": str(target), "pack": str(pack), "prompts": [
        {"prompt": prompt, "receipt": receipt} for prompt, receipt in zip(prompts, receipts, strict=True)
    ]}  # fmt: skip
    return data, "\n".join([*map(_said, prompts, receipts), f"wrote {target}"])


def _drawn(session: PackSession, prompts: Sequence[str], options: Mapping[str, Any]) -> list[PackResult]:
    """One prompt after the other, with a progress bar over their rows on a terminal."""
    rows = len(session.plan.steps) * len(prompts)
    bar = typer.progressbar(length=rows, label="drawing", file=sys.stderr) if sys.stderr.isatty() else nullcontext()
    with bar as shown:

        def advance(row: int, x: Any) -> None:
            if shown is not None:
                shown.update(1)

        return [session(prompt, callback=advance, **options) for prompt in prompts]


def _write_sheet(results: Sequence[PackResult], target: Path, scale: int, prompts: Sequence[str]) -> None:
    images = [image for result in results for image in result.images]
    sheet = images[0] if len(images) == 1 else pictures.grid(images)
    if scale > 1:
        sheet = sheet.resize((sheet.width * scale, sheet.height * scale), Image.Resampling.LANCZOS)
    receipt = results[0].receipt
    metadata = {
        "vivace:plan": receipt["plan_hash"],
        "vivace:seed": str(receipt["seed"]),
        "vivace:prompt": "; ".join(prompts),
        "vivace:n": str(receipt["n"]),
        "vivace:model": f"{receipt['model']} {receipt['fingerprint']}",
    }
    pictures.write_png(sheet, target, metadata)


def _said(prompt: str, receipt: Mapping[str, Any]) -> str:
    """A line for people: what was drawn, by what, in which time."""
    found, ms = receipt["prompt"], receipt["ms"]
    match = f" -> {found['name']!r} ({found['how']})" if isinstance(found, dict) else ""
    guards = sum(any(decision["fired"]) for decision in receipt["decisions"])
    fired = f", guards fired in {guards} rows" if receipt["decisions"] else ""
    return (
        f"{prompt!r}{match}: {receipt['n']} pictures, {receipt['nfe']} evaluations, {receipt['calls']} calls{fired}; "
        f"{ms['all']:.0f} ms on {receipt['backend']} ({ms['loop']:.0f} in the loop), loaded in {receipt['load_ms']:.0f}"
    )
