"""From a prompt to the arguments of a pipeline's call, for one step."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch

from vivace.errors import ArgumentError, PromptError, UnsupportedError
from vivace.models.pipelines.calls import CallStyle, call_style
from vivace.models.pipelines.capture import networks_of
from vivace.models.pipelines.decode import DecodeOptions, decoder_view
from vivace.models.pipelines.prompts import PromptCache

SCALE = 3.0  # guidance while recording: both branches run
# What the plan and the request decide.
OURS = (
    *("num_inference_steps", "timesteps", "sigmas", "generator", "latents", "output_type", "return_dict", "strength"),
    *("num_images_per_prompt", "num_videos_per_prompt", "callback_on_step_end", "callback", "eta"),
)
# Names that configurations have for the width of text embeddings, first found decides.
WIDTHS = (
    "joint_attention_dim",
    "caption_channels",
    "cap_feat_dim",
    "text_embed_dim",
    "text_dim",
    "cross_attention_dim",
)
LENGTH = 8  # tokens of an empty prompt where the network leaves it open


@dataclass
class Prompting:
    """A pipeline and how it is asked.

    call: arguments every call of it has, sizes and such; decode: how its VAE decodes, None: as it is; cache: of its
    prompt embeddings.
    """

    pipeline: Any
    call: Mapping[str, Any] = field(default_factory=dict)
    decode: DecodeOptions | None = None
    cache: PromptCache = field(default_factory=PromptCache)

    def __post_init__(self) -> None:
        name, unknown = type(self.pipeline).__name__, sorted(set(self.call) - set(self.parameters))
        if unknown:
            raise ArgumentError(
                f"load: call has {unknown}, which {name} does not take; it takes {', '.join(self.parameters)}"
            )
        self._refuse(self.call, ArgumentError, "load: call")
        if "strength" in self.parameters:
            raise UnsupportedError(
                f"load: {name} starts from pictures; pass its text-to-image sibling "
                "(diffusers.AutoPipelineForText2Image.from_pipe), and the picture to the session: session(image=...)"
            )
        if self.decode is not None:
            decoder_view(self.pipeline.vae, self.decode)  # refuses what this VAE cannot do
        if not self.networks:
            raise UnsupportedError(f"load: {name} has no transformer or unet; pass its network by itself")

    @cached_property
    def parameters(self) -> dict[str, inspect.Parameter]:
        """Arguments of the pipeline's call."""
        return dict(inspect.signature(self.pipeline.__call__).parameters)

    @cached_property
    def networks(self) -> dict[str, Any]:
        """What the pipeline calls in every step, by component name."""
        return networks_of(self.pipeline)

    @property
    def times(self) -> tuple[float, float, float]:
        """Timesteps at which the pipeline is measured; dyadic parts of the training steps, exact in every dtype."""
        steps = float(self.pipeline.scheduler.config.get("num_train_timesteps") or 1000)
        return steps, steps / 2, steps / 4

    @property
    def encodes(self) -> bool:
        """The pipeline has a text encoder."""
        parts = self.pipeline.components.items()
        return any(name.startswith("text_encoder") and part is not None for name, part in parts)

    @property
    def labels(self) -> bool:
        """A prompt is a class label."""
        return "class_labels" in self.parameters

    def arguments(self, prompt: Any) -> dict[str, Any]:
        """Arguments of a call that runs every branch the pipeline can run for this prompt.

        Args:
            prompt: text; None, the empty prompt (zero embeddings for a pipeline without text encoder); a label (int or
                name) for class-conditional pipelines; or a mapping of the pipeline's own arguments.
        Raises: PromptError.
        """
        if isinstance(prompt, Mapping):
            unknown = sorted(set(prompt) - set(self.parameters))
            if unknown:
                raise PromptError(f"prompt: {unknown} are no arguments of {type(self.pipeline).__name__}")
            self._refuse(prompt, PromptError, "prompt")
            return self._guided({**self.call, **prompt})
        if self.labels:
            return self._guided({**self.call, "class_labels": [self._label(prompt)]})
        if prompt is None and any("prompt" in name for name in self.call):
            return self._guided(dict(self.call))
        if prompt is not None and not isinstance(prompt, str):
            raise PromptError(f"prompt: {type(prompt).__name__}; need text, None, or a mapping of the call's arguments")
        if not self.encodes and prompt:
            raise PromptError(
                f"prompt: {type(self.pipeline).__name__} has no text encoder; give {{'prompt_embeds': ...}} or load one"
            )
        fixed = {name: value for name, value in self.call.items() if "prompt" not in name}
        words = {"prompt": prompt or ""} if self.encodes else self._empty()
        return self._guided({**fixed, **words})

    def with_picture(self, arguments: Mapping[str, Any], picture: Any, latent: tuple[int, ...]) -> dict[str, Any]:
        """Arguments of the image-to-image sibling; it, or else we, bring the picture to the size of the latent."""
        takes = inspect.signature(self.sibling.__call__).parameters
        if "height" not in takes:
            factor = self.pipeline.vae_scale_factor
            picture = picture.convert("RGB").resize((latent[-1] * factor, latent[-2] * factor))
        return {name: value for name, value in arguments.items() if name in takes} | {"image": picture, "strength": 1.0}

    @cached_property
    def sibling(self) -> Any:
        """The image-to-image pipeline around the same parts. Raises: UnsupportedError where diffusers has none."""
        from diffusers import AutoPipelineForImage2Image

        try:
            return AutoPipelineForImage2Image.from_pipe(self.pipeline)
        except ValueError:
            raise UnsupportedError(
                f"image: {type(self.pipeline).__name__} has no image-to-image sibling in diffusers; encode the picture "
                "with its VAE and pass the start latent as a tensor"
            ) from None

    def _guided(self, call: dict[str, Any]) -> dict[str, Any]:
        """`call` with guidance asked for where the pipeline can run two branches."""
        style = call_style(self.pipeline) or CallStyle()
        network = next(iter(self.networks.values()))
        if "" in style.needs or style.scale not in self.parameters or network.config.get("time_cond_proj_dim"):
            return call  # the scale is an input of the network
        embedded = any(name.endswith("prompt_embeds") and value is not None for name, value in call.items())
        negative = any(name.startswith("negative_prompt_embeds") and call[name] is not None for name in call)
        if negative and "negative_prompt" in self.parameters:
            call["negative_prompt"] = None
        elif embedded and not self.encodes:
            return {**call, style.scale: 1.0}
        elif "negative_prompt" in self.parameters and call.get("negative_prompt") is None:
            call["negative_prompt"] = ""
        return {**call, style.scale: SCALE}

    def _label(self, prompt: Any) -> int:
        """The class of a label."""
        if prompt is None or prompt == "":
            return 1000  # the pipeline's empty class
        names = getattr(self.pipeline, "labels", {})
        if prompt in names:
            return int(names[prompt])
        if isinstance(prompt, str) and prompt.isdecimal():
            prompt = int(prompt)
        classes = int(self.networks["transformer"].config.num_embeds_ada_norm)
        if isinstance(prompt, bool) or not isinstance(prompt, int) or not 0 <= prompt <= classes:
            raise PromptError(f"prompt: {prompt!r}; need a class from 0 to {classes - 1}, its name, or None")
        return prompt

    def _refuse(self, given: Mapping[str, Any], error: type[Exception], where: str) -> None:
        """Arguments that the plan or the request decides."""
        style = call_style(self.pipeline) or CallStyle()
        scale = (style.scale,) if "" not in style.needs else ()
        taken = sorted({*OURS, *scale} & set(given))
        if taken:
            raise error(f"{where}: has {', '.join(taken)}, which the plan and the session decide; leave them out")

    def _empty(self) -> dict[str, Any]:
        """Zero embeddings with the names the call has for them, as wide as the network reads them."""
        network = next(iter(self.networks.values()))
        read, like = network.config.get, {"dtype": network.dtype, "device": self.pipeline._execution_device}
        width = next((read(name) for name in WIDTHS if read(name)), 1)
        pooled = read("pooled_projection_dim") or 0
        if read("projection_class_embeddings_input_dim") and read("addition_time_embed_dim"):
            pooled = read("projection_class_embeddings_input_dim") - 6 * read("addition_time_embed_dim")
        length = read("max_text_seq_length") or read("text_len") or LENGTH
        made: dict[str, Any] = {}
        for name in self.parameters:
            second = name.endswith("_2")
            tokens = read("text_len_t5") or length if second else length
            if "prompt" not in name or not ("embeds" in name or "mask" in name):
                continue
            if "mask" in name:
                made[name] = torch.ones(1, tokens, dtype=torch.long, device=like["device"])
            elif "pooled" in name:
                made[name] = torch.zeros(1, pooled, **like)
            else:
                wide = read("cross_attention_dim_t5") or width if second else width
                made[name] = torch.zeros(1, tokens, wide, **like)
        return made
