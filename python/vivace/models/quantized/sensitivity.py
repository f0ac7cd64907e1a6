"""How much the prediction moves when a layer runs in 8 bits, and which layers stay high for it.

    error(l, g) = rms over samples of group g of |prediction with only layer l in 8 bits - prediction| / |prediction|

"network" measures it with one evaluation of the samples a layer. "local", for large models, takes the relative error of
the layer's own output on its sampled rows instead, scaled in every group so that

    sum over l of error(l, g)^2 = whole(g)^2,   whole(g): all layers in 8 bits, measured

Errors of layers are taken as independent. Where they are not, the ratio of the measured whole to their root sum of
squares is kept as a factor.
Source: greedy choice by measured sensitivity as in Dong et al. 2019 (HAWQ), with errors in place of curvature.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from vivace.engine.calibrate.draw import Progress, Sample, group_of
from vivace.engine.denoiser import Denoiser
from vivace.models.quantized.collect import batches, evaluate
from vivace.models.quantized.formats import fake, token_scale
from vivace.models.quantized.reach import network_of, with_linears
from vivace.models.quantized.weights import QuantizedLayer

HOW = ("auto", "network", "local")
PER_GROUP = 2  # samples of a group that are evaluated
MOST_WORK = 2e13  # multiply-adds of the "network" form; beyond, "local" is taken


@dataclass(frozen=True, eq=False)
class Sensitivity:
    """Errors by layer and timestep group: errors [L, G]; whole [G], all layers together; how: "network" or "local"."""

    how: str
    names: tuple[str, ...]
    errors: Tensor
    whole: Tensor

    def predicted(self, names: Sequence[str]) -> float:
        """The whole error, rms over groups, when only these layers run in 8 bits."""
        rows = [self.names.index(name) for name in names]
        together = self.errors.square().sum(0).clamp_min(1e-30)
        factor = self.whole.square() / together
        return float((self.errors[rows].square().sum(0) * factor).mean().sqrt())


class Trial:
    """Layers of a network as they will compute in 8 bits, in float32 arithmetic; `group` is that of the samples."""

    def __init__(self, layers: Mapping[str, QuantizedLayer], linears: Mapping[str, nn.Linear], format: str) -> None:
        self.layers, self.linears, self.format, self.group = layers, linears, format, 0

    def stand(self, name: str) -> Callable[[Tensor], Tensor]:
        """A layer as a function of its input [..., K]."""
        layer, own = self.layers[name], self.linears[name]

        def run(x: Tensor) -> Tensor:
            weight = layer.weight.to(x.device).float() * layer.weight_scale.to(x.device)[:, None]
            bias = None if own.bias is None else own.bias.float()
            return nn.functional.linear(through(layer, x, self.format, self.group), weight, bias).to(x.dtype)

        return run


def through(layer: QuantizedLayer, x: Tensor, format: str, group: int) -> Tensor:
    """x smooth in 8 bits and back, float32, with the layer's scale of a group or each token's own."""
    wide = x.float() if layer.smooth is None else x.float() * layer.smooth.to(x.device)
    scale = token_scale(wide, format) if layer.x_scale is None else layer.x_scale[group].to(x.device)
    return fake(wide, scale, format)


def measure(
    denoiser: Denoiser,
    trial: Trial,
    samples: Sequence[Sample],
    conditions: Sequence[object],
    edges: Sequence[float],
    local: Tensor,
    *,
    how: str = "auto",
    progress: Progress | None = None,
) -> Sensitivity:
    """The sensitivity of every layer of `trial`.

    local: [L, G], relative errors of the layers' own outputs. how: "network", "local", or "auto", by the work it takes.
    """
    used = _few(samples, edges)
    names = tuple(trial.layers)
    targets = [evaluate(denoiser, batch, conditions) for batch in batches(used, edges)]

    def error(chosen: Sequence[str]) -> Tensor:
        run = with_linears(denoiser, {name: trial.stand(name) for name in chosen})
        return _errors(run, trial, used, conditions, edges, targets)

    whole = error(names)
    if how == "auto":
        rows = sum(len(sample.branches) for sample in used)
        how = "network" if len(names) * work_of(denoiser, rows) < MOST_WORK else "local"
    if how == "local":
        together = local.square().sum(0).sqrt().clamp_min(1e-30)
        return Sensitivity(how, names, local * (whole / together), whole)
    errors = []
    for i, name in enumerate(names):
        errors.append(error([name]))
        if progress is not None:
            progress("sensitivity", i + 1, len(names))
    return Sensitivity(how, names, torch.stack(errors), whole)


def work_of(denoiser: Denoiser, rows: int) -> float:
    """Multiply-adds of one evaluation of so many samples and branches, roughly: every weight for every token."""
    weights = sum(parameter.numel() for parameter in network_of(denoiser).parameters())
    return float(weights) * denoiser.spec.tokens() * rows


def whole_error(
    denoiser: Denoiser, trial: Trial, samples: Sequence[Sample], conditions: Sequence[object], edges: Sequence[float]
) -> Tensor:
    """whole(g) of all layers of `trial`, [G]."""
    used = _few(samples, edges)
    targets = [evaluate(denoiser, batch, conditions) for batch in batches(used, edges)]
    run = with_linears(denoiser, {name: trial.stand(name) for name in trial.layers})
    return _errors(run, trial, used, conditions, edges, targets)


def keep_high(sensitivity: Sensitivity, budget: float | None) -> dict[str, str]:
    """Layers that stay high, most sensitive first, until the whole error is predicted to be within the budget; why."""
    left, kept = list(sensitivity.names), {}
    while budget is not None and left and sensitivity.predicted(left) > budget:
        name = max(left, key=lambda name: sensitivity.predicted([name]))
        left.remove(name)
        kept[name] = (
            f"alone it moves the prediction by {sensitivity.predicted([name]):.2%}; without it {sensitivity.how} "
            f"sensitivities foretell {sensitivity.predicted(left):.2%} of a budget of {budget:.2%}"
        )
    return kept


def _few(samples: Sequence[Sample], edges: Sequence[float]) -> list[Sample]:
    """The first samples of every group."""
    found: dict[int, list[Sample]] = {}
    for sample in samples:
        found.setdefault(group_of(edges, sample.timestep), []).append(sample)
    return [sample for group in sorted(found) for sample in found[group][:PER_GROUP]]


def _errors(
    run: Denoiser,
    trial: Trial,
    samples: Sequence[Sample],
    conditions: Sequence[object],
    edges: Sequence[float],
    targets: Sequence[Tensor],
) -> Tensor:
    """Relative errors of predictions, rms over the samples and branches of each group: [G]."""
    squares: list[list[Tensor]] = [[] for _ in range(len(edges) + 1)]
    for batch, target in zip(batches(samples, edges), targets, strict=True):
        trial.group = group_of(edges, batch[0].timestep)
        off = (evaluate(run, batch, conditions) - target).flatten(2).square().sum(2)
        squares[trial.group].append((off / target.flatten(2).square().sum(2).clamp_min(1e-30)).flatten())
    return torch.stack([torch.cat(found).mean().sqrt() for found in squares])
