"""The rows of a plan without a request: for an executor that compiles what they need before anybody waits for it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from vivace.engine.bind import ModelSpec
from vivace.engine.caching import caches
from vivace.engine.compiled import Evaluation
from vivace.engine.kept import Kept, KeptMemory, Sample, Turn, split
from vivace.engine.merge_rows import merge_row
from vivace.engine.perturbed import perturbs
from vivace.engine.plan import Plan, Variant
from vivace.engine.token_rows import focused
from vivace.engine.tokens import Focus


def rehearsed(
    plan: Plan, spec: ModelSpec, x: Tensor, condition: Any, memory: KeptMemory
) -> Iterator[tuple[Evaluation, Variant]]:
    """An evaluation of samples x [n, ...] with the structure of every row, each structure once.

    What rows keep lies in lanes that are handed back at the end, so that slabs are large enough for n pictures from
    then on. Rows that choose at run time are left out, and in a plan of such rows those that keep or read; so are rows
    that merge tokens. Token rows compute the first ones.
    """
    cached, n, done = caches(plan), len(x), set[Any]()
    kept, guarded = Kept(memory, cached, n), any(step.guard is not None for step in plan.steps)
    if cached.planes and spec.width and plan.binding is not None:
        kept.reserve((plan.binding.tokens, spec.width), x[:0])
    lanes, times = tuple(range(n)), (1.0,) * n
    whole = Evaluation(x, lanes, lanes, times, (condition,) * n, (None,) * n)
    try:
        for step, row in zip(plan.steps, cached.rows, strict=True):
            told = [item for item in row.uses if not (item.use.reads and item.use.site == "received")]  # selections'
            variant, uses = step.variant, tuple([item.use for item in told])
            chosen = step.guard is not None or (guarded and bool(uses))
            if variant is None or chosen or perturbs(variant):
                continue
            if merge_row(variant) is not None or (variant, uses) in done:
                continue
            done.add((variant, uses))
            samples = [tuple(Sample(kept, j, item.weights) for j in lanes) for item in told]
            turns = tuple(Turn(use, variant.model, each) for use, each in zip(uses, samples, strict=True))
            for branches, mine in split(variant.branches, turns):
                yield replace(whole, turns=mine, focus=_focus(variant, plan, x)), replace(variant, branches=branches)
    finally:
        kept.release()


def _focus(variant: Variant, plan: Plan, x: Tensor) -> Focus | None:
    """The first tokens of samples x, as many as a token row computes; None where it computes all."""
    if plan.binding is None or not focused(variant):
        return None
    ids = torch.arange(int(variant.keep), dtype=torch.int32, device=x.device)
    return Focus(ids.expand(len(x), -1).contiguous(), plan.binding.tokens)
