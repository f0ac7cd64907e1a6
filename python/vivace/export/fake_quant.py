"""What a quantized pack is held to: the denoiser whose linears compute DQ(Q(x smooth)) DQ(W) + bias in float32.

All else runs in the network's own dtype, as in the pack's graphs. It differs from `models.quantized`, whose rows have
bfloat16 between their products and codes from -127 on.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any, cast

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from vivace.engine.denoiser import Denoiser
from vivace.engine.plan import Variant
from vivace.errors import UnsupportedError
from vivace.export.description import Description, LayerCodes, layers_of
from vivace.models.pipelines.views import view
from vivace.models.quantized.reach import network_of
from vivace.models.quantized.stand_in import StandIns, block_names, replaced
from vivace.models.quantized.weights import QuantizedWeights

MOST = 448.0  # of float8_e4m3fn
Round = Callable[[Tensor], Tensor]


def fake_quantized(denoiser: Denoiser, weights: QuantizedWeights, description: Description) -> Denoiser:
    """A denoiser like this one whose rows compute in 8 bits what a pack of the same description does.

    Args:
        denoiser: eager, of one network; weights: what the description was made of.
    """
    made: Any = copy.copy(denoiser)
    made.stand_ins = FakeStandIns(weights, description, network_of(denoiser))
    return cast("Denoiser", made)


class FakeStandIns(StandIns):
    """Stand-ins of the only network, by the layers that a variant runs in 8 bits."""

    def __init__(self, weights: QuantizedWeights, description: Description, network: Any) -> None:
        super().__init__(weights)
        self.description, self.network, self.blocks = description, network, block_names(network)
        self._by_layers: dict[tuple[str, ...], Any] = {}

    def of(self, network: Any, variant: Variant) -> Any:
        """What runs a row of that variant."""
        layers = layers_of(
            [(*rule.blocks, rule.site, rule.precision) for rule in variant.rules if rule.precision is not None],
            self.description.layers,
            self.blocks,
            format=self.description.format,
            dtype=str(network.dtype).removeprefix("torch."),
        )
        if not layers:
            return network
        if network is not self.network:
            raise UnsupportedError("export: the quantized weights are of another network than the row runs")
        if layers not in self._by_layers:
            linears = {name: network.get_submodule(name) for name in layers}
            codes = self.description.layers
            views = {name: view(own, __call__=fake_linear(codes[name], own.bias)) for name, own in linears.items()}
            self._by_layers[layers] = replaced(network, views)
        return self._by_layers[layers]

    def group_of(self, variant: Variant) -> None:
        """Scales do not go by timestep."""


def fake_linear(codes: LayerCodes, bias: Tensor | None, round: Round | None = None) -> Callable[[Tensor], Tensor]:
    """The layer as a function of x [..., K] -> [..., N], computed in float32, in the dtype of x.

    round: float32 values in units of a step -> codes; None: to nearest, half to even, within the range of the codes.
    """
    weight = torch.from_numpy(codes.weight.astype(np.float32) * codes.weight_scale).t().contiguous()
    wide = None if bias is None else bias.detach().float()
    smooth = None if codes.smooth is None else torch.from_numpy(codes.smooth)
    scale = torch.tensor(codes.x_scale, dtype=torch.float32)
    to_codes = round or (_integers if codes.weight.dtype == np.int8 else _floats)

    def forward(x: Tensor) -> Tensor:
        read = x.float() if smooth is None else x.float() * smooth
        return F.linear(to_codes(read / scale) * scale, weight, wide).to(x.dtype)

    return forward


def _integers(values: Tensor) -> Tensor:
    return values.round().clamp(-128.0, 127.0)


def _floats(values: Tensor) -> Tensor:
    return values.clamp(-MOST, MOST).to(torch.float8_e4m3fn).float()
