"""INT8 of the native DiT against OpenVINO and ONNX Runtime on INT8 graphs of the same network, side by side."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch

from vivace.bench.denoiser_dit import BASE, HOISTED, LARGE, SEED, WHOLE, SteadyRow, case_rows
from vivace.bench.harness import Claim, ratio_of_medians
from vivace.bench.models import MODELS
from vivace.bench.peers import absent, prepared, reference, runtime
from vivace.kernels.spec import missing

PEERS = ("open_vino", "onnx_runtime")
MOST_ERROR = 0.02  # relative, against float32


def int8_dtypes(peer: str) -> tuple[str, ...]:
    """The INT8 forms of a runtime."""
    return tuple(dtype for dtype in runtime(peer).DTYPES if dtype.startswith("int8"))


def vs_openvino(quick: bool) -> tuple[list[dict[str, Any]], Claim]:
    """Time of OpenVINO's INT8 over ours, DiT-B/2, one row of batch 1."""
    name = "denoiser.int8_dit_b_vs_openvino_int8"
    if (reason := _cannot() or runtime("open_vino").why_not("int8")) is not None:
        return [], Claim(name, ">=", 1.1, reason)
    rows, times = case_rows(BASE, "int8", 1, quick, {"open_vino": ("int8",)}, (HOISTED, WHOLE))
    if "openvino int8" not in times:
        return rows, Claim(name, ">=", 1.1, str(rows[-1]["reason"]))
    own, whole, theirs = times["vivace int8"], times["vivace, nothing hoisted int8"], times["openvino int8"]
    value, interval = ratio_of_medians([theirs], [own], SEED)
    how = (
        f"{rows[0]['case']}, INT8, {torch.get_num_threads()} threads: a row of a session in its steady state "
        f"(modulation hoisted, solver step included; error {rows[0]['error']:.2g}, largest over largest) against "
        f"OpenVINO's calibrated INT8 graph (error {rows[-1]['error']:.2g}); without hoisting "
        f"{theirs.median / whole.median:.2f}; medians of interleaved rounds"
    )
    return rows, Claim(name, ">=", 1.1, how, value, (interval[0], interval[1]), len(own.ms))


def rel_error(quick: bool) -> tuple[list[dict[str, Any]], Claim]:
    """|prediction - exact| / |exact| of the INT8 networks, exact in float32, the largest of ours; peers beside it."""
    name = "denoiser.int8_rel_error"
    if (reason := _cannot()) is not None:
        return [], Claim(name, "<=", MOST_ERROR, reason)
    rows = []
    for model, batch in ((BASE, 1), (BASE, 2)) + (() if quick else ((LARGE, 1),)):
        found = {"vivace int8": SteadyRow(MODELS[model], "int8", batch).prediction()}
        for peer in PEERS:
            for dtype in int8_dtypes(peer):
                made = prepared(peer, MODELS[model], dtype, batch, torch.get_num_threads())
                if made.ready is not None:
                    found[f"{made.name} {dtype}"] = made.ready.call(*MODELS[model].inputs(batch))
        exact = reference(MODELS[model], batch)
        for who, prediction in found.items():
            relative = float((prediction - exact).double().norm() / exact.double().norm())
            rows.append({"op": "dit", "case": f"{model} x{batch}", "backend": who, "relative_error": relative})
    own = [row["relative_error"] for row in rows if row["backend"] == "vivace int8"]
    told = ", ".join(f"{row['case']} {row['backend']} {row['relative_error']:.2g}" for row in rows)
    how = f"Euclidean norm of the difference to eager float32 over that of the prediction, random weights: {told}"
    return rows, Claim(name, "<=", MOST_ERROR, how, max(own), None, len(own))


def _cannot() -> str | None:
    return missing("cpu") or absent("diffusers")


CLAIMS: Mapping[str, Callable[[bool], tuple[list[dict[str, Any]], Claim]]] = {
    "denoiser.int8_dit_b_vs_openvino_int8": vs_openvino,
    "denoiser.int8_rel_error": rel_error,
}


def full_rows() -> list[dict[str, Any]]:
    """DiT-B/2 alone and as a guided pair, and DiT-XL/2, in INT8 against every runtime's INT8."""
    if _cannot() is not None:
        return []
    peers = {name: int8_dtypes(name) for name in PEERS if runtime(name).why_not("int8") is None}
    rows = []
    for name, batch in ((BASE, 1), (BASE, 2), (LARGE, 1)):
        rows += case_rows(name, "int8", batch, False, peers, (HOISTED, WHOLE))[0]
    return rows
