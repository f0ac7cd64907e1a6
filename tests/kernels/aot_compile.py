"""Compiles the Triton kernels for Hopper without a GPU and prints what the assembler used, as JSON. Run by test_triton.

{"solver_step guided": {"registers": 47, "stack": 0, "local": 0, ...}, ...}
"""

from __future__ import annotations

import json
from typing import Any

import aot_tokens
from aot_tools import compiled, usage

from vivace.kernels.adaln_modulate import triton_impl as adaln
from vivace.kernels.cache_apply import triton_impl as applied
from vivace.kernels.cache_update import triton_impl as updated
from vivace.kernels.fp8_quantize_tokens import triton_impl as floats
from vivace.kernels.gated_residual import triton_impl as residual
from vivace.kernels.gelu import triton_impl as unit
from vivace.kernels.int8_attention import tiles as cut
from vivace.kernels.int8_attention import triton_impl as integers
from vivace.kernels.int8_linear import triton_impl as described
from vivace.kernels.int8_norm_modulate import triton_impl as normed
from vivace.kernels.linear import tiles
from vivace.kernels.linear import triton_impl as product
from vivace.kernels.norm_modulate import triton_impl as norm
from vivace.kernels.philox_normal import triton_impl as philox
from vivace.kernels.qk_norm_rope import triton_impl as heads
from vivace.kernels.quantize_tokens import triton_impl as tokens
from vivace.kernels.sample_adjust import triton_impl as adjust
from vivace.kernels.solver_step import table as t
from vivace.kernels.solver_step import triton_impl as step

ANY = t.FROM_POOL | t.FROM_OUT | t.FROM_TENSOR | t.SCALED_BY_POOL | t.SCALED_BY_TENSOR
# name -> (kinds, outputs, number of outs, dtype of outs and of the network input, whether outputs are adjusted)
STEPS = {
    "solver_step guided": ((t.FROM_POOL,) * 4 + (t.FROM_OUT,) * 2, 2, 2, "bf16", False),
    "solver_step adjusted": ((t.FROM_POOL,) * 4 + (t.FROM_OUT,) * 2, 2, 2, "bf16", True),
    "solver_step stochastic": ((t.FROM_POOL, t.FROM_POOL, t.FROM_OUT, t.FROM_OUT, t.FROM_NOISE), 3, 2, "bf16", False),
    "solver_step scaled": ((t.FROM_POOL | t.SCALED_BY_TENSOR,) * 5 + (t.FROM_OUT, t.FROM_TENSOR), 2, 1, "fp16", False),
    "solver_step 12 x 4": ((t.FROM_POOL,) * 10 + (t.FROM_OUT,) * 2, 4, 2, "fp32", False),
    "solver_step mixed plans": ((ANY,) * 11 + (ANY | t.FROM_NOISE,), 4, 3, "bf16", True),
}
BY_CLASS = {
    "solver_step by class": ((t.FROM_POOL,) * 4 + (t.FROM_OUT,) * 2, 2, 2, "bf16", False, 2),
    "solver_step by class, video": ((t.FROM_POOL,) * 4 + (t.FROM_OUT,) * 2 + (t.FROM_NOISE,), 3, 2, "bf16", True, 3),
}  # the same, and the axes of a token grid
ADJUSTS = {
    "sample_adjust guided": ((t.FROM_POOL,) * 2 + (t.FROM_OUT,) * 2, 2, "bf16"),
    "sample_adjust mixed plans": ((ANY,) * 11 + (ANY | t.FROM_NOISE,), 3, "bf16"),
}

