"""`solver_step` on the CPU: csrc/ops/solver_step.*, one pass over memory with AVX-512, AVX2 or plain C++."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

from vivace import _C
from vivace.errors import ShapeError
from vivace.kernels.philox_normal.cpu_impl import chosen_isa
from vivace.kernels.solver_step.check import token_axes

if TYPE_CHECKING:
    from torch import Tensor

    from vivace.kernels.solver_step.table import StepTable


def why_not(device: str, dtype: str) -> str | None:
    """Why this cannot run on tensors of `device` with a pool of `dtype`; None when it can."""
    chosen_isa()
    if device != "cpu":
        return f"it runs CPU tensors, these are on {device}"
    return None if dtype == "float32" else f"{dtype} runs on the reference"


def solver_step(
    pool: Tensor,
    outs: Sequence[Tensor],
    table: StepTable,
    rows: Tensor,
    index: Tensor,
    *,
    net: Tensor | None = None,
    tensors: Sequence[Tensor] = (),
    seeds: Tensor | None = None,
    pictures: Tensor | None = None,
    adjust: Tensor | None = None,
    classes: Tensor | None = None,
    patch: Sequence[int] = (),
) -> None:
    """y_k = clamp(sum_j coef[k][j] * source_j * scale_j + sum_{l<k} prev[k][l] * y_l, low_k, high_k), one pass.

    Uses at most `torch.get_num_threads()` threads of the extension's own pool; the bits do not depend on them.
    """
    _C.solver_step(
        **packed(pool, outs, table, rows, index, tensors, seeds, pictures),
        net=0 if net is None else net.data_ptr(),
        net_dtype="float32" if net is None else str(net.dtype)[6:],
        adjust=0 if adjust is None else adjust.data_ptr(),
        **by_class(classes, pool, patch),
    )


def bound(
    pool: Tensor,
    outs: Sequence[Tensor],
    table: StepTable,
    index: Sequence[int],
    *,
    net: Tensor,
    tensors: Sequence[Tensor],
    seeds: Sequence[int],
    pictures: Sequence[int],
    patch: Sequence[int],
) -> Callable[[Sequence[int], Tensor | None], object]:
    """The call into C++ that only lacks its rows and the classes of their tokens."""
    import torch

    lanes, seed, picture = (torch.tensor(values) for values in (index, seeds, pictures))
    given = packed(pool, outs, table, lanes, lanes, tensors, seed, picture)
    del given["rows"]
    call = partial(_C.solver_step, **given, net=net.data_ptr(), net_dtype=str(net.dtype)[6:], adjust=0)
    sizes = token_axes(pool.shape, patch) if patch else ()
    by_token = partial(call, sizes=sizes, edges=tuple(patch))
    tokens = (len(index), math.prod(size // edge for size, edge in zip(sizes, patch, strict=True)))

    def launch(rows: Sequence[int], classes: Tensor | None = None) -> object:
        if classes is None:
            return call(rows=rows)
        if classes.shape != tokens or classes.dtype != torch.uint8 or not classes.is_contiguous():
            raise ShapeError(f"solver_step: classes {tuple(classes.shape)}; needs contiguous uint8 {tokens}")
        return by_token(rows=rows, classes=classes.data_ptr())

    return launch


def by_class(classes: Tensor | None, pool: Tensor, patch: Sequence[int]) -> dict[str, Any]:
    """What C++ is handed of tokens' classes."""
    if classes is None:
        return {}
    return {"classes": classes.data_ptr(), "sizes": token_axes(pool.shape, patch), "edges": tuple(patch)}


def packed(
    pool: Tensor,
    outs: Sequence[Tensor],
    table: StepTable,
    rows: Tensor,
    index: Tensor,
    tensors: Sequence[Tensor],
    seeds: Tensor | None,
    pictures: Tensor | None,
) -> dict[str, Any]:
    """What every op over rows of a table hands to C++: addresses, sizes, the samples' rows and lanes."""
    import torch

    return {
        "pool": pool.data_ptr(),
        "slots": pool.shape[0],
        "capacity": pool.shape[1],
        "numel": math.prod(pool.shape[2:]),
        "outs": [(out.data_ptr(), out.stride(0), str(out.dtype)[6:]) for out in outs],
        "tensors": [tensor.data_ptr() for tensor in tensors],
        "ints": table.ints.data_ptr(),
        "floats": table.floats.data_ptr(),
        "table_rows": len(table),
        "rows": rows.tolist(),
        "index": index.tolist(),
        "seeds": None if seeds is None else seeds.tolist(),
        "pictures": None if pictures is None else pictures.tolist(),
        "threads": torch.get_num_threads(),
    }
