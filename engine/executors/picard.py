"""Parallel in time: rows of an unchanged plan evaluated together, again and again until their inputs stand still.

An iteration replays the fused rows of a window with the predictions of the iteration before (no network), evaluates the
network at all the inputs that this gave in one batch, and replays again. The first row's input is exact, so its
prediction is. Rows behind it are final as far as their input moved by no more than the tolerance: the front goes there.
Noise is a function of (seed, picture, draw), so stochastic rows take part like others.
With tolerance 0 a row is final when its input stands still to the last bit; then the result is the sequential one, bit
for bit where a sample's prediction does not depend on the batch, and there are at most as many iterations as rows.
Source: Shih, Belkhale, Ermon, Sadigh and Anari 2023 (arXiv 2305.16317), algorithm 1, on the rows of any solver.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from vivace.engine.compiled import Hoisted
from vivace.engine.executors import Executor, Group
from vivace.engine.executors.steps import finish_rows
from vivace.engine.grouping import Part, group_of
from vivace.engine.iterate import Iterate
from vivace.engine.kept import KeptMemory, Seen
from vivace.engine.plan import Action, Plan, Rule, Step, Transform, Variant
from vivace.engine.pool import Pool
from vivace.engine.receipt import KernelUse, Timeline
from vivace.engine.token_rows import focused
from vivace.errors import ArgumentError, UnsupportedError

Inputs = dict[int, Tensor]  # network input [n, ...] by row


class PicardExecutor:
    """Picard iteration over another executor, which runs the network.

    Args:
        inner: evaluates; bits are its own.
        tolerance: root mean square change of a row's network input below which it is final, in units of the noise in
            that input (x_scale * sigma). 0: until nothing changes.
        window: evaluations made together, None: all that are left. Larger batches, fewer iterations, more evaluations.
    Raises: ArgumentError.
    """

    name = "picard"

    def __init__(self, inner: Executor, *, tolerance: float = 0.03, window: int | None = None) -> None:
        if isinstance(tolerance, bool) or not isinstance(tolerance, (int, float)) or not 0.0 <= tolerance < 1e6:
            raise ArgumentError(f"compile: tolerance is {tolerance!r}; a number >= 0 is needed")
        if window is not None and (isinstance(window, bool) or not isinstance(window, int) or window < 1):
            raise ArgumentError(f"compile: window is {window!r}; an integer >= 1 is needed, or None for all rows")
        self.inner, self.tolerance, self.window = inner, float(tolerance), window or 0
        self._planes: dict[tuple[int, ...], Pool] = {}

    # --- an executor like the one inside ---------------------------------------------------------------------------
    @property
    def one_by_one(self) -> str | None:
        """Why samples must not share a forward: then no batch is gained."""
        return self.inner.one_by_one

    @one_by_one.setter
    def one_by_one(self, reason: str | None) -> None:
        self.inner.one_by_one = reason

    @property
    def compiles(self) -> int:
        """Artefacts of the executor inside."""
        return self.inner.compiles

    def check(self, plan: Plan) -> None:
        """Rows whose evaluation needs nothing but their input. Raises UnsupportedError naming the first other one."""
        for i, step in enumerate(plan.steps):
            if why := _not_alone(step):
                raise UnsupportedError(
                    f"step {i}: the picard executor does not run {why}: its rows are evaluated together and more than "
                    "once; drop it from the plan, or use another backend"
                )
        self.inner.check(plan)

    def prepare(self, plan: Plan, shape: tuple[int, ...], samples: int, memory: KeptMemory) -> None:
        self.inner.prepare(plan, shape, samples * (min(self.window, plan.nfe) or plan.nfe), memory)

    def hoist(self, plan: Plan, condition: Any) -> Hoisted | None:
        return self.inner.hoist(plan, condition)

    def run(self, group: Group, pool: Pool, timeline: Timeline) -> None:
        self.inner.run(group, pool, timeline)

    def predict(self, group: Group, pool: Pool) -> tuple[Tensor, ...]:
        return self.inner.predict(group, pool)

    def evaluate(
        self, x: Tensor, timesteps: Sequence[float], conditions: Sequence[Any], variant: Variant
    ) -> tuple[Tensor, ...]:
        return self.inner.evaluate(x, timesteps, conditions, variant)

    def look(self, group: Group, pool: Pool, metric: str, params: Sequence[float]) -> Seen:
        return self.inner.look(group, pool, metric, params)

    def kernels(self, pool: Pool) -> tuple[KernelUse, ...]:
        return self.inner.kernels(pool)

    def report(self) -> dict[str, Any]:
        return self.inner.report() | {"network by": self.inner.name}

    # --- an iteration ----------------------------------------------------------------------------------------------
    def foresee(self, parts: Sequence[Part], timeline: Timeline) -> None:
        """One iteration for the parts whose next row is not final yet; final predictions go to `State.ahead`."""
        fronts = [part for part in parts if part.variant is not None and part.row not in part.state.ahead]
        if not fronts:
            return
        with timeline.span(fronts[0].state.records, "picard", fronts[0].row, len(fronts)), torch.inference_mode():
            before = [self._inputs(part) for part in fronts]
            self._evaluate(fronts, before)
            for part, inputs in zip(fronts, before, strict=True):
                self._advance(part, inputs)

    def _inputs(self, part: Part) -> Inputs:
        """Inputs of the rows of a part's window, by the last iterate; the very first one is evaluated alone."""
        state, steps = part.state, part.state.plan.steps
        if state.iterate is None:
            state.iterate = Iterate(self.window, self.tolerance)
        rows = [row for row in range(part.row, len(steps)) if steps[row].variant is not None]
        rows = rows[: self.window or len(rows)] if state.iterate.outs else rows[:1]
        if outs := state.iterate.outs:
            latest = outs[max(outs)]
            for row in rows:
                outs.setdefault(row, latest)
        return _replayed(part, rows[-1])

    def _evaluate(self, fronts: Sequence[Part], inputs: Sequence[Inputs]) -> None:
        """The network at all inputs, those of one variant in one batch; predictions go to the iterates."""
        wanted = [(part, row, x) for part, rows in zip(fronts, inputs, strict=True) for row, x in rows.items()]
        variants: dict[Variant, list[tuple[Part, int, Tensor]]] = {}
        found: list[tuple[Part, int, dict[str, Tensor]]] = []
        for part, row, x in wanted:
            variant = part.state.plan.steps[row].variant
            assert variant is not None
            variants.setdefault(variant, []).append((part, row, x))
        for variant, items in variants.items():
            group, plane = self._batch(variant, items)
            made = self.inner.predict(group, plane)
            first = 0
            for part, row, x in items:
                here = slice(first, first := first + len(x))
                outs = {name: out[here].clone() for name, out in zip(variant.branches, made, strict=True)}
                found.append((part, row, outs))
        for part, row, outs in found:
            assert part.state.iterate is not None
            part.state.iterate.outs[row] = outs
        for part, rows in zip(fronts, inputs, strict=True):
            iterate = part.state.iterate
            assert iterate is not None
            iterate.iterations += 1
            iterate.evaluations += len(rows)
            iterate.branches += sum(len(part.state.plan.steps[row].branches) for row in rows)

    def _batch(self, variant: Variant, items: Sequence[tuple[Part, int, Tensor]]) -> tuple[Group, Pool]:
        """Rows of several parts as the samples of one group, over a plane of their own."""
        groups = [group_of([replace(part, row=row, variant=variant, uses=())]) for part, row, _ in items]
        pool = items[0][0].state.pool
        plane = self._planes.setdefault(pool.shape, Pool(pool.shape, pool.dtype, pool.net_dtype, pool.device))
        count = sum(len(group.lanes) for group in groups)
        plane.reserve(0, count)
        torch.cat([x for _, _, x in items], out=plane.net[:count])

        def chain(name: str) -> tuple[Any, ...]:
            return tuple(value for group in groups for value in getattr(group, name))

        names = ("timesteps", "conditions", "rows", "hoisted", "seeds", "pictures")
        together: dict[str, Any] = {name: chain(name) for name in names}
        lanes = tuple(range(count))
        return replace(groups[0], lanes=lanes, kernel_rows=(), outs=variant.branches, given=None, **together), plane

    def _advance(self, part: Part, before: Inputs) -> None:
        """Hand out what is final: the first row, and those behind it whose inputs did not move."""
        state, last = part.state, max(before)
        assert state.iterate is not None
        after = _replayed(part, last)
        for row, x in before.items():
            step = state.plan.steps[row]
            if row != part.row and not _still(after[row], x, self.tolerance * step.x_scale * step.sigma):
                break
            state.ahead[row] = _of_row(step, state.iterate.outs[row])
        for row in [row for row in state.iterate.outs if row < part.row]:
            del state.iterate.outs[row]


