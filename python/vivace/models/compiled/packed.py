"""Packed weights of the native DiT by (block, linear, precision): made when first needed, shared by sessions."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from typing import NamedTuple, cast

import torch
from torch import Tensor, nn

from vivace import _C
from vivace.kernels.linear import PackedWeight, pack_weight
from vivace.models.compiled.packs import kept
from vivace.models.compiled.precisions import SITES, Kinds, dtype_in, layer_in
from vivace.models.dit import NORM_EPS, DiT
from vivace.models.quantized.layers import packed_weight
from vivace.models.quantized.weights import QuantizedLayer, QuantizedWeights

Numbers = tuple[int, int, int, str, int, int, int]


class PackedLayer(NamedTuple):
    """A linear as the C++ runner reads it: packed weight and float32 bias; int8: scale [N] and smooth [K] or None."""

    weight: PackedWeight
    bias: Tensor | None
    scale: Tensor | None = None
    smooth: Tensor | None = None

    @property
    def numbers(self) -> Numbers:
        """Address, columns, depth, dtype, and addresses of the vectors, 0 where there is none."""
        bias, scale, smooth = (0 if v is None else v.data_ptr() for v in (self.bias, self.scale, self.smooth))
        return self.weight.data_ptr(), *self.weight.shape, _name(self.weight.dtype), bias, scale, smooth

    @property
    def nbytes(self) -> int:
        """Bytes of weight and vectors."""
        return self.weight.nbytes + sum(v.nbytes for v in (self.bias, self.scale, self.smooth) if v is not None)


class PackedDit:
    """A DiT for the C++ runner, its blocks in these precisions. Immutable; its layers are shared.

    layers: by name and dtype, "blocks.3.qkv int8".
    """

    def __init__(self, model: DiT, kinds: Kinds, quantized: QuantizedWeights | None = None) -> None:
        config = model.config
        self.layers: dict[str, PackedLayer] = {}
        ends = [self._add(name, float_layer(model, name, model.dtype)) for name in ("patches", "final")]
        self.runner = _C.Dit(
            heads=config.heads,
            patch=config.patch,
            channels=config.channels,
            out_channels=config.out_channels,
            gelu=config.gelu,
            eps=(NORM_EPS, config.norm_eps, NORM_EPS),
            dtype=_name(model.dtype),
            patches=ends[0],
            blocks=[self._block(model, i, kinds[i], quantized) for i in range(len(kinds))],
            final=ends[1],
        )

    def _block(
        self, model: DiT, index: int, kind: tuple[str | None, str | None], quantized: QuantizedWeights | None
    ) -> tuple[Numbers, Numbers, Numbers, Numbers, str, str]:
        """The linears of a block, then the dtypes around those of its attention and of its MLP."""
        numbers = []
        for place, part in enumerate(SITES):
            name, precision = f"blocks.{index}.{part}", kind[place // 2]
            layer = layer_in(quantized, index, part, precision)
            if layer is None:
                made = float_layer(model, name, dtype_in(precision, model.dtype))
            else:
                made = int8_layer(model, name, layer)
            numbers.append(self._add(name, made))
        qkv, out, up, down = numbers
        attention, mlp = (_name(dtype_in(precision, model.dtype)) for precision in kind)
        return qkv, out, up, down, attention, mlp

    def _add(self, name: str, layer: PackedLayer) -> Numbers:
        self.layers[f"{name} {_name(layer.weight.dtype)}"] = layer
        return layer.numbers


def float_layer(model: DiT, name: str, dtype: torch.dtype) -> PackedLayer:
    """A linear of the model in that dtype, float32 or bfloat16."""

    def pack(_: DiT) -> PackedLayer:
        return PackedLayer(pack_weight(_linear(model, name).weight.to(dtype)), _bias(model, name))

    return kept(model, f"{name} {_name(dtype)}", pack)


def int8_layer(model: DiT, name: str, layer: QuantizedLayer) -> PackedLayer:
    """A linear on its int8 weight, with the bias of the model."""
    smooth = None if layer.smooth is None else layer.smooth.contiguous()
    return PackedLayer(packed_weight(layer), _bias(model, name), layer.weight_scale.contiguous(), smooth)


def bytes_by_dtype(packs: Iterable[PackedDit]) -> Mapping[str, int]:
    """Bytes of all their layers by the dtype of the weights, each layer once."""
    layers = {name: layer for pack in packs for name, layer in pack.layers.items()}
    total: Counter[str] = Counter()
    for layer in layers.values():
        total[_name(layer.weight.dtype)] += layer.nbytes
    return dict(total)


def _bias(model: DiT, name: str) -> Tensor | None:
    """float32, made once."""
    bias = _linear(model, name).bias
    return None if bias is None else kept(model, f"{name}.bias", lambda _: bias.detach().to(torch.float32, copy=True))


def _linear(model: DiT, name: str) -> nn.Linear:
    return cast("nn.Linear", model.get_submodule(name))


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
