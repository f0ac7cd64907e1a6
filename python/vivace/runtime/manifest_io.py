"""The file of a manifest: strict JSON in one form, with its own hash. Nothing in it is taken on trust.

The schema of the file is the schema of the dataclasses, read off their annotations; fields that hold their default are
left out.
"""

from __future__ import annotations

import json
import re
import types
from collections.abc import Callable, Mapping
from dataclasses import MISSING, dataclass, fields, is_dataclass
from functools import cache
from hashlib import sha256
from typing import Any, Union, get_args, get_origin, get_type_hints

from vivace.engine.plan_codec import parse
from vivace.errors import PackError, PlanFileError
from vivace.runtime.manifest import DTYPES, FORMAT, SOURCES, VERSION, Graph, Manifest, Port

MAX_BYTES = 32 << 20
MAX_INT = 1 << 53
MAX_SIZE = 1 << 24  # of one axis
FILE_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}")  # no folders, and no name that any system reads otherwise
HASH = re.compile("[0-9a-f]{64}")
Reader = Callable[[Any, str], Any]


@dataclass(frozen=True, slots=True)
class TokenLayout:
    """Where image tokens lie, as `engine.token_layout.Layout` has it."""

    edges: tuple[int, ...]
    channels: int = 0
    places: int = 1


@dataclass(frozen=True, slots=True)
class Tokenizer:
    """A tokenizer: its file in the pack, tokens that texts are cut and filled to, and what they are filled with."""

    file: str
    length: int
    pad_id: int
    pad_token: str


# What runtimes read of the parts that are mappings: field -> type; what else stands there is told, not read.
MODEL: dict[str, Any] = {
    **{name: str for name in ("name", "licence", "fingerprint", "prediction")},
    **{name: int for name in ("blocks", "token_group", "width")},
    **{name: tuple[int, ...] for name in ("latent_shape", "patch")},
    **{"layout": TokenLayout | None, "pixels": bool | None},
}
PROMPTS: dict[str, dict[str, Any]] = {
    "class": {"classes": int, "names": tuple[tuple[int, str, str], ...]},
    "text": {"tokenizers": Mapping[str, Tokenizer], "negative": str},
    "tensors": {},
}


def encode(manifest: Manifest) -> bytes:
    """The file: sorted fields, one line a graph and a file of the pack. Raises PackError for what would not be read."""
    data = {"format": FORMAT, "version": VERSION, **_plain(manifest)}
    try:
        raw = _text({**data, "sha256": _hash(data)})
    except (TypeError, ValueError) as error:
        raise PackError(f"manifest: it cannot be written ({error}); its fields are JSON without NaN") from None
    decode(raw)
    return raw


def decode(raw: bytes) -> Manifest:
    """Read the file. Raises PackError: not a manifest, of another version, changed since it was written, or a field
    that is lacking, of another type or not known."""
    try:
        data = parse(raw)
    except PlanFileError as error:
        raise PackError(str(error)) from None
    if not isinstance(data, dict) or data.get("format") != FORMAT:
        raise PackError(f'it is not the manifest of a pack: "format" must be "{FORMAT}"')
    version = data.get("version")
    if type(version) is not int or version != VERSION:
        raise PackError(
            f"the pack has format version {version!r:.20}, this release reads {VERSION}; "
            "export it again, or use the release that made it"
        )
    rest = {name: value for name, value in data.items() if name != "sha256"}
    if data.get("sha256") != _hash(rest) or raw != _text(data):
        raise PackError("it was changed after it was written (its SHA-256 differs); export the pack again")
    made: Manifest = _record(Manifest)({n: v for n, v in rest.items() if n not in ("format", "version")}, "manifest")
    _check(made)
    return made


def _hash(data: Mapping[str, Any]) -> str:
    return sha256(json.dumps(data, sort_keys=True, separators=(",", ":"), allow_nan=False).encode()).hexdigest()


def _text(data: Mapping[str, Any]) -> bytes:
    lines = []
    for name, value in sorted(data.items()):
        many = name in ("graphs", "files") and isinstance(value, list)
        text = "[\n" + ",\n".join(f"  {_line(item)}" for item in value) + "\n ]" if many else _line(value)
        lines.append(f" {json.dumps(name)}: {text}")
    return ("{\n" + ",\n".join(lines) + "\n}\n").encode()


def _line(value: Any) -> str:
    return json.dumps(value, sort_keys=True, allow_nan=False)


