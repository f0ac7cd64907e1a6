"""Options that several commands have."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

Prompts = Annotated[list[str], typer.Argument(metavar="PROMPT...", help="What to draw, one or more.")]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object on stdout.")]
Model = Annotated[str, typer.Option(help="Bundled model name, or a diffusers DiT folder.")]
Solver = Annotated[str | None, typer.Option(help="ddim, dpmpp_2m, unipc or flow_euler; default: the model card's.")]
Steps = Annotated[int | None, typer.Option(help="Steps of the solver; default: the model card's.")]
Guidance = Annotated[float | None, typer.Option(help="Guidance scale; default: the model card's. 1 = off.")]
Threads = Annotated[int | None, typer.Option(help="CPU threads; default: torch's.", min=1)]
Backend = Annotated[str, typer.Option(help="Executor: auto, eager, cpu or cuda_graph.")]
Tokens = Annotated[
    str | None, typer.Option(help="Rows that compute some tokens, key=value,... as keep=0.5,selector=deviation.")
]
Quantized = Annotated[
    Path | None,
    typer.Option(help="Quantized weights; a plan that says nothing of precision runs on them as they advise."),
]
PlanFile = Annotated[Path | None, typer.Option(help="A plan file instead of solver, steps and guidance.")]
