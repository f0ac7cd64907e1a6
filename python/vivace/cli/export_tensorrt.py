"""`vivace export tensorrt`: what TensorRT would make of a pack, and the engines where it is installed."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from vivace.cli.options import Json
from vivace.cli.values import emit
from vivace.errors import ArgumentError


def export_engines(
    pack: Annotated[Path, typer.Argument(help="Folder of `vivace export onnx`.")],
    out: Annotated[Path | None, typer.Option(help="Folder to write; default: PACK.engines.")] = None,
    size: Annotated[list[str] | None, typer.Option(help="HxW of latents, a profile each; repeatable.")] = None,
    rows: Annotated[str, typer.Option(help="least:usual:most rows (pictures times branches).")] = "1:2:8",
    length: Annotated[str, typer.Option(help="least:usual:most tokens of a text.")] = "1:77:512",
    target: Annotated[str | None, typer.Option(help="GPUs that TensorRT-RTX builds for, such as SM89.")] = None,
    strip: Annotated[bool, typer.Option(help="Engines without weights; they are put back when loaded.")] = False,
    python: Annotated[Path | None, typer.Option(help="An interpreter that has TensorRT; default: this one.")] = None,
    build: Annotated[bool, typer.Option(help="Build engines where TensorRT is.")] = True,
    overwrite: Annotated[bool, typer.Option(help="Replace what lies there, where this command wrote it.")] = False,
    as_json: Json = False,
) -> None:
    """Check a pack for TensorRT, write its graphs with profiles, and build engines where TensorRT is."""
    from vivace.export import export_tensorrt

    sizes = [_numbers("--size", text, "x", 2) for text in size or ()]
    ranges = {"rows": _numbers("--rows", rows, ":", 3), "length": _numbers("--length", length, ":", 3)}
    options: dict[str, Any] = {"sizes": sizes, **ranges, "target": target, "strip": strip, "python": python}
    found = export_tensorrt(pack, out, **options, build=build, overwrite=overwrite)
    emit(found.to_dict(), _text(found), as_json)
    if found.failed:
        raise typer.Exit(1)


def _numbers(option: str, text: str, mark: str, count: int) -> tuple[int, ...]:
    parts = text.split(mark)
    if len(parts) != count or not all(part.isdecimal() for part in parts):
        raise ArgumentError(f"{option} {text!r}: write {mark.join('abc'[:count])}, whole numbers")
    return tuple(map(int, parts))


def _text(found: Any) -> str:
    """Findings, engines, what is left."""
    data = found.to_dict()
    lines = [f"wrote {found.folder}"] + [f"checked: {line}" for line in data["checked"]]
    lines += [f"{'error' if each.error else 'warning'}: {each}" for each in found.findings]
    for name, told in (found.report or {"graphs": {}})["graphs"].items():
        types = ", ".join(f"{kind} {count}" for kind, count in told.get("types", {}).items())
        fate = f"{told['bytes'] / 1e6:.1f} MB" if told["built"] else f"FAILED: {'; '.join(told['errors'])[:300]}"
        lines.append(f"engine {name}: {fate}; {told.get('layers', 0)} layers ({types})")
    return "\n".join([*lines, *(f"left: {line}" for line in found.left)])
