"""Exported graphs of a model: one evaluation as ONNX, its INT8 forms, and OpenVINO's form of either.

Inputs x [batch, C, H, W], t [batch] float32, labels [batch] int64; output the prediction; `batch` is a free dimension,
fixed by each runtime when it compiles.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from vivace.bench.artefacts import Artefact, versions
from vivace.bench.models import BenchModel

FORMAT = 1
CALIBRATION_STEPS = 8
LARGE = 1.5e9  # bytes of float32 weights above which a graph keeps them beside itself: one file holds 2 GiB at most
FILE = "graph.onnx"


class Plain(nn.Module):
    """The network with positional inputs and one output."""

    def __init__(self, network: Any) -> None:
        super().__init__()
        self.network = network
        self.eval()

    def forward(self, x: Tensor, t: Tensor, labels: Tensor) -> Tensor:
        prediction: Tensor = self.network(x, t, class_labels=labels, return_dict=False)[0]
        return prediction


def onnx(model: BenchModel) -> Artefact:
    """float32 ONNX by torch's exporter, the batch free."""
    key = _key(model, "torch", "diffusers", "onnx", "onnxscript")
    return Artefact(f"onnx-{model.short}", key, lambda place: _export(model, place / FILE))


def onnx_int8(model: BenchModel, kind: str) -> Artefact:
    """INT8 of that graph: "static" is QDQ with calibrated uint8 activations, "dynamic" measures ranges at run time."""
    key = _key(model, "torch", "diffusers", "onnx", "onnxscript", "onnxruntime") | {"int8": kind}
    make = _quantize_static if kind == "static" else _quantize_dynamic
    return Artefact(f"onnx-int8-{kind}-{model.short}", key, lambda place: make(model, place / FILE))


def openvino(model: BenchModel, *, int8: bool = False) -> Artefact:
    """OpenVINO's own form (IR) of the float32 or the static INT8 graph.

    Weights that are bfloat16 on disk are kept in 16 bits here too.
    """
    source = onnx_int8(model, "static") if int8 else onnx(model)
    key = {"format": FORMAT, "from": source.path.name, **versions("openvino")}

    def convert(place: Path) -> None:
        import openvino as ov

        if int8:
            return ov.save_model(ov.convert_model(source.get() / FILE), place / "graph.xml", compress_to_fp16=False)
        with _floats(model, place) as path:
            ov.save_model(ov.convert_model(path), place / "graph.xml", compress_to_fp16=_narrow(model))

    return Artefact(source.kind.replace("onnx", "openvino"), key, convert)


def _narrow(model: BenchModel) -> bool:
    """Weights are bfloat16 on disk: a model so large that its float32 graph is not kept."""
    return model.stored == "bfloat16"


@contextmanager
def _floats(model: BenchModel, place: Path) -> Iterator[Path]:
    """The float32 graph: the kept one, or one that lies in `place` meanwhile."""
    if not _narrow(model):
        yield onnx(model).get() / FILE
        return
    folder = place / "float32"
    folder.mkdir()
    try:
        _export(model, folder / FILE)
        yield folder / FILE
    finally:
        shutil.rmtree(folder)


def _key(model: BenchModel, *libraries: str) -> dict[str, Any]:
    return {"format": FORMAT, "fingerprint": model.opened.fingerprint, **versions(*libraries)}


def _export(model: BenchModel, path: Path) -> None:
    batch = torch.export.Dim("batch", min=1, max=64)
    free = {0: batch}
    network = model.transformer()
    large = 4 * sum(p.numel() for p in network.parameters()) > LARGE
    with torch.no_grad():
        torch.onnx.export(
            Plain(network), model.inputs(2), str(path), dynamo=True, opset_version=20, external_data=large,
            input_names=["x", "t", "labels"], output_names=["prediction"], dynamic_shapes=(free, free, free),
            verbose=False,
        )  # fmt: skip


@contextmanager
def _without_shapes(model: BenchModel, place: Path) -> Iterator[Path]:
    """The float32 graph without inferred shapes, which contradict the quantizer's own; in `place` meanwhile."""
    import onnx as library

    folder = place / "plain"
    folder.mkdir()
    try:
        with _floats(model, place) as path:
            graph = library.load(path)
            del graph.graph.value_info[:]
            library.save(graph, folder / FILE, save_as_external_data=_narrow(model), location="weights")
            del graph
        yield folder / FILE
    finally:
        shutil.rmtree(folder)


def _quantize_dynamic(model: BenchModel, path: Path) -> None:
    from onnxruntime.quantization import QuantType, quantize_dynamic

    with _without_shapes(model, path.parent) as plain:
        quantize_dynamic(
            plain, path, weight_type=QuantType.QInt8, per_channel=True, op_types_to_quantize=["MatMul", "Gemm"],
            use_external_data_format=_narrow(model),
        )  # fmt: skip


def _quantize_static(model: BenchModel, path: Path) -> None:
    from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_static

    class Reader(CalibrationDataReader):
        rows = calibration(model)

        def get_next(self) -> dict[str, Any] | None:
            return next(self.rows, None)

    with _without_shapes(model, path.parent) as plain:
        quantize_static(
            plain, path, Reader(), quant_format=QuantFormat.QDQ, activation_type=QuantType.QUInt8,
            weight_type=QuantType.QInt8, per_channel=True, op_types_to_quantize=["MatMul", "Gemm"],
            extra_options={"MatMulConstBOnly": True}, use_external_data_format=_narrow(model),
        )  # fmt: skip


def calibration(model: BenchModel) -> Iterator[dict[str, Any]]:
    """Inputs of the graph along a guided DDIM trajectory of two pictures."""
    from vivace.bench.peers.eager import network
    from vivace.bench.peers.loop import draw, scheduler

    seen: list[dict[str, Any]] = []
    eager = network(model.transformer())

    def recorded(x: Tensor, t: Tensor, labels: Tensor) -> Tensor:
        for each in (slice(0, None, 2), slice(1, None, 2)):  # two graph runs: a smaller peak of memory
            seen.append({"x": x[each].numpy(), "t": t[each].numpy(), "labels": labels[each].numpy()})
        return eager(x, t, labels)

    config = model.opened.config
    noise = torch.randn(2, *model.opened.shape, generator=torch.Generator().manual_seed(11))
    labels = torch.tensor([config.classes // 5, config.classes // 2])
    draw(
        recorded, scheduler(model.scheduler, "ddim", "linspace"), CALIBRATION_STEPS, noise, labels, config.classes, 2.0
    )
    return ({name: np.ascontiguousarray(value) for name, value in row.items()} for row in seen)
