"""Where the image tokens of a latent lie: as channels over places, which selections read, and element by element."""

from __future__ import annotations

from dataclasses import dataclass
from math import prod
from typing import Any


@dataclass(frozen=True, slots=True)
class Layout:
    """Latents [n, *shape] of which a token is `edges` elements along every axis, channels included.

    channels: the axis of `shape` that holds channels; places: pixels side by side in it behind each channel, where a
    token is one row of [N, channels * places]; 1 otherwise. Tokens are numbered row by row along the other axes.
    """

    shape: tuple[int, ...]
    edges: tuple[int, ...]
    channels: int = 0
    places: int = 1

    @property
    def packed(self) -> bool:
        """Every token is one row of the latent."""
        return len(self.shape) == 2 and self.channels == 1

    @property
    def patch(self) -> tuple[int, ...]:
        """Edge of a token along every axis of `planes` behind channels."""
        if self.packed:
            return 1, self.places
        return tuple(edge for axis, edge in enumerate(self.edges) if axis != self.channels)

    @property
    def grid(self) -> tuple[int, ...]:
        """Tokens along every axis of `planes` behind channels."""
        if self.packed:
            return self.shape[0], 1
        sizes = zip(self.shape, self.edges, strict=True)
        return tuple(size // edge for axis, (size, edge) in enumerate(sizes) if axis != self.channels)

    @property
    def tokens(self) -> int:
        """All tokens, N."""
        return prod(self.grid)

    @property
    def by_element(self) -> tuple[int, ...]:
        """The edges that `solver_step` takes: of all axes, or of those behind channels where these come first."""
        return self.edges if self.channels else self.edges[1:]

    def planes(self, latents: Any) -> Any:
        """Latents [n, *shape] as [n, channels, places...], a view."""
        if self.packed:
            return latents.unflatten(2, (-1, self.places)).transpose(1, 2)
        return latents.movedim(1 + self.channels, 1) if self.channels else latents

    def pixels(self, tokens: Any) -> Any:
        """A value of each token [n, N] for each element: [n, *shape] with 1 for the axis of channels."""
        n, axes = len(tokens), [
            (1, 1) if axis == self.channels else (size // edge, edge)
            for axis, (size, edge) in enumerate(zip(self.shape, self.edges, strict=True))
        ]  # fmt: skip
        cut = tokens.reshape(n, *(part for grid, _ in axes for part in (grid, 1)))
        wide = cut.expand(n, *(part for pair in axes for part in pair))
        return wide.reshape(n, *(grid * edge for grid, edge in axes))
