"""How much a row that gives old values again changes the final latent, to first order, for all rows and ages at once.

    effect(r, l, k) = <v_k, d x_end>     when evaluation r gives what evaluation r - l computed

v_k: random signs of the latent's size, so the mean of the squares over k is the squared change. Effects of rows add
up, and those of a forecast are the same sum of its values' effects: so whatever a schedule does, its change of the
latent is a sum of columns of this table, cancellations included. One backward pass through the run gives it: ops are
linear, and the network's part is its vector-Jacobian product in x.
Source: adjoint of the discrete run (reverse mode); random signs as in Hutchinson 1990.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

from vivace.engine.denoiser import Denoiser
from vivace.engine.noise import philox_words
from vivace.engine.plan import Affine, Coef, InputRef, Plan, Step, TensorRef
from vivace.errors import UnsupportedError
from vivace.models.caching.tape import Tape, pull_back

SIGNS_DRAW = 0x7369676E  # counter word of the signs: far from those that make pictures

Slopes = Sequence[Tensor]  # of an evaluation by age - 1: [branches, n, ...]


def effects_of(
    denoiser: Denoiser,
    plan: Plan,
    tapes: Sequence[Tape],
    slopes: Sequence[dict[str, Slopes]],
    pictures: Sequence[int],
    *,
    ages: int,
    probes: int,
    seed: int,
    done: Callable[[], None],
) -> dict[str, Tensor]:
    """effect by group of sites, float32 [evaluations, ages, probes, n]; NaN where there is no such evaluation.

    Args:
        tapes: of the evaluations in order, of which x, timesteps, conditions and variant are read; slopes: of each, by
            group; pictures: their numbers, which draw the signs; done: called after every evaluation.
    Raises: UnsupportedError for ops with coefficients that are tensors of the request, or depend on ages of tokens.
    """
    n, shape = len(pictures), tapes[0].x.shape[1:]
    found = {name: torch.full((len(tapes), ages, probes, n), torch.nan) for name in slopes[0]}
    device, number = tapes[0].x.device, len(tapes)
    signs = torch.stack([_signs(seed, picture, probes, shape.numel()) for picture in pictures], 1)
    against = {"x": signs.view(probes, n, *shape).to(device)}
    for step in reversed(plan.steps):
        _through_ops(plan, step, against)
        if step.variant is None:
            continue
        number -= 1
        tape, zero = tapes[number], torch.zeros((probes, n, *shape), device=device)
        outs = [against.pop(slot, zero) for slot in step.outs[: len(step.variant.branches)]]
        for name, by_age in slopes[number].items():
            for age, slope in enumerate(by_age):
                told = sum((a * s).flatten(2).sum(2) for a, s in zip(outs, slope, strict=True))
                found[name][number, age] = torch.as_tensor(told).cpu()
        own = step.x_scale * pull_back(denoiser, tape, outs)
        against[step.x] = against[step.x] + own if step.x in against else own
        done()
    return found


def _signs(seed: int, picture: int, probes: int, size: int) -> Tensor:
    """Random signs [probes, size] of a picture."""
    words = philox_words(seed, picture, SIGNS_DRAW, probes * size)
    return torch.from_numpy((words & 1).astype(np.float32) * 2 - 1).view(probes, size)


def _through_ops(plan: Plan, step: Step, against: dict[str, Tensor]) -> None:
    """Gradients in the slots before the ops of a row from those after it. A transform passes its gradient as it is."""
    for op in reversed(step.ops):
        if not isinstance(op, Affine):
            continue
        gradient = against.pop(op.dst, None)
        if gradient is None:
            continue
        for slot, coef in op.terms:
            if slot == "one" or slot.startswith(("noise:", "input:")):
                continue
            part = _number(plan, coef, gradient) * gradient
            against[slot] = against[slot] + part if slot in against else part


def _number(plan: Plan, coef: Coef, like: Tensor) -> float | Tensor:
    if isinstance(coef, TensorRef):
        return torch.as_tensor(np.asarray(plan.arrays[coef.key])).to(like)
    if isinstance(coef, InputRef) and coef.default is not None:
        return coef.default
    if isinstance(coef, float):
        return coef
    raise UnsupportedError(f"calibrate: an op of the plan reads {coef!r}; give the plan its numbers (default=...)")
