"""cache-dit around the `diffusers` network: blocks reused while the first block's residual hardly changes.

A cache works between evaluations, so this runtime only belongs where whole pictures are drawn.
"""

from __future__ import annotations

import logging
import sys
import time
from contextlib import redirect_stdout
from typing import Any

import torch

from vivace.bench.artefacts import versions
from vivace.bench.models import BenchModel
from vivace.bench.peers import Ready, absent
from vivace.bench.peers.eager import network

NAME = "cache-dit"
DTYPES = ("float32", "bfloat16")
WARM_UP, THRESHOLD = 4, 0.08  # rows computed in full at first; the library's own residual threshold


def why_not(dtype: str) -> str | None:
    """None, or why it cannot run."""
    with redirect_stdout(sys.stderr):  # its log goes to the stdout of the time it is imported
        return absent("diffusers", "cache_dit")


def make(model: BenchModel, dtype: str, batch: int, threads: int) -> Ready:
    """First block computed, the rest cached; a fresh context for every picture."""
    with redirect_stdout(sys.stderr):
        import cache_dit

    for handler in logging.getLogger("CACHE_DIT").handlers:  # one, shared by all its loggers
        handler.setLevel(logging.ERROR)
    begin = time.perf_counter()
    module = model.transformer(getattr(torch, dtype))

    def settings(steps: int) -> Any:
        return cache_dit.DBCacheConfig(
            Fn_compute_blocks=1, Bn_compute_blocks=0, max_warmup_steps=WARM_UP, residual_diff_threshold=THRESHOLD,
            num_inference_steps=steps,
        )  # fmt: skip

    cache_dit.enable_cache(module, cache_config=settings(1))
    told = f"DBCache F1 B0, warm-up {WARM_UP}, threshold {THRESHOLD}, eager blocks"
    return Ready(
        network(module),
        time.perf_counter() - begin,
        versions("cache-dit", "diffusers", "torch"),
        told,
        lambda steps: cache_dit.refresh_context(module, cache_config=settings(steps)),
    )
