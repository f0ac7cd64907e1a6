"""`vivace plan ...`: make, read, compare and check plans."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from vivace.cli.options import Guidance, Json, Model, Solver, Steps, Tokens
from vivace.cli.values import emit, interval_of, numbers_of, pairs_of, read_json
from vivace.errors import ArgumentError

plan_app = typer.Typer(help="Make, read, compare and check plans.", no_args_is_help=True)


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
    apply: Annotated[
        list[str] | None, typer.Option(help="PASS[:key=value,...] of vivace.passes, as momentum:beta=0.8; repeatable.")
    ] = None,
    bind: Annotated[bool, typer.Option("--bind", help="Bind the plan to the model.")] = False,
    as_json: Json = False,
) -> None:
    """Make a plan and print it; with --out also write it."""
    from vivace.cli.apply import with_passes
    from vivace.cli.caches import printed, summary, with_caches
    from vivace.cli.tokens import with_tokens
    from vivace.engine.passes import apply_guidance
    from vivace.engine.plan import Plan
    from vivace.models.load import open_model
    from vivace.models.pipe import default_plan

    levels = {"timesteps": numbers_of("--timesteps", timesteps), "sigmas": numbers_of("--sigmas", sigmas)}
    explicit = next((values for values in levels.values() if values is not None), None)
    if steps is None and explicit is not None:
        steps = len(explicit)
    if scheduler is None:
        options = levels | {"grid": grid, "final": final} | pairs_of(option)
        made = default_plan(open_model(model), solver, steps, guidance, interval=interval_of(interval), **options)
    else:
        if solver or grid or option or final != "zero":
            raise ArgumentError("plan new: --scheduler decides solver, grid and options; drop them")
        made = Plan.from_diffusers(read_json(scheduler), 20 if steps is None else steps, **levels)
        if guidance is not None and guidance != 1.0:
            made = apply_guidance(made, guidance, interval=interval_of(interval))
    if interval != "0:1" and guidance == 1.0:
        raise ArgumentError("plan new: --interval is of guidance, and --guidance 1 is none; drop one")
    made = with_passes(made, apply)
    if bind:
        made = made.bind(open_model(model).spec)
    made = with_tokens(with_caches(made, cache), tokens)
    if out is not None:
        made.save(out)
    emit({"plan": summary(made), "path": None if out is None else str(out)}, printed(made), as_json)


@plan_app.command("tune")
def plan_tune(
    out: Annotated[Path, typer.Option(help="JSON file to write; OUT.partial holds work under way.")],
    model: Model = "emoji",
    solver: Annotated[str, typer.Option(help="usf: every row is decided; another: where it evaluates.")] = "usf",
    steps: Annotated[int, typer.Option(help="Network evaluations; of another solver, its steps.", min=1)] = 10,
    option: Annotated[list[str] | None, typer.Option(help="Solver or search option, name=value; repeatable.")] = None,
    guidance: Guidance = None,
    trials: Annotated[
        int | None, typer.Option("--trials", "--evaluations", help="Plans tried by the survey; default 80.", min=1)
    ] = None,
    rounds: Annotated[int | None, typer.Option(help="Rounds that refine the best; default 4, 0: none.", min=0)] = None,
    samples: Annotated[int | None, typer.Option(help="Samples searched on; default 16.", min=1)] = None,
    prompts: Annotated[Path | None, typer.Option(help="Prompts, one a line; default: classes of the model.")] = None,
    seed: Annotated[int, typer.Option(help="Of samples and optimisers.", min=0)] = 0,
    resume: Annotated[bool, typer.Option("--resume/--anew", help="Go on from OUT.partial where it is there.")] = True,
    as_json: Json = False,
) -> None:
    """Search the plan whose pictures are nearest to converged ones, for a number of evaluations; write it."""
    from vivace.cli.tune import tune_plan

    data, text = tune_plan(
        model,
        solver,
        steps=steps,
        out=out,
        options=pairs_of(option),
        guidance=guidance,
        prompts=prompts,
        seed=seed,
        anew=not resume,
        trials=trials,
        rounds=rounds,
        samples=samples,
    )
    emit(data, text, as_json)


@plan_app.command("show")
def plan_show(path: Annotated[Path, typer.Argument(help="Plan file.")], as_json: Json = False) -> None:
    """Print a plan: one line per network evaluation."""
    from vivace.cli.caches import printed, summary
    from vivace.engine.plan import Plan

    plan = Plan.load(path)
    emit({"plan": summary(plan)}, printed(plan), as_json)


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
    emit(data, "the plans are equal" if equal else text, as_json)


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
    emit({"valid": True, "plan": summary(plan)}, text, as_json)
