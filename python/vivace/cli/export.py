"""`vivace export`: packs for runtimes without torch, engines and model repositories made of them."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from vivace.cli.export_tensorrt import export_engines
from vivace.cli.options import Guidance, Json, PlanFile, Quantized, Solver, Steps
from vivace.cli.values import emit

export_app = typer.Typer(help="Write a model and its plan for runtimes without torch.", no_args_is_help=True)
export_app.command("tensorrt")(export_engines)

Overwrite = Annotated[bool, typer.Option(help="Replace what lies there, where this command wrote it.")]


@export_app.command("onnx")
def export_pack(
    model: Annotated[str, typer.Argument(help="Bundled model name, or a diffusers folder.")],
    out: Annotated[Path, typer.Option(help="Folder to write: the pack.")],
    plan: PlanFile = None,
    solver: Solver = None,
    steps: Steps = None,
    guidance: Guidance = None,
    quantized: Quantized = None,
    dtype: Annotated[str, typer.Option(help="Of the network: float32, float16 or bfloat16.")] = "float32",
    opset: Annotated[int, typer.Option(help="21, or 23 with its attention and normalization ops.")] = 21,
    target: Annotated[str, typer.Option(help="Who reads 8-bit graphs: cpu (uint8 activations) or tensorrt.")] = "cpu",
    prompt: Annotated[str | None, typer.Option(help="Of the goldens; default: the model's example.")] = None,
    licence: Annotated[str | None, typer.Option(help="Of the model, for the manifest; default: its card's.")] = None,
    overwrite: Overwrite = False,
    as_json: Json = False,
) -> None:
    """A pack: graphs per variant, the plan, weights once, goldens, a manifest with hashes."""
    from vivace.cli.progress import progress_bars
    from vivace.export import export_onnx
    from vivace.export.pack import check_out
    from vivace.models.pipe import load

    check_out(out, overwrite)
    pipe = load(model, quantized=quantized)
    chosen = pipe.choose_plan(plan, solver, steps, guidance)
    options: dict[str, Any] = {"dtype": dtype, "opset": opset, "target": target}
    options |= {"prompt": prompt, "licence": licence, "overwrite": overwrite}
    with progress_bars() as progress:
        pack = export_onnx(pipe, chosen, out, **options, progress=progress)
    emit(*_told(out, pack), as_json)


@export_app.command("triton-server")
def export_repository(
    pack: Annotated[Path, typer.Argument(help="Folder of `vivace export onnx`.")],
    out: Annotated[Path, typer.Option(help="Folder to write: the model repository.")],
    name: Annotated[str | None, typer.Option(help="What names of models begin with; default: the model's.")] = None,
    rows: Annotated[int, typer.Option(help="Most rows of a batch (pictures times branches).", min=1)] = 16,
    ensembles: Annotated[bool, typer.Option(help="Also models that do what goes before a row.")] = True,
    as_json: Json = False,
) -> None:
    """A model repository for Triton Inference Server, ready to be mounted."""
    from vivace.export import export_triton_server

    models = export_triton_server(pack, out, name=name, max_batch_size=rows, ensembles=ensembles)
    text = f"wrote {out}: {', '.join(models)}\nserve it with: tritonserver --model-repository={out.absolute()}"
    emit({"out": str(out), "models": list(models)}, text, as_json)


def _told(out: Path, pack: Any) -> tuple[dict[str, Any], str]:
    manifest = pack.manifest
    files = {info.name: info.bytes for info in manifest.files}
    data = {
        "out": str(out),
        "model": dict(manifest.model),
        "graphs": [{"name": graph.name, "role": graph.role, "bytes": files[graph.file]} for graph in manifest.graphs],
        "precision": dict(manifest.precision),
        "opset": manifest.opset,
        "plan": manifest.plan,
        "tolerance": manifest.tolerance,
        "bytes": sum(files.values()),
        "weights": dict(manifest.weights),
    }
    rows = [graph.name for graph in manifest.graphs if graph.role == "row"]
    size, weights = data["bytes"] / 1e6, sum(manifest.weights.values()) / 1e6
    text = (
        f"wrote {out}: {len(manifest.graphs)} graphs ({', '.join(rows)} for rows), {size:.1f} MB of which weights "
        f"{weights:.1f} MB, opset {manifest.opset}\ncheck it with: vivace verify {out}"
    )
    return data, text
