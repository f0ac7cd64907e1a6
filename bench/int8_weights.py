"""INT8 weights of the benches' models, made once and kept: calibrated for a trained model, else rounded to nearest."""

from __future__ import annotations

from pathlib import Path

import vivace
from vivace.bench.artefacts import Artefact
from vivace.bench.models import BenchModel

FORMAT = 1  # raise it when calibration or weights change
WEIGHTS = "weights.safetensors"


def int8_weights(model: BenchModel) -> Artefact:
    """A weights file, activations by token. Random weights have no trajectory worth calibrating on."""
    trained = model.sizes is None
    key = {"format": FORMAT, "fingerprint": model.opened.fingerprint, "calibrated": trained}

    def make(place: Path) -> None:
        from vivace.models.quantized.calibrate import calibrate_quantization
        from vivace.models.quantized.plain import round_layers
        from vivace.models.quantized.quantize import quantize_layers

        pipe = vivace.load(str(model.folder))
        if trained:
            table = calibrate_quantization(pipe, pipe.choose_plan(None, None, None, None))
            weights = quantize_layers(pipe, table)
        else:
            weights = round_layers(pipe)
        weights.save(place / WEIGHTS)

    return Artefact(f"int8-{model.short}", key, make)
