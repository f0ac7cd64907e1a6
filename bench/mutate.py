"""Seeded damage to plan files: edits of the JSON tree, of its text and bytes, and of the safetensors side-car."""

from __future__ import annotations

import json
import re
from copy import deepcopy
from random import Random
from typing import Any

# Values that stand where another type, size or sign is wanted.
HOSTILE: tuple[Any, ...] = (
    None, True, False, 0, 1, -1, 2, 31, 255, 256, 1 << 31, (1 << 53) + 1, -(1 << 63), 10**400,
    0.0, -0.0, 1.0, -1.0, 0.5, 5e-324, 1e-310, 1e-100, 1e100, 1.7976931348623157e308, -1e308, float("nan"),
    float("inf"), "", "x", "y", "out", "one", "cond", "uncond", "noise:0", "noise:7", "noise:4294967296",
    "noise:" + "9" * 200, "input:mask", "input:../etc", "m0", "../../etc/passwd", "C:\\plan", "a\nb", "a\x00b",
    "\ud800", "\u202egnp", "ünï", "x" * 300, "COMPUTE", "REUSE", [], {}, [[]], [0.5], ["x"], [["x", 1.0]], [1 << 40],
    {"tensor": "mean"}, {"input": "w"}, {"age": [1.0]}, {"op": "affine"}, {"dst": "x", "terms": []},
    {"blocks": [0, 1 << 30], "action": "COMPUTE"}, {"blocks": [-2, 0], "action": "REUSE"},
)  # fmt: skip
# Texts that no JSON writer makes.
TOKENS = (
    b"NaN", b"-Infinity", b"1e400", b"-1e999", b"0x10", b"01", b"1.", b"+1.0", b"9" * 4000, b"9" * 5000, b"{", b"]",
    b'"', b"\\", b"\\u0000", b"\\ud800", b"\xef\xbb\xbf", b"\x00", b"\xff", b"\xc0\x80", b"null", b"[[[[" * 20,
    b'{"a":' * 40, b"'x'", b"/**/", b",", b":", b"1e-400", b"-0.0", b"0.1e+0001", b"1" + b"0" * 400 + b".0", b"\n",
    b"\xe2\x80\xa8",
)  # fmt: skip
LYING_SHAPES: tuple[Any, ...] = (
    [1 << 40], [1_000_000_000, 16, 8, 8], [0], [0, 1 << 62], [], [-3, 8, 8], [3.0, 8, 8], [3, 8, 7], 3
)  # fmt: skip
_SCALAR = re.compile(rb'"(?:[^"\\]|\\.)*"|-?[0-9][0-9.eE+-]*|true|false|null')


def mutate(rng: Random, text: bytes, side_car: bytes | None) -> tuple[bytes, bytes | None]:
    """A damaged copy of a plan file and its side-car: one to four edits, mostly of the tree."""
    for _ in range(rng.choice((1, 1, 1, 1, 2, 2, 3, 4))):
        kind = rng.random()
        if side_car is not None and kind < 0.15:
            text, side_car = _edit_side_car(rng, text, side_car)
        elif kind < 0.8:
            text = _edit_json(rng, text)
        elif kind < 0.9:
            text = _edit_token(rng, text)
        else:
            text = edit_bytes(rng, text)
    return text, side_car


# --- the tree --------------------------------------------------------------------------------------------------------
def _edit_json(rng: Random, text: bytes) -> bytes:
    try:
        tree = json.loads(text)
    except (ValueError, RecursionError):
        return edit_bytes(rng, text)
    return json.dumps(edit_tree(rng, tree), indent=rng.choice((None, 1))).encode()


def edit_tree(rng: Random, tree: Any) -> Any:
    """One edit at a random node: another value, a neighbour's value, a changed number, a lost or doubled child."""
    spots = list(_spots(tree))
    if not spots:
        return deepcopy(rng.choice(HOSTILE))
    holder, key = rng.choice(spots)
    match rng.randrange(9):
        case 0 | 1:
            holder[key] = deepcopy(rng.choice(HOSTILE))
        case 2 | 3:
            alike = [node[at] for node, at in spots if type(node[at]) is type(holder[key])]
            holder[key] = deepcopy(rng.choice(alike))
        case 4 | 5:
            holder[key] = _near(rng, holder[key])
        case 6:
            del holder[key]
        case 7:
            _double(rng, holder, key)
        case 8:
            if isinstance(holder, dict):
                holder[rng.choice([*holder, "beta", "__class__", "", "x\n"])] = holder.pop(key)
            else:
                rng.shuffle(holder)
    return tree


