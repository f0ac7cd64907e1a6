"""The files of quantized weights: X.safetensors with the tensors, X.json beside it with everything else.

The description names every tensor with its shape, the SHA-256 of the tensor file and its own; nothing is used before
all of it has been checked. Tensors stay on disk until they are read (mapped). No code, no pickle; the fields are in
docs/quantized_weights.md.
"""

from __future__ import annotations

import json
import math
import mmap
import os
import stat
import tempfile
from collections.abc import Mapping
from contextlib import suppress
from hashlib import sha256
from os import PathLike
from pathlib import Path
from typing import Any, NoReturn

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from vivace import __version__
from vivace.errors import DtypeError, ModelError, OutputError, ShapeError
from vivace.models.quantized.weights import DTYPES, QuantizedLayer, QuantizedWeights

FORMAT, VERSION = "vivace-quantized-weights", 1
TENSORS, DESCRIPTION = ".safetensors", ".json"
MOST_TEXT = 64 << 20  # bytes of a description or a header; 100,000 layers take some 10 MB
MOST_NAME = 256  # characters
MOST_SIZE = 1 << 31  # rows or columns of a weight
STORED = {"int8": "I8", "fp8": "F8_E4M3"}  # name of a format's weights in safetensors
FIELDS = frozenset(
    ("format", "version", "numbers", "fingerprint", "tensors", "layers", "edges", "kept", "advice", "source", "sha256")
)


def paths_of(path: str | PathLike[str]) -> tuple[Path, Path]:
    """The tensor file and the description that `path` names, with either suffix or without."""
    path = Path(path)
    stem = path.with_suffix("") if path.suffix in (TENSORS, DESCRIPTION) else path
    return stem.with_name(stem.name + TENSORS), stem.with_name(stem.name + DESCRIPTION)


def looks_quantized(path: Path) -> bool:
    """Both files are there."""
    return all(file.is_file() for file in paths_of(path))


# --- writing ---------------------------------------------------------------------------------------------------------
def save_weights(weights: QuantizedWeights, path: str | PathLike[str]) -> None:
    """Write both files whole, or change nothing. Raises OutputError; ModelError for what would not read back."""
    tensor_file, description = paths_of(path)
    tensors = {f"{name}.{part}": t for name, layer in weights.layers.items() for part, t in layer.tensors.items()}
    _check_numbers("save", tensors)
    staged: dict[str, Path] = {}
    try:
        for target in (tensor_file, description):
            if target.is_dir():
                raise IsADirectoryError(None, "Is a directory", str(target))
            handle, name = tempfile.mkstemp(dir=target.parent, prefix=f".{target.name[:40]}.")
            os.close(handle)
            staged[name] = target
        first, second = map(Path, staged)
        save_file(_own(tensors), first, metadata={"format": "pt"})
        second.write_bytes(_text(weights, first.stat().st_size, _digest(first)))
        for name, target in list(staged.items()):
            _settle(name)
            os.replace(name, target)
            del staged[name]
    except (OSError, SafetensorError) as error:
        reason = getattr(error, "strerror", None) or error
        raise OutputError(f"{shown(tensor_file)}: cannot be written ({reason}); choose a writable place") from None
    finally:
        for name in staged:
            with suppress(OSError):
                os.unlink(name)


def _text(weights: QuantizedWeights, size: int, digest: str) -> bytes:
    """The description. Raises ModelError when it would not be read back."""
    data: dict[str, Any] = {
        "format": FORMAT,
        "version": VERSION,
        "numbers": weights.format,
        "fingerprint": weights.fingerprint,
        "tensors": {"bytes": size, "sha256": digest},
        "edges": [float(edge) for edge in weights.edges],
        "advice": dict(weights.advice),
        "source": {"versions": {"vivace": __version__, "torch": str(torch.__version__)}, **weights.source},
        "kept": dict(weights.kept),
        "layers": {
            name: {"shape": list(layer.weight.shape), "smooth": layer.smooth is not None}
            | {"static": layer.x_scale is not None}
            for name, layer in weights.layers.items()
        },
    }
    try:
        text = json.dumps({**data, "sha256": _seal(data)}, indent=1, allow_nan=False).encode()
        _described(_parse(text))
    except (TypeError, ValueError) as error:  # a ModelError too
        raise ModelError(f"save: the description cannot be written: {error}; see names, advice and source") from None
    return text


def _seal(data: Mapping[str, Any]) -> str:
    """SHA-256 (hex) of a description without its own."""
    rest = {name: value for name, value in data.items() if name != "sha256"}
    try:
        text = json.dumps(rest, sort_keys=True, separators=(",", ":"), allow_nan=False)
    except RecursionError:
        raise ModelError("is nested too deep; it was edited or damaged: copy it again") from None
    return sha256(text.encode()).hexdigest()


