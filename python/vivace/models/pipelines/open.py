"""`vivace.load` beyond the native DiT: folders and hub snapshots of diffusers, pipeline objects, bare networks."""

from __future__ import annotations

import copy
import threading
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache
from math import prod
from os import PathLike
from pathlib import Path
from typing import Any

import torch

from vivace.engine.bind import ModelSpec
from vivace.engine.executors import make_executor
from vivace.engine.noise_schedule import NoiseSchedule
from vivace.engine.passes import apply_experts, apply_guidance
from vivace.engine.plan import Plan
from vivace.engine.planning import make_plan
from vivace.engine.session import Planned, Session
from vivace.engine.token_layout import Layout
from vivace.errors import ArgumentError, ModelError, ShapeError, UnsupportedError
from vivace.models.checkpoint import read_object
from vivace.models.load import prediction_of
from vivace.models.pipe import check_counts, device_of, dtype_of, plan_file
from vivace.models.pipelines.accelerate import plain_pipeline
from vivace.models.pipelines.calls import call_style
from vivace.models.pipelines.capture import Heard, argument_names, hear
from vivace.models.pipelines.decode import DecodeOptions
from vivace.models.pipelines.denoiser import BareDenoiser, Manner, PipelineDenoiser, latent_of, rows_of
from vivace.models.pipelines.families import Family, family_of
from vivace.models.pipelines.fingerprint import Fingerprint
from vivace.models.pipelines.network import NetworkDenoiser
from vivace.models.pipelines.planned import expert_boundary
from vivace.models.pipelines.prompting import Prompting
from vivace.models.pipelines.sources import NETWORK_FOLDERS, check_weights, resolve
from vivace.models.quantized.given import network_of, weights_of
from vivace.models.quantized.stand_in import StandIns
from vivace.models.quantized.weights import QuantizedWeights

# How pipelines feed the networks that are not fed the scheduler's timestep: t / divisor + offset.
FED = {
    "FluxTransformer2DModel": (1000.0, 0.0),
    "Flux2Transformer2DModel": (1000.0, 0.0),
    "QwenImageTransformer2DModel": (1000.0, 0.0),
    "Lumina2Transformer2DModel": (-1000.0, 1.0),
}


