"""GPTQ: round a weight column by column, each rounding's error made up by the columns still to come.

    H = X^T X + d I,  d = damping * mean diag(H)
    U = upper Cholesky factor of H^-1
    for each column j:  e = (w_j - fake(w_j)) / U_jj;  w_k -= e U_jk for k > j

Columns go by falling diag(H) (the most used first), or as they lie; later columns are updated a block at a time.
Source: Frantar et al. 2023, algorithm 1.
"""

from __future__ import annotations

import torch
from torch import Tensor

from vivace.errors import ArgumentError
from vivace.models.quantized.formats import codes

BLOCK = 128  # columns between two updates of the rest
DAMPING = 0.01  # of the mean diagonal; ten times as much whenever the factorization fails
ORDERS = ("activation", "natural")


def gptq_codes(
    weight: Tensor,
    scale: Tensor,
    rows: Tensor,
    *,
    format: str = "int8",
    damping: float = DAMPING,
    order: str = "activation",
) -> Tensor:
    """Codes [N, K], float32, of a weight [N, K] at given scales [N], for inputs like `rows` [R, K].

    A row of the weight whose output is not closer on `rows` than by nearest rounding keeps nearest rounding, so the
    result is never worse there.
    Raises: ArgumentError.
    """
    if order not in ORDERS:
        raise ArgumentError(f"gptq: order {order!r} is unknown; use {' or '.join(ORDERS)}")
    if not damping > 0.0:
        raise ArgumentError(f"gptq: damping {damping}; need a positive number")
    wide, inputs = weight.double(), rows.double()
    moment = inputs.T @ inputs
    nearest = codes(weight.float(), scale[:, None], format)
    used = moment.diagonal()
    if not bool((used > 0).any()):
        return nearest
    columns = used.argsort(descending=True, stable=True) if order == "activation" else torch.arange(len(used))
    columns = columns.to(weight.device)
    factor = _factor(moment[columns][:, columns], damping)
    rounded = torch.empty_like(nearest)
    rounded[:, columns] = _sweep(wide[:, columns], scale.double(), factor, format).float()
    better = output_error(wide, rounded, scale, moment) < output_error(wide, nearest, scale, moment)
    return torch.where(better[:, None], rounded, nearest)


def output_error(weight: Tensor, codes: Tensor, scale: Tensor, moment: Tensor) -> Tensor:
    """|X (w_n - scale_n q_n)|^2 of every row n of the weight, from moment = X^T X: float64 [N]."""
    off = weight.double() - codes.double() * scale.double()[:, None]
    return torch.einsum("nk,nk->n", off @ moment, off)


def _factor(moment: Tensor, damping: float) -> Tensor:
    """Upper Cholesky factor of the inverse of the damped moment."""
    identity = torch.eye(len(moment), dtype=moment.dtype, device=moment.device)
    mean = moment.diagonal().mean()
    while True:
        lower, failed = torch.linalg.cholesky_ex(moment + damping * mean * identity)
        if not int(failed):
            upper, failed = torch.linalg.cholesky_ex(torch.cholesky_inverse(lower), upper=True)
        if not int(failed):
            found: Tensor = upper
            return found
        damping *= 10.0


def _sweep(weight: Tensor, scale: Tensor, factor: Tensor, format: str) -> Tensor:
    """The codes, columns in the order of `factor`."""
    rest, out = weight.clone(), torch.empty_like(weight)
    for first in range(0, weight.shape[1], BLOCK):
        last = min(first + BLOCK, weight.shape[1])
        errors = torch.empty(len(weight), last - first, dtype=weight.dtype, device=weight.device)
        for j in range(first, last):
            code = codes(rest[:, j], scale, format).to(weight.dtype)
            out[:, j] = code
            error = (rest[:, j] - code * scale) / factor[j, j]
            rest[:, j + 1 : last] -= torch.outer(error, factor[j, j + 1 : last])
            errors[:, j - first] = error
        rest[:, last:] -= errors @ factor[first:last, last:]
    return out
