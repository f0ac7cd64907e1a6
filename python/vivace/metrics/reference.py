"""Converged same-noise references: the latents that a plan would reach with evaluations to spare, computed once.

A reference starts from the noise that the session under judgement starts from (same prompts, seeds and picture 0), so
what differs is the solver's error, not the picture. It is stored by model fingerprint, plan hash, prompts and seeds.
"""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from safetensors import SafetensorError
from safetensors.numpy import load, save

from vivace.engine.passes import apply_guidance
from vivace.engine.plan import Plan
from vivace.engine.planning import make_plan
from vivace.errors import ArgumentError, OutputError, ShapeError
from vivace.metrics.quality import Array, latent_drift, psnr, ssim

SOLVER, GRID, ORDER, EVALUATIONS = "unipc", "karras", 3, 200
BATCH = 16  # samples in flight
FORMAT = 1
TENSORS, DESCRIPTION = "latents.safetensors", "reference.json"
Prompt = str | int | None


@dataclass(frozen=True)
class Reference:
    """Latents [n, ...] float32 and where they come from; sample i is picture 0 of (prompts[i], seeds[i])."""

    latents: npt.NDArray[Any]
    prompts: tuple[Prompt, ...]
    seeds: tuple[int, ...]
    plan: Plan
    fingerprint: str


@dataclass(frozen=True)
class Quality:
    """Distances of samples to a reference: PSNR in dB, SSIM (None where latents are no pictures of 11 pixels or more),
    relative drift; float64 [n] each."""

    psnr: Array
    ssim: Array | None
    drift: Array

    def mean(self) -> dict[str, float | None]:
        """Averages over samples; decibels are averaged as they are."""
        similarity = None if self.ssim is None else float(self.ssim.mean())
        return {"psnr": float(self.psnr.mean()), "ssim": similarity, "drift": float(self.drift.mean())}

    def to_dict(self) -> dict[str, Any]:
        """Averages under "mean", per-sample lists under "samples"; infinite decibels (equal latents) become None."""
        rows = {"psnr": self.psnr, "ssim": self.ssim, "drift": self.drift}
        samples = {k: None if v is None else [_finite(float(x)) for x in v] for k, v in rows.items()}
        return {"mean": {k: _finite(v) for k, v in self.mean().items()}, "samples": samples}


def converged(
    pipe: Any,
    prompts: Sequence[Prompt],
    seeds: Sequence[int] = (0,),
    *,
    guidance: float = 1.0,
    evaluations: int = EVALUATIONS,
    folder: str | os.PathLike[str] | None = None,
    plan: Plan | None = None,
) -> Reference:
    """The converged latents of every prompt with every seed, prompt-major; read from the cache when they are there.

    Args:
        pipe: from `vivace.load`. prompts, seeds: n = len(prompts) * len(seeds) samples.
        guidance: guidance scale; 1 is none. evaluations: see `reference_plan`.
        folder: of the cache; None: $XDG_CACHE_HOME/vivace/references, else ~/.cache/vivace/references.
        plan: used instead of that plan; guidance and evaluations then say nothing.
    Returns: float32 latents. Processes that ask at once compute the same; one result is kept.
    Raises: ArgumentError, OutputError, PlanError.
    """
    if not prompts or not seeds:
        raise ArgumentError("converged: no prompts or no seeds; give at least one of each")
    plan = plan or reference_plan(pipe.spec, guidance, evaluations)
    each = tuple(prompt for prompt in prompts for _ in seeds), tuple(seeds) * len(prompts)
    description = {
        "format": FORMAT, "model": pipe.spec.name, "fingerprint": pipe.spec.fingerprint, "plan": plan.hash,
        "nfe": plan.nfe, "prompts": list(each[0]), "seeds": list(each[1]),
    }  # fmt: skip
    place = (cache_folder() if folder is None else Path(folder)) / _key(description)
    latents = _read(place, description)
    if latents is None:
        latents = run(pipe.compile(plan, backend="eager"), *each)
        _write(place, description, latents)
    return Reference(latents, *each, plan, pipe.spec.fingerprint)


def reference_plan(spec: Any, guidance: float = 1.0, evaluations: int = EVALUATIONS) -> Plan:
    """UniPC of order 3 on Karras's grid with many evaluations, for a model's spec; guidance 1 is none.

    On the bundled model 200 evaluations are within 69-73 dB of 600; on uniform timesteps they would be at 52 dB, for
    the error sits in the last rows, where Karras's grid is dense.
    """
    plan = make_plan(spec.schedule, SOLVER, evaluations, prediction=spec.prediction, grid=GRID, order=ORDER)
    return plan if guidance == 1.0 else apply_guidance(plan, guidance)


