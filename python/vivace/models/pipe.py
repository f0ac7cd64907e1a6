"""`vivace.load`: a model ready to be compiled for plans."""

from __future__ import annotations

import copy
from collections.abc import Hashable, Mapping, Sequence
from functools import partial
from os import PathLike
from pathlib import Path
from threading import Lock
from typing import TYPE_CHECKING, Any
from weakref import WeakValueDictionary

from vivace.engine.bind import ModelSpec
from vivace.engine.passes import apply_guidance
from vivace.engine.plan import Plan
from vivace.engine.planning import make_plan
from vivace.errors import ArgumentError, BackendError, ModelError
from vivace.models.class_denoiser import ClassDenoiser
from vivace.models.load import LoadedModel, OpenModel
from vivace.models.load import load as load_model

if TYPE_CHECKING:
    import torch

    from vivace.engine.session import Planned, Session
    from vivace.models.pipelines.decode import DecodeOptions
    from vivace.models.pipelines.open import ForeignPipe
    from vivace.models.quantized.weights import QuantizedWeights


class Pipe:
    """A loaded model. It holds weights and nothing of any request; `compile` makes sessions.

    quantized: weights for rows in int8 or fp8; None: there are none.
    """

    def __init__(self, model: LoadedModel, quantized: QuantizedWeights | None = None) -> None:
        from vivace.models.versions import stamp

        self.model, self.quantized = model, quantized
        self._stamp = None if quantized is None else stamp(model.module)
        self._copies: WeakValueDictionary[Hashable, LoadedModel] = WeakValueDictionary()
        self._lock = Lock()
        self._moved: tuple[torch.device, QuantizedWeights] | None = None  # the last copy on a device

    @property
    def spec(self) -> ModelSpec:
        """Schedule, prediction, latent shape, conditioning, blocks, tokens and fingerprint."""
        return self.model.spec

    @property
    def card(self) -> Mapping[str, Any]:
        """Defaults of the model: "guidance_scale", "solver", "steps"."""
        return self.model.card

    def choose_plan(self, path: Path | None, solver: str | None, steps: int | None, guidance: float | None) -> Plan:
        """A plan file, or the card's plan with solver, steps and guidance in its place."""
        return plan_file(path, solver, steps) or default_plan(self.model, solver, steps, guidance)

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

        Args:
            backend: "eager", "cpu" or "cuda_graph"; one asked for by name that cannot run here is an error. "auto" is
                the compiled one of the device where it can run the model, else eager; the receipt says why. "picard"
                evaluates many rows together, again and again, by the executor that "auto" is.
            device: "auto" takes a GPU when torch finds one.
            dtype: of the network, a torch dtype or its name; None keeps the loaded one. The state between evaluations
                is float32 (float64 for a float64 network).
            threads: CPU threads of this session; None is torch's number. batch: samples to make room for beforehand.
            hoist: what does not depend on the latent is computed before the loop, for all rows at once.
            tolerance, window: of "picard", see `engine.executors.picard`; None: 0.03, and all rows.
        Raises: BackendError, PlanError, UnsupportedError, ArgumentError.
        """
        import torch

        from vivace.engine.executors import make_executor
        from vivace.engine.session import Session

        check_counts(threads=threads, batch=batch)
        place = device_of(device)
        denoiser = ClassDenoiser(self._placed(place, dtype_of(dtype)), self._quantized_on(place))
        return Session(
            denoiser,
            list(plan) if isinstance(plan, Sequence) else [plan],
            make_executor(backend, denoiser, hoist=hoist, tolerance=tolerance, window=window),
            shape=denoiser.spec.latent_shape,
            state_dtype=torch.float64 if denoiser.dtype == torch.float64 else torch.float32,
            threads=threads,
            batch=batch,
            expand=partial(_at_its_shape, denoiser.spec),
        )

    def _quantized_on(self, device: torch.device) -> QuantizedWeights | None:
        """The quantized weights on a device. Raises ModelError when the model's were changed since they were loaded."""
        from vivace.models.versions import stamp

        if self.quantized is None:
            return None
        if stamp(self.model.module) != self._stamp:
            raise ModelError(
                "compile: the model's weights were changed since its quantized weights were loaded; load it again"
            )
        with self._lock:
            if self._moved is None or self._moved[0] != device:
                self._moved = device, self.quantized.to(device)
            return self._moved[1]

    def _placed(self, device: torch.device, dtype: torch.dtype | None) -> LoadedModel:
        """The model on a device in a dtype: itself where it is so already, else a copy that its sessions share."""
        from vivace.models.versions import stamp

        module = self.model.module
        place = device, dtype or module.dtype
        if place == (module.device, module.dtype):
            return self.model
        with self._lock:
            key = *place, stamp(module)
            moved = self._copies.get(key)
            if moved is None:
                parameters = {name: value.to(*place) for name, value in module.state_dict().items()}
                moved = copy.copy(self.model)
                object.__setattr__(moved, "module", module.of(module.config, parameters))
                self._copies[key] = moved
            return moved


