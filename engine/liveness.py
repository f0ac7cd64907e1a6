"""Which slots of a plan are read later: what has to be kept in memory between its rows."""

from __future__ import annotations

from collections.abc import Sequence, Set

from vivace.engine.plan import Op, Plan, reads, writes


def live_after(plan: Plan) -> list[set[str]]:
    """Slots read later, before they are written again: entry 0 after `init`, entry i + 1 after row i."""
    live = set(plan.results)
    after = [live]
    for step in reversed(plan.steps):
        live = live_before(step.ops, live)
        if step.variant is not None:
            live = (live - set(step.outs)) | {step.x}
        after.append(live)
    return after[::-1]


def live_before(ops: Sequence[Op], live: Set[str]) -> set[str]:
    """Slots read by `ops` or, being in `live`, behind them, as they are before; "one" and noise are in no memory."""
    out = set(live)
    for op in reversed(ops):
        out.discard(writes(op))
        out.update(slot for slot in reads(op) if slot != "one" and not slot.startswith("noise:"))
    return out
