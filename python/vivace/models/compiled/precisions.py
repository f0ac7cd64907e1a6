"""Rows of the native DiT by precision: what runs each half of a block, and why a device cannot."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping

import torch

from vivace.engine.plan import Variant
from vivace.engine.precision import QUANTIZED, BlockPrecision, named, precisions_of
from vivace.errors import UnsupportedError
from vivace.models.dit import DiT
from vivace.models.quantized.layers import FLOATS
from vivace.models.quantized.native import HALVES, layer_names, own_precisions
from vivace.models.quantized.weights import QuantizedLayer, QuantizedWeights

# Of every block (attention, MLP); None: the model's own dtype.
Kinds = tuple[BlockPrecision, ...]
SITES = tuple(part for half in HALVES for part in half)  # linears of a block, in the order of csrc/runtime/dit_row.h


def kinds_of(model: DiT, variant: Variant) -> Kinds:
    """What a variant says of every block, None for what the model computes in anyway. Raises UnsupportedError."""
    return tuple(own_precisions(pair, model.dtype) for pair in precisions_of(variant, len(model.layers())))


def plain(model: DiT) -> Kinds:
    """All blocks in the model's dtype."""
    return ((None, None),) * len(model.layers())


def dtype_in(precision: str | None, own: torch.dtype) -> torch.dtype:
    """Of the activations in half a block: bfloat16 around quantized linears."""
    return own if precision is None else FLOATS.get(precision, torch.bfloat16)


def layer_in(quantized: QuantizedWeights | None, block: int, part: str, precision: str | None) -> QuantizedLayer | None:
    """The quantized weight that a linear runs on; None: one of the dtype of its activations."""
    if quantized is None or precision not in QUANTIZED:
        return None
    return quantized.layers.get(f"blocks.{block}.{part}")


def told(kinds: Kinds, own: str) -> str:
    """In words: "bfloat16", "int8", "bfloat16+int8"."""
    return "+".join(sorted({own if name is None else name for pair in kinds for name in pair}))


def counted(kinds: Kinds) -> Mapping[BlockPrecision, int]:
    """How many blocks there are of each kind."""
    return Counter(kinds)


def why_not(model: DiT, variant: Variant, quantized: QuantizedWeights | None) -> str | None:
    """Why rows of a variant cannot run in the precisions they name, on the device of the model; None when they can."""
    for name in sorted(named(variant)):
        if name == "fp8" and model.device.type != "cuda":
            return "fp8 has kernels on CUDA only"
        if name in QUANTIZED and (quantized is None or quantized.format != name):
            return f"the model was loaded without {name} weights"
    try:
        kinds = precisions_of(variant, len(model.layers()))
    except UnsupportedError as error:
        return str(error)
    asked = [
        f"blocks.{i}.{part}"
        for i, pair in enumerate(kinds)
        for half, name in zip(HALVES, pair, strict=True)
        if name in QUANTIZED
        for part in half
    ]
    if asked and quantized is not None and not any(name in quantized.layers for name in asked):
        return "the weights hold no linear of the blocks that it names"
    return None


def nearest(model: DiT) -> QuantizedWeights:
    """int8 weights of all blocks, rounded to the nearest: what time is measured with."""
    layers = {}
    for name in layer_names(len(model.layers())):
        weight = model.get_parameter(f"{name}.weight").float()
        scale = weight.abs().amax(1).div(127.0).clamp_min(torch.finfo(torch.float32).tiny)
        layers[name] = QuantizedLayer((weight / scale[:, None]).round().to(torch.int8), scale)
    return QuantizedWeights("int8", "", layers)
