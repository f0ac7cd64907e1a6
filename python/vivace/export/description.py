"""What a pack's layers compute in 8 bits, by their names: one description, whoever runs the graphs.

    y = DQ(Q(x smooth)) DQ(W) + bias        Q(x) = clamp(round(x / x_scale)), DQ(q) = q scale

int8 codes of activations lie in [-128, 127], of weights in [-127, 127]; float8_e4m3fn codes saturate at 448. All
scales are constants and symmetric; the bias stays in floating point.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

from vivace.engine.plan import Rule, Variant
from vivace.engine.precision import QUANTIZED, precisions_of
from vivace.errors import UnsupportedError
from vivace.models.quantized.stand_in import place_of
from vivace.models.quantized.weights import QuantizedLayer, QuantizedWeights
from vivace.runtime.calls import Structure


@dataclass(frozen=True, eq=False)
class LayerCodes:
    """One linear layer. weight: int8 | float8_e4m3fn [K, N]; weight_scale: float32 [N]; x_scale: of all tokens at all
    timesteps; smooth: float32 [K], what x is multiplied by before, None: by 1."""

    weight: NDArray[Any]
    weight_scale: NDArray[np.float32]
    x_scale: float
    smooth: NDArray[np.float32] | None = None


@dataclass(frozen=True, eq=False)
class Description:
    """The layers of one model. format: "int8" | "fp8"; layers: by module name; scheme: for the manifest, JSON data."""

    format: str
    layers: Mapping[str, LayerCodes]
    scheme: Mapping[str, Any] = field(default_factory=dict)


def description_of(weights: QuantizedWeights) -> Description:
    """The description of static quantized weights.

    Where activation scales go by timestep group a layer gets the largest of them: every group's range fits, and those
    of smaller ranges have coarser steps than they were calibrated for.
    Raises: UnsupportedError for activations by token, whose scales are not known before they run.
    """
    for name, layer in weights.layers.items():
        if layer.x_scale is None:
            raise UnsupportedError(
                f"export: {name} has a scale for every token, and graphs hold constant scales; calibrate with `vivace "
                "calibrate --quantization --recipe ptq4dm` (or static) and quantize again"
            )
    layers = {name: _codes(layer) for name, layer in weights.layers.items()}
    scheme: dict[str, Any] = {
        "format": weights.format,
        "activations": {"symmetric": True, "scale": "tensor", "of": "largest of groups", "groups": weights.groups},
        "weights": {"symmetric": True, "scale": "channel", "axis": 1},
        "smooth": sum(codes.smooth is not None for codes in layers.values()),
        "layers": sorted(layers),
        "kept": dict(sorted(weights.kept.items())),
    }
    if weights.groups == 1:
        scheme["activations"]["of"] = "layer"
    return Description(weights.format, layers, scheme)


def _codes(layer: QuantizedLayer) -> LayerCodes:
    assert layer.x_scale is not None, "checked before"
    weight = layer.weight.cpu().t().contiguous()
    if layer.weight.dtype.itemsize == 1 and layer.weight.dtype.is_floating_point:
        codes = weight.view(dtype=_uint8()).numpy().view(ml_dtypes.float8_e4m3fn)
    else:
        codes = weight.numpy()
    smooth = None if layer.smooth is None else layer.smooth.cpu().numpy()
    return LayerCodes(codes, layer.weight_scale.cpu().numpy(), float(layer.x_scale.max()), smooth)


def _uint8() -> Any:
    import torch

    return torch.uint8


def layers_of(
    precisions: Sequence[tuple[int, int, str, str]],
    names: Collection[str],
    blocks: Sequence[str],
    *,
    format: str,
    dtype: str,
) -> tuple[str, ...]:
    """The layers that a row multiplies in 8 bits, in the order of `names`.

    Args:
        precisions: of its `Structure`; names: layers of the description; blocks: paths of the network's blocks.
        format: of the description; dtype: of the network, such as "float32".
    Raises: UnsupportedError for 8 bits of another format, and for floats wider than the network's. Narrower ones run
        in the network's dtype.
    """
    rules = tuple(Rule((first, last), site, precision=precision) for first, last, site, precision in precisions)
    found = precisions_of(Variant(rules=rules), len(blocks))
    for named in sorted({name for pair in found for name in pair if name is not None}):
        _check(named, format, dtype)
    index = {path: i for i, path in enumerate(blocks)}
    places = {name: place_of(name, index) for name in names}
    return tuple(name for name, at in places.items() if at is not None and found[at[0]][at[1]] == format)


def _check(named: str, format: str, dtype: str) -> None:
    """A row's precision against what the pack has."""
    if named in QUANTIZED and named != format:
        raise UnsupportedError(
            f"export: a row runs in {named}, the quantized weights are {format}; quantize to {named}"
        )
    if named == "fp32" and dtype != "float32":
        raise UnsupportedError(
            f"export: a row runs in fp32, the pack's network in {dtype}; leave `high` out of apply_precision, or "
            "export with dtype float32"
        )


def layers_of_structure(structure: Structure | None, description: Description, **given: Any) -> tuple[str, ...]:
    """`layers_of` for the structure of a graph; none for a graph that is no row."""
    if structure is None:
        return ()
    return layers_of(structure.precisions, description.layers, format=description.format, **given)
