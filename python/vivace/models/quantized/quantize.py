"""From a calibration table to quantized weights: migration, scales, rounding, which layers and rows stay high."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from vivace.engine.calibrate.draw import Progress
from vivace.engine.calibrate.table import CalibrationTable
from vivace.engine.denoiser import Denoiser
from vivace.errors import ArgumentError, ModelError
from vivace.models.quantized.calibrate import KIND, plan_of, prompts_of, samples_of
from vivace.models.quantized.clip import AT_ONCE, clip_scale
from vivace.models.quantized.effects import advise, effects, of_rows
from vivace.models.quantized.formats import codes, fake, most_of, stored, token_scale
from vivace.models.quantized.gptq import gptq_codes
from vivace.models.quantized.reach import asked, block_linears, denoiser_of, network_of
from vivace.models.quantized.recipes import ACTIVATIONS, ROUNDINGS, Recipe
from vivace.models.quantized.sensitivity import HOW, Trial, keep_high, measure, through, whole_error
from vivace.models.quantized.smooth import Migration, choose_migration
from vivace.models.quantized.weights import QuantizedLayer, QuantizedWeights

ELEMENTS = AT_ONCE >> 4  # of a group's rows on which a static scale is searched


@dataclass(frozen=True, eq=False)
class Made:
    """A layer, what was migrated, and the relative error of its output by timestep group [G]."""

    layer: QuantizedLayer
    migration: Migration
    local: Tensor


@dataclass(frozen=True, eq=False)
class Inputs:
    """What layers read: rows float32 [R, K], the timestep group of each, int64 [R], of `count` groups."""

    rows: Tensor
    groups: Tensor
    count: int


def quantize_layers(
    pipe: Any,
    table: CalibrationTable,
    *,
    activations: str | None = None,
    rounding: str | None = None,
    high: Sequence[str] = (),
    format: str = "int8",
    budget: float | None = None,
    sensitivity: str = "auto",
    advice: bool = True,
    progress: Progress | None = None,
) -> QuantizedWeights:
    """Quantized weights of a model from its table.

    Args:
        pipe: from `vivace.load`, the model that was calibrated.
        activations: "token": every token's own scale; "static": one a layer and timestep group. None: the recipe's.
        rounding: "nearest" | "gptq", None: the recipe's.
        high: names or patterns ("blocks.0.*") of layers that stay high.
        format: "int8" | "fp8".
        budget: relative error of the prediction, in place of the recipe's.
        sensitivity: "network" | "local" | "auto", by the work it takes; see `sensitivity`.
        advice: measure which evaluations should run high, by a run of the plan for every timestep group; see `effects`.
        progress: called with (what, done, in all).
    Raises: ModelError (the table of another model), ArgumentError.
    """
    recipe = Recipe.from_dict(table.metadata["recipe"])
    activations, rounding = activations or recipe.activations, rounding or recipe.rounding
    for name, value, known in (
        ("activations", activations, ACTIVATIONS),
        ("rounding", rounding, ROUNDINGS),
        ("sensitivity", sensitivity, HOW),
    ):
        if value not in known:
            raise ArgumentError(f"quantize: {name} {value!r} is unknown; use {' or '.join(known)}")
    most_of(format)
    table.check(KIND, pipe.spec.fingerprint)
    denoiser = denoiser_of(pipe)
    kept: dict[str, str] = {**table.metadata["kept"], **asked(table.metadata["layers"], high)}
    linears = _linears(network_of(denoiser), [name for name in table.metadata["layers"] if name not in kept])
    made: dict[str, Made] = {}
    for names in _of_one_input(table, list(linears)):
        made |= _layers(table, {name: linears[name] for name in names}, recipe, activations, rounding, format)
        if progress is not None:
            progress("layers", len(made), len(linears))
    recipe = recipe if budget is None else replace(recipe, budget=budget)
    recipe = recipe if advice else replace(recipe, multiple=None)
    told = {"recipe": recipe.to_dict(), "calibration": table.hash, "format": format, "activations": activations}
    told |= {"rounding": rounding, "alpha": {name: one.migration.alpha for name, one in made.items()}}
    chosen: dict[str, str] = {}
    advised: dict[str, Any] = {}
    if made:
        chosen, advised, found = _decide(denoiser, table, made, linears, recipe, format, sensitivity, progress)
        told |= found
    return QuantizedWeights(
        format=format,
        fingerprint=table.fingerprint,
        layers={name: one.layer for name, one in made.items() if name not in chosen},
        edges=tuple(table.metadata["edges"]),
        kept=kept | chosen,
        advice=advised,
        source=told,
    )


def _decide(
    denoiser: Denoiser,
    table: CalibrationTable,
    made: Mapping[str, Made],
    linears: Mapping[str, nn.Linear],
    recipe: Recipe,
    format: str,
    how: str,
    progress: Progress | None,
) -> tuple[dict[str, str], dict[str, Any], dict[str, Any]]:
    """Layers that stay high and why, advice for plans, and the errors that decided both."""
    edges, samples = table.metadata["edges"], samples_of(table)
    conditions = [denoiser.encode(prompt) for prompt in prompts_of(table)]
    layers = {name: one.layer for name, one in made.items()}
    local = torch.stack([one.local for one in made.values()])
    trial = Trial(layers, linears, format)
    found = measure(denoiser, trial, samples, conditions, edges, local, how=how, progress=progress)
    chosen, whole, advice = keep_high(found, recipe.budget), found.whole, {}
    left = {name: layer for name, layer in layers.items() if name not in chosen}
    named = dict(zip(found.names, found.errors.tolist(), strict=True))
    told: dict[str, Any] = {"sensitivity": {"how": found.how, "layers": named}}
    if left:
        trial = Trial(left, linears, format)
        if chosen:
            whole = whole_error(denoiser, trial, samples, conditions, edges)
        effect = [0.0] * (len(edges) + 1)
        if recipe.multiple is not None:
            on = denoiser, trial, plan_of(table), prompts_of(table), edges
            effect = effects(*on, seed=int(table.metadata["seed"]), progress=progress).tolist()
            told["effect_by_group"] = effect
        advice = advise(of_rows(effect, edges, table.metadata["plan"]["timesteps"]), recipe.multiple)
        told["error"] = {"predicted": found.predicted(list(left)), "measured": float(whole.square().mean().sqrt())}
        told["error"] |= {"by_group": whole.tolist()}
    return chosen, dict(advice), told


def _linears(network: nn.Module, names: Sequence[str]) -> dict[str, nn.Linear]:
    """The layers of those names. Raises ModelError when the network has others."""
    known = block_linears(network)
    for name in names:
        if name not in known:
            raise ModelError(f"quantize: the model has no layer {name!r}, which its table names; calibrate it again")
    return {name: known[name] for name in names}


def _of_one_input(table: CalibrationTable, names: Sequence[str]) -> list[list[str]]:
    """Neighbours that read the same numbers, as query, key and value do: the channels' maxima are equal to the bit."""
    together: list[list[str]] = []
    for name in names:
        maxima = table.arrays[f"{name}.maxima"]
        if together and np.array_equal(maxima, table.arrays[f"{together[-1][0]}.maxima"]):
            together[-1].append(name)
        else:
            together.append([name])
    return together


