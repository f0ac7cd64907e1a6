"""A session is compiled for one model: it owns slot memory, not requests. Row by row: begin, step, finish or abort."""

from __future__ import annotations

import itertools
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from vivace.engine.denoiser import Denoiser
from vivace.engine.executors import Executor, Group
from vivace.engine.lower import Given, lower_plan
from vivace.engine.plan import Plan, Variant
from vivace.engine.pool import Entry, Pool
from vivace.engine.probe import Probe, probe
from vivace.engine.receipt import Receipt, RowRecord, Timeline, peak_memory
from vivace.errors import ArgumentError, DtypeError, ShapeError, StateError

_SEED_LIMIT = 1 << 64
_PICTURE_LIMIT = 1 << 32


@dataclass(frozen=True, slots=True)
class Request:
    """What one caller wants: pictures `index` .. `index + n - 1` of `seed` for a prompt.

    plan: None for the session's first, or any plan that binds to its model and shape. latents: unit normal
    [n, *latent] in place of the generator's draw 0. guidance_scale: in place of the plan's. image, mask: start picture
    and weights of plans that read `input:start` and `mask`. inputs: further numbers and tensors by name.
    """

    prompt: Any = None
    plan: Plan | None = None
    n: int = 1
    index: int = 0
    seed: int = 0
    latents: Tensor | None = None
    guidance_scale: float | None = None
    image: Any = None
    mask: Any = None
    inputs: dict[str, Any] = field(default_factory=dict)


@dataclass(slots=True, eq=False)
class State:
    """A request under way. `row`: rows done; `done`: all of them; everything it owns is lanes of the session's pool."""

    request: Request
    plan: Plan
    condition: Any
    entry: Entry
    lanes: tuple[int, ...]
    owner: int
    warnings: tuple[str, ...]
    began: float
    row: int = 0
    closed: str = ""
    records: list[Any] = field(default_factory=list)

    @property
    def done(self) -> bool:
        """Every row of the plan was executed."""
        return self.row >= len(self.plan.steps)


@dataclass(frozen=True, slots=True)
class Report:
    """What a step did for one state: the row executed, of how many, at which timestep; whether it was the last."""

    row: int
    rows: int
    timestep: float
    done: bool


@dataclass(frozen=True, slots=True)
class Result:
    """Finished pictures: PIL images, latents [n, ...], the receipt, and the condition the prompt found."""

    images: list[Any]
    latents: Tensor
    receipt: Receipt
    condition: Any = None