def _own(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Contiguous tensors on the CPU; those that share memory, or lie in a larger piece of it, as copies."""
    found, seen = {}, set()
    for name, tensor in tensors.items():
        kept = tensor.detach().cpu().contiguous()
        if kept.untyped_storage().nbytes() != kept.nbytes or kept.data_ptr() in seen:
            kept = kept.clone()
        seen.add(kept.data_ptr())
        found[name] = kept
    return found


def _settle(name: str) -> None:
    """The bytes of a finished temporary file on the disk, its mode that of any file."""
    with open(name, "rb") as file:
        os.fsync(file.fileno())
    os.chmod(name, 0o644)


# --- reading ---------------------------------------------------------------------------------------------------------
def load_weights(path: str | PathLike[str]) -> QuantizedWeights:
    """The weights of both files, tensors mapped. Raises ModelError: which file, what is wrong, what to do."""
    tensor_file, description = paths_of(path)
    try:
        data = _described(_parse(_read(description)))
    except ModelError as error:
        raise ModelError(f"{shown(description)}: {error}") from None
    try:
        tensors = _tensors(tensor_file, data)
        layers = {
            name: QuantizedLayer(**{part: tensors[f"{name}.{part}"] for part in _parts(entry)})
            for name, entry in data["layers"].items()
        }
        return QuantizedWeights(
            format=data["numbers"],
            fingerprint=data["fingerprint"],
            layers=layers,
            edges=tuple(data["edges"]),
            kept=data["kept"],
            advice=data["advice"],
            source=data["source"],
        )
    except (ModelError, ShapeError, DtypeError) as error:
        raise ModelError(f"{shown(tensor_file)}: {error}") from None
    except (OSError, SafetensorError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise ModelError(f"{shown(tensor_file)}: cannot be read ({reason!s:.200}); copy both files again") from None


def _read(path: Path) -> bytes:
    """Bytes of a regular file of bounded size; never waits for a pipe."""
    try:
        with open(path, "rb", opener=_opener) as file:
            status = os.fstat(file.fileno())
            if not stat.S_ISREG(status.st_mode) or status.st_size > MOST_TEXT:
                raise ModelError(f"has {status.st_size} bytes or is no regular file; need a description in JSON")
            return file.read(MOST_TEXT)
    except FileNotFoundError:
        raise ModelError(f"no such file; quantized weights are a {TENSORS} with a {DESCRIPTION} beside it") from None
    except (OSError, ValueError) as error:  # ValueError: a name with NUL
        raise ModelError(f"cannot be read ({getattr(error, 'strerror', None) or error})") from None


def _opener(name: str, flags: int) -> int:
    return os.open(name, flags | getattr(os, "O_NONBLOCK", 0))


def _parse(raw: bytes) -> Any:
    """Strict JSON: UTF-8, no duplicate keys, no NaN or Infinity, finite floats."""
    try:
        return json.loads(raw.decode("utf-8"), object_pairs_hook=_unique, parse_constant=_refuse, parse_float=_finite)
    except (ValueError, RecursionError) as error:
        raise ModelError(f"is damaged, or not JSON ({str(error) or 'nested too deep'!s:.120}); copy it again") from None


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("a key stands twice in one object")
    return found


def _refuse(name: str) -> NoReturn:
    raise ValueError(f"{name} is no number")


def _finite(text: str) -> float:
    value = float(text)
    if math.isinf(value):
        raise ValueError(f"{text[:40]} is beyond float64")
    return value


def _described(data: Any) -> dict[str, Any]:
    """A description, checked field by field. Raises ModelError."""
    if not isinstance(data, dict) or data.get("format") != FORMAT:
        raise ModelError(f"is no description of quantized weights (need an object with format {FORMAT!r})")
    if (version := data.get("version")) != VERSION or type(version) is not int:
        raise ModelError(f"has version {version!r:.40}; this release reads {VERSION}; quantize the model again")
    for name in sorted(data.keys() ^ FIELDS):
        what = "is missing" if name in FIELDS else "is unknown"
        raise ModelError(f"field {name!r:.60} {what}; it is of another release, or was edited: quantize again")
    if data["numbers"] not in tuple(DTYPES):
        raise ModelError(f"numbers are {data['numbers']!r:.40}; need one of {', '.join(DTYPES)}")
    _need(_is_name(data["fingerprint"]), "fingerprint", data["fingerprint"], "the model's hash")
    _need(_is_file(data["tensors"]), "tensors", data["tensors"], "{bytes, sha256}")
    for name in ("layers", "kept", "advice", "source"):
        _need(isinstance(data[name], dict), name, data[name], "an object")
    for name, entry in data["layers"].items():
        _need(_is_name(name) and _is_layer(entry), f"layers {name!r:.60}", entry, "{shape: [N, K], smooth, static}")
    for name, why in data["kept"].items():
        _need(_is_name(name) and isinstance(why, str) and name not in data["layers"], f"kept {name!r:.60}", why, "why")
    edges = data["edges"]
    numbers = isinstance(edges, list) and all(type(edge) is float for edge in edges)
    ascending = numbers and all(low < high for low, high in zip(edges, edges[1:], strict=False))
    _need(ascending, "edges", edges, "ascending floats")
    if data["sha256"] != _seal(data):
        raise ModelError("was edited or damaged (its own SHA-256 is another); copy both files again, or quantize again")
    return data


def _need(fits: bool, field: str, value: Any, needs: str) -> None:
    if not fits:
        raise ModelError(f"{field} is {value!r:.80}; need {needs}; the file was edited or damaged: copy it again")


def _is_name(value: Any) -> bool:
    return isinstance(value, str) and 0 < len(value) <= MOST_NAME and value.isprintable()


def _is_file(value: Any) -> bool:
    if not isinstance(value, dict) or value.keys() != {"bytes", "sha256"} or type(value["bytes"]) is not int:
        return False
    return isinstance(value["sha256"], str) and len(value["sha256"]) == 64


def _is_layer(value: Any) -> bool:
    if not isinstance(value, dict) or value.keys() != {"shape", "smooth", "static"}:
        return False
    shape = value["shape"]
    sizes = isinstance(shape, list) and len(shape) == 2 and all(type(n) is int and 0 < n < MOST_SIZE for n in shape)
    return sizes and type(value["smooth"]) is bool and type(value["static"]) is bool


def _parts(entry: Mapping[str, Any]) -> tuple[str, ...]:
    """Names of a layer's tensors."""
    return ("weight", "weight_scale", *(["smooth"] * entry["smooth"]), *(["x_scale"] * entry["static"]))


def _tensors(path: Path, data: Mapping[str, Any]) -> dict[str, Tensor]:
    """The tensors, mapped, of exactly the file that the description names. Raises ModelError, OSError."""
    size, told = path.stat().st_size if path.is_file() else -1, data["tensors"]
    if size < 0:
        raise ModelError(f"no such file; the description beside it needs it: copy both {TENSORS} and {DESCRIPTION}")
    if size != told["bytes"]:
        raise ModelError(f"has {size} bytes, the description says {told['bytes']}; cut short or of other weights")
    if (got := _digest(path)) != told["sha256"]:
        raise ModelError(
            f"its SHA-256 is {got[:12]}, the description says {told['sha256']!r:.14}; edited, damaged or of other "
            "weights: copy both files again"
        )
    wanted = _wanted(data)
    _check_header(path, size, wanted)
    with safe_open(path, framework="pt") as file:
        tensors = {name: file.get_tensor(name) for name in wanted}
    _check_numbers("it", tensors)
    return tensors


def _wanted(data: Mapping[str, Any]) -> dict[str, tuple[str, list[int]]]:
    """dtype and shape of every tensor, by name."""
    found, groups = {}, len(data["edges"]) + 1
    for name, entry in data["layers"].items():
        columns, depth = entry["shape"]
        sizes = {"weight": [columns, depth], "weight_scale": [columns], "smooth": [depth], "x_scale": [groups]}
        for part in _parts(entry):
            found[f"{name}.{part}"] = (STORED[data["numbers"]] if part == "weight" else "F32", sizes[part])
    return found


def _check_header(path: Path, size: int, wanted: Mapping[str, tuple[str, list[int]]]) -> None:
    """The header names these tensors and no others; lengths and offsets are the library's to check."""
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if length > min(MOST_TEXT, size - 8):
            raise ModelError(f"is damaged (a header of {length} bytes in {size}); copy both files again")
        header = _parse(file.read(length))
    if not isinstance(header, dict) or not all(isinstance(entry, dict) for entry in header.values()):
        raise ModelError("is damaged (its header is no object of objects); copy both files again")
    header.pop("__metadata__", None)
    for name in sorted(header.keys() ^ wanted.keys()):
        what = "is missing" if name in wanted else "is not in the description"
        raise ModelError(f"tensor {name!r:.80} {what}; the two files do not belong together")
    for name, (dtype, shape) in wanted.items():
        if (got := (header[name].get("dtype"), header[name].get("shape"))) != (dtype, shape):
            raise ModelError(f"tensor {name!r:.80} is {got!r:.60}, the description says {(dtype, shape)}")


def _check_numbers(who: str, tensors: Mapping[str, Tensor]) -> None:
    """Scales and factors are positive and finite."""
    for name, tensor in tensors.items():
        if not name.endswith(".weight") and not bool(((tensor > 0) & tensor.isfinite()).all()):
            raise ModelError(f"{who}: tensor {name!r:.80} holds NaN, infinity or a number that is not positive")


def _digest(path: Path) -> str:
    """SHA-256 (hex) of a file."""
    if not path.stat().st_size:
        return sha256().hexdigest()
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as mapped:
        return sha256(mapped).hexdigest()


def shown(path: Path) -> str:
    """A path on one line, whatever its name."""
    text = str(path)
    return text if text.isprintable() else ascii(text)
