"""A session is compiled for one model: it owns slot memory, not requests. Row by row: begin, step, finish or abort."""

from __future__ import annotations

import itertools
import math
import threading
import time
from collections import Counter, OrderedDict
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeAlias

import torch
from torch import Tensor

from vivace.engine.caching import caches
from vivace.engine.denoiser import Denoiser
from vivace.engine.executors import Executor
from vivace.engine.executors.picard import PicardExecutor
from vivace.engine.fed import with_inputs
from vivace.engine.following import Following, advance, finish, follow
from vivace.engine.grouping import Part, chosen, evaluated_ahead, group_of, grouped
from vivace.engine.guards import Watch
from vivace.engine.kept import Kept, KeptMemory, Seen
from vivace.engine.looking import estimates
from vivace.engine.lower import Given, lower_plan
from vivace.engine.merge_rows import guided, merges
from vivace.engine.merging import Merges
from vivace.engine.plan import Plan
from vivace.engine.pool import Pool
from vivace.engine.probe import Probe
from vivace.engine.receipt import Timeline, make_receipt
from vivace.engine.request import Report, Request, Result, State
from vivace.engine.sources.base import StepSource, opened
from vivace.engine.token_rows import tokens_of
from vivace.engine.tokens import Tokens
from vivace.errors import ArgumentError, DtypeError, ShapeError, StateError

Planned: TypeAlias = Plan | StepSource  # what is run, or what decides it row by row


