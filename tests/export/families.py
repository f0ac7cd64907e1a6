"""Packs of tiny networks of diffusers, two blocks each: made once in a process, since a trace takes seconds."""

from __future__ import annotations

import functools
import tempfile
from pathlib import Path

import torch
from torch import nn

import vivace
from tests.models.pipelines.tiny import FAMILIES, _unet, make, randomise
from vivace import passes
from vivace.engine.planners.fixed import Fora, TaylorSeer
from vivace.engine.planners.unet import DeepCache
from vivace.export.packing import export_onnx

CALL = ("embeds", "mask", "height", "width", "binning")
_FOLDER = tempfile.TemporaryDirectory(prefix="vivace-families-")


def load(name, dtype=torch.float32):
    """A tiny pipeline of two blocks, its prompt embeddings as the empty prompt."""
    pipe = make(name, dtype)
    pipe.vae = None
    if name != "sd15":
        net = pipe.transformer
        net.transformer_blocks = nn.ModuleList(list(net.transformer_blocks)[:: -1 if name == "flux" else 2][:2])
    else:
        pipe.unet = randomise(_unet(layers_per_block=1)).to(dtype)
    if name == "flux":
        net.transformer_blocks = net.transformer_blocks[:1]
        net.single_transformer_blocks = net.single_transformer_blocks[:1]
    arguments = FAMILIES[name].arguments(dtype).items()
    return vivace.load(pipe, call={key: value for key, value in arguments if any(word in key for word in CALL)})


def plan_of(name, pipe):
    """Few structures each: "pixart" caches and tokens at once, "sd3" tokens, "flux" forecasts of its residual, "sd15"
    the rim of its UNet, guided in the first half."""
    plan = pipe.plan(4)
    if name == "flux":
        taylor = TaylorSeer(interval=2, order=1, first=2, last=0, sites=("residual",))
        return passes.apply_block_cache(plan, taylor)
    interval = {"interval": (0.0, 0.5)} if name == "sd15" else {}
    plan = passes.apply_guidance(plan, 4.0, **interval)
    if name == "sd15":
        return passes.apply_block_cache(plan, DeepCache(interval=2))
    if name == "pixart":
        plan = passes.apply_block_cache(plan, Fora(interval=4, last=0, sites=("mlp",)))
    return passes.apply_tokens(plan, 0.5, first=1, last=0)


@functools.cache
def pack_of(name):
    """The pack of a family and its plan."""
    pipe = load(name)
    return export_onnx(pipe, plan_of(name, pipe), Path(_FOLDER.name) / name)