@dataclass(frozen=True, slots=True)
class LatentSpec(ModelSpec):
    """A spec for latents of any layout. like: where the tokens of its own latent lie."""

    like: Layout = Layout((), ())

    @property
    def edges(self) -> tuple[int, ...]:
        """Extent of a token along every axis of the latent, channels included."""
        return self.like.edges

    def layout(self, shape: tuple[int, ...]) -> Layout:
        """Where the image tokens of a latent of `shape` lie."""
        return replace(self.like, shape=shape)

    def tokens(self, shape: tuple[int, ...] | None = None) -> int:
        """Image tokens of a latent of `shape`. Raises ShapeError when tokens do not divide it."""
        shape = self.latent_shape if shape is None else shape
        if (
            len(shape) != len(self.edges)
            or min(shape) < 1
            or any(s % e for s, e in zip(shape, self.edges, strict=True))
        ):
            raise ShapeError(f"model {self.name!r}: latent shape {shape}; need multiples of {self.edges}")
        return prod(size // edge for size, edge in zip(shape, self.edges, strict=True))


def open_foreign(
    source: Any,
    *,
    device: str | torch.device | None = None,
    dtype: torch.dtype | None = None,
    scheduler: Any = None,
    revision: str | None = None,
    variant: str | None = None,
    call: Mapping[str, Any] | None = None,
    decode: DecodeOptions | None = None,
    latent_shape: Sequence[int] | None = None,
    quantized: str | PathLike[str] | QuantizedWeights | None = None,
) -> ForeignPipe:
    """See `vivace.load`."""
    pipe = _opened(source, device, dtype, scheduler, revision, variant, call, decode, latent_shape)
    if quantized is not None:
        pipe.quantized = weights_of(quantized, network_of(pipe.networks), pipe.spec.fingerprint)
    return pipe


def _opened(
    source: Any,
    device: str | torch.device | None,
    dtype: torch.dtype | None,
    scheduler: Any,
    revision: str | None,
    variant: str | None,
    call: Mapping[str, Any] | None,
    decode: DecodeOptions | None,
    latent_shape: Sequence[int] | None,
) -> ForeignPipe:
    if isinstance(source, (str, PathLike)):
        source = _read(source, dtype, revision, variant)
        source = source.to(device_of(device)) if device is not None else source
    else:
        given = {"device": device, "dtype": dtype, "revision": revision, "variant": variant}
        for name, value in given.items():
            if value is not None:
                raise ArgumentError(
                    f"load: {name}={value!r} with an object, which is used as it is; give it to compile"
                )
    from diffusers import DiffusionPipeline

    if isinstance(source, DiffusionPipeline):
        if latent_shape is not None:
            raise ArgumentError(
                "load: latent_shape is for bare networks; a pipeline has call={'height': ..., 'width': ...}"
            )
        return PipelinePipe(_with_scheduler(plain_pipeline(source), scheduler), call or {}, decode)
    if isinstance(source, torch.nn.Module) and hasattr(source, "config"):
        if call or decode:
            raise ArgumentError("load: call and decode are for pipelines; a bare network takes latent_shape")
        return NetworkPipe(source, scheduler, None if latent_shape is None else tuple(latent_shape))
    raise UnsupportedError(
        f"load: a {type(source).__name__} object; need a diffusers pipeline, a transformer or UNet of diffusers, a "
        "folder, or a name"
    )


class ForeignPipe(ABC):
    """A model of diffusers: `spec`, and `compile` to sessions. It holds weights and nothing of any request.

    quantized: weights for rows in int8 or fp8; None: there are none.
    """

    networks: Mapping[str, Any]
    quantized: QuantizedWeights | None = None

    def __init__(self) -> None:
        self._lock = threading.RLock()
        self._fingerprint = Fingerprint()
        self._moved = lru_cache(1)(QuantizedWeights.to)  # sessions on one device share a copy

    @property
    def spec(self) -> ModelSpec:
        """Schedule, prediction, latent shape, conditioning, blocks, tokens; fingerprint of the weights as they are."""
        with self._lock:
            return self._spec(self._fingerprint(self.networks))

    def compile(
        self,
        plan: Planned | Sequence[Planned],
        *,
        backend: str = "auto",
        device: str | torch.device = "auto",
        dtype: torch.dtype | str | None = None,
        threads: int | None = None,
        batch: int | None = None,
        hoist: bool = True,
        tolerance: float | None = None,
        window: int | None = None,
    ) -> Session:
        """A session that runs `plan` (the first of several is the default); unbound plans are bound to the model.

        Args: as in `Pipe.compile`, but device "auto" is where the model is.
        Raises: BackendError, PlanError, UnsupportedError, ArgumentError.
        """
        check_counts(threads=threads, batch=batch)
        place = None if device == "auto" else device_of(device)
        denoiser = self._denoiser(self._placed(place, dtype_of(dtype)))
        if self.quantized is not None:
            self.quantized.check(self.spec.fingerprint)
            denoiser.stand_ins = StandIns(self._moved(self.quantized, denoiser.device))
        executor = make_executor(backend, denoiser, hoist=hoist, tolerance=tolerance, window=window)
        why = self._unprobed()
        session = Session(
            denoiser,
            list(plan) if isinstance(plan, Sequence) else [plan],
            executor,
            shape=denoiser.spec.latent_shape,
            state_dtype=torch.float64 if denoiser.dtype == torch.float64 else torch.float32,
            threads=threads,
            batch=batch,
            probed=why is None,
            expand=lambda given: self._expanded(given).bind(denoiser.spec),
        )
        if why is not None:
            executor.one_by_one = why
        return session

    def choose_plan(self, path: Path | None, solver: str | None, steps: int | None, guidance: float | None) -> Plan:
        """A plan file; or the plan of the pipeline's own scheduler, or of a solver, at its own guidance scale."""
        from_file = plan_file(path, solver, steps)
        return from_file or self._plan(solver, 20 if steps is None else steps, guidance)

    def _plan(self, solver: str | None, steps: int, guidance: float | None) -> Plan:
        spec = self.spec
        if spec.schedule is None:
            raise ArgumentError("a network without a scheduler has no plan of its own; load it with scheduler=")
        plan = make_plan(spec.schedule, solver=solver or "unipc", steps=steps, prediction=spec.prediction)
        return plan if guidance in (None, 1.0) else apply_guidance(plan, guidance)

    def _placed(self, device: torch.device | None, dtype: torch.dtype | None) -> dict[str, Any]:
        """The networks on a device in a dtype: themselves where they are there already, copies otherwise."""
        placed = {}
        for name, network in self.networks.items():
            there = (device is None or network.device == device) and (dtype is None or network.dtype == dtype)
            placed[name] = network if there else copy.deepcopy(network).to(device=device, dtype=dtype)
        return placed

    @abstractmethod
    def _spec(self, fingerprint: str) -> ModelSpec:
        """The spec with that fingerprint."""

    @abstractmethod
    def _denoiser(self, networks: dict[str, Any]) -> NetworkDenoiser:
        """What a session runs: these networks."""

    def _unprobed(self) -> str | None:
        """Why batching cannot be tested when compiling."""
        return None

    def _expanded(self, plan: Plan) -> Plan:
        """The plan with what the model decides filled in."""
        return plan


class PipelinePipe(ForeignPipe):
    """A diffusers pipeline. The object is used as it is and never changed; weights are shared."""

    def __init__(self, pipeline: Any, call: Mapping[str, Any], decode: DecodeOptions | None) -> None:
        super().__init__()
        self.pipeline = pipeline
        self.prompting = Prompting(pipeline, dict(call), decode)
        self.networks = self.prompting.networks

    @cached_property
    def _heard(self) -> Heard:
        """What a call for the empty prompt shows."""
        try:
            return hear(self.pipeline, self.networks, self.prompting.arguments(None))
        except (ValueError, TypeError, KeyError, RuntimeError, AttributeError) as error:
            name = type(self.pipeline).__name__
            raise UnsupportedError(
                f"load: a call of {name} for the empty prompt fails ({error}); give it what it needs by call={{...}}"
            ) from error

    def plan(self, steps: int) -> Plan:
        """The plan that the pipeline's own scheduler runs for a call of this many steps, without guidance.

        What the pipeline computes for its scheduler, such as a shift that depends on the size, is in it.
        Raises: ArgumentError, UnsupportedError for schedulers that `Plan.from_diffusers` does not cover.
        """
        arguments = self.prompting.arguments(None)
        with self._lock:
            asked = hear(self.pipeline, self.networks, arguments, spoken=self._heard.spoken, steps=steps).asked
        given = {name: value for name, value in asked.items() if value is not None}
        return Plan.from_diffusers(self.pipeline.scheduler, steps=steps, **given)

    def _plan(self, solver: str | None, steps: int, guidance: float | None) -> Plan:
        plan = super()._plan(solver, steps, 1.0) if solver else self.plan(steps)
        style = call_style(self.pipeline)
        if guidance is None and style is not None and not style.needs:  # the default of its call
            guidance = self.prompting.parameters[style.scale].default
        wanted = guidance not in (None, 1.0) and "uncond" in self.spec.branches
        return apply_guidance(plan, float(guidance)) if wanted and guidance is not None else plan

    def _spec(self, fingerprint: str) -> ModelSpec:
        shape, branches = tuple(latent_of(self._heard).shape[1:]), rows_of(self._heard)
        network = next(iter(self.networks.values()))
        family = family_of(network)
        fields = family.spec_fields(network)
        scheduler = self.pipeline.scheduler
        return LatentSpec(
            name=type(self.pipeline).__name__.removesuffix("Pipeline"),
            fingerprint=fingerprint,
            prediction=_prediction(scheduler),
            latent_shape=shape,
            blocks=fields["blocks"],
            layers=fields["layers"],
            patch=fields["patch"],
            token_group=fields["token_group"],
            branches=("cond", "uncond")[:branches],
            conditioning="class" if self.prompting.labels else "text",
            schedule=_schedule(scheduler),
            like=family.latents(network, shape),
        )

    def _denoiser(self, networks: dict[str, Any]) -> NetworkDenoiser:
        return PipelineDenoiser(self.prompting, networks, self.spec, self._lock)

    def _expanded(self, plan: Plan) -> Plan:
        boundary = expert_boundary(self.pipeline)
        one = all(variant.model == "main" for variant in plan.variants)
        return plan if boundary is None or not one else apply_experts(plan, below=boundary)


class NetworkPipe(ForeignPipe):
    """A bare transformer or UNet. Prompts are mappings of its arguments."""

    def __init__(self, network: Any, scheduler: Any, latent_shape: tuple[int, ...] | None) -> None:
        super().__init__()
        self.networks = {"main": network}
        self.scheduler, self.family = scheduler, family_of(network)
        self.latent_shape = latent_shape or _latent_shape(self.family, self.family.spec_fields(network))

    def _spec(self, fingerprint: str) -> ModelSpec:
        network = self.networks["main"]
        fields = self.family.spec_fields(network)
        given = self.scheduler is not None
        return LatentSpec(
            name=type(network).__name__,
            fingerprint=fingerprint,
            prediction=_prediction(self.scheduler) if given else fields["prediction"],
            latent_shape=self.latent_shape,
            blocks=fields["blocks"],
            layers=fields["layers"],
            patch=fields["patch"],
            token_group=fields["token_group"],
            conditioning="arguments",
            schedule=_schedule(self.scheduler) if given else None,
            like=self.family.latents(network, self.latent_shape),
        )

    def _denoiser(self, networks: dict[str, Any]) -> NetworkDenoiser:
        network = networks["main"]
        names = argument_names(network)
        divisor, offset = FED.get(type(network).__name__, (1.0, 0.0))
        scale = float(network.config.get("timestep_scale") or 1.0)
        exact = torch.float64 if network.dtype == torch.float64 else torch.float32
        manner = Manner(names[0], "timestep", divisor / scale, offset, exact, self.family.sign)
        return BareDenoiser(networks, self.spec, manner, network.device)

    def _unprobed(self) -> str | None:
        return "a bare network: there is no condition at compile time to test batching with"


def _read(source: str | PathLike[str], dtype: torch.dtype | None, revision: str | None, variant: str | None) -> Any:
    """A pipeline or a network from a folder or the hub cache, safetensors only."""
    import diffusers

    root = resolve(source, revision=revision, variant=variant)
    check_weights(root, variant)
    options: dict[str, Any] = {"use_safetensors": True, "variant": variant, "local_files_only": True}
    options |= {} if dtype is None else {"dtype": dtype}
    try:
        if (root / "model_index.json").is_file():
            index = read_object(root / "model_index.json")
            absent = {name: None for name, entry in index.items() if entry == [None, None]}
            return diffusers.DiffusionPipeline.from_pretrained(str(root), **options, **absent)
        network = next((root / name for name in NETWORK_FOLDERS if (root / name / "config.json").is_file()), root)
        return diffusers.AutoModel.from_pretrained(str(network), **options)
    except (OSError, ValueError, RuntimeError, ImportError, AttributeError, KeyError) as error:
        raise ModelError(
            f"{root}: diffusers {diffusers.__version__} cannot load it ({error}); copy or download it again"
        ) from error


def _with_scheduler(pipeline: Any, scheduler: Any) -> Any:
    """A pipeline like the given one with another scheduler; itself without one."""
    if scheduler is None:
        return pipeline
    if not hasattr(scheduler, "set_timesteps"):
        raise ArgumentError(f"load: scheduler is {type(scheduler).__name__}; a pipeline needs a scheduler object")
    stand = copy.copy(pipeline)
    stand.__dict__["scheduler"] = scheduler
    return stand


def _prediction(scheduler: Any) -> str:
    config = getattr(scheduler, "config", scheduler)
    return prediction_of({"_class_name": type(scheduler).__name__, **dict(config)})


def _schedule(scheduler: Any) -> NoiseSchedule | None:
    """The scheduler's training schedule; None for a kind that plans cannot be made from."""
    try:
        return NoiseSchedule.from_diffusers(scheduler)
    except UnsupportedError:
        return None


def _latent_shape(family: Family, fields: Mapping[str, Any]) -> tuple[int, ...]:
    """The latent that pipelines of the family denoise, from the network's (C, spatial...)."""
    channels, *spatial = fields["latent_shape"]
    patch = fields["patch"]
    if family.layout == "tokens":
        return prod(s // p for s, p in zip(spatial, patch, strict=True)), channels * prod(patch)
    return (spatial[0], channels, *spatial[1:]) if family.layout == "frames" else (channels, *spatial)
