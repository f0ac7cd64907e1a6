"""`philox_normal` on the CPU: csrc/ops/philox_normal.*, the bits of engine/noise.py."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

from vivace import _C
from vivace.errors import ArgumentError

if TYPE_CHECKING:
    import torch
    from torch import Tensor


def why_not(device: str, dtype: str) -> str | None:
    """Why this cannot make noise of `dtype` on `device`; None when it can."""
    chosen_isa()
    if device != "cpu":
        return f"it runs CPU tensors, these are on {device}"
    return None if dtype == "float32" else f"{dtype} runs on the reference"


def chosen_isa() -> str:
    """Instruction set of the kernels: the widest this processor runs, or what VIVACE_CPU_ISA names.

    Raises: ArgumentError when that variable names one that does not exist or cannot run here.
    """
    try:
        return _C.isa()
    except ValueError as error:
        raise ArgumentError(str(error)) from None


def philox_normal(
    shape: Sequence[int], seeds: Tensor, pictures: Tensor, draw: int = 0, *, device: torch.device | str = "cpu"
) -> Tensor:
    """n[b, i] = Box-Muller of philox4x32-10(counter (i >> 2, pictures[b], draw), key seeds[b]), word i & 3."""
    import torch

    out = torch.empty(len(seeds), *shape, dtype=torch.float32, device=device)
    threads = torch.get_num_threads()
    _C.philox_normal(out.data_ptr(), math.prod(shape), seeds.tolist(), pictures.tolist(), draw, threads)
    return out
