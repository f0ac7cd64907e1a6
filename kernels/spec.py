"""Ops, their implementations, and the choice between them.

A backend is chosen from (device, dtype, what is installed) by the table `AUTO`; a choice always carries its reason. An
explicit `backend=` or the environment variable VIVACE_BACKEND names one instead, and a named backend that cannot run
raises BackendError: there is no silent fall-back.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cache
from importlib import import_module
from importlib.util import find_spec
from typing import Any

from vivace.errors import ArgumentError, BackendError

REFERENCE, CPU, TRITON = "reference", "cpu", "triton"
BACKENDS = (REFERENCE, CPU, TRITON)
# Backends tried in turn when none is named, by device; the first that can run is taken.
AUTO: Mapping[str, tuple[str, ...]] = {"cpu": (CPU, REFERENCE), "cuda": (TRITON, REFERENCE)}
UNIT_ROUNDOFF: Mapping[str, float] = {
    "float64": 2.0**-53,
    "float32": 2.0**-24,
    "float16": 2.0**-11,
    "bfloat16": 2.0**-8,
}


@dataclass(frozen=True, slots=True)
class Call:
    """One call of an op: `args`, `kwargs` as its public function takes them, `writes` the tensors it writes in place.

    An op that returns its result has no `writes`. Tensors of the call belong to it: nothing else holds them.
    """

    args: tuple[Any, ...]
    kwargs: Mapping[str, Any] = field(default_factory=dict)
    writes: tuple[Any, ...] = ()


@dataclass(frozen=True, slots=True)
class Case:
    """Inputs that tests and benches run: `make(dtype, device)` builds a fresh `Call`, the same numbers every time.

    dtypes: names it is made for; "float64" is added by the tests as the reference of the others.
    tolerance: absolute error the op's definition grants besides rounding; None takes that of the op.
    """

    name: str
    make: Callable[[str, str], Call]
    dtypes: tuple[str, ...] = ("float32",)
    tolerance: float | None = None


@dataclass(frozen=True, slots=True, eq=False)
class OpSpec:
    """What a kernel is: one definition, its implementations, the inputs it is tried on, what it costs.

    Args:
        name: of the op, of its function in every module below, and of `bench/kernels/<name>.py`.
        reference: module with the definition.
        impls: backend -> module with the function (same signature, `backend` left out) and
            `why_not(device, dtype) -> str | None`, the reason why it cannot run there. Modules load on first use.
        cases: makes the cases; called on first use.
        tolerance: absolute error granted besides rounding: 0, or what the definition states.
        bytes_moved, flops: of one call, from the arguments of the public function.
        absent: why backends without an implementation have none; told in errors.
    """

    name: str
    reference: str
    impls: Mapping[str, str]
    cases: Callable[[], tuple[Case, ...]]
    tolerance: float
    bytes_moved: Callable[..., int]
    flops: Callable[..., int]
    absent: str = ""

    @property
    def backends(self) -> tuple[str, ...]:
        """Names of all implementations, the reference first."""
        return (REFERENCE, *self.impls)


@dataclass(frozen=True, slots=True)
class Choice:
    """The backend that runs and why."""

    backend: str
    reason: str


@dataclass(frozen=True, slots=True)
class BackendRow:
    """One line of `backends()`."""

    op: str
    backend: str
    available: bool
    reason: str


class BackendTable(tuple[BackendRow, ...]):
    """The rows of `backends()`; prints as a table."""

    __slots__ = ()

    def __str__(self) -> str:
        cells = [("op", "backend", "runs", "reason")]
        cells += [(row.op, row.backend, "yes" if row.available else "no", row.reason) for row in self]
        widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
        return "\n".join(
            "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in cells
        )


_REGISTRY: dict[str, OpSpec] = {}
# Folders of this package that hold an op. Their modules register themselves when first imported.
_OPS = (
    "adaln_modulate",
    "attention",
    "cache_apply",
    "cache_update",
    "fp8_linear",
    "fp8_quantize_tokens",
    "gated_residual",
    "gather_tokens",
    "gelu",
    "int8_attention",
    "int8_linear",
    "int8_norm_modulate",
    "linear",
    "norm_modulate",
    "philox_normal",
    "qk_norm_rope",
    "quantize_tokens",
    "sample_adjust",
    "scatter_tokens",
    "select_tokens",
    "solver_step",
)


def register(spec: OpSpec) -> OpSpec:
    """Add an op to the registry and return it. Raises ArgumentError when its name is taken or a backend is unknown."""
    if spec.name in _REGISTRY:
        raise ArgumentError(f"register: op {spec.name!r} exists already; give the new one another name")
    if unknown := [name for name in spec.impls if name not in BACKENDS or name == REFERENCE]:
        raise ArgumentError(f"register: {spec.name} has the unknown backend {unknown[0]!r}; use one of {BACKENDS[1:]}")
    _REGISTRY[spec.name] = spec
    return spec


def define(name: str, *, tolerance: float = 0.0, backends: tuple[str, ...] = (CPU, TRITON), absent: str = "") -> OpSpec:
    """Register the op in `kernels/<name>/` by its fixed stems; its `cases.py` and `cost.py` load on first use."""
    home = f"vivace.kernels.{name}"

    def late(module: str, function: str) -> Callable[..., Any]:
        return lambda *args, **kwargs: getattr(import_module(f"{home}.{module}"), function)(*args, **kwargs)

    return register(
        OpSpec(
            name,
            f"{home}.reference",
            {backend: f"{home}.{backend}_impl" for backend in backends},
            cases=late("cases", "cases"),
            tolerance=tolerance,
            bytes_moved=late("cost", "bytes_moved"),
            flops=late("cost", "flops"),
            absent=absent,
        )
    )


def ops() -> tuple[OpSpec, ...]:
    """All ops, by name."""
    for name in _OPS:
        import_module(f"vivace.kernels.{name}")
    return tuple(_REGISTRY[name] for name in sorted(_REGISTRY))


def choose(spec: OpSpec, device: str, dtype: str, backend: str | None = None) -> Choice:
    """The backend for one call of `spec`.

    Args:
        device: type of the device of the tensors, "cpu" or "cuda"; dtype: name of the op's working dtype.
        backend: a name, "auto", or None: VIVACE_BACKEND, then "auto".
    Raises: ArgumentError for an unknown name; BackendError when the backend asked for by name cannot run.
    """
    name, origin = backend, "backend="
    if name is None:
        name, origin = os.environ.get("VIVACE_BACKEND") or "auto", "VIVACE_BACKEND="
    return _decide(spec, device, dtype, name, origin)


def load(spec: OpSpec, backend: str) -> Callable[..., Any]:
    """The function of `spec` in `backend`; imports its module on first use."""
    return _load(spec.reference if backend == REFERENCE else spec.impls[backend], spec.name)


def why_not(spec: OpSpec, backend: str, device: str, dtype: str) -> str | None:
    """Why `backend` cannot run `spec` on (device, dtype); None when it can."""
    if backend != REFERENCE and backend not in spec.impls:
        return f"{spec.name} has no {backend} implementation" + (f": {spec.absent}" if spec.absent else "")
    reason = missing(backend)
    if reason is not None or backend == REFERENCE:
        return reason
    reason = import_module(spec.impls[backend]).why_not(device, dtype)
    return None if reason is None else str(reason)


@cache
def missing(backend: str) -> str | None:
    """What `backend` lacks on this machine, whatever the op; None when nothing."""
    if not _installed("torch"):
        return "torch is not installed (pip install 'vivace[torch]')"
    if backend == CPU:
        return None if _installed("vivace._C") else "vivace._C is not built (python setup.py build_ext --inplace)"
    if backend != TRITON:
        return None
    if not _installed("triton"):
        return "triton is not installed (pip install triton)"
    import torch

    return None if interpreted() or torch.cuda.is_available() else "torch sees no CUDA device"


def interpreted() -> bool:
    """Triton runs kernels in Python on CPU tensors (its variable TRITON_INTERPRET, read when triton is imported)."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def backends() -> BackendTable:
    """Every implementation of every op, whether it can run here, and why: rows (op, backend, available, reason)."""
    rows = []
    for spec in ops():
        for backend in spec.backends:
            device = "cpu" if backend != TRITON or interpreted() else "cuda"
            reason = why_not(spec, backend, device, "float32")
            rows.append(BackendRow(spec.name, backend, reason is None, reason or f"runs {device} tensors"))
    return BackendTable(rows)


