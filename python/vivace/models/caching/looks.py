"""Looks at the first blocks of a DiT: what a guard can measure there, and when the run that follows goes on from it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from vivace.errors import UnsupportedError

if TYPE_CHECKING:
    from torch import Tensor

    from vivace.engine.kept import Seen, Turn

METRICS = frozenset({"first_block", "modulated_input"})


def look_blocks(metric: str, params: Sequence[float], blocks: int) -> int:
    """How many blocks a look runs. Raises UnsupportedError for a metric that a DiT has not."""
    if metric not in METRICS:
        raise UnsupportedError(f"guard {metric!r}: a DiT is looked at by {' or '.join(sorted(METRICS))}")
    if metric == "modulated_input":
        return 0
    if not params or not 1 <= (block := int(params[0])) <= blocks:
        raise UnsupportedError(f"guard {metric!r}: looks at {params[:1]} blocks; the model has {blocks}")
    return block


def going_on(seen: Seen | None, turns: Sequence[Turn]) -> Seen | None:
    """Where a run with these turns goes on; None: from the start, since they speak of blocks that the look ran."""
    return None if seen is None or any(turn.use.blocks[0] < seen.block for turn in turns) else seen


def states_of(seen: Seen, branches: Sequence[str]) -> Tensor:
    """Hidden states [B, n, N, D] that a look left for these branches and the samples that are meant."""
    hidden: Tensor = seen.states
    wanted = [seen.branches.index(branch) for branch in branches]
    if wanted != list(range(len(hidden))):
        hidden = hidden[wanted]
    return hidden if seen.samples == tuple(range(hidden.shape[1])) else hidden[:, list(seen.samples)]
