"""Plan files: strict JSON with a version, a safetensors side-car for tensors, a hash. No code, no pickle."""

from __future__ import annotations

import hashlib
import json
import math
import os
import stat
import tempfile
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load as load_tensors
from safetensors.numpy import save as save_tensors

from vivace.engine import plan as p
from vivace.engine.plan_codec import FORMAT, VERSION, decode, encode_fields, parse
from vivace.engine.verify import DTYPES, verify
from vivace.errors import OutputError, PlanError, PlanFileError

MAX_BYTES = 8 << 20  # of the JSON; a 1,000-row plan of order 3 has about 0.5 MiB
MAX_HEADER = 1 << 20  # of the side-car: 1,024 tensors take about 0.3 MiB
SIDE_CAR = ".safetensors"


def canonical(plan: p.Plan) -> bytes:
    """The one byte string of a plan: sorted keys, no blanks, shortest float64. Side-car by its hashes."""
    data = {"format": FORMAT, "version": VERSION, **encode_fields(plan)}
    return json.dumps(data, sort_keys=True, separators=(",", ":"), allow_nan=False).encode()


def plan_hash(plan: p.Plan) -> str:
    """SHA-256 of the canonical JSON; it holds the hash of every side-car tensor, so the bytes are covered."""
    return hashlib.sha256(canonical(plan)).hexdigest()


def tensor_infos(arrays: Mapping[str, Any]) -> tuple[p.TensorInfo, ...]:
    """Descriptions of side-car arrays, sorted by key. Raises PlanError for values that are not finite."""
    for key, array in arrays.items():
        if not np.isfinite(array).all():
            raise PlanError(
                f"plan: side-car tensor {key!r} holds NaN or infinity; what it was measured from is too coarse"
            )
    return tuple(
        p.TensorInfo(key, tuple(int(n) for n in array.shape), array.dtype.name, _sha(array))
        for key, array in sorted((key, np.asarray(array)) for key, array in arrays.items())
    )


def with_tensors(plan: p.Plan, arrays: Mapping[str, Any]) -> p.Plan:
    """The plan with these arrays in its side-car too. Raises PlanError for a key it has already."""
    if taken := sorted(arrays.keys() & plan.arrays.keys()):
        raise PlanError(f"plan: its side-car has a tensor {taken[0]!r} already; name another key")
    merged = {**plan.arrays, **arrays}
    return replace(plan, tensors=tensor_infos(merged), arrays=merged)


def _sha(array: Any) -> str:
    little = np.ascontiguousarray(array, dtype=array.dtype.newbyteorder("<"))
    return hashlib.sha256(little.tobytes()).hexdigest()


def save_plan(plan: p.Plan, path: str | os.PathLike[str]) -> None:
    """Write `path` and, when the plan has tensors, the side-car beside it; both whole, and fit to be loaded again."""
    verify(plan)
    path = Path(path)
    text = _text(plan)
    files: dict[Path, bytes] = {}
    if plan.tensors:
        if path.suffix == SIDE_CAR:
            raise OutputError(f"{_shown(path)}: {SIDE_CAR} is the name of the side-car; name the plan .json")
        if tensor_infos(plan.arrays) != tuple(sorted(plan.tensors, key=lambda info: info.key)):
            raise PlanError("plan: `tensors` and `arrays` do not match; make the former with tensor_infos(arrays)")
        arrays = {key: np.ascontiguousarray(array) for key, array in plan.arrays.items()}
        files[path.with_suffix(SIDE_CAR)] = save_tensors(arrays)
    write_files({**files, path: text})


def _text(plan: p.Plan) -> bytes:
    """The file of a plan, one line a row. Raises PlanError when it would not read back as the same plan."""
    try:
        data = {"format": FORMAT, "version": VERSION, **encode_fields(plan)}
        steps = ",\n  ".join(json.dumps(step, allow_nan=False) for step in data.pop("steps"))
        head = json.dumps(data, indent=1, allow_nan=False).removesuffix("\n}")
        text = f'{head},\n "steps": [\n  {steps}\n ]\n}}\n'.encode()
        if len(text) > MAX_BYTES:
            raise PlanFileError(f"{len(text)} bytes; at most {MAX_BYTES} are read")
        same = canonical(decode(parse(text))) == canonical(plan)
    except (PlanFileError, TypeError, ValueError) as error:
        raise PlanError(f"plan: it cannot be written as a file ({error}); see its recipe and field types") from None
    if not same:
        raise PlanError("plan: a file of it would read back as another plan; see the field types")
    return text


def write_atomic(path: Path, data: bytes) -> None:
    """Write a file by renaming a finished temporary one beside it. Raises OutputError; leaves nothing half-written."""
    write_files({path: data})


