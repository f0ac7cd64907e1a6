"""Stable Diffusion 3 under a plan: 12 steps of DPM-Solver++ in place of 28 of Euler, guidance in the first 60 %.

python examples/accelerate_sd3.py                  # a tiny stand-in: runs anywhere, in seconds
python examples/accelerate_sd3.py --model stabilityai/stable-diffusion-3.5-medium
"""

import tiny
import torch

import vivace

args = tiny.options(__doc__)
pipe, inputs = tiny.open_pipeline(args, tiny.sd3)

schedule = vivace.NoiseSchedule.from_diffusers(pipe.scheduler)
plan = vivace.make_plan(schedule, solver="dpmpp_2m", steps=12, prediction="flow")
plan = vivace.passes.apply_guidance(plan, scale=5.0, interval=(0.0, 0.6))
print(plan)

vivace.accelerate(pipe, plan)
image = pipe(**inputs, generator=torch.Generator().manual_seed(0)).images[0]
print(vivace.receipt(pipe))
vivace.restore(pipe)
image.save(args.out)
