"""What compiled forms of the native DiT hear of caches: which branches, what they keep or give again, where from."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from vivace.engine.kept import Turn


class Part(NamedTuple):
    """Branches of a call that do the same with caches, in one forward.

    turns: what they keep and what is given again. states: hidden states [B, n, N, D] that a look at blocks [0, block)
    left; None: the forward begins with its stem.
    """

    branches: tuple[str, ...]
    turns: tuple[Turn, ...] = ()
    states: Tensor | None = None
    block: int = 0
