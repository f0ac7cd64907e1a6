"""Arguments of the ops that run rows of a table, checked and brought into the one form that implementations take.

`op` names the op in messages. Nothing here reads device memory: rows, lanes and codes are checked where they are on the
host, or known from `Facts`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
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
    op: str,
    pool: Tensor,
    outs: Sequence[Tensor],
    table: StepTable,
    rows: Any,
    index: Any,
    net: Tensor | None,
    tensors: Sequence[Tensor],
    seeds: Any,
    pictures: Any,
    adjust: Tensor | None = None,
    *,
    reduces: bool = False,
    classes: Tensor | None = None,
    patch: Sequence[int] = (),
) -> Prepared:
    """The arguments in the form of `Prepared`; `reduces`: only reduction rows may run, else only the other ones.

    classes, patch: class of every token, see `solver_step`.

    Raises: ShapeError, DtypeError, ArgumentError.
    """
    _check_pool(op, pool)
    latent, slots, lanes = pool.shape[2:], pool.shape[0], pool.shape[1]
    rows, index = integers(rows, f"{op}: rows"), integers(index, f"{op}: index")
    batch = rows.shape[0]
    if index.shape[0] != batch:
        raise ShapeError(f"{op}: index has {index.shape[0]} entries, rows {batch}; give one of each per sample")
    table = _table(op, table, pool)
    _check_range(rows, len(table), f"{op}: rows", "rows of the table")
    reached = rows if classes is None else _with_classes(op, rows, classes, patch, pool, len(table))
    _check_range(index, lanes, f"{op}: index", "lanes of the pool")
    if index.device.type == "cpu" and len(set(index.tolist())) < batch:
        raise ArgumentError(f"{op}: index {index.tolist()} names a lane twice; each sample needs its own lane")
    outs = tuple(_out(out, f"{op}: outs[{b}]", (batch, *latent), pool) for b, out in enumerate(outs))
    for i, tensor in enumerate(tensors):
        _check_tensor(tensor, f"{op}: tensors[{i}]", tuple(latent), pool)
    if net is not None:
        _check_net(net, f"{op}: net", (lanes, *latent), pool)
    if adjust is not None:
        _check_tensor(adjust, f"{op}: adjust", (batch, 3), pool)
    seeds, pictures = (_per_sample(v, f"{op}: {what}", batch) for v, what in ((seeds, "seeds"), (pictures, "pictures")))
    if reached.device.type == "cpu" and batch:
        reach = table.facts.reach[reached.numpy()]
        if ((reach[:, -1] != 0) != reduces).any():
            raise ArgumentError(
                f"{op}: rows {rows.tolist()}: sample_adjust runs reduction rows, solver_step the others"
            )
        noise = seeds is not None and pictures is not None
        given = (slots, len(outs), len(tensors), net is not None, noise, adjust is not None)
        _check_reach(op, reach.max(axis=0).tolist(), given)
    return Prepared(outs, table, rows, index, seeds, pictures)


def _with_classes(op: str, rows: Tensor, classes: Tensor, patch: Sequence[int], pool: Tensor, length: int) -> Tensor:
    """The rows that samples with these classes run, as far as the host knows them."""
    spatial = token_axes(pool.shape, patch)
    if any(edge < 1 or size % edge for size, edge in zip(spatial, patch, strict=True)):
        raise ShapeError(f"{op}: patch {tuple(patch)} does not divide {tuple(spatial)}; give one edge per spatial axis")
    tokens = math.prod(size // edge for size, edge in zip(spatial, patch, strict=True))
    if classes.dtype != torch.uint8:
        raise DtypeError(f"{op}: classes are {_name(classes)}, needs uint8")
    _check_shape(classes, f"{op}: classes", (rows.shape[0], tokens), pool)
    if not classes.is_contiguous():
        raise ShapeError(f"{op}: classes are not contiguous; call .contiguous()")
    if rows.device.type != "cpu" or classes.device.type != "cpu" or not classes.numel():
        return rows
    highest = classes.amax(1).tolist()
    last = max(row + top for row, top in zip(rows.tolist(), highest, strict=True))
    if last >= length:
        raise ArgumentError(f"{op}: rows with their tokens' classes reach {last}, there are {length} rows of the table")
    return torch.from_numpy(
        np.concatenate([np.arange(row, row + top + 1) for row, top in zip(rows.tolist(), highest, strict=True)])
    )


def token_axes(shape: Sequence[int], patch: Sequence[int]) -> tuple[int, ...]:
    """Sizes of the axes of a pool of this shape that a patch has edges for: all of a sample, or those behind its first.

    Raises: ShapeError.
    """
    if len(patch) not in (len(shape) - 3, len(shape) - 2):
        raise ShapeError(
            f"solver_step: patch {tuple(patch)} for samples {tuple(shape[2:])}; give one edge per spatial axis"
        )
    return tuple(shape[len(shape) - len(patch) :])


def _check_pool(op: str, pool: Tensor) -> None:
    if pool.dtype not in _OUTS:
        raise DtypeError(f"{op}: pool is {_name(pool)}, needs float32 (or float64); convert the state")
    if pool.dim() < 3:
        raise ShapeError(f"{op}: pool has shape {tuple(pool.shape)}, needs [slots, capacity, *latent]")
    if not pool.is_contiguous():
        raise ShapeError(f"{op}: pool is not contiguous; slots are addressed by stride, allocate it in one piece")


def _table(op: str, table: StepTable, pool: Tensor) -> StepTable:
    """The table as torch tensors on the pool's device, with its dtype."""
    if not table.is_torch:
        return table.to(pool.device, pool.dtype)
    if table.floats.dtype != pool.dtype:
        raise DtypeError(f"{op}: table is {table.dtype}, pool {_name(pool)}; use table.to(device, dtype)")
    if table.ints.device != pool.device:
        where = f"table is on {table.ints.device}, pool on {pool.device}"
        raise ArgumentError(f"{op}: {where}; use table.to(device)")
    return table


