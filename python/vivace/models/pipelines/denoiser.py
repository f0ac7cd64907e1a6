"""The networks of pipelines, and bare ones, as the engine's `Denoiser`: conditions are recorded network arguments.

What a prompt means to a network is whatever the pipeline's own call hands it for that prompt. How the pipeline feeds
timesteps, orders its branches and signs its predictions is measured, not looked up.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from vivace.engine.bind import ModelSpec
from vivace.errors import PromptError, ShapeError, UnsupportedError
from vivace.models import pictures
from vivace.models.pipelines.capture import Heard, argument_names, hear
from vivace.models.pipelines.conditions import Condition, Inputs, inputs_of
from vivace.models.pipelines.decode import DecodeReport, decoder_view
from vivace.models.pipelines.families import plain
from vivace.models.pipelines.network import Manner, NetworkDenoiser
from vivace.models.pipelines.prompting import SCALE, Prompting


class PipelineDenoiser(NetworkDenoiser):
    """A pipeline's network; prompts and pictures go through the pipeline's own call."""

    def __init__(self, prompting: Prompting, networks: Mapping[str, Any], spec: ModelSpec, lock: Any) -> None:
        self.prompting, self.pipeline, self._lock = prompting, prompting.pipeline, lock
        self._decoded: DecodeReport | None = None
        main = next(iter(networks.values()))
        device = self.pipeline._execution_device if networks == prompting.networks else main.device
        with lock:
            self._example = prompting.arguments(None)
            heard: list[Heard] = []
            for time in prompting.times:
                spoken = heard[0].spoken if heard else ()
                heard.append(self._hear(self._example, timestep=time, answer=_marks, spoken=spoken))
            manner = measure(self.pipeline, heard, prompting)
            manner = replace(manner, dtype=torch.float64) if main.dtype == torch.float64 else manner
        self._spoken, self._held = heard[0].spoken, len(latent_of(heard[0]))
        names = {name: "main" if i == 0 else name for i, name in enumerate(networks)}
        super().__init__({names[name]: network for name, network in networks.items()}, spec, manner, device)

    def _hear(self, arguments: Mapping[str, Any], **options: Any) -> Heard:
        """A run with the pipeline's own networks as models of the stand-ins, wherever the ones that run here are."""
        return hear(self.pipeline, self.prompting.networks, arguments, **options)

    def encode(self, prompt: Any) -> Condition:
        """What the pipeline hands its network for a prompt; see `Prompting.arguments` for what a prompt may be.

        Raises: PromptError.
        """
        arguments = self.prompting.arguments(prompt)
        cache = None if arguments.get("prompt") is None else self.prompting.cache
        with self._lock:
            try:
                heard = self._hear(arguments, cache=cache)
            except (ValueError, TypeError, KeyError, RuntimeError, AttributeError, ImportError) as error:
                name = type(self.pipeline).__name__
                raise PromptError(
                    f"prompt: {name} cannot encode it ({error}); see its call for what it takes"
                ) from error
        return self._condition(heard)

    def _condition(self, heard: Heard) -> Condition:
        latent = latent_of(heard)
        if tuple(latent.shape[1:]) != self.spec.latent_shape:
            raise PromptError(
                f"prompt: its latents have shape {tuple(latent.shape[1:])}, the session's {self.spec.latent_shape}; "
                "give sizes to vivace.load(pipeline, call={...}) and compile again"
            )
        order, held = (self.manner.order, self._held) if rows_of(heard) > 1 else (("cond",), 1)
        if (rows_of(heard), len(latent)) != (len(order), held):
            raise PromptError(
                f"prompt: is for {len(latent) // held} pictures; give one, and n= for several pictures of it"
            )
        return Condition(self._branches(heard, order))

    def _branches(self, heard: Heard, order: tuple[str, ...]) -> dict[str, Inputs]:
        branches: dict[str, Inputs] = {}
        skipped = (self.manner.latent, self.manner.time, "return_dict")
        for call in heard.calls:
            rows = len(call[self.manner.latent])
            kept = {name: value for name, value in call.items() if name not in skipped}
            for row in range(rows):
                branches[order[len(branches)]] = inputs_of(kept, row, rows, self.device, self._cast())
        return branches

    def _cast(self) -> tuple[torch.dtype, torch.dtype] | None:
        """(dtype of the pipeline's network, dtype of the copy that runs here) where they differ."""
        own = next(iter(self.prompting.networks.values())).dtype
        return None if own == self.dtype else (own, self.dtype)

    def to_images(self, latents: Tensor) -> list[Any]:
        """PIL pictures, for videos a list of frames each, decoded one by one; none for a pipeline without a decoder."""
        if getattr(self.pipeline, "vae", None) is None:
            return []
        images: list[Any] = []
        vae, decode = None, self.prompting.decode
        with self._lock:
            for latent in latents:
                if decode is not None:
                    vae, self._decoded = decoder_view(self.pipeline.vae, decode)
                images += self._hear(self._example, result=latent[None], spoken=self._spoken, vae=vae).output[0]
        return images

    def reports(self) -> dict[str, Any]:
        """What text encoding and decoding did: the prompt cache in all, and the last decode; for the receipt."""
        decoded = None if self._decoded is None else self._decoded.to_dict()
        return {"prompts": self.prompting.cache.summary(), "decode": decoded}

    def to_latent(self, image: Any) -> Tensor:
        """The latent of a picture (PIL or path) by the pipeline's image-to-image sibling; a tensor is a latent already.

        Raises: UnsupportedError for a pipeline without such a sibling.
        """
        if isinstance(image, Tensor):
            return image
        from PIL.Image import Image

        picture = image if isinstance(image, Image) else pictures.open_image(image)
        with self._lock:
            arguments = self.prompting.with_picture(self._example, picture, self.spec.latent_shape)
            latent = latent_of(hear(self.prompting.sibling, self.prompting.networks, arguments))[0]
        if tuple(latent.shape) != self.spec.latent_shape:
            raise ShapeError(f"image: its latent has shape {tuple(latent.shape)}; needs {self.spec.latent_shape}")
        return latent.to(self.device)


