"""The layers of a UNet in the order they run: resnets with their attentions, samplers on the way down, the middle."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, NamedTuple

DOWN, UP = ("DownBlock2D", "CrossAttnDownBlock2D"), ("UpBlock2D", "CrossAttnUpBlock2D")


class Layer(NamedTuple):
    """One layer: the number of its block, its place in it, and the block's kind."""

    block: int
    place: int
    kind: str


def layers_of(module: Any, names: Iterable[tuple[str, Any]]) -> tuple[Layer, ...]:
    """The layers of a network whose blocks have these paths and records; () where they are not told apart."""
    found: list[Layer] = []
    for number, (name, entry) in enumerate(names):
        block = getattr(module, "_orig_mod", module).get_submodule(name)
        block = getattr(block, "_orig_mod", block)  # of one that torch compiled
        kind = type(block).__name__
        if entry.kind not in ("down", "mid", "up") or (entry.kind != "mid" and kind not in (*DOWN, *UP)):
            return ()
        count = 1 if entry.kind == "mid" else len(block.resnets)
        if entry.kind == "down":
            count += len(getattr(block, "downsamplers", None) or ())
        found += [Layer(number, place, entry.kind) for place in range(count)]
    return tuple(found)
