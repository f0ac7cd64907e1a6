"""Plan files: strict JSON with a version, a safetensors side-car for tensors, a hash. No code, no pickle."""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load as load_tensors
from safetensors.numpy import save as save_tensors

from vivace.engine import plan as p
from vivace.engine.plan_codec import FORMAT, VERSION, decode, encode_fields, parse
from vivace.engine.verify import verify
from vivace.errors import OutputError, PlanFileError

MAX_BYTES = 64 << 20  # of the JSON; a 1,000-row plan of order 3 has about 0.5 MiB
SIDE_CAR = ".safetensors"


def canonical(plan: p.Plan) -> bytes:
    """The one byte string of a plan: sorted keys, no blanks, shortest float64. Side-car by its hashes."""
    data = {"format": FORMAT, "version": VERSION, **encode_fields(plan)}
    return json.dumps(data, sort_keys=True, separators=(",", ":"), allow_nan=False).encode()


def plan_hash(plan: p.Plan) -> str:
    """SHA-256 of the canonical JSON; it holds the hash of every side-car tensor, so the bytes are covered."""
    return hashlib.sha256(canonical(plan)).hexdigest()


def tensor_infos(arrays: Mapping[str, Any]) -> tuple[p.TensorInfo, ...]:
    """Descriptions of side-car arrays, sorted by key."""
    return tuple(
        p.TensorInfo(key, tuple(int(n) for n in array.shape), array.dtype.name, _sha(array))
        for key, array in sorted((key, np.asarray(array)) for key, array in arrays.items())
    )


def _sha(array: Any) -> str:
    little = np.ascontiguousarray(array, dtype=array.dtype.newbyteorder("<"))
    return hashlib.sha256(little.tobytes()).hexdigest()


def save_plan(plan: p.Plan, path: str | os.PathLike[str]) -> None:
    """Write `path` and, when the plan has tensors, the side-car beside it; both appear whole or not at all."""
    verify(plan)
    path = Path(path)
    data = {"format": FORMAT, "version": VERSION, **encode_fields(plan)}
    steps = ",\n  ".join(json.dumps(step, allow_nan=False) for step in data.pop("steps"))
    head = json.dumps(data, indent=1, allow_nan=False).removesuffix("\n}")
    text = f'{head},\n "steps": [\n  {steps}\n ]\n}}\n'
    if plan.tensors:
        arrays = {info.key: np.ascontiguousarray(plan.arrays[info.key]) for info in plan.tensors}
        write_atomic(path.with_suffix(SIDE_CAR), save_tensors(arrays))
    write_atomic(path, text.encode())


def write_atomic(path: Path, data: bytes) -> None:
    """Write a file by renaming a finished temporary one beside it. Raises OutputError; leaves nothing half-written."""
    name = ""
    try:
        with tempfile.NamedTemporaryFile(dir=path.parent, prefix=f".{path.name}.", delete=False) as file:
            name = file.name
            file.write(data)
        os.chmod(name, 0o644)
        os.replace(name, path)
    except OSError as error:
        with suppress(OSError):
            os.unlink(name)
        raise OutputError(f"{path}: cannot be written ({error.strerror}); choose a writable place") from None


def load_plan(path: str | os.PathLike[str]) -> p.Plan:
    """Read, check and verify a plan file with its side-car."""
    path = Path(path)
    try:
        if path.stat().st_size > MAX_BYTES:
            raise PlanFileError(f"{path}: {path.stat().st_size} bytes; a plan has at most {MAX_BYTES}")
        raw = path.read_bytes()
    except OSError as error:
        raise PlanFileError(f"{path}: cannot be read ({error.strerror})") from None
    try:
        plan = decode(parse(raw))
        arrays = _load_side_car(path.with_suffix(SIDE_CAR), plan.tensors) if plan.tensors else {}
        object.__setattr__(plan, "arrays", arrays)
        return verify(plan)
    except PlanFileError as error:
        raise PlanFileError(f"{path}: {error}") from None


def _load_side_car(path: Path, infos: tuple[p.TensorInfo, ...]) -> dict[str, Any]:
    try:
        arrays = load_tensors(path.read_bytes())
    except OSError as error:
        raise PlanFileError(f"side-car {path.name} cannot be read ({error.strerror})") from None
    except SafetensorError as error:
        raise PlanFileError(f"side-car {path.name} is damaged ({error})") from None
    wanted = {info.key: info for info in infos}
    if arrays.keys() != wanted.keys():
        raise PlanFileError(f"side-car {path.name} holds {sorted(arrays)}, the plan names {sorted(wanted)}")
    for key, info in wanted.items():
        got = tensor_infos({key: arrays[key]})[0]
        if got != info:
            raise PlanFileError(f"side-car {path.name}: tensor {key!r} is {got}, the plan says {info}")
        if not np.isfinite(arrays[key]).all():
            raise PlanFileError(f"side-car {path.name}: tensor {key!r} holds NaN or infinity")
    return arrays
