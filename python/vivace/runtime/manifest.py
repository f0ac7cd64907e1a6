"""The manifest of a pack: what lies in the folder, which graph runs what, and where its tensors come from.

Plain data. `runtime.manifest_io` reads and writes the file and takes nothing on trust.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from vivace.runtime.calls import Structure

FORMAT = "vivace-pack"
VERSION = 1
NAME = "manifest.json"
PLAN, WEIGHTS, GOLDENS = "plan.json", "weights.bin", "goldens.safetensors"
SIDE_CAR = "plan.safetensors"
# Dtypes of tensors: ONNX's number, bytes of an element.
DTYPES: dict[str, tuple[int, int]] = {
    "float32": (1, 4),
    "float64": (11, 8),
    "float16": (10, 2),
    "bfloat16": (16, 2),
    "float8_e4m3fn": (17, 1),
    "int8": (3, 1),
    "uint8": (2, 1),
    "int32": (6, 4),
    "int64": (7, 8),
    "bool": (9, 1),
}
# What ports of a graph may be, by its role: sources of inputs, then of outputs, the one it must have first.
SOURCES: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "row": (
        (
            *("latent", "timestep", "condition", "number", "prepared", "size"),
            *("tokens", "kept", "kept_scale", "weights", "hidden"),
        ),
        ("prediction", "signal", "hidden", "kept", "kept_scale"),
    ),
    "prepare": (("timestep", "condition", "number", "size"), ("prepared",)),
    "positions": (("size",), ("prepared",)),
    "step": (("slots", "coefficients", "fields"), ("outs",)),
    "encode": (("text", "text_mask"), ("condition",)),
    "decode": (("latent",), ("picture",)),
}


@dataclass(frozen=True, slots=True)
class FileInfo:
    """A file of the pack: name without folders, bytes, SHA-256."""

    name: str
    bytes: int
    sha256: str


@dataclass(frozen=True, slots=True)
class Port:
    """An input or output of a graph. shape: numbers, and names of free dimensions; dtype as numpy spells it, and
    "bfloat16".

    source: of an input where it comes from, of an output what it is:
        latent             x of the batch, scaled as the network takes it; [rows, *latent]
        timestep           [rows] float32, in units of the plan
        prediction         what the network returns, signed as the plan's prediction; [rows, *latent]
        condition          tensor `key` of the prompt, [rows, ...]
        number             input `key` that rows name in `net_inputs`, [rows] float32
        prepared           output `key` of a graph of role "prepare" (by row and branch) or "positions" (once a run)
        size               [2] int64: height and width of the latent
        tokens             [rows, active] int64, ascending: the image tokens that are computed
        kept               plane `plane` of part `part` of the kept thing `key` (`Kept.name`): [rows, ...], an input as
                           it was, an output as it is now; part 0 image stream, 1 text stream, others as they come.
                           Of store "int8" "kept_scale" has the float32 scales beside
        weights            [terms] float32 on the planes of the kept thing `key`
        hidden             part `part` of the hidden states of a look, [rows, ...]
        signal             float32 [rows, ...] that a guard measures
        slots, outs, ...   of the step graph, see `export.step`
        text               [rows, length] int64 token ids of the text encoder `key`, and "text_mask"
        picture            of "decode": uint8 [n, height, width, 3]
    """

    name: str
    dtype: str
    shape: tuple[int | str, ...]
    source: str
    key: str = ""
    part: int = 0
    plane: int = 0


@dataclass(frozen=True, slots=True)
class Graph:
    """An ONNX file of the pack. role: one in `SOURCES`; structure: of role "row" what it computes."""

    name: str
    file: str
    role: str
    inputs: tuple[Port, ...]
    outputs: tuple[Port, ...]
    structure: Structure | None = None


@dataclass(frozen=True, slots=True)
class Manifest:
    """model: name, licence, fingerprint, prediction, latent_shape, blocks, patch, token_group, width, layout, pixels,
    conditioning, guidance (of its card), schedule; prompts: {"kind": "class", "names": [[id, name, codepoint], ...],
    "classes": count, which is the null label} or {"kind": "text", "tokenizers": {name: {"file", "length", "pad_id",
    "pad_token"}}, "negative": ""} or {"kind": "tensors"}; precision: {"network": "float32" | "float16" | "bfloat16",
    "int8": emitter or "", "scheme": {...}}; plan: its hash; tolerance: relative error that goldens are held to, by row;
    weights: bytes of the model's tensors by precision, each stored once.
    """

    model: Mapping[str, Any]
    prompts: Mapping[str, Any]
    precision: Mapping[str, Any]
    plan: str
    opset: int
    graphs: tuple[Graph, ...]
    files: tuple[FileInfo, ...]
    tolerance: float
    weights: Mapping[str, int]
    versions: Mapping[str, str] = field(default_factory=dict)
