"""Writing a pack: graphs made in memory, their weights in one file, all of it or nothing."""

from __future__ import annotations

import hashlib
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from safetensors.numpy import save

from vivace.engine.plan import Plan
from vivace.errors import OutputError, PackError, UnsupportedError
from vivace.export.flat_program import NAME as PROGRAM
from vivace.export.flat_program import flat_program
from vivace.export.weights import Place, WeightStore, is_external, place_of, point
from vivace.runtime.calls import Structure
from vivace.runtime.manifest import GOLDENS, NAME, PLAN, WEIGHTS, FileInfo, Graph, Manifest, Port
from vivace.runtime.manifest_io import FILE_NAME, encode
from vivace.runtime.pack import is_pack, open_pack


@dataclass(frozen=True, slots=True)
class MadeGraph:
    """A graph in memory. name: of lower-case letters, digits, ".", "-" and "_", its file is `name`.onnx; role: one of
    `manifest.SOURCES`; model: its weights from a `WeightStore`; structure: of role "row" what it computes."""

    name: str
    role: str
    model: onnx.ModelProto
    inputs: tuple[Port, ...]
    outputs: tuple[Port, ...]
    structure: Structure | None = None

    @property
    def file(self) -> str:
        """Its name in a pack."""
        return f"{self.name}.onnx"

    def described(self) -> Graph:
        """What the manifest says of it."""
        return Graph(self.name, self.file, self.role, self.inputs, self.outputs, self.structure)


def check_out(out: str | os.PathLike[str], overwrite: bool) -> None:
    """Whether a pack may be written to this folder: a new one, or with `overwrite` one that holds a pack.

    Raises OutputError, so that an export can refuse before it works.
    """
    out = Path(out)
    if not out.parent.is_dir():
        raise OutputError(f"{out}: there is no folder {out.parent}; make it first")
    if os.path.lexists(out) and not (overwrite and is_pack(out)):
        ask = "use --overwrite, or overwrite=True, where it is a pack"
        reason = "it holds no pack, so it is not overwritten" if overwrite else ask
        raise OutputError(f"{out}: exists already ({reason}); name another folder")


def write_pack(
    out: str | os.PathLike[str],
    *,
    graphs: Sequence[MadeGraph],
    store: WeightStore,
    plan: Plan,
    goldens: Mapping[str, Any],
    model: Mapping[str, Any],
    prompts: Mapping[str, Any],
    precision: Mapping[str, Any],
    opset: int,
    tolerance: float,
    weights: Mapping[str, int],
    versions: Mapping[str, str] | None = None,
    extra: Mapping[str, bytes] | None = None,
    metadata: Mapping[str, str] | None = None,
    overwrite: bool = False,
) -> Manifest:
    """Write a pack, all of it or nothing: it is made beside `out`, checked as `open_pack` does, and renamed.

    plan: bound; goldens: numpy arrays by name, and metadata: of their header; extra: further files by name; the rest:
    fields of `Manifest`. The same arguments give the same bytes. Raises OutputError (the folder exists, the disk is
    full), PackError (parts that do not fit together).
    """
    check_out(out, overwrite)
    draft = Manifest(model, prompts, precision, plan.hash, opset, (), (), tolerance, weights, versions or {})
    described = tuple(graph.described() for graph in graphs)
    with new_folder(out) as folder:
        write_graphs(folder, graphs, store)
        plan.save(folder / PLAN)
        if goldens:
            arrays = {name: np.ascontiguousarray(goldens[name]) for name in sorted(goldens)}
            (folder / GOLDENS).write_bytes(save(arrays, dict(sorted((metadata or {}).items()))))
        with suppress(UnsupportedError):
            (folder / PROGRAM).write_text(flat_program(plan, described, prompts))
        for name, data in (extra or {}).items():
            _new(folder, name).write_bytes(data)
        files = tuple(_described(path) for path in sorted(folder.iterdir()))
        made = replace(draft, graphs=described, files=files)
        (folder / NAME).write_bytes(encode(made))
        return open_pack(folder, check=False).manifest


@contextmanager
def new_folder(out: str | os.PathLike[str]) -> Iterator[Path]:
    """A temporary folder beside `out` to write into, renamed to it when that went well, else taken away.

    A folder that is there already is replaced, behind a link the one that it points to. Raises OutputError in place of
    OSError.
    """
    out = Path(os.path.realpath(out))
    folder = None
    try:
        folder = Path(tempfile.mkdtemp(prefix=f".{out.name[:40]}.", dir=out.parent))
        yield folder
        _settle(folder)
        _put(folder, out)
    except OutputError:
        raise
    except OSError as error:
        reason = f"cannot be written ({error.strerror or error}); choose a place with room that is writable"
        raise OutputError(f"{out}: {reason}") from None
    finally:
        if folder is not None:
            shutil.rmtree(folder, ignore_errors=True)


def _new(folder: Path, name: str) -> Path:
    """The path of a further file, whose name must be one of its own, without folders."""
    path = folder / name
    if not FILE_NAME.fullmatch(name) or name == NAME or path.exists():
        raise PackError(f"a file {name!r:.140} cannot be added to a pack: it needs a name of its own, without folders")
    return path


def _described(path: Path) -> FileInfo:
    with open(path, "rb") as file:
        return FileInfo(path.name, path.stat().st_size, hashlib.file_digest(file, "sha256").hexdigest())


def _settle(folder: Path) -> None:
    """Everything on the disk, and readable as files that one writes oneself are."""
    for path in (*folder.rglob("*"), folder):
        path.chmod(0o755 if path.is_dir() else 0o644)
        handle = os.open(path, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def _put(folder: Path, out: Path) -> None:
    """Rename the finished folder, in place of an older pack if there is one."""
    if not os.path.lexists(out):
        folder.rename(out)
        return
    older = folder.with_name(f"{folder.name}.older")
    out.rename(older)
    try:
        folder.rename(out)
    except OSError:
        older.rename(out)
        raise
    shutil.rmtree(older, ignore_errors=True)


def write_graphs(folder: str | os.PathLike[str], graphs: Sequence[MadeGraph], store: WeightStore) -> None:
    """Write graphs and the one weights file that they point into, in order of first use, without what none reads.

    Same graphs, same bytes. The graphs in memory stay as they are. Raises OSError, and PackError for a graph's name.
    """
    folder = Path(folder)
    for name in [graph.file for graph in graphs]:
        if not FILE_NAME.fullmatch(name):
            raise PackError(f"graph {name!r:.140}: use letters, digits, '.', '-' and '_' in its name, at most 120")
    tensors = [tensor for graph in graphs for tensor in graph.model.graph.initializer]
    moved = store.write(folder / WEIGHTS, map(place_of, filter(is_external, tensors)))
    for graph in graphs:
        (folder / graph.file).write_bytes(_moved(graph.model, moved))


def _moved(model: onnx.ModelProto, moved: dict[Place, Place]) -> bytes:
    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    for tensor in copy.graph.initializer:
        if is_external(tensor):
            point(tensor, moved[place_of(tensor)])
    return bytes(copy.SerializeToString(deterministic=True))
