"""Names of a graph's nodes and values by the parts of the model they belong to, as viewers of graphs show them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import onnx

SHORT = 8  # numbers of a constant that is named after them


def named(
    nodes: Sequence[onnx.NodeProto],
    constants: Mapping[str, Any],
    owners: Mapping[str, str],
    layers: Mapping[str, tuple[str, str]],
    ports: Mapping[str, str],
) -> tuple[list[onnx.NodeProto], dict[str, Any]]:
    """Nodes and constants with names of the model, in the same order, without documentation.

    A node that reads a parameter is named after its layer, another one after what the layers before and behind it have
    in common, and its operator: "blocks.3.attn.Softmax". Values have the names of the nodes that give them.

    Args:
        owners: of constants that are a parameter, its name; layers: of values that a linear layer gives its weight and
            bias; ports: names that values must have.
    """
    parts = [_part(node, owners, layers) for node in nodes]
    scopes = _scopes(parts)
    taken, values, made, kept = set(ports.values()), dict(ports), [], {}
    for node, part, scope in zip(nodes, parts, scopes, strict=True):
        linear = part and (node.op_type in ("MatMul", "Conv"))
        name = _free(part if linear else ".".join(filter(None, (scope, node.op_type))), taken)
        for place, value in enumerate(node.input):
            if value in constants and value not in values:
                values[value] = _free(owners.get(value) or _spelt(constants[value]) or f"{name}.input{place}", taken)
                kept[values[value]] = constants[value]
        for place, value in enumerate(node.output):
            if value and value not in values:
                values[value] = name if len(node.output) == 1 else _free(f"{name}.{place}", taken)
        made.append(_renamed(node, name, values))
    return made, kept


def _part(node: onnx.NodeProto, owners: Mapping[str, str], layers: Mapping[str, tuple[str, str]]) -> str:
    """The layer whose parameter a node reads, or whose product it ends; "": it reads none."""
    found = [owners[value] for value in node.input if value in owners]
    if not found and node.output[0] in layers:
        found = [name for name in layers[node.output[0]] if name]
    return found[0].rpartition(".")[0] if found else ""


def _scopes(parts: Sequence[str]) -> list[str]:
    """Of every node the part of the model that it stands in."""
    behind: list[str] = []
    last = ""
    for part in reversed(parts):
        last = part or last
        behind.append(last)
    scopes, last = [], ""
    for part, after in zip(parts, reversed(behind), strict=True):
        last = part or last
        scopes.append(part or _common(last or after, after))
    return scopes


def _common(one: str, other: str) -> str:
    """The longest path that both lie in; between items of a list the first of them."""
    same: list[str] = []
    for a, b in zip(one.split("."), other.split("."), strict=False):
        if a != b:
            break
        same.append(a)
    rest = one.split(".")[len(same) :]
    return ".".join([*same, *rest[:1]] if rest and rest[0].isdecimal() else same)


def _spelt(array: Any) -> str:
    """A constant of few numbers by what it is; "": of many."""
    if array.size > SHORT:
        return ""
    numbers = ", ".join(str(number) for number in array.reshape(-1).tolist())
    return f"{array.dtype.name} {numbers if array.ndim == 0 else f'[{numbers}]'}"


def _free(name: str, taken: set[str]) -> str:
    """The name, with a number where it is taken."""
    made, number = name, 1
    while made in taken:
        number += 1
        made = f"{name}_{number}"
    taken.add(made)
    return made


def _renamed(node: onnx.NodeProto, name: str, values: Mapping[str, str]) -> onnx.NodeProto:
    made = onnx.NodeProto(op_type=node.op_type, name=name)
    made.input.extend(values[value] if value else "" for value in node.input)
    made.output.extend(values[value] if value else "" for value in node.output)
    for attribute in _sorted(node.attribute):
        copy = made.attribute.add()
        copy.CopyFrom(attribute)
        copy.doc_string = ""
    return made


def _sorted(attributes: Iterable[onnx.AttributeProto]) -> list[onnx.AttributeProto]:
    return sorted(attributes, key=lambda attribute: attribute.name)
