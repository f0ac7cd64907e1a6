"""What a caller gives as quantized weights: the object, a file of ours, or a checkpoint that another tool made."""

from __future__ import annotations

from collections.abc import Mapping
from os import PathLike
from pathlib import Path
from typing import Any

from vivace.engine.passes.precision import apply_precision
from vivace.engine.plan import Plan
from vivace.engine.precision import states_precision
from vivace.errors import ArgumentError, ModelError, UnsupportedError
from vivace.models.quantized.files import DESCRIPTION, TENSORS, looks_quantized, paths_of, shown
from vivace.models.quantized.stand_in import check_layers
from vivace.models.quantized.weights import QuantizedWeights


def weights_of(given: Any, network: Any, fingerprint: str) -> QuantizedWeights:
    """Quantized weights of a network, checked against it.

    Args:
        given: `QuantizedWeights`; the path of a file of `vivace quantize`, with or without suffix; a folder or file of
            an int8 checkpoint, see `imports`.
        fingerprint: of the model.
    Raises: ModelError, ArgumentError.
    """
    if isinstance(given, QuantizedWeights):
        weights, where = given, "quantized"
    elif isinstance(given, (str, PathLike)):
        weights, where = _read(Path(given), network, fingerprint), shown(Path(given))
    else:
        raise ArgumentError(f"load: quantized is {type(given).__name__}; need a path, or QuantizedWeights")
    try:
        weights.check(fingerprint)
    except ModelError as error:
        raise ModelError(f"{where}: {error}") from None
    check_layers(network, weights, where)
    return weights


def network_of(networks: Mapping[str, Any]) -> Any:
    """The only network of a model. Raises UnsupportedError for one of several."""
    if len(networks) > 1:
        raise UnsupportedError(
            f"load: quantized weights are for models with one network; this one has {', '.join(networks)}"
        )
    return next(iter(networks.values()))


def _read(path: Path, network: Any, fingerprint: str) -> QuantizedWeights:
    from vivace.models.quantized.imports import import_checkpoint, is_checkpoint

    if not looks_quantized(path) and is_checkpoint(path):
        return import_checkpoint(path, network, fingerprint)
    if not any(file.exists() for file in paths_of(path)) and path.suffix not in (TENSORS, DESCRIPTION):
        raise ModelError(
            f"{shown(path)}: no quantized weights there; need {path.name}{TENSORS} and {path.name}{DESCRIPTION} as "
            "`vivace quantize --out` writes them, or a folder with an int8 checkpoint"
        )
    return QuantizedWeights.load(path)


def advised(plan: Plan, weights: QuantizedWeights | None) -> Plan:
    """The plan with its rows on these weights, as they advise, where it says nothing of precision itself.

    Advice counts evaluations of the plan that was calibrated: a shorter one keeps high a quarter at either end at most.

    Raises: ModelError for advice that `apply_precision` does not take.
    """
    if weights is None or states_precision(plan):
        return plan
    try:
        ends = {name: min(count, plan.nfe // 4) for name, count in weights.advice.items() if name in ("first", "last")}
        return apply_precision(plan, weights.format, **{**weights.advice, **ends})
    except TypeError as error:
        raise ModelError(f"quantized weights: their advice is of another release ({error}); quantize again") from None
