"""Inversion and steps in closed form on the bundled model, in both executors of the CPU."""

import numpy as np
import pytest
import torch

import vivace
from vivace import passes
from vivace.engine.calibrate.table import CalibrationTable

PROMPT, STEPS = "red heart", 10
ROUNDING = {"float32": 1e-5, "float64": 1e-12}


@pytest.fixture(scope="module")
def pipe():
    return vivace.load("emoji")


def plan_for(pipe, solver, scale=2.0, **options):
    plan = vivace.make_plan(pipe.spec.schedule, solver, STEPS, prediction=pipe.spec.prediction, **options)
    return passes.apply_guidance(plan, scale)


@pytest.mark.parametrize(("backend", "dtype"), [("eager", "float32"), ("cpu", "float32"), ("eager", "float64")])
def test_bdia_goes_back_to_the_noise_and_to_the_picture(pipe, backend, dtype):
    plan = plan_for(pipe, "bdia")
    run = pipe.compile(plan, backend=backend, dtype=dtype)
    made = run(PROMPT, seed=2)
    back = run(PROMPT, plan=passes.invert(plan, start="pair"), inputs={"start": made.latents, **made.slots})
    noise = torch.from_numpy(vivace.engine.noise.normals(pipe.spec.latent_shape, 2))
    assert (back.latents[0] - noise).abs().max() < ROUNDING[dtype]
    picture = made.latents.clamp(-1.0, 1.0)
    state = run(PROMPT, plan=passes.invert(plan), image=picture)
    again = run(PROMPT, plan=passes.retrace(plan), inputs={"start": state.latents, **state.slots})
    assert (again.latents - picture).abs().max() < ROUNDING[dtype]
    assert "exact to rounding" in str(state.receipt)


def test_a_picture_file_is_inverted(pipe, tmp_path):
    plan = plan_for(pipe, "ddim")
    run = pipe.compile(plan)
    picture = run(PROMPT, seed=1).images[0]
    state = run(PROMPT, plan=passes.invert(plan, evaluations=3), image=picture)
    back = run(PROMPT, plan=passes.retrace(plan), image=state.latents[0])
    off = np.asarray(back.images[0], dtype=float) - np.asarray(picture, dtype=float)
    plain = run(PROMPT, plan=passes.invert(plan), image=picture)
    worse = run(PROMPT, plan=passes.retrace(plan), image=plain.latents[0])
    off_plain = np.asarray(worse.images[0], dtype=float) - np.asarray(picture, dtype=float)
    assert np.square(off).mean() < np.square(off_plain).mean()


def test_both_executors_jump_to_the_same_bits(pipe):
    rng, shape = np.random.default_rng(0), pipe.spec.latent_shape
    size = int(np.prod(shape))
    arrays = {
        "means": rng.normal(size=(1, *shape)).astype(np.float32),
        "basis.all": np.linalg.qr(rng.normal(size=(size, 8)))[0].T.reshape(8, *shape).astype(np.float32),
        "variances.all": np.linspace(90.0, 5.0, 8),
        "rest.all": np.array([0.01]),
    }
    table = CalibrationTable("solver", pipe.spec.fingerprint, arrays, {"method": "teleport", "latent_shape": [*shape]})
    base = vivace.make_plan(pipe.spec.schedule, "unipc", STEPS, prediction=pipe.spec.prediction)
    plan = passes.apply_teleport(passes.apply_guidance(base, 2.0), table, share=0.3)
    found, results = [], []
    for backend in ("eager", "cpu"):
        run = pipe.compile(plan, backend=backend)
        state = run.begin(vivace.Request(PROMPT, seed=3))
        run.step([state])
        found.append(state.pool.state[state.entry.lowered.slots["x"], state.lanes[0]].clone())
        while not state.done:
            run.step([state])
        results.append(run.finish(state))
    assert torch.equal(*found) and "closed form" in str(results[0].receipt)
    assert (results[0].latents - results[1].latents).abs().max() < 1e-3
    assert results[0].receipt.nfe == 7
