"""One call of an accelerated pipeline: its scheduler and networks as the pipeline meets them, and what they did."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from vivace.errors import UnsupportedError
from vivace.models.pipelines.branches import batch_of
from vivace.models.pipelines.calls import CallStyle, runs_uncond
from vivace.models.pipelines.driven import Driven, version_of
from vivace.models.pipelines.planned import Arguments, Effective, Planner
from vivace.models.pipelines.scheduling import arguments_of, scheduler_of
from vivace.models.pipelines.views import view


class Run:
    """State of one call. `effective`: its plan, once the pipeline asked for timesteps; `rows`: what was executed.

    networks: the pipeline's denoisers by component name, the first one "main" to plans; fused: gives the same with own
    kernels inside, and is asked when `kernels` says so (None: where the plan does the arithmetic).
    """

    def __init__(
        self,
        pipeline: Any,
        planner: Planner,
        call: Arguments,
        style: CallStyle | None,
        networks: dict[str, Callable[..., Any]],
        kernels: bool | None,
        fused: Callable[[], dict[str, Callable[..., Any]]],
    ) -> None:
        self.pipeline, self.planner, self.call, self.style = pipeline, planner, call, style
        self.networks, self.kernels, self._fused = networks, kernels, fused
        self.own_scheduler = pipeline.scheduler
        self.scheduler = scheduler_of(pipeline.scheduler, self)
        self.guided = runs_uncond(pipeline, style, call.values)
        self.separate = style is not None and style.separate
        self.begin = 0  # evaluations of the full plan that an image-to-image run leaves out
        self.effective: Effective | None = None
        self.driven: Driven | None = None
        self.pictures, self.device = 1, torch.device("cpu")  # samples of a branch; where the network runs
        self.rows: list[tuple[int, float, float]] = []  # branches evaluated, ms of the network, ms of the step
        self._branches, self._network_ms = 0, 0.0

    # --- the scheduler's methods; `own` is the original one -----------------------------------------------------------
    def set_timesteps(self, own: Callable[..., None], *args: Any, **kwargs: Any) -> None:
        """The plan's rows as timesteps of the run."""
        bound = arguments_of(own, args, kwargs)
        given: dict[str, Any] = {name: bound.get(name) for name in ("timesteps", "sigmas", "mu")}
        count = bound.get("num_inference_steps")
        listed = given["timesteps"] if given["timesteps"] is not None else given["sigmas"]
        given["steps"] = int(count) if count is not None else len(listed)
        self.effective = self.planner.effective(self.pipeline, self.own_scheduler, self.call, self.style, given)
        if self.kernels or (self.kernels is None and not self.effective.own):
            self.networks = self._fused()
        own(*args, **kwargs)
        plan, steps = self.effective.plan, given["steps"]
        strength = self.call.values.get("strength")
        cut = strength is not None and self.call.values.get("denoising_start") is None
        if cut and hasattr(self.pipeline, "get_timesteps"):
            left = min(int(steps * float(strength)), steps)  # timesteps may repeat: they do not tell where a run starts
            self.begin = (steps - left) * max(1, round(plan.nfe / steps))
        if self.effective.own:
            return
        self.driven = Driven(self.effective, steps, style=self.style, guided=self.guided, values=self._values())
        self.driven.generator = self.call.values.get("generator")
        if self.begin:
            self.driven.begin(self.begin)
        state = self.scheduler.__dict__
        state["timesteps"] = self.driven.timesteps(self.scheduler.timesteps)
        state["sigmas"] = self.driven.sigmas()
        state["num_inference_steps"], state["order"] = steps, self.driven.order

    def set_begin_index(self, own: Callable[..., None], begin_index: int = 0) -> None:
        own(begin_index)
        self.begin = int(begin_index)
        if self.driven is not None:
            self.driven.begin(self.begin)

    def init_noise_sigma(self, own: Any) -> Any:
        return own if self.driven is None else self.driven.start_scale

    def scale_model_input(self, own: Callable[..., Tensor], sample: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if self.driven is None:
            return own(sample, *args, **kwargs)
        return self.driven.scaled(sample, args[0] if args else kwargs.get("timestep"))

    def add_noise(
        self, own: Callable[..., Tensor], original_samples: Tensor, noise: Tensor, timesteps: Tensor
    ) -> Tensor:
        if self.driven is None:
            return own(original_samples, noise, timesteps)
        return self.driven.noised(original_samples, noise, timesteps)

    def scale_noise(self, own: Callable[..., Tensor], sample: Tensor, timestep: Any, noise: Tensor) -> Tensor:
        if self.driven is None:
            return own(sample, timestep, noise)
        return self.driven.noised(sample, noise, timestep)

    def step(self, own: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """The row's update: the scheduler's own, or the plan's fused step."""
        start = time.perf_counter()
        if self.driven is None:
            result = own(*args, **kwargs)
        else:
            given = arguments_of(own, args, kwargs)
            generator = given.get("generator", self.call.values.get("generator"))  # not every `step` takes one
            x = self.driven.advance(given["model_output"], given["timestep"], given["sample"], generator)
            result = (x, x) if given.get("return_dict") is False else _Stepped(x)
        self.rows.append((self._branches, self._network_ms, (time.perf_counter() - start) * 1e3))
        self._branches, self._network_ms = 0, 0.0
        return result

    # --- the networks ------------------------------------------------------------------------------------------------
    def network(self, name: str, module: Any) -> Any:
        """A stand-in of a denoiser whose calls follow the plan."""
        return view(module, __call__=lambda *args, **kwargs: self._evaluate(name, args, kwargs))

    def _evaluate(self, name: str, args: Any, kwargs: Any) -> Any:
        start = time.perf_counter()
        batch = batch_of(args, kwargs)
        if not self.rows:
            self.device = next((v.device for v in (*args, *kwargs.values()) if isinstance(v, Tensor)), self.device)
            self.pictures = batch // 2 if self.guided and not self.separate else batch
        if self.driven is None:
            result, branches = self.networks[name](*args, **kwargs), max(1, batch // max(1, self.pictures))
        else:
            result, branches = self.driven.evaluate(name, self.networks, args, kwargs)
        self._branches += branches
        self._network_ms += (time.perf_counter() - start) * 1e3
        return result

    # --- the callback ------------------------------------------------------------------------------------------------
    def callback(self, own: Callable[..., Any]) -> Callable[..., Any]:
        """The caller's callback; a change of the latents is noticed."""

        def called(pipeline: Any, step: int, timestep: Any, tensors: dict[str, Any]) -> Any:
            before = tensors.get("latents")
            if self.driven is None or before is None:
                result = own(pipeline, step, timestep, tensors)
                if self.driven is not None:
                    self.driven.changed |= isinstance(result, dict) and "latents" in result
                return result
            version, kept = version_of(before), before.clone() if before.is_inference() else before
            result = own(pipeline, step, timestep, tensors)
            after = result.get("latents", before) if isinstance(result, dict) else before
            written = version_of(before) != version or not (kept is before or torch.equal(kept, before))
            self.driven.changed |= after is not before or written
            return result

        from diffusers.callbacks import MultiPipelineCallbacks, PipelineCallback

        asked = isinstance(own, (MultiPipelineCallbacks, PipelineCallback))  # pipelines ask these for their tensors
        return view(own, __call__=called) if asked else called

    def copied(self) -> None:
        """The pipeline copies its scheduler: fine where the original does the work. Raises: UnsupportedError."""
        if self.driven is not None:
            raise UnsupportedError("the pipeline copies its scheduler for a second loop, which a plan cannot drive")

    def _values(self) -> dict[str, float]:
        """Numbers of the call that the plan reads."""
        if self.style is None:
            return {}
        scale = self.call.said(self.style.scale)
        second = self.call.said("guidance_scale_2")
        values = {} if scale is None else {"guidance_scale": float(scale)}
        if second is not None or scale is not None:
            values["guidance_scale_2"] = float(scale if second is None else second)
        return values


class _Stepped(tuple[Tensor, ...]):
    """What `step` returns: the latents by index and as `prev_sample`."""

    def __new__(cls, x: Tensor) -> _Stepped:
        return super().__new__(cls, (x,))

    @property
    def prev_sample(self) -> Tensor:
        """Latents after the row."""
        return self[0]
