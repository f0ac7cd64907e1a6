"""Compiled kernels: addresses and integers in, ValueError for a number that would reach outside. See vivace.kernels."""

from collections.abc import Sequence

_Heads = Sequence[int]  # address, strides of samples, tokens, heads
# Address of the packed weight, columns, depth, dtype, addresses of float32 bias, scale and smooth or 0.
_Linear = tuple[int, int, int, str, int, int, int]
_Block = tuple[_Linear, _Linear, _Linear, _Linear, str, str]  # dtypes of activations in attention and MLP
_Rows = tuple[int, int, int, int]  # address, 0 float32 | 1 bfloat16, stride of samples, stride of tokens
# Address, 0 float32 | 1 bfloat16 | 2 float16 | 3 int8 | 4 float8, lanes, planes of each, address of the scales or 0.
_Planes = tuple[int, int, int, int, int]
_Ids = tuple[int, int, int]  # address, pictures, tokens of a picture
_Packed = tuple[int, int, int, int, int]  # address, bytes there, columns, depth, 0 float32 | 1 bfloat16 | 3 int8

def isa() -> str: ...
def available_isas() -> list[str]: ...
def usable_processors() -> int: ...
def last_level_cache_bytes() -> int: ...
def solver_step(
    *,
    pool: int,
    slots: int,
    capacity: int,
    numel: int,
    outs: Sequence[tuple[int, int, str]],
    net: int,
    net_dtype: str,
    tensors: Sequence[int],
    ints: int,
    floats: int,
    table_rows: int,
    rows: Sequence[int],
    index: Sequence[int],
    seeds: Sequence[int] | None,
    pictures: Sequence[int] | None,
    threads: int,
    adjust: int = 0,
    stream_above: int = -1,
    classes: int = 0,
    sizes: Sequence[int] = (),
    edges: Sequence[int] = (),
) -> None: ...
def sample_adjust(
    *,
    adjust: int,
    pool: int,
    slots: int,
    capacity: int,
    numel: int,
    outs: Sequence[tuple[int, int, str]],
    tensors: Sequence[int],
    ints: int,
    floats: int,
    table_rows: int,
    rows: Sequence[int],
    index: Sequence[int],
    seeds: Sequence[int] | None,
    pictures: Sequence[int] | None,
    threads: int,
) -> None: ...
def philox_normal(
    out: int, numel: int, seeds: Sequence[int], pictures: Sequence[int], draw: int, threads: int
) -> None: ...
def attention(
    out: _Heads,
    query: _Heads,
    key: _Heads,
    value: _Heads,
    sizes: Sequence[int],
    dtype: int,
    scale: float,
    threads: int,
    lanes: Sequence[int] | None = None,
    parts: int = 0,
) -> None: ...
def cache_update(
    kept: _Planes,
    lanes: Sequence[int],
    fresh: _Rows,
    base: _Rows | None,
    made: int,
    hidden: _Rows | None,
    gate: _Rows | None,
    out: _Rows | None,
    ids: tuple[int, int, int],
    sizes: Sequence[int],
    threads: int,
    /,
) -> None: ...
def cache_apply(
    kept: _Planes,
    lanes: Sequence[int],
    weights: int,
    terms: int,
    hidden: _Rows | None,
    gate: _Rows | None,
    out: _Rows,
    ids: tuple[int, int, int],
    sizes: Sequence[int],
    threads: int,
    /,
) -> None: ...
def gather_tokens(
    ids: _Ids,
    x: _Rows,
    out: _Rows,
    scale: _Rows | None,
    shift: _Rows | None,
    weight: _Rows | None,
    bias: _Rows | None,
    normed: _Rows | None,
    sizes: Sequence[int],
    centred: bool,
    eps: float,
    threads: int,
    /,
) -> None: ...
def scatter_tokens(
    ids: _Ids,
    full: _Rows,
    parts: int,
    lanes: Sequence[int] | None,
    fresh: _Rows,
    second: _Rows | None,
    first: int,
    hidden: _Rows | None,
    gate: _Rows | None,
    sizes: Sequence[int],
    threads: int,
    /,
) -> None: ...
def select_tokens(
    planes: Sequence[tuple[int, int]],
    dtype: int,
    weights: int,
    channels: int,
    grid: Sequence[int],
    patch: Sequence[int],
    deviation: bool,
    scores: int,
    ages: int,
    ids: int,
    sizes: Sequence[int],
    lowest: int,
    factors: int,
    factor_count: int,
    bound: int,
    least: int,
    threads: int,
    /,
) -> None: ...
def gated_residual(
    out: _Rows, hidden: _Rows, update: _Rows, gate: _Rows | None, sizes: Sequence[int], threads: int, /
) -> None: ...
def norm_modulate(
    out: _Rows,
    hidden: _Rows,
    scale: _Rows | None,
    shift: _Rows | None,
    weight: _Rows | None,
    bias: _Rows | None,
    sizes: Sequence[int],
    centred: bool,
    eps: float,
    threads: int,
    /,
) -> None: ...
def adaln_modulate(
    hidden_out: _Rows,
    out: _Rows,
    hidden: _Rows,
    update: _Rows,
    gate: _Rows | None,
    scale: _Rows | None,
    shift: _Rows | None,
    weight: _Rows | None,
    bias: _Rows | None,
    sizes: Sequence[int],
    centred: bool,
    eps: float,
    threads: int,
    /,
) -> None: ...
def gelu(out: _Rows, hidden: _Rows, gate: _Rows | None, sizes: Sequence[int], tanh: bool, threads: int, /) -> None: ...
def quantize_tokens(
    q: int, scale: int, x: _Rows, smooth: int, given: int, sizes: Sequence[int], threads: int, /
) -> None: ...
def int8_norm_modulate(
    q: int,
    q_scale: int,
    hidden: _Rows,
    scale: _Rows | None,
    shift: _Rows | None,
    weight: _Rows | None,
    bias: _Rows | None,
    smooth: int,
    given: int,
    sizes: Sequence[int],
    centred: bool,
    eps: float,
    threads: int,
    /,
) -> None: ...
def linear(
    out: _Rows,
    x: _Rows,
    weight: _Packed,
    bias: int,
    activation: int,
    gate: _Rows | None,
    residual: _Rows | None,
    sizes: Sequence[int],
    threads: int,
    /,
) -> None: ...
def int8_linear(
    out: _Rows,
    x: tuple[int, int, int, int],
    x_scale: int,
    smooth: int,
    weight: _Packed,
    weight_scale: int,
    bias: int,
    activation: int,
    gate: _Rows | None,
    residual: _Rows | None,
    sizes: Sequence[int],
    threads: int,
    /,
) -> None: ...
def run_products(dtype: int, steps: int, threads: int, /) -> int: ...
def packed_bytes(columns: int, depth: int, dtype: int, /) -> int: ...
def pack_matrix(to: _Packed, src: int, row_stride: int, threads: int, /) -> None: ...
def qk_norm_rope(
    query: Sequence[int],
    key: Sequence[int],
    turn: Sequence[int] | None,
    turn_key: bool,
    halves: bool,
    batch: int,
    width: int,
    dtype: int,
    kind: int,
    eps: float,
    threads: int,
    /,
) -> None: ...
def copy_memcpy(dst: int, src: int, bytes: int, threads: int) -> None: ...
def copy_stream(dst: int, src: int, bytes: int, threads: int) -> None: ...

