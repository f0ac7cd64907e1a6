"""Arguments of `select_tokens`."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from vivace.errors import ArgumentError, DtypeError, ShapeError
from vivace.kernels.norm_modulate.check import dtype_name

OP = "select_tokens"
METRICS = ("deviation", "norm")
DTYPES = ("float32", "bfloat16", "float16", "float64")
MOST_PLANES = 4
MOST_TOKENS = 1 << 22  # distances of ranks are exact in float32
MOST_BOUND = 4095


def check(
    planes: Sequence[Any],
    weights: Any,
    ages: Any,
    keep: int,
    patch: Sequence[int],
    metric: str,
    scores: Any,
    drop_high: float,
    factors: Any,
    bound: int,
    least: int | None,
) -> str:
    """Name of the dtype of planes or scores. Raises ShapeError, DtypeError, ArgumentError."""
    if ages.dim() != 2 or not ages.is_contiguous() or ages.shape[1] > MOST_TOKENS:
        raise ShapeError(
            f"{OP}: ages have shape {tuple(ages.shape)}, need [B, N] in one piece, N at most {MOST_TOKENS}"
        )
    if dtype_name(ages.dtype) != "int32":
        raise DtypeError(f"{OP}: ages are {dtype_name(ages.dtype)}, need int32")
    tokens = ages.shape[1]
    if not 0 <= keep <= tokens:
        raise ArgumentError(f"{OP}: keep is {keep}, needs 0 .. {tokens}, the tokens of a picture")
    if metric not in METRICS:
        raise ArgumentError(f"{OP}: metric is {metric!r}, needs one of {METRICS}")
    if not 0.0 <= drop_high <= 1.0:
        raise ArgumentError(f"{OP}: drop_high is {drop_high}, needs 0 .. 1")
    if not -1 <= bound <= MOST_BOUND or not 0 <= (keep if least is None else least) <= keep:
        raise ArgumentError(f"{OP}: bound is {bound}, least {least}; need -1 .. {MOST_BOUND}, and 0 .. keep = {keep}")
    if factors is not None:
        _check_floats("factors", factors, ages, "[A], A of 1 or more", factors.dim() == 1 and len(factors) > 0)
    if scores is not None:
        if planes or weights is not None:
            raise ArgumentError(f"{OP}: scores are given, and planes or weights besides; give one of them")
        return _check_floats("scores", scores, ages, f"{tuple(ages.shape)} as ages", scores.shape == ages.shape)
    return _check_planes(planes, weights, ages, patch)


def _check_planes(planes: Sequence[Any], weights: Any, ages: Any, patch: Sequence[int]) -> str:
    """Planes of one shape and dtype, cut into as many tokens as there are ages; weights of each."""
    if weights is None or not 1 <= len(planes) <= MOST_PLANES:
        raise ArgumentError(
            f"{OP}: {len(planes)} planes {'without' if weights is None else 'with'} weights; need 1 to {MOST_PLANES} "
            "and a weight of each, or scores"
        )
    first = planes[0]
    name, shape = dtype_name(first.dtype), tuple(first.shape)
    if name not in DTYPES:
        raise DtypeError(f"{OP}: planes are {name}, need float32, bfloat16 or float16 (float64 in the reference)")
    for plane in planes:
        if plane.shape != first.shape or plane.dtype != first.dtype:
            raise ShapeError(
                f"{OP}: a plane is {dtype_name(plane.dtype)} {tuple(plane.shape)}, the first {name} {shape}"
            )
        _check_device("a plane", plane, ages)
    if len(shape) < 3 or len(patch) != len(shape) - 2 or shape[0] != ages.shape[0] or not shape[1]:
        raise ShapeError(
            f"{OP}: planes have shape {shape}, patch {tuple(patch)}, ages {tuple(ages.shape)}; need [B, C, *spatial] "
            "and an edge for every spatial axis"
        )
    if any(edge < 1 or size % edge for size, edge in zip(shape[2:], patch, strict=True)):
        raise ShapeError(f"{OP}: planes of {shape[2:]} cannot be cut into tokens of {tuple(patch)}")
    if (count := math.prod(grid_of(shape[2:], patch))) != ages.shape[1]:
        raise ShapeError(f"{OP}: planes of {shape[2:]} have {count} tokens of {tuple(patch)}, ages {ages.shape[1]}")
    needs = f"[{shape[0]}, {len(planes)}]"
    _check_floats("weights", weights, ages, needs, tuple(weights.shape) == (shape[0], len(planes)))
    return name


def grid_of(spatial: Sequence[int], patch: Sequence[int]) -> tuple[int, ...]:
    """Tokens along every axis."""
    return tuple(size // edge for size, edge in zip(spatial, patch, strict=True))


def _check_floats(what: str, tensor: Any, ages: Any, needs: str, fits: bool) -> str:
    if not fits or not tensor.is_contiguous():
        raise ShapeError(f"{OP}: {what} have shape {tuple(tensor.shape)}, need {needs}, in one piece")
    name = dtype_name(tensor.dtype)
    if name not in ("float32", "float64"):
        raise DtypeError(f"{OP}: {what} are {name}, need float32")
    _check_device(what, tensor, ages)
    return name


def _check_device(what: str, tensor: Any, ages: Any) -> None:
    if tensor.device != ages.device:
        raise ArgumentError(f"{OP}: {what} is on {tensor.device}, ages on {ages.device}; move it with .to(device)")
