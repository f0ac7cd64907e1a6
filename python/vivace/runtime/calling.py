"""One call of a graph: its inputs gathered from where the manifest says that they come from, its outputs put away."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from vivace.engine.plan import Plan
from vivace.errors import ArgumentError, PackError, ShapeError
from vivace.runtime.calls import Call, Structure, calls_of
from vivace.runtime.kept import KeptPlanes, Place, Rows
from vivace.runtime.manifest import Graph, Port
from vivace.runtime.ort import Backend, Runner, shape_of, storage
from vivace.runtime.pack import Pack

Array: TypeAlias = NDArray[Any]
KEPT = ("kept", "kept_scale")
WINDOW = 64  # evaluations whose prepared tensors are held at a time


@dataclass(slots=True)
class Opened:
    """A graph and what runs it."""

    graph: Graph
    runner: Runner


@dataclass(slots=True)
class Graphs:
    """The graphs of a pack that its plan needs, opened. rows: by structure; the others by role."""

    rows: dict[Structure, Opened]
    prepare: list[Opened]
    positions: list[Opened]
    encode: list[Opened]
    step: Opened
    decode: Opened | None

    @classmethod
    def of(cls, pack: Pack, backend: Backend) -> Graphs:
        """All of them, so that what cannot be loaded is known before any work. Raises PackError."""

        def opened(role: str) -> list[Opened]:
            return [Opened(graph, backend.open(pack, graph)) for graph in pack.graphs(role)]

        rows = {one.graph.structure: one for one in opened("row") if one.graph.structure is not None}
        step, decode = opened("step"), opened("decode")
        if len(step) != 1 or len(decode) > 1:
            raise PackError(f"{pack.path}: {len(step)} graphs of role step, {len(decode)} of role decode; export again")
        others = opened("prepare"), opened("positions"), opened("encode")
        return cls(rows, *others, step[0], decode[0] if decode else None)


@dataclass(slots=True)
class Fed:
    """What calls of one request read beside x: conditions by branch and key, without an axis of rows; numbers that the
    network is fed; kept: what rows left; prepared: [window of evaluations, branches, ...] by key; tables: by key.
    """

    conditions: Mapping[str, Mapping[str, Array]]
    numbers: Mapping[str, float]
    kept: KeptPlanes
    prepared: dict[str, Array] = field(default_factory=dict)
    tables: dict[str, Array] = field(default_factory=dict)


@dataclass(slots=True)
class Outcome:
    """What a call gave, [rows, ...] each: prediction, or signal and hidden states by part."""

    prediction: Array | None = None
    signal: Array | None = None
    hidden: dict[int, Array] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Batch:
    """What one call is about: row `row` of the plan, pictures by number, their x [m, *latent] as the network takes it;
    tokens: ids [m, active] of a row of some; hidden: states [branches, n, ...] by part of a look at branches `looked`.
    """

    row: int
    pictures: tuple[int, ...]
    x: Array
    tokens: Array | None = None
    hidden: Mapping[int, Array] = field(default_factory=dict)
    looked: tuple[str, ...] = ()


class Caller:
    """Runs calls of a plan for one request."""

    def __init__(self, graphs: Graphs, plan: Plan, fed: Fed) -> None:
        assert plan.binding is not None, "the plan of a pack is bound"
        self.graphs, self.plan, self.fed = graphs, plan, fed
        self.shape = plan.binding.latent_shape
        self.dims = {"tokens": plan.binding.tokens}
        self.dims |= zip(("height", "width"), self.shape[-2:], strict=True) if len(self.shape) > 2 else ()
        self._evaluated = [i for i, step in enumerate(plan.steps) if step.variant is not None]
        self._window = range(0)  # of evaluations for which there are prepared tensors
        for opened in (*graphs.rows.values(), *graphs.prepare):
            for port in opened.graph.inputs:
                if port.source == "condition":
                    self._check(port)
        self._make_tables()
        self._prepare(0)

    def run(self, call: Call, batch: Batch) -> Outcome:
        """One forward; what it keeps is kept."""
        opened, model = self.graphs.rows[call.structure], call.structure.model
        rows = self._rows(call.branches, batch.pictures)
        inputs = {port.name: self._input(port, call, batch, rows) for port in opened.graph.inputs}
        dims = {**self.dims, "rows": len(rows), "active": 0 if batch.tokens is None else batch.tokens.shape[1]}
        read = {_place(model, port) for port in opened.graph.inputs if port.source in KEPT}
        outputs = {port.name: self._room(port, model, rows, dims, read) for port in opened.graph.outputs}
        made = opened.runner.run(inputs, outputs)
        outcome = Outcome()
        for port in opened.graph.outputs:
            value = made[port.name]
            if port.source in KEPT:
                place = _place(model, port)
                self.fed.kept.took(place, rows, value, place in read)
            elif port.source == "prediction":
                outcome.prediction = value
            elif port.source == "signal":
                outcome.signal = value
            elif port.source == "hidden":
                outcome.hidden[port.part] = value
        return outcome

    def received(self, key: str, model: str) -> Array:
        """What tokens received of attention in branch "cond", [n, N]."""
        everyone = tuple(range(self.fed.kept.pictures))
        return self.fed.kept.read(Place(model, "kept", key, 0, 0), self._rows(("cond",), everyone))

    def _rows(self, branches: Sequence[str], pictures: tuple[int, ...]) -> Rows:
        return Rows(tuple(self.fed.kept.branches.index(branch) for branch in branches), pictures)

    def _room(self, port: Port, model: str, rows: Rows, dims: Mapping[str, int], read: set[Place]) -> Array | None:
        """Memory for an output; None where its shape is known to nobody."""
        shape = shape_of(port, dims)
        if shape is None:
            return None
        if port.source in KEPT:
            place = _place(model, port)
            return self.fed.kept.room(place, rows, shape, storage(port.dtype), place in read)
        return np.empty(shape, storage(port.dtype))

    def _input(self, port: Port, call: Call, batch: Batch, rows: Rows) -> Array:
        step, times = self.plan.steps[batch.row], len(batch.pictures)
        if port.source == "latent":
            return _tiled(batch.x, len(call.branches))
        if port.source == "timestep":
            return np.full(len(rows), step.timestep, storage(port.dtype))
        if port.source == "number" and port.key in self.fed.numbers:
            return np.full(len(rows), self.fed.numbers[port.key], storage(port.dtype))
        if port.source in ("condition", "number"):  # a number that no row names is the prompt's
            return _each(np.stack([self._condition(branch, port) for branch in call.branches]), times)
        if port.source == "prepared":
            return self._prepared(port, rows, self._evaluated.index(batch.row), times)
        if port.source == "tokens" and batch.tokens is not None:
            return _tiled(batch.tokens, len(call.branches))
        if port.source in KEPT:
            return self.fed.kept.read(_place(call.structure.model, port), rows)
        if port.source == "weights":
            names = [kept.name for kept in call.structure.kept]
            return np.array(call.weights[names.index(port.key)], storage(port.dtype))
        if port.source == "hidden":
            looked = Rows(tuple(batch.looked.index(branch) for branch in call.branches), batch.pictures)
            return looked.of(batch.hidden[port.part])
        return self._table(port)

    def _check(self, port: Port) -> None:
        """Raise ArgumentError or ShapeError for a tensor of the prompt that a graph cannot read."""
        shapes = {branch: self._condition(branch, port).shape for branch in self.fed.kept.branches}
        for branch, shape in shapes.items():
            sizes = zip(shape, port.shape[1:], strict=False)
            if len(shape) + 1 != len(port.shape) or any(isinstance(n, int) and n != size for size, n in sizes):
                raise ShapeError(f"prompt: {port.key!r} of {branch!r} has shape {shape}; needs {port.shape[1:]}")
        if len(set(shapes.values())) > 1:
            raise ShapeError(f"prompt: {port.key!r} has shapes {shapes}; make them alike, filled to the longest")

    def _condition(self, branch: str, port: Port) -> Array:
        prompt = "cond" if branch == "perturbed" else branch  # the same prompt, other attention
        found = self.fed.conditions.get(prompt, {}).get(port.key)
        if found is None:
            raise ArgumentError(f"prompt: tensor {port.key!r} of branch {branch!r} is needed; give it")
        return stored(found, port.dtype)

    def _table(self, port: Port) -> Array:
        if port.source == "size":
            return np.array(self.shape[-2:], storage(port.dtype))
        raise PackError(f"a graph reads {port.name!r} from {port.source!r}, which this release does not know there")

    def _prepared(self, port: Port, rows: Rows, evaluation: int, times: int) -> Array:
        if port.key in self.fed.tables:
            return self.fed.tables[port.key]
        if evaluation not in self._window:
            self._prepare(evaluation)
        mine = Rows((evaluation - self._window.start,), rows.branches).of(self.fed.prepared[port.key])
        return _each(mine, times)

    def _make_tables(self) -> None:
        """What depends on the latent's shape alone."""
        for opened in self.graphs.positions:
            made = opened.runner.run({port.name: self._table(port) for port in opened.graph.inputs}, _unbound(opened))
            self.fed.tables |= {port.key: made[port.name] for port in opened.graph.outputs}

    def _prepare(self, first: int) -> None:
        """What does not depend on x, of the evaluations from `first` on and all branches in one forward."""
        rows, branches = self._evaluated[first : first + WINDOW], self.fed.kept.branches
        for opened in self.graphs.prepare:
            inputs = {port.name: self._for_all(port, rows, branches) for port in opened.graph.inputs}
            made = opened.runner.run(inputs, _unbound(opened))
            for port in opened.graph.outputs:
                value = made[port.name]
                self.fed.prepared[port.key] = value.reshape(len(rows), len(branches), *value.shape[1:])
        self._window = range(first, first + len(rows))

    def _for_all(self, port: Port, rows: Sequence[int], branches: Sequence[str]) -> Array:
        """An input of a graph that prepares, of every evaluation by branch."""
        if port.source == "timestep":
            times = np.array([self.plan.steps[row].timestep for row in rows], storage(port.dtype))
            return np.repeat(times, len(branches))
        if port.source == "condition":
            return _tiled(np.stack([self._condition(branch, port) for branch in branches]), len(rows))
        if port.source == "number" and port.key in self.fed.numbers:
            return np.full(len(rows) * len(branches), self.fed.numbers[port.key], storage(port.dtype))
        return self._table(port)


