"""Frechet distance between sets of pictures, in the features of `vivace.metrics.features`. numpy only."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from vivace.errors import ArgumentError, ShapeError
from vivace.metrics.features import Features

Array = npt.NDArray[np.float64]


def frechet_distance(mean_a: Any, cov_a: Any, mean_b: Any, cov_b: Any) -> float:
    """|ma - mb|^2 + tr(Ca + Cb - 2 (Ca^1/2 Cb Ca^1/2)^1/2): squared Wasserstein-2 distance of two Gaussians.

    Args:
        mean_a, mean_b: [d]; cov_a, cov_b: [d, d], symmetric, positive semidefinite up to rounding.
    Returns: a number >= 0, in squared units of the features; 0 for equal Gaussians (up to rounding).
    Raises: ShapeError, ArgumentError for NaN, asymmetry or a negative variance.
    Source: Dowson and Landau 1982, eq. 4. Roots by symmetric eigenvalues, so no complex rounding appears.
    """
    ma, ca = _gaussian(mean_a, cov_a, "a")
    mb, cb = _gaussian(mean_b, cov_b, "b")
    if ma.shape != mb.shape:
        raise ShapeError(f"frechet_distance: {len(ma)} and {len(mb)} features; need the same on both sides")
    root = _root(ca)
    shared = np.sqrt(np.clip(np.linalg.eigvalsh(root @ cb @ root), 0.0, None)).sum()
    return max(float(np.square(ma - mb).sum() + np.trace(ca) + np.trace(cb) - 2.0 * shared), 0.0)


def gaussian_of(features: Any) -> tuple[Array, Array]:
    """Mean [d] and unbiased covariance [d, d] of rows [n, d], n >= 2. Raises ShapeError."""
    x = np.asarray(features, dtype=np.float64)
    if x.ndim != 2 or len(x) < 2:
        raise ShapeError(f"gaussian_of: shape {x.shape}; need [n, d] with at least two rows")
    centred = x - x.mean(axis=0)
    return x.mean(axis=0), centred.T @ centred / (len(x) - 1)


def frechet(pictures: Any, features: Features, reference: Any = None) -> float:
    """Frechet distance of pictures to the model's data, or to other pictures.

    The estimate of n pictures is biased upwards, by about (d + d^2 / 4) / n for d features: compare at equal n, against
    the value of real pictures at that n.

    Args:
        pictures: [n, 3, H, H] in [-1, 1], n >= 2. features: of the model. reference: pictures; None: the data.
    Raises: ShapeError.
    """
    mean, covariance = gaussian_of(features.of(pictures))
    if reference is None:
        return frechet_distance(mean, covariance, np.zeros(features.count), features.covariance)
    return frechet_distance(mean, covariance, *gaussian_of(features.of(reference)))


def _gaussian(mean: Any, covariance: Any, side: str) -> tuple[Array, Array]:
    """Mean and covariance, checked."""
    m, c = np.asarray(mean, dtype=np.float64), np.asarray(covariance, dtype=np.float64)
    if m.ndim != 1 or not len(m) or c.shape != (len(m), len(m)):
        raise ShapeError(f"frechet_distance: mean_{side} {m.shape} and cov_{side} {c.shape}; need [d] and [d, d]")
    if not (np.isfinite(m).all() and np.isfinite(c).all()):
        raise ArgumentError(f"frechet_distance: mean_{side} or cov_{side} holds NaN or infinity; give finite numbers")
    if not np.allclose(c, c.T, rtol=1e-6, atol=1e-9 * float(np.abs(c).max())):
        raise ArgumentError(f"frechet_distance: cov_{side} is not symmetric; give a covariance")
    return m, (c + c.T) / 2


def _root(covariance: Array) -> Array:
    """Symmetric square root; tiny negative eigenvalues are rounding, others are refused."""
    values, vectors = np.linalg.eigh(covariance)
    if values[0] < -1e-6 * max(float(values[-1]), 1e-300):
        raise ArgumentError(f"frechet_distance: eigenvalue {values[0]:.3g} of cov_a is negative; give a covariance")
    return np.asarray((vectors * np.sqrt(np.clip(values, 0.0, None))) @ vectors.T)
