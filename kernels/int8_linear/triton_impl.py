"""`int8_linear` on a GPU: tiles by the copy engine where it can read x and the weight, else the kernel of `linear`.

A program takes one tile of the result after another. Its loads are requests of whole blocks (tensor descriptors: the
bulk copies of Hopper, plain loads on older devices), and those of the next tile are under way while this one ends.
`fp8_linear` runs the same kernel.
"""
# Kernels are traced by triton, not typed.
# mypy: disable-error-code="no-untyped-def, untyped-decorator, assignment, attr-defined"

from __future__ import annotations

from functools import cache
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from vivace.kernels.linear import triton_impl as product
from vivace.kernels.linear.tiles import GROUP, PROGRAMS, Tile
from vivace.kernels.linear.triton_impl import _epilogue, _place, by_token, tile_for, why_not
from vivace.kernels.norm_modulate.triton_impl import rows, vector
from vivace.kernels.philox_normal.triton_impl import on_device
from vivace.kernels.quantize_tokens.triton_impl import quantize_tokens
from vivace.kernels.spec import interpreted

__all__ = ["int8_linear", "why_not"]

SLICE = 16  # columns the epilogue works on at a time: leaves the registers of a second program of 128 x 128
ALIGNED = 16  # bytes that addresses and distances of rows are multiples of, for descriptors


def int8_linear(
    x: Tensor,
    weight: Tensor,
    x_scale: Tensor | None,
    weight_scale: Tensor,
    bias: Tensor | None = None,
    *,
    smooth: Tensor | None = None,
    activation: str = "none",
    gate: Tensor | None = None,
    residual: Tensor | None = None,
    out: Tensor | None = None,
    out_dtype: torch.dtype | None = None,
) -> Tensor:
    """residual + gate * act(x_scale weight_scale (x W^T) + bias), each that is None left out."""
    if out is None:
        out = x.new_empty((*x.shape[:-1], len(weight)), dtype=out_dtype or torch.bfloat16)
    if x_scale is None:
        x, x_scale = quantize_tokens(x, smooth=smooth)
    return launch(tile_for(x, weight), x, weight, x_scale, weight_scale, bias, activation, gate, residual, out)


def launch(
    tile: Tile,
    x: Tensor,
    weight: Tensor,
    x_scale: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None,
    activation: str,
    gate: Tensor | None,
    residual: Tensor | None,
    out: Tensor,
) -> Tensor:
    """Run the product of 8-bit numbers with this tile into `out`."""
    (columns, depth), source, target = weight.shape, by_token(x), by_token(out)
    height, tokens = source.shape[0] * source.shape[1], source.shape[1]
    left, right = described(source, tile.rows, tile.depth), described(weight, tile.columns, tile.depth)
    if left is None or right is None:
        return product.launch(tile, x, weight, x_scale, weight_scale, bias, activation, gate, residual, out)
    blocks = triton.cdiv(height, tile.rows) * triton.cdiv(columns, tile.columns)
    with on_device(x.device):
        _by_descriptors[min(blocks, tile.programs * multiprocessors(x.device)) or blocks,](
            *rows(target),
            left,
            right,
            x_scale.contiguous(),
            weight_scale,
            bias,
            *vector(gate if gate is None or gate.dim() < 4 else by_token(gate.expand(out.shape))),
            *((None, 0, 0) if residual is None else rows(by_token(residual))),
            tokens,
            height,
            columns,
            depth,
            ACTIVATION=activation,
            BLOCK_M=tile.rows,
            BLOCK_N=tile.columns,
            BLOCK_K=tile.depth,
            GROUP=GROUP,
            HALVINGS=product.halvings(tile, SLICE),
            WIDEN=interpreted() and x.is_floating_point(),
            num_warps=tile.warps,
            num_stages=tile.stages,
        )
    if target.data_ptr() != out.data_ptr():
        out.copy_(target.view(out.shape))
    return out


def described(matrix: Tensor, height: int, width: int) -> Any:
    """A descriptor of the rows of [.., K] in blocks of this size; None where the copy engine cannot read them."""
    *lead, depth = matrix.shape
    if len(lead) == 2 and lead[0] > 1 and lead[1] > 1 and matrix.stride(0) != lead[1] * matrix.stride(1):
        return None
    count, row = 1, -(-depth // ALIGNED) * ALIGNED  # of a single row: any distance does
    for size, stride in zip(reversed(lead), reversed(matrix.stride()[:-1]), strict=True):
        if size > 1 and count == 1:
            row = stride
        count *= size
    item = matrix.element_size()
    if matrix.data_ptr() % ALIGNED or row * item % ALIGNED or (count > 1 and row < depth):
        return None
    return TensorDescriptor(matrix, [count, depth], [row, 1], [height, width])


@cache
def multiprocessors(device: torch.device) -> int:
    """Of the device; as many as the tables assume in the interpreter."""
    return PROGRAMS if device.type != "cuda" else torch.cuda.get_device_properties(device).multi_processor_count


@triton.jit
def _by_descriptors(
    out,
    out_sample,  # strides of samples and of tokens, here and below
    out_token,
    x,  # descriptors of [height, depth] and [columns, depth]: what lies outside of them reads as 0
    weight,
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
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP: tl.constexpr,
    HALVINGS: tl.constexpr,  # of the tile, into what the epilogue works on at a time
    WIDEN: tl.constexpr,  # to float64, for the interpreter: its sums vary by row
):
    blocks_m, blocks_n = tl.cdiv(height, BLOCK_M), tl.cdiv(columns, BLOCK_N)
    INTEGERS: tl.constexpr = x.dtype == tl.int8
    SUM: tl.constexpr = tl.int32 if INTEGERS else tl.float64 if WIDEN else tl.float32
    for block in tl.range(tl.program_id(0), blocks_m * blocks_n, tl.num_programs(0), flatten=True):
        block_m, block_n = _place(block, blocks_m, blocks_n, GROUP)
        total = tl.zeros((BLOCK_M, BLOCK_N), SUM)
        for begin in range(0, depth, BLOCK_K):
            a, b = x.load([block_m * BLOCK_M, begin]), weight.load([block_n * BLOCK_N, begin])
            if INTEGERS:
                total = tl.dot(a, b.T, total, out_dtype=SUM)
            elif WIDEN:
                total = tl.dot(a.to(tl.float32).to(SUM), b.T.to(tl.float32).to(SUM), total, out_dtype=SUM)
            else:  # the sums of a block, whose bits the matrix unit limits, are added up in float32
                total = tl.dot(a, b.T, total, max_num_imprecise_acc=BLOCK_K, out_dtype=SUM)
        vectors = x_scale, weight_scale, bias
        strides = out_sample, out_token, gate_sample, gate_token, residual_sample, residual_token
        ends = block_m, block_n, tokens, height, columns
        _epilogue(total, out, vectors, gate, residual, strides, ends, ACTIVATION, HALVINGS)
