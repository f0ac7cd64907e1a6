"""The network of `diffusers` as it is."""

from __future__ import annotations

import time
from typing import Any

import torch
from torch import Tensor

from vivace.bench.artefacts import versions
from vivace.bench.models import BenchModel
from vivace.bench.peers import Network, Ready, absent

NAME = "diffusers"
DTYPES = ("float32", "bfloat16")


def why_not(dtype: str) -> str | None:
    """None, or why it cannot run."""
    return absent("diffusers")


def make(model: BenchModel, dtype: str, batch: int, threads: int) -> Ready:
    """Eager mode under inference mode."""
    begin = time.perf_counter()
    call = network(model.transformer(getattr(torch, dtype)))
    return Ready(call, time.perf_counter() - begin, versions("diffusers", "torch"), "eager, inference mode")


def network(module: Any) -> Network:
    """A `diffusers` DiT, or a stand-in, as a call on float32 inputs."""

    def call(x: Tensor, t: Tensor, labels: Tensor) -> Tensor:
        with torch.inference_mode():
            prediction: Tensor = module(x.to(module.dtype), t, class_labels=labels, return_dict=False)[0]
            return prediction.float()

    return call
