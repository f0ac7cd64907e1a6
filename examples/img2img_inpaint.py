"""Image to image and inpainting go through unchanged: first bit for bit as the pipeline's own scheduler does them, then
under a plan whose last rows are what `strength` leaves.

    python examples/img2img_inpaint.py                 # a tiny stand-in: runs anywhere, in seconds
    python examples/img2img_inpaint.py --model stabilityai/stable-diffusion-3.5-medium
"""

import numpy as np
import tiny
import torch
from diffusers import StableDiffusion3Img2ImgPipeline, StableDiffusion3InpaintPipeline
from PIL import Image

import vivace

args = tiny.options(__doc__)
base, inputs = tiny.open_pipeline(args, tiny.sd3)
size = inputs.get("width", 1024), inputs.get("height", 1024)
inputs |= {"image": Image.radial_gradient("L").resize(size).convert("RGB"), "strength": 0.6, "num_inference_steps": 20}
mask = Image.linear_gradient("L").resize(size).point(lambda level: 255 * (level > 127))

schedule = vivace.NoiseSchedule.from_diffusers(base.scheduler)
plan = vivace.make_plan(schedule, solver="unipc", steps=20, prediction="flow")  # silent about guidance: the pipeline's

for cls, extra in ((StableDiffusion3Img2ImgPipeline, {}), (StableDiffusion3InpaintPipeline, {"mask_image": mask})):
    pipe = cls(**base.components)
    pipe.set_progress_bar_config(disable=True)

    def picture(pipe=pipe, extra=extra):
        return pipe(**inputs, **extra, generator=torch.Generator().manual_seed(0)).images[0]

    plain = picture()
    vivace.accelerate(pipe)  # no plan: what the pipeline's own scheduler does
    same = np.array_equal(picture(), plain)
    vivace.restore(pipe)
    vivace.accelerate(pipe, plan)
    picture().save(args.out)
    rows = vivace.receipt(pipe).nfe
    vivace.restore(pipe)
    print(f"{cls.__name__}: own scheduler bit for bit: {same}; unipc: {rows} of {len(plan.steps)} rows")
