"""What a network predicts, as affine functions of x and its output: x = alpha x0 + sigma eps."""

from __future__ import annotations

from vivace.errors import PlanError


def to_x0(prediction: str, alpha: float, sigma: float) -> tuple[float, float]:
    """(p, q) with x0 = p x + q out, from x = alpha x0 + sigma eps; needs alpha^2 + sigma^2 > 0 only, except for "eps".

    Raises: PlanError for "eps" at alpha = 0, where the prediction says nothing of x0.
    """
    if prediction == "eps":
        if alpha == 0.0:
            raise PlanError(
                "prediction 'eps' says nothing of x0 at pure noise (alpha = 0); use a network that predicts v, x0 or "
                "flow, or a grid that starts below pure noise (timesteps=... or sigmas=...)"
            )
        return 1.0 / alpha, -sigma / alpha
    if prediction == "x0":
        return 0.0, 1.0
    if prediction == "v":
        norm = alpha * alpha + sigma * sigma
        return alpha / norm, -sigma / norm
    return 1.0 / (alpha + sigma), -sigma / (alpha + sigma)


def to_eps(prediction: str, alpha: float, sigma: float) -> tuple[float, float]:
    """(p, q) with eps = p x + q out, from x = alpha x0 + sigma eps."""
    if prediction == "eps":
        return 0.0, 1.0
    if prediction == "x0":
        return 1.0 / sigma, -alpha / sigma
    if prediction == "v":
        norm = alpha * alpha + sigma * sigma
        return sigma / norm, alpha / norm
    return 1.0 / (alpha + sigma), alpha / (alpha + sigma)


def to_flow(prediction: str, alpha: float, sigma: float) -> tuple[float, float]:
    """(p, q) with eps - x0 = p x + q out, from x = alpha x0 + sigma eps. Raises PlanError as `to_x0`."""
    if prediction == "flow":
        return 0.0, 1.0
    (ex, eo), (px, po) = to_eps(prediction, alpha, sigma), to_x0(prediction, alpha, sigma)
    return ex - px, eo - po