class DitUses:
    def __init__(
        self,
        uses: Sequence[tuple[str, str, int, int, int, int, str]],
        kept: Sequence[int],
        scales: Sequence[int],
        rows: int,
    ) -> None: ...

class Dit:
    def __init__(
        self,
        *,
        heads: int,
        patch: int,
        channels: int,
        out_channels: int,
        gelu: str,
        eps: tuple[float, float, float],
        dtype: str,
        patches: _Linear,
        blocks: Sequence[_Block],
        final: _Linear,
    ) -> None: ...
    def arena_bytes(self, rows: int, samples: int, tokens: int, threads: int, some: bool = False) -> int: ...
    def run(
        self,
        *,
        x: tuple[int, int, str],
        capacity: int,
        lanes: Sequence[int],
        size: tuple[int, int],
        positions: int,
        modulations: Sequence[int],
        x_scales: Sequence[int],
        outs: Sequence[int],
        arena: int,
        arena_bytes: int,
        threads: int,
        clock: bool = False,
        check: bool = False,
        uses: DitUses | None = None,
        weights: Sequence[float] = ...,
        some: tuple[int, int] = ...,
        first: int = 0,
        start: Sequence[int] = ...,
        look: tuple[int, int, int] | None = None,
    ) -> tuple[tuple[int, int, int, int, int] | None, int]: ...