class Session:
    """Compiled for one model, one latent shape and one executor; serves any number of requests and threads.

    A result has the same bits whatever the batch size, neighbours or order of requests (same machine and versions).
    """

    _owners = itertools.count(1)

    def __init__(
        self,
        denoiser: Denoiser,
        plans: Sequence[Plan],
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
        self.pool = Pool(shape, state_dtype, denoiser.dtype, denoiser.device)
        self.timeline = Timeline(denoiser.device)
        if not plans:
            raise ArgumentError("compile: no plan given; pass one plan or several")
        self.plans = tuple(self._bind(plan) for plan in plans)
        self.pool.reserve(0, batch or 0)
        self.probe: Probe | None = None
        if probed:
            variants = tuple(dict.fromkeys(v for plan in self.plans for v in plan.variants))
            with self._threads():
                self.probe = probe(denoiser, variants, shape)
            setattr(executor, "one_by_one", self.probe.one_by_one)

    def __call__(
        self,
        prompt: Any = None,
        *,
        plan: Plan | None = None,
        n: int = 1,
        index: int = 0,
        seed: int = 0,
        latents: Tensor | None = None,
        guidance_scale: float | None = None,
        image: Any = None,
        mask: Any = None,
        callback: Callable[[Report], Any] | None = None,
    ) -> Result:
        """Run one request from begin to finish; `callback` gets a `Report` after every row, returning False aborts."""
        state = self.begin(Request(prompt, plan, n, index, seed, latents, guidance_scale, image, mask))
        try:
            while not state.done:
                (report,) = self.step([state])
                if callback is not None and callback(report) is False:
                    raise StateError(f"the callback stopped the run after row {report.row}")
        except BaseException:
            self.abort(state)
            raise
        return self.finish(state)

    def begin(self, request: Request) -> State:
        """Check a request, give it lanes, draw its start. Bad input raises before anything is taken."""
        with self._lock, self._threads():
            began = time.perf_counter()
            plan = self.plans[0] if request.plan is None else self._bind(request.plan)
            _check_request(request)
            condition = self.denoiser.encode(request.prompt)
            values, tensors, warnings = self._inputs(request, plan)
            given = Given(values, frozenset(tensors))
            side_car = {info.key: self.pool.tensor(info.sha256, plan.arrays[info.key]) for info in plan.tensors}
            entry = self.pool.enter(
                (plan, tuple(sorted(values.items())), given.tensors), lambda: lower_plan(plan, given, side_car)
            )
            slots = entry.lowered.slots
            lanes = self.pool.take(request.n, len(slots))
            state = State(request, plan, condition, entry, lanes, self._owner, warnings, began)
            for name, tensor in tensors.items():
                self.pool.state[slots[f"input:{name}"], list(lanes)] = tensor
            self._launch([state], None, -1, [entry.lowered.start])
            state.records.append(("begin", -1, began, time.perf_counter(), request.n) if not self.timeline.cuda else None)
            return state

    def step(self, states: Sequence[State]) -> tuple[Report, ...]:
        """Execute the next row of every state, grouped by structure, one launch a group; any mix of plans and rows."""
        with self._lock, self._threads():
            for state in states:
                self._own(state)
                if state.done:
                    raise StateError("step: a state has no rows left; finish it")
            if len({id(state) for state in states}) != len(states):
                raise StateError("step: a state is listed twice; list each once")
            groups: dict[Variant | None, list[State]] = {}
            for state in states:
                groups.setdefault(state.plan.steps[state.row].variant, []).append(state)
            for variant, members in groups.items():
                self._launch(members, variant, members[0].row, [s.entry.lowered.spans[s.row] for s in members])
            for state in states:
                state.row += 1
            return tuple(
                Report(s.row - 1, len(s.plan.steps), s.plan.steps[s.row - 1].timestep, s.done) for s in states
            )

    def finish(self, state: State) -> Result:
        """Latents, pictures and receipt of a finished state; its lanes are free afterwards."""
        with self._lock, self._threads():
            self._own(state)
            if not state.done:
                raise StateError(f"finish: row {state.row} of {len(state.plan.steps)} is next; step on, or abort")
            with self.timeline.span(state.records, "decode", -1, len(state.lanes)):
                slot = state.entry.lowered.slots["x"]
                latents = self.pool.state[slot, list(state.lanes)].clone()
                images = self.denoiser.to_images(latents)
            receipt = self._receipt(state)
            self._close(state, "finished")
            return Result(images, latents, receipt, state.condition)

    def abort(self, state: State) -> None:
        """Free a state's lanes at once, at any row; nothing of it is kept. Aborting twice does nothing."""
        with self._lock:
            if state.owner == self._owner and not state.closed:
                self._close(state, "aborted")

    # --- internals ---------------------------------------------------------------------------------------------------
    def _bind(self, plan: Plan) -> Plan:
        if plan not in self._bound:
            bound = self._expand(plan)
            self.executor.check(bound)
            self._bound[plan] = bound
        return self._bound[plan]

    def _launch(
        self, states: Sequence[State], variant: Variant | None, row: int, spans: Sequence[tuple[int, int]]
    ) -> None:
        sizes = [len(state.lanes) for state in states]
        owner = [n for n, size in enumerate(sizes) for _ in range(size)]
        kernel_rows = []
        for k in range(max((last - first for first, last in spans), default=0)):
            positions = tuple(p for p, n in enumerate(owner) if spans[n][0] + k < spans[n][1])
            kernel_rows.append((positions, tuple(states[owner[p]].entry.base + spans[owner[p]][0] + k for p in positions)))
        steps = [state.plan.steps[state.row] for state in states] if row >= 0 else [s.plan.steps[0] for s in states]
        records: list[Any] = []
        group = Group(
            variant,
            tuple(lane for state in states for lane in state.lanes),
            tuple(steps[n].timestep for n in owner),
            tuple(states[n].condition for n in owner),
            tuple(kernel_rows),
            tuple(_signed(state.request.seed) for state in states for _ in state.lanes),
            tuple(picture for state in states for picture in _pictures(state.request)),
            row,
            records,
        )
        self.executor.run(group, self.pool, self.timeline)
        for state in states:
            state.records.extend((name, state.row if row >= 0 else -1, *rest) for name, _, *rest in records)

    def _inputs(self, request: Request, plan: Plan) -> tuple[dict[str, float], dict[str, Tensor], tuple[str, ...]]:
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
                values[name] = _finite(name, float(value))
            else:
                tensors[name] = self._tensor(name, value, request.n)
        for name, ref in known.items():
            if name not in offered:
                if ref.default is None:
                    raise ArgumentError(f"request: the plan needs input {name!r}; give it")
                values[name] = ref.default
        if request.latents is not None:
            tensors["noise"] = self._tensor("latents", request.latents, request.n)
        return values, tensors, tuple(warnings)

    def _tensor(self, name: str, value: Any, n: int) -> Tensor:
        tensor = torch.as_tensor(value)
        if not tensor.is_floating_point():
            raise DtypeError(f"request: {name} is {tensor.dtype}; a float tensor is needed")
        shape = self.pool.shape
        fits = tuple(tensor.shape) == (n, *shape) or (name != "latents" and tensor.dim() <= len(shape))
        try:
            full = tensor.expand(n, *shape) if fits else None
        except RuntimeError:
            full = None
        if full is None:
            raise ShapeError(f"request: {name} has shape {tuple(tensor.shape)}; needs {(n, *shape)}")
        if not bool(torch.isfinite(tensor).all()):
            raise ArgumentError(f"request: {name} holds NaN or infinity; give finite values")
        return full.to(self.pool.device, self.pool.dtype)

    def _own(self, state: State) -> None:
        if state.owner != self._owner:
            raise StateError("the state belongs to another session; use the session that began it")
        if state.closed:
            raise StateError(f"the state was {state.closed}; begin the request again")

    def _close(self, state: State, how: str) -> None:
        state.closed = how
        state.entry.users -= 1
        self.pool.release(state.lanes)

    def _threads(self) -> _Threads:
        return _Threads(self.threads)

    def _receipt(self, state: State) -> Receipt:
        events = self.timeline.resolve([record for record in state.records if record is not None])
        rows: list[RowRecord] = []
        for i, step in enumerate(state.plan.steps):
            mine = {event.name: event for event in events if event.row == i}
            times = [mine[name].ms if name in mine else 0.0 for name in ("network", "solver_step")]
            rows.append(RowRecord(i, step.branches, mine["solver_step"].batch, *times))
        phases: dict[str, float] = {}
        for event in events:
            name = event.name if event.row >= 0 or event.name != "solver_step" else "start"
            phases[name] = phases.get(name, 0.0) + event.ms
        if "begin" in phases:
            phases["begin"] -= phases.get("start", 0.0)
        evaluated = [row for row in rows if row.branches]
        predicted = None
        if self.probe is not None:
            predicted = sum(self.probe.predict_ms(row.branches, state.request.n) for row in evaluated)
        return Receipt(
            plan_hash=state.plan.hash,
            executor=self.executor.name,
            device=str(self.pool.device),
            dtype=str(self.denoiser.dtype).removeprefix("torch."),
            threads=torch.get_num_threads(),
            n=state.request.n,
            nfe_planned=state.plan.nfe,
            nfe=len(evaluated),
            branch_evals_planned=state.plan.branch_evals,
            branch_evals=sum(len(row.branches) for row in evaluated),
            rows=tuple(rows),
            phases={name: round(ms, 4) for name, ms in phases.items()},
            measured_ms=(time.perf_counter() - state.began) * 1e3,
            predicted_ms=predicted,
            peak_memory=peak_memory(self.pool.device),
            pool=len(state.lanes) * self.pool.lane_bytes(),
            kernels=self.executor.kernels(self.pool),
            one_by_one=getattr(self.executor, "one_by_one", None),
            warnings=state.warnings,
            versions={"torch": torch.__version__},
            events=events,
        )


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


def _pictures(request: Request) -> Iterable[int]:
    return range(request.index, request.index + request.n)


def _signed(seed: int) -> int:
    """A 64-bit seed as the two's complement integer that torch stores."""
    return seed - _SEED_LIMIT if seed >= _SEED_LIMIT >> 1 else seed


def _check_request(request: Request) -> None:
    for name, value, low, high in (
        ("n", request.n, 1, 1 << 20),
        ("index", request.index, 0, _PICTURE_LIMIT - request.n + 1 if isinstance(request.n, int) else 1),
        ("seed", request.seed, 0, _SEED_LIMIT),
    ):
        if isinstance(value, bool) or not isinstance(value, int) or not low <= value < high:
            raise ArgumentError(f"request: {name} is {value!r}; an integer from {low} to {high - 1} is needed")


def _finite(name: str, value: float) -> float:
    if value != value or value in (float("inf"), float("-inf")):
        raise ArgumentError(f"request: {name} is {value}; a finite number is needed")
    return value
