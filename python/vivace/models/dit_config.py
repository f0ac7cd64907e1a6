"""The configuration of a DiT, read from a diffusers `config.json` and checked field by field. Standard library only."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from vivace.errors import ModelError

CLASS_NAMES = ("DiTTransformer2DModel", "Transformer2DModel")  # the second: checkpoints older than the first
TIME_FEATURES = 256  # sines and cosines of the timestep; fixed in this architecture
ACTIVATIONS = {"gelu-approximate": "tanh", "gelu": "none"}
DEFAULTS: dict[str, Any] = {
    "num_attention_heads": 16,
    "attention_head_dim": 72,
    "in_channels": 4,
    "out_channels": None,
    "num_layers": 28,
    "attention_bias": True,
    "sample_size": 32,
    "patch_size": 2,
    "activation_fn": "gelu-approximate",
    "num_embeds_ada_norm": 1000,
    "norm_type": "ada_norm_zero",
    "norm_elementwise_affine": False,
    "norm_eps": 1e-5,
}
NO_EFFECT = ("dropout", "norm_num_groups", "upcast_attention")  # read by diffusers, without influence on inference
COUNTS = ("num_attention_heads", "attention_head_dim", "in_channels", "num_layers", "sample_size", "patch_size")


@dataclass(frozen=True, slots=True)
class DiTConfig:
    """Sizes of a DiT.

    channels: of the latent; out_channels: as predicted on disk, `channels` or twice that (learned variance); size:
    native height and width of the latent; patch: edge of a token; classes: without the null label, whose id is
    `classes`; gelu: "tanh" or "none"; norm_eps: of the MLP's norm.
    """

    heads: int
    head_dim: int
    channels: int
    out_channels: int
    layers: int
    size: int
    patch: int
    classes: int
    attention_bias: bool = True
    gelu: str = "tanh"
    norm_eps: float = 1e-5

    @property
    def width(self) -> int:
        """Width of the hidden states, D."""
        return self.heads * self.head_dim

    @property
    def grid(self) -> tuple[int, int]:
        """Tokens down and across at the native size."""
        return self.size // self.patch, self.size // self.patch

    @property
    def costs(self) -> tuple[tuple[str, float], ...]:
        """Multiplications a token at the native size: of one block's attention and MLP, and of stem and head."""
        width, tokens = float(self.width), self.grid[0] * self.grid[1]
        pixels = self.patch * self.patch * (self.channels + self.out_channels)
        return ("attn", 4 * width**2 + 2 * tokens * width), ("mlp", 8 * width**2), ("outside", pixels * width)

    @classmethod
    def from_dict(cls, fields: Mapping[str, Any], where: str = "config") -> DiTConfig:
        """Read a diffusers configuration; absent fields take the defaults of diffusers. Raises ModelError."""
        _check_class(fields, where)
        values = {**DEFAULTS, **{name: value for name, value in fields.items() if name in DEFAULTS}}
        for name in COUNTS:
            _count(values[name], name, where)
        _count(values["num_embeds_ada_norm"], "num_embeds_ada_norm", where)
        _one_of(values, "norm_type", ("ada_norm_zero",), where)
        _one_of(values, "norm_elementwise_affine", (False,), where)
        _one_of(values, "activation_fn", tuple(ACTIVATIONS), where)
        _one_of(values, "attention_bias", (True, False), where)
        channels, out_channels = values["in_channels"], values["out_channels"]
        _one_of(values, "out_channels", (None, channels, 2 * channels), where)
        if values["sample_size"] % values["patch_size"]:
            raise ModelError(f"{where}: sample_size {values['sample_size']} is not a multiple of the patch_size")
        if values["num_attention_heads"] * values["attention_head_dim"] % 4:
            raise ModelError(f"{where}: num_attention_heads * attention_head_dim is not a multiple of 4")
        eps = values["norm_eps"]
        if isinstance(eps, bool) or not isinstance(eps, (int, float)) or not 0 < eps < 1:
            raise ModelError(f"{where}: norm_eps is {eps!r}; need a number between 0 and 1")
        return cls(
            heads=values["num_attention_heads"],
            head_dim=values["attention_head_dim"],
            channels=channels,
            out_channels=channels if out_channels is None else out_channels,
            layers=values["num_layers"],
            size=values["sample_size"],
            patch=values["patch_size"],
            classes=values["num_embeds_ada_norm"],
            attention_bias=values["attention_bias"],
            gelu=ACTIVATIONS[values["activation_fn"]],
            norm_eps=float(eps),
        )

    def to_dict(self) -> dict[str, Any]:
        """The same as a diffusers configuration, ready for `config.json`."""
        activation = {gelu: name for name, gelu in ACTIVATIONS.items()}[self.gelu]
        return {
            "_class_name": CLASS_NAMES[0],
            "activation_fn": activation,
            "attention_bias": self.attention_bias,
            "attention_head_dim": self.head_dim,
            "dropout": 0.0,
            "in_channels": self.channels,
            "norm_elementwise_affine": False,
            "norm_eps": self.norm_eps,
            "norm_num_groups": 32,
            "norm_type": "ada_norm_zero",
            "num_attention_heads": self.heads,
            "num_embeds_ada_norm": self.classes,
            "num_layers": self.layers,
            "out_channels": self.out_channels,
            "patch_size": self.patch,
            "sample_size": self.size,
            "upcast_attention": False,
        }


def _check_class(fields: Mapping[str, Any], where: str) -> None:
    """Refuse other architectures and fields that would change the network in a way we do not know."""
    name = fields.get("_class_name", CLASS_NAMES[0])
    if name not in CLASS_NAMES:
        raise ModelError(f"{where}: _class_name is {name!r}; need {CLASS_NAMES[0]}, the one architecture read natively")
    for field, value in fields.items():
        known = field in DEFAULTS or field in NO_EFFECT or field.startswith("_")
        if not known and value not in (None, False, "default"):
            raise ModelError(f"{where}: field {field!r} = {value!r} is not supported; a DiT has no such field")


def _count(value: Any, name: str, where: str) -> None:
    """Refuse what is not a positive integer."""
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ModelError(f"{where}: {name} is {value!r}; need a positive integer")


def _one_of(values: Mapping[str, Any], name: str, allowed: tuple[Any, ...], where: str) -> None:
    """Refuse a value that is not listed; 1 is not True."""
    value = values[name]
    if not any(type(value) is type(other) and value == other for other in allowed):
        raise ModelError(f"{where}: {name} is {value!r}; supported: {', '.join(map(repr, allowed))}")
