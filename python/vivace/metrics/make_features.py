"""Makes the feature file of an emoji model: python -m vivace.metrics.make_features MODEL_FOLDER [--font FILE]

Principal components, covariances and class prototypes of augmented renders (see `renders.augment`); about a minute.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import fields
from os import PathLike
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from safetensors.numpy import save

from vivace.errors import ArgumentError, ModelError, OutputError, VivaceError
from vivace.metrics.features import FILE, Features, patches
from vivace.metrics.renders import augment, render

Array = npt.NDArray[np.float64]
SIZE, LAYOUT, TEXTURE = 32, 80, 24
DRAWS, SEED = 16, 2026  # augmented pictures of each class
HALF = ("basis", "prototypes")  # stored in float16; the rest in float32


def make_features(
    renders: Any, ids: Sequence[int], *, size: int = SIZE, layout: int = LAYOUT, texture: int = TEXTURE,
    draws: int = DRAWS, seed: int = SEED,
) -> Features:  # fmt: skip
    """Features of the data that `renders` stand for, `draws` augmented pictures of each.

    Statistics are taken with the bases as stored (float16), so that reading the file gives the same numbers.

    Args:
        renders: uint8 [n, 4, S, S], S a multiple of `size`; ids: class id of each.
        size: height and width at which features are taken; layout, texture: how many features; texture divides 192.
        seed: of the augmentation.
    Raises: ArgumentError for too few pictures to measure the spread within classes.
    """
    n = len(renders)
    if n * (draws - 1) <= 2 * layout or 192 % texture:
        raise ArgumentError(
            f"make_features: {n} classes x {draws} draws, layout {layout}, texture {texture}; need more than "
            f"{2 * layout} pictures beside the class means, and a texture count that divides 192"
        )
    mean, moment, sums = np.zeros(3 * size**2), np.zeros((3 * size**2,) * 2), np.zeros((n, 3 * size**2))
    patch_sum, patch_moment, patch_count = np.zeros(192), np.zeros((192, 192)), 0
    for x in _pictures(renders, size, draws, seed):
        flat, cells = x.reshape(n, -1), patches(x).reshape(-1, 192)
        sums += flat
        moment += (flat.T.astype(np.float32) @ flat.astype(np.float32)).astype(np.float64)
        patch_sum, patch_moment = patch_sum + cells.sum(axis=0), patch_moment + cells.T @ cells
        patch_count += len(cells)
    mean, patch_mean = sums.sum(axis=0) / (n * draws), patch_sum / patch_count
    total = float(np.trace(moment)) - n * draws * float(mean @ mean)
    within = float(np.trace(moment)) - float(np.square(sums).sum()) / draws
    variance = np.array([within / (n * (draws - 1)), total / (n * draws - 1)]) / len(mean)
    basis = _components(moment / (n * draws) - np.outer(mean, mean), layout).astype(np.float16).astype(np.float64)
    patch_basis = _components(patch_moment / patch_count - np.outer(patch_mean, patch_mean), 192)
    blank = Features(
        mean, basis, patch_mean, patch_basis, np.zeros(layout + texture), np.ones(layout + texture),
        np.eye(layout + texture), np.eye(layout), np.zeros((n, layout)), np.asarray(ids, dtype=np.int64), variance,
    )  # fmt: skip
    raw = np.stack([blank.of(x) for x in _pictures(renders, size, draws, seed)])
    return _with_statistics(blank, raw)


def write_features(features: Features, path: str | PathLike[str], about: Mapping[str, str] | None = None) -> None:
    """Write a feature file, all or nothing; `about` goes into its metadata. Raises OutputError."""
    target = Path(path)
    arrays = {field.name: np.asarray(getattr(features, field.name)) for field in fields(features)}
    stored = {
        name: np.ascontiguousarray(array, np.int32 if name == "ids" else np.float16 if name in HALF else np.float32)
        for name, array in arrays.items()
    }
    temporary = ""
    try:
        handle, temporary = tempfile.mkstemp(prefix=f".{target.name}-", dir=target.parent)
        with os.fdopen(handle, "wb") as file:
            file.write(save(stored, {"about": json.dumps(dict(about or {}), sort_keys=True)}))
        os.chmod(temporary, 0o644)
        os.replace(temporary, target)
    except OSError as error:
        raise OutputError(f"{target}: cannot be written ({error}); nothing was changed") from error
    finally:
        if temporary and os.path.exists(temporary):
            os.unlink(temporary)


def _pictures(renders: Any, size: int, draws: int, seed: int) -> Iterator[Array]:
    """The same `draws` pictures of all renders each time, float64 [n, 3, size, size]."""
    import torch

    generator = torch.Generator().manual_seed(seed)
    stack = torch.as_tensor(renders)
    for _ in range(draws):
        yield augment(stack, size, generator).double().numpy()


def _components(covariance: Array, count: int) -> Array:
    """The leading eigenvectors as rows, largest first; the largest entry of each is positive."""
    vectors = np.linalg.eigh(covariance)[1][:, ::-1][:, :count].T
    largest = vectors[np.arange(count), np.abs(vectors).argmax(axis=1)]
    return np.asarray(vectors * np.sign(largest)[:, None])


def _with_statistics(blank: Features, raw: Array) -> Features:
    """Center, scale, covariance, whitening and prototypes from raw features [draws, n, K + T]."""
    draws, n, count = raw.shape
    k = len(blank.basis)
    flat = raw.reshape(-1, count)
    center, scale = flat.mean(axis=0), flat.std(axis=0)
    standard = (flat - center) / scale
    means = raw[:, :, :k].mean(axis=0)
    scatter = (raw[:, :, :k] - means).reshape(-1, k)
    values, vectors = np.linalg.eigh(scatter.T @ scatter / (n * (draws - 1)))
    whiten = vectors / np.sqrt(values)
    changed = {
        "center": center, "scale": scale, "covariance": standard.T @ standard / (len(flat) - 1),
        "whiten": whiten, "prototypes": means @ whiten,
    }  # fmt: skip
    return Features(**{field.name: getattr(blank, field.name) for field in fields(blank)} | changed)


def main(arguments: Sequence[str] | None = None) -> int:
    """Write features.safetensors into a model folder with names.json; exit code 2 for a mistake of the caller."""
    parser = argparse.ArgumentParser(prog="vivace.metrics.make_features", description=__doc__)
    parser.add_argument("folder", type=Path, help="model folder with names.json")
    parser.add_argument("--font", type=Path, help="NotoColorEmoji.ttf; default: where distributions put it")
    chosen = parser.parse_args(arguments)
    try:
        names = _names(chosen.folder / "names.json")
        renders = render([code for _, code in names], 2 * SIZE, chosen.font)
        about = {"draws": str(DRAWS), "seed": str(SEED), "data": "augmented renders of Noto Color Emoji"}
        write_features(make_features(renders, [i for i, _ in names]), chosen.folder / FILE, about)
    except VivaceError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def _names(path: Path) -> list[tuple[int, int]]:
    """(class id, codepoint) of every class."""
    try:
        entries = json.loads(path.read_text(encoding="utf-8"))
        return [(int(entry["id"]), int(entry["codepoint"][2:], 16)) for entry in entries]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ModelError(f"{path}: need a list of {{id, name, codepoint}} ({error!r}); name an emoji model") from None


if __name__ == "__main__":
    sys.exit(main())