def write_files(files: Mapping[Path, bytes]) -> None:
    """Write files as finished temporary ones, then rename all. Raises OutputError; leaves nothing half-written."""
    staged: dict[str, Path] = {}
    path = next(iter(files))
    try:
        for path, data in files.items():
            if path.is_dir():
                raise IsADirectoryError(None, "Is a directory")
            with tempfile.NamedTemporaryFile(dir=path.parent, prefix=f".{path.name[:40]}.", delete=False) as file:
                staged[file.name] = path
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            os.chmod(file.name, 0o644)
        for name, path in list(staged.items()):
            os.replace(name, path)
            del staged[name]
    except (OSError, ValueError) as error:  # ValueError: a name with NUL
        reason = getattr(error, "strerror", None) or error
        raise OutputError(f"{_shown(path)}: cannot be written ({reason}); choose a writable place") from None
    finally:
        for name in staged:
            with suppress(OSError):
                os.unlink(name)


def load_plan(path: str | os.PathLike[str]) -> p.Plan:
    """Read, check and verify a plan file with its side-car. Raises PlanFileError or PlanError, naming the file."""
    path = Path(path)
    try:
        plan = verify(decode(parse(_read(path, MAX_BYTES))))
        if plan.tensors:
            object.__setattr__(plan, "arrays", _load_side_car(path.with_suffix(SIDE_CAR), plan.tensors))
        return plan
    except PlanError as error:
        raise type(error)(f"{_shown(path)}: {error}") from None


def _shown(path: Path) -> str:
    """A path on one line, whatever its name."""
    text = str(path)
    return text if text.isprintable() else ascii(text)


def _read(path: Path, limit: int) -> bytes:
    """Bytes of a regular file. Never waits for a pipe, never reads an endless device or more than `limit`."""

    def opener(name: str, flags: int) -> int:
        return os.open(name, flags | getattr(os, "O_NONBLOCK", 0))

    try:
        with open(path, "rb", opener=opener) as file:
            status = os.fstat(file.fileno())
            regular = stat.S_ISREG(status.st_mode)
            data = file.read(limit + 1) if regular and status.st_size <= limit else b""
    except (OSError, ValueError) as error:  # ValueError: a name with NUL
        raise PlanFileError(f"cannot be read ({getattr(error, 'strerror', None) or error})") from None
    if not regular:
        raise PlanFileError("cannot be read (not a regular file)")
    if max(status.st_size, len(data)) > limit:
        raise PlanFileError(f"has {max(status.st_size, len(data))} bytes; at most {limit} are expected")
    return data


def _load_side_car(path: Path, infos: tuple[p.TensorInfo, ...]) -> dict[str, Any]:
    """Tensors of the side-car, which must be exactly those that the plan describes."""
    size = sum(DTYPES[info.dtype] * math.prod(info.shape) for info in infos)
    try:
        raw = _read(path, 8 + MAX_HEADER + size)
        _check_header(raw, infos)
        arrays = load_tensors(raw)
        for info in infos:
            array = arrays[info.key]
            if _sha(array) != info.sha256:
                raise PlanFileError(f"tensor {info.key!r} has other bytes than the plan's SHA-256 says")
            if not np.isfinite(array).all():
                raise PlanFileError(f"tensor {info.key!r} holds NaN or infinity")
    except PlanFileError as error:
        raise PlanFileError(f"side-car {_shown(Path(path.name))}: {error}") from None
    except SafetensorError as error:
        raise PlanFileError(f"side-car {_shown(Path(path.name))}: it is damaged ({str(error)!r:.200})") from None
    return dict(arrays)


def _check_header(raw: bytes, infos: tuple[p.TensorInfo, ...]) -> None:
    """The header names the plan's tensors and no others, with their dtypes and shapes; offsets are the library's."""
    length = int.from_bytes(raw[:8], "little")
    if len(raw) < 8 or length > min(MAX_HEADER, len(raw) - 8):
        raise PlanFileError(f"it is damaged ({len(raw)} bytes, a header of {length} bytes)")
    try:
        header = parse(raw[8 : 8 + length])
    except PlanFileError as error:
        raise PlanFileError(f"it is damaged (header: {error})") from None
    if not isinstance(header, dict) or not all(isinstance(entry, dict) for entry in header.values()):
        raise PlanFileError("it is damaged (header: not an object of objects)")
    header.pop("__metadata__", None)
    wanted = {info.key for info in infos}
    for key in sorted(header.keys() ^ wanted):
        raise PlanFileError(f"tensor {key!r:.60} is {'missing' if key in wanted else 'not named by the plan'}")
    for info in infos:
        got = (header[info.key].get("dtype"), header[info.key].get("shape"))
        want = (f"F{8 * DTYPES[info.dtype]}", list(info.shape))
        if got != want:
            raise PlanFileError(f"tensor {info.key!r} is {got!r:.80}, the plan says {want!r:.80}")