# name -> (kernel, its dtype, that of the vectors, width, whether each vector is there)
ROWS = {
    "norm_modulate DiT": (norm._norm_modulate, "bf16", "bf16", 1152, "scale shift"),
    "norm_modulate float32": (norm._norm_modulate, "fp32", "fp32", 4096, "scale shift weight bias"),
    "gated_residual DiT": (residual._gated_residual, "bf16", "bf16", 1152, "gate"),
    "gated_residual float32 gate": (residual._gated_residual, "bf16", "fp32", 3072, "gate"),
    "adaln_modulate DiT": (adaln._adaln_modulate, "bf16", "bf16", 1152, "gate scale shift"),
    "adaln_modulate FLUX": (adaln._adaln_modulate, "bf16", "bf16", 3072, "gate scale shift"),
    "adaln_modulate float32": (adaln._adaln_modulate, "fp32", "fp32", 4096, "gate scale shift weight bias"),
    "int8_norm_modulate DiT": (normed._int8_norm_modulate, "fp32", "fp32", 1152, "scale shift"),
    "int8_norm_modulate given": (normed._int8_norm_modulate, "bf16", "bf16", 3072, "scale shift weight smooth given"),
}
VECTORS = ("gate", "scale", "shift", "weight", "bias")
INTEGERS = {"q": "i8", "step": "fp32", "smooth": "fp32", "given": "fp32"}
# name -> (store, dtype of the rows, what is given besides, differences made or planes read)
UPDATES = {
    "cache_update DiT": ("*bf16", "bf16", "hidden gate out", 0),
    "cache_update float32": ("*fp32", "fp32", "hidden gate out", 2),
    "cache_update a range": ("*fp32", "bf16", "base", 2),
    "cache_update float16": ("*fp16", "fp16", "base hidden out", 1),
    "cache_update float8": ("*u8", "bf16", "hidden gate out", 2),
    "cache_update int8": ("*i8", "bf16", "scales hidden gate out", 2),
    "cache_update some tokens": ("*bf16", "bf16", "ids", 0),
}
APPLIES = {
    "cache_apply DiT": ("*bf16", "bf16", "hidden gate", 1),
    "cache_apply float32": ("*fp32", "fp32", "hidden gate", 3),
    "cache_apply alone": ("*fp16", "fp16", "", 2),
    "cache_apply float8": ("*u8", "bf16", "hidden gate", 3),
    "cache_apply int8": ("*i8", "bf16", "scales hidden gate", 3),
    "cache_apply some tokens": ("*bf16", "bf16", "ids hidden gate", 1),
}
# name -> (dtype, gated, approximation by tanh)
GELUS = {
    "gelu erf": ("float32", False, False),
    "gelu tanh": ("bfloat16", False, True),
    "gelu gated": ("bfloat16", True, False),
}
# name -> (dtype, heads, channels, kind, across heads, which pairs turn)
HEADS = {
    "qk_norm_rope FLUX": ("bf16", 24, 128, "rms", False, heads.INTERLEAVED),
    "qk_norm_rope halves": ("bf16", 24, 128, "layer", False, heads.HALF),
    "qk_norm_rope Wan": ("bf16", 40, 128, "rms", True, heads.INTERLEAVED),
    "qk_norm_rope LTX": ("bf16", 1, 2048, "rms", False, heads.INTERLEAVED),
    "qk_norm_rope float32": ("fp32", 24, 64, "layer", False, heads.NONE),
}
# name -> (tile, dtype of x, activation, operands of the epilogue); every tile with the longest epilogue
FULL = "bias gate residual"
EIGHT_BITS = {"int8": "int8_linear", "float8_e4m3fn": "fp8_linear"}
LINEARS = {
    f"linear {dtype} {tile.rows} x {tile.columns}": (tile, dtype, "gelu_tanh", FULL)
    for dtype in ("bfloat16", "float32") for tile in tiles.tiles(dtype)
} | {
    f"{EIGHT_BITS[dtype]} by pointers {tile.rows} x {tile.columns}": (tile, dtype, "gelu_tanh", FULL)
    for dtype in EIGHT_BITS for tile in tiles.tiles(dtype)[-4:]
} | {
    "linear gelu": (tiles.tiles("bfloat16")[1], "bfloat16", "gelu", FULL),
    "linear float16": (tiles.tiles("float16")[0], "float16", "silu", ""),
}  # fmt: skip
DESCRIBED = {
    f"{name} {dtype} {tile.rows} x {tile.columns} x {tile.depth}, {tile.stages} stages": (tile, dtype)
    for dtype, name in EIGHT_BITS.items() for tile in tiles.tiles(dtype)
}  # fmt: skip
POINTERS = {"bfloat16": "*bf16", "float16": "*fp16", "float32": "*fp32", "int8": "*i8", "float8_e4m3fn": "*fp8e4nv"}
STRIDES = ("_sample", "_token", "_head")
ONE_ROW = ("tokens", "height", "gate_sample")
HEADS_OF_INTEGERS = {
    f"int8_attention {width}, {blocks.queries} x {blocks.keys}, {blocks.stages} stages": (width, blocks, "bfloat16")
    for width in (64, 72, 128) for blocks in cut.blocks(cut.Head.of(width))
} | {
    "int8_attention 112": (112, cut.blocks(cut.Head.of(112))[0], "bfloat16"),
    "int8_attention 40": (40, cut.blocks(cut.Head.of(40))[0], "bfloat16"),
    "int8_attention float16": (72, cut.blocks(cut.Head.of(72))[0], "float16"),
    "int8_attention of ones": (72, cut.blocks(cut.Head.of(72))[0], "bfloat16", ("queries", "count", "heads")),
}  # fmt: skip
ONES = ("tokens", "height", "columns", "depth", "x_token", "out_token", "gate_sample")  # triton makes constants of them


