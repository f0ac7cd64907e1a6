"""Packs on TensorRT: engines that `vivace export tensorrt` built, replayed as CUDA graphs.

Not verified: no machine that this release was made on had a GPU with TensorRT. The logic is tested against stand-ins of
the two libraries; results on a GPU are what `vivace verify PACK --backend tensorrt` says there.
"""

from __future__ import annotations

import ctypes
import importlib
import json
import os
from collections.abc import Mapping
from ctypes import byref, c_void_p
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from vivace.errors import BackendError, PackError, ShapeError
from vivace.runtime.manifest import Graph
from vivace.runtime.ort import storage

if TYPE_CHECKING:
    from vivace.runtime.pack import Pack

Array: TypeAlias = NDArray[Any]
Shapes: TypeAlias = tuple[tuple[str, tuple[int, ...]], ...]
SUFFIX = ".engines"
JOB = "build.json"
FLAVOURS = ("tensorrt", "tensorrt_rtx")
LIBRARIES = ("libcudart.so.13", "libcudart.so.12", "libcudart.so")
TO_DEVICE, TO_HOST = 1, 2


def engines_of(pack: Pack) -> Path:
    """Where the engines of a pack lie unless it is said: in a folder beside it."""
    path = Path(os.path.abspath(pack.path))
    return path.with_name(path.name + SUFFIX)


class TensorRt:
    """Opens engines in place of graphs. engines: their folder, None: beside the pack; trt, cuda: the libraries, found
    where they are None. Raises BackendError where one is lacking."""

    name = "tensorrt"

    def __init__(self, engines: str | Path | None = None, *, trt: Any = None, cuda: Any = None) -> None:
        self.engines = None if engines is None else Path(engines)
        self._trt = trt if trt is not None else _tensorrt()
        self._cuda = cuda if cuda is not None else Cuda()
        self.version = str(self._trt.__version__)
        self._runtime = self._trt.Runtime(self._trt.Logger(self._trt.Logger.ERROR))

    def open(self, pack: Pack, graph: Graph) -> EngineRunner:
        """The engine of a graph. Raises BackendError: it was not built, or not for this GPU and version."""
        folder = self.engines or engines_of(pack)
        again = f"run `vivace export tensorrt {pack.path}` on this machine"
        try:
            job = json.loads((folder / JOB).read_text())
            data = (folder / f"{graph.name}.engine").read_bytes()
        except (OSError, ValueError):
            raise BackendError(f"{folder}: there is no engine of {graph.name}; {again}") from None
        if job.get("pack") != pack.digest:
            raise PackError(f"{folder}: its engines are of another pack; {again}")
        engine = self._runtime.deserialize_cuda_engine(data)
        if engine is None:
            raise BackendError(f"{folder}: TensorRT {self.version} cannot load {graph.name}.engine here; {again}")
        if job.get("strip"):
            self._refit(engine, folder / graph.file)
        return EngineRunner(engine, graph, self._cuda)

    def _refit(self, engine: Any, path: Path) -> None:
        """The weights of a stripped engine, from the graph that it was built of."""
        refitter = self._trt.Refitter(engine, self._trt.Logger(self._trt.Logger.ERROR))
        parser = self._trt.OnnxParserRefitter(refitter, self._trt.Logger(self._trt.Logger.ERROR))
        if not parser.refit_from_file(str(path)) or not refitter.refit_cuda_engine():
            raise BackendError(f"{path}: its weights could not be put into the engine; build it again without --strip")