def _spots(tree: Any) -> list[tuple[Any, Any]]:
    """(container, key or position) of every node below the root."""
    found, todo = [], [tree]
    while todo:
        node = todo.pop()
        keys = list(node) if isinstance(node, dict) else range(len(node)) if isinstance(node, list) else ()
        for key in keys:
            found.append((node, key))
            todo.append(node[key])
    return found


def _near(rng: Random, value: Any) -> Any:
    """A value of the same kind, a little or a lot off; or the same number in another type."""
    if isinstance(value, bool) or value is None:
        return rng.choice((True, False, None, 0))
    if isinstance(value, int):
        return rng.choice((value + 1, value - 1, -value, value << 20, float(value) if abs(value) < 1 << 60 else 0))
    if isinstance(value, float):
        exponent = rng.choice((-300, -20, -1, 1, 20, 200))
        near = (-value, value + 1e-9, value * 10.0**exponent, str(value), value / 2, 1 - value)
        return rng.choice(near)
    if isinstance(value, str):
        return rng.choice((value + "0", value[:-1], value.upper(), value * 100, [value], value + "\u2028"))
    return list(value.items()) if isinstance(value, dict) else {str(n): item for n, item in enumerate(value)}


def _double(rng: Random, holder: Any, key: Any) -> None:
    if isinstance(holder, list):
        holder[key:key] = [holder[key]] * rng.choice((1, 1, 2, 20, 300))
    else:
        holder[f"{key}2"] = holder[key]


# --- text and bytes --------------------------------------------------------------------------------------------------
def _edit_token(rng: Random, text: bytes) -> bytes:
    """One string, number or name of the text replaced by something no JSON writer makes; or a member doubled."""
    found = list(_SCALAR.finditer(text))
    if not found:
        return text + rng.choice(TOKENS)
    first, last = rng.choice(found).span()
    if rng.random() < 0.2:
        return text[:first] + text[first:last] + b": 0.5, " + text[first:]
    return text[:first] + rng.choice(TOKENS) + text[last:]


def edit_bytes(rng: Random, data: bytes) -> bytes:
    """Bytes flipped, cut, doubled or inserted; sometimes another encoding."""
    if not data:
        return rng.choice(TOKENS)
    at, count = rng.randrange(len(data)), rng.randint(1, 40)
    match rng.randrange(8):
        case 0 | 1:
            return data[:at] + bytes([data[at] ^ 1 << rng.randrange(8)]) + data[at + 1 :]
        case 2:
            return data[:at] + data[at + count :]
        case 3:
            return data[:at]
        case 4:
            return data[:at] + data[at : at + count] * 2 + data[at + count :]
        case 5 | 6:
            return data[:at] + rng.choice(TOKENS) + data[at:]
    codec = rng.choice(("utf-8-sig", "utf-16", "utf-16-le", "utf-32-be"))
    return data.decode("utf-8", "replace").encode(codec, "replace")


# --- the side-car ----------------------------------------------------------------------------------------------------
def _edit_side_car(rng: Random, text: bytes, side_car: bytes) -> tuple[bytes, bytes | None]:
    length = int.from_bytes(side_car[:8], "little")
    match rng.randrange(7):
        case 0:
            return text, edit_bytes(rng, side_car)
        case 1:
            lie = rng.choice((0, 1, 7, length - 1, length + 1, len(side_car), 100_000_000, 1 << 31, (1 << 64) - 1))
            return text, lie.to_bytes(8, "little") + side_car[8:]
        case 2:
            return text, rng.choice((None, b"", side_car[: rng.randrange(len(side_car) + 1)], side_car + bytes(9)))
        case 3:
            return _same_lie(rng, text, side_car, length)
    header = side_car[8 : 8 + length]
    header = _edit_json(rng, header) if rng.random() < 0.8 else _edit_token(rng, header)
    return text, pack(header, side_car[8 + length :])


def _same_lie(rng: Random, text: bytes, side_car: bytes, length: int) -> tuple[bytes, bytes]:
    """Plan and header agree on a shape that the bytes do not have."""
    shape = rng.choice(LYING_SHAPES)
    try:
        plan, header = json.loads(text), json.loads(side_car[8 : 8 + length])
        for info in plan["tensors"]:
            info["shape"] = header[info["key"]]["shape"] = shape
    except (ValueError, KeyError, TypeError, RecursionError):
        return text, side_car
    return json.dumps(plan).encode(), pack(json.dumps(header).encode(), side_car[8 + length :])


def pack(header: bytes, data: bytes) -> bytes:
    """A side-car of a header and tensor bytes, with the header's true length."""
    return len(header).to_bytes(8, "little") + header + data