def _check_range(values: Tensor, stop: int, what: str, of: str) -> None:
    """Host integers lie in [0, stop); those on a device are taken as they are."""
    if values.device.type == "cpu" and values.numel():
        numbers = values.tolist()
        low, high = min(numbers), max(numbers)
        if low < 0 or high >= stop:
            raise ArgumentError(f"{what} reach from {low} to {high}, there are {stop} {of}; use 0..{stop - 1}")


def _out(out: Tensor, what: str, shape: tuple[int, ...], pool: Tensor) -> Tensor:
    """A network output with contiguous samples."""
    _check_shape(out, what, shape, pool)
    if out.dtype not in _OUTS[pool.dtype]:
        needs = ", ".join(str(dtype)[6:] for dtype in _OUTS[pool.dtype])
        raise DtypeError(f"{what} is {_name(out)}, needs one of {needs} beside a {_name(pool)} pool")
    return out if out.is_contiguous() or not out.numel() or out[0].is_contiguous() else out.contiguous()


def _check_tensor(tensor: Tensor, what: str, shape: tuple[int, ...], pool: Tensor) -> None:
    _check_shape(tensor, what, shape, pool)
    if tensor.dtype != pool.dtype:
        raise DtypeError(f"{what} is {_name(tensor)}, pool {_name(pool)}; convert the tensor")
    if not tensor.is_contiguous():
        raise ShapeError(f"{what} is not contiguous; call .contiguous() once, when it is loaded")


def _check_net(net: Tensor, what: str, shape: tuple[int, ...], pool: Tensor) -> None:
    _check_shape(net, what, shape, pool)
    if net.dtype not in _OUTS[pool.dtype]:
        raise DtypeError(f"{what} is {_name(net)}, needs float32, bfloat16 or float16; allocate it so")
    if not net.is_contiguous():
        raise ShapeError(f"{what} is not contiguous; allocate the network input in one piece")


def _check_shape(tensor: Tensor, what: str, shape: tuple[int, ...], pool: Tensor) -> None:
    if tuple(tensor.shape) != shape:
        raise ShapeError(f"{what} has shape {tuple(tensor.shape)}, needs {shape} beside pool {tuple(pool.shape)}")
    if tensor.device != pool.device:
        where = f"{what} is on {tensor.device}, pool on {pool.device}"
        raise ArgumentError(f"{where}; move it with .to(device)")


def _per_sample(values: Any, what: str, batch: int) -> Tensor | None:
    """Seeds or pictures as int64 [B]; None stays None."""
    if values is None:
        return None
    tensor = integers(values, what).long()
    if tensor.shape[0] != batch:
        raise ShapeError(f"{what} has {tensor.shape[0]} entries, rows {batch}; give one per sample")
    return tensor


def _check_reach(op: str, needed: Sequence[int], given: Sequence[int]) -> None:
    """What the codes of the rows reach is there: slots, outs, tensors, net, noise, adjust."""
    for need, have, what in zip(needed[:3], given[:3], ("pool slots", "outs", "tensors"), strict=True):
        if need > have:
            raise ArgumentError(f"{op}: the rows' codes reach {need} {what}, got {have}; give {need}")
    if needed[3] > given[3]:
        raise ArgumentError(f"{op}: a row writes the network input, net is None; give net")
    if needed[4] > given[4]:
        raise ArgumentError(f"{op}: a row reads noise; give seeds and pictures, one per sample")
    if needed[5] > given[5]:
        raise ArgumentError(f"{op}: a row has adjusted outputs, adjust is None; give what sample_adjust returned")


def _name(tensor: Tensor) -> str:
    return str(tensor.dtype)[6:]
