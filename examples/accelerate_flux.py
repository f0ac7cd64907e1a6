"""FLUX.1 under a plan: 14 steps of DPM-Solver++ in place of 28 of Euler. Its guidance is an input of the network, so it
stays an argument of the call.

    python examples/accelerate_flux.py                 # a tiny stand-in: runs anywhere, in seconds
    python examples/accelerate_flux.py --model black-forest-labs/FLUX.1-dev
"""

import math

import tiny
import torch

import vivace

args = tiny.options(__doc__)
pipe, inputs = tiny.open_pipeline(args, tiny.flux)

schedule = vivace.NoiseSchedule.flow(shift=math.exp(1.15), timestep_scale=1000)  # the shift of FLUX at 1024 x 1024
plan = vivace.make_plan(schedule, solver="dpmpp_2m", steps=14, prediction="flow")
print(plan)

vivace.accelerate(pipe, plan)
image = pipe(**inputs, guidance_scale=3.5, generator=torch.Generator().manual_seed(0)).images[0]
print(vivace.receipt(pipe))
vivace.restore(pipe)
image.save(args.out)
