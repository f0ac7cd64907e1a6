"""INT8 weights of the benches' models, calibrated once and kept."""

from __future__ import annotations

from pathlib import Path

import vivace
from vivace.bench.artefacts import Artefact
from vivace.bench.models import BenchModel

FORMAT = 1  # raise it when calibration or weights change
WEIGHTS = "weights.safetensors"
SAMPLES = {"emoji": 256}  # points of trajectories; random weights need few
FEW = 8


def int8_weights(model: BenchModel) -> Artefact:
    """A weights file by the default recipe: smoothed, activations by token."""
    samples = SAMPLES.get(model.name, FEW)
    key = {"format": FORMAT, "fingerprint": model.opened.fingerprint, "samples": samples}

    def make(place: Path) -> None:
        from vivace.models.quantized.calibrate import calibrate_quantization
        from vivace.models.quantized.quantize import quantize_layers

        pipe = vivace.load(str(model.folder))
        table = calibrate_quantization(pipe, pipe.choose_plan(None, None, None, None), samples=samples)
        quantize_layers(pipe, table).save(place / WEIGHTS)

    return Artefact(f"int8-{model.short}", key, make)
