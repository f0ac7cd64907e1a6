"""How often each region of a picture was computed, as colours over it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageOps

from vivace.errors import ArgumentError, ShapeError
from vivace.models import pictures

STRENGTH = 0.55  # of the colours over the picture
RARELY, HALF, ALWAYS = "#2166ac", "#f7f7f7", "#b2182b"
LEAST = 256  # pixels of the shorter edge: small pictures are enlarged, so that tokens can be seen


def heat_map(image: Image.Image, computed: Any, evaluations: int) -> Image.Image:
    """Blue where tokens were computed least often, white at half of all evaluations, red where in each of them.

    Args:
        image: the picture. computed: evaluations of each token, integers [h, w]. evaluations: of the run.
    Returns: an RGB picture of `image`'s aspect, at least 256 pixels at its shorter edge.
    Raises: ShapeError when `computed` has not two axes.
    """
    counts = np.asarray(computed)
    if counts.ndim != 2 or not counts.size:
        raise ShapeError(f"heat_map: counts have shape {counts.shape}; need [h, w] of one picture or frame")
    factor = max(1, -(-LEAST // min(image.size)))
    size = image.width * factor, image.height * factor
    below = Image.new("RGBA", image.size, (*pictures.PAPER, 255))
    below.alpha_composite(image.convert("RGBA"))
    levels = np.rint(255.0 * np.clip(counts / max(evaluations, 1), 0.0, 1.0)).astype(np.uint8)
    colours = ImageOps.colorize(Image.fromarray(levels), RARELY, ALWAYS, mid=HALF)
    nearest = Image.Resampling.NEAREST
    grey = below.convert("L").convert("RGB")  # so that colours are the map's
    return Image.blend(grey.resize(size, nearest), colours.resize(size, nearest), STRENGTH)


def heat_maps(frames: Sequence[Image.Image], computed: Any, evaluations: int) -> list[Image.Image]:
    """Of one picture, or of every frame of a video. computed: [h, w] or [frames of the latent, h, w]."""
    counts = np.asarray(computed)
    if counts.ndim == 2:
        return [heat_map(frame, counts, evaluations) for frame in frames]
    return [heat_map(frame, counts[i * len(counts) // len(frames)], evaluations) for i, frame in enumerate(frames)]


def frames_of(image: Any) -> list[Image.Image]:
    """A picture, or the frames of a video."""
    return list(image) if isinstance(image, (list, tuple)) else [image]


def write_heat(results: Sequence[Any], out: Path) -> None:
    """How often each region of every picture was computed, over it, as one PNG. Raises ArgumentError, OutputError."""
    made: list[Image.Image] = []
    for result in results:
        if result.computed is None or not result.images:
            raise ArgumentError("heat map: no pictures, or every row computed all tokens; there is nothing to show")
        for image, counts in zip(result.images, result.computed, strict=True):
            made += heat_maps(frames_of(image), counts.cpu().numpy(), result.receipt.nfe)
    pictures.write_png(made[0] if len(made) == 1 else pictures.grid(made), out)
