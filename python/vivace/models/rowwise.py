"""Layers whose rows keep their bits whatever the batch size and the number of threads.

Matrix libraries choose their kernel by the number of rows, and element-wise loops treat the end of every thread's
share apart. Both choices are taken away here: rows are padded to a multiple of `ROWS`, shares are cut at multiples of
`LANES` elements. The promise (not correctness) needs widths that are a multiple of 16.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

ROWS = 16  # observed on x86: float32 is stable from 12 rows on, float64 at multiples of 4
LANES = 64  # elements; a multiple of two vectors of any width and dtype
GRAIN = 32768  # elements; up to here torch uses one thread for SiLU


def linear(x: Tensor, layer: nn.Linear) -> Tensor:
    """x @ W^T + b on rows padded to a multiple of 16.

    Args:
        x: [..., K], dtype of the layer.
        layer: weight [M, K], bias [M] or none; a stand-in of one (of another class) is called instead.
    Returns: [..., M], contiguous; row i does not depend on the number of rows.
    """
    if type(layer) is not nn.Linear:
        stood: Tensor = layer(x)
        return stood
    rows = x.numel() // x.shape[-1]
    missing = -rows % ROWS
    if missing == 0:
        return F.linear(x, layer.weight, layer.bias)
    padded = F.pad(x.reshape(rows, x.shape[-1]), (0, 0, 0, missing))
    return F.linear(padded, layer.weight, layer.bias)[:rows].view(*x.shape[:-1], layer.out_features)


def gelu(x: Tensor, approximate: str) -> Tensor:
    """x * Phi(x), in place on a contiguous tensor; approximate "tanh" or "none" as in torch."""
    size = x.numel()
    rest = 0
    if x.device.type == "cpu" and not torch.compiler.is_compiling():
        rest = size % (LANES * torch.get_num_threads())
    if rest == 0:
        torch.ops.aten.gelu_(x, approximate=approximate)
        return x
    flat = x.view(-1)
    for part in (flat[: size - rest], flat[size - rest :]):  # equal shares for all threads, then one small share
        torch.ops.aten.gelu_(part, approximate=approximate)
    return x


def silu(x: Tensor) -> Tensor:
    """x * sigmoid(x), a new tensor of the shape of x."""
    size = x.numel()
    if x.device.type != "cpu" or torch.compiler.is_compiling() or size == 0:
        return F.silu(x)
    flat = F.pad(x.reshape(-1), (0, -size % LANES))
    for part in torch.split(flat, GRAIN):
        torch.ops.aten.silu_(part)
    return flat[:size].view(x.shape)
