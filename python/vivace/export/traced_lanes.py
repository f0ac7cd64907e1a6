"""What a traced forward keeps and is given: tensors of a graph instead of lanes of memory."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from vivace.engine.caching import Use
from vivace.engine.kept import DTYPES, Turn
from vivace.engine.plan import Action
from vivace.errors import UnsupportedError
from vivace.export.traced_tokens import TracedActive
from vivace.kernels.quantize_tokens.reference import MOST, quotients
from vivace.runtime.calls import Kept, Structure

MOST_FLOAT8 = 448.0
Key = tuple[str, str, int]  # model, name of the kept thing, part


@dataclass(frozen=True)
class Part:
    """What is kept of one part: shape of one row with all tokens, dtype of the network that gives it; text: as long as
    the prompt is."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    text: bool = False


@dataclass
class Ledger:
    """Parts that forwards keep, by model, name and part; filled by forwards that are run beforehand."""

    parts: dict[Key, Part] = field(default_factory=dict)

    def tell(self, tokens: int) -> None:
        """Parts of transformers that hold more than the image tokens hold text."""
        self.parts = {key: replace(it, text=it.text or it.shape[0] != tokens) for key, it in self.parts.items()}

    def of(self, model: str, kept: Kept) -> dict[int, Part]:
        """The parts of a kept thing. Raises UnsupportedError where no row keeps it."""
        found = {part: it for (m, name, part), it in sorted(self.parts.items()) if (m, name) == (model, kept.name)}
        if not found:
            raise UnsupportedError(f"export: {kept.name} is given by a row of {model!r}, and no graph keeps it")
        return found


def starts(structures: Sequence[Structure]) -> dict[tuple[str, int], int]:
    """Of site "block", by model and last block: the first block of the longest range that is given with it."""
    found: dict[tuple[str, int], int] = {}
    for structure in structures:
        for kept in structure.kept:
            key = structure.model, kept.last
            if kept.site == "block" and kept.gives:
                found[key] = min(kept.first, found.get(key, kept.first))
    return found


def turn_of(kept: Kept, model: str) -> Turn:
    """A turn as networks are told; no samples are in it."""
    action = Action.COMPUTE if not kept.gives else Action.REUSE if kept.terms == 1 else Action.FORECAST
    planes = max(kept.made + 1, kept.terms)
    use = Use(kept.site, (kept.first, kept.last), action, ("cond",), kept.made, planes, kept.terms, kept.store)
    return Turn(use, model, ())


def store_dtype(kept: Kept, given: torch.dtype) -> torch.dtype:
    """In which dtype a plane is kept."""
    if kept.store is not None:
        return DTYPES[kept.store]
    return given if kept.site == "kv" else torch.float32


class Noted:
    """Memory of a turn in a forward that is run beforehand: notes what it is handed, and gives zeros."""

    def __init__(self, kept: Kept, model: str, ledger: Ledger, start: int) -> None:
        self.use, self.kept, self.model, self.ledger = turn_of(kept, model).use, kept, model, ledger
        self.first = start
        self.active: TracedActive | None = None
        self.behind = False

    def at(self, active: TracedActive | None, behind: bool) -> Noted:
        """The memory of a forward of these tokens; behind: text lies behind the image's in what holds both."""
        self.active, self.behind = active, behind
        return self

    def start(self) -> int:
        """The first block of the longest range that is given with this cell."""
        return self.first

    def keep(self, part: int, fresh: Tensor, base: Tensor | None = None, text: bool = False) -> None:
        """Note the shape, unless it is known from a row with all tokens."""
        if self.active is None or text:
            self.note(part, fresh, text)

    def note(self, part: int, fresh: Tensor, text: bool) -> None:
        """Note the shape and dtype of a part."""
        self.ledger.parts[self.model, self.kept.name, part] = Part(tuple(fresh.shape[1:]), fresh.dtype, text)

    def give(
        self,
        part: int,
        like: Tensor,
        shape: tuple[int, ...] | None = None,
        hidden: Tensor | None = None,
        text: bool = False,
    ) -> Tensor:
        """Zeros, or `hidden` as it is."""
        if hidden is not None:
            return hidden
        held = self.ledger.of(self.model, self.kept)[part].shape if shape is None else shape
        return like.new_zeros((like.shape[0], *held))

    def whole(self, part: int, like: Tensor) -> Tensor:
        """Zeros of all tokens."""
        return like.new_zeros((like.shape[0], *self.ledger.of(self.model, self.kept)[part].shape))

    def replace(self, part: int, plane: Tensor) -> None:
        """Note the shape of keys and values, unless it is known from a row with all tokens."""
        if self.active is None:
            self.note(part, plane, False)


