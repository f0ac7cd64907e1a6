"""Per-step decisions that exist elsewhere, into plans and back.

apply_*: passes Plan -> Plan, verified and recorded in the recipe. to_*: the foreign form of a plan, or an error that
names the first row that it cannot hold. A foreign form holds one column of a plan (precision, caching, solver).
"""

from vivace.engine.interchange.scheduler import to_scheduler_config
from vivace.engine.interchange.smoothcache import apply_smoothcache, to_smoothcache
from vivace.engine.interchange.step_mask import apply_step_mask, to_step_mask
from vivace.engine.interchange.step_policy import apply_step_policy, to_step_policy

__all__ = [
    "apply_smoothcache",
    "apply_step_mask",
    "apply_step_policy",
    "to_scheduler_config",
    "to_smoothcache",
    "to_step_mask",
    "to_step_policy",
]