def solver_step(kinds: tuple[int, ...], outputs: int, branches: int, dtype: str, adjusted: bool, axes: int = 0) -> Any:
    last: dict[str, Any] = {"net": f"*{dtype}", "adjust": "*fp32" if adjusted else "constexpr"}
    sizes = {"OUTPUTS": outputs, "BLOCK": step.BLOCK}
    if not axes:
        return rows_kernel(step._solver_step, kinds, branches, dtype, last, sizes, step.WARPS)
    last |= {"classes": "*u8", "sizes": ("i32",) * axes, "edges": ("i32",) * axes}
    return rows_kernel(step._solver_step_by_class, kinds, branches, dtype, last, sizes, step.WARPS)


def sample_adjust(kinds: tuple[int, ...], branches: int, dtype: str) -> Any:
    last, sizes = {"adjust": "*fp32"}, {"BLOCK": adjust.BLOCK}
    return rows_kernel(adjust._sample_adjust, kinds, branches, dtype, last, sizes, adjust.WARPS)


def rows_kernel(kernel: Any, kinds: Any, branches: int, dtype: str, last: Any, sizes: Any, warps: int) -> Any:
    """A kernel over rows of a table, arguments aligned as allocations are; `last`: those that not all of them have."""
    noise = any(kind & t.FROM_NOISE for kind in kinds)
    side_car = any(kind & (t.FROM_TENSOR | t.SCALED_BY_TENSOR) for kind in kinds)
    signature = {
        "pool": "*fp32", "outs": (f"*{dtype}",) * branches, "out_strides": ("i32",) * branches,
        "tensors": "*i64" if side_car else "constexpr", "ints": "*i32", "floats": "*fp32",
        "rows": "*i64", "index": "*i64",
        "seeds": "*i64" if noise else "constexpr", "pictures": "*i64" if noise else "constexpr",
        "size": "i32", "slot_stride": "i32", **last,
    }  # fmt: skip
    constants: dict[str, Any] = sizes | {
        "KINDS": kinds,
        "SCALES": tuple(kind // t.SCALED_BY_POOL for kind in kinds),
        "ALIGNED": True,
    }
    constants |= {name: None for name, kind in signature.items() if kind == "constexpr"}
    return compiled(kernel, signature, constants, warps)


def over_rows(kernel: Any, dtype: str, vectors: str, width: int, given: str) -> Any:
    """A kernel over rows of hidden states of this width."""
    block = norm.row_block(width)
    constants: dict[str, Any] = {"BLOCK": min(block, residual.BLOCK) if kernel is residual._gated_residual else block}
    absent = {*VECTORS, "smooth", "given"} - {*given.split()}
    constants |= {name: None for name in kernel.arg_names if name in absent}
    constants |= {"CENTRED": True} if "CENTRED" in kernel.arg_names else {}
    signature = dict.fromkeys(kernel.arg_names, "i32") | dict.fromkeys(constants, "constexpr")
    pointers = {"out": dtype, "hidden": dtype, "update": dtype, "hidden_out": dtype} | INTEGERS
    pointers |= dict.fromkeys(VECTORS, vectors)
    signature |= {name: f"*{pointers[name]}" for name, kind in signature.items() if name in pointers and kind == "i32"}
    signature |= {"eps": "fp32"} if "eps" in signature else {}
    return compiled(kernel, signature, constants, norm.warps(constants["BLOCK"]))


def kept_planes(kernel: Any, store: str, dtype: str, given: str, count: int) -> Any:
    """A kernel over kept planes of 1152 channels; what it may do without is a constant where it is not given."""
    block = norm.row_block(1152) if store == "*i8" else updated.BLOCK
    optional = {"scales", "base", "hidden", "gate", "ids"} | ({"out"} if kernel is updated._cache_update else set())
    constants: dict[str, Any] = dict.fromkeys((optional - {*given.split()}) & {*kernel.arg_names})
    constants |= {"BLOCK": block, "MADE" if kernel is updated._cache_update else "TERMS": count}
    pointers = dict.fromkeys(("fresh", "base", "hidden", "gate", "out"), f"*{dtype}")
    pointers |= {"kept": store, "scales": "*fp32", "lanes": "*i64", "weights": "*fp32", "ids": "*i32"}
    signature = dict.fromkeys(kernel.arg_names, "i32") | {k: v for k, v in pointers.items() if k in kernel.arg_names}
    return compiled(kernel, signature, constants, norm.warps(block), ("planes",))


def gelu(dtype: str, gated: bool, by_tanh: bool) -> Any:
    terms = unit.TERMS[dtype]
    constants = {"LIMIT": terms.limit, "P": terms.p, "Q": terms.q, "EXP2": terms.exp2, "DEGREE": len(terms.p) - 1}
    constants |= {"GATED": gated, "BY_TANH": by_tanh, "BLOCK": unit.BLOCK}
    pointer = "*fp32" if dtype == "float32" else "*bf16"
    signature = dict.fromkeys(unit._gelu.arg_names, "i32") | {"out": pointer, "hidden": pointer}
    return compiled(unit._gelu, signature, constants, unit.WARPS)


def qk_norm_rope(dtype: str, count: int, width: int, kind: str, across: bool, turn: int) -> Any:
    sizes = heads.block_sizes(count, width, across, turn)
    constants: dict[str, Any] = sizes | {"KIND": kind, "ACROSS": across, "TURN": turn}
    constants |= {} if kind == "layer" else {"bias": None}
    constants |= {} if turn else {"cos": None, "sin": None}
    pointers = dict.fromkeys(("out", "x", "weight", "bias"), f"*{dtype}") | dict.fromkeys(("cos", "sin"), "*fp32")
    signature = dict.fromkeys(heads._qk_norm_rope.arg_names, "i32") | pointers | {"eps": "fp32"}
    return compiled(heads._qk_norm_rope, signature, constants, heads.warps(sizes))


def linear(tile: tiles.Tile, dtype: str, activation: str, given: str, ones: tuple[str, ...] = ()) -> Any:
    """The kernel of all linears: 8-bit numbers into bfloat16, others into the dtype of x; ones: arguments of 1."""
    constants: dict[str, Any] = {
        "ACTIVATION": activation, "WHOLE": not ones, "WIDEN": False, "BLOCK_M": tile.rows, "BLOCK_N": tile.columns,
        "BLOCK_K": tile.depth, "GROUP": tiles.GROUP, "HALVINGS": product.halvings(tile),
    }  # fmt: skip
    constants |= {name: None for name in FULL.split() if name not in given.split()} | dict.fromkeys(ones, 1)
    constants |= {} if dtype in EIGHT_BITS else {"x_scale": None, "weight_scale": None}
    pointers = dict.fromkeys(("x", "weight"), POINTERS[dtype])
    return compiled_linear(product._linear, tile, dtype, constants, pointers)


def by_descriptors(tile: tiles.Tile, dtype: str, ones: tuple[str, ...] = ()) -> Any:
    """The kernel of 8-bit numbers that the copy engine loads, with the longest epilogue; ones: arguments that are 1."""
    constants: dict[str, Any] = dict.fromkeys(ones, 1) | {
        "ACTIVATION": "gelu_tanh", "WIDEN": False, "BLOCK_M": tile.rows, "BLOCK_N": tile.columns,
        "BLOCK_K": tile.depth, "GROUP": tiles.GROUP, "HALVINGS": product.halvings(tile, described.SLICE),
    }  # fmt: skip
    number = POINTERS[dtype][1:]
    blocks = {"x": f"{number}[{tile.rows},{tile.depth}]", "weight": f"{number}[{tile.columns},{tile.depth}]"}
    pointers = {name: f"tensordesc<{block}>" for name, block in blocks.items()}
    return compiled_linear(described._by_descriptors, tile, dtype, constants, pointers)


def compiled_linear(kernel: Any, tile: tiles.Tile, dtype: str, constants: Any, pointers: Any) -> Any:
    result = "*bf16" if dtype in EIGHT_BITS else POINTERS[dtype]
    signature = dict.fromkeys(kernel.arg_names, "i32") | pointers | dict.fromkeys(("out", "residual"), result)
    signature |= dict.fromkeys(("x_scale", "weight_scale", "bias", "gate"), "*fp32")
    options = {"num_stages": tile.stages, "enable_fp_fusion": True}
    return compiled(kernel, signature, constants, tile.warps, ("tokens", "height"), **options)


def quantized(kernel: Any, q: str, fixed: bool = False) -> Any:
    """Rows of 8-bit numbers, smoothed, each with a scale of its own, or with the one given."""
    block = norm.row_block(1152)
    signature = dict.fromkeys(kernel.arg_names, "i32") | {"q": q, "scale": "*fp32", "x": "*bf16", "smooth": "*fp32"}
    signature |= {"given": "*fp32"}
    return compiled(kernel, signature, {"BLOCK": block} | ({} if fixed else {"given": None}), norm.warps(block))


def int8_attention(width: int, blocks: cut.Blocks, dtype: str, ones: tuple[str, ...] = ()) -> Any:
    """Heads as parts of a projection; strides are told in units, the counts of queries and keys divide by nothing."""
    head = cut.Head.of(width)
    constants: dict[str, Any] = head_constants(width) | {
        "FIRST": head.first, "REST": head.rest, "REST_VALUES": head.rest_values, "WIDEN": False,
        "BLOCK_M": blocks.queries, "BLOCK_N": blocks.keys,
    }  # fmt: skip
    constants |= dict.fromkeys(ones, 1)
    kernel = integers._int8_attention
    signature = dict.fromkeys(kernel.arg_names, "i32") | dict.fromkeys(("out", "query", "value"), POINTERS[dtype])
    signature |= {"keys": "*i8", "key_scale": "*fp32", "factor": "fp32"}
    odd = ("queries", "count", "heads", "factor", *(name for name in kernel.arg_names if name.endswith(STRIDES)))
    options = {"num_stages": blocks.stages, "enable_fp_fusion": True}
    return compiled(kernel, signature, constants, blocks.warps, odd, **options)


def quantized_keys() -> dict[str, Any]:
    """The kernels that prepare keys of heads of 72."""
    head, found = cut.Head.of(72), {}
    constants: dict[str, Any] = head_constants(72) | {"WIDE": head.wide}
    for name, more in {"_sum_keys": {"PART": cut.PART}, "_quantize_keys": {"STORED": head.first + head.rest}}.items():
        kernel = getattr(integers, name)
        signature = dict.fromkeys(kernel.arg_names, "i32") | {"sums": "*fp32", "key": "*bf16"}
        signature |= {"integers": "*i8", "scales": "*fp32"} if name == "_quantize_keys" else {}
        odd = ("count", "heads", "parts", *(each for each in kernel.arg_names if each.endswith(STRIDES)))
        found[name.strip("_")] = compiled(kernel, signature, constants | more, integers.SUM_WARPS, odd)
    return found


def head_constants(width: int) -> dict[str, Any]:
    return {"WIDTH": width, "KEYS": integers.KEYS, "UNIT": integers.UNIT}


def philox_normal() -> Any:
    signature = {"out": "*fp32", "seeds": "*i64", "pictures": "*i64", "draw": "i32", "size": "i32"}
    return compiled(philox._philox_normal, signature, {"BLOCK": philox.BLOCK}, philox.WARPS)


if __name__ == "__main__":
    report = {name: usage(solver_step(*case)) for name, case in (STEPS | BY_CLASS).items()}
    report |= {name: usage(sample_adjust(*case)) for name, case in ADJUSTS.items()}
    report |= {name: usage(over_rows(*case)) for name, case in ROWS.items()}
    report |= {name: usage(kept_planes(updated._cache_update, *case)) for name, case in UPDATES.items()}
    report |= {name: usage(kept_planes(applied._cache_apply, *case)) for name, case in APPLIES.items()}
    report |= aot_tokens.report()
    report |= {name: usage(gelu(*case)) for name, case in GELUS.items()}
    report |= {name: usage(qk_norm_rope(*case)) for name, case in HEADS.items()}
    report |= {name: usage(linear(*case), rounds=False) for name, case in LINEARS.items()}
    report |= {name: usage(by_descriptors(*case), rounds=False) for name, case in DESCRIBED.items()}
    of_ones = linear(tiles.tiles("bfloat16")[-1], "bfloat16", "silu", FULL, ONES)
    report |= {"linear of ones": usage(of_ones, rounds=False)}
    of_ones = by_descriptors(tiles.tiles("int8")[-1], "int8", ONE_ROW)
    report |= {"int8_linear of ones": usage(of_ones, rounds=False)}
    report |= {"philox_normal": usage(philox_normal())}
    report |= {"quantize_tokens": usage(quantized(tokens._quantize_tokens, "*i8"))}
    report |= {"quantize_tokens given": usage(quantized(tokens._quantize_tokens, "*i8", fixed=True))}
    report |= {"fp8_quantize_tokens": usage(quantized(floats._fp8_quantize_tokens, "*fp8e4nv"))}
    report |= {name: usage(int8_attention(*case), rounds=False) for name, case in HEADS_OF_INTEGERS.items()}
    report |= {f"int8_attention {name}": usage(kernel) for name, kernel in quantized_keys().items()}
    print(json.dumps(report))
