"""Whether weights are still what they were: counters of writes in place and addresses."""

from __future__ import annotations

from torch import Tensor, nn


def version_of(tensor: Tensor) -> int:
    """Counts writes in place; inference tensors do not count."""
    return 0 if tensor.is_inference() else tensor._version


def held(module: nn.Module) -> list[Tensor]:
    """Parameters and buffers as they are: who keeps these keeps the memory, whatever the module moves on to."""
    return [tensor.detach() for tensor in (*module.parameters(), *module.buffers())]


def stamp(module: nn.Module) -> tuple[tuple[int, int], ...]:
    """Address and version of every parameter: another one after any was written or replaced."""
    return tuple((parameter.data_ptr(), version_of(parameter)) for parameter in module.parameters())
