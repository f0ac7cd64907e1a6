"""What TensorRT 11 asks of a graph, checked without it: types, quantization, operators, ranges of free dimensions.

Networks are strongly typed there: the graph's own types are computed in, no flag says otherwise. Each finding names its
rule; `RULES` says what each one is. Errors stop a parser or a build, warnings change numbers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from vivace.export.profiles import Profile, shape_problems
from vivace.export.weights import is_external
from vivace.runtime.manifest import Port

RULES = {
    "domain": "operators are ONNX's own; others need a plugin",
    "opset": "the parser reads opsets 9 to 25",
    "operator": "the parser knows the operator",
    "rank": "tensors have at most 8 dimensions",
    "float64": "double precision is computed in float32, and is no type of inputs and outputs",
    "uint8": "bytes are inputs that a Cast reads and outputs that a Cast makes, nothing between",
    "float8": "float8 is made by QuantizeLinear and read by DequantizeLinear, Reshape, Concat or Identity alone",
    "zero_point": "quantization is symmetric: int8 or float8 with zero points 0",
    "scale": "scales are constants, positive and finite",
    "activation": "activations have one scale a tensor",
    "weight": "8-bit weights have scales along the axis of their outputs, the last of a product's",
    "bias": "int32 cannot be dequantized: the bias stays in floating point",
    "placement": "what is quantized is dequantized again, right before the layers that read it",
    "half_quantized": "a product reads both of its operands dequantized, or neither",
    "profile": "every free dimension has a range: 1 <= least <= usual <= most, the same wherever its name stands",
}
WARNINGS = frozenset({"half_quantized"})
OPSETS = range(9, 26)
MOST_DIMS = 8
# Of the standard operators those that TensorRT's parser lacks, or has for quantization of another kind only.
UNREAD = frozenset(
    "AffineGrid Bernoulli BitShift BitwiseAnd BitwiseNot BitwiseOr BitwiseXor CenterCropPad Col2Im Compress "
    "ConvInteger Det DFT DynamicQuantizeLinear GroupQueryAttention ImageDecoder LpPool MatMulInteger MaxRoiPool "
    "MaxUnpool MelWeightMatrix Multinomial NegativeLogLikelihoodLoss Optional OptionalGetElement OptionalHasElement "
    "QLinearConv QLinearMatMul RegexFullMatch SequenceAt SequenceConstruct SequenceEmpty SequenceErase "
    "SequenceInsert SequenceLength SoftmaxCrossEntropyLoss SplitToSequence StringConcat StringNormalizer "
    "StringSplit TfIdfVectorizer Unique".split()
)
EIGHT_BITS = (TensorProto.INT8, TensorProto.UINT8, TensorProto.FLOAT8E4M3FN)
FLOAT8 = (TensorProto.FLOAT8E4M3FN, TensorProto.FLOAT8E4M3FNUZ, TensorProto.FLOAT8E5M2, TensorProto.FLOAT8E5M2FNUZ)
CARRIES = frozenset({"Reshape", "Concat", "Identity", "Transpose", "Squeeze", "Unsqueeze", "Shape"})
PRODUCTS = frozenset({"MatMul", "Gemm", "Conv", "ConvTranspose"})
Read = Callable[[TensorProto], Any]  # the values of an initializer that lies in a file


@dataclass(frozen=True, slots=True)
class Finding:
    """What breaks a rule. rule: of `RULES`; at: a node, tensor or dimension; error: False for a warning."""

    rule: str
    graph: str
    at: str
    message: str
    error: bool = True

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON data."""
        return asdict(self)

    def __str__(self) -> str:
        return f"{self.graph}: {self.at}: {self.message} [{self.rule}: {RULES[self.rule]}]"


def check_graph(
    name: str,
    model: onnx.ModelProto,
    *,
    inputs: tuple[Port, ...] = (),
    profile: Profile | None = None,
    read: Read | None = None,
) -> list[Finding]:
    """The findings of one graph, in the order of its nodes.

    Args:
        inputs: its ports, whose free dimensions `profile` gives ranges to; None: ranges are not looked at.
        read: values of initializers with external data, to check scales that lie there; None: these are not read.
    """
    graph = _Graph(name, model, read)
    found = [*graph.of_model(), *graph.of_values()]
    for node in model.graph.node:
        found += graph.of_node(node)
    if profile is not None:
        found += [Finding("profile", name, at, message) for at, message in shape_problems(inputs, profile)]
    return found


