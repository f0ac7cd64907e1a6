"""Attention without a mask whose scores are products of 8-bit integers, head by head."""

from __future__ import annotations

from typing import TYPE_CHECKING

from vivace.errors import ShapeError
from vivace.kernels.spec import TRITON, choose, define, load

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["int8_attention"]

DTYPES = ("bfloat16", "float16", "float64")
MOST_WIDTH = 128
ABSENT = "on a processor use `attention`"


def int8_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    scale: float | None = None,
    out: Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    """out[b, n, h] = sum over m of w[m] value[b, m, h], w = softmax over m of scale a[n] c[m] (q[n] . k[m]).

    q = query / a and k = (key - mean) / c, rounded to integers within [-127, 127]; a is max |query| / 127 of a query,
    c max |key - mean| / 127 of the 64 keys in a row around it, mean that of the keys of its head over all tokens,
    rounded to bfloat16: the softmax does not change when one vector is taken off all keys. q . k is exact; the softmax
    is float32; its weights are rounded to the dtype of value for the second product, whose sums are float32 (float64:
    nothing is rounded but q and k). A row's bits depend on that query and on the keys and values of its head alone. A
    scale that would be 0 is 1; NaN or infinity in a query make its results NaN, in a key those of its head; without
    keys the result is 0.

    Args:
        query: bfloat16 | float16 [B, N, H, K] (float64 in the reference), 1 <= K <= 128; any strides but that of the
            last axis, which is 1.
        key, value: [B, M, H, K], dtype of query.
        scale: of the scores, above 0; None: 1 / sqrt(K).
        out: [B, N, H, K] is written when given, last axis contiguous; shares no memory with key or value.
        backend: "reference" | "triton" | "auto"; None: VIVACE_BACKEND, then "auto".
    Returns: [B, N, H, K], contiguous unless `out` is given. No gradients.
    Raises: ShapeError, DtypeError, ArgumentError, BackendError.
    Source: Zhang et al. 2024, section 4.2 (keys less their mean), 4.3 (second product); Dao et al. 2022, section 3.1.
    """
    from vivace.kernels.attention.check import check

    dtype, factor = check(query, key, value, scale, out, op="int8_attention", dtypes=DTYPES)
    if query.shape[3] > MOST_WIDTH or not query.shape[3]:
        raise ShapeError(f"int8_attention: heads are {query.shape[3]} wide, need 1 to {MOST_WIDTH}")
    choice = choose(SPEC, query.device.type, dtype, backend)
    result: Tensor = load(SPEC, choice.backend)(query, key, value, scale=factor, out=out)
    return result


SPEC = define("int8_attention", backends=(TRITON,), absent=ABSENT)
