"""`gated_residual`: the gated sum of a DiT block against torch, torch.compile and copies.

Floor: hidden and update read and the result written once, at copy bandwidth; torch moves five tensors instead of three.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from vivace.bench.harness import Claim
from vivace.bench.kernels.rows import Peer, hidden_and_vectors
from vivace.bench.kernels.rows import rows as peer_rows
from vivace.kernels.gated_residual import SPEC

CLAIMS: dict[str, Callable[[bool], tuple[list[dict[str, Any]], Claim]]] = {}


def eager(hidden: Tensor, update: Tensor, gate: Tensor) -> Tensor:
    """As blocks write it: two passes."""
    return hidden + gate * update


def in_place(hidden: Tensor, update: Tensor, gate: Tensor, out: Tensor) -> Tensor:
    """One pass over memory that is there, the fused op that torch has for it."""
    return torch.addcmul(hidden, gate, update, out=out)


PEER = Peer(SPEC, ("out",), lambda shape, dtype: hidden_and_vectors(shape, dtype, 2, 1), eager, in_place)


def rows(quick: bool) -> list[dict[str, Any]]:
    """Times of every implementation on the shapes of known models."""
    return peer_rows(PEER, quick)
