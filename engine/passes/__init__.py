"""Passes: functions Plan -> Plan, verified after each. Order: solver, guidance, precision, cache, tokens, guards."""

from vivace.engine.passes.adaptive_guidance import apply_adaptive_guidance
from vivace.engine.passes.afs import apply_afs
from vivace.engine.passes.block_cache import apply_block_cache
from vivace.engine.passes.dualfast import apply_dualfast
from vivace.engine.passes.experts import apply_experts
from vivace.engine.passes.freeze import freeze
from vivace.engine.passes.guards import apply_guards
from vivace.engine.passes.guidance import apply_guidance
from vivace.engine.passes.invert import invert, retrace
from vivace.engine.passes.linear_ag import apply_linear_ag
from vivace.engine.passes.mask import apply_mask
from vivace.engine.passes.merge import apply_merge
from vivace.engine.passes.momentum import apply_momentum
from vivace.engine.passes.perturbed_attention import apply_perturbed_attention
from vivace.engine.passes.precision import apply_precision
from vivace.engine.passes.restart import apply_restart
from vivace.engine.passes.score_calibration import apply_score_calibration
from vivace.engine.passes.teleport import apply_teleport
from vivace.engine.passes.time_alignment import apply_time_alignment
from vivace.engine.passes.tokens import apply_tokens

__all__ = [
    "apply_adaptive_guidance",
    "apply_afs",
    "apply_block_cache",
    "apply_dualfast",
    "apply_experts",
    "apply_guards",
    "apply_guidance",
    "apply_linear_ag",
    "apply_mask",
    "apply_merge",
    "apply_momentum",
    "apply_perturbed_attention",
    "apply_precision",
    "apply_restart",
    "apply_score_calibration",
    "apply_teleport",
    "apply_time_alignment",
    "apply_tokens",
    "freeze",
    "invert",
    "retrace",
]
