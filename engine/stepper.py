"""A plan driven from outside: somebody else owns the loop and evaluates the network, this does the rows' arithmetic.

Pipelines keep their own loop, so here a row is pushed: `advance(outs)` takes the network's outputs of the next row and
returns the state the following one reads. The slots, the lowering and the fused step are those of a session.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from vivace.engine.executors.maps import run_maps
from vivace.engine.lower import Given, Lowered, lower_plan
from vivace.engine.passes.guidance import rename
from vivace.engine.plan import Op, Plan, Step, reads, writes
from vivace.engine.pool import Pool
from vivace.errors import UnsupportedError
from vivace.kernels.sample_adjust import sample_adjust
from vivace.kernels.solver_step import solver_step

Draw = Callable[[], Tensor]


class Stepper:
    """The rows of one run of a plan over a batch.

    Args:
        plan: verified; its `init` is not used: the run starts from the state that `start` is handed.
        like: tensor [n, ...] of the state outside; what `advance` returns has its shape, dtype and device.
        values: numbers of the request by input name; others take the plan's defaults.
        draw: makes the next normal draw [n, ...], in the order in which the rows read them.
        dtype: of the state inside, float32 or float64.
        lowered: tables of this plan by the numbers of the request; read and filled, so that runs share them.
        patch: edge of an image token along every spatial axis, of plans with token rows.
    Raises: UnsupportedError for an input without default, or an op beyond the fused step.
    """

    kept = 16  # tables kept in `lowered`

    def __init__(
        self,
        plan: Plan,
        like: Tensor,
        values: Mapping[str, float],
        draw: Draw,
        dtype: torch.dtype = torch.float32,
        lowered: dict[Any, Lowered] | None = None,
        patch: Sequence[int] = (),
    ) -> None:
        self.patch = tuple(patch)
        self.plan, self._draw, self._dtype = plan, draw, like.dtype
        driven, self._draws = _driven(plan)
        tensors = frozenset(name for row in self._draws for name in row) | {"x_init"}
        numbers = {ref.name: values.get(ref.name, ref.default) for ref in driven.inputs if ref.name not in tensors}
        if missing := [name for name, number in numbers.items() if number is None]:
            raise UnsupportedError(f"the plan needs input {missing[0]!r}, which a pipeline's call does not give")
        given = Given({name: float(number) for name, number in numbers.items() if number is not None}, tensors)
        self._pool = Pool(tuple(like.shape[1:]), dtype, like.dtype, like.device)
        side_car = self._pool.side_car(plan)
        lowered, numbers_key = {} if lowered is None else lowered, tuple(sorted(given.values.items()))
        if numbers_key not in lowered:
            if len(lowered) >= self.kept:
                lowered.pop(next(iter(lowered)))
            lowered[numbers_key] = lower_plan(driven, given, side_car)
        self._lowered = lowered[numbers_key]
        self._pool.enter(None, lambda: self._lowered)
        self._slots = self._lowered.slots
        self._n = like.shape[0]
        self._lanes = torch.arange(self._n)
        self._kernel_rows = [torch.full((self._n,), row) for row in range(len(self._lowered.table))]
        self._pool.reserve(len(self._slots), self._n)
        self._adjust = self._pool.state.new_empty(self._n, 3)  # of a reduction row, for the rows after it
        self.row = 0

    @property
    def done(self) -> bool:
        """No row is left."""
        return self.row >= len(self.plan.steps)

    @property
    def pool_bytes(self) -> int:
        """Bytes of the slots."""
        return self._n * self._pool.lane_bytes()

    @property
    def draws(self) -> bool:
        """Some row reads noise."""
        return any(self._draws)

    @property
    def drew_last(self) -> bool:
        """The last row reads noise."""
        return bool(self._draws[-1])

    @property
    def results(self) -> dict[str, Tensor]:
        """What the plan's other results hold now, [n, ...] by name, after the last row."""
        return {name: self._pool.state[self._slots[name]].clone() for name in self.plan.results[1:]}

    @property
    def step(self) -> Step:
        """The row that `advance` executes next."""
        return self.plan.steps[self.row]

    def start(self, x: Tensor, others: Mapping[str, Tensor] | None = None) -> Tensor:
        """Begin from state x [n, ...]; returns what the first evaluation reads, before its `x_scale`.

        others: the further slots that the plan's `init` fills, [n, ...] by name.
        """
        slots = {**(others or {}), "x": x}
        if missing := {writes(op) for op in self.plan.init} - slots.keys():
            raise UnsupportedError(f"the plan starts from slot {min(missing)!r} too, which this run is not given")
        for name, value in slots.items():
            self._pool.state[self._slots[name]] = value.to(self._pool.dtype)
        return self._idle(x)

    def put(self, x: Tensor) -> None:
        """Replace the state the next row reads by x [n, ...]; history stays."""
        self._pool.state[self._slots[self.step.x]] = x.to(self._pool.dtype)

    def advance(self, outs: Sequence[Tensor], classes: Tensor | None = None) -> Tensor:
        """Execute the next row on its network outputs, one [n, ...] a branch, and the rows without evaluation after it.

        classes: of the image tokens, uint8 [n, N], for rows with coefficients by token age.
        Returns: a new tensor [n, ...]: the state that the following evaluation reads (before its `x_scale`), or the
        result after the last row.
        """
        return self._idle(self._execute([out.contiguous() for out in outs], classes))

    def _idle(self, x: Tensor) -> Tensor:
        while not self.done and self.step.variant is None:
            x = self._execute(())
        return x

    def _execute(self, outs: Sequence[Tensor], classes: Tensor | None = None) -> Tensor:
        for name in self._draws[self.row]:
            self._pool.state[self._slots[f"input:{name}"]] = self._draw().to(self._pool.dtype)
        lowered, pool = self._lowered, self._pool
        feed = torch.empty((self._n, *pool.shape), dtype=self._dtype, device=pool.device)
        for kernel_row in lowered.launches(lowered.spans[self.row]):
            if kernel_row in lowered.maps:
                run_maps(pool, [kernel_row] * self._n, range(self._n))
                continue
            by_class: dict[str, Any] = {}
            if kernel_row in lowered.fans:
                assert classes is not None, f"step {self.row} has coefficients by token age and is told no classes"
                by_class = {"classes": classes, "patch": self.patch}
            call = (pool.state, outs, pool.table, self._kernel_rows[kernel_row], self._lanes)
            if lowered.reduces(kernel_row):
                self._adjust = sample_adjust(*call, tensors=pool.tensors)
            else:
                solver_step(*call, net=feed, tensors=pool.tensors, adjust=self._adjust, **by_class)
        self.row += 1
        if not self.done and self.step.variant is not None:
            return feed
        return pool.state[self._slots["x"]].to(self._dtype, copy=True)


def _driven(plan: Plan) -> tuple[Plan, tuple[tuple[str, ...], ...]]:
    """The plan with draws as inputs and unscaled network inputs, and the names of the draws that each row reads."""
    steps, draws = [], []
    for step in plan.steps:
        noises = dict.fromkeys(slot for op in step.ops for slot in reads(op) if slot.startswith("noise:"))
        names = {noise: f"input:draw{k}" for k, noise in enumerate(noises)}
        ops: tuple[Op, ...] = tuple(rename(op, names) for op in step.ops)
        steps.append(replace(step, ops=ops, x_scale=1.0))
        draws.append(tuple(name.removeprefix("input:") for name in names.values()))
    return replace(plan, steps=tuple(steps), init=()), tuple(draws)  # `Stepper.start` fills the first slot
