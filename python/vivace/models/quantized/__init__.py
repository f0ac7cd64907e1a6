"""Quantized weights of denoisers: the data, their file, the layers that run them, and how they are made."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from vivace.models.quantized.weights import QuantizedWeights

PLAIN = frozenset(("fp32", "bf16"))  # precisions that need no weights of their own


def honoured(weights: QuantizedWeights | None) -> frozenset[str]:
    """The precisions in which the blocks of a model run where a row names them, with these weights or without."""
    return PLAIN if weights is None else PLAIN | {weights.format}
