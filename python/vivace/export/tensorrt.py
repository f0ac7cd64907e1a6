"""`export_tensorrt`: the graphs of a pack as a folder that TensorRT builds engines of, and the engines where it can.

Everything that can be checked without TensorRT is checked: the pack itself, TensorRT 11's rules graph by graph, ranges
of free dimensions. What is left is said. The folder: graphs with int8 activations, the pack's weights (a link where the
disk allows), build.json; after the build an engine a graph, timing.cache and report.json.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx

from vivace.engine.token_rows import focused
from vivace.errors import ArgumentError, BackendError, OutputError
from vivace.export import tensorrt_build
from vivace.export.profiles import LENGTH, ROWS, Profile, Range, profiles_of
from vivace.export.tensorrt_form import tensorrt_form
from vivace.export.tensorrt_rules import Finding, check_graph
from vivace.export.weights import NAMES, dtype_of, place_of
from vivace.runtime.manifest import WEIGHTS, Graph
from vivace.runtime.pack import Pack, open_pack
from vivace.runtime.tensorrt import TensorRt, engines_of
from vivace.runtime.verify import verify_pack

CHECKED = (
    "the pack: hashes, plan, a graph for every row",
    "types of all graphs, which strongly typed networks take as they are",
    "Q/DQ: placement, symmetric int8 or float8, constant scales, no quantized bias",
    "operators, opset, ranks",
    "profiles: a range for every free dimension",
)


@dataclass(frozen=True, slots=True)
class TensorRtExport:
    """folder; findings: of the rules; left: what could not be done here; report: of the build, verified: what the
    goldens came to on the engines, None where that was not done."""

    folder: Path
    findings: tuple[Finding, ...]
    left: tuple[str, ...]
    report: Mapping[str, Any] | None = None
    verified: Mapping[str, Any] | None = None

    @property
    def failed(self) -> tuple[str, ...]:
        """Graphs that break a rule or were not built."""
        broken = dict.fromkeys(finding.graph for finding in self.findings if finding.error)
        graphs = {} if self.report is None else self.report["graphs"]
        return (*broken, *(name for name, told in graphs.items() if not told["built"]))

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON data."""
        return {
            "folder": str(self.folder),
            "checked": list(CHECKED),
            "findings": [finding.to_dict() for finding in self.findings],
            "failed": list(self.failed),
            "left": list(self.left),
            "report": self.report,
            "verified": self.verified,
        }


def export_tensorrt(
    pack: Pack | str | os.PathLike[str],
    out: str | os.PathLike[str] | None = None,
    *,
    sizes: Sequence[tuple[int, int]] = (),
    rows: Range = ROWS,
    length: Range = LENGTH,
    ranges: Mapping[str, Range] | None = None,
    target: str | None = None,
    strip: bool = False,
    timing_cache: bool = True,
    python: str | os.PathLike[str] | None = None,
    build: bool = True,
    overwrite: bool = False,
) -> TensorRtExport:
    """Check a pack's graphs for TensorRT, write them with profiles, and build engines where TensorRT is.

    Args:
        pack: a pack or its folder; out: None: the pack's path with ".engines" behind it.
        sizes: height and width of latents, one profile each, none: the plan's own. rows, length, ranges: least, usual
            and most rows, text tokens, and other free dimensions by name.
        target: of TensorRT-RTX, "SM89" for one: which GPUs engines are for; None: the one that is here.
        strip: engines without weights, which are put back from the pack when they are loaded.
        timing_cache: kept in the folder and used again. python: an interpreter that has TensorRT; None: this one.
        build: False stops before the build. overwrite: replace a folder that this function wrote.
    Returns: findings, what is left, the build's report, and on a GPU what the pack's goldens came to. Graphs that break
        a rule are left out of the build.
    Raises: PackError, ArgumentError, OutputError; BackendError when `python` was given and cannot build.
    """
    opened = pack if isinstance(pack, Pack) else open_pack(pack)
    folder = Path(out) if out is not None else engines_of(opened)
    _check_out(folder, overwrite)
    profiles = profiles_of(
        opened.manifest.model, _actives(opened), sizes=sizes, rows=rows, length=length, ranges=ranges
    )
    models = {graph: _emitted(opened, graph) for graph in opened.manifest.graphs}
    findings = [finding for graph, model in models.items() for finding in _checked(opened, graph, model, profiles)]
    broken = {finding.graph for finding in findings if finding.error}
    sound = {graph: model for graph, model in models.items() if graph.name not in broken}
    job = {
        "pack": opened.digest,
        "target": target,
        "strip": strip,
        "timing_cache": timing_cache,
        "graphs": {graph.name: _told(graph, profiles) for graph in sound},
    }
    _write(opened, folder, sound, job)
    left = [f"{name}: not built, it breaks a rule (see the findings)" for name in sorted(broken)]
    report = _built(folder, python) if build else None
    if report is None:
        script = Path(tensorrt_build.__file__)
        left.append(f"build the engines: python {script} {folder}, where TensorRT 11 or TensorRT-RTX is installed")
    verified = None if report is None or broken else _verified(opened, folder)
    if verified is None:
        left.append(f"run the goldens on a GPU: vivace verify {opened.path} --backend tensorrt")
    return TensorRtExport(folder, tuple(findings), tuple(left), report, verified)


