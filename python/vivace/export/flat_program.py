"""A pack's loop as a flat list of graph calls, for runtimes in other languages: no plan, no formulas, one text file.

Lines of words, parted by single spaces; n is the count of pictures, a buffer is a tensor with a name:

    vivace-program 1
    latent 3 32 32             shape of a slot without pictures; a slot is a buffer float32 [n, elements]
    graph 0 prepare.onnx       graphs by number
    given label uncond 1000    a tensor of prompts that is the same for all: key, branch, integer
    call 0 once                run a graph; its lines follow. "pictures": rows are times n, "once": they are not
    in PORT DTYPE MODE ...     an input
    out PORT MODE ...          an output that is kept; others are not asked for
    result x                   the slot that holds the final latents
    picture picture            the buffer uint8 [n, height, width, channels], where the pack decodes

Inputs: "tile K SLOT" a slot K times one after the other, [K n, *latent]; "stack SLOT ..." slots side by side, [n,
slots, elements]; "fill K V" [K n] of one number; "numbers RANK SIZES VALUES" as they stand; "condition KEY BRANCH ..."
tensor KEY of the prompt in these branches, each n times; "rows BUFFER I ..." rows I of a buffer, each n times; "whole
BUFFER"; "kept BUFFER I ..." the I-th n rows of a buffer, one after the other. Outputs: "whole BUFFER"; "branches SLOT
..." n rows each, in order; "columns SLOT ..." [n, slots, elements] apart; "kept BUFFER B I ..." n rows each, as the
I-th of B n rows. A slot "noise:K" is unit normals, draw K of the request's seed (see `vivace.engine.noise`); the slot
"one" is all ones.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping, Sequence
from typing import Any

from vivace.engine.plan import Plan
from vivace.engine.token_rows import tokens_of
from vivace.errors import UnsupportedError, VivaceError
from vivace.runtime.calling import branches_of
from vivace.runtime.calls import Call, calls_of
from vivace.runtime.manifest import Graph, Port
from vivace.runtime.pack import open_pack
from vivace.runtime.program import NET, Combine, Given, Stage, program_of
from vivace.runtime.prompts import LABEL

NAME = "program.txt"


def flat_program(
    plan: Plan, graphs: Sequence[Graph], prompts: Mapping[str, Any], values: Mapping[str, float] | None = None
) -> str:
    """The text for a bound plan and the graphs of its pack.

    prompts: of the manifest; values: of numbers that the plan reads, such as "guidance_scale"; others have their
    defaults. Raises UnsupportedError for what no flat list can say: guards, rows of some tokens, transforms, tensors of
    a request.
    """
    numbers = {ref.name: ref.default for ref in plan.inputs if ref.default is not None} | dict(values or {})
    _check(plan, numbers)
    return _Tape(plan, graphs, numbers).text(prompts)


def _check(plan: Plan, numbers: Mapping[str, float]) -> None:
    lacking = [ref.name for ref in plan.inputs if ref.name not in numbers]
    for said, found in (
        ("no model that it is bound to", plan.binding is None),
        ("guards; freeze the plan", any(step.guard is not None for step in plan.steps)),
        ("rows of some tokens", bool(tokens_of(plan))),
        ("tensors of its side-car", bool(plan.tensors)),
        (f"the input {lacking[:1]}", bool(lacking)),
        ("several networks", len({variant.model for variant in plan.variants}) > 1),
    ):
        if found:
            raise UnsupportedError(f"flat program: the plan has {said}; run the pack with vivace.runtime")


class _Tape:
    def __init__(self, plan: Plan, graphs: Sequence[Graph], numbers: Mapping[str, float]) -> None:
        assert plan.binding is not None, "the plan of a pack is bound"
        self.plan, self.graphs, self.numbers = plan, graphs, numbers
        self.shape, self.branches = plan.binding.latent_shape, branches_of(plan)
        self.number = {graph.name: number for number, graph in enumerate(graphs)}
        self.lines: list[str] = []

    def text(self, prompts: Mapping[str, Any]) -> str:
        self._say("vivace-program", 1)
        self._say("latent", *self.shape)
        for graph in self.graphs:
            self._say("graph", self.number[graph.name], graph.file)
        if "classes" in prompts:
            self._say("given", LABEL, "uncond", int(prompts["classes"]))
        self._before()
        program = program_of(self.plan, Given(self.numbers))
        self._stages("init", program.start)
        for row, (calls, stages) in enumerate(zip(calls_of(self.plan), program.rows, strict=True)):
            for call in calls.own:
                self._row(row, call)
            self._stages(f"step {row}", stages)
        self._say("result", "x")
        self._after()
        return "\n".join(self.lines) + "\n"

    def _say(self, *words: Any) -> None:
        texts = [f"{word:.9g}" if isinstance(word, float) else str(word) for word in words]
        if any(not text or not text.isprintable() or " " in text for text in texts):
            raise UnsupportedError(f"flat program: {texts!r:.100} cannot stand in a line of words")
        self.lines.append(" ".join(texts))

    def _of_role(self, role: str) -> list[Graph]:
        return [graph for graph in self.graphs if graph.role == role]

    # --- before and after the loop -----------------------------------------------------------------------------------
    def _before(self) -> None:
        """Position tables, and what does not depend on x, for every row that is evaluated."""
        for graph in self._of_role("positions"):
            self._say("call", self.number[graph.name], "once")
            for port in graph.inputs:
                self._say("in", port.name, port.dtype, *self._size(port))
            for port in graph.outputs:
                self._say("out", port.name, "whole", f"table.{port.key}")
        for row, step in enumerate(self.plan.steps):
            for graph in self._of_role("prepare") if step.variant is not None else ():
                self._say("call", self.number[graph.name], "once")
                for port in graph.inputs:
                    self._say("in", port.name, port.dtype, *self._given(port, row, self.branches))
                for port in graph.outputs:
                    self._say("out", port.name, "whole", f"row.{row}.{port.key}")

    def _after(self) -> None:
        for graph in self._of_role("decode"):
            self._say("call", self.number[graph.name], "pictures")
            for port in graph.inputs:
                self._say("in", port.name, port.dtype, "tile", 1, "x")
            for port in graph.outputs:
                self._say("out", port.name, "whole", "picture")
            self._say("picture", "picture")

    def _size(self, port: Port) -> tuple[Any, ...]:
        if port.source != "size":
            raise UnsupportedError(f"flat program: nothing gives input {port.name!r} of source {port.source!r}")
        return ("numbers", 1, 2, *self.shape[-2:])

    def _given(self, port: Port, row: int, branches: Sequence[str]) -> tuple[Any, ...]:
        """What depends on the row and the prompt alone."""
        step = self.plan.steps[row]
        if port.source == "timestep":
            return "fill", len(branches), float(step.timestep)
        if port.source == "condition":
            return "condition", port.key, *branches
        if port.source == "number":
            coef = dict(step.net_inputs).get(port.key)
            if coef is None:
                raise UnsupportedError(f"flat program: step {row} feeds the network no {port.key!r}")
            return "fill", len(branches), float(coef if isinstance(coef, float) else self.numbers[coef.name])  # type: ignore[union-attr]
        return self._size(port)

    # --- rows --------------------------------------------------------------------------------------------------------
    def _row(self, row: int, call: Call) -> None:
        graph = next((graph for graph in self.graphs if graph.structure == call.structure), None)
        if graph is None:
            raise UnsupportedError(f"flat program: no graph computes {call.structure}")
        chosen = [self.branches.index(branch) for branch in call.branches]
        self._say("call", self.number[graph.name], "pictures")
        for port in graph.inputs:
            self._say("in", port.name, port.dtype, *self._input(port, row, call, chosen))
        names = dict(zip(self.plan.steps[row].branches, self.plan.steps[row].outs, strict=True))
        for port in graph.outputs:
            if port.source in ("kept", "kept_scale"):
                self._say("out", port.name, "kept", _kept(port), len(self.branches), *chosen)
            elif port.source == "prediction":
                self._say("out", port.name, "branches", *(names[branch] for branch in call.branches))
            else:
                raise UnsupportedError(f"flat program: nothing reads output {port.name!r} of source {port.source!r}")

    def _input(self, port: Port, row: int, call: Call, chosen: Sequence[int]) -> tuple[Any, ...]:
        if port.source == "latent":
            return "tile", len(chosen), NET
        if port.source in ("kept", "kept_scale"):
            return "kept", _kept(port), *chosen
        if port.source == "weights":
            weights = call.weights[[kept.name for kept in call.structure.kept].index(port.key)]
            return "numbers", 1, len(weights), *map(float, weights)
        if port.source == "prepared":
            table = any(out.key == port.key for graph in self._of_role("positions") for out in graph.outputs)
            return ("whole", f"table.{port.key}") if table else ("rows", f"row.{row}.{port.key}", *chosen)
        return self._given(port, row, call.branches)

    def _stages(self, where: str, stages: Sequence[Stage]) -> None:
        """Runs of the step graph."""
        for stage in stages:
            if not isinstance(stage, Combine) or any(fields for _, fields in stage.terms):
                raise UnsupportedError(f"flat program: {where} does more than combine slots; use vivace.runtime")
            graph, matrix = self._step(), stage.coefficients
            given = {
                "slots": ("stack", *(slot for slot, _ in stage.terms)),
                "coefficients": ("numbers", 3, 1, *matrix.shape, *map(float, matrix.reshape(-1))),
                "fields": ("numbers", 3, 1, 1, 1, 1.0),
            }
            self._say("call", self.number[graph.name], "pictures")
            for port in graph.inputs:
                self._say("in", port.name, port.dtype, *given[port.source])
            self._say("out", graph.outputs[0].name, "columns", *stage.outs)

    def _step(self) -> Graph:
        found = self._of_role("step")
        if len(found) != 1:
            raise UnsupportedError(f"flat program: the pack has {len(found)} step graphs; it needs one")
        return found[0]


def _kept(port: Port) -> str:
    return f"{port.source}.{port.key}.{port.part}.{port.plane}"


def main() -> None:
    """Print the program of a pack: `python -m vivace.export.flat_program PACK [--guidance-scale 3.5]`."""
    parser = argparse.ArgumentParser(prog="python -m vivace.export.flat_program", description=main.__doc__)
    parser.add_argument("pack")
    parser.add_argument("--guidance-scale", type=float)
    asked = parser.parse_args()
    values = {} if asked.guidance_scale is None else {"guidance_scale": asked.guidance_scale}
    try:
        pack = open_pack(asked.pack)
        print(flat_program(pack.plan, pack.manifest.graphs, pack.manifest.prompts, values), end="")
    except VivaceError as error:
        sys.exit(f"flat_program: {error}")


if __name__ == "__main__":
    main()
