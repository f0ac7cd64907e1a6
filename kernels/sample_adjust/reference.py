"""The definition of `sample_adjust`: torch.quantile and torch.std, one sample at a time, float32 or float64."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from vivace.kernels.solver_step import table as t
from vivace.kernels.solver_step.reference import combine
from vivace.kernels.solver_step.table import StepTable

TORCH_LIMIT = 16_000_000  # elements torch.quantile takes at most


def sample_adjust(
    pool: Tensor,
    outs: Sequence[Tensor],
    table: StepTable,
    rows: Tensor,
    index: Tensor,
    *,
    tensors: Sequence[Tensor] = (),
    seeds: Tensor | None = None,
    pictures: Tensor | None = None,
) -> Tensor:
    """(-s, s, 1/s), s = min(max(quantile(|y_0|, ratio), 1), max), or (-inf, inf, phi std(y_1) / std(y_0) + 1 - phi)."""
    adjust = []
    for b, (r, lane) in enumerate(zip(rows.tolist(), index.tolist(), strict=True)):
        ints, floats = table.ints[r].tolist(), table.floats[r].tolist()
        one, here = torch.tensor([b]), torch.tensor([lane], device=pool.device)
        y = [part[0] for part in combine(pool, outs, tensors, seeds, pictures, ints, floats, one, here)]
        low, high = floats[t.LOW_AT], floats[t.HIGH_AT]
        if ints[t.KIND_AT] == t.THRESHOLD:
            s = quantile(y[0].abs().flatten(), low).clamp(1.0, high)
            adjust.append(torch.stack((-s, s, 1.0 / s)))
        else:
            gain = low * (deviation(y[1]) / deviation(y[0])) + (1.0 - low)
            adjust.append(torch.stack((gain.new_tensor(-math.inf), gain.new_tensor(math.inf), gain)).to(pool.dtype))
    return torch.stack(adjust)


def quantile(values: Tensor, ratio: float) -> Tensor:
    """torch.quantile(values [n], ratio), of any n; ranks above 2^24 are taken in float64."""
    n = values.numel()
    if n <= TORCH_LIMIT:
        return torch.quantile(values, ratio)
    if bool(values.isnan().any()):
        return values.new_tensor(math.nan)
    rank = torch.tensor(ratio, dtype=values.dtype if n <= 1 << 24 else torch.float64) * (n - 1)
    lower, upper = int(rank.floor()), int(rank.ceil())
    ordered = values.sort().values
    return torch.lerp(ordered[lower], ordered[upper], (rank - lower).to(values))


def deviation(values: Tensor) -> Tensor:
    """torch.std in float64; NaN for one element, without the warning."""
    return values.double().std() if values.numel() > 1 else values.new_tensor(math.nan, dtype=torch.float64)