class Traced(Noted):
    """Memory of a turn in a traced forward.

    planes: by part and plane the tensors [R, ...] that come in; scales: the same of store "int8", [R, ..., 1] without
    the last axis; weights: [terms] on planes, None: plane 0 as it is. After the forward `made` and `made_scales` are
    what goes out.
    """

    planes: Mapping[tuple[int, int], Tensor]
    scales: Mapping[tuple[int, int], Tensor]
    weights: Tensor | None

    def fill(
        self,
        planes: Mapping[tuple[int, int], Tensor],
        scales: Mapping[tuple[int, int], Tensor],
        weights: Tensor | None,
    ) -> Traced:
        """The tensors of this forward."""
        self.planes, self.scales, self.weights = planes, scales, weights
        self.made: dict[tuple[int, int], Tensor] = {}
        self.made_scales: dict[tuple[int, int], Tensor] = {}
        return self

    def keep(self, part: int, fresh: Tensor, base: Tensor | None = None, text: bool = False) -> None:
        """New planes of `fresh` [R, ...], or fresh - base; of a row of some tokens these, put among the others."""
        f = fresh.float() if base is None else fresh.float() - base.float()
        some = self.active is not None and not text
        for j in range(self.kept.made + 1):
            old = self._plane(part, j, text) if j < self.kept.made else None
            values, scale = rounded(f, store_dtype(self.kept, fresh.dtype))
            self.made[part, j] = self._among(self.planes[part, j], values) if some else values
            if scale is not None:
                self.made_scales[part, j] = self._among(self.scales[part, j], scale) if some else scale
            if old is not None:
                f = f - old

    def give(
        self,
        part: int,
        like: Tensor,
        shape: tuple[int, ...] | None = None,
        hidden: Tensor | None = None,
        text: bool = False,
    ) -> Tensor:
        """What was kept or is forecast, [R, ...] in the dtype of `like`, plus `hidden`."""
        v = self._plane(part, 0, text)
        if self.weights is not None:
            v = v * self.weights[0]
            for j in range(1, self.kept.terms):
                v = v + self._plane(part, j, text) * self.weights[j]
        return (v if hidden is None else hidden.float() + v).to(like.dtype)

    def whole(self, part: int, like: Tensor) -> Tensor:
        """Plane 0 of all tokens as it is kept."""
        return self.planes[part, 0]

    def replace(self, part: int, plane: Tensor) -> None:
        """What plane 0 is now, with all tokens."""
        self.made[part, 0] = plane.to(store_dtype(self.kept, plane.dtype))

    def _plane(self, part: int, j: int, text: bool) -> Tensor:
        """Plane j in float32, of a row of some tokens these."""
        plane = self.planes[part, j]
        scale = self.scales.get((part, j))
        if self.active is not None and not text:
            plane = self.active.gather(plane, self.behind)
            scale = None if scale is None else self.active.gather(scale, self.behind)
        return plane.float() if scale is None else plane.float() * scale[..., None]

    def _among(self, plane: Tensor, values: Tensor) -> Tensor:
        assert self.active is not None, "a row of some tokens"
        return self.active.put(plane, values, self.behind)


def rounded(values: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor | None]:
    """float32 values as they are kept, and the scales [...] of int8."""
    if dtype is torch.int8:
        quotient, step = quotients(values, None, None, MOST)
        return quotient.round().to(dtype), step
    if dtype is torch.float8_e4m3fn:
        return values.clamp(-MOST_FLOAT8, MOST_FLOAT8).to(dtype), None
    return values.to(dtype), None
