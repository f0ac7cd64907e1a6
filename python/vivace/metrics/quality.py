"""How far pictures or latents are from a reference, one number a sample, computed in float64 with numpy."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import numpy.typing as npt

from vivace.errors import ArgumentError, ShapeError

Array = npt.NDArray[np.float64]
WINDOW, SPREAD = 11, 1.5  # pixels
K1, K2 = 0.01, 0.03


def psnr(x: Any, reference: Any, *, data_range: float = 2.0) -> Array:
    """10 log10(data_range^2 / mean((x - reference)^2)), in dB; infinite where they are equal.

    Args:
        x, reference: [n, ...], tensors or arrays of one shape.
        data_range: largest minus smallest value; 2 for latents in [-1, 1], 255 for bytes, 1 for [0, 1].
    Returns: float64 [n]. Samples are not pooled: average the decibels.
    Raises: ShapeError, ArgumentError.
    """
    a, b = _pair(x, reference, "psnr")
    _check_range(data_range, "psnr")
    error = np.square(a - b).reshape(len(a), -1).mean(axis=1)
    with np.errstate(divide="ignore"):
        return np.asarray(10.0 * np.log10(data_range**2 / error))


def ssim(x: Any, reference: Any, *, data_range: float = 2.0) -> Array:
    """Mean of (2 ma mb + c1)(2 cov + c2) / ((ma^2 + mb^2 + c1)(va + vb + c2)) over windows and channels.

    ma, mb, va, vb, cov: local means, variances and covariance under an 11x11 Gaussian window, sigma 1.5 pixels, whole
    windows only; c1 = (0.01 data_range)^2, c2 = (0.03 data_range)^2.

    Args:
        x, reference: [n, C, H, W] with H, W >= 11.
        data_range: as in `psnr`.
    Returns: float64 [n], 1 where they are equal.
    Raises: ShapeError, ArgumentError.
    Source: Wang, Bovik, Sheikh and Simoncelli 2004, eq. 13 and 17, section III.C.
    """
    a, b = _pair(x, reference, "ssim")
    _check_range(data_range, "ssim")
    if a.ndim != 4 or min(a.shape[2:]) < WINDOW:
        raise ShapeError(f"ssim: shape {a.shape}; need [n, C, H, W] with H and W at least {WINDOW}")
    c1, c2 = (K1 * data_range) ** 2, (K2 * data_range) ** 2
    mean_a, mean_b = _blur(a), _blur(b)
    var_a, var_b = _blur(a * a) - mean_a**2, _blur(b * b) - mean_b**2
    cov = _blur(a * b) - mean_a * mean_b
    index = (2 * mean_a * mean_b + c1) * (2 * cov + c2)
    index /= (mean_a**2 + mean_b**2 + c1) * (var_a + var_b + c2)
    return np.asarray(index.reshape(len(a), -1).mean(axis=1))


def latent_drift(x: Any, reference: Any) -> Array:
    """||x - reference|| / ||reference||: relative L2 distance of latents.

    Args:
        x, reference: [n, ...], tensors or arrays of one shape.
    Returns: float64 [n]; 0 where they are equal.
    Raises: ShapeError.
    """
    a, b = _pair(x, reference, "latent_drift")
    distance = np.linalg.norm((a - b).reshape(len(a), -1), axis=1)
    size = np.linalg.norm(b.reshape(len(b), -1), axis=1)
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.where(distance == 0.0, 0.0, distance / size)


def _blur(x: Array) -> Array:
    """Gaussian mean of every whole window of the last two axes."""
    offset = np.arange(WINDOW) - WINDOW // 2
    weights = np.exp(-(offset**2) / (2 * SPREAD**2))
    weights /= math.fsum(weights)
    for axis in (-1, -2):
        x = np.lib.stride_tricks.sliding_window_view(x, WINDOW, axis=axis) @ weights
    return x


def _pair(x: Any, reference: Any, name: str) -> tuple[Array, Array]:
    """Both arguments as float64 arrays of one shape."""
    a, b = _float64(x), _float64(reference)
    if a.shape != b.shape or a.ndim < 2 or a.size == 0:
        raise ShapeError(f"{name}: shapes {a.shape} and {b.shape}; need two equal, non-empty [n, ...]")
    return a, b


def _float64(x: Any) -> Array:
    """A tensor (any dtype and device) or array as a float64 array."""
    if hasattr(x, "detach"):
        x = x.detach().cpu().double().numpy()
    return np.asarray(x, dtype=np.float64)


def _check_range(data_range: float, name: str) -> None:
    """Refuse a range that is not a positive number."""
    if not (math.isfinite(data_range) and data_range > 0):
        raise ArgumentError(f"{name}: data_range {data_range}; need a positive number")
