"""A traced ONNX graph made small and readable: constants folded, linear layers as MatMul and Add, names of the model.

What comes in has names of an exporter and shapes of its own; what goes out depends on the model alone, byte for byte.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from hashlib import sha256
from types import MappingProxyType
from typing import Any

import numpy as np
import onnx
from onnx import helper, numpy_helper

from vivace.errors import UnsupportedError
from vivace.export.tidy_names import named
from vivace.export.weights import WeightStore
from vivace.runtime.manifest import DTYPES, Port

PRODUCER = "vivace"
MOST_FOLDED = 1 << 28  # bytes of a constant that is computed beforehand
MOST_TOLD = 1 << 20  # bytes of a parameter that is known again in another shape
NOTHING: Mapping[str, Any] = MappingProxyType({})
NONE: Mapping[tuple[str, bytes], str] = MappingProxyType({})
Layers = Mapping[str, tuple[str, str]]  # name of the value a linear layer gives -> names of weight and bias


class Draft:
    """A graph while it is put in order. constants: by the name of their value, parameters by their own; owners: of
    constants that are a parameter in another form, its name."""

    def __init__(
        self,
        model: onnx.ModelProto,
        prefix: str,
        alike: Mapping[tuple[str, bytes], str],
        known: Mapping[str, Any],
    ) -> None:
        self.opset = next(each.version for each in model.opset_import if each.domain in ("", "ai.onnx"))
        self.nodes: list[onnx.NodeProto] = []
        self.constants: dict[str, Any] = {t.name: numpy_helper.to_array(t) for t in model.graph.initializer}
        self.outputs = [each.name for each in model.graph.output]
        for node in model.graph.node:
            if node.op_type == "Constant":
                self.constants[node.output[0]] = _value(node)
            else:
                self.nodes.append(node)
        self._say(known)
        own = {name: name.removeprefix(prefix) for name in self.constants if name.startswith(prefix)}
        several = {name: array for name, array in self.constants.items() if name not in own and array.size > 1}
        forms = {name: alike.get(digest(array), "") for name, array in several.items() if array.nbytes <= MOST_TOLD}
        self.owners: dict[str, str] = own | {name: owner for name, owner in forms.items() if owner}

    def _say(self, known: Mapping[str, Any]) -> None:
        """Constants as they are known."""
        for name, array in known.items():
            mine = self.constants.get(name)
            if mine is not None and (mine.shape, mine.dtype) == (array.shape, array.dtype):
                self.constants[name] = array
        said = {name for node in self.nodes for name in node.output if name in known}
        self.constants |= {name: known[name] for name in said}
        self.nodes = [node for node in self.nodes if not said.issuperset(node.output)]

    def readers(self) -> Counter[str]:
        """How often each value is read, by nodes and as an output."""
        return Counter(name for node in self.nodes for name in node.input) + Counter(self.outputs)

    def prune(self) -> None:
        """Drop nodes and constants that nothing reads."""
        wanted, kept = set(self.outputs), []
        for node in reversed(self.nodes):
            if wanted & set(node.output):
                kept.append(node)
                wanted |= set(node.input)
        self.nodes = kept[::-1]
        self.constants = {name: array for name, array in self.constants.items() if name in wanted}


def tidied(
    model: onnx.ModelProto,
    inputs: Sequence[Port],
    outputs: Sequence[Port],
    layers: Layers,
    store: WeightStore,
    prefix: str = "",
    alike: Mapping[tuple[str, bytes], str] = NONE,
    known: Mapping[str, Any] = NOTHING,
) -> tuple[onnx.ModelProto, tuple[Port, ...]]:
    """The model with its weights in the store, and those of `inputs` that it reads.

    Args:
        model: as an exporter made it, weights within; its inputs and outputs are those of the ports, in order.
        layers: its linear layers; prefix: of the names of parameters, left out; others are the exporter's.
        alike: names of parameters by digest, which exporters may have put into another shape.
        known: what constants are, by name; others are computed by numpy, whose functions round otherwise than torch's.
    Raises: UnsupportedError for functions or words of another domain.
    """
    _require_plain(model)
    draft = Draft(model, prefix, alike, known)
    layers = {value: (w.removeprefix(prefix), b.removeprefix(prefix)) for value, (w, b) in layers.items()}
    names = dict(zip([i.name for i in model.graph.input], [port.name for port in inputs], strict=True))
    fold(draft)
    linears(draft, layers)
    _apart(draft, names)
    draft.prune()
    read = draft.readers()
    used = tuple(port for value, port in zip(names, inputs, strict=True) if read[value])
    gives = dict(zip(draft.outputs, [port.name for port in outputs], strict=True))
    nodes, constants = named(draft.nodes, draft.constants, draft.owners, layers, names | gives)
    graph = helper.make_graph(
        nodes,
        PRODUCER,
        [value_of(port) for port in used],
        [value_of(port) for port in outputs],
        [store.tensor(name, array) for name, array in constants.items()],
    )
    return made_model(graph, draft.opset), used


def made_model(graph: onnx.GraphProto, opset: int) -> onnx.ModelProto:
    """A model of one graph, the same bytes every time."""
    ir = helper.find_min_ir_version_for([helper.make_opsetid("", opset)])
    return helper.make_model(
        graph, producer_name=PRODUCER, ir_version=ir, opset_imports=[helper.make_opsetid("", opset)]
    )


def value_of(port: Port) -> onnx.ValueInfoProto:
    """A port as a graph declares it."""
    return helper.make_tensor_value_info(port.name, DTYPES[port.dtype][0], list(port.shape))


def fold(draft: Draft) -> None:
    """Compute beforehand what depends on constants alone."""
    left = []
    for node in draft.nodes:
        if all(name in draft.constants or not name for name in node.input) and _pure(node):
            values = _computed(node, [draft.constants.get(name) for name in node.input], draft.opset)
            if sum(value.nbytes for value in values) <= MOST_FOLDED:
                draft.constants |= dict(zip(node.output, values, strict=True))
                owners = [draft.owners[name] for name in node.input if name in draft.owners]
                if len(owners) == 1:
                    draft.owners[node.output[0]] = owners[0]
                continue
        left.append(node)
    draft.nodes = left


def linears(draft: Draft, layers: Layers) -> None:
    """Linear layers as MatMul(x, W [K, N]) and Add(bias), W a constant owned by the layer's weight."""
    made: list[onnx.NodeProto] = []
    before: dict[str, onnx.NodeProto] = {}
    for node in draft.nodes:
        weight, bias = layers.get(node.output[0], ("", ""))
        if node.op_type == "Gemm":
            made += _product(draft, node)
        else:
            made.append(node)
        for each in made[-2:]:
            before[each.output[0]] = each
        if weight:
            _own(draft, before, node.output[0], weight, bias)
    draft.nodes = made