class Session:
    """Compiled for one model and one executor; serves any number of requests and threads.

    `shape` is the latent of plans without one; plans bound to other shapes of the model run beside them. A result has
    the same bits whatever the batch size, neighbours or order of requests (same machine and versions).
    """

    kept_plans = 256  # bindings remembered
    kept_pools = 16  # latent shapes whose slot memory is kept although no request uses it
    _owners = itertools.count(1)

    def __init__(
        self,
        denoiser: Denoiser,
        plans: Sequence[Planned],
        executor: Executor,
        *,
        shape: tuple[int, ...],
        state_dtype: torch.dtype = torch.float32,
        threads: int | None = None,
        batch: int | None = None,
        probed: bool = True,
        expand: Callable[[Plan], Plan] | None = None,
    ) -> None:
        self.denoiser, self.executor, self.threads = denoiser, executor, threads
        self._expand = expand or (lambda plan: plan)
        self._lock = threading.RLock()
        self._owner = next(self._owners)
        self._bound: dict[Plan, Plan] = {}
        self.kept = KeptMemory()
        self._state_dtype, self._batch = state_dtype, batch or 1
        self._pools: OrderedDict[tuple[int, ...], Pool] = OrderedDict()
        self.pool = self._pool(shape)
        self.timeline = Timeline(denoiser.device)
        if not plans:
            raise ArgumentError("compile: no plan given; pass one plan or several")
        self.probe = Probe(denoiser, executor, shape) if probed else None
        with self._threads():
            self.plans = tuple(self._bind(opened(plan)) for plan in plans)
        self.source = None if isinstance(plans[0], Plan) else plans[0]  # that requests follow which name no plan
        self.pool.reserve(0, batch or 0)

    def __call__(
        self,
        prompt: Any = None,
        *,
        plan: Planned | None = None,
        n: int = 1,
        index: int = 0,
        seed: int = 0,
        latents: Tensor | None = None,
        guidance_scale: float | None = None,
        image: Any = None,
        mask: Any = None,
        inputs: Mapping[str, Any] | None = None,
        callback: Callable[[Report], Any] | None = None,
    ) -> Result:
        """Run one request from begin to finish; `callback` gets a `Report` after every row, returning False aborts."""
        given = dict(inputs or {})
        state = self.begin(Request(prompt, plan, n, index, seed, latents, guidance_scale, image, mask, given))
        try:
            while not state.done:
                (report,) = self.step([state])
                if callback is not None and callback(report) is False:
                    raise StateError(f"the callback stopped the run after row {report.row}")
            return self.finish(state)
        except BaseException:
            self.abort(state)
            raise

    def begin(self, request: Request) -> State:
        """Check a request, give it lanes, draw its start. Bad input raises before anything is taken."""
        with self._lock, self._threads():
            began = time.perf_counter()
            asked = request.plan or self.source
            if asked is not None and not isinstance(asked, Plan):
                return follow(self, request, asked)
            plan = self.plans[0] if asked is None else self._bind(asked)
            request.check()
            condition = self.denoiser.encode(request.prompt)
            pool = self._pool(self._shape_of(plan))
            values, tensors, warnings = self._inputs(request, plan, pool)
            condition = with_inputs(self.denoiser, plan, condition, values)
            given = Given(values, frozenset(tensors))
            side_car = pool.side_car(plan)
            entry = pool.enter(
                (plan, tuple(sorted(values.items())), given.tensors), lambda: lower_plan(plan, given, side_car)
            )
            slots = entry.lowered.slots
            try:
                lanes = pool.take(request.n, len(slots))
            except BaseException:
                entry.users -= 1
                raise
            state = State(request, plan, condition, pool, entry, lanes, self._owner, warnings, began, caches(plan))
            try:
                self._remember(state, values, tensors)
                with self.timeline.span(state.records, "hoist", -1, len(lanes)):
                    state.hoisted = self.executor.hoist(plan, condition)
                for name, tensor in tensors.items():
                    pool.state[slots[f"input:{name}"], list(lanes)] = tensor
                self._launch([Part(state, tuple(range(len(lanes))), -1, None)])
            except BaseException:
                self.abort(state)
                raise
            return state

    def step(self, states: Sequence[State]) -> tuple[Report, ...]:
        """Execute the next row of every state, grouped by structure, one launch a group; any mix of plans and rows.

        When the network fails in one group, the states of that group are as they were before the call; one whose guard
        had sent its pictures to several groups, of which some had run, is aborted, and so is one whose source cannot
        go on.
        """
        with self._lock, self._threads():
            for state in states:
                self._own(state)
                if state.done:
                    raise StateError("step: a state has no rows left; finish it")
            if len({id(state) for state in states}) != len(states):
                raise StateError("step: a state is listed twice; list each once")
            if followed := [state for state in states if isinstance(state, Following)]:
                told = advance(self, followed)
                rest = [state for state in states if not isinstance(state, Following)]
                told |= {id(state): report for state, report in zip(rest, self.step(rest), strict=True)}
                return tuple(told[id(state)] for state in states)
            parts = chosen(states, self._look)
            left = Counter(id(part.state) for part in parts)  # groups that a state's pictures are still to run in
            try:
                for group in grouped(parts):
                    if isinstance(self.executor, PicardExecutor):
                        self.executor.foresee(group, self.timeline)
                    else:
                        evaluated_ahead(group, self._predict)
                    self._launch(group)
                    left.subtract(id(part.state) for part in group)
                    for state in {id(part.state): part.state for part in group if not left[id(part.state)]}.values():
                        state.row += 1
            except BaseException:
                self._drop(parts, left)
                raise
            return tuple(Report(s.row - 1, len(s.plan.steps), s.plan.steps[s.row - 1].timestep, s.done) for s in states)

    def finish(self, state: State) -> Result:
        """Latents, pictures and receipt of a finished state; its lanes are free afterwards."""
        with self._lock, self._threads():
            self._own(state)
            if not state.done:
                raise StateError(f"finish: row {state.row} of {len(state.plan.steps)} is next; step on, or abort")
            if isinstance(state, Following):
                result = finish(self, state)
                self._close(state, "finished")
                return result
            with self.timeline.span(state.records, "decode", -1, len(state.lanes)):
                slots, lanes = state.entry.lowered.slots, list(state.lanes)
                kept = {name: state.pool.state[slots[name], lanes].clone() for name in state.plan.results}
                latents = kept.pop("x")
                images = self.denoiser.to_images(latents)
            receipt = make_receipt(
                state,
                self.timeline.resolve(state.records),
                measured_ms=(time.perf_counter() - state.began) * 1e3,
                probe=self.probe,
                executor=self.executor,
                denoiser=self.denoiser,
            )
            if state.iterate is not None:
                receipt = state.iterate.amend(receipt)
            self._close(state, "finished")
            heat = None if state.tokens is None else state.tokens.heat
            return Result(images, latents, receipt, state.condition, heat, kept, (state.plan,))

    def abort(self, state: State) -> None:
        """Free a state's lanes at once, at any row; nothing of it is kept. Aborting twice does nothing."""
        with self._lock:
            if state.owner == self._owner and not state.closed:
                self._close(state, "aborted")

    # --- internals ---------------------------------------------------------------------------------------------------
    def _bind(self, plan: Plan) -> Plan:
        bound = self._bound.get(plan)
        if bound is None:
            bound = self._expand(plan)
            self.executor.check(bound)
            self.executor.prepare(bound, self._shape_of(bound), self._batch, self.kept)
            if self.probe is not None:
                self.probe.cover(bound)
                self.executor.one_by_one = self.probe.one_by_one
            self._bound[plan] = bound
            if len(self._bound) > self.kept_plans:
                del self._bound[next(iter(self._bound))]
        return bound

    def _remember(self, state: State, values: Mapping[str, float], tensors: Mapping[str, Tensor]) -> None:
        """Memory for what the request keeps, and for what its guards compare with."""
        plan, spec = state.plan, self.denoiser.spec
        if state.caches.planes:
            state.kept = Kept(self.kept, state.caches, len(state.lanes))
            if spec.width and plan.binding is not None:
                state.kept.reserve((plan.binding.tokens, spec.width), state.pool.state[:0])
        if merges(plan):
            state.merges = Merges(state.seeds, state.pictures, guided(plan))
        if tokens_of(plan):
            like, seed = state.pool.net[:0], state.request.signed_seed
            where = spec.layout(state.pool.shape), like, values, tensors.get("mask")
            state.tokens = Tokens(plan, state.pictures, seed, *where)
            state.tokens.kept = state.kept
        if any(step.guard is not None for step in plan.steps):
            state.watch = Watch(len(state.lanes), estimates=estimates(plan))

    def _shape_of(self, plan: Plan) -> tuple[int, ...]:
        """The latent shape that a plan runs at."""
        return self.pool.shape if plan.binding is None else plan.binding.latent_shape

    def _pool(self, shape: tuple[int, ...]) -> Pool:
        """Slot memory of a latent shape; that of shapes long unused is freed."""
        pool = self._pools.get(shape)
        if pool is None:
            pool = self._pools[shape] = Pool(shape, self._state_dtype, self.denoiser.dtype, self.denoiser.device)
            for old in [key for key, kept in self._pools.items() if kept.idle and kept is not self._pools[shape]]:
                if len(self._pools) <= self.kept_pools:
                    break
                if self._pools[old] is not self.pool:
                    del self._pools[old]
        self._pools.move_to_end(shape)
        return pool

    def _drop(self, parts: Sequence[Part], left: Counter[int]) -> None:
        """Close states of which a row ran for some pictures and failed for others: they stand nowhere."""
        sizes = Counter(id(part.state) for part in parts)
        for state in {id(part.state): part.state for part in parts}.values():
            if 0 < left[id(state)] < sizes[id(state)]:
                self._close(state, "aborted when a row failed for some of its pictures")

    def _launch(self, parts: Sequence[Part]) -> None:
        """One row, or the start, of parts that share structure."""
        group, pool = group_of(parts), parts[0].state.pool
        self.executor.run(group, pool, self.timeline)
        for part in parts:
            part.state.records.extend([(name, part.row, *rest) for name, _, *rest in group.records])

    def _predict(self, parts: Sequence[Part]) -> tuple[Tensor, ...]:
        """Predictions of rows that are evaluated before their turn; the time is that of the first."""
        group, pool = group_of(parts), parts[0].state.pool
        with self.timeline.span(group.records, "network", group.row, len(group.lanes)):
            outs = self.executor.predict(group, pool)
        now = {id(part.state): part for part in reversed(parts)}
        for part in now.values():
            part.state.records.extend([(name, part.row, *rest) for name, _, *rest in group.records])
        return outs

    def _look(self, parts: Sequence[Part], metric: str, params: Sequence[float]) -> Seen:
        """The first blocks of parts that share structure, for their guards."""
        group, pool = group_of(parts), parts[0].state.pool
        with self.timeline.span(group.records, "look", group.row, len(group.lanes)):
            seen = self.executor.look(group, pool, metric, params)
        for part in parts:
            part.state.records.extend([(name, part.row, *rest) for name, _, *rest in group.records])
        return seen

    def _inputs(
        self, request: Request, plan: Plan, pool: Pool
    ) -> tuple[dict[str, float], dict[str, Tensor], tuple[str, ...]]:
        """Numbers and tensors of the request by input name, checked against what the plan reads."""
        known = {ref.name: ref for ref in plan.inputs}
        warnings = []
        offered: dict[str, Any] = dict(request.inputs)
        if request.image is not None:
            offered["start"] = self.denoiser.to_latent(request.image)
        if request.mask is not None:
            offered["mask"] = request.mask
        if request.guidance_scale is not None:
            if "guidance_scale" in known:
                offered["guidance_scale"] = float(request.guidance_scale)
            else:
                warnings.append("guidance_scale had no effect: the plan has no guidance; use passes.apply_guidance")
        values: dict[str, float] = {}
        tensors: dict[str, Tensor] = {}
        for name, value in offered.items():
            if name not in known and name != "x_init":
                raise ArgumentError(f"request: the plan reads no input {name!r}; it reads {sorted(known) or 'none'}")
            if isinstance(value, (int, float)):
                if not math.isfinite(value):
                    raise ArgumentError(f"request: {name} is {value}; a finite number is needed")
                values[name] = float(value)
            else:
                tensors[name] = _tensor(name, value, request.n, pool)
        for name, ref in known.items():
            if name not in offered:
                if ref.default is None:
                    raise ArgumentError(f"request: the plan needs input {name!r}; give it")
                values[name] = ref.default
        if request.latents is not None:
            tensors["noise"] = _tensor("latents", request.latents, request.n, pool)
        return values, tensors, tuple(warnings)

    def _own(self, state: State) -> None:
        if state.owner != self._owner:
            raise StateError("the state belongs to another session; use the session that began it")
        if state.closed:
            raise StateError(f"the state was {state.closed}; begin the request again")

    def _close(self, state: State, how: str) -> None:
        state.closed = how
        if isinstance(state, Following):
            for run in state.runs:
                self._close(run.state, how)
            return
        state.entry.users -= 1
        state.pool.release(state.lanes)
        if state.kept is not None:
            state.kept.release()

    def _threads(self) -> _Threads:
        return _Threads(self.threads)


