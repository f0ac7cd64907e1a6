"""`vivace.accelerate`: a pipeline of `diffusers` that runs a sampling plan in its own loop, and back again."""

from __future__ import annotations

import inspect
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache, wraps
from typing import Any

import torch

from vivace import __version__
from vivace.engine.plan import Plan
from vivace.engine.receipt import KernelUse, Receipt, RowRecord, peak_memory
from vivace.errors import ArgumentError, StateError, UnsupportedError
from vivace.models.pipelines.calls import call_style, require_style
from vivace.models.pipelines.planned import Arguments, Planner
from vivace.models.pipelines.run import Run

DENOISERS = ("transformer", "unet", "transformer_2", "prior")
_KEY = "_vivace_acceleration"


def accelerate(pipeline: Any, plan: Plan | None = None, *, kernels: bool | None = None) -> Any:
    """Make `pipeline(...)` run `plan`, in place; `restore` undoes it.

    The pipeline keeps its own call, arguments, callbacks, interrupt, generators, output types, LoRA loading, `to()` and
    offload hooks. The call decides `num_inference_steps` (planned anew from the recipe), `strength` (the plan's tail)
    and the guidance scale (the plan's input). A plan that says nothing about guidance leaves guidance to the pipeline;
    a plan that is exactly what the pipeline's scheduler does runs on that scheduler, to the bit. Calls from several
    threads run one after the other.

    Args:
        pipeline: a `diffusers` pipeline object; changed by no more than its class and one entry of its `__dict__`.
        plan: unbound or bound; without cache rules, dropped tokens, per-row precision and guards. None: what the
            pipeline's own scheduler does, at every call anew.
        kernels: own kernels inside the network's blocks; None: except where the pipeline's own scheduler does the
            arithmetic, so that such a picture keeps its bits.
    Returns: the pipeline.
    Raises: ArgumentError for what is no pipeline; StateError when it is accelerated already; UnsupportedError naming
        the first row that a pipeline's loop cannot run.
    """
    if plan is not None and not isinstance(plan, Plan):
        raise ArgumentError(f"accelerate: a {type(plan).__name__} for the plan; need a vivace.Plan")
    if not hasattr(pipeline, "scheduler") or not any(getattr(pipeline, name, None) is not None for name in DENOISERS):
        raise ArgumentError(
            f"accelerate: a {type(pipeline).__name__} object; need a diffusers pipeline with a scheduler and a "
            f"denoiser ({', '.join(DENOISERS)}); for a bare network use vivace.load"
        )
    if _KEY in pipeline.__dict__:
        raise StateError("accelerate: the pipeline is accelerated already; call vivace.restore(pipeline) first")
    planner = Planner(plan)
    if plan is not None:
        _check(plan)
    if not planner.silent:
        require_style(pipeline)
    pipeline.__dict__[_KEY] = Acceleration(planner, kernels)
    pipeline.__class__ = _accelerated(type(pipeline))
    return pipeline


def restore(pipeline: Any) -> Any:
    """Undo `accelerate`: the pipeline is what it was before, to the bit. Waits for a call under way.

    Returns: the pipeline. Raises: StateError when it is not accelerated.
    """
    acceleration = _of(pipeline, "restore")
    with acceleration.lock:
        if acceleration.active:
            raise StateError("restore: called from inside a call of the pipeline; call it afterwards")
        del pipeline.__dict__[_KEY]
        pipeline.__class__ = type(pipeline).__mro__[1]
    return pipeline


def receipt(pipeline: Any) -> Receipt:
    """What the last finished call of an accelerated pipeline did, in this thread if it made one, else in any.

    Raises: StateError before the first call, or for a pipeline that is not accelerated.
    """
    acceleration = _of(pipeline, "receipt")
    found = acceleration.receipts.get(threading.get_ident(), acceleration.last)
    if found is None:
        raise StateError("receipt: the pipeline made no call yet; call it first")
    return found