def _own(draft: Draft, before: Mapping[str, onnx.NodeProto], value: str, weight: str, bias: str) -> None:
    """Say which parameters the product behind `value` reads."""
    node = before[value]
    if node.op_type == "Add":
        for name in node.input:
            if name in draft.constants and bias:
                draft.owners[name] = bias
            elif name in before:
                node = before[name]
    if node.op_type == "MatMul" and node.input[1] in draft.constants:
        draft.owners[node.input[1]] = weight


def _product(draft: Draft, node: onnx.NodeProto) -> list[onnx.NodeProto]:
    """A Gemm of a constant as MatMul and Add."""
    attributes = {each.name: helper.get_attribute_value(each) for each in node.attribute}
    alpha, beta = attributes.get("alpha", 1.0), attributes.get("beta", 1.0)
    name = node.input[1]
    if name not in draft.constants or alpha != 1.0 or beta != 1.0 or attributes.get("transA", 0):
        return [node]
    if attributes.get("transB", 0):
        draft.constants[f"{name}.T"] = np.ascontiguousarray(draft.constants[name].T)
        draft.owners |= {f"{name}.T": draft.owners[name]} if name in draft.owners else {}
        name = f"{name}.T"
    if len(node.input) < 3 or not node.input[2]:
        return [helper.make_node("MatMul", [node.input[0], name], [node.output[0]])]
    between = f"{node.output[0]}.product"
    return [
        helper.make_node("MatMul", [node.input[0], name], [between]),
        helper.make_node("Add", [between, node.input[2]], [node.output[0]]),
    ]


def _apart(draft: Draft, inputs: Mapping[str, str]) -> None:
    """Outputs that are an input, a constant or one of two by a node of their own."""
    seen: set[str] = set()
    for place, name in enumerate(draft.outputs):
        if name in inputs or name in draft.constants or name in seen:
            draft.outputs[place] = f"{name}.given.{place}"
            draft.nodes.append(helper.make_node("Identity", [name], [draft.outputs[place]]))
        seen.add(draft.outputs[place])


def _computed(node: onnx.NodeProto, values: Sequence[Any], opset: int) -> list[Any]:
    """What a node gives for constant inputs."""
    from onnx.reference import ReferenceEvaluator
    from onnx.reference.op_run import OpRun  # noqa: F401  the evaluator below needs it loaded

    given = {name: value for name, value in zip(node.input, values, strict=True) if name}
    graph = helper.make_graph(
        [node],
        "constant",
        [helper.make_tensor_value_info(n, helper.np_dtype_to_tensor_dtype(v.dtype), v.shape) for n, v in given.items()],
        [onnx.ValueInfoProto(name=name) for name in node.output],
    )
    with np.errstate(all="ignore"):  # of tables with a logarithm of 0 in a place that is not read
        return [np.asarray(each) for each in ReferenceEvaluator(made_model(graph, opset)).run(None, given)]


def _pure(node: onnx.NodeProto) -> bool:
    """It depends on its inputs alone, and the evaluator knows it."""
    inner = any(attribute.HasField("g") or attribute.graphs for attribute in node.attribute)
    return not inner and not node.op_type.startswith("Random") and node.domain in ("", "ai.onnx")


def digest(array: Any) -> tuple[str, bytes]:
    """Tells contents apart, whatever their shape."""
    return array.dtype.name, sha256(np.ascontiguousarray(array).tobytes()).digest()


def _value(node: onnx.NodeProto) -> Any:
    """The array of a node Constant."""
    (attribute,) = node.attribute
    value = helper.get_attribute_value(attribute)
    if attribute.name == "value":
        return numpy_helper.to_array(value)
    dtypes = {"value_float": np.float32, "value_floats": np.float32, "value_int": np.int64, "value_ints": np.int64}
    if attribute.name not in dtypes:
        raise UnsupportedError(f"export: a constant of a traced graph is a {attribute.name}")
    return np.asarray(value, dtype=dtypes[attribute.name])


def _require_plain(model: onnx.ModelProto) -> None:
    foreign = sorted({node.domain for node in model.graph.node if node.domain not in ("", "ai.onnx")})
    if model.functions or foreign:
        raise UnsupportedError(f"export: a traced graph has words of {', '.join(foreign) or 'functions'}")
