"""Latents to pictures and back, picture grids, PNG files with text metadata. No torch unless a tensor comes in."""

from __future__ import annotations

import math
import os
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image, ImageDraw, ImageFont, PngImagePlugin, UnidentifiedImageError

from vivace.errors import ArgumentError, OutputError, ShapeError

if TYPE_CHECKING:
    from torch import Tensor

MODES = {1: "L", 3: "RGB", 4: "RGBA"}
MARGIN = 2  # pixels around a picture of a grid
PAPER = (255, 255, 255)
OTHER_FORMATS = (".jpg", ".jpeg", ".webp", ".gif", ".bmp", ".tif", ".tiff")


def to_images(latents: Tensor | np.ndarray[Any, Any]) -> list[Image.Image]:
    """byte = round((x + 1) * 127.5), clipped to 0..255; ties to even; NaN becomes 0.

    Args:
        latents: [n, C, H, W], C = 1, 3 or 4, nominally in [-1, 1]; a tensor of any dtype and device, or an array.
    Returns: n pictures, modes L, RGB or RGBA.
    Raises: ShapeError.
    """
    array = latents if isinstance(latents, np.ndarray) else latents.detach().float().cpu().numpy()
    if array.ndim != 4 or array.shape[1] not in MODES:
        raise ShapeError(f"to_images: latents have shape {tuple(array.shape)}; need [n, C, H, W] with C = 1, 3 or 4")
    levels = np.clip(np.nan_to_num(array.astype(np.float32), nan=-1.0) * 127.5 + 127.5, 0.0, 255.0)
    pixels = np.ascontiguousarray(np.rint(levels).astype(np.uint8).transpose(0, 2, 3, 1))
    return [Image.fromarray(picture[..., 0] if picture.shape[-1] == 1 else picture) for picture in pixels]


def to_latent(image: Image.Image | str | os.PathLike[str], shape: tuple[int, int, int]) -> Tensor:
    """x = byte / 127.5 - 1 of a picture resized to the model: float32 [C, H, W]; the inverse of `to_images`.

    Arguments and errors as of `to_array`.
    """
    import torch

    return torch.from_numpy(to_array(image, shape))


def to_array(image: Image.Image | str | os.PathLike[str], shape: tuple[int, int, int]) -> np.ndarray[Any, Any]:
    """x = byte / 127.5 - 1 of a picture resized to the model: float32 [C, H, W].

    Args:
        image: a PIL picture or the path of one; transparency is laid on white, other sizes are resized (Lanczos).
        shape: (C, H, W) of the model, C = 1, 3 or 4.
    Raises: ArgumentError for a file that is no picture, ShapeError for another C.
    """
    channels, height, width = shape
    if channels not in MODES:
        raise ShapeError(f"to_latent: a picture has 1, 3 or 4 channels, the model has {channels}; pass a latent")
    picture = image if isinstance(image, Image.Image) else open_image(image)
    if channels < 4 and (picture.mode in ("RGBA", "LA", "PA") or "transparency" in picture.info):
        picture = Image.alpha_composite(Image.new("RGBA", picture.size, (*PAPER, 255)), picture.convert("RGBA"))
    picture = picture.convert(MODES[channels])
    if picture.size != (width, height):
        picture = picture.resize((width, height), Image.Resampling.LANCZOS)
    pixels = np.asarray(picture, dtype=np.float32).reshape(height, width, channels)
    return np.ascontiguousarray(pixels.transpose(2, 0, 1)) / np.float32(127.5) - np.float32(1.0)


def open_image(path: str | os.PathLike[str]) -> Image.Image:
    """Read a picture file whole. Raises ArgumentError."""
    try:
        with Image.open(path) as image:
            image.load()
            return image
    except UnidentifiedImageError:
        raise ArgumentError(f"{path}: not a picture; need a PNG, JPEG or another format that Pillow reads") from None
    except (OSError, SyntaxError, Image.DecompressionBombError) as error:
        raise ArgumentError(f"{path}: cannot be read as a picture ({error})") from None


