"""Runtimes that a user could pick instead, each behind the same small interface.

A runtime is a module of this package with NAME, DTYPES (what it can run a network in), and two functions:

    why_not(dtype) -> reason or None         whether it can run here
    make(model, dtype, batch, threads) -> Ready   compiled for static shapes, with the settings a competent user takes

`prepared` is what benches call: it also compares the prediction with the eager float32 one, before anything is timed.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache
from importlib import import_module
from typing import Any, Protocol

import torch
from torch import Tensor

from vivace.bench.models import BenchModel
from vivace.errors import ArgumentError, BackendError
from vivace.kernels.spec import error_of

RUNTIMES = ("eager", "inductor", "cachedit", "onnx_runtime", "open_vino")
# Largest error against eager float32 that is still the same network; above it nothing is timed.
LIMITS = {"float32": 1e-3, "bfloat16": 0.15, "int8": 0.5}
Network = Callable[[Tensor, Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Ready:
    """A compiled network: call(x float32 [batch, C, H, W], t float32 [batch], labels int64 [batch]) -> float32, like x.

    begin: called with the number of steps before a picture, by runtimes that keep state between evaluations.
    settings: how it was set up, for the reader. The result may be overwritten by the next call.
    """

    call: Network
    compile_s: float
    versions: dict[str, str | None]
    settings: str
    begin: Callable[[int], object] = field(default=lambda steps: None)


class Runtime(Protocol):
    """What a module of this package offers."""

    NAME: str
    DTYPES: tuple[str, ...]

    def why_not(self, dtype: str) -> str | None: ...

    def make(self, model: BenchModel, dtype: str, batch: int, threads: int) -> Ready: ...


@dataclass(frozen=True)
class Peer:
    """A runtime in one dtype: compiled and checked, or the reason why not. error: against eager float32."""

    name: str
    dtype: str
    ready: Ready | None = None
    error: float | None = None
    reason: str | None = None

    def row(self) -> dict[str, Any]:
        """Its columns of a report."""
        ready = self.ready
        return {
            "backend": self.name, "dtype": self.dtype, "error": self.error, "reason": self.reason,
            "compile_s": None if ready is None else round(ready.compile_s, 3),
            "peer_versions": None if ready is None else ready.versions,
            "settings": None if ready is None else ready.settings,
        }  # fmt: skip


def runtime(name: str) -> Runtime:
    """The module of a runtime. Raises ArgumentError."""
    if name not in RUNTIMES:
        raise ArgumentError(f"bench: runtime {name!r} is not here; use one of {', '.join(RUNTIMES)}")
    module: Any = import_module(f"vivace.bench.peers.{name}")
    found: Runtime = module
    return found


def prepared(name: str, model: BenchModel, dtype: str, batch: int, threads: int) -> Peer:
    """A runtime compiled for a model and checked; what it cannot do becomes the reason, never an error of the bench."""
    chosen = runtime(name)
    if dtype not in chosen.DTYPES:
        raise ArgumentError(f"bench: {chosen.NAME} runs {', '.join(chosen.DTYPES)}, not {dtype!r}")
    reason = chosen.why_not(dtype)
    if reason is not None:
        return Peer(chosen.NAME, dtype, reason=reason)
    try:
        ready = chosen.make(model, dtype, batch, threads)
    except (RuntimeError, BackendError, OSError, ValueError) as error:  # of foreign compilers
        return Peer(chosen.NAME, dtype, reason=f"{type(error).__name__}: {str(error).strip().splitlines()[0]:.200}")
    ready.begin(1)
    error = error_of(ready.call(*model.inputs(batch)), reference(model, batch))
    if not error <= LIMITS[dtype.split()[0]]:
        return Peer(
            chosen.NAME, dtype, None, error, f"errs by {error:.2g}, at most {LIMITS[dtype.split()[0]]} is timed"
        )
    return Peer(chosen.NAME, dtype, ready, error)


@cache
def reference(model: BenchModel, batch: int) -> Tensor:
    """What `diffusers` predicts in eager mode in float32 for the model's inputs."""
    x, t, labels = model.inputs(batch)
    with torch.inference_mode():
        prediction: Tensor = model.transformer()(x, t, class_labels=labels).sample
    return prediction.clone()


def absent(*modules: str) -> str | None:
    """Why modules cannot be imported, None if they can."""
    for name in modules:
        try:
            import_module(name)
        except ImportError as error:
            return f"{name} cannot be imported ({str(error):.100}); run make bench-setup"
    return None
