"""One run of a pipeline's own call on stand-ins: what its networks are handed, and what comes of their answers.

The scheduler of such a run has one step and adds no noise; the networks answer what they are told. Text encoding, size
arithmetic, packing of latents and decoding are thereby the pipeline's own code, of whatever family.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

from vivace.models.pipelines.families import plain
from vivace.models.pipelines.prompts import PromptCache, cached_encode_prompt
from vivace.models.pipelines.views import fork, view

NETWORKS = ("transformer", "transformer_2", "unet")  # names that pipelines have for what they call in every step


class Stepped(NamedTuple):
    """What a scheduler's `step` returns, as a tuple and by name."""

    prev_sample: Tensor
    pred_original_sample: Tensor


class Stop(Exception):
    """The run has shown what was asked of it."""


@dataclass
class Heard:
    """What one run showed.

    calls: arguments of the network by name, in order; latent, prediction: what the scheduler's step was handed; spoken:
    results of `encode_prompt` in order; asked: what the scheduler was asked for, such as sigmas and mu; output: what
    the pipeline returned, None for a run stopped at the step.
    """

    calls: list[dict[str, Any]] = field(default_factory=list)
    latent: Tensor | None = None
    prediction: Tensor | None = None
    spoken: list[Any] = field(default_factory=list)
    asked: dict[str, Any] = field(default_factory=dict)
    output: Any = None


class OneStep:
    """A scheduler of one step at `timestep`, without noise. `step` hands (prediction, latent) to `stepped`."""

    order = 1
    init_noise_sigma = 1.0

    def __init__(self, own: Any, timestep: float, stepped: Callable[[Tensor, Tensor], Tensor]) -> None:
        self._own, self._stepped = own, stepped
        self.asked: dict[str, Any] = {}
        self.timesteps = torch.tensor([timestep], dtype=torch.float32)
        self.sigmas = torch.tensor([1.0, 0.0])

    def __getattr__(self, name: str) -> Any:
        if "_own" not in self.__dict__:  # a copy in the making
            raise AttributeError(name)
        return getattr(self.__dict__["_own"], name)  # configuration and whatever else pipelines read

    def set_timesteps(
        self,
        num_inference_steps: Any = None,
        device: Any = None,
        timesteps: Any = None,
        sigmas: Any = None,
        mu: Any = None,
    ) -> None:
        """The one timestep, whatever is asked for."""
        self.asked |= {"timesteps": timesteps, "sigmas": sigmas, "mu": mu}
        self.timesteps = self.timesteps.to(device)

    def set_begin_index(self, begin_index: int = 0) -> None:
        """There is one step."""

    def scale_model_input(self, sample: Tensor, timestep: Any = None) -> Tensor:
        """The sample: a plan's row scales it."""
        return sample

    def add_noise(self, sample: Tensor, *_: Any) -> Tensor:
        """The sample without noise."""
        return sample

    def scale_noise(self, sample: Tensor, *_: Any, **__: Any) -> Tensor:
        """The sample without noise."""
        return sample

    def step(self, model_output: Tensor, timestep: Any, sample: Tensor, *_: Any, **__: Any) -> Stepped:
        """What `stepped` makes of the step."""
        result = self._stepped(model_output, sample)
        return Stepped(result, result)


def networks_of(pipeline: Any) -> dict[str, Any]:
    """The networks a pipeline calls in every step, by the name of the component."""
    return {name: pipeline.components[name] for name in NETWORKS if pipeline.components.get(name) is not None}


def argument_names(network: Any) -> tuple[str, ...]:
    """Names of the arguments of a network's forward."""
    return tuple(inspect.signature(plain(network).forward).parameters)


