"""DiT checkpoints: which tensor on disk is which parameter in memory.

On disk query, key and value are separate and the patch embedding is a convolution; in memory they are one linear
layer each.
"""

from __future__ import annotations

from collections.abc import Mapping
from os import PathLike
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from vivace.errors import DtypeError, ModelError
from vivace.models.checkpoint import read_object, read_tensors, write_model
from vivace.models.dit_config import TIME_FEATURES, DiTConfig

IGNORED = ("pos_embed.pos_embed",)  # a constant that some versions store
DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


class Place(NamedTuple):
    """A tensor of the file: its shape there, its parameter in memory, and which third of it when there are three."""

    shape: tuple[int, ...]
    parameter: str
    third: int | None = None


def layout(config: DiTConfig) -> dict[str, Place]:
    """Every tensor of a checkpoint by its name on disk."""
    d, patch = config.width, config.patch
    places = {
        **_layer("pos_embed.proj", "patches", (d, config.channels, patch, patch)),
        **_layer("proj_out_1", "final_modulation", (2 * d, d)),
        **_layer("proj_out_2", "final", (patch * patch * config.out_channels, d)),
    }
    for i in range(config.layers):
        disk, ours = f"transformer_blocks.{i}", f"blocks.{i}"
        embedding = f"{disk}.norm1.emb"
        table = Place((config.classes + 1, d), f"{ours}.condition.label.weight")
        places |= {
            **_layer(f"{embedding}.timestep_embedder.linear_1", f"{ours}.condition.time_in", (d, TIME_FEATURES)),
            **_layer(f"{embedding}.timestep_embedder.linear_2", f"{ours}.condition.time_out", (d, d)),
            f"{embedding}.class_embedder.embedding_table.weight": table,
            **_layer(f"{disk}.norm1.linear", f"{ours}.condition.modulation", (6 * d, d)),
            **_layer(f"{disk}.attn1.to_q", f"{ours}.qkv", (d, d), config.attention_bias, 0),
            **_layer(f"{disk}.attn1.to_k", f"{ours}.qkv", (d, d), config.attention_bias, 1),
            **_layer(f"{disk}.attn1.to_v", f"{ours}.qkv", (d, d), config.attention_bias, 2),
            **_layer(f"{disk}.attn1.to_out.0", f"{ours}.out", (d, d)),
            **_layer(f"{disk}.ff.net.0.proj", f"{ours}.up", (4 * d, d)),
            **_layer(f"{disk}.ff.net.2", f"{ours}.down", (d, 4 * d)),
        }
    return places


def read_dit(folder: str | PathLike[str], dtype: torch.dtype) -> tuple[DiTConfig, dict[str, Tensor]]:
    """The configuration and the parameters (by their names in memory) of a transformer folder. Raises ModelError."""
    folder = Path(folder)
    config = read_config(folder)
    return config, parameters_of(config, read_tensors(folder), dtype, str(folder))


def parameters_of(
    config: DiTConfig, tensors: Mapping[str, Tensor], dtype: torch.dtype, where: str
) -> dict[str, Tensor]:
    """The parameters by their names in memory of tensors by their names on disk. Raises ModelError, naming `where`."""
    stored = {name: tensor for name, tensor in tensors.items() if name not in IGNORED}
    places = layout(config)
    _check(stored, places, where)
    parameters: dict[str, Tensor] = {}
    for name, place in places.items():
        tensor = stored.pop(name).to(dtype)
        if place.third is not None:
            rows = place.shape[0]
            target = parameters.setdefault(place.parameter, tensor.new_empty((3 * rows, *place.shape[1:])))
            target[place.third * rows :][:rows] = tensor
        else:
            parameters[place.parameter] = tensor.flatten(1) if tensor.ndim == 4 else tensor
    return parameters


def read_config(folder: Path) -> DiTConfig:
    """The configuration of a transformer folder. Raises ModelError."""
    if not folder.is_dir():
        raise ModelError(f"{folder}: no such folder; need a model in the diffusers format")
    return DiTConfig.from_dict(read_object(folder / "config.json"), str(folder / "config.json"))


def write_dit(
    folder: str | PathLike[str], config: DiTConfig, parameters: Mapping[str, Tensor], dtype: torch.dtype
) -> None:
    """The inverse of `read_dit`: a folder that diffusers reads, all or nothing. Raises OutputError, DtypeError."""
    if dtype not in DTYPES:
        raise DtypeError(f"save: dtype {dtype}; need one of {', '.join(map(str, DTYPES))}")
    tensors = {}
    for name, place in layout(config).items():
        tensor = parameters[place.parameter].detach()
        if place.third is not None:
            tensor = tensor.chunk(3)[place.third]
        tensors[name] = tensor.reshape(place.shape).to("cpu", dtype, copy=True)
    write_model(Path(folder), config.to_dict(), tensors)


def _layer(
    disk: str, parameter: str, shape: tuple[int, ...], bias: bool = True, third: int | None = None
) -> dict[str, Place]:
    """Weight and bias of one layer."""
    places = {f"{disk}.weight": Place(shape, f"{parameter}.weight", third)}
    if bias:
        places[f"{disk}.bias"] = Place(shape[:1], f"{parameter}.bias", third)
    return places


def _check(stored: Mapping[str, Tensor], places: Mapping[str, Place], where: str) -> None:
    """Refuse missing, extra and misshapen tensors; names the first few."""
    wrong = [
        f"{name} {tuple(stored[name].shape)} (need {place.shape})"
        for name, place in places.items()
        if name in stored and tuple(stored[name].shape) != place.shape
    ]
    problems = {
        "missing": [name for name in places if name not in stored],
        "of the wrong shape": wrong,
        "unknown to a DiT": [name for name in stored if name not in places],
    }
    found = [
        f"{len(names)} tensors {what}: {', '.join(names[:3])}{', ...' if len(names) > 3 else ''}"
        for what, names in problems.items()
        if names
    ]
    if found:
        raise ModelError(f"{where}: {'; '.join(found)}; the weights do not belong to this config.json")
