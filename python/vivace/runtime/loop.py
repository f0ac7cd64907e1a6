"""The rows of a plan for one request: guards decide, graphs are called, tokens put together, the step graph run."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from vivace.engine.looking import HEARD, estimates, hears, watched
from vivace.engine.noise import normals
from vivace.engine.plan import Plan, Variant
from vivace.engine.token_layout import Layout
from vivace.engine.token_rows import focused, tokens_of
from vivace.runtime.calling import Batch, Caller, Fed, Graphs, branches_of
from vivace.runtime.calls import Call, RowCalls, calls_of
from vivace.runtime.guards import Watch
from vivace.runtime.kept import KeptPlanes
from vivace.runtime.program import CLASS, INPUT, NET, TENSOR, Combine, Program, Stage
from vivace.runtime.tokens import Tokens, pixels_of
from vivace.runtime.transforms import adjusted

Array: TypeAlias = NDArray[Any]


@dataclass(frozen=True, slots=True)
class Asked:
    """A checked request: pictures by number, of a seed; conditions by branch and key; numbers and tensors [n, *latent]
    that the plan reads, by name, "noise" in place of draw 0 and "x_init" of the start among them. said: of the prompt,
    for receipts; warnings: of what has no effect."""

    pictures: tuple[int, ...]
    seed: int
    conditions: Mapping[str, Mapping[str, Array]]
    values: Mapping[str, float]
    tensors: Mapping[str, Array]
    said: Any = None
    warnings: tuple[str, ...] = ()


@dataclass(slots=True)
class RowRecord:
    """One executed row: graphs called with the rows of their batch, milliseconds of the network and of the step."""

    row: int
    calls: list[dict[str, Any]] = field(default_factory=list)
    network_ms: float = 0.0
    step_ms: float = 0.0
    tokens: int | None = None

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON data."""
        times = {"network_ms": round(self.network_ms, 3), "step_ms": round(self.step_ms, 3)}
        return {"row": self.row, "calls": self.calls, **times, "tokens": self.tokens}


@dataclass(frozen=True, slots=True)
class _Part:
    """Pictures of a row that run one variant, by these calls."""

    pictures: tuple[int, ...]
    variant: Variant
    calls: tuple[Call, ...]


