"""The packs that the bench of exports measures, made once and kept: models, plans and 8-bit weights behind them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from hashlib import sha256
from pathlib import Path
from typing import Any

import vivace
from vivace.bench.artefacts import Artefact, versions
from vivace.bench.models import MODELS, BenchModel
from vivace.engine import planners
from vivace.engine.passes import apply_block_cache, apply_guidance, apply_precision, apply_tokens
from vivace.engine.plan import Plan
from vivace.engine.planning import make_plan
from vivace.runtime.pack import Pack, open_pack

FORMAT = 1  # of calibrations; raise it when they change
PACK, WEIGHTS = "pack", "weights.safetensors"
SAMPLES = 16  # states a calibration reads


def plain(spec: Any) -> Plan:
    """Ten evaluations, guided."""
    return apply_guidance(make_plan(spec.schedule, "unipc", 10, prediction=spec.prediction), 2.0)


def variants(spec: Any) -> Plan:
    """Guided in the middle, attention and MLP reused in every other row, half the tokens from the middle on."""
    plan = apply_guidance(make_plan(spec.schedule, "unipc", 10, prediction=spec.prediction), 2.0, interval=(0.1, 0.9))
    return apply_tokens(apply_block_cache(plan, planners.Fora(interval=2)), keep=0.5, selector="deviation")


@dataclass(frozen=True)
class PackCase:
    """A pack. plan: of a model's spec; int8: all rows on static 8-bit weights."""

    model: BenchModel
    plan: Callable[[Any], Plan]
    int8: bool = False

    @property
    def name(self) -> str:
        """What rows of the report call it."""
        return f"{self.model.name}, {self.plan.__name__}{', int8' if self.int8 else ''}"

    @property
    def artefact(self) -> Artefact:
        """The folder in which the pack lies."""
        key: dict[str, Any] = {"case": self.name, "fingerprint": self.model.opened.fingerprint, "code": _code()}
        key |= versions("onnx", "torch") | ({"weights": FORMAT} if self.int8 else {})

        def make(place: Path) -> None:
            from vivace.export import export_onnx

            pipe = vivace.load(str(self.model.folder), quantized=static_weights(self.model) if self.int8 else None)
            plan = self.plan(pipe.spec)
            export_onnx(pipe, apply_precision(plan, "int8") if self.int8 else plan, place / PACK)

        return Artefact(f"pack-{self.model.short}", key, make)

    def open(self) -> Pack:
        """The pack, made now when it is not there."""
        return open_pack(self.artefact.get() / PACK)


EMOJI, LARGE = MODELS["emoji"], MODELS["DiT-B/2"]
CASES: Mapping[str, PackCase] = {
    case.name: case
    for case in (
        PackCase(EMOJI, plain),
        PackCase(EMOJI, variants),
        PackCase(EMOJI, plain, int8=True),
        PackCase(EMOJI, variants, int8=True),
        PackCase(LARGE, variants),
        PackCase(LARGE, variants, int8=True),
    )
}


def static_weights(model: BenchModel) -> Path:
    """8-bit weights with one activation scale a layer."""
    key = {"format": FORMAT, "fingerprint": model.opened.fingerprint, "recipe": "ptq4dm", "samples": SAMPLES}

    def make(place: Path) -> None:
        from vivace.models.quantized.calibrate import calibrate_quantization
        from vivace.models.quantized.quantize import quantize_layers

        pipe = vivace.load(str(model.folder))
        table = calibrate_quantization(pipe, plain(pipe.spec), recipe="ptq4dm", samples=SAMPLES)
        quantize_layers(pipe, table).save(place / WEIGHTS)

    return Artefact(f"int8-static-{model.short}", key, make).get() / WEIGHTS


@cache
def _code() -> str:
    """Digest of the sources that packs are written by."""
    root = Path(vivace.__file__).parent
    found = sha256()
    for path in sorted([*(root / "export").glob("*.py"), *(root / "runtime").glob("*.py")]):
        found.update(path.read_bytes())
    return found.hexdigest()[:16]