class EngineRunner:
    """An engine with memory on the device. Of every set of shapes the first call runs, the second is captured, and
    later ones are replayed."""

    def __init__(self, engine: Any, graph: Graph, cuda: Any) -> None:
        self.engine, self.graph, self._cuda = engine, graph, cuda
        self._stream = cuda.stream()
        self._contexts: dict[int, Any] = {}
        self._memory: dict[str, tuple[int, int]] = {}  # of a port: address, bytes
        self._seen: set[Shapes] = set()
        self._captured: dict[Shapes, Any] = {}
        self._host: dict[str, Array] = {}  # inputs that shapes follow from stay with the host

    def run(self, inputs: Mapping[str, Array], outputs: Mapping[str, Array | None]) -> Mapping[str, Array]:
        """One forward; see `ort.Runner`."""
        context = self._context(inputs)
        for name, array in inputs.items():
            context.set_input_shape(name, array.shape)
            if self.engine.is_shape_inference_io(name):
                self._host[name] = np.ascontiguousarray(array)
                context.set_tensor_address(name, self._host[name].ctypes.data)
            else:
                self._cuda.copy(self._place(context, name, array.nbytes), array, TO_DEVICE, self._stream)
        made = {name: self._result(context, name, memory) for name, memory in outputs.items()}
        key = tuple((name, array.shape) for name, array in sorted(inputs.items()))
        self._launch(context, key)
        for name, array in made.items():
            self._cuda.copy(self._memory[name][0], array, TO_HOST, self._stream)
        self._cuda.wait(self._stream)
        return made

    def _context(self, inputs: Mapping[str, Array]) -> Any:
        """The context of the first profile that takes these shapes."""
        for index in range(self.engine.num_optimization_profiles):
            if all(self._fits(name, array, index) for name, array in inputs.items()):
                if index not in self._contexts:
                    made = self._contexts[index] = self.engine.create_execution_context()
                    made.set_optimization_profile_async(index, self._stream)
                return self._contexts[index]
        shapes = ", ".join(f"{name} {list(array.shape)}" for name, array in inputs.items())
        raise ShapeError(f"run: no profile of {self.graph.name} takes {shapes}; export the pack for TensorRT with it")

    def _fits(self, name: str, array: Array, profile: int) -> bool:
        if self.engine.is_shape_inference_io(name) and array.ndim <= 1:
            low, _, high = self.engine.get_tensor_profile_values(profile, name)
            return all(a <= n <= b for a, n, b in zip(low, array.reshape(-1).tolist(), high, strict=True))
        low, _, high = self.engine.get_tensor_profile_shape(name, profile)
        return len(low) == array.ndim and all(a <= n <= b for a, n, b in zip(low, array.shape, high, strict=True))

    def _result(self, context: Any, name: str, memory: Array | None) -> Array:
        """Where an output goes on the host; it has a place on the device from here on."""
        port = next(port for port in self.graph.outputs if port.name == name)
        array = memory if memory is not None else np.empty(tuple(context.get_tensor_shape(name)), storage(port.dtype))
        self._place(context, name, array.nbytes)
        return array

    def _place(self, context: Any, name: str, size: int) -> int:
        """The address of a port on the device. Where it moves, what was captured with the old one is dropped."""
        address, room = self._memory.get(name, (0, 0))
        if room < size or not address:
            if address:
                self._cuda.free(address)
            address = self._cuda.allocate(max(size, 256))
            self._memory[name] = address, max(size, 256)
            self._captured.clear()
            self._seen.clear()
        context.set_tensor_address(name, address)
        return address

    def _launch(self, context: Any, key: Shapes) -> None:
        """Replay, or run; a forward whose shapes come from values in host memory is never captured."""
        if key in self._captured:
            self._cuda.launch(self._captured[key], self._stream)
            return
        if key in self._seen and not self._host:
            self._cuda.begin(self._stream)
            fine = context.execute_async_v3(self._stream)
            self._captured[key] = self._cuda.end(self._stream)
            self._cuda.launch(self._captured[key], self._stream)
        else:
            self._seen.add(key)
            fine = context.execute_async_v3(self._stream)
        if not fine:
            raise BackendError(f"run: TensorRT could not run {self.graph.name}")


class Cuda:
    """The few calls of the CUDA runtime that are needed, by ctypes. Raises BackendError without library or GPU."""

    def __init__(self) -> None:
        self._lib = _library()
        count = ctypes.c_int(0)
        if self._lib.cudaGetDeviceCount(byref(count)) or not count.value:
            raise BackendError("tensorrt: there is no GPU here; run the pack on onnxruntime")

    def stream(self) -> int:
        """A stream of its own."""
        made = c_void_p()
        self._check(self._lib.cudaStreamCreateWithFlags(byref(made), 1), "cudaStreamCreate")
        return made.value or 0

    def allocate(self, size: int) -> int:
        """Bytes on the device."""
        made = c_void_p()
        self._check(self._lib.cudaMalloc(byref(made), ctypes.c_size_t(size)), f"cudaMalloc of {size} bytes")
        return made.value or 0

    def free(self, address: int) -> None:
        """Give them back."""
        self._check(self._lib.cudaFree(c_void_p(address)), "cudaFree")

    def copy(self, address: int, array: Array, way: int, stream: int) -> None:
        """Between the device and an array of the host, in order on the stream."""
        places = (c_void_p(address), c_void_p(array.ctypes.data))
        target, source = places if way == TO_DEVICE else places[::-1]
        size = ctypes.c_size_t(array.nbytes)
        self._check(self._lib.cudaMemcpyAsync(target, source, size, way, c_void_p(stream)), "cudaMemcpyAsync")

    def wait(self, stream: int) -> None:
        """Until all that is on the stream is done."""
        self._check(self._lib.cudaStreamSynchronize(c_void_p(stream)), "cudaStreamSynchronize")

    def begin(self, stream: int) -> None:
        """From here on the stream's work is captured, not done."""
        self._check(self._lib.cudaStreamBeginCapture(c_void_p(stream), 1), "cudaStreamBeginCapture")

    def end(self, stream: int) -> int:
        """What was captured, ready to be launched."""
        graph, ready = c_void_p(), c_void_p()
        self._check(self._lib.cudaStreamEndCapture(c_void_p(stream), byref(graph)), "cudaStreamEndCapture")
        self._check(self._lib.cudaGraphInstantiate(byref(ready), graph, ctypes.c_ulonglong(0)), "cudaGraphInstantiate")
        return ready.value or 0

    def launch(self, graph: int, stream: int) -> None:
        """Run what was captured."""
        self._check(self._lib.cudaGraphLaunch(c_void_p(graph), c_void_p(stream)), "cudaGraphLaunch")

    def _check(self, code: int, what: str) -> None:
        if code:
            raise BackendError(f"tensorrt: {what} failed with CUDA error {code}")


def _tensorrt() -> Any:
    for name in FLAVOURS:
        try:
            return importlib.import_module(name)
        except Exception:  # a wheel without its libraries fails in ways of its own
            continue
    raise BackendError("tensorrt: it is not installed here; run the pack on onnxruntime, or install tensorrt")


def _library() -> Any:
    for name in LIBRARIES:
        try:
            return ctypes.CDLL(name)
        except OSError:
            continue
    raise BackendError(f"tensorrt: the CUDA runtime ({LIBRARIES[-1]}) is not here; install the CUDA toolkit")
