"""Single layers of a UNet that do not run: what enters the layer behind them is kept, and given again.

A range of layers begins on the way down and ends before a layer on the way up. The layers ahead of it write all skips
that the layers behind it read, so that the hidden states which enter these are all that has to be kept.
Source: Ma et al. 2023 (DeepCache), section 3.2: "skip branches", one a layer.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

from torch import Tensor

from vivace.engine.denoiser import BlockCall, BlockOut
from vivace.errors import UnsupportedError
from vivace.models.caching.inside import Memory, Wrap, inside
from vivace.models.caching.wiring import HIDDEN
from vivace.models.pipelines.blocks import ModuleParts
from vivace.models.pipelines.unet_layers import Layer, layers_of
from vivace.models.pipelines.views import view

SITE = "layer"


def layers_in(parts: ModuleParts) -> tuple[Layer, ...]:
    """The layers of a network, () where they are not told apart."""
    names = (info.name for info in parts.blocks)
    return layers_of(parts.module, zip(names, parts.entries, strict=True))


def why_not_layers(parts: ModuleParts, first: int, last: int) -> str | None:
    """Why layers [first, last) cannot be given again; None when they can."""
    found, name = layers_in(parts), type(parts.module).__name__
    if not found:
        return f"blocks of {name} have no layers told apart; use site 'block'"
    up = next((i for i, layer in enumerate(found) if layer.kind == "up"), len(found))
    if first >= up or not up <= last < len(found):
        return f"layers {first}:{last} of {name} must begin before its first layer up, {up}, and end within these"
    if len(found) - last > first + 1:
        return (
            f"layers {first}:{last} of {name}: the {len(found) - last} layers behind them read skips of layers that do "
            f"not run; at most {first + 1} may run, one more than ahead"
        )
    return None


def check_added(kwargs: Mapping[str, Any], given: Iterable[str]) -> None:
    """Raise UnsupportedError for what an adapter adds inside down blocks, where one of a kind `given` is not run."""
    name = "down_intrablock_additional_residuals"
    if kwargs.get(name) is not None and "down" in given:
        raise UnsupportedError(
            f"{name}: added at the ends of down blocks, of which this row does not run some, or not all layers; use a "
            "plan without caches of blocks and layers"
        )


def ends_of(parts: ModuleParts, first: int, last: int) -> tuple[Layer, Layer]:
    """The first of layers [first, last), and the layer behind them."""
    found = layers_in(parts)
    return found[first], found[last]


def noting(block: Any, behind: Layer, memory: Memory) -> dict[str, Wrap]:
    """A stand-in, by path, of the module whose result enters a layer of `block` that is not its first."""
    path = "resnets" if block._modules.get("attentions") is None else "attentions"
    return {f"{path}.{behind.place - 1}": lambda child: view(child, __call__=partial(_noted, memory, child))}


def _noted(memory: Memory, child: Any, *args: Any, **kwargs: Any) -> Any:
    result = child(*args, **kwargs)
    memory.keep(HIDDEN, result[0] if isinstance(result, tuple) else result)
    return result


@dataclass(frozen=True)
class Cut:
    """A block of which some layers run: the first ones on the way down, the last ones on the way up.

    places: of those that run; written: skips that the whole block writes; memory: of what enters the first of them,
    None: what the block reads does.
    """

    places: slice
    written: int = 0
    memory: Memory | None = None

    def changes(self, call: BlockCall, within: Callable[[Any], Any] | None) -> dict[str, Any]:
        """How the block runs otherwise; within: what makes its stand-in besides."""
        changes: dict[str, Any] = {"inside": partial(_some, self.places, self.memory is None, within)}
        if self.memory is not None:
            changes["hidden"] = self.memory.give(HIDDEN, call.hidden)
            changes["skips"] = call.skips[: len(call.skips) - self.places.start]
        return changes

    def filled(self, out: BlockOut) -> BlockOut:
        """The block's result with as many skips as the whole block writes; nobody reads those that were not made."""
        missing = 0 if self.memory is not None else self.written - len(out.skips)
        return BlockOut(out.hidden, out.context, (*out.skips, *[nothing(out.hidden)] * missing))


def nothing(hidden: Tensor) -> Tensor:
    """What stands for a feature map that nobody reads: what a control network adds to it may have any size."""
    return hidden.new_zeros((hidden.shape[0], *(1 for _ in hidden.shape[1:])))


def _some(places: slice, down: bool, within: Callable[[Any], Any] | None, block: Any) -> Any:
    """A stand-in of a block that has these of its layers."""
    made = inside({}, block) if within is None else within(block)
    table = made._modules
    for name in ("resnets", "attentions"):
        if table.get(name) is not None:
            table[name] = table[name][places]
    if down:
        table["downsamplers"] = None
    return made