class BareDenoiser(NetworkDenoiser):
    """A network without a pipeline: a prompt is a mapping of its arguments, or {"cond": {...}, "uncond": {...}}."""

    def encode(self, prompt: Any) -> Condition:
        """The arguments as they are, one row each. Raises: PromptError for arguments that are unknown or lacking."""
        if not isinstance(prompt, Mapping):
            raise PromptError(
                f"prompt: {prompt!r}; a bare network needs a mapping of its arguments, such as {self._needs()}"
            )
        branches = prompt if set(prompt) <= {"cond", "uncond"} and "cond" in prompt else {"cond": prompt}
        return Condition({name: self._inputs(name, given) for name, given in branches.items()})

    def _inputs(self, branch: str, given: Any) -> Inputs:
        names = argument_names(self.networks["main"])
        own = (self.manner.latent, self.manner.time)
        if not isinstance(given, Mapping):
            raise PromptError(f"prompt: branch {branch!r} is {type(given).__name__}; need a mapping of arguments")
        unknown = sorted(name for name in given if name not in names or name in own)
        lacking = [name for name in self._needs() if name not in given]
        if unknown or lacking:
            kind = type(self.networks["main"]).__name__
            raise PromptError(
                f"prompt: branch {branch!r} lacks {lacking} and has {unknown}, which {kind} does not take; it takes "
                f"{', '.join(name for name in names if name not in own)}"
            )
        return inputs_of(dict(given), 0, 1, self.device, None)

    def _needs(self) -> list[str]:
        """Arguments without a default, but for latent and time."""
        parameters = inspect.signature(plain(self.networks["main"]).forward).parameters.values()
        own = (self.manner.latent, self.manner.time)
        return [
            p.name
            for p in parameters
            if p.default is p.empty and p.kind is p.POSITIONAL_OR_KEYWORD and p.name not in own
        ]

    def reports(self) -> dict[str, Any]:
        """Nothing: prompts are arguments, results are latents."""
        return {}

    def to_images(self, latents: Tensor) -> list[Any]:
        """None: there is no decoder."""
        return []

    def to_latent(self, image: Any) -> Tensor:
        """A tensor as it is. Raises: UnsupportedError for pictures."""
        if isinstance(image, Tensor):
            return image
        raise UnsupportedError("image: a bare network has no encoder for pictures; pass the start latent as a tensor")


