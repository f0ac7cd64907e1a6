"""A session on a GPU in its steady state, one row of a guided plan a call, for the benches of whole networks."""

from __future__ import annotations

import time
import warnings

import torch
from torch import Tensor

import vivace
from vivace.bench import device
from vivace.bench.models import BenchModel
from vivace.engine.passes import apply_guidance, apply_precision
from vivace.engine.planning import make_plan
from vivace.models.quantized.plain import round_layers

BACKEND = "cuda_graph"  # our compiled executor
ROWS = 64  # of the plan that is stepped through, again and again
GUIDANCE = 4.0
WATCHED = 8  # rows in which a wait for the device would be seen


class SteadyRow:
    """A session that steps one guided request through a plan of many rows: one call is one row.

    precision: "int8" or "fp8", of the linears in all blocks, weights rounded to nearest; None: the model's dtype.
    """

    def __init__(self, model: BenchModel, dtype: str, *, hoist: bool = True, precision: str | None = None) -> None:
        begin = time.perf_counter()
        pipe = vivace.load(str(model.folder))
        plan = make_plan(pipe.spec.schedule, "ddim", ROWS, prediction=pipe.spec.prediction)
        plan = apply_guidance(plan, GUIDANCE)
        if precision is not None:
            pipe = vivace.load(str(model.folder), quantized=round_layers(pipe, format=precision))
            plan = apply_precision(plan, precision)
        self.session = pipe.compile(plan, backend=BACKEND, device=device.PLACE, dtype=dtype, hoist=hoist)
        self.label, self.state = int(model.inputs(1)[2][0]), None
        self.prepare(1)
        self()
        torch.cuda.synchronize()
        self.compile_s = time.perf_counter() - begin

    def prepare(self, calls: int) -> None:
        """A fresh request unless the one in flight has so many rows left."""
        if self.state is None or len(self.state.plan.steps) - self.state.row < calls:
            if self.state is not None:
                self.session.abort(self.state)
            self.state = self.session.begin(vivace.Request(self.label))

    def __call__(self) -> None:
        self.session.step([self.state])

    def prediction(self, model: BenchModel) -> Tensor:
        """Both branches of the bench's input."""
        x, t, _ = model.inputs(1, self.session.denoiser.dtype)
        variant = self.session.plans[0].steps[0].variant
        outs = self.session.executor.evaluate(
            x.to(device.PLACE), t.tolist(), [self.session.denoiser.encode(self.label)], variant
        )
        return torch.cat([out.float() for out in outs])

    def waits(self) -> int:
        """How often the host waited for the device in some rows."""
        self.prepare(WATCHED)
        torch.cuda.set_sync_debug_mode("warn")
        try:
            with warnings.catch_warnings(record=True) as seen:
                warnings.simplefilter("always")
                for _ in range(WATCHED):
                    self()
        finally:
            torch.cuda.set_sync_debug_mode("default")
        return sum("synchroniz" in str(warning.message) for warning in seen)
