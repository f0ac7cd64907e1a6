"""Opening a pack: everything is checked before anything runs.

A pack is a folder of plain files: manifest, plan, ONNX graphs, one weights file, goldens. What is not as the manifest
says, or not as the plan needs it, is a PackError.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from hashlib import sha256
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from safetensors import SafetensorError, safe_open

from vivace.engine.plan import Plan
from vivace.engine.plan_codec import parse
from vivace.errors import PackError, PlanError, PlanFileError, UnsupportedError
from vivace.runtime.calls import Structure, structures_of
from vivace.runtime.graph_file import GraphFile, Stored, read_graph
from vivace.runtime.manifest import GOLDENS, NAME, PLAN, SIDE_CAR, WEIGHTS, FileInfo, Graph, Manifest
from vivace.runtime.manifest_io import MAX_BYTES, decode

if TYPE_CHECKING:
    from vivace.runtime.session import PackSession

MAX_GRAPH = 512 << 20  # bytes of an ONNX file; its weights lie elsewhere
CHUNK = 1 << 22


@dataclass(frozen=True, slots=True, eq=False)
class Pack:
    """An opened pack. path: the folder; stored: of every graph, by its name, the initializers in the weights file;
    weights: the bytes of that file, uint8 [n], a read-only memory map that all sessions share."""

    path: Path
    manifest: Manifest
    plan: Plan
    stored: Mapping[str, tuple[Stored, ...]]
    weights: Any = field(repr=False)

    @property
    def digest(self) -> str:
        """What tells packs apart: the hash of the files as the manifest lists them."""
        return sha256("".join(f"{info.name} {info.sha256}\n" for info in self.manifest.files).encode()).hexdigest()

    def file(self, graph: Graph) -> Path:
        """Where a graph lies."""
        return self.path / graph.file

    def graphs(self, role: str) -> tuple[Graph, ...]:
        """The graphs of a role."""
        return tuple(graph for graph in self.manifest.graphs if graph.role == role)

    def row(self, structure: Structure) -> Graph:
        """The graph that computes a structure of the plan. Raises PackError for another structure."""
        for graph in self.graphs("row"):
            if graph.structure == structure:
                return graph
        raise PackError(f"{self.path}: no graph computes {structure}; export the plan that asks for it")

    def bytes_of(self, stored: Stored) -> Any:
        """The bytes of an initializer, uint8 [length], a view of the memory map."""
        return self.weights[stored.offset : stored.offset + stored.length]

    def session(self, **options: Any) -> PackSession:
        """The pack, loaded and ready to run; options as of `PackSession`: backend, threads."""
        from vivace.runtime.session import PackSession

        return PackSession(self, **options)

    def goldens(self) -> tuple[dict[str, Any], dict[str, Any]]:
        """What `verify` holds a run against, read anew: the request, and numpy arrays by name; both empty without."""
        if all(info.name != GOLDENS for info in self.manifest.files):
            return {}, {}
        with _told(self.path, GOLDENS):
            try:
                with safe_open(self.path / GOLDENS, "numpy") as file:
                    request = parse((file.metadata() or {}).get("request", "{}").encode())
                    return request, {name: file.get_tensor(name) for name in file.keys()}
            except (SafetensorError, PlanFileError, OSError) as error:
                raise PackError(f"it is damaged ({str(error)!r:.200})") from None


def open_pack(path: str | os.PathLike[str], *, check: bool = True) -> Pack:
    """Read a pack and check it whole; nothing of it runs. check=False leaves out the hashes alone.

    Raises PackError: no pack, of another version, a file that is lacking, a link, larger or other than the manifest
    says, a graph that is not what the manifest says, that points out of the pack, or that the plan needs and lacks.
    """
    path = Path(path)
    with _told(path, NAME):
        manifest = decode(_read(path / NAME, MAX_BYTES))
    infos = {info.name: info for info in manifest.files}
    _check_listing(path, infos)
    for info in manifest.files:
        with _told(path, info.name):
            _check_file(path / info.name, info, check)
    stored = {}
    for graph in manifest.graphs:
        with _told(path, graph.file):
            stored[graph.name] = _read_graph(path, graph, manifest.opset, infos).stored
    plan = _load_plan(path, manifest)
    return Pack(path, manifest, plan, stored, _weights(path, infos))


def is_pack(path: str | os.PathLike[str]) -> bool:
    """Whether a folder holds the manifest of a pack, of whatever version and however damaged the rest."""
    try:
        return b'"vivace-pack"' in _read(Path(path) / NAME, MAX_BYTES)
    except PackError:
        return False


@contextmanager
def _told(path: Path, name: str) -> Iterator[None]:
    """Errors within say which file of which pack they are about."""
    try:
        yield
    except PackError as error:
        raise PackError(f"{_shown(path)}: {name}: {error}") from None


def _shown(path: Path) -> str:
    text = str(path)
    return text if text.isprintable() else ascii(text)


# --- files ------------------------------------------------------------------------------------------------------------
def _check_listing(path: Path, infos: Mapping[str, FileInfo]) -> None:
    """What runtimes would read by its name alone must be in the manifest."""
    for name in sorted(os.listdir(path)):
        if (name.endswith(".onnx") or name in (PLAN, SIDE_CAR, WEIGHTS, GOLDENS)) and name not in infos:
            raise PackError(f"{_shown(path)}: {name!r} is not in the manifest; take it out of the folder")
    if PLAN not in infos:
        raise PackError(f"{_shown(path)}: the manifest names no {PLAN}; export the pack again")


def _open(path: Path) -> int:
    """A descriptor of a plain file, never of a link, and without waiting for a pipe."""
    flags = os.O_RDONLY | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0)
    try:
        linked = path.is_symlink()
        handle = -1 if linked else os.open(path, flags)
    except (OSError, ValueError) as error:  # ValueError: a name with NUL
        raise PackError(f"it cannot be read ({getattr(error, 'strerror', None) or error})") from None
    if linked:
        raise PackError("it is a symbolic link; a pack holds plain files, so copy it with its links followed (cp -rL)")
    if not stat.S_ISREG(os.fstat(handle).st_mode):
        os.close(handle)
        raise PackError("it is not a plain file")
    return handle


def _read(path: Path, limit: int) -> bytes:
    with os.fdopen(_open(path), "rb") as file:
        data = file.read(limit + 1)
    if len(data) > limit:
        raise PackError(f"it has more than {limit} bytes")
    return data


def _check_file(path: Path, info: FileInfo, hashed: bool) -> None:
    with os.fdopen(_open(path), "rb", buffering=0) as file:
        size = os.fstat(file.fileno()).st_size
        if size != info.bytes:
            raise PackError(f"it has {size} bytes, the manifest says {info.bytes}; copy or export the pack again")
        digest, buffer = sha256(), memoryview(bytearray(CHUNK))
        while hashed and (count := file.readinto(buffer)):
            digest.update(buffer[:count])
    if hashed and digest.hexdigest() != info.sha256:
        raise PackError("its SHA-256 is not the manifest's: it was damaged or changed; copy or export the pack again")


def _weights(path: Path, infos: Mapping[str, FileInfo]) -> Any:
    if WEIGHTS not in infos or not infos[WEIGHTS].bytes:  # an empty file cannot be mapped
        return np.zeros(0, np.uint8)
    return np.memmap(path / WEIGHTS, np.uint8, "r")


# --- what must fit together -------------------------------------------------------------------------------------------
def _read_graph(path: Path, graph: Graph, opset: int, infos: Mapping[str, FileInfo]) -> GraphFile:
    """An ONNX file that is as the manifest says."""
    weights = infos[WEIGHTS].bytes if WEIGHTS in infos else 0
    made = read_graph(_read(path / graph.file, MAX_GRAPH), weights)
    if made.opset != opset:
        raise PackError(f"it has opset {made.opset}, the manifest says {opset}")
    for side, got, ports in (("input", made.inputs, graph.inputs), ("output", made.outputs, graph.outputs)):
        want = tuple((port.name, port.dtype, port.shape) for port in ports)
        if len(got) != len(want):
            raise PackError(f"it has {len(got)} {side}s, the manifest says {len(want)}")
        for mine, told in zip(got, want, strict=True):
            if mine != told:
                raise PackError(f"{side} {mine!r:.200} is in the manifest {told!r:.200}")
    return made


def _load_plan(path: Path, manifest: Manifest) -> Plan:
    """The plan, which every row graph belongs to and which has a graph for every structure."""
    try:
        plan = Plan.load(path / PLAN)
        if plan.hash != manifest.plan:
            raise PackError(f"{PLAN}: its hash is {plan.hash}, the manifest says {manifest.plan}")
        if plan.tensors and all(info.name != SIDE_CAR for info in manifest.files):
            raise PackError(f"{SIDE_CAR}: the plan reads it and the manifest does not name it")
        if plan.binding is None or plan.binding.fingerprint != manifest.model["fingerprint"]:
            raise PackError(f"{PLAN}: it is not bound to the model of this pack, {manifest.model['fingerprint']!r:.80}")
        needed = structures_of(plan)
    except (PlanError, UnsupportedError) as error:
        raise PackError(f"{_shown(path)}: {error}") from None
    except PackError as error:
        raise PackError(f"{_shown(path)}: {error}") from None
    held = [graph.structure for graph in manifest.graphs if graph.role == "row"]
    for structure in needed:
        if held.count(structure) != 1:
            raise PackError(f"{_shown(path)}: {held.count(structure)} graphs compute {structure}, the plan needs one")
    for graph in manifest.graphs:
        if graph.structure is not None and graph.structure not in needed:
            raise PackError(f"{_shown(path)}: {graph.file}: the plan has no row that it computes")
    return plan
