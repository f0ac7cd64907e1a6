"""The `vivace` command. With --json, stdout is exactly one JSON object; progress and messages go to stderr.

Exit code 0 when done, 2 for a mistake of the caller (one clear line), 1 for a failure.
"""

from __future__ import annotations

import json
import os
import sys
import traceback
from pathlib import Path
from typing import Annotated, Any

import typer

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
from vivace.errors import ArgumentError, VivaceError

app = typer.Typer(
    name="vivace",
    help="Run, profile and inspect diffusion models through sampling plans.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
plan_app = typer.Typer(help="Make, read, compare and check plans.", no_args_is_help=True)
app.add_typer(plan_app, name="plan")


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
    _print(data, text, as_json)


@app.command()
def calibrate(
    model: Annotated[str, typer.Argument(help="Bundled model name, a folder, or a name in the hub cache.")],
    out: Annotated[Path, typer.Option(help="Calibration table to write (.safetensors).")],
    quantization: Annotated[bool, typer.Option("--quantization", help="What linear layers read, for 8 bits.")] = False,
    cache: Annotated[bool, typer.Option("--cache", help="What caches do to pictures, for their planners.")] = False,
    plan: PlanFile = None,
    solver: Solver = None,
    steps: Steps = None,
    guidance: Guidance = None,
    recipe: Annotated[str, typer.Option(help="per_token, static or ptq4dm.")] = "per_token",
    samples: Annotated[
        int | None, typer.Option(help="States, or runs for caches; default: the recipe's, 8.", min=1)
    ] = None,
    groups: Annotated[int | None, typer.Option(help="Timestep groups; default: the recipe's.", min=1)] = None,
    prompts: Annotated[Path | None, typer.Option(help="Prompts, one a line; default: classes of the model.")] = None,
    seed: Annotated[int, typer.Option(help="Seed of the states and of what is drawn.", min=0)] = 0,
    quantized: Annotated[
        Path | None, typer.Option(help="With --cache: weights of `vivace quantize`; what 8 bits add is measured too.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Measure a model along the plan that it will run; `vivace quantize` and planners of caches read the table."""
    from vivace.cli.calibrate import calibrate_caches, calibrate_model

    if quantization == cache:
        raise ArgumentError("calibrate: say what for: --quantization or --cache")
    if cache:
        if recipe != "per_token" or groups is not None:
            raise ArgumentError("calibrate: --recipe and --groups are of --quantization; drop them")
        run = {"plan": plan, "solver": solver, "steps": steps, "guidance": guidance, "quantized": quantized}
        data, text = calibrate_caches(model, out=out, **run, pictures=samples, prompts=prompts, seed=seed)
        _print(data, text, as_json)
        return
    if quantized is not None:
        raise ArgumentError("calibrate: --quantized is of --cache; drop it")
    data, text = calibrate_model(
        model,
        out=out,
        plan=plan,
        solver=solver,
        steps=steps,
        guidance=guidance,
        recipe=recipe,
        samples=samples,
        groups=groups,
        prompts=prompts,
        seed=seed,
    )
    _print(data, text, as_json)


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
    _print(data, text, as_json)


@plan_app.command("new")
def plan_new(
    out: Annotated[Path | None, typer.Option(help="JSON file to write; without it the plan is only printed.")] = None,
    model: Model = "emoji",
    scheduler: Annotated[Path | None, typer.Option(help="A scheduler_config.json: the plan that it would run.")] = None,
    solver: Solver = None,
    steps: Steps = None,
    grid: Annotated[str | None, typer.Option(help="uniform, linspace, leading, trailing, logsnr or karras.")] = None,
    timesteps: Annotated[str | None, typer.Option(help="Explicit timesteps, comma-separated, one a step.")] = None,
    sigmas: Annotated[str | None, typer.Option(help="Explicit noise levels, comma-separated, one a step.")] = None,
    final: Annotated[str, typer.Option(help="Noise level of the result: zero or sigma_min.")] = "zero",
    option: Annotated[list[str] | None, typer.Option(help="Solver option, name=value; repeatable.")] = None,
    guidance: Guidance = None,
    interval: Annotated[str, typer.Option(help="Share of rows that are guided, a:b with 0 = noise end.")] = "0:1",
    cache: Annotated[
        list[str] | None, typer.Option(help="NAME[:key=value,...] of vivace.planners, as fora:interval=2; repeatable.")
    ] = None,
    tokens: Tokens = None,
    bind: Annotated[bool, typer.Option("--bind", help="Bind the plan to the model.")] = False,
    as_json: Json = False,
) -> None:
    """Make a plan and print it; with --out also write it."""
    from vivace.cli.caches import printed, summary, with_caches
    from vivace.cli.tokens import with_tokens
    from vivace.engine.passes import apply_guidance
    from vivace.engine.plan import Plan
    from vivace.models.load import open_model
    from vivace.models.pipe import default_plan

    levels = {"timesteps": _numbers("--timesteps", timesteps), "sigmas": _numbers("--sigmas", sigmas)}
    explicit = next((values for values in levels.values() if values is not None), None)
    if steps is None and explicit is not None:
        steps = len(explicit)
    if scheduler is None:
        options = levels | {"grid": grid, "final": final} | _options(option)
        made = default_plan(open_model(model), solver, steps, guidance, interval=_interval(interval), **options)
    else:
        if solver or grid or option:
            raise ArgumentError("plan new: --scheduler decides solver, grid and options; drop them")
        made = Plan.from_diffusers(_read_json(scheduler), 20 if steps is None else steps, **levels)
        if guidance is not None and guidance != 1.0:
            made = apply_guidance(made, guidance, interval=_interval(interval))
    if bind:
        made = made.bind(open_model(model).spec)
    made = with_tokens(with_caches(made, cache), tokens)
    if out is not None:
        made.save(out)
    _print({"plan": summary(made), "path": None if out is None else str(out)}, printed(made), as_json)


@plan_app.command("show")
def plan_show(path: Annotated[Path, typer.Argument(help="Plan file.")], as_json: Json = False) -> None:
    """Print a plan: one line per network evaluation."""
    from vivace.cli.caches import printed, summary
    from vivace.engine.plan import Plan

    plan = Plan.load(path)
    _print({"plan": summary(plan)}, printed(plan), as_json)


@plan_app.command("diff")
def plan_diff(
    one: Annotated[Path, typer.Argument(help="Plan file.")],
    two: Annotated[Path, typer.Argument(help="Plan file.")],
    as_json: Json = False,
) -> None:
    """What differs between the printouts of two plans; nothing when they are equal."""
    from vivace.engine.plan import Plan
    from vivace.engine.render import render_diff

    a, b = Plan.load(one), Plan.load(two)
    text = render_diff(a, b, (str(one), str(two)))
    equal = a.hash == b.hash
    data = {"equal": equal, "hashes": [a.hash, b.hash], "diff": text.splitlines()}
    _print(data, "the plans are equal" if equal else text, as_json)


@plan_app.command("validate")
def plan_validate(
    path: Annotated[Path, typer.Argument(help="Plan file.")],
    model: Annotated[str | None, typer.Option(help="Also bind it to this model.")] = None,
    as_json: Json = False,
) -> None:
    """Check a plan file: format, side-car, legality, and with --model that it binds."""
    from vivace.cli.caches import summary
    from vivace.engine.plan import Plan
    from vivace.models.load import open_model

    plan = Plan.load(path)
    if model is not None:
        plan = plan.bind(open_model(model).spec)
    text = f"{path}: legal, {plan.nfe} evaluations, hash {plan.hash[:12]}" + (f", binds to {model}" if model else "")
    _print({"valid": True, "plan": summary(plan)}, text, as_json)


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
    _print(report.to_dict(top), report.table(top), as_json)


@app.command()
def doctor(as_json: Json = False) -> None:
    """What this machine has and which backend each kernel will use, with the reason."""
    from vivace.profile.doctor import examine

    found = examine()
    _print(found.to_dict(), str(found), as_json)


@app.command()
def bench(
    suite: Annotated[str, typer.Argument(help="caching, denoiser, e2e, gate, kernels, solvers or tokens.")],
    op: Annotated[str | None, typer.Option(help="Only this op; with gate, the model.")] = None,
    claim: Annotated[str | None, typer.Option(help="Only measure this claim.")] = None,
    quick: Annotated[bool, typer.Option("--quick", help="Fewer repetitions.")] = False,
    out: Annotated[Path | None, typer.Option(help="Folder for report, table and plots.")] = None,
    as_json: Json = False,
) -> None:
    """Measure, side by side with peers; every speed row carries its quality."""
    from vivace.bench import render, run

    data = run(suite, op=op, claim=claim, quick=quick, out=out)
    _print(data, render(data), as_json)


def _options(pairs: list[str] | None) -> dict[str, Any]:
    """name=value pairs; values are JSON where they parse as JSON, else text."""
    out: dict[str, Any] = {}
    for pair in pairs or ():
        name, equals, value = pair.partition("=")
        if not equals or not name:
            raise ArgumentError(f"option {pair!r}: write name=value")
        try:
            out[name] = json.loads(value)
        except json.JSONDecodeError:
            out[name] = value
    return out


def _numbers(name: str, text: str | None) -> list[float] | None:
    if text is None:
        return None
    try:
        return [float(part) for part in text.split(",")]
    except ValueError:
        raise ArgumentError(f"{name} {text!r}: write numbers separated by commas") from None


def _interval(text: str) -> tuple[float, float]:
    try:
        low, high = (float(part) for part in text.split(":"))
    except ValueError:
        raise ArgumentError(f"interval {text!r}: write a:b, two numbers from 0 (noise end) to 1") from None
    return low, high


def _read_json(path: Path) -> dict[str, Any]:
    try:
        data = json.loads(path.read_text())
    except OSError as error:
        raise ArgumentError(f"{path}: cannot be read ({error.strerror})") from None
    except ValueError as error:
        raise ArgumentError(f"{path}: not JSON ({error})") from None
    if not isinstance(data, dict):
        raise ArgumentError(f"{path}: not a scheduler configuration (a JSON object)")
    return data


def _print(data: dict[str, Any], text: str, as_json: bool) -> None:
    print(json.dumps(data, allow_nan=False) if as_json else text)


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