def error_of(actual: Any, exact: Any) -> float:
    """Normalised error max |actual - exact| / max |exact|, taken in float64; infinite where only one of them is NaN.

    NaN (or one and the same infinity) at the same places is no error; all zero `exact` normalises by 1.
    """
    import torch

    actual, exact = actual.detach().to("cpu", torch.float64), exact.detach().to("cpu", torch.float64)
    if not torch.equal(actual.isnan(), exact.isnan()):
        return float("inf")
    differs = ~(actual.isnan() | (actual == exact))
    if not differs.any():
        return 0.0
    size = exact[exact.isfinite()].abs().max().item() if exact.isfinite().any() else 0.0
    return float((actual - exact)[differs].abs().max().item() / (size or 1.0))


def within_tolerance(actual: Any, eager: Any, exact: Any, *, absolute: float = 0.0) -> tuple[bool, float, float]:
    """The tolerance rule: e(actual) <= 2 e(eager) + one unit roundoff of the output dtype (+ absolute / max |exact|).

    Integers have no roundoff.

    Args:
        actual: what the implementation wrote; eager: the definition in the same dtypes; exact: the same in float64.
        absolute: error that the op's definition grants besides (`OpSpec.tolerance`).
    Returns: (holds, error, bound); e is `error_of`.
    """
    finite = exact.double()
    finite = finite[finite.isfinite()]
    size = float(finite.abs().max().item()) if finite.numel() else 1.0
    bound = 2.0 * error_of(eager, exact) + UNIT_ROUNDOFF.get(str(actual.dtype).removeprefix("torch."), 0.0)
    bound += absolute / (size or 1.0)
    error = error_of(actual, exact)
    return error <= bound, error, bound


def _installed(module: str) -> bool:
    """The module can be found; it is not imported."""
    try:
        return find_spec(module) is not None
    except ModuleNotFoundError:
        return False


@cache
def _load(module: str, name: str) -> Callable[..., Any]:
    function: Callable[..., Any] = getattr(import_module(module), name)
    return function


@cache
def _decide(spec: OpSpec, device: str, dtype: str, name: str, origin: str) -> Choice:
    where = f"{device} tensors, {dtype}"
    if name != "auto":
        if name not in BACKENDS:
            raise ArgumentError(f"{spec.name}: {origin}{name} is no backend; use one of auto, {', '.join(BACKENDS)}")
        if (reason := why_not(spec, name, device, dtype)) is not None:
            raise BackendError(
                f"{spec.name}: {origin}{name} cannot run {where}: {reason}; name another backend or leave it to 'auto'"
            )
        return Choice(name, f"asked for by {origin}{name}; {where}")
    passed_over: list[str] = []
    for candidate in AUTO.get(device, (REFERENCE,)):
        if (reason := why_not(spec, candidate, device, dtype)) is None:
            return Choice(candidate, "; ".join([where, *passed_over]))
        passed_over.append(f"not {candidate}: {reason}")
    raise BackendError(f"{spec.name}: no backend runs {'; '.join([where, *passed_over])}")
