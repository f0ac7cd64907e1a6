"""Guidance in pipelines of diffusers: Adaptive Guidance and LinearAG in their loops, perturbed attention, fed scale."""

import pytest
import torch
from diffusers import DDIMScheduler
from diffusers.models.attention_processor import AttnProcessor2_0
from tests.models.pipelines import tiny

import vivace
from vivace.engine.passes import (
    apply_adaptive_guidance,
    apply_block_cache,
    apply_guidance,
    apply_linear_ag,
    apply_perturbed_attention,
    freeze,
    invert,
    retrace,
)
from vivace.engine.plan import Variant
from vivace.errors import UnsupportedError

GUIDED = ("sdxl", "dit", "wan")  # one batch, latents held twice, calls apart


def plan_for(pipe, steps=4, scale=3.0):
    return apply_guidance(vivace.Plan.from_diffusers(pipe.scheduler, steps=steps), scale)


def network_of(pipe):
    return pipe.unet if getattr(pipe, "unet", None) is not None else pipe.transformer


def run(name, plan, **changes):
    """(latents, rows that the network was handed, receipt) of a call of a pipeline made anew."""
    pipe = tiny.make(name)
    rows = []
    network_of(pipe).register_forward_pre_hook(
        lambda module, args, kwargs: rows.append(len((*args, *kwargs.values())[0])), with_kwargs=True
    )
    vivace.accelerate(pipe, plan if isinstance(plan, vivace.Plan) else plan(pipe))
    arguments = tiny.FAMILIES[name].arguments(**changes)
    made = torch.as_tensor(pipe(**arguments, generator=torch.Generator().manual_seed(0))[0])
    told = vivace.receipt(pipe)
    vivace.restore(pipe)
    return made, rows, told


@pytest.mark.parametrize("name", GUIDED)
def test_a_row_whose_guard_fired_runs_cond_alone(name):
    always = run(name, lambda pipe: apply_adaptive_guidance(plan_for(pipe), -0.999))
    first = run(name, lambda pipe: freeze(apply_adaptive_guidance(plan_for(pipe), 0.5), {i: True for i in range(1, 4)}))
    assert sum(always[1]) == sum(first[1]) == always[2].branch_evals == 5
    torch.testing.assert_close(always[0], first[0], rtol=1e-4, atol=1e-5)
    assert [decision.fired for decision in always[2].decisions] == [(True,)] * 3


@pytest.mark.parametrize("name", GUIDED)
def test_a_guard_that_never_fires_gives_the_bits_of_guidance(name):
    never = run(name, lambda pipe: apply_adaptive_guidance(plan_for(pipe), 0.9999999))
    full = run(name, lambda pipe: apply_linear_ag(plan_for(pipe), rows=[]))
    assert sum(never[1]) == sum(full[1]) == 8
    torch.testing.assert_close(never[0], full[0], rtol=1e-4, atol=1e-5)
    assert not any(any(decision.fired) for decision in never[2].decisions)


@pytest.mark.parametrize("name", GUIDED)
def test_estimated_rows_run_cond_alone(name):
    made, rows, told = run(name, lambda pipe: apply_linear_ag(plan_for(pipe), rows=[2, 3]))
    assert sum(rows) == told.branch_evals == 6 and bool(torch.isfinite(made).all())


def test_a_guarded_row_runs_its_own_expert():
    always = run("wan22", lambda pipe: apply_adaptive_guidance(plan_for(pipe), -0.999))
    first = run("wan22", lambda pipe: freeze(apply_adaptive_guidance(plan_for(pipe)), {i: True for i in (1, 2, 3)}))
    assert (
        sum(always[1]) == sum(first[1]) == 4 and always[2].branch_evals == 5
    )  # one row of four is the second expert's
    torch.testing.assert_close(always[0], first[0], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["sdxl", "wan"])
def test_what_was_decided_before_a_callback_changed_the_latents_is_told(name):
    def change(pipe, step, timestep, given):
        return {"latents": 0.5 * given["latents"]} if step == 2 else {}

    steps = {"num_inference_steps": 6, "callback_on_step_end": change}
    told = run(name, lambda pipe: apply_adaptive_guidance(plan_for(pipe, 6), -0.999), **steps)[2]
    left_out = [row.row for row in told.rows if row.branches == ("cond",)]
    assert left_out == [decision.row for decision in told.decisions if all(decision.fired)] == [1, 2, 4, 5]


