"""Loops of a DiT on a GPU that keep and give again, or compute some tokens: captured rows against uncached ones.

A call is one request from its first row to its last. Its latents are compared with those of the eager executor on the
same plan before anything is timed; beside the time stands the share of the work that is computed.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

import vivace
from vivace.bench import device
from vivace.bench.caching_cases import costs
from vivace.bench.harness import Timing
from vivace.bench.models import MODELS, BenchModel
from vivace.bench.steady import BACKEND, GUIDANCE
from vivace.engine.caching import computed_share
from vivace.engine.passes import apply_block_cache, apply_guidance, apply_tokens
from vivace.engine.plan import Plan
from vivace.engine.planning import make_plan
from vivace.errors import BackendError
from vivace.kernels.spec import error_of

SEED = 7
SECONDS = 3.0  # of timed rounds
LIMIT = 0.15  # error against the eager executor above which nothing is timed
STEPS = 12
PLANS: Mapping[str, Any] = {
    "none": lambda plan: plan,
    "fora": lambda plan: apply_block_cache(plan, "fora", interval=2),
    "fora, residual": lambda plan: apply_block_cache(plan, "fora", interval=2, sites=("residual",), blocks=(1, 0)),
    "taylor_seer": lambda plan: apply_block_cache(plan, "taylor_seer", interval=2, order=1, first=1),
    "taylor_seer, int8": lambda plan: apply_block_cache(
        plan, "taylor_seer", interval=2, order=1, first=1, store="int8"
    ),
    "tokens": lambda plan: apply_tokens(plan, 0.5, first=2),
}


class Loop:
    """All rows of one request of a plan. latents: of the last one."""

    def __init__(self, session: Any, plan: Plan, label: int) -> None:
        self.session, self.plan, self.label = session, plan, label

    def __call__(self) -> Tensor:
        state = self.session.begin(vivace.Request(self.label, plan=self.plan, seed=SEED))
        while not state.done:
            self.session.step([state])
        latents: Tensor = self.session.finish(state).latents
        return latents

    def waits(self) -> int:
        """How often the host waited for the device in the rows of a request."""
        state = self.session.begin(vivace.Request(self.label, plan=self.plan, seed=SEED))
        torch.cuda.set_sync_debug_mode("warn")
        try:
            with warnings.catch_warnings(record=True) as seen:
                warnings.simplefilter("always")
                while not state.done:
                    self.session.step([state])
        finally:
            torch.cuda.set_sync_debug_mode("default")
            self.session.abort(state)
        return sum("synchroniz" in str(warning.message) for warning in seen)


def cached() -> Iterator[list[dict[str, Any]]]:
    """A guided request of DiT-XL/2."""
    yield cached_rows(MODELS["DiT-XL/2"], "bfloat16")


def cached_rows(model: BenchModel, dtype: str) -> list[dict[str, Any]]:
    """Rows of one model, all plans in the same rounds."""
    pipe, label = vivace.load(str(model.folder)), int(model.inputs(1)[2][0])
    plan = make_plan(pipe.spec.schedule, "ddim", STEPS, prediction=pipe.spec.prediction)
    plans = {name: change(apply_guidance(plan, GUIDANCE)) for name, change in PLANS.items()}
    options: dict[str, Any] = {"device": device.PLACE, "dtype": dtype}
    eager = pipe.compile(plans["none"], backend="eager", **options)
    loops, rows = dict[str, Loop](), dict[str, dict[str, Any]]()
    for name, each in plans.items():
        session = pipe.compile(each, backend=BACKEND, **options)
        loop = loops[name] = Loop(session, each, label)
        error = error_of(loop(), Loop(eager, each, label)())
        if not error <= LIMIT:
            raise BackendError(f"bench cached: {model.name} {dtype}: {name} errs by {error:.2g}")
        rows[name] = {"backend": name, "dtype": dtype, "error": error, "host_waits": loop.waits()}
        rows[name] |= {"share": computed_share(session.plans[0], costs(model.opened.config)), **_how(session)}
    times = device.spans({name: (loop, lambda calls: None) for name, loop in loops.items()}, seconds=SECONDS)
    case = {"op": "dit cached", "case": f"{model.name}, {STEPS} steps", "tokens": model.tokens, "seed": SEED}
    return [case | row | _timed(times, name) for name, row in rows.items()]


def _how(session: Any) -> dict[str, Any]:
    """Graphs of a session, bytes that it keeps, and why rows ran without."""
    told = session.executor.report()
    eager = [use.reason for use in session.executor.kernels(session.pool) if use.reason.startswith("eager")]
    return {
        "graphs": told.get("graphs"), "graph_bytes": told.get("graph_bytes"), "kept_bytes": session.kept.nbytes,
        "eager": eager,
    }  # fmt: skip


def _timed(times: Mapping[str, Timing], name: str) -> dict[str, Any]:
    return {"ms": times[name].to_dict(), "time_ratio": times[name].median / times["none"].median}
