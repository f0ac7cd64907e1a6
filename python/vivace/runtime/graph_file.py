"""What a pack must know of an ONNX file, read without onnx: a strict walk over the protobuf bytes.

Ports, opset and the initializers that lie in the weights file. Nothing is trusted: lengths, repeated fields, unknown
fields and external data are refused with PackError before any runtime sees the file.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from typing import Any

from vivace.errors import PackError
from vivace.runtime.manifest import DTYPES, WEIGHTS

MAX_DEPTH = 48  # of messages: 16 graphs within graphs
VARINT, FIXED64, LENGTH, FIXED32 = 0, 1, 2, 5
NAMES = {number: name for name, (number, _) in DTYPES.items()}
# Fields of every message that a graph of a pack may have: number -> (name, kind). Kinds: "int", "text", "" (skipped),
# or a message; "*" behind it where the field may stand more than once.
SCHEMA: dict[str, dict[int, tuple[str, str]]] = {
    "model": {
        **{number: ("", "") for number in (1, 2, 3, 4, 5, 6)},
        **{7: ("graph", "graph"), 8: ("opsets", "opset*"), 14: ("", "*")},
    },
    "opset": {1: ("domain", "text"), 2: ("version", "int")},
    "graph": {
        **{1: ("nodes", "node*"), 2: ("", ""), 5: ("initializers", "tensor*"), 10: ("", "")},
        **{11: ("inputs", "value*"), 12: ("outputs", "value*"), 13: ("", "*"), 16: ("", "*")},
    },
    "node": {**{n: ("", "*") for n in (1, 2, 9)}, **{n: ("", "") for n in (3, 4, 6, 7, 8)}, 5: ("attributes", "attr*")},
    "attr": {
        **{number: ("", "") for number in (1, 2, 3, 4, 13, 20, 21)},
        **{7: ("", "*"), 8: ("", "*"), 9: ("", "*")},
        **{5: ("tensors", "tensor*"), 10: ("tensors", "tensor*"), 6: ("graphs", "graph*"), 11: ("graphs", "graph*")},
    },
    "tensor": {
        **{1: ("dims", "int*"), 2: ("type", "int"), 8: ("name", "text")},
        **{13: ("external", "entry*"), 14: ("location", "int")},
        **{9: ("", ""), 12: ("", ""), 4: ("", "*"), 5: ("", "*"), 6: ("", "*"), 7: ("", "*"), 10: ("", "*")},
        **{11: ("", "*"), 16: ("", "*")},
    },
    "entry": {1: ("key", "text"), 2: ("value", "text")},
    "value": {1: ("name", "text"), 2: ("type", "type"), 3: ("", ""), 4: ("", "*")},
    "type": {1: ("tensor", "array"), 6: ("", "")},
    "array": {1: ("type", "int"), 2: ("shape", "shape")},
    "shape": {1: ("dims", "dim*")},
    "dim": {1: ("number", "int"), 2: ("name", "text"), 3: ("", "")},
}


@dataclass(frozen=True, slots=True)
class Stored:
    """An initializer whose bytes lie in the weights file, from `offset` on, `length` of them."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    offset: int
    length: int


@dataclass(frozen=True, slots=True)
class GraphFile:
    """inputs, outputs: (name, dtype, shape of numbers and names of free dimensions), in order."""

    opset: int
    inputs: tuple[tuple[str, str, tuple[int | str, ...]], ...]
    outputs: tuple[tuple[str, str, tuple[int | str, ...]], ...]
    stored: tuple[Stored, ...]


def read_graph(raw: bytes, weights: int) -> GraphFile:
    """Read the bytes of an ONNX file beside a weights file of `weights` bytes. Raises PackError."""
    model = _decode("model", memoryview(raw), 0)
    opsets = [(each.get("domain", ""), each.get("version", 0)) for each in model.get("opsets", ())]
    if len(opsets) != 1 or opsets[0][0] not in ("", "ai.onnx"):
        raise PackError(f"it imports the operator sets {opsets!r:.100}; a pack has those of ONNX itself and no others")
    graph = model.get("graph", {})
    _nothing_outside(graph)
    stored = tuple(_stored(each, weights) for each in graph.get("initializers", ()) if _is_stored(each))
    if len({each.name for each in stored}) != len(stored):
        raise PackError("two of its weights have one name")
    ports = [tuple(_port(each) for each in graph.get(side, ())) for side in ("inputs", "outputs")]
    return GraphFile(opsets[0][1], ports[0], ports[1], stored)


def _nothing_outside(graph: dict[str, Any]) -> None:
    """Only initializers of the outermost graph may lie in another file."""
    for node in graph.get("nodes", ()):
        for attribute in node.get("attributes", ()):
            inner = attribute.get("graphs", ())
            tensors = [*attribute.get("tensors", ()), *(t for each in inner for t in each.get("initializers", ()))]
            if any(map(_is_stored, tensors)):
                raise PackError("a constant within a node lies in another file; only weights of the graph may")
            for each in inner:
                _nothing_outside(each)


def _is_stored(tensor: dict[str, Any]) -> bool:
    return bool(tensor.get("location", 0) or tensor.get("external"))


