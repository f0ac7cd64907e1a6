"""A tiny random DiT of pictures: 3 blocks, 16 tokens, 10 classes."""

import torch

import vivace
from tests.models.conftest import TINY
from vivace.models.dit import DiT
from vivace.models.dit_config import DiTConfig

FIELDS = {**TINY, "in_channels": 3, "out_channels": 6}
SCHEDULE = {"_class_name": "DDIMScheduler", "num_train_timesteps": 1000, "beta_schedule": "linear"}


def tiny_pipe(folder):
    """Saved in the diffusers format, with weights large enough that every part matters, and loaded."""
    torch.manual_seed(0)
    model = DiT(DiTConfig.from_dict(FIELDS))
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    model.save(folder)
    return vivace.load(folder, scheduler=SCHEDULE)


def plan_of(pipe, solver="unipc", steps=8, guidance=2.0, **options):
    """An unbound plan of the pipe's schedule, guided unless `guidance` is None."""
    plan = vivace.make_plan(pipe.spec.schedule, solver, steps, prediction=pipe.spec.prediction, **options)
    return plan if guidance is None else vivace.passes.apply_guidance(plan, guidance)
