"""The loop of `diffusers` around any runtime's network, on given noise, without the pipeline's progress bar and VAE."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from vivace.bench.peers import Network

# What a competent user takes: the whole range of timesteps, and a last row that ends without noise.
SOLVERS: Mapping[str, tuple[str, Mapping[str, Any]]] = {
    "ddim": ("DDIMScheduler", {"set_alpha_to_one": True, "clip_sample": False}),
    "dpmpp_2m": ("DPMSolverMultistepScheduler", {"final_sigmas_type": "zero"}),
    "unipc": ("UniPCMultistepScheduler", {"final_sigmas_type": "zero"}),
}
SPACINGS = ("linspace", "trailing")


def scheduler(config: Mapping[str, Any], solver: str, spacing: str) -> Any:
    """The diffusers scheduler of a solver for a model's scheduler configuration."""
    import diffusers

    kind, options = SOLVERS[solver]
    plain = {name: value for name, value in config.items() if not name.startswith("_")}
    return getattr(diffusers, kind).from_config(plain, timestep_spacing=spacing, **options)


def draw(call: Network, solver: Any, steps: int, noise: Tensor, labels: Tensor, null: int, guidance: float) -> Tensor:
    """Latents [n, C, H, W] from noise [n, C, H, W] and labels [n]; both branches in one evaluation of 2 n rows."""
    count = len(noise)
    both = torch.cat((labels, torch.full_like(labels, null)))
    solver.set_timesteps(steps)
    x = noise * solver.init_noise_sigma
    for timestep in solver.timesteps:
        scaled = solver.scale_model_input(x, timestep)
        prediction = call(torch.cat((scaled, scaled)), timestep.float().repeat(2 * count), both)
        cond, uncond = prediction[:count], prediction[count:]
        x = solver.step(uncond + guidance * (cond - uncond), timestep, x, return_dict=False)[0]
    return x
