"""Attention without a mask, head by head: softmax(scale q k^T) v."""

from __future__ import annotations

from typing import TYPE_CHECKING

from vivace.kernels.spec import choose, define, load

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["attention"]

DTYPES = ("float32", "bfloat16", "float16", "float64")


def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    scale: float | None = None,
    out: Tensor | None = None,
    lanes: Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    """out[b, n, h] = sum over m of w[m] value[b, m, h], w = softmax over m of scale * query[b, n, h] . key[b, m, h].

    Products are summed in float32 and the softmax is float32, float64 for float64; in C++ and on a GPU weights are
    rounded to the dtype of value before the second product. A row's bits depend on that query and on the keys and
    values of its head alone: not on the batch, the other queries or the threads. Without keys the result is 0.

    Args:
        query: float32 | bfloat16 [B, N, H, K] (float16 on a GPU and in the reference, float64 in the reference); any
            strides but that of the last axis, which is 1: parts of a fused projection, permuted [B, H, N, K].
        key, value: [B, M, H, K], dtype of query; [L, M, H, K] beside lanes.
        scale: of the scores, above 0; None: 1 / sqrt(K).
        out: [B, N, H, K] is written when given, last axis contiguous; may be query, shares no memory with key or value.
        lanes: int64 [B]: which part of key and value each row of query reads, where they lie in memory that many share;
            rows may read the same one. None: row b reads part b. Numbers on a GPU are not looked at.
        backend: "reference" | "cpu" | "triton" | "auto"; None: VIVACE_BACKEND, then "auto".
    Returns: [B, N, H, K], contiguous unless `out` is given. No gradients.
    Raises: ShapeError, DtypeError, ArgumentError, BackendError.
    Source: Vaswani et al. 2017, eq. 1; blocks of keys as in Dao et al. 2022, section 3.1.
    """
    from vivace.kernels.attention.check import check

    dtype, factor = check(query, key, value, scale, out, dtypes=DTYPES, lanes=lanes)
    choice = choose(SPEC, query.device.type, dtype, backend)
    result: Tensor = load(SPEC, choice.backend)(query, key, value, scale=factor, out=out, lanes=lanes)
    return result


SPEC = define("attention")
