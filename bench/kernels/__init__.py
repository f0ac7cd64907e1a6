"""The suite `kernels`: one module an op, each with its rows and its claims."""

from __future__ import annotations

from importlib import import_module
from typing import Any

from vivace.bench.harness import Claim, report
from vivace.errors import ArgumentError

OPS = (
    "adaln_modulate",
    "attention",
    "cache_apply",
    "cache_update",
    "fp8_linear",
    "fp8_quantize_tokens",
    "gated_residual",
    "gather_tokens",
    "gelu",
    "int8_attention",
    "int8_linear",
    "int8_norm_modulate",
    "linear",
    "norm_modulate",
    "philox_normal",
    "qk_norm_rope",
    "quantize_tokens",
    "sample_adjust",
    "scatter_tokens",
    "select_tokens",
    "solver_step",
)


def run(op: str | None = None, claim: str | None = None, quick: bool = False) -> dict[str, Any]:
    """Rows and claims of one op, or of all; with `claim`, only that claim and the rows behind it."""
    modules = {name: import_module(f"vivace.bench.kernels.{name}") for name in OPS}
    if op is not None and op not in OPS:
        raise ArgumentError(f"bench kernels: op {op!r} has no bench; use one of {', '.join(OPS)}")
    wanted = {name: module for name, module in modules.items() if op in (None, name)}
    if claim is not None:
        known = {name: module for module in wanted.values() for name in module.CLAIMS}
        if claim not in known:
            raise ArgumentError(f"bench kernels: claim {claim!r} is not here; use one of {', '.join(known) or 'none'}")
        rows, measured = known[claim].CLAIMS[claim](quick)
        return report("kernels", rows, [measured])
    rows, claims = [], list[Claim]()
    for module in wanted.values():
        rows += module.rows(quick)
        for measure in module.CLAIMS.values():
            more, measured = measure(quick)
            rows += more
            claims.append(measured)
    return report("kernels", rows, claims)
