"""From a calibration table to quantized weights: migration, scales, rounding, which layers and rows stay high."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from vivace.engine.calibrate.draw import Progress
from vivace.engine.calibrate.table import CalibrationTable
from vivace.engine.denoiser import Denoiser
from vivace.errors import ArgumentError, ModelError
from vivace.models.quantized.calibrate import KIND, prompts_of, samples_of
from vivace.models.quantized.clip import AT_ONCE, clip_scale
from vivace.models.quantized.formats import codes, fake, most_of, stored, token_scale
from vivace.models.quantized.gptq import gptq_codes
from vivace.models.quantized.reach import block_linears, denoiser_of, network_of
from vivace.models.quantized.recipes import ACTIVATIONS, ROUNDINGS, Recipe
from vivace.models.quantized.sensitivity import HOW, Trial, advise, keep_high, measure, through, whole_error
from vivace.models.quantized.smooth import Migration, choose_migration
from vivace.models.quantized.weights import QuantizedLayer, QuantizedWeights

ASKED = "kept high as asked"
ELEMENTS = AT_ONCE >> 4  # of a group's rows on which a static scale is searched


@dataclass(frozen=True, eq=False)
class Made:
    """A layer, what was migrated, and the relative error of its output by timestep group [G]."""

    layer: QuantizedLayer
    migration: Migration
    local: Tensor


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
    kept: dict[str, str] = {**table.metadata["kept"], **_asked(table.metadata["layers"], high)}
    linears = _linears(network_of(denoiser), [name for name in table.metadata["layers"] if name not in kept])
    made: dict[str, Made] = {}
    for i, (name, linear) in enumerate(linears.items()):
        made[name] = _layer(table, name, linear, recipe, activations, rounding, format)
        if progress is not None:
            progress("layers", i + 1, len(linears))
    recipe = recipe if budget is None else replace(recipe, budget=budget)
    told = {"recipe": recipe.to_dict(), "calibration": table.hash, "format": format, "activations": activations}
    told |= {"rounding": rounding, "alpha": {name: one.migration.alpha for name, one in made.items()}}
    chosen: dict[str, str] = {}
    advice: dict[str, Any] = {}
    if made:
        chosen, advice, found = _decide(denoiser, table, made, linears, recipe, format, sensitivity, progress)
        told |= found
    return QuantizedWeights(
        format=format,
        fingerprint=table.fingerprint,
        layers={name: one.layer for name, one in made.items() if name not in chosen},
        edges=tuple(table.metadata["edges"]),
        kept=kept | chosen,
        advice=advice,
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
    chosen, whole = keep_high(found, recipe.budget), found.whole
    left = {name: layer for name, layer in layers.items() if name not in chosen}
    if chosen and left:
        whole = whole_error(denoiser, Trial(left, linears, format), samples, conditions, edges)
    errors: dict[str, Any] = {"predicted": found.predicted(list(left))}
    if left:
        errors |= {"measured": float(whole.square().mean().sqrt()), "by_group": whole.tolist()}
    advice = advise(whole.tolist(), edges, table.metadata["plan"]["timesteps"], recipe.multiple) if left else {}
    named = dict(zip(found.names, found.errors.tolist(), strict=True))
    return chosen, dict(advice), {"error": errors, "sensitivity": {"how": found.how, "layers": named}}


def _asked(names: Sequence[str], high: Sequence[str]) -> dict[str, str]:
    """Layers that the caller keeps high. Raises ArgumentError for a pattern that names none."""
    kept: dict[str, str] = {}
    for pattern in high:
        found = [name for name in names if fnmatchcase(name, pattern) or name.startswith(f"{pattern}.")]
        if not found:
            raise ArgumentError(f"quantize: high {pattern!r} names no layer; layers are {', '.join(names[:4])}, ...")
        kept |= dict.fromkeys(found, ASKED)
    return kept


def _linears(network: nn.Module, names: Sequence[str]) -> dict[str, nn.Linear]:
    """The layers of those names. Raises ModelError when the network has others."""
    known = block_linears(network)
    for name in names:
        if name not in known:
            raise ModelError(f"quantize: the model has no layer {name!r}, which its table names; calibrate it again")
    return {name: known[name] for name in names}


@torch.no_grad()
def _layer(
    table: CalibrationTable,
    name: str,
    linear: nn.Linear,
    recipe: Recipe,
    activations: str,
    rounding: str,
    format: str,
) -> Made:
    """One layer in 8 bits."""
    device = linear.weight.device
    maxima, rows, groups = (
        torch.from_numpy(table.arrays[f"{name}.{part}"]).to(device) for part in ("maxima", "rows", "rows_group")
    )
    rows, groups, weight = rows.float(), groups.long(), linear.weight.detach().float()
    static = partial(_static_scales, groups=groups, maxima=maxima, clip=recipe.clip, format=format)

    def quantized(x: Tensor, b: Tensor | None) -> Tensor:
        scale = token_scale(x, format) if activations == "token" else static(x, b=b)[groups][:, None]
        return fake(x, scale, format)

    migration = choose_migration(rows, maxima.amax(0), weight, quantized, alphas=recipe.alphas, format=format)
    moved, x = migration.of_weight(weight), migration.of_rows(rows)
    scale = clip_scale(moved, recipe.weights if format == "int8" else "max", format)
    given = gptq_codes(moved, scale, x, format=format) if rounding == "gptq" else codes(moved, scale[:, None], format)
    layer = QuantizedLayer(
        weight=stored(given, format).cpu().contiguous(),
        weight_scale=scale.cpu(),
        smooth=None if migration.smooth is None else migration.smooth.cpu(),
        x_scale=static(x, b=migration.b).cpu() if activations == "static" else None,
    )
    bias = None if linear.bias is None else linear.bias.detach().float()
    target = nn.functional.linear(rows, weight, bias)
    local = torch.empty(len(maxima))
    for g in range(len(maxima)):
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
