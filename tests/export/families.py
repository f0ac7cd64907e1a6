"""Packs of tiny networks of diffusers, two blocks each: made once in a process, since a trace takes seconds."""

from __future__ import annotations

import functools
import tempfile
from pathlib import Path

import torch
from torch import nn

import vivace
from tests.models.pipelines.tiny import FAMILIES, make
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
    if name == "flux":
        net.transformer_blocks = net.transformer_blocks[:1]
        net.single_transformer_blocks = net.single_transformer_blocks[:1]
    arguments = FAMILIES[name].arguments(dtype).items()
    return vivace.load(pipe, call={key: value for key, value in arguments if any(word in key for word in CALL)})


def plan_of(name, pipe):
    """Caches and tokens of each family: "pixart" all at once with guidance in the first half, "sd3" attentions and
    tokens, "flux" forecasts, "sd15" the inner blocks of its UNet."""
    plan = pipe.plan(6)
    if name == "flux":
        return passes.apply_block_cache(plan, TaylorSeer(interval=2, order=1, first=2, sites=("residual",)))
    interval = {"interval": (0.0, 0.5)} if name == "pixart" else {}
    plan = passes.apply_guidance(plan, 4.0, **interval)
    if name == "sd15":
        return passes.apply_block_cache(plan, DeepCache(interval=2))
    plan = passes.apply_block_cache(plan, Fora(interval=2, sites=("attn", "mlp") if name == "pixart" else ("attn",)))
    return passes.apply_tokens(plan, 0.5, first=2, last=2)


@functools.cache
def pack_of(name):
    """The pack of a family and its plan."""
    pipe = load(name)
    return export_onnx(pipe, plan_of(name, pipe), Path(_FOLDER.name) / name)
