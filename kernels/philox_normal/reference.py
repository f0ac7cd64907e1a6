"""The definition of `philox_normal`: numpy, one sample at a time."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from vivace.engine.noise import normals


def philox_normal(
    shape: Sequence[int], seeds: Tensor, pictures: Tensor, draw: int = 0, *, device: torch.device | str = "cpu"
) -> Tensor:
    """n[b] = normals(shape, seeds[b], picture=pictures[b], draw=draw)."""
    out = torch.empty(len(seeds), *shape)
    if math.prod(shape):
        for b, (seed, picture) in enumerate(zip(seeds.tolist(), pictures.tolist(), strict=True)):
            out[b] = torch.from_numpy(normals(tuple(shape), seed, picture=picture, draw=draw))
    return out.to(device)
