"""Attention without a mask, head by head: softmax(scale q k^T) v."""

from __future__ import annotations

from typing import TYPE_CHECKING

from vivace.kernels.spec import CPU, choose, define, load

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["attention"]


def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    scale: float | None = None,
    out: Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    """out[b, n, h] = sum over m of w[m] value[b, m, h], w = softmax over m of scale * query[b, n, h] . key[b, m, h].

    Products are summed in float32 and the softmax is float32, float64 for float64; on the CPU bfloat16 weights are
    rounded to bfloat16 before the second product. A row's bits depend on that query and on the keys and values of its
    head alone: not on the batch, the other queries or the threads. Without keys the result is 0.

    Args:
        query: float32 | bfloat16 [B, N, H, K] (float64 runs in the reference only); any strides but that of the last
            axis, which is 1: parts of a fused projection and permuted [B, H, N, K] are fine.
        key, value: [B, M, H, K], dtype of query.
        scale: of the scores, above 0; None: 1 / sqrt(K).
        out: [B, N, H, K] is written when given, last axis contiguous; may be query, shares no memory with key or value.
        backend: "reference" | "cpu" | "auto"; None: VIVACE_BACKEND, then "auto". There is none for a GPU: torch's
            `scaled_dot_product_attention` is that.
    Returns: [B, N, H, K], contiguous unless `out` is given. No gradients.
    Raises: ShapeError, DtypeError, ArgumentError, BackendError.
    Source: Vaswani et al. 2017, eq. 1; blocks of keys as in Dao et al. 2022, section 3.1.
    """
    from vivace.kernels.attention.check import check

    dtype, factor = check(query, key, value, scale, out)
    choice = choose(SPEC, query.device.type, dtype, backend)
    result: Tensor = load(SPEC, choice.backend)(query, key, value, scale=factor, out=out)
    return result


SPEC = define("attention", backends=(CPU,))
