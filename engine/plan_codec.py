"""Plan data <-> JSON data. The schema of a file is the schema of the dataclasses: one row of `READERS` per type.

Strict both ways: unknown fields, duplicate keys, NaN, Infinity, overflow, control characters and integers in place of
floats are errors; fields that hold their default are left out, so that every plan has one form.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Mapping
from dataclasses import MISSING, fields
from typing import Any

from vivace.engine import plan as p
from vivace.errors import PlanFileError

FORMAT = "vivace-plan"
VERSION = 1
MAX_DEPTH = 32
MAX_TEXT = 256  # characters of a name
MAX_INT = 1 << 53  # every integer of a plan is exact as a float too

Reader = Callable[[Any, str], Any]


# --- writing ---------------------------------------------------------------------------------------------------------
def encode(value: Any) -> Any:
    """Plan data as JSON data. Fields that hold their default are left out."""
    match value:
        case p.Action():
            return value.name
        case p.TensorRef(key):
            return {"tensor": key}
        case p.InputRef(name, default):
            return {"input": name} if default is None else {"input": name, "default": default}
        case p.AgeRef(values):
            return {"age": list(values)}
        case p.Args():
            return {name: encode(item) for name, item in value.items}
        case p.Affine() | p.Transform():
            return {"op": type(value).__name__.lower(), **encode_fields(value)}
        case tuple():
            return [encode(item) for item in value]
        case None | bool() | int() | float() | str():
            return value
    return encode_fields(value)


def encode_fields(value: Any) -> dict[str, Any]:
    out = {}
    for field in fields(value):
        item = getattr(value, field.name)
        if field.name != "arrays" and not (field.default is not MISSING and _same(item, field.default)):
            out[field.name] = encode(item)
    return out


def _same(one: Any, two: Any) -> bool:
    """Equal with equal sign of zero, so that leaving a default out never changes a bit."""
    if isinstance(one, float) and isinstance(two, float):
        return one == two and math.copysign(1.0, one) == math.copysign(1.0, two)
    return type(one) is type(two) and bool(one == two)


# --- strict JSON ------------------------------------------------------------------------------------------------------
def parse(raw: bytes) -> Any:
    """Strict JSON: UTF-8, no duplicate keys, no NaN or Infinity, no overflow, bounded depth."""
    try:
        text = raw.decode("utf-8")
        if _too_deep(text):
            raise PlanFileError(f"nested deeper than {MAX_DEPTH} levels")
        return json.loads(text, object_pairs_hook=_unique, parse_constant=_no_constant, parse_float=_finite)
    except UnicodeDecodeError as error:
        raise PlanFileError(f"not UTF-8 at byte {error.start}") from None
    except json.JSONDecodeError as error:
        raise PlanFileError(f"not JSON: {error.msg} at line {error.lineno} column {error.colno}") from None
    except ValueError as error:  # an integer of thousands of digits
        raise error if isinstance(error, PlanFileError) else PlanFileError("a number is too long") from None


# Strings, and what is neither string nor bracket; possessive throughout, so that time is linear.
_NO_BRACKET = re.compile(r'(?:"[^"\\]*+(?:\\.[^"\\]*+)*+"?|[^]["{}]++)++', re.DOTALL)


def _too_deep(text: str) -> bool:
    """Whether brackets outside strings nest deeper than MAX_DEPTH, found before the recursive parser sees them.

    Each round takes away the innermost pairs, so a legal text is empty after as many rounds as it has levels.
    """
    rest = _NO_BRACKET.sub("", text).replace("{", "[").replace("}", "]")
    for _ in range(MAX_DEPTH):
        rest = rest.replace("[]", "")
    return "[]" in rest or rest.count("[") > MAX_DEPTH


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    out = dict(pairs)
    if len(out) != len(pairs):
        seen: set[str] = set()
        double = next(key for key, _ in pairs if key in seen or seen.add(key))  # type: ignore[func-returns-value]
        raise PlanFileError(f"key {double!r:.60} stands twice in one object")
    return out


def _no_constant(name: str) -> Any:
    raise PlanFileError(f"{name} is not a number a plan may hold")


def _finite(text: str) -> float:
    value = float(text)
    if math.isinf(value):
        raise PlanFileError(f"number {text[:40]} is beyond float64")
    return value


# --- decoding: one reader per kind of value --------------------------------------------------------------------------
def _float(value: Any, where: str) -> float:
    if type(value) is not float:
        raise PlanFileError(f"{where}: {value!r:.60} is not a float (write 1.0, not 1)")
    return value


def _int(value: Any, where: str) -> int:
    if type(value) is not int or abs(value) > MAX_INT:
        raise PlanFileError(f"{where}: {value!r:.60} is not an integer of at most 53 bits")
    return value


def _bool(value: Any, where: str) -> bool:
    if type(value) is not bool:
        raise PlanFileError(f"{where}: {value!r:.60} is not true or false")
    return value


def _str(value: Any, where: str) -> str:
    if type(value) is not str or len(value) > MAX_TEXT or not value.isprintable():
        raise PlanFileError(f"{where}: {value!r:.60} is not a string of at most {MAX_TEXT} printable characters")
    return value


def _maybe(read: Reader) -> Reader:
    return lambda value, where: None if value is None else read(value, where)


def _list(read: Reader) -> Reader:
    def reader(value: Any, where: str) -> tuple[Any, ...]:
        if type(value) is not list:
            raise PlanFileError(f"{where}: {value!r:.60} is not a list")
        return tuple(read(item, f"{where}[{n}]") for n, item in enumerate(value))

    return reader


def _pair(first: Reader, second: Reader) -> Reader:
    def reader(value: Any, where: str) -> tuple[Any, Any]:
        if type(value) is not list or len(value) != 2:
            raise PlanFileError(f"{where}: {value!r:.60} is not a pair")
        return first(value[0], where), second(value[1], where)

    return reader


def _action(value: Any, where: str) -> p.Action:
    if type(value) is not str or value not in p.Action.__members__:
        raise PlanFileError(f"{where}: action {value!r:.60}; use one of {', '.join(p.Action.__members__)}")
    return p.Action[value]


def _args(value: Any, where: str) -> p.Args:
    _free(_object(value, where), where)
    return p.Args.of(value)


def _free(value: Any, where: str) -> None:
    """Free JSON, as a recipe's arguments are: only integers and texts have bounds."""
    if isinstance(value, dict):
        for name, item in value.items():
            _str(name, where)
            _free(item, where)
    elif isinstance(value, list):
        for item in value:
            _free(item, where)
    elif isinstance(value, str):
        _str(value, where)
    elif type(value) is int:
        _int(value, where)


