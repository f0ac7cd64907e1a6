"""Damaged plan files must give one clear error each: python -m vivace.bench.fuzz_plans --count 100000 --seed 0

Mutation i of a seed is the same on every machine, whatever the number of processes. Each file is loaded; what loads is
printed, saved, loaded again, bound to a toy model and lowered. A failure is: an exception of another kind, a message of
several lines or without the file's name, a load or the rest of more than a second, a file left behind. It is kept with
its input. Prints one JSON line; the exit status is 1 when anything failed.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import signal
import sys
import tempfile
import time
import traceback
from collections import Counter
from concurrent.futures import ProcessPoolExecutor
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from random import Random
from typing import Any

import numpy as np

from vivace.bench.mutate import mutate
from vivace.engine.bind import ModelSpec
from vivace.engine.lower import Given, lower_plan
from vivace.engine.plan import (
    Action,
    Affine,
    AgeRef,
    Args,
    Guard,
    InputRef,
    Plan,
    Recipe,
    Rule,
    Step,
    TensorRef,
    Transform,
    Variant,
)
from vivace.engine.plan_io import SIDE_CAR, canonical, load_plan, tensor_infos
from vivace.errors import OutputError, PlanError, VivaceError

SLOW = 1.0  # seconds of processor time
HANGS = 20  # seconds after which a case is stopped
LONGEST = 1000  # characters of a message
SHAPE = (3, 8, 8)
SPEC = ModelSpec("toy", "0" * 64, "eps", SHAPE, 4, (4, 4), branches=("cond", "uncond"))
GUIDED = Variant(branches=("cond", "uncond"))


# --- what is damaged -------------------------------------------------------------------------------------------------
def plans() -> list[Plan]:
    """Small legal plans that together use every type and every field of the schema."""
    start = (Affine("x", (("noise:0", 1.0),)),)
    flow = tuple(Step(1 - i / 4, i / 4, 1 - i / 4, (Affine("x", (("x", 1.0), ("out", -0.25))),)) for i in range(4))
    euler = Plan(flow, "flow", start)
    rows = tuple(_guided(i) for i in range(3))
    recipe = Recipe("make_plan", Args.of({"steps": 3, "grid": {"rho": 7.0}, "table": [0.5, None, True, "a"]}), 0.5,
                    (("apply_guidance", Args.of({"scale": 4.0})),))  # fmt: skip
    guided = Plan(rows, "eps", start, recipe)
    arrays = {name: np.linspace(-1, 1, 192, dtype=kind).reshape(SHAPE) for name, kind in (("mean", "f4"), ("w", "f8"))}
    arrays |= {"gains": np.linspace(0, 1, 2), "basis": np.linspace(-1, 1, 384, dtype="f4").reshape(2, *SHAPE)}
    last = _cached(), _some_tokens(), _clamped()
    infos, results = tensor_infos(arrays), ("x", "z")
    cached = Plan((*rows[:2], *last), "eps", start, recipe, infos, arrays=arrays, results=results)
    rules = (Rule((0, 2), action=Action.COMPUTE, order=1), Rule((-2, 0), "attn", ("cond",), precision="int8"))
    rows = tuple(replace(row, variant=replace(GUIDED, rules=rules)) for row in rows)
    return [euler, guided, cached, Plan(rows, "eps", start).bind(SPEC)]


def _guided(i: int) -> Step:
    ops = (
        Affine("d", (("cond", 1.0), ("uncond", -1.0))),
        Affine("g", (("uncond", 1.0), ("d", InputRef("guidance_scale", 4.0)))),
        Affine(f"m{i % 2}", (("x", 2.0), ("g", -1.75))),
        Affine("x", (("x", 0.5), (f"m{i % 2}", 0.75), ("noise:1", 0.1), *([(f"m{1 - i % 2}", -0.25)] if i else []))),
    )
    level = (0.1 + 0.2 * i, 0.9 - 0.2 * i)
    rules = (
        Rule((0, 2), "attn", ("cond",), Action.COMPUTE, 1, "bf16", "int8"),
        Rule((0, 0), "kv", None, Action.COMPUTE),
    )
    return Step(900.0 - i, *level, ops, replace(GUIDED, rules=rules), outs=("cond", "uncond"))


def _cached() -> Step:
    rules = (Rule((0, 2), "attn", ("cond",), Action.FORECAST, 1), Rule((2, 4), "mlp", share=0.5))
    variant = Variant("main", ("cond", "uncond"), rules)
    ops = (
        Affine("y", (("x", TensorRef("mean")), ("one", AgeRef((1.0, 0.5, 0.0))), ("noise:3", InputRef("w", -0.0))), 2),
        Transform("cfg_rescale", "y", ("x",), (("phi", 0.7),)),
        Affine("x", (("x", 0.5), ("y", 1e-300), ("input:mask", 0.1))),
    )
    guard = Guard("cosine", "above", 0.99, Variant(), (1.0, 2.0), True)
    return Step(0.1, 0.99, 0.1, ops, variant, "x", 0.3, ("a", "b"), (("scale", 2.5),), (2.0, -1.0), guard, True)


def _some_tokens() -> Step:
    rules = (Rule((0, 0), "kv", None, Action.REUSE),)
    variant = Variant("main", ("cond", "uncond"), rules, 0.5, "norm", (("bound", 3.0), ("starvation", 0.25)))
    return Step(0.05, 1.0, 0.05, (Affine("x", (("x", 0.5), ("a", 0.5))),), variant, outs=("a", "b"))


def _clamped() -> Step:
    ops = (
        Affine("z", (("x", TensorRef("w")), ("one", 0.5))),
        Transform("clamp", "z", (), (("low", -1.0), ("high", InputRef("limit", 1.0)))),
        Transform("low_rank", "z", (), (("gains", TensorRef("gains")), ("basis", TensorRef("basis")))),
        Affine("x", (("z", 1.0), ("x", InputRef("mask")))),
    )
    return Step(0.0, 1.0, 0.0, ops, None)


def seeds() -> list[tuple[bytes, bytes | None]]:
    """The plans as files: JSON and side-car."""
    found = []
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "plan.json")
        for plan in plans():
            plan.save(path)
            side_car = path.with_suffix(SIDE_CAR)
            found.append((path.read_bytes(), side_car.read_bytes() if plan.tensors else None))
    return found


# --- one case --------------------------------------------------------------------------------------------------------
def case(seed: int, number: int, files: list[tuple[bytes, bytes | None]]) -> tuple[bytes, bytes | None]:
    """Mutation `number` of `seed`."""
    rng = Random(f"{seed}/{number}")
    return mutate(rng, *files[rng.randrange(len(files))])


def attempt(folder: Path, text: bytes, side_car: bytes | None) -> str:
    """How far a file comes: "refused", "loaded", "bound" or "lowered". Raises whatever is not a clean refusal."""
    path = folder / "plan.json"
    path.write_bytes(text)
    path.with_suffix(SIDE_CAR).unlink(missing_ok=True)
    if side_car is not None:
        path.with_suffix(SIDE_CAR).write_bytes(side_car)
    begin, plan = time.process_time(), None
    try:
        plan = load_plan(path)
    except (PlanError, OutputError) as error:
        _clear(error, str(path))
    _quick("load", begin)
    if plan is None:
        return "refused"
    begin = time.process_time()
    outcome = _use(plan, folder)
    _quick("use", begin)
    return outcome


def _use(plan: Plan, folder: Path) -> str:
    str(plan)
    again = folder / "again" / "plan.json"
    again.parent.mkdir(exist_ok=True)
    plan.save(again)
    back = load_plan(again)
    assert canonical(back) == canonical(plan) and back.hash == plan.hash, "saved and loaded is another plan"
    left = set(os.listdir(again.parent)) - {again.name, again.with_suffix(SIDE_CAR).name}
    assert not left, f"files left behind: {left}"
    try:
        bound = plan.bind(replace(SPEC, prediction=plan.prediction))
        assert bound.bind(replace(SPEC, prediction=plan.prediction)) is bound
    except VivaceError as error:
        _clear(error)
        return "loaded"
    values = {ref.name: 0.5 if ref.default is None else ref.default for ref in bound.inputs if ref.name != "mask"}
    try:
        lower_plan(bound, Given(values), {info.key: n for n, info in enumerate(bound.tensors)})
    except VivaceError as error:
        _clear(error)
        return "bound"
    return "lowered"


def _clear(error: Exception, named: str = "") -> None:
    message = str(error)
    assert len(message.splitlines()) == 1, f"a message of several lines: {message!r}"
    assert named in message and len(message) < LONGEST, f"a message without the file's name, or too long: {message!r}"


def _quick(what: str, begin: float) -> None:
    seconds = time.process_time() - begin
    assert seconds <= SLOW, f"{what} took {seconds:.2f} s"


# --- many cases ------------------------------------------------------------------------------------------------------
def fuzz(seed: int, first: int, last: int, keep: str | None = None) -> dict[str, Any]:
    """Counts of outcomes of mutations first .. last - 1; failures as (number, error), inputs kept in folder `keep`."""
    files, counts, failures = seeds(), Counter[str](), []
    previous = signal.signal(signal.SIGALRM, _hang)
    with tempfile.TemporaryDirectory() as folder:
        for number in range(first, last):
            text, side_car = case(seed, number, files)
            signal.alarm(HANGS)
            try:
                counts[attempt(Path(folder), text, side_car)] += 1
            except Exception as error:
                counts["failed"] += 1
                failures.append((number, f"{type(error).__name__}: {error}"))
                if keep is not None:
                    _keep(Path(keep, f"{seed}-{number}"), text, side_car, traceback.format_exc())
            finally:
                signal.alarm(0)
    signal.signal(signal.SIGALRM, previous)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    return {"counts": dict(counts), "failures": failures, "peak_mib": round(peak)}


def _hang(*_: object) -> None:
    raise TimeoutError(f"no end after {HANGS} s")


def _keep(folder: Path, text: bytes, side_car: bytes | None, story: str) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "plan.json").write_bytes(text)
    (folder / "error.txt").write_text(story, errors="backslashreplace")
    if side_car is not None:
        (folder / f"plan{SIDE_CAR}").write_bytes(side_car)


def main() -> int:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=100_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--first", type=int, default=0, help="number of the first mutation")
    parser.add_argument("--jobs", type=int, default=1, help="processes")
    parser.add_argument("--keep", default="build/fuzz_plans", help="folder for inputs that failed")
    args = parser.parse_args()
    begin, end, span = time.perf_counter(), args.first + args.count, 1000
    ranges = [(first, min(first + span, end)) for first in range(args.first, end, span)]
    counts, failures, peak = Counter[str](), [], 0
    with ProcessPoolExecutor(args.jobs) as workers:
        for done in [workers.submit(fuzz, args.seed, *cut, args.keep) for cut in ranges]:
            part = done.result()
            counts.update(part["counts"])
            failures += part["failures"]
            peak = max(peak, part["peak_mib"])
    report = {"count": args.count, "seed": args.seed, **{name: counts[name] for name in sorted(counts)}}
    report |= {"seconds": round(time.perf_counter() - begin, 1), "peak_mib": peak, "failures": failures[:20]}
    with suppress(BrokenPipeError):
        print(json.dumps(report))
    return int(bool(failures))


if __name__ == "__main__":
    sys.exit(main())
