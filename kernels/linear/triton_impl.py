"""`linear` on a GPU: one program a tile of the result, matrix instructions over K, the epilogue in registers.

Programs run in groups of row blocks, so that those side by side share weights in the L2 cache. The sum over K runs in
one order, whatever the tile, the rows and the batch. float32 is multiplied as such (no TF32).
"""
# Kernels are traced by triton, not typed.
# mypy: disable-error-code="no-untyped-def, untyped-decorator, assignment, attr-defined"

from __future__ import annotations

from functools import cache

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.errors import TritonError

from vivace.errors import ArgumentError
from vivace.kernels.linear.tiles import GROUP, Tile, tile_of
from vivace.kernels.norm_modulate.check import dtype_name
from vivace.kernels.norm_modulate.triton_impl import rows, vector
from vivace.kernels.philox_normal import triton_impl as philox
from vivace.kernels.philox_normal.triton_impl import on_device
from vivace.kernels.spec import interpreted

SLICE = 32  # columns the epilogue works on at a time: with more, the registers do not last
FAILURES = (RuntimeError, ValueError, TritonError)  # of a launch that the device or the compiler refuses
DTYPES = ("float32", "bfloat16", "float16")
_NONE, _GELU, _GELU_TANH, _SILU = (tl.constexpr(name) for name in ("none", "gelu", "gelu_tanh", "silu"))


def why_not(device: str, dtype: str) -> str | None:
    """Why this cannot run on inputs of `dtype` on `device`; None when it can."""
    reason = philox.why_not(device, dtype)
    return reason if reason or dtype in DTYPES else f"{dtype} runs on the reference"


def linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    activation: str = "none",
    gate: Tensor | None = None,
    residual: Tensor | None = None,
    out: Tensor | None = None,
    out_dtype: torch.dtype | None = None,
) -> Tensor:
    """residual + gate * act(x W^T + bias), each that is None left out."""
    tile = tile_for(x, weight)
    if out is None:
        out = x.new_empty((*x.shape[:-1], len(weight)), dtype=out_dtype or x.dtype)
    return launch(tile, x, weight, None, None, bias, activation, gate, residual, out)