def _object(value: Any, where: str) -> dict[str, Any]:
    if type(value) is not dict:
        raise PlanFileError(f"{where}: {value!r:.60} is not an object")
    return value


def _coef(value: Any, where: str) -> p.Coef:
    if type(value) is float:
        return value
    kinds: dict[str, tuple[type, dict[str, Reader]]] = {
        "tensor": (p.TensorRef, {"tensor": _str}),
        "input": (p.InputRef, {"input": _str, "default": _maybe(_float)}),
        "age": (p.AgeRef, {"age": _list(_float)}),
    }
    if type(value) is dict:
        for kind, (cls, readers) in kinds.items():
            if kind in value:
                _known(value, readers, where)
                return cls(*(read(value.get(name), f"{where}.{name}") for name, read in readers.items()))  # type: ignore[no-any-return]
    raise PlanFileError(f"{where}: {value!r:.60} is not a coefficient (a float, or an object tensor, input or age)")


def _op(value: Any, where: str) -> p.Op:
    data = dict(_object(value, where))
    kind = data.pop("op", None)
    if kind not in ("affine", "transform"):
        raise PlanFileError(f"{where}: op {kind!r:.60}; use affine or transform")
    op: p.Op = _record(p.Affine if kind == "affine" else p.Transform)(data, where)
    return op


