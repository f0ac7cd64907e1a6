"""Transforms that reduce over the sample, end to end: formulas, mixed batches, and the schedulers that use them."""

import numpy as np
import pytest
import torch

import vivace
from tests.engine.plans import euler
from tests.engine.test_session import mixed, run, v_plan
from tests.engine.toy import Toy, session
from vivace.engine.passes import apply_guidance
from vivace.engine.plan import Affine, Plan, Step, Transform
from vivace.engine.request import Request

SHAPE = (3, 6, 5)


def network(x, t, branch="cond"):
    scale = 0.8 if branch == "cond" else 0.3
    return torch.tanh(scale * x + 0.001 * t.view(-1, 1, 1, 1)) + (0.2 if branch == "cond" else 0.0)


def rescaled(g, cond, phi):
    """Lin et al. 2023, eq. 15 and 16."""
    ratio = cond.flatten(1).std(1) / g.flatten(1).std(1)
    return phi * (g * ratio.view(-1, 1, 1, 1)) + (1.0 - phi) * g


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-13), (torch.float32, 1e-5)])
def test_guidance_rescale_is_the_formula(dtype, tolerance):
    noise = torch.randn(4, *SHAPE, dtype=dtype)
    x = noise.clone()
    for step in euler(6).steps:
        t = torch.full((4,), step.timestep, dtype=dtype)
        cond, uncond = network(x, t), network(x, t, "uncond")
        x = x - rescaled(uncond + 5.0 * (cond - uncond), cond, 0.7) / 6
    got = vivace.sample(network, apply_guidance(euler(6), 5.0, rescale=0.7), noise)
    assert torch.allclose(got, x, rtol=tolerance, atol=tolerance)


def test_rescale_by_zero_is_plain_guidance():
    noise = torch.randn(2, *SHAPE)
    plain = vivace.sample(network, apply_guidance(euler(4), 3.0), noise)
    assert torch.equal(vivace.sample(network, apply_guidance(euler(4), 3.0, rescale=0.0), noise), plain)


def thresholded(ratio, limit, steps=3):
    """x0 thresholded, then the network's next input from it."""
    ops = (
        Affine("m0", (("x", 1.2), ("out", -0.7))),
        Transform("dynamic_threshold", "m0", (), (("ratio", ratio), ("max", limit))),
        Affine("x", (("x", 0.4), ("m0", 0.6))),
    )
    rows = tuple(Step(1.0 - i / steps, i / steps, 1.0 - i / steps, ops) for i in range(steps))
    return Plan(rows, "v", (Affine("x", (("noise:0", 1.0),)),))


@pytest.mark.parametrize(("ratio", "limit"), [(0.0, 2.0), (0.5, 1.25), (0.995, 100.0), (1.0, 1.5)])
def test_dynamic_threshold_is_the_formula(ratio, limit):
    noise = 3.0 * torch.randn(4, *SHAPE, dtype=torch.float64)
    x = noise.clone()
    for step in thresholded(ratio, limit).steps:
        m0 = 1.2 * x - 0.7 * network(x, torch.full((4,), step.timestep, dtype=torch.float64))
        s = torch.quantile(m0.flatten(1).abs(), ratio, dim=1).clamp(1.0, limit).view(-1, 1, 1, 1)
        x = 0.4 * x + 0.6 * (m0.clamp(-s, s) / s)
    got = vivace.sample(network, thresholded(ratio, limit), noise)
    assert torch.allclose(got, x, rtol=1e-13, atol=1e-13)


def with_transforms():
    """Mixed requests, among them plans with one reduction a row, with two, and with none."""
    guided = apply_guidance(v_plan(4), 3.0, rescale=0.7)
    extra = [Request("abc", guided, n=2, seed=31), Request("a", thresholded(0.9, 1.5), n=3, seed=32)]
    both = apply_guidance(thresholded(0.995, 100.0, 5), 6.0, rescale=0.4)
    return [*mixed()[:4], *extra, Request("abcd", both, seed=33), Request("abcd", apply_guidance(v_plan(3), 2.0), n=2)]


def test_a_mixed_batch_with_transforms_gives_every_sample_the_bits_of_its_solo_run():
    requests = with_transforms()
    together = run(session(requests[0].plan), requests)
    for request, result in zip(requests, together, strict=True):
        assert torch.isfinite(result.latents).all()
        assert torch.equal(result.latents, run(session(requests[0].plan), [request])[0].latents)


def test_threads_do_not_change_bits():
    plan, toy = apply_guidance(thresholded(0.995, 100.0), 6.0, rescale=0.4), Toy()
    noise = torch.randn(6, 3, 128, 128)
    one, two = (
        session(plan, toy=toy, shape=(3, 128, 128), threads=threads)("ab", n=6, latents=noise).latents
        for threads in (1, 2)
    )
    assert torch.equal(one, two)


class Double:
    """`torch` with float32 replaced, so that a scheduler's casts keep float64."""

    float32 = torch.float64

    def __getattr__(self, name):
        return getattr(torch, name)


@pytest.mark.parametrize("limit", [1.0, 1.1, 100.0])
@pytest.mark.parametrize("name", ["UniPCMultistepScheduler", "DPMSolverMultistepScheduler", "DDIMScheduler"])
def test_schedulers_with_thresholding_run_as_in_diffusers(name, limit, monkeypatch):
    import diffusers

    scheduler = getattr(diffusers, name)(thresholding=True, sample_max_value=limit, dynamic_thresholding_ratio=0.9)
    plan = Plan.from_diffusers(scheduler, 7)
    scheduler.set_timesteps(7)
    for table in {"sigmas", "alphas_cumprod", "final_alpha_cumprod"} & set(vars(scheduler)):
        setattr(scheduler, table, getattr(scheduler, table).double())
    monkeypatch.setattr(f"{type(scheduler).__module__}.torch", Double())
    noise = torch.from_numpy(np.random.default_rng(0).standard_normal((3, *SHAPE)))
    x = noise
    for t in scheduler.timesteps:
        x = scheduler.step(network(x, t.double().expand(3)), t, x, return_dict=False)[0]
    got = vivace.sample(network, plan, noise)
    assert any(op.kind == "dynamic_threshold" for op in plan.ops() if isinstance(op, Transform))
    assert torch.allclose(got, x, rtol=1e-9, atol=1e-9 * float(x.abs().max()))
