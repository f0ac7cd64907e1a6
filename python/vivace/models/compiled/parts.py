"""What compiled forms of the native DiT hear of caches: which branches, what they keep or give again, where from."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from vivace.engine.kept import Turn
from vivace.engine.tokens import Focus
from vivace.models.caching.planes import Place


class Part(NamedTuple):
    """Branches of a call that do the same with caches, in one forward.

    turns: what they keep and what is given again, in `DitSequence` perhaps as places. states: hidden states
    [B, n, N, D] that a look at blocks [0, block) left; None: the forward begins with its stem. focus: the tokens that a
    token row computes; None: all.
    """

    branches: tuple[str, ...]
    turns: tuple[Turn | Place, ...] = ()
    states: Tensor | None = None
    block: int = 0
    focus: Focus | None = None
