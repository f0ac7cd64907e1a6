"""Migration of outliers from activations to weights: x / b and W b, whose product is that of x and W.

    b_j = max |X_j|^alpha / max |W_j|^(1 - alpha),  1 where either is 0

max |X_j| over every token, sample and timestep group. `alpha` is chosen for each layer by the error of its output on
calibration rows, among none, 0.3, 0.5 and 0.8; migration must lower it clearly, since without it a row need not be
multiplied first.
Sources: Xiao et al. 2023 (SmoothQuant), eq. 4; alpha 0.3 is that of ViDiT-Q (Zhao et al. 2024), 0.8 that of TensorRT.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from vivace.models.quantized.formats import fake, scale_of

ALPHAS = (0.3, 0.5, 0.8)
CLEARLY = 0.98  # times the error without migration is what it must not exceed


@dataclass(frozen=True, eq=False)
class Migration:
    """What was chosen: alpha and b (None: nothing is migrated), and the relative error of the output by alpha."""

    alpha: float | None
    b: Tensor | None
    errors: dict[str, float]

    @property
    def smooth(self) -> Tensor | None:
        """1 / b: what x is multiplied by."""
        return None if self.b is None else 1.0 / self.b

    def of_weight(self, weight: Tensor) -> Tensor:
        """W b, float32 [N, K]."""
        return weight.float() if self.b is None else weight.float() * self.b

    def of_rows(self, x: Tensor) -> Tensor:
        """x / b, float32 [..., K], with the very factor that runs later."""
        return x.float() if self.b is None else x.float() * (1.0 / self.b)


def migration_factors(x_max: Tensor, weight: Tensor, alpha: float) -> Tensor:
    """b [K] from max |X_j| [K] and a weight [N, K]; see the head of this file."""
    w_max = weight.float().abs().amax(0)
    b = x_max.float().pow(alpha) / w_max.pow(1.0 - alpha)
    usable = (x_max > 0) & (w_max > 0) & b.isfinite() & (b > 0)
    return torch.where(usable, b, 1.0)


def choose_migration(
    rows: Tensor,
    x_max: Tensor,
    weight: Tensor,
    through: Callable[[Tensor, Tensor | None], Tensor],
    *,
    alphas: Sequence[float] = ALPHAS,
    format: str = "int8",
) -> Migration:
    """The migration of least output error on `rows` [R, K]; none of `alphas`: nothing is migrated.

    through: what becomes of migrated rows (the first argument; b is the second) in 8 bits, as they will be quantized.
    Weights are rounded to nearest with the scale of each row's largest number.
    """
    target = rows.float() @ weight.float().T
    size = float(target.norm()) or 1.0
    found: list[tuple[float, Migration]] = []
    errors: dict[str, Any] = {}
    for alpha in (None, *alphas):
        b = None if alpha is None else migration_factors(x_max, weight, alpha)
        trial = Migration(alpha, b, errors)
        moved = trial.of_weight(weight)
        rounded = fake(moved, scale_of(moved.abs().amax(1, keepdim=True), format), format)
        error = float((through(trial.of_rows(rows), b) @ rounded.T - target).norm()) / size
        errors["none" if alpha is None else f"{alpha:g}"] = error
        found.append((error if alpha is None else error / CLEARLY, trial))
    return min(found, key=lambda pair: pair[0])[1]