def _plain(value: Any) -> Any:
    """JSON data of dataclasses, tuples and mappings."""
    if is_dataclass(value):
        pairs = [(each, getattr(value, each.name)) for each in fields(value)]
        return {each.name: _plain(item) for each, item in pairs if not _is_default(each, item)}
    if isinstance(value, Mapping):
        return {str(name): _plain(item) for name, item in value.items()}
    return [_plain(item) for item in value] if isinstance(value, (tuple, list)) else value


def _is_default(each: Any, item: Any) -> bool:
    default = each.default_factory() if each.default_factory is not MISSING else each.default
    return bool(default is not MISSING and item == default)


# --- what no type says ------------------------------------------------------------------------------------------------
def _check(manifest: Manifest) -> None:
    _check_parts(manifest)
    for info in manifest.files:
        if not FILE_NAME.fullmatch(info.name):
            raise PackError(f"manifest.files: {info.name!r:.100} is not the name of a file in the pack's own folder")
        if info.bytes < 0 or not HASH.fullmatch(info.sha256):
            raise PackError(f"manifest.files: {info.name} has {info.bytes} bytes and the hash {info.sha256!r:.80}")
    _once((info.name.casefold() for info in manifest.files), "manifest.files")
    _once((graph.name for graph in manifest.graphs), "manifest.graphs")
    for graph in manifest.graphs:
        _check_graph(graph, {info.name for info in manifest.files})
    made = {port.key for graph in manifest.graphs for port in graph.outputs if port.source == "prepared"}
    for graph in manifest.graphs:
        for port in graph.inputs:
            if port.source == "prepared" and port.key not in made:
                raise PackError(f"manifest.graphs: {graph.name!r:.100}: no graph prepares {port.key!r:.60}")


def _check_parts(manifest: Manifest) -> None:
    """What runtimes read of the model and its prompts."""
    kind = manifest.prompts.get("kind")
    if kind not in PROMPTS:
        raise PackError(f"manifest.prompts.kind: {kind!r:.40}; this release knows {', '.join(PROMPTS)}")
    _reader(str)(manifest.precision.get("network"), "manifest.precision.network")
    for part, needed in (("model", MODEL), ("prompts", PROMPTS[kind])):
        found = {
            name: _reader(t)(getattr(manifest, part).get(name), f"manifest.{part}.{name}") for name, t in needed.items()
        }
        layout, tokenizers = found.get("layout"), found.get("tokenizers", {})
        sizes = (*found.get("latent_shape", ()), *found.get("patch", ()), *(layout.edges if layout else ()))
        if min(sizes, default=1) < 1 or max(sizes, default=1) > MAX_SIZE:
            raise PackError(f"manifest.{part}: sizes {sizes!r:.80}; each is from 1 to {MAX_SIZE}")
        for name, tokenizer in tokenizers.items():
            if all(info.name != tokenizer.file for info in manifest.files) or not 0 < tokenizer.length <= MAX_SIZE:
                raise PackError(
                    f"manifest.prompts.tokenizers: {name!r:.60} is in no file of the pack, or has no length"
                )


def _check_graph(graph: Graph, names: set[str]) -> None:
    where = f"manifest.graphs: {graph.name!r:.100}"
    if graph.role not in SOURCES:
        raise PackError(f"{where} has role {graph.role!r:.40}; use one of {', '.join(SOURCES)}")
    if graph.file != f"{graph.name}.onnx" or graph.file not in names:
        raise PackError(f"{where} is said to be in {graph.file!r:.140}; it must be {graph.name}.onnx, one of the files")
    if (graph.role == "row") != (graph.structure is not None):
        raise PackError(f"{where}: graphs of role row have a structure, others have none")
    for side, sources in zip((graph.inputs, graph.outputs), SOURCES[graph.role], strict=True):
        _once((port.name for port in side), where)
        for port in side:
            _check_port(port, sources, where)
            _check_key(port, graph, where)
    needed = "signal" if graph.structure is not None and graph.structure.look else SOURCES[graph.role][1][0]
    if all(port.source != needed for port in graph.outputs):
        raise PackError(f"{where} has no output {needed!r}")