class _Graph:
    """A graph with what its rules look up."""

    def __init__(self, name: str, model: onnx.ModelProto, read: Read | None) -> None:
        self.name, self.model, self.read = name, model, read
        self.constants = {tensor.name: tensor for tensor in model.graph.initializer}
        self.makers = {value: node for node in model.graph.node for value in node.output}
        self.readers: dict[str, list[onnx.NodeProto]] = {}
        for node in model.graph.node:
            for value in node.input:
                self.readers.setdefault(value, []).append(node)
        self.inputs = {value.name for value in model.graph.input}
        self.outputs = {value.name for value in model.graph.output}
        self.types, self.ranks = _types(model)

    def found(self, rule: str, at: str, message: str) -> Finding:
        return Finding(rule, self.name, at, message, rule not in WARNINGS)

    def of_model(self) -> Iterator[Finding]:
        """Opset and domains."""
        for opset in self.model.opset_import:
            if opset.domain not in ("", "ai.onnx"):
                yield self.found("domain", opset.domain, "it imports operators of another domain")
            elif opset.version not in OPSETS:
                yield self.found("opset", f"opset {opset.version}", f"needed is {OPSETS[0]} to {OPSETS[-1]}")

    def of_values(self) -> Iterator[Finding]:
        """Types and ranks of inputs, outputs and everything between."""
        for value, kind in self.types.items():
            if kind == TensorProto.DOUBLE:
                yield from self._double(value)
            elif kind == TensorProto.UINT8:
                yield from self._bytes(value)
            elif kind in FLOAT8 and value not in self.constants:
                yield from self._float8(value)
        for value, rank in self.ranks.items():
            if rank > MOST_DIMS:
                yield self.found("rank", value, f"it has {rank} dimensions")

    def _double(self, value: str) -> Iterator[Finding]:
        if value in self.inputs | self.outputs:
            yield self.found("float64", value, "an input or output is float64; cast it inside of the graph")
        elif value in self.makers and self.makers[value].op_type == "Cast":
            made = self.found("float64", value, "from here on numbers are float64, which TensorRT rounds to float32")
            yield Finding(made.rule, made.graph, made.at, made.message, error=False)

    def _bytes(self, value: str) -> Iterator[Finding]:
        if value in self.constants:
            if any(value in node.input[2:] for node in self.model.graph.node if _is_quantization(node)):
                return  # what the rule of zero points is about
        if value in self.inputs:
            if any(node.op_type not in ("Cast", "Identity") for node in self.readers.get(value, ())):
                yield self.found("uint8", value, "an input of bytes is read by something else than a Cast")
        elif value in self.makers and self.makers[value].op_type == "QuantizeLinear":
            return
        elif value not in self.outputs or self.makers[value].op_type not in ("Cast", "Identity"):
            yield self.found("uint8", value, "bytes inside of the graph; cast to them last")
        elif value in self.readers:
            yield self.found("uint8", value, "bytes that are read again inside of the graph")

    def _float8(self, value: str) -> Iterator[Finding]:
        maker = self.makers.get(value)
        if maker is not None and maker.op_type not in CARRIES | {"QuantizeLinear"}:
            yield self.found("float8", value, f"{maker.op_type} makes float8; let QuantizeLinear do it")
        for node in self.readers.get(value, ()):
            if node.op_type not in CARRIES | {"DequantizeLinear"}:
                yield self.found("float8", _named(node), f"{node.op_type} reads float8; let DequantizeLinear do it")

    def of_node(self, node: onnx.NodeProto) -> Iterator[Finding]:
        """What a node breaks."""
        if node.domain not in ("", "ai.onnx"):
            yield self.found("domain", _named(node), f"{node.op_type} is of domain {node.domain}")
        elif node.op_type in UNREAD:
            yield self.found("operator", _named(node), f"{node.op_type} is not read")
        if _is_quantization(node):
            yield from self._zero_point(node)
            yield from self._scale(node)
        if node.op_type == "QuantizeLinear":
            yield from self._quantized(node)
        elif node.op_type == "DequantizeLinear":
            yield from self._dequantized(node)
        elif node.op_type in PRODUCTS:
            yield from self._product(node)

    def _zero_point(self, node: onnx.NodeProto) -> Iterator[Finding]:
        if len(node.input) < 3 or not node.input[2]:
            if node.op_type == "QuantizeLinear" and not any(each.name == "output_dtype" for each in node.attribute):
                yield self.found("zero_point", _named(node), "without a zero point codes are uint8; give an int8 zero")
            return
        zero = self._values(node.input[2])
        if zero is None:
            yield self.found("zero_point", _named(node), f"{node.input[2]} is no constant")
        elif zero.dtype.name not in ("int8", "float8_e4m3fn"):
            yield self.found("zero_point", _named(node), f"{node.input[2]} is {zero.dtype.name}; write it for tensorrt")
        elif np.any(zero.astype(np.float32) != 0.0):
            yield self.found("zero_point", _named(node), f"{node.input[2]} is not 0")

    def _scale(self, node: onnx.NodeProto) -> Iterator[Finding]:
        name = node.input[1]
        if name not in self.constants:
            yield self.found("scale", _named(node), f"{name} is computed in the graph, or an input of it")
            return
        values = self._values(name)
        if values is None:
            return  # in a file that nobody handed over
        wide = values.astype(np.float64)
        if not np.all(np.isfinite(wide) & (wide > 0.0)):
            yield self.found("scale", _named(node), f"{name} holds numbers that are not positive and finite")

    def _quantized(self, node: onnx.NodeProto) -> Iterator[Finding]:
        scale = self.constants.get(node.input[1])
        if scale is not None and int(np.prod(scale.dims)) != 1:
            yield self.found("activation", _named(node), f"{node.input[1]} holds {int(np.prod(scale.dims))} scales")
        for reader in self.readers.get(node.output[0], ()):
            if reader.op_type != "DequantizeLinear":
                yield self.found("placement", _named(node), f"its codes are read by {reader.op_type} {reader.name}")

    def _dequantized(self, node: onnx.NodeProto) -> Iterator[Finding]:
        kind, scale = self.types.get(node.input[0]), self.constants.get(node.input[1])
        if kind == TensorProto.INT32:
            yield self.found("bias", _named(node), f"{node.input[0]} is int32")
        weight = self.constants.get(node.input[0])
        maker = self.makers.get(node.input[0])
        if weight is None and maker is not None and maker.op_type == "QuantizeLinear":
            if maker.input[1] != node.input[1]:
                yield self.found("placement", _named(node), f"{maker.input[1]} quantized, {node.input[1]} dequantizes")
        if weight is None or scale is None or kind not in EIGHT_BITS or int(np.prod(scale.dims)) == 1:
            return
        axis = _axis(node) % len(weight.dims)
        readers = {reader.op_type for reader in self.readers.get(node.output[0], ())}
        if list(scale.dims) != [weight.dims[axis]] or ("MatMul" in readers and axis != len(weight.dims) - 1):
            shapes = f"scales {list(scale.dims)} on axis {axis} of a weight {list(weight.dims)}"
            yield self.found("weight", _named(node), shapes)

    def _product(self, node: onnx.NodeProto) -> Iterator[Finding]:
        makers = [self.makers.get(value) for value in node.input[:2]]
        quantized = [maker is not None and maker.op_type == "DequantizeLinear" for maker in makers]
        if any(quantized) and not all(quantized):
            one = "first" if quantized[0] else "second"
            yield self.found("half_quantized", _named(node), f"only its {one} operand is dequantized")

    def _values(self, name: str) -> Any:
        """The numbers of a constant; None where it is none, or lies in a file that cannot be read."""
        tensor = self.constants.get(name)
        if tensor is None:
            return None
        if is_external(tensor):
            return None if self.read is None else self.read(tensor)
        return numpy_helper.to_array(tensor)


def _named(node: onnx.NodeProto) -> str:
    return str(node.name or node.output[0])


def _is_quantization(node: onnx.NodeProto) -> bool:
    return bool(node.op_type in ("QuantizeLinear", "DequantizeLinear"))


def _axis(node: onnx.NodeProto) -> int:
    return int(next((helper.get_attribute_value(each) for each in node.attribute if each.name == "axis"), 1))


def value_types(model: onnx.ModelProto) -> dict[str, int]:
    """ONNX's number of the element type of every value that can be told."""
    return _types(model)[0]


def _types(model: onnx.ModelProto) -> tuple[dict[str, int], dict[str, int]]:
    """Element types and ranks of all values whose types can be told."""
    told = onnx.shape_inference.infer_shapes(model).graph
    types = {tensor.name: tensor.data_type for tensor in model.graph.initializer}
    ranks = {tensor.name: len(tensor.dims) for tensor in model.graph.initializer}
    for value in (*told.input, *told.output, *told.value_info):
        kind = value.type.tensor_type
        types[value.name] = kind.elem_type
        if kind.HasField("shape"):
            ranks[value.name] = len(kind.shape.dim)
    return types, ranks
