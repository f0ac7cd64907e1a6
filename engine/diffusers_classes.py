"""The covered `diffusers` schedulers and their makers. What each departs from its paper in, its maker says."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from vivace.engine import diffusers_discrete as discrete
from vivace.engine import diffusers_multistep as multistep
from vivace.engine import diffusers_sigmas as sigmas
from vivace.engine.diffusers_config import Made, Request
from vivace.errors import ArgumentError

MAKERS: Mapping[str, Callable[[Request], Made]] = {
    "DDIMScheduler": discrete.ddim,
    "DDIMParallelScheduler": discrete.ddim,
    "CogVideoXDDIMScheduler": discrete.ddim,
    "DDPMScheduler": discrete.ddpm,
    "DDPMParallelScheduler": discrete.ddpm,
    "PNDMScheduler": discrete.pndm,
    "LCMScheduler": discrete.lcm,
    "IPNDMScheduler": discrete.ipndm,
    "EulerDiscreteScheduler": sigmas.euler,
    "EulerAncestralDiscreteScheduler": sigmas.euler,
    "HeunDiscreteScheduler": sigmas.heun,
    "KDPM2DiscreteScheduler": sigmas.kdpm2,
    "KDPM2AncestralDiscreteScheduler": sigmas.kdpm2,
    "LMSDiscreteScheduler": sigmas.lms,
    "DPMSolverMultistepScheduler": multistep.dpm_multistep,
    "DPMSolverSinglestepScheduler": multistep.dpm_singlestep,
    "DEISMultistepScheduler": multistep.deis,
    "UniPCMultistepScheduler": multistep.unipc,
    "EDMEulerScheduler": multistep.edm,
    "EDMDPMSolverMultistepScheduler": multistep.edm,
    "FlowMatchEulerDiscreteScheduler": sigmas.flow,
    "FlowMatchHeunDiscreteScheduler": sigmas.flow,
    "FlowMatchLCMScheduler": sigmas.flow,
}
_BOTH = ("EulerDiscreteScheduler", "FlowMatchEulerDiscreteScheduler", "FlowMatchLCMScheduler")
EXPLICIT: Mapping[str, tuple[str, ...]] = {
    "timesteps": (
        *_BOTH,
        "DDPMScheduler",
        "DDPMParallelScheduler",
        "LCMScheduler",
        "HeunDiscreteScheduler",
        "DPMSolverMultistepScheduler",
        "DPMSolverSinglestepScheduler",
    ),
    "sigmas": (*_BOTH, "UniPCMultistepScheduler", "EDMEulerScheduler"),
}


def make(request: Request) -> Made:
    """The plan's parts. Raises UnsupportedError naming a field; ArgumentError."""
    for key, given in (("timesteps", request.timesteps), ("sigmas", request.sigmas)):
        if given is not None and request.name not in EXPLICIT[key]:
            raise ArgumentError(f"{request.name}: its set_timesteps takes no {key}")
    return MAKERS[request.name](request)
