"""What the benches of ops inside attention and feed-forward layers share: correctness first, peers, roofline, rows.

Results are allocated by the call, as blocks do it, by ours and by torch.

Floor: the bytes of the call at the bandwidth of the best copy of equal traffic, measured in the same rounds. Where all
of it fits the cache both are bound by the core, and the share says how far the arithmetic is hidden.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from importlib import import_module
from typing import Any

import torch
from torch import Tensor

from vivace.bench import device
from vivace.bench.compiling import compiled_peer
from vivace.bench.harness import Candidate, Timing, interleave
from vivace.bench.kernels.rows import tensors
from vivace.bench.kernels.solver_step import copies
from vivace.errors import BackendError
from vivace.kernels.spec import CPU, REFERENCE, OpSpec, error_of, missing, within_tolerance

SEED = 7


@dataclass(frozen=True, eq=False)
class Problem:
    """One call of an op: its tensors and options, and what torch runs on the same tensors."""

    spec: OpSpec
    case: str
    inputs: tuple[Tensor, ...]
    eager: Callable[..., Any]
    options: Mapping[str, Any] = field(default_factory=dict)
    names: tuple[str, ...] = ()  # of the last inputs, which the op takes as keyword arguments

    def ours(self, *inputs: Tensor, backend: str = "cpu") -> tuple[Tensor, ...]:
        function = getattr(import_module(f"vivace.kernels.{self.spec.name}"), self.spec.name)
        positional, named = self.arguments(inputs)
        return tensors(function(*positional, **named, backend=backend))

    def arguments(self, inputs: tuple[Tensor, ...]) -> tuple[tuple[Tensor, ...], dict[str, Any]]:
        """Positional and named arguments of the op."""
        count = len(inputs) - len(self.names)
        return inputs[:count], dict(zip(self.names, inputs[count:], strict=True)) | dict(self.options)

    @property
    def bytes(self) -> int:
        positional, named = self.arguments(self.inputs)
        return self.spec.bytes_moved(*positional, **named)


def rows(problem: Problem, quick: bool) -> list[dict[str, Any]]:
    """One row a way of computing, checked first, timed together; on the GPU where there is one."""
    if device.present():
        return device_rows(problem, quick)
    if (reason := missing(CPU)) is not None:
        raise BackendError(f"bench {problem.spec.name}: {reason}")
    ours = CPU if CPU in problem.spec.impls else REFERENCE
    with torch.inference_mode():
        told = check(problem, ours)
        candidates = {
            ours: Candidate(lambda: problem.ours(*problem.inputs, backend=ours)),
            "eager": Candidate(lambda: problem.eager(*problem.inputs)),
            **copies(problem.bytes),
        }
        compiled, reason = (
            (None, "not compiled in a quick run") if quick else compiled_peer(problem.eager, problem.inputs)
        )
        if compiled is not None:
            candidates["torch.compile"] = Candidate(compiled)
        times = interleave(candidates, seconds=0.5 if quick else 2.0)
    told |= {"over_compile_reason": reason}
    return [describe(problem, name, times) | told for name in times if name not in ("memcpy", "copy_stream")]


def device_rows(problem: Problem, quick: bool) -> list[dict[str, Any]]:
    """The same on the GPU."""
    problem = replace(problem, inputs=tuple(tensor.to(device.PLACE) for tensor in problem.inputs))
    ours = device.backend(problem.spec)
    first, (positional, named) = problem.inputs[0], problem.arguments(problem.inputs)
    with torch.inference_mode():
        told = check(problem, ours)
    work = device.Work(
        problem.spec.name, problem.case, ours, lambda: problem.ours(*problem.inputs, backend=ours), problem.eager,
        problem.inputs, tuple(first.shape), str(first.dtype)[6:], problem.bytes,
        problem.spec.flops(*positional, **named), told,
    )  # fmt: skip
    return device.rows(work, quick)


def describe(problem: Problem, backend: str, times: Mapping[str, Timing]) -> dict[str, Any]:
    """One row of the report; ratios above 1 mean faster than the peer."""
    ms, first = times[backend].median, problem.inputs[0]
    best = min(("memcpy", "copy_stream"), key=lambda name: times[name].median)
    floor = times[best].median
    return {
        "op": problem.spec.name, "backend": backend, "case": problem.case, "shape": list(first.shape),
        "dtype": str(first.dtype)[6:], "ms": times[backend].to_dict(), "gb_per_s": problem.bytes / ms / 1e6,
        "bytes": problem.bytes, "roofline": best, "roofline_gb_per_s": problem.bytes / floor / 1e6,
        "percent_of_roofline": 100 * floor / ms, "over_eager": times["eager"].median / ms,
        "over_compile": times["torch.compile"].median / ms if "torch.compile" in times else None,
        "threads": torch.get_num_threads(), "seed": SEED,
    }  # fmt: skip


def check(problem: Problem, backend: str = CPU) -> dict[str, Any]:
    """Errors against float64 of ours and of the eager peer. Raises BackendError beyond the rule."""
    name = problem.spec.name
    exact = problem.ours(*map(_double, problem.inputs), backend=REFERENCE)
    ours, eager = problem.ours(*problem.inputs, backend=backend), tensors(problem.eager(*problem.inputs))
    errors, peers = [], []
    for mine, theirs, truth in zip(ours, eager, exact, strict=True):
        holds, error, bound = within_tolerance(mine, theirs, truth, absolute=problem.spec.tolerance)
        if not holds:
            raise BackendError(f"bench {name}: error {error:.3g} of {backend} exceeds {bound:.3g}; nothing was timed")
        errors.append(error)
        peers.append(error_of(theirs, truth))
    if max(peers) > 0.05:
        raise BackendError(f"bench {name}: the eager peer computes something else; nothing was timed")
    return {"error_to_float64": errors, "eager_error_to_float64": peers}


def _double(tensor: Tensor) -> Tensor:
    """Integers and 8-bit floats stay."""
    return tensor.double() if tensor.is_floating_point() and tensor.itemsize > 1 else tensor
