"""Quality metrics: small functions over arrays or tensors, in float64.

`psnr`, `ssim` and `latent_drift` compare samples with a reference; `converged` computes (and keeps) the same-noise
reference and `quality_of` judges a session by it; `frechet` compares sets of pictures and `check_names` asks whether
they look like their class, both in the `Features` of a model.
"""

from vivace.metrics.features import Features
from vivace.metrics.frechet import frechet, frechet_distance, gaussian_of
from vivace.metrics.names import NameCheck, check_names
from vivace.metrics.quality import latent_drift, psnr, ssim
from vivace.metrics.reference import Quality, Reference, converged, quality_of, reference_plan

__all__ = [
    "Features",
    "NameCheck",
    "Quality",
    "Reference",
    "check_names",
    "converged",
    "frechet",
    "frechet_distance",
    "gaussian_of",
    "latent_drift",
    "psnr",
    "quality_of",
    "reference_plan",
    "ssim",
]
