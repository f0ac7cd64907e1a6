"""Inputs that `sample_adjust` is tested and timed on: both kinds, every kind of source, and awkward shapes."""

from __future__ import annotations

import math
from dataclasses import replace
from functools import partial
from typing import Any

from torch import Tensor

from vivace.kernels.philox_normal import NORMAL_TOLERANCE
from vivace.kernels.solver_step.cases import ALPHA, DTYPES, SIGMA, make, scattered, strided
from vivace.kernels.solver_step.table import NOISE, NONE, ONE, OUT, RESCALE, TENSOR, THRESHOLD, Reduction
from vivace.kernels.spec import Call, Case


def threshold_row(ratio: float = 0.995, limit: float = 100.0) -> Reduction:
    """Of x0 = (x - sigma eps) / alpha."""
    return Reduction(THRESHOLD, [[(0, NONE, 1.0 / ALPHA), (OUT, NONE, -SIGMA / ALPHA)]], ratio, limit)


def rescale_row(scale: float = 7.5, phi: float = 0.7) -> Reduction:
    """Of guidance g = uncond + scale * (cond - uncond), towards the deviation of cond."""
    return Reduction(RESCALE, [[(OUT, NONE, scale), (OUT + 1, NONE, 1.0 - scale)], [(OUT, NONE, 1.0)]], phi)


def scaled_row() -> Reduction:
    """Side-car tensors, a mask of the request, a constant."""
    terms = [(0, 3, 0.7), (OUT, TENSOR, -0.5), (TENSOR + 1, NONE, 1.5), (ONE, NONE, 0.125)]
    return Reduction(THRESHOLD, [terms], 0.9, 1.75)


def noise_row() -> Reduction:
    """Two draws, one scaled; coefficients are small beside s >= 1."""
    return Reduction(THRESHOLD, [[(0, NONE, 2.0), (NOISE, NONE, 0.6), (NOISE + 5, 3, 0.07)]], 0.75, 100.0)


def fill_nan(pool: Tensor) -> None:
    """One NaN in x of every lane."""
    pool[0].flatten(1)[:, 3] = math.nan


def call(dtype: str, device: str, **arguments: Any) -> Call:
    """A call of `solver_step.cases.make` less what only writes."""
    made = make(dtype, device, **arguments)
    return replace(made, kwargs={name: value for name, value in made.kwargs.items() if name != "net"}, writes=())


def cases() -> tuple[Case, ...]:
    """All cases; the first is the one that a thresholded sampling loop runs."""

    def case(name: str, tolerance: float | None = None, **arguments: Any) -> Case:
        return Case(name, partial(call, **arguments), DTYPES, tolerance)

    threshold, rescale, noise = threshold_row(), rescale_row(), NORMAL_TOLERANCE
    mixed = (threshold, rescale, threshold_row(0.5, 1.25), rescale_row(1.0), threshold_row(1.0))
    return (
        case("threshold", table=(threshold,)),
        case("rescale", table=(rescale,), branches=2),
        case("mixed rows", table=mixed, rows=(3, 0, 4, 2, 1), index=(1, 4, 2, 0, 5), branches=2),
        case("scale tensors", table=(scaled_row(),), tensors=2),
        case("noise", noise, table=(noise_row(),)),
        case("NaN", table=(threshold, threshold_row(0.0)), rows=(0, 1), edit=fill_nan),
        case("size 1", table=(threshold, rescale), rows=(0, 1), shape=(1,), branches=2),
        case("size 123", table=(threshold, rescale), rows=(0, 1), shape=(123,), branches=2),
        case("size 4097", table=(threshold, rescale), rows=(0, 1), shape=(4097,), branches=2),
        case("empty batch", table=(threshold,), rows=(), index=()),
        case("empty sample", table=(rescale,), shape=(0, 3), branches=2),
        case("outs with a gap between samples", table=(rescale,), branches=2, layout=strided),
        case("outs not contiguous", table=(rescale,), branches=2, layout=scattered),
    )
