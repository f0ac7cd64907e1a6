"""The half of a row after the network: the fused solver steps of a group, the same for every executor."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from vivace.engine.compiled import Evaluation
from vivace.engine.executors import Group, KernelRows
from vivace.engine.executors.maps import run_maps
from vivace.engine.kept import split
from vivace.engine.merging import Merging
from vivace.engine.plan import Variant
from vivace.engine.pool import Pool
from vivace.engine.receipt import KernelUse, Timeline
from vivace.kernels.sample_adjust import SPEC as ADJUST
from vivace.kernels.sample_adjust import sample_adjust
from vivace.kernels.solver_step import SPEC as STEP
from vivace.kernels.solver_step import bind_step, solver_step
from vivace.kernels.spec import choose


def evaluation(group: Group, x: Tensor, lanes: tuple[int, ...]) -> Evaluation:
    """What a network is handed for a group."""
    merging = group.merging if group.merging is not None and group.merging.row is not None else None
    given = group.rows, group.timesteps, group.conditions, group.hoisted, group.turns, group.resume
    return Evaluation(x, lanes, *given, focus=group.focus, merging=merging)


def by_branches(
    group: Group, call: Evaluation, run: Callable[[Evaluation, Variant], tuple[Tensor, ...]]
) -> tuple[Tensor, ...]:
    """Predictions for every out slot of the row: one run for branches that do the same with the caches.

    A branch that the variant does not run is that of "cond". run: its results may be overwritten by its next call.
    """
    variant = group.variant
    assert variant is not None
    parts, found = split(variant.branches, call.turns), dict[str, Tensor]()
    if len(parts) == 1:
        outs = run(call, variant)
        if group.outs == variant.branches:
            return outs
        found = dict(zip(variant.branches, outs, strict=True))
    else:
        for branches, turns in parts:
            outs = run(replace(call, turns=turns), replace(variant, branches=branches))
            found |= zip(branches, [out.clone() for out in outs], strict=True)
    return tuple(found.get(branch, found["cond"]) for branch in group.outs or variant.branches)


def run_rows(
    group: Group, pool: Pool, timeline: Timeline, predict: Callable[[Group, Pool], tuple[Tensor, ...]]
) -> None:
    """A row of a group: its predictions, by `predict` unless they are there already, then its fused steps."""
    outs: tuple[Tensor, ...] = ()
    variant = group.variant
    if variant is not None:
        if group.tokens is not None:
            with timeline.span(group.records, "select_tokens", group.row, len(group.lanes)):
                group = replace(group, focus=group.tokens.select())
        with timeline.span(group.records, "network", group.row, len(group.lanes)):
            outs = predict(group, pool) if group.given is None else group.given
            if group.tokens is not None:
                outs = group.tokens.merge(outs, group.outs or variant.branches)
        if group.merging is not None:
            _note(group.merging, variant, group.outs, outs)
        if group.hearers is not None:
            outs = group.hearers.heard(group.outs or variant.branches, variant.branches, outs)
    with timeline.span(group.records, "solver_step", group.row, len(group.lanes)):
        finish_rows(group, pool, outs)


def _note(merging: Merging, variant: Variant, names: Sequence[str], outs: Sequence[Tensor]) -> None:
    """What later merges need of predictions, by the branches that ran."""
    found = zip(names or variant.branches, outs, strict=True)
    merging.note({name: out for name, out in found if name in variant.branches})


def finish_rows(group: Group, pool: Pool, outs: Sequence[Tensor]) -> None:
    """Run the kernel rows of `group` on its predictions `outs` (one a branch), writing the pool in place.

    Nothing waits for the device: the kernels read row numbers, lanes and seeds on the host and send them themselves.
    """
    launch = group.kernel_rows[0] if len(group.kernel_rows) == 1 else None
    if launch is not None and len(launch.positions) == len(group.lanes) and not (launch.reduces or launch.maps):
        return _again(group, pool, outs, launch)
    lanes, seeds, pictures = torch.tensor(group.lanes), torch.tensor(group.seeds), torch.tensor(group.pictures)
    adjust = pool.state.new_empty(len(lanes), 3)  # of each sample, from its reduction row to the next rows
    for launch in group.kernel_rows:
        if launch.maps:
            run_maps(pool, launch.rows, [group.lanes[position] for position in launch.positions])
            continue
        whole = len(launch.positions) == len(lanes)
        here = torch.tensor(launch.positions)
        there = here if whole else _on_device(here, pool.device)
        mine = outs if whole else [out.index_select(0, there) for out in outs]
        call = (pool.state, mine, pool.table, torch.tensor(launch.rows), lanes if whole else lanes[here])
        inputs: Any = {"tensors": pool.tensors, "seeds": seeds, "pictures": pictures}
        if not whole:
            inputs |= {"seeds": seeds[here], "pictures": pictures[here]}
        if launch.fans:
            classes, patch = _by_class(group)
            inputs |= {"classes": classes if whole else classes.index_select(0, there), "patch": patch}
        if launch.reduces:
            found = sample_adjust(*call, **inputs)
            adjust = found if whole else adjust.index_copy_(0, there, found)
        else:
            solver_step(*call, **inputs, net=pool.net, adjust=adjust if whole else adjust.index_select(0, there))


def _again(group: Group, pool: Pool, outs: Sequence[Tensor], kernel_rows: KernelRows) -> None:
    """The usual launch, all samples and one row each: after the first row of a loop only row numbers are new."""
    rows, by_class = kernel_rows.rows, kernel_rows.fans
    classes, patch = _by_class(group) if by_class else (None, ())
    where = tuple([(out.data_ptr(), out.shape, out.stride(), out.dtype) for out in outs])
    key = (group.lanes, group.seeds, group.pictures, where, torch.get_num_threads(), patch)
    given: Any = {"net": pool.net, "tensors": pool.tensors, "seeds": group.seeds, "pictures": group.pictures}
    if by_class:
        given |= {"classes": classes, "patch": patch}
    launch = pool.call(key, lambda: bind_step(pool.state, outs, pool.table, rows, group.lanes, **given))
    if launch is None:
        solver_step(pool.state, outs, pool.table, rows, group.lanes, **given)
    else:
        launch(rows, classes)


def _by_class(group: Group) -> tuple[Tensor, tuple[int, ...]]:
    """Classes of the tokens of a group's samples, uint8 [n, N], and the edges of a token."""
    tokens = group.tokens
    assert tokens is not None and tokens.classes is not None, "a row with coefficients by age has its tokens' classes"
    return tokens.classes, tokens.patch


def _on_device(positions: Tensor, device: torch.device) -> Tensor:
    """Positions where tensors of the pool can be indexed by them."""
    return positions if device.type == "cpu" else positions.pin_memory().to(device, non_blocking=True)


def step_kernels(pool: Pool) -> tuple[KernelUse, ...]:
    """Which backend runs the solver steps over this pool, and why."""
    where = pool.device.type, str(pool.dtype).removeprefix("torch.")
    choices = [(spec.name, choose(spec, *where)) for spec in (STEP, ADJUST)]
    return tuple(KernelUse(name, choice.backend, choice.reason) for name, choice in choices)
