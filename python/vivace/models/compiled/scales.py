"""Activation scales of a quantized DiT by timestep group."""

from __future__ import annotations

import torch
from torch import Tensor

from vivace.models.compiled.precisions import SITES, Kinds, layer_in
from vivace.models.quantized.weights import QuantizedWeights


def scale_table(quantized: QuantizedWeights | None, kinds: Kinds) -> Tensor | None:
    """table[g, i, s] = scale of the input of linear s of block i in timestep group g, 0 where tokens have their own.

    Returns: float32 [G, L, 4] on the CPU; None where every token of every linear has its own.
    """
    if quantized is None:
        return None
    table = torch.zeros(quantized.groups, len(kinds), len(SITES))
    found = False
    for block, kind in enumerate(kinds):
        for place, part in enumerate(SITES):
            layer = layer_in(quantized, block, part, kind[place // 2])
            if layer is not None and layer.x_scale is not None:
                table[:, block, place] = layer.x_scale
                found = True
    return table if found else None
