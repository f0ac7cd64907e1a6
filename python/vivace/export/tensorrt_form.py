"""A graph of a pack as TensorRT takes it: the same numbers, said in its way.

- activations in 8 bits are int8 with zero point 0;
- bytes are made last: a Cast to uint8 changes places with the layout that reads it;
- float8 is made and read by quantization with scale 1, where a pack has casts.
"""

from __future__ import annotations

import ml_dtypes
import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from vivace.export.qdq import emitted_for
from vivace.export.tensorrt_rules import value_types

LAYOUT = frozenset({"Transpose", "Reshape", "Squeeze", "Unsqueeze"})
FLOAT8 = TensorProto.FLOAT8E4M3FN
ONE, ZERO = "one", "float8.zero_point"


def tensorrt_form(model: onnx.ModelProto) -> onnx.ModelProto:
    """A copy of a model in that form; the given one stays as it is."""
    made = emitted_for(model, "tensorrt")
    while _bytes_moved_on(made.graph):
        pass
    _float8_quantized(made)
    return made


def _bytes_moved_on(graph: onnx.GraphProto) -> bool:
    """Let one Cast to bytes and the node of layout that alone reads it change places."""
    nodes = list(graph.node)
    for i, cast in enumerate(nodes):
        if cast.op_type != "Cast" or _to(cast) != TensorProto.UINT8:
            continue
        after = [j for j, node in enumerate(nodes) if cast.output[0] in node.input]
        if len(after) == 1 and nodes[after[0]].op_type in LAYOUT:
            layout, last = _copied(nodes[after[0]]), _copied(cast)
            layout.input[0], last.output[0] = cast.input[0], layout.output[0]
            layout.output[0] = last.input[0] = f"{layout.name}.numbers"
            nodes[after[0] : after[0] + 1] = [layout, last]
            del nodes[i], graph.node[:]
            graph.node.extend(nodes)
            return True
    return False


def _float8_quantized(model: onnx.ModelProto) -> None:
    """QuantizeLinear and DequantizeLinear with scale 1 in place of casts to and from float8."""
    types, wide = value_types(model), set[int]()
    for node in model.graph.node:
        source = types.get(node.input[0], 0) if node.op_type == "Cast" else 0
        if node.op_type != "Cast" or FLOAT8 not in (source, _to(node)):
            continue
        kind, other = ("DequantizeLinear", _to(node)) if source == FLOAT8 else ("QuantizeLinear", source)
        wide.add(other)
        node.op_type, node.input[:] = kind, [node.input[0], f"{ONE}.{other}", ZERO]
        del node.attribute[:]
    for number in sorted(wide):
        dtype = helper.tensor_dtype_to_np_dtype(number)
        model.graph.initializer.append(numpy_helper.from_array(np.ones((), dtype), f"{ONE}.{number}"))
    if wide:
        zero = np.zeros((), ml_dtypes.float8_e4m3fn)
        model.graph.initializer.append(numpy_helper.from_array(zero, ZERO))


def _to(cast: onnx.NodeProto) -> int:
    return int(next(each.i for each in cast.attribute if each.name == "to"))


def _copied(node: onnx.NodeProto) -> onnx.NodeProto:
    made = onnx.NodeProto()
    made.CopyFrom(node)
    return made
