"""Sources of steps: rows decided while a picture is made, one picture apart from the other.

A source is the immutable description of such a method. `vivace.sample` and sessions take one in place of a plan; the
result then holds, picture by picture, the plan of the rows that were taken: running it again gives the same bits.
"""

from vivace.engine.sources.adaptive_ode import AdaptiveODE
from vivace.engine.sources.adaptive_sde import AdaptiveSDE
from vivace.engine.sources.base import Course, Measure, StepSource, Window
from vivace.engine.sources.time_shift import TimeShift

__all__ = ["AdaptiveODE", "AdaptiveSDE", "Course", "Measure", "StepSource", "TimeShift", "Window"]