def _stored(tensor: dict[str, Any], weights: int) -> Stored:
    name, dims = tensor.get("name", ""), tuple(tensor.get("dims", ()))
    where = f"weight {name!r:.100}"
    if tensor.get("type") not in NAMES:
        raise PackError(f"{where} has the data type {tensor.get('type')}; a pack has {', '.join(DTYPES)}")
    entries = [(entry.get("key", ""), entry.get("value", "")) for entry in tensor.get("external", ())]
    values = dict(entries)
    if tensor.get("location") != 1 or len(values) != len(entries) or values.keys() != {"location", "offset", "length"}:
        raise PackError(f"{where} says {entries!r:.100} of where it lies; needed are location, offset and length")
    if values["location"] != WEIGHTS:
        raise PackError(f"{where} lies in {values['location']!r:.100}; weights of a pack lie in {WEIGHTS}")
    if not all(re.fullmatch("[0-9]{1,15}", values[key]) for key in ("offset", "length")):
        raise PackError(f"{where} has offset {values['offset']!r:.40} and length {values['length']!r:.40}")
    offset, length = int(values["offset"]), int(values["length"])
    dtype = NAMES[tensor["type"]]
    if min(dims, default=0) < 0 or length != math.prod(dims) * DTYPES[dtype][1]:
        raise PackError(f"{where} of {dtype} {str(dims):.100} has {length} bytes, which do not fit its shape")
    if offset + length > weights:
        raise PackError(f"{where} ends at byte {offset + length} of {WEIGHTS}, which has {weights}")
    return Stored(name, dtype, dims, offset, length)


def _port(value: dict[str, Any]) -> tuple[str, str, tuple[int | str, ...]]:
    name, array = value.get("name", ""), value.get("type", {}).get("tensor", {})
    if array.get("type") not in NAMES or "shape" not in array:
        raise PackError(f"port {name!r:.100} is not a tensor of known dtype and rank")
    dims = [(dim.get("number"), dim.get("name", "")) for dim in array["shape"].get("dims", ())]
    if any((number is None) == (not text) for number, text in dims):
        raise PackError(f"port {name!r:.100} has a dimension that is neither a number nor a name")
    return name, NAMES[array["type"]], tuple(text if number is None else number for number, text in dims)


# --- protobuf ---------------------------------------------------------------------------------------------------------
def _decode(message: str, data: memoryview, depth: int) -> dict[str, Any]:
    """Fields of a message by name; what is "text" as str, messages as dicts."""
    if depth > MAX_DEPTH:
        raise PackError("it is nested too deep")
    out: dict[str, Any] = {}
    schema, seen, at = SCHEMA[message], set[int](), 0
    while at < len(data):
        key, at = _varint(data, at)
        number, wire = key >> 3, key & 7
        if number not in schema:
            raise PackError(f"field {number} of a {message} is nothing that a graph of a pack has")
        name, kind = schema[number]
        if kind[-1:] != "*" and number in seen:
            raise PackError(f"field {number} of a {message} stands twice")
        seen.add(number)
        value, at = _value(data, at, wire)
        if name:
            _keep(out, name, kind, wire, value, depth)
    return out


def _keep(out: dict[str, Any], name: str, kind: str, wire: int, value: Any, depth: int) -> None:
    base = kind.rstrip("*")
    if (base == "int") != (wire == VARINT) and (kind, wire) != ("int*", LENGTH) or wire in (FIXED32, FIXED64):
        raise PackError(f"its field {name!r} has the wire type {wire}")
    if base == "int":
        values = [value] if wire == VARINT else _packed(value)
        made = [number - (1 << 64) if number >> 63 else number for number in values]
    elif base == "text":
        made = [_text(value)]
    else:
        made = [_decode(base, value, depth + 1)]
    if kind[-1] == "*":
        out.setdefault(name, []).extend(made)
    else:
        out[name] = made[0]


def _value(data: memoryview, at: int, wire: int) -> tuple[Any, int]:
    if wire == VARINT:
        return _varint(data, at)
    length = {FIXED64: 8, FIXED32: 4}.get(wire)
    if wire == LENGTH:
        length, at = _varint(data, at)
    if length is None or length > len(data) - at:
        raise PackError(f"it is damaged at {len(data) - at} bytes before the end of a message (wire type {wire})")
    return data[at : at + length], at + length


def _varint(data: memoryview, at: int) -> tuple[int, int]:
    value = shift = 0
    for at in range(at, min(at + 10, len(data))):  # noqa: B020  ten bytes hold 64 bits
        byte = data[at]
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            if value >> 64:
                break
            return value, at + 1
        shift += 7
    raise PackError("it is damaged: a number has no end")


def _packed(data: memoryview) -> list[int]:
    values, at = [], 0
    while at < len(data):
        value, at = _varint(data, at)
        values.append(value)
    return values


def _text(data: memoryview) -> str:
    try:
        return str(data, "utf-8")
    except UnicodeDecodeError:
        raise PackError(f"{bytes(data[:40])!r} is not UTF-8") from None
