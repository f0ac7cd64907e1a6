"""Caches of other libraries around the `diffusers` network: hooks of diffusers itself, and cache-dit.

A cache works between evaluations, so `begin` must be called before every picture; both branches are one call.
"""

from __future__ import annotations

import ast
import io
import logging
import sys
import time
from collections.abc import Callable, Mapping
from contextlib import redirect_stdout
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from vivace.bench.artefacts import versions
from vivace.bench.models import BenchModel
from vivace.bench.peers import Network, Ready, absent
from vivace.bench.peers.eager import network

HOOKS, CACHE_DIT = "diffusers hooks", "cache-dit"
DTYPES = ("float32", "bfloat16")
# Modules that TaylorSeer forecasts. Its own patterns match no module of a DiT, so that it would silently do nothing.
FORECAST = (r"transformer_blocks\.\d+\.(attn1|ff)",)
# Drawn by an uncached network in the same loop, so that MagCache can measure its ratios: draw(call).
Draw = Callable[[Network], object]


@dataclass(frozen=True)
class Setting:
    """One cache with one setting. method "none": the plain network."""

    backend: str
    method: str
    options: Mapping[str, Any] = field(default_factory=dict, hash=False)

    @property
    def told(self) -> str:
        """The setting as text."""
        return ", ".join(f"{name} {value}" for name, value in self.options.items()) or "-"


def _each(backend: str, method: str, **options: tuple[Any, ...]) -> tuple[Setting, ...]:
    """A setting for every place of the options' values."""
    return tuple(
        Setting(backend, method, dict(zip(options, values, strict=True)))
        for values in zip(*options.values(), strict=True)
    )


SETTINGS: tuple[Setting, ...] = (
    Setting(HOOKS, "none"),
    *_each(HOOKS, "FirstBlockCache", threshold=(0.05, 0.1, 0.2, 0.3)),
    *_each(HOOKS, "TaylorSeer", cache_interval=(2, 3, 4, 3), max_order=(1, 1, 1, 2)),
    *_each(HOOKS, "MagCache", threshold=(0.06, 0.12, 0.24), max_skip_steps=(3, 3, 5)),
    *_each(HOOKS, "PyramidAttentionBroadcast", spatial_attention_block_skip_range=(2, 4)),
    *_each(CACHE_DIT, "DBCache", threshold=(0.08, 0.16, 0.3), warm_up=(4, 4, 2)),
    *_each(CACHE_DIT, "DBCache + TaylorSeer", threshold=(0.16, 0.3), warm_up=(4, 2), order=(1, 1)),
)
QUICK = (0, 3, 4, 8, 11, 12, 16)  # of these, in quick runs: the strongest of each method on the bundled model


def why_not(setting: Setting) -> str | None:
    """None, or why it cannot run."""
    with redirect_stdout(sys.stderr):  # cache-dit's log goes to the stdout of the time it is imported
        return absent("diffusers", *(("cache_dit",) if setting.backend == CACHE_DIT else ()))


def make(model: BenchModel, dtype: str, setting: Setting, steps: int, draw: Draw) -> Ready:
    """The network under a cache, for pictures of `steps` evaluations."""
    begin = time.perf_counter()
    module = model.transformer(getattr(torch, dtype))
    if setting.method == "none":
        return Ready(network(module), time.perf_counter() - begin, versions("diffusers", "torch"), "eager")
    if setting.backend == CACHE_DIT:
        call, fresh = network(module), _cache_dit(module, setting)
        libraries = versions("cache-dit", "diffusers", "torch")
    else:
        call, fresh = _hooked(module, setting, steps, draw)
        libraries = versions("diffusers", "torch")
    return Ready(call, time.perf_counter() - begin, libraries, f"{setting.told}, eager blocks", fresh)