@torch.inference_mode(False)  # what a part keeps of a run stays an ordinary tensor
@torch.no_grad()
def hear(
    pipeline: Any,
    networks: Mapping[str, Any],
    arguments: Mapping[str, Any],
    *,
    timestep: float = 1000.0,
    answer: Callable[[int, Tensor], Tensor] = lambda number, latent: torch.zeros_like(latent),
    result: Tensor | None = None,
    spoken: Sequence[Any] = (),
    cache: PromptCache | None = None,
    vae: Any = None,
    steps: int = 1,
) -> Heard:
    """Run `pipeline(**arguments)` for one step on stand-ins; pipeline, parts and torch's generators stay as they are.

    Args:
        networks: by component name, those of `networks_of` or moved copies of them; they are not run.
        answer: (number of the call, latent it got) -> the network's prediction.
        result: what the step returns, shaped like its latents or with one row; None ends the run at the step.
        spoken: what `encode_prompt` returned in an earlier run with the same arguments, in place of encoding again.
        cache: where results of `encode_prompt` are kept and looked for.
        vae: the decoder in place of the pipeline's own.
        steps: what the scheduler is asked for; it runs one of them.
    Raises: whatever the pipeline raises.
    """
    heard = Heard()

    def stepped(prediction: Tensor, latent: Tensor) -> Tensor:
        heard.prediction, heard.latent = prediction, latent
        if result is None:
            raise Stop
        return result.to(latent.device, latent.dtype).expand(latent.shape)

    scheduler = OneStep(pipeline.scheduler, timestep, stepped)
    stand = _stand_in(pipeline, scheduler, {name: _listening(n, heard, answer) for name, n in networks.items()}, vae)
    overrides: dict[str, Any] = {"maybe_free_model_hooks": lambda: None}
    if hasattr(pipeline, "encode_prompt"):
        overrides["encode_prompt"] = _speaking(stand, heard.spoken, spoken, cache)
    settings: dict[str, Any] = {
        "num_inference_steps": steps,
        "return_dict": False,
        "output_type": "latent" if result is None else "pil",
    }
    settings["generator"] = torch.Generator().manual_seed(0)  # noise drawn here leads nowhere
    try:
        heard.output = view(stand, **overrides)(**{**arguments, **settings})
    except Stop:
        pass
    heard.asked = scheduler.asked
    return heard


def _stand_in(pipeline: Any, scheduler: OneStep, networks: Mapping[str, Any], vae: Any) -> Any:
    """A copy of a pipeline with other parts; what is set on it stays on it."""
    stand = copy.copy(pipeline)
    stand.__dict__ |= {"scheduler": scheduler, "_progress_bar_config": {"disable": True}, **networks}
    if stand.__dict__.get("vae") is not None:
        stand.__dict__["vae"] = fork(stand.vae) if vae is None else vae  # some keep what they decode in attributes
    return stand


def _listening(network: Any, heard: Heard, answer: Callable[[int, Tensor], Tensor]) -> Any:
    """A stand-in of a network that notes its arguments and gives an answer."""
    names = argument_names(network)

    def call(*args: Any, **kwargs: Any) -> Any:
        found = dict(zip(names, args, strict=False)) | kwargs
        given = {name: found.pop(name) for name in names if name in found} | found  # in the order of the forward
        heard.calls.append(given)
        prediction = _widened(network, answer(len(heard.calls) - 1, given[names[0]]))
        return (prediction,) if given.get("return_dict") is False else Predicted(prediction)

    quiet = {"cache_context": lambda *_, **__: nullcontext()} if hasattr(network, "cache_context") else {}
    return view(network, __call__=call, **quiet)


class Predicted(NamedTuple):
    """What a network returns, as a tuple and by name."""

    sample: Tensor


def _widened(network: Any, prediction: Tensor) -> Tensor:
    """A prediction with zeros as learned variances, for networks that have as many channels of them."""
    config = network.config
    learned = config.get("learn_sigma") or config.get("out_channels") == 2 * (config.get("in_channels") or 0)
    return torch.cat((prediction, torch.zeros_like(prediction)), 1) if learned else prediction


def _speaking(stand: Any, said: list[Any], known: Sequence[Any], cache: PromptCache | None) -> Callable[..., Any]:
    """`encode_prompt` of a stand-in: results of an earlier run where there are any; results are noted in `said`."""
    own = stand.encode_prompt if cache is None else cached_encode_prompt(stand, cache)

    def encode_prompt(*args: Any, **kwargs: Any) -> Any:
        index = len(said)
        said.append(known[index] if index < len(known) else own(*args, **kwargs))
        return said[-1]

    return encode_prompt
