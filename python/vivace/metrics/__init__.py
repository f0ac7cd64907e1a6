"""Quality metrics: small functions over arrays or tensors, in float64."""

from vivace.metrics.quality import latent_drift, psnr, ssim

__all__ = ["latent_drift", "psnr", "ssim"]
