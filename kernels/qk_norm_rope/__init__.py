"""Normalisation of queries and keys and their rotary embedding, in one pass over memory."""

from __future__ import annotations

from typing import TYPE_CHECKING

from vivace.kernels.spec import choose, define, load

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["qk_norm_rope"]


def qk_norm_rope(
    query: Tensor,
    key: Tensor,
    *,
    query_weight: Tensor | None = None,
    key_weight: Tensor | None = None,
    query_bias: Tensor | None = None,
    key_bias: Tensor | None = None,
    cos: Tensor | None = None,
    sin: Tensor | None = None,
    kind: str = "rms",
    pairs: str = "interleaved",
    eps: float = 1e-6,
    rotate_from: int = 0,
    rotate_key: bool = True,
    out: tuple[Tensor, Tensor] | None = None,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """y = norm(x) * weight + bias of query and of key, then z = y * cos + turned(y) * sin; what is None is left out.

    norm over a head, or over all heads of a token where the weight has H*K elements: "rms" x / sqrt(mean(x^2) + eps),
    "layer" (x - mean) / sqrt(mean((x - mean)^2) + eps), "none" x. turned: "interleaved" (y0, y1) -> (-y1, y0) for
    channels (0, 1), (2, 3), ...; "half" for channels (i, i + K/2). Arithmetic is float32 (float64 for float64), the
    result is rounded once. A token's bits depend on that token alone, on every CPU and thread count.

    Args:
        query, key: float32 | bfloat16 [B, N, H, K] and [B, M, H2, K] (float64 runs in the reference only); any strides
            but that of the last axis, which is 1: parts of a fused projection and permuted [B, H, N, K] are fine.
        query_weight, query_bias: [K] or [H*K], float32 or query's dtype; key_weight, key_bias: likewise with H2.
        cos, sin: float32 [R, K], [1, R, K] or [B, R, K]; row r turns token rotate_from + r, other tokens (of text, say)
            are not turned. As `diffusers` makes them: get_1d_rotary_pos_embed(use_real=True) for "interleaved", with
            repeat_interleave_real=False for "half". From complex [R, K/2] `freqs` (Qwen-Image, Lumina 2) by
            freqs.real.repeat_interleave(2, -1), freqs.imag.repeat_interleave(2, -1); where channels of all heads turn
            differently (LTX), view heads as one: query.view(B, N, 1, H * K).
        kind: "rms" | "layer" | "none"; pairs: "interleaved" | "half"; eps: added to the mean of squares, 0 or more.
        rotate_from: the first token that is turned; rotate_key: False leaves all keys unturned (cross-attention).
        out: (query, key) are written there when given, shapes and dtypes as theirs, last axis contiguous; may be the
            inputs, or slices of a longer sequence.
        backend: "reference" | "cpu" | "triton" | "auto"; None: VIVACE_BACKEND, then "auto".
    Returns: (query [B, N, H, K], key [B, M, H2, K]), contiguous unless `out` is given. No gradients.
    Raises: ShapeError, DtypeError, ArgumentError, BackendError.
    Source: Henry et al. 2020 (QK norm); Su et al. 2021, eq. 34 (rotary embedding).
    """
    from vivace.kernels.qk_norm_rope.check import check

    dtype = check(
        query, key, (query_weight, query_bias), (key_weight, key_bias), cos, sin, kind, pairs, eps, rotate_from,
        rotate_key, out,
    )  # fmt: skip
    choice = choose(SPEC, query.device.type, dtype, backend)
    result: tuple[Tensor, Tensor] = load(SPEC, choice.backend)(
        query, key, query_weight=query_weight, key_weight=key_weight, query_bias=query_bias, key_bias=key_bias,
        cos=cos, sin=sin, kind=kind, pairs=pairs, eps=eps, rotate_from=rotate_from, rotate_key=rotate_key, out=out,
    )  # fmt: skip
    return result


SPEC = define("qk_norm_rope")
