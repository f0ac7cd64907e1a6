"""Named ways to calibrate and quantize. A recipe is data: a table remembers the one it was made for."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any

from vivace.engine.calibrate.draw import LAWS
from vivace.errors import ArgumentError
from vivace.models.quantized.smooth import ALPHAS

ACTIVATIONS = ("token", "static")
ROUNDINGS = ("nearest", "gptq")


@dataclass(frozen=True, slots=True)
class Recipe:
    """How to calibrate and to quantize.

    law: of the timesteps, "ndtc" or "uniform"; samples, groups: default counts; per_picture: samples of one
    trajectory; alphas: of migration that are tried, none: no migration; weights, clip: rules of `clip_scale` for the
    weights' scales and for static activation scales; activations: "token" or "static"; rounding: "nearest" or "gptq";
    budget: relative error of the prediction, layers stay high until it is kept, None: none do; multiple: of the median
    effect on the picture, beyond which first and last evaluations are advised to run high, None: none are.
    """

    name: str
    law: str
    samples: int
    groups: int
    per_picture: int
    alphas: tuple[float, ...]
    weights: str
    clip: str
    activations: str
    rounding: str
    budget: float | None
    multiple: float | None

    def to_dict(self) -> dict[str, Any]:
        """The same as JSON data."""
        return {**asdict(self), "alphas": list(self.alphas)}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Recipe:
        """The inverse. Raises ArgumentError for fields of another release."""
        if set(data) != {item.name for item in fields(cls)} or not isinstance(data["alphas"], list):
            raise ArgumentError("recipe: its fields are of another release; calibrate again")
        return cls(**{**data, "alphas": tuple(data["alphas"])})


RECIPES = {
    recipe.name: recipe
    for recipe in (
        Recipe(
            name="per_token",
            law="ndtc",
            samples=64,
            groups=8,
            per_picture=4,
            alphas=ALPHAS,
            weights="lp:2",
            clip="lp:2.4",
            activations="token",
            rounding="nearest",
            budget=0.05,
            multiple=4.0,
        ),
        # Shang et al. 2023: every linear that has an 8-bit kernel; SiLU, softmax and the products in attention high.
        Recipe(
            name="ptq4dm",
            law="ndtc",
            samples=1024,
            groups=1,
            per_picture=1,
            alphas=(),
            weights="lp:2.4",
            clip="lp:2.4",
            activations="static",
            rounding="nearest",
            budget=None,
            multiple=None,
        ),
        Recipe(
            name="static",
            law="ndtc",
            samples=128,
            groups=8,
            per_picture=4,
            alphas=ALPHAS,
            weights="lp:2",
            clip="lp:2.4",
            activations="static",
            rounding="nearest",
            budget=0.05,
            multiple=4.0,
        ),
    )
}
DEFAULT = "per_token"


def recipe_of(given: str | Recipe) -> Recipe:
    """The recipe of that name, or one of your own, checked. Raises ArgumentError."""
    if isinstance(given, str):
        if given not in RECIPES:
            raise ArgumentError(f"recipe {given!r} is unknown; use {', '.join(RECIPES)}")
        return RECIPES[given]
    for name, value, known in (
        ("law", given.law, LAWS),
        ("activations", given.activations, ACTIVATIONS),
        ("rounding", given.rounding, ROUNDINGS),
    ):
        if value not in known:
            raise ArgumentError(f"recipe: {name} {value!r} is unknown; use {' or '.join(known)}")
    return given
