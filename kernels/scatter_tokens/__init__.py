"""Rows of some tokens put in their places among all, for instance fresh keys and values into those that were kept."""

from __future__ import annotations

from typing import TYPE_CHECKING

from vivace.kernels.scatter_tokens.check import check
from vivace.kernels.spec import choose, define, load

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["scatter_tokens"]


def scatter_tokens(
    full: Tensor,
    ids: Tensor,
    fresh: Tensor,
    *,
    second: Tensor | None = None,
    lanes: Tensor | None = None,
    hidden: Tensor | None = None,
    gate: Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    """full[lanes[r], ids[r % n, m]] = fresh[r, m], [fresh[r, m] | second[r, m]] or hidden[r, m] + gate * fresh[r, m].

    Product and sum are float32 (float64 for float64), rounded one by one, as `gated_residual` does; what is stored is
    rounded to the dtype of full. Every backend gives the same bits. Places that no id names stay as they are.

    Args:
        full: float32 | bfloat16 [L, N, W] (float16 on a GPU and in the reference, float64 in the reference), written in
            place; rows may lie anywhere, elements of a row side by side.
        ids: int32 [n, M], those of one picture distinct, R a multiple of n: rows lie branch after branch, n pictures
            each. Numbers on a GPU are not looked at.
        fresh: [R, M, W], rows anywhere, of the dtype of full or another of those above.
        second: [R, M, W - W'], dtype of fresh, behind fresh [R, M, W'] in a row: values behind keys in one pass. Where
            they lie side by side already, as in a fused projection, `fresh` is a view of both.
        lanes: int64 [R], distinct: which part of full each row writes; None: part r, and L = R.
        hidden: [R, M, W], dtype of fresh; not beside `second`. None: nothing is added.
        gate: [W], [R, W] or [R, M, W], with 1 for R or M where it is shared; float32 or fresh's dtype. None: 1.
        backend: "reference" | "cpu" | "triton" | "auto"; None: VIVACE_BACKEND, then "auto".
    Returns: full. No gradients.
    Raises: ShapeError, DtypeError, ArgumentError, BackendError.
    Source: Liu et al. 2025 (RAS), section 3.2.
    """
    rarest = check(full, ids, fresh, second, lanes, hidden, gate)
    choice = choose(SPEC, full.device.type, rarest, backend)
    if fresh.shape[0] and fresh.shape[1] and full.shape[2]:
        load(SPEC, choice.backend)(full, ids, fresh, second=second, lanes=lanes, hidden=hidden, gate=gate)
    return full


SPEC = define("scatter_tokens")