def test_adaptive_guidance_beside_caches_is_to_be_frozen_first():
    pipe = tiny.make("sd15")
    plan = apply_adaptive_guidance(apply_block_cache(plan_for(pipe, 8), "fora", interval=2), 0.9)
    with pytest.raises(UnsupportedError, match="freeze its decisions first"):
        vivace.accelerate(pipe, plan)


def test_a_plan_that_starts_from_a_picture_is_not_run_from_noise():
    pipe = tiny.make("sdxl")
    plan = vivace.make_plan(vivace.NoiseSchedule.vp(DDIMScheduler().betas.numpy()), "ddim", 4)
    for made in (invert(plan), retrace(plan)):
        with pytest.raises(UnsupportedError, match="starts from 'input:start'"):
            vivace.accelerate(pipe, made)


# ---------------------------------------------------------------- perturbed attention
class Identity(AttnProcessor2_0):
    """The attention of diffusers with the identity map: projections of the values alone."""

    def __call__(self, attn, hidden_states, *args, **kwargs):
        return attn.to_out[1](attn.to_out[0](attn.to_v(hidden_states)))


def test_the_branch_is_the_network_with_identity_maps():
    pipe = tiny.make("sd15")
    loaded = vivace.load(pipe)
    plan = apply_perturbed_attention(loaded.plan(2), 2.0, blocks=(0, 1))
    session = loaded.compile(plan, backend="eager")
    denoiser, condition = session.denoiser, session.denoiser.encode(prompt_of("sd15"))
    x = torch.randn(1, *loaded.spec.latent_shape, generator=torch.Generator().manual_seed(0))
    variant = session.plans[0].steps[0].variant
    cond, worse = denoiser.evaluate(x, [500.0], [condition], variant)
    (plain,) = denoiser.evaluate(x, [500.0], [condition], Variant())
    assert torch.equal(cond, plain)
    first = denoiser.cached(denoiser.networks["main"]).parts.blocks[0].name
    for path, module in pipe.unet.named_modules():
        if path.startswith(first) and path.endswith("attn1"):
            module.set_processor(Identity())
    (want,) = denoiser.evaluate(x, [500.0], [condition], Variant())
    torch.testing.assert_close(worse, want, rtol=1e-5, atol=1e-6)
    assert not torch.allclose(worse, cond, atol=1e-4)


def test_pictures_of_perturbed_rows_keep_their_bits_in_any_company():
    loaded = vivace.load(tiny.make("sd15"))
    compiled = loaded.compile(apply_perturbed_attention(loaded.plan(2), 2.0, blocks=(0, 1)))
    both = compiled(prompt_of("sd15"), n=2, seed=1)
    for j in range(2):
        assert torch.equal(compiled(prompt_of("sd15"), index=j, seed=1).latents[0], both.latents[j])
    assert any("identity" in use.reason for use in both.receipt.kernels)


def prompt_of(name):
    arguments = tiny.FAMILIES[name].arguments()
    return {key: value for key, value in arguments.items() if "prompt" in key}


def test_joint_attention_refuses_the_identity():
    loaded = vivace.load(tiny.make("sd3"))
    with pytest.raises(UnsupportedError, match="no attention among image tokens alone"):
        loaded.compile(apply_perturbed_attention(loaded.plan(2), 2.0, blocks=(0, 1)), backend="eager")


# ---------------------------------------------------------------- embedded
def test_flux_is_fed_the_scale_of_the_request():
    pipe = tiny.make("flux")
    loaded = vivace.load(pipe)
    fed = []
    hook = lambda module, args, kwargs: fed.append(kwargs["guidance"].tolist())  # noqa: E731
    handle = pipe.transformer.register_forward_pre_hook(hook, with_kwargs=True)
    plan = vivace.make_plan(vivace.NoiseSchedule.flow(timestep_scale=1000.0), "flow_euler", 2, prediction="flow")
    plan = apply_guidance(plan, 3.5, kind="embedded")
    session = loaded.compile(plan, backend="eager")
    fed.clear()
    prompt = prompt_of("flux")
    one = session(prompt, seed=1)
    assert fed and all(value == 3.5 for row in fed for value in row)
    fed.clear()
    other = session(prompt, seed=1, guidance_scale=1.5)
    assert all(value == 1.5 for row in fed for value in row) and not torch.equal(one.latents, other.latents)
    handle.remove()


def test_networks_without_a_scale_refuse_it():
    loaded = vivace.load(tiny.make("sd3"))
    with pytest.raises(UnsupportedError, match="network input 'guidance'"):
        loaded.compile(apply_guidance(loaded.plan(2), kind="embedded"), backend="eager")
