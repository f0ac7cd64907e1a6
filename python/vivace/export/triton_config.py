"""config.pbtxt of the models of a repository: ports, batching, and ensembles of what goes before a row and the row."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from vivace.errors import UnsupportedError
from vivace.runtime.manifest import Graph, Port

TYPES = {
    "float32": "TYPE_FP32",
    "float64": "TYPE_FP64",
    "float16": "TYPE_FP16",
    "int8": "TYPE_INT8",
    "uint8": "TYPE_UINT8",
    "int32": "TYPE_INT32",
    "int64": "TYPE_INT64",
    "bool": "TYPE_BOOL",
}
ROWS = "rows"


@dataclass(frozen=True, slots=True)
class Served:
    """A graph as a model. rows: of a batch, at most, if it can be batched."""

    name: str
    graph: Graph
    rows: int

    @property
    def max_batch_size(self) -> int:
        """Rows of a batch; 0 where a tensor has no axis of rows in front."""
        ports = (*self.graph.inputs, *self.graph.outputs)
        return self.rows if all(port.shape[:1] == (ROWS,) for port in ports) else 0

    def shape(self, port: Port) -> tuple[int, ...]:
        """Sizes of a port as it is sent, without the axis that is batched; -1: any."""
        sizes = tuple(-1 if isinstance(size, str) else size for size in port.shape)
        return (sizes[1:] or (1,)) if self.max_batch_size else (sizes or (1,))

    def full_shape(self, port: Port) -> tuple[int, ...]:
        """Sizes of a port as it is sent, with all axes."""
        return (-1, *self.shape(port)) if self.max_batch_size else self.shape(port)


@dataclass(frozen=True, slots=True)
class Ensemble:
    """Models one after the other. model: the last one's name; inputs, outputs: ports of the ensemble, each with the
    model that it belongs to."""

    name: str
    model: str
    steps: tuple[Served, ...]
    inputs: tuple[tuple[Served, Port], ...]
    outputs: tuple[tuple[Served, Port], ...]

    @property
    def max_batch_size(self) -> int:
        """Rows of a batch; 0 where one of its models is not batched."""
        return min(step.max_batch_size for step in self.steps)

    def config(self) -> str:
        """The text of config.pbtxt."""
        sides = [
            _side(side, [_port(port.name, port, self._shape(model, port)) for model, port in ports])
            for side, ports in (("input", self.inputs), ("output", self.outputs))
        ]
        steps = ",\n".join(map(_step, self.steps))
        head = f'name: "{self.name}"\nplatform: "ensemble"\nmax_batch_size: {self.max_batch_size}\n'
        return head + "".join(sides) + f"ensemble_scheduling {{\n  step [\n{steps}\n  ]\n}}\n"

    def _shape(self, model: Served, port: Port) -> tuple[int, ...]:
        return model.full_shape(port)[1:] if self.max_batch_size else model.full_shape(port)


def config_of(model: Served) -> str:
    """The text of config.pbtxt of a graph. Raises UnsupportedError for ports that the server cannot pass on."""
    graph = model.graph
    for port in (*graph.inputs, *graph.outputs):
        if port.dtype not in TYPES:
            raise UnsupportedError(
                f"triton-server: {graph.name} has {port.name!r} in {port.dtype}, which the server does not pass on "
                "to ONNX Runtime; export the pack with dtype float32 or float16, and keep in such"
            )
    lines = [f'name: "{model.name}"', 'backend: "onnxruntime"', f'default_model_filename: "{graph.file}"']
    lines.append(f"max_batch_size: {model.max_batch_size}")
    sides = [
        _side(side, [_port(port.name, port, model.shape(port), _reshape(model, port)) for port in ports])
        for side, ports in (("input", graph.inputs), ("output", graph.outputs))
    ]
    batching = "dynamic_batching { }\n" if model.max_batch_size else ""
    return "\n".join(lines) + "\n" + "".join(sides) + batching


def ensemble_of(model: Served, models: Sequence[Served], begin: str) -> Ensemble | None:
    """What goes before a row graph, and the row graph; None where nothing does, or where another call's hidden states
    are read."""
    graph = model.graph
    if graph.role != "row" or any(port.source == "hidden" for port in (*graph.inputs, *graph.outputs)):
        return None
    wanted = {port.key: port for port in graph.inputs if port.source == "prepared"}
    before = [each for each in models if each.graph.role == "prepare"]
    made = {port.key: (each, port) for each in before for port in each.graph.outputs}
    used = [each for each in before if any(port.key in wanted for port in each.graph.outputs)]
    if not wanted or any(key not in made or made[key][1].name != port.name for key, port in wanted.items()):
        return None
    inputs: dict[str, tuple[Served, Port]] = {}
    for each in (*used, model):
        for port in each.graph.inputs:
            if port.name in wanted and each is model:
                continue
            other = inputs.setdefault(port.name, (each, port))
            if other[0].full_shape(other[1]) != each.full_shape(port) or other[1].dtype != port.dtype:
                return None
    outputs = tuple((model, port) for port in graph.outputs)
    return Ensemble(f"{begin}-whole-{graph.name}".lower(), model.name, (*used, model), tuple(inputs.values()), outputs)


def _reshape(model: Served, port: Port) -> str:
    """Tensors of one number a row are sent as [rows, 1], since no shape may be empty."""
    alone = len(port.shape) == (1 if model.max_batch_size else 0)
    return " reshape: { shape: [ ] }" if alone else ""


def _port(name: str, port: Port, shape: Sequence[int], more: str = "") -> str:
    dims = ", ".join(map(str, shape))
    return f'  {{ name: "{name}" data_type: {TYPES[port.dtype]} dims: [ {dims} ]{more} }}'


def _side(side: str, ports: Sequence[str]) -> str:
    return f"{side} [\n" + ",\n".join(ports) + "\n]\n"


def _step(model: Served) -> str:
    maps = [
        f'      {side}_map {{ key: "{port.name}" value: "{port.name}" }}'
        for side, ports in (("input", model.graph.inputs), ("output", model.graph.outputs))
        for port in ports
    ]
    head = f'    {{\n      model_name: "{model.name}"\n      model_version: -1\n'
    return head + "\n".join(maps) + "\n    }"