def _affine(value: Any, where: str) -> p.Affine:
    op = _op(value, where)
    if not isinstance(op, p.Affine):
        raise PlanFileError(f"{where}: only affine ops may stand here")
    return op


def _known(data: dict[str, Any], allowed: Mapping[str, Any], where: str) -> None:
    for name in data:
        if name not in allowed:
            raise PlanFileError(f"{where}: field {name!r:.60} is unknown; known: {', '.join(allowed)}")


def _record(cls: type) -> Reader:
    """Reader of one dataclass by its row of `READERS`."""
    needed = [field.name for field in fields(cls) if field.default is MISSING and field.default_factory is MISSING]

    def reader(value: Any, where: str) -> Any:
        data, readers = _object(value, where), READERS[cls]
        _known(data, readers, where)
        for name in needed:
            if name not in data:
                raise PlanFileError(f"{where}: field {name!r} is missing")
        return cls(**{name: readers[name](item, f"{where}.{name}") for name, item in data.items()})

    return reader


_TERMS = _list(_pair(_str, _coef))
_STRINGS = _list(_str)
_NUMBERS = _list(_float)
_INTS = _list(_int)
_BLOCKS = _pair(_int, _int)
READERS: dict[type, dict[str, Reader]] = {
    p.Affine: {"dst": _str, "terms": _TERMS, "at": _maybe(_int)},
    p.Transform: {"kind": _str, "slot": _str, "reads": _STRINGS, "params": _TERMS},
    p.Rule: {
        "blocks": _BLOCKS,
        "site": _str,
        "branches": _maybe(_STRINGS),
        "action": _maybe(_action),
        "order": _int,
        "store": _maybe(_str),
        "precision": _maybe(_str),
        "share": _float,
        "weights": _int,
    },
    p.Variant: {
        "model": _str,
        "branches": _STRINGS,
        "rules": _list(lambda value, where: _record(p.Rule)(value, where)),
        "keep": _float,
        "selector": _str,
        "selector_params": _list(_pair(_str, _float)),
    },
    p.Guard: {
        "metric": _str,
        "rule": _str,
        "threshold": _float,
        "otherwise": lambda value, where: _record(p.Variant)(value, where),
        "params": _NUMBERS,
        "sticky": _bool,
    },
    p.Step: {
        "timestep": _float,
        "alpha": _float,
        "sigma": _float,
        "ops": _list(_op),
        "variant": _maybe(_record(p.Variant)),
        "x": _str,
        "x_scale": _float,
        "outs": _STRINGS,
        "net_inputs": _TERMS,
        "forecast": _NUMBERS,
        "guard": _maybe(_record(p.Guard)),
        "restart": _bool,
    },
    p.Recipe: {"maker": _str, "arguments": _args, "tail": _maybe(_float), "passes": _list(_pair(_str, _args))},
    p.TensorInfo: {"key": _str, "shape": _INTS, "dtype": _str, "sha256": _str},
    p.Binding: {
        "fingerprint": _str,
        "blocks": _int,
        "tokens": _int,
        "token_group": _int,
        "latent_shape": _INTS,
        "width": _int,
        "layers": _int,
    },
    p.Plan: {
        "steps": _list(_record(p.Step)),
        "prediction": _str,
        "init": _list(_affine),
        "recipe": _maybe(_record(p.Recipe)),
        "tensors": _list(_record(p.TensorInfo)),
        "binding": _maybe(_record(p.Binding)),
        "results": _STRINGS,
    },
}


def decode(data: Any) -> p.Plan:
    """A plan from parsed JSON, without side-car values and before verification."""
    data = dict(_object(data, "plan"))
    if data.pop("format", None) != FORMAT:
        raise PlanFileError(f'not a plan: "format" must be "{FORMAT}"')
    version = data.pop("version", None)
    if type(version) is not int or version != VERSION:
        raise PlanFileError(f"format version {version!r:.20}; this release reads {VERSION}")
    plan: p.Plan = _record(p.Plan)(data, "plan")
    return plan
