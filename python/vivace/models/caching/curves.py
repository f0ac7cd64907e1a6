"""How what the sites of a network give changes along a run: error curves, forecasts, magnitudes, TeaCache's fit.

Means are over blocks, branches and pictures; evaluation i is the one that computed, i + k the one that reads.

    error(i, k)       |F_i - F_{i+k}|_1 / |F_i|_1
    forecast(i, o, k) |P_o(i + k) - F_{i+k}|^2 / |F_{i+k}|^2, P_o through F_i, F_{i-N}, ... with N = k + 1
    change(i, a, b)   <F_{i-a} - F_i, F_{i-b} - F_i> / |F_i|^2: sum_ab w_a w_b change(i, a, b) is the squared relative
                      error at i of any forecast with weights w on values of ages a, which add up to 1
    magnitude(i)      mean over tokens of |R_i| / |R_{i-1}|, R: the trunk's residual
    noise(i)          |G_i - F_i|^2 / |F_i|^2, G_i: of the same evaluation, of the same latent, computed in 8 bits

Source: Liu et al. 2024 (SmoothCache), section 3; Ma et al. 2025 (MagCache), eq. 6; Liu et al. 2024 (TeaCache), eq. 7.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import takewhile
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from vivace.engine.denoiser import Denoiser
from vivace.engine.forecast import forecast_weights
from vivace.models.caching.tape import TRUNK, Place, Tape

ORDERS = 3  # of forecasts measured: 0, 1, 2
CHANGES = 16  # oldest values whose changes are measured
DEGREE = 4  # of TeaCache's polynomial
METRIC = "modulated_input"


@dataclass(eq=False)
class Curves:
    """Sums over chunks of pictures. lags: most evaluations between computing and reading."""

    evaluations: int
    lags: int
    sums: dict[str, NDArray[np.float64]] = field(default_factory=dict)
    counts: dict[str, NDArray[np.float64]] = field(default_factory=dict)
    changes: list[tuple[int, float, float]] = field(default_factory=list)
    _last: tuple[Tensor, Tensor, tuple[str, ...]] | None = None

    def add(self, name: str, at: tuple[int, ...], shape: tuple[int, ...], values: Tensor) -> None:
        """Add values to the mean of a place of an array."""
        if name not in self.sums:
            self.sums[name], self.counts[name] = np.zeros(shape), np.zeros(shape)
        self.sums[name][at] += float(values.double().sum())
        self.counts[name][at] += values.numel()

    def see(self, tapes: Sequence[Tape | None], groups: Sequence[tuple[Place, ...]]) -> None:
        """Take up the last evaluation of `tapes`, whose numbers are those of the evaluations; None: of another kind."""
        now, count = tapes[-1], len(tapes) - 1
        assert now is not None
        for places in groups:
            for place in places:
                for branch in now.variant.branches:
                    past = [None if tape is None else tape.values(places, place, branch) for tape in tapes]
                    self._errors(place[0], past, count)
                    self._changes(place[0], past, count)

    def _errors(self, site: str, values: Sequence[Tensor | None], last: int) -> None:
        shape = self.evaluations, self.lags
        now = values[-1]
        assert now is not None
        size = now.square().sum(1).clamp_min(1e-30)
        for lag in range(1, min(self.lags, last) + 1):
            then = values[last - lag]
            if then is None:
                continue
            error = (then - now).abs().sum(1) / then.abs().sum(1).clamp_min(1e-30)
            self.add(f"error/{site}", (last - lag, lag - 1), shape, error)
            nodes = [values[i] if i >= 0 else None for i in (last - lag - o * (lag + 1) for o in range(ORDERS))]
            for order in range(ORDERS):
                read = nodes[: order + 1]
                if any(value is None for value in read):
                    break
                weights = forecast_weights(order, lag, lag + 1)
                guess = sum(w * value for w, value in zip(weights, read, strict=True) if value is not None)
                off = (torch.as_tensor(guess) - now).square().sum(1) / size
                self.add(f"forecast/{site}", (last - lag, order, lag - 1), (shape[0], ORDERS, shape[1]), off)

    def _changes(self, site: str, values: Sequence[Tensor | None], last: int) -> None:
        now, name = values[-1], f"change/{site}"
        assert now is not None
        known = list(takewhile(lambda value: value is not None, reversed(values[:-1])))[:CHANGES]
        if name not in self.sums:
            most = max(1, min(CHANGES, self.evaluations - 1))
            self.sums[name], self.counts[name] = (np.zeros((self.evaluations, most, most)) for _ in range(2))
        if known:
            apart = torch.stack([then - now for then in known if then is not None], 1)  # [n, ages, elements]
            products = apart @ apart.mT / now.square().sum(1).clamp_min(1e-30)[:, None, None]
            at = last, slice(len(known)), slice(len(known))
            self.sums[name][at] += products.double().sum(0).numpy()
            self.counts[name][at] += len(now)

    def noise(self, number: int, plain: Tape, low: Tape, groups: Sequence[tuple[Place, ...]]) -> None:
        """What 8 bits add to an evaluation: `low` is `plain` computed in them."""
        for places in groups:
            for place in places:
                for branch in plain.variant.branches:
                    own = plain.values(places, place, branch)
                    off = (low.values(places, place, branch) - own).square().sum(1)
                    added = off / own.square().sum(1).clamp_min(1e-30)
                    self.add(f"noise_variance/{place[0]}", (number,), (self.evaluations,), added)

    def trunk(self, number: int, before: Tape | None, now: Tape, places: tuple[Place, ...]) -> None:
        """Magnitudes of the trunk's residual."""
        for branch in now.variant.branches if before is not None and places else ():
            assert before is not None
            a, b = (_tokens(tape, places, branch) for tape in (before, now))
            ratio = b.norm(dim=-1) / a.norm(dim=-1).clamp_min(1e-30)
            self.add("magnitude_ratio", (number,), (self.evaluations,), ratio.flatten(1).mean(1))

    def inputs(self, denoiser: Denoiser, number: int, tape: Tape) -> None:
        """The change of the modulated input since the evaluation before, and that of the prediction."""
        if METRIC not in denoiser.metrics:
            return
        seen = denoiser.look(tape.x, tape.timesteps, tape.conditions, tape.variant, METRIC, (0,)).signal
        outs, last = torch.stack(tape.outs), self._last
        if last is not None and number and last[2] == tape.variant.branches:
            pairs = [_rel1(last[0], seen), _rel1(last[1], outs)]
            self.changes += [(number, float(a), float(b)) for a, b in zip(*pairs, strict=True)]
        self._last = seen.clone(), outs, tape.variant.branches

    def arrays(self) -> dict[str, NDArray[Any]]:
        """The means by name, float32, NaN where nothing was measured; see the head of this file."""
        with np.errstate(invalid="ignore"):
            found = {name: (self.sums[name] / self.counts[name]).astype(np.float32) for name in self.sums}
        if "magnitude_ratio" in found:
            found["magnitude_ratio"] = np.nan_to_num(found["magnitude_ratio"], nan=1.0)
        if self.changes:
            number, given, got = np.array(self.changes).T
            found["teacache/change"] = np.stack([number, given, got]).astype(np.float64)
            degree = min(DEGREE, len(set(number)) - 1)
            fitted = np.polyfit(given, got, degree) if degree > 0 else np.array([got.mean()])
            found["teacache/coefficients"] = np.concatenate([np.zeros(DEGREE - max(degree, 0)), fitted])
        return found


def _tokens(tape: Tape, places: tuple[Place, ...], branch: str) -> Tensor:
    """The residual of the image's stream [n, ..., width]."""
    kept = tape.kept[places]
    cell = next(cell for cell in kept.plan.planes if cell.site == TRUNK and cell.branch == branch)
    slab, lanes = kept.places[cell, 0]
    return slab.values[list(lanes), 0].float()


def _rel1(before: Tensor, now: Tensor) -> Tensor:
    """mean|now - before| / mean|before| of every picture over branches and elements: [branches, n, ...] -> [n]."""
    a, b = (t.float().transpose(0, 1).flatten(1) for t in (before, now))
    return (b - a).abs().mean(1) / a.abs().mean(1).clamp_min(1e-30)