def _cache_dit(module: Any, setting: Setting) -> Callable[[int], object]:
    """One probing block; a fresh context for every picture."""
    with redirect_stdout(sys.stderr):
        import cache_dit

    for handler in logging.getLogger("CACHE_DIT").handlers:  # one, shared by all its loggers
        handler.setLevel(logging.ERROR)

    def arguments(steps: int) -> dict[str, Any]:
        config = cache_dit.DBCacheConfig(
            Fn_compute_blocks=1, Bn_compute_blocks=0, max_warmup_steps=setting.options["warm_up"],
            residual_diff_threshold=setting.options["threshold"], num_inference_steps=steps,
        )  # fmt: skip
        if "order" not in setting.options:
            return {"cache_config": config}
        taylor = cache_dit.TaylorSeerCalibratorConfig(taylorseer_order=setting.options["order"])
        return {"cache_config": config, "calibrator_config": taylor}

    cache_dit.enable_cache(module, **arguments(1))
    return lambda steps: cache_dit.refresh_context(module, **arguments(steps))


def _hooked(module: Any, setting: Setting, steps: int, draw: Draw) -> tuple[Network, Callable[[int], object]]:
    """The call under a hook of diffusers, and what clears its state before a picture.

    A DiT has no `enable_cache`, so hooks are applied as that does, and the cache context is set by hand.
    """
    from diffusers import hooks
    from diffusers.hooks.hooks import CacheContext, HookRegistry, _set_cache_context

    plain, now = network(module), [0.0]

    def call(x: Tensor, t: Tensor, labels: Tensor) -> Tensor:
        now[0] = float(t[0])
        return plain(x, t, labels)

    def fresh(steps: int) -> None:
        HookRegistry.check_if_exists_or_initialize(module).reset_stateful_hooks()
        _set_cache_context(module, CacheContext("both"))

    options = dict(setting.options)
    if setting.method == "MagCache":
        ratios = _ratios(module, steps, lambda: (fresh(steps), draw(call)))
        options |= {"mag_ratios": ratios, "num_inference_steps": steps}
    elif setting.method == "TaylorSeer":
        options |= {"cache_identifiers": list(FORECAST), "taylor_factors_dtype": torch.float32}
    elif setting.method == "PyramidAttentionBroadcast":
        options |= {"current_timestep_callback": lambda: now[0]}
    apply, config = {
        "FirstBlockCache": (hooks.apply_first_block_cache, hooks.FirstBlockCacheConfig),
        "TaylorSeer": (hooks.apply_taylorseer_cache, hooks.TaylorSeerCacheConfig),
        "MagCache": (hooks.apply_mag_cache, hooks.MagCacheConfig),
        "PyramidAttentionBroadcast": (
            hooks.apply_pyramid_attention_broadcast, hooks.PyramidAttentionBroadcastConfig,
        ),
    }[setting.method]  # fmt: skip
    apply(module, config(**options))
    HookRegistry.check_if_exists_or_initialize(module).invalidate_child_registries_cache()
    return call, fresh


def _ratios(module: Any, steps: int, run: Callable[[], object]) -> list[float]:
    """What MagCache's calibration mode prints for one picture."""
    from diffusers import hooks
    from diffusers.hooks.hooks import HookRegistry
    from diffusers.hooks.mag_cache import _MAG_CACHE_BLOCK_HOOK, _MAG_CACHE_LEADER_BLOCK_HOOK

    hooks.apply_mag_cache(module, hooks.MagCacheConfig(calibrate=True, num_inference_steps=steps))
    registry = HookRegistry.check_if_exists_or_initialize(module)
    registry.invalidate_child_registries_cache()
    with redirect_stdout(io.StringIO()) as told:
        run()
    for name in (_MAG_CACHE_LEADER_BLOCK_HOOK, _MAG_CACHE_BLOCK_HOOK):
        registry.remove_hook(name)
    registry.invalidate_child_registries_cache()
    ratios = ast.literal_eval(next(line for line in told.getvalue().splitlines() if line.startswith("[1.0")))
    if len(ratios) != steps:
        raise RuntimeError(f"MagCache: {len(ratios)} ratios of a picture of {steps} evaluations")
    return [float(ratio) for ratio in ratios]
