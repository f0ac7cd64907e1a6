"""Graphs in ONNX Runtime, bound to memory of the caller: nothing is copied on the way in or out."""

from __future__ import annotations

import ctypes
import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, TypeAlias

import numpy as np
from numpy.typing import NDArray

from vivace.errors import BackendError, PackError
from vivace.runtime.manifest import DTYPES, Graph, Port

if TYPE_CHECKING:
    from vivace.runtime.pack import Pack

Array: TypeAlias = NDArray[Any]
# Graphs of a pack take turns, so threads that wait for the next operator of one would be in the way of the others.
SETTINGS = {"session.intra_op.allow_spinning": "0"}


class Runner(Protocol):
    """A graph that is ready to run."""

    def run(self, inputs: Mapping[str, Array], outputs: Mapping[str, Array | None]) -> Mapping[str, Array]:
        """One forward.

        Args:
            inputs: by port name, C-contiguous, of the ports' dtypes as `storage` has them.
            outputs: memory of the caller that is written, None: it is made. No input shares memory with them.
        Returns: every output by port name.
        """
        ...


class Backend(Protocol):
    """What opens the graphs of a pack."""

    name: str

    def open(self, pack: Pack, graph: Graph) -> Runner:
        """A graph of a pack. Raises PackError for one that cannot be loaded."""
        ...


class OnnxRuntime:
    """ONNX Runtime on the CPU. threads: of a forward, None: as many as it likes.

    Sessions map the pack's weights file and share its pages. What products read is laid out anew for each session that
    has it, which makes rows some percent faster, unless `packed` is False; None: unless that took more than a quarter
    of the machine's memory.
    """

    name = "onnxruntime"

    def __init__(self, threads: int | None = None, packed: bool | None = None) -> None:
        try:
            import onnxruntime
        except ImportError:
            raise BackendError(
                "run: ONNX Runtime is not installed; `pip install onnxruntime` (extra vivace[runtime])"
            ) from None
        self._ort, self.threads, self.packed = onnxruntime, threads, packed
        self.version = str(onnxruntime.__version__)

    def open(self, pack: Pack, graph: Graph) -> OrtRunner:
        options = self._ort.SessionOptions()
        options.log_severity_level = 3
        options.intra_op_num_threads = 1 if graph.role in ("step", "positions") else self.threads or 0
        options.inter_op_num_threads = 1
        once = graph.role == "prepare"
        for name, on in {**SETTINGS, **_of_8_bits(pack)}.items():
            options.add_session_config_entry(name, on)
        if once or not (_fits(pack) if self.packed is None else self.packed):
            options.add_session_config_entry("session.disable_prepacking", "1")
        try:
            session = self._ort.InferenceSession(str(pack.file(graph)), options, providers=["CPUExecutionProvider"])
        except Exception as error:  # the runtime has exceptions of its own, without a common base
            if type(error).__name__ == "NotImplemented":
                network = pack.manifest.precision.get("network")
                raise BackendError(
                    f"{pack.path}: ONNX Runtime {self.version} has no {network} kernel for {graph.file} on this CPU; "
                    f"use a float32 pack, or another backend ({first_line(error)})"
                ) from None
            raise PackError(f"{pack.path}: ONNX Runtime cannot load {graph.file}: {first_line(error)}") from None
        return OrtRunner(session, graph)


def _of_8_bits(pack: Pack) -> dict[str, str]:
    """Settings of graphs in 8 bits: products of float8 codes are unknown to it; without instructions of their own
    products of int8 are summed in 16 bits, which overflow unless it is told to be exact."""
    kind = pack.manifest.precision.get("scheme", {}).get("format")
    if kind == "fp8":
        return {"session.disable_quant_qdq": "1"}
    return {} if kind is None or _has_dot_products() else {"session.x64quantprecision": "1"}


def _has_dot_products() -> bool:
    """The processor has 8-bit dot products that sum in 32 bits; True where it is not known."""
    try:
        told = Path("/proc/cpuinfo").read_text()
    except OSError:
        return True
    return "avx2" not in told or "vnni" in told


def _fits(pack: Pack) -> bool:
    """The weights of all row graphs, each counted as often as it is read, take a quarter of the memory at most."""
    size = sum(stored.length for graph in pack.graphs("row") for stored in pack.stored[graph.name])
    try:
        return size <= os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 4
    except (AttributeError, OSError, ValueError):  # a system that does not say
        return True


class OrtRunner:
    """A graph in a session of ONNX Runtime."""

    def __init__(self, session: Any, graph: Graph) -> None:
        self._session, self.graph = session, graph
        self._binding = session.io_binding()
        ports = (*graph.inputs, *graph.outputs)
        self._types = {port.name: (DTYPES[port.dtype][0], storage(port.dtype)) for port in ports}

    def run(self, inputs: Mapping[str, Array], outputs: Mapping[str, Array | None]) -> Mapping[str, Array]:
        binding = self._binding
        for name, array in inputs.items():
            binding.bind_input(name, "cpu", 0, *self._memory(name, array))
        for name, memory in outputs.items():
            if memory is None:
                binding.bind_output(name, "cpu")
            else:
                binding.bind_output(name, "cpu", 0, *self._memory(name, memory))
        try:
            self._session.run_with_iobinding(binding)
            open_ended = any(memory is None for memory in outputs.values())
            made = dict(zip(outputs, binding.get_outputs(), strict=True)) if open_ended else {}
        except Exception as error:
            raise BackendError(f"run: {self.graph.file} failed in ONNX Runtime: {first_line(error)}") from None
        finally:
            binding.clear_binding_inputs()
            binding.clear_binding_outputs()
        ports = {port.name: port for port in self.graph.outputs}
        return {
            name: _copied(made[name], ports[name]) if memory is None else memory for name, memory in outputs.items()
        }

    def _memory(self, name: str, array: Array) -> tuple[int, tuple[int, ...], int]:
        """(type, shape, address) of memory that the runtime reads or writes as the port says."""
        number, dtype = self._types[name]
        if array.dtype != dtype or not array.flags.c_contiguous:
            raise PackError(f"{self.graph.file}: {name!r} takes {dtype} side by side, it is handed {array.dtype}")
        return number, array.shape, array.ctypes.data


def storage(dtype: str) -> np.dtype[Any]:
    """How numpy holds a port's dtype: itself, integers of the same size for those that it has not."""
    return np.dtype({"bfloat16": "uint16", "float8_e4m3fn": "uint8"}.get(dtype, dtype))


def shape_of(port: Port, dims: Mapping[str, int]) -> tuple[int, ...] | None:
    """A port's shape where all its free dimensions are known, else None."""
    found = [size if isinstance(size, int) else dims.get(size) for size in port.shape]
    return None if None in found else tuple(size for size in found if size is not None)


def _copied(value: Any, port: Port) -> Array:
    """A value of the runtime's own memory, whatever its dtype."""
    dtype, shape = storage(port.dtype), tuple(value.shape())
    made = np.empty(shape, dtype)
    ctypes.memmove(made.ctypes.data, value.data_ptr(), made.nbytes)
    return made


def first_line(error: Exception) -> str:
    """The first line of a message, without end."""
    return str(error).strip().partition("\n")[0][:400]
