"""How a pipeline's call meets its network: where the guidance branches are, and which arguments decide.

One line a pipeline class. Only a plan with guidance of its own needs it; everything else runs any pipeline.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from vivace.errors import UnsupportedError


@dataclass(frozen=True, slots=True)
class CallStyle:
    """How a class of pipelines runs classifier-free guidance.

    order: of the branches in one batch, ("uncond", "cond") or ("cond", "uncond"); separate: one network call a branch,
    in that order; scale: the argument that is the guidance scale; needs: guidance also takes a negative prompt;
    doubled: the latents themselves are held twice; sign: of the prediction that the scheduler gets; plain: the pipeline
    combines as uncond + scale * (cond - uncond) and does no more.
    """

    order: tuple[str, str] = ("uncond", "cond")
    separate: bool = False
    scale: str = "guidance_scale"
    needs: tuple[str, ...] = ()
    doubled: bool = False
    sign: float = 1.0
    plain: bool = True

    def guided(self, call: Mapping[str, Any]) -> bool:
        """A call with these arguments (defaults filled in) runs an unconditional branch."""
        scale = call.get(self.scale)
        given = not self.needs or any(call.get(name) is not None for name in self.needs)
        return scale is not None and not isinstance(scale, (list, tuple)) and scale > 1 and given


_BATCHED = CallStyle()
_SEPARATE = CallStyle(("cond", "uncond"), separate=True)
_NEGATIVE = ("negative_prompt", "negative_prompt_embeds")
_TRUE_CFG = CallStyle(("cond", "uncond"), separate=True, scale="true_cfg_scale", needs=_NEGATIVE)

# Beginning of the pipeline's class name -> its style; the longest that fits decides.
STYLES: dict[str, CallStyle] = {
    "CogVideoX": _BATCHED,
    "DiT": CallStyle(("cond", "uncond"), doubled=True),
    "Flux": _TRUE_CFG,
    "Flux2": CallStyle(("cond", "uncond"), separate=True, needs=("",)),  # the scale is an input of the network
    "Flux2Klein": _SEPARATE,
    "HunyuanDiT": _BATCHED,
    "HunyuanVideo": _TRUE_CFG,
    "LTX": _BATCHED,
    "LatentConsistencyModel": CallStyle(needs=("",)),
    "Lumina2": CallStyle(("cond", "uncond"), separate=True, sign=-1.0, plain=False),
    "PixArt": _BATCHED,
    "QwenImage": CallStyle(("cond", "uncond"), separate=True, scale="true_cfg_scale", needs=_NEGATIVE, plain=False),
    "Sana": _BATCHED,
    "StableDiffusion": _BATCHED,
    "Wan": _SEPARATE,
}


def call_style(pipeline: Any) -> CallStyle | None:
    """The style of a pipeline's class, or None for a class that is not in the table."""
    name = type(pipeline).__name__
    fitting = [start for start in STYLES if name.startswith(start)]
    return STYLES[max(fitting, key=len)] if fitting else None


def require_style(pipeline: Any) -> CallStyle:
    """The style of a pipeline's class. Raises UnsupportedError with the line to add."""
    style = call_style(pipeline)
    if style is None:
        name = type(pipeline).__name__
        raise UnsupportedError(
            f"{name}: how it runs guidance is not known, so a plan with guidance of its own cannot drive it; use a "
            f"plan without guidance (the pipeline's own then applies), or add a line such as\n"
            f'    vivace.models.pipelines.calls.STYLES["{name.removesuffix("Pipeline")}"] = '
            f'CallStyle(("uncond", "cond"), separate=False, scale="guidance_scale")'
        )
    return style