@torch.no_grad()
def _layers(
    table: CalibrationTable,
    linears: Mapping[str, nn.Linear],
    recipe: Recipe,
    activations: str,
    rounding: str,
    format: str,
) -> dict[str, Made]:
    """Layers of one input in 8 bits: with one migration and one scale of x, so that they can be one product."""
    name, linear = next(iter(linears.items()))
    device = linear.weight.device
    maxima, rows, groups = (
        torch.from_numpy(table.arrays[f"{name}.{part}"]).to(device) for part in ("maxima", "rows", "rows_group")
    )
    rows, groups = rows.float(), groups.long()
    static = partial(_static_scales, groups=groups, maxima=maxima, clip=recipe.clip, format=format)

    def quantized(x: Tensor, b: Tensor | None) -> Tensor:
        scale = token_scale(x, format) if activations == "token" else static(x, b=b)[groups][:, None]
        return fake(x, scale, format)

    weight = torch.cat([linear.weight.detach().float() for linear in linears.values()])
    migration = choose_migration(rows, maxima.amax(0), weight, quantized, alphas=recipe.alphas, format=format)
    x_scale = static(migration.of_rows(rows), b=migration.b).cpu() if activations == "static" else None
    seen = Inputs(rows, groups, len(maxima))
    return {
        name: _layer(linear, migration, x_scale, seen, recipe, rounding, format) for name, linear in linears.items()
    }


def _layer(
    linear: nn.Linear,
    migration: Migration,
    x_scale: Tensor | None,
    seen: Inputs,
    recipe: Recipe,
    rounding: str,
    format: str,
) -> Made:
    """One layer in 8 bits."""
    rows, groups, weight = seen.rows, seen.groups, linear.weight.detach().float()
    moved, x = migration.of_weight(weight), migration.of_rows(rows)
    scale = clip_scale(moved, recipe.weights if format == "int8" else "max", format)
    given = gptq_codes(moved, scale, x, format=format) if rounding == "gptq" else codes(moved, scale[:, None], format)
    layer = QuantizedLayer(
        weight=stored(given, format).cpu().contiguous(),
        weight_scale=scale.cpu(),
        smooth=None if migration.smooth is None else migration.smooth.cpu(),
        x_scale=x_scale,
    )
    bias = None if linear.bias is None else linear.bias.detach().float()
    target = nn.functional.linear(rows, weight, bias)
    local = torch.empty(seen.count)
    for g in range(seen.count):
        here = groups == g
        off = through(layer, rows[here], format, g) @ (given * scale[:, None]).T - rows[here] @ weight.T
        local[g] = off.norm() / target[here].norm().clamp_min(1e-30)
    return Made(layer, migration, local)


def _static_scales(x: Tensor, *, b: Tensor | None, groups: Tensor, maxima: Tensor, clip: str, format: str) -> Tensor:
    """A scale for every timestep group, float32 [G], from migrated rows x and the exact largest numbers of channels."""
    scales = []
    for g, largest in enumerate(maxima if b is None else maxima * (1.0 / b)):
        flat = x[groups == g].flatten()
        few, most = flat[:: max(1, flat.numel() // ELEMENTS)], largest.max()
        scales.append(clip_scale(torch.cat((few.clamp(-most, most), most[None]))[None], clip, format))
    return torch.cat(scales)
