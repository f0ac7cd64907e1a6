"""What it takes to run a foreign module with our ops."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any


def _nothing(module: Any) -> None:
    return None


@dataclass(frozen=True)
class Pattern:
    """A foreign class and its forward in our ops.

    run: run(ops, module, *args, **kwargs), the module's forward; NotImplemented, before it has done anything that
        others see, when this call needs the module's own. places: ops and how often they run in it. absorbs: names of
        children, norms and activations, that `run` reads and never calls. problem: why a module of this class must keep
        its own forward. mixed: also for tensors of another dtype than the model's.
    """

    run: Callable[..., Any]
    places: Callable[[Any], Mapping[str, int]]
    absorbs: Callable[[Any], tuple[str, ...]] = lambda module: ()
    problem: Callable[[Any], str | None] = _nothing
    mixed: bool = False


def places(**counts: int) -> Callable[[Any], Mapping[str, int]]:
    """The same counts for every module."""
    return lambda module: counts


def children(*names: str) -> Callable[[Any], tuple[str, ...]]:
    """The same names for every module."""
    return lambda module: names
