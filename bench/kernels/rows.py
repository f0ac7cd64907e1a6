"""What the benches of ops over rows of hidden states share: shapes of known models, peers, correctness first, rows.

Two ways of calling are timed against each other: as a block does, results allocated by the call ("cpu", "eager",
"torch.compile"), and into memory that is there ("cpu in place", "eager in place"; the best that torch can do).

Floor: the bytes of the call at the bandwidth of the best copy of equal traffic, measured in the same rounds. Where all
of it fits the cache both are bound by the core, and the share says how far the arithmetic is hidden.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from typing import Any

import torch
from torch import Tensor

from vivace.bench import device
from vivace.bench.compiling import compiled_peer
from vivace.bench.harness import Candidate, Timing, interleave
from vivace.bench.kernels.solver_step import copies
from vivace.errors import BackendError
from vivace.kernels.spec import CPU, REFERENCE, OpSpec, error_of, missing, within_tolerance

SEED = 7
QUICK = {"DiT-S/2 x2": (2, 256, 384), "DiT-XL/2 x2": (2, 256, 1152)}
SHAPES = QUICK | {"SD3 x2": (2, 4096, 1536), "FLUX.1 x1": (1, 4096, 3072), "DiT-XL/2 x64": (64, 256, 1152)}
DTYPES = ("float32", "bfloat16")


@dataclass(frozen=True, eq=False)
class Peer:
    """An op and what torch runs instead; both take `inputs`.

    names: of the outputs as keyword arguments; inputs: makes them from a shape and a dtype; eager: as blocks write it;
    in_place: the same into given memory, as many tensors as there are names.
    """

    spec: OpSpec
    names: tuple[str, ...]
    inputs: Callable[[tuple[int, int, int], torch.dtype], tuple[Tensor, ...]]
    eager: Callable[..., Any]
    in_place: Callable[..., Any]

    def ours(self, backend: str = "cpu") -> Callable[..., Any]:
        function = getattr(import_module(f"vivace.kernels.{self.spec.name}"), self.spec.name)
        return lambda *inputs, **outputs: function(*inputs, **outputs, backend=backend)


def hidden_and_vectors(
    shape: tuple[int, int, int], dtype: torch.dtype, hidden: int, vectors: int
) -> tuple[Tensor, ...]:
    """So many tensors of the shape and [B, 1, D] views of one fused projection."""
    generator = torch.Generator().manual_seed(SEED)
    tensors = [torch.randn(shape, generator=generator).to(dtype) for _ in range(hidden)]
    projection = (torch.randn(shape[0], 6, shape[-1], generator=generator) / 3).to(dtype)
    return (*tensors, *projection.chunk(6, dim=1)[:vectors])


def rows(peer: Peer, quick: bool) -> list[dict[str, Any]]:
    """Times of every implementation on the shapes of known models."""
    if not device.present() and (reason := missing(CPU)) is not None:
        raise BackendError(f"bench {peer.spec.name}: {reason}")
    found = []
    with torch.inference_mode():
        for name, shape in (QUICK if quick else SHAPES).items():
            for dtype in DTYPES:
                found += case_rows(peer, name, shape, dtype, quick)
    return found


def case_rows(peer: Peer, case: str, shape: tuple[int, int, int], dtype: str, quick: bool) -> list[dict[str, Any]]:
    """One row a way of computing, checked first, timed together; on the GPU where there is one."""
    inputs = peer.inputs(shape, getattr(torch, dtype))
    if device.present():
        return device_rows(peer, case, tuple(tensor.to(device.PLACE) for tensor in inputs), quick)
    told = check(peer, inputs)
    outputs = [torch.zeros_like(inputs[0]) for _ in peer.names]
    named = dict(zip(peer.names, outputs, strict=True))
    ours = peer.ours()
    candidates = {
        "cpu": Candidate(lambda: ours(*inputs)),
        "eager": Candidate(lambda: peer.eager(*inputs)),
        "cpu in place": Candidate(lambda: ours(*inputs, **named)),
        "eager in place": Candidate(lambda: peer.in_place(*inputs, *outputs)),
        **copies(peer.spec.bytes_moved(*inputs)),
    }
    compiled, reason = (None, "not compiled in a quick run") if quick else compiled_peer(peer.eager, inputs)
    if compiled is not None:
        candidates["torch.compile"] = Candidate(compiled)
    times = interleave(candidates, seconds=0.5 if quick else 2.0)
    told |= {"over_compile_reason": reason, "case": case, "shape": list(shape), "dtype": dtype}
    return [describe(peer, name, inputs, times) | told for name in times if name not in ("memcpy", "copy_stream")]


def device_rows(peer: Peer, case: str, inputs: tuple[Tensor, ...], quick: bool) -> list[dict[str, Any]]:
    """The same on the GPU, results allocated by the call."""
    backend = device.backend(peer.spec)
    told, ours, first = check(peer, inputs, backend), peer.ours(backend), inputs[0]
    work = device.Work(
        peer.spec.name, case, backend, lambda: ours(*inputs), peer.eager, inputs, tuple(first.shape),
        str(first.dtype)[6:], peer.spec.bytes_moved(*inputs), peer.spec.flops(*inputs), told,
    )  # fmt: skip
    return device.rows(work, quick)


def describe(peer: Peer, backend: str, inputs: tuple[Tensor, ...], times: dict[str, Timing]) -> dict[str, Any]:
    """One row of the report; ratios above 1 mean faster than the peer, which writes where this one does."""
    ms, traffic = times[backend].median, peer.spec.bytes_moved(*inputs)
    best = min(("memcpy", "copy_stream"), key=lambda name: times[name].median)
    floor, eager = times[best].median, times["eager in place" if "in place" in backend else "eager"].median
    return {
        "op": peer.spec.name, "backend": backend, "ms": times[backend].to_dict(), "gb_per_s": traffic / ms / 1e6,
        "bytes": traffic, "roofline": best, "roofline_gb_per_s": traffic / floor / 1e6,
        "percent_of_roofline": 100 * floor / ms, "over_eager": eager / ms,
        "over_compile": times["torch.compile"].median / ms if "torch.compile" in times else None,
        "threads": torch.get_num_threads(), "seed": SEED,
    }  # fmt: skip


def check(peer: Peer, inputs: tuple[Tensor, ...], backend: str = CPU) -> dict[str, Any]:
    """Errors against float64 of ours and of the eager peer, first output first. Raises BackendError beyond the rule."""
    name = peer.spec.name
    outputs = [torch.zeros_like(inputs[0]) for _ in peer.names]
    exact = tensors(peer.ours(REFERENCE)(*(tensor.double() for tensor in inputs)))
    ours, eager = tensors(peer.ours(backend)(*inputs)), tensors(peer.eager(*inputs))
    peer.in_place(*inputs, *outputs)
    errors, peers = [], []
    for mine, theirs, there, truth in zip(ours, eager, outputs, exact, strict=True):
        holds, error, bound = within_tolerance(mine, theirs, truth)
        if not holds:
            raise BackendError(f"bench {name}: error {error:.3g} of {backend} exceeds {bound:.3g}; nothing was timed")
        peers.append(error_of(theirs, truth))
        if max(peers[-1], error_of(there, truth)) > 0.05:
            raise BackendError(f"bench {name}: a peer computes something else; nothing was timed")
        errors.append(error)
    return {"error_to_float64": errors, "eager_error_to_float64": peers}


def tensors(result: Any) -> tuple[Tensor, ...]:
    """The results of an op, one or several."""
    return result if isinstance(result, tuple) else (result,)
