"""Sources of steps and Picard iteration on the bundled model, in the executor that it compiles to."""

import pytest
import torch

import vivace
from vivace.engine.request import Request


@pytest.fixture(scope="module")
def pipe():
    return vivace.load("emoji")


def plan_of(pipe, steps=5, **options):
    plan = vivace.make_plan(pipe.spec.schedule, "unipc", steps, prediction=pipe.spec.prediction, **options)
    return vivace.passes.apply_guidance(plan, 2.0)


@pytest.mark.parametrize("backend", ["auto", "eager"])
def test_a_source_runs_and_its_plan_gives_the_same_bits(pipe, backend):
    numbers = {"guidance": 2.0, "rtol": 0.6, "atol": 0.4}
    source = vivace.sources.AdaptiveODE(pipe.spec.schedule, pipe.spec.prediction, form="x0", **numbers)
    s = pipe.compile(source, backend=backend)
    states = [s.begin(Request("red heart", n=2, seed=3)), s.begin(Request("pizza", plan_of(pipe, 3), seed=3))]
    while running := [state for state in states if not state.done]:
        s.step(running)
    result, beside = (s.finish(state) for state in states)
    assert len(result.images) == 2 and len(beside.images) == 1
    for j, plan in enumerate(result.plans):
        again = pipe.compile(plan, backend=backend)("red heart", index=j, seed=3)
        assert torch.equal(again.latents[0], result.latents[j])
    assert result.receipt.details["source"]["name"] == "adaptive_ode"


def test_picard_is_the_sequential_result(pipe):
    plan = plan_of(pipe)
    want = pipe.compile(plan)("red heart", n=2, seed=3)
    for options, same in (({"tolerance": 0.0, "window": 3}, True), ({}, False)):
        result = pipe.compile(plan, backend="picard", **options)("red heart", n=2, seed=3)
        gap = float((result.latents - want.latents).square().mean().sqrt())
        assert gap == 0.0 if same else gap <= 0.1
        told = result.receipt.details["picard"]
        assert told["iterations"] <= 5 and result.receipt.nfe == told["evaluations"] >= 5
        assert result.plan == want.plan and result.receipt.compiled["network by"] in ("cpu", "eager")


def test_picard_runs_perturbed_branches(pipe):
    plan = vivace.passes.apply_perturbed_attention(plan_of(pipe), 2.0, blocks=(2, 4), interval=(0.0, 0.5))
    want = pipe.compile(plan)("red heart", n=2, seed=3)
    result = pipe.compile(plan, backend="picard", tolerance=0.0)("red heart", n=2, seed=3)
    assert torch.equal(result.latents, want.latents)


def test_options_of_picard_belong_to_picard(pipe):
    with pytest.raises(vivace.ArgumentError, match="backend='picard'"):
        pipe.compile(plan_of(pipe), window=4)
    with pytest.raises(vivace.UnsupportedError, match="step 0: the picard executor does not run"):
        pipe.compile(vivace.passes.apply_block_cache(plan_of(pipe), "fora", interval=2), backend="picard")
    source = vivace.sources.TimeShift(pipe.spec.schedule, pipe.spec.prediction)
    with pytest.raises(vivace.UnsupportedError, match="decides rows by those before"):
        pipe.compile(source, backend="picard")()
    with pytest.raises(vivace.ArgumentError, match="no plan"):
        pipe.compile("unipc")
