"""`vivace.accelerate`: a pipeline of `diffusers` that runs a sampling plan in its own loop, and back again."""

from __future__ import annotations

import copy
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache, wraps
from typing import Any

import torch

from vivace.engine.executors.eager import check_whole
from vivace.engine.looking import estimates, hears
from vivace.engine.plan import Plan, reads
from vivace.engine.receipt import Receipt
from vivace.errors import ArgumentError, StateError, UnsupportedError
from vivace.models.pipelines.cached import Offer, gives_again
from vivace.models.pipelines.calls import call_style, require_style
from vivace.models.pipelines.decode import DecodeOptions, decoder_view
from vivace.models.pipelines.fused import Fused
from vivace.models.pipelines.planned import Arguments, Planner
from vivace.models.pipelines.prompts import PromptCache, cached_encode_prompt
from vivace.models.pipelines.run import Run
from vivace.models.pipelines.scheduling import signature_of
from vivace.models.pipelines.told import receipt_of

DENOISERS = ("transformer", "unet", "transformer_2", "prior")
_KEY = "_vivace_acceleration"


def accelerate(
    pipeline: Any,
    plan: Plan | None = None,
    *,
    arithmetic: str = "auto",
    kernels: bool | None = None,
    prompt_bytes: int = 256 * 2**20,
    decode: DecodeOptions | None = None,
) -> Any:
    """Make `pipeline(...)` run `plan`, in place; `restore` undoes it.

    The pipeline keeps its own call, arguments, callbacks, interrupt, generators, output types, LoRA loading, `to()` and
    offload hooks. The call decides `num_inference_steps` (planned anew from the recipe), `strength` (the plan's tail)
    and the guidance scale (the plan's input). A plan that says nothing about guidance leaves guidance to the pipeline;
    a plan that is exactly what the pipeline's scheduler does runs on that scheduler, to the bit. Calls from several
    threads run one after the other.

    Args:
        pipeline: a `diffusers` pipeline object; changed by no more than its class and one entry of its `__dict__`.
        plan: unbound or bound; without per-row precision. None: what the pipeline's own scheduler does, at every call
            anew. Caches and tokens of a plan live in the run of a call; a guard decides once a row for all its
            pictures, and fires where it does for each.
        arithmetic: of the steps. "auto": the pipeline's scheduler where the plan is exactly what it does, else the
            fused step; "plan": the fused step always.
        kernels: own kernels inside the network's blocks; None: except where the pipeline's own scheduler does the
            arithmetic, so that such a picture keeps its bits.
        prompt_bytes: bound of the prompt embeddings kept across calls, by content; 0 keeps none.
        decode: how the VAE decodes; None: as it is.
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
    if arithmetic not in ("auto", "plan"):
        raise ArgumentError(f"accelerate: arithmetic={arithmetic!r}; use 'auto' or 'plan'")
    planner = Planner(plan, arithmetic == "auto")
    if plan is not None:
        _check(plan, pipeline)
        planner.check_scheduler(pipeline.scheduler)
    if not planner.silent:
        require_style(pipeline)
    if decode is not None:
        decoder_view(pipeline.vae, decode)  # refuses what this VAE cannot do
    pipeline.__dict__[_KEY] = Acceleration(planner, kernels, PromptCache(prompt_bytes), decode or DecodeOptions())
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


def plain_pipeline(pipeline: Any) -> Any:
    """`pipeline`, or where it is accelerated an object of its own class that shares its parts."""
    return _plain(*_parts(pipeline)) if _KEY in getattr(pipeline, "__dict__", {}) else pipeline


def _parts(pipeline: Any) -> tuple[type, dict[str, Any]]:
    """Class and attributes of an accelerated pipeline before it was."""
    state = {name: part for name, part in pipeline.__dict__.items() if name != _KEY}
    return type(pipeline).__mro__[1], state


def _plain(cls: type, state: dict[str, Any]) -> Any:
    made = object.__new__(cls)
    made.__dict__.update(state)
    return made


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
    """What an accelerated pipeline carries: how to plan, to fuse, to cache and to decode; its lock and receipts."""

    planner: Planner
    kernels: bool | None
    prompts: PromptCache
    decode: DecodeOptions
    fused: dict[str, Fused] = field(default_factory=dict)
    lock: Any = field(default_factory=threading.RLock)
    active: bool = False
    last: Receipt | None = None
    receipts: dict[int, Receipt] = field(default_factory=dict)

    def __deepcopy__(self, memo: dict[int, Any]) -> Acceleration:
        planner = Planner(self.planner.plan, self.planner.own)
        decode = DecodeOptions(self.decode.precision, self.decode.tiled)
        return Acceleration(planner, self.kernels, PromptCache(self.prompts.limit_bytes), decode)

    def run(self, pipeline: Any, call: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """`call(pipeline, ...)` with the stand-ins of one run in place."""
        style = call_style(pipeline)
        arguments, filled = self._arguments(pipeline, call, args, kwargs)
        self.planner.check(pipeline, arguments, style)
        with self.lock:
            if pipeline.__dict__.get(_KEY) is not self:  # restored while this call waited
                return call(pipeline, *args, **kwargs)
            if self.active:
                raise StateError("the pipeline is called from inside its own call; use a second pipeline object")
            began = time.perf_counter()
            modules = {n: m for n in DENOISERS if isinstance(m := getattr(pipeline, n, None), torch.nn.Module)}
            reports: dict[str, Any] = {}

            def fused() -> dict[str, Callable[..., Any]]:
                return {name: self._fuse(name, module, reports) for name, module in modules.items()}

            run = Run(pipeline, self.planner, arguments, style, dict(modules), self.kernels, fused)
            swapped = {"scheduler": run.scheduler, **{n: run.network(n, m) for n, m in modules.items()}}
            swapped |= self._around(pipeline, arguments, reports)
            if callable(filled.get("callback_on_step_end")):
                filled["callback_on_step_end"] = run.callback(filled["callback_on_step_end"])
            state = pipeline.__dict__
            before = {name: state.get(name) for name in swapped}
            self.active = True
            try:
                state.update(swapped)
                result = call(pipeline, **filled)
            finally:
                self.active = False
                for name, old in before.items():
                    if state.get(name) is swapped[name]:
                        state.pop(name) if old is None else state.update({name: old})
            self._keep(receipt_of(run, pipeline, reports, (time.perf_counter() - began) * 1e3))
            return result

    def _fuse(self, name: str, module: Any, reports: dict[str, Any]) -> Any:
        """The stand-in of a network with own kernels inside."""
        if name not in self.fused or self.fused[name].module is not module:
            self.fused[name] = Fused(module)
        stand_in, reports.setdefault("fused", {})[name] = self.fused[name].current()
        return stand_in

    def _around(self, pipeline: Any, call: Arguments, reports: dict[str, Any]) -> dict[str, Any]:
        """Stand-ins of what surrounds the loop: text encoding and decoding."""
        swapped: dict[str, Any] = {}
        if hasattr(pipeline, "encode_prompt") and call.values.get("prompt") is not None and self.prompts.limit_bytes:
            outcomes = reports["prompts"] = []
            swapped["encode_prompt"] = cached_encode_prompt(pipeline, self.prompts, outcomes.append)
        if getattr(pipeline, "vae", None) is not None and self.decode != DecodeOptions():
            swapped["vae"], reports["decode"] = decoder_view(pipeline.vae, self.decode)
        return swapped

    def _arguments(
        self, pipeline: Any, call: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[Arguments, dict[str, Any]]:
        """The call's arguments, and those the pipeline gets: the plan's steps and scale where the caller said none."""
        bound = signature_of(call).bind(pipeline, *args, **kwargs)
        explicit = {name: value for name, value in bound.arguments.items() if name not in ("self", "kwargs")}
        explicit |= bound.arguments.get("kwargs", {})
        bound.apply_defaults()
        values = {**bound.arguments, **explicit}
        style, filled = call_style(pipeline), dict(explicit)
        timed = any(explicit.get(name) is not None for name in ("timesteps", "sigmas"))
        if "num_inference_steps" in values and not timed and self.planner.steps is not None:
            filled.setdefault("num_inference_steps", self.planner.steps)
        scale = self.planner.scale
        if style is not None and scale is not None and scale > 1.0 and style.scale in values:
            filled.setdefault(style.scale, scale)
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


def _check(plan: Plan, pipeline: Any) -> None:
    """Refuse tails, plans that start from a picture, and rows that the pipeline's networks cannot run."""
    if plan.recipe is not None and plan.recipe.tail is not None:
        raise ArgumentError("accelerate: the plan is a tail; give the full plan, of which the call's strength cuts one")
    if given := [slot for op in plan.init for slot in reads(op) if slot.startswith("input:")]:
        raise UnsupportedError(
            f"the plan starts from {given[0]!r}, a pipeline's call from its own noise; run such plans with "
            "vivace.load(pipeline).compile(plan)"
        )
    if estimates(plan):
        raise UnsupportedError("guards that estimate branches; apply_linear_ag(plan, rows=...) does it in a pipeline")
    if hears(plan) and gives_again(plan):
        raise UnsupportedError("Adaptive Guidance beside kept values: freeze its decisions first (passes.freeze)")
    found = {name: getattr(pipeline, name, None) for name in DENOISERS}
    networks = {name: module for name, module in found.items() if isinstance(module, torch.nn.Module)}
    offer: Any = Offer(plan, networks)
    check_whole(plan, "a pipeline's loop", offer)


@cache
def _accelerated(cls: type) -> type:
    """The subclass of a pipeline class whose calls go through its acceleration."""
    original: Callable[..., Any] = cls.__call__

    @wraps(original)
    def called(self: Any, *args: Any, **kwargs: Any) -> Any:
        acceleration = self.__dict__.get(_KEY)  # none for an object made anew from the class
        if acceleration is None:
            return original(self, *args, **kwargs)
        return acceleration.run(self, original, args, kwargs)

    def reduced(self: Any, protocol: Any) -> Any:
        return _plain, _parts(self)

    def copied(self: Any) -> Any:
        twin = object.__new__(type(self))
        twin.__dict__.update(self.__dict__)
        return twin

    def copied_deep(self: Any, memo: dict[int, Any]) -> Any:
        twin = object.__new__(type(self))
        memo[id(self)] = twin
        twin.__dict__.update(copy.deepcopy(self.__dict__, memo))
        return twin

    body = {"__call__": called, "__module__": cls.__module__, "__qualname__": cls.__qualname__, "__doc__": cls.__doc__}
    body |= {
        "__reduce_ex__": reduced,
        "__copy__": copied,
        "__deepcopy__": copied_deep,
    }  # pickles are of the plain class
    return type(cls.__name__, (cls,), body)
