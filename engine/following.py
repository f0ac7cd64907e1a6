"""A request that follows a source of steps: every picture a state of its own, its rows written as they are decided.

A picture's rows live in one entry of the pool's table. New rows are new numbers there, so that pictures at steps of
different lengths share every launch. Each call of `Session.step` evaluates the network once for every picture that is
not finished. What is tried again starts from the state and the prediction of the try before.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from vivace.engine.caching import caches
from vivace.engine.executors.picard import PicardExecutor
from vivace.engine.grouping import grouped, whole
from vivace.engine.lower import Given, lower_plan
from vivace.engine.plan import Plan
from vivace.engine.receipt import Receipt, make_receipt
from vivace.engine.request import Report, Request, Result, State
from vivace.engine.sources.base import START, Course, Measure, StepSource, Window, opened
from vivace.errors import ShapeError, StateError, UnsupportedError

if TYPE_CHECKING:
    from vivace.engine.session import Session


@dataclass(slots=True, eq=False)
class Run:
    """One picture under way.

    state: its lane and the plan of its window; start, before: what its next measure compares with; kept: prediction of
    the window's first row; mark: of its records those already numbered by the rows taken; evaluated, branches: so far.
    """

    course: Course
    state: State
    given: Given
    window: Window | None
    start: Tensor
    before: Tensor
    low: Tensor | None = None
    kept: tuple[Tensor, ...] = ()
    mark: int = 0
    evaluated: int = 0
    branches: int = 0

    @property
    def done(self) -> bool:
        """The course has ended."""
        return self.window is None

    @property
    def x(self) -> Tensor:
        """Slot x of its lane, [*latent]."""
        return self.slot("x")

    def slot(self, name: str) -> Tensor:
        """A slot of its lane, [*latent]."""
        return self.state.pool.state[self.state.entry.lowered.slots[name], self.state.lanes[0]]


@dataclass(slots=True, eq=False)
class Following(State):
    """The state of a request with a source: that of its first picture, with the lanes of all, and all the runs."""

    source: StepSource | None = None
    runs: list[Run] = field(default_factory=list)

    @property
    def done(self) -> bool:
        """Every picture is finished."""
        return all(run.done for run in self.runs)


def follow(session: Session, request: Request, source: StepSource) -> Following:
    """Begin a request with a source: a state for every picture, all at the start. Raises as `Session.begin`."""
    if isinstance(session.executor, PicardExecutor):
        raise UnsupportedError(
            f"request: {source.name} decides rows by those before, the picard executor runs them together; use another "
            "backend"
        )
    request.check()
    began, plan = time.perf_counter(), opened(source)
    runs: list[Run] = []
    try:
        rank = 1 + len(session._shape_of(plan))
        for j in range(request.n):
            runs.append(_begun(session, _of_picture(request, plan, j, rank), source))
    except BaseException:
        for run in runs:
            session.abort(run.state)
        raise
    first = runs[0].state
    lanes = tuple(run.state.lanes[0] for run in runs)
    given = first.plan, first.condition, first.pool, first.entry, lanes, first.owner, first.warnings, began
    return Following(request, *given, first.caches, source=source, runs=runs)


def advance(session: Session, followed: Sequence[Following]) -> dict[int, Report]:
    """One evaluation for every unfinished picture, and what is decided by it; a report by id of the state.

    Raises: StateError when a source cannot go on. Its request is aborted, the others are one evaluation further.
    """
    owners = {id(run): state for state in followed for run in state.runs}
    runs = [run for state in followed for run in state.runs if not run.done]
    failed: list[StateError] = []
    _evaluate(session, runs)
    try:
        while runs:
            session.step([run.state for run in runs])
            at_end = [run for run in runs if run.window is not None and run.state.row == run.window.stop]
            measured, runs = _measured(at_end), []
            for run in at_end:
                try:
                    runs += [run] if _decide(session, run, measured.get(id(run))) else []
                except StateError as error:
                    failed.append(error)
                    session.abort(owners[id(run)])
            runs = [run for run in runs if not owners[id(run)].closed]
    except BaseException:
        for state in followed:
            session.abort(state)
        raise
    if failed:
        raise failed[0]
    return {id(state): _report(state) for state in followed}


def finish(session: Session, state: Following) -> Result:
    """Latents, pictures, receipt and the plan of every picture; the caller closes the state."""
    with session.timeline.span(_longest(state).state.records, "decode", -1, len(state.lanes)):
        latents = torch.stack([run.x for run in state.runs])
        images = session.denoiser.to_images(latents)
    plans = tuple(session._expand(run.course.recorded()) for run in state.runs)
    return Result(images, latents, _receipt(session, state, plans), state.condition, plans=plans)


# --- the pictures of a request ---------------------------------------------------------------------------------------
def _of_picture(request: Request, plan: Plan, j: int, rank: int) -> Request:
    """The request of picture j alone; tensors of `rank` axes have one for the pictures."""

    def cut(value: Any) -> Any:
        each = isinstance(value, Tensor) and value.dim() == rank and len(value) == request.n
        return value[j : j + 1] if each else value

    latents = request.latents
    if isinstance(latents, Tensor) and latents.dim() == rank and len(latents) != request.n:
        raise ShapeError(f"request: latents are of {len(latents)} pictures for n = {request.n}; give one each")
    inputs = {name: cut(value) for name, value in request.inputs.items()}
    one: dict[str, Any] = {"latents": cut(latents), "image": cut(request.image), "mask": cut(request.mask)}
    return replace(request, plan=plan, n=1, index=request.index + j, inputs=inputs, **one)


def _begun(session: Session, request: Request, source: StepSource) -> Run:
    course = source.start()
    window = course.next(None)
    state = session.begin(request)
    try:
        values, tensors, _ = session._inputs(request, state.plan, state.pool)
        shared = state.entry
        state.entry = state.pool.enter(("followed", state.lanes), lambda: shared.lowered)  # its lane's own: rows change
        state.pool.rewrite(state.entry, shared.lowered)
        shared.users -= 1
        x = state.pool.state[state.entry.lowered.slots["x"], state.lanes[0]].clone()
        return Run(course, state, Given(values, frozenset(tensors)), window, start=x, before=x)
    except BaseException:
        session.abort(state)
        raise


# --- one evaluation --------------------------------------------------------------------------------------------------
def _evaluate(session: Session, runs: Sequence[Run]) -> None:
    """Leave with every state the predictions of its next row, where they are not there from an earlier try."""
    wanted = [run for run in runs if run.state.row not in run.state.ahead]
    parts = [whole(run.state) for run in wanted if run.state.plan.steps[run.state.row].variant is not None]
    by_state = {id(run.state): run for run in wanted}
    for group in grouped(parts):
        outs = session._predict(group)
        for n, part in enumerate(group):
            run, made = by_state[id(part.state)], tuple(out[n : n + 1].clone() for out in outs)
            part.state.ahead[part.row] = made
            run.evaluated += 1
            run.branches += len(made)
            if run.window is not None and part.row == run.window.first:
                run.kept = made


def _measured(runs: Sequence[Run]) -> dict[int, float]:
    """What the windows of these runs asked for, read from the device at once; by id of the run."""
    asked = [(run, run.window.measure) for run in runs if run.window is not None and run.window.measure is not None]
    if not asked:
        return {}
    with torch.inference_mode():
        values = torch.stack([_measure(run, measure) for run, measure in asked]).tolist()
    return {id(run): value for (run, _), value in zip(asked, values, strict=True)}


def _measure(run: Run, measure: Measure) -> Tensor:
    """One number of one picture, float64; its sums depend neither on who runs beside it nor on the threads."""
    x = run.x.double()
    if measure.kind == "variance":
        return _twice(x).var(1)[0]
    run.low = torch.zeros_like(x)
    for slot, coef in measure.low:
        run.low += coef * (run.start if slot == START else run.slot(slot))
    bound = torch.maximum(run.low.abs(), run.before.abs()) * measure.rtol
    return _twice((x - run.low) / bound.clamp_min(measure.atol)).square().mean(1)[0].sqrt()


def _twice(x: Tensor) -> Tensor:
    """[2, D]: a lone sum would be split among threads."""
    return x.reshape(1, -1).expand(2, -1)


def _decide(session: Session, run: Run, measured: float | None) -> bool:
    """Take the rows or go back, and write the next ones; True when rows can run without a new evaluation."""
    window = run.course.next(measured)
    retried = window is not None and window.retry
    _number(run, retried)
    if retried:
        run.x.copy_(run.start)
    else:
        run.start = run.x.clone()
        run.before = run.before if run.low is None else run.low
    run.window = window
    if window is None:
        return False
    _write(session, run, window)
    if retried:
        run.state.ahead[window.first] = run.kept
    return retried or run.state.plan.steps[window.first].variant is None


def _write(session: Session, run: Run, window: Window) -> None:
    """The rows of a window in place of those before."""
    state = run.state
    plan = session._expand(window.plan)
    lowered = lower_plan(plan, run.given, state.pool.side_car(plan))
    assert lowered.slots == state.entry.lowered.slots, "rows of a source keep their slots"
    state.pool.rewrite(state.entry, lowered)
    state.plan, state.row, state.caches = plan, window.first, caches(plan)
    state.hoisted = session.executor.hoist(plan, state.condition)


# --- what is told ----------------------------------------------------------------------------------------------------
def _number(run: Run, rejected: bool) -> None:
    """Number new records by the rows taken; what a rejected try did is told apart, but for the prediction it leaves."""
    records, window = run.state.records, run.window
    assert window is not None
    for n in range(run.mark, len(records)):
        name, row, *rest = records[n]
        if row >= 0:
            left = name == "network" and row == window.first
            records[n] = ("rejected" if rejected and not left else name, row + window.offset, *rest)
    run.mark = len(records)


def _longest(state: Following) -> Run:
    """The picture with the most evaluations."""
    return max(state.runs, key=lambda run: run.evaluated)


def _report(state: Following) -> Report:
    """Rows: those executed in the picture with the most evaluations; how many come is known at the end."""
    run = _longest(state)
    step = run.state.plan.steps[max(run.state.row - 1, 0)]
    return Report(run.evaluated - 1, run.evaluated + (not state.done), step.timestep, state.done)


def _receipt(session: Session, state: Following, plans: tuple[Plan, ...]) -> Receipt:
    """The receipt of the picture with the most evaluations, with the counts of all."""
    run = _longest(state)
    plan = plans[state.runs.index(run)]
    run.state.plan, run.state.caches = plan, caches(plan)
    receipt = make_receipt(
        run.state,
        session.timeline.resolve(run.state.records),
        measured_ms=(time.perf_counter() - state.began) * 1e3,
        probe=session.probe,
        executor=session.executor,
        denoiser=session.denoiser,
    )
    assert state.source is not None
    told = [run.course.told() for run in state.runs]
    counts: dict[str, Any] = {name: [one[name] for one in told] for name in told[0]}
    counts |= {"evaluations": [run.evaluated for run in state.runs], "plans": [one.hash[:12] for one in plans]}
    return replace(
        receipt,
        n=len(state.runs),
        nfe=run.evaluated,
        branch_evals=run.branches,
        pool=len(state.runs) * state.pool.lane_bytes(),
        details=receipt.details | {"source": {"name": state.source.name} | counts},
    )
