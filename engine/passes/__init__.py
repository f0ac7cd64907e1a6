"""Passes: functions Plan -> Plan, verified after each. Order: solver, guidance, precision, cache, tokens, guards."""

from vivace.engine.passes.experts import apply_experts
from vivace.engine.passes.guidance import apply_guidance
from vivace.engine.passes.precision import apply_precision

__all__ = ["apply_experts", "apply_guidance", "apply_precision"]