def _check_key(port: Port, graph: Graph, where: str) -> None:
    """What a row keeps, weighs or goes on from is what its structure says."""
    if graph.structure is None:
        return
    kept = port.source in ("kept", "kept_scale", "weights")
    if kept and port.key not in {each.name for each in graph.structure.kept}:
        raise PackError(f"{where}, {port.name!r:.100}: its structure keeps nothing named {port.key!r:.60}")
    if port.source == "hidden" and port in graph.inputs and not graph.structure.begin:
        raise PackError(f"{where}, {port.name!r:.100}: its structure goes on from no look")


def _check_port(port: Port, sources: tuple[str, ...], where: str) -> None:
    if port.dtype not in DTYPES:
        raise PackError(f"{where}, {port.name!r:.100}: dtype {port.dtype!r:.40}; use one of {', '.join(DTYPES)}")
    if port.source not in sources:
        raise PackError(f"{where}, {port.name!r:.100}: source {port.source!r:.40}; use one of {', '.join(sources)}")
    if any(size == "" if isinstance(size, str) else size < 0 for size in port.shape):
        raise PackError(f"{where}, {port.name!r:.100}: shape {port.shape!r:.100} has a size below 0 or without a name")


def _once(names: Any, where: str) -> None:
    listed = list(names)
    if len(set(listed)) != len(listed):
        double = next(name for n, name in enumerate(listed) if name in listed[:n])
        raise PackError(f"{where}: {double!r:.100} stands twice")


# --- readers, made from annotations -----------------------------------------------------------------------------------
def _reader(kind: Any) -> Reader:
    """What checks and freezes JSON data of an annotated type."""
    if is_dataclass(kind) and isinstance(kind, type):
        return _record(kind)
    origin, args = get_origin(kind), get_args(kind)
    if origin is tuple:
        return _tuple(args)
    if origin in (Union, types.UnionType):
        return _union(args)
    if origin is not None and issubclass(origin, Mapping):
        return _mapping(args[1])
    return _free if kind is Any else _scalar(kind)


@cache
def _record(cls: type) -> Reader:
    hints = get_type_hints(cls)
    needed = [e.name for e in fields(cls) if e.default is MISSING and e.default_factory is MISSING]
    readers = {name: _reader(hints[name]) for name in (each.name for each in fields(cls))}

    def read(value: Any, where: str) -> Any:
        data = _object(value, where)
        for name in (*needed, *data):
            if name not in readers:
                raise PackError(f"{where}: field {name!r:.60} is unknown; known: {', '.join(readers)}")
            if name not in data:
                raise PackError(f"{where}: field {name!r} is missing")
        return cls(**{name: readers[name](item, f"{where}.{name}") for name, item in data.items()})

    return read


def _tuple(args: tuple[Any, ...]) -> Reader:
    endless = args[-1] is Ellipsis
    readers = [_reader(kind) for kind in (args[:1] if endless else args)]

    def read(value: Any, where: str) -> tuple[Any, ...]:
        if type(value) is not list or not endless and len(value) != len(readers):
            raise PackError(f"{where}: {value!r:.60} is not a list{'' if endless else f' of {len(readers)}'}")
        each = readers * len(value) if endless else readers
        return tuple(one(item, f"{where}[{n}]") for n, (one, item) in enumerate(zip(each, value, strict=True)))

    return read


def _union(args: tuple[Any, ...]) -> Reader:
    def read(value: Any, where: str) -> Any:
        if value is None and type(None) in args:
            return None
        others = [kind for kind in args if kind is not type(None)]
        fitting = [kind for kind in others if type(value) is kind]
        return _reader((fitting or others)[0])(value, where)

    return read


def _mapping(kind: Any) -> Reader:
    reader = _reader(kind)

    def read(value: Any, where: str) -> dict[str, Any]:
        return {name: reader(item, f"{where}.{name:.60}") for name, item in _object(value, where).items()}

    return read


def _scalar(kind: Any) -> Reader:
    def read(value: Any, where: str) -> Any:
        if type(value) is not kind or kind is int and abs(value) > MAX_INT:
            raise PackError(f"{where}: {value!r:.60} is not {_SAID[kind]}")
        return value

    return read


_SAID: dict[Any, str] = {str: "a text", int: "an integer of at most 53 bits", float: "a float", bool: "true or false"}


def _free(value: Any, where: str) -> Any:
    """JSON of any form."""
    return value


def _object(value: Any, where: str) -> dict[str, Any]:
    if type(value) is not dict:
        raise PackError(f"{where}: {value!r:.60} is not an object")
    return value
