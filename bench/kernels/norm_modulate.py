"""`norm_modulate`: layer norm, scale and shift of a DiT block against torch, torch.compile and copies.

Floor: hidden read and the result written once, at copy bandwidth; torch moves them three times.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import layer_norm

from vivace.bench.harness import Claim
from vivace.bench.kernels.rows import Peer, hidden_and_vectors
from vivace.bench.kernels.rows import rows as peer_rows
from vivace.kernels.norm_modulate import SPEC

EPS = 1e-6
CLAIMS: dict[str, Callable[[bool], tuple[list[dict[str, Any]], Claim]]] = {}


def eager(hidden: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
    """As blocks write it: three passes."""
    return layer_norm(hidden, hidden.shape[-1:], eps=EPS) * (1 + scale) + shift


def in_place(hidden: Tensor, scale: Tensor, shift: Tensor, out: Tensor) -> Tensor:
    """Three passes, the last two over `out`; two numbers a row are allocated."""
    mean, gain = hidden.new_empty(2, *hidden.shape[:-1], 1)
    width = hidden.shape[-1:]
    torch.ops.aten.native_layer_norm.out(hidden, width, None, None, EPS, out0=out, out1=mean, out2=gain)
    return out.mul_(1 + scale).add_(shift)


PEER = Peer(SPEC, ("out",), lambda shape, dtype: hidden_and_vectors(shape, dtype, 1, 2), eager, in_place)


def rows(quick: bool) -> list[dict[str, Any]]:
    """Times of every implementation on the shapes of known models."""
    return peer_rows(PEER, quick)
