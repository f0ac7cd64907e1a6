"""What a module computes with, as one digest: it changes with weights, adapters and mode, not when offload moves it.

Seen: the module's identity, its parts, every parameter's address, version and some of its bits, adapters (names,
scales, merged, disabled), training mode, patched forwards, attention implementation. Not seen: an edit through `.data`
that misses all sampled elements (a dense edit does not), and an edit of weights that are offloaded layer by layer.
"""

from __future__ import annotations

import hashlib
import itertools
import threading
import weakref
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

SAMPLES = 16  # elements of a tensor whose bits are read, evenly spaced from the first
_LIBRARIES = ("torch", "transformers", "diffusers", "accelerate", "peft")


class Serials:
    """A number that stands for an object as long as it lives and is never given to another; thread-safe.

    Objects are not kept alive by this, but for those that no weak reference can point to.
    """

    def __init__(self) -> None:
        self._known: dict[int, tuple[Callable[[], Any], int]] = {}
        self._next = itertools.count()
        self._lock = threading.Lock()

    def __call__(self, thing: Any) -> int:
        with self._lock:
            known = self._known.get(id(thing))
            if known is None or known[0]() is not thing:
                known = self._known[id(thing)] = (_reference(thing), next(self._next))
            return known[1]


def _reference(thing: Any) -> Callable[[], Any]:
    try:
        return weakref.ref(thing)
    except TypeError:
        return lambda: thing


def module_state(module: torch.nn.Module, serials: Serials) -> bytes:
    """SHA-256 of what `module` computes with (see above): about 10 us a parameter, one transfer a device and dtype."""
    parts = list(_parts(module))
    moves = any(_is_hooked(part) for part in parts)
    seen: list[Any] = [serials(module)]
    plain: list[Tensor] = []
    for part in parts:
        seen.append(_part_state(part, serials))
        for name, tensor in (*vars(part)["_parameters"].items(), *vars(part)["_buffers"].items()):
            if tensor is None:
                continue
            known = type(tensor) in (Tensor, torch.nn.Parameter)
            seen.append((name, *_tensor_state(tensor, moves or not known), None if known else serials(tensor)))
            if known and tensor.device.type != "meta" and tensor.numel():
                plain.append(tensor)
    digest = hashlib.sha256(repr(seen).encode())
    for bits in _samples(plain):
        digest.update(bits)
    return digest.digest()


def is_offloaded(module: torch.nn.Module) -> bool:
    """Whether hooks of `accelerate` or of `diffusers` group offloading move the weights of some part around."""
    return any(map(_is_hooked, _parts(module)))


def why_unrepeatable(module: torch.nn.Module) -> str | None:
    """Why two calls of `module` may differ, or do more than compute: dropout that is on, a hook of the caller's."""
    for part in _parts(module):
        if part.training and any(rate > 0 for rate in _drop_rates(part)):
            return "is in training mode with dropout; call its eval()"
        for hook in (*part._forward_hooks.values(), *part._forward_pre_hooks.values()):
            function = getattr(hook, "func", hook)
            if str(getattr(function, "__module__", "")).split(".")[0] not in _LIBRARIES:
                name = getattr(function, "__qualname__", type(function).__qualname__)
                return f"has a forward hook, {name}, that a kept result would not call"
    return None


def _parts(module: torch.nn.Module) -> Iterator[torch.nn.Module]:
    """A module and everything in it, each once; `modules()` without its paths, several times as fast."""
    pending, seen = [module], set()
    while pending:
        part = pending.pop()
        if id(part) not in seen:
            seen.add(id(part))
            pending.extend(child for child in vars(part)["_modules"].values() if child is not None)
            yield part


def _is_hooked(part: torch.nn.Module) -> bool:
    return "_hf_hook" in vars(part) or "_diffusers_hook" in vars(part)


def _drop_rates(part: torch.nn.Module) -> list[float]:
    """A part's numbers that say how much it drops: attributes such as `attention_dropout`, a dropout layer's `p`."""
    if isinstance(part, torch.nn.modules.dropout._DropoutNd):
        return [part.p]
    return [value for name, value in vars(part).items() if "drop" in name and isinstance(value, float)]


def _part_state(part: torch.nn.Module, serials: Serials) -> tuple[Any, ...]:
    state = vars(part)
    patched = [serials(state[name]) for name in ("_hf_hook", "_diffusers_hook", "forward") if name in state]
    attention = getattr(state.get("config"), "_attn_implementation", None)
    adapters = None
    if isinstance(state.get("scaling"), dict):
        adapters = (
            [(name, f"{scale:.12g}") for name, scale in sorted(state["scaling"].items())],  # scaled, then unscaled
            getattr(part, "active_adapters", None),
            getattr(part, "merged_adapters", None),
            getattr(part, "disable_adapters", None),
        )
    compiled = state.get("_compiled_call_impl") is not None
    return type(part).__qualname__, part.training, patched, attention, adapters, compiled


def _tensor_state(tensor: Tensor, moves: bool) -> tuple[Any, ...]:
    """Dtype, shape, address and version; offload changes addresses, and versions where it swaps the tensor itself."""
    meta = tensor.device.type == "meta"
    version = None if meta or tensor.is_inference() else tensor._version
    return tensor.dtype, tuple(tensor.shape), None if moves or meta else tensor.data_ptr(), version


def _samples(tensors: Sequence[Tensor]) -> list[bytes]:
    """Up to `SAMPLES` elements of each tensor as bytes, in order."""
    groups: dict[tuple[torch.dtype, torch.device], list[tuple[int, Tensor]]] = {}
    found = [b""] * len(tensors)
    with torch.no_grad():
        for i, tensor in enumerate(tensors):
            size, whole = tensor.numel(), tensor.contiguous()
            piece = whole.as_strided((min(size, SAMPLES),), (max(1, size // SAMPLES),))
            groups.setdefault((tensor.dtype, tensor.device), []).append((i, piece))
        for (dtype, _), members in groups.items():
            data = torch.cat([piece for _, piece in members]).cpu().view(torch.uint8).numpy().tobytes()
            at = 0
            for i, piece in members:
                found[i] = data[at : at + piece.numel() * dtype.itemsize]
                at += len(found[i])
    return found
