"""`adaln_modulate`: residual, norm and modulation between two parts of a DiT block against torch and copies.

Floor: hidden and update read, both results written once, at copy bandwidth; torch moves eleven tensors instead of four.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from vivace.bench.harness import Claim
from vivace.bench.kernels import gated_residual as residual
from vivace.bench.kernels import norm_modulate as norm
from vivace.bench.kernels.rows import Peer, hidden_and_vectors
from vivace.bench.kernels.rows import rows as peer_rows
from vivace.kernels.adaln_modulate import SPEC

CLAIMS: dict[str, Callable[[bool], tuple[list[dict[str, Any]], Claim]]] = {}


def eager(hidden: Tensor, update: Tensor, gate: Tensor, scale: Tensor, shift: Tensor) -> tuple[Tensor, Tensor]:
    """As blocks write it: five passes."""
    h = residual.eager(hidden, update, gate)
    return h, norm.eager(h, scale, shift)


def in_place(
    hidden: Tensor, update: Tensor, gate: Tensor, scale: Tensor, shift: Tensor, h: Tensor, out: Tensor
) -> tuple[Tensor, Tensor]:
    """Four passes over memory that is there."""
    residual.in_place(hidden, update, gate, h)
    return h, norm.in_place(h, scale, shift, out)


PEER = Peer(SPEC, ("hidden_out", "out"), lambda shape, dtype: hidden_and_vectors(shape, dtype, 2, 3), eager, in_place)


def rows(quick: bool) -> list[dict[str, Any]]:
    """Times of every implementation on the shapes of known models."""
    return peer_rows(PEER, quick)
