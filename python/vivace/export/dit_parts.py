"""Parts of the native DiT as nodes: linear layers, stem, modulation, attention, MLP, head.

Sizes: R rows of the batch, N tokens (M of a token row), D width, L blocks, H heads of K.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import ml_dtypes
import numpy as np
import onnx
import torch

from vivace.export.builder import GraphBuilder
from vivace.export.weights import WeightStore
from vivace.models.dit import NORM_EPS, DiT
from vivace.runtime.manifest import DTYPES, Port

FLOAT = "float32"
TORCH = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}

# Keys and values [R, M, 2 D] of an attention, side by side -> those that its queries attend to, [R, N, 2 D].
Held = Callable[[str], str]


class DitWeights:
    """The weights of a network in some dtype, as the graphs share them."""

    def __init__(self, network: DiT, store: WeightStore) -> None:
        self.network, self.config, self._store = network, network.config, store
        self._made: dict[tuple[str, str], onnx.TensorProto] = {}

    def linear(self, layer: str, dtype: str) -> tuple[onnx.TensorProto, onnx.TensorProto | None]:
        """Weight [K, N] and bias [N] of a layer, called after it."""
        module: Any = self.network.get_submodule(layer)
        weight = self._tensor(f"{layer}.weight", dtype, lambda: module.weight.mT)
        return weight, None if module.bias is None else self._tensor(f"{layer}.bias", dtype, lambda: module.bias)

    def embedding(self, layer: str, dtype: str) -> onnx.TensorProto:
        """The table [classes + 1, D] of an embedding."""
        module: Any = self.network.get_submodule(layer)
        return self._tensor(f"{layer}.weight", dtype, lambda: module.weight)

    def ones(self, dtype: str) -> onnx.TensorProto:
        """1, D times."""
        return self._tensor("ones", dtype, lambda: torch.ones(self.config.width))

    def _tensor(self, name: str, dtype: str, read: Callable[[], torch.Tensor]) -> onnx.TensorProto:
        if (name, dtype) not in self._made:
            self._made[name, dtype] = self._store.tensor(name, as_array(read(), dtype))
        return self._made[name, dtype]


def as_array(values: torch.Tensor, dtype: str) -> np.ndarray:
    """A tensor as an array in that dtype, rounded once."""
    values = values.detach().cpu().to(TORCH[dtype]).contiguous()
    if dtype == "bfloat16":
        return values.view(torch.int16).numpy().view(ml_dtypes.bfloat16)
    return values.numpy()


@dataclass(frozen=True, slots=True)
class Parts:
    """Writes parts of a network into a graph; dtype: what they compute in."""

    to: GraphBuilder
    weights: DitWeights
    dtype: str

    def cast(self, value: str, frm: str, to: str) -> str:
        """The value in another dtype; itself where it has that."""
        return value if frm == to else self.to.op("Cast", value, name=f"to_{to}", to=onnx_type(to))

    def linear(self, x: str, layer: str, name: str) -> str:
        """x @ W + b of a layer of the network."""
        weight, bias = self.weights.linear(layer, self.dtype)
        if bias is None:
            return self.to.op("MatMul", x, self.to.weight(weight), name=name)
        product = self.to.op("MatMul", x, self.to.weight(weight), name=f"{name}.matmul")
        return self.to.op("Add", product, self.to.weight(bias), name=name)

    def modulated(self, hidden: str, shift: str, scale: str, eps: float, dtype: str) -> str:
        """shift + scale * layer_norm(hidden), shift and scale [R, 1, D], all of that dtype.

        The norm has a factor 1 of its own: not every runtime takes factors that differ by row there.
        """
        ones = self.to.weight(self.weights.ones(dtype))
        normed = self.to.op("LayerNormalization", hidden, ones, name="norm", axis=-1, epsilon=eps)
        scaled = self.to.op("Mul", normed, scale, name="scaled")
        return self.to.op("Add", scaled, shift, name="modulated")

    def joined(self, hidden: str, gate: str, fresh: str) -> str:
        """hidden + gate * fresh."""
        return self.to.op("Add", hidden, self.to.op("Mul", gate, fresh, name="gated"), name="joined")

    def of_block(self, modulation: str, block: int) -> list[str]:
        """The six vectors [R, 1, D] of a block: shift, 1 + scale and gate of its attention, then of its MLP."""
        mine = self.to.op("Gather", modulation, self.to.constant(block), name="modulation", axis=1)
        return self.to.ops("Split", mine, outputs=6, name="vectors", axis=1, num_outputs=6)

    def silu(self, x: str, name: str) -> str:
        """x * sigmoid(x)."""
        return self.to.op("Mul", x, self.to.op("Sigmoid", x, name=f"{name}.sigmoid"), name=name)

    def attention(
        self, x: str, block: int, held: Held | None = None, listen: Callable[[str], None] | None = None
    ) -> str:
        """Self-attention of x [R, M, D] with its projections.

        held: what keys and values become before they are attended to; listen: is handed the softmax weights, float of
        the network [R, H, M, N].
        """
        to, config = self.to, self.weights.config
        heads, width = config.heads, config.width
        qkv = self.linear(x, f"blocks.{block}.qkv", "qkv")
        if held is None:
            query, key, value = to.ops("Split", qkv, outputs=3, name="heads", axis=-1, num_outputs=3)
        else:
            query, both = self._split(qkv, (width, 2 * width), "own")
            key, value = to.ops("Split", held(both), outputs=2, name="heads", axis=-1, num_outputs=2)
        if to.opset >= 23 and listen is None:
            x = to.op("Attention", query, key, value, name="attended", q_num_heads=heads, kv_num_heads=heads)
        else:
            x = self._attended(query, key, value, listen)
        return self.linear(x, f"blocks.{block}.out", "out")

    def identity_attention(self, x: str, block: int) -> str:
        """Attention whose map is the identity: the projection of the values."""
        width = self.weights.config.width
        qkv = self.linear(x, f"blocks.{block}.qkv", "qkv")
        return self.linear(self._split(qkv, (2 * width, width), "heads")[1], f"blocks.{block}.out", "out")

    def _split(self, value: str, sizes: Sequence[int], name: str) -> list[str]:
        return self.to.ops("Split", value, self.to.constant(list(sizes)), outputs=len(sizes), name=name, axis=-1)

    def _attended(self, query: str, key: str, value: str, listen: Callable[[str], None] | None) -> str:
        """softmax(q k^T / sqrt K) v of [R, M, D] and [R, N, D] each: [R, M, D]."""
        to, config = self.to, self.weights.config
        shape = to.constant([0, 0, config.heads, config.head_dim])
        scale = to.constant(config.head_dim**-0.5, self.dtype)
        query, key, value = (
            to.op("Reshape", part, shape, name=f"{name}.heads")
            for part, name in ((query, "query"), (key, "key"), (value, "value"))
        )
        query = to.op("Transpose", to.op("Mul", query, scale, name="query.scaled"), name="query", perm=[0, 2, 1, 3])
        key = to.op("Transpose", key, name="key", perm=[0, 2, 3, 1])
        value = to.op("Transpose", value, name="value", perm=[0, 2, 1, 3])
        weights = to.op("Softmax", to.op("MatMul", query, key, name="scores"), name="softmax", axis=-1)
        if listen is not None:
            listen(weights)
        x = to.op("Transpose", to.op("MatMul", weights, value, name="mixed"), name="mixed.tokens", perm=[0, 2, 1, 3])
        return to.op("Reshape", x, to.constant([0, 0, config.width]), name="attended")

    def mlp(self, x: str, block: int) -> str:
        """The feed-forward network of x [R, M, D]."""
        x = self.linear(x, f"blocks.{block}.up", "up")
        x = self.to.op("Gelu", x, name="gelu", approximate=self.weights.config.gelu)
        return self.linear(x, f"blocks.{block}.down", "down")


@dataclass(frozen=True, slots=True)
class Picture:
    """The latent x [R, C, H, W] of a graph as tokens and back."""

    parts: Parts
    x: str  # float32
    grid: str  # int64 [2]: tokens down and across

    @classmethod
    def of(cls, parts: Parts) -> Picture:
        """The picture of a graph that takes its latent."""
        config, to = parts.weights.config, parts.to
        x = to.input(latent_port(config.channels, "x", "latent"))
        with to.scope("grid"):
            size = to.op("Shape", x, name="size", start=2, end=4)
            return cls(parts, x, to.op("Div", size, to.constant([config.patch] * 2), name="tokens"))

    def cells(self) -> str:
        """Patches [R, N, C patch patch] in the dtype of the network."""
        parts, to, config = self.parts, self.parts.to, self.parts.weights.config
        down, across = to.ops("Split", self.grid, outputs=2, name="sides", axis=0, num_outputs=2)
        sides = (
            to.constant([0, config.channels]),
            down,
            to.constant([config.patch]),
            across,
            to.constant([config.patch]),
        )
        x = to.op("Reshape", self.x, to.op("Concat", *sides, name="cells.shape", axis=0), name="cells")
        x = to.op("Transpose", x, name="cells.channels_last", perm=[0, 2, 4, 1, 3, 5])
        x = to.op("Reshape", x, to.constant([0, -1, config.channels * config.patch**2]), name="patches_in")
        return parts.cast(x, FLOAT, parts.dtype)

    def tokens(self) -> str:
        """N, int64 [1]."""
        return self.parts.to.op("ReduceProd", self.grid, name="count", keepdims=1)

    def head(self, hidden: str, final: str, place: Callable[[str], str] | None = None) -> str:
        """Hidden states [R, M, D] to the prediction, float32 [R, C, H, W].

        final: the head's modulation [R, 2, D]; place: puts patches [R, M, P] of some tokens among all, [R, N, P].
        """
        parts, to, config = self.parts, self.parts.to, self.parts.weights.config
        shift, scale = to.ops("Split", final, outputs=2, name="vectors", axis=1, num_outputs=2)
        x = parts.linear(parts.modulated(hidden, shift, scale, NORM_EPS, parts.dtype), "final", "pixels")
        x = x if place is None else place(x)
        own = to.constant([0]), self.grid, to.constant([config.patch, config.patch, config.out_channels])
        x = to.op("Reshape", x, to.op("Concat", *own, name="cells.shape", axis=0), name="cells")
        if config.out_channels != config.channels:
            x = to.ops("Split", x, to.constant([config.channels] * 2), outputs=2, name="mean", axis=-1)[0]
        x = to.op("Transpose", x, name="channels_first", perm=[0, 5, 1, 3, 2, 4])
        x = to.op("Reshape", x, to.op("Shape", self.x, name="shape"), name="picture")
        return parts.cast(x, parts.dtype, FLOAT)


def latent_port(channels: int, name: str, source: str) -> Port:
    """A port of float32 [rows, C, height, width]."""
    return Port(name, FLOAT, ("rows", channels, "height", "width"), source)


def onnx_type(dtype: str) -> int:
    """ONNX's number of a dtype."""
    return DTYPES[dtype][0]
