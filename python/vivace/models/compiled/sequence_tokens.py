"""Token rows of a `DitSequence`: patches and pixels of some tokens, and what their queries attend to.

ids: int32 [n, M], which tokens of each sample; rows R = branches * n are branch-major.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from vivace.engine.kept import Turn
from vivace.engine.tokens import Focus
from vivace.models.caching.planes import Place, keep, kept_whole
from vivace.models.tokens.native import check_row


class Keys(NamedTuple):
    """A turn of site "kv" for the attention that comes next."""

    turn: Turn | Place
    branches: tuple[str, ...]
    focus: Focus | None

    def attended(self, qkv: Tensor) -> Tensor | None:
        """Keep the keys and values of rows qkv [R, M, 3 W]; in a token row those of all tokens [R, N, 2 W]."""
        check_row(self.turn, self.focus)
        own = qkv[..., qkv.shape[-1] // 3 :]
        keep(self.turn, self.branches, own, focus=self.focus)
        return None if self.focus is None else kept_whole(self.turn, self.branches, own, self.focus)


def picked(cells: Tensor, ids: Tensor) -> Tensor:
    """[n, down, across, ...] at the tokens of each sample, [n, M, ...]."""
    samples, across = torch.arange(len(cells), device=ids.device)[:, None], cells.shape[2]
    return cells[samples, ids // across, ids % across]


def planes_of(pixels: Tensor, ids: Tensor, shape: tuple[int, int, int]) -> Tensor:
    """Pixels [R, M, p, p, C] of some tokens as planes [R, C, H, W], 0 elsewhere."""
    (rows, _, patch, _, channels), (_, height, width) = pixels.shape, shape
    planes = pixels.new_zeros(rows, channels, height // patch, patch, width // patch, patch)
    samples, places = torch.arange(rows, device=ids.device)[:, None], ids.repeat(rows // len(ids), 1)
    across = width // patch
    planes.permute(0, 2, 4, 3, 5, 1)[samples, places // across, places % across] = pixels
    return planes.view(rows, channels, height, width)
