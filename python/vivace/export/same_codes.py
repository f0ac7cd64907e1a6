"""A quantized graph against the fake-quantized reference of the same description, on the same inputs.

A value halfway between two codes may go either way: its last bit decides, and runtimes differ there. One such code
moves a prediction by a share of what quantization itself costs, so that two right answers are far apart. The reference
therefore rounds as the graph did where its own value is within `TIE` of a step of halfway, and as it does itself
everywhere else: any other difference, of scales, weights, layers or order, stays visible.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from vivace.export.description import Description
from vivace.export.fake_quant import fake_linear

TIE = 1e-3  # of a code
Arrays = Mapping[str, NDArray[Any]]
Functions = Mapping[str, Callable[[Tensor], Tensor]]


@dataclass(frozen=True, slots=True)
class Compared:
    """error: max |graph - reference| / max |reference|, with ties rounded alike; free: the same with ties as they fall;
    ties: codes of the reference that were taken from the graph; codes: all of them."""

    error: float
    free: float
    ties: int
    codes: int


def compared(
    graph: str | os.PathLike[str],
    feeds: Arrays,
    description: Description,
    linears: Mapping[str, nn.Linear],
    evaluate: Callable[[Functions], Tensor],
    output: str = "prediction",
) -> Compared:
    """Run an int8 graph of a pack and its reference.

    Args:
        graph: the ONNX file in its folder; feeds: its inputs; output: the one that is compared.
        linears: the network's layers by name; evaluate: the reference's value of that output, in the graph's shape, of
            a network whose layers of these names are computed by these functions.
    """
    value, found = graph_codes(graph, feeds, output)
    rounders = {name: _Rounded(codes) for name, codes in found.items()}
    layers = {name: (description.layers[name], linears[name].bias) for name in found}
    alike = evaluate({name: fake_linear(*layers[name], round=rounders[name]) for name in found})
    free = evaluate({name: fake_linear(*layers[name]) for name in found})
    ties, codes = (sum(getattr(each, what) for each in rounders.values()) for what in ("ties", "codes"))
    return Compared(_relative(value, alike), _relative(value, free), ties, codes)


def graph_codes(
    graph: str | os.PathLike[str], feeds: Arrays, output: str
) -> tuple[NDArray[Any], dict[str, NDArray[np.int16]]]:
    """An output of a quantized graph, and the codes that each of its layers read, zero point taken off."""
    import onnxruntime as ort

    path = Path(graph)
    model = onnx.load(path, load_external_data=False)
    made = {name: node for node in model.graph.node for name in node.output}
    read = {}
    for node in model.graph.node:
        weight = made.get(node.input[1]) if node.op_type == "MatMul" else None
        if weight is not None and weight.op_type == "DequantizeLinear":
            read[weight.input[0].removesuffix(".weight")] = made[node.input[0]].input[0]
    names = list(dict.fromkeys(read.values()))
    model.graph.output.extend(onnx.ValueInfoProto(name=name) for name in names)
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    options.add_session_config_entry("session.model_external_initializers_file_folder_path", str(path.parent))
    session = ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    value, *codes = session.run([output, *names], dict(feeds))
    zeros = [128 if code.dtype == np.uint8 else 0 for code in codes]
    wide = {name: code.astype(np.int16) - zero for name, code, zero in zip(names, codes, zeros, strict=True)}
    return value, {layer: wide[name] for layer, name in read.items()}


class _Rounded:
    """Rounds to nearest, near ties as a graph did."""

    def __init__(self, codes: NDArray[np.int16]) -> None:
        self.given, self.ties, self.codes = torch.from_numpy(codes.astype(np.float32)), 0, 0

    def __call__(self, values: Tensor) -> Tensor:
        own, given = values.round().clamp(-128.0, 127.0), self.given.view(values.shape)
        halfway = (own - given).abs().eq(1.0) & ((own + given) / 2 - values).abs().lt(TIE)
        self.ties += int(halfway.sum())
        self.codes += values.numel()
        return torch.where(halfway, given, own)


def _relative(found: NDArray[Any], wanted: Tensor) -> float:
    exact = wanted.double().numpy()
    return float(np.abs(found.astype(np.float64) - exact).max() / np.abs(exact).max())
