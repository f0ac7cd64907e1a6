"""Quantized weights of one model, as data: 8-bit weights with scales, by the names of the model's linear layers.

They belong to the model that their fingerprint names and stand beside its weights: a row of a plan says which blocks
run on them. Files are in `files`, the layers that compute in `layers`.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from hashlib import sha256
from os import PathLike
from typing import Any

import torch
from torch import Tensor

from vivace.errors import DtypeError, ModelError, ShapeError

DTYPES = {"int8": torch.int8, "fp8": torch.float8_e4m3fn}  # of the weights, by format


@dataclass(frozen=True, eq=False)
class QuantizedLayer:
    """One linear layer: y = x_scale weight_scale (q W^T), q = x smooth / x_scale in 8 bits.

    weight: int8 | float8_e4m3fn [N, K]; weight_scale: float32 [N]; smooth: float32 [K], what x is multiplied by before
    it is quantized (the weights were divided by it), None: by 1; x_scale: float32 [G], of all tokens by timestep group,
    None: every token has its own, from its largest number. A layer's bias stays the model's.
    """

    weight: Tensor
    weight_scale: Tensor
    smooth: Tensor | None = None
    x_scale: Tensor | None = None

    def __post_init__(self) -> None:
        if self.weight.dim() != 2 or not self.weight.numel():
            raise ShapeError(f"quantized layer: weight has shape {tuple(self.weight.shape)}, needs [N, K]")
        if self.weight.dtype not in DTYPES.values():
            raise DtypeError(f"quantized layer: weight is {self.weight.dtype}, needs int8 or float8_e4m3fn")
        columns, depth = self.weight.shape
        groups = None if self.x_scale is None else self.x_scale.numel()
        for name, vector, size in (
            ("weight_scale", self.weight_scale, columns),
            ("smooth", self.smooth, depth),
            ("x_scale", self.x_scale, groups),
        ):
            if vector is not None and vector.shape != (size,):
                needs = f"[{size}] for a weight {[columns, depth]}" if size != groups else "[groups]"
                raise ShapeError(f"quantized layer: {name} has shape {tuple(vector.shape)}, needs {needs}")
            if vector is not None and vector.dtype != torch.float32:
                raise DtypeError(f"quantized layer: {name} is {vector.dtype}, needs float32")

    @property
    def tensors(self) -> dict[str, Tensor]:
        """What there is of weight, weight_scale, smooth and x_scale, by these names."""
        found = {name: getattr(self, name) for name in ("weight", "weight_scale", "smooth", "x_scale")}
        return {name: tensor for name, tensor in found.items() if tensor is not None}

    @property
    def nbytes(self) -> int:
        """Bytes of all its tensors."""
        return sum(tensor.nbytes for tensor in self.tensors.values())

    def reads_as(self, other: QuantizedLayer) -> bool:
        """Both turn one input into the same 8-bit numbers: equal factors and activation scales."""
        pairs = ((self.smooth, other.smooth), (self.x_scale, other.x_scale))
        return all(a is b or (a is not None and b is not None and torch.equal(a, b)) for a, b in pairs)

    def dequantized(self) -> Tensor:
        """The weight that this one stands for, float32 [N, K]: with `smooth` put back."""
        weight = self.weight.float() * self.weight_scale[:, None]
        return weight if self.smooth is None else weight * self.smooth

    def to(self, device: torch.device | str) -> QuantizedLayer:
        """The same on a device; itself where it is there."""
        if self.weight.device == torch.device(device):
            return self
        return QuantizedLayer(**{name: tensor.to(device) for name, tensor in self.tensors.items()})


@dataclass(frozen=True, eq=False)
class QuantizedWeights:
    """The layers of one model.

    format: "int8" | "fp8"; fingerprint: of the model (`ModelSpec.fingerprint`); layers: by module name, "blocks.3.qkv";
    edges: timesteps between the groups of static activations, ascending, G - 1 of them; kept: linear layers that stay
    high, and why; advice: keyword arguments of `apply_precision`; source: recipe, calibration, versions.
    """

    format: str
    fingerprint: str
    layers: Mapping[str, QuantizedLayer]
    edges: tuple[float, ...] = ()
    kept: Mapping[str, str] = field(default_factory=dict)
    advice: Mapping[str, Any] = field(default_factory=dict)
    source: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.format not in DTYPES:
            raise ModelError(f"quantized weights: format {self.format!r}; need one of {', '.join(DTYPES)}")
        if any(not low < high for low, high in zip(self.edges, self.edges[1:], strict=False)):
            raise ModelError(f"quantized weights: edges {self.edges} do not ascend")
        for name, layer in self.layers.items():
            if layer.weight.dtype != DTYPES[self.format]:
                raise DtypeError(f"quantized weights: {name} is {layer.weight.dtype}, the format is {self.format!r}")
            if layer.x_scale is not None and layer.x_scale.numel() != self.groups:
                counts = f"{layer.x_scale.numel()} activation scales, the edges make {self.groups} timestep groups"
                raise ShapeError(f"quantized weights: {name} has {counts}")
        if both := sorted(set(self.layers) & set(self.kept)):
            raise ModelError(f"quantized weights: {both[0]} is both quantized and kept high")

    @cached_property
    def digest(self) -> str:
        """SHA-256 (hex) of what decides how rows run: names, shapes, scales and vectors of all layers."""
        found = sha256(f"{self.format} {self.edges}".encode())
        for name, layer in sorted(self.layers.items()):
            found.update(f"{name} {tuple(layer.weight.shape)} {sorted(layer.tensors)}".encode())
            found.update(layer.weight_scale.cpu().numpy().tobytes())
        return found.hexdigest()

    @property
    def groups(self) -> int:
        """Timestep groups G."""
        return len(self.edges) + 1

    @property
    def static(self) -> bool:
        """Some layer has activation scales by timestep group."""
        return any(layer.x_scale is not None for layer in self.layers.values())

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        return sum(layer.nbytes for layer in self.layers.values())

    def group_of(self, timestep: float) -> int:
        """The timestep group: g for edges[g - 1] <= timestep < edges[g]."""
        return bisect_right(self.edges, timestep)

    def check(self, fingerprint: str) -> None:
        """Raise ModelError unless they were made for the model of that fingerprint."""
        if fingerprint != self.fingerprint:
            raise ModelError(
                f"quantized weights: made for model {self.fingerprint[:12]}, this one is {fingerprint[:12]} (other "
                "weights, or a LoRA was added or fused since); quantize this model"
            )

    def to(self, device: torch.device | str) -> QuantizedWeights:
        """The same on a device."""
        return replace(self, layers={name: layer.to(device) for name, layer in self.layers.items()})

    def save(self, path: str | PathLike[str]) -> None:
        """Write `path`.safetensors and `path`.json, all or nothing; either suffix may be given. Raises OutputError."""
        from vivace.models.quantized.files import save_weights

        save_weights(self, path)

    @classmethod
    def load(cls, path: str | PathLike[str]) -> QuantizedWeights:
        """Read such a pair of files; tensors are mapped, not read. Raises ModelError naming file and field."""
        from vivace.models.quantized.files import load_weights

        return load_weights(path)
