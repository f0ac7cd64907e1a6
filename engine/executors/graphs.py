"""Graphs: a function of static tensors, captured once and replayed. The CUDA ones; a test may bring others."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from threading import Lock
from typing import Any, Protocol

import torch
from torch import Tensor

WARM_UPS = 2  # the first compiles kernels and fills caches, the second is what will be captured
_CAPTURING = Lock()  # captures of this process, one at a time

Forward = Callable[[Mapping[str, Tensor]], Tensor]


class Graph(Protocol):
    """A captured function. nbytes: what it keeps besides its inputs."""

    nbytes: int

    def replay(self) -> Tensor:
        """Run it on what its inputs hold now; the result is overwritten by the next replay."""
        ...


class Graphs(Protocol):
    """Captures functions on devices of one type, `device`."""

    device: str

    def ready(self, device: torch.device) -> AbstractContextManager[Any]:
        """Inside, this very device is the one that things run on."""
        ...

    def warm_up(self, forward: Forward, inputs: Mapping[str, Tensor]) -> None:
        """Run `forward` until a capture would find everything compiled and allocated. Raises what it raises."""
        ...

    def capture(self, forward: Forward, inputs: Mapping[str, Tensor]) -> Graph:
        """`forward` of these very tensors as a graph. Raises RuntimeError when it cannot be captured."""
        ...


class CudaGraph:
    """A `torch.cuda.CUDAGraph` with its result. It reads memory that `forward` brought along, so it keeps that too."""

    def __init__(self, graph: Any, forward: Forward, result: Tensor, nbytes: int) -> None:
        self.graph, self.forward, self.result, self.nbytes = graph, forward, result, nbytes

    def replay(self) -> Tensor:
        """Launch it on the current stream."""
        self.graph.replay()
        return self.result


class CudaGraphs:
    """CUDA graphs over one memory pool. They never run at the same time, so that they share what lives inside one."""

    device = "cuda"

    def __init__(self) -> None:
        self._pool: Any = None
        self._stream: Any = None  # of the device that captures; torch's own belongs to the first one in the process

    def ready(self, device: torch.device) -> AbstractContextManager[Any]:
        """Makes it the current device."""
        return torch.cuda.device(device)

    def warm_up(self, forward: Forward, inputs: Mapping[str, Tensor]) -> None:
        """Run it on a side stream, as a capture needs."""
        current = torch.cuda.current_stream()
        side = _stream()
        side.wait_stream(current)
        with torch.cuda.stream(side):
            for _ in range(WARM_UPS):
                forward(inputs)
        current.wait_stream(side)

    def capture(self, forward: Forward, inputs: Mapping[str, Tensor]) -> CudaGraph:
        """`forward` as a graph in the shared pool; one that cannot be captured leaves the pool to the others."""
        with _CAPTURING:
            if self._pool is None:
                self._pool = torch.cuda.graph_pool_handle()
            if self._stream is None:
                self._stream = _stream()
            torch.cuda.synchronize()
            torch.cuda.empty_cache()
            before = torch.cuda.memory_reserved()
            graph = torch.cuda.CUDAGraph()
            try:
                options = {"pool": self._pool, "stream": self._stream, "capture_error_mode": "thread_local"}
                with torch.cuda.graph(graph, **options):
                    result = forward(inputs)
            except RuntimeError:
                self._pool = None
                raise
            return CudaGraph(graph, forward, result, max(0, torch.cuda.memory_reserved() - before))


def _stream() -> Any:
    """A stream of the current device."""
    make: Any = torch.cuda.Stream  # torch does not say what it takes
    return make()


class Unrecorded:
    """Stands for a graph where there can be none: calls the function."""

    nbytes = 0

    def __init__(self, forward: Forward, inputs: Mapping[str, Tensor]) -> None:
        self.forward, self.inputs = forward, inputs

    def replay(self) -> Tensor:
        """Run it as it is."""
        return self.forward(self.inputs)