def load(
    source: Any,
    *,
    device: str | torch.device | None = None,
    dtype: torch.dtype | str | None = None,
    scheduler: Any = None,
    revision: str | None = None,
    variant: str | None = None,
    call: Mapping[str, Any] | None = None,
    decode: DecodeOptions | None = None,
    latent_shape: Sequence[int] | None = None,
    quantized: str | PathLike[str] | QuantizedWeights | None = None,
) -> Pipe | ForeignPipe:
    """Load a model: a bundled name, a folder, a name in the hub cache, a diffusers pipeline, or a bare network of one.

    Args:
        source: "emoji"; a folder in the diffusers format, or "org/name" (HF_HOME, HF_HUB_CACHE and HF_HUB_OFFLINE are
            honoured), safetensors only; a pipeline object, used as it is; a transformer or UNet.
        device, dtype: of weights that are read; None is the CPU and float32 (foreign folders: as stored).
        scheduler: a diffusers scheduler, or for folders of the native DiT and bare networks its configuration.
        revision, variant: of a hub name; of weight files, such as "fp16".
        call: arguments of every call of a pipeline, such as height, width, num_frames.
        decode: how a pipeline's VAE decodes, tiled or in bfloat16; None is as it is.
        latent_shape: of a bare network, without batch axis; None is the family's.
        quantized: 8-bit weights of this model, for rows that a plan runs in int8 or fp8: a file of `vivace quantize`,
            an int8 checkpoint of torchao or Model-Optimizer, or the object.
    Raises: ModelError, naming the path and what to do; ArgumentError; UnsupportedError for what cannot be driven.
    """
    try:
        import torch  # noqa: F401 - the network needs it; plans do not
    except ImportError:
        raise BackendError("load: torch is not installed; pip install 'vivace[torch]'") from None
    from vivace.models.pipelines.sources import is_foreign

    foreign = {"revision": revision, "variant": variant, "call": call, "decode": decode}
    foreign["latent_shape"] = latent_shape
    if is_foreign(source):
        from vivace.models.pipelines.open import open_foreign

        return open_foreign(
            source, device=device, dtype=dtype_of(dtype), scheduler=scheduler, quantized=quantized, **foreign
        )
    for name, value in foreign.items():
        if value is not None:
            raise ArgumentError(f"load: {name}={value!r} has no meaning for {str(source)!r}, a model in the DiT format")
    model = load_model(source, device=device or "cpu", dtype=dtype_of(dtype), scheduler=scheduler)
    if quantized is None:
        return Pipe(model)
    from vivace.models.quantized.given import weights_of

    return Pipe(model, weights_of(quantized, model.module, model.spec.fingerprint))


def default_plan(
    model: OpenModel,
    solver: str | None = None,
    steps: int | None = None,
    guidance: float | None = None,
    *,
    interval: tuple[float, float] = (0.0, 1.0),
    **options: Any,
) -> Plan:
    """The plan of a model's card, with what is given in its place; options as in `make_plan`. Guidance 1 means none."""
    card = model.card
    plan = make_plan(
        model.schedule,
        solver=solver or card.get("solver", "unipc"),
        steps=card.get("steps", 20) if steps is None else steps,
        prediction=model.prediction,
        **options,
    )
    scale = float(card.get("guidance_scale", 1.0)) if guidance is None else guidance
    return plan if scale == 1.0 else apply_guidance(plan, scale, interval=interval)


def _at_its_shape(spec: ModelSpec, plan: Plan) -> Plan:
    """A plan bound to the model: at the shape it was bound to already, else at the model's."""
    return plan.bind(spec, None if plan.binding is None else plan.binding.latent_shape)


def plan_file(path: Path | None, solver: str | None, steps: int | None) -> Plan | None:
    """The plan of a file, which decides solver and steps; None without a file."""
    if path is None:
        return None
    if solver is not None or steps is not None:
        raise ArgumentError("--plan decides solver and steps; drop --solver and --steps, or drop --plan")
    return Plan.load(path)


def check_counts(**counts: int | None) -> None:
    """Raise ArgumentError unless each is None or a positive integer."""
    for name, value in counts.items():
        if value is not None and (not isinstance(value, int) or value < 1):
            raise ArgumentError(f"compile: {name} is {value!r}; a positive integer is needed")


def device_of(name: str | torch.device) -> torch.device:
    """The torch device of that name; "auto" is a GPU when torch finds one. Raises ArgumentError, BackendError."""
    import torch

    if name == "auto":
        return torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        raise ArgumentError(f"compile: device {name!r}; use auto, cpu or cuda") from None
    if device.type == "cuda" and not torch.cuda.is_available():
        raise BackendError(f"compile: device {str(name)!r}, but torch finds no GPU; use device='cpu'")
    return device


def dtype_of(given: torch.dtype | str | None) -> torch.dtype | None:
    """The floating torch dtype of that name, None for None. Raises ArgumentError."""
    import torch

    names = {
        "float32": torch.float32,
        "fp32": torch.float32,
        "bfloat16": torch.bfloat16,
        "bf16": torch.bfloat16,
        "float16": torch.float16,
        "fp16": torch.float16,
        "float64": torch.float64,
    }
    if given is None:
        return None
    dtype = names.get(given) if isinstance(given, str) else given
    if dtype not in names.values():
        raise ArgumentError(f"dtype {given!r}; use one of {', '.join(names)}")
    return dtype
