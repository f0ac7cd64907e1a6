"""Checkpoint folders: JSON and safetensors in, errors that name the path; folders written all or nothing.

Headers, hashes and JSON need no torch; tensors do.
"""

from __future__ import annotations

import json
import mmap
import os
import shutil
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from hashlib import sha256
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors import SafetensorError, safe_open

from vivace.errors import ModelError, OutputError

if TYPE_CHECKING:
    from torch import Tensor

STEM = "diffusion_pytorch_model"
PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl")
FLOATS = ("F16", "BF16", "F32", "F64")  # dtypes of safetensors that weights may have


def read_json(path: Path) -> Any:
    """Parse a JSON file. Raises ModelError that names the path."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ModelError(f"{path}: no such file; a model folder in the diffusers format has it") from None
    except (OSError, ValueError) as error:
        raise ModelError(f"{path}: cannot be read as JSON ({error}); copy or download the file again") from None


def read_object(path: Path) -> dict[str, Any]:
    """Parse a JSON file that holds an object. Raises ModelError."""
    value = read_json(path)
    if not isinstance(value, dict):
        raise ModelError(f"{path}: holds a JSON {type(value).__name__}; need an object of fields")
    return value


def weight_files(folder: Path, stem: str = STEM) -> tuple[Path, ...]:
    """The safetensors files of a folder: one file, or the shards that an index names. Raises ModelError."""
    index = folder / f"{stem}.safetensors.index.json"
    if index.is_file():
        return _shards(folder, index)
    for name in (f"{stem}.safetensors", f"{stem}.fp16.safetensors"):
        if (folder / name).is_file():
            return (folder / name,)
    pickles = sorted(file.name for pattern in PICKLES for file in folder.glob(pattern))
    if pickles:
        raise ModelError(
            f"{folder}: only pickled weights ({pickles[0]}), which can run code when opened; convert them once: "
            "diffusers.DiTTransformer2DModel.from_pretrained(folder, use_safetensors=False).save_pretrained(folder)"
        )
    raise ModelError(f"{folder / (stem + '.safetensors')}: no such file; need the weights beside config.json")


def read_tensors(folder: Path) -> dict[str, Tensor]:
    """All tensors of a folder, as stored, on the CPU. Raises ModelError."""
    tensors: dict[str, Tensor] = {}
    for path in weight_files(folder):
        read_header(path)
        try:
            with safe_open(path, framework="pt") as file:
                names = list(file.keys())
                tensors.update((name, file.get_tensor(name)) for name in names)
        except (SafetensorError, OSError) as error:
            raise _damaged(path, error) from None
    return tensors


def read_header(path: Path) -> tuple[int, dict[str, dict[str, Any]]]:
    """Offset of the data and {name: {dtype, shape, data_offsets}} of a safetensors file. Raises ModelError."""
    try:
        with safe_open(path, framework="np"):  # checks lengths, offsets and shapes
            pass
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            entries = json.loads(file.read(length))
    except (SafetensorError, OSError, ValueError) as error:
        raise _damaged(path, error) from None
    entries.pop("__metadata__", None)
    for name, entry in entries.items():
        if entry["dtype"] not in FLOATS:
            raise ModelError(f"{path}: tensor {name} is {entry['dtype']}; need one of {', '.join(FLOATS)}")
    return 8 + length, entries


def fingerprint(config: Mapping[str, Any], files: Iterable[Path]) -> str:
    """SHA-256 (hex) of a configuration and of the tensors as stored; independent of file names, order and shards."""
    digest = sha256(json.dumps(config, sort_keys=True, separators=(",", ":")).encode())
    where: dict[str, tuple[Path, int, dict[str, Any]]] = {}
    for path in files:
        start, entries = read_header(path)
        where.update((name, (path, start, entry)) for name, entry in entries.items())
    maps = {path: _map(path) for path, _, _ in where.values()}
    for name in sorted(where):
        path, start, entry = where[name]
        digest.update(f"\0{name}\0{entry['dtype']}\0{entry['shape']}\0".encode())
        begin, end = entry["data_offsets"]
        digest.update(memoryview(maps[path])[start + begin : start + end])
    return digest.hexdigest()


def write_model(folder: Path, config: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
    """Write config.json and one safetensors file, replacing an earlier model there. Raises OutputError."""
    from safetensors.torch import save_file

    with replacing(folder, allowed=("config.json", f"{STEM}*", "README.md")) as work:
        (work / "config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")
        save_file(dict(tensors), work / f"{STEM}.safetensors", metadata={"format": "pt"})


@contextmanager
def replacing(folder: Path, allowed: Iterable[str]) -> Iterator[Path]:
    """A fresh folder beside `folder` that takes its place when the body succeeds; else nothing changes.

    An existing folder is replaced only when all its files match `allowed` (glob patterns). Raises OutputError.
    """
    folder = Path(os.path.abspath(folder))
    _check_replaceable(folder, tuple(allowed))
    work = None
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        work = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
        work.chmod(0o755)
        yield work
        _swap(work, folder)
    except (OSError, SafetensorError) as error:
        raise OutputError(f"{folder}: cannot be written ({error}); nothing was changed") from error
    finally:
        if work is not None:
            shutil.rmtree(work, ignore_errors=True)


def _swap(work: Path, folder: Path) -> None:
    """Rename `work` to `folder`; an older `folder` is set aside first and put back when that fails."""
    if not folder.exists():
        work.rename(folder)
        return
    aside = Path(tempfile.mkdtemp(prefix=f".{folder.name}-old-", dir=folder.parent))
    try:
        folder.rename(aside / "model")
        try:
            work.rename(folder)
        except OSError:
            (aside / "model").rename(folder)
            raise
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def _check_replaceable(folder: Path, allowed: tuple[str, ...]) -> None:
    """Refuse to replace a file, or a folder that holds something else than a model."""
    if not folder.exists():
        return
    if not folder.is_dir():
        raise OutputError(f"{folder}: is a file; name a folder to write the model to")
    others = sorted(entry.name for entry in folder.iterdir() if not any(entry.match(p) for p in allowed))
    if others:
        raise OutputError(f"{folder}: holds other files ({', '.join(others[:3])}); name a new or empty folder")


def _shards(folder: Path, index: Path) -> tuple[Path, ...]:
    """Files named by an index, each present, together holding every tensor it lists."""
    where = read_object(index).get("weight_map")
    if not isinstance(where, dict) or not all(isinstance(name, str) for name in where.values()):
        raise ModelError(f"{index}: has no weight_map of tensor names to files; copy or download it again")
    paths = tuple(folder / name for name in sorted(set(where.values())))
    for path in paths:
        if path.parent != folder:
            raise ModelError(f"{index}: names {path}; shards lie beside their index")
        if not path.is_file():
            raise ModelError(f"{path}: no such file; {index.name} names it, copy all shards")
    found = {name for path in paths for name in read_header(path)[1]}
    lost = sorted(set(where) - found)
    if lost:
        raise ModelError(f"{index}: tensors in no shard: {', '.join(lost[:3])}; copy the shards again")
    return paths


def _map(path: Path) -> mmap.mmap:
    """A file as read-only memory."""
    with path.open("rb") as file:
        return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)


def _damaged(path: Path, error: Exception) -> ModelError:
    """The error for a weights file that cannot be parsed."""
    return ModelError(f"{path}: damaged, or not a safetensors file ({error}); copy or download it again")
