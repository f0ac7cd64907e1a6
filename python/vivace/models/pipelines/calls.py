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
    doubled: the latents themselves are held twice; rescaled: the scheduler steps what the network read; sign: of the
    prediction that the scheduler gets; plain: the pipeline's own is uncond + scale * (cond - uncond) and no more.
    """

    order: tuple[str, str] = ("uncond", "cond")
    separate: bool = False
    scale: str = "guidance_scale"
    needs: tuple[str, ...] = ()
    doubled: bool = False
    rescaled: bool = False
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

# Beginning of the pipeline's class name -> its style; the longest that fits decides. None: its own guidance only.
STYLES: dict[str, CallStyle | None] = {
    "CogVideoX": _BATCHED,
    "DiT": CallStyle(("cond", "uncond"), doubled=True, rescaled=True),
    "Flux": _TRUE_CFG,
    "Flux2": CallStyle(("cond", "uncond"), separate=True, needs=("",)),  # the scale is an input of the network
    "Flux2Klein": _SEPARATE,
    "HunyuanDiT": _BATCHED,
    "HunyuanDiTPAG": None,
    "HunyuanVideo": _TRUE_CFG,
    "LTX": _BATCHED,
    "LTX2": None,  # two schedulers
    "LTXCondition": None,  # latents are cut on their way to the scheduler, as in the next one
    "LTXImageToVideo": None,
    "LatentConsistencyModel": CallStyle(needs=("",)),
    "Lumina2": CallStyle(("cond", "uncond"), separate=True, sign=-1.0, plain=False),
    "PixArt": _BATCHED,
    "PixArtSigmaPAG": None,  # three branches, as every PAG and InstructPix2Pix
    "QwenImage": CallStyle(("cond", "uncond"), separate=True, scale="true_cfg_scale", needs=_NEGATIVE, plain=False),
    "Sana": _BATCHED,
    "SanaPAG": None,
    "SanaSprint": None,
    "StableDiffusion": _BATCHED,
    "StableDiffusion3PAG": None,
    "StableDiffusionInstructPix2Pix": None,
    "StableDiffusionPAG": None,
    "StableDiffusionXLInstructPix2Pix": None,
    "StableDiffusionXLPAG": None,
    "Wan": _SEPARATE,
}


def call_style(pipeline: Any) -> CallStyle | None:
    """The style of a pipeline's class, or None for a class that is not in the table."""
    name = type(pipeline).__name__
    fitting = [start for start in STYLES if name.startswith(start)]
    return STYLES[max(fitting, key=len)] if fitting else None


def runs_uncond(pipeline: Any, style: CallStyle | None, call: Mapping[str, Any]) -> bool:
    """A call with these arguments runs an unconditional branch; networks with the scale as an input never do."""
    if style is None or not style.guided(call):
        return False
    unet = getattr(pipeline, "unet", None)
    embedded = unet is not None and unet.config.get("time_cond_proj_dim") is not None
    return not embedded and not pipeline.config.get("is_distilled", False)


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