def _actives(pack: Pack) -> list[int]:
    """How many tokens the plan's token rows compute."""
    return sorted({int(variant.keep) for variant in pack.plan.variants if focused(variant)})


def _emitted(pack: Pack, graph: Graph) -> onnx.ModelProto:
    return tensorrt_form(onnx.load_model(pack.file(graph), load_external_data=False))


def _checked(pack: Pack, graph: Graph, model: onnx.ModelProto, profiles: Sequence[Profile]) -> list[Finding]:
    def read(tensor: onnx.TensorProto) -> Any:
        place = place_of(tensor)
        raw = np.asarray(pack.weights[place.offset : place.offset + place.length])
        return raw.view(dtype_of(NAMES[tensor.data_type]))

    found: dict[Finding, None] = {}
    for profile in profiles:
        found |= dict.fromkeys(check_graph(graph.name, model, inputs=graph.inputs, profile=profile, read=read))
    return list(found)


def _told(graph: Graph, profiles: Sequence[Profile]) -> dict[str, Any]:
    """What a builder is told of a graph: its file and profiles, one where they are all alike."""
    made = [profile.to_dict(graph.inputs) for profile in profiles]
    distinct = {json.dumps(each["inputs"], sort_keys=True): each for each in reversed(made)}
    return {"file": graph.file, "profiles": list(distinct.values())[::-1]}


def _built(folder: Path, python: str | os.PathLike[str] | None) -> dict[str, Any] | None:
    """The report of a build, by this interpreter or another one; None where this one has no TensorRT."""
    if python is None and tensorrt_build.flavour() is None:
        return None
    command = [str(python or sys.executable), str(Path(tensorrt_build.__file__)), str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)  # a crash of a builder stays its own
    try:
        report: dict[str, Any] = json.loads(done.stdout.strip().rpartition("\n")[2])
    except ValueError:
        line = (done.stderr.strip() or done.stdout.strip() or f"exit code {done.returncode}").rpartition("\n")[2]
        raise BackendError(f"export tensorrt: {command[0]} could not build: {line[:400]}") from None
    return report


def _verified(pack: Pack, folder: Path) -> dict[str, Any] | None:
    """The goldens on the engines; None where there is no GPU, or the engines are for others."""
    try:
        backend = TensorRt(folder)
        return verify_pack(pack, backend=backend).to_dict()
    except BackendError:
        return None


def _check_out(folder: Path, overwrite: bool) -> None:
    if not os.path.lexists(folder):
        if not folder.absolute().parent.is_dir():
            raise OutputError(f"{folder}: its parent is no folder; make it, or choose another place")
        return
    if not (folder / tensorrt_build.JOB).is_file():
        raise OutputError(f"{folder}: it exists and holds no engines of a pack; choose another place")
    if not overwrite:
        raise ArgumentError(f"{folder}: it exists; choose another place, or say overwrite")


def _write(pack: Pack, folder: Path, models: Mapping[Graph, onnx.ModelProto], job: Mapping[str, Any]) -> None:
    """The folder, all or nothing; the timings of an older one are taken over."""
    draft = None
    try:
        draft = Path(tempfile.mkdtemp(prefix=f".{folder.name[:40]}.", dir=folder.absolute().parent))
        for graph, model in models.items():
            (draft / graph.file).write_bytes(model.SerializeToString(deterministic=True))
        if (pack.path / WEIGHTS).exists():
            _linked(pack.path / WEIGHTS, draft / WEIGHTS)
        if (folder / tensorrt_build.CACHE).is_file():
            shutil.copyfile(folder / tensorrt_build.CACHE, draft / tensorrt_build.CACHE)
        (draft / tensorrt_build.JOB).write_text(json.dumps(job, indent=1, sort_keys=True))
        draft.chmod(0o755)
        if folder.exists():
            shutil.rmtree(folder)
        draft.rename(folder)
    except OSError as error:
        raise OutputError(f"{folder}: cannot be written ({error.strerror or error}); choose a writable place") from None
    finally:
        if draft is not None:
            shutil.rmtree(draft, ignore_errors=True)


def _linked(source: Path, target: Path) -> None:
    """The same file under another name; a copy on disks without links."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copyfile(source, target)
