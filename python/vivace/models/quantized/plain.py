"""Quantized weights without a calibration: linear layers of the blocks rounded to nearest, activations by token."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from vivace.models.quantized.formats import codes, most_of, scale_of, stored
from vivace.models.quantized.reach import asked, block_linears, denoiser_of, network_of
from vivace.models.quantized.weights import QuantizedLayer, QuantizedWeights

# Words in the path of layers that read one vector a sample.
VECTORS = {"norm", "mod", "modulation", "emb", "embed", "embedder", "embedding", "adaln"}
MODULATES = "modulates its block from one vector a sample, by its name"


def round_layers(pipe: Any, *, format: str = "int8", high: Sequence[str] = ()) -> QuantizedWeights:
    """weight_scale[n] = max |W[n]| / most; W / weight_scale rounded to nearest. Nothing is migrated or measured.

    Args:
        pipe: from `vivace.load`; format: "int8" | "fp8".
        high: names or patterns ("blocks.0.*") of layers that stay high.
    Raises: ArgumentError, UnsupportedError.
    """
    most_of(format)
    linears = block_linears(network_of(denoiser_of(pipe)))
    kept = {name: MODULATES for name in linears if VECTORS & set(re.split(r"[._\d]+", name.lower()))}
    kept |= asked(list(linears), high)
    layers = {}
    for name, linear in linears.items():
        if name not in kept:
            weight = linear.weight.detach().float()
            scale = scale_of(weight.abs().amax(1), format)
            rounded = stored(codes(weight, scale[:, None], format), format)
            layers[name] = QuantizedLayer(rounded.cpu(), scale.cpu())
    told = {"recipe": None, "activations": "token", "rounding": "nearest", "format": format}
    return QuantizedWeights(format, pipe.spec.fingerprint, layers, kept=kept, source=told)
