"""Arguments of `solver_step`, checked and brought into the one form that every implementation takes.

Nothing here reads device memory: rows, lanes and codes are checked where they are on the host, or known from `Facts`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from vivace.errors import ArgumentError, DtypeError, ShapeError
from vivace.kernels.philox_normal.check import integers
from vivace.kernels.solver_step.table import StepTable

_OUTS = {
    torch.float32: (torch.float32, torch.bfloat16, torch.float16),
    torch.float64: (torch.float64, torch.float32, torch.bfloat16, torch.float16),
}


@dataclass(frozen=True, slots=True)
class Prepared:
    """Inputs an implementation takes: torch throughout, every sample of `outs` contiguous, rows and index [B]."""

    outs: tuple[Tensor, ...]
    table: StepTable
    rows: Tensor
    index: Tensor
    seeds: Tensor | None
    pictures: Tensor | None


def prepare(
    pool: Tensor,
    outs: Sequence[Tensor],
    table: StepTable,
    rows: Any,
    index: Any,
    net: Tensor | None,
    tensors: Sequence[Tensor],
    seeds: Any,
    pictures: Any,
) -> Prepared:
    """The arguments in the form of `Prepared`. Raises ShapeError, DtypeError, ArgumentError."""
    _check_pool(pool)
    latent, slots, lanes = pool.shape[2:], pool.shape[0], pool.shape[1]
    rows, index = integers(rows, "solver_step: rows"), integers(index, "solver_step: index")
    batch = rows.shape[0]
    if index.shape[0] != batch:
        raise ShapeError(f"solver_step: index has {index.shape[0]} entries, rows {batch}; give one of each per sample")
    table = _table(table, pool)
    _check_range(rows, len(table), "rows", "rows of the table")
    _check_range(index, lanes, "index", "lanes of the pool")
    if index.device.type == "cpu" and len(set(index.tolist())) < batch:
        raise ArgumentError(f"solver_step: index {index.tolist()} names a lane twice; each sample needs its own lane")
    outs = tuple(_out(out, f"outs[{b}]", (batch, *latent), pool) for b, out in enumerate(outs))
    for i, tensor in enumerate(tensors):
        _check_tensor(tensor, f"tensors[{i}]", tuple(latent), pool)
    if net is not None:
        _check_net(net, (lanes, *latent), pool)
    seeds, pictures = (_per_sample(v, what, batch) for v, what in ((seeds, "seeds"), (pictures, "pictures")))
    if rows.device.type == "cpu" and batch:
        needed = table.facts.reach[rows.numpy()].max(axis=0).tolist()
        noise = seeds is not None and pictures is not None
        _check_reach(needed, (slots, len(outs), len(tensors), net is not None, noise))
    return Prepared(outs, table, rows, index, seeds, pictures)


def _check_pool(pool: Tensor) -> None:
    if pool.dtype not in _OUTS:
        raise DtypeError(f"solver_step: pool is {_name(pool)}, needs float32 (or float64); convert the state")
    if pool.dim() < 3:
        raise ShapeError(f"solver_step: pool has shape {tuple(pool.shape)}, needs [slots, capacity, *latent]")
    if not pool.is_contiguous():
        raise ShapeError("solver_step: pool is not contiguous; slots are addressed by stride, allocate it in one piece")


def _table(table: StepTable, pool: Tensor) -> StepTable:
    """The table as torch tensors on the pool's device, with its dtype."""
    if not table.is_torch:
        return table.to(pool.device, pool.dtype)
    if table.floats.dtype != pool.dtype:
        raise DtypeError(f"solver_step: table is {table.dtype}, pool {_name(pool)}; use table.to(device, dtype)")
    if table.ints.device != pool.device:
        where = f"table is on {table.ints.device}, pool on {pool.device}"
        raise ArgumentError(f"solver_step: {where}; use table.to(device)")
    return table


def _check_range(values: Tensor, stop: int, what: str, of: str) -> None:
    """Host integers lie in [0, stop); those on a device are taken as they are."""
    if values.device.type == "cpu" and values.numel():
        numbers = values.tolist()
        low, high = min(numbers), max(numbers)
        if low < 0 or high >= stop:
            raise ArgumentError(
                f"solver_step: {what} reach from {low} to {high}, there are {stop} {of}; use 0..{stop - 1}"
            )


def _out(out: Tensor, what: str, shape: tuple[int, ...], pool: Tensor) -> Tensor:
    """A network output with contiguous samples."""
    _check_shape(out, what, shape, pool)
    if out.dtype not in _OUTS[pool.dtype]:
        needs = ", ".join(str(dtype)[6:] for dtype in _OUTS[pool.dtype])
        raise DtypeError(f"solver_step: {what} is {_name(out)}, needs one of {needs} beside a {_name(pool)} pool")
    return out if out.is_contiguous() or not out.numel() or out[0].is_contiguous() else out.contiguous()


def _check_tensor(tensor: Tensor, what: str, shape: tuple[int, ...], pool: Tensor) -> None:
    _check_shape(tensor, what, shape, pool)
    if tensor.dtype != pool.dtype:
        raise DtypeError(f"solver_step: {what} is {_name(tensor)}, pool {_name(pool)}; convert the tensor")
    if not tensor.is_contiguous():
        raise ShapeError(f"solver_step: {what} is not contiguous; call .contiguous() once, when it is loaded")


def _check_net(net: Tensor, shape: tuple[int, ...], pool: Tensor) -> None:
    _check_shape(net, "net", shape, pool)
    if net.dtype not in _OUTS[pool.dtype]:
        raise DtypeError(f"solver_step: net is {_name(net)}, needs float32, bfloat16 or float16; allocate it so")
    if not net.is_contiguous():
        raise ShapeError("solver_step: net is not contiguous; allocate the network input in one piece")


def _check_shape(tensor: Tensor, what: str, shape: tuple[int, ...], pool: Tensor) -> None:
    if tuple(tensor.shape) != shape:
        raise ShapeError(
            f"solver_step: {what} has shape {tuple(tensor.shape)}, needs {shape} beside pool {tuple(pool.shape)}"
        )
    if tensor.device != pool.device:
        where = f"{what} is on {tensor.device}, pool on {pool.device}"
        raise ArgumentError(f"solver_step: {where}; move it with .to(device)")


def _per_sample(values: Any, what: str, batch: int) -> Tensor | None:
    """Seeds or pictures as int64 [B]; None stays None."""
    if values is None:
        return None
    tensor = integers(values, f"solver_step: {what}").long()
    if tensor.shape[0] != batch:
        raise ShapeError(f"solver_step: {what} has {tensor.shape[0]} entries, rows {batch}; give one per sample")
    return tensor


def _check_reach(needed: Sequence[int], given: Sequence[int]) -> None:
    """What the codes of the rows reach is there: slots, outs, tensors, net, noise."""
    for need, have, what in zip(needed[:3], given[:3], ("pool slots", "outs", "tensors"), strict=True):
        if need > have:
            raise ArgumentError(f"solver_step: the rows' codes reach {need} {what}, got {have}; give {need}")
    if needed[3] > given[3]:
        raise ArgumentError("solver_step: a row writes the network input, net is None; give net")
    if needed[4] > given[4]:
        raise ArgumentError("solver_step: a row reads noise; give seeds and pictures, one per sample")


def _name(tensor: Tensor) -> str:
    return str(tensor.dtype)[6:]
