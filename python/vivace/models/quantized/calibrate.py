"""`vivace calibrate --quantization`: what the linears of a denoiser read along the plan it will run, as a table."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from vivace import __version__
from vivace.engine.calibrate.draw import (
    Progress,
    Sample,
    collect,
    evaluations_of,
    full_precision,
    group_edges,
    group_of,
    points_of,
)
from vivace.engine.calibrate.packing import pack, unpack
from vivace.engine.calibrate.table import CalibrationTable
from vivace.engine.noise import philox_words
from vivace.engine.plan import Plan
from vivace.engine.plan_codec import decode
from vivace.engine.plan_io import canonical
from vivace.engine.verify import verify
from vivace.errors import ArgumentError
from vivace.models.quantized.collect import ROWS, Recorder, collect_inputs
from vivace.models.quantized.reach import block_linears, denoiser_of, network_of, other_linears
from vivace.models.quantized.recipes import DEFAULT, Recipe, recipe_of

KIND = "quantization"
VECTOR = "reads one vector a sample, not tokens: modulation of its block"
IDLE = "no calibration sample reached it"
PROMPTS_DRAW = 0x70726D70  # counter word of the classes that are drawn where no prompts are given
SMALL, LARGE = 1e-2, 3e4  # largest numbers between which rows are kept as float16


def calibrate_quantization(
    pipe: Any,
    plan: Plan,
    *,
    recipe: str | Recipe = DEFAULT,
    samples: int | None = None,
    groups: int | None = None,
    seed: int = 0,
    prompts: Sequence[Any] | None = None,
    rows: int = ROWS,
    progress: Progress | None = None,
) -> CalibrationTable:
    """A table of kind "quantization": channel maxima and sampled rows of every linear, by timestep group.

    The states are those of full-precision runs of `plan`, so give the plan that will be deployed: its solver, steps and
    guidance. Load the model in float32.

    Args:
        pipe: from `vivace.load`.
        recipe: a name of `RECIPES` or a `Recipe`; samples, groups: in place of its counts.
        seed: of the law and of the trajectories' noise. The same seed gives the same table.
        prompts: of the pictures, in turn; None: classes drawn by the seed, for a class-conditional model.
        rows: inputs kept of every layer, over all groups; fewer where that would take more than 256 MiB.
        progress: called with (what, done, in all).
    Raises: ArgumentError, PlanError, PromptError, UnsupportedError.
    """
    chosen = recipe_of(recipe)
    samples = chosen.samples if samples is None else samples
    groups = chosen.groups if groups is None else groups
    for name, value in (("samples", samples), ("groups", groups), ("rows", rows)):
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise ArgumentError(f"calibrate: {name} is {value!r}; a positive integer is needed")
    network_of(denoiser_of(pipe))
    if pipe.quantized is not None:
        raise ArgumentError("calibrate: the model was loaded with quantized weights; load it without, in float32")
    session = pipe.compile(full_precision(plan), backend="eager")
    bound, denoiser = session.plans[0], session.denoiser
    timesteps = [step.timestep for _, step, _ in evaluations_of(bound)]
    edges = group_edges(timesteps, groups)
    points = points_of(bound, chosen.law, samples, edges, seed=seed, per_picture=chosen.per_picture)
    asked = default_prompts(pipe, max(p.picture for p in points) + 1, seed) if prompts is None else list(prompts)
    if not asked:
        raise ArgumentError("calibrate: the list of prompts is empty; give one prompt or more")
    found = collect(session, bound, points, asked, seed=seed, progress=progress)
    conditions = [denoiser.encode(prompt) for prompt in asked]
    recorder = collect_inputs(denoiser, found, conditions, edges, seed=seed, rows=rows, progress=progress)
    arrays, layers, kept = _measured(network_of(denoiser), recorder)
    arrays |= _states(found, edges) | {f"plan.{key}": np.asarray(array) for key, array in bound.arrays.items()}
    metadata = {
        "model": pipe.spec.name,
        "recipe": chosen.to_dict(),
        "plan": _told(bound, timesteps) | {"hash": plan.hash},
        "schedule": None if pipe.spec.schedule is None else pipe.spec.schedule.describe().to_dict(),
        "prompts": pack(asked, "prompts", arrays),
        "seed": seed,
        "edges": list(edges),
        "branches": [list(sample.branches) for sample in found],
        "layers": layers,
        "kept": kept,
        "versions": {"vivace": __version__, "torch": str(torch.__version__), "numpy": np.__version__},
    }
    return CalibrationTable(KIND, pipe.spec.fingerprint, arrays, json.loads(json.dumps(metadata, allow_nan=False)))


def default_prompts(pipe: Any, count: int, seed: int) -> list[int]:
    """Classes drawn by the seed. Raises ArgumentError for a model whose prompts are texts."""
    model = getattr(pipe, "model", None)
    classes = getattr(model, "classes", None)
    if classes is None and pipe.spec.conditioning == "class":
        classes = int(network_of(denoiser_of(pipe)).config.num_embeds_ada_norm)
    if classes is None:
        raise ArgumentError(
            f"calibrate: prompts of {pipe.spec.name!r} are {pipe.spec.conditioning}; give some that are like those it "
            "will get (--prompts FILE, one a line)"
        )
    return [int(word) % int(classes) for word in philox_words(seed, PROMPTS_DRAW, 0, count)]


def samples_of(table: CalibrationTable) -> list[Sample]:
    """The states that a table holds."""
    arrays = table.arrays
    return [
        Sample(
            torch.from_numpy(arrays["samples.x"][i]),
            float(arrays["samples.timestep"][i]),
            int(arrays["samples.evaluation"][i]),
            int(arrays["samples.row"][i]),
            tuple(branches),
            int(arrays["samples.picture"][i]),
            int(arrays["samples.prompt"][i]),
            bool(arrays["samples.added"][i]),
        )
        for i, branches in enumerate(table.metadata["branches"])
    ]


def prompts_of(table: CalibrationTable) -> list[Any]:
    """The prompts that a table was made with."""
    found: list[Any] = unpack(table.metadata["prompts"], table.arrays)
    return found


def plan_of(table: CalibrationTable) -> Plan:
    """The plan that a table was made with, bound, without precisions. Raises PlanFileError."""
    plan = verify(decode(table.metadata["plan"]["data"]))
    object.__setattr__(plan, "arrays", {info.key: table.arrays[f"plan.{info.key}"] for info in plan.tensors})
    return plan


def _measured(network: Any, recorder: Recorder) -> tuple[dict[str, Any], list[str], dict[str, str]]:
    """Arrays of the layers that read tokens, their names, and why other layers are left out."""
    arrays: dict[str, Any] = {}
    layers, kept = [], other_linears(network)
    for name, layer in block_linears(network).items():
        seen = recorder.seen[name]
        if seen.vector or not all(seen.counts):
            kept[name] = VECTOR if seen.vector else IDLE
            continue
        layers.append(name)
        rows, groups = seen.rows()
        maxima = torch.stack([m for m in seen.maxima if m is not None])
        if not bool(maxima.isfinite().all()):
            raise ArgumentError(f"calibrate: inputs of {name} hold NaN or infinity; the model diverges under this plan")
        half = SMALL < float(maxima.max()) < LARGE
        arrays[f"{name}.maxima"] = maxima.numpy()
        arrays[f"{name}.counts"] = np.array(seen.counts, np.int64)
        arrays[f"{name}.rows"] = (rows.half() if half else rows).numpy()
        arrays[f"{name}.rows_group"] = groups.to(torch.int16).numpy()
        assert maxima.shape[1] == layer.in_features
    return arrays, layers, kept


def _states(samples: Sequence[Sample], edges: Sequence[float]) -> dict[str, Any]:
    """The samples as arrays: x beside the timestep that it was fed with."""
    columns: dict[str, tuple[list[Any], Any]] = {
        "timestep": ([s.timestep for s in samples], np.float64),
        "evaluation": ([s.evaluation for s in samples], np.int64),
        "row": ([s.row for s in samples], np.int64),
        "picture": ([s.picture for s in samples], np.int64),
        "prompt": ([s.prompt for s in samples], np.int64),
        "added": ([s.added for s in samples], np.bool_),
        "group": ([group_of(edges, s.timestep) for s in samples], np.int64),
    }
    arrays = {f"samples.{name}": np.array(values, kind) for name, (values, kind) in columns.items()}
    return arrays | {"samples.x": torch.stack([s.x for s in samples]).numpy()}


def _told(plan: Plan, timesteps: Sequence[float]) -> dict[str, Any]:
    """What a table says of its plan."""
    told: dict[str, Any] = {"data": json.loads(canonical(plan)), "timesteps": list(timesteps)}
    if plan.recipe is not None:
        arguments = plan.recipe.arguments.to_dict()
        told |= {name: arguments[name] for name in ("solver", "steps") if name in arguments}
        told["passes"] = [[name, args.to_dict()] for name, args in plan.recipe.passes]
    return told
