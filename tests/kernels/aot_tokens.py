"""The kernels over some of the tokens, and attention, for aot_compile.py."""

from __future__ import annotations

from typing import Any

import torch
from aot_tools import compiled, usage

from vivace.kernels.attention import triton_impl as floating
from vivace.kernels.gather_tokens import triton_impl as gathered
from vivace.kernels.int8_attention.triton_impl import UNIT
from vivace.kernels.norm_modulate import triton_impl as norm
from vivace.kernels.scatter_tokens import triton_impl as scattered
from vivace.kernels.select_tokens import triton_impl as selected

SHORT = {"bfloat16": "bf16", "float16": "fp16", "float32": "fp32"}
STRIDES = ("_sample", "_token", "_head")
# name -> (kernel, dtype of the rows, of what is written, what is given besides)
TOKENS = {
    "gather_tokens DiT": (gathered._gather_tokens, "bf16", "bf16", "normed scale shift"),
    "gather_tokens float32": (gathered._gather_tokens, "fp32", "fp32", "normed scale shift weight bias"),
    "gather_tokens alone": (gathered._gather_tokens, "bf16", "bf16", ""),
    "scatter_tokens kept": (scattered._scatter_tokens, "bf16", "bf16", "lanes"),
    "scatter_tokens keys and values": (scattered._scatter_tokens, "fp32", "bf16", "second lanes"),
    "scatter_tokens gated": (scattered._scatter_tokens, "fp32", "fp32", "hidden gate"),
}
# name -> (dtype, width, lanes, arguments of 1)
FLOATING = {
    **{f"attention {width}": ("bfloat16", width, False, ()) for width in (64, 72, 96, 128, 256)},
    **{f"attention float32 {width}": ("float32", width, True, ()) for width in (64, 72, 96, 128)},
    "attention 72 kept": ("bfloat16", 72, True, ()),
    "attention float16": ("float16", 72, True, ()),
    "attention of ones": ("bfloat16", 72, False, ("queries", "count", "heads")),
}
# name -> (dtype, planes, metric, tokens along axes that have several, pixels of a token)
SCORES = {
    "select_tokens guided": ("bf16", 2, "deviation", 2, 4),
    "select_tokens norm": ("fp32", 4, "norm", 3, 4),
    "select_tokens scores": ("fp32", 1, "given", 1, 1),
}


def some_tokens(kernel: Any, dtype: str, into: str, given: str) -> Any:
    """A kernel over rows of 1152 channels of some tokens; what is not given is a constant."""
    gathers = kernel is gathered._gather_tokens
    block = norm.row_block(1152) if "normed" in given else scattered.BLOCK
    optional = {"normed", "scale", "shift", "weight", "bias"} if gathers else {"second", "hidden", "gate", "lanes"}
    constants: dict[str, Any] = dict.fromkeys(optional - {*given.split()}) | {"BLOCK": block}
    constants |= {"CENTRED": True} if gathers else {}
    pointers = dict.fromkeys(
        ("x", "fresh", "second", "hidden", "gate", "scale", "shift", "weight", "bias"), f"*{dtype}"
    )
    pointers |= {"out": f"*{into}", "normed": f"*{into}", "full": f"*{into}", "ids": "*i32", "lanes": "*i64"}
    signature = dict.fromkeys(kernel.arg_names, "i32") | {k: v for k, v in pointers.items() if k in kernel.arg_names}
    signature |= {"eps": "fp32"} if gathers else {}
    return compiled(kernel, signature, constants, norm.warps(block), ("pictures", "tokens"))


def attention(dtype: str, width: int, lanes: bool, ones: tuple[str, ...]) -> Any:
    """Heads as parts of a projection; strides are told in units, the counts of queries and keys divide by nothing."""
    blocks = floating.blocks_of(width, getattr(torch, dtype))
    constants: dict[str, Any] = {
        "WIDTH": width, "FIRST": blocks.first, "REST": blocks.rest, "UNIT": UNIT, "WIDEN": False,
        "BLOCK_M": blocks.queries, "BLOCK_N": blocks.keys,
    }  # fmt: skip
    constants |= dict.fromkeys(ones, 1) | ({} if lanes else {"lanes": None})
    kernel = floating._attention
    pointers = dict.fromkeys(("out", "query", "key", "value"), f"*{SHORT[dtype]}") | {"lanes": "*i64", "factor": "fp32"}
    signature = dict.fromkeys(kernel.arg_names, "i32") | pointers
    odd = ("queries", "count", "heads", "factor", *(name for name in kernel.arg_names if name.endswith(STRIDES)))
    options = {"num_stages": blocks.stages, "enable_fp_fusion": True}
    return compiled(kernel, signature, constants, blocks.warps, odd, **options)


def token_scores(dtype: str, planes: int, metric: str, axes: int, pixels: int) -> Any:
    signature = {
        "keys": "*i32", "planes": (f"*{dtype}",) * planes, "plane_strides": ("i32",) * planes,
        "weights": "constexpr" if metric == "given" else "*fp32", "channels": "i32", "pixels": "i32", "tokens": "i32",
        "grid": ("i32",) * axes, "apart": ("i32",) * axes, "within": ("i32",) * pixels,
    }  # fmt: skip
    constants = {"METRIC": metric, "BLOCK": selected.BLOCK} | ({"weights": None} if metric == "given" else {})
    odd = ("channels", "tokens", "grid", "apart", "within")
    return compiled(selected._scores, signature, constants, selected.WARPS, odd)


def token_orders() -> dict[str, Any]:
    """The kernels that rank and select, with factors and forced tokens."""
    sizes = {"MINE": selected.MINE, "OTHERS": selected.OTHERS}
    kernels: dict[str, tuple[Any, dict[str, Any]]] = {
        "ranks": (selected._effective, sizes),
        "forced": (selected._forced, sizes | {"BINS": 16, "LINE": selected.LINE}),
        "chosen": (selected._chosen, sizes),
        "ids": (selected._write, {"LINE": selected.LINE}),
    }
    numbers = ("oldest", "middle", "tokens", "bound", "least", "keep")
    found = {}
    for name, (kernel, constants) in kernels.items():
        signature = dict.fromkeys(kernel.arg_names, "*i32") | dict.fromkeys({*numbers} & {*kernel.arg_names}, "i32")
        signature |= {"factors": "*fp32"} if "factors" in signature else {}
        found[name] = compiled(kernel, signature, constants, selected.WARPS, numbers)
    return found


def report() -> dict[str, Any]:
    """Use of all of them by name."""
    found = {name: usage(some_tokens(*case)) for name, case in TOKENS.items()}
    found |= {name: usage(token_scores(*case)) for name, case in SCORES.items()}
    found |= {f"select_tokens {name}": usage(kernel) for name, kernel in token_orders().items()}
    return found | {name: usage(attention(*case), rounds=False) for name, case in FLOATING.items()}
