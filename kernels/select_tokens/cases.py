"""Inputs that `select_tokens` is tested and timed on: grids of every rank, ties, NaN, forced tokens, few and all."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from vivace.kernels.spec import Call, Case

DTYPES = ("float32", "bfloat16", "float16")
STARVATION = 0.1


def make(
    dtype: str,
    device: str,
    *,
    batch: int = 2,
    channels: int = 4,
    spatial: tuple[int, ...] = (8, 12),
    patch: tuple[int, ...] = (2, 2),
    keep: int = 8,
    planes: int = 2,
    oldest: int = 3,
    starved: bool = True,
    alone: bool = False,
    edit: Callable[[Tensor], None] | None = None,
    **options: Any,
) -> Call:
    """One call. oldest: the largest age that is drawn; alone: scores, no planes; edit: of the first plane, or them."""
    generator = torch.Generator().manual_seed(5)
    tokens = math.prod(spatial) // math.prod(patch)
    ages = torch.randint(0, oldest + 1, (batch, tokens), generator=generator, dtype=torch.int32).to(device)
    wide = torch.float64 if dtype == "float64" else torch.float32
    if starved:
        options["factors"] = torch.tensor([math.exp(-STARVATION * age) for age in range(6)]).to(device, wide)
    if alone:
        scores = torch.randn(batch, tokens, generator=generator)
        if edit is not None:
            edit(scores)
        return Call(((), None, ages, keep), options | {"scores": scores.to(device, wide)}, (ages,))
    shape = (batch, channels, *spatial)
    values = [torch.randn(shape, generator=generator).to(getattr(torch, dtype)) for _ in range(planes)]
    if edit is not None:
        edit(values[0])
    weights = torch.randn(batch, planes, generator=generator).to(device, wide)
    return Call(([value.to(device) for value in values], weights, ages, keep), options | {"patch": patch}, (ages,))


def ties(values: Tensor) -> None:
    """Nothing but 0, -0 and 1."""
    values.copy_(values.sign().clamp(min=0.0))
    values[..., ::3] *= -0.0


def not_finite(values: Tensor) -> None:
    """NaN in some tokens, infinity in others."""
    values[..., 0] = math.nan
    values[..., 3] = -math.inf


def cases() -> tuple[Case, ...]:
    """All cases; the first is the one that a guided row runs."""

    def case(name: str, dtypes: tuple[str, ...] = DTYPES, **arguments: Any) -> Case:
        return Case(name, partial(make, **arguments), dtypes)

    wide: dict[str, Any] = {"dtypes": ("float32",)}
    scores = wide | {"alone": True}
    line: dict[str, Any] = {"channels": 1, "patch": (1,), "planes": 1}
    return (
        case("deviation"),
        case("norm", metric="norm", planes=3, drop_high=0.5),
        case("norm of all channels", metric="norm", channels=16, patch=(1, 1), keep=50),
        case("one channel", channels=1, drop_high=0.0),
        case("two channels", channels=2, planes=1, starved=False),
        case("video", spatial=(3, 6, 8), patch=(1, 2, 2), keep=13),
        case("wide video", spatial=(5, 4, 30), patch=(1, 2, 2), keep=19, bound=8, least=19, **wide),
        case("four planes", planes=4),
        case("ties", edit=ties, planes=1, metric="norm", **wide),
        case("NaN and infinity", edit=not_finite),
        case("forced", bound=3, least=6, oldest=4, **wide),
        case("all forced", bound=1, least=2, oldest=9, **wide),
        case("one token", keep=1, bound=23, least=1, **wide),
        case("all tokens", keep=24, **wide),
        case("no token", keep=0, **wide),
        case("scores", **scores),
        case("scores, ties", edit=ties, bound=5, **scores),
        case("scores, NaN and infinity", edit=not_finite, drop_high=0.3, **scores),
        case("size 1", spatial=(1, 1), patch=(1, 1), keep=1),
        case("size 123", spatial=(123,), keep=40, bound=4, **line),
        case("size 4097", spatial=(4097,), keep=60, bound=6, oldest=5, batch=1, **(line | {"patch": (17,)})),
        case("empty batch", batch=0),
        case("empty sample", spatial=(0, 4), keep=0, bound=3),
    )