@dataclass(slots=True)
class Acceleration:
    """What an accelerated pipeline carries: its planner, its lock, its receipts."""

    planner: Planner
    kernels: bool | None
    lock: Any = field(default_factory=threading.RLock)
    active: bool = False
    last: Receipt | None = None
    receipts: dict[int, Receipt] = field(default_factory=dict)

    def __deepcopy__(self, memo: dict[int, Any]) -> Acceleration:
        return Acceleration(Planner(self.planner.plan), self.kernels)

    def run(self, pipeline: Any, call: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """`call(pipeline, ...)` with the scheduler and the networks of one run in place."""
        style = call_style(pipeline)
        arguments, kwargs = self._arguments(pipeline, call, args, kwargs)
        self.planner.check(arguments, style)
        with self.lock:
            if self.active:
                raise StateError("the pipeline is called from inside its own call; use a second pipeline object")
            began = time.perf_counter()
            modules = {n: m for n in DENOISERS if isinstance(m := getattr(pipeline, n, None), torch.nn.Module)}
            run = Run(pipeline, self.planner, arguments, style, dict(modules))
            swapped = {"scheduler": run.scheduler, **{n: run.network(n, m) for n, m in modules.items()}}
            if callable(kwargs.get("callback_on_step_end")):
                kwargs["callback_on_step_end"] = run.callback(kwargs["callback_on_step_end"])
            before = {name: pipeline.__dict__[name] for name in swapped}
            self.active = True
            try:
                pipeline.__dict__.update(swapped)
                result = call(pipeline, **kwargs)
            finally:
                self.active = False
                pipeline.__dict__.update({n: old for n, old in before.items() if pipeline.__dict__[n] is swapped[n]})
            self._keep(_receipt(run, pipeline, (time.perf_counter() - began) * 1e3))
            return result

    def _arguments(
        self, pipeline: Any, call: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[Arguments, dict[str, Any]]:
        """The call's arguments, and those the pipeline gets: the plan's steps and scale where the caller said none."""
        bound = inspect.signature(call).bind(pipeline, *args, **kwargs)
        explicit = {name: value for name, value in bound.arguments.items() if name not in ("self", "kwargs")}
        explicit |= bound.arguments.get("kwargs", {})
        bound.apply_defaults()
        values = {**bound.arguments, **explicit}
        style, filled = call_style(pipeline), dict(explicit)
        timed = any(explicit.get(name) is not None for name in ("timesteps", "sigmas"))
        if "num_inference_steps" in values and not timed and self.planner.steps is not None:
            filled.setdefault("num_inference_steps", self.planner.steps)
        if style is not None and self.planner.scale is not None and style.scale in values:
            filled.setdefault(style.scale, self.planner.scale)
        return Arguments({**values, **filled}, frozenset(explicit)), filled

    def _keep(self, made: Receipt) -> None:
        self.last = self.receipts[threading.get_ident()] = made
        alive = {thread.ident for thread in threading.enumerate()}
        self.receipts = {ident: kept for ident, kept in self.receipts.items() if ident in alive}


def _of(pipeline: Any, what: str) -> Acceleration:
    found = getattr(pipeline, "__dict__", {}).get(_KEY)
    if not isinstance(found, Acceleration):
        raise StateError(f"{what}: the pipeline is not accelerated; call vivace.accelerate(pipeline, plan) first")
    return found


def _check(plan: Plan) -> None:
    """Refuse rows that need more than whole evaluations."""
    from vivace.engine.executors.eager import beyond

    full = 1.0 if plan.binding is None else float(plan.binding.tokens)
    for i, step in enumerate(plan.steps):
        why = "a run-time guard" if step.guard is not None else ""
        why = why or ("further network inputs" if step.net_inputs else "")
        if step.variant is not None:
            why = why or beyond(step.variant, full, models=True)
        if why:
            raise UnsupportedError(f"step {i}: a pipeline's loop does not run {why}; drop it from the plan")


@cache
def _accelerated(cls: type) -> type:
    """The subclass of a pipeline class whose calls go through its acceleration."""
    original: Callable[..., Any] = cls.__call__

    @wraps(original)
    def called(self: Any, *args: Any, **kwargs: Any) -> Any:
        return self.__dict__[_KEY].run(self, original, args, kwargs)

    body = {"__call__": called, "__module__": cls.__module__, "__qualname__": cls.__qualname__, "__doc__": cls.__doc__}
    return type(cls.__name__, (cls,), body)


def _receipt(run: Run, pipeline: Any, ms: float) -> Receipt:
    """The receipt of a finished run."""
    effective = run.effective
    if effective is None:
        raise StateError(f"{type(pipeline).__name__} never asked its scheduler for timesteps; it cannot be accelerated")
    plan = effective.plan
    network = next(iter(run.networks.values()))
    kind = type(run.own_scheduler).__name__
    step = KernelUse("solver_step", "diffusers", f"{kind}: {effective.reason}")
    if run.driven is not None:
        step = KernelUse("solver_step", "plan", effective.reason)
    both = effective.silent and run.guided
    branches = [2 if both else len(step.branches) for step in plan.steps if step.variant is not None]
    evaluated = [row for row in run.rows if row[0]]
    return Receipt(
        plan_hash=plan.hash,
        executor="pipeline",
        device=str(pipeline._execution_device),
        dtype=str(getattr(network, "dtype", "")).removeprefix("torch."),
        threads=torch.get_num_threads(),
        n=1,
        nfe_planned=plan.nfe - run.begin,
        nfe=len(evaluated),
        branch_evals_planned=sum(branches[run.begin :]),
        branch_evals=sum(row[0] for row in run.rows),
        rows=tuple(RowRecord(i, ("cond", "uncond")[:b], 1, n, s) for i, (b, n, s) in enumerate(run.rows)),
        phases={"network": sum(row[1] for row in run.rows), "solver_step": sum(row[2] for row in run.rows)},
        measured_ms=ms,
        predicted_ms=None,
        peak_memory=peak_memory(torch.device(pipeline._execution_device)),
        pool=0,
        kernels=(step, KernelUse("network", "torch", "the pipeline's own module")),
        warnings=effective.warnings,
        versions={"vivace": __version__, "torch": torch.__version__},
    )
