"""Graphs of the native DiT that stay outside of the loop: modulation of all rows, position table, pictures."""

from __future__ import annotations

import math

import numpy as np
import torch

from vivace.export.builder import GraphBuilder
from vivace.export.dit_parts import FLOAT, Parts, latent_port
from vivace.export.pack import MadeGraph
from vivace.models.dit_config import TIME_FEATURES
from vivace.runtime.manifest import Port


def prepare_graph(parts: Parts) -> MadeGraph:
    """timestep [rows], label [rows] -> the modulation vectors of all blocks and of the head."""
    to, config, dtype = parts.to, parts.weights.config, parts.dtype
    timestep = to.input(Port("timestep", FLOAT, ("rows",), "timestep"))
    label = to.input(Port("label", "int64", ("rows",), "condition", "label"))
    with to.scope("time"):
        half = TIME_FEATURES // 2
        exponent = -math.log(10000) * torch.arange(half, dtype=torch.float32) / (half - 1)
        angle = to.op("Unsqueeze", timestep, to.constant([1]), name="column")
        angle = to.op("Mul", angle, to.constant(torch.exp(exponent).numpy(), FLOAT), name="angle")
        both = [to.op(kind, angle) for kind in ("Cos", "Sin")]
        features = parts.cast(to.op("Concat", *both, name="features", axis=1), FLOAT, dtype)
    vectors, final = [], ""
    for i in range(config.layers):
        own = f"blocks.{i}.condition"
        with to.scope(own):
            hidden = parts.silu(parts.linear(features, f"{own}.time_in", "time_in"), "silu")
            hidden = parts.linear(hidden, f"{own}.time_out", "time_out")
            table = to.weight(parts.weights.embedding(f"{own}.label", dtype))
            hidden = to.op("Add", to.op("Gather", table, label, name="label", axis=0), hidden, name="sum")
            hidden = parts.silu(hidden, "condition")
            vectors.append(parts.linear(hidden, f"{own}.modulation", "modulation"))
        final = final or hidden
    with to.scope("vectors"):
        packed = to.op("Concat", *vectors, name="blocks", axis=1) if len(vectors) > 1 else vectors[0]
        shape = to.constant([0, config.layers, 6, config.width])
        packed = to.op("Reshape", packed, shape, name="blocks.shaped")
        ones = to.constant([[0.0], [1.0], [0.0]] * 2, dtype)
        packed = to.op("Add", packed, ones, name="blocks.scaled")
        final = parts.linear(final, "final_modulation", "final")
        final = to.op("Reshape", final, to.constant([0, 2, config.width]), name="final.shaped")
        final = to.op("Add", final, to.constant([[0.0], [1.0]], dtype), name="final.scaled")
    to.output(modulation_port(parts), packed)
    to.output(final_port(parts), final)
    return to.made("prepare")


def positions_graph(parts: Parts) -> MadeGraph:
    """size [2] -> the position table of that size, sines and cosines of column, then of row."""
    to, config = parts.to, parts.weights.config
    size = to.input(Port("size", "int64", (2,), "size"))
    grid = to.op("Div", size, to.constant([config.patch] * 2), name="grid")
    quarter = config.width // 4
    omega = to.constant(1.0 / 10000 ** (np.arange(quarter, dtype=np.float64) / quarter), "float64")
    tables = {}
    for axis, name in ((1, "column"), (0, "row")):
        with to.scope(name):
            count = to.op("Gather", grid, to.constant(axis), name="count", axis=0)
            own = to.op("Range", to.constant(0), count, to.constant(1), name="number")
            step = to.op("Div", parts.cast(count, "int64", FLOAT), to.constant(config.grid[0], FLOAT), name="step")
            own = to.op("Div", parts.cast(own, "int64", FLOAT), step, name="coordinate")
            own = to.op("Unsqueeze", parts.cast(own, FLOAT, "float64"), to.constant([1]), name="coordinates")
            angle = to.op("Mul", own, omega, name="angle")
            table = to.op("Concat", *(to.op(kind, angle) for kind in ("Sin", "Cos")), name="table", axis=1)
            tables[name] = to.op("Unsqueeze", table, to.constant([1 - axis]), name="of_grid")
    with to.scope("grid"):
        one = to.constant([1])
        down, across = to.ops("Split", grid, outputs=2, name="sides", axis=0, num_outputs=2)
        for name, repeats in (("column", (down, one, one)), ("row", (one, across, one))):
            repeat = to.op("Concat", *repeats, name=f"{name}.repeats", axis=0)
            tables[name] = to.op("Tile", tables[name], repeat, name=name)
        table = to.op("Concat", tables["column"], tables["row"], name="both", axis=2)
        table = to.op("Reshape", table, to.constant([-1, config.width]), name="table")
    to.output(positions_port(parts), parts.cast(parts.cast(table, "float64", FLOAT), FLOAT, parts.dtype))
    return to.made("positions")


def decode_graph(to: GraphBuilder, channels: int) -> MadeGraph:
    """latent -> bytes, exactly as `pictures.to_images`: round((x + 1) * 127.5) in 0..255, ties to even, 0 of NaN."""
    x = to.input(latent_port(channels, "latent", "latent"))
    half = to.constant(127.5, FLOAT)
    x = to.op("Where", to.op("IsNaN", x, name="nan"), to.constant(-1.0, FLOAT), x, name="known")
    x = to.op("Add", to.op("Mul", x, half, name="scaled"), half, name="levels")
    x = to.op("Clip", x, to.constant(0.0, FLOAT), to.constant(255.0, FLOAT), name="within")
    x = to.op("Cast", to.op("Round", x, name="rounded"), name="bytes", to=2)
    x = to.op("Transpose", x, name="channels_last", perm=[0, 2, 3, 1])
    to.output(Port("picture", "uint8", ("rows", "height", "width", channels), "picture"), x)
    return to.made("decode")


def modulation_port(parts: Parts) -> Port:
    """The vectors of all blocks, [rows, L, 6, D]."""
    config = parts.weights.config
    return Port("modulation", parts.dtype, ("rows", config.layers, 6, config.width), "prepared", "modulation")


def final_port(parts: Parts) -> Port:
    """The vectors of the head, [rows, 2, D]."""
    return Port("final", parts.dtype, ("rows", 2, parts.weights.config.width), "prepared", "final")


def positions_port(parts: Parts) -> Port:
    """The position table, [tokens, D]."""
    return Port("positions", parts.dtype, ("tokens", parts.weights.config.width), "prepared", "positions")
