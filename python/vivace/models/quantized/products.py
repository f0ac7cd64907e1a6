"""Two ways of an int8 product on the CPU, ours and oneDNN's: the same bits, and the faster one of a shape is taken.

Both sum exactly and then do the same float32 arithmetic in the same order, so which one runs decides time alone. It is
measured when a model is compiled and kept on disk; ours is taken unless oneDNN's is faster by a margin.
"""

from __future__ import annotations

import math
import time
from collections.abc import Mapping
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor

from vivace.engine.machine import machine
from vivace.kernels import store
from vivace.models.quantized.layers import QuantizedLinear
from vivace.models.quantized.weights import QuantizedLayer

OURS, ONEDNN = "vivace.kernels.int8_linear", "oneDNN"
MOVED = 128  # oneDNN takes activations from [0, 255]; from [-128, 127] it has no fast path
MOST_DEPTH = ((1 << 31) - 1) // (255 * 128)  # products of such numbers whose sum int32 holds
ROUNDS = 7  # of a measurement
CLEARLY = 1.1  # times as fast as ours is what makes oneDNN's run


class OneDnnProduct:
    """x_scale weight_scale (x W^T) + bias by `onednn.qlinear_pointwise`; stands for `int8_linear` of one weight."""

    def __init__(self, layer: QuantizedLayer, rows: int) -> None:
        columns, depth = layer.weight.shape
        self.weight = torch.ops.onednn.qlinear_prepack(layer.weight.contiguous(), [rows, depth])
        self.ones, self.zeros = torch.ones(columns), torch.zeros(columns, dtype=torch.int64)

    def __call__(
        self,
        x: Tensor,
        weight: Any,
        x_scale: Tensor,
        weight_scale: Tensor,
        bias: Tensor | None,
        *,
        out_dtype: torch.dtype,
        **_: Any,
    ) -> Tensor:
        """The product of int8 [..., K]; what follows it is left out."""
        moved = x.reshape(-1, x.shape[-1]).view(torch.uint8) ^ MOVED
        scale, none = 1.0, [None, 1.0, 0, torch.float32, "none", [], ""]
        sums = torch.ops.onednn.qlinear_pointwise(moved, scale, MOVED, self.weight, self.ones, self.zeros, *none)
        sums.mul_(x_scale.reshape(-1, 1)).mul_(weight_scale)
        if bias is not None:
            sums.add_(bias)
        return sums.to(out_dtype).view(*x.shape[:-1], -1)


class Int8Products:
    """Chooses the way of every shape. rows: tokens that a product is measured with; chosen: by "N x K", for reports."""

    def __init__(self, rows: int) -> None:
        self.rows = rows
        self.chosen: dict[str, dict[str, Any]] = {}

    def layer(self, name: str, layer: QuantizedLayer, bias: Tensor | None, dtype: torch.dtype) -> QuantizedLinear:
        """The layer, its product the faster one for inputs of that dtype."""
        made = QuantizedLinear(name, layer, bias)
        if self._way(layer, dtype) == ONEDNN:
            made.product = OneDnnProduct(layer, self.rows)
        return made

    def report(self) -> dict[str, str]:
        """Shape -> what runs it and what was measured."""
        return {shape: _told(found) for shape, found in self.chosen.items()}

    def _way(self, layer: QuantizedLayer, dtype: torch.dtype) -> str:
        columns, depth = layer.weight.shape
        shape = f"{columns} x {depth}"
        if shape not in self.chosen:
            if not torch.backends.mkldnn.is_available() or depth > MOST_DEPTH or not exact_here():
                self.chosen[shape] = {"way": OURS, "ms": {}}
                return OURS
            key = {"what": "way of an int8 product", "shape": [columns, depth], "rows": self.rows, "dtype": str(dtype)}
            key |= {"machine": machine(layer.weight.device) | {"threads": "any"}}
            kept = store.get(key).value
            if not isinstance(kept, dict) or kept.get("way") not in (OURS, ONEDNN):
                kept = measured(layer, self.rows, dtype)
                store.put(key, kept)
            self.chosen[shape] = kept
        way: str = self.chosen[shape]["way"]
        return way


@cache
@torch.inference_mode()
def exact_here() -> bool:
    """oneDNN's sums are exact on this processor: without dot products of 8 bits it adds pairs in 16 and saturates."""
    depth, count = 64, 16
    rows = torch.tensor([127, -127, 127, -127], dtype=torch.int8)[:, None].repeat(count // 4, depth)
    rows[2::4, ::2] *= -1
    weight = torch.tensor([127, -127, -128, 127], dtype=torch.int8)[:, None].repeat(count // 4, depth)
    weight[3::4, ::2] *= -1
    one = torch.ones(count)
    made = OneDnnProduct(QuantizedLayer(weight, one), count)(rows, weight, one, one, None, out_dtype=torch.float32)
    return torch.equal(made.double(), rows.double() @ weight.double().T)


@torch.inference_mode()
def measured(layer: QuantizedLayer, rows: int, dtype: torch.dtype) -> dict[str, Any]:
    """Milliseconds of a layer each way, inputs quantized in it: the least of several in turn; and which is taken."""
    plain = QuantizedLayer(layer.weight, layer.weight_scale, layer.smooth)
    x, bias = torch.linspace(-1, 1, rows * layer.weight.shape[1]).view(rows, -1).to(dtype), layer.weight_scale
    ways = {OURS: QuantizedLinear(OURS, plain, bias), ONEDNN: QuantizedLinear(ONEDNN, plain, bias)}
    ways[ONEDNN].product = OneDnnProduct(plain, rows)
    ms = dict.fromkeys(ways, math.inf)
    for name, run in [(name, partial(way, x)) for name, way in ways.items()] * ROUNDS:
        start = time.perf_counter()
        run()
        ms[name] = min(ms[name], (time.perf_counter() - start) * 1e3)
    return {"way": ONEDNN if ms[ONEDNN] * CLEARLY < ms[OURS] else OURS, "ms": ms}


def _told(found: Mapping[str, Any]) -> str:
    if not found["ms"]:
        return f"{found['way']}, the only one here"
    return f"{found['way']}, takes " + ", ".join(f"{ms:.2f} ms by {way}" for way, ms in found["ms"].items())
