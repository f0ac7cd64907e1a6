"""The bundled model through plans and sessions: what users call."""

from dataclasses import replace

import pytest
import torch

import vivace
from vivace.metrics import psnr

PROMPTS = ["red heart", "pizza", "rocket", "cat face", "tree", "U+1F600", "fire", None]


@pytest.fixture(scope="module")
def pipe():
    return vivace.load("emoji")


def plan_of(pipe, steps=3, guidance=2.0, interval=(0.0, 1.0), **options):
    spec = pipe.spec
    plan = vivace.make_plan(spec.schedule, steps=steps, prediction=spec.prediction, **options)
    return plan if guidance is None else vivace.passes.apply_guidance(plan, guidance, interval=interval)


def run(session, requests):
    states = [session.begin(request) for request in requests]
    results = [None] * len(states)
    while any(results[i] is None for i in range(len(states))):
        session.step([state for i, state in enumerate(states) if results[i] is None])
        for i, state in enumerate(states):
            if results[i] is None and state.done:
                results[i] = session.finish(state)
    return results


def test_eight_samples_of_eight_plans_have_the_bits_of_their_solo_runs(pipe):
    solvers = [("unipc", {}), ("ddim", {"eta": 1.0}), ("dpmpp_2m", {}), ("unipc", {"order": 3, "variant": "bh1"})] * 2
    requests = []
    for i, ((solver, options), prompt) in enumerate(zip(solvers, PROMPTS, strict=True)):
        plan = plan_of(
            pipe,
            2 + i,
            None if i == 6 else 1.5 + i,
            (0.0, 1.0 if i % 2 else 0.5),
            solver=solver,
            grid=["uniform", "trailing", "karras", "logsnr"][i % 4],
            **options,
        )
        requests.append(vivace.Request(prompt, plan, seed=i, index=i % 3))
    session = pipe.compile([request.plan for request in requests], backend="eager")
    assert session.probe.one_by_one is None
    together = run(session, requests)
    for request, result in zip(requests, together, strict=True):
        alone = pipe.compile(request.plan, backend="eager")
        assert torch.equal(run(alone, [request])[0].latents, result.latents)


def test_more_evaluations_come_closer_to_the_converged_picture(pipe):
    session = pipe.compile(plan_of(pipe, 60))
    converged = session("pizza", n=2, seed=3)
    quality = [
        psnr(session("pizza", n=2, seed=3, plan=plan_of(pipe, steps)).latents, converged.latents).mean()
        for steps in (3, 6, 12)
    ]
    assert quality[0] + 3 < quality[1] < quality[2] - 3


def test_pictures_are_at_model_size_and_the_receipt_counts(pipe):
    result = pipe.compile(plan_of(pipe))("cat face", n=2)
    assert [image.size for image in result.images] == [(32, 32)] * 2
    assert result.condition.name == "cat face"
    receipt = result.receipt.to_dict()
    assert (receipt["nfe"], receipt["branch_evals"], receipt["n"]) == (3, 6, 2)


def test_guidance_scale_of_a_call_overrides_the_plan(pipe):
    session = pipe.compile(plan_of(pipe, guidance=2.0))
    a = session("pizza", guidance_scale=3.0).latents
    assert torch.equal(a, pipe.compile(plan_of(pipe, guidance=3.0))("pizza").latents)


def test_image_to_image_starts_from_the_picture(pipe):
    full = plan_of(pipe, 10)
    session = pipe.compile(full)
    picture = session("pizza", seed=1).images[0]
    near = session("pizza", plan=full.tail(0.2), image=picture, seed=2)
    far = session("pizza", plan=full.tail(0.9), image=picture, seed=2)
    assert near.receipt.nfe == 2 and far.receipt.nfe == 9
    target = session("pizza", seed=1).latents
    assert psnr(near.latents, target).mean() > psnr(far.latents, target).mean() + 3


def test_bfloat16_stays_close_and_float64_runs(pipe):
    plan = plan_of(pipe, 4)
    exact = pipe.compile(plan, dtype="float64")("pizza", seed=2).latents
    assert exact.dtype == torch.float64
    assert psnr(pipe.compile(plan)("pizza", seed=2).latents, exact).mean() > 80
    assert psnr(pipe.compile(plan, dtype=torch.bfloat16)("pizza", seed=2).latents, exact).mean() > 30


def test_compile_takes_bound_and_saved_plans(pipe, tmp_path):
    plan = plan_of(pipe)
    plan.bind(pipe.spec).save(tmp_path / "plan.json")
    loaded = vivace.Plan.load(tmp_path / "plan.json")
    assert torch.equal(pipe.compile(loaded)("tree").latents, pipe.compile(plan)("tree").latents)


def test_a_plan_for_another_model_or_prediction_is_refused(pipe):
    with pytest.raises(vivace.PlanError, match="predicts 'v'"):
        pipe.compile(vivace.make_plan(pipe.spec.schedule, steps=3, prediction="eps"))
    other = plan_of(pipe).bind(replace(pipe.spec, fingerprint="0" * 64))
    with pytest.raises(vivace.PlanError, match="is bound to"):
        pipe.compile(other)


@pytest.mark.parametrize(
    ("options", "error", "fragment"),
    [
        ({"backend": "tensorrt"}, vivace.BackendError, "not part of this release"),
        ({"backend": "cuda_graph"}, vivace.BackendError, "'cuda_graph' cannot run here: it runs models on cuda"),
        ({"backend": "fast"}, vivace.BackendError, "unknown"),
        ({"device": "tpu9"}, vivace.ArgumentError, "tpu9"),
        ({"dtype": "int8"}, vivace.ArgumentError, "int8"),
        ({"threads": 0}, vivace.ArgumentError, "threads"),
        ({"batch": -1}, vivace.ArgumentError, "batch"),
    ],
)
def test_compile_options_are_checked(pipe, options, error, fragment):
    with pytest.raises(error, match=fragment):
        pipe.compile(plan_of(pipe), **options)


def test_load_refuses_what_it_cannot_read(tmp_path):
    with pytest.raises(vivace.ModelError, match="nowhere"):
        vivace.load("nowhere")
    with pytest.raises(vivace.UnsupportedError, match="object"):
        vivace.load(object())
