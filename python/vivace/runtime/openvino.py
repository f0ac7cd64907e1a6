"""Graphs in OpenVINO on the CPU, bound to memory of the caller. It runs bfloat16 packs where ONNX Runtime cannot."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from vivace.errors import BackendError, PackError
from vivace.runtime.manifest import Graph
from vivace.runtime.ort import first_line, storage

if TYPE_CHECKING:
    from vivace.runtime.pack import Pack

Array: TypeAlias = NDArray[Any]
TYPES = {"bfloat16": "bf16", "float8_e4m3fn": "f8e4m3"}  # that numpy has not, as OpenVINO calls them


class OpenVino:
    """OpenVINO on the CPU. threads: of a forward, None: as many as it likes. Numbers are as wide as the graph says."""

    name = "openvino"

    def __init__(self, threads: int | None = None) -> None:
        try:
            import openvino
        except ImportError:
            raise BackendError("run: OpenVINO is not installed; `pip install openvino`") from None
        self._ov, self._core = openvino, openvino.Core()
        self.version = str(openvino.__version__).partition("-")[0]
        self._settings: dict[str, Any] = {"PERFORMANCE_HINT": "LATENCY", "INFERENCE_PRECISION_HINT": "f32"}
        if threads is not None:
            self._settings["INFERENCE_NUM_THREADS"] = threads

    def open(self, pack: Pack, graph: Graph) -> OpenVinoRunner:
        try:
            model = self._core.read_model(str(pack.file(graph)))
            compiled = self._core.compile_model(model, "CPU", self._settings)
        except Exception as error:  # RuntimeError, whatever the reason
            raise PackError(f"{pack.path}: OpenVINO cannot load {graph.file}: {first_line(error)}") from None
        return OpenVinoRunner(self._ov, compiled.create_infer_request(), graph)


class OpenVinoRunner:
    """A compiled graph."""

    def __init__(self, ov: Any, request: Any, graph: Graph) -> None:
        self._ov, self._request, self.graph = ov, request, graph
        self._dtypes = {port.name: port.dtype for port in (*graph.inputs, *graph.outputs)}

    def run(self, inputs: Mapping[str, Array], outputs: Mapping[str, Array | None]) -> Mapping[str, Array]:
        """One forward; see `ort.Runner`."""
        try:
            for name, array in inputs.items():
                self._request.set_tensor(name, self._tensor(name, array))
            for name, memory in outputs.items():
                if memory is not None:
                    self._request.set_tensor(name, self._tensor(name, memory))
            self._request.infer()
        except Exception as error:  # RuntimeError, whatever the reason
            raise BackendError(f"run: {self.graph.file} failed in OpenVINO: {first_line(error)}") from None
        return {name: self._made(name) if memory is None else memory for name, memory in outputs.items()}

    def _tensor(self, name: str, array: Array) -> Any:
        """A tensor over the caller's memory."""
        kind = TYPES.get(self._dtypes[name])
        if kind is None:
            return self._ov.Tensor(array, shared_memory=True)
        return self._ov.Tensor(array, self._ov.Shape(array.shape), getattr(self._ov.Type, kind))

    def _made(self, name: str) -> Array:
        """A copy of what the request holds."""
        tensor = self._request.get_tensor(name)
        raw = np.asarray(tensor.data)
        return raw.view(storage(self._dtypes[name])).reshape(tuple(tensor.shape)).copy()