def branches_of(plan: Plan) -> tuple[str, ...]:
    """All branches that any call of a plan has, in the order of first use."""
    calls = [call for row in calls_of(plan) for call in (*row.own, *row.otherwise, *((row.look,) if row.look else ()))]
    return tuple(dict.fromkeys(branch for call in calls for branch in call.branches))


def stored(array: Array, dtype: str) -> Array:
    """An array as a port of a dtype takes it; float numbers are rounded once, to nearest even."""
    if dtype != "bfloat16" or array.dtype.kind != "f":
        return np.asarray(array.astype(storage(dtype), copy=False), order="C")
    bits = np.ascontiguousarray(array, np.float32).view(np.uint32)
    return ((bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16)).astype(np.uint16)


def _place(model: str, port: Port) -> Place:
    return Place(model, port.source, port.key, port.part, port.plane)


def _unbound(opened: Opened) -> dict[str, Array | None]:
    return {port.name: None for port in opened.graph.outputs}


def _tiled(array: Array, times: int) -> Array:
    """All rows of an array, so many times one after the other."""
    return np.ascontiguousarray(array) if times == 1 else np.concatenate([array] * times)


def _each(array: Array, times: int) -> Array:
    """Every row of an array so many times."""
    return array if times == 1 else array.repeat(times, axis=0)
