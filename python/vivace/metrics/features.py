"""Features of pictures: what Frechet distances and name checks are computed in. numpy only; a small file per model.

    layout    80 coordinates of the whole picture in the principal components of augmented renders
    texture   24 root mean squares, over 8x8 patches, of their 192 principal coordinates in bands of 8

Layout says what is where; texture says how busy, sharp and noisy, wherever it is. Both are taken at the size of the
file (larger pictures are averaged down) and divided by their standard deviation over the data. The file also holds the
data's covariance, its pixel variances and one prototype a class. `vivace.metrics.make_features` makes it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from safetensors import SafetensorError
from safetensors.numpy import load_file

from vivace.errors import ModelError, ShapeError

Array = npt.NDArray[np.float64]
FILE = "features.safetensors"
PATCH, STRIDE = 8, 4  # pixels
POSES = tuple((turn, scale) for turn in (0.0, -7.0, 7.0) for scale in (1.0, 0.93, 1.07))  # degrees, factor


@dataclass(frozen=True)
class Features:
    """A feature file in memory; float64. P = 3 size^2 values a picture, K layout and T texture features, C classes.

    mean [P], basis [K, P]; patch_mean [192], patch_basis [192, 192]; center, scale [K + T]: mean and standard deviation
    over the data; covariance [K + T, K + T] of the standardised data; whiten [K, K]: layout to coordinates in which the
    pooled within-class covariance is one; prototypes [C, K]: class means there; ids int [C]: their class ids;
    variance [2]: of a pixel within classes and of all.
    """

    mean: Array
    basis: Array
    patch_mean: Array
    patch_basis: Array
    center: Array
    scale: Array
    covariance: Array
    whiten: Array
    prototypes: Array
    ids: npt.NDArray[np.int64]
    variance: Array

    @property
    def size(self) -> int:
        """Height and width at which features are taken."""
        return math.isqrt(len(self.mean) // 3)

    @property
    def count(self) -> int:
        """Number of features, K + T."""
        return len(self.center)

    @classmethod
    def load(cls, path: str | PathLike[str]) -> Features:
        """Read a feature file, or the one in a model folder. Raises ModelError."""
        path = Path(path)
        path = path / FILE if path.is_dir() else path
        names = tuple(cls.__dataclass_fields__)
        try:
            stored = load_file(path)
        except FileNotFoundError:
            raise ModelError(
                f"{path}: no such file; make it with python -m vivace.metrics.make_features {path.parent}"
            ) from None
        except (OSError, SafetensorError) as error:
            raise ModelError(f"{path}: damaged, or not a feature file ({error}); copy or make it again") from None
        lost = [name for name in names if name not in stored]
        if lost:
            raise ModelError(f"{path}: lacks {', '.join(lost)}; make it again with this release")
        ids = stored.pop("ids").astype(np.int64)
        found = cls(ids=ids, **{name: stored[name].astype(np.float64) for name in names if name != "ids"})
        found._check(path)
        return found

    def pool(self, pictures: Any) -> Array:
        """Pictures averaged down to the file's size: [n, 3, H, W] -> [n, 3, size, size]. Raises ShapeError."""
        x = pictures.detach().cpu().double().numpy() if hasattr(pictures, "detach") else pictures
        x = np.asarray(x, dtype=np.float64)
        if x.ndim != 4 or x.shape[1] != 3 or x.shape[2] != x.shape[3] or x.shape[2] % self.size or not x.size:
            need = f"non-empty [n, 3, H, H] with H a multiple of {self.size}"
            raise ShapeError(f"features: pictures have shape {x.shape}; need {need}")
        step = x.shape[2] // self.size
        return np.asarray(x.reshape(len(x), 3, self.size, step, self.size, step).mean(axis=(3, 5)))

    def of(self, pictures: Any) -> Array:
        """(raw - center) / scale, raw = layout then texture.

        Args:
            pictures: [n, 3, H, H] in [-1, 1], a tensor or an array; H a multiple of `size`.
        Returns: float64 [n, K + T].
        Raises: ShapeError.
        """
        x = self.pool(pictures)
        return np.asarray((np.concatenate([self.layout(x), self.texture(x)], axis=1) - self.center) / self.scale)

    def layout(self, pooled: Array) -> Array:
        """basis (x - mean) of pooled pictures: [n, K]."""
        return np.asarray((pooled.reshape(len(pooled), -1) - self.mean) @ self.basis.T)

    def texture(self, pooled: Array) -> Array:
        """sqrt(mean over patches and a band of (patch_basis (patch - patch_mean))^2) of pooled pictures: [n, T]."""
        power = np.square((patches(pooled) - self.patch_mean) @ self.patch_basis.T).mean(axis=1)
        return np.asarray(np.sqrt(power.reshape(len(power), self.count - len(self.basis), -1).mean(axis=2)))

    def _check(self, path: Path) -> None:
        """Refuse arrays that do not fit together or hold no numbers."""
        k, count, p = len(self.basis), self.count, 3 * self.size**2
        shapes = {
            "mean": (p,), "basis": (k, p), "patch_mean": (3 * PATCH**2,), "center": (count,), "scale": (count,),
            "patch_basis": (3 * PATCH**2,) * 2, "covariance": (count, count), "whiten": (k, k),
            "prototypes": (len(self.ids), k), "ids": (len(self.ids),), "variance": (2,),
        }  # fmt: skip
        for name, shape in shapes.items():
            array = getattr(self, name)
            if array.shape != shape or not np.isfinite(array).all():
                raise ModelError(f"{path}: {name} has shape {array.shape}, need finite {shape}; make the file again")


def patches(x: Array) -> Array:
    """Every 8x8 patch at stride 4, channels first: [n, 3, H, W] -> [n, patches, 192]."""
    view = np.lib.stride_tricks.sliding_window_view(x, (PATCH, PATCH), axis=(2, 3))[:, :, ::STRIDE, ::STRIDE]
    return np.asarray(view.transpose(0, 2, 3, 1, 4, 5).reshape(len(x), -1, 3 * PATCH**2))


def posed(x: Array, turn: float, scale: float) -> Array:
    """y(p) = x(R(turn) p / scale), p from the centre, bilinear, borders repeated; [n, C, H, H], turn in degrees."""
    if turn == 0.0 and scale == 1.0:
        return x
    edge = x.shape[-1]
    axis = np.arange(edge) - (edge - 1) / 2
    down, across = np.meshgrid(axis, axis, indexing="ij")
    cos, sin = np.cos(np.radians(turn)) / scale, np.sin(np.radians(turn)) / scale
    row, column = (
        np.clip(v + (edge - 1) / 2, 0, edge - 1) for v in (cos * down + sin * across, cos * across - sin * down)
    )
    top, left = (np.minimum(v.astype(np.int64), edge - 2) for v in (row, column))
    low, right = row - top, column - left
    upper = x[..., top, left] * (1 - right) + x[..., top, left + 1] * right
    lower = x[..., top + 1, left] * (1 - right) + x[..., top + 1, left + 1] * right
    return np.asarray(upper * (1 - low) + lower * low)