def quality_of(session_or_latents: Any, reference: Reference, *, plan: Plan | None = None) -> Quality:
    """PSNR, SSIM and drift of each sample to the reference.

    Args:
        session_or_latents: a session, which is run for the reference's prompts and seeds, or latents [n, ...].
        plan: for a session, instead of its first plan.
    Raises: ShapeError; ArgumentError for a session of another model.
    """
    given = session_or_latents
    if hasattr(given, "begin"):
        fingerprint = given.denoiser.spec.fingerprint
        if fingerprint != reference.fingerprint:
            raise ArgumentError(
                f"quality_of: the session runs model {fingerprint[:12]}, the reference is of "
                f"{reference.fingerprint[:12]}; compute a reference of this model"
            )
        given = run(given, reference.prompts, reference.seeds, plan=plan)
    if tuple(given.shape) != reference.latents.shape:
        raise ShapeError(f"quality_of: latents {tuple(given.shape)}; the reference has {reference.latents.shape}")
    is_picture = reference.latents.ndim == 4 and min(reference.latents.shape[2:]) >= 11
    similarity = ssim(given, reference.latents) if is_picture else None
    return Quality(psnr(given, reference.latents), similarity, latent_drift(given, reference.latents))


def run(
    session: Any, prompts: Sequence[Prompt], seeds: Sequence[int], *, plan: Plan | None = None, batch: int = BATCH
) -> npt.NDArray[Any]:
    """Picture 0 of each (prompt, seed) through a session, `batch` at a time: latents float32 (or float64) [n, ...]."""
    from vivace.engine.request import Request  # needs torch; judging latents does not

    latents = []
    for first in range(0, len(prompts), batch):
        pairs = zip(prompts[first : first + batch], seeds[first : first + batch], strict=True)
        states = [session.begin(Request(prompt, plan, seed=seed)) for prompt, seed in pairs]
        try:
            while not states[0].done:
                session.step(states)
            latents += [session.finish(state).latents.cpu().numpy() for state in states]
        finally:
            for state in states:
                session.abort(state)
    return np.concatenate(latents)


def cache_folder() -> Path:
    """Where references are kept: $XDG_CACHE_HOME/vivace/references; without it, or when relative, under ~/.cache."""
    base = os.environ.get("XDG_CACHE_HOME", "")
    return (Path(base) if os.path.isabs(base) else Path.home() / ".cache") / "vivace" / "references"


def _key(description: dict[str, Any]) -> str:
    return sha256(json.dumps(description, sort_keys=True).encode()).hexdigest()[:32]


def _read(place: Path, description: dict[str, Any]) -> npt.NDArray[Any] | None:
    """Stored latents; None when there are none, or they are damaged or of something else (computed anew then)."""
    try:
        stored = json.loads((place / DESCRIPTION).read_text(encoding="utf-8"))
        data = (place / TENSORS).read_bytes()
        if stored != description | {"sha256": sha256(data).hexdigest()}:
            return None
        return np.asarray(load(data)["latents"])
    except (OSError, ValueError, KeyError, SafetensorError):
        return None


def _write(place: Path, description: dict[str, Any], latents: npt.NDArray[Any]) -> None:
    """Both files appear at once: a folder filled elsewhere takes the name. An entry that cannot be read gives way."""
    data = save({"latents": np.ascontiguousarray(latents)}, {"about": "converged same-noise latents"})
    full = description | {"sha256": sha256(data).hexdigest()}
    work = None
    try:
        place.parent.mkdir(parents=True, exist_ok=True)
        work = Path(tempfile.mkdtemp(prefix=".new-", dir=place.parent))
        (work / "entry").mkdir()
        (work / "entry" / TENSORS).write_bytes(data)
        (work / "entry" / DESCRIPTION).write_text(json.dumps(full, indent=1) + "\n", encoding="utf-8")
        if place.exists() and _read(place, description) is None:
            with suppress(FileNotFoundError):  # another process took it away
                place.rename(work / "old")
        try:
            (work / "entry").rename(place)
        except OSError:
            if _read(place, description) is None:  # otherwise another process was first, with the same latents
                raise
    except OSError as error:
        raise OutputError(
            f"{place}: cannot be written ({error}); set XDG_CACHE_HOME or pass folder= with a place that can"
        ) from error
    finally:
        if work is not None:
            shutil.rmtree(work, ignore_errors=True)


def _finite(x: float | None) -> float | None:
    return x if x is not None and np.isfinite(x) else None