def _replayed(part: Part, last: int) -> Inputs:
    """Network inputs of the evaluated rows from a part's on to `last`, by the iterate; the pool is left as it was."""
    state, steps = part.state, part.state.plan.steps
    assert state.iterate is not None
    pool, lanes = state.pool, list(state.lanes)
    found: Inputs = {part.row: pool.net[lanes].clone()}
    if last == part.row:
        return found
    slots, net = pool.state[:, lanes].clone(), found[part.row]
    try:
        for row in range(part.row, last):
            step = steps[row]
            outs = () if step.variant is None else _of_row(step, state.iterate.outs[row])
            group = group_of([replace(part, row=row, variant=step.variant, uses=())])
            finish_rows(group, pool, outs)
            if steps[row + 1].variant is not None:
                found[row + 1] = pool.net[lanes].clone()
    finally:
        pool.state[:, lanes] = slots
        pool.net[lanes] = net
    return found


def _of_row(step: Step, outs: dict[str, Tensor]) -> tuple[Tensor, ...]:
    """Predictions in the order of a row's branches; a branch that was not evaluated there is that of "cond"."""
    return tuple(outs.get(branch, outs["cond"]) for branch in step.branches)


def _still(after: Tensor, before: Tensor, limit: float) -> bool:
    """The root mean square change of every sample is at most `limit`; NaN is not."""
    change = (after.double() - before.double()).flatten(1).square().mean(1).sqrt()
    return bool((change <= limit).all())


def _not_alone(step: Step) -> str:
    """What of a row keeps it from being evaluated with others, and again; empty when nothing does."""
    if step.guard is not None:
        return f"a guard ({step.guard.metric!r})"
    transforms = [op.kind for op in step.ops if isinstance(op, Transform)]
    if transforms:
        return f"a transform ({transforms[0]!r})"
    if step.net_inputs:
        return "further network inputs"
    if step.variant is None:
        return ""
    if focused(step.variant) or step.variant.selector != "all":
        return "a row that computes some tokens"
    kept = [rule for rule in step.variant.rules if _keeps(rule)]
    return f"caching or merging (site {kept[0].site!r}, blocks {kept[0].blocks})" if kept else ""


def _keeps(rule: Rule) -> bool:
    """A rule that says more than a precision, or which attention maps are the identity."""
    return rule.action not in (None, Action.IDENTITY) or rule.site == "merge" or bool(rule.order) or rule.share != 1.0
