"""What a traced forward calls instead of torch's own functions, and what is put right in a traced program."""

from __future__ import annotations

import logging
import operator
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
    """Inside, words that exporters know only taken apart are said in others; gradients are not switched, which traces
    note. norms: `scaled_dot_product_attention` is two products and a softmax, this in float32, and RMS norms are
    products too; else they stay, for opsets that have them."""

    def __init__(self, norms: bool = True) -> None:
        super().__init__()
        self._spoken = {**ALWAYS, **(NORMS if norms else {})}

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return self._spoken.get(func, func)(*args, **(kwargs or {}))


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


def rms_norm(x: Tensor, shape: Any, weight: Tensor | None = None, eps: float | None = None) -> Tensor:
    """weight x / sqrt(mean x^2 + eps) over the last axes, in float32."""
    wide = x.float()
    axes = tuple(range(-len(shape), 0))
    least = torch.finfo(x.dtype).eps if eps is None else eps
    made = (wide * torch.rsqrt(wide.pow(2).mean(axes, keepdim=True) + least)).to(x.dtype)
    return made if weight is None else made * weight


ALWAYS: dict[Any, Any] = {
    torch._C._set_grad_enabled: lambda *_: None,
    torch.outer: lambda column, row: column[:, None] * row,
    torch.rsub: lambda x, other: -x + other,
    Tensor.__rsub__: lambda x, other: -x + other,
}
NORMS: dict[Any, Any] = {
    scaled_dot_product_attention: attention,
    torch.rms_norm: rms_norm,
    torch.nn.functional.rms_norm: rms_norm,
}


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
                elif node.op == "call_function":
                    _plainly(node)
            module.recompile()


def _given(node: torch.fx.Node) -> bool:
    """It is a result of the program, whose signature names it."""
    return any(user.op == "output" for user in node.users)


def _plainly(node: torch.fx.Node) -> None:
    """Say a cast in the word that exporters know."""
    if node.target is torch.ops.aten.to.dtype:
        node.target = torch.ops.aten._to_copy.default
        node.args, node.kwargs = node.args[:1], {"dtype": node.args[1]}


def _idle(node: torch.fx.Node) -> bool:
    ops = torch.ops.aten
    if node.target is ops._assert_tensor_metadata.default:
        node.args = ()
        return True
    if node.target is ops.dropout.default:
        return not node.args[2]
    if node.target is ops.contiguous.default:
        return True
    if node.target in (ops.to.dtype, ops.to.dtype_layout):
        return not _given(node) and bool(node.args[0].meta["val"].dtype == node.meta["val"].dtype)  # type: ignore[union-attr]
    if node.target is ops.squeeze.dim:
        return bool(node.args[0].meta["val"].shape[node.args[1]] != 1)  # type: ignore[union-attr]
    return False


def constants_of(program: ExportedProgram) -> dict[str, Any]:
    """What values of a program are that depend on no input and no parameter, by name, as torch computes them."""
    env: dict[torch.fx.Node, Any] = {}
    lifted = program.graph_signature.inputs_to_lifted_tensor_constants
    for node in program.graph.nodes:
        if node.op == "placeholder" and node.name in lifted:
            env[node] = program.constants[lifted[node.name]]
        elif node.op == "call_function" and _certain(node) and all(each in env for each in node.all_input_nodes):
            args, kwargs = torch.fx.node.map_arg((node.args, node.kwargs), env.__getitem__)
            env[node] = node.target(*args, **kwargs)
    return {node.name: array_of(value) for node, value in env.items() if isinstance(value, Tensor)}


def _certain(node: torch.fx.Node) -> bool:
    """An operator of torch without chance, or an item of what one gives."""
    if isinstance(node.target, torch._ops.OpOverload):
        return torch.Tag.nondeterministic_seeded not in node.target.tags and not node.target._schema.is_mutable
    return node.target is operator.getitem


def layers_of(program: ExportedProgram) -> dict[str, tuple[str, str]]:
    """Name of the value a linear layer gives -> names of its weight and bias in the traced module, "": none."""
    names = program.graph_signature.inputs_to_parameters
    found: dict[str, tuple[str, str]] = {}
    for node in program.graph_module.graph.nodes:
        if node.target is torch.ops.aten.linear.default:
            bias = node.args[2] if len(node.args) > 2 else None
            weight = names.get(node.args[1].name, "")
            found[node.name] = (weight, "" if bias is None else names.get(bias.name, ""))
        elif node.target is torch.ops.aten._to_copy.default and node.args[0].name in found:  # of the same dtype it goes
            found[node.name] = found[node.args[0].name]
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
            made = _translated(traced, tensors, opset)
    except UnsupportedError:
        raise
    except Exception as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise UnsupportedError(f"export: {name} cannot be traced: {reason}") from error
    assert made is not None, "the exporter returns a program"
    return made.exported_program, made.model_proto


def _translated(program: ExportedProgram, tensors: list[Any], opset: int) -> Any:
    """The program in ONNX as it is; where it has words that the exporter does not know, or changes tensors in place,
    taken apart first, which costs several times as long."""
    settings: dict[str, Any] = {"dynamo": True, "opset_version": opset, "verbose": False}
    schemas = [getattr(node.target, "_schema", None) for node in program.graph.nodes]
    if not any(schema is not None and schema.is_mutable for schema in schemas):
        own = program.run_decompositions
        program.run_decompositions = lambda *_, **__: program
        try:
            return torch.onnx.export(program, (tensors,), **settings)
        except Exception:
            program.run_decompositions = own
    return torch.onnx.export(program, (tensors,), **settings)


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
