"""Pictures of an emoji font: what real samples of the emoji models look like, for training and for measuring.

A render is one glyph, premultiplied RGBA bytes [4, S, S]; a picture is an augmented draw of it: turned, scaled and
shifted a little, on a gradient of two random colours, averaged down. Only remaking needs the font; what the metrics
read is bundled.
"""

from __future__ import annotations

import math
import unicodedata
from collections.abc import Sequence
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from vivace.errors import ArgumentError, ModelError, ShapeError

if TYPE_CHECKING:
    from torch import Generator, Tensor

Bytes = npt.NDArray[np.uint8]
FONT = "NotoColorEmoji.ttf"
FOLDERS = ("/usr/share/fonts/truetype/noto", "/usr/share/fonts/noto", "/usr/share/fonts", "/usr/local/share/fonts")
STRIKE = 109  # the one size at which the font has colour bitmaps
CANVAS = (136, 128)  # pixels of such a bitmap
BLOCKS = range(0x2000, 0x1FB00)
SCALE = (0.86, 1.02)
TURN = math.radians(7.0)
SHIFT = 0.06  # of half the picture's edge
NOT_PICTURES = ("regional indicator", "tag ", "emoji modifier", "variation selector")


def find_font(path: str | PathLike[str] | None = None) -> Path:
    """The font file: `path`, or where distributions put it. Raises ModelError that says how to get it."""
    places = [Path(path)] if path is not None else [Path(folder) / FONT for folder in FOLDERS]
    for place in places:
        if place.is_file():
            return place
    raise ModelError(
        f"{places[0]}: no such font; remaking emoji data needs {FONT}: apt-get install fonts-noto-color-emoji, "
        "or name the file"
    )


def glyphs(font: str | PathLike[str] | None = None) -> dict[int, str]:
    """{codepoint: lower-case Unicode name} of every picture in the font that is one codepoint. Raises ModelError."""
    face = _open(find_font(font))
    missing = face.getmask("\U0010ffff").size
    found = {}
    for code in BLOCKS:
        name = unicodedata.name(chr(code), "").lower()
        is_symbol = unicodedata.category(chr(code)) == "So" and not name.startswith(NOT_PICTURES)
        if is_symbol and name and face.getmask(chr(code)).size != missing:
            found[code] = name
    return found


def render(codepoints: Sequence[int], size: int, font: str | PathLike[str] | None = None) -> Bytes:
    """Glyphs as premultiplied RGBA bytes [n, 4, size, size], each centred in a square of the font's 136 pixels.

    Raises: ModelError without the font.
    """
    from PIL import Image, ImageDraw

    face = _open(find_font(font))
    edge = max(CANVAS)
    corner = ((edge - CANVAS[0]) // 2, (edge - CANVAS[1]) // 2)
    out = np.empty((len(codepoints), 4, size, size), dtype=np.uint8)
    for row, code in zip(out, codepoints, strict=True):
        square = Image.new("RGBA", (edge, edge))
        ImageDraw.Draw(square).text(corner, chr(code), font=face, embedded_color=True)
        pixels = np.asarray(square.resize((size, size), Image.Resampling.LANCZOS), dtype=np.uint16)
        pixels = np.concatenate([(pixels[..., :3] * pixels[..., 3:] + 127) // 255, pixels[..., 3:]], axis=2)
        row[:] = pixels.transpose(2, 0, 1)
    return out


def most_distinct(renders: Bytes, count: int) -> list[int]:
    """Greedy farthest points: next = argmax over glyphs of the least L2 distance to those taken; sorted positions.

    Compared at 16x16 on grey, so that near twins (clock faces, skin tones) go first. renders: [n, 4, S, S], S >= 16.
    Raises: ArgumentError for a count outside 1..n.
    """
    if not 1 <= count <= len(renders):
        raise ArgumentError(f"most_distinct: {count} of {len(renders)} glyphs; need 1 to {len(renders)}")
    n, _, edge, _ = renders.shape
    x = renders.astype(np.float64) / 255.0
    x = x[:, :3] + 0.5 * (1.0 - x[:, 3:])
    step = edge // 16
    x = x[:, :, : 16 * step, : 16 * step].reshape(n, 3, 16, step, 16, step).mean(axis=(3, 5)).reshape(n, -1)
    taken = [int(np.argmax(np.square(x - x.mean(axis=0)).sum(axis=1)))]
    nearest = np.square(x - x[taken[0]]).sum(axis=1)
    while len(taken) < count:
        taken.append(int(np.argmax(nearest)))
        nearest = np.minimum(nearest, np.square(x - x[taken[-1]]).sum(axis=1))
    return sorted(taken)


def augment(renders: Any, size: int, generator: Generator) -> Tensor:
    """Pictures of renders: glyph(A (p - shift)) over a gradient, averaged to `size`; one random draw for each render.

    A: scale 0.86-1.02 and turn up to 7 degrees, uniform; shift up to 6% of half the edge; background: two uniform
    colours, linear along a uniform direction.

    Args:
        renders: uint8 tensor [n, 4, S, S], premultiplied, on any device; S a multiple of `size`.
        generator: of the CPU; the draws are the same on every device.
    Returns: float32 [n, 3, size, size] in [-1, 1], on the device of `renders`.
    Raises: ShapeError.
    """
    import torch
    import torch.nn.functional as F

    n, edge = len(renders), renders.shape[-1]
    if renders.ndim != 4 or renders.shape[1] != 4 or edge % size:
        raise ShapeError(f"augment: renders {tuple(renders.shape)} to size {size}; need [n, 4, S, S], S a multiple")
    draws = torch.rand(n, 11, generator=generator).to(renders.device)
    scale = SCALE[0] + (SCALE[1] - SCALE[0]) * draws[:, 0]
    turn = TURN * (2 * draws[:, 1] - 1)
    shift = SHIFT * (2 * draws[:, 2:4] - 1)
    cos, sin = turn.cos() / scale, turn.sin() / scale
    matrix = torch.stack([torch.stack([cos, sin], 1), torch.stack([-sin, cos], 1)], 1)
    theta = torch.cat([matrix, -matrix @ shift[:, :, None]], 2)
    grid = F.affine_grid(theta, [n, 4, edge, edge], align_corners=False)
    glyph = F.grid_sample(renders.float() / 255.0, grid, align_corners=False)
    angle = 2 * math.pi * draws[:, 4]
    axis = torch.linspace(-1, 1, edge, device=renders.device)
    along = angle.cos()[:, None, None] * axis + angle.sin()[:, None, None] * axis[:, None]
    weight = (0.5 + along / (2 * math.sqrt(2)))[:, None]
    start, end = draws[:, 5:8, None, None], draws[:, 8:11, None, None]
    picture = glyph[:, :3] + (1 - glyph[:, 3:]) * (start + (end - start) * weight)
    return 2 * F.avg_pool2d(picture, edge // size) - 1


def _open(path: Path) -> Any:
    """The font at its bitmap size."""
    from PIL import ImageFont

    try:
        return ImageFont.truetype(path, STRIKE)
    except OSError as error:
        raise ModelError(f"{path}: cannot be opened at {STRIKE} pixels ({error}); need the CBDT {FONT}") from None
