"""A model and its calibration to a file of quantized weights: what `vivace quantize` does."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from vivace.cli.calibrate import check_folder
from vivace.cli.progress import progress_bars
from vivace.errors import ArgumentError

PLAIN = "without a calibration: plain rounding, activations by token; nothing was measured and nothing kept high for it"


def quantize_model(
    model: str,
    *,
    out: Path,
    calibration: Path | None,
    format: str,
    activations: str | None,
    rounding: str | None,
    high: Sequence[str],
) -> tuple[dict[str, Any], str]:
    """Quantize the linear layers of a model's blocks and write them. Returns: data for JSON, and text for people.

    The files appear whole or not at all.
    """
    from vivace.engine.calibrate.table import CalibrationTable
    from vivace.models.pipe import load
    from vivace.models.quantized.files import paths_of
    from vivace.models.quantized.plain import round_layers
    from vivace.models.quantized.quantize import quantize_layers

    tensors, description = paths_of(out)
    check_folder(tensors)
    if calibration is None and (activations == "static" or rounding == "gptq"):
        option = "--activations static" if activations == "static" else "--rounding gptq"
        raise ArgumentError(f"quantize: {option} needs --calibration, a table of `vivace calibrate --quantization`")
    table = None if calibration is None else CalibrationTable.load(calibration)
    pipe = load(model)
    start = time.perf_counter()
    if table is None:
        weights = round_layers(pipe, format=format, high=high)
    else:
        given: dict[str, Any] = {"activations": activations, "rounding": rounding, "high": high, "format": format}
        with progress_bars() as progress:
            weights = quantize_layers(pipe, table, **given, progress=progress)
    seconds = time.perf_counter() - start
    weights.save(out)
    sizes = _sizes(pipe, weights)
    data: dict[str, Any] = {"out": [str(tensors), str(description)], "model": pipe.spec.name, "format": format}
    data |= {"fingerprint": weights.fingerprint, "layers": len(weights.layers), "kept": dict(weights.kept)}
    data |= {"static": weights.static, "groups": weights.groups, "advice": dict(weights.advice)}
    data |= {"bytes": sizes, "error": weights.source.get("error"), "seconds": seconds}
    data |= {"note": PLAIN if table is None else None}
    return data, _text(data, tensors)


def _sizes(pipe: Any, weights: Any) -> dict[str, Any]:
    """Bytes of the quantized layers' weights before and after, in all and by kind of layer, and of the whole model."""
    from vivace.models.quantized.reach import denoiser_of, network_of

    network = network_of(denoiser_of(pipe))
    kinds: dict[str, dict[str, int]] = {}
    for name, layer in weights.layers.items():
        kind = kinds.setdefault(kind_of(name), {"layers": 0, "before": 0, "after": 0})
        kind["layers"] += 1
        kind["before"] += network.get_submodule(name).weight.nbytes
        kind["after"] += layer.nbytes
    whole = sum(parameter.nbytes for parameter in network.parameters())
    before, after = (sum(kind[part] for kind in kinds.values()) for part in ("before", "after"))
    return {"before": before, "after": after, "kinds": kinds, "network": whole, "network_after": whole - before + after}


def kind_of(name: str) -> str:
    """The name of a layer within its block: "attn1.to_q" of "transformer_blocks.3.attn1.to_q"."""
    parts = name.split(".")
    last = max((i for i, part in enumerate(parts[:2]) if part.isdigit()), default=0)
    return ".".join(parts[last + 1 :]) or name


def _text(data: Mapping[str, Any], path: Path) -> str:
    sizes = data["bytes"]
    lines = [f"{data['model']}: {data['layers']} layers in {data['format']}, {len(data['kept'])} stay high"]
    rows = [(name, kind["layers"], kind["before"], kind["after"]) for name, kind in sizes["kinds"].items()]
    rows.append(("these layers", data["layers"], sizes["before"], sizes["after"]))
    rows.append(("whole network", "", sizes["network"], sizes["network_after"]))
    width = max(len(row[0]) for row in rows)
    lines += [
        f"  {name:{width}} {count!s:>5} {was / 1e6:10.2f} MB -> {now / 1e6:8.2f} MB" for name, count, was, now in rows
    ]
    if data["error"]:
        lines.append(f"relative error of the prediction: {data['error']['measured']:.4f}")
    if data["advice"]:
        lines.append("advice for rows: " + ", ".join(f"{name}={value}" for name, value in data["advice"].items()))
    if data["note"]:
        lines.append(f"note: {data['note']}")
    return "\n".join([*lines, f"wrote {path} and its description, {data['seconds']:.1f} s"])