def measure(pipeline: Any, heard: Sequence[Heard], prompting: Prompting) -> Manner:
    """The manner of a pipeline from runs at times N, N/2, N/4, the first row answered with ones, others with zeros.

    Raises: UnsupportedError for what no session can do, naming it.
    """
    name = type(pipeline).__name__
    first = heard[0].calls[0]
    names = tuple(first)
    latent, time = names[0], "timestep"
    if not isinstance(first.get(time), Tensor):
        raise UnsupportedError(f"{name}: hands its network no tensor `timestep`; use vivace.accelerate")
    _check_latent(name, heard[0], latent)
    order, sign = _order(name, heard[0])
    divisor, offset = _affine(
        name, [float(run.calls[0][time].flatten()[0]) for run in heard], prompting.times, first[time]
    )
    skipped = (latent, time, "return_dict")
    rows = [inputs_of({n: v for n, v in r.calls[0].items() if n not in skipped}, 0, 1, None, None) for r in heard]
    changing = [key for key in rows[0].tree if any(not rows[0].same(row, key) for row in rows[1:])]
    if changing:
        raise UnsupportedError(
            f"{name}: argument {', '.join(changing)} of its network changes along a run, a session holds conditions "
            "fixed; use vivace.accelerate, which keeps the pipeline's own loop"
        )
    column = first[time].shape[1] if first[time].dim() == 2 else 0
    return Manner(latent, time, divisor, offset, first[time].dtype, sign, order, column)


def _check_latent(name: str, heard: Heard, argument: str) -> None:
    """Refuse networks that read more than the latents."""
    got, latent = heard.calls[0][argument].shape[1:], latent_of(heard).shape[1:]
    if got != latent:
        raise UnsupportedError(
            f"{name}: its network reads {tuple(got)}, its scheduler's latents are {tuple(latent)}: more than the "
            "latents goes in; use vivace.accelerate, which keeps the pipeline's own loop"
        )


def _order(name: str, heard: Heard) -> tuple[tuple[str, ...], float]:
    """Branches in order, and the sign of predictions: from what answers 1, 0 (one branch: 1) became at scale `SCALE`.

    uncond + s * (cond - uncond) is s when cond came first, 1 - s when uncond did; 1 for one branch, or where the
    pipeline gives the result the norm of cond.
    """
    rows, handed = rows_of(heard), heard.prediction
    assert handed is not None
    value = float(handed[0].flatten()[0])
    even = bool(((handed[0] - value).abs() < 0.02).all())  # half precision rounds
    known = {SCALE: ("cond", "uncond"), SCALE - 1.0: ("uncond", "cond"), 1.0: ("cond", "uncond")[:rows]}
    order = next((order for is_, order in known.items() if abs(abs(value) - is_) < 0.02), None)
    if not even or order is None or len(order) != rows:
        raise UnsupportedError(
            f"{name}: combines {rows} predictions in a way sessions do not know ({value:g} from 1 and 0 at guidance "
            f"{SCALE:g}); use vivace.accelerate, which keeps the pipeline's own loop"
        )
    uncond_first = order[0] == "uncond"
    return order, (-1.0 if (value < 0) != uncond_first else 1.0)


def _affine(name: str, fed: Sequence[float], times: Sequence[float], like: Tensor) -> tuple[float, float]:
    """(divisor, offset) of fed = t / divisor + offset through three points. Raises: UnsupportedError off a line."""
    slope = (fed[0] - fed[2]) / (times[0] - times[2])
    offset = fed[0] - slope * times[0]
    error = abs(fed[1] - (slope * times[1] + offset))
    even = like.dim() < 2 or bool((like == like.flatten()[0]).all())
    if slope == 0.0 or not even or error > 4 * torch.finfo(like.dtype).eps * max(map(abs, fed)):
        raise UnsupportedError(
            f"{name}: feeds its network {list(fed)} at the timesteps {list(times)}, which is no line, or not one value "
            "a sample; use vivace.accelerate, which keeps the pipeline's own loop"
        )
    divisor, small = 1.0 / slope, 1e-6 * max(map(abs, fed))
    return _whole(divisor, 1e-4 * abs(divisor)), _whole(offset, small)


def _whole(value: float, within: float) -> float:
    """The whole number within reach of a measured value, else the value."""
    return float(round(value)) if abs(value - round(value)) < within else value


def _marks(number: int, latent: Tensor) -> Tensor:
    """Ones for the first row of the first call, zeros for every other."""
    marks = torch.zeros_like(latent)
    if number == 0:
        marks[0] = 1.0
    return marks


def rows_of(heard: Heard) -> int:
    """Rows of the network in one step."""
    return sum(len(next(iter(call.values()))) for call in heard.calls)


def latent_of(heard: Heard) -> Tensor:
    assert heard.latent is not None, "a run that ended at the step has latents"
    return heard.latent
