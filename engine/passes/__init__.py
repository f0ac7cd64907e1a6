"""Passes: functions Plan -> Plan, verified after each. Order: solver, guidance, precision, cache, tokens, guards."""

from vivace.engine.passes.block_cache import apply_block_cache
from vivace.engine.passes.experts import apply_experts
from vivace.engine.passes.freeze import freeze
from vivace.engine.passes.guards import apply_guards
from vivace.engine.passes.guidance import apply_guidance
from vivace.engine.passes.precision import apply_precision

__all__ = ["apply_block_cache", "apply_experts", "apply_guards", "apply_guidance", "apply_precision", "freeze"]
