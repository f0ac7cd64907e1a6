"""Passes: functions Plan -> Plan, verified after each. Order: solver, guidance, precision, cache, tokens, guards."""

from vivace.engine.passes.block_cache import apply_block_cache
from vivace.engine.passes.experts import apply_experts
from vivace.engine.passes.freeze import freeze
from vivace.engine.passes.guards import apply_guards
from vivace.engine.passes.guidance import apply_guidance
from vivace.engine.passes.mask import apply_mask
from vivace.engine.passes.merge import apply_merge
from vivace.engine.passes.precision import apply_precision
from vivace.engine.passes.tokens import apply_tokens

__all__ = [
    "apply_block_cache",
    "apply_experts",
    "apply_guards",
    "apply_guidance",
    "apply_mask",
    "apply_merge",
    "apply_precision",
    "apply_tokens",
    "freeze",
]
