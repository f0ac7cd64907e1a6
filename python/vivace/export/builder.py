"""Building an ONNX graph node by node, with readable names, shared weights and nothing that no output needs.

A value is named after the node that makes it, so names tell in Netron and in error messages where one is:
"blocks.3.attn.qkv".
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import numpy as np
import onnx
from onnx import helper

from vivace.export.pack import MadeGraph
from vivace.runtime.calls import Structure
from vivace.runtime.manifest import DTYPES, Port

IR_VERSIONS = {21: 10, 22: 10, 23: 11}  # of each opset the oldest that may carry it
SHORT = 16  # so many of a constant's numbers are in its name


class GraphBuilder:
    """One graph under construction. Values are names; nodes come in the order in which they were asked for."""

    def __init__(self, name: str, opset: int) -> None:
        self.name, self.opset = name, opset
        self._nodes: list[onnx.NodeProto] = []
        self._tensors: dict[str, onnx.TensorProto] = {}
        self._inputs: list[Port] = []
        self._outputs: list[tuple[Port, str]] = []
        self._names: set[str] = set()
        self._scope: list[str] = []

    @contextmanager
    def scope(self, name: str) -> Iterator[None]:
        """Nodes made inside are named "`name`.…"."""
        self._scope.append(name)
        try:
            yield
        finally:
            self._scope.pop()

    def input(self, port: Port) -> str:
        """An input of the graph; it is left out again where nothing needs it, unless its source is "latent"."""
        if port not in self._inputs:
            self._claim(port.name)
            self._inputs.append(port)
        return port.name

    def output(self, port: Port, value: str) -> None:
        """Let a value be an output of the graph, under the port's name."""
        self._claim(port.name)
        self._outputs.append((port, value))

    def weight(self, tensor: onnx.TensorProto) -> str:
        """An initializer, once however often it is asked for by its name."""
        if tensor.name not in self._tensors:
            self._claim(tensor.name)
            self._tensors[tensor.name] = tensor
        return str(tensor.name)

    def constant(self, values: Any, dtype: str = "int64") -> str:
        """A few numbers inside the graph, those of equal value once. dtype: as numpy and `ml_dtypes` spell it."""
        array = np.asarray(values).astype(helper.tensor_dtype_to_np_dtype(DTYPES[dtype][0]))
        said = "_".join(f"{number:g}" for number in array.astype(np.float64).reshape(-1)[:SHORT])
        name = f"{dtype}{'x'.join(['', *map(str, array.shape)])}[{said}{'_...' * (array.size > SHORT)}]"
        made = onnx.TensorProto(name=name, data_type=DTYPES[dtype][0], dims=array.shape, raw_data=array.tobytes())
        known = self._tensors.get(name)
        if known is not None and known.raw_data != made.raw_data:
            made.name = self._free(name)
        return self.weight(made)

    def op(self, kind: str, *inputs: str, name: str = "", **attributes: Any) -> str:
        """The one output of a node. name: within the scope, the kind in lower case where it is not said."""
        return self.ops(kind, *inputs, outputs=1, name=name, **attributes)[0]

    def ops(self, kind: str, *inputs: str, outputs: int, name: str = "", **attributes: Any) -> list[str]:
        """The outputs of a node with several."""
        path = self._free(self._path(name or kind.lower()))
        made = [path] if outputs == 1 else [f"{path}:{i}" for i in range(outputs)]
        for value in {path, *made}:
            self._claim(value)
        self._nodes.append(helper.make_node(kind, list(inputs), made, name=path, **attributes))
        return made

    def made(self, role: str, structure: Structure | None = None) -> MadeGraph:
        """The graph with a model around it, without nodes, weights and inputs that no output needs."""
        renamed = self._renamed()
        nodes, needed = [], {port.name for port, _ in self._outputs}
        for node in reversed(self._nodes):
            for names in (node.input, node.output):
                names[:] = [renamed.get(name, name) for name in names]
            if needed & set(node.output):
                needed |= set(node.input)
                nodes.append(node)
        inputs = tuple(port for port in self._inputs if port.name in needed or port.source == "latent")
        outputs = tuple(port for port, _ in self._outputs)
        graph = helper.make_graph(
            nodes[::-1],
            self.name,
            [_info(port) for port in inputs],
            [_info(port) for port in outputs],
            [tensor for name, tensor in self._tensors.items() if name in needed],
        )
        opsets = [helper.make_opsetid("", self.opset)]
        model = helper.make_model(
            graph, opset_imports=opsets, producer_name="vivace", ir_version=IR_VERSIONS[self.opset]
        )
        return MadeGraph(self.name, role, model, inputs, outputs, structure)

    def _renamed(self) -> Mapping[str, str]:
        """New names of values that are outputs; what cannot be renamed is copied."""
        renamed: dict[str, str] = {}
        fixed = {port.name for port in self._inputs} | set(self._tensors)
        for port, value in self._outputs:
            if value in fixed or value in renamed:
                value = renamed.get(value, value)
                self._nodes.append(helper.make_node("Identity", [value], [port.name], name=f"{port.name}.copy"))
            else:
                renamed[value] = port.name
        return renamed

    def _path(self, name: str) -> str:
        return ".".join((*self._scope, name))

    def _free(self, path: str) -> str:
        """The path, with a number behind it when it is taken."""
        number, name = 1, path
        while name in self._names:
            number += 1
            name = f"{path}-{number}"
        return name

    def _claim(self, name: str) -> None:
        if name in self._names:
            raise RuntimeError(f"graph {self.name}: two things are called {name!r}")
        self._names.add(name)


def _info(port: Port) -> onnx.ValueInfoProto:
    return helper.make_tensor_value_info(port.name, DTYPES[port.dtype][0], list(port.shape))
