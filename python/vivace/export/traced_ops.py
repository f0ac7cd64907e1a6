"""What a traced forward calls instead of torch's own functions, and what is put right in a traced program."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import ml_dtypes
import torch
from torch import Tensor
from torch.export import ExportedProgram
from torch.nn.functional import scaled_dot_product_attention
from torch.overrides import TorchFunctionMode

from vivace.errors import UnsupportedError
from vivace.runtime.manifest import Port


class Decomposed(TorchFunctionMode):
    """Inside, `scaled_dot_product_attention` is two products and a softmax, this in float32."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is scaled_dot_product_attention:
            return attention(*args, **(kwargs or {}))
        return func(*args, **(kwargs or {}))


def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """softmax(scale q k^T + mask) v, as torch's own says; dropout is left out."""
    if enable_gqa and key.shape[-3] != query.shape[-3]:
        repeats = query.shape[-3] // key.shape[-3]
        key, value = key.repeat_interleave(repeats, -3), value.repeat_interleave(repeats, -3)
    factor = query.shape[-1] ** -0.5 if scale is None else scale
    scores = (query * factor) @ key.transpose(-2, -1)
    if is_causal:
        attn_mask = torch.ones(query.shape[-2], key.shape[-2], dtype=torch.bool, device=query.device).tril()
    if attn_mask is not None and attn_mask.dtype is torch.bool:
        lowest = torch.finfo(scores.dtype).min
        scores = torch.where(attn_mask, scores, torch.full((), lowest, dtype=scores.dtype, device=scores.device))
    elif attn_mask is not None:
        scores = scores + attn_mask
    return torch.softmax(scores.float(), dim=-1).to(value.dtype) @ value


def put_right(program: ExportedProgram) -> None:
    """Take out of a program what does nothing: checks, casts to the dtype that is there, dropout, squeezes of long axes
    (which torch lets be, and ONNX has no word for)."""
    for module in program.graph_module.modules():
        if isinstance(module, torch.fx.GraphModule):
            for node in list(module.graph.nodes):
                if node.op == "call_function" and _idle(node):
                    if node.args:
                        node.replace_all_uses_with(node.args[0])
                    module.graph.erase_node(node)
            module.recompile()


def _idle(node: torch.fx.Node) -> bool:
    ops = torch.ops.aten
    if node.target is ops._assert_tensor_metadata.default:
        node.args = ()
        return True
    if node.target is ops.dropout.default:
        return not node.args[2]
    if node.target in (ops.to.dtype, ops.to.dtype_layout):
        return bool(node.args[0].meta["val"].dtype == node.meta["val"].dtype)  # type: ignore[union-attr]
    if node.target is ops.squeeze.dim:
        return bool(node.args[0].meta["val"].shape[node.args[1]] != 1)  # type: ignore[union-attr, index]
    return False


def layers_of(program: ExportedProgram) -> dict[str, tuple[str, str]]:
    """Name of the value a linear layer gives -> names of its weight and bias in the module that was traced, "": none."""
    names = program.graph_signature.inputs_to_parameters
    found = {}
    for node in program.graph_module.graph.nodes:
        if node.target is torch.ops.aten.linear.default:
            bias = node.args[2] if len(node.args) > 2 else None
            weight = names.get(node.args[1].name, "")
            found[node.name] = (weight, "" if bias is None else names.get(bias.name, ""))
    return found


def array_of(tensor: Tensor) -> Any:
    """A tensor as a numpy array, bfloat16 too."""
    own = tensor.detach().cpu().contiguous()
    if own.dtype is torch.bfloat16:
        return own.view(torch.int16).numpy().view(ml_dtypes.bfloat16)
    return own.numpy()


def exported(module: Any, tensors: list[Any], dynamic: list[Any], opset: int, name: str) -> tuple[Any, Any]:
    """(program, ONNX model) of module(tensors). Raises UnsupportedError with the reason where tracing fails."""
    try:
        with torch.no_grad(), _quiet():
            traced = torch.export.export(module, (tensors,), dynamic_shapes=(dynamic,), strict=False)
            put_right(traced)
            made = torch.onnx.export(traced, (tensors,), dynamo=True, opset_version=opset, verbose=False)
    except UnsupportedError:
        raise
    except Exception as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise UnsupportedError(f"export: {name} cannot be traced: {reason}") from error
    assert made is not None, "the exporter returns a program"
    return made.exported_program, made.model_proto


@contextmanager
def _quiet() -> Iterator[None]:
    """What exporters tell of packages that are not installed, and of their own old names, is told to nobody."""
    logger = logging.getLogger("torch.onnx._internal.exporter._registration")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)


def found_free(port: Port, value: Any) -> Port:
    """A port whose free dimensions are those that the trace left free; rows and tokens are free or tracing failed."""
    sizes = [dim.dim_value or None for dim in value.type.tensor_type.shape.dim]
    shape = tuple(name if size is None else size for name, size in zip(port.shape, sizes, strict=True))
    if any(isinstance(size, int) for name, size in zip(port.shape, shape, strict=True) if name in ("rows", "active")):
        raise UnsupportedError(f"export: input {port.name!r} of a trace has shape {shape}, needs {port.shape}")
    return replace(port, shape=shape)