class Run:
    """A request under way, row by row: `step` until `done`, then `slot("x")`. clock: of its phases, in seconds."""

    def __init__(self, graphs: Graphs, plan: Plan, layout: Layout, asked: Asked, program: Program) -> None:
        assert plan.binding is not None, "the plan of a pack is bound"
        self.graphs, self.plan, self.asked, self.layout = graphs, plan, asked, layout
        self.shape, self.row, n = plan.binding.latent_shape, 0, len(asked.pictures)
        self.records: list[RowRecord] = []
        self.clock: list[float] = []
        self.program, self.calls = program, calls_of(plan)
        tensors = {f"{INPUT}{name}": array.reshape(n, -1) for name, array in asked.tensors.items()}
        self.memory: dict[str, Array] = tensors
        self.tokens = self._tokens()
        guarded = any(step.guard is not None for step in plan.steps)
        self.watch = Watch(n, estimates(plan)) if guarded else None
        self.kept = KeptPlanes(branches_of(plan), n)
        self.caller = Caller(graphs, plan, Fed(asked.conditions, _fed(plan, asked.values), self.kept))
        self._stages(self.program.start)

    @property
    def done(self) -> bool:
        """Every row of the plan was executed."""
        return self.row >= len(self.plan.steps)

    def slot(self, name: str) -> Array:
        """A slot's contents, float32 [n, *latent], a copy."""
        return self.memory[name].reshape(-1, *self.shape).copy()

    def step(self) -> None:
        """Execute the next row."""
        step, record = self.plan.steps[self.row], RowRecord(self.row)
        began = time.perf_counter()
        if step.variant is not None:
            outs = self._evaluate(self.row, record)
            for slot, branch in zip(step.outs, step.branches, strict=True):
                self.memory[slot] = outs[branch].reshape(len(self.asked.pictures), -1)
        middle = time.perf_counter()
        self._stages(self.program.rows[self.row])
        record.network_ms, record.step_ms = (middle - began) * 1e3, (time.perf_counter() - middle) * 1e3
        self.records.append(record)
        self.row += 1

    def restore(self, slots: Mapping[str, Array]) -> None:
        """Let the rows so far have left these slots, [n, *latent] by name; what was kept of the network stays."""
        self.memory |= {name: array.astype(np.float32).reshape(len(array), -1) for name, array in slots.items()}
        if not self.done and (step := self.plan.steps[self.row]).variant is not None:
            self.memory[NET] = self.memory[step.x] * np.float32(step.x_scale)

    # --- the network -------------------------------------------------------------------------------------------------
    def _evaluate(self, row: int, record: RowRecord) -> dict[str, Array]:
        """Predictions [n, *latent] of the row's branches."""
        everyone = tuple(range(len(self.asked.pictures)))
        batch = Batch(row, everyone, self.memory[NET].reshape(-1, *self.shape))
        calls = self.calls[row]
        fired, batch = self._guarded(row, batch, calls, record)
        parts = self._parts(row, calls, fired, everyone)
        made = [self._part(part, batch, record) for part in parts]
        if len(parts) == 1:
            return made[0]
        joined = {branch: np.empty((len(everyone), *self.shape), np.float32) for branch in made[0]}
        for part, outs in zip(parts, made, strict=True):
            for branch, out in outs.items():
                joined[branch][list(part.pictures)] = out
        return joined

    def _guarded(
        self, row: int, batch: Batch, calls: RowCalls, record: RowRecord
    ) -> tuple[tuple[bool, ...] | None, Batch]:
        """Whether the row's guard fires, by picture, None without guard; and the batch with what a look left."""
        own, watch = self.plan.steps[row].guard, self.watch
        if watch is None:
            return None, batch
        if own is not None and own.metric in HEARD:
            return watch.recall(own, row), batch
        guard = watched(self.plan, row)
        if guard is None or calls.look is None:
            return None, batch
        stuck = watch.stuck(guard)
        goes_on = any(call.structure.begin for call in (*calls.own, *calls.otherwise))
        if stuck and not goes_on:
            return (watch.stay(row) if own is not None else None), batch
        n = len(batch.pictures)
        seen = self._call(calls.look, batch, record)
        states = {part: array.reshape(-1, n, *array.shape[1:]) for part, array in seen.hidden.items()}
        batch = replace(batch, hidden=states, looked=calls.look.branches)
        if stuck:
            return (watch.stay(row) if own is not None else None), batch
        assert seen.signal is not None, "a look gives a signal"
        signal = seen.signal.reshape(-1, n, *seen.signal.shape[1:])
        if own is not None:
            return watch.decide(own, signal, row), batch
        watch.computed(guard, signal)
        return None, batch

    def _parts(
        self, row: int, calls: RowCalls, fired: tuple[bool, ...] | None, everyone: tuple[int, ...]
    ) -> list[_Part]:
        """Pictures by what the guard said of them."""
        step = self.plan.steps[row]
        assert step.variant is not None, "rows that are evaluated have a variant"
        if fired is None or step.guard is None:
            return [_Part(everyone, step.variant, calls.own)]
        stays, goes = (tuple(j for j in everyone if fired[j] == wanted) for wanted in (False, True))
        parts = [_Part(stays, step.variant, calls.own), _Part(goes, step.guard.otherwise, calls.otherwise)]
        return [part for part in parts if part.pictures]

    def _part(self, part: _Part, batch: Batch, record: RowRecord) -> dict[str, Array]:
        """Predictions [m, *latent] for every out slot's branch, of all tokens, as the ops read them."""
        row, names = batch.row, self.plan.steps[batch.row].branches
        x = batch.x if len(part.pictures) == len(batch.x) else batch.x[list(part.pictures)]
        mine, chosen = replace(batch, pictures=part.pictures, x=x), None
        if self.tokens is not None and focused(part.variant):
            chosen = self.tokens.select(row, part.pictures, self._received(part.variant))
            mine, record.tokens = replace(mine, tokens=chosen[0]), chosen[0].shape[1]
        found: dict[str, Array] = {}
        for call in part.calls:
            prediction = self._call(call, mine, record).prediction
            assert prediction is not None, "a call that is no look predicts"
            m = len(part.pictures)
            found |= {branch: prediction[b * m : (b + 1) * m] for b, branch in enumerate(call.branches)}
        outs = {branch: found.get(branch, found["cond"]) for branch in names}
        if self.tokens is not None:
            outs = self.tokens.merge(row, part.pictures, outs, chosen)
        if self.watch is not None and hears(self.plan):
            outs = self.watch.cosines.heard(names, part.variant.branches, outs, part.pictures)
        return outs

    def _call(self, call: Call, batch: Batch, record: RowRecord) -> Any:
        rows = len(call.branches) * len(batch.pictures)
        record.calls.append({"graph": self.graphs.rows[call.structure].graph.name, "rows": rows})
        return self.caller.run(call, batch)

    def _received(self, variant: Variant) -> Array | None:
        """What a row that ranks by attention reads."""
        if variant.selector != "attention":
            return None
        block = next(rule.blocks[1] for rule in variant.rules if rule.site == "received") - 1
        return self.caller.received(f"received.{block}", variant.model)

    def _tokens(self) -> Tokens | None:
        if not tokens_of(self.plan):
            return None
        mask = self.asked.tensors.get("mask")
        return Tokens(self.plan, self.layout, self.asked.pictures, self.asked.seed, self.asked.values, mask)

    # --- the step ----------------------------------------------------------------------------------------------------
    def _stages(self, stages: Sequence[Stage]) -> None:
        for stage in stages:
            if isinstance(stage, Combine):
                self._combine(stage)
                continue
            reads = [self._read(slot) for slot in stage.reads]
            tensors = [self.plan.arrays[key].astype(np.float32) for key in stage.keys]
            made = adjusted(stage.kind, self.memory[stage.slot], reads, stage.numbers, tensors)
            self.memory[stage.slot] = made
        for name in [name for name in self.memory if name[0] == "#" and name != NET]:
            del self.memory[name]

    def _combine(self, stage: Combine) -> None:
        """One run of the step graph."""
        slots = np.stack([self._read(slot) for slot, _ in stage.terms], axis=1)
        results = np.empty((len(slots), len(stage.outs), slots.shape[2]), np.float32)
        given = {
            "slots": slots,
            "coefficients": np.ascontiguousarray(stage.coefficients[None]),
            "fields": self._fields(stage, slots.shape),
        }
        opened = self.graphs.step
        inputs = {port.name: given[port.source] for port in opened.graph.inputs}
        opened.runner.run(inputs, {opened.graph.outputs[0].name: results})
        self.memory |= {name: results[:, k] for k, name in enumerate(stage.outs)}

    def _fields(self, stage: Combine, shape: tuple[int, ...]) -> Array:
        if not any(fields for _, fields in stage.terms):
            return np.ones((1, 1, 1), np.float32)
        made = np.ones(shape, np.float32)
        for t, (_, fields) in enumerate(stage.terms):
            for name in fields:
                made[:, t] *= self._field(name)
        return made

    def _field(self, name: str) -> Array:
        """What a source is multiplied by, [n or 1, E]."""
        if name.startswith(TENSOR):
            array: Array = self.plan.arrays[name.removeprefix(TENSOR)]
            return array.astype(np.float32).reshape(1, -1)
        if name.startswith(CLASS):
            assert self.tokens is not None, "a row with coefficients by age has its tokens' classes"
            mine = self.tokens.classes == int(name.removeprefix(CLASS))
            pixels = np.broadcast_to(pixels_of(self.layout, mine), (len(mine), *self.shape))
            return pixels.reshape(len(mine), -1).astype(np.float32)
        return self._read(name)

    def _read(self, slot: str) -> Array:
        """A slot, [n, E]."""
        n, size = len(self.asked.pictures), int(np.prod(self.shape))
        if slot == "one":
            return np.ones((n, size), np.float32)
        if slot.startswith("noise:"):
            draw = int(slot.removeprefix("noise:"))
            if draw == 0 and f"{INPUT}noise" in self.memory:
                return self.memory[f"{INPUT}noise"]
            drawn = [normals(self.shape, self.asked.seed, picture=j, draw=draw) for j in self.asked.pictures]
            return np.stack(drawn).reshape(n, -1)
        if slot not in self.memory and slot.startswith(INPUT):
            return np.full((n, size), self.asked.values[slot.removeprefix(INPUT)], np.float32)
        return self.memory[slot]


def _fed(plan: Plan, values: Mapping[str, float]) -> dict[str, float]:
    """The numbers that the network is fed, by name; checked when the request was."""
    named = next((step.net_inputs for step in plan.steps if step.variant is not None), ())
    return {name: float(coef) if isinstance(coef, float) else values[coef.name] for name, coef in named}  # type: ignore[union-attr]