def tile_for(x: Tensor, weight: Tensor) -> Tile:
    """The tile of x W^T, from the shape class, the dtype and the device. Raises ArgumentError for a packed weight."""
    if not isinstance(weight, Tensor):
        raise ArgumentError("linear: a packed weight is for the CPU; give the triton backend the Tensor itself")
    columns, depth = weight.shape
    where = device_name(x.device), shared_bytes(x.device)
    return tile_of(x.numel() // depth, columns, depth, dtype_name(x.dtype), *where)


def launch(
    tile: Tile,
    x: Tensor,
    weight: Tensor,
    x_scale: Tensor | None,
    weight_scale: Tensor | None,
    bias: Tensor | None,
    activation: str,
    gate: Tensor | None,
    residual: Tensor | None,
    out: Tensor,
) -> Tensor:
    """Run the kernel with this tile into `out`; scales are those of 8-bit numbers."""
    (columns, depth), source, target = weight.shape, by_token(x), by_token(out)
    batch, tokens, _ = source.shape
    blocks = triton.cdiv(batch * tokens, tile.rows) * triton.cdiv(columns, tile.columns)
    with on_device(x.device):
        _linear[blocks,](
            *rows(target),
            *rows(source),
            weight,
            weight.stride(0),
            None if x_scale is None else x_scale.contiguous(),
            weight_scale,
            bias,
            *vector(gate if gate is None or gate.dim() < 4 else by_token(gate.expand(out.shape))),
            *((None, 0, 0) if residual is None else rows(by_token(residual))),
            tokens,
            batch * tokens,
            columns,
            depth,
            ACTIVATION=activation,
            WHOLE=depth % tile.depth == 0,
            WIDEN=interpreted() and x.is_floating_point(),
            BLOCK_M=tile.rows,
            BLOCK_N=tile.columns,
            BLOCK_K=tile.depth,
            GROUP=GROUP,
            HALVINGS=halvings(tile),
            num_warps=tile.warps,
            num_stages=tile.stages,
        )
    if target.data_ptr() != out.data_ptr():
        out.copy_(target.view(out.shape))
    return out


def halvings(tile: Tile, columns: int = SLICE) -> int:
    """How often a tile is halved until the epilogue works on so many columns at a time."""
    return (tile.columns // columns).bit_length() - 1


@cache
def device_name(device: torch.device) -> str:
    """As tuned tiles are kept: the product's name and its capability."""
    if device.type != "cuda":
        return device.type
    return f"{torch.cuda.get_device_name(device)} {torch.cuda.get_device_capability(device)}"


@cache
def shared_bytes(device: torch.device) -> int | None:
    """Shared memory that a program may have; None in the interpreter."""
    if device.type != "cuda":
        return None
    return getattr(torch.cuda.get_device_properties(device), "shared_memory_per_block_optin", None)


def by_token(tensor: Tensor) -> Tensor:
    """[B, N, D] of any rank; copied where such a view does not exist."""
    if tensor.dim() == 3:
        return tensor
    return tensor.reshape(tensor.shape[0] if tensor.dim() > 1 else 1, -1, tensor.shape[-1])


@triton.jit
def _linear(
    out,
    out_sample,  # strides of samples and of tokens, here and below
    out_token,
    x,
    x_sample,
    x_token,
    weight,
    weight_row,
    x_scale,
    weight_scale,
    bias,
    gate,
    gate_sample,
    gate_token,
    residual,
    residual_sample,
    residual_token,
    tokens,
    height,  # rows of all samples
    columns,
    depth,
    ACTIVATION: tl.constexpr,
    WHOLE: tl.constexpr,  # depth is a multiple of BLOCK_K
    WIDEN: tl.constexpr,  # to float64, for the interpreter: it cannot multiply bfloat16, and its sums vary by row
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP: tl.constexpr,
    HALVINGS: tl.constexpr,  # of the tile, into what the epilogue works on at a time
):
    block_m, block_n = _place(tl.program_id(0), tl.cdiv(height, BLOCK_M), tl.cdiv(columns, BLOCK_N), GROUP)
    m = tl.minimum(block_m * BLOCK_M + tl.arange(0, BLOCK_M), height - 1)  # loads need no mask then
    b, n = (m // tokens).to(tl.int64), (m % tokens).to(tl.int64)
    column = tl.minimum(block_n * BLOCK_N + tl.arange(0, BLOCK_N), columns - 1).to(tl.int64)
    x_at = x + b * x_sample + n * x_token
    total = _product(x_at, weight + column * weight_row, depth, WHOLE, WIDEN, BLOCK_M, BLOCK_N, BLOCK_K)
    vectors = x_scale, weight_scale, bias
    strides = out_sample, out_token, gate_sample, gate_token, residual_sample, residual_token
    ends = block_m, block_n, tokens, height, columns
    _epilogue(total, out, vectors, gate, residual, strides, ends, ACTIVATION, HALVINGS)


@triton.jit
def _epilogue(total, out, vectors, gate, residual, strides, ends, ACTIVATION: tl.constexpr, HALVINGS: tl.constexpr):
    """What follows the sums of one tile, some of its columns at a time; `vectors` are both scales and the bias."""
    out_sample, out_token, gate_sample, gate_token, residual_sample, residual_token = strides
    block_m, block_n, tokens, height, columns = ends
    x_scale, weight_scale, bias = vectors
    rows = block_m * total.shape[0] + tl.arange(0, total.shape[0])
    m = tl.minimum(rows, height - 1)
    b, n = (m // tokens).to(tl.int64), (m % tokens).to(tl.int64)
    placed = x_scale if x_scale is None else x_scale + m, weight_scale, bias
    out_at, here = out + b * out_sample + n * out_token, rows < height
    gate_at = gate if gate is None else gate + b * gate_sample + n * gate_token
    residual_at = residual if residual is None else residual + b * residual_sample + n * residual_token
    slices = (total,)
    for _ in tl.static_range(HALVINGS):
        finer = ()
        for i in tl.static_range(len(slices)):
            finer = finer + _halves(slices[i])
        slices = finer
    for i in tl.static_range(len(slices)):
        first = block_n * total.shape[1] + i * (total.shape[1] // len(slices))
        _finish(slices[i], first, columns, here, placed, gate_at, residual_at, out_at, ACTIVATION)


@triton.jit
def _place(program, blocks_m, blocks_n, GROUP: tl.constexpr):
    """Row block and column block of a program: GROUP row blocks side by side, column after column."""
    size = GROUP * blocks_n
    first = program // size * GROUP
    group = tl.minimum(blocks_m - first, GROUP)
    return first + program % size % group, program % size // group


@triton.jit
def _product(
    x_at,
    weight_at,
    depth,
    WHOLE: tl.constexpr,
    WIDEN: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Sum over K of the rows at `x_at` times those at `weight_at`: int32 of int8, else float32."""
    k = tl.arange(0, BLOCK_K)
    a_at, b_at = x_at[:, None] + k[None, :], weight_at[None, :] + k[:, None]
    SUM: tl.constexpr = tl.float64 if WIDEN else tl.float32
    KIND: tl.constexpr = tl.int32 if x_at.dtype.element_ty == tl.int8 else SUM
    total = tl.zeros((BLOCK_M, BLOCK_N), KIND)
    for begin in range(0, depth, BLOCK_K):
        if WHOLE:
            a, b = tl.load(a_at), tl.load(b_at)
        else:
            rest = depth - begin
            a = tl.load(a_at, mask=k[None, :] < rest, other=0.0)
            b = tl.load(b_at, mask=k[:, None] < rest, other=0.0)
        if WIDEN:
            a, b = a.to(tl.float32).to(tl.float64), b.to(tl.float32).to(tl.float64)
        if x_at.dtype.element_ty == tl.float8e4nv and not WIDEN:  # sums of one block, added up in float32
            total = tl.dot(a, b, total, max_num_imprecise_acc=BLOCK_K, out_dtype=KIND)
        else:
            total = tl.dot(a, b, total, input_precision="ieee", out_dtype=KIND)
        a_at += BLOCK_K
        b_at += BLOCK_K
    return total


@triton.jit
def _halves(total):
    """Left and right half of a tile."""
    return tl.split(tl.permute(tl.reshape(total, (total.shape[0], 2, total.shape[1] // 2)), (0, 2, 1)))


@triton.jit
def _finish(total, first, columns, rows_here, vectors, gate_at, residual_at, out_at, ACTIVATION: tl.constexpr):
    """Scales, bias, activation, gate and residual of the columns from `first`, and the store."""
    x_scale_at, weight_scale, bias = vectors
    j = first + tl.arange(0, total.shape[1])
    there = j < columns
    here = rows_here[:, None] & there[None, :]
    y = total.to(tl.float32)
    if weight_scale is not None:
        y = y * tl.load(x_scale_at)[:, None] * tl.load(weight_scale + j, mask=there, other=0.0)[None, :]
    if bias is not None:
        y = y + tl.load(bias + j, mask=there, other=0.0).to(tl.float32)[None, :]
    y = _activated(y, ACTIVATION, out_at.dtype.element_ty == tl.float32)
    if gate_at is not None:
        y = y * tl.load(gate_at[:, None] + j[None, :], mask=here, other=0.0).to(tl.float32)
    if residual_at is not None:
        y = y + tl.load(residual_at[:, None] + j[None, :], mask=here, other=0.0).to(tl.float32)
    tl.store(out_at[:, None] + j[None, :], y.to(out_at.dtype.element_ty), mask=here)


@triton.jit
def _activated(y, ACTIVATION: tl.constexpr, EXACT: tl.constexpr):
    """EXACT: divisions are rounded correctly; else to two units in the last place of float32, for narrower results."""
    if ACTIVATION == _GELU:
        y = 0.5 * y * (1.0 + tl.erf(y * 0.7071067811865476))
    elif ACTIVATION == _GELU_TANH:  # (1 + tanh(t)) / 2 is the logistic function of 2 t
        y = _divided(y, 1.0 + tl.exp(-1.5957691216057308 * (y + 0.044715 * y * y * y)), EXACT)
    elif ACTIVATION == _SILU:
        y = _divided(y, 1.0 + tl.exp(-y), EXACT)
    return y


@triton.jit
def _divided(y, z, EXACT: tl.constexpr):
    return tl.div_rn(y, z) if EXACT else y / z