def grid(images: Sequence[Image.Image], *, captions: Sequence[str] | None = None) -> Image.Image:
    """One picture of many: near square, rows filled left to right, 2 pixels of white around each.

    A single picture comes back as it is, without border. Captions, one a picture, are cut to the cell's width.
    Raises: ArgumentError for no picture, or another number of captions.
    """
    if not images:
        raise ArgumentError("grid: no pictures; need at least one")
    if captions is not None and len(captions) != len(images):
        raise ArgumentError(f"grid: {len(captions)} captions for {len(images)} pictures; need one each")
    if len(images) == 1 and captions is None:
        return images[0]
    columns = math.ceil(math.sqrt(len(images)))
    rows = math.ceil(len(images) / columns)
    width, height = (max(image.size[axis] for image in images) for axis in (0, 1))
    line = 12 if captions is not None else 0
    cell = (width + 2 * MARGIN, height + 2 * MARGIN + line)
    sheet = Image.new("RGB", (columns * cell[0], rows * cell[1]), PAPER)
    for i, image in enumerate(images):
        corner = (i % columns * cell[0] + MARGIN, i // columns * cell[1] + MARGIN)
        sheet.paste(image, corner)
        if captions is not None:
            _write_caption(sheet, captions[i], (corner[0], corner[1] + height), width)
    return sheet


def write_png(image: Image.Image, path: str | os.PathLike[str], metadata: Mapping[str, str] | None = None) -> None:
    """Write a PNG with text chunks, all or nothing: a temporary file in the same folder takes the name at the end.

    Args:
        metadata: text by keyword, such as "vivace:seed"; keywords are Latin-1, 1 to 79 characters.
    Raises: OutputError, ArgumentError for a bad keyword.
    """
    target = Path(path)
    check_writable(target)
    info = PngImagePlugin.PngInfo()
    for key, value in (metadata or {}).items():
        if not (1 <= len(key) <= 79 and key.isprintable() and all(ord(letter) < 256 for letter in key)):
            raise ArgumentError(f"PNG keyword {key!r}: need 1 to 79 Latin-1 characters")
        info.add_itxt(key, value) if not value.isascii() else info.add_text(key, value)
    handle, temporary = -1, ""
    try:
        handle, temporary = tempfile.mkstemp(prefix=f".{target.name}-", suffix=".png", dir=target.parent)
        with os.fdopen(handle, "wb") as file:
            image.save(file, format="PNG", pnginfo=info)
        os.chmod(temporary, 0o666 & ~_umask())
        os.replace(temporary, target)
    except OSError as error:
        raise OutputError(f"{target}: cannot be written ({error}); nothing was changed") from error
    finally:
        if temporary and os.path.exists(temporary):
            os.unlink(temporary)


def check_writable(path: str | os.PathLike[str]) -> None:
    """Refuse a target that `write_png` could not write, before any work. Raises OutputError."""
    target = Path(path)
    if target.suffix.lower() in OTHER_FORMATS:
        raise OutputError(f"{target}: pictures are written as PNG; name it {target.with_suffix('.png').name}")
    if target.is_dir():
        raise OutputError(f"{target}: is a folder; name a file in it")
    if not target.parent.is_dir():
        raise OutputError(f"{target}: folder {target.parent} does not exist; make it or name another")
    try:
        with tempfile.TemporaryFile(dir=target.parent):
            pass
    except OSError as error:
        raise OutputError(f"{target}: folder {target.parent} cannot be written ({error.strerror})") from None


def read_metadata(path: str | os.PathLike[str]) -> dict[str, str]:
    """Text chunks of a PNG by keyword; {} without any. Raises ArgumentError for a file that is no PNG."""
    image = open_image(path)
    if not isinstance(image, PngImagePlugin.PngImageFile):
        raise ArgumentError(f"{path}: a {image.format} file; text metadata is read from PNG only")
    return {str(key): str(value) for key, value in image.text.items()}


def _write_caption(sheet: Image.Image, text: str, corner: tuple[int, int], width: int) -> None:
    """Draw a line of text, cut to `width` pixels."""
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(9)
    while text and draw.textlength(text, font=font) > width:
        text = text[:-1]
    draw.text(corner, text, fill=(0, 0, 0), font=font)


def _umask() -> int:
    """The process's mask for new files (reading it means setting it)."""
    mask = os.umask(0)
    os.umask(mask)
    return mask