def _tensor(name: str, value: Any, n: int, pool: Pool) -> Tensor:
    """A float tensor [n, ...] of the pool's shape, device and dtype, from what a request offers under `name`."""
    tensor = torch.as_tensor(value)
    if not tensor.is_floating_point():
        raise DtypeError(f"request: {name} is {tensor.dtype}; a float tensor is needed")
    shape = pool.shape
    fits = tuple(tensor.shape) == (n, *shape) or (name != "latents" and tensor.dim() <= len(shape))
    try:
        full = tensor.expand(n, *shape) if fits else None
    except RuntimeError:
        full = None
    if full is None:
        raise ShapeError(f"request: {name} has shape {tuple(tensor.shape)}; needs {(n, *shape)}")
    if not bool(torch.isfinite(tensor).all()):
        raise ArgumentError(f"request: {name} holds NaN or infinity; give finite values")
    return full.to(pool.device, pool.dtype)


class _Threads:
    """Intra-op threads of torch for the enclosed work only."""

    def __init__(self, threads: int | None) -> None:
        self.threads, self.before = threads, 0

    def __enter__(self) -> None:
        self.before = torch.get_num_threads()
        if self.threads is not None and self.threads != self.before:
            torch.set_num_threads(self.threads)

    def __exit__(self, *_: object) -> None:
        if self.threads is not None and self.threads != self.before:
            torch.set_num_threads(self.before)
