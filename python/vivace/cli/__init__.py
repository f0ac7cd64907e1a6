"""The `vivace` command. With --json, stdout is exactly one JSON object; progress and messages go to stderr.

Exit code 0 when done, 2 for a mistake of the caller (one clear line), 1 for a failure.
"""

from __future__ import annotations

import os
import sys
import traceback
from pathlib import Path
from typing import Annotated, Any

import typer

from vivace.cli.export import export_app
from vivace.cli.options import (
    Backend,
    Guidance,
    Json,
    Model,
    PlanFile,
    Prompts,
    Quantized,
    Solver,
    Steps,
    Threads,
    Tokens,
)
from vivace.cli.plan import plan_app
from vivace.cli.values import emit, pairs_of
from vivace.errors import VivaceError

app = typer.Typer(
    name="vivace",
    help="Run, profile and inspect diffusion models through sampling plans.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
app.add_typer(plan_app, name="plan")
app.add_typer(export_app, name="export")


@app.command()
def generate(
    prompts: Prompts,
    model: Model = "emoji",
    solver: Solver = None,
    steps: Steps = None,
    plan: PlanFile = None,
    guidance: Guidance = None,
    n: Annotated[int, typer.Option("--n", help="Pictures per prompt.", min=1)] = 1,
    seed: Annotated[int, typer.Option(help="Seed; picture j of a prompt is picture j of the seed.", min=0)] = 0,
    out: Annotated[Path, typer.Option(help="PNG to write.")] = Path("vivace.png"),
    scale: Annotated[int, typer.Option(help="Enlarge the PNG this many times.", min=1, max=32)] = 1,
    quantized: Quantized = None,
    tokens: Tokens = None,
    show_tokens: Annotated[Path | None, typer.Option(help="PNG of how often each region was computed.")] = None,
    backend: Backend = "auto",
    threads: Threads = None,
    as_json: Json = False,
) -> None:
    """Pictures to a PNG: one picture without border, several as a grid; with a receipt."""
    from vivace.cli.generate import generate_pictures

    data, text = generate_pictures(
        prompts,
        model=model,
        solver=solver,
        steps=steps,
        plan=plan,
        guidance=guidance,
        n=n,
        seed=seed,
        out=out,
        scale=scale,
        quantized=quantized,
        backend=backend,
        threads=threads,
        tokens=tokens,
        show_tokens=show_tokens,
    )
    emit(data, text, as_json)


@app.command("run")
def run_pack(
    pack: Annotated[Path, typer.Argument(help="Folder that `vivace export onnx` made.")],
    prompts: Prompts,
    guidance: Annotated[float | None, typer.Option(help="Guidance scale; default: the plan's. 1 = off.")] = None,
    n: Annotated[int, typer.Option("--n", help="Pictures per prompt.", min=1)] = 1,
    seed: Annotated[int, typer.Option(help="Seed; picture j of a prompt is picture j of the seed.", min=0)] = 0,
    out: Annotated[Path | None, typer.Option(help="PNG to write (vivace.png), or latents as .npy.")] = None,
    scale: Annotated[int, typer.Option(help="Enlarge the PNG this many times.", min=1, max=32)] = 1,
    image: Annotated[Path | None, typer.Option(help="Picture that a plan for image to image starts at.")] = None,
    check: Annotated[bool, typer.Option(help="Check the hashes of the pack's files.")] = True,
    backend: Annotated[
        str, typer.Option(help="What runs the graphs: onnxruntime, openvino or tensorrt.")
    ] = "onnxruntime",
    threads: Annotated[int | None, typer.Option(help="CPU threads; default: the backend's.", min=1)] = None,
    as_json: Json = False,
) -> None:
    """Pictures by an exported pack, without torch: the whole loop, its caches, guards and noise."""
    from vivace.cli.run_pack import run_prompts

    asked: dict[str, Any] = {"n": n, "seed": seed, "guidance": guidance, "out": out, "scale": scale, "image": image}
    data, text = run_prompts(pack, prompts, **asked, backend=backend, threads=threads, check=check)
    emit(data, text, as_json)


@app.command()
def verify(
    pack: Annotated[Path, typer.Argument(help="Folder that `vivace export onnx` made.")],
    backend: Annotated[
        str, typer.Option(help="What runs the graphs: onnxruntime, openvino or tensorrt.")
    ] = "onnxruntime",
    threads: Annotated[int | None, typer.Option(help="CPU threads; default: the backend's.", min=1)] = None,
    as_json: Json = False,
) -> None:
    """Is a pack whole, and does it do here what it did where it was made? Its goldens, row by row; 1 if it deviates."""
    from vivace.cli.verify_pack import verify_folder

    data, text, holds = verify_folder(pack, backend=backend, threads=threads)
    emit(data, text, as_json)
    if not holds:
        raise typer.Exit(1)


@app.command()
def calibrate(
    model: Annotated[str, typer.Argument(help="Bundled model name, a folder, or a name in the hub cache.")],
    out: Annotated[Path, typer.Option(help="Calibration table to write (.safetensors).")],
    quantization: Annotated[bool, typer.Option("--quantization", help="What linear layers read, for 8 bits.")] = False,
    cache: Annotated[bool, typer.Option("--cache", help="What caches do to pictures, for their planners.")] = False,
    solver: Annotated[
        str | None,
        typer.Option(help="Alone: the method to calibrate, as dpm_solver_v3. With --quantization, --cache: a solver."),
    ] = None,
    option: Annotated[list[str] | None, typer.Option(help="Option of the method, name=value; repeatable.")] = None,
    plan: PlanFile = None,
    steps: Steps = None,
    guidance: Guidance = None,
    recipe: Annotated[str | None, typer.Option(help="per_token (default), static or ptq4dm; quantization.")] = None,
    samples: Annotated[
        int | None, typer.Option(help="States, runs for caches, trajectories of a method; default: its own.", min=1)
    ] = None,
    groups: Annotated[int | None, typer.Option(help="Timestep groups; default: the recipe's.", min=1)] = None,
    prompts: Annotated[Path | None, typer.Option(help="Prompts, one a line; default: classes of the model.")] = None,
    seed: Annotated[int, typer.Option(help="Seed of the states and of what is drawn.", min=0)] = 0,
    quantized: Annotated[
        Path | None, typer.Option(help="With --cache: weights of `vivace quantize`; what 8 bits add is measured too.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Measure a model: for a solver (--solver METHOD), for 8 bits, or for caches. A stopped --solver run goes on."""
    from vivace.cli.calibrate import calibrate_caches, calibrate_model, purpose_of

    asked: dict[str, Any] = {"out": out, "steps": steps, "guidance": guidance, "prompts": prompts, "seed": seed}
    purpose = purpose_of(
        quantization,
        cache,
        {
            "--solver": solver,
            "--plan": plan,
            "--recipe": recipe,
            "--groups": groups,
            "--quantized": quantized,
            "--option": option,
        },
    )
    if purpose == "solver":
        from vivace.cli.solver_tables import calibrate_solver

        data, text = calibrate_solver(model, solver or "", samples=samples, options=pairs_of(option), **asked)
    elif purpose == "cache":
        asked |= {"plan": plan, "solver": solver, "quantized": quantized, "pictures": samples}
        data, text = calibrate_caches(model, **asked)
    else:
        asked |= {"plan": plan, "solver": solver, "recipe": recipe or "per_token", "samples": samples, "groups": groups}
        data, text = calibrate_model(model, **asked)
    emit(data, text, as_json)


@app.command()
def quantize(
    model: Annotated[str, typer.Argument(help="Bundled model name, a folder, or a name in the hub cache.")],
    out: Annotated[Path, typer.Option(help="File to write: OUT.safetensors, and OUT.json beside it.")],
    calibration: Annotated[Path | None, typer.Option(help="Table of `vivace calibrate --quantization`.")] = None,
    format: Annotated[str, typer.Option(help="int8, or fp8 for GPUs that have it.")] = "int8",
    activations: Annotated[str | None, typer.Option(help="token or static; default: the table's recipe.")] = None,
    rounding: Annotated[str | None, typer.Option(help="nearest or gptq; default: the table's recipe.")] = None,
    high: Annotated[list[str] | None, typer.Option(help="Layer or pattern that stays high; repeatable.")] = None,
    as_json: Json = False,
) -> None:
    """Quantize the linear layers of a model's blocks to 8 bits; plans then say which rows run on them."""
    from vivace.cli.quantize import quantize_model

    data, text = quantize_model(
        model,
        out=out,
        calibration=calibration,
        format=format,
        activations=activations,
        rounding=rounding,
        high=high or (),
    )
    emit(data, text, as_json)


@app.command()
def profile(
    prompt: Annotated[str, typer.Argument(help="What to draw.")] = "red heart",
    model: Model = "emoji",
    solver: Solver = None,
    steps: Steps = None,
    plan: PlanFile = None,
    guidance: Guidance = None,
    n: Annotated[int, typer.Option("--n", help="Pictures in the batch.", min=1)] = 1,
    trace: Annotated[Path | None, typer.Option(help="Chrome / Perfetto trace to write (JSON).")] = None,
    top: Annotated[int, typer.Option(help="Kernels listed.", min=1)] = 12,
    tokens: Annotated[Path | None, typer.Option(help="PNG of how often each region was computed.")] = None,
    quantized: Quantized = None,
    backend: Backend = "auto",
    threads: Threads = None,
    as_json: Json = False,
) -> None:
    """Where the time goes: per phase, row and kernel."""
    from vivace.cli.tokens import require_tokens
    from vivace.models.pipe import load
    from vivace.models.quantized.given import advised
    from vivace.profile.request import profile_request

    pipe = load(model, quantized=quantized)
    chosen = advised(pipe.choose_plan(plan, solver, steps, guidance), pipe.quantized)
    if tokens is not None:
        require_tokens(chosen, "--tokens")
    session = pipe.compile(chosen, backend=backend, threads=threads)
    report = profile_request(session, prompt, n=n, trace=trace, tokens=tokens)
    emit(report.to_dict(top), report.table(top), as_json)


@app.command()
def doctor(as_json: Json = False) -> None:
    """What this machine has and which backend each kernel will use, with the reason."""
    from vivace.profile.doctor import examine

    found = examine()
    emit(found.to_dict(), str(found), as_json)


@app.command()
def bench(
    suite: Annotated[str, typer.Argument(help="caching, denoiser, e2e, export, gate, kernels, solvers or tokens.")],
    op: Annotated[str | None, typer.Option(help="Only this op; with gate, the model.")] = None,
    claim: Annotated[str | None, typer.Option(help="Only measure this claim.")] = None,
    quick: Annotated[bool, typer.Option("--quick", help="Fewer repetitions.")] = False,
    model: Annotated[str | None, typer.Option(help="With solvers: every method on this model, emoji.")] = None,
    oracle: Annotated[str | None, typer.Option(help="With solvers: every method on this closed form, gmm.")] = None,
    out: Annotated[Path | None, typer.Option(help="Folder for report, table and plots.")] = None,
    as_json: Json = False,
) -> None:
    """Measure, side by side with peers; every speed row carries its quality."""
    from vivace.bench import render, run

    data = run(suite, op=op, claim=claim, quick=quick, out=out, model=model, oracle=oracle)
    emit(data, render(data), as_json)


def main(args: list[str] | None = None) -> None:
    """Entry point: runs a command and exits with its code."""
    sys.exit(run(sys.argv[1:] if args is None else args))


def run(args: list[str]) -> int:
    """Run a command; returns the exit code. Messages of mistakes and failures are one line on stderr."""
    try:
        code = app(args, prog_name="vivace", standalone_mode=False)
    except VivaceError as error:
        print(f"vivace: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("vivace: interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except Exception as error:  # the last line of defence: a failure is one line too, with the traceback on request
        if hasattr(error, "format_message"):  # a usage error of the command-line library
            print(f"vivace: {error.format_message()}", file=sys.stderr)
            return 2
        if os.environ.get("VIVACE_DEBUG", "0") != "0":
            traceback.print_exc()
        print(f"vivace: {type(error).__name__}: {error} (VIVACE_DEBUG=1 shows where)", file=sys.stderr)
        return 1
    return code if isinstance(code, int) else 0


if __name__ == "__main__":
    main()
