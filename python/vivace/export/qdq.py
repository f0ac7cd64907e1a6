"""Linear layers of made graphs turned into explicit QuantizeLinear / DequantizeLinear form.

    x -> [Mul smooth] -> Quantize -> Dequantize -+
                                                 MatMul -> Add bias
                       int8 W -> Dequantize -----+

A processor's runtimes multiply uint8 by int8: activations are uint8 codes with zero point 128. TensorRT takes int8
with zero point 0. Scales and results are the same; the one zero point of a graph is all that differs. Layers compute in
float32 whatever the network's dtype: casts go around.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from typing import Any

import ml_dtypes
import numpy as np
import onnx
from onnx import TensorProto, helper

from vivace.errors import ModelError, UnsupportedError
from vivace.export.description import Description, LayerCodes, layers_of_structure
from vivace.export.pack import MadeGraph
from vivace.export.weights import WeightStore

ZERO = "activation.zero_point"
EMITTERS = ("cpu", "tensorrt")


def quantized_graphs(
    graphs: Sequence[MadeGraph],
    description: Description,
    blocks: Sequence[str],
    *,
    emitter: str,
    store: WeightStore,
    dtype: str = "float32",
) -> list[MadeGraph]:
    """Graphs whose rows multiply in 8 bits where their precisions say so; others are handed back as they are.

    Args:
        description: of the network's layers; blocks: paths of its blocks, as `models.quantized.stand_in.block_names`.
        emitter: "cpu" | "tensorrt"; dtype: of the network.
    Raises: UnsupportedError; ModelError for a layer that no graph has where rows ask for it.
    """
    made: list[MadeGraph] = []
    wanted: set[str] = set()
    found: set[str] = set()
    for graph in graphs:
        own = None if graph.role != "row" else graph.structure
        layers = layers_of_structure(own, description, blocks=blocks, dtype=dtype)
        wanted |= set(layers)
        found |= {name for name in layers if any(name == part for part in linear_names(graph.model))}
        made.append(quantized_graph(graph, description, layers, emitter=emitter, store=store) if layers else graph)
    if missing := sorted(wanted - found):
        raise ModelError(f"export: no graph multiplies by {missing[0]}.weight, which the quantized weights hold")
    return made


def quantized_graph(
    graph: MadeGraph, description: Description, layers: Collection[str], *, emitter: str, store: WeightStore
) -> MadeGraph:
    """One graph with those of `layers` that it has in 8 bits; the given one stays as it is."""
    if emitter not in EMITTERS:
        raise UnsupportedError(f"export: no graphs are written for {emitter!r}; use {' or '.join(EMITTERS)}")
    model = onnx.ModelProto()
    model.CopyFrom(graph.model)
    _Pass(model, description, frozenset(layers), emitter, store).run()
    return replace(graph, model=model)


def linear_names(model: onnx.ModelProto) -> list[str]:
    """Layers whose weight an initializer of the graph holds and a MatMul reads."""
    held = {tensor.name for tensor in model.graph.initializer}
    read = (node.input[1] for node in model.graph.node if node.op_type == "MatMul")
    return [name.removesuffix(".weight") for name in read if name in held and name.endswith(".weight")]


def emitted_for(model: onnx.ModelProto, emitter: str) -> onnx.ModelProto:
    """A copy of a graph of this pass for another kind of runtime: of equal codes and results."""
    made = onnx.ModelProto()
    made.CopyFrom(model)
    for tensor in made.graph.initializer:
        if tensor.name == ZERO and tensor.data_type in (TensorProto.UINT8, TensorProto.INT8):
            zero = zero_point("int8", emitter)
            tensor.data_type = helper.np_dtype_to_tensor_dtype(zero.dtype)
            tensor.raw_data = zero.tobytes()
    return made


def zero_point(format: str, emitter: str) -> Any:
    """The code of 0 of activations, of the dtype of the codes."""
    if format == "fp8":
        return np.zeros((), ml_dtypes.float8_e4m3fn)
    return np.array(128, np.uint8) if emitter == "cpu" else np.array(0, np.int8)


class _Pass:
    """The rewriting of one model."""

    def __init__(
        self, model: onnx.ModelProto, description: Description, layers: frozenset[str], emitter: str, store: WeightStore
    ) -> None:
        self.graph, self.codes, self.layers, self.store = model.graph, description.layers, layers, store
        self.zero = zero_point(description.format, emitter)
        self.types = {tensor.name: tensor.data_type for tensor in model.graph.initializer}
        self.tensors: dict[str, onnx.TensorProto] = {}
        self.nodes: list[onnx.NodeProto] = []
        self.ready: dict[tuple[str, float, bytes], str] = {}  # activations that went through 8 bits
        self.wide: dict[str, str] = {}  # values -> their float32 casts

    def run(self) -> None:
        """Rewrite in place; nodes stay in an order in which they can run."""
        biases = self._biases()
        cast_back: dict[str, tuple[str, int]] = {}
        for node in self.graph.node:
            name = self._layer(node)
            if name is not None:
                self._multiplied(node, name)
                if (dtype := self.types[f"{name}.weight"]) != TensorProto.FLOAT:
                    cast_back[biases.get(node.output[0], node.output[0])] = name, dtype
            self.nodes.append(node)
            for value in list(node.output):
                if value in cast_back:
                    self._narrowed(node, value, *cast_back[value])
        self._put_back()

    def _layer(self, node: onnx.NodeProto) -> str | None:
        """The layer that a node multiplies by, of those that are wanted."""
        if node.op_type != "MatMul" or node.input[1] not in self.types:
            return None
        name = node.input[1].removesuffix(".weight")
        return name if name in self.layers and node.input[1].endswith(".weight") else None

    def _biases(self) -> dict[str, str]:
        """Results of products that one Add of a constant alone reads -> the sum."""
        readers: dict[str, list[onnx.NodeProto]] = {}
        for node in self.graph.node:
            for value in node.input:
                readers.setdefault(value, []).append(node)
        outputs = {value.name for value in self.graph.output}
        found = {}
        for value, nodes in readers.items():
            if len(nodes) == 1 and nodes[0].op_type == "Add" and value not in outputs:
                if any(other in self.types for other in nodes[0].input):
                    found[value] = nodes[0].output[0]
        return found

    def _multiplied(self, node: onnx.NodeProto, name: str) -> None:
        """The product of codes in place of the layer's own."""
        codes = self.codes[name]
        dims = next(tuple(tensor.dims) for tensor in self.graph.initializer if tensor.name == f"{name}.weight")
        if dims != codes.weight.shape:
            raise ModelError(f"export: {name} is {list(dims)} in the graph, the quantized weight {codes.weight.shape}")
        weight = self._constant(f"{name}.weight", codes.weight)
        scale = self._constant(f"{name}.weight_scale", codes.weight_scale)
        read = self._through_8_bits(node.input[0], name, codes)
        node.input[:] = [read, self._node("DequantizeLinear", [weight, scale], f"{name}.weight.dequantize", axis=1)]

    def _through_8_bits(self, value: str, name: str, codes: LayerCodes) -> str:
        """The activation quantized and dequantized, once for all layers that read it alike."""
        key = value, codes.x_scale, b"" if codes.smooth is None else codes.smooth.tobytes()
        if key not in self.ready:
            read = value
            if self.types[f"{name}.weight"] != TensorProto.FLOAT:
                if value not in self.wide:
                    self.wide[value] = self._node("Cast", [value], f"{name}.input.float32", to=TensorProto.FLOAT)
                read = self.wide[value]
            if codes.smooth is not None:
                smooth = self._constant(f"{name}.smooth", codes.smooth)
                read = self._node("Mul", [read, smooth], f"{name}.input.smooth")
            scale = self._constant(f"{name}.x_scale", np.array(codes.x_scale, np.float32))
            zero = self._constant(ZERO, self.zero)
            read = self._node("QuantizeLinear", [read, scale, zero], f"{name}.input.quantize")
            self.ready[key] = self._node("DequantizeLinear", [read, scale, zero], f"{name}.input.dequantize")
        return self.ready[key]

    def _narrowed(self, node: onnx.NodeProto, value: str, name: str, dtype: int) -> None:
        """A sum (or product without bias) in float32, cast to the network's dtype for those who read it."""
        for i, other in enumerate(node.input):
            if node.op_type == "Add" and other in self.types:
                tensor = next(tensor for tensor in self.graph.initializer if tensor.name == other)
                bias = self.store.array(tensor).astype(np.float32)
                node.input[i] = self._constant(f"{other}.float32", bias)
        wide = f"{name}.float32"
        node.output[:] = [wide if output == value else output for output in node.output]
        self.nodes.append(helper.make_node("Cast", [wide], [value], name=f"{name}.cast", to=dtype))

    def _constant(self, name: str, array: Any) -> str:
        if name not in self.tensors:
            self.tensors[name] = self.store.tensor(name, array)
        return name

    def _node(self, kind: str, inputs: Sequence[str], name: str, **attributes: Any) -> str:
        self.nodes.append(helper.make_node(kind, list(inputs), [name], name=name, **attributes))
        return name

    def _put_back(self) -> None:
        """Nodes and initializers into the graph, without those that nothing reads any more."""
        read = {value for node in self.nodes for value in node.input} | {value.name for value in self.graph.output}
        kept = [tensor for tensor in self.graph.initializer if tensor.name in read and tensor.name not in self.tensors]
        del self.graph.node[:], self.graph.initializer[:], self.graph.value_info[:]
        self.graph.node.extend(self.nodes)
        self.graph.initializer.extend([*kept, *self.tensors.values()])


def scheme_of(description: Description | None, emitter: str) -> Mapping[str, Any]:
    """The "precision" of a manifest but for its network: emitter and scheme, both empty without a description."""
    if description is None:
        return {"int8": "", "scheme": {}}
    return {"int8": emitter, "scheme": dict(description.scheme)}
