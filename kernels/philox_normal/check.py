"""Integer arguments of the ops that make noise, in the one form that every implementation takes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from vivace.errors import ArgumentError, DtypeError, ShapeError


def prepare(shape: Sequence[int], seeds: Any, pictures: Any, draw: int) -> tuple[tuple[int, ...], Tensor, Tensor]:
    """(shape of ints, seeds int64 [B], pictures int64 [B]). Raises ShapeError, DtypeError, ArgumentError."""
    size = tuple(int(n) for n in shape)
    if any(n < 0 for n in size):
        raise ShapeError(f"philox_normal: shape is {size}, needs sizes of 0 or more")
    if not 0 <= draw < 1 << 32:
        raise ArgumentError(f"philox_normal: draw is {draw}, needs 0 <= draw < 2^32")
    seeds = integers(seeds, "philox_normal: seeds").long()
    pictures = integers(pictures, "philox_normal: pictures").long()
    if len(seeds) != len(pictures):
        raise ShapeError(f"philox_normal: {len(seeds)} seeds, {len(pictures)} pictures; give one of each per sample")
    return size, seeds, pictures


def integers(values: Any, what: str) -> Tensor:
    """A contiguous int64 or int32 tensor [B] from a tensor, array or list; unsigned 64-bit numbers keep their bits."""
    tensor: Tensor
    if isinstance(values, np.ndarray):
        tensor = torch.from_numpy(np.ascontiguousarray(values).view(_SIGNED.get(values.dtype, values.dtype)))
    elif isinstance(values, Tensor):
        tensor = values
    else:
        tensor = torch.tensor([signed(value) for value in values], dtype=torch.int64)
    if tensor.dtype not in (torch.int64, torch.int32):
        raise DtypeError(f"{what} is {str(tensor.dtype)[6:]}, needs int64 or int32")
    if tensor.dim() != 1:
        raise ShapeError(f"{what} has shape {tuple(tensor.shape)}, needs [B]")
    return tensor.contiguous()


def signed(value: Any) -> int:
    """A 64-bit integer, signed or not, as the signed one of the same bits."""
    return ((int(value) + (1 << 63)) % (1 << 64)) - (1 << 63)


_SIGNED = {np.dtype(np.uint64): np.dtype(np.int64)}
