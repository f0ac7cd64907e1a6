"""Metrics against direct transcriptions of their formulas."""

import numpy as np
import pytest
import torch

from vivace.errors import ArgumentError, ShapeError
from vivace.metrics import latent_drift, psnr, ssim


@pytest.fixture
def pair():
    g = np.random.default_rng(0)
    reference = g.uniform(-1, 1, (2, 3, 16, 14))
    return reference + 0.1 * g.standard_normal(reference.shape), reference


def test_psnr_of_a_known_error():
    reference = np.zeros((2, 3, 4, 4))
    x = reference.copy()
    x[0] += 0.02
    assert psnr(x, reference) == pytest.approx([40.0, np.inf])
    assert psnr(255 * x[:1], 255 * reference[:1], data_range=255) == pytest.approx([20 * np.log10(1 / 0.02)])


def test_drift_is_relative():
    reference = np.ones((3, 2, 2))
    x = reference * np.array([1.0, 1.5, -1.0])[:, None, None]
    assert latent_drift(x, reference) == pytest.approx([0.0, 0.5, 2.0])
    assert latent_drift(0 * x, 0 * x) == pytest.approx([0.0, 0.0, 0.0])
    assert latent_drift(x[:1], 0 * x[:1]) == pytest.approx([np.inf])


def test_ssim_is_the_mean_over_windows(pair):
    """Every 11x11 window written out."""
    x, y = pair
    k = np.exp(-(np.arange(-5, 6) ** 2) / (2 * 1.5**2))
    w = np.outer(k, k) / k.sum() ** 2
    c1, c2 = (0.01 * 2) ** 2, (0.03 * 2) ** 2
    for n in range(2):
        values = []
        for c in range(3):
            for i in range(16 - 10):
                for j in range(14 - 10):
                    a, b = x[n, c, i : i + 11, j : j + 11], y[n, c, i : i + 11, j : j + 11]
                    ma, mb = (w * a).sum(), (w * b).sum()
                    va, vb, cov = (w * (a - ma) ** 2).sum(), (w * (b - mb) ** 2).sum(), (w * (a - ma) * (b - mb)).sum()
                    values.append((2 * ma * mb + c1) * (2 * cov + c2) / ((ma**2 + mb**2 + c1) * (va + vb + c2)))
        assert ssim(x, y)[n] == pytest.approx(np.mean(values), rel=1e-10)
    assert ssim(x, x) == pytest.approx([1.0, 1.0])


def test_tensors_of_any_dtype_are_taken(pair):
    x, y = (torch.tensor(part) for part in pair)
    for metric in (psnr, ssim, latent_drift):
        assert np.array_equal(metric(x, y), metric(*pair))
        assert metric(x.bfloat16(), y.float()).dtype == np.float64


def test_samples_do_not_mix(pair):
    x, y = pair
    for metric in (psnr, ssim, latent_drift):
        assert metric(x, y)[1] == pytest.approx(metric(x[1:], y[1:])[0], rel=1e-12)


def test_bad_arguments_are_refused(pair):
    x, y = pair
    for metric in (psnr, ssim, latent_drift):
        with pytest.raises(ShapeError, match=metric.__name__):
            metric(x, y[:1])
        with pytest.raises(ShapeError, match=metric.__name__):
            metric(x[:0], y[:0])
    with pytest.raises(ShapeError, match="at least 11"):
        ssim(x[..., :10], y[..., :10])
    for bad in (0, -1, float("nan")):
        with pytest.raises(ArgumentError, match="data_range"):
            psnr(x, y, data_range=bad)
