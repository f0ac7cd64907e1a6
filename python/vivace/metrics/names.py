"""Does a picture look like its class more than like all others? A sanity gate, not a score of beauty. numpy only."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from vivace.errors import ArgumentError, ShapeError
from vivace.metrics.features import POSES, Features, posed


@dataclass(frozen=True)
class NameCheck:
    """rank int [n]: classes that a picture looks more like than its own; nearest int [n]: id of the class it looks
    most like."""

    rank: npt.NDArray[np.int64]
    nearest: npt.NDArray[np.int64]

    @property
    def top1(self) -> float:
        """Share of pictures that look most like their own class."""
        return self.within(1)

    @property
    def top5(self) -> float:
        """Share of pictures whose own class is among the five they look most like."""
        return self.within(5)

    def within(self, k: int) -> float:
        """Share of pictures whose own class is among the nearest k."""
        return float((self.rank < k).mean())


def check_names(pictures: Any, classes: Sequence[int] | npt.NDArray[Any], features: Features) -> NameCheck:
    """d(c) = min over poses |W layout(pose(x)) - prototype_c|; rank = number of classes with d(c) < d(own).

    W whitens the pooled within-class covariance, so that differences a class shows anyway (background, shift, turn)
    count little. Poses: turns of -7, 0, 7 degrees times scales 0.93, 1, 1.07, which make the check indifferent to how
    a glyph is held.

    Args:
        pictures: [n, 3, H, H] in [-1, 1]. classes: class id of each. features: of the model.
    Raises: ShapeError, ArgumentError for a class without prototype.
    Source: nearest class mean under a pooled covariance: Fisher 1936, Rao 1948.
    """
    x, wanted = features.pool(pictures), np.asarray(classes)
    if wanted.shape != (len(x),):
        raise ShapeError(f"check_names: {len(x)} pictures and classes {wanted.shape}; need one class id each")
    place = {int(name): i for i, name in enumerate(features.ids)}
    unknown = [int(name) for name in wanted if int(name) not in place]
    if unknown:
        raise ArgumentError(f"check_names: class {unknown[0]} has no prototype; the file covers {len(place)} classes")
    distance = np.full((len(x), len(place)), np.inf)
    lengths = np.square(features.prototypes).sum(axis=1)
    for turn, scale in POSES:
        z = features.layout(posed(x, turn, scale)) @ features.whiten
        np.minimum(distance, np.square(z).sum(axis=1)[:, None] + lengths - 2 * z @ features.prototypes.T, out=distance)
    own = distance[np.arange(len(x)), [place[int(name)] for name in wanted]]
    return NameCheck((distance < own[:, None]).sum(axis=1), features.ids[distance.argmin(axis=1)])
